//! What came of the turns of `ebb bench chunk`: rows, ratios, bars.
//!
//! A ratio is the median of the ratios of the runs, each of figures that were measured in the same run.

use super::{Job, Operation, Turn};
use crate::baseline::Sample;
use crate::report::{Bar, Limit, columns, median, number};
use serde::Serialize;
use std::collections::HashSet;

/// One row: medians over the runs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Row {
    /// "ours", "fio" or "iperf3"
    pub tool: &'static str,
    /// "read", "write", "write+fsync", or "stream" of `iperf3`
    pub operation: &'static str,
    /// Of `fio`'s writes: "none", "each" (O_DSYNC) or "batch" (fdatasync).
    pub sync: Option<&'static str>,
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
    /// Writes that shared a sync: of ours, a batch of the journal; of `fio`, as many as it made.
    pub writes_per_sync: f64,
    /// More of the journal, for ours.
    pub journal: Option<Grouped>,
    /// MB/s of each run.
    pub mb_per_s_runs: Vec<f64>,
}

/// The journal of the cores asked, medians over the runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Grouped {
    /// Requests made durable by one batch.
    pub requests_per_batch: f64,
    /// Mutations in one batch, whatever they were.
    pub mutations_per_batch: f64,
    /// Batches in a run.
    pub batches: f64,
}

/// With what a row is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Against {
    /// The same reads by `fio`.
    Fio,
    /// Those, or a stream of `iperf3`, whichever is less.
    SmallerOfFioAndIperf3,
    /// The same writes by `fio`, one fdatasync per group of ours.
    FioBatched,
    /// One write and one fdatasync at a time by `fio`, times the group of ours.
    FioSingleTimesGroup,
    /// A stream of `iperf3`.
    Iperf3,
    /// GETs of that size of a Redis server.
    Redis,
    /// The 99th percentile of those: less is better.
    RedisP99,
}

/// A row against the machine.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// "read", "write" or "write+fsync"
    pub operation: &'static str,
    /// Bytes of a request.
    pub size_bytes: u64,
    /// Requests in flight.
    pub depth: u32,
    /// With what it is compared.
    pub against: Against,
    /// Median of ours.
    pub ours: f64,
    /// Median of the other side; scaled, where it is.
    pub theirs: f64,
    /// Of the two: "MB/s" or "requests/s".
    pub unit: &'static str,
    /// Writes per batch of our journal, median.
    pub group: Option<f64>,
    /// Median over the runs of ours / theirs.
    pub ratio: f64,
    /// Of each run.
    pub ratio_runs: Vec<f64>,
    /// What it should be, where something is promised.
    pub bar: Option<Bar>,
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

/// `fio` beside one turn of ours.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FioTurns {
    /// The same requests, not synced.
    pub(crate) plain: Sample,
    /// Each write durable by itself.
    pub(crate) each: Option<Sample>,
    /// One fdatasync per group of ours.
    pub(crate) batched: Option<Sample>,
    /// One write and one fdatasync at a time.
    pub(crate) single: Option<Sample>,
    /// GETs of a Redis server instead.
    pub(crate) redis: Option<Sample>,
}

/// All runs of one job.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) job: Job,
    pub(crate) server_cores: u32,
    pub(crate) ours: Vec<Turn>,
    /// As many, or none.
    pub(crate) fio: Vec<FioTurns>,
}

/// A core is judged by what it does with this many requests in flight, or more: with fewer it waits for the
/// network and the client, and nothing is grouped.
pub(super) const JUDGED_DEPTH: u32 = 16;

/// 8 connections to Redis, each with 4 requests in flight.
const REDIS_DEPTH: u32 = 32;

/// Requests of this size are promised something, and those of a block.
pub(crate) const LARGE_BYTES: u64 = 1 << 20;
const BLOCK_BYTES: u64 = 4096;

/// What is promised of one core against the machine.
fn limit(job: Job, against: Against) -> Option<Limit> {
    if job.depth < JUDGED_DEPTH {
        return None;
    }
    match (job.operation, job.size, against) {
        (Operation::Read, LARGE_BYTES, Against::SmallerOfFioAndIperf3) => {
            Some(Limit::at_least(0.85))
        }
        (Operation::Read, BLOCK_BYTES, Against::Fio) => Some(Limit::at_least(0.6)),
        (Operation::ReadDram, LARGE_BYTES, Against::Iperf3) => Some(Limit::at_least(0.85)),
        (Operation::ReadDram, BLOCK_BYTES, Against::Redis) if job.depth == REDIS_DEPTH => {
            Some(Limit::at_least(1.0))
        }
        (Operation::ReadDram, BLOCK_BYTES, Against::RedisP99) if job.depth == REDIS_DEPTH => {
            Some(Limit::at_most(1.0))
        }
        (Operation::Write, BLOCK_BYTES, Against::FioSingleTimesGroup) => Some(Limit::at_least(0.5)),
        _ => None,
    }
}

impl Measured {
    pub(crate) fn new(job: Job) -> Self {
        Self { job, server_cores: 0, ours: Vec::new(), fio: Vec::new() }
    }

    fn our_row(&self) -> Row {
        let of = |f: fn(&Turn) -> f64| median(&self.ours.iter().map(f).collect::<Vec<_>>());
        let group = |t: &Turn| t.group.unwrap_or_default();
        let journal = self.ours.iter().any(|t| t.group.is_some()).then(|| {
            let of =
                |f: &dyn Fn(&Turn) -> f64| median(&self.ours.iter().map(f).collect::<Vec<_>>());
            Grouped {
                requests_per_batch: of(&|t| group(t).requests_per_batch()),
                mutations_per_batch: of(&|t| group(t).mutations_per_batch()),
                batches: of(&|t| group(t).batches as f64),
            }
        });
        let samples: Vec<Sample> = self.ours.iter().map(|t| t.sample).collect();
        Row {
            server_cores: self.server_cores,
            cpu_s_per_gb: of(|t| t.cpu_s_per_gb),
            journal,
            ..row("ours", self.job.operation.name(), self.job.size, self.job.depth, &samples)
        }
    }

    /// `fio`'s rows beside ours that `told` has not seen yet.
    fn fio_rows(&self, told: &mut HashSet<(&'static str, u64, u32)>) -> Vec<Row> {
        let Job { operation, size, depth } = self.job;
        let mut rows = Vec::new();
        let mut add =
            |sync: Option<&'static str>, depth: u32, of: &dyn Fn(&FioTurns) -> Option<Sample>| {
                let samples: Vec<Sample> = self.fio.iter().filter_map(of).collect();
                let name = if operation.reads() { "read" } else { "write" };
                if !samples.is_empty() {
                    rows.push(Row { sync, ..row("fio", name, size, depth, &samples) });
                }
            };
        if operation == Operation::Read {
            add(None, depth, &|f| Some(f.plain));
            return rows;
        }
        if operation == Operation::ReadDram {
            let samples: Vec<Sample> = self.fio.iter().filter_map(|f| f.redis).collect();
            if !samples.is_empty() {
                rows.push(row("redis", "GET", size, depth, &samples));
            }
            return rows;
        }
        if told.insert(("none", size, depth)) {
            add(Some("none"), depth, &|f| Some(f.plain));
            add(Some("each"), depth, &|f| f.each);
        }
        // With one in flight both are the same.
        if depth > 1 {
            add(Some("batch"), depth, &|f| f.batched);
        }
        if told.insert(("single", size, 1)) {
            add(Some("batch"), 1, &|f| f.single);
        }
        rows
    }

    fn verdicts(&self, iperf3: &[Sample]) -> Vec<Verdict> {
        let runs = || self.ours.iter().zip(&self.fio);
        let mut all = Vec::new();
        let mut add = |against, unit, pairs: Vec<(f64, f64)>| {
            all.extend(verdict(self, against, unit, &pairs));
        };
        match self.job.operation {
            Operation::Read => {
                // What has to cross the network in such amounts is held to what the network takes.
                if self.job.size >= LARGE_BYTES && !iperf3.is_empty() {
                    let least = |f: &FioTurns, net: &Sample| f.plain.mb_per_s.min(net.mb_per_s);
                    let pairs = runs().zip(iperf3);
                    let pairs = pairs.map(|((o, f), net)| (o.sample.mb_per_s, least(f, net)));
                    add(Against::SmallerOfFioAndIperf3, "MB/s", pairs.collect());
                } else {
                    let pairs = runs().map(|(o, f)| (o.sample.iops, f.plain.iops));
                    add(Against::Fio, "requests/s", pairs.collect());
                }
            }
            Operation::ReadDram if self.job.size >= LARGE_BYTES => {
                let pairs = self.ours.iter().zip(iperf3);
                let pairs = pairs.map(|(o, net)| (o.sample.mb_per_s, net.mb_per_s));
                add(Against::Iperf3, "MB/s", pairs.collect());
            }
            Operation::ReadDram => {
                let of = |what: fn(&Sample) -> f64| {
                    runs().filter_map(|(o, f)| Some((what(&o.sample), what(&f.redis?)))).collect()
                };
                add(Against::Redis, "requests/s", of(|s| s.iops));
                add(Against::RedisP99, "µs", of(|s| s.p99_us));
            }
            Operation::Write | Operation::WriteFsync => {
                let pairs =
                    runs().filter_map(|(o, f)| Some((o.sample.mb_per_s, f.batched?.mb_per_s)));
                add(Against::FioBatched, "MB/s", pairs.collect());
                if self.job.depth == 1 {
                    return all;
                }
                let pairs = runs().filter_map(|(o, f)| {
                    Some((o.sample.iops, scaled(f.single?.iops, o.group?.requests_per_batch())))
                });
                add(Against::FioSingleTimesGroup, "requests/s", pairs.collect());
            }
        }
        all
    }
}

/// What a journal that synced as often as `fio` would have done, with so many writes in each batch.
fn scaled(syncs_per_s: f64, group: f64) -> f64 {
    syncs_per_s * group
}

fn verdict(
    measured: &Measured,
    against: Against,
    unit: &'static str,
    pairs: &[(f64, f64)],
) -> Option<Verdict> {
    let job = measured.job;
    let ratio_runs: Vec<f64> = pairs
        .iter()
        .filter(|(_, theirs)| *theirs > 0.0)
        .map(|(ours, theirs)| ours / theirs)
        .collect();
    if ratio_runs.is_empty() {
        return None;
    }
    let ratio = median(&ratio_runs);
    let groups: Vec<f64> =
        measured.ours.iter().filter_map(|t| Some(t.group?.requests_per_batch())).collect();
    Some(Verdict {
        operation: job.operation.name(),
        size_bytes: job.size,
        depth: job.depth,
        against,
        ours: median(&pairs.iter().map(|p| p.0).collect::<Vec<_>>()),
        theirs: median(&pairs.iter().map(|p| p.1).collect::<Vec<_>>()),
        unit,
        group: (!groups.is_empty()).then(|| median(&groups)),
        ratio,
        ratio_runs,
        bar: limit(job, against).map(|l| l.judge(ratio)),
    })
}

impl Outcome {
    /// Takes in all that was measured.
    pub(crate) fn add(&mut self, measured: &[Measured], iperf3: &[Sample]) {
        let mut told = HashSet::new();
        for m in measured {
            self.rows.push(m.our_row());
            self.rows.extend(m.fio_rows(&mut told));
            self.verdicts.extend(m.verdicts(iperf3));
        }
        if !iperf3.is_empty() {
            self.rows.push(row("iperf3", "stream", 0, 1, iperf3));
        }
    }
}

fn row(
    tool: &'static str,
    operation: &'static str,
    size_bytes: u64,
    depth: u32,
    samples: &[Sample],
) -> Row {
    let of = |f: fn(&Sample) -> f64| median(&samples.iter().map(f).collect::<Vec<_>>());
    Row {
        tool,
        operation,
        size_bytes,
        depth,
        iops: of(|s| s.iops),
        mb_per_s: of(|s| s.mb_per_s),
        p50_us: of(|s| s.p50_us),
        p99_us: of(|s| s.p99_us),
        p999_us: of(|s| s.p999_us),
        writes_per_sync: of(|s| s.writes_per_sync),
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
        "writes/sync",
        "runs, MB/s",
    ];
    let or_dash = |v: f64, text: String| if v == 0.0 { "-".to_owned() } else { text };
    let rows: Vec<Vec<String>> = outcome
        .rows
        .iter()
        .map(|r| {
            let whole = |v: f64| or_dash(v, format!("{v:.0}"));
            let runs: Vec<String> = r.mb_per_s_runs.iter().map(|v| number(*v)).collect();
            let sync = match r.sync {
                Some("none") => ", no sync",
                Some("each") => ", O_DSYNC",
                Some(_) => ", fdatasync",
                None => "",
            };
            vec![
                format!("{} {}{sync}", r.tool, r.operation),
                or_dash(r.size_bytes as f64, r.size_bytes.to_string()),
                r.depth.to_string(),
                or_dash(f64::from(r.server_cores), r.server_cores.to_string()),
                whole(r.iops),
                format!("{:.1}", r.mb_per_s),
                whole(r.p50_us),
                whole(r.p99_us),
                whole(r.p999_us),
                or_dash(r.cpu_s_per_gb, format!("{:.2}", r.cpu_s_per_gb)),
                or_dash(r.writes_per_sync, format!("{:.2}", r.writes_per_sync)),
                runs.join(" "),
            ]
        })
        .collect();
    let mut text = columns(&header, &rows);
    for v in &outcome.verdicts {
        text += &format!("\n{v}");
    }
    for note in &outcome.notes {
        text += &format!("\nnote: {note}");
    }
    text
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let group = self.group.unwrap_or(0.0);
        let against = match self.against {
            Against::Fio => "fio".to_owned(),
            Against::SmallerOfFioAndIperf3 => "the smaller of fio and iperf3".to_owned(),
            Against::Iperf3 => "iperf3".to_owned(),
            Against::Redis => "Redis".to_owned(),
            Against::RedisP99 => "Redis' 99th percentile".to_owned(),
            Against::FioBatched => "fio with one fdatasync per group".to_owned(),
            Against::FioSingleTimesGroup => format!(
                "fio's {:.0} single fdatasyncs/s times the group",
                if group > 0.0 { self.theirs / group } else { 0.0 }
            ),
        };
        write!(
            f,
            "{} of {} bytes, depth {}: {:.2} of {against} ({} of {} {}",
            self.operation,
            self.size_bytes,
            self.depth,
            self.ratio,
            number(self.ours),
            number(self.theirs),
            self.unit
        )?;
        if self.group.is_some() {
            write!(f, "; group: {group:.2} writes per journal batch")?;
        }
        match &self.bar {
            Some(bar) => write!(f, "; {bar})"),
            None => write!(f, ")"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::Group;

    fn sample(iops: f64) -> Sample {
        Sample { iops, mb_per_s: iops * 4096.0 / 1e6, ..Sample::default() }
    }

    fn ours(iops: f64, batches: u64, requests: u64) -> Turn {
        let group = Some(Group { batches, mutations: requests + 1, requests });
        Turn { sample: sample(iops), group, ..Turn::default() }
    }

    fn measured(operation: Operation, size: u64, ours: Vec<Turn>, fio: Vec<FioTurns>) -> Measured {
        let job = Job { operation, size, depth: 16 };
        Measured { ours, fio, server_cores: 1, ..Measured::new(job) }
    }

    #[test]
    fn small_writes_are_judged_by_batches_against_fdatasyncs() {
        let fio = |single| FioTurns {
            plain: sample(60_000.0),
            each: Some(sample(30_000.0)),
            batched: Some(sample(40_000.0)),
            single: Some(sample(single)),
            redis: None,
        };
        // Each run by its own group and its own fio: 4,000, 1,500 and 3,000 batches/s of 5,000, 5,000 and 10,000.
        let turns =
            vec![ours(20_000.0, 100, 500), ours(9_000.0, 100, 600), ours(12_000.0, 100, 400)];
        let m = measured(
            Operation::Write,
            4096,
            turns,
            vec![fio(5_000.0), fio(5_000.0), fio(10_000.0)],
        );
        let mut outcome = Outcome::default();
        outcome.add(&[m], &[]);
        let [batched, scaled] = &outcome.verdicts[..] else { panic!("{:?}", outcome.verdicts) };
        assert_eq!(batched.against, Against::FioBatched);
        assert_eq!((batched.ratio, &batched.bar), (0.3, &None));
        assert_eq!(scaled.against, Against::FioSingleTimesGroup);
        assert_eq!(scaled.ratio_runs, [0.8, 0.3, 0.3]);
        assert_eq!((scaled.ratio, scaled.group), (0.3, Some(5.0)));
        assert!(scaled.bar.as_ref().is_some_and(|b| !b.met && b.limit == 0.5));
        let text = table(&outcome);
        assert!(
            text.contains("group: 5.00 writes per journal batch; bar ≥ 0.50: MISSED"),
            "{text}"
        );
        let json = serde_json::to_value(&outcome).expect("plain data");
        assert_eq!(json["rows"][0]["journal"]["requests_per_batch"], 5.0);
        assert_eq!(json["verdicts"][1]["against"], "fio_single_times_group");
    }

    #[test]
    fn a_read_is_judged_by_the_smaller_side_of_the_same_run() {
        let fio = |iops| FioTurns { plain: sample(iops), ..FioTurns::default() };
        let turn = |iops| Turn { sample: sample(iops), ..Turn::default() };
        let m = measured(
            Operation::Read,
            1 << 20,
            vec![turn(90.0), turn(90.0)],
            vec![fio(100.0), fio(300.0)],
        );
        let mut outcome = Outcome::default();
        outcome.add(&[m], &[sample(200.0), sample(150.0)]);
        let [smaller] = &outcome.verdicts[..] else { panic!("{:?}", outcome.verdicts) };
        assert_eq!(smaller.against, Against::SmallerOfFioAndIperf3);
        assert!(smaller.bar.as_ref().is_some_and(|b| !b.met && b.limit == 0.85));
        assert!((smaller.ratio - 0.75).abs() < 1e-9, "0.9 and 0.6: {smaller:?}");
        assert_eq!(smaller.group, None);
    }

    #[test]
    fn reads_from_memory_are_held_to_redis_or_the_network() {
        let turn =
            |iops, p99_us| Turn { sample: Sample { p99_us, ..sample(iops) }, ..Turn::default() };
        let redis = Some(Sample { p99_us: 200.0, ..sample(100.0) });
        let fio = vec![FioTurns { redis, ..FioTurns::default() }];
        let job = Job { operation: Operation::ReadDram, size: 4096, depth: REDIS_DEPTH };
        let small = Measured { ours: vec![turn(120.0, 300.0)], fio, ..Measured::new(job) };
        let job = Job { size: LARGE_BYTES, ..job };
        let large = Measured { ours: vec![turn(90.0, 1.0)], ..Measured::new(job) };
        let mut outcome = Outcome::default();
        outcome.add(&[small, large], &[sample(100.0)]);
        let told: Vec<_> = outcome
            .verdicts
            .iter()
            .map(|v| (v.against, v.ratio, v.bar.as_ref().is_some_and(|b| b.met)))
            .collect();
        assert_eq!(
            told,
            [
                (Against::Redis, 1.2, true),
                (Against::RedisP99, 1.5, false),
                (Against::Iperf3, 0.9, true)
            ]
        );
    }

    #[test]
    fn what_fio_did_once_has_one_row_and_without_fio_there_is_no_ratio() {
        let fio = FioTurns {
            each: Some(sample(2.0)),
            batched: Some(sample(3.0)),
            single: Some(sample(4.0)),
            plain: sample(1.0),
            redis: None,
        };
        let both = [Operation::Write, Operation::WriteFsync]
            .map(|op| measured(op, 4096, vec![ours(10.0, 1, 1)], vec![fio]));
        let mut outcome = Outcome::default();
        outcome.add(&both, &[]);
        let syncs: Vec<_> = outcome.rows.iter().map(|r| (r.tool, r.sync, r.depth)).collect();
        let batch = ("fio", Some("batch"), 16);
        let single = ("fio", Some("batch"), 1);
        let plain = [("fio", Some("none"), 16), ("fio", Some("each"), 16)];
        let mine = ("ours", None, 16);
        assert_eq!(syncs, [mine, plain[0], plain[1], batch, single, mine, batch]);
        let alone = measured(Operation::Write, 4096, vec![ours(10.0, 1, 1)], Vec::new());
        let mut outcome = Outcome::default();
        outcome.add(&[alone], &[]);
        assert!(outcome.verdicts.is_empty() && outcome.rows.len() == 1);
    }

    #[test]
    fn one_request_at_a_time_is_compared_and_not_judged() {
        let fio = FioTurns {
            batched: Some(sample(4.0)),
            single: Some(sample(4.0)),
            ..FioTurns::default()
        };
        let mut m = measured(Operation::Write, 4096, vec![ours(1.0, 1, 1)], vec![fio]);
        m.job.depth = 1;
        let mut outcome = Outcome::default();
        outcome.add(&[m], &[]);
        let [only] = &outcome.verdicts[..] else { panic!("{:?}", outcome.verdicts) };
        assert_eq!((only.against, only.ratio, &only.bar), (Against::FioBatched, 0.25, &None));
        let syncs: Vec<_> = outcome.rows.iter().filter(|r| r.sync == Some("batch")).collect();
        assert_eq!(syncs.len(), 1, "a batch of one is a single write");
    }
}
