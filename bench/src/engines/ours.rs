//! Our chunk server as the load generator sees it: a session, a read grant, and proved connections to
//! the one core that holds most of the file.
//!
//! The generator's connections are plain sockets, so the handshake (I12) is spoken here by hand. No
//! retries: a map or a view that changes during a turn is a measurement to be repeated.

use super::load::Target;
use super::{core_thread, pin};
use crate::BenchError;
use ebb_dataplane_protocol::auth::{self, Challenge, ClusterKey, Hello, Proof, Role};
use ebb_dataplane_protocol::data::DataContext;
use ebb_dataplane_protocol::header::{BODY_BYTES_MAX_DATA, HEADER_BYTES};
use ebb_dataplane_protocol::{
    CHUNK_BYTES, ChunkIndex, ClusterMap, Grant, Header, InodeId, NodeId, Opcode, PgEpoch, PgId,
    Sequence, SessionId, ShardRef, SignedGrant, Status, codec,
};
use ebb_metaplane_protocol::op::OpenMode;
use ebb_metaplane_protocol::{FsError, Op, OpReply, Request, Response, SessionCall, SessionReply};
use ebb_rpc::{Identity, MetaClient};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

/// Limit of each metadata request.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often an answer that has to wait is asked for again.
const AGAIN_MAX: u32 = 100;

fn failed(why: impl std::fmt::Display) -> BenchError {
    BenchError::Program { program: "the chunk server", why: why.to_string() }
}

fn odd(answer: &Response) -> BenchError {
    failed(format!("the metadata plane answered {answer:?}"))
}

/// A file open for reading.
pub(crate) struct Ours {
    meta: MetaClient,
    key: ClusterKey,
    map: Arc<ClusterMap>,
    address: (String, u16),
    session: SessionId,
    ttl: Duration,
    signed: SignedGrant,
    grant: Grant,
}

fn random() -> Result<[u8; 16], BenchError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|e| failed(format!("no randomness: {e}")))?;
    Ok(bytes)
}

impl Ours {
    /// Opens a session, and in it `inode` for reading; `shard` is who will be asked.
    pub(crate) async fn open(
        addresses: &[String],
        key: &ClusterKey,
        map: Arc<ClusterMap>,
        inode: InodeId,
        shard: ShardRef,
    ) -> Result<Self, BenchError> {
        let (host, port) =
            map.address(shard).ok_or_else(|| failed("it is not in the cluster's map"))?;
        let address = (host.to_owned(), port);
        let meta = MetaClient::new(addresses.to_vec(), Identity::new(key.clone(), Role::Client));
        let label = format!("ebb bench engines, pid {}", std::process::id());
        let call = SessionCall::Open { client: u128::from_le_bytes(random()?), label };
        let (session, ttl) = match meta.call(&Request::Session(call), PATIENCE).await {
            Ok(Response::Session(Ok(SessionReply::Opened { session, ttl_ms }))) => {
                (session, Duration::from_millis(ttl_ms.max(30)))
            }
            Ok(other) => return Err(odd(&other)),
            Err(e) => return Err(failed(e)),
        };
        let open = OpenMode { write: false, truncate: false };
        let request = Request::Mutate {
            session,
            sequence: Sequence(1),
            answered_below: Sequence(1),
            op: Op::Open { inode, open },
            dropped: Vec::new(),
        };
        let mut tries = 0;
        let opened = loop {
            match meta.call(&request, PATIENCE).await.map_err(failed)? {
                Response::Op(Ok(OpReply::Opened(opened))) => break opened,
                Response::Op(Err(FsError::Again { retry_after_ms, .. })) if tries < AGAIN_MAX => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_millis(u64::from(retry_after_ms.max(5))))
                        .await;
                }
                other => return Err(odd(&other)),
            }
        };
        let grant = opened.grant.peek().map_err(failed)?;
        let (key, signed) = (key.clone(), opened.grant);
        Ok(Self { meta, key, map, address, session, ttl, signed, grant })
    }

    /// Keeps the session alive, for as long as it is polled.
    pub(crate) async fn renew(self: Arc<Self>) {
        loop {
            tokio::time::sleep(self.ttl / 3).await;
            let call = Request::Session(SessionCall::Renew(self.session));
            // Tried again at the next turn; a session that expires ends the measurement by itself.
            let _ = self.meta.call(&call, self.ttl / 3).await;
        }
    }

    /// Ends the session, so that it does not stay until it expires.
    pub(crate) async fn close(&self) {
        let call = Request::Session(SessionCall::Close(self.session));
        let _ = self.meta.call(&call, Duration::from_secs(5)).await;
    }

    fn prove(&self, stream: &mut TcpStream, lane: u32) -> Result<(), BenchError> {
        let hello = Hello {
            nonce: random()?,
            cluster: self.map.cluster,
            role: Role::Client,
            session: self.session,
            node: NodeId(0),
            lane,
            peer: None,
        };
        let hello = auth::encode_hello(&hello);
        let body = exchange(stream, Opcode::Hello, &hello)?;
        let challenge: Challenge = codec::decode(&body).map_err(failed)?;
        if !auth::check_server(&self.key, &hello, &challenge) {
            return Err(failed("it does not hold the cluster's key"));
        }
        let proof = auth::client_proof(&self.key, &hello, &challenge.nonce);
        exchange(stream, Opcode::Prove, &codec::encode(&Proof { proof }))?;
        Ok(())
    }
}

/// One small request and its answer, on a connection that has nothing else in flight.
fn exchange(stream: &mut TcpStream, opcode: Opcode, body: &[u8]) -> Result<Vec<u8>, BenchError> {
    let header = Header::request(opcode, 0).with_body(body);
    let mut frame = header.encode().to_vec();
    frame.extend_from_slice(body);
    stream.write_all(&frame).map_err(failed)?;
    let mut head = [0u8; HEADER_BYTES];
    stream.read_exact(&mut head).map_err(failed)?;
    let header = Header::decode(&head, BODY_BYTES_MAX_DATA).map_err(failed)?;
    let mut reply = vec![0; header.body_bytes as usize];
    stream.read_exact(&mut reply).map_err(failed)?;
    match header.status {
        Status::Ok => Ok(reply),
        status => Err(failed(format!(
            "it answered {status:?} to {opcode:?}: {}",
            String::from_utf8_lossy(&reply)
        ))),
    }
}

impl Target for Ours {
    fn connect(&self, lane: u32) -> Result<TcpStream, BenchError> {
        let (host, port) = (self.address.0.as_str(), self.address.1);
        let mut stream = TcpStream::connect((host, port)).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        self.prove(&mut stream, lane)?;
        exchange(&mut stream, Opcode::Present, &codec::encode(&self.signed))?;
        Ok(stream)
    }

    fn ask(&self, at: u64, bytes: u32) -> (Header, DataContext) {
        let chunk = ChunkIndex::of_offset(at);
        let inode = self.grant.inode;
        let (pg, pg_epoch) = self
            .map
            .pg_of(inode, chunk)
            .map_or((PgId(0), PgEpoch(0)), |(id, entry)| (id, entry.epoch));
        let header = Header {
            pg,
            inode,
            chunk,
            offset: (at % u64::from(CHUNK_BYTES)) as u32,
            length: bytes,
            ..Header::request(Opcode::Read, 0)
        };
        let context = DataContext {
            generation: self.grant.generation,
            view_version: self.grant.view.version,
            map_version: self.map.version,
            pg_epoch,
            content: self.grant.view.content,
            session: self.session,
            sequence: Sequence(0),
            answered_below: Sequence(0),
        };
        (header, context)
    }

    fn checksums(&self) -> bool {
        true
    }
}

/// A core's thread that was pinned; dropping this lets it go where it could before.
pub(crate) struct Pinned {
    thread: Pid,
    before: CpuSet,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = sched_setaffinity(self.thread, &self.before);
    }
}

/// Pins the thread of a node's core. `None`: not found, or not ours to pin.
pub(crate) fn pin_core(pid: i32, shard: ShardRef, cpu: usize) -> Option<Pinned> {
    let name = core_thread(shard);
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let thread = threads.flatten().find(|t| {
        std::fs::read_to_string(t.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
    })?;
    let thread = Pid::from_raw(thread.file_name().to_str()?.parse().ok()?);
    let before = pin(thread, cpu).ok()?;
    Some(Pinned { thread, before })
}
