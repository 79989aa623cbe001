//! The offline walk over a device: superblocks, checkpoint, journal, every block's checksum (I10).
//! Changes nothing. Used by tests and by `ebb fsck --device`.

use crate::device::{AlignedBuf, OpenDevice};
use crate::error::OpenError;
use crate::geometry::{Geometry, Identity};
use crate::superblock::Copy;
use crate::types::BLOCK;
use ebb_dataplane_protocol::{ChunkIndex, InodeId, crc32c};

/// A block whose bytes do not match the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadBlock {
    /// The inode.
    pub inode: InodeId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// The block of the chunk.
    pub block: u32,
    /// Its device offset.
    pub offset: u64,
    /// Not in S3: lost unless a replica has it.
    pub dirty: bool,
}

/// What [`verify`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Whose store it is.
    pub identity: Identity,
    /// Its layout.
    pub geometry: Geometry,
    /// Superblock copies that agree with the chosen one, of 4.
    pub superblocks: usize,
    /// Number of the live checkpoint.
    pub checkpoint: u64,
    /// Journal batches after it.
    pub batches: u64,
    /// Inodes known.
    pub inodes: u64,
    /// Chunks.
    pub chunks: u64,
    /// Extents, pins included.
    pub extents: u64,
    /// Blocks read and compared.
    pub blocks: u64,
    /// Data blocks in use.
    pub used_blocks: u64,
    /// Data blocks the index refers to; equal to `used_blocks`, or space leaked.
    pub reachable_blocks: u64,
    /// Mismatches.
    pub bad: Vec<BadBlock>,
}

/// Walks everything. Fails where `open` would.
pub fn verify(device: &mut dyn OpenDevice) -> Result<Report, OpenError> {
    let r = crate::recovery::recover(device, None)?;
    let mut report = Report {
        identity: Identity { node: r.index.node, ..r.superblock.identity },
        geometry: r.superblock.geometry,
        superblocks: r.copies.iter().filter(|c| c.1 == Copy::Valid(r.superblock)).count(),
        checkpoint: r.superblock.number,
        batches: r.batches,
        inodes: r.index.inodes.len() as u64,
        chunks: r.index.chunks.len() as u64,
        extents: r.index.counters.extents,
        blocks: 0,
        used_blocks: u64::from(r.alloc.used_blocks()),
        reachable_blocks: 0,
        bad: Vec::new(),
    };
    let mut buf = AlignedBuf::zeroed(ebb_dataplane_protocol::CHUNK_BYTES as usize);
    for ((inode, chunk), c) in &r.index.chunks {
        report.reachable_blocks += c
            .runs()
            .iter()
            .filter(|run| !r.journal.contains(run.start))
            .map(|run| u64::from(run.blocks))
            .sum::<u64>();
        for e in c.all_extents() {
            let bytes = &mut buf[..e.crcs.len() * BLOCK];
            device
                .read_at(e.run().offset(), bytes)
                .map_err(|source| OpenError::Io { doing: "reading data", source })?;
            for (i, block) in bytes.chunks(BLOCK).enumerate() {
                report.blocks += 1;
                if crc32c(block) != e.crcs[i] {
                    report.bad.push(BadBlock {
                        inode: *inode,
                        chunk: *chunk,
                        block: e.first() + i as u32,
                        offset: e.run().offset() + (i * BLOCK) as u64,
                        dirty: e.origin.is_dirty(),
                    });
                }
            }
        }
    }
    Ok(report)
}
