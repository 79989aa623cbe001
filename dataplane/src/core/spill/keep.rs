//! What is evicted from the shard, on its way to the spill device.
//!
//! An eviction says where its blocks are and keeps them from being written anew until they were read, which
//! starts at once or not at all: the space waits for the shard's own device only. A granule that was read
//! waits in bounded memory for its place in a batch of 4 MiB; one batch is written while the next one fills.

use super::super::fill::{FillNo, GRANULE_BLOCKS};
use super::super::{Command, Pending, Purpose};
use super::log::{Entry, Key};
use super::{BATCH_BYTES, Buffer, ShardCore, Spill, Wrong, offset_of};
use ebb_dataplane_protocol::checksum::crc32c;
use ebb_dataplane_protocol::{ContentId, InodeId};
use ebb_store::{BLOCK, ControlError, Evicted, Leaving, Ticket};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// Granules being read or waiting to be written at most, and their bytes; the others go without a copy.
const CAPTURES_MAX: usize = 256;
const CAPTURE_BYTES_MAX: usize = 16 << 20;
/// Places of a granule on the shard's device; what is more scattered is not copied.
const PIECES_MAX: usize = 16;
/// A batch is written when it is full, or this old.
const BATCH_MS: u64 = 200;

/// What a granule is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct What {
    key: Key,
    content: ContentId,
    blocks: u8,
    tail: u16,
}

impl What {
    fn bytes(&self) -> usize {
        usize::from(self.blocks) * BLOCK
    }
}

/// A part of a granule on the shard's device.
#[derive(Debug)]
struct Place {
    offset: u64,
    crcs: Vec<u32>,
}

/// A granule that is being read from the shard's device.
#[derive(Debug)]
pub(crate) struct Capture {
    what: What,
    todo: VecDeque<Place>,
    /// Bytes that were read.
    done: usize,
    /// The eviction.
    guard: u64,
}

/// A granule that was read.
#[derive(Debug)]
pub(super) struct Ready<B> {
    what: What,
    crc: u32,
    buf: B,
}

/// What the next write will bring.
#[derive(Debug)]
pub(super) struct Batch<B> {
    buf: B,
    /// Their blocks as if the batch were the log.
    entries: Vec<(Key, Entry)>,
    blocks: u32,
    since_ms: u64,
}

/// The write under way.
#[derive(Debug)]
pub(super) struct Writing<B> {
    buf: Arc<B>,
    /// Where the log has room for it.
    at: u32,
    entries: Vec<(Key, Entry)>,
    bytes: u64,
}

impl<B: Buffer> Spill<B> {
    /// What is on its way of these files is not wanted any more.
    pub(super) fn forget_under_way(&mut self, goes: impl Fn(InodeId) -> bool) {
        let stays = |e: &(Key, Entry)| !goes(e.0.0);
        if let Some(open) = &mut self.open {
            open.entries.retain(stays);
        }
        if let Some(writing) = &mut self.writing {
            writing.entries.retain(stays);
        }
        let ready = std::mem::take(&mut self.ready);
        for r in ready {
            if goes(r.what.key.0) {
                self.captures -= 1;
                self.capture_bytes -= r.what.bytes();
            } else {
                self.ready.push_back(r);
            }
        }
    }

    pub(super) fn drop_ready(&mut self) {
        self.forget_under_way(|_| true);
    }

    /// Whether it has as much to do as it takes: an eviction that can wait would better.
    pub(crate) fn is_busy(&self) -> bool {
        self.is_on()
            && (self.captures > CAPTURES_MAX / 4 || self.capture_bytes > CAPTURE_BYTES_MAX / 3)
    }

    /// Bytes that are read from the shard, gathered, or being written.
    pub(crate) fn waiting_bytes(&self) -> u64 {
        let open = self.open.as_ref().map_or(0, |o| o.blocks as usize * BLOCK);
        let writing = self.writing.as_ref().map_or(0, |w| w.bytes);
        (self.capture_bytes + open) as u64 + writing
    }

    /// A granule that is on its way to the device, and its bytes. Its entry's place means nothing yet. Looked
    /// for one by one: at most 2,304, of which most are of other files.
    pub(super) fn under_way(&self, key: &Key, content: ContentId) -> Option<(Entry, &[u8])> {
        fn of(buf: &[u8], at: u32, blocks: u8) -> &[u8] {
            &buf[at as usize * BLOCK..][..usize::from(blocks) * BLOCK]
        }
        let is_it = |e: &&(Key, Entry)| e.0 == *key && e.1.content == content;
        if let Some(open) = &self.open
            && let Some((_, e)) = open.entries.iter().find(is_it)
        {
            return Some((*e, of(open.buf.bytes(), e.at, e.blocks)));
        }
        if let Some(writing) = &self.writing
            && let Some((_, e)) = writing.entries.iter().find(is_it)
        {
            return Some((*e, of(writing.buf.bytes(), e.at - writing.at, e.blocks)));
        }
        let ready = self.ready.iter().find(|r| r.what.key == *key && r.what.content == content)?;
        let What { content, blocks, tail, .. } = ready.what;
        let entry = Entry { content, at: 0, crc: ready.crc, tail, blocks };
        Some((entry, of(ready.buf.bytes(), 0, blocks)))
    }

    /// Whether this is here already, and for a while: what is about to go is worth a new copy.
    fn has_lately(&self, what: &What) -> bool {
        let same = |e: &Entry| e.blocks == what.blocks && e.tail >= what.tail;
        let in_log = self.log.find(&what.key, what.content);
        in_log.is_some_and(|e| same(&e) && !self.log.is_old(&e))
            || self.under_way(&what.key, what.content).is_some_and(|(e, _)| same(&e))
    }
}

/// The granules of a chunk that can be copied whole: from their first block on, of one content.
fn granules_of(leaving: &[Leaving], guard: u64) -> Vec<Capture> {
    let end_of = |l: &Leaving| l.first + l.crcs.len() as u32;
    let Some((first, last)) = leaving.first().zip(leaving.last()) else { return Vec::new() };
    let granules = first.first / GRANULE_BLOCKS..end_of(last).div_ceil(GRANULE_BLOCKS);
    let mut captures = Vec::new();
    for granule in granules {
        let (start, end) = (granule * GRANULE_BLOCKS, (granule + 1) * GRANULE_BLOCKS);
        let from = leaving.partition_point(|l| end_of(l) <= start);
        let (mut at, mut tail, mut todo) = (start, BLOCK as u32, VecDeque::new());
        let content = leaving.get(from).map(|l| l.content);
        for l in &leaving[from..] {
            // A short block has zeros behind it that the next view may not know of.
            if l.first > at || at == end || tail < BLOCK as u32 || Some(l.content) != content {
                break;
            }
            let to = end_of(l).min(end);
            let part = (at - l.first) as usize..(to - l.first) as usize;
            let offset = l.offset + (part.start * BLOCK) as u64;
            todo.push_back(Place { offset, crcs: l.crcs[part].to_vec() });
            if to == end_of(l) {
                tail = l.tail_valid;
            }
            at = to;
        }
        let Some(content) = content.filter(|_| at > start && todo.len() <= PIECES_MAX) else {
            continue;
        };
        let key = (first.inode, first.chunk, granule as u8);
        let what = What { key, content, blocks: (at - start) as u8, tail: tail as u16 };
        captures.push(Capture { what, todo, done: 0, guard });
    }
    captures
}

impl<B: Buffer> ShardCore<B> {
    /// Evicts from the shard for space, and begins to copy what goes.
    pub(crate) fn evict_and_spill(
        &mut self,
        bytes: u64,
    ) -> Result<Option<(u64, Ticket)>, ControlError> {
        if !self.spill.is_on() {
            return self.store.evict(bytes);
        }
        let Some(Evicted { bytes, ticket, leaving, guard }) = self.store.evict_held(bytes)? else {
            return Ok(None);
        };
        let id = self.next_id();
        // One more than there are, so that it lasts until all have begun.
        self.spill.guards.insert(id, (guard, 1));
        let mut without = leaving.iter().map(|l| l.crcs.len() * BLOCK).sum::<usize>();
        for chunk in leaving.chunk_by(|a, b| (a.inode, a.chunk) == (b.inode, b.chunk)) {
            for capture in granules_of(chunk, id) {
                let bytes = capture.what.bytes();
                if self.spill.has_lately(&capture.what) || self.start_capture(capture) {
                    without -= bytes;
                }
            }
        }
        self.stats.spill_dropped_bytes += without as u64;
        self.captured(id);
        Ok(Some((bytes, ticket)))
    }

    /// `false`: no room for it now.
    fn start_capture(&mut self, capture: Capture) -> bool {
        let (bytes, guard) = (capture.what.bytes(), capture.guard);
        let spill = &mut self.spill;
        if spill.captures >= CAPTURES_MAX || spill.capture_bytes + bytes > CAPTURE_BYTES_MAX {
            return false;
        }
        let Some(buf) = self.buffers.take(bytes, Purpose::Spill) else { return false };
        spill.captures += 1;
        spill.capture_bytes += bytes;
        if let Some((_, captures)) = spill.guards.get_mut(&guard) {
            *captures += 1;
        }
        self.read_place(capture, buf);
        true
    }

    fn read_place(&mut self, capture: Capture, buf: B) {
        let Some(place) = capture.todo.front() else { return };
        let range = capture.done..capture.done + place.crcs.len() * BLOCK;
        let offset = place.offset;
        let token = self.expect(Pending::Capture(Box::new(capture)));
        self.out.push(Command::Read { token, offset, buf, range });
    }

    /// A part of a granule was read from the shard's device.
    pub(crate) fn capture_read(&mut self, mut capture: Capture, mut buf: B, ok: bool) {
        let Some(place) = capture.todo.pop_front() else { return };
        let range = capture.done..capture.done + place.crcs.len() * BLOCK;
        let blocks = buf.bytes()[range.clone()].chunks(BLOCK);
        let sound = ok && blocks.zip(&place.crcs).all(|(block, crc)| crc32c(block) == *crc);
        capture.done = range.end;
        if sound && self.spill.is_on() && !capture.todo.is_empty() {
            return self.read_place(capture, buf);
        }
        let what = capture.what;
        self.captured(capture.guard);
        if sound && self.spill.is_on() {
            let bytes = what.bytes();
            buf.bytes_mut()[bytes - BLOCK + usize::from(what.tail)..bytes].fill(0);
            let crc = crc32c(&buf.bytes()[..bytes]);
            self.spill.ready.push_back(Ready { what, crc, buf });
            return self.pump_spill();
        }
        // What is wrong on the shard's device is gone from it now.
        self.stats.checksum_errors += u64::from(!sound);
        self.stats.spill_dropped_bytes += what.bytes() as u64;
        self.spill.captures -= 1;
        self.spill.capture_bytes -= what.bytes();
    }

    /// One less of an eviction's granules is to be read.
    fn captured(&mut self, guard: u64) {
        let Some((_, captures)) = self.spill.guards.get_mut(&guard) else { return };
        *captures -= 1;
        if *captures == 0
            && let Some((guard, _)) = self.spill.guards.remove(&guard)
        {
            self.store.release(guard);
            // A writer may wait for the blocks it held.
            self.retry_waiting = true;
        }
    }

    /// A fill that the shard has no room for goes to the spill device at once, if that takes it.
    pub(crate) fn spill_uncached(&mut self, no: FillNo, buf: &B) {
        let Some(fill) = self.fills.get(&no).filter(|_| self.spill.is_on()) else { return };
        let ((inode, chunk, content), valid, range) = (fill.key, fill.valid, fill.blocks.clone());
        let mut start = range.start;
        while start < range.end {
            let end = (start + GRANULE_BLOCKS).min(range.end);
            let bytes =
                (start - range.start) as usize * BLOCK..(end - range.start) as usize * BLOCK;
            let tail = (valid as usize).min(bytes.end) - (bytes.end - BLOCK);
            let key = (inode, chunk, (start / GRANULE_BLOCKS) as u8);
            let what = What { key, content, blocks: (end - start) as u8, tail: tail as u16 };
            if !self.spill.has_lately(&what) && !self.keep_bytes(what, &buf.bytes()[bytes]) {
                self.stats.spill_dropped_bytes += what.bytes() as u64;
            }
            start = end;
        }
    }

    /// Keeps a copy until it is in a batch; `false`: no room for it now.
    fn keep_bytes(&mut self, what: What, bytes: &[u8]) -> bool {
        let crc = crc32c(bytes);
        if self.spill.ready.is_empty() && self.batch_has_room(u32::from(what.blocks)) {
            self.append_to_batch(what, crc, bytes);
            return true;
        }
        let spill = &mut self.spill;
        if spill.captures >= CAPTURES_MAX || spill.capture_bytes + bytes.len() > CAPTURE_BYTES_MAX {
            return false;
        }
        let Some(mut buf) = self.buffers.take(bytes.len(), Purpose::Spill) else { return false };
        buf.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        spill.captures += 1;
        spill.capture_bytes += bytes.len();
        spill.ready.push_back(Ready { what, crc, buf });
        true
    }

    /// Moves what was read into batches, and those to the device.
    fn pump_spill(&mut self) {
        while let Some(front) = self.spill.ready.front() {
            if !self.batch_has_room(u32::from(front.what.blocks)) {
                return;
            }
            let Some(Ready { what, crc, buf }) = self.spill.ready.pop_front() else { return };
            self.append_to_batch(what, crc, &buf.bytes()[..what.bytes()]);
            self.spill.captures -= 1;
            self.spill.capture_bytes -= what.bytes();
        }
    }

    /// Whether the open batch takes as many blocks; opens one, and writes a full one, if that can be.
    fn batch_has_room(&mut self, blocks: u32) -> bool {
        let full = |b: &Batch<B>| (b.blocks + blocks) as usize * BLOCK > BATCH_BYTES;
        if self.spill.open.as_ref().is_some_and(full) && !self.write_spill_batch() {
            return false;
        }
        if self.spill.open.is_none() {
            let spare = self.spill.spare.take().and_then(Arc::into_inner);
            let Some(buf) = spare.or_else(|| self.buffers.take(BATCH_BYTES, Purpose::Spill)) else {
                return false;
            };
            let since_ms = self.now_ms;
            self.spill.open = Some(Batch { buf, entries: Vec::new(), blocks: 0, since_ms });
        }
        true
    }

    fn append_to_batch(&mut self, what: What, crc: u32, bytes: &[u8]) {
        let Some(open) = self.spill.open.as_mut() else { return };
        let at = open.blocks as usize * BLOCK;
        open.buf.bytes_mut()[at..at + bytes.len()].copy_from_slice(bytes);
        let What { key, content, blocks, tail } = what;
        let entry = Entry { content, at: open.blocks, crc, tail, blocks };
        open.entries.push((key, entry));
        open.blocks += u32::from(blocks);
    }

    /// Writes the open batch; `false`: one is being written.
    fn write_spill_batch(&mut self) -> bool {
        let spill = &mut self.spill;
        if spill.writing.is_some() {
            return false;
        }
        let Some(Batch { buf, mut entries, blocks, .. }) = spill.open.take() else { return true };
        let at = spill.log.room(blocks);
        for (_, entry) in &mut entries {
            entry.at += at;
        }
        let (buf, range): (_, Range<usize>) = (Arc::new(buf), 0..blocks as usize * BLOCK);
        let bytes = range.len() as u64;
        spill.writing = Some(Writing { buf: Arc::clone(&buf), at, entries, bytes });
        let token = self.expect(Pending::SpillWrite);
        self.out.push(Command::SpillWrite { token, offset: offset_of(at), buf, range });
        true
    }

    /// The batch was written, or not: only then it can be found on the device.
    pub(crate) fn spill_written(&mut self, ok: bool) {
        let Some(Writing { buf, entries, bytes, .. }) = self.spill.writing.take() else { return };
        if ok {
            self.spill.write_errors = 0;
            self.stats.spill_written_bytes += bytes;
            if self.spill.is_on() {
                for (key, entry) in entries {
                    self.spill.log.insert(key, entry);
                }
            }
        } else {
            self.stats.spill_dropped_bytes += bytes;
            self.spill_wrong(Wrong::Write);
        }
        if self.spill.is_on() {
            self.spill.spare = Some(buf);
            self.pump_spill();
        }
    }

    /// Once a turn: a batch that nothing came to for a while is written.
    pub(crate) fn keep_spilling(&mut self) {
        self.serve_found();
        self.pump_spill();
        let due = |b: &Batch<B>| b.blocks > 0 && self.now_ms >= b.since_ms + BATCH_MS;
        if self.spill.open.as_ref().is_some_and(due) {
            self.write_spill_batch();
        }
        self.expire_spill_reads();
    }
}
