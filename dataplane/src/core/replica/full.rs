//! A member without space for what its primary sent (PROTOCOL R56).
//!
//! The member keeps what finds no space for a moment (an eviction or a flush may be about to make some), then says
//! `NoSpace`, and this stream ends there; other groups' streams on the same connection go on.
//!
//! From then until a stream of that member is whole again, the primary takes no new writes in the group: they hear
//! `NoSpace`, as from a full device of its own (I9). If it lasts and enough in-sync members remain without that one, it
//! is asked to be dropped, like one that can't be reached (R43). If not enough would remain it stays, and what was
//! journaled here and waits for it is refused each time it says no again, so that nobody waits for ever.
//!
//! Limit: a group whose member may not be dropped has to wait for space that comes from elsewhere. Its own flushes wait
//! for that member, too.

use super::lead::Member;
use crate::core::placement::Refusal;
use crate::core::write::RETRY_SPACE_MS;
use crate::core::{Buffer, RETRY_BUSY_MS, ShardCore, Waiter};
use ebb_dataplane_protocol::{PgId, ShardRef, Status};

/// How long a member keeps what finds no space: well below the time after which its primary would give up the
/// connection, with all streams on it.
const KEPT_MS: u64 = 1_000;
/// Before a full member that counts is copied to again; and one that doesn't, for which nobody waits.
const AGAIN_MS: u64 = 1_000;
const SYNCING_AGAIN_MS: u64 = 10_000;
/// A member that has been full for so long is asked to be dropped. Less than clients wait for space (30 s), more than
/// a flush takes to make some: a drop costs a copy.
const FULL_MS: u64 = 5_000;

impl<B: Buffer> ShardCore<B> {
    // --- the member's side ------------------------------------------------------------------------

    /// Ends a stream whose oldest mutation has found no space for too long. `true`: it did.
    pub(super) fn refuse_for_space(&mut self, pg: PgId) -> bool {
        let now_ms = self.now_ms;
        let follow = self.replication.follows.get_mut(&pg);
        let Some(item) = follow.and_then(|f| f.take_out_of_space(now_ms, KEPT_MS)) else {
            return false;
        };
        tracing::warn!(%pg, "no space for what the primary of a group sent");
        // Flushing makes room: the metadata plane hears of it with the next heartbeat.
        self.space_refused();
        // Before the refusals of what came after it: the first one says why.
        self.refuse(item, Refusal::of(Status::NoSpace));
        self.end_follow(pg);
        true
    }

    // --- the primary's side -----------------------------------------------------------------------

    /// A member said that it has no space: its stream is over.
    pub(super) fn member_is_full(&mut self, pg: PgId, shard: ShardRef) {
        let now_ms = self.now_ms;
        let lead = self.replication.leads.get_mut(&pg);
        let Some(m) = lead.and_then(|lead| lead.members.get_mut(&shard)) else { return };
        if m.full_since_ms.is_none() {
            tracing::info!(%pg, ?shard, "a member of a group is full");
        }
        m.full_since_ms.get_or_insert(now_ms);
        let again_ms = if m.required { AGAIN_MS } else { SYNCING_AGAIN_MS };
        self.stream_broke(pg, shard, again_ms);
        let Some(lead) = self.replication.leads.get_mut(&pg) else { return };
        let Some(m) = lead.members.get(&shard).filter(|m| m.required) else { return };
        let waits = if self.placement.spares(pg, m.in_sync) {
            // Soon it is dropped, and what waits goes on.
            Vec::new()
        } else {
            lead.ops.take_waiters()
        };
        self.space_refused();
        for waiter in waits {
            self.refuse_for_member(waiter);
        }
    }

    fn refuse_for_member(&mut self, waiter: Waiter) {
        let busy = Refusal::after(Status::Busy, RETRY_BUSY_MS);
        match waiter {
            // It is in the journal, and its sequence in the window: asked again it waits again, and is not done twice.
            Waiter::Write(key) => {
                self.end_write(key, Err(Refusal::after(Status::NoSpace, RETRY_SPACE_MS)));
            }
            Waiter::Control(id) => self.refuse_control(id, busy),
            Waiter::Read(id) => self.refuse_read(id, busy),
            other => self.run_waiter(other),
        }
    }

    /// Whether new writes to a group would wait for a member without space.
    pub(crate) fn has_full_member(&self, pg: PgId) -> bool {
        let lead = self.replication.leads.get(&pg);
        lead.is_some_and(|l| l.members.values().any(|m| m.required && m.full_since_ms.is_some()))
    }

    /// Whether a full member has to go: others are enough, and have waited long enough.
    pub(super) fn is_full_for_long(&self, pg: PgId, m: &Member<B>) -> bool {
        let long = |since_ms: u64| self.now_ms >= since_ms.saturating_add(FULL_MS);
        m.full_since_ms.is_some_and(long) && self.placement.spares(pg, m.in_sync)
    }
}
