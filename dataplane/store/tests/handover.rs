//! Windows move with their group (R27, I7): across moves, lost replies, repeated hand-overs and restarts no write is
//! applied twice, and every repetition is answered under its first tag.
//!
//! `EBB_SEED=n` replays one seed, `EBB_SEEDS=n` runs that many.

mod support;

use ebb_dataplane_protocol::*;
use ebb_store::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use support::*;

const NONE: BaseView = BaseView { content: ContentId(0), valid_bytes: 0 };
const GROUPS: u16 = 8;
const CORES: usize = 3;

/// A rule of the leader that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Break {
    Nothing,
    /// The group moves, its window stays.
    WindowStays,
    /// Only the first page of it is handed over.
    OnePage,
    /// The window is read before the freeze.
    ReadBeforeFreeze,
    /// It is handed over without the epoch it is for: a late release takes it for an older one.
    EpochUnnamed,
}

#[derive(Clone, Debug)]
struct Sent {
    op: WriteOp,
    pg: PgId,
    /// The tag under which it was applied, if it was.
    applied: Option<Generation>,
}

struct World {
    rng: StdRng,
    rule: Break,
    cores: Vec<Rig>,
    /// Who holds each group, and its epoch.
    holders: Vec<(usize, PgEpoch)>,
    /// Writes whose answer the client has not seen.
    open: BTreeMap<(SessionId, Sequence), Sent>,
    /// Releases that are still to come.
    owed: Vec<(usize, PgId, PgEpoch)>,
    next: u64,
    generation: u64,
    repeated: u64,
    moved: u64,
}

impl World {
    fn new(seed: u64, rule: Break) -> Self {
        Self {
            rng: StdRng::seed_from_u64(seed),
            rule,
            cores: (0..CORES).map(|_| Rig::new(32 << 20)).collect(),
            holders: vec![(0, PgEpoch(1)); usize::from(GROUPS)],
            open: BTreeMap::new(),
            owed: Vec::new(),
            next: 1,
            generation: 1,
            repeated: 0,
            moved: 0,
        }
    }

    fn below(&self, session: SessionId) -> Sequence {
        let from = (session, Sequence(0));
        let first = self.open.range(from..).next().filter(|(k, _)| k.0 == session);
        first.map_or(Sequence(self.next), |(k, _)| k.1)
    }

    /// A write; in half of the cases the client never hears of it.
    fn write(&mut self) {
        let session = SessionId(self.rng.random_range(1..4));
        let chunk = ChunkIndex(4 * self.rng.random_range(0..16));
        let pg = PgId::of_chunk(INODE, chunk, GROUPS);
        self.next += 1;
        let sequence = Sequence(self.next);
        let op = WriteOp {
            inode: INODE,
            chunk,
            offset: 4096 * self.rng.random_range(0..4),
            len: 4096,
            generation: Generation(self.generation),
            session,
            sequence,
            answered_below: self.below(session).min(sequence),
            base: NONE,
        };
        let core = &mut self.cores[self.holders[usize::from(pg.0)].0];
        core.write_op(&op, 1).expect("accepted");
        core.settle();
        if self.rng.random_bool(0.5) {
            let applied = Some(op.generation);
            self.open.insert((session, sequence), Sent { op, pg, applied });
        }
    }

    /// The client asks for a write again, wherever its group is by now, under the newest tag.
    fn ask_again(&mut self) -> Result<(), String> {
        if self.open.is_empty() {
            return Ok(());
        }
        let i = self.rng.random_range(0..self.open.len());
        let (key, sent) = self.open.iter().nth(i).map(|(k, s)| (*k, s.clone())).expect("in range");
        let holder = self.holders[usize::from(sent.pg.0)].0;
        let op = WriteOp {
            generation: Generation(self.generation),
            answered_below: self.below(key.0),
            ..sent.op
        };
        let answer = self.cores[holder].store.begin_write(&op).map(|plan| plan.id);
        let known = sent.applied.expect("every one of them was applied");
        self.repeated += 1;
        if answer != Err(WriteError::Duplicate { generation: known }) {
            return Err(format!("{key:?}, taken under {known}, is answered {answer:?}"));
        }
        if self.rng.random_bool(0.5) {
            self.open.remove(&key);
        }
        Ok(())
    }

    fn pages(&self, core: usize, pg: PgId, epoch: PgEpoch) -> Vec<Vec<control::WindowEntry>> {
        let mut pages: Vec<Vec<control::WindowEntry>> = Vec::new();
        loop {
            let after = pages.last().and_then(|p| p.last()).map(|e| (e.session, e.sequence));
            let page = self.cores[core].store.windows(pg, epoch, after).expect("frozen");
            let ended = page.len() < WINDOW_PAGE;
            pages.push(page);
            if ended {
                return pages;
            }
        }
    }

    /// What the leader does; a leader may die before the epoch, and a core at any step.
    fn hand_over(&mut self, pg: PgId) {
        let (donor, epoch) = self.holders[usize::from(pg.0)];
        let to = (donor + self.rng.random_range(1..CORES)) % CORES;
        let early = self.rule == Break::ReadBeforeFreeze;
        let mut pages = Vec::new();
        if early {
            let t = self.cores[donor].store.freeze(pg, epoch);
            self.cores[donor].done(t);
            pages = self.pages(donor, pg, epoch);
            let t = self.cores[donor].store.thaw(pg, epoch);
            self.cores[donor].done(t);
            (0..8).for_each(|_| self.write());
        }
        let t = self.cores[donor].store.freeze(pg, epoch);
        self.cores[donor].done(t);
        self.maybe_restart(donor);
        if !early {
            pages = self.pages(donor, pg, epoch);
        }
        let taken = match self.rule {
            Break::WindowStays => 0,
            Break::OnePage => 1,
            Break::Nothing | Break::ReadBeforeFreeze | Break::EpochUnnamed => pages.len(),
        };
        let next = PgEpoch(epoch.0 + 1);
        let named = if self.rule == Break::EpochUnnamed { PgEpoch(0) } else { next };
        for page in &pages[..taken] {
            for _ in 0..self.rng.random_range(1..3) {
                let t = self.cores[to].store.take_windows(pg, named, page);
                self.cores[to].done(t);
            }
            self.maybe_restart(to);
        }
        if self.rng.random_bool(0.2) {
            // The leader died before the new epoch: the next one thaws, and the donor goes on.
            let t = self.cores[donor].store.thaw(pg, epoch);
            self.cores[donor].done(t);
            return;
        }
        self.holders[usize::from(pg.0)] = (to, next);
        // A freeze from the time when it was the donor, not yet released: this test is about windows.
        if let Some(old) = self.cores[to].store.frozen(pg) {
            let t = self.cores[to].store.thaw(pg, old);
            self.cores[to].done(t);
        }
        self.moved += 1;
        self.owed.push((donor, pg, next));
        if self.rng.random_bool(0.6) {
            self.release();
        }
    }

    /// A release arrives, maybe when the group has come back.
    fn release(&mut self) {
        if self.owed.is_empty() {
            return;
        }
        let i = self.rng.random_range(0..self.owed.len());
        let (donor, pg, epoch) = self.owed.swap_remove(i);
        // Its dirt was flushed: here it just goes.
        let t = self.cores[donor].store.drop_inode(Scope { inode: INODE, pg });
        self.cores[donor].done(t);
        let t = self.cores[donor].store.release_pg(pg, epoch);
        self.cores[donor].done(t);
    }

    fn maybe_restart(&mut self, core: usize) {
        if self.rng.random_bool(0.2) {
            if self.rng.random_bool(0.5) {
                self.cores[core].checkpoint();
            }
            self.cores[core].reopen();
        }
    }

    fn run(&mut self, steps: u32) -> Result<(), String> {
        for _ in 0..steps {
            match self.rng.random_range(0..21) {
                0..10 => self.write(),
                10..16 => self.ask_again()?,
                16 => self.generation += 1,
                18 => self.release(),
                17 | 19 => {
                    let pg = PgId(self.rng.random_range(0..GROUPS));
                    self.hand_over(pg);
                }
                _ => {
                    let core = self.rng.random_range(0..CORES);
                    self.maybe_restart(core);
                }
            }
        }
        Ok(())
    }
}

fn seeds() -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    match number("EBB_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("EBB_SEEDS").unwrap_or(20),
    }
}

#[test]
fn a_write_is_applied_once_wherever_its_group_goes() {
    let (mut repeated, mut moved) = (0, 0);
    for seed in seeds() {
        let mut world = World::new(seed, Break::Nothing);
        world.run(300).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        (repeated, moved) = (repeated + world.repeated, moved + world.moved);
    }
    println!("{repeated} repeated over {moved} moves");
    assert!(repeated > 0 && moved > 0, "something never happened");
}

fn is_needed(rule: Break) {
    let caught = (0..40u64).find_map(|seed| World::new(seed, rule).run(300).err());
    println!("{rule:?}: {caught:?}");
    assert!(caught.is_some(), "{rule:?} was never noticed");
}

#[test]
fn a_window_that_stays_behind_is_caught() {
    is_needed(Break::WindowStays);
}
#[test]
fn a_window_read_before_the_freeze_is_caught() {
    is_needed(Break::ReadBeforeFreeze);
}

#[test]
fn a_late_release_that_takes_what_came_since_is_caught() {
    is_needed(Break::EpochUnnamed);
}

/// One group's window of more than two pages; answers whether every entry arrived.
fn all_pages_arrive(rule: Break) -> bool {
    let mut world = World::new(1, rule);
    let pg = PgId::of_chunk(INODE, CHUNK, GROUPS);
    let count = 2 * WINDOW_PAGE as u64 + 7;
    for sequence in 1..=count {
        let op = WriteOp {
            answered_below: Sequence(0),
            sequence: Sequence(sequence),
            ..world.cores[0].op(0, 512, 3, NONE)
        };
        world.cores[0].write_op(&op, 1).expect("accepted");
        world.cores[0].settle();
    }
    let t = world.cores[0].store.freeze(pg, PgEpoch(1));
    world.cores[0].done(t);
    let pages = world.pages(0, pg, PgEpoch(1));
    assert_eq!(pages.len(), 3);
    let taken = if rule == Break::OnePage { 1 } else { pages.len() };
    for page in &pages[..taken] {
        let t = world.cores[1].store.take_windows(pg, PgEpoch(2), page);
        world.cores[1].done(t);
    }
    world.cores[1].reopen();
    let seen = |s| world.cores[1].store.seen(SessionId(1), Sequence(s));
    (1..=count).all(|s| seen(s) == Seen::Applied(Generation(3)))
}

#[test]
fn a_window_larger_than_a_page_arrives_whole() {
    assert!(all_pages_arrive(Break::Nothing));
    assert!(!all_pages_arrive(Break::OnePage), "the test is blind to a page left out");
}

#[test]
fn windows_of_a_group_that_may_still_change_are_not_told() {
    let mut r = Rig::new(32 << 20);
    let pg = PgId::of_chunk(INODE, CHUNK, GROUPS);
    let refused = |r: &Rig| {
        matches!(r.store.windows(pg, PgEpoch(4), None), Err(ControlError::NotFrozen { .. }))
    };
    assert!(refused(&r));
    let t = r.store.freeze(pg, PgEpoch(4));
    assert!(refused(&r), "the freeze is not durable yet");
    r.done(t);
    assert_eq!(r.store.windows(pg, PgEpoch(4), None), Ok(Vec::new()));
    let t = r.store.thaw(pg, PgEpoch(4));
    assert!(refused(&r), "it thaws");
    r.done(t);
}
