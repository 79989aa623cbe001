//! What each step does, and where each rule bites (I1, I5, I7, I8; R41–R48). See the parent module.

use super::{
    Action, Body, End, Entry, LEAVES, NODES, Node, OPS, Pending, Replica, STALE, State, Stream,
    THIN, TWICE, bit, has,
};
use crate::rules::Rule;

impl Replica {
    fn on(&self, rule: Rule) -> bool {
        self.rules.on(rule)
    }

    /// Whether `n` takes requests.
    pub(super) fn serves(&self, s: &State, n: u8) -> bool {
        s.led(n).is_some() && (s.node(n).lease || !self.on(Rule::LeaseOnServe))
    }

    /// Members whose acks `n` waits for.
    fn waited(&self, s: &State, n: u8) -> u8 {
        let Some(entry) = s.led(n) else { return 0 };
        let mut wait = 0;
        if self.on(Rule::AckWaitsInSync) {
            wait |= entry.in_sync & !bit(n);
        }
        if !self.on(Rule::DropKnownFirst) {
            let reached = (0..NODES).filter(|to| s.live(n, *to).is_some());
            wait &= reached.fold(0, |m, to| m | bit(to));
        }
        if self.on(Rule::AckWaitsAsked) {
            wait |= s.node(n).asked & entry.syncing;
        }
        if self.on(Rule::WaitFromEndMark) {
            let ended = s.streams.iter().filter(|t| t.from == n && t.live && t.end != End::No);
            wait |= ended.fold(0, |m, t| m | bit(t.to));
        }
        wait
    }

    fn too_few(&self, s: &State, n: u8) -> bool {
        let in_sync = s.led(n).map_or(0, |e| e.in_sync.count_ones());
        in_sync < u32::from(self.min_in_sync) && self.on(Rule::MinInSyncToAck)
    }

    fn all_hold(&self, s: &State, n: u8) -> bool {
        self.waited(s, n) & !s.node(n).held == 0
    }

    /// Whether `n` would answer a read of the chunk now.
    pub(super) fn answers(&self, s: &State, n: u8) -> bool {
        self.serves(s, n) && (self.all_hold(s, n) || !self.on(Rule::ReadWaits))
    }

    fn forget_lead(s: &mut State, n: u8) {
        let node = &mut s.nodes[usize::from(n)];
        node.pending.clear();
        node.held = 0;
        node.asked = 0;
        node.lease = false;
        node.read = None;
        for t in s.streams.iter_mut().filter(|t| t.from == n) {
            t.live = false;
        }
    }

    fn know(&self, s: &mut State, n: u8, epoch: u8) {
        let since = |e: u8| if e == 0 { 0 } else { s.map[usize::from(e) - 1].since };
        let led = s.led(n).map(|e| e.since);
        if led.is_some_and(|l| l != since(epoch)) || s.node(n).epoch == 0 {
            Self::forget_lead(s, n);
        }
        let node = &mut s.nodes[usize::from(n)];
        node.epoch = epoch;
        // An ask of an older epoch is void.
        node.asked = 0;
    }

    /// What may have taken effect by now, in any order.
    fn close(possible: u32, begun: u8) -> u32 {
        let mut all = possible;
        loop {
            let mut next = all;
            for at in (0..32).filter(|at| (all >> at) & 1 != 0) {
                for op in (0..OPS).filter(|op| has(begun, *op) && !has(at & 7, *op)) {
                    next |= 1 << (LEAVES[usize::from(op)] * 8 + ((at & 7) | bit(op)));
                }
            }
            if next == all {
                return all;
            }
            all = next;
        }
    }

    fn answer(&self, s: &mut State, op: u8, n: u8) {
        s.answered |= bit(op);
        let done = (0..32u8).filter(|at| has(at & 7, op)).fold(0u32, |m, at| m | (1 << at));
        s.possible &= done;
        let in_sync = s.led(n).map_or(0, |e| e.in_sync);
        let held = |m: &u8| has(in_sync, *m) && (has(s.node(*m).window, op) || has(s.lost, *m));
        if (0..NODES).filter(held).count() < usize::from(self.min_in_sync) {
            s.wrong |= THIN;
        }
        // What is answered is journaled here, and what was journaled before it.
        for p in &mut s.nodes[usize::from(n)].pending {
            p.before = None;
            if p.op == op {
                break;
            }
        }
    }

    fn deliver(&self, s: &mut State, op: u8, n: u8) -> Option<()> {
        // The second client's cut comes after its write, if it writes.
        let after = if op == 2 { self.ops & bit(1) & !s.answered } else { 0 };
        if !self.serves(s, n) || has(s.answered, op) || after != 0 {
            return None;
        }
        let node = s.node(n);
        if has(node.window, op) {
            let waits = self.on(Rule::WindowAnswerWaits);
            if self.too_few(s, n) {
                return None;
            }
            if waits && (node.pending.iter().any(|p| p.op == op) || !self.all_hold(s, n)) {
                return None;
            }
            self.answer(s, op, n);
            return Some(());
        }
        s.begun |= bit(op);
        s.possible = Self::close(s.possible, s.begun);
        let epoch = s.node(n).epoch;
        let was_true = s.may_hold(s.node(n).value);
        let node = &mut s.nodes[usize::from(n)];
        node.pending.push(Pending { op, acked: 0, before: Some(node.value) });
        node.value = LEAVES[usize::from(op)];
        node.window |= bit(op);
        node.held = 0;
        for t in s.streams.iter_mut().filter(|t| t.from == n && t.live) {
            t.queue.push((epoch, Body::Mutation(op)));
        }
        if was_true && !s.may_hold(LEAVES[usize::from(op)]) {
            s.wrong |= TWICE;
        }
        Some(())
    }

    fn take(&self, s: &mut State, from: u8, to: u8, live: bool, at: u8) -> Option<()> {
        let k = s.streams.iter().position(|t| t.from == from && t.to == to && t.live == live)?;
        let (epoch, body) = *s.streams[k].queue.get(usize::from(at))?;
        let known = s.node(to).epoch;
        if known == 0 && self.on(Rule::RestartedKnowsNone) {
            return None;
        }
        if epoch > known && (self.on(Rule::EpochFromStream) || known == 0) {
            self.know(s, to, epoch);
        }
        s.streams[k].queue.remove(usize::from(at));
        let node = &mut s.nodes[usize::from(to)];
        let before = (node.value, node.window);
        let acked = match body {
            Body::Mutation(op) => {
                if self.on(Rule::MemberTakesBlindly) || !has(node.window, op) {
                    node.value = LEAVES[usize::from(op)];
                    node.window |= bit(op);
                }
                bit(op)
            }
            Body::Chunk(value, window) => {
                node.value = value;
                if self.on(Rule::WindowWithChunk) {
                    node.window = self.replaced(node.window, window);
                }
                s.streams[k].aligned = true;
                window
            }
            Body::Windows(window) => {
                node.window = self.replaced(node.window, window);
                0
            }
            Body::End(rest) => {
                if let Some(window) = rest {
                    if self.on(Rule::EndMarkDrops) {
                        node.value = 0;
                    }
                    node.window = self.replaced(node.window, window);
                    s.streams[k].aligned = true;
                }
                s.streams[k].end = End::Acked;
                rest.unwrap_or(0)
            }
        };
        let node = &mut s.nodes[usize::from(to)];
        if !self.on(Rule::MemberAcksDurable) && matches!(body, Body::Mutation(_)) {
            node.undo = Some(before);
        }
        if live {
            let t = &s.streams[k];
            let carries = |b: &(u8, Body)| matches!(b.1, Body::Mutation(_) | Body::Chunk(..));
            let all = t.aligned && !t.queue.iter().any(carries);
            let primary = &mut s.nodes[usize::from(from)];
            for p in primary.pending.iter_mut().filter(|p| has(acked, p.op)) {
                p.acked |= bit(to);
            }
            if all {
                primary.held |= bit(to);
            }
        }
        Some(())
    }

    fn replaced(&self, old: u8, new: u8) -> u8 {
        if self.on(Rule::WindowReplaced) { new } else { old | new }
    }

    fn new_epoch(s: &mut State, change: impl FnOnce(&mut Entry)) {
        let mut entry = s.entry();
        change(&mut entry);
        s.map.push(entry);
    }

    fn remove_member(s: &mut State, n: u8) {
        Self::new_epoch(s, |e| {
            e.in_sync &= !bit(n);
            e.syncing &= !bit(n);
        });
    }

    fn lose(s: &mut State, n: u8) {
        s.lost |= bit(n);
        Self::forget_lead(s, n);
        s.nodes[usize::from(n)] = Node::default();
    }

    /// A primary's step on its stream to a member.
    fn stream_step(&self, s: &mut State, action: Action) -> Option<()> {
        let (Action::Open { from, to }
        | Action::ReadChunk { from, to }
        | Action::SendChunk { from, to }
        | Action::SendEnd { from, to }
        | Action::Break { from, to }
        | Action::Ask { from, to }) = action
        else {
            return None;
        };
        let entry = s.led(from)?;
        let (epoch, value, window) = {
            let n = s.node(from);
            (n.epoch, n.value, n.window)
        };
        if let Action::Open { .. } = action {
            let member = has(entry.in_sync | entry.syncing, to) && !has(s.lost, to);
            let fenced = self.on(Rule::FenceOldEpoch) && s.node(to).epoch > epoch;
            if !member || fenced || s.live(from, to).is_some() {
                return None;
            }
            if self.on(Rule::OneStream) {
                s.streams.retain(|t| t.from != from || t.to != to);
            }
            let mut queue = Vec::new();
            let align = self.on(Rule::AlignEachStream);
            if !self.on(Rule::WindowWithChunk) {
                queue.push((epoch, Body::Windows(window)));
            }
            if !align {
                s.nodes[usize::from(from)].held |= bit(to);
            }
            let (sent, aligned, end) = (!align, !align, End::No);
            s.streams.push(Stream { from, to, live: true, sent, aligned, end, queue });
            return Some(());
        }
        let staged = s.node(from).read;
        let t = s.streams.iter_mut().find(|t| t.from == from && t.to == to && t.live)?;
        match action {
            Action::ReadChunk { .. } => {
                if t.sent || value == 0 || staged.is_some() {
                    return None;
                }
                s.nodes[usize::from(from)].read = Some((to, value, window));
            }
            Action::SendChunk { .. } => {
                let (value, window) = match staged {
                    Some((member, value, window)) if member == to => (value, window),
                    _ if value != 0 && self.on(Rule::ChunkHeld) => (value, window),
                    _ => return None,
                };
                if t.sent {
                    return None;
                }
                t.sent = true;
                t.queue.push((epoch, Body::Chunk(value, window)));
                s.nodes[usize::from(from)].read = None;
            }
            Action::SendEnd { .. } => {
                if t.end != End::No || (!t.sent && value != 0) {
                    return None;
                }
                t.end = End::Sent;
                let rest = (!t.sent).then_some(window);
                t.sent = true;
                t.queue.push((epoch, Body::End(rest)));
            }
            Action::Break { .. } => {
                if t.queue.is_empty() {
                    return None;
                }
                t.live = false;
                s.breaks -= 1;
            }
            Action::Ask { .. } => {
                let ended = t.end == End::Acked || !self.on(Rule::AskAfterEndMark);
                if !ended || !has(entry.syncing, to) || has(s.node(from).asked, to) {
                    return None;
                }
                s.nodes[usize::from(from)].asked |= bit(to);
                s.asks.push((epoch, to));
                s.asks.sort_unstable();
                s.asks.dedup();
            }
            _ => return None,
        }
        Some(())
    }

    /// A command of the metadata plane.
    fn plane_step(&self, s: &mut State, action: Action) -> Option<()> {
        let entry = s.entry();
        let next = s.epoch() + 1;
        match action {
            Action::InSync { ask } => {
                let (epoch, n) = s.asks.remove(usize::from(ask));
                let current = epoch == s.epoch() || !self.on(Rule::CommandNamesEpoch);
                if !current || !has(entry.syncing, n) {
                    return None;
                }
                Self::new_epoch(s, |e| {
                    e.syncing &= !bit(n);
                    e.in_sync |= bit(n);
                });
            }
            Action::Learn { node: n } => {
                if s.node(n).epoch == s.epoch() || has(s.lost, n) {
                    return None;
                }
                let mine = entry.primary == n;
                let alone = entry.in_sync | entry.syncing == bit(n);
                let anew = s.node(n).epoch == 0 && mine && !alone;
                if anew && self.on(Rule::RestartIsNewEpoch) {
                    Self::new_epoch(s, |e| e.since = next);
                }
                let epoch = s.epoch();
                self.know(s, n, epoch);
                s.nodes[usize::from(n)].lease = mine;
            }
            Action::TakeOver { node: n, keep_old } => {
                let able = has(entry.in_sync, n)
                    || (has(entry.syncing, n) && !self.on(Rule::TakeoverInSync));
                let old = entry.primary;
                // Where losses are free, who is not lost stays.
                let keeps = has(s.lost, old) != keep_old && (self.min_in_sync > 1 || keep_old);
                let drops = !keep_old && self.min_in_sync == 1;
                if n == old || !able || has(s.lost, n) || !(keeps || drops) {
                    return None;
                }
                s.takeovers -= 1;
                if self.on(Rule::TakeoverWaitsForLease) {
                    s.nodes[usize::from(old)].lease = false;
                }
                Self::new_epoch(s, |e| {
                    if !keep_old {
                        e.in_sync &= !bit(old);
                    }
                    e.in_sync |= bit(n);
                    e.syncing &= !bit(n);
                    e.primary = n;
                    e.since = next;
                });
            }
            Action::Drop { node: n } => {
                // Who is lost is out of contact: the last one in contact stays.
                let left = s.survivors() & !bit(n);
                let other = n != entry.primary && left != 0;
                let only = left == 0 && !self.on(Rule::LastInSyncStays);
                if !has(entry.in_sync | entry.syncing, n) || !(other || only) {
                    return None;
                }
                s.drops -= 1;
                Self::remove_member(s, n);
            }
            Action::Add { node: n } => {
                if has(entry.in_sync | entry.syncing | s.lost, n) {
                    return None;
                }
                s.adds -= 1;
                Self::new_epoch(s, |e| e.syncing |= bit(n));
            }
            Action::Leave { node: n } => {
                let left = (entry.in_sync & !bit(n)).count_ones();
                let enough = left >= u32::from(self.min_in_sync.max(1));
                let member = has(entry.in_sync | entry.syncing, n) && n != entry.primary;
                if !member || (!enough && self.on(Rule::ShrinkKeepsMin)) {
                    return None;
                }
                s.leaves -= 1;
                Self::remove_member(s, n);
                Self::lose(s, n);
            }
            _ => return None,
        }
        Some(())
    }

    pub(super) fn step(&self, s: &mut State, action: Action) -> Option<()> {
        match action {
            Action::Deliver { op, node } => self.deliver(s, op, node),
            Action::Answer { op, node: n } => {
                let wait = self.waited(s, n);
                let node = s.node(n);
                let at = node.pending.iter().position(|p| p.op == op)?;
                if wait & !node.pending[at].acked != 0 || !self.serves(s, n) || self.too_few(s, n) {
                    return None;
                }
                self.answer(s, op, n);
                s.nodes[usize::from(n)].pending.remove(at);
                Some(())
            }
            Action::Read { node: n } => {
                if !self.answers(s, n) {
                    return None;
                }
                let value = s.node(n).value;
                let seen = Self::close(s.possible & (0xff_u32 << (value * 8)), s.begun);
                if seen == s.possible {
                    return None;
                }
                s.reads -= 1;
                s.possible = seen;
                if seen == 0 {
                    s.wrong |= STALE;
                }
                for p in &mut s.nodes[usize::from(n)].pending {
                    p.before = None;
                }
                Some(())
            }
            Action::Take { from, to, live, at } => self.take(s, from, to, live, at),
            Action::Lose { node: n } => {
                let entry = s.entry();
                let spare = self.min_in_sync > 1 || s.survivors() & !bit(n) != 0;
                if has(s.lost, n) || !has(entry.in_sync | entry.syncing, n) || !spare {
                    return None;
                }
                s.losses -= 1;
                Self::lose(s, n);
                Some(())
            }
            Action::Restart { node: n, torn } => {
                if has(s.lost, n) || s.node(n).epoch == 0 {
                    return None;
                }
                s.restarts -= 1;
                let node = &mut s.nodes[usize::from(n)];
                if let (true, Some(p)) = (torn, node.pending.pop()) {
                    node.value = p.before?;
                    node.window &= !bit(p.op);
                }
                if let Some((value, window)) = node.undo.take() {
                    (node.value, node.window) = (value, window);
                }
                node.epoch = 0;
                Self::forget_lead(s, n);
                s.streams.retain(|t| t.to != n);
                Some(())
            }
            Action::Open { .. }
            | Action::ReadChunk { .. }
            | Action::SendChunk { .. }
            | Action::SendEnd { .. }
            | Action::Break { .. }
            | Action::Ask { .. } => self.stream_step(s, action),
            _ => self.plane_step(s, action),
        }
    }

    /// Lets go of what can't matter any more, so that equal worlds are one state.
    pub(super) fn tidy(&self, s: &mut State) {
        let known: Vec<u8> = s.nodes.iter().map(|n| n.epoch).collect();
        let led: Vec<Option<Entry>> = (0..NODES).map(|n| s.led(n)).collect();
        let lost = s.lost;
        let fence = self.on(Rule::FenceOldEpoch);
        for t in &mut s.streams {
            let entry = led[usize::from(t.from)];
            let member = entry.is_some_and(|e| has(e.in_sync | e.syncing, t.to));
            t.live &= member;
            if !t.live {
                (t.sent, t.aligned, t.end) = (false, false, End::No);
            }
        }
        // A message of an older epoch is refused (R45), and that ends its stream.
        s.streams.retain(|t| {
            let older = t.queue.first().is_some_and(|m| m.0 < known[usize::from(t.to)]);
            let over = has(lost, t.to) || (older && fence);
            !over && (t.live || !t.queue.is_empty())
        });
        s.streams.sort_unstable();
        if self.on(Rule::CommandNamesEpoch) {
            let epoch = s.epoch();
            s.asks.retain(|a| a.0 == epoch);
        }
        for (n, entry) in led.iter().enumerate() {
            let others = entry.map_or(0, |e| e.in_sync | e.syncing);
            let node = &mut s.nodes[n];
            node.held &= others;
            for p in &mut node.pending {
                p.acked &= others;
            }
        }
        // The map of an epoch that its primary left is read by nobody.
        let current = s.map.len() - 1;
        for (i, entry) in s.map.iter_mut().enumerate().take(current) {
            if known[usize::from(entry.primary)] != i as u8 + 1 {
                *entry = Entry::default();
            }
        }
    }
}
