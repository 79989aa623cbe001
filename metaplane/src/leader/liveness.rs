//! Heartbeats of data nodes, in memory: what the leader heard, and when (PROTOCOL §6).
//!
//! A new leader knows nothing until the nodes report again, so nothing is concluded from silence:
//! a group changes hands only with its old primary's journaled Freeze (`mover`), a node is gone only
//! by its own word under the current map.

use ebb_dataplane_protocol::control::CoreStats;
use ebb_dataplane_protocol::{MapVersion, NodeId, PgId};
use ebb_metaplane_protocol::admin::NodeStatus;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a node said last.
#[derive(Clone, Debug)]
struct Heard {
    at: Instant,
    boot: u128,
    map_version: MapVersion,
    stats: Vec<CoreStats>,
    dirty_groups: Vec<PgId>,
}

/// The table.
#[derive(Debug, Default)]
pub(crate) struct Liveness(Mutex<HashMap<NodeId, Heard>>);

impl Liveness {
    fn nodes(&self) -> MutexGuard<'_, HashMap<NodeId, Heard>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another leadership begins: what was heard before it counts no more.
    pub(crate) fn clear(&self) {
        self.nodes().clear();
    }

    /// A heartbeat.
    pub(crate) fn heard(
        &self,
        node: NodeId,
        boot: u128,
        map_version: MapVersion,
        stats: Vec<CoreStats>,
        dirty_groups: Vec<PgId>,
    ) {
        let at = Instant::now();
        self.nodes().insert(node, Heard { at, boot, map_version, stats, dirty_groups });
    }

    /// A process registered: what its predecessor said is of no more use.
    pub(crate) fn registered(&self, node: NodeId, boot: u128) {
        let mut nodes = self.nodes();
        if nodes.get(&node).is_some_and(|h| h.boot != boot) {
            nodes.remove(&node);
        }
    }

    /// Whether a node was heard of within `limit`.
    pub(crate) fn is_alive(&self, node: NodeId, limit: Duration) -> bool {
        self.nodes().get(&node).is_some_and(|h| h.at.elapsed() <= limit)
    }

    /// Whether a node reported no dirt and no pins, under this map or a newer one.
    pub(crate) fn is_clean(&self, node: NodeId, map: MapVersion) -> bool {
        self.nodes().get(&node).is_some_and(|h| {
            h.map_version >= map
                && h.dirty_groups.is_empty()
                && h.stats.iter().all(|c| c.dirty_bytes == 0 && c.pins == 0)
        })
    }

    /// Dirty bytes of all nodes.
    pub(crate) fn dirty_bytes(&self) -> u64 {
        self.nodes().values().flat_map(|h| &h.stats).map(|c| c.dirty_bytes).sum()
    }

    /// A node, for the status.
    pub(crate) fn status(&self, node: NodeId) -> NodeStatus {
        match self.nodes().get(&node) {
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
