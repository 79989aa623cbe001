//! Reads the log back after a start: replays the segments into the index.
//!
//! Stops at a torn tail (a last write that was never acknowledged) and wipes it, refuses damage with
//! good frames behind it: those were acknowledged, and dropping them would break I1.

use super::super::LogId;
use super::super::disk::{self, Disk, DiskFile, Open};
use super::appender::Appender;
use super::frame::{self, Op, SEGMENT_HEADER_BYTES, SegmentHeader};
use super::index::{Index, Location};
use super::segment;
use std::io;
use std::path::Path;

/// Where appending goes on.
#[derive(Debug)]
pub(super) struct Tail {
    pub(super) file: Appender,
    pub(super) number: u64,
    /// Sequence of the next frame.
    pub(super) sequence: u64,
    /// Highest entry index in each older segment, oldest first: when it is purged, the file goes.
    pub(super) older: Vec<(u64, u64)>,
    /// Highest entry index in the current segment.
    pub(super) last_index: u64,
}

fn damaged(dir: &Path, number: u64, what: impl std::fmt::Display) -> io::Error {
    let path = segment::path(dir, number);
    let text = format!(
        "the Raft log is damaged in {}: {what}; restore this node from another voter, or start it \
         from an empty directory",
        path.display()
    );
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Replays all segments. `None`: the directory holds no log yet.
pub(super) fn recover(disk: &dyn Disk, dir: &Path, index: &mut Index) -> io::Result<Option<Tail>> {
    let mut numbers = segment::list(disk, dir)?;
    // A last file too short for a header was never used: the name comes after the content.
    while let Some(&last) = numbers.last() {
        let bytes = disk.open(&segment::path(dir, last), Open::Read)?.bytes()?;
        if bytes >= SEGMENT_HEADER_BYTES as u64 {
            break;
        }
        segment::remove(disk, dir, last)?;
        numbers.pop();
    }
    let mut older = Vec::new();
    let mut expected: Option<u64> = None;
    let mut previous: Option<u64> = None;
    for (i, &number) in numbers.iter().enumerate() {
        if previous.is_some_and(|p| p + 1 != number) {
            return Err(damaged(dir, number, "the segment before it is missing"));
        }
        previous = Some(number);
        let last = i + 1 == numbers.len();
        let bytes = disk::read(disk, &segment::path(dir, number))?;
        let header = SegmentHeader::decode(&bytes).map_err(|e| damaged(dir, number, e))?;
        if header.number != number {
            return Err(damaged(dir, number, format!("it says it is segment {}", header.number)));
        }
        if expected.is_some_and(|e| e != header.first_sequence) {
            return Err(damaged(dir, number, "frames before it are missing"));
        }
        if i == 0 {
            index.set_purged(header.purged);
        }
        let replayed = replay(dir, &header, &bytes, index)?;
        expected = Some(replayed.sequence);
        if !last {
            // The next header is checked against `expected`, so a torn end here is found there.
            older.push((number, replayed.last_index));
            continue;
        }
        let file = disk.open(&segment::path(dir, number), Open::Write)?;
        wipe(&*file, replayed.offset, &bytes)?;
        return Ok(Some(Tail {
            file: Appender::open(disk, &segment::path(dir, number), replayed.offset)?,
            number,
            sequence: replayed.sequence,
            older,
            last_index: replayed.last_index,
        }));
    }
    Ok(None)
}

struct Replayed {
    offset: u64,
    sequence: u64,
    last_index: u64,
}

fn replay(
    dir: &Path,
    header: &SegmentHeader,
    bytes: &[u8],
    index: &mut Index,
) -> io::Result<Replayed> {
    let number = header.number;
    let mut at = SEGMENT_HEADER_BYTES;
    let mut sequence = header.first_sequence;
    let mut last_index = 0;
    while let Some(found) = frame::decode_frame(number, &bytes[at..]) {
        if found.sequence != sequence {
            let text = format!("frame {} where {sequence} should be", found.sequence);
            return Err(damaged(dir, number, text));
        }
        let mut offset = 0;
        for _ in 0..found.ops {
            let (op, taken) = frame::decode_op(&found.payload[offset..])
                .map_err(|e| damaged(dir, number, format!("frame {sequence}: {e}")))?;
            let place = (at + frame::FRAME_HEADER_BYTES + offset) as u64;
            if let Op::Append(entry) = &op {
                last_index = last_index.max(entry.log_id.index);
            }
            let location = Location { segment: number, offset: place, bytes: taken as u32 };
            index.replay(op, location).map_err(|e| damaged(dir, number, e))?;
            offset += taken;
        }
        at += found.bytes;
        sequence += 1;
    }
    if let Some(later) = later_frame(number, &bytes[at..], sequence) {
        let text = format!("frame {sequence} is unreadable, frame {later} behind it is not");
        return Err(damaged(dir, number, text));
    }
    Ok(Replayed { offset: at as u64, sequence, last_index })
}

/// A good frame behind a bad one, if any. Frames start at multiples of 8.
fn later_frame(number: u64, bytes: &[u8], sequence: u64) -> Option<u64> {
    (8..bytes.len())
        .step_by(8)
        .filter_map(|at| frame::decode_frame(number, &bytes[at..]))
        .map(|f| f.sequence)
        .find(|&s| s > sequence)
}

/// Zeros what is left of a torn write, so that it can't be taken for something later.
fn wipe(file: &dyn DiskFile, from: u64, bytes: &[u8]) -> io::Result<()> {
    let tail = &bytes[(from as usize).min(bytes.len())..];
    let Some(end) = tail.iter().rposition(|&b| b != 0) else { return Ok(()) };
    file.write_at(&vec![0; end + 1], from)?;
    file.sync()
}

/// Reads one entry back from its segment.
pub(super) fn read_entry(
    disk: &dyn Disk,
    dir: &Path,
    location: &Location,
    expected: &LogId,
) -> io::Result<super::super::Entry> {
    let mut bytes = vec![0u8; location.bytes as usize];
    let file = disk.open(&segment::path(dir, location.segment), Open::Read)?;
    file.read_at(&mut bytes, location.offset)?;
    match frame::decode_op(&bytes) {
        Ok((Op::Append(entry), _)) if entry.log_id == *expected => Ok(entry),
        Ok(_) => {
            Err(damaged(dir, location.segment, format!("entry {expected} is not where it was")))
        }
        Err(e) => Err(damaged(dir, location.segment, e)),
    }
}
