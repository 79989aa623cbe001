//! The spill devices of a node, files or block devices: whose they are, and refused when they are somebody
//! else's (I5), with the reason and what to do about it.
//!
//! The tier starts empty, so all that is on such a device for good is its first block: magic, version, cluster,
//! core ([docs/FORMAT.md](../../docs/FORMAT.md)). A file of the same cluster and core that no process has open is
//! taken again, whichever node wrote it: nobody misses what is in it.

use crate::blank::{self, NotBlank};
use crate::core::{SPILL_BYTES_MIN, SPILL_LOG_AT};
use crate::shards::{BlockingDevice, open_device};
use ebb_dataplane_protocol::ClusterId;
use ebb_dataplane_protocol::checksum::crc32c;
use ebb_ring::{DeviceFile, FileError, OpenMode};
use ebb_store::{BLOCK, OpenDevice};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why a spill device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpillError {
    /// The place that was named.
    #[error("cannot use {place} for the spill tier: {source}")]
    Place {
        /// Which.
        place: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file, a pipe, anything else.
    #[error(
        "{place}: neither a directory nor a block device; `spill` names directories, in which the node makes \
         files of its own, or block devices"
    )]
    NotAPlace {
        /// Which.
        place: PathBuf,
    },
    /// A block device for several cores.
    #[error(
        "{place}: one block device for several cores; `spill` has to name a device, or a directory, for each core"
    )]
    Shared {
        /// Which.
        place: PathBuf,
    },
    /// Not worth it.
    #[error(
        "{path}: {bytes} bytes for the spill tier of a core; at least {SPILL_BYTES_MIN} are needed"
    )]
    TooSmall {
        /// Which.
        path: PathBuf,
        /// How many.
        bytes: u64,
    },
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Reading or writing its first block, or looking at the device.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
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
    /// A file that holds something.
    #[error(
        "{path}: {reason}. It is left as it is: correct the path, or remove the file if nobody needs it"
    )]
    NotOurs {
        /// Which.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
}

const MAGIC: [u8; 8] = *b"EBBSPILL";
const VERSION: u32 = 1;
const CRC_AT: usize = BLOCK - 4;
/// How long a device that another process has locked is waited for.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// The first block.
fn header(cluster: ClusterId, core: u16) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    block[..8].copy_from_slice(&MAGIC);
    block[8..12].copy_from_slice(&VERSION.to_le_bytes());
    block[12..14].copy_from_slice(&core.to_le_bytes());
    block[16..32].copy_from_slice(&cluster.0.to_le_bytes());
    let crc = crc32c(&block[..CRC_AT]);
    block[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    block
}

/// Why a first block is not this core's.
fn why_not(block: &[u8], cluster: ClusterId, core: u16) -> Option<String> {
    let ours = header(cluster, core);
    if block == ours {
        return None;
    }
    let number =
        |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    Some(if block[..8] != MAGIC {
        "it is not a spill file".into()
    } else if number(8) != VERSION {
        format!(
            "it is a spill file of version {}, this program writes version {VERSION}",
            number(8)
        )
    } else if number(CRC_AT) != crc32c(&block[..CRC_AT]) {
        "it looks like a spill file, and is damaged".into()
    } else if block[16..32] != ours[16..32] {
        format!("it is a spill file of another cluster than {cluster}")
    } else {
        format!("it is the spill file of core {}, not of core {core}", number(12) & 0xffff)
    })
}

/// Opens the spill device of a core, or makes it. `place`: a directory, which is made if it is missing, or a
/// block device, which is used whole. `bytes`: of a file. `shared`: other cores use the place, too. Answers the
/// device, locked, and the bytes of it that are used.
pub(crate) fn open(
    place: &Path,
    core: u16,
    bytes: u64,
    cluster: ClusterId,
    shared: bool,
) -> Result<(DeviceFile, u64), SpillError> {
    use std::os::unix::fs::FileTypeExt;
    let fail = |source| SpillError::Place { place: place.to_owned(), source };
    let kind = match std::fs::metadata(place) {
        Ok(found) => found.file_type(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            // Not its parents: a disk that is not mounted would go unnoticed.
            std::fs::create_dir(place).map_err(fail)?;
            std::fs::metadata(place).map_err(fail)?.file_type()
        }
        Err(e) => return Err(fail(e)),
    };
    if kind.is_dir() {
        open_file(&place.join(format!("spill-{core}.ebb")), core, bytes, cluster)
    } else if !kind.is_block_device() {
        Err(SpillError::NotAPlace { place: place.to_owned() })
    } else if shared {
        Err(SpillError::Shared { place: place.to_owned() })
    } else {
        open_block(place, core, cluster)
    }
}

fn open_file(
    path: &Path,
    core: u16,
    bytes: u64,
    cluster: ClusterId,
) -> Result<(DeviceFile, u64), SpillError> {
    let bytes = bytes / BLOCK as u64 * BLOCK as u64;
    check_size(path, bytes)?;
    let there = path.try_exists().map_err(|source| SpillError::Io { path: path.into(), source })?;
    let file = match there {
        true => open_device(path, LOCK_PATIENCE)?,
        false => DeviceFile::open(path, OpenMode::CreateNew)?,
    };
    // One of no bytes was made by a start that ended there.
    let size = file.size()?;
    if size == 0 {
        claim(&file, cluster, core)?;
    } else if let Some(reason) = look(&file, size, cluster, core)? {
        return Err(SpillError::NotOurs { path: path.into(), reason });
    }
    // A hole would cost the file system an allocation at each write, and one of them would find it full.
    file.reserve(bytes)?;
    Ok((file, bytes))
}

fn open_block(path: &Path, core: u16, cluster: ClusterId) -> Result<(DeviceFile, u64), SpillError> {
    let file = open_device(path, LOCK_PATIENCE)?;
    let bytes = file.size()? / BLOCK as u64 * BLOCK as u64;
    check_size(path, bytes)?;
    if let Some(reason) = look(&file, bytes, cluster, core)? {
        let (mut first, io) = (vec![0; 8], |source| SpillError::Io { path: path.into(), source });
        let mut device = BlockingDevice(&file);
        read_first(&mut device, &mut first).map_err(io)?;
        if first == MAGIC {
            return Err(SpillError::NotOurs { path: path.into(), reason });
        }
        if let Some(found) = blank::look(&mut device, bytes).map_err(io)? {
            return Err(SpillError::NotBlank { path: path.into(), found });
        }
        claim(&file, cluster, core)?;
    }
    Ok((file, bytes))
}

fn check_size(path: &Path, bytes: u64) -> Result<(), SpillError> {
    match bytes < SPILL_BYTES_MIN {
        true => Err(SpillError::TooSmall { path: path.to_owned(), bytes }),
        false => Ok(()),
    }
}

fn read_first(device: &mut BlockingDevice<'_>, out: &mut [u8]) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    device.read_at(0, &mut block)?;
    out.copy_from_slice(&block[..out.len()]);
    Ok(())
}

fn look(
    file: &DeviceFile,
    bytes: u64,
    cluster: ClusterId,
    core: u16,
) -> Result<Option<String>, SpillError> {
    if bytes < BLOCK as u64 {
        return Ok(Some("it is not a spill file".into()));
    }
    let mut block = vec![0; BLOCK];
    read_first(&mut BlockingDevice(file), &mut block)
        .map_err(|source| SpillError::Io { path: file.path().to_owned(), source })?;
    Ok(why_not(&block, cluster, core))
}

fn claim(file: &DeviceFile, cluster: ClusterId, core: u16) -> Result<(), SpillError> {
    let mut device = BlockingDevice(file);
    device
        .write_at(0, &header(cluster, core))
        .and_then(|()| device.sync())
        .map_err(|source| SpillError::Io { path: file.path().to_owned(), source })
}

const _: () = assert!(SPILL_LOG_AT >= BLOCK as u64);

#[cfg(test)]
mod tests {
    use super::*;

    const MINE: ClusterId = ClusterId(5);

    fn refused(place: &Path, core: u16, bytes: u64, cluster: ClusterId) -> String {
        open(place, core, bytes, cluster, false).expect_err("refused").to_string()
    }

    #[test]
    fn a_spill_file_is_made_once_taken_again_and_nobody_elses() {
        let dir = tempfile::tempdir().expect("tempdir");
        let place = dir.path().join("disk");
        let size = SPILL_BYTES_MIN;
        let missing = dir.path().join("not/there");
        assert!(refused(&missing, 0, size, MINE).contains("No such file"));
        assert!(refused(&place, 0, size - 1, MINE).contains("at least 16777216 are needed"));
        let (file, bytes) = open(&place, 0, size, MINE, true).expect("made");
        assert_eq!((bytes, file.size().expect("size")), (size, size));
        drop(file);
        // Another size is no other file.
        for size in [2 * size, size] {
            let (file, _) = open(&place, 0, size, MINE, true).expect("taken again");
            assert_eq!(file.size().expect("size"), size);
        }
        assert!(refused(&place, 0, size, ClusterId(6)).contains("another cluster"));
        std::fs::rename(place.join("spill-0.ebb"), place.join("spill-3.ebb")).expect("renamed");
        assert!(refused(&place, 3, size, MINE).contains("of core 0, not of core 3"));
        let path = place.join("spill-3.ebb");
        let sound = std::fs::read(&path).expect("read");
        let mut bytes = sound.clone();
        bytes[8] = 9;
        std::fs::write(&path, &bytes).expect("written");
        assert!(refused(&place, 3, size, MINE).contains("version 9"));
        bytes = sound;
        bytes[40] = 1;
        std::fs::write(&path, &bytes).expect("written");
        assert!(refused(&place, 3, size, MINE).contains("damaged"));
        for other in [&b"a thesis"[..], &[7; 5000]] {
            std::fs::write(&path, other).expect("written");
            let said = refused(&place, 3, size, MINE);
            assert!(said.contains("not a spill file") && said.contains("left as it is"), "{said}");
            assert_eq!(std::fs::read(&path).expect("read"), other, "untouched");
        }
        assert!(refused(&path, 0, size, MINE).contains("neither a directory nor"));
        std::fs::write(&path, b"").expect("emptied");
        open(&place, 3, size, MINE, true).expect("one of no bytes is nobody's");
    }
}
