//! The `dram` tier: copies in memory of device blocks that are read again and again.
//!
//! Blocks are named by where they are on the device. A block of the device is written once between its
//! allocation and its release, so a copy is right until the next write there, which every command that writes
//! goes past ([`Dram::forget`]); and each use compares the checksum of the copy's time with the index's.
//! It holds copies only: what is lost with it is read from the device.
//!
//! **Who gets in.** A copy costs the CPU as much as it saves later, and a scan would pay that for nothing. So the
//! first read of a block leaves no more than its number in a table of what was read lately, and the second one
//! brings it in. **Who goes**: a hand goes round; what was used since it came by last stays, as often as it
//! was used, three times at most. That is S3-FIFO (Yang et al., "FIFO queues are all you need for cache
//! eviction", SOSP 2023) with a small queue that holds names only: what it would have served is on the
//! device, a hundred microseconds away.

use super::{Buffer, Buffers, Purpose};
use ebb_store::BLOCK;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::sync::Arc;

/// Blocks with the same low bits that are remembered; four times as many in all as there are copies.
const SEEN_WAYS: usize = 4;
/// Uses that count.
const USES_MAX: u8 = 3;

/// Numbers of blocks are as good as their hash.
#[derive(Default)]
struct BlockHasher(u64);

impl Hasher for BlockHasher {
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u32(u32::from(*b));
        }
    }
    fn write_u32(&mut self, n: u32) {
        // Fibonacci hashing: the high bits, which the table takes first, depend on all others.
        self.0 = (self.0 ^ u64::from(n)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

struct Entry<B> {
    block: u32,
    crc: u32,
    uses: u8,
    /// `None`: the place is free.
    data: Option<Arc<B>>,
}

/// Copies of blocks.
pub(crate) struct Dram<B> {
    entries: Vec<Entry<B>>,
    index: HashMap<u32, u32, BuildHasherDefault<BlockHasher>>,
    free: Vec<u32>,
    hand: usize,
    max: usize,
    /// Blocks read lately, the newest first, by the low bits of their number; 0: none, else number + 1.
    seen: Vec<[u32; SEEN_WAYS]>,
}

/// The block at a device offset.
fn number(offset: u64) -> u32 {
    (offset / BLOCK as u64) as u32
}

impl<B: Buffer> Dram<B> {
    /// For `bytes` of blocks; less than one block: none at all.
    pub(crate) fn new(bytes: u64) -> Self {
        let max = (bytes / BLOCK as u64).min(u64::from(u32::MAX / 4)) as usize;
        let seen = if max == 0 { 0 } else { max.next_power_of_two() };
        Self {
            entries: Vec::new(),
            index: HashMap::default(),
            free: Vec::new(),
            hand: 0,
            max,
            seen: vec![[0; SEEN_WAYS]; seen],
        }
    }

    /// Bytes held.
    pub(crate) fn bytes(&self) -> u64 {
        self.index.len() as u64 * BLOCK as u64
    }

    /// The copy of the block at `offset`, if it has this checksum.
    pub(crate) fn get(&mut self, offset: u64, crc: u32) -> Option<&Arc<B>> {
        let at = *self.index.get(&number(offset))?;
        let entry = &mut self.entries[at as usize];
        if entry.crc != crc {
            debug_assert!(false, "a copy outlived its block");
            return None;
        }
        entry.uses = (entry.uses + 1).min(USES_MAX);
        entry.data.as_ref()
    }

    /// Whether all of these are here.
    pub(crate) fn has_all(&self, offset: u64, crcs: &[u32]) -> bool {
        let first = number(offset);
        !self.index.is_empty()
            && (first..).zip(crcs).all(|(block, crc)| {
                let Some(at) = self.index.get(&block) else { return false };
                let same = self.entries[*at as usize].crc == *crc;
                debug_assert!(same, "a copy outlived its block");
                same
            })
    }

    /// A block was read from the device, and is what the index says. It is kept if it was read before.
    pub(crate) fn read(&mut self, offset: u64, crc: u32, bytes: &[u8], from: &mut dyn Buffers<B>) {
        if self.max == 0 {
            return;
        }
        let block = number(offset);
        let mask = self.seen.len() - 1;
        let seen = &mut self.seen[block as usize & mask];
        let name = block.wrapping_add(1);
        if !seen.contains(&name) {
            seen.rotate_right(1);
            seen[0] = name;
            return;
        }
        if !self.index.contains_key(&block) {
            self.keep(block, crc, bytes, from);
        }
    }

    fn keep(&mut self, block: u32, crc: u32, bytes: &[u8], from: &mut dyn Buffers<B>) {
        let at = match self.free.pop() {
            Some(at) => at,
            None if self.entries.len() < self.max => {
                self.entries.push(Entry { block: 0, crc: 0, uses: 0, data: None });
                (self.entries.len() - 1) as u32
            }
            None => self.make_room(),
        };
        // Those that are being sent still have theirs.
        let Some(mut buf) = from.take(BLOCK, Purpose::Dram) else {
            self.free.push(at);
            return;
        };
        buf.bytes_mut()[..BLOCK].copy_from_slice(bytes);
        self.entries[at as usize] = Entry { block, crc, uses: 0, data: Some(Arc::new(buf)) };
        self.index.insert(block, at);
    }

    /// Empties the place of the entry that is used least. Every entry is in use, and there is one.
    fn make_room(&mut self) -> u32 {
        loop {
            let at = self.hand;
            self.hand = (self.hand + 1) % self.entries.len();
            let entry = &mut self.entries[at];
            if entry.uses == 0 {
                entry.data = None;
                self.index.remove(&entry.block);
                return at as u32;
            }
            entry.uses -= 1;
        }
    }

    /// These bytes of the device are about to be written.
    pub(crate) fn forget(&mut self, offset: u64, bytes: usize) {
        if self.index.is_empty() {
            return;
        }
        let blocks: Range<u32> = number(offset)..number(offset + bytes as u64 + (BLOCK as u64 - 1));
        for block in blocks {
            if let Some(at) = self.index.remove(&block) {
                self.entries[at as usize].data = None;
                self.free.push(at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_store::AlignedBuf;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    use std::collections::VecDeque;

    struct Heap;
    impl Buffers<AlignedBuf> for Heap {
        fn take(&mut self, bytes: usize, _: Purpose) -> Option<AlignedBuf> {
            Some(AlignedBuf::zeroed(bytes))
        }
    }

    fn block_of(n: u32) -> Vec<u8> {
        n.to_le_bytes().repeat(BLOCK / 4)
    }

    /// Reads a block as the core does; whether it was here.
    fn access(dram: &mut Dram<AlignedBuf>, n: u32) -> bool {
        let offset = u64::from(n) * BLOCK as u64;
        if let Some(copy) = dram.get(offset, n) {
            assert_eq!(copy.bytes()[..4], n.to_le_bytes());
            return true;
        }
        dram.read(offset, n, &block_of(n), &mut Heap);
        false
    }

    fn check(dram: &Dram<AlignedBuf>) {
        assert!(dram.index.len() <= dram.max && dram.entries.len() <= dram.max);
        assert_eq!(dram.index.len() + dram.free.len(), dram.entries.len());
        for (block, at) in &dram.index {
            let entry = &dram.entries[*at as usize];
            assert!(entry.block == *block && entry.data.is_some());
        }
        assert!(dram.free.iter().all(|at| dram.entries[*at as usize].data.is_none()));
    }

    #[test]
    fn the_second_read_brings_a_block_in_and_a_write_takes_it_out() {
        let mut dram = Dram::new(64 * BLOCK as u64);
        assert!(!access(&mut dram, 7));
        assert!(!access(&mut dram, 7));
        assert!(access(&mut dram, 7));
        assert!(dram.has_all(7 * BLOCK as u64, &[7]) && !dram.has_all(7 * BLOCK as u64, &[7, 8]));
        let held = dram.get(7 * BLOCK as u64, 7).cloned().expect("here");
        dram.forget(6 * BLOCK as u64, 2 * BLOCK);
        assert!(!access(&mut dram, 7), "it was written");
        assert_eq!(held.bytes()[..4], 7u32.to_le_bytes(), "who sends it still has it");
        check(&dram);
    }

    #[test]
    fn nothing_is_kept_without_memory() {
        let mut none = Dram::new(0);
        for _ in 0..4 {
            assert!(!access(&mut none, 1));
        }
        assert_eq!(none.bytes(), 0);
    }

    #[test]
    fn reads_and_writes_in_any_order_keep_the_books() {
        let mut rng = SmallRng::seed_from_u64(5);
        let mut dram = Dram::new(100 * BLOCK as u64);
        for step in 0..50_000u32 {
            let n = rng.random_range(0..300);
            if rng.random_bool(0.1) {
                dram.forget(u64::from(n) * BLOCK as u64, BLOCK * rng.random_range(1..20));
            } else {
                access(&mut dram, n);
            }
            if step % 100 == 0 {
                check(&dram);
            }
        }
    }

    /// Least recently used, as the measure.
    struct Lru {
        max: usize,
        stamps: HashMap<u32, u64>,
        order: VecDeque<(u32, u64)>,
        now: u64,
    }

    impl Lru {
        fn access(&mut self, n: u32) -> bool {
            self.now += 1;
            let hit = self.stamps.insert(n, self.now).is_some();
            self.order.push_back((n, self.now));
            while self.stamps.len() > self.max {
                let Some((old, stamp)) = self.order.pop_front() else { break };
                if self.stamps.get(&old) == Some(&stamp) {
                    self.stamps.remove(&old);
                }
            }
            hit
        }
    }

    /// Requests of a popular part and of scans, in turns: Zipf's law with the exponent of web and file traces
    /// (0.9), and each scan reads ten times what there is memory for.
    #[test]
    fn scans_do_not_wash_out_what_is_popular() {
        const MAX: usize = 2_000;
        const POPULAR: usize = 40_000;
        let mut sum = 0.0;
        let weights: Vec<f64> = (1..=POPULAR)
            .map(|rank| {
                sum += 1.0 / (rank as f64).powf(0.9);
                sum
            })
            .collect();
        let mut rng = SmallRng::seed_from_u64(11);
        let mut dram = Dram::new((MAX * BLOCK) as u64);
        let mut lru = Lru { max: MAX, stamps: HashMap::new(), order: VecDeque::new(), now: 0 };
        let (mut ours, mut theirs, mut asked) = (0u32, 0u32, 0u32);
        for round in 0..20u32 {
            for _ in 0..20_000 {
                let x = rng.random_range(0.0..sum);
                let rank = weights.partition_point(|w| *w < x) as u32;
                // Popular blocks lie anywhere.
                let n = rank.wrapping_mul(2_654_435_761) >> 8;
                asked += 1;
                ours += u32::from(access(&mut dram, n));
                theirs += u32::from(lru.access(n));
            }
            let start = (1 << 24) + round * 100_000;
            for n in start..start + 10 * MAX as u32 {
                access(&mut dram, n);
                lru.access(n);
            }
        }
        check(&dram);
        let (ours, theirs) =
            (f64::from(ours) / f64::from(asked), f64::from(theirs) / f64::from(asked));
        println!("hit rates: {ours:.3}, least recently used {theirs:.3}");
        assert!(ours > theirs + 0.05, "{ours:.3} against {theirs:.3}");
    }
}
