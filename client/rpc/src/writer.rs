//! The sending half of a connection: whole frames, from any task.
//!
//! What the socket takes at once is written by the caller, without a hop to another task. The rest
//! is written by a task of its own that keeps the lock, so that a caller that gives up cannot leave
//! half a frame behind. Bounded by the callers: each waits until its frame is on its way, or in a line of
//! limited length (I9).
//!
//! **A crowd shares system calls.** Where many callers are about to send small frames, each puts its own in a
//! line; the first of them lets the others that are ready run, and then writes the whole line in one call. A
//! frame in line is as good as one in the socket's buffer: if it doesn't get through, the connection ends, and
//! with it every call that waits for an answer.

use crate::frame::Frame;
use bytes::{Buf, Bytes};
use std::collections::VecDeque;
use std::io::{Error, ErrorKind, IoSlice, Result};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::{Mutex as Lock, OwnedMutexGuard};
use tokio_util::sync::CancellationToken;

/// Frames that may stand in line.
const SMALL_BYTES_MAX: usize = 16 << 10;
/// Bytes in line; further callers wait for the socket.
const LINE_BYTES_MAX: usize = 256 << 10;
/// Pieces in one system call.
const SLICES_MAX: usize = 128;

/// Sends frames. Dropping it closes this direction.
pub(crate) struct FrameWriter {
    shared: Arc<Shared>,
}

struct Shared {
    half: Arc<Lock<OwnedWriteHalf>>,
    line: Mutex<Line>,
    /// Cancelled when the connection has ended, from either side.
    ended: CancellationToken,
}

/// Frames that wait for the next system call.
#[derive(Default)]
struct Line {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    /// Somebody writes what is in it.
    led: bool,
}

type Half = OwnedMutexGuard<OwnedWriteHalf>;

fn gone() -> Error {
    Error::from(ErrorKind::ConnectionReset)
}

impl Shared {
    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody leads already, if there was room in line.
    fn stand_in_line(&self, bytes: usize, pieces: &mut VecDeque<Bytes>) -> Option<bool> {
        let mut line = self.line();
        if line.bytes + bytes > LINE_BYTES_MAX {
            return None;
        }
        line.bytes += bytes;
        line.pieces.append(pieces);
        Some(std::mem::replace(&mut line.led, true))
    }

    /// Takes what is in line.
    fn take(&self) -> VecDeque<Bytes> {
        let mut line = self.line();
        line.bytes = 0;
        std::mem::take(&mut line.pieces)
    }

    /// The same for who leads; nothing there: it leads no more.
    fn take_or_leave(&self) -> Option<VecDeque<Bytes>> {
        let mut line = self.line();
        line.led = !line.pieces.is_empty();
        line.bytes = 0;
        line.led.then(|| std::mem::take(&mut line.pieces))
    }

    fn failed(&self, e: Error) -> Error {
        self.ended.cancel();
        e
    }

    async fn lock(&self) -> Result<Half> {
        let lock = Arc::clone(&self.half).lock_owned();
        self.ended.run_until_cancelled(lock).await.ok_or_else(gone)
    }

    /// Writes all of it, however long that takes.
    async fn write(&self, half: &Half, pieces: &mut VecDeque<Bytes>) -> Result<()> {
        let all = async {
            while !try_write(half, pieces)? {
                half.writable().await?;
            }
            Ok(())
        };
        let written = self.ended.run_until_cancelled(all).await;
        written.unwrap_or_else(|| Err(gone())).map_err(|e| self.failed(e))
    }

    /// Writes the line until it is empty.
    async fn write_line(self: Arc<Self>, half: Option<Half>, mut pieces: VecDeque<Bytes>) {
        let half = match half {
            Some(half) => half,
            None => match self.lock().await {
                Ok(half) => half,
                Err(_) => return,
            },
        };
        loop {
            if self.write(&half, &mut pieces).await.is_err() {
                return;
            }
            match self.take_or_leave() {
                Some(more) => pieces = more,
                None => return,
            }
        }
    }
}

/// Writes what the socket takes now; whether that was all.
fn try_write(half: &OwnedWriteHalf, pieces: &mut VecDeque<Bytes>) -> Result<bool> {
    while !pieces.is_empty() {
        let written = {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let mut n = 0;
            for (slice, piece) in slices.iter_mut().zip(pieces.iter()) {
                *slice = IoSlice::new(piece);
                n += 1;
            }
            half.try_write_vectored(&slices[..n])
        };
        let mut written = match written {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e),
        };
        while let Some(front) = pieces.front_mut() {
            let n = written.min(front.len());
            front.advance(n);
            written -= n;
            if front.has_remaining() {
                break;
            }
            pieces.pop_front();
        }
    }
    Ok(true)
}

/// The duty to write the line, which outlives its caller.
struct Lead(Option<Arc<Shared>>);

impl Lead {
    fn write_line(mut self) -> Result<()> {
        let Some(shared) = self.0.take() else { return Ok(()) };
        let Ok(half) = Arc::clone(&shared.half).try_lock_owned() else {
            tokio::spawn(shared.write_line(None, VecDeque::new()));
            return Ok(());
        };
        while let Some(mut pieces) = shared.take_or_leave() {
            if !try_write(&half, &mut pieces).map_err(|e| shared.failed(e))? {
                tokio::spawn(shared.write_line(Some(half), pieces));
                return Ok(());
            }
        }
        Ok(())
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        // Its caller gave up; others rely on it. Without a runtime the connection is over too.
        if let Some(shared) = self.0.take()
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            runtime.spawn(shared.write_line(None, VecDeque::new()));
        }
    }
}

impl FrameWriter {
    pub(crate) fn new(half: OwnedWriteHalf, ended: CancellationToken) -> Self {
        let half = Arc::new(Lock::new(half));
        Self { shared: Arc::new(Shared { half, line: Mutex::default(), ended }) }
    }

    /// Sends a frame. After an error the connection is of no more use, and is ended. `crowded`: others are likely
    /// to send at this moment, too.
    pub(crate) async fn send(&self, frame: Frame, crowded: bool) -> Result<()> {
        let shared = &self.shared;
        let (small, payload) = frame.segments();
        let bytes = small.len() + payload.len();
        let mut pieces = VecDeque::from([small, payload]);
        pieces.retain(|piece| !piece.is_empty());
        if crowded && bytes <= SMALL_BYTES_MAX {
            if shared.ended.is_cancelled() {
                return Err(gone());
            }
            match shared.stand_in_line(bytes, &mut pieces) {
                Some(true) => return Ok(()),
                Some(false) => {
                    let lead = Lead(Some(Arc::clone(shared)));
                    tokio::task::yield_now().await;
                    return lead.write_line();
                }
                None => {}
            }
        }
        let half = shared.lock().await?;
        // Who came before goes first.
        let mut all = shared.take();
        all.append(&mut pieces);
        if try_write(&half, &mut all).map_err(|e| shared.failed(e))? {
            return Ok(());
        }
        let shared = Arc::clone(shared);
        let rest = tokio::spawn(async move { shared.write(&half, &mut all).await });
        rest.await.map_err(|_| gone())?
    }
}
