//! What readers say of their reads: how much of a file in S3 the nodes fetch, and when.

mod common;

use common::{TestCluster, until};
use ebb_client::{Advice, ClientError, FileHandle, FileSystem, OpenFlags};
use ebb_dataplane_protocol::control::CoreStats;
use ebb_s3::fault::{Fault, FaultKind};
use ebb_s3::{Bucket, Condition, Metadata, Operation};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A file that is in S3 alone, open for reading; and its bytes.
async fn cold(cluster: &TestCluster, fs: &FileSystem, len: u64) -> (FileHandle, Vec<u8>) {
    let mut rng = StdRng::seed_from_u64(len);
    let body: Vec<u8> = (0..len).map(|_| rng.random()).collect();
    let bucket = Bucket::connect(cluster.s3.bucket_config("tide")).await;
    bucket.put("f", body.clone(), &Metadata::new(), &Condition::None).await.expect("a put");
    // A fault that does nothing is a counter.
    cluster.s3.faults().add(Fault::every(Operation::Get, FaultKind::Delay { ms: 0 }).on_key("f"));
    let inode = fs.resolve(b"f").await.expect("the file").inode;
    (fs.open(inode, OpenFlags::default()).await.expect("an open").handle, body)
}

async fn check(fs: &FileSystem, handle: FileHandle, body: &[u8], at: u64, len: u64) {
    let read = fs.read(handle, at, len).await.expect("a read");
    assert!(read[..] == body[at as usize..(at + len) as usize], "{len} bytes at {at}");
}

async fn sum(cluster: &TestCluster, of: impl Fn(&CoreStats) -> u64) -> u64 {
    cluster.status().await.nodes.iter().flat_map(|n| &n.cores).map(of).sum()
}

async fn cached(cluster: &TestCluster, bytes: u64) {
    until(&format!("{bytes} bytes are cached"), || async {
        (sum(cluster, |c| c.clean_bytes).await == bytes).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_reads_here_and_there_gets_what_it_asks_for_and_no_more() {
    let cluster = TestCluster::start(1).await;
    let fs = cluster.fs("reader").await;
    let (file, body) = cold(&cluster, &fs, 16 * MIB).await;
    fs.advise(file, 0..0, Advice::Random).expect("advice");
    // At the start of the file, and near one another: without advice that is a sequential reader.
    for at in [0, 12 * KIB, 5 * MIB, 6 * MIB, 9 * MIB] {
        check(&fs, file, &body, at, 4 * KIB).await;
    }
    cached(&cluster, 4 * 256 * KIB).await;
    assert_eq!(cluster.s3.faults().struck(), 4);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_says_that_it_reads_on_finds_the_next_bytes_there() {
    let cluster = TestCluster::start(2).await;
    let fs = cluster.fs("reader").await;
    let (file, body) = cold(&cluster, &fs, 32 * MIB).await;
    fs.advise(file, 0..0, Advice::Sequential).expect("advice");
    check(&fs, file, &body, 9 * MIB + 5, 4 * KIB).await;
    until("the window after the first read is there", || async {
        (sum(&cluster, |c| c.clean_bytes).await >= 8 * MIB).then_some(())
    })
    .await;
    // What the client has of it, it does not ask the nodes for, until it lets that go.
    let asked = async || sum(&cluster, |c| c.reads).await;
    fs.advise(file, 0..u64::MAX, Advice::DontNeed).expect("advice");
    fs.advise(file, 0..0, Advice::Random).expect("advice");
    let before = until("nobody reads", || async {
        let before = asked().await;
        tokio::time::sleep(std::time::Duration::from_millis(600)).await;
        (asked().await == before).then_some(before)
    })
    .await;
    check(&fs, file, &body, 10 * MIB, MIB).await;
    until("the nodes were asked", || async { (asked().await == before + 1).then_some(()) }).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_will_be_needed_is_there_when_it_is() {
    let cluster = TestCluster::start(2).await;
    let fs = cluster.fs("reader").await;
    // Past the first run, so that it is another group's, too.
    let (file, body) = cold(&cluster, &fs, 80 * MIB + 77).await;
    let (start, end) = (60 * MIB + 5, 75 * MIB + 123);
    fs.advise(file, start..end, Advice::WillNeed).expect("advice");
    // In pieces of 256 KiB.
    cached(&cluster, 15 * MIB + 256 * KIB).await;
    // And the end of the file, as often as one likes, if one says more than there is.
    for _ in 0..200 {
        fs.advise(file, 80 * MIB..u64::MAX, Advice::WillNeed).expect("advice");
    }
    cached(&cluster, 15 * MIB + 256 * KIB + 4 * KIB).await;

    let fetched = cluster.s3.faults().struck();
    cluster.s3.faults().clear();
    cluster.s3.faults().add(Fault::every(Operation::Get, FaultKind::SlowDown));
    fs.advise(file, 0..0, Advice::Random).expect("advice");
    check(&fs, file, &body, start, end - start).await;
    check(&fs, file, &body, 80 * MIB, 77).await;
    assert!(fetched <= 20, "in large pieces: {fetched}");
    fs.release(file).await.expect("a release");
    let late = fs.advise(file, 0..1, Advice::WillNeed);
    assert!(matches!(late, Err(ClientError::BadHandle)), "{late:?}");
    cluster.stop().await;
}
