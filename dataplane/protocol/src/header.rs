//! The 64-byte frame header, little-endian, the same on every port.
//!
//! ```text
//!  0 u32 magic "EBB1"      4 u8 version   5 u8 opcode   6 u16 flags
//!  8 u64 request id (chosen by the caller, echoed)
//! 16 u32 body bytes       20 u32 payload bytes
//! 24 u16 status (replies) 26 u16 placement group       28 u32 feature bits
//! 32 u64 inode            40 u32 chunk index           44 u32 byte offset in the chunk
//! 48 u32 byte length      52 u32 retry-after ms (replies)
//! 56 u32 CRC-32C of the body                           60 u32 CRC-32C of bytes 0..60
//! ```
//! A metadata port's replies have no inode; its field says which change of the voters the server knows last, as
//! the change's index in the log (0: it does not say).
//!
//! The payload's checksums are in the body (per block piece), so that they can go into the index and
//! back out to the reader (I10).

use crate::checksum::crc32c;
use crate::ids::{ChunkIndex, InodeId, PgId};
use crate::status::Status;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 64;
/// "EBB1" read as a little-endian u32.
pub const MAGIC: u32 = u32::from_le_bytes(*b"EBB1");
/// Version of the wire protocol.
pub const WIRE_VERSION: u8 = 9;
/// Largest body on a data port.
pub const BODY_BYTES_MAX_DATA: u32 = 256 << 10;
/// Largest body on a metadata port.
pub const BODY_BYTES_MAX_META: u32 = 4 << 20;
/// Largest payload: one chunk.
pub const PAYLOAD_BYTES_MAX: u32 = crate::ids::CHUNK_BYTES;
/// Flag: this frame answers a request.
pub const FLAG_REPLY: u16 = 1;
/// Flag of a read: what comes after it will be read next. A hint, like the other two: who does not know it answers
/// as if it was not set.
pub const FLAG_SEQUENTIAL: u16 = 2;
/// Flag of a read: what comes after it will not be read next.
pub const FLAG_RANDOM: u16 = 4;
/// Flag of a read: the range is to be brought into the cache; the reply, without bytes, says that it was gone through.
pub const FLAG_PREFETCH: u16 = 8;
/// Flag of a metadata question: a voter that follows may answer it (docs/PROTOCOL.md, R60). Of its answer: one did.
pub const FLAG_ANY_VOTER: u16 = 16;

/// What a frame asks for. A reply carries the opcode of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Opcode {
    // --- every port: the handshake of `auth` -------------------------------
    /// First frame of a connection: body [`crate::auth::Hello`]; reply [`crate::auth::Challenge`].
    Hello = 0x01,
    /// Second frame: body [`crate::auth::Proof`]; reply with an empty body.
    Prove = 0x02,
    /// Liveness; empty body.
    Ping = 0x03,
    // --- data ports, clients -----------------------------------------------
    /// Presents a signed grant: body is a [`crate::grant::SignedGrant`] encoded by `codec`.
    Present = 0x10,
    /// Reads a range: body [`crate::data::DataContext`]; reply [`crate::data::ReadReply`] + payload.
    Read = 0x11,
    /// Writes a range: body [`crate::data::DataContext`] + piece checksums; payload the bytes; reply
    /// [`crate::data::WriteReply`].
    Write = 0x12,
    // --- data ports, metadata plane: bodies are `control::Control` ---------
    /// A [`crate::control::Control`] request; reply [`crate::control::ControlReply`].
    Control = 0x20,
    // --- data ports, other nodes' cores: 0x30 to 0x3f ----------------------
    /// A mutation of a group, from its primary: body [`crate::replica::Shipped`], payload blocks; the reply
    /// says that it is durable.
    Replicate = 0x30,
    /// Reads clean blocks that a group left behind when it moved: body [`crate::data::PeerRead`]; reply
    /// `NotHere`, or one CRC-32C per block and the blocks.
    PeerRead = 0x31,
    // --- metadata port -------------------------------------------------------
    /// A request of ebb-metaplane-protocol.
    Meta = 0x40,
    /// Raft traffic between voters.
    Raft = 0x41,
}

impl Opcode {
    /// The opcode of a byte.
    pub const fn from_u8(v: u8) -> Option<Self> {
        Some(match v {
            0x01 => Self::Hello,
            0x02 => Self::Prove,
            0x03 => Self::Ping,
            0x10 => Self::Present,
            0x11 => Self::Read,
            0x12 => Self::Write,
            0x20 => Self::Control,
            0x30 => Self::Replicate,
            0x31 => Self::PeerRead,
            0x40 => Self::Meta,
            0x41 => Self::Raft,
            _ => return None,
        })
    }
}

/// Why a header was refused; the connection closes (I12).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// Not our magic: another protocol or garbage.
    #[error("bad magic {0:#010x}")]
    Magic(u32),
    /// Another version of the wire protocol.
    #[error("wire version {0}, this side speaks {WIRE_VERSION}")]
    Version(u8),
    /// The header's checksum does not match.
    #[error("header checksum mismatch")]
    Checksum,
    /// Unknown opcode.
    #[error("unknown opcode {0:#04x}")]
    Opcode(u8),
    /// The body is longer than this port takes.
    #[error("body of {0} bytes is too long")]
    BodyTooLong(u32),
    /// The payload is longer than a chunk.
    #[error("payload of {0} bytes is too long")]
    PayloadTooLong(u32),
    /// offset + length passes the chunk's end.
    #[error("range passes the end of the chunk")]
    Range,
    /// Unknown status.
    #[error("unknown status {0}")]
    Status(u16),
}

/// A parsed frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What is asked, or was.
    pub opcode: Opcode,
    /// [`FLAG_REPLY`] and the hints of reads; others are ignored.
    pub flags: u16,
    /// Chosen by the caller, echoed in the reply.
    pub request_id: u64,
    /// Bytes of the body.
    pub body_bytes: u32,
    /// Bytes of the payload.
    pub payload_bytes: u32,
    /// Outcome (replies; `Ok` in requests).
    pub status: Status,
    /// Placement group of the chunk.
    pub pg: PgId,
    /// Feature bits the sender uses in this frame; 0 today.
    pub features: u32,
    /// The inode.
    pub inode: InodeId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// First byte in the chunk.
    pub offset: u32,
    /// Bytes asked for, or carried.
    pub length: u32,
    /// For `Busy`, `Frozen`, `NoLease`: when to try again, in ms.
    pub retry_after_ms: u32,
    /// CRC-32C of the body.
    pub body_crc: u32,
}

impl Header {
    /// A request header without a range.
    pub const fn request(opcode: Opcode, request_id: u64) -> Self {
        Self {
            opcode,
            flags: 0,
            request_id,
            body_bytes: 0,
            payload_bytes: 0,
            status: Status::Ok,
            pg: PgId(0),
            features: 0,
            inode: InodeId(0),
            chunk: ChunkIndex(0),
            offset: 0,
            length: 0,
            retry_after_ms: 0,
            body_crc: 0,
        }
    }

    /// The reply to `self` with a status; the range is echoed.
    pub const fn reply(&self, status: Status) -> Self {
        Self {
            flags: FLAG_REPLY,
            status,
            body_bytes: 0,
            payload_bytes: 0,
            retry_after_ms: 0,
            body_crc: 0,
            ..*self
        }
    }

    /// Of a metadata server's reply: which change of the voters it knows last, as its index in the log.
    pub const fn with_membership(mut self, index: u64) -> Self {
        self.inode = InodeId(index);
        self
    }

    /// What [`Header::with_membership`] has set; 0: nothing.
    pub const fn membership(&self) -> u64 {
        self.inode.0
    }

    /// Whether this frame answers a request.
    pub const fn is_reply(&self) -> bool {
        self.flags & FLAG_REPLY != 0
    }

    /// Whether a flag is set.
    pub const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Sets the body's length and checksum.
    pub fn with_body(mut self, body: &[u8]) -> Self {
        self.body_bytes = u32::try_from(body.len()).expect("bodies are bounded below 4 GiB");
        self.body_crc = crc32c(body);
        self
    }

    /// Sets the payload's length.
    pub const fn with_payload(mut self, bytes: u32) -> Self {
        self.payload_bytes = bytes;
        self
    }

    /// Bytes that follow the header.
    pub const fn tail_bytes(&self) -> u64 {
        self.body_bytes as u64 + self.payload_bytes as u64
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0u8; HEADER_BYTES];
        b[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        b[4] = WIRE_VERSION;
        b[5] = self.opcode as u8;
        b[6..8].copy_from_slice(&self.flags.to_le_bytes());
        b[8..16].copy_from_slice(&self.request_id.to_le_bytes());
        b[16..20].copy_from_slice(&self.body_bytes.to_le_bytes());
        b[20..24].copy_from_slice(&self.payload_bytes.to_le_bytes());
        b[24..26].copy_from_slice(&(self.status as u16).to_le_bytes());
        b[26..28].copy_from_slice(&self.pg.0.to_le_bytes());
        b[28..32].copy_from_slice(&self.features.to_le_bytes());
        b[32..40].copy_from_slice(&self.inode.0.to_le_bytes());
        b[40..44].copy_from_slice(&self.chunk.0.to_le_bytes());
        b[44..48].copy_from_slice(&self.offset.to_le_bytes());
        b[48..52].copy_from_slice(&self.length.to_le_bytes());
        b[52..56].copy_from_slice(&self.retry_after_ms.to_le_bytes());
        b[56..60].copy_from_slice(&self.body_crc.to_le_bytes());
        let crc = crc32c(&b[0..60]);
        b[60..64].copy_from_slice(&crc.to_le_bytes());
        b
    }

    /// Parses and checks a header; `body_bytes_max` is the port's limit.
    pub fn decode(b: &[u8; HEADER_BYTES], body_bytes_max: u32) -> Result<Self, BadHeader> {
        let u16_at = |i: usize| u16::from_le_bytes([b[i], b[i + 1]]);
        let u32_at = |i: usize| u32::from_le_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        let u64_at = |i: usize| u64::from(u32_at(i)) | u64::from(u32_at(i + 4)) << 32;
        if u32_at(0) != MAGIC {
            return Err(BadHeader::Magic(u32_at(0)));
        }
        if u32_at(60) != crc32c(&b[0..60]) {
            return Err(BadHeader::Checksum);
        }
        if b[4] != WIRE_VERSION {
            return Err(BadHeader::Version(b[4]));
        }
        let h = Self {
            opcode: Opcode::from_u8(b[5]).ok_or(BadHeader::Opcode(b[5]))?,
            flags: u16_at(6),
            request_id: u64_at(8),
            body_bytes: u32_at(16),
            payload_bytes: u32_at(20),
            status: Status::from_u16(u16_at(24)).ok_or(BadHeader::Status(u16_at(24)))?,
            pg: PgId(u16_at(26)),
            features: u32_at(28),
            inode: InodeId(u64_at(32)),
            chunk: ChunkIndex(u32_at(40)),
            offset: u32_at(44),
            length: u32_at(48),
            retry_after_ms: u32_at(52),
            body_crc: u32_at(56),
        };
        if h.body_bytes > body_bytes_max {
            return Err(BadHeader::BodyTooLong(h.body_bytes));
        }
        if h.payload_bytes > PAYLOAD_BYTES_MAX {
            return Err(BadHeader::PayloadTooLong(h.payload_bytes));
        }
        if u64::from(h.offset) + u64::from(h.length) > u64::from(crate::ids::CHUNK_BYTES) {
            return Err(BadHeader::Range);
        }
        Ok(h)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flipped_bit_is_refused_or_changes_nothing() {
        let mut h = Header::request(Opcode::Write, 7).with_body(b"abc").with_payload(4096);
        h.inode = InodeId(99);
        h.offset = 4096;
        h.length = 4096;
        let good = h.encode();
        assert_eq!(Header::decode(&good, 100), Ok(h));
        for bit in 0..HEADER_BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bad, 100).is_err(), "bit {bit} went unnoticed");
        }
    }

    #[test]
    fn too_long_bodies_are_refused() {
        let h = Header::request(Opcode::Control, 1).with_body(&[0; 101]);
        assert_eq!(Header::decode(&h.encode(), 100), Err(BadHeader::BodyTooLong(101)));
    }
}
