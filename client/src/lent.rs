//! Files that are open for reading without a handle in the metadata plane's log (docs/PROTOCOL.md, R59): the leader
//! notes them. Before it lets a file go that has lost its last name, and when another leader comes, each that is still
//! open gets a handle.

use crate::Result;
use crate::cluster::turn;
use crate::error::ClientError;
use crate::files::{OpenFile, OpenedFile};
use crate::fs::{FileSystem, Shared};
use crate::grant::GrantState;
use crate::inode::{Hold, OpenInode};
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::lease::{Lease, Ticket};
use ebb_metaplane_protocol::query::LentFile;
use ebb_metaplane_protocol::{FsError, Query, QueryReply};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

/// A file that was lent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loan {
    /// Epoch of the session.
    pub(crate) epoch: u64,
    pub(crate) lease: Lease,
    /// When it was asked for.
    pub(crate) ticket: Ticket,
}

/// A use of a file that is being asked for; ends with this, unless it is kept.
struct Use<'a> {
    shared: &'a Shared,
    inode: InodeId,
    is_kept: bool,
}

impl<'a> Use<'a> {
    fn begin(shared: &'a Shared, inode: InodeId) -> Self {
        shared.cluster.leased.loans().asks(inode);
        Self { shared, inode, is_kept: false }
    }
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        if !self.is_kept {
            self.shared.cluster.leased.loans().end(self.inode);
        }
    }
}

/// A hold that was taken from who kept it; ends with this, unless it is kept again.
pub(crate) struct Taken<'a> {
    shared: &'a Arc<Shared>,
    inode: InodeId,
    hold: Option<Hold>,
}

impl<'a> Taken<'a> {
    pub(crate) fn new(shared: &'a Arc<Shared>, inode: InodeId, hold: Hold) -> Self {
        Self { shared, inode, hold: Some(hold) }
    }

    pub(crate) fn keep(mut self) -> Option<Hold> {
        self.hold.take()
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(hold) = self.hold.take() {
            self.shared.let_go(self.inode, hold);
        }
    }
}

impl FileSystem {
    /// An open that is no entry in the log. `None`: it takes a handle.
    pub(crate) async fn borrow_file(&self, inode: InodeId) -> Result<Option<OpenedFile>> {
        let cluster = &self.shared.cluster;
        let asked = Instant::now();
        let Some(ticket) = cluster.leased.ticket() else { return Ok(None) };
        let (session, epoch) = cluster.session.current();
        let mut used = Use::begin(&self.shared, inode);
        let lent = match cluster.query_as(session, Query::Lend(inode)).await {
            Ok(QueryReply::Lent(Some(lent))) => *lent,
            Ok(_) | Err(ClientError::Fs(FsError::SessionExpired)) => return Ok(None),
            Err(e) => return Err(e),
        };
        let LentFile { attr, grant, lease } = lent;
        let loan = Loan { epoch, lease, ticket };
        let grant = Arc::new(GrantState::new(grant, epoch)?);
        let inode = self.attach(&attr, attr.lineage);
        {
            let mut state = inode.state();
            state.see(&attr);
            state.compared = state.compared.max(Some(asked));
            if state.grant.as_ref().is_none_or(|old| grant.newer_than(old)) {
                state.grant = Some(grant);
            }
        }
        cluster.leased.told_attr(ticket, lease, &attr);
        cluster.leased.loans().lent(attr.inode, lease.number);
        used.is_kept = true;
        Ok(self.enter_lent(inode, loan))
    }

    /// A file of this client, open with what was lent. `None`: it was wanted back, or the leader is another one.
    pub(crate) fn enter_lent(&self, inode: Arc<OpenInode>, loan: Loan) -> Option<OpenedFile> {
        let cluster = &self.shared.cluster;
        let id = inode.id;
        let (handle, attr) = self.enter(Arc::clone(&inode), Hold::Loan(loan), false);
        // First it is there to be found by who wants it back, then this.
        let same_session = cluster.session.current().1 == loan.epoch;
        if same_session && cluster.leased.may_use(&loan, id) {
            return Some(OpenedFile { handle, attr, created: false, parent: None });
        }
        let file = self.shared.files().remove(&handle.0);
        // It may have a handle by now.
        if let Some(file) = file {
            self.shared.drop_hold(&file);
        }
        self.detach(&inode);
        None
    }
}

impl Shared {
    /// Ends what a local file holds.
    pub(crate) fn drop_hold(self: &Arc<Self>, file: &OpenFile) {
        let hold = file.inode.state().holds.remove(&file.id());
        if let Some(hold) = hold {
            self.let_go(file.inode.id, hold);
        }
    }

    /// Ends a hold that nobody uses.
    pub(crate) fn let_go(self: &Arc<Self>, inode: InodeId, hold: Hold) {
        match hold {
            Hold::Handle(remote) => self.linger(remote),
            Hold::Loan(_) => self.cluster.leased.loans().end(inode),
        }
    }

    /// Local files that have one of these loans.
    fn lent(&self, is_one: impl Fn(InodeId, &Loan) -> bool) -> Vec<Arc<OpenFile>> {
        let has = |file: &&Arc<OpenFile>| match file.inode.state().holds.get(&file.id()) {
            Some(Hold::Loan(loan)) => is_one(file.inode.id, loan),
            _ => false,
        };
        self.files().values().filter(has).cloned().collect()
    }

    /// These files are given back, and all that are of another epoch: what is open gets a handle first.
    pub(crate) async fn return_loans(
        self: &Arc<Self>,
        wanted: &HashSet<InodeId>,
        epoch: u64,
    ) -> Result<()> {
        let is_one =
            |inode: InodeId, loan: &Loan| loan.lease.epoch != epoch || wanted.contains(&inode);
        for (inode, kept) in self.idle.drain(|inode, kept| match &kept.hold {
            Hold::Loan(loan) => is_one(inode, loan),
            Hold::Handle(_) => false,
        }) {
            self.let_go(inode, kept.hold);
        }
        let deadline = self.cluster.deadline();
        for file in self.lent(is_one) {
            file.inode.take_handle(file.id(), deadline).await?;
        }
        Ok(())
    }
}

impl OpenInode {
    /// Every local file gets a handle in place of what was lent to it.
    pub(crate) async fn take_handles(&self, deadline: tokio::time::Instant) -> Result<()> {
        let lent: Vec<u64> = {
            let state = self.state();
            state.holds.iter().filter(|h| matches!(h.1, Hold::Loan(_))).map(|h| *h.0).collect()
        };
        for local in lent {
            self.take_handle(local, deadline).await?;
        }
        Ok(())
    }

    /// A local file gets a handle in place of what was lent to it. A file that is gone is stale.
    async fn take_handle(&self, local: u64, deadline: tokio::time::Instant) -> Result<()> {
        let _one = turn(&self.granting, deadline).await?;
        let is_lent = || matches!(self.state().holds.get(&local), Some(Hold::Loan(_)));
        if !is_lent() {
            return Ok(());
        }
        let opened =
            if self.state().stale { None } else { self.open_anew(false, deadline).await? };
        let ended = {
            let mut state = self.state();
            match (state.holds.get(&local), &opened) {
                (Some(Hold::Loan(_)), Some(remote)) => {
                    state.holds.insert(local, Hold::Handle(*remote))
                }
                (Some(Hold::Loan(_)), None) => state.holds.remove(&local),
                // It was closed meanwhile.
                (_, Some(remote)) => Some(Hold::Handle(*remote)),
                (_, None) => None,
            }
        };
        if let Some(hold) = ended {
            self.shared.let_go(self.id, hold);
        }
        Ok(())
    }
}
