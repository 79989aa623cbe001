//! Linearizable reads.

use crate::attr::Attr;
use crate::lease::Lease;
use crate::lock::{Lock, Locked};
use crate::op::Name;
use crate::xattr::Xattrs;
use ebb_dataplane_protocol::{ClusterMap, InodeId, MapVersion, SignedGrant};
use rkyv::{Archive, Deserialize, Serialize};

/// Entries of one page of a directory at most.
pub const PAGE_ENTRIES_MAX: u32 = 1000;

/// A read.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Query {
    /// An entry of a directory. In a directory that is not completely listed the leader asks S3
    /// first. Reply [`QueryReply::Attr`].
    Lookup {
        /// Directory.
        parent: InodeId,
        /// Name.
        name: Name,
    },
    /// A path from the root, symbolic links not followed. Reply [`QueryReply::Attr`].
    Resolve {
        /// Components.
        path: Vec<Name>,
    },
    /// Attributes. Reply [`QueryReply::Attr`].
    GetAttr(InodeId),
    /// A page of a directory in name order, with attributes. Reply [`QueryReply::Page`].
    ReadDir {
        /// Directory.
        inode: InodeId,
        /// Entries after this name; empty: from the start.
        after: Name,
        /// At most this many (and [`PAGE_ENTRIES_MAX`]).
        limit: u32,
    },
    /// Target of a symbolic link. Reply [`QueryReply::Link`].
    ReadLink(InodeId),
    /// The parent of a directory (for `..`). Reply [`QueryReply::Attr`].
    Parent(InodeId),
    /// The cluster map if newer than `have`. Reply [`QueryReply::Map`]. `wake`: a placement group
    /// without a holder is needed now (scale zero).
    Map {
        /// Version the caller has.
        have: MapVersion,
        /// Data is needed: bring nodes back.
        wake: bool,
    },
    /// Space and counts. Reply [`QueryReply::StatFs`].
    StatFs,
    /// Attributes, after the file was compared with S3 now: a core found other bytes at its key than
    /// its view names (PROTOCOL §9, R35). Reply [`QueryReply::Attr`].
    Compare(InodeId),
    /// Attributes as an open finds them: compared with S3 if the last time is a while ago. Reply [`QueryReply::Attr`].
    Freshen(InodeId),
    /// The lock that is in the way of one, if any is (F_GETLK). Reply [`QueryReply::Locked`].
    Locked(InodeId, Lock),
    /// Extended attributes. Reply [`QueryReply::Xattrs`].
    Xattrs(InodeId),
    /// An open for reading that is no entry in the log: the leader notes it (docs/PROTOCOL.md, R59). For sessions
    /// that have leases. Reply [`QueryReply::Lent`].
    Lend(InodeId),
}

impl Query {
    /// Whether the state alone may answer it, so that a voter that follows can (docs/PROTOCOL.md, R60). The others
    /// are the leader's: they need what it knows by heart, or have it ask S3.
    pub const fn may_be_followed(&self) -> bool {
        match self {
            Self::Lookup { .. }
            | Self::Resolve { .. }
            | Self::GetAttr(_)
            | Self::ReadDir { .. }
            | Self::ReadLink(_)
            | Self::Xattrs(_)
            | Self::Parent(_) => true,
            Self::Map { .. }
            | Self::StatFs
            | Self::Compare(_)
            | Self::Freshen(_)
            | Self::Locked(..)
            | Self::Lend(_) => false,
        }
    }
}

/// An entry of a directory page.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct DirEntry {
    /// Name.
    pub name: Name,
    /// Attributes.
    pub attr: Attr,
}

/// Answers to reads.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub enum QueryReply {
    /// Attributes.
    Attr(Attr),
    /// The same to a client that may remember them; after [`Query::Lookup`] also the entry, or that there is
    /// none.
    Leased(Option<Attr>, Lease),
    /// A page and whether it was the last.
    Page {
        /// Entries in name order.
        entries: Vec<DirEntry>,
        /// No more after these.
        end: bool,
    },
    /// The same to a client that may remember the entries and their attributes.
    LeasedPage {
        /// Entries in name order.
        entries: Vec<DirEntry>,
        /// No more after these.
        end: bool,
        /// Of the directory and of all of them.
        lease: Lease,
    },
    /// Target of a link.
    Link(Vec<u8>),
    /// The map; `None`: the caller's is current.
    Map(Option<ClusterMap>),
    /// Space and counts.
    StatFs(StatFs),
    /// A lock that is in the way.
    Locked(Option<Locked>),
    /// Extended attributes, of [`XATTRS_TEXT_BYTES_MAX`](crate::xattr::XATTRS_TEXT_BYTES_MAX) at most.
    Xattrs(Xattrs),
    /// An open file; `None`: it takes a handle.
    Lent(Option<Box<LentFile>>),
}

/// A file that is open for reading without a handle.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub struct LentFile {
    /// Attributes.
    pub attr: Attr,
    /// To read it.
    pub grant: SignedGrant,
    /// Of the attributes, and by whose number the file is lent.
    pub lease: Lease,
}

/// Space and counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct StatFs {
    /// Inodes known.
    pub inodes: u64,
    /// Bytes of all known files.
    pub used_bytes: u64,
    /// Bytes of the nodes' devices.
    pub capacity_bytes: u64,
    /// Bytes not yet in S3.
    pub dirty_bytes: u64,
}
