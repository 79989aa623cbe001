//! The decoders of what a device holds, under attack (`ebb_dataplane_protocol::hostile`): superblock, batch and
//! records, checkpoint, and opening a whole device. Checksums are made right after every change: what is
//! attacked is what believes them. Nothing here is used by a server.

use crate::codec::Reader;
use crate::device::OpenDevice;
use crate::index::Index;
use crate::journal::{BATCH_HEADER_BYTES, BatchHeader, decode_batch};
use crate::record::Record;
use crate::store::Store;
use crate::superblock::{Copy, Superblock};
use crate::types::{BLOCK, BaseView};
use ebb_dataplane_protocol::hostile::Decoder;
use ebb_dataplane_protocol::{ChunkIndex, ClusterId, ContentId, NodeId, PgEpoch, PgId, crc32c};
use std::collections::BTreeMap;
use std::io;

/// A sparse device in memory.
#[derive(Clone, Debug, Default)]
struct Pages {
    bytes: u64,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl OpenDevice for Pages {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (i, page) in buf.chunks_mut(BLOCK).enumerate() {
            match self.pages.get(&(offset / BLOCK as u64 + i as u64)) {
                Some(p) => page.copy_from_slice(p),
                None => page.fill(0),
            }
        }
        Ok(())
    }
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        for (i, page) in buf.chunks(BLOCK).enumerate() {
            self.pages.insert(offset / BLOCK as u64 + i as u64, page.to_vec());
        }
        Ok(())
    }
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The stored image of the present version (its form: `tests/stored_image.rs`).
fn image() -> Pages {
    let mut pages = BTreeMap::new();
    for line in include_str!("../tests/images/v3.txt").lines() {
        let (page, rest) = line.split_once(' ').expect("a page and its bytes");
        let mut bytes: Vec<u8> = Vec::with_capacity(BLOCK);
        for token in rest.split(' ') {
            let (digits, more) = token.split_once('*').unwrap_or((token, "0"));
            for i in (0..digits.len()).step_by(2) {
                bytes.push(u8::from_str_radix(&digits[i..i + 2], 16).expect("hexadecimal"));
            }
            let last = *bytes.last().expect("a byte before its repetitions");
            bytes.resize(bytes.len() + more.parse::<usize>().expect("a number"), last);
        }
        pages.insert(page.parse().expect("a number"), bytes);
    }
    Pages { bytes: 16 << 20, pages }
}

fn put(b: &mut [u8], at: usize, crc: u32) {
    b[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}
fn word(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// Makes the checksums of a page right, whatever it says it is. `previous` chains the batches.
fn seal(page: &mut [u8], previous: &mut u32) {
    if page.starts_with(b"EBBSUPER") {
        let crc = crc32c(&page[..BLOCK - 4]);
        put(page, BLOCK - 4, crc);
    } else if page.starts_with(b"EBBC") {
        let len = (word(page, 36) as usize).min(BLOCK - 64);
        let crc = crc32c(&page[64..64 + len]);
        put(page, 40, crc);
        let crc = crc32c(&page[..60]);
        put(page, 60, crc);
    } else if page.starts_with(b"EBBJ") {
        // The image's batches have one page of records each.
        let len = (word(page, 40) as usize).min(BLOCK - 64);
        let crc = crc32c(&page[64..64 + len]);
        put(page, 52, crc);
        put(page, 32, *previous);
        let crc = crc32c(&page[..60]);
        put(page, 60, crc);
        *previous = crc;
    }
}

/// One superblock copy.
pub fn superblock(bytes: &[u8]) {
    let mut block = bytes.to_vec();
    block.resize(BLOCK, 0);
    for _ in 0..2 {
        if let Copy::Valid(sb) = Superblock::decode(&block) {
            assert_eq!(Superblock::decode(&sb.encode()), Copy::Valid(sb), "written back");
            assert!(sb.geometry.superblock_offsets().iter().all(|o| *o < sb.geometry.device_bytes));
        }
        seal(&mut block, &mut 0);
    }
}

/// Records, as in a batch whose checksums hold, and what they do to an index.
pub fn record(bytes: &[u8]) {
    let mut r = Reader::new(bytes);
    let mut index = Index::new(256..512, NodeId(0), 8);
    for sequence in 1.. {
        let Some(record) = Record::decode(&mut r) else { break };
        let mut again = Vec::new();
        record.encode(&mut again);
        assert_eq!(Record::decode(&mut Reader::new(&again)).as_ref(), Some(&record));
        // As recovery does: such a journal is refused.
        if record.runs().into_iter().any(|run| index.straddles(run)) {
            break;
        }
        index.apply(&record, sequence);
    }
}

/// A batch: header, records, inline blocks.
pub fn batch(bytes: &[u8]) {
    const STORE: u128 = 99;
    let mut pages = bytes.to_vec();
    pages.resize(bytes.len().max(1).next_multiple_of(BLOCK), 0);
    for _ in 0..2 {
        if let Some((h, _)) = BatchHeader::decode(&pages, STORE) {
            assert_eq!(&h.encode(STORE)[..], &pages[..BATCH_HEADER_BYTES]);
            if let Some(records) = decode_batch(&h, &pages, 256) {
                let mut index = Index::new(256..512, NodeId(0), 8);
                records.iter().for_each(|r| index.apply(r, h.sequence));
            }
        }
        seal(&mut pages, &mut 0);
    }
}

/// Entries of a checkpoint.
pub fn checkpoint(bytes: &[u8]) {
    let mut r = Reader::new(bytes);
    let mut index = Index::new(256..512, NodeId(0), 8);
    while index.load_entry(&mut r).is_some() {}
}

/// A whole device: the stored image with pieces written over it, each `page (1), offset (2), length (1), bytes`;
/// `page` counts those that are not zero. All checksums hold. It opens and reads, or says why not.
pub fn open(bytes: &[u8]) {
    let mut disk = image();
    let numbers: Vec<u64> = disk.pages.keys().copied().collect();
    let mut rest = bytes;
    while let Some((head, tail)) = rest.split_first_chunk::<4>() {
        let [page, low, high, len] = *head;
        let number = numbers[usize::from(page) % numbers.len()];
        let at = usize::from(u16::from_le_bytes([low, high])) % BLOCK;
        let n = usize::from(len % 32).min(tail.len()).min(BLOCK - at);
        let Some(to) = disk.pages.get_mut(&number) else { return };
        to[at..at + n].copy_from_slice(&tail[..n]);
        rest = &tail[n..];
    }
    let mut previous = 0;
    if let Some(Copy::Valid(sb)) = disk.pages.get(&0).map(|p| Superblock::decode(p)) {
        previous = sb.replay_previous;
    }
    for number in &numbers {
        let Some(page) = disk.pages.get_mut(number) else { return };
        // Batches before the checkpoint are not replayed: the chain begins after it.
        let replayed = page.starts_with(b"EBBJ") && word(page, 8) == 99;
        if replayed || !page.starts_with(b"EBBJ") {
            seal(page, &mut previous);
        }
    }
    let _ = crate::verify(&mut disk);
    let Ok(mut store) = Store::open(&mut disk, ClusterId(7)) else { return };
    let keys: Vec<_> = [(42, 0), (42, 1), (43, 0), (44, 0)].into();
    for (inode, chunk) in keys {
        let inode = ebb_dataplane_protocol::InodeId(inode);
        let base = BaseView { content: ContentId(5), valid_bytes: 1 << 20 };
        let plan = store.plan_read(inode, ChunkIndex(chunk), 0..1024, base);
        if let Some(guard) = plan.guard {
            store.release(guard);
        }
        let _ = store.floor(store.scope_of(inode, ChunkIndex(chunk)));
    }
    let _ = store.windows(PgId(5), PgEpoch(4), None);
    let _ = store.stats();
}

fn of_image(magic: &[u8]) -> Vec<Vec<u8>> {
    image().pages.into_values().filter(|p| p.starts_with(magic)).collect()
}
fn superblocks() -> Vec<Vec<u8>> {
    of_image(b"EBBSUPER").into_iter().take(1).map(|p| p[..256].to_vec()).collect()
}
fn batches() -> Vec<Vec<u8>> {
    of_image(b"EBBJ").into_iter().map(|p| trimmed(&p)).collect()
}
fn records() -> Vec<Vec<u8>> {
    of_image(b"EBBJ").iter().map(|p| trimmed(p)[64..].to_vec()).collect()
}
fn entries() -> Vec<Vec<u8>> {
    let payload = |p: &Vec<u8>| p[64..64 + (word(p, 36) as usize).min(BLOCK - 64)].to_vec();
    of_image(b"EBBC").iter().map(payload).collect()
}
/// Header and records of a batch's first page.
fn trimmed(page: &[u8]) -> Vec<u8> {
    page[..64 + (word(page, 40) as usize).min(BLOCK - 64)].to_vec()
}
fn patches() -> Vec<Vec<u8>> {
    vec![
        vec![0, 56, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0],
        vec![2, 80, 0, 4, 255, 255, 255, 255, 6, 100, 0, 1, 2],
        vec![8, 64, 0, 4, 7, 0, 0, 0, 9, 72, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8],
    ]
}

/// This crate's decoders.
pub const DECODERS: [Decoder; 5] = [
    Decoder { name: "superblock", seeds: superblocks, run: superblock },
    Decoder { name: "record", seeds: records, run: record },
    Decoder { name: "batch", seeds: batches, run: batch },
    Decoder { name: "checkpoint", seeds: entries, run: checkpoint },
    Decoder { name: "open", seeds: patches, run: open },
];
