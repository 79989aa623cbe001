//! Session windows move with their group (PROTOCOL R27, I7): from the frozen donor to whoever is to hold the group, durably,
//! before the new epoch is committed; to the state machine if nobody is, and from there to the next holder.
//!
//! Nothing here needs undoing when the leader dies in between: an entry says that a write was applied, which stays true
//! wherever it lies, and a repeated hand-over adds to it. The donor forgets its entries when it releases the group; a release that is
//! late, when the group came back meanwhile, is told by its epoch.

use super::cores;
use super::mover::again;
use crate::service::{Service, fs_error};
use ebb_dataplane_protocol::control::{Control, ControlReply, WINDOW_PAGE, WindowEntry};
use ebb_dataplane_protocol::{ClusterMap, PgEntry, PgEpoch, PgId, Sequence, SessionId, ShardRef};
use ebb_metaplane_protocol::{Command, FsResult};
use std::time::Duration;

/// Limit of a call.
const TIMEOUT: Duration = Duration::from_secs(5);

impl Service {
    /// Hands the windows of a group over. `group` is its entry; its holder, if it has one, is frozen and drained.
    pub(crate) async fn hand_windows_over(
        &self,
        map: &ClusterMap,
        pg: PgId,
        group: &PgEntry,
        to: &[ShardRef],
    ) -> FsResult<()> {
        let mut after: Option<(SessionId, Sequence)> = None;
        loop {
            let page = match group.primary() {
                Some(donor) => self.donors_windows(map, donor, pg, group, after).await?,
                None => self
                    .voter
                    .peek(|_, r| r.kept_windows(pg, after, WINDOW_PAGE))
                    .map_err(fs_error)??,
            };
            let Some(last) = page.last() else { return Ok(()) };
            after = Some((last.session, last.sequence));
            let ended = page.len() < WINDOW_PAGE;
            if to.is_empty() {
                let from = group.epoch;
                let keep = Command::KeepWindows { pg, from, entries: page.clone() };
                // A refusal is about now, not about the wish: it is tried again.
                self.submit_internal(keep).await.map_err(|e| again(&e.to_string()))?;
            }
            for core in to {
                let next = PgEpoch(group.epoch.0 + 1);
                let take = Control::TakeWindows(pg, next, page.clone());
                self.cores
                    .order(map, *core, &take, TIMEOUT)
                    .await
                    .map_err(|e| again(&e.to_string()))?;
            }
            if ended {
                return Ok(());
            }
        }
    }

    async fn donors_windows(
        &self,
        map: &ClusterMap,
        donor: ShardRef,
        pg: PgId,
        group: &PgEntry,
        after: Option<(SessionId, Sequence)>,
    ) -> FsResult<Vec<WindowEntry>> {
        let ask = Control::Windows(pg, group.epoch, after);
        let reply = self.cores.call(map, donor, &ask, TIMEOUT).await;
        match reply.map_err(|e| again(&e.to_string()))? {
            ControlReply::Windows(entries) => Ok(entries),
            other => Err(again(&cores::unexpected(donor, &other).to_string())),
        }
    }
}
