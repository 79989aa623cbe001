//! Errors: one narrow enum per kind of operation, each with what a caller needs to decide.

use crate::types::{BatchId, CheckpointToken, FillId, WriteId};
use ebb_dataplane_protocol::{ClusterId, Generation, InodeId, PgEpoch, PgId};

/// Why a device cannot be opened. Nothing was written to it unless it says so.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No superblock: the device was never formatted, or a format did not finish.
    #[error("not a shard: no superblock found (something else, or a format that did not finish)")]
    NotFormatted,
    /// The store belongs to another cluster.
    #[error("the store belongs to cluster {found}, not to {expected}")]
    OtherCluster {
        /// In the superblock.
        found: ClusterId,
        /// What the caller serves.
        expected: ClusterId,
    },
    /// Another version of the format.
    #[error("the store has format version {found}, this program reads version {expected}")]
    OtherVersion {
        /// In the superblock.
        found: u32,
        /// [`crate::geometry::FORMAT_VERSION`].
        expected: u32,
    },
    /// A feature that this program does not know.
    #[error("the store uses features that this program does not know (bits {bits:#x})")]
    UnknownFeatures {
        /// In the superblock.
        bits: u64,
    },
    /// The device is shorter than when it was formatted.
    #[error("the device has {found} bytes, the store was made on {expected}: it was cut short")]
    Shorter {
        /// Bytes now.
        found: u64,
        /// Bytes at format time.
        expected: u64,
    },
    /// Fewer than two identical valid superblocks.
    #[error("the superblocks are damaged: {valid} of 4 readable, no two agree")]
    Superblocks {
        /// Readable ones.
        valid: usize,
    },
    /// A page of the live checkpoint is damaged.
    #[error("checkpoint {number} is damaged at byte {offset}: {reason}")]
    Checkpoint {
        /// Number of the checkpoint.
        number: u64,
        /// Device offset of the page.
        offset: u64,
        /// What does not hold.
        reason: String,
    },
    /// A journal batch is damaged although later ones exist: not a torn tail, acked data is lost.
    #[error(
        "the journal is damaged at batch {missing} (byte {offset}): batch {later} exists after it"
    )]
    Journal {
        /// Sequence of the batch that cannot be read.
        missing: u64,
        /// Where it should be.
        offset: u64,
        /// A later batch that can.
        later: u64,
    },
    /// A valid checksum over contents that make no sense: a bug or a forgery.
    #[error("inconsistent store: {0}")]
    Inconsistent(String),
    /// The device failed.
    #[error("device error while {doing}: {source}")]
    Io {
        /// What was done.
        doing: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

impl OpenError {
    /// What a person can do about it. None of it touches what is on the device.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::NotFormatted => "correct the path, or move it away to start empty",
            Self::OtherCluster { .. } => {
                "was a directory copied, or a cluster made anew? Start it with its own cluster's \
                 configuration and key, or move it away to start empty"
            }
            Self::OtherVersion { .. } | Self::UnknownFeatures { .. } => {
                "start the version of ebb that wrote it, empty the node (`ebb scale`), then start this \
                 version without the old file"
            }
            Self::Shorter { .. } => {
                "bring it back to its length (a copy that stopped early? a partition made smaller?), or \
                 restore it; moving it away to start empty gives up what was dirty on it"
            }
            Self::Superblocks { .. }
            | Self::Checkpoint { .. }
            | Self::Journal { .. }
            | Self::Inconsistent(_) => {
                "restore it, or move it away to start empty: what was dirty on it is given up then"
            }
            Self::Io { .. } => {
                "look at the kernel's log (`dmesg`) and the device's health; try again on a device that reads"
            }
        }
    }
}

/// Why a device cannot be formatted like this.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Too small.
    #[error("a store needs at least {least} bytes, the device has {found}")]
    TooSmall {
        /// Bytes needed.
        least: u64,
        /// Bytes given.
        found: u64,
    },
    /// A part is not aligned, too small or too large.
    #[error("{what} is {found}, must be {rule}")]
    Bad {
        /// The part.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What it must be.
        rule: &'static str,
    },
}

/// What a refused mutation waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitFor {
    /// The same (session, sequence), or an overlapping write, is in flight: retry after any ticket
    /// came back from `batch_durable` or any plan was aborted.
    Overlap,
    /// A control record of the inode is not durable yet: retry after the next `batch_durable`.
    Control,
    /// The journal is full until a checkpoint completes: drive `checkpoint_step`.
    Journal,
    /// The backlog of records not yet taken is at its limit: take a batch.
    Backlog,
}

/// Why a write or fill was refused. The plan, if there was one, is gone and its space is free.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// Empty, or past the chunk's end, or more checksums or bytes than planned.
    #[error("malformed write: {0}")]
    Malformed(&'static str),
    /// The generation is sealed or cut.
    #[error("generation is below the floor {floor}")]
    StaleGeneration {
        /// Least generation that may write.
        floor: Generation,
    },
    /// The placement group is frozen.
    #[error("placement group {pg} is frozen in epoch {epoch}")]
    Frozen {
        /// The group.
        pg: PgId,
        /// Epoch of the freeze.
        epoch: PgEpoch,
    },
    /// This (session, sequence) is applied and durable: answer it as done, under that tag (R19).
    #[error("already applied under generation {generation}")]
    Duplicate {
        /// The tag it was taken under.
        generation: Generation,
    },
    /// The session said that this sequence was answered: it isn't taken any more.
    #[error("the session called this write answered")]
    Answered,
    /// Not now; what to wait for.
    #[error("must wait: {0:?}")]
    Wait(WaitFor),
    /// No space. `evictable` > 0: call `evict`, retry when its ticket is durable; else wait for flushes.
    #[error("no space for {needed} bytes ({evictable} can be evicted)")]
    NoSpace {
        /// Bytes needed.
        needed: u64,
        /// Clean bytes that could go.
        evictable: u64,
    },
    /// The session has too many unanswered sequences: it must raise `answered_below`.
    #[error("the session's window of unanswered writes is full")]
    WindowFull,
    /// The inode was dropped while the write was under way.
    #[error("the inode was dropped")]
    Dropped,
    /// Inline bytes do not match their checksum.
    #[error("block {block} of the payload does not match its checksum")]
    Corrupt {
        /// Block of the chunk.
        block: u32,
    },
    /// No such plan.
    #[error("unknown write plan {0:?}")]
    UnknownWrite(WriteId),
    /// No such plan.
    #[error("unknown fill plan {0:?}")]
    UnknownFill(FillId),
    /// A device error happened earlier: nothing is written any more.
    #[error("the store stopped after a device error")]
    Failed,
}

/// Why a control mutation was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Not now; what to wait for.
    #[error("must wait: {0:?}")]
    Wait(WaitFor),
    /// FlushDone of a generation that was not sealed here but has dirty data here.
    #[error("inode {inode}: generation {generation} is not sealed here")]
    NotSealed {
        /// The inode.
        inode: InodeId,
        /// The generation.
        generation: Generation,
    },
    /// Too many generations of the inode are pinned at once: finish or abort a flush.
    #[error("inode {inode} has too many sealed generations")]
    TooManySeals {
        /// The inode.
        inode: InodeId,
    },
    /// Release of a group that still has dirty data, pins, or writes in flight.
    #[error("placement group {pg} still holds {dirty_bytes} dirty bytes and {pins} pins")]
    StillDirty {
        /// The group.
        pg: PgId,
        /// Dirty bytes.
        dirty_bytes: u64,
        /// Pinned inodes (plus writes in flight).
        pins: u64,
    },
    /// The windows of a group that may still change.
    #[error("placement group {pg} is not frozen in epoch {epoch}")]
    NotFrozen {
        /// The group.
        pg: PgId,
        /// The epoch.
        epoch: PgEpoch,
    },
    /// The index is too full to take windows over.
    #[error("no room in the index")]
    NoRoom,
    /// A group number past the store's count, or more cuts than a view has.
    #[error("malformed request: {0}")]
    Malformed(&'static str),
    /// A device error happened earlier.
    #[error("the store stopped after a device error")]
    Failed,
}

/// Misuse of the completion calls: a bug of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompletionError {
    /// Not the batch in flight.
    #[error("{0:?} is not the batch in flight")]
    Batch(BatchId),
    /// Not the checkpoint step in flight.
    #[error("{0:?} is not the checkpoint step in flight")]
    Checkpoint(CheckpointToken),
}

/// Why formatting failed.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// The sizes do not fit.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The device failed.
    #[error("device error while formatting")]
    Io(#[from] std::io::Error),
}
