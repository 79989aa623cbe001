//! Directories: entries, names, paths, and the S3 keys that follow from them.
//!
//! key == path: a file's key is its path, a directory's marker ends in `/`. A directory knows how
//! far its prefix was listed ([`Origin`]); one made by mkdir is complete from the start.

use crate::Reader;
use crate::counters::Counter;
use crate::inode::{Inode, Loaded};
use crate::kv::{Kv, KvRead};
use crate::limits::KEY_BYTES_MAX;
use crate::tables::*;
use ebb_dataplane_protocol::{InodeId, NAME_BYTES_MAX, SessionId};
use ebb_metaplane_protocol::{Attr, FsError, FsResult, Time};
use rkyv::{Archive, Deserialize, Serialize};

/// The reserved name in the root.
pub(crate) const RESERVED: &[u8] = b".ebb";

/// How much of a directory's prefix was listed.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Origin {
    /// All of it: what has no entry is not there.
    Complete,
    /// Up to this start-after token (empty: nothing yet).
    Listing {
        /// Where the next page goes on.
        continuation: String,
    },
}

/// What a directory's inode carries beside the attributes.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) struct Directory {
    pub(crate) origin: Origin,
    /// When it became completely listed.
    pub(crate) listed: Time,
    /// Directories not completely listed in this subtree, itself included: a rename needs zero.
    pub(crate) incomplete: u64,
    /// Upper bound of the bytes of any key below, relative to this directory: a rename must not
    /// make a key too long.
    pub(crate) deepest: u32,
    /// The session that alone names things here, while it lives, and the delegation's stamp
    /// ([`crate::delegation`]).
    pub(crate) delegation: Option<(SessionId, u64)>,
}

impl Directory {
    pub(crate) fn complete(now: Time) -> Self {
        Self { origin: Origin::Complete, listed: now, incomplete: 0, deepest: 0, delegation: None }
    }
    pub(crate) fn is_complete(&self) -> bool {
        matches!(self.origin, Origin::Complete)
    }
    pub(crate) fn listing() -> Self {
        let origin = Origin::Listing { continuation: String::new() };
        Self { origin, listed: Time(0), incomplete: 1, deepest: 0, delegation: None }
    }
}

/// What the leader knows of a name without asking S3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LookupState {
    /// It is there.
    Found {
        /// Attributes; defaults if `needs_attrs`.
        attr: Attr,
        /// A HEAD of the object is due first (`SetIngestAttrs`).
        needs_attrs: bool,
    },
    /// It is not there.
    Absent,
    /// The directory is not completely listed: HEAD the one, LIST under the other.
    AskS3 {
        /// Key of a file of this name.
        file_key: String,
        /// Prefix (and marker key) of a directory of this name.
        dir_key: String,
    },
}

/// Whether `name` may be created in `dir`.
pub(crate) fn check_name(dir: InodeId, name: &[u8]) -> FsResult<()> {
    if name.len() > NAME_BYTES_MAX {
        return Err(FsError::NameTooLong);
    }
    if name.is_empty() || name == b"." || name == b".." {
        return Err(FsError::Invalid("not a name".into()));
    }
    if name.contains(&b'/') || name.contains(&0) || std::str::from_utf8(name).is_err() {
        return Err(FsError::Invalid("names are UTF-8 without '/' and NUL".into()));
    }
    if dir == InodeId::ROOT && name == RESERVED {
        return Err(FsError::NotPermitted(".ebb is reserved".into()));
    }
    Ok(())
}

/// The temporary key of an inode.
pub(crate) fn temporary_key(inode: InodeId) -> String {
    format!(".ebb/tmp/{:016x}", inode.0)
}

impl<K: KvRead> Reader<'_, K> {
    /// The inode that a name shows.
    pub(crate) fn entry(&self, dir: InodeId, name: &[u8]) -> FsResult<Option<InodeId>> {
        match self.0.get(&key(ENTRY, &[&be(dir.0), name])) {
            None => Ok(None),
            Some(v) => Ok(Some(InodeId(u64_at(&v, 0)?))),
        }
    }

    /// Whether a directory is completely listed and has no name: who made it knows all of it (R40).
    pub fn is_empty_for_sure(&self, dir: InodeId) -> FsResult<bool> {
        let n = self.find_inode(dir)?;
        let complete = n.is_some_and(|n| n.dir.as_ref().is_some_and(Directory::is_complete));
        Ok(complete && !self.has_entries(dir))
    }

    /// How often a name came into a completely listed directory by another way than a client's
    /// operation: from the bucket, or as the other half of a conflict.
    pub fn names_brought(&self) -> FsResult<u64> {
        self.counter(Counter::NamesBrought)
    }

    pub(crate) fn has_entries(&self, dir: InodeId) -> bool {
        self.any_with_prefix(&key(ENTRY, &[&be(dir.0)]))
    }

    /// Entries in name order after `after_name` (empty: from the start), each with the inode that it shows.
    pub fn entries(
        &self,
        dir: InodeId,
        after_name: &[u8],
        limit: usize,
    ) -> FsResult<Vec<(Vec<u8>, InodeId)>> {
        let shown = |v: &[u8]| u64_at(v, 0).map(InodeId);
        self.entries_by(dir, (after_name, limit), shown)
    }

    /// The same, each with the inode whose own name it is.
    pub fn entries_held(
        &self,
        dir: InodeId,
        after_name: &[u8],
        limit: usize,
    ) -> FsResult<Vec<(Vec<u8>, InodeId)>> {
        self.entries_by(dir, (after_name, limit), crate::link::holder_in)
    }

    fn entries_by(
        &self,
        dir: InodeId,
        (after_name, limit): (&[u8], usize),
        inode: impl Fn(&[u8]) -> FsResult<InodeId>,
    ) -> FsResult<Vec<(Vec<u8>, InodeId)>> {
        let prefix = key(ENTRY, &[&be(dir.0)]);
        let from = if after_name.is_empty() {
            prefix.clone()
        } else {
            after(&key(ENTRY, &[&be(dir.0), after_name]))
        };
        self.scan_prefix(&prefix, Some(&from), limit)
            .into_iter()
            .map(|(k, v)| Ok((k[prefix.len()..].to_vec(), inode(&v)?)))
            .collect()
    }

    /// Components of an inode's path. For an unlinked one: of the name it had last.
    pub fn path_of(&self, inode: InodeId) -> FsResult<Vec<Vec<u8>>> {
        let mut path = Vec::new();
        let mut at = inode;
        while at != InodeId::ROOT {
            let n = self.inode(at)?;
            path.push(n.name.clone());
            at = n.parent;
            if path.len() > KEY_BYTES_MAX {
                return Err(corrupt("path: a cycle of directories"));
            }
        }
        path.reverse();
        Ok(path)
    }

    /// The prefix of a directory's keys: empty for the root, else ending in `/`.
    pub(crate) fn prefix_of(&self, dir: InodeId) -> FsResult<String> {
        let mut prefix = String::new();
        for name in self.path_of(dir)? {
            prefix.push_str(std::str::from_utf8(&name).map_err(|_| corrupt("name"))?);
            prefix.push('/');
        }
        Ok(prefix)
    }

    pub(crate) fn key_in(&self, prefix: &str, name: &[u8], is_dir: bool) -> FsResult<String> {
        let name = std::str::from_utf8(name).map_err(|_| corrupt("name"))?;
        Ok(format!("{prefix}{name}{}", if is_dir { "/" } else { "" }))
    }

    /// The key that an inode's path names. `None`: the root, or it has no name any more.
    pub fn key_of(&self, inode: InodeId) -> FsResult<Option<String>> {
        let n = self.inode(inode)?;
        self.target_key(&n)
    }

    pub(crate) fn target_key(&self, n: &crate::inode::Inode) -> FsResult<Option<String>> {
        if n.id == InodeId::ROOT || n.nlink == 0 {
            return Ok(None);
        }
        Ok(Some(self.key_in(&self.prefix_of(n.parent)?, &n.name, n.is_dir())?))
    }

    /// The inode whose own path names `s3_key`.
    pub(crate) fn inode_at_key(&self, s3_key: &str) -> FsResult<Option<InodeId>> {
        let (path, wants_dir) = match s3_key.strip_suffix('/') {
            Some(p) => (p, true),
            None => (s3_key, false),
        };
        let mut at = InodeId::ROOT;
        for name in path.split('/') {
            match self.holder(at, name.as_bytes())? {
                Some(next) => at = next,
                None => return Ok(None),
            }
        }
        let Some(n) = self.find_inode(at)? else { return Ok(None) };
        Ok((n.is_dir() == wants_dir).then_some(at))
    }

    /// Checks that keys `below` bytes long under `dir` fit S3's limit.
    pub(crate) fn check_key_length(&self, dir: InodeId, below: usize) -> FsResult<()> {
        if self.prefix_of(dir)?.len() + below > KEY_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        Ok(())
    }

    /// How far a directory was listed, and the prefix of its keys.
    pub fn directory_origin(&self, dir: InodeId) -> FsResult<(String, Origin)> {
        let n = self.dir_inode(dir)?;
        let origin = n.dir.as_ref().map_or(Origin::Complete, |d| d.origin.clone());
        Ok((self.prefix_of(dir)?, origin))
    }

    /// When a directory became completely listed; `None`: it isn't.
    pub fn listed(&self, dir: InodeId) -> FsResult<Option<Time>> {
        let n = self.dir_inode(dir)?;
        Ok(n.dir.as_ref().filter(|d| d.origin == Origin::Complete).map(|d| d.listed))
    }

    /// Keys that a name has in S3: of a file, of a directory.
    pub fn s3_names(&self, parent: InodeId, name: &[u8]) -> FsResult<(String, String)> {
        check_name(parent, name)?;
        let prefix = self.prefix_of(parent)?;
        Ok((self.key_in(&prefix, name, false)?, self.key_in(&prefix, name, true)?))
    }

    /// Whether a name is there, or S3 must be asked first.
    pub fn lookup_state(&self, parent: InodeId, name: &[u8]) -> FsResult<LookupState> {
        let dir = self.dir_inode(parent)?;
        self.lookup_in(&dir, name)
    }

    /// The same for a session, and who else knows the directory's names better.
    pub fn lookup_for(
        &self,
        session: SessionId,
        parent: InodeId,
        name: &[u8],
    ) -> FsResult<(LookupState, Option<SessionId>)> {
        let dir = self.dir_inode(parent)?;
        Ok((self.lookup_in(&dir, name)?, self.holder_besides(&dir, session)?))
    }

    fn lookup_in(&self, dir: &Inode, name: &[u8]) -> FsResult<LookupState> {
        let parent = dir.id;
        if name.len() > NAME_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        if let Some(id) = self.entry(parent, name)? {
            let n = self.inode(id)?;
            return Ok(LookupState::Found { attr: n.attr(), needs_attrs: !n.attrs_complete });
        }
        let listed = dir.dir.as_ref().is_none_or(|d| match &d.origin {
            Origin::Complete => true,
            // Pages come in key order and a continuation is a start-after key, but the mark of a
            // directory sorts behind some longer names: only completeness is a safe "no".
            Origin::Listing { .. } => false,
        });
        if listed || check_name(parent, name).is_err() {
            return Ok(LookupState::Absent);
        }
        let (file_key, dir_key) = self.s3_names(parent, name)?;
        Ok(LookupState::AskS3 { file_key, dir_key })
    }

    /// Directories of a subtree that are not completely listed, at most `limit`.
    pub fn incomplete_under(&self, root: InodeId, limit: usize) -> FsResult<Vec<InodeId>> {
        let mut found = Vec::new();
        let mut stack = vec![root];
        while let Some(at) = stack.pop() {
            let Some(n) = self.find_inode(at)? else { continue };
            let Some(d) = &n.dir else { continue };
            if d.incomplete == 0 {
                continue;
            }
            if d.origin != Origin::Complete {
                found.push(at);
                if found.len() >= limit {
                    break;
                }
            }
            // Only children that are directories can hold incomplete ones.
            let mut from = Vec::new();
            loop {
                let page = self.entries(at, &from, 1000)?;
                let Some((last, _)) = page.last() else { break };
                from = last.clone();
                stack.extend(page.into_iter().map(|(_, id)| id));
            }
        }
        Ok(found)
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// A name came by another way than a client's operation.
    pub(crate) fn brought(&mut self, dir: InodeId) -> FsResult<()> {
        let n = self.read().inode(dir)?;
        if n.dir.as_ref().is_some_and(Directory::is_complete) {
            self.add(Counter::NamesBrought, 1)?;
        }
        Ok(())
    }

    pub(crate) fn put_entry(&mut self, dir: InodeId, name: &[u8], inode: InodeId) {
        self.kv.put(&key(ENTRY, &[&be(dir.0), name]), &be(inode.0));
    }
    pub(crate) fn delete_entry(&mut self, dir: InodeId, name: &[u8]) {
        self.kv.delete(&key(ENTRY, &[&be(dir.0), name]));
    }

    /// Changes one inode: load, change, save.
    pub(crate) fn update(&mut self, id: InodeId, change: impl FnOnce(&mut Loaded)) -> FsResult<()> {
        let mut n = self.read().inode(id)?;
        change(&mut n);
        self.save(n)
    }

    /// A directory's entries changed: its times, and its links by `subdirs`.
    pub(crate) fn touch_dir(&mut self, dir: InodeId, subdirs: i32) -> FsResult<()> {
        let now = self.now;
        self.update(dir, |d| {
            d.nlink = d.nlink.saturating_add_signed(subdirs);
            d.mtime = now;
            d.changed(now);
        })
    }

    /// Adds to the count of incomplete directories from `dir` up to the root.
    pub(crate) fn add_incomplete(&mut self, dir: InodeId, by: i64) -> FsResult<()> {
        self.walk_up(dir, |d| {
            d.incomplete = d.incomplete.saturating_add_signed(by);
            by != 0
        })
    }

    /// Tells the ancestors of an entry in `dir` how long the keys below are.
    pub(crate) fn note_depth(&mut self, dir: InodeId, below: usize) -> FsResult<()> {
        let mut depth = below as u32;
        let mut at = dir;
        loop {
            let mut n = self.read().inode(at)?;
            let (name, parent) = (n.name.len() as u32, n.parent);
            let Some(d) = &mut n.dir else { return Ok(()) };
            if d.deepest >= depth {
                return Ok(());
            }
            d.deepest = depth;
            self.save(n)?;
            if at == InodeId::ROOT {
                return Ok(());
            }
            depth += name + 1;
            at = parent;
        }
    }

    /// Applies `change` to a directory and its ancestors while it returns true.
    fn walk_up(
        &mut self,
        from: InodeId,
        mut change: impl FnMut(&mut Directory) -> bool,
    ) -> FsResult<()> {
        let mut at = from;
        loop {
            let mut n = self.read().inode(at)?;
            let parent = n.parent;
            let Some(d) = &mut n.dir else { return Ok(()) };
            let go_on = change(d);
            self.save(n)?;
            if !go_on || at == InodeId::ROOT {
                return Ok(());
            }
            at = parent;
        }
    }
}
