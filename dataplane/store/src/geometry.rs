//! Where things are on a device (docs/FORMAT.md §2), and whose it is.

use crate::error::GeometryError;
use crate::types::BLOCK;
use ebb_dataplane_protocol::{CHUNK_BYTES, ClusterId, CoreId, NodeId};

/// Version of everything on the device.
pub const FORMAT_VERSION: u32 = 4;
/// Bytes before the journal: superblock copies 0 and 1.
pub const HEAD_BYTES: u64 = 1 << 20;
/// Bytes after the data: superblock copies 2 and 3.
pub const TAIL_BYTES: u64 = 1 << 20;
/// Least journal: sixteen batches of the least size.
pub const JOURNAL_BYTES_MIN: u64 = 1 << 20;
/// Least checkpoint area.
pub const CHECKPOINT_BYTES_MIN: u64 = 256 << 10;
/// Checkpoint area for some two million small files.
pub const SMALL_FILES_INDEX_BYTES: u64 = 512 << 20;
/// Largest device: locations are 32-bit block numbers.
pub const DEVICE_BYTES_MAX: u64 = (u32::MAX as u64) * BLOCK as u64;

const B: u64 = BLOCK as u64;
const REGION: u64 = CHUNK_BYTES as u64;

/// Sizes chosen at format time, stored in the superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the device.
    pub device_bytes: u64,
    /// Bytes of the journal ring.
    pub journal_bytes: u64,
    /// Bytes of each of the two checkpoint areas: bounds the index (I9).
    pub checkpoint_bytes: u64,
}

impl Geometry {
    /// A sensible geometry for a device: a journal of 1/64 (1 MiB to 256 MiB) and checkpoint areas of
    /// 16 bytes per data block (large extents need 4), but up to [`SMALL_FILES_INDEX_BYTES`] enough for a device
    /// full of files of a block each, which take about 115 bytes, half of the area being kept for pins. A larger
    /// index than that no node has the RAM for.
    pub fn for_device(device_bytes: u64) -> Result<Self, GeometryError> {
        let device_bytes = device_bytes / B * B;
        let journal_bytes = (device_bytes / 64 / B * B).clamp(JOURNAL_BYTES_MIN, 256 << 20);
        let small_files = (device_bytes / 24).min(SMALL_FILES_INDEX_BYTES);
        let checkpoint_bytes = (device_bytes / 256).max(small_files) / B * B;
        let checkpoint_bytes = checkpoint_bytes.clamp(CHECKPOINT_BYTES_MIN, DEVICE_BYTES_MAX);
        let g = Self { device_bytes, journal_bytes, checkpoint_bytes };
        g.check()?;
        Ok(g)
    }

    /// Checks alignment and sizes.
    pub fn check(&self) -> Result<(), GeometryError> {
        let bad = |what, found, rule| Err(GeometryError::Bad { what, found, rule });
        if !self.device_bytes.is_multiple_of(B) || self.device_bytes > DEVICE_BYTES_MAX {
            return bad("device_bytes", self.device_bytes, "a multiple of 4096 below 16 TiB");
        }
        if !self.journal_bytes.is_multiple_of(B)
            || self.journal_bytes < JOURNAL_BYTES_MIN
            || self.journal_bytes > 4 << 30
        {
            return bad("journal_bytes", self.journal_bytes, "a multiple of 4096, 1 MiB to 4 GiB");
        }
        // Bounded before anything is computed from it: it may come from a forged superblock.
        if !self.checkpoint_bytes.is_multiple_of(B)
            || self.checkpoint_bytes < CHECKPOINT_BYTES_MIN
            || self.checkpoint_bytes > DEVICE_BYTES_MAX
        {
            return bad(
                "checkpoint_bytes",
                self.checkpoint_bytes,
                "a multiple of 4096, 256 KiB to 16 TiB",
            );
        }
        let least = HEAD_BYTES
            .saturating_add(self.journal_bytes)
            .saturating_add(self.checkpoint_bytes.saturating_mul(2))
            .next_multiple_of(REGION)
            .saturating_add(REGION + TAIL_BYTES);
        if self.device_bytes < least {
            return Err(GeometryError::TooSmall { least, found: self.device_bytes });
        }
        Ok(())
    }

    /// First byte of the journal.
    pub const fn journal_start(&self) -> u64 {
        HEAD_BYTES
    }
    /// First byte of checkpoint area 0 or 1.
    pub const fn checkpoint_start(&self, area: usize) -> u64 {
        self.journal_start() + self.journal_bytes + self.checkpoint_bytes * area as u64
    }
    /// First byte of the data area, aligned to 4 MiB.
    pub const fn data_start(&self) -> u64 {
        self.checkpoint_start(2).next_multiple_of(REGION)
    }
    /// Blocks of the data area.
    pub const fn data_blocks(&self) -> u32 {
        ((self.device_bytes - TAIL_BYTES - self.data_start()) / B) as u32
    }
    /// Where the superblock copies are: two at the head, two at the tail.
    pub const fn superblock_offsets(&self) -> [u64; 4] {
        let tail = self.device_bytes - TAIL_BYTES;
        [0, HEAD_BYTES / 2, tail, tail + TAIL_BYTES / 2]
    }
}

/// Whose store it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The cluster.
    pub cluster: ClusterId,
    /// Random identity of this store; a wiped device gets another.
    pub store: u128,
    /// The node, `NodeId(0)` until the metadata plane has named it (`Store::set_node`).
    pub node: NodeId,
    /// The core that owns this store.
    pub core: CoreId,
    /// Placement groups of the cluster; fixed.
    pub pg_count: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_a_forged_superblock_are_bounded_before_they_are_added_up() {
        let g = Geometry::for_device(16 << 20).expect("large enough");
        for checkpoint_bytes in [1 << 62, (1 << 63) - 4096, u64::MAX - 4095] {
            let forged = Geometry { checkpoint_bytes, device_bytes: DEVICE_BYTES_MAX, ..g };
            assert!(forged.check().is_err(), "{forged:?}");
        }
    }

    #[test]
    fn parts_do_not_overlap_and_data_is_aligned() {
        for bytes in [16u64 << 20, 100 << 20, 1 << 30, 100 << 30, 4 << 40] {
            let g = Geometry::for_device(bytes).expect("large enough");
            assert!(g.checkpoint_start(1) + g.checkpoint_bytes <= g.data_start());
            assert_eq!(g.data_start() % REGION, 0);
            let end = g.data_start() + u64::from(g.data_blocks()) * B;
            assert!(end <= g.superblock_offsets()[2]);
            assert!(g.superblock_offsets()[3] + B <= g.device_bytes);
        }
        assert!(Geometry::for_device(4 << 20).is_err());
    }
}
