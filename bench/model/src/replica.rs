//! Replication of one placement group: streams, acks, alignment, takeover, joins and losses (I1, I5, I7, I8; R41–R48).
//!
//! Three nodes and one chunk, of which a node knows what every record of the protocol treats as one: its bytes and
//! the window entries of the writes that made them. Chunks don't touch each other, because no record is about two.
//! Two clients write to the same place, one may cut afterwards; requests and retries reach any node that believes it
//! may serve, at any time, as often as they like. Who is cut off from the metadata plane is who doesn't take the
//! steps `Learn`; nothing forces a step, so partitions, pauses and late wake-ups are among the walked runs. A lease
//! that is waited for has lapsed. Acks arrive with the step that earns them, or are lost with a broken stream.
//!
//! What is true is told by the set of all states that a correct register may be in, given what was answered and
//! read so far (`possible`): a node whose value isn't among them has lost, undone or repeated something.
//! Not here: generations, floors, seals and grants ([`crate::core`], [`crate::handover`]); what S3 holds.

use stateright::{Model, Property};

use crate::rules::{Rule, Rules};

mod step;

const NODES: u8 = 3;
/// The three mutations: a write, another client's overwrite, and that client's cut.
const OPS: u8 = 3;
/// What each leaves in the chunk; 0 is "nothing dirty".
const LEAVES: [u8; OPS as usize] = [1, 2, 0];

/// One bounded configuration.
#[derive(Clone, Debug)]
pub struct Replica {
    pub rules: Rules,
    /// Members at the start, all in-sync, as a mask; node 0 is the primary.
    pub members: u8,
    /// Mutations that happen, of the three, as a mask.
    pub ops: u8,
    pub min_in_sync: u8,
    pub takeovers: u8,
    pub drops: u8,
    pub adds: u8,
    pub leaves: u8,
    pub losses: u8,
    pub restarts: u8,
    pub breaks: u8,
    /// Reads whose answer somebody acts on.
    pub reads: u8,
}

/// A group's entry in the cluster map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Entry {
    primary: u8,
    in_sync: u8,
    syncing: u8,
    /// The epoch in which this primary began (the map's `since_map_version`).
    since: u8,
}

/// A mutation that its primary hasn't answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Pending {
    op: u8,
    /// Members that acked it.
    acked: u8,
    /// What a crash before it is journaled leaves.
    before: Option<u8>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Node {
    /// The newest epoch it knows; 0: none.
    epoch: u8,
    lease: bool,
    /// Durable: the chunk and the window's entries for it.
    value: u8,
    window: u8,
    pending: Vec<Pending>,
    /// Members that are known to hold what this primary holds of the chunk.
    held: u8,
    /// Members it asked to be made in-sync, in this epoch.
    asked: u8,
    /// A chunk read for a member and not sent yet: only where writes aren't held meanwhile.
    read: Option<(u8, u8, u8)>,
    /// What a crash leaves of a member that acks before it journals.
    undo: Option<(u8, u8)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Body {
    Mutation(u8),
    /// Bytes, window entries.
    Chunk(u8, u8),
    /// The windows alone, before all chunks: only as the rule's removal.
    Windows(u8),
    /// The end mark; with the entries where the chunk isn't dirty and so wasn't named.
    End(Option<u8>),
}

/// One connection, from a primary to a member.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Stream {
    from: u8,
    to: u8,
    /// The primary uses it. What is under way in one that it gave up may still arrive.
    live: bool,
    /// The chunk went into the stream.
    sent: bool,
    /// The member acked it.
    aligned: bool,
    end: End,
    /// (epoch, what), oldest first.
    queue: Vec<(u8, Body)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum End {
    No,
    Sent,
    Acked,
}

/// A state; the last block is the observer's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    /// The group's entry in each epoch, from 1 on; forgotten ones that nobody needs are blank.
    map: Vec<Entry>,
    /// Commands "make in-sync" under way: (epoch, member).
    asks: Vec<(u8, u8)>,
    nodes: [Node; NODES as usize],
    /// Nodes whose disk is gone.
    lost: u8,
    streams: Vec<Stream>,
    takeovers: u8,
    drops: u8,
    adds: u8,
    leaves: u8,
    losses: u8,
    restarts: u8,
    breaks: u8,
    reads: u8,
    /// Mutations that reached a node; that were answered.
    begun: u8,
    answered: u8,
    /// Bit `value * 8 + done`: the register may hold `value`, with the mutations `done` having taken effect.
    possible: u32,
    wrong: u8,
}

const TWICE: u8 = 1;
const STALE: u8 = 2;
const THIN: u8 = 4;

/// One step of one party, or of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A request or a retry of a mutation reaches a node.
    Deliver {
        op: u8,
        node: u8,
    },
    Answer {
        op: u8,
        node: u8,
    },
    Read {
        node: u8,
    },
    Open {
        from: u8,
        to: u8,
    },
    ReadChunk {
        from: u8,
        to: u8,
    },
    SendChunk {
        from: u8,
        to: u8,
    },
    SendEnd {
        from: u8,
        to: u8,
    },
    Take {
        from: u8,
        to: u8,
        live: bool,
        at: u8,
    },
    Break {
        from: u8,
        to: u8,
    },
    Ask {
        from: u8,
        to: u8,
    },
    InSync {
        ask: u8,
    },
    Learn {
        node: u8,
    },
    TakeOver {
        node: u8,
        keep_old: bool,
    },
    Drop {
        node: u8,
    },
    Add {
        node: u8,
    },
    Leave {
        node: u8,
    },
    Lose {
        node: u8,
    },
    Restart {
        node: u8,
        torn: bool,
    },
}

fn bit(n: u8) -> u8 {
    1 << n
}

fn has(mask: u8, n: u8) -> bool {
    mask & bit(n) != 0
}

impl State {
    fn epoch(&self) -> u8 {
        self.map.len() as u8
    }
    fn entry(&self) -> Entry {
        self.map[self.map.len() - 1]
    }
    fn node(&self, n: u8) -> &Node {
        &self.nodes[usize::from(n)]
    }
    /// The entry by which `n` believes to be primary.
    fn led(&self, n: u8) -> Option<Entry> {
        let epoch = self.node(n).epoch;
        let entry = *self.map.get(usize::from(epoch.checked_sub(1)?))?;
        (entry.primary == n && entry.since > 0 && !has(self.lost, n)).then_some(entry)
    }
    fn live(&self, from: u8, to: u8) -> Option<&Stream> {
        self.streams.iter().find(|s| s.from == from && s.to == to && s.live)
    }
    /// Whether a correct register may hold `value` now.
    fn may_hold(&self, value: u8) -> bool {
        self.possible >> (value * 8) & 0xff != 0
    }
    fn survivors(&self) -> u8 {
        self.entry().in_sync & !self.lost
    }
}

impl Replica {
    fn primary_actions(&self, s: &State, node: u8, out: &mut Vec<Action>) {
        let Some(entry) = s.led(node) else { return };
        if self.serves(s, node) {
            for op in (0..OPS).filter(|op| has(self.ops & !s.answered, *op)) {
                let pending = s.node(node).pending.iter().any(|p| p.op == op);
                out.push(match pending {
                    true => Action::Answer { op, node },
                    false => Action::Deliver { op, node },
                });
            }
            if s.reads > 0 {
                out.push(Action::Read { node });
            }
        }
        let members = (entry.in_sync | entry.syncing) & !bit(node);
        for to in (0..NODES).filter(|to| has(members, *to)) {
            let from = node;
            let Some(stream) = s.live(from, to) else {
                out.push(Action::Open { from, to });
                continue;
            };
            if !stream.sent {
                out.push(Action::SendChunk { from, to });
                if !self.rules.on(Rule::ChunkHeld) {
                    out.push(Action::ReadChunk { from, to });
                }
            }
            if stream.end == End::No {
                out.push(Action::SendEnd { from, to });
            }
            if has(entry.syncing, to) {
                out.push(Action::Ask { from, to });
            }
            if s.breaks > 0 && !stream.queue.is_empty() {
                out.push(Action::Break { from, to });
            }
        }
    }
}

impl Model for Replica {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let entry = Entry { primary: 0, in_sync: self.members, syncing: 0, since: 1 };
        let mut nodes: [Node; NODES as usize] = Default::default();
        let mut streams = Vec::new();
        for n in 0..NODES {
            nodes[usize::from(n)].epoch = 1;
            if n > 0 && has(self.members, n) {
                streams.push(Stream {
                    from: 0,
                    to: n,
                    live: true,
                    sent: true,
                    aligned: true,
                    end: End::Acked,
                    queue: Vec::new(),
                });
            }
        }
        nodes[0].lease = true;
        nodes[0].held = self.members & !1;
        vec![State {
            map: vec![entry],
            asks: Vec::new(),
            nodes,
            lost: 0,
            streams,
            takeovers: self.takeovers,
            drops: self.drops,
            adds: self.adds,
            leaves: self.leaves,
            losses: self.losses,
            restarts: self.restarts,
            breaks: self.breaks,
            reads: self.reads,
            begun: 0,
            answered: 0,
            possible: 1,
            wrong: 0,
        }]
    }

    fn actions(&self, s: &State, out: &mut Vec<Action>) {
        let entry = s.entry();
        let members = entry.in_sync | entry.syncing;
        for node in (0..NODES).filter(|n| !has(s.lost, *n)) {
            self.primary_actions(s, node, out);
            let known = s.node(node).epoch;
            if known != s.epoch() {
                out.push(Action::Learn { node });
            }
            if s.takeovers > 0 && has(members, node) && node != entry.primary {
                out.push(Action::TakeOver { node, keep_old: true });
                out.push(Action::TakeOver { node, keep_old: false });
            }
            if s.adds > 0 && !has(members, node) {
                out.push(Action::Add { node });
            }
            if s.leaves > 0 && has(members, node) {
                out.push(Action::Leave { node });
            }
            if s.losses > 0 && has(members, node) {
                out.push(Action::Lose { node });
            }
            if s.restarts > 0 && known != 0 {
                out.push(Action::Restart { node, torn: false });
                if s.node(node).pending.last().is_some_and(|p| p.before.is_some()) {
                    out.push(Action::Restart { node, torn: true });
                }
            }
        }
        if s.drops > 0 {
            let drop = (0..NODES).filter(|n| has(members, *n));
            out.extend(drop.map(|node| Action::Drop { node }));
        }
        for stream in &s.streams {
            let Stream { from, to, live, .. } = *stream;
            let in_order = self.rules.on(Rule::OneOrder);
            let end = if in_order { stream.queue.len().min(1) } else { stream.queue.len() };
            out.extend((0..end as u8).map(|at| Action::Take { from, to, live, at }));
        }
        out.extend((0..s.asks.len() as u8).map(|ask| Action::InSync { ask }));
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut s = last.clone();
        self.step(&mut s, action)?;
        self.tidy(&mut s);
        Some(s)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = vec![
            Property::<Self>::always("I7 a retry never lands over a newer write", |_, s| {
                s.wrong & TWICE == 0
            }),
            Property::<Self>::always("I8 an in-sync copy stays", |_, s| s.survivors() != 0),
            Property::<Self>::always("I1 acked is at every in-sync member", |_, s| {
                (0..NODES).filter(|n| has(s.survivors(), *n)).all(|n| s.may_hold(s.node(n).value))
            }),
            Property::<Self>::always("I5 what is served is true", |m, s| {
                s.wrong & STALE == 0
                    && (0..NODES).filter(|n| m.answers(s, *n)).all(|n| s.may_hold(s.node(n).value))
            }),
            Property::<Self>::always("I5 one primary serves", |m, s| {
                (0..NODES).filter(|n| m.serves(s, *n)).count() <= 1
            }),
            Property::<Self>::always("acked on min_in_sync nodes", |_, s| s.wrong & THIN == 0),
        ];
        if self.takeovers > 0 {
            all.push(Property::<Self>::sometimes("all answered after a takeover", |m, s| {
                s.entry().since > 1 && s.entry().primary != 0 && s.answered == m.ops
            }));
            all.push(Property::<Self>::sometimes("a retry is answered from the window", |m, s| {
                (0..NODES).filter(|n| m.answers(s, *n)).any(|n| {
                    let node = s.node(n);
                    let known = node.window & s.begun & !s.answered;
                    node.pending.iter().fold(known, |k, p| k & !bit(p.op)) != 0
                })
            }));
        }
        if self.takeovers > 1 || self.members.count_ones() > 2 {
            all.push(Property::<Self>::sometimes(
                "an old primary sends beside the new one",
                |_, s| {
                    let new = s.entry().primary;
                    s.streams.iter().any(|t| t.from != new && !t.queue.is_empty())
                        && s.streams.iter().any(|t| t.from == new && t.live)
                },
            ));
        }
        if self.takeovers > 1 {
            all.push(Property::<Self>::sometimes("taken over in the middle of a copy", |_, s| {
                let led = |t: &Stream| s.led(t.from).map_or(0, |e| e.in_sync);
                s.streams.iter().any(|t| {
                    t.from != s.entry().primary
                        && t.to == s.entry().primary
                        && t.live
                        && has(led(t), t.to)
                        && t.sent
                        && t.end != End::Acked
                })
            }));
        }
        if self.adds > 0 {
            all.push(Property::<Self>::sometimes("a new member is in-sync", |m, s| {
                s.entry().in_sync & !m.members != 0
            }));
            all.push(Property::<Self>::sometimes("answered while a member is aligned", |_, s| {
                let n = s.entry().primary;
                s.node(n).window & s.answered != 0
                    && s.streams.iter().any(|t| {
                        let aligned = t.from == n && t.live && t.end == End::No;
                        aligned && t.sent && t.queue.len() > 1 && has(s.entry().syncing, t.to)
                    })
            }));
        }
        if self.adds > 0 && self.drops > 0 {
            all.push(Property::<Self>::sometimes("in-sync again after a drop", |m, s| {
                let back = m.members.count_ones() < 2 || s.entry().in_sync == m.members;
                let spent = s.drops == 0 && s.adds == 0;
                spent && back && s.entry().in_sync.count_ones() > 1 && s.answered == m.ops
            }));
        }
        if self.adds > 0 && self.takeovers > 1 {
            all.push(Property::<Self>::sometimes("the new member took over", |m, s| {
                s.led(s.entry().primary).is_some_and(|e| !has(m.members, e.primary))
            }));
        }
        if self.leaves > 0 {
            all.push(Property::<Self>::sometimes("one left, one lost, all acked", |m, s| {
                s.leaves < m.leaves && s.losses == 0 && s.answered == m.ops
            }));
        }
        if self.restarts > 0 {
            all.push(Property::<Self>::sometimes("a restarted primary serves again", |m, s| {
                s.entry().since > 1 && s.entry().primary == 0 && m.serves(s, 0)
            }));
        }
        all
    }
}
