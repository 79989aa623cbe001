//! Bringing a member up to date, inside its stream (R46): inode by inode the chunks that only this group's
//! members hold, each with the writes that were applied to it, then what outlives them.
//!
//! One copy at a time per core, one chunk at a time. A scope is *held* while one of its chunks, or its
//! state, is read and sent: nothing new of it is begun, and what is under way becomes durable first. So
//! what is sent is exactly what the mutations before it in the stream made, and those after it apply to it.

use super::lead::{Payload, What};
use crate::core::{Buffer, Command, Pending, Purpose, ShardCore};
use ebb_dataplane_protocol::control::WindowEntry;
use ebb_dataplane_protocol::replica::{STAGE_BLOCKS_MAX, Ship};
use ebb_dataplane_protocol::{ChunkIndex, InodeId, PgId, ShardRef, crc32c};
use ebb_store::{BLOCK, ChunkCopy, Scope, Ticket, WINDOW_PAGE};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// Entries of the inode table looked at in one turn.
const LOOK: usize = 4096;
/// Requests of a copy without an answer; the next piece waits for them.
const AHEAD_MAX: usize = 16;
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
    /// Applied writes of the group by chunk: what was known when the copy began, and what came since.
    windows: Option<Windows>,
    since: Vec<WindowEntry>,
    /// Nothing new of it is begun.
    pub(crate) held: Option<Scope>,
    chunk: Option<ChunkJob<B>>,
    /// Its stream is over: it ends when its reads have come back.
    over: bool,
}

type Windows = BTreeMap<(InodeId, ChunkIndex), Vec<WindowEntry>>;

enum At {
    Windows,
    Scopes {
        from: Option<Scope>,
        found: VecDeque<Scope>,
        more: bool,
    },
    Scope {
        scope: Scope,
        chunks: Option<VecDeque<ChunkIndex>>,
        rest: VecDeque<Scope>,
        next: Option<Scope>,
        more: bool,
    },
    End,
}

/// A chunk that is being read: one device read per run of blocks.
struct ChunkJob<B> {
    copy: ChunkCopy,
    pieces: Vec<PieceRead<B>>,
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
}

impl<B: Buffer> ShardCore<B> {
    /// Whether new work on a scope has to wait for a copy.
    pub(crate) fn is_held(&self, scope: Scope) -> bool {
        self.replication.copying.as_ref().is_some_and(|c| c.held == Some(scope))
    }

    /// A member or a whole group is none of ours any more.
    pub(crate) fn abandon_copy(&mut self, pg: PgId, member: Option<ShardRef>) {
        if let Some(c) = &mut self.replication.copying
            && c.pg == pg
            && member.is_none_or(|m| m == c.member)
        {
            c.over = true;
            c.held = None;
            self.retry_waiting = true;
        }
    }

    /// Moves the copy on, or begins the next one.
    pub(crate) fn drive_copies(&mut self) {
        self.open_streams();
        if self.replication.copying.is_none() {
            self.next_copy();
        }
        let Some(mut c) = self.replication.copying.take() else { return };
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
            self.replication.copying = Some(c);
            return;
        }
        let ended = self.step_copy(&mut c);
        if ended {
            self.retry_waiting = true;
        } else {
            self.replication.copying = Some(c);
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

    fn next_copy(&mut self) {
        let mut due: Vec<(bool, PgId, ShardRef, u64, Option<Ticket>)> = Vec::new();
        for (pg, lead) in &self.replication.leads {
            for (shard, m) in &lead.members {
                if let Some(s) = m.stream.as_ref().filter(|s| !s.whole && !s.copied) {
                    due.push((!m.in_sync, *pg, *shard, s.id, lead.last));
                }
            }
        }
        // Those that count first: writes may be waiting for them.
        due.sort_unstable();
        let Some((_, pg, member, stream, barrier)) = due.into_iter().next() else { return };
        self.replication.copying = Some(Copying {
            pg,
            member,
            stream,
            barrier,
            at: At::Windows,
            windows: None,
            since: Vec::new(),
            held: None,
            chunk: None,
            over: false,
        });
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
                    c.at = At::Scopes { from: None, found: VecDeque::new(), more: true };
                }
                At::Scopes { from, found, more } => {
                    if let Some(scope) = found.pop_front() {
                        let (rest, next, more) = (std::mem::take(found), *from, *more);
                        c.at = At::Scope { scope, chunks: None, rest, next, more };
                        continue;
                    }
                    if !*more {
                        c.at = At::End;
                        continue;
                    }
                    let (scopes, next) = self.store.scopes_of_group(c.pg, *from, LOOK);
                    *found = scopes.into();
                    *more = next.is_some();
                    *from = next;
                    if found.is_empty() && *more {
                        return false;
                    }
                }
                At::Scope { .. } => {
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
                    for page in rest.chunks(WINDOW_PAGE) {
                        self.copy_send(c, What::Copy, Ship::Windows(page.to_vec()), Vec::new());
                    }
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
        let At::Scope { scope, chunks, rest, next, more } = &mut c.at else { return true };
        let scope = *scope;
        c.held = Some(scope);
        if !self.store.is_quiet(scope) {
            return false;
        }
        let Some(todo) = chunks else {
            let holding = self.store.unflushed_chunks(scope);
            *chunks = Some(holding.clone().into());
            self.copy_send(c, What::Copy, Ship::Inode(scope.inode, holding), Vec::new());
            return true;
        };
        let Some(chunk) = todo.pop_front() else {
            let (rest, next, more) = (std::mem::take(rest), *next, *more);
            let state = self.store.scope_state(scope);
            c.at = At::Scopes { from: next, found: rest, more };
            c.held = None;
            self.retry_waiting = true;
            self.copy_send(c, What::Copy, Ship::Scope(state), Vec::new());
            return true;
        };
        let copy = self.store.plan_copy(scope.inode, chunk);
        let pieces = runs_of(&copy.blocks);
        let mut job = ChunkJob { copy, pieces: Vec::with_capacity(pieces.len()), outstanding: 0 };
        for blocks in pieces {
            let bytes = blocks.len() * BLOCK;
            let Some(buf) = self.buffers.take(bytes, Purpose::Flush) else { continue };
            let token = self.expect(Pending::CopyRead(c.stream, job.pieces.len()));
            let offset = job.copy.blocks[blocks.start].0;
            self.out.push(Command::Read { token, offset, buf, range: 0..bytes });
            job.outstanding += 1;
            job.pieces.push(PieceRead { blocks, buf: None });
        }
        c.chunk = Some(job);
        self.step_chunk(c)
    }

    /// A run of blocks was read.
    pub(crate) fn copy_read(&mut self, stream: u64, piece: usize, buf: B, ok: bool) {
        let Some(c) = self.replication.copying.as_mut().filter(|c| c.stream == stream) else {
            debug_assert!(false, "a copy waits for its reads");
            return;
        };
        let Some(job) = c.chunk.as_mut() else { return };
        job.outstanding -= 1;
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

    /// Sends a chunk that was read. `false`: it isn't yet, or others have a turn first.
    fn step_chunk(&mut self, c: &mut Copying<B>) -> bool {
        if c.chunk.as_ref().is_none_or(|job| job.outstanding > 0) {
            return false;
        }
        let (Some(job), Some(scope)) = (c.chunk.take(), c.held) else { return false };
        let chunk = job.copy.lists.first().map(|l| l.chunk);
        self.store.release(job.copy.guard);
        let mut part: (Vec<u32>, Payload<B>) = (Vec::new(), Vec::new());
        for piece in job.pieces {
            let Some(buf) = piece.buf else { return false };
            if part.0.len() + piece.blocks.len() > STAGE_BLOCKS_MAX {
                self.send_stage(c, scope, chunk, std::mem::take(&mut part));
            }
            let bytes = piece.blocks.len() * BLOCK;
            part.0.extend(job.copy.blocks[piece.blocks].iter().map(|(_, crc)| *crc));
            part.1.push((buf, 0..bytes));
        }
        self.send_stage(c, scope, chunk, part);
        for mut list in job.copy.lists {
            if list.last {
                let key = (list.inode, list.chunk);
                list.windows = c.windows.as_mut().and_then(|w| w.remove(&key)).unwrap_or_default();
            }
            self.copy_send(c, What::Copy, Ship::Chunk(list), Vec::new());
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
        chunk: Option<ChunkIndex>,
        (crcs, payload): (Vec<u32>, Payload<B>),
    ) {
        let Some(chunk) = chunk.filter(|_| !crcs.is_empty()) else { return };
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
