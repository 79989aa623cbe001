//! Which groups this core may serve, and until when (PROTOCOL §6, I5).
//!
//! A request passes only under equal maps' epochs, at the primary, inside a live lease, and only if
//! its grant is not older than the group's last change of hands. Released groups are remembered, so
//! that a core whose map is late serves nothing of a group it gave away.

use ebb_dataplane_protocol::{
    ChunkIndex, ClusterMap, InodeId, MapVersion, PgEntry, PgEpoch, PgId, RunIndex, ShardRef, Status,
};
use std::collections::HashMap;
use std::sync::Arc;

/// How long a caller waits before it asks again, by reason, in ms.
pub(crate) const RETRY_MAP_MS: u32 = 20;
const RETRY_LEASE_MS: u32 = 100;
const RETRY_FROZEN_MS: u32 = 50;
const RETRY_DEGRADED_MS: u32 = 200;

/// A request that may not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: Status,
    pub(crate) retry_after_ms: u32,
    /// Somebody knows a newer map.
    pub(crate) refresh: bool,
}

impl Refusal {
    pub(crate) const fn of(status: Status) -> Self {
        Self { status, retry_after_ms: 0, refresh: false }
    }
    pub(crate) const fn after(status: Status, retry_after_ms: u32) -> Self {
        Self { status, retry_after_ms, refresh: false }
    }
}

/// What a data request says about placement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Claim {
    pub(crate) inode: InodeId,
    pub(crate) chunk: ChunkIndex,
    pub(crate) pg: PgId,
    pub(crate) epoch: PgEpoch,
    pub(crate) map_version: MapVersion,
}

#[derive(Default)]
pub(crate) struct Placement {
    me: ShardRefOrNone,
    map: Option<Arc<ClusterMap>>,
    lease_until_ms: u64,
    released: HashMap<PgId, PgEpoch>,
}

type ShardRefOrNone = Option<ShardRef>;

impl Placement {
    /// Takes a newer map and a later lease; older ones change nothing.
    pub(crate) fn update(&mut self, me: ShardRef, map: Arc<ClusterMap>, lease_until_ms: u64) {
        self.me = Some(me);
        self.lease_until_ms = self.lease_until_ms.max(lease_until_ms);
        if self.map.as_ref().is_none_or(|known| known.version < map.version) {
            // What was released before this map's epoch is no longer in doubt.
            self.released.retain(|pg, epoch| {
                map.pgs.get(usize::from(pg.0)).is_none_or(|entry| entry.epoch <= *epoch)
            });
            self.map = Some(map);
        }
    }

    /// The map it goes by.
    pub(crate) fn map(&self) -> Option<Arc<ClusterMap>> {
        self.map.clone()
    }

    pub(crate) fn is_me(&self, shard: ShardRef) -> bool {
        self.me == Some(shard)
    }

    pub(crate) fn version(&self) -> MapVersion {
        self.map.as_ref().map_or(MapVersion(0), |m| m.version)
    }

    pub(crate) fn pg_count(&self) -> u16 {
        self.map.as_ref().map_or(0, |m| m.pg_count())
    }

    /// The group's entry, if this core is its primary.
    pub(crate) fn led(&self, pg: PgId) -> Option<&PgEntry> {
        self.own_epoch(pg)?;
        self.map.as_ref()?.pgs.get(usize::from(pg.0))
    }

    /// Whether a group of which this core is primary has in-sync members enough without one that is, or isn't, in-sync
    /// (R56, R48).
    pub(crate) fn spares(&self, pg: PgId, in_sync: bool) -> bool {
        let enough = |e: &PgEntry| {
            let left = e.members.len() - usize::from(in_sync);
            left >= usize::from(e.min_in_sync.max(1))
        };
        self.led(pg).is_some_and(enough)
    }

    /// Whether this core leads a group anew, which it did not by the map `before`.
    pub(crate) fn leads_anew(&self, before: Option<&ClusterMap>) -> bool {
        let Some(map) = &self.map else { return false };
        map.pgs.iter().enumerate().any(|(n, entry)| {
            let known = before.and_then(|b| b.pgs.get(n));
            let same = known.is_some_and(|k| {
                k.primary() == entry.primary() && k.since_map_version == entry.since_map_version
            });
            entry.primary().is_some_and(|p| self.is_me(p)) && !same
        })
    }

    /// Whether a group got a primary, by takeover or restart, after this map.
    pub(crate) fn led_anew_since(&self, version: MapVersion) -> bool {
        let groups = self.map.iter().flat_map(|m| &m.pgs);
        groups.into_iter().any(|pg| pg.since_map_version > version)
    }

    /// The epoch and the primary of a group of which this core is another member, and the map in which
    /// that primary took over.
    pub(crate) fn followed(&self, pg: PgId) -> Option<(PgEpoch, ShardRef, MapVersion)> {
        let entry = self.map.as_ref()?.pgs.get(usize::from(pg.0))?;
        let (me, leader) = (self.me?, entry.primary()?);
        let member = entry.members[1..].contains(&me) || entry.syncing.contains(&me);
        member.then_some((entry.epoch, leader, entry.since_map_version))
    }

    /// The groups held here, by the map, in which bytes of an inode below `limit` are placed.
    pub(crate) fn groups_below(&self, inode: InodeId, limit: u64) -> Vec<PgId> {
        let Some(map) = &self.map else { return Vec::new() };
        let own = |pg: &PgId| self.own_epoch(*pg).is_some();
        let runs = RunIndex::count_for(limit);
        let many = map.pgs.len() * 4;
        // Past so many runs nearly every group was met: all of them, which is correct too.
        if runs as usize > many {
            return (0..map.pg_count()).map(PgId).filter(own).collect();
        }
        let groups = (0..runs).map(|run| PgId::of(inode, RunIndex(run), map.pg_count()));
        let mut held: Vec<PgId> = groups.filter(own).collect();
        held.sort_unstable();
        held.dedup();
        held
    }

    pub(crate) fn lease_lives(&self, now_ms: u64) -> bool {
        now_ms < self.lease_until_ms
    }

    /// The group is held by others as of `epoch`.
    pub(crate) fn release(&mut self, pg: PgId, epoch: PgEpoch) {
        let e = self.released.entry(pg).or_insert(epoch);
        *e = (*e).max(epoch);
    }

    /// The epoch that it was given up for did not come.
    pub(crate) fn take_back(&mut self, pg: PgId, epoch: PgEpoch) {
        if self.released.get(&pg) == Some(&epoch) {
            self.released.remove(&pg);
        }
    }

    /// Whether this core is the group's primary in its map, and in which epoch.
    pub(crate) fn own_epoch(&self, pg: PgId) -> Option<PgEpoch> {
        let entry = self.map.as_ref()?.pgs.get(usize::from(pg.0))?;
        (entry.primary().is_some() && entry.primary() == self.me).then_some(entry.epoch)
    }

    /// Whether this core is among the group's members, in whatever role, in this epoch or a later one.
    pub(crate) fn holds_since(&self, pg: PgId, epoch: PgEpoch) -> bool {
        let entry = self.map.as_ref().and_then(|map| map.pgs.get(usize::from(pg.0)));
        let mut members = entry.into_iter().flat_map(|e| e.members.iter().chain(&e.syncing));
        entry.is_some_and(|e| e.epoch >= epoch) && members.any(|m| Some(*m) == self.me)
    }

    /// Checks a claim; on success the map version since which this core is the primary.
    pub(crate) fn admit(
        &self,
        claim: &Claim,
        write: bool,
        now_ms: u64,
    ) -> Result<MapVersion, Refusal> {
        let Some(map) = self.map.as_ref().filter(|m| m.version >= claim.map_version) else {
            let busy = Refusal::after(Status::Busy, RETRY_MAP_MS);
            return Err(Refusal { refresh: true, ..busy });
        };
        let Some((pg, entry)) = map.pg_of(claim.inode, claim.chunk) else {
            return Err(Refusal::of(Status::StaleEpoch));
        };
        let released = self.released.get(&pg).is_some_and(|epoch| entry.epoch < *epoch);
        let own = entry.primary().is_some() && entry.primary() == self.me;
        if pg != claim.pg || entry.epoch != claim.epoch || !own || released {
            return Err(Refusal { refresh: released, ..Refusal::of(Status::StaleEpoch) });
        }
        if !self.lease_lives(now_ms) {
            return Err(Refusal::after(Status::NoLease, RETRY_LEASE_MS));
        }
        if write && entry.members.len() < usize::from(entry.min_in_sync) {
            return Err(Refusal::after(Status::Busy, RETRY_DEGRADED_MS));
        }
        if write && entry.moving {
            return Err(Refusal::after(Status::Frozen, RETRY_FROZEN_MS));
        }
        Ok(entry.since_map_version)
    }

    /// Whether an answer may still leave: the same claim, checked again (I5).
    pub(crate) fn still_holds(&self, claim: &Claim, now_ms: u64) -> Result<(), Refusal> {
        self.admit(claim, false, now_ms).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_dataplane_protocol::{CoreId, NodeId};

    const ME: ShardRef = ShardRef { node: NodeId(1), core: CoreId(0) };
    const OTHER: ShardRef = ShardRef { node: NodeId(2), core: CoreId(0) };

    fn map(version: u64, epoch: u64, primary: ShardRef, moving: bool) -> Arc<ClusterMap> {
        let entry = PgEntry {
            epoch: PgEpoch(epoch),
            members: vec![primary],
            syncing: Vec::new(),
            since_map_version: MapVersion(version),
            moving,
            ..PgEntry::default()
        };
        Arc::new(ClusterMap {
            version: MapVersion(version),
            pgs: vec![entry],
            ..ClusterMap::default()
        })
    }
    fn claim(epoch: u64, version: u64) -> Claim {
        Claim {
            inode: InodeId(5),
            chunk: ChunkIndex(0),
            pg: PgId(0),
            epoch: PgEpoch(epoch),
            map_version: MapVersion(version),
        }
    }
    fn status(p: &Placement, c: Claim, write: bool, now: u64) -> Status {
        p.admit(&c, write, now).map_or_else(|r| r.status, |_| Status::Ok)
    }

    #[test]
    fn only_the_primary_of_the_same_epoch_inside_its_lease_serves() {
        let mut p = Placement::default();
        assert_eq!(status(&p, claim(1, 1), false, 0), Status::Busy, "no map yet");
        p.update(ME, map(3, 1, ME, false), 1000);
        assert_eq!(status(&p, claim(1, 3), true, 999), Status::Ok);
        assert_eq!(status(&p, claim(1, 3), true, 1000), Status::NoLease);
        assert_eq!(status(&p, claim(1, 4), true, 0), Status::Busy, "a newer map is about");
        assert_eq!(status(&p, claim(2, 3), true, 0), Status::StaleEpoch);
        assert_eq!(status(&p, Claim { pg: PgId(1), ..claim(1, 3) }, true, 0), Status::StaleEpoch);
        p.update(ME, map(4, 1, ME, true), 1000);
        assert_eq!(status(&p, claim(1, 3), true, 0), Status::Frozen);
        assert_eq!(status(&p, claim(1, 3), false, 0), Status::Ok, "reads go on while moving");
        p.update(ME, map(5, 2, OTHER, false), 5000);
        assert_eq!(status(&p, claim(2, 5), false, 0), Status::StaleEpoch);
    }

    #[test]
    fn maps_and_leases_never_go_back() {
        let mut p = Placement::default();
        p.update(ME, map(5, 2, OTHER, false), 5000);
        p.update(ME, map(4, 1, ME, false), 100);
        assert_eq!(p.version(), MapVersion(5));
        assert!(p.lease_lives(4999));
        assert_eq!(status(&p, claim(1, 4), false, 0), Status::StaleEpoch);
    }

    #[test]
    fn a_released_group_is_not_served_under_a_late_map() {
        let mut p = Placement::default();
        p.update(ME, map(3, 1, ME, false), 1000);
        p.release(PgId(0), PgEpoch(2));
        assert_eq!(status(&p, claim(1, 3), false, 0), Status::StaleEpoch);
        p.update(ME, map(4, 2, ME, false), 1000);
        assert_eq!(status(&p, claim(2, 4), false, 0), Status::Ok, "it came back in that epoch");
    }

    #[test]
    fn what_was_given_up_for_an_epoch_that_did_not_come_is_served_again() {
        let mut p = Placement::default();
        p.update(ME, map(3, 1, ME, false), 1000);
        p.release(PgId(0), PgEpoch(2));
        p.take_back(PgId(0), PgEpoch(1));
        assert_eq!(status(&p, claim(1, 3), false, 0), Status::StaleEpoch, "another epoch's");
        p.take_back(PgId(0), PgEpoch(2));
        assert_eq!(status(&p, claim(1, 3), false, 0), Status::Ok);
    }

    #[test]
    fn a_group_with_fewer_in_sync_members_than_it_promises_takes_no_writes() {
        let mut p = Placement::default();
        let degraded = |version, others: &[ShardRef]| {
            let mut map = (*map(version, version, ME, false)).clone();
            map.pgs[0].min_in_sync = 2;
            map.pgs[0].members.extend(others);
            // On the way is not there.
            map.pgs[0].syncing.push(ShardRef { node: NodeId(3), core: CoreId(0) });
            Arc::new(map)
        };
        p.update(ME, degraded(1, &[]), 100);
        assert_eq!(p.admit(&claim(1, 1), true, 50).expect_err("refused").status, Status::Busy);
        assert!(p.admit(&claim(1, 1), false, 50).is_ok(), "reads go on");
        p.update(ME, degraded(2, &[OTHER]), 100);
        assert!(p.admit(&claim(2, 2), true, 50).is_ok());
    }
}
