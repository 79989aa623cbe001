//! The spill tier: clean bytes that the shard has no room for any more, on a second, slower and larger device.
//!
//! It holds copies of what S3 has, named by inode, place in the file and content (R34), so that bytes of another
//! state of a file are never found; nothing dirty ever goes there, and losing it loses nothing. What leaves the
//! shard for want of space is read once more, gathered, and written as a log round the device
//! ([`keep`], [`log`]); a miss looks here before peers and S3 are asked ([`find`]), and what is found goes the way
//! of a fill from S3: to who waits, and into the shard.
//!
//! * Nobody waits for it (I9, I11): what can't be taken at once is evicted without a copy, and counted; a read that
//!   takes too long goes to S3.
//! * One checksum per granule, in memory, is compared at every read (I10). Any error is a counter, a warning and a
//!   miss; several in a row switch the tier off.
//! * The index is in memory only: the tier starts empty.
//!
//! It does not: hold what is not in S3, answer other nodes, or survive a restart.

mod find;
mod keep;
mod log;

pub(crate) use find::{SpillRead, Waiting};
pub(crate) use keep::Capture;

use super::{Buffer, ShardCore};
use ebb_dataplane_protocol::InodeId;
use ebb_store::{BLOCK, ReadGuard};
use log::Log;
use std::collections::{BTreeMap, HashMap, VecDeque};

/// Where the log begins on a spill device, in bytes: what is before says whose it is.
pub const SPILL_LOG_AT: u64 = 1 << 20;
/// Least size of a spill device, in bytes.
pub const SPILL_BYTES_MIN: u64 = 16 << 20;
/// Bytes of a write.
const BATCH_BYTES: usize = 4 << 20;
/// Errors in a row, of writes or of reads, after which the tier is off.
const ERRORS_MAX: u32 = 8;

const _: () = assert!(SPILL_BYTES_MIN - SPILL_LOG_AT >= 2 * BATCH_BYTES as u64);

/// What the device did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Write,
    Read,
    Checksum,
    Late,
}

/// The tier of one core.
#[derive(Debug)]
pub(crate) struct Spill<B> {
    /// Of no capacity: there is no device, or it is off.
    log: Log,
    /// Granules being read from the shard, or waiting to be written, and their bytes.
    captures: usize,
    capture_bytes: usize,
    ready: VecDeque<keep::Ready<B>>,
    open: Option<keep::Batch<B>>,
    writing: Option<keep::Writing<B>>,
    spare: Option<std::sync::Arc<B>>,
    /// Evictions whose blocks are being read, and how many granules of each.
    guards: HashMap<u64, (ReadGuard, usize)>,
    /// Reads that somebody waits for, oldest first.
    reads: BTreeMap<u64, Waiting>,
    /// Reads that the device has not answered, and their bytes; given up ones, too.
    reads_out: usize,
    read_bytes_out: usize,
    /// Fills that are complete, for the end of the turn.
    found: Vec<(SpillRead, B)>,
    /// Fills that wait for their turn.
    queue: VecDeque<Waiting>,
    write_errors: u32,
    read_errors: u32,
}

impl<B: Buffer> Spill<B> {
    /// Over a device of `bytes`; less than [`SPILL_BYTES_MIN`]: none.
    pub(crate) fn new(bytes: u64) -> Self {
        let bytes = if bytes < SPILL_BYTES_MIN { 0 } else { bytes - SPILL_LOG_AT };
        Self {
            log: Log::new(bytes),
            captures: 0,
            capture_bytes: 0,
            ready: VecDeque::new(),
            open: None,
            writing: None,
            spare: None,
            guards: HashMap::new(),
            reads: BTreeMap::new(),
            reads_out: 0,
            read_bytes_out: 0,
            found: Vec::new(),
            queue: VecDeque::new(),
            write_errors: 0,
            read_errors: 0,
        }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.log.capacity() > 0
    }
    /// Bytes it may hold; 0: none, or off.
    pub(crate) fn capacity(&self) -> u64 {
        self.log.capacity()
    }
    /// Bytes that can be found in it.
    pub(crate) fn bytes(&self) -> u64 {
        self.log.bytes()
    }
}

/// Device offset of a block of the log.
fn offset_of(block: u32) -> u64 {
    SPILL_LOG_AT + u64::from(block) * BLOCK as u64
}

impl<B: Buffer> ShardCore<B> {
    /// Somebody wants these files, or (empty) all, to be in S3 only.
    pub(crate) fn forget_spilled(&mut self, inodes: &[InodeId]) {
        let goes = |inode: InodeId| inodes.is_empty() || inodes.contains(&inode);
        let spill = &mut self.spill;
        if inodes.is_empty() {
            spill.log.clear();
        }
        for inode in inodes {
            spill.log.forget_inode(*inode);
        }
        spill.forget_under_way(goes);
    }

    /// The device did something wrong: that costs a miss, and the tier if it happens again and again.
    fn spill_wrong(&mut self, wrong: Wrong) {
        match wrong {
            Wrong::Late => self.stats.spill_late += 1,
            _ => self.stats.spill_errors += 1,
        }
        let spill = &mut self.spill;
        let errors = match wrong {
            Wrong::Write => &mut spill.write_errors,
            _ => &mut spill.read_errors,
        };
        *errors += 1;
        tracing::warn!(?wrong, in_a_row = *errors, "the spill device failed; S3 has the bytes");
        if *errors < ERRORS_MAX || !spill.is_on() {
            return;
        }
        tracing::error!(
            ?wrong,
            "the spill device failed {ERRORS_MAX} times in a row: the tier is off"
        );
        self.stats.spill_off = 1;
        spill.log = Log::new(0);
        spill.open = None;
        spill.spare = None;
        spill.drop_ready();
        let queue = std::mem::take(&mut spill.queue);
        for waiting in queue {
            self.pass_spill(waiting.no);
        }
    }
}
