//! Replication of placement groups (PROTOCOL R41–R48): primary-backup, one stream per member.
//!
//! [`lead`] is the primary's side: every mutation that it appends of a group with other members goes to
//! them in the same order, and is answered only when all that count have it. [`copy`] brings a member
//! that has missed something up to date, in the same stream. [`follow`] is the member's side, and [`full`] both
//! sides of a member without space.
//!
//! Who is a member, and which of them count, is in the map; this core asks for changes (its report) and
//! makes none.

pub(crate) mod copy;
pub(crate) mod follow;
mod full;
pub(crate) mod lead;
mod ops;

use super::Owed;
use ebb_dataplane_protocol::{PgId, ShardRef};
use std::collections::{HashMap, VecDeque};

/// Both sides' state.
pub(crate) struct Replication<B> {
    pub(crate) leads: HashMap<PgId, lead::Lead<B>>,
    pub(crate) follows: HashMap<PgId, follow::Follow<B>>,
    /// Requests that speak of a map which isn't here yet, and what came after them.
    pub(crate) early: VecDeque<follow::Early<B>>,
    /// Writes whose stream ended while their data was on its way to the device.
    pub(crate) orphans: Vec<follow::Item<B>>,
    /// Copies under way.
    pub(crate) copies: Vec<copy::Copying<B>>,
    /// Requests of streams to other cores without an answer.
    pub(crate) in_flight: HashMap<ShardRef, usize>,
    /// Cores that are not reached.
    pub(crate) silent: HashMap<ShardRef, lead::Silent>,
    /// The newest record of each group that was appended in a role this core no longer has.
    pub(crate) last: HashMap<PgId, ebb_store::Ticket>,
    /// Tickets of mutations that other members have to have as well: group, time of leading it, number.
    pub(crate) shipped: HashMap<ebb_store::Ticket, (PgId, u64, u64)>,
}

impl<B> Default for Replication<B> {
    fn default() -> Self {
        Self {
            leads: HashMap::new(),
            follows: HashMap::new(),
            early: VecDeque::new(),
            orphans: Vec::new(),
            copies: Vec::new(),
            in_flight: HashMap::new(),
            silent: HashMap::new(),
            last: HashMap::new(),
            shipped: HashMap::new(),
        }
    }
}

impl<B> Replication<B> {
    /// Whether something is to be done that no completion announces.
    pub(crate) fn has_work(&self) -> bool {
        let broken = |l: &lead::Lead<B>| l.members.values().any(|m| m.stream.is_none());
        !self.copies.is_empty()
            || !self.early.is_empty()
            || self.follows.values().any(follow::Follow::waits)
            || self.leads.values().any(broken)
    }
}

/// What waits for a mutation of another core to be durable here.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) owed: Owed,
}
