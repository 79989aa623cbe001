//! `ebb bench chunk`: reads and writes of chosen sizes and depths against a running cluster.
//!
//! Each row is one (operation, size, depth): `depth` workers issue requests of `size` bytes at
//! random aligned offsets of one file that is wholly on the data nodes, for a fixed time. Reads go
//! past the client's readahead (they are random), so that each is a request to a chunk server and a
//! read of its device. CPU is that of this process and of the servers on this machine, from
//! /proc, per GB moved.

use ebb_client::{ClientError, FileSystem, OpenFlags, Owner};
use hdrhistogram::Histogram;
use serde::Serialize;
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
    /// Seconds of each row.
    pub seconds: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Measure reads.
    pub reads: bool,
    /// Measure writes.
    pub writes: bool,
}

/// One row.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// "read" or "write"
    pub operation: &'static str,
    /// Bytes of a request.
    pub size_bytes: u64,
    /// Requests in flight.
    pub depth: u32,
    /// Requests per second.
    pub iops: f64,
    /// 10^6 bytes per second.
    pub mb_per_s: f64,
    /// Median latency, µs.
    pub p50_us: f64,
    /// 99th percentile, µs.
    pub p99_us: f64,
    /// 99.9th percentile, µs.
    pub p999_us: f64,
    /// CPU seconds of all `ebb` processes of this machine per 10^9 bytes.
    pub cpu_s_per_gb: f64,
}

/// A failed measurement.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The file system refused.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The plan makes no sense.
    #[error("{0}")]
    Plan(String),
    /// A worker panicked.
    #[error("a worker ended abruptly: {0}")]
    Worker(String),
}

const NAME: &[u8] = b".ebb-bench";

/// Runs the plan; `say` gets a line per step. The file is removed afterwards.
pub async fn run(fs: &FileSystem, plan: &Plan, say: impl Fn(&str)) -> Result<Vec<Row>, BenchError> {
    let largest = plan.sizes.iter().copied().max().unwrap_or(0);
    if largest == 0 || plan.sizes.contains(&0) || plan.depths.contains(&0) || plan.seconds == 0 {
        return Err(BenchError::Plan("sizes, depths and seconds must be above zero".into()));
    }
    if plan.file_bytes < largest {
        return Err(BenchError::Plan("--file must be at least the largest --size".into()));
    }
    let root = fs.resolve(b"/").await?.inode;
    let owner = Owner { uid: 0, gid: 0 };
    let flags = OpenFlags { write: true, truncate: true, exclusive: false };
    let file = fs.create(root, NAME, 0o600, owner, flags).await?;
    say(&format!("writing a file of {} MiB", plan.file_bytes >> 20));
    let result = measure(fs, file.handle, plan, &say).await;
    let released = fs.release(file.handle).await;
    let removed = fs.unlink(root, NAME).await;
    let rows = result?;
    released?;
    removed?;
    Ok(rows)
}

async fn measure(
    fs: &FileSystem,
    handle: ebb_client::FileHandle,
    plan: &Plan,
    say: &impl Fn(&str),
) -> Result<Vec<Row>, BenchError> {
    // Not zeros: a store that knew holes would have an easy time.
    let block: Vec<u8> = (0..1u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let mut at = 0;
    while at < plan.file_bytes {
        let n = (plan.file_bytes - at).min(block.len() as u64);
        fs.write(handle, at, &block[..n as usize]).await?;
        at += n;
    }
    fs.fsync(handle).await?;
    let mut rows = Vec::new();
    for (wanted, operation) in [(plan.reads, "read"), (plan.writes, "write")] {
        for &size in &plan.sizes {
            for &depth in &plan.depths {
                if wanted {
                    say(&format!("{operation} {size} bytes, depth {depth}"));
                    rows.push(row(fs, handle, plan, operation, size, depth).await?);
                }
            }
        }
    }
    Ok(rows)
}

async fn row(
    fs: &FileSystem,
    handle: ebb_client::FileHandle,
    plan: &Plan,
    operation: &'static str,
    size: u64,
    depth: u32,
) -> Result<Row, BenchError> {
    let stop = Arc::new(AtomicBool::new(false));
    let bytes = Arc::new(AtomicU64::new(0));
    let cpu_before = cpu_seconds();
    let started = Instant::now();
    let slots = plan.file_bytes / size;
    let workers: Vec<_> = (0..depth)
        .map(|worker| {
            let (fs, stop, bytes) = (fs.clone(), Arc::clone(&stop), Arc::clone(&bytes));
            tokio::spawn(async move {
                let mut times = histogram();
                let mut random = u64::from(worker) + 1;
                let data = vec![worker as u8; if operation == "write" { size as usize } else { 0 }];
                while !stop.load(Ordering::Relaxed) {
                    // xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators".
                    random ^= random >> 12;
                    random ^= random << 25;
                    random ^= random >> 27;
                    let at = random.wrapping_mul(0x2545_f491_4f6c_dd1d) % slots * size;
                    let t = Instant::now();
                    if operation == "read" {
                        fs.read(handle, at, size).await?;
                    } else {
                        fs.write(handle, at, &data).await?;
                        fs.fsync(handle).await?;
                    }
                    times.saturating_record(t.elapsed().as_nanos() as u64);
                    bytes.fetch_add(size, Ordering::Relaxed);
                }
                Ok::<_, ClientError>(times)
            })
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
    let moved = bytes.load(Ordering::Relaxed) as f64;
    let us = |q: f64| times.value_at_quantile(q) as f64 / 1000.0;
    Ok(Row {
        operation,
        size_bytes: size,
        depth,
        iops: times.len() as f64 / seconds,
        mb_per_s: moved / seconds / 1e6,
        p50_us: us(0.5),
        p99_us: us(0.99),
        p999_us: us(0.999),
        cpu_s_per_gb: (cpu_seconds() - cpu_before) / (moved / 1e9).max(1e-9),
    })
}

fn histogram() -> Histogram<u64> {
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
            && let Some(rest) = stat.rfind(')').map(|i| &stat[i + 2..])
        {
            let fields: Vec<&str> = rest.split(' ').collect();
            ticks += [11, 12].iter().filter_map(|i| fields.get(*i)?.parse::<u64>().ok()).sum::<u64>();
        }
    }
    ticks as f64 / TICKS_PER_SECOND
}

/// The rows for people.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<6} {:>9} {:>6} {:>10} {:>10} {:>10} {:>10} {:>10} {:>9}",
        "", "bytes", "depth", "IOPS", "MB/s", "p50 µs", "p99 µs", "p99.9 µs", "CPU s/GB"
    );
    for r in rows {
        text += &format!(
            "\n{:<6} {:>9} {:>6} {:>10.0} {:>10.1} {:>10.0} {:>10.0} {:>10.0} {:>9.2}",
            r.operation, r.size_bytes, r.depth, r.iops, r.mb_per_s, r.p50_us, r.p99_us, r.p999_us, r.cpu_s_per_gb
        );
    }
    text
}
