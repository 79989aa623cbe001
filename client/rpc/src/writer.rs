//! The sending half of a connection: whole frames, one at a time, from any task.
//!
//! What the socket takes at once is written by the caller, without a hop to another task. The rest
//! is written by a task of its own that keeps the lock, so that a caller that gives up cannot leave
//! half a frame behind. Bounded by the callers: each waits until its frame is on its way (I9).

use crate::frame::Frame;
use bytes::Buf;
use std::io::{Error, ErrorKind, IoSlice, Result};
use std::sync::Arc;
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

/// Sends frames. Dropping it closes this direction.
pub(crate) struct FrameWriter {
    half: Arc<Mutex<OwnedWriteHalf>>,
    /// Cancelled when the connection has ended, from either side.
    ended: CancellationToken,
}

impl FrameWriter {
    pub(crate) fn new(half: OwnedWriteHalf, ended: CancellationToken) -> Self {
        Self { half: Arc::new(Mutex::new(half)), ended }
    }

    /// Sends a frame. After an error the connection is of no more use, and is ended.
    pub(crate) async fn send(&self, frame: Frame) -> Result<()> {
        let gone = || Error::from(ErrorKind::ConnectionReset);
        let lock = Arc::clone(&self.half).lock_owned();
        let mut half = self.ended.run_until_cancelled(lock).await.ok_or_else(gone)?;
        let (small, payload) = frame.segments();
        let mut unsent = small.chain(payload);
        let first = {
            let mut slices = [IoSlice::new(&[]); 2];
            let n = unsent.chunks_vectored(&mut slices);
            half.try_write_vectored(&slices[..n])
        };
        match first {
            Ok(n) => unsent.advance(n),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => {
                self.ended.cancel();
                return Err(e);
            }
        }
        if !unsent.has_remaining() {
            return Ok(());
        }
        let ended = self.ended.clone();
        let rest = tokio::spawn(async move {
            let written = ended.run_until_cancelled(half.write_all_buf(&mut unsent)).await;
            let written = written.unwrap_or_else(|| Err(ErrorKind::ConnectionReset.into()));
            if written.is_err() {
                ended.cancel();
            }
            written
        });
        rest.await.map_err(|_| gone())?
    }
}
