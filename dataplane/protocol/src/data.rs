//! Bodies of the hot requests, fixed little-endian.
//!
//! **Read**: the header names inode, chunk, offset, length (any bytes); the body is a
//! [`DataContext`]. The reply's header names the *block-aligned superset* it carries, its body is one
//! CRC-32C per block (from the index, I10), its payload the blocks. Holes and bytes past the backing
//! object are zeros, known to be so (I4); the caller clips at the file's size.
//!
//! **Write**: the header names the exact byte range; the body is a [`DataContext`] followed by one
//! CRC-32C per piece of [`crate::checksum::block_pieces`]; the payload is the bytes. `Ok` means
//! durable on every in-sync replica (I1); the reply's body is a [`WriteReply`].

use crate::ids::*;

/// Bytes of an encoded [`DataContext`].
pub const CONTEXT_BYTES: usize = 64;

/// The protocol's fields of a read or a write (PROTOCOL §2, §4–6, §9).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataContext {
    /// Generation of the caller's grant; a write is tagged with it.
    pub generation: Generation,
    /// Version of the view the caller works under.
    pub view_version: ViewVersion,
    /// Version of the caller's cluster map; never older than its grant's.
    pub map_version: MapVersion,
    /// Epoch of the placement group in that map.
    pub pg_epoch: PgEpoch,
    /// Clean content the caller wants (reads).
    pub content: ContentId,
    /// The caller's session.
    pub session: SessionId,
    /// Sequence of this write in the session (writes; unique, a retry repeats it).
    pub sequence: Sequence,
    /// Every write of the session below this sequence has been answered: the window may forget it.
    pub answered_below: Sequence,
}

impl DataContext {
    /// The context's bytes.
    pub fn encode(&self) -> [u8; CONTEXT_BYTES] {
        let mut b = [0u8; CONTEXT_BYTES];
        let fields = [
            self.generation.0,
            self.view_version.0,
            self.map_version.0,
            self.pg_epoch.0,
            self.content.0,
            self.session.0,
            self.sequence.0,
            self.answered_below.0,
        ];
        for (slot, v) in b.as_chunks_mut::<8>().0.iter_mut().zip(fields) {
            *slot = v.to_le_bytes();
        }
        b
    }

    /// Parses a context; the rest of the body is returned beside it. `None` if it is too short.
    pub fn decode(body: &[u8]) -> Option<(Self, &[u8])> {
        let (head, rest) = body.split_at_checked(CONTEXT_BYTES)?;
        let v = |i: usize| u64::from_le_bytes(head[i * 8..i * 8 + 8].try_into().expect("8 bytes"));
        Some((
            Self {
                generation: Generation(v(0)),
                view_version: ViewVersion(v(1)),
                map_version: MapVersion(v(2)),
                pg_epoch: PgEpoch(v(3)),
                content: ContentId(v(4)),
                session: SessionId(v(5)),
                sequence: Sequence(v(6)),
                answered_below: Sequence(v(7)),
            },
            rest,
        ))
    }
}

/// The body of a write's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteReply {
    /// The tag the write was taken under, which for a repeated one is that of the first time: the
    /// generation to which the writer credits the end of its bytes (R15, R19).
    pub generation: Generation,
}

impl WriteReply {
    /// The reply's bytes.
    pub fn encode(&self) -> Vec<u8> {
        self.generation.0.to_le_bytes().to_vec()
    }
    /// Parses a reply; `None` if it has another length.
    pub fn decode(body: &[u8]) -> Option<Self> {
        Some(Self { generation: Generation(u64::from_le_bytes(body.try_into().ok()?)) })
    }
}

/// The body of a [`crate::Opcode::PeerRead`]. The header names chunk and whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerRead {
    /// The content that the asker's view names.
    pub content: ContentId,
    /// Bytes of the object that count by that view; what is past them is zero.
    pub valid_bytes: u64,
}

impl PeerRead {
    /// The body's bytes.
    pub fn encode(&self) -> [u8; 16] {
        let mut b = [0u8; 16];
        b[..8].copy_from_slice(&self.content.0.to_le_bytes());
        b[8..].copy_from_slice(&self.valid_bytes.to_le_bytes());
        b
    }
    /// Parses a body; `None` if it has another length.
    pub fn decode(body: &[u8]) -> Option<Self> {
        let body: [u8; 16] = body.try_into().ok()?;
        let v = |i: usize| u64::from_le_bytes(std::array::from_fn(|n| body[i + n]));
        Some(Self { content: ContentId(v(0)), valid_bytes: v(8) })
    }
}

/// Checksums as they travel: u32 little-endian each.
pub fn encode_checksums(crcs: &[u32]) -> Vec<u8> {
    crcs.iter().flat_map(|c| c.to_le_bytes()).collect()
}

/// Parses checksums; `None` if the length is not a multiple of four.
pub fn decode_checksums(bytes: &[u8]) -> Option<Vec<u32>> {
    let (quads, rest) = bytes.as_chunks::<4>();
    rest.is_empty().then(|| quads.iter().map(|q| u32::from_le_bytes(*q)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_round_trip_and_short_ones_are_refused() {
        let c = DataContext {
            generation: Generation(1),
            view_version: ViewVersion(2),
            map_version: MapVersion(3),
            pg_epoch: PgEpoch(4),
            content: ContentId(5),
            session: SessionId(6),
            sequence: Sequence(7),
            answered_below: Sequence(8),
        };
        let mut body = c.encode().to_vec();
        body.extend(encode_checksums(&[9, 10]));
        let (back, rest) = DataContext::decode(&body).expect("long enough");
        assert_eq!(back, c);
        assert_eq!(decode_checksums(rest), Some(vec![9, 10]));
        assert!(DataContext::decode(&body[..63]).is_none());
        let reply = WriteReply { generation: Generation(11) };
        assert_eq!(WriteReply::decode(&reply.encode()), Some(reply));
        assert_eq!(WriteReply::decode(&[]), None);
    }
}
