//! A placement group changes hands: planned hand-over, stand-in, leases, stale clients (I1, I2, I5, I7, I8).
//!
//! One inode with one chunk in one group of two possible primaries; the map version alternates between
//! them. Floors do **not** move: the receiver refuses grants older than its `since_map_version`. Time is
//! reduced to its one use: "waited lease + drift" may happen only after the node's own clock ended its
//! lease, which is what that wait buys. Seal and upload are single steps here ([`crate::core`] splits them).

use stateright::{Model, Property};

use crate::rules::{Rule, Rules};

const BASE: u8 = 30;

/// One bounded configuration.
#[derive(Clone, Debug)]
pub struct Handover {
    pub rules: Rules,
    /// Writes per client.
    pub script: [u8; 2],
    pub flushes: u8,
    pub moves: u8,
    pub partitions: u8,
    pub node_restarts: u8,
    pub dups: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Clean,
    Dirty,
    Sealing(u8),
    Flushing(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Move {
    None,
    Freezing,
    Frozen,
    Drained,
    Acked,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Node {
    map: u8,
    lease: bool,
    frozen: bool,
    floor: u8,
    dirty: Vec<(u8, u8)>,
    pin: Option<(u8, u8)>,
    seen: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Client {
    map: u8,
    /// (generation, least map version).
    grant: Option<(u8, u8)>,
    next: u8,
    waiting: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Write {
    client: u8,
    index: u8,
    tag: u8,
    least_map: u8,
    map: u8,
}

impl Write {
    fn id(self) -> u8 {
        1 + self.client * 4 + self.index
    }
}

/// A state; the last block is the observer's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct State {
    phase: Phase,
    generation: u8,
    top: u8,
    clean_gen: u8,
    map: u8,
    moving: Move,
    /// What the seals told the metadata plane of the group's window.
    window: u16,
    part: Option<u8>,
    object: u8,
    cut_off: [bool; 2],
    nodes: [Node; 2],
    clients: [Client; 2],
    net: Vec<Write>,
    flushes: u8,
    moves: u8,
    partitions: u8,
    node_restarts: u8,
    dups: u8,
    expect: u8,
    applied: u16,
    twice: bool,
    acked: u8,
    refused_since: bool,
}

/// One step of one party, or of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Grant(u8),
    LearnMap(u8),
    Send(u8),
    Deliver(u8),
    DeliverAndKeep(u8),
    DeliverReplyLost(u8),
    FlushBegin,
    Seal,
    ReadPart,
    PutAndCommit,
    Release(u8),
    MoveBegin,
    Freeze,
    Drained,
    AckEpoch,
    EpochCommit,
    StandIn,
    Partition(u8),
    Heal(u8),
    LeaseLapse(u8),
    Heartbeat(u8),
    NodeRestart(u8),
}

fn primary(map: u8) -> usize {
    usize::from((map + 1) % 2)
}

impl Handover {
    fn on(&self, rule: Rule) -> bool {
        self.rules.on(rule)
    }

    fn serves(&self, node: &Node, n: usize, map: u8) -> bool {
        let epoch = !self.on(Rule::EpochEqual) || (map == node.map && primary(node.map) == n);
        epoch && (node.lease || !self.on(Rule::LeaseOnServe))
    }

    fn deliver(&self, s: &mut State, i: usize, keep: bool, reply_lost: bool) {
        let w = s.net[i];
        if !keep {
            s.net.remove(i);
        }
        let n = primary(w.map);
        let old_grant = self.on(Rule::SinceMapVersion) && w.least_map < s.nodes[n].map;
        let refused = !self.serves(&s.nodes[n], n, w.map) || s.nodes[n].frozen || old_grant;
        let node = &mut s.nodes[n];
        let known = node.seen & (1 << w.id()) != 0;
        let client = &mut s.clients[usize::from(w.client)];
        if refused || (!known && w.tag < node.floor) {
            s.refused_since |= old_grant;
            if !reply_lost && client.next == w.index {
                client.waiting = false;
            }
            return;
        }
        if !known {
            match node.dirty.iter().position(|d| d.0 >= w.tag) {
                Some(p) if node.dirty[p].0 == w.tag => node.dirty[p].1 = w.id(),
                Some(p) => node.dirty.insert(p, (w.tag, w.id())),
                None => node.dirty.push((w.tag, w.id())),
            }
            node.floor = node.floor.max(w.tag);
            node.seen |= 1 << w.id();
            if s.applied & (1 << w.id()) != 0 {
                s.twice = true;
            } else {
                s.applied |= 1 << w.id();
                s.expect = w.id();
            }
        }
        if !reply_lost && client.next == w.index {
            client.next += 1;
            client.waiting = false;
            s.acked += 1;
        }
    }

    fn dirty(s: &State, n: usize) -> Option<u8> {
        s.nodes[n].dirty.iter().rev().find(|d| d.0 > s.clean_gen).map(|d| d.1)
    }

    /// The current primary, if it is in reach and knows that it is.
    fn active(s: &State) -> Option<usize> {
        let n = primary(s.map);
        (!s.cut_off[n] && s.nodes[n].map == s.map).then_some(n)
    }

    fn step(&self, s: &mut State, action: Action) -> Option<()> {
        match action {
            Action::Grant(c) => {
                let c = &mut s.clients[usize::from(c)];
                let fresh = c.grant.is_none_or(|g| g.0 < s.generation || g.1 < s.map);
                if !fresh || matches!(s.phase, Phase::Sealing(_)) {
                    return None;
                }
                c.grant = Some((s.generation, s.map));
                s.top = s.top.max(s.generation);
                if s.phase == Phase::Clean {
                    s.phase = Phase::Dirty;
                }
            }
            Action::LearnMap(c) => s.clients[usize::from(c)].map = s.map,
            Action::Send(c) => {
                let limit = self.script[usize::from(c)];
                let client = &mut s.clients[usize::from(c)];
                let index = client.next;
                let lost = !s.net.iter().any(|w| w.client == c && w.index == index);
                let (tag, least_map) = client.grant?;
                let behind = self.on(Rule::MapNotOlderThanGrant) && client.map < least_map;
                if index >= limit || (client.waiting && !lost) || behind {
                    return None;
                }
                client.waiting = true;
                s.net.push(Write { client: c, index, tag, least_map, map: client.map });
                s.net.sort_unstable();
            }
            Action::Deliver(i) => self.deliver(s, usize::from(i), false, false),
            Action::DeliverAndKeep(i) => {
                s.dups -= 1;
                self.deliver(s, usize::from(i), true, false);
            }
            Action::DeliverReplyLost(i) => {
                s.dups -= 1;
                self.deliver(s, usize::from(i), false, true);
            }
            Action::FlushBegin => {
                s.flushes -= 1;
                s.phase = Phase::Sealing(s.generation);
            }
            Action::Seal => {
                let Phase::Sealing(g) = s.phase else { return None };
                let n = Self::active(s)?;
                let held = Self::dirty(s, n).unwrap_or(0);
                let node = &mut s.nodes[n];
                node.floor = node.floor.max(g + 1);
                node.pin = Some((g, held));
                if self.on(Rule::WindowMoves) {
                    s.window |= node.seen;
                }
                s.generation = g + 1;
                s.part = None;
                s.phase = Phase::Flushing(g);
            }
            Action::ReadPart => {
                let Phase::Flushing(g) = s.phase else { return None };
                let n = Self::active(s)?;
                if s.part.is_some() {
                    return None;
                }
                let held = s.nodes[n].pin.filter(|p| p.0 == g).map_or(0, |p| p.1);
                s.part = Some(if held == 0 { s.object } else { held });
            }
            Action::PutAndCommit => {
                let Phase::Flushing(g) = s.phase else { return None };
                s.object = s.part.take()?;
                s.clean_gen = g;
                s.phase = if s.top > g { Phase::Dirty } else { Phase::Clean };
            }
            Action::Release(n) => {
                let n = usize::from(n);
                let node = &mut s.nodes[n];
                let old = node.dirty.iter().any(|d| d.0 <= s.clean_gen)
                    || node.pin.is_some_and(|p| p.0 <= s.clean_gen);
                if s.cut_off[n] || !old {
                    return None;
                }
                node.dirty.retain(|d| d.0 > s.clean_gen);
                node.pin = node.pin.filter(|p| p.0 > s.clean_gen);
            }
            Action::MoveBegin => {
                if s.moving != Move::None || Self::active(s).is_none() {
                    return None;
                }
                s.moves -= 1;
                s.moving = Move::Freezing;
            }
            Action::Freeze => {
                let n = Self::active(s)?;
                if s.moving != Move::Freezing {
                    return None;
                }
                s.nodes[n].frozen = self.on(Rule::FreezeBeforeDrain);
                s.moving = Move::Frozen;
            }
            Action::Drained => {
                let n = Self::active(s)?;
                let empty = s.nodes[n].dirty.is_empty() && s.nodes[n].pin.is_none();
                if s.moving != Move::Frozen || (!empty && self.on(Rule::DrainedBeforeEpoch)) {
                    return None;
                }
                if self.on(Rule::WindowMoves) {
                    s.window |= s.nodes[n].seen;
                }
                s.moving = Move::Drained;
            }
            Action::AckEpoch => {
                let n = Self::active(s)?;
                if s.moving != Move::Drained {
                    return None;
                }
                s.nodes[n].lease = false;
                s.moving = Move::Acked;
            }
            Action::EpochCommit => {
                let waited = !s.nodes[primary(s.map)].lease || !self.on(Rule::EpochWaitsForLease);
                if s.moving != Move::Acked && !(s.moving == Move::Drained && waited) {
                    return None;
                }
                s.map += 1;
                s.moving = Move::None;
            }
            Action::StandIn => {
                let n = primary(s.map);
                let waited = !s.nodes[n].lease || !self.on(Rule::EpochWaitsForLease);
                let clean = s.phase == Phase::Clean || !self.on(Rule::StrandedWaits);
                if !s.cut_off[n] || !waited || !clean || s.moves == 0 {
                    return None;
                }
                s.moves -= 1;
                s.map += 1;
                s.moving = Move::None;
            }
            Action::Partition(n) => {
                if s.cut_off[usize::from(n)] {
                    return None;
                }
                s.partitions -= 1;
                s.cut_off[usize::from(n)] = true;
            }
            Action::Heal(n) => {
                if !s.cut_off[usize::from(n)] {
                    return None;
                }
                s.cut_off[usize::from(n)] = false;
            }
            Action::LeaseLapse(n) => {
                let node = &mut s.nodes[usize::from(n)];
                if !node.lease || !s.cut_off[usize::from(n)] {
                    return None;
                }
                node.lease = false;
            }
            Action::Heartbeat(n) => {
                let n = usize::from(n);
                let mine = primary(s.map) == n;
                let node = &mut s.nodes[n];
                let idle = node.map == s.map && (node.lease || !mine || s.moving == Move::Acked);
                if s.cut_off[n] || idle {
                    return None;
                }
                if node.map < s.map {
                    // Floors do not travel: what the node held of the group is gone either way.
                    *node = Node { map: s.map, floor: 1, seen: s.window, ..Node::default() };
                }
                node.lease = mine;
            }
            Action::NodeRestart(n) => {
                // With a journaled freeze a restart changes nothing that this model holds.
                if self.on(Rule::FreezeJournaled) {
                    return None;
                }
                s.node_restarts -= 1;
                s.nodes[usize::from(n)].frozen = false;
            }
        }
        Some(())
    }
}

impl Model for Handover {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let client = Client { map: 1, grant: None, next: 0, waiting: false };
        let node = |lease| Node { map: 1, lease, floor: 1, ..Node::default() };
        vec![State {
            phase: Phase::Clean,
            generation: 1,
            top: 0,
            clean_gen: 0,
            map: 1,
            moving: Move::None,
            window: 0,
            part: None,
            object: BASE,
            cut_off: [false; 2],
            nodes: [node(true), node(false)],
            clients: [client.clone(), client],
            net: Vec::new(),
            flushes: self.flushes,
            moves: self.moves,
            partitions: self.partitions,
            node_restarts: self.node_restarts,
            dups: self.dups,
            expect: BASE,
            applied: 0,
            twice: false,
            acked: 0,
            refused_since: false,
        }]
    }

    fn actions(&self, s: &State, out: &mut Vec<Action>) {
        for i in 0..2u8 {
            out.extend([
                Action::Grant(i),
                Action::Send(i),
                Action::Release(i),
                Action::Heal(i),
                Action::LeaseLapse(i),
                Action::Heartbeat(i),
            ]);
            if s.clients[usize::from(i)].map < s.map {
                out.push(Action::LearnMap(i));
            }
            if s.partitions > 0 {
                out.push(Action::Partition(i));
            }
            if s.node_restarts > 0 {
                out.push(Action::NodeRestart(i));
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
        if s.moves > 0 {
            out.push(Action::MoveBegin);
        }
        out.extend([
            Action::Seal,
            Action::ReadPart,
            Action::PutAndCommit,
            Action::Freeze,
            Action::Drained,
            Action::AckEpoch,
            Action::EpochCommit,
            Action::StandIn,
        ]);
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut s = last.clone();
        self.step(&mut s, action)?;
        Some(s)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut all = vec![
            Property::<Self>::always("I1 acked is readable", |_, s| {
                Self::dirty(s, primary(s.map)).unwrap_or(s.object) == s.expect
            }),
            Property::<Self>::always("I2 dirty before data", |_, s| {
                s.phase != Phase::Clean || (0..2).all(|n| Self::dirty(s, n).is_none())
            }),
            Property::<Self>::always("I3 clean is in S3", |_, s| {
                s.phase != Phase::Clean || s.object == s.expect
            }),
            Property::<Self>::always("I5 no stale dirty read", |m, s| {
                (0..2).all(|n| {
                    let node = &s.nodes[n];
                    let asked =
                        s.clients.iter().any(|c| primary(c.map) == n && m.serves(node, n, c.map));
                    !asked || node.dirty.last().is_none_or(|d| d.1 == s.expect)
                })
            }),
            Property::<Self>::always("I7 exactly once", |_, s| !s.twice),
            Property::<Self>::sometimes("all acked and clean after a move", |m, s| {
                s.map > 1 && s.phase == Phase::Clean && s.acked == m.script[0] + m.script[1]
            }),
            Property::<Self>::sometimes("a grant from before the move is refused", |_, s| {
                s.refused_since
            }),
        ];
        if self.partitions > 0 {
            all.push(Property::<Self>::sometimes(
                "stand-in while the old primary is alone",
                |_, s| s.map == 2 && s.cut_off[0] && s.nodes[0].map == 1 && s.nodes[1].lease,
            ));
            all.push(Property::<Self>::sometimes("dirty and stranded", |_, s| {
                let n = primary(s.map);
                s.cut_off[n] && Self::dirty(s, n).is_some() && !s.nodes[n].lease
            }));
        }
        all
    }
}
