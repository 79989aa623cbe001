//! A voter: log, state and Raft of one process, and the two ways to use them: submit a command, read
//! a confirmed view.

use crate::config::MetaConfig;
use crate::error::MetaError;
use crate::raft::kv::Reader as View;
use crate::raft::log::{LogOptions, LogStore};
use crate::raft::network::Network;
use crate::raft::propose::{ProposeError, Proposer, ReadIndex};
use crate::raft::snapshot::Incoming;
use crate::raft::state::{StateReader, StateStore};
use crate::raft::wire::{self, Message};
use crate::raft::{Raft, TypeConfig, Vote};
use bytes::Bytes;
use ebb_dataplane_protocol::Status;
use ebb_metaplane_protocol::{Command, CommandReply};
use ebb_namespace::Reader;
use ebb_rpc::{Frame, Identity};
use openraft::errors::{InitializeError, RaftError};
use openraft::impls::BasicNode;
use openraft::raft::{AppendEntriesRequest, SnapshotResponse};
use openraft::storage::Snapshot;
use openraft::{Config, SnapshotPolicy};
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;

/// Log entries kept behind a snapshot, so that a voter that lags a little needs none.
const ENTRIES_BEHIND_SNAPSHOT: u64 = 1_000;
/// The state is made durable at least this often while it changes.
const PERSIST_EVERY: Duration = Duration::from_secs(5);

/// A voter.
pub(crate) struct Voter {
    raft: Raft,
    proposer: Proposer,
    reads: ReadIndex,
    state: StateReader,
    log: LogStore,
    snapshots: PathBuf,
    incoming: Mutex<Option<(Vote, Incoming)>>,
    load: Arc<AtomicUsize>,
}

impl Voter {
    /// Opens the directory and starts Raft; founds the group if the directory is new.
    pub(crate) async fn start(
        config: &MetaConfig,
        address: &str,
        identity: Identity,
    ) -> Result<Self, MetaError> {
        let (log_dir, dir, cache) =
            (config.dir.join("log"), config.dir.clone(), config.cache_bytes);
        let load = Arc::new(AtomicUsize::new(0));
        // Followers should not wait for the leader's own disk.
        let sole = (config.members.len() <= 1).then(|| Arc::clone(&load));
        let options = LogOptions { load: sole, ..LogOptions::default() };
        let open = move || -> Result<(LogStore, StateStore), MetaError> {
            let log = LogStore::open(&log_dir, options).map_err(|e| MetaError::io(&log_dir, e))?;
            let state = StateStore::open(&dir, cache).map_err(|e| MetaError::io(&dir, e))?;
            Ok((log, state))
        };
        let (log, store) = tokio::task::spawn_blocking(open)
            .await
            .map_err(|e| MetaError::Raft(e.to_string()))??;
        let state = store.reader();
        let snapshots = store.snapshot_dir();
        let settings = Config {
            cluster_name: config.cluster.clone(),
            heartbeat_interval: 100,
            election_timeout_min: 400,
            election_timeout_max: 800,
            max_payload_entries: 512,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_entries.max(1)),
            max_in_snapshot_log_to_keep: ENTRIES_BEHIND_SNAPSHOT,
            enable_pre_vote: Some(true),
            ..Config::default()
        };
        let settings = Arc::new(settings.validate().map_err(|e| MetaError::Config(e.to_string()))?);
        let raft = Raft::new(config.node_id, settings, Network::new(identity), log.clone(), store)
            .await
            .map_err(|e| MetaError::Raft(e.to_string()))?;
        let members = members(config, address)?;
        let founded = raft.is_initialized().await.map_err(|e| MetaError::Raft(e.to_string()))?;
        // Every founder founds the same group; openraft keeps the elections apart.
        if !founded {
            match raft.initialize(members).await {
                Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
                Err(e) => return Err(MetaError::Raft(e.to_string())),
            }
        }
        tokio::spawn(persist(state.clone()));
        Ok(Self {
            proposer: Proposer::start(raft.clone()),
            reads: ReadIndex::new(raft.clone()),
            raft,
            state,
            log,
            snapshots,
            incoming: Mutex::new(None),
            load,
        })
    }

    /// Counts a request in progress for as long as the answer is held.
    pub(crate) fn busy(&self) -> Busy {
        self.load.fetch_add(1, Ordering::Relaxed);
        Busy(Arc::clone(&self.load))
    }

    /// Raft itself.
    pub(crate) fn raft(&self) -> &Raft {
        &self.raft
    }

    /// Commits and applies a command.
    pub(crate) async fn submit(&self, command: Command) -> Result<CommandReply, ProposeError> {
        self.proposer.submit(command).await
    }

    /// The term in which this node leads, as Raft last published it.
    pub(crate) fn leading_term(&self) -> Option<u64> {
        self.reads.leading_term()
    }

    /// Reads the state as of now, linearizably.
    pub(crate) async fn read<T>(
        &self,
        read: impl FnOnce(&View<'_>, Reader<'_, View<'_>>) -> T,
    ) -> Result<T, ProposeError> {
        self.reads.confirm().await?;
        self.peek(read)
    }

    /// Reads the state as applied here: for the leader's own work, whose commands are checked again
    /// when they are applied.
    pub(crate) fn peek<T>(
        &self,
        read: impl FnOnce(&View<'_>, Reader<'_, View<'_>>) -> T,
    ) -> Result<T, ProposeError> {
        let failed = |e: io::Error| ProposeError::Stopped(e.to_string());
        let view = self.state.view().map_err(failed)?;
        let result = read(&view, Reader(&view));
        view.check().map_err(failed)?;
        Ok(result)
    }

    /// Answers another voter.
    pub(crate) async fn answer(&self, request: &Frame) -> Frame {
        match self.handle(request).await {
            Ok(json) => {
                let header = request.header.reply(Status::Ok);
                Frame::new(header, Bytes::from(json), Bytes::new())
            }
            Err((status, why)) => Frame::refusal(&request.header, status, &why),
        }
    }

    async fn handle(&self, request: &Frame) -> Result<Vec<u8>, (Status, String)> {
        let bad = |e: String| (Status::BadRequest, e);
        let failed = |e: String| (Status::Internal, e);
        let (message, entries) = wire::decode(&request.body).map_err(|e| bad(e.to_string()))?;
        let json = match message {
            Message::Append { vote, previous, commit, .. } => {
                let rpc = AppendEntriesRequest::<TypeConfig> {
                    vote,
                    prev_log_id: previous,
                    entries,
                    leader_commit: commit,
                };
                let answer = self.raft.append_entries(rpc).await;
                serde_json::to_vec(&answer.map_err(|e| failed(e.to_string()))?)
            }
            Message::Vote(rpc) => {
                let answer = self.raft.vote(rpc).await;
                serde_json::to_vec(&answer.map_err(|e| failed(e.to_string()))?)
            }
            Message::PreVote(rpc) => {
                let answer = self.raft.pre_vote(rpc).await;
                serde_json::to_vec(&answer.map_err(|e| failed(e.to_string()))?)
            }
            Message::Snapshot { vote, meta, offset, total } => {
                let answer = self
                    .snapshot_piece(vote, meta, (offset, total), &request.payload)
                    .await
                    .map_err(failed)?;
                serde_json::to_vec(&answer)
            }
        };
        json.map_err(|e| failed(e.to_string()))
    }

    async fn snapshot_piece(
        &self,
        vote: Vote,
        meta: crate::raft::SnapshotMeta,
        (offset, total): (u64, u64),
        bytes: &[u8],
    ) -> Result<Option<SnapshotResponse<TypeConfig>>, String> {
        let mut incoming = self.incoming.lock().await;
        if offset == 0 {
            let begun = Incoming::begin(&self.snapshots, meta.clone(), total);
            *incoming = Some((vote, begun.map_err(|e| e.to_string())?));
        }
        let Some((from, current)) = incoming.as_mut() else {
            return Err("a piece of a snapshot that was not begun".into());
        };
        if *from != vote || current.meta != meta {
            return Err("a piece of another snapshot".into());
        }
        if !current.piece(offset, bytes).map_err(|e| e.to_string())? {
            return Ok(None);
        }
        let Some((_, whole)) = incoming.take() else { return Ok(None) };
        let file = whole.finish().map_err(|e| e.to_string())?;
        let snapshot = Snapshot { meta, snapshot: file };
        let answer = self.raft.install_full_snapshot(vote, snapshot).await;
        answer.map(Some).map_err(|e| e.to_string())
    }

    /// Stops Raft and makes the state durable.
    pub(crate) async fn stop(&self) {
        if let Err(e) = self.raft.shutdown().await {
            tracing::warn!(error = %e, "Raft did not stop in order");
        }
        if let Err(e) = self.log.close().await {
            tracing::warn!(error = %e, "the Raft log did not close in order");
        }
        let state = self.state.clone();
        match tokio::task::spawn_blocking(move || state.close()).await {
            Ok(Ok(())) => {}
            // Not a loss: the log holds it, the next start replays it.
            Ok(Err(e)) => tracing::warn!(error = %e, "the state was not made durable at the end"),
            Err(e) => tracing::warn!(error = %e, "the state was not made durable at the end"),
        }
    }
}

/// A request in progress.
pub(crate) struct Busy(Arc<AtomicUsize>);
impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn members(config: &MetaConfig, address: &str) -> Result<BTreeMap<u64, BasicNode>, MetaError> {
    if config.members.is_empty() {
        return Ok(BTreeMap::from([(config.node_id, BasicNode::new(address))]));
    }
    config
        .members
        .iter()
        .map(|(id, address)| {
            let id = id.parse().map_err(|_| MetaError::Config(format!("members: '{id}'")))?;
            Ok((id, BasicNode::new(address)))
        })
        .collect()
}

async fn persist(state: StateReader) {
    loop {
        state.applied().notified().await;
        tokio::time::sleep(PERSIST_EVERY).await;
        if state.is_closed() {
            return;
        }
        let own = state.clone();
        if let Ok(Err(e)) = tokio::task::spawn_blocking(move || own.persist()).await {
            tracing::error!(error = %e, "the metadata store failed");
        }
    }
}
