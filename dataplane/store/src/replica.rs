//! Copies of a placement group: what a core tells another of it, and how that takes it over (PROTOCOL
//! R41, R46).
//!
//! The giving side reads durable state only, of scopes on which nothing is under way
//! ([`Store::is_quiet`]); the caller keeps them so while it reads. The taking side stages blocks, then
//! replaces list by list: each list in one record, so that a copy that stops anywhere leaves every
//! chunk as it was or as it is there.

use crate::error::{ControlError, WaitFor, WriteError};
use crate::extent::{Extent, Origin, Run};
use crate::record::{CopyList, ENTRIES_MAX, Record};
use crate::store::Store;
use crate::types::*;
use crate::write::{RECORD_PAGES, planned};
use ebb_dataplane_protocol::control::WindowEntry;
use ebb_dataplane_protocol::replica::{CopiedExtent, CopiedList, CopiedScope};
use ebb_dataplane_protocol::{ChunkIndex, Generation, InodeId, PgId, Sequence, SessionId};
use std::collections::{BTreeMap, BTreeSet};

/// What of a chunk goes to another core: the blocks to read, each once, and the lists over them.
#[derive(Debug)]
pub struct ChunkCopy {
    /// Device offset and checksum of each block, in the order in which the lists number them.
    pub blocks: Vec<(u64, u32)>,
    /// The chunk's lists; the last one says so.
    pub lists: Vec<CopiedList>,
    /// Give it back when the blocks were read.
    pub guard: ReadGuard,
}

/// Blocks that were taken for a copy and belong to no list yet.
#[derive(Debug)]
pub struct Staged {
    runs: Vec<Run>,
    /// Device writes that fill them.
    pub writes: Vec<PlannedWrite>,
    index_bytes: u64,
}

impl Store {
    // --- the giving side --------------------------------------------------------------------------

    /// Scopes of a group, from past `after` on, looking at `budget` of all. `None`: there are no more.
    pub fn scopes_of_group(
        &self,
        pg: PgId,
        after: Option<Scope>,
        budget: usize,
    ) -> (Vec<Scope>, Option<Scope>) {
        use std::ops::Bound::{Excluded, Unbounded};
        let range = self.index.inodes.range((after.map_or(Unbounded, Excluded), Unbounded));
        let (mut found, mut last, mut seen) = (Vec::new(), None, 0);
        for (scope, _) in range {
            if seen == budget {
                return (found, last);
            }
            seen += 1;
            last = Some(*scope);
            if scope.pg == pg {
                found.push(*scope);
            }
        }
        (found, None)
    }

    /// Whether everything appended of a scope is durable, and no write of it is under way.
    pub fn is_quiet(&self, scope: Scope) -> bool {
        !self.heads.contains_key(&scope)
            && !self.tags.contains_key(&scope)
            && !self.writes.values().any(|w| w.scope == scope)
    }

    /// What outlives the chunks of a scope.
    pub fn scope_state(&self, scope: Scope) -> CopiedScope {
        let Some(i) = self.index.inodes.get(&scope) else {
            return CopiedScope { inode: scope.inode, ..CopiedScope::default() };
        };
        CopiedScope {
            inode: scope.inode,
            floor: i.floor,
            view: i.view,
            content: i.content,
            seals: i.seals().to_vec(),
            marks: i.marks().to_vec(),
        }
    }

    /// Chunks of a scope that hold what only this group's members have.
    pub fn unflushed_chunks(&self, scope: Scope) -> Vec<ChunkIndex> {
        let holds = |key: &crate::index::ChunkKey| {
            let c = &self.index.chunks[key];
            !c.pins.is_empty() || c.extents.0.iter().any(|e| e.origin.is_dirty())
        };
        self.index.chunk_keys(scope).into_iter().filter(holds).map(|k| k.1).collect()
    }

    /// Plans the copy of a chunk.
    pub fn plan_copy(&mut self, inode: InodeId, chunk: ChunkIndex) -> ChunkCopy {
        let mut number: BTreeMap<u32, u16> = BTreeMap::new();
        let mut blocks: Vec<(u64, u32)> = Vec::new();
        let mut lists = Vec::new();
        if let Some(c) = self.index.chunks.get(&(inode, chunk)) {
            let mut copied = |pin: Option<Generation>, extents: &[Extent]| {
                let mut out: Vec<CopiedExtent> = Vec::new();
                for e in extents {
                    let Origin::Dirty(generation) = e.origin else { continue };
                    for (k, crc) in e.crcs.iter().enumerate() {
                        let at = e.location + k as u32;
                        let staged = *number.entry(at).or_insert_with(|| {
                            blocks.push((u64::from(at) * BLOCK as u64, *crc));
                            (blocks.len() - 1) as u16
                        });
                        let last = k + 1 == e.crcs.len();
                        let tail = if last { e.tail } else { BLOCK as u16 };
                        let first = e.first + k as u16;
                        match out.last_mut().filter(|p| {
                            p.generation == generation
                                && p.first + p.blocks == first
                                && p.staged + p.blocks == staged
                                && usize::from(p.tail) == BLOCK
                        }) {
                            Some(p) => {
                                p.blocks += 1;
                                p.tail = tail;
                            }
                            None => {
                                out.push(CopiedExtent {
                                    first,
                                    blocks: 1,
                                    tail,
                                    generation,
                                    staged,
                                });
                            }
                        }
                    }
                }
                lists.push(CopiedList { inode, chunk, pin, extents: out, last: false });
            };
            // Pins before what readers see: a seal is told only after all of its pins.
            for p in &c.pins {
                copied(Some(p.generation), &p.extents.0);
            }
            copied(None, &c.extents.0);
        }
        // Also of a chunk that was flushed a moment ago: the member may hold something else.
        match lists.last_mut() {
            Some(list) => list.last = true,
            None => {
                let extents = Vec::new();
                lists.push(CopiedList { inode, chunk, pin: None, extents, last: true });
            }
        }
        ChunkCopy { blocks, lists, guard: self.guard() }
    }

    /// A page of a group's windows, from past `after` on; fewer than [`WINDOW_PAGE`] end it.
    pub fn window_page(&self, pg: PgId, after: Option<(SessionId, Sequence)>) -> Vec<WindowEntry> {
        let from = after.map_or(SessionId(0), |a| a.0);
        let entries = self.index.sessions.range(from..).flat_map(|(id, w)| {
            w.applied.iter().filter(|a| a.pg == pg).map(|a| a.entry(*id, w.below))
        });
        let past = |e: &WindowEntry| after.is_none_or(|a| (e.session, e.sequence) > a);
        entries.filter(past).take(WINDOW_PAGE).collect()
    }

    // --- the taking side --------------------------------------------------------------------------

    /// Takes blocks for a copy. Give them to [`Store::copy_list`], or back to [`Store::unstage`].
    pub fn stage(&mut self, blocks: u32) -> Result<Staged, WriteError> {
        if blocks == 0 || blocks > CHUNK_BLOCKS {
            return Err(WriteError::Malformed("blocks to stage"));
        }
        self.data_room(RECORD_PAGES)?;
        let index_bytes = u64::from(blocks) * 24;
        self.index_room(index_bytes, u64::from(blocks), blocks)?;
        self.block_room(blocks)?;
        let runs = self.alloc.alloc(blocks).ok_or_else(|| self.no_space(blocks))?;
        self.reserved_index += index_bytes;
        Ok(Staged { writes: planned(&runs), runs, index_bytes })
    }

    /// Gives staged blocks back that no list was appended over; none of their device I/O may be in
    /// flight. `used`: numbers of those that one was.
    pub fn unstage(&mut self, staged: Vec<Staged>, used: &BTreeSet<u16>) {
        let mut number = 0u16;
        for s in staged {
            self.reserved_index -= s.index_bytes;
            for start in s.runs.iter().flat_map(|r| r.start..r.end()) {
                if !used.contains(&number) {
                    self.alloc.release(Run { start, blocks: 1 });
                }
                number += 1;
            }
        }
    }

    /// Replaces a list of a chunk by one over staged blocks (`crcs`: one per block of them). The blocks
    /// still count as staged: the caller calls [`Store::staged_done`] after the last list.
    ///
    /// With the last list (`pins_left`: the pins that the chunk has) `entries` replace what the windows know of
    /// the chunk, in the same record.
    pub fn copy_list(
        &mut self,
        list: &CopiedList,
        staged: &[Staged],
        crcs: &[u32],
        pins_left: Option<Vec<Generation>>,
        entries: Vec<WindowEntry>,
    ) -> Result<Ticket, ControlError> {
        let at: Vec<u32> =
            staged.iter().flat_map(|s| s.runs.iter()).flat_map(|r| r.start..r.end()).collect();
        let mut extents: Vec<Extent> = Vec::new();
        let mut next = 0u32;
        for e in &list.extents {
            let (first, n) = (u32::from(e.first), usize::from(e.blocks));
            let from = usize::from(e.staged);
            let sound = n > 0
                && first >= next
                && first + n as u32 <= CHUNK_BLOCKS
                && from + n <= at.len().min(crcs.len())
                && (1..=BLOCK as u16).contains(&e.tail);
            if !sound {
                return Err(ControlError::Malformed("a copied list makes no sense"));
            }
            next = first + n as u32;
            for k in 0..n {
                let (location, crc) = (at[from + k], crcs[from + k]);
                let tail = if k + 1 == n { e.tail } else { BLOCK as u16 };
                let origin = Origin::Dirty(e.generation);
                let block = (first + k as u32) as u16;
                let crcs = [crc].into();
                extents.push(Extent { first: block, tail, location, origin, crcs });
            }
        }
        let mut merged = crate::extent::ExtentList(extents);
        merged.coalesce();
        let record = Record::CopyList(CopyList {
            inode: list.inode,
            chunk: list.chunk,
            pin: list.pin,
            extents: merged.0,
            windows: pins_left.is_some().then_some(entries),
            pins_left,
        });
        let room = entries_of(&record) <= ENTRIES_MAX;
        let Some(pages) = self.journal.pages_of(&record).filter(|_| room) else {
            return Err(ControlError::Malformed(
                "more writes of a chunk than a record has room for",
            ));
        };
        if !self.journal.has_room(crate::journal::Share::Data, self.reserved_pages + pages) {
            return Err(ControlError::Wait(WaitFor::Journal));
        }
        if self.failed {
            return Err(ControlError::Failed);
        }
        if self.journal.backlogged() {
            return Err(ControlError::Wait(WaitFor::Backlog));
        }
        // The staged blocks' data has to be durable before the record is.
        Ok(self.journal.append(record, Vec::new(), true, !list.extents.is_empty()))
    }

    /// What only a group's members hold of a chunk goes: the copy did not name it.
    pub fn copy_nothing(
        &mut self,
        inode: InodeId,
        chunk: ChunkIndex,
        entries: Vec<WindowEntry>,
    ) -> Result<Ticket, ControlError> {
        let list = CopiedList { inode, chunk, pin: None, extents: Vec::new(), last: true };
        self.copy_list(&list, &[], &[], Some(Vec::new()), entries)
    }

    /// Whether a mutation took effect.
    pub fn is_durable(&self, ticket: Ticket) -> bool {
        ticket <= self.durable
    }

    /// Every list over these blocks was appended: from here on the index says what is free.
    pub fn staged_done(&mut self, staged: Vec<Staged>) {
        self.reserved_index -= staged.iter().map(|s| s.index_bytes).sum::<u64>();
    }

    /// Installs what outlives the chunks of an inode in a group.
    pub fn copy_scope(&mut self, pg: PgId, state: &CopiedScope) -> Result<Ticket, ControlError> {
        if state.seals.len() > SEALS_MAX || state.marks.len() > 16 {
            return Err(ControlError::Malformed("more seals or marks than a scope has"));
        }
        let (floor, view) = (state.floor, state.view);
        self.control(Record::CopyScope { pg, state: state.clone() }, true, |h| {
            h.floor = floor;
            h.view = view;
        })
    }
}

fn entries_of(record: &Record) -> usize {
    match record {
        Record::CopyList(c) => c.windows.as_ref().map_or(0, Vec::len),
        _ => 0,
    }
}
