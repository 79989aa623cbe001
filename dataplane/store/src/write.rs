//! Writes and fills: plan, commit, abort (I5, I7, I10).
//!
//! A write's blocks are locked from begin until it is durable, so that the old bytes at its edges
//! cannot change under it and two writes of the same bytes land in the order they were begun.

use crate::error::{WaitFor, WriteError};
use crate::extent::{Origin, Run, total};
use crate::record::{FillRecord, Record, WriteRecord};
use crate::store::{InFlightFill, InFlightWrite, Store};
use crate::types::*;
use ebb_dataplane_protocol::{Generation, Sequence, crc32c};

/// Journal pages a record without inline data takes at most (1024 checksums and runs).
pub(crate) const RECORD_PAGES: u32 = 4;

/// What a planned write holds until it is committed or given up.
struct Reserved {
    inline: bool,
    runs: Vec<Run>,
    index_bytes: u64,
    journal_pages: u32,
}

impl Store {
    /// Plans a write. Checks floor, freeze, window, overlap and space against everything appended so
    /// far (durable or not); edges come from durable state, which the overlap rule makes the same.
    /// The blocks stay locked for overlapping writes until the ticket is durable or the plan aborted.
    pub fn begin_write(&mut self, op: &WriteOp) -> Result<WritePlan, WriteError> {
        let blocks = block_range(op.offset, op.len)
            .ok_or(WriteError::Malformed("range is empty or past the end of the chunk"))?;
        let n = blocks.len() as u32;
        let key = (op.inode, op.chunk);
        let scope = self.index.scope_of(key);
        match self.seen(op.session, op.sequence) {
            Seen::New => {}
            Seen::Applied(generation) => return Err(WriteError::Duplicate { generation }),
            Seen::Answered => return Err(WriteError::Answered),
        }
        if self.sequences.contains(&(op.session, op.sequence)) {
            return Err(WriteError::Wait(WaitFor::Overlap));
        }
        self.may_write(scope, op.generation)?;
        self.window_has_room(op)?;
        if self.heads.contains_key(&scope) {
            return Err(WriteError::Wait(WaitFor::Control));
        }
        let overlaps = |r: &std::ops::Range<u32>| r.start < blocks.end && blocks.start < r.end;
        if self.locks.get(&key).is_some_and(|l| l.iter().any(|(r, _)| overlaps(r))) {
            return Err(WriteError::Wait(WaitFor::Overlap));
        }
        let Reserved { inline, runs, index_bytes, journal_pages } = self.reserve(op.len, n)?;

        // Nothing can fail any more.
        let edges = self.edges(op, &blocks);
        let on_device = edges.iter().any(|e| matches!(e.source, EdgeSource::Device { .. }));
        let guard = on_device.then(|| self.guard());
        let id = WriteId(self.next_id);
        self.next_id += 1;
        self.locks.entry(key).or_default().push((blocks.clone(), id));
        self.sequences.insert((op.session, op.sequence));
        let writes = planned(&runs);
        let first_block = blocks.start;
        self.writes.insert(
            id,
            InFlightWrite {
                op: *op,
                shipped: false,
                scope,
                blocks,
                runs,
                inline,
                guard,
                dropped: false,
                index_bytes,
                committed: false,
                journal_pages,
            },
        );
        let head = op.offset as usize % BLOCK;
        Ok(WritePlan { id, first_block, blocks: n, head, inline, writes, edges })
    }

    /// Plans a write that the group's primary sent: whole blocks, checked and ordered there.
    pub fn begin_shipped(&mut self, op: &WriteOp) -> Result<WritePlan, WriteError> {
        let blocks = block_range(op.offset, op.len)
            .ok_or(WriteError::Malformed("range is empty or past the end of the chunk"))?;
        let n = blocks.len() as u32;
        let scope = self.index.scope_of((op.inode, op.chunk));
        let Reserved { inline, runs, index_bytes, journal_pages } = self.reserve(op.len, n)?;
        let id = WriteId(self.next_id);
        self.next_id += 1;
        let (first_block, writes) = (blocks.start, planned(&runs));
        self.writes.insert(
            id,
            InFlightWrite {
                op: *op,
                shipped: true,
                scope,
                blocks,
                runs,
                inline,
                guard: None,
                dropped: false,
                index_bytes,
                committed: false,
                journal_pages,
            },
        );
        let head = op.offset as usize % BLOCK;
        Ok(WritePlan { id, first_block, blocks: n, head, inline, writes, edges: Vec::new() })
    }

    /// Takes what a write of `n` blocks needs, or nothing.
    fn reserve(&mut self, len: u32, n: u32) -> Result<Reserved, WriteError> {
        let inline = len <= INLINE_BYTES_MAX;
        let journal_pages = if inline { n + 1 } else { RECORD_PAGES };
        self.data_room(journal_pages)?;
        let index_bytes = 160 + u64::from(n) * 4 + 20 * 2;
        self.index_room(index_bytes, 2, n)?;
        self.block_room(n)?;
        let runs = if inline {
            self.reserved_inline += n;
            Vec::new()
        } else {
            self.alloc.alloc(n).ok_or_else(|| self.no_space(n))?
        };
        let index_bytes = index_bytes + 20 * runs.len() as u64;
        self.reserved_index += index_bytes;
        self.reserved_pages += journal_pages;
        Ok(Reserved { inline, runs, index_bytes, journal_pages })
    }

    /// Whether there are `n` blocks; what groups that moved away left goes for them.
    pub(crate) fn block_room(&mut self, n: u32) -> Result<(), WriteError> {
        self.make_room(n);
        if self.available() < n { Err(self.no_space(n)) } else { Ok(()) }
    }

    fn may_write(&self, scope: Scope, g: Generation) -> Result<(), WriteError> {
        let pg = scope.pg;
        if let Some(epoch) = self.frozen[usize::from(pg.0)] {
            return Err(WriteError::Frozen { pg, epoch });
        }
        let floor = self.floor(scope);
        if g < floor {
            return Err(WriteError::StaleGeneration { floor });
        }
        Ok(())
    }

    fn window_has_room(&self, op: &WriteOp) -> Result<(), WriteError> {
        let applied = self.index.sessions.get(&op.session).map_or(0, |w| {
            w.applied.len() - w.applied.partition_point(|a| a.sequence < op.answered_below.0)
        });
        let from = (op.session, Sequence(0));
        let to = (op.session, Sequence(u64::MAX));
        let in_flight = self.sequences.range(from..=to).count();
        if applied + in_flight >= WINDOW_MAX { Err(WriteError::WindowFull) } else { Ok(()) }
    }

    /// Whether index and RAM may grow. Half of the checkpoint area is kept for pins.
    pub(crate) fn index_room(
        &self,
        bytes: u64,
        extents: u64,
        blocks: u32,
    ) -> Result<(), WriteError> {
        let encoded = self.index.counters.encoded + self.reserved_index + bytes;
        let memory = self.index.memory_bytes()
            + self.alloc.memory_bytes() as u64
            + self.reserved_index
            + bytes
            + extents * 64;
        if encoded > self.index_bytes_max() / 2 || memory > self.memory_bytes_max {
            return Err(self.no_space(blocks));
        }
        Ok(())
    }

    pub(crate) fn no_space(&self, blocks: u32) -> WriteError {
        let evictable =
            self.index.counters.clean_blocks.saturating_sub(self.evicting.values().sum())
                * BLOCK as u64;
        WriteError::NoSpace { needed: u64::from(blocks) * BLOCK as u64, evictable }
    }

    /// The blocks written in part, and where their old bytes are.
    fn edges(&self, op: &WriteOp, blocks: &std::ops::Range<u32>) -> Vec<Edge> {
        let head = op.offset as usize % BLOCK;
        let end = (op.offset + op.len) as usize % BLOCK;
        let last = blocks.end - 1;
        let mut edges: Vec<Edge> = Vec::with_capacity(2);
        let mut add = |block: u32, fill: std::ops::Range<usize>| {
            if let Some(e) = edges.last_mut().filter(|e| e.block == block) {
                e.fill.push(fill);
                return;
            }
            let at = (block - blocks.start) as usize * BLOCK;
            edges.push(Edge { block, at, fill: vec![fill], source: EdgeSource::Zero });
        };
        if head > 0 {
            add(blocks.start, 0..head);
        }
        if end > 0 {
            add(last, end..BLOCK);
        }
        for e in &mut edges {
            let source = self.old_block(op, e.block);
            let valid = match source {
                EdgeSource::Zero => 0,
                EdgeSource::Device { valid, .. } | EdgeSource::Miss { valid } => valid as usize,
            };
            // Bytes past what counts are zeros: no need to fetch anything for them.
            if e.fill.iter().any(|r| r.start < valid) {
                e.source = source;
            }
        }
        edges
    }

    fn old_block(&self, op: &WriteOp, block: u32) -> EdgeSource {
        let start = op.chunk.start() + u64::from(block) * BLOCK as u64;
        let base = op.base.valid_bytes.saturating_sub(start).min(BLOCK as u64) as u32;
        let held = self.index.chunks.get(&(op.inode, op.chunk)).and_then(|c| c.extents.find(block));
        if let Some(e) = held {
            let k = (block - e.first()) as usize;
            let tail = if block + 1 == e.end() { u32::from(e.tail) } else { BLOCK as u32 };
            let valid = match e.origin {
                Origin::Dirty(_) => tail,
                Origin::Clean(c) if c == op.base.content => tail.min(base),
                Origin::Clean(_) => 0,
            };
            if e.origin.is_dirty() || valid > 0 {
                let offset = u64::from(e.location + k as u32) * BLOCK as u64;
                return EdgeSource::Device { offset, crc: e.crcs[k], valid };
            }
        }
        if base == 0 { EdgeSource::Zero } else { EdgeSource::Miss { valid: base } }
    }

    /// Appends the record. `crcs`: one CRC-32C per whole block of the buffer; `inline`: the buffer if the
    /// plan is inline, else empty. All device writes of the plan have completed. On an error the plan
    /// is aborted.
    pub fn commit_write(
        &mut self,
        id: WriteId,
        crcs: &[u32],
        inline: &[u8],
    ) -> Result<Ticket, WriteError> {
        if let Err(e) = self.check_commit(id, crcs, inline) {
            self.abort_write(id);
            return Err(e);
        }
        let Some(w) = self.writes.get_mut(&id) else { return Err(WriteError::UnknownWrite(id)) };
        w.committed = true;
        let (scope, generation) = (w.scope, w.op.generation);
        self.reserved_pages -= w.journal_pages;
        let record = Record::Write(WriteRecord {
            inode: w.op.inode,
            chunk: w.op.chunk,
            offset: w.op.offset,
            len: w.op.len,
            generation: w.op.generation,
            session: w.op.session,
            sequence: w.op.sequence,
            answered_below: w.op.answered_below,
            inline: w.inline,
            // An inline record's place is known when its batch is closed; the length is the same.
            runs: if w.inline {
                vec![Run { start: 0, blocks: w.blocks.len() as u32 }]
            } else {
                w.runs.clone()
            },
            crcs: crcs.into(),
        });
        let (needs_sync, guard) = (!w.inline, w.guard.take());
        if let Some(guard) = guard {
            self.release(guard);
        }
        let ticket = self.journal.append(record, inline.to_vec(), true, needs_sync);
        self.tags.entry(scope).or_default().take(generation);
        self.committed.insert(ticket, id);
        Ok(ticket)
    }

    fn check_commit(&self, id: WriteId, crcs: &[u32], inline: &[u8]) -> Result<(), WriteError> {
        let w =
            self.writes.get(&id).filter(|w| !w.committed).ok_or(WriteError::UnknownWrite(id))?;
        if self.failed {
            return Err(WriteError::Failed);
        }
        if w.dropped {
            return Err(WriteError::Dropped);
        }
        if crcs.len() != w.blocks.len() {
            return Err(WriteError::Malformed("one checksum per block"));
        }
        if inline.len() != if w.inline { w.blocks.len() * BLOCK } else { 0 } {
            return Err(WriteError::Malformed("inline bytes do not match the plan"));
        }
        // A seal, cut, freeze or later tag appended since the plan was made wins.
        if !w.shipped {
            self.may_write(w.scope, w.op.generation)?;
        }
        for (i, block) in inline.chunks(BLOCK).enumerate() {
            if crc32c(block) != crcs[i] {
                return Err(WriteError::Corrupt { block: w.blocks.start + i as u32 });
            }
        }
        Ok(())
    }

    /// Gives a plan up; none of its device I/O may be in flight. Unknown and committed ones are ignored.
    pub fn abort_write(&mut self, id: WriteId) {
        if self.writes.get(&id).is_none_or(|w| w.committed) {
            return;
        }
        if let Some(w) = self.finish_write(id) {
            // Never named by a record: nobody can be reading them.
            w.runs.into_iter().for_each(|r| self.alloc.release(r));
            if let Some(guard) = w.guard {
                self.release(guard);
            }
        }
    }

    /// Plans a clean fill (not inline). `NoSpace`: serve without caching, and evict. The last 1/64 of
    /// the device is left to writes.
    pub fn begin_fill(&mut self, op: &FillOp) -> Result<FillPlan, WriteError> {
        let end = op.first_block.checked_add(op.blocks).filter(|e| *e <= CHUNK_BLOCKS);
        if op.blocks == 0 || end.is_none() || !(1..=BLOCK as u32).contains(&op.tail_valid) {
            return Err(WriteError::Malformed("range is empty or past the end of the chunk"));
        }
        let scope = self.index.scope_of((op.inode, op.chunk));
        let pg = scope.pg;
        if let Some(epoch) = self.frozen[usize::from(pg.0)] {
            return Err(WriteError::Frozen { pg, epoch });
        }
        self.data_room(RECORD_PAGES)?;
        let index_bytes = 160 + u64::from(op.blocks) * 4;
        let spare = self.alloc.capacity() / 64;
        self.index_room(index_bytes, 2, op.blocks)?;
        self.make_room(op.blocks + spare);
        if self.available() < op.blocks + spare {
            return Err(self.no_space(op.blocks + spare));
        }
        let runs = self.alloc.alloc(op.blocks).ok_or_else(|| self.no_space(op.blocks))?;
        let id = FillId(self.next_id);
        self.next_id += 1;
        let writes = planned(&runs);
        self.reserved_pages += RECORD_PAGES;
        self.reserved_index += index_bytes;
        self.fills.insert(id, InFlightFill { op: *op, scope, runs, dropped: false, index_bytes });
        Ok(FillPlan { id, first_block: op.first_block, blocks: op.blocks, writes })
    }

    /// Appends the fill; nobody needs to wait for the ticket. Blocks that became dirty or clean
    /// meanwhile keep what they have.
    pub fn commit_fill(&mut self, id: FillId, crcs: &[u32]) -> Result<Ticket, WriteError> {
        let fill = self.fills.get(&id).ok_or(WriteError::UnknownFill(id))?;
        let check = if self.failed {
            Err(WriteError::Failed)
        } else if fill.dropped {
            Err(WriteError::Dropped)
        } else if crcs.len() != fill.op.blocks as usize {
            Err(WriteError::Malformed("one checksum per block"))
        } else {
            Ok(())
        };
        if let Err(e) = check {
            self.abort_fill(id);
            return Err(e);
        }
        let Some(fill) = self.finish_fill(id) else { return Err(WriteError::UnknownFill(id)) };
        assert_eq!(total(&fill.runs), fill.op.blocks);
        let record = Record::Fill(FillRecord {
            inode: fill.op.inode,
            chunk: fill.op.chunk,
            first_block: fill.op.first_block,
            content: fill.op.content,
            tail: fill.op.tail_valid as u16,
            runs: fill.runs,
            crcs: crcs.into(),
        });
        Ok(self.journal.append(record, Vec::new(), false, true))
    }

    /// Gives a fill up; none of its device I/O may be in flight.
    pub fn abort_fill(&mut self, id: FillId) {
        if let Some(fill) = self.finish_fill(id) {
            fill.runs.into_iter().for_each(|r| self.alloc.release(r));
        }
    }

    fn finish_fill(&mut self, id: FillId) -> Option<InFlightFill> {
        let fill = self.fills.remove(&id)?;
        self.reserved_pages -= RECORD_PAGES;
        self.reserved_index -= fill.index_bytes;
        Some(fill)
    }
}

pub(crate) fn planned(runs: &[Run]) -> Vec<PlannedWrite> {
    let mut at = 0;
    runs.iter()
        .map(|r| {
            let len = r.blocks as usize * BLOCK;
            at += len;
            PlannedWrite { offset: r.offset(), range: at - len..at }
        })
        .collect()
}
