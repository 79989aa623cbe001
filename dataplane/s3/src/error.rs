//! The one error of the S3 client: what went wrong, in which operation, on which key.
//!
//! Holds I3: a 5xx or a lost reply of a mutation is `Ambiguous` (the object may or may not have
//! changed; look, never assume), and no path turns one into success. Kinds are decided where the
//! reply is seen (`client::classify`); callers match on `kind` and never on text.

use crate::operation::Operation;

/// What an S3 call failed with. Every kind but `Ambiguous` says for certain that a mutation was
/// not carried out (`Integrity` of an upload included: the server refused the bytes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// 404 for a key or an upload id.
    NotFound,
    /// 412: the condition did not hold.
    PreconditionFailed,
    /// 409: another conditional mutation was under way; look and try again.
    Conflict,
    /// 401 or 403, or no credentials to be found.
    Denied,
    /// The bucket itself is missing.
    NoSuchBucket,
    /// The server asks for fewer requests; nothing was done.
    Throttled,
    /// 5xx on a read.
    Server,
    /// No reply in time on a read.
    Timeout,
    /// No connection was made; nothing was sent.
    Connect,
    /// A mutation was sent and its outcome is unknown: connection lost, timeout, or 5xx.
    Ambiguous,
    /// Short or long body, a reply for another etag, a checksum the server refused.
    Integrity,
    /// The request itself is wrong (or the server does not offer it).
    Invalid,
}

/// A failed S3 call.
#[derive(Debug, Clone, thiserror::Error)]
#[error("S3 {op} of '{key}': {kind:?}: {message}")]
pub struct S3Error {
    pub kind: ErrorKind,
    pub op: Operation,
    /// Relative to the bucket's prefix, as the caller gave it; empty for whole-bucket calls.
    pub key: String,
    pub message: String,
}

impl S3Error {
    pub fn new(
        kind: ErrorKind,
        op: Operation,
        key: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        Self { kind, op, key: key.into(), message: message.into() }
    }

    /// The mutation may have been carried out: HEAD and compare the nonce before anything else.
    pub fn is_ambiguous(&self) -> bool {
        self.kind == ErrorKind::Ambiguous
    }

    pub fn is_not_found(&self) -> bool {
        self.kind == ErrorKind::NotFound
    }

    /// The same request may succeed later without anything else changing. For a mutation this is
    /// true only where it is certain that nothing was done.
    pub fn is_transient(&self) -> bool {
        matches!(
            self.kind,
            ErrorKind::Throttled | ErrorKind::Server | ErrorKind::Timeout | ErrorKind::Connect
        )
    }
}
