//! Every way this crate can fail, narrow by operation, each saying what to do.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

/// The memlock limit in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemlockLimit {
    /// No limit.
    Unlimited,
    /// At most this many bytes.
    Bytes(u64),
}

impl std::fmt::Display for MemlockLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            MemlockLimit::Unlimited => f.write_str("unlimited"),
            MemlockLimit::Bytes(b) => write!(f, "{} KiB", b >> 10),
        }
    }
}

/// Why a reactor could not be built, and how to make it work.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The configuration breaks a rule.
    #[error("the reactor's configuration is not usable: {0}")]
    Config(&'static str),
    /// The arena is smaller than one buffer of each kind.
    #[error(
        "the buffer arena of {have} bytes is too small: one buffer per class and pool needs {need}"
    )]
    ArenaTooSmall {
        /// Bytes configured.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// ENOMEM from ring setup or registration.
    #[error(
        "{what}: not enough lockable memory. The memlock limit is {limit}, about {need} KiB are \
         needed. Raise it with `ulimit -l unlimited`, LimitMEMLOCK=infinity in the systemd unit, \
         or `docker run --ulimit memlock=-1`. The limit is per user and is given back with a \
         delay, so a quick restart can fail once and then succeed"
    )]
    Memlock {
        /// The step that failed.
        what: &'static str,
        /// The limit in force.
        limit: MemlockLimit,
        /// Estimated need in KiB.
        need: u64,
    },
    /// EPERM or EACCES: a policy forbids io_uring.
    #[error(
        "{what}: io_uring is forbidden here (EPERM). {sysctl}. In a container the default seccomp \
         profile blocks io_uring: allow io_uring_setup, io_uring_enter and io_uring_register in \
         the profile, or run with `--security-opt seccomp=unconfined`"
    )]
    Forbidden {
        /// The step that failed.
        what: &'static str,
        /// What `kernel.io_uring_disabled` says.
        sysctl: SysctlSays,
    },
    /// ENOSYS or EINVAL after the whole ladder of fall-backs.
    #[error(
        "{what}: this kernel ({kernel}) is too old ({errno}). Linux 5.19 is the least, 6.1 or newer \
         is recommended; a sandbox such as gVisor may also lack io_uring"
    )]
    KernelTooOld {
        /// The step that failed.
        what: &'static str,
        /// Release string of the running kernel.
        kernel: String,
        /// What it answered.
        errno: Errno,
    },
    /// EMFILE: the fixed-file table is bounded by RLIMIT_NOFILE.
    #[error(
        "a table of {wanted} files exceeds the open-files limit of {limit}. Raise it with \
         `ulimit -n` or LimitNOFILE=, or lower the number of connections"
    )]
    OpenFiles {
        /// Entries wanted.
        wanted: u32,
        /// RLIMIT_NOFILE after raising it as far as allowed.
        limit: u64,
    },
    /// Anything else.
    #[error("{what}: {source}")]
    Os {
        /// The step that failed.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// The state of `kernel.io_uring_disabled`, as a sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SysctlSays {
    /// 0: the sysctl is not the reason.
    Allowed,
    /// 1: only members of `kernel.io_uring_group`.
    GroupOnly,
    /// 2: nobody.
    Disabled,
    /// The file is not there or not readable.
    Unknown,
}

impl std::fmt::Display for SysctlSays {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            SysctlSays::Allowed => "The sysctl kernel.io_uring_disabled is 0, so it is not that",
            SysctlSays::GroupOnly => {
                "The sysctl kernel.io_uring_disabled is 1: run `sysctl kernel.io_uring_disabled=0` \
                 or join the group in kernel.io_uring_group"
            }
            SysctlSays::Disabled => {
                "The sysctl kernel.io_uring_disabled is 2: run `sysctl kernel.io_uring_disabled=0`"
            }
            SysctlSays::Unknown => "The sysctl kernel.io_uring_disabled cannot be read",
        })
    }
}

/// What works less well than it could; the reactor runs all the same.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupWarning {
    /// The arena is not registered: each direct I/O pins and unpins its pages.
    #[error(
        "the buffer arena of {bytes} bytes could not be registered ({errno}); direct I/O costs more \
         CPU. The memlock limit is {limit}: raise it with `ulimit -l unlimited` or \
         LimitMEMLOCK=infinity"
    )]
    ArenaUnregistered {
        /// Bytes that were to be registered.
        bytes: usize,
        /// The limit in force.
        limit: MemlockLimit,
        /// What the kernel answered.
        errno: Errno,
    },
    /// The kernel refused the best set of ring flags.
    #[error("this kernel lacks {lost}; completions cost more CPU")]
    FewerFlags {
        /// The flags given up.
        lost: &'static str,
    },
    /// Neither reserved nor transparent huge pages.
    #[error("no huge pages for the arena; address translation costs more CPU")]
    NoHugePages,
    /// An optional registration failed.
    #[error("{what} failed ({errno}); continuing without")]
    Optional {
        /// The step.
        what: &'static str,
        /// What the kernel answered.
        errno: Errno,
    },
}

/// Why [`crate::Reactor::turn`] failed. The reactor is not usable afterwards; drop it.
#[derive(Debug, thiserror::Error)]
pub enum TurnError {
    /// `io_uring_enter` failed in a way that cannot be retried.
    #[error("io_uring_enter: {0}")]
    Enter(Errno),
}

/// Why an operation was not taken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Too many device operations are in flight; take some events first.
    #[error("too many device operations in flight")]
    TooManyOps,
    /// The connection's send queue is full; wait for `Sent`.
    #[error("the connection's send queue is full")]
    QueueFull,
    /// The connection is closing, broken, or gone (its generation is over).
    #[error("the connection is closed")]
    ConnClosed,
    /// The connection is not connected yet; wait for `Connected`.
    #[error("the connection is not connected yet")]
    NotConnected,
    /// A receive is already in flight on the connection.
    #[error("a receive is already in flight on this connection")]
    RecvBusy,
    /// The file id is not open.
    #[error("no such file")]
    NoFile,
    /// Address, offset or length break the device's direct-I/O alignment.
    #[error("address, offset or length not aligned for direct I/O")]
    Misaligned,
    /// An empty range, one outside its buffer, or one that is too long or has too many segments.
    #[error("empty, too long, or outside the buffer")]
    BadRange,
    /// The table of files, listeners or connections is full.
    #[error("no room for another file, listener or connection")]
    NoRoom,
    /// An operation is in flight on the file.
    #[error("an operation is in flight on the file")]
    FileBusy,
    /// The system refused.
    #[error("{0}")]
    Os(Errno),
    /// The reactor is shutting down.
    #[error("the reactor is shutting down")]
    ShuttingDown,
}

/// An operation that was not taken on, with the buffers it would have owned.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct Rejected<T> {
    /// The reason.
    pub why: Refusal,
    /// What was passed in.
    pub back: T,
}

/// The device operation an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// A read.
    Read,
    /// A write, durable or not.
    Write,
    /// An fdatasync.
    Sync,
}

impl std::fmt::Display for DiskOp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DiskOp::Read => "read",
            DiskOp::Write => "write",
            DiskOp::Sync => "fdatasync",
        })
    }
}

/// A device operation that failed. A failed write or sync is fatal for its device: the kernel may
/// have dropped the dirty state, so a retry that succeeds proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The device said no.
    #[error("device {op} of {len} bytes at {offset}: {errno}")]
    Os {
        /// What was asked.
        op: DiskOp,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: usize,
        /// The answer.
        errno: Errno,
    },
    /// A write stopped short and cannot be continued on an aligned boundary.
    #[error("device write at {offset}: {got} of {len} bytes and no further")]
    Stuck {
        /// Byte offset.
        offset: u64,
        /// Bytes asked for.
        len: usize,
        /// Bytes written.
        got: usize,
    },
    /// Cancelled by shutdown; whether it happened is unknown.
    #[error("device {0} cancelled by shutdown")]
    Cancelled(DiskOp),
}

/// Why a send or receive did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetError {
    /// The peer closed its side; `got` bytes had arrived for this receive.
    #[error("the peer closed the connection ({got} bytes into this receive)")]
    Eof {
        /// Bytes received before the end.
        got: usize,
    },
    /// This side closed the connection.
    #[error("the connection was closed on this side")]
    Closed,
    /// The network said no.
    #[error("connection: {0}")]
    Os(Errno),
}

/// Blocking work on a device file failed.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// Another process has it.
    #[error("{path}: already in use by another process (locked); stop that one first")]
    Locked {
        /// The file.
        path: PathBuf,
    },
    /// A mounted block device, or one that an array, a volume or another server holds.
    #[error(
        "{path}: this device is in use: mounted, part of an array or a volume, or opened by another \
         process; unmount or stop that first (`lsblk {path}` shows who has it)"
    )]
    Busy {
        /// The device.
        path: PathBuf,
    },
    /// A directory, a pipe, a terminal and the like.
    #[error("{path}: this is {kind}; a shard is a regular file or a block device")]
    NotADevice {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The file system does not do O_DIRECT.
    #[error("{path}: no direct I/O on this file system; use ext4, XFS or a block device")]
    NoDirectIo {
        /// The file.
        path: PathBuf,
    },
    /// Device alignment beyond a block.
    #[error("{path}: the device wants {align}-byte alignment, more than the 4096 supported")]
    Alignment {
        /// The file.
        path: PathBuf,
        /// What it wants.
        align: u32,
    },
    /// Anything else.
    #[error("{path}: {what}: {source}")]
    Os {
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}
