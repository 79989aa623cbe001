//! Staging: a body on its way in becomes a finished, synced file that nothing refers to yet.
//!
//! Header, body, sync, all under `tmp/`; committing is a rename by whoever holds the key's lock.
//! What is staged and never committed is deleted, at once or at the next start. Memory is bounded:
//! small bodies are written in one go, larger ones through a short queue to a blocking thread.
//! A body that is short, long, or not what its checksums say is refused before it can be seen.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt;
use md5::{Digest, Md5};
use s3s::{
    S3Result, TrailingHeaders,
    checksum::ChecksumHasher,
    crypto::Checksum as _,
    dto::{Checksum, StreamingBlob},
    s3_error,
};
use tokio::sync::{Semaphore, mpsc};

use super::{
    durable::blocking,
    format::{self, Head},
    internal,
};

/// Up to here a body is gathered in memory and written at once.
const GATHER_BYTES_MAX: u64 = 1024 * 1024;
/// Pieces on their way to the writing thread, per upload.
const QUEUE_PIECES: usize = 8;
/// Large bodies on their way in at once. Each holds a blocking thread; what is left of those
/// (tokio has 512) is for everything else.
const STREAMS_MAX: usize = 64;
/// A client that sends nothing for so long is given up.
const BODY_IDLE: Duration = Duration::from_secs(60);
const COPY_BUFFER_BYTES: usize = 256 * 1024;
/// S3's own limit for one PUT or part.
pub(super) const BODY_BYTES_MAX: u64 = 5 * 1024 * 1024 * 1024;

/// A file that is whole and synced but not yet named. Deleted when dropped uncommitted.
pub(super) struct Staged {
    path: PathBuf,
    pub(super) head: Head,
    committed: bool,
}

impl Staged {
    /// Gives the file its name. Durable once the folder of `to` was synced.
    pub(super) fn rename(mut self, to: &Path) -> io::Result<Head> {
        fs::rename(&self.path, to)?;
        self.committed = true;
        Ok(self.head.clone())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.committed {
            // Left behind on failure, it is swept at the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What the client says of the body it sends.
#[derive(Default)]
pub(super) struct Claims {
    pub(super) length: Option<i64>,
    pub(super) md5: Option<String>,
    pub(super) checksum: Checksum,
    pub(super) trailers: Option<TrailingHeaders>,
}

/// Where bytes of an assembled body come from.
pub(super) enum Source {
    /// A range of a file's bytes.
    Range(File, std::ops::Range<u64>),
    /// The body of a part, which has to be the one that was named.
    Part { path: PathBuf, etag: std::sync::Arc<str>, size: u64 },
}

impl Source {
    fn open(self) -> io::Result<(File, std::ops::Range<u64>)> {
        match self {
            Source::Range(file, range) => Ok((file, range)),
            Source::Part { path, etag, size } => {
                let file = File::open(path)?;
                match format::read(&file) {
                    Ok((head, offset)) if *head.etag == *etag && head.size == size => {
                        Ok((file, offset..offset + size))
                    }
                    Ok(_) => Err(io::Error::other("the part is not the one that was uploaded")),
                    Err(e) => Err(io::Error::other(e)),
                }
            }
        }
    }
}

/// The folder of one bucket's unfinished files.
pub(super) struct Staging {
    dir: PathBuf,
    next: AtomicU64,
    streams: Semaphore,
}

/// A file being written.
struct Writer {
    file: File,
    path: PathBuf,
    offset: u64,
    size: u64,
    md5: Md5,
    checks: ChecksumHasher,
    done: bool,
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Writer {
    fn create(path: PathBuf, head: &Head, checks: ChecksumHasher) -> io::Result<Self> {
        let offset = u64::from(format::reserve(head)?);
        let mut file = File::options().read(true).write(true).create_new(true).open(&path)?;
        file.seek(SeekFrom::Start(offset))?;
        Ok(Self { file, path, offset, size: 0, md5: Md5::new(), checks, done: false })
    }

    fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.file.write_all(piece)?;
        self.md5.update(piece);
        self.checks.update(piece);
        self.size += piece.len() as u64;
        Ok(())
    }

    /// Header in, everything on disk. The etag is the body's MD5 unless `head` has one already.
    fn finish(mut self, mut head: Head) -> io::Result<(Staged, [u8; 16], Checksum)> {
        let digest: [u8; 16] = std::mem::take(&mut self.md5).finalize().into();
        if head.etag.is_empty() {
            head.etag = hex::encode(digest);
        }
        head.size = self.size;
        let offset = u32::try_from(self.offset).map_err(io::Error::other)?;
        self.file.write_all_at(&format::encode(&head, offset)?, 0)?;
        self.file.sync_data()?;
        self.done = true;
        let checks = std::mem::take(&mut self.checks).finalize();
        Ok((Staged { path: self.path.clone(), head, committed: false }, digest, checks))
    }
}

impl Staging {
    /// Empties what a crash left behind.
    pub(super) fn open(dir: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&dir)?;
        let mut swept = 0;
        for entry in fs::read_dir(&dir)? {
            fs::remove_file(entry?.path())?;
            swept += 1;
        }
        if swept > 0 {
            tracing::info!(swept, dir = %dir.display(), "removed unfinished uploads of a crash");
        }
        Ok(Self { dir, next: AtomicU64::new(0), streams: Semaphore::new(STREAMS_MAX) })
    }

    fn path(&self) -> PathBuf {
        self.dir.join(self.next.fetch_add(1, Ordering::Relaxed).to_string())
    }

    /// Takes in a body from the network.
    pub(super) async fn receive(
        &self,
        head: Head,
        body: Option<StreamingBlob>,
        claims: Claims,
    ) -> S3Result<Staged> {
        let expected = match claims.length.map(u64::try_from) {
            None => None,
            Some(Ok(n)) if n <= BODY_BYTES_MAX => Some(n),
            Some(Ok(_)) => return Err(s3_error!(EntityTooLarge)),
            Some(Err(_)) => return Err(s3_error!(InvalidArgument, "negative length")),
        };
        let checks = hasher_for(&claims);
        let path = self.path();
        let (staged, digest, sums) = match expected {
            Some(n) if n <= GATHER_BYTES_MAX => {
                let mut pieces: Vec<Bytes> = Vec::new();
                let mut size = 0;
                if let Some(mut body) = body {
                    while let Some(piece) = next_piece(&mut body).await? {
                        size += piece.len() as u64;
                        if size > n {
                            return Err(s3_error!(IncompleteBody, "body longer than declared"));
                        }
                        pieces.push(piece);
                    }
                }
                check_length(size, expected)?;
                blocking(move || {
                    let mut writer = Writer::create(path, &head, checks)?;
                    pieces.iter().try_for_each(|piece| writer.write(piece))?;
                    writer.finish(head)
                })
                .await
                .map_err(|e| internal("write an object", e))?
            }
            _ => self.stream(path, head, body, expected, checks).await?,
        };
        verify(&claims, &digest, &sums)?;
        Ok(staged)
    }

    async fn stream(
        &self,
        path: PathBuf,
        head: Head,
        body: Option<StreamingBlob>,
        expected: Option<u64>,
        checks: ChecksumHasher,
    ) -> S3Result<(Staged, [u8; 16], Checksum)> {
        let _permit = self
            .streams
            .acquire()
            .await
            .map_err(|e| internal("take in a body", io::Error::other(e)))?;
        let (queue, mut pieces) = mpsc::channel::<Bytes>(QUEUE_PIECES);
        // Set by the sender once the whole body came; without it the queue's end means a failure.
        let (whole, is_whole) = std::sync::mpsc::channel::<()>();
        let writing = tokio::spawn(blocking(move || {
            let mut writer = Writer::create(path, &head, checks)?;
            while let Some(piece) = pieces.blocking_recv() {
                writer.write(&piece)?;
            }
            match is_whole.try_recv() {
                Ok(()) => writer.finish(head).map(Some),
                Err(_) => Ok(None),
            }
        }));
        let mut size = 0;
        let mut failure = None;
        if let Some(mut body) = body {
            loop {
                let piece = match next_piece(&mut body).await {
                    Ok(Some(piece)) => piece,
                    Ok(None) => break,
                    Err(e) => {
                        failure = Some(e);
                        break;
                    }
                };
                size += piece.len() as u64;
                if size > expected.unwrap_or(BODY_BYTES_MAX) {
                    failure = Some(s3_error!(IncompleteBody, "body longer than declared"));
                    break;
                }
                if queue.send(piece).await.is_err() {
                    // The writer failed; its own error comes below.
                    break;
                }
            }
        }
        if failure.is_none() {
            failure = check_length(size, expected).err();
        }
        if failure.is_none() {
            let _ = whole.send(());
        }
        drop((queue, whole));
        let written = writing.await.map_err(io::Error::other).and_then(|r| r);
        match (failure, written) {
            (Some(failure), Ok(_)) => Err(failure),
            (_, Err(e)) => Err(internal("write an object", e)),
            (None, Ok(Some(done))) => Ok(done),
            (None, Ok(None)) => Err(internal("write an object", io::Error::other("cut off"))),
        }
    }

    /// An empty body.
    pub(super) async fn empty(&self, head: Head) -> S3Result<Staged> {
        self.receive(head, None, Claims { length: Some(0), ..Claims::default() }).await
    }

    /// A body put together from ranges of other files, in order. With `hash` its MD5 becomes the
    /// etag; without, `head` brings its own and the kernel moves the bytes.
    pub(super) async fn assemble(
        &self,
        head: Head,
        sources: Vec<Source>,
        hash: bool,
    ) -> S3Result<Staged> {
        let path = self.path();
        let work = move || {
            let mut writer = Writer::create(path, &head, ChecksumHasher::default())?;
            for source in sources {
                // One at a time: ten thousand parts are not ten thousand open files.
                let (mut source, range) = source.open()?;
                let length = range.end.saturating_sub(range.start);
                source.seek(SeekFrom::Start(range.start))?;
                let mut part = source.take(length);
                let copied = if hash {
                    copy_hashed(&mut part, &mut writer)?
                } else {
                    // copy_file_range where the file system has it.
                    let n = io::copy(&mut part, &mut writer.file)?;
                    writer.size += n;
                    n
                };
                if copied != length {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "source too short"));
                }
            }
            Ok(writer.finish(head)?.0)
        };
        blocking(work).await.map_err(|e| internal("assemble an object", e))
    }
}

fn copy_hashed(from: &mut impl Read, to: &mut Writer) -> io::Result<u64> {
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    let mut copied = 0;
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(copied),
            n => {
                to.write(&buffer[..n])?;
                copied += n as u64;
            }
        }
    }
}

/// The next piece of a body that is coming in; None at its end.
async fn next_piece(body: &mut StreamingBlob) -> S3Result<Option<Bytes>> {
    match tokio::time::timeout(BODY_IDLE, body.next()).await {
        Ok(None) => Ok(None),
        Ok(Some(Ok(piece))) => Ok(Some(piece)),
        Ok(Some(Err(e))) => Err(s3_error!(IncompleteBody, "the body broke off: {e}")),
        Err(_) => Err(s3_error!(RequestTimeout, "nothing more of the body came")),
    }
}

fn check_length(size: u64, expected: Option<u64>) -> S3Result<()> {
    match expected {
        Some(n) if n != size => {
            Err(s3_error!(IncompleteBody, "{n} bytes were declared, {size} came"))
        }
        _ => Ok(()),
    }
}

const CHECKSUM_HEADERS: [&str; 5] = [
    "x-amz-checksum-crc32",
    "x-amz-checksum-crc32c",
    "x-amz-checksum-crc64nvme",
    "x-amz-checksum-sha1",
    "x-amz-checksum-sha256",
];

/// Computes only what will be compared. Trailers are known by name only after the body, so when
/// there are any, all cheap sums are taken along.
fn hasher_for(claims: &Claims) -> ChecksumHasher {
    let claimed = &claims.checksum;
    let trailers = claims.trailers.is_some();
    let mut hasher = ChecksumHasher::default();
    if claimed.checksum_crc32.is_some() || trailers {
        hasher.crc32 = Some(s3s::crypto::Crc32::new());
    }
    if claimed.checksum_crc32c.is_some() || trailers {
        hasher.crc32c = Some(s3s::crypto::Crc32c::new());
    }
    if claimed.checksum_crc64nvme.is_some() || trailers {
        hasher.crc64nvme = Some(s3s::crypto::Crc64Nvme::new());
    }
    if claimed.checksum_sha1.is_some() {
        hasher.sha1 = Some(s3s::crypto::Sha1::new());
    }
    if claimed.checksum_sha256.is_some() {
        hasher.sha256 = Some(s3s::crypto::Sha256::new());
    }
    hasher
}

fn verify(claims: &Claims, digest: &[u8; 16], sums: &Checksum) -> S3Result<()> {
    if let Some(claimed) = &claims.md5
        && *claimed != aws_smithy_types::base64::encode(digest)
    {
        return Err(s3_error!(BadDigest, "the body's MD5 is not its Content-MD5"));
    }
    let claimed = &claims.checksum;
    let computed = [
        (&claimed.checksum_crc32, &sums.checksum_crc32),
        (&claimed.checksum_crc32c, &sums.checksum_crc32c),
        (&claimed.checksum_crc64nvme, &sums.checksum_crc64nvme),
        (&claimed.checksum_sha1, &sums.checksum_sha1),
        (&claimed.checksum_sha256, &sums.checksum_sha256),
    ];
    let trailers = claims.trailers.as_ref().and_then(TrailingHeaders::take);
    for (name, (in_head, sum)) in CHECKSUM_HEADERS.iter().zip(computed) {
        let in_trailer =
            trailers.as_ref().and_then(|t| t.get(*name)).and_then(|value| value.to_str().ok());
        for claim in [in_head.as_deref(), in_trailer].into_iter().flatten() {
            if sum.as_deref().is_some_and(|sum| sum != claim) {
                return Err(s3_error!(BadDigest, "the body's checksum is not its {name}"));
            }
        }
    }
    Ok(())
}
