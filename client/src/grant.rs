//! The grant under which a file's chunks are read and written, and how a fresh one is got.

use crate::Result;
use crate::cluster::turn;
use crate::error::ClientError;
use crate::inode::{Hold, OpenInode, Remote};
use crate::pool::GrantTag;
use ebb_dataplane_protocol::{Grant, GrantMode, SignedGrant};
use ebb_metaplane_protocol::op::{OpenMode, Opened};
use ebb_metaplane_protocol::{FsError, Op, OpReply};
use std::sync::Arc;
use tokio::time::Instant;

/// A grant as its holder sees it.
pub(crate) struct GrantState {
    pub(crate) signed: SignedGrant,
    pub(crate) grant: Grant,
    /// Epoch of the session it was issued to.
    pub(crate) epoch: u64,
}

impl GrantState {
    pub(crate) fn new(signed: SignedGrant, epoch: u64) -> Result<Self> {
        let grant = signed.peek().map_err(|e| ClientError::Metadata(e.to_string()))?;
        Ok(Self { signed, grant, epoch })
    }

    /// What identifies it at a core.
    pub(crate) fn tag(&self) -> GrantTag {
        GrantTag {
            generation: self.grant.generation,
            view: self.grant.view.version,
            mode: self.grant.mode,
            alloc_limit: self.grant.alloc_limit,
            issued_at: self.grant.least_map_version,
        }
    }

    /// Whether a write that ends at `end` (or, for `None`, a read) may be sent under it.
    pub(crate) fn allows(&self, write_end: Option<u64>) -> bool {
        match write_end {
            None => true,
            Some(end) => self.grant.mode == GrantMode::Write && end <= self.grant.alloc_limit,
        }
    }

    /// Which of two grants to keep: the newer view, then the newer generation, then the wider one,
    /// then the later issued one.
    /// A core holds one grant per (inode, session), so keeping an older one would only alternate.
    pub(crate) fn newer_than(&self, other: &Self) -> bool {
        let rank = |g: &Self| {
            let write = g.grant.mode == GrantMode::Write;
            let grant = &g.grant;
            (
                g.epoch,
                grant.view.version,
                grant.generation,
                write,
                grant.alloc_limit,
                grant.least_map_version,
            )
        };
        rank(self) >= rank(other)
    }
}

impl OpenInode {
    /// The current grant if it serves, else a fresh one. `bad`: one that a core refused.
    pub(crate) async fn grant(
        &self,
        write_end: Option<u64>,
        bad: Option<&Arc<GrantState>>,
        deadline: Instant,
    ) -> Result<Arc<GrantState>> {
        if let Some(grant) = self.usable(write_end, bad)? {
            return Ok(grant);
        }
        let _one = turn(&self.granting, deadline).await?;
        if let Some(grant) = self.usable(write_end, bad)? {
            return Ok(grant);
        }
        // A session may expire under each step; two turns see a fresh one through.
        for _ in 0..3 {
            let remote = self.live_remote(write_end.is_some(), deadline).await?;
            let op = Op::Regrant {
                handle: remote.handle,
                write: write_end.is_some(),
                write_end: write_end.unwrap_or(0),
            };
            match self.shared.cluster.mutate_by(op, Some(remote.epoch), deadline).await {
                Ok((OpReply::Opened(opened), epoch)) => {
                    let grant = self.install(&opened, epoch)?;
                    if !grant.allows(write_end) {
                        return Err(ClientError::Metadata("a narrower grant than asked".into()));
                    }
                    return Ok(grant);
                }
                Ok(_) => return Err(ClientError::Metadata("no grant in the answer".into())),
                Err(ClientError::Fs(FsError::SessionExpired)) => continue,
                Err(ClientError::Fs(FsError::Stale | FsError::NotFound)) => {
                    if self.released(&remote) {
                        continue;
                    }
                    self.mark_stale();
                    return Err(ClientError::Stale);
                }
                Err(e) => return Err(e),
            }
        }
        Err(FsError::SessionExpired.into())
    }

    /// That handle was closed here since: what is said of it says nothing about the file.
    fn released(&self, remote: &Remote) -> bool {
        let state = self.state();
        let mut handles = state.holds.values().filter_map(Hold::handle);
        !handles.any(|r| r.handle == remote.handle && r.epoch == remote.epoch)
    }

    fn usable(
        &self,
        write_end: Option<u64>,
        bad: Option<&Arc<GrantState>>,
    ) -> Result<Option<Arc<GrantState>>> {
        let (_, epoch) = self.shared.cluster.session.current();
        self.check_locks(epoch)?;
        let state = self.state();
        if state.stale {
            return Err(ClientError::Stale);
        }
        Ok(state
            .grant
            .as_ref()
            .filter(|g| {
                g.epoch == epoch && g.allows(write_end) && !bad.is_some_and(|b| Arc::ptr_eq(b, g))
            })
            .cloned())
    }

    /// A handle of the current session: one that is open, or one opened anew in place of a handle
    /// whose session expired. The lineage must be the old one (PROTOCOL §5).
    pub(crate) async fn live_remote(&self, write: bool, deadline: Instant) -> Result<Remote> {
        let (_, epoch) = self.shared.cluster.session.current();
        self.check_locks(epoch)?;
        let old = {
            let state = self.state();
            let mut handles = state.holds.values().filter_map(Hold::handle);
            if let Some(r) = handles.find(|r| r.epoch == epoch) {
                return Ok(r);
            }
            state.holds.keys().next_back().copied()
        };
        let Some(local) = old else { return Err(ClientError::BadHandle) };
        let remote = self.open_anew(write, deadline).await?.ok_or(ClientError::Stale)?;
        let old = self.state().holds.insert(local, Hold::Handle(remote));
        if let Some(loan @ Hold::Loan(_)) = old {
            self.shared.let_go(self.id, loan);
        }
        Ok(remote)
    }

    /// Another handle of the file as it is here. `None`: there is no such file any more; it is stale now.
    pub(crate) async fn open_anew(&self, write: bool, deadline: Instant) -> Result<Option<Remote>> {
        let open = OpenMode { write, truncate: false };
        let op = Op::Open { inode: self.id, open };
        let (opened, epoch) = match self.shared.cluster.mutate_by(op, None, deadline).await {
            Ok((OpReply::Opened(opened), epoch)) => (opened, epoch),
            Ok(_) => return Err(ClientError::Metadata("no handle in the answer".into())),
            Err(ClientError::Fs(FsError::Stale | FsError::NotFound)) => {
                self.mark_stale();
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        let remote = Remote { handle: opened.handle, epoch };
        match self.install(&opened, epoch) {
            Ok(_) => Ok(Some(remote)),
            Err(ClientError::Stale) => {
                self.shared.linger(remote);
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Takes over the attributes and the grant of an `Opened`. Another lineage makes the inode's
    /// handles stale: never a mix of two objects (PROTOCOL §9).
    pub(crate) fn install(&self, opened: &Opened, epoch: u64) -> Result<Arc<GrantState>> {
        let grant = Arc::new(GrantState::new(opened.grant.clone(), epoch)?);
        let mut state = self.state();
        if opened.lineage != state.lineage {
            state.stale = true;
            return Err(ClientError::Stale);
        }
        state.see(&opened.attr);
        if state.grant.as_ref().is_none_or(|old| grant.newer_than(old)) {
            state.grant = Some(Arc::clone(&grant));
        }
        Ok(grant)
    }
}
