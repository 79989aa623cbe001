//! The device as the store sees it while no reactor runs: blocking, for format, open and verify.
//! At run time the store touches no device; it hands out offsets and bytes.

use crate::types::BLOCK;
use std::io;

/// A blocking device. Offsets and lengths are multiples of 4096 and buffers are 4096-aligned, so
/// that `O_DIRECT` files can implement it.
#[allow(clippy::len_without_is_empty, reason = "a device is never empty")]
pub trait OpenDevice {
    /// Bytes of the device.
    fn len(&self) -> io::Result<u64>;
    /// Fills `buf` from `offset`.
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes `buf` at `offset`; durable only after `sync`.
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()>;
    /// Makes every completed write durable (also those of a process that died).
    fn sync(&mut self) -> io::Result<()>;
}

/// Owned bytes whose start is aligned to 4096, as `O_DIRECT` wants them.
pub struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    /// `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let bytes = vec![0u8; len + BLOCK];
        // A Vec never moves its heap block while it is not resized, and this one never is.
        let start = bytes.as_ptr().align_offset(BLOCK);
        assert!(start <= BLOCK, "align_offset of a byte pointer is bounded");
        Self { bytes, start, len }
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}
impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}
impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}
impl AsMut<[u8]> for AlignedBuf {
    fn as_mut(&mut self) -> &mut [u8] {
        self
    }
}
impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

/// One write of `format`.
#[derive(Debug)]
pub struct DeviceWrite {
    /// Device offset, a multiple of 4096.
    pub offset: u64,
    /// Aligned bytes.
    pub bytes: AlignedBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_buffers_are_aligned_and_of_their_length() {
        for len in [0, 1, 4096, 8192, 1 << 20] {
            let b = AlignedBuf::zeroed(len);
            assert_eq!(b.len(), len);
            assert_eq!(b.as_ptr() as usize % BLOCK, 0);
        }
    }
}
