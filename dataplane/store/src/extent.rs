//! Extents: block ranges of a chunk, where they are, whose they are, and their checksums (I10).
//!
//! A chunk holds one sorted, non-overlapping list that readers see, and one list per sealed generation
//! (its pins). Lists of one chunk may share device blocks; lists of different chunks never do.

use crate::codec::{Put, Reader};
use crate::types::{BLOCK, CHUNK_BLOCKS};
use ebb_dataplane_protocol::{ContentId, Generation};
use std::ops::Range;

/// Contiguous device blocks, by absolute block number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Run {
    pub(crate) start: u32,
    pub(crate) blocks: u32,
}

impl Run {
    pub(crate) const fn end(self) -> u32 {
        self.start + self.blocks
    }
    pub(crate) const fn offset(self) -> u64 {
        self.start as u64 * BLOCK as u64
    }
}

/// Whose bytes an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// In S3 under this content.
    Clean(ContentId),
    /// Written here under this generation, not in S3.
    Dirty(Generation),
}

impl Origin {
    pub(crate) fn dirty_up_to(self, g: Generation) -> bool {
        matches!(self, Origin::Dirty(d) if d <= g)
    }
    pub(crate) fn is_dirty(self) -> bool {
        matches!(self, Origin::Dirty(_))
    }
}

/// Blocks `first .. first + crcs.len()` of a chunk at `location ..`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) first: u16,
    /// Bytes of the last block that count (1..=4096); the rest reads as zero.
    pub(crate) tail: u16,
    pub(crate) location: u32,
    pub(crate) origin: Origin,
    pub(crate) crcs: Box<[u32]>,
}

/// Bytes of an encoded extent without its checksums.
pub(crate) const EXTENT_BYTES: usize = 20;
const FULL: u16 = BLOCK as u16;
const _: () = assert!(std::mem::size_of::<Extent>() <= 48, "the index must stay small");
const _: () = assert!(BLOCK <= u16::MAX as usize && CHUNK_BLOCKS <= u16::MAX as u32);

impl Extent {
    pub(crate) fn first(&self) -> u32 {
        u32::from(self.first)
    }
    pub(crate) fn blocks(&self) -> u32 {
        self.crcs.len() as u32
    }
    pub(crate) fn end(&self) -> u32 {
        self.first() + self.blocks()
    }
    pub(crate) fn run(&self) -> Run {
        Run { start: self.location, blocks: self.blocks() }
    }
    pub(crate) fn encoded_len(&self) -> usize {
        EXTENT_BYTES + 4 * self.crcs.len()
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        // The kind rides in the top bits of the count, which is at most 1024.
        let (kind, id) = match self.origin {
            Origin::Clean(c) => (0u16, c.0),
            Origin::Dirty(g) => (1u16, g.0),
        };
        out.u16(self.first);
        out.u16(self.crcs.len() as u16);
        out.u16(self.tail | (kind << 15));
        out.u16(0);
        out.u32(self.location);
        out.u64(id);
        for crc in &self.crcs {
            out.u32(*crc);
        }
    }

    pub(crate) fn decode(r: &mut Reader<'_>) -> Option<Self> {
        let (first, blocks, tail) = (r.u16()?, r.u16()?, r.u16()?);
        let zero = r.u16()?;
        let (location, id) = (r.u32()?, r.u64()?);
        let crcs = r.u32s(usize::from(blocks))?;
        let origin = match tail >> 15 {
            0 => Origin::Clean(ContentId(id)),
            _ => Origin::Dirty(Generation(id)),
        };
        let tail = tail & 0x7fff;
        let sound = zero == 0
            && blocks > 0
            && location.checked_add(u32::from(blocks)).is_some()
            && u32::from(first) + u32::from(blocks) <= CHUNK_BLOCKS
            && (1..=FULL).contains(&tail);
        sound.then_some(Self { first, tail, location, origin, crcs })
    }

    /// Splits at block `at` of the chunk, strictly inside.
    fn split(self, at: u32) -> (Self, Self) {
        let k = (at - self.first()) as usize;
        assert!(k > 0 && k < self.crcs.len(), "split inside the extent");
        let (a, b) = self.crcs.split_at(k);
        let left = Self { tail: FULL, crcs: a.into(), ..self };
        let right = Self {
            first: at as u16,
            tail: self.tail,
            location: self.location + k as u32,
            origin: self.origin,
            crcs: b.into(),
        };
        (left, right)
    }

    fn continues(&self, next: &Self) -> bool {
        self.tail == FULL
            && self.end() == next.first()
            && self.run().end() == next.location
            && self.origin == next.origin
    }
}

/// A sorted, non-overlapping list of extents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ExtentList(pub(crate) Vec<Extent>);

impl ExtentList {
    /// Index of the first extent that ends after `block`.
    pub(crate) fn position(&self, block: u32) -> usize {
        self.0.partition_point(|e| e.end() <= block)
    }
    pub(crate) fn find(&self, block: u32) -> Option<&Extent> {
        self.0.get(self.position(block)).filter(|e| e.first() <= block)
    }
    /// Makes `block` a boundary.
    pub(crate) fn split_at(&mut self, block: u32) {
        let i = self.position(block);
        if self.0.get(i).is_some_and(|e| e.first() < block) {
            let (left, right) = self.0[i].clone().split(block);
            self.0[i] = left;
            self.make_room();
            self.0.insert(i + 1, right);
        }
    }
    /// Removes every block of the range; what was there goes to `released`.
    pub(crate) fn carve(&mut self, range: Range<u32>, released: &mut Vec<Run>) {
        self.split_at(range.start);
        self.split_at(range.end);
        let (a, b) = (self.position(range.start), self.position(range.end.max(1) - 1));
        let b = if self.0.get(b).is_some_and(|e| e.first() < range.end) { b + 1 } else { b };
        for e in self.0.drain(a..b.max(a)) {
            debug_assert!(e.first() >= range.start && e.end() <= range.end);
            released.push(e.run());
        }
    }
    /// Inserts into a gap.
    pub(crate) fn insert(&mut self, e: Extent) {
        let i = self.position(e.first());
        assert!(self.0.get(i).is_none_or(|n| n.first() >= e.end()), "extents never overlap");
        self.make_room();
        self.0.insert(i, e);
    }
    /// Keeps the extents for which `f` says so; the others go to `released`.
    pub(crate) fn retain(
        &mut self,
        released: &mut Vec<Run>,
        mut f: impl FnMut(&mut Extent) -> bool,
    ) {
        self.0.retain_mut(|e| {
            let keep = f(e);
            if !keep {
                released.push(e.run());
            }
            keep
        });
    }
    /// Removes blocks at or past byte `at` of the chunk from the extents that `which` names, and
    /// shortens the last block that counts.
    pub(crate) fn cut(
        &mut self,
        at: u64,
        released: &mut Vec<Run>,
        which: impl Fn(&Extent) -> bool,
    ) {
        if at >= u64::from(CHUNK_BLOCKS) * BLOCK as u64 {
            return;
        }
        let whole = at.div_ceil(BLOCK as u64) as u32;
        let rest = (at % BLOCK as u64) as u16;
        if self
            .0
            .last()
            .is_none_or(|e| u64::from(e.end() - 1) * BLOCK as u64 + u64::from(e.tail) <= at)
        {
            return;
        }
        self.split_at(whole);
        self.retain(released, |e| !(e.first() >= whole && which(e)));
        if rest > 0
            && let Some(e) = self.0.iter_mut().find(|e| e.end() == whole)
            && which(e)
        {
            e.tail = e.tail.min(rest);
        }
        self.coalesce();
    }
    /// Room for one more. Most chunks are small files of one extent, which need none for three others.
    fn make_room(&mut self) {
        if self.0.len() == self.0.capacity() {
            self.0.reserve_exact((self.0.len() / 4).max(1));
        }
    }
    /// Gives room back that a change needed on its way.
    pub(crate) fn tighten(&mut self) {
        if self.0.capacity() > self.0.len() + self.0.len() / 2 {
            self.0.shrink_to_fit();
        }
    }
    /// Joins neighbours that continue each other.
    pub(crate) fn coalesce(&mut self) {
        if !self.0.windows(2).any(|w| w[0].continues(&w[1])) {
            return;
        }
        let mut out: Vec<Extent> = Vec::with_capacity(self.0.len());
        let mut joined: Vec<u32> = Vec::new();
        for e in self.0.drain(..) {
            match out.last_mut() {
                Some(last) if joined_continues(last, joined.len(), &e) => {
                    if joined.is_empty() {
                        joined.extend_from_slice(&last.crcs);
                    }
                    joined.extend_from_slice(&e.crcs);
                    last.tail = e.tail;
                }
                _ => {
                    flush_joined(&mut out, &mut joined);
                    out.push(e);
                }
            }
        }
        flush_joined(&mut out, &mut joined);
        out.shrink_to_fit();
        self.0 = out;
    }
    /// Checks order, bounds and tails (after every mutation in debug builds, and at open).
    pub(crate) fn is_sound(&self) -> bool {
        self.0.windows(2).all(|w| w[0].end() <= w[1].first())
            && self.0.iter().all(|e| {
                !e.crcs.is_empty() && e.end() <= CHUNK_BLOCKS && (1..=FULL).contains(&e.tail)
            })
    }
}

fn joined_continues(last: &Extent, joined: usize, next: &Extent) -> bool {
    // While a join is open the checksums are in `joined`, so the length is there too.
    let blocks = if joined == 0 { last.crcs.len() } else { joined } as u32;
    last.tail == FULL
        && last.first() + blocks == next.first()
        && last.location + blocks == next.location
        && last.origin == next.origin
}

fn flush_joined(out: &mut [Extent], joined: &mut Vec<u32>) {
    if !joined.is_empty()
        && let Some(last) = out.last_mut()
    {
        last.crcs = joined.as_slice().into();
        joined.clear();
    }
}

/// Sorts and joins runs; overlapping ones count once.
pub(crate) fn normalise(runs: &mut Vec<Run>) {
    runs.sort_unstable();
    let mut out: Vec<Run> = Vec::with_capacity(runs.len());
    for r in runs.drain(..) {
        match out.last_mut() {
            Some(l) if l.end() >= r.start => l.blocks = l.end().max(r.end()) - l.start,
            _ => out.push(r),
        }
    }
    *runs = out;
}

/// `from` without every block of `holes`; both normalised.
pub(crate) fn subtract(from: &[Run], holes: &[Run]) -> Vec<Run> {
    let mut out = Vec::with_capacity(from.len());
    for r in from {
        let mut at = r.start;
        let i = holes.partition_point(|h| h.end() <= r.start);
        for h in holes[i..].iter().take_while(|h| h.start < r.end()) {
            if h.start > at {
                out.push(Run { start: at, blocks: h.start - at });
            }
            at = at.max(h.end());
        }
        if at < r.end() {
            out.push(Run { start: at, blocks: r.end() - at });
        }
    }
    out
}

/// Blocks in runs.
pub(crate) fn total(runs: &[Run]) -> u32 {
    runs.iter().map(|r| r.blocks).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ext(first: u16, blocks: u16, location: u32, g: u64) -> Extent {
        Extent {
            first,
            tail: FULL,
            location,
            origin: Origin::Dirty(Generation(g)),
            crcs: (0..blocks).map(|i| u32::from(first + i)).collect(),
        }
    }

    #[test]
    fn an_extent_past_the_last_block_number_is_no_extent() {
        let mut bytes = Vec::new();
        ext(0, 2, u32::MAX - 1, 1).encode(&mut bytes);
        assert_eq!(Extent::decode(&mut Reader::new(&bytes)), None);
        bytes.clear();
        ext(0, 1, u32::MAX - 1, 1).encode(&mut bytes);
        assert!(Extent::decode(&mut Reader::new(&bytes)).is_some());
    }

    #[test]
    fn carving_releases_exactly_what_was_there() {
        let mut list = ExtentList(vec![ext(0, 10, 100, 1), ext(20, 10, 200, 1)]);
        let mut released = Vec::new();
        list.carve(5..25, &mut released);
        assert_eq!(released, vec![Run { start: 105, blocks: 5 }, Run { start: 200, blocks: 5 }]);
        assert_eq!(list.0.len(), 2);
        assert_eq!((list.0[1].first, list.0[1].location, list.0[1].crcs[0]), (25, 205, 25));
        released.clear();
        list.carve(10..20, &mut released);
        assert!(released.is_empty() && list.is_sound());
    }

    #[test]
    fn neighbours_join_only_when_place_and_owner_continue() {
        let mut list = ExtentList(vec![
            ext(0, 2, 10, 1),
            ext(2, 2, 12, 1),
            ext(4, 2, 14, 1),
            ext(6, 1, 16, 2),
            ext(7, 1, 99, 2),
        ]);
        list.coalesce();
        assert_eq!(list.0.len(), 3);
        assert_eq!(&*list.0[0].crcs, &[0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_cut_inside_a_block_shortens_it_and_drops_the_rest() {
        let mut list = ExtentList(vec![ext(0, 8, 10, 1)]);
        let mut released = Vec::new();
        list.cut(4096 * 3 + 7, &mut released, |e| e.origin.dirty_up_to(Generation(1)));
        assert_eq!((list.0[0].blocks(), list.0[0].tail), (4, 7));
        assert_eq!(total(&released), 4);
    }

    #[test]
    fn extents_round_trip() {
        let e = ext(3, 5, 77, 9);
        let mut bytes = Vec::new();
        e.encode(&mut bytes);
        assert_eq!(bytes.len(), e.encoded_len());
        assert_eq!(Extent::decode(&mut Reader::new(&bytes)), Some(e));
    }

    #[test]
    fn subtracting_runs() {
        let from = [Run { start: 0, blocks: 10 }, Run { start: 20, blocks: 5 }];
        let holes = [Run { start: 2, blocks: 3 }, Run { start: 8, blocks: 13 }];
        assert_eq!(
            subtract(&from, &holes),
            vec![
                Run { start: 0, blocks: 2 },
                Run { start: 5, blocks: 3 },
                Run { start: 21, blocks: 4 }
            ]
        );
    }
}
