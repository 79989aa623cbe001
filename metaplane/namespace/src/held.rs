//! Which inodes may have bytes in a placement group that S3 doesn't have (PROTOCOL R23, R24): what decides whether a
//! group whose holder is cut off may get a stand-in.
//!
//! The table is kept by [`Ctx::save`], so that no transition can forget it: an inode is in it for every group of a run below
//! its allocation limit exactly while a grant above its clean generation was given (I2), with a name or without one. The
//! value is the machine's sequence at which that began, for the group: grants given after the holder was cut off can't
//! have been used there. Does not know leases: the leader says when the holder was cut off.

use crate::Reader;
use crate::counters::Counter;
use crate::inode::Inode;
use crate::kv::{Kv, KvRead};
use crate::tables::*;
use ebb_dataplane_protocol::{InodeId, PgEpoch, PgId, RunIndex, ShardRef};
use ebb_metaplane_protocol::{FsError, FsResult};
use std::collections::BTreeSet;

/// Entries of a group looked at in one step.
const PAGE: usize = 1_000;

impl Inode {
    /// Bound of the bytes that only nodes may have; `None`: S3 has all of it.
    pub(crate) fn held(&self) -> Option<u64> {
        self.may_hold_dirty_data().then_some(self.alloc_limit)
    }
}

fn place(pg: PgId, inode: InodeId) -> Vec<u8> {
    key(HELD, &[&pg.0.to_be_bytes(), &be(inode.0)])
}

/// Groups of the runs below `limit`. Bounded by the runs of the largest file.
fn groups(inode: InodeId, limit: Option<u64>, count: u16) -> BTreeSet<PgId> {
    let runs = limit.map_or(0, RunIndex::count_for);
    let mut found = BTreeSet::new();
    for run in 0..runs {
        found.insert(PgId::of(inode, RunIndex(run), count));
        if found.len() == usize::from(count) {
            break;
        }
    }
    found
}

impl<K: KvRead> Reader<'_, K> {
    fn pg_count(&self) -> FsResult<u16> {
        u16::try_from(self.counter(Counter::PgCount)?).map_err(|_| corrupt("group count"))
    }

    /// Inodes after `after_inode` of which the holder of a group may have the only copy of bytes, if it was cut off when the
    /// machine was at sequence `cut_off`.
    pub fn held_in(
        &self,
        pg: PgId,
        cut_off: u64,
        after_inode: Option<InodeId>,
        limit: usize,
    ) -> FsResult<Vec<InodeId>> {
        let prefix = key(HELD, &[&pg.0.to_be_bytes()]);
        let mut from = after_inode.map_or(prefix.clone(), |i| after(&place(pg, i)));
        let mut found = Vec::new();
        loop {
            let page = self.scan_prefix(&prefix, Some(&from), PAGE);
            let Some((last, _)) = page.last() else { return Ok(found) };
            from = after(last);
            for (k, v) in page {
                if found.len() >= limit {
                    return Ok(found);
                }
                if u64_at(&v, 0)? <= cut_off {
                    found.push(InodeId(u64_at(&k, 3)?));
                }
            }
        }
    }

    /// Groups whose table has an inode.
    pub(crate) fn groups_of_held(&self, n: &Inode) -> FsResult<BTreeSet<PgId>> {
        Ok(match self.pg_count()? {
            0 => BTreeSet::new(),
            count => groups(n.id, n.held(), count),
        })
    }

    /// Whether [`Reader::held_in`] names an inode.
    pub(crate) fn is_held(&self, pg: PgId, inode: InodeId, cut_off: u64) -> FsResult<bool> {
        match self.0.get(&place(pg, inode)) {
            None => Ok(false),
            Some(v) => Ok(u64_at(&v, 0)? <= cut_off),
        }
    }

    /// Whether the namespace knows that a group may have bytes of an inode that S3 doesn't have.
    pub fn may_hold(&self, pg: PgId, inode: InodeId) -> FsResult<bool> {
        self.is_held(pg, inode, u64::MAX)
    }

    /// Whether a group may get a stand-in: S3 has every byte that its holder, cut off at `cut_off`, ever acknowledged.
    pub fn may_stand_in(&self, pg: PgId, cut_off: u64) -> FsResult<bool> {
        Ok(self.held_in(pg, cut_off, None, 1)?.is_empty())
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// An inode's bytes are held by other groups than before.
    pub(crate) fn note_held(
        &mut self,
        inode: InodeId,
        before: Option<u64>,
        now: Option<u64>,
    ) -> FsResult<()> {
        if before == now {
            return Ok(());
        }
        let count = self.read().pg_count()?;
        if count == 0 {
            return Ok(());
        }
        let (old, new) = (groups(inode, before, count), groups(inode, now, count));
        for pg in old.difference(&new) {
            self.kv.delete(&place(*pg, inode));
        }
        let since = be(self.sequence);
        for pg in new.difference(&old) {
            self.kv.put(&place(*pg, inode), &since);
        }
        Ok(())
    }

    /// A group whose holder is cut off gets another (R23, R24). The look at what the holder may have alone and the new epoch are
    /// one command: a grant given before it counts, one given after it names a map that only the new holder knows (R26).
    pub(crate) fn stand_in(
        &mut self,
        pg: PgId,
        from: PgEpoch,
        members: &[ShardRef],
        cut_off: u64,
    ) -> FsResult<()> {
        if !self.read().may_stand_in(pg, cut_off)? {
            return Err(FsError::Invalid(format!("group {pg} holds data that S3 does not")));
        }
        self.change_members(pg, from, members, true)
    }
}
