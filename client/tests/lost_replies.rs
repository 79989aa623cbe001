//! Writes whose answer is lost, and what happens before they are asked again (I1, I7; PROTOCOL R7, R15, R19, R27): real
//! nodes behind proxies that lose the answer.

mod common;

use common::TestCluster;
use ebb_client::{ClientError, Cluster, FileSystem, InodeId, OpenFlags, OpenedFile, Owner};
use ebb_dataplane_protocol::auth::Role;
use ebb_dataplane_protocol::{ChunkIndex, PgId, ShardRef};
use ebb_metaplane_protocol::attr::SetAttr;
use ebb_metaplane_protocol::{AdminCall, Request, SessionCall};
use ebb_rpc::{Identity, MetaClient};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

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

/// Before a metadata server: passes everything, but the answers only while told to.
struct Relay {
    address: String,
    answers: tokio::sync::watch::Sender<bool>,
}

impl Relay {
    async fn before(server: &str) -> Relay {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let (answers, server) = (tokio::sync::watch::Sender::new(true), server.to_owned());
        let passes = answers.subscribe();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Ok(peer) = tokio::net::TcpStream::connect(&server).await else { continue };
                let mut passes = passes.clone();
                tokio::spawn(async move {
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_peer, mut to_peer) = peer.into_split();
                    let answering = async {
                        let mut some = vec![0; 64 << 10];
                        while let Ok(n @ 1..) = from_peer.read(&mut some).await {
                            if !*passes.borrow_and_update() {
                                // What comes now is lost, and the connection with it when it passes again.
                                let _ = passes.wait_for(|p| *p).await;
                                return;
                            }
                            if to_client.write_all(&some[..n]).await.is_err() {
                                return;
                            }
                        }
                    };
                    tokio::select! {
                        _ = tokio::io::copy(&mut from_client, &mut to_peer) => {}
                        () = answering => {}
                    }
                });
            }
        });
        Relay { address, answers }
    }
}

/// The answer to an unlink is lost, somebody else makes the file again, and the session ends: who
/// doesn't know whether it was done must not do it to the other one's file.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_change_whose_answer_was_lost_with_its_session_is_not_made_again() {
    let cluster = TestCluster::start(1).await;
    let relay = Relay::before(&cluster.address).await;
    let other = cluster.fs("other").await;
    let cut_off = Cluster::connect(
        vec![relay.address.clone()],
        cluster.key.clone(),
        "cut off",
        ebb_client::Config::default(),
    )
    .await
    .expect("a session");
    let (session, fs) = (cut_off.session(), FileSystem::new(&cut_off));
    let file = create(&other).await;
    other.release(file.handle).await.expect("closed");
    other.fsync_dir(InodeId::ROOT).await.expect("named");
    fs.lookup(InodeId::ROOT, b"f").await.expect("it is there");

    relay.answers.send_replace(false);
    let asking = tokio::spawn({
        let fs = fs.clone();
        async move { fs.unlink(InodeId::ROOT, b"f").await }
    });
    common::until("the unlink is carried out", || async {
        other.lookup(InodeId::ROOT, b"f").await.is_err().then_some(())
    })
    .await;
    let theirs = create(&other).await;
    other.release(theirs.handle).await.expect("closed");
    other.fsync_dir(InodeId::ROOT).await.expect("named");
    let operator = MetaClient::new(
        vec![cluster.address.clone()],
        Identity::new(cluster.key.clone(), Role::Controller),
    );
    let close = Request::Session(SessionCall::Close(session));
    operator.call(&close, Duration::from_secs(10)).await.expect("closed");
    relay.answers.send_replace(true);

    let result = asking.await.expect("no panic");
    assert!(matches!(result, Err(ClientError::OutcomeLost)), "{result:?}");
    let found = other.lookup(InodeId::ROOT, b"f").await.expect("the other one's file is there");
    assert_eq!(found.inode, theirs.attr.inode);
    // What comes after is done under a new session.
    fs.unlink(InodeId::ROOT, b"f").await.expect("removed");
    cluster.stop().await;
}
