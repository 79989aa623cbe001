//! Mutations of a client. Each is one log entry, atomic, exactly once.

use crate::attr::{Attr, SetAttr, Time};
use crate::lock::Lock;
use crate::xattr::XattrMode;
use ebb_dataplane_protocol::{Generation, HandleId, InodeId, Lineage, SignedGrant};
use rkyv::{Archive, Deserialize, Serialize};

/// Rename must not replace an existing target (RENAME_NOREPLACE).
pub const RENAME_NOREPLACE: u32 = 1;
/// Exchange the two names (RENAME_EXCHANGE).
pub const RENAME_EXCHANGE: u32 = 2;

/// Name bytes: anything but `/` and NUL, 1..=255.
pub type Name = Vec<u8>;

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct OpenMode {
    /// A write grant is wanted with the open: the file becomes dirty in the same log entry (I2).
    pub write: bool,
    /// Truncate to zero (implies a generation step).
    pub truncate: bool,
}

/// A mutation.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Op {
    /// Creates a regular file and opens it for writing. If it exists: `Exists` when `exclusive`,
    /// else it is opened with `mode`. Reply [`OpReply::Opened`].
    Create {
        /// Directory.
        parent: InodeId,
        /// Name.
        name: Name,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// O_EXCL.
        exclusive: bool,
        /// How it is opened.
        open: OpenMode,
        /// If it is made: the names of the directory are wanted as a [`Delegation`]. The leader takes
        /// the wish back where somebody else adds names ([`crate::own`]).
        delegate: bool,
    },
    /// Opens an existing file. Reply [`OpReply::Opened`].
    Open {
        /// The file.
        inode: InodeId,
        /// How.
        open: OpenMode,
    },
    /// A fresh grant for an open handle: after `NeedGrant`, `StaleView`, `StaleGeneration`, a new
    /// map, or a first write of a read-write handle opened without `write`. `Stale` if the lineage
    /// changed. `write_end`: highest byte the writer means to write; raises `alloc_limit` to cover it.
    /// Reply [`OpReply::Opened`].
    Regrant {
        /// The handle.
        handle: HandleId,
        /// Write grant wanted.
        write: bool,
        /// Highest byte to be written, 0 for none.
        write_end: u64,
    },
    /// Ends a handle, merging a last commit into it. Reply [`OpReply::Done`].
    Release {
        /// The handle.
        handle: HandleId,
        /// A commit to apply first.
        commit: Option<CommitWrite>,
    },
    /// The writer's ends and times (close, fsync). Reply [`OpReply::Attr`].
    Commit(CommitWrite),
    /// chmod, chown, utimens, truncate. Reply [`OpReply::Attr`], with a grant when the size changed
    /// and `handle` is open for writing.
    SetAttr {
        /// The inode.
        inode: InodeId,
        /// The changes.
        set: SetAttr,
    },
    /// Creates a directory. Reply [`OpReply::Made`].
    Mkdir {
        /// Directory.
        parent: InodeId,
        /// Name.
        name: Name,
        /// Permission bits.
        mode: u32,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// Creates a symbolic link. Reply [`OpReply::Made`].
    Symlink {
        /// Directory.
        parent: InodeId,
        /// Name.
        name: Name,
        /// Target, at most 4095 bytes.
        target: Vec<u8>,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
    },
    /// Removes a file or symbolic link; an open one lives on. Reply [`OpReply::Done`].
    Unlink {
        /// Directory.
        parent: InodeId,
        /// Name.
        name: Name,
    },
    /// Removes an empty directory. Reply [`OpReply::Done`].
    Rmdir {
        /// Directory.
        parent: InodeId,
        /// Name.
        name: Name,
    },
    /// Renames; over an existing target the replaced inode, its key and its dirtiness go in the same
    /// entry (I6). Reply [`OpReply::Done`].
    Rename {
        /// Old directory.
        parent: InodeId,
        /// Old name.
        name: Name,
        /// New directory.
        new_parent: InodeId,
        /// New name.
        new_name: Name,
        /// [`RENAME_NOREPLACE`], [`RENAME_EXCHANGE`].
        flags: u32,
    },
    /// Ends handles with nothing left to commit, at most [`RELEASES_MAX`]; unknown ones are ended
    /// already. One log entry for many closes: nobody waits for a release. Reply [`OpReply::Done`].
    ReleaseMany {
        /// The handles.
        handles: Vec<HandleId>,
    },
    /// Makes files without a name, as O_TMPFILE does, each opened for writing: they are dirty before
    /// anybody writes them (I2), and go with their last handle unless [`Op::Publish`] gives them a name.
    /// At most [`RESERVED_MAX`]. Reply [`OpReply::Reserved`].
    Reserve {
        /// How many.
        files: u32,
    },
    /// Names a reserved file in a directory whose names are delegated to this session, and commits what
    /// was written. Reply [`OpReply::Published`].
    Publish(Publish),
    /// Gives delegations back, at most [`RETURNS_MAX`]; unknown ones are back already. Reply
    /// [`OpReply::Done`].
    ReturnNames {
        /// Directories, with the stamp of each delegation.
        dirs: Vec<(InodeId, u64)>,
    },
    /// Locks or unlocks a range of a file that the session has open. If somebody else's lock is in the way:
    /// `Again` when it is to wait, else [`FsError::Locked`](crate::FsError::Locked). Reply [`OpReply::Done`].
    Lock {
        /// File.
        inode: InodeId,
        /// The range, and how.
        lock: Lock,
        /// The leader answers later, if it can't be had now.
        wait: bool,
    },
    /// Gives a file or a symbolic link another name, at most
    /// [`LINKS_MAX`](crate::attr::LINKS_MAX) in all. Reply [`OpReply::Attr`].
    Link {
        /// The file.
        inode: InodeId,
        /// Directory of the new name.
        parent: InodeId,
        /// The new name.
        name: Name,
    },
    /// Sets or removes an extended attribute ([`crate::xattr`]): `Exists` or `NoAttribute` where that is not as `how`
    /// wants it, `NoSpace` if all of the inode's would not fit into an object's metadata. Reply [`OpReply::Attr`].
    SetXattr {
        /// The inode.
        inode: InodeId,
        /// Its name.
        name: Name,
        /// Its value; `None`: it is removed.
        value: Option<Vec<u8>>,
        /// Whether it must, or must not, be there; a removed one must be.
        how: XattrMode,
    },
}

/// Files of one [`Op::Reserve`] at most.
pub const RESERVED_MAX: u32 = 64;
/// Directories of one [`Op::ReturnNames`] at most.
pub const RETURNS_MAX: usize = 256;

/// The names of a directory are its holder's alone (docs/PROTOCOL.md, R49): until it gives them back, or
/// its session ends, nobody else adds, removes or looks up a name there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Delegation {
    /// Tells this delegation from earlier and later ones of any directory; later ones have higher stamps.
    pub stamp: u64,
    /// Longest name that makes a valid S3 key there, in bytes.
    pub name_bytes_max: u32,
}

/// A name for a file that has none yet.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Publish {
    /// A handle of the reserved file.
    pub handle: HandleId,
    /// Directory.
    pub parent: InodeId,
    /// Name.
    pub name: Name,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// What was written so far.
    pub commit: CommitWrite,
}

/// Handles of one [`Op::ReleaseMany`] at most.
pub const RELEASES_MAX: usize = 256;

/// What a writer reports of its own writes at one generation (PROTOCOL §4): merged by max, clipped
/// by later cuts, so that a close never regrows what another truncated.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct CommitWrite {
    /// The inode.
    pub inode: InodeId,
    /// Per generation written: one past the last byte of this writer's acked writes.
    pub ends: Vec<(Generation, u64)>,
    /// Time of the last write, if it wrote.
    pub mtime: Option<Time>,
    /// Attribute changes that rode along (never a size).
    pub set: SetAttr,
}

/// An opened file.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Opened {
    /// Its attributes after the open.
    pub attr: Attr,
    /// The handle.
    pub handle: HandleId,
    /// The grant, of the mode that was asked for.
    pub grant: SignedGrant,
    /// Whether Create made it.
    pub created: bool,
    /// Lineage the handle is bound to.
    pub lineage: Lineage,
    /// After a create: the directory's attributes, as of the create or later. Whoever asked will ask
    /// for them next.
    pub parent: Option<Attr>,
    /// After a create: for how long, from when it was asked, nobody else adds a name to the directory
    /// ([`crate::own`]). 0: they may.
    pub names_ms: u32,
    /// After a create: the directory's names are this session's alone.
    pub delegation: Option<Delegation>,
}

/// A file that got its name.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Published {
    /// Its attributes.
    pub attr: Attr,
    /// As in [`Opened::parent`].
    pub parent: Option<Attr>,
    /// As in [`Opened::names_ms`]; with 0, the delegation is wanted back.
    pub names_ms: u32,
}

/// What Mkdir or Symlink made.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Made {
    /// Its attributes.
    pub attr: Attr,
    /// As in [`Opened::names_ms`].
    pub names_ms: u32,
    /// The same of the directory that was made, which is empty.
    pub own_names_ms: u32,
}

/// Answers to mutations. The grant inside `Opened` is signed by the server after the state machine
/// decided; the state machine itself returns [`crate::command::OpOutcome`].
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum OpReply {
    /// Done.
    Done,
    /// The inode after the change.
    Attr(Attr),
    /// An opened file.
    Opened(Box<Opened>),
    /// A directory or a symbolic link.
    Made(Box<Made>),
    /// Files without a name, opened.
    Reserved(Vec<Opened>),
    /// A file that has its name now.
    Published(Box<Published>),
}
