//! The session's life: open, renew well within its lease, replace when it expired (PROTOCOL §5).

use crate::Result;
use crate::cluster::{Shared, left, turn, unexpected};
use ebb_dataplane_protocol::SessionId;
use ebb_metaplane_protocol::{FsError, Request, Response, SessionCall, SessionReply};
use ebb_rpc::MetaClient;
use std::sync::{Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::time::Instant;

/// The current session. `epoch` counts the sessions this client had: handles, grants and
/// connections remember it, so that those of an expired session are noticed.
pub(crate) struct Session {
    state: Mutex<State>,
    reopening: tokio::sync::Mutex<()>,
}

#[derive(Clone, Copy)]
struct State {
    id: SessionId,
    epoch: u64,
    ttl: Duration,
}

async fn open(meta: &MetaClient, label: &str, patience: Duration) -> Result<(SessionId, Duration)> {
    let mut client = [0u8; 16];
    getrandom::fill(&mut client)
        .map_err(|e| crate::ClientError::Metadata(format!("no random bytes: {e}")))?;
    let call = SessionCall::Open { client: u128::from_le_bytes(client), label: label.to_owned() };
    match meta.call(&Request::Session(call), patience).await? {
        Response::Session(reply) => match reply? {
            SessionReply::Opened { session, ttl_ms } => {
                Ok((session, Duration::from_millis(ttl_ms.max(30))))
            }
            SessionReply::Done | SessionReply::Watched(_) => {
                Err(crate::ClientError::Metadata("no session in the answer".into()))
            }
        },
        other => Err(unexpected(&other)),
    }
}

impl Session {
    pub(crate) async fn open(meta: &MetaClient, label: &str, patience: Duration) -> Result<Self> {
        let (id, ttl) = open(meta, label, patience).await?;
        let state = Mutex::new(State { id, epoch: 1, ttl });
        Ok(Self { state, reopening: tokio::sync::Mutex::default() })
    }

    fn state(&self) -> State {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The session and its epoch.
    pub(crate) fn current(&self) -> (SessionId, u64) {
        let s = self.state();
        (s.id, s.epoch)
    }

    /// Replaces the session of `epoch`. `false`: somebody already did.
    pub(crate) async fn reopen(
        &self,
        meta: &MetaClient,
        label: &str,
        epoch: u64,
        deadline: Instant,
    ) -> Result<bool> {
        let _one = turn(&self.reopening, deadline).await?;
        if self.state().epoch != epoch {
            return Ok(false);
        }
        let (id, ttl) = open(meta, label, left(deadline)).await?;
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) =
            State { id, epoch: epoch + 1, ttl };
        Ok(true)
    }

    pub(crate) async fn close(&self, meta: &MetaClient, patience: Duration) -> Result<()> {
        let request = Request::Session(SessionCall::Close(self.state().id));
        match meta.call(&request, patience).await? {
            Response::Session(Ok(_) | Err(FsError::SessionExpired)) => Ok(()),
            Response::Session(Err(e)) => Err(e.into()),
            other => Err(unexpected(&other)),
        }
    }
}

/// Renews at a third of the lease until the client is gone. A failed renewal is tried again at the
/// next turn; an expired session is replaced.
pub(crate) async fn renew(shared: Weak<Shared>) {
    loop {
        let Some(ttl) = shared.upgrade().map(|s| s.session.state().ttl) else { return };
        tokio::time::sleep(ttl / 3).await;
        let Some(shared) = shared.upgrade() else { return };
        let (session, epoch) = shared.session.current();
        let request = Request::Session(SessionCall::Renew(session));
        match shared.meta.call(&request, ttl / 3).await {
            Ok(Response::Session(Ok(_))) => {}
            Ok(Response::Session(Err(FsError::SessionExpired))) => {
                if let Err(e) = shared.reopen_session(epoch, shared.deadline()).await {
                    tracing::warn!(error = %e, "cannot replace the expired session yet");
                }
            }
            Ok(other) => tracing::warn!(?other, "odd answer to a renewal"),
            Err(e) => tracing::debug!(error = %e, "renewal failed, trying again"),
        }
    }
}
