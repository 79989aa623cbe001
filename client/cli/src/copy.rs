//! `ebb cp`: local files in and out, many at a time, like `cp -a` in what it keeps: modes, times,
//! symbolic links, and as root owners.

use crate::exit::CliError;
use ebb_client::{
    Advice, Attr, FileKind, FileSystem, InodeId, OpenFlags, Owner, SetAttr, Time, TimeChange,
};
use indicatif::ProgressBar;
use std::ffi::OsStr;
use std::future::Future;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Bytes read or written at a time.
const BLOCK_BYTES: usize = 1 << 20;
/// Files queued ahead of the workers.
const QUEUE_MAX: usize = 256;

/// What was copied.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Copied {
    /// Files and links.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Bytes.
    pub bytes: u64,
}

/// One side of a copy.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    /// On this machine.
    Local(PathBuf),
    /// In the file system.
    Ebb(Vec<u8>),
}

impl Place {
    /// `ebb:/path` or a local path.
    pub(crate) fn parse(text: &str) -> Self {
        match text.strip_prefix("ebb:") {
            Some(path) => Self::Ebb(path.as_bytes().to_vec()),
            None => Self::Local(PathBuf::from(text)),
        }
    }

    /// The last component, for `cp a/b dir/`.
    pub(crate) fn name(&self) -> Option<Vec<u8>> {
        match self {
            Self::Local(p) => {
                let p = p.canonicalize().unwrap_or_else(|_| p.clone());
                p.file_name().map(|n| n.as_bytes().to_vec())
            }
            Self::Ebb(p) => {
                let p = p.strip_suffix(b"/").unwrap_or(p);
                p.rsplit(|b| *b == b'/').next().filter(|n| !n.is_empty()).map(<[u8]>::to_vec)
            }
        }
    }

    /// This place with one more component.
    pub(crate) fn join(&self, name: &[u8]) -> Self {
        match self {
            Self::Local(p) => Self::Local(p.join(OsStr::from_bytes(name))),
            Self::Ebb(p) => {
                let mut p = p.strip_suffix(b"/").unwrap_or(p).to_vec();
                p.push(b'/');
                p.extend_from_slice(name);
                Self::Ebb(p)
            }
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local(p) => write!(f, "{}", p.display()),
            Self::Ebb(p) => write!(f, "ebb:{}", String::from_utf8_lossy(p)),
        }
    }
}

/// The copier: a file system, a bar, a limit on what is in flight.
pub(crate) struct Copier {
    fs: FileSystem,
    bar: ProgressBar,
    jobs: Arc<Semaphore>,
    tasks: JoinSet<Result<u64, CliError>>,
    copied: Copied,
    keep_owner: bool,
}

impl Copier {
    /// A copier of at most `jobs` files at once.
    pub(crate) fn new(fs: FileSystem, bar: ProgressBar, jobs: usize) -> Self {
        Self {
            fs,
            bar,
            jobs: Arc::new(Semaphore::new(jobs)),
            tasks: JoinSet::new(),
            copied: Copied::default(),
            keep_owner: nix::unistd::geteuid().is_root(),
        }
    }

    /// Copies one source to exactly `target`; directories only with `recursive`.
    pub(crate) async fn copy(
        mut self,
        source: &Place,
        target: &Place,
        recursive: bool,
    ) -> Result<Copied, CliError> {
        let result = match (source, target) {
            (Place::Local(s), Place::Ebb(t)) => self.inward(s, t, recursive).await,
            (Place::Ebb(s), Place::Local(t)) => self.outward(s, t, recursive).await,
            (Place::Local(_), Place::Local(_)) => {
                Err(CliError::usage("one side must be ebb:/path; for local copies use cp"))
            }
            (Place::Ebb(_), Place::Ebb(_)) => Err(CliError::usage(
                "copies inside the file system are not there yet: copy through a mount",
            )),
        };
        // Whatever was begun is finished before the outcome is told.
        let rest = self.drain(0).await;
        result?;
        rest?;
        Ok(self.copied)
    }

    async fn spawn<F>(&mut self, work: F) -> Result<(), CliError>
    where
        F: Future<Output = Result<u64, CliError>> + Send + 'static,
    {
        self.drain(QUEUE_MAX).await?;
        let jobs = Arc::clone(&self.jobs);
        let bar = self.bar.clone();
        self.tasks.spawn(async move {
            let _job = jobs.acquire_owned().await.map_err(|e| CliError::new(e.to_string()))?;
            let n = work.await?;
            bar.inc(0);
            Ok(n)
        });
        Ok(())
    }

    /// Waits until at most `left` files are in flight.
    async fn drain(&mut self, left: usize) -> Result<(), CliError> {
        while self.tasks.len() > left {
            match self.tasks.join_next().await {
                Some(Ok(Ok(bytes))) => {
                    self.copied.files += 1;
                    self.copied.bytes += bytes;
                }
                Some(Ok(Err(e))) => return Err(e),
                Some(Err(e)) => return Err(CliError::new(format!("a copy ended abruptly: {e}"))),
                None => {}
            }
        }
        Ok(())
    }

    // --- in ------------------------------------------------------------------

    async fn inward(
        &mut self,
        source: &Path,
        target: &[u8],
        recursive: bool,
    ) -> Result<(), CliError> {
        let failed = |e: std::io::Error| CliError::new(format!("{}: {e}", source.display()));
        let meta = std::fs::symlink_metadata(source).map_err(failed)?;
        if meta.is_dir() && !recursive {
            return Err(CliError::usage(format!(
                "{} is a directory: use --recursive",
                source.display()
            )));
        }
        let total = tree_bytes(source).map_err(failed)?;
        self.bar.set_length(total);
        let (parent, name) =
            self.fs.resolve_parent(target).await.map_err(|e| {
                CliError::new(format!("ebb:{}: {e}", String::from_utf8_lossy(target)))
            })?;
        self.entry_in(source.to_owned(), meta, parent.inode, name).await
    }

    fn entry_in(
        &mut self,
        source: PathBuf,
        meta: std::fs::Metadata,
        parent: InodeId,
        name: Vec<u8>,
    ) -> Pin<Box<dyn Future<Output = Result<(), CliError>> + Send + '_>> {
        Box::pin(async move {
            let keep_owner = self.keep_owner;
            let (fs, bar) = (self.fs.clone(), self.bar.clone());
            if meta.is_file() {
                return self
                    .spawn(async move {
                        file_in(&fs, &bar, &source, &meta, parent, &name, keep_owner).await
                    })
                    .await;
            }
            let failed = |e: String| CliError::new(format!("{}: {e}", source.display()));
            let owner = Owner { uid: meta.uid(), gid: meta.gid() };
            if meta.is_symlink() {
                let link = std::fs::read_link(&source).map_err(|e| failed(e.to_string()))?;
                replace_with_symlink(&fs, parent, &name, link.into_os_string().into_vec(), owner)
                    .await
                    .map_err(|e| failed(e.to_string()))?;
                self.copied.files += 1;
                return Ok(());
            }
            if !meta.is_dir() {
                return Err(failed(
                    "neither a file, a directory nor a symbolic link: left out".into(),
                ));
            }
            let dir = match fs.mkdir(parent, &name, meta.mode() & 0o7777, owner).await {
                Ok(attr) => attr.inode,
                Err(e) if e.errno() == nix::libc::EEXIST => {
                    fs.lookup(parent, &name).await.map_err(|e| failed(e.to_string()))?.inode
                }
                Err(e) => return Err(failed(e.to_string())),
            };
            self.copied.directories += 1;
            let entries = std::fs::read_dir(&source).map_err(|e| failed(e.to_string()))?;
            for entry in entries {
                let entry = entry.map_err(|e| failed(e.to_string()))?;
                let meta = entry.path().symlink_metadata().map_err(|e| failed(e.to_string()))?;
                self.entry_in(entry.path(), meta, dir, entry.file_name().into_vec()).await?;
            }
            // Its time is set when nothing is created in it any more.
            self.drain(0).await?;
            let set = attributes(&meta, keep_owner);
            fs.setattr(dir, set).await.map_err(|e| failed(e.to_string()))?;
            Ok(())
        })
    }

    // --- out -----------------------------------------------------------------

    async fn outward(
        &mut self,
        source: &[u8],
        target: &Path,
        recursive: bool,
    ) -> Result<(), CliError> {
        let shown = String::from_utf8_lossy(source).into_owned();
        let failed = |e: String| CliError::new(format!("ebb:{shown}: {e}"));
        let root = self.fs.resolve(source).await.map_err(|e| failed(e.to_string()))?;
        if root.kind == FileKind::Directory && !recursive {
            return Err(CliError::usage(format!("ebb:{shown} is a directory: use --recursive")));
        }
        let mut entries = Vec::new();
        self.fs
            .walk(source, |e| {
                entries.push(e);
                Ok(())
            })
            .await
            .map_err(|e| failed(e.to_string()))?;
        self.bar.set_length(
            entries.iter().filter(|e| e.attr.kind == FileKind::File).map(|e| e.attr.size).sum(),
        );
        let mut directories = Vec::new();
        for entry in entries {
            let path = if entry.path.is_empty() {
                target.to_owned()
            } else {
                target.join(OsStr::from_bytes(&entry.path))
            };
            let told = |e: std::io::Error| CliError::new(format!("{}: {e}", path.display()));
            let keep_owner = self.keep_owner;
            match entry.attr.kind {
                FileKind::Directory => {
                    match std::fs::create_dir(&path) {
                        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                        other => other.map_err(told)?,
                    }
                    self.copied.directories += 1;
                    directories.push((path, entry.attr));
                }
                FileKind::Symlink => {
                    let link = self
                        .fs
                        .readlink(entry.attr.inode)
                        .await
                        .map_err(|e| failed(e.to_string()))?;
                    let _ = std::fs::remove_file(&path);
                    std::os::unix::fs::symlink(OsStr::from_bytes(&link), &path).map_err(told)?;
                    self.copied.files += 1;
                }
                FileKind::File | FileKind::HardLink => {
                    let (fs, bar) = (self.fs.clone(), self.bar.clone());
                    self.spawn(
                        async move { file_out(&fs, &bar, &entry.attr, &path, keep_owner).await },
                    )
                    .await?;
                }
            }
        }
        self.drain(0).await?;
        for (path, attr) in directories.iter().rev() {
            apply_local(path, attr, self.keep_owner)
                .map_err(|e| CliError::new(format!("{}: {e}", path.display())))?;
        }
        Ok(())
    }
}

/// Bytes of all files below a path.
fn tree_bytes(path: &Path) -> std::io::Result<u64> {
    let meta = path.symlink_metadata()?;
    if !meta.is_dir() {
        return Ok(if meta.is_file() { meta.len() } else { 0 });
    }
    let mut sum = 0;
    for entry in std::fs::read_dir(path)? {
        sum += tree_bytes(&entry?.path())?;
    }
    Ok(sum)
}

fn attributes(meta: &std::fs::Metadata, keep_owner: bool) -> SetAttr {
    let time = |s: i64, ns: i64| {
        Some(TimeChange::At(Time(s.saturating_mul(1_000_000_000).saturating_add(ns))))
    };
    SetAttr {
        mode: Some(meta.mode() & 0o7777),
        uid: keep_owner.then(|| meta.uid()),
        gid: keep_owner.then(|| meta.gid()),
        size: None,
        atime: time(meta.atime(), meta.atime_nsec()),
        mtime: time(meta.mtime(), meta.mtime_nsec()),
    }
}

async fn file_in(
    fs: &FileSystem,
    bar: &ProgressBar,
    source: &Path,
    meta: &std::fs::Metadata,
    parent: InodeId,
    name: &[u8],
    keep_owner: bool,
) -> Result<u64, CliError> {
    use tokio::io::AsyncReadExt;
    let told = |e: &dyn std::fmt::Display| CliError::new(format!("{}: {e}", source.display()));
    let mut local = tokio::fs::File::open(source).await.map_err(|e| told(&e))?;
    let owner = Owner { uid: meta.uid(), gid: meta.gid() };
    let flags = OpenFlags { write: true, truncate: true, exclusive: false };
    let file =
        fs.create(parent, name, meta.mode() & 0o7777, owner, flags).await.map_err(|e| told(&e))?;
    let result: Result<u64, CliError> = async {
        let mut block = vec![0u8; BLOCK_BYTES.min(meta.len().max(1) as usize)];
        let mut at = 0u64;
        loop {
            let n = local.read(&mut block).await.map_err(|e| told(&e))?;
            if n == 0 {
                break;
            }
            fs.write(file.handle, at, &block[..n]).await.map_err(|e| told(&e))?;
            at += n as u64;
            bar.inc(n as u64);
        }
        // After the data, so that the times stay; they ride in the commit of the close.
        fs.setattr(file.attr.inode, attributes(meta, keep_owner)).await.map_err(|e| told(&e))?;
        fs.flush(file.handle).await.map_err(|e| told(&e))?;
        Ok(at)
    }
    .await;
    let released = fs.release(file.handle).await.map_err(|e| told(&e));
    let bytes = result?;
    released?;
    Ok(bytes)
}

async fn replace_with_symlink(
    fs: &FileSystem,
    parent: InodeId,
    name: &[u8],
    target: Vec<u8>,
    owner: Owner,
) -> ebb_client::Result<Attr> {
    match fs.symlink(parent, name, &target, owner).await {
        Err(e) if e.errno() == nix::libc::EEXIST => {
            fs.unlink(parent, name).await?;
            fs.symlink(parent, name, &target, owner).await
        }
        other => other,
    }
}

async fn file_out(
    fs: &FileSystem,
    bar: &ProgressBar,
    attr: &Attr,
    path: &Path,
    keep_owner: bool,
) -> Result<u64, CliError> {
    use tokio::io::AsyncWriteExt;
    let told = |e: &dyn std::fmt::Display| CliError::new(format!("{}: {e}", path.display()));
    let file = fs.open(attr.inode, OpenFlags::default()).await.map_err(|e| told(&e))?;
    let result: Result<u64, CliError> = async {
        fs.advise(file.handle, 0..attr.size, Advice::Sequential).map_err(|e| told(&e))?;
        let mut local = tokio::fs::File::create(path).await.map_err(|e| told(&e))?;
        let mut at = 0u64;
        loop {
            let block = fs.read(file.handle, at, BLOCK_BYTES as u64).await.map_err(|e| told(&e))?;
            if block.is_empty() {
                break;
            }
            local.write_all(&block).await.map_err(|e| told(&e))?;
            at += block.len() as u64;
            bar.inc(block.len() as u64);
        }
        local.flush().await.map_err(|e| told(&e))?;
        Ok(at)
    }
    .await;
    let released = fs.release(file.handle).await.map_err(|e| told(&e));
    let bytes = result?;
    released?;
    apply_local(path, attr, keep_owner).map_err(|e| told(&e))?;
    Ok(bytes)
}

/// Owner, mode and times of a local file, in the order that keeps set-id bits and times.
fn apply_local(path: &Path, attr: &Attr, keep_owner: bool) -> std::io::Result<()> {
    if keep_owner {
        std::os::unix::fs::chown(path, Some(attr.uid), Some(attr.gid))?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(attr.mode))?;
    let spec = |t: Time| {
        nix::sys::time::TimeSpec::new(t.0.div_euclid(1_000_000_000), t.0.rem_euclid(1_000_000_000))
    };
    nix::sys::stat::utimensat(
        nix::fcntl::AT_FDCWD,
        path,
        &spec(attr.atime),
        &spec(attr.mtime),
        nix::sys::stat::UtimensatFlags::NoFollowSymlink,
    )?;
    Ok(())
}
