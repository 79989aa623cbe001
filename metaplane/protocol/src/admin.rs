//! Traffic of the controller and of operators.

use crate::op::Name;
use ebb_dataplane_protocol::control::CoreStats;
use ebb_dataplane_protocol::{ClusterMap, InodeId, NodeId, NodeState, PgId, ShardRef};
use rkyv::{Archive, Deserialize, Serialize};

/// A request of an operator or the controller.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum AdminCall {
    /// How things are. Reply [`AdminReply::Status`].
    Status,
    /// Wanted number of data nodes (`ebb scale N`); persisted. Reply `Done`.
    SetDesired {
        /// Nodes.
        nodes: u32,
    },
    /// Sets a node's state. `Gone` is refused unless it holds no group and reported dirty = pins =
    /// 0 after the epoch without it (I8). Reply `Done`.
    SetNodeState {
        /// The node.
        node: NodeId,
        /// The state.
        state: NodeState,
    },
    /// Moves a group: flush its dirt, freeze, flush the rest, new epoch, release at the donor.
    /// Returns when begun; progress shows in the status. `to` empty: nobody holds it. Reply `Done`.
    MovePg {
        /// The group.
        pg: PgId,
        /// New holders, primary first.
        to: Vec<ShardRef>,
    },
    /// Puts a subtree into S3. With `wait` the reply comes when everything that was dirty at the
    /// call is in S3, or with what failed. Reply [`AdminReply::Flushed`].
    Flush {
        /// Root of the subtree.
        inode: InodeId,
        /// Wait.
        wait: bool,
    },
    /// Drops clean cached data of a subtree. Reply `Done`.
    Evict {
        /// Root of the subtree.
        inode: InodeId,
    },
    /// Reads a subtree's files into the cache. Reply `Done`.
    Warm {
        /// Root of the subtree.
        inode: InodeId,
    },
    /// `ebb down`: no new grants, creates, joins; then everything is flushed. With `abandon`, dirty
    /// data is given up. Reply [`AdminReply::Flushed`]; zero remaining means it is safe to stop.
    Shutdown {
        /// Drop dirty data.
        abandon: bool,
    },
    /// Takes `Shutdown` back (it was refused or given up). Reply `Done`.
    Resume,
    /// The path of an inode, for messages. Reply [`AdminReply::Path`].
    Path(InodeId),
}

/// Outcome of a flush.
#[derive(Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct FlushReport {
    /// Inodes that went to S3.
    pub flushed: u64,
    /// Bytes uploaded.
    pub bytes: u64,
    /// Still dirty.
    pub remaining: u64,
    /// Up to 20 that failed, as (path, why).
    pub failed: Vec<(String, String)>,
}

/// How a node is.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize, serde::Serialize)]
pub struct NodeStatus {
    /// The node.
    pub node: NodeId,
    /// Age of its last heartbeat, in ms; `None`: none since the leader started.
    pub heartbeat_age_ms: Option<u64>,
    /// It holds no groups as of its acked map.
    pub acked_map: u64,
    /// Per core.
    pub cores: Vec<CoreStats>,
}

/// How things are.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize, serde::Serialize)]
pub struct ClusterStatus {
    /// The map.
    pub map: ClusterMap,
    /// Wanted nodes.
    pub desired_nodes: u32,
    /// The last non-zero wish, for waking.
    pub wake_nodes: u32,
    /// A client needs data and no node holds it.
    pub wake_wanted: bool,
    /// Groups being moved.
    pub moves: Vec<PgId>,
    /// Nodes.
    pub nodes: Vec<NodeStatus>,
    /// Inodes not yet in S3 (data, attributes or name).
    pub dirty_inodes: u64,
    /// Age of the oldest, in ms.
    pub dirty_oldest_ms: u64,
    /// Pending deletes and moves of keys.
    pub pending_keys: u64,
    /// Inodes known.
    pub inodes: u64,
    /// Live sessions.
    pub sessions: Vec<String>,
    /// The bucket, for people.
    pub bucket: String,
    /// What the S3 server lacks, and other warnings.
    pub warnings: Vec<String>,
    /// Last S3 error and its age in ms.
    pub s3_error: Option<(String, u64)>,
    /// The cluster is being taken down.
    pub shutting_down: bool,
    /// Counters of the leader.
    pub counters: Vec<(String, u64)>,
}

/// Answers to operators.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum AdminReply {
    /// Done.
    Done,
    /// How things are.
    Status(Box<ClusterStatus>),
    /// Outcome of a flush.
    Flushed(FlushReport),
    /// A path's components.
    Path(Vec<Name>),
}
