//! Grant, Seal, Flush, Cut and Fence of one inode with two chunks, one primary each (I1, I2, I3, I5, I7).
//!
//! Steps that the network can delay, repeat or reorder are separate actions, so every order of them is
//! walked. A write is a symbolic id. What a process keeps in its journal is simply state; a node's restart
//! loses only what a removed rule says isn't journaled. A client's crash needs no action of its own:
//! nothing forces a client to move, so "never moves again" is among the walked runs.
//! Not here: placement groups ([`crate::handover`]) and ambiguous S3 calls ([`crate::key`]).

use stateright::{Model, Property};

use crate::rules::Rules;

mod step;

/// A symbolic write; 0 is a hole.
pub type WriteId = u8;
/// What the object holds before anything happens.
const BASE: [WriteId; 2] = [30, 31];
const TWICE: u8 = 1;
const AFTER_FENCE: u8 = 2;
const TORN: u8 = 4;

/// One bounded configuration of the model.
#[derive(Clone, Debug)]
pub struct Core {
    pub rules: Rules,
    /// The chunk of each write, per client, in the client's order.
    pub script: [&'static [u8]; 2],
    pub flushes: u8,
    pub aborts: u8,
    /// Where each truncate cuts, in order.
    pub truncates: &'static [u8],
    pub expiries: u8,
    pub node_restarts: u8,
    pub leader_crashes: u8,
    /// Network duplicates and lost replies of writes, together.
    pub dups: u8,
}

/// Where the inode's generation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    Clean,
    Dirty,
    /// `fence`: sealed for an expired session, nothing is uploaded.
    Sealing {
        g: u8,
        fence: bool,
    },
    Flushing {
        g: u8,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Cut {
    generation: u8,
    at: u8,
    version: u8,
    acked: u8,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Node {
    floor: u8,
    view: u8,
    /// (tag, write), oldest tag first; the last one is what a read sees.
    dirty: Vec<(u8, WriteId)>,
    /// The pinned generation and what it held (0: nothing dirty).
    pin: Option<(u8, WriteId)>,
    /// (session, sequence) taken, as a bit, and the tag it was taken under.
    window: Vec<(u32, u8)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Pending {
    Idle,
    Waiting,
    Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Client {
    session: u8,
    /// (generation, view version).
    grant: Option<(u8, u8)>,
    next: u8,
    pending: Pending,
    /// (generation, end) of own acked writes not yet in a CommitWrite.
    ends: Vec<(u8, u8)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Write {
    client: u8,
    index: u8,
    session: u8,
    tag: u8,
    view: u8,
}

impl Write {
    fn id(self) -> WriteId {
        1 + self.client * 4 + self.index
    }
    fn sequence_bit(self) -> u32 {
        1 << (self.client * 8 + self.index * 2 + self.session)
    }
}

/// A state of the whole small world; the last block is the observer's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    phase: Phase,
    /// The generation of the next grant.
    generation: u8,
    /// The highest generation that was granted or cut.
    top: u8,
    /// Every primary refuses tags up to this one.
    sealed_gen: u8,
    granted: [u8; 2],
    size: u8,
    version: u8,
    cuts: Vec<Cut>,
    limit: u8,
    clean_gen: u8,
    size_floor: u8,
    flush_len: u8,
    flush_cut: u8,
    expired: u8,
    /// Leader's memory, lost with it: who answered the seal, the parts read.
    sealed: u8,
    parts: [Option<WriteId>; 2],
    put: bool,
    object: [WriteId; 2],
    object_len: u8,
    nodes: [Node; 2],
    clients: [Client; 2],
    net: Vec<Write>,
    flushes: u8,
    aborts: u8,
    truncates: u8,
    expiries: u8,
    node_restarts: u8,
    leader_crashes: u8,
    dups: u8,
    // Observer: what a correct file system would hold.
    expect: [WriteId; 2],
    expect_size: u8,
    snapshot: [WriteId; 2],
    /// A committed cut whose truncate hasn't answered yet.
    open_cut: Option<(u8, u8, u8)>,
    applied: u32,
    fenced: u8,
    wrong: u8,
    acked: u8,
    merged_abort: bool,
}

/// One step of one party, or of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Grant(u8),
    Send(u8),
    Deliver(u8),
    DeliverAndKeep(u8),
    DeliverReplyLost(u8),
    CommitWrite(u8),
    FlushBegin,
    Seal(u8),
    SealDone,
    Abort,
    ReadPart(u8),
    Put,
    FlushCommit,
    Release(u8),
    Truncate,
    CutAck(u8),
    Expire(u8),
    FenceBegin,
    Reopen(u8),
    NodeRestart(u8),
    LeaderCrash,
}

impl Model for Core {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let client =
            Client { session: 0, grant: None, next: 0, pending: Pending::Idle, ends: Vec::new() };
        let node = Node { floor: 1, ..Node::default() };
        vec![State {
            phase: Phase::Clean,
            generation: 1,
            top: 0,
            sealed_gen: 0,
            granted: [0; 2],
            size: 2,
            version: 0,
            cuts: Vec::new(),
            limit: 2,
            clean_gen: 0,
            size_floor: 0,
            flush_len: 0,
            flush_cut: u8::MAX,
            expired: 0,
            sealed: 0,
            parts: [None; 2],
            put: false,
            object: BASE,
            object_len: 2,
            nodes: [node.clone(), node],
            clients: [client.clone(), client],
            net: Vec::new(),
            flushes: self.flushes,
            aborts: self.aborts,
            truncates: self.truncates.len() as u8,
            expiries: self.expiries,
            node_restarts: self.node_restarts,
            leader_crashes: self.leader_crashes,
            dups: self.dups,
            expect: BASE,
            expect_size: 2,
            snapshot: [0; 2],
            open_cut: None,
            applied: 0,
            fenced: 0,
            wrong: 0,
            acked: 0,
            merged_abort: false,
        }]
    }

    fn actions(&self, s: &State, out: &mut Vec<Action>) {
        for c in 0..2u8 {
            out.push(Action::Grant(c));
            out.push(Action::Send(c));
            if !s.clients[usize::from(c)].ends.is_empty() {
                out.push(Action::CommitWrite(c));
            }
            if s.expiries > 0 {
                out.push(Action::Expire(c));
            }
            if s.expired & (1 << c) != 0 {
                out.push(Action::Reopen(c));
            }
        }
        for i in 0..s.net.len() as u8 {
            out.push(Action::Deliver(i));
            if s.dups > 0 {
                out.extend([Action::DeliverAndKeep(i), Action::DeliverReplyLost(i)]);
            }
        }
        if s.flushes > 0 && s.phase == Phase::Dirty {
            out.push(Action::FlushBegin);
        }
        if s.aborts > 0 {
            out.push(Action::Abort);
        }
        for n in 0..2u8 {
            out.extend([Action::Seal(n), Action::ReadPart(n), Action::Release(n)]);
            if !s.cuts.is_empty() {
                out.push(Action::CutAck(n));
            }
            if s.node_restarts > 0 {
                out.push(Action::NodeRestart(n));
            }
        }
        out.extend([Action::SealDone, Action::Put, Action::FlushCommit, Action::FenceBegin]);
        if s.truncates > 0 {
            out.push(Action::Truncate);
        }
        if s.leader_crashes > 0 {
            out.push(Action::LeaderCrash);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut s = last.clone();
        self.step(&mut s, action)?;
        Some(s)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = vec![
            Property::<Self>::always("I1 acked is readable", |m, s| {
                (0..2).all(|n| m.readable(s, n) == s.expect[n])
            }),
            Property::<Self>::always("I2 dirty before data", |_, s| {
                s.phase != Phase::Clean
                    || s.nodes.iter().all(|n| n.dirty.iter().all(|d| d.0 <= s.clean_gen))
            }),
            Property::<Self>::always("I3 clean is in S3", |_, s| {
                let len = usize::from(s.expect_size);
                s.phase != Phase::Clean
                    || (s.object[..len] == s.expect[..len]
                        && s.object_len == s.expect_size
                        && s.limit == s.expect_size
                        && s.size == s.expect_size)
            }),
            Property::<Self>::always("I3 object is one generation", |_, s| s.wrong & TORN == 0),
            Property::<Self>::always("I5 a fenced session writes nothing", |_, s| {
                s.wrong & AFTER_FENCE == 0
            }),
            Property::<Self>::always("I7 exactly once", |_, s| s.wrong & TWICE == 0),
            Property::<Self>::always("a close never regrows", |_, s| s.size <= s.expect_size),
            Property::<Self>::sometimes("all writes acked, then clean", |m, s| {
                s.phase == Phase::Clean
                    && usize::from(s.acked) == m.script[0].len() + m.script[1].len()
            }),
            Property::<Self>::sometimes(
                "written while flushing",
                |_, s| matches!(s.phase, Phase::Flushing { g } if s.nodes.iter().any(|n| n.dirty.iter().any(|d| d.0 > g))),
            ),
            Property::<Self>::sometimes("a late tag is refused", |_, s| {
                s.clients.iter().any(|c| c.pending == Pending::Refused)
            }),
        ];
        if self.aborts > 0 && self.flushes > 1 {
            all.push(Property::<Self>::sometimes("abort merges, then clean", |_, s| {
                s.merged_abort && s.phase == Phase::Clean
            }));
        }
        if !self.truncates.is_empty() {
            all.push(Property::<Self>::sometimes("cut retired, then clean", |_, s| {
                s.size_floor > 0 && s.phase == Phase::Clean
            }));
        }
        if !self.truncates.is_empty() && self.script[0] != self.script[1] {
            all.push(Property::<Self>::sometimes("written past a cut, old view behind", |_, s| {
                s.cuts.iter().any(|c| {
                    s.nodes
                        .iter()
                        .any(|n| n.view < c.version && n.dirty.iter().any(|d| d.0 <= c.generation))
                        && s.nodes.iter().any(|n| n.dirty.iter().any(|d| d.0 > c.generation))
                })
            }));
        }
        if self.expiries > 0 {
            all.push(Property::<Self>::sometimes("a reopened session writes", |_, s| {
                s.clients.iter().any(|c| c.session == 1 && c.next > 0 && !c.ends.is_empty())
                    && s.fenced != 0
            }));
        }
        all
    }
}
