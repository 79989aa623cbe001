//! Advisory locks on ranges of open files, among all clients (docs/PROTOCOL.md, R57).
//!
//! A lock means something for data, too: before one is given up what was written under it is there for others, and
//! after one is had the file is looked at anew. Locks end with the session. Who loses them so is told: every later
//! call with the file fails as stale, until it is closed and opened again.

use crate::Result;
use crate::error::ClientError;
use crate::files::{FileHandle, OpenFile};
use crate::fs::FileSystem;
use crate::inode::OpenInode;
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::attr::Attr;
use ebb_metaplane_protocol::lock::{LOCKED, Lock, LockMode, Locked};
use ebb_metaplane_protocol::{FsError, Op, Query, QueryReply};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Locks that the leader is asked to wait for at once; who comes later asks now and then. They share connections
/// with everything else.
const WAITS_MAX: usize = 32;
/// Pause of those.
const PAUSE: Duration = Duration::from_millis(50);

/// Who may have locks.
pub(crate) struct Locks {
    /// By file and owner: so many locks were asked for. Threads of one process are one owner, so an answer says
    /// that there are none only if nobody has asked since.
    owners: Mutex<HashMap<InodeId, HashMap<u64, u64>>>,
    waits: Semaphore,
}

impl Default for Locks {
    fn default() -> Self {
        Self { owners: Mutex::default(), waits: Semaphore::new(WAITS_MAX) }
    }
}

impl Locks {
    fn owners(&self) -> MutexGuard<'_, HashMap<InodeId, HashMap<u64, u64>>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many locks an owner has asked for since it had none.
    fn asked(&self, (inode, owner): (InodeId, u64)) -> u64 {
        self.owners().get(&inode).and_then(|o| o.get(&owner)).copied().unwrap_or(0)
    }

    /// It asks for one more.
    fn asks(&self, (inode, owner): (InodeId, u64)) -> u64 {
        let mut owners = self.owners();
        let asked = owners.entry(inode).or_default().entry(owner).or_default();
        *asked += 1;
        *asked
    }

    /// It has none, unless it has asked since.
    fn has_none(&self, inode: &OpenInode, owner: u64, asked: u64) {
        let mut owners = self.owners();
        let Some(of_file) = owners.get_mut(&inode.id) else { return };
        if of_file.get(&owner) == Some(&asked) {
            of_file.remove(&owner);
        }
        if of_file.is_empty() {
            owners.remove(&inode.id);
            // While nobody can ask for another one.
            inode.state().locked = None;
        }
    }
}

/// A whole file, unlocked.
fn nothing(owner: u64) -> Lock {
    Lock { owner, start: 0, end: u64::MAX, mode: LockMode::Unlock, pid: 0 }
}

impl FileSystem {
    /// Locks or unlocks a range of an open file. Without `wait`, [`FsError::Locked`] if somebody else's lock is in
    /// the way. With it, `give_up` is asked about every second whether to go on; [`ClientError::Interrupted`] if not.
    /// Answers the file as whoever had a lock before left it; nothing to an unlock.
    pub async fn lock(
        &self,
        handle: FileHandle,
        lock: Lock,
        wait: bool,
        mut give_up: impl FnMut() -> bool + Send,
    ) -> Result<Option<Attr>> {
        let file = self.file(handle)?;
        let inode = &file.inode;
        if inode.is_unnamed() {
            inode.commit().await?;
        }
        let has_some = self.shared.locks.asked((inode.id, lock.owner)) > 0;
        if lock.mode == LockMode::Unlock && !has_some {
            return Ok(None);
        }
        let mut committed = Ok(());
        if has_some {
            // Who locks next sees what was written under it.
            inode.drain().await;
            committed = inode.commit().await;
        }
        if lock.mode != LockMode::Unlock {
            committed.clone()?;
        }
        loop {
            match self.try_lock(&file, lock, wait).await {
                Err(ClientError::Fs(FsError::Again { why, .. })) if why == LOCKED => {}
                Err(ClientError::Fs(FsError::Locked)) if wait => tokio::time::sleep(PAUSE).await,
                Err(e) => return Err(e),
                Ok(()) => break,
            }
            if give_up() {
                return Err(ClientError::Interrupted);
            }
        }
        if lock.mode == LockMode::Unlock {
            file.peek_failure()?;
            return committed.map(|()| None);
        }
        inode.forget_blocks();
        self.shared.getattr(inode.id).await.map(Some)
    }

    async fn try_lock(&self, file: &OpenFile, lock: Lock, wait: bool) -> Result<()> {
        let inode = &file.inode;
        let locks = &self.shared.locks;
        let place = (inode.id, lock.owner);
        let permit = if wait { locks.waits.try_acquire().ok() } else { None };
        let deadline = self.shared.cluster.deadline();
        // The locks of a session end with its last handle in the log.
        inode.take_handles(deadline).await?;
        let remote = inode.live_remote(false, deadline).await?;
        // From here on it may be had, whatever the answer.
        let unlocks = lock.mode == LockMode::Unlock;
        let asked = if unlocks { locks.asked(place) } else { locks.asks(place) };
        file.lockers().insert(lock.owner);
        let op = Op::Lock { inode: inode.id, lock, wait: permit.is_some() };
        let cluster = &self.shared.cluster;
        let answer = cluster.mutate_until(op, Some(remote.epoch), deadline, Some(LOCKED)).await;
        match &answer {
            Ok(_) if !unlocks => inode.state().locked = Some(remote.epoch),
            Ok(_) if (lock.start, lock.end) == (0, u64::MAX) => {
                locks.has_none(inode, lock.owner, asked);
            }
            Ok(_) => {}
            // Refused for certain, and there was none before.
            Err(ClientError::Fs(FsError::Locked | FsError::NoLocks | FsError::Invalid(_)))
                if asked == 1 =>
            {
                locks.has_none(inode, lock.owner, asked);
            }
            // They went with the session.
            Err(ClientError::Fs(FsError::SessionExpired)) if unlocks => return Ok(()),
            Err(ClientError::Fs(FsError::SessionExpired)) => {
                // Nothing is had any more; what was is noticed at the next try.
                return Err(FsError::Again { retry_after_ms: 0, why: LOCKED.to_owned() }.into());
            }
            Err(_) => {}
        }
        answer.map(|_| ())
    }

    /// The lock of somebody else that is in the way of this one, if any is.
    pub async fn locked(&self, handle: FileHandle, lock: Lock) -> Result<Option<Locked>> {
        let file = self.file(handle)?;
        if file.inode.is_unnamed() {
            file.inode.commit().await?;
        }
        match self.shared.cluster.query(Query::Locked(file.inode.id, lock)).await? {
            QueryReply::Locked(locked) => Ok(locked),
            _ => Err(ClientError::Metadata("no lock in the answer".into())),
        }
    }

    /// All locks of an owner on an open file end: it closes it. Costs nothing where there are none.
    pub async fn unlock_all(&self, handle: FileHandle, owner: u64) -> Result<()> {
        self.lock(handle, nothing(owner), false, || true).await.map(drop)
    }

    /// The same of whoever locked something by this handle.
    pub(crate) async fn unlock_everybody(&self, file: &OpenFile) {
        let lockers = std::mem::take(&mut *file.lockers());
        for owner in lockers {
            let asked = self.shared.locks.asked((file.inode.id, owner));
            if asked == 0 {
                continue;
            }
            if let Err(e) = self.try_lock(file, nothing(owner), false).await {
                tracing::debug!(inode = file.inode.id.0, error = %e, "a lock stays with the handle");
            }
            self.shared.locks.has_none(&file.inode, owner, asked);
        }
    }
}

impl OpenInode {
    /// Fails if locks went with an earlier session.
    pub(crate) fn check_locks(&self, epoch: u64) -> Result<()> {
        let mut state = self.state();
        if state.locked.is_some_and(|of| of != epoch) {
            state.stale = true;
            return Err(ClientError::Stale);
        }
        Ok(())
    }
}
