//! Directories whose names one session looks after alone, and files that have no name yet
//! (PROTOCOL R49 to R51): what lets a client answer a create by itself, and tell it with the close.
//!
//! A delegation is a fact of the log, not of a clock: it ends when its session gives it back, or with
//! the session. Until then nobody else's operation names anything in the directory. A reserved file
//! is an unlinked one that never had a name, open and dirty from the start (I2): its session's end
//! fences and removes it like any other. Does not know when a delegation should be given back: that
//! is between the leader ([`ebb_metaplane_protocol::own`]) and the client.

use crate::Reader;
use crate::directory::check_name;
use crate::handle::Handle;
use crate::inode::{Inode, Loaded};
use crate::kv::{Kv, KvRead};
use crate::limits::{HANDLES_PER_SESSION_MAX, KEY_BYTES_MAX};
use crate::tables::Ctx;
use ebb_dataplane_protocol::{GrantMode, InodeId, NAME_BYTES_MAX, SessionId};
use ebb_metaplane_protocol::command::OpOutcome;
use ebb_metaplane_protocol::op::{Delegation, Op, Publish, RESERVED_MAX, RETURNS_MAX};
use ebb_metaplane_protocol::{FileKind, FsError, FsResult};

/// Directories in which an operation names something.
pub(crate) fn directories(op: &Op) -> [Option<InodeId>; 2] {
    match op {
        Op::Create { parent, .. }
        | Op::Mkdir { parent, .. }
        | Op::Symlink { parent, .. }
        | Op::Link { parent, .. }
        | Op::Unlink { parent, .. }
        | Op::Rmdir { parent, .. } => [Some(*parent), None],
        Op::Rename { parent, new_parent, .. } => [Some(*parent), Some(*new_parent)],
        Op::Open { .. }
        | Op::Regrant { .. }
        | Op::Release { .. }
        | Op::ReleaseMany { .. }
        | Op::Commit(_)
        | Op::SetAttr { .. }
        | Op::Reserve { .. }
        | Op::Publish(_)
        | Op::ReturnNames { .. }
        | Op::Lock { .. }
        | Op::SetXattr { .. } => [None, None],
    }
}

impl<K: KvRead> Reader<'_, K> {
    /// The session to which a directory's names are delegated, if it isn't `session`.
    pub fn delegated_to_another(
        &self,
        dir: InodeId,
        session: SessionId,
    ) -> FsResult<Option<SessionId>> {
        match self.find_inode(dir)? {
            Some(n) => self.holder_besides(&n, session),
            None => Ok(None),
        }
    }

    pub(crate) fn holder_besides(
        &self,
        dir: &Inode,
        session: SessionId,
    ) -> FsResult<Option<SessionId>> {
        match dir.dir.as_ref().and_then(|d| d.delegation) {
            Some((holder, _)) if holder != session && self.session_exists(holder)? => {
                Ok(Some(holder))
            }
            _ => Ok(None),
        }
    }

    /// Refuses for now to remove a directory in which somebody may be making names.
    pub(crate) fn check_undelegated(&self, dir: &Inode) -> FsResult<()> {
        self.check_names(dir, SessionId(0))
    }

    /// Refuses for now what another session may know better.
    pub(crate) fn check_names(&self, dir: &Inode, session: SessionId) -> FsResult<()> {
        match self.holder_besides(dir, session)? {
            Some(_) => Err(crate::again(crate::why::DELEGATED)),
            None => Ok(()),
        }
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// Delegates the names of a directory to who just added one there; `None`: somebody else has them,
    /// or not all of them are known here.
    pub(crate) fn delegate(
        &mut self,
        session: SessionId,
        parent: InodeId,
    ) -> FsResult<Option<Delegation>> {
        let mut n = self.read().inode(parent)?;
        if self.read().holder_besides(&n, session)?.is_some() {
            return Ok(None);
        }
        let sequence = self.sequence;
        let Some(dir) = n.dir.as_mut().filter(|d| d.is_complete()) else { return Ok(None) };
        let held = dir.delegation.filter(|(holder, _)| *holder == session);
        let stamp = held.map_or(sequence, |(_, stamp)| stamp);
        if held.is_none() {
            dir.delegation = Some((session, stamp));
            self.save(n)?;
        }
        let room = KEY_BYTES_MAX.saturating_sub(self.read().prefix_of(parent)?.len());
        Ok(Some(Delegation { stamp, name_bytes_max: room.min(NAME_BYTES_MAX) as u32 }))
    }

    /// Ends delegations of a session. Others', and later ones, stay.
    pub(crate) fn return_names(
        &mut self,
        session: SessionId,
        dirs: &[(InodeId, u64)],
    ) -> FsResult<OpOutcome> {
        if dirs.len() > RETURNS_MAX {
            return Err(FsError::Invalid("too many directories in one request".into()));
        }
        for &(dir, stamp) in dirs {
            let Some(mut n) = self.read().find_inode(dir)? else { continue };
            let Some(d) = n.dir.as_mut() else { continue };
            if d.delegation == Some((session, stamp)) {
                d.delegation = None;
                self.save(n)?;
            }
        }
        Ok(OpOutcome::Done)
    }

    /// Makes files without a name, each opened for writing.
    pub(crate) fn reserve_files(&mut self, session: SessionId, files: u32) -> FsResult<OpOutcome> {
        self.read().refuse_in_shutdown()?;
        if files == 0 || files > RESERVED_MAX {
            return Err(FsError::Invalid(format!("1 to {RESERVED_MAX} files in one request")));
        }
        let Some(s) = self.read().session(session)? else { return Err(FsError::SessionExpired) };
        if s.handles.saturating_add(files) > HANDLES_PER_SESSION_MAX {
            return Err(FsError::NotPermitted("too many open files in this session".into()));
        }
        let mut reserved = Vec::new();
        for _ in 0..files {
            let id = self.new_inode_id(InodeId::ROOT, FileKind::File)?;
            let place = (InodeId::ROOT, b"".as_slice());
            let mut n = Inode::new(id, FileKind::File, place, (0, 0, 0), self.now);
            n.nlink = 0;
            n.grant_write(0, self.now)?;
            let grant = self.read().make_grant(&n, session, GrantMode::Write)?;
            let (attr, lineage) = (n.attr(), n.view.lineage);
            self.save(Loaded::created(n))?;
            let handle = self.open_handle(&Handle { session, inode: id, lineage, write: true })?;
            reserved.push((attr, handle, grant));
        }
        Ok(OpOutcome::Reserved(reserved))
    }

    /// Names a reserved file, and commits what was written to it.
    pub(crate) fn publish(&mut self, session: SessionId, p: &Publish) -> FsResult<OpOutcome> {
        let h = self.read().handle(session, p.handle)?.ok_or(FsError::Stale)?;
        let mut n = self.read().file_inode(h.inode)?;
        let dir = self.read().dir_inode(p.parent)?;
        let held = dir.dir.as_ref().and_then(|d| d.delegation);
        if held.is_none_or(|(holder, _)| holder != session) || p.commit.inode != h.inode {
            return Err(FsError::Stale);
        }
        // Had it ever had a name, a key would know of it.
        if n.nlink > 0 || !n.name.is_empty() {
            return Err(FsError::Invalid("the file has, or had, a name".into()));
        }
        check_name(p.parent, &p.name)?;
        if dir.nlink == 0 {
            return Err(FsError::NotFound);
        }
        self.read().check_key_length(p.parent, p.name.len())?;
        n.set_mode(p.mode);
        (n.uid, n.gid) = (p.uid, p.gid);
        (n.atime, n.mtime) = (self.now, self.now);
        // The last that may be refused; from here on things change.
        n.merge_commit(&p.commit, self.now)?;
        // Only the bucket can have brought the name: both survive, as in every conflict.
        let name = match self.read().entry(p.parent, &p.name)? {
            Some(_) => {
                self.brought(p.parent)?;
                self.conflict_name(p.parent, &p.name, n.id)?
            }
            None => p.name.clone(),
        };
        // Its create was answered before a shutdown began, if one did: like a commit, it is not refused.
        (n.parent, n.name, n.nlink) = (p.parent, name.clone(), 1);
        n.changed(self.now);
        n.dirty_since = self.now;
        let (id, attr, backed) = (n.id, n.attr(), n.view.backing.is_some());
        self.save(n)?;
        self.put_entry(p.parent, &name, id);
        self.touch_dir(p.parent, 0)?;
        self.note_depth(p.parent, name.len())?;
        if backed {
            // What was written already had to leave its node: the object moves to the name's key.
            let s3_key = self.read().key_in(&self.read().prefix_of(p.parent)?, &name, false)?;
            self.reconsider(&s3_key)?;
        }
        Ok(OpOutcome::Attr(attr))
    }
}
