//! Misses that are answered from the spill device.
//!
//! A fill is whole on the device or not from it: where that changes from granule to granule, another fill begins
//! (`fill.rs`). Its reads go into the fill's own buffer, one after another, and it is served when every
//! granule has its checksum and was not written over meanwhile. Whatever else happens, the fill goes on
//! as if it had not been asked here: to the former holder, or to S3. What is still on its way to the device is
//! copied from there; a fill that needs no read is served at the end of the turn.
//!
//! A device has few reads at a time, in bytes, since they hold buffers that all fills share; the other fills wait
//! without one. A device that does not answer is passed by.

use super::super::fill::{FillKey, FillNo, GRANULE_BLOCKS};
use super::super::{Command, Pending, Starved};
use super::log::{Entry, Key};
use super::{Buffer, ShardCore, Wrong, offset_of};
use ebb_dataplane_protocol::checksum::crc32c;
use ebb_store::BLOCK;
use std::collections::VecDeque;
use std::ops::Range;

/// Reads under way at once, and their bytes; one of any size is always admitted.
const READS_MAX: usize = 16;
const READ_BYTES_MAX: usize = 2 << 20;
/// How long a fill waits for the device, or for its turn there.
const PATIENCE_MS: u64 = 1000;

/// A fill that is read from the device.
#[derive(Debug)]
pub(crate) struct SpillRead {
    id: u64,
    no: FillNo,
    bytes: usize,
    /// Device offsets, and where in the buffer.
    todo: VecDeque<(u64, Range<usize>)>,
    parts: Vec<Part>,
}

/// A granule of a fill.
#[derive(Debug)]
struct Part {
    key: Key,
    entry: Entry,
    /// Where in the fill's buffer.
    range: Range<usize>,
    /// Not on the device yet: copied from memory.
    under_way: bool,
}

/// A fill that waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    pub(super) no: FillNo,
    since_ms: u64,
}

impl<B: Buffer> ShardCore<B> {
    /// The entry that has all of a granule that counts, if `valid` bytes of the chunk do.
    fn spilled(&self, key: &FillKey, granule: u32, valid: u32) -> Option<Part> {
        let (inode, chunk, content) = *key;
        let counts = valid.checked_sub(granule * GRANULE_BLOCKS * BLOCK as u32)?;
        let counts = counts.min(GRANULE_BLOCKS * BLOCK as u32);
        let blocks = counts.div_ceil(BLOCK as u32);
        let tail = counts.checked_sub(blocks.checked_sub(1)? * BLOCK as u32)?;
        let key = (inode, chunk, granule as u8);
        // Cut shorter than the asker's view counts, or longer: another state of the file.
        let whole = |e: &Entry| u32::from(e.blocks) == blocks && u32::from(e.tail) >= tail;
        let part = |entry: Entry, under_way| Part {
            key,
            entry,
            range: 0..usize::from(entry.blocks) * BLOCK,
            under_way,
        };
        if let Some(entry) = self.spill.log.find(&key, content).filter(whole) {
            return Some(part(entry, false));
        }
        let (entry, _) = self.spill.under_way(&key, content).filter(|(e, _)| whole(e))?;
        Some(part(entry, true))
    }

    /// Whether a granule would be read from the spill device.
    pub(crate) fn is_spilled(&self, key: &FillKey, granule: u32, valid: u32) -> bool {
        self.spill.is_on() && self.spilled(key, granule, valid).is_some()
    }

    /// Where all of a fill is.
    fn spilled_fill(&self, no: FillNo) -> Option<Vec<Part>> {
        let fill = self.fills.get(&no).filter(|f| self.spill.is_on() && !f.spill_passed)?;
        let valid = fill.blocks.start * BLOCK as u32 + fill.valid;
        let granules = fill.blocks.start / GRANULE_BLOCKS..fill.blocks.end.div_ceil(GRANULE_BLOCKS);
        let mut parts = Vec::with_capacity(granules.len());
        let mut at = 0;
        for granule in granules {
            let part = self.spilled(&fill.key, granule, valid)?;
            let range = at..at + part.range.end;
            at = range.end;
            parts.push(Part { range, ..part });
        }
        (at == fill.blocks.len() * BLOCK).then_some(parts)
    }

    /// Whether a fill has to wait for its turn on the spill device; it is started again then.
    pub(crate) fn queues_for_spill(&mut self, no: FillNo) -> bool {
        let reads = |parts: Vec<Part>| parts.iter().any(|p| !p.under_way);
        if self.spill_admits(no) || !self.spilled_fill(no).is_some_and(reads) {
            return false;
        }
        self.spill.queue.push_back(Waiting { no, since_ms: self.now_ms });
        true
    }

    fn spill_admits(&self, no: FillNo) -> bool {
        let bytes = self.fills.get(&no).map_or(0, |f| f.blocks.len() * BLOCK);
        let (reads, bytes) = (self.spill.reads_out, self.spill.read_bytes_out + bytes);
        reads == 0 || (reads < READS_MAX && bytes <= READ_BYTES_MAX)
    }

    /// Reads a fill from the spill device, if all of it is there; else gives the buffer back.
    pub(crate) fn read_spilled(&mut self, no: FillNo, mut buf: B) -> Option<B> {
        let Some(parts) = self.spilled_fill(no) else { return Some(buf) };
        let mut todo: VecDeque<(u64, Range<usize>)> = VecDeque::new();
        for Part { key, entry, range, under_way } in &parts {
            if *under_way {
                let Some((_, bytes)) = self.spill.under_way(key, entry.content) else {
                    return Some(buf);
                };
                buf.bytes_mut()[range.clone()].copy_from_slice(bytes);
                continue;
            }
            let offset = offset_of(entry.at);
            match todo.back_mut() {
                // What left together lies together.
                Some((from, r)) if *from + r.len() as u64 == offset => r.end = range.end,
                _ => todo.push_back((offset, range.clone())),
            }
        }
        let id = self.next_id();
        let bytes = parts.last().map_or(0, |p| p.range.end);
        self.spill.reads.insert(id, Waiting { no, since_ms: self.now_ms });
        self.spill.reads_out += 1;
        self.spill.read_bytes_out += bytes;
        let read = SpillRead { id, no, bytes, todo, parts };
        if read.todo.is_empty() {
            // Not now: whoever wants it is not known to the fill yet.
            self.spill.found.push((read, buf));
        } else {
            self.read_next(read, buf);
        }
        None
    }

    /// Serves the fills that were copied from what is on its way to the device.
    pub(crate) fn serve_found(&mut self) {
        for (read, buf) in std::mem::take(&mut self.spill.found) {
            self.spill_read(read, buf, true);
        }
    }

    fn read_next(&mut self, mut read: SpillRead, buf: B) {
        let Some((offset, range)) = read.todo.pop_front() else { return };
        let token = self.expect(Pending::SpillRead(Box::new(read)));
        self.out.push(Command::SpillRead { token, offset, buf, range });
    }

    /// The device answered.
    pub(crate) fn spill_read(&mut self, read: SpillRead, buf: B, ok: bool) {
        let wanted = self.spill.reads.contains_key(&read.id);
        if ok && wanted && !read.todo.is_empty() {
            return self.read_next(read, buf);
        }
        self.spill.reads.remove(&read.id);
        self.spill.reads_out -= 1;
        self.spill.read_bytes_out -= read.bytes;
        if !wanted {
            // Too late; S3 was asked.
            drop(buf);
            return self.serve_spill_queue();
        }
        let log = &self.spill.log;
        // What was written over while it was read is nobody's fault.
        let there = read.parts.iter().all(|p| p.under_way || log.has(&p.key, &p.entry));
        let rotten = |p: &&Part| crc32c(&buf.bytes()[p.range.clone()]) != p.entry.crc;
        let wrong = match (ok, there) {
            (false, _) => Some(Wrong::Read),
            (true, true) if read.parts.iter().any(|p| rotten(&p)) => Some(Wrong::Checksum),
            _ => None,
        };
        if let Some(wrong) = wrong {
            for part in read.parts.iter().filter(|p| !p.under_way && (!ok || rotten(p))) {
                self.spill.log.forget(&part.key);
            }
            self.spill_wrong(wrong);
        }
        if there && wrong.is_none() {
            self.spill.read_errors = 0;
            self.stats.spill_hits += 1;
            self.stats.spill_read_bytes += read.bytes as u64;
            self.fetched(read.no, buf, Ok(()));
        } else {
            self.ask_elsewhere(read.no, buf);
        }
        self.serve_spill_queue();
    }

    /// Starts the fills whose turn it is.
    fn serve_spill_queue(&mut self) {
        while let Some(no) = self.spill.queue.front().map(|w| w.no)
            && self.spill_admits(no)
        {
            self.spill.queue.pop_front();
            self.start_or_starve(no);
        }
    }

    fn start_or_starve(&mut self, no: FillNo) {
        if !self.start_fill(no) {
            self.starve(Starved::Fill(no));
        }
    }

    /// A fill does without the spill device.
    pub(super) fn pass_spill(&mut self, no: FillNo) {
        if let Some(fill) = self.fills.get_mut(&no) {
            fill.spill_passed = true;
        }
        self.start_or_starve(no);
    }

    /// Who waited too long goes elsewhere, with another buffer.
    pub(super) fn expire_spill_reads(&mut self) {
        let now = self.now_ms;
        let late = |w: &Waiting| now >= w.since_ms + PATIENCE_MS;
        while let Some((id, waiting)) = self.spill.reads.first_key_value()
            && late(waiting)
        {
            let (id, no) = (*id, waiting.no);
            self.spill.reads.remove(&id);
            self.spill_wrong(Wrong::Late);
            self.pass_spill(no);
        }
        while let Some(waiting) = self.spill.queue.front().copied()
            && late(&waiting)
        {
            self.spill.queue.pop_front();
            self.pass_spill(waiting.no);
        }
    }
}
