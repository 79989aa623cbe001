//! When and how far to read ahead, and the blocks that were: pure bookkeeping, no I/O.

use bytes::Bytes;
use ebb_dataplane_protocol::header::{FLAG_RANDOM, FLAG_SEQUENTIAL};
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

/// Reads this far off the expected place still count as sequential: the kernel sends several reads
/// of a stream at once, and they arrive in any order.
const SLACK_BYTES: u64 = 4 << 20;
/// Sequential bytes before reading ahead begins.
const STREAK_BYTES: u64 = 256 << 10;

/// How a reader says that it will read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// It does not say: its reads do.
    #[default]
    Unknown,
    Sequential,
    Random,
}

/// Follows one reader of one file.
#[derive(Debug, Default)]
pub(crate) struct Detector {
    pattern: Pattern,
    /// One past the furthest byte read.
    expected: u64,
    streak: u64,
    window: u64,
}

impl Detector {
    /// Follows a reader that says how it will read. What was seen of it before is forgotten.
    pub(crate) fn of(pattern: Pattern) -> Self {
        Self { pattern, ..Self::default() }
    }

    /// What the nodes are told with the reads, as flags of their headers; nothing: they look for themselves.
    pub(crate) fn hint(&self) -> u16 {
        match self.pattern {
            Pattern::Random => FLAG_RANDOM,
            Pattern::Sequential => FLAG_SEQUENTIAL,
            Pattern::Unknown if self.window > 0 => FLAG_SEQUENTIAL,
            Pattern::Unknown => 0,
        }
    }

    /// Takes note of a read and says how many bytes past its end to have in flight.
    pub(crate) fn observe(&mut self, offset: u64, len: u64, block: u64, window_max: u64) -> u64 {
        match self.pattern {
            Pattern::Unknown => {}
            Pattern::Sequential => return window_max.max(block),
            Pattern::Random => return 0,
        }
        let near = offset <= self.expected.saturating_add(SLACK_BYTES)
            && offset.saturating_add(SLACK_BYTES) >= self.expected;
        let forward = offset + len > self.expected;
        let contiguous = offset == self.expected || (self.streak >= STREAK_BYTES && near);
        if contiguous {
            self.streak = self.streak.saturating_add(len);
            if forward {
                self.expected = offset + len;
            }
        } else {
            self.streak = 0;
            self.window = 0;
            self.expected = offset + len;
        }
        if self.streak < STREAK_BYTES {
            return 0;
        }
        if forward {
            self.window = (self.window * 2).clamp(2 * block, window_max.max(block));
        }
        self.window
    }
}

/// A block that is being fetched or was.
pub(crate) struct Entry<F> {
    /// The bytes of the file it covers.
    pub(crate) range: Range<u64>,
    /// Resolves to them.
    pub(crate) fetch: F,
    /// Bytes of it not yet handed out.
    left: u64,
    born: Instant,
    used: u64,
}

/// The blocks of one file, by their first byte.
pub(crate) struct Blocks<F> {
    entries: BTreeMap<u64, Entry<F>>,
    clock: u64,
}

impl<F> Default for Blocks<F> {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), clock: 0 }
    }
}

impl<F: Clone> Blocks<F> {
    /// The block that begins at `start` and covers up to `end`, if it is fresh. `take`: bytes the
    /// caller hands out; a block handed out whole is forgotten, since the page cache has it.
    /// The second value is the number of bytes of budget set free.
    pub(crate) fn get(
        &mut self,
        start: u64,
        end: u64,
        take: u64,
        oldest: Option<Instant>,
    ) -> (Option<F>, u64) {
        self.clock += 1;
        let clock = self.clock;
        let Some(e) = self.entries.get_mut(&start) else { return (None, 0) };
        if e.range.end < end || oldest.is_some_and(|oldest| e.born < oldest) {
            return (None, self.forget(start));
        }
        e.used = clock;
        e.left = e.left.saturating_sub(take);
        let fetch = e.fetch.clone();
        let freed = if e.left == 0 { self.forget(start) } else { 0 };
        (Some(fetch), freed)
    }

    pub(crate) fn contains(&self, start: u64) -> bool {
        self.entries.contains_key(&start)
    }

    pub(crate) fn insert(&mut self, range: Range<u64>, fetch: F, now: Instant) {
        self.clock += 1;
        let left = range.end - range.start;
        let used = self.clock;
        self.entries.insert(range.start, Entry { range, fetch, left, born: now, used });
    }

    fn forget(&mut self, start: u64) -> u64 {
        self.entries.remove(&start).map_or(0, |e| e.range.end - e.range.start)
    }

    /// Forgets blocks that overlap a range (it was written). Returns the bytes set free.
    pub(crate) fn invalidate(&mut self, start: u64, end: u64) -> u64 {
        let hit: Vec<u64> = self
            .entries
            .range(..end)
            .filter(|(_, e)| e.range.end > start)
            .map(|(s, _)| *s)
            .collect();
        hit.into_iter().map(|s| self.forget(s)).sum()
    }

    /// Forgets everything. Returns the bytes set free.
    pub(crate) fn clear(&mut self) -> u64 {
        let freed = self.entries.values().map(|e| e.range.end - e.range.start).sum();
        self.entries.clear();
        freed
    }

    /// Forgets the block unused for the longest time. Returns the bytes set free, 0: none left.
    pub(crate) fn evict_one(&mut self) -> u64 {
        let oldest = self.entries.iter().min_by_key(|(_, e)| e.used).map(|(s, _)| *s);
        oldest.map_or(0, |s| self.forget(s))
    }

    /// Forgets blocks older than `limit`. Returns the bytes set free.
    pub(crate) fn expire(&mut self, limit: Instant) -> u64 {
        let old: Vec<u64> =
            self.entries.iter().filter(|(_, e)| e.born < limit).map(|(s, _)| *s).collect();
        old.into_iter().map(|s| self.forget(s)).sum()
    }
}

/// Lays buffered ranges over `base`, which begins at byte `start` of the file.
pub(crate) fn lay_over(base: Bytes, start: u64, overlay: &[(u64, Bytes)]) -> Bytes {
    if overlay.is_empty() {
        return base;
    }
    let mut out = base.to_vec();
    for (s, bytes) in overlay {
        let at = (s - start) as usize;
        out[at..at + bytes.len()].copy_from_slice(bytes);
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_stream_is_noticed_even_when_its_reads_arrive_swapped() {
        for seed in 0..100 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut offsets: Vec<u64> = (0..64).map(|i| i * 128 * 1024).collect();
            // Neighbours swap from the fifth on, as with two kernel threads.
            for i in (5..offsets.len() - 1).step_by(2) {
                if rng.random_bool(0.5) {
                    offsets.swap(i, i + 1);
                }
            }
            let mut d = Detector::default();
            let windows: Vec<u64> =
                offsets.iter().map(|o| d.observe(*o, 128 * 1024, MIB, 8 * MIB)).collect();
            assert!(windows[8..].iter().all(|w| *w > 0), "seed {seed}: {windows:?}");
            assert_eq!(windows.last(), Some(&(8 * MIB)), "seed {seed}");
        }
    }

    #[test]
    fn who_says_how_it_reads_is_believed() {
        let mut d = Detector::of(Pattern::Sequential);
        for at in [900 * MIB, 0, 77] {
            assert_eq!(d.observe(at, 4096, MIB, 8 * MIB), 8 * MIB);
            assert_eq!(d.hint(), FLAG_SEQUENTIAL);
        }
        let mut d = Detector::of(Pattern::Random);
        for at in 0..100 {
            assert_eq!(d.observe(at * MIB, MIB, MIB, 8 * MIB), 0);
            assert_eq!(d.hint(), FLAG_RANDOM);
        }
        let mut d = Detector::default();
        assert_eq!((d.observe(0, 4096, MIB, 8 * MIB), d.hint()), (0, 0));
        d.observe(4096, MIB, MIB, 8 * MIB);
        assert_eq!(d.hint(), FLAG_SEQUENTIAL, "its reads say it");
        d.observe(700 * MIB, 4096, MIB, 8 * MIB);
        assert_eq!(d.hint(), 0);
    }

    #[test]
    fn random_reads_never_read_ahead() {
        for seed in 0..100 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut d = Detector::default();
            for _ in 0..1000 {
                let at = rng.random_range(0..1u64 << 20) * 4096;
                assert_eq!(d.observe(at, 4096, MIB, 8 * MIB), 0, "seed {seed} at {at}");
            }
        }
    }

    #[test]
    fn written_blocks_are_forgotten_and_bytes_are_counted() {
        for seed in 0..100 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut blocks: Blocks<u64> = Blocks::default();
            let mut held = 0;
            for _ in 0..200 {
                let start = rng.random_range(0..32) * MIB;
                match rng.random_range(0..5) {
                    0 | 1 if !blocks.contains(start) => {
                        blocks.insert(start..start + MIB, start, Instant::now());
                        held += MIB;
                    }
                    2 => {
                        let at = start + rng.random_range(0..MIB);
                        held -= blocks.invalidate(at, at + 1);
                        assert!(!blocks.contains(start), "seed {seed}");
                    }
                    3 => {
                        let (got, freed) = blocks.get(start, start + MIB, MIB / 2, None);
                        held -= freed;
                        assert!(got.is_none_or(|s| s == start), "seed {seed}");
                    }
                    _ => held -= blocks.evict_one(),
                }
            }
            assert_eq!(held, blocks.clear(), "seed {seed}");
        }
    }
}
