//! Format and recovery (docs/FORMAT.md §7). Blocking, before the reactor runs.
//!
//! Everything is synced first: a killed process may have left completed writes in the device's cache,
//! and what is read here must still be there after a power cut.

use crate::alloc::Allocator;
use crate::codec::Reader;
use crate::device::{AlignedBuf, DeviceWrite, OpenDevice};
use crate::error::{FormatError, GeometryError, OpenError};
use crate::geometry::{Geometry, HEAD_BYTES, Identity};
use crate::index::Index;
use crate::journal::{BATCH_HEADER_BYTES, BatchHeader, Journal, Position, decode_batch, place};
use crate::superblock::{Copy, Superblock, choose};
use crate::types::BLOCK;
use ebb_dataplane_protocol::ClusterId;

/// The writes that make an empty store, in order; sync before the last four (the superblocks) and
/// after them. The device should be preallocated (zero-filled) by the caller; old contents do no harm.
pub fn format(geometry: Geometry, identity: Identity) -> Result<Vec<DeviceWrite>, GeometryError> {
    geometry.check()?;
    if identity.pg_count == 0 {
        let (what, found, rule) = ("pg_count", 0, "at least 1");
        return Err(GeometryError::Bad { what, found, rule });
    }
    let index = Index::new(ring_of(&geometry), identity.node, identity.pg_count);
    let number = 1;
    let bytes = crate::capture::empty(number, identity.store, &index);
    let superblock = Superblock {
        geometry,
        identity,
        number,
        checkpoint_bytes: bytes.len() as u64,
        replay_page: 0,
        live_pages: 0,
        replay_sequence: 1,
        replay_previous: 0,
    };
    let mut out = vec![DeviceWrite { offset: geometry.checkpoint_start(1), bytes }];
    out.extend(
        geometry
            .superblock_offsets()
            .into_iter()
            .map(|offset| DeviceWrite { offset, bytes: superblock.encode() }),
    );
    Ok(out)
}

/// [`format`], carried out with its syncs.
pub fn format_device(
    device: &mut dyn OpenDevice,
    geometry: Geometry,
    identity: Identity,
) -> Result<(), FormatError> {
    let writes = format(geometry, identity)?;
    let superblocks = geometry.superblock_offsets();
    for w in &writes {
        if superblocks.contains(&w.offset) {
            device.sync()?;
        }
        device.write_at(w.offset, &w.bytes)?;
    }
    Ok(device.sync()?)
}

/// Reads the identity of a formatted device without opening it. The node id is the checkpoint's: one set
/// since then is known after `open` only.
pub fn identify(device: &mut dyn OpenDevice) -> Result<Identity, OpenError> {
    Ok(read_superblocks(device)?.0.identity)
}

pub(crate) struct Recovered {
    pub(crate) superblock: Superblock,
    pub(crate) copies: Vec<(u64, Copy)>,
    pub(crate) index: Index,
    pub(crate) alloc: Allocator,
    pub(crate) journal: Journal,
    pub(crate) batches: u64,
}

fn io(doing: &'static str) -> impl Fn(std::io::Error) -> OpenError {
    move |source| OpenError::Io { doing, source }
}

fn ring_of(geometry: &Geometry) -> std::ops::Range<u32> {
    let start = (geometry.journal_start() / BLOCK as u64) as u32;
    start..start + (geometry.journal_bytes / BLOCK as u64) as u32
}

fn read_superblocks(
    device: &mut dyn OpenDevice,
) -> Result<(Superblock, Vec<(u64, Copy)>), OpenError> {
    let len = device.len().map_err(io("asking for the device's length"))?;
    let mut buf = AlignedBuf::zeroed(BLOCK);
    let mut read = |offset: u64| -> Result<Copy, OpenError> {
        if offset + BLOCK as u64 > len {
            return Ok(Copy::Absent);
        }
        device.read_at(offset, &mut buf).map_err(io("reading a superblock"))?;
        Ok(Superblock::decode(&buf))
    };
    let mut copies = vec![(0, read(0)?), (HEAD_BYTES / 2, read(HEAD_BYTES / 2)?)];
    // The tail copies are where the head copies say the device ends; without those, where it ends.
    let bytes = copies
        .iter()
        .find_map(
            |(_, c)| if let Copy::Valid(s) = c { Some(s.geometry.device_bytes) } else { None },
        )
        .unwrap_or(len / BLOCK as u64 * BLOCK as u64);
    let probe = Geometry { device_bytes: bytes, journal_bytes: 0, checkpoint_bytes: 0 };
    if bytes > crate::geometry::TAIL_BYTES {
        for offset in &probe.superblock_offsets()[2..] {
            copies.push((*offset, read(*offset)?));
        }
    }
    for (_, c) in &copies {
        if let Copy::Valid(s) = c
            && s.geometry.device_bytes > len
        {
            return Err(OpenError::Shorter { found: len, expected: s.geometry.device_bytes });
        }
    }
    let chosen = choose(&copies.iter().map(|c| c.1).collect::<Vec<_>>())?;
    Ok((chosen, copies))
}

/// Superblock, checkpoint, journal, bitmap. Writes nothing.
pub(crate) fn recover(
    device: &mut dyn OpenDevice,
    cluster: Option<ClusterId>,
) -> Result<Recovered, OpenError> {
    device.sync().map_err(io("syncing what a dead process left"))?;
    let (superblock, copies) = read_superblocks(device)?;
    if let Some(expected) = cluster
        && expected != superblock.identity.cluster
    {
        return Err(OpenError::OtherCluster { found: superblock.identity.cluster, expected });
    }
    let geometry = superblock.geometry;
    let identity = superblock.identity;
    let mut index = Index::new(ring_of(&geometry), identity.node, identity.pg_count);
    load_checkpoint(device, &superblock, &mut index)?;
    let (tail, position, batches) = replay(device, &superblock, &mut index)?;
    index.released.clear();
    let journal = Journal::new(&geometry, identity.store, tail, position);
    let alloc = rebuild(&geometry, &index, &journal)?;
    Ok(Recovered { superblock, copies, index, alloc, journal, batches })
}

/// Brings the copies that differ in line, each durable before the next.
pub(crate) fn repair_superblocks(
    device: &mut dyn OpenDevice,
    recovered: &Recovered,
) -> Result<(), OpenError> {
    for (offset, copy) in &recovered.copies {
        if *copy != Copy::Valid(recovered.superblock) {
            let bytes = recovered.superblock.encode();
            device.write_at(*offset, &bytes).map_err(io("repairing a superblock"))?;
            device.sync().map_err(io("repairing a superblock"))?;
        }
    }
    Ok(())
}

fn load_checkpoint(
    device: &mut dyn OpenDevice,
    superblock: &Superblock,
    index: &mut Index,
) -> Result<(), OpenError> {
    use crate::capture::{PAGE_BYTES, page_payload};
    let number = superblock.number;
    let start = superblock.geometry.checkpoint_start((number % 2) as usize);
    let bad = |offset: u64, reason: &str| OpenError::Checkpoint {
        number,
        offset,
        reason: reason.to_owned(),
    };
    let mut buf = AlignedBuf::zeroed(1 << 20);
    // Entries cross pages: `stream` keeps what the last page began.
    let mut stream: Vec<u8> = Vec::new();
    let mut at = 0u64;
    let mut page = 0u32;
    while at < superblock.checkpoint_bytes {
        let len = (superblock.checkpoint_bytes - at).min(buf.len() as u64) as usize;
        device.read_at(start + at, &mut buf[..len]).map_err(io("reading the checkpoint"))?;
        for bytes in buf[..len].chunks(PAGE_BYTES) {
            let payload = page_payload(bytes, superblock.identity.store, number, page)
                .map_err(|reason| bad(start + u64::from(page) * PAGE_BYTES as u64, reason))?;
            stream.extend_from_slice(payload);
            page += 1;
        }
        let mut done = 0usize;
        while done < stream.len() {
            let mut r = Reader::new(&stream[done..]);
            if index.load_entry(&mut r).is_none() {
                break;
            }
            done = stream.len() - r.remaining();
        }
        stream.drain(..done);
        at += len as u64;
    }
    if stream.is_empty() && page > 0 { Ok(()) } else { Err(bad(start, "an entry makes no sense")) }
}

/// Replays the journal. Returns the tail, the position after the last batch, and the batches read.
fn replay(
    device: &mut dyn OpenDevice,
    superblock: &Superblock,
    index: &mut Index,
) -> Result<(u64, Position, u64), OpenError> {
    let geometry = superblock.geometry;
    let ring = (geometry.journal_bytes / BLOCK as u64) as u32;
    let first = u64::from(ring) + u64::from(superblock.replay_page);
    let tail = first - u64::from(superblock.live_pages);
    let mut position = Position {
        at: first,
        sequence: superblock.replay_sequence,
        previous: superblock.replay_previous,
    };
    let mut batches = 0;
    while let Some((records, next)) = read_batch(device, superblock, tail, position)? {
        for record in &records {
            if let Some(run) = record.runs().into_iter().find(|r| index.straddles(*r)) {
                return Err(OpenError::Inconsistent(format!(
                    "batch {} names blocks {}..{}, which are partly in the journal",
                    position.sequence,
                    run.start,
                    run.end()
                )));
            }
            index.apply(record, position.sequence);
        }
        position = next;
        batches += 1;
    }
    look_behind(device, superblock, position)?;
    Ok((tail, position, batches))
}

/// The batch at a position, if it is there and whole.
#[allow(clippy::type_complexity, reason = "used once")]
fn read_batch(
    device: &mut dyn OpenDevice,
    superblock: &Superblock,
    tail: u64,
    expected: Position,
) -> Result<Option<(Vec<crate::record::Record>, Position)>, OpenError> {
    let geometry = superblock.geometry;
    let ring = (geometry.journal_bytes / BLOCK as u64) as u32;
    let mut head = AlignedBuf::zeroed(BLOCK);
    // It is either right here or, if it did not fit before the ring's end, at the next lap's start.
    for at in [expected.at, expected.at.next_multiple_of(u64::from(ring))] {
        let page = (at % u64::from(ring)) as u32;
        let offset = geometry.journal_start() + u64::from(page) * BLOCK as u64;
        device.read_at(offset, &mut head).map_err(io("reading the journal"))?;
        let Some((h, crc)) = BatchHeader::decode(&head, superblock.identity.store) else {
            continue;
        };
        let ours = h.sequence == expected.sequence
            && h.previous == expected.previous
            && h.page == page
            && place(expected.at, h.pages(), ring) == at
            && at + u64::from(h.pages()) - tail <= u64::from(ring);
        if !ours {
            continue;
        }
        let mut bytes = AlignedBuf::zeroed(h.pages() as usize * BLOCK);
        device.read_at(offset, &mut bytes).map_err(io("reading the journal"))?;
        let block = (offset / BLOCK as u64) as u32;
        let Some(records) = decode_batch(&h, &bytes, block) else { continue };
        let next =
            Position { at: at + u64::from(h.pages()), sequence: h.sequence + 1, previous: crc };
        return Ok(Some((records, next)));
    }
    Ok(None)
}

/// After the last whole batch there may be the torn remains of one more, and nothing else: batch n+1 is
/// written only after batch n is durable. Any header beyond, or one that lies where it does not say,
/// means that acked batches are damaged.
fn look_behind(
    device: &mut dyn OpenDevice,
    superblock: &Superblock,
    end: Position,
) -> Result<(), OpenError> {
    const STEP: usize = 1 << 20;
    let geometry = superblock.geometry;
    let mut buf = AlignedBuf::zeroed(STEP);
    let mut at = 0u64;
    while at < geometry.journal_bytes {
        let len = (geometry.journal_bytes - at).min(STEP as u64) as usize;
        let offset = geometry.journal_start() + at;
        device.read_at(offset, &mut buf[..len]).map_err(io("reading the journal"))?;
        for (i, page) in buf[..len].chunks(BLOCK).enumerate() {
            let Some((h, _)) =
                BatchHeader::decode(&page[..BATCH_HEADER_BYTES], superblock.identity.store)
            else {
                continue;
            };
            let here = (at / BLOCK as u64) as u32 + i as u32;
            let misplaced = h.sequence >= end.sequence && h.page != here;
            if h.sequence > end.sequence || misplaced {
                let ring = geometry.journal_bytes / BLOCK as u64;
                return Err(OpenError::Journal {
                    missing: end.sequence,
                    offset: geometry.journal_start() + end.at % ring * BLOCK as u64,
                    later: h.sequence,
                });
            }
        }
        at += len as u64;
    }
    Ok(())
}

/// The bitmap from what the index reaches: nothing twice, nothing outside.
fn rebuild(geometry: &Geometry, index: &Index, journal: &Journal) -> Result<Allocator, OpenError> {
    let base = (geometry.data_start() / BLOCK as u64) as u32;
    let mut alloc = Allocator::new(base, geometry.data_blocks());
    let live = journal.blocks_between(journal.tail, journal.applied.at);
    for ((inode, chunk), c) in &index.chunks {
        for run in c.runs() {
            let inside = if journal.contains(run.start) {
                (run.start..run.end()).all(|b| live.iter().any(|r| r.contains(&b)))
            } else {
                alloc.contains(run) && alloc.mark(run)
            };
            if !inside {
                return Err(OpenError::Inconsistent(format!(
                    "inode {inode} chunk {chunk}: blocks {}..{} are outside the data area or taken twice",
                    run.start,
                    run.end()
                )));
            }
        }
    }
    Ok(alloc)
}
