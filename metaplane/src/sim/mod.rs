//! Whole groups of voters under trouble, seeded: real voters (Raft, log, vote, identity, state, snapshots, wire, the
//! membership's changes) on simulated disks, a simulated network and simulated time. I1 and I7 for metadata; PROTOCOL R20.
//!
//! One thread runs all voters of a group; time goes on when everybody waits. A seed replays its run exactly: the
//! dice are one generator (`dice`), and openraft's are derived from the same seed.
//!
//! What is checked: every change that was answered happened, once, in an order that agrees with what was known when it
//! began; reads see everything that anybody was known to have applied; voters that applied the same commands have
//! the same state, byte for byte; Raft never stops by itself, and no voter refuses its own directory; after all of it
//! everybody is answered soon. Not here: threads, TCP, the leader's loops over a voter; a pause holds back a node's
//! messages and disk, not its timers, and clocks that run at different speeds are timeouts of different lengths.
//!
//! One seed, told step by step: `EBB_SIM_TRACE=1 EBB_SIM_SEED=7 cargo test -p ebb-metaplane --lib sim::groups -- --nocapture`.

mod clients;
mod dice;
mod disk;
mod lives;
mod net;
pub(crate) mod runtime;
mod seen;
mod troubles;
mod world;

use clients::Client;
use disk::Lie;
use runtime::Seeded;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::Instant;
use world::{Break, World};

/// Everything is answered by then once nothing is in the way.
const CALM_MAX: Duration = Duration::from_secs(60);

/// All that happens in many seeds.
const EVENTS: [&str; 23] = [
    "acked changes",
    "crashes",
    "crashes in the middle of an operation",
    "directories lost",
    "duplicates",
    "elections out of turn",
    "leads",
    "leads handed over",
    "lost directories noticed",
    "lost messages",
    "messages",
    "orderly stops",
    "partitions",
    "pauses",
    "reads",
    "reads of a voter that follows",
    "slow disks",
    "snapshots received",
    "starts",
    "torn writes",
    "unanswered requests",
    "voters added",
    "voters removed",
];

/// What happened, and a hash of how.
#[derive(Debug, PartialEq, Eq)]
struct Run {
    tally: BTreeMap<&'static str, u64>,
    trace: u64,
}

/// Runs a seed; says what must not be, if anything.
fn run(seed: u64, broken: Option<Break>) -> Result<Run, String> {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(Seeded::scope(seed, play(seed, broken)))
}

async fn play(seed: u64, broken: Option<Break>) -> Result<Run, String> {
    let world = World::new(seed, broken);
    let mut around = vec![world.dice.spawn(Arc::clone(&world).watch())];
    let ids: Vec<u64> = world.nodes().keys().copied().collect();
    ids.iter().for_each(|id| world.start(*id));
    let dirs = Arc::new(Mutex::default());
    let clients = world.dice.between(2, 4);
    let clients: Vec<_> = (0..clients)
        .map(|id| world.dice.spawn(Client::new(&world, id).run(Arc::clone(&dirs))))
        .collect();
    // The group is founded in peace.
    tokio::time::sleep(Duration::from_millis(world.dice.between(100, 2000))).await;
    around.push(world.dice.spawn(Arc::clone(&world).troubles()));
    around.push(world.dice.spawn(Arc::clone(&world).revive()));
    around.push(world.dice.spawn(Arc::clone(&world).members()));
    let end = Instant::now() + Duration::from_millis(world.dice.between(1000, 5000));
    while Instant::now() < end && world.failure().is_none() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world.calm.store(true, Ordering::SeqCst);
    world.clear();
    world.trace(|| "calm".to_owned());
    let calm = Instant::now();
    let done = || clients.iter().all(|c| c.is_finished()) && world.agree();
    while !done() && world.failure().is_none() {
        // Who was told to crash does.
        world.clear();
        if calm.elapsed() > CALM_MAX {
            world.fail(format!("not everybody is answered and up to date: {}", world.state()));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    world.look(true);
    around.iter().for_each(|task| task.abort());
    if let Some(why) = world.failure() {
        return Err(why);
    }
    for client in clients {
        client.await.map_err(|e| e.to_string())?;
    }
    Ok(Run { tally: world.tally(), trace: world.dice.trace() })
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seeds(default: u64) -> std::ops::Range<u64> {
    match number("EBB_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("EBB_SIM_SEEDS").unwrap_or(default),
    }
}

/// Adds what happened in a run.
fn add(all: &mut BTreeMap<&'static str, u64>, run: &Run) {
    run.tally.iter().for_each(|(what, n)| *all.entry(what).or_default() += n);
}

/// Runs seeds on all processors.
fn run_all(seeds: std::ops::Range<u64>) -> (BTreeMap<&'static str, u64>, Vec<String>) {
    let next = AtomicU64::new(seeds.start);
    let found = Mutex::new((BTreeMap::new(), Vec::new()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let ran = run(seed, None);
            let mut found = found.lock().expect("whole");
            match ran {
                Ok(run) => add(&mut found.0, &run),
                Err(why) => found.1.push(format!("seed {seed}: {why}")),
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|s| (0..threads).for_each(|_| drop(s.spawn(work))));
    found.into_inner().expect("whole")
}

#[test]
fn groups_keep_what_they_acknowledged_and_agree() {
    let seeds = seeds(2000);
    let many = seeds.end - seeds.start >= 1000;
    let began = std::time::Instant::now();
    let (tally, failed) = run_all(seeds.clone());
    println!("{} seeds in {:?}: {tally:#?}", seeds.end - seeds.start, began.elapsed());
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    for what in EVENTS {
        assert!(
            !many || tally.contains_key(what),
            "a fault that never happens proves nothing: {what}"
        );
    }
}

#[test]
fn a_seed_replays_its_run_exactly() {
    for seed in 0..10 {
        assert_eq!(run(seed, None), run(seed, None), "seed {seed}");
    }
}

/// Without it, some run ends otherwise than it should.
#[test]
fn every_rule_that_is_taken_out_is_missed() {
    let rules = [
        Break::Disk(Lie::Log),
        Break::Disk(Lie::Vote),
        Break::Disk(Lie::StateAndSnapshot),
        Break::Replies,
        Break::Reads,
        Break::Behind,
        Break::Lost,
    ];
    for rule in rules {
        let caught = (0..400).find_map(|seed| Some((seed, run(seed, Some(rule)).err()?)));
        let (seed, why) = caught.unwrap_or_else(|| panic!("nobody misses {rule:?}"));
        println!("{rule:?}: seed {seed}: {}", why.chars().take(200).collect::<String>());
    }
}

/// The log begins behind both, so that one is enough to go on from.
#[test]
fn a_state_or_a_snapshot_may_be_lost_but_not_both() {
    for lie in [Lie::State, Lie::Snapshot] {
        for seed in 0..40 {
            if let Err(why) = run(seed, Some(Break::Disk(lie))) {
                panic!("seed {seed} without {lie:?}: {why}");
            }
        }
    }
}

/// Each of these failed once, on code as it was then.
const MENDED: [u64; 11] = [
    // A leader that started again led on in its old term, where it did not know what it had committed, and its reads
    // missed that.
    8, 11, 13, //
    // A voter had taken part before its first vote was stable; gone in between, it took itself for one that lost its
    // directory.
    42, 68, 143, //
    // A state was durable before its voter's own log was (a majority had the entries), or before the snapshot that it
    // came from was current; after a crash the log began behind the newest snapshot.
    904, 2309, 2361, //
    // A database was half made when the power went, and could not be opened.
    211, 274,
];

#[test]
fn seeds_that_found_a_defect_stay_mended() {
    for seed in MENDED {
        if let Err(why) = run(seed, None) {
            panic!("seed {seed}: {why}");
        }
    }
}
