//! Journal records: what a mutation means, independent of where the index stands. Applying the same
//! records in the same order to the same state gives the same state: recovery is a replay.
//!
//! Layout in docs/FORMAT.md §4.3: `u8 type, u8 0, u16 0, u32 body bytes, body`, padded to 8 bytes.

use crate::codec::{Put, Reader};
use crate::extent::{Extent, ExtentList, Run};
use crate::types::{CHUNK_BLOCKS, SEALS_MAX, Scope, WINDOW_PAGE};
use ebb_dataplane_protocol::control::{FlushDone, WindowEntry};
use ebb_dataplane_protocol::grant::CUTS_MAX;
use ebb_dataplane_protocol::replica::CopiedScope;
use ebb_dataplane_protocol::{
    ChunkIndex, ContentId, Cut, Generation, InodeId, MapVersion, NodeId, PgEpoch, PgId, Sequence,
    SessionId, ViewVersion,
};

/// Bytes of a record's header.
pub(crate) const RECORD_HEADER_BYTES: usize = 8;
/// Entries of one chunk in a copy: what a batch has room for.
pub(crate) const ENTRIES_MAX: usize = 20_000;
/// Moves in one relocation record.
pub(crate) const MOVES_MAX: usize = 256;

/// Blocks written to a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WriteRecord {
    pub(crate) inode: InodeId,
    pub(crate) chunk: ChunkIndex,
    /// First byte and bytes that the client wrote (high-water mark).
    pub(crate) offset: u32,
    pub(crate) len: u32,
    pub(crate) generation: Generation,
    pub(crate) session: SessionId,
    pub(crate) sequence: Sequence,
    pub(crate) answered_below: Sequence,
    /// The runs are inside the journal.
    pub(crate) inline: bool,
    pub(crate) runs: Vec<Run>,
    pub(crate) crcs: Box<[u32]>,
}

/// Clean blocks fetched from S3.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FillRecord {
    pub(crate) inode: InodeId,
    pub(crate) chunk: ChunkIndex,
    pub(crate) first_block: u32,
    pub(crate) content: ContentId,
    pub(crate) tail: u16,
    pub(crate) runs: Vec<Run>,
    pub(crate) crcs: Box<[u32]>,
}

/// A move of `blocks` device blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) from: u32,
    pub(crate) to: u32,
    pub(crate) blocks: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    Write(WriteRecord),
    Fill(FillRecord),
    Seal {
        scope: Scope,
        generation: Generation,
    },
    FlushDone {
        pg: PgId,
        done: FlushDone,
    },
    FlushAborted {
        scope: Scope,
        generation: Generation,
    },
    View {
        scope: Scope,
        version: ViewVersion,
        content: ContentId,
        valid_bytes: u64,
        cuts: Vec<Cut>,
    },
    Floor {
        scope: Scope,
        floor: Generation,
    },
    DropInode {
        scope: Scope,
    },
    EvictChunk {
        inode: InodeId,
        chunk: ChunkIndex,
    },
    EvictInode {
        inode: InodeId,
    },
    EvictAll,
    Freeze {
        pg: PgId,
        epoch: PgEpoch,
    },
    Thaw {
        pg: PgId,
        epoch: PgEpoch,
    },
    Release {
        pg: PgId,
        epoch: PgEpoch,
    },
    /// As Release, of what is dirty and pinned, too.
    Discard {
        pg: PgId,
        epoch: PgEpoch,
    },
    Relocate {
        inode: InodeId,
        chunk: ChunkIndex,
        moves: Vec<Move>,
    },
    SessionTrim {
        session: SessionId,
        below: Sequence,
    },
    SessionDrop {
        session: SessionId,
    },
    Node {
        node: NodeId,
    },
    ForgetBare {
        horizon: MapVersion,
    },
    Windows {
        pg: PgId,
        epoch: PgEpoch,
        entries: Vec<WindowEntry>,
    },
    /// One list of a chunk, copied from another core.
    CopyList(CopyList),
    /// What outlives an inode's chunks, copied from another core.
    CopyScope {
        pg: PgId,
        state: CopiedScope,
    },
}

/// Replaces the dirty extents, or the pins of one generation, of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CopyList {
    pub(crate) inode: InodeId,
    pub(crate) chunk: ChunkIndex,
    pub(crate) pin: Option<Generation>,
    pub(crate) extents: Vec<Extent>,
    /// With the last list: pins of other generations than these go.
    pub(crate) pins_left: Option<Vec<Generation>>,
    /// And these are the writes that were applied to the chunk.
    pub(crate) windows: Option<Vec<WindowEntry>>,
}

fn put_runs(out: &mut Vec<u8>, runs: &[Run], crcs: &[u32]) {
    out.u16(runs.len() as u16);
    out.u16(crcs.len() as u16);
    for r in runs {
        out.u32(r.start);
        out.u32(r.blocks);
    }
    for c in crcs {
        out.u32(*c);
    }
}

fn put_scope(out: &mut Vec<u8>, scope: Scope) {
    out.u64(scope.inode.0);
    out.u64(u64::from(scope.pg.0));
}

fn get_scope(r: &mut Reader<'_>) -> Option<Scope> {
    let inode = InodeId(r.u64()?);
    Some(Scope { inode, pg: PgId(u16::try_from(r.u64()?).ok()?) })
}

fn put_entry(out: &mut Vec<u8>, e: &WindowEntry) {
    [e.session.0, e.below.0, e.sequence.0, e.generation.0, e.inode.0]
        .iter()
        .for_each(|v| out.u64(*v));
    out.u32(e.chunk.0);
    out.u32(0);
}

fn get_entry(r: &mut Reader<'_>) -> Option<WindowEntry> {
    let (session, below) = (SessionId(r.u64()?), Sequence(r.u64()?));
    let (sequence, generation) = (Sequence(r.u64()?), Generation(r.u64()?));
    let (inode, chunk) = (InodeId(r.u64()?), ChunkIndex(r.u32()?));
    (r.u32()? == 0).then_some(WindowEntry { session, below, sequence, generation, inode, chunk })
}

fn get_runs(r: &mut Reader<'_>) -> Option<(Vec<Run>, Box<[u32]>)> {
    let (n, blocks) = (r.u16()?, r.u16()?);
    if u32::from(blocks) > CHUNK_BLOCKS || blocks == 0 || n == 0 || n > blocks {
        return None;
    }
    let mut runs = Vec::with_capacity(usize::from(n));
    for _ in 0..n {
        let run = Run { start: r.u32()?, blocks: r.u32()? };
        if run.blocks == 0 || run.blocks > u32::from(blocks) {
            return None;
        }
        run.start.checked_add(run.blocks)?;
        runs.push(run);
    }
    let crcs = r.u32s(usize::from(blocks))?;
    (crate::extent::total(&runs) == u32::from(blocks)).then_some((runs, crcs))
}

impl Record {
    fn kind(&self) -> u8 {
        match self {
            Record::Write(_) => 1,
            Record::Fill(_) => 2,
            Record::Seal { .. } => 3,
            Record::FlushDone { .. } => 4,
            Record::FlushAborted { .. } => 5,
            Record::View { .. } => 6,
            Record::Floor { .. } => 7,
            Record::DropInode { .. } => 8,
            Record::EvictChunk { .. } => 9,
            Record::EvictInode { .. } => 10,
            Record::EvictAll => 11,
            Record::Freeze { .. } => 12,
            Record::Thaw { .. } => 13,
            Record::Release { .. } => 14,
            Record::Relocate { .. } => 15,
            Record::SessionTrim { .. } => 16,
            Record::SessionDrop { .. } => 17,
            Record::Node { .. } => 18,
            Record::ForgetBare { .. } => 19,
            Record::Windows { .. } => 20,
            Record::Discard { .. } => 21,
            Record::CopyList(_) => 22,
            Record::CopyScope { .. } => 23,
        }
    }

    /// Device blocks that the record names.
    pub(crate) fn runs(&self) -> Vec<Run> {
        match self {
            Record::Write(w) => w.runs.clone(),
            Record::Fill(f) => f.runs.clone(),
            Record::Relocate { moves, .. } => moves
                .iter()
                .flat_map(|m| [m.from, m.to].map(|start| Run { start, blocks: m.blocks }))
                .collect(),
            Record::CopyList(c) => c.extents.iter().map(Extent::run).collect(),
            _ => Vec::new(),
        }
    }

    /// Appends the record. Its length does not depend on where inline data goes.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.u8(self.kind());
        out.u8(0);
        out.u16(0);
        out.u32(0);
        self.body(out);
        let body = out.len() - start - RECORD_HEADER_BYTES;
        out[start + 4..start + 8].copy_from_slice(&(body as u32).to_le_bytes());
        out.resize(start + (out.len() - start).next_multiple_of(8), 0);
    }

    fn body(&self, out: &mut Vec<u8>) {
        match self {
            Record::Write(w) => {
                out.u64(w.inode.0);
                out.u32(w.chunk.0);
                out.u32(w.offset);
                out.u32(w.len);
                out.u32(u32::from(w.inline));
                out.u64(w.generation.0);
                out.u64(w.session.0);
                out.u64(w.sequence.0);
                out.u64(w.answered_below.0);
                put_runs(out, &w.runs, &w.crcs);
            }
            Record::Fill(f) => {
                out.u64(f.inode.0);
                out.u32(f.chunk.0);
                out.u16(f.first_block as u16);
                out.u16(f.tail);
                out.u64(f.content.0);
                put_runs(out, &f.runs, &f.crcs);
            }
            Record::Seal { scope, generation } | Record::FlushAborted { scope, generation } => {
                put_scope(out, *scope);
                out.u64(generation.0);
            }
            Record::Floor { scope, floor } => {
                put_scope(out, *scope);
                out.u64(floor.0);
            }
            Record::FlushDone { pg, done: d } => {
                put_scope(out, Scope { inode: d.inode, pg: *pg });
                let fields = [
                    d.generation.0,
                    d.content.0,
                    d.old_content.0,
                    d.valid_bytes,
                    d.old_valid_bytes,
                ];
                fields.iter().for_each(|v| out.u64(*v));
            }
            Record::View { scope, version, content, valid_bytes, cuts } => {
                put_scope(out, *scope);
                out.u64(version.0);
                out.u64(content.0);
                out.u64(*valid_bytes);
                out.u64(cuts.len() as u64);
                for c in cuts {
                    out.u64(c.generation.0);
                    out.u64(c.at);
                }
            }
            Record::DropInode { scope } => put_scope(out, *scope),
            Record::EvictInode { inode } => out.u64(inode.0),
            Record::EvictChunk { inode, chunk } => {
                out.u64(inode.0);
                out.u32(chunk.0);
            }
            Record::EvictAll => {}
            Record::Freeze { pg, epoch }
            | Record::Thaw { pg, epoch }
            | Record::Release { pg, epoch }
            | Record::Discard { pg, epoch } => {
                out.u64(u64::from(pg.0));
                out.u64(epoch.0);
            }
            Record::Relocate { inode, chunk, moves } => {
                out.u64(inode.0);
                out.u32(chunk.0);
                out.u32(moves.len() as u32);
                for m in moves {
                    out.u32(m.from);
                    out.u32(m.to);
                    out.u32(m.blocks);
                }
            }
            Record::SessionTrim { session, below } => {
                out.u64(session.0);
                out.u64(below.0);
            }
            Record::SessionDrop { session } => out.u64(session.0),
            Record::Node { node } => out.u32(node.0),
            Record::ForgetBare { horizon } => out.u64(horizon.0),
            Record::Windows { pg, epoch, entries } => {
                out.u64(epoch.0);
                out.u32(u32::from(pg.0));
                out.u32(entries.len() as u32);
                entries.iter().for_each(|e| put_entry(out, e));
            }
            Record::CopyList(c) => {
                out.u64(c.inode.0);
                out.u32(c.chunk.0);
                out.u16(c.extents.len() as u16);
                out.u8(u8::from(c.pin.is_some()));
                // 255: not the last list; else how many pins are left.
                out.u8(c.pins_left.as_ref().map_or(255, |p| p.len() as u8));
                out.u64(c.pin.map_or(0, |g| g.0));
                c.pins_left.iter().flatten().for_each(|g| out.u64(g.0));
                out.u32(c.windows.as_ref().map_or(u32::MAX, |w| w.len() as u32));
                c.windows.iter().flatten().for_each(|e| put_entry(out, e));
                c.extents.iter().for_each(|e| e.encode(out));
            }
            Record::CopyScope { pg, state } => {
                put_scope(out, Scope { inode: state.inode, pg: *pg });
                [state.floor.0, state.view.0, state.content.0].iter().for_each(|v| out.u64(*v));
                out.u32(state.seals.len() as u32);
                out.u32(state.marks.len() as u32);
                for (g, v) in state.seals.iter().chain(&state.marks) {
                    out.u64(g.0);
                    out.u64(*v);
                }
            }
        }
    }

    /// Decodes the next record; `None` if it makes no sense.
    pub(crate) fn decode(r: &mut Reader<'_>) -> Option<Self> {
        let (kind, zero, zeros, len) = (r.u8()?, r.u8()?, r.u16()?, r.u32()? as usize);
        if zero != 0 || zeros != 0 {
            return None;
        }
        let body = r.take(len)?;
        r.take((RECORD_HEADER_BYTES + len).next_multiple_of(8) - RECORD_HEADER_BYTES - len)?;
        let mut b = Reader::new(body);
        let record = Self::decode_body(kind, &mut b)?;
        b.is_empty().then_some(record)
    }

    fn decode_body(kind: u8, r: &mut Reader<'_>) -> Option<Self> {
        let inode = |r: &mut Reader<'_>| r.u64().map(InodeId);
        let generation = |r: &mut Reader<'_>| r.u64().map(Generation);
        Some(match kind {
            1 => {
                let (inode, chunk, offset, len) =
                    (inode(r)?, ChunkIndex(r.u32()?), r.u32()?, r.u32()?);
                let inline = match r.u32()? {
                    0 => false,
                    1 => true,
                    _ => return None,
                };
                let generation = generation(r)?;
                let (session, sequence) = (SessionId(r.u64()?), Sequence(r.u64()?));
                let answered_below = Sequence(r.u64()?);
                let (runs, crcs) = get_runs(r)?;
                let w = WriteRecord {
                    inode,
                    chunk,
                    offset,
                    len,
                    generation,
                    session,
                    sequence,
                    answered_below,
                    inline,
                    runs,
                    crcs,
                };
                let range = crate::types::block_range(offset, len)?;
                if range.len() != w.crcs.len() {
                    return None;
                }
                Record::Write(w)
            }
            2 => {
                let (inode, chunk) = (inode(r)?, ChunkIndex(r.u32()?));
                let (first_block, tail) = (u32::from(r.u16()?), r.u16()?);
                let content = ContentId(r.u64()?);
                let (runs, crcs) = get_runs(r)?;
                if first_block + crcs.len() as u32 > CHUNK_BLOCKS || !(1..=4096).contains(&tail) {
                    return None;
                }
                Record::Fill(FillRecord { inode, chunk, first_block, content, tail, runs, crcs })
            }
            3 => Record::Seal { scope: get_scope(r)?, generation: generation(r)? },
            4 => {
                let Scope { inode, pg } = get_scope(r)?;
                let done = FlushDone {
                    inode,
                    generation: generation(r)?,
                    content: ContentId(r.u64()?),
                    old_content: ContentId(r.u64()?),
                    valid_bytes: r.u64()?,
                    old_valid_bytes: r.u64()?,
                };
                Record::FlushDone { pg, done }
            }
            5 => Record::FlushAborted { scope: get_scope(r)?, generation: generation(r)? },
            6 => {
                let (scope, version) = (get_scope(r)?, ViewVersion(r.u64()?));
                let (content, valid_bytes) = (ContentId(r.u64()?), r.u64()?);
                let n = r.u64()?;
                if n > CUTS_MAX as u64 {
                    return None;
                }
                let mut cuts = Vec::with_capacity(n as usize);
                for _ in 0..n {
                    cuts.push(Cut { generation: generation(r)?, at: r.u64()? });
                }
                Record::View { scope, version, content, valid_bytes, cuts }
            }
            7 => Record::Floor { scope: get_scope(r)?, floor: generation(r)? },
            8 => Record::DropInode { scope: get_scope(r)? },
            9 => Record::EvictChunk { inode: inode(r)?, chunk: ChunkIndex(r.u32()?) },
            10 => Record::EvictInode { inode: inode(r)? },
            11 => Record::EvictAll,
            12..=14 | 21 => {
                let pg = PgId(u16::try_from(r.u64()?).ok()?);
                let epoch = PgEpoch(r.u64()?);
                match kind {
                    12 => Record::Freeze { pg, epoch },
                    13 => Record::Thaw { pg, epoch },
                    14 => Record::Release { pg, epoch },
                    _ => Record::Discard { pg, epoch },
                }
            }
            15 => {
                let (inode, chunk, n) = (inode(r)?, ChunkIndex(r.u32()?), r.u32()? as usize);
                if n > MOVES_MAX {
                    return None;
                }
                let mut moves = Vec::with_capacity(n);
                for _ in 0..n {
                    let m = Move { from: r.u32()?, to: r.u32()?, blocks: r.u32()? };
                    m.from.checked_add(m.blocks)?;
                    m.to.checked_add(m.blocks)?;
                    moves.push(m);
                }
                Record::Relocate { inode, chunk, moves }
            }
            16 => Record::SessionTrim { session: SessionId(r.u64()?), below: Sequence(r.u64()?) },
            17 => Record::SessionDrop { session: SessionId(r.u64()?) },
            18 => Record::Node { node: NodeId(r.u32()?) },
            19 => Record::ForgetBare { horizon: MapVersion(r.u64()?) },
            20 => {
                let epoch = PgEpoch(r.u64()?);
                let (pg, n) = (PgId(u16::try_from(r.u32()?).ok()?), r.u32()? as usize);
                if n > WINDOW_PAGE {
                    return None;
                }
                let mut entries = Vec::with_capacity(n);
                for _ in 0..n {
                    entries.push(get_entry(r)?);
                }
                Record::Windows { pg, epoch, entries }
            }
            22 => {
                let (inode, chunk, n) = (inode(r)?, ChunkIndex(r.u32()?), r.u16()?);
                let (pinned, left) = (r.u8()?, r.u8()?);
                let g = generation(r)?;
                let pin = match pinned {
                    0 if g == Generation(0) => None,
                    1 => Some(g),
                    _ => return None,
                };
                let pins_left = match left {
                    255 => None,
                    n => Some((0..n).map(|_| generation(r)).collect::<Option<Vec<_>>>()?),
                };
                let windows = match r.u32()? {
                    u32::MAX => None,
                    n if n as usize > ENTRIES_MAX => return None,
                    n => Some((0..n).map(|_| get_entry(r)).collect::<Option<Vec<_>>>()?),
                };
                let extents = (0..n).map(|_| Extent::decode(r)).collect::<Option<Vec<Extent>>>()?;
                ExtentList(extents.clone()).is_sound().then_some(())?;
                Record::CopyList(CopyList { inode, chunk, pin, extents, pins_left, windows })
            }
            23 => {
                let Scope { inode, pg } = get_scope(r)?;
                let (floor, view, content) =
                    (generation(r)?, ViewVersion(r.u64()?), ContentId(r.u64()?));
                let (seals, marks) = (r.u32()?, r.u32()?);
                if seals as usize > SEALS_MAX + 1 || marks > 16 {
                    return None;
                }
                let mut list = |n: u32| -> Option<Vec<(Generation, u64)>> {
                    (0..n).map(|_| Some((generation(r)?, r.u64()?))).collect()
                };
                let (seals, marks) = (list(seals)?, list(marks)?);
                let state = CopiedScope { inode, floor, view, content, seals, marks };
                Record::CopyScope { pg, state }
            }
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_past_the_last_block_number_is_no_record() {
        for (from, to) in [(u32::MAX, 1), (1, u32::MAX)] {
            let moves = vec![Move { from, to, blocks: 2 }];
            let record = Record::Relocate { inode: InodeId(1), chunk: ChunkIndex(0), moves };
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            assert_eq!(Record::decode(&mut Reader::new(&bytes)), None);
        }
    }

    #[test]
    fn every_record_round_trips_and_no_truncation_decodes() {
        let (inode, chunk, generation) = (InodeId(7), ChunkIndex(3), Generation(5));
        let (pg, scope) = (PgId(6), Scope { inode, pg: PgId(6) });
        let runs = vec![Run { start: 9, blocks: 2 }, Run { start: 90, blocks: 1 }];
        let crcs: Box<[u32]> = [1, 2, 3].into();
        let all = vec![
            Record::Write(WriteRecord {
                inode,
                chunk,
                offset: 4000,
                len: 5000,
                generation,
                session: SessionId(8),
                sequence: Sequence(9),
                answered_below: Sequence(2),
                inline: true,
                runs: runs.clone(),
                crcs: crcs.clone(),
            }),
            Record::Fill(FillRecord {
                inode,
                chunk,
                first_block: 1021,
                content: ContentId(4),
                tail: 77,
                runs,
                crcs,
            }),
            Record::Seal { scope, generation },
            Record::FlushDone {
                pg,
                done: FlushDone {
                    inode,
                    generation,
                    content: ContentId(1),
                    old_content: ContentId(2),
                    valid_bytes: 3,
                    old_valid_bytes: 4,
                },
            },
            Record::FlushAborted { scope, generation },
            Record::View {
                scope,
                version: ViewVersion(1),
                content: ContentId(2),
                valid_bytes: 3,
                cuts: vec![Cut { generation, at: 5 }],
            },
            Record::Floor { scope, floor: generation },
            Record::DropInode { scope },
            Record::EvictChunk { inode, chunk },
            Record::EvictInode { inode },
            Record::EvictAll,
            Record::Freeze { pg: PgId(1), epoch: PgEpoch(2) },
            Record::Thaw { pg: PgId(1), epoch: PgEpoch(2) },
            Record::Release { pg: PgId(1), epoch: PgEpoch(2) },
            Record::Relocate { inode, chunk, moves: vec![Move { from: 1, to: 2, blocks: 3 }] },
            Record::SessionTrim { session: SessionId(1), below: Sequence(2) },
            Record::SessionDrop { session: SessionId(1) },
            Record::Node { node: NodeId(3) },
            Record::ForgetBare { horizon: MapVersion(3) },
            Record::Windows {
                pg: PgId(1),
                epoch: PgEpoch(2),
                entries: vec![WindowEntry {
                    session: SessionId(2),
                    below: Sequence(3),
                    sequence: Sequence(4),
                    generation,
                    inode,
                    chunk,
                }],
            },
            Record::Discard { pg: PgId(1), epoch: PgEpoch(2) },
            Record::CopyList(CopyList {
                inode,
                chunk,
                pin: Some(generation),
                extents: vec![Extent {
                    first: 3,
                    tail: 4096,
                    location: 77,
                    origin: crate::extent::Origin::Dirty(generation),
                    crcs: [4, 5].into(),
                }],
                pins_left: Some(vec![generation]),
                windows: Some(Vec::new()),
            }),
            Record::CopyScope {
                pg,
                state: CopiedScope {
                    inode,
                    floor: generation,
                    view: ViewVersion(1),
                    content: ContentId(2),
                    seals: vec![(generation, 3)],
                    marks: vec![(generation, 4)],
                },
            },
        ];
        for (i, record) in all.iter().enumerate() {
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            assert_eq!(usize::from(record.kind()), i + 1, "numbers are part of the format");
            assert_eq!(bytes.len() % 8, 0);
            let mut r = Reader::new(&bytes);
            assert_eq!(Record::decode(&mut r).as_ref(), Some(record));
            assert!(r.is_empty());
            for cut in 0..bytes.len() {
                assert!(Record::decode(&mut Reader::new(&bytes[..cut])).is_none());
            }
        }
    }
}
