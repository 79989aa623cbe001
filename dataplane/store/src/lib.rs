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

pub mod device;
pub mod error;
pub mod geometry;
mod store;
pub mod types;

pub use device::{AlignedBuf, DeviceWrite, OpenDevice};
pub use error::*;
pub use geometry::{Geometry, Identity};
pub use store::{Store, format, format_device, identify};
pub use types::*;

/// CRC-32C of a block of zeros.
pub fn zero_block_crc() -> u32 {
    const ZEROS: [u8; types::BLOCK] = [0; types::BLOCK];
    ebb_dataplane_protocol::crc32c(&ZEROS)
}
