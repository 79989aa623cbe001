//! The block allocator: a bitmap in RAM, rebuilt at open from what the index reaches, so that there is
//! no persistent free list to keep consistent and nothing can leak across a restart (I11).
//!
//! Large requests get contiguous runs in fresh 4 MiB regions, small ones pack into partly used regions.
//! It does not know why a block is free; when it may be freed is the store's business.

use crate::extent::{Run, total};
use crate::types::CHUNK_BLOCKS;

const REGION: u32 = CHUNK_BLOCKS;
/// Requests of at least this many blocks count as large (256 KiB).
const LARGE_BLOCKS: u32 = 64;

#[derive(Debug)]
pub(crate) struct Allocator {
    /// Absolute number of the first data block.
    base: u32,
    blocks: u32,
    /// Bit set: in use.
    words: Vec<u64>,
    region_free: Vec<u16>,
    free: u32,
    /// Open region for small and for large requests.
    open: [usize; 2],
}

impl Allocator {
    pub(crate) fn new(base: u32, blocks: u32) -> Self {
        let regions = blocks.div_ceil(REGION);
        let mut words = vec![0u64; (regions * (REGION / 64)) as usize];
        // The last region may be short: its missing blocks count as used.
        for b in blocks..regions * REGION {
            words[(b / 64) as usize] |= 1 << (b % 64);
        }
        let region_free =
            (0..regions).map(|r| (blocks - r * REGION).min(REGION) as u16).collect::<Vec<_>>();
        Self { base, blocks, words, region_free, free: blocks, open: [0, 0] }
    }

    pub(crate) fn free_blocks(&self) -> u32 {
        self.free
    }
    pub(crate) fn capacity(&self) -> u32 {
        self.blocks
    }
    pub(crate) fn memory_bytes(&self) -> usize {
        self.words.len() * 8 + self.region_free.len() * 2
    }
    pub(crate) fn contains(&self, run: Run) -> bool {
        run.start >= self.base && run.end() <= self.base + self.blocks && run.blocks > 0
    }

    fn is_set(&self, b: u32) -> bool {
        self.words[(b / 64) as usize] >> (b % 64) & 1 == 1
    }
    fn set(&mut self, b: u32, used: bool) {
        let (w, bit) = ((b / 64) as usize, 1u64 << (b % 64));
        let region = (b / REGION) as usize;
        if used {
            self.words[w] |= bit;
            self.region_free[region] -= 1;
            self.free -= 1;
        } else {
            self.words[w] &= !bit;
            self.region_free[region] += 1;
            self.free += 1;
        }
    }

    /// Marks a run as used; `false` if a block of it already was (two owners: corruption).
    pub(crate) fn mark(&mut self, run: Run) -> bool {
        assert!(self.contains(run), "only data blocks are allocated");
        let at = run.start - self.base;
        if (at..at + run.blocks).any(|b| self.is_set(b)) {
            return false;
        }
        (at..at + run.blocks).for_each(|b| self.set(b, true));
        true
    }

    /// Frees a run.
    ///
    /// # Panics
    /// If a block of it is free already: somebody else may own it by now.
    pub(crate) fn release(&mut self, run: Run) {
        assert!(self.contains(run), "only data blocks are freed");
        let at = run.start - self.base;
        for b in at..at + run.blocks {
            assert!(self.is_set(b), "block {} freed twice", self.base + b);
            self.set(b, false);
        }
    }

    /// Blocks in use, as a set of runs (for the leak check).
    pub(crate) fn used_blocks(&self) -> u32 {
        self.blocks - self.free
    }

    /// Allocates; contiguous if it can, else in pieces; `None` if that much is not free.
    pub(crate) fn alloc(&mut self, n: u32) -> Option<Vec<Run>> {
        assert!(n > 0 && n <= REGION, "one chunk at most");
        if self.free < n {
            return None;
        }
        let class = usize::from(n >= LARGE_BLOCKS);
        let regions = self.region_free.len();
        let open = self.open[class];
        if let Some(run) = self.fit(open, n) {
            return Some(vec![run]);
        }
        // A fresh region for large requests; for small ones the next partly used region, else fresh.
        let fresh = |a: &Self, r: usize| u32::from(a.region_free[r]) == REGION;
        let order = || (1..=regions).map(|i| (open + i) % regions);
        let pick = if class == 1 {
            order().find(|r| fresh(self, *r))
        } else {
            order()
                .find(|r| !fresh(self, *r) && u32::from(self.region_free[*r]) >= n.max(32))
                .or_else(|| order().find(|r| fresh(self, *r)))
        };
        if let Some(r) = pick
            && let Some(run) = self.fit(r, n)
        {
            self.open[class] = r;
            return Some(vec![run]);
        }
        // Fragmented: take what there is, region by region.
        let mut out: Vec<Run> = Vec::new();
        let mut left = n;
        for r in (0..regions).map(|i| (open + i) % regions).collect::<Vec<_>>() {
            while left > 0 && self.region_free[r] > 0 {
                let Some((at, len)) = self.longest(r) else { break };
                let take = len.min(left);
                (at..at + take).for_each(|b| self.set(b, true));
                out.push(Run { start: self.base + at, blocks: take });
                left -= take;
            }
            if left == 0 {
                self.open[class] = r;
                break;
            }
        }
        assert!(left == 0 && total(&out) == n, "the free count was right");
        Some(out)
    }

    /// First free run of `n` blocks in region `r`, taken.
    fn fit(&mut self, r: usize, n: u32) -> Option<Run> {
        if u32::from(*self.region_free.get(r)?) < n {
            return None;
        }
        let (at, _) = self.free_runs(r).find(|(_, len)| *len >= n)?;
        (at..at + n).for_each(|b| self.set(b, true));
        Some(Run { start: self.base + at, blocks: n })
    }
    fn longest(&self, r: usize) -> Option<(u32, u32)> {
        self.free_runs(r).max_by_key(|(_, len)| *len)
    }
    /// Free runs (start, length) of a region, relative to the data area.
    fn free_runs(&self, r: usize) -> impl Iterator<Item = (u32, u32)> + '_ {
        let end = (r as u32 + 1) * REGION;
        let mut at = r as u32 * REGION;
        std::iter::from_fn(move || {
            at = self.next(at, end, false)?;
            let stop = self.next(at, end, true).unwrap_or(end);
            let run = (at, stop - at);
            at = stop;
            Some(run)
        })
    }
    /// The next block in `[at, end)` whose bit is `used`, a word at a time.
    fn next(&self, mut at: u32, end: u32, used: bool) -> Option<u32> {
        while at < end {
            let word = self.words[(at / 64) as usize];
            let word = if used { word } else { !word } >> (at % 64);
            if word != 0 {
                let found = at + word.trailing_zeros();
                return (found < end).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allocated_never_overlaps_and_comes_back() {
        let mut a = Allocator::new(1000, 3000);
        let mut held: Vec<Run> = Vec::new();
        let mut x = 7u64;
        for _ in 0..20_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let n = 1 + (x >> 33) as u32 % if x >> 60 == 0 { 1024 } else { 12 };
            if (x >> 20).is_multiple_of(2)
                && let Some(runs) = a.alloc(n)
            {
                assert_eq!(total(&runs), n);
                held.extend(runs);
            } else if !held.is_empty() {
                let i = (x >> 40) as usize % held.len();
                a.release(held.swap_remove(i));
            }
            assert_eq!(total(&held), a.used_blocks());
        }
        held.sort();
        assert!(held.windows(2).all(|w| w[0].end() <= w[1].start));
        held.drain(..).for_each(|r| a.release(r));
        assert_eq!(a.free_blocks(), 3000);
    }

    #[test]
    fn large_requests_are_contiguous_while_fresh_regions_last() {
        let mut a = Allocator::new(0, 8 * 1024);
        a.alloc(3).expect("empty");
        for _ in 0..7 {
            assert_eq!(a.alloc(1024).expect("space").len(), 1);
        }
    }
}
