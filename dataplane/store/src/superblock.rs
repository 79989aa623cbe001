//! The superblock: four copies of one 4 KiB block; it names the live checkpoint and where replay starts.
//!
//! Recovery takes the highest number of which at least two identical valid copies exist. The four are
//! written one after another, each durable before the next: a crash leaves two old or two new ones.

use crate::codec::{Put, Reader};
use crate::device::AlignedBuf;
use crate::error::OpenError;
use crate::geometry::{FORMAT_VERSION, Geometry, Identity};
use crate::types::BLOCK;
use ebb_dataplane_protocol::{ClusterId, CoreId, NodeId, crc32c};

const MAGIC: u64 = u64::from_le_bytes(*b"EBBSUPER");
const BODY_BYTES: usize = 136;
/// The checksum is the block's last four bytes, in every version.
const CRC_AT: usize = BLOCK - 4;
const _: () = assert!(BODY_BYTES <= CRC_AT);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) geometry: Geometry,
    pub(crate) identity: Identity,
    /// Number of the checkpoint; area = number % 2.
    pub(crate) number: u64,
    /// Bytes of the checkpoint, whole pages.
    pub(crate) checkpoint_bytes: u64,
    /// Ring page where the first batch after the checkpoint is.
    pub(crate) replay_page: u32,
    /// Ring pages before it that hold live inline data.
    pub(crate) live_pages: u32,
    /// Sequence of that batch.
    pub(crate) replay_sequence: u64,
    /// Header checksum of the batch before it.
    pub(crate) replay_previous: u32,
}

impl Superblock {
    pub(crate) fn encode(&self) -> AlignedBuf {
        let mut b = Vec::with_capacity(BODY_BYTES);
        b.u64(MAGIC);
        b.u32(FORMAT_VERSION);
        b.u32(BLOCK as u32);
        b.u128(self.identity.cluster.0);
        b.u128(self.identity.store);
        b.u32(self.identity.node.0);
        b.u16(self.identity.core.0);
        b.u16(self.identity.pg_count);
        b.u64(self.geometry.device_bytes);
        b.u64(self.geometry.journal_bytes);
        b.u64(self.geometry.checkpoint_bytes);
        b.u64(self.number);
        b.u64(self.checkpoint_bytes);
        b.u32(self.replay_page);
        b.u32(self.live_pages);
        b.u64(self.replay_sequence);
        b.u32(self.replay_previous);
        b.u32(0);
        b.u64(0); // feature bits: none yet; an unknown one must be refused
        b.u64(0);
        assert_eq!(b.len(), BODY_BYTES, "the layout of docs/FORMAT.md");
        let mut out = AlignedBuf::zeroed(BLOCK);
        out[..BODY_BYTES].copy_from_slice(&b);
        let crc = crc32c(&out[..CRC_AT]);
        out[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub(crate) fn decode(block: &[u8]) -> Copy {
        let mut r = Reader::new(block);
        if r.u64() != Some(MAGIC) {
            return Copy::Absent;
        }
        let Some(stored) = block.get(CRC_AT..BLOCK) else { return Copy::Damaged };
        if crc32c(&block[..CRC_AT]).to_le_bytes() != *stored {
            return Copy::Damaged;
        }
        match Self::fields(&mut r) {
            Some(Ok(sb)) => Copy::Valid(sb),
            Some(Err(other)) => other,
            None => Copy::Damaged,
        }
    }

    fn fields(r: &mut Reader<'_>) -> Option<Result<Self, Copy>> {
        let version = r.u32()?;
        if version != FORMAT_VERSION {
            return Some(Err(Copy::OtherVersion(version)));
        }
        let block = r.u32()?;
        let identity = Identity {
            cluster: ClusterId(r.u128()?),
            store: r.u128()?,
            node: NodeId(r.u32()?),
            core: CoreId(r.u16()?),
            pg_count: r.u16()?,
        };
        let geometry = Geometry {
            device_bytes: r.u64()?,
            journal_bytes: r.u64()?,
            checkpoint_bytes: r.u64()?,
        };
        let sb = Self {
            geometry,
            identity,
            number: r.u64()?,
            checkpoint_bytes: r.u64()?,
            replay_page: r.u32()?,
            live_pages: r.u32()?,
            replay_sequence: r.u64()?,
            replay_previous: r.u32()?,
        };
        let zero = r.u32()?;
        let features = r.u64()?;
        let ring = geometry.journal_bytes / BLOCK as u64;
        let sound = block == BLOCK as u32
            && zero == 0
            && geometry.check().is_ok()
            && identity.pg_count > 0
            && u64::from(sb.replay_page) < ring
            && u64::from(sb.live_pages) <= ring
            && sb.checkpoint_bytes <= geometry.checkpoint_bytes
            && sb.checkpoint_bytes.is_multiple_of(BLOCK as u64);
        if sound && features != 0 {
            return Some(Err(Copy::UnknownFeatures(features)));
        }
        sound.then_some(Ok(sb))
    }
}

/// One copy as found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copy {
    Absent,
    Damaged,
    OtherVersion(u32),
    /// This version, with feature bits that nobody has given a meaning yet.
    UnknownFeatures(u64),
    Valid(Superblock),
}

/// The rule: highest number with two identical copies.
pub(crate) fn choose(copies: &[Copy]) -> Result<Superblock, OpenError> {
    let valid: Vec<&Superblock> = copies
        .iter()
        .filter_map(|c| if let Copy::Valid(sb) = c { Some(sb) } else { None })
        .collect();
    let pair = valid
        .iter()
        .filter(|a| valid.iter().filter(|b| b == a).count() >= 2)
        .max_by_key(|sb| sb.number);
    if let Some(sb) = pair {
        return Ok(**sb);
    }
    if let Some(found) =
        copies.iter().find_map(|c| if let Copy::OtherVersion(v) = c { Some(*v) } else { None })
    {
        return Err(OpenError::OtherVersion { found, expected: FORMAT_VERSION });
    }
    if let Some(bits) =
        copies.iter().find_map(|c| if let Copy::UnknownFeatures(b) = c { Some(*b) } else { None })
    {
        return Err(OpenError::UnknownFeatures { bits });
    }
    if copies.iter().all(|c| *c == Copy::Absent) {
        return Err(OpenError::NotFormatted);
    }
    Err(OpenError::Superblocks { valid: valid.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sb(number: u64) -> Superblock {
        Superblock {
            geometry: Geometry::for_device(64 << 20).expect("large enough"),
            identity: Identity {
                cluster: ClusterId(1),
                store: 2,
                node: NodeId(3),
                core: CoreId(4),
                pg_count: 64,
            },
            number,
            checkpoint_bytes: 4096,
            replay_page: 7,
            live_pages: 3,
            replay_sequence: 9,
            replay_previous: 10,
        }
    }

    #[test]
    fn superblocks_round_trip_and_any_flipped_bit_is_seen() {
        let bytes = sb(5).encode();
        assert_eq!(Superblock::decode(&bytes), Copy::Valid(sb(5)));
        for at in [0usize, 8, 20, 100, 135, 2000, 4095] {
            let mut bad = bytes.to_vec();
            bad[at] ^= 4;
            assert!(!matches!(Superblock::decode(&bad), Copy::Valid(_)));
        }
    }

    #[test]
    fn two_identical_copies_decide() {
        let v = |n| Copy::Valid(sb(n));
        assert_eq!(choose(&[v(2), v(1), v(1), v(1)]).expect("old ones").number, 1);
        assert_eq!(choose(&[v(2), v(2), Copy::Damaged, v(1)]).expect("new ones").number, 2);
        assert!(matches!(
            choose(&[v(2), Copy::Damaged, Copy::Damaged, v(1)]),
            Err(OpenError::Superblocks { valid: 2 })
        ));
        assert!(matches!(choose(&[Copy::Absent; 4]), Err(OpenError::NotFormatted)));
    }
}
