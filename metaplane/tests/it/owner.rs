//! One owner per bucket, and the words for what is wrong at the start.

use crate::common::*;
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane::MetaError;
use ebb_metaplane_protocol::*;

const ROOT: InodeId = InodeId::ROOT;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_alone_is_enough_to_wake() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    let d = c.mkdir(ROOT, "d").await.expect("made").inode;
    c.touch(d, "f").await;
    c.symlink(d, "l", "f").await.expect("made");
    let old = c.resolve("/d/f").await.expect("there");
    let report = c.shutdown().await;
    assert_eq!(report.flushed, 3);
    assert_eq!(c.mkdir(ROOT, "late").await, Err(FsError::ShuttingDown));
    meta.stop().await;

    // Another directory, another cluster: only the bucket is left.
    let meta = world.start(8, "fresh").await;
    let c = meta.session().await;
    let f = c.resolve("/d/f").await.expect("there");
    assert_ne!(f.inode, old.inode, "inode ids of another life never come back");
    assert_eq!((f.mode, f.uid, f.gid, f.mtime), (old.mode, old.uid, old.gid, old.mtime));
    assert_eq!(c.resolve("/d").await.expect("there").mode, 0o750);
    assert_eq!(c.resolve("/d/l").await.expect("there").kind, FileKind::Symlink);
    assert_eq!(c.status().await.map.incarnation.0, 2);
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_can_be_taken_back() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    c.touch(ROOT, "f").await;
    c.shutdown().await;
    assert_eq!(c.shutdown().await.remaining, 0, "repeated, it still says so");
    c.admin(AdminCall::Resume).await.expect("resumed");
    c.touch(ROOT, "g").await;
    c.settle().await;
    assert_eq!(world.keys().await, ["f", "g"]);
    // Asleep, then started again on the same directory.
    c.shutdown().await;
    meta.stop().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    assert_eq!(c.names(ROOT, 10).await, ["f", "g"]);
    c.touch(ROOT, "h").await;
    c.settle().await;
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_another_cluster_holds_is_refused_unless_stolen() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    c.touch(ROOT, "f").await;
    c.settle().await;
    let refused = world.refusal(world.config(8, "thief")).await;
    assert!(matches!(refused, MetaError::Owned { .. }), "{refused}");
    assert!(refused.to_string().contains("--steal-bucket"), "{refused}");
    let mut config = world.config(8, "thief2");
    config.steal_bucket = true;
    let thief = world.start_with(config).await;
    let t = thief.session().await;
    assert_eq!(t.names(ROOT, 10).await, ["f"]);
    // The one that lost it notices at its next renewal and writes nothing more; here at a stop.
    meta.stop().await;
    let refused = world.refusal(world.config(7, "meta")).await;
    assert!(
        matches!(refused, MetaError::OtherCluster { .. } | MetaError::Owned { .. }),
        "{refused}"
    );
    thief.stop().await;
}

/// An emptied directory is no reason to begin anew under the same name: nothing unflushed is given up unasked, and a
/// founder that comes back without what its group knows founds no second one beside it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_lost_its_directory_does_not_begin_anew_unasked() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    c.touch(ROOT, "f").await;
    c.settle().await;
    c.touch(ROOT, "unflushed").await;
    meta.stop().await;
    let refused = world.refusal(world.config(7, "emptied")).await;
    assert!(matches!(refused, MetaError::LostGroup { .. }), "{refused}");
    for word in ["--steal-bucket", "ebb meta replace", "ebb meta load"] {
        assert!(refused.to_string().contains(word), "{refused}");
    }
    // It has changed nothing: who has the directory goes on.
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    assert_eq!(c.names(ROOT, 10).await, ["f", "unflushed"]);
    meta.stop().await;
    let mut config = world.config(7, "emptied");
    config.steal_bucket = true;
    let anew = world.start_with(config).await;
    let c = anew.session().await;
    assert_eq!(c.names(ROOT, 10).await, ["f"]);
    anew.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_at_the_start_is_said_in_words() {
    let world = World::new().await;
    let mut config = world.config(7, "a");
    config.bucket.bucket = "nowhere".into();
    let e = world.refusal(config).await;
    assert!(matches!(e, MetaError::NoBucket { .. }) && e.to_string().contains("nowhere"), "{e}");

    let mut config = world.config(7, "b");
    config.bucket = config.bucket.with_credentials("tide", "wrong");
    let e = world.refusal(config).await;
    assert!(matches!(e, MetaError::Denied { .. }), "{e}");

    let mut config = world.config(7, "c");
    config.bucket.endpoint = Some("http://127.0.0.1:9".into());
    config.s3_patience_s = 1;
    let e = world.refusal(config).await;
    assert!(matches!(e, MetaError::S3Down { .. }), "{e}");

    let mut config = world.config(7, "d");
    config.key_file = world.dir.path().join("no key");
    let e = world.refusal(config).await;
    assert!(matches!(e, MetaError::Key { .. }), "{e}");

    let meta = world.start(7, "meta").await;
    let e = world.refusal(world.config(7, "meta")).await;
    assert!(matches!(e, MetaError::Locked(_)), "{e}");
    let mut config = world.config(7, "e");
    config.listen = meta.address.clone();
    let e = world.refusal(config).await;
    assert!(matches!(e, MetaError::Listen { .. }), "{e}");
    meta.stop().await;
    let e = world.refusal(world.config(9, "meta")).await;
    assert!(matches!(e, MetaError::OtherCluster { .. }), "{e}");
}
