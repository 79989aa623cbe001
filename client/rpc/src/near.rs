//! Questions to a voter that follows, so that the leader need not answer everything (docs/PROTOCOL.md, R60).
//!
//! One such voter per client, another one when it does not answer. Whatever it does not answer the leader is asked.

use crate::connection::Connection;
use crate::error::RpcError;
use crate::handshake::Identity;
use ebb_dataplane_protocol::Status;
use ebb_metaplane_protocol::{Request, Response};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Limit to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Limit to be answered. The voter itself asks the leader, and waits until it has applied what that has.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(1500);
/// After a voter has not answered the leader is asked for so long.
const REST: Duration = Duration::from_secs(1);

/// The voter that is asked first.
#[derive(Default)]
pub(crate) struct Near {
    line: Mutex<Line>,
    /// Held by who connects.
    connecting: tokio::sync::Mutex<()>,
    answered: AtomicU64,
}

#[derive(Default)]
struct Line {
    connection: Option<Connection>,
    /// Which voter it is.
    turn: usize,
    rest_until: Option<Instant>,
}

impl Near {
    /// `turn`: where to begin, so that not all clients begin with the same voter.
    pub(crate) fn new(turn: usize) -> Self {
        let line = Line { turn, ..Line::default() };
        Self { line: Mutex::new(line), ..Self::default() }
    }

    /// Questions that a voter which follows has answered.
    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// The answer of one of `voters`, if there is any.
    pub(crate) async fn ask(
        &self,
        voters: &[String],
        identity: &Identity,
        request: &Request,
    ) -> Option<Response> {
        let connection = self.connection(voters, identity).await?;
        match connection.meta_near(request, ANSWER_TIMEOUT).await {
            Ok((response, by_follower)) => {
                self.answered.fetch_add(u64::from(by_follower), Ordering::Relaxed);
                Some(response)
            }
            // A question that only the leader can answer.
            Err(RpcError::Status { status: Status::NotLeader, .. }) => None,
            Err(error) => {
                tracing::debug!(address = connection.address(), %error, "no answer of a voter");
                self.leave(&connection);
                None
            }
        }
    }

    fn line(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever connects holds up nobody: the others ask the leader meanwhile.
    async fn connection(&self, voters: &[String], identity: &Identity) -> Option<Connection> {
        let is_good = |c: &Connection| !c.is_closed() && voters.iter().any(|v| v == c.address());
        if let Some(connection) = self.line().connection.as_ref().filter(|c| is_good(c)) {
            return Some(connection.clone());
        }
        let _one = self.connecting.try_lock().ok()?;
        let address = {
            let mut line = self.line();
            line.connection = None;
            let rests = line.rest_until.is_some_and(|until| Instant::now() < until);
            if voters.is_empty() || rests {
                return None;
            }
            &voters[line.turn % voters.len()]
        };
        match Connection::connect(address, identity, CONNECT_TIMEOUT).await {
            Ok(connection) => {
                self.line().connection = Some(connection.clone());
                Some(connection)
            }
            Err(error) => {
                tracing::debug!(address, %error, "no way to a voter");
                self.line().rest();
                None
            }
        }
    }

    fn leave(&self, from: &Connection) {
        let mut line = self.line();
        if line.connection.as_ref().is_some_and(|c| c.is_same(from)) {
            line.rest();
        }
    }
}

impl Line {
    fn rest(&mut self) {
        self.connection = None;
        self.turn = self.turn.wrapping_add(1);
        self.rest_until = Some(Instant::now() + REST);
    }
}
