//! Errors of the metadata plane, each with one errno (turned into it at the FUSE edge).

use rkyv::{Archive, Deserialize, Serialize};

/// Result of a metadata request.
pub type FsResult<T> = Result<T, FsError>;

/// Why a request was refused. Nothing was changed unless the variant says so.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize, thiserror::Error)]
pub enum FsError {
    /// ENOENT.
    #[error("no such file or directory")]
    NotFound,
    /// EEXIST.
    #[error("file exists")]
    Exists,
    /// ENOTDIR.
    #[error("not a directory")]
    NotDirectory,
    /// EISDIR.
    #[error("is a directory")]
    IsDirectory,
    /// ENOTEMPTY.
    #[error("directory not empty")]
    NotEmpty,
    /// EINVAL.
    #[error("invalid argument: {0}")]
    Invalid(String),
    /// ENAMETOOLONG.
    #[error("name too long")]
    NameTooLong,
    /// EFBIG.
    #[error("file too large")]
    TooLarge,
    /// EPERM.
    #[error("operation not permitted: {0}")]
    NotPermitted(String),
    /// EXDEV.
    #[error("too large to move in one step: copy and delete instead")]
    CrossDevice,
    /// ESTALE: the inode is gone, or its lineage changed.
    #[error("stale file handle")]
    Stale,
    /// ENOSPC.
    #[error("no space left")]
    NoSpace,
    /// EIO, and why.
    #[error("input/output error: {0}")]
    Io(String),
    /// EOPNOTSUPP.
    #[error("not supported: {0}")]
    NotSupported(String),
    /// Something is under way (a seal, a listing, an S3 mutation): try again after this many ms.
    /// The library retries; a user sees it only as a wait, then EAGAIN.
    #[error("try again in {retry_after_ms} ms: {why}")]
    Again {
        /// When.
        retry_after_ms: u32,
        /// What it waits for.
        why: String,
    },
    /// The session expired or never was: open a new one (PROTOCOL §5).
    #[error("the session has expired")]
    SessionExpired,
    /// The reply to this sequence was already forgotten (the client said it had it).
    #[error("request is too old")]
    TooOld,
    /// This node does not lead; the address of who does, if known.
    #[error("not the leader")]
    NotLeader(Option<String>),
    /// S3 does not answer.
    #[error("S3 is unavailable: {0}")]
    S3Unavailable(String),
    /// The cluster is being taken down, or is read-only.
    #[error("the cluster is shutting down")]
    ShuttingDown,
    /// EAGAIN: somebody else's lock is in the way.
    #[error("locked by somebody else")]
    Locked,
    /// ENOLCK.
    #[error("too many locks on one file")]
    NoLocks,
    /// EMLINK.
    #[error("the file has as many names as one can have")]
    TooManyLinks,
    /// ENODATA.
    #[error("no such extended attribute")]
    NoAttribute,
    /// ERANGE.
    #[error("the name of an extended attribute has 255 bytes at most")]
    AttributeNameTooLong,
    /// E2BIG.
    #[error("the value of an extended attribute has 64 KiB at most")]
    AttributeTooLarge,
}

impl FsError {
    /// The errno of the error (Linux numbers).
    pub fn errno(&self) -> i32 {
        match self {
            Self::NotFound => 2,
            Self::Exists => 17,
            Self::NotDirectory => 20,
            Self::IsDirectory => 21,
            Self::NotEmpty => 39,
            Self::Invalid(_) => 22,
            Self::NameTooLong => 36,
            Self::TooLarge => 27,
            Self::NotPermitted(_) => 1,
            Self::CrossDevice => 18,
            Self::Stale => 116,
            Self::NoSpace => 28,
            Self::Io(_) | Self::S3Unavailable(_) | Self::TooOld | Self::SessionExpired => 5,
            Self::NotSupported(_) => 95,
            Self::Again { .. } | Self::Locked => 11,
            Self::NoLocks => 37,
            Self::TooManyLinks => 31,
            Self::NoAttribute => 61,
            Self::AttributeNameTooLong => 34,
            Self::AttributeTooLarge => 7,
            Self::NotLeader(_) | Self::ShuttingDown => 5,
        }
    }
}
