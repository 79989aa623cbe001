//! Directories whose names only one session changes (docs/PROTOCOL.md, R40): both halves, without I/O
//! and without a clock of their own.
//!
//! Who makes a directory knows that it is empty. As long as nobody else adds a name there, it knows every
//! name that may be in it, and need not ask whether another one is: that question precedes every create.
//! The leader ([`Owners`]) lends this knowledge for [`LEASE`] with each answer, and lets nobody else add a
//! name before the loan has run out. The client ([`OwnDirs`]) counts the loan from when it *sent* the
//! request, so its end always comes before the leader's, however long the answer took.

use ebb_dataplane_protocol::{InodeId, SessionId};
use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher;
use std::time::{Duration, Instant};

/// How long an answer lends the names of a directory: what somebody else waits at most, once, before
/// they add a name there, and what a new leader waits before anybody does.
pub const LEASE: Duration = Duration::from_millis(250);

/// Directories a leader remembers; past it those whose loan has run out are forgotten.
const OWNED_MAX: usize = 65_536;
/// Directories and names a client remembers; past it, it starts anew, which costs questions only.
const DIRS_MAX: usize = 4_096;
const NAMES_MAX: usize = 1_000_000;
/// Names begun elsewhere while directories are being made.
const BEGUN_MAX: usize = 10_000;

struct Owned {
    /// `None`: somebody else added a name, or is about to.
    owner: Option<SessionId>,
    /// The end of the latest loan.
    until: Instant,
    /// Operations of others in progress.
    intents: u32,
}

impl Intent {
    /// Of who alone adds names there.
    pub fn is_owners(&self) -> bool {
        self.term.is_none()
    }
}

/// The leader's half.
#[derive(Default)]
pub struct Owners {
    dirs: HashMap<InodeId, Owned>,
    /// Raft's term of the leadership: what began in an earlier one is none of this one's.
    term: u64,
    led_since: Option<Instant>,
    /// Names that came by another way than a session's operation, as counted by the state machine.
    brought: u64,
}

/// An operation that adds a name to a directory, until [`Owners::done`].
#[derive(Debug)]
#[must_use]
pub struct Intent {
    dir: InodeId,
    /// `None`: of the owner, nothing was noted.
    term: Option<u64>,
    /// Not before this.
    pub not_before: Option<Instant>,
}

impl Owners {
    /// This node leads in `term`. Comes before every other call. Answers when names may be added: in a
    /// new term, what an earlier leader lent runs out first.
    pub fn lead(&mut self, term: u64, now: Instant) -> Instant {
        if self.term != term || self.led_since.is_none() {
            self.dirs.clear();
            self.term = term;
            self.led_since = Some(now);
        }
        self.led_since.unwrap_or(now) + LEASE
    }

    /// `session` is about to add a name to `dir`. Call [`Self::done`] when it is added or never will be.
    pub fn intend(&mut self, dir: InodeId, session: SessionId, now: Instant) -> Intent {
        let of_others = Intent { dir, term: Some(self.term), not_before: None };
        match self.dirs.get_mut(&dir) {
            Some(d) if d.owner == Some(session) => Intent { dir, term: None, not_before: None },
            Some(d) => {
                d.owner = None;
                d.intents += 1;
                Intent { not_before: (d.until > now).then_some(d.until), ..of_others }
            }
            None => {
                self.dirs.insert(dir, Owned { owner: None, until: now, intents: 1 });
                of_others
            }
        }
    }

    /// Another session than `holder` wants to know the names of `dir`: they are lent no more.
    pub fn recall(&mut self, dir: InodeId, holder: SessionId) {
        if let Some(d) = self.dirs.get_mut(&dir).filter(|d| d.owner == Some(holder)) {
            d.owner = None;
        }
    }

    /// The end of an operation.
    pub fn done(&mut self, intent: Intent, now: Instant) {
        if intent.term != Some(self.term) {
            return;
        }
        if let Some(d) = self.dirs.get_mut(&intent.dir) {
            d.intents = d.intents.saturating_sub(1);
            if d.intents == 0 && d.owner.is_none() && d.until <= now {
                self.dirs.remove(&intent.dir);
            }
        }
    }

    /// The state machine has counted so many names that came by another way than a session's operation
    /// (from the bucket, conflicts). Comes before what is lent: a further one ends every ownership, since
    /// nobody knows whose directory it is in, and they are rare.
    pub fn brought(&mut self, names: u64) {
        if self.brought != names {
            self.brought = names;
            for d in self.dirs.values_mut() {
                d.owner = None;
            }
        }
    }

    /// `session` made `dir`, and it `is_empty` as applied here. How long that is lent; zero: not at all.
    pub fn adopt(
        &mut self,
        dir: InodeId,
        session: SessionId,
        now: Instant,
        is_empty: bool,
    ) -> Duration {
        if !is_empty {
            return Duration::ZERO;
        }
        if self.dirs.len() >= OWNED_MAX {
            self.dirs.retain(|_, d| d.intents > 0 || d.until > now);
            if self.dirs.len() >= OWNED_MAX {
                return Duration::ZERO;
            }
        }
        let new = Owned { owner: Some(session), until: now, intents: 0 };
        self.dirs.entry(dir).or_insert(new);
        self.renew(dir, session, now)
    }

    /// `session` added a name to `dir`. How long the names are lent from now; zero: not at all.
    pub fn renew(&mut self, dir: InodeId, session: SessionId, now: Instant) -> Duration {
        match self.dirs.get_mut(&dir) {
            Some(d) if d.owner == Some(session) => {
                d.until = now + LEASE;
                LEASE
            }
            _ => Duration::ZERO,
        }
    }
}

struct OwnDir {
    /// The session's: a later one owns nothing of an earlier one's.
    epoch: u64,
    until: Instant,
    /// Hashes of every name that may be there.
    names: HashSet<u64>,
}

/// The client's half.
#[derive(Default)]
pub struct OwnDirs {
    dirs: HashMap<InodeId, OwnDir>,
    names: usize,
    /// Directories being made, and what was begun meanwhile in directories that are not owned (yet).
    making: usize,
    begun: Vec<(InodeId, u64)>,
    begun_too_many: bool,
    hasher: RandomState,
}

impl OwnDirs {
    /// A directory is about to be made. Pair it with [`Self::made`].
    pub fn making(&mut self) {
        self.making += 1;
    }

    /// A mkdir that was begun at `sent` has ended. `made`: the directory, the session's epoch, and how
    /// long its names are lent.
    pub fn made(&mut self, sent: Instant, made: Option<(InodeId, u64, Duration)>) {
        if let Some((dir, epoch, lease)) = made
            && !lease.is_zero()
            && !self.begun_too_many
        {
            if self.dirs.len() >= DIRS_MAX || self.names >= NAMES_MAX {
                self.dirs.clear();
                self.names = 0;
            }
            let here = self.begun.iter().filter(|b| b.0 == dir).map(|b| b.1);
            let own = OwnDir { epoch, until: sent + lease, names: here.collect() };
            self.names += own.names.len();
            self.names -= self.dirs.insert(dir, own).map_or(0, |old| old.names.len());
        }
        self.making = self.making.saturating_sub(1);
        if self.making == 0 {
            self.begun.clear();
            self.begun_too_many = false;
        }
    }

    /// This client is about to add a name. Comes before the request is sent.
    pub fn adds(&mut self, dir: InodeId, name: &[u8]) {
        let hash = self.hasher.hash_one(name);
        if let Some(own) = self.dirs.get_mut(&dir) {
            self.names += usize::from(own.names.insert(hash));
        } else if self.making > 0 {
            if self.begun.len() < BEGUN_MAX {
                self.begun.push((dir, hash));
            } else {
                self.begun_too_many = true;
            }
        }
    }

    /// A name was added by a request begun at `sent`; the names are lent for `lease` from then.
    pub fn renewed(&mut self, dir: InodeId, epoch: u64, sent: Instant, lease: Duration) {
        if lease.is_zero() {
            return;
        }
        if let Some(own) = self.dirs.get_mut(&dir).filter(|own| own.epoch == epoch) {
            own.until = own.until.max(sent + lease);
        }
    }

    /// Adds `name` to `dir` if it surely is not there: of several that try, one succeeds.
    pub fn claim(&mut self, dir: InodeId, name: &[u8], epoch: u64, now: Instant) -> bool {
        let lacks = self.lacks(dir, name, epoch, now);
        if lacks {
            self.adds(dir, name);
        }
        lacks
    }

    /// Whether `name` surely is not in `dir`.
    pub fn lacks(&self, dir: InodeId, name: &[u8], epoch: u64, now: Instant) -> bool {
        self.dirs.get(&dir).is_some_and(|own| {
            own.epoch == epoch
                && now < own.until
                && !own.names.contains(&self.hasher.hash_one(name))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::collections::BTreeSet;

    #[derive(Clone, Copy)]
    enum What {
        Mkdir,
        /// A mkdir that was applied.
        Made(InodeId),
        Add(InodeId, u8),
    }

    /// A request on its way, at the leader, or its answer on its way back.
    struct Call {
        client: usize,
        sent: Instant,
        what: What,
        intent: Option<Intent>,
        stage: Stage,
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Stage {
        Sent,
        Waiting,
        Proposed,
        Answered { dir: InodeId, lease: Duration },
    }

    /// What breaks the rule, for the tests that it is needed.
    #[derive(Clone, Copy, PartialEq)]
    enum Break {
        Nothing,
        /// Others do not wait for a loan to run out.
        NoWait,
        /// The client counts from the answer's arrival.
        FromArrival,
        /// A new leader lets names in at once.
        NoHold,
        /// What was begun during a mkdir is not remembered.
        BegunForgotten,
        /// Any made directory is taken to be empty.
        NotLooked,
    }

    /// Clients that make directories and add names to all of them, requests and answers that take any
    /// time, leaders that change. Whenever a client believes that a name is not there, it is not.
    /// Returns how many such beliefs there were, and the first that was wrong.
    fn run(seed: u64, without: Break) -> (u64, Option<String>) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut now = Instant::now();
        let session = |client: usize| SessionId(client as u64 + 1);
        let mut owners = Owners::default();
        let mut term = 1;
        let mut opens = owners.lead(term, now);
        let mut clients: Vec<OwnDirs> = (0..3).map(|_| OwnDirs::default()).collect();
        let mut applied: HashMap<InodeId, BTreeSet<u8>> = HashMap::new();
        let mut calls: Vec<Call> = Vec::new();
        let (mut next_dir, mut beliefs) = (1u64, 0);
        for step in 0..1_000 {
            let pause = if rng.random_range(0..30) == 0 { 300 } else { 8 };
            now += Duration::from_millis(rng.random_range(0..pause));
            let newest = next_dir;
            let any_dir =
                |rng: &mut StdRng| InodeId(newest.saturating_sub(rng.random_range(1..4)).max(1));
            match rng.random_range(0..30) {
                0 if calls.len() < 12 => {
                    let client = next_dir as usize % 3;
                    clients[client].making();
                    let (what, stage) = (What::Mkdir, Stage::Sent);
                    calls.push(Call { client, sent: now, what, intent: None, stage });
                }
                1..5 if calls.len() < 12 && next_dir > 1 => {
                    // Mostly the client that made the directory, or it would own nothing for long.
                    let dir = any_dir(&mut rng);
                    let owner = dir.0 as usize % 3;
                    let client = if rng.random_range(0..20) > 0 {
                        owner
                    } else {
                        rng.random_range(0..3usize)
                    };
                    let name = rng.random_range(0..30u8);
                    if without != Break::BegunForgotten || clients[client].dirs.contains_key(&dir) {
                        clients[client].adds(dir, &[name]);
                    }
                    let (what, stage) = (What::Add(dir, name), Stage::Sent);
                    calls.push(Call { client, sent: now, what, intent: None, stage });
                }
                5 if rng.random_range(0..8) == 0 => {
                    // Another leader: what was proposed is applied, or lost; the rest is asked again.
                    term += 1;
                    opens = owners.lead(term, now);
                    for c in &mut calls {
                        if matches!(c.stage, Stage::Waiting | Stage::Proposed) {
                            (c.intent, c.stage) = (None, Stage::Sent);
                        }
                    }
                }
                6..20 if !calls.is_empty() => {
                    let n = rng.random_range(0..calls.len());
                    let c = &mut calls[n];
                    match (c.stage, c.what) {
                        (Stage::Sent, What::Mkdir | What::Made(_)) => c.stage = Stage::Proposed,
                        (Stage::Sent, What::Add(dir, _)) => {
                            if now >= opens || without == Break::NoHold {
                                c.intent = Some(owners.intend(dir, session(c.client), now));
                                c.stage = Stage::Waiting;
                            }
                        }
                        (Stage::Waiting, _) => {
                            let until = c.intent.as_ref().and_then(|i| i.not_before);
                            if until.is_none_or(|t| now >= t) || without == Break::NoWait {
                                c.stage = Stage::Proposed;
                            }
                        }
                        (Stage::Proposed, What::Mkdir) => {
                            // Made for the client that its number names, see above.
                            let dir = InodeId(next_dir);
                            if dir.0 as usize % 3 != c.client {
                                continue;
                            }
                            next_dir += 1;
                            applied.insert(dir, BTreeSet::new());
                            // The answer is made some time after.
                            c.what = What::Made(dir);
                        }
                        (Stage::Proposed, What::Made(dir)) => {
                            let empty = applied[&dir].is_empty() || without == Break::NotLooked;
                            let lease = owners.adopt(dir, session(c.client), now, empty);
                            c.stage = Stage::Answered { dir, lease };
                        }
                        (Stage::Proposed, What::Add(dir, name)) => {
                            if let Some(names) = applied.get_mut(&dir) {
                                names.insert(name);
                            }
                            let lease = owners.renew(dir, session(c.client), now);
                            if let Some(intent) = c.intent.take() {
                                owners.done(intent, now);
                            }
                            c.stage = Stage::Answered { dir, lease };
                        }
                        (Stage::Answered { dir, lease }, what) => {
                            let late = without == Break::FromArrival;
                            let sent = if late { now } else { c.sent };
                            let client = &mut clients[c.client];
                            match what {
                                What::Made(_) => client.made(sent, Some((dir, 1, lease))),
                                _ => client.renewed(dir, 1, sent, lease),
                            }
                            calls.swap_remove(n);
                        }
                    }
                }
                _ => {
                    let (client, dir) = (rng.random_range(0..3usize), any_dir(&mut rng));
                    let name = rng.random_range(0..30u8);
                    if clients[client].lacks(dir, &[name], 1, now) {
                        beliefs += 1;
                        if applied.get(&dir).is_some_and(|names| names.contains(&name)) {
                            let what = format!("seed {seed} step {step}: {dir} has name {name}");
                            return (beliefs, Some(what));
                        }
                    }
                }
            }
        }
        (beliefs, None)
    }

    #[test]
    fn a_name_that_is_believed_absent_is_absent() {
        let mut beliefs = 0;
        for seed in 0..1_000 {
            let (n, wrong) = run(seed, Break::Nothing);
            assert_eq!(wrong, None);
            beliefs += n;
        }
        println!("{beliefs} answers without asking");
        assert!(beliefs > 5_000, "only {beliefs} answers without asking");
    }

    #[test]
    fn every_part_of_the_rule_is_needed() {
        for (without, what) in [
            (Break::NoWait, "others wait"),
            (Break::FromArrival, "counted from the sending"),
            (Break::NoHold, "a new leader waits"),
            (Break::BegunForgotten, "what was begun meanwhile"),
            (Break::NotLooked, "empty as applied"),
        ] {
            let found = (0..20_000).find_map(|seed| run(seed, without).1);
            println!("{what}: {found:?}");
            assert!(found.is_some(), "{what}: not missed");
        }
    }

    #[test]
    fn both_halves_are_bounded() {
        let now = Instant::now();
        let mut owners = Owners::default();
        owners.lead(1, now);
        for i in 0..2 * OWNED_MAX as u64 {
            owners.adopt(InodeId(i), SessionId(1), now, true);
        }
        assert_eq!(owners.dirs.len(), OWNED_MAX);
        assert_eq!(owners.adopt(InodeId(0), SessionId(1), now + LEASE, true), LEASE);
        assert_eq!(owners.dirs.len(), 1, "loans that ran out make room");
        let mut own = OwnDirs::default();
        for i in 0..2 * DIRS_MAX as u64 {
            own.making();
            own.made(now, Some((InodeId(i), 1, LEASE)));
            own.adds(InodeId(i), b"name");
            assert!(own.dirs.len() <= DIRS_MAX && own.names <= own.dirs.len());
        }
        own.making();
        for i in 0..2 * BEGUN_MAX as u64 {
            own.adds(InodeId(u64::MAX), &i.to_le_bytes());
        }
        assert_eq!(own.begun.len(), BEGUN_MAX);
        own.made(now, Some((InodeId(u64::MAX), 1, LEASE)));
        assert!(!own.lacks(InodeId(u64::MAX), b"x", 1, now), "some names were not noted");
    }
}
