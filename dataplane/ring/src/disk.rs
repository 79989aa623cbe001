//! Device operations: reads, writes, durable writes and syncs on fixed files.
//!
//! Short transfers are continued here. A read that ends off the device's alignment, or with zero
//! bytes, has reached the end of the file. A write that cannot go on is an error: this layer never
//! retries a failed device operation, because after a failed write or sync nothing can be known of
//! what the device holds (the shard above fails).

use std::ops::Range;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use crate::arena::Buf;
use crate::error::{DiskError, DiskOp, Refusal, Rejected};
use crate::event::{Event, Token};
use crate::file::DeviceFile;
use crate::op::{Op, OpId, Read, WRITE_IOV_MAX, Write};
use crate::reactor::Reactor;
use crate::segment::{Segment, Segments};
use crate::slab::Key;

/// The most bytes of one operation; the kernel's own limit is a page below 2 GiB.
const LEN_MAX: usize = 1 << 30;
/// Reads from this on begin before answers are sent (see `Reactor::turn`): beside such answers a system call more
/// is nothing.
const URGENT_READ_MIN: usize = 64 << 10;

/// A device file of this reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub(crate) Key);

/// What a write promises when it completes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The device has it; a later `sync` makes it durable.
    Buffered,
    /// Durable on completion (RWF_DSYNC): for journal records. One large write plus one sync is
    /// cheaper than a large durable write.
    Dsync,
}

pub(crate) struct FileSlot {
    pub(crate) file: DeviceFile,
    pub(crate) in_flight: u32,
}

impl Reactor {
    /// Takes over an open device file.
    pub fn add_file(&mut self, file: DeviceFile) -> Result<FileId, Rejected<DeviceFile>> {
        if self.stopping {
            return Err(Rejected { why: Refusal::ShuttingDown, back: file });
        }
        let fd = file.as_file().as_raw_fd();
        let slot = FileSlot { file, in_flight: 0 };
        let key = match self.files.insert(slot) {
            Ok(key) => key,
            Err(slot) => return Err(Rejected { why: Refusal::NoRoom, back: slot.file }),
        };
        match self.ring.set_file(self.table.file(key), fd) {
            Ok(()) => Ok(FileId(key)),
            Err(errno) => match self.files.remove(key) {
                Some(slot) => Err(Rejected { why: Refusal::Os(errno), back: slot.file }),
                None => unreachable!("the file was inserted above"),
            },
        }
    }

    /// Gives a device file back; refused while an operation is in flight on it.
    pub fn remove_file(&mut self, id: FileId) -> Result<DeviceFile, Refusal> {
        match self.files.get(id.0) {
            None => return Err(Refusal::NoFile),
            Some(slot) if slot.in_flight > 0 => return Err(Refusal::FileBusy),
            Some(_) => {}
        }
        self.clear_fixed(self.table.file(id.0));
        self.files.remove(id.0).map(|slot| slot.file).ok_or(Refusal::NoFile)
    }

    /// The device file behind an id.
    pub fn file(&self, id: FileId) -> Option<&DeviceFile> {
        self.files.get(id.0).map(|slot| &slot.file)
    }

    /// Reads `range.len()` bytes at `offset` into `buf[range]`; completes as [`Event::Read`].
    pub fn read(
        &mut self,
        file: FileId,
        token: Token,
        buf: Buf,
        range: Range<usize>,
        offset: u64,
    ) -> Result<OpId, Rejected<Buf>> {
        let check = || {
            let part = buf.get(range.clone()).ok_or(Refusal::BadRange)?;
            self.check_disk(file, offset, std::iter::once(part))
        };
        if let Err(why) = check() {
            return Err(Rejected { why, back: buf });
        }
        let urgent = range.len() >= URGENT_READ_MIN;
        let op = Read { file: file.0, token, buf, range, offset, done: 0 };
        match self.start_disk(file, Op::Read(op)) {
            Ok(key) => {
                self.urgent |= urgent;
                Ok(OpId(key))
            }
            Err(Op::Read(op)) => Err(Rejected { why: Refusal::TooManyOps, back: op.buf }),
            Err(_) => unreachable!("start_disk gives back what it was given"),
        }
    }

    /// Writes one or several segments as one contiguous run at `offset`; completes as
    /// [`Event::Written`]. Each segment must be aligned for direct I/O in address and length.
    pub fn write(
        &mut self,
        file: FileId,
        token: Token,
        segments: impl Into<Segments>,
        offset: u64,
        durability: Durability,
    ) -> Result<OpId, Rejected<Segments>> {
        let segments = segments.into();
        let list = segments.as_slice();
        let refused = if list.is_empty() || list.len() > WRITE_IOV_MAX {
            Some(Refusal::BadRange)
        } else {
            self.check_disk(file, offset, list.iter().map(Segment::bytes)).err()
        };
        if let Some(why) = refused {
            return Err(Rejected { why, back: segments });
        }
        let total = segments.total();
        let dsync = durability == Durability::Dsync;
        let iov = Vec::with_capacity(list.len());
        let op = Write { file: file.0, token, segments, iov, offset, total, done: 0, dsync };
        match self.start_disk(file, Op::Write(op)) {
            Ok(key) => {
                self.urgent |= dsync;
                Ok(OpId(key))
            }
            Err(Op::Write(op)) => Err(Rejected { why: Refusal::TooManyOps, back: op.segments }),
            Err(_) => unreachable!("start_disk gives back what it was given"),
        }
    }

    /// Makes every write whose completion event was already seen durable (fdatasync); completes as
    /// [`Event::Synced`]. It runs on a kernel worker thread: one per batch, not one per write.
    pub fn sync(&mut self, file: FileId, token: Token) -> Result<OpId, Refusal> {
        if self.stopping {
            return Err(Refusal::ShuttingDown);
        }
        if self.files.get(file.0).is_none() {
            return Err(Refusal::NoFile);
        }
        self.start_disk(file, Op::Sync { file: file.0, token })
            .map(OpId)
            .map_err(|_| Refusal::TooManyOps)
    }

    fn check_disk<'a>(
        &self,
        file: FileId,
        offset: u64,
        parts: impl Iterator<Item = &'a [u8]>,
    ) -> Result<(), Refusal> {
        if self.stopping {
            return Err(Refusal::ShuttingDown);
        }
        let align = self.files.get(file.0).ok_or(Refusal::NoFile)?.file.align();
        let (mem, off) = (align.mem as usize, u64::from(align.offset));
        let mut total = 0usize;
        if !offset.is_multiple_of(off) {
            return Err(Refusal::Misaligned);
        }
        for part in parts {
            if part.is_empty() {
                return Err(Refusal::BadRange);
            }
            let aligned = (part.as_ptr() as usize).is_multiple_of(mem)
                && (part.len() as u64).is_multiple_of(off);
            if !aligned {
                return Err(Refusal::Misaligned);
            }
            total = total.saturating_add(part.len());
        }
        let end = offset.checked_add(total as u64);
        if total > LEN_MAX || end.is_none_or(|end| end > i64::MAX as u64) {
            return Err(Refusal::BadRange);
        }
        Ok(())
    }

    fn start_disk(&mut self, file: FileId, op: Op) -> Result<Key, Op> {
        if self.disk_in_flight >= self.cfg.disk_ops_max {
            return Err(op);
        }
        let key = self.start(op)?;
        self.disk_in_flight += 1;
        if let Some(slot) = self.files.get_mut(file.0) {
            slot.in_flight += 1;
        }
        Ok(key)
    }

    fn end_disk(&mut self, file: Key) {
        self.disk_in_flight -= 1;
        if let Some(slot) = self.files.get_mut(file) {
            slot.in_flight -= 1;
        }
    }

    /// Whether a transfer of which `done` bytes happened can go on at an aligned position.
    fn can_continue(&self, file: Key, done: usize) -> bool {
        let step = self.files.get(file).map_or(1, |slot| {
            let align = slot.file.align();
            align.mem.max(align.offset) as usize
        });
        !self.stopping && done.is_multiple_of(step)
    }

    pub(crate) fn read_done(&mut self, key: Key, mut op: Read, res: i32) -> Option<Op> {
        let want = op.range.len();
        let result = if res < 0 {
            Err(disk_error(DiskOp::Read, op.offset, want, res))
        } else {
            op.done += res as usize;
            assert!(op.done <= want, "the kernel read past the buffer");
            if res > 0 && op.done < want && self.can_continue(op.file, op.done) {
                self.stats.continued += 1;
                self.runnable.push_back(key);
                return Some(Op::Read(op));
            }
            Ok(op.done)
        };
        self.end_disk(op.file);
        let Read { file, token, buf, range, .. } = op;
        let (op, file) = (OpId(key), FileId(file));
        self.ready.push(Event::Read { op, file, token, buf, range, result });
        None
    }

    pub(crate) fn write_done(&mut self, key: Key, mut op: Write, res: i32) -> Option<Op> {
        let result = if res < 0 {
            Err(disk_error(DiskOp::Write, op.offset, op.total, res))
        } else {
            op.done += res as usize;
            assert!(op.done <= op.total, "the kernel wrote past the buffer");
            if op.done == op.total {
                Ok(())
            } else if res > 0 && self.can_continue(op.file, op.done) {
                self.stats.continued += 1;
                self.runnable.push_back(key);
                return Some(Op::Write(op));
            } else {
                Err(DiskError::Stuck { offset: op.offset, len: op.total, got: op.done })
            }
        };
        self.end_disk(op.file);
        let Write { file, token, segments, .. } = op;
        let (op, file) = (OpId(key), FileId(file));
        self.ready.push(Event::Written { op, file, token, segments, result });
        None
    }

    pub(crate) fn sync_done(&mut self, key: Key, file: Key, token: Token, res: i32) {
        self.end_disk(file);
        let result = if res < 0 { Err(disk_error(DiskOp::Sync, 0, 0, res)) } else { Ok(()) };
        self.ready.push(Event::Synced { op: OpId(key), file: FileId(file), token, result });
    }
}

fn disk_error(op: DiskOp, offset: u64, len: usize, res: i32) -> DiskError {
    match Errno::from_raw(-res) {
        Errno::ECANCELED => DiskError::Cancelled(op),
        errno => DiskError::Os { op, offset, len, errno },
    }
}
