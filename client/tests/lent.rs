//! Files that are open without a handle in the metadata plane's log (docs/PROTOCOL.md, R59): no entry for an open, and
//! nothing that is open goes.

mod common;

use common::{TestCluster, until};
use ebb_client::{FileHandle, FileSystem, InodeId, OpenFlags, Owner, SetAttr};
use ebb_metaplane_protocol::AdminCall;
use ebb_metaplane_protocol::lock::{Lock, LockMode};
use std::time::{Duration, Instant};

const OWNER: Owner = Owner { uid: 0, gid: 0 };
const READ: OpenFlags = OpenFlags { write: false, truncate: false, exclusive: false };
const NEW: OpenFlags = OpenFlags { write: true, truncate: false, exclusive: true };
const FILES: usize = 200;

fn name(no: usize) -> Vec<u8> {
    format!("file {no}").into_bytes()
}

fn content(no: usize) -> Vec<u8> {
    format!("the content of {no} ").repeat(10).into_bytes()
}

async fn make(fs: &FileSystem, count: usize) -> Vec<InodeId> {
    let mut made = Vec::new();
    for no in 0..count {
        let file = fs.create(InodeId::ROOT, &name(no), 0o644, OWNER, NEW).await.expect("a create");
        fs.write(file.handle, 0, &content(no)).await.expect("a write");
        fs.release(file.handle).await.expect("a close");
        made.push(file.attr.inode);
    }
    made
}

async fn open(fs: &FileSystem, files: &[InodeId]) -> Vec<FileHandle> {
    let mut handles = Vec::new();
    for inode in files {
        handles.push(fs.open(*inode, READ).await.expect("an open").handle);
    }
    handles
}

async fn check(fs: &FileSystem, handles: &[FileHandle]) {
    for (no, handle) in handles.iter().enumerate() {
        let found = fs.read(*handle, 0, 1 << 20).await.expect("a read");
        assert_eq!(found, content(no), "{no}");
    }
}

/// Waits until whatever is unlinked and open has a handle in the log.
async fn settled(cluster: &TestCluster) {
    let none = || async { (cluster.count("lingering_files").await == 0).then_some(()) };
    until("what is open has handles", none).await;
}

async fn gone(fs: &FileSystem, files: &[InodeId]) {
    for inode in files {
        until("the file is gone", || async { fs.getattr(*inode).await.err() }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_open_for_reading_is_no_entry_in_the_log() {
    let cluster = TestCluster::start(1).await;
    let other = cluster.fs("other").await;
    let files = make(&other, FILES).await;
    let fs = cluster.leased_fs("borrower").await;
    let before = cluster.count("mutations").await;
    let handles = open(&fs, &files).await;
    check(&fs, &handles).await;
    for handle in handles {
        fs.release(handle).await.expect("a close");
    }
    let entries = cluster.count("mutations").await - before;
    assert!(entries <= FILES as u64 / 20, "{entries} changes");
    cluster.stop().await;
}

/// Others unlink what is open here, and replace it: it is read on, until it is closed, and goes then.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_unlinked_is_read_on_by_who_has_it_open() {
    let cluster = TestCluster::start(1).await;
    let other = cluster.fs("other").await;
    let files = make(&other, FILES).await;
    let call = AdminCall::Flush { inode: files[0], wait: true };
    other.cluster().admin(call, Duration::from_secs(30)).await.expect("a flush");
    let fs = cluster.leased_fs("borrower").await;
    let handles = open(&fs, &files).await;
    // Twice here: the one does not depend on the other.
    let again = open(&fs, &files[..FILES / 2]).await;
    for no in 0..FILES {
        if no % 3 == 0 {
            let name = [&name(no)[..], b" new"].concat();
            let new =
                other.create(InodeId::ROOT, &name, 0o600, OWNER, NEW).await.expect("a create");
            other.release(new.handle).await.expect("a close");
            let to = self::name(no);
            let renamed = other.rename(InodeId::ROOT, &name, InodeId::ROOT, &to, 0).await;
            renamed.expect("a rename");
        } else {
            other.unlink(InodeId::ROOT, &name(no)).await.expect("an unlink");
        }
        if let Some(handle) = again.get(no) {
            fs.release(*handle).await.expect("a close");
        }
    }
    check(&fs, &handles).await;
    settled(&cluster).await;
    check(&fs, &handles).await;
    for handle in handles {
        fs.release(handle).await.expect("a close");
    }
    let closed = Instant::now();
    gone(&other, &files).await;
    assert!(closed.elapsed() < Duration::from_secs(10), "{:?}", closed.elapsed());
    cluster.stop().await;
}

/// Opened while somebody unlinks it: the open fails, or the file can be read.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_open_that_meets_an_unlink_is_a_file_or_none() {
    let cluster = TestCluster::start(1).await;
    let other = cluster.fs("other").await;
    let files = make(&other, FILES).await;
    let fs = cluster.leased_fs("borrower").await;
    let unlinks = async {
        for no in 0..FILES {
            other.unlink(InodeId::ROOT, &name(no)).await.expect("an unlink");
        }
    };
    let opens = async {
        let mut opened = Vec::new();
        for (no, inode) in files.iter().enumerate() {
            if let Ok(file) = fs.open(*inode, READ).await {
                opened.push((no, file.handle));
            }
        }
        opened
    };
    let ((), opened) = tokio::join!(unlinks, opens);
    settled(&cluster).await;
    for (no, handle) in &opened {
        let found = fs.read(*handle, 0, 1 << 20).await.expect("a read");
        assert_eq!(found, content(*no), "{no}");
        fs.release(*handle).await.expect("a close");
    }
    gone(&other, &files).await;
    cluster.stop().await;
}

/// Whose session ends has nothing open any more, and holds nothing up.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_is_gone_keeps_nothing() {
    let cluster = TestCluster::start(1).await;
    let other = cluster.fs("other").await;
    let files = make(&other, 20).await;
    let fs = cluster.leased_fs("borrower").await;
    open(&fs, &files).await;
    cluster.end_session(fs.cluster().session()).await;
    for no in 0..files.len() {
        other.unlink(InodeId::ROOT, &name(no)).await.expect("an unlink");
    }
    gone(&other, &files).await;
    cluster.stop().await;
}

/// A lock is a fact of the log, and so is its file then: closing the same file opened once more ends nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_locked_has_a_handle() {
    let cluster = TestCluster::start(1).await;
    let other = cluster.fs("other").await;
    let files = make(&other, 1).await;
    let fs = cluster.leased_fs("borrower").await;
    let (first, second) = (open(&fs, &files).await[0], open(&fs, &files).await[0]);
    let lock = Lock { mode: LockMode::Shared, start: 0, end: u64::MAX, owner: 1, pid: 1 };
    fs.lock(first, lock, false, || false).await.expect("a lock");
    let before = cluster.count("mutations").await;
    fs.release(second).await.expect("a close");
    let theirs = other.open(files[0], OpenFlags { write: true, ..READ }).await.expect("an open");
    let write = Lock { mode: LockMode::Exclusive, owner: 2, ..lock };
    // Its client lets go of what it has closed, and of nothing else.
    let mode = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    other.setattr(files[0], mode).await.expect("a chmod");
    let closed = || async { (cluster.count("mutations").await >= before + 3).then_some(()) };
    until("an open, a chmod, and a close", closed).await;
    assert!(other.lock(theirs.handle, write, false, || false).await.is_err(), "it is locked");
    fs.release(first).await.expect("a close");
    until("the lock is free", || async {
        other.lock(theirs.handle, write, false, || false).await.ok()
    })
    .await;
    cluster.stop().await;
}
