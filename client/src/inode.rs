//! An open inode: what this client knows of it and has not yet told the cluster.
//!
//! Several handles of one file share it. Everything here is guarded by one short lock that is never
//! held across I/O. An inode is bound to one lineage: when the object was replaced from outside, a
//! later open gets a new `OpenInode`, and this one's handles answer ESTALE (PROTOCOL §9).

use crate::Result;
use crate::buffer::WriteBuffer;
use crate::error::ClientError;
use crate::fs::Shared;
use crate::grant::GrantState;
use crate::lent::Loan;
use crate::readahead::Blocks;
use crate::unnamed::Place;
use bytes::Bytes;
use ebb_dataplane_protocol::{Generation, HandleId, InodeId, Lineage};
use ebb_metaplane_protocol::attr::{Attr, SetAttr, Time, TimeChange};
use futures::future::{BoxFuture, Shared as SharedFuture};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::Notify;

/// A handle at the metadata plane.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Remote {
    pub(crate) handle: HandleId,
    /// Epoch of its session.
    pub(crate) epoch: u64,
}

/// What keeps a file here open.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Hold {
    /// A handle in the metadata plane's log.
    Handle(Remote),
    /// Its leader's note (docs/PROTOCOL.md, R59). Files that are open for reading only.
    Loan(Loan),
}

impl Hold {
    pub(crate) fn handle(&self) -> Option<Remote> {
        match self {
            Self::Handle(remote) => Some(*remote),
            Self::Loan(_) => None,
        }
    }

    /// Epoch of the session.
    pub(crate) fn epoch(&self) -> u64 {
        match self {
            Self::Handle(remote) => remote.epoch,
            Self::Loan(loan) => loan.epoch,
        }
    }
}

/// A block being read ahead.
pub(crate) type Fetch = SharedFuture<BoxFuture<'static, Result<Bytes>>>;

pub(crate) struct OpenInode {
    pub(crate) id: InodeId,
    pub(crate) shared: Arc<Shared>,
    state: Mutex<State>,
    /// Something landed, or a barrier was lifted.
    pub(crate) changed: Notify,
    /// One asker for a grant at a time.
    pub(crate) granting: tokio::sync::Mutex<()>,
    /// One commit at a time.
    pub(crate) committing: tokio::sync::Mutex<()>,
}

pub(crate) struct State {
    attr: Attr,
    /// When the metadata plane last told.
    pub(crate) attr_at: Instant,
    pub(crate) lineage: Lineage,
    /// When an open last had it compared with the object that it is in S3, if that is known.
    pub(crate) compared: Option<Instant>,
    /// Epoch of the session under which locks were had last.
    pub(crate) locked: Option<u64>,
    /// By local file.
    pub(crate) holds: BTreeMap<u64, Hold>,
    /// Local files.
    pub(crate) opens: usize,
    pub(crate) grant: Option<Arc<GrantState>>,
    pub(crate) stale: bool,
    /// Where it belongs, while only this client knows of it.
    pub(crate) place: Option<Place>,
    pub(crate) buffer: WriteBuffer,
    /// Acknowledged and not committed: per generation, one past the last byte.
    pub(crate) ends: BTreeMap<Generation, u64>,
    /// Time of the last write that is not committed.
    pub(crate) mtime: Option<Time>,
    /// Attribute changes that ride in the next commit.
    pub(crate) set: SetAttr,
    /// When the oldest uncommitted change was made.
    pub(crate) uncommitted_since: Option<Instant>,
    /// Changes noted so far, and how many of them a commit has carried: who finds its own among them
    /// needs no commit of its own.
    pub(crate) changes: u64,
    pub(crate) committed_changes: u64,
    /// Created by this client and not yet committed: attribute changes may ride.
    pub(crate) fresh: bool,
    /// The last failed background write; `failures` counts them, handles remember what they saw.
    pub(crate) failure: Option<ClientError>,
    pub(crate) failures: u64,
    /// A truncate is under way: writes wait.
    pub(crate) barrier: bool,
    pub(crate) blocks: Blocks<Fetch>,
}

impl OpenInode {
    pub(crate) fn new(shared: Arc<Shared>, attr: Attr, lineage: Lineage) -> Self {
        let segment = shared.cluster.config.segment_bytes;
        let state = State {
            lineage,
            compared: None,
            locked: None,
            attr_at: Instant::now(),
            holds: BTreeMap::new(),
            opens: 0,
            grant: None,
            stale: false,
            place: None,
            buffer: WriteBuffer::new(segment),
            ends: BTreeMap::new(),
            mtime: None,
            set: SetAttr::default(),
            uncommitted_since: None,
            changes: 0,
            committed_changes: 0,
            fresh: false,
            failure: None,
            failures: 0,
            barrier: false,
            blocks: Blocks::default(),
            attr,
        };
        Self {
            id: state.attr.inode,
            shared,
            state: Mutex::new(state),
            changed: Notify::new(),
            granting: tokio::sync::Mutex::default(),
            committing: tokio::sync::Mutex::default(),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether only this client knows of it.
    pub(crate) fn is_unnamed(&self) -> bool {
        self.state().place.is_some()
    }

    pub(crate) fn mark_stale(&self) {
        self.state().stale = true;
    }

    /// Drops what was read ahead.
    pub(crate) fn forget_blocks(&self) {
        let freed = self.state().blocks.clear();
        self.shared.read_budget.give(freed as usize);
    }
}

impl Drop for OpenInode {
    fn drop(&mut self) {
        self.forget_blocks();
    }
}

impl State {
    /// Takes over attributes from the metadata plane, unless they are older than those known
    /// (answers may overtake each other) or of another object.
    pub(crate) fn see(&mut self, attr: &Attr) {
        let rank = |a: &Attr| (a.ctime, a.generation);
        if attr.lineage == self.lineage && rank(attr) >= rank(&self.attr) {
            self.attr = match self.place {
                None => attr.clone(),
                // Nobody else knows whose it is and what it may.
                Some(_) => Attr { generation: attr.generation, ..self.attr.clone() },
            };
            self.attr_at = Instant::now();
        }
    }

    /// One past the last byte of this client's writes that are not committed.
    fn local_end(&self) -> u64 {
        self.ends.values().copied().fold(self.buffer.end(), u64::max)
    }

    /// The size as this client's readers see it.
    pub(crate) fn size(&self) -> u64 {
        self.attr.size.max(self.local_end())
    }

    /// The attributes that the metadata plane told last.
    pub(crate) fn told(&self) -> &Attr {
        &self.attr
    }

    /// Attributes as they were at the create, of a file that only this client knows of.
    pub(crate) fn as_made(&self) -> &Attr {
        &self.attr
    }

    /// The attributes with what this client has not committed yet.
    pub(crate) fn effective(&self) -> Attr {
        let mut a = self.attr.clone();
        self.lay_over(&mut a);
        a
    }

    /// Lays uncommitted changes over attributes from the metadata plane.
    pub(crate) fn lay_over(&self, a: &mut Attr) {
        a.size = a.size.max(self.local_end());
        if let Some(t) = self.mtime {
            a.mtime = t;
            a.ctime = a.ctime.max(t);
        }
        let at = |c: TimeChange| match c {
            TimeChange::At(t) => t,
            TimeChange::Now => crate::now(),
        };
        let SetAttr { mode: _, uid, gid, size: _, atime, mtime } = self.set;
        a.mode = self.set.mode_over(a.mode, a.kind);
        a.uid = uid.unwrap_or(a.uid);
        a.gid = gid.unwrap_or(a.gid);
        a.atime = atime.map_or(a.atime, at);
        a.mtime = mtime.map_or(a.mtime, at);
    }

    /// Permission bits, with uncommitted changes.
    pub(crate) fn mode(&self) -> u32 {
        self.set.mode_over(self.attr.mode, self.attr.kind)
    }

    /// Takes the uncommitted changes into the known attributes: they were committed by a call that
    /// answers without attributes. The ctime stays the leader's, whose clock orders answers.
    pub(crate) fn fold(&mut self) {
        let ctime = self.attr.ctime;
        self.attr = Attr { ctime, ..self.effective() };
    }

    /// Whether something is to be committed.
    pub(crate) fn uncommitted(&self) -> bool {
        !self.ends.is_empty()
            || self.mtime.is_some()
            || self.set != SetAttr::default()
            || self.place.is_some()
    }

    /// Whether attribute changes may wait for the next commit: this client is writing the file.
    pub(crate) fn may_ride(&self) -> bool {
        !self.stale && (self.fresh || self.uncommitted() || !self.buffer.is_empty())
    }

    /// Notes a failed background write.
    pub(crate) fn fail(&mut self, e: ClientError) {
        self.failures += 1;
        self.failure = Some(e);
    }

    pub(crate) fn note_uncommitted(&mut self) {
        self.changes += 1;
        self.uncommitted_since.get_or_insert_with(Instant::now);
    }
}
