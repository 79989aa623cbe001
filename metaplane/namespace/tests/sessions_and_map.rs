//! Exactly once, leases, and the cluster map's guards.

mod common;
use common::*;
use ebb_dataplane_protocol::control::WindowEntry;
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::command::{Command, CommandReply};
use ebb_metaplane_protocol::op::{Op, OpenMode, RELEASES_MAX};
use ebb_metaplane_protocol::{FsError, NodeCall, Time};

fn mkdir(name: &str) -> Op {
    Op::Mkdir { parent: InodeId::ROOT, name: name.into(), mode: 0o755, uid: 0, gid: 0 }
}
fn client(session: SessionId, sequence: u64, below: u64, op: Op) -> Command {
    Command::Client { session, sequence: Sequence(sequence), answered_below: Sequence(below), op }
}

#[test]
fn a_retry_gets_the_first_answer_and_an_unknown_old_one_is_never_done() {
    let mut w = World::new();
    let s = w.session();
    let first = w.apply(client(s, 5, 0, mkdir("d")));
    assert_eq!(w.apply(client(s, 5, 0, mkdir("d"))), first);
    // An error is an answer, too: the name is free again, the retry still says so.
    let refused = w.apply(client(s, 6, 0, mkdir("d")));
    assert_eq!(refused, CommandReply::Op(Err(FsError::Exists)));
    w.op(s, Op::Rmdir { parent: InodeId::ROOT, name: b"d".to_vec() }).expect("rmdir");
    assert_eq!(w.apply(client(s, 6, 0, mkdir("d"))), refused);
    // Out of order is fine while it is within the window; below it nothing is taken for done.
    w.apply(client(s, 9, 8, mkdir("e")));
    assert_eq!(w.apply(client(s, 7, 0, mkdir("f"))), CommandReply::Op(Err(FsError::TooOld)));
    assert_eq!(w.apply(client(s, 5, 0, mkdir("d"))), CommandReply::Op(Err(FsError::TooOld)));
    assert_eq!(w.names(InodeId::ROOT), ["e"]);
}

#[test]
fn remembered_replies_are_bounded() {
    let mut w = World::new();
    let s = w.session();
    let max = ebb_namespace::limits::REPLIES_PER_SESSION_MAX;
    for i in 1..=max {
        w.apply(client(s, i, 0, Op::Release { handle: HandleId(0), commit: None }));
    }
    let CommandReply::Op(r) = w.apply(client(s, max + 1, 0, mkdir("d"))) else { panic!("an op") };
    assert!(is_again(&r));
    let CommandReply::Op(r) = w.apply(client(s, max + 1, max, mkdir("d"))) else { panic!("an op") };
    r.expect("acknowledged: room again");
}

#[test]
fn sessions_are_found_again_expire_and_leave_nothing() {
    let mut w = World::new();
    let before = w.read().counts().expect("readable");
    let open = Command::OpenSession { client: 9, label: "h".into() };
    let CommandReply::Session(Ok(s)) = w.apply(open.clone()) else { panic!("a session") };
    assert_eq!(w.apply(open), CommandReply::Session(Ok(s)));
    let expires = w.read().sessions().expect("readable")[0].2;
    assert!(w.read().expired_sessions(expires).expect("readable").is_empty());
    assert_eq!(w.read().expired_sessions(Time(expires.0 + 1)).expect("readable"), [s]);
    w.now += 1_000_000;
    w.done(Command::RenewSessions(vec![s]));
    assert!(w.read().expired_sessions(Time(expires.0 + 1)).expect("readable").is_empty());
    let h = w.create(s, InodeId::ROOT, "f").expect("create");
    w.unlink(s, InodeId::ROOT, "f").expect("unlink");
    assert_eq!(w.attr(h.inode).nlink, 0, "open files live on");
    w.done(Command::EndSessions(vec![s, s]));
    assert!(w.read().attr(h.inode).is_err(), "the last handle took it along");
    w.deliver_all();
    let after = w.read().counts().expect("readable");
    assert_eq!((after.inodes, after.sessions), (before.inodes, 0));
    assert_eq!(w.op(s, mkdir("d")), Err(FsError::SessionExpired));
}

#[test]
fn a_clock_that_jumps_back_changes_nothing() {
    let mut w = World::new();
    let s = w.session();
    let clock = w.read().clock().expect("readable");
    w.now = 5;
    let d = w.mkdir(s, InodeId::ROOT, "d").expect("mkdir");
    assert!(w.attr(d).mtime >= clock);
}

fn register(store: u128, ports: Vec<u16>) -> Command {
    Command::RegisterNode(NodeCall::Register {
        store,
        host: "h".into(),
        ports,
        capacity_bytes: 1 << 30,
        boot: 1,
    })
}

#[test]
fn a_known_store_keeps_its_node_and_stale_decisions_are_refused() {
    let mut w = World::new();
    let node = |r| match r {
        CommandReply::Node(Ok(n)) => n,
        other => panic!("{other:?}"),
    };
    let a = node(w.apply(register(1, vec![10, 11])));
    let v = w.read().map().expect("readable").version;
    assert_eq!(node(w.apply(register(1, vec![10, 11]))), a);
    assert_eq!(w.read().map().expect("readable").version, v, "nothing changed");
    assert_eq!(node(w.apply(register(1, vec![12, 13]))), a);
    assert!(w.read().map().expect("readable").version > v, "new ports are a new map");
    let b = node(w.apply(register(2, vec![20])));
    assert_ne!(a, b);

    let shard = |node, core| ShardRef { node, core: CoreId(core) };
    let set = |pg, from, members| Command::SetPg { pg: PgId(pg), from: PgEpoch(from), members };
    w.done(set(3, 0, vec![shard(a, 1)]));
    let map = w.read().map().expect("readable");
    assert_eq!(map.pgs[3].epoch, PgEpoch(1));
    assert_eq!(map.pgs[3].since_map_version, map.version);
    for bad in [
        set(3, 0, vec![shard(b, 0)]),
        set(3, 1, vec![shard(b, 1)]),
        set(3, 1, vec![shard(NodeId(99), 0)]),
        set(64, 0, vec![]),
    ] {
        assert!(matches!(w.apply(bad), CommandReply::Refused(_)));
    }
    assert_eq!(w.read().map().expect("readable"), map, "a refusal changes nothing");
    let gone = |n| Command::SetNodeState(n, NodeState::Gone);
    assert!(matches!(w.apply(gone(a)), CommandReply::Refused(_)), "it holds a group (I8)");
    w.done(set(3, 1, vec![]));
    w.done(gone(a));
    w.done(gone(a));
    let again = node(w.apply(register(1, vec![10])));
    assert!(again != a && again != b, "node ids are never reused");
}

#[test]
fn grants_name_the_map_they_were_issued_under() {
    let mut w = World::new();
    let s = w.session();
    w.apply(register(1, vec![10]));
    let h = w.create(s, InodeId::ROOT, "f").expect("create");
    let version = w.read().map().expect("readable").version;
    assert_eq!(h.grant.least_map_version, version);
    assert_eq!((h.grant.session, h.grant.cluster), (s, ClusterId(7)));
}

#[test]
fn the_last_wish_that_was_not_zero_is_kept() {
    let mut w = World::new();
    w.done(Command::SetDesired(3));
    w.done(Command::SetDesired(0));
    let c = w.read().counts().expect("readable");
    assert_eq!((c.desired_nodes, c.wake_nodes), (0, 3));
}

#[test]
fn a_truncate_has_to_wait_only_while_somebody_else_may_write() {
    let mut w = World::new();
    let (a, b, c) = (w.session(), w.session(), w.session());
    let mut h = w.create(a, InodeId::ROOT, "f").expect("create");
    w.write(&mut h, 0, b"abc").expect("write");
    let f = h.inode;
    let waits = |w: &World, s| w.read().another_session_writes(f, s).expect("readable");
    assert!(!waits(&w, a), "one's own grant carries the cut");
    assert!(waits(&w, b));
    let reader = w.open(b, f, READ).expect("open");
    assert!(!waits(&w, a), "readers write nothing");
    let writer = w.open(b, f, WRITE).expect("open");
    assert!(waits(&w, a));
    w.close(reader).expect("close");
    w.close(writer).expect("close");
    assert!(!waits(&w, a));
    // A session that ended may write until its fence is everywhere; a flush seals above it.
    let gone = w.open(c, f, WRITE).expect("open");
    w.done(Command::EndSessions(vec![gone.session]));
    assert!(waits(&w, a));
    w.truncate(a, f, 1).expect("truncate");
    assert!(w.read().cuts_pending(f).expect("readable"));
    w.deliver_all();
    assert!(!w.read().cuts_pending(f).expect("readable"));
    w.settle_all();
    assert!(!waits(&w, a));
}

#[test]
fn many_handles_end_in_one_entry_and_only_the_sessions_own() {
    let mut w = World::new();
    let (s, other) = (w.session(), w.session());
    let a = w.create(s, InodeId::ROOT, "a").expect("create");
    let b = w.create(s, InodeId::ROOT, "b").expect("create");
    let theirs = w.open(other, b.inode, OpenMode::default()).expect("open");
    w.unlink(s, InodeId::ROOT, "a").expect("unlink");
    w.unlink(s, InodeId::ROOT, "b").expect("unlink");
    assert!(w.read().attr(a.inode).is_ok(), "an open file lives on");
    let handles = vec![a.handle, b.handle, theirs.handle, HandleId(u64::MAX)];
    w.op(s, Op::ReleaseMany { handles }).expect("released");
    assert!(w.read().attr(a.inode).is_err(), "its last handle ended");
    assert!(w.read().attr(b.inode).is_ok(), "somebody else's handle did not");
    let too_many = vec![HandleId(1); RELEASES_MAX + 1];
    let refused = w.op(s, Op::ReleaseMany { handles: too_many });
    assert!(matches!(refused, Err(FsError::Invalid(_))));
}

#[test]
fn windows_of_a_group_nobody_holds_are_kept_until_somebody_does() {
    let mut w = World::new();
    let live = w.session();
    let CommandReply::Node(Ok(node)) = w.apply(register(1, vec![10])) else { panic!("refused") };
    let (pg, other) = (PgId(3), PgId(4));
    let set = |pg, from, members| Command::SetPg { pg, from: PgEpoch(from), members };
    let holder = vec![ShardRef { node, core: CoreId(0) }];
    w.done(set(pg, 0, holder.clone()));
    let entry = |session, n| WindowEntry {
        session,
        below: Sequence(1),
        sequence: Sequence(n),
        generation: Generation(n + 7),
        inode: InodeId(n + 9),
        chunk: ChunkIndex(n as u32),
    };
    let keep = |pg, from, entries| Command::KeepWindows { pg, from: PgEpoch(from), entries };
    let kept = |w: &World, pg, after| w.read().kept_windows(pg, after, 3).expect("readable");
    let mine: Vec<WindowEntry> = (1..=5).map(|n| entry(live, n)).collect();
    w.done(keep(pg, 1, mine.iter().copied().chain([entry(SessionId(999), 1)]).collect()));
    // Said twice, as after a leader's death; a page at a time; of an epoch that is over, not at all.
    w.done(keep(pg, 1, mine[..2].to_vec()));
    assert!(matches!(w.apply(keep(pg, 0, mine.clone())), CommandReply::Refused(_)));
    assert_eq!(kept(&w, pg, None), mine[..3]);
    assert_eq!(
        kept(&w, pg, Some((live, Sequence(3)))),
        mine[3..],
        "the live session's, and no more"
    );
    assert_eq!(kept(&w, other, None), []);
    w.done(set(pg, 1, vec![]));
    assert_eq!(kept(&w, pg, None), mine[..3], "nobody has them but the state machine");
    w.done(set(other, 0, holder.clone()));
    assert_eq!(kept(&w, pg, None), mine[..3], "another group's holder");
    w.done(set(pg, 2, holder));
    assert_eq!(kept(&w, pg, None), []);
}

#[test]
fn a_stand_in_and_the_look_at_what_is_dirty_are_one_decision() {
    let mut w = World::new();
    let s = w.session();
    let node = |w: &mut World, store| match w.apply(register(store, vec![10])) {
        CommandReply::Node(Ok(node)) => node,
        other => panic!("{other:?}"),
    };
    let (lost, other) = (node(&mut w, 1), node(&mut w, 2));
    let on = |node| vec![ShardRef { node, core: CoreId(0) }];
    for pg in (0..64).map(PgId) {
        w.done(Command::SetPg { pg, from: PgEpoch(0), members: on(lost) });
    }
    let group = |inode| PgId::of(inode, RunIndex(0), 64);
    let f = w.put_file(s, InodeId::ROOT, "f", b"clean");
    w.settle_all();
    let dirty = w.put_file(s, InodeId::ROOT, "dirty", b"dirty");
    assert_ne!(group(f), group(dirty));
    // From here on the node took no write.
    let cut_off = w.read().sequence().expect("readable");
    // Somebody opens the clean file for writing before the stand-in is decided.
    let late = w.open(s, f, WRITE).expect("open");
    let stand_in = |pg, from, cut_off| Command::StandIn {
        pg,
        from: PgEpoch(from),
        members: on(other),
        cut_off,
    };
    let refused = |w: &mut World, c| assert!(matches!(w.apply(c), CommandReply::Refused(_)));
    let before = w.read().map().expect("readable");
    refused(&mut w, stand_in(group(dirty), 1, cut_off));
    refused(&mut w, stand_in(group(f), 0, cut_off));
    let now = w.read().sequence().expect("readable");
    refused(&mut w, stand_in(group(f), 1, now));
    assert_eq!(w.read().map().expect("readable"), before, "a refusal changes nothing");
    w.done(stand_in(group(f), 1, cut_off));
    let map = w.read().map().expect("readable");
    let entry = &map.pgs[usize::from(group(f).0)];
    assert_eq!((&entry.members, entry.epoch), (&on(other), PgEpoch(2)));
    // R26: the grant made meanwhile is of an older map. R27: nobody told its windows.
    assert!(late.grant.least_map_version < entry.since_map_version);
    assert_eq!(entry.windows_since, PgEpoch(2));
    // A planned move hands its windows on.
    w.done(Command::SetPg { pg: group(f), from: PgEpoch(2), members: on(lost) });
    let map = w.read().map().expect("readable");
    assert_eq!(map.pgs[usize::from(group(f).0)].windows_since, PgEpoch(2));
}

#[test]
fn a_file_counts_in_every_group_that_a_grant_reaches() {
    let mut w = World::new();
    let s = w.session();
    let h = w.create(s, InodeId::ROOT, "f").expect("create");
    let held = |w: &World| -> Vec<PgId> {
        let holds = |pg: &PgId| !w.read().may_stand_in(*pg, u64::MAX).expect("readable");
        (0..64).map(PgId).filter(holds).collect()
    };
    let expect = |limit: u64| {
        let of = |run| PgId::of(h.inode, RunIndex(run), 64);
        let mut all: Vec<PgId> = (0..RunIndex::count_for(limit)).map(of).collect();
        all.sort_unstable();
        all.dedup();
        all
    };
    assert_eq!(held(&w), expect(1));
    let mut limit = 0;
    for runs in [2, 5, 300] {
        let regrant = Op::Regrant { handle: h.handle, write: true, write_end: runs * RUN_BYTES };
        w.op(s, regrant).expect("a larger grant");
        limit = w.read().grant_view(h.inode).expect("there").alloc_limit;
        assert_eq!(held(&w), expect(limit), "{runs} runs");
    }
    assert!(limit >= 300 * RUN_BYTES);
    // Without a name it is nobody's dirty file any more, and as much the only copy.
    w.unlink(s, InodeId::ROOT, "f").expect("unlink");
    assert_eq!(w.read().counts().expect("readable").dirty_inodes, 0);
    assert_eq!(held(&w), expect(limit));
    w.close(h.clone()).expect("close");
    assert_eq!(held(&w), []);
}

/// What was answered is forgotten, a few replies or many at once: the table stays as small as what is still open (I9).
#[test]
fn answered_replies_leave_nothing_behind() {
    let mut w = World::new();
    let s = w.session();
    for (sequence, answered_below, left) in [
        (1, 1, 1),
        (2, 2, 1),
        (3, 2, 2),
        (4, 2, 3),
        (5, 5, 1),
        (30, 5, 2),
        (40, 31, 1),
        (41, 31, 2),
    ] {
        w.apply(client(s, sequence, answered_below, mkdir(&format!("d{sequence}"))));
        let replies = w.kv.0.keys().filter(|k| k[0] == b'R').count();
        assert_eq!(replies, left, "after sequence {sequence}");
    }
}
