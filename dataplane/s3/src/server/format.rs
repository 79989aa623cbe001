//! The on-disk form of an object, of a part and of an upload: one file, a header, then the body.
//!
//! ```text
//!   0  magic        8  "EBBS3OBJ"
//!   8  version      4  little endian, 1
//!  12  body_offset  4  where the body starts: header, padded
//!  16  head_length  4  bytes of JSON after this fixed part
//!  20  crc32c       4  over bytes 0..20 and the JSON
//!  24  JSON            [`Head`]
//!   …  zeros           up to body_offset
//!      body            `size` bytes, to the end of the file
//! ```
//!
//! The header stands first so that it is one read, but etag and size are known only after the
//! body: `reserve` leaves room for them, `encode` fills it in before the file is synced. A file
//! whose header does not verify, or whose length is not offset + size, is never served (I10).

use std::{collections::BTreeMap, fs::File, io, os::unix::fs::FileExt};

use serde::{Deserialize, Serialize};

use crate::types::Metadata;

const MAGIC: &[u8; 8] = b"EBBS3OBJ";
const VERSION: u32 = 1;
const FIXED_BYTES: usize = 24;
/// Room for what is not known at the start: an etag and two numbers.
const SLACK_BYTES: usize = 128;
const ALIGN_BYTES: usize = 256;
/// Longest header. A key has 1 KiB and metadata at most 8 KiB, each byte at most six in JSON.
const HEADER_BYTES_MAX: usize = 64 * 1024;
/// Read at once when a header is looked for; most fit.
const FIRST_READ_BYTES: usize = 4096;

/// What the header says of the body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    pub(super) key: String,
    pub(super) etag: String,
    pub(super) size: u64,
    pub(super) modified_ns: i64,
    #[serde(default)]
    pub(super) metadata: Metadata,
    /// Content-Type and its kin, by lower-case header name.
    #[serde(default)]
    pub(super) headers: BTreeMap<String, String>,
    /// The upload this object was completed from, so that a crash right after does not leave the
    /// upload behind as if it were still open.
    #[serde(default)]
    pub(super) upload: Option<String>,
}

/// Why a header was not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum FormatError {
    #[error("cannot read: {0}")]
    Io(#[from] io::Error),
    #[error("not an object file: {0}")]
    Foreign(&'static str),
    #[error("damaged: {0}")]
    Damaged(String),
}

/// Where the body will start for this head, with room for etag and size.
pub(super) fn reserve(head: &Head) -> io::Result<u32> {
    let json = serde_json::to_vec(head)?.len();
    let offset = (FIXED_BYTES + json + SLACK_BYTES).next_multiple_of(ALIGN_BYTES);
    match u32::try_from(offset) {
        Ok(offset) if (offset as usize) <= HEADER_BYTES_MAX => Ok(offset),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "header too large")),
    }
}

/// The header's bytes, exactly `body_offset` of them.
pub(super) fn encode(head: &Head, body_offset: u32) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(head)?;
    let mut bytes = Vec::with_capacity(body_offset as usize);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&body_offset.to_le_bytes());
    bytes.extend_from_slice(&(json.len() as u32).to_le_bytes());
    let crc = checksum(&bytes, &json);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(&json);
    if bytes.len() > body_offset as usize {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "header outgrew its room"));
    }
    bytes.resize(body_offset as usize, 0);
    Ok(bytes)
}

/// Reads and verifies the header; also that the file is as long as it says. Gives the head and
/// where the body starts.
pub(super) fn read(file: &File) -> Result<(Head, u64), FormatError> {
    let length = file.metadata()?.len();
    let mut bytes = vec![0; FIRST_READ_BYTES.min(usize::try_from(length).unwrap_or(usize::MAX))];
    file.read_exact_at(&mut bytes, 0)?;
    let number = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes)
    };
    if bytes.get(..8) != Some(MAGIC.as_slice()) {
        return Err(FormatError::Foreign("wrong magic"));
    }
    if number(&bytes, 8) != Some(VERSION) {
        return Err(FormatError::Foreign("unknown version"));
    }
    let (Some(offset), Some(json_length), Some(crc)) =
        (number(&bytes, 12), number(&bytes, 16), number(&bytes, 20))
    else {
        return Err(FormatError::Damaged("shorter than a header".into()));
    };
    let (offset, end) = (offset as usize, FIXED_BYTES + json_length as usize);
    if offset > HEADER_BYTES_MAX || end > offset || offset as u64 > length {
        return Err(FormatError::Damaged(format!("header of {end} in {offset} of {length}")));
    }
    if end > bytes.len() {
        bytes.resize(end, 0);
        file.read_exact_at(&mut bytes, 0)?;
    }
    let (fixed, json) = (&bytes[..20], &bytes[FIXED_BYTES..end]);
    if checksum(fixed, json) != crc {
        return Err(FormatError::Damaged("checksum of the header".into()));
    }
    let head: Head = serde_json::from_slice(json)
        .map_err(|e| FormatError::Damaged(format!("header does not parse: {e}")))?;
    let offset = offset as u64;
    if offset.checked_add(head.size) != Some(length) {
        let text = format!("{length} bytes on disk, header says {offset} + {}", head.size);
        return Err(FormatError::Damaged(text));
    }
    Ok((head, offset))
}

fn checksum(fixed: &[u8], json: &[u8]) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    digest.update(fixed);
    digest.update(json);
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn head() -> Head {
        Head {
            key: "a/b \u{1}\"ü".into(),
            etag: "0123".into(),
            size: 5,
            modified_ns: -1,
            metadata: [("k".to_owned(), "v".to_owned())].into(),
            headers: BTreeMap::new(),
            upload: Some("u".into()),
        }
    }

    fn file(head: &Head, body: &[u8]) -> File {
        let offset = reserve(&Head { etag: String::new(), size: 0, ..head.clone() }).expect("room");
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&encode(head, offset).expect("fits")).expect("written");
        file.write_all(body).expect("written");
        file
    }

    #[test]
    fn headers_round_trip() {
        let (found, offset) = read(&file(&head(), b"hello")).expect("valid");
        assert_eq!(found, head());
        assert_eq!(offset % ALIGN_BYTES as u64, 0);
    }

    #[test]
    fn every_flipped_byte_of_the_header_is_noticed() {
        let whole = file(&head(), b"hello");
        let json_end = FIXED_BYTES + serde_json::to_vec(&head()).expect("json").len();
        for at in 0..json_end as u64 {
            let mut byte = [0];
            whole.read_exact_at(&mut byte, at).expect("read");
            whole.write_all_at(&[byte[0] ^ 0x10], at).expect("flip");
            assert!(read(&whole).is_err(), "byte {at}");
            whole.write_all_at(&byte, at).expect("flip back");
        }
        assert!(read(&whole).is_ok());
    }

    #[test]
    fn a_body_cut_short_or_grown_is_noticed() {
        assert!(read(&file(&head(), b"hell")).is_err());
        assert!(read(&file(&head(), b"hello!")).is_err());
        assert!(read(&tempfile::tempfile().expect("a file")).is_err());
    }
}
