//! What the leader does by itself: flushes, notices, deletes, sessions, groups, renames, ownership.
//!
//! Each is a loop that wakes on a notice or after a tick, looks at the state for work, does a bounded
//! piece of it and reports by commands. All of their state is in the state machine, so that any of
//! them can be stopped at any await and begun anew by another leader.

pub(crate) mod abandon;
pub(crate) mod cores;
pub(crate) mod flusher;
pub(crate) mod keys;
pub(crate) mod liveness;
pub(crate) mod members;
pub(crate) mod mover;
pub(crate) mod moves;
pub(crate) mod notices;
pub(crate) mod replicas;
pub(crate) mod rescue;
pub(crate) mod seal;
pub(crate) mod sessions;
pub(crate) mod stand_in;
pub(crate) mod store;
pub(crate) mod sweep;
pub(crate) mod windows;

use crate::service::Service;
use openraft::async_runtime::WatchReceiver;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Ends the loops of a leadership.
#[derive(Clone, Debug)]
pub(crate) struct Stop(CancellationToken);

impl Stop {
    /// Sleeps; `true`: it is time to end.
    pub(crate) async fn sleep(&self, pause: Duration) -> bool {
        tokio::select! {
            () = self.0.cancelled() => true,
            () = tokio::time::sleep(pause) => self.0.is_cancelled(),
        }
    }
    /// Sleeps until woken; `true`: it is time to end.
    pub(crate) async fn wait(&self, wake: &Notify, pause: Duration) -> bool {
        tokio::select! {
            () = self.0.cancelled() => true,
            () = wake.notified() => self.0.is_cancelled(),
            () = tokio::time::sleep(pause) => self.0.is_cancelled(),
        }
    }
    /// Whether it is time to end.
    pub(crate) fn is_set(&self) -> bool {
        self.0.is_cancelled()
    }
}

/// Leads whenever this voter is elected, until `shutdown`.
pub(crate) async fn run(service: Arc<Service>, shutdown: CancellationToken) {
    let mut metrics = service.voter.raft().server_metrics();
    let mut leading: Option<CancellationToken> = None;
    loop {
        let leads = service.voter.raft().is_leader();
        match (&leading, leads) {
            (None, true) => {
                service.liveness.clear();
                let stop = shutdown.child_token();
                start(&service, Stop(stop.clone()));
                leading = Some(stop);
            }
            (Some(stop), false) => {
                stop.cancel();
                leading = None;
            }
            _ => {}
        }
        tokio::select! {
            () = shutdown.cancelled() => break,
            changed = metrics.changed() => {
                if changed.is_err() {
                    break;
                }
            }
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
        }
    }
    if let Some(stop) = leading {
        stop.cancel();
    }
}

/// Starts the loops of a leadership.
fn start(service: &Arc<Service>, stop: Stop) {
    macro_rules! task {
        ($name:ident) => {{
            let (service, stop) = (Arc::clone(service), stop.clone());
            tokio::spawn(async move { service.$name(stop).await });
        }};
    }
    task!(run_sessions);
    task!(run_owner);
    task!(run_notices);
    task!(run_moves);
    task!(run_groups);
    task!(run_replicas);
    task!(run_stores);
    task!(run_waker);
}

/// How long commands gather before the loops look at what they left behind. Who waits for a loop wakes
/// it at once.
const GATHER: Duration = Duration::from_millis(10);

impl Service {
    /// Wakes the loops that have something to do after commands, once for many of them: a look is a
    /// scan, and costs a client's command its turn.
    async fn run_waker(self: &Arc<Self>, stop: Stop) {
        let tick = self.config.timings.tick();
        while !stop.wait(&self.wakes.stirred, tick).await {
            if stop.sleep(GATHER).await {
                return;
            }
            let Ok(Ok(left)) = self.voter.peek(|_, r| r.counts()) else { continue };
            let wakes = &self.wakes;
            for (left, wake) in [
                (left.notices, &wakes.notices),
                (left.pending_keys, &wakes.keys),
                (left.moves, &wakes.moves),
            ] {
                if left > 0 {
                    wake.notify_one();
                }
            }
        }
    }

    /// What changes S3 starts after what the last leader left in doubt was noted.
    async fn run_stores(self: &Arc<Self>, stop: Stop) {
        while let Err(e) = self.recover().await {
            tracing::debug!(error = %e, "taking over from the last leader");
            if stop.sleep(Duration::from_millis(200)).await {
                return;
            }
        }
        futures::future::join(self.run_keys(stop.clone()), self.run_flusher(stop.clone())).await;
    }
}
