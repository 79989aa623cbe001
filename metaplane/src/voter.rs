//! A voter: log, state and Raft of one process, and the two ways to use them: submit a command, read
//! a confirmed view.

use crate::config::MetaConfig;
use crate::error::MetaError;
use crate::ground::Ground;
use crate::leases::{LeaseDesk, Waits};
use crate::raft::disk::{self, Disk};
use crate::raft::follow::FollowIndex;
use crate::raft::identity::VoterIdentity;
use crate::raft::kv::{Moment, Reader as View};
use crate::raft::log::{LogOptions, LogStore};
use crate::raft::network::Network;
use crate::raft::propose::{ProposeError, Proposer, ReadIndex};
use crate::raft::snapshot::Incoming;
use crate::raft::state::{StateReader, StateStore};
use crate::raft::wire::{self, Greeting, Message};
use crate::raft::{Raft, TypeConfig, Vote, VoterNode};
use bytes::Bytes;
use ebb_dataplane_protocol::{InodeId, Status};
use ebb_metaplane_protocol::{Command, CommandReply};
use ebb_namespace::Reader;
use ebb_rpc::Frame;
use openraft::async_runtime::WatchReceiver;
use openraft::raft::{AppendEntriesRequest, SnapshotResponse, TransferLeaderRequest};
use openraft::storage::Snapshot;
use openraft::{Config, SnapshotPolicy};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Mutex, watch};

/// A voter that follows and is further behind than this does not answer.
const BEHIND_MAX: Duration = Duration::from_millis(500);
/// The state is made durable at least this often while it changes.
const PERSIST_EVERY: Duration = Duration::from_secs(5);

/// A voter.
pub(crate) struct Voter {
    pub(crate) raft: Raft,
    /// Who it is.
    pub(crate) own: VoterIdentity,
    /// host:port at which others reach it.
    pub(crate) address: String,
    pub(crate) network: Network,
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    /// It has said or heard something that counts: the identity on disk says so.
    taken_part: AtomicBool,
    taking_part: Mutex<()>,
    proposer: Proposer,
    reads: ReadIndex,
    follow: FollowIndex,
    state: StateReader,
    pub(crate) log: LogStore,
    snapshots: PathBuf,
    incoming: Mutex<Option<(Vote, Incoming)>>,
    load: Arc<AtomicUsize>,
    /// The term in which this voter serves as the leader; 0: it doesn't.
    serving: AtomicU64,
    /// Counts leaderships that ended.
    ended: watch::Sender<u64>,
}

impl Voter {
    /// Opens the directory and starts Raft. A new group is founded by [`Voter::found`], when others
    /// can reach this one.
    pub(crate) async fn start(
        config: &MetaConfig,
        address: &str,
        ground: Ground,
    ) -> Result<Self, MetaError> {
        let (log_dir, dir, cache) =
            (config.dir.join("log"), config.dir.clone(), config.cache_bytes);
        let id = config.node_id;
        let load = Arc::new(AtomicUsize::new(0));
        // Followers should not wait for the leader's own disk.
        let sole = (config.members.len() <= 1 && !config.join).then(|| Arc::clone(&load));
        let segment_bytes = ground.pace.segment_bytes;
        let options = LogOptions { load: sole, segment_bytes, ..LogOptions::default() };
        let disk = Arc::clone(&ground.disk);
        let open = move || -> Result<(VoterIdentity, LogStore, StateStore), MetaError> {
            let own = VoterIdentity::open(&*disk, &dir, id, crate::service::random())
                .map_err(|e| MetaError::io(&dir, e))?;
            // A directory that isn't there holds nothing either.
            let is_empty = |dir: &Path| disk.list(dir).map_or_else(is_absent, |l| l.is_empty());
            if own.joined && is_empty(&log_dir) {
                return Err(MetaError::LostDirectory { id, dir });
            }
            let log =
                LogStore::open(&disk, &log_dir, options).map_err(|e| MetaError::io(&log_dir, e))?;
            let state = StateStore::open(&disk, &dir, cache).map_err(|e| MetaError::io(&dir, e))?;
            state.cover(log.last()).map_err(|e| MetaError::io(&dir, e))?;
            Ok((own, log, state))
        };
        let (own, log, store) =
            disk::work(&*ground.disk, open).await.map_err(|e| MetaError::Raft(e.to_string()))??;
        if own.id != id {
            let (dir, found) = (config.dir.clone(), own.id);
            return Err(MetaError::OtherVoter { dir, found, wanted: id });
        }
        let state = store.reader();
        let snapshots = store.snapshot_dir();
        let settings = Config {
            cluster_name: config.cluster.clone(),
            heartbeat_interval: ground.pace.heartbeat_ms,
            election_timeout_min: ground.pace.election_ms.0,
            election_timeout_max: ground.pace.election_ms.1,
            max_payload_entries: 512,
            snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_entries.max(1)),
            max_in_snapshot_log_to_keep: ground.pace.entries_behind_snapshot,
            enable_pre_vote: Some(true),
            // A leader that starts again leads in a new term. In its old one it would not know what it has committed
            // (only a leader's first entry tells), and its reads would miss that.
            enable_leader_restore: Some(false),
            ..Config::default()
        };
        let settings = Arc::new(settings.validate().map_err(|e| MetaError::Config(e.to_string()))?);
        let network = Network::new(ground.dial, own.clone());
        let raft = Raft::new(id, settings, network.clone(), log.clone(), store)
            .await
            .map_err(|e| MetaError::Raft(e.to_string()))?;
        let initialized =
            raft.is_initialized().await.map_err(|e| MetaError::Raft(e.to_string()))?;
        if own.joined && !initialized {
            let dir = config.dir.clone();
            return Err(MetaError::LostDirectory { id, dir });
        }
        tokio::spawn(persist(Arc::clone(&ground.disk), state.clone()));
        let voter = Self {
            proposer: Proposer::start(raft.clone(), ground.clock),
            reads: ReadIndex::new(raft.clone()),
            follow: FollowIndex::default(),
            raft,
            taken_part: AtomicBool::new(own.joined),
            own,
            address: address.to_owned(),
            network,
            disk: ground.disk,
            dir: config.dir.clone(),
            taking_part: Mutex::default(),
            state,
            log,
            snapshots,
            incoming: Mutex::new(None),
            load,
            serving: AtomicU64::new(0),
            ended: watch::Sender::new(0),
        };
        if initialized {
            // Of a version that kept no identity, or stopped before it was written.
            voter.take_part().await?;
            if voter.is_alone() {
                // Nobody else could lead.
                let elected = voter.raft.trigger().elect(false).await;
                elected.map_err(|e| MetaError::Raft(e.to_string()))?;
            }
        }
        Ok(voter)
    }

    /// Whether it is the only voter, as far as it knows.
    fn is_alone(&self) -> bool {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().voter_ids().eq([self.own.id])
    }

    /// From here on the directory must not be lost. Durable before the first word that counts, and after the log or
    /// the vote that the word is about: who has taken part and has neither has lost them.
    pub(crate) async fn take_part(&self) -> Result<(), MetaError> {
        if self.taken_part.load(Ordering::Acquire) {
            return Ok(());
        }
        let _one = self.taking_part.lock().await;
        let (own, dir) = (VoterIdentity { joined: true, ..self.own.clone() }, self.dir.clone());
        let disk = Arc::clone(&self.disk);
        let saved = disk::work(&*self.disk, move || own.save(&*disk, &dir)).await;
        saved
            .map_err(|e| MetaError::Raft(e.to_string()))?
            .map_err(|e| MetaError::io(&self.dir, e))?;
        self.taken_part.store(true, Ordering::Release);
        Ok(())
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

    /// Commits and applies a command. A leader that no majority hears any more answers at once that it
    /// does not lead; whether the command was carried out is then not known.
    pub(crate) async fn submit(&self, command: Command) -> Result<CommandReply, ProposeError> {
        let mut ended = self.ended.subscribe();
        let (reply, waits) = if self.reads.is_sole() {
            self.proposer.submit(command).await?
        } else {
            let reply = tokio::select! {
                biased;
                reply = self.proposer.submit(command) => reply,
                _ = ended.changed() => Err(ProposeError::NotLeader(None)),
            };
            reply.map_err(|e| self.hinted(e))?
        };
        self.settle(&waits, &mut ended).await?;
        Ok(reply)
    }

    /// Returns when nobody uses any more what clients were told otherwise (docs/PROTOCOL.md, R53).
    async fn settle(
        &self,
        waits: &[u64],
        ended: &mut watch::Receiver<u64>,
    ) -> Result<(), ProposeError> {
        if waits.is_empty() {
            return Ok(());
        }
        tokio::select! {
            biased;
            () = self.leases().settle(waits) => Ok(()),
            _ = ended.changed() => Err(ProposeError::NotLeader(None)),
        }
    }

    /// What clients were told, and may remember.
    pub(crate) fn leases(&self) -> &LeaseDesk {
        self.state.leases()
    }

    /// The term in which this node leads, as Raft last published it.
    pub(crate) fn leading_term(&self) -> Option<u64> {
        self.reads.leading_term()
    }

    /// This voter serves as the leader of that term: what its predecessors knew by heart is forgotten,
    /// and a majority hears it.
    pub(crate) fn serve_term(&self, term: u64) {
        self.serving.store(term, Ordering::Release);
    }

    /// Its lead is over, or no majority hears it: calls under way end.
    pub(crate) fn end_serving(&self) {
        self.serving.store(0, Ordering::Release);
        self.ended.send_modify(|n| *n += 1);
    }

    /// The term in which clients are served here. If they are not: the leader's address, as far as it is known.
    pub(crate) fn serves(&self) -> Result<u64, Option<String>> {
        let serving = self.serving.load(Ordering::Acquire);
        if serving != 0 && self.leading_term() == Some(serving) {
            return Ok(serving);
        }
        Err(self.leader_elsewhere())
    }

    fn leader_elsewhere(&self) -> Option<String> {
        self.leader().map(|(_, node)| node.addr)
    }

    /// Who leads, if it is somebody else.
    fn leader(&self) -> Option<(u64, VoterNode)> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader.filter(|l| *l != metrics.id)?;
        let node = metrics.membership_config.membership().get_node(&leader).cloned()?;
        Some((leader, node))
    }

    /// Never sends a caller back to where it comes from.
    fn hinted(&self, e: ProposeError) -> ProposeError {
        match e {
            ProposeError::NotLeader(Some(hint)) if hint == self.address => {
                ProposeError::NotLeader(None)
            }
            e => e,
        }
    }

    /// Reads the state as of now, linearizably.
    pub(crate) async fn read<T>(
        &self,
        read: impl FnOnce(&View<'_>, Reader<'_, View<'_>>) -> T,
    ) -> Result<T, ProposeError> {
        if self.reads.is_sole() {
            self.reads.confirm().await?;
            let (result, waits) = self.look(read, |seen| self.leases().looked(seen))?;
            if !waits.is_empty() {
                self.settle(&waits, &mut self.ended.subscribe()).await?;
            }
            return Ok(result);
        }
        let mut ended = self.ended.subscribe();
        tokio::select! {
            biased;
            confirmed = self.reads.confirm() => confirmed.map_err(|e| self.hinted(e))?,
            _ = ended.changed() => return Err(ProposeError::NotLeader(None)),
        }
        let (result, waits) = self.look(read, |seen| self.leases().looked(seen))?;
        self.settle(&waits, &mut ended).await?;
        Ok(result)
    }

    /// Up to where a voter that follows must have applied to answer what it was asked before it asked this (R60). Only
    /// who serves says so.
    async fn read_index(&self) -> Result<u64, ProposeError> {
        let mut ended = self.ended.subscribe();
        self.serves().map_err(ProposeError::NotLeader)?;
        tokio::select! {
            biased;
            confirmed = self.reads.confirm() => confirmed?,
            _ = ended.changed() => return Err(ProposeError::NotLeader(None)),
        }
        Ok(self.state.applied_index())
    }

    /// Reads the state linearizably where this voter follows (R60). Nothing can be read so while some client may
    /// remember what it would contradict.
    pub(crate) async fn read_behind<T>(
        &self,
        read: impl FnOnce(&View<'_>, Reader<'_, View<'_>>) -> T,
    ) -> Result<T, ProposeError> {
        let nobody = || ProposeError::NotLeader(None);
        let (id, node) = self.leader().ok_or_else(nobody)?;
        let index = self.follow.ask(&self.network, id, &node).await.ok_or_else(nobody)?;
        let reached = tokio::time::timeout(BEHIND_MAX, self.state.reach(index)).await;
        reached.map_err(|_| nobody())?;
        // Leases are given once the log says that there are any (R55): by then nobody has one on what came before.
        let look = |view: &View<'_>, r: Reader<'_, View<'_>>| match r.has_leases() {
            Ok(false) => Some(read(view, r)),
            _ => None,
        };
        self.peek(look)?.ok_or_else(nobody)
    }

    /// Reads the state as applied here: for the leader's own work, whose commands are checked again
    /// when they are applied.
    pub(crate) fn peek<T>(
        &self,
        read: impl FnOnce(&View<'_>, Reader<'_, View<'_>>) -> T,
    ) -> Result<T, ProposeError> {
        self.look(read, |_| Waits::new()).map(|(result, _)| result)
    }

    /// The same, and what the answer has to wait for, asked for while nothing is applied: the inodes that were
    /// looked at, where that matters.
    fn look<T>(
        &self,
        read: impl FnOnce(&View<'_>, Reader<'_, View<'_>>) -> T,
        waits: impl FnOnce(&[InodeId]) -> Waits,
    ) -> Result<(T, Waits), ProposeError> {
        let failed = |e: io::Error| ProposeError::Stopped(e.to_string());
        let view = self.state.view().map_err(failed)?;
        let result = read(&view, Reader(&view));
        view.check().map_err(failed)?;
        let waits = waits(&view.seen());
        Ok((result, waits))
    }

    /// The state as applied here, kept while others go on: for long looks at all of it.
    pub(crate) async fn moment(&self) -> Result<Moment, ProposeError> {
        let state = self.state.clone();
        let opened = tokio::task::spawn_blocking(move || state.moment()).await;
        let opened = opened.unwrap_or_else(|e| Err(io::Error::other(e)));
        opened.map_err(|e| ProposeError::Stopped(e.to_string()))
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
            Message::Greet { id, store } => {
                tracing::debug!(id, store, "a voter greets");
                let failure = |e: openraft::errors::Fatal<TypeConfig>| failed(e.to_string());
                serde_json::to_vec(&Greeting {
                    id: self.own.id,
                    store: self.own.store.clone(),
                    initialized: self.raft.is_initialized().await.map_err(failure)?,
                    yours: self.node_of(id).map(|n| n.store).filter(|s| !s.is_empty()),
                })
            }
            Message::Transfer { vote, to, last } => {
                let rpc = TransferLeaderRequest::new(vote, to, last);
                let answer = self.raft.handle_transfer_leader(rpc).await;
                serde_json::to_vec(&answer.map_err(|e| failed(e.to_string()))?)
            }
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
            Message::ReadIndex => {
                let index = self.read_index().await;
                let index = index.map_err(|e| (Status::NotLeader, e.to_string()))?;
                serde_json::to_vec(&index)
            }
            Message::Snapshot { vote, meta, offset, total } => {
                let answer = self
                    .snapshot_piece(vote, meta, (offset, total), &request.payload)
                    .await
                    .map_err(failed)?;
                serde_json::to_vec(&answer)
            }
        };
        // Before anybody hears what it promised, and after that is on its disk: a voter that is gone in between still
        // starts. Who has no vote there has neither granted one nor acknowledged an entry.
        if self.log.has_voted() {
            self.take_part().await.map_err(|e| failed(e.to_string()))?;
        }
        json.map_err(|e| failed(e.to_string()))
    }

    /// What the membership says of a voter.
    pub(crate) fn node_of(&self, id: u64) -> Option<VoterNode> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.membership().get_node(&id).cloned()
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
            let begun = Incoming::begin(&self.disk, &self.snapshots, meta.clone(), total);
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
        match disk::work(&*self.disk, move || state.close()).await {
            Ok(Ok(())) => {}
            // Not a loss: the log holds it, the next start replays it.
            Ok(Err(e)) => tracing::warn!(error = %e, "the state was not made durable at the end"),
            Err(e) => tracing::warn!(error = %e, "the state was not made durable at the end"),
        }
    }
}

fn is_absent(e: io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound
}

/// A request in progress.
pub(crate) struct Busy(Arc<AtomicUsize>);
impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn persist(disk: Arc<dyn Disk>, state: StateReader) {
    loop {
        state.applied().notified().await;
        tokio::time::sleep(PERSIST_EVERY).await;
        if state.is_closed() {
            return;
        }
        let own = state.clone();
        if let Ok(Err(e)) = disk::work(&*disk, move || own.persist()).await {
            tracing::error!(error = %e, "the metadata store failed");
        }
    }
}
