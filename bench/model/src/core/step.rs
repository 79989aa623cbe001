//! What each step does, and where each rule bites (I1, I2, I3, I5, I7). See the parent module.

use super::{AFTER_FENCE, Action, Core, Cut, Pending, Phase, State, TORN, TWICE, Write, WriteId};
use crate::rules::Rule;

impl Core {
    fn on(&self, rule: Rule) -> bool {
        self.rules.on(rule)
    }

    fn chunk(&self, w: Write) -> usize {
        usize::from(self.script[usize::from(w.client)][usize::from(w.index)])
    }

    /// The primary takes the newest FileView: cuts first, then what is clean is let go.
    fn catch_up(&self, s: &mut State, n: usize) {
        let node = &mut s.nodes[n];
        for cut in s.cuts.iter().filter(|c| c.version > node.view) {
            if n >= usize::from(cut.at) {
                node.dirty.retain(|d| d.0 > cut.generation);
            }
            if self.on(Rule::CutRaisesFloor) && self.on(Rule::CutBumpsGeneration) {
                node.floor = node.floor.max(cut.generation + 1);
            }
        }
        node.view = s.version;
        node.dirty.retain(|d| d.0 > s.clean_gen);
        if node.pin.is_some_and(|p| p.0 <= s.clean_gen) {
            node.pin = None;
        }
    }

    /// The size is the greatest end, each clipped by the cuts at or above its generation.
    fn grow(&self, s: &mut State, tag: u8, end: u8) {
        let clipped = s.cuts.iter().filter(|c| c.generation >= tag).map(|c| c.at).min();
        let end = match clipped {
            Some(at) if self.on(Rule::CommitClippedByCuts) => end.min(at),
            _ => end,
        };
        s.size = s.size.max(end);
    }

    fn high_water(&self, s: &mut State, n: usize) {
        let dirty = s.nodes[n].dirty.iter().rev().find(|d| d.0 > s.clean_gen).copied();
        if let (true, Some((tag, _))) = (self.on(Rule::SealHighWater), dirty) {
            self.grow(s, tag, n as u8 + 1);
        }
    }

    fn deliver(&self, s: &mut State, i: usize, keep: bool, reply_lost: bool) {
        let w = s.net[i];
        if !keep {
            s.net.remove(i);
        }
        let n = self.chunk(w);
        if self.on(Rule::ViewNamed) && w.view > s.nodes[n].view {
            self.catch_up(s, n);
        }
        let node = &mut s.nodes[n];
        let known = node.window.iter().find(|t| t.0 == w.sequence_bit()).map(|t| t.1);
        let known = known.filter(|_| self.on(Rule::Window));
        if known.is_none() {
            if w.tag < node.floor {
                let c = &mut s.clients[usize::from(w.client)];
                if !reply_lost && c.next == w.index && c.pending == Pending::Waiting {
                    // Only the refusal of every copy that is under way settles that none can land.
                    if !s.net.iter().any(|o| o.client == w.client && o.index == w.index) {
                        c.pending = Pending::Refused;
                    }
                }
                return;
            }
            if self.on(Rule::MonotoneTags) {
                node.floor = node.floor.max(w.tag);
            }
            match node.dirty.iter().position(|d| d.0 >= w.tag) {
                Some(p) if node.dirty[p].0 == w.tag => node.dirty[p].1 = w.id(),
                Some(p) => node.dirty.insert(p, (w.tag, w.id())),
                None => node.dirty.push((w.tag, w.id())),
            }
            node.window.push((w.sequence_bit(), w.tag));
            node.window.sort_unstable();
            let view = node.view;
            let bit = 1 << w.id();
            if s.applied & bit != 0 {
                s.wrong |= TWICE;
            } else {
                s.applied |= bit;
                // Taken before the primary took an unanswered cut: it counts as before the truncate.
                let before_cut = s
                    .open_cut
                    .is_some_and(|(g, at, v)| w.tag <= g && n >= usize::from(at) && view < v);
                if !before_cut {
                    s.expect[n] = w.id();
                    s.expect_size = s.expect_size.max(n as u8 + 1);
                }
            }
            if s.fenced & (1 << (w.client * 2 + w.session)) != 0 {
                s.wrong |= AFTER_FENCE;
            }
        }
        let c = &mut s.clients[usize::from(w.client)];
        if !reply_lost && c.next == w.index {
            c.next += 1;
            c.pending = Pending::Idle;
            s.acked += 1;
            let end = n as u8 + 1;
            let told = known.filter(|_| self.on(Rule::WindowTellsTag)).unwrap_or(w.tag);
            match c.ends.iter_mut().find(|e| e.0 == told) {
                Some(e) => e.1 = e.1.max(end),
                None => c.ends.push((told, end)),
            }
        }
    }

    fn settle_fences(&self, s: &mut State) {
        for c in 0..2usize {
            let over = s.granted[c] <= s.sealed_gen || !self.on(Rule::ExpirySeals);
            if s.expired & (1 << c) != 0 && over {
                s.fenced |= 1 << (c * 2);
            }
        }
    }

    fn begin_seal(&self, s: &mut State, fence: bool) {
        s.phase = Phase::Sealing { g: s.generation, fence };
        s.flush_cut = u8::MAX;
        s.sealed = 0;
        if !self.on(Rule::SealEveryPrimary) {
            for n in 0..2 {
                if s.nodes[n].dirty.is_empty() {
                    s.sealed |= 1 << n;
                }
            }
        }
    }

    /// What a reader under the newest view gets for a chunk.
    pub(super) fn readable(&self, s: &State, n: usize) -> WriteId {
        let node = &s.nodes[n];
        let cut_away = |tag: u8| {
            self.on(Rule::ViewNamed)
                && s.cuts
                    .iter()
                    .any(|c| c.version > node.view && tag <= c.generation && n >= usize::from(c.at))
        };
        let dirty = node.dirty.iter().rev().find(|d| d.0 > s.clean_gen && !cut_away(d.0));
        match dirty {
            Some(d) => d.1,
            None if n < usize::from(s.limit.min(s.object_len)) => s.object[n],
            None => 0,
        }
    }

    pub(super) fn step(&self, s: &mut State, action: Action) -> Option<()> {
        match action {
            Action::Grant(c) => {
                let c = usize::from(c);
                let sealing = matches!(s.phase, Phase::Sealing { .. });
                let g = match s.phase {
                    Phase::Sealing { g, .. } => s.generation.max(g + 1),
                    _ => s.generation,
                };
                let fresh = s.clients[c].grant.is_none_or(|old| old.0 < g || old.1 < s.version);
                let open = s.expired & (1 << c) == 0 || s.clients[c].session > 0;
                let wanted = usize::from(s.clients[c].next) < self.script[c].len();
                if !(fresh && open && wanted) || (sealing && self.on(Rule::NoGrantWhileSealing)) {
                    return None;
                }
                s.clients[c].grant = Some((g, s.version));
                if self.on(Rule::GrantBeforeWrite) {
                    s.granted[c] = g;
                    s.top = s.top.max(g);
                    if s.phase == Phase::Clean {
                        s.phase = Phase::Dirty;
                    }
                }
            }
            Action::Send(c) => {
                let client = &mut s.clients[usize::from(c)];
                let index = client.next;
                let lost = !s.net.iter().any(|w| w.client == c && w.index == index);
                if usize::from(index) >= self.script[usize::from(c)].len()
                    || (client.pending == Pending::Waiting && !lost)
                {
                    return None;
                }
                let (tag, view) = client.grant?;
                client.pending = Pending::Waiting;
                s.net.push(Write { client: c, index, session: client.session, tag, view });
                s.net.sort_unstable();
            }
            Action::Deliver(i) => self.deliver(s, usize::from(i), false, false),
            Action::DeliverAndKeep(i) => {
                s.dups -= 1;
                self.deliver(s, usize::from(i), true, false);
            }
            Action::DeliverReplyLost(i) => {
                s.dups -= 1;
                self.deliver(s, usize::from(i), false, true);
            }
            Action::CommitWrite(c) => {
                for (tag, end) in std::mem::take(&mut s.clients[usize::from(c)].ends) {
                    if tag >= s.size_floor || !self.on(Rule::SizeFloorAtRetire) {
                        self.grow(s, tag, end);
                    }
                }
            }
            Action::FlushBegin => {
                s.flushes -= 1;
                self.begin_seal(s, false);
            }
            Action::Seal(n) => {
                let Phase::Sealing { g, .. } = s.phase else { return None };
                let n = usize::from(n);
                if s.sealed & (1 << n) != 0 {
                    return None;
                }
                if self.on(Rule::ViewNamed) {
                    self.catch_up(s, n);
                }
                let node = &mut s.nodes[n];
                if self.on(Rule::FloorAtSeal) {
                    node.floor = node.floor.max(g + 1);
                }
                if node.pin.is_none_or(|p| p.0 != g) {
                    let held = node.dirty.iter().rev().find(|d| d.0 <= g && d.0 > s.clean_gen);
                    node.pin = Some((g, held.map_or(0, |d| d.1)));
                }
                self.high_water(s, n);
                s.sealed |= 1 << n;
            }
            Action::SealDone => {
                let Phase::Sealing { g, fence } = s.phase else { return None };
                if s.sealed != 3 {
                    return None;
                }
                s.generation = s.generation.max(g + 1);
                s.sealed_gen = s.sealed_gen.max(g);
                s.parts = [None; 2];
                s.put = false;
                if fence {
                    s.phase = Phase::Dirty;
                } else {
                    s.phase = Phase::Flushing { g };
                    s.flush_len = s.size;
                    s.snapshot = s.expect;
                }
                self.settle_fences(s);
            }
            Action::Abort => {
                let g = match s.phase {
                    Phase::Sealing { g, fence: false } => g,
                    Phase::Flushing { g } if !s.put => g,
                    _ => return None,
                };
                s.aborts -= 1;
                s.generation = s.generation.max(g + 1);
                s.phase = Phase::Dirty;
                s.merged_abort = s.acked > 0;
            }
            Action::ReadPart(n) => {
                let Phase::Flushing { g } = s.phase else { return None };
                let n = usize::from(n);
                if s.put || s.parts[n].is_some() {
                    return None;
                }
                let node = &s.nodes[n];
                let held = match node.pin {
                    Some(p) if p.0 == g && self.on(Rule::PinAtSeal) => p.1,
                    _ if self.on(Rule::PinAtSeal) => 0,
                    _ => node.dirty.iter().rev().find(|d| d.0 > s.clean_gen).map_or(0, |d| d.1),
                };
                let base = n < usize::from(s.limit.min(s.object_len));
                s.parts[n] = Some(match held {
                    0 if base => s.object[n],
                    held => held,
                });
            }
            Action::Put => {
                let [Some(a), Some(b)] = s.parts else { return None };
                if s.put || !matches!(s.phase, Phase::Flushing { .. }) {
                    return None;
                }
                s.object = [a, b];
                s.object_len = s.flush_len;
                s.put = true;
                let whole = usize::from(s.flush_cut.min(2));
                if s.object[..whole] != s.snapshot[..whole] {
                    s.wrong |= TORN;
                }
            }
            Action::FlushCommit => {
                let Phase::Flushing { g } = s.phase else { return None };
                if !s.put {
                    return None;
                }
                s.clean_gen = g;
                s.limit = match self.on(Rule::CutClipsFlush) {
                    true => s.flush_len.min(s.flush_cut),
                    false => s.flush_len,
                };
                s.version += 1;
                let above = s.top > g && self.on(Rule::CleanIffNoGrantAbove);
                s.phase = if above { Phase::Dirty } else { Phase::Clean };
                s.parts = [None; 2];
                s.put = false;
            }
            Action::Release(n) => {
                let n = usize::from(n);
                let old = s.nodes[n].dirty.iter().any(|d| d.0 <= s.clean_gen);
                if !old || !self.on(Rule::ViewNamed) {
                    return None;
                }
                self.catch_up(s, n);
            }
            Action::Truncate => {
                if !s.cuts.is_empty() {
                    return None;
                }
                let at = self.truncates[self.truncates.len() - usize::from(s.truncates)];
                s.truncates -= 1;
                s.version += 1;
                let generation = s.generation;
                s.cuts.push(Cut { generation, at, version: s.version, acked: 0 });
                if self.on(Rule::CutBumpsGeneration) {
                    s.generation += 1;
                }
                if self.on(Rule::CutCountsAsAbove) {
                    s.top = s.top.max(s.generation);
                }
                if s.phase == Phase::Clean {
                    s.phase = Phase::Dirty;
                }
                s.size = at;
                if self.on(Rule::CutLowersLimit) {
                    s.limit = s.limit.min(at);
                }
                s.flush_cut = s.flush_cut.min(at);
                for n in usize::from(at)..2 {
                    s.expect[n] = 0;
                }
                s.expect_size = at;
                if self.on(Rule::TruncateWaits) {
                    s.open_cut = Some((generation, at, s.version));
                }
            }
            Action::CutAck(n) => {
                let bit = 1 << n;
                if s.cuts.first()?.acked & bit != 0 {
                    return None;
                }
                self.catch_up(s, usize::from(n));
                self.high_water(s, usize::from(n));
                s.cuts[0].acked |= bit;
                if s.cuts[0].acked == 3 {
                    let cut = s.cuts.remove(0);
                    s.size_floor = cut.generation + 1;
                    s.sealed_gen = s.sealed_gen.max(cut.generation);
                    s.open_cut = None;
                    self.settle_fences(s);
                }
            }
            Action::Expire(c) => {
                if s.expired & (1 << c) != 0 {
                    return None;
                }
                s.expiries -= 1;
                s.expired |= 1 << c;
                self.settle_fences(s);
            }
            Action::FenceBegin => {
                let due =
                    (0..2).any(|c| s.expired & (1 << c) != 0 && s.fenced & (1 << (c * 2)) == 0);
                if !due || s.phase != Phase::Dirty {
                    return None;
                }
                self.begin_seal(s, true);
            }
            Action::Reopen(c) => {
                let c = usize::from(c);
                let client = &mut s.clients[c];
                let settled = client.pending != Pending::Waiting;
                if s.fenced & (1 << (c * 2)) == 0
                    || client.session > 0
                    || (self.on(Rule::ResendOnlyRefused) && !settled)
                {
                    return None;
                }
                client.session = 1;
                client.grant = None;
                client.pending = Pending::Idle;
            }
            Action::NodeRestart(n) => {
                let journaled = [
                    Rule::FloorJournaled,
                    Rule::PinJournaled,
                    Rule::AckAfterJournal,
                    Rule::WindowJournaled,
                ];
                if journaled.iter().all(|r| self.on(*r)) {
                    return None;
                }
                s.node_restarts -= 1;
                let node = &mut s.nodes[usize::from(n)];
                if !self.on(Rule::FloorJournaled) {
                    node.floor = 0;
                }
                if !self.on(Rule::PinJournaled) {
                    node.pin = None;
                }
                if !self.on(Rule::AckAfterJournal) {
                    node.dirty.pop();
                }
                if !self.on(Rule::WindowJournaled) {
                    node.window.clear();
                }
            }
            Action::LeaderCrash => {
                s.leader_crashes -= 1;
                s.sealed = 0;
                s.parts = [None; 2];
                // The new leader finds the upload, if it landed, by its nonce (the key model).
            }
        }
        Some(())
    }
}
