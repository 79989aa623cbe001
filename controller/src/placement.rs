//! Weighted rendezvous hashing: each placement group goes to the core with the best score, so that
//! adding or removing a node moves only the groups it wins or loses.
//!
//! Score = -w / ln(u), u uniform in (0,1) from a hash of (group, node, core): Thaler and
//! Ravishankar, "Using Name-Based Mappings to Increase Hit Rates" (1998), in the weighted form of
//! Schindelhauer and Schomaker (2005).

use ebb_dataplane_protocol::{CoreId, NodeInfo, PgId, ShardRef};

/// SplitMix64's finaliser.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn score(pg: PgId, shard: ShardRef, weight: f64) -> f64 {
    let h =
        mix(mix(u64::from(pg.0)) ^ mix(u64::from(shard.node.0) << 16 | u64::from(shard.core.0)));
    // 53 bits, never 0 and never 1.
    let u = ((h >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -weight / u.ln()
}

/// The core that should hold a group; `None` without nodes. Nodes count by their capacity.
pub fn primary_of(pg: PgId, nodes: &[&NodeInfo]) -> Option<ShardRef> {
    let mut best: Option<(f64, ShardRef)> = None;
    for node in nodes {
        let weight = node.capacity_bytes.max(1) as f64 / node.ports.len().max(1) as f64;
        for core in 0..node.ports.len() {
            let shard = ShardRef { node: node.id, core: CoreId(core as u16) };
            let s = score(pg, shard, weight);
            if best.is_none_or(|(b, r)| s > b || (s == b && shard < r)) {
                best = Some((s, shard));
            }
        }
    }
    best.map(|(_, shard)| shard)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_dataplane_protocol::{NodeId, NodeState};
    use std::collections::HashMap;

    fn node(id: u32, cores: usize, capacity: u64) -> NodeInfo {
        NodeInfo {
            id: NodeId(id),
            store: u128::from(id),
            state: NodeState::Active,
            host: "h".into(),
            ports: vec![1; cores],
            capacity_bytes: capacity,
        }
    }

    fn place(nodes: &[NodeInfo]) -> HashMap<PgId, ShardRef> {
        let refs: Vec<_> = nodes.iter().collect();
        (0..4096).map(|i| (PgId(i), primary_of(PgId(i), &refs).expect("nodes"))).collect()
    }

    #[test]
    fn a_new_node_only_takes_and_takes_its_share() {
        let mut nodes: Vec<_> = (1..=4).map(|i| node(i, 2, 100)).collect();
        let before = place(&nodes);
        nodes.push(node(5, 2, 100));
        let after = place(&nodes);
        let moved: Vec<_> = before.iter().filter(|(pg, s)| after[*pg] != **s).collect();
        assert!(
            moved.iter().all(|(pg, _)| after[*pg].node == NodeId(5)),
            "moved between old nodes"
        );
        let share = moved.len() as f64 / before.len() as f64;
        assert!((0.17..0.23).contains(&share), "took {share}, a fifth was due");
    }

    #[test]
    fn capacity_weighs() {
        let placed = place(&[node(1, 1, 100), node(2, 1, 300)]);
        let big = placed.values().filter(|s| s.node == NodeId(2)).count() as f64 / 4096.0;
        assert!((0.71..0.79).contains(&big), "three quarters were due, got {big}");
    }

    #[test]
    fn nobody_holds_a_group_of_no_nodes() {
        assert_eq!(primary_of(PgId(1), &[]), None);
    }
}
