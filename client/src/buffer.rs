//! Written data of one file that is not yet acknowledged: pure bookkeeping, no I/O, no clock of its
//! own.
//!
//! Two sets of ranges. *Dirty* segments collect writes: disjoint, each inside one segment-sized
//! stretch of the file, contiguous writes coalescing. *Flying* segments are being sent: immutable
//! and disjoint, because a dirty segment is never sent while one that overlaps it flies. So two
//! writes to one byte reach the node in the order they were made, however often either is retried.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::time::Instant;

/// A segment's identity: grows with its creation.
pub(crate) type SegmentId = u64;

/// Dirty segments of one file at most; more makes all of them due (each has its own bookkeeping).
const DIRTY_SEGMENTS_MAX: usize = 1024;
/// A first write at least this long announces a stream: its segment gets its full capacity at once.
const STREAM_BYTES: usize = 256 << 10;

struct Dirty {
    id: SegmentId,
    data: Vec<u8>,
    born: Instant,
}

struct Flying {
    id: SegmentId,
    data: Bytes,
}

/// See the module.
pub(crate) struct WriteBuffer {
    segment_bytes: u64,
    dirty: BTreeMap<u64, Dirty>,
    flying: BTreeMap<u64, Flying>,
    next_id: SegmentId,
    /// Segments up to this id are due although they are not full.
    due_upto: SegmentId,
}

impl WriteBuffer {
    pub(crate) fn new(segment_bytes: usize) -> Self {
        Self {
            segment_bytes: segment_bytes.max(1) as u64,
            dirty: BTreeMap::new(),
            flying: BTreeMap::new(),
            next_id: 1,
            due_upto: 0,
        }
    }

    /// Takes a write. Returns the bytes by which the buffer grew (overwritten bytes cost nothing).
    pub(crate) fn write(&mut self, offset: u64, data: &[u8], now: Instant) -> usize {
        let mut grown = 0;
        let mut at = 0usize;
        while at < data.len() {
            let start = offset + at as u64;
            let stretch_end = (start / self.segment_bytes + 1) * self.segment_bytes;
            let len = ((stretch_end - start) as usize).min(data.len() - at);
            grown += self.write_within(start, &data[at..at + len], stretch_end, now);
            at += len;
        }
        if self.dirty.len() > DIRTY_SEGMENTS_MAX {
            self.make_due();
        }
        grown
    }

    /// A write that stays inside one stretch.
    fn write_within(&mut self, start: u64, data: &[u8], stretch_end: u64, now: Instant) -> usize {
        let end = start + data.len() as u64;
        // The segment that begins at or before the write, if the write overlaps or continues it.
        let before = self
            .dirty
            .range_mut(..=start)
            .next_back()
            .filter(|(s, d)| {
                **s + d.data.len() as u64 >= start && **s + self.segment_bytes >= stretch_end
            })
            .map(|(s, _)| *s);
        let next = self.dirty.range(start..end).find(|(s, _)| Some(**s) != before).map(|(s, _)| *s);
        match (before, next) {
            (Some(s), None) => {
                let d = self.dirty.get_mut(&s).expect("just found");
                let from = (start - s) as usize;
                let old = d.data.len();
                let inside = (old - from).min(data.len());
                d.data[from..from + inside].copy_from_slice(&data[..inside]);
                d.data.extend_from_slice(&data[inside..]);
                d.data.len() - old
            }
            (None, None) => {
                let room = (stretch_end - start) as usize;
                let mut held = Vec::with_capacity(match data.len() {
                    n if n >= STREAM_BYTES => room,
                    n => n,
                });
                held.extend_from_slice(data);
                self.insert(start, held, now);
                data.len()
            }
            // Rare: the write joins several segments. They become one.
            _ => {
                let first = before.unwrap_or(start).min(start);
                let keys: Vec<u64> = before
                    .into_iter()
                    .chain(
                        self.dirty
                            .range(start..end)
                            .map(|(s, _)| *s)
                            .filter(|s| Some(*s) != before),
                    )
                    .collect();
                let parts: Vec<(u64, Dirty)> =
                    keys.iter().filter_map(|s| self.dirty.remove(s).map(|d| (*s, d))).collect();
                let old: usize = parts.iter().map(|(_, d)| d.data.len()).sum();
                let last = parts.iter().map(|(s, d)| s + d.data.len() as u64).fold(end, u64::max);
                let born = parts.iter().map(|(_, d)| d.born).min().unwrap_or(now);
                let mut joined = vec![0; (last - first) as usize];
                for (s, d) in &parts {
                    let at = (s - first) as usize;
                    joined[at..at + d.data.len()].copy_from_slice(&d.data);
                }
                let at = (start - first) as usize;
                joined[at..at + data.len()].copy_from_slice(data);
                let grown = joined.len() - old;
                self.insert(first, joined, born);
                grown
            }
        }
    }

    fn insert(&mut self, start: u64, data: Vec<u8>, born: Instant) {
        let id = self.next_id;
        self.next_id += 1;
        self.dirty.insert(start, Dirty { id, data, born });
    }

    /// Makes the very first segment due at once if it is short. Most new files are written in one call
    /// and then closed: their bytes are on the way while the caller still sets times and modes. What is
    /// written later gathers as usual.
    pub(crate) fn begin_early(&mut self) {
        let first = self.next_id == 2 && self.due_upto == 0;
        if first && self.dirty.values().all(|d| d.data.len() < STREAM_BYTES) {
            self.make_due();
        }
    }

    /// Makes everything buffered so far due, and returns the mark to wait for with
    /// [`Self::pending_upto`].
    pub(crate) fn make_due(&mut self) -> SegmentId {
        self.due_upto = self.next_id - 1;
        self.due_upto
    }

    /// Makes everything due if the oldest segment was begun before `limit`.
    pub(crate) fn make_due_if_older(&mut self, limit: Instant) -> bool {
        let old = self.dirty.values().any(|d| d.born <= limit);
        if old {
            self.make_due();
        }
        old
    }

    /// Takes what may be sent now: full or due, and not overlapping what flies.
    pub(crate) fn launch(&mut self) -> Vec<(u64, Bytes)> {
        let mut out = Vec::new();
        let ready: Vec<u64> = self
            .dirty
            .iter()
            .filter(|(start, d)| {
                let end = **start + d.data.len() as u64;
                let full = end.is_multiple_of(self.segment_bytes);
                (full || d.id <= self.due_upto) && !self.flies_over(**start, end)
            })
            .map(|(start, _)| *start)
            .collect();
        for start in ready {
            if let Some(d) = self.dirty.remove(&start) {
                let data = Bytes::from(d.data);
                self.flying.insert(start, Flying { id: d.id, data: data.clone() });
                out.push((start, data));
            }
        }
        out
    }

    fn flies_over(&self, start: u64, end: u64) -> bool {
        self.flying.range(..end).next_back().is_some_and(|(s, f)| s + f.data.len() as u64 > start)
    }

    /// A flying segment was acknowledged or given up. Returns its bytes.
    pub(crate) fn landed(&mut self, start: u64) -> usize {
        self.flying.remove(&start).map_or(0, |f| f.data.len())
    }

    /// Whether any segment up to `mark` is still here.
    pub(crate) fn pending_upto(&self, mark: SegmentId) -> bool {
        self.dirty.values().any(|d| d.id <= mark) || self.flying.values().any(|f| f.id <= mark)
    }

    /// Whether nothing is buffered.
    pub(crate) fn is_empty(&self) -> bool {
        self.dirty.is_empty() && self.flying.is_empty()
    }

    /// One past the last buffered byte, 0 for none.
    pub(crate) fn end(&self) -> u64 {
        let dirty = self.dirty.last_key_value().map_or(0, |(s, d)| s + d.data.len() as u64);
        let flying = self.flying.last_key_value().map_or(0, |(s, f)| s + f.data.len() as u64);
        dirty.max(flying)
    }

    /// Buffered bytes within a range, to be laid over what a node answers: later ones win.
    pub(crate) fn overlay(&self, start: u64, end: u64) -> Vec<(u64, Bytes)> {
        let mut out = Vec::new();
        // Both maps are disjoint, so walking back from `end` may stop at the first that ends before.
        for (s, f) in self.flying.range(..end).rev() {
            let f_end = s + f.data.len() as u64;
            if f_end <= start {
                break;
            }
            let (from, to) = (start.max(*s), end.min(f_end));
            out.push((from, f.data.slice((from - s) as usize..(to - s) as usize)));
        }
        for (s, d) in self.dirty.range(..end).rev() {
            let d_end = s + d.data.len() as u64;
            if d_end <= start {
                break;
            }
            let (from, to) = (start.max(*s), end.min(d_end));
            let bytes = &d.data[(from - s) as usize..(to - s) as usize];
            out.push((from, Bytes::copy_from_slice(bytes)));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const SEGMENT: usize = 64;

    /// A node that applies flights in any order, and the file as the writer means it.
    #[test]
    fn whatever_lands_in_any_order_the_file_is_what_was_written() {
        for seed in 0..200u64 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut buffer = WriteBuffer::new(SEGMENT);
            let (mut model, mut node) = (vec![0u8; 1024], vec![0u8; 1024]);
            let mut flights: Vec<(u64, Bytes)> = Vec::new();
            let mut held = 0usize;
            for step in 0..300u32 {
                match rng.random_range(0..10) {
                    0..6 => {
                        let len = rng.random_range(1..100);
                        let at = rng.random_range(0..1024 - len);
                        let data: Vec<u8> = (0..len).map(|_| rng.random()).collect();
                        model[at..at + len].copy_from_slice(&data);
                        held += buffer.write(at as u64, &data, Instant::now());
                    }
                    6 => {
                        buffer.make_due();
                    }
                    7 => flights.extend(buffer.launch()),
                    _ if !flights.is_empty() => {
                        let (at, data) = flights.swap_remove(rng.random_range(0..flights.len()));
                        node[at as usize..at as usize + data.len()].copy_from_slice(&data);
                        held -= buffer.landed(at);
                    }
                    _ => {}
                }
                // Reading through the buffer always shows the writer's own writes.
                let (a, b) = (rng.random_range(0..1024u64), rng.random_range(0..1024u64));
                let (a, b) = (a.min(b), a.max(b));
                let mut seen = node[a as usize..b as usize].to_vec();
                for (s, bytes) in buffer.overlay(a, b) {
                    let at = (s - a) as usize;
                    seen[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                assert_eq!(seen, model[a as usize..b as usize], "seed {seed} step {step}");
                let total: usize = buffer.dirty.values().map(|d| d.data.len()).sum::<usize>()
                    + buffer.flying.values().map(|f| f.data.len()).sum::<usize>();
                assert_eq!(total, held, "seed {seed} step {step}: bytes are counted");
            }
            let mark = buffer.make_due();
            while buffer.pending_upto(mark) {
                flights.extend(buffer.launch());
                let (at, data) = flights.pop().expect("something flies while something is pending");
                node[at as usize..at as usize + data.len()].copy_from_slice(&data);
                buffer.landed(at);
            }
            assert!(buffer.is_empty(), "seed {seed}");
            assert_eq!(node, model, "seed {seed}");
        }
    }

    #[test]
    fn contiguous_small_writes_become_one_flight_per_segment() {
        let mut b = WriteBuffer::new(SEGMENT);
        for i in 0..32u64 {
            b.write(i * 8, &[i as u8; 8], Instant::now());
        }
        let flights = b.launch();
        assert_eq!(flights.iter().map(|(s, _)| *s).collect::<Vec<_>>(), [0, 64, 128, 192]);
        assert!(flights.iter().all(|(_, d)| d.len() == SEGMENT));
    }

    #[test]
    fn only_the_first_short_segment_goes_early() {
        let mut b = WriteBuffer::new(1 << 20);
        b.write(0, &[1; 10], Instant::now());
        b.begin_early();
        assert_eq!(b.launch().len(), 1);
        b.write(10, &[2; 10], Instant::now());
        b.begin_early();
        assert!(b.launch().is_empty(), "the second gathers");
        let mut stream = WriteBuffer::new(1 << 20);
        stream.write(0, &[1; STREAM_BYTES], Instant::now());
        stream.begin_early();
        assert!(stream.launch().is_empty(), "a stream goes in whole segments");
    }

    #[test]
    fn a_segment_waits_for_an_overlapping_flight() {
        let mut b = WriteBuffer::new(SEGMENT);
        b.write(0, &[1; 10], Instant::now());
        b.make_due();
        assert_eq!(b.launch().len(), 1);
        b.write(5, &[2; 10], Instant::now());
        let mark = b.make_due();
        assert!(b.launch().is_empty(), "the older write has not landed");
        assert_eq!(b.landed(0), 10);
        assert_eq!(b.launch().len(), 1);
        assert!(b.pending_upto(mark));
        b.landed(5);
        assert!(!b.pending_upto(mark));
    }
}
