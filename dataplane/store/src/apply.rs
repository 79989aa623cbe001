//! What each record does to the index. The only code that changes it, at run time (once a batch is
//! durable) and at recovery alike, so that both end in the same state.

use crate::extent::{Extent, ExtentList, Origin, Run};
use crate::index::{Chunk, Index, Inode, Pin};
use crate::record::{CopyList, FillRecord, Move, Record, WriteRecord};
use crate::types::{BLOCK, SEALS_MAX, Scope};
use crate::window::Applied;
use ebb_dataplane_protocol::control::FlushDone;
use ebb_dataplane_protocol::replica::CopiedScope;
use ebb_dataplane_protocol::{
    ChunkIndex, ContentId, Cut, Generation, InodeId, MapVersion, PgEpoch, PgId, ViewVersion,
};

impl Index {
    /// Applies one record of journal batch `sequence`.
    pub(crate) fn apply(&mut self, record: &Record, sequence: u64) {
        match record {
            Record::Write(w) => self.apply_write(w, sequence),
            Record::Fill(f) => self.apply_fill(f),
            Record::Seal { scope, generation } => self.apply_seal(*scope, *generation),
            Record::FlushDone { pg, done } => self.apply_flush_done(*pg, done),
            Record::FlushAborted { scope, generation } => self.unpin(*scope, *generation),
            Record::View { scope, version, content, valid_bytes, cuts } => {
                self.apply_view(*scope, *version, *content, *valid_bytes, cuts);
            }
            Record::Floor { scope, floor } => self.raise_floor(*scope, *floor),
            Record::DropInode { scope } => self.apply_drop(*scope),
            Record::EvictChunk { inode, chunk } => self.drop_clean((*inode, *chunk)),
            Record::EvictInode { inode } => {
                self.chunk_keys_of_inode(*inode).into_iter().for_each(|k| self.drop_clean(k));
            }
            Record::EvictAll => self.drop_clean_where(|_| true),
            Record::Freeze { pg, epoch } => self.set_frozen(*pg, Some(*epoch)),
            Record::Thaw { pg, epoch } => {
                if self.frozen(*pg) == Some(*epoch) {
                    self.set_frozen(*pg, None);
                }
            }
            Record::Release { pg, epoch } => {
                let pg = *pg;
                let count = self.pgs.len() as u16;
                self.drop_clean_where(|k| PgId::of_chunk(k.0, k.1, count) == pg);
                self.drop_windows(pg, *epoch);
                self.set_frozen(pg, None);
            }
            Record::Discard { pg, epoch } => {
                self.drop_group(*pg);
                self.drop_windows(*pg, *epoch);
                self.set_frozen(*pg, None);
            }
            Record::Relocate { inode, chunk, moves } => self.apply_relocate(*inode, *chunk, moves),
            Record::SessionTrim { session, below } => {
                if self.sessions.contains_key(session) {
                    self.session_mut(*session, |w| {
                        w.trim(*below);
                        w.used = sequence;
                    });
                }
            }
            Record::SessionDrop { session } => self.remove_session(*session),
            Record::Node { node } => self.node = *node,
            Record::ForgetBare { horizon } => self.forget_bare(*horizon),
            Record::Windows { pg, epoch, entries } => {
                self.take_windows(*pg, *epoch, entries, sequence);
            }
            Record::CopyList(c) => self.apply_copy_list(c, sequence),
            Record::CopyScope { pg, state } => self.apply_copy_scope(*pg, state),
        }
    }

    fn apply_write(&mut self, w: &WriteRecord, sequence: u64) {
        let Some(range) = crate::types::block_range(w.offset, w.len) else {
            unreachable!("checked when the record was made or decoded")
        };
        let key = (w.inode, w.chunk);
        if w.inline {
            for run in &w.runs {
                for b in run.start..run.end() {
                    self.inline.insert(b, key);
                }
            }
        }
        let origin = Origin::Dirty(w.generation);
        let extents = Self::extents_of(range.start, &w.runs, &w.crcs, origin, BLOCK as u16);
        self.mutate(key, |chunk, dropped| {
            chunk.extents.carve(range, dropped);
            extents.into_iter().for_each(|e| chunk.extents.insert(e));
            chunk.extents.coalesce();
        });
        let end = w.chunk.start() + u64::from(w.offset) + u64::from(w.len);
        self.with_extra(self.scope_of(key), |x| {
            match x.marks.binary_search_by_key(&w.generation, |m| m.0) {
                Ok(i) => x.marks[i].1 = x.marks[i].1.max(end),
                Err(i) => x.marks.insert(i, (w.generation, end)),
            }
            // Bounded: the oldest join; a mark under a higher generation is only ever too careful.
            while x.marks.len() > 16 {
                let (_, low) = x.marks.remove(0);
                x.marks[0].1 = x.marks[0].1.max(low);
            }
        });
        let applied = Applied {
            sequence: w.sequence.0,
            generation: w.generation,
            pg: self.pg_of(key),
            inode: w.inode,
            chunk: w.chunk,
        };
        self.session_mut(w.session, |window| {
            window.trim(w.answered_below);
            window.add(applied);
            window.used = sequence;
        });
    }

    /// Fills gaps and older clean data; never touches dirty data or newer content.
    fn apply_fill(&mut self, f: &FillRecord) {
        let scope = self.scope_of((f.inode, f.chunk));
        let stale = self.inodes.get(&scope).is_some_and(|i| i.content > f.content);
        let origin = Origin::Clean(f.content);
        let extents = Self::extents_of(f.first_block, &f.runs, &f.crcs, origin, f.tail);
        self.mutate((f.inode, f.chunk), |chunk, dropped| {
            // What the fill holds and does not place is dropped like anything else.
            dropped.extend(f.runs.iter().copied());
            if stale {
                return;
            }
            let mut fill = ExtentList(extents);
            let keep: Vec<_> = chunk
                .extents
                .0
                .iter()
                .filter(|e| match e.origin {
                    Origin::Dirty(_) => true,
                    Origin::Clean(c) => c >= f.content,
                })
                .map(|e| e.first()..e.end())
                .collect();
            let mut shadowed = Vec::new();
            keep.into_iter().for_each(|r| fill.carve(r, &mut shadowed));
            for e in fill.0 {
                chunk.extents.carve(e.first()..e.end(), dropped);
                chunk.extents.insert(e);
            }
            chunk.extents.coalesce();
            crate::extent::normalise(dropped);
            *dropped = crate::extent::subtract(dropped, &chunk.runs());
        });
    }

    pub(crate) fn raise_floor(&mut self, scope: Scope, floor: Generation) {
        let i = self.inode_mut(scope);
        i.floor = i.floor.max(floor);
    }

    fn apply_seal(&mut self, scope: Scope, g: Generation) {
        self.raise_floor(scope, g.next());
        // More seals than are taken are in a forged journal only; a checkpoint could not hold them.
        let done = |i: &Inode| i.seals().len() > SEALS_MAX || i.seals().iter().any(|s| s.0 == g);
        if self.inodes.get(&scope).is_some_and(done) {
            return;
        }
        for key in self.chunk_keys(scope) {
            let pinned: Vec<Extent> = self.chunks[&key]
                .extents
                .0
                .iter()
                .filter(|e| e.origin.dirty_up_to(g))
                .cloned()
                .collect();
            if !pinned.is_empty() {
                self.mutate(key, |chunk, dropped| {
                    // A copy that did not end may have left pins whose seal never came.
                    unpin_where(chunk, |p| p == g, dropped);
                    chunk.pins.push(Pin { generation: g, extents: ExtentList(pinned) });
                });
            }
        }
        self.with_extra(scope, |x| {
            let high = x.marks.iter().filter(|m| m.0 <= g).map(|m| m.1).max().unwrap_or(0);
            let at = x.seals.partition_point(|s| s.0 < g);
            x.seals.insert(at, (g, high));
        });
    }

    /// Pins and seals of generations up to `g` go.
    fn unpin(&mut self, scope: Scope, g: Generation) {
        if self.inodes.get(&scope).is_none_or(|i| !i.seals().iter().any(|s| s.0 <= g)) {
            return;
        }
        for key in self.chunk_keys(scope) {
            if self.chunks[&key].pins.iter().any(|p| p.generation <= g) {
                self.mutate(key, |chunk, dropped| unpin_chunk(chunk, g, dropped));
            }
        }
        self.with_extra(scope, |x| x.seals.retain(|s| s.0 > g));
    }

    fn apply_flush_done(&mut self, pg: PgId, d: &FlushDone) {
        let scope = Scope { inode: d.inode, pg };
        let Some(inode) = self.inodes.get(&scope) else { return };
        // Only what was sealed here is in the object: a tag at or above the floor never was.
        let flushed = |e: Generation, floor: Generation| e <= d.generation && e < floor;
        let floor = inode.floor;
        for key in self.chunk_keys(scope) {
            let start = key.1.start();
            self.mutate(key, |chunk, dropped| {
                unpin_chunk(chunk, d.generation, dropped);
                // Clean bytes of the old object count up to old_valid_bytes, which may be inside a block.
                let old = |e: &Extent| e.origin == Origin::Clean(d.old_content);
                if d.old_content != d.content {
                    chunk.extents.cut(d.old_valid_bytes.saturating_sub(start), dropped, old);
                }
                chunk.extents.retain(dropped, |e| match e.origin {
                    Origin::Dirty(g) => {
                        if flushed(g, floor) {
                            e.origin = Origin::Clean(d.content);
                        }
                        true
                    }
                    Origin::Clean(c) if c == d.old_content => {
                        e.origin = Origin::Clean(d.content);
                        true
                    }
                    Origin::Clean(c) => c >= d.content,
                });
                let new = |e: &Extent| e.origin == Origin::Clean(d.content);
                chunk.extents.cut(d.valid_bytes.saturating_sub(start), dropped, new);
                chunk.extents.coalesce();
            });
        }
        let inode = self.inode_mut(scope);
        inode.content = inode.content.max(d.content);
        self.with_extra(scope, |x| {
            x.seals.retain(|s| s.0 > d.generation);
            x.marks.retain(|m| !flushed(m.0, floor));
        });
    }

    fn apply_view(
        &mut self,
        scope: Scope,
        version: ViewVersion,
        content: ContentId,
        valid_bytes: u64,
        cuts: &[Cut],
    ) {
        let inode = self.inode_mut(scope);
        if version <= inode.view {
            return;
        }
        inode.view = version;
        inode.content = inode.content.max(content);
        for cut in cuts {
            inode.floor = inode.floor.max(cut.generation.next());
        }
        self.with_extra(scope, |x| {
            for m in &mut x.marks {
                for cut in cuts.iter().filter(|c| m.0 <= c.generation) {
                    m.1 = m.1.min(cut.at);
                }
            }
        });
        for key in self.chunk_keys(scope) {
            let start = key.1.start();
            self.mutate(key, |chunk, dropped| {
                for cut in cuts {
                    chunk.extents.cut(cut.at.saturating_sub(start), dropped, |e| {
                        e.origin.dirty_up_to(cut.generation)
                    });
                }
                chunk.extents.retain(dropped, |e| match e.origin {
                    Origin::Dirty(_) => true,
                    Origin::Clean(c) => c >= content,
                });
                chunk.extents.cut(valid_bytes.saturating_sub(start), dropped, |e| {
                    e.origin == Origin::Clean(content)
                });
            });
        }
    }

    /// The chunk's dirty data, or one generation's pins, become what another core holds. Clean data goes:
    /// what lies over it here may not be what lies over it there.
    fn apply_copy_list(&mut self, c: &CopyList, sequence: u64) {
        if let Some(entries) = &c.windows {
            self.replace_windows_of((c.inode, c.chunk), entries, sequence);
        }
        self.mutate((c.inode, c.chunk), |chunk, dropped| {
            match c.pin {
                None => {
                    chunk.extents.retain(dropped, |_| false);
                    chunk.extents.0.clone_from(&c.extents);
                }
                Some(g) => {
                    unpin_where(chunk, |p| p == g, dropped);
                    if !c.extents.is_empty() {
                        let extents = ExtentList(c.extents.clone());
                        chunk.pins.push(Pin { generation: g, extents });
                        chunk.pins.sort_unstable_by_key(|p| p.generation);
                    }
                }
            }
            if let Some(left) = &c.pins_left {
                unpin_where(chunk, |p| !left.contains(&p), dropped);
            }
            crate::extent::normalise(dropped);
            *dropped = crate::extent::subtract(dropped, &chunk.runs());
        });
    }

    fn apply_copy_scope(&mut self, pg: PgId, state: &CopiedScope) {
        let scope = Scope { inode: state.inode, pg };
        let inode = self.inode_mut(scope);
        (inode.floor, inode.view, inode.content) = (state.floor, state.view, state.content);
        self.with_extra(scope, |x| {
            x.seals.clone_from(&state.seals);
            x.marks.clone_from(&state.marks);
        });
        // Clean data from an earlier time in the group: a flush's result that is told again would carry it over to
        // a content of which other members held the dirty part.
        for key in self.chunk_keys(scope) {
            self.mutate(key, |chunk, dropped| {
                chunk.extents.retain(dropped, |e| match e.origin {
                    Origin::Dirty(_) => true,
                    Origin::Clean(c) => c == state.content,
                });
            });
        }
    }

    fn apply_drop(&mut self, scope: Scope) {
        for key in self.chunk_keys(scope) {
            self.mutate(key, |chunk, dropped| {
                chunk.extents.retain(dropped, |_| false);
                unpin_chunk(chunk, Generation(u64::MAX), dropped);
            });
        }
        self.remove_inode(scope);
    }

    fn drop_clean(&mut self, key: (InodeId, ChunkIndex)) {
        if self.chunks.get(&key).is_some_and(|c| c.extents.0.iter().any(|e| !e.origin.is_dirty())) {
            self.mutate(key, |chunk, dropped| {
                chunk.extents.retain(dropped, |e| e.origin.is_dirty());
            });
            self.tidy_inode(self.scope_of(key));
        }
    }
    fn drop_clean_where(&mut self, which: impl Fn(&(InodeId, ChunkIndex)) -> bool) {
        let keys: Vec<_> = self.chunks.keys().filter(|k| which(k)).copied().collect();
        keys.into_iter().for_each(|k| self.drop_clean(k));
    }

    /// Everything of a group, dirty or pinned or not.
    fn drop_group(&mut self, pg: PgId) {
        let keys: Vec<_> = self.chunks.keys().filter(|k| self.pg_of(**k) == pg).copied().collect();
        for key in keys {
            self.mutate(key, |chunk, dropped| {
                chunk.extents.retain(dropped, |_| false);
                unpin_chunk(chunk, Generation(u64::MAX), dropped);
            });
        }
        // Seals without pins would count against later ones, and ends without their bytes regrow a file.
        let known = self.inodes.iter().filter(|(scope, _)| scope.pg == pg);
        for scope in known.map(|(scope, _)| *scope).collect::<Vec<_>>() {
            self.with_extra(scope, |extra| {
                extra.seals.clear();
                extra.marks.clear();
            });
            self.tidy_inode(scope);
        }
    }

    pub(crate) fn frozen(&self, pg: PgId) -> Option<PgEpoch> {
        self.pgs.get(usize::from(pg.0)).and_then(|p| p.frozen)
    }
    fn set_frozen(&mut self, pg: PgId, epoch: Option<PgEpoch>) {
        if let Some(pg) = self.pgs.get_mut(usize::from(pg.0)) {
            pg.frozen = epoch;
        }
    }

    /// Moves blocks that are still where they were; a target nobody needs any more is released.
    fn apply_relocate(&mut self, inode: InodeId, chunk: ChunkIndex, moves: &[Move]) {
        let key = (inode, chunk);
        let mut moves = moves.to_vec();
        moves.sort_unstable_by_key(|m| m.from);
        let targets = moves.iter().map(|m| Run { start: m.to, blocks: m.blocks });
        if !self.chunks.contains_key(&key) {
            targets.for_each(|r| self.released.push(r));
            return;
        }
        self.mutate(key, |chunk, dropped| {
            dropped.extend(targets);
            relocate_list(&mut chunk.extents, &moves, dropped);
            for pin in &mut chunk.pins {
                relocate_list(&mut pin.extents, &moves, dropped);
            }
            crate::extent::normalise(dropped);
            *dropped = crate::extent::subtract(dropped, &chunk.runs());
        });
    }

    fn forget_bare(&mut self, horizon: MapVersion) {
        let bare: Vec<_> = self
            .inodes
            .iter()
            .filter(|(_, i)| i.chunks == 0 && i.extra.is_none())
            .map(|(k, _)| *k)
            .collect();
        bare.into_iter().for_each(|k| self.remove_inode(k));
        self.horizon = self.horizon.max(horizon);
    }
}

fn unpin_where(chunk: &mut Chunk, goes: impl Fn(Generation) -> bool, dropped: &mut Vec<Run>) {
    chunk.pins.retain(|p| {
        let gone = goes(p.generation);
        if gone {
            dropped.extend(p.extents.0.iter().map(Extent::run));
        }
        !gone
    });
}

fn unpin_chunk(chunk: &mut Chunk, g: Generation, dropped: &mut Vec<Run>) {
    chunk.pins.retain(|p| {
        if p.generation <= g {
            dropped.extend(p.extents.0.iter().map(Extent::run));
        }
        p.generation > g
    });
}

/// `moves` are sorted by where they come from.
fn relocate_list(list: &mut ExtentList, moves: &[Move], dropped: &mut Vec<Run>) {
    // Make the moves' ends boundaries of every extent that crosses them.
    let mut cuts = Vec::new();
    for e in &list.0 {
        let (start, end) = (e.location, e.run().end());
        let first = moves.partition_point(|m| m.from + m.blocks <= start);
        for m in moves[first..].iter().take_while(|m| m.from < end) {
            for at in [m.from, m.from + m.blocks] {
                if at > start && at < end {
                    cuts.push(e.first() + (at - start));
                }
            }
        }
    }
    cuts.into_iter().for_each(|c| list.split_at(c));
    for e in &mut list.0 {
        let i = moves.partition_point(|m| m.from + m.blocks <= e.location);
        let here = |m: &&Move| (m.from..m.from + m.blocks).contains(&e.location);
        if let Some(m) = moves.get(i).filter(here) {
            dropped.push(e.run());
            e.location = m.to + (e.location - m.from);
        }
    }
    list.coalesce();
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_dataplane_protocol::NodeId;

    #[test]
    fn a_forged_journal_with_more_seals_than_are_taken_keeps_the_first() {
        let mut index = Index::new(256..512, NodeId(0), 8);
        let scope = Scope { inode: InodeId(1), pg: PgId(2) };
        for g in 1..300 {
            index.apply(&Record::Seal { scope, generation: Generation(g) }, g);
        }
        assert_eq!(index.inodes[&scope].seals().len(), SEALS_MAX + 1);
        assert_eq!(index.inodes[&scope].floor, Generation(300));
    }
}
