//! Traffic of the controller and of operators.

use crate::check::{CheckProgress, Repair, Strays};
use crate::dump::{DumpPage, LoadStep, Record};
use crate::op::Name;
use crate::placement::members_of;
use ebb_dataplane_protocol::control::CoreStats;
use ebb_dataplane_protocol::{
    ClusterMap, InodeId, NodeId, NodeInfo, NodeState, PgEntry, PgId, ShardRef,
};
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
    /// What would be lost if a node never came back; with `yes` it is given up, and the node leaves the map
    /// (PROTOCOL R24). Refused while the node may have a lease. Reply [`AdminReply::Abandoned`].
    Abandon {
        /// The node.
        node: NodeId,
        /// Do it.
        yes: bool,
    },
    /// A node that is cut off and holds no group leaves the map: its store was wiped. Reply `Done`.
    Forget {
        /// The node.
        node: NodeId,
    },
    /// The path of an inode, for messages. Reply [`AdminReply::Path`].
    Path(InodeId),
    /// Checks the namespace as it is now (`None`), or says how far a check is (its number), once there is news or
    /// after a second. One at a time; one that nobody asks for ends. Reply [`AdminReply::Check`].
    Check(Option<u64>),
    /// Mends findings of a check; at most [`crate::check::BATCH_MAX`]. Reply `Done`.
    Repair(Vec<Repair>),
    /// Dirty data of data nodes that the namespace does not know of (I2). What is on its way out looks the same
    /// for a moment. Reply [`AdminReply::Strays`].
    Strays,
    /// A page of the namespace as it is now (`None`), or of the moment of a former page and from where that said.
    /// One at a time; a moment that nobody asks for is forgotten. Reply [`AdminReply::Dump`].
    Dump(Option<(u64, Vec<u8>)>),
    /// A part of a dump, in order; at most [`crate::dump::RECORDS_MAX`] records. Reply `Done`.
    Load(LoadStep, Vec<Record>),
    /// Who votes, and how far each is. Reply [`AdminReply::Voters`].
    Voters,
    /// Makes the metadata server at `address` a voter once it has caught up. `Again` while it has not:
    /// repeated, it goes on. Refused if the number is another's. Reply `Done`.
    AddVoter {
        /// The number that it was started with.
        id: u64,
        /// host:port
        address: String,
    },
    /// Takes a voter out of the group. Refused if no majority of those that remain answers. Reply `Done`,
    /// also if there is no such voter.
    RemoveVoter {
        /// Its number.
        id: u64,
    },
}

/// What a voter does in its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VoterRole {
    /// Decides, and serves clients.
    Leader,
    /// Votes, and has what the leader has.
    Follower,
    /// Catches up; counts for nothing yet.
    Learner,
}

/// A voter, as the leader sees it.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize, serde::Serialize)]
pub struct VoterStatus {
    /// Its number; never used twice.
    pub id: u64,
    /// host:port
    pub address: String,
    /// What it does.
    pub role: VoterRole,
    /// Entries of the log that it is not known to have; `None`: it has told this leader nothing yet.
    pub lag: Option<u64>,
    /// It acknowledged the leader so many ms ago; `None`: never.
    pub heard_ms: Option<u64>,
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

/// A file of which a node may have the only copy.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize, serde::Serialize)]
pub struct StrandedFile {
    /// Its path; an inode's number if it has no name.
    pub path: String,
    /// Its size, as far as its writers said.
    pub bytes: u64,
    /// Bytes of its last object in S3, to which it goes back; `None`: it has none, all of it is lost.
    pub stored_bytes: Option<u64>,
}

/// Outcome of an abandon, or what it would be.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize, serde::Serialize,
)]
pub struct AbandonReport {
    /// It was done.
    pub done: bool,
    /// Groups that the node holds.
    pub groups: u32,
    /// Files that go back to their last object in S3.
    pub reverted: u64,
    /// Files that never were in S3.
    pub lost: u64,
    /// Up to 1000 of them.
    pub files: Vec<StrandedFile>,
}

/// A node without a lease.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize, serde::Serialize)]
pub struct CutOff {
    /// The node.
    pub node: NodeId,
    /// Its lease is over for so long, in ms.
    pub since_ms: u64,
    /// Its groups of which it may have the only copy of something: they wait for it.
    pub waiting: Vec<PgId>,
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

/// Groups by how many copies there are of what S3 does not have.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Archive, Serialize, Deserialize, serde::Serialize,
)]
pub struct GroupStates {
    /// As many in-sync members as are wanted.
    pub in_sync: u32,
    /// Fewer, and somebody is being copied to.
    pub syncing: u32,
    /// Fewer, and nobody is.
    pub degraded: u32,
    /// Nobody holds them.
    pub unheld: u32,
}

impl GroupStates {
    /// Counts the groups of a map.
    pub fn of(map: &ClusterMap, replicas: u8) -> Self {
        let mut states = Self::default();
        for e in &map.pgs {
            let counter = match e.members.len() {
                0 => &mut states.unheld,
                n if n >= usize::from(replicas) => &mut states.in_sync,
                _ if e.syncing.is_empty() => &mut states.degraded,
                _ => &mut states.syncing,
            };
            *counter += 1;
        }
        states
    }
}

impl ClusterStatus {
    /// Groups that are not where [`members_of`] wants them: on the way there, or held up by a node that is cut off.
    pub fn misplaced(&self) -> usize {
        let active: Vec<&NodeInfo> =
            self.map.nodes.iter().filter(|n| n.state == NodeState::Active).collect();
        let count = usize::from(self.replicas.max(1));
        let away = |(i, entry): &(usize, &PgEntry)| {
            !entry.syncing.is_empty()
                || entry.members != members_of(PgId(*i as u16), &active, count)
        };
        self.map.pgs.iter().enumerate().filter(|g| !g.1.members.is_empty()).filter(away).count()
    }
}

/// How things are.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize, serde::Serialize)]
pub struct ClusterStatus {
    /// The map.
    pub map: ClusterMap,
    /// Members that each group is to have.
    pub replicas: u8,
    /// In-sync members that writes need.
    pub min_in_sync: u8,
    /// The groups by state.
    pub groups: GroupStates,
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
    /// Nodes that are cut off: their processes serve nothing.
    pub cut_off: Vec<CutOff>,
    /// Files whose data an abandoned node took along.
    pub lost_files: u64,
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
    /// Outcome of an abandon.
    Abandoned(AbandonReport),
    /// A path's components.
    Path(Vec<Name>),
    /// Who votes.
    Voters(Vec<VoterStatus>),
    /// How far a check is.
    Check(CheckProgress),
    /// A page of a dump.
    Dump(DumpPage),
    /// Data that nobody knows of, and nodes that did not say what they have.
    Strays(Strays),
}
