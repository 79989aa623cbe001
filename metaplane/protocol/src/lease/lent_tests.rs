//! Clients that have files open without handles, leaders that change, messages that come late or twice: no file goes
//! that a client has open.

use super::*;
use ebb_dataplane_protocol::{InodeId, SessionId};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, HashSet};
use std::time::Instant;

const FILES: usize = 4;
const CLIENTS: usize = 3;

/// What breaks a rule, for the tests that it is needed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Break {
    Nothing,
    /// A client uses what comes after it was wanted back, or from an earlier leader.
    UsedUnasked,
    /// A new leader does not ask for what earlier ones lent.
    EarlierForgotten,
    /// What was lent ends with the lease.
    EndsWithLease,
    /// What is given back late ends what was lent since.
    NoNumbers,
    /// What a client says of one epoch is taken for another.
    SettledEarly,
    /// A file without a name is lent.
    LentWithoutName,
    /// A file is given back while another answer is under way that lends it.
    AskedIsNoUse,
    /// A client gives back before it has a handle.
    HandleComesLater,
    /// Files with an open handle, or that somebody has, go as well.
    NobodyAsked,
}

#[derive(Clone)]
enum Message {
    Lend { file: InodeId, ask: (u64, Ticket) },
    Lent { file: InodeId, ask: (u64, Ticket), lease: Option<Lease> },
    Watch { watch: Watch, sent: Instant },
    Watched { watch: Watch, sent: Instant, answer: Watched },
    Open { file: InodeId, local: u64 },
    Opened { file: InodeId, local: u64, exists: bool },
}

#[derive(Clone, Copy)]
enum Hold {
    Loan(Lease),
    Asked,
    /// Asked for a handle in place of that.
    Taking(Lease),
    Handle,
}

#[derive(Default)]
struct Client {
    cache: Cache,
    loans: Loans,
    open: BTreeMap<u64, (InodeId, Hold)>,
    wanted: HashSet<InodeId>,
    paused: Option<Instant>,
    calling: Option<(Watch, Instant)>,
}

/// A file in the log.
#[derive(Default)]
struct File {
    named: bool,
    /// Nobody has it open but by handles, somebody who led has said.
    reaped: bool,
    handles: BTreeMap<usize, usize>,
}

struct Sim {
    rng: StdRng,
    without: Break,
    now: Instant,
    leases: Leases,
    lent: Lent,
    term: u64,
    serves_from: Instant,
    files: BTreeMap<InodeId, File>,
    last: u64,
    clients: Vec<Client>,
    net: Vec<(Instant, usize, Message)>,
    /// Commands on their way into the log.
    reaps: Vec<(Instant, InodeId)>,
    /// How often a file was used without a handle, got one late, and went.
    counts: [u64; 3],
}

fn session(client: usize) -> SessionId {
    SessionId(client as u64 + 1)
}

impl Sim {
    fn new(seed: u64, without: Break) -> Self {
        let now = Instant::now();
        let mut sim = Self {
            rng: StdRng::seed_from_u64(seed),
            without,
            now,
            leases: Leases::default(),
            lent: Lent::default(),
            term: 0,
            serves_from: now,
            files: BTreeMap::new(),
            last: 0,
            clients: (0..CLIENTS).map(|_| Client::default()).collect(),
            net: Vec::new(),
            reaps: Vec::new(),
            counts: [0; 3],
        };
        sim.lead();
        sim
    }

    fn ms(&mut self, most: u64) -> Duration {
        Duration::from_millis(self.rng.random_range(0..=most))
    }

    fn send(&mut self, client: usize, message: Message) {
        let most = if self.rng.random_ratio(1, 10) { 3_000 } else { 30 };
        let may_repeat = matches!(message, Message::Lend { .. } | Message::Watch { .. });
        for _ in 0..if may_repeat && self.rng.random_ratio(1, 10) { 2 } else { 1 } {
            let at = self.now + self.ms(most);
            self.net.push((at, client, message.clone()));
        }
    }

    fn lead(&mut self) {
        self.term += 1;
        self.leases.lead(self.term);
        self.lent.lead(self.term);
        self.serves_from = self.now + LEASE;
    }

    /// Each command is an entry of the log: whoever leads proposes it.
    fn step(&mut self) -> Result<(), String> {
        let pause = self.ms(20);
        self.now += pause;
        let client = self.rng.random_range(0..CLIENTS);
        match self.rng.random_range(0..100) {
            0..20 => {
                let files: Vec<InodeId> = self.files.keys().copied().collect();
                let (file, c) = (files.choose(&mut self.rng), &mut self.clients[client]);
                if let Some(&file) = file.filter(|_| c.cache.epoch() != 0) {
                    self.last += 1;
                    let ask = (self.last, c.cache.asks());
                    if self.without != Break::AskedIsNoUse {
                        c.loans.asks(file);
                    }
                    c.open.insert(self.last, (file, Hold::Asked));
                    self.send(client, Message::Lend { file, ask });
                }
            }
            20..35 => self.close(client),
            35..45 => {
                let named: Vec<InodeId> =
                    self.files.iter().filter(|f| f.1.named).map(|f| *f.0).collect();
                if let Some(file) = named.choose(&mut self.rng) {
                    self.files.entry(*file).or_default().named = false;
                    self.leases.applied(&[], &[*file], self.now);
                }
            }
            45..60 if self.files.values().filter(|f| f.named).count() < FILES => {
                self.last += 1;
                let file = File { named: true, ..File::default() };
                self.files.insert(InodeId(self.last), file);
            }
            60..61 => {
                let pause = self.ms(2_500);
                self.clients[client].paused = Some(self.now + pause);
            }
            61 if self.rng.random_ratio(1, 8) => self.lead(),
            62..75 => self.reap(),
            _ => {}
        }
        for client in 0..CLIENTS {
            if self.clients[client].paused.is_none_or(|until| until <= self.now) {
                self.act(client);
            }
        }
        while let Some(i) = self.net.iter().position(|m| {
            let to_client = matches!(
                m.2,
                Message::Lent { .. } | Message::Watched { .. } | Message::Opened { .. }
            );
            let paused = self.clients[m.1].paused.is_some_and(|until| until > self.now);
            m.0 <= self.now && !(to_client && paused)
        }) {
            let (_, client, message) = self.net.swap_remove(i);
            self.deliver(client, message);
        }
        self.apply()?;
        if self.without == Break::EndsWithLease {
            for c in 0..CLIENTS {
                if self.leases.grant(session(c), &[], self.now).is_none() {
                    self.lent.forget(session(c));
                }
            }
        }
        Ok(())
    }

    /// What the leader lets go.
    fn reap(&mut self) {
        if self.now < self.serves_from {
            return;
        }
        if self.lent.is_new() {
            let all = (0..CLIENTS).map(session);
            let none = self.without == Break::EarlierForgotten;
            self.lent.earlier(self.term, all.filter(|_| !none));
        }
        let unnamed = self.files.iter().filter(|f| !f.1.named && !f.1.reaped).map(|f| *f.0);
        for file in unnamed.collect::<Vec<_>>() {
            if self.lent.may_go(file, |_| ()) || self.without == Break::NobodyAsked {
                let at = self.now + self.ms(100);
                self.reaps.push((at, file));
            }
        }
    }

    /// What is in the log by now takes effect.
    fn apply(&mut self) -> Result<(), String> {
        while let Some(i) = self.reaps.iter().position(|r| r.0 <= self.now) {
            let (_, file) = self.reaps.swap_remove(i);
            if let Some(file) = self.files.get_mut(&file) {
                file.reaped = true;
            }
        }
        let goes = |f: &File| f.reaped && f.handles.values().all(|count| *count == 0);
        let gone = self.files.iter().filter(|f| goes(f.1)).map(|f| *f.0);
        for file in gone.collect::<Vec<_>>() {
            for (no, client) in self.clients.iter().enumerate() {
                let uses = |hold: &Hold| matches!(hold, Hold::Loan(_) | Hold::Taking(_));
                if client.open.values().any(|(f, hold)| *f == file && uses(hold)) {
                    return Err(format!("client {no} has file {file} open, which goes"));
                }
            }
            self.files.remove(&file);
            self.counts[2] += 1;
        }
        Ok(())
    }

    fn close(&mut self, client: usize) {
        let locals: Vec<u64> = self.clients[client].open.keys().copied().collect();
        let Some(local) = locals.choose(&mut self.rng) else { return };
        let c = &mut self.clients[client];
        match c.open.remove(local) {
            Some((file, Hold::Asked | Hold::Loan(_) | Hold::Taking(_))) => {
                // Who gives an open up does not wait for its answer.
                c.loans.end(file);
            }
            Some((file, Hold::Handle)) => self.release(client, file),
            None => {}
        }
    }

    fn release(&mut self, client: usize, file: InodeId) {
        if let Some(file) = self.files.get_mut(&file)
            && let Some(count) = file.handles.get_mut(&client)
        {
            *count -= 1;
        }
    }

    /// A client calls, and takes handles for what it has to give back.
    fn act(&mut self, client: usize) {
        let (now, without) = (self.now, self.without);
        let c = &mut self.clients[client];
        if let Some((watch, sent)) = &c.calling
            && now >= *sent + LEASE
        {
            c.loans.not_told(watch);
            c.calling = None;
        }
        let mut out = Vec::new();
        let epoch = c.cache.epoch();
        for (local, (file, hold)) in &mut c.open {
            if let Hold::Loan(lease) = *hold
                && (lease.epoch != epoch || c.wanted.contains(file))
            {
                *hold = Hold::Taking(lease);
                out.push(Message::Open { file: *file, local: *local });
                if without == Break::HandleComesLater {
                    c.loans.end(*file);
                }
            }
        }
        let old = |hold: &Hold| matches!(hold, Hold::Loan(l) | Hold::Taking(l) if l.epoch != epoch);
        if epoch != 0 && !c.open.values().any(|(_, hold)| old(hold)) {
            c.loans.settled(epoch);
        }
        if c.calling.is_none() {
            let mut watch = c.cache.watch();
            c.loans.tell(&mut watch);
            c.calling = Some((watch.clone(), now));
            out.push(Message::Watch { watch, sent: now });
        }
        out.into_iter().for_each(|message| self.send(client, message));
    }

    fn deliver(&mut self, client: usize, message: Message) {
        let (now, without) = (self.now, self.without);
        let serves = now >= self.serves_from;
        match message {
            Message::Lend { file, ask } => {
                let named = self.files.get(&file).is_some_and(|f| f.named);
                let may =
                    named || without == Break::LentWithoutName && self.files.contains_key(&file);
                let grant = |s: &mut Self| s.leases.grant(session(client), &[file], now);
                let lease = if serves && may { grant(self) } else { None };
                let lease = lease.filter(|l| self.lent.lend(session(client), file, l.number));
                self.send(client, Message::Lent { file, ask, lease });
            }
            Message::Lent { file, ask: (local, ticket), lease } => {
                let c = &mut self.clients[client];
                // An answer is to a call, and comes once.
                let Some((_, hold @ Hold::Asked)) = c.open.get_mut(&local) else { return };
                if without == Break::AskedIsNoUse {
                    c.loans.asks(file);
                }
                if let Some(lease) = lease {
                    c.loans.lent(file, lease.number);
                    if c.cache.may_borrow(ticket, lease, file) || without == Break::UsedUnasked {
                        *hold = Hold::Loan(lease);
                        self.counts[0] += 1;
                        return;
                    }
                }
                c.open.remove(&local);
                c.loans.end(file);
            }
            Message::Watch { mut watch, sent } => {
                if !serves {
                    return;
                }
                if without == Break::NoNumbers {
                    watch.returned.iter_mut().for_each(|r| r.1 = u64::MAX);
                }
                self.lent.returned(session(client), &watch.returned);
                let mut answer = self.leases.watch(session(client), &watch, now);
                if watch.settled != 0 && watch.settled == answer.epoch
                    || without == Break::SettledEarly
                {
                    self.lent.settled(session(client), answer.epoch);
                }
                answer.wanted = self.lent.wanted(session(client));
                self.send(client, Message::Watched { watch, sent, answer });
            }
            Message::Watched { watch, sent, answer } => {
                let c = &mut self.clients[client];
                if c.calling.as_ref().is_none_or(|(w, _)| w.call != watch.call) {
                    return;
                }
                c.calling = None;
                c.cache.answered(&watch, sent, &answer);
                c.loans.wanted(&answer.wanted);
                c.wanted = answer.wanted.iter().map(|w| w.0).collect();
            }
            Message::Open { file, local } => {
                let exists = self.files.get_mut(&file).is_some_and(|f| {
                    *f.handles.entry(client).or_default() += 1;
                    true
                });
                self.send(client, Message::Opened { file, local, exists });
            }
            Message::Opened { file, local, exists } => {
                let c = &mut self.clients[client];
                match c.open.get_mut(&local) {
                    Some((_, hold @ Hold::Taking(_))) if exists => {
                        *hold = Hold::Handle;
                        if without != Break::HandleComesLater {
                            c.loans.end(file);
                        }
                        self.counts[1] += 1;
                    }
                    _ if exists => self.release(client, file),
                    Some(_) => {
                        c.open.remove(&local);
                        c.loans.end(file);
                    }
                    None => {}
                }
            }
        }
    }
}

fn run(seed: u64, without: Break) -> Result<[u64; 3], String> {
    let mut sim = Sim::new(seed, without);
    for _ in 0..4_000 {
        sim.step()?;
    }
    // Nothing is forgotten: when everybody has closed everything, everything goes.
    for client in 0..CLIENTS {
        sim.clients[client].paused = None;
        while !sim.clients[client].open.is_empty() {
            sim.close(client);
        }
    }
    sim.files.values_mut().for_each(|f| f.named = false);
    for _ in 0..2_000 {
        sim.now += Duration::from_millis(10);
        for client in 0..CLIENTS {
            sim.act(client);
            while !sim.clients[client].open.is_empty() {
                sim.close(client);
            }
        }
        while let Some(i) = sim.net.iter().position(|m| m.0 <= sim.now) {
            let (_, client, message) = sim.net.swap_remove(i);
            sim.deliver(client, message);
        }
        sim.reap();
        sim.apply()?;
    }
    if sim.files.is_empty() { Ok(sim.counts) } else { Err("files are left".into()) }
}

#[test]
fn no_file_goes_that_somebody_has_open() {
    let first = std::env::var("EBB_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0);
    let seeds = std::env::var("EBB_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(300);
    let mut counts = [0; 3];
    for seed in first..first + seeds {
        let found = run(seed, Break::Nothing).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        counts.iter_mut().zip(found).for_each(|(c, f)| *c += f);
    }
    println!(
        "seeds from {first}: {seeds}; lent {}, handles late {}, gone {}",
        counts[0], counts[1], counts[2]
    );
    assert!(counts.iter().all(|c| *c > seeds * 10), "{counts:?}");
}

#[test]
fn each_rule_of_it_is_needed() {
    for without in [
        Break::UsedUnasked,
        Break::EarlierForgotten,
        Break::EndsWithLease,
        Break::NoNumbers,
        Break::SettledEarly,
        Break::LentWithoutName,
        Break::AskedIsNoUse,
        Break::HandleComesLater,
        Break::NobodyAsked,
    ] {
        let found = (0..300).find(|seed| run(*seed, without).is_err());
        println!("{without:?}: seed {found:?}");
        assert!(found.is_some(), "{without:?} is not missed");
    }
}
