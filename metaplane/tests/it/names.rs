//! Names, attributes and empty bodies: what the metadata plane stores by itself, all the way to S3
//! and back.

use crate::common::*;
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::attr::{SetAttr, TimeChange};
use ebb_metaplane_protocol::op::{OpenMode, RENAME_EXCHANGE};
use ebb_metaplane_protocol::*;
use ebb_s3::EbbTag;

const ROOT: InodeId = InodeId::ROOT;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_made_is_in_the_bucket_after_a_flush_and_known_after_a_restart() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    let d = c.mkdir(ROOT, "d").await.expect("made");
    c.touch(d.inode, "empty").await;
    c.symlink(d.inode, "link", "../somewhere else").await.expect("made");
    c.mkdir(d.inode, "sub").await.expect("made");
    assert_eq!(c.mkdir(ROOT, "d").await, Err(FsError::Exists));
    let report = c.settle().await;
    assert_eq!((report.remaining, report.failed.len()), (0, 0), "{report:?}");
    assert_eq!(world.keys().await, ["d/", "d/empty", "d/link", "d/sub/"]);
    let link = world.head("d/link").await.expect("stored");
    assert_eq!(link.metadata["file-permissions"], "0120777");
    assert!(EbbTag::from_metadata(&link.metadata).is_some_and(|t| t.cluster == 7));
    let body = world.bucket.get_bytes("d/link", None, 0..link.size).await.expect("read");
    assert_eq!(body.as_ref(), b"../somewhere else");
    let marker = world.head("d/").await.expect("stored");
    assert_eq!((marker.metadata["file-owner"].as_str(), marker.size), ("10", 0));

    let before = c.entries(d.inode, 10).await;
    meta.stop().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    assert_eq!(c.entries(d.inode, 10).await, before);
    assert_eq!(c.resolve("/d/sub").await.expect("known").mode, 0o750);
    match c.query(Query::ReadLink(before[1].attr.inode)).await.expect("a link") {
        QueryReply::Link(target) => assert_eq!(target, b"../somewhere else"),
        other => panic!("{other:?}"),
    }
    assert_eq!(c.status().await.dirty_inodes, 0);
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletes_and_renames_reach_the_bucket() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    for name in ["a", "b", "gone", "over"] {
        c.touch(ROOT, name).await;
    }
    let d = c.mkdir(ROOT, "d").await.expect("made").inode;
    for i in 0..20 {
        c.touch(d, &format!("f{i:02}")).await;
    }
    c.settle().await;
    assert_eq!(world.keys().await.len(), 25);

    c.unlink(ROOT, "gone").await.expect("removed");
    c.rename((ROOT, "a"), (ROOT, "over"), 0).await.expect("renamed over");
    c.rename((ROOT, "d"), (ROOT, "moved"), 0).await.expect("renamed");
    c.settle().await;
    let mut expected = vec!["b".to_owned(), "moved/".to_owned()];
    expected.extend((0..20).map(|i| format!("moved/f{i:02}")));
    expected.push("over".to_owned());
    assert_eq!(world.keys().await, expected);

    // A swap of two names: neither can go first, so one goes by way of a temporary key.
    let tag = |info: ebb_s3::ObjectInfo| EbbTag::from_metadata(&info.metadata).expect("ours").inode;
    let before =
        (tag(world.head("b").await.expect("b")), tag(world.head("over").await.expect("over")));
    c.rename((ROOT, "b"), (ROOT, "over"), RENAME_EXCHANGE).await.expect("swapped");
    c.settle().await;
    let after =
        (tag(world.head("b").await.expect("b")), tag(world.head("over").await.expect("over")));
    assert_eq!(after, (before.1, before.0));
    let temporary = ebb_s3::ListRequest { prefix: ".ebb/tmp/".into(), ..Default::default() };
    assert!(world.bucket.list(&temporary).await.expect("listed").objects.is_empty());
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attributes_travel_with_the_object_without_its_body() {
    let world = World::new().await;
    world.put("data.bin", b"twelve bytes").await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    let attr = c.lookup(ROOT, "data.bin").await.expect("there");
    assert_eq!((attr.size, attr.mode, attr.kind), (12, 0o644, FileKind::File));
    let set = SetAttr {
        mode: Some(0o4711),
        uid: Some(77),
        mtime: Some(TimeChange::At(Time(1_234_567_890_123_456_789))),
        ..SetAttr::default()
    };
    c.op(Op::SetAttr { inode: attr.inode, set }).await.expect("set");
    c.settle().await;
    let info = world.head("data.bin").await.expect("stored");
    assert_eq!(info.metadata["file-permissions"], "0104711");
    assert_eq!(info.metadata["file-mtime"], "1234567890123456789ns");
    assert_eq!((info.metadata["file-owner"].as_str(), info.size), ("77", 12));
    let body = world.bucket.get_bytes("data.bin", None, 0..12).await.expect("read");
    assert_eq!(body.as_ref(), b"twelve bytes");
    // Renamed, the body is copied by S3 itself.
    c.rename((ROOT, "data.bin"), (ROOT, "other.bin"), 0).await.expect("renamed");
    c.settle().await;
    assert_eq!(world.keys().await, ["other.bin"]);
    let body = world.bucket.get_bytes("other.bin", None, 0..12).await.expect("read");
    assert_eq!(body.as_ref(), b"twelve bytes");
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_takes_effect_once() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    let op = Op::Mkdir { parent: ROOT, name: b"once".to_vec(), mode: 0o755, uid: 0, gid: 0 };
    let request = c.request(op);
    let first = c.meta.call(&request, PATIENCE).await.expect("an answer");
    assert!(matches!(first, Response::Op(Ok(OpReply::Made(_)))), "{first:?}");
    for _ in 0..3 {
        assert_eq!(c.meta.call(&request, PATIENCE).await.expect("an answer"), first);
    }
    meta.stop().await;
    // The memory of replies survives a restart.
    let meta = world.start(7, "meta").await;
    assert_eq!(meta.client.call(&request, PATIENCE).await.expect("an answer"), first);
    meta.stop().await;
}

/// What is delegated is in the log: a server that starts anew knows it, and that it ends with its session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delegation_outlives_the_server_that_gave_it() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let holder = meta.session().await;
    let mkdir = Op::Mkdir { parent: ROOT, name: b"d".to_vec(), mode: 0o755, uid: 0, gid: 0 };
    let OpReply::Made(made) = holder.op(mkdir).await.expect("made") else { panic!("not made") };
    assert!(made.own_names_ms > 0);
    let dir = made.attr.inode;
    let create = Op::Create {
        parent: dir,
        name: b"f".to_vec(),
        mode: 0o640,
        uid: 0,
        gid: 0,
        exclusive: true,
        open: OpenMode { write: true, truncate: false },
        delegate: true,
    };
    let OpReply::Opened(opened) = holder.op(create).await.expect("made") else {
        panic!("not made")
    };
    assert!(opened.delegation.is_some() && opened.names_ms > 0);
    let lookup = || Query::Lookup { parent: dir, name: b"f".to_vec() };
    meta.stop().await;
    let meta = world.start(7, "meta").await;
    let other = meta.session().await;
    let waits = |r: FsResult<QueryReply>| matches!(r, Err(FsError::Again { .. }));
    assert!(waits(other.query(lookup()).await), "its names are another's");
    let listing = Query::ReadDir { inode: dir, after: Vec::new(), limit: 10 };
    assert!(waits(other.query(listing).await));
    let path = vec![b"d".to_vec(), b"f".to_vec()];
    assert!(waits(other.query(Query::Resolve { path }).await));
    // The holder itself is not kept waiting.
    let own = Request::Query { session: holder.session, query: lookup() };
    let reply = meta.client.call(&own, PATIENCE).await.expect("an answer");
    assert!(matches!(reply, Response::Query(Ok(QueryReply::Attr(_)))), "{reply:?}");
    let close = Request::Session(SessionCall::Close(holder.session));
    meta.client.call(&close, PATIENCE).await.expect("an answer");
    assert!(other.query(lookup()).await.is_ok(), "it ended with its session");
    meta.stop().await;
}
