//! A namespace outside of a cluster: `ebb meta dump` and `ebb meta load`.
//!
//! A dump is text, one JSON document a line: a [`Head`], a [`Record`] per name with directories before what is in
//! them, and an [`End`] with the CRC-32C of all bytes before its line. It says what the names are and where in the
//! bucket their bytes are, in terms of the bucket and not of a state machine's tables, so it outlives their format.
//! What only data nodes had is named ([`Record::unstored`]), and not in it.

use crate::attr::{FileKind, Time};
use rkyv::{Archive, Deserialize, Serialize};

/// Version of the format; a reader refuses a higher one.
pub const DUMP_VERSION: u32 = 1;
/// Records of one page or one call at most: the longest still fit one frame.
pub const RECORDS_MAX: usize = 500;
/// Bytes of one record at most: a path, a key, a link's target, all escaped.
pub const RECORD_BYTES_MAX: usize = 64 << 10;

fn is_false(b: &bool) -> bool {
    !b
}
fn is_zero(n: &u32) -> bool {
    *n == 0
}

/// First line.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Head {
    /// [`DUMP_VERSION`].
    pub ebb_dump: u32,
    /// The cluster, for people.
    pub cluster: String,
    /// The leader's clock, ns since 1970.
    pub taken_ns: i64,
    /// About how many records follow.
    pub records: u64,
}

/// Last line.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct End {
    /// Records.
    pub end: u64,
    /// Records with `unstored`.
    pub unstored: u64,
    /// CRC-32C of all lines before, line feeds included.
    pub crc32c: u32,
}

/// An object of the bucket.
#[derive(
    Clone,
    Debug,
    PartialEq,
    Eq,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(deny_unknown_fields)]
pub struct Object {
    /// Its key.
    pub key: String,
    /// Its etag.
    pub etag: String,
    /// Its length.
    pub length: u64,
    /// Bytes of it that count, from its start on; the rest was cut off.
    pub valid: u64,
}

/// A name, and what it is of.
#[derive(
    Clone,
    Debug,
    PartialEq,
    Eq,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// From the root, without a slash at either end; empty: the root.
    pub path: String,
    /// What it is.
    pub kind: FileKind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub uid: u32,
    /// Group.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gid: u32,
    /// Bytes; 0 of directories.
    pub size: u64,
    /// Last access, ns since 1970.
    pub atime: Time,
    /// Last change of the content.
    pub mtime: Time,
    /// Last change of anything.
    pub ctime: Time,
    /// Of a symbolic link.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub target: Vec<u8>,
    /// Where its bytes (of a directory: its marker) are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<Object>,
    /// Only a listing was seen: its attributes are the object's, which nobody asked for yet.
    #[serde(default, skip_serializing_if = "is_false")]
    pub unseen: bool,
    /// The object is not at the path, or lacks these attributes.
    #[serde(default, skip_serializing_if = "is_false")]
    pub dirty: bool,
    /// Data nodes had bytes of it that the bucket didn't have.
    #[serde(default, skip_serializing_if = "is_false")]
    pub unstored: bool,
    /// Its data was lost with a node.
    #[serde(default, skip_serializing_if = "is_false")]
    pub lost: bool,
    /// Of a directory: all that is below its prefix is known.
    #[serde(default, skip_serializing_if = "is_false")]
    pub listed: bool,
    /// Extended attributes, as an object's metadata has them ([`crate::xattr::text`]).
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub xattrs: String,
}

/// A page of a dump.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct DumpPage {
    /// Names the moment that is dumped in the next call.
    pub dump: u64,
    /// The cluster.
    pub cluster: String,
    /// The moment.
    pub taken: Time,
    /// Inodes there are.
    pub inodes: u64,
    /// Names, directories before what is in them.
    pub records: Vec<Record>,
    /// Where the next page goes on; `None`: it is over.
    pub next: Option<Vec<u8>>,
}

/// How a load begins, goes on and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum LoadStep {
    /// Nothing but loads from here on. Refused unless the namespace is empty and nobody has a session; again, it
    /// goes on with a load that was not finished.
    Begin,
    /// Records; those whose name is there already are skipped.
    Records,
    /// Everybody may come.
    End,
}
