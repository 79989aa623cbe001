//! What a write or a send is made of.

use std::ops::Range;
use std::sync::Arc;

use crate::arena::{Arena, Buf};

/// A run of bytes that an operation owns until it has ended.
#[derive(Debug)]
pub enum Segment {
    /// Heap bytes, such as an encoded header.
    Bytes(Vec<u8>),
    /// Constant bytes, such as a zero page for a hole.
    Static(&'static [u8]),
    /// A part of a buffer.
    Buf(Buf, Range<usize>),
    /// A part of a buffer that others read too, such as a write that goes to the device and to a
    /// backup at once.
    Shared(Arc<Buf>, Range<usize>),
}

impl Segment {
    /// The bytes; empty if the range lies outside the buffer.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Segment::Bytes(v) => v,
            Segment::Static(s) => s,
            Segment::Buf(b, r) => b.get(r.clone()).unwrap_or_default(),
            Segment::Shared(b, r) => b.get(r.clone()).unwrap_or_default(),
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes().len()
    }

    /// Whether there is nothing in it, or its range lies outside its buffer.
    pub fn is_empty(&self) -> bool {
        self.bytes().is_empty()
    }

    /// Index of the registered-buffer entry this lies in, if it is a buffer of `arena`.
    pub(crate) fn fixed_entry(&self, arena: &Arena) -> Option<u16> {
        match self {
            Segment::Buf(b, _) => b.fixed_entry(arena),
            Segment::Shared(b, _) => b.fixed_entry(arena),
            Segment::Bytes(_) | Segment::Static(_) => None,
        }
    }
}

impl From<Vec<u8>> for Segment {
    fn from(v: Vec<u8>) -> Self {
        Segment::Bytes(v)
    }
}

/// One segment or several, without an allocation for one.
#[derive(Debug)]
pub enum Segments {
    /// Exactly one.
    One(Segment),
    /// Any number.
    Many(Vec<Segment>),
}

impl Segments {
    /// As a slice.
    pub fn as_slice(&self) -> &[Segment] {
        match self {
            Segments::One(s) => std::slice::from_ref(s),
            Segments::Many(v) => v,
        }
    }

    /// As a vector.
    pub fn into_vec(self) -> Vec<Segment> {
        match self {
            Segments::One(s) => vec![s],
            Segments::Many(v) => v,
        }
    }

    /// The owned buffers in it, in order; heap bytes and shared buffers are dropped.
    pub fn into_bufs(self) -> Vec<Buf> {
        self.into_vec()
            .into_iter()
            .filter_map(|s| match s {
                Segment::Buf(b, _) => Some(b),
                _ => None,
            })
            .collect()
    }

    /// Sum of the lengths.
    pub fn total(&self) -> usize {
        self.as_slice().iter().map(Segment::len).sum()
    }
}

impl From<Segment> for Segments {
    fn from(s: Segment) -> Self {
        Segments::One(s)
    }
}

impl From<Vec<Segment>> for Segments {
    fn from(v: Vec<Segment>) -> Self {
        Segments::Many(v)
    }
}

impl From<Vec<u8>> for Segments {
    fn from(v: Vec<u8>) -> Self {
        Segments::One(Segment::Bytes(v))
    }
}

/// Fills `out` with the part of `segments` from byte `skip` on, at most `iov_max` pieces and
/// `bytes_max` bytes; answers the bytes covered.
pub(crate) fn gather(
    segments: &[Segment],
    mut skip: usize,
    iov_max: usize,
    bytes_max: usize,
    out: &mut Vec<libc::iovec>,
) -> usize {
    let mut covered = 0;
    for segment in segments {
        let bytes = segment.bytes();
        if skip >= bytes.len() {
            skip -= bytes.len();
            continue;
        }
        if out.len() >= iov_max || covered >= bytes_max {
            break;
        }
        let piece = &bytes[skip..];
        let piece = &piece[..piece.len().min(bytes_max - covered)];
        skip = 0;
        out.push(libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() });
        covered += piece.len();
    }
    covered
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{BLOCK, Class, Pool};

    /// A message of every kind of segment, and its bytes.
    fn message(arena: &Arena) -> (Vec<Segment>, Vec<u8>) {
        let mut own = arena.alloc(Class::Block4K, Pool::Clients).unwrap();
        let mut shared = Buf::unpooled(BLOCK);
        for n in 0..BLOCK {
            (own[n], shared[n]) = (n as u8, (n / 256) as u8);
        }
        let shared = Arc::new(shared);
        let want = [b"head", &own[10..20], &shared[250..260], b"tail", &shared[..3]].concat();
        let segments = vec![
            Segment::Bytes(b"head".to_vec()),
            Segment::Buf(own, 10..20),
            Segment::Shared(shared.clone(), 250..260),
            Segment::Static(b"tail"),
            Segment::Shared(shared, 0..3),
        ];
        (segments, want)
    }

    /// What the kernel finds at the addresses it was given.
    fn copied(iov: &[libc::iovec]) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in iov {
            // SAFETY: the pieces are those of segments that are alive in the calling test.
            let bytes =
                unsafe { std::slice::from_raw_parts(piece.iov_base.cast::<u8>(), piece.iov_len) };
            out.extend_from_slice(bytes);
        }
        out
    }

    #[test]
    fn a_message_can_be_gathered_from_and_up_to_any_byte() {
        let arena = Arena::of_blocks(BLOCK).unwrap();
        let (segments, want) = message(&arena);
        let mut iov = Vec::new();
        let step = if cfg!(miri) { 5 } else { 1 };
        for skip in 0..=want.len() {
            for room in (0..=want.len()).step_by(step) {
                iov.clear();
                let covered = gather(&segments, skip, 16, room, &mut iov);
                assert_eq!(covered, room.min(want.len() - skip));
                assert_eq!(copied(&iov), want[skip..skip + covered]);
            }
            iov.clear();
            let covered = gather(&segments, skip, 2, usize::MAX, &mut iov);
            assert!(iov.len() <= 2 && copied(&iov) == want[skip..skip + covered]);
        }
    }

    /// A message is gathered where it lies in its operation, which then moves, and other holders of
    /// its buffers read them meanwhile.
    #[test]
    fn what_was_gathered_stays_right_when_the_message_moves() {
        let arena = Arena::of_blocks(BLOCK).unwrap();
        let (segments, want) = message(&arena);
        let segments = Segments::from(segments);
        let mut iov = Vec::new();
        gather(segments.as_slice(), 0, 16, usize::MAX, &mut iov);
        let moved = Box::new((segments, iov));
        let reader = match &moved.0.as_slice()[2] {
            Segment::Shared(buf, range) => (buf.clone(), range.clone()),
            other => panic!("{other:?}"),
        };
        drop(arena);
        let other = std::thread::spawn(move || reader.0[reader.1].to_vec());
        assert_eq!(moved.0.total(), want.len());
        assert_eq!(copied(&moved.1), want);
        assert_eq!(other.join().unwrap(), want[14..24]);
        assert_eq!(moved.0.into_bufs().len(), 1);
    }

    #[test]
    fn a_range_outside_its_buffer_has_no_bytes() {
        let outside = Segment::Buf(Buf::unpooled(BLOCK), BLOCK - 1..BLOCK + 1);
        assert!(outside.is_empty() && outside.bytes().is_empty());
        let shared = Arc::new(Buf::unpooled(BLOCK));
        let backwards = std::ops::Range { start: 9, end: 8 };
        assert_eq!(Segment::Shared(shared, backwards).len(), 0);
    }
}
