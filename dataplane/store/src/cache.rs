//! Which clean chunk goes first: S3-FIFO by bytes (Yang et al., "FIFO queues are all you need for cache
//! eviction", SOSP 2023).
//!
//! New chunks pass through a small queue of a tenth of the clean bytes, and leave the cache at its end
//! unless they were read again there. Those that were live in the main queue, where each time they were
//! read again buys a further turn, three at most. So what is read once, however much of it (a scan), takes
//! a tenth of the space from what is read often. A chunk that comes back soon after it left the small
//! queue (the *ghost* remembers) goes into the main one.
//!
//! Decides only the order. Nothing of this is journaled: what goes is a record of its own, and after a
//! restart every chunk begins in the main queue.

use crate::index::ChunkKey;
use std::collections::hash_map::RandomState;
use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;

/// The small queue's share of the clean bytes, one in so many.
const SMALL_SHARE: u64 = 10;
/// Turns that reads can buy.
const TURNS_MAX: u8 = 3;
/// Times a chunk is read again in the small queue before it is worth a place in the main one.
const PROMOTED_AT: u8 = 1;
/// Chunks remembered after they left the small queue.
const GHOST_MAX: usize = 65_536;
/// Further turns given in one search at most; the next one goes whatever was read of it. Otherwise the
/// first search after a long time of reads would walk all chunks thrice.
const TURNS_PER_SEARCH: u32 = 4096;
/// Stale entries that are not worth a sweep.
const SLACK: usize = 4096;

/// Where a chunk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Place {
    /// In no queue: nothing clean, or on its way out.
    #[default]
    Out,
    Small,
    Main,
}

/// What the cache keeps of a chunk, in the chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Residency {
    pub(crate) place: Place,
    turns: u8,
    /// Block after the last one that was read.
    read_to: u16,
}

impl Residency {
    /// Blocks were read from the device. Going on where the last read ended is the same use of the
    /// chunk, or one pass over a file would look like many.
    pub(crate) fn read(&mut self, first: u32, end: u32) {
        if first < u32::from(self.read_to) {
            self.turns = (self.turns + 1).min(TURNS_MAX);
        }
        self.read_to = end.min(u32::from(u16::MAX)) as u16;
    }
}

/// The chunks, as the cache sees them.
pub(crate) trait Chunks {
    /// The cache's part of a chunk, and its clean blocks.
    fn entry(&mut self, key: &ChunkKey) -> Option<(&mut Residency, u32)>;
}

/// The queues.
#[derive(Debug, Default)]
pub(crate) struct Cache {
    small: VecDeque<ChunkKey>,
    main: VecDeque<ChunkKey>,
    /// Clean blocks of chunks in the small queue.
    small_blocks: u64,
    /// Hashes of chunks that left it, oldest first, and how often each is there.
    ghosts: VecDeque<u64>,
    ghost: HashMap<u64, u32>,
    hasher: RandomState,
}

impl Cache {
    /// The clean blocks of a chunk changed from `before` to `after`.
    pub(crate) fn changed(&mut self, key: ChunkKey, r: &mut Residency, before: u32, after: u32) {
        if r.place == Place::Out && after > 0 {
            let again = self.ghost.contains_key(&self.hasher.hash_one(key));
            // It came because its beginning was read, or written: from there on it is a further use.
            let (place, read_to) =
                (if again { Place::Main } else { Place::Small }, r.read_to.max(1));
            *r = Residency { place, read_to, ..*r };
            match r.place {
                Place::Main => self.main.push_back(key),
                _ => self.small.push_back(key),
            }
            if r.place == Place::Small {
                self.small_blocks += u64::from(after);
            }
        } else if r.place == Place::Small {
            self.small_blocks = self.small_blocks + u64::from(after) - u64::from(before);
        }
    }

    /// A chunk found at the start: nobody knows how it was used.
    pub(crate) fn found(&mut self, key: ChunkKey, r: &mut Residency) {
        *r = Residency { place: Place::Main, ..Residency::default() };
        self.main.push_back(key);
    }

    /// Whether entries of chunks that are gone are worth a [`Self::sweep`].
    pub(crate) fn is_stale(&self, chunks: usize) -> bool {
        self.small.len() + self.main.len() > 2 * chunks + SLACK
    }

    /// Drops entries of chunks that went otherwise (amortised, I9).
    pub(crate) fn sweep(&mut self, place: impl Fn(&ChunkKey) -> Place) {
        for (queue, here) in [(&mut self.small, Place::Small), (&mut self.main, Place::Main)] {
            let mut seen = std::collections::BTreeSet::new();
            queue.retain(|k| place(k) == here && seen.insert(*k));
        }
    }

    /// The chunk that goes next, its clean blocks, and where it was; it is in no queue then.
    /// `clean_blocks`: of all chunks. `None`: nothing clean is left.
    pub(crate) fn next(
        &mut self,
        clean_blocks: u64,
        chunks: &mut impl Chunks,
    ) -> Option<(ChunkKey, u32, Place)> {
        let mut given = 0;
        loop {
            let from_small = !self.small.is_empty()
                && (self.small_blocks * SMALL_SHARE >= clean_blocks || self.main.is_empty());
            let (queue, here) = match from_small {
                true => (&mut self.small, Place::Small),
                false => (&mut self.main, Place::Main),
            };
            let key = queue.pop_front()?;
            let Some((r, clean)) = chunks.entry(&key) else { continue };
            if r.place != here {
                continue;
            }
            if here == Place::Small {
                self.small_blocks -= u64::from(clean);
            }
            if clean == 0 {
                r.place = Place::Out;
            } else if here == Place::Small && r.turns >= PROMOTED_AT {
                *r = Residency { place: Place::Main, turns: 0, ..*r };
                self.main.push_back(key);
            } else if here == Place::Main && r.turns > 0 && given < TURNS_PER_SEARCH {
                r.turns -= 1;
                given += 1;
                self.main.push_back(key);
            } else {
                r.place = Place::Out;
                if here == Place::Small {
                    self.remember(key);
                }
                return Some((key, clean, here));
            }
        }
    }

    /// It could not go after all.
    pub(crate) fn put_back(&mut self, key: ChunkKey, place: Place, r: &mut Residency, clean: u32) {
        r.place = place;
        match place {
            Place::Out => {}
            Place::Small => {
                self.small.push_front(key);
                self.small_blocks += u64::from(clean);
            }
            Place::Main => self.main.push_front(key),
        }
    }

    fn remember(&mut self, key: ChunkKey) {
        let hash = self.hasher.hash_one(key);
        self.ghosts.push_back(hash);
        *self.ghost.entry(hash).or_default() += 1;
        // As many as there are chunks to compare with.
        let most = (self.small.len() + self.main.len()).clamp(16, GHOST_MAX);
        while self.ghosts.len() > most {
            let Some(old) = self.ghosts.pop_front() else { break };
            if let Some(n) = self.ghost.get_mut(&old) {
                *n -= 1;
                if *n == 0 {
                    self.ghost.remove(&old);
                }
            }
        }
    }

    /// Heap.
    pub(crate) fn memory_bytes(&self) -> u64 {
        let key = size_of::<ChunkKey>();
        crate::memory::block((self.small.capacity() + self.main.capacity()) * key)
            + crate::memory::block(self.ghosts.capacity() * size_of::<u64>())
            + crate::memory::block(self.ghost.capacity() * (size_of::<(u64, u32)>() + 1) * 8 / 7)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_dataplane_protocol::{ChunkIndex, InodeId};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::collections::{BTreeMap, BTreeSet};

    /// A request of a trace: an object, and its blocks.
    type Request = (u64, u32);

    fn size(object: u64) -> u32 {
        // From 4 KiB to 4 MiB, most of them small.
        1 << (object.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40).trailing_zeros().min(10)
    }

    /// Zipf's law over `objects`, by the inverse of its sums.
    fn zipf(rng: &mut StdRng, sums: &[f64]) -> u64 {
        let at = rng.random::<f64>() * sums[sums.len() - 1];
        sums.partition_point(|s| *s < at) as u64
    }

    /// Popular objects by Zipf's law; now and then somebody reads many others once, one after another.
    fn trace(seed: u64, requests: usize, scans: bool) -> Vec<Request> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut sum = 0.0;
        let sums: Vec<f64> = (1..=20_000)
            .map(|i| {
                sum += 1.0 / f64::from(i).powf(0.9);
                sum
            })
            .collect();
        let (mut out, mut fresh) = (Vec::new(), SCANNED);
        while out.len() < requests {
            if scans && rng.random_range(0..2_000) == 0 {
                for _ in 0..3_000 {
                    out.push((fresh, size(fresh)));
                    fresh += 1;
                }
            }
            let object = zipf(&mut rng, &sums);
            out.push((object, size(object)));
        }
        out
    }

    fn key(object: u64) -> ChunkKey {
        (InodeId(object), ChunkIndex(0))
    }

    impl Chunks for BTreeMap<ChunkKey, (Residency, u32)> {
        fn entry(&mut self, key: &ChunkKey) -> Option<(&mut Residency, u32)> {
            self.get_mut(key).map(|(r, blocks)| (r, *blocks))
        }
    }

    /// Objects from here on are read once, by a scan.
    const SCANNED: u64 = 1_000_000;

    /// Share of the requests of popular objects found in a cache of so many blocks.
    fn ours(trace: &[Request], capacity: u64) -> f64 {
        let mut cache = Cache::default();
        let mut all: BTreeMap<ChunkKey, (Residency, u32)> = BTreeMap::new();
        let (mut used, mut hits) = (0u64, 0u64);
        for &(object, blocks) in trace {
            let key = key(object);
            if let Some((r, _)) = all.get_mut(&key) {
                hits += 1;
                r.read(0, blocks);
                continue;
            }
            while used + u64::from(blocks) > capacity {
                let (victim, n, _) = cache.next(used, &mut all).expect("something clean");
                all.remove(&victim);
                used -= u64::from(n);
            }
            let mut r = Residency::default();
            // The read that missed is answered by the fill: the store hears of the next one.
            cache.changed(key, &mut r, 0, blocks);
            all.insert(key, (r, blocks));
            used += u64::from(blocks);
            let small = all.values().filter(|(r, _)| r.place == Place::Small);
            debug_assert!(
                object % 997 != 0
                    || cache.small_blocks == small.map(|e| u64::from(e.1)).sum::<u64>()
            );
        }
        hits as f64 / trace.iter().filter(|r| r.0 < SCANNED).count() as f64
    }

    /// The same of a queue, in which a request of what is there moves it to the end (LRU) or not (FIFO).
    fn queue(trace: &[Request], capacity: u64, lru: bool) -> f64 {
        let mut at: BTreeMap<u64, u64> = BTreeMap::new();
        let mut order: BTreeMap<u64, Request> = BTreeMap::new();
        let (mut used, mut hits) = (0u64, 0u64);
        for (now, &(object, blocks)) in trace.iter().enumerate() {
            let now = now as u64;
            if let Some(was) = at.get(&object).copied() {
                hits += 1;
                if lru {
                    order.remove(&was);
                    order.insert(now, (object, blocks));
                    at.insert(object, now);
                }
                continue;
            }
            while used + u64::from(blocks) > capacity {
                let (_, (gone, n)) = order.pop_first().expect("something");
                at.remove(&gone);
                used -= u64::from(n);
            }
            order.insert(now, (object, blocks));
            at.insert(object, now);
            used += u64::from(blocks);
        }
        hits as f64 / trace.iter().filter(|r| r.0 < SCANNED).count() as f64
    }

    #[test]
    fn more_is_found_than_in_a_fifo_or_by_recency_and_a_scan_costs_little() {
        let all: BTreeSet<Request> = trace(1, 100_000, false).into_iter().collect();
        let blocks: u64 = all.iter().map(|r| u64::from(r.1)).sum();
        for share in [50, 20, 8] {
            let capacity = blocks / share;
            for seed in 0..3 {
                let (calm, scanned) = (trace(seed, 100_000, false), trace(seed, 100_000, true));
                let of = |t: &[Request]| {
                    (ours(t, capacity), queue(t, capacity, true), queue(t, capacity, false))
                };
                let (s3, lru, fifo) = of(&calm);
                let (s3_scanned, lru_scanned, fifo_scanned) = of(&scanned);
                println!(
                    "1/{share} of the bytes, seed {seed}: Zipf {s3:.3} (LRU {lru:.3}, FIFO {fifo:.3}), with \
                     scans {s3_scanned:.3} (LRU {lru_scanned:.3}, FIFO {fifo_scanned:.3})"
                );
                assert!(s3 > lru && s3 > fifo, "popular objects stay");
                assert!(s3_scanned > lru_scanned * 1.05 && s3_scanned > fifo_scanned * 1.1);
            }
        }
    }

    #[test]
    fn the_first_hit_after_a_miss_is_the_second_use_and_going_on_is_the_same_one() {
        let (mut cache, mut r) = (Cache::default(), Residency::default());
        cache.changed(key(1), &mut r, 0, 1024);
        r.read(256, 512);
        r.read(512, 1024);
        assert_eq!(r.turns, 0, "the reader that missed goes on");
        r.read(0, 256);
        assert_eq!(r.turns, 1, "somebody begins anew");
        let mut small = Residency::default();
        cache.changed(key(2), &mut small, 0, 2);
        small.read(0, 2);
        assert_eq!(small.turns, 1);
    }

    #[test]
    fn one_pass_over_a_chunk_is_one_use() {
        let mut r = Residency::default();
        for at in 0..16 {
            r.read(at * 64, (at + 1) * 64);
        }
        assert_eq!(r.turns, 0);
        r.read(0, 64);
        assert_eq!(r.turns, 1);
        for at in [900, 3, 2, 1] {
            r.read(at, at + 1);
        }
        assert_eq!(r.turns, TURNS_MAX);
    }

    #[test]
    fn what_could_not_go_is_next_again_and_gone_chunks_are_passed_over() {
        let mut cache = Cache::default();
        let mut all: BTreeMap<ChunkKey, (Residency, u32)> = BTreeMap::new();
        for object in 0..20 {
            let mut r = Residency::default();
            cache.changed(key(object), &mut r, 0, 10);
            all.insert(key(object), (r, 10));
        }
        let (first, n, place) = cache.next(200, &mut all).expect("clean");
        assert_eq!((first, n, place), (key(0), 10, Place::Small));
        let r = &mut all.get_mut(&first).expect("there").0;
        cache.put_back(first, place, r, n);
        assert_eq!(cache.small_blocks, 200);
        assert_eq!(cache.next(200, &mut all).expect("clean").0, first);
        all.remove(&first);
        // It goes by another way: whoever removes it tells the cache what it held.
        let mut gone = all.remove(&key(1)).expect("there").0;
        cache.changed(key(1), &mut gone, 10, 0);
        assert_eq!(cache.next(180, &mut all).expect("clean").0, key(2));
        all.remove(&key(2));
        let mut rest = 0;
        while let Some((victim, _, _)) = cache.next(10, &mut all) {
            all.remove(&victim);
            rest += 1;
        }
        assert_eq!((rest, cache.small_blocks), (17, 0));
        // What left the small queue unread and comes back goes into the main one.
        let mut r = Residency::default();
        cache.changed(key(5), &mut r, 0, 10);
        assert_eq!(r.place, Place::Main);
    }

    #[test]
    fn queues_and_ghost_are_bounded_whatever_goes_by_other_ways() {
        let mut cache = Cache::default();
        let mut all: BTreeMap<ChunkKey, (Residency, u32)> = BTreeMap::new();
        for object in 0..300_000u64 {
            let mut r = Residency::default();
            cache.changed(key(object), &mut r, 0, 1);
            if cache.is_stale(all.len() + 1) {
                cache.sweep(|k| all.get(k).map_or(Place::Out, |e| e.0.place));
            }
            // Dropped by its file's end.
            cache.changed(key(object), &mut r, 1, 0);
            assert!(cache.small.len() + cache.main.len() <= 2 + SLACK + 1);
        }
        for object in 0..200_000u64 {
            let mut r = Residency::default();
            cache.changed(key(object), &mut r, 0, 1);
            all.insert(key(object), (r, 1));
        }
        while let Some((victim, _, _)) = cache.next(all.len() as u64, &mut all) {
            all.remove(&victim);
            assert!(cache.ghosts.len() <= GHOST_MAX && cache.ghost.len() <= GHOST_MAX);
        }
        assert!(all.is_empty());
    }
}
