//! What goes into a shard core and what comes out of it.
//!
//! Every buffer is owned by exactly one side: a command hands it out, the completion that carries
//! the command's token gives it back. Every [`Request`] is answered by exactly one
//! [`Command::Reply`]. No I/O, clock or randomness here or in the core.

use super::call::{Answer, Call};
use ebb_dataplane_protocol::auth::{PeerHello, Role};
use ebb_dataplane_protocol::control::{PutCondition, StoreOutcome};
use ebb_dataplane_protocol::{ClusterMap, Header, SessionId, ShardRef};
use ebb_store::AlignedBuf;
use std::ops::Range;
use std::sync::Arc;

/// A connection, as the glue names it. Never reused in the life of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnRef(pub u64);

/// Names a command that will be answered by a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// What a proved connection said of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerInfo {
    /// Its role.
    pub role: Role,
    /// Its session, 0 if none.
    pub session: SessionId,
    /// Which core it is, of [`Role::Node`].
    pub node: Option<PeerHello>,
}

/// One frame.
#[derive(Debug)]
pub struct Request<B> {
    /// Where the reply goes.
    pub conn: ConnRef,
    /// Who asks.
    pub peer: PeerInfo,
    /// The header, checked.
    pub header: Header,
    /// The body, its checksum checked.
    pub body: Vec<u8>,
    /// The payload of a write, laid at byte `header.offset % 4096` of the buffer.
    pub payload: Option<B>,
}

/// Who a buffer is for; each purpose has its own reserve, so that none starves another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// The reply of a client's read.
    Reply,
    /// One block at a time: edges of writes, pieces of fragmented reads.
    Edge,
    /// Data on its way from S3.
    Fill,
    /// Bodies on their way to S3. Bounded by the core's own count of bytes.
    Flush,
    /// Blocks on their way to another member of a group.
    Copy,
    /// A copy of a block that is read often.
    Dram,
    /// Blocks on their way to the spill device. Bounded by the core's own count of bytes.
    Spill,
}

/// Where buffers come from. `None`: none free now; ask again later.
pub trait Buffers<B> {
    /// A block-aligned buffer of at least `bytes` bytes.
    fn take(&mut self, bytes: usize, purpose: Purpose) -> Option<B>;
}

/// Something that happened.
#[derive(Debug)]
pub enum Event<B> {
    /// A frame arrived on a proved connection.
    Request(Request<B>),
    /// A read of the device or the spill device ended; `false`: device error or short.
    Read {
        /// The command's.
        token: Token,
        /// Given back.
        buf: B,
        /// Whether all was read.
        ok: bool,
    },
    /// A write of the device or the spill device, or a sync, ended.
    Written {
        /// The command's.
        token: Token,
        /// Whether it happened whole. A failure is fatal for the shard, unless it is the spill device's.
        ok: bool,
    },
    /// An S3 job ended.
    Job(JobDone<B>),
    /// The cluster map, this core's place in it, and the lease.
    Placement {
        /// This core.
        me: ShardRef,
        /// The map.
        map: Arc<ClusterMap>,
        /// The lease holds until then, on the clock of `now_ms`.
        lease_until_ms: u64,
    },
    /// A [`Command::Call`] ended.
    Answer(Answer<B>),
}

/// A part of a reply's payload.
#[derive(Debug)]
pub enum Piece<B> {
    /// A part of a buffer.
    Buf(B, Range<usize>),
    /// A part of a buffer that others use too.
    Shared(Arc<B>, Range<usize>),
    /// That many zeros.
    Zeros(usize),
}

impl<B> Piece<B> {
    /// Bytes.
    pub fn len(&self) -> usize {
        match self {
            Piece::Buf(_, r) | Piece::Shared(_, r) => r.len(),
            Piece::Zeros(n) => *n,
        }
    }
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Something to do.
#[derive(Debug)]
pub enum Command<B> {
    /// Read `range.len()` bytes at `offset` of the device into `buf[range]`.
    Read {
        /// For the completion.
        token: Token,
        /// Device offset.
        offset: u64,
        /// The target.
        buf: B,
        /// The part of it.
        range: Range<usize>,
    },
    /// Write `buf[range]` at `offset`; no durability.
    Write {
        /// For the completion.
        token: Token,
        /// Device offset.
        offset: u64,
        /// The source, which other writes may share.
        buf: Arc<B>,
        /// The part of it.
        range: Range<usize>,
    },
    /// Write the store's own bytes.
    WriteMeta {
        /// For the completion.
        token: Token,
        /// Device offset.
        offset: u64,
        /// Journal, checkpoint or superblock bytes.
        bytes: Arc<AlignedBuf>,
        /// With RWF_DSYNC.
        durable: bool,
    },
    /// fdatasync.
    Sync {
        /// For the completion.
        token: Token,
    },
    /// Read `range.len()` bytes at `offset` of the spill device into `buf[range]`; ends as [`Event::Read`].
    SpillRead {
        /// For the completion.
        token: Token,
        /// Offset there.
        offset: u64,
        /// The target.
        buf: B,
        /// The part of it.
        range: Range<usize>,
    },
    /// Write `buf[range]` at `offset` of the spill device, no durability; ends as [`Event::Written`].
    SpillWrite {
        /// For the completion.
        token: Token,
        /// Offset there.
        offset: u64,
        /// The source.
        buf: Arc<B>,
        /// The part of it.
        range: Range<usize>,
    },
    /// Answer a request.
    Reply(Reply<B>),
    /// Do something in S3.
    Job(Job<B>),
    /// Ask a core of another node. Ends with exactly one [`Event::Answer`].
    Call(Call<B>),
    /// A newer map is known to somebody: heartbeat now.
    RefreshMap,
    /// The device failed: the shard serves nothing any more. Said once.
    Failed(&'static str),
}

/// An answer. Lengths and the body's checksum are set from `body` and `payload`.
#[derive(Debug)]
pub struct Reply<B> {
    /// To whom.
    pub conn: ConnRef,
    /// The reply's header, complete.
    pub header: Header,
    /// Its body.
    pub body: Vec<u8>,
    /// Its payload.
    pub payload: Vec<Piece<B>>,
}

/// Work for the mover.
#[derive(Debug)]
pub struct Job<B> {
    /// For the completion.
    pub token: Token,
    /// What.
    pub work: Work<B>,
}

/// An S3 call.
#[derive(Debug)]
pub enum Work<B> {
    /// GET of a range under If-Match into `buf[at..]`.
    Fetch {
        /// Key relative to the space's prefix.
        key: String,
        /// If-Match.
        etag: String,
        /// Bytes of the object.
        range: Range<u64>,
        /// The target.
        buf: B,
        /// Where in it.
        at: usize,
    },
    /// PUT of a whole object.
    Put {
        /// The key.
        key: String,
        /// The bytes.
        body: Vec<Piece<B>>,
        /// User metadata.
        metadata: Vec<(String, String)>,
        /// The condition.
        condition: PutCondition,
    },
    /// One part of a multipart upload.
    UploadPart {
        /// The key.
        key: String,
        /// The upload.
        upload_id: String,
        /// 1-based.
        part_number: u32,
        /// The bytes.
        body: Vec<Piece<B>>,
    },
    /// A part copied by the server.
    CopyPart {
        /// The key of the upload.
        key: String,
        /// The upload.
        upload_id: String,
        /// 1-based.
        part_number: u32,
        /// The source.
        source_key: String,
        /// Its etag.
        source_etag: String,
        /// The range of it.
        range: Range<u64>,
    },
}

/// Why a fetch failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchError {
    /// 404, 412, another etag, or too short: not the object the view names.
    Changed,
    /// S3 does not answer, or not with these bytes.
    Unavailable,
}

/// A job's end.
#[derive(Debug)]
pub enum JobDone<B> {
    /// Of a [`Work::Fetch`].
    Fetched {
        /// The job's.
        token: Token,
        /// Given back.
        buf: B,
        /// Whether all bytes are there.
        result: Result<(), FetchError>,
    },
    /// Of the others; the body's buffers are free.
    Stored {
        /// The job's.
        token: Token,
        /// What is known.
        outcome: StoreOutcome,
    },
}
