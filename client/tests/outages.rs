//! What the library makes of nodes that go and come back, and of sessions that expire: callers wait,
//! nothing acknowledged is lost, nothing is told twice. When nothing answers any more, every call ends
//! in its time, however many wait beside it.

mod common;

use common::{TestCluster, until};
use ebb_client::{ClientError, Config, FileSystem, InodeId, OpenFlags, OpenedFile, Owner};
use ebb_dataplane_protocol::ChunkIndex;
use ebb_metaplane_protocol::{AdminCall, FsError, Request, SessionCall};
use ebb_s3::{Bucket, Condition, Metadata};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const OWNER: Owner = Owner { uid: 0, gid: 0 };
const WRITE: OpenFlags = OpenFlags { write: true, truncate: false, exclusive: false };

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn writers_wait_for_a_node_that_restarts() {
    let mut cluster = TestCluster::start(2).await;
    let fs = cluster.fs("writer").await;
    let done = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let (fs, done) = (fs.clone(), Arc::clone(&done));
        async move {
            let mut files = 0u64;
            // A file in flight at every moment, each durable before the next.
            while !done.load(Ordering::Acquire) || files < 4 {
                let name = format!("f{files}");
                let file = fs
                    .create(InodeId::ROOT, name.as_bytes(), 0o644, OWNER, WRITE)
                    .await
                    .expect("a create");
                let data = pattern(files, 3_000_000 + files as usize * 7);
                for (i, piece) in data.chunks(100_000).enumerate() {
                    fs.write(file.handle, i as u64 * 100_000, piece).await.expect("a write");
                }
                fs.fsync(file.handle).await.expect("an fsync");
                fs.release(file.handle).await.expect("a release");
                files += 1;
            }
            files
        }
    });
    for node in [0, 1, 0] {
        cluster.restart_node(node, Duration::from_millis(200)).await;
        // It serves again when it has a lease; the writer notices by itself.
        let before = fs.statfs().await.expect("statfs").inodes;
        until("files are written after the restart", || async {
            (fs.statfs().await.ok()?.inodes >= before + 2).then_some(())
        })
        .await;
    }
    done.store(true, Ordering::Release);
    let files = writer.await.expect("no error in the writer");
    let reader = cluster.fs("reader").await;
    for n in 0..files {
        let bytes = reader.read_file(format!("f{n}").as_bytes()).await.expect("a read");
        assert!(bytes == pattern(n, 3_000_000 + n as usize * 7), "file {n} of {files}");
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_client_outlives_its_session() {
    let cluster = TestCluster::start(1).await;
    let fs = cluster.fs("client").await;
    let file = fs.create(InodeId::ROOT, b"f", 0o644, OWNER, WRITE).await.expect("a create");
    let data = pattern(1, 200_000);
    fs.write(file.handle, 0, &data[..100_000]).await.expect("a write");
    fs.fsync(file.handle).await.expect("an fsync");
    let gone = fs.create(InodeId::ROOT, b"gone", 0o644, OWNER, WRITE).await.expect("a create");
    fs.write(gone.handle, 0, b"content").await.expect("a write");
    fs.fsync(gone.handle).await.expect("an fsync");
    fs.unlink(InodeId::ROOT, b"gone").await.expect("an unlink");
    // Not sent yet when the session ends.
    fs.write(file.handle, 100_000, &data[100_000..]).await.expect("a write");

    let session = fs.cluster().session();
    let end = Request::Session(SessionCall::Close(session));
    cluster.meta_client().call(&end, Duration::from_secs(10)).await.expect("the session ends");

    fs.fsync(file.handle).await.expect("what was not sent goes under a new session");
    assert_ne!(fs.cluster().session(), session);
    let bytes = fs.read(file.handle, 0, 200_000).await.expect("the old handle reads");
    assert!(bytes == data);
    fs.write(file.handle, 0, b"again").await.expect("and writes");
    fs.flush(file.handle).await.expect("a flush");
    fs.release(file.handle).await.expect("a release");
    let other = cluster.fs("other").await;
    let seen = other.read_file(b"f").await.expect("a read");
    assert_eq!((&seen[..5], seen.len()), (&b"again"[..], 200_000));
    // The unlinked file went with the session that kept it.
    let read = fs.read(gone.handle, 0, 7).await;
    assert!(matches!(read, Err(ClientError::Stale)), "{read:?}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_object_replaced_under_uncached_bytes_ends_the_handle_and_shows_at_once() {
    let cluster = TestCluster::start(1).await;
    let fs = cluster.fs("client").await;
    let file = fs.create(InodeId::ROOT, b"f", 0o644, OWNER, WRITE).await.expect("a create");
    let inode = file.attr.inode;
    fs.write(file.handle, 0, b"ours").await.expect("a write");
    fs.release(file.handle).await.expect("a release");
    let admin = cluster.connect("admin").await;
    let flush = AdminCall::Flush { inode, wait: true };
    admin.admin(flush, Duration::from_secs(60)).await.expect("a flush");
    // A group that comes back brings no clean bytes along.
    let map = admin.refresh_map().await.expect("the map");
    let (pg, entry) = map.pg_of(inode, ChunkIndex(0)).expect("a group");
    let holder = entry.primary();
    cluster.move_group(pg, None).await;
    cluster.move_group(pg, holder).await;
    // The metadata server has just compared the file with its object: it does not look again.
    let before = fs.open(inode, OpenFlags::default()).await.expect("an open");
    let bucket = Bucket::connect(cluster.s3.bucket_config("tide")).await;
    let theirs = b"theirs, and longer".to_vec();
    bucket.put("f", theirs, &Metadata::new(), &Condition::None).await.expect("a put");
    let late = fs.read(before.handle, 0, 4).await;
    assert!(matches!(late, Err(ClientError::Stale)), "{late:?}");
    assert_eq!(fs.read_file(b"f").await.expect("the new object"), b"theirs, and longer".to_vec());
    admin.close().await.expect("the session ends");
    cluster.stop().await;
}

/// The rule of docs/PROTOCOL.md R40, through real servers: what another client made is seen by who
/// looks after it was made, also in a directory whose names were lent.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_name_that_another_client_adds_to_my_directory_is_seen_at_once() {
    let cluster = TestCluster::start(0).await;
    let (mine, other) = (cluster.fs("mine").await, cluster.fs("other").await);
    let absent = |found: Result<_, ClientError>| match found {
        Ok(_) => false,
        Err(ClientError::Fs(FsError::NotFound)) => true,
        Err(e) => panic!("a look-up: {e}"),
    };
    for round in 0..20u32 {
        let name = format!("d{round}");
        let dir = mine.mkdir(InodeId::ROOT, name.as_bytes(), 0o755, OWNER).await;
        let dir = dir.expect("a directory").inode;
        mine.create(dir, b"a", 0o644, OWNER, WRITE).await.expect("a create");
        mine.lookup(dir, b"a").await.expect("my own name");
        assert!(absent(mine.lookup(dir, b"b").await));
        let adding = {
            let other = other.clone();
            tokio::spawn(async move {
                match round % 4 {
                    0 => other.mkdir(dir, b"b", 0o755, OWNER).await.map(drop),
                    1 => other.symlink(dir, b"b", b"a", OWNER).await.map(drop),
                    2 => other.rename(dir, b"a", dir, b"b", 0).await,
                    _ => other.create(dir, b"b", 0o644, OWNER, WRITE).await.map(drop),
                }
            })
        };
        // I go on asking and making names meanwhile.
        let mut n = 0;
        while !adding.is_finished() {
            let _ = absent(mine.lookup(dir, b"b").await);
            let made = format!("m{n}");
            mine.symlink(dir, made.as_bytes(), b"a", OWNER).await.expect("a name");
            n += 1;
        }
        adding.await.expect("no panic").expect("a name");
        assert!(!absent(mine.lookup(dir, b"b").await), "round {round}: made, and not seen");
    }
    cluster.stop().await;
}

const PATIENCE: Duration = Duration::from_secs(2);
/// Data first, then the commit: each within the patience, and what the machine adds.
const ENDS: Duration = Duration::from_secs(15);

async fn impatient(cluster: &TestCluster, segment_bytes: usize) -> FileSystem {
    let config = Config { patience: PATIENCE, segment_bytes, ..Config::default() };
    FileSystem::new(&cluster.connect_with("impatient", config).await)
}

async fn make(fs: &FileSystem, dir: InodeId, name: &str) -> OpenedFile {
    fs.create(dir, name.as_bytes(), 0o644, OWNER, WRITE).await.expect("a create")
}

/// How the call ended; it has to.
async fn ends<T>(what: &str, call: impl Future<Output = Result<T, ClientError>>) -> ClientError {
    let began = Instant::now();
    let ended = tokio::time::timeout(ENDS, call).await;
    let Ok(ended) = ended else { panic!("{what}: not within {ENDS:?}") };
    let error = ended.err().unwrap_or_else(|| panic!("{what}: nobody could have answered"));
    println!("{what}: after {:?}: {error}", began.elapsed());
    error
}

/// A file that nobody was told of is tried again each turn; whoever closes it must not stand in line behind those tries.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_new_file_is_closed_in_time_when_nothing_answers() {
    let cluster = TestCluster::start(1).await;
    let fs = impatient(&cluster, 1 << 20).await;
    let dir = fs.mkdir(InodeId::ROOT, b"d", 0o755, OWNER).await.expect("a mkdir").inode;
    let mut n = 0;
    let file = loop {
        assert!(n < 2_000, "nothing is ever told late");
        let file = make(&fs, dir, &format!("n{n}")).await;
        if fs.unnamed_files() > 0 {
            break file;
        }
        fs.release(file.handle).await.expect("a release");
        n += 1;
    };
    fs.write(file.handle, 0, b"content").await.expect("buffered");
    cluster.stop().await;
    for turn in 0..2 {
        ends(&format!("fsync {turn}"), fs.fsync(file.handle)).await;
    }
    ends("close", fs.flush(file.handle)).await;
    ends("release", fs.release(file.handle)).await;
    // What nobody can tell any more stands in nobody's way.
    assert_eq!(fs.unnamed_files(), 0);
}

/// Many writes of one file wait for one grant, one map, one connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_writes_of_a_file_fail_in_the_time_of_one() {
    const SEGMENT: usize = 64 << 10;
    // As many as are under way at a time; more take their turns.
    const WINDOW: usize = 16;
    // Within what the grant allows, and far behind it.
    for at in [0, 1 << 33] {
        let cluster = TestCluster::start(1).await;
        let fs = impatient(&cluster, SEGMENT).await;
        let file = make(&fs, InodeId::ROOT, "f").await;
        fs.write(file.handle, 0, b"a grant").await.expect("buffered");
        fs.fsync(file.handle).await.expect("durable");
        cluster.stop().await;
        for i in 0..WINDOW {
            let at = at + (i * SEGMENT) as u64;
            fs.write(file.handle, at, &[7; SEGMENT]).await.expect("buffered");
        }
        ends(&format!("fsync of writes from {at} on"), fs.fsync(file.handle)).await;
    }
}

/// So do many who commit one file.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_fsyncs_of_a_file_fail_in_the_time_of_one() {
    let cluster = TestCluster::start(1).await;
    let fs = impatient(&cluster, 1 << 20).await;
    let file = make(&fs, InodeId::ROOT, "f").await;
    fs.write(file.handle, 0, b"content").await.expect("buffered");
    fs.sync_data(file.handle).await.expect("on the node");
    cluster.stop().await;
    let all = (0..12).map(|i| {
        let fs = fs.clone();
        async move { ends(&format!("fsync {i}"), fs.fsync(file.handle)).await }
    });
    futures::future::join_all(all).await;
}
