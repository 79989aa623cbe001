//! Extended attributes among clients.

mod common;

use common::{TestCluster, until};
use ebb_client::{
    ClientError, Config, FileSystem, InodeId, OpenFlags, OpenedFile, Owner, XattrMode,
};
use ebb_metaplane_protocol::FsError;

const OWNER: Owner = Owner { uid: 5, gid: 6 };
const NEW: OpenFlags = OpenFlags { write: true, truncate: false, exclusive: true };
const ANY: XattrMode = XattrMode::Any;

async fn make(fs: &FileSystem, dir: InodeId, name: &str) -> OpenedFile {
    fs.create(dir, name.as_bytes(), 0o640, OWNER, NEW).await.expect("a create")
}

async fn file(fs: &FileSystem, dir: InodeId, name: &str) -> InodeId {
    let file = make(fs, dir, name).await;
    fs.release(file.handle).await.expect("a close");
    file.attr.inode
}

fn errno<T>(result: Result<T, ClientError>) -> i32 {
    result.map_or_else(|e| e.errno(), |_| 0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_one_client_sets_another_reads() {
    let cluster = TestCluster::start(1).await;
    let (a, b) = (cluster.fs("a").await, cluster.fs("b").await);
    let f = file(&a, InodeId::ROOT, "f").await;
    assert_eq!(a.xattrs(f).await.expect("an answer"), []);
    assert_eq!(errno(a.xattr(f, b"user.a").await), libc::ENODATA);
    let attr = a.set_xattr(f, b"user.a", b"\0\xff", XattrMode::Create).await.expect("set");
    assert!(attr.xattrs);
    assert_eq!(b.xattr(f, b"user.a").await.expect("there"), b"\0\xff");
    assert_eq!(errno(b.set_xattr(f, b"user.a", b"", XattrMode::Create).await), libc::EEXIST);
    assert_eq!(errno(b.set_xattr(f, b"user.b", b"", XattrMode::Replace).await), libc::ENODATA);
    b.set_xattr(f, b"user.b", b"2", ANY).await.expect("set");
    let both = [(b"user.a".to_vec(), b"\0\xff".to_vec()), (b"user.b".to_vec(), b"2".to_vec())];
    assert_eq!(a.xattrs(f).await.expect("an answer"), both);
    for (name, value, want) in [
        (&b"user.big"[..], vec![1; 4_000], libc::ENOSPC),
        (b"user.big", vec![1; 70_000], libc::E2BIG),
        (&[&b"user."[..], &[b'n'; 251]].concat(), Vec::new(), libc::ERANGE),
        (b"system.posix_acl_access", vec![2], libc::EOPNOTSUPP),
        (b"", Vec::new(), libc::EINVAL),
    ] {
        assert_eq!(errno(a.set_xattr(f, name, &value, ANY).await), want);
    }
    assert_eq!(a.xattrs(f).await.expect("an answer"), both, "what is refused changes nothing");
    a.remove_xattr(f, b"user.a").await.expect("removed");
    assert_eq!(errno(a.remove_xattr(f, b"user.a").await), libc::ENODATA);
    assert!(!b.remove_xattr(f, b"user.b").await.expect("removed").xattrs);
    assert_eq!(a.xattrs(f).await.expect("an answer"), []);
    cluster.stop().await;
}

/// A file that only its maker knows of is told first, and keeps what is changed about it otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_file_that_nobody_was_told_of_can_have_them() {
    let cluster = TestCluster::start(1).await;
    let (fs, other) = (cluster.fs("maker").await, cluster.fs("other").await);
    let dir = fs.mkdir(InodeId::ROOT, b"d", 0o755, OWNER).await.expect("a mkdir").inode;
    let mut n = 0;
    let opened = loop {
        assert!(n < 2_000, "nothing is ever told late");
        let opened = make(&fs, dir, &format!("n{n}")).await;
        if fs.unnamed_files() > 0 {
            break opened;
        }
        fs.release(opened.handle).await.expect("a close");
        n += 1;
    };
    let inode = opened.attr.inode;
    assert_eq!(fs.xattrs(inode).await.expect("an answer"), []);
    assert_eq!(fs.unnamed_files(), 1, "that there are none asks nobody");
    fs.write(opened.handle, 0, b"content").await.expect("buffered");
    let attr = fs.set_xattr(inode, b"user.a", b"1", ANY).await.expect("set");
    assert_eq!((attr.mode, attr.size, attr.xattrs), (0o640, 7, true));
    assert_eq!(fs.unnamed_files(), 0);
    // It is still being written.
    assert_eq!(fs.xattr(inode, b"user.a").await.expect("there"), b"1");
    fs.release(opened.handle).await.expect("a close");
    let found = other.lookup(dir, format!("n{n}").as_bytes()).await.expect("there");
    assert_eq!((found.inode, found.size, found.xattrs), (inode, 7, true));
    assert_eq!(other.xattr(inode, b"user.a").await.expect("there"), b"1");
    cluster.stop().await;
}

/// That a file has none is remembered under its lease, and forgotten before somebody gives it one.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn that_there_are_none_is_leased_like_any_attribute() {
    let cluster = TestCluster::start(0).await;
    let other = cluster.fs("other").await;
    let f = file(&other, InodeId::ROOT, "f").await;
    let config = Config { lease_metadata: true, ..Config::default() };
    let fs = FileSystem::new(&cluster.connect_with("remembers", config).await);
    until("the file is remembered", || async {
        let before = fs.cluster().lease_counts().hits;
        fs.getattr(f).await.expect("there");
        (fs.cluster().lease_counts().hits > before).then_some(())
    })
    .await;
    let before = fs.cluster().lease_counts();
    for _ in 0..50 {
        assert!(matches!(
            fs.xattr(f, b"security.capability").await,
            Err(ClientError::Fs(FsError::NoAttribute))
        ));
    }
    let after = fs.cluster().lease_counts();
    assert_eq!((after.hits - before.hits, after.misses), (50, before.misses), "nobody is asked");
    for n in 0..20u8 {
        fs.getattr(f).await.expect("there");
        other.set_xattr(f, b"user.a", &[n], ANY).await.expect("set");
        assert_eq!(fs.xattr(f, b"user.a").await.expect("there"), [n]);
        fs.getattr(f).await.expect("there");
        other.remove_xattr(f, b"user.a").await.expect("removed");
        assert_eq!(fs.xattrs(f).await.expect("an answer"), []);
    }
    cluster.stop().await;
}
