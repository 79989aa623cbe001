//! Connections: receiving, closing, and the life of a slot in the fixed-file table.
//!
//! A connection's id is its slab index and a generation; its fixed-file slot is tied to the index.
//! Both are released only when the number of operations alive on it is zero, so a completion of an
//! old tenant can never reach a new one. At most one receive is in flight per connection.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;

use crate::arena::Buf;
use crate::error::{NetError, Refusal, Rejected};
use crate::event::{CloseReason, Event, Token};
use crate::op::{Cancel, Op, Recv};
use crate::reactor::Reactor;
use crate::send::Sending;
use crate::slab::Key;

/// A connection of this reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(pub(crate) Key);

impl ConnId {
    /// Index below `conns_max`, for tables beside the reactor's; reused after `Closed`.
    pub fn index(self) -> usize {
        self.0.index as usize
    }

    /// As one number, for logs.
    pub fn to_bits(self) -> u64 {
        self.0.to_bits()
    }
}

pub(crate) struct Conn {
    pub(crate) stream: TcpStream,
    pub(crate) peer: SocketAddr,
    /// Operations alive on this connection, submitted or not.
    pub(crate) in_flight: u32,
    pub(crate) receiving: bool,
    /// Not connected yet (see `connect`).
    pub(crate) connecting: bool,
    pub(crate) closing: Option<CloseReason>,
    pub(crate) close_when_sent: bool,
    pub(crate) sending: Sending,
}

impl Reactor {
    /// Takes over a connected stream. Sets TCP_NODELAY and blocking mode.
    pub fn adopt(&mut self, stream: TcpStream) -> Result<ConnId, Rejected<TcpStream>> {
        if self.stopping {
            return Err(Rejected { why: Refusal::ShuttingDown, back: stream });
        }
        if self.conns.is_full() {
            return Err(Rejected { why: Refusal::NoRoom, back: stream });
        }
        // io_uring answers EAGAIN on a non-blocking socket where it would otherwise wait.
        let prepared = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_nodelay(true))
            .and_then(|()| stream.peer_addr());
        let peer = match prepared {
            Ok(peer) => peer,
            Err(e) => {
                let errno = Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
                return Err(Rejected { why: Refusal::Os(errno), back: stream });
            }
        };
        let fd = stream.as_raw_fd();
        let conn = Conn {
            stream,
            peer,
            in_flight: 0,
            receiving: false,
            connecting: false,
            closing: None,
            close_when_sent: false,
            sending: Sending::default(),
        };
        let key = match self.conns.insert(conn) {
            Ok(key) => key,
            Err(conn) => return Err(Rejected { why: Refusal::NoRoom, back: conn.stream }),
        };
        match self.ring.set_file(self.table.conn(key), fd) {
            Ok(()) => Ok(ConnId(key)),
            Err(errno) => match self.conns.remove(key) {
                Some(conn) => Err(Rejected { why: Refusal::Os(errno), back: conn.stream }),
                None => unreachable!("the connection was inserted above"),
            },
        }
    }

    /// The peer's address, while the connection lives.
    pub fn peer(&self, conn: ConnId) -> Option<SocketAddr> {
        self.conns.get(conn.0).map(|c| c.peer)
    }

    /// Receives what there is, at least one byte and at most `range.len()`, into `buf[range]`.
    /// Completes as [`Event::Received`]; the end of the stream is [`NetError::Eof`].
    pub fn recv_some(
        &mut self,
        conn: ConnId,
        token: Token,
        buf: Buf,
        range: Range<usize>,
    ) -> Result<(), Rejected<Buf>> {
        self.recv(conn, token, buf, range, false)
    }

    /// Receives exactly `range.len()` bytes into `buf[range]`: the rest of a payload straight into
    /// its slot. Completes as [`Event::Received`] with all of them or an error.
    pub fn recv_exact(
        &mut self,
        conn: ConnId,
        token: Token,
        buf: Buf,
        range: Range<usize>,
    ) -> Result<(), Rejected<Buf>> {
        self.recv(conn, token, buf, range, true)
    }

    fn recv(
        &mut self,
        conn: ConnId,
        token: Token,
        buf: Buf,
        range: Range<usize>,
        exact: bool,
    ) -> Result<(), Rejected<Buf>> {
        let why = match self.conns.get(conn.0) {
            _ if self.stopping => Some(Refusal::ShuttingDown),
            None => Some(Refusal::ConnClosed),
            Some(c) if c.closing.is_some() => Some(Refusal::ConnClosed),
            Some(c) if c.connecting => Some(Refusal::NotConnected),
            Some(c) if c.receiving => Some(Refusal::RecvBusy),
            Some(_) if buf.get(range.clone()).is_none_or(<[u8]>::is_empty) => {
                Some(Refusal::BadRange)
            }
            Some(_) => None,
        };
        if let Some(why) = why {
            return Err(Rejected { why, back: buf });
        }
        let op = Recv { conn: conn.0, token, buf, range, done: 0, exact };
        match self.start(Op::Recv(op)) {
            Ok(_) => {}
            Err(Op::Recv(op)) => return Err(Rejected { why: Refusal::TooManyOps, back: op.buf }),
            Err(_) => unreachable!("start gives back what it was given"),
        }
        if let Some(c) = self.conns.get_mut(conn.0) {
            c.receiving = true;
            c.in_flight += 1;
        }
        Ok(())
    }

    pub(crate) fn recv_done(&mut self, key: Key, mut op: Recv, res: i32) -> Option<Op> {
        let want = op.range.len();
        let result = if res < 0 {
            Err(self.net_error(op.conn, res))
        } else {
            op.done += res as usize;
            assert!(op.done <= want, "the kernel received past the buffer");
            if res == 0 {
                Err(NetError::Eof { got: op.done })
            } else if op.exact && op.done < want {
                self.stats.continued += 1;
                self.runnable.push_back(key);
                return Some(Op::Recv(op));
            } else {
                Ok(op.done)
            }
        };
        let result = match result {
            // Our own shutdown(2) shows as an end of stream; say whose doing it was.
            Err(NetError::Eof { .. }) if self.is_closing(op.conn) => Err(NetError::Closed),
            other => other,
        };
        let Recv { conn, token, buf, range, .. } = op;
        if let Some(c) = self.conns.get_mut(conn) {
            c.receiving = false;
        }
        self.ready.push(Event::Received { conn: ConnId(conn), token, buf, range, result });
        self.end_conn_op(conn);
        None
    }

    /// Closes a connection at once: queued messages come back as `Sent` with an error, operations
    /// in flight are cancelled, and [`Event::Closed`] follows as its last event. Closing twice, or
    /// after the end, does nothing.
    pub fn close(&mut self, conn: ConnId) {
        self.begin_close(conn.0, CloseReason::Asked);
    }

    /// Closes a connection after everything queued was handed to the network; further sends are
    /// refused. If the peer is still sending, what it did not get yet can be lost to a reset: read
    /// to the end first where that matters. A peer that never reads holds this up for ever; give it
    /// a deadline and then [`Reactor::close`] it.
    pub fn close_when_sent(&mut self, conn: ConnId) {
        let Some(c) = self.conns.get_mut(conn.0) else { return };
        if c.closing.is_some() {
            return;
        }
        c.close_when_sent = true;
        if c.sending.is_done() {
            self.begin_close(conn.0, CloseReason::Finished);
        }
    }

    pub(crate) fn begin_close(&mut self, key: Key, reason: CloseReason) {
        let Some(c) = self.conns.get_mut(key) else { return };
        if c.closing.is_some() {
            return;
        }
        c.closing = Some(reason);
        // Wakes operations that wait for the peer. It fails only if the peer is gone already.
        let _ = c.stream.shutdown(Shutdown::Both);
        // Bytes in the socket's send queue that were sent without a copy keep their memory in use
        // for as long as the peer does not read. Only a reset lets go of them.
        if c.sending.zc_alive > 0
            && let Err(errno) = crate::sys::reset_connection(c.stream.as_fd())
        {
            tracing::debug!(%errno, "resetting a connection");
        }
        let (in_flight, sending) = (c.in_flight, c.sending.in_flight);
        if !sending {
            self.fail_queue(key, NetError::Closed);
        }
        if in_flight == 0 {
            self.free_conn(key);
            return;
        }
        // shutdown(2) does not reach an operation parked on a kernel worker; a cancel does. If the
        // slab were full the shutdown alone would still end them.
        if self.start(Op::Cancel(Cancel::Conn(key))).is_ok()
            && let Some(c) = self.conns.get_mut(key)
        {
            c.in_flight += 1;
        }
    }

    pub(crate) fn is_closing(&self, key: Key) -> bool {
        self.conns.get(key).is_none_or(|c| c.closing.is_some())
    }

    /// What a negative result on this connection means.
    pub(crate) fn net_error(&self, key: Key, res: i32) -> NetError {
        match Errno::from_raw(-res) {
            Errno::ECANCELED => NetError::Closed,
            _ if self.is_closing(key) => NetError::Closed,
            errno => NetError::Os(errno),
        }
    }

    /// One operation on the connection had its last completion.
    pub(crate) fn end_conn_op(&mut self, key: Key) {
        let Some(c) = self.conns.get_mut(key) else { return };
        c.in_flight -= 1;
        if c.in_flight == 0 && c.closing.is_some() {
            self.free_conn(key);
        }
    }

    fn free_conn(&mut self, key: Key) {
        self.clear_fixed(self.table.conn(key));
        let Some(conn) = self.conns.remove(key) else { return };
        debug_assert!(conn.in_flight == 0 && conn.sending.queue.is_empty());
        let reason = conn.closing.unwrap_or(CloseReason::Asked);
        self.ready.push(Event::Closed { conn: ConnId(key), reason });
    }
}
