//! Bodies: what an upload sends, and what a GET streams back, checked.
//!
//! I10 at this edge: a GET's bytes are counted against what the reply's head promised, and a body
//! that ends early, runs over or breaks is `Integrity`, never a short success.

use std::{
    convert::Infallible,
    ops::Range,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use aws_sdk_s3::primitives::{ByteStream, SdkBody};
use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, SizeHint};
use md5::{Digest, Md5};
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    error::{ErrorKind, S3Error},
    operation::Operation,
    types::ObjectInfo,
};

/// The bytes of an upload, in pieces, so that nothing is copied together.
#[derive(Debug, Clone, Default)]
pub struct UploadBody {
    pieces: Vec<Bytes>,
}

impl UploadBody {
    pub fn len(&self) -> u64 {
        self.pieces.iter().map(|p| p.len() as u64).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.iter().all(Bytes::is_empty)
    }

    /// Base64 of the MD5, as `Content-MD5` wants it.
    pub(super) fn content_md5(&self) -> String {
        let mut md5 = Md5::new();
        self.pieces.iter().for_each(|p| md5.update(p));
        aws_smithy_types::base64::encode(md5.finalize())
    }

    pub(super) fn into_stream(self) -> ByteStream {
        let mut pieces = self.pieces;
        pieces.retain(|p| !p.is_empty());
        if pieces.len() <= 1 {
            return ByteStream::from(pieces.pop().unwrap_or_default());
        }
        let left = pieces.iter().map(|p| p.len() as u64).sum();
        let body = Pieces { pieces: pieces.into_iter(), left };
        ByteStream::new(SdkBody::from_body_1_x(body))
    }
}

impl From<Bytes> for UploadBody {
    fn from(piece: Bytes) -> Self {
        Self { pieces: vec![piece] }
    }
}
impl From<Vec<Bytes>> for UploadBody {
    fn from(pieces: Vec<Bytes>) -> Self {
        Self { pieces }
    }
}
impl From<Vec<u8>> for UploadBody {
    fn from(piece: Vec<u8>) -> Self {
        Bytes::from(piece).into()
    }
}
impl From<&'static [u8]> for UploadBody {
    fn from(piece: &'static [u8]) -> Self {
        Bytes::from_static(piece).into()
    }
}
impl<const N: usize> From<&'static [u8; N]> for UploadBody {
    fn from(piece: &'static [u8; N]) -> Self {
        Bytes::from_static(piece).into()
    }
}

/// Pieces as an HTTP body of known length.
struct Pieces {
    pieces: std::vec::IntoIter<Bytes>,
    left: u64,
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.pieces.next();
        if let Some(piece) = &piece {
            self.left -= piece.len() as u64;
        }
        Poll::Ready(piece.map(|p| Ok(Frame::data(p))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}

/// A GET's reply: its head is checked, its body comes piece by piece and is counted.
pub struct GetBody {
    pub(super) info: ObjectInfo,
    pub(super) range: Range<u64>,
    pub(super) stream: ByteStream,
    pub(super) received: u64,
    pub(super) key: String,
    pub(super) idle: Duration,
    /// Held until the body is read or dropped: open bodies count as requests in flight.
    pub(super) _permit: OwnedSemaphorePermit,
}

impl std::fmt::Debug for GetBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GetBody").field("key", &self.key).field("range", &self.range).finish()
    }
}

impl GetBody {
    /// The object this body is of; `size` is the whole object's.
    pub fn info(&self) -> &ObjectInfo {
        &self.info
    }

    /// What will come: the asked range, clipped to the object.
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    fn expected(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// The next piece; None once all of the range was received, and only then.
    pub async fn next(&mut self) -> Result<Option<Bytes>, S3Error> {
        let fail = |kind, key: &str, text: String| S3Error::new(kind, Operation::Get, key, text);
        loop {
            let piece = match tokio::time::timeout(self.idle, self.stream.next()).await {
                Err(_) => {
                    let text = format!("no data for {:?}", self.idle);
                    return Err(fail(ErrorKind::Timeout, &self.key, text));
                }
                Ok(Some(Err(e))) => {
                    let text =
                        format!("body broke at {} of {}: {e}", self.received, self.expected());
                    return Err(fail(ErrorKind::Integrity, &self.key, text));
                }
                Ok(Some(Ok(piece))) => piece,
                Ok(None) if self.received == self.expected() => return Ok(None),
                Ok(None) => {
                    let text =
                        format!("body ended at {} of {} bytes", self.received, self.expected());
                    return Err(fail(ErrorKind::Integrity, &self.key, text));
                }
            };
            self.received += piece.len() as u64;
            if self.received > self.expected() {
                let text = format!("body is longer than {} bytes", self.expected());
                return Err(fail(ErrorKind::Integrity, &self.key, text));
            }
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
    }

    /// The whole body in memory. The caller bounds its range.
    pub async fn collect(mut self) -> Result<Bytes, S3Error> {
        let Some(first) = self.next().await? else { return Ok(Bytes::new()) };
        if first.len() as u64 == self.expected() {
            // The last poll sees the end of the body, which is what frees the connection.
            self.next().await?;
            return Ok(first);
        }
        // The promised length is a stranger's word; grow with what really comes.
        let mut all = BytesMut::with_capacity(self.expected().min(16 << 20) as usize);
        all.extend_from_slice(&first);
        while let Some(piece) = self.next().await? {
            all.extend_from_slice(&piece);
        }
        Ok(all.freeze())
    }
}
