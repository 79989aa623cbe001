//! The leases on what clients were told (docs/PROTOCOL.md, R52 to R55), where commands are applied and answers
//! wait. The rules are [`ebb_metaplane_protocol::lease`]'s.

use ebb_dataplane_protocol::{InodeId, SessionId};
use ebb_metaplane_protocol::lease::{HOLD, Lease, Leases, Lent, Watch, Watched};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::Notify;

/// The changes that an answer waits for.
pub(crate) type Waits = Vec<u64>;

/// Shared by who applies commands and who answers.
#[derive(Default)]
pub(crate) struct LeaseDesk {
    state: Mutex<State>,
    /// Nobody has a lease, and nothing waits.
    idle: AtomicBool,
    /// Some answers have to wait.
    changes: AtomicBool,
    /// A change needs to be waited for no longer.
    settled: Notify,
}

#[derive(Default)]
struct State {
    leases: Leases,
    lent: Lent,
    /// Calls that are held for recalls to come.
    calls: HashMap<SessionId, Arc<Notify>>,
    /// No lease is given: that there are any is being taken back.
    closed: bool,
}

impl std::fmt::Debug for LeaseDesk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LeaseDesk").field("held", &self.state().leases.held()).finish()
    }
}

impl LeaseDesk {
    pub(crate) fn new() -> Self {
        Self { idle: AtomicBool::new(true), ..Self::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the leases, and keeps the flags.
    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let before = state.leases.change_count();
        let result = f(&mut state);
        let after = state.leases.change_count();
        self.idle.store(state.leases.is_idle(), Ordering::SeqCst);
        self.changes.store(after > 0, Ordering::SeqCst);
        if after < before {
            self.settled.notify_waiters();
        }
        result
    }

    /// This node leads in a new term: what an earlier leader told is no business of this one.
    pub(crate) fn lead(&self, term: u64) {
        self.with(|s| {
            s.leases.lead(term);
            s.lent.lead(term);
            s.closed = false;
        });
    }

    /// Whether commands need not be watched. What is granted after this was asked is granted under a view of
    /// the state, and the caller keeps such views away until it has applied what it has.
    pub(crate) fn is_idle(&self) -> bool {
        self.idle.load(Ordering::SeqCst)
    }

    /// Whether somebody was told of it.
    pub(crate) fn is_held(&self, inode: InodeId) -> bool {
        self.state().leases.is_held(inode)
    }

    /// Whether some answers have to wait.
    pub(crate) fn has_changes(&self) -> bool {
        self.changes.load(Ordering::SeqCst)
    }

    /// A command was applied.
    pub(crate) fn applied(&self, read: &[InodeId], written: &[InodeId]) -> Waits {
        self.with(|s| {
            let waits = s.leases.applied(read, written, Instant::now());
            for session in s.leases.recalled() {
                if let Some(call) = s.calls.get(&session) {
                    call.notify_one();
                }
            }
            waits
        })
    }

    /// What an answer that looked at these waits for. Under the view that it looked at.
    pub(crate) fn looked(&self, seen: &[InodeId]) -> Waits {
        if seen.is_empty() { Waits::new() } else { self.state().leases.looked(seen) }
    }

    /// Whether anybody may hear of an inode at once. Under the view that shows it.
    pub(crate) fn is_settled(&self, inode: InodeId) -> bool {
        !self.has_changes() || self.state().leases.is_settled(inode)
    }

    /// Under the view that shows the inodes as the client is told of them.
    pub(crate) fn grant(&self, session: SessionId, inodes: &[InodeId]) -> Option<Lease> {
        self.with(|s| s.leases.grant(session, inodes, Instant::now()))
    }

    /// The same, of a file that has a name; and it is lent to the client.
    pub(crate) fn lend(&self, session: SessionId, inode: InodeId) -> Option<Lease> {
        self.with(|s| {
            let lease = s.leases.grant(session, &[inode], Instant::now())?;
            s.lent.lend(session, inode, lease.number).then_some(lease)
        })
    }

    /// Whether [`Self::lent_earlier`] is to be called.
    pub(crate) fn is_lender_new(&self) -> bool {
        self.state().lent.is_new()
    }

    /// Sessions to which an earlier leader than that of `term` may have lent files.
    pub(crate) fn lent_earlier(&self, term: u64, sessions: Vec<SessionId>) {
        self.state().lent.earlier(term, sessions);
    }

    /// Sessions that may have files open without a handle.
    pub(crate) fn borrowers(&self) -> HashSet<SessionId> {
        self.state().lent.sessions()
    }

    /// Sessions that these files, which have no name any more, wait for.
    pub(crate) fn borrowers_of(&self, files: &[InodeId]) -> HashSet<SessionId> {
        self.state().lent.holders(files)
    }

    /// Those of these files, which have no name any more, that nobody has open but by handles. The others are
    /// wanted back.
    pub(crate) fn may_go(&self, files: &[InodeId]) -> Vec<InodeId> {
        let mut state = self.state();
        let State { lent, calls, .. } = &mut *state;
        let mut wake = |session| {
            if let Some(call) = calls.get(&session) {
                call.notify_one();
            }
        };
        files.iter().copied().filter(|file| lent.may_go(*file, &mut wake)).collect()
    }

    /// Whether a client may be told of things that it did not ask for one by one.
    pub(crate) fn has_much_room(&self, session: SessionId) -> bool {
        self.state().leases.has_much_room(session)
    }

    /// A client forgot these by itself.
    pub(crate) fn dropped(&self, session: SessionId, inodes: &[(InodeId, u64)]) {
        if !inodes.is_empty() {
            self.with(|s| s.leases.dropped(session, inodes));
        }
    }

    /// A session has ended.
    pub(crate) fn forget(&self, session: SessionId) {
        self.with(|s| {
            s.leases.forget(session);
            s.lent.forget(session);
            s.calls.remove(&session);
        });
    }

    /// Clients with a cache.
    pub(crate) fn clients(&self) -> usize {
        self.state().leases.clients()
    }

    /// Gives no more leases if nobody has one. To be opened again.
    pub(crate) fn close(&self) -> bool {
        let mut state = self.state();
        state.leases.expire(Instant::now());
        state.closed = state.leases.clients() == 0;
        state.closed
    }

    pub(crate) fn open(&self) {
        self.state().closed = false;
    }

    /// The beginning of a call of a session that lives; this node led after the call came.
    pub(crate) fn watch(&self, session: SessionId, watch: &Watch) -> Watched {
        self.with(|s| {
            s.lent.returned(session, &watch.returned);
            if s.closed {
                return Watched::default();
            }
            let answer = s.leases.watch(session, watch, Instant::now());
            // What it says of another epoch was said of another leader's, or before its lease ended.
            if watch.settled != 0 && watch.settled == answer.epoch {
                s.lent.settled(session, answer.epoch);
            }
            answer
        })
    }

    /// The rest of it: held until there is something to tell.
    pub(crate) async fn hold(&self, session: SessionId, mut answer: Watched) -> Watched {
        if answer.epoch == 0 || !answer.recalled.is_empty() || answer.lease_ms == 0 {
            return answer;
        }
        let call: Arc<Notify> = Arc::default();
        // The latest call is the one to be told.
        if let Some(before) = self.state().calls.insert(session, Arc::clone(&call)) {
            before.notify_one();
        }
        let (recalled, through) = self.with(|s| s.leases.recalls(session, answer.epoch));
        (answer.recalled, answer.through) = (recalled, through.max(answer.through));
        if answer.recalled.is_empty() && !self.state().lent.is_wanted(session) {
            let _ = tokio::time::timeout(HOLD, call.notified()).await;
            self.with(|s| {
                if s.calls.get(&session).is_some_and(|c| Arc::ptr_eq(c, &call)) {
                    s.calls.remove(&session);
                    let (recalled, through) = s.leases.recalls(session, answer.epoch);
                    (answer.recalled, answer.through) = (recalled, through.max(answer.through));
                }
            });
        }
        answer.wanted = self.state().lent.wanted(session);
        answer
    }

    /// Returns when nobody uses any more what those changes changed.
    pub(crate) async fn settle(&self, waits: &[u64]) {
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            settled.as_mut().enable();
            let end = {
                let state = self.state();
                if !state.leases.is_pending(waits) {
                    return;
                }
                state.leases.next_end()
            };
            let Some(end) = end else { return };
            if tokio::time::timeout_at(end.into(), settled).await.is_err() {
                self.with(|s| s.leases.expire(Instant::now()));
            }
        }
    }
}
