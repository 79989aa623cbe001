//! Extended attributes: attributes like any other, wherever an inode goes.

mod common;
use common::{World, attrs_of, check, dump, load};
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::attr::SetAttr;
use ebb_metaplane_protocol::check::{Repair, Rule};
use ebb_metaplane_protocol::command::{Command, CommandReply};
use ebb_metaplane_protocol::dump::Record;
use ebb_metaplane_protocol::flush::{Adopt, ForeignObject};
use ebb_metaplane_protocol::op::Op;
use ebb_metaplane_protocol::xattr::{XATTRS_TEXT_BYTES_MAX, XattrMode, Xattrs};
use ebb_metaplane_protocol::{FsError, FsResult};

const ROOT: InodeId = InodeId::ROOT;

fn change(
    w: &mut World,
    inode: InodeId,
    name: &str,
    value: Option<&[u8]>,
    how: XattrMode,
) -> FsResult<()> {
    let s = w.session();
    let (name, value) = (name.into(), value.map(<[u8]>::to_vec));
    w.op(s, Op::SetXattr { inode, name, value, how }).map(drop)
}

fn set(w: &mut World, inode: InodeId, name: &str, value: &[u8]) -> FsResult<()> {
    change(w, inode, name, Some(value), XattrMode::Any)
}

fn records(w: &World) -> usize {
    w.kv.0.keys().filter(|k| k[0] == b'x').count()
}

fn pairs(pairs: &[(&str, &[u8])]) -> Xattrs {
    pairs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.to_vec())).collect()
}

#[test]
fn they_are_made_replaced_and_removed_as_linux_has_it() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"data");
    let d = w.mkdir(s, ROOT, "d").expect("made");
    w.settle_all();
    for inode in [f, d, ROOT] {
        assert!(w.xattrs(inode).is_empty() && !w.attr(inode).xattrs);
        let (mode, ctime) = (w.attr(inode).mode, w.attr(inode).ctime);
        set(&mut w, inode, "user.b", b"\0\xff").expect("set");
        set(&mut w, inode, "user.a", b"1").expect("set");
        let create = change(&mut w, inode, "user.a", Some(b"2"), XattrMode::Create);
        assert_eq!(create, Err(FsError::Exists));
        let replace = change(&mut w, inode, "user.c", Some(b"2"), XattrMode::Replace);
        assert_eq!(replace, Err(FsError::NoAttribute));
        change(&mut w, inode, "user.a", Some(b"2"), XattrMode::Replace).expect("it is there");
        assert_eq!(w.xattrs(inode), pairs(&[("user.a", b"2"), ("user.b", b"\0\xff")]));
        let attr = w.attr(inode);
        assert_eq!((attr.mode, attr.dirty), (mode, inode != ROOT));
        assert!(attr.ctime > ctime && attr.xattrs);
        // Another mode, and back.
        for mode in [Some(0o7777), Some(mode)] {
            w.op(s, Op::SetAttr { inode, set: SetAttr { mode, ..SetAttr::default() } })
                .expect("chmod");
            assert_eq!((Some(w.attr(inode).mode), w.xattrs(inode).len()), (mode, 2));
        }
        w.settle_all();
        w.check_bucket();
        let removed = change(&mut w, inode, "user.c", None, XattrMode::Any);
        assert_eq!(removed, Err(FsError::NoAttribute));
        for name in ["user.a", "user.b"] {
            change(&mut w, inode, name, None, XattrMode::Any).expect("removed");
        }
        assert!(w.xattrs(inode).is_empty());
        w.settle_all();
        w.check_bucket();
    }
    assert_eq!(records(&w), 0);
}

#[test]
fn what_is_refused_changes_nothing() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"data");
    set(&mut w, f, "user.kept", b"value").expect("set");
    w.settle_all();
    // To the last byte, and one more.
    let room = XATTRS_TEXT_BYTES_MAX - "user.kept=value,user.full=".len();
    set(&mut w, f, "user.full", &vec![b'x'; room]).expect("fits");
    assert_eq!(set(&mut w, f, "user.full", &vec![b'x'; room + 1]), Err(FsError::NoSpace));
    assert_eq!(set(&mut w, f, "user.x", b""), Err(FsError::NoSpace));
    change(&mut w, f, "user.full", None, XattrMode::Any).expect("removed");
    w.settle_all();
    let before = w.attr(f);
    let of = |w: &World, table: u8| -> Vec<_> {
        w.kv.0.iter().filter(|(k, _)| k[0] == table).map(|(k, v)| (k.clone(), v.clone())).collect()
    };
    let kept = (of(&w, b'I'), of(&w, b'x'), of(&w, b'D'));
    let errno = |r: FsResult<()>| r.map_err(|e| e.errno());
    let long = format!("user.{}", "n".repeat(251));
    for (name, value, want) in [
        ("user.big", vec![1; 4_096], 28),
        ("user.big", vec![1; 65_537], 7),
        (&long, b"v".to_vec(), 34),
        ("", b"v".to_vec(), 22),
        ("user.", b"v".to_vec(), 95),
        ("system.posix_acl_access", b"v".to_vec(), 95),
    ] {
        assert_eq!(errno(set(&mut w, f, name, &value)), Err(want), "{name}");
    }
    assert_eq!((of(&w, b'I'), of(&w, b'x'), of(&w, b'D')), kept);
    assert_eq!(w.attr(f), before);
    assert_eq!(set(&mut w, InodeId(999), "user.a", b""), Err(FsError::Stale));
    w.done(Command::SetShutdown(true));
    let late = Op::SetXattr {
        inode: f,
        name: b"user.a".to_vec(),
        value: Some(b"late".to_vec()),
        how: XattrMode::Any,
    };
    assert_eq!(w.op(s, late).map(drop), Err(FsError::ShuttingDown));
}

#[test]
fn they_go_with_their_inode_and_stay_with_it() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"data");
    let link = w.op(s, symlink("l")).and(w.lookup(ROOT, "l")).expect("made").inode;
    set(&mut w, f, "user.a", b"of f").expect("set");
    set(&mut w, link, "trusted.a", b"of l").expect("set");
    w.settle_all();
    w.rename(s, (ROOT, "f"), (ROOT, "g")).expect("renamed");
    w.settle_all();
    w.check_bucket();
    assert_eq!(w.bucket.objects["g"].xattrs, pairs(&[("user.a", b"of f")]));
    assert_eq!(w.bucket.objects["l"].xattrs, pairs(&[("trusted.a", b"of l")]));
    let open = w.open(s, f, common::READ).expect("open");
    w.unlink(s, ROOT, "g").expect("unlinked");
    assert_eq!(w.xattrs(f).len(), 1, "it is open");
    w.close(open).expect("closed");
    w.unlink(s, ROOT, "l").expect("unlinked");
    w.settle_all();
    assert_eq!(records(&w), 0);
}

fn symlink(name: &str) -> Op {
    Op::Symlink { parent: ROOT, name: name.into(), target: b"f".to_vec(), uid: 1, gid: 2 }
}

#[test]
fn an_outside_change_brings_its_own() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"data");
    set(&mut w, f, "user.ours", b"1").expect("set");
    w.settle_all();
    for (body, xattrs) in
        [("theirs", pairs(&[("user.theirs", b"2")])), ("theirs again", Xattrs::new())]
    {
        let r = w.read().revalidation(f).expect("readable").expect("clean");
        let etag = w.bucket.foreign_put("f", body.as_bytes());
        w.bucket.objects.get_mut("f").expect("put").xattrs.clone_from(&xattrs);
        let attrs = attrs_of(&w.bucket.objects["f"]);
        let object = Some(ForeignObject { etag, size: body.len() as u64, attrs });
        let (lineage, old_etag) = (r.lineage, Some(r.etag));
        w.done(Command::Adopt(vec![Adopt { inode: f, lineage, old_etag, object }]));
        assert_eq!(w.xattrs(f), xattrs);
    }
    assert_eq!(records(&w), 0);
}

#[test]
fn a_dump_has_them_and_a_load_brings_them_back() {
    let mut w = World::new();
    let s = w.session();
    let f = w.put_file(s, ROOT, "f", b"data");
    let d = w.mkdir(s, ROOT, "d").expect("made");
    w.op(s, symlink("l")).expect("made");
    w.settle_all();
    for (inode, value) in [(ROOT, "root"), (f, "file"), (d, "directory")] {
        set(&mut w, inode, "user.a", value.as_bytes()).expect("set");
        set(&mut w, inode, "user.b", b"\0\xff").expect("set");
    }
    // One is dirty, the others' objects have them.
    w.settle_all();
    set(&mut w, f, "user.late", b"").expect("set");
    let records = dump(&w.kv, 100);
    let file = records.iter().find(|r| r.path == "f").expect("dumped");
    assert_eq!((file.xattrs.as_str(), file.dirty), ("user.a=file,user.b:AP8,user.late=", true));
    let (kv, replies) = load(&records, 2);
    assert!(replies.iter().all(|r| *r == CommandReply::Done), "{replies:?}");
    assert_eq!((dump(&kv, 100), check(&kv)), (records.clone(), vec![]));
    let nonsense = Record { xattrs: "user.a".into(), ..file.clone() };
    let (_, replies) = load(&[records[0].clone(), nonsense], 9);
    let refused = |r: &CommandReply| matches!(r, CommandReply::Refused(why) if why.contains("extended attributes"));
    assert!(replies.iter().any(refused), "{replies:?}");
}

/// A record and what its inode says of it are mended either way: what somebody set is kept, and what is lost is asked
/// of the object.
#[test]
fn what_an_inode_says_and_its_record_are_mended_both_ways() {
    let mut w = World::new();
    let s = w.session();
    let (f, g) = (w.put_file(s, ROOT, "f", b"data"), w.put_file(s, ROOT, "g", b"data"));
    set(&mut w, f, "user.a", b"kept").expect("set");
    w.settle_all();
    let place = |inode: InodeId| [&b"x"[..], &inode.0.to_be_bytes()].concat();
    let record = w.kv.0[&place(f)].clone();
    w.kv.0.insert(place(g), record.clone());
    w.kv.0.insert(place(InodeId(777)), record.clone());
    w.kv.0.remove(&place(f));
    let findings = check(&w.kv);
    assert_eq!(findings.iter().map(|f| f.rule).collect::<Vec<_>>(), [Rule::Xattrs; 3]);
    let repairs: Vec<Repair> = findings.into_iter().filter_map(|f| f.repair).collect();
    w.done(Command::Repair(repairs));
    assert_eq!(check(&w.kv), []);
    assert_eq!((records(&w), w.xattrs(g)), (1, pairs(&[("user.a", b"kept")])));
    assert!(w.attr(g).dirty, "its object lacks them");
    let source = w.read().attrs_source(f).expect("readable").expect("a HEAD is due");
    let found = attrs_of(&w.bucket.objects["f"]);
    w.done(Command::SetIngestAttrs(vec![(f, source.1, found)]));
    assert_eq!(w.xattrs(f), pairs(&[("user.a", b"kept")]));
    w.settle_all();
    w.check_bucket();
    // A record that can't be read is none.
    w.kv.0.insert(place(f), b"nonsense".to_vec());
    let repairs = check(&w.kv).into_iter().filter_map(|f| f.repair).collect();
    w.done(Command::Repair(repairs));
    assert_eq!(check(&w.kv), []);
}
