//! Opening device files and the blocking work done on them before a reactor runs.
//!
//! A device file is always O_DIRECT, and locked exclusively when writable, so that two servers never
//! share a shard. Preallocated space is also zero-filled: a write into an unwritten extent costs
//! 1.6 to 2.7 times an overwrite, because the file system must journal the conversion.

use std::fs::{File, FileType, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};

use crate::arena::Buf;
use crate::error::FileError;
use crate::layout::BLOCK;
use crate::sys;

/// Bytes written at a time when zero-filling.
const FILL: usize = 4 << 20;

/// How to open a device file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// It must exist.
    Existing,
    /// It must not exist; a regular file is created.
    CreateNew,
    /// Created if it does not exist.
    CreateIfMissing,
}

/// Alignment that direct I/O wants, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DioAlign {
    /// Of memory addresses.
    pub mem: u32,
    /// Of file offsets and lengths.
    pub offset: u32,
}

/// An open, locked, O_DIRECT file or block device.
#[derive(Debug)]
pub struct DeviceFile {
    file: Flock<File>,
    path: PathBuf,
    align: DioAlign,
    is_block: bool,
}

/// What a file is, if it is neither a regular file nor a block device.
fn other_kind(t: FileType) -> Option<&'static str> {
    if t.is_file() || t.is_block_device() {
        None
    } else if t.is_dir() {
        Some("a directory")
    } else if t.is_char_device() {
        Some("a character device")
    } else if t.is_fifo() {
        Some("a pipe")
    } else {
        Some("a socket or another special file")
    }
}

impl DeviceFile {
    /// Opens `path` for reading and writing with O_DIRECT and an exclusive lock (O_EXCL as well on a
    /// block device, which refuses a mounted one).
    pub fn open(path: &Path, mode: OpenMode) -> Result<DeviceFile, FileError> {
        let os = |what, source| FileError::Os { path: path.to_owned(), what, source };
        // Looked at before opening: opening a pipe or a terminal has effects of its own.
        let kind = std::fs::metadata(path).map(|m| m.file_type()).ok();
        if let Some(kind) = kind.and_then(other_kind) {
            return Err(FileError::NotADevice { path: path.to_owned(), kind });
        }
        let is_block = kind.is_some_and(|t| t.is_block_device());
        let mut flags = libc::O_DIRECT;
        if is_block {
            flags |= libc::O_EXCL;
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(flags);
        match mode {
            OpenMode::Existing => {}
            OpenMode::CreateNew => {
                options.create_new(true);
            }
            OpenMode::CreateIfMissing => {
                options.create(!is_block);
            }
        }
        let file = options.open(path).map_err(|e| match e.raw_os_error() {
            Some(libc::EINVAL) => FileError::NoDirectIo { path: path.to_owned() },
            Some(libc::EBUSY) => FileError::Busy { path: path.to_owned() },
            _ => os("open", e),
        })?;
        let file =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
                |(_, errno)| match errno {
                    Errno::EWOULDBLOCK => FileError::Locked { path: path.to_owned() },
                    errno => os("flock", errno.into()),
                },
            )?;
        let align = match sys::dio_align(file.as_fd()).map_err(|e| os("statx", e.into()))? {
            Some((0, _) | (_, 0)) => return Err(FileError::NoDirectIo { path: path.to_owned() }),
            Some((mem, offset)) => DioAlign { mem, offset },
            // The kernel does not say: a block is enough for every device we support.
            None => DioAlign { mem: BLOCK as u32, offset: BLOCK as u32 },
        };
        let most = align.mem.max(align.offset);
        if most as usize > BLOCK {
            return Err(FileError::Alignment { path: path.to_owned(), align: most });
        }
        Ok(DeviceFile { file, path: path.to_owned(), align, is_block })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Alignment that reads and writes must keep; at most [`BLOCK`].
    pub fn align(&self) -> DioAlign {
        self.align
    }

    /// Whether it is a block device; a regular file otherwise.
    pub fn is_block(&self) -> bool {
        self.is_block
    }

    pub(crate) fn as_file(&self) -> &File {
        &self.file
    }

    /// Size in bytes, of a regular file or a block device.
    pub fn size(&self) -> Result<u64, FileError> {
        // Seeking to the end also works on a block device, where metadata says 0.
        (&*self.file).seek(SeekFrom::End(0)).map_err(|e| self.err("seek", e))
    }

    /// Reserves `len` bytes of a regular file and writes zeros over `0..len`, then makes that
    /// durable. `progress` hears the bytes done so far. On a block device it only writes; a store needs none
    /// of it there (docs/FORMAT.md §1).
    pub fn zero_fill(&self, len: u64, progress: &mut dyn FnMut(u64)) -> Result<(), FileError> {
        let meta = self.file.metadata().map_err(|e| self.err("stat", e))?;
        if meta.is_file() {
            let size = i64::try_from(len)
                .map_err(|_| self.err("fallocate", io::Error::from(Errno::EFBIG)))?;
            match fallocate(&*self.file, FallocateFlags::empty(), 0, size) {
                // Some file systems cannot reserve; then the writes below allocate.
                Ok(()) | Err(Errno::EOPNOTSUPP) => {}
                Err(e) => return Err(self.err("fallocate", e.into())),
            }
        }
        let zeros = Buf::unpooled(FILL);
        let mut at = 0u64;
        while at < len {
            let n = (len - at).min(FILL as u64) as usize;
            self.write_at(&zeros[..n], at)?;
            at += n as u64;
            progress(at);
        }
        self.sync_all()
    }

    /// Makes a regular file `len` bytes long and reserves its space, without writing to it. Nothing on a
    /// block device.
    pub fn reserve(&self, len: u64) -> Result<(), FileError> {
        let meta = self.file.metadata().map_err(|e| self.err("stat", e))?;
        if !meta.is_file() {
            return Ok(());
        }
        let size =
            i64::try_from(len).map_err(|_| self.err("fallocate", io::Error::from(Errno::EFBIG)))?;
        self.file.set_len(len).map_err(|e| self.err("ftruncate", e))?;
        match fallocate(&*self.file, FallocateFlags::empty(), 0, size) {
            // Some file systems cannot reserve; then it is sparse.
            Ok(()) | Err(Errno::EOPNOTSUPP) => {}
            Err(e) => return Err(self.err("fallocate", e.into())),
        }
        self.sync_all()
    }

    /// Reads until `out` is full or the file ends; answers the bytes read. `out` must be aligned
    /// (part of a [`Buf`]).
    pub fn read_at(&self, out: &mut [u8], offset: u64) -> Result<usize, FileError> {
        let mut done = 0;
        while done < out.len() {
            match self.file.read_at(&mut out[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(self.err("read", e)),
            }
            if !(done as u64).is_multiple_of(u64::from(self.align.offset)) {
                break; // Only the end of the file is off the grid.
            }
        }
        Ok(done)
    }

    /// Writes all of `data`, which must be aligned (part of a [`Buf`]).
    pub fn write_at(&self, data: &[u8], offset: u64) -> Result<(), FileError> {
        self.file.write_all_at(data, offset).map_err(|e| self.err("write", e))
    }

    /// Makes the data durable (fdatasync).
    pub fn sync_data(&self) -> Result<(), FileError> {
        self.file.sync_data().map_err(|e| self.err("fdatasync", e))
    }

    /// Makes data and metadata durable, and the directory entry of a regular file.
    pub fn sync_all(&self) -> Result<(), FileError> {
        self.file.sync_all().map_err(|e| self.err("fsync", e))?;
        let parent = match self.path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        File::open(parent)
            .and_then(|dir| dir.sync_all())
            .map_err(|e| self.err("fsync of the directory", e))
    }

    fn err(&self, what: &'static str, source: io::Error) -> FileError {
        FileError::Os { path: self.path.clone(), what, source }
    }
}
