//! Attributes of an inode.

use ebb_dataplane_protocol::{ContentId, Generation, InodeId, Lineage};
use rkyv::{Archive, Deserialize, Serialize};

/// Nanoseconds since the Unix epoch; may be negative.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
    serde::Deserialize,
)]
pub struct Time(pub i64);

/// Names of one file at most (its hard links). Each is an object of its own in the bucket.
pub const LINKS_MAX: u32 = 1_000;

/// Kind of an inode.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// Another name of a file: in dumps, and within the state machine. `stat` shows the file.
    HardLink,
}

/// What `stat` shows, and what a client needs to cache.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Attr {
    /// The inode.
    pub inode: InodeId,
    /// Its kind.
    pub kind: FileKind,
    /// Permission bits (07777), without the type.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Links; 0: unlinked but open.
    pub nlink: u32,
    /// Bytes (length of the target of a symlink).
    pub size: u64,
    /// Last access, as last set explicitly (relatime is not tracked).
    pub atime: Time,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of the inode.
    pub ctime: Time,
    /// Current generation.
    pub generation: Generation,
    /// Names the clean content.
    pub content: ContentId,
    /// Changes when the object was replaced from outside.
    pub lineage: Lineage,
    /// Whether S3 does not hold this yet (data, attributes or name).
    pub dirty: bool,
    /// Whether there are extended attributes ([`crate::xattr`]).
    pub xattrs: bool,
}

/// A change of attributes; `None` leaves a field as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// New size: a truncate or an extension (PROTOCOL §4).
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<TimeChange>,
    /// Modification time.
    pub mtime: Option<TimeChange>,
}

impl SetAttr {
    /// Permission bits after this change of a file with `mode`. As Linux has it, a new owner or
    /// group of anything but a directory ends its privileges, unless the change says otherwise.
    pub fn mode_over(&self, mode: u32, kind: FileKind) -> u32 {
        let owned_anew = self.uid.is_some() || self.gid.is_some();
        match self.mode {
            Some(mode) => mode & 0o7777,
            None if owned_anew && kind != FileKind::Directory => without_privileges(mode),
            None => mode,
        }
    }
}

/// Permission bits without what lets others run a file as its owner or group: set-user-ID, and
/// set-group-ID where the group may execute (elsewhere that bit means mandatory locking).
pub fn without_privileges(mode: u32) -> u32 {
    const SET_UID: u32 = 0o4000;
    const SET_GID: u32 = 0o2000;
    const GROUP_MAY_EXECUTE: u32 = 0o010;
    let gone = if mode & GROUP_MAY_EXECUTE == 0 { SET_UID } else { SET_UID | SET_GID };
    mode & !gone
}

/// A new time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum TimeChange {
    /// The leader's clock.
    Now,
    /// This time.
    At(Time),
}
