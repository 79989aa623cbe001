//! Whether a block device holds anything, looked at before it is formatted. Reads only.
//!
//! Everything that keeps data on a device says so near its beginning or end: file systems, partition
//! tables, volume groups, arrays, encryption. A device whose first and last 4 MiB are zeros is blank; one
//! byte there makes it somebody's.

use ebb_store::OpenDevice;
use std::io;

/// Bytes looked at, at each end.
const LOOKED_AT: u64 = 4 << 20;
const STEP: usize = 1 << 20;

/// The first thing found on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotBlank {
    /// Byte offset of the first byte that is not zero.
    pub at: u64,
    /// What it looks like.
    pub looks_like: Option<&'static str>,
}

impl std::fmt::Display for NotBlank {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.looks_like {
            Some(what) => write!(f, "it looks like {what}"),
            None => write!(f, "there is something at byte {}", self.at),
        }
    }
}

/// What the well-known owners of devices write at its beginning: offset, bytes, name.
const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (0, b"XFSB", "an XFS file system"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (3, b"NTFS", "an NTFS file system"),
    (512, b"LABELONE", "an LVM physical volume"),
    (512, b"EFI PART", "a partition table (GPT)"),
    (1024, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    (1080, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (4086, b"SWAPSPACE2", "swap space"),
    (4096, b"\xfc\x4e\x2b\xa9", "a member of an MD array"),
    (4096, b"EFI PART", "a partition table (GPT)"),
    (65600, b"_BHRfS_M", "a btrfs file system"),
    (510, b"\x55\xaa", "a partition table or a boot sector"),
];

/// The first byte that is not zero, in the first and last 4 MiB of a device of `bytes`.
pub(crate) fn look(device: &mut dyn OpenDevice, bytes: u64) -> io::Result<Option<NotBlank>> {
    let block = ebb_store::BLOCK as u64;
    let end = bytes / block * block;
    let head = LOOKED_AT.min(end);
    let tail = end.saturating_sub(LOOKED_AT).max(head);
    let mut buf = vec![0u8; STEP];
    for (from, to) in [(0, head), (tail, end)] {
        let mut at = from;
        while at < to {
            let len = (to - at).min(STEP as u64) as usize;
            device.read_at(at, &mut buf[..len])?;
            if let Some(first) = buf[..len].iter().position(|b| *b != 0) {
                let looks_like = if at == 0 { known(&buf[..len]) } else { None };
                return Ok(Some(NotBlank { at: at + first as u64, looks_like }));
            }
            at += len as u64;
        }
    }
    Ok(None)
}

fn known(head: &[u8]) -> Option<&'static str> {
    let is = |at: usize, bytes: &[u8]| head.get(at..).is_some_and(|h| h.starts_with(bytes));
    SIGNATURES.iter().find(|(at, bytes, _)| is(*at, bytes)).map(|(_, _, name)| *name)
}
