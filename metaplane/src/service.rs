//! What the port and the leader's tasks share in one process.

use crate::config::MetaConfig;
use crate::leader::cores::Cores;
use crate::leader::liveness::Liveness;
use crate::leader::sessions::SessionClock;
use crate::raft::propose::ProposeError;
use crate::s3_health::S3Health;
use crate::voter::Voter;
use ebb_dataplane_protocol::ClusterId;
use ebb_dataplane_protocol::auth::ClusterKey;
use ebb_metaplane_protocol::{Command, CommandReply, FsError, FsResult};
use ebb_s3::{Bucket, Conditions};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use tokio::sync::{Notify, Semaphore};

/// HEADs in flight for listings and look-ups at most.
pub(crate) const HEADS_MAX: usize = 32;

/// Counters of this process.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) queries: AtomicU64,
    pub(crate) mutations: AtomicU64,
    pub(crate) heads: AtomicU64,
    pub(crate) lists: AtomicU64,
    pub(crate) adopted: AtomicU64,
    pub(crate) flushed: AtomicU64,
    pub(crate) flushed_bytes: AtomicU64,
    pub(crate) flush_failures: AtomicU64,
    pub(crate) flush_aborts: AtomicU64,
    pub(crate) doubts: AtomicU64,
    pub(crate) keys_deleted: AtomicU64,
    pub(crate) notices: AtomicU64,
    pub(crate) sessions_expired: AtomicU64,
    pub(crate) pg_moves: AtomicU64,
    pub(crate) stand_ins: AtomicU64,
    pub(crate) take_overs: AtomicU64,
    pub(crate) hand_overs: AtomicU64,
    pub(crate) members_added: AtomicU64,
    pub(crate) members_in_sync: AtomicU64,
    pub(crate) members_dropped: AtomicU64,
}

/// Adds one.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counts {
    /// Name and value of each.
    pub(crate) fn named(&self) -> Vec<(String, u64)> {
        let get = |name: &str, c: &AtomicU64| (name.to_owned(), c.load(Ordering::Relaxed));
        vec![
            get("queries", &self.queries),
            get("mutations", &self.mutations),
            get("s3_heads", &self.heads),
            get("s3_lists", &self.lists),
            get("outside_changes", &self.adopted),
            get("flushed", &self.flushed),
            get("flushed_bytes", &self.flushed_bytes),
            get("flush_failures", &self.flush_failures),
            get("flush_aborts", &self.flush_aborts),
            get("s3_doubts", &self.doubts),
            get("keys_deleted", &self.keys_deleted),
            get("notices_delivered", &self.notices),
            get("sessions_expired", &self.sessions_expired),
            get("pg_moves", &self.pg_moves),
            get("stand_ins", &self.stand_ins),
            get("take_overs", &self.take_overs),
            get("hand_overs", &self.hand_overs),
            get("members_added", &self.members_added),
            get("members_in_sync", &self.members_in_sync),
            get("members_dropped", &self.members_dropped),
        ]
    }
}

/// Wakes the leader's loops.
#[derive(Debug, Default)]
pub(crate) struct Wakes {
    pub(crate) flush: Notify,
    pub(crate) notices: Notify,
    /// Every primary acked some notices: for all who wait for that.
    pub(crate) acked: Notify,
    pub(crate) keys: Notify,
    pub(crate) moves: Notify,
    pub(crate) groups: Notify,
    /// A primary asks for something for its group's members.
    pub(crate) members: Notify,
    pub(crate) owner: Notify,
    /// A command was applied that may have left work to the loops.
    pub(crate) stirred: Notify,
    /// Somebody's lock ended: for all who wait for one.
    pub(crate) unlocked: Notify,
    /// A file lost its last name that somebody may have open without a handle.
    pub(crate) lent: Notify,
}

/// The shared parts.
pub(crate) struct Service {
    pub(crate) config: MetaConfig,
    pub(crate) cluster: ClusterId,
    pub(crate) key: ClusterKey,
    pub(crate) voter: Voter,
    pub(crate) bucket: Bucket,
    /// Found at attach.
    pub(crate) conditions: OnceLock<Conditions>,
    /// The bucket's configuration for data nodes.
    pub(crate) bucket_json: String,
    pub(crate) cores: Cores,
    pub(crate) liveness: Liveness,
    pub(crate) sessions: SessionClock,
    pub(crate) health: S3Health,
    pub(crate) wakes: Wakes,
    pub(crate) counts: Counts,
    pub(crate) heads: Semaphore,
    pub(crate) listings: crate::bucket::list::Listings,
    pub(crate) relistings: crate::bucket::relist::Relistings,
    pub(crate) comparisons: crate::bucket::revalidate::Comparisons,
    /// A client asked for data that no node holds.
    pub(crate) wake_wanted: AtomicBool,
    /// The term in which this process took the bucket: as long as it leads in that one it may change
    /// what is there. 0: never.
    pub(crate) owned_in: AtomicU64,
    /// The term in which what the last leader left in doubt in the bucket was noted.
    pub(crate) settled_in: AtomicU64,
    pub(crate) ownership: crate::bucket::owner::Ownership,
    pub(crate) port: Arc<ebb_rpc::server::Counters>,
    pub(crate) flushes: crate::leader::flusher::FlushDesk,
    pub(crate) movers: crate::leader::mover::MoveDesk,
    pub(crate) hand_overs: crate::leader::replicas::HandOvers,
    pub(crate) names: crate::server::names::Names,
    pub(crate) checks: crate::server::check::Checks,
    pub(crate) dumps: crate::server::dump::Dumps,
}

/// As a client sees it.
pub(crate) fn fs_error(e: ProposeError) -> FsError {
    match e {
        ProposeError::NotLeader(hint) => FsError::NotLeader(hint),
        ProposeError::Stopped(why) => FsError::Again { retry_after_ms: 100, why },
    }
}

impl Service {
    /// Commits a command and wakes the loops that may have to act on it.
    pub(crate) async fn submit(&self, command: Command) -> FsResult<CommandReply> {
        let reply = self.voter.submit(command).await.map_err(fs_error)?;
        self.wakes.stirred.notify_one();
        Ok(reply)
    }

    /// Commits a command of our own; a refusal is a bug or a race that the next round sees.
    pub(crate) async fn submit_internal(&self, command: Command) -> FsResult<CommandReply> {
        match self.submit(command).await? {
            CommandReply::Refused(why) => Err(FsError::Invalid(why)),
            reply => Ok(reply),
        }
    }

    /// What the S3 server honours; before the probe: nothing, which is safe.
    pub(crate) fn conditions(&self) -> Conditions {
        self.conditions.get().copied().unwrap_or_default()
    }

    pub(crate) fn owns_bucket(&self) -> bool {
        let term = self.owned_in.load(Ordering::Acquire);
        term != 0 && self.voter.leading_term() == Some(term)
    }

    /// Whether files may go to the bucket: it is ours, and the last leader's doubts are noted.
    pub(crate) fn may_store(&self) -> bool {
        let settled = self.settled_in.load(Ordering::Acquire);
        self.owns_bucket() && self.voter.leading_term() == Some(settled)
    }
}

/// 128 random bits from the kernel.
pub(crate) fn random() -> u128 {
    let mut bytes = [0u8; 16];
    // Only an early-boot kernel lacks randomness; a nonce must never repeat, so wait for it.
    while getrandom::fill(&mut bytes).is_err() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    u128::from_le_bytes(bytes)
}
