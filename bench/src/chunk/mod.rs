//! `ebb bench chunk`: reads and writes of chosen sizes and depths against a running cluster.
//!
//! Each row is one (operation, size, depth): `depth` workers issue requests of `size` bytes at
//! random aligned offsets of one file that is wholly on the data nodes, for a fixed time. Unless the
//! plan says otherwise only chunks of one server core are asked for, so that a row is what one core
//! does. Each worker has a handle of its own and never reads on from where it was, so that the
//! client's readahead stays out of it; the client keeps no other cache, and the servers read their
//! device with O_DIRECT. Hence each read is one request to a chunk server and one read of its device.
//!
//! Writes come in two kinds. A `write` ends when it is durable on its node: what fdatasync promises of
//! an overwrite. A `write+fsync` is also committed by the metadata plane (times, the file's end), which
//! syncs its own log on the same device, and has no counterpart in `fio`.
//!
//! Both sides make writes durable in batches, and a batch is this. Ours: what a core's journal took since its
//! last batch ([`crate::journal`]); how many writes that was on average is measured along with each row.
//! Payloads up to 32 KiB ride in the journal and cost one synced write per batch; larger ones cost an
//! fdatasync and that write. `fio`'s: N writes at the same depth and one fdatasync, N being the group that
//! ours had in the same run, rounded. So a batch of ours costs as many syncs as one of `fio`'s or one more, and
//! `fio`'s also overwrites in place, without record, checksum or copy. The other comparison is with a write and an
//! fdatasync at a time, multiplied by the group: the ratio is then batches per second of ours over
//! fdatasyncs per second of `fio`'s. Beside them are `fio` without any sync and with O_DSYNC writes, to
//! tell what the device does.
//!
//! A `read-dram` is of what the cores have in memory, as copies: before it the chunks are read a few times, and how many
//! of its reads were answered from memory is counted. Reads of a MiB are held to `iperf3`, smaller ones to GETs of the same
//! size of a Redis server, 8 connections with as many requests in flight in all. A plain `read` is to be of the device: on a
//! cluster whose nodes keep copies (`ebb up --dram`, on by default) it is not, and a note says so.
//!
//! Between two measurements the file goes to S3, so that no upload disturbs the next one. A turn of writes that is
//! longer than the cluster's `--flush-after` has uploads in it.
//!
//! CPU is that of this process and of the servers on this machine, from /proc, per GB moved.

mod beside;
mod outcome;

pub use beside::{Beside, Pair, Side, beside, beside_table};
pub use outcome::{Against, Grouped, Outcome, Row, Verdict, table};

use crate::BenchError;
use crate::baseline::{Baseline, Durable, FioJob, Sample};
use crate::journal::{Group, Journals};
use ebb_client::{ClientError, FileHandle, FileSystem, InodeId, OpenFlags, Owner};
use ebb_dataplane_protocol::auth::ClusterKey;
use ebb_dataplane_protocol::{CHUNK_BYTES, ChunkIndex, ClusterMap, ShardRef};
use ebb_metaplane_protocol::AdminCall;
use hdrhistogram::Histogram;
use outcome::{FioTurns, Measured};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Bytes of a request.
    pub sizes: Vec<u64>,
    /// Requests in flight.
    pub depths: Vec<u32>,
    /// Seconds of each row of each run.
    pub seconds: u64,
    /// Bytes of the file, rounded up to whole chunks.
    pub file_bytes: u64,
    /// What is done.
    pub operations: Vec<Operation>,
    /// Runs; figures are their medians.
    pub runs: u32,
    /// Ask all server cores, not one.
    pub all_cores: bool,
    /// Also run `fio` on a file in this directory and `iperf3` on loopback, turn by turn.
    pub baseline: Option<PathBuf>,
    /// The cluster's key, to ask cores for their counters.
    pub key: ClusterKey,
}

/// What a worker does over and over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Reads.
    Read,
    /// Reads of what is in the cores' memory.
    ReadDram,
    /// Writes, and waits until the bytes are durable on their node.
    Write,
    /// Writes, and waits until they are committed as well.
    WriteFsync,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Read, Self::ReadDram, Self::Write, Self::WriteFsync];
    /// Those that are measured if nothing else is said.
    pub const USUAL: [Self; 3] = [Self::Read, Self::Write, Self::WriteFsync];

    /// Whether it reads.
    pub const fn reads(self) -> bool {
        matches!(self, Self::Read | Self::ReadDram)
    }

    /// Its name, in tables and on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::ReadDram => "read-dram",
            Self::Write => "write",
            Self::WriteFsync => "write+fsync",
        }
    }
}

const NAME: &[u8] = b".ebb-bench";
/// A flush of the file may take this long.
const FLUSH_PATIENCE: Duration = Duration::from_secs(600);

/// One (operation, size, depth).
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) operation: Operation,
    pub(crate) size: u64,
    pub(crate) depth: u32,
}

/// A measurement of ours.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Turn {
    pub(crate) sample: Sample,
    pub(crate) cpu_s_per_gb: f64,
    /// Of writes.
    pub(crate) group: Option<Group>,
    /// Of reads, how many were answered from memory: 0 to 1.
    pub(crate) dram_share: f64,
}

/// Runs the plan; `say` gets a line per step. The file is removed afterwards.
pub async fn run(fs: &FileSystem, plan: &Plan, say: impl Fn(&str)) -> Result<Outcome, BenchError> {
    let largest = plan.sizes.iter().copied().max().unwrap_or(0);
    let zero = plan.sizes.contains(&0) || plan.depths.contains(&0) || plan.seconds == 0;
    if largest == 0 || zero || plan.runs == 0 {
        return Err(BenchError::Plan("sizes, depths, seconds and runs must be above zero".into()));
    }
    if plan.operations.is_empty() {
        return Err(BenchError::Plan("neither reads nor writes are to be measured".into()));
    }
    if plan.file_bytes < 2 * largest {
        return Err(BenchError::Plan("--file must be at least twice the largest --size".into()));
    }
    let file_bytes = plan.file_bytes.next_multiple_of(u64::from(CHUNK_BYTES));
    let plan = Plan { file_bytes, ..plan.clone() };
    let root = fs.resolve(b"/").await?.inode;
    let owner = Owner { uid: 0, gid: 0 };
    let flags = OpenFlags { write: true, truncate: true, exclusive: false };
    let file = fs.create(root, NAME, 0o600, owner, flags).await?;
    say(&format!("writing a file of {} MiB", plan.file_bytes >> 20));
    let result = measure(fs, file.handle, &plan, &say).await;
    let released = fs.release(file.handle).await;
    let removed = fs.unlink(root, NAME).await;
    let outcome = result?;
    released?;
    removed?;
    Ok(outcome)
}

/// A MiB that is not zeros: a store that knew holes would have an easy time.
pub(crate) fn pattern() -> Vec<u8> {
    (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

async fn measure(
    fs: &FileSystem,
    handle: FileHandle,
    plan: &Plan,
    say: &impl Fn(&str),
) -> Result<Outcome, BenchError> {
    let block = pattern();
    let mut at = 0;
    while at < plan.file_bytes {
        let n = (plan.file_bytes - at).min(block.len() as u64);
        fs.write(handle, at, &block[..n as usize]).await?;
        at += n;
    }
    fs.fsync(handle).await?;
    let inode = fs.inode_of(handle)?;
    let mut outcome = Outcome { runs: plan.runs, ..Outcome::default() };
    let redis = plan.operations.contains(&Operation::ReadDram);
    let baseline = match &plan.baseline {
        None => None,
        Some(dir) => {
            let (tools, missing) = Baseline::prepare(dir, plan.file_bytes, redis).await?;
            outcome.notes.extend(missing);
            Some(tools)
        }
    };
    say("flushing it to S3, so that no upload disturbs");
    settle(fs, inode, &mut outcome.notes).await;
    let jobs: Vec<Job> = plan
        .operations
        .iter()
        .flat_map(|operation| {
            plan.sizes.iter().flat_map(move |size| {
                let job =
                    move |depth: &u32| Job { operation: *operation, size: *size, depth: *depth };
                plan.depths.iter().map(job)
            })
        })
        .collect();
    let mut measured: Vec<Measured> = jobs.iter().map(|job| Measured::new(*job)).collect();
    let mut iperf3: Vec<Sample> = Vec::new();
    for run in 1..=plan.runs {
        if let Some(tools) = baseline.as_ref().filter(|b| b.has_iperf3()) {
            say(&format!("run {run}: iperf3 over loopback"));
            iperf3.push(tools.iperf3(plan.seconds).await?);
        }
        let mut fio = baseline.as_ref().filter(|b| b.has_fio()).map(|tools| Fio {
            tools,
            seconds: plan.seconds,
            done: HashMap::new(),
        });
        for (job, measured) in jobs.iter().zip(&mut measured) {
            let Job { operation, size, depth } = *job;
            say(&format!("run {run}: {} {size} bytes, depth {depth}", operation.name()));
            let map = fs.cluster().map();
            let (slots, cores) = slots(&map, inode, plan, size);
            measured.server_cores = cores.len() as u32;
            if operation == Operation::ReadDram {
                warm(fs, inode, plan, &slots).await?;
            }
            let journals = Journals::of(&map, &cores, &plan.key).await?;
            let ours = turn(fs, inode, plan, *job, Arc::new(slots), &journals).await?;
            measured.ours.push(ours);
            outcome.notes.extend(from_memory(*job, ours, &outcome.notes));
            if !operation.reads() {
                settle(fs, inode, &mut outcome.notes).await;
            }
            if operation == Operation::ReadDram {
                if size < outcome::LARGE_BYTES
                    && let Some(tools) = baseline.as_ref().filter(|b| b.has_redis())
                {
                    say(&format!("run {run}: redis, GET of {size} bytes, {depth} in flight"));
                    let redis = Some(tools.redis(size, depth, plan.seconds).await?);
                    measured.fio.push(FioTurns { redis, ..FioTurns::default() });
                } else {
                    measured.fio.push(FioTurns::default());
                }
            } else if let Some(fio) = &mut fio {
                measured.fio.push(
                    fio.turns(*job, ours.group, &|what| say(&format!("run {run}: {what}"))).await?,
                );
            }
        }
    }
    outcome.add(&measured, &iperf3);
    Ok(outcome)
}

/// Puts the file into S3: uploads in the background would be measured along with what comes next, `fio` included.
async fn settle(fs: &FileSystem, inode: InodeId, notes: &mut Vec<String>) {
    let flush = AdminCall::Flush { inode, wait: true };
    if let Err(e) = fs.cluster().admin(flush, FLUSH_PATIENCE).await {
        let note = format!("the file could not be flushed ({e}): uploads may disturb");
        if !notes.contains(&note) {
            notes.push(note);
        }
    }
}

/// What to know of a turn of reads that were not of where they should be.
fn from_memory(job: Job, turn: Turn, notes: &[String]) -> Option<String> {
    let percent = turn.dram_share * 100.0;
    let note = match job.operation {
        Operation::Read if percent >= 1.0 => format!(
            "reads of {} bytes: {percent:.0} % were answered from the nodes' memory; `ebb up --dram 0` measures the device",
            job.size
        ),
        Operation::ReadDram if percent < 99.0 => format!(
            "reads of {} bytes from memory: only {percent:.0} % were; give the nodes more (`ebb up --dram`) or the file less (--file)",
            job.size
        ),
        _ => return None,
    };
    (!notes.contains(&note)).then_some(note)
}

/// Reads what a row will ask for often enough that the cores keep it in memory: the first time it is only noted.
async fn warm(
    fs: &FileSystem,
    inode: InodeId,
    plan: &Plan,
    slots: &Slots,
) -> Result<(), BenchError> {
    const EACH: u64 = 1 << 20;
    let handle = fs.open(inode, OpenFlags::default()).await?.handle;
    let mut result = Ok(());
    for _ in 0..3 {
        for start in &slots.starts {
            let end = (start + u64::from(CHUNK_BYTES).max(slots.per_start * slots.size))
                .min(plan.file_bytes);
            for at in (*start..end).step_by(EACH as usize) {
                result = result.and(fs.read(handle, at, EACH).await.map(drop));
            }
        }
    }
    let released = fs.release(handle).await;
    result?;
    Ok(released?)
}

/// What `fio` did in one run: the same only once, whichever rows of ours it stands beside.
struct Fio<'a> {
    tools: &'a Baseline,
    seconds: u64,
    done: HashMap<FioJob, Sample>,
}

impl Fio<'_> {
    /// What a row of ours is compared with.
    async fn turns(
        &mut self,
        Job { operation, size, depth }: Job,
        group: Option<Group>,
        say: &impl Fn(&str),
    ) -> Result<FioTurns, BenchError> {
        if operation.reads() {
            let plain = self.once(FioJob::Read { size, depth }, say).await?;
            return Ok(FioTurns { plain, ..FioTurns::default() });
        }
        let write = |depth, durable| FioJob::Write { size, depth, durable };
        let batch = group.unwrap_or_default().whole();
        Ok(FioTurns {
            plain: self.once(write(depth, Durable::Never), say).await?,
            each: Some(self.once(write(depth, Durable::Each), say).await?),
            batched: Some(self.once(write(depth, Durable::Every(batch)), say).await?),
            single: Some(self.once(write(1, Durable::Every(1)), say).await?),
            redis: None,
        })
    }

    async fn once(&mut self, job: FioJob, say: &impl Fn(&str)) -> Result<Sample, BenchError> {
        if let Some(sample) = self.done.get(&job) {
            return Ok(*sample);
        }
        say(&format!("fio {job}"));
        let sample = self.tools.fio(job, self.seconds).await?;
        self.done.insert(job, sample);
        Ok(sample)
    }
}

impl std::str::FromStr for Operation {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|o| o.name() == name);
        found.ok_or_else(|| format!("{name:?} is none of read, read-dram, write, write+fsync"))
    }
}

/// Where requests go: slots of the file, in whole chunks.
pub(crate) struct Slots {
    starts: Vec<u64>,
    per_start: u64,
    size: u64,
}

impl Slots {
    /// Requests of `size` bytes inside the chunks that begin at `starts`.
    pub(crate) fn of(starts: Vec<u64>, size: u64) -> Self {
        Self { starts, per_start: u64::from(CHUNK_BYTES) / size, size }
    }

    pub(crate) fn offset(&self, random: u64) -> u64 {
        let n = random % (self.starts.len() as u64 * self.per_start);
        self.starts[(n / self.per_start) as usize] + n % self.per_start * self.size
    }
}

/// Where the chunks of a file begin, by the core that holds them.
fn by_core(map: &ClusterMap, inode: InodeId, file_bytes: u64) -> BTreeMap<ShardRef, Vec<u64>> {
    let mut by_core: BTreeMap<ShardRef, Vec<u64>> = BTreeMap::new();
    for start in (0..file_bytes).step_by(CHUNK_BYTES as usize) {
        let entry = map.pg_of(inode, ChunkIndex::of_offset(start));
        if let Some(core) = entry.and_then(|(_, pg)| pg.primary()) {
            by_core.entry(core).or_default().push(start);
        }
    }
    by_core
}

/// The core that holds most of a file, and where its chunks begin.
pub(crate) fn busiest(
    map: &ClusterMap,
    inode: InodeId,
    file_bytes: u64,
) -> Option<(ShardRef, Vec<u64>)> {
    by_core(map, inode, file_bytes).into_iter().max_by_key(|(_, starts)| starts.len())
}

/// The slots of the core that holds most of the file (or of all cores), and which cores that is.
fn slots(map: &ClusterMap, inode: InodeId, plan: &Plan, size: u64) -> (Slots, Vec<ShardRef>) {
    if !plan.all_cores
        && size <= u64::from(CHUNK_BYTES)
        && let Some((core, starts)) = busiest(map, inode, plan.file_bytes)
    {
        return (Slots::of(starts, size), vec![core]);
    }
    // Requests larger than a chunk go where their chunks are.
    let cores = by_core(map, inode, plan.file_bytes).into_keys().collect();
    (Slots { starts: vec![0], per_start: plan.file_bytes / size, size }, cores)
}

async fn turn(
    fs: &FileSystem,
    inode: InodeId,
    plan: &Plan,
    job: Job,
    slots: Arc<Slots>,
    journals: &Journals,
) -> Result<Turn, BenchError> {
    let stop = Arc::new(AtomicBool::new(false));
    let bytes = Arc::new(AtomicU64::new(0));
    let write = !job.operation.reads();
    let mut handles = Vec::new();
    for _ in 0..job.depth {
        let flags = OpenFlags { write, ..OpenFlags::default() };
        handles.push(fs.open(inode, flags).await?.handle);
    }
    let counted = journals.count().await?;
    let cpu_before = cpu_seconds();
    let started = Instant::now();
    let workers: Vec<_> = handles
        .iter()
        .zip(1u64..)
        .map(|(&handle, seed)| {
            let fs = fs.clone();
            let (stop, bytes, slots) = (Arc::clone(&stop), Arc::clone(&bytes), Arc::clone(&slots));
            tokio::spawn(worker(fs, handle, seed, job.operation, stop, bytes, slots))
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(plan.seconds)).await;
    stop.store(true, Ordering::Relaxed);
    let mut times = histogram();
    for worker in workers {
        let part = worker.await.map_err(|e| BenchError::Worker(e.to_string()))??;
        times.add(&part).map_err(|e| BenchError::Worker(e.to_string()))?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let cpu = cpu_seconds() - cpu_before;
    // Before the handles go: their end is no part of what was measured.
    let (group, dram_hits) = journals.since(counted, times.len()).await?;
    for handle in handles {
        fs.release(handle).await?;
    }
    let moved = bytes.load(Ordering::Relaxed) as f64;
    let us = |q: f64| times.value_at_quantile(q) as f64 / 1000.0;
    Ok(Turn {
        sample: Sample {
            iops: times.len() as f64 / seconds,
            mb_per_s: moved / seconds / 1e6,
            p50_us: us(0.5),
            p99_us: us(0.99),
            p999_us: us(0.999),
            writes_per_sync: if write { group.requests_per_batch() } else { 0.0 },
        },
        cpu_s_per_gb: cpu / (moved / 1e9).max(1e-9),
        group: write.then_some(group),
        dram_share: dram_hits as f64 / (times.len() as f64).max(1.0),
    })
}

/// Requests one after another until told to stop.
async fn worker(
    fs: FileSystem,
    handle: FileHandle,
    seed: u64,
    operation: Operation,
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
    slots: Arc<Slots>,
) -> Result<Histogram<u64>, ClientError> {
    let mut times = histogram();
    let mut random = seed;
    let mut end = 0;
    let data = vec![seed as u8; if operation.reads() { 0 } else { slots.size as usize }];
    while !stop.load(Ordering::Relaxed) {
        // xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators".
        random ^= random >> 12;
        random ^= random << 25;
        random ^= random >> 27;
        let at = slots.offset(random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16);
        if at == end {
            // It would go on where the last one ended, and look sequential.
            continue;
        }
        end = at + slots.size;
        let t = Instant::now();
        match operation {
            Operation::Read | Operation::ReadDram => {
                fs.read(handle, at, slots.size).await?;
            }
            Operation::Write => {
                fs.write(handle, at, &data).await?;
                fs.sync_data(handle).await?;
            }
            Operation::WriteFsync => {
                fs.write(handle, at, &data).await?;
                fs.fsync(handle).await?;
            }
        }
        times.saturating_record(t.elapsed().as_nanos() as u64);
        bytes.fetch_add(slots.size, Ordering::Relaxed);
    }
    Ok(times)
}

pub(crate) fn histogram() -> Histogram<u64> {
    // 100 ns to 100 s with two significant digits.
    Histogram::new_with_bounds(100, 100_000_000_000, 2).expect("constant bounds are valid")
}

/// CPU seconds used so far by every process of this binary on this machine.
fn cpu_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0; // USER_HZ is 100 on every Linux architecture we build for.
    let mut ticks = 0u64;
    let Ok(me) = std::fs::read_link("/proc/self/exe") else { return 0.0 };
    let Ok(entries) = std::fs::read_dir("/proc") else { return 0.0 };
    for entry in entries.flatten() {
        if std::fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == me)
            && let Ok(stat) = std::fs::read_to_string(entry.path().join("stat"))
            && let Some(rest) = stat.rfind(')').and_then(|i| stat.get(i + 2..))
        {
            let fields: Vec<&str> = rest.split(' ').collect();
            ticks +=
                [11, 12].iter().filter_map(|i| fields.get(*i)?.parse::<u64>().ok()).sum::<u64>();
        }
    }
    ticks as f64 / TICKS_PER_SECOND
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_inside_the_chosen_chunks() {
        let chunk = u64::from(CHUNK_BYTES);
        let starts = vec![0, 3 * chunk, 7 * chunk];
        for size in [4096, 1 << 20, chunk] {
            let slots = Slots { starts: starts.clone(), per_start: chunk / size, size };
            for random in 0..5000u64 {
                let at = slots.offset(random.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                assert!(at.is_multiple_of(size));
                assert!(starts.contains(&(at / chunk * chunk)), "{at}");
                assert!(at % chunk + size <= chunk);
            }
        }
    }
}
