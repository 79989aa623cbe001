//! Sees to the members of placement groups (PROTOCOL section 14): what `members` plans is carried out, one command per step, each made
//! for the epoch that was looked at (R43).
//!
//! A take-over waits for lease + drift of the old primary, and bars it from a lease while the command is under way (R23, R44), as a
//! stand-in does. A hand-over needs no waiting: the old primary journals its freeze, everywhere, serves nothing from then on, and
//! stays a member. Primaries hear of epochs with their next heartbeat, and members take a primary's word under
//! an older epoch of the same lead, so nobody has to be told first.
//!
//! All state is in the map, but for who is being handed over: a leader that comes after thaws those (`mover`).

use super::Stop;
use super::members::{Known, Step, plan};
use super::mover::again;
use crate::service::{Service, count, fs_error};
use ebb_dataplane_protocol::control::Control;
use ebb_dataplane_protocol::{ClusterMap, NodeId, PgEntry, PgEpoch, PgId, ShardRef};
use ebb_metaplane_protocol::{Command, CommandReply, FsError, FsResult};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Limit of a call.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks, unless a primary asks: a node that is lost is to be replaced soon.
const LOOK: Duration = Duration::from_millis(200);
/// Least pause between two looks: what primaries ask for comes in heartbeats of many.
const LOOK_MIN: Duration = Duration::from_millis(20);

/// A hand-over that failed is begun again after this: writers of a group that is frozen wait.
const HAND_OVER_AGAIN: Duration = Duration::from_secs(30);

/// Attempts to thaw a group whose primary did not hand over.
const THAWS_MAX: usize = 20;

/// Groups whose primaries hand over, or failed to a moment ago.
#[derive(Debug, Default)]
pub(crate) struct HandOvers(Mutex<BTreeMap<PgId, Option<Instant>>>);

impl HandOvers {
    fn table(&self) -> MutexGuard<'_, BTreeMap<PgId, Option<Instant>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Those that are left alone, and how many of them are under way.
    fn now(&self) -> (BTreeSet<PgId>, usize) {
        let mut table = self.table();
        table.retain(|_, failed| failed.is_none_or(|at| at.elapsed() < HAND_OVER_AGAIN));
        (table.keys().copied().collect(), table.values().filter(|f| f.is_none()).count())
    }
}

impl Service {
    /// The loop of a leader.
    pub(crate) async fn run_replicas(self: &Arc<Self>, stop: Stop) {
        self.hand_overs.table().clear();
        let wanted = (self.config.replicas, self.config.min_in_sync);
        // Clusters without other members look as rarely as everybody.
        let mut pause = self.config.timings.tick();
        while !stop.wait(&self.wakes.members, pause).await {
            match self.see_to_members(wanted).await {
                Ok(any) => pause = if any { LOOK } else { self.config.timings.tick() },
                Err(e) => tracing::debug!(error = %e, "seeing to members of groups"),
            }
            if stop.sleep(LOOK_MIN).await {
                return;
            }
        }
    }

    /// One look and its steps. `false`: there is nothing to look after.
    async fn see_to_members(self: &Arc<Self>, wanted: (u8, u8)) -> FsResult<bool> {
        let (now, map, counts) = self
            .voter
            .peek(|_, r| -> FsResult<_> { Ok((r.replication()?, r.map()?, r.counts()?)) })
            .map_err(fs_error)??;
        if map.pgs.is_empty() {
            return Ok(false);
        }
        let (replicas, min_in_sync) = wanted;
        if now != wanted {
            self.submit_internal(Command::SetReplication { replicas, min_in_sync }).await?;
        }
        if replicas <= 1 && !map.pgs.iter().any(PgEntry::has_others) {
            return Ok(false);
        }
        let lease = Duration::from_millis(self.config.timings.lease_ms);
        let ids = || map.nodes.iter().map(|n| n.id);
        let alive: BTreeSet<NodeId> = ids().filter(|n| self.liveness.is_alive(*n, lease)).collect();
        let cut_off: BTreeSet<NodeId> = ids().filter(|n| self.is_cut_off(*n)).collect();
        let (mut busy, handing) = self.hand_overs.now();
        busy.extend(self.movers.wanted());
        let steps = plan(&Known {
            map: &map,
            replicas,
            alive: &alive,
            cut_off: &cut_off,
            wishes: &self.liveness.wishes(),
            busy: &busy,
            whole: &self.liveness.whole(),
            handing,
            still: counts.shutting_down || counts.desired_nodes == 0,
        });
        for (pg, step) in steps {
            let Some(group) = map.pgs.get(usize::from(pg.0)) else { continue };
            if let Err(e) = self.take_step(&map, pg, group, step).await {
                tracing::debug!(%pg, ?step, error = %e, "a step of a group's members");
            }
        }
        Ok(true)
    }

    async fn take_step(
        self: &Arc<Self>,
        map: &ClusterMap,
        pg: PgId,
        group: &PgEntry,
        step: Step,
    ) -> FsResult<()> {
        let from = group.epoch;
        let (command, counter) = match step {
            Step::TakeOver(to) => return self.take_over(pg, group, to).await,
            Step::HandOver(to) => {
                let (service, map, group) = (Arc::clone(self), map.clone(), group.clone());
                self.hand_overs.table().insert(pg, None);
                tokio::spawn(async move {
                    match service.hand_over(&map, pg, &group, to).await {
                        Ok(()) => drop(service.hand_overs.table().remove(&pg)),
                        // Its members changed meanwhile: the next look says what is next.
                        Err(e) if service.has_moved_on(pg, group.epoch) => {
                            tracing::debug!(%pg, error = %e, "a hand-over is void");
                            service.hand_overs.table().remove(&pg);
                        }
                        Err(e) => {
                            tracing::warn!(%pg, error = %e, "handing a group over");
                            service.hand_overs.table().insert(pg, Some(Instant::now()));
                        }
                    }
                    service.wakes.members.notify_one();
                });
                return Ok(());
            }
            Step::Add(member) => {
                (Command::AddMember { pg, from, member }, &self.counts.members_added)
            }
            Step::InSync(member) => {
                (Command::MemberInSync { pg, from, member }, &self.counts.members_in_sync)
            }
            Step::Lost(member) | Step::Surplus(member) => {
                let planned = matches!(step, Step::Surplus(_));
                (Command::DropMember { pg, from, member, planned }, &self.counts.members_dropped)
            }
        };
        self.submit_internal(command).await?;
        count(counter);
        match step {
            Step::Lost(_) => tracing::warn!(%pg, ?step, "the group lost a member"),
            _ => tracing::debug!(%pg, ?step, "the group's members change"),
        }
        Ok(())
    }

    /// The primary is cut off: an in-sync member is the first from now on.
    async fn take_over(&self, pg: PgId, group: &PgEntry, to: ShardRef) -> FsResult<()> {
        let Some(lost) = group.primary() else { return Err(again("nobody holds it")) };
        let back = || again("its primary is back");
        let bar = self.liveness.bar(lost.node, self.lease_wait()).ok_or_else(back)?;
        if !bar.holds() {
            return Err(again("the leader changes"));
        }
        let command = Command::TakeOver { pg, from: group.epoch, to, keep_old: false };
        match self.submit(command).await {
            Ok(CommandReply::Refused(why)) => Err(FsError::Invalid(why)),
            Ok(_) => {
                count(&self.counts.take_overs);
                tracing::warn!(%pg, lost = %lost.node, holder = ?to, "a member took the group over");
                Ok(())
            }
            Err(e) => {
                // Whether the epoch comes isn't known.
                bar.keep();
                Err(e)
            }
        }
    }

    /// Whether the group is in another epoch by now.
    fn has_moved_on(&self, pg: PgId, from: PgEpoch) -> bool {
        let group = self.map().ok().and_then(|map| map.pgs.get(usize::from(pg.0)).cloned());
        group.is_some_and(|group| group.epoch != from)
    }

    /// The primary gives its place to an in-sync member, and stays one itself. Until the new epoch its journaled freeze holds, also
    /// over a restart; it is lifted if that epoch does not come.
    async fn hand_over(
        &self,
        map: &ClusterMap,
        pg: PgId,
        group: &PgEntry,
        to: ShardRef,
    ) -> FsResult<()> {
        let Some(old) = group.primary() else { return Err(again("nobody holds it")) };
        let from = group.epoch;
        // Says to the next leader that somebody is to be thawed.
        self.submit_internal(Command::PgMoving(pg, true)).await?;
        let frozen = async {
            for request in [Control::Freeze(pg, from), Control::Yield(pg, from)] {
                self.cores
                    .order(map, old, &request, TIMEOUT)
                    .await
                    .map_err(|e| again(&e.to_string()))?;
            }
            Ok::<_, FsError>(())
        };
        let done = match frozen.await {
            Err(e) => Err(e),
            Ok(()) => {
                match self.submit(Command::TakeOver { pg, from, to, keep_old: true }).await? {
                    CommandReply::Refused(why) => Err(FsError::Invalid(why)),
                    _ => Ok(()),
                }
            }
        };
        if let Err(e) = done {
            self.submit_internal(Command::PgMoving(pg, false)).await?;
            let thaw = Control::Thaw(pg, from);
            // Nobody else lifts the freeze while the epoch lasts.
            for _ in 0..THAWS_MAX {
                if self.has_moved_on(pg, from) {
                    break;
                }
                match self.cores.order(map, old, &thaw, TIMEOUT).await {
                    Ok(()) => break,
                    Err(e) => tracing::debug!(%pg, error = %e, "thawing"),
                }
                tokio::time::sleep(LOOK).await;
            }
            return Err(e);
        }
        count(&self.counts.hand_overs);
        tracing::info!(%pg, ?old, holder = ?to, "the group's primary handed over");
        Ok(())
    }
}
