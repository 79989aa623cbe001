//! What can go wrong with a call.

use ebb_dataplane_protocol::Status;
use ebb_dataplane_protocol::codec::Malformed;

/// A failed call.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// Nobody listens there, or the network refuses.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// host:port
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// Somebody else just found that it can't be reached.
    #[error("{why}")]
    Unreachable {
        /// host:port
        address: String,
        /// What that one was told.
        why: String,
    },
    /// The peer speaks another protocol, or belongs to another cluster.
    #[error("{address} did not complete the handshake: {reason}")]
    Handshake {
        /// host:port
        address: String,
        /// Why.
        reason: String,
    },
    /// The peer does not hold our cluster key, or we do not hold its (I12).
    #[error("{address} does not share our cluster key: check the key file of this cluster")]
    WrongKey {
        /// host:port
        address: String,
    },
    /// The connection closed; a request in flight may have taken effect.
    #[error("{address} closed the connection")]
    Closed {
        /// host:port
        address: String,
    },
    /// No answer in time; the request may have taken effect.
    #[error("{address} did not answer within {ms} ms")]
    Timeout {
        /// host:port
        address: String,
        /// The limit.
        ms: u64,
    },
    /// An answer that is not what was asked for.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The peer answered with a status other than `Ok`.
    #[error("refused with {status:?}: {message}")]
    Status {
        /// The status.
        status: Status,
        /// When to try again, 0: not said.
        retry_after_ms: u32,
        /// What the peer said.
        message: String,
    },
    /// No metadata node answered as leader within the caller's patience.
    #[error("no metadata server of {addresses} answered within {ms} ms: {last}")]
    NoLeader {
        /// Who was asked.
        addresses: String,
        /// How long.
        ms: u64,
        /// The last failure.
        last: String,
    },
}

impl RpcError {
    /// Whether the request may have taken effect although no answer came.
    pub fn may_have_happened(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Timeout { .. } | Self::Malformed(_))
    }

    /// The status the peer answered with, if it answered.
    pub fn status(&self) -> Option<Status> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }
}
