//! Members of placement groups (PROTOCOL R43–R45, R47, R48): who has a copy, who of them counts, who is first.
//!
//! Each change is a new epoch and names the one that it was decided in: what was decided about other members is refused (I5).
//! A new *lead* (`since_map_version`) begins only with another primary, or with the restarted process of the same one. The primary
//! leaves only by a take-over, so that the last in-sync member is never dropped (I8). Does not know who is alive and whose lease is
//! over: the leader says.

use crate::Reader;
use crate::counters::Counter;
use crate::kv::{Kv, KvRead};
use crate::map::{known_core, refused};
use crate::tables::Ctx;
use ebb_dataplane_protocol::{MapVersion, NodeId, PgEntry, PgEpoch, PgId, ShardRef};
use ebb_metaplane_protocol::FsResult;

/// Changes of a group's entry.
pub(crate) trait Members {
    /// A node that holds something of a group with other in-sync members leaves it.
    fn leave(&mut self, node: NodeId, version: MapVersion);
}

/// Another epoch: whatever move was under way was begun in the last one.
fn step(entry: &mut PgEntry) {
    entry.epoch = PgEpoch(entry.epoch.0 + 1);
    entry.moving = false;
}

impl Members for PgEntry {
    fn leave(&mut self, node: NodeId, version: MapVersion) {
        let stays = |m: &ShardRef| m.node != node;
        if self.holders().all(|m| stays(&m)) || !self.members.iter().any(stays) {
            return;
        }
        if self.primary().is_some_and(|p| p.node == node) {
            self.since_map_version = version;
        }
        self.members.retain(stays);
        self.syncing.retain(stays);
        step(self);
    }
}

impl<K: KvRead> Reader<'_, K> {
    /// Members that each group is to have, and in-sync ones that writes need.
    pub fn replication(&self) -> FsResult<(u8, u8)> {
        let get = |c| Ok(self.counter(c)?.clamp(1, u64::from(u8::MAX)) as u8);
        Ok((get(Counter::Replicas)?, get(Counter::MinInSync)?))
    }
}

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn set_replication(&mut self, replicas: u8, min_in_sync: u8) -> FsResult<()> {
        if replicas == 0 || min_in_sync == 0 || min_in_sync > replicas {
            return refused(format!("{min_in_sync} of {replicas} members can't be in-sync"));
        }
        self.set_counter(Counter::Replicas, u64::from(replicas));
        self.set_counter(Counter::MinInSync, u64::from(min_in_sync));
        let mut map = self.read().map()?;
        if map.pgs.iter().any(|e| e.min_in_sync.max(1) != min_in_sync) {
            map.pgs.iter_mut().for_each(|e| e.min_in_sync = min_in_sync);
            map.version = MapVersion(map.version.0 + 1);
            self.put_map(&map);
        }
        Ok(())
    }

    /// One change of one group, decided at epoch `from`: a new epoch of it and a new map.
    fn change_group(
        &mut self,
        pg: PgId,
        from: PgEpoch,
        change: impl FnOnce(&mut PgEntry, MapVersion) -> FsResult<()>,
    ) -> FsResult<()> {
        let mut map = self.read().map()?;
        let version = MapVersion(map.version.0 + 1);
        let Some(entry) = map.pgs.get_mut(usize::from(pg.0)) else {
            return refused("no such group");
        };
        // R43: a late command is about other members.
        if entry.epoch != from {
            return refused(format!("group {pg} is at epoch {}, not {from}", entry.epoch));
        }
        change(entry, version)?;
        step(entry);
        map.version = version;
        self.put_map(&map);
        Ok(())
    }

    pub(crate) fn add_member(&mut self, pg: PgId, from: PgEpoch, member: ShardRef) -> FsResult<()> {
        known_core(&self.read().map()?, member)?;
        self.change_group(pg, from, |entry, _| {
            if entry.members.is_empty() {
                return refused(format!("nobody holds group {pg}"));
            }
            // Two copies on one node are lost together.
            if entry.holders().any(|m| m.node == member.node) {
                return refused(format!("node {} has a member of group {pg}", member.node));
            }
            entry.syncing.push(member);
            Ok(())
        })
    }

    pub(crate) fn member_in_sync(
        &mut self,
        pg: PgId,
        from: PgEpoch,
        member: ShardRef,
    ) -> FsResult<()> {
        self.change_group(pg, from, |entry, _| {
            let Some(at) = entry.syncing.iter().position(|m| *m == member) else {
                return refused(format!("{member:?} is not syncing in group {pg}"));
            };
            entry.syncing.remove(at);
            entry.members.push(member);
            Ok(())
        })
    }

    pub(crate) fn drop_member(
        &mut self,
        pg: PgId,
        from: PgEpoch,
        member: ShardRef,
        planned: bool,
    ) -> FsResult<()> {
        self.change_group(pg, from, |entry, _| {
            if entry.primary() == Some(member) {
                return refused(format!("{member:?} is the primary of group {pg}"));
            }
            if entry.holders().all(|m| m != member) {
                return refused(format!("{member:?} is no member of group {pg}"));
            }
            let left = entry.members.iter().filter(|m| **m != member).count();
            let fewer = left < entry.members.len();
            if planned && fewer && left < usize::from(entry.min_in_sync.max(1)) {
                return refused(format!("group {pg} needs its {} in-sync members", left + 1));
            }
            entry.members.retain(|m| *m != member);
            entry.syncing.retain(|m| *m != member);
            Ok(())
        })
    }

    pub(crate) fn take_over(
        &mut self,
        pg: PgId,
        from: PgEpoch,
        to: ShardRef,
        keep_old: bool,
    ) -> FsResult<()> {
        self.change_group(pg, from, |entry, version| {
            let (Some(old), Some(at)) =
                (entry.primary(), entry.members.iter().skip(1).position(|m| *m == to))
            else {
                return refused(format!("{to:?} is not an in-sync backup of group {pg}"));
            };
            entry.members.remove(at + 1);
            entry.members.remove(0);
            entry.members.insert(0, to);
            if keep_old {
                entry.members.insert(1, old);
            }
            entry.since_map_version = version;
            Ok(())
        })
    }

    /// Another process of a node's store: it knows no more for whose acks it waited, nor what it asked for (R45).
    pub(crate) fn restarted(&mut self, node: NodeId) -> FsResult<()> {
        let mut map = self.read().map()?;
        let version = MapVersion(map.version.0 + 1);
        let leads =
            |e: &&mut PgEntry| e.has_others() && e.primary().is_some_and(|p| p.node == node);
        let mut any = false;
        for entry in map.pgs.iter_mut().filter(leads) {
            entry.since_map_version = version;
            step(entry);
            any = true;
        }
        if any {
            map.version = version;
            self.put_map(&map);
        }
        Ok(())
    }
}
