//! With every rule in force each configuration holds in every reachable state, and none is vacuous.

use ebb_model::rules::Rules;
use ebb_model::suite::{Config, SECOND_LINES};

fn holds(config: Config) {
    let o = config.bounded().run(Rules::ALL, false);
    println!(
        "{config:?}: {} states, {} in all, depth {}, {:?}",
        o.unique, o.total, o.depth, o.took
    );
    assert!(o.violated.is_empty(), "{:?}", o.violated);
    assert!(o.unreached.is_empty(), "vacuous: {:?}", o.unreached);
}

macro_rules! each {
    ($($test:ident: $config:ident;)+) => {$(
        #[test]
        fn $test() {
            holds(Config::$config);
        }
    )+};
}

each! {
    flush_with_abort_and_leader_crash_holds: Flush;
    writers_during_a_flush_hold: Writers;
    cut_against_writers_and_flush_holds: Cut;
    two_cuts_hold: CutTwice;
    cut_against_retries_holds: CutRetry;
    cut_while_a_session_ends_holds: CutFence;
    session_fence_holds: Fence;
    planned_hand_over_holds: Move;
    hand_over_and_back_holds: MoveBack;
    stand_in_holds: StandIn;
    replicas_and_takeovers_hold: Pair;
    replicas_that_crash_hold: PairRestart;
    three_replicas_less_a_lost_one_hold: Trio;
    three_replicas_that_crash_hold: TrioRestart;
    a_joining_replica_that_takes_over_holds: Join;
    joining_a_primary_that_crashes_holds: JoinRestart;
    a_replica_that_comes_back_holds: Rejoin;
    late_commands_for_a_replica_hold: RejoinLate;
    a_shrink_of_replicas_holds: Shrink;
    key_with_our_object_holds: KeyOld;
    key_without_object_holds: KeyNew;
}

#[test]
fn second_lines_alone_are_not_needed() {
    for removal in SECOND_LINES {
        let o = removal.config.bounded().run(Rules::ALL.without(removal.rules), true);
        println!("without {:?}: {} states", removal.rules, o.unique);
        assert!(o.violated.is_empty(), "now load-bearing, move it to REMOVALS: {:?}", o.violated);
    }
}
