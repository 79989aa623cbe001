//! A client that speaks the protocol itself and waits for nobody: the same request, under the same sequence, goes to
//! the next voter after a moment, while the one before may still work on it. Every other such client is eager: it asks
//! all voters at once, over and over, so it is there when another one begins to lead. Some requests they give up
//! without an answer.

use super::dice::Dice;
use super::record::{Recorder, listed, opened, refused, shows};
use super::{Came, Plan, worker};
use crate::BenchError;
use ebb_dataplane_protocol::auth::Role;
use ebb_dataplane_protocol::{HandleId, InodeId, Sequence, SessionId, Status};
use ebb_history::history::{Answer, Name, Operation};
use ebb_metaplane_protocol::attr::SetAttr;
use ebb_metaplane_protocol::op::OpenMode;
use ebb_metaplane_protocol::query::PAGE_ENTRIES_MAX;
use ebb_metaplane_protocol::{
    FsError, FsResult, Op, OpReply, Query, QueryReply, Request, Response, SessionCall, SessionReply,
};
use ebb_rpc::{Connection, Identity, MetaClient, RpcError};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const KIND: &str = "by hasty clients";
/// After this another voter is asked.
const MOMENT: Duration = Duration::from_millis(250);
/// A pause before the next one is asked that does not lead either.
const PAUSE: Duration = Duration::from_millis(10);
/// How long it tries: mostly, and sometimes.
const PATIENCE: Duration = Duration::from_secs(20);
const IMPATIENCE: Duration = Duration::from_millis(1_500);
/// Opened files that it lets go of at once.
const RELEASE_AT: usize = 16;

pub(super) struct Client {
    label: String,
    dice: Dice,
    voters: Vec<String>,
    identity: Identity,
    connections: Vec<Option<Connection>>,
    /// Whom it asks; an eager one asks all.
    at: usize,
    is_eager: bool,
    session: SessionId,
    sequence: u64,
    handles: Vec<HandleId>,
    renewing: tokio::task::JoinHandle<()>,
}

fn bytes(name: Name) -> Vec<u8> {
    name.to_string().into_bytes()
}

/// What is asked for an operation.
fn request(operation: Operation) -> Result<Op, Query> {
    Ok(match operation {
        Operation::Create { parent, name, exclusive } => Op::Create {
            parent: InodeId(parent),
            name: bytes(name),
            mode: 0o644,
            uid: 0,
            gid: 0,
            exclusive,
            open: OpenMode::default(),
            delegate: false,
        },
        Operation::Mkdir { parent, name } => {
            let (parent, name) = (InodeId(parent), bytes(name));
            Op::Mkdir { parent, name, mode: 0o755, uid: 0, gid: 0 }
        }
        Operation::Unlink { parent, name } => {
            Op::Unlink { parent: InodeId(parent), name: bytes(name) }
        }
        Operation::Rmdir { parent, name } => {
            Op::Rmdir { parent: InodeId(parent), name: bytes(name) }
        }
        Operation::Rename { parent, name, new_parent, new_name, flags } => {
            let (parent, new_parent) = (InodeId(parent), InodeId(new_parent));
            let (name, new_name) = (bytes(name), bytes(new_name));
            Op::Rename { parent, name, new_parent, new_name, flags }
        }
        Operation::Truncate { inode, size } => {
            let set = SetAttr { size: Some(size), ..SetAttr::default() };
            Op::SetAttr { inode: InodeId(inode), set }
        }
        read => return Err(query(read)),
    })
}

/// What is asked for a read.
pub(super) fn query(operation: Operation) -> Query {
    match operation {
        Operation::Lookup { parent, name } => {
            Query::Lookup { parent: InodeId(parent), name: bytes(name) }
        }
        Operation::List { inode } => {
            let (inode, after) = (InodeId(inode), Vec::new());
            Query::ReadDir { inode, after, limit: PAGE_ENTRIES_MAX }
        }
        Operation::Stat { inode } => Query::GetAttr(InodeId(inode)),
        _ => Query::StatFs,
    }
}

/// The answer to a read.
pub(super) fn told(reply: FsResult<QueryReply>) -> Came {
    match reply {
        Ok(QueryReply::Attr(attr)) => Came::Answer(shows(&attr)),
        Ok(QueryReply::Page { entries, end }) => Came::Answer(listed(&entries, end)),
        Ok(other) => Came::Unclear(format!("an odd answer: {other:?}")),
        Err(e) => refused(&e),
    }
}

impl Client {
    pub(super) async fn connect(plan: &Plan, n: u32, dice: Dice) -> Result<Self, BenchError> {
        let identity = Identity::new(plan.key.clone(), Role::Client);
        let meta = MetaClient::new(plan.addresses.clone(), identity.clone());
        let mut client = [0u8; 16];
        getrandom::fill(&mut client).map_err(worker)?;
        let label = format!("ebb bench history, hasty client {n}");
        let call = SessionCall::Open { client: u128::from_le_bytes(client), label };
        let opened = meta.call(&Request::Session(call), super::PATIENCE).await.map_err(worker)?;
        let Response::Session(Ok(SessionReply::Opened { session, ttl_ms })) = opened else {
            return Err(worker("no session"));
        };
        let every = Duration::from_millis(ttl_ms / 4);
        let renewing = tokio::spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                let _ = meta.call(&Request::Session(SessionCall::Renew(session)), every).await;
            }
        });
        Ok(Self {
            label: format!("hasty {n}"),
            dice,
            connections: plan.voters.iter().map(|_| None).collect(),
            voters: plan.voters.clone(),
            identity,
            at: 0,
            is_eager: n % 2 == 1,
            session,
            sequence: 0,
            handles: Vec::new(),
            renewing,
        })
    }

    /// Works until the time is over.
    pub(super) async fn work(mut self, recorder: Arc<Recorder>, names: u16) {
        while !recorder.is_over() {
            let (tree, operation) = self.dice.operation(&recorder, names, false);
            let called = recorder.now();
            let came = self.does(&recorder, operation).await;
            recorder.did((KIND, &self.label), tree, called, operation, came);
            if self.handles.len() >= RELEASE_AT {
                let op = Op::ReleaseMany { handles: std::mem::take(&mut self.handles) };
                let _ = self.mutate(&recorder, op, PATIENCE).await;
            }
        }
        self.renewing.abort();
        let _ = self
            .call(&recorder, &Request::Session(SessionCall::Close(self.session)), PATIENCE)
            .await;
    }

    async fn does(&mut self, recorder: &Recorder, operation: Operation) -> Came {
        let patience = if self.dice.once_in(4) { IMPATIENCE } else { PATIENCE };
        let op = match request(operation) {
            Ok(op) => op,
            Err(query) => {
                let request = Request::Query { session: self.session, query };
                return match self.call(recorder, &request, patience).await {
                    Ok(Response::Query(reply)) => told(reply),
                    Ok(_) => Came::Unclear("an answer to another question".into()),
                    Err(why) => Came::Unclear(why),
                };
            }
        };
        match self.mutate(recorder, op, patience).await {
            Ok(Ok(OpReply::Done)) => Came::Answer(Answer::Done),
            Ok(Ok(OpReply::Attr(attr))) => Came::Answer(shows(&attr)),
            Ok(Ok(OpReply::Made(made))) => Came::Answer(shows(&made.attr)),
            Ok(Ok(OpReply::Opened(file))) => {
                self.handles.push(file.handle);
                Came::Answer(opened(&file.attr, file.created))
            }
            Ok(Ok(_)) => Came::Unclear("an odd answer".into()),
            Ok(Err(e)) => refused(&e),
            Err(why) => Came::Unclear(why),
        }
    }

    /// A mutation, under the next sequence.
    async fn mutate(
        &mut self,
        recorder: &Recorder,
        op: Op,
        patience: Duration,
    ) -> Result<FsResult<OpReply>, String> {
        self.sequence += 1;
        let sequence = Sequence(self.sequence);
        let request = Request::Mutate {
            session: self.session,
            sequence,
            answered_below: sequence,
            op,
            dropped: Vec::new(),
        };
        match self.call(recorder, &request, patience).await? {
            Response::Op(reply) => Ok(reply),
            _ => Err("an answer to another question".into()),
        }
    }

    async fn call(
        &mut self,
        recorder: &Recorder,
        request: &Request,
        patience: Duration,
    ) -> Result<Response, String> {
        let deadline = Instant::now() + patience;
        loop {
            let attempted = match self.is_eager {
                true => self.attempt_all(request, deadline).await,
                false => self.attempt_next(request).await,
            };
            match attempted {
                Some(Response::Op(Err(FsError::Again { .. })))
                | Some(Response::Query(Err(FsError::Again { .. })))
                | None => {}
                Some(response) => return Ok(response),
            }
            if Instant::now() + PAUSE >= deadline {
                return Err("a hasty client gave up".into());
            }
            recorder.count(|c| c.asked_again += 1);
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Asks one voter, and if it has no answer turns to another.
    async fn attempt_next(&mut self, request: &Request) -> Option<Response> {
        let at = self.at;
        let slot = &mut self.connections[at];
        match attempt(slot, &self.voters[at], &self.identity, request).await {
            Ok(response) => return Some(response),
            Err(RpcError::Status { status: Status::NotLeader, message, .. }) => {
                let hinted = self.voters.iter().position(|v| *v == message);
                self.at = hinted.unwrap_or(at + 1) % self.voters.len();
            }
            Err(_) => self.at = (at + 1) % self.voters.len(),
        }
        None
    }

    /// Asks each voter until one answers. What the others do with it is theirs.
    async fn attempt_all(&mut self, request: &Request, deadline: Instant) -> Option<Response> {
        let identity = &self.identity;
        let each = self.connections.iter_mut().zip(&self.voters).map(|(slot, voter)| {
            Box::pin(async move {
                loop {
                    if let Ok(response) = attempt(slot, voter, identity, request).await {
                        return response;
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            })
        });
        let first = futures::future::select_all(each);
        tokio::time::timeout_at(deadline, first).await.ok().map(|(response, _, _)| response)
    }
}

/// Asks a voter. The connection stays whatever comes: what was sent there is there.
async fn attempt(
    slot: &mut Option<Connection>,
    voter: &str,
    identity: &Identity,
    request: &Request,
) -> Result<Response, RpcError> {
    let connection = match slot.as_ref().filter(|c| !c.is_closed()) {
        Some(c) => c.clone(),
        None => slot.insert(Connection::connect(voter, identity, MOMENT).await?).clone(),
    };
    connection.meta(request, MOMENT).await
}
