//! What goes wrong in the replication simulator, and the metadata plane that answers to it: leases, take-overs,
//! members that are dropped, added and made in-sync.

use super::*;
use ebb_dataplane_protocol::control::Control;

/// A step of a hand-over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stage {
    Freeze,
    Yield,
    Thaw,
}

/// A primary that gives its place away.
#[derive(Clone, Debug)]
pub struct HandOver {
    epoch: PgEpoch,
    stage: Stage,
    asked: bool,
}

impl World {
    // --- trouble -------------------------------------------------------------------------------------

    pub(super) fn trouble(&mut self) {
        let n = self.rng.random_range(1..=NODES);
        match self.rng.random_range(0..14) {
            10 | 11 => {
                let pairs: Vec<(u32, u32)> = self.links.keys().copied().collect();
                if !pairs.is_empty() {
                    self.tally.link_drops += 1;
                    let pair = pairs[self.rng.random_range(0..pairs.len())];
                    self.trace(|| format!("link {pair:?} breaks"));
                    self.break_link(pair);
                }
            }
            12 => self.planned_drop(),
            0..4 => {
                let down = self.rng.random_range(0..1500);
                self.crash(n, down);
            }
            4..6 => {
                let m = self.rng.random_range(1..=NODES);
                if m != n {
                    self.tally.partitions += 1;
                    self.cut_links.insert((n, m));
                    self.trace(|| format!("cut {n} - {m}"));
                }
            }
            6..8 => {
                self.cut_links.clear();
                self.nodes.values_mut().for_each(|n| n.cut_off = false);
            }
            8 => {
                self.tally.partitions += 1;
                self.nodes.get_mut(&n).expect("known").cut_off = true;
                self.trace(|| format!("node {n} is cut off"));
            }
            _ => self.lose(n),
        }
    }

    pub(super) fn crash(&mut self, n: u32, down: u64) {
        let Some(node) = self.nodes.get_mut(&n) else { return };
        let Some(core) = node.core.take() else { return };
        self.tally.crashes += 1;
        node.back_at = self.now + down;
        for command in std::mem::take(&mut node.in_flight) {
            match command {
                Command::Write { offset, buf, range, .. } => {
                    self.tally.torn += 1;
                    node.device.tear(offset, &buf[range], &mut self.rng);
                }
                Command::WriteMeta { offset, bytes, .. } => {
                    self.tally.torn += 1;
                    node.device.tear(offset, &bytes, &mut self.rng);
                }
                _ => {}
            }
        }
        node.device.crash(&mut self.rng);
        drop(core);
        self.trace(|| format!("CRASH of node {n} for {down}"));
        let pairs: Vec<(u32, u32)> =
            self.links.keys().filter(|p| p.0 == n || p.1 == n).copied().collect();
        self.late.retain(|pair, _| pair.1 != n);
        for pair in pairs {
            if pair.0 == n {
                if let Some(link) = self.links.remove(&pair) {
                    self.late.insert(pair, (link.id, link.calls));
                }
            } else {
                self.break_link(pair);
            }
        }
        let lost: Vec<u64> =
            self.asked.iter().filter(|(_, (at, _))| *at == n).map(|(id, _)| *id).collect();
        for id in lost {
            if let Some((_, asked)) = self.asked.remove(&id) {
                self.lost(asked);
            }
        }
    }

    /// A node goes for ever, with its device, if every group keeps an in-sync member without it.
    pub(super) fn lose(&mut self, n: u32) {
        let gone = shard(n);
        let others = |m: &ShardRef| *m != gone && self.nodes[&m.node.0].back_at != u64::MAX;
        if !self.map.pgs.iter().all(|pg| pg.members.iter().any(others)) {
            return;
        }
        self.tally.losses += 1;
        let down = self.rng.random_range(500..2500);
        self.crash(n, down);
        self.trace(|| format!("node {n} LOST its device"));
        // Whoever comes in its place has another store, and is a member of nothing before the metadata
        // plane made it one: the lost one is dropped or replaced first.
        let node = self.nodes.get_mut(&n).expect("known");
        node.device = fresh(n, u128::from(n) + u128::from(self.now) * 16);
        node.back_at = u64::MAX;
    }

    // --- the metadata plane --------------------------------------------------------------------------

    pub(super) fn heartbeats(&mut self) {
        (1..=NODES).for_each(|n| self.heartbeat(n));
    }

    /// A node says what it wishes, and gets its lease and the map.
    pub(super) fn heartbeat(&mut self, n: u32) {
        let until = self.now + LEASE_MS;
        let node = self.nodes.get_mut(&n).expect("known");
        let Some(core) = node.core.as_ref().filter(|_| !node.cut_off) else { return };
        let wishes = core.report().wishes;
        (node.refresh, node.lease_until) = (false, until);
        let late = if self.calm { 0 } else { self.rng.random_range(0..300) };
        let due = self.now + late;
        self.wishes.extend(wishes.in_sync.into_iter().map(|w| (due, true, w)));
        self.wishes.extend(wishes.unreachable.into_iter().map(|w| (due, false, w)));
        let map = Arc::new(self.map.clone());
        self.handle(n, Event::Placement { me: shard(n), map, lease_until_ms: until });
    }

    pub(super) fn in_contact(&self, m: &ShardRef) -> bool {
        let node = &self.nodes[&m.node.0];
        node.core.is_some() && !node.cut_off
    }

    /// The last in-sync member in contact is never dropped (R43).
    pub(super) fn may_leave(&self, at: usize, gone: ShardRef) -> bool {
        let e = &self.map.pgs[at];
        !e.members.contains(&gone) || e.members.iter().any(|m| *m != gone && self.in_contact(m))
    }

    /// A member leaves by plan.
    pub(super) fn planned_drop(&mut self) {
        let at = self.rng.random_range(0..usize::from(PGS));
        let e = &self.map.pgs[at];
        let others: Vec<ShardRef> = e.members.iter().skip(1).chain(&e.syncing).copied().collect();
        if !others.is_empty() {
            let gone = others[self.rng.random_range(0..others.len())];
            if !self.may_leave(at, gone) {
                return;
            }
            self.tally.planned_drops += 1;
            self.change(at, |e| {
                e.members.retain(|m| *m != gone);
                e.syncing.retain(|m| *m != gone);
            });
        }
    }

    pub(super) fn change(&mut self, pg: usize, f: impl FnOnce(&mut PgEntry)) {
        self.map.version = MapVersion(self.map.version.0 + 1);
        let entry = &mut self.map.pgs[pg];
        entry.epoch = PgEpoch(entry.epoch.0 + 1);
        f(entry);
        let entry = entry.clone();
        self.trace(|| format!("map {}: group {pg} {entry:?}", self.map.version));
    }

    /// What a leader does for its groups: wishes, fail-over, new members.
    pub(super) fn meta_step(&mut self) {
        let now = self.now;
        let (due, later) = std::mem::take(&mut self.wishes).into_iter().partition(|w| w.0 <= now);
        self.wishes = later;
        let due: Vec<(u64, bool, Wish)> = due;
        for (_, in_sync, Wish { pg, epoch, member }) in due {
            let at = usize::from(pg.0);
            let entry = &self.map.pgs[at];
            if entry.epoch != epoch {
                self.tally.void_wishes += 1;
            } else if in_sync && entry.syncing.contains(&member) {
                self.tally.joins += 1;
                self.change(at, |e| {
                    e.syncing.retain(|m| *m != member);
                    e.members.push(member);
                });
            } else if !in_sync && entry.primary() != Some(member) && self.may_leave(at, member) {
                self.tally.drops += 1;
                self.change(at, |e| {
                    e.members.retain(|m| *m != member);
                    e.syncing.retain(|m| *m != member);
                });
            }
        }
        for at in 0..usize::from(PGS) {
            let entry = self.map.pgs[at].clone();
            let Some(primary) = entry.primary() else { continue };
            let lapsed = self.nodes[&primary.node.0].lease_until + DRIFT_MS < self.now;
            if lapsed && entry.members.len() > 1 {
                self.take_over(at);
            } else if entry.members.len() + entry.syncing.len() < 2 || self.rng.random_bool(0.02) {
                let free = (1..=NODES).map(shard).find(|s| {
                    let up = self.nodes[&s.node.0].core.is_some();
                    up && !entry.members.contains(s) && !entry.syncing.contains(s)
                });
                if let Some(s) = free {
                    self.tally.adds += 1;
                    self.change(at, |e| e.syncing.push(s));
                }
            }
        }
        // A lost node comes back empty once nothing counts on it any more.
        let waiting: Vec<u32> = self
            .nodes
            .iter()
            .filter(|(_, n)| n.core.is_none() && n.back_at == u64::MAX)
            .map(|n| *n.0)
            .collect();
        for n in waiting {
            let counts =
                |e: &PgEntry| e.members.contains(&shard(n)) || e.syncing.contains(&shard(n));
            if !self.map.pgs.iter().any(counts) {
                self.nodes.get_mut(&n).expect("known").back_at = self.now;
            } else {
                // The leader drops a node whose store is gone from where it is no primary.
                for at in 0..usize::from(PGS) {
                    let e = &self.map.pgs[at];
                    if e.primary() != Some(shard(n)) && counts(e) && self.may_leave(at, shard(n)) {
                        self.change(at, |e| {
                            e.members.retain(|m| *m != shard(n));
                            e.syncing.retain(|m| *m != shard(n));
                        });
                    }
                }
            }
        }
    }

    // --- hand-overs ------------------------------------------------------------------------------------

    pub(super) fn hand_over_step(&mut self) {
        let at = self.rng.random_range(0..usize::from(PGS));
        match self.hand_overs.get_mut(&at) {
            None if self.rng.random_bool(0.2) => self.begin_hand_over(at),
            None => {}
            // The leader's patience ends.
            Some(h) if h.asked && self.rng.random_bool(0.02) => {
                (h.stage, h.asked) = (Stage::Thaw, false);
            }
            Some(_) => self.drive_hand_over(at),
        }
    }

    pub(super) fn begin_hand_over(&mut self, at: usize) {
        let e = &self.map.pgs[at];
        if e.members.len() > 1 && e.members.iter().all(|m| self.in_contact(m)) {
            let epoch = e.epoch;
            self.hand_overs.insert(at, HandOver { epoch, stage: Stage::Freeze, asked: false });
            self.set_moving(at, true);
        }
    }

    fn set_moving(&mut self, at: usize, moving: bool) {
        self.map.version = MapVersion(self.map.version.0 + 1);
        self.map.pgs[at].moving = moving;
    }

    pub(super) fn drive_hand_over(&mut self, at: usize) {
        let Some(h) = self.hand_overs.get(&at).filter(|h| !h.asked).cloned() else { return };
        let (pg, e) = (PgId(at as u16), &self.map.pgs[at]);
        let Some(primary) = e.primary().filter(|_| e.epoch == h.epoch) else {
            // Another epoch: its primary thaws by itself.
            self.hand_overs.remove(&at);
            return self.set_moving(at, false);
        };
        let control = match h.stage {
            Stage::Freeze => Control::Freeze(pg, h.epoch),
            Stage::Yield => Control::Yield(pg, h.epoch),
            Stage::Thaw => Control::Thaw(pg, h.epoch),
        };
        self.hand_overs.get_mut(&at).expect("known").asked = true;
        self.meta_ask(primary.node.0, &control, Asked::Hand(at, h.epoch, h.stage));
    }

    /// A primary answered, or never will.
    pub(super) fn handed(&mut self, at: usize, epoch: PgEpoch, stage: Stage, done: bool) {
        let same = |h: &&mut HandOver| h.epoch == epoch && h.stage == stage && h.asked;
        let Some(h) = self.hand_overs.get_mut(&at).filter(same) else { return };
        h.asked = false;
        if self.map.pgs[at].epoch != epoch {
            return;
        }
        let next = match (stage, done) {
            (Stage::Freeze, true) if self.calm || self.rng.random_bool(0.7) => Stage::Yield,
            (Stage::Yield, true) => {
                let heir = self.map.pgs[at].members[1..].iter().position(|m| self.in_contact(m));
                if let Some(next) = heir {
                    self.hand_overs.remove(&at);
                    self.tally.hand_overs += 1;
                    let version = MapVersion(self.map.version.0 + 1);
                    return self.change(at, |e| {
                        let new = e.members.remove(next + 1);
                        e.members.insert(0, new);
                        (e.since_map_version, e.moving) = (version, false);
                    });
                }
                Stage::Thaw
            }
            (Stage::Thaw, true) => {
                self.tally.thaws += 1;
                self.hand_overs.remove(&at);
                return self.set_moving(at, false);
            }
            _ => Stage::Thaw,
        };
        self.hand_overs.get_mut(&at).expect("known").stage = next;
    }

    /// Another in-sync member in contact becomes the primary (R44).
    pub(super) fn take_over(&mut self, at: usize) {
        let e = &self.map.pgs[at];
        let alive: Vec<usize> =
            (1..e.members.len()).filter(|i| self.in_contact(&e.members[*i])).collect();
        if alive.is_empty() {
            return;
        }
        self.tally.takeovers += 1;
        let next = alive[self.rng.random_range(0..alive.len())];
        let stays =
            self.nodes[&e.members[0].node.0].back_at != u64::MAX && self.rng.random_bool(0.3);
        self.tally.demoted_in_sync += u64::from(stays);
        let version = MapVersion(self.map.version.0 + 1);
        self.change(at, |e| {
            let new = e.members.remove(next);
            let old = std::mem::replace(&mut e.members[0], new);
            if stays {
                e.members.push(old);
            }
            e.since_map_version = version;
        });
    }
}
