//! The cluster map: nodes, their cores' ports, and who holds each placement group. Computed by the
//! controller, committed by the metadata plane, versioned; everybody else only reads it.

use crate::ids::*;
use rkyv::{Archive, Deserialize, Serialize};

/// Life of a node.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// Registered, holds no placement group yet.
    Joining,
    /// May hold placement groups.
    Active,
    /// Its groups are being moved away.
    Draining,
    /// Acked an epoch without groups and reported dirty = pins = 0; never comes back.
    Gone,
}

/// A data node.
#[derive(
    Clone,
    Debug,
    PartialEq,
    Eq,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct NodeInfo {
    /// The node.
    pub id: NodeId,
    /// Random identity of its store; a wiped disk has another.
    pub store: u128,
    /// Its state.
    pub state: NodeState,
    /// Host name or address clients connect to.
    pub host: String,
    /// One port per core.
    pub ports: Vec<u16>,
    /// Bytes of its device that may hold chunks.
    pub capacity_bytes: u64,
}

/// One core of one node.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct ShardRef {
    /// The node.
    pub node: NodeId,
    /// The core on it.
    pub core: CoreId,
}

/// A placement group's holders.
#[derive(
    Clone,
    Debug,
    Default,
    PartialEq,
    Eq,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct PgEntry {
    /// Grows with every change of the members.
    pub epoch: PgEpoch,
    /// The in-sync replicas in order; the first is the primary. Empty: nobody holds it (scale zero).
    pub members: Vec<ShardRef>,
    /// Cores on their way to be replicas: they get every mutation, and do not count yet (R47).
    pub syncing: Vec<ShardRef>,
    /// The map version in which the current primary took over; grants issued under an older one
    /// are refused there.
    pub since_map_version: MapVersion,
    /// The group is changing hands: its primary refuses writes.
    pub moving: bool,
    /// The epoch in which the group last got a holder that was not told its windows (PROTOCOL R24, R27):
    /// a write sent in an older one, and never answered, may have been applied, and nobody knows.
    pub windows_since: PgEpoch,
    /// With fewer in-sync members than this, writes are refused with `Busy` (R42). 0 and 1 ask for nothing.
    pub min_in_sync: u8,
}

impl PgEntry {
    /// Who serves the group.
    pub fn primary(&self) -> Option<ShardRef> {
        self.members.first().copied()
    }
    /// Everybody who has something of it: the in-sync members, then those on the way.
    pub fn holders(&self) -> impl Iterator<Item = ShardRef> {
        self.members.iter().chain(&self.syncing).copied()
    }
    /// Somebody beside the primary is a member, in-sync or not.
    pub fn has_others(&self) -> bool {
        self.members.len() + self.syncing.len() > 1
    }
}

/// The cluster map.
#[derive(
    Clone,
    Debug,
    Default,
    PartialEq,
    Eq,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct ClusterMap {
    /// Grows with every change.
    pub version: MapVersion,
    /// The cluster.
    pub cluster: ClusterId,
    /// How often it was woken.
    pub incarnation: Incarnation,
    /// All nodes that are not gone.
    pub nodes: Vec<NodeInfo>,
    /// The placement groups; the count is fixed at format time.
    pub pgs: Vec<PgEntry>,
}

impl ClusterMap {
    /// The number of placement groups. A map has at most 65,535; a peer's longer one counts as that.
    pub fn pg_count(&self) -> u16 {
        u16::try_from(self.pgs.len()).unwrap_or(u16::MAX)
    }
    /// The group of a chunk. `None` before the cluster is formatted.
    pub fn pg_of(&self, inode: InodeId, chunk: ChunkIndex) -> Option<(PgId, &PgEntry)> {
        if self.pgs.is_empty() {
            return None;
        }
        let id = PgId::of_chunk(inode, chunk, self.pg_count());
        Some((id, &self.pgs[usize::from(id.0)]))
    }
    /// A node.
    pub fn node(&self, id: NodeId) -> Option<&NodeInfo> {
        self.nodes.iter().find(|n| n.id == id)
    }
    /// Where a core listens.
    pub fn address(&self, shard: ShardRef) -> Option<(&str, u16)> {
        let node = self.node(shard.node)?;
        Some((&node.host, *node.ports.get(usize::from(shard.core.0))?))
    }
    /// Groups of which a node holds something, in whatever role.
    pub fn groups_of(&self, node: NodeId) -> impl Iterator<Item = (PgId, &PgEntry)> {
        self.pgs
            .iter()
            .take(usize::from(u16::MAX))
            .enumerate()
            .filter(move |(_, pg)| pg.holders().any(|m| m.node == node))
            .map(|(i, pg)| (PgId(i as u16), pg))
    }
    /// Of those, the groups that have no in-sync member anywhere else.
    pub fn only_on(&self, node: NodeId) -> impl Iterator<Item = (PgId, &PgEntry)> {
        let alone =
            move |pg: &PgEntry| !pg.members.is_empty() && pg.members.iter().all(|m| m.node == node);
        self.groups_of(node).filter(move |(_, pg)| alone(pg))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_with_more_groups_than_can_be_numbered_is_no_panic() {
        let map = ClusterMap { pgs: vec![PgEntry::default(); 70_000], ..ClusterMap::default() };
        assert_eq!(map.pg_count(), u16::MAX);
        assert!(map.pg_of(InodeId(1), ChunkIndex(2)).is_some());
        assert_eq!(map.groups_of(NodeId(0)).count(), 0);
    }
}
