//! Writes whose answer is lost, and what happens before they are asked again (I1, I7; PROTOCOL R7, R15, R19, R27): real
//! nodes behind proxies that lose the answer.

mod common;

use common::TestCluster;
use ebb_client::{FileSystem, InodeId, OpenFlags, OpenedFile, Owner};
use ebb_dataplane_protocol::{ChunkIndex, PgId, ShardRef};
use ebb_metaplane_protocol::AdminCall;
use ebb_metaplane_protocol::attr::SetAttr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const OWNER: Owner = Owner { uid: 0, gid: 0 };
const WRITE: OpenFlags = OpenFlags { write: true, truncate: false, exclusive: false };
const LEN: usize = 50_000;

async fn create(fs: &FileSystem) -> OpenedFile {
    fs.create(InodeId::ROOT, b"f", 0o644, OWNER, WRITE).await.expect("a create")
}

async fn open(fs: &FileSystem) -> OpenedFile {
    let attr = fs.lookup(InodeId::ROOT, b"f").await.expect("a look-up");
    fs.open(attr.inode, WRITE).await.expect("an open")
}

/// Writes `LEN` bytes of 'a' and loses the answer; the writer goes on asking once it is let.
async fn write_and_lose(
    cluster: &TestCluster,
    fs: &FileSystem,
    file: &OpenedFile,
) -> tokio::task::JoinHandle<()> {
    let session = fs.cluster().session();
    fs.write(file.handle, 0, &[b'a'; LEN]).await.expect("buffered");
    cluster.rules.lose_next_write_of(session);
    let (fs, handle) = (fs.clone(), file.handle);
    let writer = tokio::spawn(async move {
        fs.fsync(handle).await.expect("the repeated write is answered");
    });
    cluster.rules.lost(session).await;
    writer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_write_asked_again_after_a_truncate_does_not_regrow_the_file() {
    let cluster = TestCluster::start_behind_proxies(1).await;
    let (writer, other) = (cluster.fs("writer").await, cluster.fs("other").await);
    let file = create(&writer).await;
    let asking = write_and_lose(&cluster, &writer, &file).await;
    let theirs = open(&other).await;
    let cut = SetAttr { size: Some(1000), ..SetAttr::default() };
    other.setattr(theirs.attr.inode, cut).await.expect("a truncate");
    cluster.rules.release(writer.cluster().session());
    asking.await.expect("no error in the writer");
    let reader = cluster.fs("reader").await;
    let seen = reader.lookup(InodeId::ROOT, b"f").await.expect("a look-up").size;
    assert_eq!(seen, 1000, "the write was before the truncate");
    assert_eq!(reader.read_file(b"f").await.expect("a read"), vec![b'a'; 1000]);
    cluster.stop().await;
}

/// The group moves while a write's answer is lost, and somebody else writes where it went.
async fn moved(by_way_of_nobody: bool) {
    let cluster = TestCluster::start_behind_proxies(2).await;
    let (writer, other) = (cluster.fs("writer").await, cluster.fs("other").await);
    let file = create(&writer).await;
    let asking = write_and_lose(&cluster, &writer, &file).await;

    let map = other.cluster().refresh_map().await.expect("a map");
    let pg = PgId::of_chunk(file.attr.inode, ChunkIndex(0), map.pg_count());
    let from = map.pgs[usize::from(pg.0)].primary().expect("held");
    let node = map.nodes.iter().map(|n| n.id).find(|n| *n != from.node).expect("two nodes");
    if by_way_of_nobody {
        cluster.move_group(pg, None).await;
    }
    cluster.move_group(pg, Some(ShardRef { node, ..from })).await;

    let theirs = open(&other).await;
    other.write(theirs.handle, 0, &[b'b'; LEN]).await.expect("buffered");
    other.fsync(theirs.handle).await.expect("an fsync");
    cluster.rules.release(writer.cluster().session());
    asking.await.expect("no error in the writer");
    let reader = cluster.fs("reader").await;
    assert!(
        reader.read_file(b"f").await.expect("a read") == vec![b'b'; LEN],
        "a write that was applied before the move was applied again over a later one"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_write_asked_again_after_its_group_moved_is_not_applied_again() {
    moved(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_write_asked_again_after_its_group_was_nobodys_is_not_applied_again() {
    moved(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_writers_of_one_file_both_go_on_while_its_generation_does() {
    const ROUNDS: u64 = 25;
    const PIECE: usize = 3000;
    let cluster = TestCluster::start(1).await;
    let flusher = cluster.connect("flusher").await;
    let first = cluster.fs("first").await;
    let inode = create(&first).await.attr.inode;
    let done = Arc::new(AtomicBool::new(false));
    let flushing = tokio::spawn({
        let done = Arc::clone(&done);
        async move {
            // Each flush that finds something ends a generation: one of the two has the older grant.
            while !done.load(Ordering::Acquire) {
                let call = AdminCall::Flush { inode, wait: true };
                flusher.admin(call, Duration::from_secs(60)).await.expect("a flush");
            }
        }
    });
    let mut writers = Vec::new();
    for w in 0..2u64 {
        let fs = cluster.fs("writer").await;
        let file = open(&fs).await;
        writers.push(tokio::spawn(async move {
            for round in 0..ROUNDS {
                // Neighbours in one chunk, so that one core sees both tags.
                let at = (round * 2 + w) * PIECE as u64;
                let byte = (round * 2 + w) as u8;
                fs.write(file.handle, at, &[byte; PIECE]).await.expect("buffered");
                fs.fsync(file.handle).await.expect("acknowledged");
            }
        }));
    }
    for writer in writers {
        writer.await.expect("both come to their end");
    }
    done.store(true, Ordering::Release);
    flushing.await.expect("no error in the flusher");
    let bytes = cluster.fs("reader").await.read_file(b"f").await.expect("a read");
    assert_eq!(bytes.len(), 2 * ROUNDS as usize * PIECE);
    for (i, piece) in bytes.chunks(PIECE).enumerate() {
        assert!(piece.iter().all(|b| usize::from(*b) == i), "piece {i}");
    }
    cluster.stop().await;
}
