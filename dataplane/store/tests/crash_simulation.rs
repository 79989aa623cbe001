//! Every acked write survives every crash; what was not acked is there whole or not at all; nothing wrong is
//! ever believed; and each rule that this rests on is seen to be needed.
//!
//! `EBB_SEED=n` replays one seed, `EBB_SEEDS=n` runs that many.

mod sim;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use sim::driver::{Break, Counts, World};
use std::panic::{AssertUnwindSafe, catch_unwind};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// One seed: a few lives, each ended by a power cut, a kill or a clean restart.
fn one(seed: u64, rule: Break, lives: u32) -> Result<Counts, String> {
    let mut rng = StdRng::seed_from_u64(seed ^ 0x11fe5);
    let mut world = World::new(seed, rule)?;
    for _ in 0..lives {
        world.run(rng.random_range(50..800))?;
        world.rush(rng.random_range(0..40))?;
        match rng.random_range(0..10) {
            0..6 => world.crash(true)?,
            6..8 => {
                world.crash(false)?;
                // What the dead process left in the cache must not be believed and then lost.
                if rng.random_bool(0.7) {
                    world.rush(rng.random_range(0..3))?;
                    world.crash(true)?;
                }
            }
            _ => world.restart()?,
        }
    }
    world.restart()?;
    let mut counts = world.counts;
    counts.faults = world.disk.faults;
    Ok(counts)
}

fn guarded<T>(f: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|p| {
        let text = p.downcast_ref::<String>().cloned();
        let text = text.or_else(|| p.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Err(format!("panicked: {}", text.unwrap_or_default()))
    })
}

#[test]
fn acked_writes_survive_any_crash_and_nothing_wrong_is_read() {
    let seeds: Vec<u64> = match number("EBB_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("EBB_SEEDS").unwrap_or(80)).collect(),
    };
    let mut sum = Counts::default();
    for seed in &seeds {
        match guarded(|| one(*seed, Break::Nothing, 5)) {
            Ok(counts) => sum += counts,
            Err(e) => panic!(
                "seed {seed}: {e}\nreplay: EBB_SEED={seed} cargo test -p ebb-store --test crash_simulation"
            ),
        }
    }
    println!("{} seeds: {sum:#?}", seeds.len());
    if seeds.len() >= 80 {
        let seen = [
            sum.writes,
            sum.reads,
            sum.flushes,
            sum.aborts,
            sum.cuts,
            sum.fills,
            sum.evictions,
            sum.drops,
            sum.freezes,
            sum.checkpoints,
            sum.no_space,
            sum.duplicates,
            sum.in_flight_kept,
            sum.in_flight_lost,
            sum.faults.torn,
            sum.faults.lost,
            sum.faults.kept,
            sum.faults.kills,
        ];
        assert!(seen.iter().all(|n| *n > 0), "something never happened: {sum:?}");
    }
}

/// A rule of the caller, broken: some seed must notice.
fn is_needed(rule: Break) {
    let caught =
        (0..60u64).find_map(|seed| guarded(|| one(seed, rule, 5)).err().map(|e| (seed, e)));
    match caught {
        Some((seed, e)) => println!("{rule:?} caught by seed {seed}: {e}"),
        None => panic!("{rule:?} was never noticed: the simulator is blind to it"),
    }
}

#[test]
fn acking_before_the_journal_is_durable_is_caught() {
    is_needed(Break::AckEarly);
}
#[test]
fn journaling_before_the_data_is_synced_is_caught() {
    is_needed(Break::SkipDataSync);
}
#[test]
fn committing_before_the_data_is_written_is_caught() {
    is_needed(Break::CommitBeforeData);
}
#[test]
fn reading_after_releasing_the_guard_is_caught() {
    is_needed(Break::ReleaseEarly);
}
#[test]
fn recording_moves_before_they_are_synced_is_caught() {
    is_needed(Break::SkipRelocationSync);
}
#[test]
fn superblocks_before_the_checkpoint_is_synced_is_caught() {
    is_needed(Break::SkipCheckpointSync);
}
#[test]
fn superblocks_that_are_not_durable_are_caught() {
    is_needed(Break::SuperblocksUnordered);
}

#[test]
fn crediting_a_repeated_write_to_its_repetition_is_caught() {
    is_needed(Break::CreditRetry);
}
#[test]
fn tags_that_go_back_are_caught() {
    is_needed(Break::TagsGoBack);
}

#[test]
fn flipped_bits_and_misdirected_blocks_are_detected() {
    let seeds = number("EBB_SEEDS").unwrap_or(80) / 10;
    let mut outcomes = std::collections::BTreeMap::<&str, u64>::new();
    let mut faults = sim::disk::Faults::default();
    for seed in number("EBB_SEED").map_or(0..seeds.max(5), |s| s..s + 1) {
        let result = guarded(|| {
            let mut world = World::new(seed, Break::Nothing)?;
            for _ in 0..4 {
                world.run(400)?;
                for _ in 0..10 {
                    *outcomes.entry(world.rot()?).or_default() += 1;
                }
            }
            faults += world.disk.faults;
            Ok(())
        });
        if let Err(e) = result {
            panic!("seed {seed}: {e}");
        }
    }
    println!("{outcomes:?}, {} flips, {} misdirected", faults.flips, faults.misdirected);
    assert!(outcomes.contains_key("refused") && outcomes.contains_key("checksum"));
}
