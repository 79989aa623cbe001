//! Appends to a segment file so that each append is stable when it returns.
//!
//! With `O_DIRECT | O_DSYNC` an append is one device write with forced unit access instead of a
//! write and a flush of the device's cache, about half the time. It needs whole, aligned blocks: the
//! last block, partly filled, is kept here and written again with what follows. Its earlier bytes do
//! not change by that, so a torn write of it cannot damage them. Where a file system has no direct
//! I/O (tmpfs, some network file systems), appends go through the page cache and `fdatasync`.

use super::super::disk::{Disk, DiskFile, Open};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Unit of direct I/O; no device in use has a larger logical block.
const BLOCK: usize = 4096;

/// A segment file and the place of its next byte.
#[derive(Debug)]
pub(super) struct Appender {
    file: Arc<dyn DiskFile>,
    direct: bool,
    /// Offset of the next byte.
    at: u64,
    /// From the start of the block that holds `at`; see [`Aligned`].
    buffer: Aligned,
}

/// Bytes that start at a multiple of [`BLOCK`] in memory.
#[derive(Debug)]
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    /// Room for `len` bytes, zeros.
    fn zeros(len: usize) -> Self {
        let bytes = vec![0; len + BLOCK];
        let start = bytes.as_ptr().align_offset(BLOCK).min(BLOCK);
        Self { bytes, start }
    }

    fn room(&self) -> usize {
        self.bytes.len() - BLOCK
    }

    fn get_mut(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + len]
    }
}

impl Appender {
    /// Opens a segment to append at `at`. What lies behind `at` must be zeros.
    pub(super) fn open(disk: &dyn Disk, path: &Path, at: u64) -> io::Result<Self> {
        let kept = (at % BLOCK as u64) as usize;
        let mut buffer = Aligned::zeros(16 * BLOCK);
        let plain = disk.open(path, Open::Write)?;
        plain.read_at(&mut buffer.get_mut(kept)[..], at - kept as u64)?;
        let (file, direct) = match disk.open(path, Open::Stable) {
            Ok(file) => (file, true),
            Err(e) if e.raw_os_error() == Some(nix::errno::Errno::EINVAL as i32) => (plain, false),
            Err(e) => return Err(e),
        };
        Ok(Self { file, direct, at, buffer })
    }

    /// Offset of the next byte.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Appends; stable when it returns `Ok`. After an error nobody knows what the file holds.
    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if !self.direct {
            self.file.write_at(bytes, self.at)?;
            self.file.sync_data()?;
            self.at += bytes.len() as u64;
            return Ok(());
        }
        let kept = (self.at % BLOCK as u64) as usize;
        let end = kept + bytes.len();
        let whole = end.next_multiple_of(BLOCK);
        if whole > self.buffer.room() {
            let mut larger = Aligned::zeros(whole.next_power_of_two());
            larger.get_mut(kept).copy_from_slice(self.buffer.get_mut(kept));
            self.buffer = larger;
        }
        let blocks = self.buffer.get_mut(whole);
        blocks[kept..end].copy_from_slice(bytes);
        blocks[end..].fill(0);
        self.file.write_at(blocks, self.at - kept as u64)?;
        let last = end / BLOCK * BLOCK;
        blocks.copy_within(last..end, 0);
        self.at += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::disk::Machine;
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn appends_of_any_size_follow_each_other_and_leave_zeros_behind() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("segment");
        std::fs::write(&path, vec![0u8; 64 * BLOCK]).expect("file");
        let mut want = vec![7u8; 64];
        std::fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|f| f.write_all_at(&want, 0))
            .expect("header");
        let mut appender = Appender::open(&Machine, &path, 64).expect("opens");
        for (i, len) in [8, 4024, 8, 4096, 1, 70_000, 4095, 0, 8192].into_iter().enumerate() {
            if i % 3 == 2 {
                let at = appender.at();
                appender = Appender::open(&Machine, &path, at).expect("opens again");
            }
            let bytes: Vec<u8> = (0..len).map(|b| (b % 251) as u8 + i as u8 % 4).collect();
            appender.append(&bytes).expect("appends");
            want.extend_from_slice(&bytes);
            assert_eq!(appender.at(), want.len() as u64);
        }
        let have = std::fs::read(&path).expect("reads");
        assert!(have[..want.len()] == want[..]);
        assert!(have[want.len()..].iter().all(|&b| b == 0));
    }
}
