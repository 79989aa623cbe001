//! Errors of the library, each with one errno.

use ebb_metaplane_protocol::FsError;
use ebb_rpc::RpcError;

/// Why a call failed. Cloneable: one failed background write may be reported through several
/// handles.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ClientError {
    /// The metadata plane refused.
    #[error(transparent)]
    Fs(#[from] FsError),
    /// The metadata plane could not be asked.
    #[error("metadata plane: {0}")]
    Metadata(String),
    /// The cluster key does not match.
    #[error("{0}")]
    WrongKey(String),
    /// A chunk could not be read or written within the patience.
    #[error("{what} of bytes {start}..{end} of inode {inode}: {why}")]
    Data {
        /// "read" or "write".
        what: &'static str,
        /// The file.
        inode: u64,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// The last answer.
        why: String,
    },
    /// The session expired, or the node was lost, while a write's outcome was unknown: it is not repeated,
    /// because another client may have written there since (PROTOCOL §5, R27).
    #[error("a write to inode {inode} was lost with its session or its node")]
    WriteLost {
        /// The file.
        inode: u64,
    },
    /// The session expired while the outcome of a change to names or attributes was unknown: it is not repeated,
    /// because another client may have changed the same since (I7).
    #[error(
        "the session expired while the answer to a change was lost: it may have happened or not"
    )]
    OutcomeLost,
    /// The nodes are full and nothing is being flushed.
    #[error("no space left on the data nodes")]
    NoSpace,
    /// The file was replaced or removed underneath an open handle.
    #[error("stale file handle")]
    Stale,
    /// Not an open handle, or not open for this.
    #[error("bad file handle")]
    BadHandle,
    /// A path that is not one.
    #[error("invalid path: {0}")]
    Path(String),
    /// Past the largest file.
    #[error("file too large")]
    TooLarge,
    /// A wait for a lock was given up.
    #[error("interrupted")]
    Interrupted,
    /// Too many symbolic links.
    #[error("too many levels of symbolic links")]
    Loop,
}

impl ClientError {
    /// The errno of the error (Linux numbers). The one place where errors become numbers.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Fs(e) => e.errno(),
            Self::Metadata(_) | Self::Data { .. } | Self::WriteLost { .. } | Self::OutcomeLost => {
                libc::EIO
            }
            Self::WrongKey(_) => libc::EACCES,
            Self::NoSpace => libc::ENOSPC,
            Self::Stale => libc::ESTALE,
            Self::BadHandle => libc::EBADF,
            Self::Path(_) => libc::EINVAL,
            Self::TooLarge => libc::EFBIG,
            Self::Interrupted => libc::EINTR,
            Self::Loop => libc::ELOOP,
        }
    }

    /// Whether a retry by the user may help (EIO and EAGAIN of waiting), as opposed to an answer.
    pub fn is_outage(&self) -> bool {
        matches!(
            self,
            Self::Metadata(_)
                | Self::Data { .. }
                | Self::Fs(FsError::S3Unavailable(_) | FsError::Again { .. })
        )
    }
}

impl From<RpcError> for ClientError {
    fn from(e: RpcError) -> Self {
        match e {
            RpcError::WrongKey { .. } => Self::WrongKey(e.to_string()),
            other => Self::Metadata(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errnos_are_linux_numbers() {
        assert_eq!(ClientError::from(FsError::NotEmpty).errno(), libc::ENOTEMPTY);
        assert_eq!(ClientError::from(FsError::Stale).errno(), libc::ESTALE);
        assert_eq!(ClientError::from(FsError::NotSupported("x".into())).errno(), libc::EOPNOTSUPP);
        assert_eq!(ClientError::from(FsError::NameTooLong).errno(), libc::ENAMETOOLONG);
        assert_eq!(ClientError::NoSpace.errno(), libc::ENOSPC);
    }
}
