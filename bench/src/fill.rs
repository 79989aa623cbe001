//! Fills a store as a cache would: for [`crate::index`] and [`crate::recovery`].
//!
//! The store is the real one and does no I/O itself; what it wants done goes to a [`Media`], which decides
//! whether anything is written.

use crate::BenchError;
use ebb_dataplane_protocol::{ChunkIndex, ContentId, InodeId};
use ebb_store::{
    BLOCK, CHUNK_BLOCKS, CheckpointStep, FillOp, FillPlan, RelocationMove, Store, WriteError,
};
use serde::Serialize;
use std::io;

/// Chunks of one file.
const FILE_CHUNKS: u32 = 256;
/// Extents of one chunk in the fragmented shape.
const PARTS: u32 = 64;
/// Fills between two turns of the journal.
const TURN_FILLS: u32 = 256;
/// The first inode.
const FIRST: u64 = 100;

/// How the cached data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shape {
    /// Large files: one extent of 4 MiB per chunk.
    WholeChunks,
    /// Large files in pieces: 64 extents of 64 KiB per chunk, none next to its neighbour.
    Fragmented,
    /// Files of 64 KiB: an inode, a chunk and an extent each.
    SmallFiles,
    /// Files of a block, the most entries per byte there can be.
    TinyFiles,
}

impl Shape {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::WholeChunks, Self::Fragmented, Self::SmallFiles, Self::TinyFiles];

    /// Its name on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::WholeChunks => "whole-chunks",
            Self::Fragmented => "fragmented",
            Self::SmallFiles => "small-files",
            Self::TinyFiles => "tiny-files",
        }
    }
}

impl std::str::FromStr for Shape {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|s| s.name() == name);
        found.ok_or_else(|| format!("no shape is called {name:?}"))
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::WholeChunks => "4 MiB chunks",
            Self::Fragmented => "64 KiB extents",
            Self::SmallFiles => "64 KiB files",
            Self::TinyFiles => "4 KiB files",
        })
    }
}

/// Who does the store's I/O.
pub(crate) trait Media {
    /// A journal batch, a part of a checkpoint, a superblock.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Inline data leaves the journal.
    fn relocate(&mut self, moved: &RelocationMove) -> io::Result<()>;
    /// The blocks of a fill; answers with their checksums. `number` tells fills apart.
    fn fill(&mut self, plan: &FillPlan, number: u32) -> io::Result<Vec<u32>>;
}

pub(crate) fn refused(e: impl std::fmt::Display) -> BenchError {
    BenchError::Store(e.to_string())
}

/// Takes one fill after another until there are `chunks` times 4 MiB, or the store takes no more: `true`.
pub(crate) fn fill(
    store: &mut Store,
    media: &mut dyn Media,
    shape: Shape,
    chunks: u32,
) -> Result<bool, BenchError> {
    let part = CHUNK_BLOCKS / PARTS;
    let mut fills = 0;
    let mut add = |inode: u64, chunk: u32, first_block: u32, blocks: u32| {
        fills += 1;
        if fills % TURN_FILLS == 0 {
            turn(store, media)?;
        }
        let op = FillOp {
            inode: InodeId(FIRST + inode),
            chunk: ChunkIndex(chunk),
            first_block,
            blocks,
            content: ContentId(1),
            tail_valid: BLOCK as u32,
        };
        add_one(store, media, &op, fills)
    };
    let mut limited = false;
    'all: for group in 0..chunks.div_ceil(PARTS) {
        for step in 0..PARTS {
            let taken = match shape {
                Shape::WholeChunks => {
                    let n = group * PARTS + step;
                    add(u64::from(n / FILE_CHUNKS), n % FILE_CHUNKS, 0, CHUNK_BLOCKS)?
                }
                // Part `step` of each chunk of the group in turn: no chunk's parts are neighbours
                // on the device, or they would be joined.
                Shape::Fragmented => {
                    let mut taken = true;
                    for n in group * PARTS..(group + 1) * PARTS {
                        let inode = u64::from(n / FILE_CHUNKS);
                        taken &= add(inode, n % FILE_CHUNKS, step * part, part)?;
                    }
                    taken
                }
                Shape::SmallFiles | Shape::TinyFiles => {
                    let blocks = if shape == Shape::TinyFiles { 1 } else { part };
                    let files = CHUNK_BLOCKS / blocks;
                    let first = u64::from(group * PARTS + step) * u64::from(files);
                    let mut taken = true;
                    for n in 0..files {
                        taken &= add(first + u64::from(n), 0, 0, blocks)?;
                        if !taken {
                            break;
                        }
                    }
                    taken
                }
            };
            if !taken {
                limited = true;
                break 'all;
            }
        }
    }
    turn(store, media)?;
    Ok(limited)
}

/// One fill; `false`: the store takes no more.
fn add_one(
    store: &mut Store,
    media: &mut dyn Media,
    op: &FillOp,
    number: u32,
) -> Result<bool, BenchError> {
    let plan = match store.begin_fill(op) {
        Ok(plan) => plan,
        Err(WriteError::NoSpace { .. }) => return Ok(false),
        // The journal wants its turn.
        Err(WriteError::Wait(_)) => {
            turn(store, media)?;
            match store.begin_fill(op) {
                Ok(plan) => plan,
                Err(WriteError::NoSpace { .. }) => return Ok(false),
                Err(e) => return Err(refused(e)),
            }
        }
        Err(e) => return Err(refused(e)),
    };
    let crcs = media.fill(&plan, number).map_err(refused)?;
    store.commit_fill(plan.id, &crcs).map_err(refused)?;
    Ok(true)
}

/// Makes a batch durable; `false`: nothing waits for one.
pub(crate) fn commit(store: &mut Store, media: &mut dyn Media) -> Result<bool, BenchError> {
    let Some(batch) = store.take_batch() else { return Ok(false) };
    media.write(batch.offset, &batch.bytes).map_err(refused)?;
    store.batch_durable(batch.id).map_err(refused)?;
    Ok(true)
}

/// Carries the journal and the checkpoint as far as they go.
pub(crate) fn turn(store: &mut Store, media: &mut dyn Media) -> Result<(), BenchError> {
    loop {
        let mut moved = commit(store, media)?;
        if store.checkpoint_due() {
            store.begin_checkpoint();
        }
        let token = match store.checkpoint_step() {
            CheckpointStep::Idle | CheckpointStep::Wait => None,
            CheckpointStep::Relocate { token, moves } => {
                for m in &moves {
                    media.relocate(m).map_err(refused)?;
                }
                Some(token)
            }
            CheckpointStep::Write { token, offset, bytes }
            | CheckpointStep::WriteDurable { token, offset, bytes } => {
                media.write(offset, &bytes).map_err(refused)?;
                Some(token)
            }
            // Nothing is pulled out here: one sync in the end is enough.
            CheckpointStep::Sync { token } => Some(token),
        };
        if let Some(token) = token {
            store.checkpoint_done(token).map_err(refused)?;
            moved = true;
        }
        if !moved {
            return Ok(());
        }
    }
}
