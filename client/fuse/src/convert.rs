//! Between the kernel's types and the library's.

use ebb_client::{Attr, ClientError, FileKind, InodeId, OpenFlags, SetAttr, Time, TimeChange};
use fuser::{Errno, FileAttr, FileType, INodeNo, TimeOrNow};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Unit of `st_blocks`.
const SECTOR_BYTES: u64 = 512;
/// Preferred I/O size shown in `st_blksize`.
const IO_BYTES: u32 = 4096;

/// The error's number; what a person should know of is logged here, once.
pub(crate) fn errno(what: &str, e: &ClientError) -> Errno {
    match e.errno() {
        libc::EIO | libc::ENOSPC | libc::EACCES => tracing::error!(what, error = %e, "failed"),
        n => tracing::debug!(what, errno = n, error = %e, "refused"),
    }
    Errno::from_i32(e.errno())
}

pub(crate) fn open_flags(flags: i32) -> OpenFlags {
    OpenFlags {
        write: flags & libc::O_ACCMODE != libc::O_RDONLY,
        truncate: flags & libc::O_TRUNC != 0,
        exclusive: flags & libc::O_EXCL != 0,
    }
}

pub(crate) fn inode(ino: INodeNo) -> InodeId {
    InodeId(ino.0)
}

pub(crate) fn kind(kind: FileKind) -> FileType {
    match kind {
        FileKind::File | FileKind::HardLink => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
    }
}

pub(crate) fn system_time(t: Time) -> SystemTime {
    let distance = Duration::from_nanos(t.0.unsigned_abs());
    let time = match t.0 {
        0.. => UNIX_EPOCH.checked_add(distance),
        _ => UNIX_EPOCH.checked_sub(distance),
    };
    time.unwrap_or(UNIX_EPOCH)
}

pub(crate) fn time(t: SystemTime) -> Time {
    let nanos = |d: Duration| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX);
    Time(match t.duration_since(UNIX_EPOCH) {
        Ok(after) => nanos(after),
        Err(e) => -nanos(e.duration()),
    })
}

pub(crate) fn time_change(t: TimeOrNow) -> TimeChange {
    match t {
        TimeOrNow::Now => TimeChange::Now,
        TimeOrNow::SpecificTime(t) => TimeChange::At(time(t)),
    }
}

pub(crate) fn set_attr(
    mode: Option<u32>,
    uid: Option<u32>,
    gid: Option<u32>,
    size: Option<u64>,
    atime: Option<TimeOrNow>,
    mtime: Option<TimeOrNow>,
) -> SetAttr {
    SetAttr {
        mode: mode.map(|m| m & 0o7777),
        uid,
        gid,
        size,
        atime: atime.map(time_change),
        mtime: mtime.map(time_change),
    }
}

pub(crate) fn attr(a: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(a.inode.0),
        size: a.size,
        blocks: a.size.div_ceil(SECTOR_BYTES),
        atime: system_time(a.atime),
        mtime: system_time(a.mtime),
        ctime: system_time(a.ctime),
        crtime: UNIX_EPOCH,
        kind: kind(a.kind),
        perm: (a.mode & 0o7777) as u16,
        nlink: a.nlink,
        uid: a.uid,
        gid: a.gid,
        rdev: 0,
        blksize: IO_BYTES,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_round_trip_also_before_1970() {
        for t in [0, 1, -1, 1_700_000_000_123_456_789, -5_000_000_000, i64::MAX] {
            assert_eq!(time(system_time(Time(t))), Time(t), "{t}");
        }
    }
}
