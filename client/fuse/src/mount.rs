//! Mounting, serving until told to stop, unmounting.
//!
//! As root the mount is made directly, without libfuse and without fusermount3; others go through
//! fusermount3. Either way the kernel's end of the connection closing (an `umount` by anybody) ends
//! [`mount`], and a stop request unmounts first, so that no write comes after the last flush.

use crate::filesystem::Shim;
use crate::mountinfo;
use ebb_client::FileSystem;
use fuser::{Config, MountOption, Session, SessionACL};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags};
use std::ffi::OsStr;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::runtime::Handle;

/// How a file system is mounted.
#[derive(Clone, Debug)]
pub struct MountConfig {
    /// What is mounted.
    pub fs: FileSystem,
    /// Where: an existing directory.
    pub mount_point: PathBuf,
    /// Shown as the source of the mount.
    pub source: String,
    /// Refuse all changes.
    pub read_only: bool,
    /// Let other users in (permissions are checked by the kernel). Default: as root.
    pub allow_other: bool,
    /// How long the kernel may use attributes without asking.
    pub attr_ttl: Duration,
    /// How long the kernel may use names without asking; zero: changes of others show at once.
    pub entry_ttl: Duration,
    /// Locks of files are the kernel's own: programs on other mounts don't see them.
    pub local_locks: bool,
    /// Threads that read requests from the kernel.
    pub threads: usize,
    /// How far the kernel reads ahead, in KiB. Root only; else the kernel's 128.
    pub read_ahead_kib: u32,
}

impl MountConfig {
    /// The defaults.
    pub fn new(fs: FileSystem, mount_point: impl Into<PathBuf>) -> Self {
        Self {
            fs,
            mount_point: mount_point.into(),
            source: "ebb".to_owned(),
            read_only: false,
            allow_other: nix::unistd::geteuid().is_root(),
            attr_ttl: Duration::from_secs(1),
            entry_ttl: Duration::from_secs(1),
            local_locks: false,
            threads: 4,
            read_ahead_kib: 1024,
        }
    }
}

/// Why a file system is not, or no longer, mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mount point does not exist.
    #[error("{0} does not exist: make the directory first (mkdir -p {0})")]
    Missing(PathBuf),
    /// The mount point is not a directory.
    #[error("{0} is not a directory: a mount point must be one")]
    NotDirectory(PathBuf),
    /// Something is mounted there.
    #[error("{path} has {kind} ({source_name}) mounted already: unmount it first (umount {path})")]
    AlreadyMounted {
        /// Where.
        path: PathBuf,
        /// Type of that mount.
        kind: String,
        /// Its source.
        source_name: String,
    },
    /// The mount of a dead process is still there.
    #[error("{0} is the mount of a process that died: remove it first (umount -l {0})")]
    DeadMount(PathBuf),
    /// The kernel has no FUSE, or the container does not let it in.
    #[error(
        "/dev/fuse is missing: load the module (modprobe fuse), or give the container the device \
         (--device /dev/fuse --cap-add SYS_ADMIN)"
    )]
    NoFuse,
    /// The mount point cannot be looked at.
    #[error("cannot look at {path}: {error}")]
    Look {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The kernel or fusermount3 refuses.
    #[error("cannot mount at {path}: {error}")]
    Mount {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The connection to the kernel failed while serving.
    #[error("serving {path} ended: {error}")]
    Serve {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It cannot be unmounted.
    #[error("cannot unmount {path}: {error}")]
    Unmount {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// How long a stopped mount may take to finish what is in flight.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Resolves at SIGTERM or SIGINT. For the `shutdown` of [`mount`].
pub async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without handlers the signals' defaults end the process.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

/// Mounts and serves until `shutdown` resolves or the mount is removed. On return everything
/// written was flushed, or the first failure is logged. The file system stays usable.
pub async fn mount(
    config: MountConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), MountError> {
    let fs = config.fs.clone();
    let path = check(&config.mount_point)?;
    let runtime = Handle::current();
    let begin = {
        let (config, path) = (config.clone(), path.clone());
        move || begin(config, &path, runtime)
    };
    let mount_error = |error| MountError::Mount { path: path.clone(), error };
    let session = tokio::task::spawn_blocking(begin)
        .await
        .map_err(|e| mount_error(io::Error::other(e)))?
        .map_err(mount_error)?;
    let (tx, mut ended) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("ebb-fuse".to_owned())
        .spawn(move || {
            // Nobody may be waiting any more; then nobody needs to know.
            let _ = tx.send(end_of(session.run()));
        })
        .map_err(mount_error)?;
    raise_read_ahead(&path, config.read_ahead_kib);
    tracing::info!(path = %path.display(), "mounted");

    tokio::select! {
        end = &mut ended => {
            sync(&fs).await;
            return match end {
                Ok(Err(error)) => Err(MountError::Serve { path, error }),
                _ => Ok(()),
            };
        }
        () = shutdown => {}
    }
    let target = path.clone();
    let unmounted = tokio::task::spawn_blocking(move || unmount(&target)).await;
    sync(&fs).await;
    match unmounted {
        Ok(Ok(())) => {}
        Ok(Err(e)) => return Err(e),
        Err(e) => {
            return Err(MountError::Unmount { path, error: io::Error::other(e) });
        }
    }
    // A file still open somewhere keeps the connection; its owner gets ENOTCONN when we go.
    match tokio::time::timeout(STOP_PATIENCE, &mut ended).await {
        Ok(Ok(Err(error))) => return Err(MountError::Serve { path, error }),
        Ok(_) => {}
        Err(_) => tracing::warn!(path = %path.display(), "still in use; leaving it behind"),
    }
    sync(&fs).await;
    Ok(())
}

/// What the end of a session means. A thread that is just taking a request while the last reference
/// to the mount goes gets ECONNABORTED for it, its neighbours ENODEV at their next read: both say
/// that the kernel ended the connection, which isn't a failure of ours.
fn end_of(run: io::Result<()>) -> io::Result<()> {
    match run {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ECONNABORTED | libc::ENODEV)) => Ok(()),
        other => other,
    }
}

async fn sync(fs: &FileSystem) {
    if let Err(e) = fs.sync_all().await {
        tracing::error!(error = %e, "not everything written could be flushed");
    }
}

/// The mount point, absolute, fit to be mounted on.
fn check(point: &Path) -> Result<PathBuf, MountError> {
    let look = |error: io::Error| match error.raw_os_error() {
        Some(libc::ENOENT) => MountError::Missing(point.to_owned()),
        Some(libc::ENOTCONN) => MountError::DeadMount(point.to_owned()),
        Some(libc::ENOTDIR) => MountError::NotDirectory(point.to_owned()),
        _ => MountError::Look { path: point.to_owned(), error },
    };
    let path = point.canonicalize().map_err(look)?;
    if !std::fs::metadata(&path).map_err(look)?.is_dir() {
        return Err(MountError::NotDirectory(path));
    }
    if let Some(m) = mountinfo::at(&path) {
        return Err(MountError::AlreadyMounted { path, kind: m.kind, source_name: m.source });
    }
    match std::fs::metadata("/dev/fuse") {
        Ok(m) if m.file_type().is_char_device() => Ok(path),
        _ => Err(MountError::NoFuse),
    }
}

fn begin(config: MountConfig, path: &Path, runtime: Handle) -> io::Result<Session<Shim>> {
    let mut options = Config::default();
    options.n_threads = Some(config.threads.clamp(1, 16));
    options.acl = if config.allow_other { SessionACL::All } else { SessionACL::Owner };
    let shim = Shim::new(&config, runtime);
    let notifier = shim.notifier_slot();
    let session = if nix::unistd::geteuid().is_root() {
        let device = mount_directly(&config, path)?;
        Session::from_fd(shim, device, options.acl, options).inspect_err(|_| {
            let _ = unmount(path);
        })?
    } else {
        let mode = if config.read_only { MountOption::RO } else { MountOption::RW };
        options.mount_options = vec![
            MountOption::FSName(config.source.clone()),
            MountOption::Subtype("ebb".to_owned()),
            MountOption::DefaultPermissions,
            mode,
        ];
        Session::new(shim, path, &options)?
    };
    let _ = notifier.set(session.notifier());
    Ok(session)
}

/// mount(2) with a fresh connection to /dev/fuse.
fn mount_directly(config: &MountConfig, path: &Path) -> io::Result<OwnedFd> {
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let mut options = format!(
        "fd={},rootmode=40000,user_id={uid},group_id={gid},default_permissions",
        device.as_raw_fd()
    );
    if config.allow_other {
        options.push_str(",allow_other");
    }
    let mut flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOATIME;
    flags.set(MsFlags::MS_RDONLY, config.read_only);
    nix::mount::mount(
        Some(config.source.as_str()),
        path,
        Some("fuse.ebb"),
        flags,
        Some(options.as_str()),
    )?;
    Ok(device.into())
}

/// Removes the mount at `path`. One that is in use is detached: it disappears from the tree at once,
/// and is gone when the last file in it is closed.
pub fn unmount(path: &Path) -> Result<(), MountError> {
    let failed = |error: io::Error| MountError::Unmount { path: path.to_owned(), error };
    match nix::mount::umount(path) {
        // EINVAL: somebody else was faster.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(Errno::EBUSY) => {
            tracing::warn!(path = %path.display(), "in use: detaching it");
            nix::mount::umount2(path, MntFlags::MNT_DETACH).map_err(|e| failed(e.into()))
        }
        Err(Errno::EPERM) => {
            let args = [OsStr::new("-u"), OsStr::new("-z"), OsStr::new("--"), path.as_os_str()];
            let out = std::process::Command::new("fusermount3").args(args).output();
            match out.map_err(failed)? {
                out if out.status.success() => Ok(()),
                out => Err(failed(io::Error::other(
                    String::from_utf8_lossy(&out.stderr).trim().to_owned(),
                ))),
            }
        }
        Err(e) => Err(failed(e.into())),
    }
}

/// The kernel offers a FUSE server 128 KiB of readahead at most; a larger one is set where it keeps
/// it for the mount (as root). Without it reads are smaller, nothing else.
fn raise_read_ahead(path: &Path, kib: u32) {
    let Some(m) = mountinfo::at(path) else { return };
    let file = format!("/sys/class/bdi/{}/read_ahead_kb", m.device);
    if let Err(e) = std::fs::write(&file, kib.to_string()) {
        tracing::debug!(file, error = %e, "the kernel's readahead stays as it is");
    }
}
