//! The index: chunks, inodes, session windows and placement groups, all in RAM; what a checkpoint saves.
//!
//! Every change goes through [`Index::mutate`], [`Index::inode_mut`] or [`Index::session_mut`], which keep the
//! counters, hand freed blocks to `released`, and save the old state for a checkpoint that has not
//! reached the entry yet (so that a checkpoint is the exact state at one point of the journal).

use crate::cache::{Cache, Chunks, Place, Residency};
use crate::capture::Capture;
use crate::extent::{Extent, ExtentList, Origin, Run, normalise, subtract, total};
use crate::types::{BLOCK, Scope};
use crate::window::Window;
use ebb_dataplane_protocol::{
    ChunkIndex, ContentId, Generation, InodeId, MapVersion, NodeId, PgEpoch, PgId, SessionId,
    ViewVersion,
};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

pub(crate) type ChunkKey = (InodeId, ChunkIndex);

/// Windows kept; past it the one that was idle longest goes (its inodes' generations were fenced).
pub(crate) const SESSIONS_MAX: usize = 65_536;

/// A sealed generation's extents in one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pin {
    pub(crate) generation: Generation,
    pub(crate) extents: ExtentList,
}

/// A chunk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chunk {
    pub(crate) extents: ExtentList,
    pub(crate) pins: Vec<Pin>,
    /// Last checkpoint that has it.
    pub(crate) captured: u64,
    /// What the cache keeps of it.
    pub(crate) residency: Residency,
}

impl Chunk {
    fn is_empty(&self) -> bool {
        self.extents.0.is_empty() && self.pins.is_empty()
    }
    pub(crate) fn all_extents(&self) -> impl Iterator<Item = &Extent> {
        self.extents.0.iter().chain(self.pins.iter().flat_map(|p| p.extents.0.iter()))
    }
    pub(crate) fn runs(&self) -> Vec<Run> {
        let mut runs: Vec<Run> = self.all_extents().map(Extent::run).collect();
        normalise(&mut runs);
        runs
    }
    pub(crate) fn pin(&self, g: Generation) -> Option<&ExtentList> {
        self.pins.iter().find(|p| p.generation == g).map(|p| &p.extents)
    }
    fn summary(&self) -> Summary {
        let mut s = Summary::default();
        if self.is_empty() {
            return s;
        }
        // A chunk of small writes has a thousand extents, and this is done with each of them: one pass.
        for e in &self.extents.0 {
            if e.origin.is_dirty() {
                s.dirty += e.blocks();
            } else {
                s.clean += e.blocks();
            }
            s.encoded += e.encoded_len();
            s.heap += crate::memory::extent_heap(e);
        }
        s.has_dirty = s.dirty > 0;
        s.pinned = !self.pins.is_empty();
        if s.pinned {
            let mut runs: Vec<Run> = self
                .extents
                .0
                .iter()
                .filter(|e| e.origin.is_dirty())
                .chain(self.pins.iter().flat_map(|p| p.extents.0.iter()))
                .map(Extent::run)
                .collect();
            normalise(&mut runs);
            s.dirty = total(&runs);
        }
        s.extents = self.all_extents().count() as u32;
        s.encoded += crate::capture::chunk_overhead(self);
        s.heap += crate::memory::chunk_heap(self);
        s
    }
}

impl Chunks for BTreeMap<ChunkKey, Chunk> {
    fn entry(&mut self, key: &ChunkKey) -> Option<(&mut Residency, u32)> {
        let chunk = self.get_mut(key)?;
        let clean =
            chunk.extents.0.iter().filter(|e| !e.origin.is_dirty()).map(Extent::blocks).sum();
        Some((&mut chunk.residency, clean))
    }
}

/// What the counters need of a chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Summary {
    /// Blocks that only this node holds.
    dirty: u32,
    clean: u32,
    has_dirty: bool,
    pinned: bool,
    extents: u32,
    encoded: usize,
    heap: u64,
}

/// Summaries of chunks with many extents, which small writes change one after the other: a pass over a thousand
/// extents before each change is saved.
#[derive(Debug, Default)]
pub(crate) struct Summaries(HashMap<ChunkKey, Summary>);

/// Chunks with fewer extents are summed up in no time.
const SUMMED_EXTENTS_MIN: usize = 32;
/// Summaries kept: 128 KiB.
const SUMMARIES_MAX: usize = 2048;

impl Summaries {
    /// What the chunk's summary is, as it is now.
    fn of(&self, key: ChunkKey, chunk: &Chunk) -> Summary {
        let known = self.0.get(&key).filter(|_| chunk.extents.0.len() >= SUMMED_EXTENTS_MIN);
        let Some(known) = known else { return chunk.summary() };
        debug_assert_eq!(*known, chunk.summary(), "nothing changes a chunk behind it");
        *known
    }

    /// The chunk changed.
    fn note(&mut self, key: ChunkKey, chunk: &Chunk, summary: Summary) {
        if chunk.extents.0.len() < SUMMED_EXTENTS_MIN {
            self.0.remove(&key);
            return;
        }
        if self.0.len() >= SUMMARIES_MAX && !self.0.contains_key(&key) {
            self.0.clear();
        }
        self.0.insert(key, summary);
    }
}

/// Rare state of a scope.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct InodeExtra {
    /// Sealed generations and their high-water marks, ascending.
    pub(crate) seals: Vec<(Generation, u64)>,
    /// High-water mark per unflushed generation, ascending.
    pub(crate) marks: Vec<(Generation, u64)>,
}

/// An inode in one group: what outlives its chunks there.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inode {
    pub(crate) floor: Generation,
    pub(crate) view: ViewVersion,
    pub(crate) content: ContentId,
    pub(crate) chunks: u32,
    pub(crate) captured: u64,
    pub(crate) extra: Option<Box<InodeExtra>>,
}

impl Inode {
    pub(crate) fn seals(&self) -> &[(Generation, u64)] {
        self.extra.as_ref().map_or(&[], |e| &e.seals)
    }
    pub(crate) fn marks(&self) -> &[(Generation, u64)] {
        self.extra.as_ref().map_or(&[], |e| &e.marks)
    }
    /// The highest tag of the writes taken and not flushed: no lower one is taken any more (R7). A
    /// flushed one is below the floor, since its seal raised that past it.
    pub(crate) fn tag(&self) -> Generation {
        self.marks().last().map_or(Generation(0), |m| m.0)
    }
    pub(crate) fn extra_mut(&mut self) -> &mut InodeExtra {
        self.extra.get_or_insert_default()
    }
    pub(crate) fn trim(&mut self) {
        if self.extra.as_ref().is_some_and(|e| e.seals.is_empty() && e.marks.is_empty()) {
            self.extra = None;
        }
    }
}

/// A placement group.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pg {
    pub(crate) frozen: Option<PgEpoch>,
    /// Epoch in which it last came here with its windows.
    pub(crate) taken: PgEpoch,
    pub(crate) dirty_blocks: u64,
    /// Chunks with dirty extents, per inode.
    pub(crate) dirty: BTreeMap<InodeId, u32>,
    /// Chunks with pins, per inode.
    pub(crate) pinned: BTreeMap<InodeId, u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) dirty_blocks: u64,
    pub(crate) clean_blocks: u64,
    pub(crate) extents: u64,
    /// Entries of all windows.
    pub(crate) applied: u64,
    /// Serialised bytes of all entries.
    pub(crate) encoded: u64,
    /// Heap of all chunks, inodes and windows.
    pub(crate) heap: u64,
    /// Entries of all groups' tables of dirty and pinned inodes.
    pub(crate) tallies: u64,
}

#[derive(Debug)]
pub(crate) struct Index {
    /// Device blocks of the journal ring.
    pub(crate) ring: Range<u32>,
    pub(crate) node: NodeId,
    /// Grants older than this map version are refused: floors below were forgotten.
    pub(crate) horizon: MapVersion,
    pub(crate) chunks: BTreeMap<ChunkKey, Chunk>,
    pub(crate) inodes: BTreeMap<Scope, Inode>,
    pub(crate) sessions: BTreeMap<SessionId, Window>,
    pub(crate) pgs: Vec<Pg>,
    /// Live journal blocks and the chunk that holds each.
    pub(crate) inline: BTreeMap<u32, ChunkKey>,
    /// Which clean data goes first.
    pub(crate) cache: Cache,
    pub(crate) counters: Counters,
    summaries: Summaries,
    /// Data blocks nobody refers to any more.
    pub(crate) released: Vec<Run>,
    pub(crate) capture: Option<Capture>,
    pub(crate) pages_per_write: usize,
}

impl Index {
    pub(crate) fn new(ring: Range<u32>, node: NodeId, pg_count: u16) -> Self {
        Self {
            ring,
            node,
            horizon: MapVersion(0),
            chunks: BTreeMap::new(),
            inodes: BTreeMap::new(),
            sessions: BTreeMap::new(),
            pgs: vec![Pg::default(); usize::from(pg_count)],
            inline: BTreeMap::new(),
            cache: Cache::default(),
            counters: Counters::default(),
            summaries: Summaries::default(),
            released: Vec::new(),
            capture: None,
            pages_per_write: crate::capture::PAGES_PER_WRITE,
        }
    }

    pub(crate) fn pg_of(&self, key: ChunkKey) -> PgId {
        PgId::of_chunk(key.0, key.1, self.pgs.len() as u16)
    }
    pub(crate) fn scope_of(&self, key: ChunkKey) -> Scope {
        Scope { inode: key.0, pg: self.pg_of(key) }
    }
    fn captured(&self) -> u64 {
        self.capture.as_ref().map_or(0, |c| c.number)
    }
    pub(crate) fn chunk_keys_of_inode(&self, inode: InodeId) -> Vec<ChunkKey> {
        self.chunks
            .range((inode, ChunkIndex(0))..=(inode, ChunkIndex(u32::MAX)))
            .map(|(k, _)| *k)
            .collect()
    }
    /// Chunks of a scope. A run is placed as a whole: one hash for all of its chunks.
    pub(crate) fn chunk_keys(&self, scope: Scope) -> Vec<ChunkKey> {
        let all = (scope.inode, ChunkIndex(0))..=(scope.inode, ChunkIndex(u32::MAX));
        let mut last = None;
        let mut inside = |key: &ChunkKey| match last {
            Some((run, inside)) if run == key.1.run() => inside,
            _ => {
                let inside = self.pg_of(*key) == scope.pg;
                last = Some((key.1.run(), inside));
                inside
            }
        };
        self.chunks.range(all).map(|(k, _)| *k).filter(|k| inside(k)).collect()
    }
    /// Groups in which something is known of an inode.
    pub(crate) fn scopes(&self, inode: InodeId) -> impl Iterator<Item = Scope> {
        let all = Scope { inode, pg: PgId(0) }..=Scope { inode, pg: PgId(u16::MAX) };
        self.inodes.range(all).map(|(scope, _)| *scope)
    }

    /// The scope's entry, made if need be.
    pub(crate) fn inode_mut(&mut self, id: Scope) -> &mut Inode {
        let number = self.captured();
        if let Some(inode) = self.inodes.get_mut(&id) {
            if let Some(capture) = &mut self.capture
                && inode.captured != number
            {
                capture.inode(id, inode);
                inode.captured = number;
            }
        } else {
            self.counters.encoded += crate::capture::INODE_BYTES as u64;
        }
        self.inodes.entry(id).or_insert_with(|| Inode { captured: number, ..Inode::default() })
    }
    /// Changes seals and marks of a scope, keeping the size counter.
    pub(crate) fn with_extra(&mut self, id: Scope, f: impl FnOnce(&mut InodeExtra)) {
        let inode = self.inode_mut(id);
        let before = inode.seals().len() + inode.marks().len();
        let heap_before = crate::memory::inode_heap(inode);
        f(inode.extra_mut());
        let after = inode.seals().len() + inode.marks().len();
        inode.trim();
        let heap_after = crate::memory::inode_heap(inode);
        self.counters.heap = self.counters.heap + heap_after - heap_before;
        self.counters.encoded = self.counters.encoded + 16 * after as u64 - 16 * before as u64;
    }
    pub(crate) fn remove_inode(&mut self, id: Scope) {
        if self.inodes.contains_key(&id) {
            self.with_extra(id, |e| *e = InodeExtra::default());
            let inode = self.inodes.remove(&id);
            assert!(inode.is_some_and(|i| i.chunks == 0), "chunks go before their inode");
            self.counters.encoded -= crate::capture::INODE_BYTES as u64;
        }
    }

    /// The session's window, made if need be, through `f`.
    pub(crate) fn session_mut(&mut self, id: SessionId, f: impl FnOnce(&mut Window)) {
        let number = self.captured();
        if let Some(w) = self.sessions.get_mut(&id) {
            if let Some(capture) = &mut self.capture
                && w.captured != number
            {
                capture.session(id, w);
                w.captured = number;
            }
        } else {
            if self.sessions.len() >= SESSIONS_MAX
                && let Some(idle) =
                    self.sessions.iter().min_by_key(|(_, w)| w.used).map(|(k, _)| *k)
            {
                self.remove_session(idle);
            }
            self.counters.encoded += crate::capture::SESSION_BYTES as u64;
        }
        let w = self
            .sessions
            .entry(id)
            .or_insert_with(|| Window { captured: number, ..Window::default() });
        let (before, heap_before) = (w.applied.len() as u64, crate::memory::window_heap(w));
        f(w);
        let (after, heap_after) = (w.applied.len() as u64, crate::memory::window_heap(w));
        self.counters.heap = self.counters.heap + heap_after - heap_before;
        const EACH: u64 = crate::capture::APPLIED_BYTES as u64;
        self.counters.encoded = self.counters.encoded + EACH * after - EACH * before;
        self.counters.applied = self.counters.applied + after - before;
    }
    pub(crate) fn remove_session(&mut self, id: SessionId) {
        if self.sessions.contains_key(&id) {
            self.session_mut(id, |w| w.applied = Vec::new());
            self.sessions.remove(&id);
            self.counters.encoded -= crate::capture::SESSION_BYTES as u64;
        }
    }

    /// Changes a chunk (made if need be, removed when empty). `f` pushes the runs it drops; those no list of
    /// the chunk refers to any more are released.
    pub(crate) fn mutate(&mut self, key: ChunkKey, f: impl FnOnce(&mut Chunk, &mut Vec<Run>)) {
        let number = self.captured();
        let fresh = !self.chunks.contains_key(&key);
        let chunk = self.chunks.entry(key).or_default();
        if fresh {
            chunk.captured = number;
        } else if let Some(capture) = &mut self.capture
            && chunk.captured != number
        {
            capture.chunk(key, chunk);
            chunk.captured = number;
        }
        let before = self.summaries.of(key, chunk);
        let mut dropped = Vec::new();
        f(chunk, &mut dropped);
        chunk.extents.tighten();
        debug_assert!(chunk.extents.is_sound() && chunk.pins.iter().all(|p| p.extents.is_sound()));
        if !dropped.is_empty() && (before.pinned || !chunk.pins.is_empty()) {
            normalise(&mut dropped);
            dropped = subtract(&dropped, &chunk.runs());
        }
        let after = chunk.summary();
        self.summaries.note(key, chunk, after);
        self.cache.changed(key, &mut chunk.residency, before.clean, after.clean);
        if self.cache.is_stale(self.chunks.len()) {
            let chunks = &self.chunks;
            self.cache.sweep(|k| chunks.get(k).map_or(Place::Out, |c| c.residency.place));
        }
        let gone = self.chunks.get(&key).is_none_or(Chunk::is_empty);
        if gone {
            self.chunks.remove(&key);
        }
        for run in dropped {
            self.forget(run);
        }
        self.count(key, before, after);
        if fresh != gone {
            let inode = self.inode_mut(self.scope_of(key));
            inode.chunks = if fresh { inode.chunks + 1 } else { inode.chunks - 1 };
        }
    }

    /// Whether a run is partly in the journal and partly not: no store makes one.
    pub(crate) fn straddles(&self, run: Run) -> bool {
        let inside = self.ring.contains(&run.start);
        inside != self.ring.contains(&run.end().saturating_sub(1))
            || (!inside && run.start < self.ring.start && run.end() > self.ring.start)
    }

    /// Counts a chunk that was loaded whole.
    pub(crate) fn load_chunk(&mut self, key: ChunkKey, mut chunk: Chunk) -> bool {
        let torn = chunk.all_extents().any(|e| self.straddles(e.run()));
        if torn || chunk.is_empty() || self.chunks.contains_key(&key) {
            return false;
        }
        chunk.extents.tighten();
        let after = chunk.summary();
        if after.clean > 0 {
            self.cache.found(key, &mut chunk.residency);
        }
        for run in chunk.runs() {
            for b in run.start..run.end() {
                if self.ring.contains(&b) {
                    self.inline.insert(b, key);
                }
            }
        }
        self.chunks.insert(key, chunk);
        self.count(key, Summary::default(), after);
        self.inode_mut(self.scope_of(key)).chunks += 1;
        true
    }

    /// Forgets an inode of which nothing is left that could matter: no data, no floor, no seal.
    pub(crate) fn tidy_inode(&mut self, id: Scope) {
        let idle = |i: &Inode| i.chunks == 0 && i.floor == Generation(0) && i.extra.is_none();
        if self.inodes.get(&id).is_some_and(idle) {
            self.remove_inode(id);
        }
    }

    fn count(&mut self, key: ChunkKey, before: Summary, after: Summary) {
        let c = &mut self.counters;
        c.dirty_blocks = c.dirty_blocks + u64::from(after.dirty) - u64::from(before.dirty);
        c.clean_blocks = c.clean_blocks + u64::from(after.clean) - u64::from(before.clean);
        c.extents = c.extents + u64::from(after.extents) - u64::from(before.extents);
        c.encoded = c.encoded + after.encoded as u64 - before.encoded as u64;
        c.heap = c.heap + after.heap - before.heap;
        let pg = self.pg_of(key);
        let pg = &mut self.pgs[usize::from(pg.0)];
        pg.dirty_blocks = pg.dirty_blocks + u64::from(after.dirty) - u64::from(before.dirty);
        let tallies = (pg.dirty.len() + pg.pinned.len()) as u64;
        tally(&mut pg.dirty, key.0, before.has_dirty, after.has_dirty);
        tally(&mut pg.pinned, key.0, before.pinned, after.pinned);
        let now = (pg.dirty.len() + pg.pinned.len()) as u64;
        self.counters.tallies = self.counters.tallies + now - tallies;
    }

    /// A run nobody refers to: data blocks go to `released`, journal blocks just stop being live.
    pub(crate) fn forget(&mut self, run: Run) {
        if self.ring.contains(&run.start) {
            assert!(run.end() <= self.ring.end, "a run is in the journal or not");
            for b in run.start..run.end() {
                self.inline.remove(&b);
            }
        } else {
            self.released.push(run);
        }
    }

    /// Writes new extents over a range: `runs` in block order.
    pub(crate) fn extents_of(
        first: u32,
        runs: &[Run],
        crcs: &[u32],
        origin: Origin,
        tail: u16,
    ) -> Vec<Extent> {
        let mut out = Vec::with_capacity(runs.len());
        let mut at = 0usize;
        for run in runs {
            let n = run.blocks as usize;
            out.push(Extent {
                first: (first as usize + at) as u16,
                tail: BLOCK as u16,
                location: run.start,
                origin,
                crcs: crcs[at..at + n].into(),
            });
            at += n;
        }
        assert_eq!(at, crcs.len(), "one checksum per block");
        if let Some(last) = out.last_mut() {
            last.tail = tail;
        }
        out
    }
}

fn tally(map: &mut BTreeMap<InodeId, u32>, inode: InodeId, before: bool, after: bool) {
    match (before, after) {
        (false, true) => *map.entry(inode).or_default() += 1,
        (true, false) => {
            if let Some(n) = map.get_mut(&inode) {
                *n -= 1;
                if *n == 0 {
                    map.remove(&inode);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found by fuzzing: a forged record with such a run ended recovery in a panic instead of a refusal.
    #[test]
    fn a_run_partly_in_the_journal_is_noticed_wherever_it_lies() {
        let index = Index::new(256..512, NodeId(0), 8);
        let run = |start, blocks| index.straddles(Run { start, blocks });
        assert!(run(511, 2) && run(250, 10) && run(250, 300) && run(400, 200));
        assert!(!run(256, 256) && !run(300, 1) && !run(512, 9) && !run(0, 256) && !run(0, 0));
        let extent = Extent {
            first: 0,
            tail: BLOCK as u16,
            location: 511,
            origin: Origin::Dirty(Generation(1)),
            crcs: [1, 2].into(),
        };
        let torn = Chunk { extents: ExtentList(vec![extent]), ..Chunk::default() };
        let mut index = Index::new(256..512, NodeId(0), 8);
        assert!(!index.load_chunk((InodeId(1), ChunkIndex(0)), torn), "refused from a checkpoint");
    }
}
