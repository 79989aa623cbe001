//! Directory renames: the walk over what moved, one bounded step per command (PROTOCOL §9).

use super::Stop;
use crate::service::{Service, fs_error};
use ebb_metaplane_protocol::{Command, FsResult};

/// Entries of one step.
const STEP: u32 = 500;

impl Service {
    /// The loop of a leader.
    pub(crate) async fn run_moves(&self, stop: Stop) {
        let tick = self.config.timings.tick() * 4;
        while !stop.wait(&self.wakes.moves, tick).await {
            if let Err(e) = self.step_moves(&stop).await {
                tracing::debug!(error = %e, "walking a renamed directory");
            }
        }
    }

    async fn step_moves(&self, stop: &Stop) -> FsResult<()> {
        while !stop.is_set() && self.voter.peek(|_, r| r.pending_moves()).map_err(fs_error)?? > 0 {
            self.voter.submit(Command::MoveStep(STEP)).await.map_err(fs_error)?;
        }
        Ok(())
    }
}
