//! The S3 trait over the store: dispatch, bucket operations, listings.
//!
//! What is not here answers NotImplemented (s3s's default): versions, ACLs, policies, tags.

use std::sync::Arc;

use s3s::{S3, S3Error, S3Request, S3Response, S3Result, dto::*, s3_error};

use super::{
    bucket::{BucketStore, Entry},
    listing::{After, Page, Query, after_marker, url_encode},
    objects::{signed, strong, timestamp},
    store::Store,
};

/// Longest page of any listing.
pub(super) const PAGE_MAX: i32 = 1000;
/// Keys one DeleteObjects may name.
const DELETE_MANY_MAX: usize = 1000;

pub(super) struct Service {
    pub(super) store: Arc<Store>,
}

pub(super) fn page_size(asked: Option<i32>) -> S3Result<usize> {
    usize::try_from(asked.unwrap_or(PAGE_MAX).min(PAGE_MAX))
        .map_err(|_| s3_error!(InvalidArgument, "a page size below zero"))
}

/// Texts of a listing, percent-encoded where the client asked for that.
struct Texts {
    encoded: bool,
}

impl Texts {
    fn new(encoding: Option<&EncodingType>) -> Self {
        Self { encoded: encoding.is_some_and(|e| e.as_str() == EncodingType::URL) }
    }

    fn of(&self, text: &str) -> String {
        if self.encoded { url_encode(text) } else { text.to_owned() }
    }

    fn objects(&self, page: &Page<Entry>) -> Vec<Object> {
        let object = |(key, entry): &(String, Entry)| Object {
            key: Some(self.of(key)),
            e_tag: Some(strong(&entry.etag)),
            size: Some(signed(entry.size)),
            last_modified: Some(timestamp(entry.modified_ns)),
            storage_class: Some(ObjectStorageClass::from_static(ObjectStorageClass::STANDARD)),
            ..Object::default()
        };
        page.entries.iter().map(object).collect()
    }

    fn prefixes(&self, page: &Page<Entry>) -> Vec<CommonPrefix> {
        page.groups.iter().map(|g| CommonPrefix { prefix: Some(self.of(g)) }).collect()
    }
}

impl Service {
    async fn delete_one(bucket: &Arc<BucketStore>, given: ObjectIdentifier) -> Result<(), Error> {
        let if_match = given.e_tag.map(ETagCondition::ETag);
        match bucket.remove(given.key.clone(), if_match).await {
            Ok(_) => Ok(()),
            Err(e) => Err(Error {
                code: Some(e.code().as_str().to_owned()),
                key: Some(given.key),
                message: e.message().map(str::to_owned),
                ..Error::default()
            }),
        }
    }
}

#[async_trait::async_trait]
impl S3 for Service {
    async fn list_buckets(
        &self,
        _req: S3Request<ListBucketsInput>,
    ) -> S3Result<S3Response<ListBucketsOutput>> {
        let buckets = self.store.buckets().into_iter().map(|bucket| Bucket {
            name: Some(bucket.name.clone()),
            creation_date: Some(timestamp(bucket.created_ns)),
            ..Bucket::default()
        });
        let output =
            ListBucketsOutput { buckets: Some(buckets.collect()), ..ListBucketsOutput::default() };
        Ok(S3Response::new(output))
    }

    async fn create_bucket(
        &self,
        req: S3Request<CreateBucketInput>,
    ) -> S3Result<S3Response<CreateBucketOutput>> {
        let location = Some(format!("/{}", req.input.bucket));
        self.store.create_bucket(req.input.bucket).await?;
        Ok(S3Response::new(CreateBucketOutput { location }))
    }

    async fn head_bucket(
        &self,
        req: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        self.store.bucket(&req.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn get_bucket_location(
        &self,
        req: S3Request<GetBucketLocationInput>,
    ) -> S3Result<S3Response<GetBucketLocationOutput>> {
        self.store.bucket(&req.input.bucket)?;
        // No constraint is how S3 says us-east-1.
        Ok(S3Response::new(GetBucketLocationOutput::default()))
    }

    async fn list_objects_v2(
        &self,
        req: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        let bucket = self.store.bucket(&input.bucket)?;
        let max = page_size(input.max_keys)?;
        let after = match (&input.continuation_token, &input.start_after) {
            (Some(token), _) => After::from_token(token)
                .ok_or_else(|| s3_error!(InvalidArgument, "not a continuation token of ours"))?,
            (None, Some(key)) if !key.is_empty() => After::Key(key.clone()),
            _ => After::Start,
        };
        let page = bucket.list(&Query {
            prefix: input.prefix.as_deref().unwrap_or_default(),
            delimiter: input.delimiter.as_deref().unwrap_or_default(),
            after,
            max,
        });
        let texts = Texts::new(input.encoding_type.as_ref());
        let output = ListObjectsV2Output {
            key_count: Some(
                i32::try_from(page.entries.len() + page.groups.len()).unwrap_or(PAGE_MAX),
            ),
            contents: Some(texts.objects(&page)),
            common_prefixes: Some(texts.prefixes(&page)),
            is_truncated: Some(page.next.is_some()),
            next_continuation_token: page.next.as_ref().and_then(After::to_token),
            max_keys: Some(i32::try_from(max).unwrap_or(PAGE_MAX)),
            prefix: input.prefix.as_deref().map(|t| texts.of(t)),
            delimiter: input.delimiter.as_deref().map(|t| texts.of(t)),
            start_after: input.start_after.as_deref().map(|t| texts.of(t)),
            name: Some(input.bucket),
            continuation_token: input.continuation_token,
            encoding_type: input.encoding_type,
            ..ListObjectsV2Output::default()
        };
        Ok(S3Response::new(output))
    }

    async fn list_objects(
        &self,
        req: S3Request<ListObjectsInput>,
    ) -> S3Result<S3Response<ListObjectsOutput>> {
        let input = req.input;
        let bucket = self.store.bucket(&input.bucket)?;
        let max = page_size(input.max_keys)?;
        let prefix = input.prefix.as_deref().unwrap_or_default();
        let delimiter = input.delimiter.as_deref().unwrap_or_default();
        let marker = input.marker.as_deref().unwrap_or_default();
        let after = after_marker(marker, prefix, delimiter);
        let page = bucket.list(&Query { prefix, delimiter, after, max });
        let texts = Texts::new(input.encoding_type.as_ref());
        let next = match &page.next {
            Some(After::Key(last) | After::Group(last)) => Some(texts.of(last)),
            _ => None,
        };
        let output = ListObjectsOutput {
            contents: Some(texts.objects(&page)),
            common_prefixes: Some(texts.prefixes(&page)),
            is_truncated: Some(page.next.is_some()),
            next_marker: next,
            max_keys: Some(i32::try_from(max).unwrap_or(PAGE_MAX)),
            prefix: input.prefix.as_deref().map(|t| texts.of(t)),
            delimiter: input.delimiter.as_deref().map(|t| texts.of(t)),
            marker: input.marker.as_deref().map(|t| texts.of(t)),
            name: Some(input.bucket),
            encoding_type: input.encoding_type,
            ..ListObjectsOutput::default()
        };
        Ok(S3Response::new(output))
    }

    async fn put_object(
        &self,
        req: S3Request<PutObjectInput>,
    ) -> S3Result<S3Response<PutObjectOutput>> {
        self.put(req).await
    }

    async fn get_object(
        &self,
        req: S3Request<GetObjectInput>,
    ) -> S3Result<S3Response<GetObjectOutput>> {
        self.get(req).await
    }

    async fn head_object(
        &self,
        req: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        self.head(req).await
    }

    async fn copy_object(
        &self,
        req: S3Request<CopyObjectInput>,
    ) -> S3Result<S3Response<CopyObjectOutput>> {
        self.copy(req).await
    }

    async fn delete_object(
        &self,
        req: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = req.input;
        let bucket = self.store.bucket(&input.bucket)?;
        bucket.remove(input.key, input.if_match).await?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        req: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let input = req.input;
        let bucket = self.store.bucket(&input.bucket)?;
        if input.delete.objects.len() > DELETE_MANY_MAX {
            return Err(s3_error!(MalformedXML, "at most {DELETE_MANY_MAX} keys"));
        }
        let quiet = input.delete.quiet.unwrap_or(false);
        let keys: Vec<_> = input.delete.objects.iter().map(|o| o.key.clone()).collect();
        let each = input.delete.objects.into_iter().map(|o| Self::delete_one(&bucket, o));
        let results = futures::future::join_all(each).await;
        let mut output = DeleteObjectsOutput::default();
        let (mut deleted, mut errors) = (Vec::new(), Vec::new());
        for (key, result) in keys.into_iter().zip(results) {
            match result {
                Ok(()) if quiet => {}
                Ok(()) => {
                    deleted.push(DeletedObject { key: Some(key), ..DeletedObject::default() });
                }
                Err(e) => errors.push(e),
            }
        }
        output.deleted = (!deleted.is_empty()).then_some(deleted);
        output.errors = (!errors.is_empty()).then_some(errors);
        Ok(S3Response::new(output))
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        self.create_upload(req).await
    }

    async fn upload_part(
        &self,
        req: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        self.put_part(req).await
    }

    async fn upload_part_copy(
        &self,
        req: S3Request<UploadPartCopyInput>,
    ) -> S3Result<S3Response<UploadPartCopyOutput>> {
        self.copy_part(req).await
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        self.complete(req).await
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.abort(req).await
    }

    async fn list_parts(
        &self,
        req: S3Request<ListPartsInput>,
    ) -> S3Result<S3Response<ListPartsOutput>> {
        self.parts(req).await
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        self.uploads(req).await
    }
}

/// An error of our own making: logged here, once, with its cause; the client is told less.
pub(super) fn internal(what: &'static str, error: std::io::Error) -> S3Error {
    tracing::error!(%error, "cannot {what}");
    s3_error!(InternalError, "cannot {what}")
}
