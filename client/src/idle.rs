//! Handles of files that were closed a moment ago. An open that finds one here, and the file as it was, is no entry
//! in the metadata plane's log: it is what `dup` is to an open file. After the deferred close of SMB2 (\[MS-SMB2\],
//! leases with handle caching).
//!
//! Only handles that never wrote are kept, without anything to commit. While the file's attributes are leased
//! (docs/PROTOCOL.md, R52) a handle goes when they are recalled, and at the latest after [`LEASED`]; without a
//! lease nobody tells this client that the file was unlinked, whose space waits for the handle, so it goes after
//! [`UNLEASED`].

use crate::grant::GrantState;
use crate::inode::Hold;
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::attr::Attr;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a handle is kept.
const LEASED: Duration = Duration::from_secs(60);
const UNLEASED: Duration = Duration::from_millis(500);
/// Handles kept at most. The metadata plane allows a session four times as many open files.
const KEPT_MAX: usize = 16_384;

/// A handle that nobody uses.
pub(crate) struct Kept {
    pub(crate) hold: Hold,
    pub(crate) grant: Arc<GrantState>,
    /// The file, as the handle's last user knew it.
    pub(crate) attr: Attr,
    /// When the metadata plane last looked whether the object is another one.
    pub(crate) compared: Instant,
}

/// Whether it is the same file with the same bytes: every commit, truncate and change from outside moves the ctime or
/// the lineage.
pub(crate) fn is_same(a: &Attr, b: &Attr) -> bool {
    (a.inode, a.lineage, a.size, a.mtime, a.ctime) == (b.inode, b.lineage, b.size, b.mtime, b.ctime)
}

struct State<T> {
    kept: HashMap<InodeId, (T, u64)>,
    /// When they go, in order: (leased, not leased).
    ends: [VecDeque<(Instant, InodeId, u64)>; 2],
    /// Numbers them: what was taken and came back is another one.
    last: u64,
}

/// Handles by file.
pub(crate) struct Idle<T = Kept>(Mutex<State<T>>);

impl<T> Default for Idle<T> {
    fn default() -> Self {
        Self(Mutex::new(State { kept: HashMap::new(), ends: Default::default(), last: 0 }))
    }
}

impl<T> Idle<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a handle. Answers one that has to go instead.
    pub(crate) fn keep(
        &self,
        inode: InodeId,
        kept: T,
        leased: bool,
        now: Instant,
    ) -> Option<(InodeId, T)> {
        let mut state = self.state();
        state.last += 1;
        let number = state.last;
        let time = if leased { LEASED } else { UNLEASED };
        let of = usize::from(!leased);
        state.ends[of].push_back((now + time, inode, number));
        if state.ends[of].len() > KEPT_MAX * 2 {
            // Mostly of what was taken since.
            let State { kept, ends, .. } = &mut *state;
            ends[of].retain(|(_, i, n)| kept.get(i).is_some_and(|(_, number)| number == n));
        }
        let instead = state.kept.insert(inode, (kept, number)).map(|(old, _)| (inode, old));
        if instead.is_some() || state.kept.len() <= KEPT_MAX {
            return instead;
        }
        [1, 0].into_iter().find_map(|of| state.first(of))
    }

    /// The handle of a file, for somebody to use.
    pub(crate) fn take(&self, inode: InodeId) -> Option<T> {
        self.state().kept.remove(&inode).map(|(kept, _)| kept)
    }

    /// Those that are to go: of these files.
    pub(crate) fn recalled(&self, inodes: &[InodeId]) -> Vec<(InodeId, T)> {
        let mut state = self.state();
        inodes.iter().filter_map(|i| Some((*i, state.kept.remove(i)?.0))).collect()
    }

    /// Those that are to go for another reason.
    pub(crate) fn drain(&self, goes: impl Fn(InodeId, &T) -> bool) -> Vec<(InodeId, T)> {
        self.state()
            .kept
            .extract_if(|inode, (kept, _)| goes(*inode, kept))
            .map(|(i, k)| (i, k.0))
            .collect()
    }

    /// Those whose time is over.
    pub(crate) fn expired(&self, now: Instant) -> Vec<(InodeId, T)> {
        let mut state = self.state();
        let mut gone = Vec::new();
        for of in [0, 1] {
            while state.ends[of].front().is_some_and(|(end, ..)| *end <= now) {
                gone.extend(state.pop(of));
            }
        }
        gone
    }
}

impl<T> State<T> {
    /// Takes the first entry of a queue; the handle, if it is still there.
    fn pop(&mut self, of: usize) -> Option<(InodeId, T)> {
        let (_, inode, number) = self.ends[of].pop_front()?;
        if self.kept.get(&inode).is_none_or(|(_, n)| *n != number) {
            return None;
        }
        self.kept.remove(&inode).map(|(kept, _)| (inode, kept))
    }

    /// Takes the first handle of a queue.
    fn first(&mut self, of: usize) -> Option<(InodeId, T)> {
        while !self.ends[of].is_empty() {
            if let Some(kept) = self.pop(of) {
                return Some(kept);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: InodeId = InodeId(1);

    #[test]
    fn a_handle_is_there_until_it_is_taken_recalled_or_over() {
        let now = Instant::now();
        let idle = Idle::<u32>::default();
        assert_eq!(idle.take(FILE), None);
        assert_eq!(idle.keep(FILE, 1, true, now), None);
        assert_eq!(idle.take(FILE), Some(1));
        assert_eq!(idle.take(FILE), None);
        idle.keep(FILE, 2, true, now);
        assert_eq!(idle.recalled(&[InodeId(7), FILE]), [(FILE, 2)]);
        // One of a file: the newer one.
        idle.keep(FILE, 3, false, now);
        assert_eq!(idle.keep(FILE, 4, true, now + UNLEASED / 2), Some((FILE, 3)));
        assert!(idle.expired(now + UNLEASED).is_empty(), "that was the other one's time");
        assert!(idle.expired(now + LEASED).is_empty());
        assert_eq!(idle.expired(now + LEASED + UNLEASED / 2), [(FILE, 4)]);
        idle.keep(FILE, 5, false, now);
        assert!(idle.expired(now + UNLEASED - Duration::from_millis(1)).is_empty());
        assert_eq!(idle.expired(now + UNLEASED), [(FILE, 5)]);
    }

    #[test]
    fn handles_are_bounded_and_the_oldest_go() {
        let now = Instant::now();
        let idle = Idle::<u64>::default();
        let most = KEPT_MAX as u64;
        for n in 0..most {
            assert_eq!(idle.keep(InodeId(n), n, true, now), None);
        }
        assert_eq!(idle.take(InodeId(0)), Some(0));
        assert_eq!(idle.keep(InodeId(0), most, true, now), None);
        // Nobody tells of those without a lease: they are the first to go.
        assert_eq!(idle.keep(InodeId(most), most, false, now), Some((InodeId(most), most)));
        assert_eq!(idle.keep(InodeId(most + 1), most, true, now), Some((InodeId(1), 1)));
        assert_eq!(idle.expired(now + LEASED).len(), KEPT_MAX);
    }

    /// Opened and closed again and again within its time, a file leaves nothing behind.
    #[test]
    fn what_is_taken_and_kept_again_does_not_pile_up() {
        let mut now = Instant::now();
        let idle = Idle::<u64>::default();
        for n in 0..1_000_000 {
            now += Duration::from_micros(10);
            idle.keep(InodeId(n % 3), n, true, now);
            idle.take(InodeId(n % 3));
        }
        let left: usize = idle.state().ends.iter().map(VecDeque::len).sum();
        assert!(left <= KEPT_MAX * 2, "{left}");
    }
}
