//! A name in a directory that is not completely listed: HEAD the file's key, LIST below the
//! directory's, and enter what is there.

use super::attributes;
use crate::service::{Service, count};
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::flush::{IngestEntry, IngestObject};
use ebb_metaplane_protocol::{Command, FsError, FsResult};
use ebb_s3::{ListRequest, ObjectInfo, S3Error};

impl Service {
    /// HEAD; `None`: no such object.
    pub(crate) async fn head(&self, key: &str) -> Result<Option<ObjectInfo>, S3Error> {
        let _permit = self.heads.acquire().await;
        count(&self.counts.heads);
        match self.health.note(self.bucket.head(key).await) {
            Ok(info) => Ok(Some(info)),
            Err(e) if e.is_not_found() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Whether any key is below a prefix (a marker counts).
    async fn any_below(&self, prefix: &str) -> Result<bool, S3Error> {
        count(&self.counts.lists);
        let request =
            ListRequest { prefix: prefix.to_owned(), max_keys: Some(1), ..ListRequest::default() };
        let page = self.health.note(self.bucket.list(&request).await)?;
        Ok(!page.objects.is_empty())
    }

    /// Asks S3 for a name and enters what it finds. `false`: nothing of that name is there.
    pub(crate) async fn look_up(
        &self,
        dir: InodeId,
        name: &[u8],
        file_key: &str,
        dir_key: &str,
    ) -> FsResult<bool> {
        let failed = |e: S3Error| super::fs_error(&e);
        let listed_at =
            self.voter.peek(|_, r| r.sequence()).map_err(crate::service::fs_error)??;
        let (file, below) = tokio::join!(self.head(file_key), self.any_below(dir_key));
        let entry = match (file.map_err(failed)?, below.map_err(failed)?) {
            (Some(info), _) => IngestEntry {
                name: name.to_vec(),
                object: Some(IngestObject {
                    key: file_key.to_owned(),
                    etag: info.etag.as_str().to_owned(),
                    size: info.size,
                }),
                attrs: attributes::of_object(&self.bucket, file_key, &info).await?,
            },
            (None, true) => self.found_dir(name, dir_key).await?,
            (None, false) => return Ok(false),
        };
        let entries = vec![entry];
        match self.submit_internal(Command::Ingest { dir, listed_at, entries, page: None }).await {
            Ok(_) => Ok(true),
            // Overtaken by a delete: look at the state again.
            Err(FsError::Invalid(_)) => Ok(true),
            Err(e) => Err(e),
        }
    }

    async fn found_dir(&self, name: &[u8], dir_key: &str) -> FsResult<IngestEntry> {
        let marker = self.head(dir_key).await.map_err(|e| super::fs_error(&e))?;
        Ok(match marker {
            Some(info) => IngestEntry {
                name: name.to_vec(),
                object: Some(IngestObject {
                    key: dir_key.to_owned(),
                    etag: info.etag.as_str().to_owned(),
                    size: info.size,
                }),
                attrs: attributes::of_object(&self.bucket, dir_key, &info).await?,
            },
            None => IngestEntry {
                name: name.to_vec(),
                object: None,
                attrs: attributes::of_prefix(true),
            },
        })
    }
}
