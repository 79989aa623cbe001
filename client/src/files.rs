//! Open files: create, open, read, write, flush, fsync, release.

use crate::Result;
use crate::cluster::turn;
use crate::error::ClientError;
use crate::fs::{FileSystem, Owner};
use crate::idle::{Kept, is_same};
use crate::inode::{Hold, OpenInode, Remote};
use crate::lent::Taken;
use crate::readahead::Detector;
use crate::unnamed::Which;
use crate::writer::Unsent;
use bytes::Bytes;
use ebb_dataplane_protocol::{GrantMode, InodeId, Lineage};
use ebb_metaplane_protocol::attr::{Attr, FileKind, SetAttr, without_privileges};
use ebb_metaplane_protocol::op::{OpenMode, Opened};
use ebb_metaplane_protocol::{FsError, Op, OpReply, Query, QueryReply};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// An open file of this client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileHandle(pub u64);

/// How a file is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenFlags {
    /// For writing (O_WRONLY, O_RDWR): the grant comes with the open.
    pub write: bool,
    /// O_TRUNC.
    pub truncate: bool,
    /// O_EXCL of a create.
    pub exclusive: bool,
}

/// An opened file.
#[derive(Clone, Debug)]
pub struct OpenedFile {
    /// For later calls.
    pub handle: FileHandle,
    /// Attributes as of the open, with this client's own unflushed writes.
    pub attr: Attr,
    /// Create made it.
    pub created: bool,
    /// Of a create: the directory's attributes, as of the create or later.
    pub parent: Option<Attr>,
}

pub(crate) struct OpenFile {
    id: u64,
    pub(crate) inode: Arc<OpenInode>,
    write: bool,
    pub(crate) detector: Mutex<Detector>,
    /// Failed background writes of the inode that this handle has reported, or that happened
    /// before it was opened.
    seen_failures: AtomicU64,
    /// Who may have locked something by it.
    lockers: Mutex<BTreeSet<u64>>,
}

impl OpenFile {
    /// Its number here.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn lockers(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.lockers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An error of a background write this handle has not reported yet: once per handle, by an fsync.
    fn take_failure(&self) -> Result<()> {
        let state = self.inode.state();
        let before = self.seen_failures.swap(state.failures, Ordering::AcqRel);
        match &state.failure {
            Some(e) if state.failures > before => Err(e.clone()),
            _ => Ok(()),
        }
    }

    /// The same without taking note. Writes fail early; and a close tells it, but is not the one that had to be told: a child
    /// process closes its parent's descriptors, and nobody reads what that says.
    pub(crate) fn peek_failure(&self) -> Result<()> {
        let state = self.inode.state();
        match &state.failure {
            Some(e) if state.failures > self.seen_failures.load(Ordering::Acquire) => {
                Err(e.clone())
            }
            _ => Ok(()),
        }
    }
}

impl FileSystem {
    pub(crate) fn file(&self, handle: FileHandle) -> Result<Arc<OpenFile>> {
        self.shared.files().get(&handle.0).cloned().ok_or(ClientError::BadHandle)
    }

    /// Creates a file and opens it for writing; opens an existing one unless `exclusive`.
    pub async fn create(
        &self,
        parent: InodeId,
        name: &[u8],
        mode: u32,
        owner: Owner,
        flags: OpenFlags,
    ) -> Result<OpenedFile> {
        if let Some(made) = self.create_unnamed(parent, name, mode, owner, flags) {
            return made;
        }
        let op = Op::Create {
            parent,
            name: name.to_vec(),
            mode: mode & 0o7777,
            uid: owner.uid,
            gid: owner.gid,
            exclusive: flags.exclusive,
            open: OpenMode { write: flags.write, truncate: false },
            delegate: true,
        };
        // First the name, then the look at what was made here: nothing comes between.
        let sent = self.shared.cluster.names.adds(parent, name);
        let _ = self.tell(Which::Name(parent, name)).await;
        let (reply, epoch) = self.shared.cluster.mutate(op, None).await?;
        if let OpReply::Opened(opened) = &reply {
            self.shared.cluster.names.renewed(parent, epoch, sent, opened.names_ms);
            if let Some(given) = opened.delegation {
                let wanted = opened.names_ms == 0;
                let attr = opened.parent.as_ref();
                self.shared.unnamed.delegated(epoch, parent, given, attr, wanted);
                if wanted {
                    self.shared.recalled(parent);
                } else {
                    self.shared.reserve_files_if_low();
                }
            }
        }
        let mut file = self.opened((reply, epoch), flags)?;
        if flags.truncate && !file.created && file.attr.size > 0 {
            // Which file it is was not known before, and this client's own writes to it have to go
            // before the truncate.
            let set = SetAttr { size: Some(0), ..SetAttr::default() };
            match self.setattr(file.attr.inode, set).await {
                Ok(attr) => file.attr = attr,
                Err(e) => {
                    // The caller gets the error, not the handle; its release has nothing to add.
                    let _ = self.release(file.handle).await;
                    return Err(e);
                }
            }
        }
        Ok(file)
    }

    /// Opens an existing file. Its attributes are fresh (close-to-open).
    pub async fn open(&self, inode: InodeId, flags: OpenFlags) -> Result<OpenedFile> {
        let reads = !flags.write && !flags.truncate;
        if reads
            && let Some(kept) = self.shared.idle.take(inode)
            && let Some(file) = self.reopened(kept).await?
        {
            return Ok(file);
        }
        let op =
            Op::Open { inode, open: OpenMode { write: flags.write, truncate: flags.truncate } };
        if let Some(unnamed) = self.shared.inode(inode).filter(|i| i.is_unnamed()) {
            unnamed.commit().await?;
        }
        if reads && let Some(file) = self.borrow_file(inode).await? {
            return Ok(file);
        }
        let known = self.shared.inode(inode).filter(|_| flags.truncate);
        let Some(known) = known else {
            let asked = Instant::now();
            let file = self.opened(self.shared.cluster.mutate(op, None).await?, flags)?;
            if let Some(inode) = self.shared.inode(inode) {
                let mut state = inode.state();
                state.compared = state.compared.max(Some(asked));
            }
            return Ok(file);
        };
        // O_TRUNC of a file this client writes: its earlier writes go first.
        known.raise_barrier().await;
        known.drain().await;
        let result = self.shared.cluster.mutate(op, None).await;
        let result = result.and_then(|reply| {
            if let (OpReply::Opened(opened), _) = &reply {
                known.cut(&opened.attr);
            }
            self.opened(reply, flags)
        });
        known.lift_barrier();
        result
    }

    pub(crate) fn opened(
        &self,
        (reply, epoch): (OpReply, u64),
        flags: OpenFlags,
    ) -> Result<OpenedFile> {
        let OpReply::Opened(opened) = reply else {
            return Err(ClientError::Metadata("no handle in the answer".into()));
        };
        let inode = self.attach(&opened.attr, opened.lineage);
        // A handle that could not be installed (a malformed grant) is left to the session's end.
        inode.install(&opened, epoch).inspect_err(|_| self.detach(&inode))?;
        inode.state().fresh |= opened.created;
        let remote = Remote { handle: opened.handle, epoch };
        let (handle, attr) = self.enter(inode, Hold::Handle(remote), flags.write);
        let Opened { created, parent, .. } = *opened;
        Ok(OpenedFile { handle, attr, created, parent })
    }

    /// A file that was closed a moment ago is used again, if it is as it was.
    async fn reopened(&self, kept: Kept) -> Result<Option<OpenedFile>> {
        let cluster = &self.shared.cluster;
        let id = kept.attr.inode;
        let taken = Taken::new(&self.shared, id, kept.hold);
        if kept.hold.epoch() != cluster.session.current().1 {
            return Ok(None);
        }
        let mut compared = kept.compared;
        let leased = cluster.leased.lease_on(&kept.attr).is_some();
        let attr = if leased && compared.elapsed() < cluster.config.compare_age_max {
            kept.attr.clone()
        } else {
            compared = Instant::now();
            let QueryReply::Attr(fresh) = cluster.query(Query::Freshen(id)).await? else {
                return Err(ClientError::Metadata("no attributes in the answer".into()));
            };
            if fresh.nlink == 0 {
                // It is there for this handle only.
                return Err(ClientError::Stale);
            }
            if !is_same(&fresh, &kept.attr) {
                return Ok(None);
            }
            fresh
        };
        let Some(hold) = taken.keep() else { return Ok(None) };
        let inode = self.attach(&attr, attr.lineage);
        {
            let mut state = inode.state();
            state.compared = state.compared.max(Some(compared));
            if state.grant.as_ref().is_none_or(|old| kept.grant.newer_than(old)) {
                state.grant = Some(kept.grant);
            }
        }
        if let Hold::Loan(loan) = hold {
            return Ok(self.enter_lent(inode, loan));
        }
        let (handle, attr) = self.enter(inode, hold, false);
        Ok(Some(OpenedFile { handle, attr, created: false, parent: None }))
    }

    /// A file of this client that this keeps open.
    pub(crate) fn enter(
        &self,
        inode: Arc<OpenInode>,
        hold: Hold,
        write: bool,
    ) -> (FileHandle, Attr) {
        let id = self.shared.next_file.fetch_add(1, Ordering::Relaxed);
        let (attr, failures) = {
            let mut state = inode.state();
            state.holds.insert(id, hold);
            (state.effective(), state.failures)
        };
        let file = OpenFile {
            id,
            inode,
            write,
            detector: Mutex::default(),
            seen_failures: AtomicU64::new(failures),
            lockers: Mutex::default(),
        };
        self.shared.files().insert(id, Arc::new(file));
        (FileHandle(id), attr)
    }

    /// The open inode of this lineage, made if there is none.
    pub(crate) fn attach(&self, attr: &Attr, lineage: Lineage) -> Arc<OpenInode> {
        let mut inodes = self.shared.inodes();
        let same = |i: &&Arc<OpenInode>, lineage: Lineage| {
            let state = i.state();
            state.lineage == lineage && !state.stale
        };
        let inode = match inodes.get(&attr.inode).filter(|i| same(i, lineage)) {
            Some(inode) => Arc::clone(inode),
            None => {
                let fresh = OpenInode::new(Arc::clone(&self.shared), attr.clone(), lineage);
                let fresh = Arc::new(fresh);
                if let Some(old) = inodes.insert(attr.inode, Arc::clone(&fresh)) {
                    old.mark_stale();
                }
                fresh
            }
        };
        let mut state = inode.state();
        state.opens += 1;
        // Somebody else changed it since it was last looked at: what was read ahead is void.
        let old = state.effective();
        let changed = (old.size, old.mtime) != (attr.size, attr.mtime);
        let freed = if changed { state.blocks.clear() } else { 0 };
        drop(state);
        self.shared.read_budget.give(freed as usize);
        inode
    }

    pub(crate) fn detach(&self, inode: &Arc<OpenInode>) {
        let mut inodes = self.shared.inodes();
        let mut state = inode.state();
        state.opens = state.opens.saturating_sub(1);
        let last = state.opens == 0;
        drop(state);
        if last && inodes.get(&inode.id).is_some_and(|i| Arc::ptr_eq(i, inode)) {
            inodes.remove(&inode.id);
        }
    }

    /// Reads up to `len` bytes at `offset`; fewer only at the end of the file.
    pub async fn read(&self, handle: FileHandle, offset: u64, len: u64) -> Result<Bytes> {
        let file = self.file(handle)?;
        file.inode.read(&file.detector, offset, len).await
    }

    /// Takes a write if that needs no waiting: a copy into the buffer. `Ok(None)`: nothing was
    /// taken, use [`Self::write`]. Never blocks.
    pub fn try_write(
        &self,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
    ) -> Result<Option<Unsent>> {
        let file = self.file(handle)?;
        if !file.write {
            return Err(ClientError::BadHandle);
        }
        file.peek_failure()?;
        file.inode.try_write(offset, data)
    }

    /// Writes `data` at `offset`. It returns once the data is in the buffer; errors of sending it
    /// come at the next [`Self::fsync`] or [`Self::flush`].
    pub async fn write(&self, handle: FileHandle, offset: u64, data: &[u8]) -> Result<()> {
        let file = self.file(handle)?;
        if !file.write {
            return Err(ClientError::BadHandle);
        }
        file.peek_failure()?;
        file.inode.write(offset, data).await
    }

    /// Whether a write by a process without CAP_FSETID has to end what lets others run the file as its
    /// owner or group ([`without_privileges`]).
    pub fn has_privileges(&self, handle: FileHandle) -> Result<bool> {
        let mode = self.file(handle)?.inode.state().mode();
        Ok(without_privileges(mode) != mode)
    }

    /// Ends them, in a file with these attributes: what they are then.
    pub async fn end_privileges(&self, attr: Attr) -> Result<Attr> {
        let mode = without_privileges(attr.mode);
        if mode == attr.mode {
            return Ok(attr);
        }
        self.setattr(attr.inode, SetAttr { mode: Some(mode), ..SetAttr::default() }).await
    }

    /// Close of a descriptor: everything written is acknowledged and committed, so that whoever
    /// opens the file next, anywhere, sees it. The handle stays usable (dup'd descriptors, mmap).
    pub async fn flush(&self, handle: FileHandle) -> Result<()> {
        let file = self.file(handle)?;
        if !file.write {
            return Ok(());
        }
        let committed = Self::settle(&file).await;
        file.peek_failure()?;
        committed
    }

    /// Everything written through any handle of the file is durable on the nodes and committed.
    pub async fn fsync(&self, handle: FileHandle) -> Result<()> {
        let file = self.file(handle)?;
        let committed = Self::settle(&file).await;
        file.take_failure()?;
        committed
    }

    /// Everything written through any handle of the file is durable on the nodes. The metadata plane is not told: a
    /// new file's name, times, and where the file ends if it grew follow with the next commit.
    pub async fn sync_data(&self, handle: FileHandle) -> Result<()> {
        let file = self.file(handle)?;
        file.inode.drain().await;
        file.take_failure()
    }

    async fn settle(file: &OpenFile) -> Result<()> {
        file.inode.drain().await;
        file.inode.commit().await
    }

    /// The last descriptor is gone. Errors that no fsync has told are.
    pub async fn release(&self, handle: FileHandle) -> Result<()> {
        let file = self.shared.files().remove(&handle.0).ok_or(ClientError::BadHandle)?;
        let inode = &file.inode;
        inode.drain().await;
        let mut committed = Ok(());
        let has_locked = !file.lockers().is_empty();
        if has_locked {
            // Who has the lock next sees what was written under it.
            committed = inode.commit().await;
            self.unlock_everybody(&file).await;
        }
        let result = match committed {
            Ok(()) => self.release_remote(&file).await,
            Err(e) => {
                self.abandon(&file);
                Err(e)
            }
        };
        self.shared.drop_hold(&file);
        self.detach(inode);
        file.take_failure()?;
        result
    }

    /// Ends a handle, with the commit that is still due. A handle of an expired session is gone
    /// already; what is to be committed then needs a new one first.
    async fn release_remote(&self, file: &OpenFile) -> Result<()> {
        let inode = &file.inode;
        let deadline = self.shared.cluster.deadline();
        let live = || {
            let (_, epoch) = self.shared.cluster.session.current();
            let hold = inode.state().holds.get(&file.id).copied();
            hold.and_then(|h| h.handle()).filter(|r| r.epoch == epoch)
        };
        if let Some(loan) = self.take_loan(file) {
            // It never wrote.
            self.leave(file, loan);
            return Ok(());
        }
        let _one = turn(&inode.committing, deadline).await.inspect_err(|_| self.abandon(file))?;
        for _ in 0..3 {
            if live().is_none() || inode.is_unnamed() {
                inode.commit_locked(deadline).await.inspect_err(|e| {
                    tracing::debug!(inode = inode.id.0, error = %e, "released without its commit");
                    self.abandon(file);
                })?;
            }
            let Some(remote) = live() else { return Ok(()) };
            let commit = inode.pending_commit();
            // From here on nobody asks for anything in this handle's name: the metadata plane may
            // hear of its end first, and would call the asker stale.
            inode.state().holds.remove(&file.id);
            if commit.is_none() {
                self.leave(file, Hold::Handle(remote));
                return Ok(());
            }
            let carried = commit.as_ref().map(|(commit, _)| commit.clone());
            let op = Op::Release { handle: remote.handle, commit: carried };
            match self.shared.cluster.mutate_by(op, Some(remote.epoch), deadline).await {
                Ok(_) => {
                    if let Some((done, changes)) = &commit {
                        // The answer carries no attributes; other handles go on with what was told.
                        inode.state().fold();
                        inode.committed(done, *changes);
                    }
                    return Ok(());
                }
                // The commit is still due, and takes a handle that replaces this one.
                Err(ClientError::Fs(FsError::SessionExpired)) => {
                    inode.state().holds.insert(file.id, Hold::Handle(remote));
                }
                Err(e) => return Err(e),
            }
        }
        Err(FsError::SessionExpired.into())
    }

    /// What was lent to a local file, if it was; the file has it no more.
    fn take_loan(&self, file: &OpenFile) -> Option<Hold> {
        let mut state = file.inode.state();
        match state.holds.get(&file.id) {
            Some(Hold::Loan(_)) => state.holds.remove(&file.id),
            _ => None,
        }
    }

    /// A handle is closed that has nothing to commit: it is kept for the next open, or the metadata plane is told.
    fn leave(&self, file: &OpenFile, hold: Hold) {
        match self.to_keep(file, hold) {
            Some((kept, leased)) => {
                let instead = self.shared.idle.keep(file.inode.id, kept, leased, Instant::now());
                if let Some((inode, kept)) = instead {
                    self.shared.let_go(inode, kept.hold);
                }
            }
            // Nobody waits for this: it goes with others, in one log entry.
            None => self.shared.let_go(file.inode.id, hold),
        }
    }

    /// What is kept of a handle: if it only read, and is the last one of a file that is as the metadata plane
    /// knows it. And whether the file's attributes are leased.
    fn to_keep(&self, file: &OpenFile, hold: Hold) -> Option<(Kept, bool)> {
        let (grant, attr, compared) = {
            let state = file.inode.state();
            let clean = !state.stale && !state.uncommitted() && state.buffer.is_empty();
            if file.write || !clean || !state.holds.is_empty() {
                return None;
            }
            (state.grant.clone()?, state.told().clone(), state.compared?)
        };
        // The handle may write since somebody asked for a grant in its name.
        let only_read = grant.grant.mode == GrantMode::Read && grant.epoch == hold.epoch();
        if !only_read || attr.nlink == 0 {
            return None;
        }
        let leased = self.shared.cluster.leased.lease_on(&attr).is_some();
        Some((Kept { hold, grant, attr, compared }, leased))
    }

    /// A handle ends although its last commit was not answered. With the last one a new file's name is given up: nobody
    /// could tell of it any more, and others must not wait for it.
    fn abandon(&self, file: &OpenFile) {
        let (_, epoch) = self.shared.cluster.session.current();
        let (hold, last) = {
            let mut state = file.inode.state();
            let hold = state.holds.remove(&file.id);
            (hold, state.holds.is_empty())
        };
        match hold {
            Some(Hold::Handle(remote)) if remote.epoch != epoch => {}
            Some(hold) => self.shared.let_go(file.inode.id, hold),
            None => {}
        }
        if last {
            file.inode.stays_unnamed();
        }
    }

    /// The inode of a handle.
    pub fn inode_of(&self, handle: FileHandle) -> Result<InodeId> {
        Ok(self.file(handle)?.inode.id)
    }

    /// Grows a file to at least `end` bytes (fallocate without flags).
    pub async fn extend(&self, handle: FileHandle, end: u64) -> Result<()> {
        let file = self.file(handle)?;
        if !file.write {
            return Err(ClientError::BadHandle);
        }
        if file.inode.state().size() >= end {
            return Ok(());
        }
        let set = SetAttr { size: Some(end), ..SetAttr::default() };
        file.inode.truncate(set).await
    }
}

/// What kind of error an open of something that is not a file is.
pub(crate) fn not_a_file(kind: FileKind) -> Option<FsError> {
    match kind {
        FileKind::File => None,
        FileKind::Directory => Some(FsError::IsDirectory),
        FileKind::Symlink => Some(FsError::Invalid("a symbolic link".into())),
        FileKind::HardLink => Some(FsError::Stale),
    }
}
