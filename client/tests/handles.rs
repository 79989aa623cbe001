//! Several handles of one file in one client: the end of one is nothing to the others.

mod common;

use common::TestCluster;
use ebb_client::{Config, FileSystem, InodeId, OpenFlags, Owner};
use ebb_metaplane_protocol::AdminCall;
use ebb_metaplane_protocol::attr::SetAttr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const OWNER: Owner = Owner { uid: 0, gid: 0 };
const WRITE: OpenFlags = OpenFlags { write: true, truncate: false, exclusive: false };
const PATIENCE: Duration = Duration::from_secs(30);
const ROUNDS: u64 = 300;
/// A segment: it is sent as soon as it is full.
const PIECE: usize = 4096;
const PIECES: u64 = 32;

/// Writes with an ever newer handle, while the one before is closed and takes the commit along.
async fn write_and_close(fs: &FileSystem, inode: InodeId) -> ebb_client::Result<()> {
    let mut last = fs.open(inode, WRITE).await?;
    for round in 0..ROUNDS {
        let next = fs.open(inode, WRITE).await?;
        let writes = async {
            for i in 0..PIECES {
                let piece = [round as u8; PIECE];
                fs.write(next.handle, i * PIECE as u64, &piece).await?;
                tokio::task::yield_now().await;
            }
            Ok(())
        };
        tokio::try_join!(writes, fs.release(last.handle))?;
        last = next;
    }
    fs.release(last.handle).await
}

/// Handles are closed while writes through others ask for grants (each flush to S3 seals the old
/// ones): either may reach the metadata plane first.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_handle_closed_while_another_writes_costs_no_write() {
    let cluster = TestCluster::start(1).await;
    let config = Config { segment_bytes: PIECE, ..Config::default() };
    let fs = FileSystem::new(&cluster.connect_with("writer", config).await);
    let other = cluster.fs("other").await;
    let made = fs.create(InodeId::ROOT, b"f", 0o644, OWNER, WRITE).await.expect("a create");
    let inode = made.attr.inode;
    fs.release(made.handle).await.expect("a close");

    let done = Arc::new(AtomicBool::new(false));
    let over = Arc::clone(&done);
    let flushing = tokio::spawn(async move {
        while !over.load(Ordering::Relaxed) {
            let call = AdminCall::Flush { inode, wait: true };
            other.cluster().admin(call, PATIENCE).await.expect("a flush");
        }
    });
    write_and_close(&fs, inode).await.expect("no error");
    done.store(true, Ordering::Relaxed);
    flushing.await.expect("no error");
    cluster.stop().await;
}

/// Whoever waits for the same commit shares it, as long as it began after its own write: a thousand
/// durable writes of many threads are far fewer commits, and what a commit covers is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn fsyncs_that_wait_together_share_a_commit() {
    const TASKS: u64 = 16;
    const WRITES: u64 = 60;
    const BLOCK: u64 = 4096;
    let cluster = TestCluster::start(1).await;
    let (fs, other) = (cluster.fs("writers").await, cluster.fs("other").await);
    let made = fs.create(InodeId::ROOT, b"f", 0o644, OWNER, WRITE).await.expect("a create");
    let requests = async || cluster.count("requests").await;
    let before = requests().await;
    let written: Vec<_> = (0..TASKS)
        .map(|task| {
            let (fs, other) = (fs.clone(), other.clone());
            tokio::spawn(async move {
                for n in 0..WRITES {
                    // Each grows the file, so that the others' attributes tell what was committed.
                    let at = (n * TASKS + task) * BLOCK;
                    fs.write(made.handle, at, &[1; BLOCK as usize]).await.expect("buffered");
                    fs.fsync(made.handle).await.expect("durable");
                    if n % 20 == 19 {
                        let seen = other.lookup(InodeId::ROOT, b"f").await.expect("a look-up").size;
                        assert!(seen >= at + BLOCK, "synced up to {}, seen {seen}", at + BLOCK);
                    }
                }
            })
        })
        .collect();
    for task in written {
        task.await.expect("no panic");
    }
    let asked = requests().await - before;
    println!("{} fsyncs, {asked} requests", TASKS * WRITES);
    assert!(asked < TASKS * WRITES / 2, "{} fsyncs, {asked} requests", TASKS * WRITES);
    cluster.stop().await;
}

/// Attribute changes ride along while a new file is being written. Once it was closed they are sent: a
/// close of the last handle may be under way, and nothing would carry them any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_chmod_after_the_close_of_an_empty_new_file_is_not_held_back() {
    let cluster = TestCluster::start(1).await;
    let (fs, other) = (cluster.fs("client").await, cluster.fs("other").await);
    let made = fs.create(InodeId::ROOT, b"f", 0o644, OWNER, WRITE).await.expect("a create");
    fs.flush(made.handle).await.expect("a close");
    let set = SetAttr { mode: Some(0o755), ..SetAttr::default() };
    fs.setattr(made.attr.inode, set).await.expect("a chmod");
    let seen = other.lookup(InodeId::ROOT, b"f").await.expect("a look-up");
    assert_eq!(seen.mode, 0o755);
    cluster.stop().await;
}

/// What a benchmark calls durable, or a database: the nodes have it, although nothing is committed.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_synced_is_on_the_nodes_before_it_is_committed() {
    let cluster = TestCluster::start(1).await;
    let config = Config { write_age_max: PATIENCE, ..Config::default() };
    let fs = FileSystem::new(&cluster.connect_with("writer", config).await);
    let other = cluster.fs("other").await;
    let made = fs.create(InodeId::ROOT, b"f", 0o644, OWNER, WRITE).await.expect("a create");
    let (inode, handle) = (made.attr.inode, made.handle);
    fs.write(handle, 0, &[1; 2 * PIECE]).await.expect("a write");
    fs.fsync(handle).await.expect("a commit");

    let seen = async || {
        let file = other.open(inode, OpenFlags::default()).await.expect("an open");
        let bytes = other.read(file.handle, 0, PIECE as u64).await.expect("a read");
        other.release(file.handle).await.expect("a close");
        (bytes[0], file.attr.mtime)
    };
    let (before, committed) = seen().await;
    fs.write(handle, 0, &[2; PIECE]).await.expect("a write");
    assert_eq!(seen().await.0, before, "it waits in the writer's buffer");
    fs.sync_data(handle).await.expect("on the nodes");
    assert_eq!(seen().await, (2, committed), "the bytes are there, their time is not");
    fs.fsync(handle).await.expect("a commit");
    assert!(seen().await.1 > committed);
    fs.release(handle).await.expect("a close");
}
