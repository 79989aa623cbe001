//! Room for writes: clean data goes, oldest first, before anybody hears `NoSpace` (I11).

use super::{Buffer, ShardCore, Waiter};
use ebb_store::StoreStats;

/// Evicted at a time at least, so that one journal record buys more than one write's space.
const EVICT_BYTES_MIN: u64 = 8 << 20;
/// Share of the capacity that is kept free while there is clean data, one in so many.
const FREE_SHARE: u64 = 32;
/// The same, at most.
const FREE_BYTES_MAX: u64 = 256 << 20;
/// Between two looks, in ms.
const LOOK_MS: u64 = 20;
/// How long a refused write counts: a few heartbeats.
const REFUSED_MS: u64 = 2_000;

#[derive(Default)]
pub(crate) struct Space {
    /// An eviction is in the journal.
    evicting: bool,
    /// When to look again: looking is not free.
    look_at_ms: u64,
    /// Until then a refused write counts as pressure.
    refused_until_ms: u64,
}

impl<B: Buffer> ShardCore<B> {
    /// Makes room for a write that found none. `false`: nothing clean is left.
    pub(crate) fn evict_for(&mut self, needed: u64) -> bool {
        if self.space.evicting {
            return true;
        }
        match self.evict_and_spill(needed.max(EVICT_BYTES_MIN)) {
            Ok(Some((bytes, ticket))) => {
                self.space.evicting = true;
                self.stats.evicted_bytes += bytes;
                self.wait_ticket(ticket, Waiter::Space);
                true
            }
            Ok(None) => false,
            // It waits for a batch, like the write that needs it.
            Err(ebb_store::ControlError::Wait(_)) => true,
            Err(_) => false,
        }
    }

    /// A write was refused: only flushing makes room.
    pub(crate) fn space_refused(&mut self) {
        self.space.refused_until_ms = self.now_ms + REFUSED_MS;
    }

    /// See `CoreStats::pressure_permille`.
    pub(crate) fn pressure(&self, s: &StoreStats) -> u16 {
        if self.now_ms < self.space.refused_until_ms { 1000 } else { s.dirty_permille() }
    }

    pub(crate) fn space_freed(&mut self) {
        self.space.evicting = false;
        self.retry_waiting = true;
    }

    /// Keeps a little free ahead of need.
    pub(crate) fn keep_space(&mut self) {
        if self.space.evicting || self.store.failed() || self.now_ms < self.space.look_at_ms {
            return;
        }
        self.space.look_at_ms = self.now_ms + LOOK_MS;
        let s = self.store.stats();
        let wanted = (s.capacity_bytes / FREE_SHARE).min(FREE_BYTES_MAX);
        // Freed bytes that wait for readers or for the journal are on their way.
        let free = s.free_bytes + s.waiting_bytes;
        // Nobody needs it yet, so what goes may wait a little for its copy.
        if self.spill.is_busy() && free > wanted / 2 {
            return;
        }
        if s.clean_bytes > 0 && free < wanted {
            self.evict_for(wanted - s.free_bytes);
        }
    }
}
