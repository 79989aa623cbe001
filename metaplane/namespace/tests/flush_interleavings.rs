//! Random interleavings of clients, flushes, S3 faults, leader crashes and strangers: at rest the
//! bucket holds exactly one object per name, with every acked byte, and nothing else (I1–I3, I6).

mod common;
use common::*;
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::Time;
use ebb_metaplane_protocol::attr::SetAttr;
use ebb_metaplane_protocol::command::Command;
use ebb_metaplane_protocol::flush::{Adopt, ForeignObject};
use ebb_metaplane_protocol::op::{Op, RENAME_EXCHANGE};
use ebb_namespace::{Machine, MemKv};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

struct Run {
    w: World,
    rng: StdRng,
    sessions: Vec<SessionId>,
    open: Vec<OpenFile>,
    foreign: bool,
    /// Few names and contents, so that names, etags and conditions recur; requests are lost often.
    few: bool,
    byte: u8,
}

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

impl Run {
    fn new(seed: u64, foreign: bool) -> Self {
        let mut w = World::new();
        let sessions = vec![w.session(), w.session()];
        Self {
            w,
            rng: StdRng::seed_from_u64(seed),
            sessions,
            open: Vec::new(),
            foreign,
            few: false,
            byte: 0,
        }
    }
    fn dir(&mut self) -> InodeId {
        let mut dirs = vec![InodeId::ROOT];
        dirs.extend(self.w.tree().into_iter().filter(|(_, k)| k.ends_with('/')).map(|(i, _)| i));
        *dirs.choose(&mut self.rng).expect("the root")
    }
    fn name(&mut self) -> &'static str {
        NAMES.choose(&mut self.rng).expect("names")
    }
    fn session(&mut self) -> SessionId {
        *self.sessions.choose(&mut self.rng).expect("sessions")
    }
    fn bytes(&mut self) -> Vec<u8> {
        self.byte = self.byte.wrapping_add(1).max(1);
        let len = self.rng.random_range(1..6);
        vec![self.byte; len]
    }
    fn forget_gone(&mut self) {
        let w = &mut self.w;
        let gone: Vec<_> =
            w.expected.keys().copied().filter(|&i| w.read().attr(i).is_err()).collect();
        for i in gone {
            w.expected.remove(&i);
        }
    }

    /// Few names, few contents.
    fn recurring_step(&mut self) {
        let s = self.session();
        let names = ["a", "b"];
        let name = *names.choose(&mut self.rng).expect("names");
        let body: &[u8] = [&b""[..], b"", b"one", b"two"].choose(&mut self.rng).expect("bodies");
        match self.rng.random_range(0..8) {
            0..=2 => {
                let _ = self.w.unlink(s, InodeId::ROOT, name);
            }
            3 => {
                let other = if name == "a" { "b" } else { "a" };
                let _ = self.w.rename(s, (InodeId::ROOT, name), (InodeId::ROOT, other));
            }
            4 => {
                let found = self.w.lookup(InodeId::ROOT, name).map(|a| a.inode);
                if let Ok(inode) = found {
                    let mode = Some([0o600, 0o644].choose(&mut self.rng).copied().expect("modes"));
                    let set = SetAttr { mode, ..SetAttr::default() };
                    let _ = self.w.op(s, Op::SetAttr { inode, set });
                }
            }
            5 => {
                // Of "one" and "two", only "two" is as it was.
                let found = self.w.lookup(InodeId::ROOT, name).map(|a| a.inode);
                if let Ok(mut f) = found.and_then(|i| self.w.open(s, i, WRITE)) {
                    let _ = self.w.write(&mut f, 1, b"w");
                    self.w.close(f).expect("a release never fails");
                }
            }
            _ => {
                if let Ok(mut f) = self.w.create(s, InodeId::ROOT, name) {
                    if self.w.attr(f.inode).size > 0 {
                        let _ = self.w.truncate(s, f.inode, 0);
                    }
                    if !body.is_empty() {
                        let _ = self.w.write(&mut f, 0, body);
                    }
                    self.w.close(f).expect("a release never fails");
                }
            }
        }
        self.forget_gone();
    }

    fn client_step(&mut self) {
        let s = self.session();
        let (d, n) = (self.dir(), self.name());
        match self.rng.random_range(0..12) {
            0 | 1 => {
                if let Ok(f) = self.w.create(s, d, n) {
                    self.open.push(f);
                }
            }
            2..=4 if !self.open.is_empty() => {
                let i = self.rng.random_range(0..self.open.len());
                let mut f = self.open.swap_remove(i);
                let bytes = self.bytes();
                if self.foreign {
                    // Whole contents only: a lost base is EIO by design.
                    let bytes = [bytes.as_slice(), &[0; 12][bytes.len()..]].concat();
                    let _ = self.w.write(&mut f, 0, &bytes);
                } else {
                    let at = self.rng.random_range(0..8);
                    let _ = self.w.write(&mut f, at, &bytes);
                }
                if self.rng.random_bool(0.5) {
                    let _ = self.w.commit(&mut f);
                }
                self.open.push(f);
            }
            5 if !self.open.is_empty() => {
                let i = self.rng.random_range(0..self.open.len());
                let f = self.open.swap_remove(i);
                self.w.close(f).expect("a release never fails");
            }
            6 => {
                let _ = self.w.unlink(s, d, n);
            }
            7 | 8 => {
                let (to, m) = (self.dir(), self.name());
                let flags = if self.rng.random_bool(0.2) { RENAME_EXCHANGE } else { 0 };
                let _ = self.w.op(
                    s,
                    Op::Rename {
                        parent: d,
                        name: n.into(),
                        new_parent: to,
                        new_name: m.into(),
                        flags,
                    },
                );
            }
            9 => {
                let _ = self.w.mkdir(s, d, n);
            }
            10 => {
                let _ = self.w.op(s, Op::Rmdir { parent: d, name: n.into() });
            }
            _ if !self.foreign && !self.w.expected.is_empty() => {
                let all: Vec<_> = self.w.expected.keys().copied().collect();
                let i = *all.choose(&mut self.rng).expect("files");
                let size = self.rng.random_range(0..12);
                let _ = self.w.truncate(s, i, size);
            }
            _ => {}
        }
        self.forget_gone();
    }

    fn leader_step(&mut self) {
        match self.rng.random_range(0..14) {
            0..=2 => {
                let batch = self.w.read().dirty_batch(20, Time(i64::MAX), None).expect("readable");
                let some: Vec<_> =
                    batch.iter().map(|d| d.inode).filter(|_| self.rng.random_bool(0.5)).collect();
                let via = self.rng.random_bool(0.1);
                self.w.begin_flush(some, via);
            }
            3..=5 if !self.w.begun.is_empty() => {
                let i = self.rng.random_range(0..self.w.begun.len());
                let t = self.w.begun.swap_remove(i);
                if self.rng.random_bool(0.15) {
                    if t.needs_seal && self.rng.random_bool(0.5) {
                        // Some primary had sealed already.
                        self.w.seal_only(&t);
                    }
                    self.w.done(Command::FlushAbort(vec![t.inode]));
                } else {
                    let plan = self.w.seal(&t);
                    self.w.take_plan(t.inode, plan);
                }
            }
            6..=8 if !self.w.flights.is_empty() => {
                let i = self.rng.random_range(0..self.w.flights.len());
                let fate = *[
                    Fate::Fine,
                    Fate::Fine,
                    Fate::Fine,
                    Fate::LostReply,
                    Fate::LostRequest,
                    Fate::Refused,
                ]
                .choose(&mut self.rng)
                .expect("fates");
                let lost = self.few && self.rng.random_bool(0.3);
                let fate = if lost { Fate::LostRequest } else { fate };
                let ambiguous = self.rng.random_bool(0.5);
                self.w.flight_done(i, fate, ambiguous);
            }
            9 => {
                let notices = self.w.read().notices(0, 20).expect("readable");
                if let Some((id, n)) = notices.choose(&mut self.rng).cloned() {
                    self.w.deliver(id, &n);
                }
            }
            10 => self.w.begin_deletes(3),
            11 => {
                self.w.look_up_keys();
                self.w.look_again();
            }
            12 => self.w.done(Command::MoveStep(2)),
            13 if self.rng.random_bool(0.2) => self.w.crash_leader(),
            _ => {
                let via = std::mem::take(&mut self.w.via_temporary);
                self.w.begin_flush(via, true);
                let first = std::mem::take(&mut self.w.blocked);
                self.w.begin_flush(first, false);
            }
        }
        if !self.w.zombies.is_empty() && self.rng.random_bool(0.05) {
            let i = self.rng.random_range(0..self.w.zombies.len());
            let arrives = self.rng.random_bool(0.5);
            self.w.zombie_acts(i, arrives);
        }
    }

    /// A session dies; its client does not know yet and goes on writing.
    fn session_dies(&mut self) {
        let i = self.rng.random_range(0..self.sessions.len());
        let dead = std::mem::replace(&mut self.sessions[i], SessionId(0));
        self.w.done(Command::EndSessions(vec![dead]));
        self.sessions[i] = self.w.session();
        let (mut gone, live) = std::mem::take(&mut self.open)
            .into_iter()
            .partition::<Vec<_>, _>(|f| f.session == dead);
        self.open = live;
        for f in &mut gone {
            if !self.foreign && self.w.read().attr(f.inode).is_ok() {
                let bytes = self.bytes();
                let _ = self.w.write_once(f, 0, &bytes);
            }
        }
        self.forget_gone();
    }

    fn steps(&mut self, steps: usize) {
        for _ in 0..steps {
            match self.rng.random_range(0..100) {
                0..15 if self.few => self.recurring_step(),
                0..45 if !self.few => self.client_step(),
                0..45 => self.leader_step(),
                45..98 => self.leader_step(),
                98 if self.foreign => self.stranger(),
                _ if !self.foreign && self.rng.random_bool(0.5) => self.session_dies(),
                _ => {}
            }
        }
    }

    /// Somebody replaces an object under a file that we hold in whole or not at all.
    fn stranger(&mut self) {
        let files: Vec<_> = self
            .w
            .tree()
            .into_iter()
            .filter(|(_, k)| !k.ends_with('/') && self.w.bucket.objects.contains_key(k))
            .filter(|(i, k)| {
                // A moved inode's source would be lost; that is EIO, and another test's business.
                let owner = self.w.read().owner_of(k).expect("readable");
                let a = self.w.attr(*i);
                owner == Some(*i) && !a.dirty
            })
            .collect();
        let Some((inode, key)) = files.choose(&mut self.rng).cloned() else { return };
        let r = self.w.read().revalidation(inode).expect("readable").expect("clean");
        let bytes = [self.bytes(), vec![9; 12]].concat();
        let etag = self.w.bucket.foreign_put(&key, &bytes[..12]);
        if self.rng.random_bool(0.5) {
            // Seen at once; else the next flush runs into it, if one comes.
            let attrs = attrs_of(&self.w.bucket.objects[&key]);
            let object = Some(ForeignObject { etag, size: 12, attrs });
            self.w.done(Command::Adopt(vec![Adopt {
                inode,
                lineage: r.lineage,
                old_etag: Some(r.etag),
                object,
            }]));
            self.w.expected.insert(inode, bytes[..12].to_vec());
        } else {
            // Written over in whole at once, so that nothing needs the lost base.
            let s = self.session();
            if let Ok(mut f) = self.w.open(s, inode, WRITE) {
                let _ = self.w.write(&mut f, 0, &[self.byte; 12]);
                self.w.close(f).expect("a release never fails");
            }
        }
    }
}

fn run(seed: u64, foreign: bool, steps: usize) -> Run {
    let mut r = Run::new(seed, foreign);
    r.steps(steps);
    r
}

fn finish(r: &mut Run) {
    for f in std::mem::take(&mut r.open) {
        r.w.close(f).expect("a release never fails");
    }
    r.w.settle_all();
}

#[test]
fn at_rest_the_bucket_is_the_tree() {
    for seed in seeds(400) {
        println!("seed {seed}");
        let mut r = run(seed, false, 300);
        finish(&mut r);
        r.w.check_bucket();
    }
}

#[test]
fn strangers_objects_and_ours_both_survive() {
    for seed in seeds(300) {
        println!("seed {seed}");
        let mut r = run(seed, true, 300);
        finish(&mut r);
        // Objects that appeared by conflicts are inodes now: their content is the stranger's.
        for (id, key) in r.w.tree() {
            if !key.ends_with('/') && !r.w.expected.contains_key(&id) {
                let body = r.w.bucket.objects[&key].body.clone();
                assert!(r.w.bucket.foreign.contains(&body), "whose is {key}?");
                r.w.expected.insert(id, body);
            }
        }
        r.w.check_bucket();
    }
}

fn with_late_requests(seed: u64, doubts: bool) {
    let mut r = Run::new(seed, false);
    r.few = true;
    r.w.doubts = doubts;
    r.steps(500);
    finish(&mut r);
    r.w.check_bucket();
}

/// Nothing that was credited is changed by a request that arrives late, and no removed file comes
/// back (R32, R33).
#[test]
fn requests_that_arrive_late_do_no_harm() {
    for seed in seeds(600) {
        println!("seed {seed}");
        with_late_requests(seed, true);
    }
}

/// R33 is what keeps late requests harmless: without it some interleaving ends badly.
#[test]
fn without_the_rule_of_dangling_attempts_a_late_request_does_harm() {
    let hurt = seeds(100)
        .into_iter()
        .filter(|&seed| std::panic::catch_unwind(|| with_late_requests(seed, false)).is_err());
    assert!(hurt.count() > 0, "the test of the rule can't fail");
}

#[test]
fn the_same_log_gives_the_same_bytes() {
    for seed in seeds(20) {
        println!("seed {seed}");
        let mut r = run(seed, false, 300);
        finish(&mut r);
        let mut other = MemKv::default();
        for entry in &r.w.log {
            Machine::apply(&mut other, entry);
        }
        assert!(other == r.w.kv, "seed {seed}: two voters differ");
    }
}
