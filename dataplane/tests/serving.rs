//! A node serves: round trips of all shapes, read-through, duplicates, restarts.

mod common;

use common::client::*;
use common::*;
use ebb_dataplane_protocol::control::{Control, ControlReply};
use ebb_dataplane_protocol::header::{FLAG_PREFETCH, FLAG_RANDOM, FLAG_SEQUENTIAL};
use ebb_dataplane_protocol::*;

const MIB: u64 = 1 << 20;

#[test]
fn child_node() {
    common::child_node();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_is_read_at_every_size_and_offset() {
    let world = World::new(256 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 11).await;
    let file = File::new(100);
    assert_eq!(client.write_status(&file, 0, 0, b"early").await, Status::NeedGrant);
    assert_eq!(client.present(&file).await, Status::Ok);

    // A model of two chunks, written over in every awkward shape.
    let mut model = vec![vec![0u8; CHUNK_BYTES as usize]; 2];
    let sizes = [1usize, 2, 511, 4095, 4096, 4097, 8192, 32_767, 32_768, 32_769, 65_536, 1_000_000];
    let offsets = [0u32, 1, 4095, 4096, 5000, 100_000, 3 << 20];
    let mut seed = 0;
    for (n, size) in sizes.iter().enumerate() {
        for offset in offsets {
            let chunk = n % 2;
            seed += 1;
            let data = pattern(seed, *size);
            client.write(&file, chunk as u32, offset, &data).await;
            let at = offset as usize;
            model[chunk][at..at + size].copy_from_slice(&data);
            let back = client.read(&file, chunk as u32, offset, *size as u32).await;
            assert!(back == data, "size {size} at {offset}");
        }
    }
    // A whole chunk, and the last byte of one.
    let whole = pattern(999, CHUNK_BYTES as usize);
    client.write(&file, 1, 0, &whole).await;
    model[1] = whole;
    client.write(&file, 1, CHUNK_BYTES - 1, b"x").await;
    *model[1].last_mut().expect("not empty") = b'x';
    for (chunk, model) in model.iter().enumerate() {
        for part in 0..4u32 {
            let back = client.read(&file, chunk as u32, part << 20, 1 << 20).await;
            let from = (part as usize) << 20;
            assert!(back == model[from..from + (1 << 20)], "chunk {chunk} part {part}");
        }
        assert!(client.read(&file, chunk as u32, 0, CHUNK_BYTES).await == *model);
    }
    // Never written: a known hole.
    assert!(client.read(&file, 7, 123, 5000).await.iter().all(|b| *b == 0));
    node.shutdown().await;

    // And all of it after a restart.
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 12).await;
    assert_eq!(client.present(&file).await, Status::Ok);
    for (chunk, model) in model.iter().enumerate() {
        assert!(client.read(&file, chunk as u32, 0, CHUNK_BYTES).await == *model);
    }
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_writers_and_readers_see_their_own_bytes() {
    let world = World::new(512 * MIB, 2).await;
    let node = world.start().await;
    world.beats(2).await;
    let mut tasks = Vec::new();
    for session in 1..=8u64 {
        let mut clients = Vec::new();
        for port in &node.ports {
            clients.push(Client::new(&world, *port, session).await);
        }
        tasks.push(tokio::spawn(async move {
            let file = File::new(1000 + session);
            for c in &clients {
                assert_eq!(c.present(&file).await, Status::Ok);
            }
            for round in 0..20u64 {
                let chunk = (round % 5) as u32;
                let pg = PgId::of_chunk(file.inode, ChunkIndex(chunk), PGS);
                let c = &clients[usize::from(pg.0 % 2)];
                let data = pattern(session * 1000 + round, 300_000 + round as usize);
                let offset = (round * 7919) as u32;
                c.write(&file, chunk, offset, &data).await;
                assert!(c.read(&file, chunk, offset, data.len() as u32).await == data);
            }
        }));
    }
    for task in tasks {
        task.await.expect("no panic");
    }
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_miss_is_read_through_once_and_cached() {
    let world = World::new(256 * MIB, 1).await;
    let body = pattern(5, 9 * MIB as usize + 1234);
    let etag = world
        .bucket
        .put("big", body.clone(), &Default::default(), &ebb_s3::Condition::None)
        .await
        .expect("PUT");
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 21).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let file = File::backed(200, "big", &etag.quoted(), body.len() as u64);
    assert_eq!(client.present(&file).await, Status::Ok);
    // Sixteen readers of the same bytes at once.
    let readers: Vec<_> = (0..16)
        .map(|_| {
            let (client, file) = (client.clone(), file.clone());
            tokio::spawn(async move { client.read(&file, 0, 10_000, 500_000).await })
        })
        .collect();
    for r in readers {
        assert!(r.await.expect("no panic") == body[10_000..510_000]);
    }
    for pass in 0..2 {
        for chunk in 0..3u32 {
            let from = chunk as usize * CHUNK_BYTES as usize;
            let to = body.len().min(from + CHUNK_BYTES as usize);
            let mut expected = body[from..to].to_vec();
            expected.resize(CHUNK_BYTES as usize, 0);
            for part in 0..4u32 {
                let back = client.read(&file, chunk, part << 20, 1 << 20).await;
                let at = (part as usize) << 20;
                assert!(back == expected[at..at + (1 << 20)], "pass {pass} {chunk}/{part}");
            }
        }
    }
    meta.eventually_clean(body.len() as u64).await;
    assert!(meta.stats().await.misses > 0);
    // Now without S3: everything is cached.
    world.s3.faults().add(ebb_s3::fault::Fault::every(
        ebb_s3::Operation::Get,
        ebb_s3::fault::FaultKind::InternalError,
    ));
    let back = client.read(&file, 1, 0, CHUNK_BYTES).await;
    let from = CHUNK_BYTES as usize;
    assert!(back == body[from..2 * from]);
    // A write into the middle of a cached block keeps what is around it.
    client.write(&file, 0, 5000, b"edge").await;
    let mut expected = body[4096..12288].to_vec();
    expected[904..908].copy_from_slice(b"edge");
    assert!(client.read(&file, 0, 4096, 8192).await == expected);
    world.s3.faults().clear();
    // And one into a block that is only in S3.
    let fresh = File { inode: InodeId(201), ..file.clone() };
    assert_eq!(client.present(&fresh).await, Status::Ok);
    client.write(&fresh, 2, 4000, b"edge").await;
    let from = 2 * CHUNK_BYTES as usize;
    let mut expected = body[from..from + 8192].to_vec();
    expected[4000..4004].copy_from_slice(b"edge");
    assert!(client.read(&fresh, 2, 0, 8192).await == expected);
    // The tail: past the object's end it is zeros.
    let tail = client.read(&fresh, 2, MIB as u32, 4096).await;
    let at = 9 * MIB as usize;
    assert!(tail[..1234] == body[at..] && tail[1234..].iter().all(|b| *b == 0));
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_or_missing_object_is_backing_changed() {
    let world = World::new(64 * MIB, 1).await;
    let none = ebb_s3::Condition::None;
    let meta = Default::default();
    let etag = world.bucket.put("k", vec![1u8; 9000], &meta, &none).await.expect("PUT");
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 31).await;
    let file = File::backed(300, "k", etag.as_str(), 9000);
    assert_eq!(client.present(&file).await, Status::Ok);
    world.bucket.put("k", vec![2u8; 9000], &meta, &none).await.expect("PUT");
    assert_eq!(client.read_status(&file, 0, 0, 100).await, Status::BackingChanged);
    assert_eq!(client.write_status(&file, 0, 10, b"x").await, Status::BackingChanged);
    world.bucket.delete("k", None).await.expect("DELETE");
    assert_eq!(client.read_status(&file, 0, 0, 100).await, Status::BackingChanged);
    // A whole block needs no old bytes.
    assert_eq!(client.write_status(&file, 0, 0, &[3u8; 4096]).await, Status::Ok);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn acked_writes_survive_kill_9_and_a_delayed_duplicate_never_lands() {
    let world = World::new(256 * MIB, 1).await;
    let file = File::new(400);
    let mut model = vec![0u8; CHUNK_BYTES as usize];
    let mut sequence = 1u64;
    let mut replays: Vec<(Sequence, u32, Vec<u8>)> = Vec::new();
    for round in 0..4u64 {
        let node = world.spawn().await;
        world.beats(2).await;
        let client = Client::new(&world, node.port(), 41).await;
        client.sequence.store(sequence, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(client.present(&file).await, Status::Ok);
        assert!(client.read(&file, 0, 0, CHUNK_BYTES).await == model, "round {round}");
        // Duplicates from before the crash: answered, not applied.
        for (sequence, offset, data) in &replays {
            let context = client.context(&file, *sequence);
            let reply = client.write_as(&file, 0, *offset, data, context).await;
            assert_eq!(reply.header.status, Status::Ok);
        }
        assert!(client.read(&file, 0, 0, CHUNK_BYTES).await == model, "round {round}");
        for i in 0..30u64 {
            let len = [100usize, 5000, 40_000, 300_000][(i % 4) as usize];
            let offset = ((i * 104_729 + round * 31) % 3_000_000) as u32;
            let data = pattern(round * 100 + i, len);
            let seq = client.next_sequence();
            let reply = client.write_as(&file, 0, offset, &data, client.context(&file, seq)).await;
            assert_eq!(reply.header.status, Status::Ok);
            let at = offset as usize;
            model[at..at + len].copy_from_slice(&data);
            if i == 3 {
                // Delayed beyond a newer write of the same bytes.
                replays.push((seq, offset, data));
                let newer = pattern(round * 100 + 77, len);
                client.write(&file, 0, offset, &newer).await;
                model[at..at + len].copy_from_slice(&newer);
            }
        }
        sequence = client.sequence.load(std::sync::atomic::Ordering::Relaxed);
        node.kill9();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_device_evicts_clean_data_then_says_no_space() {
    let world = World::new(64 * MIB, 1).await;
    let none = ebb_s3::Condition::None;
    let body = pattern(6, 24 * MIB as usize);
    let etag = world.bucket.put("c", body.clone(), &Default::default(), &none).await.expect("PUT");
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 51).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let cached = File::backed(500, "c", etag.as_str(), body.len() as u64);
    assert_eq!(client.present(&cached).await, Status::Ok);
    for chunk in 0..6 {
        client.read(&cached, chunk, 0, CHUNK_BYTES).await;
    }
    let file = File::new(501);
    assert_eq!(client.present(&file).await, Status::Ok);
    let mut written = 0u32;
    let full = loop {
        let data = pattern(u64::from(written), 1 << 20);
        let status = client.write_status(&file, written / 4, (written % 4) << 20, &data).await;
        match status {
            Status::Ok => written += 1,
            Status::Busy => {}
            status => break status,
        }
        assert!(written < 200, "the device is 64 MiB");
    };
    assert_eq!(full, Status::NoSpace);
    let stats = meta.stats().await;
    assert!(stats.evicted_bytes > 0 && stats.clean_bytes == 0, "{stats:?}");
    assert!(u64::from(written) * MIB > stats.capacity_bytes * 3 / 4, "{written} {stats:?}");
    for i in 0..written {
        let back = client.read(&file, i / 4, (i % 4) << 20, 1 << 20).await;
        assert!(back == pattern(u64::from(i), 1 << 20), "block {i}");
    }
    // Evicted data still reads, from S3, uncached.
    assert!(client.read(&cached, 0, 0, 100_000).await == body[..100_000]);
    // Space comes back when the file goes.
    assert_eq!(
        meta.control(Control::DropInodes(MapVersion(1), vec![file.inode])).await,
        ControlReply::Done
    );
    let other = File::new(502);
    assert_eq!(client.present(&other).await, Status::Ok);
    client.write(&other, 0, 0, &pattern(1, 4 << 20)).await;
    node.shutdown().await;
}

/// What a client says of its reads goes before what they look like.
#[tokio::test(flavor = "multi_thread")]
async fn a_read_says_whether_more_is_fetched_than_it_asks_for() {
    let world = World::new(256 * MIB, 1).await;
    let body = pattern(6, 32 * MIB as usize);
    let none = ebb_s3::Condition::None;
    let etag = world.bucket.put("k", body.clone(), &Default::default(), &none).await.expect("PUT");
    let node = world.start().await;
    world.beats(2).await;
    let mut client = Client::new(&world, node.port(), 10).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let file = |inode: u64| {
        let mut f = File::backed(inode, "k", etag.as_str(), body.len() as u64);
        f.mode = GrantMode::Read;
        f
    };
    let cached = async |least: u64| {
        meta.eventually_clean(least).await;
        meta.stats().await.clean_bytes
    };
    // Neither at the start of the file nor right behind the last one.
    client.flags = FLAG_RANDOM;
    let random = file(1);
    assert_eq!(client.present(&random).await, Status::Ok);
    for offset in [0, 4096, 1 << 20, 2 << 20] {
        assert!(client.read(&random, 0, offset, 4096).await == body[offset as usize..][..4096]);
    }
    // In the middle, and somewhere else, and back: two readers of one client.
    client.flags = FLAG_SEQUENTIAL;
    let streams = file(2);
    assert_eq!(client.present(&streams).await, Status::Ok);
    client.read(&streams, 1, 1 << 20, 4096).await;
    let least = (3 << 18) + (3 << 20);
    assert_eq!(cached(least).await, least, "3 MiB from 5 MiB on, and 256 KiB three times");
    client.read(&streams, 6, 0, 4096).await;
    assert_eq!(cached(least + (3 << 20)).await, least + (3 << 20));
    client.read(&streams, 2, 0, 4096).await;
    assert_eq!(cached(least + (6 << 20)).await, least + (6 << 20), "up to 11 MiB");
    // The reply has no bytes, and comes when they are there.
    client.flags = FLAG_PREFETCH;
    let ahead = file(3);
    assert_eq!(client.present(&ahead).await, Status::Ok);
    let reply = client.read_frame(&ahead, 3, 100, 2 << 20).await;
    assert_eq!((reply.header.status, reply.body.len(), reply.payload.len()), (Status::Ok, 0, 0));
    let least = least + (6 << 20) + (9 << 18);
    assert_eq!(cached(least).await, least);
    world.bucket.delete("k", None).await.expect("deleted");
    client.flags = FLAG_RANDOM;
    assert!(client.read(&ahead, 3, 100, 2 << 20).await == body[3 * (4 << 20) + 100..][..2 << 20]);
    // A grant is needed for it like for any read.
    client.flags = FLAG_PREFETCH;
    assert_eq!(client.read_status(&file(4), 0, 0, 4096).await, Status::NeedGrant);
    node.shutdown().await;
}
