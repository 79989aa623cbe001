//! Inodes, names and directories: what a tree is.

use super::{Check, Found, finding, shown};
use crate::Reader;
use crate::counters::Counter;
use crate::dirtiness::Phase;
use crate::inode::Inode;
use crate::kv::KvRead;
use crate::limits::KEY_BYTES_MAX;
use crate::tables::*;
use ebb_dataplane_protocol::{Incarnation, InodeId};
use ebb_metaplane_protocol::FsResult;
use ebb_metaplane_protocol::check::{Repair, Rule};

/// What the entries of a directory say of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Below {
    /// Directories in it.
    pub(crate) directories: u32,
    /// Of its subtree, itself excluded, those that are not completely listed.
    pub(crate) incomplete: u64,
    /// Bytes of the longest key below, relative to it.
    pub(crate) deepest: u32,
}

/// Where an inode is in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Below the root, under its name.
    Named,
    /// Its name does not lead to it.
    Lost,
    /// Its directories lead back to itself, or to nowhere.
    Unreachable,
}

impl<K: KvRead> Reader<'_, K> {
    /// Adds the entries of a directory up.
    pub(crate) fn below(&self, dir: InodeId) -> FsResult<Below> {
        let mut sum = Below::default();
        let mut from = Vec::new();
        loop {
            let page = self.entries_held(dir, &from, super::PAGE)?;
            let Some((last, _)) = page.last() else { return Ok(sum) };
            from.clone_from(last);
            for (name, id) in page {
                let Some(n) = self.find_inode(id)? else { continue };
                let mut length = name.len() as u32;
                if let Some(d) = &n.dir {
                    sum.directories += 1;
                    sum.incomplete += d.incomplete;
                    length += 1 + d.deepest;
                }
                sum.deepest = sum.deepest.max(length);
            }
        }
    }

    pub(crate) fn place(&self, n: &Inode) -> FsResult<Place> {
        if n.id == InodeId::ROOT {
            return Ok(Place::Named);
        }
        let dir = self.find_inode(n.parent)?;
        let is_dir = dir.as_ref().is_some_and(|d| d.is_dir() && d.nlink > 0);
        if !is_dir || self.holder(n.parent, &n.name)? != Some(n.id) {
            return Ok(Place::Lost);
        }
        if !n.is_dir() {
            return Ok(Place::Named);
        }
        let mut at = n.parent;
        for _ in 0..KEY_BYTES_MAX {
            if at == InodeId::ROOT {
                return Ok(Place::Named);
            }
            match self.find_inode(at)? {
                Some(dir) => at = dir.parent,
                None => break,
            }
        }
        Ok(Place::Unreachable)
    }

    /// Whether an inode without a name may stay: somebody has it open, or may have.
    pub(crate) fn may_stay_unnamed(&self, n: &Inode) -> bool {
        n.nlink > 0 || self.is_open(n.id) || self.is_lingering(n.id)
    }

    /// Whether S3 holds what a clean inode says (I3). `moving`: a renamed directory's objects aren't all marked yet.
    pub(crate) fn is_clean_rightly(&self, n: &Inode, moving: bool) -> FsResult<bool> {
        if n.phase != Phase::Clean || n.nlink == 0 || n.id == InodeId::ROOT || n.lost {
            return Ok(true);
        }
        if n.is_dir() && n.view.backing.is_none() {
            // Only names below it, or the mark that somebody else removed, said that it is there.
            return Ok(n.meta_version == n.stored_meta);
        }
        match (&n.view.backing, self.target_key(n)?) {
            (Some(b), Some(key)) => Ok(n.is_settled_at(if moving { &b.key } else { &key })),
            _ => Ok(false),
        }
    }

    /// Whether a flush that is said to be under way has its attempt.
    pub(crate) fn has_attempt(&self, n: &Inode) -> FsResult<bool> {
        let Phase::Flushing(f) = &n.phase else { return Ok(true) };
        let state = self.key_state(&f.key)?;
        Ok(state.and_then(|k| k.attempt).is_some_and(|a| a.nonce == f.nonce))
    }
}

/// Whether an inode is one that other names may be of.
fn may_have_links(n: &Inode) -> bool {
    !n.is_dir() && n.link_of().is_none() && n.nlink > 0
}

impl<K: KvRead> Reader<'_, K> {
    /// How many names a file has.
    pub(crate) fn names_of(&self, n: &Inode) -> FsResult<u32> {
        let mut names = 1;
        for id in self.links(n.id)? {
            names += u32::from(self.find_inode(id)?.is_some_and(|l| l.link_of() == Some(n.id)));
        }
        Ok(names)
    }
}

impl Check {
    pub(super) fn inode<K: KvRead>(
        &mut self,
        r: Reader<'_, K>,
        k: &[u8],
        found: Found<'_>,
    ) -> FsResult<()> {
        let id = InodeId(u64_at(k, 1)?);
        self.counted(k);
        self.checked.inodes += 1;
        let n = r.inode(id)?;
        if n.id != id {
            return Err(corrupt(&format!("inode: it says it is {}", n.id)));
        }
        let incarnation = Incarnation(r.counter(Counter::Incarnation)? as u16);
        if id == InodeId::new(id.shard(), incarnation, id.0 & ((1 << InodeId::COUNTER_BITS) - 1)) {
            self.given(Counter::NextInode, id.0 & ((1 << InodeId::COUNTER_BITS) - 1));
        }
        self.checked.bytes += if n.is_file() { n.size } else { 0 };
        let dirty = n.queued().is_some();
        self.checked.dirty += u64::from(dirty);
        self.count(Counter::DirtyInodes, i64::from(dirty));
        self.count(Counter::UsedBytes, if n.is_file() { n.size as i64 } else { 0 });
        self.count(Counter::LostFiles, i64::from(n.lost));
        let name = shown(&n.name);
        let derive = Repair::Derive(id);

        if n.is_dir() != n.dir.is_some() {
            return Err(corrupt(&format!("inode {id}: its kind and its content differ")));
        }
        if n.nlink > 0 {
            match r.place(&n)? {
                Place::Named => {}
                Place::Lost => {
                    let what = format!("inode {id} has no entry {name} in directory {}", n.parent);
                    found(finding(Rule::Orphan, what, Repair::Orphan(id)));
                }
                Place::Unreachable => {
                    let what = format!("directory {id} {name} is not below the root");
                    found(finding(Rule::Loop, what, Repair::Orphan(id)));
                }
            }
        } else if !r.may_stay_unnamed(&n) {
            let what = format!("inode {id} has no name and is not open");
            found(finding(Rule::Unnamed, what, Repair::Orphan(id)));
        }
        if let Some(file) = n.link_of()
            && !r.find_inode(file)?.is_some_and(|f| may_have_links(&f))
        {
            let what = format!("inode {id} {name} is another name of {file}, which isn't there");
            found(finding(Rule::Links, what, Repair::Orphan(id)));
        }
        if may_have_links(&n) {
            let links = r.names_of(&n)?;
            if n.nlink != links {
                let what = format!("file {id} {name} has {} links and not {links}", n.nlink);
                found(finding(Rule::Links, what, derive.clone()));
            }
        }
        if let Some(d) = &n.dir {
            let below = r.below(id)?;
            let links = 2 + below.directories;
            if n.nlink != links && n.nlink > 0 {
                let what = format!("directory {id} {name} has {} links and not {links}", n.nlink);
                found(finding(Rule::Links, what, derive.clone()));
            }
            let incomplete = below.incomplete + u64::from(!d.is_complete());
            if d.incomplete != incomplete {
                let what =
                    format!("directory {id} {name}: {} not listed, not {incomplete}", d.incomplete);
                found(finding(Rule::Listed, what, derive.clone()));
            }
            if d.deepest < below.deepest {
                let what = format!(
                    "directory {id} {name}: keys of {} bytes, not {}",
                    below.deepest, d.deepest
                );
                found(finding(Rule::Depth, what, derive.clone()));
            }
        }
        for (rule, what) in r.missing(&n)? {
            found(finding(rule, format!("inode {id} {name}: {what}"), derive.clone()));
        }
        if n.generation < n.view.clean_generation {
            let what = format!(
                "inode {id}: generation {} below clean {}",
                n.generation, n.view.clean_generation
            );
            found(finding(Rule::Clean, what, None));
        }
        if !r.is_clean_rightly(&n, self.moves)? {
            let what = format!("inode {id} {name} is clean, and not in S3 under its path");
            found(finding(Rule::Clean, what, Repair::Dirty(id)));
        }
        if !r.has_attempt(&n)? {
            let what = format!("inode {id} {name} is on its way to S3 with no attempt");
            found(finding(Rule::Flush, what, Repair::Flush(id)));
        }
        let told = self.cut.as_ref().is_none_or(|told| told.contains(&id));
        if !n.view.cuts.is_empty() && !told {
            let what = format!("inode {id} {name} was cut, and nobody is told");
            found(finding(Rule::Cut, what, derive));
        }
        Ok(())
    }

    pub(super) fn entry<K: KvRead>(
        &mut self,
        r: Reader<'_, K>,
        (k, v): (&[u8], &[u8]),
        found: Found<'_>,
    ) -> FsResult<()> {
        self.checked.names += 1;
        let (dir, id) = (InodeId(u64_at(k, 1)?), crate::link::holder_in(v)?);
        let name = &k[9..];
        if let Some(why) = r.wrong_name(dir, name, id)? {
            let what = format!("directory {dir} has {} for inode {id}: {why}", shown(name));
            found(finding(Rule::Name, what, Repair::Name(dir, name.to_vec())));
        }
        Ok(())
    }
}

impl<K: KvRead> Reader<'_, K> {
    /// What is wrong with an entry.
    pub(crate) fn wrong_name(
        &self,
        dir: InodeId,
        name: &[u8],
        id: InodeId,
    ) -> FsResult<Option<&'static str>> {
        let Some(d) = self.find_inode(dir)? else { return Ok(Some("there is no such directory")) };
        if !d.is_dir() || d.nlink == 0 {
            return Ok(Some("that is not a directory, or has no name itself"));
        }
        let Some(n) = self.find_inode(id)? else { return Ok(Some("there is no such inode")) };
        if n.nlink == 0 || id == InodeId::ROOT {
            return Ok(Some("it has no name"));
        }
        if self.entry(dir, name)? != Some(n.file_id()) {
            return Ok(Some("it shows another file"));
        }
        let agrees = n.parent == dir && n.name == name;
        Ok((!agrees).then_some("it has another name"))
    }
}
