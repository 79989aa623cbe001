//! What the index takes of RAM (I9): heap blocks counted as they change, trees by their fill.
//!
//! The figure is compared with what an allocator hands out in `tests/memory.rs`. It knows glibc's chunk sizes, since a
//! 64-byte list of checksums really takes 80 bytes, and a million small files have a million of them. What it does not
//! count: plans of writes in flight and a checkpoint's buffer, which have bounds of their own.

use crate::extent::{Extent, ExtentList};
use crate::index::{Chunk, ChunkKey, Index, Inode, Pin};
use crate::types::Scope;
use crate::window::{Applied, Window};
use ebb_dataplane_protocol::{InodeId, SessionId};
use std::mem::size_of;

/// What an allocation of `bytes` takes: a header of 8 bytes, in steps of 16, at least 32.
pub(crate) const fn block(bytes: usize) -> u64 {
    if bytes == 0 {
        return 0;
    }
    let taken = (bytes + 8).next_multiple_of(16);
    (if taken < 32 { 32 } else { taken }) as u64
}

/// An entry's share of a B-tree (std: eleven entries a node). Keys that grow, as inode numbers do, leave a node seven
/// of them, one of which is its parent's; random ones leave it more than eight. Counted as seven and a half.
const fn tree(entry: usize) -> u64 {
    let leaf = block(11 * entry + 16);
    let inner = block(11 * entry + 16 + 12 * 8);
    (leaf + inner / 7) * 2 / 15
}

const CHUNK: u64 = tree(size_of::<(ChunkKey, Chunk)>());
const INODE: u64 = tree(size_of::<(Scope, Inode)>());
const SESSION: u64 = tree(size_of::<(SessionId, Window)>());
const TALLY: u64 = tree(size_of::<InodeId>() + size_of::<u32>());
// Live journal blocks come and go in runs: nodes are emptier than in a tree that only grows.
const INLINE: u64 = tree(size_of::<u32>() + size_of::<ChunkKey>()) * 5 / 4;

/// Heap of an extent's checksums.
pub(crate) fn extent_heap(e: &Extent) -> u64 {
    block(e.crcs.len() * 4)
}

fn list(l: &ExtentList) -> u64 {
    block(l.0.capacity() * size_of::<Extent>())
}

/// Heap of a chunk without what its current extents take one by one.
pub(crate) fn chunk_heap(c: &Chunk) -> u64 {
    list(&c.extents)
        + block(c.pins.capacity() * size_of::<Pin>())
        + c.pins
            .iter()
            .map(|p| list(&p.extents) + p.extents.0.iter().map(extent_heap).sum::<u64>())
            .sum::<u64>()
}

/// Heap of a scope.
pub(crate) fn inode_heap(i: &Inode) -> u64 {
    let each = size_of::<(ebb_dataplane_protocol::Generation, u64)>();
    i.extra.as_ref().map_or(0, |x| {
        block(size_of_val(&**x))
            + block(x.seals.capacity() * each)
            + block(x.marks.capacity() * each)
    })
}

/// Heap of a window.
pub(crate) fn window_heap(w: &Window) -> u64 {
    block(w.applied.capacity() * size_of::<Applied>())
}

impl Index {
    /// RAM of the index.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.counters.heap
            + self.chunks.len() as u64 * CHUNK
            + self.inodes.len() as u64 * INODE
            + self.sessions.len() as u64 * SESSION
            + self.counters.tallies * TALLY
            + self.inline.len() as u64 * INLINE
            + self.cache.memory_bytes()
    }
}
