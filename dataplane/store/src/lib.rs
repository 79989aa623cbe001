//! `ebb-store`: one core's on-disk store, sans-IO: format, index, allocator, journal, checkpoint,
//! recovery. No clock, randomness, thread, file or socket; the caller does the I/O it is told.
//!
//! # Life of a mutation
//! `begin_write` → the caller's I/O → `commit_write` appends a record to the open batch → `take_batch`
//! → (one fdatasync if asked) one `RWF_DSYNC` write → `batch_durable` applies the records in order and
//! returns their tickets: then, and only then, they are visible to reads and may be acked (I1).
//! Control mutations append their record at once. One batch is in flight at a time.
//!
//! Refusals (floors, freezes, windows) are decided against everything *appended*; reads, seals' answers
//! and flush reads see only what is *durable*.

mod alloc;
mod apply;
mod cache;
mod capture;
mod checkpoint;
mod codec;
mod control;
pub mod device;
pub mod error;
mod extent;
pub mod geometry;
pub mod hostile;
mod index;
mod journal;
mod memory;
mod read;
mod record;
mod recovery;
mod remnant;
mod replica;
mod store;
mod superblock;
pub mod types;
pub mod verify;
mod window;
mod write;

pub use device::{AlignedBuf, DeviceWrite, OpenDevice};
pub use error::*;
pub use geometry::{Geometry, Identity};
pub use read::{ScrubAt, ScrubPiece};
pub use recovery::{format, format_device, identify};
pub use replica::{ChunkCopy, Staged};
pub use store::{MEMORY_BYTES_DEFAULT, Store};
pub use types::*;
pub use verify::{BadBlock, Report, verify};

/// CRC-32C of a block of zeros.
pub fn zero_block_crc() -> u32 {
    const ZEROS: [u8; types::BLOCK] = [0; types::BLOCK];
    ebb_dataplane_protocol::crc32c(&ZEROS)
}
