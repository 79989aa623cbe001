//! What the metadata plane asks of a core, over the core's own port, role `Meta` only; [`Control::Stats`]
//! is answered to role `Controller` too, for operators' tools. Every request is idempotent: the leader repeats
//! it until it is answered, also after a crash of either side.

use crate::grant::{ByteRange, SignedGrant};
use crate::ids::*;
use rkyv::{Archive, Deserialize, Serialize};

/// Inodes in one batch at most.
pub const BATCH_MAX: usize = 1000;

/// Entries of windows in one page of a hand-over.
pub const WINDOW_PAGE: usize = 1024;

/// A request.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub enum Control {
    /// Ends a generation of each inode (PROTOCOL §3): journals floor = g+1, refuses tags ≤ g, pins g.
    /// Repeating a seal answers the same pins. Done in every group that the core holds in this map or a
    /// newer one, below each inode's limit. Reply [`ControlReply::Sealed`].
    Seal(MapVersion, Vec<SealItem>),
    /// Uploads one file (at most one run, wholly on this core) as one object. Batched small files.
    /// Reply [`ControlReply::Stored`], one result per item.
    PutObjects(Vec<PutObject>),
    /// Uploads one run of a sealed generation as one multipart part. Reply [`ControlReply::Part`].
    UploadPart(UploadPart),
    /// Uploads a part by a server-side copy of a clean range. Reply [`ControlReply::Part`].
    CopyPart(CopyPart),
    /// A flush committed (I3): dirty extents of generations ≤ g become clean under the new content,
    /// clean ones of the old content too, clipped at `valid_bytes`; pins of ≤ g go. Done in the groups that
    /// the core leads in this map or a newer one; `Refused` if a group has changed its primary since that
    /// map: the sender looks again whom to tell. Reply [`ControlReply::Done`].
    FlushDone(MapVersion, Vec<FlushDone>),
    /// A flush was given up: pins of ≤ g go, extents stay dirty (the floor stays). The map as in
    /// [`Control::FlushDone`]. Reply `Done`.
    FlushAborted(MapVersion, Vec<(InodeId, Generation)>),
    /// Installs newer views: journals their cuts and drops what they cut. The grants are of mode
    /// `Read`. Reply `Done`.
    ApplyViews(Vec<SignedGrant>),
    /// The inodes are gone: drop everything of them. The map as in [`Control::FlushDone`]. Reply `Done`.
    DropInodes(MapVersion, Vec<InodeId>),
    /// Drops clean chunks: of the inodes, or (empty) of all. Reply `Done`.
    EvictClean(Vec<InodeId>),
    /// Journals Freeze: writes of the group get `Frozen` until the epoch passes on or `Thaw`.
    /// Reply `Done`.
    Freeze(PgId, PgEpoch),
    /// Nothing of the group is served any more in this epoch, reads neither: another member takes it over (PROTOCOL
    /// R44). After `Freeze`; forgotten with the process, whose restart is a new epoch (R45). `Thaw` lifts it. Reply `Done`.
    Yield(PgId, PgEpoch),
    /// Lifts a freeze of this epoch. Reply `Done`.
    Thaw(PgId, PgEpoch),
    /// A page of the windows of a group that is frozen in this epoch, from past (session, sequence) on
    /// (PROTOCOL R27). Reply [`ControlReply::Windows`]; fewer than [`WINDOW_PAGE`] entries end it.
    Windows(PgId, PgEpoch, Option<(SessionId, Sequence)>),
    /// Takes over entries of a group that comes here in this epoch: journaled before that is
    /// committed. A late `ReleasePg` of an older one leaves them alone. At most [`WINDOW_PAGE`]. Reply
    /// `Done` or `Refused`.
    TakeWindows(PgId, PgEpoch, Vec<WindowEntry>),
    /// What the core holds of a group. Reply [`ControlReply::Pg`].
    PgStatus(PgId),
    /// The group is held by others as of this epoch: refuse if it has dirty data or pins, else drop
    /// its clean data, which other cores may still read for a while. Reply `Done` or `Refused`.
    ReleasePg(PgId, PgEpoch),
    /// The group is held by others as of this epoch, and this node may not have been asked (PROTOCOL R24):
    /// drop everything of it, dirty data and pins too. Refused by who holds the group in this epoch or a
    /// later one, as of its own map. Reply `Done` or `Refused`.
    DiscardPg(PgId, PgEpoch),
    /// Brings chunks of a file into the cache. The grant is of mode `Read`. Reply `Done`.
    Warm(SignedGrant, ByteRange),
    /// Counters. Reply [`ControlReply::Stats`].
    Stats,
}

/// One inode of a [`Control::Seal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct SealItem {
    /// The inode.
    pub inode: InodeId,
    /// The generation that ends.
    pub generation: Generation,
    /// The inode's allocation limit, bytes: nothing at or past it was ever granted.
    pub alloc_limit: u64,
}

/// What a core holds of a sealed inode.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct SealedItem {
    /// The inode.
    pub inode: InodeId,
    /// The sealed generation.
    pub generation: Generation,
    /// Dirty ranges of generations ≤ g on this core, coalesced, in bytes of the file.
    pub extents: Vec<ByteRange>,
    /// One past the last byte ever written on this core under generations ≤ g and not cut; 0: none.
    pub high_water: u64,
}

/// The condition of an S3 mutation.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum PutCondition {
    /// None: the server lacks conditions, or the key's state is unknown and was just looked up.
    None,
    /// The key must not exist.
    IfAbsent,
    /// The key must hold this etag.
    IfMatch(String),
}

/// Upload one whole file of at most one run.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct PutObject {
    /// The inode and its sealed generation.
    pub inode: InodeId,
    /// The sealed generation.
    pub generation: Generation,
    /// Read-mode grant whose view names the base (for clean ranges).
    pub grant: SignedGrant,
    /// Key to write.
    pub key: String,
    /// Bytes of the file; at most [`RUN_BYTES`].
    pub size: u64,
    /// Object metadata, the nonce included.
    pub metadata: Vec<(String, String)>,
    /// Condition of the PUT.
    pub condition: PutCondition,
}

/// Upload one run as a part.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct UploadPart {
    /// The inode.
    pub inode: InodeId,
    /// The sealed generation.
    pub generation: Generation,
    /// Read-mode grant whose view names the base.
    pub grant: SignedGrant,
    /// Key of the upload.
    pub key: String,
    /// S3's upload id.
    pub upload_id: String,
    /// 1-based part number = run + 1.
    pub part_number: u32,
    /// The run.
    pub run: RunIndex,
    /// Bytes of the part (the last one is short).
    pub length: u32,
}

/// Upload a part by copying a range of the base object.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct CopyPart {
    /// Key of the upload.
    pub key: String,
    /// S3's upload id.
    pub upload_id: String,
    /// 1-based part number.
    pub part_number: u32,
    /// Source key.
    pub source_key: String,
    /// Etag the source must have.
    pub source_etag: String,
    /// Range of the source.
    pub range: ByteRange,
}

/// What became of one S3 mutation.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum StoreOutcome {
    /// S3 confirmed it.
    Stored {
        /// The object's (or part's) etag.
        etag: String,
    },
    /// 412, 404 or 409: the condition did not hold. The caller looks.
    ConditionFailed,
    /// The reply was lost: it may or may not have happened. The caller looks.
    Ambiguous,
    /// It certainly did not happen; try later.
    Failed(String),
    /// The base object is not what the view says.
    BaseGone,
    /// This core does not hold the sealed generation (moved, restarted empty): seal again.
    NotSealed,
    /// A device error or a checksum mismatch without repair.
    Damaged(String),
}

/// A committed flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct FlushDone {
    /// The inode.
    pub inode: InodeId,
    /// The flushed generation.
    pub generation: Generation,
    /// The content id that names the object now.
    pub content: ContentId,
    /// The content id it had before; clean chunks of any other are dropped.
    pub old_content: ContentId,
    /// min(length, limit) of the new backing: clean data past it is dropped.
    pub valid_bytes: u64,
    /// Bytes of the old content that counted when the object was made (its limit then).
    pub old_valid_bytes: u64,
}

/// A write that was applied and may be asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct WindowEntry {
    /// Whose.
    pub session: SessionId,
    /// Everything of the session below was answered.
    pub below: Sequence,
    /// Which.
    pub sequence: Sequence,
    /// The tag it was taken under.
    pub generation: Generation,
    /// The inode it wrote to.
    pub inode: InodeId,
    /// And the chunk: a copy of a group brings an entry with its bytes, never without (R46).
    pub chunk: ChunkIndex,
}

/// What a core holds of a placement group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct PgHolding {
    /// Bytes of dirty data.
    pub dirty_bytes: u64,
    /// Pinned inodes.
    pub pins: u64,
    /// Inodes with dirty data, at most [`BATCH_MAX`] of them.
    pub dirty_inodes: Vec<InodeId>,
    /// Whether it is frozen.
    pub frozen: bool,
}

/// Counters of a core.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct CoreStats {
    /// Bytes of the device that may hold chunks.
    pub capacity_bytes: u64,
    /// Dirty bytes (not yet in S3), pinned ones included.
    pub dirty_bytes: u64,
    /// Clean bytes (cache).
    pub clean_bytes: u64,
    /// Inodes with pins.
    pub pins: u64,
    /// Requests answered, reads and writes.
    pub reads: u64,
    /// Write requests answered.
    pub writes: u64,
    /// Bytes of them.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Batches of the journal that became durable since the store was opened: what one sync was shared by.
    pub journal_batches: u64,
    /// Mutations in them, those of the metadata plane and of caching too.
    pub journal_records: u64,
    /// Reads that found the blocks on the device.
    pub hits: u64,
    /// Reads that were answered from copies in memory alone.
    pub dram_hits: u64,
    /// Bytes of those copies.
    pub dram_bytes: u64,
    /// Bytes that the spill device may hold; 0: there is none, or it was switched off.
    pub spill_capacity_bytes: u64,
    /// Bytes that can be found there.
    pub spill_bytes: u64,
    /// Fills whose bytes came from there instead of S3.
    pub spill_hits: u64,
    /// Bytes of those fills.
    pub spill_read_bytes: u64,
    /// Bytes written there.
    pub spill_written_bytes: u64,
    /// Bytes on their way there, in memory.
    pub spill_waiting_bytes: u64,
    /// Evicted bytes that it could not take: S3 alone has them.
    pub spill_dropped_bytes: u64,
    /// Its failed reads and writes, and wrong checksums.
    pub spill_errors: u64,
    /// Its reads that took too long: S3 was asked instead.
    pub spill_late: u64,
    /// It failed again and again and was switched off.
    pub spill_off: u64,
    /// Reads that went to S3.
    pub misses: u64,
    /// Refused: bad frames, wrong keys, forged or stale grants (I12).
    pub refused_frames: u64,
    /// Handshakes that failed.
    pub refused_handshakes: u64,
    /// Forged or stale grants.
    pub refused_grants: u64,
    /// Checksum mismatches found (I10).
    pub checksum_errors: u64,
    /// Mismatches repaired from S3.
    pub checksum_repairs: u64,
    /// Clean bytes evicted.
    pub evicted_bytes: u64,
    /// Fills whose bytes came from the former holder of their group instead of S3.
    pub peer_reads: u64,
    /// Live connections.
    pub connections: u64,
    /// Members of groups that this core leads and whose copy isn't complete: on their way, or behind since a
    /// break.
    pub members_syncing: u64,
    /// Bytes of copies sent to members.
    pub copied_bytes: u64,
    /// Mutations sent to members, and taken from primaries.
    pub replicated: u64,
    /// See `replicated`.
    pub followed: u64,
    /// Answers that had to wait for another member after they were durable here.
    pub replication_waits: u64,
    /// Bytes compared with their checksums in the background.
    pub scrubbed_bytes: u64,
    /// Passes over the whole device.
    pub scrub_passes: u64,
    /// Blocks that are damaged and not in S3, as of the last pass and this one so far.
    pub damaged_blocks: u64,
    /// What is dirty takes so many thousandths of what there is for it: blocks of the device, the index on it,
    /// RAM, whichever is scarcest. 1000: a write was refused for want of space a moment ago.
    pub pressure_permille: u16,
}

/// A reply to [`Control`].
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
#[expect(clippy::large_enum_variant, reason = "short-lived; one at a time")]
pub enum ControlReply {
    /// Done.
    Done,
    /// Not done, and why.
    Refused(String),
    /// Answers `Seal`.
    Sealed(Vec<SealedItem>),
    /// Answers `PutObjects`, in order.
    Stored(Vec<StoreOutcome>),
    /// Answers `UploadPart` and `CopyPart`.
    Part(StoreOutcome),
    /// Answers `Windows`.
    Windows(Vec<WindowEntry>),
    /// Answers `PgStatus`.
    Pg(PgHolding),
    /// Answers `Stats`.
    Stats(CoreStats),
}
