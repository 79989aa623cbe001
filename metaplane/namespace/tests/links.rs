//! Files with several names (PROTOCOL R58): what the names share, what S3 gets, what is left when one goes.

mod common;
use common::*;
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::FsError;
use ebb_metaplane_protocol::attr::{LINKS_MAX, SetAttr};
use ebb_metaplane_protocol::command::Command;
use ebb_metaplane_protocol::flush::{Adopt, FlushPlan};
use ebb_metaplane_protocol::op::{Op, OpenMode, RENAME_EXCHANGE};

const ROOT: InodeId = InodeId::ROOT;

/// A world with `a` and its other name `b`, all in S3.
fn two_names() -> (World, SessionId, InodeId) {
    let mut w = World::new();
    let s = w.session();
    let id = w.put_file(s, ROOT, "a", b"bytes");
    w.link(s, id, ROOT, "b").expect("linked");
    w.settle_all();
    (w, s, id)
}

fn body<'w>(w: &'w World, key: &str) -> &'w [u8] {
    &w.bucket.objects[key].body
}

#[test]
fn names_show_one_inode_and_count() {
    let (mut w, s, id) = two_names();
    let dir = w.mkdir(s, ROOT, "d").expect("made");
    assert_eq!(w.link(s, id, dir, "c").expect("linked").nlink, 3);
    for (parent, name) in [(ROOT, "a"), (ROOT, "b"), (dir, "c")] {
        let attr = w.lookup(parent, name).expect("there");
        assert_eq!((attr.inode, attr.nlink, attr.size), (id, 3, 5));
    }
    let mode = Some(0o600);
    w.op(s, Op::SetAttr { inode: id, set: SetAttr { mode, ..SetAttr::default() } }).expect("set");
    let mut f = w.open(s, id, WRITE).expect("opened");
    w.write(&mut f, 0, b"BYTES!").expect("written");
    w.close(f).expect("closed");
    w.settle_all();
    w.check_bucket();
    assert_eq!(body(&w, "d/c"), b"BYTES!");
    assert_eq!(w.bucket.objects["b"].mode, 0o600);
}

#[test]
fn what_can_have_no_other_name_is_refused_and_nothing_changes() {
    let (mut w, s, id) = two_names();
    let dir = w.mkdir(s, ROOT, "d").expect("made");
    let mut gone = w.create(s, ROOT, "gone").expect("made");
    w.unlink(s, ROOT, "gone").expect("unlinked");
    let before = w.kv.0.len();
    let long = "x".repeat(256);
    for (inode, parent, name, errno) in [
        (dir, ROOT, "e", 1),
        (ROOT, dir, "e", 1),
        (id, ROOT, "b", 17),
        (id, ROOT, "a", 17),
        (id, InodeId(77), "e", 116),
        (InodeId(77), ROOT, "e", 116),
        (id, id, "e", 20),
        (gone.inode, ROOT, "e", 2),
        (id, ROOT, &long, 36),
        (id, ROOT, ".ebb", 1),
    ] {
        let refused = w.link(s, inode, parent, name).map_err(|e| e.errno());
        assert_eq!(refused.map(|a| a.nlink), Err(errno), "{inode} as {name}");
    }
    assert_eq!(w.attr(id).nlink, 2);
    assert_eq!(w.kv.0.len(), before);
    w.write(&mut gone, 0, b"still").expect("open files live on");
    // The inodes of names are nobody's business.
    let hidden = w.read().links(id).expect("readable")[0];
    for op in [
        Op::Link { inode: hidden, parent: ROOT, name: b"e".to_vec() },
        Op::Open { inode: hidden, open: READ },
        Op::SetAttr { inode: hidden, set: SetAttr { mode: Some(0), ..SetAttr::default() } },
    ] {
        assert_eq!(w.op(s, op), Err(FsError::Stale));
    }
}

#[test]
fn a_file_has_a_bounded_number_of_names() {
    let mut w = World::new();
    let s = w.session();
    let id = w.put_file(s, ROOT, "a", b"x");
    for i in 2..=LINKS_MAX {
        assert_eq!(w.link(s, id, ROOT, &format!("n{i}")).expect("linked").nlink, i);
    }
    assert_eq!(w.link(s, id, ROOT, "more").map(|_| ()), Err(FsError::TooManyLinks));
    assert_eq!(FsError::TooManyLinks.errno(), 31);
    w.unlink(s, ROOT, "n7").expect("unlinked");
    w.link(s, id, ROOT, "more").expect("there is room again");
    w.settle_all();
    w.check_bucket();
    assert_eq!(w.bucket.objects.len(), LINKS_MAX as usize);
}

/// The data goes to S3 once; the other names are copies that S3 makes.
#[test]
fn the_body_is_uploaded_once() {
    let mut w = World::new();
    let s = w.session();
    let id = w.put_file(s, ROOT, "a", b"bytes");
    w.link(s, id, ROOT, "b").expect("linked");
    let link = w.read().links(id).expect("readable")[0];
    // The copy has to wait for the file.
    w.begin_flush(vec![link, id], false);
    let tickets: Vec<_> = std::mem::take(&mut w.begun);
    let first = w.seal(&tickets[0]);
    assert_eq!(first, FlushPlan::Blocked { blocker: Some(id) });
    let FlushPlan::Store(plan) = w.seal(&tickets[1]) else { panic!("the file has bytes") };
    assert!(plan.has_data);
    w.take_plan(id, FlushPlan::Store(plan));
    w.flight_done(0, Fate::Fine, false);
    w.begin_flush(vec![link], false);
    let ticket = w.begun.pop().expect("dirty");
    assert!(!ticket.needs_seal, "no node is asked");
    let FlushPlan::Store(plan) = w.seal(&ticket) else { panic!("the name has no object yet") };
    let from = plan.view.backing.as_ref().map(|b| b.key.as_str());
    assert_eq!((plan.key.as_str(), plan.has_data, from), ("b", false, Some("a")));
    w.take_plan(link, FlushPlan::Store(plan));
    w.settle_all();
    w.check_bucket();
    // A rename of another name is a copy of one object.
    let puts = w.bucket.puts;
    w.rename(s, (ROOT, "b"), (ROOT, "c")).expect("renamed");
    w.settle_all();
    w.check_bucket();
    assert_eq!(w.bucket.puts, puts + 1);
}

/// While a file is written on and on, its other names follow what was stored last.
#[test]
fn nothing_is_clean_before_every_name_holds_it() {
    let (mut w, s, id) = two_names();
    let mut f = w.open(s, id, WRITE).expect("opened");
    w.write(&mut f, 0, b"NEW").expect("written");
    w.commit(&mut f).expect("committed");
    w.begin_flush(vec![id], false);
    let ticket = w.begun.pop().expect("dirty");
    let plan = w.seal(&ticket);
    w.take_plan(id, plan);
    w.flight_done(0, Fate::Fine, false);
    assert_eq!((body(&w, "a"), body(&w, "b")), (&b"NEWes"[..], &b"bytes"[..]));
    let links = w.read().dirty_links(&[id]).expect("readable");
    assert_eq!(links.len(), 1, "the file is clean, its other name isn't");
    assert!(w.read().counts().expect("readable").dirty_inodes > 0);
    w.close(f).expect("closed");
    w.settle_all();
    w.check_bucket();
}

#[test]
fn the_last_name_takes_the_data_along_and_no_other() {
    for order in [["a", "b", "c"], ["b", "a", "c"], ["c", "b", "a"], ["a", "c", "b"]] {
        for stored in [true, false] {
            let mut w = World::new();
            let s = w.session();
            let id = w.put_file(s, ROOT, "a", b"bytes");
            let dir = w.mkdir(s, ROOT, "d").expect("made");
            w.link(s, id, ROOT, "b").expect("linked");
            w.link(s, id, dir, "c").expect("linked");
            if stored {
                w.settle_all();
            }
            for (i, name) in order.into_iter().enumerate() {
                assert_eq!(w.attr(id).nlink, 3 - i as u32);
                let puts = w.bucket.puts;
                w.unlink(s, if name == "c" { dir } else { ROOT }, name).expect("unlinked");
                w.settle_all();
                w.check_bucket();
                if stored {
                    // Beside the mark of the directory, whose times changed.
                    let marks = u64::from(name == "c");
                    let why = "the others' objects are there already";
                    assert_eq!(w.bucket.puts, puts + marks, "{why}");
                }
            }
            assert!(w.read().attr(id).is_err(), "nothing is left of it");
            let left: Vec<_> = w.bucket.objects.keys().collect();
            assert_eq!(left, ["d/"]);
        }
    }
}

#[test]
fn an_open_file_outlives_its_last_name() {
    let (mut w, s, id) = two_names();
    let mut f = w.open(s, id, WRITE).expect("opened");
    w.unlink(s, ROOT, "a").expect("unlinked");
    w.unlink(s, ROOT, "b").expect("unlinked");
    assert_eq!(w.attr(id).nlink, 0);
    assert_eq!(w.link(s, id, ROOT, "c").map(|_| ()), Err(FsError::NotFound));
    w.write(&mut f, 0, b"more").expect("open files live on");
    w.close(f).expect("closed");
    assert!(w.read().attr(id).is_err());
    w.settle_all();
    w.check_bucket();
}

#[test]
fn a_rename_of_one_name_to_another_of_the_same_file_does_nothing() {
    let (mut w, s, id) = two_names();
    for flags in [0, RENAME_EXCHANGE] {
        for (from, to) in [("a", "b"), ("b", "a")] {
            let (name, new_name) = (from.into(), to.into());
            let op = Op::Rename { parent: ROOT, name, new_parent: ROOT, new_name, flags };
            w.op(s, op).expect("nothing to do");
            assert_eq!(w.names(ROOT), ["a", "b"]);
        }
    }
    assert_eq!(w.attr(id).nlink, 2);
    // Over a name of another file: that file keeps its other one.
    let other = w.put_file(s, ROOT, "c", b"other");
    w.rename(s, (ROOT, "c"), (ROOT, "a")).expect("renamed");
    assert_eq!((w.attr(id).nlink, w.attr(other).nlink), (1, 1));
    assert_eq!(w.lookup(ROOT, "b").expect("there").inode, id);
    w.settle_all();
    w.check_bucket();
    assert_eq!((body(&w, "a"), body(&w, "b")), (&b"other"[..], &b"bytes"[..]));
}

#[test]
fn names_go_with_their_directories() {
    let (mut w, s, id) = two_names();
    let dir = w.mkdir(s, ROOT, "d").expect("made");
    w.link(s, id, dir, "c").expect("linked");
    w.settle_all();
    let refused = w.op(s, Op::Rmdir { parent: ROOT, name: b"d".to_vec() });
    assert_eq!(refused.map(|_| ()), Err(FsError::NotEmpty));
    w.rename(s, (ROOT, "d"), (ROOT, "e")).expect("renamed");
    w.settle_all();
    w.check_bucket();
    assert_eq!(body(&w, "e/c"), b"bytes");
}

/// Somebody deletes one of the objects with another tool: that name goes, and the data is the other's.
#[test]
fn an_object_deleted_outside_takes_its_name_along_and_nothing_else() {
    let (mut w, s, id) = two_names();
    let known = w.read().revalidation(id).expect("readable").expect("clean");
    w.bucket.objects.remove(&known.key);
    let open = w.open(s, id, READ).expect("opened");
    let (lineage, old_etag) = (known.lineage, Some(known.etag));
    w.done(Command::Adopt(vec![Adopt { inode: id, lineage, old_etag, object: None }]));
    assert_eq!((w.names(ROOT), w.attr(id).nlink), (vec!["b".to_owned()], 1));
    let again = w.op(s, Op::Regrant { handle: open.handle, write: false, write_end: 0 });
    assert!(again.is_ok(), "who has it open reads on: {again:?}");
    let puts = w.bucket.puts;
    w.settle_all();
    w.check_bucket();
    assert_eq!((w.bucket.puts, body(&w, "b")), (puts, &b"bytes"[..]));
}

/// The same of the other name; and a stranger's object there is a file of its own.
#[test]
fn a_stranger_at_another_name_takes_that_name_and_nothing_else() {
    for replaced in [false, true] {
        let (mut w, _, id) = two_names();
        let link = w.read().links(id).expect("readable")[0];
        let known = w.read().revalidation(link).expect("readable").expect("clean");
        assert_eq!(known.key, "b");
        w.bucket.objects.remove("b");
        let object = replaced.then(|| {
            let etag = w.bucket.foreign_put("b", b"theirs");
            let attrs = attrs_of(&w.bucket.objects["b"]);
            ebb_metaplane_protocol::flush::ForeignObject { etag, size: 6, attrs }
        });
        let (lineage, old_etag) = (known.lineage, Some(known.etag));
        w.done(Command::Adopt(vec![Adopt { inode: link, lineage, old_etag, object }]));
        assert_eq!(w.attr(id).nlink, 1);
        if replaced {
            let theirs = w.lookup(ROOT, "b").expect("there");
            assert_ne!(theirs.inode, id);
            w.expected.insert(theirs.inode, b"theirs".to_vec());
        } else {
            assert_eq!(w.names(ROOT), ["a"]);
        }
        w.settle_all();
        w.check_bucket();
        assert_eq!(body(&w, "a"), b"bytes");
    }
}

/// The same while a part of the file is dirty: what is clean of it is in the other name's object.
#[test]
fn a_base_deleted_outside_is_found_under_another_name() {
    for replaced in [false, true] {
        let (mut w, s, id) = two_names();
        let mut f = w.open(s, id, WRITE).expect("opened");
        w.write(&mut f, 1, b"YT").expect("written");
        w.close(f).expect("closed");
        if replaced {
            w.bucket.foreign_put("a", b"a stranger's");
        } else {
            w.bucket.objects.remove("a");
        }
        w.settle_all();
        let names = if replaced { vec!["a", "b"] } else { vec!["b"] };
        assert_eq!(w.names(ROOT), names);
        assert_eq!((w.attr(id).nlink, body(&w, "b")), (1, &b"bYTes"[..]));
        if replaced {
            let theirs = w.lookup(ROOT, "a").expect("there").inode;
            w.expected.insert(theirs, b"a stranger's".to_vec());
        }
        w.check_bucket();
    }
}

/// Overwritten outside under the file's own name: all names follow, as for any outside change.
#[test]
fn a_change_outside_reaches_all_names() {
    let (mut w, _, id) = two_names();
    let known = w.read().revalidation(id).expect("readable").expect("clean");
    let etag = w.bucket.foreign_put("a", b"changed");
    let attrs = attrs_of(&w.bucket.objects["a"]);
    let object = Some(ebb_metaplane_protocol::flush::ForeignObject { etag, size: 7, attrs });
    let (lineage, old_etag) = (known.lineage, Some(known.etag));
    w.done(Command::Adopt(vec![Adopt { inode: id, lineage, old_etag, object }]));
    w.expected.insert(id, b"changed".to_vec());
    w.settle_all();
    assert_eq!(body(&w, "b"), b"changed");
}

#[test]
fn symbolic_links_and_empty_files_have_several_names_too() {
    let mut w = World::new();
    let s = w.session();
    let (name, target) = (b"l".to_vec(), b"to/where".to_vec());
    w.op(s, Op::Symlink { parent: ROOT, name, target, uid: 0, gid: 0 }).expect("made");
    let link = w.lookup(ROOT, "l").expect("there").inode;
    w.link(s, link, ROOT, "m").expect("linked");
    let f = w.create(s, ROOT, "empty").expect("made");
    let empty = f.inode;
    w.link(s, empty, ROOT, "none").expect("linked");
    w.close(f).expect("closed");
    w.settle_all();
    w.check_bucket();
    assert_eq!((body(&w, "m"), body(&w, "none")), (&b"to/where"[..], &b""[..]));
    let f = w.open(s, empty, OpenMode { write: true, truncate: true }).expect("opened");
    w.close(f).expect("closed");
    w.unlink(s, ROOT, "l").expect("unlinked");
    w.settle_all();
    w.check_bucket();
}

/// A dump has the file once, and its names; what is loaded from it is the same file with the same names.
#[test]
fn a_dump_keeps_names_together() {
    let (mut w, s, id) = two_names();
    let dir = w.mkdir(s, ROOT, "0").expect("made");
    w.link(s, id, dir, "first").expect("linked");
    w.settle_all();
    let records = dump(&w.kv, 2);
    let (kv, replies) = load(&records, 1);
    assert!(
        replies.iter().all(|r| *r == ebb_metaplane_protocol::CommandReply::Done),
        "{replies:?}"
    );
    let mut there = World::new();
    there.kv = kv;
    there.bucket = w.bucket.clone();
    let inode = there.lookup(ROOT, "a").expect("there").inode;
    let dir = there.lookup(ROOT, "0").expect("there").inode;
    for (parent, name) in [(dir, "first"), (ROOT, "b")] {
        let attr = there.lookup(parent, name).expect("there");
        assert_eq!((attr.inode, attr.nlink, attr.size), (inode, 3, 5));
    }
    there.expected.insert(inode, b"bytes".to_vec());
    let puts = there.bucket.puts;
    there.settle_all();
    there.check_bucket();
    assert_eq!(there.bucket.puts, puts, "every object is in its place");
}

/// Where no name's object holds what the lost base did, the other names keep what theirs hold, as files of their own.
#[test]
fn names_of_a_file_that_is_taken_apart_become_files() {
    let (mut w, s, id) = two_names();
    let write = |w: &mut World, at, bytes: &[u8]| {
        let mut f = w.open(s, id, WRITE).expect("opened");
        w.write(&mut f, at, bytes).expect("written");
        w.close(f).expect("closed");
    };
    write(&mut w, 0, b"again");
    w.begin_flush(vec![id], false);
    let ticket = w.begun.pop().expect("dirty");
    let plan = w.seal(&ticket);
    w.take_plan(id, plan);
    w.flight_done(0, Fate::Fine, false);
    w.deliver_all();
    // "b" is still of the time before.
    write(&mut w, 1, b"X");
    w.bucket.objects.remove("a");
    w.expected.remove(&id);
    w.settle_all();
    let names = w.names(ROOT);
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names[0].starts_with("a.conflict-"), "{names:?}");
    let b = w.lookup(ROOT, "b").expect("there");
    assert_eq!((b.nlink, b.size, body(&w, "b")), (1, 5, &b"bytes"[..]));
    assert_ne!(b.inode, id);
    assert_eq!(body(&w, &format!("{}/1-1", names[0])), b"X");
}
