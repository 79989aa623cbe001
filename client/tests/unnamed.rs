//! Files that are made by the client alone, and told with their first commit (docs/PROTOCOL.md, R49 to
//! R51): who made them notices nothing, and neither does anybody else.

mod common;

use common::TestCluster;
use ebb_client::{ClientError, Config, FileSystem, InodeId, OpenFlags, OpenedFile, Owner, SetAttr};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const OWNER: Owner = Owner { uid: 5, gid: 6 };
const WRITE: OpenFlags = OpenFlags { write: true, truncate: false, exclusive: false };
const EXCLUSIVE: OpenFlags = OpenFlags { exclusive: true, ..WRITE };

async fn make(fs: &FileSystem, dir: InodeId, name: &str) -> OpenedFile {
    fs.create(dir, name.as_bytes(), 0o640, OWNER, EXCLUSIVE).await.expect("a create")
}

async fn close(fs: &FileSystem, file: &OpenedFile) {
    fs.flush(file.handle).await.expect("a close");
    fs.release(file.handle).await.expect("a release");
}

/// A directory that `fs` fills, until one of its files is told late. That one is open.
async fn filling(fs: &FileSystem, dir: &str) -> (InodeId, String, OpenedFile) {
    let dir = fs.mkdir(InodeId::ROOT, dir.as_bytes(), 0o755, OWNER).await.expect("a mkdir").inode;
    for n in 0.. {
        assert!(n < 2_000, "nothing is ever told late");
        let name = format!("n{n}");
        let file = make(fs, dir, &name).await;
        if fs.unnamed_files() > 0 {
            return (dir, name, file);
        }
        close(fs, &file).await;
    }
    unreachable!()
}

async fn names(fs: &FileSystem, dir: InodeId) -> BTreeSet<String> {
    let all = fs.list(dir).await.expect("a listing");
    all.into_iter().map(|e| String::from_utf8(e.name).expect("text")).collect()
}

/// One log entry for a whole small file, and all of it is there for the next who looks.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_file_told_with_its_close_is_as_it_was_made() {
    let cluster = TestCluster::start(1).await;
    let (fs, other) = (cluster.fs("maker").await, cluster.fs("other").await);
    let (dir, name, file) = filling(&fs, "d").await;
    assert_eq!(file.attr.mode, 0o640);
    assert!(file.created && file.parent.is_some());
    fs.write(file.handle, 0, b"content").await.expect("buffered");
    let set = SetAttr { mode: Some(0o600), gid: Some(9), ..SetAttr::default() };
    let changed = fs.setattr(file.attr.inode, set).await.expect("a chmod");
    assert_eq!((changed.mode, changed.uid, changed.gid, changed.size), (0o600, 5, 9, 7));
    assert_eq!(fs.unnamed_files(), 1, "nothing of that was told");
    close(&fs, &file).await;
    assert_eq!(fs.unnamed_files(), 0);
    let mine = fs.getattr(file.attr.inode).await.expect("attributes");
    let seen = other.lookup(dir, name.as_bytes()).await.expect("a look-up");
    assert_eq!(seen.inode, file.attr.inode);
    assert_eq!((seen.mode, seen.uid, seen.gid, seen.nlink, seen.size), (0o600, 5, 9, 1, 7));
    assert_eq!((mine.mtime, mine.atime, mine.size), (seen.mtime, seen.atime, seen.size));
    assert_eq!(other.read_file(format!("d/{name}").as_bytes()).await.expect("read"), "content");
    cluster.stop().await;
}

/// A create takes no request, and a small file one log entry of its own instead of two.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn files_in_a_directory_of_ones_own_take_one_request_each() {
    const FILES: u64 = 400;
    let cluster = TestCluster::start(1).await;
    let fs = cluster.fs("maker").await;
    let (dir, _, file) = filling(&fs, "d").await;
    close(&fs, &file).await;
    let mutations = async || cluster.count("mutations").await;
    let before = mutations().await;
    for n in 0..FILES {
        let file = make(&fs, dir, &format!("m{n}")).await;
        fs.write(file.handle, 0, b"x").await.expect("buffered");
        close(&fs, &file).await;
    }
    let asked = mutations().await - before;
    println!("{FILES} files, {asked} mutations");
    assert!(asked < FILES * 13 / 10, "{FILES} files, {asked} mutations");
    cluster.stop().await;
}

/// Whatever its maker asks about a file that nobody else knows of, it is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn its_maker_never_notices_that_a_file_was_not_told() {
    let cluster = TestCluster::start(1).await;
    let fs = cluster.fs("maker").await;
    for case in 0..10 {
        let (dir, name, file) = filling(&fs, &format!("d{case}")).await;
        let (inode, bytes) = (file.attr.inode, name.as_bytes());
        fs.write(file.handle, 0, b"1234").await.expect("buffered");
        match case {
            0 => assert_eq!(fs.lookup(dir, bytes).await.expect("there").inode, inode),
            1 => assert!(names(&fs, dir).await.contains(&name)),
            2 => {
                let again = fs.create(dir, bytes, 0o600, OWNER, EXCLUSIVE).await;
                assert_eq!(again.expect_err("it is there").errno(), libc_eexist());
                let open = fs.create(dir, bytes, 0o600, OWNER, WRITE).await.expect("opened");
                assert_eq!((open.attr.inode, open.created), (inode, false));
                fs.release(open.handle).await.expect("a release");
            }
            3 => {
                let open = fs.open(inode, OpenFlags::default()).await.expect("opened");
                assert_eq!(fs.read(open.handle, 0, 10).await.expect("read"), "1234");
                fs.release(open.handle).await.expect("a release");
            }
            4 => {
                fs.unlink(dir, bytes).await.expect("removed");
                assert!(fs.lookup(dir, bytes).await.is_err());
                assert_eq!(fs.read(file.handle, 0, 10).await.expect("open files live on"), "1234");
            }
            5 => {
                fs.rename(dir, bytes, InodeId::ROOT, b"moved", 0).await.expect("renamed");
                let moved = fs.lookup(InodeId::ROOT, b"moved").await.expect("there");
                assert_eq!(moved.inode, inode);
            }
            6 => {
                let removed = fs.rmdir(InodeId::ROOT, b"d6").await;
                assert_eq!(removed.expect_err("it is not empty").errno(), 39);
            }
            7 => {
                let cut = SetAttr { size: Some(2), ..SetAttr::default() };
                assert_eq!(fs.setattr(inode, cut).await.expect("cut").size, 2);
                assert_eq!(fs.read(file.handle, 0, 10).await.expect("read"), "12");
            }
            8 => {
                let path = format!("d8/{name}");
                assert_eq!(fs.resolve(path.as_bytes()).await.expect("there").inode, inode);
                assert!(fs.mkdir(dir, bytes, 0o755, OWNER).await.is_err());
            }
            _ => {
                fs.fsync_dir(dir).await.expect("durable");
                assert_eq!(fs.unnamed_files(), 0);
            }
        }
        close(&fs, &file).await;
    }
    cluster.stop().await;
}

fn libc_eexist() -> i32 {
    ClientError::Fs(ebb_metaplane_protocol::FsError::Exists).errno()
}

/// Whoever else wants to know a name waits until it is told, and no longer than a moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn others_see_a_file_as_soon_as_its_create_has_returned() {
    let cluster = TestCluster::start(1).await;
    let (fs, other) = (cluster.fs("maker").await, cluster.fs("other").await);
    for case in 0..6 {
        let (dir, name, file) = filling(&fs, &format!("d{case}")).await;
        assert_eq!(fs.unnamed_files(), 1);
        let begun = Instant::now();
        match case {
            0 => {
                other.lookup(dir, name.as_bytes()).await.expect("there");
            }
            1 => assert!(names(&other, dir).await.contains(&name)),
            2 => {
                let theirs = other.create(dir, name.as_bytes(), 0o600, OWNER, EXCLUSIVE).await;
                assert_eq!(theirs.expect_err("one of two").errno(), libc_eexist());
            }
            3 => other.unlink(dir, name.as_bytes()).await.expect("there to be removed"),
            4 => {
                let gone = other.rmdir(InodeId::ROOT, b"d4").await;
                assert_eq!(gone.expect_err("it is not empty").errno(), 39);
            }
            _ => {
                let path = format!("d5/{name}");
                other.resolve(path.as_bytes()).await.expect("there");
            }
        }
        println!("case {case}: {:?}", begun.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        assert_eq!(fs.unnamed_files(), 0);
        close(&fs, &file).await;
        // Nothing is lent where others come and go.
        let more = make(&fs, dir, "one more").await;
        assert_eq!(fs.unnamed_files(), 0);
        close(&fs, &more).await;
    }
    cluster.stop().await;
}

/// Who fills a directory without a pause hears that others want to look into it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_busy_maker_gives_back_what_is_wanted() {
    let cluster = TestCluster::start(1).await;
    let fs = cluster.fs("maker").await;
    let config = Config { patience: Duration::from_secs(10), ..Config::default() };
    let other = FileSystem::new(&cluster.connect_with("other", config).await);
    for case in 0..4 {
        let (dir, name, file) = filling(&fs, &format!("d{case}")).await;
        close(&fs, &file).await;
        let over = Arc::new(AtomicBool::new(false));
        let (maker, stop) = (fs.clone(), Arc::clone(&over));
        let making = tokio::spawn(async move {
            let mut n = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let file = make(&maker, dir, &format!("busy{n}")).await;
                close(&maker, &file).await;
                n += 1;
            }
            n
        });
        match case {
            0 => assert!(other.lookup(dir, name.as_bytes()).await.is_ok()),
            1 => assert!(names(&other, dir).await.contains(&name)),
            2 => other.unlink(dir, name.as_bytes()).await.expect("removed"),
            _ => {
                let theirs = other.create(dir, b"theirs", 0o600, OWNER, EXCLUSIVE).await;
                close(&other, &theirs.expect("a create")).await;
            }
        }
        over.store(true, Ordering::Relaxed);
        let made = making.await.expect("no panic");
        println!("case {case}: {made} files meanwhile");
    }
    cluster.stop().await;
}

/// Two clients and several tasks of each make the same names: each is made once, nothing is lost, and
/// who was told that it made a file has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_all_who_make_a_name_one_succeeds() {
    const TASKS: usize = 4;
    const ROUNDS: usize = 12;
    const NAMES: usize = 30;
    let cluster = TestCluster::start(1).await;
    let clients = [cluster.fs("a").await, cluster.fs("b").await];
    let mut told_late = 0;
    for round in 0..ROUNDS {
        let (dir, _, first) = filling(&clients[0], &format!("r{round}")).await;
        close(&clients[0], &first).await;
        let made: Vec<_> = (0..TASKS)
            .map(|task| {
                // The other client joins in late, in every third round.
                let joins = task == TASKS - 1 && round % 3 == 2;
                let fs = clients[usize::from(joins)].clone();
                tokio::spawn(async move {
                    let mut rng = StdRng::seed_from_u64((round * TASKS + task) as u64);
                    if joins {
                        tokio::time::sleep(Duration::from_millis(rng.random_range(0..30))).await;
                    }
                    let (mut mine, mut late) = (Vec::new(), 0);
                    for n in 0..NAMES {
                        let name = format!("x{n}");
                        let flags = EXCLUSIVE;
                        let made = fs.create(dir, name.as_bytes(), 0o600, OWNER, flags).await;
                        match made {
                            Ok(file) => {
                                late += usize::from(fs.unnamed_files() > 0);
                                let content = format!("{task}:{n}");
                                fs.write(file.handle, 0, content.as_bytes()).await.expect("taken");
                                if rng.random_bool(0.1) {
                                    let pause = rng.random_range(0..400);
                                    tokio::time::sleep(Duration::from_millis(pause)).await;
                                }
                                close(&fs, &file).await;
                                mine.push((name, content));
                            }
                            Err(e) => assert_eq!(e.errno(), libc_eexist(), "{e}"),
                        }
                    }
                    (mine, late)
                })
            })
            .collect();
        let mut all = Vec::new();
        for task in made {
            let (mine, late) = task.await.expect("no panic");
            all.extend(mine);
            told_late += late;
        }
        assert_eq!(all.len(), NAMES, "each name was made once: {all:?}");
        for fs in &clients {
            for (name, content) in &all {
                let path = format!("r{round}/{name}");
                assert_eq!(fs.read_file(path.as_bytes()).await.expect("read"), content.as_bytes());
            }
        }
    }
    println!("{told_late} of {} told late", ROUNDS * NAMES);
    assert!(told_late > ROUNDS, "only {told_late} were told late");
    cluster.stop().await;
}

/// Nobody closes it, nobody asks: it is told within a moment, and the names are given back.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_stays_open_is_told_and_what_is_not_used_given_back() {
    let cluster = TestCluster::start(1).await;
    let other = cluster.fs("other").await;
    // What was written is not what makes it due.
    let config = Config { write_age_max: Duration::from_secs(3_600), ..Config::default() };
    let fs = FileSystem::new(&cluster.connect_with("maker", config).await);
    let (dir, name, file) = filling(&fs, "d").await;
    let begun = Instant::now();
    while fs.unnamed_files() > 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "it is never told");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Two turns later nothing is delegated any more: a look takes no time.
    tokio::time::sleep(Duration::from_millis(700)).await;
    let begun = Instant::now();
    other.lookup(dir, name.as_bytes()).await.expect("there");
    assert!(begun.elapsed() < Duration::from_millis(200), "{:?}", begun.elapsed());
    // The reserve goes as well: it would count as dirt of every node.
    let inodes = async || other.statfs().await.expect("counts").inodes;
    let begun = Instant::now();
    while inodes().await > 60 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{} inodes stay", inodes().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    close(&fs, &file).await;
    cluster.stop().await;
}

/// A session that ends takes along what it had not told; its user hears of it, and the name is free.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_a_session_had_not_told_goes_with_it_and_its_user_hears_of_it() {
    let cluster = TestCluster::start(1).await;
    let (fs, other) = (cluster.fs("maker").await, cluster.fs("other").await);
    let (dir, name, file) = filling(&fs, "d").await;
    fs.write(file.handle, 0, b"lost").await.expect("buffered");
    // As if it had expired: its client has not heard.
    cluster.end_session(fs.cluster().session()).await;
    let theirs = make(&other, dir, &name).await;
    close(&other, &theirs).await;
    let closed = fs.flush(file.handle).await;
    assert_eq!(closed.expect_err("it is gone").errno(), 116);
    let _ = fs.release(file.handle).await;
    assert_eq!(fs.unnamed_files(), 0);
    assert_eq!(fs.lookup(dir, name.as_bytes()).await.expect("theirs").inode, theirs.attr.inode);
    // And it goes on under another session.
    let (_, _, file) = filling(&fs, "e").await;
    close(&fs, &file).await;
    cluster.stop().await;
}

/// A file grows past what its reserve was granted, and is read back, before anybody else knows of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_file_without_a_name_is_written_and_read_like_any_other() {
    let cluster = TestCluster::start(1).await;
    let fs = cluster.fs("maker").await;
    let (_, _, file) = filling(&fs, "d").await;
    fs.write(file.handle, 0, &vec![7; 3 << 20]).await.expect("buffered");
    // Data goes to the nodes under the reserve's grant, past its first run under another.
    fs.write(file.handle, 20 << 20, &[8; 4096]).await.expect("buffered");
    assert_eq!(fs.read(file.handle, (20 << 20) - 10, 20).await.expect("read")[10], 8);
    close(&fs, &file).await;
    let seen = fs.getattr(file.attr.inode).await.expect("attributes");
    assert_eq!((seen.size, seen.nlink, seen.mode), ((20 << 20) + 4096, 1, 0o640));
    cluster.stop().await;
}
