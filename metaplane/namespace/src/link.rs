//! Hard links: files with several names (PROTOCOL R58).
//!
//! A file's inode has one name itself. Each other name is a small inode of its own ([`FileKind::HardLink`]) that
//! nobody sees: it has a place, a key and a state of dirtiness, so every rule about keys, renames, conflicts and
//! deletes holds for it as for a file, and its object is a copy, made by S3, of what its file last stored. It is
//! dirty from when its file stored something else until the copy is there: nothing is clean before all names hold it.
//! When a file's own name goes it takes the place of another one.

use crate::Reader;
use crate::dirtiness::Phase;
use crate::flush::Body;
use crate::inode::{Inode, Loaded};
use crate::kv::{Kv, KvRead};
use crate::tables::*;
use ebb_dataplane_protocol::{Backing, ContentId, InodeId, NAME_BYTES_MAX, ViewVersion};
use ebb_metaplane_protocol::attr::LINKS_MAX;
use ebb_metaplane_protocol::command::OpOutcome;
use ebb_metaplane_protocol::flush::LinkTag;
use ebb_metaplane_protocol::{FileKind, FsError, FsResult, Time};

/// What another name's object is made of.
pub(crate) enum Source {
    /// The file's object as it is, or a body that the leader writes.
    Stored(Box<Body>),
    /// The file has to be stored first.
    Unstored(InodeId),
    /// Its data was lost with a node: there is nothing to store.
    Lost,
}

impl Inode {
    /// The file of which this is another name.
    pub(crate) fn link_of(&self) -> Option<InodeId> {
        match self.kind {
            FileKind::HardLink => u64_at(&self.target, 0).ok().map(InodeId),
            _ => None,
        }
    }

    /// The inode that `stat` shows for this one's name.
    pub(crate) fn file_id(&self) -> InodeId {
        self.link_of().unwrap_or(self.id)
    }

    /// What the objects of all its names say when this is what they hold.
    pub(crate) fn link_tag(&self, content: ContentId, meta_version: u64) -> LinkTag {
        LinkTag { cluster: 0, file: self.id.0, content: content.0, meta_version }
    }

    /// It has names besides its own.
    pub(crate) fn has_links(&self) -> bool {
        !self.is_dir() && self.nlink > 1
    }

    /// It is clean, and its object holds what it is. Of another name: what its file last stored.
    pub(crate) fn is_clean_copy(&self) -> bool {
        let at = self.view.backing.as_ref().map(|b| b.key.as_str());
        self.phase == Phase::Clean && at.is_some_and(|key| self.is_settled_at(key))
    }
}

impl<K: KvRead> Reader<'_, K> {
    /// The inode whose own name this is: a file's, or that of another name of it.
    pub fn holder(&self, dir: InodeId, name: &[u8]) -> FsResult<Option<InodeId>> {
        match self.0.get(&key(ENTRY, &[&be(dir.0), name])) {
            None => Ok(None),
            Some(v) => Ok(Some(holder_in(&v)?)),
        }
    }

    /// The inode whose own name an unlink, rmdir or rename means.
    pub(crate) fn existing_holder(&self, parent: InodeId, name: &[u8]) -> FsResult<Loaded> {
        self.dir_inode(parent)?;
        if name.len() > NAME_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        match self.holder(parent, name)? {
            Some(id) => self.inode(id),
            None => Err(FsError::NotFound),
        }
    }

    /// The file of which an inode is another name, or the inode itself.
    pub fn file_of(&self, id: InodeId) -> FsResult<InodeId> {
        Ok(self.find_inode(id)?.map_or(id, |n| n.file_id()))
    }

    /// The other names of a file.
    pub fn links(&self, file: InodeId) -> FsResult<Vec<InodeId>> {
        self.scan_prefix(&key(LINK, &[&be(file.0)]), None, LINKS_MAX as usize)
            .iter()
            .map(|(k, _)| Ok(InodeId(u64_at(k, 9)?)))
            .collect()
    }

    /// Another name of a file whose object holds what the file's does.
    pub(crate) fn copied_link(&self, file: InodeId) -> FsResult<Option<InodeId>> {
        for id in self.links(file)? {
            if self.find_inode(id)?.is_some_and(|link| link.is_clean_copy()) {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    /// What the object of another name of `file` is made of.
    pub(crate) fn link_source(&self, file: InodeId) -> FsResult<Source> {
        let Some(n) = self.find_inode(file)? else { return Ok(Source::Unstored(file)) };
        if n.lost {
            return Ok(Source::Lost);
        }
        let mut body = Body::of(&n, false, self.xattrs(&n)?);
        (body.from_nodes, body.copied) = (false, false);
        if n.kind == FileKind::Symlink {
            return Ok(Source::Stored(Box::new(body)));
        }
        match n.view.backing.as_ref().filter(|_| !n.base_lost) {
            Some(b) if n.attrs_complete => {
                // As it was stored: what was written since comes with the next store.
                (body.attr.size, body.length, body.copied) = (b.length, b.length, b.length > 0);
                body.link = Some(n.link_tag(n.view.content, n.stored_meta));
                Ok(Source::Stored(Box::new(body)))
            }
            _ => Ok(Source::Unstored(file)),
        }
    }
}

/// The inode whose own name an entry is.
pub(crate) fn holder_in(entry: &[u8]) -> FsResult<InodeId> {
    u64_at(entry, if entry.len() > 8 { 8 } else { 0 }).map(InodeId)
}

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn link(
        &mut self,
        inode: InodeId,
        parent: InodeId,
        name: &[u8],
    ) -> FsResult<OpOutcome> {
        let mut n = self.read().inode(inode)?;
        match n.kind {
            FileKind::Directory => {
                return Err(FsError::NotPermitted("a directory has one name".into()));
            }
            FileKind::HardLink => return Err(FsError::Stale),
            FileKind::File | FileKind::Symlink => {}
        }
        self.read().check_new_name(parent, name, false)?;
        if n.nlink == 0 {
            return Err(FsError::NotFound);
        }
        if n.nlink >= LINKS_MAX {
            return Err(FsError::TooManyLinks);
        }
        if !n.attrs_complete {
            return Err(crate::again(crate::why::ATTRIBUTES));
        }
        n.refuse_if_lost()?;
        let id = self.new_inode_id(parent, FileKind::HardLink)?;
        let mut link = Inode::new(id, FileKind::HardLink, (parent, name), (0, 0, 0), self.now);
        link.target = be(inode.0).to_vec();
        link.mark_dirty(self.now);
        if n.nlink == 1 {
            // Its object doesn't say yet that it is one of several.
            n.meta_version += 1;
            n.mark_dirty(self.now);
        }
        n.nlink += 1;
        n.ctime = self.now;
        let attr = n.attr();
        self.save(n)?;
        self.put_link(Loaded::created(link))?;
        self.touch_dir(parent, 0)?;
        self.note_depth(parent, name.len())?;
        Ok(OpOutcome::Attr(attr))
    }

    /// Saves a new name of a file with its entry.
    pub(crate) fn put_link(&mut self, link: Loaded) -> FsResult<()> {
        let (parent, name) = (link.parent, link.name.clone());
        self.kv.put(&key(LINK, &[&be(link.file_id().0), &be(link.id.0)]), &[]);
        self.put_entry_of(parent, &name, &link);
        self.save(link)
    }

    /// Makes a name that of an inode.
    pub(crate) fn put_entry_of(&mut self, dir: InodeId, name: &[u8], n: &Inode) {
        match n.link_of() {
            Some(file) => {
                let both = [be(file.0), be(n.id.0)].concat();
                self.kv.put(&key(ENTRY, &[&be(dir.0), name]), &both);
            }
            None => self.put_entry(dir, name, n.id),
        }
    }

    /// Another name of a file went, with its entry.
    pub(crate) fn drop_link(&mut self, link: Loaded, file: InodeId) -> FsResult<()> {
        self.remove_inode(link)?;
        let now = self.now;
        match self.read().find_inode(file)? {
            Some(mut n) => {
                n.nlink = n.nlink.saturating_sub(1).max(1);
                n.ctime = now;
                self.save(n)
            }
            None => Ok(()),
        }
    }

    /// A file's own name went, with its entry: it takes the place of another one, if it can of one whose object
    /// holds the same, which then is the file's. `false`: it has no other.
    pub(crate) fn take_other_name(&mut self, mut n: Loaded) -> FsResult<bool> {
        let first = match self.read().copied_link(n.id)? {
            None => self.read().links(n.id)?.first().copied(),
            Some(link) => Some(link),
        };
        let Some(first) = first else { return Ok(false) };
        let link = self.read().inode(first)?;
        let (parent, name) = (link.parent, link.name.clone());
        n.nlink -= 1;
        n.ctime = self.now;
        (n.parent, n.name) = (parent, name.clone());
        self.put_entry(parent, &name, n.id);
        let idle = matches!(n.phase, Phase::Clean | Phase::Dirty) && !n.base_lost;
        let same = link.view.backing.clone().filter(|_| idle && link.is_clean_copy());
        match (same, n.view.backing.clone()) {
            (Some(theirs), Some(mine)) => {
                // While the record still tells the etag.
                self.retire(&mine.key, n.id)?;
                let limit = mine.limit.min(theirs.length);
                let at = theirs.key.clone();
                n.view.backing = Some(Backing { limit, ..theirs });
                n.view.version = ViewVersion(n.view.version.0 + 1);
                let file = n.id;
                self.save(n)?;
                self.erase(link)?;
                self.set_owner(&at, file);
            }
            _ => {
                n.mark_dirty(self.now);
                self.save(n)?;
                self.remove_inode(link)?;
            }
        }
        Ok(true)
    }

    /// A file's object is another one: its other names' objects are not it any more.
    pub(crate) fn links_are_old(&mut self, file: InodeId, since: Time) -> FsResult<()> {
        for id in self.read().links(file)? {
            let Some(mut link) = self.read().find_inode(id)? else { continue };
            link.meta_version += 1;
            link.lost = false;
            link.mark_dirty(since);
            self.save(link)?;
        }
        Ok(())
    }

    /// An object was looked at that says of which file it was a name: with others that say the same, it is one file's
    /// again. The first of them is the file; what it became since is what the others are.
    pub(crate) fn join(&mut self, id: InodeId, tag: LinkTag) -> FsResult<()> {
        let mut n = self.read().inode(id)?;
        if !n.is_file() || n.phase != Phase::Clean || n.nlink != 1 || self.read().is_open(id) {
            return Ok(());
        }
        let place = key(JOIN, &[&tag.bytes()]);
        let (mut first, mut content) = (None, 0);
        if let Some(v) = self.kv.get(&place) {
            content = u64_at(&v, 8)?;
            first = self.read().find_inode(InodeId(u64_at(&v, 0)?))?;
        }
        let may = |f: &Loaded| f.is_file() && f.id != id && (1..LINKS_MAX).contains(&f.nlink);
        let Some(mut file) = first.filter(|f| may(f) && !f.lost) else {
            self.unjoin(&mut n);
            self.kv.put(&place, &[be(id.0), be(n.view.content.0)].concat());
            // To be found from the file, which has no other use for it.
            n.target = tag.bytes();
            return self.save(n);
        };
        self.unjoin(&mut n);
        self.put_xattrs(&mut n, &[]);
        (n.kind, n.target, n.size) = (FileKind::HardLink, be(file.id.0).to_vec(), 0);
        n.stored_meta = n.meta_version;
        if file.phase != Phase::Clean || file.view.content.0 != content {
            n.meta_version += 1;
            n.mark_dirty(self.now);
        }
        file.nlink += 1;
        self.save(file)?;
        self.put_link(n)
    }

    /// Nothing that is found later joins this file.
    pub(crate) fn unjoin(&mut self, n: &mut Inode) {
        if n.is_file() && !n.target.is_empty() {
            let place = key(JOIN, &[&n.target]);
            if self.kv.get(&place).is_some_and(|v| v.starts_with(&be(n.id.0))) {
                self.kv.delete(&place);
            }
            n.target.clear();
        }
    }

    /// The other names of a file that is gone are names of `new`.
    pub(crate) fn relink(&mut self, old: InodeId, new: InodeId) -> FsResult<()> {
        let links = self.read().links(old)?;
        for &id in &links {
            let Some(mut link) = self.read().find_inode(id)? else { continue };
            self.kv.delete(&key(LINK, &[&be(old.0), &be(id.0)]));
            link.target = be(new.0).to_vec();
            self.put_link(link)?;
        }
        self.update(new, |n| n.nlink = 1 + links.len() as u32)
    }

    /// A file can't be put together any more: its other names become files of their own with what they hold, or go.
    pub(crate) fn part_links(&mut self, file: InodeId) -> FsResult<()> {
        let n = self.read().inode(file)?;
        if !n.has_links() {
            return Ok(());
        }
        let (owner, times) = ((n.mode(), n.uid, n.gid), (n.atime, n.mtime));
        self.update(file, |n| n.nlink = 1)?;
        for id in self.read().links(file)? {
            let Some(mut link) = self.read().find_inode(id)? else { continue };
            self.kv.delete(&key(LINK, &[&be(file.0), &be(id.0)]));
            let (parent, name) = (link.parent, link.name.clone());
            match link.view.backing.clone() {
                Some(b) => {
                    (link.kind, link.size) = (FileKind::File, b.length);
                    link.target.clear();
                    link.set_mode(owner.0);
                    (link.uid, link.gid) = (owner.1, owner.2);
                    (link.atime, link.mtime, link.ctime) = (times.0, times.1, self.now);
                    link.attrs_complete = false;
                    link.stored_meta = link.meta_version;
                    // A copy under way that lands after all is a change like one from outside.
                    let in_place = self.read().target_key(&link)?.as_ref() == Some(&b.key);
                    link.phase = if in_place { Phase::Clean } else { Phase::Dirty };
                    self.put_entry(parent, &name, id);
                    self.save(link)?;
                }
                None => {
                    self.delete_entry(parent, &name);
                    let key = self.read().target_key(&link)?;
                    self.remove_inode(link)?;
                    self.touch_dir(parent, 0)?;
                    if let Some(key) = key {
                        self.reconsider(&key)?;
                    }
                }
            }
            self.brought(parent)?;
        }
        Ok(())
    }
}
