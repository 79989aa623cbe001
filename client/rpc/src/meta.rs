//! Calls to whoever leads the metadata plane.
//!
//! Every metadata request is safe to repeat: mutations by (session, sequence), the rest because they
//! are idempotent. So a broken connection, a timeout or a leader change is simply tried again, with
//! back-off, until the caller's patience ends.

use crate::connection::{Connection, WeakConnection};
use crate::error::RpcError;
use crate::frame::Frame;
use crate::handshake::Identity;
use crate::near::Near;
use ebb_dataplane_protocol::Status;
use ebb_metaplane_protocol::{Request, Response};
use std::pin::Pin;
use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::{Mutex, Notify};
use tokio::time::Instant;

/// One attempt's limit to connect and prove.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// One attempt's limit to be answered: a listing or a flush may take long.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);
/// The same where there are other addresses to try.
const CONNECT_ONE_OF_TIMEOUT: Duration = Duration::from_secs(1);
/// A server that keeps calls waiting is asked for a sign of life this often, and left when it gives none
/// within this: less than a data node's lease, if there are others to go to.
const PING_EVERY: Duration = Duration::from_millis(500);
const PING_TIMEOUT: Duration = Duration::from_secs(10);
const PING_ONE_OF_TIMEOUT: Duration = Duration::from_secs(1);
/// A server that nobody waits for is asked, too, every so many times of that: where voters are is good to
/// know before they are gone.
const IDLE_TURNS: u32 = 10;
/// Addresses remembered at most (I9).
const KNOWN_MAX: usize = 16;
/// Hints followed one after another without a pause.
const HINTS_MAX: u32 = 2;
/// First pause between attempts; doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_millis(250);

/// A client of the metadata plane. Cheap to clone; clones share the connection.
#[derive(Clone)]
pub struct MetaClient {
    inner: Arc<Inner>,
}

struct Inner {
    addresses: Vec<String>,
    identity: Identity,
    current: Mutex<Current>,
    known: std::sync::Mutex<Known>,
    near: Near,
    /// There is something to learn.
    changed: Arc<Notify>,
}

#[derive(Default)]
struct Current {
    connection: Option<Connection>,
    /// The leader's address, as a follower named it.
    hint: Option<String>,
}

/// Where voters are, or were.
struct Known {
    addresses: Vec<String>,
    /// Those of them that are voters' by the latest word of one, which came with a connection to who led then.
    voters: Vec<String>,
    /// The change of the voters that brought them.
    membership: u64,
    /// Index of the address to try next.
    next: usize,
}

impl Inner {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A server knows of this change of the voters.
    fn heard_of(&self, membership: u64) {
        if membership > self.known().membership {
            self.changed.notify_one();
        }
    }

    /// The voters of now come first, then what was known before. What a server says that knows less than
    /// another did is old.
    fn learn(&self, there: &Frame) {
        let text = String::from_utf8_lossy(&there.body);
        let voters: Vec<String> =
            text.split(',').filter(|a| !a.is_empty()).map(str::to_owned).collect();
        let mut known = self.known();
        if there.header.membership() < known.membership {
            return;
        }
        if there.header.membership() > known.membership {
            known.membership = there.header.membership();
            known.next = 0;
        }
        let before = std::mem::take(&mut known.addresses);
        known.voters.clone_from(&voters);
        known.voters.truncate(KNOWN_MAX);
        for address in voters.into_iter().chain(before).chain(self.addresses.iter().cloned()) {
            if !known.addresses.contains(&address) && known.addresses.len() < KNOWN_MAX {
                known.addresses.push(address);
            }
        }
    }
}

impl MetaClient {
    /// A client of the servers at `addresses` (host:port each; at least one). Connects when used.
    pub fn new(addresses: Vec<String>, identity: Identity) -> Self {
        let voters = Vec::new();
        let known = Known { addresses: addresses.clone(), voters, membership: 0, next: 0 };
        let (current, known) = (Mutex::default(), std::sync::Mutex::new(known));
        let mut turn = [0; 2];
        // Without it all clients begin with the same voter.
        let _ = getrandom::fill(&mut turn);
        let near = Near::new(usize::from(u16::from_le_bytes(turn)));
        let changed = Arc::default();
        Self { inner: Arc::new(Inner { addresses, identity, current, known, near, changed }) }
    }

    /// The addresses it was made with.
    pub fn addresses(&self) -> &[String] {
        &self.inner.addresses
    }

    /// The addresses that it would try now: the voters, as far as it has heard, then what it knew before.
    pub fn known_addresses(&self) -> Vec<String> {
        self.inner.known().addresses.clone()
    }

    /// The answer to a question that a voter which follows may answer (docs/PROTOCOL.md, R60): one is asked, if there
    /// is any, and then the leader, if need be. No less true than the leader's.
    pub async fn ask(&self, request: &Request, patience: Duration) -> Result<Response, RpcError> {
        let inner = &*self.inner;
        let mut voters = inner.known().voters.clone();
        // Who leads has enough to do.
        let leader = inner.current.try_lock().ok().and_then(|c| {
            let connection = c.connection.as_ref()?;
            Some(connection.address().to_owned())
        });
        voters.retain(|v| Some(v) != leader.as_ref());
        if let Some(response) = inner.near.ask(&voters, &inner.identity, request).await {
            return Ok(response);
        }
        self.call(request, patience).await
    }

    /// Questions that voters which follow have answered, through [`Self::ask`].
    pub fn followed(&self) -> u64 {
        self.inner.near.answered()
    }

    /// The leader's answer. Tries for at most `patience`; a wrong key fails at once.
    pub async fn call(&self, request: &Request, patience: Duration) -> Result<Response, RpcError> {
        self.call_in_doubt(request, patience).await.map(|(response, _)| response)
    }

    /// The same; also says whether an earlier try may have been carried out: it was sent, and nobody
    /// said that it was not.
    pub async fn call_in_doubt(
        &self,
        request: &Request,
        patience: Duration,
    ) -> Result<(Response, bool), RpcError> {
        let deadline = Instant::now() + patience;
        let mut backoff = BACKOFF_MIN;
        let mut hints = 0;
        let mut doubt = false;
        loop {
            let error = match self.attempt(request, deadline, &mut doubt).await {
                Ok(response) => return Ok((response, doubt)),
                Err(e @ (RpcError::WrongKey { .. } | RpcError::Malformed(_))) => return Err(e),
                Err(e) => e,
            };
            if let RpcError::Status { status, .. } = &error
                && !matches!(status, Status::NotLeader | Status::Busy | Status::Superseded)
            {
                return Err(error);
            }
            // Who was told where to go goes there at once; a hint that is wrong, once too often.
            if let RpcError::Status { status, message, .. } = &error
                && is_elsewhere(*status)
                && !message.is_empty()
                && hints < HINTS_MAX
                && Instant::now() < deadline
            {
                hints += 1;
                continue;
            }
            hints = 0;
            if Instant::now() + backoff >= deadline {
                return Err(RpcError::NoLeader {
                    addresses: self.known_addresses().join(","),
                    ms: patience.as_millis() as u64,
                    last: error.to_string(),
                });
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn attempt(
        &self,
        request: &Request,
        deadline: Instant,
        doubt: &mut bool,
    ) -> Result<Response, RpcError> {
        let connection = self.connection(deadline).await?;
        let left = deadline.saturating_duration_since(Instant::now()).max(BACKOFF_MIN);
        let result = connection.meta_of(request, left.min(ATTEMPT_TIMEOUT)).await;
        if let Ok((_, membership)) = &result {
            self.inner.heard_of(*membership);
        }
        let result = result.map(|(response, _)| response);
        let refused = |e: &RpcError| matches!(e, RpcError::Status { status, .. } if *status != Status::Superseded);
        *doubt |= result.as_ref().is_err_and(|e| !refused(e));
        match &result {
            Err(RpcError::Status { status, message, .. }) if is_elsewhere(*status) => {
                let mut current = self.inner.current.lock().await;
                current.connection = None;
                current.hint = (!message.is_empty()).then(|| message.clone());
                if message.is_empty() {
                    // Where others are is worth a question then.
                    self.inner.changed.notify_one();
                }
            }
            // A timeout leaves the connection as it is: the server may just be busy with a long
            // listing, and others share the connection. A dead peer gives no sign of life.
            Err(RpcError::Timeout { .. }) if left >= ATTEMPT_TIMEOUT => connection.close(),
            _ => {}
        }
        result
    }

    async fn connection(&self, deadline: Instant) -> Result<Connection, RpcError> {
        let mut current = tokio::time::timeout_at(deadline, self.inner.current.lock())
            .await
            .map_err(|_| RpcError::Timeout {
                address: self.known_addresses().join(","),
                ms: CONNECT_TIMEOUT.as_millis() as u64,
            })?;
        if let Some(c) = &current.connection
            && !c.is_closed()
        {
            return Ok(c.clone());
        }
        let (address, alone) = {
            let mut known = self.inner.known();
            let address = current.hint.take().or_else(|| {
                let i = known.next % known.addresses.len().max(1);
                known.next = i + 1;
                known.addresses.get(i).cloned()
            });
            (address.unwrap_or_default(), known.addresses.len() <= 1)
        };
        let limit = if alone { CONNECT_TIMEOUT } else { CONNECT_ONE_OF_TIMEOUT };
        let left = deadline.saturating_duration_since(Instant::now()).max(BACKOFF_MIN);
        let c = Connection::connect(&address, &self.inner.identity, left.min(limit)).await?;
        current.connection = Some(c.clone());
        let changed = Arc::clone(&self.inner.changed);
        changed.notify_one();
        tokio::spawn(watch(Arc::downgrade(&self.inner), c.downgrade(), changed));
        Ok(c)
    }
}

/// There is something to learn, and who told of it is gone: of those that are known somebody is connected to,
/// which asks. Without it a client that is idle would hear of it with its next call, when perhaps nobody is
/// left of those that it knows. Boxed: a connection's watch begins the next one's.
fn ask_another(inner: &Weak<Inner>) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
    Box::pin(async {
        // Whoever breaks each connection is not asked without a pause.
        tokio::time::sleep(BACKOFF_MAX).await;
        let Some(client) = inner.upgrade().map(|inner| MetaClient { inner }) else { return };
        for _ in client.known_addresses() {
            if client.connection(Instant::now() + CONNECT_TIMEOUT).await.is_ok() {
                return;
            }
        }
    })
}

/// Another one leads, whether this one did when it was asked or not.
fn is_elsewhere(status: Status) -> bool {
    matches!(status, Status::NotLeader | Status::Superseded)
}

/// Learns from a connection where voters are, at once and whenever they change, and closes it when its peer
/// keeps calls waiting and gives no sign of life. Ends with it, or with the client.
async fn watch(inner: Weak<Inner>, connection: WeakConnection, changed: Arc<Notify>) {
    for turn in 0u32.. {
        let changed_now = tokio::time::timeout(PING_EVERY, changed.notified()).await.is_ok();
        let Some(connection) = connection.upgrade().filter(|c| !c.is_closed()) else {
            if changed_now {
                // For whom another connection has, if there is one.
                changed.notify_one();
                ask_another(&inner).await;
            }
            return;
        };
        if !changed_now && !connection.is_waiting() && turn % IDLE_TURNS != 0 {
            continue;
        }
        let Some(alone) = inner.upgrade().map(|i| i.known().addresses.len() <= 1) else { return };
        let limit = if alone { PING_TIMEOUT } else { PING_ONE_OF_TIMEOUT };
        match connection.ping(limit).await {
            Ok(Some(there)) => {
                let Some(inner) = inner.upgrade() else { return };
                inner.learn(&there);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(%error, "a metadata server gives no sign of life");
                connection.close();
                if changed_now {
                    ask_another(&inner).await;
                }
            }
        }
    }
}
