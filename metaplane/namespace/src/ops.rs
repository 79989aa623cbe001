//! Mutations of clients. Each checks everything first and changes state after: a refused operation
//! changes nothing.

use crate::Reader;
use crate::counters::Counter;
use crate::directory::check_name;
use crate::handle::Handle;
use crate::inode::{Inode, Loaded};
use crate::kv::{Kv, KvRead};
use crate::limits::SYMLINK_BYTES_MAX;
use crate::tables::Ctx;
use ebb_dataplane_protocol::{GrantMode, HandleId, InodeId, SessionId};
use ebb_metaplane_protocol::attr::{SetAttr, TimeChange};
use ebb_metaplane_protocol::command::OpOutcome;
use ebb_metaplane_protocol::op::{CommitWrite, Op, OpenMode, RELEASES_MAX};
use ebb_metaplane_protocol::{FileKind, FsError, FsResult, Time};

impl<K: KvRead> Reader<'_, K> {
    pub(crate) fn refuse_in_shutdown(&self) -> FsResult<()> {
        match self.counter(Counter::ShuttingDown)? {
            0 => Ok(()),
            _ => Err(FsError::ShuttingDown),
        }
    }

    /// Checks that a new name may be made in a directory.
    pub(crate) fn check_new_name(
        &self,
        parent: InodeId,
        name: &[u8],
        is_dir: bool,
    ) -> FsResult<()> {
        let dir = self.dir_inode(parent)?;
        check_name(parent, name)?;
        if self.entry(parent, name)?.is_some() {
            return Err(FsError::Exists);
        }
        if dir.nlink == 0 {
            return Err(FsError::NotFound);
        }
        self.check_key_length(parent, name.len() + usize::from(is_dir))?;
        self.refuse_in_shutdown()
    }

    /// What a name shows.
    pub(crate) fn existing(&self, parent: InodeId, name: &[u8]) -> FsResult<Loaded> {
        self.dir_inode(parent)?;
        if name.len() > ebb_dataplane_protocol::NAME_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        match self.entry(parent, name)? {
            Some(id) => self.inode(id),
            None => Err(FsError::NotFound),
        }
    }
}

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn op(&mut self, session: SessionId, op: &Op) -> FsResult<OpOutcome> {
        for dir in crate::delegation::directories(op).into_iter().flatten() {
            if let Some(dir) = self.read().find_inode(dir)? {
                self.read().check_names(&dir, session)?;
            }
        }
        match op {
            Op::Create { parent, name, mode, uid, gid, exclusive, open, delegate } => {
                match self
                    .read()
                    .dir_inode(*parent)
                    .and_then(|_| self.read().entry(*parent, name))?
                {
                    Some(_) if *exclusive => Err(FsError::Exists),
                    Some(id) => self.open(session, id, *open, false),
                    None => {
                        let made =
                            self.create(session, *parent, name, (*mode, *uid, *gid), *open)?;
                        if *delegate { self.delegated(session, *parent, made) } else { Ok(made) }
                    }
                }
            }
            Op::Open { inode, open } => self.open(session, *inode, *open, false),
            Op::Regrant { handle, write, write_end } => {
                self.regrant(session, *handle, *write, *write_end)
            }
            Op::Release { handle, commit } => self.release(session, *handle, commit.as_ref()),
            Op::ReleaseMany { handles } => {
                if handles.len() > RELEASES_MAX {
                    return Err(FsError::Invalid("too many handles in one request".into()));
                }
                for handle in handles {
                    self.release(session, *handle, None)?;
                }
                Ok(OpOutcome::Done)
            }
            Op::Commit(c) => self.commit_write(session, c).map(OpOutcome::Attr),
            Op::Reserve { files } => self.reserve_files(session, *files),
            Op::Publish(p) => self.publish(session, p),
            Op::ReturnNames { dirs } => self.return_names(session, dirs),
            Op::Lock { inode, lock, wait } => {
                self.lock(session, *inode, lock, *wait).map(|()| OpOutcome::Done)
            }
            Op::SetAttr { inode, set } => self.set_attr(*inode, set),
            Op::SetXattr { inode, name, value, how } => {
                self.set_xattr(*inode, name, value.as_deref(), *how).map(OpOutcome::Attr)
            }
            Op::Mkdir { parent, name, mode, uid, gid } => {
                self.read().check_new_name(*parent, name, true)?;
                let kind = FileKind::Directory;
                let n = self.make(*parent, name, kind, (*mode, *uid, *gid), &[])?;
                Ok(OpOutcome::Attr(n.attr()))
            }
            Op::Symlink { parent, name, target, uid, gid } => {
                self.read().check_new_name(*parent, name, false)?;
                if target.is_empty() || target.contains(&0) {
                    return Err(FsError::Invalid("a link needs a target without NUL".into()));
                }
                if target.len() > SYMLINK_BYTES_MAX {
                    return Err(FsError::NameTooLong);
                }
                let owner = (0o777, *uid, *gid);
                let n = self.make(*parent, name, FileKind::Symlink, owner, target)?;
                Ok(OpOutcome::Attr(n.attr()))
            }
            Op::Link { inode, parent, name } => self.link(*inode, *parent, name),
            Op::Unlink { parent, name } => {
                let n = self.read().existing_holder(*parent, name)?;
                if n.is_dir() {
                    return Err(FsError::IsDirectory);
                }
                self.remove_name(&n)
            }
            Op::Rmdir { parent, name } => {
                if name == b"." {
                    return Err(FsError::Invalid("rmdir of '.'".into()));
                }
                let n = self.read().existing_holder(*parent, name)?;
                if !n.is_dir() {
                    return Err(FsError::NotDirectory);
                }
                self.read().check_undelegated(&n)?;
                self.read().check_empty(&n)?;
                self.remove_name(&n)
            }
            Op::Rename { parent, name, new_parent, new_name, flags } => {
                self.rename((*parent, name), (*new_parent, new_name), *flags)
            }
        }
    }

    /// Makes a new inode with its entry. The caller has checked the name.
    pub(crate) fn make(
        &mut self,
        parent: InodeId,
        name: &[u8],
        kind: FileKind,
        owner: (u32, u32, u32),
        target: &[u8],
    ) -> FsResult<Inode> {
        let id = self.new_inode_id(parent, kind)?;
        let mut n = Inode::new(id, kind, (parent, name), owner, self.now);
        n.target = target.to_vec();
        n.size = target.len() as u64;
        n.mark_dirty(self.now);
        self.save(Loaded::created(n.clone()))?;
        self.put_entry(parent, name, id);
        let is_dir = kind == FileKind::Directory;
        self.touch_dir(parent, i32::from(is_dir))?;
        self.note_depth(parent, name.len() + usize::from(is_dir))?;
        Ok(n)
    }

    fn create(
        &mut self,
        session: SessionId,
        parent: InodeId,
        name: &[u8],
        owner: (u32, u32, u32),
        open: OpenMode,
    ) -> FsResult<OpOutcome> {
        self.read().check_new_name(parent, name, false)?;
        self.read().check_handle_room(session)?;
        let n = self.make(parent, name, FileKind::File, owner, &[])?;
        self.open(session, n.id, OpenMode { truncate: false, ..open }, true)
    }

    /// A file was made, and the names of its directory are wanted.
    fn delegated(
        &mut self,
        session: SessionId,
        parent: InodeId,
        made: OpOutcome,
    ) -> FsResult<OpOutcome> {
        let lent = self.delegate(session, parent)?;
        Ok(match made {
            OpOutcome::Opened { attr, handle, grant, created, delegation: _ } => {
                OpOutcome::Opened { attr, handle, grant, created, delegation: lent }
            }
            other => other,
        })
    }

    fn open(
        &mut self,
        session: SessionId,
        inode: InodeId,
        open: OpenMode,
        created: bool,
    ) -> FsResult<OpOutcome> {
        let mut n = self.read().file_inode(inode)?;
        self.read().check_handle_room(session)?;
        if !n.attrs_complete {
            return Err(crate::again(crate::why::ATTRIBUTES));
        }
        if open.write || open.truncate {
            self.read().refuse_in_shutdown()?;
        }
        if open.truncate {
            n.check_resize(0)?;
            n.lost = false;
        }
        n.refuse_if_lost()?;
        if open.write {
            n.check_grant_write(0).or_else(|e| match e {
                // It is about to be short.
                FsError::TooLarge if open.truncate => Ok(()),
                e => Err(e),
            })?;
        }
        let mut notice = None;
        if open.truncate {
            notice = n.resize(0, self.now)?;
            n.mtime = self.now;
            n.changed(self.now);
        }
        if open.write {
            n.grant_write(0, self.now)?;
        }
        let mode = if open.write { GrantMode::Write } else { GrantMode::Read };
        let grant = self.read().make_grant(&n, session, mode)?;
        let lineage = n.view.lineage;
        let attr = n.attr();
        self.save(n)?;
        if let Some(notice) = notice {
            self.notify(notice)?;
        }
        let handle = self.open_handle(&Handle { session, inode, lineage, write: open.write })?;
        Ok(OpOutcome::Opened { attr, handle, grant, created, delegation: None })
    }

    fn regrant(
        &mut self,
        session: SessionId,
        handle: HandleId,
        write: bool,
        write_end: u64,
    ) -> FsResult<OpOutcome> {
        let mut h = self.read().handle(session, handle)?.ok_or(FsError::Stale)?;
        let mut n = self.read().file_inode(h.inode)?;
        if n.view.lineage != h.lineage {
            return Err(FsError::Stale);
        }
        if write {
            self.read().refuse_in_shutdown()?;
            n.grant_write(write_end, self.now)?;
            if !h.write {
                h.write = true;
                self.put_handle(handle, &h);
            }
        }
        let mode = if write { GrantMode::Write } else { GrantMode::Read };
        let grant = self.read().make_grant(&n, session, mode)?;
        let attr = n.attr();
        self.save(n)?;
        Ok(OpOutcome::Opened { attr, handle, grant, created: false, delegation: None })
    }

    /// Ends a handle. It ends even when its last commit is refused.
    fn release(
        &mut self,
        session: SessionId,
        handle: HandleId,
        commit: Option<&CommitWrite>,
    ) -> FsResult<OpOutcome> {
        let Some(h) = self.read().handle(session, handle)? else { return Ok(OpOutcome::Done) };
        let committed = match commit {
            Some(c) if c.inode != h.inode => {
                Err(FsError::Invalid("the commit is of another inode".into()))
            }
            Some(c) => self.commit_write(session, c).map(|_| ()),
            None => Ok(()),
        };
        self.close_handle(handle, &h)?;
        committed.map(|()| OpOutcome::Done)
    }

    fn commit_write(
        &mut self,
        session: SessionId,
        c: &CommitWrite,
    ) -> FsResult<ebb_metaplane_protocol::Attr> {
        let mut n = self.read().file_inode(c.inode)?;
        if !self.read().session_has_open(session, c.inode) {
            return Err(FsError::Stale);
        }
        if n.merge_commit(c, self.now)? {
            n.changed(self.now);
        }
        let attr = n.attr();
        self.save(n)?;
        Ok(attr)
    }

    fn set_attr(&mut self, inode: InodeId, set: &SetAttr) -> FsResult<OpOutcome> {
        let mut n = self.read().inode(inode)?;
        if n.link_of().is_some() {
            return Err(FsError::Stale);
        }
        self.read().refuse_in_shutdown()?;
        if !n.attrs_complete {
            return Err(crate::again(crate::why::ATTRIBUTES));
        }
        let mut notice = None;
        if let Some(size) = set.size {
            match n.kind {
                FileKind::File => {
                    n.lost &= size > 0;
                    n.refuse_if_lost()?;
                    notice = n.resize(size, self.now)?;
                }
                FileKind::Directory => return Err(FsError::IsDirectory),
                FileKind::Symlink => {
                    return Err(FsError::Invalid("a symbolic link has no size to set".into()));
                }
                FileKind::HardLink => {}
            }
            n.mtime = self.now;
        }
        if apply_attrs(&mut n, set, self.now) || set.size.is_some() {
            n.changed(self.now);
        }
        let attr = n.attr();
        self.save(n)?;
        if let Some(notice) = notice {
            self.notify(notice)?;
        }
        Ok(OpOutcome::Attr(attr))
    }

    /// Removes an entry with its inode: dirtiness, key and data go in the same command (I6).
    fn remove_name(&mut self, n: &Loaded) -> FsResult<OpOutcome> {
        let key = self.read().target_key(n)?;
        self.delete_entry(n.parent, &n.name);
        self.touch_dir(n.parent, -i32::from(n.is_dir()))?;
        self.drop_name(n.id, key.as_deref())?;
        Ok(OpOutcome::Done)
    }
}

impl Inode {
    /// Takes a writer's report in; whether anything is different then. Refused, it changes nothing.
    pub(crate) fn merge_commit(&mut self, c: &CommitWrite, now: Time) -> FsResult<bool> {
        if c.ends.iter().any(|&(g, end)| end > self.alloc_limit || g > self.generation) {
            return Err(FsError::Invalid("no grant covers these writes".into()));
        }
        if c.set.size.is_some() {
            return Err(FsError::Invalid("a commit sets no size".into()));
        }
        let before = self.size;
        for &(generation, end) in &c.ends {
            self.merge_end(generation, end);
        }
        if let Some(t) = c.mtime {
            self.mtime = t;
        }
        let attrs = apply_attrs(self, &c.set, now);
        Ok(attrs || c.mtime.is_some() || self.size != before)
    }
}

/// Applies changes other than the size; whether there were any.
fn apply_attrs(n: &mut Inode, set: &SetAttr, now: Time) -> bool {
    let time = |t: TimeChange| match t {
        TimeChange::Now => now,
        TimeChange::At(t) => t,
    };
    n.set_mode(set.mode_over(n.mode(), n.kind));
    if let Some(uid) = set.uid {
        n.uid = uid;
    }
    if let Some(gid) = set.gid {
        n.gid = gid;
    }
    if let Some(t) = set.atime {
        n.atime = time(t);
    }
    if let Some(t) = set.mtime {
        n.mtime = time(t);
    }
    set.mode.is_some()
        || set.uid.is_some()
        || set.gid.is_some()
        || set.atime.is_some()
        || set.mtime.is_some()
}
