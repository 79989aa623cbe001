//! Reads at one voter, whether it leads or not, whether it answers or not.
//!
//! Who stands still reads what waits in each of its sockets in the order it came, and learns from another socket that
//! another one leads: what was asked last it reads when it knows. So a reader has several connections, and turns to the
//! next one when the last one has not answered for a moment: in some socket what was asked last is the first.

use super::dice::Dice;
use super::hasty::{query, told};
use super::record::Recorder;
use super::{Came, Plan};
use ebb_dataplane_protocol::auth::Role;
use ebb_dataplane_protocol::{SessionId, Status};
use ebb_history::history::Operation;
use ebb_metaplane_protocol::{FsError, Request, Response};
use ebb_rpc::{Connection, Identity, RpcError};
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;

pub(super) const KIND: &str = "at one voter";
/// A read is asked this often.
const EVERY: Duration = Duration::from_millis(25);
const CONNECTIONS: usize = 10;
/// After this without an answer the next connection is used.
const MOMENT: Duration = Duration::from_millis(250);
/// Reads without an answer at most.
const UNANSWERED_MAX: usize = 400;
/// Who stands still for so long is asked no more.
const PATIENCE: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Who answers after this stood still, or could not say whether it leads.
const LONG: Duration = Duration::from_millis(500);

/// When what a connection has not answered was asked; and which of it.
type Unanswered = Arc<Mutex<BTreeSet<(u64, u64)>>>;

#[derive(Default)]
struct Lane {
    connection: Option<Connection>,
    unanswered: Unanswered,
}

fn lock(unanswered: &Unanswered) -> MutexGuard<'_, BTreeSet<(u64, u64)>> {
    unanswered.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lane {
    /// Whether it answers, as far as is known.
    fn answers(&self, now: u64) -> bool {
        let oldest = lock(&self.unanswered).first().map_or(now, |(called, _)| *called);
        now - oldest < MOMENT.as_nanos() as u64
    }

    async fn connect(&mut self, address: &str, identity: &Identity) -> Option<Connection> {
        if let Some(c) = self.connection.as_ref().filter(|c| !c.is_closed()) {
            return Some(c.clone());
        }
        let c = Connection::connect(address, identity, CONNECT_TIMEOUT).await.ok()?;
        Some(self.connection.insert(c).clone())
    }
}

pub(super) struct Reader {
    address: String,
    label: String,
    identity: Identity,
    followers: bool,
    dice: Dice,
}

impl Reader {
    pub(super) fn new(address: &str, n: u32, plan: &Plan, dice: Dice) -> Self {
        let label = format!("reader {n} at {address}");
        let identity = Identity::new(plan.key.clone(), Role::Client);
        Self { address: address.to_owned(), label, identity, followers: plan.followers, dice }
    }

    /// Works until the time is over and everything is answered.
    pub(super) async fn work(mut self, recorder: Arc<Recorder>, names: u16) {
        let mut lanes: Vec<Lane> = (0..CONNECTIONS).map(|_| Lane::default()).collect();
        let mut reads = JoinSet::new();
        let mut asked = 0;
        while !recorder.is_over() {
            tokio::time::sleep(EVERY).await;
            while reads.try_join_next().is_some() {}
            // All of them, while they can be made: who stands still takes no new ones.
            let now = recorder.now();
            if lanes[0].answers(now) {
                for lane in &mut lanes {
                    lane.connect(&self.address, &self.identity).await;
                }
            }
            let at = lanes.iter().position(|l| l.answers(now)).unwrap_or(CONNECTIONS - 1);
            let lane = &lanes[at];
            let Some(connection) = lane.connection.clone().filter(|c| !c.is_closed()) else {
                continue;
            };
            if reads.len() >= UNANSWERED_MAX {
                continue;
            }
            asked += 1;
            let (tree, operation) = self.dice.read(&recorder, names);
            let read = Read {
                recorder: Arc::clone(&recorder),
                label: self.label.clone(),
                number: asked,
                near: self.followers && asked % 2 == 0,
                unanswered: Arc::clone(&lane.unanswered),
            };
            reads.spawn(read.ask(connection, tree, operation));
        }
        let all = async { while reads.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(PATIENCE, all).await;
    }
}

/// A read that is under way.
struct Read {
    recorder: Arc<Recorder>,
    label: String,
    number: u64,
    /// Who follows may answer.
    near: bool,
    unanswered: Unanswered,
}

impl Read {
    async fn ask(self, connection: Connection, tree: usize, operation: Operation) {
        let recorder = &self.recorder;
        let called = recorder.now();
        lock(&self.unanswered).insert((called, self.number));
        let request = Request::Query { session: SessionId(0), query: query(operation) };
        let reply = match self.near {
            true => connection.meta_near(&request, PATIENCE).await,
            false => connection.meta(&request, PATIENCE).await.map(|reply| (reply, false)),
        };
        lock(&self.unanswered).remove(&(called, self.number));
        let is_late = recorder.now() - called >= LONG.as_nanos() as u64;
        match reply {
            Ok((Response::Query(Err(FsError::Again { .. })), _)) => {}
            Ok((Response::Query(reply), behind)) => {
                let came = told(reply);
                if matches!(came, Came::Answer(_)) {
                    let at = connection.address().to_owned();
                    recorder.count(|c| {
                        *c.read_at.entry(at).or_default() += 1;
                        c.answered_late += u64::from(is_late);
                        c.read_behind += u64::from(behind);
                    });
                }
                recorder.did((KIND, &self.label), tree, called, operation, came);
            }
            Err(RpcError::Status { status: Status::NotLeader, .. }) => recorder.count(|c| {
                c.refused += 1;
                c.refused_late += u64::from(is_late);
            }),
            // A read that nobody answers says nothing.
            Ok(_) | Err(_) => {}
        }
    }
}
