//! Clean data of groups that were given away, kept for those who hold them now.
//!
//! A released group's clean data is gone from the index and from the journal's point of view, so that a
//! restart, a checkpoint and a group that comes back know nothing of it. Its blocks on the device stay as
//! they are until somebody needs the space: they count as free, and are the first to go (I11). What lies
//! in them is named by content (R34) and carries its checksums (I10), so it can't be stale; nothing here
//! ever changes it, and a flush or a view of the same inode's other groups does not touch it.
//!
//! Bounded (I9) in chunks and blocks; the oldest go.

use crate::extent::{Extent, ExtentList, Run, normalise, subtract};
use crate::index::ChunkKey;
use crate::record::Record;
use crate::store::Store;
use crate::types::{BLOCK, BaseView, PieceSource, ReadPlan};
use ebb_dataplane_protocol::{ChunkIndex, InodeId, PgId};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

/// Chunks kept.
const CHUNKS_MAX: usize = 16_384;
/// Pieces of them. With the blocks' checksums it makes less than 16 MiB of memory.
const EXTENTS_MAX: usize = 65_536;
/// Blocks kept (4 GiB), which is what the memory of their checksums is bounded by.
const BLOCKS_MAX: u64 = 1 << 20;
/// And one in so many of the device's.
const SHARE: u64 = 4;

#[derive(Debug, Default)]
pub(crate) struct Remnants {
    chunks: BTreeMap<ChunkKey, (u64, ExtentList)>,
    /// Oldest first; an entry whose number is not its chunk's is over.
    order: VecDeque<(u64, ChunkKey)>,
    last: u64,
    blocks: u64,
    extents: usize,
}

impl Remnants {
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    fn take(&mut self, key: &ChunkKey) -> Vec<Run> {
        let Some((_, list)) = self.chunks.remove(key) else { return Vec::new() };
        let runs: Vec<Run> = list.0.iter().map(Extent::run).collect();
        self.extents -= runs.len();
        self.blocks -= runs.iter().map(|r| u64::from(r.blocks)).sum::<u64>();
        runs
    }

    fn take_oldest(&mut self) -> Option<Vec<Run>> {
        while let Some((number, key)) = self.order.pop_front() {
            if self.chunks.get(&key).is_some_and(|c| c.0 == number) {
                return Some(self.take(&key));
            }
        }
        None
    }

    fn keep(&mut self, key: ChunkKey, list: ExtentList) {
        self.last += 1;
        self.extents += list.0.len();
        self.blocks += list.0.iter().map(|e| u64::from(e.blocks())).sum::<u64>();
        self.chunks.insert(key, (self.last, list));
        self.order.push_back((self.last, key));
        if self.order.len() > 2 * CHUNKS_MAX {
            let chunks = &self.chunks;
            self.order.retain(|(n, key)| chunks.get(key).is_some_and(|c| c.0 == *n));
        }
    }
}

impl Store {
    /// The clean extents of a group that is about to be dropped from the index. Those in the journal's
    /// ring are left out: their blocks are written over when it comes round.
    pub(crate) fn leaving(&self, record: &Record) -> Vec<(ChunkKey, ExtentList)> {
        let Record::Release { pg, .. } = record else { return Vec::new() };
        let ring = &self.index.ring;
        self.index
            .chunks
            .iter()
            .filter(|(key, _)| self.index.pg_of(**key) == *pg)
            .filter_map(|(key, c)| {
                let clean = |e: &&Extent| !e.origin.is_dirty() && !ring.contains(&e.location);
                let list: Vec<Extent> = c.extents.0.iter().filter(clean).cloned().collect();
                (!list.is_empty()).then_some((*key, ExtentList(list)))
            })
            .collect()
    }

    /// After the record took effect: what left stays, and what is dropped for good goes from here too.
    pub(crate) fn keep_remnants(&mut self, left: Vec<(ChunkKey, ExtentList)>, record: &Record) {
        match record {
            Record::DropInode { scope } => {
                self.drop_remnants_where(|key| key.0 == scope.inode);
            }
            Record::EvictInode { inode } => self.drop_remnants_where(|key| key.0 == *inode),
            Record::EvictAll => self.drop_remnants_where(|_| true),
            _ => {}
        }
        if left.is_empty() {
            return;
        }
        let blocks_max = BLOCKS_MAX.min(u64::from(self.alloc.capacity()) / SHARE);
        let mut kept = Vec::new();
        for (key, list) in left {
            let old = self.remnants.take(&key);
            self.index.released.extend(old);
            let runs = list.0.iter().map(Extent::run);
            if runs.clone().map(|r| u64::from(r.blocks)).sum::<u64>() > blocks_max {
                continue;
            }
            kept.extend(runs);
            self.remnants.keep(key, list);
        }
        // Theirs are not free.
        normalise(&mut kept);
        normalise(&mut self.index.released);
        self.index.released = subtract(&self.index.released, &kept);
        let over = |r: &Remnants| {
            r.blocks > blocks_max || r.chunks.len() > CHUNKS_MAX || r.extents > EXTENTS_MAX
        };
        while over(&self.remnants) {
            let Some(oldest) = self.remnants.take_oldest() else { break };
            self.index.released.extend(oldest);
        }
    }

    /// Frees remnants, oldest first, until `blocks` are to be had or on their way, or none is left.
    pub(crate) fn make_room(&mut self, blocks: u32) {
        while u64::from(self.available()) + self.deferred_blocks < u64::from(blocks) {
            let Some(oldest) = self.remnants.take_oldest() else { return };
            self.index.released.extend(oldest);
            self.collect();
        }
    }

    fn drop_remnants_where(&mut self, which: impl Fn(&ChunkKey) -> bool) {
        let keys: Vec<ChunkKey> =
            self.remnants.chunks.keys().filter(|k| which(k)).copied().collect();
        for key in keys {
            let runs = self.remnants.take(&key);
            self.index.released.extend(runs);
        }
    }

    /// Forgets what is left of a group: it was kept long enough.
    pub fn drop_remnants(&mut self, pg: PgId) {
        let count = self.index.pgs.len() as u16;
        self.drop_remnants_where(|key| PgId::of_chunk(key.0, key.1, count) == pg);
        self.collect();
    }

    /// Forgets what is left of a chunk: it is damaged.
    pub fn drop_remnant(&mut self, inode: InodeId, chunk: ChunkIndex) {
        let runs = self.remnants.take(&(inode, chunk));
        self.index.released.extend(runs);
        self.collect();
    }

    /// Plans a read of what is left of a chunk under one content, or of what is clean of it if its group was
    /// not released yet: its new holder may ask before that. `None`: not all of it is here.
    pub fn plan_remnant(
        &mut self,
        inode: InodeId,
        chunk: ChunkIndex,
        blocks: Range<u32>,
        base: BaseView,
    ) -> Option<ReadPlan> {
        let key = (inode, chunk);
        let pieces = match self.remnants.chunks.get(&key) {
            Some((_, list)) => crate::read::lay(list, None, chunk, blocks, base),
            None => {
                let extents = &self.index.chunks.get(&key)?.extents.0;
                let clean = extents.iter().filter(|e| !e.origin.is_dirty()).cloned().collect();
                crate::read::lay(&ExtentList(clean), None, chunk, blocks, base)
            }
        };
        let whole = pieces.iter().all(|p| match &p.source {
            PieceSource::Zero => true,
            PieceSource::Miss => false,
            // Cut shorter than the asker's view counts: another state of the file.
            PieceSource::Device { tail_valid, .. } => {
                let last = chunk.start() + u64::from(p.blocks.end - 1) * BLOCK as u64;
                let counts = base.valid_bytes.saturating_sub(last).min(BLOCK as u64);
                u64::from(*tail_valid) == counts
            }
        });
        whole.then(|| self.guarded(pieces))
    }
}
