//! Random operations of several sessions against a plain model of a POSIX tree: same errno, same
//! listings, same sizes, links and modes. Each operation is sent twice now and then: it takes effect
//! once (I7). The log replayed gives the same bytes.

mod common;
use common::{check, is_again, seeds};
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::attr::SetAttr;
use ebb_metaplane_protocol::command::{Command, CommandReply, LogEntry, OpOutcome};
use ebb_metaplane_protocol::op::{Op, OpenMode, RENAME_EXCHANGE, RENAME_NOREPLACE};
use ebb_metaplane_protocol::{Attr, FileKind, FsError, FsResult, Query, QueryReply, Time};
use ebb_namespace::{Machine, MemKv, Reader};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const EEXIST: i32 = 17;
const ENOTDIR: i32 = 20;
const EISDIR: i32 = 21;
const EINVAL: i32 = 22;
const ENOTEMPTY: i32 = 39;
const ESTALE: i32 = 116;

#[derive(Clone, Debug)]
enum What {
    File,
    Dir(BTreeMap<String, u64>),
    Link(Vec<u8>),
}
#[derive(Clone, Debug)]
struct Node {
    what: What,
    mode: u32,
    size: u64,
    nlink: u32,
    parent: u64,
    open: u32,
}

/// The model: a tree as POSIX has it. Inode numbers are the machine's.
struct Model(BTreeMap<u64, Node>);

impl Model {
    fn dir(&self, id: u64) -> Result<&BTreeMap<String, u64>, i32> {
        match self.0.get(&id).map(|n| &n.what) {
            None => Err(ESTALE),
            Some(What::Dir(d)) => Ok(d),
            Some(_) => Err(ENOTDIR),
        }
    }
    fn entries(&mut self, id: u64) -> &mut BTreeMap<String, u64> {
        match &mut self.0.get_mut(&id).expect("a directory").what {
            What::Dir(d) => d,
            _ => unreachable!("checked"),
        }
    }
    fn is_dir(&self, id: u64) -> bool {
        matches!(self.0[&id].what, What::Dir(_))
    }
    fn add(&mut self, parent: u64, name: &str, id: u64, what: What, mode: u32) {
        let size = if let What::Link(t) = &what { t.len() as u64 } else { 0 };
        let is_dir = matches!(what, What::Dir(_));
        let nlink = if is_dir { 2 } else { 1 };
        self.0.insert(id, Node { what, mode, size, nlink, parent, open: 0 });
        self.entries(parent).insert(name.into(), id);
        if is_dir {
            self.0.get_mut(&parent).expect("parent").nlink += 1;
        }
    }
    fn drop_name(&mut self, id: u64) {
        let n = self.0.get_mut(&id).expect("it was there");
        n.nlink = if matches!(n.what, What::Dir(_)) { 0 } else { n.nlink - 1 };
        if n.open == 0 && n.nlink == 0 {
            self.0.remove(&id);
        }
    }
    fn within(&self, mut at: u64, of: u64) -> bool {
        while at != of {
            if at == 1 {
                return false;
            }
            at = self.0[&at].parent;
        }
        true
    }
    fn remove(&mut self, parent: u64, name: &str, rmdir: bool) -> Result<(), i32> {
        let id = *self.dir(parent)?.get(name).ok_or(ENOENT)?;
        match (self.is_dir(id), rmdir) {
            (true, false) => return Err(EISDIR),
            (false, true) => return Err(ENOTDIR),
            (true, true) if !self.dir(id)?.is_empty() => return Err(ENOTEMPTY),
            _ => {}
        }
        self.entries(parent).remove(name);
        if rmdir {
            self.0.get_mut(&parent).expect("parent").nlink -= 1;
        }
        self.drop_name(id);
        Ok(())
    }
    fn rename(&mut self, p: u64, n: &str, q: u64, m: &str, flags: u32) -> Result<(), i32> {
        let exchange = flags & RENAME_EXCHANGE != 0;
        let id = *self.dir(p)?.get(n).ok_or(ENOENT)?;
        let old = self.dir(q)?.get(m).copied();
        if old.is_some() && flags & RENAME_NOREPLACE != 0 {
            return Err(EEXIST);
        }
        if old.is_none() && exchange {
            return Err(ENOENT);
        }
        if self.is_dir(id) && self.within(q, id) {
            return Err(EINVAL);
        }
        if let Some(t) = old {
            if self.is_dir(t) && self.within(p, t) {
                return Err(if exchange { EINVAL } else { ENOTEMPTY });
            }
            if t == id {
                return Ok(());
            }
            match (self.is_dir(id), self.is_dir(t)) {
                _ if exchange => {}
                (true, false) => return Err(ENOTDIR),
                (false, true) => return Err(EISDIR),
                (true, true) if !self.dir(t)?.is_empty() => return Err(ENOTEMPTY),
                _ => {}
            }
        }
        self.entries(p).remove(n);
        self.entries(q).insert(m.into(), id);
        self.0.get_mut(&id).expect("source").parent = q;
        if self.is_dir(id) {
            self.0.get_mut(&p).expect("parent").nlink -= 1;
            self.0.get_mut(&q).expect("parent").nlink += 1;
        }
        let Some(t) = old else { return Ok(()) };
        if self.is_dir(t) {
            self.0.get_mut(&q).expect("parent").nlink -= 1;
        }
        if exchange {
            self.entries(p).insert(n.into(), t);
            self.0.get_mut(&t).expect("target").parent = p;
            if self.is_dir(t) {
                self.0.get_mut(&p).expect("parent").nlink += 1;
            }
        } else {
            self.drop_name(t);
        }
        Ok(())
    }
}

struct Run {
    kv: MemKv,
    log: Vec<LogEntry>,
    now: i64,
    sequence: BTreeMap<SessionId, u64>,
    rng: StdRng,
    model: Model,
    handles: Vec<(SessionId, HandleId, u64)>,
    linked: usize,
}

impl Run {
    fn apply(&mut self, command: Command) -> CommandReply {
        self.now += 1;
        let entry = LogEntry { now: Time(self.now), commands: vec![command] };
        self.log.push(entry.clone());
        Machine::apply(&mut self.kv, &entry).pop().expect("a reply")
    }
    fn op(&mut self, session: SessionId, op: Op) -> FsResult<OpOutcome> {
        let s = self.sequence.entry(session).or_default();
        *s += 1;
        let (sequence, below) = (Sequence(*s), Sequence(*s));
        let command = Command::Client { session, sequence, answered_below: below, op };
        let first = self.apply(command.clone());
        if self.rng.random_bool(0.2) {
            // The reply was lost; the client asks again.
            assert_eq!(self.apply(command), first, "a retry changed the answer");
        }
        match first {
            CommandReply::Op(r) => r,
            other => panic!("{other:?}"),
        }
    }
    fn check(&self, ours: &FsResult<OpOutcome>, model: &Result<(), i32>, op: &str) {
        assert!(!is_again(ours), "{op}: nothing is in the way here");
        let errno = ours.as_ref().err().map(FsError::errno);
        assert_eq!(errno, model.err(), "{op}: {ours:?}");
    }
    fn attr(&self, id: u64) -> FsResult<Attr> {
        match Machine::query(&self.kv, &Query::GetAttr(InodeId(id)))? {
            QueryReply::Attr(a) => Ok(a),
            other => panic!("{other:?}"),
        }
    }
    /// The whole tree agrees, whatever the page size.
    fn compare(&mut self) {
        let limit = self.rng.random_range(1..5);
        for (&id, node) in &self.model.0 {
            let a = self.attr(id).expect("the model has it");
            assert_eq!((a.mode, a.size, a.nlink), (node.mode, node.size, node.nlink), "{id}");
            match &node.what {
                What::Dir(entries) => {
                    let mut all = Vec::new();
                    loop {
                        let after =
                            all.last().map_or(Vec::new(), |(n, _): &(Vec<u8>, u64)| n.clone());
                        let q = Query::ReadDir { inode: InodeId(id), after, limit };
                        let Ok(QueryReply::Page { entries, end }) = Machine::query(&self.kv, &q)
                        else {
                            panic!("a directory lists")
                        };
                        all.extend(entries.into_iter().map(|e| (e.name, e.attr.inode.0)));
                        if end {
                            break;
                        }
                    }
                    let want: Vec<_> =
                        entries.iter().map(|(n, i)| (n.clone().into_bytes(), *i)).collect();
                    assert_eq!(all, want);
                    let q = Query::Parent(InodeId(id));
                    let Ok(QueryReply::Attr(p)) = Machine::query(&self.kv, &q) else {
                        panic!("a directory has a parent")
                    };
                    assert_eq!(p.inode.0, node.parent);
                }
                What::Link(target) => {
                    let q = Query::ReadLink(InodeId(id));
                    assert_eq!(Machine::query(&self.kv, &q), Ok(QueryReply::Link(target.clone())));
                }
                What::File => assert_eq!(a.kind, FileKind::File),
            }
        }
        let counts = Reader(&self.kv).counts().expect("readable");
        let more = |n: &Node| match n.what {
            What::Dir(_) => 0,
            _ => u64::from(n.nlink.saturating_sub(1)),
        };
        let other_names: u64 = self.model.0.values().map(more).sum();
        assert_eq!(counts.inodes, self.model.0.len() as u64 + other_names);
        let used = self.model.0.values().filter(|n| matches!(n.what, What::File));
        assert_eq!(counts.used_bytes, used.map(|n| n.size).sum::<u64>());
        let dirty = Reader(&self.kv).dirty_batch(10_000, Time(i64::MAX), None).expect("readable");
        assert_eq!(counts.dirty_inodes, dirty.len() as u64);
    }

    fn step(&mut self, sessions: &[SessionId]) {
        let s = *sessions.choose(&mut self.rng).expect("sessions");
        let ids: Vec<u64> = self.model.0.keys().copied().collect();
        let dirs: Vec<u64> = ids.iter().copied().filter(|&i| self.model.is_dir(i)).collect();
        // Mostly directories; now and then something that is none, or is gone.
        let parent = |rng: &mut StdRng| match rng.random_range(0..20) {
            0 => *ids.choose(rng).expect("the root"),
            1 => 999_999,
            _ => *dirs.choose(rng).expect("the root"),
        };
        let (p, q) = (parent(&mut self.rng), parent(&mut self.rng));
        let names = ["a", "b", "c", "d"];
        let n = *names.choose(&mut self.rng).expect("names");
        let m = *names.choose(&mut self.rng).expect("names");
        let (parent, name) = (InodeId(p), Vec::from(n));
        match self.rng.random_range(0..13) {
            0 | 1 => {
                let exclusive = self.rng.random_bool(0.3);
                let open = OpenMode { write: true, truncate: self.rng.random_bool(0.3) };
                let op = Op::Create {
                    parent,
                    name,
                    mode: 0o640,
                    uid: 1,
                    gid: 2,
                    exclusive,
                    open,
                    delegate: false,
                };
                let known = self.model.dir(p).map(|d| d.get(n).copied());
                let want = match known {
                    Err(e) => Err(e),
                    Ok(Some(_)) if exclusive => Err(EEXIST),
                    Ok(Some(id)) => match self.model.0[&id].what {
                        What::File => Ok(()),
                        What::Dir(_) => Err(EISDIR),
                        What::Link(_) => Err(EINVAL),
                    },
                    Ok(None) => Ok(()),
                };
                let got = self.op(s, op);
                self.check(&got, &want, "create");
                if let Ok(OpOutcome::Opened { attr, handle, created, grant, .. }) = got {
                    let id = attr.inode.0;
                    assert_eq!(created, known == Ok(None));
                    assert_eq!(grant.mode, GrantMode::Write);
                    assert!(attr.dirty, "no write grant without dirtiness (I2)");
                    if created {
                        self.model.add(p, n, id, What::File, 0o640);
                    } else if open.truncate {
                        self.model.0.get_mut(&id).expect("file").size = 0;
                    }
                    self.model.0.get_mut(&id).expect("file").open += 1;
                    self.handles.push((s, handle, id));
                }
            }
            2 => {
                let op = Op::Mkdir { parent, name, mode: 0o750, uid: 1, gid: 2 };
                let want = self.model.dir(p).and_then(|d| match d.get(n) {
                    Some(_) => Err(EEXIST),
                    None => Ok(()),
                });
                let got = self.op(s, op);
                self.check(&got, &want, "mkdir");
                if let Ok(OpOutcome::Attr(a)) = got {
                    self.model.add(p, n, a.inode.0, What::Dir(BTreeMap::new()), 0o750);
                }
            }
            3 => {
                let target = b"some/where".to_vec();
                let op = Op::Symlink { parent, name, target: target.clone(), uid: 1, gid: 2 };
                let want = self.model.dir(p).and_then(|d| match d.get(n) {
                    Some(_) => Err(EEXIST),
                    None => Ok(()),
                });
                let got = self.op(s, op);
                self.check(&got, &want, "symlink");
                if let Ok(OpOutcome::Attr(a)) = got {
                    self.model.add(p, n, a.inode.0, What::Link(target), 0o777);
                }
            }
            4 => {
                let got = self.op(s, Op::Unlink { parent, name });
                let want = self.model.remove(p, n, false);
                self.check(&got, &want, "unlink");
            }
            5 => {
                let got = self.op(s, Op::Rmdir { parent, name });
                let want = self.model.remove(p, n, true);
                self.check(&got, &want, "rmdir");
            }
            6 | 7 => {
                let flags = *[0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE]
                    .choose(&mut self.rng)
                    .expect("flags");
                let op =
                    Op::Rename { parent, name, new_parent: InodeId(q), new_name: m.into(), flags };
                let got = self.op(s, op);
                let want = self.model.rename(p, n, q, m, flags);
                self.check(&got, &want, &format!("rename {p}/{n} {q}/{m} {flags}"));
            }
            8 => {
                let id = *ids.choose(&mut self.rng).expect("the root");
                let size = self.rng.random_bool(0.5).then(|| self.rng.random_range(0..100));
                let mode = self.rng.random_range(0..0o10000);
                let set = SetAttr { mode: Some(mode), size, ..SetAttr::default() };
                let want = match (&self.model.0[&id].what, size) {
                    (What::Dir(_), Some(_)) => Err(EISDIR),
                    (What::Link(_), Some(_)) => Err(EINVAL),
                    _ => Ok(()),
                };
                let got = self.op(s, Op::SetAttr { inode: InodeId(id), set });
                if is_again(&got) {
                    // Eight cuts wait for acks: nothing changed.
                    for (notice, _) in Reader(&self.kv).notices(0, 10_000).expect("readable") {
                        self.apply(Command::NoticesDone(vec![notice]));
                    }
                    return;
                }
                self.check(&got, &want, "setattr");
                if got.is_ok() {
                    let node = self.model.0.get_mut(&id).expect("it lives");
                    node.mode = mode;
                    node.size = size.unwrap_or(node.size);
                }
            }
            11 | 12 => {
                let id = *ids.choose(&mut self.rng).expect("the root");
                let node = self.model.0[&id].clone();
                let want = match (&node.what, self.model.dir(p).map(|d| d.contains_key(n))) {
                    (What::Dir(_), _) => Err(EPERM),
                    (_, Err(e)) => Err(e),
                    (_, Ok(true)) => Err(EEXIST),
                    (_, Ok(false)) if node.nlink == 0 => Err(ENOENT),
                    _ => Ok(()),
                };
                let got = self.op(s, Op::Link { inode: InodeId(id), parent, name });
                self.check(&got, &want, "link");
                if let Ok(OpOutcome::Attr(a)) = got {
                    assert_eq!((a.inode.0, a.nlink), (id, node.nlink + 1));
                    self.model.entries(p).insert(n.into(), id);
                    self.model.0.get_mut(&id).expect("linked").nlink += 1;
                    self.linked += 1;
                }
            }
            _ if !self.handles.is_empty() => {
                let i = self.rng.random_range(0..self.handles.len());
                let (s, handle, id) = self.handles.swap_remove(i);
                let got = self.op(s, Op::Release { handle, commit: None });
                self.check(&got, &Ok(()), "release");
                let node = self.model.0.get_mut(&id).expect("open files live on");
                node.open -= 1;
                if node.open == 0 && node.nlink == 0 {
                    self.model.0.remove(&id);
                }
            }
            _ => {}
        }
    }
}

#[test]
fn the_tree_is_posix() {
    for seed in seeds(200) {
        println!("seed {seed}");
        let root = Node {
            what: What::Dir(BTreeMap::new()),
            mode: 0o755,
            size: 0,
            nlink: 2,
            parent: 1,
            open: 0,
        };
        let mut r = Run {
            kv: MemKv::default(),
            log: Vec::new(),
            now: 0,
            sequence: BTreeMap::new(),
            rng: StdRng::seed_from_u64(seed),
            model: Model([(1, root)].into()),
            handles: Vec::new(),
            linked: 0,
        };
        r.apply(Command::Format {
            cluster: ClusterId(1),
            pg_count: 64,
            incarnation: Incarnation(0),
            backed: false,
        });
        let mut sessions = Vec::new();
        for client in 0..3 {
            match r.apply(Command::OpenSession { client, label: "m".into() }) {
                CommandReply::Session(Ok(s)) => sessions.push(s),
                other => panic!("{other:?}"),
            }
        }
        for step in 0..400 {
            r.step(&sessions);
            if step % 20 == 0 {
                r.compare();
                assert_eq!(check(&r.kv), [], "seed {seed}, step {step}");
            }
        }
        r.compare();
        let mut other = MemKv::default();
        for entry in &r.log {
            Machine::apply(&mut other, entry);
        }
        assert!(other == r.kv, "seed {seed}: two voters differ");
        assert!(r.linked > 0, "no file got another name");
    }
}
