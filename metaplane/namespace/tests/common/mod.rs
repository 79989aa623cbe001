//! A small world around the state machine: one node, one bucket, a leader that can crash, clients
//! that write under grants. Everything is decided by a seed; nothing is timed.
#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test binary uses its part")]

mod bucket;
mod cold;
mod late;
mod node;
mod states;
mod unnamed;
pub use bucket::{Bucket, Object};
use late::left_over;
use node::Held;
pub use states::{check, dump, load};

use ebb_dataplane_protocol::control::PutCondition;
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::attr::SetAttr;
use ebb_metaplane_protocol::check::Finding;
use ebb_metaplane_protocol::command::{Command, CommandReply, LogEntry, OpOutcome};
use ebb_metaplane_protocol::dump::{LoadStep, Record};
use ebb_metaplane_protocol::flush::*;
use ebb_metaplane_protocol::op::{CommitWrite, Op, OpenMode};
use ebb_metaplane_protocol::{Attr, FileKind, FsError, FsResult, Query, QueryReply, Time};
use ebb_namespace::{Check, FlushStage, Machine, MemKv, Reader, Walk};
use std::collections::{BTreeMap, BTreeSet};

pub const WRITE: OpenMode = OpenMode { write: true, truncate: false };
/// Time between two commands.
pub const STEP_NS: i64 = 10_000;
/// Validity of a signature: a hundred commands.
pub const VALID_MS: u64 = 1;
pub const READ: OpenMode = OpenMode { write: false, truncate: false };

/// Seeds of a run: `EBB_SEED` alone, or from 1 to `EBB_SEEDS` (else `count`).
#[expect(clippy::disallowed_methods, reason = "a test's own settings")]
pub fn seeds(count: u64) -> Vec<u64> {
    let number = |name| std::env::var(name).ok().and_then(|s| s.parse().ok());
    match number("EBB_SEED") {
        Some(seed) => vec![seed],
        None => (1..=number("EBB_SEEDS").unwrap_or(count)).collect(),
    }
}

const SOURCE_CHANGED: &str = "source changed";
const BASE_GONE: &str = "base gone";

/// Result of an upload's body.
enum Body {
    Bytes(Vec<u8>),
    NotSealed,
    BaseGone,
}

/// An open file of a client.
#[derive(Clone, Debug)]
pub struct OpenFile {
    pub session: SessionId,
    pub handle: HandleId,
    pub inode: InodeId,
    pub grant: Grant,
    pub ends: Vec<(Generation, u64)>,
}

/// An S3 mutation under way.
#[derive(Clone, Debug)]
pub enum Flight {
    Put { plan: Box<StorePlan>, object: Option<Object> },
    Delete { key: String, nonce: u128, condition: PutCondition },
}
impl Flight {
    pub fn nonce(&self) -> u128 {
        match self {
            Self::Put { plan, .. } => plan.nonce,
            Self::Delete { nonce, .. } => *nonce,
        }
    }
    pub fn key(&self) -> &str {
        match self {
            Self::Put { plan, .. } => &plan.key,
            Self::Delete { key, .. } => key,
        }
    }
}

/// How an S3 call goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Fine,
    /// It happened; nobody heard.
    LostReply,
    /// It never arrived; nobody knows.
    LostRequest,
    Refused,
}

#[derive(Clone, Debug)]
pub struct World {
    pub kv: MemKv,
    pub log: Vec<LogEntry>,
    pub now: i64,
    nonces: u128,
    sequences: BTreeMap<SessionId, u64>,
    pub node: BTreeMap<InodeId, Held>,
    pub bucket: Bucket,
    pub begun: Vec<FlushTicket>,
    pub flights: Vec<Flight>,
    /// Sent, and never answered: may still happen until then.
    pub zombies: Vec<(Flight, i64)>,
    /// Whether the leader says so (R33).
    pub doubts: bool,
    /// Keys and inodes of stores that landed in time, and those whose object we deleted after it
    /// (with the last nonce by then).
    sent: BTreeSet<(String, InodeId)>,
    removed: BTreeMap<(String, InodeId), u128>,
    /// What each inode must hold: acked writes.
    pub expected: BTreeMap<InodeId, Vec<u8>>,
    pub blocked: Vec<InodeId>,
    pub via_temporary: Vec<InodeId>,
}

impl World {
    pub fn new() -> Self {
        Self::format(false)
    }
    pub fn format(backed: bool) -> Self {
        let mut w = Self {
            kv: MemKv::default(),
            log: Vec::new(),
            now: 1_000_000,
            nonces: 0,
            sequences: BTreeMap::new(),
            node: BTreeMap::new(),
            bucket: Bucket::default(),
            begun: Vec::new(),
            flights: Vec::new(),
            zombies: Vec::new(),
            doubts: true,
            sent: BTreeSet::new(),
            removed: BTreeMap::new(),
            expected: BTreeMap::new(),
            blocked: Vec::new(),
            via_temporary: Vec::new(),
        };
        let format = Command::Format {
            cluster: ClusterId(7),
            pg_count: 64,
            incarnation: Incarnation(1),
            backed,
        };
        assert_eq!(w.apply(format), CommandReply::Done);
        w
    }
    pub fn apply(&mut self, command: Command) -> CommandReply {
        self.now += STEP_NS;
        let entry = LogEntry { now: Time(self.now), commands: vec![command] };
        let reply = Machine::apply(&mut self.kv, &entry).pop().expect("one reply per command");
        self.log.push(entry);
        // Whatever happens, the tables fit together; a large state isn't looked at each time.
        let large = self.kv.0.len() > 1_000;
        if !large || self.log.len().is_multiple_of(1_000) {
            let findings = check(&self.kv);
            assert!(findings.is_empty(), "after {:?}: {findings:#?}", self.log.last());
        }
        reply
    }
    pub fn done(&mut self, command: Command) {
        assert_eq!(self.apply(command), CommandReply::Done);
    }
    pub fn read(&self) -> Reader<'_, MemKv> {
        Reader(&self.kv)
    }
    pub fn nonce(&mut self) -> u128 {
        self.nonces += 1;
        self.nonces
    }
    pub fn session(&mut self) -> SessionId {
        let client = 1_000 + self.nonce();
        match self.apply(Command::OpenSession { client, label: "test".into() }) {
            CommandReply::Session(Ok(s)) => s,
            other => panic!("{other:?}"),
        }
    }
    pub fn op(&mut self, session: SessionId, op: Op) -> FsResult<OpOutcome> {
        let sequence = self.sequences.entry(session).or_default();
        *sequence += 1;
        let s = *sequence;
        let command =
            Command::Client { session, sequence: Sequence(s), answered_below: Sequence(s), op };
        match self.apply(command) {
            CommandReply::Op(r) => r,
            other => panic!("{other:?}"),
        }
    }
    pub fn query(&self, q: Query) -> FsResult<QueryReply> {
        Machine::query(&self.kv, &q)
    }
    pub fn lookup(&self, parent: InodeId, name: &str) -> FsResult<Attr> {
        match self.query(Query::Lookup { parent, name: name.into() })? {
            QueryReply::Attr(a) => Ok(a),
            other => panic!("{other:?}"),
        }
    }
    pub fn attr(&self, inode: InodeId) -> Attr {
        self.read().attr(inode).expect("it lives").0
    }
    pub fn names(&self, dir: InodeId) -> Vec<String> {
        let q = Query::ReadDir { inode: dir, after: Vec::new(), limit: 1000 };
        match self.query(q).expect("a directory") {
            QueryReply::Page { entries, .. } => entries
                .into_iter()
                .map(|e| String::from_utf8(e.name).expect("names are UTF-8"))
                .collect(),
            other => panic!("{other:?}"),
        }
    }

    // --- client ------------------------------------------------------------------------------

    pub fn create(&mut self, s: SessionId, parent: InodeId, name: &str) -> FsResult<OpenFile> {
        let op = Op::Create {
            parent,
            name: name.into(),
            mode: 0o644,
            uid: 1,
            gid: 1,
            exclusive: false,
            open: WRITE,
            delegate: false,
        };
        match self.op(s, op)? {
            OpOutcome::Opened { attr, handle, grant, .. } => {
                self.expect_known(attr.inode, &grant.view);
                Ok(OpenFile { session: s, handle, inode: attr.inode, grant, ends: Vec::new() })
            }
            other => panic!("{other:?}"),
        }
    }
    /// A file that appeared by itself holds what S3 holds.
    fn expect_known(&mut self, inode: InodeId, view: &FileView) {
        let found = view.backing.as_ref().and_then(|b| self.bucket.objects.get(&b.key));
        let body = found.map_or(Vec::new(), |o| o.body.clone());
        self.expected.entry(inode).or_insert(body);
    }
    pub fn open(&mut self, s: SessionId, inode: InodeId, open: OpenMode) -> FsResult<OpenFile> {
        match self.op(s, Op::Open { inode, open })? {
            OpOutcome::Opened { attr, handle, grant, .. } => {
                self.expect_known(inode, &grant.view);
                if open.truncate {
                    self.expected.insert(inode, Vec::new());
                }
                Ok(OpenFile { session: s, handle, inode: attr.inode, grant, ends: Vec::new() })
            }
            other => panic!("{other:?}"),
        }
    }
    pub fn mkdir(&mut self, s: SessionId, parent: InodeId, name: &str) -> FsResult<InodeId> {
        let op = Op::Mkdir { parent, name: name.into(), mode: 0o755, uid: 0, gid: 0 };
        match self.op(s, op)? {
            OpOutcome::Attr(a) => Ok(a.inode),
            other => panic!("{other:?}"),
        }
    }
    pub fn rename(
        &mut self,
        s: SessionId,
        from: (InodeId, &str),
        to: (InodeId, &str),
    ) -> FsResult<()> {
        let op = Op::Rename {
            parent: from.0,
            name: from.1.into(),
            new_parent: to.0,
            new_name: to.1.into(),
            flags: 0,
        };
        self.op(s, op).map(|_| ())
    }
    pub fn unlink(&mut self, s: SessionId, parent: InodeId, name: &str) -> FsResult<()> {
        self.op(s, Op::Unlink { parent, name: name.into() }).map(|_| ())
    }
    /// Writes under the grant in hand, without asking for another. `Err`: the node refused.
    pub fn write_once(&mut self, f: &mut OpenFile, at: u64, bytes: &[u8]) -> Result<(), ()> {
        // R26: who holds the group by now knows nothing of grants that are older than that.
        let group = PgId::of(f.inode, RunIndex(0), 64);
        let since = self.read().map().map_err(drop)?.pgs[usize::from(group.0)].since_map_version;
        if f.grant.least_map_version < since {
            return Err(());
        }
        self.node.entry(f.inode).or_default().write(&f.grant, at, bytes)?;
        let end = at + bytes.len() as u64;
        f.ends.push((f.grant.generation, end));
        // A write under a grant older than a truncate that this node has not journaled yet is
        // ordered before it: the truncate is answered only after every primary journaled its cut.
        let cuts = self.read().grant_view(f.inode).map_or(Vec::new(), |g| g.view.cuts);
        let end = cuts
            .iter()
            .filter(|c| c.generation >= f.grant.generation)
            .fold(end, |e, c| e.min(c.at));
        if end <= at {
            return Ok(());
        }
        let content = self.expected.entry(f.inode).or_default();
        content.resize(content.len().max(end as usize), 0);
        content[at as usize..end as usize].copy_from_slice(&bytes[..(end - at) as usize]);
        Ok(())
    }
    pub fn write(&mut self, f: &mut OpenFile, at: u64, bytes: &[u8]) -> FsResult<()> {
        if self.write_once(f, at, bytes).is_ok() {
            return Ok(());
        }
        let write_end = at + bytes.len() as u64;
        match self.op(f.session, Op::Regrant { handle: f.handle, write: true, write_end })? {
            OpOutcome::Opened { grant, .. } => f.grant = grant,
            other => panic!("{other:?}"),
        }
        self.write_once(f, at, bytes).expect("a fresh grant is taken");
        Ok(())
    }
    pub fn commit(&mut self, f: &mut OpenFile) -> FsResult<()> {
        let c = CommitWrite {
            inode: f.inode,
            ends: f.ends.clone(),
            mtime: None,
            set: SetAttr::default(),
        };
        self.op(f.session, Op::Commit(c))?;
        f.ends.clear();
        Ok(())
    }
    pub fn close(&mut self, f: OpenFile) -> FsResult<()> {
        let c = CommitWrite { inode: f.inode, ends: f.ends, mtime: None, set: SetAttr::default() };
        self.op(f.session, Op::Release { handle: f.handle, commit: Some(c) })?;
        if self.read().attr(f.inode).is_err() {
            self.expected.remove(&f.inode);
        }
        Ok(())
    }
    pub fn truncate(&mut self, s: SessionId, inode: InodeId, size: u64) -> FsResult<()> {
        let set = SetAttr { size: Some(size), ..SetAttr::default() };
        self.op(s, Op::SetAttr { inode, set })?;
        self.expected.entry(inode).or_default().resize(size as usize, 0);
        Ok(())
    }
    pub fn link(
        &mut self,
        s: SessionId,
        inode: InodeId,
        parent: InodeId,
        name: &str,
    ) -> FsResult<Attr> {
        match self.op(s, Op::Link { inode, parent, name: name.into() })? {
            OpOutcome::Attr(a) => Ok(a),
            other => panic!("{other:?}"),
        }
    }
    /// Creates (or opens), writes and closes.
    pub fn put_file(&mut self, s: SessionId, parent: InodeId, name: &str, bytes: &[u8]) -> InodeId {
        let mut f = self.create(s, parent, name).expect("create");
        self.write(&mut f, 0, bytes).expect("write");
        let inode = f.inode;
        self.close(f).expect("close");
        inode
    }

    // --- leader ------------------------------------------------------------------------------

    pub fn begin_flush(&mut self, inodes: Vec<InodeId>, via_temporary: bool) {
        match self.apply(Command::FlushBegin { inodes, via_temporary }) {
            CommandReply::Tickets(t) => self.begun.extend(t),
            other => panic!("{other:?}"),
        }
    }
    /// The node seals; nobody hears.
    pub fn seal_only(&mut self, ticket: &FlushTicket) {
        self.node.entry(ticket.inode).or_default().seal(ticket.generation.0);
    }
    /// Seals one begun flush and has it planned.
    pub fn seal(&mut self, ticket: &FlushTicket) -> FlushPlan {
        let (has_data, high_water) = match ticket.needs_seal {
            true => self.node.entry(ticket.inode).or_default().seal(ticket.generation.0),
            false => (false, 0),
        };
        let nonce = self.nonce();
        let seal = SealedInode {
            inode: ticket.inode,
            generation: ticket.generation,
            has_data,
            high_water,
            nonce,
        };
        match self.apply(Command::FlushSealed(vec![seal])) {
            CommandReply::Plans(mut p) => p.pop().expect("a plan per seal"),
            other => panic!("{other:?}"),
        }
    }
    pub fn take_plan(&mut self, inode: InodeId, plan: FlushPlan) {
        match plan {
            FlushPlan::Clean | FlushPlan::Gone => {}
            FlushPlan::Rescue(plan) => self.rescue(&plan),
            FlushPlan::Blocked { blocker } => {
                if let Some(b) = blocker {
                    // Twice in a row in the way: a cycle (or unlinked): through a temporary key.
                    let list = if self.blocked.contains(&b) {
                        &mut self.via_temporary
                    } else {
                        &mut self.blocked
                    };
                    list.push(b);
                }
                let _ = inode;
            }
            FlushPlan::Store(plan) => self.flights.push(Flight::Put { plan, object: None }),
        }
    }
    fn body(&self, plan: &StorePlan) -> Body {
        let size = plan.attr.size as usize;
        let mut body = vec![0u8; size];
        let mut covered = vec![false; size];
        let empty = Vec::new();
        let pins = match self.node.get(&plan.inode).and_then(|h| h.pins.get(&plan.generation.0)) {
            Some(p) => p,
            None if size == 0 => &empty,
            None => return Body::NotSealed,
        };
        for (g, start, bytes) in pins {
            if *g <= plan.view.clean_generation.0 {
                continue;
            }
            for (i, b) in bytes.iter().enumerate() {
                let at = *start as usize + i;
                if at < size {
                    body[at] = *b;
                    covered[at] = true;
                }
            }
        }
        if let Some(b) = &plan.view.backing {
            let valid = (b.valid_bytes() as usize).min(size);
            if covered[..valid].iter().any(|c| !c) {
                let Some(o) = self.bucket.objects.get(&b.key).filter(|o| o.etag == b.etag) else {
                    return Body::BaseGone;
                };
                for at in 0..valid {
                    if !covered[at] {
                        body[at] = o.body[at];
                    }
                }
            }
        }
        Body::Bytes(body)
    }
    fn object(&self, plan: &StorePlan) -> Result<Object, AttemptResult> {
        let body = match (plan.attr.kind, &plan.view.backing) {
            (FileKind::Directory | FileKind::HardLink, _) => Vec::new(),
            (FileKind::Symlink, _) => plan.target.clone().expect("links have targets"),
            (FileKind::File, _) if plan.attr.size == 0 => Vec::new(),
            (FileKind::File, Some(b)) if !plan.has_data => {
                match self.bucket.objects.get(&b.key).filter(|o| o.etag == b.etag) {
                    Some(o) => o.body.clone(),
                    None => return Err(AttemptResult::Failed(SOURCE_CHANGED.into())),
                }
            }
            (FileKind::File, _) => match self.body(plan) {
                Body::Bytes(b) => b,
                Body::NotSealed => return Err(AttemptResult::Failed("not sealed".into())),
                Body::BaseGone => return Err(AttemptResult::Failed(BASE_GONE.into())),
            },
        };
        Ok(Object {
            etag: String::new(),
            body,
            nonce: Some(plan.nonce),
            mode: plan.attr.mode,
            kind: plan.attr.kind,
            mtime: plan.attr.mtime,
            xattrs: plan.xattrs.clone(),
            link: plan.link.map(|tag| (tag, plan.key.clone())),
        })
    }
    /// What a HEAD says about an attempt.
    pub fn look(
        &self,
        key: &str,
        nonce: u128,
        condition: &PutCondition,
        store: bool,
    ) -> AttemptResult {
        match self.bucket.objects.get(key) {
            None if !store => AttemptResult::Deleted,
            None => AttemptResult::Missing,
            Some(o) if o.nonce == Some(nonce) => {
                AttemptResult::Stored { etag: o.etag.clone(), length: o.body.len() as u64 }
            }
            Some(o) if *condition == PutCondition::IfMatch(o.etag.clone()) => {
                AttemptResult::Failed("it did not happen".into())
            }
            Some(o) if self.is_given_up(key, o) => AttemptResult::LeftOver(left_over(o)),
            Some(o) => AttemptResult::Foreign(ForeignObject {
                etag: o.etag.clone(),
                size: o.body.len() as u64,
                attrs: attrs_of(o),
            }),
        }
    }
    /// Carries out an S3 call; what the leader learns of it.
    pub fn fly(&mut self, flight: &Flight, fate: Fate) -> AttemptResult {
        let happens = matches!(fate, Fate::Fine | Fate::LostReply);
        let (key, nonce, condition, store) = match flight {
            Flight::Put { plan, object } => {
                let object = match object.clone().map_or_else(|| self.object(plan), Ok) {
                    Ok(o) => o,
                    Err(result) => return result,
                };
                if happens {
                    self.bucket.put(&plan.key, &plan.condition, object);
                    self.sent.insert((plan.key.clone(), plan.inode));
                }
                (&plan.key, plan.nonce, &plan.condition, true)
            }
            Flight::Delete { key, nonce, condition } => {
                if happens && self.bucket.delete(key, condition) {
                    let gone = self.sent.iter().filter(|s| s.0 == *key);
                    self.removed.extend(gone.map(|s| (s.clone(), self.nonces)));
                }
                (key, *nonce, condition, false)
            }
        };
        if fate == Fate::Refused {
            return AttemptResult::Failed("503".into());
        }
        self.look(key, nonce, condition, store)
    }
    pub fn report(&mut self, flight: &Flight, result: AttemptResult) {
        let command = match flight {
            Flight::Put { plan, .. } => Command::FlushCommit(vec![FlushOutcome {
                inode: plan.inode,
                generation: plan.generation,
                nonce: plan.nonce,
                result,
            }]),
            Flight::Delete { key, nonce, .. } => {
                Command::KeyDone { key: key.clone(), nonce: *nonce, result }
            }
        };
        self.done(command);
    }
    pub fn flight_done(&mut self, i: usize, fate: Fate, ambiguous: bool) {
        let flight = self.flights.remove(i);
        if matches!(fate, Fate::LostReply | Fate::LostRequest) {
            self.doubt(flight.nonce());
        }
        if fate == Fate::LostRequest {
            self.lose(flight.clone());
        }
        let result = self.fly(&flight, fate);
        let doubt = ambiguous && matches!(fate, Fate::LostReply | Fate::LostRequest);
        let source_changed = [SOURCE_CHANGED, BASE_GONE]
            .iter()
            .any(|why| result == AttemptResult::Failed((*why).into()));
        if !doubt {
            self.report(&flight, result);
        }
        if source_changed && let Flight::Put { plan, .. } = &flight {
            self.look_at_base(plan);
        }
    }
    /// kill -9: what it had sent may still happen.
    pub fn crash_leader(&mut self) {
        self.begun.clear();
        self.blocked.clear();
        self.via_temporary.clear();
        for flight in std::mem::take(&mut self.flights) {
            self.lose(flight);
        }
        for d in self.read().flushes_in_progress(10_000, None).expect("readable") {
            if matches!(d.stage, FlushStage::Sealing(_)) {
                self.done(Command::FlushAbort(vec![d.inode]));
            }
        }
        for w in self.read().key_work(None, 10_000, true, Time(self.now)).expect("readable") {
            if let KeyWorkKind::Resolve { nonces, .. } = &w.kind {
                self.doubt(*nonces.last().expect("a nonce"));
            }
        }
    }
    /// Settles doubtful keys, though a request may still arrive.
    pub fn look_up_keys(&mut self) {
        for w in self.read().key_work(None, 10_000, false, Time(self.now)).expect("readable") {
            if let KeyWorkKind::Resolve { nonces, inode, .. } = &w.kind {
                let nonce = *nonces.last().expect("a nonce");
                let result = self.look(&w.key, nonce, &w.condition, inode.is_some());
                self.done(Command::KeyDone { key: w.key, nonce, result });
            }
        }
    }
    pub fn begin_deletes(&mut self, limit: usize) {
        let mut begin = Vec::new();
        for w in self.read().key_work(None, limit, false, Time(self.now)).expect("readable") {
            if w.kind == KeyWorkKind::Delete {
                let nonce = self.nonce();
                begin.push((w.key, nonce, w.condition));
            }
        }
        let command = begin.iter().map(|(k, n, _)| (k.clone(), *n)).collect();
        let CommandReply::Keys(go_on) = self.apply(Command::KeyBegin(command)) else {
            panic!("KeyBegin answers keys")
        };
        for (key, nonce, condition) in begin {
            if go_on.contains(&key) {
                self.flights.push(Flight::Delete { key, nonce, condition });
            }
        }
    }
    /// Delivers one notice to the node and acks it.
    pub fn deliver(&mut self, id: u64, notice: &Notice) {
        match notice {
            Notice::FlushDone { inode, generation, .. } => {
                let h = self.node.entry(*inode).or_default();
                h.extents.retain(|e| e.0 > generation.0);
                h.pins.retain(|&g, _| g > generation.0);
            }
            Notice::FlushAborted { inode, generation, .. } => {
                let h = self.node.entry(*inode).or_default();
                h.pins.retain(|&g, _| g > generation.0);
            }
            Notice::ApplyView { inode, .. } => {
                if let Ok(grant) = self.read().grant_view(*inode) {
                    self.node.entry(*inode).or_default().install(&grant.view);
                }
            }
            Notice::Drop { inode, .. } => {
                self.node.remove(inode);
            }
            Notice::Fence { inode, generation, .. } => {
                let (has_data, high_water) =
                    self.node.entry(*inode).or_default().seal(generation.0);
                self.done(Command::Fenced(vec![SealedInode {
                    inode: *inode,
                    generation: *generation,
                    has_data,
                    high_water,
                    nonce: 0,
                }]));
            }
        }
        self.done(Command::NoticesDone(vec![id]));
    }
    pub fn deliver_all(&mut self) {
        for _ in 0..1_000 {
            let notices = self.read().notices(0, 1_000).expect("readable");
            if notices.is_empty() {
                return;
            }
            for (id, n) in notices {
                self.deliver(id, &n);
            }
        }
        panic!("notices never end");
    }

    /// Everything to S3 without faults; panics if it does not end.
    /// Nobody has a file open but by handles.
    pub fn reap(&mut self) {
        let lingering = self.read().lingering(None, 10_000).expect("readable");
        if !lingering.is_empty() {
            self.done(Command::Reap(lingering));
        }
    }

    pub fn settle_all(&mut self) {
        for _ in 0..200 {
            self.reap();
            self.now += 2 * STEP_NS;
            // The last moment at which it may land.
            while let Some(i) = self.zombies.iter().position(|z| self.now + 20 * STEP_NS > z.1) {
                self.zombie_acts(i, true);
            }
            while !self.flights.is_empty() {
                self.flight_done(0, Fate::Fine, false);
            }
            self.look_up_keys();
            self.look_again();
            self.deliver_all();
            while self.read().pending_moves().expect("readable") > 0 {
                self.done(Command::MoveStep(7));
            }
            let via = std::mem::take(&mut self.via_temporary);
            if !via.is_empty() {
                self.blocked.clear();
                self.begin_flush(via, true);
            }
            let first = std::mem::take(&mut self.blocked);
            self.begin_flush(first.clone(), false);
            self.blocked = first;
            let batch = self.read().dirty_batch(10_000, Time(i64::MAX), None).expect("readable");
            let inodes: Vec<_> = batch.iter().map(|d| d.inode).collect();
            self.begin_flush(inodes, false);
            for t in std::mem::take(&mut self.begun) {
                let plan = self.seal(&t);
                self.take_plan(t.inode, plan);
            }
            self.begin_deletes(10_000);
            let counts = self.read().counts().expect("readable");
            let notices = self.read().notices(0, 10).expect("readable");
            if counts.dirty_inodes == 0
                && counts.pending_keys == 0
                && counts.moves == 0
                && notices.is_empty()
                && self.flights.is_empty()
            {
                // At rest, and yet something may land.
                while !self.zombies.is_empty() {
                    self.zombie_acts(0, true);
                }
                return;
            }
        }
        let batch = self.read().dirty_batch(10, Time(i64::MAX), None);
        panic!(
            "never settles: {:?}\ndirty {batch:?}\nwork {:?}\nflights {:?}",
            self.read().counts(),
            self.read().key_work(None, 10, true, Time(self.now)),
            self.flights,
        );
    }

    /// All names, with their inodes and keys.
    pub fn tree(&self) -> Vec<(InodeId, String)> {
        self.tree_below(InodeId::ROOT, "")
    }
    fn tree_below(&self, dir: InodeId, prefix: &str) -> Vec<(InodeId, String)> {
        let mut all = Vec::new();
        for (name, id) in self.read().entries(dir, b"", 1_000).expect("readable") {
            let name = String::from_utf8(name).expect("names are UTF-8");
            if self.attr(id).kind == FileKind::Directory {
                let key = format!("{prefix}{name}/");
                all.push((id, key.clone()));
                all.extend(self.tree_below(id, &key));
            } else {
                all.push((id, format!("{prefix}{name}")));
            }
        }
        all
    }

    /// The bucket holds exactly one object per name, with the acked content and attributes.
    pub fn check_bucket(&self) {
        let mut left = self.bucket.objects.clone();
        for (id, key) in self.tree() {
            let attr = self.attr(id);
            let o = left.remove(&key).unwrap_or_else(|| panic!("{key} is not in the bucket"));
            assert_eq!(o.mode, attr.mode, "mode of {key}");
            assert_eq!(o.kind, attr.kind, "kind of {key}");
            assert_eq!(o.xattrs, self.xattrs(id), "extended attributes of {key}");
            assert!(!attr.dirty);
            if attr.kind == FileKind::File {
                let want = &self.expected[&id];
                assert_eq!(attr.size, want.len() as u64, "size of {key}");
                assert_eq!(o.body, *want, "content of {key}");
            }
        }
        // A stranger's object under the name of a directory of ours is hidden, never deleted.
        left.retain(|_, o| o.nonce.is_some());
        assert!(left.is_empty(), "left over in the bucket: {:?}", left.keys());
    }
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

pub fn attrs_of(o: &Object) -> IngestAttrs {
    IngestAttrs {
        kind: o.kind,
        mode: o.mode,
        uid: 0,
        gid: 0,
        mtime: o.mtime,
        more: More::of(
            (o.kind == FileKind::Symlink).then(|| o.body.clone()),
            o.xattrs.clone(),
            o.link.as_ref().map(|(tag, _)| *tag),
        ),
        complete: true,
    }
}

pub fn is_again<T>(r: &FsResult<T>) -> bool {
    matches!(r, Err(FsError::Again { .. }))
}
