//! Replicated groups: three cores with real stores over simulated devices, a simulated network and
//! metadata plane, seeded (PROTOCOL R41–R48; I1, I4, I5, I7).
//!
//! Clients write cells and read them back, by maps that may be old, two at a time to a cell; answers are lost, and
//! what got none is sent again, soon or late. The metadata side seals, uploads, commits or aborts, truncates and
//! removes files, and has primaries hand over (freeze, yield, or thaw). Nodes crash and come back, or are
//! lost with their device; devices fill up; links are slow, flap or are cut, whole nodes are cut off; members are
//! dropped (and told so late), added, copied to, made in-sync; the primary is replaced. Trouble follows trouble: who
//! has just come back, taken over, lost a link or got a new member is more likely to go again.
//! Every read must show a write that may still be there (`repl/history.rs`); after all of it, too, and a primary
//! that is there must be able to give its place away.
//!
//! One seed, told step by step: `EBB_SIM_TRACE=1 EBB_SIM_SEED=7 cargo test -p ebb-dataplane --test
//! replication -- --nocapture`.

#[path = "sim/device.rs"]
#[allow(dead_code, unreachable_pub)]
mod device;
mod repl;

use repl::World;

fn seeds(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    match number("EBB_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("EBB_SIM_SEEDS").unwrap_or(default),
    }
}

fn one(seed: u64, all: &mut repl::Tally) {
    println!("seed {seed}");
    let mut w = World::new(seed);
    w.run(3000);
    w.heal_and_check();
    println!("  {:?}", w.tally);
    all.add(&w.tally);
}

#[test]
fn acked_writes_survive_the_loss_of_all_members_but_one() {
    let mut all = repl::Tally::default();
    let seeds = seeds(300);
    let many = seeds.end - seeds.start >= 300;
    seeds.for_each(|seed| one(seed, &mut all));
    println!("in all: {all:?}");
    assert!(!many || all.everything_happened(), "a fault that never happens proves nothing");
}

/// Found by seed 101, as the simulation was then.
#[test]
fn a_restarted_member_drops_nothing_before_it_has_a_map() {
    seeds(20).for_each(|seed| {
        println!("seed {seed}");
        World::new(seed).a_late_order_meets_a_restarted_member();
    });
}

/// The same with groups that take writes only while two are in-sync: a full member may not be dropped (R56).
#[test]
fn acked_writes_survive_where_two_copies_are_required() {
    let mut all = repl::Tally::default();
    seeds(60).for_each(|seed| {
        println!("seed {seed}");
        let mut w = World::new(seed);
        w.require_two();
        w.run(3000);
        w.heal_and_check();
        println!("  {:?}", w.tally);
        all.add(&w.tally);
    });
    println!("in all: {all:?}");
}

#[test]
fn a_group_taken_over_while_a_cut_is_journaled_hears_of_the_cut() {
    seeds(20).for_each(|seed| {
        println!("seed {seed}");
        World::new(seed).a_group_is_taken_over_while_a_cut_is_journaled();
    });
}

#[test]
fn a_member_that_stays_full_is_dropped_and_its_primary_goes_on() {
    seeds(30).for_each(|seed| {
        println!("seed {seed}");
        World::new(seed).a_full_member_is_dropped();
    });
}

#[test]
fn a_full_member_that_is_needed_stays_and_nobody_waits_for_ever() {
    let all = seeds(30);
    let seeds = all.end - all.start;
    let mut full = 0;
    for seed in all {
        println!("seed {seed}");
        let mut w = World::new(seed);
        w.a_full_member_that_is_needed_stays();
        full += w.tally.full_for_long;
    }
    assert!(seeds < 30 || full > seeds / 2, "full in {full} of {seeds}");
}

/// Each of these failed once, on code as it was then. The mended code passes; whether each still meets the
/// interleaving that it met is not known.
#[test]
fn seeds_that_found_a_defect_stay_mended() {
    let found = [
        // Half of an unacked write came with the merged block of another, before the chunk was copied.
        120, 307, 804,
        // Who took over merged blocks with what was there before the last stream's records were durable.
        349, 423,
        // A flush's result was applied to what was left of a group that the core was out of.
        1306, 1808,
        // A view presented twice took the ticket from the first, and everything that waits for all before it hung.
        13, 15, 17, 20,
        // A view that was known here, and not yet everywhere, was called applied.
        50,
        // A control request waited for a ticket that became durable while a later step of it was parked
        // (1162; the others probably).
        1162, 2055, 2603, 2696,
        // A removal right behind the first copied chunk of an inode found nothing at the member, and the chunk stayed.
        59,
        // A removal that was asked again after a restart was "done" at once, and a member had not heard of it.
        835, 861,
    ];
    let mut all = repl::Tally::default();
    found.into_iter().for_each(|seed| one(seed, &mut all));
}
