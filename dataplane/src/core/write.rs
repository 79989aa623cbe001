//! Writes: check, plan, fill the edges, put the data down, journal, answer (I1, I7).
//!
//! ```text
//! begin_write ─ Wait ──► waiting (per chunk, in order of arrival)
//!     │                       │ a ticket became durable, a plan was aborted
//!     ▼                       ▼
//! edges (device, S3, zeros) ─► data writes ─► commit_write ─► ticket durable ─► reply
//! ```
//! Writes of one chunk that overlap take effect in order of arrival: the store makes the later one
//! wait, and one that waits holds back those behind it on its chunk. A duplicate of a write in flight
//! waits the same way and is then answered as done. A write whose lease or epoch ended on the way is
//! durable but not acked: the client asks again elsewhere, and the window answers it.

use super::placement::{Claim, Refusal};
use super::{
    Buffer, Command, Owed, PeerInfo, Pending, Purpose, RETRY_BUSY_MS, ShardCore, Starved, Waiter,
};
use ebb_dataplane_protocol::checksum::{block_pieces, crc32c};
use ebb_dataplane_protocol::data::{DataContext, WriteReply, decode_checksums};
use ebb_dataplane_protocol::replica::{Ship, ShippedWrite};
use ebb_dataplane_protocol::{FileView, Generation, PgId, Status};
use ebb_store::{BLOCK, EdgeSource, PieceSource, WaitFor, WriteError, WriteOp, WritePlan};
use std::sync::Arc;

/// Hint with `NoSpace`: flushing has to progress first.
pub(crate) const RETRY_SPACE_MS: u32 = 200;
/// Hint with `Frozen`.
const RETRY_FROZEN_MS: u32 = 50;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct WriteKey(u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In the chunk's line, or waiting for space or a repair.
    Waiting,
    /// Edges are being fetched.
    Edges,
    /// Data is on its way to the device.
    Data,
    /// The record is in the journal's batch.
    Journal,
}

#[derive(Debug)]
pub(crate) struct WriteTask<B> {
    owed: Owed,
    op: WriteOp,
    claim: Claim,
    pg: PgId,
    pub(crate) view: Arc<FileView>,
    /// One per piece as the client sent them, which is one per block.
    crcs: Vec<u32>,
    buf: Option<B>,
    plan: Option<WritePlan>,
    state: State,
    /// Edges or data writes not done yet.
    outstanding: usize,
    /// What to answer once nothing is outstanding.
    failed: Option<Refusal>,
    /// It was applied before: what its chunk holds has to be everywhere first.
    duplicate: bool,
    /// The data, for the other members.
    shared: Option<Arc<B>>,
    /// A mismatch in an edge was met before.
    edge_retries: u8,
    since_ms: u64,
}

impl<B: Buffer> ShardCore<B> {
    pub(crate) fn write(&mut self, owed: Owed, peer: PeerInfo, body: &[u8], payload: Option<B>) {
        let header = owed.header;
        let parsed =
            DataContext::decode(body).and_then(|(c, rest)| Some((c, decode_checksums(rest)?)));
        let (Some((context, crcs)), Some(buf)) = (parsed, payload) else {
            return self.refuse(owed, Refusal::of(Status::BadRequest));
        };
        let head = header.offset as usize % BLOCK;
        let len = header.length as usize;
        if header.payload_bytes != header.length
            || buf.bytes().len() < (head + len).next_multiple_of(BLOCK)
            || crcs.len() != block_pieces(u64::from(header.offset), len).count()
        {
            return self.refuse(owed, Refusal::of(Status::BadRequest));
        }
        let admitted = match self.admit(&header, peer, context, true) {
            Ok(admitted) => admitted,
            Err(refusal) => return self.refuse(owed, refusal),
        };
        let payload = &buf.bytes()[head..head + len];
        let sound = block_pieces(u64::from(header.offset), len)
            .zip(&crcs)
            .all(|(piece, crc)| crc32c(&payload[piece]) == *crc);
        if !sound {
            self.stats.checksum_errors += 1;
            return self.refuse(owed, Refusal::of(Status::Corrupt));
        }
        let op = WriteOp {
            inode: header.inode,
            chunk: header.chunk,
            offset: header.offset,
            len: header.length,
            generation: context.generation,
            session: context.session,
            sequence: context.sequence,
            answered_below: context.answered_below,
            base: super::grants::base_of(&admitted.view),
        };
        let key = WriteKey(self.next_id());
        let task = WriteTask {
            owed,
            op,
            claim: admitted.claim,
            pg: header.pg,
            view: admitted.view,
            crcs,
            buf: Some(buf),
            plan: None,
            state: State::Waiting,
            outstanding: 0,
            failed: None,
            duplicate: false,
            shared: None,
            edge_retries: 0,
            since_ms: self.now_ms,
        };
        self.writes.insert(key, task);
        // Nothing overtakes a write that waits on the same chunk.
        if self.waiting.contains_key(&(op.inode, op.chunk)) || !self.try_write(key) {
            self.wait_in_line(key, false);
        }
    }

    fn wait_in_line(&mut self, key: WriteKey, front: bool) {
        let Some(task) = self.writes.get_mut(&key) else { return };
        task.state = State::Waiting;
        let line = self.waiting.entry((task.op.inode, task.op.chunk)).or_default();
        if front {
            line.push_front(key);
        } else {
            line.push_back(key);
        }
    }

    /// Asks the store. `false`: it must wait in line.
    fn try_write(&mut self, key: WriteKey) -> bool {
        let Some(task) = self.writes.get_mut(&key) else { return true };
        debug_assert!(task.plan.is_none());
        let (inode, view) = (task.op.inode, Arc::clone(&task.view));
        // Its base may be over since it was admitted.
        if self.store.content(inode) > view.content {
            self.finish_write(key, Err(Refusal::of(Status::StaleView)));
            return true;
        }
        let scope = self.store.scope_of(inode, task.op.chunk);
        if self.is_held(scope) {
            return false;
        }
        let Some(task) = self.writes.get_mut(&key) else { return true };
        match self.store.begin_write(&task.op) {
            Err(WriteError::Duplicate { generation }) => {
                // It is durable here; it may not be everywhere.
                task.op.generation = generation;
                task.state = State::Journal;
                task.duplicate = true;
                self.write_durable(key);
                true
            }
            Ok(plan) => {
                assert_eq!(plan.blocks as usize, task.crcs.len(), "one piece per block");
                task.outstanding = plan.edges.len();
                task.state = State::Edges;
                let pg = task.pg;
                let edges = plan.edges.len();
                task.plan = Some(plan);
                if self.has_full_member(pg) {
                    // R56. What the window knows was answered above.
                    self.space_refused();
                    self.finish_write(key, Err(Refusal::after(Status::NoSpace, RETRY_SPACE_MS)));
                    return true;
                }
                for edge in 0..edges {
                    if !self.start_edge(key, edge) {
                        self.starve(Starved::Edge(key, edge));
                    }
                }
                if edges == 0 {
                    self.edges_done(key);
                }
                true
            }
            Err(WriteError::Wait(_)) => false,
            Err(WriteError::NoSpace { needed, .. }) => {
                // Space that is on its way (an eviction in the journal, a reader of freed blocks) is
                // waited for in line, like space that can be made (I11).
                if self.evict_for(needed) || self.store.stats().waiting_bytes > 0 {
                    return false;
                }
                self.space_refused();
                self.finish_write(key, Err(Refusal::after(Status::NoSpace, RETRY_SPACE_MS)));
                true
            }
            Err(e) => {
                let outcome = self.refusal_of(e);
                self.finish_write(key, outcome);
                true
            }
        }
    }

    /// What the store's refusal means to the client; a duplicate is answered under its first tag (R19).
    fn refusal_of(&mut self, e: WriteError) -> Result<Generation, Refusal> {
        Err(match e {
            WriteError::Duplicate { generation } => return Ok(generation),
            WriteError::Answered => Refusal::of(Status::Answered),
            WriteError::StaleGeneration { .. } => {
                self.stats.refused_grants += 1;
                Refusal::of(Status::StaleGeneration)
            }
            WriteError::Frozen { .. } => Refusal::after(Status::Frozen, RETRY_FROZEN_MS),
            WriteError::NoSpace { .. } => Refusal::after(Status::NoSpace, RETRY_SPACE_MS),
            WriteError::Wait(_) | WriteError::WindowFull => {
                Refusal::after(Status::Busy, RETRY_BUSY_MS)
            }
            WriteError::Dropped => Refusal::of(Status::StaleView),
            WriteError::Corrupt { .. } => Refusal::of(Status::Corrupt),
            WriteError::Failed => Refusal::of(Status::Io),
            WriteError::Malformed(what) => {
                tracing::warn!(what, "the store refused a write as malformed");
                Refusal::of(Status::BadRequest)
            }
            WriteError::UnknownWrite(_) | WriteError::UnknownFill(_) => {
                debug_assert!(false, "a plan was lost");
                Refusal::of(Status::Internal)
            }
        })
    }

    // --- edges ------------------------------------------------------------------------------------

    /// Gets the old bytes of an edge on their way. `false`: no buffer now.
    pub(crate) fn start_edge(&mut self, key: WriteKey, edge: usize) -> bool {
        let Some(task) = self.writes.get_mut(&key) else { return true };
        let Some(source) = task.plan.as_ref().and_then(|p| p.edges.get(edge)) else { return true };
        match source.source {
            EdgeSource::Zero => {
                let (Some(plan), Some(buf)) = (&task.plan, task.buf.as_mut()) else { return true };
                let e = &plan.edges[edge];
                for r in &e.fill {
                    buf.bytes_mut()[e.at + r.start..e.at + r.end].fill(0);
                }
                self.edge_done(key);
                true
            }
            EdgeSource::Device { offset, .. } => {
                let Some(buf) = self.buffers.take(BLOCK, Purpose::Edge) else { return false };
                let token = self.expect(Pending::Edge(key, edge));
                self.out.push(Command::Read { token, offset, buf, range: 0..BLOCK });
                true
            }
            EdgeSource::Miss { .. } => {
                let (op, block) = (task.op, source.block);
                let view = Arc::clone(&task.view);
                let to = super::fill::Target::Edge(key, edge);
                self.want_fill(op.inode, op.chunk, &view, block..block + 1, false, to);
                true
            }
        }
    }

    pub(crate) fn edge_read(&mut self, key: WriteKey, edge: usize, old: B, ok: bool) {
        let Some(task) = self.writes.get_mut(&key) else { return };
        let Some(e) = task.plan.as_ref().and_then(|p| p.edges.get(edge)).cloned() else { return };
        let EdgeSource::Device { crc, valid, .. } = e.source else { return };
        if ok && crc32c(&old.bytes()[..BLOCK]) == crc {
            self.merge_edge(key, edge, &old.bytes()[..valid as usize]);
        } else {
            self.stats.checksum_errors += 1;
            task.edge_retries += 1;
            // A second time below: through the repair of `edges_done`.
            task.failed = Some(Refusal::of(Status::Io));
        }
        self.edge_done(key);
    }

    /// Old bytes of an edge's block; what is past them is zero.
    pub(crate) fn merge_edge(&mut self, key: WriteKey, edge: usize, old: &[u8]) {
        let Some(task) = self.writes.get_mut(&key) else { return };
        let (Some(plan), Some(buf)) = (&task.plan, task.buf.as_mut()) else { return };
        let Some(e) = plan.edges.get(edge) else { return };
        for r in &e.fill {
            let target = &mut buf.bytes_mut()[e.at + r.start..e.at + r.end];
            let there = old.get(r.start..r.end.min(old.len())).unwrap_or_default();
            target[..there.len()].copy_from_slice(there);
            target[there.len()..].fill(0);
        }
    }

    /// An edge could not be had.
    pub(crate) fn edge_failed(&mut self, key: WriteKey, refusal: Refusal) {
        if let Some(task) = self.writes.get_mut(&key) {
            task.failed = Some(refusal);
        }
        self.edge_done(key);
    }

    pub(crate) fn edge_done(&mut self, key: WriteKey) {
        let Some(task) = self.writes.get_mut(&key) else { return };
        debug_assert_eq!(task.state, State::Edges);
        task.outstanding -= 1;
        if task.outstanding == 0 {
            self.edges_done(key);
        }
    }

    fn edges_done(&mut self, key: WriteKey) {
        let Some(task) = self.writes.get_mut(&key) else { return };
        if let Some(refusal) = task.failed {
            if refusal.status == Status::Io && self.repair_edge(key) {
                return;
            }
            return self.finish_write(key, Err(refusal));
        }
        let (Some(plan), Some(buf)) = (&task.plan, &task.buf) else { return };
        // Whole blocks keep the client's checksum: it covers them end to end (I10). Merged ones get
        // a new one.
        for e in &plan.edges {
            let i = (e.block - plan.first_block) as usize;
            task.crcs[i] = crc32c(&buf.bytes()[e.at..e.at + BLOCK]);
        }
        if plan.writes.is_empty() {
            return self.commit(key);
        }
        task.state = State::Data;
        task.outstanding = plan.writes.len();
        let writes = plan.writes.clone();
        let Some(buf) = task.buf.take() else { return };
        let buf = Arc::new(buf);
        task.shared = Some(Arc::clone(&buf));
        for w in writes {
            let token = self.expect(Pending::WriteData(key));
            let buf = Arc::clone(&buf);
            self.out.push(Command::Write { token, offset: w.offset, buf, range: w.range });
        }
    }

    /// Rot in the old block of an edge: read again once; then, if the block is clean, drop it and
    /// take it from S3. `true`: under way.
    fn repair_edge(&mut self, key: WriteKey) -> bool {
        let Some(task) = self.writes.get_mut(&key) else { return false };
        let Some(plan) = task.plan.take() else { return false };
        self.store.abort_write(plan.id);
        self.retry_waiting = true;
        task.failed = None;
        if task.edge_retries <= 1 {
            self.wait_in_line(key, true);
            return true;
        }
        let (op, tries) = (task.op, task.edge_retries);
        let damaged = plan.edges.iter().filter_map(|e| match e.source {
            EdgeSource::Device { .. } => Some(e.block),
            _ => None,
        });
        let mut dirty = false;
        for block in damaged {
            let read = self.store.plan_read(op.inode, op.chunk, block..block + 1, op.base);
            dirty |= read
                .pieces
                .iter()
                .any(|p| matches!(p.source, PieceSource::Device { dirty: true, .. }));
            if let Some(guard) = read.guard {
                self.store.release(guard);
            }
        }
        if dirty || tries > 3 {
            return false;
        }
        match self.store.evict_clean(&[op.inode]) {
            Ok(Some(ticket)) => {
                self.stats.checksum_repairs += 1;
                self.wait_ticket(ticket, Waiter::RepairWrite(key));
                true
            }
            Ok(None) => {
                self.wait_in_line(key, true);
                true
            }
            Err(_) => false,
        }
    }

    pub(crate) fn restart_write(&mut self, key: WriteKey) {
        self.wait_in_line(key, true);
        self.retry_waiting = true;
    }

    // --- data, journal, answer -----------------------------------------------------------------------

    pub(crate) fn data_written(&mut self, key: WriteKey) {
        let Some(task) = self.writes.get_mut(&key) else { return };
        task.outstanding -= 1;
        if task.outstanding == 0 {
            self.commit(key);
        }
    }

    fn commit(&mut self, key: WriteKey) {
        let Some(task) = self.writes.get_mut(&key) else { return };
        let Some(plan) = task.plan.take() else { return };
        let inline = match (&task.buf, plan.inline) {
            (Some(buf), true) => &buf.bytes()[..plan.blocks as usize * BLOCK],
            _ => &[][..],
        };
        let committed = self.store.commit_write(plan.id, &task.crcs, inline);
        let data = task.buf.take().map(Arc::new).or_else(|| task.shared.take());
        task.shared = None;
        self.retry_waiting = true;
        match committed {
            Ok(ticket) => {
                task.state = State::Journal;
                let (op, crcs) = (task.op, std::mem::take(&mut task.crcs));
                self.wait_ticket(ticket, Waiter::Write(key));
                self.ship_write(op, ticket, crcs, data);
            }
            Err(WriteError::Wait(_)) => {
                // The plan is gone, and with it the bytes: the client sends them again.
                self.finish_write(key, Err(Refusal::after(Status::Busy, RETRY_BUSY_MS)));
            }
            Err(e) => {
                let outcome = self.refusal_of(e);
                self.finish_write(key, outcome);
            }
        }
    }

    pub(crate) fn write_durable(&mut self, key: WriteKey) {
        let Some(task) = self.writes.get(&key) else { return };
        let (generation, pg, duplicate) = (task.op.generation, task.pg, task.duplicate);
        let chunk = (task.op.inode, task.op.chunk);
        if duplicate && let Some(open) = self.open_op_of(pg, chunk) {
            return self.wait_op(pg, open, vec![Waiter::Write(key)]);
        }
        self.finish_write(key, Ok(generation));
    }

    /// The other members get a write that was appended.
    fn ship_write(
        &mut self,
        op: WriteOp,
        ticket: ebb_store::Ticket,
        crcs: Vec<u32>,
        data: Option<Arc<B>>,
    ) {
        let pg = self.store.scope_of(op.inode, op.chunk).pg;
        let Some(data) = data.filter(|_| self.leads(pg)) else { return };
        let bytes = crcs.len() * BLOCK;
        let ship = Ship::Write(ShippedWrite {
            inode: op.inode,
            chunk: op.chunk,
            offset: op.offset,
            len: op.len,
            generation: op.generation,
            session: op.session,
            sequence: op.sequence,
            answered_below: op.answered_below,
            crcs,
        });
        self.ship(pg, ticket, ship, vec![(data, 0..bytes)]);
    }

    /// Ends a write that is durable here, and is not to be called done.
    pub(crate) fn end_write(&mut self, key: WriteKey, outcome: Result<Generation, Refusal>) {
        self.finish_write(key, outcome);
    }

    /// Gives a write up that is not in the journal yet.
    pub(crate) fn fail_write(&mut self, key: WriteKey, refusal: Refusal) {
        let Some(task) = self.writes.get_mut(&key) else { return };
        match task.state {
            State::Waiting => self.finish_write(key, Err(refusal)),
            State::Edges if task.outstanding > 1 => {
                // The other edge is still out: answer when it is back.
                task.failed = Some(refusal);
                task.outstanding -= 1;
            }
            State::Edges => self.finish_write(key, Err(refusal)),
            State::Data | State::Journal => {}
        }
    }

    fn finish_write(&mut self, key: WriteKey, outcome: Result<Generation, Refusal>) {
        let Some(task) = self.writes.remove(&key) else { return };
        if let Some(plan) = task.plan {
            self.store.abort_write(plan.id);
        }
        self.retry_waiting = true;
        // Durable is not enough: the answer must leave inside the lease and epoch (I5).
        let outcome = outcome.and_then(|generation| {
            self.placement.still_holds(&task.claim, self.now_ms).map(|()| generation)
        });
        match outcome {
            Ok(generation) => {
                debug_assert_eq!(task.pg, task.claim.pg);
                self.stats.writes += 1;
                self.stats.write_bytes += u64::from(task.op.len);
                self.reply(task.owed, Status::Ok, WriteReply { generation }.encode());
            }
            Err(refusal) => self.refuse(task.owed, refusal),
        }
    }

    // --- the line -----------------------------------------------------------------------------------------

    /// Tries the writes that wait, chunk by chunk, in order.
    pub(crate) fn retry_writes(&mut self) {
        if !std::mem::take(&mut self.retry_waiting) {
            return;
        }
        let chunks: Vec<_> = self.waiting.keys().copied().collect();
        for chunk in chunks {
            while let Some(key) = self.waiting.get(&chunk).and_then(|line| line.front().copied()) {
                let gone = !self.writes.contains_key(&key);
                if !gone && !self.try_write(key) {
                    break;
                }
                if let Some(line) = self.waiting.get_mut(&chunk)
                    && line.front() == Some(&key)
                {
                    line.pop_front();
                }
            }
            if self.waiting.get(&chunk).is_some_and(|line| line.is_empty()) {
                self.waiting.remove(&chunk);
            }
        }
    }

    pub(crate) fn expire_writes(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let busy = Refusal::after(Status::Busy, RETRY_BUSY_MS);
        let late: Vec<WriteKey> = self
            .waiting
            .values()
            .flatten()
            .filter(|key| {
                self.writes
                    .get(key)
                    .is_some_and(|t| self.now_ms >= t.since_ms.saturating_add(super::PATIENCE_MS))
            })
            .copied()
            .collect();
        for key in late {
            self.finish_write(key, Err(busy));
        }
        self.waiting.retain(|_, line| {
            line.retain(|key| self.writes.contains_key(key));
            !line.is_empty()
        });
    }

    /// The store failed: everything not journaled is answered now.
    pub(crate) fn fail_waiting(&mut self) {
        let io = Refusal::of(Status::Io);
        let keys: Vec<WriteKey> = self.writes.keys().copied().collect();
        for key in keys {
            let Some(task) = self.writes.get(&key) else { continue };
            match task.state {
                // Its completions come; they find the store failed.
                State::Data | State::Edges => {}
                State::Waiting | State::Journal => self.finish_write(key, Err(io)),
            }
        }
        self.waiting.clear();
        self.fail_controls();
    }
}

/// Whether waiting helps at all (used where a control record must wait).
pub(crate) fn waits_for_batch(wait: WaitFor) -> bool {
    matches!(wait, WaitFor::Overlap | WaitFor::Control | WaitFor::Backlog | WaitFor::Journal)
}
