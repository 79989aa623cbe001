//! Registration, heartbeats, leases (PROTOCOL §6, I5).
//!
//! A lease counts from the moment its heartbeat was *sent*, on a clock that also runs while the machine
//! sleeps: a node that was paused finds its lease over before it answers anything. Maps go to every
//! core; the next heartbeat acks the oldest map any core still works by.

use crate::clock;
use crate::core::Report;
use crate::mover::Mailboxes;
use crate::reactor_glue::Mail;
use ebb_dataplane_protocol::replica::{WISHES_MAX, Wishes};
use ebb_dataplane_protocol::{ClusterMap, CoreId, MapVersion, NodeId, PgId, ShardRef};
use ebb_metaplane_protocol::{FsError, NodeCall, NodeReply, Request, Response};
use ebb_ring::SendRefused;
use ebb_rpc::{MetaClient, RpcError};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;

/// Between two heartbeats.
const BEAT: Duration = Duration::from_millis(500);
/// Least pause between two heartbeats that are asked for.
const BEAT_MIN: Duration = Duration::from_millis(10);
/// One heartbeat's patience: after that it is sent anew, with a new time.
const PATIENCE: Duration = Duration::from_secs(1);
/// Registration is tried for that long at a time.
const REGISTER_PATIENCE: Duration = Duration::from_secs(5);

/// Who this process is to the metadata plane.
#[derive(Clone, Debug)]
pub(crate) struct Registration {
    pub(crate) store: u128,
    pub(crate) host: String,
    pub(crate) ports: Vec<u16>,
    pub(crate) capacity_bytes: u64,
    pub(crate) boot: u128,
}

/// What registering brought.
#[derive(Clone, Debug)]
pub(crate) struct Registered {
    pub(crate) node: NodeId,
    pub(crate) map: ClusterMap,
    pub(crate) bucket_config: String,
}

/// Why a node may not serve.
#[derive(Debug, thiserror::Error)]
pub enum HeartbeatError {
    /// Calls failed for good: a wrong key, or an answer that makes no sense.
    #[error("the metadata plane refuses this node: {0}")]
    Refused(String),
    /// Another process serves this store, or the node is gone.
    #[error(
        "this node was superseded or removed: another process of its store serves, or the node is gone"
    )]
    Superseded,
}

/// Registers, trying until it works or is refused.
pub(crate) async fn register(
    meta: &MetaClient,
    who: &Registration,
) -> Result<Registered, HeartbeatError> {
    let request = Request::Node(NodeCall::Register {
        store: who.store,
        host: who.host.clone(),
        ports: who.ports.clone(),
        capacity_bytes: who.capacity_bytes,
        boot: who.boot,
    });
    loop {
        match meta.call(&request, REGISTER_PATIENCE).await {
            Ok(Response::Node(Ok(NodeReply::Registered { node, map, bucket_config }))) => {
                if map.pgs.is_empty() {
                    tracing::info!("the cluster has no placement groups yet; waiting");
                    tokio::time::sleep(BEAT).await;
                    continue;
                }
                return Ok(Registered { node, map, bucket_config });
            }
            Ok(Response::Node(Err(FsError::Again { .. }))) => tokio::time::sleep(BEAT).await,
            Ok(Response::Node(Err(e))) => return Err(HeartbeatError::Refused(e.to_string())),
            Ok(other) => return Err(HeartbeatError::Refused(format!("it answered {other:?}"))),
            Err(e @ (RpcError::WrongKey { .. } | RpcError::Malformed(_))) => {
                return Err(HeartbeatError::Refused(e.to_string()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot register; trying again");
                tokio::time::sleep(BEAT).await;
            }
        }
    }
}

/// Keeps the lease until told to stop.
pub(crate) struct Heartbeat {
    pub(crate) meta: MetaClient,
    pub(crate) who: Registration,
    pub(crate) node: NodeId,
    pub(crate) map: Arc<ClusterMap>,
    pub(crate) reports: Vec<Arc<Mutex<Report>>>,
    pub(crate) mailboxes: Mailboxes,
    pub(crate) refresh: Arc<Notify>,
}

impl Heartbeat {
    /// Beats; returns when the metadata plane says stop.
    pub(crate) async fn run(mut self) -> HeartbeatError {
        self.tell_cores(0);
        loop {
            let sent_ms = clock::now_ms();
            let request = Request::Node(self.beat());
            match self.meta.call(&request, PATIENCE).await {
                Ok(Response::Node(Ok(NodeReply::Lease { lease_ms, map, stop }))) => {
                    if stop {
                        return HeartbeatError::Superseded;
                    }
                    if let Some(map) = map.filter(|m| m.version > self.map.version) {
                        self.map = Arc::new(map);
                    }
                    // From the sending, never from the answer.
                    self.tell_cores(sent_ms.saturating_add(lease_ms));
                }
                Ok(Response::Node(Err(FsError::NotFound))) => {
                    // It does not know us (its state was reset): say again who we are.
                    match register(&self.meta, &self.who).await {
                        Ok(r) if r.node == self.node => {
                            if r.map.version > self.map.version {
                                self.map = Arc::new(r.map);
                            }
                        }
                        Ok(r) => {
                            let text =
                                format!("it calls this node {} and not {}", r.node, self.node);
                            return HeartbeatError::Refused(text);
                        }
                        Err(e) => return e,
                    }
                }
                Ok(other) => tracing::warn!(?other, "unexpected answer to a heartbeat"),
                Err(e @ (RpcError::WrongKey { .. } | RpcError::Malformed(_))) => {
                    tracing::error!(error = %e, "heartbeat refused");
                }
                Err(error) => tracing::warn!(%error, "no answer to a heartbeat"),
            }
            // A core that met a newer map asks for a beat; not in a tight loop, though.
            tokio::time::sleep(BEAT_MIN).await;
            let _ = tokio::time::timeout(BEAT - BEAT_MIN, self.refresh.notified()).await;
        }
    }

    fn beat(&self) -> NodeCall {
        let mut groups = BTreeSet::<PgId>::new();
        let mut stats = Vec::with_capacity(self.reports.len());
        let mut version: Option<MapVersion> = None;
        let mut wishes = Wishes::default();
        for report in &self.reports {
            let r = report.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            stats.push(r.stats);
            groups.extend(&r.dirty_groups);
            wishes.in_sync.extend(&r.wishes.in_sync);
            wishes.unreachable.extend(&r.wishes.unreachable);
            version = Some(version.map_or(r.map_version, |v| v.min(r.map_version)));
        }
        wishes.in_sync.truncate(WISHES_MAX);
        wishes.unreachable.truncate(WISHES_MAX);
        NodeCall::Heartbeat {
            node: self.node,
            boot: self.who.boot,
            map_version: version.unwrap_or_default(),
            stats,
            dirty_groups: groups.into_iter().collect(),
            wishes,
        }
    }

    fn tell_cores(&self, lease_until_ms: u64) {
        for (core, mailbox) in self.mailboxes.get().into_iter().flatten().enumerate() {
            let me = ShardRef { node: self.node, core: CoreId(core as u16) };
            let map = Arc::clone(&self.map);
            // A full mailbox means that the core is behind; the next beat tells it.
            if let Err(SendRefused::Gone(_)) =
                mailbox.try_send(Mail::Placement { me, map, lease_until_ms })
            {
                tracing::debug!(core, "the core is gone");
            }
        }
    }
}
