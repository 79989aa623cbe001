//! Leases on what clients remember of inodes (docs/PROTOCOL.md, R52 to R55): both halves, without I/O and
//! without a clock of their own.
//!
//! A client that keeps a [`Cache`] may answer from it without asking, and never with anything old. The
//! leader ([`Leases`]) notes who was told what, recalls it when a command changes it, and lets nobody hear
//! of the change before everybody who was told otherwise has forgotten that, or can use it no longer: all
//! of a client's knowledge ends [`LEASE`] after the last [`Watch`] call that was answered. After Gray and
//! Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache consistency" (1989),
//! with the callbacks of AFS; the leases are per client, the callbacks per inode.

mod client;
mod leader;
mod lent;
#[cfg(test)]
mod lent_tests;
mod loans;
#[cfg(test)]
mod tests;

pub use client::{Cache, Counts, Ticket};
pub use leader::Leases;
pub use lent::Lent;
pub use loans::Loans;

use ebb_dataplane_protocol::InodeId;
use rkyv::{Archive, Deserialize, Serialize};
use std::time::Duration;

/// How long what a client remembers outlives its last call, which is what others wait at most for a client
/// that went away, once; and what a new leader waits before it serves.
pub const LEASE: Duration = Duration::from_millis(1_000);
/// By how much a client's clock may be slower than the leader's within a lease.
pub const DRIFT: Duration = Duration::from_millis(50);
/// How long a leader holds a [`Watch`] call that it has nothing to answer.
pub const HOLD: Duration = Duration::from_millis(300);
/// Recalls of one answer at most.
pub const RECALLS_MAX: usize = 1_000;

/// Files lent to a session at most.
pub const LENT_PER_SESSION_MAX: usize = 65_536;
/// Files that one [`Watch`] call gives back at most.
pub const RETURNED_MAX: usize = 8_192;

/// Inodes that one operation forgets at most.
pub const DROPPED_MAX: usize = 16;

/// What an answer tells may be remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Lease {
    /// The client's, if it still has it.
    pub epoch: u64,
    /// Later leases have higher numbers.
    pub number: u64,
}

/// A client's standing call: tells what it has forgotten, waits for more to forget, and extends the lease.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Watch {
    /// Of the answer before; 0: the client remembers nothing.
    pub epoch: u64,
    /// Counts the session's calls: what comes late is known by it.
    pub call: u64,
    /// The recalls up to this one were carried out.
    pub forgotten: u64,
    /// Files that were lent ([`Lent`]) up to that number, and are not any more; [`RETURNED_MAX`] at most.
    pub returned: Vec<(InodeId, u64)>,
    /// Of what was lent in other epochs than this one, nothing is left. 0: in none.
    pub settled: u64,
}

/// The answer to [`Watch`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Watched {
    /// Another than the client's: whatever it remembers is void.
    pub epoch: u64,
    /// How long what it remembers is good, counted from when it sent the call; ms.
    pub lease_ms: u32,
    /// Inodes to be forgotten, with the names in them.
    pub recalled: Vec<InodeId>,
    /// To be told in the next call, when they are.
    pub through: u64,
    /// Files that are to be given back, with the number to be told when they are.
    pub wanted: Vec<(InodeId, u64)>,
}
