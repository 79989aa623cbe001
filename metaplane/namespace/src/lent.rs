//! Files that a session may have open without a handle here (docs/PROTOCOL.md, R59): the leader knows which, and the
//! log knows which sessions may. While there are any, a file that loses its last name stays until the leader says that
//! nobody has it open so.

use crate::Reader;
use crate::kv::{Kv, KvRead};
use crate::tables::*;
use ebb_dataplane_protocol::{Grant, GrantMode, InodeId, SessionId};
use ebb_metaplane_protocol::{Attr, FsError, FsResult};
use std::collections::BTreeSet;

impl<K: KvRead> Reader<'_, K> {
    /// Whether files may be lent to a session.
    pub fn is_borrower(&self, session: SessionId) -> bool {
        self.0.get(&key(BORROWER, &[&be(session.0)])).is_some()
    }

    /// Sessions to which files may have been lent.
    pub fn borrowers(&self) -> FsResult<Vec<SessionId>> {
        let all = self.scan_prefix(&[BORROWER], None, usize::MAX);
        all.into_iter().map(|(k, _)| Ok(SessionId(u64_at(&k, 1)?))).collect()
    }

    /// Files that lost their last name while there were such sessions: `limit` of them, after that one.
    pub fn lingering(&self, after: Option<InodeId>, limit: usize) -> FsResult<Vec<InodeId>> {
        let from = after.map(|last| key(LINGERING, &[&be(last.0), &[0]]));
        let some = self.scan_prefix(&[LINGERING], from.as_deref(), limit);
        some.into_iter().map(|(k, _)| Ok(InodeId(u64_at(&k, 1)?))).collect()
    }

    pub(crate) fn is_lingering(&self, inode: InodeId) -> bool {
        self.0.get(&key(LINGERING, &[&be(inode.0)])).is_some()
    }

    /// Sessions with handles of files that have no name any more, and an object.
    pub fn holders_of_unlinked(&self) -> FsResult<Vec<SessionId>> {
        let mut holders = BTreeSet::new();
        let mut from = None;
        loop {
            let page = self.scan_prefix(&[OPEN], from.as_deref(), 1_024);
            let Some((last, _)) = page.last() else { return Ok(holders.into_iter().collect()) };
            from = Some(after(last));
            for (k, v) in page {
                let n = self.find_inode(InodeId(u64_at(&k, 1)?))?;
                if n.is_some_and(|n| n.nlink == 0 && n.view.backing.is_some()) {
                    holders.insert(SessionId(u64_at(&v, 0)?));
                }
            }
        }
    }

    /// A file as an open for reading finds it, and an unsigned grant; `None`: it can't be opened so.
    pub fn lend(&self, session: SessionId, inode: InodeId) -> FsResult<Option<(Attr, Grant)>> {
        let n = match self.file_inode(inode) {
            Ok(n) => n,
            // Whose name it is says the open.
            Err(FsError::Stale) => return Ok(None),
            Err(e) => return Err(e),
        };
        if n.nlink == 0 || n.lost || !n.attrs_complete || !self.is_borrower(session) {
            return Ok(None);
        }
        Ok(Some((n.attr(), self.make_grant(&n, session, GrantMode::Read)?)))
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// Files may be lent to a session from now on.
    pub(crate) fn borrow(&mut self, session: SessionId) -> FsResult<()> {
        if self.read().session(session)?.is_none() {
            return Err(FsError::SessionExpired);
        }
        self.kv.put(&key(BORROWER, &[&be(session.0)]), &[]);
        Ok(())
    }

    /// A file lost its last name. `true`: somebody may have it open, so it stays.
    pub(crate) fn lingers(&mut self, inode: InodeId) -> bool {
        if !self.read().any_with_prefix(&[BORROWER]) {
            return self.read().is_open(inode);
        }
        self.kv.put(&key(LINGERING, &[&be(inode.0)]), &[]);
        true
    }

    /// Nobody has these files open but by handles.
    pub(crate) fn reap(&mut self, inodes: &[InodeId]) -> FsResult<()> {
        for &inode in inodes {
            let place = key(LINGERING, &[&be(inode.0)]);
            if self.kv.get(&place).is_none() {
                continue;
            }
            self.kv.delete(&place);
            match self.read().find_inode(inode)? {
                Some(n) if !self.read().may_stay_unnamed(&n) => self.remove_inode(n)?,
                _ => {}
            }
        }
        Ok(())
    }
}
