//! The leader's half: who was told what, and which answers wait.

use super::{LEASE, Lease, RECALLS_MAX, Watch, Watched};
use ebb_dataplane_protocol::{InodeId, SessionId};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

/// Clients with a cache, what one of them may have been told, and what all of them may: who comes later is
/// told without a lease, and asks each time.
const CLIENTS_MAX: usize = 10_000;
const HELD_PER_CLIENT_MAX: usize = 200_000;
const HELD_MAX: usize = 2_000_000;

/// A recall that was not carried out yet.
struct Recall {
    number: u64,
    inode: InodeId,
    change: u64,
}

struct Client {
    epoch: u64,
    /// Its latest call.
    call: u64,
    until: Instant,
    /// With the number of the latest grant.
    held: HashMap<InodeId, u64>,
    recalls: VecDeque<Recall>,
    /// The last recall that an answer has told.
    told: u64,
    next: u64,
}

/// A command that changed what clients were told, until they have forgotten it.
struct Change {
    /// What it changed, and what later commands changed whose answers wait for this.
    inodes: HashSet<InodeId>,
    /// What those whose answers wait for this looked at: who changes it comes after them.
    looked: HashSet<InodeId>,
    /// Recalls not carried out.
    recalls: usize,
}

/// The leader's half.
#[derive(Default)]
pub struct Leases {
    term: u64,
    clients: HashMap<SessionId, Client>,
    holders: HashMap<InodeId, Vec<SessionId>>,
    held: usize,
    changes: BTreeMap<u64, Change>,
    /// Numbers epochs and changes.
    last: u64,
}

impl Leases {
    /// This node leads in `term`. Comes before every other call. In a new term nobody was told anything; it
    /// must not serve before [`LEASE`] has passed, if an earlier leader may have given leases.
    pub fn lead(&mut self, term: u64) {
        if self.term != term {
            // No number of an earlier leader, which may have been another process.
            *self = Self { term, last: term << 32, ..Self::default() };
        }
    }

    /// Whether nobody was told anything and nothing waits: what is applied need not be told here.
    pub fn is_idle(&self) -> bool {
        self.held == 0 && self.changes.is_empty()
    }

    /// Whether somebody was told of it.
    pub fn is_held(&self, inode: InodeId) -> bool {
        self.holders.contains_key(&inode)
    }

    /// Changes that some answers have to wait for.
    pub fn change_count(&self) -> usize {
        self.changes.len()
    }

    /// Clients with a cache.
    pub fn clients(&self) -> usize {
        self.clients.len()
    }

    /// What clients were told: inodes, each counted once per client.
    pub fn held(&self) -> usize {
        self.held
    }

    fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// A call of `session`, which lives, and this node led after the call had come.
    pub fn watch(&mut self, session: SessionId, watch: &Watch, now: Instant) -> Watched {
        self.expire(now);
        let known = self.clients.get(&session).map(|c| (c.epoch, c.call));
        match known {
            // The client has asked anew since, and nobody waits for this one's answer.
            Some((epoch, call)) if watch.call < call => {
                return Watched { epoch, through: watch.forgotten, ..Watched::default() };
            }
            // Or a repetition of the call that began the epoch.
            Some((epoch, call)) if epoch == watch.epoch || call == watch.call => {}
            _ => {
                self.forget(session);
                if self.clients.len() >= CLIENTS_MAX {
                    return Watched::default();
                }
                let client = Client {
                    epoch: self.number(),
                    call: watch.call,
                    until: now,
                    held: HashMap::new(),
                    recalls: VecDeque::new(),
                    told: 0,
                    next: 1,
                };
                self.clients.insert(session, client);
            }
        }
        let Some(client) = self.clients.get_mut(&session) else { return Watched::default() };
        client.call = watch.call;
        let forgotten = if client.epoch == watch.epoch { watch.forgotten } else { 0 };
        let mut done = Vec::new();
        while let Some(recall) = client.recalls.pop_front_if(|r| r.number <= forgotten) {
            done.push(recall.change);
        }
        // Who was told to forget and does not say that it has gets no more time, or others would wait for
        // as long as it likes.
        let lease = if forgotten >= client.told { LEASE } else { Duration::ZERO };
        client.until = client.until.max(now + lease);
        let epoch = client.epoch;
        for change in done {
            self.recall_done(change);
        }
        let lease_ms = u32::try_from(lease.as_millis()).unwrap_or(0);
        let (recalled, through) = self.recalls(session, epoch);
        Watched { epoch, lease_ms, recalled, through, wanted: Vec::new() }
    }

    /// What `session` still has to forget, and the number of the last of them.
    pub fn recalls(&mut self, session: SessionId, epoch: u64) -> (Vec<InodeId>, u64) {
        let Some(client) = self.clients.get_mut(&session).filter(|c| c.epoch == epoch) else {
            return (Vec::new(), 0);
        };
        let first = client.recalls.iter().take(RECALLS_MAX);
        let recalled: Vec<InodeId> = first.map(|r| r.inode).collect();
        if let Some(last) = recalled.len().checked_sub(1).and_then(|i| client.recalls.get(i)) {
            client.told = client.told.max(last.number);
        }
        (recalled, client.told)
    }

    /// Whether a client may be told of things that it did not ask for one by one: it holds few others.
    pub fn has_much_room(&self, session: SessionId) -> bool {
        let few = |c: &Client| c.held.len() < HELD_PER_CLIENT_MAX / 4;
        self.clients.get(&session).is_some_and(few) && self.held < HELD_MAX / 2
    }

    /// `session` is told of these inodes as they are now: nothing is applied between the look at them and
    /// this. `None`: they are not leased.
    pub fn grant(&mut self, session: SessionId, inodes: &[InodeId], now: Instant) -> Option<Lease> {
        let number = self.last + 1;
        let client = self.clients.get_mut(&session).filter(|c| now < c.until)?;
        if client.held.len() + inodes.len() > HELD_PER_CLIENT_MAX
            || self.held + inodes.len() > HELD_MAX
        {
            return None;
        }
        for &inode in inodes {
            if client.held.insert(inode, number).is_none() {
                self.held += 1;
                self.holders.entry(inode).or_default().push(session);
            }
        }
        self.last = number;
        Some(Lease { epoch: client.epoch, number })
    }

    /// `session` has forgotten by itself what it was told of these under that lease and earlier ones. What it
    /// was told since stays: this may come late.
    pub fn dropped(&mut self, session: SessionId, inodes: &[(InodeId, u64)]) {
        for &(inode, number) in inodes {
            let Some(client) = self.clients.get_mut(&session) else { return };
            if client.held.get(&inode).is_some_and(|latest| *latest <= number) {
                client.held.remove(&inode);
                self.remove_holder(inode, session);
            }
        }
    }

    fn remove_holder(&mut self, inode: InodeId, session: SessionId) {
        if let Some(holders) = self.holders.get_mut(&inode) {
            let before = holders.len();
            holders.retain(|s| *s != session);
            self.held -= before - holders.len();
            if holders.is_empty() {
                self.holders.remove(&inode);
            }
        }
    }

    /// A command was applied: it changed `written` and had looked at `read`. Answers the changes that its
    /// reply has to wait for: those that it comes after, because it has seen what they changed, or has changed
    /// what somebody saw who waits for them.
    pub fn applied(&mut self, read: &[InodeId], written: &[InodeId], now: Instant) -> Vec<u64> {
        let mut waits = Vec::new();
        for (id, change) in &mut self.changes {
            let after = read.iter().chain(written).any(|i| change.inodes.contains(i))
                || written.iter().any(|i| change.looked.contains(i));
            if after {
                change.inodes.extend(written);
                change.looked.extend(read);
                waits.push(*id);
            }
        }
        let number = self.last + 1;
        let mut recalls = 0;
        for &inode in written {
            let Some(holders) = self.holders.remove(&inode) else { continue };
            self.held -= holders.len();
            for session in holders {
                let Some(client) = self.clients.get_mut(&session) else { continue };
                client.held.remove(&inode);
                if now < client.until {
                    client.recalls.push_back(Recall { number: client.next, inode, change: number });
                    client.next += 1;
                    recalls += 1;
                }
            }
        }
        if recalls > 0 {
            self.last = number;
            let (inodes, looked) = (written.iter().copied(), read.iter().copied());
            let change = Change { inodes: inodes.collect(), looked: looked.collect(), recalls };
            self.changes.insert(number, change);
            waits.push(number);
        }
        waits
    }

    /// Sessions that have something to forget.
    pub fn recalled(&self) -> impl Iterator<Item = SessionId> {
        self.clients.iter().filter(|(_, c)| !c.recalls.is_empty()).map(|(s, _)| *s)
    }

    /// A question has looked at these inodes, nothing is applied between the look and this. The changes that its
    /// answer has to wait for.
    pub fn looked(&mut self, inodes: &[InodeId]) -> Vec<u64> {
        let mut waits = Vec::new();
        for (id, change) in &mut self.changes {
            if inodes.iter().any(|i| change.inodes.contains(i)) {
                change.looked.extend(inodes);
                waits.push(*id);
            }
        }
        waits
    }

    /// Whether anybody may hear at once of an inode as it is now.
    pub fn is_settled(&self, inode: InodeId) -> bool {
        !self.changes.values().any(|c| c.inodes.contains(&inode))
    }

    #[cfg(test)]
    pub(super) fn changes_of(&self, inodes: &[InodeId]) -> Vec<u64> {
        let about = |c: &Change| inodes.iter().any(|i| c.inodes.contains(i));
        self.changes.iter().filter(|(_, c)| about(c)).map(|(id, _)| *id).collect()
    }

    /// Whether one of these changes still has to be waited for.
    pub fn is_pending(&self, changes: &[u64]) -> bool {
        changes.iter().any(|c| self.changes.contains_key(c))
    }

    /// When the first client that has something to forget has nothing left to use.
    pub fn next_end(&self) -> Option<Instant> {
        self.clients.values().filter(|c| !c.recalls.is_empty()).map(|c| c.until).min()
    }

    /// Forgets the clients whose leases have ended.
    pub fn expire(&mut self, now: Instant) {
        let ended = self.clients.iter().filter(|(_, c)| c.until <= now);
        for session in ended.map(|(s, _)| *s).collect::<Vec<_>>() {
            self.forget(session);
        }
    }

    /// A client has forgotten everything: its session has ended, or it said so.
    pub fn forget(&mut self, session: SessionId) {
        let Some(client) = self.clients.remove(&session) else { return };
        for inode in client.held.into_keys() {
            self.remove_holder(inode, session);
        }
        for recall in client.recalls {
            self.recall_done(recall.change);
        }
    }

    fn recall_done(&mut self, change: u64) {
        if let Some(c) = self.changes.get_mut(&change) {
            c.recalls -= 1;
            if c.recalls == 0 {
                self.changes.remove(&change);
            }
        }
    }
}
