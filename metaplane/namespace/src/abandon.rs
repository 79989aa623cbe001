//! `ebb node abandon`: a node with the only copy of something will never come back (PROTOCOL R24).
//!
//! A file of which the node may have the only copy of a byte can't be put together any more, and nothing is made up (I4).
//! It is given up whole, also what other nodes hold of it: under its name there is a new inode, which is either the last object
//! that S3 confirmed, as it was, or, if there never was one, *lost*: every open of it is an error until it is removed, or
//! truncated to nothing by who opens it. Handles of the old inode are stale. Objects in S3 are left alone.
//! When nothing is left to be lost the node leaves the map, and its store may not come back.

use crate::Reader;
use crate::counters::Counter;
use crate::dirtiness::Phase;
use crate::handle::Handle;
use crate::inode::{Inode, Loaded};
use crate::kv::{Kv, KvRead};
use crate::members::Members;
use crate::tables::*;
use ebb_dataplane_protocol::{
    HandleId, InodeId, Lineage, MapVersion, NodeId, PgEpoch, PgId, SessionId,
};
use ebb_metaplane_protocol::flush::{IngestAttrs, IngestObject, More, Notice};
use ebb_metaplane_protocol::{FileKind, FsError, FsResult};

/// A file that would be given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenUp {
    /// The inode.
    pub inode: InodeId,
    /// It has a name.
    pub named: bool,
    /// Its size, as far as its writers said.
    pub size: u64,
    /// Bytes of its last object in S3; `None`: it has none.
    pub stored: Option<u64>,
}

/// Why a lost file is not opened.
pub(crate) fn lost() -> FsError {
    FsError::Io("its data was lost with a data node: remove or overwrite it".into())
}

/// What a file goes back to.
fn base_of(n: &Inode) -> Option<&ebb_dataplane_protocol::Backing> {
    n.view.backing.as_ref().filter(|_| !n.base_lost)
}

impl<K: KvRead> Reader<'_, K> {
    /// What giving an inode up means; `None`: it is gone.
    pub fn given_up(&self, inode: InodeId) -> FsResult<Option<GivenUp>> {
        Ok(self.find_inode(inode)?.map(|n| GivenUp {
            inode,
            named: n.nlink > 0,
            size: n.size,
            stored: base_of(&n).map(|b| b.length),
        }))
    }

    /// Whether a store was abandoned.
    pub(crate) fn is_abandoned(&self, store: u128) -> bool {
        self.0.get(&key(ABANDONED, &[&store.to_be_bytes()])).is_some()
    }

    /// Groups of which a node has the only copy. Of others, an in-sync member has all that it has.
    fn groups_held(&self, node: NodeId) -> FsResult<Vec<PgId>> {
        Ok(self.map()?.only_on(node).map(|(pg, _)| pg).collect())
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// Gives up those of the inodes of which `node`, cut off at `cut_off`, may have the only copy. One whose object is on its way
    /// to S3 is left until that is settled.
    pub(crate) fn abandon_inodes(
        &mut self,
        node: NodeId,
        cut_off: u64,
        inodes: &[InodeId],
    ) -> FsResult<()> {
        let groups = self.read().groups_held(node)?;
        for &id in inodes {
            let mut held = false;
            for pg in &groups {
                held |= self.read().is_held(*pg, id, cut_off)?;
            }
            if held {
                self.give_up_inode(id)?;
            }
        }
        Ok(())
    }

    fn give_up_inode(&mut self, id: InodeId) -> FsResult<()> {
        let Some(mut n) = self.read().find_inode(id)? else { return Ok(()) };
        if matches!(n.phase, Phase::Flushing(_)) {
            return Ok(());
        }
        let named = n.nlink > 0;
        self.close_all(id)?;
        if !named {
            // The last handle may have taken it along.
            return match self.read().find_inode(id)? {
                Some(n) => self.remove_inode(n),
                None => Ok(()),
            };
        }
        let (parent, name) = (n.parent, n.name.clone());
        let (owner, size, times) = ((n.mode(), n.uid, n.gid), n.size, (n.atime, n.mtime));
        let xattrs = self.read().xattrs(&n)?;
        let base = base_of(&n).cloned();
        let alloc_limit = n.reach();
        let linked = n.has_links();
        if let Some(b) = n.view.backing.take() {
            // Its object stays: either the new inode has it, or it is a stranger's.
            self.disown(&b.key, id)?;
        }
        self.erase(n)?;
        self.notify(Notice::Drop { inode: id, alloc_limit })?;
        let new = match base {
            Some(b) => {
                let attrs = IngestAttrs {
                    kind: FileKind::File,
                    mode: owner.0,
                    uid: owner.1,
                    gid: owner.2,
                    mtime: times.1,
                    more: More::None,
                    // As they were when that object was stored: its HEAD says.
                    complete: false,
                };
                let object = IngestObject { key: b.key.clone(), etag: b.etag, size: b.length };
                let new = self.create_found(parent, &name, Some(&object), &attrs)?;
                let n = self.read().inode(new)?;
                if self.read().target_key(&n)?.as_deref() != Some(&b.key) {
                    let now = self.now;
                    self.update(new, |n| n.mark_dirty(now))?;
                }
                new
            }
            None => {
                let new = self.new_inode_id(parent, FileKind::File)?;
                let mut n = Inode::new(new, FileKind::File, (parent, &name), owner, self.now);
                (n.size, n.atime, n.mtime) = (size, times.0, times.1);
                n.lost = true;
                self.put_xattrs(&mut n, &xattrs);
                self.save(Loaded::created(n))?;
                self.put_entry(parent, &name, new);
                self.brought(parent)?;
                new
            }
        };
        if linked {
            self.relink(id, new)?;
        }
        self.touch_dir(parent, 0)
    }

    /// Every handle of an inode ends, whoever has it.
    fn close_all(&mut self, inode: InodeId) -> FsResult<()> {
        let prefix = key(OPEN, &[&be(inode.0)]);
        loop {
            let page = self.read().scan_prefix(&prefix, None, 1024);
            if page.is_empty() {
                return Ok(());
            }
            for (k, v) in page {
                let (handle, session) = (HandleId(u64_at(&k, 9)?), SessionId(u64_at(&v, 0)?));
                let h = Handle { session, inode, lineage: Lineage::default(), write: false };
                self.close_handle(handle, &h)?;
            }
        }
    }

    /// The node is gone for good: nobody holds its groups, its store is refused from now on. Refused itself while it may have
    /// the only copy of anything.
    pub(crate) fn remove_node(&mut self, node: NodeId, cut_off: u64) -> FsResult<()> {
        let mut map = self.read().map()?;
        let Some(at) = map.nodes.iter().position(|n| n.id == node) else { return Ok(()) };
        let groups = self.read().groups_held(node)?;
        for pg in &groups {
            if !self.read().may_stand_in(*pg, cut_off)? {
                return Err(FsError::Invalid(format!(
                    "node {node} may have the only copy of files in group {pg}"
                )));
            }
        }
        let store = map.nodes.remove(at).store;
        map.version = MapVersion(map.version.0 + 1);
        let version = map.version;
        for pg in &groups {
            let Some(entry) = map.pgs.get_mut(usize::from(pg.0)) else { continue };
            entry.epoch = PgEpoch(entry.epoch.0 + 1);
            entry.members.clear();
            entry.syncing.clear();
            entry.since_map_version = version;
            entry.moving = false;
            entry.windows_since = entry.epoch;
        }
        for entry in &mut map.pgs {
            entry.leave(node, version);
        }
        self.put_map(&map);
        self.kv.put(&key(ABANDONED, &[&store.to_be_bytes()]), &be(u64::from(node.0)));
        self.kv.delete(&key(NODE_BOOT, &[&be(u64::from(node.0))]));
        Ok(())
    }
}

impl Inode {
    /// A lost file is an error for whoever wants to know what is in it.
    pub(crate) fn refuse_if_lost(&self) -> FsResult<()> {
        if self.lost { Err(lost()) } else { Ok(()) }
    }
}

impl<K: KvRead> Reader<'_, K> {
    /// Files whose data was lost with a node.
    pub(crate) fn lost_files(&self) -> FsResult<u64> {
        self.counter(Counter::LostFiles)
    }
}
