//! What can go wrong with a local cluster, and what to do about it.

use std::path::PathBuf;

/// A failed step of the controller.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// A file or directory could not be used.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The directory holds something else.
    #[error("{} is not empty and holds no Ebbtide cluster: choose another --dir, or empty it", .0.display())]
    NotACluster(PathBuf),
    /// The configuration does not parse.
    #[error("{} is damaged ({reason}): restore it, or remove the directory after saving its s3/ folder", path.display())]
    BadConfig {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Another controller runs this directory.
    #[error("a controller already runs in {} (pid {pid}): see `ebb status`, or stop it with `ebb down`", dir.display())]
    AlreadyRunning {
        /// The cluster's directory.
        dir: PathBuf,
        /// Its process.
        pid: i32,
    },
    /// A server process does not come up.
    #[error("{name} does not start: {reason} (its log: {})", log.display())]
    DoesNotStart {
        /// The process.
        name: String,
        /// The last lines of its log.
        reason: String,
        /// Where more is.
        log: PathBuf,
    },
    /// The metadata plane cannot be asked.
    #[error("the metadata plane does not answer: {0}")]
    Meta(#[from] ebb_rpc::RpcError),
    /// The metadata plane refused.
    #[error("the metadata plane refused: {0}")]
    Refused(#[from] ebb_metaplane_protocol::FsError),
}

impl ControllerError {
    /// Wraps an I/O error with what was tried on what.
    pub fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}
