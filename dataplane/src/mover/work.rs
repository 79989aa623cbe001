//! The S3 calls behind the jobs, and what their errors mean.

use crate::core::{FetchError, Piece, Work};
use bytes::Bytes;
use ebb_dataplane_protocol::control::{PutCondition, StoreOutcome};
use ebb_ring::Buf;
use ebb_s3::{Bucket, Condition, ErrorKind, Etag, S3Error, UploadBody, UploadId};
use std::borrow::Borrow;
use std::ops::Range;
use std::time::Duration;

/// A fetch takes no longer, retries included: it holds a buffer, and somebody waits.
const FETCH_TIMEOUT: Duration = Duration::from_secs(30);
/// Times a body that breaks off is asked for again.
const FETCH_ATTEMPTS: u32 = 3;

/// A part of a buffer as an owner of bytes.
struct Part<T>(T, Range<usize>);

impl<T: Borrow<Buf>> AsRef<[u8]> for Part<T> {
    fn as_ref(&self) -> &[u8] {
        &self.0.borrow()[self.1.clone()]
    }
}

/// Bytes that are zeros.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

fn body_of(pieces: Vec<Piece<Buf>>) -> UploadBody {
    let mut body = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match piece {
            Piece::Buf(buf, range) => body.push(Bytes::from_owner(Part(buf, range))),
            Piece::Shared(buf, range) => body.push(Bytes::from_owner(Part(buf, range))),
            Piece::Zeros(mut n) => {
                while n > 0 {
                    let take = n.min(ZEROS.len());
                    body.push(Bytes::from_static(&ZEROS[..take]));
                    n -= take;
                }
            }
        }
    }
    body.into()
}

/// Fetches a range of the object that has the etag.
pub(crate) async fn fetch(
    bucket: &Bucket,
    key: &str,
    etag: &str,
    range: Range<u64>,
    buf: &mut Buf,
    at: usize,
) -> Result<(), FetchError> {
    let trying = fetch_attempts(bucket, key, etag, range, buf, at);
    match tokio::time::timeout(FETCH_TIMEOUT, trying).await {
        Ok(result) => result,
        Err(_) => {
            tracing::warn!(key, "S3 did not answer a read in {FETCH_TIMEOUT:?}");
            Err(FetchError::Unavailable)
        }
    }
}

async fn fetch_attempts(
    bucket: &Bucket,
    key: &str,
    etag: &str,
    range: Range<u64>,
    buf: &mut Buf,
    at: usize,
) -> Result<(), FetchError> {
    let etag = Etag::new(etag);
    let mut attempt = 1;
    loop {
        let error = match fetch_once(bucket, key, &etag, range.clone(), buf, at).await {
            Ok(()) => return Ok(()),
            Err(e) => e,
        };
        tracing::debug!(%error, attempt, "a fetch failed");
        match error.kind {
            // Another object, none, or a shorter one: not what the view names.
            ErrorKind::NotFound | ErrorKind::PreconditionFailed | ErrorKind::Invalid => {
                return Err(FetchError::Changed);
            }
            ErrorKind::Integrity | ErrorKind::Timeout | ErrorKind::Server
                if attempt < FETCH_ATTEMPTS => {}
            // A server that ignores If-Match: look what is there.
            ErrorKind::Integrity => {
                return match bucket.head(key).await {
                    Ok(info) if info.etag == etag && info.size >= range.end => {
                        Err(FetchError::Unavailable)
                    }
                    Ok(_) => Err(FetchError::Changed),
                    Err(e) if e.is_not_found() => Err(FetchError::Changed),
                    Err(_) => Err(FetchError::Unavailable),
                };
            }
            _ => {
                tracing::warn!(%error, "S3 read failed");
                return Err(FetchError::Unavailable);
            }
        }
        attempt += 1;
    }
}

async fn fetch_once(
    bucket: &Bucket,
    key: &str,
    etag: &Etag,
    range: Range<u64>,
    buf: &mut Buf,
    at: usize,
) -> Result<(), S3Error> {
    let wrong = |kind, text: &str| S3Error::new(kind, ebb_s3::Operation::Get, key, text);
    let mut body = bucket.get_range(key, Some(etag), range.clone()).await?;
    if body.range() != range {
        return Err(wrong(ErrorKind::Invalid, "the object is shorter than its view says"));
    }
    let mut to = at;
    while let Some(piece) = body.next().await? {
        let Some(target) = buf.get_mut(to..to + piece.len()) else {
            return Err(wrong(ErrorKind::Integrity, "more bytes than asked for"));
        };
        target.copy_from_slice(&piece);
        to += piece.len();
    }
    if (to - at) as u64 != range.end - range.start {
        return Err(wrong(ErrorKind::Integrity, "fewer bytes than asked for"));
    }
    Ok(())
}

/// Carries out a mutation, once (I3: what became of it is said as it is known).
pub(crate) async fn store(bucket: &Bucket, work: Work<Buf>) -> StoreOutcome {
    let copying = matches!(work, Work::CopyPart { .. });
    let result = match work {
        Work::Put { key, body, metadata, condition } => {
            let metadata = metadata.into_iter().collect();
            let condition = match condition {
                PutCondition::None => Condition::None,
                PutCondition::IfAbsent => Condition::IfAbsent,
                PutCondition::IfMatch(etag) => Condition::IfMatch(Etag::new(etag)),
            };
            bucket.put(&key, body_of(body), &metadata, &condition).await
        }
        Work::UploadPart { key, upload_id, part_number, body } => {
            let upload = UploadId::new(upload_id);
            let part = bucket.upload_part(&key, &upload, part_number, body_of(body)).await;
            part.map(|p| p.etag)
        }
        Work::CopyPart { key, upload_id, part_number, source_key, source_etag, range } => {
            let upload = UploadId::new(upload_id);
            let etag = Etag::new(source_etag);
            let part = bucket
                .upload_part_copy(&key, &upload, part_number, &source_key, Some(&etag), range)
                .await;
            part.map(|p| p.etag)
        }
        Work::Fetch { .. } => {
            debug_assert!(false, "a fetch is not a mutation");
            return StoreOutcome::Failed("not a mutation".into());
        }
    };
    match result {
        Ok(etag) => StoreOutcome::Stored { etag: etag.as_str().to_owned() },
        Err(e) => outcome_of(e, copying),
    }
}

fn outcome_of(e: S3Error, copying: bool) -> StoreOutcome {
    tracing::warn!(error = %e, "S3 mutation failed");
    match e.kind {
        // Of a copy, a condition is only on the source.
        ErrorKind::PreconditionFailed if copying => StoreOutcome::BaseGone,
        ErrorKind::PreconditionFailed | ErrorKind::NotFound | ErrorKind::Conflict => {
            StoreOutcome::ConditionFailed
        }
        ErrorKind::Ambiguous => StoreOutcome::Ambiguous,
        ErrorKind::Denied
        | ErrorKind::NoSuchBucket
        | ErrorKind::Throttled
        | ErrorKind::Server
        | ErrorKind::Timeout
        | ErrorKind::Connect
        | ErrorKind::Integrity
        | ErrorKind::Invalid => StoreOutcome::Failed(e.to_string()),
    }
}
