//! The shards of a node, files or block devices: made once, opened, and refused when they are somebody
//! else's (I5), always with the reason and what to do about it.
//!
//! A new file is zero-filled under a temporary name (an unwritten extent costs each first write a
//! metadata update), formatted, synced and renamed: a file with the final name is whole. A block device
//! is formatted where it is, and only if it is blank; it is not zero-filled, the format does not need
//! that. What is there and is not ours, or is damaged, is never overwritten.

use crate::blank::{self, NotBlank};
use ebb_dataplane_protocol::{ClusterId, CoreId, NodeId};
use ebb_ring::{Buf, DeviceFile, FileError, OpenMode};
use ebb_store::{
    FormatError, Geometry, GeometryError, Identity, OpenDevice, OpenError, Store, format_device,
    geometry::DEVICE_BYTES_MAX, identify,
};
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Copied through an aligned buffer at a time, when a caller's memory is not.
const COPY_BYTES: usize = 1 << 20;
/// How long a shard that another process has locked is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// As long waits who only looks: enough for a process that has just ended.
const LOOK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// Progress of a fill is logged every so many bytes.
const PROGRESS_BYTES: u64 = 1 << 30;

/// Why a shard cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// The directory.
    #[error("cannot use directory {dir}: {source}")]
    Directory {
        /// Which.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Too small or odd.
    #[error("{path}: {source}")]
    Geometry {
        /// Which.
        path: PathBuf,
        /// Why.
        source: GeometryError,
    },
    /// Formatting failed.
    #[error("{path}: formatting failed: {source}")]
    Format {
        /// Which.
        path: PathBuf,
        /// Why.
        source: FormatError,
    },
    /// Another node works in the directory.
    #[error("{dir}: already in use by another process (locked); stop that one first")]
    DirectoryLocked {
        /// Which.
        dir: PathBuf,
    },
    /// `devices` names something else.
    #[error(
        "{path}: not a block device; `devices` names block devices only. Leave it out to keep the shards \
         as files in `dir`"
    )]
    NotABlockDevice {
        /// Which.
        path: PathBuf,
    },
    /// A device that holds something.
    #[error(
        "{path}: the device is not blank: {found}. It is left as it is: correct the path, or, if nothing \
         on it is needed any more, empty it yourself (`blkdiscard -z {path}`) and start again"
    )]
    NotBlank {
        /// Which.
        path: PathBuf,
        /// What is there.
        found: NotBlank,
    },
    /// Not ours, damaged, or unreadable.
    #[error("{path}: {source}. It is left as it is: {}", source.advice())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: OpenError,
    },
    /// Ours, but not this node's or core's.
    #[error("{path}: {reason}. It is left as it is: was a directory copied or renamed?")]
    Mismatch {
        /// Which.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
}

/// Says that a node works in a directory, until it is dropped. Before the shard files are there, nothing
/// else keeps two nodes from making them at the same time.
#[derive(Debug)]
pub(crate) struct DirectoryLock {
    _dir: File,
}

impl DirectoryLock {
    /// Creates the directory if it is missing, and locks it.
    pub(crate) fn take(dir: &Path) -> Result<Self, ShardError> {
        let fail = |source| ShardError::Directory { dir: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(fail)?;
        let file = File::open(dir).map_err(fail)?;
        let mut waited = Duration::ZERO;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self { _dir: file }),
                Err(TryLockError::Error(source)) => return Err(fail(source)),
                Err(TryLockError::WouldBlock) if waited < LOCK_PATIENCE => {
                    std::thread::sleep(LOCK_PAUSE);
                    waited += LOCK_PAUSE;
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(ShardError::DirectoryLocked { dir: dir.to_owned() });
                }
            }
        }
    }
}

/// Opens a device file. A process that was killed holds its lock a little longer than it lives: the
/// kernel takes its ring apart in the background.
pub(crate) fn open_device(path: &Path, patience: Duration) -> Result<DeviceFile, FileError> {
    let mut waited = Duration::ZERO;
    loop {
        match DeviceFile::open(path, OpenMode::Existing) {
            Err(FileError::Locked { .. } | FileError::Busy { .. }) if waited < patience => {
                if waited.is_zero() {
                    tracing::info!(path = %path.display(), "in use; waiting for its last process to go");
                }
                std::thread::sleep(LOCK_PAUSE);
                waited += LOCK_PAUSE;
            }
            other => return other,
        }
    }
}

/// Walks over a shard that no process uses, and compares every block with its checksum. Changes
/// nothing. Fails where opening it would.
pub fn check(path: &Path) -> Result<ebb_store::Report, ShardError> {
    let file = open_device(path, LOOK_PATIENCE)?;
    ebb_store::verify(&mut BlockingDevice(&file))
        .map_err(|source| ShardError::Open { path: path.to_owned(), source })
}

/// A device file as the store's blocking device: for opening a store and looking at it, not for running one.
#[derive(Debug)]
pub struct BlockingDevice<'a>(pub &'a DeviceFile);

fn io_error(e: FileError) -> io::Error {
    match e {
        FileError::Os { source, .. } => source,
        other => io::Error::other(other.to_string()),
    }
}

impl OpenDevice for BlockingDevice<'_> {
    fn len(&self) -> io::Result<u64> {
        self.0.size().map_err(io_error)
    }
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut bounce = Buf::unpooled(buf.len().min(COPY_BYTES));
        let mut done = 0;
        while done < buf.len() {
            let n = (buf.len() - done).min(COPY_BYTES);
            let got = self.0.read_at(&mut bounce[..n], offset + done as u64).map_err(io_error)?;
            if got < n {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buf[done..done + n].copy_from_slice(&bounce[..n]);
            done += n;
        }
        Ok(())
    }
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        let mut bounce = Buf::unpooled(buf.len().min(COPY_BYTES));
        let mut done = 0;
        while done < buf.len() {
            let n = (buf.len() - done).min(COPY_BYTES);
            bounce[..n].copy_from_slice(&buf[done..done + n]);
            self.0.write_at(&bounce[..n], offset + done as u64).map_err(io_error)?;
            done += n;
        }
        Ok(())
    }
    fn sync(&mut self) -> io::Result<()> {
        self.0.sync_data().map_err(io_error)
    }
}

/// A shard between its file and its store.
#[derive(Debug)]
pub(crate) enum Shard {
    /// There before.
    Existing(DeviceFile, Identity),
    /// A file under its temporary name, zero-filled, not formatted: whose it is has to be learned first.
    Fresh(DeviceFile, Geometry, PathBuf),
    /// A blank block device, not formatted.
    Blank(DeviceFile, Geometry),
}

/// File of a core's shard.
pub(crate) fn path_of(dir: &Path, core: u16) -> PathBuf {
    dir.join(format!("shard-{core}.ebb"))
}

impl Shard {
    /// Opens the shard file of a core, or prepares a new one of `bytes`. The directory is locked.
    pub(crate) fn prepare(
        dir: &Path,
        core: u16,
        bytes: u64,
        cluster: ClusterId,
    ) -> Result<Self, ShardError> {
        let path = path_of(dir, core);
        let there = path
            .try_exists()
            .map_err(|source| ShardError::Directory { dir: dir.to_owned(), source })?;
        if there {
            let file = open_device(&path, LOCK_PATIENCE)?;
            let found = identify(&mut BlockingDevice(&file))
                .map_err(|source| ShardError::Open { path, source })?;
            return Self::existing(file, found, core, cluster);
        }
        let geometry = Geometry::for_device(bytes)
            .map_err(|source| ShardError::Geometry { path: path.clone(), source })?;
        let temporary = path.with_extension("ebb.new");
        // Left by a format that did not finish.
        let _ = std::fs::remove_file(&temporary);
        let file = DeviceFile::open(&temporary, OpenMode::CreateNew)?;
        tracing::info!(path = %path.display(), bytes = geometry.device_bytes, "zero-filling a new shard");
        let mut next = PROGRESS_BYTES;
        file.zero_fill(geometry.device_bytes, &mut |done| {
            if done >= next {
                let percent = done * 100 / geometry.device_bytes.max(1);
                tracing::info!(path = %path.display(), percent, "zero-filling");
                next = done + PROGRESS_BYTES;
            }
        })?;
        Ok(Self::Fresh(file, geometry, path))
    }

    /// Opens the block device of a core, all of it; a new one has to be blank.
    pub(crate) fn prepare_device(
        path: &Path,
        core: u16,
        cluster: ClusterId,
    ) -> Result<Self, ShardError> {
        let file = open_device(path, LOCK_PATIENCE)?;
        let path = path.to_owned();
        if !file.is_block() {
            return Err(ShardError::NotABlockDevice { path });
        }
        match identify(&mut BlockingDevice(&file)) {
            Ok(found) => return Self::existing(file, found, core, cluster),
            Err(OpenError::NotFormatted) => {}
            Err(source) => return Err(ShardError::Open { path, source }),
        }
        let bytes = file.size()?;
        if bytes > DEVICE_BYTES_MAX {
            tracing::warn!(path = %path.display(), bytes, used = DEVICE_BYTES_MAX, "a store uses no more");
        }
        let geometry = Geometry::for_device(bytes.min(DEVICE_BYTES_MAX))
            .map_err(|source| ShardError::Geometry { path: path.clone(), source })?;
        match blank::look(&mut BlockingDevice(&file), bytes) {
            Ok(None) => Ok(Self::Blank(file, geometry)),
            Ok(Some(found)) => Err(ShardError::NotBlank { path, found }),
            Err(source) => {
                let doing = "looking whether the device is blank";
                Err(ShardError::Open { path, source: OpenError::Io { doing, source } })
            }
        }
    }

    /// A shard that has a superblock, if it is this core's of this cluster.
    fn existing(
        file: DeviceFile,
        found: Identity,
        core: u16,
        cluster: ClusterId,
    ) -> Result<Self, ShardError> {
        let path = file.path().to_owned();
        if found.cluster != cluster {
            let source = OpenError::OtherCluster { found: found.cluster, expected: cluster };
            return Err(ShardError::Open { path, source });
        }
        if found.core != CoreId(core) {
            let reason = format!("it is core {}'s shard, not core {core}'s", found.core);
            return Err(ShardError::Mismatch { path, reason });
        }
        Ok(Self::Existing(file, found))
    }

    /// Identity of the store it belongs to, if it has one.
    pub(crate) fn store_id(&self) -> Option<u128> {
        match self {
            Self::Existing(_, identity) => Some(identity.store),
            Self::Fresh(..) | Self::Blank(..) => None,
        }
    }

    /// Bytes for chunks, as far as known before it is opened.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        let data = |g: &Geometry| u64::from(g.data_blocks()) * ebb_store::BLOCK as u64;
        match self {
            Self::Existing(file, _) => {
                file.size().ok().and_then(|n| Geometry::for_device(n).ok()).map_or(0, |g| data(&g))
            }
            Self::Fresh(_, geometry, _) | Self::Blank(_, geometry) => data(geometry),
        }
    }

    /// Formats it if it is new, and recovers its store.
    pub(crate) fn open(self, identity: Identity) -> Result<(DeviceFile, Store), ShardError> {
        let (file, path) = match self {
            Self::Existing(file, found) => {
                let path = file.path().to_owned();
                let reason = if found.store != identity.store {
                    Some("it belongs to another store than the other shards".to_owned())
                } else if found.pg_count != identity.pg_count {
                    Some(format!(
                        "it was made for {} placement groups, the cluster has {}",
                        found.pg_count, identity.pg_count
                    ))
                } else if found.node != NodeId(0) && found.node != identity.node {
                    let (was, is) = (found.node, identity.node);
                    Some(format!("it is node {was}'s, the metadata plane calls this node {is}"))
                } else {
                    None
                };
                if let Some(reason) = reason {
                    return Err(ShardError::Mismatch { path, reason });
                }
                (file, path)
            }
            Self::Blank(file, geometry) => {
                let path = file.path().to_owned();
                tracing::info!(path = %path.display(), bytes = geometry.device_bytes, "formatting a blank device");
                format_device(&mut BlockingDevice(&file), geometry, identity)
                    .map_err(|source| ShardError::Format { path: path.clone(), source })?;
                (file, path)
            }
            Self::Fresh(file, geometry, path) => {
                format_device(&mut BlockingDevice(&file), geometry, identity)
                    .map_err(|source| ShardError::Format { path: path.clone(), source })?;
                file.sync_all()?;
                let temporary = file.path().to_owned();
                drop(file);
                let dir = path.parent().unwrap_or(Path::new(".")).to_owned();
                let renamed = std::fs::rename(&temporary, &path)
                    .and_then(|()| std::fs::File::open(&dir))
                    .and_then(|d| d.sync_all());
                renamed.map_err(|source| ShardError::Directory { dir, source })?;
                (open_device(&path, LOCK_PATIENCE)?, path)
            }
        };
        let store = Store::open(&mut BlockingDevice(&file), identity.cluster)
            .map_err(|source| ShardError::Open { path, source })?;
        Ok((file, store))
    }
}
