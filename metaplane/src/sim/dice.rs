//! All chance of a run comes from here, so that its seed replays it; and a hash of what happened, to see that it does.

use super::runtime::Seeded;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::fmt::{Debug, Formatter};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shared dice.
#[derive(Clone)]
pub(super) struct Dice(Arc<Mutex<(SmallRng, u64)>>);

impl Debug for Dice {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("Dice")
    }
}

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new((SmallRng::seed_from_u64(seed), seed))))
    }
    fn lock(&self) -> MutexGuard<'_, (SmallRng, u64)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub(super) fn chance(&self, odds: f64) -> bool {
        self.lock().0.random_bool(odds.clamp(0.0, 1.0))
    }
    /// A number below; `n` is not 0.
    pub(super) fn below(&self, n: u64) -> u64 {
        self.lock().0.random_range(0..n)
    }
    pub(super) fn between(&self, low: u64, high: u64) -> u64 {
        self.lock().0.random_range(low..=high)
    }
    pub(super) fn pick<T: Clone>(&self, of: &[T]) -> Option<T> {
        if of.is_empty() { None } else { Some(of[self.below(of.len() as u64) as usize].clone()) }
    }

    /// A task whose openraft has dice of its own, of which these decide.
    pub(super) fn spawn<F>(&self, future: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let seed = self.lock().0.random();
        tokio::spawn(Seeded::scope(seed, future))
    }

    /// Something happened.
    pub(super) fn note(&self, what: u64) {
        let mut held = self.lock();
        held.1 = (held.1.rotate_left(5) ^ what).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
    /// Everything that happened, and the dice as they lie now.
    pub(super) fn trace(&self) -> u64 {
        let mut held = self.lock();
        held.1 ^ held.0.random::<u64>()
    }
}
