//! Reads at one voter, whether it leads or not, whether it answers or not.

use super::Came;
use super::dice::Dice;
use super::hasty::{query, told};
use super::record::Recorder;
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::{SessionId, Status};
use ebb_metaplane_protocol::{FsError, Request, Response};
use ebb_rpc::{Connection, Identity, RpcError};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

pub(super) const KIND: &str = "at one voter";
/// A read is asked this often.
const EVERY: Duration = Duration::from_millis(25);
/// Reads without an answer at most.
const UNANSWERED_MAX: usize = 200;
/// Who stands still for so long is asked no more.
const PATIENCE: Duration = Duration::from_secs(30);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) struct Reader {
    address: String,
    label: String,
    identity: Identity,
    dice: Dice,
}

impl Reader {
    pub(super) fn new(address: &str, n: u32, key: ClusterKey, dice: Dice) -> Self {
        let label = format!("reader {n} at {address}");
        let identity = Identity::new(key, Role::Client);
        Self { address: address.to_owned(), label, identity, dice }
    }

    /// Works until the time is over and everything is answered.
    pub(super) async fn work(mut self, recorder: Arc<Recorder>, names: u16) {
        let unanswered = Arc::new(Semaphore::new(UNANSWERED_MAX));
        let mut connection: Option<Connection> = None;
        while !recorder.is_over() {
            tokio::time::sleep(EVERY).await;
            let asked = match connection.as_ref().filter(|c| !c.is_closed()) {
                Some(c) => c.clone(),
                None => {
                    let connecting =
                        Connection::connect(&self.address, &self.identity, CONNECT_TIMEOUT);
                    let Ok(c) = connecting.await else { continue };
                    connection.insert(c).clone()
                }
            };
            let Ok(permit) = Arc::clone(&unanswered).try_acquire_owned() else { continue };
            let waiting = (UNANSWERED_MAX - unanswered.available_permits()) as u64;
            recorder.count(|c| c.unanswered_max = c.unanswered_max.max(waiting));
            let (tree, operation) = self.dice.read(&recorder, names);
            let (recorder, label) = (Arc::clone(&recorder), self.label.clone());
            tokio::spawn(async move {
                let called = recorder.now();
                let query = query(operation);
                let request = Request::Query { session: SessionId(0), query };
                let reply = asked.meta(&request, PATIENCE).await;
                match reply {
                    Ok(Response::Query(Err(FsError::Again { .. }))) => {}
                    Ok(Response::Query(reply)) => {
                        let came = told(reply);
                        if matches!(came, Came::Answer(_)) {
                            let at = asked.address().to_owned();
                            recorder.count(|c| *c.read_at.entry(at).or_default() += 1);
                        }
                        recorder.did((KIND, &label), tree, called, operation, came);
                    }
                    Err(RpcError::Status { status: Status::NotLeader, .. }) => {
                        recorder.count(|c| c.refused += 1);
                    }
                    // A read that nobody answers says nothing.
                    Ok(_) | Err(_) => {}
                }
                drop(permit);
            });
        }
        let all = UNANSWERED_MAX as u32;
        let _ = tokio::time::timeout(PATIENCE, unanswered.acquire_many(all)).await;
    }
}
