//! Calls from one core to another node's, as the core sees them.
//!
//! A [`Call`] names a core and ends in exactly one [`Answer`], which gives its buffer back. Calls that are
//! given to one *link* (one connection, from its first call on) reach the other core in the order in
//! which they were given, or not at all: when a link ends, every call on it that has no answer yet is
//! `Broken`, nothing of it arrives later, and what is given to it from then on is `Broken` too. So who
//! needs an order without gaps names the link that the first answer brought; who needs none names none.

use super::event::Token;
use ebb_dataplane_protocol::{Header, ShardRef};
use std::ops::Range;
use std::sync::Arc;

/// One connection to another core, in its whole life. Never reused in the life of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u64);

/// Which connection to a core: each has links of its own, so that one neither waits for what the other
/// carries nor ends with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Channel {
    /// Small things in order, whose delay somebody feels, and what they carry.
    Stream = 0,
    /// Bulk that can be had elsewhere.
    Bulk = 1,
}

/// A request to another node's core.
#[derive(Debug)]
pub struct Call<B> {
    /// For the answer.
    pub token: Token,
    /// Whom.
    pub peer: ShardRef,
    /// On which of the connections to it.
    pub channel: Channel,
    /// Only on this link, or (`None`) on whichever there is, made if need be.
    pub link: Option<LinkId>,
    /// The request's header; its id, lengths and checksum are set when it leaves.
    pub header: Header,
    /// Its body.
    pub body: Vec<u8>,
    /// Its payload, sent from where it is; others may read it too.
    pub payload: Vec<(Arc<B>, Range<usize>)>,
    /// Where the answer's payload goes. Without it an answer with a payload breaks the link.
    pub want: Option<Want<B>>,
    /// Without an answer by then the link is broken.
    pub timeout_ms: u32,
}

/// A buffer for an answer's payload.
#[derive(Debug)]
pub struct Want<B> {
    /// The target.
    pub buf: B,
    /// The part of it that may be used; a longer payload breaks the link.
    pub range: Range<usize>,
}

/// The end of a call.
#[derive(Debug)]
pub struct Answer<B> {
    /// The call's.
    pub token: Token,
    /// The link it was given to.
    pub link: LinkId,
    /// The reply's header and body. Its payload, `header.payload_bytes` long, is at the start of the
    /// range that was wanted.
    pub outcome: Result<(Header, Vec<u8>), PeerError>,
    /// The wanted buffer, given back.
    pub buf: Option<B>,
}

/// Why a call has no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// Never sent: there is no connection. Another call before that time ends the same way.
    #[error("the other core cannot be reached; again in {retry_after_ms} ms")]
    Unreachable {
        /// When a connection is tried again.
        retry_after_ms: u32,
    },
    /// Never sent: too many calls to this core, or to too many cores, are under way.
    #[error("too many calls to the other core")]
    Full,
    /// The link ended first. The call may or may not have been carried out.
    #[error("the connection to the other core ended")]
    Broken,
    /// This call's time was over, which ended the link. It may or may not have been carried out.
    #[error("the other core did not answer in time")]
    TimedOut,
}
