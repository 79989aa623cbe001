//! Attributes of inodes that only a LIST has shown: HEAD each, many at once, before anyone sees them.

use super::attributes;
use crate::service::{Service, fs_error};
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::flush::{Adopt, IngestAttrs};
use ebb_metaplane_protocol::{Command, FsResult};
use futures::{StreamExt, TryStreamExt};

/// HEADs of one request in flight at most.
const CONCURRENCY: usize = 32;

enum Found {
    Attrs(InodeId, String, IngestAttrs),
    Gone(Adopt),
    Known,
}

impl Service {
    /// Completes the attributes of these inodes, as far as they are not.
    pub(crate) async fn hydrate(&self, inodes: Vec<InodeId>) -> FsResult<()> {
        let found: Vec<Found> = futures::stream::iter(inodes)
            .map(|inode| self.head_attrs(inode))
            .buffer_unordered(CONCURRENCY)
            .try_collect()
            .await?;
        let mut attrs = Vec::new();
        let mut gone = Vec::new();
        for f in found {
            match f {
                Found::Attrs(inode, etag, a) => attrs.push((inode, etag, a)),
                Found::Gone(adopt) => gone.push(adopt),
                Found::Known => {}
            }
        }
        if !attrs.is_empty() {
            self.submit_internal(Command::SetIngestAttrs(attrs)).await?;
        }
        if !gone.is_empty() {
            self.submit_internal(Command::Adopt(gone)).await?;
        }
        Ok(())
    }

    async fn head_attrs(&self, inode: InodeId) -> FsResult<Found> {
        let file = self.voter.peek(|_, r| r.file_of(inode)).map_err(fs_error)?;
        let Ok(inode) = file else { return Ok(Found::Known) };
        let source = self.voter.peek(|_, r| r.attrs_source(inode)).map_err(fs_error)?;
        // Gone meanwhile: whoever asked sees that.
        let Ok(Some((key, etag))) = source else { return Ok(Found::Known) };
        let info = self.head(&key).await.map_err(|e| super::fs_error(&e))?;
        match info {
            Some(info) if etag.is_empty() || info.etag.as_str() == etag => {
                let attrs = attributes::of_object(&self.bucket, &key, &info).await?;
                Ok(Found::Attrs(inode, info.etag.as_str().to_owned(), attrs))
            }
            // A directory without a marker has the attributes of none.
            None if etag.is_empty() => {
                Ok(Found::Attrs(inode, String::new(), attributes::of_prefix(true)))
            }
            changed => {
                let lineage = self.voter.peek(|_, r| r.attr(inode)).map_err(fs_error)?;
                let Ok((attr, _)) = lineage else { return Ok(Found::Known) };
                let object = match changed {
                    Some(info) => Some(attributes::foreign(&self.bucket, &key, &info).await?),
                    None => None,
                };
                let old_etag = Some(etag);
                Ok(Found::Gone(Adopt { inode, lineage: attr.lineage, old_etag, object }))
            }
        }
    }
}
