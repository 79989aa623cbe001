//! Calls to whoever leads the metadata plane.
//!
//! Every metadata request is safe to repeat: mutations by (session, sequence), the rest because they
//! are idempotent. So a broken connection, a timeout or a leader change is simply tried again, with
//! back-off, until the caller's patience ends.

use crate::connection::Connection;
use crate::error::RpcError;
use crate::handshake::Identity;
use ebb_dataplane_protocol::Status;
use ebb_metaplane_protocol::{Request, Response};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// One attempt's limit to connect and prove.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// One attempt's limit to be answered: a listing or a flush may take long.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);
/// First pause between attempts; doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_millis(500);

/// A client of the metadata plane. Cheap to clone; clones share the connection.
#[derive(Clone)]
pub struct MetaClient {
    inner: Arc<Inner>,
}

struct Inner {
    addresses: Vec<String>,
    identity: Identity,
    current: Mutex<Current>,
}

#[derive(Default)]
struct Current {
    connection: Option<Connection>,
    /// Index of the address to try next.
    next: usize,
    /// The leader's address, as a follower named it.
    hint: Option<String>,
}

impl MetaClient {
    /// A client of the servers at `addresses` (host:port each; at least one). Connects when used.
    pub fn new(addresses: Vec<String>, identity: Identity) -> Self {
        let current = Mutex::default();
        Self { inner: Arc::new(Inner { addresses, identity, current }) }
    }

    /// The addresses it was made with.
    pub fn addresses(&self) -> &[String] {
        &self.inner.addresses
    }

    /// The leader's answer. Tries for at most `patience`; a wrong key fails at once.
    pub async fn call(&self, request: &Request, patience: Duration) -> Result<Response, RpcError> {
        let deadline = Instant::now() + patience;
        let mut backoff = BACKOFF_MIN;
        loop {
            let error = match self.attempt(request, deadline).await {
                Ok(response) => return Ok(response),
                Err(e @ (RpcError::WrongKey { .. } | RpcError::Malformed(_))) => return Err(e),
                Err(e) => e,
            };
            if let RpcError::Status { status, .. } = &error
                && !matches!(status, Status::NotLeader | Status::Busy | Status::Superseded)
            {
                return Err(error);
            }
            if Instant::now() + backoff >= deadline {
                return Err(RpcError::NoLeader {
                    addresses: self.inner.addresses.join(","),
                    ms: patience.as_millis() as u64,
                    last: error.to_string(),
                });
            }
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    async fn attempt(&self, request: &Request, deadline: Instant) -> Result<Response, RpcError> {
        let connection = self.connection(deadline).await?;
        let left = deadline.saturating_duration_since(Instant::now()).max(BACKOFF_MIN);
        let result = connection.meta(request, left.min(ATTEMPT_TIMEOUT)).await;
        match &result {
            Err(RpcError::Status { status: Status::NotLeader, message, .. }) => {
                let mut current = self.inner.current.lock().await;
                current.connection = None;
                current.hint = (!message.is_empty()).then(|| message.clone());
            }
            // A timeout leaves the connection as it is: the server may just be busy with a long
            // listing, and others share the connection. A dead peer is noticed below.
            Err(RpcError::Timeout { .. }) if left >= ATTEMPT_TIMEOUT => connection.close(),
            _ => {}
        }
        result
    }

    async fn connection(&self, deadline: Instant) -> Result<Connection, RpcError> {
        let mut current = tokio::time::timeout_at(deadline, self.inner.current.lock())
            .await
            .map_err(|_| RpcError::Timeout {
                address: self.inner.addresses.join(","),
                ms: CONNECT_TIMEOUT.as_millis() as u64,
            })?;
        if let Some(c) = &current.connection
            && !c.is_closed()
        {
            return Ok(c.clone());
        }
        let address = match current.hint.take() {
            Some(hint) => hint,
            None => {
                let i = current.next % self.inner.addresses.len().max(1);
                current.next = i + 1;
                self.inner.addresses.get(i).cloned().unwrap_or_default()
            }
        };
        let left = deadline.saturating_duration_since(Instant::now()).max(BACKOFF_MIN);
        let c =
            Connection::connect(&address, &self.inner.identity, left.min(CONNECT_TIMEOUT)).await?;
        current.connection = Some(c.clone());
        Ok(c)
    }
}
