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
