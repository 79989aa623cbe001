//! Misses: one GET per missing stretch, whoever waits for it (PROTOCOL §9, I4, I10), unless the spill device
//! (`spill/`) or the former holder of the group (`peer_read.rs`) has it.
//!
//! A fill is a run of 256 KiB granules of one chunk under one content id, at most 1 MiB. While it lives
//! no second one covers its granules: later misses join it. Its bytes answer those who wait as soon as
//! they are here, and are then cached: written, journaled as clean, and dropped from memory when the
//! record is durable (until then the index does not show them, so the fill answers instead).
//!
//! The GET carries If-Match with the etag of the signed view, and never passes its valid bytes; what is
//! past them in the last block is zero. Caching is given up quietly where it cannot be done.

use super::assembly::AsmId;
use super::placement::Refusal;
use super::warm::WarmId;
use super::write::WriteKey;
use super::{Buffer, Command, FetchError, Job, Pending, Purpose, ShardCore, Starved, Waiter, Work};
use ebb_dataplane_protocol::checksum::crc32c;
use ebb_dataplane_protocol::{
    CHUNK_BYTES, ChunkIndex, ContentId, FileView, InodeId, RUN_CHUNKS, SessionId, Status,
};
use ebb_store::{BLOCK, FillId, FillOp, WriteError};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// Blocks of a granule (256 KiB).
pub(crate) const GRANULE_BLOCKS: u32 = 64;
/// Granules of a chunk.
pub(crate) const GRANULES: usize = CHUNK_BYTES as usize / BLOCK / GRANULE_BLOCKS as usize;
/// Granules of a fill at most (1 MiB).
const FILL_GRANULES_MAX: u32 = 4;
/// Fills alive at most; a request for one more is answered `Busy`.
const FILLS_MAX: usize = 4096;
/// Fills that nobody waits for yet.
const AHEAD_MAX: usize = 4;
/// Bytes fetched ahead of a sequential reader.
const AHEAD_BYTES: u64 = 2 << 20;
/// Streams remembered to recognise sequential reads.
const STREAMS_MAX: usize = 256;
/// Hint with `S3Unavailable`.
const RETRY_S3_MS: u32 = 500;

const _: () = assert!(GRANULES == 16);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct FillNo(u64);

pub(crate) type FillKey = (InodeId, ChunkIndex, ContentId);

/// Who waits for blocks of a fill.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    Assembly(AsmId),
    Edge(WriteKey, usize),
    Warm(WarmId),
    /// Nobody: read ahead.
    Ahead,
}

#[derive(Debug)]
enum State<B> {
    /// No buffer yet, or the GET is out.
    Coming,
    /// Being cached.
    Here { buf: Arc<B>, crcs: Vec<u32> },
}

#[derive(Debug)]
pub(crate) struct FillTask<B> {
    pub(crate) key: FillKey,
    pub(crate) view: Arc<FileView>,
    /// Blocks of the chunk.
    pub(crate) blocks: Range<u32>,
    /// Bytes of them that are in the object.
    pub(crate) valid: u32,
    waiters: Vec<(Target, Range<u32>)>,
    state: State<B>,
    plan: Option<FillId>,
    writes: usize,
    ahead: bool,
    /// The group's former holder was asked.
    pub(crate) asked: bool,
    /// The spill device was too slow, or is off.
    pub(crate) spill_passed: bool,
}

/// Recognises sequential readers.
#[derive(Default)]
pub(crate) struct ReadAhead {
    streams: HashMap<(InodeId, SessionId), u64>,
    alive: usize,
    /// Fills that wait for nothing but their journal record, oldest first.
    committed: VecDeque<FillNo>,
}

impl ReadAhead {
    /// Whether a read of `[at, to)` continues (or nearly continues) the last one of its stream.
    pub(crate) fn is_sequential(
        &mut self,
        inode: InodeId,
        session: SessionId,
        at: u64,
        to: u64,
    ) -> bool {
        if self.streams.len() >= STREAMS_MAX && !self.streams.contains_key(&(inode, session)) {
            // Forgetting all streams costs each of them one fetch without read-ahead.
            self.streams.clear();
        }
        let expected = self.streams.insert((inode, session), to);
        // Several requests of one stream are in flight at once, so they arrive slightly out of order.
        expected.is_some_and(|e| at.abs_diff(e) <= u64::from(CHUNK_BYTES)) || at == 0
    }
}

/// Bytes of a chunk that are in the object.
fn valid_in_chunk(view: &FileView, chunk: ChunkIndex) -> u32 {
    let valid = view.backing.as_ref().map_or(0, |b| b.valid_bytes());
    valid.saturating_sub(chunk.start()).min(u64::from(CHUNK_BYTES)) as u32
}

impl<B: Buffer> ShardCore<B> {
    /// Wants missing blocks: joins fills, or starts them.
    pub(crate) fn want_fill(
        &mut self,
        inode: InodeId,
        chunk: ChunkIndex,
        view: &Arc<FileView>,
        blocks: Range<u32>,
        sequential: bool,
        to: Target,
    ) {
        let key = (inode, chunk, view.content);
        let mut at = blocks.start;
        while at < blocks.end {
            let granule = at / GRANULE_BLOCKS;
            let covering = self.granules.get(&key).and_then(|g| g[granule as usize]);
            let no = match covering {
                Some(no) => no,
                None => {
                    let wide = sequential || blocks.end - at >= GRANULE_BLOCKS;
                    let to_block = if wide {
                        (granule / FILL_GRANULES_MAX + 1) * FILL_GRANULES_MAX * GRANULE_BLOCKS
                    } else {
                        (granule + 1) * GRANULE_BLOCKS
                    };
                    match self.new_fill(key, view, granule, to_block, false) {
                        Ok(no) => no,
                        Err(refusal) => {
                            // Everything from here on fails as one.
                            self.attach_failed(to, refusal);
                            return;
                        }
                    }
                }
            };
            let Some(end) = self.fills.get(&no).map(|f| f.blocks.end.min(blocks.end)) else {
                debug_assert!(false, "granules name living fills");
                return;
            };
            if end <= at {
                // The fill is of a newer view with fewer valid bytes: the asker's view is over.
                return self.attach_failed(to, Refusal::of(Status::StaleView));
            }
            self.attach(no, to, at..end);
            at = end;
        }
        if sequential {
            let end = chunk.start() + u64::from(blocks.end) * BLOCK as u64;
            self.fetch_ahead(inode, view, end);
        }
    }

    /// Starts the fills that a sequential reader will want next, within its run.
    fn fetch_ahead(&mut self, inode: InodeId, view: &Arc<FileView>, from: u64) {
        let run_end =
            (ChunkIndex::of_offset(from.saturating_sub(1)).0 / RUN_CHUNKS + 1) * RUN_CHUNKS;
        let mut at = from;
        while at < from + AHEAD_BYTES && self.read_ahead.alive < AHEAD_MAX {
            let chunk = ChunkIndex::of_offset(at);
            let block = ((at - chunk.start()) / BLOCK as u64) as u32;
            let granule = block / GRANULE_BLOCKS;
            if chunk.0 >= run_end
                || valid_in_chunk(view, chunk) <= granule * GRANULE_BLOCKS * BLOCK as u32
            {
                return;
            }
            let to_block = (granule / FILL_GRANULES_MAX + 1) * FILL_GRANULES_MAX * GRANULE_BLOCKS;
            at = chunk.start() + u64::from(to_block) * BLOCK as u64;
            let key = (inode, chunk, view.content);
            if self.granules.get(&key).is_some_and(|g| g[granule as usize].is_some()) {
                continue;
            }
            let base = super::grants::base_of(view);
            let first = granule * GRANULE_BLOCKS;
            let plan = self.store.plan_read(inode, chunk, first..first + 1, base);
            let missing = plan.pieces.iter().any(|p| p.source == ebb_store::PieceSource::Miss);
            if let Some(guard) = plan.guard {
                self.store.release(guard);
            }
            if !missing {
                continue;
            }
            match self.new_fill(key, view, granule, to_block, true) {
                Ok(no) => self.attach(no, Target::Ahead, 0..0),
                Err(_) => return,
            }
        }
    }

    fn new_fill(
        &mut self,
        key: FillKey,
        view: &Arc<FileView>,
        granule: u32,
        to_block: u32,
        ahead: bool,
    ) -> Result<FillNo, Refusal> {
        if self.fills.len() >= FILLS_MAX {
            return Err(Refusal::after(Status::Busy, super::RETRY_BUSY_MS));
        }
        let valid = valid_in_chunk(view, key.1);
        let first = granule * GRANULE_BLOCKS;
        let no = FillNo(self.next_id());
        // All of a fill comes from the spill device, or none of it.
        let spilled = |g: u32| self.is_spilled(&key, g, valid);
        let from_spill = spilled(granule);
        let until = (granule + 1..to_block.div_ceil(GRANULE_BLOCKS))
            .find(|g| spilled(*g) != from_spill)
            .map_or(to_block, |g| g * GRANULE_BLOCKS);
        let to_block = to_block.min(until);
        let table = self.granules.entry(key).or_insert([None; GRANULES]);
        // Up to where another fill begins.
        let mut end = first;
        while end < to_block && table[(end / GRANULE_BLOCKS) as usize].is_none() {
            table[(end / GRANULE_BLOCKS) as usize] = Some(no);
            end += GRANULE_BLOCKS;
        }
        let end = end.min(valid.div_ceil(BLOCK as u32));
        let start_byte = first * BLOCK as u32;
        if start_byte >= valid {
            // A miss at or past the valid end: the index and the view do not agree.
            self.forget_granules(key, no);
            debug_assert!(false, "a miss past the valid bytes");
            return Err(Refusal::of(Status::Internal));
        }
        let fill = FillTask {
            key,
            view: Arc::clone(view),
            blocks: first..end,
            valid: (end * BLOCK as u32).min(valid) - start_byte,
            waiters: Vec::new(),
            state: State::Coming,
            plan: None,
            writes: 0,
            ahead,
            asked: false,
            spill_passed: false,
        };
        if ahead {
            self.read_ahead.alive += 1;
        }
        self.fills.insert(no, fill);
        if !self.start_fill(no) {
            self.starve(Starved::Fill(no));
        }
        Ok(no)
    }

    /// `false`: no buffer now.
    pub(crate) fn start_fill(&mut self, no: FillNo) -> bool {
        let Some(fill) = self.fills.get(&no) else { return true };
        if fill.view.backing.is_none() {
            self.fill_failed(no, Refusal::of(Status::Internal));
            return true;
        }
        let bytes = fill.blocks.len() * BLOCK;
        if self.queues_for_spill(no) {
            return true;
        }
        let buf = match self.buffers.take(bytes, Purpose::Fill) {
            Some(buf) => buf,
            None => {
                // Those that only wait for the journal give their memory up: the bytes are on the
                // device, and a read in between fetches them again.
                let Some(oldest) = self.read_ahead.committed.pop_front() else { return false };
                self.end_fill(oldest);
                match self.buffers.take(bytes, Purpose::Fill) {
                    Some(buf) => buf,
                    None => return false,
                }
            }
        };
        if let Some(buf) = self.read_spilled(no, buf) {
            self.ask_elsewhere(no, buf);
        }
        true
    }

    /// The spill device does not have a fill's bytes: the former holder of its group may, and S3 does.
    pub(crate) fn ask_elsewhere(&mut self, no: FillNo, buf: B) {
        if let Some(buf) = self.ask_holder(no, buf) {
            self.fetch(no, buf);
        }
    }

    /// Asks S3 for a fill's bytes.
    pub(crate) fn fetch(&mut self, no: FillNo, buf: B) {
        let Some(fill) = self.fills.get(&no) else { return };
        let Some(backing) = fill.view.backing.as_ref() else { return };
        let start = fill.key.1.start() + u64::from(fill.blocks.start) * BLOCK as u64;
        let work = Work::Fetch {
            key: backing.key.clone(),
            etag: backing.etag.clone(),
            range: start..start + u64::from(fill.valid),
            buf,
            at: 0,
        };
        let token = self.expect(Pending::Fetch(no));
        self.out.push(Command::Job(Job { token, work }));
    }

    /// Adds a waiter; answers it at once if the bytes are here.
    fn attach(&mut self, no: FillNo, to: Target, blocks: Range<u32>) {
        match to {
            Target::Assembly(id) => self.assembly_waits(id),
            Target::Warm(id) => self.warm_waits(id),
            Target::Edge(..) | Target::Ahead => {}
        }
        let Some(fill) = self.fills.get_mut(&no) else { return };
        if !matches!(to, Target::Ahead) && std::mem::take(&mut fill.ahead) {
            self.read_ahead.alive -= 1;
        }
        match &fill.state {
            State::Coming => fill.waiters.push((to, blocks)),
            State::Here { buf, crcs } => {
                let (buf, crcs, first) = (Arc::clone(buf), crcs.clone(), fill.blocks.start);
                self.serve(to, blocks, first, &buf, &crcs);
            }
        }
    }

    fn attach_failed(&mut self, to: Target, refusal: Refusal) {
        match to {
            Target::Assembly(id) => {
                self.assembly_waits(id);
                self.assembly_fill_failed(id, refusal);
            }
            Target::Edge(key, _) => self.edge_failed(key, refusal),
            Target::Warm(id) => {
                self.warm_waits(id);
                self.warmed(id);
            }
            Target::Ahead => {}
        }
    }

    fn serve(&mut self, to: Target, blocks: Range<u32>, first: u32, buf: &Arc<B>, crcs: &[u32]) {
        match to {
            Target::Assembly(id) => {
                let at = (blocks.start - first) as usize;
                let crcs = &crcs[at..at + blocks.len()];
                self.assembly_filled(id, blocks, buf, at * BLOCK, crcs);
            }
            Target::Edge(key, edge) => {
                let at = (blocks.start - first) as usize * BLOCK;
                self.merge_edge(key, edge, &buf.bytes()[at..at + BLOCK]);
                self.edge_done(key);
            }
            Target::Warm(id) => self.warmed(id),
            Target::Ahead => {}
        }
    }

    pub(crate) fn fetched(&mut self, no: FillNo, mut buf: B, result: Result<(), FetchError>) {
        if let Err(e) = result {
            let refusal = match e {
                FetchError::Changed => Refusal::of(Status::BackingChanged),
                FetchError::Unavailable => Refusal::after(Status::S3Unavailable, RETRY_S3_MS),
            };
            return self.fill_failed(no, refusal);
        }
        let Some(fill) = self.fills.get_mut(&no) else { return };
        let bytes = fill.blocks.len() * BLOCK;
        buf.bytes_mut()[fill.valid as usize..bytes].fill(0);
        let crcs: Vec<u32> = buf.bytes()[..bytes].chunks(BLOCK).map(crc32c).collect();
        let buf = Arc::new(buf);
        fill.state = State::Here { buf: Arc::clone(&buf), crcs: crcs.clone() };
        let (first, waiters) = (fill.blocks.start, std::mem::take(&mut fill.waiters));
        for (to, blocks) in waiters {
            self.serve(to, blocks, first, &buf, &crcs);
        }
        self.cache_fill(no, buf);
    }

    fn cache_fill(&mut self, no: FillNo, buf: Arc<B>) {
        let Some(fill) = self.fills.get(&no) else { return };
        let (inode, chunk, content) = fill.key;
        // Not what the file is any more: served to those who asked, not kept.
        let current = self.grants.view(inode).is_none_or(|v| v.content == content)
            && self.store.content(inode) <= content;
        if !current || self.dropped.peek(&inode).is_some() {
            return self.end_fill(no);
        }
        let Some(fill) = self.fills.get_mut(&no) else { return };
        let op = FillOp {
            inode,
            chunk,
            first_block: fill.blocks.start,
            blocks: fill.blocks.len() as u32,
            content,
            tail_valid: fill.valid - (fill.blocks.len() as u32 - 1) * BLOCK as u32,
        };
        match self.store.begin_fill(&op) {
            Ok(plan) => {
                fill.plan = Some(plan.id);
                fill.writes = plan.writes.len();
                for w in plan.writes {
                    let token = self.expect(Pending::FillData(no));
                    let buf = Arc::clone(&buf);
                    self.out.push(Command::Write { token, offset: w.offset, buf, range: w.range });
                }
                if self.fills.get(&no).is_some_and(|f| f.writes == 0) {
                    self.commit_fill(no);
                }
            }
            Err(WriteError::NoSpace { needed, evictable }) => {
                if evictable > 0 {
                    self.evict_for(needed);
                }
                self.spill_uncached(no, &buf);
                self.end_fill(no);
            }
            Err(e) => {
                tracing::debug!(%inode, %chunk, error = %e, "fill not cached");
                self.end_fill(no);
            }
        }
    }

    pub(crate) fn fill_written(&mut self, no: FillNo) {
        let Some(fill) = self.fills.get_mut(&no) else { return };
        fill.writes -= 1;
        if fill.writes == 0 {
            self.commit_fill(no);
        }
    }

    fn commit_fill(&mut self, no: FillNo) {
        let Some(fill) = self.fills.get_mut(&no) else { return };
        let (Some(plan), State::Here { crcs, .. }) = (fill.plan.take(), &fill.state) else {
            return;
        };
        match self.store.commit_fill(plan, crcs) {
            Ok(ticket) => {
                self.read_ahead.committed.push_back(no);
                self.wait_ticket(ticket, Waiter::Fill(no));
            }
            Err(e) => {
                tracing::debug!(error = %e, "fill not cached");
                self.end_fill(no);
            }
        }
    }

    pub(crate) fn fill_durable(&mut self, no: FillNo) {
        // Tickets are durable in order, so it is among the first.
        self.read_ahead.committed.retain(|other| *other != no);
        self.end_fill(no);
    }

    fn fill_failed(&mut self, no: FillNo, refusal: Refusal) {
        let waiters = self.fills.get_mut(&no).map(|f| std::mem::take(&mut f.waiters));
        // Gone first, so that whoever asks again starts a new one.
        self.end_fill(no);
        for (to, _) in waiters.unwrap_or_default() {
            match to {
                Target::Assembly(id) => self.assembly_fill_failed(id, refusal),
                Target::Edge(key, _) => self.edge_failed(key, refusal),
                Target::Warm(id) => self.warmed(id),
                Target::Ahead => {}
            }
        }
    }

    fn end_fill(&mut self, no: FillNo) {
        let Some(fill) = self.fills.remove(&no) else { return };
        debug_assert!(fill.waiters.is_empty());
        if fill.ahead {
            self.read_ahead.alive -= 1;
        }
        if let Some(plan) = fill.plan {
            self.store.abort_fill(plan);
        }
        self.forget_granules(fill.key, no);
    }

    fn forget_granules(&mut self, key: FillKey, no: FillNo) {
        let Some(table) = self.granules.get_mut(&key) else { return };
        for slot in table.iter_mut().filter(|slot| **slot == Some(no)) {
            *slot = None;
        }
        if table.iter().all(Option::is_none) {
            self.granules.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_recognised_and_bounded() {
        let mut r = ReadAhead::default();
        let (i, s) = (InodeId(1), SessionId(1));
        assert!(r.is_sequential(i, s, 0, 4096), "a file is mostly read from its start");
        assert!(r.is_sequential(i, s, 4096, 8192));
        assert!(!r.is_sequential(i, s, 1 << 30, (1 << 30) + 1));
        for n in 0..10_000 {
            r.is_sequential(InodeId(n), s, 5, 6);
            assert!(r.streams.len() <= STREAMS_MAX);
        }
    }
}
