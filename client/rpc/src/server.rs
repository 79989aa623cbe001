//! The server side of a tokio port (the metadata plane's).
//!
//! Every connection proves itself first (I12). Garbage, a wrong length or a wrong key close that
//! connection and raise a counter; nothing else happens. Requests of one connection run
//! concurrently up to a limit; above it the connection is simply not read, which is back-pressure.

use crate::frame::{Frame, REQUESTS_READ_AHEAD_BYTES};
use crate::handshake;
use crate::writer::FrameWriter;
use ebb_dataplane_protocol::ClusterId;
use ebb_dataplane_protocol::auth::{ClusterKey, Hello};
use futures::FutureExt;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Connections at most; further ones are closed at once (I9).
const CONNECTIONS_MAX: usize = 4096;
/// Requests of one connection in progress at most.
const REQUESTS_PER_CONNECTION_MAX: usize = 256;
/// A peer that has not proved itself by then is dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Who called.
#[derive(Clone, Debug)]
pub struct Peer {
    /// What it said of itself, proved.
    pub hello: Hello,
    /// From where.
    pub address: SocketAddr,
    /// Number of the connection, unique in this process.
    pub connection: u64,
}

/// What a port saw and refused.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections accepted.
    pub accepted: AtomicU64,
    /// Handshakes that failed: wrong key, another cluster, garbage, silence.
    pub refused_handshakes: AtomicU64,
    /// Proved connections closed over a bad frame.
    pub refused_frames: AtomicU64,
    /// Connections closed because there were too many.
    pub over_limit: AtomicU64,
    /// Requests handled.
    pub requests: AtomicU64,
}

/// Answers requests.
pub trait Handler: Send + Sync + 'static {
    /// Answers one request; the reply's header is `request.header.reply(status)`.
    fn handle(&self, peer: Peer, frame: Frame) -> impl Future<Output = Frame> + Send;
}

/// Serves a port until `shutdown` is cancelled; connections are closed then.
pub async fn serve<H: Handler>(
    listener: TcpListener,
    key: ClusterKey,
    cluster: ClusterId,
    body_bytes_max: u32,
    handler: Arc<H>,
    counters: Arc<Counters>,
    shutdown: CancellationToken,
) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connection = 0u64;
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                // Out of descriptors, mostly: wait for some to close instead of spinning.
                tracing::warn!(error = %e, "accept failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        counters.accepted.fetch_add(1, Ordering::Relaxed);
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            counters.over_limit.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        connection += 1;
        let (key, handler, counters) = (key.clone(), Arc::clone(&handler), Arc::clone(&counters));
        let stop = shutdown.child_token();
        tokio::spawn(async move {
            let _slot = slot;
            let serving = Serving { body_bytes_max, handler, counters };
            tokio::select! {
                () = stop.cancelled() => {}
                () = serving.connection(stream, address, connection, &key, cluster) => {}
            }
        });
    }
}

struct Serving<H> {
    body_bytes_max: u32,
    handler: Arc<H>,
    counters: Arc<Counters>,
}

impl<H: Handler> Serving<H> {
    async fn connection(
        self,
        mut stream: TcpStream,
        address: SocketAddr,
        connection: u64,
        key: &ClusterKey,
        cluster: ClusterId,
    ) {
        let _ = stream.set_nodelay(true);
        let proving = handshake::accept(&mut stream, key, cluster);
        let hello = match tokio::time::timeout(HANDSHAKE_TIMEOUT, proving).await {
            Ok(Ok(hello)) => hello,
            Ok(Err(reason)) => {
                self.counters.refused_handshakes.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%address, reason, "handshake refused");
                return;
            }
            Err(_) => {
                self.counters.refused_handshakes.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%address, "handshake timed out");
                return;
            }
        };
        let peer = Peer { hello, address, connection };
        let (read, write) = stream.into_split();
        let mut read = BufReader::with_capacity(REQUESTS_READ_AHEAD_BYTES, read);
        // Handlers that still work when the connection ends hold nothing of it.
        let ended = CancellationToken::new();
        let _end = ended.clone().drop_guard();
        let writer = Arc::new(FrameWriter::new(write, ended.clone()));
        let permits = Arc::new(Semaphore::new(REQUESTS_PER_CONNECTION_MAX));
        loop {
            let next = Frame::read(&mut read, self.body_bytes_max);
            let frame = match ended.run_until_cancelled(next).await {
                Some(Ok(Some(frame))) if !frame.header.is_reply() => frame,
                None | Some(Ok(None)) => break,
                Some(Ok(Some(_))) => {
                    self.counters.refused_frames.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Some(Err(e)) => {
                    self.counters.refused_frames.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(%address, error = %e, "connection closed");
                    break;
                }
            };
            self.counters.requests.fetch_add(1, Ordering::Relaxed);
            let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { break };
            let (handler, writer, peer) =
                (Arc::clone(&self.handler), Arc::downgrade(&writer), peer.clone());
            let mut answering = Box::pin(async move {
                let _permit = permit;
                let reply = handler.handle(peer, frame).await;
                // A gone connection takes no reply; its caller asks again.
                if let Some(writer) = writer.upgrade() {
                    drop(writer.send(reply, false).await);
                }
            });
            // What needs no waiting is answered here and now. The rest goes on as a task that is
            // never stopped half-way: what it began (a log entry) it ends.
            if answering.as_mut().now_or_never().is_none() {
                tokio::spawn(answering);
            }
        }
        // The peer may have closed only its sending half: what is being answered is still answered.
        let all = REQUESTS_PER_CONNECTION_MAX as u32;
        drop(ended.run_until_cancelled(permits.acquire_many(all)).await);
    }
}
