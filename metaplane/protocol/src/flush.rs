//! The flush and key-state vocabulary between the leader's workers and the state machine
//! (PROTOCOL §3, §8–9).

use crate::attr::{Attr, FileKind};
use ebb_dataplane_protocol::control::{PutCondition, StoreOutcome};
use ebb_dataplane_protocol::{ContentId, FileView, Generation, InodeId, Lineage};
use rkyv::{Archive, Deserialize, Serialize};

/// An inode whose flush began.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct FlushTicket {
    /// The inode.
    pub inode: InodeId,
    /// Its kind.
    pub kind: FileKind,
    /// The generation being sealed (files); seal it at every primary below `alloc_limit` when
    /// `needs_seal`.
    pub generation: Generation,
    /// Data may be dirty: a seal is needed. False: only attributes or the name changed.
    pub needs_seal: bool,
    /// Bounds the seal.
    pub alloc_limit: u64,
}

/// What the seals of an inode found.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct SealedInode {
    /// The inode.
    pub inode: InodeId,
    /// The sealed generation.
    pub generation: Generation,
    /// Some primary holds dirty extents of it.
    pub has_data: bool,
    /// Highest byte any primary saw written (for expired sessions, whose commit never came).
    pub high_water: u64,
    /// 128 random bits for the attempt, made by the leader.
    pub nonce: u128,
}

/// What the leader does for a sealed inode; logged with its nonce before any S3 call.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum FlushPlan {
    /// S3 holds it already: the state machine made it clean in the same command.
    Clean,
    /// The target key is busy, or is another inode's backing key: flush `blocker` first (to a
    /// temporary key if it is blocked itself), then begin again. The inode is dirty again.
    Blocked {
        /// Whose Move goes first; `None`: an S3 mutation of the key is in flight.
        blocker: Option<InodeId>,
    },
    /// The object is to be written or copied.
    Store(Box<StorePlan>),
    /// Clean bytes of it are lost (R36): its dirty ranges go to objects of their own below the key.
    /// Ends with `Rescued` or `FlushAbort`.
    Rescue(Box<StorePlan>),
    /// The inode changed state meanwhile (unlinked, aborted): nothing to do.
    Gone,
}

/// An object to be written.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct StorePlan {
    /// The inode.
    pub inode: InodeId,
    /// The generation.
    pub generation: Generation,
    /// Attributes that go into the object's metadata, and the size of the object.
    pub attr: Attr,
    /// Target key, relative to the prefix.
    pub key: String,
    /// Condition from the key's state.
    pub condition: PutCondition,
    /// The nonce of this attempt.
    pub nonce: u128,
    /// The file as it was: where the clean bytes are.
    pub view: FileView,
    /// Data is dirty, or the size differs from the backing's: the body is written anew (clean runs
    /// may be copied). False: a server-side copy of the backing with new metadata is enough.
    pub has_data: bool,
    /// Symlinks: the target (the object's body).
    pub target: Option<Vec<u8>>,
}

/// What became of an attempt.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct FlushOutcome {
    /// The inode.
    pub inode: InodeId,
    /// The generation.
    pub generation: Generation,
    /// The attempt.
    pub nonce: u128,
    /// The result, after looking where it was in doubt (I3).
    pub result: AttemptResult,
}

/// The settled result of an S3 mutation.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum AttemptResult {
    /// Our object is there (confirmed, or found by its nonce).
    Stored {
        /// Its etag.
        etag: String,
        /// Its length.
        length: u64,
    },
    /// It certainly did not happen: dirty again, retried later. Says why.
    Failed(String),
    /// Somebody else's object is at the key (PROTOCOL §9): it keeps the name.
    Foreign(ForeignObject),
    /// The key was to hold our etag and holds nothing: it was deleted outside. The key's state
    /// becomes Absent, the inode stays dirty and is flushed again.
    Missing,
    /// A request of ours that was given up is at the key: it arrived late (R33).
    LeftOver(LeftOver),
    /// In doubt even after looking: the key stays unsettled, look again later.
    Ambiguous,
    /// A delete happened (or the key was already absent).
    Deleted,
}

impl AttemptResult {
    /// The result of an outcome that needs no look-up.
    pub fn from_outcome(outcome: &StoreOutcome, length: u64) -> Option<Self> {
        match outcome {
            StoreOutcome::Stored { etag } => Some(Self::Stored { etag: etag.clone(), length }),
            StoreOutcome::Failed(why) | StoreOutcome::Damaged(why) => {
                Some(Self::Failed(why.clone()))
            }
            StoreOutcome::NotSealed => Some(Self::Failed("the node lost its pins".into())),
            StoreOutcome::BaseGone => Some(Self::Failed("the base object changed".into())),
            StoreOutcome::ConditionFailed | StoreOutcome::Ambiguous => None,
        }
    }
}

/// A late arrival of a request that was given up.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct LeftOver {
    /// The request.
    pub nonce: u128,
    /// Etag of its object.
    pub etag: String,
    /// Bytes of its object.
    pub length: u64,
}

/// What a flush found in place of the object that holds a file's clean bytes.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct BaseChange {
    /// The inode.
    pub inode: InodeId,
    /// Key and etag that its backing had.
    pub key: String,
    /// The etag.
    pub etag: String,
    /// What is there now.
    pub found: BaseFound,
}

/// What is at a key instead of a file's base.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum BaseFound {
    /// A late arrival of our own.
    LeftOver(LeftOver),
    /// Somebody else's object.
    Foreign(ForeignObject),
    /// Nothing.
    Gone,
}

/// The dirty ranges of a file whose base is lost are in S3.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Rescue {
    /// The inode.
    pub inode: InodeId,
    /// The generation that was sealed.
    pub generation: Generation,
    /// The ranges.
    pub ranges: Vec<RescuedRange>,
}

/// A dirty range at `<key of the file>/<offset>-<length>`.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct RescuedRange {
    /// Where it begins in the file.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// Etag of its object.
    pub etag: String,
}

/// An object that is not ours, with the attributes its metadata names.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct ForeignObject {
    /// Etag.
    pub etag: String,
    /// Bytes.
    pub size: u64,
    /// Attributes from its metadata, or defaults.
    pub attrs: IngestAttrs,
}

/// Attributes as an object's metadata gives them.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct IngestAttrs {
    /// Kind; a symlink's target is fetched by the leader.
    pub kind: FileKind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time (of the metadata, else Last-Modified).
    pub mtime: crate::attr::Time,
    /// Target of a symlink.
    pub target: Option<Vec<u8>>,
    /// True: from a HEAD. False: only what a LIST shows; a HEAD is due before anyone sees them.
    pub complete: bool,
}

/// An entry found by LIST or HEAD.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct IngestEntry {
    /// Name in the directory.
    pub name: Vec<u8>,
    /// The object (directories without a marker have none).
    pub object: Option<IngestObject>,
    /// Attributes.
    pub attrs: IngestAttrs,
}

/// An object behind an entry.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct IngestObject {
    /// Its key, relative to the prefix (a marker's ends in `/`).
    pub key: String,
    /// Etag.
    pub etag: String,
    /// Bytes.
    pub size: u64,
}

/// A primary still has to be told something about an inode; kept until it acked.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Notice {
    /// A flush committed.
    FlushDone {
        /// The inode.
        inode: InodeId,
        /// The generation.
        generation: Generation,
        /// New content.
        content: ContentId,
        /// Old content.
        old_content: ContentId,
        /// Valid bytes of the new backing.
        valid_bytes: u64,
        /// Valid bytes of the old content when the object was made.
        old_valid_bytes: u64,
        /// Bounds the primaries.
        alloc_limit: u64,
    },
    /// A flush was given up.
    FlushAborted {
        /// The inode.
        inode: InodeId,
        /// The generation.
        generation: Generation,
        /// Bounds the primaries.
        alloc_limit: u64,
    },
    /// The view changed (a cut): every primary journals it, then the cut goes.
    ApplyView {
        /// The inode.
        inode: InodeId,
        /// Cuts up to this generation are acked when done.
        generation: Generation,
        /// Bounds the primaries.
        alloc_limit: u64,
    },
    /// The inode is gone.
    Drop {
        /// The inode.
        inode: InodeId,
        /// Bounds the primaries.
        alloc_limit: u64,
    },
    /// An expired session held it for writing: seal this generation, take the size from the seal.
    Fence {
        /// The inode.
        inode: InodeId,
        /// The generation.
        generation: Generation,
        /// Bounds the primaries.
        alloc_limit: u64,
    },
}

/// Pending work on a key.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct KeyWork {
    /// The key, relative to the prefix.
    pub key: String,
    /// What to do.
    pub kind: KeyWorkKind,
    /// Condition from the key's state.
    pub condition: PutCondition,
}

/// What a key needs.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum KeyWorkKind {
    /// Delete the object.
    Delete,
    /// Requests that were given up can't arrive any more: look whether one did. Report `LeftOver`,
    /// `Failed` if nobody could look, else `Deleted`. Goes through `LookBegin`.
    Look,
    /// An attempt's outcome is unknown (leader died, reply lost): look (HEAD, nonce) and report.
    Resolve {
        /// Nonces of ours that may be there, newest last.
        nonces: Vec<u128>,
        /// The inode of the attempt, if it was a flush.
        inode: Option<InodeId>,
        /// Its generation.
        generation: Generation,
        /// The length the object would have.
        length: u64,
    },
}

/// An adopted outside change.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Adopt {
    /// The inode.
    pub inode: InodeId,
    /// Lineage the leader saw when it looked: an older look changes nothing.
    pub lineage: Lineage,
    /// Etag the leader compared with.
    pub old_etag: Option<String>,
    /// What is there now; `None`: the object is gone.
    pub object: Option<ForeignObject>,
}
