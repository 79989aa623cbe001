//! The Raft log's bytes and messages under attack (`ebb_dataplane_protocol::hostile`). Checksums are made right
//! after every change: what is attacked is what believes them. Nothing here is used by a server.

use super::super::{Entry, LeaderId, LogId, Membership, Proposal, wire};
use super::frame::{
    OP_HEADER_BYTES, Op, SEGMENT_HEADER_BYTES, SegmentHeader, decode_frame, decode_op,
    encode_frame, encode_op,
};
use ebb_dataplane_protocol::crc32c;
use ebb_dataplane_protocol::hostile::Decoder;
use ebb_metaplane_protocol::{Command, LogEntry, Time};
use openraft::EntryPayload;

fn put(b: &mut [u8], at: usize, crc: u32) {
    b[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// A segment's header.
pub fn segment(bytes: &[u8]) {
    let mut b = bytes.to_vec();
    let _ = SegmentHeader::decode(&b);
    b.resize(SEGMENT_HEADER_BYTES, 0);
    let crc = crc32c(&b[..60]);
    put(&mut b, 60, crc);
    if let Ok(h) = SegmentHeader::decode(&b) {
        assert_eq!(SegmentHeader::decode(&h.encode()), Ok(h));
    }
}

/// A frame, as it is and around these bytes; then the operations in it.
pub fn frame(bytes: &[u8]) {
    if let Some(f) = decode_frame(5, bytes) {
        assert!(f.bytes <= bytes.len() && f.payload.len() < f.bytes);
    }
    let wrapped = encode_frame(5, 9, 2, bytes);
    let found = decode_frame(5, &wrapped).expect("its own bytes");
    assert_eq!((found.payload, found.bytes), (bytes, wrapped.len()));
    operations(bytes);
}

/// Operations, one after another, with the checksums of their data made right.
pub fn operations(bytes: &[u8]) {
    let mut b = bytes.to_vec();
    let mut at = 0;
    while at + OP_HEADER_BYTES <= b.len() {
        let long = u32::from_le_bytes([b[at + 4], b[at + 5], b[at + 6], b[at + 7]]) as usize;
        let data = at + OP_HEADER_BYTES;
        if let Some(found) = b.get(data..data + long) {
            let crc = crc32c(found);
            put(&mut b, at + 8, crc);
        }
        let Ok((op, taken)) = decode_op(&b[at..]) else { return };
        assert!(taken >= OP_HEADER_BYTES && at + taken <= b.len(), "within the bytes");
        let mut again = Vec::new();
        encode_op(&op, &mut again);
        let (_, all) = decode_op(&again).expect("what was taken is written back");
        assert_eq!(all, again.len());
        at += taken;
    }
}

/// A message between voters.
pub fn message(bytes: &[u8]) {
    if let Ok((_, entries)) = wire::decode(bytes) {
        assert!(entries.len() * OP_HEADER_BYTES <= bytes.len(), "each took its bytes");
    }
}

fn id(index: u64) -> LogId {
    LogId::new(LeaderId { term: 3, node_id: 1 }, index)
}

fn operations_of() -> Vec<u8> {
    let commands = vec![Command::KeyBegin(vec![("a/b".into(), 1)])];
    let normal = EntryPayload::Normal(Proposal::new(LogEntry { now: Time(4), commands }));
    let nodes = std::collections::BTreeMap::from([(
        1,
        crate::raft::VoterNode { addr: "h:1".into(), store: "5".into() },
    )]);
    let voters = vec![std::collections::BTreeSet::from([1])];
    let membership = Membership::new(voters, nodes).expect("one voter with its address");
    let mut payload = Vec::new();
    for op in [
        Op::Append(Entry { log_id: id(6), payload: EntryPayload::Blank }),
        Op::Append(Entry { log_id: id(7), payload: normal }),
        Op::Append(Entry { log_id: id(8), payload: EntryPayload::Membership(membership) }),
        Op::Truncate(Some(id(7))),
        Op::Purge(id(6)),
    ] {
        encode_op(&op, &mut payload);
    }
    payload
}

fn segments() -> Vec<Vec<u8>> {
    [None, Some(id(0))]
        .map(|purged| SegmentHeader { number: 4, first_sequence: 11, purged }.encode().to_vec())
        .into()
}
fn frames() -> Vec<Vec<u8>> {
    let payload = operations_of();
    vec![encode_frame(5, 9, 5, &payload), payload]
}
fn messages() -> Vec<Vec<u8>> {
    let vote = super::super::Vote::new(3, 1);
    let append = wire::Message::Append { vote, previous: Some(id(5)), commit: None, entries: 3 };
    vec![wire::encode(&append, &operations_of())]
}

/// This crate's decoders.
pub const DECODERS: [Decoder; 3] = [
    Decoder { name: "raft_segment", seeds: segments, run: segment },
    Decoder { name: "raft_frame", seeds: frames, run: frame },
    Decoder { name: "raft_message", seeds: messages, run: message },
];

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_dataplane_protocol::hostile::attack;

    #[test]
    fn mutated_segments_frames_and_messages_never_break_their_decoders() {
        attack(&DECODERS, 10_000);
    }
}
