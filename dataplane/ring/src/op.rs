//! The operations alive on a core, and the submission entries they become.
//!
//! An [`Op`] owns everything its entry points at. It sits in the slab from the call that asked for
//! it to its last completion, and its heap parts do not move while it is in the kernel.

use std::ops::Range;

use io_uring::types::{CancelBuilder, Fd, Fixed, FsyncFlags};
use io_uring::{opcode, squeue};

use crate::arena::{Arena, Buf};
use crate::connect::{Connect, ConnectLimit};
use crate::event::Token;
use crate::ring::Ring;
use crate::segment::{Segments, gather};
use crate::slab::Key;

/// Names an operation until its completion event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub(crate) Key);

impl OpId {
    /// As one number, for logs.
    pub fn to_bits(self) -> u64 {
        self.0.to_bits()
    }
}

/// The most pieces one vectored write may have.
pub(crate) const WRITE_IOV_MAX: usize = 512;

pub(crate) struct Read {
    pub(crate) file: Key,
    pub(crate) token: Token,
    pub(crate) buf: Buf,
    pub(crate) range: Range<usize>,
    pub(crate) offset: u64,
    pub(crate) done: usize,
}

pub(crate) struct Write {
    pub(crate) file: Key,
    pub(crate) token: Token,
    pub(crate) segments: Segments,
    /// What the kernel reads while a vectored write is in flight.
    pub(crate) iov: Vec<libc::iovec>,
    pub(crate) offset: u64,
    pub(crate) total: usize,
    pub(crate) done: usize,
    pub(crate) dsync: bool,
}

pub(crate) struct Recv {
    pub(crate) conn: Key,
    pub(crate) token: Token,
    pub(crate) buf: Buf,
    pub(crate) range: Range<usize>,
    pub(crate) done: usize,
    pub(crate) exact: bool,
}

pub(crate) struct Send {
    pub(crate) conn: Key,
    /// The how-manieth of its connection.
    pub(crate) number: u64,
    /// SENDMSG_ZC: a second completion says that the memory is free.
    pub(crate) zero_copy: bool,
    /// Result of the first of two completions, when the send must wait for the second.
    pub(crate) first: Option<i32>,
}

pub(crate) enum Op {
    Read(Read),
    Write(Write),
    Sync {
        file: Key,
        token: Token,
    },
    Recv(Recv),
    Send(Send),
    Accept {
        listener: Key,
    },
    Connect(Connect),
    ConnectLimit(ConnectLimit),
    /// The armed read of the wake-up eventfd.
    Wake {
        word: Box<[u8; 8]>,
    },
    Cancel(Cancel),
}

#[derive(Clone, Copy)]
pub(crate) enum Cancel {
    /// Everything on a connection.
    Conn(Key),
    /// A listener's accept.
    Listener(Key),
    /// Everything on the ring.
    All,
}

/// An operation in the slab.
pub(crate) struct Live {
    /// `None` only while its completion is being handled.
    pub(crate) op: Option<Op>,
    /// How often EAGAIN or EINTR was retried.
    pub(crate) retries: u16,
}

/// Where each kind of file lies in the fixed-file table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FixedTable {
    pub(crate) listeners_at: u32,
    pub(crate) conns_at: u32,
}

impl FixedTable {
    pub(crate) fn file(self, key: Key) -> u32 {
        key.index
    }
    pub(crate) fn listener(self, key: Key) -> u32 {
        self.listeners_at + key.index
    }
    pub(crate) fn conn(self, key: Key) -> u32 {
        self.conns_at + key.index
    }
}

pub(crate) fn read_entry(
    op: &mut Read,
    ring: &Ring,
    arena: &Arena,
    t: FixedTable,
) -> squeue::Entry {
    let fd = Fixed(t.file(op.file));
    let entry = op.buf.fixed_entry(arena).filter(|_| ring.fixed_buffers);
    let offset = op.offset + op.done as u64;
    let part = &mut op.buf[op.range.start + op.done..op.range.end];
    let (ptr, len) = (part.as_mut_ptr(), part.len() as u32);
    match entry {
        Some(index) => opcode::ReadFixed::new(fd, ptr, len, index).offset(offset).build(),
        None => opcode::Read::new(fd, ptr, len).offset(offset).build(),
    }
}

pub(crate) fn write_entry(
    op: &mut Write,
    ring: &Ring,
    arena: &Arena,
    t: FixedTable,
) -> squeue::Entry {
    let fd = Fixed(t.file(op.file));
    let offset = op.offset + op.done as u64;
    let flags = if op.dsync { libc::RWF_DSYNC } else { 0 };
    let segments = op.segments.as_slice();
    op.iov.clear();
    let covered = gather(segments, op.done, WRITE_IOV_MAX, usize::MAX, &mut op.iov);
    debug_assert_eq!(covered, op.total - op.done);
    // One registered entry must hold every piece, since an operation names one.
    let mut entries = segments.iter().map(|s| s.fixed_entry(arena));
    let first = entries.next().flatten();
    let fixed = first.filter(|_| ring.fixed_buffers && entries.all(|e| e == first));
    match (op.iov.as_slice(), fixed) {
        ([one], Some(index)) => {
            opcode::WriteFixed::new(fd, one.iov_base.cast(), one.iov_len as u32, index)
                .offset(offset)
                .rw_flags(flags)
                .build()
        }
        ([one], None) => opcode::Write::new(fd, one.iov_base.cast(), one.iov_len as u32)
            .offset(offset)
            .rw_flags(flags)
            .build(),
        (many, Some(index)) if ring.has_writev_fixed => {
            opcode::WritevFixed::new(fd, many.as_ptr(), many.len() as u32, index)
                .offset(offset)
                .rw_flags(flags)
                .build()
        }
        (many, _) => opcode::Writev::new(fd, many.as_ptr(), many.len() as u32)
            .offset(offset)
            .rw_flags(flags)
            .build(),
    }
}

pub(crate) fn sync_entry(file: Key, t: FixedTable) -> squeue::Entry {
    opcode::Fsync::new(Fixed(t.file(file))).flags(FsyncFlags::DATASYNC).build()
}

pub(crate) fn recv_entry(op: &mut Recv, t: FixedTable) -> squeue::Entry {
    let flags = if op.exact { libc::MSG_WAITALL } else { 0 };
    let part = &mut op.buf[op.range.start + op.done..op.range.end];
    opcode::Recv::new(Fixed(t.conn(op.conn)), part.as_mut_ptr(), part.len() as u32)
        .flags(flags)
        .build()
}

pub(crate) fn accept_entry(listener: Key, t: FixedTable) -> squeue::Entry {
    opcode::AcceptMulti::new(Fixed(t.listener(listener))).flags(libc::SOCK_CLOEXEC).build()
}

pub(crate) fn wake_entry(word: &mut [u8; 8], eventfd: i32) -> squeue::Entry {
    opcode::Read::new(Fd(eventfd), word.as_mut_ptr(), 8).build()
}

pub(crate) fn cancel_entry(target: Cancel, t: FixedTable) -> squeue::Entry {
    let builder = match target {
        Cancel::Conn(key) => CancelBuilder::fd(Fixed(t.conn(key))).all(),
        Cancel::Listener(key) => CancelBuilder::fd(Fixed(t.listener(key))).all(),
        Cancel::All => CancelBuilder::any(),
    };
    opcode::AsyncCancel2::new(builder).build()
}
