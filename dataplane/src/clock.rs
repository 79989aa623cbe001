//! The one clock of a data node: CLOCK_BOOTTIME, which also counts while the machine sleeps, so that a
//! lease never outlives a pause (I5).

use nix::time::{ClockId, clock_gettime};

/// Milliseconds since boot.
pub(crate) fn now_ms() -> u64 {
    match clock_gettime(ClockId::CLOCK_BOOTTIME) {
        Ok(t) => t.tv_sec() as u64 * 1000 + t.tv_nsec() as u64 / 1_000_000,
        // Every kernel that has io_uring has this clock. A clock that stands at the end of time holds
        // no lease.
        Err(_) => u64::MAX,
    }
}
