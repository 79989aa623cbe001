//! What S3 shows (PROTOCOL §9): listings, looked-up attributes, outside changes.
//!
//! A listing is older than the command that carries it. It never overrules a name that exists, nor
//! brings back one whose key we have deleted, are about to delete, or still use for an inode that
//! moved.

use crate::counters::Counter;
use crate::directory::{Directory, Origin, check_name};
use crate::dirtiness::Phase;
use crate::inode::{Inode, Loaded};
use crate::key_state::{Expected, KeyState};
use crate::kv::Kv;
use crate::limits::{KEY_BYTES_MAX, SYMLINK_BYTES_MAX};
use crate::tables::*;
use ebb_dataplane_protocol::{Backing, ContentId, Generation, InodeId, Lineage, ViewVersion};
use ebb_metaplane_protocol::command::IngestPage;
use ebb_metaplane_protocol::flush::{Adopt, ForeignObject, IngestAttrs, IngestEntry, IngestObject};
use ebb_metaplane_protocol::{FileKind, FsError, FsResult};

/// Remembered deletes looked at for one directory of a listing. It comes with a later listing if there are more.
const DELETED_MAX: usize = 1_000;

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn ingest(
        &mut self,
        dir: InodeId,
        listed_at: u64,
        entries: &[IngestEntry],
        page: Option<&IngestPage>,
    ) -> FsResult<()> {
        self.read().refuse_while_loading()?;
        if listed_at < self.read().counter(Counter::TombstoneFloor)? {
            return Err(FsError::Invalid("the listing is too old: list again".into()));
        }
        let d = self.read().dir_inode(dir)?;
        if let Some(page) = page {
            match d.dir.as_ref().map(|d| &d.origin) {
                Some(Origin::Listing { continuation }) if *continuation == page.from => {}
                _ => return Err(FsError::Invalid("the listing is at another page".into())),
            }
        }
        let prefix = self.read().prefix_of(dir)?;
        for e in entries {
            self.ingest_entry(dir, &prefix, listed_at, e)?;
        }
        let Some(page) = page else { return Ok(()) };
        let mut d = self.read().dir_inode(dir)?;
        let now = self.now;
        if let Some(state) = &mut d.dir {
            state.listed = now;
            state.origin = match &page.next {
                Some(next) => Origin::Listing { continuation: next.clone() },
                None => Origin::Complete,
            };
        }
        self.save(d)?;
        if page.next.is_none() {
            self.add_incomplete(dir, -1)?;
        }
        Ok(())
    }

    fn ingest_entry(
        &mut self,
        dir: InodeId,
        prefix: &str,
        listed_at: u64,
        e: &IngestEntry,
    ) -> FsResult<()> {
        if check_name(dir, &e.name).is_err() {
            return Ok(());
        }
        let is_dir = e.attrs.kind == FileKind::Directory;
        let s3_key = self.read().key_in(prefix, &e.name, is_dir)?;
        let fits =
            s3_key.len() <= KEY_BYTES_MAX && e.object.as_ref().map_or(is_dir, |o| o.key == s3_key);
        if !fits {
            return Ok(());
        }
        if let Some(existing) = self.read().holder(dir, &e.name)? {
            return self.ingest_existing(existing, e);
        }
        if self.is_ours(&s3_key, is_dir, listed_at)? {
            return Ok(());
        }
        let id = self.create_found(dir, &e.name, e.object.as_ref(), &e.attrs)?;
        match e.attrs.more.link().filter(|_| e.attrs.complete) {
            Some(tag) => self.join(id, tag),
            None => Ok(()),
        }
    }

    /// The name is known: only what nobody looked up yet may still change.
    fn ingest_existing(&mut self, id: InodeId, e: &IngestEntry) -> FsResult<()> {
        match &e.object {
            Some(o) => self.set_found_attrs(id, &o.etag, &e.attrs),
            None => Ok(()),
        }
    }

    /// Whether what a listing shows at a key (below it, for a directory) is or was ours.
    fn is_ours(&self, s3_key: &str, is_dir: bool, listed_at: u64) -> FsResult<bool> {
        let r = self.read();
        let ours = r.owner_of(s3_key)?.is_some()
            || r.key_state(s3_key)?.is_some()
            || r.tombstone(s3_key)?.is_some_and(|t| t > listed_at);
        if ours || !is_dir {
            return Ok(ours);
        }
        let below = |table| key(table, &[s3_key.as_bytes()]);
        // A key has a record while an object of ours is there, or may yet come.
        Ok(r.any_with_prefix(&below(OWNER))
            || r.any_with_prefix(&below(KEY))
            || self.deleted_below(s3_key, listed_at)?)
    }

    /// Whether something of ours below a prefix was deleted after `listed_at`, as far as can be told.
    fn deleted_below(&self, prefix: &str, listed_at: u64) -> FsResult<bool> {
        let r = self.read();
        let tombstones = r.scan_prefix(&key(TOMBSTONE, &[prefix.as_bytes()]), None, DELETED_MAX);
        for (_, v) in &tombstones {
            if u64_at(v, 0)? > listed_at {
                return Ok(true);
            }
        }
        if tombstones.len() < DELETED_MAX {
            return Ok(false);
        }
        // There are more. Those since then, wherever.
        let from = key(TOMBSTONE_AGE, &[&be(listed_at + 1)]);
        let since = r.scan_prefix(&[TOMBSTONE_AGE], Some(&from), DELETED_MAX);
        let here =
            |age_key: &[u8]| age_key.get(9..).is_some_and(|k| k.starts_with(prefix.as_bytes()));
        Ok(since.len() == DELETED_MAX || since.iter().any(|(k, _)| here(k)))
    }

    /// A clean inode for what is in S3 already.
    pub(crate) fn create_found(
        &mut self,
        parent: InodeId,
        name: &[u8],
        object: Option<&IngestObject>,
        attrs: &IngestAttrs,
    ) -> FsResult<InodeId> {
        let id = self.new_inode_id(parent, attrs.kind)?;
        let mut n = Inode::new(id, attrs.kind, (parent, name), (0, 0, 0), self.now);
        n.stored_meta = n.meta_version;
        let is_dir = n.is_dir();
        if is_dir {
            n.dir = Some(Directory::listing());
        }
        n.attrs_complete = false;
        if let Some(o) = object {
            n.view.backing = Some(Backing {
                key: o.key.clone(),
                etag: o.etag.clone(),
                length: o.size,
                limit: o.size,
            });
            n.view.content = ContentId(1);
            n.size = if is_dir { 0 } else { o.size };
        }
        self.set_attrs(&mut n, attrs);
        self.save(Loaded::created(n))?;
        if let Some(o) = object {
            self.set_owner(&o.key, id);
            // The owner says now what a left-over record would.
            if let Some(k) = self.read().key_state(&o.key)? {
                self.put_key(&o.key, &KeyState { expected: Expected::Etag(o.etag.clone()), ..k })?;
            }
        }
        self.put_entry(parent, name, id);
        self.brought(parent)?;
        self.note_depth(parent, name.len() + usize::from(is_dir))?;
        if is_dir {
            let mut p = self.read().inode(parent)?;
            p.nlink += 1;
            self.save(p)?;
            self.add_incomplete(parent, 1)?;
        }
        Ok(id)
    }

    /// Attributes of an inode that only a LIST has shown, from the HEAD of the same object (an
    /// empty etag: a directory without a marker).
    pub(crate) fn set_found_attrs(
        &mut self,
        id: InodeId,
        etag: &str,
        attrs: &IngestAttrs,
    ) -> FsResult<()> {
        let id = self.read().file_of(id)?;
        let Some(mut n) = self.read().find_inode(id)? else { return Ok(()) };
        let same = match &n.view.backing {
            Some(b) => b.etag == etag,
            None => n.is_dir(),
        };
        if n.attrs_complete || !attrs.complete || !same {
            return Ok(());
        }
        // A LIST can't tell a link from a file.
        let kind_fits = n.kind == attrs.kind
            || (n.is_file() && attrs.kind == FileKind::Symlink && attrs.more.target().is_some());
        if !kind_fits {
            return Ok(());
        }
        n.kind = attrs.kind;
        self.set_attrs(&mut n, attrs);
        let marker = (n.is_dir() && n.view.backing.is_none() && !etag.is_empty())
            .then(|| self.read().target_key(&n))
            .transpose()?
            .flatten();
        if let Some(k) = &marker {
            n.view.backing =
                Some(Backing { key: k.clone(), etag: etag.to_owned(), length: 0, limit: 0 });
        }
        self.save(n)?;
        if let Some(k) = marker {
            self.set_owner(&k, id);
        }
        match attrs.more.link() {
            Some(tag) => self.join(id, tag),
            None => Ok(()),
        }
    }

    /// An outside change, found by looking. Changes nothing (and says so) unless the inode is as it
    /// was when the leader looked and holds no bytes of ours: clean, or dirty only by its name or
    /// attributes, which then stay dirty.
    pub(crate) fn adopt(&mut self, a: &Adopt) -> FsResult<bool> {
        let Some(mut n) = self.read().find_inode(a.inode)? else { return Ok(false) };
        let Some(backing) = n.view.backing.clone() else { return Ok(false) };
        let untouched = match n.phase {
            Phase::Clean => true,
            Phase::Dirty => !n.may_hold_dirty_data(),
            _ => false,
        };
        if !untouched
            || n.nlink == 0
            || n.view.lineage != a.lineage
            || a.old_etag.as_ref() != Some(&backing.etag)
            || self.read().owner_of(&backing.key)? != Some(a.inode)
        {
            return Ok(false);
        }
        n.validated = self.now;
        if n.link_of().is_some() {
            return self.adopt_name(n, &backing, a.object.as_ref()).map(|()| true);
        }
        match &a.object {
            Some(o) if o.etag == backing.etag => {
                self.save(n)?;
                self.set_found_attrs(a.inode, &o.etag, &o.attrs)?;
            }
            Some(o) => {
                n.view.content = ContentId(n.view.content.0 + 1);
                n.view.lineage = Lineage(n.view.lineage.0 + 1);
                n.view.version = ViewVersion(n.view.version.0 + 1);
                n.view.backing = Some(Backing {
                    key: backing.key.clone(),
                    etag: o.etag.clone(),
                    length: o.size,
                    limit: o.size,
                });
                // What writers of the old lineage still report says nothing about the new one, and
                // none of their grants lives on.
                n.clip_all_at(o.size);
                n.generation = n.generation.next();
                n.sealed_floor = n.generation;
                n.view.clean_generation = n.generation;
                n.size = if n.is_dir() { 0 } else { o.size };
                let ours = n.meta_version != n.stored_meta;
                let kind_fits =
                    o.attrs.kind == n.kind || (!n.is_dir() && o.attrs.kind != FileKind::Directory);
                self.unjoin(&mut n);
                if ours {
                    n.mtime = o.attrs.mtime;
                } else if kind_fits {
                    n.kind = o.attrs.kind;
                    self.set_attrs(&mut n, &o.attrs);
                }
                n.ctime = self.now;
                let linked = n.has_links();
                self.save(n)?;
                if linked {
                    self.links_are_old(a.inode, self.now)?;
                }
                if let Some(k) = self.read().key_state(&backing.key)? {
                    let expected = Expected::Etag(o.etag.clone());
                    self.put_key(&backing.key, &KeyState { expected, ..k })?;
                }
            }
            None if n.is_dir() => {
                n.view.backing = None;
                self.save(n)?;
                self.disown(&backing.key, a.inode)?;
            }
            None => {
                let (parent, name) = (n.parent, n.name.clone());
                if !n.has_links() {
                    n.view.lineage = Lineage(n.view.lineage.0 + 1);
                }
                let named = self.read().target_key(&n)?;
                self.save(n)?;
                self.disown(&backing.key, a.inode)?;
                self.delete_entry(parent, &name);
                self.touch_dir(parent, 0)?;
                self.drop_name(a.inode, named.as_deref())?;
            }
        }
        Ok(true)
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// The object of another name of a file was looked at. If it is a stranger's, that is what the name shows from now
    /// on; if it is gone, so is the name. The file has its data elsewhere.
    fn adopt_name(
        &mut self,
        link: Loaded,
        backing: &Backing,
        object: Option<&ForeignObject>,
    ) -> FsResult<()> {
        if object.is_some_and(|o| o.etag == backing.etag) {
            return self.save(link);
        }
        let (id, parent, name) = (link.id, link.parent, link.name.clone());
        let named = self.read().target_key(&link)?;
        self.save(link)?;
        self.disown(&backing.key, id)?;
        self.delete_entry(parent, &name);
        self.touch_dir(parent, 0)?;
        self.drop_name(id, named.as_deref())?;
        object.map_or(Ok(()), |o| self.adopt_at_key(&backing.key, o))
    }

    /// Takes looked-up attributes over, and the extended ones with them.
    fn set_attrs(&mut self, n: &mut Inode, attrs: &IngestAttrs) {
        self.put_xattrs(n, attrs.more.xattrs());
        set_attrs(n, attrs);
    }
}

fn set_attrs(n: &mut Inode, attrs: &IngestAttrs) {
    n.set_mode(attrs.mode);
    n.uid = attrs.uid;
    n.gid = attrs.gid;
    n.mtime = attrs.mtime;
    n.atime = attrs.mtime;
    n.ctime = attrs.mtime;
    n.attrs_complete = attrs.complete;
    if let (FileKind::Symlink, Some(target)) = (attrs.kind, attrs.more.target()) {
        n.target = target[..target.len().min(SYMLINK_BYTES_MAX)].to_vec();
        n.size = n.target.len() as u64;
    }
    debug_assert!(n.generation >= Generation(0));
}
