//! Segment files: how they are named, made, found and removed.
//!
//! A segment comes into being whole: zero-filled and with its header under a temporary name, synced,
//! renamed, its directory synced. Zero-filling ahead is what keeps an append's sync free of file
//! system metadata.

use super::super::disk::{Disk, Open};
use super::appender::Appender;
use super::frame::{SEGMENT_HEADER_BYTES, SegmentHeader};
use std::io;
use std::path::{Path, PathBuf};

/// Name of a segment that is filled but not yet in use.
const SPARE: &str = "spare.tmp";

/// The path of a segment.
pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016x}.log"))
}

/// The numbers of the segments in a directory, ascending. Other files are left alone.
pub(super) fn list(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for path in disk.list(dir)? {
        let number = path
            .file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.strip_suffix(".log"))
            .filter(|n| n.len() == 16)
            .and_then(|n| u64::from_str_radix(n, 16).ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Fills a spare segment with zeros. Idempotent; the content is overwritten by [`create`].
pub(super) fn prepare_spare(disk: &dyn Disk, dir: &Path, bytes: u64) -> io::Result<()> {
    let file = disk.open(&dir.join(SPARE), Open::Create)?;
    let zeros = vec![0u8; bytes.min(1 << 20) as usize];
    let mut at = 0;
    while at < bytes {
        let n = (bytes - at).min(zeros.len() as u64) as usize;
        file.write_at(&zeros[..n], at)?;
        at += n as u64;
    }
    file.sync()
}

/// Makes a segment durable under its name, from the spare if there is a whole one.
pub(super) fn create(
    disk: &dyn Disk,
    dir: &Path,
    header: &SegmentHeader,
    bytes: u64,
) -> io::Result<Appender> {
    let spare = dir.join(SPARE);
    if disk.open(&spare, Open::Read).and_then(|f| f.bytes()).map_or(true, |len| len < bytes) {
        prepare_spare(disk, dir, bytes)?;
    }
    let file = disk.open(&spare, Open::Write)?;
    file.write_at(&header.encode(), 0)?;
    file.sync()?;
    disk.rename(&spare, &path(dir, header.number))?;
    disk.sync_dir(dir)?;
    Appender::open(disk, &path(dir, header.number), SEGMENT_HEADER_BYTES as u64)
}

/// Removes a segment; one that is gone already is no error.
pub(super) fn remove(disk: &dyn Disk, dir: &Path, number: u64) -> io::Result<()> {
    match disk.remove(&path(dir, number)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
