//! Listening sockets: one multishot accept each, re-armed when the kernel ends it.
//!
//! A connection past `conns_max` is closed as it is accepted (I9). After a failure such as EMFILE
//! accepting pauses for a moment instead of spinning.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::error::{Refusal, Rejected};
use crate::event::Event;
use crate::op::{Cancel, Op};
use crate::reactor::Reactor;
use crate::slab::Key;

const PAUSE: Duration = Duration::from_millis(100);

/// A listening socket of this reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ListenerId(pub(crate) Key);

pub(crate) struct Listener {
    // Held for its descriptor, which the fixed-file table refers to.
    _socket: TcpListener,
    in_flight: u32,
    closing: bool,
    /// When to accept again after a failure.
    resume: Option<Instant>,
}

impl Reactor {
    /// Binds `addr` (port 0: any) and accepts from now on. Answers the address bound.
    pub fn listen(&mut self, addr: SocketAddr) -> std::io::Result<(ListenerId, SocketAddr)> {
        let socket = TcpListener::bind(addr)?;
        let bound = socket.local_addr()?;
        let id = self.add_listener(socket).map_err(|r| match r.why {
            Refusal::Os(errno) => std::io::Error::from(errno),
            why => std::io::Error::other(why),
        })?;
        Ok((id, bound))
    }

    /// Takes over a bound socket, for example one bound before this core's thread started.
    pub fn add_listener(
        &mut self,
        socket: TcpListener,
    ) -> Result<ListenerId, Rejected<TcpListener>> {
        if self.stopping {
            return Err(Rejected { why: Refusal::ShuttingDown, back: socket });
        }
        // io_uring answers EAGAIN on a non-blocking socket where it would otherwise wait.
        if let Err(e) = socket.set_nonblocking(false) {
            let errno = Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
            return Err(Rejected { why: Refusal::Os(errno), back: socket });
        }
        let fd = socket.as_raw_fd();
        let listener = Listener { _socket: socket, in_flight: 0, closing: false, resume: None };
        let key = match self.listeners.insert(listener) {
            Ok(key) => key,
            Err(l) => return Err(Rejected { why: Refusal::NoRoom, back: l._socket }),
        };
        if let Err(errno) = self.ring.set_file(self.table.listener(key), fd) {
            return match self.listeners.remove(key) {
                Some(l) => Err(Rejected { why: Refusal::Os(errno), back: l._socket }),
                None => unreachable!("the listener was inserted above"),
            };
        }
        self.arm_accept(key);
        Ok(ListenerId(key))
    }

    /// Stops accepting and closes the socket; connections live on.
    pub fn close_listener(&mut self, id: ListenerId) {
        let Some(l) = self.listeners.get_mut(id.0) else { return };
        if l.closing {
            return;
        }
        l.closing = true;
        l.resume = None;
        if l.in_flight == 0 {
            self.free_listener(id.0);
        } else if self.start(Op::Cancel(Cancel::Listener(id.0))).is_ok()
            && let Some(l) = self.listeners.get_mut(id.0)
        {
            l.in_flight += 1;
        }
    }

    fn arm_accept(&mut self, key: Key) {
        let armed = self.start(Op::Accept { listener: key }).is_ok();
        let Some(l) = self.listeners.get_mut(key) else { return };
        if armed {
            l.in_flight += 1;
            l.resume = None;
        } else {
            l.resume = Some(Instant::now() + PAUSE);
            self.listeners_paused = true;
        }
    }

    pub(crate) fn is_listener_closing(&self, key: Key) -> bool {
        self.listeners.get(key).is_none_or(|l| l.closing)
    }

    /// The accept operation answered; `more` says that it goes on.
    pub(crate) fn accept_done(
        &mut self,
        key: Key,
        listener: Key,
        res: i32,
        more: bool,
    ) -> Option<Op> {
        if res >= 0 {
            // SAFETY: a non-negative accept result is a descriptor that the kernel made for this
            // process just now and that nobody else knows.
            let fd = unsafe { OwnedFd::from_raw_fd(res) };
            self.accepted(listener, TcpStream::from(fd));
        }
        if more {
            return Some(Op::Accept { listener });
        }
        let errno = Errno::from_raw(if res < 0 { -res } else { 0 });
        let closing = self.stopping || self.is_listener_closing(listener);
        if !closing && matches!(res, 0..) {
            self.runnable.push_back(key);
            return Some(Op::Accept { listener });
        }
        if !closing {
            self.ready.push(Event::AcceptFailed { listener: ListenerId(listener), errno });
            if let Some(l) = self.listeners.get_mut(listener) {
                l.resume = Some(Instant::now() + PAUSE);
                self.listeners_paused = true;
            }
        }
        self.end_listener_op(listener);
        None
    }

    fn accepted(&mut self, listener: Key, stream: TcpStream) {
        match self.adopt(stream) {
            Ok(conn) => {
                let Some(peer) = self.peer(conn) else { return };
                let listener = ListenerId(listener);
                self.ready.push(Event::Accepted { listener, conn, peer });
            }
            // Dropping the stream closes it: no room, or the peer is gone already.
            Err(rejected) => {
                self.stats.conns_refused += 1;
                tracing::debug!(why = %rejected.why, "connection refused");
            }
        }
    }

    pub(crate) fn end_listener_op(&mut self, key: Key) {
        let Some(l) = self.listeners.get_mut(key) else { return };
        l.in_flight -= 1;
        if l.in_flight == 0 && l.closing {
            self.free_listener(key);
        }
    }

    fn free_listener(&mut self, key: Key) {
        self.clear_fixed(self.table.listener(key));
        self.listeners.remove(key);
    }

    /// Arms paused listeners whose time has come; answers how long until the next.
    pub(crate) fn resume_listeners(&mut self) -> Option<Duration> {
        if !self.listeners_paused {
            return None;
        }
        let mut next: Option<Duration> = None;
        for key in self.listeners.keys() {
            let Some(at) = self.listeners.get(key).and_then(|l| l.resume) else { continue };
            let now = Instant::now();
            if at <= now {
                self.arm_accept(key);
            } else {
                next = Some(next.map_or(at - now, |n| n.min(at - now)));
            }
        }
        self.listeners_paused = next.is_some();
        next
    }
}
