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
        .call(&Request::Query(Query::StatFs), PATIENCE)
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
