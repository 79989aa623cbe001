//! Who votes: founding a group, who is in it and how far, adding and removing voters, handing the lead over.
//!
//! The membership is in the log. A group is founded by the lowest of its founders, once it has reached
//! all others and none of them has ever voted: so nobody is part of it unnoticed, and a founder whose
//! directory was emptied finds that out instead of founding a second group.

use crate::config::MetaConfig;
use crate::error::MetaError;
use crate::raft::VoterNode;
use crate::raft::wire::Greeting;
use crate::voter::Voter;
use ebb_metaplane_protocol::admin::{VoterRole, VoterStatus};
use ebb_metaplane_protocol::{FsError, FsResult};
use futures::future::join_all;
use openraft::Instant as _;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ClientWriteError, InitializeError, RaftError};
use openraft::{ChangeMembers, ReadPolicy};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

/// Pause between two looks at who is there.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Waiting for others is mentioned in the log this often.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// A voter that was not heard for so long is not given the lead.
const HEARD_MAX: Duration = Duration::from_millis(500);
/// A lead that is handed over is taken by then, or not at all.
const HAND_OVER_MAX: Duration = Duration::from_millis(1_500);
/// A leader that no majority acknowledged for so long does not lead any more, as far as its clients are
/// concerned; longer than an election takes.
const QUORUM_AGE_MAX: Duration = Duration::from_millis(1_500);
/// A new voter catches up by then, or it isn't made one in this call.
const CATCH_UP_MAX: Duration = Duration::from_secs(15);
/// A voter that lives answers a heartbeat within this.
const ANSWER_MAX: Duration = Duration::from_millis(1_500);
/// A change of the membership takes a few round trips.
const CHANGE_MAX: Duration = Duration::from_secs(10);
/// Voters at most.
const VOTERS_MAX: usize = 7;

fn raft_error(e: impl std::fmt::Display) -> MetaError {
    MetaError::Raft(e.to_string())
}

impl Voter {
    /// Whether it has a log or has voted.
    async fn is_initialized(&self) -> Result<bool, MetaError> {
        self.raft.is_initialized().await.map_err(raft_error)
    }

    /// Founds the group if it is this voter's to found, else returns when others have founded it. A voter
    /// that joins later returns at once. Fails if the voter took part with a directory that is gone.
    /// `true`: the group is new.
    pub(crate) async fn found(&self, config: &MetaConfig) -> Result<bool, MetaError> {
        if self.is_initialized().await? {
            return Ok(false);
        }
        let mut founders = BTreeMap::new();
        for (id, addr) in &config.members {
            let id: u64 = id.parse().map_err(|_| MetaError::Config(format!("members: '{id}'")))?;
            founders.insert(id, VoterNode { addr: addr.clone(), store: String::new() });
        }
        let (id, addr) = (self.own.id, self.address.clone());
        let own = founders.entry(id).or_insert(VoterNode { addr, store: String::new() });
        own.store = self.own.store.clone();
        let founds = !config.join && founders.keys().next() == Some(&self.own.id);
        let mut said = Instant::now();
        loop {
            let others: Vec<u64> = founders.keys().copied().filter(|i| *i != self.own.id).collect();
            let greetings =
                join_all(others.iter().map(|id| self.network.greet(&founders[id].addr))).await;
            let mut missing = Vec::new();
            for (id, greeting) in others.iter().zip(greetings) {
                match greeting {
                    Ok(there) => {
                        self.check(config, *id, &there, founds)?;
                        if let Some(node) = founders.get_mut(id) {
                            node.store = there.store;
                        }
                    }
                    Err(why) => missing.push(format!("{id}: {why}")),
                }
            }
            if config.join || self.is_initialized().await? {
                return Ok(!config.join);
            }
            if founds && missing.is_empty() {
                return match self.raft.initialize(founders).await {
                    Ok(()) => {
                        self.log.flush().await.map_err(raft_error)?;
                        self.take_part().await?;
                        Ok(true)
                    }
                    Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(true),
                    Err(e) => Err(raft_error(e)),
                };
            }
            if said.elapsed() >= SAY_EVERY {
                said = Instant::now();
                tracing::warn!(
                    missing = missing.join("; "),
                    "waiting for the founders of the group"
                );
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Who answers at a founder's address is that founder, and knows this voter by no other directory.
    fn check(
        &self,
        config: &MetaConfig,
        id: u64,
        there: &Greeting,
        founds: bool,
    ) -> Result<(), MetaError> {
        if there.id != id {
            return Err(MetaError::Config(format!(
                "members: voter {} answers at the address of voter {id}",
                there.id
            )));
        }
        let another = there.yours.as_ref().is_some_and(|store| *store != self.own.store);
        // Nobody but the one that founds can have begun a group.
        if another || founds && there.initialized {
            return Err(MetaError::LostDirectory { id: self.own.id, dir: config.dir.clone() });
        }
        Ok(())
    }

    /// Addresses of the voters, as the membership has them, and which one that is.
    pub(crate) fn addresses(&self) -> (u64, Vec<String>) {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let index = metrics.membership_config.log_id().as_ref().map_or(0, |at| at.index);
        let members = metrics.membership_config.membership();
        let address = |id| members.get_node(&id).map(|n| n.addr.clone());
        (index, members.voter_ids().filter_map(address).collect())
    }

    /// A name of the group that another one does not have: the directory of its first voter, as long as the membership is
    /// the one it was founded with.
    pub(crate) fn group(&self) -> String {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let members = metrics.membership_config.membership();
        let first = members.nodes().min_by_key(|(id, _)| **id);
        first.map(|(_, node)| node.store.clone()).unwrap_or_default()
    }

    /// Where in the log the last change of the membership is; 0: there was none but the founding.
    pub(crate) fn membership(&self) -> u64 {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        metrics.membership_config.log_id().as_ref().map_or(0, |at| at.index)
    }

    /// Whether a majority acknowledged this leader lately. `since`: when it began to lead.
    pub(crate) fn is_heard(&self, since: Instant) -> bool {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        if metrics.membership_config.membership().voter_ids().count() <= 1 {
            return true;
        }
        let age = metrics
            .last_quorum_acked
            .map_or(since.elapsed(), |at| at.elapsed().min(since.elapsed()));
        age < QUORUM_AGE_MAX
    }

    /// Gives the lead to the voter that has most of the log, if this one leads and there is one.
    pub(crate) async fn hand_over(&self) {
        let heir = {
            let metrics = self.raft.metrics();
            let m = metrics.borrow_watched();
            if m.state != ServerState::Leader {
                return;
            }
            let lately = |id: &u64| {
                let at = m.heartbeat.as_ref().and_then(|h| h.get(id).copied().flatten());
                at.is_some_and(|at| at.elapsed() < HEARD_MAX)
            };
            let has = |id: &u64| m.replication.as_ref().and_then(|r| r.get(id).copied().flatten());
            let voters = m.membership_config.membership().voter_ids();
            voters.filter(|id| *id != m.id && lately(id)).max_by_key(has)
        };
        let Some(heir) = heir else { return };
        if self.raft.trigger().transfer_leader(heir).await.is_err() {
            return;
        }
        let id = self.own.id;
        let wait = self.raft.wait(Some(HAND_OVER_MAX));
        match wait.metrics(|m| m.current_leader.is_some_and(|l| l != id), "another leader").await {
            Ok(_) => tracing::info!(heir, "handed the lead over"),
            Err(e) => tracing::warn!(heir, error = %e, "the lead was not taken over"),
        }
    }

    /// Who votes, and how far each is. Only the leader knows.
    pub(crate) fn voters(&self) -> Vec<VoterStatus> {
        let metrics = self.raft.metrics();
        let m = metrics.borrow_watched();
        let members = m.membership_config.membership();
        let voters: BTreeSet<u64> = members.voter_ids().collect();
        let last = m.last_log_index.unwrap_or(0);
        members
            .nodes()
            .map(|(id, node)| {
                let own = *id == m.id;
                let has = m.replication.as_ref().and_then(|r| r.get(id).copied().flatten());
                let heard = m.heartbeat.as_ref().and_then(|h| h.get(id).copied().flatten());
                VoterStatus {
                    id: *id,
                    address: node.addr.clone(),
                    role: match (own, voters.contains(id)) {
                        (true, true) => VoterRole::Leader,
                        (false, true) => VoterRole::Follower,
                        (_, false) => VoterRole::Learner,
                    },
                    lag: if own { Some(0) } else { has.map(|h| last.saturating_sub(h.index)) },
                    heard_ms: if own {
                        Some(0)
                    } else {
                        heard.map(|at| at.elapsed().as_millis() as u64)
                    },
                }
            })
            .collect()
    }

    /// The leader's own entry of the membership says where it is now, and with which directory.
    pub(crate) async fn note_own_address(&self) -> Result<(), String> {
        let own = VoterNode { addr: self.address.clone(), store: self.own.store.clone() };
        if self.node_of(self.own.id).is_none_or(|known| known == own) {
            return Ok(());
        }
        let change = ChangeMembers::SetNodes(BTreeMap::from([(self.own.id, own)]));
        self.raft.change_membership(change, true).await.map(drop).map_err(|e| e.to_string())
    }

    /// Makes the server at `address` a voter: it catches up as a learner first. Repeated, it goes on.
    pub(crate) async fn add_voter(&self, id: u64, address: String) -> FsResult<()> {
        let busy = |why: String| FsError::Again { retry_after_ms: 200, why };
        let there = self.network.greet(&address).await.map_err(busy)?;
        if there.id != id {
            return Err(FsError::Invalid(format!(
                "voter {} answers at {address}, not {id}",
                there.id
            )));
        }
        self.lead_confirmed().await?;
        let node = VoterNode { addr: address, store: there.store };
        match self.node_of(id) {
            Some(known) if known != node => {
                return Err(FsError::Invalid(format!(
                    "there is a voter {id} already, at {} with another directory: take another number",
                    known.addr
                )));
            }
            Some(_) => {}
            None => {
                if self.addresses().1.len() >= VOTERS_MAX {
                    return Err(FsError::Invalid(format!("there are {VOTERS_MAX} voters already")));
                }
                self.change(ChangeMembers::AddNodes(BTreeMap::from([(id, node)])), true).await?;
            }
        }
        let begun = Instant::now();
        loop {
            let Some(voter) = self.voters().into_iter().find(|v| v.id == id) else {
                return Err(FsError::NotLeader(None));
            };
            if voter.role != VoterRole::Learner {
                return Ok(());
            }
            if voter.lag.is_some_and(|lag| lag < 100) {
                break;
            }
            if begun.elapsed() > CATCH_UP_MAX {
                let lag = voter.lag.map_or("all".to_owned(), |l| l.to_string());
                return Err(busy(format!("voter {id} still lacks {lag} entries")));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let change = ChangeMembers::AddVoterIds(BTreeSet::from([id]));
        self.change(change, true).await
    }

    /// Takes a voter out of the group. Refused unless a majority of those that remain answers now: with fewer
    /// the group would stand still, and could not take its decision back either.
    pub(crate) async fn remove_voter(&self, id: u64) -> FsResult<()> {
        self.lead_confirmed().await?;
        let begun = Instant::now();
        let voter = loop {
            let all = self.voters();
            let Some(voter) = all.iter().find(|v| v.id == id) else { return Ok(()) };
            let waited = begun.elapsed();
            let answered = |v: &&VoterStatus| {
                v.role == VoterRole::Leader
                    || v.heard_ms.is_some_and(|ms| u128::from(ms) < waited.as_millis())
            };
            let remain: Vec<&VoterStatus> =
                all.iter().filter(|v| v.id != id && v.role != VoterRole::Learner).collect();
            let answer = remain.iter().copied().filter(answered).count();
            if answer * 2 > remain.len() {
                break voter.clone();
            }
            if waited > ANSWER_MAX {
                return Err(FsError::Invalid(format!(
                    "without voter {id} there are {} voters, of which {answer} answer: no majority",
                    remain.len()
                )));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        };
        let ids = BTreeSet::from([id]);
        if voter.role == VoterRole::Leader {
            self.hand_over().await;
            return Err(FsError::NotLeader(None));
        }
        let change = match voter.role {
            VoterRole::Learner => ChangeMembers::RemoveNodes(ids),
            _ => ChangeMembers::RemoveVoters(ids),
        };
        self.change(change, false).await
    }

    /// Changes the membership in the log: through a joint one if voters come or go.
    async fn change(&self, change: ChangeMembers<u64, VoterNode>, retain: bool) -> FsResult<()> {
        let changed = tokio::time::timeout(CHANGE_MAX, self.raft.change_membership(change, retain));
        match changed.await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(RaftError::APIError(
                ClientWriteError::ForwardToLeader(_) | ClientWriteError::LogEntryDiscarded(_),
            ))) => Err(FsError::NotLeader(None)),
            Ok(Err(e)) => Err(FsError::Again { retry_after_ms: 200, why: e.to_string() }),
            Err(_) => Err(FsError::Again {
                retry_after_ms: 200,
                why: "the change of voters waits for a majority of them".into(),
            }),
        }
    }

    /// Decisions about voters are made from what the leader knows, so it must be the leader.
    async fn lead_confirmed(&self) -> FsResult<()> {
        let confirmed = self.raft.ensure_linearizable(ReadPolicy::ReadIndex).await;
        confirmed.map(drop).map_err(|_| FsError::NotLeader(None))
    }
}
