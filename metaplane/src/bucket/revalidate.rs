//! At an open, a clean file is compared with S3 if the last comparison is old: a change from outside
//! is seen by who opens after it (close-to-open). S3 that does not answer in time is not waited for:
//! what is known is served, and said once.

use super::attributes;
use crate::raft::propose::now;
use crate::service::{Service, count, fs_error};
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::flush::{Adopt, ForeignObject};
use ebb_metaplane_protocol::{Command, FsResult};
use std::time::Duration;

impl Service {
    /// Compares a file with its object if that is due, and adopts what changed.
    pub(crate) async fn revalidate(&self, inode: InodeId) -> FsResult<()> {
        let known = self.voter.peek(|_, r| r.revalidation(inode)).map_err(fs_error)?;
        let Ok(Some(known)) = known else { return Ok(()) };
        let age_ms = now().0.saturating_sub(known.validated.0) / 1_000_000;
        let due = age_ms >= i64::try_from(self.config.timings.revalidate_ms).unwrap_or(i64::MAX);
        if !due || !self.health.is_worth_trying() {
            return Ok(());
        }
        let limit = Duration::from_millis(self.config.timings.revalidate_timeout_ms);
        let info = match tokio::time::timeout(limit, self.head(&known.key)).await {
            Ok(Ok(info)) => info,
            Ok(Err(_)) => return Ok(()),
            Err(_) => {
                self.health.failed("a HEAD at open took too long");
                return Ok(());
            }
        };
        let unchanged = info.as_ref().is_some_and(|i| i.etag.as_str() == known.etag);
        let object = match &info {
            None => None,
            // What is the same needs no attributes: only the time of the comparison is noted.
            Some(i) if unchanged => Some(ForeignObject {
                etag: i.etag.as_str().to_owned(),
                size: i.size,
                attrs: attributes::of_prefix(false),
            }),
            Some(i) => Some(attributes::foreign(&self.bucket, &known.key, i).await?),
        };
        if !unchanged {
            count(&self.counts.adopted);
            tracing::info!(key = known.key, "the object was changed from outside");
        }
        let adopt = Adopt { inode, lineage: known.lineage, old_etag: Some(known.etag), object };
        self.submit_internal(Command::Adopt(vec![adopt])).await?;
        Ok(())
    }
}
