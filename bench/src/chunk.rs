//! `ebb bench chunk`: reads and writes of chosen sizes and depths against a running cluster.
//!
//! Each row is one (operation, size, depth): `depth` workers issue requests of `size` bytes at
//! random aligned offsets of one file that is wholly on the data nodes, for a fixed time. Unless the
//! plan says otherwise only chunks of one server core are asked for, so that a row is what one core
//! does. Each worker has a handle of its own and never reads on from where it was, so that the
//! client's readahead stays out of it; the client keeps no other cache, and the servers read their
//! device with O_DIRECT. Hence each read is one request to a chunk server and one read of its device.
//! A write row is a write and an fsync: durable on the node and committed by the metadata plane.
//!
//! CPU is that of this process and of the servers on this machine, from /proc, per GB moved.

use crate::BenchError;
use crate::baseline::{Baseline, Sample};
use crate::report::{Bar, Limit, columns, median, number};
use ebb_client::{ClientError, Cluster, FileHandle, FileSystem, InodeId, OpenFlags, Owner};
use ebb_dataplane_protocol::{CHUNK_BYTES, ChunkIndex, ClusterMap, ShardRef};
use ebb_metaplane_protocol::AdminCall;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::collections::BTreeMap;
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
    /// Measure reads.
    pub reads: bool,
    /// Measure writes.
    pub writes: bool,
    /// Runs; figures are their medians.
    pub runs: u32,
    /// Ask all server cores, not one.
    pub all_cores: bool,
    /// Also run `fio` on a file in this directory and `iperf3` on loopback, turn by turn.
    pub baseline: Option<PathBuf>,
}

/// One row: medians over the runs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    /// "ours", "fio" or "iperf3"
    pub tool: &'static str,
    /// "read", "write", or "stream" of `iperf3`
    pub operation: &'static str,
    /// Bytes of a request.
    pub size_bytes: u64,
    /// Requests in flight.
    pub depth: u32,
    /// Server cores asked; 0 for other tools.
    pub server_cores: u32,
    /// Requests per second.
    pub iops: f64,
    /// 10^6 bytes per second.
    pub mb_per_s: f64,
    /// Median latency, µs.
    pub p50_us: f64,
    /// 99th percentile, µs; 0 where it was not measured, as below.
    pub p99_us: f64,
    /// 99.9th percentile, µs.
    pub p999_us: f64,
    /// CPU seconds of all `ebb` processes of this machine per 10^9 bytes.
    pub cpu_s_per_gb: f64,
    /// MB/s of each run.
    pub mb_per_s_runs: Vec<f64>,
}

/// Ours against the machine: reads of 1 MiB.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Bytes of a request.
    pub size_bytes: u64,
    /// Requests in flight.
    pub depth: u32,
    /// Median over the runs of ours / the smaller of `fio` and `iperf3` of the same run.
    pub ratio: f64,
    /// At least 0.5.
    pub bar: Bar,
}

/// What came out.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Runs.
    pub runs: u32,
    /// All rows.
    pub rows: Vec<Row>,
    /// Comparisons.
    pub verdicts: Vec<Verdict>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// The promise: half of what the machine does.
const RATIO: Limit = Limit::at_least(0.5);
/// It is about requests of this size.
const RATIO_SIZE_BYTES: u64 = 1 << 20;
const NAME: &[u8] = b".ebb-bench";
/// A flush of the file before reads are measured may take this long.
const FLUSH_PATIENCE: Duration = Duration::from_secs(600);

/// One (operation, size, depth).
#[derive(Clone, Copy)]
struct Job {
    operation: &'static str,
    size: u64,
    depth: u32,
}

/// A measurement of ours.
struct Turn {
    sample: Sample,
    cpu_s_per_gb: f64,
}

/// Runs the plan; `say` gets a line per step. The file is removed afterwards.
pub async fn run(fs: &FileSystem, plan: &Plan, say: impl Fn(&str)) -> Result<Outcome, BenchError> {
    let largest = plan.sizes.iter().copied().max().unwrap_or(0);
    let zero = plan.sizes.contains(&0) || plan.depths.contains(&0) || plan.seconds == 0;
    if largest == 0 || zero || plan.runs == 0 {
        return Err(BenchError::Plan("sizes, depths, seconds and runs must be above zero".into()));
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
    let baseline = match &plan.baseline {
        None => None,
        Some(dir) => {
            let (tools, missing) = Baseline::prepare(dir, plan.file_bytes).await?;
            outcome.notes.extend(missing);
            Some(tools)
        }
    };
    // Uploads in the background would be measured along with the reads.
    say("flushing it to S3, so that no upload disturbs");
    let flush = AdminCall::Flush { inode, wait: true };
    if let Err(e) = fs.cluster().admin(flush, FLUSH_PATIENCE).await {
        outcome
            .notes
            .push(format!("the file could not be flushed first ({e}): uploads may disturb"));
    }
    let jobs: Vec<Job> = [(plan.reads, "read"), (plan.writes, "write")]
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .flat_map(|(_, operation)| {
            plan.sizes.iter().flat_map(move |size| {
                plan.depths.iter().map(move |depth| Job { operation, size: *size, depth: *depth })
            })
        })
        .collect();
    let mut ours: Vec<Vec<Turn>> = jobs.iter().map(|_| Vec::new()).collect();
    let mut fio: Vec<Vec<Sample>> = jobs.iter().map(|_| Vec::new()).collect();
    let mut iperf3: Vec<Sample> = Vec::new();
    let mut cores = vec![0; jobs.len()];
    for run in 1..=plan.runs {
        if let Some(tools) = baseline.as_ref().filter(|b| b.has_iperf3()) {
            say(&format!("run {run}: iperf3 over loopback"));
            iperf3.push(tools.iperf3(plan.seconds).await?);
        }
        for (i, job) in jobs.iter().enumerate() {
            let Job { operation, size, depth } = *job;
            say(&format!("run {run}: {operation} {size} bytes, depth {depth}"));
            let (slots, asked) = slots(&fs.cluster(), inode, plan, size);
            cores[i] = asked;
            ours[i].push(turn(fs, inode, plan, *job, Arc::new(slots)).await?);
            if let Some(tools) = baseline.as_ref().filter(|b| b.has_fio()) {
                say(&format!("run {run}: fio {operation} {size} bytes, depth {depth}"));
                fio[i].push(tools.fio(operation == "read", size, depth, plan.seconds).await?);
            }
        }
    }
    for (i, job) in jobs.iter().enumerate() {
        outcome.rows.push(our_row(*job, cores[i], &ours[i]));
        if !fio[i].is_empty() {
            outcome.rows.push(tool_row("fio", *job, &fio[i]));
        }
        let both = !fio[i].is_empty() && !iperf3.is_empty();
        if both && job.operation == "read" && job.size == RATIO_SIZE_BYTES {
            let ratios: Vec<f64> = (0..plan.runs as usize)
                .map(|r| ours[i][r].sample.mb_per_s / fio[i][r].mb_per_s.min(iperf3[r].mb_per_s))
                .collect();
            let ratio = median(&ratios);
            let bar = RATIO.judge(ratio);
            outcome.verdicts.push(Verdict { size_bytes: job.size, depth: job.depth, ratio, bar });
        }
    }
    if !iperf3.is_empty() {
        let job = Job { operation: "stream", size: 0, depth: 1 };
        outcome.rows.push(tool_row("iperf3", job, &iperf3));
    }
    Ok(outcome)
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

/// The slots of the core that holds most of the file (or of all cores), and how many cores that is.
fn slots(cluster: &Cluster, inode: InodeId, plan: &Plan, size: u64) -> (Slots, u32) {
    let chunk = u64::from(CHUNK_BYTES);
    let by_core = by_core(&cluster.map(), inode, plan.file_bytes);
    let cores = by_core.len() as u32;
    let busiest = by_core.into_values().max_by_key(Vec::len);
    match busiest {
        Some(starts) if !plan.all_cores && size <= chunk => (Slots::of(starts, size), 1),
        // Requests larger than a chunk go where their chunks are.
        _ => (Slots { starts: vec![0], per_start: plan.file_bytes / size, size }, cores),
    }
}

async fn turn(
    fs: &FileSystem,
    inode: InodeId,
    plan: &Plan,
    job: Job,
    slots: Arc<Slots>,
) -> Result<Turn, BenchError> {
    let stop = Arc::new(AtomicBool::new(false));
    let bytes = Arc::new(AtomicU64::new(0));
    let write = job.operation == "write";
    let mut handles = Vec::new();
    for _ in 0..job.depth {
        let flags = OpenFlags { write, ..OpenFlags::default() };
        handles.push(fs.open(inode, flags).await?.handle);
    }
    let cpu_before = cpu_seconds();
    let started = Instant::now();
    let workers: Vec<_> = handles
        .iter()
        .zip(1u64..)
        .map(|(&handle, seed)| {
            let fs = fs.clone();
            let (stop, bytes, slots) = (Arc::clone(&stop), Arc::clone(&bytes), Arc::clone(&slots));
            tokio::spawn(worker(fs, handle, seed, write.then_some(job.size), stop, bytes, slots))
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
        },
        cpu_s_per_gb: cpu / (moved / 1e9).max(1e-9),
    })
}

/// Requests one after another until told to stop. `write`: bytes of a write; else it reads.
async fn worker(
    fs: FileSystem,
    handle: FileHandle,
    seed: u64,
    write: Option<u64>,
    stop: Arc<AtomicBool>,
    bytes: Arc<AtomicU64>,
    slots: Arc<Slots>,
) -> Result<Histogram<u64>, ClientError> {
    let mut times = histogram();
    let mut random = seed;
    let mut end = 0;
    let data = vec![seed as u8; write.unwrap_or(0) as usize];
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
        if write.is_some() {
            fs.write(handle, at, &data).await?;
            fs.fsync(handle).await?;
        } else {
            fs.read(handle, at, slots.size).await?;
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

fn our_row(job: Job, server_cores: u32, turns: &[Turn]) -> Row {
    let of = |f: fn(&Turn) -> f64| median(&turns.iter().map(f).collect::<Vec<_>>());
    Row {
        tool: "ours",
        operation: job.operation,
        size_bytes: job.size,
        depth: job.depth,
        server_cores,
        iops: of(|t| t.sample.iops),
        mb_per_s: of(|t| t.sample.mb_per_s),
        p50_us: of(|t| t.sample.p50_us),
        p99_us: of(|t| t.sample.p99_us),
        p999_us: of(|t| t.sample.p999_us),
        cpu_s_per_gb: of(|t| t.cpu_s_per_gb),
        mb_per_s_runs: turns.iter().map(|t| t.sample.mb_per_s).collect(),
    }
}

fn tool_row(tool: &'static str, job: Job, samples: &[Sample]) -> Row {
    let of = |f: fn(&Sample) -> f64| median(&samples.iter().map(f).collect::<Vec<_>>());
    Row {
        tool,
        operation: job.operation,
        size_bytes: job.size,
        depth: job.depth,
        iops: of(|s| s.iops),
        mb_per_s: of(|s| s.mb_per_s),
        p50_us: of(|s| s.p50_us),
        p99_us: of(|s| s.p99_us),
        p999_us: of(|s| s.p999_us),
        mb_per_s_runs: samples.iter().map(|s| s.mb_per_s).collect(),
        ..Row::default()
    }
}

/// The outcome for people.
pub fn table(outcome: &Outcome) -> String {
    let header = [
        "",
        "bytes",
        "depth",
        "cores",
        "IOPS",
        "MB/s",
        "p50 µs",
        "p99 µs",
        "p99.9 µs",
        "CPU s/GB",
        "runs, MB/s",
    ];
    let or_dash = |v: f64, text: String| if v == 0.0 { "-".to_owned() } else { text };
    let rows: Vec<Vec<String>> = outcome
        .rows
        .iter()
        .map(|r| {
            let whole = |v: f64| or_dash(v, format!("{v:.0}"));
            let runs: Vec<String> = r.mb_per_s_runs.iter().map(|v| number(*v)).collect();
            vec![
                format!("{} {}", r.tool, r.operation),
                or_dash(r.size_bytes as f64, r.size_bytes.to_string()),
                r.depth.to_string(),
                or_dash(f64::from(r.server_cores), r.server_cores.to_string()),
                whole(r.iops),
                format!("{:.1}", r.mb_per_s),
                whole(r.p50_us),
                whole(r.p99_us),
                whole(r.p999_us),
                or_dash(r.cpu_s_per_gb, format!("{:.2}", r.cpu_s_per_gb)),
                runs.join(" "),
            ]
        })
        .collect();
    let mut text = columns(&header, &rows);
    for v in &outcome.verdicts {
        text += &format!(
            "\n1 MiB reads, depth {}: {:.2} of the smaller of fio and iperf3 ({})",
            v.depth, v.ratio, v.bar
        );
    }
    for note in &outcome.notes {
        text += &format!("\nnote: {note}");
    }
    text
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
