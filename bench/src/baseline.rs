//! What the machine itself can do: `fio` on the cluster's file system and `iperf3` on loopback, run
//! between our own measurements. A tool that is not installed is named with its package.

use crate::BenchError;
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// One measurement of a tool.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// Requests per second; 0 where there are none.
    pub iops: f64,
    /// 10^6 bytes per second.
    pub mb_per_s: f64,
    /// Median latency, µs; 0 where there is none, as below.
    pub p50_us: f64,
    /// 99th percentile, µs.
    pub p99_us: f64,
    /// 99.9th percentile, µs.
    pub p999_us: f64,
    /// Writes that shared one sync; 0 where nothing is synced.
    pub writes_per_sync: f64,
}

/// When `fio` makes what it wrote durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Durable {
    /// Never: what the device takes.
    Never,
    /// Each write by itself, as many at once as the depth says (O_DSYNC).
    Each,
    /// After every so many writes, all of them by one fdatasync: `--fdatasync=N`. No other fdatasync is in
    /// flight meanwhile, as no other batch of our journal is.
    Every(u32),
}

/// What `fio` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FioJob {
    /// Random reads.
    Read {
        /// Bytes of a request.
        size: u64,
        /// Requests in flight.
        depth: u32,
    },
    /// Random writes.
    Write {
        /// Bytes of a request.
        size: u64,
        /// Requests in flight.
        depth: u32,
        /// How they become durable.
        durable: Durable,
    },
}

impl std::fmt::Display for FioJob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Read { size, depth } => write!(f, "read {size} bytes, depth {depth}"),
            Self::Write { size, depth, durable } => {
                write!(f, "write {size} bytes, depth {depth}, ")?;
                match durable {
                    Durable::Never => write!(f, "no sync"),
                    Durable::Each => write!(f, "O_DSYNC"),
                    Durable::Every(n) => write!(f, "an fdatasync per {n}"),
                }
            }
        }
    }
}

impl FioJob {
    fn arguments(self) -> Vec<String> {
        let (rw, size, depth) = match self {
            Self::Read { size, depth } => ("randread", size, depth),
            Self::Write { size, depth, .. } => ("randwrite", size, depth),
        };
        let mut all =
            vec![format!("--rw={rw}"), format!("--bs={size}"), format!("--iodepth={depth}")];
        let durable = match self {
            Self::Read { .. } => Durable::Never,
            Self::Write { durable, .. } => durable,
        };
        // With several requests in flight fio's io_uring engine makes several fdatasyncs in the place of one
        // (3.33: three to four times as many as asked for, since the count it goes by stands still
        // meanwhile); its libaio engine makes exactly one, and waits for it.
        let engine = match durable {
            Durable::Every(_) if depth > 1 => "libaio",
            _ => "io_uring",
        };
        all.push(format!("--ioengine={engine}"));
        match durable {
            Durable::Never => {}
            Durable::Each => all.push("--sync=dsync".into()),
            Durable::Every(n) => all.push(format!("--fdatasync={n}")),
        }
        all
    }
}

/// The tools, and the file `fio` works on, which goes with this value.
#[derive(Debug)]
pub struct Baseline {
    file: PathBuf,
    file_bytes: u64,
    fio: bool,
    iperf3: bool,
    redis: bool,
}

impl Drop for Baseline {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

/// A port of loopback that nobody listens on.
fn free_port() -> std::io::Result<String> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
    Ok(listener.local_addr()?.port().to_string())
}

/// Starts a tool's server; it is killed when dropped.
fn server(program: &str, args: &[&str]) -> std::io::Result<tokio::process::Child> {
    Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
}

async fn installed(program: &str) -> bool {
    let status =
        Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.await.is_ok_and(|s| s.success())
}

impl Baseline {
    /// Looks for the tools (for Redis if it is asked for) and, for `fio`, writes a file of `file_bytes` into `dir`. The second
    /// value says what is missing.
    pub async fn prepare(
        dir: &Path,
        file_bytes: u64,
        redis: bool,
    ) -> Result<(Self, Vec<String>), BenchError> {
        let mut missing = Vec::new();
        let programs = ["fio", "iperf3"].into_iter().chain(redis.then_some("redis-server"));
        for program in programs {
            if !installed(program).await {
                missing.push(format!(
                    "{program} is not installed, so there is nothing to compare with: apt-get install {program}"
                ));
            }
        }
        let has = |program: &str| !missing.iter().any(|m| m.starts_with(program));
        let file = dir.join(format!(".ebb-bench-fio-{}", std::process::id()));
        let (fio, iperf3, redis) = (has("fio"), has("iperf3"), redis && has("redis-server"));
        let this = Self { file, file_bytes, fio, iperf3, redis };
        if this.fio {
            this.write_file().map_err(BenchError::file("write", &this.file))?;
        }
        Ok((this, missing))
    }

    /// Written whole before anything is measured: unwritten extents would be read as zeros
    /// without touching the device.
    fn write_file(&self) -> std::io::Result<()> {
        let block = crate::chunk::pattern();
        let mut file = std::fs::File::create(&self.file)?;
        let mut left = self.file_bytes;
        while left > 0 {
            let n = left.min(block.len() as u64);
            file.write_all(&block[..n as usize])?;
            left -= n;
        }
        file.sync_all()
    }

    /// Whether `fio` is there.
    pub fn has_fio(&self) -> bool {
        self.fio
    }
    /// Whether `redis-server` is there, and with it `redis-benchmark`.
    pub fn has_redis(&self) -> bool {
        self.redis
    }
    /// Whether `iperf3` is there.
    pub fn has_iperf3(&self) -> bool {
        self.iperf3
    }

    /// `fio` with O_DIRECT at random offsets.
    pub async fn fio(&self, job: FioJob, seconds: u64) -> Result<Sample, BenchError> {
        let mut command = Command::new("fio");
        command
            .arg("--name=ebb")
            .arg(format!("--filename={}", self.file.display()))
            .arg(format!("--size={}", self.file_bytes))
            .arg(format!("--runtime={seconds}"))
            // From the request to its end, as ours are: the engine may do a synced write while it takes it.
            .args(["--time_based", "--direct=1", "--numjobs=1", "--lat_percentiles=1"])
            .args(["--randrepeat=0", "--norandommap", "--output-format=json"])
            .args(job.arguments());
        fio_sample(&json("fio", command).await?["jobs"][0], job)
    }

    /// `iperf3`, one stream over loopback, client and server on this machine.
    pub async fn iperf3(&self, seconds: u64) -> Result<Sample, BenchError> {
        let failed = |why: String| BenchError::Program { program: "iperf3", why };
        let port = free_port().map_err(|e| failed(format!("no free port: {e}")))?;
        let mut server =
            server("iperf3", &["--server", "--one-off", "--bind", "127.0.0.1", "--port", &port])
                .map_err(|e| failed(e.to_string()))?;
        // The server says nowhere that it listens; a refused client is asked again.
        let mut last = None;
        for _ in 0..50 {
            let mut client = Command::new("iperf3");
            client
                .args(["--client", "127.0.0.1", "--port", &port, "--json", "--time"])
                .arg(seconds.to_string());
            match json("iperf3", client).await {
                Ok(report) => {
                    let _ = server.kill().await;
                    let bits = report["end"]["sum_received"]["bits_per_second"]
                        .as_f64()
                        .ok_or_else(|| failed("its report has no sum_received".into()))?;
                    return Ok(Sample { mb_per_s: bits / 8e6, ..Sample::default() });
                }
                Err(e) => last = Some(e),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let _ = server.kill().await;
        Err(last.unwrap_or_else(|| failed("no answer".into())))
    }
}

/// Keys of the Redis server, all with values.
const REDIS_KEYS: u64 = 10_000;
/// Requests that are made in a second, about: how long a turn takes follows from it.
const REDIS_REQUESTS_PER_S: u64 = 150_000;
/// Synced writes of many connections: a second or a few.
const REDIS_SYNCED_WRITES: u64 = 100_000;

/// A Redis server of its own.
struct Redis {
    _server: tokio::process::Child,
    port: String,
}

fn redis_failed(why: impl std::fmt::Display) -> BenchError {
    BenchError::Program { program: "redis-server", why: why.to_string() }
}

impl Redis {
    async fn start(args: &[&str]) -> Result<Self, BenchError> {
        let port = free_port().map_err(|e| redis_failed(format!("no free port: {e}")))?;
        let mut all = vec!["--port", &port, "--bind", "127.0.0.1", "--save", ""];
        all.extend(args);
        let server = server("redis-server", &all).map_err(redis_failed)?;
        // Its benchmark tries for ever to reach a server that doesn't listen yet.
        for _ in 0..100 {
            if redis_answers(&port).await {
                return Ok(Self { _server: server, port });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(redis_failed("it does not answer"))
    }

    /// Its own benchmark: so many requests by so many connections.
    fn benchmark(&self, requests: u64, connections: u32, args: &[&str]) -> Command {
        let mut command = Command::new("redis-benchmark");
        command
            .args(["-h", "127.0.0.1", "-p", &self.port, "--csv"])
            .args(["-r", &REDIS_KEYS.to_string(), "-n", &requests.to_string()])
            .args(["-c", &connections.to_string()])
            .args(args)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }
}

impl Baseline {
    /// GETs of values of `size` bytes from a Redis server of its own, which writes nothing to disk: 8 connections with
    /// `depth` requests in flight in all, by its own benchmark.
    pub async fn redis(&self, size: u64, depth: u32, seconds: u64) -> Result<Sample, BenchError> {
        let redis = Redis::start(&["--appendonly", "no"]).await?;
        let connections = depth.min(8);
        let (bytes, pipeline) = (size.to_string(), (depth / connections).to_string());
        let benchmark = |test, requests| {
            redis.benchmark(requests, connections, &["-t", test, "-d", &bytes, "-P", &pipeline])
        };
        // So many random keys leave none without a value, but for one in e^20.
        redis_sample(benchmark("set", 20 * REDIS_KEYS), size).await?;
        redis_sample(benchmark("get", seconds * REDIS_REQUESTS_PER_S), size).await
    }
}

/// Whether Redis is installed; if not, a note says so.
pub async fn has_redis(notes: &mut Vec<String>) -> bool {
    let has = installed("redis-server").await;
    if !has {
        notes.push(
            "redis-server is not installed, so it is not compared with: apt-get install redis-server"
                .into(),
        );
    }
    has
}

/// HSETs and HGETs of a Redis server that keeps its log in `dir` and syncs it before it answers, by so many connections
/// with one request in flight each.
pub async fn redis_hash(dir: &Path, connections: u32) -> Result<(Sample, Sample), BenchError> {
    let log = dir.join(format!(".ebb-bench-redis-{}", std::process::id()));
    std::fs::create_dir(&log).map_err(BenchError::file("create", &log))?;
    let result = async {
        let place = log.to_string_lossy();
        let redis =
            Redis::start(&["--appendonly", "yes", "--appendfsync", "always", "--dir", &place])
                .await?;
        // A lone connection waits for every sync by itself.
        let (writes, reads) = match connections {
            1 => (REDIS_SYNCED_WRITES / 20, REDIS_SYNCED_WRITES / 5),
            _ => (REDIS_SYNCED_WRITES, 2 * REDIS_SYNCED_WRITES),
        };
        let hash = |requests, command: &[&str]| redis.benchmark(requests, connections, command);
        let field = "field:__rand_int__";
        let set = redis_sample(hash(writes, &["HSET", "names", field, "an inode"]), 0).await?;
        let get = redis_sample(hash(reads, &["HGET", "names", field]), 0).await?;
        Ok((set, get))
    }
    .await;
    let _ = std::fs::remove_dir_all(&log);
    result
}

async fn redis_answers(port: &str) -> bool {
    let ask = async {
        let mut stream = tokio::net::TcpStream::connect(format!("127.0.0.1:{port}")).await?;
        stream.write_all(b"PING\r\n").await?;
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).await?;
        Ok::<_, std::io::Error>(answer == *b"+PONG")
    };
    matches!(tokio::time::timeout(Duration::from_secs(2), ask).await, Ok(Ok(true)))
}

/// The last line of `redis-benchmark --csv`: test, requests/s, and latencies in ms: mean, least, p50, p95, p99, most.
async fn redis_sample(mut command: Command, size: u64) -> Result<Sample, BenchError> {
    let failed = |why: String| BenchError::Program { program: "redis-benchmark", why };
    let output = command.output().await.map_err(|e| failed(e.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next_back().unwrap_or_default();
    let fields: Vec<f64> =
        line.split(',').skip(1).filter_map(|f| f.trim_matches('"').parse().ok()).collect();
    let [iops, _, _, p50, _, p99, _] = fields[..] else {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!("{}: {line} {}", output.status, said.trim())));
    };
    Ok(Sample {
        iops,
        mb_per_s: iops * size as f64 / 1e6,
        p50_us: p50 * 1000.0,
        p99_us: p99 * 1000.0,
        ..Sample::default()
    })
}

/// What a job of `fio`'s report says.
fn fio_sample(report: &Value, job: FioJob) -> Result<Sample, BenchError> {
    let side = &report[if matches!(job, FioJob::Read { .. }) { "read" } else { "write" }];
    let get = |v: &Value, what: &str| -> Result<f64, BenchError> {
        v.as_f64().ok_or_else(|| BenchError::Program {
            program: "fio",
            why: format!("its report has no {what}"),
        })
    };
    let us = |q: &str| -> Result<f64, BenchError> {
        Ok(get(&side["lat_ns"]["percentile"][q], "percentiles")? / 1000.0)
    };
    // How many syncs there were is in their latencies; `total_ios` stays 0.
    let writes_per_sync = match job {
        FioJob::Write { durable: Durable::Each, .. } => 1.0,
        FioJob::Write { durable: Durable::Every(_), .. } => {
            let syncs = get(&report["sync"]["lat_ns"]["N"], "number of syncs")?;
            get(&side["total_ios"], "total_ios")? / syncs.max(1.0)
        }
        _ => 0.0,
    };
    Ok(Sample {
        iops: get(&side["iops"], "iops")?,
        mb_per_s: get(&side["bw_bytes"], "bw_bytes")? / 1e6,
        p50_us: us("50.000000")?,
        p99_us: us("99.000000")?,
        p999_us: us("99.900000")?,
        writes_per_sync,
    })
}

async fn json(program: &'static str, mut command: Command) -> Result<Value, BenchError> {
    let failed = |why: String| BenchError::Program { program, why };
    let output = command
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|e| failed(e.to_string()))?;
    // Warnings may stand before the document.
    let text = String::from_utf8_lossy(&output.stdout);
    let document = text.find('{').map_or("", |at| &text[at..]);
    match serde_json::from_str::<Value>(document) {
        // iperf3 tells of a failure in its report, and may exit with 0 all the same.
        Ok(v) => match v["error"].as_str() {
            Some(why) => Err(failed(why.to_owned())),
            None if output.status.success() => Ok(v),
            None => Err(failed(output.status.to_string())),
        },
        Err(e) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(failed(format!("{}: {e}; {}", output.status, said.trim())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_of_fio_is_one_sync_after_its_writes_whatever_the_depth() {
        let of =
            |depth, durable| FioJob::Write { size: 4096, depth, durable }.arguments().join(" ");
        assert!(of(16, Durable::Every(5)).ends_with("--ioengine=libaio --fdatasync=5"));
        assert!(of(1, Durable::Every(1)).ends_with("--ioengine=io_uring --fdatasync=1"));
        assert!(of(16, Durable::Each).ends_with("--ioengine=io_uring --sync=dsync"));
        assert!(of(16, Durable::Never).ends_with("--iodepth=16 --ioengine=io_uring"));
    }

    #[test]
    fn the_writes_per_sync_are_those_that_fio_made() {
        let quantiles =
            serde_json::json!({ "50.000000": 1000, "99.000000": 2000, "99.900000": 3000 });
        let side = serde_json::json!({
            "iops": 500.0, "bw_bytes": 2_048_000, "total_ios": 1000, "lat_ns": { "percentile": quantiles },
        });
        let report = serde_json::json!({ "write": side, "sync": { "total_ios": 0, "lat_ns": { "N": 250 } } });
        let sample =
            |durable| fio_sample(&report, FioJob::Write { size: 4096, depth: 16, durable });
        let every = sample(Durable::Every(5)).expect("whole");
        assert_eq!((every.writes_per_sync, every.iops, every.p99_us), (4.0, 500.0, 2.0));
        assert_eq!(sample(Durable::Never).expect("whole").writes_per_sync, 0.0);
        assert!(fio_sample(&report, FioJob::Read { size: 4096, depth: 1 }).is_err());
    }
}
