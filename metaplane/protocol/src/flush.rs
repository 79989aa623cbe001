//! The flush and key-state vocabulary between the leader's workers and the state machine
//! (PROTOCOL §3, §8–9).

use crate::attr::{Attr, FileKind};
use crate::xattr::Xattrs;
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
    /// Extended attributes, for the object's metadata.
    pub xattrs: Xattrs,
    /// Of a file with several names, for the same place.
    pub link: Option<LinkTag>,
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
    /// What few objects have.
    pub more: More,
    /// True: from a HEAD. False: only what a LIST shows; a HEAD is due before anyone sees them.
    pub complete: bool,
}

/// What few objects have besides: one field of [`IngestAttrs`], whose encoding stays that of the time when it was the
/// target alone, as an `Option`. The log has entries with it.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum More {
    /// Nothing.
    None,
    /// Target of a symlink.
    Target(Vec<u8>),
    /// Extended attributes.
    Xattrs(Xattrs),
    /// More than one of them, or that it is one of several names.
    Several(Box<Several>),
}

/// See [`More::Several`].
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Several {
    /// Target of a symlink.
    pub target: Option<Vec<u8>>,
    /// Extended attributes.
    pub xattrs: Xattrs,
    /// Of which file it was one of several names.
    pub link: Option<LinkTag>,
}

/// What the objects of all names of a file say: those that say the same hold the same (docs/PROTOCOL.md, R58). Without
/// the key, which each has for itself in its metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Archive, Serialize, Deserialize)]
pub struct LinkTag {
    /// The cluster that stored them; 0 in a plan: this one.
    pub cluster: u128,
    /// The file's inode there.
    pub file: u64,
    /// Its content ([`ContentId`](ebb_dataplane_protocol::ContentId)).
    pub content: u64,
    /// The version of its attributes.
    pub meta_version: u64,
}

impl LinkTag {
    /// Its bytes, as a key of a table.
    pub fn bytes(&self) -> Vec<u8> {
        let numbers = [self.file, self.content, self.meta_version].map(u64::to_be_bytes);
        [&self.cluster.to_be_bytes()[..], &numbers.concat()].concat()
    }
}

impl More {
    /// A symlink has a target; `xattrs` may be empty; the objects of a file with several names have a `link`.
    pub fn of(target: Option<Vec<u8>>, xattrs: Xattrs, link: Option<LinkTag>) -> Self {
        match (target, xattrs.is_empty(), link) {
            (None, true, None) => Self::None,
            (None, false, None) => Self::Xattrs(xattrs),
            (Some(target), true, None) => Self::Target(target),
            (target, _, link) => Self::Several(Box::new(Several { target, xattrs, link })),
        }
    }

    /// Target of a symlink.
    pub fn target(&self) -> Option<&[u8]> {
        match self {
            Self::Target(target) => Some(target),
            Self::Several(several) => several.target.as_deref(),
            Self::None | Self::Xattrs(_) => None,
        }
    }

    /// Extended attributes; empty: none.
    pub fn xattrs(&self) -> &[(Vec<u8>, Vec<u8>)] {
        match self {
            Self::Xattrs(xattrs) => xattrs,
            Self::Several(several) => &several.xattrs,
            Self::None | Self::Target(_) => &[],
        }
    }

    /// Of which file it was one of several names.
    pub fn link(&self) -> Option<LinkTag> {
        match self {
            Self::Several(several) => several.link,
            Self::None | Self::Target(_) | Self::Xattrs(_) => None,
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attr::Time;
    use ebb_dataplane_protocol::codec;

    /// As they were before there were extended attributes.
    #[derive(Archive, Serialize)]
    struct Before {
        kind: FileKind,
        mode: u32,
        uid: u32,
        gid: u32,
        mtime: Time,
        target: Option<Vec<u8>>,
        complete: bool,
    }

    /// The log and remembered replies of an earlier version are read as they were written.
    #[test]
    fn what_an_earlier_version_wrote_is_read_as_it_was() {
        for target in [None, Some(b"../target".to_vec())] {
            let kind = FileKind::Symlink;
            let before = |uid| {
                let target = target.clone();
                Before { kind, mode: 1, uid, gid: 3, mtime: Time(4), target, complete: true }
            };
            let encoded = codec::encode(&vec![(7u64, before(2)), (8, before(5))]);
            let read: Vec<(u64, IngestAttrs)> = codec::decode(&encoded).expect("read");
            let now = |uid| {
                let more = More::of(target.clone(), Xattrs::new(), None);
                IngestAttrs { kind, mode: 1, uid, gid: 3, mtime: Time(4), more, complete: true }
            };
            assert_eq!(read, [(7, now(2)), (8, now(5))]);
        }
    }

    #[derive(Archive, Serialize)]
    struct AttrBefore {
        inode: InodeId,
        kind: FileKind,
        mode: u32,
        uid: u32,
        gid: u32,
        nlink: u32,
        size: u64,
        atime: Time,
        mtime: Time,
        ctime: Time,
        generation: Generation,
        content: ContentId,
        lineage: Lineage,
        dirty: bool,
    }

    #[test]
    fn attributes_of_an_earlier_version_name_no_extended_ones() {
        let before = |size| AttrBefore {
            inode: InodeId(1),
            kind: FileKind::File,
            mode: 2,
            uid: 3,
            gid: 4,
            nlink: 5,
            size,
            atime: Time(7),
            mtime: Time(8),
            ctime: Time(9),
            generation: Generation(10),
            content: ContentId(11),
            lineage: Lineage(12),
            dirty: true,
        };
        let read: Vec<Attr> =
            codec::decode(&codec::encode(&vec![before(6), before(66)])).expect("read");
        assert_eq!(read.len(), 2);
        for (attr, size) in read.iter().zip([6, 66]) {
            let (inode, lineage) = (InodeId(1), Lineage(12));
            assert_eq!((attr.inode, attr.size, attr.lineage), (inode, size, lineage));
            assert_eq!((attr.dirty, attr.xattrs), (true, false));
        }
    }
}
