//! The journal ring: batches of records, one write each, chained by checksum (docs/FORMAT.md §4).
//!
//! Positions are virtual page numbers that only grow; the ring page is the position modulo the ring's
//! size. A batch never wraps: if it does not fit before the ring's end it starts at the next lap.
//! One batch is in flight at a time, so that no valid batch can exist behind a torn one: the recovery
//! rule rests on that.

use crate::codec::{Put, Reader};
use crate::device::AlignedBuf;
use crate::extent::Run;
use crate::geometry::{FORMAT_VERSION, Geometry};
use crate::record::Record;
use crate::types::{BLOCK, BatchId, JournalBatch, Ticket};
use ebb_dataplane_protocol::crc32c;
use std::collections::VecDeque;

const MAGIC: u32 = u32::from_le_bytes(*b"EBBJ");
/// Bytes of a batch header.
pub(crate) const BATCH_HEADER_BYTES: usize = 64;
const BATCH_PAGES_MAX: u32 = 256;
const _: () = assert!(BATCH_PAGES_MAX as usize * BLOCK == 1 << 20);

/// A batch's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BatchHeader {
    pub(crate) sequence: u64,
    /// Header checksum of the batch before.
    pub(crate) previous: u32,
    /// Ring page where the batch says it is (a misdirected write tells).
    pub(crate) page: u32,
    pub(crate) record_bytes: u32,
    pub(crate) records: u32,
    pub(crate) data_pages: u32,
    pub(crate) records_crc: u32,
}

impl BatchHeader {
    pub(crate) fn record_pages(&self) -> u32 {
        (BATCH_HEADER_BYTES + self.record_bytes as usize).div_ceil(BLOCK) as u32
    }
    pub(crate) fn pages(&self) -> u32 {
        self.record_pages() + self.data_pages
    }
    pub(crate) fn encode(&self, store: u128) -> [u8; BATCH_HEADER_BYTES] {
        let mut b = Vec::with_capacity(BATCH_HEADER_BYTES);
        b.u32(MAGIC);
        b.u32(FORMAT_VERSION);
        b.u128(store);
        b.u64(self.sequence);
        b.u32(self.previous);
        b.u32(self.page);
        b.u32(self.record_bytes);
        b.u32(self.records);
        b.u32(self.data_pages);
        b.u32(self.records_crc);
        b.u32(0);
        let crc = crc32c(&b);
        b.u32(crc);
        b.try_into().expect("64 bytes by the layout")
    }
    /// The header and its checksum, if these bytes are one of this store.
    pub(crate) fn decode(bytes: &[u8], store: u128) -> Option<(Self, u32)> {
        let bytes = bytes.get(..BATCH_HEADER_BYTES)?;
        let mut r = Reader::new(bytes);
        if r.u32()? != MAGIC || r.u32()? != FORMAT_VERSION || r.u128()? != store {
            return None;
        }
        let h = Self {
            sequence: r.u64()?,
            previous: r.u32()?,
            page: r.u32()?,
            record_bytes: r.u32()?,
            records: r.u32()?,
            data_pages: r.u32()?,
            records_crc: r.u32()?,
        };
        let zero = r.u32()?;
        let crc = r.u32()?;
        let sound = zero == 0
            && crc32c(&bytes[..BATCH_HEADER_BYTES - 4]) == crc
            && h.record_bytes as usize <= BATCH_PAGES_MAX as usize * BLOCK
            && h.data_pages <= BATCH_PAGES_MAX
            && h.pages() <= BATCH_PAGES_MAX;
        sound.then_some((h, crc))
    }
}

/// A mutation that waits for a batch.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) ticket: Ticket,
    pub(crate) record: Record,
    pub(crate) inline: Vec<u8>,
    pub(crate) encoded: usize,
    pub(crate) urgent: bool,
    pub(crate) needs_sync: bool,
}

/// The batch in flight.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(crate) sequence: u64,
    pub(crate) entries: Vec<(Ticket, Record)>,
    end: u64,
    crc: u32,
}

/// Where replay would start after everything applied so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) at: u64,
    pub(crate) sequence: u64,
    pub(crate) previous: u32,
}

/// How much of the journal a record may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Share {
    /// Client writes and fills: three quarters.
    Data,
    /// Control: seven eighths, so that flushes go on when writers wait.
    Control,
    /// Relocations: all, so that a checkpoint can always finish.
    Internal,
}

#[derive(Debug)]
pub(crate) struct Journal {
    store: u128,
    /// Absolute device block of ring page 0.
    first_block: u32,
    /// Pages of the ring.
    pub(crate) pages: u32,
    batch_pages_max: u32,
    /// First page in use.
    pub(crate) tail: u64,
    /// Next free page.
    head: u64,
    /// After the last applied batch.
    pub(crate) applied: Position,
    pub(crate) waiting: VecDeque<Entry>,
    waiting_record_bytes: usize,
    waiting_data_pages: u32,
    pub(crate) in_flight: Option<InFlight>,
    urgent: usize,
    next_ticket: u64,
    pub(crate) batches: u64,
    /// Records in them.
    pub(crate) records: u64,
}

impl Journal {
    /// A journal whose live data starts `live_pages` before `at`, the replay's end.
    pub(crate) fn new(geometry: &Geometry, store: u128, tail: u64, applied: Position) -> Self {
        let pages = (geometry.journal_bytes / BLOCK as u64) as u32;
        assert!(applied.at >= tail && applied.at - tail <= u64::from(pages), "the ring's bounds");
        Self {
            store,
            first_block: (geometry.journal_start() / BLOCK as u64) as u32,
            pages,
            batch_pages_max: (pages / 16).min(BATCH_PAGES_MAX),
            tail,
            head: applied.at,
            applied,
            waiting: VecDeque::new(),
            waiting_record_bytes: 0,
            waiting_data_pages: 0,
            in_flight: None,
            urgent: 0,
            next_ticket: 1,
            batches: 0,
            records: 0,
        }
    }

    pub(crate) fn used_pages(&self) -> u32 {
        (self.head - self.tail) as u32
    }
    fn ring_page(&self, position: u64) -> u32 {
        (position % u64::from(self.pages)) as u32
    }
    pub(crate) fn block_of(&self, position: u64) -> u32 {
        self.first_block + self.ring_page(position)
    }
    /// Whether a device block is inside the ring.
    pub(crate) fn contains(&self, block: u32) -> bool {
        (self.first_block..self.first_block + self.pages).contains(&block)
    }
    /// Device blocks of positions `[from, to)`: at most two ranges.
    pub(crate) fn blocks_between(&self, from: u64, to: u64) -> Vec<std::ops::Range<u32>> {
        assert!(to - from <= u64::from(self.pages));
        if from == to {
            return Vec::new();
        }
        let (a, n) = (self.ring_page(from), (to - from) as u32);
        let first = n.min(self.pages - a);
        let mut out = Vec::with_capacity(2);
        out.push(self.first_block + a..self.first_block + a + first);
        if n > first {
            out.push(self.first_block..self.first_block + n - first);
        }
        out
    }
    /// Where a batch of `pages` starts if the next free position is `at`.
    pub(crate) fn place(&self, at: u64, pages: u32) -> u64 {
        place(at, pages, self.pages)
    }

    /// Whether a record may be appended now.
    pub(crate) fn has_room(&self, share: Share, data_pages: u32) -> bool {
        let limit = match share {
            Share::Data => self.pages / 4 * 3,
            Share::Control => self.pages / 8 * 7,
            Share::Internal => self.pages,
        };
        self.projected_pages() + data_pages < limit
    }
    /// Records waiting, and how many of them somebody waits for.
    pub(crate) fn waiting_counts(&self) -> (usize, usize) {
        (self.waiting.len(), self.urgent)
    }
    /// Whether too much waits for a batch already.
    pub(crate) fn backlogged(&self) -> bool {
        self.waiting_pages() > 4 * self.batch_pages_max || self.waiting.len() > 16_384
    }
    fn waiting_pages(&self) -> u32 {
        self.waiting_data_pages + self.waiting_record_bytes.div_ceil(BLOCK) as u32
    }
    fn projected_pages(&self) -> u32 {
        // Each batch may round up by a page and one may skip the end of the ring.
        let waiting = self.waiting_pages();
        self.used_pages() + waiting + 2 * (waiting / self.batch_pages_max + 1)
    }

    /// Pages of a batch with nothing but this record; `None`: it has no room in one.
    pub(crate) fn pages_of(&self, record: &Record) -> Option<u32> {
        let mut scratch = Vec::new();
        record.encode(&mut scratch);
        let pages = (BATCH_HEADER_BYTES + scratch.len()).div_ceil(BLOCK) as u32;
        (pages <= self.batch_pages_max).then_some(pages)
    }

    /// Appends a record.
    pub(crate) fn append(
        &mut self,
        record: Record,
        inline: Vec<u8>,
        urgent: bool,
        needs_sync: bool,
    ) -> Ticket {
        let mut scratch = Vec::with_capacity(128);
        record.encode(&mut scratch);
        let encoded = scratch.len();
        assert!(
            encoded + BATCH_HEADER_BYTES + inline.len() <= self.batch_pages_max as usize * BLOCK
        );
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.waiting_record_bytes += encoded;
        self.urgent += usize::from(urgent);
        self.waiting_data_pages += (inline.len() / BLOCK) as u32;
        self.waiting.push_back(Entry { ticket, record, inline, encoded, urgent, needs_sync });
        ticket
    }

    /// Closes a batch over as many waiting records as fit.
    pub(crate) fn take(&mut self) -> Option<JournalBatch> {
        if self.in_flight.is_some() || self.waiting.is_empty() {
            return None;
        }
        let (mut count, mut record_bytes, mut data_pages) = (0usize, 0usize, 0u32);
        for e in &self.waiting {
            let bytes = record_bytes + e.encoded;
            let data = data_pages + (e.inline.len() / BLOCK) as u32;
            let pages = (BATCH_HEADER_BYTES + bytes).div_ceil(BLOCK) as u32 + data;
            if pages > self.batch_pages_max {
                break;
            }
            (count, record_bytes, data_pages) = (count + 1, bytes, data);
        }
        let record_pages = (BATCH_HEADER_BYTES + record_bytes).div_ceil(BLOCK) as u32;
        let pages = record_pages + data_pages;
        let start = self.place(self.head, pages);
        if start + u64::from(pages) - self.tail > u64::from(self.pages) {
            return None;
        }
        let mut bytes = AlignedBuf::zeroed(pages as usize * BLOCK);
        let mut records = Vec::with_capacity(record_bytes);
        let mut data_at = record_pages;
        let mut sync = false;
        let mut entries = Vec::with_capacity(count);
        for mut e in self.waiting.drain(..count) {
            if let Record::Write(w) = &mut e.record
                && w.inline
            {
                let blocks = (e.inline.len() / BLOCK) as u32;
                w.runs = vec![Run {
                    start: self.first_block + (start % u64::from(self.pages)) as u32 + data_at,
                    blocks,
                }];
                bytes[data_at as usize * BLOCK..][..e.inline.len()].copy_from_slice(&e.inline);
                data_at += blocks;
            }
            sync |= e.needs_sync;
            self.urgent -= usize::from(e.urgent);
            e.record.encode(&mut records);
            entries.push((e.ticket, e.record));
        }
        assert_eq!(records.len(), record_bytes, "a record's length does not depend on its place");
        assert_eq!(data_at, pages);
        self.waiting_record_bytes -= record_bytes;
        self.waiting_data_pages -= data_pages;
        let sequence = self.applied.sequence;
        let header = BatchHeader {
            sequence,
            previous: self.applied.previous,
            page: self.ring_page(start),
            record_bytes: record_bytes as u32,
            records: count as u32,
            data_pages,
            records_crc: crc32c(&records),
        }
        .encode(self.store);
        bytes[..BATCH_HEADER_BYTES].copy_from_slice(&header);
        bytes[BATCH_HEADER_BYTES..][..record_bytes].copy_from_slice(&records);
        let crc = u32::from_le_bytes(header[60..].try_into().expect("four bytes"));
        assert!(BatchHeader::decode(&bytes, self.store).is_some(), "what is written can be read");
        let end = start + u64::from(pages);
        self.head = end;
        self.in_flight = Some(InFlight { sequence, entries, end, crc });
        Some(JournalBatch {
            id: BatchId(sequence),
            offset: u64::from(self.block_of(start)) * BLOCK as u64,
            bytes,
            sync_data_first: sync,
            inline: data_pages > 0,
        })
    }

    /// The batch in flight is durable.
    pub(crate) fn complete(&mut self) -> Option<InFlight> {
        let done = self.in_flight.take()?;
        self.applied = Position { at: done.end, sequence: done.sequence + 1, previous: done.crc };
        self.batches += 1;
        self.records += done.entries.len() as u64;
        Some(done)
    }

    /// Everything before `tail` is free again.
    pub(crate) fn release_to(&mut self, tail: u64) {
        assert!(tail >= self.tail && tail <= self.applied.at, "the tail only moves forward");
        self.tail = tail;
    }
}

/// Where a batch of `pages` starts: at `at`, or at the next lap if it would cross the ring's end.
pub(crate) fn place(at: u64, pages: u32, ring: u32) -> u64 {
    let page = at % u64::from(ring);
    if page + u64::from(pages) <= u64::from(ring) { at } else { at + u64::from(ring) - page }
}

/// Decodes the records of a batch whose bytes are all there; `None`: torn or damaged.
pub(crate) fn decode_batch(header: &BatchHeader, bytes: &[u8], block: u32) -> Option<Vec<Record>> {
    let records = bytes.get(BATCH_HEADER_BYTES..)?.get(..header.record_bytes as usize)?;
    if crc32c(records) != header.records_crc {
        return None;
    }
    let mut r = Reader::new(records);
    let mut out = Vec::with_capacity(header.records.min(1 << 16) as usize);
    for _ in 0..header.records {
        out.push(Record::decode(&mut r)?);
    }
    let mut data_at = header.record_pages();
    for record in &out {
        let Record::Write(w) = record else { continue };
        if !w.inline {
            continue;
        }
        // Inline data is covered by its records' checksums.
        let [run] = w.runs.as_slice() else { return None };
        if run.start != block + data_at {
            return None;
        }
        for crc in &w.crcs {
            let page = bytes.get(data_at as usize * BLOCK..)?.get(..BLOCK)?;
            if crc32c(page) != *crc {
                return None;
            }
            data_at += 1;
        }
    }
    (r.is_empty() && data_at == header.pages()).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_never_crosses_the_rings_end() {
        assert_eq!(place(0, 10, 10), 0);
        assert_eq!(place(3, 7, 10), 3);
        assert_eq!(place(4, 7, 10), 10);
        assert_eq!(place(19, 2, 10), 20);
        assert_eq!(place(20, 10, 10), 20);
    }

    #[test]
    fn headers_of_other_stores_or_with_flipped_bits_are_not_ours() {
        let h = BatchHeader {
            sequence: 1,
            previous: 2,
            page: 3,
            record_bytes: 4,
            records: 5,
            data_pages: 6,
            records_crc: 7,
        };
        let b = h.encode(9);
        assert_eq!(BatchHeader::decode(&b, 9).map(|(h, _)| h), Some(h));
        assert!(BatchHeader::decode(&b, 8).is_none());
        for i in 0..b.len() {
            let mut bad = b;
            bad[i] ^= 16;
            assert!(BatchHeader::decode(&bad, 9).is_none());
        }
    }
}
