//! Runs one configuration to its end and says what was found.
//!
//! A full run is exhaustive: it ends only when no new state is left. A negative run stops at its first
//! counterexample. The checker is single-threaded here, so that figures repeat.

use std::fmt::Debug;
use std::hash::Hash;
use std::time::{Duration, Instant};

use stateright::{Checker, Expectation, HasDiscoveries, Model};

/// The outcome of one run.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub unique: usize,
    pub total: usize,
    pub depth: usize,
    pub took: Duration,
    /// Violated properties, each with the steps of its counterexample.
    pub violated: Vec<(&'static str, Vec<String>)>,
    /// `sometimes` properties that no state met.
    pub unreached: Vec<&'static str>,
}

/// Checks `model`; with `stop_at_failure` only up to the first counterexample.
pub fn check<M>(model: M, stop_at_failure: bool) -> Outcome
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync,
    M::Action: Clone + Debug + PartialEq + Send,
{
    let started = Instant::now();
    let when =
        if stop_at_failure { HasDiscoveries::AnyFailures } else { HasDiscoveries::AllFailures };
    let checker = model.checker().threads(1).finish_when(when).spawn_bfs().join();
    let mut found = checker.discoveries();
    let mut violated = Vec::new();
    let mut unreached = Vec::new();
    for p in checker.model().properties() {
        match (p.expectation, found.remove(p.name)) {
            (Expectation::Always, Some(path)) => {
                let steps = path.into_actions().iter().map(|a| format!("{a:?}")).collect();
                violated.push((p.name, steps));
            }
            (Expectation::Sometimes, None) => unreached.push(p.name),
            _ => {}
        }
    }
    violated.sort_by_key(|v: &(&str, Vec<String>)| v.1.len());
    Outcome {
        unique: checker.unique_state_count(),
        total: checker.state_count(),
        depth: checker.max_depth(),
        took: started.elapsed(),
        violated,
        unreached,
    }
}
