//! At an open, a clean file is compared with S3 if the last comparison is old: a change from outside
//! is seen by who opens after it (close-to-open). S3 that does not answer in time is not waited for:
//! what is known is served, and said once. A comparison that found nothing new costs no log entry:
//! when it was made is remembered here.

use super::attributes;
use crate::raft::propose::now;
use crate::service::{Service, count, fs_error};
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::flush::Adopt;
use ebb_metaplane_protocol::{Command, FsResult};
use ebb_namespace::Revalidation;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Comparisons remembered at most; past it the memory starts anew, which costs HEADs only.
const REMEMBERED_MAX: usize = 100_000;

/// Which etag was last seen at an inode's key, and when.
#[derive(Debug, Default)]
pub(crate) struct Comparisons(Mutex<HashMap<InodeId, (String, Instant)>>);

impl Comparisons {
    fn is_fresh(&self, inode: InodeId, etag: &str, limit: Duration) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&inode).is_some_and(|(seen, at)| seen == etag && at.elapsed() < limit)
    }

    /// `at`: when the HEAD was sent.
    fn unchanged(&self, inode: InodeId, etag: String, at: Instant) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= REMEMBERED_MAX {
            all.clear();
        }
        all.insert(inode, (etag, at));
    }
}

impl Service {
    /// Compares a file with its object if that is due, and adopts what changed.
    pub(crate) async fn revalidate(&self, inode: InodeId) -> FsResult<()> {
        let known = self.voter.peek(|_, r| r.revalidation(inode)).map_err(fs_error)?;
        let Ok(Some(known)) = known else { return Ok(()) };
        let age_ms = now().0.saturating_sub(known.validated.0) / 1_000_000;
        let due = age_ms >= i64::try_from(self.config.timings.revalidate_ms).unwrap_or(i64::MAX);
        let pause = Duration::from_millis(self.config.timings.revalidate_ms);
        if !due
            || self.comparisons.is_fresh(inode, &known.etag, pause)
            || !self.health.is_worth_trying()
        {
            return Ok(());
        }
        self.compare_with(inode, known).await
    }

    /// Compares a file with its object whether or not that is due: a core saw that they differ. Only
    /// a file that has no S3 work of ours in flight is taken to be changed from outside (R35).
    pub(crate) async fn compare(&self, inode: InodeId) -> FsResult<()> {
        let known = self.voter.peek(|_, r| r.revalidation(inode)).map_err(fs_error)?;
        match known {
            Ok(Some(known)) => self.compare_with(inode, known).await,
            _ => Ok(()),
        }
    }

    async fn compare_with(&self, inode: InodeId, known: Revalidation) -> FsResult<()> {
        let asked = Instant::now();
        let limit = Duration::from_millis(self.config.timings.revalidate_timeout_ms);
        let info = match tokio::time::timeout(limit, self.head(&known.key)).await {
            Ok(Ok(info)) => info,
            Ok(Err(_)) => return Ok(()),
            Err(_) => {
                self.health.failed("a HEAD at open took too long");
                return Ok(());
            }
        };
        if info.as_ref().is_some_and(|i| i.etag.as_str() == known.etag) {
            self.comparisons.unchanged(inode, known.etag, asked);
            return Ok(());
        }
        let object = match &info {
            None => None,
            Some(i) => Some(attributes::foreign(&self.bucket, &known.key, i).await?),
        };
        count(&self.counts.adopted);
        tracing::info!(key = known.key, "the object was changed from outside");
        let adopt = Adopt { inode, lineage: known.lineage, old_etag: Some(known.etag), object };
        self.submit_internal(Command::Adopt(vec![adopt])).await?;
        Ok(())
    }
}
