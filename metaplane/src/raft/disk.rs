//! The files of a voter: the machine's own, or those of a simulator that loses power (`crate::sim`).
//!
//! Log, vote, identity, state and snapshots go through [`Disk`], and through nothing else. The promises are those of
//! POSIX and no more: bytes are stable after [`DiskFile::sync`], names after [`Disk::sync_dir`].

use redb::{Database, DatabaseError};
use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::OFlag;

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// To read.
    Read,
    /// To read and write; it is there.
    Write,
    /// To read and write; made, or emptied.
    Create,
    /// To write whole blocks that are stable when the write returns (`O_DIRECT | O_DSYNC`); `EINVAL` where a file
    /// system can't.
    Stable,
}

/// An open file.
pub trait DiskFile: Debug + Send + Sync {
    /// Reads so many bytes, or fails.
    fn read_at(&self, into: &mut [u8], at: u64) -> io::Result<()>;
    /// Writes all of it.
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()>;
    /// What was written is stable after this.
    fn sync(&self) -> io::Result<()>;
    /// What was written over what was there is stable after this.
    fn sync_data(&self) -> io::Result<()>;
    /// Its length in bytes.
    fn bytes(&self) -> io::Result<u64>;
}

/// A file system.
pub trait Disk: Debug + Send + Sync {
    /// Opens a file.
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>>;
    /// Makes a directory and those above it.
    fn create_dirs(&self, dir: &Path) -> io::Result<()>;
    /// What is in a directory, in order of the names.
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;
    /// Names a file anew; one of that name goes.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// The names in a directory are stable after this.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
    /// Opens or makes a database.
    fn database(&self, path: &Path, cache_bytes: usize) -> Result<Database, DatabaseError>;
    /// How long the next piece of work takes. `None`: nobody knows, so it is given to a thread that may block.
    /// A simulated disk never blocks: whoever has work for it waits so long by the runtime's clock.
    fn takes(&self) -> Option<Duration> {
        None
    }
}

/// The file system of this machine.
#[derive(Debug)]
pub struct Machine;

impl DiskFile for File {
    fn read_at(&self, into: &mut [u8], at: u64) -> io::Result<()> {
        self.read_exact_at(into, at)
    }
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }
    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
}

impl Disk for Machine {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        match how {
            Open::Read => options.read(true),
            Open::Write => options.read(true).write(true),
            Open::Create => options.read(true).write(true).create(true).truncate(true),
            Open::Stable => {
                options.write(true).custom_flags((OFlag::O_DIRECT | OFlag::O_DSYNC).bits())
            }
        };
        Ok(Arc::new(options.open(path)?))
    }
    fn create_dirs(&self, dir: &Path) -> io::Result<()> {
        std::fs::create_dir_all(dir)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            paths.push(entry?.path());
        }
        paths.sort();
        Ok(paths)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }
    fn database(&self, path: &Path, cache_bytes: usize) -> Result<Database, DatabaseError> {
        Database::builder().set_cache_size(cache_bytes).create(path)
    }
}

/// A whole file.
pub(super) fn read(disk: &dyn Disk, path: &Path) -> io::Result<Vec<u8>> {
    let file = disk.open(path, Open::Read)?;
    let mut bytes = vec![0; file.bytes()? as usize];
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Puts a small file in place as a whole, stable when it returns: written under a temporary name, synced, renamed, its
/// directory synced.
pub(super) fn replace(
    disk: &dyn Disk,
    dir: &Path,
    (temporary, name): (&str, &str),
    bytes: &[u8],
) -> io::Result<()> {
    let from = dir.join(temporary);
    let file = disk.open(&from, Open::Create)?;
    file.write_at(bytes, 0)?;
    file.sync()?;
    disk.rename(&from, &dir.join(name))?;
    disk.sync_dir(dir)
}

/// Does work that waits for the disk, off the tasks that must not.
pub(crate) async fn work<T: Send + 'static>(
    disk: &dyn Disk,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    match disk.takes() {
        None => tokio::task::spawn_blocking(work).await.map_err(io::Error::other),
        Some(time) => {
            tokio::time::sleep(time).await;
            Ok(work())
        }
    }
}
