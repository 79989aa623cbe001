//! Buffer classes, reserved pools, and how an arena's bytes are divided between them.
//!
//! Pure arithmetic: no memory is touched here. The counts it computes are the admission control of
//! a core (I9): each (class, pool) pair owns a fixed number of slots, so no pool can starve another
//! and replication never waits for a client's buffer.

use crate::config::Config;

/// The unit of alignment of everything that reaches a device, in bytes.
pub const BLOCK: usize = 4096;

/// Extra bytes in the two large classes: a payload may start at `offset % 4096` inside the first
/// block and end inside one block more.
pub const SLACK: usize = 2 * BLOCK;

/// The kernel takes at most this much memory in one registered-buffer entry.
pub(crate) const ENTRY_MAX: usize = 1 << 30;

/// A size class of buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// 4 KiB: superblocks, single blocks, small replies.
    Block4K,
    /// 64 KiB: journal records, header streams, small I/O.
    Small64K,
    /// 1 MiB plus [`SLACK`].
    Mid1M,
    /// 4 MiB plus [`SLACK`]: a whole chunk.
    Large4M,
}

impl Class {
    /// All classes, smallest first.
    pub const ALL: [Class; 4] = [Class::Block4K, Class::Small64K, Class::Mid1M, Class::Large4M];

    /// Bytes in one buffer of this class; always a multiple of [`BLOCK`].
    pub const fn bytes(self) -> usize {
        match self {
            Class::Block4K => BLOCK,
            Class::Small64K => 64 << 10,
            Class::Mid1M => (1 << 20) + SLACK,
            Class::Large4M => (4 << 20) + SLACK,
        }
    }

    /// The smallest class that holds `len` bytes; `None` above the largest.
    pub fn for_len(len: usize) -> Option<Class> {
        Class::ALL.into_iter().find(|c| c.bytes() >= len)
    }

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

/// Who a buffer is reserved for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pool {
    /// Requests of clients.
    Clients,
    /// Replication between nodes.
    Replication,
    /// Flush, fold and misses: the node's own work.
    Background,
}

impl Pool {
    /// All pools.
    pub const ALL: [Pool; 3] = [Pool::Clients, Pool::Replication, Pool::Background];

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

pub(crate) const CLASSES: usize = Class::ALL.len();
pub(crate) const POOLS: usize = Pool::ALL.len();

const _: () = {
    let mut i = 0;
    while i < CLASSES {
        assert!(Class::ALL[i].bytes().is_multiple_of(BLOCK));
        assert!(Class::ALL[i].index() == i);
        i += 1;
    }
    assert!(Class::Large4M.bytes() < ENTRY_MAX);
};

/// Where one slot lies in the arena.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) offset: usize,
    pub(crate) class: Class,
    pub(crate) pool: Pool,
}

impl Slot {
    /// Index of the registered-buffer entry that holds this slot.
    pub(crate) fn entry(&self) -> u16 {
        // An arena has far fewer than 65536 entries of 1 GiB; `plan` asserts it.
        (self.offset / ENTRY_MAX) as u16
    }
}

/// The slots of an arena and the bytes they span.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) slots: Vec<Slot>,
    pub(crate) bytes: usize,
}

/// Number of slots of `class` for `pool`, at least one for every class with a share.
fn count(cfg: &Config, class: Class, pool: Pool) -> usize {
    let class_pct = usize::from(cfg.class_percent[class.index()]);
    let pool_pct = usize::from(cfg.pool_percent[pool.index()]);
    if class_pct == 0 || pool_pct == 0 {
        return 0;
    }
    let share = (cfg.arena_bytes as u128 * class_pct as u128 * pool_pct as u128 / 10_000) as usize;
    (share / class.bytes()).max(1)
}

/// Divides `cfg.arena_bytes`. `Err(need)` if the least counts do not fit.
pub(crate) fn plan(cfg: &Config) -> Result<Plan, usize> {
    let mut counts = [[0usize; POOLS]; CLASSES];
    for class in Class::ALL {
        for pool in Pool::ALL {
            counts[class.index()][pool.index()] = count(cfg, class, pool);
        }
    }
    // Rounding small shares up to one can overshoot the budget: take it back from the largest
    // counts, smallest classes last, since a large slot gives the most back.
    let mut plan = lay_out(&counts);
    while plan.bytes > cfg.arena_bytes {
        let fattest = Class::ALL
            .into_iter()
            .rev()
            .flat_map(|c| Pool::ALL.into_iter().map(move |p| (c, p)))
            .filter(|(c, p)| counts[c.index()][p.index()] > 1)
            .max_by_key(|(c, p)| counts[c.index()][p.index()] * c.bytes());
        let Some((class, pool)) = fattest else { return Err(plan.bytes) };
        counts[class.index()][pool.index()] -= 1;
        plan = lay_out(&counts);
    }
    assert!(plan.bytes / ENTRY_MAX < usize::from(u16::MAX));
    Ok(plan)
}

fn lay_out(counts: &[[usize; POOLS]; CLASSES]) -> Plan {
    let mut slots = Vec::new();
    let mut at = 0usize;
    for class in Class::ALL.into_iter().rev() {
        for pool in Pool::ALL {
            for _ in 0..counts[class.index()][pool.index()] {
                // A slot never crosses an entry boundary: one I/O names one entry.
                let end = at + class.bytes() - 1;
                if at / ENTRY_MAX != end / ENTRY_MAX {
                    at = end / ENTRY_MAX * ENTRY_MAX;
                }
                slots.push(Slot { offset: at, class, pool });
                at += class.bytes();
            }
        }
    }
    Plan { slots, bytes: at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_never_overlap_nor_cross_an_entry() {
        for mib in [40usize, 64, 333, 1024, 3000] {
            let cfg = Config { arena_bytes: mib << 20, ..Config::default() };
            let plan = plan(&cfg).unwrap_or_else(|need| panic!("{mib} MiB: needs {need}"));
            let mut slots = plan.slots.clone();
            slots.sort_by_key(|s| s.offset);
            for pair in slots.windows(2) {
                assert!(pair[0].offset + pair[0].class.bytes() <= pair[1].offset);
            }
            for slot in &slots {
                let end = slot.offset + slot.class.bytes() - 1;
                assert_eq!(slot.offset / ENTRY_MAX, end / ENTRY_MAX);
                assert_eq!(slot.offset % BLOCK, 0);
                assert!(end < plan.bytes && plan.bytes <= cfg.arena_bytes);
            }
        }
    }

    #[test]
    fn every_pool_has_every_class() {
        let plan = plan(&Config { arena_bytes: 64 << 20, ..Config::default() }).unwrap();
        for class in Class::ALL {
            for pool in Pool::ALL {
                assert!(plan.slots.iter().any(|s| s.class == class && s.pool == pool));
            }
        }
    }

    #[test]
    fn too_small_an_arena_says_what_it_needs() {
        let need = plan(&Config { arena_bytes: 1 << 20, ..Config::default() }).unwrap_err();
        assert!(plan(&Config { arena_bytes: need, ..Config::default() }).is_ok());
    }

    #[test]
    fn class_for_a_length_is_the_smallest_that_fits() {
        assert_eq!(Class::for_len(1), Some(Class::Block4K));
        assert_eq!(Class::for_len(4097), Some(Class::Small64K));
        assert_eq!(Class::for_len((4 << 20) + SLACK), Some(Class::Large4M));
        assert_eq!(Class::for_len((4 << 20) + SLACK + 1), None);
    }
}
