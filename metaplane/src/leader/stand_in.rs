//! Groups of a node that is cut off (PROTOCOL R23, R24): another primary for those of which S3 has everything, decided by the state
//! machine in one command with the new epoch; and what a node that came back still holds of them goes.
//!
//! The stand-in is told no windows (R27): the map says since which epoch, and a client that never heard what became of a write
//! it sent before that doesn't send it again. Limit, as in R40: a leader that stands still between its last look and its
//! proposal, while leadership goes to another and comes back, isn't fenced. It takes a vote of others, so not with one voter.

use super::liveness::Bar;
use super::mover::again;
use crate::service::{Service, count, fs_error};
use ebb_dataplane_protocol::control::Control;
use ebb_dataplane_protocol::{ClusterMap, CoreId, NodeId, PgEntry, PgEpoch, PgId, ShardRef};
use ebb_metaplane_protocol::admin::CutOff;
use ebb_metaplane_protocol::{Command, CommandReply, FsError, FsResult};
use std::collections::BTreeMap;
use std::time::Duration;

/// Limit of a call.
const TIMEOUT: Duration = Duration::from_secs(5);

impl Service {
    /// After so long without a lease from this leader a node has none from anybody (R23).
    pub(crate) fn lease_wait(&self) -> Duration {
        let t = &self.config.timings;
        Duration::from_millis(t.lease_ms.saturating_add(t.drift_ms))
    }

    pub(crate) fn is_cut_off(&self, node: NodeId) -> bool {
        self.liveness.cut_off(node, self.lease_wait()).is_some()
    }

    /// For how long a node is cut off, and the state machine's sequence after that began: grants of later commands can't have
    /// been used there.
    pub(crate) async fn cut_off(&self, node: NodeId) -> FsResult<Option<(Duration, u64)>> {
        let wait = self.lease_wait();
        let Some((since, over)) = self.liveness.cut_off(node, wait) else { return Ok(None) };
        if let Some(over) = over {
            return Ok(Some((since, over)));
        }
        // Linearizable: every grant that anybody was told of is applied by then.
        let now = self.voter.read(|_, r| r.sequence()).await.map_err(fs_error)??;
        Ok(self.liveness.over_at(node, wait, now).map(|over| (since, over)))
    }

    /// Gives a group of a node that is cut off to others.
    pub(super) async fn stand_in(
        &self,
        map: &ClusterMap,
        pg: PgId,
        group: &PgEntry,
        to: &[ShardRef],
    ) -> FsResult<()> {
        let Some(donor) = group.primary() else { return Err(again("nobody holds it")) };
        if to.iter().any(|core| self.is_cut_off(core.node)) {
            return Err(FsError::Invalid("it is cut off, too".into()));
        }
        self.clear_for(map, pg, group, to).await?;
        let next = PgEpoch(group.epoch.0 + 1);
        for core in to {
            // None: but from then on a release of an older epoch leaves the windows of this one alone.
            let take = Control::TakeWindows(pg, next, Vec::new());
            self.tell(map, *core, &take).await?;
        }
        let back = || again("its holder is back");
        // All that are in-sync: as long as one of them is in contact, it takes over.
        let mut bars = Vec::with_capacity(group.members.len());
        let mut cut_off = 0;
        for m in &group.members {
            bars.push(self.liveness.bar(m.node, self.lease_wait()).ok_or_else(back)?);
            cut_off = cut_off.max(self.cut_off(m.node).await?.ok_or_else(back)?.1);
        }
        if !bars.iter().all(Bar::holds) {
            return Err(again("the leader changes"));
        }
        let members = to.to_vec();
        let command = Command::StandIn { pg, from: group.epoch, members, cut_off };
        match self.submit(command).await {
            Ok(CommandReply::Refused(why)) => Err(FsError::Invalid(why)),
            Ok(_) => {
                count(&self.counts.stand_ins);
                tracing::warn!(%pg, lost = %donor.node, holder = ?to.first(), "the group has a stand-in");
                Ok(())
            }
            Err(e) => {
                bars.into_iter().for_each(Bar::keep);
                Err(e)
            }
        }
    }

    /// Whoever is to hold a group brings nothing along from a time when it held it before and lost it unasked.
    pub(super) async fn clear_for(
        &self,
        map: &ClusterMap,
        pg: PgId,
        group: &PgEntry,
        to: &[ShardRef],
    ) -> FsResult<()> {
        if group.epoch == PgEpoch(0) {
            return Ok(());
        }
        for core in to.iter().filter(|core| group.holders().all(|m| m != **core)) {
            self.tell(map, *core, &Control::DiscardPg(pg, group.epoch)).await?;
        }
        Ok(())
    }

    async fn tell(&self, map: &ClusterMap, core: ShardRef, request: &Control) -> FsResult<()> {
        self.cores.order(map, core, request, TIMEOUT).await.map_err(|e| again(&e.to_string()))
    }

    /// Nodes that came back have dirt and pins of groups that got a stand-in: all of it is in S3, or was given up.
    pub(super) async fn discard_left_overs(&self, map: &ClusterMap) {
        for (node, pg) in self.liveness.left_over(map) {
            let (Some(info), Some(group)) = (map.node(node), map.pgs.get(usize::from(pg.0))) else {
                continue;
            };
            for core in 0..info.ports.len() {
                let shard = ShardRef { node, core: CoreId(core as u16) };
                if let Err(e) = self.tell(map, shard, &Control::DiscardPg(pg, group.epoch)).await {
                    tracing::debug!(%pg, %node, error = %e, "discarding what was left of a group");
                }
            }
        }
    }

    /// Nodes that are cut off, and which of their groups wait for them.
    pub(crate) async fn cut_offs(&self, map: &ClusterMap) -> FsResult<Vec<CutOff>> {
        let mut found = Vec::new();
        let mut cut = BTreeMap::new();
        for node in map.nodes.iter().map(|n| n.id) {
            cut.extend(self.cut_off(node).await?.map(|c| (node, c)));
        }
        for (node, (since, _)) in &cut {
            let (node, since) = (*node, *since);
            let waiting = self.voter.peek(|_, r| -> FsResult<Vec<PgId>> {
                let mut waiting = Vec::new();
                for (pg, group) in map.groups_of(node) {
                    // While an in-sync member is in contact nothing waits for this one.
                    let over = group.members.iter().map(|m| Some(cut.get(&m.node)?.1));
                    let Some(over) = over.collect::<Option<Vec<u64>>>() else { continue };
                    let over = over.into_iter().max().unwrap_or_default();
                    if group.members.iter().any(|m| m.node == node) && !r.may_stand_in(pg, over)? {
                        waiting.push(pg);
                    }
                }
                Ok(waiting)
            });
            let waiting = waiting.map_err(fs_error)??;
            found.push(CutOff { node, since_ms: since.as_millis() as u64, waiting });
        }
        Ok(found)
    }
}
