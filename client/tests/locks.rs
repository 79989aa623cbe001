//! Locks on ranges of files among clients (docs/PROTOCOL.md, R57).

mod common;

use common::{TestCluster, until};
use ebb_client::{ClientError, FileHandle, FileSystem, InodeId, Lock, LockMode, OpenFlags, Owner};
use ebb_metaplane_protocol::FsError;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const OWNER: Owner = Owner { uid: 0, gid: 0 };
const WRITE: OpenFlags = OpenFlags { write: true, truncate: false, exclusive: false };
const ME: u64 = 17;

fn range(start: u64, end: u64, mode: LockMode) -> Lock {
    Lock { owner: ME, start, end, mode, pid: 4 }
}

fn whole(mode: LockMode) -> Lock {
    range(0, u64::MAX, mode)
}

async fn open(fs: &FileSystem, name: &str) -> FileHandle {
    fs.create(InodeId::ROOT, name.as_bytes(), 0o644, OWNER, WRITE).await.expect("an open").handle
}

async fn tries(fs: &FileSystem, file: FileHandle, lock: Lock) -> bool {
    match fs.lock(file, lock, false, || true).await {
        Ok(_) => true,
        Err(ClientError::Fs(FsError::Locked)) => false,
        Err(e) => panic!("{e}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_one_client_has_locked_another_does_not_get() {
    let cluster = TestCluster::start(1).await;
    let (a, b) = (cluster.fs("a").await, cluster.fs("b").await);
    let (fa, fb) = (open(&a, "f").await, open(&b, "f").await);
    assert!(tries(&a, fa, range(0, 9, LockMode::Exclusive)).await);
    assert!(!tries(&b, fb, range(9, 20, LockMode::Shared)).await);
    assert!(tries(&b, fb, range(10, 20, LockMode::Exclusive)).await);
    let found = b.locked(fb, whole(LockMode::Shared)).await.expect("an answer").expect("a lock");
    assert_eq!((found.start, found.end, found.exclusive, found.pid), (0, 9, true, 0));
    assert_eq!(a.locked(fa, range(0, 9, LockMode::Exclusive)).await.expect("an answer"), None);
    // Another owner of the same client is somebody else.
    assert!(!tries(&a, fa, Lock { owner: 1, ..range(3, 3, LockMode::Shared) }).await);
    // It becomes shared, in part.
    assert!(tries(&a, fa, range(0, 4, LockMode::Shared)).await);
    assert!(tries(&b, fb, range(0, 4, LockMode::Shared)).await);
    assert!(!tries(&b, fb, range(0, 5, LockMode::Shared)).await);
    // A close of the file by that owner ends all of them; another owner's stay.
    assert!(tries(&a, fa, Lock { owner: 1, ..range(30, 40, LockMode::Exclusive) }).await);
    a.unlock_all(fa, ME).await.expect("an unlock");
    assert!(tries(&b, fb, range(0, 20, LockMode::Exclusive)).await);
    assert!(!tries(&b, fb, range(30, 40, LockMode::Exclusive)).await);
    // The handle's end ends what is left.
    a.release(fa).await.expect("a close");
    assert!(tries(&b, fb, whole(LockMode::Exclusive)).await);
    let odd = b.lock(fb, range(5, 4, LockMode::Shared), false, || true).await;
    assert!(matches!(odd, Err(ClientError::Fs(FsError::Invalid(_)))), "{odd:?}");
    cluster.stop().await;
}

/// Who waits gets it when it is free, soon; and can give up.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_waits_is_woken() {
    let cluster = TestCluster::start(1).await;
    let (a, b) = (cluster.fs("a").await, cluster.fs("b").await);
    let (fa, fb) = (open(&a, "f").await, open(&b, "f").await);
    let mut waits = Vec::new();
    for _ in 0..20 {
        assert!(tries(&a, fa, whole(LockMode::Exclusive)).await);
        let waiter = b.clone();
        let waiting = tokio::spawn(async move {
            let got = waiter.lock(fb, whole(LockMode::Exclusive), true, || false).await;
            (got.is_ok(), Instant::now())
        });
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert!(!waiting.is_finished(), "it is locked");
        let unlocked = Instant::now();
        a.lock(fa, whole(LockMode::Unlock), false, || true).await.expect("an unlock");
        let (got, at) = waiting.await.expect("no panic");
        assert!(got);
        waits.push(at - unlocked);
        b.lock(fb, whole(LockMode::Unlock), false, || true).await.expect("an unlock");
    }
    waits.sort();
    println!("woken after {:?}, {:?} at the most", waits[10], waits[19]);
    assert!(waits[10] < Duration::from_millis(200), "{waits:?}");
    // It gives up, and has nothing then.
    assert!(tries(&a, fa, whole(LockMode::Shared)).await);
    let gave_up = b.lock(fb, whole(LockMode::Exclusive), true, || true).await;
    assert!(matches!(gave_up, Err(ClientError::Interrupted)), "{gave_up:?}");
    a.lock(fa, whole(LockMode::Unlock), false, || true).await.expect("an unlock");
    assert!(tries(&a, fa, whole(LockMode::Exclusive)).await);
    cluster.stop().await;
}

/// A counter in a file, read and written under a lock by clients that cache, and never closed meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_written_under_a_lock_is_seen_under_the_next() {
    const CLIENTS: u64 = 3;
    const ROUNDS: u64 = 40;
    let cluster = TestCluster::start(1).await;
    let inside = Arc::new(AtomicU64::new(0));
    let mut at_work = Vec::new();
    for n in 0..CLIENTS {
        let fs = cluster.fs(&format!("client {n}")).await;
        let inside = Arc::clone(&inside);
        at_work.push(tokio::spawn(async move {
            let file = open(&fs, "counter").await;
            for _ in 0..ROUNDS {
                fs.lock(file, whole(LockMode::Exclusive), true, || false).await.expect("a lock");
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "one at a time");
                let text = fs.read(file, 0, 100).await.expect("a read");
                let text = String::from_utf8(text.to_vec()).expect("text");
                let count: u64 = text.trim().parse().unwrap_or(0);
                fs.write(file, 0, format!("{}\n", count + 1).as_bytes()).await.expect("a write");
                inside.fetch_sub(1, Ordering::SeqCst);
                fs.lock(file, whole(LockMode::Unlock), false, || true).await.expect("an unlock");
            }
            fs.release(file).await.expect("a close");
        }));
    }
    for at_work in at_work {
        at_work.await.expect("no panic");
    }
    let fs = cluster.fs("afterwards").await;
    let file = open(&fs, "counter").await;
    let text = fs.read(file, 0, 100).await.expect("a read");
    assert_eq!(text, format!("{}\n", CLIENTS * ROUNDS).as_bytes());
    cluster.stop().await;
}

/// Threads of a process are one owner: that one of them is refused says nothing of what another one got.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_refused_lock_forgets_no_other_of_its_owner() {
    let cluster = TestCluster::start(1).await;
    let (a, b) = (cluster.fs("a").await, cluster.fs("b").await);
    let (fa, fb) = (open(&a, "f").await, open(&b, "f").await);
    assert!(tries(&b, fb, range(0, 9, LockMode::Exclusive)).await);
    for round in 0..50 {
        let refused = tries(&a, fa, range(0, 0, LockMode::Shared));
        let (refused, got) =
            tokio::join!(refused, tries(&a, fa, range(100, 110, LockMode::Exclusive)));
        assert_eq!((refused, got), (false, true), "round {round}");
        assert!(!tries(&b, fb, range(105, 105, LockMode::Shared)).await, "round {round}");
        a.unlock_all(fa, ME).await.expect("an unlock");
        assert!(tries(&b, fb, range(105, 105, LockMode::Shared)).await, "round {round}");
        b.lock(fb, range(100, 110, LockMode::Unlock), false, || true).await.expect("an unlock");
    }
    cluster.stop().await;
}

/// Who has given its locks up loses none with its session.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_has_no_lock_outlives_its_session() {
    let cluster = TestCluster::start(1).await;
    let a = cluster.fs("a").await;
    let file = open(&a, "f").await;
    a.write(file, 0, b"before").await.expect("a write");
    assert!(tries(&a, file, whole(LockMode::Exclusive)).await);
    a.unlock_all(file, ME).await.expect("an unlock");
    cluster.end_session(a.cluster().session()).await;
    a.mkdir(InodeId::ROOT, b"d", 0o755, OWNER).await.expect("under another session");
    assert_eq!(a.read(file, 0, 10).await.expect("a read"), &b"before"[..]);
    a.write(file, 0, b"after!").await.expect("a write");
    a.fsync(file).await.expect("an fsync");
    assert!(tries(&a, file, whole(LockMode::Exclusive)).await);
    cluster.stop().await;
}

/// A session's end ends its locks. Its client does not go on as if it had them.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_lost_its_session_lost_its_locks_and_hears_it() {
    let cluster = TestCluster::start(1).await;
    let (a, b) = (cluster.fs("a").await, cluster.fs("b").await);
    let (fa, fb) = (open(&a, "f").await, open(&b, "f").await);
    a.write(fa, 0, b"mine").await.expect("a write");
    a.fsync(fa).await.expect("an fsync");
    let free = open(&a, "g").await;
    assert!(tries(&a, fa, whole(LockMode::Exclusive)).await);
    assert!(!tries(&b, fb, whole(LockMode::Shared)).await);
    let session = a.cluster().session();
    cluster.end_session(session).await;
    let lock = b.lock(fb, whole(LockMode::Exclusive), true, || false);
    tokio::time::timeout(Duration::from_secs(20), lock).await.expect("in time").expect("a lock");
    b.write(fb, 0, b"b's!").await.expect("a write");
    b.fsync(fb).await.expect("an fsync");
    // It finds out by whatever it does.
    until("a has another session", || async {
        let _ = a.getattr(InodeId::ROOT).await;
        let _ = a.mkdir(InodeId::ROOT, b"d", 0o755, OWNER).await;
        (a.cluster().session() != session).then_some(())
    })
    .await;
    let _ = a.write(fa, 0, b"lost").await;
    assert!(a.fsync(fa).await.is_err(), "what it wrote without its lock is refused");
    assert!(a.read(fa, 0, 4).await.is_err());
    assert!(a.lock(fa, whole(LockMode::Exclusive), false, || true).await.is_err());
    assert_eq!(b.read(fb, 0, 10).await.expect("a read"), &b"b's!"[..]);
    // Other files go on, and so does this one, opened again.
    a.write(free, 0, b"goes on").await.expect("a write");
    a.fsync(free).await.expect("an fsync");
    let _ = a.release(fa).await;
    let again = open(&a, "f").await;
    assert!(!tries(&a, again, whole(LockMode::Shared)).await);
    assert_eq!(a.read(again, 0, 10).await.expect("a read"), &b"b's!"[..]);
    cluster.stop().await;
}
