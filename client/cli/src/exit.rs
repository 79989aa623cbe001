//! Errors of commands and their exit codes.
//!
//! | code | means |
//! |---|---|
//! | 0 | done |
//! | 1 | failed; the message says on what |
//! | 2 | wrong usage (clap's own) |
//! | 3 | no cluster there: nothing runs, wrong address, wrong key |
//! | 4 | S3 refuses or does not answer |
//! | 5 | refused, since data would be lost: dirty data, a deadline passed |

use ebb_controller::ControllerError;
use ebb_metaplane_protocol::FsError;
use ebb_rpc::RpcError;

/// An error for people.
#[derive(Debug)]
pub(crate) struct CliError {
    message: String,
    code: u8,
}

impl std::fmt::Display for CliError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl CliError {
    /// A plain failure.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 1 }
    }
    /// Nothing to talk to.
    pub(crate) fn no_cluster(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 3 }
    }
    /// S3 is the trouble.
    pub(crate) fn s3(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 4 }
    }
    /// Refused for the data's sake.
    pub(crate) fn unsafe_to_go_on(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 5 }
    }
    /// Wrong arguments that clap cannot see.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 2 }
    }
    /// The exit code.
    pub(crate) fn code(&self) -> u8 {
        self.code
    }
    /// A failure with the exit code that another process of ours ended with.
    pub(crate) fn with_code(message: impl Into<String>, code: u8) -> Self {
        Self { message: message.into(), code }
    }
    /// Puts what was being done in front.
    pub(crate) fn context(mut self, what: impl std::fmt::Display) -> Self {
        self.message = format!("{what}: {}", self.message);
        self
    }
}

impl From<RpcError> for CliError {
    fn from(e: RpcError) -> Self {
        match e {
            RpcError::WrongKey { .. } | RpcError::Connect { .. } | RpcError::NoLeader { .. } => {
                Self::no_cluster(format!("{e}; is the cluster up? (`ebb status`, `ebb up`)"))
            }
            e => Self::new(e.to_string()),
        }
    }
}

impl From<FsError> for CliError {
    fn from(e: FsError) -> Self {
        match e {
            FsError::S3Unavailable(_) => Self::s3(e.to_string()),
            e => Self::new(e.to_string()),
        }
    }
}

impl From<ControllerError> for CliError {
    fn from(e: ControllerError) -> Self {
        match e {
            ControllerError::Meta(e) => e.into(),
            ControllerError::Refused(e) => e.into(),
            e => Self::new(e.to_string()),
        }
    }
}
