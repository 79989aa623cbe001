//! Scrub: every block on the device is read now and then and compared with its checksum (I10), so that
//! rot in clean data is found while S3 still has the bytes, and rot in dirty data while somebody who
//! wrote it may still be there.
//!
//! A few small reads behind each other, in the order of the index, at a byte rate; a whole pass, then a
//! rest. A block that does not match is read again; clean data that stays wrong is dropped, so that the
//! next read takes it from S3, and dirty data is counted and said. Between two looks a chunk may change:
//! what a pass misses, the next one finds.

use super::{Buffer, Command, Pending, Purpose, ShardCore};
use ebb_dataplane_protocol::checksum::crc32c;
use ebb_store::{BLOCK, ScrubAt, ScrubPiece};

/// Blocks of a read: what the pool for small pieces has room for.
const STEP_BLOCKS: u32 = 16;
/// Reads that were not used while there was other work are not made up for beyond this.
const BUDGET_BYTES_MAX: u64 = 4 << 20;

#[derive(Default)]
pub(crate) struct Scrub {
    /// Bytes that may be read now.
    budget: u64,
    counted_ms: u64,
    at: ScrubAt,
    in_flight: bool,
    /// The piece did not match the first time.
    again: bool,
    /// Damaged dirty blocks of this pass.
    damaged: u64,
    rest_until_ms: u64,
}

impl<B: Buffer> ShardCore<B> {
    /// Reads on if the rate allows it.
    pub(crate) fn keep_scrubbing(&mut self) {
        let rate = self.limits.scrub_bytes_per_s;
        let s = &mut self.scrub;
        let earned = self.now_ms.saturating_sub(s.counted_ms).saturating_mul(rate) / 1000;
        if earned > 0 {
            s.budget = (s.budget + earned).min(BUDGET_BYTES_MAX);
            s.counted_ms = self.now_ms;
        }
        let step = u64::from(STEP_BLOCKS) * BLOCK as u64;
        if s.in_flight || s.budget < step || self.now_ms < s.rest_until_ms || self.store.failed() {
            return;
        }
        let Some(piece) = self.store.plan_scrub(s.at, STEP_BLOCKS) else { return self.passed() };
        let bytes = piece.crcs.len() * BLOCK;
        let Some(buf) = self.buffers.take(bytes, Purpose::Edge) else {
            // Others need it more.
            return self.store.release(piece.guard);
        };
        self.scrub.in_flight = true;
        let offset = piece.offset;
        let token = self.expect(Pending::Scrub(piece));
        self.out.push(Command::Read { token, offset, buf, range: 0..bytes });
    }

    fn passed(&mut self) {
        let s = &mut self.scrub;
        self.stats.scrub_passes += 1;
        self.stats.damaged_blocks = std::mem::take(&mut s.damaged);
        s.at = ScrubAt::default();
        s.rest_until_ms = self.now_ms.saturating_add(self.limits.scrub_rest_ms);
    }

    pub(crate) fn scrub_read(&mut self, piece: ScrubPiece, buf: &B, ok: bool) {
        self.store.release(piece.guard);
        // A writer may wait for the blocks it held.
        self.retry_waiting = true;
        let bytes = (piece.crcs.len() * BLOCK) as u64;
        let blocks = buf.bytes().chunks(BLOCK).zip(&piece.crcs);
        let wrong = match ok {
            true => blocks.filter(|(block, crc)| crc32c(block) != **crc).count() as u64,
            false => piece.crcs.len() as u64,
        };
        self.stats.scrubbed_bytes += bytes;
        let s = &mut self.scrub;
        s.in_flight = false;
        s.budget = s.budget.saturating_sub(bytes);
        s.again = wrong > 0 && !s.again;
        if s.again {
            return;
        }
        s.at = piece.next;
        if wrong == 0 {
            return;
        }
        self.stats.checksum_errors += wrong;
        let (inode, chunk, offset) = (piece.inode, piece.chunk, piece.offset);
        if piece.dirty {
            s.damaged += wrong;
            self.stats.damaged_blocks = self.stats.damaged_blocks.max(s.damaged);
            tracing::error!(%inode, chunk = chunk.0, offset, wrong, "damaged blocks that are not in S3");
        } else if self.store.evict_chunk(inode, chunk).is_ok() {
            self.stats.checksum_repairs += wrong;
            tracing::warn!(%inode, chunk = chunk.0, offset, wrong, "damaged blocks dropped; S3 has them");
        }
    }
}
