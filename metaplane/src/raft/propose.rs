//! From commands to log entries, and read indexes: both batched.
//!
//! Commands that wait together become one entry: one log write, one sync, one transaction. A few
//! entries may be under way at once, so that the next batch is being written while the last one is
//! applied. Reads that arrive together share one confirmation of leadership.

use super::{Applied, Proposal, Raft, TypeConfig};
use crate::leases::Waits;
use ebb_metaplane_protocol::{Command, CommandReply, LogEntry, Time};
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::metrics::RaftServerMetrics;
use openraft::raft::ClientWriteResult;
use openraft::raft::responder::Responder;
use openraft::type_config::alias::WatchReceiverOf;
use openraft::{ReadPolicy, ServerState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

/// Commands of one entry at most.
const BATCH_COMMANDS_MAX: usize = 256;
/// Commands waiting at most; further callers wait for room (I9).
const QUEUE_MAX: usize = 8192;
/// Entries under way at most.
const ENTRIES_IN_FLIGHT_MAX: usize = 4;

/// Why a command was not carried out.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ProposeError {
    /// Another node leads, or nobody yet. The address, if known.
    #[error("this metadata node does not lead")]
    NotLeader(Option<String>),
    /// The node is stopping, or its storage failed.
    #[error("this metadata node has stopped: {0}")]
    Stopped(String),
}

/// The leader's clock.
pub fn now() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Time(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}

/// Tells the time that goes into entries.
pub type Clock = Arc<dyn Fn() -> Time + Send + Sync>;

type Answer = oneshot::Sender<Result<(CommandReply, Waits), ProposeError>>;

/// What Raft calls with an entry's outcome, on the task that applied it: one hop less than a channel.
pub struct Callback<T>(Box<dyn FnOnce(T) + Send>);

impl<T: Send + 'static> Responder<TypeConfig, T> for Callback<T> {
    fn on_complete(self, result: T) {
        (self.0)(result);
    }
}

/// Proposes commands. Cheap to clone.
#[derive(Clone)]
pub struct Proposer {
    raft: Raft,
    clock: Clock,
    slots: Arc<Semaphore>,
    queue: mpsc::Sender<(Command, Answer)>,
}

impl Proposer {
    /// Starts the task that makes entries of what waits.
    pub fn start(raft: Raft, clock: Clock) -> Self {
        let (queue, waiting) = mpsc::channel(QUEUE_MAX);
        let slots = Arc::new(Semaphore::new(ENTRIES_IN_FLIGHT_MAX));
        let proposing = propose(raft.clone(), Arc::clone(&clock), Arc::clone(&slots), waiting);
        tokio::spawn(proposing);
        Self { raft, clock, slots, queue }
    }

    /// Carries out a command; the reply comes after it is committed and applied. Dropping the future
    /// does not take the command back. Nobody else may hear of it before what it waits for has settled.
    pub async fn submit(&self, command: Command) -> Result<(CommandReply, Waits), ProposeError> {
        let (answer, reply) = oneshot::channel();
        let stopped = || ProposeError::Stopped("shutting down".into());
        // Nobody waits and there is room: no need to go through the queue.
        let slot = (self.queue.capacity() == QUEUE_MAX)
            .then(|| Arc::clone(&self.slots).try_acquire_owned().ok())
            .flatten();
        match slot {
            Some(slot) => {
                send(&self.raft, &self.clock, slot, vec![command], vec![answer]).await;
            }
            None => self.queue.send((command, answer)).await.map_err(|_| stopped())?,
        }
        reply.await.map_err(|_| stopped())?
    }
}

async fn propose(
    raft: Raft,
    clock: Clock,
    slots: Arc<Semaphore>,
    mut waiting: mpsc::Receiver<(Command, Answer)>,
) {
    while let Some(first) = waiting.recv().await {
        // While all slots are taken, more commands gather for the next entry.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let mut commands = Vec::with_capacity(1);
        let mut answers = Vec::with_capacity(1);
        let mut next = Some(first);
        while let Some((command, answer)) = next.take() {
            commands.push(command);
            answers.push(answer);
            if commands.len() < BATCH_COMMANDS_MAX {
                next = waiting.try_recv().ok();
            }
        }
        send(&raft, &clock, slot, commands, answers).await;
    }
}

/// Gives Raft one entry. The callers are answered when it is applied; if Raft drops it unanswered,
/// they see their channels closed.
async fn send(
    raft: &Raft,
    clock: &Clock,
    slot: OwnedSemaphorePermit,
    commands: Vec<Command>,
    answers: Vec<Answer>,
) {
    let proposal = Proposal::new(LogEntry { now: clock(), commands });
    let done = Callback(Box::new(move |result: ClientWriteResult<TypeConfig>| {
        drop(slot);
        match result {
            Ok(written) => distribute(answers, written.data),
            Err(e) => refuse(answers, &refusal(&e)),
        }
    }));
    if let Err(e) = raft.client_write_ff(proposal, Some(done)).await {
        tracing::debug!(error = %e, "Raft takes no entry");
    }
}

fn distribute(answers: Vec<Answer>, applied: Applied) {
    let mut replies = applied.replies.into_iter();
    let mut waits = applied.waits.into_iter();
    for answer in answers {
        let reply = replies.next().map(|reply| (reply, waits.next().unwrap_or_default()));
        let reply = reply.ok_or_else(|| {
            ProposeError::Stopped("the state machine answered fewer commands than it got".into())
        });
        // A caller that went away asks again by its sequence.
        drop(answer.send(reply));
    }
}

fn refuse(answers: Vec<Answer>, why: &ProposeError) {
    for answer in answers {
        drop(answer.send(Err(why.clone())));
    }
}

fn refusal(e: &ClientWriteError<TypeConfig>) -> ProposeError {
    match e {
        ClientWriteError::ForwardToLeader(f) | ClientWriteError::LogEntryDiscarded(f) => {
            ProposeError::NotLeader(f.leader_node.as_ref().map(|n| n.addr.clone()))
        }
        e => ProposeError::Stopped(e.to_string()),
    }
}

/// Read indexes, shared by the reads that wait together.
///
/// A sole voter needs no round of messages: nobody else can lead or commit while it is the only
/// voter, and what it acknowledged it has applied. So once a round has shown that it leads and has
/// applied what an earlier life of it committed, further reads of the same term only look whether it
/// still leads alone. (Another voter can be elected only by a vote of this node, after which its
/// state is no longer `Leader`.)
#[derive(Clone)]
pub struct ReadIndex {
    inner: Arc<ReadInner>,
}

struct ReadInner {
    raft: Raft,
    /// Leadership as Raft last published it.
    metrics: WatchReceiverOf<TypeConfig, RaftServerMetrics<TypeConfig>>,
    /// Rounds begun.
    begun: AtomicU64,
    /// The round last completed.
    round: Mutex<u64>,
    /// The term of the last completed round.
    confirmed_term: AtomicU64,
}

impl ReadIndex {
    /// Read indexes of a node.
    pub fn new(raft: Raft) -> Self {
        let inner = ReadInner {
            metrics: raft.server_metrics(),
            raft,
            begun: AtomicU64::new(0),
            round: Mutex::new(0),
            confirmed_term: AtomicU64::new(0),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The term in which this node leads.
    pub fn leading_term(&self) -> Option<u64> {
        let metrics = self.inner.metrics.borrow_watched();
        (metrics.state == ServerState::Leader).then_some(metrics.vote.leader_id.term)
    }

    /// Whether this node leads and is the only voter: nobody else can lead or commit.
    pub fn is_sole(&self) -> bool {
        self.sole_leader_of().is_some()
    }

    /// The term in which this node leads and is the only voter.
    fn sole_leader_of(&self) -> Option<u64> {
        let metrics = self.inner.metrics.borrow_watched();
        let voters = metrics.membership_config.membership();
        let alone = voters.voter_ids().eq([metrics.id]) && voters.get_joint_config().len() == 1;
        (metrics.state == ServerState::Leader && alone).then_some(metrics.vote.leader_id.term)
    }

    /// Returns when everything that was committed at the call is applied here, and this node led
    /// meanwhile. A round that began after the call serves every caller that came before it.
    pub async fn confirm(&self) -> Result<(), ProposeError> {
        let sole = self.sole_leader_of();
        if sole.is_some_and(|t| t == self.inner.confirmed_term.load(Ordering::Acquire)) {
            return Ok(());
        }
        let seen = self.inner.begun.load(Ordering::SeqCst);
        let mut completed = self.inner.round.lock().await;
        if *completed > seen {
            return Ok(());
        }
        let mine = self.inner.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let confirmed = self.inner.raft.ensure_linearizable(ReadPolicy::ReadIndex).await;
        match confirmed {
            Ok(read) => {
                *completed = mine;
                let term = read.committed_leader_id().term;
                self.inner.confirmed_term.store(term, Ordering::Release);
                Ok(())
            }
            Err(RaftError::APIError(e)) => {
                use openraft::errors::LinearizableReadError as E;
                Err(match e {
                    E::ForwardToLeader(f) => ProposeError::NotLeader(f.leader_node.map(|n| n.addr)),
                    E::QuorumNotEnough(_) => ProposeError::NotLeader(None),
                })
            }
            Err(RaftError::Fatal(e)) => Err(ProposeError::Stopped(e.to_string())),
        }
    }
}
