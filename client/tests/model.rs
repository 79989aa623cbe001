//! Random calls through the file system against a plain model in memory: same answers, same errors,
//! same content in the end, also for a second client and after a flush to S3.

mod common;

use common::TestCluster;
use ebb_client::{
    Attr, ClientError, Config, FileHandle, FileKind, FileSystem, InodeId, OpenFlags, Owner, SetAttr,
};
use ebb_metaplane_protocol::op::RENAME_NOREPLACE;
use ebb_metaplane_protocol::{AdminCall, AdminReply};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::time::Duration;

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
const OWNER: Owner = Owner { uid: 7, gid: 8 };

/// A file's content and mode.
#[derive(Clone, Debug, Default)]
struct File {
    data: Vec<u8>,
    mode: u32,
}

#[derive(Clone, Debug)]
enum Node {
    File(usize),
    Dir(BTreeMap<String, Node>),
}

/// What the name space should be. Files live apart, so that unlinked open ones live on.
struct Model {
    root: BTreeMap<String, Node>,
    files: Vec<File>,
}

impl Model {
    fn dir(&mut self, at: Option<&str>) -> Option<&mut BTreeMap<String, Node>> {
        match at {
            None => Some(&mut self.root),
            Some(name) => match self.root.get_mut(name)? {
                Node::Dir(entries) => Some(entries),
                Node::File(_) => None,
            },
        }
    }
}

/// A file both sides have open.
struct Open {
    handle: FileHandle,
    inode: InodeId,
    file: usize,
}

struct Run {
    fs: FileSystem,
    model: Model,
    open: Vec<Open>,
    rng: StdRng,
    /// Inodes of the two directories, when they exist.
    dirs: BTreeMap<String, InodeId>,
}

fn errno<T>(result: &Result<T, ClientError>) -> i32 {
    result.as_ref().err().map_or(0, ClientError::errno)
}

impl Run {
    fn name(&mut self) -> &'static str {
        NAMES[self.rng.random_range(0..NAMES.len())]
    }

    /// A directory that exists: the root or one below.
    fn place(&mut self) -> (Option<String>, InodeId) {
        let n = self.dirs.len();
        match self.rng.random_range(0..=n) {
            0 => (None, InodeId::ROOT),
            i => {
                let (name, inode) = self.dirs.iter().nth(i - 1).expect("counted");
                (Some(name.clone()), *inode)
            }
        }
    }

    fn range(&mut self) -> (u64, usize) {
        // Around the borders of blocks, segments, chunks and runs.
        let border = [0u64, 4096, 64 << 10, 4 << 20, 16 << 20][self.rng.random_range(0..5)];
        let at =
            border.saturating_sub(self.rng.random_range(0..5000)) + self.rng.random_range(0..5000);
        (at, self.rng.random_range(1..200_000))
    }

    async fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..12 => self.create().await,
            12..40 => self.write().await,
            40..65 => self.read().await,
            65..70 => self.truncate().await,
            70..74 => self.close().await,
            74..78 => self.sync().await,
            78..82 => self.unlink().await,
            82..88 => self.rename().await,
            88..92 => self.mkdir_or_rmdir().await,
            92..95 => self.chmod().await,
            95..97 => self.list().await,
            _ => self.stat().await,
        }
    }

    async fn create(&mut self) {
        if self.open.len() >= 6 {
            return self.close().await;
        }
        let ((dir, parent), name) = (self.place(), self.name());
        let flags = OpenFlags {
            write: true,
            truncate: self.rng.random_bool(0.3),
            exclusive: self.rng.random_bool(0.3),
        };
        let got = self.fs.create(parent, name.as_bytes(), 0o640, OWNER, flags).await;
        let known = self.model.dir(dir.as_deref()).expect("a place").get(name).cloned();
        match known {
            Some(_) if flags.exclusive => assert_eq!(errno(&got), libc::EEXIST, "{name}"),
            Some(Node::Dir(_)) => assert_eq!(errno(&got), libc::EISDIR, "{name}"),
            Some(Node::File(file)) => {
                let got = got.expect("an existing file opens");
                assert!(!got.created);
                if flags.truncate {
                    self.model.files[file].data.clear();
                }
                self.check_attr(&got.attr, file);
                self.open.push(Open { handle: got.handle, inode: got.attr.inode, file });
            }
            None => {
                let got = got.expect("a new file");
                assert!(got.created);
                let file = self.model.files.len();
                self.model.files.push(File { data: Vec::new(), mode: 0o640 });
                let entries = self.model.dir(dir.as_deref()).expect("a place");
                entries.insert(name.to_owned(), Node::File(file));
                self.check_attr(&got.attr, file);
                self.open.push(Open { handle: got.handle, inode: got.attr.inode, file });
            }
        }
    }

    fn check_attr(&self, attr: &Attr, file: usize) {
        let model = &self.model.files[file];
        assert_eq!(attr.kind, FileKind::File);
        assert_eq!((attr.size, attr.mode), (model.data.len() as u64, model.mode));
        assert_eq!((attr.uid, attr.gid), (OWNER.uid, OWNER.gid));
    }

    fn any_open(&mut self) -> Option<(FileHandle, InodeId, usize)> {
        let n = self.open.len();
        (n > 0).then(|| {
            let o = &self.open[self.rng.random_range(0..n)];
            (o.handle, o.inode, o.file)
        })
    }

    async fn write(&mut self) {
        let Some((handle, _, file)) = self.any_open() else { return self.create().await };
        let (at, len) = self.range();
        let byte: u8 = self.rng.random();
        let data: Vec<u8> = (0..len).map(|i| byte.wrapping_add((i % 251) as u8)).collect();
        match self.fs.try_write(handle, at, &data).expect("an open file") {
            Some(unsent) => drop(unsent),
            None => self.fs.write(handle, at, &data).await.expect("a write"),
        }
        let model = &mut self.model.files[file].data;
        let end = at as usize + len;
        if model.len() < end {
            model.resize(end, 0);
        }
        model[at as usize..end].copy_from_slice(&data);
    }

    async fn read(&mut self) {
        let Some((handle, _, file)) = self.any_open() else { return };
        let (at, len) = self.range();
        // Now and then a stream, so that readahead has something to do.
        let turns = if self.rng.random_bool(0.1) { 12 } else { 1 };
        for turn in 0..turns {
            let at = at + turn * len as u64;
            let got = self.fs.read(handle, at, len as u64).await.expect("a read");
            let model = &self.model.files[file].data;
            let start = (at as usize).min(model.len());
            let end = (at as usize + len).min(model.len());
            let same = got == model[start..end];
            assert!(same, "read of {at}+{len} of file {file}: {} bytes", got.len());
        }
    }

    async fn truncate(&mut self) {
        let Some((_, inode, file)) = self.any_open() else { return };
        let (at, _) = self.range();
        let set = SetAttr { size: Some(at), ..SetAttr::default() };
        let attr = self.fs.setattr(inode, set).await.expect("a truncate");
        self.model.files[file].data.resize(at as usize, 0);
        self.check_attr(&attr, file);
    }

    async fn close(&mut self) {
        if self.open.is_empty() {
            return;
        }
        let i = self.rng.random_range(0..self.open.len());
        let o = self.open.swap_remove(i);
        self.fs.flush(o.handle).await.expect("a flush");
        self.fs.release(o.handle).await.expect("a release");
    }

    async fn sync(&mut self) {
        let Some((handle, _, _)) = self.any_open() else { return };
        self.fs.fsync(handle).await.expect("an fsync");
    }

    async fn unlink(&mut self) {
        let ((dir, parent), name) = (self.place(), self.name());
        let got = self.fs.unlink(parent, name.as_bytes()).await;
        let entries = self.model.dir(dir.as_deref()).expect("a place");
        match entries.get(name) {
            None => assert_eq!(errno(&got), libc::ENOENT),
            Some(Node::Dir(_)) => assert_eq!(errno(&got), libc::EISDIR),
            Some(Node::File(_)) => {
                got.expect("an unlink");
                entries.remove(name);
            }
        }
    }

    async fn rename(&mut self) {
        let ((from_dir, from), name) = (self.place(), self.name());
        let ((to_dir, to), new_name) = (self.place(), self.name());
        let flags = if self.rng.random_bool(0.2) { RENAME_NOREPLACE } else { 0 };
        let source = self.model.dir(from_dir.as_deref()).expect("a place").get(name).cloned();
        let target = self.model.dir(to_dir.as_deref()).expect("a place").get(new_name).cloned();
        // Directories stay at the top: the model has two levels.
        if matches!(source, Some(Node::Dir(_))) || matches!(target, Some(Node::Dir(_))) {
            return;
        }
        let got = self.fs.rename(from, name.as_bytes(), to, new_name.as_bytes(), flags).await;
        match (source, target) {
            (None, _) => assert_eq!(errno(&got), libc::ENOENT),
            (Some(_), Some(_)) if flags != 0 => assert_eq!(errno(&got), libc::EEXIST),
            (Some(node), _) => {
                got.expect("a rename");
                self.model.dir(from_dir.as_deref()).expect("a place").remove(name);
                let entries = self.model.dir(to_dir.as_deref()).expect("a place");
                entries.insert(new_name.to_owned(), node);
            }
        }
    }

    async fn mkdir_or_rmdir(&mut self) {
        let name = self.name();
        if self.rng.random_bool(0.6) {
            let got = self.fs.mkdir(InodeId::ROOT, name.as_bytes(), 0o755, OWNER).await;
            if self.model.root.contains_key(name) {
                assert_eq!(errno(&got), libc::EEXIST);
            } else {
                let attr = got.expect("a mkdir");
                self.model.root.insert(name.to_owned(), Node::Dir(BTreeMap::new()));
                self.dirs.insert(name.to_owned(), attr.inode);
            }
            return;
        }
        let got = self.fs.rmdir(InodeId::ROOT, name.as_bytes()).await;
        match self.model.root.get(name) {
            None => assert_eq!(errno(&got), libc::ENOENT),
            Some(Node::File(_)) => assert_eq!(errno(&got), libc::ENOTDIR),
            Some(Node::Dir(entries)) if !entries.is_empty() => {
                assert_eq!(errno(&got), libc::ENOTEMPTY);
            }
            Some(Node::Dir(_)) => {
                got.expect("an rmdir");
                self.model.root.remove(name);
                self.dirs.remove(name);
            }
        }
    }

    async fn chmod(&mut self) {
        let Some((_, inode, file)) = self.any_open() else { return };
        let mode = self.rng.random_range(0..0o1000);
        let set = SetAttr { mode: Some(mode), ..SetAttr::default() };
        let attr = self.fs.setattr(inode, set).await.expect("a chmod");
        self.model.files[file].mode = mode;
        self.check_attr(&attr, file);
    }

    async fn stat(&mut self) {
        let Some((_, inode, file)) = self.any_open() else { return };
        let attr = self.fs.getattr(inode).await.expect("a stat");
        self.check_attr(&attr, file);
    }

    async fn list(&mut self) {
        let (dir, inode) = self.place();
        let got = self.fs.list(inode).await.expect("a listing");
        let entries = self.model.dir(dir.as_deref()).expect("a place");
        let names: Vec<_> =
            got.iter().map(|e| String::from_utf8_lossy(&e.name).into_owned()).collect();
        assert_eq!(names, entries.keys().cloned().collect::<Vec<_>>());
    }

    /// Another client sees exactly the model.
    async fn compare(&mut self, other: &FileSystem, when: &str) {
        let mut found: BTreeMap<String, Attr> = BTreeMap::new();
        let walked = other.walk(b"/", |e| {
            found.insert(String::from_utf8_lossy(&e.path).into_owned(), e.attr);
            Ok(())
        });
        walked.await.expect("a walk");
        let mut wanted = vec![String::new()];
        let mut files = Vec::new();
        for (name, node) in &self.model.root {
            wanted.push(name.clone());
            match node {
                Node::File(file) => files.push((name.clone(), *file)),
                Node::Dir(entries) => {
                    for (below, node) in entries {
                        let path = format!("{name}/{below}");
                        wanted.push(path.clone());
                        if let Node::File(file) = node {
                            files.push((path, *file));
                        }
                    }
                }
            }
        }
        assert_eq!(found.keys().cloned().collect::<Vec<_>>(), {
            wanted.sort();
            wanted
        });
        for (path, file) in files {
            self.check_attr(&found[&path], file);
            let bytes = other.read_file(path.as_bytes()).await.expect("a file");
            assert!(bytes == self.model.files[file].data, "{path} differs {when}");
        }
    }
}

async fn run(cluster: &TestCluster, seed: u64, steps: usize, config: Config) {
    println!("seed {seed}");
    let fs = FileSystem::new(&cluster.connect_with(&format!("model {seed}"), config).await);
    let dir = format!("seed{seed}");
    // Each seed starts from an empty name space.
    for entry in fs.list(InodeId::ROOT).await.expect("the root") {
        remove(&fs, InodeId::ROOT, &entry.name, &entry.attr).await;
    }
    let model = Model { root: BTreeMap::new(), files: Vec::new() };
    let rng = StdRng::seed_from_u64(seed);
    let mut run = Run { fs, model, open: Vec::new(), rng, dirs: BTreeMap::new() };
    for _ in 0..steps {
        run.step().await;
    }
    while !run.open.is_empty() {
        run.close().await;
    }
    assert_eq!(run.fs.held_bytes().0, 0, "nothing is left in the write buffer of {dir}");
    let other = cluster.fs("model, other").await;
    run.compare(&other, "after close").await;
    let call = AdminCall::Flush { inode: InodeId::ROOT, wait: true };
    match other.cluster().admin(call, Duration::from_secs(60)).await.expect("a flush") {
        AdminReply::Flushed(report) => assert_eq!(report.remaining, 0, "{report:?}"),
        other => panic!("an odd answer: {other:?}"),
    }
    let evict = AdminCall::Evict { inode: InodeId::ROOT };
    other.cluster().admin(evict, Duration::from_secs(60)).await.expect("an evict");
    run.compare(&other, "after flush and evict").await;
    other.close().await.expect("the other session ends");
    run.fs.close().await.expect("the session ends");
}

async fn remove(fs: &FileSystem, parent: InodeId, name: &[u8], attr: &Attr) {
    if attr.kind != FileKind::Directory {
        return fs.unlink(parent, name).await.expect("an unlink");
    }
    for entry in fs.list(attr.inode).await.expect("a listing") {
        Box::pin(remove(fs, attr.inode, &entry.name, &entry.attr)).await;
    }
    fs.rmdir(parent, name).await.expect("an rmdir");
}

/// Buffers so small that every limit is met.
fn tight() -> Config {
    Config {
        write_buffer_bytes: 256 << 10,
        segment_bytes: 64 << 10,
        write_window: 3,
        write_age_max: Duration::from_millis(300),
        read_cache_bytes: 256 << 10,
        read_block_bytes: 64 << 10,
        read_window_bytes: 256 << 10,
        ..Config::default()
    }
}

/// Seeds of a run; EBB_SEED picks one, EBB_SEEDS says how many from 0.
fn seeds(default: u64) -> Vec<u64> {
    let number = |name| std::env::var(name).ok().and_then(|s| s.parse::<u64>().ok());
    match number("EBB_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("EBB_SEEDS").unwrap_or(default)).collect(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn random_calls_answer_as_the_model_does() {
    let cluster = TestCluster::start(2).await;
    for seed in seeds(4) {
        let config = if seed % 2 == 0 { tight() } else { Config::default() };
        run(&cluster, seed, 250, config).await;
    }
    cluster.stop().await;
}
