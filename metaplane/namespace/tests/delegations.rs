//! Names that one session looks after, and files that get theirs late (PROTOCOL R49 to R51).

mod common;
use common::*;
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::command::Command;
use ebb_metaplane_protocol::op::{Op, RENAME_EXCHANGE, RESERVED_MAX, RETURNS_MAX};
use ebb_metaplane_protocol::{FsError, FsResult};

const ROOT: InodeId = InodeId::ROOT;

/// A directory whose names are delegated to the first of two sessions.
fn delegated() -> (World, SessionId, SessionId, InodeId, u64) {
    let mut w = World::new();
    let (a, b) = (w.session(), w.session());
    let d = w.mkdir(a, ROOT, "d").expect("mkdir");
    let (_, given) = w.create_for_names(a, d, "first").expect("create");
    let stamp = given.expect("nobody else has them").stamp;
    (w, a, b, d, stamp)
}

/// Everything that names something in `d`.
fn operations(d: InodeId) -> Vec<Op> {
    let (name, parent) = (b"first".to_vec(), d);
    let rename = |from: (InodeId, &str), to: (InodeId, &str), flags| Op::Rename {
        parent: from.0,
        name: from.1.into(),
        new_parent: to.0,
        new_name: to.1.into(),
        flags,
    };
    vec![
        Op::Create {
            parent,
            name: b"new".to_vec(),
            mode: 0,
            uid: 0,
            gid: 0,
            exclusive: true,
            open: WRITE,
            delegate: true,
        },
        Op::Mkdir { parent, name: b"new".to_vec(), mode: 0, uid: 0, gid: 0 },
        Op::Symlink { parent, name: b"new".to_vec(), target: b"t".to_vec(), uid: 0, gid: 0 },
        Op::Unlink { parent, name: name.clone() },
        Op::Rmdir { parent, name },
        rename((d, "first"), (ROOT, "elsewhere"), 0),
        rename((ROOT, "file"), (d, "first"), 0),
        rename((ROOT, "file"), (d, "first"), RENAME_EXCHANGE),
        // And what would remove the directory itself.
        Op::Rmdir { parent: ROOT, name: b"d".to_vec() },
        rename((ROOT, "empty"), (ROOT, "d"), 0),
    ]
}

fn waits(r: &FsResult<ebb_metaplane_protocol::command::OpOutcome>) -> bool {
    matches!(r, Err(FsError::Again { why, .. }) if why == ebb_namespace::why::DELEGATED)
}

#[test]
fn nobody_else_names_anything_where_names_are_delegated() {
    let (mut w, a, b, d, stamp) = delegated();
    w.create(b, ROOT, "file").expect("create");
    w.mkdir(b, ROOT, "empty").expect("mkdir");
    for op in operations(d) {
        let before = w.kv.clone();
        let reply = w.op(b, op.clone());
        assert!(waits(&reply), "{op:?}: {reply:?}");
        // It was not remembered as an answer, and left nothing.
        assert_eq!(w.names(d), ["first"]);
        w.kv = before;
    }
    assert_eq!(w.read().delegated_to_another(d, b), Ok(Some(a)));
    assert_eq!(w.read().delegated_to_another(d, a), Ok(None));
    // Its holder goes on; another stamp gives nothing back, its own does.
    w.create(a, d, "second").expect("create");
    w.op(a, Op::ReturnNames { dirs: vec![(d, stamp + 1), (ROOT, 5)] }).expect("nothing is done");
    w.op(b, Op::ReturnNames { dirs: vec![(d, stamp)] }).expect("nothing is done");
    assert!(w.create(b, d, "third").is_err());
    w.op(a, Op::ReturnNames { dirs: vec![(d, stamp)] }).expect("given back");
    w.create(b, d, "third").expect("create");
    let (_, again) = w.create_for_names(b, d, "fourth").expect("create");
    assert!(again.expect("free by now").stamp > stamp);
    // A late return of the first delegation does not end the second.
    w.op(a, Op::ReturnNames { dirs: vec![(d, stamp)] }).expect("nothing is done");
    assert_eq!(w.read().delegated_to_another(d, a), Ok(Some(b)));
}

#[test]
fn a_sessions_end_takes_its_delegations_and_its_unnamed_files_along() {
    let (mut w, a, b, d, _) = delegated();
    let before = w.read().counts().expect("readable").inodes;
    let mut files = w.reserve(a, 5).expect("room");
    w.write(&mut files[0], 0, b"data").expect("written");
    assert_eq!(w.read().counts().expect("readable").inodes, before + 5);
    let pg = PgId::of(files[0].inode, RunIndex(0), 64);
    assert!(
        w.read().held_in(pg, u64::MAX, None, 100).expect("readable").contains(&files[0].inode),
        "a node may have what S3 has not (I2)"
    );
    w.done(Command::EndSessions(vec![a]));
    assert_eq!(w.read().counts().expect("readable").inodes, before);
    w.create(b, d, "now mine").expect("create");
    let late = w.publish(&mut files[0], d, "late");
    assert_eq!(late, Err(FsError::SessionExpired));
    assert_eq!(w.names(d), ["first", "now mine"]);
}

#[test]
fn a_reserved_file_gets_one_name_where_its_session_may_give_it() {
    let (mut w, a, b, d, stamp) = delegated();
    let mut files = w.reserve(a, 3).expect("room");
    w.write(&mut files[0], 0, b"content").expect("written");
    let attr = w.publish(&mut files[0], d, "f").expect("named");
    assert_eq!((attr.size, attr.nlink, attr.mode, attr.uid, attr.gid), (7, 1, 0o640, 3, 4));
    assert!(attr.dirty);
    assert_eq!(w.names(d), ["f", "first"]);
    // Not twice, not where it may not, not what is no name.
    assert!(matches!(w.publish(&mut files[0], d, "g"), Err(FsError::Invalid(_))));
    assert_eq!(w.publish(&mut files[1], ROOT, "f"), Err(FsError::Stale));
    assert!(matches!(w.publish(&mut files[1], d, "a/b"), Err(FsError::Invalid(_))));
    let long = "x".repeat(256);
    assert_eq!(w.publish(&mut files[1], d, &long), Err(FsError::NameTooLong));
    // An unlinked file does not come back, and another session's handle is none.
    let open = w.create(a, d, "gone").expect("create");
    w.unlink(a, d, "gone").expect("unlink");
    let mut gone = open;
    assert!(matches!(w.publish(&mut gone, d, "back"), Err(FsError::Invalid(_))));
    let mut theirs = OpenFile { session: b, ..files[1].clone() };
    assert_eq!(w.publish(&mut theirs, d, "theirs"), Err(FsError::Stale));
    w.op(a, Op::ReturnNames { dirs: vec![(d, stamp)] }).expect("given back");
    assert_eq!(w.publish(&mut files[1], d, "late"), Err(FsError::Stale));
    assert_eq!(w.names(d), ["f", "first"]);
    for f in [files, vec![gone]].concat() {
        w.close(f).expect("a release never fails");
    }
    w.settle_all();
    assert_eq!(w.bucket.objects["d/f"].body, b"content");
    w.check_bucket();
}

/// Its create was answered, so it is there; and so is what the bucket brought under that name meanwhile.
#[test]
fn a_name_that_came_from_the_bucket_meanwhile_stays_and_ours_gets_another() {
    let (mut w, a, _, d, _) = delegated();
    let mut f = w.reserve(a, 1).expect("room").pop().expect("one");
    w.write(&mut f, 0, b"ours").expect("written");
    let before = w.read().names_brought().expect("readable");
    w.create(a, d, "f").expect("as if it had been found");
    let attr = w.publish(&mut f, d, "f").expect("both survive");
    let names = w.names(d);
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(names[1].starts_with("f.conflict-"), "{names:?}");
    assert_eq!(w.lookup(d, &names[1]).expect("there").inode, attr.inode);
    let after = w.read().names_brought().expect("readable");
    assert!(after > before, "nobody may believe to know the names");
    w.close(f).expect("a release never fails");
    w.settle_all();
    assert_eq!(w.bucket.objects[&format!("d/{}", names[1])].body, b"ours");
    w.check_bucket();
}

#[test]
fn what_had_to_leave_its_node_before_it_had_a_name_follows_it() {
    let (mut w, a, _, d, _) = delegated();
    let mut f = w.reserve(a, 1).expect("room").pop().expect("one");
    w.write(&mut f, 0, b"early").expect("written");
    w.commit(&mut f).expect("committed");
    w.begin_flush(vec![f.inode], true);
    w.settle_all();
    assert!(w.bucket.objects.keys().any(|k| k.starts_with(".ebb/tmp/")), "it went somewhere");
    w.publish(&mut f, d, "f").expect("named");
    w.close(f).expect("a release never fails");
    w.settle_all();
    assert_eq!(w.bucket.objects["d/f"].body, b"early");
    assert!(!w.bucket.objects.keys().any(|k| k.starts_with(".ebb/tmp/")), "and is not left there");
    w.check_bucket();
}

#[test]
fn a_shutdown_lets_what_was_begun_get_its_name() {
    let (mut w, a, _, d, _) = delegated();
    let mut f = w.reserve(a, 1).expect("room").pop().expect("one");
    w.done(Command::SetShutdown(true));
    assert_eq!(w.reserve(a, 1).map(|f| f.len()), Err(FsError::ShuttingDown));
    w.publish(&mut f, d, "f").expect("its create was answered before");
    assert_eq!(w.names(d), ["f", "first"]);
}

#[test]
fn what_is_asked_for_at_once_is_bounded() {
    let (mut w, a, _, d, _) = delegated();
    assert!(matches!(w.reserve(a, 0).map(|f| f.len()), Err(FsError::Invalid(_))));
    assert!(matches!(w.reserve(a, RESERVED_MAX + 1).map(|f| f.len()), Err(FsError::Invalid(_))));
    let dirs = vec![(d, 1); RETURNS_MAX + 1];
    assert!(matches!(w.op(a, Op::ReturnNames { dirs }), Err(FsError::Invalid(_))));
    // The handles of a session are counted whoever opened them.
    let mut made = 1;
    while made + RESERVED_MAX <= ebb_namespace::limits::HANDLES_PER_SESSION_MAX {
        made += w.reserve(a, RESERVED_MAX).expect("room").len() as u32;
    }
    let refused = w.reserve(a, RESERVED_MAX).map(|f| f.len());
    assert!(matches!(refused, Err(FsError::NotPermitted(_))), "{refused:?}");
}
