//! The vocabulary that every plane shares: ids, the 64-byte frame header, grants, the cluster map
//! and the chunk servers' requests. No I/O, no clock, no randomness.
//!
//! Everything that crosses a socket is one *frame* (see [`header`]): a fixed 64-byte header, a small
//! `body`, and for bulk data a `payload` that is received straight into an aligned buffer. Hot
//! requests have fixed little-endian bodies ([`data`]); everything else is `rkyv`, checked on
//! arrival ([`codec`]). All ports of all planes open with the same handshake ([`auth`], I12).

pub mod auth;
pub mod checksum;
pub mod codec;
pub mod control;
pub mod data;
pub mod grant;
pub mod header;
pub mod hostile;
pub mod ids;
pub mod map;
pub mod replica;
pub mod status;

pub use checksum::crc32c;
pub use grant::{Backing, ByteRange, Cut, FileView, Grant, GrantMode, SignedGrant};
pub use header::{Header, Opcode};
pub use ids::*;
pub use map::{ClusterMap, NodeInfo, NodeState, PgEntry, ShardRef};
pub use status::Status;
