//! Random interleavings of clients, flushes, S3 faults, leader crashes and strangers: at rest the
//! bucket holds exactly one object per name, with every acked byte, and nothing else (I1–I3, I6).

mod common;
use common::*;
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::attr::SetAttr;
use ebb_metaplane_protocol::command::{Command, CommandReply};
use ebb_metaplane_protocol::dump::Object;
use ebb_metaplane_protocol::flush::{Adopt, ForeignObject};
use ebb_metaplane_protocol::op::{Op, OpenMode, RENAME_EXCHANGE};
use ebb_metaplane_protocol::{FsError, NodeCall, Time};
use ebb_namespace::{Machine, MemKv};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};

struct Run {
    w: World,
    rng: StdRng,
    sessions: Vec<SessionId>,
    open: Vec<OpenFile>,
    /// Files without a name.
    unnamed: Vec<OpenFile>,
    /// Delegated directories: to whom, and the stamp.
    delegated: Vec<(InodeId, SessionId, u64)>,
    published: usize,
    foreign: bool,
    /// Few names and contents, so that names, etags and conditions recur; requests are lost often.
    few: bool,
    byte: u8,
    /// Who holds the groups, where that matters.
    node: Option<NodeId>,
    lost: Vec<InodeId>,
    given_up: usize,
    /// Looks at files of groups that could have had a stand-in.
    clean: usize,
}

fn register(store: u128) -> Command {
    Command::RegisterNode(NodeCall::Register {
        store,
        host: "h".into(),
        ports: vec![1],
        capacity_bytes: 1 << 30,
        boot: 1,
    })
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
            unnamed: Vec::new(),
            delegated: Vec::new(),
            published: 0,
            foreign,
            few: false,
            byte: 0,
            node: None,
            lost: Vec::new(),
            given_up: 0,
            clean: 0,
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
        match self.rng.random_range(0..16) {
            12..16 => self.unnamed_step(s, d, n),
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

    /// Files that get their name late (R49 to R51).
    fn unnamed_step(&mut self, s: SessionId, d: InodeId, n: &str) {
        if self.unnamed.is_empty() {
            self.unnamed = self.w.reserve(s, 3).expect("room");
        }
        let i = self.rng.random_range(0..self.unnamed.len());
        match self.rng.random_range(0..9) {
            0 | 6 => {
                if let Ok((f, given)) = self.w.create_for_names(s, d, n) {
                    self.delegated.extend(given.map(|g| (d, s, g.stamp)));
                    self.open.push(f);
                }
            }
            1 => {
                let bytes = self.bytes();
                let f = &mut self.unnamed[i];
                let _ = self.w.write(f, 0, &bytes);
                if self.rng.random_bool(0.3) {
                    let _ = self.w.commit(f);
                }
            }
            // What was written has to leave its node before the file has a name.
            2 if !self.foreign => {
                let inode = self.unnamed[i].inode;
                self.w.begin_flush(vec![inode], true);
            }
            3 if !self.delegated.is_empty() => {
                let k = self.rng.random_range(0..self.delegated.len());
                let (dir, holder, stamp) = self.delegated.swap_remove(k);
                let _ = self.w.op(holder, Op::ReturnNames { dirs: vec![(dir, stamp)] });
            }
            4 => {
                // Handles of files that never get a name end as well.
                let f = self.unnamed.swap_remove(i);
                self.w.close(f).expect("a release never fails");
            }
            _ => {
                let mut f = self.unnamed.swap_remove(i);
                // Mostly where it may.
                let own = self.delegated.iter().filter(|x| x.1 == f.session).map(|x| x.0);
                let own: Vec<_> = own.filter(|&x| self.w.read().attr(x).is_ok()).collect();
                let d = match own.choose(&mut self.rng) {
                    Some(own) if self.rng.random_bool(0.8) => *own,
                    _ => d,
                };
                let before = self.w.read().delegated_to_another(d, SessionId(0)).expect("readable");
                match self.w.publish(&mut f, d, n) {
                    Ok(attr) => {
                        assert_eq!(before, Some(f.session), "the names are another's");
                        // That one, or beside a file that was there.
                        let path = self.w.read().path_of(f.inode).expect("it has a name");
                        let name = std::str::from_utf8(path.last().expect("a name")).expect("text");
                        assert!(name == n || name.starts_with(&format!("{n}.conflict-")), "{name}");
                        let found = self.w.lookup(d, name).expect("it has a name").inode;
                        assert_eq!((found, attr.nlink), (f.inode, 1));
                        self.published += 1;
                        self.open.push(f);
                    }
                    Err(_) => self.unnamed.push(f),
                }
            }
        }
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
        let (dead_too, live) = std::mem::take(&mut self.unnamed)
            .into_iter()
            .partition::<Vec<_>, _>(|f| f.session == dead);
        self.unnamed = live;
        for f in &dead_too {
            assert!(self.w.read().attr(f.inode).is_err(), "it went with its session");
        }
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
            if !self.foreign {
                self.check_stand_ins();
            }
        }
    }

    /// R24: of a group that may get a stand-in, S3 alone has every acknowledged byte; and the table that says so
    /// agrees with the inodes.
    fn check_stand_ins(&mut self) {
        let r = self.w.read();
        for (inode, want) in &self.w.expected {
            let Ok(grant) = r.grant_view(*inode) else { continue };
            let pg = PgId::of(*inode, RunIndex(0), 64);
            let held = r.held_in(pg, u64::MAX, None, usize::MAX).expect("readable");
            let may = grant.alloc_limit > 0 && grant.generation > grant.view.clean_generation;
            assert_eq!(held.contains(inode), may, "{inode}: the table is another");
            assert_eq!(r.may_stand_in(pg, u64::MAX), Ok(held.is_empty()));
            if held.contains(inode) {
                continue;
            }
            self.clean += 1;
            let mut seen = match &grant.view.backing {
                None => Vec::new(),
                Some(b) => {
                    let o = self.w.bucket.objects.get(&b.key).filter(|o| o.etag == b.etag);
                    let o = o.unwrap_or_else(|| panic!("{inode}: its object is not there"));
                    o.body[..b.valid_bytes() as usize].to_vec()
                }
            };
            seen.resize(want.len(), 0);
            assert!(seen == *want, "{inode}: a stand-in would serve {seen:?}, acked is {want:?}");
        }
    }

    /// The one node is gone with all that it held, and a person says so.
    fn abandon(&mut self, store: u128) {
        let node = self.node.expect("registered");
        let w = &mut self.w;
        let cut_off = w.read().sequence().expect("readable");
        let held = |w: &World| -> BTreeSet<InodeId> {
            let of = |pg| w.read().held_in(PgId(pg), cut_off, None, usize::MAX).expect("readable");
            (0..64).flat_map(of).collect()
        };
        w.node.clear();
        for t in std::mem::take(&mut w.begun) {
            w.done(Command::FlushAbort(vec![t.inode]));
        }
        let names: BTreeMap<InodeId, String> = w.tree().into_iter().collect();
        let mut given_up = BTreeMap::new();
        while !held(w).is_empty() {
            let inodes: Vec<InodeId> = held(w).into_iter().collect();
            let refused = w.apply(Command::RemoveNode { node, cut_off });
            assert!(matches!(refused, CommandReply::Refused(_)), "{inodes:?} would be lost");
            for id in &inodes {
                let base = w.read().grant_view(*id).ok().and_then(|g| g.view.backing);
                let told = w.read().given_up(*id).expect("readable").expect("there");
                assert_eq!(told.stored, base.as_ref().map(|b| b.length));
                given_up.insert(*id, base);
            }
            w.done(Command::AbandonInodes { node, cut_off, inodes });
            // What was on its way to S3 is settled.
            w.crash_leader();
            w.look_up_keys();
        }
        // A request whose reply was lost may land over an object that a file went back to: an outside change to it. Here
        // none does from now on; of those that have, the next comparison tells.
        while !w.zombies.is_empty() {
            w.zombie_acts(0, false);
        }
        given_up.retain(|id, _| w.read().attr(*id).is_err());
        for (id, base) in given_up {
            w.expected.remove(&id);
            let Some(key) = names.get(&id) else { continue };
            let (new, _) = w.tree().into_iter().find(|(_, k)| k == key).expect("the name stays");
            self.given_up += 1;
            match base {
                Some(b) => {
                    let o = w.bucket.objects[&b.key].clone();
                    if o.etag == b.etag {
                        let found = (new, o.etag.clone(), attrs_of(&o));
                        w.done(Command::SetIngestAttrs(vec![found]));
                    } else {
                        assert!(w.read().is_given_up(&b.key, o.nonce.expect("ours")).is_ok());
                        let lineage = w.read().attr(new).expect("there").0.lineage;
                        let (attrs, size) = (attrs_of(&o), o.body.len() as u64);
                        let object = Some(ForeignObject { etag: o.etag.clone(), size, attrs });
                        let (inode, old_etag) = (new, Some(b.etag));
                        w.done(Command::Adopt(vec![Adopt { inode, lineage, old_etag, object }]));
                    }
                    assert_eq!(w.attr(new).size, o.body.len() as u64);
                    w.expected.insert(new, o.body);
                }
                None => {
                    let s = self.sessions[0];
                    for mode in [READ, WRITE] {
                        let refused = w.open(s, new, mode);
                        assert!(matches!(refused, Err(FsError::Io(_))), "{key}: {refused:?}");
                    }
                    assert!(!w.attr(new).dirty);
                    self.lost.push(new);
                }
            }
        }
        w.done(Command::RemoveNode { node, cut_off });
        let map = w.read().map().expect("readable");
        assert!(map.nodes.is_empty() && map.pgs.iter().all(|g| g.members.is_empty()));
        let again = w.apply(register(store));
        assert!(matches!(again, CommandReply::Node(Err(FsError::NotPermitted(_)))), "{again:?}");
        self.open.retain(|f| w.read().attr(f.inode).is_ok());
        self.register(store + 1);
    }

    /// A node that holds every group.
    fn register(&mut self, store: u128) {
        let CommandReply::Node(Ok(node)) = self.w.apply(register(store)) else { panic!("refused") };
        for pg in (0..64).map(PgId) {
            let from = self.w.read().map().expect("readable").pgs[usize::from(pg.0)].epoch;
            let members = vec![ShardRef { node, core: CoreId(0) }];
            self.w.done(Command::SetPg { pg, from, members });
        }
        self.node = Some(node);
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
    let unnamed = std::mem::take(&mut r.unnamed);
    for f in std::mem::take(&mut r.open).into_iter().chain(unnamed) {
        r.w.close(f).expect("a release never fails");
    }
    r.forget_gone();
    r.w.settle_all();
}

#[test]
fn at_rest_the_bucket_is_the_tree() {
    let (mut clean, mut published) = (0, 0);
    for seed in seeds(400) {
        println!("seed {seed}");
        let mut r = run(seed, false, 300);
        clean += r.clean;
        published += r.published;
        finish(&mut r);
        r.w.check_bucket();
    }
    assert!(published > 200, "only {published} files got their name late");
    assert!(clean > 1_000, "only {clean} looks at what a stand-in would serve");
}

/// Whatever is under way: the dump of a moment has every name with its attributes and its object, and what is made
/// of it is sound. Only what nodes alone had is not as it was, and it says so.
#[test]
fn a_dump_of_any_moment_loads_as_a_sound_namespace() {
    let (mut names, mut unstored, mut lost, mut dirty) = (0, 0, 0, 0);
    for seed in seeds(200) {
        println!("seed {seed}");
        let r = run(seed, seed % 3 == 0, 20 + seed as usize % 280);
        let records = dump(&r.w.kv, 1 + seed as usize % 7);
        assert_eq!(records, dump(&r.w.kv, 1000), "seed {seed}: whatever the page size");
        let (kv, replies) = load(&records, 1 + seed as usize % 5);
        assert!(replies.iter().all(|r| *r == CommandReply::Done), "seed {seed}: {replies:?}");
        assert_eq!(check(&kv), [], "seed {seed}");
        let again = dump(&kv, 100);
        assert_eq!(records.len(), again.len(), "seed {seed}");
        let owned = |key: &str| {
            records.iter().filter(|r| r.object.as_ref().is_some_and(|o| o.key == key)).count()
        };
        for (was, is) in records.iter().zip(&again) {
            let mut want = was.clone();
            names += 1;
            if let Some(o) = was.object.as_ref().filter(|o| owned(&o.key) > 1) {
                // Two names of one object: one of them has lost it to a stranger.
                println!("seed {seed}: '{}' at {}", was.path, o.key);
                assert_eq!((&was.path, was.kind), (&is.path, is.kind));
                continue;
            }
            // Of a directory that was renamed a moment ago not all is marked yet.
            let moved = |o: &Object| o.key.trim_end_matches('/') != was.path;
            want.dirty |= was.object.as_ref().is_some_and(moved);
            if was.unstored {
                unstored += 1;
                want.unstored = false;
                want.dirty = is.dirty;
                match &mut want.object {
                    Some(o) => {
                        (want.size, o.valid, want.unseen) = (o.length, o.length, true);
                    }
                    None => {
                        lost += 1;
                        (want.lost, want.dirty) = (true, false);
                    }
                }
            }
            dirty += usize::from(is.dirty);
            assert_eq!(&want, is, "seed {seed}");
            assert!(is.dirty || !was.dirty || is.lost || was.unstored, "seed {seed}: {was:?}");
        }
        // A load that goes on from its start adds nothing.
        let twice: Vec<_> = records.iter().chain(&records).cloned().collect();
        let again = load(&twice, 3).0;
        assert_eq!(dump(&again, 100), dump(&kv, 100), "seed {seed}: loaded twice");
    }
    println!("{names} names, {unstored} with bytes on nodes only, {lost} lost, {dirty} dirty");
    assert!(unstored > 100 && lost > 50 && dirty > 100, "{unstored} {lost} {dirty}");
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

/// What S3 has of a file that was given up stays, byte for byte; what it never had is an error, never zeros (I4); and the rest
/// goes on as if nothing had been.
#[test]
fn an_abandoned_node_takes_along_what_only_it_had_and_nothing_else() {
    let (mut given_up, mut lost) = (0, 0);
    for seed in seeds(200) {
        println!("seed {seed}");
        let mut r = Run::new(seed, false);
        r.register(1);
        for round in 1..4 {
            r.steps(60);
            r.abandon(round);
        }
        (given_up, lost) = (given_up + r.given_up, lost + r.lost.len());
        r.steps(60);
        let unnamed = std::mem::take(&mut r.unnamed);
        for f in std::mem::take(&mut r.open).into_iter().chain(unnamed) {
            r.w.close(f).expect("a release never fails");
        }
        for (i, id) in std::mem::take(&mut r.lost).into_iter().enumerate() {
            let Ok((attr, _)) = r.w.read().attr(id) else { continue };
            if r.w.expected.contains_key(&id) || attr.nlink == 0 {
                continue;
            }
            // Written anew by who truncates it.
            let s = r.sessions[i % 2];
            if i % 2 == 0 {
                r.w.truncate(s, id, 0).expect("overwritten");
            } else {
                let mode = OpenMode { write: true, truncate: true };
                let f = r.w.open(s, id, mode).expect("overwritten");
                r.w.expected.insert(id, Vec::new());
                r.w.close(f).expect("a release never fails");
            }
        }
        r.w.settle_all();
        assert_eq!(r.w.read().counts().expect("readable").lost_files, 0);
        r.w.check_bucket();
    }
    assert!(given_up > 100 && lost > 20, "{given_up} given up, {lost} of them lost");
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
