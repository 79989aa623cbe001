//! Which member of which placement group comes, goes, counts or takes over next (PROTOCOL R43, R44, R47, R48). Pure: what is known in, at
//! most one step per group out; each step is a new epoch, and the next look sees what became of it.
//!
//! First what failed: a primary that is cut off has a successor among the in-sync members in contact, a member that is cut off or
//! out of its primary's reach goes. Nothing goes while the primary isn't in contact: the member may be the last. Then what is wanted:
//! the best nodes for the group are its members, the best of them is the primary. A group is copied to who is missing before anybody
//! leaves, so that a planned change never has fewer copies than before; nothing has to be flushed for it.
//!
//! Groups with one wanted and one actual member aren't touched: they change hands by `mover` and `stand_in`.

use ebb_dataplane_protocol::replica::{Wish, Wishes};
use ebb_dataplane_protocol::{
    ClusterMap, MapVersion, NodeId, NodeInfo, NodeState, PgEntry, PgId, ShardRef,
};
use ebb_metaplane_protocol::placement::members_of;
use std::collections::{BTreeMap, BTreeSet};

/// Members being copied to at once, in the cluster.
pub(crate) const COPIES_MAX: usize = 16;
/// Groups whose primary hands over at once.
pub(crate) const HAND_OVERS_MAX: usize = 4;

/// What is known.
#[derive(Debug)]
pub(crate) struct Known<'a> {
    pub(crate) map: &'a ClusterMap,
    /// Members wanted.
    pub(crate) replicas: u8,
    /// Heard of within a lease.
    pub(crate) alive: &'a BTreeSet<NodeId>,
    /// Their leases are over (R23).
    pub(crate) cut_off: &'a BTreeSet<NodeId>,
    /// What primaries ask for.
    pub(crate) wishes: &'a [(NodeId, Wishes)],
    /// Groups that somebody moves: only what failed is seen to.
    pub(crate) busy: &'a BTreeSet<PgId>,
    /// Cores whose groups' members have everything, as of these maps: the others' freezes would wait for copies, and
    /// writers for the freezes.
    pub(crate) whole: &'a BTreeMap<ShardRef, MapVersion>,
    /// Groups that are handing over.
    pub(crate) handing: usize,
    /// Nothing but what failed is seen to.
    pub(crate) still: bool,
}

/// What to do with a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Its primary is cut off.
    TakeOver(ShardRef),
    /// Its primary freezes, and stays.
    HandOver(ShardRef),
    /// Begins to be copied to.
    Add(ShardRef),
    /// Has everything.
    InSync(ShardRef),
    /// Can't be reached.
    Lost(ShardRef),
    /// Is not wanted any more.
    Surplus(ShardRef),
}

/// The next steps: what failed first, then who is missing where most are missing, then the rest.
pub(crate) fn plan(known: &Known<'_>) -> Vec<(PgId, Step)> {
    let mut steps = Vec::new();
    let mut missing = Vec::new();
    let mut handing = known.handing;
    let eligible: Vec<&NodeInfo> = known
        .map
        .nodes
        .iter()
        .filter(|n| n.state == NodeState::Active && !known.cut_off.contains(&n.id))
        .collect();
    for (i, entry) in known.map.pgs.iter().enumerate() {
        let pg = PgId(i as u16);
        let Some(primary) = entry.primary() else { continue };
        if known.replicas <= 1 && !entry.has_others() {
            continue;
        }
        if let Some(step) = known.failed(pg, entry, primary) {
            steps.push((pg, step));
            continue;
        }
        let settled = !known.still && !known.busy.contains(&pg);
        if !settled || !known.alive.contains(&primary.node) {
            continue;
        }
        match known.wanted(pg, entry, primary, &eligible) {
            Some(Step::Add(who)) => missing.push((entry.members.len(), pg, who)),
            Some(Step::HandOver(to)) if handing < HAND_OVERS_MAX => {
                handing += 1;
                steps.push((pg, Step::HandOver(to)));
            }
            Some(Step::HandOver(_)) | None => {}
            Some(step) => steps.push((pg, step)),
        }
    }
    missing.sort_unstable();
    let copies: usize = known.map.pgs.iter().map(|e| e.syncing.len()).sum();
    let room = COPIES_MAX.saturating_sub(copies);
    steps.extend(missing.into_iter().take(room).map(|(_, pg, who)| (pg, Step::Add(who))));
    steps
}

impl Known<'_> {
    fn in_contact(&self, node: NodeId) -> bool {
        self.alive.contains(&node) && !self.cut_off.contains(&node)
    }

    /// What doesn't wait, and what the primary asks for.
    fn failed(&self, pg: PgId, entry: &PgEntry, primary: ShardRef) -> Option<Step> {
        if self.cut_off.contains(&primary.node) {
            // R44: the first in the order that is there. None: the group waits, or gets a stand-in.
            let heir = entry.members[1..].iter().find(|m| self.in_contact(m.node))?;
            return Some(Step::TakeOver(*heir));
        }
        if !self.in_contact(primary.node) {
            return None;
        }
        let gone = |m: &ShardRef| self.map.address(*m).is_none() || self.cut_off.contains(&m.node);
        if let Some(lost) = entry.members[1..].iter().chain(&entry.syncing).find(|m| gone(m)) {
            return Some(Step::Lost(*lost));
        }
        let (_, wishes) = self.wishes.iter().find(|(node, _)| *node == primary.node)?;
        let about = |w: &&Wish| w.pg == pg && w.epoch == entry.epoch && w.member != primary;
        let holds = |w: &&Wish| entry.holders().any(|m| m == w.member);
        if let Some(w) = wishes.unreachable.iter().find(|w| about(w) && holds(w)) {
            return Some(Step::Lost(w.member));
        }
        let synced = |w: &&Wish| about(w) && entry.syncing.contains(&w.member);
        wishes.in_sync.iter().find(synced).map(|w| Step::InSync(w.member))
    }

    /// What brings the group nearer to the members that it is to have.
    fn wanted(
        &self,
        pg: PgId,
        entry: &PgEntry,
        primary: ShardRef,
        eligible: &[&NodeInfo],
    ) -> Option<Step> {
        let want = match self.replicas {
            0 | 1 => vec![primary],
            n => members_of(pg, eligible, usize::from(n)),
        };
        let first = *want.first()?;
        if let Some(late) = entry.syncing.iter().find(|m| !want.contains(m)) {
            return Some(Step::Surplus(*late));
        }
        if !entry.syncing.is_empty() {
            return None;
        }
        if let Some(new) = want.iter().find(|m| !entry.members.contains(m)) {
            // Another core of a node that is a member already: that one leaves first, if it can be spared.
            if let Some(other) = entry.members[1..].iter().find(|m| m.node == new.node) {
                return Some(Step::Surplus(*other));
            }
            let free = new.node != primary.node && self.in_contact(new.node);
            return free.then_some(Step::Add(*new));
        }
        if first != primary {
            let whole = self.whole.get(&primary).is_some_and(|v| *v >= entry.since_map_version);
            return (whole && self.in_contact(first.node)).then_some(Step::HandOver(first));
        }
        let surplus = entry.members[1..].iter().rev().find(|m| !want.contains(m));
        let needed = usize::from(entry.min_in_sync.max(1));
        surplus.filter(|_| entry.members.len() > needed).map(|m| Step::Surplus(*m))
    }
}

#[cfg(test)]
#[path = "members_tests.rs"]
mod tests;
