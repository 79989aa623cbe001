//! Writes: into the buffer, and from there to the nodes in the background.

use crate::Result;
use crate::begin::begin;
use crate::buffer::SegmentId;
use crate::error::ClientError;
use crate::inode::{OpenInode, State};
use crate::transfer;
use bytes::Bytes;
use ebb_dataplane_protocol::ids::FILE_BYTES_MAX;
use std::sync::Arc;
use std::time::Instant;

/// Largest segment that is put on the wire by the thread that wrote it.
const SEND_HERE_MAX: usize = 64 << 10;

/// Segments to be sent.
pub(crate) type Ready = Vec<(u64, Bytes)>;

/// What a write made ready: sent when this is dropped, so that the writer can be answered before.
#[must_use]
pub struct Unsent {
    inode: Arc<OpenInode>,
    ready: Ready,
}

impl std::fmt::Debug for Unsent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unsent").field("segments", &self.ready.len()).finish_non_exhaustive()
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        let ready = std::mem::take(&mut self.ready);
        self.inode.send_all(ready);
    }
}

impl OpenInode {
    /// Takes a write into the buffer if there is room and nothing to wait for. Never blocks, so a
    /// FUSE thread may call it and answer at once. `Ok(None)`: use [`Self::write`].
    pub(crate) fn try_write(self: &Arc<Self>, offset: u64, data: &[u8]) -> Result<Option<Unsent>> {
        check_end(offset, data.len())?;
        let mut state = self.state();
        if state.stale {
            return Err(ClientError::Stale);
        }
        if state.barrier || !self.shared.write_budget.try_take(data.len()) {
            return Ok(None);
        }
        let ready = self.buffer_write(&mut state, offset, data);
        Ok(Some(Unsent { inode: Arc::clone(self), ready }))
    }

    /// Takes a write into the buffer, waiting for room and for a truncate under way.
    pub(crate) async fn write(self: &Arc<Self>, offset: u64, data: &[u8]) -> Result<()> {
        check_end(offset, data.len())?;
        // In pieces, so that a write larger than the buffer passes through it.
        for (i, piece) in data.chunks(self.shared.cluster.config.segment_bytes.max(1)).enumerate() {
            let at = offset + (i * self.shared.cluster.config.segment_bytes.max(1)) as u64;
            self.write_piece(at, piece).await?;
        }
        Ok(())
    }

    async fn write_piece(self: &Arc<Self>, offset: u64, data: &[u8]) -> Result<()> {
        self.shared.write_budget.take(data.len(), || self.shared.make_room()).await;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut state = self.state();
                if state.stale {
                    drop(state);
                    self.shared.write_budget.give(data.len());
                    return Err(ClientError::Stale);
                }
                if !state.barrier {
                    let ready = self.buffer_write(&mut state, offset, data);
                    drop(state);
                    self.send_all(ready);
                    return Ok(());
                }
            }
            changed.await;
        }
    }

    /// The budget for `data` is taken already. Gives what is to be sent now.
    fn buffer_write(&self, state: &mut State, offset: u64, data: &[u8]) -> Ready {
        let grown = state.buffer.write(offset, data, Instant::now());
        state.mtime = Some(crate::now());
        // A write after utimes makes the time that was set obsolete.
        state.set.mtime = None;
        state.note_uncommitted();
        if state.fresh {
            state.buffer.begin_early();
        }
        self.shared.write_budget.give(data.len() - grown);
        state.buffer.launch()
    }

    /// Sends what the buffer launched. Not under the state's lock: the answers need it.
    pub(crate) fn send_all(self: &Arc<Self>, ready: Ready) {
        for (start, data) in ready {
            let len = data.len();
            let sending = Arc::clone(self).send(start, data);
            if len <= SEND_HERE_MAX {
                begin(&self.shared.runtime, sending);
            } else {
                self.shared.runtime.spawn(sending);
            }
        }
    }

    async fn send(self: Arc<Self>, start: u64, data: Bytes) {
        let end = start + data.len() as u64;
        let result = {
            // Never closed, so never an error; without a permit the write would only be wider.
            let _permit = self.shared.window.acquire().await;
            transfer::write(&self, start, data).await
        };
        let (landed, freed, ready) = {
            let mut state = self.state();
            let landed = state.buffer.landed(start);
            // What was read ahead lacks these bytes, and the buffer no longer lays them over it.
            let freed = state.blocks.invalidate(start, end);
            match result {
                Ok(generation) => {
                    let known = state.ends.entry(generation).or_default();
                    *known = end.max(*known);
                    state.note_uncommitted();
                }
                Err(e) => {
                    tracing::error!(inode = self.id.0, start, end, error = %e, "a write was lost");
                    state.fail(e);
                }
            }
            (landed, freed, state.buffer.launch())
        };
        self.send_all(ready);
        self.shared.write_budget.give(landed);
        self.shared.read_budget.give(freed as usize);
        self.changed.notify_waiters();
    }

    /// Sends everything written so far and waits until it is acknowledged or has failed.
    pub(crate) async fn drain(self: &Arc<Self>) {
        let (mark, launched): (SegmentId, _) = {
            let mut state = self.state();
            (state.buffer.make_due(), state.buffer.launch())
        };
        self.send_all(launched);
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if !self.state().buffer.pending_upto(mark) {
                return;
            }
            changed.await;
        }
    }
}

fn check_end(offset: u64, len: usize) -> Result<()> {
    match offset.checked_add(len as u64) {
        Some(end) if end <= FILE_BYTES_MAX => Ok(()),
        _ => Err(ClientError::TooLarge),
    }
}
