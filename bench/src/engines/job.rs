//! The job of every minimal server: what a request asks, what is answered, what the file holds.
//!
//! Requests and replies are those of a chunk server (`ebb_dataplane_protocol::header`, `data`), so one
//! load generator serves all. A minimal server has one file: chunk *n* of any inode is its *n*-th 4 MiB.
//! It checks the header (magic, checksum, range) and nothing about who asks.

use crate::BenchError;
use ebb_dataplane_protocol::data::{CONTEXT_BYTES, encode_checksums};
use ebb_dataplane_protocol::header::{BODY_BYTES_MAX_DATA, BadHeader, HEADER_BYTES};
use ebb_dataplane_protocol::{Header, Opcode, Status, crc32c};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Bytes of a block: of a checksum, and of alignment.
pub(crate) const BLOCK: usize = 4096;
/// Bytes of a read at most.
pub(crate) const READ_BYTES_MAX: usize = 1 << 20;
/// Bytes of a request: a header and its context.
pub(crate) const REQUEST_BYTES: usize = HEADER_BYTES + CONTEXT_BYTES;
/// Bytes before the payload of a reply at most: the header and a checksum per block.
pub(crate) const HEAD_BYTES_MAX: usize = HEADER_BYTES + READ_BYTES_MAX / BLOCK * 4;

const _: () = assert!(HEAD_BYTES_MAX <= BLOCK, "a head fits into the block before its payload");

/// A request that a minimal server does not answer; it closes the connection.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadRequest {
    /// The header.
    #[error(transparent)]
    Header(#[from] BadHeader),
    /// Something else than a read of whole blocks inside the file.
    #[error("not a read of whole blocks of the file, up to 1 MiB")]
    NotServed,
}

/// A read to be answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    header: Header,
    /// First byte in the file.
    pub(crate) offset: u64,
    /// How many.
    pub(crate) bytes: usize,
}

impl Request {
    /// Parses and checks a request of [`REQUEST_BYTES`] against a file of `file_bytes`.
    pub(crate) fn parse(frame: &[u8; REQUEST_BYTES], file_bytes: u64) -> Result<Self, BadRequest> {
        let (head, context) = frame.split_first_chunk().ok_or(BadRequest::NotServed)?;
        let header = Header::decode(head, BODY_BYTES_MAX_DATA)?;
        let offset = header.chunk.start() + u64::from(header.offset);
        let bytes = header.length as usize;
        let whole = bytes > 0
            && bytes <= READ_BYTES_MAX
            && bytes.is_multiple_of(BLOCK)
            && offset.is_multiple_of(BLOCK as u64)
            && offset + bytes as u64 <= file_bytes;
        let read = header.opcode == Opcode::Read
            && header.body_bytes as usize == CONTEXT_BYTES
            && header.body_crc == crc32c(context)
            && header.payload_bytes == 0;
        if whole && read { Ok(Self { header, offset, bytes }) } else { Err(BadRequest::NotServed) }
    }

    /// What goes before `payload` in the reply: the header and, as the body, a checksum per block.
    /// Without `checksums` the body is as long, and zeros.
    pub(crate) fn head(&self, payload: &[u8], checksums: bool) -> Vec<u8> {
        assert_eq!(payload.len(), self.bytes, "a reply carries what was asked for");
        let blocks = payload.len() / BLOCK;
        let body = match checksums {
            true => encode_checksums(&payload.chunks(BLOCK).map(crc32c).collect::<Vec<_>>()),
            false => vec![0; blocks * 4],
        };
        let reply = self.header.reply(Status::Ok).with_body(&body).with_payload(self.bytes as u32);
        let mut head = Vec::with_capacity(HEADER_BYTES + body.len());
        head.extend_from_slice(&reply.encode());
        head.extend_from_slice(&body);
        head
    }
}

/// Requests of a connection as they arrive: whole ones come out, the rest stays.
/// Calls `each` for every whole request in `bytes`; returns how many bytes those were.
pub(crate) fn requests(
    bytes: &[u8],
    file_bytes: u64,
    mut each: impl FnMut(Request),
) -> Result<usize, BadRequest> {
    let (whole, _) = bytes.as_chunks::<REQUEST_BYTES>();
    for frame in whole {
        each(Request::parse(frame, file_bytes)?);
    }
    Ok(whole.len() * REQUEST_BYTES)
}

/// Fills `bytes` with what a file has from byte `at` on: every eight bytes tell where they belong.
pub(crate) fn fill(at: u64, bytes: &mut [u8]) {
    debug_assert!(at.is_multiple_of(8));
    for (word, n) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(at / 8..) {
        *word = content(n).to_le_bytes();
    }
}

/// Whether `bytes` are what a file has from byte `at` on.
pub(crate) fn is_content(at: u64, bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<8>();
    rest.is_empty() && words.iter().zip(at / 8..).all(|(w, n)| *w == content(n).to_le_bytes())
}

/// The mixing step of SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number
/// generators".
fn content(n: u64) -> u64 {
    let z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Makes the file of the minimal servers. It is written whole: unwritten extents would be read as
/// zeros without touching the device.
pub(crate) fn prepare(path: &Path, bytes: u64) -> Result<(), BenchError> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        let mut block = vec![0u8; READ_BYTES_MAX];
        for at in (0..bytes).step_by(READ_BYTES_MAX) {
            let n = (bytes - at).min(READ_BYTES_MAX as u64) as usize;
            fill(at, &mut block[..n]);
            file.write_all(&block[..n])?;
        }
        file.sync_all()
    };
    write().map_err(BenchError::file("write", path))
}

/// Opens it for reading with O_DIRECT; its size comes with it.
#[cfg_attr(not(feature = "engines"), allow(dead_code))]
pub(crate) fn open(path: &Path) -> Result<(File, u64), BenchError> {
    let open = || -> std::io::Result<_> {
        let direct = nix::fcntl::OFlag::O_DIRECT.bits();
        let file = OpenOptions::new().read(true).custom_flags(direct).open(path)?;
        let bytes = file.metadata()?.len();
        Ok((file, bytes))
    };
    open().map_err(BenchError::file("open", path))
}
