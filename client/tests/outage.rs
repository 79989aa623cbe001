//! Nothing answers any more: every call ends in its time, however many wait beside it.

mod common;

use common::TestCluster;
use ebb_client::{ClientError, Config, FileSystem, InodeId, OpenFlags, OpenedFile, Owner};
use std::time::{Duration, Instant};

const OWNER: Owner = Owner { uid: 0, gid: 0 };
const WRITE: OpenFlags = OpenFlags { write: true, truncate: false, exclusive: false };
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
