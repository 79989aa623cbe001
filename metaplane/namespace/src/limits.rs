//! Every bound of the state machine (I9), in one place.

/// Locked ranges of one file, of all clients.
pub const LOCKS_PER_INODE_MAX: usize = 4_096;
/// Open handles of one session.
pub const HANDLES_PER_SESSION_MAX: u32 = 65_536;
/// Live sessions.
pub const SESSIONS_MAX: u64 = 4_096;
/// Remembered replies of one session; past it the session must acknowledge first.
pub const REPLIES_PER_SESSION_MAX: u64 = 4_096;
/// How long a session lives without renewal, in nanoseconds.
pub const SESSION_TTL_NS: i64 = 30_000_000_000;
/// The same in milliseconds, for replies.
pub const SESSION_TTL_MS: u64 = 30_000;
/// Applied writes remembered of a group that nobody holds; past it the group stays where it is until its
/// sessions write on or end.
pub const WINDOWS_KEPT_MAX: usize = 65_536;
/// Bytes of a session's label.
pub const LABEL_BYTES_MAX: usize = 256;
/// Bytes of a symbolic link's target.
pub const SYMLINK_BYTES_MAX: usize = 4_095;
/// Bytes of an S3 key relative to the prefix (S3's own limit is 1024 with the prefix).
pub const KEY_BYTES_MAX: usize = 1_024;
/// Remembered deletes of keys, for the rule of late listings.
pub const TOMBSTONES_MAX: u64 = 100_000;
/// How long a delete is remembered, in nanoseconds.
pub const TOMBSTONE_TTL_NS: i64 = 15 * 60 * 1_000_000_000;
/// Cuts remembered per inode to clip late commits.
pub const CLIPS_MAX: usize = 64;
/// Requests of one key that were given up and may still land; with so many of them the key waits.
pub const DANGLING_PER_KEY_MAX: usize = 64;
/// Milliseconds after which a refused request may come again.
pub const RETRY_MS: u32 = 5;
/// Components of a path a query resolves.
pub const PATH_COMPONENTS_MAX: usize = 1_024;
