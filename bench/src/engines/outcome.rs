//! Figures of `ebb bench engines`: rows, ratios, notes, and the table for people.

use super::{Contender, Job, Turn};
use crate::report::{columns, median, number};
use serde::Serialize;

/// One contender at one kind of request: medians over the runs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    /// "ours", or the engine under a minimal server.
    pub engine: &'static str,
    /// Whether the server computes a CRC-32C per block.
    pub checksums: bool,
    /// Bytes of a request.
    pub size_bytes: u32,
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
    /// CPU seconds of the server's process per 10^9 bytes.
    pub cpu_s_per_gb: f64,
    /// CPU of the server's process per request, µs.
    pub cpu_us_per_request: f64,
    /// CPU seconds per second of the server's process: near one, and its core is full.
    pub server_busy: f64,
    /// The same of the load generator: near one, and the server could do more.
    pub client_busy: f64,
    /// Resident memory of the server's process at most, 2^20 bytes.
    pub peak_mib: f64,
    /// Requests per second of each run.
    pub iops_runs: Vec<f64>,
}

/// Ours against one of the others.
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    /// Which engine.
    pub engine: &'static str,
    /// Whether its server computes checksums: the equal work.
    pub checksums: bool,
    /// Bytes of a request.
    pub size_bytes: u32,
    /// Requests in flight.
    pub depth: u32,
    /// Median over the runs of ours / theirs, requests per second of the same run.
    pub throughput: f64,
    /// The same of CPU per byte: below one is less.
    pub cpu: f64,
}

/// What came out.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Runs.
    pub runs: u32,
    /// All rows.
    pub rows: Vec<Row>,
    /// Ours against each other row.
    pub ratios: Vec<Ratio>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// What is true of every run.
pub(super) fn notes(server_cpu: usize, client_cpu: usize) -> Vec<String> {
    let mut notes = vec![
        "ours is a core of the running cluster as it is: it checks lease, epoch, grant and view, finds \
         the blocks in its index, and compares their checksums with it; the others find the bytes at \
         their offset in a file and compute the same checksums, unless the row says otherwise"
            .to_owned(),
        "busy: CPU seconds per second, of the server's process and of the load generator; memory of ours \
         is a whole node with its arena and its index"
            .to_owned(),
        "no rows of durable writes: ours journals and never overwrites in place, and a server that \
         overwrites and syncs does another job"
            .to_owned(),
    ];
    if server_cpu == client_cpu {
        notes.push("one CPU for server and load generator: only the ratios mean something".into());
    } else {
        notes.push(format!(
            "servers ran on CPU {server_cpu}, the load generator on CPU {client_cpu}"
        ));
    }
    notes
}

fn cpu_s_per_gb(turn: &Turn) -> f64 {
    turn.usage.cpu_s / (turn.sample.bytes / 1e9).max(1e-9)
}

impl Outcome {
    /// Adds the rows and ratios of one kind of request.
    pub(super) fn add(&mut self, job: Job, order: &[Contender], turns: &[(Contender, Turn)]) {
        let of = |c: Contender| -> Vec<&Turn> {
            turns.iter().filter(|(who, _)| *who == c).map(|(_, turn)| turn).collect()
        };
        let ours = of(Contender::Ours);
        for &contender in order {
            let turns = of(contender);
            if turns.is_empty() {
                continue;
            }
            let mid = |f: fn(&Turn) -> f64| median(&turns.iter().map(|t| f(t)).collect::<Vec<_>>());
            self.rows.push(Row {
                engine: contender.name(),
                checksums: contender.checksums(),
                size_bytes: job.size,
                depth: job.depth,
                iops: mid(|t| t.sample.iops),
                mb_per_s: mid(|t| t.sample.mb_per_s),
                p50_us: mid(|t| t.sample.p50_us),
                p99_us: mid(|t| t.sample.p99_us),
                cpu_s_per_gb: mid(cpu_s_per_gb),
                cpu_us_per_request: mid(cpu_s_per_gb) * f64::from(job.size) / 1e3,
                server_busy: mid(|t| t.usage.cpu_s / t.sample.seconds),
                client_busy: mid(|t| t.sample.client_cpu_s / t.sample.seconds),
                peak_mib: mid(|t| t.usage.peak_bytes as f64 / f64::from(1 << 20)),
                iops_runs: turns.iter().map(|t| t.sample.iops).collect(),
            });
            if contender == Contender::Ours {
                continue;
            }
            let ratio = |f: fn(&Turn) -> f64| {
                let each = ours.iter().zip(&turns).map(|(a, b)| f(a) / f(b).max(1e-9));
                median(&each.collect::<Vec<_>>())
            };
            self.ratios.push(Ratio {
                engine: contender.name(),
                checksums: contender.checksums(),
                size_bytes: job.size,
                depth: job.depth,
                throughput: ratio(|t| t.sample.iops),
                cpu: ratio(cpu_s_per_gb),
            });
        }
    }
}

/// The outcome for people.
pub fn table(outcome: &Outcome) -> String {
    let header = [
        "reads by",
        "CRC",
        "bytes",
        "depth",
        "IOPS",
        "MB/s",
        "p50 µs",
        "p99 µs",
        "CPU s/GB",
        "µs/req",
        "busy",
        "client",
        "peak MiB",
        "ours/it",
        "CPU ours/it",
        "runs, IOPS",
    ];
    let rows: Vec<Vec<String>> = outcome
        .rows
        .iter()
        .map(|r| {
            let same = |x: &&Ratio| {
                (x.engine, x.checksums, x.size_bytes, x.depth)
                    == (r.engine, r.checksums, r.size_bytes, r.depth)
            };
            let ratio = outcome.ratios.iter().find(same);
            let of = |f: fn(&Ratio) -> f64| ratio.map_or("-".to_owned(), |x| number(f(x)));
            let runs: Vec<String> = r.iops_runs.iter().map(|v| number(*v)).collect();
            vec![
                r.engine.to_owned(),
                if r.checksums { "yes" } else { "no" }.to_owned(),
                r.size_bytes.to_string(),
                r.depth.to_string(),
                format!("{:.0}", r.iops),
                format!("{:.1}", r.mb_per_s),
                format!("{:.0}", r.p50_us),
                format!("{:.0}", r.p99_us),
                format!("{:.2}", r.cpu_s_per_gb),
                format!("{:.1}", r.cpu_us_per_request),
                format!("{:.2}", r.server_busy),
                format!("{:.2}", r.client_busy),
                format!("{:.0}", r.peak_mib),
                of(|x| x.throughput),
                of(|x| x.cpu),
                runs.join(" "),
            ]
        })
        .collect();
    let mut text = columns(&header, &rows);
    for note in &outcome.notes {
        text += &format!("\nnote: {note}");
    }
    text
}
