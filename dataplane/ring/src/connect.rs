//! Outgoing connections: a socket that belongs to the ring from the moment it is made.
//!
//! A connecting socket has a slot in the table of connections and an id, as an accepted one has, so
//! closing, cancelling, generations and the drain at the end are the same code. Until it is connected
//! it takes no send and no receive. The kernel bounds the attempt: a linked timeout goes with it.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::types::{Fixed, Timespec};
use io_uring::{opcode, squeue};
use nix::errno::Errno;
use nix::sys::socket::{SockaddrLike, SockaddrStorage};

use crate::conn::{Conn, ConnId};
use crate::error::{NetError, Refusal};
use crate::event::{CloseReason, Event, Token};
use crate::op::{FixedTable, Op};
use crate::reactor::Reactor;
use crate::send::Sending;
use crate::slab::Key;

/// An attempt under way.
pub(crate) struct Connect {
    pub(crate) conn: Key,
    token: Token,
    /// What the kernel reads; boxed so that it stays where it is.
    addr: Box<SockaddrStorage>,
    /// The operation that bounds it.
    pub(crate) limit: Key,
}

/// The time limit of an attempt, submitted as its link.
pub(crate) struct ConnectLimit {
    pub(crate) conn: Key,
    after: Box<Timespec>,
}

impl Reactor {
    /// Connects to `addr`; completes as [`Event::Connected`], with ETIMEDOUT at the latest after
    /// `timeout`. After a failure [`Event::Closed`] follows. TCP_NODELAY is set. The id may be closed
    /// at any time; it takes sends and receives once it is connected.
    pub fn connect(
        &mut self,
        addr: SocketAddr,
        token: Token,
        timeout: Duration,
    ) -> Result<ConnId, Refusal> {
        if self.stopping {
            return Err(Refusal::ShuttingDown);
        }
        if self.conns.is_full() {
            return Err(Refusal::NoRoom);
        }
        let stream = TcpStream::from(crate::sys::tcp_socket(&addr).map_err(Refusal::Os)?);
        if let Err(e) = stream.set_nodelay(true) {
            return Err(Refusal::Os(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))));
        }
        let fd = stream.as_raw_fd();
        let conn = Conn {
            stream,
            peer: addr,
            in_flight: 0,
            receiving: false,
            connecting: true,
            closing: None,
            close_when_sent: false,
            sending: Sending::default(),
        };
        let Ok(key) = self.conns.insert(conn) else { return Err(Refusal::NoRoom) };
        if let Err(errno) = self.ring.set_file(self.table.conn(key), fd) {
            self.conns.remove(key);
            return Err(Refusal::Os(errno));
        }
        if self.start_connect(key, addr, token, timeout).is_none() {
            self.clear_fixed(self.table.conn(key));
            self.conns.remove(key);
            return Err(Refusal::TooManyOps);
        }
        Ok(ConnId(key))
    }

    /// `None`: the slab of operations is full, which its size rules out.
    fn start_connect(
        &mut self,
        conn: Key,
        addr: SocketAddr,
        token: Token,
        timeout: Duration,
    ) -> Option<()> {
        let after = Box::new(Timespec::from(timeout));
        // Not runnable by itself: it goes to the kernel behind the attempt that it bounds.
        let limit = self.hold(Op::ConnectLimit(ConnectLimit { conn, after }))?;
        let addr = Box::new(SockaddrStorage::from(addr));
        let op = Op::Connect(Connect { conn, token, addr, limit });
        if self.start(op).is_err() {
            self.retire(limit);
            return None;
        }
        if let Some(c) = self.conns.get_mut(conn) {
            c.in_flight += 2;
        }
        Some(())
    }

    pub(crate) fn connect_done(&mut self, op: &Connect, res: i32) {
        let key = op.conn;
        let result = match res {
            0.. => Ok(()),
            // Cancelled, and not by us: the limit.
            res if -res == libc::ECANCELED && !self.is_closing(key) => {
                Err(NetError::Os(Errno::ETIMEDOUT))
            }
            res => Err(self.net_error(key, res)),
        };
        // Connected while it was being closed: nobody may use it.
        let result = if self.is_closing(key) { Err(NetError::Closed) } else { result };
        if let Some(c) = self.conns.get_mut(key) {
            c.connecting = false;
        }
        self.ready.push(Event::Connected { conn: ConnId(key), token: op.token, result });
        if let Err(NetError::Os(errno)) = result {
            self.begin_close(key, CloseReason::Broken(errno));
        }
        self.end_conn_op(key);
    }
}

pub(crate) fn connect_entry(op: &Connect, t: FixedTable) -> squeue::Entry {
    opcode::Connect::new(Fixed(t.conn(op.conn)), op.addr.as_ptr(), op.addr.len())
        .build()
        .flags(squeue::Flags::IO_LINK)
}

pub(crate) fn limit_entry(op: &ConnectLimit) -> squeue::Entry {
    opcode::LinkTimeout::new(&raw const *op.after).build()
}
