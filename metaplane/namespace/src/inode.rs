//! The inode record, and how it is loaded and saved.
//!
//! Saving keeps the dirty queue and the counters in step with the record, so no caller can forget:
//! an inode is in the queue exactly when S3 does not hold it yet (I2) and it still has a name, or
//! while a flush of it runs; and in its groups' tables while nodes may hold bytes that S3 does not ([`crate::held`]).

use crate::Reader;
use crate::counters::Counter;
use crate::directory::Directory;
use crate::dirtiness::Phase;
use crate::kv::{Kv, KvRead};
use crate::tables::*;
use ebb_dataplane_protocol::{codec, *};
use ebb_metaplane_protocol::op::Name;
use ebb_metaplane_protocol::{Attr, FileKind, FsError, FsResult, Time};
use rkyv::{Archive, Deserialize, Serialize};
use std::ops::{Deref, DerefMut};

/// Beside the permission bits: the inode has a record of extended attributes ([`crate::xattr`]).
const HAS_XATTRS: u32 = 1 << 31;

/// An inode.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) struct Inode {
    pub(crate) id: InodeId,
    pub(crate) kind: FileKind,
    /// Permission bits, and [`HAS_XATTRS`].
    mode_and_flags: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) nlink: u32,
    pub(crate) size: u64,
    pub(crate) atime: Time,
    pub(crate) mtime: Time,
    pub(crate) ctime: Time,
    /// The directory of its one name (the last one, once unlinked).
    pub(crate) parent: InodeId,
    pub(crate) name: Name,
    /// False: only a LIST was seen; a HEAD is due before anyone sees or stores the attributes.
    pub(crate) attrs_complete: bool,
    /// Counts changes of what goes into the object's metadata.
    pub(crate) meta_version: u64,
    /// `meta_version` of what S3 holds.
    pub(crate) stored_meta: u64,
    /// The highest generation granted or begun.
    pub(crate) generation: Generation,
    /// Generations up to this one were sealed or fenced: never granted again (I5).
    pub(crate) sealed_floor: Generation,
    pub(crate) phase: Phase,
    /// When it left Clean.
    pub(crate) dirty_since: Time,
    pub(crate) view: FileView,
    /// Bounds writes; 0: never written by us, no node holds dirty data of it.
    pub(crate) alloc_limit: u64,
    /// Cuts, also acked ones, that clip late commits.
    pub(crate) clips: Vec<Cut>,
    /// When S3 was last asked about it.
    pub(crate) validated: Time,
    /// What its backing names is not there any more, and some of it is needed (R36).
    pub(crate) base_lost: bool,
    /// Its data was lost with a node that was abandoned: it is not opened (see [`crate::abandon`]).
    pub(crate) lost: bool,
    /// Target of a symbolic link. Of another name of a file ([`crate::link`]), that file's number, big-endian; of a
    /// file that was found with several names, what the objects of all of them say.
    pub(crate) target: Vec<u8>,
    /// Of directories.
    pub(crate) dir: Option<Directory>,
}

impl Inode {
    /// An inode without a history.
    pub(crate) fn new(
        id: InodeId,
        kind: FileKind,
        (parent, name): (InodeId, &[u8]),
        (mode, uid, gid): (u32, u32, u32),
        now: Time,
    ) -> Self {
        Self {
            id,
            kind,
            mode_and_flags: mode & 0o7777,
            uid,
            gid,
            nlink: if kind == FileKind::Directory { 2 } else { 1 },
            size: 0,
            atime: now,
            mtime: now,
            ctime: now,
            parent,
            name: name.to_vec(),
            attrs_complete: true,
            meta_version: 1,
            stored_meta: 0,
            generation: Generation(0),
            sealed_floor: Generation(0),
            phase: Phase::Clean,
            dirty_since: now,
            view: FileView {
                version: ViewVersion(1),
                content: ContentId(0),
                lineage: Lineage(1),
                ..FileView::default()
            },
            alloc_limit: 0,
            clips: Vec::new(),
            validated: now,
            base_lost: false,
            lost: false,
            target: Vec::new(),
            dir: (kind == FileKind::Directory).then(|| Directory::complete(now)),
        }
    }

    pub(crate) fn is_dir(&self) -> bool {
        self.kind == FileKind::Directory
    }
    pub(crate) fn is_file(&self) -> bool {
        self.kind == FileKind::File
    }

    /// Permission bits.
    pub(crate) fn mode(&self) -> u32 {
        self.mode_and_flags & 0o7777
    }
    pub(crate) fn set_mode(&mut self, mode: u32) {
        self.mode_and_flags = (self.mode_and_flags & !0o7777) | (mode & 0o7777);
    }
    pub(crate) fn has_xattrs(&self) -> bool {
        self.mode_and_flags & HAS_XATTRS != 0
    }
    pub(crate) fn set_has_xattrs(&mut self, has: bool) {
        self.mode_and_flags &= !HAS_XATTRS;
        self.mode_and_flags |= if has { HAS_XATTRS } else { 0 };
    }

    pub(crate) fn attr(&self) -> Attr {
        Attr {
            inode: self.id,
            kind: self.kind,
            mode: self.mode(),
            uid: self.uid,
            gid: self.gid,
            nlink: self.nlink,
            size: self.size,
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            generation: self.generation,
            content: self.view.content,
            lineage: self.view.lineage,
            dirty: self.queued().is_some(),
            xattrs: self.has_xattrs(),
        }
    }

    /// Names what its next object holds.
    pub(crate) fn next_content(&self) -> ContentId {
        ContentId(self.view.content.0 + 1)
    }

    /// Its place in the dirty queue.
    pub(crate) fn queued(&self) -> Option<(Time, u8)> {
        let flushing = matches!(self.phase, Phase::Sealing(_) | Phase::Flushing(_));
        let waiting = self.nlink > 0 && self.phase == Phase::Dirty;
        (flushing || waiting).then(|| (self.dirty_since, self.phase.stage()))
    }

    /// Bytes that a node may hold of it: bounds notices.
    pub(crate) fn reach(&self) -> u64 {
        self.alloc_limit.max(self.view.backing.as_ref().map_or(0, |b| b.length))
    }

    /// Bytes of regular files count as used.
    fn used(&self) -> u64 {
        if self.is_file() { self.size } else { 0 }
    }
}

/// A loaded inode and what the queue and the counters know of it.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    inode: Inode,
    queued: Option<(Time, u8)>,
    used: u64,
    held: Option<u64>,
    lost: bool,
    is_new: bool,
}

impl Loaded {
    pub(crate) fn created(inode: Inode) -> Self {
        Self { inode, queued: None, used: 0, held: None, lost: false, is_new: true }
    }
}
impl Deref for Loaded {
    type Target = Inode;
    fn deref(&self) -> &Inode {
        &self.inode
    }
}
impl DerefMut for Loaded {
    fn deref_mut(&mut self) -> &mut Inode {
        &mut self.inode
    }
}

impl<K: KvRead> Reader<'_, K> {
    pub(crate) fn find_inode(&self, id: InodeId) -> FsResult<Option<Loaded>> {
        let Some(bytes) = self.0.get(&key(INODE, &[&be(id.0)])) else { return Ok(None) };
        let inode: Inode = codec::decode(&bytes).map_err(|_| corrupt("inode"))?;
        Ok(Some(Loaded {
            queued: inode.queued(),
            used: inode.used(),
            held: inode.held(),
            lost: inode.lost,
            is_new: false,
            inode,
        }))
    }
    /// The inode, or ESTALE.
    pub(crate) fn inode(&self, id: InodeId) -> FsResult<Loaded> {
        self.find_inode(id)?.ok_or(FsError::Stale)
    }
    /// The inode of a directory that still has a name.
    pub(crate) fn dir_inode(&self, id: InodeId) -> FsResult<Loaded> {
        let dir = self.inode(id)?;
        if !dir.is_dir() {
            return Err(FsError::NotDirectory);
        }
        Ok(dir)
    }
    /// The inode of a regular file.
    pub(crate) fn file_inode(&self, id: InodeId) -> FsResult<Loaded> {
        let file = self.inode(id)?;
        match file.kind {
            FileKind::File => Ok(file),
            FileKind::Directory => Err(FsError::IsDirectory),
            FileKind::HardLink => Err(FsError::Stale),
            FileKind::Symlink => Err(FsError::Invalid("a symbolic link is not opened".into())),
        }
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// An unused inode id: a file's shard is its parent's, a directory's spreads.
    pub(crate) fn new_inode_id(&mut self, parent: InodeId, kind: FileKind) -> FsResult<InodeId> {
        let n = self.next(Counter::NextInode)?;
        if n >= 1 << InodeId::COUNTER_BITS {
            return Err(FsError::NoSpace);
        }
        let incarnation = Incarnation(self.read().counter(Counter::Incarnation)? as u16);
        let shard = match kind {
            FileKind::Directory => (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52) as u16,
            _ => parent.shard(),
        };
        Ok(InodeId::new(shard, incarnation, n))
    }

    pub(crate) fn save(&mut self, n: Loaded) -> FsResult<()> {
        let Loaded { inode, queued, used, held, lost, is_new } = n;
        debug_assert!(inode.generation >= inode.view.clean_generation);
        let id = be(inode.id.0);
        let now_queued = inode.queued();
        if queued != now_queued {
            if let Some((since, _)) = queued {
                self.kv.delete(&key(DIRTY, &[&be_time(since), &id]));
            }
            if let Some((since, stage)) = now_queued {
                self.kv.put(&key(DIRTY, &[&be_time(since), &id]), &[stage]);
            }
            self.add(
                Counter::DirtyInodes,
                i64::from(now_queued.is_some()) - i64::from(queued.is_some()),
            )?;
        }
        self.note_held(inode.id, held, inode.held())?;
        if inode.lost != lost {
            self.add(Counter::LostFiles, i64::from(inode.lost) - i64::from(lost))?;
        }
        if inode.used() != used {
            self.add(Counter::UsedBytes, (inode.used() as i64).wrapping_sub(used as i64))?;
        }
        if is_new {
            self.add(Counter::Inodes, 1)?;
        }
        self.kv.put(&key(INODE, &[&id]), &codec::encode(&inode));
        Ok(())
    }

    /// Forgets an inode: record, queue, counters.
    pub(crate) fn erase(&mut self, mut n: Loaded) -> FsResult<()> {
        let id = be(n.id.0);
        if let Some((since, _)) = n.queued {
            self.kv.delete(&key(DIRTY, &[&be_time(since), &id]));
            self.add(Counter::DirtyInodes, -1)?;
        }
        self.note_held(n.inode.id, n.held, None)?;
        self.add(Counter::LostFiles, -i64::from(n.lost))?;
        self.add(Counter::UsedBytes, (n.used as i64).wrapping_neg())?;
        self.add(Counter::Inodes, -1)?;
        if let Some(file) = n.inode.link_of() {
            self.kv.delete(&key(LINK, &[&be(file.0), &id]));
        }
        self.unjoin(&mut n.inode);
        if n.has_xattrs() {
            self.kv.delete(&key(XATTR, &[&id]));
        }
        if n.nlink == 0 {
            self.kv.delete(&key(LINGERING, &[&id]));
        }
        self.kv.delete(&key(INODE, &[&id]));
        Ok(())
    }
}
