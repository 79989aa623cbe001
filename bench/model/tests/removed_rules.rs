//! Take a rule out, and the checker must find the run that it closes.

use std::collections::BTreeSet;

use ebb_model::rules::{Rule, Rules};
use ebb_model::suite::{Config, REMOVALS, SECOND_LINES};

fn caught(config: Config) {
    let mut seen = 0;
    for removal in REMOVALS.iter().filter(|r| r.config == config) {
        let o = removal.config.bounded().run(Rules::ALL.without(removal.rules), true);
        let Some((property, path)) = o.violated.first() else {
            panic!("{:?} can go unnoticed in {config:?} ({} states)", removal.rules, o.unique);
        };
        println!(
            "without {:?}: {property}, {} steps, {} states: {}",
            removal.rules,
            path.len(),
            o.unique,
            path.join(" → ")
        );
        seen += 1;
    }
    assert!(seen > 0, "no removal names {config:?}");
}

macro_rules! each {
    ($($test:ident: $config:ident;)+) => {$(
        #[test]
        fn $test() {
            caught(Config::$config);
        }
    )+};
}

each! {
    flush_rules_are_needed: Flush;
    writer_rules_are_needed: Writers;
    cut_rules_are_needed: Cut;
    size_rules_are_needed: CutTwice;
    retry_rules_are_needed: CutRetry;
    fence_rules_are_needed: Fence;
    hand_over_rules_are_needed: Move;
    lease_rules_are_needed: StandIn;
    stream_and_ack_rules_are_needed: Pair;
    window_answers_wait: PairRestart;
    fencing_rules_are_needed: Trio;
    restarted_members_wait_for_a_map: TrioRestart;
    joining_rules_are_needed: Join;
    a_primarys_restart_is_a_new_epoch: JoinRestart;
    what_was_not_named_goes: Rejoin;
    commands_name_their_epoch: RejoinLate;
    shrinking_rules_are_needed: Shrink;
    key_rules_are_needed: KeyOld;
    absent_key_rules_are_needed: KeyNew;
}

#[test]
fn every_rule_is_taken_out_once() {
    let named: BTreeSet<Rule> =
        REMOVALS.iter().chain(SECOND_LINES).flat_map(|r| r.rules.iter().copied()).collect();
    let missing: Vec<_> = Rule::ALL.iter().filter(|r| !named.contains(r)).collect();
    assert!(missing.is_empty(), "no negative test for {missing:?}");
}
