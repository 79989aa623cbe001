//! What a check of the namespace finds (`ebb fsck`), and what is done about it.
//!
//! A finding names a rule of the state machine that does not hold in some moment's state. A repair is a
//! command that looks again when it is applied: it changes nothing where the rule holds by then, never
//! drops a name or a byte that something else still needs, and repeated does nothing more.

use crate::op::Name;
use ebb_dataplane_protocol::{HandleId, InodeId, PgId, SessionId, ShardRef};
use rkyv::{Archive, Deserialize, Serialize};

/// Repairs of one call, and findings of one answer, at most.
pub const BATCH_MAX: usize = 1_000;

/// A rule of the namespace's state.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// A record can be read, and its table is a known one.
    Readable,
    /// A name is of a living inode that says it has this name, in a living directory.
    Name,
    /// An inode with a name is found under it.
    Orphan,
    /// A directory is below the root.
    Loop,
    /// An inode without a name is open, or goes.
    Unnamed,
    /// A directory has two links and one more for each directory in it; a file one for each of its names, which
    /// know each other.
    Links,
    /// A directory counts those of its subtree that are not completely listed.
    Listed,
    /// A directory knows how long the keys below it may be.
    Depth,
    /// What S3 does not hold is in the dirty queue (I2), and nothing else is.
    Queue,
    /// Groups know the files of which they may have the only copy (R23), and no others.
    Held,
    /// A key is owned by the inode whose bytes are there, and by no other.
    Owner,
    /// A clean inode is in S3 under the key that its path names (I3).
    Clean,
    /// No number is below one that was given out.
    Numbers,
    /// A flush under way has its attempt.
    Flush,
    /// A handle is of a living session and of a living inode, and all tables know it.
    Handle,
    /// A session's books are right.
    Session,
    /// A remembered reply is of a living session.
    Reply,
    /// A key's attempt can be found by its nonce.
    Attempt,
    /// An object of ours that nobody needs is going to be deleted (I6).
    Garbage,
    /// A remembered delete is in both of its tables.
    Tombstone,
    /// A cut that primaries don't know yet has its notice.
    Cut,
    /// The map has the groups that the cluster was made with, on known nodes.
    Map,
    /// A count is what there is.
    Count,
    /// An inode with extended attributes says so, and no other does.
    Xattrs,
}

/// A rule that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Finding {
    /// Which.
    pub rule: Rule,
    /// Where, and how it is, for people.
    pub what: String,
    /// What mends it; `None`: nobody can tell what would be right.
    pub repair: Option<Repair>,
}

/// What mends a finding.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Repair {
    /// Makes anew what follows from an inode's record: queue, groups, owner, and a directory's counts.
    Derive(InodeId),
    /// A name that belongs to nobody goes; one whose inode has no other becomes that inode's name.
    Name(InodeId, Name),
    /// An inode gets its name back, or `lost+found-<id>` in the root if it is taken; one without name and handle
    /// goes.
    Orphan(InodeId),
    /// A handle's tables are made anew; that of a dead session or inode goes.
    Handle(HandleId),
    /// A session's counts are made anew.
    Session(SessionId),
    /// A clean inode that S3 does not hold is stored again.
    Dirty(InodeId),
    /// A flush whose attempt is unknown is given up.
    Flush(InodeId),
    /// A key's attempt gets its nonce back; whether its object is deleted is decided anew.
    Key(String),
    /// A record goes that says what its source does not.
    Record(Vec<u8>),
    /// A remembered delete is told in both tables.
    Tombstone(String),
    /// A number that was given out isn't given out again.
    AtLeast(u8, u64),
    /// A count is changed by so much. `repairs`: of the state in which it was found to be wrong; done once.
    Count {
        /// The counter's number.
        counter: u8,
        /// Right minus found.
        by: i64,
        /// See above.
        repairs: u64,
    },
}

/// How much was looked at.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize, serde::Serialize,
)]
pub struct Checked {
    /// Records of any table.
    pub records: u64,
    /// Inodes.
    pub inodes: u64,
    /// Names.
    pub names: u64,
    /// Bytes of files.
    pub bytes: u64,
    /// Inodes that S3 does not hold yet.
    pub dirty: u64,
}

/// Dirty data of an inode on a core that the namespace does not know of.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Archive, Serialize, Deserialize, serde::Serialize,
)]
pub struct Stray {
    /// The core.
    pub core: ShardRef,
    /// The group.
    pub pg: PgId,
    /// The inode.
    pub inode: InodeId,
    /// There is such an inode, but S3 is said to have all of it.
    pub known: bool,
}

/// What data nodes have.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize, serde::Serialize,
)]
pub struct Strays {
    /// Dirty inodes that were compared.
    pub compared: u64,
    /// Those that the namespace does not know of, in order.
    pub strays: Vec<Stray>,
    /// Cores that did not answer, and why.
    pub silent: Vec<String>,
}

/// How far a check is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct CheckProgress {
    /// Names the check in the next call.
    pub check: u64,
    /// What was looked at so far.
    pub checked: Checked,
    /// About how many records there are; 0: not known.
    pub records: u64,
    /// Findings since the call before.
    pub findings: Vec<Finding>,
    /// Findings of which only the number is kept: there are too many.
    pub unnamed: u64,
    /// It is over.
    pub done: bool,
}

impl CheckProgress {
    /// The same without its findings.
    pub fn clone_without_findings(&self) -> Self {
        let Self { check, checked, records, unnamed, done, .. } = *self;
        Self { check, checked, records, findings: Vec::new(), unnamed, done }
    }
}
