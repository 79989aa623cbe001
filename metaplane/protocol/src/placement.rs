//! Weighted rendezvous hashing: each placement group goes to the core with the best score, so that
//! adding or removing a node moves only the groups it wins or loses; its other members go to the best cores of the next
//! best nodes, so that who takes over is who would have been the best without the node that was lost.
//!
//! Here because both use it: the controller for where a group is wanted, the leader for its members. Nothing of it is
//! in the state machine: scores are floating-point numbers.
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

/// The best `count` cores for a group, each on a node of its own, the best first: that is [`primary_of`].
pub fn members_of(pg: PgId, nodes: &[&NodeInfo], count: usize) -> Vec<ShardRef> {
    let mut best: Vec<(f64, ShardRef)> = Vec::with_capacity(nodes.len());
    for node in nodes {
        let Some(shard) = primary_of(pg, &[node]) else { continue };
        let weight = node.capacity_bytes.max(1) as f64 / node.ports.len().max(1) as f64;
        best.push((score(pg, shard, weight), shard));
    }
    best.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    best.into_iter().map(|(_, shard)| shard).take(count).collect()
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

    #[test]
    fn members_are_on_different_nodes_spread_evenly_and_the_next_one_is_the_heir() {
        let nodes: Vec<_> = (1..=4).map(|i| node(i, 2, 100)).collect();
        let refs: Vec<_> = nodes.iter().collect();
        let mut held: HashMap<NodeId, u32> = HashMap::new();
        for pg in (0..4096).map(PgId) {
            let members = members_of(pg, &refs, 2);
            assert_eq!(members.len(), 2);
            assert_ne!(members[0].node, members[1].node);
            assert_eq!(Some(members[0]), primary_of(pg, &refs));
            let without: Vec<_> =
                refs.iter().copied().filter(|n| n.id != members[0].node).collect();
            assert_eq!(Some(members[1]), primary_of(pg, &without), "the heir");
            members.iter().for_each(|m| *held.entry(m.node).or_default() += 1);
        }
        assert!(held.values().all(|n| (1800..2300).contains(n)), "{held:?}");
        assert_eq!(members_of(PgId(1), &refs[..1], 2).len(), 1, "there are no more nodes");
        assert!(members_of(PgId(1), &[], 2).is_empty());
    }
}
