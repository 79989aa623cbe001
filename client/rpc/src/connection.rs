//! A multiplexed client connection: many calls in flight, answers in any order.
//!
//! One task reads; callers write themselves, one frame at a time ([`FrameWriter`]). When the connection breaks,
//! every call in flight fails with `Closed` and the connection stays closed: reconnecting is the
//! caller's decision, since only it knows what may be repeated.

use crate::error::RpcError;
use crate::frame::{Frame, READ_AHEAD_BYTES};
use crate::handshake::{self, Identity};
use crate::writer::FrameWriter;
use bytes::Bytes;
use ebb_dataplane_protocol::control::{Control, ControlReply};
use ebb_dataplane_protocol::header::{BODY_BYTES_MAX_META, FLAG_ANY_VOTER};
use ebb_dataplane_protocol::{ClusterId, Header, Opcode, Status, codec};
use ebb_metaplane_protocol::{Request, Response};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::BufReader;
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::sync::{Semaphore, oneshot};
use tokio_util::sync::CancellationToken;

/// Calls in flight on one connection at most; further ones wait (I9).
const IN_FLIGHT_MAX: usize = 256;

/// With more calls in flight than this, some are likely to be made at the same time.
const CROWD_MIN: usize = 2;

/// A connection to one port.
#[derive(Clone)]
pub struct Connection {
    inner: Arc<Inner>,
}

/// A connection that others keep open.
pub(crate) struct WeakConnection(std::sync::Weak<Inner>);

impl WeakConnection {
    pub(crate) fn upgrade(&self) -> Option<Connection> {
        self.0.upgrade().map(|inner| Connection { inner })
    }
}

struct Inner {
    address: String,
    cluster: ClusterId,
    writer: FrameWriter,
    pending: Mutex<HashMap<u64, oneshot::Sender<Frame>>>,
    next_id: AtomicU64,
    closed: AtomicBool,
    in_flight: Semaphore,
    stop: CancellationToken,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Inner {
    fn pending(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Frame>>> {
        self.pending.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Fails every call in flight (dropping their senders) and takes no more.
    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.pending().clear();
    }

    fn closed_error(&self) -> RpcError {
        RpcError::Closed { address: self.address.clone() }
    }
}

/// Forgets a call whose caller stopped waiting.
struct Forget<'a>(&'a Inner, u64);
impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.pending().remove(&self.1);
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("address", &self.inner.address).finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects and proves both sides (I12). `timeout` covers both.
    pub async fn connect(
        address: &str,
        identity: &Identity,
        timeout: Duration,
    ) -> Result<Self, RpcError> {
        let opening = async {
            let mut stream = TcpStream::connect(address)
                .await
                .map_err(|source| RpcError::Connect { address: address.to_owned(), source })?;
            // Requests are whole frames: waiting for more bytes would only add 40 ms.
            let _ = stream.set_nodelay(true);
            let cluster = handshake::connect(&mut stream, address, identity).await?;
            Ok::<_, RpcError>((stream, cluster))
        };
        let (stream, cluster) = tokio::time::timeout(timeout, opening).await.map_err(|_| {
            RpcError::Timeout { address: address.to_owned(), ms: timeout.as_millis() as u64 }
        })??;
        let (read, write) = stream.into_split();
        let stop = CancellationToken::new();
        let inner = Arc::new(Inner {
            address: address.to_owned(),
            cluster,
            writer: FrameWriter::new(write, stop.clone()),
            pending: Mutex::default(),
            next_id: AtomicU64::new(1),
            closed: AtomicBool::new(false),
            in_flight: Semaphore::new(IN_FLIGHT_MAX),
            stop,
        });
        tokio::spawn(read_replies(Arc::downgrade(&inner), inner.stop.clone(), read));
        Ok(Self { inner })
    }

    /// Where it leads.
    pub fn address(&self) -> &str {
        &self.inner.address
    }

    /// The cluster the peer belongs to.
    pub fn cluster(&self) -> ClusterId {
        self.inner.cluster
    }

    /// Whether it broke or was closed.
    pub fn is_closed(&self) -> bool {
        self.inner.closed.load(Ordering::Acquire)
    }

    /// Whether it is this one.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// A handle that does not keep it open.
    pub(crate) fn downgrade(&self) -> WeakConnection {
        WeakConnection(Arc::downgrade(&self.inner))
    }

    /// Whether calls wait for their answers.
    pub fn is_waiting(&self) -> bool {
        !self.inner.pending().is_empty()
    }

    /// Closes it; calls in flight fail with `Closed`.
    pub fn close(&self) {
        self.inner.close();
        self.inner.stop.cancel();
    }

    /// One call. The header's request id, lengths and checksum are filled in. Any status comes back
    /// in the frame's header: only transport failures are errors here.
    pub async fn call(
        &self,
        header: Header,
        body: Bytes,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Frame, RpcError> {
        let inner = &*self.inner;
        let work = async {
            let _permit = inner.in_flight.acquire().await.map_err(|_| inner.closed_error())?;
            let id = inner.next_id.fetch_add(1, Ordering::Relaxed);
            let (tx, rx) = oneshot::channel();
            let crowded = {
                let mut pending = inner.pending();
                pending.insert(id, tx);
                pending.len() > CROWD_MIN
            };
            let _forget = Forget(inner, id);
            // After the insert: a close that ran before it would leave the entry behind.
            if self.is_closed() {
                return Err(inner.closed_error());
            }
            let frame = Frame::new(Header { request_id: id, ..header }, body, payload);
            if inner.writer.send(frame, crowded).await.is_err() {
                self.close();
                return Err(inner.closed_error());
            }
            rx.await.map_err(|_| inner.closed_error())
        };
        tokio::time::timeout(timeout, work).await.map_err(|_| RpcError::Timeout {
            address: inner.address.clone(),
            ms: timeout.as_millis() as u64,
        })?
    }

    /// A call that must answer `Ok`; anything else is [`RpcError::Status`].
    pub async fn call_ok(
        &self,
        header: Header,
        body: Bytes,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<Frame, RpcError> {
        let reply = self.call(header, body, payload, timeout).await?;
        match reply.header.status {
            Status::Ok => Ok(reply),
            status => Err(RpcError::Status {
                status,
                retry_after_ms: reply.header.retry_after_ms,
                message: String::from_utf8_lossy(&reply.body).into_owned(),
            }),
        }
    }

    /// Asks for a sign of life; what a metadata server answers are the addresses of all voters, separated by
    /// commas (empty: of an earlier version). `None`: as many calls are in flight as there may be, and what
    /// the peer does not read it can't answer.
    pub async fn ping(&self, timeout: Duration) -> Result<Option<Frame>, RpcError> {
        if self.inner.in_flight.available_permits() == 0 {
            return Ok(None);
        }
        let header = Header::request(Opcode::Ping, 0);
        self.call_ok(header, Bytes::new(), Bytes::new(), timeout).await.map(Some)
    }

    /// A control request to a core (role `Meta`).
    pub async fn control(
        &self,
        control: &Control,
        timeout: Duration,
    ) -> Result<ControlReply, RpcError> {
        let header = Header::request(Opcode::Control, 0);
        let body = codec::encode(control).into();
        let reply = self.call_ok(header, body, Bytes::new(), timeout).await?;
        Ok(codec::decode(&reply.body)?)
    }

    /// A metadata request to this very node.
    pub async fn meta(&self, request: &Request, timeout: Duration) -> Result<Response, RpcError> {
        self.meta_of(request, timeout).await.map(|(response, _)| response)
    }

    /// The same, and which change of the voters the server knows last.
    pub(crate) async fn meta_of(
        &self,
        request: &Request,
        timeout: Duration,
    ) -> Result<(Response, u64), RpcError> {
        let header = Header::request(Opcode::Meta, 0);
        let body = codec::encode(request).into();
        let reply = self.call_ok(header, body, Bytes::new(), timeout).await?;
        Ok((codec::decode(&reply.body)?, reply.header.membership()))
    }

    /// A question that this very node may answer though it does not lead, and whether it answered so.
    pub async fn meta_near(
        &self,
        request: &Request,
        timeout: Duration,
    ) -> Result<(Response, bool), RpcError> {
        let mut header = Header::request(Opcode::Meta, 0);
        header.flags |= FLAG_ANY_VOTER;
        let body = codec::encode(request).into();
        let reply = self.call_ok(header, body, Bytes::new(), timeout).await?;
        Ok((codec::decode(&reply.body)?, reply.header.has(FLAG_ANY_VOTER)))
    }
}

async fn read_replies(inner: std::sync::Weak<Inner>, stop: CancellationToken, read: OwnedReadHalf) {
    let mut read = BufReader::with_capacity(READ_AHEAD_BYTES, read);
    loop {
        let frame = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            // The read is only abandoned together with the connection, so a cancelled half-read
            // loses nothing that matters.
            frame = Frame::read(&mut read, BODY_BYTES_MAX_META) => frame,
        };
        let Some(inner) = inner.upgrade() else { break };
        match frame {
            Ok(Some(frame)) if frame.header.is_reply() => {
                let waiting = inner.pending().remove(&frame.header.request_id);
                if let Some(tx) = waiting {
                    let _ = tx.send(frame);
                }
            }
            Ok(_) => break,
            Err(e) => {
                tracing::debug!(address = inner.address, error = %e, "connection broke");
                break;
            }
        }
    }
    if let Some(inner) = inner.upgrade() {
        inner.close();
    }
}
