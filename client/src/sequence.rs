//! Sequence numbers of a session and the mark below which everything was answered (I7).

use ebb_dataplane_protocol::Sequence;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Hands out sequence numbers. Cheap to clone; clones count together.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sequencer {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    last: u64,
    open: BTreeSet<u64>,
}

/// A number in use; dropping it says that its request was answered (or given up for good).
#[derive(Debug)]
pub(crate) struct Ticket {
    sequence: u64,
    state: Arc<Mutex<State>>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sequencer {
    /// The next number.
    pub(crate) fn begin(&self) -> Ticket {
        let mut s = lock(&self.state);
        s.last += 1;
        let sequence = s.last;
        s.open.insert(sequence);
        Ticket { sequence, state: Arc::clone(&self.state) }
    }

    /// Every request below this number was answered.
    pub(crate) fn answered_below(&self) -> Sequence {
        let s = lock(&self.state);
        Sequence(s.open.first().copied().unwrap_or(s.last + 1))
    }
}

impl Ticket {
    /// The number.
    pub(crate) fn sequence(&self) -> Sequence {
        Sequence(self.sequence)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        lock(&self.state).open.remove(&self.sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_never_passes_an_unanswered_request() {
        let s = Sequencer::default();
        assert_eq!(s.answered_below(), Sequence(1));
        let (a, b, c) = (s.begin(), s.begin(), s.begin());
        assert_eq!((a.sequence().0, b.sequence().0, c.sequence().0), (1, 2, 3));
        drop(b);
        assert_eq!(s.answered_below(), Sequence(1));
        drop(a);
        assert_eq!(s.answered_below(), Sequence(3));
        drop(c);
        assert_eq!(s.answered_below(), Sequence(4));
        assert_eq!(s.begin().sequence(), Sequence(4));
    }
}
