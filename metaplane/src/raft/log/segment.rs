//! Segment files: how they are named, made, found and removed.
//!
//! A segment comes into being whole: zero-filled and with its header under a temporary name, synced,
//! renamed, its directory synced. Zero-filling ahead is what keeps an append's sync free of file
//! system metadata.

use super::appender::Appender;
use super::frame::{SEGMENT_HEADER_BYTES, SegmentHeader};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Name of a segment that is filled but not yet in use.
const SPARE: &str = "spare.tmp";

/// The path of a segment.
pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016x}.log"))
}

/// Makes changes of a directory's entries durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The numbers of the segments in a directory, ascending. Other files are left alone.
pub(super) fn list(dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        let number = name
            .to_str()
            .and_then(|n| n.strip_suffix(".log"))
            .filter(|n| n.len() == 16)
            .and_then(|n| u64::from_str_radix(n, 16).ok());
        numbers.extend(number);
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Fills a spare segment with zeros. Idempotent; the content is overwritten by [`create`].
pub(super) fn prepare_spare(dir: &Path, bytes: u64) -> io::Result<()> {
    let file = OpenOptions::new().create(true).truncate(true).write(true).open(dir.join(SPARE))?;
    let zeros = vec![0u8; 1 << 20];
    let mut at = 0;
    while at < bytes {
        let n = (bytes - at).min(zeros.len() as u64) as usize;
        file.write_all_at(&zeros[..n], at)?;
        at += n as u64;
    }
    file.sync_all()
}

/// Makes a segment durable under its name, from the spare if there is a whole one.
pub(super) fn create(dir: &Path, header: &SegmentHeader, bytes: u64) -> io::Result<Appender> {
    let spare = dir.join(SPARE);
    if std::fs::metadata(&spare).map_or(true, |m| m.len() < bytes) {
        prepare_spare(dir, bytes)?;
    }
    let file = OpenOptions::new().read(true).write(true).open(&spare)?;
    file.write_all_at(&header.encode(), 0)?;
    file.sync_all()?;
    std::fs::rename(&spare, path(dir, header.number))?;
    sync_dir(dir)?;
    Appender::open(&path(dir, header.number), SEGMENT_HEADER_BYTES as u64)
}

/// Removes a segment; one that is gone already is no error.
pub(super) fn remove(dir: &Path, number: u64) -> io::Result<()> {
    match std::fs::remove_file(path(dir, number)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
