//! The cluster map: nodes and placement groups. Every change is guarded against a stale decision
//! (I5), and a node goes only when it holds no group (I8).

use crate::Reader;
use crate::counters::Counter;
use crate::kv::{Kv, KvRead};
use crate::tables::*;
use ebb_dataplane_protocol::{
    ClusterMap, MapVersion, NodeId, NodeInfo, NodeState, PgEpoch, PgId, ShardRef, codec,
};
use ebb_metaplane_protocol::{FsError, FsResult, NodeCall};

impl<K: KvRead> Reader<'_, K> {
    /// The cluster map.
    pub fn map(&self) -> FsResult<ClusterMap> {
        match self.0.get(&[MAP]) {
            None => Ok(ClusterMap::default()),
            Some(b) => codec::decode(&b).map_err(|_| corrupt("cluster map")),
        }
    }

    /// The process of a node that registered last: an older one is superseded.
    pub fn node_boot(&self, node: NodeId) -> FsResult<Option<u128>> {
        let Some(v) = self.0.get(&key(NODE_BOOT, &[&be(u64::from(node.0))])) else {
            return Ok(None);
        };
        let bytes = v.as_slice().try_into().map_err(|_| corrupt("boot id"))?;
        Ok(Some(u128::from_be_bytes(bytes)))
    }
}

pub(crate) fn refused<T>(why: impl Into<String>) -> FsResult<T> {
    Err(FsError::Invalid(why.into()))
}

/// Whether the map has a core.
pub(crate) fn known_core(map: &ClusterMap, core: ShardRef) -> FsResult<()> {
    match map.address(core) {
        Some(_) => Ok(()),
        None => refused(format!("no core {} on node {}", core.core, core.node)),
    }
}

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn put_map(&mut self, map: &ClusterMap) {
        self.kv.put(&[MAP], &codec::encode(map));
    }

    pub(crate) fn register_node(&mut self, call: &NodeCall) -> FsResult<NodeId> {
        let NodeCall::Register { store, host, ports, capacity_bytes, boot } = call else {
            return refused("not a registration");
        };
        if self.read().is_abandoned(*store) {
            return Err(FsError::NotPermitted(
                "this node was abandoned (`ebb node abandon`) and what it held was given up: wipe its \
                 directory, then it joins as a new one"
                    .into(),
            ));
        }
        let mut map = self.read().map()?;
        let id = match map.nodes.iter().find(|n| n.store == *store) {
            Some(n) => n.id,
            None => {
                if self.read().counter(Counter::ShuttingDown)? != 0 {
                    return Err(FsError::ShuttingDown);
                }
                let id = NodeId(self.next(Counter::NextNode)? as u32);
                map.nodes.push(NodeInfo {
                    id,
                    store: *store,
                    state: NodeState::Joining,
                    host: String::new(),
                    ports: Vec::new(),
                    capacity_bytes: 0,
                });
                id
            }
        };
        if let Some(n) = map.nodes.iter_mut().find(|n| n.id == id)
            && (n.host != *host || n.ports != *ports || n.capacity_bytes != *capacity_bytes)
        {
            n.host.clone_from(host);
            n.ports.clone_from(ports);
            n.capacity_bytes = *capacity_bytes;
            map.version = MapVersion(map.version.0 + 1);
            self.put_map(&map);
        }
        if self.read().node_boot(id)?.is_some_and(|known| known != *boot) {
            self.restarted(id)?;
        }
        self.kv.put(&key(NODE_BOOT, &[&be(u64::from(id.0))]), &boot.to_be_bytes());
        Ok(id)
    }

    pub(crate) fn set_node_state(&mut self, node: NodeId, state: NodeState) -> FsResult<()> {
        let mut map = self.read().map()?;
        if state == NodeState::Gone && map.groups_of(node).next().is_some() {
            return refused(format!("node {node} still holds placement groups"));
        }
        let Some(at) = map.nodes.iter().position(|n| n.id == node) else {
            // Gone nodes leave the map: a repeated command finds nothing to do.
            return if state == NodeState::Gone { Ok(()) } else { refused("no such node") };
        };
        if state == NodeState::Gone {
            map.nodes.remove(at);
            self.kv.delete(&key(NODE_BOOT, &[&be(u64::from(node.0))]));
        } else if map.nodes[at].state == state {
            return Ok(());
        } else {
            map.nodes[at].state = state;
        }
        map.version = MapVersion(map.version.0 + 1);
        self.put_map(&map);
        Ok(())
    }

    pub(crate) fn set_desired(&mut self, nodes: u32) {
        self.set_counter(Counter::DesiredNodes, u64::from(nodes));
        if nodes > 0 {
            self.set_counter(Counter::WakeNodes, u64::from(nodes));
        }
    }

    pub(crate) fn pg_moving(&mut self, pg: PgId, moving: bool) -> FsResult<()> {
        let mut map = self.read().map()?;
        let Some(entry) = map.pgs.get_mut(usize::from(pg.0)) else {
            return refused("no such group");
        };
        // That it moves is told with the next map. That it doesn't any more has to be: a map in between may have
        // said otherwise, and its primary takes no writes until it hears of it.
        let over = entry.moving && !moving;
        entry.moving = moving;
        if over {
            map.version = MapVersion(map.version.0 + 1);
        }
        self.put_map(&map);
        Ok(())
    }

    pub(crate) fn set_pg(&mut self, pg: PgId, from: PgEpoch, members: &[ShardRef]) -> FsResult<()> {
        self.change_members(pg, from, members, false)
    }

    /// New members of a group, in a new epoch. `unknown_windows`: nobody told them what was applied (R27).
    pub(crate) fn change_members(
        &mut self,
        pg: PgId,
        from: PgEpoch,
        members: &[ShardRef],
        unknown_windows: bool,
    ) -> FsResult<()> {
        let mut map = self.read().map()?;
        for m in members {
            known_core(&map, *m)?;
        }
        let version = MapVersion(map.version.0 + 1);
        let Some(entry) = map.pgs.get_mut(usize::from(pg.0)) else {
            return refused("no such group");
        };
        if entry.epoch != from {
            return refused(format!("group {pg} is at epoch {}, not {from}", entry.epoch));
        }
        entry.epoch = PgEpoch(entry.epoch.0 + 1);
        entry.members = members.to_vec();
        entry.syncing.clear();
        entry.since_map_version = version;
        entry.moving = false;
        if unknown_windows {
            entry.windows_since = entry.epoch;
        }
        map.version = version;
        self.put_map(&map);
        if !members.is_empty() {
            self.forget_windows(pg);
        }
        Ok(())
    }
}
