//! Where a scan would only walk over removed keys.
//!
//! The heads of queues (what is dirty, notices, keys with work) are removed key by key, and until the table
//! has lost them every look at the next entry would step over all of them. A stretch without a live key, once
//! walked, is remembered and jumped over; a key that is set in it ends it there.

use std::sync::{Mutex, PoisonError};

/// Stretches remembered at most: there are a handful of queues.
const SKIPS_MAX: usize = 16;
/// Fewer removed keys are not worth remembering.
const DEAD_MIN: usize = if cfg!(test) { 2 } else { 32 };

/// No key `k` with `start <= k < first` is live.
struct Skip {
    start: Vec<u8>,
    first: Vec<u8>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Skips(Mutex<Vec<Skip>>);

impl Skips {
    /// Where a scan from `start` may begin instead.
    pub(super) fn jump(&self, start: &[u8]) -> Option<Vec<u8>> {
        let skips = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let over = |s: &&Skip| s.start.as_slice() <= start && start < s.first.as_slice();
        skips.iter().find(over).map(|s| s.first.clone())
    }

    /// A scan from `start` found `dead` removed keys before `first`, the first live one or its end. `jumped`: where
    /// [`Skips::jump`] had it begin.
    pub(super) fn walked(&self, start: &[u8], jumped: Option<&[u8]>, dead: usize, first: &[u8]) {
        if dead < if jumped.is_some() { 1 } else { DEAD_MIN } {
            return;
        }
        let mut skips = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = jumped.and_then(|j| skips.iter_mut().find(|s| s.first == j)) {
            known.first = first.to_vec();
            return;
        }
        // The oldest goes.
        if skips.len() == SKIPS_MAX {
            skips.remove(0);
        }
        skips.push(Skip { start: start.to_vec(), first: first.to_vec() });
    }

    /// A key is live now.
    pub(super) fn set(&mut self, key: &[u8]) {
        for s in self.0.get_mut().unwrap_or_else(PoisonError::into_inner) {
            if s.start.as_slice() <= key && key < s.first.as_slice() {
                s.first = key.to_vec();
            }
        }
    }
}
