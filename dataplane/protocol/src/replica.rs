//! What the primary of a placement group sends to its other members (PROTOCOL R41–R48), opcode
//! [`crate::header::Opcode::Replicate`], role `Node` only.
//!
//! One request is one mutation of the group, in the order in which the primary journaled them; the
//! reply says that it is durable at the member. Requests of one group go over one connection: when
//! that ends, the stream ends, and the next one begins with a copy of the group ([`Ship::Begin`] to
//! [`Ship::End`]). Blocks ride as the payload, their checksums in the body.

use crate::control::{FlushDone, WindowEntry};
use crate::grant::Cut;
use crate::ids::*;
use crate::map::ShardRef;
use rkyv::{Archive, Deserialize, Serialize};

/// Blocks of one [`Ship::Stage`] at most.
pub const STAGE_BLOCKS_MAX: usize = 256;
/// Chunks that one [`Ship::Inode`] names at most.
pub const CHUNKS_NAMED_MAX: usize = 16_384;

/// A mutation and its place in the order.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub struct Shipped {
    /// The group.
    pub pg: PgId,
    /// The primary's epoch of it.
    pub epoch: PgEpoch,
    /// The map by which it is primary.
    pub map_version: MapVersion,
    /// Number of the stream, chosen by the primary; each begins with [`Ship::Begin`].
    pub stream: u64,
    /// Place in the stream, from 0.
    pub place: u64,
    /// What.
    pub ship: Ship,
}

/// A mutation.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub enum Ship {
    /// A copy of the group begins: from here on the member notes what is named.
    Begin,
    /// In a copy: applied writes, a page at most. They are kept in memory until what goes with them comes: the
    /// last list of their chunk, the [`Ship::Inode`] that does not name it, or the end mark. Outside of one:
    /// see `Control::TakeWindows`.
    Windows(Vec<WindowEntry>),
    /// The copy comes to an inode: these of its chunks in the group hold what only members have. Of the
    /// others the member drops what is of that kind, with what says that it was applied, and takes the
    /// entries that it was given. `true`: more of the inode's chunks follow, in order, in another one.
    Inode(InodeId, Vec<ChunkIndex>, bool),
    /// Blocks for the next [`Ship::Chunk`] of this chunk: checksum of each, in the payload's order.
    Stage {
        /// The inode.
        inode: InodeId,
        /// The chunk.
        chunk: ChunkIndex,
        /// One CRC-32C per block.
        crcs: Vec<u32>,
    },
    /// One list of a chunk as the primary has it: replaces the member's.
    Chunk(CopiedList),
    /// What outlives the chunks of an inode in this group; after its chunks. From here on the copy is past
    /// this inode.
    Scope(CopiedScope),
    /// The copy is complete: what was not named goes.
    End,
    /// Whole blocks, merged by the primary.
    Write(ShippedWrite),
    /// See `Control::Seal`.
    Seal(InodeId, Generation),
    /// See `Control::FlushDone`.
    FlushDone(FlushDone),
    /// See `Control::FlushAborted`.
    FlushAborted(InodeId, Generation),
    /// A newer view.
    View {
        /// The inode.
        inode: InodeId,
        /// Its version.
        version: ViewVersion,
        /// Its content.
        content: ContentId,
        /// Bytes of the object that count.
        valid_bytes: u64,
        /// Its cuts.
        cuts: Vec<Cut>,
    },
    /// The inode is gone.
    Drop(InodeId),
    /// See `Control::Freeze`.
    Freeze(PgEpoch),
    /// See `Control::Thaw`.
    Thaw(PgEpoch),
}

/// A write as the primary journaled it.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct ShippedWrite {
    /// The inode.
    pub inode: InodeId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// First byte that the client wrote; the payload begins at its block.
    pub offset: u32,
    /// Bytes that it wrote.
    pub len: u32,
    /// The tag.
    pub generation: Generation,
    /// The writer.
    pub session: SessionId,
    /// Its sequence.
    pub sequence: Sequence,
    /// Sequences below are answered.
    pub answered_below: Sequence,
    /// One CRC-32C per block.
    pub crcs: Vec<u32>,
}

impl ShippedWrite {
    /// What a window remembers of it.
    pub fn entry(&self) -> WindowEntry {
        WindowEntry {
            session: self.session,
            below: self.answered_below,
            sequence: self.sequence,
            generation: self.generation,
            inode: self.inode,
            chunk: self.chunk,
        }
    }
}

/// Dirty blocks of a chunk, or the pins of a sealed generation.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct CopiedList {
    /// The inode.
    pub inode: InodeId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Of this sealed generation; `None`: what readers see.
    pub pin: Option<Generation>,
    /// Sorted, not overlapping.
    pub extents: Vec<CopiedExtent>,
    /// The last list of the chunk: the staged blocks are no longer needed, and pins of generations that
    /// were not named go.
    ///
    /// The entries of the chunk that were given before go into its record: they come with its bytes, never
    /// without (R46).
    pub last: bool,
}

/// Blocks of a chunk, and which of the staged blocks they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct CopiedExtent {
    /// First block of the chunk.
    pub first: u16,
    /// Blocks.
    pub blocks: u16,
    /// Bytes of the last block that count.
    pub tail: u16,
    /// The tag they were written under.
    pub generation: Generation,
    /// Number of the first staged block.
    pub staged: u16,
}

/// Floor, view, seals and marks of an inode in one group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct CopiedScope {
    /// The inode.
    pub inode: InodeId,
    /// Least tag, by fences.
    pub floor: Generation,
    /// Newest view.
    pub view: ViewVersion,
    /// Newest content.
    pub content: ContentId,
    /// Sealed generations and their high-water marks.
    pub seals: Vec<(Generation, u64)>,
    /// High-water marks of what is not flushed.
    pub marks: Vec<(Generation, u64)>,
}

/// Wishes of each kind in one heartbeat at most; the others come with a later one.
pub const WISHES_MAX: usize = 1024;

/// What the cores of a node ask of the metadata plane for the groups of which they are primary, in each
/// heartbeat until it is so or void. They decide nothing: who is a member is a command's to say, and the
/// command does nothing unless the group's epoch is still the one that the wish names (R43).
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Wishes {
    /// Syncing members that acked the end mark of a copy and every mutation since: to be made in-sync, the
    /// last in the order (R47). The primary waits for their acks already.
    pub in_sync: Vec<Wish>,
    /// Members whose acks the primary waits for and whom it can't reach, or who have been without space for long
    /// and can be spared (R56): to be dropped, unless the metadata plane finds that it is the primary who is cut off. As long as nobody decides, nothing is acked.
    pub unreachable: Vec<Wish>,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Archive, Serialize, Deserialize)]
pub struct Wish {
    /// The group.
    pub pg: PgId,
    /// In this epoch only.
    pub epoch: PgEpoch,
    /// Whom it is about.
    pub member: ShardRef,
}
