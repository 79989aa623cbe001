//! Seal, upload, commit, abort, cut: generations on their way to S3 (PROTOCOL §3–4, §9); rot on disk (I10).

mod common;

use common::client::*;
use common::*;
use ebb_dataplane_protocol::control::*;
use ebb_dataplane_protocol::*;
use ebb_s3::{Bucket, Etag};

const MIB: u64 = 1 << 20;
const CHUNK: usize = CHUNK_BYTES as usize;

async fn object(bucket: &Bucket, key: &str) -> Vec<u8> {
    bucket.get(key, None, None).await.expect("GET").collect().await.expect("body").to_vec()
}

async fn seal(meta: &MetaPeer, file: &File) -> SealedItem {
    let item =
        SealItem { inode: file.inode, generation: file.generation, alloc_limit: file.alloc_limit };
    match meta.control(Control::Seal(MapVersion(1), vec![item])).await {
        ControlReply::Sealed(mut v) => v.pop().expect("one"),
        other => panic!("{other:?}"),
    }
}

fn put(file: &File, key: &str, size: u64, condition: PutCondition) -> PutObject {
    PutObject {
        inode: file.inode,
        generation: file.generation,
        grant: file.meta_grant(),
        key: key.into(),
        size,
        metadata: vec![("ebb".into(), "nonce-1".into())],
        condition,
    }
}

async fn stored(meta: &MetaPeer, items: Vec<PutObject>) -> Vec<StoreOutcome> {
    match meta.control(Control::PutObjects(items)).await {
        ControlReply::Stored(v) => v,
        other => panic!("{other:?}"),
    }
}

fn etag(outcome: &StoreOutcome) -> Etag {
    match outcome {
        StoreOutcome::Stored { etag } => Etag::new(etag),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sealed_generation_reaches_s3_while_the_next_one_is_written() {
    let world = World::new(256 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let mut file = File::new(1);
    assert_eq!(client.present(&file).await, Status::Ok);
    let size = 6 * MIB as usize + 777;
    let mut model = vec![0u8; size];
    for (chunk, offset, len) in
        [(0usize, 0usize, 1_500_000usize), (0, 3_000_001, 5000), (1, 100, 2_000_000)]
    {
        let data = pattern((chunk + offset) as u64, len);
        client.write(&file, chunk as u32, offset as u32, &data).await;
        let at = chunk * CHUNK + offset;
        model[at..at + len].copy_from_slice(&data);
    }
    client.write(&file, 1, (size - CHUNK - 3) as u32, b"end").await;
    model[size - 3..].copy_from_slice(b"end");

    let sealed = seal(&meta, &file).await;
    assert_eq!(sealed.high_water, size as u64);
    assert!(sealed.extents.iter().any(|e| e.start == 0), "{sealed:?}");
    assert_eq!(client.write_status(&file, 0, 0, b"late").await, Status::StaleGeneration);
    assert_eq!(seal(&meta, &file).await, sealed, "sealing twice answers the same");
    let flushed = model.clone();
    let old = file.clone();
    file.generation = Generation(2);
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 10, b"generation two").await;
    model[10..24].copy_from_slice(b"generation two");

    let outcome =
        stored(&meta, vec![put(&old, "dir/file", size as u64, PutCondition::IfAbsent)]).await;
    let tag = etag(&outcome[0]);
    assert!(object(&world.bucket, "dir/file").await == flushed, "exactly generation one");
    let head = world.bucket.head("dir/file").await.expect("HEAD");
    assert_eq!(head.metadata.get("ebb").map(String::as_str), Some("nonce-1"));
    // Again: the condition does not hold any more.
    let again =
        stored(&meta, vec![put(&old, "dir/file", size as u64, PutCondition::IfAbsent)]).await;
    assert_eq!(again, [StoreOutcome::ConditionFailed]);
    // A generation that is not sealed here.
    let unsealed = stored(&meta, vec![put(&file, "x", size as u64, PutCondition::None)]).await;
    assert_eq!(unsealed, [StoreOutcome::NotSealed]);

    let done = FlushDone {
        inode: file.inode,
        generation: Generation(1),
        content: ContentId(2),
        old_content: ContentId(1),
        valid_bytes: size as u64,
        old_valid_bytes: 0,
    };
    for _ in 0..2 {
        assert_eq!(
            meta.control(Control::FlushDone(MapVersion(1), vec![done])).await,
            ControlReply::Done
        );
    }
    file.view = FileView {
        version: ViewVersion(2),
        content: ContentId(2),
        lineage: Lineage(0),
        clean_generation: Generation(1),
        backing: Some(Backing {
            key: "dir/file".into(),
            etag: tag.quoted(),
            length: size as u64,
            limit: size as u64,
        }),
        cuts: vec![],
    };
    assert_eq!(client.present(&file).await, Status::Ok);
    let stats = meta.stats().await;
    assert!(stats.clean_bytes > 3_000_000 && stats.dirty_bytes <= 8192, "{stats:?}");
    assert_eq!(stats.pins, 0);
    let mut padded = model.clone();
    padded.resize(2 * CHUNK, 0);
    for chunk in 0..2 {
        let back = client.read(&file, chunk as u32, 0, CHUNK_BYTES).await;
        assert!(back == padded[chunk * CHUNK..(chunk + 1) * CHUNK], "chunk {chunk}");
    }
    // The second flush: dirty data over the clean base.
    seal(&meta, &file).await;
    let outcome = stored(
        &meta,
        vec![put(&file, "dir/file", size as u64, PutCondition::IfMatch(tag.quoted()))],
    )
    .await;
    etag(&outcome[0]);
    assert!(object(&world.bucket, "dir/file").await == model);
    // The same with an empty cache: the base comes from S3, and is not there any more.
    assert_eq!(meta.control(Control::EvictClean(vec![])).await, ControlReply::Done);
    let outcome = stored(&meta, vec![put(&file, "copy", size as u64, PutCondition::None)]).await;
    assert_eq!(outcome, [StoreOutcome::BaseGone]);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_goes_up_in_parts_and_clean_parts_are_copied() {
    let world = World::new(256 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let size = 2 * RUN_BYTES as usize + 3_000_000;
    let base = pattern(9, size);
    let none = ebb_s3::Condition::None;
    let old = world.bucket.put("big", base.clone(), &Default::default(), &none).await.expect("PUT");
    let file = File::backed(1, "big", old.as_str(), size as u64);
    assert_eq!(client.present(&file).await, Status::Ok);
    let mut model = base;
    // Dirt in the second and in the last run.
    for (at, len) in [(RUN_BYTES as usize + 5_000_123, 100_000usize), (size - 50_000, 50_000)] {
        let data = pattern(at as u64, len);
        client.write(&file, (at / CHUNK) as u32, (at % CHUNK) as u32, &data).await;
        model[at..at + len].copy_from_slice(&data);
    }
    seal(&meta, &file).await;
    let upload = world.bucket.create_multipart("big", &Default::default()).await.expect("create");
    let copy = Control::CopyPart(CopyPart {
        key: "big".into(),
        upload_id: upload.as_str().into(),
        part_number: 1,
        source_key: "big".into(),
        source_etag: old.quoted(),
        range: ByteRange { start: 0, end: RUN_BYTES },
    });
    let part = |run: u32, length: u32| {
        Control::UploadPart(UploadPart {
            inode: file.inode,
            generation: file.generation,
            grant: file.meta_grant(),
            key: "big".into(),
            upload_id: upload.as_str().into(),
            part_number: run + 1,
            run: RunIndex(run),
            length,
        })
    };
    let requests = [copy, part(1, RUN_BYTES as u32), part(2, 3_000_000)];
    let calls = requests.map(|request| {
        let meta = meta.clone();
        tokio::spawn(async move { meta.control(request).await })
    });
    let mut parts = Vec::new();
    for (i, call) in calls.into_iter().enumerate() {
        let ControlReply::Part(outcome) = call.await.expect("no panic") else { panic!() };
        parts.push(ebb_s3::Part { number: i as u32 + 1, etag: etag(&outcome) });
    }
    let condition = ebb_s3::Condition::IfMatch(old.clone());
    world.bucket.complete_multipart("big", &upload, &parts, &condition).await.expect("complete");
    assert!(object(&world.bucket, "big").await == model);
    // The old object is gone: what was not cached cannot be copied or read any more.
    let gone = Control::CopyPart(CopyPart {
        key: "big".into(),
        upload_id: upload.as_str().into(),
        part_number: 1,
        source_key: "big".into(),
        source_etag: old.quoted(),
        range: ByteRange { start: 0, end: 100 },
    });
    let ControlReply::Part(outcome) = meta.control(gone).await else { panic!() };
    assert!(
        matches!(outcome, StoreOutcome::BaseGone | StoreOutcome::ConditionFailed),
        "{outcome:?}"
    );
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_flush_keeps_the_dirt_and_a_lost_reply_is_ambiguous() {
    let world = World::new(128 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let mut file = File::new(1);
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 0, b"first generation").await;
    seal(&meta, &file).await;
    use ebb_s3::fault::{Fault, FaultKind};
    world.s3.faults().add(Fault::next(ebb_s3::Operation::Put, 1, FaultKind::LostReply));
    let lost = stored(&meta, vec![put(&file, "f", 16, PutCondition::IfAbsent)]).await;
    assert_eq!(lost, [StoreOutcome::Ambiguous]);
    assert_eq!(object(&world.bucket, "f").await, b"first generation");
    world.s3.faults().add(Fault::next(ebb_s3::Operation::Put, 1, FaultKind::SlowDown));
    let failed = stored(&meta, vec![put(&file, "g", 16, PutCondition::IfAbsent)]).await;
    assert!(matches!(failed[0], StoreOutcome::Failed(_)), "{failed:?}");
    let aborted = vec![(file.inode, file.generation)];
    assert_eq!(
        meta.control(Control::FlushAborted(MapVersion(1), aborted)).await,
        ControlReply::Done
    );
    assert_eq!(meta.stats().await.pins, 0);
    assert_eq!(
        client.write_status(&file, 0, 0, b"x").await,
        Status::StaleGeneration,
        "floor stays"
    );
    file.generation = Generation(2);
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 0, b"SECOND").await;
    let sealed = seal(&meta, &file).await;
    assert_eq!(sealed.high_water, 16);
    // A batch: two files and one that is not here.
    let mut small = File::new(2);
    small.inode = InodeId(2);
    assert_eq!(client.present(&small).await, Status::Ok);
    client.write(&small, 0, 0, b"small").await;
    seal(&meta, &small).await;
    let outcomes = stored(
        &meta,
        vec![
            put(&file, "f", 16, PutCondition::None),
            put(&File::new(3), "none", 1, PutCondition::None),
            put(&small, "s", 5, PutCondition::IfAbsent),
        ],
    )
    .await;
    etag(&outcomes[0]);
    assert_eq!(outcomes[1], StoreOutcome::NotSealed);
    etag(&outcomes[2]);
    assert_eq!(object(&world.bucket, "f").await, b"SECONDgeneration");
    assert_eq!(object(&world.bucket, "s").await, b"small");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_is_journaled_before_the_view_serves_and_survives() {
    let world = World::new(128 * MIB, 1).await;
    let body = pattern(1, 100_000);
    let none = ebb_s3::Condition::None;
    let tag = world.bucket.put("k", body.clone(), &Default::default(), &none).await.expect("PUT");
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let mut file = File::backed(1, "k", tag.as_str(), 100_000);
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 50_000, &pattern(2, 80_000)).await;
    client.read(&file, 0, 0, 130_000).await;
    // Truncated to 60,001 bytes; then written far behind, so that a hole is between.
    let old = file.clone();
    file.generation = Generation(2);
    file.view.version = ViewVersion(2);
    file.view.cuts = vec![Cut { generation: Generation(1), at: 60_001 }];
    if let Some(b) = file.view.backing.as_mut() {
        b.limit = 60_001;
    }
    let apply = Control::ApplyViews(vec![file.meta_grant()]);
    assert_eq!(meta.control(apply).await, ControlReply::Done);
    assert_eq!(client.read_status(&old, 0, 0, 100).await, Status::StaleView);
    assert_eq!(client.write_status(&old, 0, 90_000, b"late").await, Status::StaleView);
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 120_000, b"behind").await;
    let mut model = body;
    model[50_000..].copy_from_slice(&pattern(2, 80_000)[..50_000]);
    model.truncate(60_001);
    model.resize(130_000, 0);
    model[120_000..120_006].copy_from_slice(b"behind");
    assert!(client.read(&file, 0, 0, 130_000).await == model);
    node.shutdown().await;

    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 6).await;
    // A delayed grant of before the cut finds its floor and its view in the journal.
    assert_eq!(client.present(&old).await, Status::StaleView);
    assert_eq!(client.present(&file).await, Status::Ok);
    assert!(client.read(&file, 0, 0, 130_000).await == model);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn warmed_ranges_need_no_s3() {
    let world = World::new(128 * MIB, 1).await;
    let body = pattern(1, 5 * MIB as usize);
    let none = ebb_s3::Condition::None;
    let tag = world.bucket.put("k", body.clone(), &Default::default(), &none).await.expect("PUT");
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let file = File::backed(1, "k", tag.as_str(), body.len() as u64);
    let range = ByteRange { start: 0, end: u64::MAX };
    let warm = Control::Warm(file.meta_grant(), range);
    assert_eq!(meta.control(warm).await, ControlReply::Done);
    meta.eventually_clean(body.len() as u64).await;
    world.s3.faults().add(ebb_s3::fault::Fault::every(
        ebb_s3::Operation::Get,
        ebb_s3::fault::FaultKind::InternalError,
    ));
    assert_eq!(client.present(&file).await, Status::Ok);
    assert!(client.read(&file, 0, 0, CHUNK_BYTES).await == body[..CHUNK]);
    assert!(client.read(&file, 1, 0, 1 << 20).await == body[CHUNK..]);
    // What is neither cached nor to be had.
    let other = File { inode: InodeId(2), ..file };
    assert_eq!(client.present(&other).await, Status::Ok);
    assert_eq!(client.read_status(&other, 0, 0, 1).await, Status::S3Unavailable);
    node.shutdown().await;
}

/// Flips one bit of each device block that holds one of `blocks`.
fn rot(world: &World, blocks: &[&[u8]]) -> usize {
    let path = world.config.dir.join("shard-0.ebb");
    let mut device = std::fs::read(&path).expect("read");
    let mut hit = 0;
    for at in (0..device.len()).step_by(4096) {
        if blocks.iter().any(|b| device[at..at + 4096] == **b) {
            device[at + 1000] ^= 4;
            hit += 1;
        }
    }
    std::fs::write(&path, device).expect("written");
    hit
}

#[tokio::test(flavor = "multi_thread")]
async fn rotten_clean_blocks_come_back_from_s3_and_dirty_ones_are_eio() {
    let world = World::new(64 * MIB, 1).await;
    let body = pattern(1, 300_000);
    let none = ebb_s3::Condition::None;
    let tag = world.bucket.put("k", body.clone(), &Default::default(), &none).await.expect("PUT");
    let node = world.start().await;
    world.beats(2).await;
    let clean = File::backed(1, "k", tag.as_str(), 300_000);
    let dirty = File::new(2);
    let data = pattern(2, 200_000);
    {
        let client = Client::new(&world, node.port(), 5).await;
        let meta = MetaPeer::new(&world, node.port()).await;
        assert_eq!(client.present(&clean).await, Status::Ok);
        assert_eq!(client.present(&dirty).await, Status::Ok);
        client.read(&clean, 0, 0, 300_000).await;
        client.write(&dirty, 0, 0, &data).await;
        meta.eventually_clean(300_000).await;
    }
    node.shutdown().await;
    let hit = rot(&world, &[&body[8192..12288], &body[40960..45056], &data[4096..8192]]);
    assert_eq!(hit, 3);

    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 6).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    assert_eq!(client.present(&clean).await, Status::Ok);
    assert_eq!(client.present(&dirty).await, Status::Ok);
    // Through a write's edge first, then a read.
    client.write(&clean, 0, 8200, b"edge").await;
    let mut expected = body.clone();
    expected[8200..8204].copy_from_slice(b"edge");
    assert!(client.read(&clean, 0, 0, 300_000).await == expected);
    let stats = meta.stats().await;
    assert!(stats.checksum_errors >= 2 && stats.checksum_repairs >= 1, "{stats:?}");
    // Never wrong bytes.
    assert_eq!(client.read_status(&dirty, 0, 4096, 10).await, Status::Io);
    assert_eq!(client.write_status(&dirty, 0, 5000, b"x").await, Status::Io);
    assert!(client.read(&dirty, 0, 8192, 100_000).await == data[8192..108_192]);
    seal(&meta, &dirty).await;
    let outcome = stored(&meta, vec![put(&dirty, "d", 200_000, PutCondition::None)]).await;
    assert!(matches!(outcome[0], StoreOutcome::Damaged(_)), "{outcome:?}");
    // Written over, it is whole again.
    let next = File { generation: Generation(2), ..dirty };
    assert_eq!(client.present(&next).await, Status::Ok);
    client.write(&next, 0, 4096, &[7; 4096]).await;
    assert!(client.read(&next, 0, 4096, 4096).await == [7; 4096]);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_finds_rot_that_nobody_reads_and_drops_it_where_s3_has_the_bytes() {
    let mut world = World::new(64 * MIB, 1).await;
    let body = pattern(1, 300_000);
    let none = ebb_s3::Condition::None;
    let tag = world.bucket.put("k", body.clone(), &Default::default(), &none).await.expect("PUT");
    let node = world.start().await;
    world.beats(2).await;
    let clean = File::backed(1, "k", tag.as_str(), 300_000);
    let dirty = File::new(2);
    let data = pattern(2, 200_000);
    {
        let client = Client::new(&world, node.port(), 5).await;
        let meta = MetaPeer::new(&world, node.port()).await;
        assert_eq!(client.present(&clean).await, Status::Ok);
        assert_eq!(client.present(&dirty).await, Status::Ok);
        client.read(&clean, 0, 0, 300_000).await;
        client.write(&dirty, 0, 0, &data).await;
        meta.eventually_clean(300_000).await;
        let stats = meta.stats().await;
        assert_eq!(stats.scrubbed_bytes, 0, "it is off");
    }
    node.shutdown().await;
    let hit = rot(&world, &[&body[8192..12288], &data[4096..8192], &data[8192..12288]]);
    assert_eq!(hit, 3);

    world.config.scrub_bytes_per_s = 64 * MIB;
    world.config.scrub_rest_s = 1;
    let node = world.start().await;
    world.beats(2).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    // Nobody reads anything.
    eventually_stats(&meta, "a pass", |s| s.scrub_passes >= 1).await;
    let stats = meta.stats().await;
    assert_eq!((stats.checksum_repairs, stats.damaged_blocks), (1, 2), "{stats:?}");
    assert!(stats.scrubbed_bytes >= 500_000, "{stats:?}");
    let client = Client::new(&world, node.port(), 6).await;
    assert_eq!(client.present(&clean).await, Status::Ok);
    assert_eq!(client.present(&dirty).await, Status::Ok);
    assert!(client.read(&clean, 0, 0, 300_000).await == body);
    // Not its errors: a next pass meets what is dirty again meanwhile.
    assert_eq!(meta.stats().await.checksum_repairs, 1, "it was gone before anybody read it");
    assert_eq!(client.read_status(&dirty, 0, 4096, 10).await, Status::Io, "never wrong bytes");
    // Written over, it is whole, and the next pass says so.
    client.write(&dirty, 0, 4096, &[7; 8192]).await;
    let passes = meta.stats().await.scrub_passes;
    eventually_stats(&meta, "two more passes", |s| s.scrub_passes >= passes + 2).await;
    assert_eq!(meta.stats().await.damaged_blocks, 0);
    node.shutdown().await;
}

async fn eventually_stats(
    meta: &MetaPeer,
    what: &str,
    done: impl Fn(&ebb_dataplane_protocol::control::CoreStats) -> bool,
) {
    let begun = std::time::Instant::now();
    while !done(&meta.stats().await) {
        assert!(begun.elapsed() < std::time::Duration::from_secs(60), "{what}: never");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seal_ends_a_generation_also_where_nothing_was_written_yet() {
    let world = World::new(256 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let file = File::new(1);
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 0, b"one run of it").await;
    assert_eq!(seal(&meta, &file).await.high_water, 13);
    // The first chunk of each of the next runs: other groups, of which the store knows nothing.
    for run in 1..5 {
        let late = client.write_status(&file, run * 4, 0, b"late").await;
        assert_eq!(late, Status::StaleGeneration, "run {run}");
    }
    node.shutdown().await;
}

/// The leader read a newer map than this core has: which groups it means is known once that came. A fence
/// taken without it would leave out a group that has just come here.
#[tokio::test(flavor = "multi_thread")]
async fn a_fence_waits_for_the_map_it_speaks_of() {
    let world = World::new(256 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let file = File::new(1);
    // Until then the second run's group is nobody's.
    let far = PgId::of_chunk(file.inode, ChunkIndex(4), PGS);
    let near = PgId::of_chunk(file.inode, ChunkIndex(0), PGS);
    assert_ne!(near, far, "the inode number is chosen so");
    let me = world.meta().map.pgs[usize::from(far.0)].members.clone();
    world.change_map(|map| map.pgs[usize::from(far.0)].members.clear()).await;
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 0, b"written").await;

    let next = MapVersion(world.meta().map.version.0 + 1);
    let item =
        SealItem { inode: file.inode, generation: file.generation, alloc_limit: file.alloc_limit };
    let asked = Control::Seal(next, vec![item]);
    let early = meta.connection.control(&asked, TIMEOUT).await.expect_err("no such map yet");
    assert_eq!(early.status(), Some(Status::Busy));
    client.write(&file, 0, 0, b"not sealed").await;

    let sealing = tokio::spawn({
        let meta = meta.clone();
        async move {
            loop {
                match meta.connection.control(&asked, TIMEOUT).await {
                    Ok(reply) => return reply,
                    // It waits for a second only; the leader asks again too.
                    Err(e) => assert_eq!(e.status(), Some(Status::Busy)),
                }
            }
        }
    });
    world.change_map(|map| map.pgs[usize::from(far.0)].members.clone_from(&me)).await;
    assert!(matches!(sealing.await.expect("no panic"), ControlReply::Sealed(_)));
    // It leads another group, and knows no view any more.
    assert_eq!(client.write_status(&file, 4, 0, b"late").await, Status::NeedGrant);
    assert_eq!(client.present(&file).await, Status::Ok);
    assert_eq!(client.write_status(&file, 4, 0, b"late").await, Status::StaleGeneration);
    node.shutdown().await;
}

/// A flush that this core was not told the end of: its bytes are those of the object unless somebody else wrote that,
/// or this core cannot know whether somebody did. The objects here are others, to see which it takes.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_flush_stored_is_served_before_its_end_is_told_though_groups_come() {
    let world = World::new(128 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let mut client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let group = |inode: u64| PgId::of_chunk(InodeId(inode), ChunkIndex(0), PGS);
    let mut inodes = (1..).filter(|n| group(*n) != PgId(0) && group(*n) != PgId(1));
    let mut next = || inodes.next().expect("endless");
    let (kept, outside) = (next(), next());
    let anew = inodes.find(|n| ![group(kept), group(outside)].contains(&group(*n))).expect("some");

    let (written, other) = (pattern(1, 50_000), pattern(2, 50_000));
    let none = ebb_s3::Condition::None;
    let mut files = Vec::new();
    for inode in [kept, outside, anew] {
        let file = File::new(inode);
        assert_eq!(client.present(&file).await, Status::Ok);
        client.write(&file, 0, 0, &written).await;
        seal(&meta, &file).await;
        let key = format!("f{inode}");
        let tag = world.bucket.put(&key, other.clone(), &Default::default(), &none).await;
        let mut after = File::backed(inode, &key, tag.expect("PUT").as_str(), 50_000);
        after.view.version = ViewVersion(2);
        after.view.content = ContentId(2);
        after.view.clean_generation = Generation(1);
        after.view.lineage = Lineage(u64::from(inode == outside));
        files.push(after);
    }
    // Of the file's group nothing changes, but another one comes; one of the files has its group led anew.
    world
        .change_map(|map| {
            let since = map.version;
            for pg in [PgId(0), group(anew)] {
                map.pgs[usize::from(pg.0)].since_map_version = since;
            }
        })
        .await;
    client.map_version = world.meta().map.version;
    let expected = [(&written, 50_000), (&other, 0), (&other, 0)];
    for (file, (bytes, dirty)) in files.iter_mut().zip(expected) {
        file.least_map = client.map_version;
        let before = meta.stats().await;
        assert_eq!(client.present(file).await, Status::Ok);
        let read = client.read(file, 0, 0, 50_000).await;
        assert!(read == *bytes, "inode {}", file.inode.0);
        let after = meta.stats().await;
        assert_eq!(after.misses - before.misses, u64::from(dirty == 0), "inode {}", file.inode.0);
    }
    node.shutdown().await;
}
