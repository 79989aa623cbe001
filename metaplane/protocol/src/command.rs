//! What goes into the Raft log, and what applying it returns. Deterministic: the leader stamps time
//! and randomness into the entry.

use crate::attr::{Attr, Time};
use crate::check::Repair;
use crate::dump::{LoadStep, Record};
use crate::error::FsResult;
use crate::flush::*;
use crate::node::NodeCall;
use crate::op::{Delegation, Op};
use ebb_dataplane_protocol::control::WindowEntry;
use ebb_dataplane_protocol::*;
use rkyv::{Archive, Deserialize, Serialize};

/// One log entry's payload.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub struct LogEntry {
    /// The leader's clock when it proposed; the state machine uses max(this, the last one).
    pub now: Time,
    /// The commands; applied in order, each atomic (batching shares one log write).
    pub commands: Vec<Command>,
}

/// A command.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub enum Command {
    /// Formats an empty state machine: cluster identity, group count, incarnation. Once.
    Format {
        /// The cluster.
        cluster: ClusterId,
        /// Placement groups.
        pg_count: u16,
        /// Woken how often.
        incarnation: Incarnation,
        /// The root's entries must be listed from S3.
        backed: bool,
    },
    /// A client's mutation.
    Client {
        /// The session.
        session: SessionId,
        /// Its sequence.
        sequence: Sequence,
        /// Replies below may be forgotten.
        answered_below: Sequence,
        /// The operation.
        op: Op,
    },
    /// A new session (or the one this client already has).
    OpenSession {
        /// Identity of the client.
        client: u128,
        /// For people.
        label: String,
    },
    /// Renews sessions (batched by the leader).
    RenewSessions(Vec<SessionId>),
    /// Ends sessions, by close or expiry: handles go, inodes held for write are fenced (§4).
    EndSessions(Vec<SessionId>),
    /// A data node registers. Reply [`CommandReply::Node`].
    RegisterNode(NodeCall),
    /// Changes a node's state. `Gone` removes it from the map.
    SetNodeState(NodeId, NodeState),
    /// Wanted nodes.
    SetDesired(u32),
    /// A group begins to move (map version unchanged for clients' reads; shown in status).
    PgMoving(PgId, bool),
    /// The windows of a group that nobody will hold, until somebody does (PROTOCOL R27): entries of live
    /// sessions, a page at a time, before `SetPg`. `from` as there.
    KeepWindows {
        /// The group.
        pg: PgId,
        /// Epoch in which the donor was frozen.
        from: PgEpoch,
        /// Writes that were applied there.
        entries: Vec<WindowEntry>,
    },
    /// A group's new members: epoch + 1, map version + 1, since_map_version = it. `from` guards
    /// against a stale decision.
    SetPg {
        /// The group.
        pg: PgId,
        /// Epoch the decision was made at.
        from: PgEpoch,
        /// New members.
        members: Vec<ShardRef>,
    },
    /// A group whose holder is cut off gets another, which is not told its windows: as `SetPg`, and refused
    /// if the holder may have the only copy of anything (PROTOCOL R23, R24).
    StandIn {
        /// The group.
        pg: PgId,
        /// Epoch the decision was made at.
        from: PgEpoch,
        /// New members.
        members: Vec<ShardRef>,
        /// The state machine's sequence after the holder was cut off.
        cut_off: u64,
    },
    /// Gives inodes up of which a node that is cut off may have the only copy; others are skipped.
    AbandonInodes {
        /// The node.
        node: NodeId,
        /// As in `StandIn`.
        cut_off: u64,
        /// The inodes.
        inodes: Vec<InodeId>,
    },
    /// A node that is cut off leaves the map; refused while it may have the only copy of anything. Its
    /// store may not register again.
    RemoveNode {
        /// The node.
        node: NodeId,
        /// As in `StandIn`.
        cut_off: u64,
    },
    /// How many copies of what S3 does not have: members of each group that are wanted, and in-sync ones
    /// without which writes are refused (R42). The map says the latter.
    SetReplication {
        /// Wanted, the primary included.
        replicas: u8,
        /// Needed.
        min_in_sync: u8,
    },
    /// A core begins to be a member of a group: syncing, in a new epoch (PROTOCOL R43). Here and below, `from` is
    /// the epoch that the decision was made at; in another one nothing happens.
    AddMember {
        /// The group.
        pg: PgId,
        /// Epoch the decision was made at.
        from: PgEpoch,
        /// Who.
        member: ShardRef,
    },
    /// A syncing member has everything, says the primary, and counts from now on (R47): in-sync, the last in
    /// the order.
    MemberInSync {
        /// The group.
        pg: PgId,
        /// Epoch the decision was made at.
        from: PgEpoch,
        /// Who.
        member: ShardRef,
    },
    /// A member other than the primary is one no more (R43).
    DropMember {
        /// The group.
        pg: PgId,
        /// Epoch the decision was made at.
        from: PgEpoch,
        /// Who.
        member: ShardRef,
        /// It could stay: refused if fewer in-sync members are left than were promised (R48).
        planned: bool,
    },
    /// An in-sync member is the primary from now on: a new epoch, a new lead (R44). The leader sees to it that
    /// the old primary serves no more.
    TakeOver {
        /// The group.
        pg: PgId,
        /// Epoch the decision was made at.
        from: PgEpoch,
        /// Who.
        to: ShardRef,
        /// The old primary journaled its freeze and stays, in-sync; else it is a member no more.
        keep_old: bool,
    },
    /// Shutting down (no grants, creates, joins), or not any more.
    SetShutdown(bool),
    /// Begins flushes (§2): Dirty(g) → Sealing(g) for each that is dirty; others are skipped.
    /// Reply [`CommandReply::Tickets`].
    FlushBegin {
        /// The inodes.
        inodes: Vec<InodeId>,
        /// Flush these to their temporary key (a cycle of names, or an unlinked-open blocker).
        via_temporary: bool,
    },
    /// All primaries sealed: Sealing(g) → Flushing(g), g+1 may be granted; plans are made and
    /// nonces logged. Reply [`CommandReply::Plans`].
    FlushSealed(Vec<SealedInode>),
    /// Seals failed or took too long: back to Dirty(g+1).
    FlushAbort(Vec<InodeId>),
    /// Results of stores (§2, §9, §10). Clean iff nothing above g was granted.
    FlushCommit(Vec<FlushOutcome>),
    /// The high-water marks of fenced inodes (§4): size = max(size, mark), clipped by cuts.
    Fenced(Vec<SealedInode>),
    /// Notices acked by every primary (keys of the notice queue).
    NoticesDone(Vec<u64>),
    /// Deletes begin: logs the nonce, marks the key in flight. A look-up needs none: it reports with
    /// `KeyDone` under the nonce that its `Resolve` names. Reply
    /// [`CommandReply::Keys`]: those that may go on.
    KeyBegin(Vec<(String, u128)>),
    /// Last looks begin (R32), at keys whose lost requests have lapsed: as `KeyBegin`.
    LookBegin(Vec<(String, u128)>),
    /// Its result.
    KeyDone {
        /// The key.
        key: String,
        /// The nonce of KeyBegin.
        nonce: u128,
        /// What happened.
        result: AttemptResult,
    },
    /// Results of LIST and HEAD (§10).
    Ingest {
        /// The directory.
        dir: InodeId,
        /// The state machine's sequence when the S3 call began: names whose key changed since are
        /// skipped.
        listed_at: u64,
        /// The entries.
        entries: Vec<IngestEntry>,
        /// For a page of the listing: its start-after token as the directory's origin had it, and
        /// where it goes on (`None`: complete). `None` for single HEADs.
        page: Option<IngestPage>,
    },
    /// Full attributes of inodes that a LIST created, from HEADs.
    SetIngestAttrs(Vec<(InodeId, String, IngestAttrs)>),
    /// Outside changes found by revalidation.
    Adopt(Vec<Adopt>),
    /// Flushes found that the object which holds a file's clean bytes is not what it was.
    BaseChanged(Vec<BaseChange>),
    /// The dirty ranges of a file that lost its base are in S3.
    Rescued(Rescue),
    /// One more step of pending directory renames: marks up to this many descendants to be moved.
    MoveStep(u32),
    /// The reply to an S3 mutation was lost: it is looked up, and reported by `FlushCommit` or
    /// `KeyDone`. Comes before that report: unless it is found to have landed, it may do so later.
    KeyDoubt {
        /// The attempt.
        nonce: u128,
        /// For so long after it was given up (the validity of its signature).
        valid_ms: u64,
    },
    /// Mends what a check found, as far as it is still so.
    Repair(Vec<Repair>),
    /// A part of a dump comes back.
    Load(LoadStep, Vec<Record>),
    /// Whether leases on metadata are given ([`crate::lease`]): a leader that comes after waits for their end.
    SetLeases(bool),
    /// Files may be lent to a session ([`crate::query::Query::Lend`]): those that lose their last name stay until
    /// `Reap`.
    Borrow(SessionId),
    /// Nobody has these files, which have no name any more, open but by handles.
    Reap(Vec<InodeId>),
}

/// Progress of a directory's listing.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct IngestPage {
    /// Continuation the page started from (empty: the start).
    pub from: String,
    /// Continuation of the next page; `None`: the directory is complete.
    pub next: Option<String>,
}

/// What an operation decided; the server signs the grant and makes an `OpReply` of it.
#[expect(clippy::large_enum_variant, reason = "short-lived; the large variant is the common one")]
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum OpOutcome {
    /// Done.
    Done,
    /// The inode after the change.
    Attr(Attr),
    /// An opened file: an unsigned grant.
    Opened {
        /// Attributes.
        attr: Attr,
        /// Handle.
        handle: HandleId,
        /// The grant to sign.
        grant: Grant,
        /// Create made it.
        created: bool,
        /// Of a create.
        delegation: Option<Delegation>,
    },
    /// Files without a name: attributes, handle, grant to sign.
    Reserved(Vec<(Attr, HandleId, Grant)>),
}

/// What applying a command returns.
#[expect(clippy::large_enum_variant, reason = "short-lived; the large variant is the common one")]
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub enum CommandReply {
    /// Done; nothing to say.
    Done,
    /// A client's operation.
    Op(FsResult<OpOutcome>),
    /// A session.
    Session(FsResult<SessionId>),
    /// A registered node.
    Node(FsResult<NodeId>),
    /// Refused, and why (internal commands).
    Refused(String),
    /// Begun flushes.
    Tickets(Vec<FlushTicket>),
    /// Plans, in the order of the sealed inodes.
    Plans(Vec<FlushPlan>),
    /// Keys that may go on.
    Keys(Vec<String>),
}
