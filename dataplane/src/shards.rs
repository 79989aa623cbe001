//! The shard files of a node: made once, opened, and refused when they are somebody else's.
//!
//! A new file is zero-filled under a temporary name (an unwritten extent costs each first write a
//! metadata update), formatted, synced and renamed: a file with the final name is whole. What is there
//! and is not ours, or is damaged, is never overwritten.

use ebb_dataplane_protocol::{ClusterId, CoreId, NodeId};
use ebb_ring::{Buf, DeviceFile, FileError, OpenMode};
use ebb_store::{
    FormatError, Geometry, GeometryError, Identity, OpenDevice, OpenError, Store, format_device,
    identify,
};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Copied through an aligned buffer at a time, when a caller's memory is not.
const COPY_BYTES: usize = 1 << 20;
/// How long a shard that another process has locked is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
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
    /// Not ours, damaged, or unreadable.
    #[error("{path}: {source}. It is left as it is: restore it, or move it away to start empty")]
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

/// Opens a device file. A process that was killed holds its lock a little longer than it lives: the
/// kernel takes its ring apart in the background.
fn open_device(path: &Path, mode: OpenMode) -> Result<DeviceFile, FileError> {
    let mut waited = Duration::ZERO;
    loop {
        match DeviceFile::open(path, mode) {
            Err(FileError::Locked { .. }) if waited < LOCK_PATIENCE => {
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
    let file = DeviceFile::open(path, OpenMode::Existing)?;
    ebb_store::verify(&mut BlockingDevice(&file))
        .map_err(|source| ShardError::Open { path: path.to_owned(), source })
}

/// A device file as the store's blocking device.
pub(crate) struct BlockingDevice<'a>(pub(crate) &'a DeviceFile);

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
    /// Zero-filled, not formatted: whose it is has to be learned first.
    Fresh(DeviceFile, Geometry, PathBuf),
}

/// File of a core's shard.
pub(crate) fn path_of(dir: &Path, core: u16) -> PathBuf {
    dir.join(format!("shard-{core}.ebb"))
}

impl Shard {
    /// Opens the shard of a core, or prepares a new one of `bytes`.
    pub(crate) fn prepare(
        dir: &Path,
        core: u16,
        bytes: u64,
        cluster: ClusterId,
    ) -> Result<Self, ShardError> {
        std::fs::create_dir_all(dir)
            .map_err(|source| ShardError::Directory { dir: dir.to_owned(), source })?;
        let path = path_of(dir, core);
        if path.exists() {
            let file = open_device(&path, OpenMode::Existing)?;
            let identity = identify(&mut BlockingDevice(&file))
                .map_err(|source| ShardError::Open { path: path.clone(), source })?;
            if identity.cluster != cluster {
                let (found, expected) = (identity.cluster, cluster);
                let source = OpenError::OtherCluster { found, expected };
                return Err(ShardError::Open { path, source });
            }
            if identity.core != CoreId(core) {
                let reason = format!("it is core {}'s shard, not core {core}'s", identity.core);
                return Err(ShardError::Mismatch { path, reason });
            }
            return Ok(Self::Existing(file, identity));
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

    /// Identity of the store it belongs to, if it has one.
    pub(crate) fn store_id(&self) -> Option<u128> {
        match self {
            Self::Existing(_, identity) => Some(identity.store),
            Self::Fresh(..) => None,
        }
    }

    /// Bytes for chunks, as far as known before it is opened.
    pub(crate) fn capacity_bytes(&self) -> u64 {
        let data = |g: &Geometry| u64::from(g.data_blocks()) * ebb_store::BLOCK as u64;
        match self {
            Self::Existing(file, _) => {
                file.size().ok().and_then(|n| Geometry::for_device(n).ok()).map_or(0, |g| data(&g))
            }
            Self::Fresh(_, geometry, _) => data(geometry),
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
                (open_device(&path, OpenMode::Existing)?, path)
            }
        };
        let store = Store::open(&mut BlockingDevice(&file), identity.cluster)
            .map_err(|source| ShardError::Open { path, source })?;
        Ok((file, store))
    }
}
