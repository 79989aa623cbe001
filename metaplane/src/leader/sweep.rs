//! Multipart uploads that a leader began and never ended: aborted when this one starts, because no
//! upload outlives its leader (a new one begins each file anew).

use crate::service::Service;
use futures::StreamExt;

/// Aborts in flight at most.
const CONCURRENCY: usize = 16;

impl Service {
    /// Aborts every upload under the prefix that was begun before this process owned the bucket.
    pub(crate) async fn sweep_uploads(&self, owned_since: std::time::SystemTime) {
        let uploads = match self.bucket.list_multipart_uploads("").await {
            Ok(uploads) => uploads,
            Err(e) => {
                tracing::warn!(error = %e, "unfinished uploads were not swept");
                return;
            }
        };
        let old = uploads.into_iter().filter(|u| u.initiated.is_none_or(|at| at < owned_since));
        futures::stream::iter(old)
            .for_each_concurrent(CONCURRENCY, |u| async move {
                match self.bucket.abort_multipart(&u.key, &u.upload).await {
                    Ok(()) => tracing::info!(key = u.key, "aborted an unfinished upload"),
                    Err(e) => tracing::warn!(error = %e, "an unfinished upload stays"),
                }
            })
            .await;
    }
}
