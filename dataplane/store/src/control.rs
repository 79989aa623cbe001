//! Control: seals, flush results, views, fences, drops, placement groups (PROTOCOL §3–4, §6).
//!
//! Each call appends at most one record. Repeats are recognised, so that a leader may send everything
//! twice: `Ok(None)` means durable already.

use crate::error::{ControlError, WaitFor};
use crate::extent::{Extent, Origin};
use crate::index::{Chunk, ChunkKey, Inode};
use crate::record::Record;
use crate::store::Store;
use crate::types::*;
use ebb_dataplane_protocol::control::{BATCH_MAX, FlushDone, PgHolding};
use ebb_dataplane_protocol::grant::CUTS_MAX;
use ebb_dataplane_protocol::*;

impl Store {
    /// Persists the node id the metadata plane gave.
    pub fn set_node(&mut self, node: NodeId) -> Result<Option<Ticket>, ControlError> {
        if self.index.node == node {
            return Ok(None);
        }
        self.control(Record::Node { node }, true, |_| {}).map(Some)
    }

    /// Least tag that may write, of everything appended (durable or not): past every seal and cut, and
    /// not below any tag that was taken (R7).
    pub fn floor(&self, scope: Scope) -> Generation {
        let durable = self.index.inodes.get(&scope).map_or(Generation(0), Inode::tag);
        let appended = self.tags.get(&scope).map_or(Generation(0), |t| t.highest);
        self.fenced_below(scope).max(durable).max(appended)
    }
    /// The part of the floor that seals, cuts and fences raised: what is below it and dirty was sealed.
    fn fenced_below(&self, scope: Scope) -> Generation {
        let durable = self.index.inodes.get(&scope).map_or(Generation(0), |i| i.floor);
        self.heads.get(&scope).map_or(durable, |h| h.floor)
    }
    /// Groups in which the store knows something of an inode, ascending: durable, appended, or of a plan.
    pub fn scopes(&self, inode: InodeId) -> Vec<Scope> {
        let all = Scope { inode, pg: PgId(0) }..=Scope { inode, pg: PgId(u16::MAX) };
        let heads = self.heads.range(all).map(|(scope, _)| *scope);
        let plans = self.writes.values().map(|w| w.scope);
        let fills = self.fills.values().map(|f| f.scope);
        let in_flight = plans.chain(fills).filter(|scope| scope.inode == inode);
        let mut known: Vec<Scope> =
            self.index.scopes(inode).chain(heads).chain(in_flight).collect();
        known.sort_unstable();
        known.dedup();
        known
    }
    /// The scope of a chunk.
    pub fn scope_of(&self, inode: InodeId, chunk: ChunkIndex) -> Scope {
        self.index.scope_of((inode, chunk))
    }
    /// The newest content that a durable view or flush named, in any group: a view of an older one no longer says which
    /// bytes are holes, since what was dirty under it may be clean under this one.
    pub fn content(&self, inode: InodeId) -> ContentId {
        self.index
            .scopes(inode)
            .filter_map(|scope| self.index.inodes.get(&scope))
            .map(|i| i.content)
            .max()
            .unwrap_or_default()
    }
    /// Version of the newest view appended (durable or not), and whether it is durable.
    pub fn view_version(&self, scope: Scope) -> (ViewVersion, bool) {
        let durable = self.index.inodes.get(&scope).map_or(ViewVersion(0), |i| i.view);
        match self.heads.get(&scope) {
            Some(h) => (h.view, h.view <= durable),
            None => (durable, true),
        }
    }

    /// Seals generation `g`: floor g+1, pins of Dirty(<= g). When durable, [`Store::sealed`] answers.
    ///
    /// The newest view's cuts must have been appended before (`apply_view`): a cut that comes after the seal
    /// shortens the current data but not the pins, and `flush_done` would then call the two the same.
    pub fn seal(&mut self, scope: Scope, g: Generation) -> Result<Option<Ticket>, ControlError> {
        self.check_pg(scope.pg)?;
        let seals = self.index.inodes.get(&scope).map_or(&[][..], |i| i.seals());
        let known = seals.iter().any(|s| s.0 == g);
        let pending = self.heads.get(&scope).map(|h| (h.pending, h.last));
        match (known, pending) {
            (true, None) => return Ok(None),
            (false, _) if seals.len() + pending.map_or(0, |p| p.0 as usize) >= SEALS_MAX => {
                return if pending.is_some() {
                    Err(ControlError::Wait(WaitFor::Control))
                } else {
                    Err(ControlError::TooManySeals { inode: scope.inode })
                };
            }
            _ => {}
        }
        self.control(Record::Seal { scope, generation: g }, true, |h| {
            h.floor = h.floor.max(g.next());
        })
        .map(Some)
    }

    /// What the (durable) seal of `g` found; `None` if `g` is not sealed here.
    pub fn sealed(&self, scope: Scope, g: Generation) -> Option<Sealed> {
        let known = self.index.inodes.get(&scope)?;
        let high_water = known.seals().iter().find(|s| s.0 == g)?.1;
        let mut extents: Vec<ByteRange> = Vec::new();
        for key in self.index.chunk_keys(scope) {
            for e in self.index.chunks[&key].pin(g).map_or(&[][..], |l| &l.0) {
                let r = byte_range(key.1, e);
                match extents.last_mut() {
                    Some(last) if last.end == r.start => last.end = r.end,
                    _ => extents.push(r),
                }
            }
        }
        Some(Sealed { extents, high_water })
    }

    /// The flush of `g` committed: Dirty(<= g) becomes clean under the new content, clean data of the
    /// old content too (below `old_valid_bytes`), other clean data goes, and so do the pins of <= g.
    pub fn flush_done(
        &mut self,
        pg: PgId,
        done: &FlushDone,
    ) -> Result<Option<Ticket>, ControlError> {
        let scope = Scope { inode: done.inode, pg };
        if !self.index.inodes.contains_key(&scope) && !self.heads.contains_key(&scope) {
            return Ok(None);
        }
        if self.fenced_below(scope) <= done.generation
            && self.has_dirty_up_to(scope, done.generation)
        {
            let (inode, generation) = (done.inode, done.generation);
            return Err(ControlError::NotSealed { inode, generation });
        }
        self.control(Record::FlushDone { pg, done: *done }, true, |_| {}).map(Some)
    }

    fn has_dirty_up_to(&self, scope: Scope, g: Generation) -> bool {
        let dirty = |key| self.index.chunks[key].extents.0.iter().any(|e| e.origin.dirty_up_to(g));
        self.index.chunk_keys(scope).iter().any(dirty)
            || self.writes.values().any(|w| w.scope == scope && w.op.generation <= g)
    }

    /// The flush of `g` was given up: pins of <= g go; the data stays dirty, the floor stays.
    pub fn flush_aborted(
        &mut self,
        scope: Scope,
        g: Generation,
    ) -> Result<Option<Ticket>, ControlError> {
        let sealed =
            self.index.inodes.get(&scope).is_some_and(|i| i.seals().iter().any(|s| s.0 <= g));
        if !sealed && !self.heads.contains_key(&scope) {
            return Ok(None);
        }
        self.control(Record::FlushAborted { scope, generation: g }, true, |_| {}).map(Some)
    }

    /// Installs a newer view: its cuts (each raises the floor past its generation), then clean data
    /// of older contents and past `valid_bytes` goes. `Ok(None)`: nothing to wait for (not newer and
    /// durable, or nothing is known of the inode here and there is nothing to cut).
    pub fn apply_view(&mut self, view: &ViewUpdate) -> Result<Option<Ticket>, ControlError> {
        if view.cuts.len() > CUTS_MAX {
            return Err(ControlError::Malformed("more cuts than a view has"));
        }
        let scope = view.scope;
        self.check_pg(scope.pg)?;
        let known = self.index.inodes.contains_key(&scope);
        if let Some(head) = self.heads.get(&scope) {
            if view.version <= head.view {
                return Ok(Some(head.last));
            }
        } else if view.version <= self.view_version(scope).0
            || (!known && view.cuts.is_empty() && !self.writes_of(scope))
        {
            return Ok(None);
        }
        let floor = view.cuts.iter().map(|c| c.generation.next()).max().unwrap_or_default();
        let record = Record::View {
            scope,
            version: view.version,
            content: view.base.content,
            valid_bytes: view.base.valid_bytes,
            cuts: view.cuts.clone(),
        };
        self.control(record, true, |h| {
            h.view = view.version;
            h.floor = h.floor.max(floor);
        })
        .map(Some)
    }

    fn writes_of(&self, scope: Scope) -> bool {
        self.writes.values().any(|w| w.scope == scope)
    }

    /// Raises the floor of a scope (fences).
    pub fn set_floor(
        &mut self,
        scope: Scope,
        floor: Generation,
    ) -> Result<Option<Ticket>, ControlError> {
        self.check_pg(scope.pg)?;
        if self.fenced_below(scope) >= floor {
            return Ok(self.heads.get(&scope).map(|h| h.last));
        }
        self.control(Record::Floor { scope, floor }, true, |h| h.floor = h.floor.max(floor))
            .map(Some)
    }

    /// The inode is gone: everything of the scope goes; its writes and fills in flight are refused at
    /// commit.
    pub fn drop_inode(&mut self, scope: Scope) -> Result<Option<Ticket>, ControlError> {
        let busy = self.writes_of(scope) || self.fills.values().any(|f| f.scope == scope);
        if !busy && !self.index.inodes.contains_key(&scope) && !self.heads.contains_key(&scope) {
            return Ok(None);
        }
        let ticket = self.control(Record::DropInode { scope }, true, |_| {})?;
        self.writes.values_mut().filter(|w| w.scope == scope).for_each(|w| w.dropped = true);
        self.fills.values_mut().filter(|f| f.scope == scope).for_each(|f| f.dropped = true);
        Ok(Some(ticket))
    }

    /// Forgets floors and views of inodes without data, to bound the table: afterwards grants with a
    /// `least_map_version` below `horizon` must be refused ([`Store::grant_horizon`]).
    pub fn forget_bare_inodes(
        &mut self,
        horizon: MapVersion,
    ) -> Result<Option<Ticket>, ControlError> {
        self.control(Record::ForgetBare { horizon }, true, |_| {}).map(Some)
    }
    /// Grants whose `least_map_version` is below this must be refused.
    pub fn grant_horizon(&self) -> MapVersion {
        self.index.horizon
    }

    // --- placement groups ---------------------------------------------------------------------------

    fn check_pg(&self, pg: PgId) -> Result<(), ControlError> {
        if usize::from(pg.0) < self.index.pgs.len() {
            Ok(())
        } else {
            Err(ControlError::Malformed("no such placement group"))
        }
    }

    /// Freezes a group: writes of it are refused from now on (also those begun).
    pub fn freeze(&mut self, pg: PgId, epoch: PgEpoch) -> Result<Option<Ticket>, ControlError> {
        self.check_pg(pg)?;
        if self.index.frozen(pg) == Some(epoch) && self.frozen(pg) == Some(epoch) {
            return Ok(None);
        }
        let ticket = self.control(Record::Freeze { pg, epoch }, true, |_| {})?;
        self.frozen[usize::from(pg.0)] = Some(epoch);
        self.pg_pending[usize::from(pg.0)] += 1;
        Ok(Some(ticket))
    }
    /// Lifts a freeze of this epoch; another epoch's freeze stays.
    pub fn thaw(&mut self, pg: PgId, epoch: PgEpoch) -> Result<Option<Ticket>, ControlError> {
        self.check_pg(pg)?;
        if self.frozen(pg) != Some(epoch) {
            return Ok(None);
        }
        let ticket = self.control(Record::Thaw { pg, epoch }, true, |_| {})?;
        self.frozen[usize::from(pg.0)] = None;
        self.pg_pending[usize::from(pg.0)] += 1;
        Ok(Some(ticket))
    }
    /// The group is others' as of `epoch`: refused while it has dirty data, pins or writes in flight;
    /// else its clean data and its freeze go. Until that is durable it counts as frozen.
    pub fn release_pg(&mut self, pg: PgId, epoch: PgEpoch) -> Result<Option<Ticket>, ControlError> {
        self.check_pg(pg)?;
        let state = &self.index.pgs[usize::from(pg.0)];
        let pins = state.pinned.len() as u64;
        let dirty_bytes = state.dirty_blocks * BLOCK as u64;
        if dirty_bytes > 0 || pins > 0 {
            return Err(ControlError::StillDirty { pg, dirty_bytes, pins });
        }
        self.give_group_away(pg, epoch, Record::Release { pg, epoch })
    }
    /// The group became others' as of `epoch` without this node's word (R24): what it holds of it, dirty or pinned too, is in
    /// S3 or was given up, and goes. Refused only while writes of it are in flight.
    pub fn discard_pg(&mut self, pg: PgId, epoch: PgEpoch) -> Result<Option<Ticket>, ControlError> {
        self.check_pg(pg)?;
        self.give_group_away(pg, epoch, Record::Discard { pg, epoch })
    }
    fn give_group_away(
        &mut self,
        pg: PgId,
        epoch: PgEpoch,
        record: Record,
    ) -> Result<Option<Ticket>, ControlError> {
        let pins = self.writes.values().filter(|w| w.scope.pg == pg).count() as u64;
        if pins > 0 {
            return Err(ControlError::StillDirty { pg, dirty_bytes: 0, pins });
        }
        let ticket = self.control(record, true, |_| {})?;
        self.frozen[usize::from(pg.0)] = Some(epoch);
        self.pg_pending[usize::from(pg.0)] += 1;
        self.fills.values_mut().filter(|f| f.scope.pg == pg).for_each(|f| f.dropped = true);
        Ok(Some(ticket))
    }
    /// Epoch of the freeze, if the group is frozen (durable or not).
    pub fn frozen(&self, pg: PgId) -> Option<PgEpoch> {
        self.frozen.get(usize::from(pg.0)).copied().flatten()
    }
    /// What the store holds of a group.
    pub fn pg_status(&self, pg: PgId) -> PgHolding {
        let Some(state) = self.index.pgs.get(usize::from(pg.0)) else {
            return PgHolding::default();
        };
        PgHolding {
            dirty_bytes: state.dirty_blocks * BLOCK as u64,
            pins: state.pinned.len() as u64,
            dirty_inodes: state.dirty.keys().take(BATCH_MAX).copied().collect(),
            frozen: self.frozen(pg).is_some(),
        }
    }

    // --- eviction -------------------------------------------------------------------------------------

    /// Appends evictions of clean chunks, those first that the cache needs least, about `bytes` of them. The space is free once the
    /// ticket is durable and readers are gone. `None`: nothing clean is left (or all of it is on its way).
    pub fn evict(&mut self, bytes: u64) -> Result<Option<(u64, Ticket)>, ControlError> {
        self.evict_each(bytes, |_, _| {})
    }

    /// As [`Store::evict`], and says where the clean blocks that go are. They stay as they are until the guard is
    /// released: whoever wants to keep them elsewhere reads them meanwhile.
    pub fn evict_held(&mut self, bytes: u64) -> Result<Option<Evicted>, ControlError> {
        let mut leaving = Vec::new();
        let gone = self.evict_each(bytes, |(inode, chunk), c| {
            leaving.extend(c.extents.0.iter().filter_map(|e| match e.origin {
                Origin::Clean(content) => Some(Leaving {
                    inode,
                    chunk,
                    content,
                    first: e.first(),
                    offset: e.run().offset(),
                    crcs: e.crcs.clone(),
                    tail_valid: u32::from(e.tail),
                }),
                Origin::Dirty(_) => None,
            }));
        })?;
        Ok(gone.map(|(bytes, ticket)| Evicted { bytes, ticket, leaving, guard: self.guard() }))
    }

    fn evict_each(
        &mut self,
        bytes: u64,
        mut going: impl FnMut(ChunkKey, &Chunk),
    ) -> Result<Option<(u64, Ticket)>, ControlError> {
        const CHUNKS_PER_CALL: usize = 256;
        let want = bytes.div_ceil(BLOCK as u64);
        let (mut got, mut last) = (0u64, None);
        for _ in 0..CHUNKS_PER_CALL {
            if got >= want {
                break;
            }
            let (clean, chunks) = (self.index.counters.clean_blocks, &mut self.index.chunks);
            let Some((key, blocks, place)) = self.index.cache.next(clean, chunks) else { break };
            let record = Record::EvictChunk { inode: key.0, chunk: key.1 };
            match self.control(record, true, |_| {}) {
                Ok(ticket) => {
                    if let Some(c) = self.index.chunks.get(&key) {
                        going(key, c);
                    }
                    self.evicting.insert(ticket, blocks.into());
                    last = Some(ticket);
                }
                Err(e) => {
                    if let Some(c) = self.index.chunks.get_mut(&key) {
                        self.index.cache.put_back(key, place, &mut c.residency, blocks);
                    }
                    match last {
                        None => return Err(e),
                        Some(_) => break,
                    }
                }
            }
            got += u64::from(blocks);
        }
        Ok(last.map(|t| (got * BLOCK as u64, t)))
    }

    /// Drops the clean data of one chunk.
    pub fn evict_chunk(
        &mut self,
        inode: InodeId,
        chunk: ChunkIndex,
    ) -> Result<Option<Ticket>, ControlError> {
        if !self.index.chunks.contains_key(&(inode, chunk)) {
            return Ok(None);
        }
        self.control(Record::EvictChunk { inode, chunk }, true, |_| {}).map(Some)
    }

    /// Drops clean data of inodes, or (empty) of all.
    pub fn evict_clean(&mut self, inodes: &[InodeId]) -> Result<Option<Ticket>, ControlError> {
        if inodes.is_empty() {
            return self.control(Record::EvictAll, true, |_| {}).map(Some);
        }
        let mut last = None;
        for inode in inodes
            .iter()
            .filter(|i| self.index.scopes(**i).next().is_some())
            .copied()
            .collect::<Vec<_>>()
        {
            last = Some(self.control(Record::EvictInode { inode }, true, |_| {})?);
        }
        Ok(last)
    }
}

fn byte_range(chunk: ChunkIndex, e: &Extent) -> ByteRange {
    let start = chunk.start() + u64::from(e.first()) * BLOCK as u64;
    let end = chunk.start() + u64::from(e.end() - 1) * BLOCK as u64 + u64::from(e.tail);
    ByteRange { start, end }
}
