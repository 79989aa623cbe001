//! The file system by inode: names, attributes, directories. Open files are in [`crate::files`].

use crate::Result;
use crate::budget::Budget;
use crate::cluster::{self, Cluster};
use crate::error::ClientError;
use crate::files::OpenFile;
use crate::idle::Idle;
use crate::inode::{OpenInode, Remote};
use crate::locks::Locks;
use crate::unnamed::{Unnamed, Which};
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::attr::{Attr, SetAttr};
use ebb_metaplane_protocol::op::RELEASES_MAX;
use ebb_metaplane_protocol::query::{DirEntry, StatFs};
use ebb_metaplane_protocol::{FsError, Made, Op, OpReply, Query, QueryReply};
use std::collections::HashMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

/// Who creates something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// A mounted name space. Cheap to clone; clones share open files and buffers.
#[derive(Clone)]
pub struct FileSystem {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) cluster: Arc<cluster::Shared>,
    pub(crate) runtime: Handle,
    pub(crate) write_budget: Budget,
    pub(crate) read_budget: Budget,
    /// Ranges that will be needed, and are being fetched.
    pub(crate) advices: Arc<Semaphore>,
    /// Data writes in flight.
    pub(crate) window: Semaphore,
    inodes: Mutex<HashMap<InodeId, Arc<OpenInode>>>,
    files: Mutex<HashMap<u64, Arc<OpenFile>>>,
    pub(crate) next_file: AtomicU64,
    /// Closed handles the metadata plane has not been told of yet; sent every turn, or when there
    /// are many.
    lingering: Mutex<Vec<Remote>>,
    /// Closed handles that it is not told of yet, in case the files are opened again.
    pub(crate) idle: Idle,
    pub(crate) locks: Locks,
    pub(crate) unnamed: Unnamed,
}

/// How often buffers are looked over for what is due.
const TURN: Duration = Duration::from_millis(250);

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for FileSystem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileSystem").field("open", &self.shared.files().len()).finish()
    }
}

impl FileSystem {
    /// A file system over a cluster's session. Must be called in a tokio runtime, whose threads
    /// then do the background work.
    pub fn new(cluster: &Cluster) -> Self {
        let config = &cluster.shared.config;
        let shared = Arc::new(Shared {
            runtime: Handle::current(),
            write_budget: Budget::new(config.write_buffer_bytes),
            read_budget: Budget::new(config.read_cache_bytes),
            advices: Arc::new(Semaphore::new(crate::advise::RANGES_MAX)),
            window: Semaphore::new(config.write_window.max(1)),
            inodes: Mutex::default(),
            files: Mutex::default(),
            next_file: AtomicU64::new(1),
            lingering: Mutex::default(),
            idle: Idle::default(),
            locks: Locks::default(),
            unnamed: Unnamed::default(),
            cluster: Arc::clone(&cluster.shared),
        });
        tokio::spawn(look_after(Arc::downgrade(&shared)));
        let files = Arc::downgrade(&shared);
        cluster.shared.leased.tell(Box::new(move |inodes| {
            let Some(shared) = files.upgrade() else { return };
            for (inode, kept) in shared.idle.recalled(inodes) {
                shared.let_go(inode, kept.hold);
            }
        }));
        cluster.shared.leased.lends_to(Arc::downgrade(&shared));
        Self { shared }
    }

    /// The cluster under it.
    pub fn cluster(&self) -> Cluster {
        Cluster { shared: Arc::clone(&self.shared.cluster) }
    }

    /// Everything written through any open file is durable and committed; the first error, if any.
    pub async fn sync_all(&self) -> Result<()> {
        let open: Vec<_> = self.shared.inodes().values().cloned().collect();
        let mut first = Ok(());
        for inode in open {
            inode.drain().await;
            let committed = inode.commit().await;
            let failure = inode.state().failure.clone();
            first = first.and(committed).and(failure.map_or(Ok(()), Err));
        }
        first
    }

    /// Flushes, releases every open file, and ends the session.
    pub async fn close(&self) -> Result<()> {
        let synced = self.sync_all().await;
        let handles: Vec<u64> = self.shared.files().keys().copied().collect();
        for handle in handles {
            let _ = self.release(crate::FileHandle(handle)).await;
        }
        let closed = self.cluster().close().await;
        synced.and(closed)
    }

    /// An entry of a directory.
    pub async fn lookup(&self, parent: InodeId, name: &[u8]) -> Result<Attr> {
        let cluster = &self.shared.cluster;
        if cluster.names.lacks(cluster.session.current().1, parent, name) {
            return Err(FsError::NotFound.into());
        }
        let _ = self.tell(Which::Name(parent, name)).await;
        let query = Query::Lookup { parent, name: name.to_vec() };
        self.shared.attr_query(query).await
    }

    /// Attributes, with this client's own unflushed writes.
    pub async fn getattr(&self, inode: InodeId) -> Result<Attr> {
        if let Some(open) = self.shared.inode(inode) {
            let age_max = self.shared.cluster.config.attr_age_max;
            let own = {
                let state = open.state();
                let rides = state.may_ride() && state.attr_at.elapsed() < age_max;
                // While this client writes the file, its own view is the one to show.
                rides.then(|| state.effective())
            };
            if let Some(own) = own {
                return Ok(own);
            }
            if open.is_unnamed() {
                open.commit().await?;
            }
        }
        // A directory's times tell of its names.
        let _ = self.tell(Which::In(inode)).await;
        self.shared.getattr(inode).await
    }

    /// How long these attributes are good without asking, at least: not at all, unless they are remembered under
    /// a lease ([`crate::Config::lease_metadata`]) and this client does not have the file open. Until then
    /// [`Self::on_forget`] tells if they are to be forgotten.
    pub fn lease_on(&self, attr: &Attr) -> Option<Duration> {
        if self.shared.inode(attr.inode).is_some() {
            return None;
        }
        self.shared.cluster.leased.lease_on(attr)
    }

    /// Whether this client remembers metadata under leases.
    pub fn has_leases(&self) -> bool {
        self.shared.cluster.leased.is_on()
    }

    /// Has `forget` called with inodes that [`Self::lease_on`] is no longer true of, before anybody is told that
    /// they changed: once it returns, nobody may use their attributes. It must not call this file system.
    pub fn on_forget(&self, forget: crate::Forget) {
        self.shared.cluster.leased.tell(forget);
    }

    /// The parent of a directory.
    pub async fn parent(&self, inode: InodeId) -> Result<Attr> {
        self.shared.attr_query(Query::Parent(inode)).await
    }

    /// chmod, chown, utimes, truncate; answers with the attributes after it.
    pub async fn setattr(&self, inode: InodeId, set: SetAttr) -> Result<Attr> {
        let open = self.shared.inode(inode).filter(|i| !i.state().stale);
        if let Some(open) = &open {
            if set.size.is_some() {
                open.truncate(set).await?;
                return Ok(open.state().effective());
            }
            if open.state().may_ride() {
                open.ride(set);
                return Ok(open.state().effective());
            }
            if open.is_unnamed() {
                open.commit().await?;
            }
        }
        match self.shared.cluster.mutate(Op::SetAttr { inode, set }, None).await? {
            (OpReply::Attr(attr), _) => Ok(self.shared.noticed(attr)),
            _ => Err(no_attr()),
        }
    }

    /// A page of a directory in name order: entries after `after` (empty: from the start), and
    /// whether it was the last.
    pub async fn readdir(
        &self,
        inode: InodeId,
        after: &[u8],
        limit: u32,
    ) -> Result<(Vec<DirEntry>, bool)> {
        let _ = self.tell(Which::In(inode)).await;
        let query = Query::ReadDir { inode, after: after.to_vec(), limit };
        match self.shared.cluster.query(query).await? {
            QueryReply::Page { mut entries, end } => {
                for entry in &mut entries {
                    if let Some(open) = self.shared.inode(entry.attr.inode) {
                        open.state().lay_over(&mut entry.attr);
                    }
                }
                Ok((entries, end))
            }
            _ => Err(ClientError::Metadata("no page in the answer".into())),
        }
    }

    /// Creates a directory.
    pub async fn mkdir(
        &self,
        parent: InodeId,
        name: &[u8],
        mode: u32,
        owner: Owner,
    ) -> Result<Attr> {
        let (uid, gid) = (owner.uid, owner.gid);
        let op = Op::Mkdir { parent, name: name.to_vec(), mode: mode & 0o7777, uid, gid };
        let making = self.shared.cluster.names.making();
        let (made, epoch) = self.shared.made(op, parent, name).await?;
        making.made(made.attr.inode, epoch, made.own_names_ms);
        Ok(made.attr)
    }

    /// Creates a symbolic link.
    pub async fn symlink(
        &self,
        parent: InodeId,
        name: &[u8],
        target: &[u8],
        owner: Owner,
    ) -> Result<Attr> {
        let (uid, gid) = (owner.uid, owner.gid);
        let op = Op::Symlink { parent, name: name.to_vec(), target: target.to_vec(), uid, gid };
        Ok(self.shared.made(op, parent, name).await?.0.attr)
    }

    /// Gives a file or a symbolic link another name (a hard link); answers with the file's attributes.
    /// EPERM for directories, EMLINK past [`LINKS_MAX`](ebb_metaplane_protocol::attr::LINKS_MAX) names. In the
    /// bucket each name is an object of its own.
    pub async fn link(&self, inode: InodeId, parent: InodeId, name: &[u8]) -> Result<Attr> {
        if let Some(open) = self.shared.inode(inode).filter(|open| open.is_unnamed()) {
            open.commit().await?;
        }
        self.shared.cluster.names.adds(parent, name);
        let _ = self.shared.tell(Which::Name(parent, name)).await;
        let op = Op::Link { inode, parent, name: name.to_vec() };
        match self.shared.cluster.mutate(op, None).await? {
            (OpReply::Attr(attr), _) => Ok(self.shared.noticed(attr)),
            _ => Err(no_attr()),
        }
    }

    /// The target of a symbolic link.
    pub async fn readlink(&self, inode: InodeId) -> Result<Vec<u8>> {
        match self.shared.cluster.query(Query::ReadLink(inode)).await? {
            QueryReply::Link(target) => Ok(target),
            _ => Err(ClientError::Metadata("no target in the answer".into())),
        }
    }

    /// Removes a file or a symbolic link. An open file lives on.
    pub async fn unlink(&self, parent: InodeId, name: &[u8]) -> Result<()> {
        let _ = self.tell(Which::Name(parent, name)).await;
        self.shared.op(Op::Unlink { parent, name: name.to_vec() }).await
    }

    /// Removes an empty directory.
    pub async fn rmdir(&self, parent: InodeId, name: &[u8]) -> Result<()> {
        self.shared.give_back_all().await;
        self.shared.op(Op::Rmdir { parent, name: name.to_vec() }).await
    }

    /// Renames; `flags` are `RENAME_NOREPLACE` and `RENAME_EXCHANGE`.
    pub async fn rename(
        &self,
        parent: InodeId,
        name: &[u8],
        new_parent: InodeId,
        new_name: &[u8],
        flags: u32,
    ) -> Result<()> {
        // First the name, then the look at what was made here: nothing comes between.
        self.shared.cluster.names.adds(new_parent, new_name);
        let _ = self.tell(Which::Name(parent, name)).await;
        let _ = self.tell(Which::Name(new_parent, new_name)).await;
        let (name, new_name) = (name.to_vec(), new_name.to_vec());
        self.shared.op(Op::Rename { parent, name, new_parent, new_name, flags }).await
    }

    /// Space and counts.
    pub async fn statfs(&self) -> Result<StatFs> {
        match self.shared.cluster.query(Query::StatFs).await? {
            QueryReply::StatFs(s) => Ok(s),
            _ => Err(ClientError::Metadata("no counts in the answer".into())),
        }
    }

    /// Bytes buffered for writing and held for reading, for people and for tests of the bounds.
    pub fn held_bytes(&self) -> (usize, usize) {
        (self.shared.write_budget.used(), self.shared.read_budget.used())
    }
}

fn no_attr() -> ClientError {
    ClientError::Metadata("no attributes in the answer".into())
}

impl Shared {
    pub(crate) fn inodes(&self) -> MutexGuard<'_, HashMap<InodeId, Arc<OpenInode>>> {
        lock(&self.inodes)
    }

    pub(crate) fn files(&self) -> MutexGuard<'_, HashMap<u64, Arc<OpenFile>>> {
        lock(&self.files)
    }

    pub(crate) fn inode(&self, id: InodeId) -> Option<Arc<OpenInode>> {
        self.inodes().get(&id).cloned()
    }

    /// Takes note of attributes of an open file, and lays its uncommitted changes over them.
    pub(crate) fn noticed(&self, attr: Attr) -> Attr {
        match self.inode(attr.inode) {
            None => attr,
            Some(open) => {
                let mut state = open.state();
                if state.lineage != attr.lineage {
                    return attr;
                }
                state.see(&attr);
                state.effective()
            }
        }
    }

    async fn attr_query(&self, query: Query) -> Result<Attr> {
        match self.cluster.query(query).await? {
            QueryReply::Attr(attr) => Ok(self.noticed(attr)),
            _ => Err(no_attr()),
        }
    }

    pub(crate) async fn getattr(&self, inode: InodeId) -> Result<Attr> {
        self.attr_query(Query::GetAttr(inode)).await
    }

    /// Mkdir or Symlink.
    async fn made(&self, op: Op, parent: InodeId, name: &[u8]) -> Result<(Made, u64)> {
        let sent = self.cluster.names.adds(parent, name);
        let _ = self.tell(Which::Name(parent, name)).await;
        match self.cluster.mutate(op, None).await? {
            (OpReply::Made(made), epoch) => {
                self.cluster.names.renewed(parent, epoch, sent, made.names_ms);
                Ok((*made, epoch))
            }
            _ => Err(no_attr()),
        }
    }

    async fn op(&self, op: Op) -> Result<()> {
        self.cluster.mutate(op, None).await.map(|_| ())
    }

    /// Sends everything that is buffered: a writer waits for room.
    pub(crate) fn make_room(&self) {
        let open: Vec<_> = self.inodes().values().cloned().collect();
        for inode in open {
            let ready = {
                let mut state = inode.state();
                state.buffer.make_due();
                state.buffer.launch()
            };
            inode.send_all(ready);
        }
    }
}

impl Shared {
    /// Takes a handle that is closed and has nothing to commit.
    pub(crate) fn linger(self: &Arc<Self>, remote: Remote) {
        let many = {
            let mut lingering = lock(&self.lingering);
            lingering.push(remote);
            lingering.len() >= RELEASES_MAX / 2
        };
        if many {
            self.release_lingering();
        }
    }

    /// Tells the metadata plane of closed handles. Those of an expired session are gone already;
    /// those it cannot be told of go with the session.
    fn release_lingering(self: &Arc<Self>) {
        let closed = std::mem::take(&mut *lock(&self.lingering));
        let (_, epoch) = self.cluster.session.current();
        let handles: Vec<_> =
            closed.iter().filter(|r| r.epoch == epoch).map(|r| r.handle).collect();
        if handles.is_empty() {
            return;
        }
        let shared = Arc::clone(self);
        self.runtime.spawn(async move {
            for part in handles.chunks(RELEASES_MAX) {
                let op = Op::ReleaseMany { handles: part.to_vec() };
                if let Err(e) = shared.cluster.mutate(op, Some(epoch)).await {
                    tracing::debug!(error = %e, "handles stay with the session");
                }
            }
        });
    }
}

/// Sends and commits what has waited long enough, and drops what was read ahead long ago.
async fn look_after(shared: Weak<Shared>) {
    let mut turn = tokio::time::interval(TURN);
    turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        turn.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        shared.look_after_names(TURN);
        for (inode, kept) in shared.idle.expired(Instant::now()) {
            shared.let_go(inode, kept.hold);
        }
        shared.release_lingering();
        let open: Vec<_> = shared.inodes().values().cloned().collect();
        let config = &shared.cluster.config;
        for inode in open {
            let (commit_due, ready) = match Instant::now().checked_sub(config.write_age_max) {
                None => (false, Vec::new()),
                Some(limit) => {
                    let mut state = inode.state();
                    let due = state.buffer.make_due_if_older(limit);
                    let ready = if due { state.buffer.launch() } else { Vec::new() };
                    (state.uncommitted_since.is_some_and(|since| since <= limit), ready)
                }
            };
            inode.send_all(ready);
            if let Some(limit) = Instant::now().checked_sub(config.read_age_max) {
                let freed = inode.state().blocks.expire(limit);
                shared.read_budget.give(freed as usize);
            }
            // A commit under way will carry it; a failing one is tried again next turn.
            if commit_due && inode.committing.try_lock().is_ok() {
                let inode = Arc::clone(&inode);
                tokio::spawn(async move {
                    if let Err(e) = inode.commit().await {
                        tracing::warn!(inode = inode.id.0, error = %e, "commit failed");
                    }
                });
            }
        }
    }
}
