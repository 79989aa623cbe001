//! Mutations of whole objects: PUT, COPY, DELETE, each under an optional condition, sent once.
//!
//! I3: success is a 2xx that also carries the new etag. Everything else is an error, and
//! `Ambiguous` where the server may have acted.

use aws_sdk_s3::types::MetadataDirective;

use super::{Bucket, UploadBody, classify::classify};
use crate::{
    error::{ErrorKind, S3Error},
    operation::Operation,
    types::{Condition, Etag, Metadata},
};

impl Condition {
    /// The values of (If-Match, If-None-Match).
    pub(super) fn headers(&self) -> (Option<String>, Option<String>) {
        match self {
            Condition::None => (None, None),
            Condition::IfAbsent => (None, Some("*".to_owned())),
            Condition::IfMatch(etag) => (Some(etag.quoted()), None),
        }
    }
}

/// A 2xx of a mutation has to say which etag it made; without it the outcome is not known.
pub(super) fn made(op: Operation, key: &str, etag: Option<&str>) -> Result<Etag, S3Error> {
    match etag {
        Some(etag) if !etag.is_empty() => Ok(Etag::new(etag)),
        _ => Err(S3Error::new(ErrorKind::Ambiguous, op, key, "reply without an etag")),
    }
}

impl Bucket {
    /// PUT of a whole object.
    pub async fn put(
        &self,
        key: &str,
        body: impl Into<UploadBody>,
        metadata: &Metadata,
        condition: &Condition,
    ) -> Result<Etag, S3Error> {
        let op = Operation::Put;
        let full = self.full_key(op, key)?;
        let body = body.into();
        let (if_match, if_none_match) = condition.headers();
        let _permit = self.permit(op, key).await?;
        let reply = self
            .client()
            .put_object()
            .bucket(self.name())
            .key(full)
            .content_length(length(op, key, &body)?)
            .set_content_md5(self.config().content_md5.then(|| body.content_md5()))
            .set_metadata(sdk_metadata(metadata))
            .set_if_match(if_match)
            .set_if_none_match(if_none_match)
            .body(body.into_stream())
            .customize()
            // Content-MD5 guards the bytes; hashing them with SHA-256 too would cost as much again.
            .disable_payload_signing()
            .send()
            .await
            .map_err(|e| classify(op, key, e))?;
        made(op, key, reply.e_tag())
    }

    /// COPY within the bucket. `source_etag` is a condition on the source, `condition` one on the
    /// destination; a 412 does not say which failed. `metadata` replaces the source's, None keeps
    /// it. At most 5 GiB: larger objects are copied by part.
    pub async fn copy(
        &self,
        source: &str,
        source_etag: Option<&Etag>,
        key: &str,
        metadata: Option<&Metadata>,
        condition: &Condition,
    ) -> Result<Etag, S3Error> {
        let op = Operation::Copy;
        let full = self.full_key(op, key)?;
        let (if_match, if_none_match) = condition.headers();
        let directive = match metadata {
            Some(_) => MetadataDirective::Replace,
            None => MetadataDirective::Copy,
        };
        let _permit = self.permit(op, key).await?;
        let reply = self
            .client()
            .copy_object()
            .bucket(self.name())
            .key(full)
            .copy_source(self.copy_source(op, source)?)
            .set_copy_source_if_match(source_etag.map(Etag::quoted))
            .metadata_directive(directive)
            .set_metadata(metadata.and_then(sdk_metadata))
            .set_if_match(if_match)
            .set_if_none_match(if_none_match)
            .send()
            .await
            .map_err(|e| classify(op, key, e))?;
        made(op, key, reply.copy_object_result().and_then(|r| r.e_tag()))
    }

    /// DELETE; a key that is absent already is success, with a condition too.
    pub async fn delete(&self, key: &str, if_match: Option<&Etag>) -> Result<(), S3Error> {
        let op = Operation::Delete;
        let full = self.full_key(op, key)?;
        let _permit = self.permit(op, key).await?;
        let reply = self
            .client()
            .delete_object()
            .bucket(self.name())
            .key(full)
            .set_if_match(if_match.map(Etag::quoted))
            .send()
            .await;
        match reply.map_err(|e| classify(op, key, e)) {
            Ok(_) => Ok(()),
            Err(e) if e.kind == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }
}

pub(super) fn length(op: Operation, key: &str, body: &UploadBody) -> Result<i64, S3Error> {
    i64::try_from(body.len())
        .map_err(|_| S3Error::new(ErrorKind::Invalid, op, key, "body of absurd length"))
}

pub(super) fn sdk_metadata(
    metadata: &Metadata,
) -> Option<std::collections::HashMap<String, String>> {
    (!metadata.is_empty()).then(|| metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect())
}
