//! One frame in memory, read from and written to a socket.

use bytes::{Bytes, BytesMut};
use ebb_dataplane_protocol::header::{BadHeader, HEADER_BYTES};
use ebb_dataplane_protocol::{Header, Status, crc32c};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Bytes asked of a socket at once, so that a small frame costs one call and not three, and many that come together
/// cost one call, too. A payload that is larger goes straight to its place.
pub(crate) const READ_AHEAD_BYTES: usize = 64 << 10;
/// The same for a port, which has many connections.
pub(crate) const REQUESTS_READ_AHEAD_BYTES: usize = 16 << 10;

/// A frame: header, body, payload.
#[derive(Clone, Debug)]
pub struct Frame {
    /// The header; lengths and the body's checksum match the parts.
    pub header: Header,
    /// The small part.
    pub body: Bytes,
    /// The bulk part.
    pub payload: Bytes,
}

/// Why a frame could not be read. Either way the connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("connection: {0}")]
    Io(#[from] std::io::Error),
    #[error("bad frame: {0}")]
    Header(#[from] BadHeader),
    #[error("bad frame: body checksum mismatch")]
    Body,
}

impl Frame {
    /// A frame of a header, a body and a payload; fills in lengths and checksum.
    pub fn new(header: Header, body: Bytes, payload: Bytes) -> Self {
        let bytes = u32::try_from(payload.len()).expect("payloads are bounded by a chunk");
        Self { header: header.with_body(&body).with_payload(bytes), body, payload }
    }

    /// The reply to `request` with an error text as its body.
    pub fn refusal(request: &Header, status: Status, message: &str) -> Self {
        Self::new(request.reply(status), Bytes::copy_from_slice(message.as_bytes()), Bytes::new())
    }

    /// Reads one frame. `Ok(None)`: the peer closed between frames.
    pub(crate) async fn read(
        from: &mut (impl AsyncRead + Unpin),
        body_bytes_max: u32,
    ) -> Result<Option<Self>, ReadError> {
        let mut head = [0u8; HEADER_BYTES];
        match from.read_exact(&mut head).await {
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        let header = Header::decode(&head, body_bytes_max)?;
        let body = read_exact(from, header.body_bytes as usize).await?;
        if crc32c(&body) != header.body_crc {
            return Err(ReadError::Body);
        }
        let payload = read_exact(from, header.payload_bytes as usize).await?;
        Ok(Some(Self { header, body, payload }))
    }

    /// The frame as two segments: header with body, and payload.
    pub(crate) fn segments(self) -> (Bytes, Bytes) {
        let mut small = Vec::with_capacity(HEADER_BYTES + self.body.len());
        small.extend_from_slice(&self.header.encode());
        small.extend_from_slice(&self.body);
        (small.into(), self.payload)
    }

    /// Writes the frame to a stream of which nobody else writes.
    pub(crate) async fn write(self, to: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
        let (small, payload) = self.segments();
        to.write_all_buf(&mut bytes::Buf::chain(small, payload)).await
    }
}

/// Reads exactly `len` bytes without zeroing the buffer first.
async fn read_exact(from: &mut (impl AsyncRead + Unpin), len: usize) -> std::io::Result<Bytes> {
    if len == 0 {
        return Ok(Bytes::new());
    }
    let mut buf = BytesMut::with_capacity(len);
    while buf.len() < len {
        let want = len - buf.len();
        let n = from.take(want as u64).read_buf(&mut buf).await?;
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(buf.freeze())
}
