//! What was asked and answered, and which inodes somebody has heard of.

use super::dice::Dice;
use super::{Came, Counts};
use ebb_client::{Attr, DirEntry, FileKind};
use ebb_history::history::{Answer, Did, Failure, Kind, Line, Name, Operation, Seen};
use ebb_metaplane_protocol::FsError;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Inodes of each kind that are remembered of a tree: the latest.
const HEARD_MAX: usize = 6;

/// All clients' record.
pub(super) struct Recorder {
    roots: Vec<[u64; 2]>,
    began: Instant,
    ends: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    lines: Vec<Line>,
    counts: Counts,
    /// By tree: files, directories.
    heard: Vec<[VecDeque<u64>; 2]>,
    /// Directories that one client is filling: others only look there.
    filling: Vec<(usize, u64)>,
}

fn at(kind: Kind) -> usize {
    match kind {
        Kind::File => 0,
        Kind::Directory => 1,
    }
}

impl Recorder {
    pub(super) fn new(roots: Vec<[u64; 2]>, ends: Instant) -> Self {
        let heard = roots.iter().map(|_| Default::default()).collect();
        let lines = roots
            .iter()
            .enumerate()
            .map(|(tree, roots)| Line::Tree { tree: tree as u32, roots: roots.to_vec() });
        let state = State { lines: lines.collect(), heard, ..State::default() };
        Self { roots, began: Instant::now(), ends, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nanoseconds since the history began.
    pub(super) fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    pub(super) fn is_over(&self) -> bool {
        Instant::now() >= self.ends
    }

    pub(super) fn trees(&self) -> usize {
        self.roots.len()
    }

    pub(super) fn roots(&self, tree: usize) -> [u64; 2] {
        self.roots[tree]
    }

    /// An inode of that tree that an operation which returned has shown.
    pub(super) fn any(&self, dice: &mut Dice, tree: usize, kind: Kind) -> Option<u64> {
        let state = self.state();
        let heard = &state.heard[tree][at(kind)];
        (!heard.is_empty()).then(|| heard[dice.below(heard.len())])
    }

    /// A client fills a directory that it just made.
    pub(super) fn fills(&self, tree: usize, dir: u64) {
        self.state().filling.push((tree, dir));
    }

    /// It has done that: now the directory is everybody's.
    pub(super) fn filled(&self, tree: usize, dir: u64) {
        let mut state = self.state();
        state.filling.retain(|f| *f != (tree, dir));
        let seen = Seen { inode: dir, kind: Kind::Directory, size: 0, links: 2 };
        state.hear(tree, &Answer::Seen(seen));
    }

    /// A directory that somebody is filling.
    pub(super) fn any_filling(&self, dice: &mut Dice) -> Option<(usize, u64)> {
        let filling = &self.state().filling;
        (!filling.is_empty()).then(|| filling[dice.below(filling.len())])
    }

    /// An operation ended.
    pub(super) fn did(
        &self,
        who: (&str, &str),
        tree: usize,
        called: u64,
        operation: Operation,
        came: Came,
    ) {
        self.did_maybe_alone(who, tree, called, operation, came, false);
    }

    /// The same. `is_alone`: nobody else uses the numbers that the answer shows. If the client answered itself, whoever
    /// looks for the name finds the file, but nobody is promised anything who guesses its number before.
    pub(super) fn did_maybe_alone(
        &self,
        (kind, client): (&str, &str),
        tree: usize,
        called: u64,
        operation: Operation,
        came: Came,
        is_alone: bool,
    ) {
        // Before anybody can build upon the answer.
        let now = self.now();
        let mut state = self.state();
        let counts = &mut state.counts;
        let returned = match came {
            Came::Answer(answer) => {
                *counts.answered.entry(kind.to_owned()).or_default() += 1;
                // Readers' waits are what they are there for.
                if kind != super::reader::KIND {
                    counts.longest_ms = counts.longest_ms.max((now - called) / 1_000_000);
                }
                if !is_alone {
                    state.hear(tree, &answer);
                }
                Some((now, answer))
            }
            Came::Unclear(why) => {
                *counts.unclear.entry(why).or_default() += 1;
                let reads = matches!(
                    operation,
                    Operation::Lookup { .. } | Operation::Stat { .. } | Operation::List { .. }
                );
                if reads {
                    return;
                }
                None
            }
        };
        let (tree, client) = (tree as u32, client.to_owned());
        state.lines.push(Line::Did(Did { tree, client, called, operation, returned }));
    }

    pub(super) fn count(&self, count: impl FnOnce(&mut Counts)) {
        count(&mut self.state().counts);
    }

    pub(super) fn finish(&self) -> (Vec<Line>, Counts) {
        let state = std::mem::take(&mut *self.state());
        (state.lines, state.counts)
    }
}

impl State {
    fn hear(&mut self, tree: usize, answer: &Answer) {
        let filling = &self.filling;
        let mut hear = |s: &Seen| {
            if filling.contains(&(tree, s.inode)) {
                return;
            }
            let heard = &mut self.heard[tree][at(s.kind)];
            if !heard.contains(&s.inode) {
                heard.push_back(s.inode);
                if heard.len() > HEARD_MAX {
                    heard.pop_front();
                }
            }
        };
        match answer {
            Answer::Seen(s) | Answer::Opened { seen: s, .. } => hear(s),
            Answer::Names(all) => all.iter().for_each(|(_, s)| hear(s)),
            Answer::Done | Answer::Failed(_) | Answer::Odd(_) => {}
        }
    }
}

/// Attributes, as they are checked.
pub(super) fn seen(attr: &Attr) -> Result<Seen, Answer> {
    let kind = match attr.kind {
        FileKind::File => Kind::File,
        FileKind::Directory => Kind::Directory,
        FileKind::Symlink | FileKind::HardLink => {
            return Err(Answer::Odd(format!("inode {} is a link", attr.inode.0)));
        }
    };
    Ok(Seen { inode: attr.inode.0, kind, size: attr.size, links: attr.nlink })
}

/// The answer that shows an inode.
pub(super) fn shows(attr: &Attr) -> Answer {
    seen(attr).map_or_else(|odd| odd, Answer::Seen)
}

/// The answer to a create.
pub(super) fn opened(attr: &Attr, created: bool) -> Answer {
    seen(attr).map_or_else(|odd| odd, |seen| Answer::Opened { seen, created })
}

/// The answer to a listing.
pub(super) fn listed(entries: &[DirEntry], end: bool) -> Answer {
    if !end {
        return Answer::Odd("a directory of more than a page".into());
    }
    let mut names = Vec::with_capacity(entries.len());
    for entry in entries {
        let Some(name) = Name::parse(&entry.name) else {
            return Answer::Odd(format!("the name {}", String::from_utf8_lossy(&entry.name)));
        };
        match seen(&entry.attr) {
            Ok(seen) => names.push((name, seen)),
            Err(odd) => return odd,
        }
    }
    names.sort_by_key(|(name, _)| *name);
    Answer::Names(names)
}

/// What a refusal says of an operation.
pub(super) fn refused(error: &FsError) -> Came {
    Came::Answer(Answer::Failed(match error {
        FsError::NotFound => Failure::NotFound,
        FsError::Exists => Failure::Exists,
        FsError::NotDirectory => Failure::NotDirectory,
        FsError::IsDirectory => Failure::IsDirectory,
        FsError::NotEmpty => Failure::NotEmpty,
        FsError::Invalid(_) => Failure::Invalid,
        FsError::Stale => Failure::Stale,
        e => return Came::Unclear(e.to_string()),
    }))
}
