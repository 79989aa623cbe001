//! `ebb bench meta`: creates, stats, listings, renames and unlinks as mdtest does them.
//!
//! Each client has a session, a connection, and a directory of its own in which it makes so many empty
//! files, looks at them, lists them, renames and removes them; a phase begins when all have ended the one
//! before. A client has one request in flight. Every create, rename and unlink is answered when it is
//! committed and applied: its log entry is on the disk of a majority of the voters. Handles are ended as
//! the client library does it, many with one request, in the creates' time.
//!
//! Rows named "library" go through the native client library, whose creates are answered before they
//! have a name (docs/PROTOCOL.md, R49 to R51): their time ends with the directory's fsync. Its stats are
//! of names that were looked up before, under leases (R52).
//!
//! Beside them, in the same run: the same phases with system calls by as many threads in a directory of
//! the local file system, once as it is (nothing durable) and the creates once more with an fsync of file
//! and directory each; and HSET and HGET of a Redis server that syncs each write, by its own benchmark
//! with as many connections: the floor for one operation on a table.

mod clients;
mod plain;

use crate::BenchError;
use crate::baseline;
use crate::report::{Bar, Limit, columns, median, number};
use clients::Clients;
use ebb_rpc::Identity;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Clients at once.
    pub clients: u32,
    /// Files of each.
    pub files: u32,
    /// Runs; figures are their medians.
    pub runs: u32,
    /// Entries of a directory that is filled and listed, once; 0: none.
    pub entries: u32,
    /// Voters that follow are measured, too, for what they may answer; our library, whose clients have leases, is not.
    pub followers: bool,
    /// A directory of the local file system, to compare with it and with Redis.
    pub plain: Option<PathBuf>,
    /// The metadata servers.
    pub addresses: Vec<String>,
    /// Who calls: a client.
    pub identity: Identity,
}

/// What a client does with each of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Makes it.
    Create,
    /// Looks its attributes up by its name.
    Stat,
    /// Lists the directory; a figure is of entries.
    Readdir,
    /// Renames it in its directory.
    Rename,
    /// Removes it.
    Unlink,
}

impl Operation {
    const ALL: [Self; 5] = [Self::Create, Self::Stat, Self::Readdir, Self::Rename, Self::Unlink];

    const fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Stat => "stat",
            Self::Readdir => "readdir",
            Self::Rename => "rename",
            Self::Unlink => "unlink",
        }
    }
}

/// Who did it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Requests to our metadata servers.
    Ours,
    /// The same, of voters that do not lead where they answer.
    Followers,
    /// Our client library, with an fsync of the directory at the end.
    Library,
    /// System calls on the local file system.
    Local,
    /// The same, with an fsync of the file and of the directory each.
    LocalSynced,
    /// HSET and HGET of Redis, each write synced.
    Redis,
}

impl Side {
    const fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Followers => "ours, followers",
            Self::Library => "ours, library",
            Self::Local => "local",
            Self::LocalSynced => "local, synced",
            Self::Redis => "redis, synced",
        }
    }
}

/// One phase of one side, of one run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    pub(crate) per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

impl Sample {
    /// Of `count` operations that took `elapsed` in all, each in microseconds.
    pub(crate) fn new(count: u64, elapsed: Duration, micros: &Histogram<u64>) -> Self {
        Self {
            per_s: count as f64 / elapsed.as_secs_f64().max(1e-9),
            p50_us: micros.value_at_quantile(0.5) as f64,
            p99_us: micros.value_at_quantile(0.99) as f64,
        }
    }
}

/// Latencies of one worker or several, µs.
pub(crate) fn micros() -> Histogram<u64> {
    let mut h = Histogram::new(3).unwrap_or_else(|_| unreachable!("3 digits are allowed"));
    h.auto(true);
    h
}

/// One row: medians over the runs.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was done.
    pub operation: Operation,
    /// By whom.
    pub side: Side,
    /// By how many at once.
    pub clients: u32,
    /// Operations (of a listing: entries) per second.
    pub per_s: f64,
    /// Median latency, µs; 0 where it was not measured, as below. Of a listing: of a page.
    pub p50_us: f64,
    /// 99th percentile, µs.
    pub p99_us: f64,
    /// What `per_s` should be.
    pub bar: Option<Bar>,
    /// What `p50_us` should be.
    pub p50_bar: Option<Bar>,
    /// `per_s` of each run.
    pub per_s_runs: Vec<f64>,
}

/// A large directory.
#[derive(Clone, Debug, Serialize)]
pub struct Large {
    /// Its entries.
    pub entries: u64,
    /// Creates per second of its first tenth.
    pub first_per_s: f64,
    /// The same of its last tenth.
    pub last_per_s: f64,
    /// Seconds that one client takes to list it all.
    pub list_s: f64,
    /// What that should be.
    pub bar: Option<Bar>,
}

/// What came out.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// Runs.
    pub runs: u32,
    /// Voters of the metadata plane.
    pub voters: u32,
    /// All rows.
    pub rows: Vec<Row>,
    /// The large directory.
    pub large: Option<Large>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// Files that one client alone makes, for its latency.
const ALONE_FILES: u32 = 2000;
/// Clients that go through the library at most: each has threads of its own work.
const LIBRARY_CLIENTS_MAX: u32 = 8;

type Measured = ((Operation, Side, u32), Sample);

/// Runs the plan; `say` gets a line per step. What it makes is removed afterwards.
pub async fn run(plan: &Plan, say: impl Fn(&str)) -> Result<Outcome, BenchError> {
    if plan.clients == 0 || plan.files == 0 || plan.runs == 0 {
        return Err(BenchError::Plan("clients, files and runs must be above zero".into()));
    }
    let many = Clients::open(plan, plan.clients).await?;
    let result = measure(plan, &many, &say).await;
    let removed = many.close().await;
    let outcome = result?;
    removed?;
    Ok(outcome)
}

async fn measure(plan: &Plan, many: &Clients, say: &impl Fn(&str)) -> Result<Outcome, BenchError> {
    let voters = many.voters().await?;
    let mut outcome = Outcome { runs: plan.runs, voters, ..Outcome::default() };
    let redis = match &plan.plain {
        Some(_) => baseline::has_redis(&mut outcome.notes).await,
        None => false,
    };
    let mut all: Vec<Measured> = Vec::new();
    for run in 1..=plan.runs {
        for operation in Operation::ALL {
            say(&format!("run {run}: {} by {} clients", operation.name(), plan.clients));
            let sample = many.phase(operation, plan.files, plan.clients).await?;
            all.push(((operation, Side::Ours, plan.clients), sample));
            if plan.followers && matches!(operation, Operation::Stat | Operation::Readdir) {
                many.ask_followers(true);
                let sample = many.phase(operation, plan.files, plan.clients).await;
                many.ask_followers(false);
                all.push(((operation, Side::Followers, plan.clients), sample?));
            }
        }
        let alone = plan.files.min(ALONE_FILES);
        for operation in Operation::ALL {
            say(&format!("run {run}: {} by one client", operation.name()));
            let sample = many.phase(operation, alone, 1).await?;
            all.push(((operation, Side::Ours, 1), sample));
        }
        if !plan.followers {
            let clients = plan.clients.min(LIBRARY_CLIENTS_MAX);
            say(&format!(
                "run {run}: create, look again and unlink by {clients} clients through the library"
            ));
            for (operation, sample) in clients::library(plan, clients).await? {
                all.push(((operation, Side::Library, clients), sample));
            }
        }
        let Some(dir) = &plan.plain else { continue };
        say(&format!("run {run}: the same in {}", dir.display()));
        for clients in [plan.clients, 1] {
            let files = if clients == 1 { alone } else { plan.files };
            let work = plain::Work { under: dir.clone(), clients, files };
            let done = tokio::task::spawn_blocking(move || plain::run(&work));
            let done = done.await.map_err(|e| BenchError::Worker(e.to_string()))??;
            all.extend(done.into_iter().map(|(o, side, s)| ((o, side, clients), s)));
        }
        if redis {
            say(&format!("run {run}: redis with appendfsync always"));
            for clients in [plan.clients, 1] {
                let (set, get) = baseline::redis_hash(dir, clients).await?;
                for (operation, s) in [(Operation::Create, set), (Operation::Stat, get)] {
                    let sample = Sample { per_s: s.iops, p50_us: s.p50_us, p99_us: s.p99_us };
                    all.push(((operation, Side::Redis, clients), sample));
                }
            }
        }
    }
    if plan.followers {
        outcome.notes.push(format!("{} answers of voters that do not lead", many.followed()));
    }
    outcome.rows = rows(&all, plan, voters);
    if plan.entries > 0 {
        outcome.large = Some(many.large(plan.entries, say).await?);
    }
    Ok(outcome)
}

/// What is promised of many clients, at the sizes for which it is.
fn limit(operation: Operation, side: Side, clients: u32, voters: u32) -> Option<Limit> {
    let many = clients >= 16;
    match (operation, side, voters) {
        (Operation::Create, Side::Ours, 1) if many => Some(Limit::at_least(20_000.0)),
        (Operation::Create, Side::Ours, 3) if many => Some(Limit::at_least(8_000.0)),
        (Operation::Stat, Side::Ours, 1) if many => Some(Limit::at_least(100_000.0)),
        _ => None,
    }
}

fn rows(all: &[Measured], plan: &Plan, voters: u32) -> Vec<Row> {
    let mut keys: Vec<_> = all.iter().map(|(key, _)| *key).collect();
    keys.sort_by_key(|(operation, side, clients)| {
        (*operation, std::cmp::Reverse(*clients > 1), *side)
    });
    keys.dedup();
    let row = |(operation, side, clients)| {
        let of: Vec<Sample> =
            all.iter().filter(|(k, _)| *k == (operation, side, clients)).map(|(_, s)| *s).collect();
        let figure = |f: fn(&Sample) -> f64| median(&of.iter().map(f).collect::<Vec<_>>());
        let (per_s, p50_us) = (figure(|s| s.per_s), figure(|s| s.p50_us));
        let alone = (operation, side, clients, voters) == (Operation::Create, Side::Ours, 1, 1);
        Row {
            operation,
            side,
            clients,
            per_s,
            p50_us,
            p99_us: figure(|s| s.p99_us),
            bar: limit(operation, side, clients, voters).map(|l| l.judge(per_s)),
            p50_bar: (alone && plan.clients > 1).then(|| Limit::at_most(400.0).judge(p50_us)),
            per_s_runs: of.iter().map(|s| s.per_s).collect(),
        }
    };
    keys.into_iter().map(row).collect()
}

/// As a table.
pub fn table(outcome: &Outcome) -> String {
    let mut lines = Vec::new();
    for row in &outcome.rows {
        let same = |r: &&Row| r.operation == row.operation && r.clients == row.clients;
        let ours = outcome.rows.iter().filter(same).find(|r| r.side == Side::Ours);
        let ratio = ours.filter(|o| row.side != Side::Ours && o.per_s > 0.0);
        let micros = |v: f64| if v == 0.0 { String::new() } else { number(v) };
        let bars = [&row.bar, &row.p50_bar].into_iter().flatten().map(ToString::to_string);
        lines.push(vec![
            row.operation.name().to_owned(),
            row.side.name().to_owned(),
            row.clients.to_string(),
            number(row.per_s),
            micros(row.p50_us),
            micros(row.p99_us),
            ratio.map_or_else(String::new, |o| format!("{:.2}", o.per_s / row.per_s)),
            bars.collect::<Vec<_>>().join(", "),
        ]);
    }
    let header = ["operation", "by", "clients", "/s", "p50 µs", "p99 µs", "ours/this", ""];
    let voters = match outcome.voters {
        1 => "one voter".to_owned(),
        n => format!("{n} voters"),
    };
    let mut text =
        format!("{voters}, medians of {} runs\n{}", outcome.runs, columns(&header, &lines));
    if let Some(large) = &outcome.large {
        text += &format!(
            "\n\na directory of {} entries: creates/s of the first tenth {}, of the last {}; listed in {} s{}",
            large.entries,
            number(large.first_per_s),
            number(large.last_per_s),
            number(large.list_s),
            large.bar.as_ref().map_or_else(String::new, |b| format!(" ({b})"))
        );
    }
    for note in &outcome.notes {
        text += &format!("\n{note}");
    }
    text
}

/// Microseconds since.
pub(crate) fn us(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_medians_in_order_and_bars_hold_for_what_they_are_of() {
        let plan = Plan {
            clients: 64,
            files: 1,
            runs: 3,
            entries: 0,
            plain: None,
            followers: false,
            addresses: Vec::new(),
            identity: Identity::new(
                ebb_dataplane_protocol::auth::ClusterKey::from_hex(&"00".repeat(32)).unwrap(),
                ebb_dataplane_protocol::auth::Role::Client,
            ),
        };
        let sample = |per_s| Sample { per_s, p50_us: 390.0, p99_us: 1.0 };
        let all = [
            ((Operation::Stat, Side::Ours, 64), sample(1.0)),
            ((Operation::Create, Side::Ours, 1), sample(2.0)),
            ((Operation::Create, Side::Ours, 64), sample(19_000.0)),
            ((Operation::Create, Side::Ours, 64), sample(21_000.0)),
            ((Operation::Create, Side::Ours, 64), sample(90_000.0)),
            ((Operation::Create, Side::Local, 64), sample(42_000.0)),
        ];
        let rows = rows(&all, &plan, 1);
        let keys: Vec<_> = rows.iter().map(|r| (r.operation, r.side, r.clients)).collect();
        assert_eq!(
            keys,
            [
                (Operation::Create, Side::Ours, 64),
                (Operation::Create, Side::Local, 64),
                (Operation::Create, Side::Ours, 1),
                (Operation::Stat, Side::Ours, 64),
            ]
        );
        assert_eq!(rows[0].per_s, 21_000.0);
        assert!(rows[0].bar.as_ref().is_some_and(|b| b.met) && rows[1].bar.is_none());
        assert!(rows[2].p50_bar.as_ref().is_some_and(|b| b.met) && rows[2].bar.is_none());
        assert!(rows[3].bar.as_ref().is_some_and(|b| !b.met));
        let text = table(&Outcome { runs: 3, voters: 1, rows, ..Outcome::default() });
        assert!(text.contains("0.50"), "{text}");
    }
}
