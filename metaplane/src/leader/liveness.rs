//! Heartbeats of data nodes, in memory: what the leader heard, and when; and which nodes are *cut off* (PROTOCOL R23, I5).
//!
//! A lease counts from the sending of its heartbeat, so it is over a lease (and the drift of two clocks) after the leader
//! noted the heartbeat's arrival, which it does before it looks at the map that goes with it. From then on the node's process serves
//! nothing until it is given another lease. A new leader doesn't know what its predecessor gave: it counts from its own start.
//! While groups of a node get a stand-in the node is *barred*: a lease given between the decision and the new epoch would be
//! one under the old map. Nothing else is concluded from silence: a node is gone only by its own word, or a person's.

use ebb_dataplane_protocol::control::CoreStats;
use ebb_dataplane_protocol::replica::Wishes;
use ebb_dataplane_protocol::{ClusterMap, CoreId, MapVersion, NodeId, PgId, ShardRef};
use ebb_metaplane_protocol::admin::NodeStatus;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// From here on dirty data is flushed before it is due.
const PRESSURE_PERMILLE: u16 = 500;
/// What a node said of that earlier is no longer so.
const PRESSURE_AGE_MAX: Duration = Duration::from_secs(5);

/// What a node said last.
#[derive(Clone, Debug)]
struct Heard {
    at: Instant,
    boot: u128,
    map_version: MapVersion,
    stats: Vec<CoreStats>,
    dirty_groups: Vec<PgId>,
    wishes: Wishes,
}

/// What is known of a node's lease.
#[derive(Clone, Copy, Debug)]
struct Lease {
    /// A lease that was given is over by this, plus lease and drift.
    from: Instant,
    /// The state machine's sequence, read when it was over.
    over: Option<u64>,
    /// Stand-ins under way.
    barred: u32,
}

#[derive(Debug)]
struct Table {
    /// This leadership's start, and its number.
    since: Instant,
    term: u64,
    heard: HashMap<NodeId, Heard>,
    leases: HashMap<NodeId, Lease>,
}

/// The table.
#[derive(Debug)]
pub(crate) struct Liveness(Mutex<Table>);

impl Default for Liveness {
    fn default() -> Self {
        let (heard, leases) = (HashMap::new(), HashMap::new());
        Self(Mutex::new(Table { since: Instant::now(), term: 0, heard, leases }))
    }
}

impl Table {
    fn lease(&mut self, node: NodeId) -> &mut Lease {
        let from = self.since;
        self.leases.entry(node).or_insert(Lease { from, over: None, barred: 0 })
    }
    fn silent(&self, node: NodeId) -> Duration {
        self.leases.get(&node).map_or(self.since, |l| l.from).elapsed()
    }
}

/// A node gets no lease while this lives.
#[derive(Debug)]
pub(crate) struct Bar<'a> {
    liveness: &'a Liveness,
    node: NodeId,
    term: u64,
}

impl Bar<'_> {
    /// Whether the leadership that it was made in lasts.
    pub(crate) fn holds(&self) -> bool {
        self.liveness.table().term == self.term
    }
    /// Nobody knows whether the new epoch will come: no lease any more in this leadership.
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        let mut table = self.liveness.table();
        if table.term == self.term {
            let lease = table.lease(self.node);
            lease.barred = lease.barred.saturating_sub(1);
        }
    }
}

impl Liveness {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another leadership begins: what was heard before it counts no more.
    pub(crate) fn clear(&self) {
        let mut table = self.table();
        table.since = Instant::now();
        table.term += 1;
        table.heard.clear();
        table.leases.clear();
    }

    /// A heartbeat came. Said before the map is read that is answered with the lease; `false`: it gets none.
    pub(crate) fn begin_lease(&self, node: NodeId) -> bool {
        let mut table = self.table();
        let lease = table.lease(node);
        if lease.barred > 0 {
            return false;
        }
        (lease.from, lease.over) = (Instant::now(), None);
        true
    }

    /// For how long this leader leads.
    pub(crate) fn leads_for(&self) -> Duration {
        self.table().since.elapsed()
    }

    /// What a heartbeat said.
    pub(crate) fn heard(
        &self,
        node: NodeId,
        boot: u128,
        map_version: MapVersion,
        stats: Vec<CoreStats>,
        dirty_groups: Vec<PgId>,
        wishes: Wishes,
    ) {
        let at = Instant::now();
        let heard = Heard { at, boot, map_version, stats, dirty_groups, wishes };
        self.table().heard.insert(node, heard);
    }

    /// What nodes asked for their groups in their last heartbeats.
    pub(crate) fn wishes(&self) -> Vec<(NodeId, Wishes)> {
        let table = self.table();
        let some = table.heard.iter().filter(|(_, h)| h.wishes != Wishes::default());
        some.map(|(node, h)| (*node, h.wishes.clone())).collect()
    }

    /// Cores of which no group has a member without a complete copy, and the map by which they said so.
    pub(crate) fn whole(&self) -> BTreeMap<ShardRef, MapVersion> {
        let mut whole = BTreeMap::new();
        for (node, h) in &self.table().heard {
            for (core, _) in h.stats.iter().enumerate().filter(|(_, s)| s.members_syncing == 0) {
                whole.insert(ShardRef { node: *node, core: CoreId(core as u16) }, h.map_version);
            }
        }
        whole
    }

    /// A process registered: what its predecessor said is of no more use, and it will ask for a lease.
    pub(crate) fn registered(&self, node: NodeId, boot: u128) {
        let mut table = self.table();
        if table.heard.get(&node).is_some_and(|h| h.boot != boot) {
            table.heard.remove(&node);
        }
        let lease = table.lease(node);
        if lease.barred == 0 {
            (lease.from, lease.over) = (Instant::now(), None);
        }
    }

    /// For how long a node is cut off, and the sequence read since; `None`: it may have a lease. `wait` is lease + drift.
    pub(crate) fn cut_off(&self, node: NodeId, wait: Duration) -> Option<(Duration, Option<u64>)> {
        let table = self.table();
        let since = table.silent(node).checked_sub(wait)?;
        Some((since, table.leases.get(&node).and_then(|l| l.over)))
    }

    /// The state machine's sequence, read after [`Liveness::cut_off`] said so; the first one stays. `None`: it is back.
    pub(crate) fn over_at(&self, node: NodeId, wait: Duration, sequence: u64) -> Option<u64> {
        let mut table = self.table();
        if table.silent(node) < wait {
            return None;
        }
        Some(*table.lease(node).over.get_or_insert(sequence))
    }

    /// Bars a node that is cut off.
    pub(crate) fn bar(&self, node: NodeId, wait: Duration) -> Option<Bar<'_>> {
        let mut table = self.table();
        if table.silent(node) < wait {
            return None;
        }
        table.lease(node).barred += 1;
        Some(Bar { liveness: self, node, term: table.term })
    }

    /// Whether a node was heard of within `limit`.
    pub(crate) fn is_alive(&self, node: NodeId, limit: Duration) -> bool {
        self.table().heard.get(&node).is_some_and(|h| h.at.elapsed() <= limit)
    }

    /// Whether a node reported no dirt and no pins, under this map or a newer one.
    pub(crate) fn is_clean(&self, node: NodeId, map: MapVersion) -> bool {
        self.table().heard.get(&node).is_some_and(|h| {
            h.map_version >= map
                && h.dirty_groups.is_empty()
                && h.stats.iter().all(|c| c.dirty_bytes == 0 && c.pins == 0)
        })
    }

    /// Groups in which a node reported dirt under this map, and which others hold by it: what was there when they got a stand-in.
    pub(crate) fn left_over(&self, map: &ClusterMap) -> Vec<(NodeId, PgId)> {
        let table = self.table();
        let current = table.heard.iter().filter(|(_, h)| h.map_version >= map.version);
        let dirty = current.flat_map(|(node, h)| h.dirty_groups.iter().map(|pg| (*node, *pg)));
        dirty
            .filter(|(node, pg)| {
                let entry = map.pgs.get(usize::from(pg.0));
                entry.is_some_and(|e| e.holders().all(|m| m.node != *node))
            })
            .collect()
    }

    /// Whether dirty data is about to fill a node: it should go to S3 before it is due.
    pub(crate) fn pressed(&self) -> bool {
        let table = self.table();
        let lately = table.heard.values().filter(|h| h.at.elapsed() <= PRESSURE_AGE_MAX);
        let mut stats = lately.flat_map(|h| &h.stats);
        stats.any(|c| c.pressure_permille >= PRESSURE_PERMILLE)
    }

    /// Dirty bytes of all nodes.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.table().heard.values().flat_map(|h| &h.stats).map(|c| c.dirty_bytes).sum()
    }

    /// A node, for the status.
    pub(crate) fn status(&self, node: NodeId) -> NodeStatus {
        match self.table().heard.get(&node) {
            Some(h) => NodeStatus {
                node,
                heartbeat_age_ms: Some(h.at.elapsed().as_millis() as u64),
                acked_map: h.map_version.0,
                cores: h.stats.clone(),
            },
            None => NodeStatus { node, heartbeat_age_ms: None, acked_map: 0, cores: Vec::new() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: NodeId = NodeId(3);

    #[test]
    fn a_node_is_cut_off_only_after_lease_and_drift_since_the_last_lease_or_the_leaders_start() {
        let wait = Duration::from_millis(60);
        let l = Liveness::default();
        l.clear();
        assert!(l.cut_off(NODE, wait).is_none() && l.bar(NODE, wait).is_none(), "a new leader");
        std::thread::sleep(wait);
        assert!(l.cut_off(NODE, wait).is_some());
        assert!(l.begin_lease(NODE));
        assert!(l.cut_off(NODE, wait).is_none() && l.bar(NODE, wait).is_none(), "a lease");
        std::thread::sleep(wait);
        assert!(l.cut_off(NODE, wait).is_some());
        l.clear();
        assert!(l.cut_off(NODE, wait).is_none(), "the next leader knows nothing");
    }

    #[test]
    fn no_lease_is_given_while_a_stand_in_is_under_way() {
        let l = Liveness::default();
        let wait = Duration::ZERO;
        assert_eq!(l.over_at(NODE, wait, 7), Some(7));
        assert_eq!(l.over_at(NODE, wait, 9), Some(7), "the first one stays");
        let (a, b) = (l.bar(NODE, wait).expect("cut off"), l.bar(NODE, wait).expect("twice"));
        drop(a);
        l.registered(NODE, 1);
        assert!(!l.begin_lease(NODE) && b.holds());
        drop(b);
        assert!(l.begin_lease(NODE));
        assert_eq!(l.cut_off(NODE, wait).and_then(|c| c.1), None, "what was read then is old");
        l.bar(NODE, wait).expect("cut off").keep();
        assert!(!l.begin_lease(NODE), "its outcome is not known");
        let late = l.bar(NODE, wait).expect("cut off");
        l.clear();
        assert!(l.begin_lease(NODE) && !late.holds(), "the next leader's map says");
        drop(late);
        assert!(l.begin_lease(NODE));
    }
}
