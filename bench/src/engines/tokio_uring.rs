//! The minimal server on tokio-uring 0.5: what that engine offers for this job, used as it is meant.
//!
//! Registered buffers for the reads where the kernel allows (`read_fixed_at`), a task per request, a
//! writer per connection. A buffer has a free block before its payload, so head and payload leave in one
//! write. The crate has no aligned buffers: each is two blocks longer, and the read starts at the first
//! aligned byte that leaves that room.

use super::IN_FLIGHT_MAX;
use super::child::{Service, put_head};
use super::job::{self, BLOCK, HEAD_BYTES_MAX, READ_BYTES_MAX, REQUEST_BYTES, Request, requests};
use crate::BenchError;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_uring::buf::BoundedBuf;
use tokio_uring::buf::fixed::{FixedBuf, FixedBufPool};
use tokio_uring::fs::File;
use tokio_uring::net::{TcpListener, TcpStream};

/// Buffers for single blocks, and for anything up to 1 MiB.
const SMALL: usize = 256;
const LARGE: usize = 48;
/// What a buffer has beside its payload: the head's block, and what alignment costs.
const ROOM: usize = 2 * BLOCK;
const SMALL_BYTES: usize = BLOCK + ROOM;
const LARGE_BYTES: usize = READ_BYTES_MAX + ROOM;

fn failed(why: impl std::fmt::Display) -> BenchError {
    BenchError::Program { program: "tokio-uring", why: why.to_string() }
}

struct Server {
    file: File,
    file_bytes: u64,
    checksums: bool,
    pool: FixedBufPool<Vec<u8>>,
    registered: bool,
}

/// A reply on its way to the socket; the permit bounds how many there are.
type Reply = (FixedBuf, Range<usize>, OwnedSemaphorePermit);

/// Serves forever; `ready` gets the port.
pub(super) fn serve(service: &Service, ready: impl FnOnce(u16)) -> Result<(), BenchError> {
    let (file, file_bytes) = job::open(&service.file)?;
    let checksums = service.checksums;
    tokio_uring::builder().start(async move {
        let small = std::iter::repeat_with(|| vec![0; SMALL_BYTES]).take(SMALL);
        let large = std::iter::repeat_with(|| vec![0; LARGE_BYTES]).take(LARGE);
        let pool = FixedBufPool::new(small.chain(large));
        let registered = match pool.register() {
            Ok(()) => true,
            Err(e) => {
                eprintln!("tokio-uring: reading without registered buffers: {e}");
                false
            }
        };
        let file = File::from_std(file);
        let server = Rc::new(Server { file, file_bytes, checksums, pool, registered });
        let here = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = TcpListener::bind(here).map_err(failed)?;
        ready(listener.local_addr().map_err(failed)?.port());
        loop {
            let (stream, _) = listener.accept().await.map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            tokio_uring::spawn(connection(Rc::clone(&server), Rc::new(stream)));
        }
    })
}

async fn connection(server: Rc<Server>, stream: Rc<TcpStream>) {
    let (replies, outgoing) = mpsc::channel(IN_FLIGHT_MAX);
    tokio_uring::spawn(write_replies(Rc::clone(&stream), outgoing));
    let window = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let mut buf = vec![0; IN_FLIGHT_MAX * REQUEST_BYTES];
    let mut have = 0;
    let mut asked = Vec::new();
    loop {
        let (result, slice) = stream.read(buf.slice(have..)).await;
        buf = slice.into_inner();
        match result {
            Ok(n) if n > 0 => have += n,
            _ => return,
        }
        let Ok(took) = requests(&buf[..have], server.file_bytes, |r| asked.push(r)) else {
            let _ = stream.shutdown(std::net::Shutdown::Both);
            return;
        };
        buf.copy_within(took..have, 0);
        have -= took;
        for request in asked.drain(..) {
            let Ok(permit) = Arc::clone(&window).acquire_owned().await else { return };
            let (server, replies) = (Rc::clone(&server), replies.clone());
            tokio_uring::spawn(async move {
                match server.read(&request).await {
                    Ok((buf, range)) => {
                        let _ = replies.send((buf, range, permit)).await;
                    }
                    // The peer learns by its patience; the figure would be void anyway.
                    Err(e) => eprintln!("tokio-uring: {e}"),
                }
            });
        }
    }
}

impl Server {
    async fn read(&self, request: &Request) -> Result<(FixedBuf, Range<usize>), BenchError> {
        let class = if request.bytes <= BLOCK { SMALL_BYTES } else { LARGE_BYTES };
        let buf = self.pool.next(class).await;
        let address = buf.as_ptr().addr();
        let at = (address + HEAD_BYTES_MAX).next_multiple_of(BLOCK) - address;
        let slice = buf.slice(at..at + request.bytes);
        let (result, slice) = match self.registered {
            true => self.file.read_fixed_at(slice, request.offset).await,
            false => self.file.read_at(slice, request.offset).await,
        };
        let mut buf = slice.into_inner();
        if result.map_err(failed)? != request.bytes {
            return Err(failed("a short read"));
        }
        let range = put_head(&mut buf, at, request, self.checksums);
        Ok((buf, range))
    }
}

async fn write_replies(stream: Rc<TcpStream>, mut outgoing: mpsc::Receiver<Reply>) {
    while let Some((buf, range, permit)) = outgoing.recv().await {
        let (result, _) = stream.write_all(buf.slice(range)).await;
        drop(permit);
        if result.is_err() {
            return;
        }
    }
}
