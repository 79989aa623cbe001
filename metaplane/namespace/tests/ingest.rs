//! A bucket that was there before: lazy listings, look-ups, outside changes.

mod common;
use common::*;
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::attr::SetAttr;
use ebb_metaplane_protocol::command::{Command, CommandReply, IngestPage};
use ebb_metaplane_protocol::flush::*;
use ebb_metaplane_protocol::op::Op;
use ebb_metaplane_protocol::{FileKind, FsError, Time};
use ebb_namespace::{LookupState, Origin};

const ROOT: InodeId = InodeId::ROOT;

fn attrs(kind: FileKind, complete: bool) -> IngestAttrs {
    IngestAttrs { kind, mode: 0o644, uid: 0, gid: 0, mtime: Time(5), more: More::None, complete }
}
fn file(w: &World, prefix: &str, name: &str, complete: bool) -> IngestEntry {
    let key = format!("{prefix}{name}");
    let o = &w.bucket.objects[&key];
    let object = IngestObject { key, etag: o.etag.clone(), size: o.body.len() as u64 };
    IngestEntry { name: name.into(), object: Some(object), attrs: attrs(FileKind::File, complete) }
}
fn dir(name: &str) -> IngestEntry {
    IngestEntry { name: name.into(), object: None, attrs: attrs(FileKind::Directory, true) }
}
fn page(from: &str, next: Option<&str>) -> Option<IngestPage> {
    Some(IngestPage { from: from.into(), next: next.map(str::to_owned) })
}
fn ingest(
    w: &mut World,
    dir: InodeId,
    entries: Vec<IngestEntry>,
    page: Option<IngestPage>,
) -> CommandReply {
    let listed_at = w.read().sequence().expect("readable");
    w.apply(Command::Ingest { dir, listed_at, entries, page })
}

#[test]
fn a_bucket_appears_page_by_page() {
    let mut w = World::format(true);
    w.bucket.foreign_put("a", b"1");
    w.bucket.foreign_put("d/x", b"2");
    assert!(matches!(
        w.read().lookup_state(ROOT, b"a"),
        Ok(LookupState::AskS3 { file_key, dir_key }) if file_key == "a" && dir_key == "a/"
    ));
    let a = file(&w, "", "a", false);
    assert_eq!(ingest(&mut w, ROOT, vec![a.clone()], page("", Some("a"))), CommandReply::Done);
    let repeated = ingest(&mut w, ROOT, vec![a], page("", Some("a")));
    assert!(matches!(repeated, CommandReply::Refused(_)), "that page was taken already");
    assert_eq!(ingest(&mut w, ROOT, vec![dir("d")], page("a", None)), CommandReply::Done);
    assert_eq!(w.names(ROOT), ["a", "d"]);
    assert_eq!(w.read().lookup_state(ROOT, b"nope"), Ok(LookupState::Absent));
    let d = w.lookup(ROOT, "d").expect("there").inode;
    assert_eq!(
        w.read().directory_origin(d),
        Ok(("d/".into(), Origin::Listing { continuation: String::new() }))
    );
    assert_eq!(w.read().incomplete_under(ROOT, 10), Ok(vec![d]));
    assert_eq!(w.read().counts().expect("readable").dirty_inodes, 0, "looking changes nothing");
}

#[test]
fn attributes_come_before_anyone_sees_or_changes_them() {
    let mut w = World::format(true);
    w.bucket.foreign_put("a", b"target");
    let s = w.session();
    let a = file(&w, "", "a", false);
    let etag = w.bucket.objects["a"].etag.clone();
    ingest(&mut w, ROOT, vec![a], page("", None));
    let id = w.lookup(ROOT, "a").expect("there").inode;
    assert!(matches!(
        w.read().lookup_state(ROOT, b"a"),
        Ok(LookupState::Found { needs_attrs: true, .. })
    ));
    assert_eq!(w.read().attrs_source(id), Ok(Some(("a".into(), etag.clone()))));
    let chmod = Op::SetAttr { inode: id, set: SetAttr { mode: Some(0o600), ..SetAttr::default() } };
    assert!(is_again(&w.op(s, chmod.clone())));
    // It turns out to be a link; the HEAD of another object is ignored.
    let link = IngestAttrs {
        kind: FileKind::Symlink,
        more: More::Target(b"target".to_vec()),
        ..attrs(FileKind::File, true)
    };
    w.done(Command::SetIngestAttrs(vec![(id, "\"other\"".into(), link.clone())]));
    assert_eq!(w.attr(id).kind, FileKind::File);
    w.done(Command::SetIngestAttrs(vec![(id, etag, link)]));
    assert_eq!(w.attr(id).kind, FileKind::Symlink);
    assert_eq!(w.read().attrs_source(id), Ok(None));
    w.op(s, chmod).expect("chmod");
}

#[test]
fn a_late_listing_brings_nothing_back() {
    let mut w = World::format(true);
    let s = w.session();
    w.bucket.foreign_put("a", b"1");
    let a = file(&w, "", "a", true);
    // The listing begins, then the name is looked up, unlinked and its object deleted.
    let listed_at = w.read().sequence().expect("readable");
    ingest(&mut w, ROOT, vec![a.clone()], None);
    w.unlink(s, ROOT, "a").expect("unlink");
    let late = Command::Ingest { dir: ROOT, listed_at, entries: vec![a], page: None };
    w.done(late.clone());
    assert!(w.names(ROOT).is_empty(), "its delete is pending");
    w.settle_all();
    assert!(w.bucket.objects.is_empty());
    w.done(late);
    assert!(w.names(ROOT).is_empty(), "it was deleted after the listing began");
    // A stranger puts it there again: a listing that begins now shows it.
    w.bucket.foreign_put("a", b"2");
    let a = file(&w, "", "a", true);
    ingest(&mut w, ROOT, vec![a], None);
    assert_eq!(w.names(ROOT), ["a"]);
}

#[test]
fn a_removed_directory_is_not_brought_back_by_what_is_being_deleted_below_it() {
    let mut w = World::format(true);
    let s = w.session();
    let d = w.mkdir(s, ROOT, "d").expect("mkdir");
    w.put_file(s, d, "x", b"1");
    w.settle_all();
    w.unlink(s, d, "x").expect("unlink");
    w.op(s, Op::Rmdir { parent: ROOT, name: b"d".to_vec() }).expect("rmdir");
    ingest(&mut w, ROOT, vec![dir("d")], page("", None));
    assert!(w.names(ROOT).is_empty());
}

/// The leader stood still while it stored the marker of a directory, and its request came when the directory was long
/// gone, and the one around it: nobody made that one in the bucket.
#[test]
fn what_arrives_late_below_a_removed_directory_does_not_bring_it_back() {
    let mut w = World::format(true);
    let s = w.session();
    let d = w.mkdir(s, ROOT, "d").expect("mkdir");
    let e = w.mkdir(s, d, "e").expect("mkdir");
    w.begin_flush(vec![e], false);
    let ticket = w.begun.pop().expect("it is dirty");
    let plan = w.seal(&ticket);
    w.take_plan(e, plan);
    w.flight_done(0, Fate::LostRequest, true);
    w.look_up_keys();
    w.op(s, Op::Rmdir { parent: d, name: b"e".to_vec() }).expect("rmdir");
    w.op(s, Op::Rmdir { parent: ROOT, name: b"d".to_vec() }).expect("rmdir");
    assert!(w.bucket.objects.is_empty());
    w.zombie_acts(0, true);
    assert!(w.bucket.objects.contains_key("d/e/"), "it has come");
    ingest(&mut w, ROOT, vec![dir("d")], page("", None));
    assert!(w.names(ROOT).is_empty());
    // When nothing more can come, what came is deleted; what others make there is seen again.
    w.settle_all();
    assert!(w.bucket.objects.is_empty(), "{:?}", w.bucket.objects.keys());
    w.bucket.foreign_put("d/x", b"1");
    ingest(&mut w, ROOT, vec![dir("d")], None);
    assert_eq!(w.names(ROOT), ["d"]);
}

/// A directory of many files is removed while the one around it is listed: most of them were gone when that began.
#[test]
fn a_late_listing_brings_no_directory_back_of_which_much_was_deleted_before() {
    let deletes = |w: &mut World| {
        w.begin_deletes(2_000);
        while !w.flights.is_empty() {
            w.flight_done(0, Fate::Fine, false);
        }
    };
    let mut w = World::format(true);
    let s = w.session();
    // As others made it: without a marker.
    let names: Vec<String> = (0..1_200).map(|i| format!("a{i:04}")).collect();
    for name in names.iter().map(String::as_str).chain(["z"]) {
        w.bucket.foreign_put(&format!("d/{name}"), b"1");
    }
    ingest(&mut w, ROOT, vec![dir("d")], page("", None));
    let d = w.lookup(ROOT, "d").expect("there").inode;
    let files = names.iter().map(String::as_str).chain(["z"]);
    let files = files.map(|name| file(&w, "d/", name, true)).collect();
    ingest(&mut w, d, files, page("", None));
    for name in &names {
        w.unlink(s, d, name).expect("unlink");
    }
    deletes(&mut w);
    let listed_at = w.read().sequence().expect("readable");
    w.unlink(s, d, "z").expect("unlink");
    w.op(s, Op::Rmdir { parent: ROOT, name: b"d".to_vec() }).expect("rmdir");
    deletes(&mut w);
    assert!(w.bucket.objects.is_empty());
    w.done(Command::Ingest { dir: ROOT, listed_at, entries: vec![dir("d")], page: None });
    assert!(w.names(ROOT).is_empty());
    // A listing from now on is believed.
    ingest(&mut w, ROOT, vec![dir("d")], None);
    assert_eq!(w.names(ROOT), ["d"]);
}

#[test]
fn reserved_and_unusable_names_stay_hidden() {
    let mut w = World::format(true);
    w.bucket.foreign_put(".ebb/owner", b"1");
    ingest(&mut w, ROOT, vec![dir(".ebb"), dir("..")], page("", None));
    assert!(w.names(ROOT).is_empty());
    assert_eq!(w.read().lookup_state(ROOT, b".ebb"), Ok(LookupState::Absent));
}

#[test]
fn a_directory_rename_waits_for_its_listing() {
    let mut w = World::format(true);
    let s = w.session();
    w.bucket.foreign_put("d/x", b"1");
    ingest(&mut w, ROOT, vec![dir("d")], page("", None));
    let d = w.lookup(ROOT, "d").expect("there").inode;
    let refused = w.rename(s, (ROOT, "d"), (ROOT, "e"));
    assert!(
        matches!(refused, Err(FsError::Again { ref why, .. }) if why == ebb_namespace::why::LISTING)
    );
    let rmdir = Op::Rmdir { parent: ROOT, name: b"d".to_vec() };
    assert!(is_again(&w.op(s, rmdir)), "it may not be empty");
    let x = file(&w, "d/", "x", true);
    ingest(&mut w, d, vec![x], page("", None));
    let id = w.lookup(d, "x").expect("there").inode;
    w.expected.insert(id, b"1".to_vec());
    w.rename(s, (ROOT, "d"), (ROOT, "e")).expect("rename");
    w.settle_all();
    assert!(w.bucket.objects.contains_key("e/x") && !w.bucket.objects.contains_key("d/x"));
}

#[test]
fn an_outside_change_is_adopted_only_when_nothing_is_dirty() {
    let mut w = World::format(true);
    let s = w.session();
    w.bucket.foreign_put("a", b"1");
    let a = file(&w, "", "a", true);
    ingest(&mut w, ROOT, vec![a], page("", None));
    let id = w.lookup(ROOT, "a").expect("there").inode;
    let h = w.open(s, id, READ).expect("open");
    let r = w.read().revalidation(id).expect("readable").expect("clean");
    let etag = w.bucket.foreign_put("a", b"22");
    let object = Some(ForeignObject { etag, size: 2, attrs: attrs(FileKind::File, true) });
    let adopt = Command::Adopt(vec![Adopt {
        inode: id,
        lineage: r.lineage,
        old_etag: Some(r.etag.clone()),
        object,
    }]);
    w.done(adopt.clone());
    let now = w.attr(id);
    assert_eq!((now.size, now.dirty), (2, false));
    assert!(now.content > h.grant.view.content && now.lineage > r.lineage);
    let regrant = Op::Regrant { handle: h.handle, write: false, write_end: 0 };
    assert_eq!(w.op(s, regrant), Err(FsError::Stale), "never a mix of two objects");
    let before = w.attr(id);
    w.done(adopt);
    assert_eq!(w.attr(id), before, "an older look changes nothing");

    // Dirty: the outside change is a conflict of the next flush instead.
    let mut h = w.open(s, id, WRITE).expect("open");
    w.write(&mut h, 0, b"ours").expect("write");
    w.close(h).expect("close");
    assert_eq!(w.read().revalidation(id), Ok(None));
    w.bucket.foreign_put("a", b"333");
    w.settle_all();
    assert_eq!(w.names(ROOT).len(), 2, "both survive");
    assert_eq!(w.bucket.objects["a"].body, b"333");
}

#[test]
fn an_object_deleted_outside_is_gone_and_queues_nothing() {
    let mut w = World::format(true);
    w.bucket.foreign_put("a", b"1");
    let a = file(&w, "", "a", true);
    ingest(&mut w, ROOT, vec![a], page("", None));
    let id = w.lookup(ROOT, "a").expect("there").inode;
    let r = w.read().revalidation(id).expect("readable").expect("clean");
    w.bucket.objects.clear();
    w.done(Command::Adopt(vec![Adopt {
        inode: id,
        lineage: r.lineage,
        old_etag: Some(r.etag),
        object: None,
    }]));
    assert!(w.names(ROOT).is_empty());
    assert!(w.read().key_work(None, 10, true, Time(w.now)).expect("readable").is_empty());
}

#[test]
fn an_object_deleted_under_a_dirty_file_is_written_again() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "a", b"1234");
    w.settle_all();
    let mut h = w.open(s, f, WRITE).expect("open");
    w.write(&mut h, 0, b"5678").expect("write");
    w.close(h).expect("close");
    w.bucket.objects.clear();
    w.settle_all();
    w.check_bucket();
}

#[test]
fn forgotten_deletes_refuse_listings_that_are_older() {
    let mut w = World::format(true);
    let s = w.session();
    let listed_at = w.read().sequence().expect("readable");
    for name in ["a", "b", "c"] {
        w.put_file(s, ROOT, name, b"1");
        w.settle_all();
        w.unlink(s, ROOT, name).expect("unlink");
        w.settle_all();
        w.now += 2 * ebb_namespace::limits::TOMBSTONE_TTL_NS;
    }
    let old = Command::Ingest { dir: ROOT, listed_at, entries: vec![], page: None };
    assert!(matches!(w.apply(old), CommandReply::Refused(_)));
}

#[test]
fn an_outside_change_under_a_pending_chmod_or_rename_is_no_conflict() {
    let mut w = World::new();
    let s = w.session();
    let a = w.put_file(s, ROOT, "a", b"1");
    let b = w.put_file(s, ROOT, "b", b"2");
    w.settle_all();
    let set = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    w.op(s, Op::SetAttr { inode: a, set }).expect("chmod");
    w.bucket.foreign_put("a", b"theirs");
    w.expected.insert(a, b"theirs".to_vec());
    // The copy's source changed: the leader looks at it and reports.
    w.rename(s, (ROOT, "b"), (ROOT, "c")).expect("rename");
    let etag = w.bucket.foreign_put("b", b"also theirs");
    w.expected.insert(b, b"also theirs".to_vec());
    let view = w.read().grant_view(b).expect("it lives").view;
    let object = Some(ForeignObject { etag, size: 11, attrs: attrs(FileKind::File, true) });
    w.done(Command::Adopt(vec![Adopt {
        inode: b,
        lineage: view.lineage,
        old_etag: view.backing.map(|b| b.etag),
        object,
    }]));
    w.settle_all();
    w.check_bucket();
    assert_eq!(w.names(ROOT), ["a", "c"], "nothing of ours was in the way");
    assert_eq!(w.attr(a).mode, 0o600);
}
