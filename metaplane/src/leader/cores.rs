//! Connections to the cores of data nodes, one per core, made when used and remade when broken.

use ebb_dataplane_protocol::control::{Control, ControlReply};
use ebb_dataplane_protocol::{ClusterMap, PgId, RunIndex, ShardRef};
use ebb_rpc::{Connection, Identity, RpcError};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Limit to connect and prove.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1_000);

/// A failed call to a core.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CoreError {
    /// The map does not name it (any more).
    #[error("core {}.{} is not in the cluster map", .0.node, .0.core)]
    Unknown(ShardRef),
    /// The call failed.
    #[error("core {}.{}: {source}", shard.node, shard.core)]
    Call {
        /// The core.
        shard: ShardRef,
        /// Why.
        source: RpcError,
    },
    /// It answered something else than it was asked.
    #[error("core {}.{}: {why}", shard.node, shard.core)]
    Refused {
        /// The core.
        shard: ShardRef,
        /// Why.
        why: String,
    },
}

type Slot = Arc<tokio::sync::Mutex<Option<(String, Connection)>>>;

/// The connections.
pub(crate) struct Cores {
    identity: Identity,
    slots: Mutex<HashMap<ShardRef, Slot>>,
}

impl Cores {
    pub(crate) fn new(identity: Identity) -> Self {
        Self { identity, slots: Mutex::new(HashMap::new()) }
    }

    async fn connection(&self, map: &ClusterMap, shard: ShardRef) -> Result<Connection, CoreError> {
        let (host, port) = map.address(shard).ok_or(CoreError::Unknown(shard))?;
        let address = format!("{host}:{port}");
        let slot = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.retain(|s, _| map.node(s.node).is_some());
            Arc::clone(slots.entry(shard).or_default())
        };
        let mut slot = slot.lock().await;
        if let Some((at, connection)) = slot.as_ref()
            && *at == address
            && !connection.is_closed()
        {
            return Ok(connection.clone());
        }
        let connection = Connection::connect(&address, &self.identity, CONNECT_TIMEOUT)
            .await
            .map_err(|source| CoreError::Call { shard, source })?;
        *slot = Some((address, connection.clone()));
        Ok(connection)
    }

    /// Asks a core.
    pub(crate) async fn call(
        &self,
        map: &ClusterMap,
        shard: ShardRef,
        request: &Control,
        timeout: Duration,
    ) -> Result<ControlReply, CoreError> {
        let connection = self.connection(map, shard).await?;
        let result = connection.control(request, timeout).await;
        if let Err(RpcError::Timeout { .. }) = &result {
            // A core that is stuck is asked over a new connection next time.
            connection.close();
        }
        match result.map_err(|source| CoreError::Call { shard, source })? {
            ControlReply::Refused(why) => Err(CoreError::Refused { shard, why }),
            reply => Ok(reply),
        }
    }

    /// Asks a core to do something; anything but `Done` is an error.
    pub(crate) async fn order(
        &self,
        map: &ClusterMap,
        shard: ShardRef,
        request: &Control,
        timeout: Duration,
    ) -> Result<(), CoreError> {
        match self.call(map, shard, request, timeout).await? {
            ControlReply::Done => Ok(()),
            other => Err(unexpected(shard, &other)),
        }
    }
}

/// An answer that does not fit the question.
pub(crate) fn unexpected(shard: ShardRef, reply: &ControlReply) -> CoreError {
    CoreError::Refused { shard, why: format!("an answer that does not fit: {reply:?}") }
}

/// The primaries of every run below `limit`. Groups without a member hold nothing.
pub(crate) fn primaries(
    map: &ClusterMap,
    inode: ebb_dataplane_protocol::InodeId,
    limit: u64,
) -> BTreeSet<ShardRef> {
    let mut found = BTreeSet::new();
    if map.pgs.is_empty() {
        return found;
    }
    let mut seen = 0;
    for run in 0..RunIndex::count_for(limit) {
        found.extend(primary_of_run(map, inode, RunIndex(run)));
        seen += 1;
        // Past this many runs every group was met with near certainty; ask all, which is correct.
        if seen > map.pgs.len() * 16 {
            found.extend(map.pgs.iter().filter_map(|pg| pg.primary()));
            break;
        }
    }
    found
}

/// Who serves a run.
pub(crate) fn primary_of_run(
    map: &ClusterMap,
    inode: ebb_dataplane_protocol::InodeId,
    run: RunIndex,
) -> Option<ShardRef> {
    let pg = PgId::of(inode, run, u16::try_from(map.pgs.len()).ok().filter(|n| *n > 0)?);
    map.pgs.get(usize::from(pg.0))?.primary()
}
