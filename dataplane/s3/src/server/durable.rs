//! Making things last: blocking file work off the async threads, and grouped directory syncs.
//!
//! A rename or unlink is durable once its directory was synced after it. Many small PUTs into one
//! folder share such syncs: whoever comes while one runs waits for the next and shares that. The
//! first failed sync poisons the folder: what is on disk is unknown then, and nothing more is
//! acknowledged from it until a restart looks afresh.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use tokio::sync::Mutex;

/// Runs file work on a blocking thread. Once begun it runs to its end, whoever waits for it.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

pub(super) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// A folder whose syncs are shared.
pub(super) struct SharedSync {
    path: PathBuf,
    asked: AtomicU64,
    /// The highest `asked` a finished sync covers.
    done: Arc<Mutex<u64>>,
    poisoned: Arc<AtomicBool>,
}

impl SharedSync {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            asked: AtomicU64::new(0),
            done: Arc::default(),
            poisoned: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Returns once everything changed in the folder before this call is durable.
    pub(super) async fn sync(&self) -> io::Result<()> {
        // The change was made before this line, so any sync that starts after it covers it.
        let ticket = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut done = Arc::clone(&self.done).lock_owned().await;
        if self.poisoned.load(Ordering::SeqCst) {
            return Err(io::Error::other("an earlier sync of this folder failed"));
        }
        if *done >= ticket {
            return Ok(());
        }
        let covers = self.asked.load(Ordering::SeqCst);
        let (path, poisoned) = (self.path.clone(), Arc::clone(&self.poisoned));
        // The lock goes along, so that a caller that goes away does not let a second one in early.
        blocking(move || match sync_dir(&path) {
            Ok(()) => {
                *done = covers;
                Ok(())
            }
            Err(e) => {
                poisoned.store(true, Ordering::SeqCst);
                Err(e)
            }
        })
        .await
    }
}
