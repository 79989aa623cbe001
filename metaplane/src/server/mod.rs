//! The RPC port: takes frames, dispatches requests, answers.
//!
//! Reads are linearizable, mutations exactly-once (both by Raft and the state machine); who does not
//! lead says who does. Everything a peer sends is checked before use, and a request that makes no
//! sense is refused and counted, nothing else (I12). Bounded: so many requests per connection
//! (ebb-rpc) and in all (here).

mod admin;
pub(crate) mod check;
pub(crate) mod dump;
mod follow;
mod mutate;
pub(crate) mod names;
mod nodes;
mod query;
mod status;

use crate::service::{Service, count, fs_error};
use bytes::Bytes;
use ebb_dataplane_protocol::auth::Role;
use ebb_dataplane_protocol::header::FLAG_ANY_VOTER;
use ebb_dataplane_protocol::{Opcode, Status, codec};
use ebb_metaplane_protocol::lease::{DROPPED_MAX, RETURNED_MAX};
use ebb_metaplane_protocol::{
    Command, CommandReply, FsError, FsResult, Op, Request, Response, SessionCall, SessionReply,
};
use ebb_namespace::limits::SESSION_TTL_MS;
use ebb_rpc::Frame;
use ebb_rpc::server::{Handler, Peer};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::Semaphore;

/// Requests in progress at most, of all connections.
const REQUESTS_MAX: usize = 4096;

/// The port's handler.
pub(crate) struct Port {
    service: Arc<Service>,
    permits: Semaphore,
    /// The start is over; before, only voters are answered.
    ready: Arc<AtomicBool>,
}

impl Port {
    pub(crate) fn new(service: Arc<Service>, ready: Arc<AtomicBool>) -> Self {
        Self { service, permits: Semaphore::new(REQUESTS_MAX), ready }
    }
}

impl Handler for Port {
    async fn handle(&self, peer: Peer, frame: Frame) -> Frame {
        match frame.header.opcode {
            // Says where all voters are: the list that a client was given grows old.
            Opcode::Ping => {
                let (membership, addresses) = self.service.voter.addresses();
                let header = frame.header.reply(Status::Ok).with_membership(membership);
                Frame::new(header, Bytes::from(addresses.join(",")), Bytes::new())
            }
            Opcode::Raft if peer.hello.role == Role::Meta => {
                self.service.voter.answer(&frame).await
            }
            Opcode::Meta if !self.ready.load(Ordering::Acquire) => {
                Frame::refusal(&frame.header, Status::NotLeader, "")
            }
            Opcode::Meta => match self.service.voter.serves() {
                Ok(term) => self.meta(&peer, &frame, term).await,
                Err(hint) if frame.header.has(FLAG_ANY_VOTER) => self.follow(&frame, hint).await,
                Err(hint) => {
                    let hint = hint.unwrap_or_default();
                    Frame::refusal(&frame.header, Status::NotLeader, &hint)
                }
            },
            _ => Frame::refusal(&frame.header, Status::Forbidden, "not served on this port"),
        }
    }
}

impl Port {
    async fn meta(&self, peer: &Peer, frame: &Frame, term: u64) -> Frame {
        let request: Request = match codec::decode(&frame.body) {
            Ok(request) => request,
            Err(e) => return Frame::refusal(&frame.header, Status::BadRequest, &e.to_string()),
        };
        // Long waits (a flush, a shutdown) hold a permit of their connection, not of everybody.
        let watches = matches!(request, Request::Session(SessionCall::Watch(..)));
        let waits = watches
            || matches!(
                request,
                Request::Admin(_) | Request::Mutate { op: Op::Lock { wait: true, .. }, .. }
            );
        let _permit = if waits { None } else { self.permits.acquire().await.ok() };
        let _busy = (!watches).then(|| self.service.voter.busy());
        let response = self.service.respond(peer, request).await;
        // Who led twice and not in between knows nothing of what another leader told, or waits for its end.
        let tells = matches!(response, Response::Query(_) | Response::Op(_));
        let astray = tells && self.service.voter.serves() != Ok(term);
        if let Some(hint) = not_leader(&response).or_else(|| astray.then_some("")) {
            // A command that was proposed may yet be carried out; a read is nothing but unanswered.
            let status = match &response {
                Response::Op(_) => Status::Superseded,
                _ => Status::NotLeader,
            };
            return Frame::refusal(&frame.header, status, hint);
        }
        let body = Bytes::from(codec::encode(&response));
        let header =
            frame.header.reply(Status::Ok).with_membership(self.service.voter.membership());
        Frame::new(header, body, Bytes::new())
    }
}

impl Port {
    /// A question to whoever is near, which is not the leader: answered, or `NotLeader` if it is the leader's, or
    /// `Busy` if nobody can be answered here now.
    async fn follow(&self, frame: &Frame, leader: Option<String>) -> Frame {
        let Ok(Request::Query { session, query }) = codec::decode(&frame.body) else {
            return Frame::refusal(&frame.header, Status::BadRequest, "not a question");
        };
        let _permit = self.permits.acquire().await.ok();
        match self.service.follow(session, &query).await {
            Ok(Some(reply)) => {
                let body = Bytes::from(codec::encode(&Response::Query(reply)));
                let voters = self.service.voter.membership();
                let mut header = frame.header.reply(Status::Ok).with_membership(voters);
                header.flags |= FLAG_ANY_VOTER;
                Frame::new(header, body, Bytes::new())
            }
            Ok(None) => {
                Frame::refusal(&frame.header, Status::NotLeader, &leader.unwrap_or_default())
            }
            Err(e) => Frame::refusal(&frame.header, Status::Busy, &e.to_string()),
        }
    }
}

/// The leader's address, if the response is that this node does not lead.
fn not_leader(response: &Response) -> Option<&str> {
    let error = match response {
        Response::Op(r) => r.as_ref().err(),
        Response::Query(r) => r.as_ref().err(),
        Response::Session(r) => r.as_ref().err(),
        Response::Node(r) => r.as_ref().err(),
        Response::Admin(r) => r.as_ref().err(),
    };
    match error {
        Some(FsError::NotLeader(hint)) => Some(hint.as_deref().unwrap_or_default()),
        _ => None,
    }
}

impl Service {
    async fn respond(self: &Arc<Self>, peer: &Peer, request: Request) -> Response {
        match request {
            Request::Query { session, query } => {
                count(&self.counts.queries);
                Response::Query(self.query(session, query).await)
            }
            Request::Mutate { session, sequence, answered_below, op, dropped } => {
                count(&self.counts.mutations);
                if dropped.len() > DROPPED_MAX {
                    let why = format!("more than {DROPPED_MAX} forgotten inodes in one request");
                    return Response::Op(Err(FsError::Invalid(why)));
                }
                self.voter.leases().dropped(session, &dropped);
                Response::Op(self.mutate(session, sequence, answered_below, op).await)
            }
            Request::Session(call) => Response::Session(self.session(call).await),
            Request::Node(call) => Response::Node(match peer.hello.role {
                Role::Data => self.node(call).await,
                _ => Err(FsError::NotPermitted("only data nodes report as such".into())),
            }),
            Request::Admin(call) => Response::Admin(self.admin(call).await),
        }
    }

    async fn session(&self, call: SessionCall) -> FsResult<SessionReply> {
        match call {
            SessionCall::Open { client, label } => {
                let reply = self.submit(Command::OpenSession { client, label }).await?;
                let CommandReply::Session(opened) = reply else { return Err(unexpected(&reply)) };
                let session = opened?;
                self.sessions.renew(session);
                Ok(SessionReply::Opened { session, ttl_ms: SESSION_TTL_MS })
            }
            SessionCall::Renew(session) => {
                let lives = self.voter.read(|_, r| r.session_exists(session)).await;
                if !lives.map_err(fs_error)?? {
                    return Err(FsError::SessionExpired);
                }
                self.sessions.renew(session);
                Ok(SessionReply::Done)
            }
            SessionCall::Close(session) => {
                self.end_sessions(vec![session]).await?;
                Ok(SessionReply::Done)
            }
            SessionCall::Watch(_, watch) if watch.returned.len() > RETURNED_MAX => {
                let why = format!("more than {RETURNED_MAX} files given back in one call");
                Err(FsError::Invalid(why))
            }
            SessionCall::Watch(session, watch) => {
                // By this a majority has said, after the call was sent, that this node leads: whoever leads next
                // gives the lease its time (R55).
                let look =
                    self.voter.read(|_, r| Ok((r.session_exists(session)?, r.has_leases()?)));
                let look: FsResult<(bool, bool)> = look.await.map_err(fs_error)?;
                let (lives, noted) = look?;
                if !lives {
                    return Err(FsError::SessionExpired);
                }
                let desk = self.voter.leases();
                let answer = desk.watch(session, &watch);
                if answer.epoch != 0 && !noted {
                    // Before the client has its lease.
                    self.submit(Command::SetLeases(true)).await?;
                }
                Ok(SessionReply::Watched(desk.hold(session, answer).await))
            }
        }
    }
}

/// The state machine answered with another variant than the command has.
pub(crate) fn unexpected(reply: &CommandReply) -> FsError {
    match reply {
        CommandReply::Refused(why) => FsError::Invalid(why.clone()),
        other => FsError::Io(format!("the state machine answered {other:?}")),
    }
}
