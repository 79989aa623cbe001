//! Locks as the kernel has them, and signals for who waits for one.

use crate::filesystem::Shared;
use ebb_client::{FileHandle, InodeId, Lock, LockMode, Result};
use fuser::LockOwner;

/// The largest offset that the kernel knows: to the end.
const OFFSET_MAX: u64 = i64::MAX as u64;

/// A lock as a program asks for it.
pub(crate) fn lock(owner: LockOwner, (start, end): (u64, u64), typ: i32, pid: u32) -> Option<Lock> {
    let mode = match typ {
        libc::F_RDLCK => LockMode::Shared,
        libc::F_WRLCK => LockMode::Exclusive,
        libc::F_UNLCK => LockMode::Unlock,
        _ => return None,
    };
    let end = if end >= OFFSET_MAX { u64::MAX } else { end };
    Some(Lock { owner: owner.0, start, end, mode, pid })
}

/// Whether a signal waits for a thread of this machine that waits for us. The kernel's word of it does not reach
/// this side of the FUSE library.
fn has_signal(thread: u32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{thread}/status")) else {
        return false;
    };
    let mask = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        u64::from_str_radix(line.trim_start_matches(':').trim(), 16).ok()
    };
    let of = |name| mask(name).unwrap_or(0);
    (of("SigPnd") | of("ShdPnd")) & !of("SigBlk") & !of("SigIgn") != 0
}

impl Shared {
    /// The close of a descriptor: it ends the process's locks on the file, by whichever they were made.
    pub(crate) async fn close(&self, handle: FileHandle, owner: LockOwner) -> Result<()> {
        let (dir, changes) = (self.fs.unnamed_in(handle), self.known.changes());
        let flushed = self.fs.flush(handle).await;
        if let Some(dir) = dir {
            // It got its name, and its directory another time.
            self.known.directory_told(changes, dir, self.fs.own_directory(dir).as_ref());
        }
        let unlocked = self.fs.unlock_all(handle, owner.0).await;
        flushed.and(unlocked)
    }

    /// What is in the way of a lock: start, end, kind and process, as the kernel wants it.
    pub(crate) async fn in_the_way(
        &self,
        handle: FileHandle,
        wanted: Lock,
    ) -> Result<(u64, u64, i32, u32)> {
        Ok(match self.fs.locked(handle, wanted).await? {
            None => (wanted.start, wanted.end.min(OFFSET_MAX), libc::F_UNLCK, 0),
            Some(l) => {
                let kind = if l.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
                (l.start, l.end.min(OFFSET_MAX), kind, l.pid)
            }
        })
    }

    /// Locks or unlocks; waits for a lock while no signal comes to `waiter`, a thread.
    pub(crate) async fn lock(
        &self,
        inode: InodeId,
        handle: FileHandle,
        wanted: Lock,
        waiter: Option<u32>,
    ) -> Result<()> {
        let interrupted = || waiter.is_some_and(has_signal);
        let attr = self.fs.lock(handle, wanted, waiter.is_some(), interrupted).await?;
        if let Some(attr) = attr
            && !self.known.opened(&attr, false).keep_cache
        {
            // Whoever had a lock before may have written.
            self.telling.forget_pages(inode).await;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_to_the_end_has_none() {
        let asked = |range, typ| lock(LockOwner(3), range, typ, 4);
        let to_end = asked((7, OFFSET_MAX), libc::F_WRLCK).expect("a lock");
        assert_eq!((to_end.start, to_end.end), (7, u64::MAX));
        assert_eq!(asked((7, 9), libc::F_RDLCK).expect("a lock").end, 9);
        assert!(asked((7, 9), 77).is_none());
    }

    #[test]
    fn nobody_signals_this_thread() {
        assert!(!has_signal(nix::unistd::gettid().as_raw() as u32));
        assert!(!has_signal(u32::MAX));
    }
}
