//! The minimal server on glommio 0.9: what that engine offers for this job, used as it is meant.
//!
//! DMA reads into its own registered buffers (`read_at_aligned`), a task per request, a writer per
//! connection. It reads into memory that nobody else may write to, so a head cannot stand before its payload:
//! small replies are copied together, large ones leave in two writes.

use super::IN_FLIGHT_MAX;
use super::child::Service;
use super::job::{self, REQUEST_BYTES, Request, requests};
use crate::BenchError;
use futures::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use glommio::channels::local_channel::{LocalReceiver, LocalSender, new_bounded};
use glommio::io::{DmaFile, ReadResult};
use glommio::net::{TcpListener, TcpStream};
use glommio::{LocalExecutorBuilder, Placement};
use std::rc::Rc;

/// Registered memory, for 1 MiB reads at some depth. Of the kernel's limit only root is free; without, it
/// falls back to memory that isn't registered, by itself.
const IO_BYTES: usize = 64 << 20;
/// Replies up to this are copied into one piece.
const COPIED_BYTES_MAX: usize = 64 << 10;

fn failed(why: impl std::fmt::Display) -> BenchError {
    BenchError::Program { program: "glommio", why: why.to_string() }
}

struct Server {
    file: DmaFile,
    file_bytes: u64,
    checksums: bool,
}

/// What goes before the payload, and the payload.
type Reply = (Vec<u8>, ReadResult);

/// Serves forever; `ready` gets the port.
pub(super) fn serve(service: &Service, ready: impl FnOnce(u16)) -> Result<(), BenchError> {
    // The thread is pinned already.
    let executor =
        LocalExecutorBuilder::new(Placement::Unbound).io_memory(IO_BYTES).make().map_err(failed)?;
    let (_, file_bytes) = job::open(&service.file)?;
    executor.run(async {
        let file = DmaFile::open(&service.file).await.map_err(failed)?;
        let server = Rc::new(Server { file, file_bytes, checksums: service.checksums });
        let listener = TcpListener::bind("127.0.0.1:0").map_err(failed)?;
        ready(listener.local_addr().map_err(failed)?.port());
        loop {
            let stream = listener.accept().await.map_err(failed)?;
            stream.set_nodelay(true).map_err(failed)?;
            glommio::spawn_local(connection(Rc::clone(&server), stream)).detach();
        }
    })
}

async fn connection(server: Rc<Server>, stream: TcpStream) {
    let (read, write) = stream.split();
    let (replies, outgoing) = new_bounded(IN_FLIGHT_MAX);
    let writer = glommio::spawn_local(write_replies(write, outgoing));
    read_requests(server, read, Rc::new(replies)).await;
    // Not before its last reply is written or refused.
    writer.await;
}

async fn read_requests(
    server: Rc<Server>,
    mut stream: ReadHalf<TcpStream>,
    replies: Rc<LocalSender<Reply>>,
) {
    // As many as the generator may have in flight are taken; more wait in the socket.
    let window = Rc::new(glommio::sync::Semaphore::new(IN_FLIGHT_MAX as u64));
    let mut buf = vec![0; IN_FLIGHT_MAX * REQUEST_BYTES];
    let mut have = 0;
    let mut asked = Vec::new();
    loop {
        match stream.read(&mut buf[have..]).await {
            Ok(n) if n > 0 => have += n,
            _ => return,
        }
        let Ok(took) = requests(&buf[..have], server.file_bytes, |r| asked.push(r)) else { return };
        buf.copy_within(took..have, 0);
        have -= took;
        for request in asked.drain(..) {
            let Ok(permit) = window.acquire_static_permit(1).await else { return };
            let (server, replies) = (Rc::clone(&server), Rc::clone(&replies));
            glommio::spawn_local(async move {
                match server.read(&request).await {
                    Ok(reply) => {
                        let _ = replies.send(reply).await;
                    }
                    // The peer learns by its patience; the figure would be void anyway.
                    Err(e) => eprintln!("glommio: {e}"),
                }
                drop(permit);
            })
            .detach();
        }
    }
}

impl Server {
    async fn read(&self, request: &Request) -> Result<Reply, BenchError> {
        let read =
            self.file.read_at_aligned(request.offset, request.bytes).await.map_err(failed)?;
        if read.len() != request.bytes {
            return Err(failed("a short read"));
        }
        let head = request.head(&read, self.checksums);
        Ok((head, read))
    }
}

async fn write_replies(mut stream: WriteHalf<TcpStream>, outgoing: LocalReceiver<Reply>) {
    while let Some((mut head, payload)) = outgoing.recv().await {
        let result = if payload.len() <= COPIED_BYTES_MAX {
            head.extend_from_slice(&payload);
            stream.write_all(&head).await
        } else {
            match stream.write_all(&head).await {
                Ok(()) => stream.write_all(&payload).await,
                Err(e) => Err(e),
            }
        };
        if result.is_err() {
            return;
        }
    }
}
