//! The shard core and the real store over a simulated device and S3, seeded (I1, I4, I5, I7, I10).
//!
//! Random clients write, read, repeat themselves, crash the node; the metadata side seals, uploads,
//! commits or aborts, truncates. A core that held the groups before has some of what is missed, at times
//! rotten. Completions come in random order. A crash loses any unsynced block
//! or keeps it. After every acked write, across all of it, reads answer exactly the model.
//!
//! One seed, told step by step: `EBB_SIM_TRACE=1 EBB_SIM_SEED=7 cargo test -p ebb-dataplane --test
//! simulation -- --nocapture`.

mod sim;

use ebb_dataplane::core::SPILL_BYTES_MIN;
use sim::Sim;

fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    match number("EBB_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("EBB_SIM_SEEDS").unwrap_or(default),
    }
}

#[test]
fn acked_data_is_always_readable_and_flushed_exactly() {
    let (mut peer_reads, mut dram_hits) = (0, 0);
    let seeds = seeds(60);
    let one = seeds.end - seeds.start == 1;
    for seed in seeds {
        println!("seed {seed}");
        let mut sim = Sim::new(seed, 48 << 20);
        sim.run(400);
        sim.settle_and_check();
        println!("  {:?}", sim.tally);
        assert!(sim.tally.acked > 0, "a simulation that does nothing proves nothing");
        peer_reads += sim.tally.peer_reads;
        dram_hits += sim.tally.dram_hits;
    }
    assert!(one || peer_reads > 0, "the former holder was never asked");
    assert!(one || dram_hits > 100, "copies in memory answered {dram_hits} reads");
}

/// A shard too small for the files, and a spill device whose reads and writes fail, lie and tear: every byte is right,
/// and nobody hears of it.
#[test]
fn what_was_spilled_comes_back_right_or_from_s3() {
    let (mut hits, mut errors, mut off) = (0, 0, 0);
    let seeds = seeds(40);
    let one = seeds.end - seeds.start == 1;
    for seed in seeds {
        println!("seed {seed}");
        let mut sim = Sim::with_spill(seed, 10 << 20, SPILL_BYTES_MIN + (seed % 3) * (5 << 20));
        for _ in 0..4 {
            sim.run(60);
            sim.scan();
            sim.scan();
        }
        sim.settle_and_check();
        println!("  {:?}", sim.tally);
        hits += sim.tally.spill_hits;
        errors += sim.tally.spill_errors;
        off += sim.tally.spill_off;
    }
    println!("{hits} fills from the spill device, {errors} errors, {off} times off");
    assert!(one || (hits > 100 && errors > 10), "{hits} fills, {errors} errors");
}

#[test]
fn a_starved_core_is_slow_but_never_stuck() {
    for seed in seeds(20) {
        println!("seed {seed}");
        let mut sim = Sim::new(seed, 48 << 20);
        sim.starve();
        sim.run(250);
        sim.settle_and_check();
        println!("  {:?}", sim.tally);
        assert!(sim.tally.acked > 0);
    }
}
