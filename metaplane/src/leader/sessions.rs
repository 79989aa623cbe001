//! Leases of sessions: renewals are taken in memory and committed in batches; who was not heard of
//! for a whole lease is ended, which fences what it wrote (PROTOCOL §5).
//!
//! A new leader heard nobody, so it first gives everybody a full lease.

use super::Stop;
use crate::raft::propose::now;
use crate::service::{Service, count, fs_error};
use ebb_dataplane_protocol::SessionId;
use ebb_metaplane_protocol::{Command, FsResult};
use ebb_namespace::limits::SESSION_TTL_MS;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Renewals are committed this often.
const COMMIT_EVERY: Duration = Duration::from_millis(SESSION_TTL_MS / 4);
/// Expiry is looked at this often.
const LOOK_EVERY: Duration = Duration::from_millis(1_000);

/// When no client has had a cache for this long, that is noted.
const NO_LEASES_FOR: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug)]
struct Renewed {
    at: Instant,
    committed: bool,
}

/// Who renewed when.
#[derive(Debug, Default)]
pub(crate) struct SessionClock(Mutex<HashMap<SessionId, Renewed>>);

impl SessionClock {
    fn all(&self) -> MutexGuard<'_, HashMap<SessionId, Renewed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session was heard of.
    pub(crate) fn renew(&self, session: SessionId) {
        self.all().insert(session, Renewed { at: Instant::now(), committed: false });
    }

    /// A session ended.
    pub(crate) fn forget(&self, session: SessionId) {
        self.all().remove(&session);
    }

    fn uncommitted(&self) -> Vec<SessionId> {
        let mut all = self.all();
        let mut due = Vec::new();
        for (id, r) in all.iter_mut().filter(|(_, r)| !r.committed) {
            r.committed = true;
            due.push(*id);
        }
        due.sort_unstable();
        due
    }

    fn heard_within(&self, session: SessionId, limit: Duration) -> bool {
        self.all().get(&session).is_some_and(|r| r.at.elapsed() < limit)
    }

    fn forget_old(&self, limit: Duration) {
        self.all().retain(|_, r| r.at.elapsed() < limit);
    }
}

impl Service {
    /// The loop of a leader.
    pub(crate) async fn run_sessions(&self, stop: Stop) {
        let ttl = Duration::from_millis(SESSION_TTL_MS);
        // Everybody starts with a full lease.
        while let Err(e) = self.renew_all().await {
            tracing::debug!(error = %e, "renewing all sessions");
            if stop.sleep(LOOK_EVERY).await {
                return;
            }
        }
        let mut committed = Instant::now();
        let mut leased = Instant::now();
        while !stop.sleep(LOOK_EVERY).await {
            if committed.elapsed() >= COMMIT_EVERY {
                committed = Instant::now();
                let due = self.sessions.uncommitted();
                if !due.is_empty()
                    && let Err(e) = self.submit(Command::RenewSessions(due)).await
                {
                    tracing::debug!(error = %e, "renewing sessions");
                }
                self.sessions.forget_old(ttl * 2);
            }
            if let Err(e) = self.expire(ttl).await {
                tracing::debug!(error = %e, "expiring sessions");
            }
            let over = leased.elapsed() >= NO_LEASES_FOR;
            if self.voter.leases().clients() > 0 || over && self.end_leases().await {
                leased = Instant::now();
            }
        }
    }

    /// Notes that nobody remembers anything: the next leader need not wait. `false`: not for sure, to be called
    /// again, and none is given meanwhile.
    async fn end_leases(&self) -> bool {
        let given = self.voter.peek(|_, r| r.has_leases());
        let desk = self.voter.leases();
        if matches!(given, Ok(Ok(true)))
            && desk.close()
            && let Err(e) = self.submit(Command::SetLeases(false)).await
        {
            tracing::debug!(error = %e, "noting that there are no leases");
            return false;
        }
        desk.open();
        true
    }

    async fn renew_all(&self) -> FsResult<()> {
        // Also those that were opened at the end of the lead before.
        let all = self.voter.read(|_, r| r.sessions()).await.map_err(fs_error)??;
        let ids: Vec<SessionId> = all.into_iter().map(|s| s.0).collect();
        if !ids.is_empty() {
            self.submit(Command::RenewSessions(ids)).await?;
        }
        Ok(())
    }

    async fn expire(&self, ttl: Duration) -> FsResult<()> {
        let expired = self.voter.peek(|_, r| r.expired_sessions(now())).map_err(fs_error)??;
        let gone: Vec<SessionId> =
            expired.into_iter().filter(|s| !self.sessions.heard_within(*s, ttl)).collect();
        if gone.is_empty() {
            return Ok(());
        }
        for session in &gone {
            tracing::info!(%session, "the session expired; what it wrote is fenced");
            count(&self.counts.sessions_expired);
        }
        self.end_sessions(gone).await
    }

    /// Ends sessions; nobody waits for them any more.
    pub(crate) async fn end_sessions(&self, ended: Vec<SessionId>) -> FsResult<()> {
        self.submit(Command::EndSessions(ended.clone())).await?;
        for session in ended {
            self.voter.leases().forget(session);
            self.sessions.forget(session);
        }
        self.wakes.lent.notify_one();
        Ok(())
    }
}
