//! The kernel's requests, one function each.

use crate::convert::{attr, errno, inode, kind, open_flags, set_attr};
use crate::directory::{DirStream, fill};
use crate::known::Known;
use crate::locks::lock;
use crate::mount::MountConfig;
use crate::telling::Telling;
use ebb_client::{Attr, FileHandle, FileKind, FileSystem, OpenFlags, OpenedFile, Owner, Result};
use fuser::{
    BsdFileFlags, Errno, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, Notifier, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLock, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::runtime::Handle;

/// Largest write request, and readahead we would like.
const REQUEST_BYTES: u32 = 1 << 20;
/// Requests of readahead and such in flight at once.
const BACKGROUND_MAX: u16 = 64;
/// What `df` shows as free: S3 has no size.
const FREE_BYTES: u64 = 1 << 50;
const STATFS_BLOCK: u32 = 4096;
/// Inode ids are never reused, so the kernel needs no generation to tell them apart.
const NEVER_REUSED: Generation = Generation(0);

type Streams = HashMap<u64, Arc<tokio::sync::Mutex<DirStream>>>;

/// The file system as the kernel sees it.
pub(crate) struct Shim {
    pub(crate) shared: Arc<Shared>,
    runtime: Handle,
}

pub(crate) struct Shared {
    pub(crate) fs: FileSystem,
    pub(crate) known: Known,
    streams: Mutex<Streams>,
    next_stream: AtomicU64,
    pub(crate) attr_ttl: Duration,
    entry_ttl: Duration,
    local_locks: bool,
    pub(crate) telling: Telling,
}

impl Shared {
    fn streams(&self) -> std::sync::MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For replies with one lifetime for the name and the attributes.
    fn shorter_ttl(&self) -> Duration {
        self.attr_ttl.min(self.entry_ttl)
    }

    fn entry(&self, what: &str, result: Result<Attr>, reply: ReplyEntry) {
        match result {
            Ok(a) => {
                self.known.told(&a);
                let told = self.telling.tell(&a);
                reply.entry_with_ttls(&told.ttl, &self.entry_ttl, &attr(&a), NEVER_REUSED);
                self.telling.told(told, a.inode);
            }
            Err(e) => reply.error(errno(what, &e)),
        }
    }

    fn attributes(&self, what: &str, result: Result<Attr>, reply: ReplyAttr) {
        match result {
            Ok(a) => {
                self.known.told(&a);
                let told = self.telling.tell(&a);
                reply.attr(&told.ttl, &attr(&a));
                self.telling.told(told, a.inode);
            }
            Err(e) => reply.error(errno(what, &e)),
        }
    }

    /// A file that was opened, and truncated by somebody who ends its privileges by that.
    async fn opened(&self, file: Result<OpenedFile>, ends_privileges: bool) -> Result<OpenedFile> {
        let mut file = file?;
        if !ends_privileges || file.created {
            return Ok(file);
        }
        let mode = file.attr.mode;
        match self.fs.end_privileges(file.attr).await {
            Ok(attr) => file.attr = attr,
            Err(e) => {
                // The caller gets the error, not the handle; its release has nothing to add.
                let _ = self.fs.release(file.handle).await;
                return Err(e);
            }
        }
        if file.attr.mode != mode {
            self.telling.forget(file.attr.inode);
        }
        Ok(file)
    }

    /// How the kernel's caches go on with an opened file.
    fn at_open(&self, a: &Attr, write: bool) -> FopenFlags {
        let at = self.known.opened(a, write);
        if at.attributes_old {
            self.telling.forget(a.inode);
        }
        if at.keep_cache { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() }
    }
}

fn empty(what: &str, result: Result<()>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(errno(what, &e)),
    }
}

fn owner(req: &Request) -> Owner {
    Owner { uid: req.uid(), gid: req.gid() }
}

/// Whether a truncate by this process ends the file's set-user-ID and set-group-ID. The kernel says
/// so of writes only; root stands for CAP_FSETID here.
fn may_not_keep_privileges(req: &Request) -> bool {
    req.uid() != 0
}

impl Shim {
    pub(crate) fn new(config: &MountConfig, runtime: Handle) -> Self {
        let shared = Shared {
            fs: config.fs.clone(),
            known: Known::default(),
            streams: Mutex::default(),
            next_stream: AtomicU64::new(1),
            attr_ttl: config.attr_ttl,
            entry_ttl: config.entry_ttl,
            telling: Telling::new(&config.fs, config.attr_ttl),
            local_locks: config.local_locks,
        };
        Self { shared: Arc::new(shared), runtime }
    }

    /// Where the notifier goes once the session exists.
    pub(crate) fn notifier_slot(&self) -> Arc<OnceLock<Notifier>> {
        self.shared.telling.notifier_slot()
    }

    pub(crate) fn start<F: Future<Output = ()> + Send + 'static>(
        &self,
        f: impl FnOnce(Arc<Shared>) -> F,
    ) {
        ebb_client::begin(&self.runtime, f(Arc::clone(&self.shared)));
    }
}

impl Filesystem for Shim {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Each setter answers an unacceptable value with the nearest acceptable one.
        if let Err(most) = config.set_max_write(REQUEST_BYTES) {
            let _ = config.set_max_write(most);
        }
        if let Err(most) = config.set_max_readahead(REQUEST_BYTES) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(BACKGROUND_MAX);
        let _ = config.set_congestion_threshold(BACKGROUND_MAX * 3 / 4);
        let mut wishes = vec![InitFlags::FUSE_POSIX_LOCKS, InitFlags::FUSE_FLOCK_LOCKS];
        if self.shared.local_locks {
            wishes.clear();
        }
        wishes.extend([
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_CACHE_SYMLINKS,
            // Set-user-ID and set-group-ID end here and at the metadata plane, not by a look at the
            // attributes before each chown.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        ]);
        for wish in wishes {
            if config.add_capabilities(wish).is_err() {
                tracing::debug!(?wish, "this kernel does without");
            }
        }
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = name.as_bytes().to_vec();
        self.start(async move |s| {
            s.entry("lookup", s.fs.lookup(inode(parent), &name).await, reply);
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, _nlookup: u64) {
        self.shared.known.forget(inode(ino));
    }

    fn getattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: Option<fuser::FileHandle>,
        reply: ReplyAttr,
    ) {
        if let Some((a, left)) = self.shared.known.directory(inode(ino), self.shared.attr_ttl) {
            return reply.attr(&left, &attr(&a));
        }
        self.start(async move |s| {
            s.attributes("getattr", s.fs.getattr(inode(ino)).await, reply);
        });
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<fuser::FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = set_attr(mode, uid, gid, size, atime, mtime);
        if size.is_some() {
            self.shared.known.written(inode(ino));
        }
        let ends_privileges = size.is_some() && may_not_keep_privileges(req);
        self.start(async move |s| {
            let result = async {
                let attr = s.fs.setattr(inode(ino), set).await?;
                if ends_privileges { s.fs.end_privileges(attr).await } else { Ok(attr) }
            };
            let result = result.await;
            if result.as_ref().map_or(true, |a| a.kind == FileKind::Directory) {
                s.known.directory_changed(inode(ino));
            }
            s.attributes("setattr", result, reply);
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        self.start(async move |s| match s.fs.readlink(inode(ino)).await {
            Ok(target) => reply.data(&target),
            Err(e) => reply.error(errno("readlink", &e)),
        });
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        // mknod(2): EPERM when the file system does not support the type.
        if mode & libc::S_IFMT != libc::S_IFREG {
            return reply.error(Errno::EPERM);
        }
        let (name, owner) = (name.as_bytes().to_vec(), owner(req));
        self.start(async move |s| {
            let flags = OpenFlags { write: false, truncate: false, exclusive: true };
            let result = async {
                let file = s.fs.create(inode(parent), &name, mode, owner, flags).await?;
                s.fs.release(file.handle).await?;
                Ok(file.attr)
            };
            let result = result.await;
            s.known.directory_changed(inode(parent));
            s.entry("mknod", result, reply);
        });
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let (name, owner) = (name.as_bytes().to_vec(), owner(req));
        self.start(async move |s| {
            let result = s.fs.mkdir(inode(parent), &name, mode, owner).await;
            s.known.directory_changed(inode(parent));
            s.entry("mkdir", result, reply);
        });
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        self.start(async move |s| {
            let result = s.fs.unlink(inode(parent), &name).await;
            s.known.directory_changed(inode(parent));
            empty("unlink", result, reply);
        });
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        self.start(async move |s| {
            let result = s.fs.rmdir(inode(parent), &name).await;
            s.known.directory_changed(inode(parent));
            empty("rmdir", result, reply);
        });
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let (name, owner) = (link_name.as_bytes().to_vec(), owner(req));
        let target = target.as_os_str().as_bytes().to_vec();
        self.start(async move |s| {
            let result = s.fs.symlink(inode(parent), &name, &target, owner).await;
            s.known.directory_changed(inode(parent));
            s.entry("symlink", result, reply);
        });
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if flags.bits() & !(libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE) != 0 {
            return reply.error(Errno::EINVAL);
        }
        let (name, new_name) = (name.as_bytes().to_vec(), newname.as_bytes().to_vec());
        self.start(async move |s| {
            let (from, to) = (inode(parent), inode(newparent));
            let result = s.fs.rename(from, &name, to, &new_name, flags.bits()).await;
            // Both parents, and if it is a directory, itself.
            s.known.some_directory_changed();
            empty("rename", result, reply);
        });
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let (file, parent, name) = (inode(ino), inode(newparent), newname.as_bytes().to_vec());
        self.start(async move |s| {
            let result = s.fs.link(file, parent, &name).await;
            s.known.directory_changed(parent);
            s.entry("link", result, reply);
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: fuser::OpenFlags, reply: ReplyOpen) {
        let flags = open_flags(flags.0);
        let ends_privileges = flags.truncate && may_not_keep_privileges(req);
        self.start(async move |s| {
            match s.opened(s.fs.open(inode(ino), flags).await, ends_privileges).await {
                Ok(file) => {
                    let caches = s.at_open(&file.attr, flags.write);
                    reply.opened(fuser::FileHandle(file.handle.0), caches);
                }
                Err(e) => reply.error(errno("open", &e)),
            }
        });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (name, owner, flags) = (name.as_bytes().to_vec(), owner(req), open_flags(flags));
        let ends_privileges = flags.truncate && may_not_keep_privileges(req);
        self.start(async move |s| {
            let changes = s.known.changes();
            let result = s.fs.create(inode(parent), &name, mode, owner, flags).await;
            let result = s.opened(result, ends_privileges).await;
            let directory = result.as_ref().ok().and_then(|file| file.parent.as_ref());
            s.known.directory_told(changes, inode(parent), directory);
            match result {
                Ok(file) => {
                    let caches = s.at_open(&file.attr, flags.write);
                    s.known.told(&file.attr);
                    reply.created(
                        &s.shorter_ttl(),
                        &attr(&file.attr),
                        NEVER_REUSED,
                        fuser::FileHandle(file.handle.0),
                        caches,
                    );
                }
                Err(e) => reply.error(errno("create", &e)),
            }
        });
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: fuser::FileHandle,
        offset: u64,
        size: u32,
        _flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.start(async move |s| match s.fs.read(FileHandle(fh.0), offset, size.into()).await {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(errno("read", &e)),
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: fuser::FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let handle = FileHandle(fh.0);
        let len = data.len() as u32;
        let kills = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        if kills && self.shared.fs.has_privileges(handle).unwrap_or(false) {
            let data = data.to_vec();
            return self.start(async move |s| {
                let result = async {
                    s.fs.end_privileges(s.fs.getattr(inode(ino)).await?).await?;
                    s.fs.write(handle, offset, &data).await
                };
                match result.await {
                    Ok(()) => reply.written(len),
                    Err(e) => reply.error(errno("write", &e)),
                }
                s.telling.forget(inode(ino));
            });
        }
        // The buffer has room: one copy, and the answer goes out from this very thread.
        match self.shared.fs.try_write(handle, offset, data) {
            Ok(Some(unsent)) => {
                // The caller goes on while this thread puts the bytes on the wire.
                reply.written(len);
                return drop(unsent);
            }
            Ok(None) => {}
            Err(e) => return reply.error(errno("write", &e)),
        }
        let data = data.to_vec();
        self.start(async move |s| match s.fs.write(handle, offset, &data).await {
            Ok(()) => reply.written(len),
            Err(e) => reply.error(errno("write", &e)),
        });
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: fuser::FileHandle,
        lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.start(async move |s| {
            empty("flush", s.close(FileHandle(fh.0), lock_owner).await, reply)
        });
    }

    fn getlk(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: fuser::FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        reply: ReplyLock,
    ) {
        let Some(wanted) = lock(lock_owner, (start, end), typ, pid) else {
            return reply.error(Errno::EINVAL);
        };
        self.start(async move |s| match s.in_the_way(FileHandle(fh.0), wanted).await {
            Ok((start, end, typ, pid)) => reply.locked(start, end, typ, pid),
            Err(e) => reply.error(errno("getlk", &e)),
        });
    }

    fn setlk(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: fuser::FileHandle,
        lock_owner: LockOwner,
        start: u64,
        end: u64,
        typ: i32,
        pid: u32,
        sleep: bool,
        reply: ReplyEmpty,
    ) {
        let Some(wanted) = lock(lock_owner, (start, end), typ, pid) else {
            return reply.error(Errno::EINVAL);
        };
        let caller = req.pid();
        self.start(async move |s| {
            let locked =
                s.lock(inode(ino), FileHandle(fh.0), wanted, sleep.then_some(caller)).await;
            empty("setlk", locked, reply);
        });
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: fuser::FileHandle,
        _flags: fuser::OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.start(async move |s| empty("release", s.fs.release(FileHandle(fh.0)).await, reply));
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: fuser::FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.start(async move |s| empty("fsync", s.fs.fsync(FileHandle(fh.0)).await, reply));
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: fuser::FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        // What programs ask of every file (isatty), and ioctl(2) has this answer for.
        reply.error(Errno::ENOTTY);
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: fuser::OpenFlags, reply: ReplyOpen) {
        let id = self.shared.next_stream.fetch_add(1, Ordering::Relaxed);
        let stream = Arc::new(tokio::sync::Mutex::new(DirStream::new(inode(ino))));
        self.shared.streams().insert(id, stream);
        reply.opened(fuser::FileHandle(id), FopenFlags::empty());
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: fuser::FileHandle,
        _flags: fuser::OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.shared.streams().remove(&fh.0);
        reply.ok();
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: fuser::FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let Some(stream) = self.shared.streams().get(&fh.0).cloned() else {
            return reply.error(Errno::EBADF);
        };
        self.start(async move |s| {
            let filled = fill(&s, &stream, offset, |position, name, a| {
                reply.add(INodeNo(a.inode.0), position, kind(a.kind), OsStr::from_bytes(name))
            });
            match filled.await {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(errno("readdir", &e)),
            }
        });
    }

    fn readdirplus(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: fuser::FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let Some(stream) = self.shared.streams().get(&fh.0).cloned() else {
            return reply.error(Errno::EBADF);
        };
        self.start(async move |s| {
            let ttl = s.shorter_ttl();
            let filled = fill(&s, &stream, offset, |position, name, a| {
                let full = reply.add(
                    INodeNo(a.inode.0),
                    position,
                    OsStr::from_bytes(name),
                    &ttl,
                    &attr(a),
                    NEVER_REUSED,
                );
                if !full {
                    s.known.told(a);
                }
                full
            });
            match filled.await {
                Ok(()) => reply.ok(),
                Err(e) => reply.error(errno("readdir", &e)),
            }
        });
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: fuser::FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        // Every other change of a name is durable when its call returns.
        self.start(async move |s| empty("fsyncdir", s.fs.fsync_dir(inode(ino)).await, reply));
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.start(async move |s| match s.fs.statfs().await {
            Ok(c) => {
                let block = u64::from(STATFS_BLOCK);
                let (used, free) = (c.used_bytes.div_ceil(block), FREE_BYTES / block);
                let files_free = 1 << 36;
                reply.statfs(
                    used + free,
                    free,
                    free,
                    c.inodes + files_free,
                    files_free,
                    STATFS_BLOCK,
                    ebb_dataplane_protocol::ids::NAME_BYTES_MAX as u32,
                    STATFS_BLOCK,
                );
            }
            Err(e) => reply.error(errno("statfs", &e)),
        });
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: fuser::FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // Modes we do not carry out are refused, never pretended.
        let end = offset.checked_add(length);
        let (0, Some(end)) = (mode, end) else { return reply.error(Errno::EOPNOTSUPP) };
        self.start(async move |s| {
            empty("fallocate", s.fs.extend(FileHandle(fh.0), end).await, reply);
        });
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        self.set_xattr(inode(ino), name, value, flags, reply);
    }

    fn getxattr(&self, _r: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.get_xattr(inode(ino), name, size, reply);
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.list_xattrs(inode(ino), req.uid() == 0, size, reply);
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.remove_xattr(inode(ino), name, reply);
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: fuser::FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        // The kernel does without us from then on.
        reply.error(Errno::ENOSYS);
    }
}
