//! `ebb bench recovery`: how long opening a full shard takes, as a node does when it starts.
//!
//! A store of `ebb-store` on a file of its own is filled as a cache would be, until it takes no more;
//! its journal and its checkpoints are written to the file (O_DIRECT). Then 4 KiB writes go into the
//! journal until a checkpoint would be due, which is as much as a node ever has to replay but for what comes while
//! one is written. Then the store is dropped as it is, as by `kill -9`, and opened again by the code and
//! through the device of a data node, several times; opening changes nothing. Nothing of it is in the page cache.
//!
//! Opening reads superblock, checkpoint and journal, and none of the cached blocks. So unless asked to
//! ([`Plan::data`]) this writes none of them either: the file is sparse, and a shard of 20 GiB is filled in
//! seconds. With them the file is one that `ebb fsck` finds sound, which is looked at in the end.
//!
//! Not here: a process's own start, its lease, and the hand-over of its groups.

use crate::BenchError;
use crate::fill::{Media, commit, fill, refused, turn};
use crate::report::{Bar, Limit, columns, median, number};
use ebb_dataplane::BlockingDevice;
use ebb_dataplane_protocol::{
    ChunkIndex, ClusterId, CoreId, Generation, InodeId, NodeId, Sequence, SessionId, crc32c,
};
use ebb_ring::{Buf, DeviceFile, OpenMode};
use ebb_store::{
    BLOCK, BaseView, CHUNK_BLOCKS, FillPlan, Geometry, Identity, MEMORY_BYTES_DEFAULT,
    RelocationMove, Store, StoreStats, WriteError, WriteOp, format_device, identify,
};
use serde::Serialize;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use crate::fill::Shape;

const GIB: u64 = 1 << 30;
const CHUNK: usize = CHUNK_BLOCKS as usize * BLOCK;
const CLUSTER: ClusterId = ClusterId(1);
/// The promise: a shard of this size in this time.
const PROMISED_BYTES: u64 = 20 * GIB;
const PROMISED: Limit = Limit::at_most(5.0);
/// The file that is written to in the end: a chunk of dirty blocks, known before the cache is full.
const DIRTY: InodeId = InodeId(2);
/// RAM of the index that is left to those writes, so that the journal can be filled.
const WRITES_BYTES: u64 = 4 << 20;
/// Writes that are made durable together.
const GROUP: u64 = 16;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Where the file is made.
    pub dir: PathBuf,
    /// Bytes of the shard.
    pub capacity_bytes: u64,
    /// How its data lies; one measurement for each.
    pub shapes: Vec<Shape>,
    /// Openings; figures are their medians.
    pub runs: u32,
    /// Write the cached blocks too.
    pub data: bool,
}

/// One shape's figures.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// How the data lies.
    pub shape: Shape,
    /// Bytes of the shard.
    pub device_bytes: u64,
    /// Clean bytes that it holds.
    pub cached_bytes: u64,
    /// The store's limit of index memory was reached before the device was full.
    pub limited: bool,
    /// Inodes.
    pub inodes: u64,
    /// Chunks.
    pub chunks: u64,
    /// Extents.
    pub extents: u64,
    /// Bytes of the index as a checkpoint has it.
    pub index_bytes: u64,
    /// Bytes of the index in RAM, by the store's estimate.
    pub memory_bytes: u64,
    /// Bytes of the index per byte cached, as a checkpoint has it.
    pub index_per_cached_byte: f64,
    /// In RAM.
    pub memory_per_cached_byte: f64,
    /// Bytes of the journal that are replayed.
    pub journal_bytes: u64,
    /// Seconds of an opening, median.
    pub seconds: f64,
    /// Of each.
    pub seconds_runs: Vec<f64>,
    /// What 20 GiB would take in proportion, where less was measured.
    pub seconds_in_proportion: Option<f64>,
    /// The cached blocks were written, and all of them are sound.
    pub verified: bool,
    /// At most 5 s, for 20 GiB and more.
    pub bar: Option<Bar>,
}

/// The file; it goes with this value.
struct Shard {
    path: PathBuf,
}

impl Drop for Shard {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Shard {
    fn make(dir: &Path, bytes: u64) -> Result<Self, BenchError> {
        let shard = Self { path: dir.join(format!(".ebb-bench-recovery-{}", std::process::id())) };
        let made = std::fs::File::create(&shard.path).and_then(|f| f.set_len(bytes));
        made.map_err(BenchError::file("make", &shard.path))?;
        Ok(shard)
    }

    fn file(&self) -> Result<DeviceFile, BenchError> {
        DeviceFile::open(&self.path, OpenMode::Existing).map_err(refused)
    }
}

/// The file under a store that is being filled.
struct Disk {
    file: DeviceFile,
    /// A chunk of bytes, and a checksum for each of its blocks.
    chunk: Buf,
    crcs: Vec<u32>,
    bounce: Buf,
    data: bool,
}

impl Disk {
    fn new(file: DeviceFile, data: bool) -> Self {
        let mut chunk = Buf::unpooled(CHUNK);
        let pattern = crate::chunk::pattern();
        chunk
            .chunks_mut(pattern.len())
            .for_each(|part| part.copy_from_slice(&pattern[..part.len()]));
        let crcs = chunk.chunks(BLOCK).map(crc32c).collect();
        Self { file, chunk, crcs, bounce: Buf::unpooled(CHUNK), data }
    }
}

impl Media for Disk {
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        // A copy, as what the store gives is aligned for a reactor that does not copy.
        for (at, part) in (offset..).step_by(CHUNK).zip(bytes.chunks(CHUNK)) {
            let to = &mut self.bounce[..part.len()];
            to.copy_from_slice(part);
            self.file.write_at(to, at).map_err(io::Error::other)?;
        }
        Ok(())
    }
    fn relocate(&mut self, moved: &RelocationMove) -> io::Result<()> {
        let part = &mut self.bounce[..moved.bytes as usize];
        self.file.read_at(part, moved.from).map_err(io::Error::other)?;
        self.file.write_at(part, moved.to).map_err(io::Error::other)
    }
    fn fill(&mut self, plan: &FillPlan, _: u32) -> io::Result<Vec<u32>> {
        if self.data {
            for w in &plan.writes {
                self.file
                    .write_at(&self.chunk[w.range.clone()], w.offset)
                    .map_err(io::Error::other)?;
            }
        }
        Ok(self.crcs[..plan.blocks as usize].to_vec())
    }
}

/// Measures every shape; `say` gets a line per step.
pub fn run(plan: &Plan, say: impl Fn(&str)) -> Result<Vec<Row>, BenchError> {
    if plan.runs == 0 || plan.shapes.is_empty() {
        return Err(BenchError::Plan("at least one shape, opened at least once".into()));
    }
    let geometry =
        Geometry::for_device(plan.capacity_bytes).map_err(|e| BenchError::Plan(e.to_string()))?;
    plan.shapes.iter().map(|shape| measure(plan, geometry, *shape, &say)).collect()
}

fn measure(
    plan: &Plan,
    geometry: Geometry,
    shape: Shape,
    say: &impl Fn(&str),
) -> Result<Row, BenchError> {
    let shard = Shard::make(&plan.dir, geometry.device_bytes)?;
    say(&format!("filling a shard of {:.1} GiB with {shape}", gib(geometry.device_bytes)));
    let before = filled(&shard, geometry, shape, plan.data)?;
    say(&format!("opening it {} times", plan.runs));
    let mut seconds_runs = Vec::new();
    for _ in 0..plan.runs {
        let (took, after) = open(&shard)?;
        let held = |s: &StoreStats| {
            (s.clean_bytes, s.dirty_bytes, s.inodes, s.chunks, s.extents, s.journal_used_bytes)
        };
        if held(&before) != held(&after) {
            let text = format!("it held {before:?} and holds {after:?}");
            return Err(BenchError::Store(text));
        }
        seconds_runs.push(took.as_secs_f64());
    }
    if plan.data {
        say("comparing every block with its checksum");
        let report = ebb_dataplane::check(&shard.path).map_err(refused)?;
        if !report.bad.is_empty() || report.used_blocks != report.reachable_blocks {
            return Err(BenchError::Store("what was filled is not sound".into()));
        }
    }
    Ok(Row::of(shape, geometry, &before, seconds_runs, plan.data))
}

/// Fills the shard, and ends as a killed process does: what the store held then.
fn filled(
    shard: &Shard,
    geometry: Geometry,
    shape: Shape,
    data: bool,
) -> Result<StoreStats, BenchError> {
    let identity =
        Identity { cluster: CLUSTER, store: 1, node: NodeId(1), core: CoreId(0), pg_count: 64 };
    let file = shard.file()?;
    format_device(&mut BlockingDevice(&file), geometry, identity).map_err(refused)?;
    let mut store = Store::open(&mut BlockingDevice(&file), CLUSTER).map_err(refused)?;
    let mut disk = Disk::new(file, data);
    let mut writes = Writes::default();
    while writes.done < u64::from(CHUNK_BLOCKS) && writes.group(&mut store, &mut disk)? {
        turn(&mut store, &mut disk)?;
    }
    store.set_memory_limit(MEMORY_BYTES_DEFAULT - WRITES_BYTES);
    let chunks = store.stats().capacity_bytes.div_ceil(CHUNK as u64);
    let chunks = u32::try_from(chunks).map_err(refused)?;
    fill(&mut store, &mut disk, shape, chunks)?;
    store.set_memory_limit(MEMORY_BYTES_DEFAULT);
    // A turn could begin a checkpoint, which would empty the journal.
    let batch_bytes = 2 * GROUP * BLOCK as u64;
    loop {
        let s = store.stats();
        if s.journal_used_bytes + batch_bytes > s.journal_bytes / 2
            || !writes.group(&mut store, &mut disk)?
        {
            break;
        }
    }
    disk.file.sync_all().map_err(refused)?;
    Ok(store.stats())
}

/// 4 KiB writes that overwrite each other.
#[derive(Default)]
struct Writes {
    done: u64,
}

impl Writes {
    /// Some of them; `false`: the store takes no more.
    fn group(&mut self, store: &mut Store, disk: &mut Disk) -> Result<bool, BenchError> {
        for _ in 0..GROUP {
            let block = (self.done % u64::from(CHUNK_BLOCKS)) as usize;
            let op = WriteOp {
                inode: DIRTY,
                chunk: ChunkIndex(0),
                offset: (block * BLOCK) as u32,
                len: BLOCK as u32,
                generation: Generation(1),
                session: SessionId(1),
                sequence: Sequence(self.done + 1),
                answered_below: Sequence(self.done + 1),
                base: BaseView::default(),
            };
            let plan = match store.begin_write(&op) {
                Ok(plan) => plan,
                Err(WriteError::NoSpace { .. }) => {
                    while commit(store, disk)? {}
                    return Ok(false);
                }
                Err(e) => return Err(refused(e)),
            };
            let bytes = &disk.chunk[block * BLOCK..][..BLOCK];
            store.commit_write(plan.id, &[disk.crcs[block]], bytes).map_err(refused)?;
            self.done += 1;
        }
        while commit(store, disk)? {}
        Ok(true)
    }
}

/// Opens the shard as a node does, and how long that took.
fn open(shard: &Shard) -> Result<(Duration, StoreStats), BenchError> {
    let started = Instant::now();
    let file = shard.file()?;
    let found = identify(&mut BlockingDevice(&file)).map_err(refused)?;
    let store = Store::open(&mut BlockingDevice(&file), found.cluster).map_err(refused)?;
    Ok((started.elapsed(), store.stats()))
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / GIB as f64
}

impl Row {
    fn of(
        shape: Shape,
        geometry: Geometry,
        s: &StoreStats,
        seconds_runs: Vec<f64>,
        verified: bool,
    ) -> Self {
        let seconds = median(&seconds_runs);
        let per_byte = |bytes: u64| bytes as f64 / s.clean_bytes.max(1) as f64;
        let whole = geometry.device_bytes >= PROMISED_BYTES;
        Self {
            shape,
            device_bytes: geometry.device_bytes,
            cached_bytes: s.clean_bytes,
            // The last part of a device is kept for writes.
            limited: s.clean_bytes < s.capacity_bytes / 10 * 9,
            inodes: s.inodes,
            chunks: s.chunks,
            extents: s.extents,
            index_bytes: s.index_bytes,
            memory_bytes: s.memory_bytes,
            index_per_cached_byte: per_byte(s.index_bytes),
            memory_per_cached_byte: per_byte(s.memory_bytes),
            journal_bytes: s.journal_used_bytes,
            seconds,
            seconds_runs,
            seconds_in_proportion: (!whole)
                .then(|| seconds * PROMISED_BYTES as f64 / geometry.device_bytes as f64),
            verified,
            bar: whole.then(|| PROMISED.judge(seconds)),
        }
    }
}

/// The rows for people.
pub fn table(rows: &[Row]) -> String {
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            let runs: Vec<String> = r.seconds_runs.iter().map(|s| number(*s)).collect();
            let mut said = match (&r.bar, r.seconds_in_proportion) {
                (Some(bar), _) => format!("{bar}"),
                (None, Some(s)) => format!("not measured: 20 GiB in proportion {} s", number(s)),
                (None, None) => String::new(),
            };
            if r.limited {
                said += "; the index's RAM was full before the device was";
            }
            vec![
                format!("{:.1} GiB shard of {}", gib(r.device_bytes), r.shape),
                format!("{:.1}", gib(r.cached_bytes)),
                r.chunks.to_string(),
                r.extents.to_string(),
                mib(r.index_bytes),
                mib(r.memory_bytes),
                format!("{:.5}", r.index_per_cached_byte),
                format!("{:.5}", r.memory_per_cached_byte),
                mib(r.journal_bytes),
                format!("{:.3}", r.seconds),
                runs.join(" "),
                said,
            ]
        })
        .collect();
    let header = [
        "recovery",
        "GiB cached",
        "chunks",
        "extents",
        "index MiB",
        "RAM MiB",
        "index B/B",
        "RAM B/B",
        "journal MiB",
        "seconds",
        "runs",
        "bar",
    ];
    columns(&header, &cells)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(dir: &Path, shapes: &[Shape], data: bool) -> Plan {
        let (dir, shapes) = (dir.to_owned(), shapes.to_vec());
        Plan { dir, capacity_bytes: 96 << 20, shapes, runs: 2, data }
    }

    /// A directory that takes O_DIRECT.
    fn dir() -> tempfile::TempDir {
        tempfile::Builder::new()
            .prefix("ebb-recovery-")
            .tempdir_in("/var/tmp")
            .expect("a directory")
    }

    #[test]
    fn a_full_shard_is_opened_as_it_was_and_every_block_of_it_is_sound() {
        let dir = dir();
        let plans = [
            plan(dir.path(), &[Shape::WholeChunks, Shape::SmallFiles], true),
            plan(dir.path(), &Shape::ALL, false),
        ];
        for plan in plans {
            let rows = run(&plan, |_| ()).expect("measured");
            for (row, shape) in rows.iter().zip(&plan.shapes) {
                assert_eq!((row.shape, row.verified), (*shape, plan.data));
                assert!(row.seconds > 0.0 && row.seconds_runs.len() == 2, "{row:?}");
                assert!(row.limited || row.cached_bytes > 60 << 20, "full: {row:?}");
                assert!(row.journal_bytes > 512 << 10, "something to replay: {row:?}");
                assert_eq!(row.bar, None, "the promise is about 20 GiB");
            }
            assert!(rows[rows.len() - 1].chunks > 10 * rows[0].chunks);
            let text = table(&rows);
            assert!(text.contains("20 GiB in proportion"), "{text}");
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("there").count(), 0, "nothing is left");
    }

    #[test]
    fn the_file_takes_no_more_of_the_disk_than_what_is_read_again() {
        use std::os::unix::fs::MetadataExt;
        let dir = dir();
        let plan = plan(dir.path(), &[Shape::WholeChunks], false);
        let geometry = Geometry::for_device(plan.capacity_bytes).expect("large enough");
        let shard = Shard::make(&plan.dir, geometry.device_bytes).expect("made");
        let stats = filled(&shard, geometry, Shape::WholeChunks, false).expect("filled");
        assert!(stats.clean_bytes > 60 << 20, "{stats:?}");
        let on_disk = std::fs::metadata(&shard.path).expect("there").blocks() * 512;
        assert!(on_disk < 24 << 20, "{on_disk} bytes of a shard of {}", geometry.device_bytes);
    }

    #[test]
    fn five_seconds_are_promised_for_twenty_gib_and_not_for_less() {
        let row = |bytes: u64, seconds: f64| {
            let geometry = Geometry::for_device(bytes).expect("large enough");
            let stats =
                StoreStats { clean_bytes: 1 << 30, index_bytes: 1 << 20, ..StoreStats::default() };
            Row::of(Shape::WholeChunks, geometry, &stats, vec![seconds, 100.0, seconds], false)
        };
        assert!(row(20 * GIB, 4.0).bar.is_some_and(|b| b.met));
        assert!(row(20 * GIB, 6.0).bar.is_some_and(|b| !b.met));
        let small = row(5 * GIB, 1.0);
        assert_eq!((small.bar, small.seconds_in_proportion), (None, Some(4.0)));
        assert_eq!(small.index_per_cached_byte, 1.0 / 1024.0);
    }
}
