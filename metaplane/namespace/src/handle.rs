//! Open handles: who may commit to an inode, and whose end must be fenced.

use crate::Reader;
use crate::counters::Counter;
use crate::kv::{Kv, KvRead};
use crate::limits::HANDLES_PER_SESSION_MAX;
use crate::tables::*;
use ebb_dataplane_protocol::{HandleId, InodeId, Lineage, SessionId, codec};
use ebb_metaplane_protocol::{FsError, FsResult};
use rkyv::{Archive, Deserialize, Serialize};

/// An open file description.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) struct Handle {
    pub(crate) session: SessionId,
    pub(crate) inode: InodeId,
    /// The lineage it was opened at: an outside change makes it stale (§7).
    pub(crate) lineage: Lineage,
    /// It was given a write grant: its session's end fences the inode.
    pub(crate) write: bool,
}

impl<K: KvRead> Reader<'_, K> {
    /// A handle of a session.
    pub(crate) fn handle(&self, session: SessionId, id: HandleId) -> FsResult<Option<Handle>> {
        let Some(bytes) = self.0.get(&key(HANDLE, &[&be(id.0)])) else { return Ok(None) };
        let handle: Handle = codec::decode(&bytes).map_err(|_| corrupt("handle"))?;
        Ok((handle.session == session).then_some(handle))
    }
    /// Whether anyone has the inode open.
    pub(crate) fn is_open(&self, inode: InodeId) -> bool {
        self.any_with_prefix(&key(OPEN, &[&be(inode.0)]))
    }
    /// Whether this session has the inode open.
    pub(crate) fn session_has_open(&self, session: SessionId, inode: InodeId) -> bool {
        self.any_with_prefix(&key(SESSION_HANDLE, &[&be(session.0), &be(inode.0)]))
    }
    /// Whether somebody else than `session` may hold a grant to write the inode: an open handle of
    /// another session, or an ended session's fence that may not be at every primary yet. A truncate
    /// by `session` is then answered only when no cut is pending (R14).
    pub fn another_session_writes(&self, inode: InodeId, session: SessionId) -> FsResult<bool> {
        let Some(n) = self.find_inode(inode)? else { return Ok(false) };
        if n.may_be_fenced() {
            return Ok(true);
        }
        let prefix = key(OPEN, &[&be(inode.0)]);
        let mut from = prefix.clone();
        loop {
            let page = self.scan_prefix(&prefix, Some(&from), 256);
            let Some((last, _)) = page.last() else { return Ok(false) };
            from = after(last);
            for (k, v) in page {
                let (handle, holder) = (u64_at(&k, 9)?, u64_at(&v, 0)?);
                let mode = key(SESSION_HANDLE, &[&be(holder), &be(inode.0), &be(handle)]);
                if holder != session.0 && self.0.get(&mode).is_some_and(|m| m == [1]) {
                    return Ok(true);
                }
            }
        }
    }
    pub(crate) fn check_handle_room(&self, session: SessionId) -> FsResult<()> {
        match self.session(session)? {
            None => Err(FsError::SessionExpired),
            Some(s) if s.handles >= HANDLES_PER_SESSION_MAX => {
                Err(FsError::NotPermitted("too many open files in this session".into()))
            }
            Some(_) => Ok(()),
        }
    }
}

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn open_handle(&mut self, h: &Handle) -> FsResult<HandleId> {
        let id = HandleId(self.next(Counter::NextHandle)?);
        self.put_handle(id, h);
        self.kv.put(&key(OPEN, &[&be(h.inode.0), &be(id.0)]), &be(h.session.0));
        self.update_session(h.session, |s| s.handles += 1)?;
        Ok(id)
    }

    pub(crate) fn put_handle(&mut self, id: HandleId, h: &Handle) {
        self.kv.put(&key(HANDLE, &[&be(id.0)]), &codec::encode(h));
        self.kv.put(
            &key(SESSION_HANDLE, &[&be(h.session.0), &be(h.inode.0), &be(id.0)]),
            &[u8::from(h.write)],
        );
    }

    /// Forgets a handle; the last one of an unlinked inode takes the inode with it.
    pub(crate) fn close_handle(&mut self, id: HandleId, h: &Handle) -> FsResult<()> {
        self.kv.delete(&key(HANDLE, &[&be(id.0)]));
        self.kv.delete(&key(SESSION_HANDLE, &[&be(h.session.0), &be(h.inode.0), &be(id.0)]));
        self.kv.delete(&key(OPEN, &[&be(h.inode.0), &be(id.0)]));
        self.update_session(h.session, |s| s.handles = s.handles.saturating_sub(1))?;
        if self.read().has_locks(h.session, h.inode)
            && !self.read().session_has_open(h.session, h.inode)
        {
            self.drop_locks(h.session, h.inode)?;
        }
        match self.read().find_inode(h.inode)? {
            Some(n) if !self.read().may_stay_unnamed(&n) => self.remove_inode(n),
            _ => Ok(()),
        }
    }
}
