//! Multipart operations: from S3's inputs to the uploads on disk and back.

use s3s::{
    S3Request, S3Response, S3Result,
    dto::{
        AbortMultipartUploadInput, AbortMultipartUploadOutput, Checksum,
        CompleteMultipartUploadInput, CompleteMultipartUploadOutput, CopyPartResult,
        CreateMultipartUploadInput, CreateMultipartUploadOutput, EncodingType,
        ListMultipartUploadsInput, ListMultipartUploadsOutput, ListPartsInput, ListPartsOutput,
        MultipartUpload, Part, Range, UploadPartCopyInput, UploadPartCopyOutput, UploadPartInput,
        UploadPartOutput,
    },
    s3_error,
};

use super::{
    bucket::Opened,
    conditions::ReadConditions,
    format::Head,
    listing::url_encode,
    now_ns,
    objects::{body_length, kept_headers, signed, strong, timestamp, user_metadata},
    service::{PAGE_MAX, Service, page_size},
    stage::{BODY_BYTES_MAX, Claims, Source},
};
use crate::types::PART_NUMBER_MAX;

fn part_number(number: i32) -> S3Result<u32> {
    match u32::try_from(number) {
        Ok(n) if (1..=PART_NUMBER_MAX).contains(&n) => Ok(n),
        _ => Err(s3_error!(InvalidArgument, "part numbers are 1 to {PART_NUMBER_MAX}")),
    }
}

/// A part's own head: only etag, size and time matter.
fn part_head(key: &str) -> Head {
    Head {
        key: key.to_owned(),
        etag: String::new(),
        size: 0,
        modified_ns: now_ns(),
        metadata: Default::default(),
        headers: Default::default(),
        upload: None,
    }
}

impl Service {
    pub(super) async fn create_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = req.input;
        let bucket = self.store.bucket(&input.bucket)?;
        let head = Head {
            metadata: user_metadata(input.metadata)?,
            headers: kept_headers([
                ("content-type", &input.content_type),
                ("cache-control", &input.cache_control),
                ("content-disposition", &input.content_disposition),
                ("content-encoding", &input.content_encoding),
                ("content-language", &input.content_language),
            ]),
            ..part_head(&input.key)
        };
        let id = bucket.create_upload(head).await?;
        let output = CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            ..CreateMultipartUploadOutput::default()
        };
        Ok(S3Response::new(output))
    }

    pub(super) async fn put_part(
        &self,
        mut req: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let length = body_length(&req, req.input.content_length);
        let trailers = req.trailing_headers.take();
        let input = req.input;
        let number = part_number(input.part_number)?;
        let bucket = self.store.bucket(&input.bucket)?;
        let upload = bucket.uploads.find(&input.key, &input.upload_id)?;
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
        let staged = bucket.staging.receive(part_head(&input.key), input.body, claims).await?;
        let entry = upload.put_part(number, staged).await?;
        let output =
            UploadPartOutput { e_tag: Some(strong(&entry.etag)), ..UploadPartOutput::default() };
        Ok(S3Response::new(output))
    }

    pub(super) async fn copy_part(
        &self,
        req: S3Request<UploadPartCopyInput>,
    ) -> S3Result<S3Response<UploadPartCopyOutput>> {
        let input = req.input;
        let number = part_number(input.part_number)?;
        let bucket = self.store.bucket(&input.bucket)?;
        let upload = bucket.uploads.find(&input.key, &input.upload_id)?;
        let conditions = ReadConditions {
            if_match: input.copy_source_if_match.as_ref(),
            if_none_match: input.copy_source_if_none_match.as_ref(),
            if_modified_since: input.copy_source_if_modified_since.as_ref(),
            if_unmodified_since: input.copy_source_if_unmodified_since.as_ref(),
        };
        let Opened { file, head: source, offset } =
            self.open_source(&input.copy_source, conditions).await?;
        let range = match &input.copy_source_range {
            None => 0..source.size,
            Some(text) => match Range::parse(text) {
                // Unlike a GET's, this range is not clipped: it has to lie in the source.
                Ok(Range::Int { first, last: Some(last) }) if last < source.size => first..last + 1,
                _ => return Err(s3_error!(InvalidArgument, "range '{text}' of {}", source.size)),
            },
        };
        if range.end - range.start > BODY_BYTES_MAX {
            return Err(s3_error!(EntityTooLarge));
        }
        let body = vec![Source::Range(file, offset + range.start..offset + range.end)];
        let staged = bucket.staging.assemble(part_head(&input.key), body, true).await?;
        let entry = upload.put_part(number, staged).await?;
        let result = CopyPartResult {
            e_tag: Some(strong(&entry.etag)),
            last_modified: Some(timestamp(entry.modified_ns)),
            ..CopyPartResult::default()
        };
        let output = UploadPartCopyOutput {
            copy_part_result: Some(result),
            ..UploadPartCopyOutput::default()
        };
        Ok(S3Response::new(output))
    }

    pub(super) async fn complete(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = req.input;
        let bucket = self.store.bucket(&input.bucket)?;
        let upload = bucket.uploads.find(&input.key, &input.upload_id)?;
        let given = input.multipart_upload.and_then(|m| m.parts).unwrap_or_default();
        if given.len() > PART_NUMBER_MAX as usize {
            return Err(s3_error!(MalformedXML, "more than {PART_NUMBER_MAX} parts"));
        }
        let mut named = Vec::with_capacity(given.len());
        for part in given {
            let number = part.part_number.ok_or_else(|| s3_error!(MalformedXML))?;
            named.push((part_number(number)?, part.e_tag.map(|etag| etag.into_value())));
        }
        let (if_match, if_none_match) = (input.if_match, input.if_none_match);
        let entry =
            bucket.complete_upload(upload, named, now_ns(), if_match, if_none_match).await?;
        let output = CompleteMultipartUploadOutput {
            location: Some(format!("/{}/{}", input.bucket, url_encode(&input.key))),
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(strong(&entry.etag)),
            ..CompleteMultipartUploadOutput::default()
        };
        Ok(S3Response::new(output))
    }

    pub(super) async fn abort(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let bucket = self.store.bucket(&req.input.bucket)?;
        let upload = bucket.uploads.find(&req.input.key, &req.input.upload_id)?;
        bucket.abort_upload(upload).await?;
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }

    pub(super) async fn parts(
        &self,
        req: S3Request<ListPartsInput>,
    ) -> S3Result<S3Response<ListPartsOutput>> {
        let input = req.input;
        let bucket = self.store.bucket(&input.bucket)?;
        let upload = bucket.uploads.find(&input.key, &input.upload_id)?;
        let max = page_size(input.max_parts)?;
        let marker = input.part_number_marker.unwrap_or(0);
        let mut listed = upload.parts().await?;
        listed.retain(|(number, _)| i64::from(*number) > i64::from(marker));
        let truncated = max > 0 && listed.len() > max;
        listed.truncate(max);
        let number = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
        let output = ListPartsOutput {
            next_part_number_marker: listed.last().filter(|_| truncated).map(|(n, _)| number(*n)),
            parts: Some(
                listed
                    .into_iter()
                    .map(|(n, part)| Part {
                        part_number: Some(number(n)),
                        e_tag: Some(strong(&part.etag)),
                        size: Some(signed(part.size)),
                        last_modified: Some(timestamp(part.modified_ns)),
                        ..Part::default()
                    })
                    .collect(),
            ),
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(input.upload_id),
            max_parts: Some(i32::try_from(max).unwrap_or(PAGE_MAX)),
            part_number_marker: Some(marker),
            is_truncated: Some(truncated),
            ..ListPartsOutput::default()
        };
        Ok(S3Response::new(output))
    }

    pub(super) async fn uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let input = req.input;
        let bucket = self.store.bucket(&input.bucket)?;
        let max = page_size(input.max_uploads)?;
        let prefix = input.prefix.clone().unwrap_or_default();
        let after = input
            .key_marker
            .clone()
            .filter(|key| !key.is_empty())
            .map(|key| (key, input.upload_id_marker.clone().filter(|id| !id.is_empty())));
        let (listed, truncated) = bucket.uploads.list(&prefix, after, max);
        let encoded = input.encoding_type.as_ref().is_some_and(|e| e.as_str() == EncodingType::URL);
        let text = |t: &str| if encoded { url_encode(t) } else { t.to_owned() };
        let last = listed.last().filter(|_| truncated);
        let output = ListMultipartUploadsOutput {
            next_key_marker: last.map(|u| text(&u.head.key)),
            next_upload_id_marker: last.map(|u| u.id.clone()),
            uploads: Some(
                listed
                    .iter()
                    .map(|u| MultipartUpload {
                        key: Some(text(&u.head.key)),
                        upload_id: Some(u.id.clone()),
                        initiated: Some(timestamp(u.head.modified_ns)),
                        ..MultipartUpload::default()
                    })
                    .collect(),
            ),
            bucket: Some(input.bucket),
            prefix: input.prefix.as_deref().map(text),
            key_marker: input.key_marker.as_deref().map(text),
            upload_id_marker: input.upload_id_marker,
            encoding_type: input.encoding_type,
            max_uploads: Some(i32::try_from(max).unwrap_or(PAGE_MAX)),
            is_truncated: Some(truncated),
            ..ListMultipartUploadsOutput::default()
        };
        Ok(S3Response::new(output))
    }
}
