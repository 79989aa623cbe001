//! What this client knows of names that only it adds (docs/PROTOCOL.md, R40).

use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::own::OwnDirs;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The client's half of the rule.
#[derive(Default)]
pub(crate) struct Names(Mutex<OwnDirs>);

/// A mkdir in progress.
pub(crate) struct Making<'a>(&'a Names, Instant, Option<(InodeId, u64, Duration)>);

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.0.own().made(self.1, self.2);
    }
}

impl Making<'_> {
    /// It was made, and its names are lent.
    pub(crate) fn made(mut self, dir: InodeId, epoch: u64, lent_ms: u32) {
        self.2 = Some((dir, epoch, Duration::from_millis(lent_ms.into())));
    }
}

impl Names {
    fn own(&self) -> MutexGuard<'_, OwnDirs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A directory is about to be made.
    pub(crate) fn making(&self) -> Making<'_> {
        self.own().making();
        Making(self, Instant::now(), None)
    }

    /// A name is about to be added; gives when.
    pub(crate) fn adds(&self, dir: InodeId, name: &[u8]) -> Instant {
        self.own().adds(dir, name);
        Instant::now()
    }

    /// It was, and the directory's names are lent.
    pub(crate) fn renewed(&self, dir: InodeId, epoch: u64, sent: Instant, lent_ms: u32) {
        self.own().renewed(dir, epoch, sent, Duration::from_millis(lent_ms.into()));
    }

    /// Adds `name` to `dir` if it surely is not there.
    pub(crate) fn claim(&self, epoch: u64, dir: InodeId, name: &[u8]) -> bool {
        self.own().claim(dir, name, epoch, Instant::now())
    }

    /// Whether `name` surely is not in `dir`.
    pub(crate) fn lacks(&self, epoch: u64, dir: InodeId, name: &[u8]) -> bool {
        self.own().lacks(dir, name, epoch, Instant::now())
    }
}
