//! Reads: where each block of a range is, of durable state only (I4, I10).

use crate::extent::{Extent, ExtentList, Origin};
use crate::index::ChunkKey;
use crate::store::Store;
use crate::types::*;
use ebb_dataplane_protocol::{ChunkIndex, Generation, InodeId};
use std::ops::Range;

/// Where a scrub stands; the default is the beginning.
#[derive(Clone, Copy, Debug, Default)]
pub struct ScrubAt {
    key: ChunkKey,
    /// Extent of the chunk, and blocks of it that are done.
    extent: usize,
    block: u32,
}

/// Blocks that lie behind each other on the device, and what they should be.
#[derive(Debug)]
pub struct ScrubPiece {
    /// The inode.
    pub inode: InodeId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Device offset, bytes.
    pub offset: u64,
    /// CRC-32C of each block.
    pub crcs: Vec<u32>,
    /// Not in S3.
    pub dirty: bool,
    /// What comes after it.
    pub next: ScrubAt,
    /// Keeps the blocks from being written anew.
    pub guard: ReadGuard,
}

impl Store {
    /// Plans a read of blocks of a chunk; sees durable mutations only. Blocks past the chunk's end are
    /// left out.
    pub fn plan_read(
        &mut self,
        inode: InodeId,
        chunk: ChunkIndex,
        blocks: Range<u32>,
        base: BaseView,
    ) -> ReadPlan {
        let pieces = match self.index.chunks.get_mut(&(inode, chunk)) {
            Some(c) => {
                let pieces = lay(&c.extents, None, chunk, blocks, base);
                let found = |p: &&ReadPiece| matches!(p.source, PieceSource::Device { .. });
                if let (Some(a), Some(b)) = (pieces.iter().find(found), pieces.iter().rfind(found))
                {
                    c.residency.read(a.blocks.start, b.blocks.end);
                }
                pieces
            }
            None => lay(&ExtentList::default(), None, chunk, blocks, base),
        };
        self.guarded(pieces)
    }

    /// Plans a read of a sealed generation: its pins over the clean base. `None`: generation `g` is
    /// not sealed here (answer `NotSealed`).
    pub fn plan_read_pinned(
        &mut self,
        inode: InodeId,
        generation: Generation,
        chunk: ChunkIndex,
        blocks: Range<u32>,
        base: BaseView,
    ) -> Option<ReadPlan> {
        let known = self.index.inodes.get(&self.index.scope_of((inode, chunk)))?;
        known.seals().iter().find(|s| s.0 == generation)?;
        let empty = ExtentList::default();
        let pieces = match self.index.chunks.get(&(inode, chunk)) {
            // Newer dirty data lies over the base in the current list: those blocks are misses here.
            Some(c) => {
                let pin = c.pin(generation).unwrap_or(&empty);
                lay(pin, Some(&c.extents), chunk, blocks, base)
            }
            None => lay(&empty, None, chunk, blocks, base),
        };
        Some(self.guarded(pieces))
    }

    /// The next blocks to compare with their checksums, at most `blocks` of them, in the order of the
    /// index. `None`: that was all. Release the guard when they are read.
    pub fn plan_scrub(&mut self, at: ScrubAt, blocks: u32) -> Option<ScrubPiece> {
        let (inode, chunk, extent, piece) =
            self.index.chunks.range(at.key..).find_map(|(key, c)| {
                let (skip, from) = if *key == at.key { (at.extent, at.block) } else { (0, 0) };
                let found = c.all_extents().enumerate().skip(skip).find_map(|(n, e)| {
                    let first = if n == skip { from } else { 0 };
                    let end = e.blocks().min(first.saturating_add(blocks));
                    (first < end).then(|| {
                        let crcs = e.crcs[first as usize..end as usize].to_vec();
                        let offset = u64::from(e.location + first) * BLOCK as u64;
                        (n, (offset, crcs, e.origin.is_dirty(), end))
                    })
                })?;
                Some((key.0, key.1, found.0, found.1))
            })?;
        let (offset, crcs, dirty, block) = piece;
        let next = ScrubAt { key: (inode, chunk), extent, block };
        Some(ScrubPiece { inode, chunk, offset, crcs, dirty, next, guard: self.guard() })
    }

    pub(crate) fn guarded(&mut self, pieces: Vec<ReadPiece>) -> ReadPlan {
        let on_device = pieces.iter().any(|p| matches!(p.source, PieceSource::Device { .. }));
        let guard = on_device.then(|| self.guard());
        ReadPlan { pieces, guard }
    }
}

/// Lays a range out: extents of `top`, clean extents of `under`, then holes and misses.
pub(crate) fn lay(
    top: &ExtentList,
    under: Option<&ExtentList>,
    chunk: ChunkIndex,
    blocks: Range<u32>,
    base: BaseView,
) -> Vec<ReadPiece> {
    let end = blocks.end.min(CHUNK_BLOCKS);
    // Blocks of this chunk that the backing object has, and bytes of the last one.
    let in_chunk = base.valid_bytes.saturating_sub(chunk.start());
    let valid_blocks = in_chunk.div_ceil(BLOCK as u64).min(u64::from(CHUNK_BLOCKS)) as u32;
    let valid_tail = |block: u32| -> u32 {
        in_chunk.saturating_sub(u64::from(block) * BLOCK as u64).min(BLOCK as u64) as u32
    };
    let usable = |e: &Extent| match e.origin {
        Origin::Dirty(_) => true,
        Origin::Clean(c) => c == base.content && e.first() < valid_blocks,
    };
    let mut pieces: Vec<ReadPiece> = Vec::new();
    let mut at = blocks.start;
    while at < end {
        let here = top
            .find(at)
            .filter(|e| usable(e))
            .or_else(|| under?.find(at).filter(|e| !e.origin.is_dirty() && usable(e)));
        // A usable extent of the lower list ends where the upper one begins.
        let mut stop = end;
        for list in std::iter::once(top).chain(under) {
            let next = list.0[list.position(at)..].iter().find(|e| e.first() > at);
            stop = next.map_or(stop, |e| stop.min(e.first()));
            if let Some(e) = list.find(at) {
                stop = stop.min(e.end());
            }
        }
        let clean = here.is_none_or(|e| !e.origin.is_dirty());
        if clean && at < valid_blocks {
            stop = stop.min(valid_blocks);
        }
        let source = match here {
            Some(e) if !clean || at < valid_blocks => {
                let (a, b) = ((at - e.first()) as usize, (stop - e.first()) as usize);
                let mut tail = if stop == e.end() { u32::from(e.tail) } else { BLOCK as u32 };
                if clean {
                    tail = tail.min(valid_tail(stop - 1));
                }
                PieceSource::Device {
                    offset: u64::from(e.location + a as u32) * BLOCK as u64,
                    crcs: e.crcs[a..b].to_vec(),
                    tail_valid: tail,
                    dirty: !clean,
                }
            }
            _ if at >= valid_blocks => PieceSource::Zero,
            _ => PieceSource::Miss,
        };
        match pieces.last_mut() {
            Some(p) if p.source == source && !matches!(source, PieceSource::Device { .. }) => {
                p.blocks.end = stop;
            }
            _ => pieces.push(ReadPiece { blocks: at..stop, source }),
        }
        assert!(stop > at, "each piece makes progress");
        at = stop;
    }
    pieces
}
