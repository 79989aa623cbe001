//! Multipart uploads: create, parts from memory or from another object, complete, abort, list.
//!
//! Each call is sent once. A part upload whose reply is lost may be sent again by the caller (it
//! overwrites the same part); a Complete whose reply is lost has to be looked up (I3).

use std::ops::Range;

use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart, EncodingType};

use super::{
    Bucket, UploadBody,
    classify::classify,
    foreign_xml,
    read::{decode, system_time},
    write::{length, made, sdk_metadata},
};
use crate::{
    error::{ErrorKind, S3Error},
    operation::Operation,
    types::{Condition, Etag, ListedPart, ListedUpload, Metadata, PART_NUMBER_MAX, Part, UploadId},
};

/// Pages a listing of uploads or parts may have before the server is taken to be looping.
const PAGES_MAX: usize = 10_000;

impl Bucket {
    pub async fn create_multipart(
        &self,
        key: &str,
        metadata: &Metadata,
    ) -> Result<UploadId, S3Error> {
        let op = Operation::CreateMultipart;
        let full = self.full_key(op, key)?;
        let _permit = self.permit(op, key).await?;
        let reply = self
            .client()
            .create_multipart_upload()
            .bucket(self.name())
            .key(full)
            .set_metadata(sdk_metadata(metadata))
            .customize()
            .interceptor(foreign_xml::CREATE)
            .send()
            .await
            .map_err(|e| classify(op, key, e))?;
        match reply.upload_id() {
            Some(id) if !id.is_empty() => Ok(UploadId::new(id)),
            _ => Err(S3Error::new(ErrorKind::Ambiguous, op, key, "reply without an upload id")),
        }
    }

    pub async fn upload_part(
        &self,
        key: &str,
        upload: &UploadId,
        number: u32,
        body: impl Into<UploadBody>,
    ) -> Result<Part, S3Error> {
        let op = Operation::UploadPart;
        let full = self.full_key(op, key)?;
        let body = body.into();
        let _permit = self.permit(op, key).await?;
        let reply = self
            .client()
            .upload_part()
            .bucket(self.name())
            .key(full)
            .upload_id(upload.as_str())
            .part_number(part_number(op, key, number)?)
            .content_length(length(op, key, &body)?)
            .set_content_md5(self.config().content_md5.then(|| body.content_md5()))
            .body(body.into_stream())
            .customize()
            .disable_payload_signing()
            .send()
            .await
            .map_err(|e| classify(op, key, e))?;
        Ok(Part { number, etag: made(op, key, reply.e_tag())? })
    }

    /// A part taken from another object by the server itself.
    pub async fn upload_part_copy(
        &self,
        key: &str,
        upload: &UploadId,
        number: u32,
        source: &str,
        source_etag: Option<&Etag>,
        range: Range<u64>,
    ) -> Result<Part, S3Error> {
        let op = Operation::UploadPartCopy;
        let full = self.full_key(op, key)?;
        if range.start >= range.end {
            let text = format!("empty range {}..{}", range.start, range.end);
            return Err(S3Error::new(ErrorKind::Invalid, op, key, text));
        }
        let _permit = self.permit(op, key).await?;
        let reply = self
            .client()
            .upload_part_copy()
            .bucket(self.name())
            .key(full)
            .upload_id(upload.as_str())
            .part_number(part_number(op, key, number)?)
            .copy_source(self.copy_source(op, source)?)
            .copy_source_range(format!("bytes={}-{}", range.start, range.end - 1))
            .set_copy_source_if_match(source_etag.map(Etag::quoted))
            .send()
            .await
            .map_err(|e| classify(op, key, e))?;
        let etag = made(op, key, reply.copy_part_result().and_then(|r| r.e_tag()))?;
        Ok(Part { number, etag })
    }

    pub async fn complete_multipart(
        &self,
        key: &str,
        upload: &UploadId,
        parts: &[Part],
        condition: &Condition,
    ) -> Result<Etag, S3Error> {
        let op = Operation::CompleteMultipart;
        let full = self.full_key(op, key)?;
        let mut named = Vec::with_capacity(parts.len());
        for part in parts {
            named.push(
                CompletedPart::builder()
                    .part_number(part_number(op, key, part.number)?)
                    .e_tag(part.etag.quoted())
                    .build(),
            );
        }
        let (if_match, if_none_match) = condition.headers();
        let _permit = self.permit(op, key).await?;
        let reply = self
            .client()
            .complete_multipart_upload()
            .bucket(self.name())
            .key(full)
            .upload_id(upload.as_str())
            .multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(named)).build())
            .set_if_match(if_match)
            .set_if_none_match(if_none_match)
            .customize()
            .interceptor(foreign_xml::COMPLETE)
            .send()
            .await
            .map_err(|e| classify(op, key, e))?;
        made(op, key, reply.e_tag())
    }

    /// Ends an upload; one that is gone already is success.
    pub async fn abort_multipart(&self, key: &str, upload: &UploadId) -> Result<(), S3Error> {
        let op = Operation::AbortMultipart;
        let full = self.full_key(op, key)?;
        let _permit = self.permit(op, key).await?;
        let reply = self
            .client()
            .abort_multipart_upload()
            .bucket(self.name())
            .key(full)
            .upload_id(upload.as_str())
            .send()
            .await;
        match reply.map_err(|e| classify(op, key, e)) {
            Ok(_) => Ok(()),
            Err(e) if e.kind == ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// The parts an upload has so far, ascending.
    pub async fn list_parts(
        &self,
        key: &str,
        upload: &UploadId,
    ) -> Result<Vec<ListedPart>, S3Error> {
        let op = Operation::ListParts;
        let full = self.full_key(op, key)?;
        let mut parts = Vec::new();
        let mut marker: Option<String> = None;
        for _ in 0..PAGES_MAX {
            let (reply, _permit) = self
                .read(op, key, || {
                    self.client()
                        .list_parts()
                        .bucket(self.name())
                        .key(&full)
                        .upload_id(upload.as_str())
                        .set_part_number_marker(marker.clone())
                        .customize()
                        .interceptor(foreign_xml::LIST_PARTS)
                        .send()
                })
                .await?;
            for part in reply.parts() {
                let number = part.part_number().and_then(|n| u32::try_from(n).ok());
                let size = part.size().and_then(|n| u64::try_from(n).ok());
                let (Some(number), Some(size), Some(etag)) = (number, size, part.e_tag()) else {
                    let text = "a listed part lacks number, size or etag";
                    return Err(S3Error::new(ErrorKind::Integrity, op, key, text));
                };
                parts.push(ListedPart { number, etag: Etag::new(etag), size });
            }
            if reply.is_truncated() != Some(true) {
                return Ok(parts);
            }
            marker = reply.next_part_number_marker().map(str::to_owned);
        }
        Err(S3Error::new(ErrorKind::Integrity, op, key, "the listing does not end"))
    }

    /// Uploads under `prefix` that were neither completed nor aborted.
    pub async fn list_multipart_uploads(&self, prefix: &str) -> Result<Vec<ListedUpload>, S3Error> {
        let op = Operation::ListMultipartUploads;
        let full = format!("{}{prefix}", self.inner.prefix);
        let mut uploads = Vec::new();
        let (mut key_marker, mut id_marker): (Option<String>, Option<String>) = (None, None);
        for _ in 0..PAGES_MAX {
            let (reply, _permit) = self
                .read(op, prefix, || {
                    self.client()
                        .list_multipart_uploads()
                        .bucket(self.name())
                        .set_prefix((!full.is_empty()).then(|| full.clone()))
                        .set_key_marker(key_marker.clone())
                        .set_upload_id_marker(id_marker.clone())
                        .encoding_type(EncodingType::Url)
                        .send()
                })
                .await?;
            let encoded = reply.encoding_type() == Some(&EncodingType::Url);
            for upload in reply.uploads() {
                let (Some(key), Some(id)) = (upload.key(), upload.upload_id()) else {
                    let text = "a listed upload lacks key or id";
                    return Err(S3Error::new(ErrorKind::Integrity, op, prefix, text));
                };
                uploads.push(ListedUpload {
                    key: self.relative(op, decode(key, encoded))?,
                    upload: UploadId::new(id),
                    initiated: upload.initiated().map(|t| system_time(Some(t))),
                });
            }
            if reply.is_truncated() != Some(true) {
                return Ok(uploads);
            }
            key_marker = reply.next_key_marker().map(|k| decode(k, encoded));
            id_marker = reply.next_upload_id_marker().map(str::to_owned);
        }
        Err(S3Error::new(ErrorKind::Integrity, op, prefix, "the listing does not end"))
    }
}

fn part_number(op: Operation, key: &str, number: u32) -> Result<i32, S3Error> {
    match i32::try_from(number) {
        Ok(n) if (1..=PART_NUMBER_MAX).contains(&number) => Ok(n),
        _ => {
            let text = format!("part number {number} is not in 1..={PART_NUMBER_MAX}");
            Err(S3Error::new(ErrorKind::Invalid, op, key, text))
        }
    }
}
