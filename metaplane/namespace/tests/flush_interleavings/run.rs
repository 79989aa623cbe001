//! What clients, the leader, S3 and strangers do, as a seed decides.

use crate::common::*;
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::attr::SetAttr;
use ebb_metaplane_protocol::command::{Command, CommandReply};
use ebb_metaplane_protocol::flush::{Adopt, ForeignObject};
use ebb_metaplane_protocol::op::{Op, RENAME_EXCHANGE};
use ebb_metaplane_protocol::xattr::XattrMode;
use ebb_metaplane_protocol::{FsError, NodeCall, Time};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};

pub(crate) struct Run {
    pub(crate) w: World,
    pub(crate) rng: StdRng,
    pub(crate) sessions: Vec<SessionId>,
    pub(crate) open: Vec<OpenFile>,
    /// Files without a name.
    pub(crate) unnamed: Vec<OpenFile>,
    /// Delegated directories: to whom, and the stamp.
    pub(crate) delegated: Vec<(InodeId, SessionId, u64)>,
    pub(crate) published: usize,
    pub(crate) foreign: bool,
    /// Few names and contents, so that names, etags and conditions recur; requests are lost often.
    pub(crate) few: bool,
    /// Files get other names, so often.
    pub(crate) links: f64,
    pub(crate) linked: usize,
    pub(crate) byte: u8,
    /// Who holds the groups, where that matters.
    pub(crate) node: Option<NodeId>,
    pub(crate) lost: Vec<InodeId>,
    pub(crate) given_up: usize,
    /// Files may be open without a handle (R59).
    pub(crate) lends: bool,
    /// Looks at files of groups that could have had a stand-in.
    pub(crate) clean: usize,
}

pub(crate) fn register(store: u128) -> Command {
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
    pub(crate) fn new(seed: u64, foreign: bool) -> Self {
        let mut w = World::new();
        let sessions = vec![w.session(), w.session()];
        let lends = seed.is_multiple_of(3);
        if lends {
            w.done(Command::Borrow(sessions[0]));
        }
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
            links: 0.0,
            linked: 0,
            byte: 0,
            node: None,
            lost: Vec::new(),
            given_up: 0,
            lends,
            clean: 0,
        }
    }
    pub(crate) fn dir(&mut self) -> InodeId {
        let mut dirs = vec![InodeId::ROOT];
        dirs.extend(self.w.tree().into_iter().filter(|(_, k)| k.ends_with('/')).map(|(i, _)| i));
        *dirs.choose(&mut self.rng).expect("the root")
    }
    pub(crate) fn name(&mut self) -> &'static str {
        NAMES.choose(&mut self.rng).expect("names")
    }
    pub(crate) fn session(&mut self) -> SessionId {
        *self.sessions.choose(&mut self.rng).expect("sessions")
    }
    pub(crate) fn bytes(&mut self) -> Vec<u8> {
        self.byte = self.byte.wrapping_add(1).max(1);
        let len = self.rng.random_range(1..6);
        vec![self.byte; len]
    }
    pub(crate) fn forget_gone(&mut self) {
        let w = &mut self.w;
        let gone: Vec<_> =
            w.expected.keys().copied().filter(|&i| w.read().attr(i).is_err()).collect();
        for i in gone {
            w.expected.remove(&i);
        }
    }

    /// Few names, few contents.
    pub(crate) fn recurring_step(&mut self) {
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

    /// A file gets another name, or one of its names goes to where another is.
    pub(crate) fn link_step(&mut self) {
        let s = self.session();
        let few = ["a", "b", "c"];
        let (d, n) = match self.few {
            true => (InodeId::ROOT, *few.choose(&mut self.rng).expect("names")),
            false => (self.dir(), self.name()),
        };
        let files = self.w.tree().into_iter().filter(|(_, k)| !k.ends_with('/'));
        let files: Vec<_> = files.map(|(id, _)| id).collect();
        let Some(&id) = files.choose(&mut self.rng) else { return };
        if self.rng.random_bool(0.2) {
            let _ = self.w.unlink(s, d, n);
        }
        self.linked += usize::from(self.w.link(s, id, d, n).is_ok());
        self.forget_gone();
    }

    pub(crate) fn client_step(&mut self) {
        let s = self.session();
        let (d, n) = (self.dir(), self.name());
        match self.rng.random_range(0..17) {
            12..16 => self.unnamed_step(s, d, n),
            16 => self.xattr_step(s),
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

    pub(crate) fn xattr_step(&mut self, s: SessionId) {
        let Some((inode, _)) = self.w.tree().choose(&mut self.rng).cloned() else { return };
        let name = [&b"user.a"[..], b"trusted.b"].choose(&mut self.rng).expect("names").to_vec();
        let value = self.rng.random_bool(0.7).then(|| self.bytes());
        let _ = self.w.op(s, Op::SetXattr { inode, name, value, how: XattrMode::Any });
    }

    /// Files that get their name late (R49 to R51).
    pub(crate) fn unnamed_step(&mut self, s: SessionId, d: InodeId, n: &str) {
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

    pub(crate) fn leader_step(&mut self) {
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
    pub(crate) fn session_dies(&mut self) {
        let i = self.rng.random_range(0..self.sessions.len());
        let dead = std::mem::replace(&mut self.sessions[i], SessionId(0));
        self.w.done(Command::EndSessions(vec![dead]));
        self.sessions[i] = self.w.session();
        if self.lends {
            self.w.done(Command::Borrow(self.sessions[i]));
        }
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

    pub(crate) fn steps(&mut self, steps: usize) {
        for step in 0..steps {
            if self.lends && step % 11 == 0 {
                self.w.reap();
            }
            if self.links > 0.0 && self.rng.random_bool(self.links) {
                self.link_step();
            }
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
    pub(crate) fn check_stand_ins(&mut self) {
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
    pub(crate) fn abandon(&mut self, store: u128) {
        let node = self.node.expect("registered");
        let w = &mut self.w;
        let cut_off = w.read().sequence().expect("readable");
        let held = |w: &World| -> BTreeSet<InodeId> {
            let of = |pg| w.read().held_in(PgId(pg), cut_off, None, usize::MAX).expect("readable");
            (0..64).flat_map(of).collect()
        };
        let mut had = BTreeMap::new();
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
            had.extend(inodes.iter().map(|id| (*id, w.xattrs(*id))));
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
                    assert_eq!(w.xattrs(new), had[&id]);
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
    pub(crate) fn register(&mut self, store: u128) {
        let CommandReply::Node(Ok(node)) = self.w.apply(register(store)) else { panic!("refused") };
        for pg in (0..64).map(PgId) {
            let from = self.w.read().map().expect("readable").pgs[usize::from(pg.0)].epoch;
            let members = vec![ShardRef { node, core: CoreId(0) }];
            self.w.done(Command::SetPg { pg, from, members });
        }
        self.node = Some(node);
    }

    /// Somebody replaces an object under a file that we hold in whole or not at all.
    pub(crate) fn stranger(&mut self) {
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
        if self.rng.random_bool(0.3) {
            let xattrs = vec![(b"user.theirs".to_vec(), bytes.clone())];
            self.w.bucket.objects.get_mut(&key).expect("put").xattrs = xattrs;
        }
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
