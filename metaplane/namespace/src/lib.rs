//! The deterministic state machine of the metadata plane: names, inodes, sessions, grants,
//! dirtiness, the state of every S3 key, and the cluster map.
//!
//! Commands in ([`Machine::apply`]), replies out; reads through [`Machine::query`] and, for the
//! leader's own workers, through [`Reader`]. No clock, no randomness, no I/O: the leader stamps time
//! and nonces into the log entry, the state lives behind [`Kv`]. The same log gives the same bytes
//! on every voter. Carries I2 (dirty before data), I3 (S3 before clean), I5 (fencing), I6 (order of
//! deletes), I7 (exactly once) and its share of I9 (bounds: [`limits`]).
//!
//! Names are UTF-8, because S3 keys are: another name is refused with `Invalid` (EINVAL). The name
//! `.ebb` in the root is reserved and hidden.

pub mod footprint;
pub mod kv;
pub mod limits;
mod lock;

mod abandon;
mod apply;
mod check;
mod conflict;
mod counters;
mod cut;
mod dangling;
mod delegation;
mod directory;
mod dirtiness;
mod dump;
mod flush;
mod flush_commit;
mod grant;
mod handle;
mod held;
mod ingest;
mod inode;
mod key_state;
mod lent;
mod link;
mod lost_base;
mod map;
mod members;
mod moves;
mod notice;
mod ops;
mod query;
mod reader;
mod rename;
mod session;
mod tables;
mod windows;
mod xattr;

pub use abandon::GivenUp;
pub use check::Check;
pub use directory::{LookupState, Origin};
pub use kv::{Kv, KvRead, MemKv};
pub use moves::Walk;
pub use query::again;
pub use reader::{DirtyInode, FlushStage, Left, MachineCounts, Reader, Revalidation};

/// Reasons of `FsError::Again` that the leader acts on before it proposes the operation again.
pub mod why {
    /// The subtree is not completely listed: list [`crate::Reader::incomplete_under`], then retry.
    pub const LISTING: &str = "listing";
    /// The inode came from a LIST: HEAD it (`SetIngestAttrs`), then retry.
    pub const ATTRIBUTES: &str = "attributes";
    /// The generation is being sealed.
    pub const SEALING: &str = "sealing";
    /// Too many truncates not yet acked by the nodes.
    pub const CUTS: &str = "cuts";
    /// Too many unanswered requests of this session.
    pub const REPLIES: &str = "replies";
    /// Another session alone knows the names of a directory: it is asked to give them back.
    pub const DELEGATED: &str = "delegated";
    /// Somebody else's lock is in the way of one that waits.
    pub use ebb_metaplane_protocol::lock::LOCKED;
}

/// The state machine. It has no state of its own: all of it is behind [`Kv`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Machine;
