//! The bytes of the Raft log: segment headers, frames and the operations in them. Pure.
//!
//! ```text
//! segment  header (64 bytes), then frames, then zeros
//! header    0 "EBBRLOG2"   8 u64 segment number   16 u64 sequence of its first frame
//!          24 u64 purged index + 1 (0: nothing purged)  32 u64 term  40 u64 node of it
//!          48 .. 60 zero   60 u32 CRC-32C of bytes 0..60
//! frame     0 u32 magic "EBRF"   4 u32 CRC-32C of bytes 8..end   8 u64 sequence
//!          16 u32 payload bytes  20 u32 operations   24 u64 segment number
//!          32 payload, padded with zeros to 8 bytes
//! op        0 u8 kind  1..4 zero  4 u32 data bytes  8 u32 CRC-32C of the data  12 u32 zero
//!          16 u64 index + 1 (0: none)  24 u64 term  32 u64 node   40 data
//! ```
//! A frame is what one write put on the device, and the next one is written only after it is
//! stable. So a bad frame with a good, later one behind it is corruption, and a bad frame with
//! nothing behind it is a write that was never acknowledged.

use super::super::{Entry, LeaderId, LogId, Membership, Proposal};
use bytes::Bytes;
use ebb_dataplane_protocol::crc32c;
use openraft::EntryPayload;

/// Bytes of a segment's header.
pub(super) const SEGMENT_HEADER_BYTES: usize = 64;
/// Bytes of a frame's header.
pub(super) const FRAME_HEADER_BYTES: usize = 32;
/// Bytes of an operation's header.
pub(super) const OP_HEADER_BYTES: usize = 40;
/// Largest payload of a frame; a longer claim is damage, not a reason to allocate.
pub(super) const FRAME_PAYLOAD_BYTES_MAX: u32 = 64 << 20;

const SEGMENT_MAGIC: &[u8; 8] = b"EBBRLOG2";
const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"EBRF");

/// Kinds of operations, as stored.
mod kind {
    pub(super) const BLANK: u8 = 1;
    pub(super) const NORMAL: u8 = 2;
    pub(super) const MEMBERSHIP: u8 = 3;
    pub(super) const TRUNCATE: u8 = 4;
    pub(super) const PURGE: u8 = 5;
}

/// An operation on the log.
#[derive(Clone, Debug)]
pub(super) enum Op {
    /// Appends an entry.
    Append(Entry),
    /// Drops the entries after this one (`None`: all).
    Truncate(Option<LogId>),
    /// Drops the entries up to this one.
    Purge(LogId),
}

/// Bytes that are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct BadBytes(pub(super) String);

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}
fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

fn log_id(index_plus_one: u64, term: u64, node: u64) -> Option<LogId> {
    let index = index_plus_one.checked_sub(1)?;
    Some(LogId::new(LeaderId { term, node_id: node }, index))
}

fn log_id_fields(id: Option<&LogId>) -> [u64; 3] {
    id.map_or([0; 3], |id| [id.index + 1, id.leader_id.term, id.leader_id.node_id])
}

/// A segment's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub(super) number: u64,
    pub(super) first_sequence: u64,
    pub(super) purged: Option<LogId>,
}

impl SegmentHeader {
    pub(super) fn encode(&self) -> [u8; SEGMENT_HEADER_BYTES] {
        let mut b = [0u8; SEGMENT_HEADER_BYTES];
        b[0..8].copy_from_slice(SEGMENT_MAGIC);
        b[8..16].copy_from_slice(&self.number.to_le_bytes());
        b[16..24].copy_from_slice(&self.first_sequence.to_le_bytes());
        for (i, v) in log_id_fields(self.purged.as_ref()).into_iter().enumerate() {
            b[24 + i * 8..32 + i * 8].copy_from_slice(&v.to_le_bytes());
        }
        let crc = crc32c(&b[0..60]);
        b[60..64].copy_from_slice(&crc.to_le_bytes());
        b
    }

    pub(super) fn decode(b: &[u8]) -> Result<Self, BadBytes> {
        if b.len() < SEGMENT_HEADER_BYTES {
            return Err(BadBytes(format!("a segment header of {} bytes", b.len())));
        }
        if &b[0..8] != SEGMENT_MAGIC {
            let other = b.starts_with(&SEGMENT_MAGIC[..7]);
            let what = if other { "a log of another version of ebb" } else { "not a log segment" };
            return Err(BadBytes(what.into()));
        }
        if u32_at(b, 60) != crc32c(&b[0..60]) {
            return Err(BadBytes("segment header checksum mismatch".into()));
        }
        Ok(Self {
            number: u64_at(b, 8),
            first_sequence: u64_at(b, 16),
            purged: log_id(u64_at(b, 24), u64_at(b, 32), u64_at(b, 40)),
        })
    }
}

/// Where an operation's bytes are in an encoded payload.
#[derive(Clone, Copy, Debug)]
pub(super) struct OpSpan {
    /// Offset of the operation's header.
    pub(super) offset: usize,
    /// Header and data.
    pub(super) bytes: usize,
}

/// Appends an operation to a payload.
pub(super) fn encode_op(op: &Op, into: &mut Vec<u8>) -> OpSpan {
    let membership;
    let (kind, id, data): (u8, [u64; 3], &[u8]) = match op {
        Op::Append(entry) => {
            let id = log_id_fields(Some(&entry.log_id));
            match &entry.payload {
                EntryPayload::Blank => (kind::BLANK, id, &[]),
                EntryPayload::Normal(proposal) => (kind::NORMAL, id, proposal.encoded()),
                EntryPayload::Membership(m) => {
                    membership = serde_json::to_vec(m).expect("serialising to memory cannot fail");
                    (kind::MEMBERSHIP, id, &membership)
                }
            }
        }
        Op::Truncate(id) => (kind::TRUNCATE, log_id_fields(id.as_ref()), &[]),
        Op::Purge(id) => (kind::PURGE, log_id_fields(Some(id)), &[]),
    };
    let offset = into.len();
    into.extend_from_slice(&[kind, 0, 0, 0]);
    let bytes = u32::try_from(data.len()).expect("entries are bounded by the body limit");
    into.extend_from_slice(&bytes.to_le_bytes());
    into.extend_from_slice(&crc32c(data).to_le_bytes());
    into.extend_from_slice(&[0; 4]);
    for v in id {
        into.extend_from_slice(&v.to_le_bytes());
    }
    into.extend_from_slice(data);
    OpSpan { offset, bytes: OP_HEADER_BYTES + data.len() }
}

/// Reads one operation at the start of `b`; says how many bytes it took.
pub(super) fn decode_op(b: &[u8]) -> Result<(Op, usize), BadBytes> {
    if b.len() < OP_HEADER_BYTES {
        return Err(BadBytes("a short operation".into()));
    }
    let bytes = u32_at(b, 4) as usize;
    let end = OP_HEADER_BYTES + bytes;
    let data = b.get(OP_HEADER_BYTES..end).ok_or_else(|| BadBytes("a short operation".into()))?;
    if crc32c(data) != u32_at(b, 8) {
        return Err(BadBytes("operation checksum mismatch".into()));
    }
    let id = log_id(u64_at(b, 16), u64_at(b, 24), u64_at(b, 32));
    let named = |id: Option<LogId>| id.ok_or_else(|| BadBytes("an entry without a log id".into()));
    let op = match b[0] {
        kind::BLANK => Op::Append(Entry { log_id: named(id)?, payload: EntryPayload::Blank }),
        kind::NORMAL => {
            let proposal = Proposal::decode(Bytes::copy_from_slice(data))
                .map_err(|e| BadBytes(e.to_string()))?;
            Op::Append(Entry { log_id: named(id)?, payload: EntryPayload::Normal(proposal) })
        }
        kind::MEMBERSHIP => {
            let m: Membership =
                serde_json::from_slice(data).map_err(|e| BadBytes(e.to_string()))?;
            Op::Append(Entry { log_id: named(id)?, payload: EntryPayload::Membership(m) })
        }
        kind::TRUNCATE => Op::Truncate(id),
        kind::PURGE => Op::Purge(named(id)?),
        other => return Err(BadBytes(format!("unknown operation {other}"))),
    };
    Ok((op, end))
}

/// Wraps a payload into a frame.
pub(super) fn encode_frame(segment: u64, sequence: u64, ops: u32, payload: &[u8]) -> Vec<u8> {
    let bytes = frame_bytes(payload.len());
    let mut b = Vec::with_capacity(bytes);
    b.extend_from_slice(&FRAME_MAGIC.to_le_bytes());
    b.extend_from_slice(&[0; 4]);
    b.extend_from_slice(&sequence.to_le_bytes());
    let length = u32::try_from(payload.len()).expect("frames are bounded below 4 GiB");
    b.extend_from_slice(&length.to_le_bytes());
    b.extend_from_slice(&ops.to_le_bytes());
    b.extend_from_slice(&segment.to_le_bytes());
    b.extend_from_slice(payload);
    b.resize(bytes, 0);
    let crc = crc32c(&b[8..]);
    b[4..8].copy_from_slice(&crc.to_le_bytes());
    b
}

/// Bytes of a frame with a payload of this many.
pub(super) fn frame_bytes(payload: usize) -> usize {
    (FRAME_HEADER_BYTES + payload).next_multiple_of(8)
}

/// A frame found in a segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame<'a> {
    pub(super) sequence: u64,
    pub(super) ops: u32,
    pub(super) payload: &'a [u8],
    /// Bytes of the whole frame.
    pub(super) bytes: usize,
}

/// Reads the frame at the start of `b`, if a whole and undamaged one of this segment is there.
pub(super) fn decode_frame(segment: u64, b: &[u8]) -> Option<Frame<'_>> {
    if b.len() < FRAME_HEADER_BYTES || u32_at(b, 0) != FRAME_MAGIC || u64_at(b, 24) != segment {
        return None;
    }
    let length = u32_at(b, 16);
    if length > FRAME_PAYLOAD_BYTES_MAX {
        return None;
    }
    let bytes = frame_bytes(length as usize);
    let whole = b.get(..bytes)?;
    if crc32c(&whole[8..]) != u32_at(b, 4) {
        return None;
    }
    let payload = &whole[FRAME_HEADER_BYTES..FRAME_HEADER_BYTES + length as usize];
    Some(Frame { sequence: u64_at(b, 8), ops: u32_at(b, 20), payload, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_with_any_flipped_bit_is_not_a_frame() {
        let mut payload = Vec::new();
        let id = LogId::new(LeaderId { term: 3, node_id: 1 }, 7);
        encode_op(&Op::Append(Entry { log_id: id, payload: EntryPayload::Blank }), &mut payload);
        encode_op(&Op::Purge(id), &mut payload);
        let good = encode_frame(5, 9, 2, &payload);
        let frame = decode_frame(5, &good).expect("own bytes");
        assert_eq!((frame.sequence, frame.ops, frame.bytes), (9, 2, good.len()));
        assert!(decode_frame(6, &good).is_none(), "another segment's frame");
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(decode_frame(5, &bad).is_none(), "bit {bit} went unnoticed");
        }
    }

    #[test]
    fn segment_headers_round_trip() {
        for purged in [None, Some(LogId::new(LeaderId { term: 1, node_id: 2 }, 0))] {
            let h = SegmentHeader { number: 4, first_sequence: 11, purged };
            assert_eq!(SegmentHeader::decode(&h.encode()), Ok(h));
        }
    }
}
