//! What the metadata plane is asked, and what it answers. No I/O.
//!
//! A request on a metadata port is one frame of opcode `Meta` whose body is an encoded [`Request`];
//! the reply's body is an encoded [`Response`]. Client mutations ([`op::Op`]) carry
//! `(session, sequence)` and take effect exactly once (I7). [`command::Command`] is what goes into
//! the Raft log: an operation, or a result of the leader's own work (flush, S3, sessions, nodes).

pub mod admin;
pub mod attr;
pub mod check;
pub mod command;
pub mod dump;
pub mod error;
pub mod flush;
pub mod hostile;
pub mod lease;
pub mod lock;
pub mod node;
pub mod op;
pub mod own;
pub mod placement;
pub mod query;
pub mod xattr;

pub use admin::{AdminCall, AdminReply, ClusterStatus};
pub use attr::{Attr, FileKind, Time};
pub use command::{Command, CommandReply, LogEntry};
pub use error::{FsError, FsResult};
pub use node::{NodeCall, NodeReply};
pub use op::{Made, Op, OpReply, Opened};
pub use query::{Query, QueryReply};

use ebb_dataplane_protocol::{InodeId, Sequence, SessionId};
use rkyv::{Archive, Deserialize, Serialize};

/// A request on a metadata port.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub enum Request {
    /// A mutation of a session, exactly once.
    Mutate {
        /// The session.
        session: SessionId,
        /// Unique in the session; a retry repeats it.
        sequence: Sequence,
        /// Every request below was answered: its remembered reply may go.
        answered_below: Sequence,
        /// What to do.
        op: Op,
        /// What the client has forgotten before it, each with the number of its lease ([`lease`]); at most
        /// [`lease::DROPPED_MAX`].
        dropped: Vec<(InodeId, u64)>,
    },
    /// A linearizable read.
    Query {
        /// Who asks: names that are delegated to another session are waited for. 0: nobody in particular.
        session: SessionId,
        /// What.
        query: Query,
    },
    /// Opens, renews and closes sessions.
    Session(SessionCall),
    /// From a data node.
    Node(NodeCall),
    /// From the controller or an operator.
    Admin(AdminCall),
}

/// The answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub enum Response {
    /// Answers `Mutate`.
    Op(FsResult<OpReply>),
    /// Answers `Query`.
    Query(FsResult<QueryReply>),
    /// Answers `Session`.
    Session(FsResult<SessionReply>),
    /// Answers `Node`.
    Node(FsResult<NodeReply>),
    /// Answers `Admin`.
    Admin(FsResult<AdminReply>),
}

/// Session traffic.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum SessionCall {
    /// A new session; `client` is 128 random bits so that a retry finds the session it made.
    Open {
        /// The client's identity.
        client: u128,
        /// Shown in `ebb status` (host name, mount point).
        label: String,
    },
    /// Extends the lease. Must come well within `ttl_ms`.
    Renew(SessionId),
    /// Ends the session: its handles are released, its write grants fenced.
    Close(SessionId),
    /// What a client with a cache has forgotten, and what it should ([`lease`]). Held for up to
    /// [`lease::HOLD`].
    Watch(SessionId, lease::Watch),
}

/// Answers to session traffic.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum SessionReply {
    /// The session and how long it lives without renewal, in ms.
    Opened {
        /// The session.
        session: SessionId,
        /// Its lease.
        ttl_ms: u64,
    },
    /// Renewed or closed.
    Done,
    /// Answers `Watch`.
    Watched(lease::Watched),
}
