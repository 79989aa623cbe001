//! An existing bucket: it appears page by page, with its attributes; changes from outside are seen at
//! the next open; strangers' objects are never lost.

use crate::common::*;
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::op::OpenMode;
use ebb_metaplane_protocol::*;
use ebb_s3::Operation;
use ebb_s3::fault::{Fault, FaultKind};
use ebb_s3::server::EmbeddedServer;
use std::time::{Duration, Instant};

const ROOT: InodeId = InodeId::ROOT;

fn lists(s: &ClusterStatus) -> u64 {
    s.counters.iter().find(|c| c.0 == "s3_lists").map_or(0, |c| c.1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_of_many_keys_appears_whole_and_lazily() {
    let world = World::new().await;
    let mut names: Vec<String> = (0..2_300).map(|i| format!("f{i:05}")).collect();
    // Names whose key order is not their name order.
    names.extend(["a", "a-b", "a.txt", "z z", "zz~"].map(str::to_owned));
    let mut puts = tokio::task::JoinSet::new();
    for name in &names {
        let key = if name == "a" { "a/x".to_owned() } else { name.clone() };
        let bucket = world.bucket.clone();
        puts.spawn(async move {
            let none = ebb_s3::Metadata::new();
            bucket.put(&key, b"x".to_vec(), &none, &ebb_s3::Condition::None).await.expect("a put")
        });
    }
    while puts.join_next().await.transpose().expect("no panic").is_some() {}
    world.put("a/deep/er", b"y").await;
    names.sort_unstable();

    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    // The first entries need the first page only.
    let first = c.query(Query::ReadDir { inode: ROOT, after: Vec::new(), limit: 20 }).await;
    let Ok(QueryReply::Page { entries, end: false }) = first else { panic!("{first:?}") };
    assert!(!entries.is_empty() && entries.iter().all(|e| e.name <= names[20].as_bytes().to_vec()));
    let early = lists(&c.status().await);
    assert!(early <= 2, "{early} pages were listed for 20 entries");
    assert_eq!(c.names(ROOT, 700).await, names);
    assert_eq!(c.names(c.lookup(ROOT, "a").await.expect("a").inode, 10).await, ["deep", "x"]);
    // What is completely listed needs S3 no more, not even to say no.
    let listed = lists(&c.status().await);
    assert_eq!(c.lookup(ROOT, "nothing").await, Err(FsError::NotFound));
    assert_eq!(lists(&c.status().await), listed);
    assert_eq!(c.status().await.dirty_inodes, 0);
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_are_found_without_a_listing_and_the_clusters_own_are_hidden() {
    let world = World::new().await;
    world.put("x/y/file", b"12345").await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    assert_eq!(c.resolve("/x/y/file").await.expect("found").size, 5);
    assert_eq!(c.resolve("/x/y/none").await, Err(FsError::NotFound));
    assert_eq!(c.resolve("/x/y/file/z").await, Err(FsError::NotDirectory));
    assert_eq!(c.lookup(ROOT, ".ebb").await, Err(FsError::NotFound));
    assert_eq!(c.names(ROOT, 10).await, ["x"]);
    let y = c.resolve("/x/y").await.expect("found").inode;
    assert!(
        matches!(c.query(Query::Parent(y)).await, Ok(QueryReply::Attr(x)) if x.kind == FileKind::Directory)
    );
    // A directory that is not empty in S3 is not removed.
    let x = c.resolve("/x").await.expect("found").inode;
    let rmdir = Op::Rmdir { parent: x, name: b"y".to_vec() };
    assert_eq!(c.op(rmdir).await, Err(FsError::NotEmpty));
    // A whole subtree moves although it was never listed.
    c.rename((ROOT, "x"), (ROOT, "new"), 0).await.expect("renamed");
    c.settle().await;
    let keys = world.keys().await;
    assert!(keys.contains(&"new/y/file".to_owned()), "{keys:?}");
    assert!(!keys.iter().any(|k| k.starts_with("x/")), "{keys:?}");
    meta.stop().await;
}

async fn open(c: &Client, inode: InodeId) -> FsResult<Opened> {
    let open = OpenMode { write: false, truncate: false };
    match c.op(Op::Open { inode, open }).await? {
        OpReply::Opened(o) => Ok(*o),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_from_outside_is_seen_at_the_next_open() {
    let world = World::new().await;
    world.put("f", b"one").await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    let f = c.lookup(ROOT, "f").await.expect("there").inode;
    let first = open(&c, f).await.expect("opened");
    world.put("f", b"another").await;
    let second = open(&c, f).await.expect("opened");
    assert_eq!((second.attr.size, second.attr.inode), (7, f));
    assert!(second.lineage > first.lineage, "older handles are told");
    let old = Op::Regrant { handle: first.handle, write: false, write_end: 0 };
    assert_eq!(c.op(old).await, Err(FsError::Stale));
    world.bucket.delete("f", None).await.expect("deleted");
    // Whoever has it open keeps the inode; the name is gone.
    let _ = open(&c, f).await;
    assert_eq!(c.lookup(ROOT, "f").await, Err(FsError::NotFound));
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_make_and_remove_in_a_listed_directory_is_seen() {
    let world = World::new().await;
    world.put("d/old", b"1").await;
    world.put("d/stays", b"2").await;
    let mut config = world.config(7, "meta");
    config.timings.relist_ms = 300;
    let meta = world.start_with(config).await;
    let c = meta.session().await;
    let d = c.lookup(ROOT, "d").await.expect("there").inode;
    assert_eq!(c.names(d, 10).await, ["old", "stays"]);
    let pause = || tokio::time::sleep(Duration::from_millis(350));
    // A name, asked for before anybody lists.
    world.put("d/new", b"333").await;
    world.put("d/sub/file", b"4").await;
    pause().await;
    seen(async || c.lookup(d, "new").await.is_ok_and(|a| a.size == 3)).await;
    // A listing. What is dirty stays, what we removed doesn't come back.
    world.bucket.delete("d/old", None).await.expect("deleted");
    let dirty = c.touch(d, "dirty").await;
    world.s3.faults().add(Fault::every(Operation::Delete, FaultKind::Delay { ms: 4_000 }));
    c.unlink(d, "stays").await.expect("removed");
    let left = ["dirty", "new", "sub"];
    seen(async || c.names(d, 10).await == left).await;
    assert_eq!(c.lookup(d, "stays").await, Err(FsError::NotFound));
    assert!(world.head("d/stays").await.is_some(), "its delete is held up");
    assert_eq!(c.lookup(d, "dirty").await.expect("kept").inode, dirty);
    world.s3.faults().clear();
    c.settle().await;
    // Stored meanwhile, and still there.
    pause().await;
    assert_eq!(c.names(d, 10).await, ["dirty", "new", "sub"]);
    assert_eq!(world.keys().await, ["d/", "d/dirty", "d/new", "d/sub/file"]);
    // A directory made here is no different.
    let mkdir = Op::Mkdir { parent: ROOT, name: b"own".to_vec(), mode: 0, uid: 0, gid: 0 };
    let own = match c.op(mkdir).await.expect("made") {
        OpReply::Made(made) => {
            assert!(made.own_names_ms > 0, "who made it knows that it is empty");
            made.attr.inode
        }
        other => panic!("not made: {other:?}"),
    };
    assert!(c.create(own, "mine").await.expect("made").names_ms > 0);
    world.put("own/theirs", b"5").await;
    seen(async || c.names(own, 10).await == ["mine", "theirs"]).await;
    assert_eq!(
        c.create(own, "mine too").await.expect("made").names_ms,
        0,
        "names come from outside"
    );
    meta.stop().await;
}

/// Within as long as a listing may rest.
async fn seen(ask: impl AsyncFn() -> bool) {
    let begun = Instant::now();
    while !ask().await {
        assert!(begun.elapsed() < Duration::from_secs(20), "never seen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Names that nobody has cost a question to S3 once in a while, not each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn looking_for_what_is_not_there_seldom_asks_s3() {
    let world = World::new().await;
    let mut config = world.config(7, "meta");
    config.timings.relist_ms = 500;
    let meta = world.start_with(config).await;
    let c = meta.session().await;
    let d = c.mkdir(ROOT, "d").await.expect("made").inode;
    let before = lists(&c.status().await);
    let begun = Instant::now();
    let mut asked = 0u64;
    while begun.elapsed() < Duration::from_millis(2_200) {
        assert_eq!(c.lookup(d, &format!("n{asked}")).await, Err(FsError::NotFound));
        asked += 1;
    }
    let lists = lists(&c.status().await) - before;
    // Each time it is old: one listing, and one look below the name that was asked for.
    let times = begun.elapsed().as_millis() as u64 / 500 + 1;
    assert!((1..=times * 2).contains(&lists), "{lists} lists for {asked} names");
    assert!(asked > 100, "{asked}");
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strangers_object_keeps_the_name_and_ours_gets_another() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    let ours = c.touch(ROOT, "name").await;
    // Between our create and our flush somebody else puts an object of that name.
    world.put("name", b"theirs").await;
    c.settle().await;
    let names = c.names(ROOT, 10).await;
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(names[1].starts_with("name.conflict-"), "{names:?}");
    assert_eq!(c.lookup(ROOT, "name").await.expect("theirs").size, 6);
    assert_eq!(c.lookup(ROOT, &names[1]).await.expect("ours").inode, ours);
    assert_eq!(world.keys().await, names);
    assert_eq!(world.bucket.get_bytes("name", None, 0..6).await.expect("read").as_ref(), b"theirs");
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_known_is_served_while_s3_is_away() {
    let mut world = World::new().await;
    world.put("f", b"one").await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    let f = c.lookup(ROOT, "f").await.expect("there").inode;
    assert_eq!(c.names(ROOT, 10).await, ["f"]);
    let (dir, listen) = (world.dir.path().join("s3"), world.s3.local_addr());
    let elsewhere = ebb_s3::server::ServerConfig {
        dir: dir.clone(),
        listen,
        access_key: "tide".into(),
        secret_key: "pool".into(),
        buckets: vec![BUCKET.into()],
        admin: None,
    };
    // A clean stop and a later start on the same port, as an outage.
    let placeholder = ebb_s3::server::ServerConfig {
        dir: world.dir.path().join("other"),
        listen: "127.0.0.1:0".parse().expect("an address"),
        ..elsewhere.clone()
    };
    let other = EmbeddedServer::start(placeholder).await.expect("started");
    std::mem::replace(&mut world.s3, other).shutdown().await;
    for _ in 0..5 {
        open(&c, f).await.expect("opened from what is known");
    }
    c.touch(ROOT, "made meanwhile").await;
    assert!(c.status().await.s3_error.is_some());
    world.s3 = EmbeddedServer::start(elsewhere).await.expect("back");
    c.settle().await;
    assert_eq!(world.keys().await, ["f", "made meanwhile"]);
    meta.stop().await;
}
