//! Connections to the chunk servers: one per (core, lane), with what was shown to each.

use ebb_dataplane_protocol::{
    ClusterMap, Generation, GrantMode, Header, InodeId, MapVersion, Opcode, ShardRef, Status,
    ViewVersion, codec,
};
use ebb_rpc::{Connection, Frame, Identity, RpcError};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Grants remembered per connection; the core's own table is bounded too, and answers `NeedGrant`.
const PRESENTED_MAX: usize = 8192;
/// Limit to connect and prove.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// What identifies a grant at a core.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct GrantTag {
    pub(crate) generation: Generation,
    pub(crate) view: ViewVersion,
    pub(crate) mode: GrantMode,
    pub(crate) alloc_limit: u64,
    /// A hand-over outdates grants issued under an older map (R26): a fresh one is another grant.
    pub(crate) issued_at: MapVersion,
}

/// A connection to a core and the grants it was shown.
pub(crate) struct Link {
    connection: Connection,
    epoch: u64,
    address: String,
    presented: Mutex<HashMap<InodeId, GrantTag>>,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    pub(crate) fn was_shown(&self, inode: InodeId, tag: GrantTag) -> bool {
        lock(&self.presented).get(&inode) == Some(&tag)
    }

    /// Marks a grant as shown (optimistically, when it is sent ahead of a request), or not.
    pub(crate) fn mark_shown(&self, inode: InodeId, tag: Option<GrantTag>) {
        let mut presented = lock(&self.presented);
        match tag {
            Some(tag) => {
                if presented.len() >= PRESENTED_MAX {
                    presented.clear();
                }
                presented.insert(inode, tag);
            }
            None => {
                presented.remove(&inode);
            }
        }
    }

    /// Shows a grant to the core.
    pub(crate) async fn present(
        &self,
        grant: &ebb_dataplane_protocol::SignedGrant,
        inode: InodeId,
        timeout: Duration,
    ) -> Result<(Status, u32), RpcError> {
        let header = Header { inode, ..Header::request(Opcode::Present, 0) };
        let body = codec::encode(grant).into();
        let reply = self.connection.call(header, body, bytes::Bytes::new(), timeout).await?;
        Ok((reply.header.status, reply.header.retry_after_ms))
    }

    pub(crate) async fn call(
        &self,
        header: Header,
        body: bytes::Bytes,
        payload: bytes::Bytes,
        timeout: Duration,
    ) -> Result<Frame, RpcError> {
        self.connection.call(header, body, payload, timeout).await
    }

    pub(crate) fn close(&self) {
        self.connection.close();
    }
}

type Key = (ShardRef, u32);
/// Who connects now, and how often that failed. Who waited for an attempt shares how it ended: else each of many would wait
/// for its own while the group has moved on.
type Slot = Arc<Connecting>;

#[derive(Default)]
struct Connecting {
    /// The last failure: where, and why.
    turn: tokio::sync::Mutex<Option<(String, String)>>,
    failures: AtomicU64,
}

#[derive(Default)]
struct State {
    links: HashMap<Key, Arc<Link>>,
    connecting: HashMap<Key, Slot>,
}

/// The live connections.
#[derive(Default)]
pub(crate) struct Pool {
    state: Mutex<State>,
}

impl Pool {
    fn live(&self, key: Key, epoch: u64, address: &str) -> Option<Arc<Link>> {
        let state = lock(&self.state);
        let link = state.links.get(&key)?;
        (!link.connection.is_closed() && link.epoch == epoch && link.address == address)
            .then(|| Arc::clone(link))
    }

    /// The connection to a core, made if there is none of this session's epoch.
    pub(crate) async fn link(
        &self,
        map: &ClusterMap,
        shard: ShardRef,
        address: &str,
        identity: &Identity,
        epoch: u64,
    ) -> Result<Arc<Link>, RpcError> {
        let key = (shard, identity.lane);
        if let Some(link) = self.live(key, epoch, address) {
            return Ok(link);
        }
        let slot = Arc::clone(lock(&self.state).connecting.entry(key).or_default());
        let before = slot.failures.load(Ordering::Acquire);
        let mut failed = slot.turn.lock().await;
        if let Some(link) = self.live(key, epoch, address) {
            return Ok(link);
        }
        if slot.failures.load(Ordering::Acquire) != before
            && let Some((_, why)) = failed.as_ref().filter(|(at, _)| at == address)
        {
            return Err(RpcError::Unreachable { address: address.to_owned(), why: why.clone() });
        }
        let connection = Connection::connect(address, identity, CONNECT_TIMEOUT).await;
        let connection = connection.inspect_err(|e| {
            *failed = Some((address.to_owned(), e.to_string()));
            slot.failures.fetch_add(1, Ordering::Release);
        })?;
        let link = Arc::new(Link {
            connection,
            epoch,
            address: address.to_owned(),
            presented: Mutex::default(),
        });
        let mut state = lock(&self.state);
        // Cores that left the map leave the pool, so that it stays as small as the cluster.
        state.links.retain(|(shard, _), l| {
            !l.connection.is_closed() && map.nodes.iter().any(|n| n.id == shard.node)
        });
        state.connecting.retain(|(shard, _), _| map.nodes.iter().any(|n| n.id == shard.node));
        if let Some(old) = state.links.insert(key, Arc::clone(&link)) {
            old.close();
        }
        Ok(link)
    }

    /// Forgets all connections (another session).
    pub(crate) fn clear(&self) {
        for (_, link) in lock(&self.state).links.drain() {
            link.close();
        }
    }
}
