//! What a voter stands on: disk, network, clock, and the pace of its Raft. A server stands on this machine; the
//! simulator (`crate::sim`) puts whole groups on ground that shakes.

use crate::raft::dial::Dial;
use crate::raft::disk::{Disk, Machine};
use crate::raft::propose::{self, Clock};
use ebb_rpc::Identity;
use std::sync::Arc;

/// Log entries kept behind a snapshot, so that a voter that lags a little needs none.
const ENTRIES_BEHIND_SNAPSHOT: u64 = 1_000;

/// Timing of Raft and sizes of its log.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    /// A leader says that it lives this often.
    pub(crate) heartbeat_ms: u64,
    /// A follower that hears nothing for a random time between these wants to lead.
    pub(crate) election_ms: (u64, u64),
    /// Entries kept behind a snapshot.
    pub(crate) entries_behind_snapshot: u64,
    /// Bytes of a file of the log.
    pub(crate) segment_bytes: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            heartbeat_ms: 100,
            election_ms: (400, 800),
            entries_behind_snapshot: ENTRIES_BEHIND_SNAPSHOT,
            segment_bytes: crate::raft::log::LogOptions::default().segment_bytes,
        }
    }
}

/// See the module.
#[derive(Clone)]
pub(crate) struct Ground {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) dial: Arc<dyn Dial>,
    pub(crate) clock: Clock,
    pub(crate) pace: Pace,
}

impl Ground {
    /// This machine; connections prove themselves with the identity.
    pub(crate) fn machine(identity: Identity) -> Self {
        Self {
            disk: Arc::new(Machine),
            dial: Arc::new(identity),
            clock: Arc::new(propose::now),
            pace: Pace::default(),
        }
    }
}
