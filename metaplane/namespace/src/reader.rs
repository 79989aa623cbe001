//! What the leader's workers ask of the state: the dirty queue, flushes left over by a dead leader,
//! revalidation, counts. (Keys: `key_work`; notices: `notices`; names: `lookup_state`,
//! `directory_origin`, `path_of`, `key_of`; sessions: `expired_sessions`; grants: `grant_view`.)

use crate::counters::Counter;
use crate::dirtiness::Phase;
use crate::kv::KvRead;
use crate::moves::Walk;
use crate::tables::*;
use ebb_dataplane_protocol::{Generation, InodeId, Lineage};
use ebb_metaplane_protocol::{Attr, FsResult, Time};

/// Reads of a store.
#[derive(Debug)]
pub struct Reader<'a, K>(pub &'a K);

impl<K> Clone for Reader<'_, K> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<K> Copy for Reader<'_, K> {}

/// Where a flush is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushStage {
    /// Waits to be flushed.
    Dirty,
    /// `FlushBegin` was committed, `FlushSealed` or `FlushAbort` is due.
    Sealing(Generation),
    /// A plan was made; the result of this nonce is due (`FlushCommit`, or `KeyDone` after a
    /// look-up).
    Flushing(Generation, u128),
}

/// An inode of the dirty queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyInode {
    /// The inode.
    pub inode: InodeId,
    /// Since when.
    pub since: Time,
    /// How far it is.
    pub stage: FlushStage,
    /// A HEAD (`SetIngestAttrs`) is due before it can be flushed.
    pub needs_attrs: bool,
    /// Its cuts are not acked yet: `FlushBegin` skips it until `NoticesDone`.
    pub cuts_pending: bool,
}

/// What to compare with S3 at an open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revalidation {
    /// Key.
    pub key: String,
    /// Etag it should have.
    pub etag: String,
    /// When S3 was last asked.
    pub validated: Time,
    /// For [`ebb_metaplane_protocol::flush::Adopt::lineage`].
    pub lineage: Lineage,
}

/// Counts for the status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MachineCounts {
    /// Inodes known.
    pub inodes: u64,
    /// Bytes of files.
    pub used_bytes: u64,
    /// Inodes that S3 does not hold yet.
    pub dirty_inodes: u64,
    /// The oldest of them.
    pub dirty_oldest: Option<Time>,
    /// Deletes and look-ups due.
    pub pending_keys: u64,
    /// Notices not yet acked.
    pub notices: u64,
    /// Directory renames whose walk is not done.
    pub moves: u64,
    /// Live sessions.
    pub sessions: u64,
    /// Wanted nodes.
    pub desired_nodes: u32,
    /// The last wish that was not zero.
    pub wake_nodes: u32,
    /// Going down.
    pub shutting_down: bool,
    /// Files whose data an abandoned node took along.
    pub lost_files: u64,
}

/// See [`Reader::left`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// As in [`MachineCounts`].
    pub pending_keys: u64,
    /// As there.
    pub notices: u64,
    /// As there.
    pub moves: u64,
    /// Whether there are files without a name that may be open without a handle: 1.
    pub lingering: u64,
}

impl<K: KvRead> Reader<'_, K> {
    /// The machine's sequence: `Ingest::listed_at` is its value when the S3 call began.
    pub fn sequence(&self) -> FsResult<u64> {
        self.counter(Counter::Sequence)
    }

    /// The highest time stamped so far.
    pub fn clock(&self) -> FsResult<Time> {
        Ok(Time(self.counter(Counter::Clock)? as i64))
    }

    /// Whether the state machine was formatted.
    pub fn is_formatted(&self) -> FsResult<bool> {
        Ok(self.counter(Counter::Formatted)? != 0)
    }

    /// Whether leases on metadata may have been given ([`ebb_metaplane_protocol::lease`]).
    pub fn has_leases(&self) -> FsResult<bool> {
        Ok(self.counter(Counter::Leases)? != 0)
    }

    /// Attributes of an inode; whether a HEAD is due first.
    pub fn attr(&self, inode: InodeId) -> FsResult<(Attr, bool)> {
        // What was found a moment ago may have turned out to be another name of a file.
        let n = self.inode(self.file_of(inode)?)?;
        Ok((n.attr(), !n.attrs_complete))
    }

    /// Key and etag for the HEAD that an inode's attributes wait for. `None`: nothing is due. A
    /// directory without a known marker gives its marker's key and an empty etag.
    pub fn attrs_source(&self, inode: InodeId) -> FsResult<Option<(String, String)>> {
        let n = self.inode(self.file_of(inode)?)?;
        if n.attrs_complete {
            return Ok(None);
        }
        match &n.view.backing {
            Some(b) => Ok(Some((b.key.clone(), b.etag.clone()))),
            None => Ok(self.target_key(&n)?.map(|k| (k, String::new()))),
        }
    }

    fn lacks_attrs(&self, inode: InodeId) -> bool {
        matches!(self.find_inode(inode), Ok(Some(n)) if !n.attrs_complete)
    }

    fn dirty_inode(&self, inode: InodeId) -> FsResult<Option<DirtyInode>> {
        let Some(n) = self.find_inode(inode)? else { return Ok(None) };
        if n.queued().is_none() {
            return Ok(None);
        }
        let stage = match &n.phase {
            Phase::Sealing(f) => FlushStage::Sealing(f.generation),
            Phase::Flushing(f) => FlushStage::Flushing(f.generation, f.nonce),
            _ => FlushStage::Dirty,
        };
        Ok(Some(DirtyInode {
            inode,
            since: n.dirty_since,
            stage,
            needs_attrs: !n.attrs_complete
                || n.link_of().is_some_and(|file| self.lacks_attrs(file)),
            cuts_pending: !n.view.cuts.is_empty(),
        }))
    }

    fn queue(
        &self,
        older_than: Time,
        after_entry: Option<(Time, InodeId)>,
        limit: usize,
        wanted: impl Fn(u8) -> bool,
    ) -> FsResult<Vec<DirtyInode>> {
        let mut found = Vec::new();
        let mut from = match after_entry {
            Some((t, i)) => after(&key(DIRTY, &[&be_time(t), &be(i.0)])),
            None => vec![DIRTY],
        };
        // Younger ones aren't looked at: there may be many, and many that were removed between them.
        let end = match older_than.0.checked_add(1) {
            Some(t) => key(DIRTY, &[&be_time(Time(t))]),
            None => prefix_end(&[DIRTY]),
        };
        while found.len() < limit {
            let page = self.0.scan(&from, &end, 1000, false);
            let Some((last, _)) = page.last() else { break };
            from = after(last);
            for (k, v) in page {
                if found.len() == limit {
                    return Ok(found);
                }
                if v.first().copied().is_some_and(&wanted)
                    && let Some(d) = self.dirty_inode(InodeId(u64_at(&k, 9)?))?
                {
                    found.push(d);
                }
            }
        }
        Ok(found)
    }

    /// Inodes waiting to be flushed, dirty since `older_than` or before, oldest first, after the
    /// given one (its `since` and `inode`): a failing head of the queue blocks nobody.
    pub fn dirty_batch(
        &self,
        limit: usize,
        older_than: Time,
        after_entry: Option<(Time, InodeId)>,
    ) -> FsResult<Vec<DirtyInode>> {
        self.queue(older_than, after_entry, limit, |stage| stage == 0)
    }

    /// Flushes under way. A new leader aborts those that seal; those that flush settle by the
    /// look-ups of `key_work(.., in_flight: true)`.
    pub fn flushes_in_progress(
        &self,
        limit: usize,
        after_entry: Option<(Time, InodeId)>,
    ) -> FsResult<Vec<DirtyInode>> {
        self.queue(Time(i64::MAX), after_entry, limit, |stage| stage != 0)
    }

    /// Dirty inodes of a subtree. `walk` begins as [`Reader::dirty_walk`] and is done when
    /// [`Walk::is_done`]; each call visits up to `limit` entries.
    pub fn dirty_under(&self, walk: &mut Walk, limit: usize) -> FsResult<Vec<DirtyInode>> {
        let mut dirty = Vec::new();
        for id in self.walk_on(walk, limit)? {
            dirty.extend(self.dirty_inode(id)?);
            let file = self.file_of(id)?;
            if file != id {
                // Its file has its own name elsewhere.
                dirty.extend(self.dirty_inode(file)?);
            }
        }
        Ok(dirty)
    }

    /// Other names of these, as far as S3 doesn't hold them.
    pub fn dirty_links(&self, files: &[InodeId]) -> FsResult<Vec<InodeId>> {
        let mut dirty = Vec::new();
        for &file in files {
            if self.find_inode(file)?.is_some_and(|n| n.has_links()) {
                for link in self.links(file)? {
                    dirty.extend(self.dirty_inode(link)?.map(|d| d.inode));
                }
            }
        }
        Ok(dirty)
    }

    /// A walk for [`Reader::dirty_under`] and the inode itself if it is dirty.
    pub fn dirty_walk(&self, inode: InodeId) -> FsResult<(Walk, Option<DirtyInode>)> {
        let n = self.inode(inode)?;
        let walk = if n.is_dir() { Walk::below(inode) } else { Walk(Vec::new()) };
        Ok((walk, self.dirty_inode(inode)?))
    }

    /// Every inode below a directory (evict, warm), as [`Reader::dirty_under`] walks.
    pub fn inodes_under(&self, walk: &mut Walk, limit: usize) -> FsResult<Vec<InodeId>> {
        self.walk_on(walk, limit)?.into_iter().map(|id| self.file_of(id)).collect()
    }

    /// How an inode compares with S3. `None`: it is dirty, or has no object.
    pub fn revalidation(&self, inode: InodeId) -> FsResult<Option<Revalidation>> {
        let n = self.inode(inode)?;
        if n.phase != Phase::Clean || n.nlink == 0 {
            return Ok(None);
        }
        let Some(b) = &n.view.backing else { return Ok(None) };
        if self.target_key(&n)?.as_ref() != Some(&b.key) {
            return Ok(None);
        }
        Ok(Some(Revalidation {
            key: b.key.clone(),
            etag: b.etag.clone(),
            validated: n.validated,
            lineage: n.view.lineage,
        }))
    }

    /// What commands left behind for the leader's loops to do.
    pub fn left(&self) -> FsResult<Left> {
        Ok(Left {
            pending_keys: self.counter(Counter::PendingKeys)?,
            notices: self.counter(Counter::Notices)?,
            moves: self.counter(Counter::Moves)?,
            lingering: u64::from(self.any_with_prefix(&[LINGERING])),
        })
    }

    /// Counts for the status.
    pub fn counts(&self) -> FsResult<MachineCounts> {
        let oldest = self.scan_prefix(&[DIRTY], None, 1);
        Ok(MachineCounts {
            inodes: self.counter(Counter::Inodes)?,
            used_bytes: self.counter(Counter::UsedBytes)?,
            dirty_inodes: self.counter(Counter::DirtyInodes)?,
            dirty_oldest: oldest.first().map(|(k, _)| time_at(k, 1)).transpose()?,
            pending_keys: self.counter(Counter::PendingKeys)?,
            notices: self.counter(Counter::Notices)?,
            moves: self.counter(Counter::Moves)?,
            sessions: self.counter(Counter::Sessions)?,
            desired_nodes: self.counter(Counter::DesiredNodes)? as u32,
            wake_nodes: self.counter(Counter::WakeNodes)? as u32,
            shutting_down: self.counter(Counter::ShuttingDown)? != 0,
            lost_files: self.lost_files()?,
        })
    }
}
