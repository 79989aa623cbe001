//! A checkpoint's contents: entries of the index as a byte stream, cut into checked pages.
//!
//! The stream is the exact state at the moment [`Capture`] began. It is written piece by piece while
//! the store works on: an entry that is about to change and was not reached yet is saved first.
//! At most one MiB waits plus what one batch of records can touch.

use crate::codec::{Put, Reader};
use crate::device::AlignedBuf;
use crate::extent::{Extent, ExtentList};
use crate::geometry::FORMAT_VERSION;
use crate::index::{Chunk, ChunkKey, Index, Inode, InodeExtra, Pin};
use crate::types::{BLOCK, Scope};
use crate::window::{Applied, Window};
use ebb_dataplane_protocol::{
    ChunkIndex, ContentId, Generation, InodeId, MapVersion, NodeId, PgEpoch, PgId, Sequence,
    SessionId, ViewVersion, crc32c,
};
use std::ops::Bound;

const MAGIC: u32 = u32::from_le_bytes(*b"EBBC");
/// Bytes of a page: one block of the device.
pub(crate) const PAGE_BYTES: usize = BLOCK;
/// Bytes of a page's header.
pub(crate) const PAGE_HEADER_BYTES: usize = 64;
const PAYLOAD: usize = PAGE_BYTES - PAGE_HEADER_BYTES;
/// Pages in one write, at most and unless told otherwise (1 MiB).
pub(crate) const PAGES_PER_WRITE: usize = 256;

/// Encoded sizes without their lists.
pub(crate) const INODE_BYTES: usize = 40;
pub(crate) const SESSION_BYTES: usize = 32;
/// Of one applied write in a session.
pub(crate) const APPLIED_BYTES: usize = 30;
const CHUNK_BYTES: usize = 24;
const PIN_BYTES: usize = 16;
const GLOBAL_BYTES: usize = 32;
const PG_BYTES: usize = 24;

/// Stream bytes of a chunk without those of its current extents.
pub(crate) fn chunk_overhead(c: &Chunk) -> usize {
    let list = |l: &ExtentList| l.0.iter().map(Extent::encoded_len).sum::<usize>();
    CHUNK_BYTES + c.pins.iter().map(|p| PIN_BYTES + list(&p.extents)).sum::<usize>()
}

/// Stream bytes an area of `bytes` holds, with a page to spare for global state.
pub(crate) fn capacity(bytes: u64, pgs: usize) -> u64 {
    let pages = bytes / PAGE_BYTES as u64;
    (pages * PAYLOAD as u64).saturating_sub((GLOBAL_BYTES + pgs * PG_BYTES) as u64 + PAYLOAD as u64)
}

#[derive(Clone, Copy, Debug)]
enum Cursor {
    Inodes(Option<Scope>),
    Chunks(Option<ChunkKey>),
    Sessions(Option<SessionId>),
    End,
}

/// A checkpoint being written.
#[derive(Debug)]
pub(crate) struct Capture {
    pub(crate) number: u64,
    store: u128,
    cursor: Cursor,
    pub(crate) out: Vec<u8>,
    page: u32,
    pages_per_write: usize,
}

impl Capture {
    fn new(number: u64, store: u128, pages_per_write: usize) -> Self {
        let (cursor, out) = (Cursor::Inodes(None), Vec::new());
        Self { number, store, cursor, out, page: 0, pages_per_write }
    }

    pub(crate) fn inode(&mut self, id: Scope, i: &Inode) {
        let o = &mut self.out;
        o.u8(1);
        o.u8(i.seals().len() as u8);
        o.u8(i.marks().len() as u8);
        o.u8(0);
        o.u32(u32::from(id.pg.0));
        o.u64(id.inode.0);
        o.u64(i.floor.0);
        o.u64(i.view.0);
        o.u64(i.content.0);
        for (g, v) in i.seals().iter().chain(i.marks()) {
            o.u64(g.0);
            o.u64(*v);
        }
    }

    pub(crate) fn chunk(&mut self, key: ChunkKey, c: &Chunk) {
        let o = &mut self.out;
        let start = o.len();
        o.u8(2);
        o.u8(c.pins.len() as u8);
        o.u16(c.extents.0.len() as u16);
        o.u32(key.1.0);
        o.u64(key.0.0);
        o.u64(0);
        c.extents.0.iter().for_each(|e| e.encode(o));
        for p in &c.pins {
            o.u64(p.generation.0);
            o.u64(p.extents.0.len() as u64);
            p.extents.0.iter().for_each(|e| e.encode(o));
        }
        let extents: usize = c.extents.0.iter().map(Extent::encoded_len).sum();
        assert_eq!(o.len() - start, chunk_overhead(c) + extents, "the size counter is right");
    }

    pub(crate) fn session(&mut self, id: SessionId, w: &Window) {
        let o = &mut self.out;
        o.u8(3);
        o.u8(0);
        o.u16(0);
        o.u32(w.applied.len() as u32);
        o.u64(id.0);
        o.u64(w.below.0);
        o.u64(w.used);
        for a in &w.applied {
            o.u64(a.sequence);
            o.u64(a.generation.0);
            o.u16(a.pg.0);
            o.u64(a.inode.0);
            o.u32(a.chunk.0);
        }
    }

    fn global(&mut self, index: &Index) {
        let o = &mut self.out;
        o.u8(4);
        o.u8(0);
        o.u16(index.pgs.len() as u16);
        o.u32(index.node.0);
        o.u64(index.horizon.0);
        o.u64(0);
        o.u64(0);
        for pg in &index.pgs {
            o.u64(u64::from(pg.frozen.is_some()));
            o.u64(pg.frozen.map_or(0, |e| e.0));
            o.u64(pg.taken.0);
        }
    }

    /// Cuts the next write out of the stream; a page that is not full only at the end.
    fn pages(&mut self, end: bool) -> Option<AlignedBuf> {
        let full = (self.out.len() / PAYLOAD).min(self.pages_per_write);
        let take = if full < self.pages_per_write && end { self.out.len() } else { full * PAYLOAD };
        if take == 0 {
            return None;
        }
        let stream: Vec<u8> = self.out.drain(..take).collect();
        let mut bytes = AlignedBuf::zeroed(take.div_ceil(PAYLOAD) * PAGE_BYTES);
        for (i, payload) in stream.chunks(PAYLOAD).enumerate() {
            let at = i * PAGE_BYTES;
            let mut h = Vec::with_capacity(PAGE_HEADER_BYTES);
            h.u32(MAGIC);
            h.u32(FORMAT_VERSION);
            h.u128(self.store);
            h.u64(self.number);
            h.u32(self.page);
            h.u32(payload.len() as u32);
            h.u32(crc32c(payload));
            h.resize(PAGE_HEADER_BYTES - 4, 0);
            let crc = crc32c(&h);
            h.u32(crc);
            bytes[at..at + PAGE_HEADER_BYTES].copy_from_slice(&h);
            bytes[at + PAGE_HEADER_BYTES..][..payload.len()].copy_from_slice(payload);
            assert!(page_payload(&bytes[at..], self.store, self.number, self.page).is_ok());
            self.page += 1;
        }
        Some(bytes)
    }
}

/// The payload of a page, checked.
pub(crate) fn page_payload(
    page: &[u8],
    store: u128,
    number: u64,
    index: u32,
) -> Result<&[u8], &'static str> {
    let header = page.get(..PAGE_HEADER_BYTES).ok_or("short page")?;
    let mut r = Reader::new(header);
    let (magic, version, id) = (r.u32(), r.u32(), r.u128());
    if magic != Some(MAGIC) || version != Some(FORMAT_VERSION) {
        return Err("not a checkpoint page");
    }
    let stored = u32::from_le_bytes(header[60..].try_into().expect("four bytes"));
    if crc32c(&header[..60]) != stored {
        return Err("header checksum");
    }
    if (id, r.u64(), r.u32()) != (Some(store), Some(number), Some(index)) {
        return Err("page of another checkpoint or place");
    }
    let (len, crc) = (r.u32().unwrap_or(0) as usize, r.u32());
    let payload =
        page.get(PAGE_HEADER_BYTES..PAGE_HEADER_BYTES.saturating_add(len)).ok_or("short page")?;
    if Some(crc32c(payload)) != crc {
        return Err("payload checksum");
    }
    Ok(payload)
}

impl Index {
    /// Starts saving the state as it is now.
    pub(crate) fn begin_capture(&mut self, number: u64, store: u128) {
        let mut capture = Capture::new(number, store, self.pages_per_write);
        capture.global(self);
        self.capture = Some(capture);
    }

    /// The next bytes to write; `None`: the stream is complete.
    pub(crate) fn capture_next(&mut self) -> Option<AlignedBuf> {
        let mut capture = self.capture.take()?;
        let mut budget = 65_536;
        while capture.out.len() < capture.pages_per_write * PAYLOAD && budget > 0 {
            budget -= 1;
            if !self.capture_entry(&mut capture) {
                break;
            }
        }
        let end = matches!(capture.cursor, Cursor::End);
        let mut bytes = capture.pages(end);
        while bytes.is_none() && !matches!(capture.cursor, Cursor::End) {
            // Everything passed was saved already: go on until there is something to write.
            self.capture_entry(&mut capture);
            bytes = capture.pages(matches!(capture.cursor, Cursor::End));
        }
        self.capture = Some(capture);
        bytes
    }

    /// Saves the entry at the cursor and moves on; `false` at the end.
    fn capture_entry(&mut self, c: &mut Capture) -> bool {
        fn after<K>(last: Option<K>) -> (Bound<K>, Bound<K>) {
            (last.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded)
        }
        match c.cursor {
            Cursor::Inodes(last) => match self.inodes.range_mut(after(last)).next() {
                Some((k, v)) => {
                    if v.captured != c.number {
                        c.inode(*k, v);
                        v.captured = c.number;
                    }
                    c.cursor = Cursor::Inodes(Some(*k));
                }
                None => c.cursor = Cursor::Chunks(None),
            },
            Cursor::Chunks(last) => match self.chunks.range_mut(after(last)).next() {
                Some((k, v)) => {
                    if v.captured != c.number {
                        c.chunk(*k, v);
                        v.captured = c.number;
                    }
                    c.cursor = Cursor::Chunks(Some(*k));
                }
                None => c.cursor = Cursor::Sessions(None),
            },
            Cursor::Sessions(last) => match self.sessions.range_mut(after(last)).next() {
                Some((k, v)) => {
                    if v.captured != c.number {
                        c.session(*k, v);
                        v.captured = c.number;
                    }
                    c.cursor = Cursor::Sessions(Some(*k));
                }
                None => c.cursor = Cursor::End,
            },
            Cursor::End => return false,
        }
        true
    }

    /// Loads one entry from a reader; `None`: it makes no sense. Entries come in any order.
    pub(crate) fn load_entry(&mut self, r: &mut Reader<'_>) -> Option<()> {
        match r.u8()? {
            1 => {
                let (seals, marks) = (r.u8()?, r.u8()?);
                (r.u8()? == 0).then_some(())?;
                let pg = PgId(u16::try_from(r.u32()?).ok()?);
                (usize::from(pg.0) < self.pgs.len()).then_some(())?;
                let id = Scope { inode: InodeId(r.u64()?), pg };
                let (floor, view, content) =
                    (Generation(r.u64()?), ViewVersion(r.u64()?), ContentId(r.u64()?));
                let mut list = |n: u8| -> Option<Vec<(Generation, u64)>> {
                    (0..n).map(|_| Some((Generation(r.u64()?), r.u64()?))).collect()
                };
                let extra = InodeExtra { seals: list(seals)?, marks: list(marks)? };
                self.with_extra(id, |x| *x = extra);
                let inode = self.inode_mut(id);
                (inode.floor, inode.view, inode.content) = (floor, view, content);
            }
            2 => {
                let (pins, extents, chunk) = (r.u8()?, r.u16()?, ChunkIndex(r.u32()?));
                let inode = InodeId(r.u64()?);
                (r.u64()? == 0).then_some(())?;
                let list = |r: &mut Reader<'_>, n: u64| -> Option<ExtentList> {
                    let l = (0..n).map(|_| Extent::decode(r)).collect::<Option<Vec<_>>>()?;
                    let l = ExtentList(l);
                    l.is_sound().then_some(l)
                };
                let mut c = Chunk { extents: list(r, u64::from(extents))?, ..Chunk::default() };
                for _ in 0..pins {
                    let generation = Generation(r.u64()?);
                    let n = r.u64()?;
                    c.pins.push(Pin { generation, extents: list(r, n)? });
                }
                self.load_chunk((inode, chunk), c).then_some(())?;
            }
            3 => {
                (r.u8()? == 0 && r.u16()? == 0).then_some(())?;
                let n = r.u32()?;
                let (id, below, used) = (SessionId(r.u64()?), Sequence(r.u64()?), r.u64()?);
                let groups = self.pgs.len();
                let mut entry = || {
                    let (sequence, generation) = (r.u64()?, Generation(r.u64()?));
                    let pg = PgId(r.u16()?);
                    let (inode, chunk) = (InodeId(r.u64()?), ChunkIndex(r.u32()?));
                    let known = usize::from(pg.0) < groups;
                    known.then_some(Applied { sequence, generation, pg, inode, chunk })
                };
                let applied = (0..n).map(|_| entry()).collect::<Option<Vec<_>>>()?;
                let ascending = applied.windows(2).all(|w| w[0].sequence < w[1].sequence);
                ascending.then_some(())?;
                self.session_mut(id, |w| (w.below, w.used, w.applied) = (below, used, applied));
            }
            4 => {
                (r.u8()? == 0).then_some(())?;
                let n = usize::from(r.u16()?);
                self.node = NodeId(r.u32()?);
                self.horizon = MapVersion(r.u64()?);
                (r.u64()? == 0 && r.u64()? == 0 && n == self.pgs.len()).then_some(())?;
                for pg in &mut self.pgs {
                    let (frozen, epoch) = (r.u64()?, PgEpoch(r.u64()?));
                    pg.frozen = (frozen == 1).then_some(epoch);
                    pg.taken = PgEpoch(r.u64()?);
                }
            }
            _ => return None,
        }
        Some(())
    }
}

/// The checkpoint of an empty store.
pub(crate) fn empty(number: u64, store: u128, index: &Index) -> AlignedBuf {
    let mut c = Capture::new(number, store, PAGES_PER_WRITE);
    c.global(index);
    c.pages(true).unwrap_or_else(|| AlignedBuf::zeroed(BLOCK))
}
