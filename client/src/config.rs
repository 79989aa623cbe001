//! Limits and waiting times of a client (I9).

use std::time::Duration;

/// Limits of one [`crate::FileSystem`]. The defaults keep a mount well under 512 MiB.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes of written data that wait for their acknowledgement, over all files. A writer waits
    /// when it is full.
    pub write_buffer_bytes: usize,
    /// A buffered range is sent when it reaches this size; divides a chunk.
    pub segment_bytes: usize,
    /// Data writes in flight at once, over all files.
    pub write_window: usize,
    /// Buffered data and attribute changes older than this are sent without being asked.
    pub write_age_max: Duration,
    /// Bytes of data read ahead, over all files.
    pub read_cache_bytes: usize,
    /// How far ahead of a sequential reader one file is fetched.
    pub read_window_bytes: u64,
    /// Unit of a readahead request; divides a chunk.
    pub read_block_bytes: u64,
    /// Read-ahead data older than this is fetched again.
    pub read_age_max: Duration,
    /// Connections per core.
    pub lanes: u32,
    /// How long a call tries before it fails with EIO: a leader change, a node's restart.
    pub patience: Duration,
    /// How long a write waits for space while nothing is flushed, before it fails with ENOSPC.
    pub space_patience: Duration,
    /// One data request's limit to be answered. A read that misses waits for S3.
    pub request_timeout: Duration,
    /// Remember attributes and names under leases (docs/PROTOCOL.md, R52): a look at what is remembered asks
    /// nobody, and is never old. Who changes something that another client remembers waits until that has forgotten it.
    pub lease_metadata: bool,
    /// Ask a metadata server that does not lead for names, attributes and pages of directories (docs/PROTOCOL.md, R60):
    /// its answers are as true as the leader's, which has less to do. Those servers leave it to the leader while any
    /// client has leases ([`Self::lease_metadata`]).
    pub follower_reads: bool,
    /// A file that is opened again so soon is not compared again with its object in S3, if it is leased.
    pub compare_age_max: Duration,
    /// Attributes of files this client writes are answered from memory for this long.
    pub attr_age_max: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            write_buffer_bytes: 64 << 20,
            segment_bytes: 1 << 20,
            write_window: 16,
            write_age_max: Duration::from_secs(1),
            read_cache_bytes: 64 << 20,
            read_window_bytes: 8 << 20,
            read_block_bytes: 1 << 20,
            read_age_max: Duration::from_secs(2),
            lanes: 2,
            patience: Duration::from_secs(60),
            space_patience: Duration::from_secs(30),
            request_timeout: Duration::from_secs(30),
            lease_metadata: false,
            follower_reads: false,
            compare_age_max: Duration::from_secs(1),
            attr_age_max: Duration::from_secs(1),
        }
    }
}
