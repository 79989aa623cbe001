//! Records a history of concurrent clients of a running cluster, to be checked by `ebb-history`.
//!
//! Few names in a few trees, so that clients meet. Three kinds of clients, all beginning an operation before they know
//! of any other's:
//!
//! - [`library`]: the native library, each with a session of its own: loans and delegations of names, its retries.
//! - [`hasty`]: the protocol itself, asking the next voter after a moment, under the same sequence: duplicates of
//!   operations at several voters, and some given up without an answer.
//! - [`reader`]: reads at one voter, whoever leads, a new one every few milliseconds, however many are unanswered. Who
//!   leads no more and does not know it has those to answer that were asked while another one led.
//!
//! What a client can't know the outcome of is recorded as such; retries are part of their operation.

mod dice;
mod hasty;
mod library;
mod reader;
mod record;

use crate::BenchError;
use dice::Dice;
use ebb_client::{Cluster, Config, FileSystem, InodeId, Owner};
use ebb_dataplane_protocol::auth::ClusterKey;
use ebb_history::history::{Answer, Line, Operation};
use record::Recorder;
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the library's clients try.
const PATIENCE: Duration = Duration::from_secs(30);

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How long clients work.
    pub seconds: u64,
    /// Clients of the native library.
    pub clients: u32,
    /// Clients that ask the next voter after a moment.
    pub hasty: u32,
    /// Readers at each voter.
    pub readers: u32,
    /// Voters that follow answer, too (R60): clients of the library have no leases and ask them, and so do half of the
    /// reads of readers.
    pub followers: bool,
    /// Independent trees.
    pub trees: u32,
    /// Names in a directory.
    pub names: u16,
    /// What the clients' choices come from.
    pub seed: u64,
    /// host:port of the metadata servers that hasty clients and readers ask.
    pub voters: Vec<String>,
    /// host:port of the metadata servers that the library is told.
    pub addresses: Vec<String>,
    /// The cluster's key.
    pub key: ClusterKey,
}

/// What was recorded, besides the history itself.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Counts {
    /// Operations with an answer, by kind of client.
    pub answered: BTreeMap<String, u64>,
    /// Answered reads of readers, by voter.
    pub read_at: BTreeMap<String, u64>,
    /// Reads that a voter which follows answered: to readers, and to clients of the library.
    pub read_behind: u64,
    /// The same.
    pub followed: u64,
    /// Reads that a voter refused, since it does not lead.
    pub refused: u64,
    /// Of both, those that were asked half a second before, or more.
    pub answered_late: u64,
    /// The same.
    pub refused_late: u64,
    /// Requests of hasty clients that were asked again, elsewhere or there.
    pub asked_again: u64,
    /// Creates that a client answered itself, in a directory whose names it had.
    pub answered_alone: u64,
    /// Looks that a client answered from what it remembered, under leases.
    pub answered_from_memory: u64,
    /// What clients had to forget.
    pub recalled: u64,
    /// Why operations have no answer.
    pub unclear: BTreeMap<String, u64>,
    /// The longest that a client waited for an answer, ms.
    pub longest_ms: u64,
}

fn worker(e: impl std::fmt::Display) -> BenchError {
    BenchError::Worker(e.to_string())
}

async fn connect(
    plan: &Plan,
    label: &str,
    lease_metadata: bool,
) -> Result<(Cluster, FileSystem), BenchError> {
    let follower_reads = plan.followers;
    let config = Config { patience: PATIENCE, lease_metadata, follower_reads, ..Config::default() };
    let cluster = Cluster::connect(plan.addresses.clone(), plan.key.clone(), label, config).await?;
    let fs = FileSystem::new(&cluster);
    Ok((cluster, fs))
}

/// Records a history. `begun` is told when the clients are about to begin.
pub async fn run(plan: &Plan, begun: impl FnOnce()) -> Result<(Vec<Line>, Counts), BenchError> {
    if plan.trees == 0 || plan.names == 0 || plan.voters.is_empty() {
        return Err(BenchError::Plan("a history takes a tree, a name and a voter".into()));
    }
    let (cluster, fs) = connect(plan, "ebb bench history", false).await?;
    let top = format!("ebb-history-{:x}", cluster.session().0);
    let owner = Owner::default();
    let top = fs.mkdir(InodeId::ROOT, top.as_bytes(), 0o755, owner).await?.inode;
    let mut trees = Vec::new();
    for tree in 0..plan.trees {
        let mut roots = [0; 2];
        for (i, root) in roots.iter_mut().enumerate() {
            let name = format!("tree{tree}-{i}");
            *root = fs.mkdir(top, name.as_bytes(), 0o755, owner).await?.inode.0;
        }
        trees.push(roots);
    }
    let ends = Instant::now() + Duration::from_secs(plan.seconds);
    let recorder = Arc::new(Recorder::new(trees.clone(), ends));
    let mut tasks = tokio::task::JoinSet::new();
    let dice = |kind: u64, n: u32| Dice::new(plan.seed ^ kind << 56 ^ u64::from(n) << 40);
    for n in 0..plan.clients {
        let client = library::Client::connect(plan, n, dice(1, n)).await?;
        tasks.spawn(client.work(Arc::clone(&recorder), plan.names));
    }
    for n in 0..plan.hasty {
        let client = hasty::Client::connect(plan, n, dice(2, n)).await?;
        tasks.spawn(client.work(Arc::clone(&recorder), plan.names));
    }
    for n in 0..plan.readers {
        for (at, address) in plan.voters.iter().enumerate() {
            let dice = dice(3 + at as u64, n);
            let reader = reader::Reader::new(address, n, plan, dice);
            tasks.spawn(reader.work(Arc::clone(&recorder), plan.names));
        }
    }
    begun();
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(worker)?;
    }
    // What is there in the end, as somebody sees it who did nothing before.
    let (_, fresh) = connect(plan, "ebb bench history, afterwards", false).await?;
    for (tree, roots) in trees.iter().enumerate() {
        for inode in roots {
            let client = library::Client::of(fresh.clone(), "afterwards", Dice::new(plan.seed));
            client.reads(&recorder, tree, Operation::List { inode: *inode }).await;
        }
    }
    fresh.close().await?;
    fs.close().await?;
    Ok(recorder.finish())
}

/// How an operation ended.
enum Came {
    /// With an answer.
    Answer(Answer),
    /// Nobody knows what became of it, and why not.
    Unclear(String),
}

/// What was recorded, in a few lines.
pub fn table(counts: &Counts) -> String {
    let each = |all: &BTreeMap<String, u64>| {
        let all: Vec<_> = all.iter().map(|(what, n)| format!("{n} {what}")).collect();
        if all.is_empty() { "none".to_owned() } else { all.join(", ") }
    };
    format!(
        "answers: {}; {} creates and {} looks without asking, {} inodes recalled, {} requests asked again, the longest wait {} ms\n\
         reads at one voter: {}; {} of them late; {} refused, {} of them late\n\
         without an answer: {}",
        each(&counts.answered),
        counts.answered_alone,
        counts.answered_from_memory,
        counts.recalled,
        counts.asked_again,
        counts.longest_ms,
        each(&counts.read_at),
        counts.answered_late,
        counts.refused,
        counts.refused_late,
        each(&counts.unclear),
    )
}
