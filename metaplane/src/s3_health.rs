//! Whether S3 answers, for the paths that have something else to serve: a circuit breaker.
//!
//! After a few failures in a row, optional calls (revalidation at open) are skipped for a while, so
//! that a dead S3 does not slow what is cached. Logged when it opens and when it closes, not per call.

use ebb_s3::{ErrorKind, S3Error};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Failures in a row that open the breaker.
const FAILURES: u32 = 3;
/// How long it stays open before one call tries again.
const OPEN_FOR: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct State {
    failures: u32,
    open_until: Option<Instant>,
    last: Option<(String, Instant)>,
}

/// The breaker.
#[derive(Debug, Default)]
pub(crate) struct S3Health(Mutex<State>);

/// Whether a failure says that S3 does not answer, rather than that it answered no.
pub(crate) fn is_outage(e: &S3Error) -> bool {
    match e.kind {
        ErrorKind::Throttled
        | ErrorKind::Server
        | ErrorKind::Timeout
        | ErrorKind::Connect
        | ErrorKind::Ambiguous
        | ErrorKind::Denied
        | ErrorKind::NoSuchBucket => true,
        ErrorKind::NotFound
        | ErrorKind::PreconditionFailed
        | ErrorKind::Conflict
        | ErrorKind::Integrity
        | ErrorKind::Invalid => false,
    }
}

impl S3Health {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether an optional call is worth trying. Lets one through each time the pause is over.
    pub(crate) fn is_worth_trying(&self) -> bool {
        let mut s = self.state();
        match s.open_until {
            Some(until) if Instant::now() < until => false,
            Some(_) => {
                s.open_until = Some(Instant::now() + OPEN_FOR);
                true
            }
            None => true,
        }
    }

    /// A call did not get an answer.
    pub(crate) fn failed(&self, why: &str) {
        let mut s = self.state();
        s.failures = s.failures.saturating_add(1);
        s.last = Some((why.to_owned(), Instant::now()));
        if s.failures >= FAILURES {
            if s.open_until.is_none() {
                tracing::warn!(error = why, "S3 does not answer; serving what is known");
            }
            s.open_until = Some(Instant::now() + OPEN_FOR);
        }
    }

    /// A call got an answer.
    pub(crate) fn answered(&self) {
        let mut s = self.state();
        if s.open_until.take().is_some() {
            tracing::info!("S3 answers again");
        }
        s.failures = 0;
    }

    /// Notes the outcome of a call; passes it on.
    pub(crate) fn note<T>(&self, result: Result<T, S3Error>) -> Result<T, S3Error> {
        match &result {
            Err(e) if is_outage(e) => self.failed(&e.to_string()),
            _ => self.answered(),
        }
        result
    }

    /// The last failure and its age.
    pub(crate) fn last_error(&self) -> Option<(String, u64)> {
        let s = self.state();
        s.last.as_ref().map(|(why, at)| (why.clone(), at.elapsed().as_millis() as u64))
    }
}
