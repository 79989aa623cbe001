//! Strangers' objects (PROTOCOL §9): a foreign object keeps the name; the local inode becomes
//! `name.conflict-<id>` in the same command. Nothing is lost, nothing is overwritten.

use crate::directory::check_name;
use crate::kv::Kv;
use crate::limits::KEY_BYTES_MAX;
use crate::tables::Ctx;
use ebb_dataplane_protocol::{InodeId, NAME_BYTES_MAX};
use ebb_metaplane_protocol::flush::{ForeignObject, IngestAttrs, IngestObject, More};
use ebb_metaplane_protocol::{FileKind, FsResult};

/// Room in a key for `/<offset>-<length>` (R36).
const RANGE_NAME_BYTES: usize = 32;

impl<K: Kv> Ctx<'_, K> {
    /// The flush of `id` found `object` at `s3_key`.
    pub(crate) fn conflict(
        &mut self,
        id: InodeId,
        s3_key: &str,
        object: &ForeignObject,
    ) -> FsResult<()> {
        // What was ours at this key is overwritten. If it was the inode's base, its clean ranges now
        // answer EIO (I4), and a later flush needs all of it dirty.
        self.disown(s3_key, id)?;
        let n = self.read().inode(id)?;
        if self.read().target_key(&n)?.as_deref() == Some(s3_key) {
            self.step_aside(id)?;
        }
        self.adopt_at_key(s3_key, object)
    }

    /// The inode becomes `name.conflict-<id>`.
    pub(crate) fn step_aside(&mut self, id: InodeId) -> FsResult<()> {
        let n = self.read().inode(id)?;
        let (parent, old) = (n.parent, n.name.clone());
        let new = self.conflict_name(parent, &old, id)?;
        self.delete_entry(parent, &old);
        self.put_entry_of(parent, &new, &n);
        self.brought(parent)?;
        self.note_depth(parent, new.len() + RANGE_NAME_BYTES)?;
        let now = self.now;
        self.update(id, |n| {
            n.name = new;
            n.changed(now);
        })?;
        self.touch_dir(parent, 0)
    }

    /// A free name beside `name`, short enough for a name and a key.
    pub(crate) fn conflict_name(
        &self,
        dir: InodeId,
        name: &[u8],
        id: InodeId,
    ) -> FsResult<Vec<u8>> {
        let before = self.read().prefix_of(dir)?.len() + RANGE_NAME_BYTES;
        let room = KEY_BYTES_MAX.saturating_sub(before).min(NAME_BYTES_MAX);
        for salt in 0u32.. {
            let suffix = match salt {
                0 => format!(".conflict-{:x}", id.0),
                s => format!(".conflict-{:x}-{s}", id.0),
            };
            let mut keep = name.len().min(room.saturating_sub(suffix.len()));
            while keep > 0 && name.get(keep).is_some_and(|b| (b & 0xc0) == 0x80) {
                keep -= 1;
            }
            let candidate = [&name[..keep], suffix.as_bytes()].concat();
            if self.read().entry(dir, &candidate)?.is_none() {
                return Ok(candidate);
            }
        }
        unreachable!("a directory holds fewer names than there are suffixes")
    }

    /// A foreign object appears under its name, if nothing of ours has it. Directories that were
    /// renamed or removed meanwhile come back for it: a stranger's object is never hidden.
    pub(crate) fn adopt_at_key(&mut self, s3_key: &str, object: &ForeignObject) -> FsResult<()> {
        if self.read().owner_of(s3_key)?.is_some() || s3_key.ends_with('/') {
            return Ok(());
        }
        let mut names: Vec<&str> = s3_key.split('/').collect();
        let Some(name) = names.pop() else { return Ok(()) };
        let mut parent = InodeId::ROOT;
        for dir in names {
            if check_name(parent, dir.as_bytes()).is_err() {
                return Ok(());
            }
            parent = match self.read().entry(parent, dir.as_bytes())? {
                Some(id) if self.read().inode(id)?.is_dir() => id,
                Some(_) => return Ok(()),
                None => self.bring_back(parent, dir.as_bytes(), object)?,
            };
        }
        if check_name(parent, name.as_bytes()).is_err()
            || self.read().entry(parent, name.as_bytes())?.is_some()
        {
            return Ok(());
        }
        let found =
            IngestObject { key: s3_key.to_owned(), etag: object.etag.clone(), size: object.size };
        self.create_found(parent, name.as_bytes(), Some(&found), &object.attrs)?;
        self.touch_dir(parent, 0)
    }

    /// A directory on the way to a foreign object.
    fn bring_back(
        &mut self,
        parent: InodeId,
        name: &[u8],
        object: &ForeignObject,
    ) -> FsResult<InodeId> {
        let attrs = IngestAttrs {
            kind: FileKind::Directory,
            mode: 0o755,
            uid: object.attrs.uid,
            gid: object.attrs.gid,
            mtime: self.now,
            more: More::None,
            complete: true,
        };
        let id = self.create_found(parent, name, None, &attrs)?;
        let now = self.now;
        self.update(id, |n| n.changed(now))?;
        self.touch_dir(parent, 0)?;
        Ok(id)
    }
}
