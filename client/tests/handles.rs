//! Several handles of one file in one client: the end of one is nothing to the others.

mod common;

use common::TestCluster;
use ebb_client::{Config, FileSystem, InodeId, OpenFlags, Owner};
use ebb_metaplane_protocol::AdminCall;
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
