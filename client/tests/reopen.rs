//! Files that are opened again soon after they were closed: no entry in the metadata plane's log, nothing old, and
//! nothing that outlives its unlink.

mod common;

use common::{TestCluster, until};
use ebb_client::{FileSystem, InodeId, OpenFlags, Owner};
use ebb_metaplane_protocol::AdminCall;
use ebb_s3::{Bucket, Condition, Metadata};
use std::time::{Duration, Instant};

const OWNER: Owner = Owner { uid: 0, gid: 0 };
const READ: OpenFlags = OpenFlags { write: false, truncate: false, exclusive: false };
const WRITE: OpenFlags = OpenFlags { write: true, truncate: false, exclusive: false };
const ROUNDS: u64 = 60;

async fn clients(cluster: &TestCluster) -> Vec<(&'static str, FileSystem)> {
    let leased = cluster.leased_fs("leased").await;
    vec![("with leases", leased), ("without", cluster.fs("asks").await)]
}

async fn make(fs: &FileSystem, name: &str, bytes: &[u8]) -> InodeId {
    let flags = OpenFlags { exclusive: true, ..WRITE };
    let file = fs.create(InodeId::ROOT, name.as_bytes(), 0o644, OWNER, flags).await;
    let file = file.expect("a create");
    fs.write(file.handle, 0, bytes).await.expect("a write");
    fs.release(file.handle).await.expect("a close");
    file.attr.inode
}

/// As a program does it: by name.
async fn read(fs: &FileSystem, name: &str) -> Vec<u8> {
    let attr = fs.lookup(InodeId::ROOT, name.as_bytes()).await.expect("there");
    let file = fs.open(attr.inode, READ).await.expect("an open");
    assert_eq!(file.attr.size, attr.size);
    let bytes = fs.read(file.handle, 0, 1 << 20).await.expect("a read");
    fs.release(file.handle).await.expect("a close");
    bytes.to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_opened_again_soon_is_no_entry_in_the_log() {
    let cluster = TestCluster::start(1).await;
    let other = cluster.fs("other").await;
    make(&other, "f", b"content").await;
    let count = async |name: &str| cluster.count(name).await;
    for (who, fs) in clients(&cluster).await {
        assert_eq!(read(&fs, "f").await, b"content");
        let (asked, changed) = (count("queries").await, count("mutations").await);
        for _ in 0..ROUNDS {
            assert_eq!(read(&fs, "f").await, b"content");
        }
        let (asked, changed) = (count("queries").await - asked, count("mutations").await - changed);
        // A machine that is busy elsewhere for half a second costs one.
        assert!(changed <= ROUNDS / 10, "{who}: {changed} changes, {asked} questions");
        if fs.has_leases() {
            assert!(asked <= ROUNDS / 2, "{asked} questions");
        }
    }
    cluster.stop().await;
}

/// Close-to-open: whoever opens after the writer's close reads what was written.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_changed_meanwhile_is_read_as_it_is() {
    let cluster = TestCluster::start(1).await;
    let other = cluster.fs("other").await;
    let inode = make(&other, "f", b"round 0").await;
    let readers = clients(&cluster).await;
    for round in 0..ROUNDS {
        let wanted = format!("round {round}, {}", "x".repeat(round as usize % 7));
        // By this one, and by a reader itself.
        let writer = if round % 3 == 0 { &readers[round as usize % 2].1 } else { &other };
        let flags = OpenFlags { truncate: true, ..WRITE };
        let file = writer.open(inode, flags).await.expect("an open");
        writer.write(file.handle, 0, wanted.as_bytes()).await.expect("a write");
        writer.release(file.handle).await.expect("a close");
        for (who, fs) in &readers {
            for _ in 0..3 {
                let found = String::from_utf8(read(fs, "f").await).expect("text");
                assert_eq!(found, wanted, "{who}, round {round}");
            }
        }
    }
    // Or there is another file of that name.
    other.unlink(InodeId::ROOT, b"f").await.expect("an unlink");
    make(&other, "f", b"another").await;
    for (who, fs) in &readers {
        assert_eq!(read(fs, "f").await, b"another", "{who}");
    }
    cluster.stop().await;
}

/// By somebody who does not know of us, in the bucket itself: seen by an open a second later.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_others_put_in_its_place_is_read_by_the_next_open() {
    let cluster = TestCluster::start(1).await;
    let other = cluster.fs("other").await;
    let inode = make(&other, "f", b"ours").await;
    let call = AdminCall::Flush { inode, wait: true };
    other.cluster().admin(call, Duration::from_secs(30)).await.expect("a flush");
    let bucket = Bucket::connect(cluster.s3.bucket_config("tide")).await;
    for (who, fs) in clients(&cluster).await.into_iter().filter(|(_, fs)| fs.has_leases()) {
        for round in 0..3 {
            read(&fs, "f").await;
            let theirs = format!("r{round}!!");
            let body = theirs.clone().into_bytes();
            let put = bucket.put("f", body, &Metadata::new(), &Condition::None).await;
            put.expect("a put");
            // The metadata plane compares once a second.
            tokio::time::sleep(Duration::from_millis(1_200)).await;
            assert_eq!(read(&fs, "f").await, theirs.as_bytes(), "{who}, round {round}");
        }
    }
    cluster.stop().await;
}

/// Its space waits for nobody who merely read it before.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_unlinked_goes_though_it_was_read_before() {
    let cluster = TestCluster::start(1).await;
    let other = cluster.fs("other").await;
    for (who, fs) in clients(&cluster).await {
        let inode = make(&other, who, b"content").await;
        assert_eq!(read(&fs, who).await, b"content");
        other.unlink(InodeId::ROOT, who.as_bytes()).await.expect("an unlink");
        let unlinked = Instant::now();
        until("the file is gone", || async { other.getattr(inode).await.err() }).await;
        let took = unlinked.elapsed();
        assert!(took < Duration::from_secs(10), "{who}: {took:?}");
    }
    cluster.stop().await;
}

/// Who still has it open reads on, whatever others opened and closed.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_open_stays_though_others_close_it() {
    let cluster = TestCluster::start(1).await;
    let other = cluster.fs("other").await;
    for (who, fs) in clients(&cluster).await {
        let inode = make(&other, who, b"content").await;
        read(&fs, who).await;
        let file = fs.open(inode, READ).await.expect("an open");
        let again = fs.open(inode, READ).await.expect("an open");
        other.unlink(InodeId::ROOT, who.as_bytes()).await.expect("an unlink");
        fs.release(again.handle).await.expect("a close");
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        assert_eq!(fs.read(file.handle, 0, 100).await.expect("a read"), &b"content"[..], "{who}");
        fs.release(file.handle).await.expect("a close");
        until("the file is gone", || async { other.getattr(inode).await.err() }).await;
    }
    cluster.stop().await;
}
