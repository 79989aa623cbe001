//! Raft between voters, over the cluster's own frames (opcode `Raft`, role `Meta`).
//!
//! With one voter nothing here runs; adding members needs nothing else. Snapshots have a connection
//! of their own, so that they do not delay heartbeats.

use super::snapshot::SnapshotFile;
use super::wire::{self, Message};
use super::{LogId, TypeConfig, Vote};
use bytes::Bytes;
use ebb_dataplane_protocol::{Header, Opcode};
use ebb_rpc::{Connection, Identity, RpcError};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::RPCOption;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::type_config::alias::SnapshotOf;
use openraft::{OptionalSend, RaftNetworkFactory, RaftNetworkV2};
use serde::de::DeserializeOwned;
use std::future::Future;
use std::time::Duration;

/// Bytes of a snapshot in one frame.
const SNAPSHOT_PIECE_BYTES: u64 = 1 << 20;
/// Limit of one piece, whatever openraft allows for the whole.
const SNAPSHOT_PIECE_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes connections to voters.
#[derive(Clone, Debug)]
pub struct Network {
    identity: Identity,
}

impl Network {
    /// Connections prove themselves with this identity.
    pub fn new(identity: Identity) -> Self {
        Self { identity }
    }
}

/// The way to one voter.
pub struct Peer {
    address: String,
    identity: Identity,
    connection: Option<Connection>,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, _target: u64, node: &openraft::impls::BasicNode) -> Peer {
        Peer { address: node.addr.clone(), identity: self.identity.clone(), connection: None }
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
    async fn call<T: DeserializeOwned>(
        &mut self,
        body: Vec<u8>,
        payload: Bytes,
        timeout: Duration,
    ) -> Result<T, Refused> {
        let connection = match self.connection.take().filter(|c| !c.is_closed()) {
            Some(connection) => connection,
            None => Connection::connect(&self.address, &self.identity, timeout)
                .await
                .map_err(|e| refused(&e))?,
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
            let answer: Option<SnapshotResponse<TypeConfig>> =
                self.call(body, piece, SNAPSHOT_PIECE_TIMEOUT).await?;
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
