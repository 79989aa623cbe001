//! Rename: files and directories, over an existing target, exchange (PROTOCOL §9, I6).
//!
//! The tree changes at once. The moved inode keeps its object where it is and becomes unsettled; a
//! replaced inode goes with its dirtiness, and its key is inherited with its etag as the condition.

use crate::Reader;
use crate::directory::{Origin, check_name};
use crate::inode::Inode;
use crate::kv::{Kv, KvRead};
use crate::tables::Ctx;
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::command::OpOutcome;
use ebb_metaplane_protocol::op::{RENAME_EXCHANGE, RENAME_NOREPLACE};
use ebb_metaplane_protocol::{FsError, FsResult};

/// A name in a directory.
type Place<'a> = (InodeId, &'a [u8]);

impl<K: KvRead> Reader<'_, K> {
    /// Checks that a directory holds nothing, S3 included.
    pub(crate) fn check_empty(&self, n: &Inode) -> FsResult<()> {
        if self.has_entries(n.id) {
            return Err(FsError::NotEmpty);
        }
        match &n.dir {
            Some(d) if d.origin != Origin::Complete => Err(crate::again(crate::why::LISTING)),
            _ => Ok(()),
        }
    }

    /// Whether `dir` is `of` or below it.
    fn is_within(&self, dir: InodeId, of: InodeId) -> FsResult<bool> {
        let mut at = dir;
        while at != of {
            if at == InodeId::ROOT {
                return Ok(false);
            }
            at = self.inode(at)?.parent;
        }
        Ok(true)
    }

    /// Checks that an inode may move to a directory: no cycle, no unlisted rest, no key too long.
    fn check_move(&self, n: &Inode, (to, name): Place<'_>) -> FsResult<()> {
        let Some(d) = &n.dir else { return self.check_key_length(to, name.len()) };
        if d.incomplete > 0 {
            return Err(crate::again(crate::why::LISTING));
        }
        self.check_key_length(to, name.len() + 1 + d.deepest as usize)
    }
}

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn rename(
        &mut self,
        from: Place<'_>,
        to: Place<'_>,
        flags: u32,
    ) -> FsResult<OpOutcome> {
        let exchange = flags & RENAME_EXCHANGE != 0;
        let no_replace = flags & RENAME_NOREPLACE != 0;
        if flags & !(RENAME_EXCHANGE | RENAME_NOREPLACE) != 0 || (exchange && no_replace) {
            return Err(FsError::Invalid("rename flags".into()));
        }
        self.read().refuse_in_shutdown()?;
        let source = self.read().existing_holder(from.0, from.1)?;
        if self.read().dir_inode(to.0)?.nlink == 0 {
            return Err(FsError::NotFound);
        }
        check_name(to.0, to.1)?;
        let target = match self.read().holder(to.0, to.1)? {
            Some(id) => Some(self.read().inode(id)?),
            None => None,
        };
        match &target {
            Some(_) if no_replace => return Err(FsError::Exists),
            None if exchange => return Err(FsError::NotFound),
            _ => {}
        }
        let cycle = || FsError::Invalid("a directory can't move into itself".into());
        if source.is_dir() && self.read().is_within(to.0, source.id)? {
            return Err(cycle());
        }
        if let Some(t) = &target {
            if t.is_dir() && self.read().is_within(from.0, t.id)? {
                return Err(if exchange { cycle() } else { FsError::NotEmpty });
            }
            // Two names of one file stay as they are.
            if t.file_id() == source.file_id() {
                return Ok(OpOutcome::Done);
            }
            if !exchange {
                match (source.is_dir(), t.is_dir()) {
                    (true, false) => return Err(FsError::NotDirectory),
                    (false, true) => return Err(FsError::IsDirectory),
                    _ => {}
                }
                if t.is_dir() {
                    self.read().check_undelegated(t)?;
                    self.read().check_empty(t)?;
                }
            }
        }
        self.read().check_move(&source, to)?;
        let old_key = self.read().target_key(&source)?;
        let new_prefix_key =
            self.read().key_in(&self.read().prefix_of(to.0)?, to.1, source.is_dir())?;

        if exchange && let Some(t) = target {
            self.read().check_move(&t, from)?;
            let target_key = self.read().target_key(&t)?;
            self.put_entry_of(from.0, from.1, &t);
            self.put_entry_of(to.0, to.1, &source);
            self.moved(&source, to, old_key.as_deref())?;
            self.moved(&t, from, target_key.as_deref())?;
            let (s, t) = (i32::from(source.is_dir()), i32::from(t.is_dir()));
            self.touch_dir(from.0, t - s)?;
            self.touch_dir(to.0, s - t)?;
            if let Some(k) = target_key {
                self.reconsider(&k)?;
            }
        } else {
            self.delete_entry(from.0, from.1);
            self.put_entry_of(to.0, to.1, &source);
            self.moved(&source, to, old_key.as_deref())?;
            let is_dir = i32::from(source.is_dir());
            self.touch_dir(from.0, -is_dir)?;
            self.touch_dir(to.0, is_dir)?;
            if let Some(t) = target {
                self.drop_name(t.id, Some(&new_prefix_key))?;
                if t.is_dir() {
                    self.update(to.0, |d| d.nlink = d.nlink.saturating_sub(1))?;
                }
            }
        }
        // The names changed: what is left at the old keys, and what waits at the new ones.
        if let Some(k) = old_key {
            self.reconsider(&k)?;
        }
        self.reconsider(&new_prefix_key)?;
        Ok(OpOutcome::Done)
    }

    /// The inode has a new place: its object is not where its path says any more.
    fn moved(&mut self, n: &Inode, to: Place<'_>, old_key: Option<&str>) -> FsResult<()> {
        let now = self.now;
        self.update(n.id, |n| {
            n.parent = to.0;
            n.name = to.1.to_vec();
            n.ctime = now;
            n.mark_dirty(now);
        })?;
        if let Some(file) = n.link_of() {
            self.update(file, |n| n.ctime = now)?;
        }
        let below = match &n.dir {
            Some(d) => to.1.len() + 1 + d.deepest as usize,
            None => to.1.len(),
        };
        self.note_depth(to.0, below)?;
        match old_key {
            Some(prefix) if n.is_dir() => self.begin_move(n.id, prefix.to_owned()),
            _ => Ok(()),
        }
    }
}
