//! Snapshots as immutable files: written under a temporary name, synced, renamed, the directory
//! synced; the older one goes after that.
//!
//! ```text
//! 0 "EBBSNAP2"  8 u32 bytes of the description  12 u32 its CRC-32C  16 description (JSON)
//! then pairs:   u32 key bytes, u32 value bytes, key, value
//! then the end: u32 0xffff_ffff, u32 CRC-32C of all pairs, u64 number of pairs
//! ```

use super::SnapshotMeta;
use super::disk::{self, Disk, DiskFile, Open};
use bytes::Bytes;
use ebb_dataplane_protocol::crc32c;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8; 8] = b"EBBSNAP2";
const END: u32 = u32::MAX;
/// Longest key or value of the state machine; a longer claim is damage.
const FIELD_BYTES_MAX: u32 = 64 << 20;

/// A complete snapshot file. Stays readable while it is held, also after a newer one replaced it.
#[derive(Clone, Debug)]
pub struct SnapshotFile {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    bytes: u64,
}

fn damaged(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the snapshot is damaged: {what}"))
}

impl SnapshotFile {
    /// Opens a file; its content is checked when it is read.
    pub fn open(disk: &Arc<dyn Disk>, path: PathBuf) -> io::Result<Self> {
        let file = disk.open(&path, Open::Read)?;
        let bytes = file.bytes()?;
        Ok(Self { disk: Arc::clone(disk), path, file, bytes })
    }
    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
    /// Where it is, or was.
    pub fn path(&self) -> &Path {
        &self.path
    }
    /// A piece of it.
    pub async fn read_piece(&self, offset: u64, bytes: usize) -> io::Result<Bytes> {
        let file = Arc::clone(&self.file);
        let read = move || {
            let mut piece = vec![0; bytes];
            file.read_at(&mut piece, offset).map(|()| Bytes::from(piece))
        };
        disk::work(&*self.disk, read).await?
    }
    /// What it covers.
    pub fn meta(&self) -> io::Result<SnapshotMeta> {
        let mut head = [0u8; 16];
        self.file.read_at(&mut head, 0)?;
        if &head[..8] != MAGIC {
            return Err(damaged("not a snapshot"));
        }
        let length = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
        let crc = u32::from_le_bytes([head[12], head[13], head[14], head[15]]);
        if u64::from(length) > self.bytes {
            return Err(damaged("its description is cut off"));
        }
        let mut json = vec![0; length as usize];
        self.file.read_at(&mut json, 16)?;
        if crc32c(&json) != crc {
            return Err(damaged("its description does not match its checksum"));
        }
        serde_json::from_slice(&json).map_err(damaged)
    }
    /// Gives every pair to `take`; fails at the end if the whole does not match its checksum, so
    /// nothing that was taken may be kept before this returns.
    pub fn read_pairs(
        &self,
        mut take: impl FnMut(&[u8], &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let at = At { file: &*self.file, offset: 0, bytes: self.bytes };
        let mut from = BufReader::with_capacity(self.bytes.min(1 << 20) as usize, at);
        let mut head = [0u8; 16];
        from.read_exact(&mut head)?;
        let length = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
        io::copy(&mut from.by_ref().take(length.into()), &mut io::sink())?;
        let mut crc = Checksum::new();
        let (mut key, mut value) = (Vec::new(), Vec::new());
        let mut count = 0u64;
        loop {
            let mut lengths = [0u8; 8];
            from.read_exact(&mut lengths)?;
            let word = |i: usize| {
                u32::from_le_bytes([lengths[i], lengths[i + 1], lengths[i + 2], lengths[i + 3]])
            };
            let (k, v) = (word(0), word(4));
            if k == END {
                let mut tail = [0u8; 8];
                from.read_exact(&mut tail)?;
                if crc.value() != v || u64::from_le_bytes(tail) != count {
                    return Err(damaged("its content does not match its checksum"));
                }
                return Ok(());
            }
            if k > FIELD_BYTES_MAX || v > FIELD_BYTES_MAX {
                return Err(damaged("an absurd length"));
            }
            key.resize(k as usize, 0);
            value.resize(v as usize, 0);
            from.read_exact(&mut key)?;
            from.read_exact(&mut value)?;
            crc.update(&lengths);
            crc.update(&key);
            crc.update(&value);
            count += 1;
            take(&key, &value)?;
        }
    }
}

/// Sequential reading of a shared file.
struct At<'a> {
    file: &'a dyn DiskFile,
    offset: u64,
    bytes: u64,
}

impl Read for At<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = (self.bytes - self.offset).min(into.len() as u64) as usize;
        self.file.read_at(&mut into[..n], self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}

/// Sequential writing of a file.
struct End {
    file: Arc<dyn DiskFile>,
    offset: u64,
}

impl Write for End {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_at(bytes, self.offset)?;
        self.offset += bytes.len() as u64;
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Checksum(crc_fast::Digest);

impl Checksum {
    fn new() -> Self {
        Self(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi))
    }
    fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    fn value(&self) -> u32 {
        // CRC-32C fits 32 bits; the library's common type is wider.
        self.0.finalize() as u32
    }
}

/// A snapshot being written.
pub(super) struct SnapshotWriter {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    name: String,
    out: BufWriter<End>,
    crc: Checksum,
    count: u64,
}

fn temporary(dir: &Path) -> PathBuf {
    dir.join("building.tmp")
}

impl SnapshotWriter {
    pub(super) fn create(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        meta: &SnapshotMeta,
    ) -> io::Result<Self> {
        let json = serde_json::to_vec(meta).map_err(io::Error::other)?;
        let file = disk.open(&temporary(dir), Open::Create)?;
        let mut out = BufWriter::with_capacity(1 << 20, End { file, offset: 0 });
        out.write_all(MAGIC)?;
        out.write_all(&(json.len() as u32).to_le_bytes())?;
        out.write_all(&crc32c(&json).to_le_bytes())?;
        out.write_all(&json)?;
        let (disk, dir, name) = (Arc::clone(disk), dir.to_owned(), name(meta));
        Ok(Self { disk, dir, name, out, crc: Checksum::new(), count: 0 })
    }

    pub(super) fn pair(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        let mut lengths = [0u8; 8];
        lengths[..4].copy_from_slice(&(key.len() as u32).to_le_bytes());
        lengths[4..].copy_from_slice(&(value.len() as u32).to_le_bytes());
        for part in [&lengths[..], key, value] {
            self.crc.update(part);
            self.out.write_all(part)?;
        }
        self.count += 1;
        Ok(())
    }

    /// Makes it durable and current.
    pub(super) fn finish(mut self) -> io::Result<SnapshotFile> {
        self.out.write_all(&END.to_le_bytes())?;
        self.out.write_all(&self.crc.value().to_le_bytes())?;
        self.out.write_all(&self.count.to_le_bytes())?;
        let file = self.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.file.sync()?;
        publish(&self.disk, &self.dir, &temporary(&self.dir), &self.name)
    }
}

fn name(meta: &SnapshotMeta) -> String {
    let (index, term) = meta.last_log_id.map_or((0, 0), |id| (id.index, id.leader_id.term));
    format!("{index:016x}-{term:016x}.snapshot")
}

fn publish(disk: &Arc<dyn Disk>, dir: &Path, from: &Path, name: &str) -> io::Result<SnapshotFile> {
    let path = dir.join(name);
    disk.rename(from, &path)?;
    disk.sync_dir(dir)?;
    for old in list(&**disk, dir)? {
        if old != path {
            disk.remove(&old)?;
        }
    }
    SnapshotFile::open(disk, path)
}

/// Makes a received and synced file the current snapshot.
pub(super) fn adopt(dir: &Path, from: &SnapshotFile, meta: &SnapshotMeta) -> io::Result<()> {
    let target = dir.join(name(meta));
    if from.path() == target {
        return Ok(());
    }
    from.file.sync()?;
    publish(&from.disk, dir, from.path(), &name(meta)).map(drop)
}

/// The snapshots of a directory, the newest last.
fn list(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = disk.list(dir)?;
    found.retain(|path| path.extension().is_some_and(|e| e == "snapshot"));
    Ok(found)
}

/// The newest snapshot of a directory.
pub(super) fn current(disk: &Arc<dyn Disk>, dir: &Path) -> io::Result<Option<SnapshotFile>> {
    list(&**disk, dir)?.pop().map(|path| SnapshotFile::open(disk, path)).transpose()
}

/// A snapshot arriving from a leader, piece by piece, under a temporary name.
pub struct Incoming {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    /// What it covers.
    pub meta: SnapshotMeta,
    received: u64,
    total: u64,
}

impl Incoming {
    /// Begins one; a half received older one is overwritten.
    pub fn begin(
        disk: &Arc<dyn Disk>,
        dir: &Path,
        meta: SnapshotMeta,
        total: u64,
    ) -> io::Result<Self> {
        let path = dir.join("incoming.tmp");
        let file = disk.open(&path, Open::Create)?;
        Ok(Self { disk: Arc::clone(disk), path, file, meta, received: 0, total })
    }
    /// Takes the next piece; `true` when it was the last.
    pub fn piece(&mut self, offset: u64, bytes: &[u8]) -> io::Result<bool> {
        if offset != self.received || bytes.len() as u64 > self.total - self.received {
            return Err(damaged(format!("a piece at {offset}, expected {}", self.received)));
        }
        self.file.write_at(bytes, offset)?;
        self.received += bytes.len() as u64;
        Ok(self.received == self.total)
    }
    /// The whole file, synced.
    pub fn finish(self) -> io::Result<SnapshotFile> {
        self.file.sync()?;
        SnapshotFile::open(&self.disk, self.path)
    }
}
