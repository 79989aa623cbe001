//! The client's half: what it may answer without asking.

use super::{DRIFT, Lease, Watch, Watched};
use crate::attr::Attr;
use crate::op::Name;
use crate::query::DirEntry;
use ebb_dataplane_protocol::InodeId;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Inodes and names remembered; past it a client forgets all and begins anew.
const ATTRS_MAX: usize = 100_000;
const NAMES_MAX: usize = 100_000;
/// How long a name is remembered not to be there: the bucket may have brought it meanwhile, and the leader
/// looks only when it is asked.
const ABSENT_MAX: Duration = Duration::from_millis(1_000);
/// Inodes of which it is known when they were forgotten last.
const DROPPED_MAX: usize = 65_536;

enum Entry {
    There(InodeId),
    Absent(Instant),
}

/// When a question was sent; what its answer tells may be old already when it comes.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Ticket(u64);

/// What the cache was good for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Questions answered from memory.
    pub hits: u64,
    /// Questions that had to be sent.
    pub misses: u64,
    /// Inodes recalled by the leader.
    pub recalls: u64,
    /// Times that everything was forgotten.
    pub resets: u64,
}

/// The client's half.
#[derive(Default)]
pub struct Cache {
    pub(super) epoch: u64,
    call: u64,
    /// Answers to calls before this one are of no use.
    first_call: u64,
    forgotten: u64,
    until: Option<Instant>,
    /// With the numbers of their leases.
    attrs: HashMap<InodeId, (Attr, u64)>,
    dirs: HashMap<InodeId, (HashMap<Name, Entry>, u64)>,
    names: usize,
    is_full: bool,
    /// Counts what was forgotten.
    clock: u64,
    dropped: HashMap<InodeId, u64>,
    /// What was asked before this is not remembered.
    floor: u64,
    counts: Counts,
}

impl Cache {
    /// The next [`Watch`] call. One at a time; its answer goes to [`Self::answered`].
    pub fn watch(&mut self) -> Watch {
        self.call += 1;
        let (epoch, call, forgotten) = (self.epoch, self.call, self.forgotten);
        Watch { epoch, call, forgotten, returned: Vec::new(), settled: 0 }
    }

    /// The answer to a call that was sent at `sent`. What it recalls is forgotten when this returns.
    pub fn answered(&mut self, watch: &Watch, sent: Instant, answer: &Watched) {
        if watch.call < self.first_call {
            return;
        }
        if answer.epoch != self.epoch {
            self.clear();
            self.epoch = answer.epoch;
        }
        if answer.epoch == 0 {
            return;
        }
        for inode in &answer.recalled {
            self.drop_inode(*inode);
        }
        self.counts.recalls += answer.recalled.len() as u64;
        for (inode, _) in &answer.wanted {
            self.drop_inode(*inode);
        }
        self.forgotten = self.forgotten.max(answer.through);
        let lease = Duration::from_millis(answer.lease_ms.into());
        if let Some(lease) = lease.checked_sub(DRIFT) {
            self.until = self.until.max(Some(sent + lease));
        }
    }

    /// Forgets everything: the session is another one, or there is too much. Answers which attributes it had.
    pub fn reset(&mut self) -> Vec<InodeId> {
        let had = self.attrs.keys().copied().collect();
        self.clear();
        self.first_call = self.call + 1;
        had
    }

    /// Whether there was something that it had no room for.
    pub fn is_full(&self) -> bool {
        self.is_full
    }

    fn clear(&mut self) {
        self.attrs.clear();
        self.dirs.clear();
        self.names = 0;
        self.is_full = false;
        (self.epoch, self.forgotten, self.until) = (0, 0, None);
        self.clock += 1;
        self.floor = self.clock;
        self.dropped.clear();
        self.counts.resets += 1;
    }

    fn is_good(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    /// Attributes, if they need not be asked for.
    pub fn attr(&mut self, inode: InodeId, now: Instant) -> Option<Attr> {
        let known =
            self.is_good(now).then(|| self.attrs.get(&inode).map(|a| a.0.clone())).flatten();
        self.count(known)
    }

    /// How long these attributes are good, if they are what is remembered.
    pub fn lease_on(&self, attr: &Attr, now: Instant) -> Option<Duration> {
        self.attrs.get(&attr.inode).filter(|known| known.0 == *attr)?;
        self.until?.checked_duration_since(now)
    }

    /// An entry of a directory, or that there is none.
    pub fn lookup(&mut self, dir: InodeId, name: &[u8], now: Instant) -> Option<Option<Attr>> {
        let entry = self.is_good(now).then(|| self.dirs.get(&dir)?.0.get(name)).flatten();
        let known = match entry {
            Some(Entry::There(inode)) => self.attrs.get(inode).map(|a| Some(a.0.clone())),
            Some(Entry::Absent(since)) => {
                (now.saturating_duration_since(*since) < ABSENT_MAX).then_some(None)
            }
            None => None,
        };
        self.count(known)
    }

    fn count<T>(&mut self, known: Option<T>) -> Option<T> {
        match &known {
            Some(_) => self.counts.hits += 1,
            None => self.counts.misses += 1,
        }
        known
    }

    /// A question is about to be sent.
    pub fn asks(&self) -> Ticket {
        Ticket(self.clock)
    }

    /// Whether what an answer tells of an inode is still so: it was not forgotten since it was asked for.
    fn may_keep(&self, ticket: Ticket, lease: Lease, inode: InodeId) -> bool {
        lease.epoch != 0
            && lease.epoch == self.epoch
            && ticket.0 >= self.floor
            && self.dropped.get(&inode).is_none_or(|at| *at <= ticket.0)
    }

    /// Which epoch what is lent from now on is of; 0: in none.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether what an answer lends is noted by the leader who is known here, and was not wanted back since it was
    /// asked for.
    pub fn may_borrow(&self, ticket: Ticket, lease: Lease, inode: InodeId) -> bool {
        self.may_keep(ticket, lease, inode)
    }

    /// The answer to a question for attributes.
    pub fn told(&mut self, ticket: Ticket, lease: Lease, attr: &Attr) {
        if !self.may_keep(ticket, lease, attr.inode) {
            return;
        }
        if self.attrs.len() >= ATTRS_MAX && !self.attrs.contains_key(&attr.inode) {
            self.is_full = true;
            return;
        }
        if self.attrs.get(&attr.inode).is_none_or(|a| a.1 < lease.number) {
            self.attrs.insert(attr.inode, (attr.clone(), lease.number));
        }
    }

    /// The answer to a question for an entry, which was sent at `sent`.
    pub fn told_entry(
        &mut self,
        (ticket, sent): (Ticket, Instant),
        lease: Lease,
        (dir, name): (InodeId, &[u8]),
        attr: Option<&Attr>,
    ) {
        if let Some(attr) = attr {
            self.told(ticket, lease, attr);
        }
        if !self.may_keep(ticket, lease, dir) {
            return;
        }
        if self.names >= NAMES_MAX {
            self.is_full = true;
            return;
        }
        let entry = attr.map_or(Entry::Absent(sent), |a| Entry::There(a.inode));
        let (names, number) = self.dirs.entry(dir).or_default();
        *number = lease.number.max(*number);
        self.names += usize::from(names.insert(name.to_vec(), entry).is_none());
    }

    /// The answer to a question for entries, some of which may not be remembered.
    pub fn told_page(
        &mut self,
        asked: (Ticket, Instant),
        lease: Lease,
        dir: InodeId,
        page: &[DirEntry],
    ) {
        if self.attrs.len() + page.len() > ATTRS_MAX || self.names + page.len() > NAMES_MAX {
            return;
        }
        for e in page {
            self.told_entry(asked, lease, (dir, &e.name), Some(&e.attr));
        }
    }

    /// Answers the number of the latest lease under which it was remembered.
    fn drop_inode(&mut self, inode: InodeId) -> Option<u64> {
        self.clock += 1;
        if self.dropped.len() >= DROPPED_MAX {
            self.dropped.clear();
            self.floor = self.clock;
        }
        self.dropped.insert(inode, self.clock);
        let names = self.dirs.remove(&inode);
        self.names -= names.as_ref().map_or(0, |(names, _)| names.len());
        self.attrs.remove(&inode).map(|a| a.1).max(names.map(|n| n.1))
    }

    /// What a name stands for, if it is remembered; also when it is not good any more.
    pub fn remembers(&self, dir: InodeId, name: &[u8]) -> Option<InodeId> {
        match self.dirs.get(&dir)?.0.get(name)? {
            Entry::There(inode) => Some(*inode),
            Entry::Absent(_) => None,
        }
    }

    /// An operation that changes these inodes is about to be sent: they are forgotten. Answers those that were
    /// remembered, for the leader to know, which need not recall them then.
    pub fn forgets(&mut self, inodes: &[InodeId]) -> Vec<(InodeId, u64)> {
        inodes.iter().filter_map(|i| Some((*i, self.drop_inode(*i)?))).collect()
    }

    /// What it was good for so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}
