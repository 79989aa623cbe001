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
use ebb_metaplane_protocol::dump::{LoadStep, Object, Record};
use ebb_metaplane_protocol::{FileKind, FsError, FsResult, Time};
use std::str;

fn refuse<T>(path: &str, why: &str) -> FsResult<T> {
    Err(FsError::Invalid(format!("'{path}' in the dump: {why}")))
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
            records.push(self.dump_record(&n, format!("{within}{name}"))?);
            prefix = Some((n.parent, within));
        }
        Ok(records)
    }

    fn dump_record(&self, n: &Inode, path: String) -> FsResult<Record> {
        let unstored = n.may_hold_dirty_data();
        let backing = n.view.backing.as_ref().filter(|_| !n.base_lost);
        Ok(Record {
            path,
            kind: n.kind,
            mode: n.mode,
            uid: n.uid,
            gid: n.gid,
            size: if n.is_dir() { 0 } else { n.size },
            atime: n.atime,
            mtime: n.mtime,
            ctime: n.ctime,
            target: n.target.clone(),
            object: backing.map(|b| Object {
                key: b.key.clone(),
                etag: b.etag.clone(),
                length: b.length,
                valid: b.valid_bytes(),
            }),
            unseen: !n.attrs_complete,
            dirty: n.phase != Phase::Clean && n.id != InodeId::ROOT,
            unstored,
            lost: n.lost,
            listed: n.dir.as_ref().is_some_and(Directory::is_complete),
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

    fn load_root(&mut self, d: &Record) -> FsResult<()> {
        let mut n = self.read().inode(InodeId::ROOT)?;
        (n.mode, n.uid, n.gid) = (d.mode & 0o7777, d.uid, d.gid);
        (n.atime, n.mtime, n.ctime) = (d.atime, d.mtime, d.ctime);
        let was_listed = n.dir.as_ref().is_some_and(Directory::is_complete);
        if let Some(dir) = n.dir.as_mut().filter(|_| d.listed && !was_listed) {
            let incomplete = dir.incomplete.saturating_sub(1);
            let deepest = dir.deepest;
            *dir = Directory { incomplete, deepest, ..Directory::complete(Time(0)) };
        }
        self.save(n)
    }

    /// What the dump says of an inode.
    fn fill(&mut self, n: &mut Inode, d: &Record) -> FsResult<()> {
        (n.atime, n.mtime, n.ctime) = (d.atime, d.mtime, d.ctime);
        n.attrs_complete = !d.unseen;
        n.validated = Time(0);
        n.target.clone_from(&d.target);
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
