//! Files that may be open without a handle (PROTOCOL R59): what loses its last name stays until the leader says that
//! nobody has it open so.

mod common;
use common::*;
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::FsError;
use ebb_metaplane_protocol::command::Command;

const ROOT: InodeId = InodeId::ROOT;

/// A world with `a` in S3, and a session to which files may be lent.
fn lent() -> (World, SessionId, InodeId) {
    let mut w = World::new();
    let s = w.session();
    let id = w.put_file(s, ROOT, "a", b"bytes");
    w.settle_all();
    w.done(Command::Borrow(s));
    (w, s, id)
}

fn lingering(w: &World) -> Vec<InodeId> {
    w.read().lingering(None, 10).expect("readable")
}

#[test]
fn what_is_unlinked_stays_with_its_object_until_it_is_reaped() {
    let (mut w, s, id) = lent();
    assert!(w.read().lend(s, id).expect("readable").is_some());
    w.unlink(s, ROOT, "a").expect("unlinked");
    assert_eq!(lingering(&w), [id]);
    // It is there for who has it, and for nobody who comes.
    assert_eq!(w.read().attr(id).expect("it stays").0.nlink, 0);
    assert!(w.read().lend(s, id).expect("readable").is_none());
    assert!(w.lookup(ROOT, "a").is_err());
    assert!(w.bucket.objects.contains_key("a"), "its bytes");
    let file = w.open(s, id, READ).expect("by a handle it can be opened");
    w.reap();
    assert!(lingering(&w).is_empty());
    assert!(w.read().attr(id).is_ok(), "somebody has a handle");
    w.close(file).expect("closed");
    assert!(w.read().attr(id).is_err());
    w.settle_all();
    assert!(!w.bucket.objects.contains_key("a"));
}

#[test]
fn a_close_does_not_take_what_another_may_have_open() {
    let (mut w, s, id) = lent();
    let file = w.open(s, id, READ).expect("opened");
    w.unlink(s, ROOT, "a").expect("unlinked");
    w.close(file).expect("closed");
    assert!(w.read().attr(id).is_ok());
    w.reap();
    assert!(w.read().attr(id).is_err());
}

#[test]
fn what_is_replaced_stays_and_what_has_another_name_does_not_wait() {
    let (mut w, s, id) = lent();
    let other = w.put_file(s, ROOT, "b", b"other");
    w.link(s, other, ROOT, "c").expect("linked");
    w.unlink(s, ROOT, "b").expect("unlinked");
    assert!(lingering(&w).is_empty(), "it has a name");
    w.rename(s, (ROOT, "c"), (ROOT, "a")).expect("renamed");
    assert_eq!(lingering(&w), [id]);
    w.settle_all();
    w.check_bucket();
    assert_eq!(w.bucket.objects["a"].body, b"other");
}

#[test]
fn without_borrowers_nothing_waits() {
    let (mut w, s, id) = lent();
    let t = w.session();
    w.done(Command::EndSessions(vec![s]));
    assert!(w.read().borrowers().expect("readable").is_empty());
    w.unlink(t, ROOT, "a").expect("unlinked");
    assert!(w.read().attr(id).is_err());
    // What waits already is the leader's to let go.
    w.done(Command::Borrow(t));
    let id = w.put_file(t, ROOT, "d", b"bytes");
    w.unlink(t, ROOT, "d").expect("unlinked");
    w.done(Command::EndSessions(vec![t]));
    assert_eq!(lingering(&w), [id]);
    w.reap();
    assert!(w.read().attr(id).is_err());
}

#[test]
fn what_is_asked_in_vain_changes_nothing() {
    let (mut w, s, id) = lent();
    let before = w.kv.0.clone();
    w.done(Command::Reap(vec![id, InodeId(77), ROOT]));
    assert!(w.read().attr(id).is_ok(), "it has a name");
    assert_eq!(w.read().lend(SessionId(99), id), Ok(None), "nobody knows of it");
    assert_eq!(w.read().lend(s, ROOT).expect_err("a directory"), FsError::IsDirectory);
    let same = |k: &&Vec<u8>| k[0] != b'M';
    let keys = |kv: &std::collections::BTreeMap<Vec<u8>, Vec<u8>>| {
        kv.keys().filter(same).cloned().collect::<Vec<_>>()
    };
    assert_eq!(keys(&before), keys(&w.kv.0));
}
