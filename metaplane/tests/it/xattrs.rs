//! Extended attributes, all the way to S3 and back.

use crate::common::*;
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::xattr::{XATTRS_TEXT_BYTES_MAX, XattrMode, Xattrs};
use ebb_metaplane_protocol::*;
use ebb_s3::Condition;
use ebb_s3::attributes::XATTRS;

const ROOT: InodeId = InodeId::ROOT;

async fn set(c: &Client, inode: InodeId, name: &str, value: &[u8]) -> FsResult<Attr> {
    let (name, value) = (name.into(), Some(value.to_vec()));
    match c.op(Op::SetXattr { inode, name, value, how: XattrMode::Any }).await? {
        OpReply::Attr(attr) => Ok(attr),
        other => panic!("not attributes: {other:?}"),
    }
}

async fn get(c: &Client, path: &str) -> Xattrs {
    let attr = c.resolve(path).await.expect("there");
    match c.query(Query::Xattrs(attr.inode)).await.expect("an answer") {
        QueryReply::Xattrs(xattrs) => {
            assert_eq!(attr.xattrs, !xattrs.is_empty(), "{path}");
            xattrs
        }
        other => panic!("not extended attributes: {other:?}"),
    }
}

fn pair(name: &str, value: &[u8]) -> (Vec<u8>, Vec<u8>) {
    (name.into(), value.to_vec())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn extended_attributes_are_in_the_bucket_and_a_new_cluster_has_them() {
    let world = World::new().await;
    world.put("theirs", b"twelve bytes").await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    let d = c.mkdir(ROOT, "d").await.expect("made").inode;
    let f = c.touch(d, "f").await;
    c.symlink(d, "l", "f").await.expect("made");
    let l = c.lookup(d, "l").await.expect("there").inode;
    // Of an object that only a listing has shown, a HEAD comes first.
    let theirs = c.lookup(ROOT, "theirs").await.expect("there").inode;
    let binary: Vec<u8> = (0..=255).collect();
    let full = vec![b'x'; XATTRS_TEXT_BYTES_MAX - "user.full=".len()];
    set(&c, f, "user.binary", &binary).await.expect("set");
    set(&c, f, "user.text", b"plain, nearly").await.expect("set");
    set(&c, d, "trusted.of a directory", b"").await.expect("set");
    set(&c, l, "trusted.of-a-link", b"1").await.expect("set");
    set(&c, theirs, "user.full", &full).await.expect("set");
    assert_eq!(set(&c, theirs, "user.more", b"").await, Err(FsError::NoSpace));
    c.settle().await;
    let of = |key| world.head(key);
    let text = of("d/f").await.expect("stored").metadata[XATTRS].clone();
    assert!(text.starts_with("user.binary:") && text.ends_with(",user.text=plain%2C%20nearly"));
    assert_eq!(of("d/").await.expect("stored").metadata[XATTRS], "trusted.of%20a%20directory=");
    assert_eq!(of("d/l").await.expect("stored").metadata[XATTRS], "trusted.of-a-link=1");
    let body = world.bucket.get_bytes("theirs", None, 0..12).await.expect("read");
    assert_eq!(body.as_ref(), b"twelve bytes", "the body is as it was");

    // A restart, then a new cluster that has nothing but the bucket.
    meta.stop().await;
    let expected = [pair("user.binary", &binary), pair("user.text", b"plain, nearly")];
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    assert_eq!(get(&c, "d/f").await, expected);
    drop(c);
    let c = Client::open(meta.client.clone(), 2).await;
    c.shutdown().await;
    meta.stop().await;
    let meta = world.start(8, "fresh").await;
    let c = meta.session().await;
    assert_eq!(get(&c, "d/f").await, expected);
    assert_eq!(get(&c, "d").await, [pair("trusted.of a directory", b"")]);
    assert_eq!(get(&c, "d/l").await, [pair("trusted.of-a-link", b"1")]);
    assert_eq!(get(&c, "theirs").await, [pair("user.full", &full)]);
    assert_eq!(c.status().await.dirty_inodes, 0, "looking changes nothing");

    // Removed, they are gone there, too.
    let f = c.resolve("d/f").await.expect("there").inode;
    for name in ["user.binary", "user.text"] {
        let op = Op::SetXattr { inode: f, name: name.into(), value: None, how: XattrMode::Any };
        c.op(op).await.expect("removed");
    }
    c.settle().await;
    assert_eq!(world.head("d/f").await.expect("stored").metadata.get(XATTRS), None);
    assert_eq!(get(&c, "d/f").await, []);
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_strangers_write_into_metadata_fails_nobody() {
    let world = World::new().await;
    for (key, text) in [
        ("good", "user.note=theirs"),
        ("bad", "user.note"),
        ("twice", "user.a=1,user.a=2"),
        ("acl", "system.posix_acl_access:AAEC"),
    ] {
        let metadata = [(XATTRS.to_owned(), text.to_owned())].into();
        let none = Condition::None;
        world.bucket.put(key, b"body".to_vec(), &metadata, &none).await.expect("a put");
    }
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    assert_eq!(get(&c, "good").await, [pair("user.note", b"theirs")]);
    for key in ["bad", "twice", "acl"] {
        assert_eq!(get(&c, key).await, [], "{key}");
    }
    meta.stop().await;
}
