//! A number of bytes that may be held at once (I9). Waiters are woken when bytes come back.

use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Notify;

#[derive(Debug)]
pub(crate) struct Budget {
    limit: usize,
    used: AtomicUsize,
    returned: Notify,
}

impl Budget {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, used: AtomicUsize::new(0), returned: Notify::new() }
    }

    /// Takes `bytes` if they are free. A single request larger than the whole budget is let through
    /// when nothing else is held, so that no setting can block a caller for ever.
    pub(crate) fn try_take(&self, bytes: usize) -> bool {
        self.used
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |used| {
                (used == 0 || used.saturating_add(bytes) <= self.limit).then(|| used + bytes)
            })
            .is_ok()
    }

    /// Gives bytes back.
    pub(crate) fn give(&self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let before = self.used.fetch_sub(bytes, Ordering::AcqRel);
        debug_assert!(before >= bytes, "more bytes given back than taken");
        self.returned.notify_waiters();
    }

    /// Takes `bytes`, waiting for them. `make_room` is called before each wait.
    pub(crate) async fn take(&self, bytes: usize, mut make_room: impl FnMut()) {
        loop {
            let returned = self.returned.notified();
            tokio::pin!(returned);
            returned.as_mut().enable();
            if self.try_take(bytes) {
                return;
            }
            make_room();
            returned.await;
        }
    }

    /// Bytes held.
    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn takers_wait_for_bytes_to_come_back() {
        let b = Arc::new(Budget::new(100));
        assert!(b.try_take(60));
        assert!(!b.try_take(60));
        let waiter = tokio::spawn({
            let b = Arc::clone(&b);
            async move { b.take(60, || {}).await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        b.give(60);
        waiter.await.expect("woken");
        assert_eq!(b.used(), 60);
    }

    #[test]
    fn a_request_larger_than_the_budget_passes_alone() {
        let b = Budget::new(10);
        assert!(b.try_take(50));
        assert!(!b.try_take(1));
        b.give(50);
        assert!(b.try_take(10));
    }
}
