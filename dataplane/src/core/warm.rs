//! Warming: bringing the missing blocks of a range into the cache, a few fills at a time.
//!
//! The metadata plane asks for it (`ebb warm`), and clients whose readers said what they will need. Only
//! chunks whose group this core holds. The answer comes when the range was gone through; a fetch that
//! fails is skipped, since a later read will say why.

use super::fill::Target;
use super::grants::base_of;
use super::placement::Refusal;
use super::{Buffer, Owed, RETRY_BUSY_MS, ShardCore};
use ebb_dataplane_protocol::control::ControlReply;
use ebb_dataplane_protocol::{
    ByteRange, CHUNK_BYTES, ChunkIndex, FileView, Grant, InodeId, Opcode, PgId, Status,
};
use ebb_store::{BLOCK, PieceSource};
use std::sync::Arc;

/// Bytes that are looked at in one step.
const STEP_BYTES: u64 = 1 << 20;
/// Fills of one task in flight.
const FILLS_IN_FLIGHT: usize = 4;
/// Tasks under way above which clients are told to come again.
const PREFETCHES_MAX: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct WarmId(u64);

#[derive(Debug)]
pub(crate) struct WarmTask {
    owed: Owed,
    inode: InodeId,
    view: Arc<FileView>,
    at: u64,
    end: u64,
    in_flight: usize,
    /// Steps are being issued: completions that come at once must not recurse.
    stepping: bool,
}

impl<B: Buffer> ShardCore<B> {
    pub(crate) fn warm(&mut self, owed: Owed, grant: Grant, range: ByteRange) {
        self.begin_warm(owed, grant.inode, Arc::new(grant.view), range);
    }

    /// The same for a client, of a range that it may read.
    pub(crate) fn prefetch(
        &mut self,
        owed: Owed,
        inode: InodeId,
        view: Arc<FileView>,
        range: ByteRange,
    ) {
        if self.warms.len() >= PREFETCHES_MAX {
            return self.refuse(owed, Refusal::after(Status::Busy, RETRY_BUSY_MS));
        }
        self.begin_warm(owed, inode, view, range);
    }

    fn begin_warm(&mut self, owed: Owed, inode: InodeId, view: Arc<FileView>, range: ByteRange) {
        let end = range.end.min(base_of(&view).valid_bytes);
        let at = range.start / BLOCK as u64 * BLOCK as u64;
        let id = WarmId(self.next_id());
        let task = WarmTask { owed, inode, view, at, end, in_flight: 0, stepping: false };
        self.warms.insert(id, task);
        self.step_warm(id);
    }

    pub(crate) fn warm_waits(&mut self, id: WarmId) {
        if let Some(task) = self.warms.get_mut(&id) {
            task.in_flight += 1;
        }
    }

    /// A fill of the task ended, well or not.
    pub(crate) fn warmed(&mut self, id: WarmId) {
        if let Some(task) = self.warms.get_mut(&id) {
            task.in_flight -= 1;
        }
        self.step_warm(id);
    }

    fn step_warm(&mut self, id: WarmId) {
        let Some(task) = self.warms.get_mut(&id) else { return };
        if std::mem::replace(&mut task.stepping, true) {
            return;
        }
        loop {
            let Some(task) = self.warms.get_mut(&id) else { return };
            if task.at >= task.end || task.in_flight >= FILLS_IN_FLIGHT {
                break;
            }
            let (inode, at, end) = (task.inode, task.at, task.end);
            let view = Arc::clone(&task.view);
            let to = end.min((at / STEP_BYTES + 1) * STEP_BYTES);
            task.at = to;
            self.warm_step(id, inode, &view, at, to);
        }
        let Some(task) = self.warms.get_mut(&id) else { return };
        task.stepping = false;
        if task.at >= task.end && task.in_flight == 0 {
            let owed = task.owed;
            self.warms.remove(&id);
            match owed.header.opcode {
                Opcode::Read => self.reply(owed, Status::Ok, Vec::new()),
                _ => self.control_reply(owed, &ControlReply::Done),
            }
        }
    }

    fn warm_step(&mut self, id: WarmId, inode: InodeId, view: &Arc<FileView>, at: u64, end: u64) {
        let chunk = ChunkIndex::of_offset(at);
        let groups = self.placement.pg_count();
        if groups == 0 || self.placement.own_epoch(PgId::of_chunk(inode, chunk, groups)).is_none() {
            return;
        }
        debug_assert!(u64::from(CHUNK_BYTES).is_multiple_of(STEP_BYTES));
        let first = ((at - chunk.start()) / BLOCK as u64) as u32;
        let last = (end - chunk.start()).div_ceil(BLOCK as u64) as u32;
        let plan = self.store.plan_read(inode, chunk, first..last, base_of(view));
        if let Some(guard) = plan.guard {
            self.store.release(guard);
        }
        for piece in plan.pieces {
            if piece.source == PieceSource::Miss {
                self.want_fill(inode, chunk, view, piece.blocks, false, Target::Warm(id));
            }
        }
    }
}
