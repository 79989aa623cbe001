//! Ebbtide's native library: a file system over the metadata plane and the chunk servers.
//!
//! Three layers, each usable alone:
//!
//! - [`Cluster`]: a session with the metadata plane (opened, renewed, reopened when it expired), the
//!   cluster map, and one connection per (core, lane) to the chunk servers.
//! - [`FileSystem`]: files and directories by inode, with write buffers, readahead and
//!   close-to-open consistency. What FUSE needs, free of FUSE's types.
//! - [`path`]: whole-file conveniences by path, for the command line.
//!
//! Invariants held here: I2 and I5 (writes carry a live grant's generation; refused ones are
//! repeated only under a fresh grant), I7 (every mutation and every data write has one
//! (session, sequence), which a retry repeats), I9 (buffers, readahead and retries are bounded by
//! [`Config`]), I10 (payloads carry a checksum per block, and those of replies are checked here).
//!
//! What POSIX keeps and what it does not: `docs/SEMANTICS.md`.

mod advise;
mod begin;
mod budget;
mod buffer;
mod cluster;
mod commit;
mod config;
mod error;
mod files;
mod fs;
mod grant;
mod idle;
mod inode;
mod leased;
mod lent;
mod locks;
mod map;
mod names;
pub mod path;
mod pool;
mod readahead;
mod reader;
mod sequence;
mod session;
mod status;
mod transfer;
mod unnamed;
mod writer;
mod xattr;

pub use advise::Advice;
pub use begin::begin;
pub use cluster::Cluster;
pub use config::Config;
pub use ebb_dataplane_protocol::InodeId;
pub use ebb_metaplane_protocol::attr::{Attr, FileKind, SetAttr, Time, TimeChange};
pub use ebb_metaplane_protocol::lease::Counts as LeaseCounts;
pub use ebb_metaplane_protocol::lock::{Lock, LockMode, Locked};
pub use ebb_metaplane_protocol::query::{DirEntry, StatFs};
pub use ebb_metaplane_protocol::xattr::{XattrMode, Xattrs};
pub use error::ClientError;
pub use files::{FileHandle, OpenFlags, OpenedFile};
pub use fs::{FileSystem, Owner};
pub use leased::Forget;
pub use path::WalkEntry;
pub use writer::Unsent;

/// Result of a file-system call.
pub type Result<T> = std::result::Result<T, ClientError>;

/// The client's clock, as the metadata plane counts time.
pub(crate) fn now() -> Time {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    Time(since.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX)))
}
