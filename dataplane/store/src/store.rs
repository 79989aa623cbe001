//! The store's state, its life, and the journal's turn: take a batch, have it written, apply it (I1).

use crate::alloc::Allocator;
use crate::checkpoint::Checkpoint;
use crate::device::OpenDevice;
use crate::error::{CompletionError, ControlError, OpenError, WaitFor, WriteError};
use crate::extent::Run;
use crate::geometry::{Geometry, Identity};
use crate::index::{ChunkKey, Index};
use crate::journal::{InFlight, Journal, Share};
use crate::record::Record;
use crate::remnant::Remnants;
use crate::types::*;
use ebb_dataplane_protocol::*;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

/// RAM the index may take unless [`Store::set_memory_limit`] says otherwise.
pub const MEMORY_BYTES_DEFAULT: u64 = 144 << 20;
/// While more than this waits to be written to a checkpoint, no batch is closed.
const CAPTURE_BACKLOG_BYTES: usize = 8 << 20;

/// A write that was planned and is not durable yet.
#[derive(Debug)]
pub(crate) struct InFlightWrite {
    pub(crate) op: WriteOp,
    /// Sent by the group's primary, which checked it.
    pub(crate) shipped: bool,
    pub(crate) scope: Scope,
    pub(crate) blocks: Range<u32>,
    pub(crate) runs: Vec<Run>,
    pub(crate) inline: bool,
    pub(crate) guard: Option<ReadGuard>,
    pub(crate) dropped: bool,
    pub(crate) index_bytes: u64,
    pub(crate) committed: bool,
    pub(crate) journal_pages: u32,
}

/// A fill that was planned and not committed.
#[derive(Debug)]
pub(crate) struct InFlightFill {
    pub(crate) op: FillOp,
    pub(crate) scope: Scope,
    pub(crate) runs: Vec<Run>,
    pub(crate) dropped: bool,
    pub(crate) index_bytes: u64,
}

/// What appended but not yet durable control records say of a scope.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Head {
    pub(crate) floor: Generation,
    pub(crate) view: ViewVersion,
    pub(crate) pending: u32,
    pub(crate) last: Ticket,
}

/// Tags of a scope's appended writes that are not durable yet.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tags {
    /// The highest of those taken while any was pending.
    pub(crate) highest: Generation,
    pending: u32,
}

impl Tags {
    pub(crate) fn take(&mut self, generation: Generation) {
        self.highest = self.highest.max(generation);
        self.pending += 1;
    }
}

/// Something that waits until every reader of its time is gone.
#[derive(Debug)]
pub(crate) enum Deferred {
    Blocks(Run),
    JournalTo(u64),
}

/// One core's store. See the crate's documentation for the life of a mutation.
#[derive(Debug)]
pub struct Store {
    pub(crate) geometry: Geometry,
    pub(crate) identity: Identity,
    /// Number of the live checkpoint.
    pub(crate) number: u64,
    pub(crate) journal: Journal,
    pub(crate) index: Index,
    pub(crate) alloc: Allocator,
    pub(crate) writes: BTreeMap<WriteId, InFlightWrite>,
    pub(crate) fills: BTreeMap<FillId, InFlightFill>,
    /// Blocks locked by writes from begin to durable.
    pub(crate) locks: BTreeMap<ChunkKey, Vec<(Range<u32>, WriteId)>>,
    /// (session, sequence) of the writes in flight.
    pub(crate) sequences: BTreeSet<(SessionId, Sequence)>,
    /// Committed writes by ticket.
    pub(crate) committed: BTreeMap<Ticket, WriteId>,
    pub(crate) heads: BTreeMap<Scope, Head>,
    pub(crate) tags: BTreeMap<Scope, Tags>,
    /// Freezes as of everything appended.
    pub(crate) frozen: Vec<Option<PgEpoch>>,
    /// Freeze, thaw and release records that are not durable yet, per group.
    pub(crate) pg_pending: Vec<u32>,
    /// Blocks that inline writes in flight will need when they are relocated.
    pub(crate) reserved_inline: u32,
    /// Index bytes that writes and fills in flight may add.
    pub(crate) reserved_index: u64,
    pub(crate) memory_bytes_max: u64,
    /// Clean blocks on their way out, by ticket.
    pub(crate) evicting: BTreeMap<Ticket, u64>,
    /// A batch that is durable and did not take effect yet.
    written: Option<InFlight>,
    /// Journal pages that writes and fills in flight will take.
    pub(crate) reserved_pages: u32,
    pub(crate) guards: BTreeSet<u64>,
    pub(crate) next_id: u64,
    pub(crate) deferred: VecDeque<(u64, Deferred)>,
    pub(crate) deferred_blocks: u64,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) durable: Ticket,
    pub(crate) checkpoints: u64,
    pub(crate) failed: bool,
    /// What is left of groups that others hold now.
    pub(crate) remnants: Remnants,
}

impl Store {
    /// Recovers the store: superblock, checkpoint, journal; rebuilds the bitmap. Refuses with a reason.
    pub fn open(device: &mut dyn OpenDevice, cluster: ClusterId) -> Result<Self, OpenError> {
        let recovered = crate::recovery::recover(device, Some(cluster))?;
        crate::recovery::repair_superblocks(device, &recovered)?;
        let crate::recovery::Recovered { superblock, index, alloc, journal, .. } = recovered;
        let identity = Identity { node: index.node, ..superblock.identity };
        let frozen: Vec<_> = index.pgs.iter().map(|p| p.frozen).collect();
        let pg_pending = vec![0; frozen.len()];
        Ok(Self {
            geometry: superblock.geometry,
            identity,
            number: superblock.number,
            journal,
            index,
            alloc,
            writes: BTreeMap::new(),
            fills: BTreeMap::new(),
            locks: BTreeMap::new(),
            sequences: BTreeSet::new(),
            committed: BTreeMap::new(),
            heads: BTreeMap::new(),
            tags: BTreeMap::new(),
            frozen,
            pg_pending,
            reserved_inline: 0,
            reserved_index: 0,
            memory_bytes_max: MEMORY_BYTES_DEFAULT,
            evicting: BTreeMap::new(),
            written: None,
            reserved_pages: 0,
            guards: BTreeSet::new(),
            next_id: 1,
            deferred: VecDeque::new(),
            deferred_blocks: 0,
            checkpoint: Checkpoint::Idle,
            durable: Ticket(0),
            checkpoints: 0,
            failed: false,
            remnants: Remnants::default(),
        })
    }

    /// Whose store it is.
    pub fn identity(&self) -> Identity {
        Identity { node: self.index.node, ..self.identity }
    }
    /// Its layout.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }
    /// Bounds the RAM of index and bitmap; at the bound, clean data must go before more comes.
    pub fn set_memory_limit(&mut self, bytes: u64) {
        self.memory_bytes_max = bytes;
    }
    /// A device write or sync failed: from now on every mutation is refused and no batch is given.
    /// There is no way back but to open the device again.
    pub fn fail(&mut self) {
        self.failed = true;
    }
    /// Whether [`Store::fail`] was called.
    pub fn failed(&self) -> bool {
        self.failed
    }

    /// How full the store is, and how big its index.
    pub fn stats(&self) -> StoreStats {
        const B: u64 = BLOCK as u64;
        let pinned: BTreeSet<InodeId> =
            self.index.pgs.iter().flat_map(|p| p.pinned.keys().copied()).collect();
        StoreStats {
            capacity_bytes: u64::from(self.alloc.capacity()) * B,
            free_bytes: (u64::from(self.available()) + self.remnants.blocks()) * B,
            remnant_bytes: self.remnants.blocks() * B,
            dirty_bytes: self.index.counters.dirty_blocks * B,
            clean_bytes: self.index.counters.clean_blocks * B,
            pinned_inodes: pinned.len() as u64,
            inline_bytes: self.index.inline.len() as u64 * B,
            journal_bytes: self.geometry.journal_bytes,
            journal_used_bytes: u64::from(self.journal.used_pages()) * B,
            inodes: self.index.inodes.len() as u64,
            chunks: self.index.chunks.len() as u64,
            extents: self.index.counters.extents,
            index_bytes: self.index.counters.encoded,
            index_bytes_max: self.index_bytes_max(),
            memory_bytes: self.index.memory_bytes() + self.alloc.memory_bytes() as u64,
            memory_bytes_max: self.memory_bytes_max,
            batches: self.journal.batches,
            records: self.journal.records,
            checkpoints: self.checkpoints,
            waiting_bytes: self.deferred_blocks * B,
        }
    }
    pub(crate) fn index_bytes_max(&self) -> u64 {
        crate::capture::capacity(self.geometry.checkpoint_bytes, self.index.pgs.len())
    }
    /// Free blocks nobody has a claim on: every live inline block must find a slot when the journal
    /// comes round, or a full device could never checkpoint.
    pub(crate) fn available(&self) -> u32 {
        self.alloc
            .free_blocks()
            .saturating_sub(self.index.inline.len() as u32)
            .saturating_sub(self.reserved_inline)
    }

    // --- the journal ----------------------------------------------------------------------------

    /// Whether records wait for a batch, and whether somebody waits for one of them (false: only lazy
    /// records such as fills, which may wait for company).
    pub fn pending(&self) -> Pending {
        let (records, urgent) = self.journal.waiting_counts();
        Pending { records, urgent: urgent > 0 }
    }

    /// Sequence the next batch will have; grows by one per batch, across restarts.
    pub fn batch_sequence(&self) -> u64 {
        self.journal.applied.sequence
    }

    /// Whether a batch is in flight.
    pub fn batch_in_flight(&self) -> bool {
        self.journal.in_flight.is_some()
    }

    /// Closes the open batch. `None`: nothing waits, a batch is in flight, or the journal or the
    /// checkpoint must be driven first.
    pub fn take_batch(&mut self) -> Option<JournalBatch> {
        let backlog = self.index.capture.as_ref().map_or(0, |c| c.out.len());
        if self.failed || backlog > CAPTURE_BACKLOG_BYTES {
            return None;
        }
        self.journal.take()
    }

    /// The batch is durable, so that the next may be taken; `batch_durable` has to follow before anything else but
    /// that: the next batch is on its way while this one's mutations take effect.
    pub fn batch_written(&mut self, id: BatchId) -> Result<(), CompletionError> {
        let unknown = self.journal.in_flight.as_ref().is_none_or(|b| b.sequence != id.0);
        if unknown || self.written.is_some() {
            return Err(CompletionError::Batch(id));
        }
        self.written = self.journal.complete();
        Ok(())
    }

    /// The batch is durable: its mutations take effect now. Returns their tickets in order: send the
    /// acks in this order (a torn batch loses all of its records or none, and never an earlier batch).
    pub fn batch_durable(&mut self, id: BatchId) -> Result<Vec<Ticket>, CompletionError> {
        if self.written.as_ref().is_none_or(|b| b.sequence != id.0) {
            self.batch_written(id)?;
        }
        let Some(batch) = self.written.take() else { return Err(CompletionError::Batch(id)) };
        let mut tickets = Vec::with_capacity(batch.entries.len());
        for (ticket, record) in batch.entries {
            let left = self.leaving(&record);
            self.index.apply(&record, batch.sequence);
            self.keep_remnants(left, &record);
            self.after_apply(ticket, &record);
            assert!(ticket > self.durable, "tickets become durable in order");
            self.durable = ticket;
            tickets.push(ticket);
        }
        self.collect();
        Ok(tickets)
    }

    fn after_apply(&mut self, ticket: Ticket, record: &Record) {
        match record {
            Record::Write(w) => {
                // From here on the index says it.
                let scope = self.index.scope_of((w.inode, w.chunk));
                if let Some(tags) = self.tags.get_mut(&scope) {
                    tags.pending -= 1;
                    if tags.pending == 0 {
                        self.tags.remove(&scope);
                    }
                }
                if let Some(id) = self.committed.remove(&ticket) {
                    self.finish_write(id);
                }
            }
            Record::Freeze { pg, .. }
            | Record::Thaw { pg, .. }
            | Record::Release { pg, .. }
            | Record::Discard { pg, .. } => {
                let i = usize::from(pg.0);
                self.pg_pending[i] -= 1;
                if self.pg_pending[i] == 0 {
                    self.frozen[i] = self.index.frozen(*pg);
                }
            }
            Record::EvictChunk { .. } => {
                self.evicting.remove(&ticket);
            }
            _ => {}
        }
        if let Some(scope) = head_scope(record)
            && let Some(head) = self.heads.get_mut(&scope)
        {
            head.pending -= 1;
            if head.pending == 0 {
                self.heads.remove(&scope);
            }
        }
    }

    /// Ends a write: its locks go, its plan is forgotten.
    pub(crate) fn finish_write(&mut self, id: WriteId) -> Option<InFlightWrite> {
        let w = self.writes.remove(&id)?;
        let key = (w.op.inode, w.op.chunk);
        if let Some(list) = self.locks.get_mut(&key) {
            list.retain(|(_, other)| *other != id);
            if list.is_empty() {
                self.locks.remove(&key);
            }
        }
        if !w.shipped {
            self.sequences.remove(&(w.op.session, w.op.sequence));
        }
        self.reserved_index -= w.index_bytes;
        if !w.committed {
            self.reserved_pages -= w.journal_pages;
        }
        if w.inline {
            self.reserved_inline -= w.blocks.len() as u32;
        }
        Some(w)
    }

    // --- space comes back -------------------------------------------------------------------------

    /// Hands what the last batch released to the allocator, or to the readers' queue (I11).
    pub(crate) fn collect(&mut self) {
        for run in std::mem::take(&mut self.index.released) {
            self.deferred_blocks += u64::from(run.blocks);
            self.deferred.push_back((self.next_id, Deferred::Blocks(run)));
        }
        self.drain_deferred();
    }
    pub(crate) fn drain_deferred(&mut self) {
        let oldest = self.guards.first().copied().unwrap_or(u64::MAX);
        while self.deferred.front().is_some_and(|(tag, _)| *tag <= oldest) {
            match self.deferred.pop_front() {
                Some((_, Deferred::Blocks(run))) => {
                    self.deferred_blocks -= u64::from(run.blocks);
                    self.alloc.release(run);
                }
                Some((_, Deferred::JournalTo(at))) => self.journal.release_to(at),
                None => break,
            }
        }
    }
    pub(crate) fn guard(&mut self) -> ReadGuard {
        let id = self.next_id;
        self.next_id += 1;
        self.guards.insert(id);
        ReadGuard(id)
    }
    /// Ends a read: its device I/O is done.
    pub fn release(&mut self, guard: ReadGuard) {
        assert!(self.guards.remove(&guard.0), "a guard is released once, to its own store");
        self.drain_deferred();
    }

    // --- appending ----------------------------------------------------------------------------------

    /// Appends a control record; `head` changes what later refusals go by.
    pub(crate) fn control(
        &mut self,
        record: Record,
        urgent: bool,
        head: impl FnOnce(&mut Head),
    ) -> Result<Ticket, ControlError> {
        if self.failed {
            return Err(ControlError::Failed);
        }
        if !self.journal.has_room(Share::Control, 0) {
            return Err(ControlError::Wait(WaitFor::Journal));
        }
        if self.journal.backlogged() {
            return Err(ControlError::Wait(WaitFor::Backlog));
        }
        let scope = head_scope(&record);
        let ticket = self.journal.append(record, Vec::new(), urgent, false);
        if let Some(scope) = scope {
            let (floor, view) = self
                .index
                .inodes
                .get(&scope)
                .map_or((Generation(0), ViewVersion(0)), |i| (i.floor, i.view));
            let entry =
                self.heads.entry(scope).or_insert(Head { floor, view, pending: 0, last: ticket });
            entry.pending += 1;
            entry.last = ticket;
            head(entry);
        }
        Ok(ticket)
    }

    pub(crate) fn data_room(&self, data_pages: u32) -> Result<(), WriteError> {
        if self.failed {
            return Err(WriteError::Failed);
        }
        if !self.journal.has_room(Share::Data, self.reserved_pages + data_pages) {
            return Err(WriteError::Wait(WaitFor::Journal));
        }
        if self.journal.backlogged() {
            return Err(WriteError::Wait(WaitFor::Backlog));
        }
        Ok(())
    }
}

/// The scope whose head a record holds until it is durable.
fn head_scope(record: &Record) -> Option<Scope> {
    match record {
        Record::Seal { scope, .. }
        | Record::FlushAborted { scope, .. }
        | Record::View { scope, .. }
        | Record::Floor { scope, .. }
        | Record::DropInode { scope } => Some(*scope),
        Record::CopyScope { pg, state } => Some(Scope { inode: state.inode, pg: *pg }),
        Record::FlushDone { pg, done } => Some(Scope { inode: done.inode, pg: *pg }),
        _ => None,
    }
}
