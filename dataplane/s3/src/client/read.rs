//! Reads: GET of a range under If-Match, HEAD, LIST.
//!
//! I10 at this edge: a reply's etag, range and length are compared with what was asked for; a
//! server that ignores a header is caught here. Retried under the policy of the parent module.

use std::{ops::Range, time::SystemTime};

use aws_sdk_s3::{primitives::DateTime, types::EncodingType};
use bytes::Bytes;

use super::{Bucket, GetBody};
use crate::{
    error::{ErrorKind, S3Error},
    operation::Operation,
    types::{Etag, ListPage, ListRequest, ListedObject, Metadata, ObjectInfo},
};

impl Bucket {
    /// GET, as a stream. `range` is clipped at the object's end; None is the whole object. With
    /// `etag` the request carries If-Match, and a reply with another etag is `Integrity`.
    ///
    /// A range that starts at or past the end is `Invalid` (S3's 416), so an empty object can be
    /// read only without a range.
    pub async fn get(
        &self,
        key: &str,
        etag: Option<&Etag>,
        range: Option<Range<u64>>,
    ) -> Result<GetBody, S3Error> {
        let op = Operation::Get;
        let full = self.full_key(op, key)?;
        let fail = |kind, text: String| Err(S3Error::new(kind, op, key, text));
        let header = match &range {
            Some(r) if r.start >= r.end => {
                return fail(ErrorKind::Invalid, format!("empty range {}..{}", r.start, r.end));
            }
            // Servers read these as signed numbers; no object is that long.
            Some(r) => Some(format!("bytes={}-{}", r.start, (r.end - 1).min(i64::MAX as u64))),
            None => None,
        };
        let (reply, permit) = self
            .read(op, key, || {
                self.client()
                    .get_object()
                    .bucket(self.name())
                    .key(&full)
                    .set_if_match(etag.map(Etag::quoted))
                    .set_range(header.clone())
                    .send()
            })
            .await?;

        let Some(found) = reply.e_tag().map(Etag::new) else {
            return fail(ErrorKind::Integrity, "reply without an etag".to_owned());
        };
        if let Some(asked) = etag
            && *asked != found
        {
            let text = format!("asked for etag {asked}, the reply is of {found}");
            return fail(ErrorKind::Integrity, text);
        }
        let length = match reply.content_length().map(u64::try_from) {
            Some(Ok(length)) => length,
            _ => return fail(ErrorKind::Integrity, "reply without a length".to_owned()),
        };
        let (sent, size) = match reply.content_range() {
            Some(text) => match parse_content_range(text) {
                Some(parsed) => parsed,
                None => {
                    let text = format!("unreadable Content-Range '{text}'");
                    return fail(ErrorKind::Integrity, text);
                }
            },
            None => (0..length, length),
        };
        let wanted = match &range {
            Some(r) => r.start..r.end.min(size),
            None => 0..size,
        };
        if sent != wanted || length != wanted.end.saturating_sub(wanted.start) {
            let text = format!("asked for {wanted:?} of {size}, got {sent:?} in {length} bytes");
            return fail(ErrorKind::Integrity, text);
        }
        let info = ObjectInfo {
            etag: found,
            size,
            last_modified: system_time(reply.last_modified()),
            metadata: metadata(reply.metadata()),
        };
        Ok(GetBody {
            info,
            range: wanted,
            stream: reply.body,
            received: 0,
            key: key.to_owned(),
            idle: self.config().timeouts.idle(),
            _permit: permit,
        })
    }

    /// GET of a range, as a stream; see [`Bucket::get`].
    pub async fn get_range(
        &self,
        key: &str,
        etag: Option<&Etag>,
        range: Range<u64>,
    ) -> Result<GetBody, S3Error> {
        self.get(key, etag, Some(range)).await
    }

    /// GET of a range into memory. Since nothing was handed out yet, a body that breaks is asked
    /// for again, under the read policy; the last failure is reported as it was.
    pub async fn get_bytes(
        &self,
        key: &str,
        etag: Option<&Etag>,
        range: Range<u64>,
    ) -> Result<Bytes, S3Error> {
        let attempts = self.config().read_attempts.clamp(1, 16);
        let mut attempt = 1;
        loop {
            let error = match self.get(key, etag, Some(range.clone())).await?.collect().await {
                Ok(bytes) => return Ok(bytes),
                Err(e) => e,
            };
            if attempt == attempts {
                return Err(error);
            }
            tracing::debug!(%error, attempt, "S3 body broke, reading it again");
            tokio::time::sleep(super::retry_pause(attempt)).await;
            attempt += 1;
        }
    }

    pub async fn head(&self, key: &str) -> Result<ObjectInfo, S3Error> {
        let op = Operation::Head;
        let full = self.full_key(op, key)?;
        let (reply, _permit) = self
            .read(op, key, || self.client().head_object().bucket(self.name()).key(&full).send())
            .await?;
        let (Some(etag), Some(Ok(size))) =
            (reply.e_tag(), reply.content_length().map(u64::try_from))
        else {
            let text = "reply without etag or length";
            return Err(S3Error::new(ErrorKind::Integrity, op, key, text));
        };
        Ok(ObjectInfo {
            etag: Etag::new(etag),
            size,
            last_modified: system_time(reply.last_modified()),
            metadata: metadata(reply.metadata()),
        })
    }

    /// One page of keys in byte order.
    pub async fn list(&self, request: &ListRequest) -> Result<ListPage, S3Error> {
        let op = Operation::List;
        let prefix = format!("{}{}", self.inner.prefix, request.prefix);
        let start_after =
            request.start_after.as_ref().map(|key| format!("{}{key}", self.inner.prefix));
        let max_keys = request.max_keys.map(|n| i32::try_from(n.min(1000)).unwrap_or(1000));
        let (reply, _permit) = self
            .read(op, &request.prefix, || {
                self.client()
                    .list_objects_v2()
                    .bucket(self.name())
                    .set_prefix((!prefix.is_empty()).then(|| prefix.clone()))
                    .set_delimiter(request.delimiter.clone())
                    .set_start_after(start_after.clone())
                    .set_continuation_token(request.continuation.clone())
                    .set_max_keys(max_keys)
                    // Keys may hold bytes that XML cannot.
                    .encoding_type(EncodingType::Url)
                    .send()
            })
            .await?;
        let encoded = reply.encoding_type() == Some(&EncodingType::Url);
        let fail = |text: &str| Err(S3Error::new(ErrorKind::Integrity, op, &request.prefix, text));
        let mut page = ListPage::default();
        for object in reply.contents() {
            let (Some(key), Some(Ok(size)), Some(etag)) =
                (object.key(), object.size().map(u64::try_from), object.e_tag())
            else {
                return fail("a listed object lacks key, size or etag");
            };
            page.objects.push(ListedObject {
                key: self.relative(op, decode(key, encoded))?,
                size,
                etag: Etag::new(etag),
                last_modified: system_time(object.last_modified()),
            });
        }
        for prefix in reply.common_prefixes() {
            if let Some(prefix) = prefix.prefix() {
                page.prefixes.push(self.relative(op, decode(prefix, encoded))?);
            }
        }
        if reply.is_truncated() == Some(true) {
            match reply.next_continuation_token() {
                Some(token) if !token.is_empty() => page.next = Some(token.to_owned()),
                _ => return fail("a truncated listing lacks its continuation token"),
            }
        }
        Ok(page)
    }
}

pub(super) fn system_time(time: Option<&DateTime>) -> SystemTime {
    time.and_then(|t| SystemTime::try_from(*t).ok()).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn metadata(map: Option<&std::collections::HashMap<String, String>>) -> Metadata {
    map.map(|m| m.iter().map(|(k, v)| (k.to_ascii_lowercase(), v.clone())).collect())
        .unwrap_or_default()
}

/// `bytes 0-99/1234` as (range, size).
fn parse_content_range(text: &str) -> Option<(Range<u64>, u64)> {
    let (range, size) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let size = size.parse().ok()?;
    (first <= last && last < size).then_some((first..last + 1, size))
}

/// Undoes `encoding-type=url`. A `%` that starts no escape stays itself, as do bytes that are not
/// UTF-8 once decoded.
pub(super) fn decode(text: &str, encoded: bool) -> String {
    if !encoded || !text.contains(['%', '+']) {
        return text.to_owned();
    }
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = (bytes[at] == b'%').then(|| bytes.get(at + 1..at + 3)).flatten();
        let value = escape
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match (value, bytes[at]) {
            (Some(value), _) => {
                plain.push(value);
                at += 3;
            }
            (None, b'+') => {
                plain.push(b' ');
                at += 1;
            }
            (None, other) => {
                plain.push(other);
                at += 1;
            }
        }
    }
    String::from_utf8(plain).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_parse_or_are_refused() {
        assert_eq!(parse_content_range("bytes 0-99/1234"), Some((0..100, 1234)));
        for bad in ["bytes 5-4/10", "bytes 0-10/10", "0-1/2", "bytes */10", "bytes 0-1/*", ""] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn url_encoded_keys_decode() {
        assert_eq!(decode("a%2Fb%20c+d%2B", true), "a/b c d+");
        assert_eq!(decode("a%2Fb", false), "a%2Fb");
        assert_eq!(decode("100%", true), "100%");
    }
}
