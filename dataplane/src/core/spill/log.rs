//! What lies where on a spill device: a log written round and round, and the index of it in memory. Pure.
//!
//! The device's blocks are a ring. What is written goes to the head and takes the place of the oldest; an entry
//! is forgotten before anything is written over it, and is known only after its own write ended. An entry is a
//! run of blocks from the beginning of a granule (256 KiB of a chunk) on, under one content, with one
//! checksum over all of it: it is found by the name of its bytes (R34), or not at all.
//!
//! Bounded (I9): about 100 bytes of memory an entry, which is 1.6 KiB for a whole chunk of 4 MiB, and at most one
//! entry per 64 KiB of the device; past that the oldest go.

use ebb_dataplane_protocol::{ChunkIndex, ContentId, InodeId};
use ebb_store::BLOCK;
use std::collections::{BTreeMap, VecDeque};

/// Bytes of the device per entry, at least.
const ENTRY_SHARE: u64 = 64 << 10;
/// An entry in the older half of the log is written again when its bytes are evicted again.
const OLD_SHARE: u32 = 2;

/// A granule: its chunk, and its number in it.
pub(crate) type Key = (InodeId, ChunkIndex, u8);

/// Where the bytes of a granule are, and what they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) content: ContentId,
    /// First block in the log.
    pub(crate) at: u32,
    /// CRC-32C of all its blocks.
    pub(crate) crc: u32,
    /// Bytes of the last block that count; zeros follow.
    pub(crate) tail: u16,
    /// From the granule's first one on.
    pub(crate) blocks: u8,
}

/// The log and its index.
#[derive(Debug, Default)]
pub(crate) struct Log {
    entries: BTreeMap<Key, Entry>,
    /// In the order of the ring, oldest first: the first block of each. One whose entry is elsewhere is over.
    order: VecDeque<(u32, Key)>,
    blocks: u32,
    head: u32,
    held: u64,
    entries_max: usize,
}

impl Log {
    /// A log of as many whole blocks as there are in `bytes`; 0: holds nothing.
    pub(crate) fn new(bytes: u64) -> Self {
        let blocks = (bytes / BLOCK as u64).min(u64::from(u32::MAX)) as u32;
        let entries_max = (bytes / ENTRY_SHARE) as usize;
        Self { blocks, entries_max, ..Self::default() }
    }

    /// Bytes it may hold.
    pub(crate) fn capacity(&self) -> u64 {
        u64::from(self.blocks) * BLOCK as u64
    }

    /// Bytes that can be found.
    pub(crate) fn bytes(&self) -> u64 {
        self.held * BLOCK as u64
    }

    /// The granule's bytes under this content.
    pub(crate) fn find(&self, key: &Key, content: ContentId) -> Option<Entry> {
        self.entries.get(key).filter(|e| e.content == content).copied()
    }

    /// Whether this very entry is still there: not forgotten, replaced or about to be written over.
    pub(crate) fn has(&self, key: &Key, entry: &Entry) -> bool {
        self.entries.get(key) == Some(entry)
    }

    /// Whether an entry is among those that go next.
    pub(crate) fn is_old(&self, entry: &Entry) -> bool {
        let left = (u64::from(entry.at) + u64::from(self.blocks) - u64::from(self.head))
            % u64::from(self.blocks.max(1));
        left < u64::from(self.blocks / OLD_SHARE)
    }

    /// The place of the next `blocks` blocks, at most as many as the log has. Nothing is known to be there any more.
    pub(crate) fn room(&mut self, blocks: u32) -> u32 {
        assert!(blocks > 0 && blocks <= self.blocks, "a write fits the log");
        if self.blocks - self.head < blocks {
            // The end is too near. What lies there is the oldest.
            let end = self.blocks;
            self.forget_oldest(self.head, end);
            self.head = 0;
        }
        let at = self.head;
        self.forget_oldest(at, at + blocks);
        self.head += blocks;
        at
    }

    fn forget_oldest(&mut self, from: u32, to: u32) {
        while let Some((at, key)) = self.order.front().copied() {
            if !(from..to).contains(&at) {
                return;
            }
            self.order.pop_front();
            self.forget_at(&key, at);
        }
    }

    /// An entry was written to where `room` said, in the order of its answers.
    pub(crate) fn insert(&mut self, key: Key, entry: Entry) {
        while self.order.len() >= self.entries_max.max(1) {
            let Some((at, old)) = self.order.pop_front() else { break };
            self.forget_at(&old, at);
        }
        self.forget(&key);
        self.held += u64::from(entry.blocks);
        self.entries.insert(key, entry);
        self.order.push_back((entry.at, key));
    }

    fn forget_at(&mut self, key: &Key, at: u32) {
        if self.entries.get(key).is_some_and(|e| e.at == at) {
            self.forget(key);
        }
    }

    /// Forgets a granule.
    pub(crate) fn forget(&mut self, key: &Key) {
        if let Some(gone) = self.entries.remove(key) {
            self.held -= u64::from(gone.blocks);
        }
    }

    /// Forgets a file.
    pub(crate) fn forget_inode(&mut self, inode: InodeId) {
        let all = (inode, ChunkIndex(0), 0)..=(inode, ChunkIndex(u32::MAX), u8::MAX);
        let keys: Vec<Key> = self.entries.range(all).map(|(key, _)| *key).collect();
        for key in keys {
            self.forget(&key);
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.order.clear();
        self.held = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    /// Whose block it is: its granule, its content, its number there, and the write it came with.
    type Block = (Key, ContentId, u8, u32);

    /// The log over a device that remembers what was written where.
    struct Model {
        log: Log,
        device: Vec<Option<Block>>,
        /// The write that each granule's newest entry came with.
        writes: u32,
        newest: BTreeMap<Key, (ContentId, u32)>,
    }

    impl Model {
        fn new(blocks: u32) -> Self {
            Self {
                log: Log::new(u64::from(blocks) * BLOCK as u64),
                device: vec![None; blocks as usize],
                writes: 0,
                newest: BTreeMap::new(),
            }
        }

        /// A batch, as the core writes one: room, the write, the entries.
        fn write(&mut self, rng: &mut SmallRng, ends: bool) {
            let of = |rng: &mut SmallRng| {
                let key =
                    (InodeId(rng.random_range(1..6)), ChunkIndex(rng.random_range(0..3)), 0u8);
                let content = ContentId(rng.random_range(1..4));
                (key, content, rng.random_range(1..=64u8))
            };
            let n = rng.random_range(1..6);
            let batch: Vec<_> = (0..n).map(|_| of(rng)).collect();
            let blocks: u32 = batch.iter().map(|b| u32::from(b.2)).sum();
            let at = self.log.room(blocks);
            let (mut next, mut entries) = (at, Vec::new());
            for (key, content, blocks) in batch {
                self.writes += 1;
                let first = next;
                for i in 0..blocks {
                    self.device[next as usize] = Some((key, content, i, self.writes));
                    next += 1;
                }
                let entry = Entry { content, at: first, crc: self.writes, tail: 4096, blocks };
                entries.push((key, entry));
            }
            self.check();
            if ends {
                for (key, entry) in entries {
                    self.log.insert(key, entry);
                    self.newest.insert(key, (entry.content, entry.crc));
                }
            }
        }

        /// Whatever is found is, on the device, what it is called, and the newest of its name.
        fn check(&self) {
            let mut held = 0;
            for (key, e) in &self.log.entries {
                held += u64::from(e.blocks);
                for i in 0..e.blocks {
                    let there = self.device[e.at as usize + usize::from(i)];
                    assert_eq!(there, Some((*key, e.content, i, e.crc)), "{key:?} {e:?}");
                }
                assert_eq!(self.newest.get(key), Some(&(e.content, e.crc)), "the newest");
                assert_eq!(self.log.find(key, e.content), Some(*e));
                assert_eq!(self.log.find(key, ContentId(99)), None, "never by another name");
                assert!(self.log.order.contains(&(e.at, *key)), "it goes when its time comes");
            }
            assert_eq!(self.log.bytes(), held * BLOCK as u64);
            assert!(held <= u64::from(self.log.blocks), "each block is of one entry");
            assert!(self.log.order.len() <= self.log.entries_max, "bounded");
        }
    }

    #[test]
    fn what_is_found_is_what_it_is_called_however_often_the_log_wraps() {
        for seed in 0..40 {
            println!("seed {seed}");
            let mut rng = SmallRng::seed_from_u64(seed);
            let blocks = rng.random_range(400..3000);
            let mut m = Model::new(blocks);
            let mut found = 0;
            for _ in 0..600 {
                match rng.random_range(0..20) {
                    0 => m.log.forget_inode(InodeId(rng.random_range(1..6))),
                    // A write that failed: what it was to replace is not to be found.
                    1 => m.write(&mut rng, false),
                    _ => m.write(&mut rng, true),
                }
                m.check();
                found += m.log.entries.len();
            }
            assert!(found > 600, "it holds something: {found}");
            m.log.clear();
            m.check();
        }
    }

    #[test]
    fn small_entries_are_bounded_by_their_number() {
        let mut log = Log::new(64 << 20);
        for n in 0..10_000u32 {
            let at = log.room(1);
            let key = (InodeId(u64::from(n)), ChunkIndex(0), 0);
            log.insert(key, Entry { content: ContentId(1), at, crc: 0, tail: 1, blocks: 1 });
            assert!(log.order.len() <= 1024 && log.entries.len() <= 1024);
        }
        let last = (InodeId(9_999), ChunkIndex(0), 0);
        assert!(log.find(&last, ContentId(1)).is_some(), "the oldest went");
    }

    #[test]
    fn what_goes_next_is_old_and_what_was_just_written_is_not() {
        let mut log = Log::new(100 * BLOCK as u64);
        let entries: Vec<Entry> = (0..100)
            .map(|_| Entry { content: ContentId(1), at: log.room(1), crc: 0, tail: 1, blocks: 1 })
            .collect();
        log.room(10);
        assert!(log.is_old(&entries[10]) && log.is_old(&entries[59]));
        assert!(!log.is_old(&entries[60]) && !log.is_old(&entries[99]));
    }

    #[test]
    fn no_device_holds_nothing() {
        let log = Log::new(0);
        assert_eq!((log.capacity(), log.bytes()), (0, 0));
        assert_eq!(log.find(&(InodeId(1), ChunkIndex(0), 0), ContentId(0)), None);
    }
}
