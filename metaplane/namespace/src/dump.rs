//! The namespace as a dump has it ([`ebb_metaplane_protocol::dump`]), and a namespace made of one.
//!
//! A load is for an empty namespace. Nothing of the state that was dumped but names, attributes and where in the
//! bucket the bytes are comes back: no sessions, no numbers, no deletes that were due. So nothing in the bucket is
//! deleted for a dump's sake (I6), no inode's number means anything that a data node still has (I5), and each
//! object is compared with the bucket before its bytes are believed (I4): `validated` is the beginning of time.
//! What only data nodes had is as after [`crate::abandon`]: the last object, or lost.

use crate::Reader;
use crate::counters::Counter;
use crate::directory::{Directory, check_name};
use crate::dirtiness::Phase;
use crate::inode::{Inode, Loaded};
use crate::kv::{Kv, KvRead};
use crate::limits::SYMLINK_BYTES_MAX;
use crate::moves::Walk;
use crate::tables::*;
use ebb_dataplane_protocol::{Backing, ContentId, InodeId};
use ebb_metaplane_protocol::attr::LINKS_MAX;
use ebb_metaplane_protocol::dump::{LoadStep, Object, Record};
use ebb_metaplane_protocol::{FileKind, FsError, FsResult, Time, xattr};
use std::str;

fn refuse<T>(path: &str, why: &str) -> FsResult<T> {
    Err(FsError::Invalid(format!("'{path}' in the dump: {why}")))
}

fn object_of(n: &Inode) -> Option<Object> {
    n.view.backing.as_ref().filter(|_| !n.base_lost).map(|b| Object {
        key: b.key.clone(),
        etag: b.etag.clone(),
        length: b.length,
        valid: b.valid_bytes(),
    })
}

impl<K: KvRead> Reader<'_, K> {
    /// Nobody but the load changes anything meanwhile.
    pub(crate) fn refuse_while_loading(&self) -> FsResult<()> {
        match self.counter(Counter::Loading)? {
            0 => Ok(()),
            _ => Err(FsError::NotPermitted(
                "a dump is being loaded: `ebb meta load` goes on with it, and ends it".into(),
            )),
        }
    }

    /// The root's record, which no walk visits.
    pub fn dump_root(&self) -> FsResult<Record> {
        self.dump_record(&*self.inode(InodeId::ROOT)?, String::new())
    }

    /// Up to `limit` records further on in a walk, directories before what is in them.
    pub fn dump_page(&self, walk: &mut Walk, limit: usize) -> FsResult<Vec<Record>> {
        let mut records = Vec::new();
        let mut prefix: Option<(InodeId, String)> = None;
        for id in self.walk_on(walk, limit)? {
            let n = self.inode(id)?;
            let within = match prefix.take() {
                Some((dir, prefix)) if dir == n.parent => prefix,
                _ => self.prefix_of(n.parent)?,
            };
            let name = str::from_utf8(&n.name).map_err(|_| corrupt("name"))?;
            let path = format!("{within}{name}");
            records.push(match n.has_links() || n.link_of().is_some() {
                true => self.dump_name(&n, path)?,
                false => self.dump_record(&n, path)?,
            });
            prefix = Some((n.parent, within));
        }
        Ok(records)
    }

    /// One of several names of a file. The first of them in the order of a walk has the file, the others its path.
    fn dump_name(&self, n: &Inode, path: String) -> FsResult<Record> {
        let own = self.inode(n.file_id())?;
        let mut first = (self.path_of(own.id)?, own.id);
        for id in self.links(own.id)? {
            first = first.min((self.path_of(id)?, id));
        }
        let holder = self.inode(first.1)?;
        // Objects that are copies of each other: each name keeps the one at its key.
        let alike = own.is_clean_copy() && holder.is_clean_copy();
        if n.id == holder.id {
            let mut record = self.dump_record(&own, path)?;
            if alike {
                record.object = object_of(&holder);
            }
            return Ok(record);
        }
        let stored = if n.id != own.id {
            n
        } else if alike {
            &own
        } else {
            &holder
        };
        let mut record = self.dump_record(stored, path)?;
        record.kind = FileKind::HardLink;
        record.size = 0;
        record.target = first.0.join(&b'/');
        record.dirty = !stored.is_clean_copy() || (n.id == own.id && !alike);
        (record.unstored, record.unseen, record.lost) = (false, false, false);
        (record.atime, record.mtime, record.ctime) = (own.atime, own.mtime, own.ctime);
        (record.mode, record.uid, record.gid) = (own.mode(), own.uid, own.gid);
        Ok(record)
    }

    fn dump_record(&self, n: &Inode, path: String) -> FsResult<Record> {
        let unstored = n.may_hold_dirty_data();
        Ok(Record {
            path,
            kind: n.kind,
            mode: n.mode(),
            uid: n.uid,
            gid: n.gid,
            size: if n.is_dir() { 0 } else { n.size },
            atime: n.atime,
            mtime: n.mtime,
            ctime: n.ctime,
            target: if n.kind == FileKind::Symlink { n.target.clone() } else { Vec::new() },
            object: object_of(n),
            unseen: !n.attrs_complete,
            dirty: n.phase != Phase::Clean && n.id != InodeId::ROOT,
            unstored,
            lost: n.lost,
            listed: n.dir.as_ref().is_some_and(Directory::is_complete),
            xattrs: xattr::text(&self.xattrs(n)?),
        })
    }
}

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn load(&mut self, step: LoadStep, records: &[Record]) -> FsResult<()> {
        match step {
            LoadStep::Begin => self.begin_load(),
            LoadStep::Records => {
                if self.read().counter(Counter::Loading)? == 0 {
                    return Err(FsError::Invalid("no load has begun".into()));
                }
                records.iter().try_for_each(|r| self.load_record(r))
            }
            LoadStep::End => {
                self.set_counter(Counter::Loading, 0);
                Ok(())
            }
        }
    }

    fn begin_load(&mut self) -> FsResult<()> {
        let r = self.read();
        if r.counter(Counter::Loading)? != 0 {
            return Ok(());
        }
        if !r.is_formatted()? {
            return Err(crate::again("starting"));
        }
        let inodes = r.counter(Counter::Inodes)?;
        if inodes > 1 {
            return Err(FsError::Invalid(format!(
                "the namespace has {} names already: a dump is loaded into a new cluster, before anybody mounts it",
                inodes - 1
            )));
        }
        if r.counter(Counter::Sessions)? > 0 {
            return Err(FsError::Invalid("somebody has the file system mounted".into()));
        }
        self.set_counter(Counter::Loading, 1);
        Ok(())
    }

    fn load_record(&mut self, d: &Record) -> FsResult<()> {
        if d.path.is_empty() {
            return self.load_root(d);
        }
        let (above, name) = d.path.rsplit_once('/').unwrap_or(("", &d.path));
        let Some(parent) = self.read().resolve(above)? else {
            return refuse(&d.path, "its directory is not before it");
        };
        if self.read().entry(parent, name.as_bytes())?.is_some() {
            // Loaded before: a request that was repeated, or a load that goes on.
            return Ok(());
        }
        if let Err(e) = check_name(parent, name.as_bytes()) {
            return refuse(&d.path, &e.to_string());
        }
        if !self.read().dir_inode(parent).is_ok_and(|p| p.is_dir()) {
            return refuse(&d.path, "it is not in a directory");
        }
        if d.kind == FileKind::HardLink {
            return self.load_link(d, (parent, name));
        }
        let is_dir = d.kind == FileKind::Directory;
        let below = name.len() + usize::from(is_dir);
        if self.read().check_key_length(parent, below).is_err() {
            return refuse(&d.path, "too long");
        }
        if d.target.len() > SYMLINK_BYTES_MAX {
            return refuse(&d.path, "the link's target is too long");
        }
        let id = self.new_inode_id(parent, d.kind)?;
        let (place, owner) = ((parent, name.as_bytes()), (d.mode, d.uid, d.gid));
        let mut n = Inode::new(id, d.kind, place, owner, self.now);
        self.fill(&mut n, d)?;
        let key = n.view.backing.as_ref().map(|b| b.key.clone());
        let listed = d.listed;
        self.save(Loaded::created(n))?;
        if let Some(key) = key {
            self.set_owner(&key, id);
        }
        self.put_entry(parent, name.as_bytes(), id);
        self.note_depth(parent, below)?;
        if is_dir {
            self.update(parent, |p| p.nlink += 1)?;
            if !listed {
                self.add_incomplete(parent, 1)?;
            }
        }
        Ok(())
    }

    /// Another name of a file that was loaded before.
    fn load_link(&mut self, d: &Record, (parent, name): (InodeId, &str)) -> FsResult<()> {
        let path = str::from_utf8(&d.target).unwrap_or_default();
        let file = match self.read().resolve(path)? {
            Some(file) if !path.is_empty() => self.read().inode(file)?,
            _ => return refuse(&d.path, "the file that it names is not before it"),
        };
        if file.is_dir() || file.nlink >= LINKS_MAX {
            return refuse(&d.path, "what it names can have no other name");
        }
        if self.read().check_key_length(parent, name.len()).is_err() {
            return refuse(&d.path, "too long");
        }
        let id = self.new_inode_id(parent, FileKind::HardLink)?;
        let place = (parent, name.as_bytes());
        let mut link = Inode::new(id, FileKind::HardLink, place, (0, 0, 0), self.now);
        link.target = be(file.id.0).to_vec();
        let object = match &d.object {
            Some(o) if self.read().owner_of(&o.key)?.is_none() => Some(o),
            _ => None,
        };
        if let Some(o) = object {
            let limit = o.valid.min(o.length);
            link.view.backing =
                Some(Backing { key: o.key.clone(), etag: o.etag.clone(), length: o.length, limit });
        }
        if !d.dirty && !file.lost {
            link.stored_meta = link.meta_version;
        }
        link.lost = file.lost;
        if !link.is_settled_at(&d.path) {
            let now = self.now;
            link.mark_dirty(now);
        }
        self.put_link(Loaded::created(link))?;
        if let Some(o) = object {
            self.set_owner(&o.key, id);
        }
        self.note_depth(parent, name.len())?;
        self.update(file.id, |n| n.nlink += 1)
    }

    fn load_root(&mut self, d: &Record) -> FsResult<()> {
        let mut n = self.read().inode(InodeId::ROOT)?;
        n.set_mode(d.mode);
        (n.uid, n.gid) = (d.uid, d.gid);
        self.load_xattrs(&mut n, d)?;
        (n.atime, n.mtime, n.ctime) = (d.atime, d.mtime, d.ctime);
        let was_listed = n.dir.as_ref().is_some_and(Directory::is_complete);
        if let Some(dir) = n.dir.as_mut().filter(|_| d.listed && !was_listed) {
            let incomplete = dir.incomplete.saturating_sub(1);
            let deepest = dir.deepest;
            *dir = Directory { incomplete, deepest, ..Directory::complete(Time(0)) };
        }
        self.save(n)
    }

    fn load_xattrs(&mut self, n: &mut Inode, d: &Record) -> FsResult<()> {
        match xattr::of_text(&d.xattrs) {
            Some(xattrs) => self.put_xattrs(n, &xattrs),
            None => return refuse(&d.path, "its extended attributes are not readable"),
        }
        Ok(())
    }

    /// What the dump says of an inode.
    fn fill(&mut self, n: &mut Inode, d: &Record) -> FsResult<()> {
        (n.atime, n.mtime, n.ctime) = (d.atime, d.mtime, d.ctime);
        n.attrs_complete = !d.unseen;
        n.validated = Time(0);
        n.target.clone_from(&d.target);
        self.load_xattrs(n, d)?;
        n.size = if n.is_dir() { 0 } else { d.size };
        if n.is_dir() {
            let dir = if d.listed { Directory::complete(Time(0)) } else { Directory::listing() };
            n.dir = Some(dir);
        }
        // Two can't own one object: the second lost it in a conflict before it was dumped.
        let object = match &d.object {
            Some(o) if self.read().owner_of(&o.key)?.is_none() => Some(o),
            _ => None,
        };
        if let Some(o) = object {
            // Of a file that had more on data nodes, all of the object, as it was stored.
            let limit = if d.unstored { o.length } else { o.valid.min(o.length) };
            n.view.backing =
                Some(Backing { key: o.key.clone(), etag: o.etag.clone(), length: o.length, limit });
            n.view.content = ContentId(1);
        }
        let file = n.is_file();
        let kept = object.is_some();
        if file && (d.lost || (d.unstored && !kept) || (d.object.is_some() && !kept)) {
            n.lost = true;
            return Ok(());
        }
        if d.unstored {
            let Some(o) = object else { return Ok(()) };
            (n.size, n.attrs_complete) = (o.length, false);
        }
        if !d.dirty || d.unstored {
            n.stored_meta = n.meta_version;
        }
        // Of a directory that was only ever seen by what is in it there need not be an object.
        let key = format!("{}{}", d.path, if n.is_dir() { "/" } else { "" });
        let seen_only = n.is_dir() && !kept && n.meta_version == n.stored_meta;
        if !seen_only && !n.is_settled_at(&key) {
            let now = self.now;
            n.mark_dirty(now);
        }
        Ok(())
    }
}

impl<K: KvRead> Reader<'_, K> {
    /// The inode at a path without slashes at its ends.
    fn resolve(&self, path: &str) -> FsResult<Option<InodeId>> {
        let mut at = InodeId::ROOT;
        for name in path.split('/').filter(|_| !path.is_empty()) {
            match self.entry(at, name.as_bytes())? {
                Some(next) => at = next,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }
}
