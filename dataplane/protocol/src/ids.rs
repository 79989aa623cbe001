//! Newtypes for every id, and the arithmetic of blocks, chunks and runs.

use rkyv::{Archive, Deserialize, Serialize};

/// Bytes in a block: the unit of checksum and of allocation.
pub const BLOCK_BYTES: u32 = 4096;
/// Bytes in a chunk: the unit of addressing on the wire.
pub const CHUNK_BYTES: u32 = 4 << 20;
/// Chunks in a run; a run is placed as one, so that one node holds one S3 multipart part.
pub const RUN_CHUNKS: u32 = 4;
/// Bytes in a run (16 MiB): also the multipart part size and the limit of a single PUT.
pub const RUN_BYTES: u64 = CHUNK_BYTES as u64 * RUN_CHUNKS as u64;
/// Largest file: 10,000 multipart parts of one run each (S3's limit on parts).
pub const FILE_BYTES_MAX: u64 = 10_000 * RUN_BYTES;
/// Longest name of a directory entry, in bytes (NAME_MAX).
pub const NAME_BYTES_MAX: usize = 255;

const _: () = assert!(CHUNK_BYTES.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(RUN_BYTES >= 5 << 20, "S3 refuses smaller parts");

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash,
            Archive, Serialize, Deserialize, serde::Serialize, serde::Deserialize,
        )]
        #[rkyv(derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash))]
        #[serde(transparent)]
        pub struct $name(pub $inner);
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(&self.0, f)
            }
        }
        impl From<$inner> for $name {
            fn from(v: $inner) -> Self { Self(v) }
        }
    };
}

id!(
    /// An inode: 12 bits of virtual shard, 16 bits of the cluster's incarnation, 36 bits of a
    /// persisted counter. Never reused.
    InodeId(u64)
);
id!(/// The generation of an inode: fences writes against flushes and truncates.
    Generation(u64));
id!(/// Version of a [`crate::FileView`]; grows with every change of it.
    ViewVersion(u64));
id!(/// Names the content of a clean chunk; bumped by every flush commit and adopted outside change.
    ContentId(u64));
id!(/// Bumped when the object was replaced from outside: older handles get ESTALE.
    Lineage(u64));
id!(/// A client's lease with the metadata plane.
    SessionId(u64));
id!(/// Position of a request in its session; (session, sequence) makes retries exactly-once.
    Sequence(u64));
id!(/// An open file description at the metadata plane.
    HandleId(u64));
id!(/// Version of the cluster map.
    MapVersion(u64));
id!(/// Epoch of a placement group; one primary per epoch.
    PgEpoch(u64));
id!(/// A placement group.
    PgId(u16));
id!(/// A data node. Never reused, so a wiped disk comes back under another id.
    NodeId(u32));
id!(/// A core of a data node: one ring, one port, one shard of the device.
    CoreId(u16));
id!(/// How often this bucket's cluster was woken; part of every inode id.
    Incarnation(u16));
id!(/// Index of a 4 MiB chunk in its file.
    ChunkIndex(u32));
id!(/// Index of a 16 MiB run in its file.
    RunIndex(u32));

/// Identity of a cluster: 128 random bits made by `ebb up`.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Default,
    Archive,
    Serialize,
    Deserialize,
    serde::Serialize,
    serde::Deserialize,
)]
#[serde(transparent)]
pub struct ClusterId(pub u128);

impl std::fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}
impl std::fmt::Display for ClusterId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl InodeId {
    /// The root directory of the name space.
    pub const ROOT: InodeId = InodeId(1);
    /// Bits of the counter.
    pub const COUNTER_BITS: u32 = 36;
    /// Bits of the incarnation.
    pub const INCARNATION_BITS: u32 = 16;

    /// Builds an id; `shard` is taken modulo 4096, `counter` must fit 36 bits.
    pub const fn new(shard: u16, incarnation: Incarnation, counter: u64) -> Self {
        assert!(counter < 1 << Self::COUNTER_BITS, "inode counter exhausted");
        Self(
            ((shard as u64 & 0xfff) << (Self::COUNTER_BITS + Self::INCARNATION_BITS))
                | ((incarnation.0 as u64) << Self::COUNTER_BITS)
                | counter,
        )
    }

    /// The virtual shard (0..4096), mapped to Raft groups.
    pub const fn shard(self) -> u16 {
        (self.0 >> (Self::COUNTER_BITS + Self::INCARNATION_BITS)) as u16
    }
}

impl Generation {
    /// The next generation; the last one is followed by itself, never by a lower one.
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl ChunkIndex {
    /// The chunk that holds byte `offset` of a file.
    pub const fn of_offset(offset: u64) -> Self {
        Self((offset / CHUNK_BYTES as u64) as u32)
    }
    /// First byte of this chunk in its file.
    pub const fn start(self) -> u64 {
        self.0 as u64 * CHUNK_BYTES as u64
    }
    /// The run this chunk belongs to.
    pub const fn run(self) -> RunIndex {
        RunIndex(self.0 / RUN_CHUNKS)
    }
}

impl RunIndex {
    /// The run that holds byte `offset` of a file.
    pub const fn of_offset(offset: u64) -> Self {
        Self((offset / RUN_BYTES) as u32)
    }
    /// First byte of this run in its file.
    pub const fn start(self) -> u64 {
        self.0 as u64 * RUN_BYTES
    }
    /// Number of runs that cover `bytes` bytes.
    pub const fn count_for(bytes: u64) -> u32 {
        bytes.div_ceil(RUN_BYTES) as u32
    }
}

/// SplitMix64's finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number generators").
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl PgId {
    /// The placement group of a run: `hash(inode, run) mod pg_count`. Part of the format: changing
    /// it strands data.
    pub const fn of(inode: InodeId, run: RunIndex, pg_count: u16) -> Self {
        let h = mix(mix(inode.0.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ run.0 as u64);
        Self((h % pg_count as u64) as u16)
    }
    /// The placement group of a chunk.
    pub const fn of_chunk(inode: InodeId, chunk: ChunkIndex, pg_count: u16) -> Self {
        Self::of(inode, chunk.run(), pg_count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_the_last_generation_comes_no_lower_one() {
        assert_eq!(Generation(1).next(), Generation(2));
        assert_eq!(Generation(u64::MAX).next(), Generation(u64::MAX));
    }
}
