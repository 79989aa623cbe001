//! Real mounts of a real cluster: what `docs/SEMANTICS.md` says, seen through system calls.

#[path = "../../tests/common/mod.rs"]
mod common;

use common::TestCluster;
use ebb_fuse::{MountConfig, MountError, mount};
use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};
use nix::sys::statvfs::statvfs;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{
    FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, fchown, symlink,
};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Whether this machine lets us mount; says why not.
fn can_mount() -> bool {
    if !Path::new("/dev/fuse").exists() {
        println!("skipped: /dev/fuse is absent");
        return false;
    }
    if !nix::unistd::geteuid().is_root() && Command::new("fusermount3").arg("-V").output().is_err()
    {
        println!("skipped: not root, and fusermount3 is absent");
        return false;
    }
    true
}

struct Mounted {
    path: PathBuf,
    stop: oneshot::Sender<()>,
    served: JoinHandle<Result<(), MountError>>,
}

impl Mounted {
    async fn new(cluster: &TestCluster, name: &str) -> Self {
        let path = cluster.path(name);
        fs::create_dir(&path).expect("a mount point");
        let mut config = MountConfig::new(cluster.fs(name).await, &path);
        // Close-to-open is promised whatever the kernel caches; names are to show at once.
        config.entry_ttl = Duration::ZERO;
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(mount(config, async {
            let _ = stopped.await;
        }));
        let device = fs::metadata(cluster.dir()).expect("the directory").dev();
        let probe = path.clone();
        common::until("the mount appears", || {
            let probe = probe.clone();
            async move {
                let there = tokio::task::spawn_blocking(move || {
                    fs::metadata(&probe).is_ok_and(|m| m.dev() != device)
                });
                there.await.expect("no panic").then_some(())
            }
        })
        .await;
        Self { path, stop, served }
    }

    async fn stop(self) {
        let _ = self.stop.send(());
        self.served.await.expect("no panic").expect("a clean end");
    }
}

/// Blocking calls belong on a thread of their own.
async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(f).await.expect("no panic")
}

fn code<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.expect_err("an error").raw_os_error().expect("of the system")
}

fn everyday(m: &Path) {
    fs::create_dir_all(m.join("d/e")).expect("mkdir");
    fs::write(m.join("d/f"), "hello").expect("write");
    let mut create = OpenOptions::new();
    create.read(true).write(true).create_new(true).mode(0o640);
    let mut x = create.open(m.join("x")).expect("create");
    assert_eq!(x.metadata().expect("fstat").mode() & 0o7777, 0o640);
    assert_eq!(code(create.open(m.join("x"))), libc::EEXIST);
    x.write_all(b"0123456789").expect("write");
    fs::remove_file(m.join("x")).expect("unlink");
    let mut ten = [0; 10];
    x.read_exact_at(&mut ten, 0).expect("an unlinked open file lives on");
    assert_eq!(&ten, b"0123456789");
    x.write_all(b"more").expect("and grows");
    x.sync_all().expect("fsync");
    assert_eq!(x.metadata().expect("fstat").size(), 14);
    assert_eq!(code(fs::metadata(m.join("x"))), libc::ENOENT);
    drop(x);

    for part in ["one", "two"] {
        let mut f = OpenOptions::new()
            .append(true)
            .create(true)
            .open(m.join("app"))
            .expect("open for append");
        f.write_all(part.as_bytes()).expect("append");
    }
    assert_eq!(fs::read(m.join("app")).expect("read"), b"onetwo");
    let f = OpenOptions::new().write(true).open(m.join("app")).expect("open");
    f.set_len(2).expect("truncate");
    f.set_len(5).expect("extend");
    assert_eq!(fs::read(m.join("app")).expect("read"), b"on\0\0\0");
    drop(f);
    File::create(m.join("app")).expect("O_TRUNC");
    assert_eq!(fs::metadata(m.join("app")).expect("stat").size(), 0);

    assert_eq!(code(fs::remove_dir(m.join("d"))), libc::ENOTEMPTY);
    assert_eq!(code(fs::remove_file(m.join("d"))), libc::EISDIR);
    assert_eq!(code(fs::metadata(m.join("d/f/g"))), libc::ENOTDIR);
    assert_eq!(code(fs::metadata(m.join("n".repeat(256)))), libc::ENAMETOOLONG);
    fs::write(m.join("n".repeat(255)), "long").expect("NAME_MAX bytes of name");
    fs::remove_file(m.join("n".repeat(255))).expect("unlink");
}

fn names(m: &Path) {
    symlink("d/f", m.join("s")).expect("symlink");
    assert_eq!(fs::read_link(m.join("s")).expect("readlink"), Path::new("d/f"));
    assert_eq!(fs::read(m.join("s")).expect("read"), b"hello");
    assert_eq!(fs::symlink_metadata(m.join("s")).expect("lstat").size(), 3);
    fs::hard_link(m.join("d/f"), m.join("h")).expect("another name");
    assert_eq!(fs::metadata(m.join("h")).expect("there").nlink(), 2);
    assert_eq!(code(fs::hard_link(m.join("d/f"), m.join("h"))), libc::EEXIST);
    assert_eq!(code(fs::hard_link(m.join("d"), m.join("e"))), libc::EPERM);
    fs::remove_file(m.join("h")).expect("removed");

    let no_replace = |a: &str, b: &str| {
        renameat2(AT_FDCWD, &m.join(a), AT_FDCWD, &m.join(b), RenameFlags::RENAME_NOREPLACE)
    };
    assert_eq!(no_replace("d/f", "app"), Err(nix::errno::Errno::EEXIST));
    fs::rename(m.join("d/f"), m.join("app")).expect("rename over a file");
    assert_eq!(fs::read(m.join("app")).expect("read"), b"hello");
    fs::rename(m.join("d"), m.join("d2")).expect("rename a directory");
    assert_eq!(code(fs::rename(m.join("d2"), m.join("d2/e/x"))), libc::EINVAL);
    let mut seen: Vec<_> = fs::read_dir(m)
        .expect("readdir")
        .map(|e| e.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    seen.sort();
    assert_eq!(seen, ["app", "d2", "s"]);
    // The raw listing names itself and its parent, with the right inodes.
    let listing = Command::new("ls").arg("-1aiU").arg(m.join("d2")).output().expect("ls");
    let dots: Vec<(String, u64)> = String::from_utf8_lossy(&listing.stdout)
        .lines()
        .filter_map(|line| line.trim().split_once(' '))
        .map(|(ino, name)| (name.to_owned(), ino.parse().expect("a number")))
        .filter(|(name, _)| name.starts_with('.'))
        .collect();
    let ino = |p: &str| fs::metadata(m.join(p)).expect("stat").ino();
    assert_eq!(dots, [(".".to_owned(), ino("d2")), ("..".to_owned(), ino(""))]);
}

fn attributes(m: &Path) {
    let app = m.join("app");
    fs::set_permissions(&app, PermissionsExt::from_mode(0o4711)).expect("chmod");
    assert_eq!(fs::metadata(&app).expect("stat").mode() & 0o7777, 0o4711);
    let then = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_007, 123_456_789);
    let f = OpenOptions::new().write(true).open(&app).expect("open");
    f.write_all_at(b"J", 0).expect("write");
    // A time set after a write stays, also past the close (tar, cp -p).
    f.set_times(fs::FileTimes::new().set_modified(then).set_accessed(then)).expect("utimens");
    drop(f);
    let seen = fs::metadata(&app).expect("stat");
    assert_eq!(seen.modified().expect("mtime"), then);
    assert_eq!(seen.accessed().expect("atime"), then);
    assert_eq!(fs::read(&app).expect("read"), b"Jello");
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(&app, Some(12), Some(34)).expect("chown");
        let seen = fs::metadata(&app).expect("stat");
        assert_eq!((seen.uid(), seen.gid()), (12, 34));
    }
    let space = statvfs(m).expect("statfs");
    assert!(space.blocks_free() > 0 && space.name_max() == 255);
    let f = OpenOptions::new().write(true).open(&app).expect("open");
    fallocate(&f, FallocateFlags::empty(), 0, 100).expect("extension");
    assert_eq!(f.metadata().expect("fstat").size(), 100);
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert_eq!(fallocate(&f, punch, 0, 10), Err(nix::errno::Errno::EOPNOTSUPP));
    let xattr = Command::new("python3")
        .arg("-c")
        .arg("import os,sys\nos.setxattr(sys.argv[1],'user.a',b'b')\nsys.exit(os.getxattr(sys.argv[1],'user.a')!=b'b')")
        .arg(&app)
        .status();
    if let Ok(status) = xattr {
        assert!(status.success(), "an extended attribute is kept");
    }
}

/// Random positions of one open file, against a file on the local disk.
fn random_io(m: &Path, local: &Path) {
    use rand::{Rng, SeedableRng};
    for seed in 0..3u64 {
        let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
        let open = |p: PathBuf| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open(p)
                .expect("open")
        };
        let (a, b) = (open(m.join("random")), open(local.join(format!("random{seed}"))));
        for _ in 0..200 {
            let at = rng.random_range(0..9_000_000u64);
            let len = rng.random_range(1..200_000usize);
            match rng.random_range(0..10) {
                0..5 => {
                    let data: Vec<u8> =
                        (0..len).map(|i| (i as u8).wrapping_add(at as u8)).collect();
                    a.write_all_at(&data, at).expect("write");
                    b.write_all_at(&data, at).expect("write");
                }
                5 => {
                    a.set_len(at).expect("truncate");
                    b.set_len(at).expect("truncate");
                }
                6 => a.sync_all().expect("fsync"),
                _ => {
                    let (mut got, mut want) = (vec![0; len], vec![0; len]);
                    let n = a.read_at(&mut got, at).expect("read");
                    let k = b.read_at(&mut want, at).expect("read");
                    assert!(n == k && got == want, "seed {seed}: read of {at}+{len}");
                }
            }
        }
        drop(a);
        let (a, b) = (fs::read(m.join("random")), fs::read(local.join(format!("random{seed}"))));
        assert!(a.expect("read") == b.expect("read"), "seed {seed}: after close");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn calls_answer_as_posix_says() {
    if !can_mount() {
        return;
    }
    let cluster = TestCluster::start(1).await;
    let mounted = Mounted::new(&cluster, "m").await;
    let (m, local) = (mounted.path.clone(), cluster.dir().to_owned());
    blocking(move || {
        everyday(&m);
        names(&m);
        attributes(&m);
        random_io(&m, &local);
    })
    .await;
    mounted.stop().await;
    cluster.stop().await;
}

/// What a process of another user does to a file: its shell's exit code.
fn as_user(user: u32, script: &str, path: &Path) -> Option<i32> {
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(script).arg("sh").arg(path).current_dir("/").uid(user).gid(user);
    shell.status().expect("a shell").code()
}

fn privileges(m: &Path) {
    const USER: u32 = 1000;
    let path = m.join("privileged");
    let set = |mode: u32| {
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("chmod");
    };
    let mode = || fs::metadata(&path).expect("stat").mode() & 0o7777;
    let f = File::create(&path).expect("create");
    // Of a file just made, changes are gathered; their order counts.
    f.set_permissions(Permissions::from_mode(0o6755)).expect("fchmod");
    fchown(&f, Some(USER), Some(USER)).expect("fchown");
    assert_eq!(mode(), 0o755, "a new owner ends them");
    f.set_permissions(Permissions::from_mode(0o6755)).expect("fchmod");
    (&f).write_all(b"by root").expect("write");
    drop(f);
    assert_eq!(mode(), 0o6755, "set after the owner, and root may write");
    chown(&path, Some(USER), None).expect("chown");
    assert_eq!(mode(), 0o755, "also of a file that nobody writes");

    for script in ["echo more >>\"$1\"", ": >\"$1\"", "truncate -s 3 \"$1\""] {
        set(0o6755);
        assert_eq!(as_user(USER, script, &path), Some(0), "{script}");
        assert_eq!(mode(), 0o755, "{script}");
    }
    set(0o6755);
    OpenOptions::new().write(true).truncate(true).open(&path).expect("O_TRUNC by root");
    assert_eq!(mode(), 0o6755);
    set(0o2745);
    chown(&path, Some(USER), None).expect("chown");
    assert_eq!(mode(), 0o2745, "without x for the group the bit is of another meaning");
    let dir = m.join("shared");
    fs::create_dir(&dir).expect("mkdir");
    fs::set_permissions(&dir, Permissions::from_mode(0o2775)).expect("chmod");
    chown(&dir, Some(USER), None).expect("chown");
    assert_eq!(fs::metadata(&dir).expect("stat").mode() & 0o7777, 0o2775, "of files only");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn set_user_id_ends_as_linux_has_it() {
    if !can_mount() || !nix::unistd::geteuid().is_root() {
        return;
    }
    let cluster = TestCluster::start(1).await;
    // A user's process has to get there.
    fs::set_permissions(cluster.dir(), Permissions::from_mode(0o755)).expect("chmod");
    let mounted = Mounted::new(&cluster, "m").await;
    let m = mounted.path.clone();
    fs::set_permissions(&m, Permissions::from_mode(0o777)).expect("chmod");
    blocking(move || privileges(&m)).await;
    mounted.stop().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn two_mounts_are_close_to_open_consistent() {
    if !can_mount() {
        return;
    }
    let cluster = TestCluster::start(2).await;
    let (a, b) = (Mounted::new(&cluster, "a").await, Mounted::new(&cluster, "b").await);
    let (pa, pb) = (a.path.clone(), b.path.clone());
    blocking(move || {
        let mut held = None;
        for round in 0..20u32 {
            let text = format!("round {round} {}", "x".repeat(round as usize * 1000));
            fs::write(pa.join("f"), &text).expect("write");
            assert_eq!(fs::read_to_string(pb.join("f")).expect("read"), text, "round {round}");
            // The same length again: only the times tell.
            let other = text.replace('x', "y").replace("round", "ROUND");
            fs::write(pb.join("f"), &other).expect("write");
            assert_eq!(fs::read_to_string(pa.join("f")).expect("read"), other, "round {round}");
            held.get_or_insert_with(|| File::open(pb.join("f")).expect("open"));
        }
        // Append on one side, read through a descriptor opened afterwards on the other.
        let mut f = OpenOptions::new().append(true).open(pa.join("f")).expect("open");
        f.write_all(b"tail").expect("append");
        f.sync_all().expect("fsync");
        let mut g = File::open(pb.join("f")).expect("open");
        g.seek(SeekFrom::End(-4)).expect("seek");
        let mut tail = String::new();
        g.read_to_string(&mut tail).expect("read");
        assert_eq!(tail, "tail");
        // Names.
        fs::create_dir(pa.join("dir")).expect("mkdir");
        fs::rename(pb.join("f"), pb.join("dir/g")).expect("rename");
        assert_eq!(fs::metadata(pa.join("f")).expect_err("gone").kind(), ErrorKind::NotFound);
        assert!(fs::metadata(pa.join("dir/g")).is_ok());
    })
    .await;
    a.stop().await;
    b.stop().await;
    cluster.stop().await;
}

/// A file is there for everybody as soon as its create has returned, also while its maker alone has
/// been adding names there, and has it open.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_new_file_is_there_for_another_mount_while_it_is_open() {
    if !can_mount() {
        return;
    }
    let cluster = TestCluster::start(2).await;
    let (a, b) = (Mounted::new(&cluster, "a").await, Mounted::new(&cluster, "b").await);
    let (pa, pb) = (a.path.clone(), b.path.clone());
    blocking(move || {
        for round in 0..8 {
            let (da, db) = (pa.join(format!("d{round}")), pb.join(format!("d{round}")));
            fs::create_dir(&da).expect("mkdir");
            for n in 0..20 {
                fs::write(da.join(format!("n{n}")), "x").expect("write");
            }
            let mut lock = File::create_new(da.join("lock")).expect("the first");
            let before = fs::metadata(&da).expect("stat").modified().expect("a time");
            match round % 4 {
                0 => {
                    let second = File::create_new(db.join("lock")).expect_err("it is taken");
                    assert_eq!(second.kind(), ErrorKind::AlreadyExists);
                }
                1 => assert!(fs::metadata(db.join("lock")).is_ok()),
                2 => assert_eq!(fs::read_dir(&db).expect("readdir").count(), 21),
                _ => {
                    File::open(&da).expect("open").sync_all().expect("fsync of the directory");
                    fs::remove_file(db.join("lock")).expect("unlink");
                }
            }
            lock.write_all(b"mine").expect("write");
            let after = fs::metadata(&da).expect("stat").modified().expect("a time");
            assert!(after >= before || round % 4 == 3, "round {round}: {before:?} {after:?}");
            drop(lock);
            if round % 4 != 3 {
                assert_eq!(fs::read(db.join("lock")).expect("read"), b"mine");
            }
            fs::remove_dir_all(&da).expect("rm -r");
        }
    })
    .await;
    a.stop().await;
    b.stop().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn trees_are_unpacked_listed_and_removed() {
    if !can_mount() {
        return;
    }
    let cluster = TestCluster::start(2).await;
    let mounted = Mounted::new(&cluster, "m").await;
    let (m, local) = (mounted.path.clone(), cluster.path("tree"));
    blocking(move || {
        // One directory longer than a page, and a few levels.
        for i in 0..1500 {
            let dir = local.join(if i < 1100 { "flat".into() } else { format!("d{}/e", i % 7) });
            fs::create_dir_all(&dir).expect("mkdir");
            fs::write(dir.join(format!("file{i}")), "content ".repeat(i % 600)).expect("write");
        }
        let tar = local.with_extension("tar");
        let run = |program: &str, args: &[&Path]| {
            let out = Command::new(program).args(args).output().expect("it runs");
            let said = String::from_utf8_lossy(&out.stderr).into_owned()
                + &String::from_utf8_lossy(&out.stdout);
            assert!(out.status.success(), "{program}: {said}");
        };
        let flag = Path::new;
        run("tar", &[flag("-cf"), &tar, flag("-C"), &local, flag(".")]);
        let to = m.join("tree");
        fs::create_dir(&to).expect("mkdir");
        let began = std::time::Instant::now();
        run("tar", &[flag("-xf"), &tar, flag("-C"), &to]);
        println!("untar of 1500 files: {:?}", began.elapsed());
        run("diff", &[flag("-r"), &local, &to]);
        assert_eq!(fs::read_dir(to.join("flat")).expect("readdir").count(), 1100);
        let (a, b) = (local.join("flat/file7"), to.join("flat/file7"));
        let times = [a, b].map(|p| fs::metadata(p).expect("stat").mtime());
        assert_eq!(times[0], times[1], "tar keeps times");
        fs::remove_dir_all(&to).expect("rm -r, listing while removing");
        assert_eq!(fs::read_dir(&m).expect("readdir").count(), 0);
    })
    .await;
    mounted.stop().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn mounts_end_cleanly_and_bad_mount_points_are_named() {
    if !can_mount() {
        return;
    }
    let cluster = TestCluster::start(1).await;
    let fs_ = cluster.fs("bad").await;
    let try_at = |path: PathBuf| mount(MountConfig::new(fs_.clone(), path), std::future::pending());
    assert!(matches!(try_at(cluster.path("absent")).await, Err(MountError::Missing(_))));
    let file = cluster.path("file");
    fs::write(&file, "x").expect("write");
    assert!(matches!(try_at(file).await, Err(MountError::NotDirectory(_))));
    let mounted = Mounted::new(&cluster, "m").await;
    assert!(matches!(try_at(mounted.path.clone()).await, Err(MountError::AlreadyMounted { .. })));

    // Somebody else unmounts: the server ends by itself, and what was written is there.
    let path = mounted.path.clone();
    blocking(move || {
        fs::write(path.join("kept"), "kept").expect("write");
        ebb_fuse::unmount(&path).expect("unmount");
    })
    .await;
    mounted.served.await.expect("no panic").expect("a clean end");
    assert_eq!(&fs_.read_file(b"kept").await.expect("read")[..], b"kept");

    // A stop while a file is open and unflushed: detached, flushed, gone from the tree.
    let mounted = Mounted::new(&cluster, "n").await;
    let path = mounted.path.join("open");
    let open = blocking(move || {
        let mut f = File::create(path).expect("create");
        f.write_all(b"not closed").expect("write");
        f
    })
    .await;
    let at = mounted.path.clone();
    let _ = mounted.stop.send(());
    common::until("the data is flushed", || async {
        let bytes = fs_.read_file(b"open").await.ok()?;
        (&bytes[..] == b"not closed").then_some(())
    })
    .await;
    common::until("the mount is gone", || async {
        (fs::read_dir(&at).ok()?.count() == 0).then_some(())
    })
    .await;
    blocking(move || drop(open)).await;
    mounted.served.await.expect("no panic").expect("a clean end");
    cluster.stop().await;
}

/// The last close of a mount that was already detached ends the connection while its RELEASE is on
/// the way: a thread that takes a request in that moment is told ECONNABORTED. A clean end, always.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_last_close_after_an_unmount_is_a_clean_end() {
    if !can_mount() {
        return;
    }
    let cluster = TestCluster::start(1).await;
    for round in 0..60 {
        let mounted = Mounted::new(&cluster, &format!("m{round}")).await;
        let path = mounted.path.clone();
        let open = blocking(move || {
            let create = |n| File::create(path.join(format!("{round}-{n}"))).expect("create");
            let files: Vec<File> = (0..8).map(create).collect();
            ebb_fuse::unmount(&path).expect("unmount");
            files
        })
        .await;
        blocking(move || drop(open)).await;
        mounted.served.await.expect("no panic").expect("a clean end");
    }
    cluster.stop().await;
}
