//! The benchmark harness: what `ebb bench` runs against a real cluster.
//!
//! Figures are medians or totals of real requests over real sockets; nothing is simulated, but for
//! [`index`], which says so, and [`recovery`], which needs no cluster. What a figure is compared with is measured in the same run, turn by
//! turn with ours, since absolute times do not carry between machines. Speed lives here, never in
//! timed tests.

pub mod baseline;
pub mod chunk;
pub mod engines;
mod fill;
pub mod history;
pub mod index;
pub mod journal;
pub mod memory;
pub mod meta;
pub mod mount;
pub mod recovery;
pub mod report;
mod tar;

use ebb_client::ClientError;
use std::path::PathBuf;

/// A failed measurement.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The file system refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The plan makes no sense.
    #[error("{0}")]
    Plan(String),
    /// A worker panicked.
    #[error("a worker ended abruptly: {0}")]
    Worker(String),
    /// A file of the measurement.
    #[error("cannot {what} {path}: {source}")]
    File {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A program that is measured, or measures.
    #[error("{program}: {why}")]
    Program {
        /// Its name.
        program: &'static str,
        /// What it said.
        why: String,
    },
    /// The store of [`index`] or [`recovery`] refused something it should not.
    #[error("the store refused: {0}")]
    Store(String),
    /// The counters of the cores' journals.
    #[error("cannot learn how many writes shared a journal batch: {0}")]
    Journal(String),
}

impl BenchError {
    pub(crate) fn file(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { what, path, source }
    }

    pub(crate) fn program(
        program: &'static str,
        what: &'static str,
    ) -> impl FnOnce(std::io::Error) -> Self {
        move |e| Self::Program { program, why: format!("cannot {what} it: {e}") }
    }
}
