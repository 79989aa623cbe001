//! For how long the kernel may use the attributes that it is told: always as long, or, where they are leased,
//! until the lease ends or the leader wants them forgotten (docs/PROTOCOL.md, R52, R53).

use ebb_client::{Attr, FileSystem, InodeId};
use fuser::{INodeNo, Notifier};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

/// A tick of the kernel's clock, by which it rounds lifetimes up: at most 10 ms.
const KERNEL_TICK: Duration = Duration::from_millis(20);

/// What the kernel is told of attributes.
pub(crate) struct Telling {
    fs: FileSystem,
    /// Without leases.
    ttl: Duration,
    notifier: Arc<OnceLock<Notifier>>,
    /// With leases: read while the kernel is told of some, written before it is told to forget some, so that none
    /// arrive after that.
    lock: Option<Arc<RwLock<()>>>,
}

/// Attributes that are being told.
pub(crate) struct Told<'a> {
    /// How long the kernel may use them.
    pub(crate) ttl: Duration,
    end: Option<Instant>,
    _telling: Option<RwLockReadGuard<'a, ()>>,
}

impl Telling {
    /// `ttl` zero: as long as they are leased, if `fs` has leases.
    pub(crate) fn new(fs: &FileSystem, ttl: Duration) -> Self {
        let notifier: Arc<OnceLock<Notifier>> = Arc::default();
        let lock = (ttl.is_zero() && fs.has_leases()).then(Arc::<RwLock<()>>::default);
        if let Some(lock) = &lock {
            let (lock, notifier) = (Arc::clone(lock), Arc::clone(&notifier));
            fs.on_forget(Box::new(move |inodes| {
                // What is on its way to the kernel arrives first.
                drop(lock.write().unwrap_or_else(PoisonError::into_inner));
                for inode in inodes {
                    forget(&notifier, *inode);
                }
            }));
        }
        Self { fs: fs.clone(), ttl, notifier, lock }
    }

    /// Where the notifier goes once the session exists.
    pub(crate) fn notifier_slot(&self) -> Arc<OnceLock<Notifier>> {
        Arc::clone(&self.notifier)
    }

    /// The kernel is about to be told; call [`Self::told`] when it was.
    pub(crate) fn tell(&self, a: &Attr) -> Told<'_> {
        let Some(lock) = &self.lock else {
            return Told { ttl: self.ttl, end: None, _telling: None };
        };
        let telling = lock.read().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let left = self.fs.lease_on(a).and_then(|left| left.checked_sub(KERNEL_TICK));
        let ttl = left.unwrap_or_default();
        Told { ttl, end: left.map(|left| now + left), _telling: Some(telling) }
    }

    /// It was. A process that stood still in between told it too late.
    pub(crate) fn told(&self, told: Told<'_>, inode: InodeId) {
        let is_late = told.end.is_some_and(|end| end <= Instant::now());
        drop(told);
        if is_late {
            self.forget(inode);
        }
    }

    /// Has the kernel ask again for an inode's attributes.
    pub(crate) fn forget(&self, inode: InodeId) {
        forget(&self.notifier, inode);
    }

    /// Has the kernel read an inode's pages again.
    pub(crate) async fn forget_pages(&self, inode: InodeId) {
        let notifier = Arc::clone(&self.notifier);
        // It may wait for reads and writes of these pages, which we answer.
        let done = tokio::task::spawn_blocking(move || {
            let Some(notifier) = notifier.get() else { return };
            if let Err(e) = notifier.inval_inode(INodeNo(inode.0), 0, 0) {
                tracing::debug!(inode = inode.0, error = %e, "the kernel has no pages");
            }
        });
        let _ = done.await;
    }
}

fn forget(notifier: &OnceLock<Notifier>, inode: InodeId) {
    let Some(notifier) = notifier.get() else { return };
    // Attributes only (a negative offset): takes no page lock, so it cannot wait for a read
    // that we are to answer.
    if let Err(e) = notifier.inval_inode(INodeNo(inode.0), -1, 0) {
        tracing::debug!(inode = inode.0, error = %e, "the kernel keeps old attributes, or has none");
    }
}
