//! Commits: what the metadata plane is told of this client's writes, at fsync and close
//! (PROTOCOL §4), and truncates.

use crate::Result;
use crate::cluster::turn;
use crate::error::ClientError;
use crate::inode::OpenInode;
use ebb_dataplane_protocol::HandleId;
use ebb_metaplane_protocol::attr::{FileKind, SetAttr, TimeChange};
use ebb_metaplane_protocol::op::{CommitWrite, Publish, Published};
use ebb_metaplane_protocol::{FsError, Op, OpReply};
use std::sync::Arc;
use std::time::Instant;

impl OpenInode {
    /// What is to be committed now, and how many changes that are; `None`: nothing.
    pub(crate) fn pending_commit(&self) -> Option<(CommitWrite, u64)> {
        let state = self.state();
        // A stale inode's writes were to another object; they must not size the new one.
        let pending = || CommitWrite {
            inode: self.id,
            ends: state.ends.iter().map(|(g, e)| (*g, *e)).collect(),
            mtime: state.mtime,
            set: state.set,
        };
        (state.uncommitted() && !state.stale).then(|| (pending(), state.changes))
    }

    /// How the metadata plane is told: with the file's name, if it doesn't know of the file.
    fn told_by(&self, commit: &CommitWrite, handle: HandleId) -> Op {
        let state = self.state();
        match &state.place {
            None => Op::Commit(commit.clone()),
            Some(place) => {
                let attr = state.as_made();
                Op::Publish(Publish {
                    handle,
                    parent: place.parent,
                    name: place.name.clone(),
                    mode: attr.mode,
                    uid: attr.uid,
                    gid: attr.gid,
                    commit: commit.clone(),
                })
            }
        }
    }

    /// The file has its name.
    fn published(&self, done: &Published, epoch: u64, sent: Instant) {
        let shared = &self.shared;
        let Some(place) = self.state().place.take() else { return };
        shared.unnamed.done(&place);
        shared.cluster.names.renewed(place.parent, epoch, sent, done.names_ms);
        let wanted = done.names_ms == 0;
        shared.unnamed.told(epoch, place.parent, done.parent.as_ref(), wanted);
        if wanted {
            shared.recalled(place.parent);
        }
    }

    /// A commit was applied: what it carried is no longer pending, unless it changed since.
    pub(crate) fn committed(&self, done: &CommitWrite, changes: u64) {
        self.forget(done);
        let mut state = self.state();
        state.committed_changes = state.committed_changes.max(changes);
    }

    /// The object was replaced: what was to be committed is lost, and every handle says so once.
    fn lost(&self, commit: &CommitWrite) {
        self.mark_stale();
        self.stays_unnamed();
        self.forget(commit);
        self.state().fail(ClientError::Stale);
    }

    /// Nobody will tell of this file any more, if it has no name yet.
    pub(crate) fn stays_unnamed(&self) {
        let place = self.state().place.take();
        if let Some(place) = place {
            let name = String::from_utf8_lossy(&place.name).into_owned();
            tracing::warn!(inode = self.id.0, name, "a new file is lost: it can't have its name");
            self.shared.unnamed.done(&place);
        }
    }

    fn forget(&self, done: &CommitWrite) {
        let mut state = self.state();
        for (generation, end) in &done.ends {
            if state.ends.get(generation).is_some_and(|now| now <= end) {
                state.ends.remove(generation);
            }
        }
        if state.mtime == done.mtime {
            state.mtime = None;
        }
        let forget = |now: &mut Option<u32>, done: Option<u32>| {
            if *now == done {
                *now = None;
            }
        };
        forget(&mut state.set.mode, done.set.mode);
        forget(&mut state.set.uid, done.set.uid);
        forget(&mut state.set.gid, done.set.gid);
        if state.set.atime == done.set.atime {
            state.set.atime = None;
        }
        if state.set.mtime == done.set.mtime {
            state.set.mtime = None;
        }
        state.fresh = false;
        state.uncommitted_since = state.uncommitted().then(Instant::now);
    }

    /// Tells the metadata plane the ends and times of acknowledged writes, and attribute changes
    /// that rode along: all that were noted before the call. Callers that wait together share one
    /// commit, as long as it began after the last of them came.
    pub(crate) async fn commit(&self) -> Result<()> {
        let wanted = self.state().changes;
        let deadline = self.shared.cluster.deadline();
        let _one = turn(&self.committing, deadline).await?;
        let covered = {
            let state = self.state();
            // A new file's first commit also ends the time in which changes ride, with nothing to carry too.
            !state.fresh && state.place.is_none() && state.committed_changes >= wanted
        };
        if covered { Ok(()) } else { self.commit_locked(deadline).await }
    }

    /// The same for a caller that holds `committing`.
    pub(crate) async fn commit_locked(&self, deadline: tokio::time::Instant) -> Result<()> {
        let Some((commit, changes)) = self.pending_commit() else {
            let mut state = self.state();
            state.fresh = false;
            let lost = state.stale && state.uncommitted();
            return if lost { Err(ClientError::Stale) } else { Ok(()) };
        };
        // The commit needs an open handle of the session it is sent in: a handle of an expired one
        // is replaced first (PROTOCOL §5).
        for _ in 0..3 {
            let remote = self.live_remote(true, deadline).await.inspect_err(|e| {
                if matches!(e, ClientError::Stale) {
                    self.lost(&commit);
                }
            })?;
            let op = self.told_by(&commit, remote.handle);
            let naming = matches!(op, Op::Publish(_));
            let sent = Instant::now();
            match self.shared.cluster.mutate_by(op, Some(remote.epoch), deadline).await {
                Ok((OpReply::Published(done), epoch)) => {
                    self.published(&done, epoch, sent);
                    self.state().see(&done.attr);
                    self.committed(&commit, changes);
                    return Ok(());
                }
                Ok((OpReply::Attr(attr), _)) => {
                    // First the new attributes, then the overlay goes: no reader sees neither.
                    self.state().see(&attr);
                    self.committed(&commit, changes);
                    return Ok(());
                }
                Ok(_) => return Err(ClientError::Metadata("no attributes in the answer".into())),
                Err(ClientError::Fs(FsError::SessionExpired)) => {}
                Err(ClientError::Fs(FsError::Stale | FsError::NotFound)) => {
                    self.lost(&commit);
                    return Err(ClientError::Stale);
                }
                // Its name was answered for, and can't be given: nothing but an answer says so.
                Err(ClientError::Fs(e)) if naming && is_answer(&e) => {
                    tracing::warn!(inode = self.id.0, error = %e, "naming a new file");
                    self.lost(&commit);
                    return Err(ClientError::Stale);
                }
                Err(e) => return Err(e),
            }
        }
        Err(FsError::SessionExpired.into())
    }

    /// Attribute changes that wait for the next commit, since this client is writing the file.
    ///
    /// Who sets modes and times of a file just made has written it (tar, cp -p, rsync): what is still
    /// gathered goes now, and its close needn't wait for a whole round trip.
    pub(crate) fn ride(self: &Arc<Self>, set: SetAttr) {
        let mut state = self.state();
        let fixed = |t: TimeChange| match t {
            TimeChange::Now => TimeChange::At(crate::now()),
            at => at,
        };
        // One change after the other: a mode set after the owner stays as it was set.
        state.set.mode =
            state.set.mode.map(|mode| set.mode_over(mode, FileKind::File)).or(set.mode);
        state.set.uid = set.uid.or(state.set.uid);
        state.set.gid = set.gid.or(state.set.gid);
        state.set.atime = set.atime.map(fixed).or(state.set.atime);
        state.set.mtime = set.mtime.map(fixed).or(state.set.mtime);
        state.note_uncommitted();
        if !state.fresh || state.buffer.is_empty() {
            return;
        }
        state.buffer.make_due();
        let ready = state.buffer.launch();
        drop(state);
        self.send_all(ready);
    }

    /// Truncates or extends, with writes of this client held back meanwhile: those before it are
    /// acknowledged first, those after it go under the new generation (PROTOCOL §4).
    pub(crate) async fn truncate(self: &Arc<Self>, set: SetAttr) -> Result<()> {
        if self.is_unnamed() {
            self.commit().await?;
        }
        self.raise_barrier().await;
        self.drain().await;
        let result = self.shared.cluster.mutate(Op::SetAttr { inode: self.id, set }, None).await;
        if let Ok((OpReply::Attr(attr), _)) = &result {
            self.cut(attr);
        }
        self.lift_barrier();
        result.map(|_| ())
    }

    /// The file was cut (or extended) to `attr.size`: earlier ends of this client are part of that
    /// size now or gone, its grant is of an older generation, and what was read ahead is void.
    pub(crate) fn cut(&self, attr: &ebb_metaplane_protocol::Attr) {
        let mut state = self.state();
        state.ends.clear();
        // The truncate's time is later than that of the writes before it.
        state.mtime = None;
        state.set.mtime = None;
        state.see(attr);
        state.grant = None;
        let freed = state.blocks.clear();
        drop(state);
        self.shared.read_budget.give(freed as usize);
    }

    /// Holds writes back; waits for another truncate to end first.
    pub(crate) async fn raise_barrier(&self) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut state = self.state();
                if !state.barrier {
                    state.barrier = true;
                    return;
                }
            }
            changed.await;
        }
    }

    pub(crate) fn lift_barrier(&self) {
        self.state().barrier = false;
        self.changed.notify_waiters();
    }
}

/// Whether a refusal is the last word on a file's name.
fn is_answer(e: &FsError) -> bool {
    !matches!(
        e,
        FsError::Again { .. }
            | FsError::SessionExpired
            | FsError::NotLeader(_)
            | FsError::S3Unavailable(_)
            | FsError::ShuttingDown
            | FsError::Io(_)
    )
}
