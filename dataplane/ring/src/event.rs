//! What a turn hands back.

use std::net::SocketAddr;
use std::ops::Range;

use nix::errno::Errno;

use crate::accept::ListenerId;
use crate::arena::Buf;
use crate::conn::ConnId;
use crate::disk::FileId;
use crate::error::{DiskError, NetError};
use crate::op::OpId;
use crate::segment::Segments;

/// The caller's own number for an operation; travels along unread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Token(pub u64);

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// `close` was called.
    Asked,
    /// `close_when_sent` was called and everything was sent.
    Finished,
    /// A send failed before `close_when_sent` was done, or connecting failed.
    Broken(Errno),
}

/// A completion. Each operation yields exactly one, and it gives the buffers back.
#[derive(Debug)]
pub enum Event {
    /// A device read ended. Fewer bytes than asked means the end of the file.
    Read {
        /// The operation.
        op: OpId,
        /// The file.
        file: FileId,
        /// The caller's number.
        token: Token,
        /// The buffer, given back.
        buf: Buf,
        /// The part of `buf` that was asked for.
        range: Range<usize>,
        /// Bytes read, from `range.start` on.
        result: Result<usize, DiskError>,
    },
    /// A device write ended: all of it, or an error. With `Durability::Dsync` it is durable.
    Written {
        /// The operation.
        op: OpId,
        /// The file.
        file: FileId,
        /// The caller's number.
        token: Token,
        /// The buffers, given back.
        segments: Segments,
        /// All or nothing known.
        result: Result<(), DiskError>,
    },
    /// An fdatasync ended.
    Synced {
        /// The operation.
        op: OpId,
        /// The file.
        file: FileId,
        /// The caller's number.
        token: Token,
        /// Whether everything written before it was submitted is durable.
        result: Result<(), DiskError>,
    },
    /// A connection was accepted; TCP_NODELAY is set.
    Accepted {
        /// Where.
        listener: ListenerId,
        /// The new connection.
        conn: ConnId,
        /// The peer.
        peer: SocketAddr,
    },
    /// An attempt to connect ended. After a failure `Closed` follows.
    Connected {
        /// The connection.
        conn: ConnId,
        /// The caller's number.
        token: Token,
        /// Whether it may be used now.
        result: Result<(), NetError>,
    },
    /// Accepting failed; it is tried again after a pause.
    AcceptFailed {
        /// Where.
        listener: ListenerId,
        /// Why, for example EMFILE.
        errno: Errno,
    },
    /// A receive ended.
    Received {
        /// The connection.
        conn: ConnId,
        /// The caller's number.
        token: Token,
        /// The buffer, given back.
        buf: Buf,
        /// The part of `buf` that was asked for.
        range: Range<usize>,
        /// Bytes received, from `range.start` on; for `recv_exact` all of the range.
        result: Result<usize, NetError>,
    },
    /// A message was handed to the network whole, or the connection is broken.
    Sent {
        /// The connection.
        conn: ConnId,
        /// The caller's number.
        token: Token,
        /// The buffers, given back.
        segments: Segments,
        /// All or nothing known.
        result: Result<(), NetError>,
    },
    /// A connection is gone. The last event that carries its id.
    Closed {
        /// The connection.
        conn: ConnId,
        /// Why.
        reason: CloseReason,
    },
    /// Somebody used a [`crate::Waker`] or sent to a [`crate::Mailbox`]: empty the mailboxes.
    Woken,
}
