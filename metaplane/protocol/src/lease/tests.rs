//! Both halves against each other: clients that ask, change, pause and are told late; leaders that change.

use super::*;
use crate::attr::{Attr, FileKind, Time};
use ebb_dataplane_protocol::{ContentId, Generation, InodeId, Lineage, SessionId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::time::Instant;

const INODES: usize = 5;
const CLIENTS: usize = 3;

/// Versions of every inode that somebody knows to have been there.
type Known = [u64; INODES];

fn join(a: &mut Known, b: &Known) {
    for (a, b) in a.iter_mut().zip(b) {
        *a = (*a).max(*b);
    }
}

fn attr(inode: usize, version: u64) -> Attr {
    Attr {
        inode: InodeId(inode as u64),
        kind: FileKind::File,
        mode: 0o644,
        uid: 0,
        gid: 0,
        nlink: 1,
        size: version,
        atime: Time(0),
        mtime: Time(0),
        ctime: Time(0),
        generation: Generation(0),
        content: ContentId(0),
        lineage: Lineage(0),
        dirty: false,
    }
}

/// What breaks a rule, for the tests that it is needed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Break {
    Nothing,
    /// Commands are answered before what they changed is forgotten.
    OpsDoNotWait,
    /// Questions are.
    QueriesDoNotWait,
    /// A command that looked at what is being forgotten is not held up by it.
    ReadsDoNotWait,
    /// The client counts a lease from the answer's arrival.
    FromArrival,
    /// A new leader serves at once.
    NoHold,
    /// What was asked before a recall came is remembered.
    KeptThoughRecalled,
    /// A recall is acknowledged and not carried out.
    NotForgotten,
    /// A late command takes back what was told since.
    LateCommand,
    /// A late call is taken for a new one.
    LateCall,
    /// What an earlier epoch told is kept.
    EpochKept,
}

#[derive(Clone)]
enum Message {
    Query { inode: usize, ticket: Ticket },
    Told { inode: usize, ticket: Ticket, version: u64, lease: Option<Lease>, knows: Known },
    Op { id: usize, dropped: Vec<(InodeId, u64)> },
    Done { id: usize },
    Watch { watch: Watch, sent: Instant },
    Watched { watch: Watch, sent: Instant, answer: Watched },
}

/// A command of a client: looks at one inode, changes another.
struct Op {
    read: usize,
    write: usize,
    /// What its carrying out told, once it was.
    applied: Option<Known>,
    answered: bool,
}

struct Sim {
    rng: StdRng,
    without: Break,
    now: Instant,
    leases: Leases,
    term: u64,
    serves_from: Instant,
    versions: Known,
    /// What each inode's version tells.
    tells: [Known; INODES],
    clients: Vec<Cache>,
    paused: [Instant; CLIENTS],
    /// One call of each client is out.
    calling: [Option<u64>; CLIENTS],
    ops: Vec<Op>,
    /// (when, whose, what)
    net: Vec<(Instant, usize, Message)>,
    /// Answers that wait.
    waiting: Vec<(Vec<u64>, usize, Message)>,
    known: Known,
    hits: u64,
    recalls: u64,
}

fn session(client: usize) -> SessionId {
    SessionId(client as u64 + 1)
}

fn id(inode: usize) -> InodeId {
    InodeId(inode as u64)
}

impl Sim {
    fn new(seed: u64, without: Break) -> Self {
        let now = Instant::now();
        let mut leases = Leases::default();
        leases.lead(1);
        Self {
            rng: StdRng::seed_from_u64(seed),
            without,
            now,
            leases,
            term: 1,
            serves_from: now,
            versions: [1; INODES],
            tells: std::array::from_fn(|i| std::array::from_fn(|j| u64::from(i == j))),
            clients: (0..CLIENTS).map(|_| Cache::default()).collect(),
            paused: [now; CLIENTS],
            calling: [None; CLIENTS],
            ops: Vec::new(),
            net: Vec::new(),
            waiting: Vec::new(),
            known: [0; INODES],
            hits: 0,
            recalls: 0,
        }
    }

    fn send(&mut self, client: usize, message: Message) {
        let slow = self.rng.random_range(0..40) == 0;
        let most = if slow { 2_500 } else { 30 };
        let delay = Duration::from_millis(self.rng.random_range(1..most));
        self.net.push((self.now + delay, client, message));
    }

    fn ask(&mut self, client: usize) -> Option<String> {
        let inode = self.rng.random_range(0..INODES);
        if let Some(a) = self.clients[client].attr(id(inode), self.now) {
            self.hits += 1;
            if a.size < self.known[inode] {
                let known = self.known[inode];
                return Some(format!("{client} says {inode} is {}, but it was {known}", a.size));
            }
            let told = self.tells[inode];
            // It may be an older version than the newest: then it tells of itself only.
            if told[inode] == a.size {
                join(&mut self.known, &told);
            }
            return None;
        }
        let ticket = self.clients[client].asks();
        self.send(client, Message::Query { inode, ticket });
        None
    }

    fn change(&mut self, client: usize) {
        let read = self.rng.random_range(0..INODES);
        let write = self.rng.random_range(0..INODES);
        let op = self.ops.len();
        self.ops.push(Op { read, write, applied: None, answered: false });
        let dropped = self.clients[client].forgets(&[id(write)]);
        if self.rng.random_range(0..5) == 0 {
            self.send(client, Message::Op { id: op, dropped: dropped.clone() });
        }
        self.send(client, Message::Op { id: op, dropped });
    }

    fn call(&mut self, client: usize) {
        if self.calling[client].is_some() {
            return;
        }
        let watch = self.clients[client].watch();
        self.calling[client] = Some(watch.call);
        let sent = self.now;
        if self.rng.random_range(0..5) == 0 {
            self.send(client, Message::Watch { watch, sent });
        }
        self.send(client, Message::Watch { watch, sent });
    }

    /// The leader gets a message.
    fn lead(&mut self, client: usize, message: Message) {
        if self.now < self.serves_from && self.without != Break::NoHold {
            // Not served yet: asked again.
            return self.send(client, message);
        }
        match message {
            Message::Query { inode, ticket } => {
                let lease = self.leases.grant(session(client), &[id(inode)], self.now);
                let mut waits = self.leases.waits(&[id(inode)]);
                if self.without == Break::QueriesDoNotWait {
                    waits.clear();
                }
                let (version, knows) = (self.versions[inode], self.tells[inode]);
                let told = Message::Told { inode, ticket, version, lease, knows };
                self.waiting.push((waits, client, told));
            }
            Message::Op { id: op, mut dropped } => {
                if self.without == Break::LateCommand {
                    dropped.iter_mut().for_each(|d| d.1 = u64::MAX);
                }
                self.leases.dropped(session(client), &dropped);
                let Op { read, write, applied, .. } = self.ops[op];
                let mut waits = match applied {
                    // A retry: whatever its change left to be forgotten is waited for.
                    Some(_) => self.leases.waits(&[id(read), id(write)]),
                    None => {
                        let looked = if self.without == Break::ReadsDoNotWait {
                            vec![]
                        } else {
                            vec![id(read)]
                        };
                        let waits = self.leases.applied(&looked, &[id(write)], self.now);
                        self.versions[write] += 1;
                        let mut tells = self.tells[read];
                        join(&mut tells, &self.tells[write]);
                        tells[write] = self.versions[write];
                        self.tells[write] = tells;
                        self.ops[op].applied = Some(tells);
                        waits
                    }
                };
                if self.without == Break::OpsDoNotWait {
                    waits.clear();
                }
                self.waiting.push((waits, client, Message::Done { id: op }));
            }
            Message::Watch { mut watch, sent } => {
                if self.without == Break::LateCall {
                    watch.call += self.rng.random_range(0..1_000_000);
                }
                let mut answer = self.leases.watch(session(client), watch, self.now);
                if answer.recalled.is_empty() {
                    // Held for a while, as the port does; what came meanwhile is in the answer.
                    (answer.recalled, answer.through) =
                        self.leases.recalls(session(client), answer.epoch);
                }
                self.recalls += answer.recalled.len() as u64;
                self.send(client, Message::Watched { watch, sent, answer });
            }
            _ => {}
        }
    }

    /// A client gets a message.
    fn arrive(&mut self, client: usize, message: Message) {
        let cache = &mut self.clients[client];
        match message {
            Message::Told { inode, mut ticket, version, lease, knows } => {
                if self.without == Break::KeptThoughRecalled {
                    ticket = cache.asks();
                }
                if let Some(lease) = lease {
                    cache.told(ticket, lease, &attr(inode, version));
                }
                join(&mut self.known, &knows);
            }
            Message::Done { id: op } => {
                if std::mem::replace(&mut self.ops[op].answered, true) {
                    return;
                }
                if let Some(knows) = &self.ops[op].applied {
                    join(&mut self.known, knows);
                }
            }
            Message::Watched { watch, sent, mut answer } => {
                // A repetition's answer is the same call's.
                if self.calling[client] != Some(watch.call) && self.without != Break::LateCall {
                    return;
                }
                self.calling[client] = None;
                let sent = if self.without == Break::FromArrival { self.now } else { sent };
                if self.without == Break::NotForgotten {
                    answer.recalled.clear();
                }
                if self.without == Break::EpochKept {
                    cache.epoch = answer.epoch;
                }
                cache.answered(watch, sent, &answer);
            }
            _ => {}
        }
    }

    fn step(&mut self) -> Option<String> {
        let pause = if self.rng.random_range(0..60) == 0 { 700 } else { 6 };
        self.now += Duration::from_millis(self.rng.random_range(0..pause));
        self.leases.expire(self.now);
        let client = self.rng.random_range(0..CLIENTS);
        let awake = self.paused[client] <= self.now;
        match self.rng.random_range(0..400) {
            0 => {
                self.term += 1;
                self.leases.lead(self.term);
                self.serves_from = self.now + LEASE;
                // Answers of the leader before are refused; they are asked for again.
                for (_, client, message) in std::mem::take(&mut self.waiting) {
                    match message {
                        Message::Done { id } => {
                            self.send(client, Message::Op { id, dropped: Vec::new() });
                        }
                        Message::Told { inode, ticket, .. } => {
                            self.send(client, Message::Query { inode, ticket });
                        }
                        _ => {}
                    }
                }
            }
            1 => {
                let pause = Duration::from_millis(self.rng.random_range(0..3_000));
                self.paused[client] = self.now + pause;
            }
            2 if awake => {
                self.clients[client].reset();
                self.calling[client] = None;
            }
            3..20 if awake => self.change(client),
            20..120 if awake => self.call(client),
            120..330 if awake => return self.ask(client),
            _ => {}
        }
        for n in (0..self.waiting.len()).rev() {
            if !self.leases.is_pending(&self.waiting[n].0) {
                let (_, client, message) = self.waiting.swap_remove(n);
                self.send(client, message);
            }
        }
        for _ in 0..3 {
            let ready: Vec<usize> = (0..self.net.len())
                .filter(|&i| {
                    let (at, client, message) = &self.net[i];
                    let to_client = !matches!(
                        message,
                        Message::Query { .. } | Message::Op { .. } | Message::Watch { .. }
                    );
                    *at <= self.now && !(to_client && self.paused[*client] > self.now)
                })
                .collect();
            if ready.is_empty() {
                break;
            }
            let next = ready[self.rng.random_range(0..ready.len())];
            let (_, client, message) = self.net.swap_remove(next);
            match message {
                m @ (Message::Query { .. } | Message::Op { .. } | Message::Watch { .. }) => {
                    self.lead(client, m);
                }
                m => self.arrive(client, m),
            }
        }
        None
    }
}

fn run(seed: u64, without: Break) -> (u64, u64, Option<String>) {
    let mut sim = Sim::new(seed, without);
    for step in 0..2_500 {
        if let Some(wrong) = sim.step() {
            return (sim.hits, sim.recalls, Some(format!("seed {seed} step {step}: {wrong}")));
        }
    }
    (sim.hits, sim.recalls, None)
}

#[test]
fn what_is_remembered_is_never_old() {
    let (mut hits, mut recalls) = (0, 0);
    for seed in 0..600 {
        let (h, r, wrong) = run(seed, Break::Nothing);
        assert_eq!(wrong, None);
        hits += h;
        recalls += r;
    }
    println!("{hits} answers from memory, {recalls} recalls");
    assert!(hits > 20_000 && recalls > 10_000, "{hits} answers from memory, {recalls} recalls");
}

#[test]
fn every_part_of_the_rules_is_needed() {
    for without in [
        Break::OpsDoNotWait,
        Break::QueriesDoNotWait,
        Break::ReadsDoNotWait,
        Break::FromArrival,
        Break::NoHold,
        Break::KeptThoughRecalled,
        Break::NotForgotten,
        Break::LateCommand,
        Break::LateCall,
        Break::EpochKept,
    ] {
        let found = (0..5_000).find_map(|seed| run(seed, without).2);
        println!("{without:?}: {found:?}");
        assert!(found.is_some(), "{without:?}: not missed");
    }
}
