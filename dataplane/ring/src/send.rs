//! Sending: a bounded queue per connection, one `sendmsg` in flight for all that is in it.
//!
//! Messages queued while a send is in flight, or within one turn, leave in one system call.
//! Delivery to the network is complete: a partial send is continued. A failed send breaks the
//! connection: every queued message comes back with the error and further sends are refused.
//!
//! A message comes back when no send that covered a part of it is alive, and messages come back in
//! order. With zero-copy sends several are alive at once, and the kernel lets go of their memory in
//! any order: a plain send, or a later one that copied after all, is done before those ahead of it.

use std::collections::VecDeque;

use io_uring::types::Fixed;
use io_uring::{opcode, squeue};
use nix::errno::Errno;

use crate::conn::{Conn, ConnId};
use crate::error::{NetError, Refusal, Rejected};
use crate::event::{CloseReason, Event, Token};
use crate::op::{FixedTable, Op, Send};
use crate::reactor::Reactor;
use crate::segment::{Segment, Segments, gather};
use crate::slab::Key;

/// Pieces in one sendmsg: the kernel's limit.
const IOV_MAX: usize = 1024;
/// Bytes in one sendmsg. The kernel copies them while the turn waits, a MiB in a quarter of a millisecond: with
/// more, the device runs out of requests meanwhile (reads of 1 MiB were a third slower with 8 MiB).
const BYTES_MAX: usize = 1 << 20;
/// The same for a zero-copy send, which takes no such time.
const ZC_BYTES_MAX: usize = 8 << 20;
/// Below this a zero-copy send costs more than the copy it saves.
const ZC_MIN: usize = 64 << 10;
/// Zero-copy sends of one connection whose memory the kernel still holds.
pub(crate) const ZC_HELD_MAX: u32 = 4;

/// One queued message.
pub(crate) struct Message {
    token: Token,
    segments: Segments,
    total: usize,
}

/// A send operation that had not its last completion yet.
struct Alive {
    number: u64,
    ended: bool,
}

/// A message that is done but for memory that a send may still read.
struct Held {
    message: Message,
    result: Result<(), NetError>,
    /// The last send that may have covered a part of it.
    last: u64,
}

/// The sending side of a connection.
#[derive(Default)]
pub(crate) struct Sending {
    pub(crate) queue: VecDeque<Message>,
    /// Bytes of the front message that are sent already.
    front_sent: usize,
    /// A send operation covers the front of the queue; then the queue only grows at its back.
    pub(crate) in_flight: bool,
    /// Bytes that operation covers.
    covered: usize,
    /// Zero-copy sends alive: in flight, or waiting for the kernel to let go of their memory.
    pub(crate) zc_alive: u32,
    /// The number of the last send begun; they count up from 1.
    last: u64,
    /// Sends from the oldest that had not its last completion, in order.
    alive: VecDeque<Alive>,
    /// In order of sending.
    held: VecDeque<Held>,
    /// In the reactor's list of connections to send on.
    listed: bool,
    broken: Option<Errno>,
    scratch: Option<Box<Scratch>>,
}

impl Sending {
    /// Everything was sent and no memory is held for it.
    pub(crate) fn is_done(&self) -> bool {
        self.queue.is_empty() && self.alive.is_empty()
    }

    fn begin(&mut self) -> u64 {
        self.last += 1;
        self.alive.push_back(Alive { number: self.last, ended: false });
        self.last
    }

    /// A send had its last completion: says what may go back.
    fn end(&mut self, number: u64) -> impl Iterator<Item = Held> {
        if let Some(send) = self.alive.iter_mut().find(|a| a.number == number) {
            send.ended = true;
        }
        while self.alive.front().is_some_and(|a| a.ended) {
            self.alive.pop_front();
        }
        let oldest = self.alive.front().map_or(u64::MAX, |a| a.number);
        let free = self.held.iter().take_while(|h| h.last < oldest).count();
        self.held.drain(..free)
    }
}

/// What the kernel reads while a send is in flight; boxed so that it stays where it is.
struct Scratch {
    header: libc::msghdr,
    iov: Vec<libc::iovec>,
}

impl Scratch {
    fn new() -> Box<Scratch> {
        // SAFETY: an all-zero msghdr is a valid value of that plain C struct.
        let header: libc::msghdr = unsafe { std::mem::zeroed() };
        Box::new(Scratch { header, iov: Vec::with_capacity(16) })
    }
}

impl Reactor {
    /// Queues a message of one or several segments; completes as [`Event::Sent`] when all of it
    /// was handed to the network. Messages of a connection leave in order.
    pub fn send(
        &mut self,
        conn: ConnId,
        token: Token,
        segments: impl Into<Segments>,
    ) -> Result<(), Rejected<Segments>> {
        let segments = segments.into();
        let total = segments.total();
        let limit = self.cfg.send_queue_max;
        let bad_range = || {
            total == 0
                || segments.as_slice().iter().any(|s| match s {
                    Segment::Buf(_, r) | Segment::Shared(_, r) => s.len() != r.len(),
                    Segment::Bytes(_) | Segment::Static(_) => false,
                })
        };
        let why = match self.conns.get_mut(conn.0) {
            _ if self.stopping => Refusal::ShuttingDown,
            None => Refusal::ConnClosed,
            Some(c) if c.closing.is_some() || c.close_when_sent => Refusal::ConnClosed,
            Some(c) if c.connecting => Refusal::NotConnected,
            Some(c) if c.sending.broken.is_some() => Refusal::ConnClosed,
            Some(c) if c.sending.queue.len() >= limit => Refusal::QueueFull,
            Some(_) if bad_range() => Refusal::BadRange,
            Some(c) => {
                c.sending.queue.push_back(Message { token, segments, total });
                self.list_for_sending(conn.0);
                return Ok(());
            }
        };
        Err(Rejected { why, back: segments })
    }

    /// Messages waiting or in flight on a connection.
    pub fn send_queue_len(&self, conn: ConnId) -> usize {
        self.conns.get(conn.0).map_or(0, |c| c.sending.queue.len())
    }

    fn list_for_sending(&mut self, key: Key) {
        let Some(c) = self.conns.get_mut(key) else { return };
        if !c.sending.listed && !c.sending.in_flight {
            c.sending.listed = true;
            self.send_ready.push(key);
        }
    }

    /// Starts one send per connection that has messages and none in flight.
    pub(crate) fn flush_sends(&mut self) {
        let list = std::mem::take(&mut self.send_ready);
        for &key in &list {
            let Some(c) = self.conns.get_mut(key) else { continue };
            c.sending.listed = false;
            let s = &c.sending;
            if s.in_flight || s.queue.is_empty() || c.closing.is_some() || s.broken.is_some() {
                continue;
            }
            let waiting: usize = s.queue.iter().map(|m| m.total).sum::<usize>() - s.front_sent;
            let zero_copy = self.cfg.send_zc
                && !self.zc_refused
                && self.ring.has_send_zc
                && waiting >= ZC_MIN
                && s.zc_alive < ZC_HELD_MAX;
            let number = s.last + 1;
            let op = Send { conn: key, number, zero_copy, first: None };
            if self.start(Op::Send(op)).is_err() {
                // The slab is sized for one send per connection; try again next turn all the same.
                self.list_for_sending(key);
                continue;
            }
            if let Some(c) = self.conns.get_mut(key) {
                c.sending.in_flight = true;
                let begun = c.sending.begin();
                debug_assert_eq!(begun, number);
                c.sending.zc_alive += u32::from(zero_copy);
                c.in_flight += 1;
            }
        }
        // Keep the allocation unless something was listed meanwhile.
        if self.send_ready.is_empty() {
            self.send_ready = list;
            self.send_ready.clear();
        }
    }

    pub(crate) fn send_done(
        &mut self,
        mut op: Send,
        res: i32,
        more: bool,
        notif: bool,
    ) -> Option<Op> {
        // Pages of a zero-copy send count against the memlock limit: past it, copy.
        let no_memory = matches!(Errno::from_raw(-res), Errno::ENOBUFS | Errno::ENOMEM);
        let res = if op.zero_copy && !notif && res < 0 && no_memory {
            if !self.zc_refused {
                tracing::warn!("zero-copy sends need more lockable memory; copying from now on");
            }
            self.zc_refused = true;
            -libc::EAGAIN
        } else {
            res
        };
        let key = op.conn;
        if notif {
            // The kernel let go of the memory of a zero-copy send.
            self.end_send(&op, op.first);
            return None;
        }
        if more {
            // First completion of a zero-copy send. If all of it went out, the next send may start
            // now; else the rest waits for the notification, as its memory is still in use.
            let whole =
                self.conns.get(key).is_some_and(|c| res > 0 && res as usize == c.sending.covered);
            if whole {
                self.advance(key, res);
            } else {
                op.first = Some(res);
            }
            return Some(Op::Send(op));
        }
        self.end_send(&op, Some(res));
        None
    }

    /// The last completion of a send; `res`: its result, unless that is booked already.
    fn end_send(&mut self, op: &Send, res: Option<i32>) {
        let key = op.conn;
        if let Some(c) = self.conns.get_mut(key) {
            c.sending.zc_alive -= u32::from(op.zero_copy);
            for Held { message, result, .. } in c.sending.end(op.number) {
                self.ready.push(message.sent(key, result));
            }
        }
        if let Some(res) = res {
            self.advance(key, res);
        }
        if self.conns.get(key).is_some_and(|c| c.close_when_sent && c.sending.is_done()) {
            self.begin_close(key, CloseReason::Finished);
        }
        self.end_conn_op(key);
    }

    /// Books `res` sent bytes (or an error) against the front of the queue. Whole messages go out as
    /// events, or are held.
    fn advance(&mut self, key: Key, res: i32) {
        let closing = self.is_closing(key);
        let Some(c) = self.conns.get_mut(key) else { return };
        let s = &mut c.sending;
        s.in_flight = false;
        let mut left = res.max(0) as usize;
        assert!(left <= s.covered, "the kernel sent more than it was given");
        s.covered = 0;
        while let Some(front) = s.queue.front() {
            let rest = front.total - s.front_sent;
            if left < rest {
                s.front_sent += left;
                break;
            }
            left -= rest;
            s.front_sent = 0;
            let Some(m) = s.queue.pop_front() else { break };
            give_back(key, s, m, Ok(()), &mut self.ready);
        }
        let retry = matches!(Errno::from_raw(-res), Errno::EAGAIN | Errno::EINTR);
        if closing {
            self.fail_queue(key, NetError::Closed);
        } else if res < 0 && !retry {
            let errno = Errno::from_raw(-res);
            if let Some(c) = self.conns.get_mut(key) {
                c.sending.broken = Some(errno);
            }
            let close = self.conns.get(key).is_some_and(|c| c.close_when_sent);
            self.fail_queue(key, NetError::Os(errno));
            if close {
                self.begin_close(key, CloseReason::Broken(errno));
            }
        } else if !self.conns.get(key).is_some_and(|c| c.sending.queue.is_empty()) {
            self.list_for_sending(key);
        }
    }

    /// Gives every queued message back with `error`. Only while no send is in flight.
    pub(crate) fn fail_queue(&mut self, key: Key, error: NetError) {
        let Some(c) = self.conns.get_mut(key) else { return };
        debug_assert!(!c.sending.in_flight);
        c.sending.front_sent = 0;
        while let Some(m) = c.sending.queue.pop_front() {
            give_back(key, &mut c.sending, m, Err(error), &mut self.ready);
        }
    }
}

impl Message {
    fn sent(self, key: Key, result: Result<(), NetError>) -> Event {
        Event::Sent { conn: ConnId(key), token: self.token, segments: self.segments, result }
    }
}

/// A message off the queue: out, or held while a send is alive that may read it or one before it.
fn give_back(
    key: Key,
    s: &mut Sending,
    message: Message,
    result: Result<(), NetError>,
    ready: &mut Vec<Event>,
) {
    if s.alive.is_empty() {
        ready.push(message.sent(key, result));
    } else {
        s.held.push_back(Held { message, result, last: s.last });
    }
}

/// The submission entry for what is queued on `conn` now.
pub(crate) fn send_entry(
    key: Key,
    conn: &mut Conn,
    zero_copy: bool,
    t: FixedTable,
) -> squeue::Entry {
    let s = &mut conn.sending;
    let scratch = s.scratch.get_or_insert_with(Scratch::new);
    scratch.iov.clear();
    let mut skip = s.front_sent;
    let mut covered = 0;
    let bytes_max = if zero_copy { ZC_BYTES_MAX } else { BYTES_MAX };
    for m in &s.queue {
        if scratch.iov.len() >= IOV_MAX || covered >= bytes_max {
            break;
        }
        let room = bytes_max - covered;
        let got = gather(m.segments.as_slice(), skip, IOV_MAX, room, &mut scratch.iov);
        covered += got;
        if got < m.total - skip {
            break;
        }
        skip = 0;
    }
    s.covered = covered;
    scratch.header.msg_iov = scratch.iov.as_mut_ptr();
    scratch.header.msg_iovlen = scratch.iov.len();
    let header: *const libc::msghdr = &raw const scratch.header;
    // WAITALL: the kernel itself continues a partial send where it can.
    let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
    let fd = Fixed(t.conn(key));
    if zero_copy {
        opcode::SendMsgZc::new(fd, header).flags(flags).build()
    } else {
        opcode::SendMsg::new(fd, header).flags(flags).build()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every order in which the kernel may let go of four sends, each with a message that ends in
    /// it and one that goes on in the next.
    #[test]
    fn messages_come_back_in_order_and_not_before_every_send_that_read_them() {
        let key = Key { index: 0, generation: 0 };
        let orders = (0..256u32).map(|n| [n & 3, n >> 2 & 3, n >> 4 & 3, n >> 6 & 3]);
        let all = |order: &[u32; 4]| (0..4).all(|n| order.contains(&n));
        for order in orders.filter(all) {
            let (mut s, mut ready, mut ended) = (Sending::default(), Vec::new(), Vec::new());
            for n in 0..4u64 {
                assert_eq!(s.begin(), n + 1);
                for token in [10 * n, 10 * n + 1] {
                    let message =
                        Message { token: Token(token), segments: vec![1u8].into(), total: 1 };
                    give_back(key, &mut s, message, Ok(()), &mut ready);
                }
            }
            assert!(ready.is_empty());
            let mut back = Vec::new();
            for send in order.map(u64::from) {
                ended.push(send);
                back.extend(s.end(send + 1).map(|h| h.message.token.0));
                let whole = (0..4).take_while(|n| ended.contains(n));
                let want: Vec<u64> = whole.flat_map(|n| [10 * n, 10 * n + 1]).collect();
                assert_eq!(back, want, "{order:?}, {ended:?}");
            }
            assert!(s.is_done());
        }
    }
}
