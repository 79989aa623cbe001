//! Listing a directory's prefix, page by page, into the state machine.
//!
//! One listing of a directory at a time; those who wait for it look again when it is done. The
//! sequence that the state machine had before the LIST goes with the page: names that changed since
//! are skipped there.

use crate::service::{Service, count};
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::command::IngestPage;
use ebb_metaplane_protocol::{Command, FsError, FsResult};
use ebb_namespace::Origin;
use ebb_s3::ListRequest;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Keys of one page: S3's own limit.
pub(super) const PAGE_KEYS: u32 = 1000;
/// Pages listed ahead of anybody who asked, in one go.
const BACKGROUND_PAGES_MAX: usize = 100;

/// One lock per directory being listed.
#[derive(Debug, Default)]
pub(crate) struct Listings(Mutex<HashMap<InodeId, Weak<tokio::sync::Mutex<()>>>>);

impl Listings {
    fn lock(&self, dir: InodeId) -> Arc<tokio::sync::Mutex<()>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = all.get(&dir).and_then(Weak::upgrade) {
            return lock;
        }
        all.retain(|_, lock| lock.strong_count() > 0);
        let lock = Arc::default();
        all.insert(dir, Arc::downgrade(&lock));
        lock
    }
}

impl Service {
    /// Lists one more page of a directory. `true`: it is complete.
    pub(crate) async fn list_page(&self, dir: InodeId) -> FsResult<bool> {
        let lock = self.listings.lock(dir);
        let before = self.origin(dir)?;
        let Origin::Listing { continuation: seen } = &before.1 else { return Ok(true) };
        let _listing = lock.lock().await;
        // Somebody else may have listed it meanwhile.
        let (prefix, origin, listed_at) = self.origin(dir)?;
        let Origin::Listing { continuation } = origin else { return Ok(true) };
        if continuation != *seen {
            return Ok(false);
        }
        count(&self.counts.lists);
        let request = ListRequest {
            prefix: prefix.clone(),
            delimiter: Some("/".into()),
            start_after: (!continuation.is_empty()).then(|| continuation.clone()),
            continuation: None,
            max_keys: Some(PAGE_KEYS),
        };
        let page =
            self.health.note(self.bucket.list(&request).await).map_err(|e| super::fs_error(&e))?;
        let (entries, last) = super::relist::entries_of(&page, &prefix);
        let next = page.next.is_some().then_some(last);
        let complete = next.is_none();
        let page = IngestPage { from: continuation, next };
        let command = Command::Ingest { dir, listed_at, entries, page: Some(page) };
        match self.submit_internal(command).await {
            // The listing was overtaken; whoever needs it asks again.
            Err(FsError::Invalid(_)) => Ok(false),
            Err(e) => Err(e),
            Ok(_) => Ok(complete),
        }
    }

    /// Prefix and progress of a directory, and the sequence of the state they were read from.
    fn origin(&self, dir: InodeId) -> FsResult<(String, Origin, u64)> {
        let read = self.voter.peek(|_, r| {
            let (prefix, origin) = r.directory_origin(dir)?;
            Ok((prefix, origin, r.sequence()?))
        });
        read.map_err(crate::service::fs_error)?
    }

    /// Lists a whole directory.
    pub(crate) async fn list_all(&self, dir: InodeId) -> FsResult<()> {
        while !self.list_page(dir).await? {}
        Ok(())
    }

    /// Lists everything below a directory, as a rename needs it.
    pub(crate) async fn list_below(&self, root: InodeId) -> FsResult<()> {
        loop {
            let dirs = self
                .voter
                .peek(|_, r| r.incomplete_under(root, 32))
                .map_err(crate::service::fs_error)??;
            if dirs.is_empty() {
                return Ok(());
            }
            futures::future::try_join_all(dirs.into_iter().map(|d| self.list_all(d))).await?;
        }
    }

    /// Begins to list a directory that somebody looked into, so that the next "not there" needs no
    /// question to S3.
    pub(crate) fn list_in_background(self: &Arc<Self>, dir: InodeId) {
        let lock = self.listings.lock(dir);
        if lock.try_lock().is_err() {
            return;
        }
        let service = Arc::clone(self);
        tokio::spawn(async move {
            for _ in 0..BACKGROUND_PAGES_MAX {
                match service.list_page(dir).await {
                    Ok(false) => {}
                    Ok(true) => return,
                    Err(e) => {
                        tracing::debug!(%dir, error = %e, "listing ahead stopped");
                        return;
                    }
                }
            }
        });
    }
}
