//! Advisory locks on ranges of files (docs/PROTOCOL.md, R57).

use rkyv::{Archive, Deserialize, Serialize};

/// Why a lock that waits is to be asked for again: `Again`'s reason.
pub const LOCKED: &str = "locked";

/// How a range is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum LockMode {
    /// Others may lock it shared (F_RDLCK, LOCK_SH).
    Shared,
    /// Nobody else may lock it (F_WRLCK, LOCK_EX).
    Exclusive,
    /// Not at all (F_UNLCK, LOCK_UN).
    Unlock,
}

/// A lock that is wanted, or an unlock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Lock {
    /// Whose it is, among those of its session: its locks are never in its own way.
    pub owner: u64,
    /// The first byte.
    pub start: u64,
    /// The last byte; u64::MAX: to the end, however long the file becomes.
    pub end: u64,
    /// How.
    pub mode: LockMode,
    /// The process, to be told to others on its machine.
    pub pid: u32,
}

/// A lock that is in somebody's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Locked {
    /// The first byte.
    pub start: u64,
    /// The last byte.
    pub end: u64,
    /// Exclusive, or shared.
    pub exclusive: bool,
    /// The process; 0: of another client.
    pub pid: u32,
}
