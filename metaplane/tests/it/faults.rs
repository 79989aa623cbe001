//! Lost replies, errors and kills: nothing acknowledged is lost, nothing is done twice (I1, I3, I7).

use crate::common::*;
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::*;
use ebb_s3::Operation;
use ebb_s3::fault::{Fault, FaultKind};
use std::time::{Duration, Instant};

const ROOT: InodeId = InodeId::ROOT;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_reply_of_put_copy_and_delete_is_resolved_by_looking() {
    let world = World::new().await;
    let bodies = ["body0", "body1", "body2"];
    for body in bodies {
        world.put(body, b"a body that S3 copies").await;
    }
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    let kinds = [FaultKind::LostReply, FaultKind::InternalErrorAfter, FaultKind::LostRequest];
    for (round, kind) in kinds.into_iter().enumerate() {
        let faults = world.s3.faults();
        let rest = &bodies[round..];
        c.touch(ROOT, "f").await;
        faults.add(Fault::next(Operation::Put, 1, kind.clone()).on_key("f"));
        c.settle().await;
        assert_eq!(world.keys().await, [rest, &["f"]].concat(), "{kind:?}");

        faults.add(Fault::next(Operation::Copy, 1, kind.clone()));
        c.rename((ROOT, bodies[round]), (ROOT, "g"), 0).await.expect("renamed");
        c.settle().await;
        assert_eq!(world.keys().await, [&rest[1..], &["f", "g"]].concat(), "{kind:?}");

        faults.add(Fault::next(Operation::Delete, 1, kind.clone()));
        c.unlink(ROOT, "g").await.expect("removed");
        c.settle().await;
        c.unlink(ROOT, "f").await.expect("removed");
        c.settle().await;
        assert_eq!(world.keys().await, rest[1..], "{kind:?}");
        assert_eq!(faults.pending(), Vec::new(), "every fault struck");
    }
    assert_eq!(c.names(ROOT, 10).await, Vec::<String>::new(), "no conflict was made up");
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_made_anew_is_not_hit_by_the_delete_of_its_predecessor() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    for round in 0..10 {
        c.touch(ROOT, "f").await;
        c.flush().await;
        if round % 2 == 0 {
            let slow = FaultKind::Delay { ms: 100 };
            world.s3.faults().add(Fault::next(Operation::Delete, 1, slow));
        }
        c.unlink(ROOT, "f").await.expect("removed");
        let again = c.touch(ROOT, "f").await;
        c.settle().await;
        let info = world.head("f").await.expect("there");
        let tag = ebb_s3::EbbTag::from_metadata(&info.metadata).expect("ours");
        assert_eq!(tag.inode, again.0);
        c.unlink(ROOT, "f").await.expect("removed");
        c.settle().await;
        assert_eq!(world.keys().await, Vec::<String>::new());
        world.s3.faults().clear();
    }
    meta.stop().await;
}

/// A metadata server that gives a lost request up at once, though it is valid for `valid_ms`.
async fn hasty(world: &World, valid_ms: u64) -> Meta {
    let mut config = world.config(7, "meta");
    config.timings.resolve_after_ms = 50;
    config.timings.request_valid_ms = valid_ms;
    world.start_with(config).await
}

async fn tag_at(world: &World, key: &str) -> Option<u64> {
    let info = world.head(key).await?;
    ebb_s3::EbbTag::from_metadata(&info.metadata).map(|tag| tag.inode)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delete_that_arrives_late_does_not_hit_an_equal_file_made_anew() {
    let world = World::new().await;
    let meta = hasty(&world, 3_000).await;
    let c = meta.session().await;
    c.touch(ROOT, "f").await;
    c.settle().await;
    let late = Duration::from_millis(2_000);
    let kind = FaultKind::Late { ms: late.as_millis() as u64 };
    world.s3.faults().add(Fault::next(Operation::Delete, 1, kind).on_key("f"));
    let sent = Instant::now();
    c.unlink(ROOT, "f").await.expect("removed");
    while world.head("f").await.is_some() {
        assert!(sent.elapsed() < late, "the delete was not repeated in time");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // The same name, the same (no) content, so the same etag.
    let again = c.touch(ROOT, "f").await;
    let mut was_clean = false;
    // Asked for, not waited for: a flush that somebody waits for comes back when the key is free.
    c.admin(AdminCall::Flush { inode: ROOT, wait: false }).await.expect("begun");
    while sent.elapsed() < late + Duration::from_millis(500) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let dirty = c.lookup(ROOT, "f").await.expect("named").dirty;
        was_clean |= !dirty;
        let there = tag_at(&world, "f").await == Some(again.0);
        assert!(dirty || there, "{:?}: clean, and not in the bucket", sent.elapsed());
    }
    assert!(!was_clean, "the late delete had an object to hit");
    // Other content has no such worry, and what was waited for ends.
    c.settle().await;
    assert_eq!(tag_at(&world, "f").await, Some(again.0));
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_that_arrives_late_does_not_bring_a_removed_file_back() {
    let world = World::new().await;
    let meta = hasty(&world, 3_000).await;
    let c = meta.session().await;
    let late = Duration::from_millis(2_000);
    let kind = FaultKind::Late { ms: late.as_millis() as u64 };
    world.s3.faults().add(Fault::next(Operation::Put, 1, kind.clone()).on_key("f"));
    let sent = Instant::now();
    c.touch(ROOT, "f").await;
    // Lost, looked up, stored again.
    while c.lookup(ROOT, "f").await.expect("named").dirty {
        c.flush().await;
    }
    assert!(sent.elapsed() < late, "the put was not repeated in time");
    c.unlink(ROOT, "f").await.expect("removed");
    // Never flushed before it was removed, and on its way all the same.
    world.s3.faults().add(Fault::next(Operation::Put, 1, kind).on_key("g"));
    c.touch(ROOT, "g").await;
    let flush = Client::open(client(&meta.address), 2).await;
    let flush = tokio::spawn(async move { flush.flush().await });
    while world.s3.faults().struck() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    c.unlink(ROOT, "g").await.expect("removed");
    flush.await.expect("no panic");
    let mut gone = false;
    while sent.elapsed() < late + Duration::from_millis(500) {
        let there = world.head("f").await.is_some();
        assert!(!(gone && there), "{:?}: the removed file came back", sent.elapsed());
        gone |= !there;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    c.settle().await;
    assert_eq!(world.keys().await, Vec::<String>::new());
    assert_eq!(c.names(ROOT, 10).await, Vec::<String>::new());
    meta.stop().await;
}

/// Content of another length can't have the etag that a lost request names: nothing waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_content_does_not_wait_for_a_lost_request() {
    let world = World::new().await;
    let meta = hasty(&world, 60_000).await;
    let c = meta.session().await;
    c.touch(ROOT, "f").await;
    c.settle().await;
    world.s3.faults().add(Fault::next(Operation::Delete, 1, FaultKind::LostRequest).on_key("f"));
    c.unlink(ROOT, "f").await.expect("removed");
    let begun = Instant::now();
    while world.head("f").await.is_some() {
        assert!(begun.elapsed() < Duration::from_secs(10), "the delete was not repeated");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    c.symlink(ROOT, "f", "somewhere else").await.expect("made");
    c.touch(ROOT, "other").await;
    let report = c.flush().await;
    assert_eq!((report.remaining, &report.failed[..]), (0, &[][..]), "{report:?}");
    assert_eq!(world.keys().await, ["f", "other"]);
    // What does wait is named.
    assert_eq!(c.status().await.pending_keys, 1);
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_survives_kill_9() {
    let world = World::new().await;
    let mut config = world.config(7, "meta");
    config.timings.flush_after_ms = 100;
    let file = world.dir.path().join("meta.toml");
    let mut made: Vec<String> = Vec::new();
    for round in 0..6u64 {
        let mut process = Process::start(&config, &file).await;
        let c = Client::open(client(&process.address), u128::from(round) + 1).await;
        if round > 0 {
            assert_eq!(c.names(ROOT, 1000).await, made, "round {round}");
        }
        let until = Instant::now() + Duration::from_millis(150 + 70 * round);
        let mut n = 0;
        while Instant::now() < until {
            let name = format!("{round:02}-{n:05}");
            c.touch(ROOT, &name).await;
            made.push(name);
            n += 1;
        }
        assert!(n > 0);
        process.kill();
    }
    let mut process = Process::start(&config, &file).await;
    let c = Client::open(client(&process.address), 99).await;
    assert_eq!(c.names(ROOT, 1000).await, made);
    c.settle().await;
    assert_eq!(world.keys().await, made, "{} files", made.len());
    process.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_is_compacted_and_the_snapshot_restores() {
    let world = World::new().await;
    let mut config = world.config(7, "meta");
    config.snapshot_entries = 200;
    let meta = world.start_with(config.clone()).await;
    let c = meta.session().await;
    for i in 0..600 {
        c.mkdir(ROOT, &format!("d{i:04}")).await.expect("made");
    }
    let snapshots = world.dir.path().join("meta/snapshots");
    let begun = Instant::now();
    loop {
        let n = std::fs::read_dir(&snapshots).expect("a directory").count();
        if n > 0 {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "no snapshot was made");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let names = c.names(ROOT, 1000).await;
    meta.stop().await;
    // The state lost, the snapshot and the log behind it bring all of it back.
    std::fs::remove_file(world.dir.path().join("meta/state.redb")).expect("removed");
    let meta = world.start_with(config).await;
    let c = meta.session().await;
    assert_eq!(c.names(ROOT, 1000).await, names);
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_and_wrong_keys_are_refused_and_counted() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    let mut garbage = tokio::net::TcpStream::connect(&meta.address).await.expect("connected");
    garbage.write_all(&[0xa5; 256]).await.expect("written");
    let mut answer = Vec::new();
    // The connection closes; nothing else happens.
    let _ = garbage.read_to_end(&mut answer).await;
    let wrong = ebb_rpc::Identity::new(
        ebb_dataplane_protocol::auth::ClusterKey::new([1; 32]),
        ebb_dataplane_protocol::auth::Role::Client,
    );
    let refused = ebb_rpc::MetaClient::new(vec![meta.address.clone()], wrong)
        .call(
            &Request::Query { session: ebb_dataplane_protocol::SessionId(0), query: Query::StatFs },
            PATIENCE,
        )
        .await;
    assert!(matches!(refused, Err(ebb_rpc::RpcError::WrongKey { .. })), "{refused:?}");
    let begun = Instant::now();
    loop {
        let counters = c.status().await.counters;
        let refused = counters.iter().find(|c| c.0 == "refused_handshakes").map_or(0, |c| c.1);
        if refused >= 2 {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{counters:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    c.mkdir(ROOT, "still serving").await.expect("made");
    meta.stop().await;
}

/// Prints the latency of metadata operations; fails only when they are absurdly slow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_client_creates_in_well_under_ten_milliseconds() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let c = meta.session().await;
    let mut times = Vec::new();
    for i in 0..500 {
        let begun = Instant::now();
        c.create(ROOT, &format!("f{i}")).await.expect("created");
        times.push(begun.elapsed());
    }
    times.sort_unstable();
    let (p50, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    let mut reads = Vec::new();
    for i in 0..500 {
        let begun = Instant::now();
        c.lookup(ROOT, &format!("f{i}")).await.expect("there");
        reads.push(begun.elapsed());
    }
    reads.sort_unstable();
    println!("create p50 {p50:?} p99 {p99:?}, lookup p50 {:?}", reads[reads.len() / 2]);
    assert!(p50 < Duration::from_millis(10), "create p50 {p50:?}");
    meta.stop().await;
}
