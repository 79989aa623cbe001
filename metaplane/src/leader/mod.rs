//! What the leader does by itself: flushes, notices, deletes, sessions, groups, renames, ownership.
//!
//! Each is a loop that wakes on a notice or after a tick, looks at the state for work, does a bounded
//! piece of it and reports by commands. All of their state is in the state machine, so that any of
//! them can be stopped at any await and begun anew by another leader.

pub(crate) mod abandon;
pub(crate) mod cores;
pub(crate) mod flusher;
pub(crate) mod keys;
pub(crate) mod lent;
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
use ebb_metaplane_protocol::lease::LEASE;
use openraft::async_runtime::WatchReceiver;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
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

/// A lead in a term.
struct Lead {
    term: u64,
    since: Instant,
    stop: CancellationToken,
    /// A majority hears it, the loops run and clients are served.
    serves: bool,
}

/// Between two looks, if nothing happens.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A leader that is heard learns so within this.
const CONFIRM_MAX: Duration = Duration::from_secs(1);

/// Leads whenever this voter is elected, until `shutdown`: a lead of another term is another lead, also if
/// nobody saw the pause between them. A leader that no majority hears any more stops at once, since another
/// may lead by now; if none does, it goes on when it is heard again.
pub(crate) async fn run(service: Arc<Service>, shutdown: CancellationToken) {
    let mut metrics = service.voter.raft().server_metrics();
    let mut lead: Option<Lead> = None;
    loop {
        let term = service.voter.leading_term();
        if let Some(over) = lead.take_if(|l| Some(l.term) != term) {
            service.end_lead(&over);
        }
        if let (None, Some(term)) = (&lead, term) {
            let stop = CancellationToken::new();
            // What was known by heart is of another lead. Not when the same one goes on: what it proposed
            // may yet come (a stand-in, R23), and nobody else led meanwhile.
            service.liveness.clear();
            service.voter.leases().lead(term);
            service.flushes.begin_lead();
            lead = Some(Lead { term, since: Instant::now(), stop, serves: false });
        }
        if let Some(lead) = &mut lead {
            let heard = service.voter.is_heard(lead.since);
            if lead.serves && !heard {
                tracing::warn!(term = lead.term, "no majority of the voters hears this leader");
                service.end_lead(lead);
                lead.serves = false;
            } else if !lead.serves
                && heard
                && service.can_serve().await
                && service.leases_have_ended(lead.since)
            {
                lead.stop = shutdown.child_token();
                lead.serves = true;
                start(&service, Stop(lead.stop.clone()));
                service.voter.serve_term(lead.term);
                tracing::info!(term = lead.term, "this voter leads");
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => break,
            changed = metrics.changed() => {
                if changed.is_err() {
                    break;
                }
            }
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
    }
    if let Some(lead) = lead {
        service.end_lead(&lead);
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
    task!(run_membership);
    task!(run_sessions);
    task!(run_owner);
    task!(run_notices);
    task!(run_lent);
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
    fn end_lead(&self, lead: &Lead) {
        if lead.serves {
            tracing::info!(term = lead.term, "this voter leads no more");
        }
        lead.stop.cancel();
        self.voter.end_serving();
    }

    /// Whether there is a formatted state: the first leader of a new cluster formats it when it has the
    /// bucket, and if it died before that, the next one does.
    async fn can_serve(self: &Arc<Self>) -> bool {
        // What the leaders before it committed is applied first.
        let formatted = self.voter.read(|_, r| r.is_formatted());
        match tokio::time::timeout(CONFIRM_MAX, formatted).await {
            Ok(Ok(Ok(true))) => return true,
            Ok(Ok(Ok(false))) => {}
            // It is not the leader after all, or nobody hears it.
            _ => return false,
        }
        if let Err(e) = self.attach(true).await {
            tracing::warn!(error = %e, "the new leader can't format the state");
            tokio::time::sleep(LOOK_EVERY).await;
        }
        false
    }

    /// Whether nobody remembers any more what an earlier leader told (R55).
    fn leases_have_ended(&self, since: Instant) -> bool {
        let given = self.voter.peek(|_, r| r.has_leases());
        matches!(given, Ok(Ok(false))) || since.elapsed() >= LEASE
    }

    /// Wakes the loops that have something to do after commands, once for many of them: a look is a
    /// scan, and costs a client's command its turn.
    async fn run_waker(self: &Arc<Self>, stop: Stop) {
        let tick = self.config.timings.tick();
        while !stop.wait(&self.wakes.stirred, tick).await {
            if stop.sleep(GATHER).await {
                return;
            }
            let Ok(Ok(left)) = self.voter.peek(|_, r| r.left()) else { continue };
            let wakes = &self.wakes;
            for (left, wake) in [
                (left.notices, &wakes.notices),
                (left.pending_keys, &wakes.keys),
                (left.moves, &wakes.moves),
                (left.lingering, &wakes.lent),
            ] {
                if left > 0 {
                    wake.notify_one();
                }
            }
        }
    }

    /// The membership says where the leader is.
    async fn run_membership(self: &Arc<Self>, stop: Stop) {
        while let Err(e) = self.voter.note_own_address().await {
            tracing::debug!(error = %e, "noting the leader's address");
            if stop.sleep(Duration::from_millis(500)).await {
                return;
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
        self.settled_in.store(self.voter.leading_term().unwrap_or(0), Ordering::Release);
        futures::future::join(self.run_keys(stop.clone()), self.run_flusher(stop.clone())).await;
    }
}
