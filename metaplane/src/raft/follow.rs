//! Read indexes of a voter that follows (docs/PROTOCOL.md, R60): asked of the leader, one question for all reads
//! that came before it (Ongaro, "Consensus: Bridging Theory and Practice", 6.4).

use super::VoterNode;
use super::dial::Line;
use super::network::Network;
use super::wire::{self, Message};
use bytes::Bytes;
use ebb_dataplane_protocol::{Header, Opcode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;

/// Limit to connect to the leader and greet, and to be answered: who asked may as well ask the leader itself.
const ASK_TIMEOUT: Duration = Duration::from_millis(500);

/// Asks for read indexes.
#[derive(Default)]
pub struct FollowIndex {
    /// Counts rounds begun.
    begun: AtomicU64,
    round: Mutex<Round>,
}

#[derive(Default)]
struct Round {
    /// The last that is over, and what came of it.
    completed: u64,
    index: Option<u64>,
    /// To whom it asks: the leader's id.
    line: Option<(u64, Arc<dyn Line>)>,
}

impl FollowIndex {
    /// An index of the log such that a state which has applied it shows everything that was answered before the call.
    /// `None`: the leader does not say.
    pub async fn ask(&self, network: &Network, leader: u64, node: &VoterNode) -> Option<u64> {
        let seen = self.begun.load(Ordering::SeqCst);
        let mut round = self.round.lock().await;
        if round.completed > seen {
            // It began after the call.
            return round.index;
        }
        let mine = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let asked = round.ask(network, leader, node).await;
        if let Err(why) = &asked {
            tracing::debug!(leader, why, "no read index");
            round.line = None;
        }
        (round.completed, round.index) = (mine, asked.ok());
        round.index
    }
}

impl Round {
    async fn ask(
        &mut self,
        network: &Network,
        leader: u64,
        node: &VoterNode,
    ) -> Result<u64, String> {
        let line = match self.line.take() {
            Some((id, line)) if id == leader && !line.is_closed() => line,
            _ => network.line(leader, node, ASK_TIMEOUT).await?,
        };
        let body = Bytes::from(wire::encode(&Message::ReadIndex, &[]));
        let header = Header::request(Opcode::Raft, 0);
        let reply = line.call(header, body, Bytes::new(), ASK_TIMEOUT).await;
        let reply = reply.map_err(|e| e.to_string())?;
        self.line = Some((leader, line));
        serde_json::from_slice(&reply.body).map_err(|e| e.to_string())
    }
}
