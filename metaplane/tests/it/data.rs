//! Flushes, moves and kills with real data nodes: what clients were told is written is in the bucket
//! after a flush, byte for byte, whatever happened in between.

use crate::common::*;
use ebb_client::{Cluster, Config, FileSystem, OpenFlags, Owner, SetAttr};
use ebb_dataplane_protocol::auth::ClusterKey;
use ebb_dataplane_protocol::{CoreId, InodeId, NodeState, PgId, ShardRef};
use ebb_metaplane_protocol::*;
use ebb_s3::Operation;
use ebb_s3::fault::{Fault, FaultKind};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;

const ROOT: InodeId = InodeId::ROOT;
const OWNER: Owner = Owner { uid: 5, gid: 6 };
const MIB: usize = 1 << 20;

/// Data nodes in this process.
struct Nodes {
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Nodes {
    async fn start(world: &World, address: &str, count: usize) -> Self {
        let (stop, stopped) = watch::channel(false);
        let mut tasks = Vec::new();
        for n in 0..count {
            let config = ebb_dataplane::NodeConfig {
                dir: world.dir.path().join(format!("node{n}")),
                devices: Vec::new(),
                listen: "127.0.0.1".to_owned(),
                advertise: None,
                ports: Vec::new(),
                cores: 1,
                cpus: Vec::new(),
                capacity_bytes: 512 << 20,
                arena_bytes: 64 << 20,
                index_bytes: 144 << 20,
                cluster: "7".to_owned(),
                key_file: world.dir.path().join("key"),
                meta: vec![address.to_owned()],
                dram_bytes: ebb_dataplane::config::DRAM_BYTES_DEFAULT,
                spill: Vec::new(),
                spill_bytes: 0,
                send_zc: false,
                sqpoll_idle_ms: 0,
                spin_us: 0,
                scrub_bytes_per_s: ebb_dataplane::config::SCRUB_BYTES_PER_S,
                scrub_rest_s: ebb_dataplane::config::SCRUB_REST_S,
                ready_file: None,
            };
            let mut stopped = stopped.clone();
            tasks.push(tokio::spawn(async move {
                let told = async move {
                    let _ = stopped.wait_for(|stop| *stop).await;
                };
                ebb_dataplane::run(config, told).await.expect("the data node runs");
            }));
        }
        Self { stop, tasks }
    }

    async fn stop(self) {
        let _ = self.stop.send(true);
        for task in self.tasks {
            let _ = tokio::time::timeout(PATIENCE, task).await;
        }
    }
}

async fn fs(address: &str) -> FileSystem {
    let key = ClusterKey::new([0x5e; 32]);
    let cluster = Cluster::connect(vec![address.to_owned()], key, "a test", Config::default());
    FileSystem::new(&cluster.await.expect("a session"))
}

async fn until<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let begun = Instant::now();
    while !ask().await {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}: not within a minute");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Puts every group where `holder` says, and waits until they are there.
async fn place(
    c: &Client,
    holder: impl Fn(u16, &[ebb_dataplane_protocol::NodeInfo]) -> Vec<ShardRef>,
) {
    let map = c.status().await.map;
    for pg in 0..map.pg_count() {
        let to = holder(pg, &map.nodes);
        c.admin(AdminCall::MovePg { pg: PgId(pg), to }).await.expect("begun");
    }
    let wanted: Vec<_> = (0..map.pg_count()).map(|pg| holder(pg, &map.nodes)).collect();
    until("the groups are placed", || async {
        let s = c.status().await;
        s.moves.is_empty() && s.map.pgs.iter().map(|g| &g.members).eq(wanted.iter())
    })
    .await;
}

fn on(nodes: &[ebb_dataplane_protocol::NodeInfo], i: usize) -> Vec<ShardRef> {
    vec![ShardRef { node: nodes[i].id, core: CoreId(0) }]
}

/// A cluster of `count` nodes that hold the groups evenly.
async fn cluster(world: &World, meta: &Meta, count: usize) -> (Nodes, Client) {
    let nodes = Nodes::start(world, &meta.address, count).await;
    let c = meta.session().await;
    until("the nodes register", || async { c.status().await.map.nodes.len() == count }).await;
    for node in c.status().await.map.nodes {
        let call = AdminCall::SetNodeState { node: node.id, state: NodeState::Active };
        c.admin(call).await.expect("active");
    }
    place(&c, |pg, nodes| on(nodes, usize::from(pg) % count)).await;
    (nodes, c)
}

fn bytes(rng: &mut StdRng, len: usize) -> Vec<u8> {
    let mut b = vec![0; len];
    rng.fill_bytes(&mut b);
    b
}

async fn object(world: &World, key: &str) -> Vec<u8> {
    let info = world.head(key).await.unwrap_or_else(|| panic!("{key} is not in the bucket"));
    if info.size == 0 {
        return Vec::new();
    }
    world.bucket.get_bytes(key, None, 0..info.size).await.expect("read").to_vec()
}

async fn check(world: &World, key: &str, expected: &[u8]) {
    let found = object(world, key).await;
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    assert!(
        found == expected,
        "{key}: {} bytes, expected {}, first difference at {differs:?}",
        found.len(),
        expected.len()
    );
}

async fn write_at(fs: &FileSystem, inode: InodeId, offset: u64, data: &[u8]) {
    let flags = OpenFlags { write: true, ..OpenFlags::default() };
    let file = fs.open(inode, flags).await.expect("opened");
    fs.write(file.handle, offset, data).await.expect("written");
    fs.fsync(file.handle).await.expect("durable");
    fs.release(file.handle).await.expect("released");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_of_every_size_reach_the_bucket_whole_and_changes_of_them_too() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let (nodes, c) = cluster(&world, &meta, 2).await;
    let fs = fs(&meta.address).await;
    let mut rng = StdRng::seed_from_u64(1);
    let sizes = [1, 4097, MIB, 16 * MIB - 1, 16 * MIB, 16 * MIB + 1, 40 * MIB + 12345];
    let mut files = Vec::new();
    for (i, size) in sizes.into_iter().enumerate() {
        let body = bytes(&mut rng, size);
        let path = format!("f{i}");
        let attr = fs.write_file(path.as_bytes(), &body, 0o600, OWNER).await.expect("written");
        files.push((path, attr.inode, body));
    }
    let report = c.settle().await;
    assert_eq!((report.remaining, &report.failed[..]), (0, &[][..]), "{report:?}");
    for (path, _, body) in &files {
        check(&world, path, body).await;
    }
    // Small changes of what is clean: most of the object is copied or read back.
    for (path, inode, body) in &mut files {
        let at = rng.random_range(0..body.len());
        let piece = bytes(&mut rng, 5_000);
        write_at(&fs, *inode, at as u64, &piece).await;
        let end = at + piece.len();
        if body.len() < end {
            body.resize(end, 0);
        }
        body[at..end].copy_from_slice(&piece);
        c.settle().await;
        check(&world, path, body).await;
    }
    // Cut, then extended: zeros, never the old bytes.
    for (path, inode, body) in &mut files {
        let (cut, end) = (body.len() / 2, body.len() + 100_000);
        for size in [cut, end] {
            let set = SetAttr { size: Some(size as u64), ..SetAttr::default() };
            fs.setattr(*inode, set).await.expect("resized");
        }
        body.truncate(cut);
        body.resize(end, 0);
        c.settle().await;
        check(&world, path, body).await;
    }
    // Renamed, the objects follow.
    for (path, _, body) in &files {
        let new = format!("{path}-moved");
        fs.rename(ROOT, path.as_bytes(), ROOT, new.as_bytes(), 0).await.expect("renamed");
        c.settle().await;
        check(&world, &new, body).await;
        assert!(world.head(path).await.is_none());
    }
    c.admin(AdminCall::Evict { inode: ROOT }).await.expect("evicted");
    for (path, _, body) in &files {
        let found = fs.read_file(format!("{path}-moved").as_bytes()).await.expect("read back");
        assert!(found == body.as_slice(), "{path} after eviction");
    }
    fs.close().await.expect("closed");
    nodes.stop().await;
    meta.stop().await;
}

/// Writes pieces of a file until told to stop; gives the file as it should be.
async fn writer(
    address: String,
    path: String,
    size: usize,
    seed: u64,
    mut stop: watch::Receiver<bool>,
) -> Vec<u8> {
    let fs = fs(&address).await;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut body = bytes(&mut rng, size);
    let attr = fs.write_file(path.as_bytes(), &body, 0o600, OWNER).await.expect("written");
    let flags = OpenFlags { write: true, ..OpenFlags::default() };
    let file = fs.open(attr.inode, flags).await.expect("opened");
    while !*stop.borrow_and_update() {
        for _ in 0..4 {
            let len = rng.random_range(1..60_000);
            let at = rng.random_range(0..size - len);
            let piece = bytes(&mut rng, len);
            fs.write(file.handle, at as u64, &piece).await.expect("written");
            body[at..at + len].copy_from_slice(&piece);
        }
        fs.fsync(file.handle).await.expect("durable");
    }
    fs.release(file.handle).await.expect("released");
    fs.close().await.expect("closed");
    body
}

async fn written_during(address: &str, mut during: impl AsyncFnMut()) -> Vec<(String, Vec<u8>)> {
    let (stop, stopped) = watch::channel(false);
    let mut writers = Vec::new();
    for (i, size) in [100_000, 3 * MIB, 20 * MIB].into_iter().enumerate() {
        let path = format!("w{i}");
        let task = writer(address.to_owned(), path.clone(), size, i as u64, stopped.clone());
        writers.push((path, tokio::spawn(task)));
    }
    during().await;
    let _ = stop.send(true);
    let mut files = Vec::new();
    for (path, task) in writers {
        files.push((path, task.await.expect("the writer saw no error")));
    }
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flushes_during_writes_and_lost_replies_lose_nothing() {
    let world = World::new().await;
    let mut config = world.config(7, "meta");
    config.timings.flush_after_ms = 50;
    let meta = world.start_with(config).await;
    let (nodes, c) = cluster(&world, &meta, 2).await;
    let files = written_during(&meta.address, async || {
        for (op, kind) in [
            (Operation::Put, FaultKind::LostReply),
            (Operation::CompleteMultipart, FaultKind::LostReply),
            (Operation::CompleteMultipart, FaultKind::InternalErrorAfter),
            (Operation::UploadPart, FaultKind::InternalError),
            (Operation::UploadPartCopy, FaultKind::LostReply),
            (Operation::CreateMultipart, FaultKind::SlowDown),
            (Operation::Put, FaultKind::LostRequest),
            (Operation::Head, FaultKind::SlowDown),
        ] {
            world.s3.faults().add(Fault::next(op, 2, kind));
            c.flush().await;
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        world.s3.faults().clear();
    })
    .await;
    c.settle().await;
    for (path, body) in &files {
        check(&world, path, body).await;
    }
    assert_eq!(world.keys().await, ["w0", "w1", "w2"], "no conflict was made up");
    assert!(world.s3.faults().struck() > 0);
    nodes.stop().await;
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_change_hands_under_writes_and_come_back_from_nobody() {
    let world = World::new().await;
    let mut config = world.config(7, "meta");
    config.timings.flush_after_ms = 200;
    let meta = world.start_with(config).await;
    let (nodes, c) = cluster(&world, &meta, 2).await;
    let files = written_during(&meta.address, async || {
        for round in 0..3 {
            place(&c, |_, nodes| on(nodes, round % 2)).await;
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await;
    let reader = fs(&meta.address).await;
    for (path, body) in &files {
        let found = reader.read_file(path.as_bytes()).await.expect("read");
        assert!(found == body.as_slice(), "{path} after the moves");
    }
    // To nobody: everything is in the bucket, and a reader makes a wish.
    place(&c, |_, _| Vec::new()).await;
    c.settle().await;
    for (path, body) in &files {
        check(&world, path, body).await;
    }
    let address = meta.address.clone();
    let (path, body) = files[1].clone();
    let waiting = tokio::spawn(async move {
        let reader = fs(&address).await;
        reader.read_file(path.as_bytes()).await.expect("read") == body.as_slice()
    });
    until("the wish is seen", || async { c.status().await.wake_wanted }).await;
    place(&c, |pg, nodes| on(nodes, usize::from(pg) % 2)).await;
    assert!(waiting.await.expect("no panic"));
    assert!(!c.status().await.wake_wanted);
    // A node that holds nothing and says so may go.
    place(&c, |_, nodes| on(nodes, 0)).await;
    let gone = c.status().await.map.nodes[1].id;
    let call = AdminCall::SetNodeState { node: gone, state: NodeState::Gone };
    until("the node is gone", || async { c.admin(call.clone()).await.is_ok() }).await;
    let holder = c.status().await.map.nodes[0].id;
    let call = AdminCall::SetNodeState { node: holder, state: NodeState::Gone };
    assert!(c.admin(call).await.is_err(), "a node that holds groups never goes (I8)");
    for (path, body) in &files {
        let found = reader.read_file(path.as_bytes()).await.expect("read");
        assert!(found == body.as_slice(), "{path} in the end");
    }
    nodes.stop().await;
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_killed_in_the_middle_of_flushes_and_moves_loses_nothing() {
    let world = World::new().await;
    let mut config = world.config(7, "meta");
    config.timings.flush_after_ms = 20;
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
    config.listen = format!("127.0.0.1:{}", port.expect("a port").port());
    let file = world.dir.path().join("meta.toml");
    let mut process = Process::start(&config, &file).await;
    let address = process.address.clone();
    let nodes = Nodes::start(&world, &address, 2).await;
    let c = Client::open(client(&address), 1).await;
    until("the nodes register", || async { c.status().await.map.nodes.len() == 2 }).await;
    for node in c.status().await.map.nodes {
        let call = AdminCall::SetNodeState { node: node.id, state: NodeState::Active };
        c.admin(call).await.expect("active");
    }
    place(&c, |pg, nodes| on(nodes, usize::from(pg) % 2)).await;
    let world_ref = &world;
    let files = written_during(&address, async || {
        for round in 0..8u64 {
            tokio::time::sleep(Duration::from_millis(150 + 37 * round)).await;
            if round % 2 == 1 {
                // Some replies are on their way when the leader dies.
                let slow = FaultKind::DelayReply { ms: 300 };
                world_ref.s3.faults().add(Fault::next(Operation::Put, 3, slow));
            }
            let map = c.status().await.map;
            for pg in (0..map.pg_count()).step_by(5) {
                let to = on(&map.nodes, (usize::from(pg) + round as usize) % 2);
                c.admin(AdminCall::MovePg { pg: PgId(pg), to }).await.expect("begun");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
            process.kill();
            process = Process::start(&config, &file).await;
        }
    })
    .await;
    world.s3.faults().clear();
    let reader = fs(&address).await;
    for (path, body) in &files {
        let found = reader.read_file(path.as_bytes()).await.expect("read");
        assert!(found == body.as_slice(), "{path} as a reader sees it");
    }
    c.settle().await;
    for (path, body) in &files {
        check(&world, path, body).await;
    }
    assert_eq!(world.keys().await, ["w0", "w1", "w2"], "no conflict was made up");
    nodes.stop().await;
    process.kill();
}

/// A PUT that was given up arrives after all, in place of the object that holds the file's clean bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_put_in_place_of_its_own_files_base_loses_nothing() {
    let world = World::new().await;
    let mut config = world.config(7, "meta");
    config.timings.resolve_after_ms = 50;
    let meta = world.start_with(config).await;
    let (nodes, c) = cluster(&world, &meta, 2).await;
    let fs = fs(&meta.address).await;
    let mut rng = StdRng::seed_from_u64(5);
    let mut body = bytes(&mut rng, 3 * MIB);
    let attr = fs.write_file(b"f", &body, 0o600, OWNER).await.expect("written");
    c.settle().await;
    c.admin(AdminCall::Evict { inode: ROOT }).await.expect("evicted");
    let mut change = async |at: usize, len: usize| {
        let piece = bytes(&mut rng, len);
        write_at(&fs, attr.inode, at as u64, &piece).await;
        body[at..at + len].copy_from_slice(&piece);
    };
    change(MIB, 5_000).await;
    let was = world.head("f").await.expect("there").etag;
    let faults = world.s3.faults();
    faults.add(Fault::next(Operation::Put, 1, FaultKind::Late { ms: 1_000 }).on_key("f"));
    faults.add(Fault::every(Operation::Put, FaultKind::InternalError).on_key("f"));
    c.flush().await;
    change(2 * MIB, 7_000).await;
    until("the late request arrives", || async {
        world.head("f").await.is_some_and(|info| info.etag != was)
    })
    .await;
    faults.clear();
    // The other attempts may be on their way too: a flush may have to wait for them first.
    c.settle().await;
    check(&world, "f", &body).await;
    c.admin(AdminCall::Evict { inode: ROOT }).await.expect("evicted");
    let found = fs.read_file(b"f").await.expect("read back");
    assert!(found == body.as_slice(), "after eviction");
    assert_eq!(world.keys().await, ["f"]);
    nodes.stop().await;
    meta.stop().await;
}

/// Another file's upload holds the key for longer than a few attempts take: who asks for a flush waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_waits_for_a_key_that_is_busy() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let (nodes, c) = cluster(&world, &meta, 1).await;
    let fs = fs(&meta.address).await;
    let faults = world.s3.faults();
    faults.add(Fault::next(Operation::Put, 1, FaultKind::Delay { ms: 3_000 }).on_key("f"));
    fs.write_file(b"f", b"old", 0o600, OWNER).await.expect("written");
    c.admin(AdminCall::Flush { inode: ROOT, wait: false }).await.expect("begun");
    until("the upload is under way", || async { faults.struck() > 0 }).await;
    fs.write_file(b"g", b"new", 0o600, OWNER).await.expect("written");
    fs.rename(ROOT, b"g", ROOT, b"f", 0).await.expect("renamed over");
    let report = c.flush().await;
    assert_eq!((report.remaining, &report.failed[..]), (0, &[][..]));
    check(&world, "f", b"new").await;
    c.settle().await;
    assert_eq!(world.keys().await, ["f"]);
    nodes.stop().await;
    meta.stop().await;
}

/// A stranger replaces (or deletes) the object of a large file of which a part is dirty.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_dirty_of_a_file_without_its_base_is_stored_and_nothing_is_made_up() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let (nodes, c) = cluster(&world, &meta, 2).await;
    let fs = fs(&meta.address).await;
    let mut rng = StdRng::seed_from_u64(6);
    for (name, gone) in [("replaced", false), ("deleted", true)] {
        let body = bytes(&mut rng, 40 * MIB);
        let attr = fs.write_file(name.as_bytes(), &body, 0o640, OWNER).await.expect("written");
        c.settle().await;
        c.admin(AdminCall::Evict { inode: ROOT }).await.expect("evicted");
        // One range within a run, one over the border of two.
        let mut pieces = Vec::new();
        for (at, len) in [(5 * MIB, MIB), (32 * MIB - 4096, 8192)] {
            let piece = bytes(&mut rng, len);
            write_at(&fs, attr.inode, at as u64, &piece).await;
            pieces.push((format!("{at}-{len}"), piece));
        }
        if gone {
            world.bucket.delete(name, None).await.expect("deleted");
        } else {
            world.put(name, b"a stranger's").await;
        }
        c.settle().await;
        if gone {
            assert_eq!(c.lookup(ROOT, name).await, Err(FsError::NotFound));
        } else {
            check(&world, name, b"a stranger's").await;
            let found = fs.read_file(name.as_bytes()).await.expect("read");
            assert!(found == b"a stranger's"[..]);
        }
        let conflict = format!("{name}.conflict-{:x}", attr.inode.0);
        let dir = c.lookup(ROOT, &conflict).await.expect("beside it");
        assert_eq!(dir.kind, FileKind::Directory);
        let mut names: Vec<String> = pieces.iter().map(|(name, _)| name.clone()).collect();
        names.sort_unstable();
        assert_eq!(c.names(dir.inode, 10).await, names);
        for (range, piece) in &pieces {
            let key = format!("{conflict}/{range}");
            check(&world, &key, piece).await;
            let found = fs.read_file(key.as_bytes()).await.expect("read");
            assert!(found == piece.as_slice(), "{key} as a reader sees it");
            let attr = c.lookup(dir.inode, range).await.expect("there");
            assert_eq!((attr.mode, attr.uid, attr.dirty), (0o640, OWNER.uid, false));
        }
        assert_eq!(c.status().await.dirty_inodes, 0);
    }
    let prefix = ".ebb/rescue/".to_owned();
    let request = ebb_s3::ListRequest { prefix, ..ebb_s3::ListRequest::default() };
    let left = world.bucket.list(&request).await.expect("listed");
    assert_eq!(left.objects, Vec::new());
    fs.close().await.expect("closed");
    c.shutdown().await;
    nodes.stop().await;
    meta.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unlink_and_a_new_file_during_an_upload_end_as_the_new_file() {
    let world = World::new().await;
    let meta = world.start(7, "meta").await;
    let (nodes, c) = cluster(&world, &meta, 1).await;
    let fs = fs(&meta.address).await;
    let mut rng = StdRng::seed_from_u64(3);
    for (round, size) in [10_000, 17 * MIB].into_iter().enumerate() {
        let name = format!("f{round}");
        let old = bytes(&mut rng, size);
        fs.write_file(name.as_bytes(), &old, 0o600, OWNER).await.expect("written");
        let op = if size > 16 * MIB { Operation::CompleteMultipart } else { Operation::Put };
        world.s3.faults().add(Fault::next(op, 1, FaultKind::Delay { ms: 500 }).on_key(&name));
        let admin = Client::open(client(&meta.address), 2).await;
        let flush = tokio::spawn(async move { admin.flush().await });
        tokio::time::sleep(Duration::from_millis(200)).await;
        fs.unlink(ROOT, name.as_bytes()).await.expect("removed");
        let new = bytes(&mut rng, 3_000);
        fs.write_file(name.as_bytes(), &new, 0o600, OWNER).await.expect("written");
        flush.await.expect("no panic");
        c.settle().await;
        check(&world, &name, &new).await;
    }
    assert_eq!(world.keys().await, ["f0", "f1"]);
    let leftovers = world.bucket.list_multipart_uploads("").await.expect("listed");
    assert_eq!(leftovers.len(), 0);
    nodes.stop().await;
    meta.stop().await;
}
