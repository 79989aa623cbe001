//! A client's tie to a cluster: its session, its map, its connections.

use crate::Result;
use crate::config::Config;
use crate::error::ClientError;
use crate::leased::{self, Leased};
use crate::map::MapCache;
use crate::names::Names;
use crate::pool::Pool;
use crate::sequence::Sequencer;
use crate::session::{self, Session};
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::{ClusterId, ClusterMap, MapVersion, NodeId, SessionId};
use ebb_metaplane_protocol::lease::Counts as LeaseCounts;
use ebb_metaplane_protocol::{
    AdminCall, AdminReply, FsError, Op, OpReply, Query, QueryReply, Request, Response,
};
use ebb_rpc::{Identity, MetaClient};
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// A client of a cluster. Cheap to clone; clones share the session.
#[derive(Clone)]
pub struct Cluster {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) key: ClusterKey,
    pub(crate) label: String,
    pub(crate) meta: MetaClient,
    pub(crate) session: Session,
    pub(crate) map: MapCache,
    pub(crate) pool: Pool,
    meta_sequences: Sequencer,
    pub(crate) data_sequences: Sequencer,
    /// Names that only this session adds.
    pub(crate) names: Names,
    /// What it was told of inodes and may answer from.
    pub(crate) leased: Leased,
    /// Renews the session, and watches for what is to be forgotten.
    tasks: std::sync::Mutex<Vec<JoinHandle<()>>>,
}

impl Shared {
    fn end_tasks(&self) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        for task in tasks.drain(..) {
            task.abort();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.end_tasks();
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("metadata", &self.shared.meta.addresses())
            .field("session", &self.shared.session.current().0)
            .finish_non_exhaustive()
    }
}

impl Cluster {
    /// Opens a session at one of the metadata servers `addresses` (host:port). `label` is shown in
    /// `ebb status`. Fails at once on a wrong key, else after `config.patience`.
    pub async fn connect(
        addresses: Vec<String>,
        key: ClusterKey,
        label: &str,
        config: Config,
    ) -> Result<Self> {
        let identity = Identity {
            key: key.clone(),
            cluster: ClusterId(0),
            role: Role::Client,
            session: SessionId(0),
            node: NodeId(0),
            lane: 0,
            peer: None,
        };
        let meta = MetaClient::new(addresses, identity);
        let session = Session::open(&meta, label, config.patience).await?;
        let map = MapCache::default();
        map.refresh(&meta, MapVersion(0), false, Instant::now() + config.patience).await?;
        let leased = Leased::new(config.lease_metadata);
        let shared = Arc::new(Shared {
            config,
            key,
            label: label.to_owned(),
            meta,
            session,
            map,
            pool: Pool::default(),
            meta_sequences: Sequencer::default(),
            data_sequences: Sequencer::default(),
            names: Names::default(),
            leased,
            tasks: std::sync::Mutex::default(),
        });
        let mut tasks = vec![tokio::spawn(session::renew(Arc::downgrade(&shared)))];
        if shared.leased.is_on() {
            tasks.push(tokio::spawn(leased::watch(Arc::downgrade(&shared))));
        }
        *shared.tasks.lock().unwrap_or_else(PoisonError::into_inner) = tasks;
        Ok(Self { shared })
    }

    /// Ends the session: its handles are released, its grants fenced. Data not yet sent is the
    /// caller's to flush before.
    pub async fn close(&self) -> Result<()> {
        self.shared.end_tasks();
        self.shared.leased.reset();
        self.shared.session.close(&self.shared.meta, Duration::from_secs(5)).await
    }

    /// The session, as `ebb status` numbers it. Another one after it expired.
    pub fn session(&self) -> SessionId {
        self.shared.session.current().0
    }

    /// The cluster map as last seen.
    pub fn map(&self) -> Arc<ClusterMap> {
        self.shared.map.get()
    }

    /// Fetches the cluster map if there is a newer one.
    pub async fn refresh_map(&self) -> Result<Arc<ClusterMap>> {
        let have = self.map().version;
        self.shared.map.refresh(&self.shared.meta, have, false, self.shared.deadline()).await
    }

    /// A request of an operator, within `patience`.
    pub async fn admin(&self, call: AdminCall, patience: Duration) -> Result<AdminReply> {
        match self.shared.meta.call(&Request::Admin(call), patience).await? {
            Response::Admin(reply) => Ok(reply?),
            other => Err(unexpected(&other)),
        }
    }

    /// What the cache of metadata was good for, with [`Config::lease_metadata`].
    pub fn lease_counts(&self) -> LeaseCounts {
        self.shared.leased.counts()
    }

    /// Questions that metadata servers which do not lead have answered, with [`Config::follower_reads`].
    pub fn followed(&self) -> u64 {
        self.shared.meta.followed()
    }

    /// A linearizable read, repeated while the metadata plane says `Again`.
    pub async fn query(&self, query: Query) -> Result<QueryReply> {
        self.shared.query(query).await
    }
}

/// An answer of another kind than the question's: a bug or another version.
pub(crate) fn unexpected(response: &Response) -> ClientError {
    let kind = match response {
        Response::Op(_) => "an operation's",
        Response::Query(_) => "a query's",
        Response::Session(_) => "a session's",
        Response::Node(_) => "a node's",
        Response::Admin(_) => "an operator's",
    };
    ClientError::Metadata(format!("{kind} answer to another question"))
}

/// Longest pause between repetitions of `Again`.
const AGAIN_MAX: Duration = Duration::from_secs(1);

/// Waits for a turn that others hold while they wait for servers: no longer than those may.
pub(crate) async fn turn<T>(
    lock: &tokio::sync::Mutex<T>,
    deadline: Instant,
) -> Result<tokio::sync::MutexGuard<'_, T>> {
    tokio::time::timeout_at(deadline, lock.lock()).await.map_err(|_| {
        ClientError::Metadata("others were still waiting for it when the time was over".into())
    })
}

impl Shared {
    /// When a call that begins now has taken long enough.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.config.patience
    }

    /// A linearizable read, repeated while the metadata plane says `Again`.
    pub(crate) async fn query(&self, query: Query) -> Result<QueryReply> {
        if let Some(known) = self.leased.known(&query) {
            return known;
        }
        let deadline = self.deadline();
        loop {
            let asked = self.leased.asks();
            let session = self.session.current().0;
            if let Some(reply) = self.ask(session, &query, deadline).await? {
                return self.leased.told(&asked, &query, reply);
            }
        }
    }

    /// The same under a session, and nothing is answered from memory or remembered.
    pub(crate) async fn query_as(&self, session: SessionId, query: Query) -> Result<QueryReply> {
        let deadline = self.deadline();
        loop {
            if let Some(reply) = self.ask(session, &query, deadline).await? {
                return Ok(reply);
            }
        }
    }

    /// One question. `None`: it is to be asked again.
    async fn ask(
        &self,
        session: SessionId,
        query: &Query,
        deadline: Instant,
    ) -> Result<Option<QueryReply>> {
        let request = Request::Query { session, query: query.clone() };
        let answer = match self.config.follower_reads && query.may_be_followed() {
            true => self.meta.ask(&request, left(deadline)).await?,
            false => self.meta.call(&request, left(deadline)).await?,
        };
        match answer {
            Response::Query(Err(FsError::Again { retry_after_ms, why })) => {
                wait_again(deadline, retry_after_ms, why).await?;
                Ok(None)
            }
            Response::Query(reply) => Ok(Some(reply?)),
            other => Err(unexpected(&other)),
        }
    }

    /// A mutation under the current session, exactly once (I7). `Again` is asked anew under the same
    /// sequence: it was not done, or it was and its answer is still held back (a truncate, R14). An expired session is replaced, and the operation
    /// sent under the new one unless it names a handle of the old (`same_session`).
    /// Answers with the epoch of the session it took effect in.
    pub(crate) async fn mutate(&self, op: Op, same_session: Option<u64>) -> Result<(OpReply, u64)> {
        self.mutate_by(op, same_session, self.deadline()).await
    }

    /// The same as a part of something that is to end by `deadline`.
    pub(crate) async fn mutate_by(
        &self,
        op: Op,
        same_session: Option<u64>,
        deadline: Instant,
    ) -> Result<(OpReply, u64)> {
        self.mutate_until(op, same_session, deadline, None).await
    }

    /// The same; that it is to be asked again for this reason is an answer.
    pub(crate) async fn mutate_until(
        &self,
        op: Op,
        same_session: Option<u64>,
        deadline: Instant,
        reason: Option<&str>,
    ) -> Result<(OpReply, u64)> {
        let ticket = self.meta_sequences.begin();
        let dropped = self.leased.forgets(&op);
        loop {
            let (session, epoch) = self.session.current();
            if same_session.is_some_and(|wanted| wanted != epoch) {
                return Err(FsError::SessionExpired.into());
            }
            let request = Request::Mutate {
                session,
                sequence: ticket.sequence(),
                answered_below: self.meta_sequences.answered_below(),
                op: op.clone(),
                dropped: dropped.clone(),
            };
            let (response, doubt) = self.meta.call_in_doubt(&request, left(deadline)).await?;
            let Response::Op(reply) = response else { return Err(unexpected(&response)) };
            match reply {
                Err(FsError::Again { retry_after_ms, why }) if reason != Some(&why) => {
                    wait_again(deadline, retry_after_ms, why).await?;
                }
                Err(FsError::SessionExpired) => {
                    self.reopen_session(epoch, deadline).await?;
                    // Nobody remembers any more whether it was carried out, and others may have built on it.
                    if doubt && same_session.is_none() && !may_be_done_again(&op) {
                        return Err(ClientError::OutcomeLost);
                    }
                    if Instant::now() >= deadline {
                        return Err(FsError::SessionExpired.into());
                    }
                }
                reply => return Ok((reply?, epoch)),
            }
        }
    }

    /// Replaces the session of `epoch`, unless somebody already did.
    pub(crate) async fn reopen_session(&self, epoch: u64, deadline: Instant) -> Result<()> {
        if self.session.reopen(&self.meta, &self.label, epoch, deadline).await? {
            tracing::warn!(label = self.label, "the session had expired; opened a new one");
            self.pool.clear();
            self.leased.reset();
        }
        Ok(())
    }

    /// The identity of a data connection.
    pub(crate) fn identity(&self, cluster: ClusterId, session: SessionId, lane: u32) -> Identity {
        Identity {
            key: self.key.clone(),
            cluster,
            role: Role::Client,
            session,
            node: NodeId(0),
            lane,
            peer: None,
        }
    }
}

/// Whether a mutation whose outcome nobody remembers can be done under another session without harm to what others did
/// since: it belongs to the session alone, or changes nothing that they see.
fn may_be_done_again(op: &Op) -> bool {
    match op {
        Op::Open { open, .. } => !open.truncate,
        Op::Reserve { .. }
        | Op::Regrant { .. }
        | Op::Release { .. }
        | Op::ReleaseMany { .. }
        | Op::ReturnNames { .. }
        | Op::Lock { .. } => true,
        Op::Create { .. }
        | Op::Commit(_)
        | Op::SetAttr { .. }
        | Op::SetXattr { .. }
        | Op::Mkdir { .. }
        | Op::Symlink { .. }
        | Op::Link { .. }
        | Op::Unlink { .. }
        | Op::Rmdir { .. }
        | Op::Rename { .. }
        | Op::Publish(_) => false,
    }
}

/// The time until then.
pub(crate) fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

async fn wait_again(deadline: Instant, retry_after_ms: u32, why: String) -> Result<()> {
    let pause = Duration::from_millis(u64::from(retry_after_ms.max(5))).min(AGAIN_MAX);
    if Instant::now() + pause >= deadline {
        return Err(FsError::Again { retry_after_ms, why }.into());
    }
    tokio::time::sleep(pause).await;
    Ok(())
}
