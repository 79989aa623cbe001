//! The defects found in objcache that belong to the state machine, each a test; and the flush rules
//! that close the interleavings of PROTOCOL §2–5, §8–9 one by one.

mod common;
use common::*;
use ebb_dataplane_protocol::control::PutCondition;
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::attr::SetAttr;
use ebb_metaplane_protocol::command::{Command, CommandReply, OpOutcome};
use ebb_metaplane_protocol::flush::*;
use ebb_metaplane_protocol::op::{Op, OpenMode, RENAME_EXCHANGE};
use ebb_metaplane_protocol::xattr::XattrMode;
use ebb_metaplane_protocol::{FsError, Time};

const ROOT: InodeId = InodeId::ROOT;

fn keys(w: &World) -> Vec<&str> {
    w.bucket.objects.keys().map(String::as_str).collect()
}
fn body<'a>(w: &'a World, key: &str) -> &'a [u8] {
    &w.bucket.objects[key].body
}
/// Begins, seals and plans a flush of one inode.
fn plan(w: &mut World, inode: InodeId) -> FlushPlan {
    w.begin_flush(vec![inode], false);
    let ticket = w.begun.pop().expect("it is dirty");
    w.seal(&ticket)
}
fn store(p: FlushPlan) -> Box<StorePlan> {
    match p {
        FlushPlan::Store(p) => p,
        other => panic!("{other:?}"),
    }
}

#[test]
fn rename_of_a_cold_file_then_append_keeps_one_key_with_all_bytes() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "cold", b"old ");
    w.settle_all();
    w.rename(s, (ROOT, "cold"), (ROOT, "warm")).expect("rename");
    let mut h = w.open(s, f, WRITE).expect("open");
    w.write(&mut h, 4, b"and new").expect("write");
    w.close(h).expect("close");
    w.settle_all();
    w.check_bucket();
    assert_eq!(keys(&w), ["warm"]);
    assert_eq!(body(&w, "warm"), b"old and new");
}

#[test]
fn rename_over_a_file_then_flush_never_writes_the_replaced_content() {
    let mut w = World::new();
    let s = w.session();
    let old = w.put_file(s, ROOT, "target", b"replaced");
    w.settle_all();
    // Dirty again, and a flush of it is on its way.
    let mut h = w.open(s, old, WRITE).expect("open");
    w.write(&mut h, 0, b"REPLACED").expect("write");
    w.close(h).expect("close");
    let p = plan(&mut w, old);
    w.take_plan(old, p);
    w.put_file(s, ROOT, "source", b"kept");
    w.rename(s, (ROOT, "source"), (ROOT, "target")).expect("rename");
    assert_eq!(w.read().counts().expect("readable").dirty_inodes, 1, "the old dirt went with it");
    w.settle_all();
    w.check_bucket();
    assert_eq!(keys(&w), ["target"]);
    assert_eq!(body(&w, "target"), b"kept");
}

#[test]
fn rename_over_inherits_the_key_and_deletes_nothing() {
    let mut w = World::new();
    let s = w.session();
    w.put_file(s, ROOT, "b", b"1");
    w.settle_all();
    let etag = w.bucket.objects["b"].etag.clone();
    let a = w.put_file(s, ROOT, "a", b"2");
    w.rename(s, (ROOT, "a"), (ROOT, "b")).expect("rename");
    assert!(w.read().key_work(None, 10, true, Time(w.now)).expect("readable").is_empty());
    let p = store(plan(&mut w, a));
    assert_eq!((p.key.as_str(), &p.condition), ("b", &PutCondition::IfMatch(etag)));
}

#[test]
fn unlink_and_re_create_during_an_upload_keeps_the_new_file() {
    let mut w = World::new();
    let s = w.session();
    let first = w.put_file(s, ROOT, "x", b"first");
    let p = plan(&mut w, first);
    w.take_plan(first, p);
    w.unlink(s, ROOT, "x").expect("unlink");
    let second = w.put_file(s, ROOT, "x", b"second");
    // The key has a mutation in flight: the new file waits for it.
    assert_eq!(plan(&mut w, second), FlushPlan::Blocked { blocker: None });
    // The upload of the first one arrives, its reply is lost, nobody may delete its result now.
    w.flight_done(0, Fate::LostReply, false);
    assert_eq!(body(&w, "x"), b"first");
    assert!(w.read().key_work(None, 10, true, Time(w.now)).expect("readable").is_empty());
    w.settle_all();
    w.check_bucket();
    assert_eq!(body(&w, "x"), b"second");
}

#[test]
fn a_delete_that_has_begun_is_waited_for() {
    let mut w = World::new();
    let s = w.session();
    w.put_file(s, ROOT, "x", b"first");
    w.settle_all();
    w.unlink(s, ROOT, "x").expect("unlink");
    w.begin_deletes(10);
    let second = w.put_file(s, ROOT, "x", b"second");
    assert_eq!(plan(&mut w, second), FlushPlan::Blocked { blocker: None });
    // In doubt: still in the way, until it is looked up.
    w.flight_done(0, Fate::LostReply, true);
    assert_eq!(plan(&mut w, second), FlushPlan::Blocked { blocker: None });
    w.look_up_keys();
    assert_eq!(store(plan(&mut w, second)).condition, PutCondition::IfAbsent);
}

#[test]
fn a_delete_that_has_not_begun_gives_way_to_a_re_created_name() {
    let mut w = World::new();
    let s = w.session();
    w.put_file(s, ROOT, "x", b"first");
    w.settle_all();
    let etag = w.bucket.objects["x"].etag.clone();
    w.unlink(s, ROOT, "x").expect("unlink");
    let second = w.put_file(s, ROOT, "x", b"second");
    let nonce = w.nonce();
    // The leader had picked the delete before the name came back.
    let reply = w.apply(Command::KeyBegin(vec![("x".into(), nonce)]));
    assert_eq!(reply, CommandReply::Keys(vec![]));
    assert_eq!(store(plan(&mut w, second)).condition, PutCondition::IfMatch(etag));
}

#[test]
fn rmdir_takes_its_marker() {
    let mut w = World::new();
    let s = w.session();
    let d = w.mkdir(s, ROOT, "d").expect("mkdir");
    w.put_file(s, d, "f", b"1");
    w.settle_all();
    assert_eq!(keys(&w), ["d/", "d/f"]);
    w.unlink(s, d, "f").expect("unlink");
    w.op(s, Op::Rmdir { parent: ROOT, name: b"d".to_vec() }).expect("rmdir");
    w.settle_all();
    assert!(keys(&w).is_empty());
}

#[test]
fn inode_ids_are_never_reused() {
    let mut w = World::new();
    let s = w.session();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..50 {
        assert!(seen.insert(w.put_file(s, ROOT, "same", b"1")));
        w.unlink(s, ROOT, "same").expect("unlink");
    }
    // A woken cluster is another incarnation: its ids differ although its counter starts anew.
    let mut woken = World::new();
    woken.kv = ebb_namespace::MemKv::default();
    woken.done(Command::Format {
        cluster: ClusterId(7),
        pg_count: 64,
        incarnation: Incarnation(2),
        backed: true,
    });
    let s = woken.session();
    assert!(!seen.contains(&woken.put_file(s, ROOT, "same", b"1")));
}

#[test]
fn chmod_reaches_s3_without_moving_bytes() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"data");
    w.settle_all();
    let set = SetAttr { mode: Some(0o600), uid: Some(42), ..SetAttr::default() };
    w.op(s, Op::SetAttr { inode: f, set }).expect("chmod");
    assert!(w.attr(f).dirty);
    w.begin_flush(vec![f], false);
    let ticket = w.begun.pop().expect("it is dirty");
    assert!(!ticket.needs_seal, "no data may be dirty");
    let p = store(w.seal(&ticket));
    assert!(!p.has_data, "a server-side copy is enough");
    assert_eq!((p.attr.mode, p.attr.uid), (0o600, 42));
    w.take_plan(f, FlushPlan::Store(p));
    w.settle_all();
    w.check_bucket();
}

#[test]
fn chmod_during_a_flush_keeps_the_file_dirty() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"data");
    let p = plan(&mut w, f);
    w.take_plan(f, p);
    let set = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    w.op(s, Op::SetAttr { inode: f, set }).expect("chmod");
    w.flight_done(0, Fate::Fine, false);
    assert!(w.attr(f).dirty);
    w.settle_all();
    w.check_bucket();
}

#[test]
fn truncate_then_extend_reads_zeros_not_old_bytes() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"0123456789");
    w.settle_all();
    w.truncate(s, f, 3).expect("shrink");
    assert_eq!(w.read().grant_view(f).expect("it lives").view.backing.expect("one").limit, 3);
    w.truncate(s, f, 8).expect("grow");
    w.settle_all();
    w.check_bucket();
    assert_eq!(body(&w, "f"), b"012\0\0\0\0\0");
}

#[test]
fn truncate_during_an_upload_limits_the_new_object() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"0123456789");
    let p = plan(&mut w, f);
    w.take_plan(f, p);
    w.truncate(s, f, 4).expect("shrink");
    w.deliver_all();
    // The cut is acked and gone before the object arrives with all ten bytes.
    w.flight_done(0, Fate::Fine, false);
    let b = w.read().grant_view(f).expect("it lives").view.backing.expect("one");
    assert_eq!((b.length, b.limit), (10, 4));
    assert!(w.attr(f).dirty);
    w.truncate(s, f, 7).expect("grow");
    w.settle_all();
    w.check_bucket();
    assert_eq!(body(&w, "f"), b"0123\0\0\0");
}

#[test]
fn a_late_close_never_regrows_a_truncated_file() {
    let mut w = World::new();
    let (a, b) = (w.session(), w.session());
    let mut h = w.create(a, ROOT, "f").expect("create");
    let f = h.inode;
    w.write(&mut h, 0, &[1; 100]).expect("write");
    w.truncate(b, f, 10).expect("truncate");
    w.deliver_all();
    assert!(w.read().grant_view(f).expect("it lives").view.cuts.is_empty(), "acked");
    w.close(h).expect("close");
    assert_eq!(w.attr(f).size, 10);
    w.settle_all();
    w.check_bucket();
}

#[test]
fn the_ninth_unacked_truncate_waits() {
    let mut w = World::new();
    let s = w.session();
    let h = w.create(s, ROOT, "f").expect("create");
    for size in (1..=8).rev() {
        w.truncate(s, h.inode, size).expect("eight cuts fit");
    }
    assert!(is_again(&w.truncate(s, h.inode, 0)));
    assert_eq!(w.attr(h.inode).size, 1, "a refusal changes nothing");
    w.deliver_all();
    w.truncate(s, h.inode, 0).expect("room again");
}

#[test]
fn a_write_during_a_flush_keeps_the_file_dirty() {
    let mut w = World::new();
    let s = w.session();
    let mut h = w.create(s, ROOT, "f").expect("create");
    w.write(&mut h, 0, b"one").expect("write");
    let p = plan(&mut w, h.inode);
    w.take_plan(h.inode, p);
    assert!(w.write_once(&mut h, 0, b"???").is_err(), "the old generation is sealed");
    w.write(&mut h, 3, b"two").expect("a grant above");
    w.flight_done(0, Fate::Fine, false);
    assert_eq!(body(&w, "f"), b"one");
    assert!(w.attr(h.inode).dirty);
    w.close(h).expect("close");
    w.settle_all();
    w.check_bucket();
    assert_eq!(body(&w, "f"), b"onetwo");
}

#[test]
fn no_grant_while_sealing_and_none_below_a_given_up_seal() {
    let mut w = World::new();
    let s = w.session();
    let h = w.create(s, ROOT, "f").expect("create");
    let regrant = Op::Regrant { handle: h.handle, write: true, write_end: 0 };
    w.begin_flush(vec![h.inode], false);
    let t = w.begun.pop().expect("dirty");
    assert!(is_again(&w.op(s, regrant.clone())));
    assert!(is_again(&w.truncate(s, h.inode, 5)));
    w.done(Command::FlushAbort(vec![h.inode]));
    match w.op(s, regrant).expect("granted again") {
        OpOutcome::Opened { grant, .. } => assert!(grant.generation > t.generation),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_flush_that_finds_nothing_makes_no_request() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"data");
    w.settle_all();
    // Opened for writing, nothing written.
    let h = w.open(s, f, WRITE).expect("open");
    assert!(w.attr(f).dirty, "dirty before data (I2)");
    assert_eq!(plan(&mut w, f), FlushPlan::Clean);
    assert!(!w.attr(f).dirty);
    w.close(h).expect("close");
}

#[test]
fn an_expired_writer_is_fenced_and_its_acked_bytes_count() {
    let mut w = World::new();
    let (dead, live) = (w.session(), w.session());
    let mut h = w.create(dead, ROOT, "f").expect("create");
    w.write(&mut h, 0, &[1; 10]).expect("write");
    w.done(Command::EndSessions(vec![dead]));
    assert_eq!(w.op(dead, Op::Commit(commit(&h))), Err(FsError::SessionExpired));
    // Its client does not know yet; the node still takes it, then the fence arrives.
    w.write_once(&mut h, 10, &[2; 5]).expect("not sealed yet");
    w.deliver_all();
    assert!(w.write_once(&mut h, 15, &[3; 5]).is_err(), "fenced (I5)");
    assert_eq!(w.attr(h.inode).size, 15);
    // Another writer goes on above the fence.
    let mut other = w.open(live, h.inode, WRITE).expect("open");
    w.write(&mut other, 15, &[4; 5]).expect("write");
    w.close(other).expect("close");
    w.settle_all();
    w.check_bucket();
}
fn commit(h: &OpenFile) -> ebb_metaplane_protocol::op::CommitWrite {
    ebb_metaplane_protocol::op::CommitWrite {
        inode: h.inode,
        ends: h.ends.clone(),
        mtime: None,
        set: SetAttr::default(),
    }
}

#[test]
fn a_session_ending_fences_only_what_it_held_for_writing() {
    let mut w = World::new();
    let (dead, live) = (w.session(), w.session());
    let f = w.put_file(live, ROOT, "read", b"1");
    w.open(dead, f, READ).expect("open");
    let h = w.create(dead, ROOT, "written").expect("create");
    w.settle_all();
    let _ = w.op(dead, Op::Regrant { handle: h.handle, write: true, write_end: 0 });
    w.done(Command::EndSessions(vec![dead]));
    let fenced: Vec<_> = w.read().notices(0, 10).expect("readable");
    assert!(matches!(&fenced[..], [(_, Notice::Fence { inode, .. })] if *inode == h.inode));
}

#[test]
fn lost_replies_are_looked_up_never_assumed() {
    for fate in [Fate::LostReply, Fate::LostRequest] {
        let mut w = World::new();
        let s = w.session();
        let f = w.put_file(s, ROOT, "f", b"data");
        let p = plan(&mut w, f);
        w.take_plan(f, p);
        w.flight_done(0, fate, true);
        assert!(w.attr(f).dirty, "in doubt is not clean (I3)");
        w.look_up_keys();
        assert_eq!(w.attr(f).dirty, fate == Fate::LostRequest);
        w.settle_all();
        w.check_bucket();
        assert_eq!(w.bucket.puts, 1);
    }
}

#[test]
fn a_dead_leaders_attempts_are_settled_by_the_next() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"data");
    let p = store(plan(&mut w, f));
    // The PUT was sent and arrived; its leader died before it heard.
    w.fly(&Flight::Put { plan: p.clone(), object: None }, Fate::LostReply);
    let work = w.read().key_work(None, 10, false, Time(w.now)).expect("readable");
    assert!(work.is_empty(), "not in doubt while its leader works on it");
    let work = w.read().key_work(None, 10, true, Time(w.now)).expect("readable");
    assert!(matches!(
        &work[0].kind,
        KeyWorkKind::Resolve { nonces, inode: Some(i), .. } if nonces == &[p.nonce] && *i == f
    ));
    w.crash_leader();
    w.look_up_keys();
    assert!(!w.attr(f).dirty);
    // The late report of the old leader changes nothing.
    let before = w.kv.clone();
    w.report(&Flight::Put { plan: p, object: None }, AttemptResult::Failed("late".into()));
    assert_eq!(w.read().attr(f), ebb_namespace::Reader(&before).attr(f));
}

#[test]
fn a_foreign_object_keeps_the_name_and_the_local_file_another() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"ours");
    w.bucket.foreign_put("f", b"theirs");
    w.settle_all();
    let names = w.names(ROOT);
    assert_eq!(names.len(), 2);
    assert_eq!(names[0], "f");
    assert_eq!(names[1], format!("f.conflict-{:x}", f.0));
    assert_ne!(w.lookup(ROOT, "f").expect("theirs").inode, f);
    assert_eq!(body(&w, "f"), b"theirs");
    assert_eq!(body(&w, &names[1]), b"ours");
}

#[test]
fn a_swap_of_names_goes_through_a_temporary_key() {
    let mut w = World::new();
    let s = w.session();
    w.put_file(s, ROOT, "a", b"1");
    w.put_file(s, ROOT, "b", b"2");
    w.settle_all();
    w.op(
        s,
        Op::Rename {
            parent: ROOT,
            name: b"a".to_vec(),
            new_parent: ROOT,
            new_name: b"b".to_vec(),
            flags: RENAME_EXCHANGE,
        },
    )
    .expect("exchange");
    w.settle_all();
    w.check_bucket();
    assert_eq!((body(&w, "a"), body(&w, "b")), (&b"2"[..], &b"1"[..]));
    assert_eq!(keys(&w), ["a", "b"], "the temporary key is gone");
}

#[test]
fn an_unlinked_open_file_makes_room_and_leaves_nothing() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "x", b"old");
    w.settle_all();
    let h = w.open(s, f, READ).expect("open");
    w.unlink(s, ROOT, "x").expect("unlink");
    assert_eq!(w.attr(f).nlink, 0);
    let n = w.put_file(s, ROOT, "x", b"new");
    assert_eq!(plan(&mut w, n), FlushPlan::Blocked { blocker: Some(f) });
    w.begin_flush(vec![f], true);
    w.settle_all();
    assert_eq!(body(&w, "x"), b"new");
    assert!(keys(&w)[0].starts_with(".ebb/tmp/"), "the open file's bytes moved aside");
    w.close(h).expect("close");
    w.settle_all();
    assert_eq!(keys(&w), ["x"]);
}

#[test]
fn a_directory_rename_moves_every_key_below() {
    let mut w = World::new();
    let s = w.session();
    let a = w.mkdir(s, ROOT, "a").expect("mkdir");
    let sub = w.mkdir(s, a, "sub").expect("mkdir");
    for i in 0..20 {
        w.put_file(s, if i % 2 == 0 { a } else { sub }, &format!("f{i}"), &[i]);
    }
    w.settle_all();
    w.rename(s, (ROOT, "a"), (ROOT, "b")).expect("rename");
    // A new directory takes the old name before anything moved.
    let again = w.mkdir(s, ROOT, "a").expect("mkdir");
    w.put_file(s, again, "f0", b"another");
    w.settle_all();
    w.check_bucket();
    assert_eq!(body(&w, "a/f0"), b"another");
    assert_eq!(body(&w, "b/f0"), [0]);
    assert_eq!(body(&w, "b/sub/f1"), [1]);
}

#[test]
fn keys_and_names_are_bounded_and_refused_in_words() {
    let mut w = World::new();
    let s = w.session();
    let make = |w: &mut World, d, name: &[u8]| {
        w.op(s, Op::Mkdir { parent: d, name: name.to_vec(), mode: 0, uid: 0, gid: 0 })
    };
    assert!(matches!(make(&mut w, ROOT, &[0xff, 0xfe]), Err(FsError::Invalid(_))));
    assert!(matches!(make(&mut w, ROOT, b"a/b"), Err(FsError::Invalid(_))));
    assert!(matches!(make(&mut w, ROOT, b".ebb"), Err(FsError::NotPermitted(_))));
    assert_eq!(make(&mut w, ROOT, &[b'x'; 256]), Err(FsError::NameTooLong));
    // A path that just fits, below a directory with a short name.
    let mut d = w.mkdir(s, ROOT, "d").expect("mkdir");
    for _ in 0..4 {
        d = w.mkdir(s, d, &"n".repeat(250)).expect("it fits");
    }
    assert_eq!(make(&mut w, d, &[b'x'; 18]), Err(FsError::NameTooLong));
    make(&mut w, d, &[b'x'; 17]).expect("1024 bytes");
    assert_eq!(
        w.rename(s, (ROOT, "d"), (ROOT, "dd")),
        Err(FsError::NameTooLong),
        "a rename must not make a key below too long"
    );
    let target = vec![b't'; 4096];
    let link = Op::Symlink { parent: ROOT, name: b"l".to_vec(), target, uid: 0, gid: 0 };
    assert_eq!(w.op(s, link), Err(FsError::NameTooLong));
}

#[test]
fn alloc_limit_doubles_and_ends_at_the_largest_file() {
    let mut w = World::new();
    let s = w.session();
    let h = w.create(s, ROOT, "f").expect("create");
    assert_eq!(h.grant.alloc_limit, RUN_BYTES);
    let mut grow =
        |end| match w.op(s, Op::Regrant { handle: h.handle, write: true, write_end: end }) {
            Ok(OpOutcome::Opened { grant, .. }) => Ok(grant.alloc_limit),
            Ok(other) => panic!("{other:?}"),
            Err(e) => Err(e),
        };
    assert_eq!(grow(RUN_BYTES + 1), Ok(2 * RUN_BYTES));
    assert_eq!(grow(2 * RUN_BYTES + 1), Ok(4 * RUN_BYTES));
    assert_eq!(grow(100 * RUN_BYTES), Ok(100 * RUN_BYTES));
    assert_eq!(grow(FILE_BYTES_MAX), Ok(FILE_BYTES_MAX));
    assert_eq!(grow(FILE_BYTES_MAX + 1), Err(FsError::TooLarge));
}

#[test]
fn shutting_down_refuses_new_dirt_and_lets_the_rest_end() {
    let mut w = World::new();
    let s = w.session();
    let mut h = w.create(s, ROOT, "f").expect("create");
    w.write(&mut h, 0, b"1").expect("write");
    w.done(Command::SetShutdown(true));
    assert_eq!(w.mkdir(s, ROOT, "d"), Err(FsError::ShuttingDown));
    assert!(matches!(w.create(s, ROOT, "g"), Err(FsError::ShuttingDown)));
    assert!(matches!(w.open(s, h.inode, WRITE), Err(FsError::ShuttingDown)));
    let read = w.open(s, h.inode, READ).expect("reading goes on");
    w.close(read).expect("close");
    w.close(h).expect("close");
    w.settle_all();
    w.check_bucket();
    w.done(Command::SetShutdown(false));
    w.mkdir(s, ROOT, "d").expect("mkdir");
}

#[test]
fn links_and_empty_files_go_to_s3() {
    let mut w = World::new();
    let s = w.session();
    let link =
        Op::Symlink { parent: ROOT, name: b"l".to_vec(), target: b"a/b".to_vec(), uid: 1, gid: 1 };
    w.op(s, link).expect("symlink");
    let op = Op::Create {
        parent: ROOT,
        name: b"empty".to_vec(),
        mode: 0o644,
        uid: 0,
        gid: 0,
        exclusive: true,
        open: OpenMode::default(),
        delegate: false,
    };
    let Ok(OpOutcome::Opened { attr, handle, .. }) = w.op(s, op) else { panic!("create") };
    w.expected.insert(attr.inode, Vec::new());
    w.op(s, Op::Release { handle, commit: None }).expect("release");
    w.settle_all();
    w.check_bucket();
    assert_eq!(body(&w, "l"), b"a/b");
    assert_eq!(body(&w, "empty"), b"");
}

#[test]
fn the_dirty_queue_is_by_age_and_steps_over_its_head() {
    let mut w = World::new();
    let s = w.session();
    let a = w.put_file(s, ROOT, "a", b"1");
    let b = w.put_file(s, ROOT, "b", b"1");
    let all = w.read().dirty_batch(10, Time(i64::MAX), None).expect("readable");
    assert_eq!(all.iter().map(|d| d.inode).collect::<Vec<_>>(), [a, b]);
    let rest = w.read().dirty_batch(10, Time(i64::MAX), Some((all[0].since, a))).expect("readable");
    assert_eq!(rest.iter().map(|d| d.inode).collect::<Vec<_>>(), [b]);
    assert!(w.read().dirty_batch(10, Time(0), None).expect("readable").is_empty());
}

/// A file with two dirty bytes in the middle, whose object somebody replaced or deleted.
fn without_base(w: &mut World, replaced: bool) -> InodeId {
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"0123456789");
    let (name, value) = (b"user.a".to_vec(), Some(b"of f".to_vec()));
    w.op(s, Op::SetXattr { inode: f, name, value, how: XattrMode::Any }).expect("set");
    w.settle_all();
    let mut open = w.open(s, f, WRITE).expect("opened");
    w.write(&mut open, 3, b"XY").expect("written");
    w.close(open).expect("closed");
    if replaced {
        w.bucket.foreign_put("f", b"theirs");
    } else {
        w.bucket.objects.remove("f");
    }
    let p = plan(w, f);
    w.take_plan(f, p);
    w.flight_done(0, Fate::Fine, false);
    f
}

#[test]
fn what_is_dirty_of_a_file_without_its_base_is_stored_and_nothing_else_of_it() {
    for replaced in [true, false] {
        let mut w = World::new();
        let f = without_base(&mut w, replaced);
        let name = format!("f.conflict-{:x}", f.0);
        assert!(w.attr(f).dirty, "not in S3 is not clean (I3)");
        assert_eq!(w.lookup(ROOT, &name).expect("it stepped aside").inode, f);
        w.settle_all();
        let dir = w.lookup(ROOT, &name).expect("it gave way").inode;
        assert_eq!(w.names(dir), ["3-2"]);
        assert_eq!(w.bucket.objects[&format!("{name}/3-2")].body, b"XY");
        let range = w.lookup(dir, "3-2").expect("there");
        assert_eq!(
            (range.size, w.xattrs(range.inode)),
            (2, vec![("user.a".into(), "of f".into())])
        );
        assert!(w.read().attr(f).is_err() && !w.node.contains_key(&f), "nobody keeps it");
        assert_eq!(w.lookup(ROOT, "f").is_ok(), replaced, "the name is the stranger's");
        assert_eq!(
            w.bucket.objects.get("f").map(|o| o.body.as_slice()),
            replaced.then_some(&b"theirs"[..])
        );
    }
}

#[test]
fn a_file_that_lost_its_base_and_is_written_anew_needs_none() {
    let mut w = World::new();
    let f = without_base(&mut w, true);
    let s = w.session();
    w.truncate(s, f, 0).expect("cut");
    w.deliver_all();
    let mut open = w.open(s, f, WRITE).expect("opened");
    w.write(&mut open, 0, b"anew").expect("written");
    w.close(open).expect("closed");
    w.settle_all();
    let key = format!("f.conflict-{:x}", f.0);
    assert_eq!(w.bucket.objects[&key].body, b"anew");
    assert!(!w.attr(f).dirty);
}
