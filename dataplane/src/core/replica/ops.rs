//! The mutations of a group that the primary has not answered yet, in their order (R42).
//!
//! Tickets of a group become durable in the order in which its mutations were appended, so "durable here" is one number
//! for all of them. What an event may have settled is looked up, never all that is open: an acknowledgement settles a
//! range of numbers, a copied chunk the mutations of that chunk.

use crate::core::Waiter;
use ebb_dataplane_protocol::{ChunkIndex, InodeId};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

/// What of the data a mutation changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touches {
    Nothing,
    Chunk(InodeId, ChunkIndex),
    /// A flush's result.
    Scope(InodeId),
    /// Whatever was applied before this core led the group: which of it the others have isn't known
    /// before each of them was copied to.
    Everything,
}

impl Touches {
    /// Where it is looked for when something was copied.
    fn place(self) -> Option<(InodeId, Option<ChunkIndex>)> {
        match self {
            Self::Nothing | Self::Everything => None,
            Self::Chunk(inode, chunk) => Some((inode, Some(chunk))),
            Self::Scope(inode) => Some((inode, None)),
        }
    }
}

#[derive(Debug)]
struct Op {
    touches: Touches,
    waiters: Vec<Waiter>,
}

/// What may be everywhere now.
#[derive(Clone, Debug)]
pub(super) enum Look {
    All,
    Numbers(RangeInclusive<u64>),
    Chunk(InodeId, ChunkIndex),
    /// An inode with all of its chunks.
    Scope(InodeId),
}

/// Those of one time of leading a group.
#[derive(Debug)]
pub(super) struct Ops {
    next: u64,
    /// All up to this one are durable here.
    durable: u64,
    open: BTreeMap<u64, Op>,
    /// Open ones by what they touch.
    places: BTreeSet<(InodeId, Option<ChunkIndex>, u64)>,
}

impl Ops {
    /// Number 0 is all that was applied before.
    pub(super) fn new() -> Self {
        let before = Op { touches: Touches::Everything, waiters: Vec::new() };
        Self { next: 1, durable: 0, open: BTreeMap::from([(0, before)]), places: BTreeSet::new() }
    }

    /// Number of the next mutation.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// A mutation was appended: its number.
    pub(super) fn push(&mut self, touches: Touches) -> u64 {
        let number = self.next;
        self.next += 1;
        self.open.insert(number, Op { touches, waiters: Vec::new() });
        if let Some((inode, chunk)) = touches.place() {
            self.places.insert((inode, chunk, number));
        }
        number
    }

    /// It is durable here, and so is every earlier one.
    pub(super) fn durable(&mut self, number: u64) {
        self.durable = self.durable.max(number);
    }

    pub(super) fn is_open(&self, number: u64) -> bool {
        self.open.contains_key(&number)
    }

    /// The newest open one up to `barrier`.
    pub(super) fn open_below(&self, barrier: u64) -> Option<u64> {
        self.open.range(..=barrier).next_back().map(|(number, _)| *number)
    }

    /// The newest open write of a chunk that is durable here.
    pub(super) fn newest_of(&self, inode: InodeId, chunk: ChunkIndex) -> Option<u64> {
        let all = (inode, Some(chunk), 0)..=(inode, Some(chunk), self.durable);
        self.places.range(all).next_back().map(|at| at.2)
    }

    /// Gives the waiters back if it isn't open any more.
    pub(super) fn wait(&mut self, number: u64, waiters: Vec<Waiter>) -> Result<(), Vec<Waiter>> {
        match self.open.get_mut(&number) {
            Some(op) => {
                op.waiters.extend(waiters);
                Ok(())
            }
            None => Err(waiters),
        }
    }

    pub(super) fn is_waited_for(&self, number: u64) -> bool {
        self.open.get(&number).is_some_and(|op| !op.waiters.is_empty())
    }

    /// Those that wait for what was applied before and match.
    pub(super) fn take_early(&mut self, takes: impl Fn(&Waiter) -> bool) -> Vec<Waiter> {
        let Some(op) = self.open.get_mut(&0) else { return Vec::new() };
        let (early, rest) = std::mem::take(&mut op.waiters).into_iter().partition(takes);
        op.waiters = rest;
        early
    }

    /// Whoever waits for anything; what they waited for stays open.
    pub(super) fn take_waiters(&mut self) -> Vec<Waiter> {
        self.open.values_mut().flat_map(|op| std::mem::take(&mut op.waiters)).collect()
    }

    /// Takes out what is durable here and `everywhere`, of what may have become so; whoever waited, oldest first.
    pub(super) fn settle(
        &mut self,
        look: &Look,
        everywhere: impl Fn(u64, Touches) -> bool,
    ) -> Vec<Waiter> {
        let durable = self.durable;
        let of = |from, to| self.places.range(from..=to).map(|at: &(_, _, u64)| at.2);
        let mut may: Vec<u64> = match look {
            Look::All => self.open.range(..=durable).map(|op| *op.0).collect(),
            Look::Numbers(r) if r.is_empty() => Vec::new(),
            Look::Numbers(r) => self.open.range(r.clone()).map(|op| *op.0).collect(),
            Look::Chunk(inode, chunk) => {
                of((*inode, Some(*chunk), 0), (*inode, Some(*chunk), durable)).collect()
            }
            Look::Scope(inode) => {
                let last = ChunkIndex(u32::MAX);
                of((*inode, None, 0), (*inode, Some(last), u64::MAX)).collect()
            }
        };
        may.retain(|number| *number <= durable);
        may.sort_unstable();
        let mut waiters = Vec::new();
        for number in may {
            let Some(op) = self.open.get(&number) else { continue };
            let touches = op.touches;
            if !everywhere(number, touches) {
                continue;
            }
            if let Some((inode, chunk)) = touches.place() {
                self.places.remove(&(inode, chunk, number));
            }
            waiters.extend(self.open.remove(&number).into_iter().flat_map(|op| op.waiters));
        }
        waiters
    }

    /// Nobody is told "done" any more.
    pub(super) fn into_waiters(self) -> impl Iterator<Item = Waiter> {
        self.open.into_values().flat_map(|op| op.waiters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: InodeId = InodeId(7);
    const CHUNK: ChunkIndex = ChunkIndex(3);

    fn read(id: u64) -> Vec<Waiter> {
        vec![Waiter::Read(id)]
    }
    fn ids(waiters: &[Waiter]) -> Vec<u64> {
        let id = |w: &Waiter| if let Waiter::Read(id) = w { *id } else { 0 };
        waiters.iter().map(id).collect()
    }
    fn all(_: u64, _: Touches) -> bool {
        true
    }

    #[test]
    fn nothing_settles_before_it_is_durable_here() {
        let mut ops = Ops::new();
        let (a, b) = (ops.push(Touches::Chunk(A, CHUNK)), ops.push(Touches::Nothing));
        assert!(ops.wait(a, read(1)).is_ok() && ops.wait(b, read(2)).is_ok());
        assert!(ops.settle(&Look::Numbers(a..=b), all).is_empty());
        assert_eq!(ops.newest_of(A, CHUNK), None, "who reads sees only what is durable");
        ops.durable(a);
        assert_eq!(ops.newest_of(A, CHUNK), Some(a));
        assert_eq!(ids(&ops.settle(&Look::Numbers(a..=b), all)), [1]);
        ops.durable(b);
        assert_eq!(ids(&ops.settle(&Look::All, all)), [2]);
        assert_eq!((ops.open_below(b), ops.newest_of(A, CHUNK)), (None, None));
        assert!(ops.wait(a, read(3)).is_err(), "there is nothing to wait for");
    }

    #[test]
    fn a_copy_settles_what_it_holds_and_nothing_else() {
        let mut ops = Ops::new();
        let other = ChunkIndex(u32::MAX);
        let numbers = [
            ops.push(Touches::Chunk(A, CHUNK)),
            ops.push(Touches::Chunk(A, other)),
            ops.push(Touches::Chunk(InodeId(8), CHUNK)),
            ops.push(Touches::Scope(A)),
            ops.push(Touches::Chunk(A, CHUNK)),
        ];
        ops.durable(numbers[4]);
        for n in numbers {
            assert!(ops.wait(n, read(n)).is_ok());
        }
        // A copy of the chunk that was made before its second write.
        let held = |n: u64, _: Touches| n < numbers[4];
        assert_eq!(ids(&ops.settle(&Look::Chunk(A, CHUNK), held)), [numbers[0]]);
        assert_eq!(ops.newest_of(A, CHUNK), Some(numbers[4]));
        let settled = ops.settle(&Look::Scope(A), all);
        assert_eq!(ids(&settled), [numbers[1], numbers[3], numbers[4]]);
        assert_eq!(ops.open_below(u64::MAX), Some(numbers[2]), "another inode's");
        assert!(ops.is_open(0), "nor what was before");
    }
}
