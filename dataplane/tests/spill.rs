//! The spill tier of a real node: what the shard has no room for any more is read from the spill device instead of
//! S3, is never another state of the file, and costs nothing but a fetch when the device is wrong (I9, I10, I11).

mod common;

use common::client::*;
use common::*;
use ebb_dataplane::NodeConfig;
use ebb_dataplane_protocol::control::{Control, ControlReply, CoreStats};
use ebb_dataplane_protocol::*;
use ebb_s3::Operation;
use ebb_s3::fault::{Fault, FaultKind};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const SHARD: u64 = 24 * MIB;
const FILE: u64 = 48 * MIB + 12_345;
const SPILL: u64 = 96 * MIB;

/// A world whose node has a spill tier; each GET is counted.
async fn world(spill_bytes: u64) -> World {
    let mut world = World::new(SHARD, 1).await;
    if spill_bytes > 0 {
        world.config.spill = vec![world.dir.path().join("disk")];
        world.config.spill_bytes = spill_bytes;
    }
    // A fault that does nothing is a counter.
    world.s3.faults().add(Fault::every(Operation::Get, FaultKind::Delay { ms: 0 }));
    world
}

fn spill_file(world: &World) -> PathBuf {
    world.dir.path().join("disk/spill-0.ebb")
}

async fn put(world: &World, key: &str, body: &[u8]) -> String {
    let none = ebb_s3::Condition::None;
    let tag = world.bucket.put(key, body.to_vec(), &Default::default(), &none).await.expect("PUT");
    tag.as_str().to_owned()
}

fn readable(key: &str, etag: &str, length: usize, version: u64) -> File {
    let mut file = File::backed(100, key, etag, length as u64);
    file.mode = GrantMode::Read;
    (file.view.version, file.view.content) = (ViewVersion(version), ContentId(version));
    file
}

/// Reads all of a file, 1 MiB at a time, and compares it; answers the GETs that it took.
async fn read_through(world: &World, client: &Client, file: &File, body: &[u8]) -> u64 {
    read_part(world, client, file, body, 0..body.len()).await
}

/// The same of a part that begins at a whole MiB.
async fn read_part(
    world: &World,
    client: &Client,
    file: &File,
    body: &[u8],
    range: std::ops::Range<usize>,
) -> u64 {
    assert_eq!(client.present(file).await, Status::Ok);
    let before = world.s3.faults().struck();
    for (i, part) in body[range.clone()].chunks(MIB as usize).enumerate() {
        let at = range.start as u64 + i as u64 * MIB;
        let (chunk, offset) =
            ((at / u64::from(CHUNK_BYTES)) as u32, (at % u64::from(CHUNK_BYTES)) as u32);
        let read = client.read(file, chunk, offset, part.len() as u32).await;
        assert!(read == part, "bytes from {at} on");
    }
    world.s3.faults().struck() - before
}

/// Waits until the tier has taken what it is going to take.
async fn settled(meta: &MetaPeer) -> CoreStats {
    let deadline = Instant::now() + TIMEOUT;
    let mut last = (meta.stats().await, Instant::now());
    loop {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let now = meta.stats().await;
        let of = |s: &CoreStats| (s.evicted_bytes, s.clean_bytes);
        if of(&now) != of(&last.0) || now.spill_waiting_bytes > 0 {
            last = (now, Instant::now());
        } else if last.1.elapsed() > Duration::from_millis(100) {
            // Nothing is on its way there, and nothing more is evicted.
            return now;
        }
        assert!(Instant::now() < deadline, "never quiet: {now:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_shard_has_no_room_for_is_read_again_without_s3() {
    let body = pattern(1, FILE as usize);
    let mut gets = Vec::new();
    for spill in [0, SPILL] {
        let world = world(spill).await;
        let etag = put(&world, "k", &body).await;
        let file = readable("k", &etag, body.len(), 1);
        let node = world.start().await;
        world.beats(2).await;
        let client = Client::new(&world, node.port(), 5).await;
        let meta = MetaPeer::new(&world, node.port()).await;
        // As fast as any disk takes it.
        let (mut first, mut kept) = (0, meta.stats().await);
        for from in (0..body.len()).step_by(6 * MIB as usize) {
            let to = (from + 6 * MIB as usize).min(body.len());
            first += read_part(&world, &client, &file, &body, from..to).await;
            kept = settled(&meta).await;
        }
        let started = Instant::now();
        let second = read_through(&world, &client, &file, &body).await;
        let took = started.elapsed();
        let stats = meta.stats().await;
        println!("spill {spill}: {first} GETs, then {second} in {took:?}; {kept:?}; {stats:?}");
        gets.push((first, second));
        if spill > 0 {
            assert!(stats.spill_hits >= 30 && stats.spill_errors == 0, "{stats:?}");
            assert!(kept.spill_bytes + kept.clean_bytes >= FILE * 9 / 10, "{kept:?}");
            assert!(stats.spill_bytes <= stats.spill_capacity_bytes, "{stats:?}");
            // What leaves is read before its place is written anew.
            assert_eq!(stats.checksum_errors, 0, "{stats:?}");
        } else {
            assert_eq!((stats.spill_hits, stats.spill_capacity_bytes), (0, 0));
        }
        node.shutdown().await;
    }
    let [(first, without), (_, with)] = gets[..] else { panic!("two runs") };
    assert!(without * 2 > first, "the shard alone is too small: {gets:?}");
    assert!(with * 10 <= first, "nearly none: {gets:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_state_of_the_file_is_never_served() {
    let world = world(SPILL).await;
    let old = pattern(1, FILE as usize);
    let etag = put(&world, "k", &old).await;
    let file = readable("k", &etag, old.len(), 1);
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    read_through(&world, &client, &file, &old).await;
    let spilled = settled(&meta).await;
    assert!(spilled.spill_bytes > 16 * MIB, "{spilled:?}");

    // Replaced, and cut: the bytes from before are there under the same inode and place.
    let new = pattern(2, FILE as usize - 5_000_000);
    let etag = put(&world, "k", &new).await;
    let newer = readable("k", &etag, new.len(), 2);
    let gets = read_through(&world, &client, &newer, &new).await;
    assert!(gets >= 30, "all of it is new: {gets}");
    // And those are what a third pass finds.
    settled(&meta).await;
    let hits = meta.stats().await.spill_hits;
    read_through(&world, &client, &newer, &new).await;
    assert!(meta.stats().await.spill_hits > hits);

    // The same content, of which less counts since a truncate: zeros where it was cut off.
    let mut cut = newer.clone();
    cut.view.version = ViewVersion(3);
    let limit = new.len() - 10 * MIB as usize - 100;
    cut.view.backing.as_mut().expect("backed").limit = limit as u64;
    read_through(&world, &client, &cut, &new[..limit]).await;
    let (last, inside) = (limit as u64 / 4096 * 4096, limit % 4096);
    let at = (last / u64::from(CHUNK_BYTES), last % u64::from(CHUNK_BYTES));
    let block = client.read(&cut, at.0 as u32, at.1 as u32, 8192).await;
    assert!(block[inside..].iter().all(|b| *b == 0), "nothing past the cut");

    // Nobody wants it cached any more: S3 is asked for everything.
    assert_eq!(meta.control(Control::EvictClean(Vec::new())).await, ControlReply::Done);
    assert_eq!(meta.stats().await.spill_bytes, 0);
    let hits = meta.stats().await.spill_hits;
    client.read(&cut, 0, 0, CHUNK_BYTES).await;
    assert_eq!(meta.stats().await.spill_hits, hits);
    node.shutdown().await;
}

/// The same of what is on its way to the device when the file is replaced.
#[tokio::test(flavor = "multi_thread")]
async fn another_state_of_the_file_is_never_served_from_memory() {
    let world = world(SPILL).await;
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let mut waiting = 0;
    for version in 1..=6 {
        let body = pattern(version, FILE as usize);
        let etag = put(&world, "k", &body).await;
        let file = readable("k", &etag, body.len(), version);
        read_through(&world, &client, &file, &body).await;
        waiting += meta.stats().await.spill_waiting_bytes;
    }
    assert!(waiting > 0, "nothing was on its way");
    node.shutdown().await;
}

/// Flips a byte in each of so many places of the spill device behind the node's back.
fn rot(world: &World, places: impl Iterator<Item = u64>) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(spill_file(world));
    let file = file.expect("the spill file");
    for at in places {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        file.write_all_at(&[byte[0] ^ 1], at).expect("written");
    }
    file.sync_all().expect("on the device");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotten_spill_device_costs_fetches_and_is_switched_off_at_last() {
    let world = world(SPILL).await;
    let body = pattern(3, FILE as usize);
    let etag = put(&world, "k", &body).await;
    let file = readable("k", &etag, body.len(), 1);
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    read_through(&world, &client, &file, &body).await;
    settled(&meta).await;

    // Some of it: those bytes come from S3, the others from the device.
    rot(&world, [3 * MIB, 9 * MIB + 77, 15 * MIB + 4095].into_iter());
    read_through(&world, &client, &file, &body).await;
    let some = settled(&meta).await;
    assert!((1..=3).contains(&some.spill_errors), "{some:?}");
    assert!(some.spill_hits >= 20 && some.spill_off == 0, "{some:?}");

    // All of it: after a few in a row nobody looks there any more.
    rot(&world, (SPILL_LOG..SPILL).step_by(4096));
    read_through(&world, &client, &file, &body).await;
    let all = meta.stats().await;
    assert_eq!((all.spill_off, all.spill_capacity_bytes, all.spill_bytes), (1, 0, 0), "{all:?}");
    read_through(&world, &client, &file, &body).await;
    assert_eq!(meta.stats().await.spill_errors, all.spill_errors, "it is left alone");
    node.shutdown().await;

    // The next start takes it as it is: empty.
    let node = world.start().await;
    world.beats(2).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let anew = meta.stats().await;
    assert!(anew.spill_capacity_bytes > 0 && anew.spill_bytes == 0, "{anew:?}");
    let client = Client::new(&world, node.port(), 6).await;
    read_through(&world, &client, &file, &body).await;
    node.shutdown().await;
}

const SPILL_LOG: u64 = ebb_dataplane::core::SPILL_LOG_AT;

/// Why a node with that configuration does not start.
async fn refused(config: &NodeConfig) -> String {
    let ended = ebb_dataplane::run(config.clone(), std::future::pending());
    let ended = tokio::time::timeout(Duration::from_secs(40), ended).await.expect("in time");
    ended.expect_err("refused").to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spill_device_that_is_not_for_this_core_is_refused_with_the_reason() {
    let world = world(SPILL).await;
    let node = world.start().await;
    let other = |change: &dyn Fn(&mut NodeConfig)| {
        let mut config = world.another("other");
        change(&mut config);
        config
    };
    let busy = refused(&other(&|_| {})).await;
    assert!(busy.contains("spill-0.ebb") && busy.contains("locked"), "{busy}");
    let small = refused(&other(&|c| c.spill_bytes = MIB)).await;
    assert!(small.contains("at least 16777216 are needed"), "{small}");
    let shard = world.config.dir.join("shard-0.ebb");
    let file = refused(&other(&|c| c.spill = vec![shard.clone()])).await;
    assert!(file.contains("neither a directory nor a block device"), "{file}");
    let missing = refused(&other(&|c| c.spill = vec!["/nowhere/at/all".into()])).await;
    assert!(missing.contains("/nowhere/at/all") && missing.contains("No such file"), "{missing}");
    node.shutdown().await;
    let theirs = refused(&other(&|c| c.cluster = format!("{}", ClusterId(0xabc)))).await;
    assert!(theirs.contains("another cluster") && theirs.contains("left as it is"), "{theirs}");
    // A file of somebody else's under our name.
    std::fs::write(spill_file(&world), b"precious").expect("written");
    let foreign = refused(&world.config).await;
    assert!(foreign.contains("not a spill file"), "{foreign}");
    assert_eq!(std::fs::read(spill_file(&world)).expect("there"), b"precious");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_device_spills_as_a_file_does() {
    let mut world = world(SPILL).await;
    let backing = world.dir.path().join("disk.img");
    let Some(device) = loopdev::loop_device(&backing, SPILL, 512) else { return };
    world.config.spill = vec![device.path.clone()];
    let body = pattern(4, FILE as usize);
    let etag = put(&world, "k", &body).await;
    let file = readable("k", &etag, body.len(), 1);
    // Somebody's.
    let raw = std::fs::OpenOptions::new().write(true).open(&device.path).expect("the device");
    raw.write_all_at(b"XFSB", 0).expect("written");
    raw.sync_all().expect("there");
    let said = refused(&world.config).await;
    assert!(said.contains("not blank") && said.contains("an XFS file system"), "{said}");
    raw.write_all_at(&[0; 4], 0).expect("written");
    raw.sync_all().expect("there");
    drop(raw);
    // Blank, then its own.
    for _ in 0..2 {
        let node = world.start().await;
        world.beats(2).await;
        let client = Client::new(&world, node.port(), 5).await;
        let meta = MetaPeer::new(&world, node.port()).await;
        let first = read_through(&world, &client, &file, &body).await;
        settled(&meta).await;
        let second = read_through(&world, &client, &file, &body).await;
        let stats = meta.stats().await;
        println!("{first} GETs, then {second}; {stats:?}");
        assert!(second < first && stats.spill_hits >= 15, "{stats:?}");
        node.shutdown().await;
    }
}
