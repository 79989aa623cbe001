//! Choices from a seed, and which operation comes next.

use super::record::Recorder;
use ebb_history::history::{Kind, Name, Operation};
use ebb_history::tree::{EXCHANGE, NOREPLACE};

/// A sequence of choices (splitmix64).
#[derive(Clone, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `n`, which is not 0.
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// True once in `n`.
    pub(super) fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(super) fn name(&mut self, names: u16) -> Name {
        Name((self.next() % u64::from(names.max(1))) as u16)
    }

    /// A directory of a tree: mostly one of its roots, one that was made there once in so many times.
    fn dir(&mut self, recorder: &Recorder, tree: usize, made_once_in: usize) -> u64 {
        let made = match self.once_in(made_once_in) {
            true => recorder.any(self, tree, Kind::Directory),
            false => None,
        };
        made.unwrap_or(recorder.roots(tree)[self.below(2)])
    }

    /// An operation, in some tree.
    pub(super) fn operation(
        &mut self,
        recorder: &Recorder,
        names: u16,
        writes: bool,
    ) -> (usize, Operation) {
        let tree = self.below(recorder.trees());
        let what = self.below(20);
        // Directories in directories are few: what is far below is met by nobody.
        let made_once_in = if matches!(what, 4..=5 | 10..=12) { 12 } else { 3 };
        let (parent, name) = (self.dir(recorder, tree, made_once_in), self.name(names));
        let operation = match what {
            0..=3 => Operation::Create { parent, name, exclusive: !self.once_in(3) },
            4..=5 => Operation::Mkdir { parent, name },
            6..=8 => Operation::Unlink { parent, name },
            9 => Operation::Rmdir { parent, name },
            10..=12 => {
                let flags = [0, 0, NOREPLACE, EXCHANGE][self.below(4)];
                let new_parent = self.dir(recorder, tree, made_once_in);
                let new_name = self.name(names);
                Operation::Rename { parent, name, new_parent, new_name, flags }
            }
            n @ 13..=15 => match recorder.any(self, tree, Kind::File) {
                Some(inode) if n == 15 && writes => {
                    Operation::Write { inode, end: 1 + self.next() % 20_000 }
                }
                Some(inode) => Operation::Truncate { inode, size: self.next() % 20_000 },
                None => Operation::Create { parent, name, exclusive: true },
            },
            _ => return self.read(recorder, names),
        };
        (tree, operation)
    }

    /// A look at something that was looked at before, likely.
    pub(super) fn look(&mut self, recorder: &Recorder, names: u16) -> (usize, Operation) {
        let tree = self.below(recorder.trees());
        if self.once_in(3) {
            let known = recorder.any(self, tree, Kind::File);
            return (tree, Operation::Stat { inode: known.unwrap_or(recorder.roots(tree)[0]) });
        }
        let (parent, name) = (self.dir(recorder, tree, 4), self.name(names));
        (tree, Operation::Lookup { parent, name })
    }

    /// A read, in some tree.
    pub(super) fn read(&mut self, recorder: &Recorder, names: u16) -> (usize, Operation) {
        if self.once_in(2)
            && let Some((tree, inode)) = recorder.any_filling(self)
        {
            let name = self.name(names);
            let looks_up = self.once_in(3);
            let operation = match looks_up {
                true => Operation::Lookup { parent: inode, name },
                false => Operation::List { inode },
            };
            return (tree, operation);
        }
        let tree = self.below(recorder.trees());
        let (parent, name) = (self.dir(recorder, tree, 3), self.name(names));
        let stat = recorder.any(self, tree, Kind::File).map(|inode| Operation::Stat { inode });
        let operation = match self.below(3) {
            0 => Operation::Lookup { parent, name },
            1 => Operation::List { inode: parent },
            _ => stat.unwrap_or(Operation::Lookup { parent, name }),
        };
        (tree, operation)
    }
}
