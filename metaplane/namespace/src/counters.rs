//! Counters and small settings: fixed 8-byte values, so that every count is O(1).

use crate::Reader;
use crate::kv::{Kv, KvRead};
use crate::tables::{Ctx, META, corrupt, key};
use ebb_metaplane_protocol::FsResult;

/// A counter; its number is part of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Counter {
    /// Commands applied.
    Sequence = 0,
    /// The highest stamped time.
    Clock = 1,
    NextInode = 2,
    NextHandle = 3,
    NextSession = 4,
    NextNotice = 5,
    NextNode = 6,
    NextMove = 7,
    Inodes = 8,
    UsedBytes = 9,
    DirtyInodes = 10,
    PendingKeys = 11,
    Sessions = 12,
    Tombstones = 13,
    /// Listings that began before this sequence come too late: deletes after it were forgotten.
    TombstoneFloor = 14,
    ShuttingDown = 15,
    DesiredNodes = 16,
    WakeNodes = 17,
    ClusterHigh = 18,
    ClusterLow = 19,
    Incarnation = 20,
    /// 1 when formatted.
    Formatted = 21,
    Notices = 22,
    Moves = 23,
    /// Names that came into completely listed directories by another way than a client's operation.
    NamesBrought = 24,
    /// Placement groups.
    PgCount = 25,
    /// Files that an abandoned node took along.
    LostFiles = 26,
    /// Wanted members of each group; 0 is 1.
    Replicas = 27,
    /// In-sync members of each group that writes need; 0 is 1.
    MinInSync = 28,
    /// Repairs of counts that were made.
    Repairs = 29,
    /// 1 while a dump comes back: nobody else does anything.
    Loading = 30,
    /// 1: a leader may have leased what it told clients ([`ebb_metaplane_protocol::lease`]).
    Leases = 31,
}

impl Counter {
    /// One that a check may speak of.
    pub(crate) fn of(number: u8) -> Option<Self> {
        let known = crate::check::COUNTED.into_iter().chain(crate::check::NUMBERS);
        known.into_iter().find(|c| *c as u8 == number)
    }
}

impl<K: KvRead> Reader<'_, K> {
    pub(crate) fn counter(&self, c: Counter) -> FsResult<u64> {
        match self.0.get(&key(META, &[&[c as u8]])) {
            None => Ok(0),
            Some(v) => {
                v.as_slice().try_into().map(u64::from_le_bytes).map_err(|_| corrupt("counter"))
            }
        }
    }
}

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn set_counter(&mut self, c: Counter, v: u64) {
        self.kv.put(&key(META, &[&[c as u8]]), &v.to_le_bytes());
    }
    /// Adds to a counter (never below zero) and returns the new value.
    pub(crate) fn add(&mut self, c: Counter, by: i64) -> FsResult<u64> {
        if by == 0 {
            return self.read().counter(c);
        }
        let v = self.read().counter(c)?.saturating_add_signed(by);
        self.set_counter(c, v);
        Ok(v)
    }
    /// The next id of a counter, starting at 1.
    pub(crate) fn next(&mut self, c: Counter) -> FsResult<u64> {
        self.add(c, 1)
    }
}
