//! What this client was told and may answer from (docs/PROTOCOL.md, R52 to R55), and the call that keeps it so.

use crate::Result;
use crate::cluster::Shared;
use crate::fs;
use crate::lent::Loan;
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::attr::Attr;
use ebb_metaplane_protocol::lease::{
    Cache, Counts, DROPPED_MAX, LEASE, Lease, Loans, Ticket, Watch, Watched,
};
use ebb_metaplane_protocol::{
    FsError, Op, Query, QueryReply, Request, Response, SessionCall, SessionReply,
};
use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::{Duration, Instant};

/// Pause after a call that gave no lease.
const PAUSE: Duration = Duration::from_millis(50);

/// Is told of inodes whose attributes are not to be used any more, and returns when nobody does.
pub type Forget = Box<dyn Fn(&[InodeId]) + Send + Sync>;

/// The cache, if the client has one.
#[derive(Default)]
pub(crate) struct Leased {
    cache: Option<Mutex<Cache>>,
    /// Who else uses what is remembered.
    others: RwLock<Vec<Forget>>,
    /// Everything is being forgotten: held until nobody uses it, before the leader may hear of it.
    forgetting: Mutex<()>,
    /// Files that are open without handles.
    loans: Mutex<Loans>,
    /// Who has such files.
    borrowers: Mutex<Vec<Weak<fs::Shared>>>,
    /// One gives back at a time.
    giving: Arc<tokio::sync::Mutex<()>>,
}

/// A question on its way.
pub(crate) struct Asked(Option<(Ticket, Instant)>);

impl Leased {
    pub(crate) fn new(on: bool) -> Self {
        Self { cache: on.then(Mutex::default), ..Self::default() }
    }

    pub(crate) fn is_on(&self) -> bool {
        self.cache.is_some()
    }

    fn cache(&self) -> Option<MutexGuard<'_, Cache>> {
        Some(self.cache.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The answer to a question, if it need not be sent.
    pub(crate) fn known(&self, query: &Query) -> Option<Result<QueryReply>> {
        let mut cache = self.cache()?;
        let now = Instant::now();
        let attr = match query {
            Query::GetAttr(inode) => Some(cache.attr(*inode, now)?),
            Query::Lookup { parent, name } => cache.lookup(*parent, name, now)?,
            _ => return None,
        };
        Some(attr.map(QueryReply::Attr).ok_or_else(|| FsError::NotFound.into()))
    }

    /// A question is about to be sent.
    pub(crate) fn asks(&self) -> Asked {
        Asked(self.cache().map(|cache| (cache.asks(), Instant::now())))
    }

    /// The answer has come: as a client without a cache gets it.
    pub(crate) fn told(
        &self,
        asked: &Asked,
        query: &Query,
        reply: QueryReply,
    ) -> Result<QueryReply> {
        let (attr, lease) = match reply {
            QueryReply::Leased(attr, lease) => (attr, lease),
            QueryReply::LeasedPage { entries, end, lease } => {
                if let (Some(mut cache), Some(asked), Query::ReadDir { inode, .. }) =
                    (self.cache(), asked.0, query)
                {
                    cache.told_page(asked, lease, *inode, &entries);
                }
                return Ok(QueryReply::Page { entries, end });
            }
            reply => return Ok(reply),
        };
        if let (Some(mut cache), Some((ticket, sent))) = (self.cache(), asked.0) {
            match (query, &attr) {
                (Query::Lookup { parent, name }, attr) => {
                    cache.told_entry((ticket, sent), lease, (*parent, name), attr.as_ref());
                }
                (_, Some(attr)) => cache.told(ticket, lease, attr),
                (_, None) => {}
            }
        }
        if self.cache().is_some_and(|cache| cache.is_full()) {
            self.reset();
        }
        attr.map(QueryReply::Attr).ok_or_else(|| FsError::NotFound.into())
    }

    /// A question for a file to be lent is about to be sent. `None`: there is no use in it.
    pub(crate) fn ticket(&self) -> Option<Ticket> {
        self.cache().filter(|cache| cache.epoch() != 0).map(|cache| cache.asks())
    }

    /// The attributes that came with a file.
    pub(crate) fn told_attr(&self, ticket: Ticket, lease: Lease, attr: &Attr) {
        if let Some(mut cache) = self.cache() {
            cache.told(ticket, lease, attr);
        }
    }

    /// Whether what was lent is still: nobody has wanted it back since it was asked for, and the leader that lent it
    /// is the one who is known here.
    pub(crate) fn may_use(&self, loan: &Loan, inode: InodeId) -> bool {
        self.cache().is_some_and(|cache| cache.may_borrow(loan.ticket, loan.lease, inode))
    }

    pub(crate) fn loans(&self) -> MutexGuard<'_, Loans> {
        self.loans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Files are lent to it from now on.
    pub(crate) fn lends_to(&self, files: Weak<fs::Shared>) {
        self.borrowers.lock().unwrap_or_else(PoisonError::into_inner).push(files);
    }

    /// Has what is wanted back given back, and what is of another epoch.
    fn heed(&self, shared: &Arc<Shared>, wanted: &[(InodeId, u64)], epoch: u64) {
        self.loans().wanted(wanted);
        if epoch == 0 || wanted.is_empty() && self.loans().is_settled(epoch) {
            return;
        }
        // Who is at it is told again what was not done.
        let Ok(one) = Arc::clone(&self.giving).try_lock_owned() else { return };
        let files: Vec<_> = {
            let mut all = self.borrowers.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|files| files.strong_count() > 0);
            all.clone()
        };
        let wanted: HashSet<InodeId> = wanted.iter().map(|w| w.0).collect();
        let shared = Arc::downgrade(shared);
        tokio::spawn(async move {
            let _one = one;
            for files in files.iter().filter_map(Weak::upgrade) {
                if let Err(e) = files.return_loans(&wanted, epoch).await {
                    tracing::debug!(error = %e, "files that were lent have no handles yet");
                    return;
                }
            }
            if let Some(shared) = shared.upgrade() {
                shared.leased.loans().settled(epoch);
            }
        });
    }

    /// Has somebody told, from now on, of what is forgotten.
    pub(crate) fn tell(&self, forget: Forget) {
        self.others.write().unwrap_or_else(PoisonError::into_inner).push(forget);
    }

    fn forgotten(&self, inodes: &[InodeId]) {
        if !inodes.is_empty() {
            let others = self.others.read().unwrap_or_else(PoisonError::into_inner);
            others.iter().for_each(|forget| forget(inodes));
        }
    }

    /// How long others may use these attributes, if they are what is remembered.
    pub(crate) fn lease_on(&self, attr: &Attr) -> Option<Duration> {
        self.cache()?.lease_on(attr, Instant::now())
    }

    /// An operation is about to be sent: what it surely changes is forgotten, and the leader told so.
    pub(crate) fn forgets(&self, op: &Op) -> Vec<(InodeId, u64)> {
        let Some(mut cache) = self.cache() else { return Vec::new() };
        let mut inodes = Vec::new();
        match op {
            Op::Create { parent, name, .. }
            | Op::Mkdir { parent, name, .. }
            | Op::Symlink { parent, name, .. }
            | Op::Unlink { parent, name }
            | Op::Rmdir { parent, name } => {
                inodes.push(*parent);
                inodes.extend(cache.remembers(*parent, name));
            }
            Op::Rename { parent, name, new_parent, new_name, .. } => {
                inodes.extend([*parent, *new_parent]);
                inodes.extend(cache.remembers(*parent, name));
                inodes.extend(cache.remembers(*new_parent, new_name));
            }
            Op::Link { inode, parent, .. } => inodes.extend([*inode, *parent]),
            Op::Publish(p) => inodes.extend([p.parent, p.commit.inode]),
            Op::Open { inode, open } if open.write || open.truncate => inodes.push(*inode),
            Op::Commit(commit) => inodes.push(commit.inode),
            Op::SetAttr { inode, .. } | Op::SetXattr { inode, .. } => inodes.push(*inode),
            Op::Release { commit: Some(commit), .. } => inodes.push(commit.inode),
            Op::ReturnNames { dirs } => {
                inodes.extend(dirs.iter().map(|d| d.0).take(DROPPED_MAX));
            }
            Op::Open { .. }
            | Op::Regrant { .. }
            | Op::Release { .. }
            | Op::ReleaseMany { .. }
            | Op::Reserve { .. }
            | Op::Lock { .. } => {}
        }
        let dropped = cache.forgets(&inodes);
        drop(cache);
        let inodes: Vec<InodeId> = dropped.iter().map(|d| d.0).collect();
        self.forgotten(&inodes);
        dropped
    }

    /// The session is another one, or there is too much.
    pub(crate) fn reset(&self) {
        let _forgetting = self.forgetting();
        let had = self.cache().map(|mut cache| cache.reset()).unwrap_or_default();
        self.forgotten(&had);
    }

    fn forgetting(&self) -> MutexGuard<'_, ()> {
        self.forgetting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next call to the leader. What it says is forgotten is.
    fn watch(&self) -> Option<Watch> {
        let _forgetting = self.forgetting();
        let mut watch = self.cache()?.watch();
        self.loans().tell(&mut watch);
        Some(watch)
    }

    fn answered(&self, watch: &Watch, sent: Instant, answer: &Watched) {
        if let Some(mut cache) = self.cache() {
            cache.answered(watch, sent, answer);
        }
        self.forgotten(&answer.recalled);
    }

    /// What it was good for.
    pub(crate) fn counts(&self) -> Counts {
        self.cache().map(|cache| cache.counts()).unwrap_or_default()
    }
}

/// Keeps the lease until the client is gone: a call is always with the leader, which answers when there is
/// something to forget, or after a while.
pub(crate) async fn watch(shared: Weak<Shared>) {
    loop {
        let Some(shared) = shared.upgrade() else { return };
        if !once(&shared).await {
            drop(shared);
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// A call. `false`: it gave no lease.
async fn once(shared: &Arc<Shared>) -> bool {
    let (session, epoch) = shared.session.current();
    // The lease counts from before it is sent.
    let sent = Instant::now();
    let Some(watch) = shared.leased.watch() else { return false };
    let request = Request::Session(SessionCall::Watch(session, watch.clone()));
    let answer = shared.meta.call(&request, LEASE).await;
    if !matches!(answer, Ok(Response::Session(Ok(_)))) {
        shared.leased.loans().not_told(&watch);
    }
    match answer {
        Ok(Response::Session(Ok(SessionReply::Watched(answer)))) => {
            if shared.session.current().1 == epoch {
                shared.leased.answered(&watch, sent, &answer);
                shared.leased.heed(shared, &answer.wanted, answer.epoch);
            }
            let Watched { epoch, lease_ms, .. } = answer;
            epoch != 0 && lease_ms != 0
        }
        Ok(Response::Session(Err(FsError::SessionExpired))) => {
            if let Err(e) = shared.reopen_session(epoch, shared.deadline()).await {
                tracing::warn!(error = %e, "cannot replace the expired session yet");
            }
            false
        }
        Ok(other) => {
            tracing::debug!(?other, "odd answer to a watch");
            false
        }
        Err(e) => {
            tracing::debug!(error = %e, "nobody takes the watch");
            false
        }
    }
}
