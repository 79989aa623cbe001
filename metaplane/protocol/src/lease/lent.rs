//! The leader's note of who has which file open without a handle in the log (docs/PROTOCOL.md, R59).

use super::{LENT_PER_SESSION_MAX, RECALLS_MAX};
use ebb_dataplane_protocol::{InodeId, SessionId};
use std::collections::{BTreeMap, HashMap, HashSet};

/// Files lent to all sessions at most.
const LENT_MAX: usize = 2_000_000;

#[derive(Default)]
struct Borrower {
    files: HashSet<InodeId>,
    /// None of them was lent before this number.
    settled: u64,
    /// Files that are to be given back, and by which number they were lent last. `true`: an answer has told so.
    wanted: BTreeMap<InodeId, (u64, bool)>,
}

/// Files lent by this leader, and sessions that may have some from an earlier one.
///
/// It outlives leases: what was lent is noted until the session has given it back or has ended.
#[derive(Default)]
pub struct Lent {
    term: u64,
    files: HashMap<InodeId, Vec<(SessionId, u64)>>,
    sessions: HashMap<SessionId, Borrower>,
    count: usize,
    /// `None`: it is not known yet which.
    unsettled: Option<HashSet<SessionId>>,
}

impl Lent {
    /// This node leads in `term`. Comes before every other call.
    pub fn lead(&mut self, term: u64) {
        if self.term != term {
            *self = Self { term, ..Self::default() };
        }
    }

    /// The sessions to which earlier leaders may have lent files: those that the log named when this lead began, or
    /// later.
    pub fn earlier(&mut self, term: u64, sessions: impl IntoIterator<Item = SessionId>) {
        if self.term == term && self.unsettled.is_none() {
            self.unsettled = Some(sessions.into_iter().collect());
        }
    }

    /// Whether [`Self::earlier`] is still to come.
    pub fn is_new(&self) -> bool {
        self.unsettled.is_none()
    }

    /// `session` gets a file, under that number of a lease; nothing is applied between the look at the file, which has
    /// a name, and this. `false`: it has too many.
    pub fn lend(&mut self, session: SessionId, inode: InodeId, number: u64) -> bool {
        let has = self.sessions.get(&session).map_or(0, |b| b.files.len());
        if has >= LENT_PER_SESSION_MAX || self.count >= LENT_MAX {
            return false;
        }
        let borrower = self.sessions.entry(session).or_default();
        let holders = self.files.entry(inode).or_default();
        if borrower.files.insert(inode) {
            self.count += 1;
            holders.push((session, number));
        } else if let Some(holder) = holders.iter_mut().find(|h| h.0 == session) {
            holder.1 = number;
        }
        true
    }

    /// `session` has these no more under that number or an earlier one, or has handles in the log for them by now.
    pub fn returned(&mut self, session: SessionId, files: &[(InodeId, u64)]) {
        for &(inode, number) in files {
            let holders = self.files.get(&inode).into_iter().flatten();
            if holders.into_iter().any(|h| h.0 == session && h.1 <= number) {
                self.remove(session, inode);
            }
        }
    }

    /// `session` has nothing any more that was lent before the number `since`, by whomever.
    pub fn settled(&mut self, session: SessionId, since: u64) {
        if let Some(unsettled) = &mut self.unsettled {
            unsettled.remove(&session);
        }
        let Some(borrower) = self.sessions.get_mut(&session) else { return };
        // Every call says so.
        if std::mem::replace(&mut borrower.settled, since) == since {
            return;
        }
        let old = |inode: &&InodeId| {
            let holders = self.files.get(inode).into_iter().flatten();
            holders.into_iter().any(|h| h.0 == session && h.1 < since)
        };
        for inode in borrower.files.iter().filter(old).copied().collect::<Vec<_>>() {
            self.remove(session, inode);
        }
    }

    fn remove(&mut self, session: SessionId, inode: InodeId) {
        if let Some(borrower) = self.sessions.get_mut(&session) {
            self.count -= usize::from(borrower.files.remove(&inode));
            borrower.wanted.remove(&inode);
            if borrower.files.is_empty() {
                self.sessions.remove(&session);
            }
        }
        if let Some(holders) = self.files.get_mut(&inode) {
            holders.retain(|h| h.0 != session);
            if holders.is_empty() {
                self.files.remove(&inode);
            }
        }
    }

    /// The session has ended.
    pub fn forget(&mut self, session: SessionId) {
        if let Some(unsettled) = &mut self.unsettled {
            unsettled.remove(&session);
        }
        let files = self.sessions.get(&session).map(|b| b.files.clone()).unwrap_or_default();
        for inode in files {
            self.remove(session, inode);
        }
    }

    /// Sessions that one of these files waits for.
    pub fn holders(&self, files: &[InodeId]) -> HashSet<SessionId> {
        let holders = files.iter().filter_map(|file| self.files.get(file)).flatten();
        holders.map(|h| &h.0).chain(self.unsettled.iter().flatten()).copied().collect()
    }

    /// Sessions that are waited for.
    pub fn sessions(&self) -> HashSet<SessionId> {
        self.sessions.keys().chain(self.unsettled.iter().flatten()).copied().collect()
    }

    /// Whether nobody has a file open but by handles in the log, and nobody will: it has no name any more. If somebody
    /// has, it is wanted back from then on; `wake` is told of those who have not heard so.
    pub fn may_go(&mut self, inode: InodeId, mut wake: impl FnMut(SessionId)) -> bool {
        let Some(holders) = self.files.get(&inode) else {
            return self.unsettled.as_ref().is_some_and(HashSet::is_empty);
        };
        for &(session, number) in holders {
            let Some(borrower) = self.sessions.get_mut(&session) else { continue };
            if borrower.wanted.get(&inode).is_none_or(|w| w.0 != number) {
                borrower.wanted.insert(inode, (number, false));
                wake(session);
            }
        }
        false
    }

    /// What a session is to give back, or to get handles for; with the numbers to be told when it has.
    pub fn wanted(&mut self, session: SessionId) -> Vec<(InodeId, u64)> {
        let Some(borrower) = self.sessions.get_mut(&session) else { return Vec::new() };
        let first = borrower.wanted.iter_mut().take(RECALLS_MAX);
        first
            .map(|(inode, (number, told))| {
                *told = true;
                (*inode, *number)
            })
            .collect()
    }

    /// Whether there is something of that which no answer has told.
    pub fn is_wanted(&self, session: SessionId) -> bool {
        let wanted = self.sessions.get(&session).map(|b| &b.wanted);
        wanted.is_some_and(|w| w.values().take(RECALLS_MAX).any(|(_, told)| !told))
    }
}
