//! Placement groups change hands (PROTOCOL §6): flush its dirt, freeze, flush the rest, hand its
//! windows over, new epoch, release at the donor.
//!
//! The map says that a group moves; where to is asked for by the controller again if the leader
//! dies. A donor that does not answer keeps its group while what it holds may be the only copy; else the
//! group gets a stand-in (`stand_in`).

use super::flusher::Flushed;
use super::{Stop, cores};
use crate::service::{Service, count};
use ebb_dataplane_protocol::control::{Control, ControlReply, PgHolding};
use ebb_dataplane_protocol::{ClusterMap, InodeId, PgEntry, PgId, ShardRef};
use ebb_metaplane_protocol::{Command, FsError, FsResult};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Groups moving at once.
const MOVES_MAX: usize = 16;
/// Rounds of flushing before the freeze: what is dirtied faster than that is flushed frozen.
const ROUNDS_BEFORE_FREEZE: usize = 3;
/// Limit of a call.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two looks at a group.
const PAUSE: Duration = Duration::from_millis(50);
/// Pause after a failure.
const PAUSE_FAILED: Duration = Duration::from_millis(500);

#[derive(Debug, Default)]
struct Desk {
    wanted: BTreeMap<PgId, Vec<ShardRef>>,
    moving: BTreeSet<PgId>,
    /// Old holders that still have to release a group, with what they are told.
    releases: Vec<(PgId, ShardRef, Leave)>,
}

/// How an old holder leaves a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leave {
    /// It has nothing but clean data.
    Release,
    /// It was being copied to: half a copy is nothing.
    Discard,
}

/// Where groups are wanted.
#[derive(Debug, Default)]
pub(crate) struct MoveDesk(Mutex<Desk>);

impl MoveDesk {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// A group is wanted elsewhere; a newer wish replaces an older one.
    pub(crate) fn want(&self, pg: PgId, to: Vec<ShardRef>) {
        self.desk().wanted.insert(pg, to);
    }
    fn wish(&self, pg: PgId) -> Option<Vec<ShardRef>> {
        self.desk().wanted.get(&pg).cloned()
    }
    fn fulfilled(&self, pg: PgId, to: &[ShardRef]) {
        let mut desk = self.desk();
        if desk.wanted.get(&pg).is_some_and(|w| w == to) {
            desk.wanted.remove(&pg);
        }
    }
    fn begin(&self) -> Option<PgId> {
        let mut desk = self.desk();
        if desk.moving.len() >= MOVES_MAX {
            return None;
        }
        let next = desk.wanted.keys().find(|pg| !desk.moving.contains(pg)).copied()?;
        desk.moving.insert(next);
        Some(next)
    }
    fn end(&self, pg: PgId) {
        self.desk().moving.remove(&pg);
    }
    fn clear(&self) {
        *self.desk() = Desk::default();
    }
    /// Groups on their way.
    pub(crate) fn wanted(&self) -> Vec<PgId> {
        self.desk().wanted.keys().copied().collect()
    }
    fn owe_release(&self, pg: PgId, donor: ShardRef, how: Leave) {
        self.desk().releases.push((pg, donor, how));
    }
    fn take_releases(&self) -> Vec<(PgId, ShardRef, Leave)> {
        std::mem::take(&mut self.desk().releases)
    }
}

fn entry(map: &ClusterMap, pg: PgId) -> FsResult<&PgEntry> {
    map.pgs
        .get(usize::from(pg.0))
        .ok_or_else(|| FsError::Invalid(format!("there is no placement group {pg}")))
}

impl Service {
    /// The loop of a leader.
    pub(crate) async fn run_groups(self: &Arc<Self>, stop: Stop) {
        self.movers.clear();
        if let Err(e) = self.forget_old_moves().await {
            tracing::debug!(error = %e, "forgetting moves of another leader");
        }
        let tick = self.config.timings.tick();
        while !stop.wait(&self.wakes.groups, tick).await {
            while let Some(pg) = self.movers.begin() {
                let (service, stop) = (Arc::clone(self), stop.clone());
                tokio::spawn(async move {
                    service.move_group(pg, &stop).await;
                    service.movers.end(pg);
                    service.wakes.groups.notify_one();
                });
            }
            self.release_groups().await;
        }
    }

    /// Moves whose target only the last leader knew: thawed, and asked for again by the controller.
    async fn forget_old_moves(&self) -> FsResult<()> {
        let map = self.map()?;
        for (i, group) in map.pgs.iter().enumerate().filter(|(_, g)| g.moving) {
            let pg = PgId(i as u16);
            self.submit(Command::PgMoving(pg, false)).await?;
            if let Some(primary) = group.primary() {
                let thaw = Control::Thaw(pg, group.epoch);
                if let Err(e) = self.cores.order(&map, primary, &thaw, TIMEOUT).await {
                    tracing::debug!(%pg, error = %e, "thawing");
                }
            }
        }
        Ok(())
    }

    async fn move_group(&self, pg: PgId, stop: &Stop) {
        while let Some(to) = self.movers.wish(pg) {
            if stop.is_set() {
                return;
            }
            match self.move_once(pg, &to, stop).await {
                Ok(()) => {
                    count(&self.counts.pg_moves);
                    self.movers.fulfilled(pg, &to);
                }
                Err(FsError::Invalid(why)) => {
                    tracing::warn!(%pg, why, "the group can't move there");
                    self.movers.fulfilled(pg, &to);
                }
                Err(e) => {
                    tracing::debug!(%pg, error = %e, "moving a group");
                    if stop.sleep(PAUSE_FAILED).await {
                        return;
                    }
                }
            }
        }
    }

    async fn move_once(&self, pg: PgId, to: &[ShardRef], stop: &Stop) -> FsResult<()> {
        let map = self.map()?;
        let group = entry(&map, pg)?.clone();
        if group.members == to {
            if group.moving {
                self.submit_internal(Command::PgMoving(pg, false)).await?;
                if let Some(primary) = group.primary() {
                    let thaw = Control::Thaw(pg, group.epoch);
                    self.order(&map, primary, &thaw).await?;
                }
            }
            return Ok(());
        }
        let Some(donor) = group.primary() else {
            self.clear_for(&map, pg, &group, to).await?;
            self.hand_windows_over(&map, pg, &group, to).await?;
            return self.set_group(pg, &group, to).await;
        };
        if self.is_cut_off(donor.node) {
            return self.stand_in(&map, pg, &group, to).await;
        }
        if !to.is_empty() && (self.config.replicas > 1 || group.has_others()) {
            return Err(FsError::Invalid(
                "groups with members go where these are (`replicas`)".into(),
            ));
        }
        self.clear_for(&map, pg, &group, to).await?;
        if !group.moving {
            self.submit_internal(Command::PgMoving(pg, true)).await?;
        }
        for _ in 0..ROUNDS_BEFORE_FREEZE {
            let holding = self.holding(&map, donor, pg).await?;
            if holding.dirty_bytes == 0 || stop.is_set() {
                break;
            }
            self.flush_holding(&holding).await;
        }
        // From here on the donor takes no write: its journaled Freeze is its ack of the new epoch.
        self.order(&map, donor, &Control::Freeze(pg, group.epoch)).await?;
        loop {
            if stop.is_set() {
                return Err(again("the leader changes"));
            }
            if self.movers.wish(pg).is_none_or(|now| now != to) {
                return Err(again("it is wanted elsewhere by now"));
            }
            let holding = self.holding(&map, donor, pg).await?;
            if holding.dirty_bytes == 0 && holding.pins == 0 {
                break;
            }
            self.flush_holding(&holding).await;
            // Pins go with the notices of the flushes.
            self.wakes.notices.notify_one();
            tokio::time::sleep(PAUSE).await;
        }
        self.hand_windows_over(&map, pg, &group, to).await?;
        self.set_group(pg, &group, to).await?;
        // Members have applied what their primary has: the same blocks are clean there by now.
        group.members.iter().for_each(|m| self.movers.owe_release(pg, *m, Leave::Release));
        group.syncing.iter().for_each(|m| self.movers.owe_release(pg, *m, Leave::Discard));
        Ok(())
    }

    async fn set_group(&self, pg: PgId, was: &PgEntry, to: &[ShardRef]) -> FsResult<()> {
        let members = to.to_vec();
        self.submit_internal(Command::SetPg { pg, from: was.epoch, members }).await?;
        tracing::info!(%pg, holder = ?to.first(), "the group has a new holder");
        Ok(())
    }

    async fn order(&self, map: &ClusterMap, core: ShardRef, request: &Control) -> FsResult<()> {
        self.cores.order(map, core, request, TIMEOUT).await.map_err(|e| again(&e.to_string()))
    }

    async fn holding(&self, map: &ClusterMap, core: ShardRef, pg: PgId) -> FsResult<PgHolding> {
        let reply = self.cores.call(map, core, &Control::PgStatus(pg), TIMEOUT).await;
        match reply.map_err(|e| again(&e.to_string()))? {
            ControlReply::Pg(holding) => Ok(holding),
            other => Err(again(&cores::unexpected(core, &other).to_string())),
        }
    }

    /// Flushes what a core said it holds.
    async fn flush_holding(&self, holding: &PgHolding) {
        let inodes: Vec<InodeId> = holding.dirty_inodes.clone();
        let results = self.flush_with_blockers(inodes).await;
        let failed = results.iter().filter(|(_, r)| matches!(r, Flushed::Failed(_))).count();
        if failed > 0 {
            tokio::time::sleep(PAUSE_FAILED).await;
        }
    }

    /// Donors drop what they hold of groups that they lost. One that went away drops it when it
    /// reads the map at its return.
    async fn release_groups(&self) {
        let Ok(map) = self.map() else { return };
        self.discard_left_overs(&map).await;
        for (pg, donor, how) in self.movers.take_releases() {
            let Ok(group) = entry(&map, pg) else { continue };
            if map.node(donor.node).is_none() || group.holders().any(|m| m == donor) {
                continue;
            }
            let release = match how {
                Leave::Release => Control::ReleasePg(pg, group.epoch),
                Leave::Discard => Control::DiscardPg(pg, group.epoch),
            };
            if let Err(e) = self.cores.order(&map, donor, &release, TIMEOUT).await {
                tracing::debug!(%pg, error = %e, "releasing a group");
                let lease = Duration::from_millis(self.config.timings.lease_ms);
                if self.liveness.is_alive(donor.node, lease * 10) {
                    self.movers.owe_release(pg, donor, how);
                }
            }
        }
    }
}

pub(crate) fn again(why: &str) -> FsError {
    FsError::Again { retry_after_ms: 500, why: why.to_owned() }
}
