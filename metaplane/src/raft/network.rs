//! Raft between voters, over the cluster's own frames (opcode `Raft`, role `Meta`).
//!
//! With one voter nothing here runs; adding members needs nothing else. Snapshots have a connection
//! of their own, so that they do not delay heartbeats. The first word on each connection is a greeting:
//! who answers at a voter's address with another id or another directory than the membership names is
//! sent nothing and counts for nothing.

use super::dial::{Dial, Line};
use super::identity::VoterIdentity;
use super::snapshot::SnapshotFile;
use super::wire::{self, Greeting, Message};
use super::{LogId, TypeConfig, Vote, VoterNode};
use bytes::Bytes;
use ebb_dataplane_protocol::{Header, Opcode};
use ebb_rpc::RpcError;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::type_config::alias::SnapshotOf;
use openraft::{OptionalSend, RaftNetworkFactory, RaftNetworkV2};
use serde::de::DeserializeOwned;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a snapshot in one frame.
const SNAPSHOT_PIECE_BYTES: u64 = 1 << 20;
/// Limit of one piece, whatever openraft allows for the whole.
const SNAPSHOT_PIECE_TIMEOUT: Duration = Duration::from_secs(10);
/// The last piece is answered when the whole is installed: so much time more for each of these bytes.
const INSTALL_BYTES_PER_S: u64 = 8 << 20;
/// Limit to connect and greet where no Raft message sets one.
const GREET_TIMEOUT: Duration = Duration::from_secs(1);

/// Makes connections to voters.
#[derive(Clone)]
pub struct Network {
    dial: Arc<dyn Dial>,
    own: VoterIdentity,
}

impl Network {
    /// Connections greet as this voter.
    pub fn new(dial: Arc<dyn Dial>, own: VoterIdentity) -> Self {
        Self { dial, own }
    }

    /// Asks who is at an address.
    pub async fn greet(&self, address: &str) -> Result<Greeting, String> {
        let connection = self.dial.connect(address, GREET_TIMEOUT).await;
        let connection = connection.map_err(|e| e.to_string())?;
        self.greet_on(&*connection, GREET_TIMEOUT).await
    }

    /// A connection to a voter of the membership, for questions beside those of Raft.
    pub async fn line(
        &self,
        target: u64,
        node: &VoterNode,
        timeout: Duration,
    ) -> Result<Arc<dyn Line>, String> {
        let (network, node) = (self.clone(), node.clone());
        let peer = Peer { target, node, network, connection: None };
        peer.connect(timeout).await.map_err(|e| e.to_string())
    }

    async fn greet_on(&self, on: &dyn Line, timeout: Duration) -> Result<Greeting, String> {
        let hello = Message::Greet { id: self.own.id, store: self.own.store.clone() };
        let body = Bytes::from(wire::encode(&hello, &[]));
        let header = Header::request(Opcode::Raft, 0);
        let reply = on.call(header, body, Bytes::new(), timeout).await;
        let reply = reply.map_err(|e| e.to_string())?;
        serde_json::from_slice(&reply.body).map_err(|e| e.to_string())
    }
}

/// The way to one voter.
pub struct Peer {
    target: u64,
    node: VoterNode,
    network: Network,
    connection: Option<Arc<dyn Line>>,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &VoterNode) -> Peer {
        Peer { target, node: node.clone(), network: self.clone(), connection: None }
    }
}

type Refused = RPCError<TypeConfig>;

fn refused(e: &RpcError) -> Refused {
    match e {
        RpcError::Connect { .. } | RpcError::WrongKey { .. } | RpcError::Handshake { .. } => {
            RPCError::Unreachable(Unreachable::from_string(e))
        }
        e => RPCError::Network(NetworkError::from_string(e)),
    }
}

impl Peer {
    /// Connects, and makes sure that it is the voter which the membership means.
    async fn connect(&self, timeout: Duration) -> Result<Arc<dyn Line>, Refused> {
        let other = |why: String| RPCError::Unreachable(Unreachable::from_string(why));
        let address = &self.node.addr;
        let connection = self.network.dial.connect(address, timeout).await;
        let connection = connection.map_err(|e| refused(&e))?;
        let there = self.network.greet_on(&*connection, timeout).await.map_err(other)?;
        if there.id != self.target {
            return Err(other(format!("voter {} is at {address}, not {}", there.id, self.target)));
        }
        if !self.node.store.is_empty() && there.store != self.node.store {
            let why = format!("voter {} at {address} has lost its directory", self.target);
            tracing::warn!(why, "it counts for nothing until it is replaced");
            return Err(other(why));
        }
        Ok(connection)
    }

    async fn call<T: DeserializeOwned>(
        &mut self,
        body: Vec<u8>,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<T, Refused> {
        let connection = match self.connection.take().filter(|c| !c.is_closed()) {
            Some(connection) => connection,
            None => self.connect(timeout).await?,
        };
        let header = Header::request(Opcode::Raft, 0);
        let reply = connection
            .call(header, Bytes::from(body), payload, timeout)
            .await
            .map_err(|e| refused(&e))?;
        self.connection = Some(connection);
        serde_json::from_slice(&reply.body)
            .map_err(|e| RPCError::Network(NetworkError::from_string(e)))
    }

    async fn send_snapshot(
        &mut self,
        vote: Vote,
        snapshot: &SnapshotOf<TypeConfig, SnapshotFile>,
    ) -> Result<SnapshotResponse<TypeConfig>, Refused> {
        let total = snapshot.snapshot.bytes();
        let mut offset = 0;
        loop {
            let n = (total - offset).min(SNAPSHOT_PIECE_BYTES);
            let piece = snapshot
                .snapshot
                .read_piece(offset, n as usize)
                .await
                .map_err(|e| RPCError::Network(NetworkError::from_string(e)))?;
            let meta = snapshot.meta.clone();
            let body = wire::encode(&Message::Snapshot { vote, meta, offset, total }, &[]);
            let mut limit = SNAPSHOT_PIECE_TIMEOUT;
            if offset + n >= total {
                limit += Duration::from_secs(total / INSTALL_BYTES_PER_S);
            }
            let answer: Option<SnapshotResponse<TypeConfig>> =
                self.call(body, piece, limit).await?;
            offset += n;
            // A voter of a later term answers early.
            if let Some(answer) = answer {
                return Ok(answer);
            }
            if offset >= total {
                let text = "the voter took the snapshot but did not answer for it";
                return Err(RPCError::Network(NetworkError::from_string(text)));
            }
        }
    }
}

impl RaftNetworkV2<TypeConfig> for Peer {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, Refused> {
        let (body, partial): (_, Option<LogId>) = wire::encode_append(&rpc);
        let answer = self.call(body, Bytes::new(), option.soft_ttl()).await?;
        Ok(match (answer, partial) {
            (AppendEntriesResponse::Success, Some(last)) => {
                AppendEntriesResponse::PartialSuccess(Some(last))
            }
            (answer, _) => answer,
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Refused> {
        self.call(wire::encode(&Message::Vote(rpc), &[]), Bytes::new(), option.soft_ttl()).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, Refused> {
        self.call(wire::encode(&Message::PreVote(rpc), &[]), Bytes::new(), option.soft_ttl()).await
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, Refused> {
        let (vote, to) = (*rpc.from_leader(), *rpc.to_node_id());
        let message = Message::Transfer { vote, to, last: rpc.last_log_id().copied() };
        self.call(wire::encode(&message, &[]), Bytes::new(), option.soft_ttl()).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<TypeConfig, SnapshotFile>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = self.send_snapshot(vote, &snapshot) => Ok(sent?),
        }
    }
}
