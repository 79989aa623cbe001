//! Journal batches kept in memory until their inline data has moved to slots.
//!
//! A small write is journaled with its bytes, and a checkpoint moves those to their place later. Reading
//! them back from the device for that costs as many reads as there were writes, in front of which the
//! writes of others wait. So the batches stay here for a while: the oldest up to a limit (what has no
//! room is read from the device), because the oldest are moved first.

use ebb_store::AlignedBuf;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of batches kept by a core.
const KEPT_BYTES_MAX: usize = 32 << 20;
/// With so many it is time to move what is in them.
const MOVE_AT_BYTES: usize = KEPT_BYTES_MAX / 2;

/// Batches by their device offset.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Not being moved yet.
    fresh: BTreeMap<u64, Arc<AlignedBuf>>,
    /// Those that the pass under way began with.
    moving: BTreeMap<u64, Arc<AlignedBuf>>,
    bytes: usize,
}

impl Kept {
    /// Keeps a durable batch, if there is room.
    pub(crate) fn keep(&mut self, offset: u64, bytes: Arc<AlignedBuf>) {
        // The ring came round: what was here is not there any more.
        let end = offset + bytes.len() as u64;
        for map in [&mut self.fresh, &mut self.moving] {
            while let Some((at, old)) = map.range(..end).next_back()
                && at + old.len() as u64 > offset
            {
                let at = *at;
                let old = map.remove(&at);
                self.bytes -= old.map_or(0, |b| b.len());
            }
        }
        if self.bytes + bytes.len() <= KEPT_BYTES_MAX {
            self.bytes += bytes.len();
            self.fresh.insert(offset, bytes);
        }
    }

    /// Whether so much is kept that it should be moved.
    pub(crate) fn wants_moving(&self) -> bool {
        self.moving.is_empty() && self.bytes >= MOVE_AT_BYTES
    }

    /// A pass begins that moves everything durable so far.
    pub(crate) fn pass_began(&mut self) {
        self.moving.append(&mut self.fresh);
    }

    /// It is over.
    pub(crate) fn pass_ended(&mut self) {
        let gone: usize = self.moving.values().map(|b| b.len()).sum();
        self.moving.clear();
        self.bytes -= gone;
    }

    /// The bytes at a device offset, if all of them are kept.
    pub(crate) fn get(&self, offset: u64, len: usize) -> Option<&[u8]> {
        [&self.moving, &self.fresh].into_iter().find_map(|map| {
            let (at, batch) = map.range(..=offset).next_back()?;
            let from = (offset - at) as usize;
            batch.get(from..from + len)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(fill: u8, blocks: usize) -> Arc<AlignedBuf> {
        let mut b = AlignedBuf::zeroed(blocks * 4096);
        b.fill(fill);
        Arc::new(b)
    }

    #[test]
    fn what_the_ring_wrote_over_is_not_given_out() {
        let mut kept = Kept::default();
        for i in 0..10u64 {
            kept.keep(i * 8192, batch(i as u8, 2));
        }
        kept.pass_began();
        kept.keep(80 * 1024, batch(77, 1));
        assert_eq!(kept.get(3 * 8192 + 4096, 4096).map(|b| b[0]), Some(3));
        assert_eq!(kept.get(3 * 8192 + 4096, 8192), None, "it ends before that");
        // Over the second half of one, a whole one, and the first half of a third.
        kept.keep(4096, batch(99, 4));
        assert_eq!(kept.get(0, 4096), None);
        assert_eq!(kept.get(8192, 8192).map(|b| b[0]), Some(99));
        assert_eq!(kept.get(16384 + 4096, 4096), None);
        assert_eq!(kept.get(3 * 8192, 4096).map(|b| b[0]), Some(3));
        kept.pass_ended();
        assert_eq!(kept.get(3 * 8192, 4096), None, "it was moved");
        assert_eq!(kept.get(80 * 1024, 4096).map(|b| b[0]), Some(77), "it came later");
        assert_eq!(kept.bytes, 5 * 4096);
    }

    #[test]
    fn the_oldest_are_kept_up_to_the_limit() {
        let mut kept = Kept::default();
        let size = 1 << 20;
        for i in 0..64u64 {
            kept.keep(i * size, batch(i as u8, size as usize / 4096));
            assert!(kept.bytes <= KEPT_BYTES_MAX);
            assert_eq!(kept.wants_moving(), kept.bytes >= MOVE_AT_BYTES);
        }
        assert!(kept.get(0, 4096).is_some() && kept.get(63 * size, 4096).is_none());
        kept.pass_began();
        assert!(!kept.wants_moving(), "a pass runs");
        kept.pass_ended();
        assert_eq!(kept.bytes, 0);
    }
}
