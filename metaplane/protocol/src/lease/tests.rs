//! Both halves against each other: clients that ask, change, pause and are told late; leaders that change.

use super::*;
use crate::attr::{Attr, FileKind, Time};
use ebb_dataplane_protocol::{ContentId, Generation, InodeId, Lineage, SessionId};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::HashMap;
use std::time::Instant;

const INODES: usize = 5;
const CLIENTS: usize = 3;

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
        xattrs: false,
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
    /// What waiting answers have looked at is not noted.
    LooksNotNoted,
    /// A repeated command is answered though the first one waits.
    RetriesDoNotWait,
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
    Query { id: usize, ticket: Ticket },
    Told { id: usize, ticket: Ticket, saw: Vec<Version>, lease: Option<Lease> },
    Op { id: usize, dropped: Vec<(InodeId, u64)> },
    Done { id: usize },
    Watch { watch: Watch, sent: Instant },
    Watched { watch: Watch, sent: Instant, answer: Watched },
}

/// An inode, and which of its versions.
type Version = (usize, u64);

/// What a client has asked: a look at some inodes, and perhaps a change of others.
#[derive(Default)]
struct Asked {
    looks: Vec<usize>,
    changes: Vec<usize>,
    called: u64,
    returned: Option<u64>,
    /// Versions it saw, and those that it made.
    saw: Vec<Version>,
    made: Vec<Version>,
    applied: bool,
}

struct Sim {
    rng: StdRng,
    without: Break,
    now: Instant,
    leases: Leases,
    term: u64,
    serves_from: Instant,
    versions: [u64; INODES],
    clients: Vec<Cache>,
    paused: [Instant; CLIENTS],
    /// One call of each client is out.
    calling: [Option<u64>; CLIENTS],
    asked: Vec<Asked>,
    /// Numbers what is called and what returns.
    clock: u64,
    /// (when, whose, what)
    net: Vec<(Instant, usize, Message)>,
    /// Answers that wait.
    waiting: Vec<(Vec<u64>, usize, Message)>,
    hits: u64,
    recalls: u64,
}

fn session(client: usize) -> SessionId {
    SessionId(client as u64 + 1)
}

fn id(inode: usize) -> InodeId {
    InodeId(inode as u64)
}

fn ids(inodes: &[usize]) -> Vec<InodeId> {
    inodes.iter().copied().map(id).collect()
}

/// Where a command's reply is remembered.
fn reply_of(asked: usize) -> InodeId {
    InodeId((INODES + asked) as u64)
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
            clients: (0..CLIENTS).map(|_| Cache::default()).collect(),
            paused: [now; CLIENTS],
            calling: [None; CLIENTS],
            asked: Vec::new(),
            clock: 0,
            net: Vec::new(),
            waiting: Vec::new(),
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

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// So many different inodes.
    fn some(&mut self, most: usize) -> Vec<usize> {
        let n = self.rng.random_range(1..=most);
        let mut all: Vec<usize> = (0..n).map(|_| self.rng.random_range(0..INODES)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn begin(&mut self, looks: Vec<usize>, changes: Vec<usize>) -> usize {
        let called = self.tick();
        self.asked.push(Asked { looks, changes, called, ..Asked::default() });
        self.asked.len() - 1
    }

    fn end(&mut self, asked: usize) {
        let now = self.tick();
        self.asked[asked].returned.get_or_insert(now);
    }

    fn ask(&mut self, client: usize) {
        let looks = self.some(3);
        let asked = self.begin(looks.clone(), vec![]);
        let now = self.now;
        let known = looks.iter().map(|&i| Some((i, self.clients[client].attr(id(i), now)?.size)));
        if let Some(saw) = known.collect::<Option<Vec<Version>>>() {
            self.hits += 1;
            self.asked[asked].saw = saw;
            return self.end(asked);
        }
        let ticket = self.clients[client].asks();
        self.send(client, Message::Query { id: asked, ticket });
    }

    fn change(&mut self, client: usize) {
        let (looks, changes) = (self.some(2), self.some(2));
        let dropped = self.clients[client].forgets(&ids(&changes));
        let asked = self.begin(looks, changes);
        if self.rng.random_range(0..5) == 0 {
            self.send(client, Message::Op { id: asked, dropped: dropped.clone() });
        }
        self.send(client, Message::Op { id: asked, dropped });
    }

    /// What is there now.
    fn see(&self, inodes: &[usize]) -> Vec<Version> {
        inodes.iter().map(|&i| (i, self.versions[i])).collect()
    }

    fn call(&mut self, client: usize) {
        if self.calling[client].is_some() {
            return;
        }
        let watch = self.clients[client].watch();
        self.calling[client] = Some(watch.call);
        let sent = self.now;
        if self.rng.random_range(0..5) == 0 {
            self.send(client, Message::Watch { watch: watch.clone(), sent });
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
            Message::Query { id: asked, ticket } => {
                let looks = self.asked[asked].looks.clone();
                let lease = self.leases.grant(session(client), &ids(&looks), self.now);
                let waits = match self.without {
                    Break::QueriesDoNotWait => vec![],
                    Break::LooksNotNoted => self.leases.changes_of(&ids(&looks)),
                    _ => self.leases.looked(&ids(&looks)),
                };
                let told = Message::Told { id: asked, ticket, saw: self.see(&looks), lease };
                self.waiting.push((waits, client, told));
            }
            Message::Op { id: asked, mut dropped } => {
                if self.without == Break::LateCommand {
                    dropped.iter_mut().for_each(|d| d.1 = u64::MAX);
                }
                self.leases.dropped(session(client), &dropped);
                let mut waits = self.apply(asked);
                if self.without == Break::OpsDoNotWait {
                    waits.clear();
                }
                self.waiting.push((waits, client, Message::Done { id: asked }));
            }
            Message::Watch { mut watch, sent } => {
                if self.without == Break::LateCall {
                    watch.call += self.rng.random_range(0..1_000_000);
                }
                let mut answer = self.leases.watch(session(client), &watch, self.now);
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

    /// Carries a command out, once. What its answer has to wait for.
    fn apply(&mut self, asked: usize) -> Vec<u64> {
        let Asked { looks, changes, applied, .. } = &self.asked[asked];
        let reply = reply_of(asked);
        if *applied {
            let looked = match self.without {
                Break::RetriesDoNotWait => vec![],
                _ => vec![reply],
            };
            return self.leases.applied(&looked, &[], self.now);
        }
        let (looks, changes) = (looks.clone(), changes.clone());
        let saw = self.see(&looks);
        let looked = match self.without {
            Break::ReadsDoNotWait => vec![],
            _ => ids(&looks),
        };
        let mut changed = ids(&changes);
        changed.push(reply);
        let waits = self.leases.applied(&looked, &changed, self.now);
        changes.iter().for_each(|&i| self.versions[i] += 1);
        let made = self.see(&changes);
        let asked = &mut self.asked[asked];
        (asked.saw, asked.made, asked.applied) = (saw, made, true);
        waits
    }

    /// A client gets a message.
    fn arrive(&mut self, client: usize, message: Message) {
        let cache = &mut self.clients[client];
        match message {
            Message::Told { id: asked, mut ticket, saw, lease } => {
                if self.without == Break::KeptThoughRecalled {
                    ticket = cache.asks();
                }
                for &(inode, version) in &saw {
                    if let Some(lease) = lease {
                        cache.told(ticket, lease, &attr(inode, version));
                    }
                }
                if self.asked[asked].returned.is_none() {
                    self.asked[asked].saw = saw;
                }
                self.end(asked);
            }
            Message::Done { id } => self.end(id),
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
                cache.answered(&watch, sent, &answer);
            }
            _ => {}
        }
    }

    fn step(&mut self) {
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
                        Message::Told { id, ticket, .. } => {
                            self.send(client, Message::Query { id, ticket });
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
            120..330 if awake => self.ask(client),
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
    }

    /// Whether there is one order of everything that was asked, in which each saw the versions that it saw, and
    /// comes after whatever had returned before it was called: there is, if nothing comes before itself.
    fn check(&self) -> Result<(), String> {
        // What came of it: whatever was carried out or answered.
        let all: Vec<&Asked> =
            self.asked.iter().filter(|a| a.applied || a.returned.is_some()).collect();
        let mut writers = HashMap::new();
        for (n, asked) in all.iter().enumerate() {
            writers.extend(asked.made.iter().map(|v| (*v, n)));
        }
        // The moments of calls and returns stand in a row, behind all that was asked.
        let moment = |at: u64| all.len() + at as usize;
        let mut after: Vec<Vec<usize>> = vec![vec![]; moment(self.clock + 2)];
        for at in 0..=self.clock {
            after[moment(at)].push(moment(at + 1));
        }
        for (n, asked) in all.iter().enumerate() {
            after[moment(asked.called)].push(n);
            if let Some(at) = asked.returned {
                after[n].push(moment(at));
            }
            for &(inode, version) in &asked.saw {
                if let Some(&writer) = writers.get(&(inode, version)) {
                    after[writer].push(n);
                }
                // Who saw a version comes before the next one; unless it is its own.
                if let Some(&next) = writers.get(&(inode, version + 1)).filter(|w| **w != n) {
                    after[n].push(next);
                }
            }
            for &(inode, version) in &asked.made {
                if let Some(&next) = writers.get(&(inode, version + 1)) {
                    after[n].push(next);
                }
            }
        }
        let mut before = vec![0; after.len()];
        after.iter().flatten().for_each(|&n| before[n] += 1);
        let mut free: Vec<usize> = (0..after.len()).filter(|&n| before[n] == 0).collect();
        let mut ordered = 0;
        while let Some(n) = free.pop() {
            ordered += 1;
            for &next in &after[n] {
                before[next] -= 1;
                if before[next] == 0 {
                    free.push(next);
                }
            }
        }
        if ordered == after.len() {
            return Ok(());
        }
        let stuck = (0..all.len()).find(|&n| before[n] > 0);
        let told = stuck.map(|n| format!("saw {:?}, made {:?}", all[n].saw, all[n].made));
        Err(format!(
            "no order: {} stand before themselves, as what {told:?}",
            after.len() - ordered
        ))
    }
}

fn run(seed: u64, without: Break) -> (u64, u64, Option<String>) {
    let mut sim = Sim::new(seed, without);
    (0..2_500).for_each(|_| sim.step());
    (sim.hits, sim.recalls, sim.check().err().map(|wrong| format!("seed {seed}: {wrong}")))
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
        Break::LooksNotNoted,
        Break::RetriesDoNotWait,
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
