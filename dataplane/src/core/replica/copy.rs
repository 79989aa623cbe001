//! Bringing a member up to date, inside its stream (R46): inode by inode the chunks that only this group's
//! members hold, each with the writes that were applied to it, then what outlives them.
//!
//! A few copies at a time per core, each one chunk at a time. A scope is *held* while one of its chunks, or
//! its state, is read and sent: nothing new of it is begun, and what is under way becomes durable first. So
//! what is sent is exactly what the mutations before it in the stream made, and those after it apply to it.
//!
//! Before the copy has come to a chunk the member may hold less or more of it than the primary does, if none of
//! it was ever acked. So a write to such a chunk isn't sent: it comes with the copy, which comes to that chunk
//! next. A flush's result, which says what of the *primary's* data is in S3, waits until all of its inode was
//! copied. Other mutations go to all members at once.

use super::lead::{Payload, What};
use crate::core::{Buffer, Command, Pending, Purpose, ShardCore};
use ebb_dataplane_protocol::control::WindowEntry;
use ebb_dataplane_protocol::replica::{CHUNKS_NAMED_MAX, STAGE_BLOCKS_MAX, Ship};
use ebb_dataplane_protocol::{ChunkIndex, InodeId, PgId, ShardRef, crc32c};
use ebb_store::{BLOCK, ChunkCopy, Scope, Ticket, WINDOW_PAGE};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// Entries of the inode table looked at in one turn.
const LOOK: usize = 4096;
/// Requests of a copy without an answer; the next piece waits for them.
const AHEAD_MAX: usize = 16;
/// Copies to members that count, and to others, at once: those that count don't wait for the others.
const COPIES_MAX: usize = 4;
const SYNCING_COPIES_MAX: usize = 2;
/// Before a group with damaged blocks is copied again.
const DAMAGED_AGAIN_MS: u64 = 5_000;

/// The copy under way.
pub(crate) struct Copying<B> {
    pub(crate) pg: PgId,
    pub(crate) member: ShardRef,
    stream: u64,
    /// Everything appended before the stream began has to be durable first.
    barrier: Option<Ticket>,
    at: At,
    walk: Walk,
    /// Applied writes of the group by chunk: what was known when the copy began, and what came since.
    windows: Option<Windows>,
    since: Vec<WindowEntry>,
    /// Nothing new of it is begun.
    pub(crate) held: Option<Scope>,
    chunk: Option<ChunkJob<B>>,
    /// Its stream is over: it ends when its reads have come back.
    over: bool,
    /// Inodes that it is past.
    done: BTreeSet<Scope>,
    /// Somebody waits for these.
    wanted: BTreeSet<Scope>,
    /// Chunks that come first among those of their inode.
    first: BTreeSet<(InodeId, ChunkIndex)>,
}

type Windows = BTreeMap<(InodeId, ChunkIndex), Vec<WindowEntry>>;

enum At {
    Windows,
    /// Between two scopes.
    Scopes,
    /// The chunks that are left of a scope, once they are known.
    Scope(Scope, Option<VecDeque<ChunkIndex>>),
    End,
}

/// The walk over the group's scopes.
struct Walk {
    from: Option<Scope>,
    found: VecDeque<Scope>,
    more: bool,
}

/// A chunk that is being read: one device read per run of blocks, in order, as buffers are free.
struct ChunkJob<B> {
    chunk: ChunkIndex,
    copy: ChunkCopy,
    /// Runs of blocks that are not asked for yet.
    todo: VecDeque<Range<usize>>,
    pieces: VecDeque<PieceRead<B>>,
    /// Number of the first piece in the list.
    first: usize,
    outstanding: usize,
}

struct PieceRead<B> {
    /// Numbers of its blocks in the copy.
    blocks: Range<usize>,
    buf: Option<Arc<B>>,
}

impl<B> Copying<B> {
    /// A write of the group was applied.
    pub(crate) fn applied(&mut self, e: WindowEntry) {
        match &mut self.windows {
            Some(windows) => windows.entry((e.inode, e.chunk)).or_default().push(e),
            None => self.since.push(e),
        }
    }

    pub(crate) fn is_of(&self, stream: u64) -> bool {
        self.stream == stream
    }

    /// Whether all of an inode, or this chunk of it, was copied in this stream.
    pub(crate) fn is_past(&self, stream: u64, scope: Scope, chunk: Option<ChunkIndex>) -> bool {
        if self.stream != stream {
            return false;
        }
        let passed = |at: &At| match (at, chunk) {
            (At::Scope(now, Some(todo)), Some(chunk)) => {
                let reads = self.chunk.as_ref().is_some_and(|job| job.chunk == chunk);
                *now == scope && !reads && !todo.contains(&chunk)
            }
            _ => false,
        };
        self.done.contains(&scope) || passed(&self.at)
    }

    /// Somebody waits for an inode, or a chunk of it, to be copied.
    pub(crate) fn want(&mut self, inode: InodeId, chunk: Option<ChunkIndex>) {
        let scope = Scope { inode, pg: self.pg };
        if !self.done.contains(&scope) {
            self.wanted.insert(scope);
            self.first.extend(chunk.map(|chunk| (inode, chunk)));
        }
    }

    /// What was applied to the chunks of an inode that hold nothing unflushed.
    fn entries_of_others(&mut self, scope: Scope, holding: &[ChunkIndex]) -> Vec<WindowEntry> {
        let all = (scope.inode, ChunkIndex(0))..=(scope.inode, ChunkIndex(u32::MAX));
        let Some(windows) = &mut self.windows else { return Vec::new() };
        let keys = windows.range(all).map(|(key, _)| *key);
        let keys: Vec<_> = keys.filter(|key| holding.binary_search(&key.1).is_err()).collect();
        keys.into_iter().filter_map(|key| windows.remove(&key)).flatten().collect()
    }
}

impl<B: Buffer> ShardCore<B> {
    /// Whether new work on a scope has to wait: for a copy, or, where this core has just taken the group over,
    /// for what its last primary's stream appended. The store knows no order among that and this core's own
    /// writes before it is durable, and would merge blocks with what was there before.
    pub(crate) fn is_held(&self, scope: Scope) -> bool {
        let appended = self.replication.last.get(&scope.pg);
        appended.is_some_and(|last| !self.store.is_durable(*last))
            || self.replication.copies.iter().any(|c| c.held == Some(scope))
    }

    /// A member or a whole group is none of ours any more.
    pub(crate) fn abandon_copy(&mut self, pg: PgId, member: Option<ShardRef>) {
        for c in &mut self.replication.copies {
            if c.pg == pg && member.is_none_or(|m| m == c.member) {
                c.over = true;
                c.held = None;
                self.retry_waiting = true;
            }
        }
    }

    /// Moves the copies on, and begins those that are due.
    pub(crate) fn drive_copies(&mut self) {
        self.open_streams();
        self.next_copies();
        for _ in 0..self.replication.copies.len() {
            let c = self.replication.copies.remove(0);
            self.drive_copy(c);
        }
    }

    fn drive_copy(&mut self, mut c: Copying<B>) {
        let over = c.over || !self.stream_lives(&c);
        if over {
            c.held = None;
            let reading = c.chunk.as_ref().is_some_and(|j| j.outstanding > 0);
            if !reading {
                if let Some(job) = c.chunk {
                    self.store.release(job.copy.guard);
                }
                self.retry_waiting = true;
                return;
            }
            c.over = true;
            self.replication.copies.push(c);
            return;
        }
        let ended = self.step_copy(&mut c);
        if ended {
            self.retry_waiting = true;
        } else {
            self.replication.copies.push(c);
        }
    }

    fn stream_lives(&self, c: &Copying<B>) -> bool {
        self.replication
            .leads
            .get(&c.pg)
            .and_then(|l| l.members.get(&c.member))
            .and_then(|m| m.stream.as_ref())
            .is_some_and(|s| s.id == c.stream)
    }

    fn next_copies(&mut self) {
        if self.replication.copies.len() >= COPIES_MAX {
            return;
        }
        let mut due: Vec<(bool, PgId, ShardRef, u64, Option<Ticket>)> = Vec::new();
        for (pg, lead) in &self.replication.leads {
            for (shard, m) in &lead.members {
                let runs = |s: &super::lead::Stream<B>| {
                    self.replication.copies.iter().any(|c| c.stream == s.id)
                };
                if let Some(s) = m.stream.as_ref().filter(|s| s.begun && !s.copied && !runs(s)) {
                    due.push((!m.in_sync, *pg, *shard, s.id, lead.last));
                }
            }
        }
        // Those that count first: somebody may be waiting for them.
        due.sort_unstable();
        for (syncing, pg, member, stream, barrier) in due {
            let most = if syncing { SYNCING_COPIES_MAX } else { COPIES_MAX };
            if self.replication.copies.len() >= most {
                return;
            }
            self.replication.copies.push(Copying {
                pg,
                member,
                stream,
                barrier,
                at: At::Windows,
                walk: Walk { from: None, found: VecDeque::new(), more: true },
                windows: None,
                since: Vec::new(),
                held: None,
                chunk: None,
                over: false,
                done: BTreeSet::new(),
                wanted: BTreeSet::new(),
                first: BTreeSet::new(),
            });
        }
    }

    fn copy_send(&mut self, c: &Copying<B>, what: What, ship: Ship, payload: Payload<B>) {
        self.stream_send(c.pg, c.member, what, ship, payload);
    }

    /// `true`: it ended.
    fn step_copy(&mut self, c: &mut Copying<B>) -> bool {
        if c.barrier.is_some_and(|t| !self.store.is_durable(t)) {
            return false;
        }
        loop {
            if self.stream_backlog(c.pg, c.member) > AHEAD_MAX {
                return false;
            }
            match &mut c.at {
                At::Windows => {
                    let mut windows = Windows::new();
                    let mut after = None;
                    loop {
                        let entries = self.store.window_page(c.pg, after);
                        for e in &entries {
                            windows.entry((e.inode, e.chunk)).or_default().push(*e);
                        }
                        after = entries.last().map(|e| (e.session, e.sequence));
                        if entries.len() < WINDOW_PAGE {
                            break;
                        }
                    }
                    c.windows = Some(windows);
                    std::mem::take(&mut c.since).into_iter().for_each(|e| c.applied(e));
                    c.at = At::Scopes;
                }
                At::Scopes => {
                    let next = c.wanted.pop_first().or_else(|| c.walk.found.pop_front());
                    if let Some(scope) = next {
                        if !c.done.contains(&scope) {
                            c.at = At::Scope(scope, None);
                        }
                        continue;
                    }
                    if !c.walk.more {
                        c.at = At::End;
                        continue;
                    }
                    let (scopes, next) = self.store.scopes_of_group(c.pg, c.walk.from, LOOK);
                    c.walk = Walk { from: next, found: scopes.into(), more: next.is_some() };
                    if c.walk.found.is_empty() && c.walk.more {
                        return false;
                    }
                }
                At::Scope(..) => {
                    if !self.step_scope(c) {
                        return false;
                    }
                }
                At::End => {
                    // Of chunks without anything unflushed: their bytes are in S3, or nowhere any more.
                    let rest: Vec<WindowEntry> = c
                        .windows
                        .take()
                        .into_iter()
                        .flat_map(BTreeMap::into_values)
                        .flatten()
                        .collect();
                    self.send_entries(c, &rest);
                    let next = self.next_op(c.pg);
                    self.copy_send(c, What::End(next), Ship::End, Vec::new());
                    self.stream_copied(c.pg, c.member);
                    return true;
                }
            }
        }
    }

    /// `false`: something has to happen first.
    fn step_scope(&mut self, c: &mut Copying<B>) -> bool {
        if c.chunk.is_some() {
            return self.step_chunk(c);
        }
        let At::Scope(scope, chunks) = &mut c.at else { return true };
        let scope = *scope;
        c.held = Some(scope);
        if !self.store.is_quiet(scope) {
            return false;
        }
        let Some(todo) = chunks else {
            let holding = self.store.unflushed_chunks(scope);
            *chunks = Some(holding.clone().into());
            let others = c.entries_of_others(scope, &holding);
            self.send_entries(c, &others);
            let mut parts = holding.chunks(CHUNKS_NAMED_MAX).peekable();
            if parts.peek().is_none() {
                let none = Ship::Inode(scope.inode, Vec::new(), false);
                self.copy_send(c, What::Copy, none, Vec::new());
            }
            while let Some(part) = parts.next() {
                let part = Ship::Inode(scope.inode, part.to_vec(), parts.peek().is_some());
                self.copy_send(c, What::Copy, part, Vec::new());
            }
            return true;
        };
        let first = todo.iter().position(|chunk| c.first.contains(&(scope.inode, *chunk)));
        let Some(chunk) = todo.remove(first.unwrap_or(0)) else {
            let state = self.store.scope_state(scope);
            c.at = At::Scopes;
            c.done.insert(scope);
            c.held = None;
            self.retry_waiting = true;
            c.first.retain(|key| key.0 != scope.inode);
            let what = What::Scope(scope.inode, self.next_op(c.pg));
            self.copy_send(c, what, Ship::Scope(state), Vec::new());
            return true;
        };
        let copy = self.store.plan_copy(scope.inode, chunk);
        let todo = runs_of(&copy.blocks).into();
        let pieces = VecDeque::new();
        c.chunk = Some(ChunkJob { chunk, copy, todo, pieces, first: 0, outstanding: 0 });
        self.step_chunk(c)
    }

    /// Entries go before what goes with them.
    fn send_entries(&mut self, c: &Copying<B>, entries: &[WindowEntry]) {
        for page in entries.chunks(WINDOW_PAGE) {
            self.copy_send(c, What::Copy, Ship::Windows(page.to_vec()), Vec::new());
        }
    }

    /// A run of blocks was read.
    pub(crate) fn copy_read(&mut self, stream: u64, piece: usize, buf: B, ok: bool) {
        let Some(c) = self.replication.copies.iter_mut().find(|c| c.stream == stream) else {
            debug_assert!(false, "a copy waits for its reads");
            return;
        };
        let Some(job) = c.chunk.as_mut() else { return };
        job.outstanding -= 1;
        let piece = piece - job.first;
        let blocks = &job.copy.blocks[job.pieces[piece].blocks.clone()];
        let sound = |(block, (_, crc)): (&[u8], &(u64, u32))| crc32c(block) == *crc;
        if ok && buf.bytes().chunks(BLOCK).zip(blocks).all(sound) {
            job.pieces[piece].buf = Some(Arc::new(buf));
        } else {
            // Nobody gets a copy of rot. The member keeps what it has, and the stream begins again.
            self.stats.checksum_errors += 1;
            let (pg, member) = (c.pg, c.member);
            self.stream_broke(pg, member, DAMAGED_AGAIN_MS);
        }
    }

    /// Reads and sends a chunk. `false`: something has to happen first, or others have a turn.
    fn step_chunk(&mut self, c: &mut Copying<B>) -> bool {
        let Some(scope) = c.held else { return false };
        let Some(job) = c.chunk.as_mut() else { return false };
        // What was read leaves before more is: a chunk needs no more buffers than there are.
        while let Some(blocks) = job.todo.front() {
            let bytes = blocks.len() * BLOCK;
            let Some(buf) = self.buffers.take(bytes, Purpose::Copy) else { break };
            let Some(blocks) = job.todo.pop_front() else { break };
            let piece = job.first + job.pieces.len();
            self.last_id += 1;
            let token = crate::core::Token(self.last_id);
            self.pending.insert(token, Pending::CopyRead(c.stream, piece));
            let offset = job.copy.blocks[blocks.start].0;
            self.out.push(Command::Read { token, offset, buf, range: 0..bytes });
            job.outstanding += 1;
            job.pieces.push_back(PieceRead { blocks, buf: None });
        }
        if job.outstanding > 0 {
            return false;
        }
        let chunk = job.chunk;
        let mut parts: Vec<(Vec<u32>, Payload<B>)> = vec![(Vec::new(), Vec::new())];
        job.first += job.pieces.len();
        for piece in std::mem::take(&mut job.pieces) {
            let Some(buf) = piece.buf else { return false };
            if let Some(part) = parts.last()
                && part.0.len() + piece.blocks.len() > STAGE_BLOCKS_MAX
            {
                parts.push((Vec::new(), Vec::new()));
            }
            let Some(part) = parts.last_mut() else { return false };
            let bytes = piece.blocks.len() * BLOCK;
            part.0.extend(job.copy.blocks[piece.blocks].iter().map(|(_, crc)| *crc));
            part.1.push((buf, 0..bytes));
        }
        let all = job.todo.is_empty();
        for part in parts {
            self.send_stage(c, scope, chunk, part);
        }
        if !all {
            return false;
        }
        let Some(job) = c.chunk.take() else { return false };
        self.store.release(job.copy.guard);
        for list in job.copy.lists {
            let mut what = What::Copy;
            if list.last {
                what = What::Chunk(list.inode, list.chunk, self.next_op(c.pg));
                let key = (list.inode, list.chunk);
                let entries = c.windows.as_mut().and_then(|w| w.remove(&key));
                self.send_entries(c, &entries.unwrap_or_default());
            }
            self.copy_send(c, what, Ship::Chunk(list), Vec::new());
        }
        // Writes that waited have a turn before the next chunk.
        c.held = None;
        self.retry_waiting = true;
        false
    }

    fn send_stage(
        &mut self,
        c: &Copying<B>,
        scope: Scope,
        chunk: ChunkIndex,
        (crcs, payload): (Vec<u32>, Payload<B>),
    ) {
        if crcs.is_empty() {
            return;
        }
        self.stats.copied_bytes += (crcs.len() * BLOCK) as u64;
        let stage = Ship::Stage { inode: scope.inode, chunk, crcs };
        self.copy_send(c, What::Copy, stage, payload);
    }
}

/// Runs of blocks that lie one after the other on the device, none longer than a stage.
fn runs_of(blocks: &[(u64, u32)]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (n, (offset, _)) in blocks.iter().enumerate() {
        match runs.last_mut() {
            Some(run)
                if run.len() < STAGE_BLOCKS_MAX && blocks[n - 1].0 + BLOCK as u64 == *offset =>
            {
                run.end = n + 1;
            }
            _ => runs.push(n..n + 1),
        }
    }
    runs
}
