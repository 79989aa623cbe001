//! A file of which a part is dirty, and whose object somebody else replaced or deleted (PROTOCOL R36).
//!
//! It can't be put together any more, and nothing may be made up (I4). So it steps aside at once: the
//! stranger's object keeps the name (or the name goes, as a deletion outside would have it), the file
//! becomes `name.conflict-<id>`. Its next flush stores the dirty ranges as objects of their own, and in
//! one command the file gives way to a directory of them; only then is it not dirty any more (I3). All
//! the while its generation is being sealed, so nobody writes to it. If it is truncated to nothing or
//! written over in whole before, it needs no base, and is stored as any other file.

use crate::dirtiness::Phase;
use crate::inode::Loaded;
use crate::key_state::Expected;
use crate::kv::Kv;
use crate::tables::Ctx;
use ebb_dataplane_protocol::{Backing, InodeId};
use ebb_metaplane_protocol::flush::{
    Adopt, BaseChange, BaseFound, ForeignObject, IngestAttrs, IngestObject, More, Rescue,
};
use ebb_metaplane_protocol::{FileKind, FsResult};

impl<K: Kv> Ctx<'_, K> {
    /// Changes nothing unless the file's base is still the one that the flush looked for.
    pub(crate) fn base_changed(&mut self, c: &BaseChange) -> FsResult<()> {
        // Another name's object is made of its file's.
        let id = self.read().file_of(c.inode)?;
        let Some(n) = self.read().find_inode(id)? else { return Ok(()) };
        let same = |b: &Backing| b.key == c.key && b.etag == c.etag;
        let busy = self.read().key_state(&c.key)?.is_some_and(|k| k.attempt.is_some());
        if busy || !n.view.backing.as_ref().is_some_and(same) {
            // Seen again when what is under way there is settled.
            return Ok(());
        }
        let object = match &c.found {
            // It was made from the base.
            BaseFound::LeftOver(found) => return self.take_left_over(&c.key, found),
            BaseFound::Foreign(object) => Some(object.clone()),
            BaseFound::Gone => None,
        };
        let (lineage, old_etag) = (n.view.lineage, Some(c.etag.clone()));
        let change = Adopt { inode: id, lineage, old_etag, object };
        // Whether the file needs its base its own flush finds out.
        if self.adopt(&change)? || id != c.inode {
            return Ok(());
        }
        self.lose_base(n, &c.key, change.object.as_ref())
    }

    /// The file keeps its dirty data and nothing else.
    fn lose_base(
        &mut self,
        mut n: Loaded,
        s3_key: &str,
        object: Option<&ForeignObject>,
    ) -> FsResult<()> {
        if n.phase != Phase::Dirty || n.nlink == 0 || n.base_lost || !n.may_hold_dirty_data() {
            return Ok(());
        }
        let id = n.id;
        // A conflict of before may have made it do so already.
        let aside =
            stepped_aside(&n.name, id) && self.read().target_key(&n)?.as_deref() != Some(s3_key);
        let mut state = self.read().key_state_or_owner(s3_key)?;
        if state.attempt.is_some() {
            // Seen again when that is settled.
            return Ok(());
        }
        let owned = self.read().owner_of(s3_key)? == Some(id);
        let here = self.read().target_key(&n)?.as_deref() == Some(s3_key);
        if owned && here && self.read().copied_link(id)?.is_some() {
            // Another name's object holds the same: only this name goes.
            let (parent, name) = (n.parent, n.name.clone());
            self.disown(s3_key, id)?;
            state.expected = Expected::Absent;
            self.put_key(s3_key, &state)?;
            self.delete_entry(parent, &name);
            self.touch_dir(parent, 0)?;
            self.drop_name(id, None)?;
            return object.map_or(Ok(()), |object| self.adopt_at_key(s3_key, object));
        }
        n.base_lost = true;
        self.save(n)?;
        if owned {
            self.disown(s3_key, id)?;
            state.expected = Expected::Absent;
            self.put_key(s3_key, &state)?;
        }
        if !aside {
            self.step_aside(id)?;
        }
        match object {
            Some(object) if owned => self.adopt_at_key(s3_key, object),
            _ => Ok(()),
        }
    }

    /// The dirty ranges are in S3: the file becomes a directory of them.
    pub(crate) fn rescued(&mut self, r: &Rescue) -> FsResult<()> {
        let Some(n) = self.read().find_inode(r.inode)? else { return Ok(()) };
        let f = match &n.phase {
            Phase::Sealing(f) if n.base_lost && f.generation == r.generation => f.clone(),
            _ => return Ok(()),
        };
        let (id, parent, name, named) = (n.id, n.parent, n.name.clone(), n.nlink > 0);
        // Who may read the file may look into the directory.
        let mode = 0o700 | n.mode() | ((n.mode() & 0o444) >> 2);
        let owner = (mode, n.uid, n.gid);
        let attrs = IngestAttrs {
            kind: FileKind::File,
            mode: n.mode(),
            uid: n.uid,
            gid: n.gid,
            mtime: n.mtime,
            more: More::of(None, self.read().xattrs(&n)?, None),
            complete: true,
        };
        // Whoever has it open keeps what the nodes hold.
        self.give_up(n, f)?;
        if !named {
            return Ok(());
        }
        self.part_links(id)?;
        self.delete_entry(parent, &name);
        self.drop_name(id, None)?;
        if r.ranges.is_empty() {
            return self.touch_dir(parent, 0);
        }
        let dir = self.make(parent, &name, FileKind::Directory, owner, &[])?.id;
        let prefix = self.read().prefix_of(dir)?;
        for range in &r.ranges {
            let name = format!("{}-{}", range.offset, range.length);
            let key = format!("{prefix}{name}");
            let found = IngestObject { key, etag: range.etag.clone(), size: range.length };
            self.create_found(dir, name.as_bytes(), Some(&found), &attrs)?;
        }
        Ok(())
    }
}

/// Whether clean bytes are needed that nobody has.
pub(crate) fn needs_lost_base(n: &crate::inode::Inode) -> bool {
    n.base_lost && n.view.backing.as_ref().is_some_and(|b| b.valid_bytes() > 0)
}

/// Whether a name is one that a file got by stepping aside.
fn stepped_aside(name: &[u8], id: InodeId) -> bool {
    let mark = format!(".conflict-{:x}", id.0);
    name.windows(mark.len()).any(|w| w == mark.as_bytes())
}
