//! The body of a GET, read from an open file in pieces on blocking threads.
//!
//! One piece is in flight per reply and none is read ahead, so a slow client costs one buffer and
//! no thread. A read that fails breaks the connection off: the client sees a short body, never
//! wrong bytes.

use std::{
    fs::File,
    future::Future,
    io,
    os::unix::fs::FileExt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures::Stream;
use s3s::{
    StdError,
    stream::{ByteStream, RemainingLength},
};
use tokio::task::JoinHandle;

const PIECE_BYTES: u64 = 512 * 1024;

pub(super) struct FileBody {
    state: State,
    at: u64,
    end: u64,
}

enum State {
    Idle(File),
    Reading(JoinHandle<(File, io::Result<Bytes>)>),
    Done,
}

impl FileBody {
    /// The bytes `at..end` of the file.
    pub(super) fn new(file: File, at: u64, end: u64) -> Self {
        Self { state: State::Idle(file), at, end }
    }
}

fn read_piece(file: &File, at: u64, length: u64) -> io::Result<Bytes> {
    let mut piece = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    file.read_exact_at(&mut piece, at)?;
    Ok(piece.into())
}

impl Stream for FileBody {
    type Item = Result<Bytes, StdError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match std::mem::replace(&mut self.state, State::Done) {
                State::Done => return Poll::Ready(None),
                State::Idle(_) if self.at >= self.end => return Poll::Ready(None),
                State::Idle(file) => {
                    let (at, length) = (self.at, PIECE_BYTES.min(self.end - self.at));
                    self.state = State::Reading(tokio::task::spawn_blocking(move || {
                        let piece = read_piece(&file, at, length);
                        (file, piece)
                    }));
                }
                State::Reading(mut reading) => match Pin::new(&mut reading).poll(cx) {
                    Poll::Pending => {
                        self.state = State::Reading(reading);
                        return Poll::Pending;
                    }
                    Poll::Ready(Ok((file, Ok(piece)))) => {
                        self.at += piece.len() as u64;
                        self.state = State::Idle(file);
                        return Poll::Ready(Some(Ok(piece)));
                    }
                    Poll::Ready(Ok((_, Err(e)))) => {
                        tracing::error!(error = %e, "reading an object failed midway");
                        return Poll::Ready(Some(Err(Box::new(e))));
                    }
                    Poll::Ready(Err(e)) => return Poll::Ready(Some(Err(Box::new(e)))),
                },
            }
        }
    }
}

impl ByteStream for FileBody {
    fn remaining_length(&self) -> RemainingLength {
        match usize::try_from(self.end.saturating_sub(self.at)) {
            Ok(left) => RemainingLength::new_exact(left),
            Err(_) => RemainingLength::unknown(),
        }
    }
}
