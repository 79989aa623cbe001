//! Advisory locks on ranges of files: fcntl's and flock's, for programs on all clients (docs/PROTOCOL.md, R57).
//!
//! A lock is a fact of the log: no change of leader ends it. It ends with an unlock, with its session's last handle
//! of the file, and so with the session. Whoever held one when its session ended can't write any more: the end of
//! the session fences what it had open for writing.
//!
//! Ranges are as POSIX has them: of one owner, a later lock replaces what it covers of earlier ones. The two kinds
//! share one space, as with NFS: a program that takes both on one file can be in its own way.

use crate::Reader;
use crate::kv::{Kv, KvRead};
use crate::limits::LOCKS_PER_INODE_MAX;
use crate::tables::*;
use ebb_dataplane_protocol::{InodeId, SessionId, codec};
use ebb_metaplane_protocol::lock::{Lock, LockMode, Locked};
use ebb_metaplane_protocol::{FsError, FsResult};
use rkyv::{Archive, Deserialize, Serialize};

/// A range that somebody has locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Archive, Serialize, Deserialize)]
pub(crate) struct Held {
    pub(crate) start: u64,
    /// The last byte.
    pub(crate) end: u64,
    pub(crate) session: SessionId,
    pub(crate) owner: u64,
    pub(crate) exclusive: bool,
    pub(crate) pid: u32,
}

impl Held {
    fn is_of(&self, session: SessionId, owner: u64) -> bool {
        self.session == session && self.owner == owner
    }
}

/// The first lock that is in the way of this one.
fn in_the_way<'h>(held: &'h [Held], session: SessionId, lock: &Lock) -> Option<&'h Held> {
    let exclusive = match lock.mode {
        LockMode::Unlock => return None,
        LockMode::Shared => false,
        LockMode::Exclusive => true,
    };
    held.iter().find(|h| {
        !h.is_of(session, lock.owner)
            && h.start <= lock.end
            && lock.start <= h.end
            && (h.exclusive || exclusive)
    })
}

/// What its owner holds after it, among all others' locks: sorted, neighbours of one kind joined.
fn change(held: &mut Vec<Held>, session: SessionId, lock: &Lock) {
    let (own, mut rest): (Vec<Held>, Vec<Held>) =
        held.iter().partition(|h| h.is_of(session, lock.owner));
    let mut after = Vec::with_capacity(own.len() + 2);
    for h in own {
        if h.end < lock.start || lock.end < h.start {
            after.push(h);
            continue;
        }
        if let Some(end) = lock.start.checked_sub(1).filter(|end| h.start <= *end) {
            after.push(Held { end, ..h });
        }
        if let Some(start) = lock.end.checked_add(1).filter(|start| *start <= h.end) {
            after.push(Held { start, ..h });
        }
    }
    let exclusive = lock.mode == LockMode::Exclusive;
    let (Lock { start, end, owner, pid, .. }, mode) = (*lock, lock.mode);
    if mode != LockMode::Unlock {
        after.push(Held { start, end, session, owner, exclusive, pid });
    }
    after.sort_unstable();
    for h in after {
        match rest.last_mut() {
            Some(last)
                if last.is_of(session, owner)
                    && last.exclusive == h.exclusive
                    && last.end.checked_add(1) == Some(h.start) =>
            {
                last.end = h.end;
            }
            _ => rest.push(h),
        }
    }
    rest.sort_unstable();
    *held = rest;
}

impl<K: KvRead> Reader<'_, K> {
    pub(crate) fn locks(&self, inode: InodeId) -> FsResult<Vec<Held>> {
        match self.0.get(&key(LOCK, &[&be(inode.0)])) {
            None => Ok(Vec::new()),
            Some(bytes) => codec::decode(&bytes).map_err(|_| corrupt("locks")),
        }
    }

    /// Whether a session has locks on a file.
    pub(crate) fn has_locks(&self, session: SessionId, inode: InodeId) -> bool {
        self.0.get(&key(SESSION_LOCK, &[&be(session.0), &be(inode.0)])).is_some()
    }

    /// The first lock that is in the way of one, if any is.
    pub fn locked(
        &self,
        session: SessionId,
        inode: InodeId,
        lock: &Lock,
    ) -> FsResult<Option<Locked>> {
        let held = self.locks(inode)?;
        Ok(in_the_way(&held, session, lock).map(|h| Locked {
            start: h.start,
            end: h.end,
            exclusive: h.exclusive,
            // The number of a process elsewhere means nothing here.
            pid: if h.session == session { h.pid } else { 0 },
        }))
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// Locks or unlocks a range of a file that the session has open.
    pub(crate) fn lock(
        &mut self,
        session: SessionId,
        inode: InodeId,
        lock: &Lock,
        wait: bool,
    ) -> FsResult<()> {
        if lock.start > lock.end {
            return Err(FsError::Invalid("a lock that ends before it begins".into()));
        }
        if !self.read().session_has_open(session, inode) {
            return Err(FsError::Stale);
        }
        let mut held = self.read().locks(inode)?;
        if in_the_way(&held, session, lock).is_some() {
            return Err(match wait {
                true => crate::again(crate::why::LOCKED),
                false => FsError::Locked,
            });
        }
        change(&mut held, session, lock);
        if held.len() > LOCKS_PER_INODE_MAX && lock.mode != LockMode::Unlock {
            return Err(FsError::NoLocks);
        }
        self.put_locks(inode, &held);
        let place = key(SESSION_LOCK, &[&be(session.0), &be(inode.0)]);
        match held.iter().any(|h| h.session == session) {
            true => self.kv.put(&place, &[]),
            false => self.kv.delete(&place),
        }
        Ok(())
    }

    fn put_locks(&mut self, inode: InodeId, held: &[Held]) {
        let place = key(LOCK, &[&be(inode.0)]);
        match held.is_empty() {
            true => self.kv.delete(&place),
            false => self.kv.put(&place, &codec::encode(&held.to_vec())),
        }
    }

    /// A session's locks on a file end, if it has any.
    pub(crate) fn drop_locks(&mut self, session: SessionId, inode: InodeId) -> FsResult<()> {
        self.kv.delete(&key(SESSION_LOCK, &[&be(session.0), &be(inode.0)]));
        let mut held = self.read().locks(inode)?;
        held.retain(|h| h.session != session);
        self.put_locks(inode, &held);
        Ok(())
    }

    /// Locks without a session's record of them go (a repair).
    pub(crate) fn mend_locks(&mut self, inode: InodeId) -> FsResult<()> {
        let mut held = self.read().locks(inode)?;
        let r = self.read();
        held.retain(|h| r.has_locks(h.session, inode));
        self.put_locks(inode, &held);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    const BYTES: usize = 24;

    /// Against a byte array: who has locked each byte, and how.
    #[test]
    fn ranges_are_as_posix_has_them() {
        for seed in 0..300 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut held = Vec::new();
            // And what is behind them, as one.
            let mut bytes = vec![Vec::<(u64, u64, bool)>::new(); BYTES + 1];
            for _ in 0..200 {
                let (session, owner) = (rng.random_range(1..3), rng.random_range(0..2));
                let start = rng.random_range(0..BYTES as u64);
                let end = match rng.random_range(0..8) {
                    0 => u64::MAX,
                    _ => rng.random_range(start..BYTES as u64),
                };
                let mode = match rng.random_range(0..4) {
                    0 => LockMode::Exclusive,
                    1 | 2 => LockMode::Shared,
                    _ => LockMode::Unlock,
                };
                let lock = Lock { owner, start, end, mode, pid: 7 };
                let upto = end.min(BYTES as u64) as usize;
                let covered = &mut bytes[start as usize..=upto];
                let exclusive = mode == LockMode::Exclusive;
                let clash = mode != LockMode::Unlock
                    && covered
                        .iter()
                        .flatten()
                        .any(|(s, o, x)| (*s, *o) != (session, owner) && (*x || exclusive));
                let found = in_the_way(&held, SessionId(session), &lock);
                assert_eq!(found.is_some(), clash, "seed {seed}: {lock:?}, {held:?}");
                if clash {
                    continue;
                }
                change(&mut held, SessionId(session), &lock);
                for byte in covered {
                    byte.retain(|(s, o, _)| (*s, *o) != (session, owner));
                    if mode != LockMode::Unlock {
                        byte.push((session, owner, exclusive));
                    }
                }
                for (at, byte) in bytes.iter_mut().enumerate() {
                    let at = if at == BYTES { u64::MAX } else { at as u64 };
                    let here = held.iter().filter(|h| h.start <= at && at <= h.end);
                    let mut here: Vec<_> =
                        here.map(|h| (h.session.0, h.owner, h.exclusive)).collect();
                    here.sort_unstable();
                    byte.sort_unstable();
                    assert_eq!(here, *byte, "seed {seed}, byte {at}");
                }
                let most = 4 * (BYTES + 1);
                assert!(held.len() <= most && held.is_sorted(), "seed {seed}: {held:?}");
                let joined = held.iter().all(|a| {
                    let next = |b: &&Held| a.end.checked_add(1) == Some(b.start);
                    let alike =
                        |b: &Held| b.is_of(a.session, a.owner) && b.exclusive == a.exclusive;
                    !held.iter().filter(next).any(alike)
                });
                assert!(joined, "seed {seed}: {held:?}");
            }
        }
    }
}
