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

/// Trouble that comes soon after other trouble: that is when it finds things half done.
#[derive(Clone, Copy, Debug)]
pub enum Soon {
    Crash(u32),
    /// It is back at once.
    Restart(u32),
    Lose(u32),
    CutOff(u32),
    /// Its links to others end.
    Flap(u32),
    /// A group's member is dropped by plan.
    Drop(usize, u32),
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
        match self.rng.random_range(0..19) {
            10 | 11 => {
                let pairs: Vec<(u32, u32)> = self.links.keys().copied().collect();
                if !pairs.is_empty() {
                    let pair = pairs[self.rng.random_range(0..pairs.len())];
                    self.link_failed(pair);
                }
            }
            12 => self.planned_drop(),
            0..4 => {
                let down = self.time_down();
                self.crash(n, down);
            }
            14 | 15 => {
                let m = self.rng.random_range(1..=NODES);
                if m != n {
                    self.tally.slow_links += 1;
                    self.slow_links.insert((n, m));
                    self.trace(|| format!("slow {n} - {m}"));
                }
            }
            16 | 17 => self.cut_off(n),
            18 => self.fill_device(n),
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
                self.slow_links.clear();
                self.flaky_links.clear();
                self.nodes.values_mut().for_each(|n| n.cut_off = false);
            }
            8 => self.cut_off(n),
            _ => self.lose(n),
        }
    }

    fn time_down(&mut self) -> u64 {
        let most = if self.rng.random_bool(0.4) { 40 } else { 1500 };
        self.rng.random_range(0..most)
    }

    /// Of the metadata plane; its links to others stay.
    fn cut_off(&mut self, n: u32) {
        self.tally.partitions += 1;
        self.nodes.get_mut(&n).expect("known").cut_off = true;
        self.trace(|| format!("node {n} is cut off"));
        if self.rng.random_bool(0.5) {
            self.flaky_links.extend((1..=NODES).flat_map(|m| [(n, m), (m, n)]));
        }
    }

    /// Who has just come back, or become a primary, is in trouble again before others have caught up.
    pub(super) fn relapse(&mut self, n: u32) {
        if !self.calm && self.rng.random_bool(0.4) {
            let next = match self.rng.random_range(0..10) {
                0..4 => Soon::Crash(n),
                4..7 => Soon::Lose(n),
                _ => Soon::CutOff(n),
            };
            let most = if self.rng.random_bool(0.5) { 100 } else { 500 };
            self.after(most, next);
        }
    }

    /// Who loses links often goes altogether.
    pub(super) fn link_failed(&mut self, pair: (u32, u32)) {
        self.tally.link_drops += 1;
        self.trace(|| format!("link {pair:?} breaks"));
        self.break_link(pair);
        if self.rng.random_bool(0.15) {
            let n = if self.rng.random_bool(0.5) { pair.0 } else { pair.1 };
            let next = match self.rng.random_range(0..3) {
                0 => Soon::Crash(n),
                1 => Soon::Lose(n),
                _ => Soon::CutOff(n),
            };
            self.after(200, next);
        }
    }

    fn after(&mut self, most: u64, next: Soon) {
        let due = self.now + self.rng.random_range(0..most);
        self.soon.push((due, next));
    }

    /// Troubles and orders that are due.
    pub(super) fn what_follows(&mut self) {
        let now = self.now;
        let due: Vec<Soon> = self.soon.extract_if(.., |s| s.0 <= now).map(|s| s.1).collect();
        for next in due {
            self.tally.relapses += 1;
            match next {
                Soon::Crash(n) => {
                    let down = self.time_down();
                    self.crash(n, down);
                }
                Soon::Restart(n) => {
                    let down = self.rng.random_range(0..20);
                    self.crash(n, down);
                }
                Soon::Lose(n) => self.lose(n),
                Soon::CutOff(n) => self.cut_off(n),
                Soon::Flap(n) => {
                    let pairs: Vec<_> = self.links.keys().filter(|p| p.0 == n).copied().collect();
                    pairs.into_iter().for_each(|pair| self.break_link(pair));
                }
                Soon::Drop(at, n) => self.drop_member(at, shard(n)),
            }
        }
        let due: Vec<_> = self.discards.extract_if(.., |d| d.0 <= now).collect();
        for (_, n, pg, epoch) in due {
            self.tally.discards += 1;
            self.meta_ask(n, &Control::DiscardPg(pg, epoch), Asked::Discard);
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
        let shared = &self.map.pgs[..usize::from(SHARED)];
        if !shared.iter().all(|pg| pg.members.iter().any(others)) {
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

    /// An order to drop a group comes late: to a member that was out of it once, is in-sync again, and has just
    /// restarted. Then its primary is lost.
    pub fn a_late_order_meets_a_restarted_member(&mut self) {
        let (first, member) = (1, 2);
        for _ in 0..400 {
            self.client_step();
            self.turn();
        }
        self.calm = true;
        self.retry_until_quiet();
        let (pg, epoch) = (PgId(0), self.map.pgs[0].epoch);
        assert_eq!(self.map.pgs[0].members, [shard(first), shard(member)]);
        self.crash(member, 0);
        let node = self.nodes.get_mut(&member).expect("known");
        node.core = Some(open(&mut node.device));
        self.registered(member);
        self.meta_ask(member, &Control::DiscardPg(pg, epoch), Asked::Discard);
        for _ in 0..100 {
            self.end_turn(member);
            self.one_thing();
        }
        self.crash(first, 0);
        self.nodes.get_mut(&first).expect("known").back_at = u64::MAX;
        self.now += LEASE_MS + DRIFT_MS;
        self.heartbeats();
        self.take_over(0);
        self.check_all("after a late order");
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
        let most = if self.rng.random_bool(0.2) { 1500 } else { 300 };
        let late = if self.calm { 0 } else { self.rng.random_range(0..most) };
        if !wishes.in_sync.is_empty() && !self.calm && self.rng.random_bool(0.1) {
            // What it asked for comes true for a process that knows nothing of it.
            self.after(50, Soon::Restart(n));
        }
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
        let at = self.rng.random_range(0..usize::from(SHARED));
        let e = &self.map.pgs[at];
        let others: Vec<ShardRef> = e.members.iter().skip(1).chain(&e.syncing).copied().collect();
        if !others.is_empty() {
            let gone = others[self.rng.random_range(0..others.len())];
            self.drop_member(at, gone);
        }
    }

    fn drop_member(&mut self, at: usize, gone: ShardRef) {
        if self.map.pgs[at].primary() != Some(gone) && self.may_leave(at, gone) {
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
        let before: Vec<ShardRef> = entry.members.iter().chain(&entry.syncing).copied().collect();
        f(entry);
        let entry = entry.clone();
        // Who is out of it drops what it has, once it hears of it.
        for m in before {
            if !entry.members.contains(&m) && !entry.syncing.contains(&m) {
                let due = self.now + self.rng.random_range(0..1500);
                self.discards.push((due, m.node.0, PgId(pg as u16), entry.epoch));
            }
        }
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
                let primary = entry.primary();
                self.change(at, |e| {
                    e.syncing.retain(|m| *m != member);
                    e.members.push(member);
                });
                if let Some(p) = primary.filter(|_| !self.calm) {
                    // The one that has just come has to do.
                    let next = match self.rng.random_range(0..6) {
                        0 => Soon::Crash(p.node.0),
                        1 => Soon::Lose(p.node.0),
                        _ => continue,
                    };
                    self.after(60, next);
                }
            } else if !in_sync && entry.primary() != Some(member) && self.may_leave(at, member) {
                self.tally.drops += 1;
                self.change(at, |e| {
                    e.members.retain(|m| *m != member);
                    e.syncing.retain(|m| *m != member);
                });
            }
        }
        for at in 0..usize::from(SHARED) {
            let entry = self.map.pgs[at].clone();
            let Some(primary) = entry.primary() else { continue };
            let lapsed = self.nodes[&primary.node.0].lease_until + DRIFT_MS < self.now;
            if lapsed && entry.members.len() > 1 {
                self.take_over(at);
            } else if entry.members.len() + entry.syncing.len() < self.copies
                || (!self.steady && self.rng.random_bool(0.02))
            {
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
            if !self.map.pgs[..usize::from(SHARED)].iter().any(counts) {
                self.nodes.get_mut(&n).expect("known").back_at = self.now;
            } else {
                // The leader drops a node whose store is gone from where it is no primary.
                for at in 0..usize::from(SHARED) {
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
        let at = self.rng.random_range(0..usize::from(SHARED));
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
                    if !self.calm && self.rng.random_bool(0.5) {
                        // It was to leave: no member any more before it heard of either.
                        let old = self.map.pgs[at].members[0].node.0;
                        self.after(60, Soon::Drop(at, old));
                    }
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
        let old = e.members[0].node.0;
        if !self.calm && self.nodes[&old].core.is_some() {
            // It leads on, for all that it knows, and begins its streams anew.
            (0..3).for_each(|_| self.after(500, Soon::Flap(old)));
        }
        self.change(at, |e| {
            let new = e.members.remove(next);
            let old = std::mem::replace(&mut e.members[0], new);
            if stays {
                e.members.push(old);
            }
            e.since_map_version = version;
        });
        let new = self.map.pgs[at].members[0].node.0;
        self.relapse(new);
    }
}
