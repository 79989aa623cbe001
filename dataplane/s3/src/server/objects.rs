//! Object operations: from S3's inputs to the bucket store and back.

use std::collections::BTreeMap;

use s3s::{
    S3ErrorCode, S3Request, S3Response, S3Result,
    dto::{
        Checksum, CopyObjectInput, CopyObjectOutput, CopyObjectResult, CopySource, ETag,
        ETagCondition, GetObjectInput, GetObjectOutput, HeadObjectInput, HeadObjectOutput,
        MetadataDirective, PutObjectInput, PutObjectOutput, Range, StreamingBlob, Timestamp,
    },
    s3_error,
};

use super::{
    body::FileBody,
    bucket::Opened,
    conditions::ReadConditions,
    format::Head,
    now_ns,
    service::Service,
    stage::{BODY_BYTES_MAX, Claims, Source},
};
use crate::types::Metadata;

/// User metadata, names and values together. AWS allows 2 KiB.
const METADATA_BYTES_MAX: usize = 8 * 1024;
const CONTENT_TYPE_DEFAULT: &str = "binary/octet-stream";

pub(super) fn timestamp(ns: i64) -> Timestamp {
    let time = time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(ns));
    Timestamp::from(time.unwrap_or(time::OffsetDateTime::UNIX_EPOCH))
}

pub(super) fn strong(etag: &str) -> ETag {
    ETag::Strong(etag.to_owned())
}

/// The size as S3's signed numbers; sizes are bounded far below their end.
pub(super) fn signed(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

pub(super) fn user_metadata(given: Option<s3s::dto::Metadata>) -> S3Result<Metadata> {
    let metadata: Metadata =
        given.into_iter().flatten().map(|(k, v)| (k.to_ascii_lowercase(), v)).collect();
    let bytes: usize = metadata.iter().map(|(k, v)| k.len() + v.len()).sum();
    if bytes > METADATA_BYTES_MAX {
        return Err(s3_error!(MetadataTooLarge));
    }
    Ok(metadata)
}

/// The headers that are kept with an object, those of them that were given.
pub(super) fn kept_headers<const N: usize>(
    given: [(&str, &Option<String>); N],
) -> BTreeMap<String, String> {
    given.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value.clone()?))).collect()
}

/// The body's length: that of its content where it comes in signed chunks.
pub(super) fn body_length<T>(req: &S3Request<T>, content_length: Option<i64>) -> Option<i64> {
    let decoded = req.headers.get("x-amz-decoded-content-length");
    decoded.and_then(|value| value.to_str().ok()?.parse().ok()).or(content_length)
}

/// The length of the reply and where it starts, if the request had a range.
fn resolve(range: Option<&Range>, size: u64) -> S3Result<(std::ops::Range<u64>, bool)> {
    match range {
        None => Ok((0..size, false)),
        Some(range) => match range.check(size) {
            Ok(range) if range.start < range.end => Ok((range, true)),
            _ => Err(s3_error!(InvalidRange, "the object has {size} bytes")),
        },
    }
}

fn content_range(range: &std::ops::Range<u64>, size: u64) -> String {
    format!("bytes {}-{}/{size}", range.start, range.end.saturating_sub(1))
}

impl Service {
    pub(super) async fn put(
        &self,
        mut req: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        let length = body_length(&req, req.input.content_length);
        let trailers = req.trailing_headers.take();
        let input = req.input;
        let bucket = self.store.bucket(&input.bucket)?;
        let (if_match, if_none_match) = (input.if_match, input.if_none_match);
        let head = Head {
            key: input.key,
            etag: String::new(),
            size: 0,
            modified_ns: now_ns(),
            metadata: user_metadata(input.metadata)?,
            headers: kept_headers([
                ("content-type", &input.content_type),
                ("cache-control", &input.cache_control),
                ("content-disposition", &input.content_disposition),
                ("content-encoding", &input.content_encoding),
                ("content-language", &input.content_language),
            ]),
            upload: None,
        };
        let claims = Claims {
            length,
            md5: input.content_md5,
            checksum: Checksum {
                checksum_crc32: input.checksum_crc32,
                checksum_crc32c: input.checksum_crc32c,
                checksum_crc64nvme: input.checksum_crc64nvme,
                checksum_sha1: input.checksum_sha1,
                checksum_sha256: input.checksum_sha256,
                ..Checksum::default()
            },
            trailers,
        };
        let staged = bucket.staging.receive(head, input.body, claims).await?;
        let entry = bucket.commit(staged, if_match, if_none_match).await?;
        let output =
            PutObjectOutput { e_tag: Some(strong(&entry.etag)), ..PutObjectOutput::default() };
        Ok(S3Response::new(output))
    }

    async fn open(
        &self,
        bucket: &str,
        key: &str,
        conditions: ReadConditions<'_>,
    ) -> S3Result<Opened> {
        let opened = self.store.bucket(bucket)?.open_object(key).await?;
        let head = &opened.head;
        conditions.check(&head.etag, head.modified_ns, S3ErrorCode::NotModified)?;
        Ok(opened)
    }

    pub(super) async fn get(
        &self,
        req: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        let input = &req.input;
        let conditions = ReadConditions {
            if_match: input.if_match.as_ref(),
            if_none_match: input.if_none_match.as_ref(),
            if_modified_since: input.if_modified_since.as_ref(),
            if_unmodified_since: input.if_unmodified_since.as_ref(),
        };
        let Opened { file, mut head, offset } =
            self.open(&input.bucket, &input.key, conditions).await?;
        let (range, partial) = resolve(input.range.as_ref(), head.size)?;
        let mut take = |name: &str| head.headers.remove(name);
        let output = GetObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_type: take("content-type").or_else(|| Some(CONTENT_TYPE_DEFAULT.to_owned())),
            cache_control: take("cache-control"),
            content_disposition: take("content-disposition"),
            content_encoding: take("content-encoding"),
            content_language: take("content-language"),
            content_length: Some(signed(range.end - range.start)),
            content_range: partial.then(|| content_range(&range, head.size)),
            e_tag: Some(strong(&head.etag)),
            last_modified: Some(timestamp(head.modified_ns)),
            metadata: Some(head.metadata.into_iter().collect()),
            body: Some(StreamingBlob::new(FileBody::new(
                file,
                offset + range.start,
                offset + range.end,
            ))),
            ..GetObjectOutput::default()
        };
        Ok(S3Response::new(output))
    }

    pub(super) async fn head(
        &self,
        req: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = &req.input;
        let conditions = ReadConditions {
            if_match: input.if_match.as_ref(),
            if_none_match: input.if_none_match.as_ref(),
            if_modified_since: input.if_modified_since.as_ref(),
            if_unmodified_since: input.if_unmodified_since.as_ref(),
        };
        let Opened { mut head, .. } = self.open(&input.bucket, &input.key, conditions).await?;
        let (range, partial) = resolve(input.range.as_ref(), head.size)?;
        let mut take = |name: &str| head.headers.remove(name);
        let output = HeadObjectOutput {
            accept_ranges: Some("bytes".to_owned()),
            content_type: take("content-type").or_else(|| Some(CONTENT_TYPE_DEFAULT.to_owned())),
            cache_control: take("cache-control"),
            content_disposition: take("content-disposition"),
            content_encoding: take("content-encoding"),
            content_language: take("content-language"),
            content_length: Some(signed(range.end - range.start)),
            content_range: partial.then(|| content_range(&range, head.size)),
            e_tag: Some(strong(&head.etag)),
            last_modified: Some(timestamp(head.modified_ns)),
            metadata: Some(head.metadata.into_iter().collect()),
            ..HeadObjectOutput::default()
        };
        Ok(S3Response::new(output))
    }

    /// The source of a copy, opened and its conditions checked.
    pub(super) async fn open_source(
        &self,
        source: &CopySource,
        conditions: ReadConditions<'_>,
    ) -> S3Result<Opened> {
        let CopySource::Bucket { bucket, key, version_id: None } = source else {
            return Err(s3_error!(NotImplemented, "copy sources are plain bucket/key"));
        };
        let opened = self.store.bucket(bucket)?.open_object(key).await?;
        let head = &opened.head;
        conditions.check(&head.etag, head.modified_ns, S3ErrorCode::PreconditionFailed)?;
        Ok(opened)
    }

    pub(super) async fn copy(
        &self,
        req: S3Request<CopyObjectInput>,
    ) -> S3Result<S3Response<CopyObjectOutput>> {
        // s3s has no fields for the conditions on the destination.
        let condition = |name: &str| match req.headers.get(name) {
            None => Ok(None),
            Some(value) => ETagCondition::parse_http_header(value.as_bytes())
                .map(Some)
                .map_err(|e| s3_error!(InvalidArgument, "{name}: {e}")),
        };
        let (if_match, if_none_match) = (condition("if-match")?, condition("if-none-match")?);
        let input = req.input;
        let bucket = self.store.bucket(&input.bucket)?;
        let conditions = ReadConditions {
            if_match: input.copy_source_if_match.as_ref(),
            if_none_match: input.copy_source_if_none_match.as_ref(),
            if_modified_since: input.copy_source_if_modified_since.as_ref(),
            if_unmodified_since: input.copy_source_if_unmodified_since.as_ref(),
        };
        let Opened { file, head: source, offset } =
            self.open_source(&input.copy_source, conditions).await?;
        if source.size > BODY_BYTES_MAX {
            return Err(s3_error!(InvalidRequest, "objects above 5 GiB are copied by part"));
        }
        bucket.precheck(&input.key, if_match.as_ref(), if_none_match.as_ref()).await?;
        let replace = input
            .metadata_directive
            .as_ref()
            .is_some_and(|d| d.as_str() == MetadataDirective::REPLACE);
        let (metadata, headers) = if replace {
            let headers = kept_headers([
                ("content-type", &input.content_type),
                ("cache-control", &input.cache_control),
                ("content-disposition", &input.content_disposition),
                ("content-encoding", &input.content_encoding),
                ("content-language", &input.content_language),
            ]);
            (user_metadata(input.metadata)?, headers)
        } else {
            (source.metadata, source.headers)
        };
        // The etag of a whole object is its MD5, so a copy has the same; one of parts does not.
        let of_parts = source.etag.contains('-');
        let head = Head {
            key: input.key,
            etag: if of_parts { String::new() } else { source.etag },
            size: 0,
            modified_ns: now_ns(),
            metadata,
            headers,
            upload: None,
        };
        let body = vec![Source::Range(file, offset..offset + source.size)];
        let staged = bucket.staging.assemble(head, body, of_parts).await?;
        let entry = bucket.commit(staged, if_match, if_none_match).await?;
        let result = CopyObjectResult {
            e_tag: Some(strong(&entry.etag)),
            last_modified: Some(timestamp(entry.modified_ns)),
            ..CopyObjectResult::default()
        };
        let output =
            CopyObjectOutput { copy_object_result: Some(result), ..CopyObjectOutput::default() };
        Ok(S3Response::new(output))
    }
}
