//! The store's vocabulary at run time: operations, plans, pieces, tickets. Plain data, no behaviour.

use crate::device::AlignedBuf;
use ebb_dataplane_protocol::{
    ByteRange, ChunkIndex, ContentId, Cut, Generation, InodeId, PgId, Sequence, SessionId,
    ViewVersion,
};
use std::ops::Range;

/// Payloads up to this ride inside the journal: one I/O instead of two and a flush.
pub const INLINE_BYTES_MAX: u32 = 32 << 10;
/// Blocks a misaligned inline payload can touch.
pub const INLINE_BLOCKS_MAX: u32 = INLINE_BYTES_MAX / ebb_dataplane_protocol::BLOCK_BYTES + 1;
/// Blocks of a chunk.
pub const CHUNK_BLOCKS: u32 =
    ebb_dataplane_protocol::CHUNK_BYTES / ebb_dataplane_protocol::BLOCK_BYTES;
/// Bytes of a block, as a length.
pub const BLOCK: usize = ebb_dataplane_protocol::BLOCK_BYTES as usize;
/// Applied sequences kept per session; more unanswered ones are refused.
pub const WINDOW_MAX: usize = 4096;
/// Entries of windows in one page of a hand-over, and in its record: the least journal's batch takes it.
pub const WINDOW_PAGE: usize = ebb_dataplane_protocol::control::WINDOW_PAGE;
/// Sealed generations of one scope at once.
pub const SEALS_MAX: usize = 4;

/// An inode's part in one placement group: what floors, tags, views, seals and pins belong to. Groups
/// change hands one by one, and a core may hold one as primary and another as backup, so what one of
/// them was told says nothing about the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scope {
    /// The inode.
    pub inode: InodeId,
    /// The group.
    pub pg: PgId,
}

impl Scope {
    /// That of a chunk, in a cluster of `pg_count` groups.
    pub const fn of(inode: InodeId, chunk: ChunkIndex, pg_count: u16) -> Self {
        Self { inode, pg: PgId::of_chunk(inode, chunk, pg_count) }
    }
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "inode {} in group {}", self.inode, self.pg)
    }
}

/// A mutation's number, in journal order. It takes effect, and may be acked, when
/// `batch_durable` returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);
/// A write between `begin_write` and `commit_write` or `abort_write`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteId(pub u64);
/// A fill between `begin_fill` and `commit_fill` or `abort_fill`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FillId(pub u64);
/// A journal batch; also its sequence in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId(pub u64);
/// A checkpoint step in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CheckpointToken(pub u64);

/// What a session's window knows of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing: it was not applied here.
    New,
    /// It was applied, under this tag.
    Applied(Generation),
    /// The session itself said that it was answered (or given up): nobody waits for this one.
    Answered,
}

/// What of the file is in S3, as the caller's view says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BaseView {
    /// Clean extents of any other content are not used.
    pub content: ContentId,
    /// `Backing::valid_bytes()`, 0 without a backing. Blocks at or past it that are not dirty are
    /// known holes (I4); below it, what is not here is a miss.
    pub valid_bytes: u64,
}

/// A write to one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteOp {
    /// The inode.
    pub inode: InodeId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// First byte in the chunk.
    pub offset: u32,
    /// Bytes, at least 1.
    pub len: u32,
    /// Generation of the writer's grant.
    pub generation: Generation,
    /// The writer's session.
    pub session: SessionId,
    /// Its sequence: (session, sequence) is applied once.
    pub sequence: Sequence,
    /// Sequences below are answered and may be forgotten.
    pub answered_below: Sequence,
    /// The base under the dirty data (for edges).
    pub base: BaseView,
}

/// How to carry a write out. The caller
/// 1. lays the payload at byte `head` of an aligned buffer of `blocks * 4096` bytes,
/// 2. fills each edge from its source,
/// 3. computes one CRC-32C per block,
/// 4. if not `inline`: writes every `writes` entry and waits for all of them (no sync needed),
/// 5. calls `commit_write(id, crcs, buffer if inline)`, or `abort_write(id)` after its I/O ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WritePlan {
    /// For commit or abort.
    pub id: WriteId,
    /// First block of the chunk that is written.
    pub first_block: u32,
    /// Blocks written.
    pub blocks: u32,
    /// Where the payload starts in the buffer (`offset % 4096`).
    pub head: usize,
    /// The buffer goes into the journal record; `writes` is empty.
    pub inline: bool,
    /// Device writes, in any order.
    pub writes: Vec<PlannedWrite>,
    /// At most two blocks that are written in part.
    pub edges: Vec<Edge>,
}

/// One device write of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedWrite {
    /// Device offset, a multiple of 4096.
    pub offset: u64,
    /// Bytes of the plan's buffer, a multiple of 4096.
    pub range: Range<usize>,
}

/// A block of which only a part is written: the rest comes from what was there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edge {
    /// Block of the chunk.
    pub block: u32,
    /// Where the block starts in the plan's buffer.
    pub at: usize,
    /// Byte ranges *of the block* to fill from the source (before and after the payload).
    pub fill: Vec<Range<usize>>,
    /// Where the old bytes are.
    pub source: EdgeSource,
}

/// Old bytes of an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EdgeSource {
    /// A hole: zeros.
    Zero,
    /// On the device; held for this plan until commit or abort. Check `crc` over the whole block as
    /// read, then take bytes `valid..` as zeros.
    Device {
        /// Device offset of the block.
        offset: u64,
        /// CRC-32C of the block.
        crc: u32,
        /// Bytes of the block that count.
        valid: u32,
    },
    /// In S3 only: fetch bytes `[0, valid)` of the block from the object; the rest is zeros.
    Miss {
        /// Bytes of the block that are in the object.
        valid: u32,
    },
}

/// A fill's plan: like a [`WritePlan`], block-aligned, never inline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FillPlan {
    /// For commit or abort.
    pub id: FillId,
    /// First block of the chunk.
    pub first_block: u32,
    /// Blocks.
    pub blocks: u32,
    /// Device writes.
    pub writes: Vec<PlannedWrite>,
}

/// Clean data fetched from S3, to be cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillOp {
    /// The inode.
    pub inode: InodeId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// First block.
    pub first_block: u32,
    /// Blocks.
    pub blocks: u32,
    /// The content it is of.
    pub content: ContentId,
    /// Bytes of the last block that are in the object (1..=4096).
    pub tail_valid: u32,
}

/// How to read a range.
#[derive(Debug)]
pub struct ReadPlan {
    /// Pieces in order; they cover the range exactly.
    pub pieces: Vec<ReadPiece>,
    /// Keeps every device piece from being reused until it is released; `None`: no device piece.
    pub guard: Option<ReadGuard>,
}

/// A part of a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadPiece {
    /// Blocks of the chunk.
    pub blocks: Range<u32>,
    /// Where they are.
    pub source: PieceSource,
}

/// Where the blocks of a piece are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PieceSource {
    /// On the device, contiguous.
    Device {
        /// Device offset of the first block.
        offset: u64,
        /// CRC-32C of each block as stored; check before use (I10).
        crcs: Vec<u32>,
        /// Bytes of the *last* block that count; if below 4096, zero the rest after the check and
        /// compute that block's checksum anew.
        tail_valid: u32,
        /// Dirty data: not in S3, a mismatch cannot be repaired from there.
        dirty: bool,
    },
    /// A known hole: zeros; each block's checksum is [`crate::zero_block_crc`].
    Zero,
    /// Must be fetched from S3 (bytes past the view's `valid_bytes` are zeros).
    Miss,
}

/// Proof that a read is under way; give it back to `release`.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "give it back to Store::release, or freed space never comes back"]
pub struct ReadGuard(pub(crate) u64);

/// Clean blocks on their way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaving {
    /// The inode.
    pub inode: InodeId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// What they are of.
    pub content: ContentId,
    /// The first one, in the chunk.
    pub first: u32,
    /// Device offset, bytes.
    pub offset: u64,
    /// CRC-32C of each block as it is on the device.
    pub crcs: Box<[u32]>,
    /// Bytes of the last block that count, 1 to 4096; the rest reads as zero.
    pub tail_valid: u32,
}

/// An eviction under way, of which something may be kept elsewhere.
#[derive(Debug)]
pub struct Evicted {
    /// Clean bytes that go.
    pub bytes: u64,
    /// The last of its records: when it is durable the space is free, once the guard is released.
    pub ticket: Ticket,
    /// Where they are, chunk by chunk, ascending in each.
    pub leaving: Vec<Leaving>,
    /// Keeps them readable.
    pub guard: ReadGuard,
}

/// A newer view of an inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ViewUpdate {
    /// Whose.
    pub scope: Scope,
    /// Version of the view.
    pub version: ViewVersion,
    /// Its content and valid bytes.
    pub base: BaseView,
    /// Its cuts, at most `CUTS_MAX`.
    pub cuts: Vec<Cut>,
}

/// What a seal found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// Pinned dirty ranges in bytes of the file, coalesced.
    pub extents: Vec<ByteRange>,
    /// One past the last byte written under generations ≤ g and not cut before the seal; 0: none.
    pub high_water: u64,
}

/// A journal batch to write: first, if asked, one fdatasync of the device; then `bytes` at `offset`
/// with `RWF_DSYNC`; then `batch_durable(id)`.
#[derive(Debug)]
pub struct JournalBatch {
    /// For `batch_durable`.
    pub id: BatchId,
    /// Device offset, a multiple of 4096.
    pub offset: u64,
    /// A multiple of 4096 bytes, aligned to 4096.
    pub bytes: AlignedBuf,
    /// Data writes named by these records must be made durable first.
    pub sync_data_first: bool,
    /// There is inline data in it, which is moved to slots later. Who keeps the bytes until then
    /// needs not read them back.
    pub inline: bool,
}

/// One move of live inline data from the journal to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelocationMove {
    /// Device offset to read.
    pub from: u64,
    /// Device offset to write.
    pub to: u64,
    /// Bytes, a multiple of 4096.
    pub bytes: u32,
}

/// What the checkpoint wants next. One step at a time; each is answered by `checkpoint_done(token)`.
#[derive(Debug)]
pub enum CheckpointStep {
    /// None is running.
    Idle,
    /// Waits for a batch to become durable, for a read to be released, or for the step in flight.
    Wait,
    /// Copy each move's bytes as they are (their checksums move with them; a mismatch is the reader's
    /// business, so that rot never blocks a checkpoint), and make the copies durable. Not with a batch: every
    /// write of the batch would wait for that.
    Relocate {
        /// For `checkpoint_done`.
        token: CheckpointToken,
        /// Moves, at most 1 MiB in all.
        moves: Vec<RelocationMove>,
    },
    /// Write without sync.
    Write {
        /// For `checkpoint_done`.
        token: CheckpointToken,
        /// Device offset.
        offset: u64,
        /// Aligned bytes, at most 1 MiB.
        bytes: AlignedBuf,
    },
    /// fdatasync the device.
    Sync {
        /// For `checkpoint_done`.
        token: CheckpointToken,
    },
    /// Write with `RWF_DSYNC` (a superblock; the four go one after another).
    WriteDurable {
        /// For `checkpoint_done`.
        token: CheckpointToken,
        /// Device offset.
        offset: u64,
        /// One block.
        bytes: AlignedBuf,
    },
}

/// How full the store is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Bytes of the data area.
    pub capacity_bytes: u64,
    /// Bytes a write could take now, without evicting.
    pub free_bytes: u64,
    /// Of these, what is left of groups that others hold now.
    pub remnant_bytes: u64,
    /// Dirty bytes, counted once per block that only this node holds (pins included).
    pub dirty_bytes: u64,
    /// Clean bytes.
    pub clean_bytes: u64,
    /// Inodes with pins.
    pub pinned_inodes: u64,
    /// Live bytes inside the journal.
    pub inline_bytes: u64,
    /// Bytes of the journal ring.
    pub journal_bytes: u64,
    /// Bytes of it that are in use.
    pub journal_used_bytes: u64,
    /// Inodes known (with data or only a floor).
    pub inodes: u64,
    /// Chunks known.
    pub chunks: u64,
    /// Extents of all chunks.
    pub extents: u64,
    /// Serialised size of the index: what a checkpoint takes.
    pub index_bytes: u64,
    /// Its limit.
    pub index_bytes_max: u64,
    /// RAM of index, bitmap and windows, within 15 % of what an allocator gives.
    pub memory_bytes: u64,
    /// Its limit ([`crate::Store::set_memory_limit`]).
    pub memory_bytes_max: u64,
    /// Batches written since open.
    pub batches: u64,
    /// Records in them.
    pub records: u64,
    /// Checkpoints completed since open.
    pub checkpoints: u64,
    /// Freed bytes that wait for readers.
    pub waiting_bytes: u64,
}

impl StoreStats {
    /// How much of what there is for dirty data it takes, in thousandths: of the blocks, or of the index (on the
    /// device and in RAM), where many small files need more of that than of blocks. Clean data counts for
    /// nothing: it goes when dirty data needs its place.
    pub fn dirty_permille(&self) -> u16 {
        let of = |part: u64, whole: u64| part.saturating_mul(1000) / whole.max(1);
        // Writes leave the other half of the index to pins.
        let index = of(self.index_bytes, self.index_bytes_max / 2)
            .max(of(self.memory_bytes, self.memory_bytes_max));
        // Whose entries they are isn't counted; by bytes is near enough.
        let held = (self.dirty_bytes + self.clean_bytes).max(1);
        let index = (u128::from(index) * u128::from(self.dirty_bytes) / u128::from(held)) as u64;
        of(self.dirty_bytes, self.capacity_bytes).max(index).min(1000) as u16
    }
}

/// Records that wait for a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// How many.
    pub records: usize,
    /// Somebody waits for one of them.
    pub urgent: bool,
}

/// The blocks that bytes `[offset, offset + len)` of a chunk touch; `None` if empty or past its end.
pub(crate) fn block_range(offset: u32, len: u32) -> Option<Range<u32>> {
    let end = offset.checked_add(len)?;
    if len == 0 || end > ebb_dataplane_protocol::CHUNK_BYTES {
        return None;
    }
    Some(offset / BLOCK as u32..end.div_ceil(BLOCK as u32))
}
