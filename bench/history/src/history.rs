//! A history: what was asked and answered when, by client and tree.
//!
//! As a file: a JSON document per line, of one [`Line`] each, in any order.

use crate::explain;
use crate::search::{Limit, Timed, Verdict, search};
use crate::tree::Tree;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A name: few are used, so that clients meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Name(pub u16);

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "n{}", self.0)
    }
}

impl Name {
    /// The name that is written like this, if it is one of ours.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let number = std::str::from_utf8(text).ok()?.strip_prefix('n')?.parse().ok()?;
        (Self(number).to_string().as_bytes() == text).then_some(Self(number))
    }
}

/// Kind of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
}

/// What is asked; directories and files by their inode numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Creates a file, or opens the one that is there unless `exclusive`. Answer `Opened`.
    Create {
        /// Directory.
        parent: u64,
        /// Name.
        name: Name,
        /// O_EXCL.
        exclusive: bool,
    },
    /// Makes a directory. Answer `Seen`.
    Mkdir {
        /// Directory.
        parent: u64,
        /// Name.
        name: Name,
    },
    /// Removes a file. Answer `Done`.
    Unlink {
        /// Directory.
        parent: u64,
        /// Name.
        name: Name,
    },
    /// Removes an empty directory. Answer `Done`.
    Rmdir {
        /// Directory.
        parent: u64,
        /// Name.
        name: Name,
    },
    /// Answer `Done`.
    Rename {
        /// Old directory.
        parent: u64,
        /// Old name.
        name: Name,
        /// New directory.
        new_parent: u64,
        /// New name.
        new_name: Name,
        /// [`crate::tree::NOREPLACE`], [`crate::tree::EXCHANGE`].
        flags: u32,
    },
    /// Sets a file's size. Answer `Seen`.
    Truncate {
        /// The file.
        inode: u64,
        /// Bytes.
        size: u64,
    },
    /// Opens a file, writes up to `end`, and closes it. Answer `Done`.
    Write {
        /// The file.
        inode: u64,
        /// One past the last byte.
        end: u64,
    },
    /// What a name is. Answer `Seen`.
    Lookup {
        /// Directory.
        parent: u64,
        /// Name.
        name: Name,
    },
    /// Attributes. Answer `Seen`.
    Stat {
        /// The inode.
        inode: u64,
    },
    /// All names of a directory, in one page. Answer `Names`.
    List {
        /// The directory.
        inode: u64,
    },
}

/// Attributes that are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The inode.
    pub inode: u64,
    /// Its kind.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// Links; 0: it has no name any more.
    pub links: u32,
}

/// Why something was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// ENOENT.
    NotFound,
    /// EEXIST.
    Exists,
    /// ENOTDIR.
    NotDirectory,
    /// EISDIR.
    IsDirectory,
    /// ENOTEMPTY.
    NotEmpty,
    /// EINVAL.
    Invalid,
    /// ESTALE.
    Stale,
}

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Done.
    Done,
    /// An inode.
    Seen(Seen),
    /// A file, opened.
    Opened {
        /// The file.
        seen: Seen,
        /// It was made.
        created: bool,
    },
    /// All names, in their order.
    Names(Vec<(Name, Seen)>),
    /// Refused.
    Failed(Failure),
    /// Something that is never right: a name that nobody made.
    Odd(String),
}

/// A line of a history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// An independent tree: nothing moves between two of them.
    Tree {
        /// Which.
        tree: u32,
        /// Its roots: empty directories that stay.
        roots: Vec<u64>,
    },
    /// An operation.
    Did(Did),
}

/// An operation of a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Did {
    /// In which tree.
    pub tree: u32,
    /// By whom.
    pub client: String,
    /// Nanoseconds since the history began.
    pub called: u64,
    /// What was asked.
    pub operation: Operation,
    /// When it returned, and with what; `None`: nobody knows what became of it.
    pub returned: Option<(u64, Answer)>,
}

/// A line that is none.
#[derive(Debug)]
pub struct Malformed {
    /// From 1.
    pub line: usize,
    /// What is wrong with it.
    pub why: String,
}

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "line {}: {}", self.line, self.why)
    }
}

impl std::error::Error for Malformed {}

/// One tree's part of a history.
#[derive(Clone, Debug, Default)]
pub struct Part {
    /// Its roots.
    pub roots: Vec<u64>,
    /// Who asked, in the order of `operations`.
    pub clients: Vec<String>,
    /// What was asked.
    pub operations: Vec<Timed<Operation, Answer>>,
}

/// A history, by tree.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// The trees.
    pub trees: BTreeMap<u32, Part>,
}

/// What a check came to.
#[derive(Clone, Debug, Serialize)]
pub struct Checked {
    /// Whether every tree's operations have an order.
    pub linearizable: bool,
    /// Operations.
    pub operations: usize,
    /// Of these, without an answer.
    pub unknown: usize,
    /// Trees.
    pub partitions: usize,
    /// Operations in the largest.
    pub longest: usize,
    /// Operations of one tree under way at once, at most, those without an answer aside.
    pub concurrent: usize,
    /// Configurations that the search entered.
    pub configurations: usize,
    /// Trees that were given up, the limit being reached: nothing is known of them.
    pub gave_up: Vec<u32>,
    /// Of each tree without an order: why there is none.
    pub violations: Vec<String>,
}

impl History {
    /// A history of these lines.
    pub fn new(lines: impl IntoIterator<Item = Line>) -> Self {
        let mut history = Self::default();
        for line in lines {
            history.add(line);
        }
        history
    }

    fn add(&mut self, line: Line) {
        match line {
            Line::Tree { tree, roots } => self.trees.entry(tree).or_default().roots.extend(roots),
            Line::Did(Did { tree, client, called, operation, returned }) => {
                let part = self.trees.entry(tree).or_default();
                part.clients.push(client);
                part.operations.push(Timed { called, operation, returned });
            }
        }
    }

    /// Reads one.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let mut history = Self::default();
        for (n, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            let parsed = serde_json::from_str(line);
            history.add(parsed.map_err(|e| Malformed { line: n + 1, why: e.to_string() })?);
        }
        Ok(history)
    }

    /// Checks every tree.
    pub fn check(&self, limit: Limit) -> Checked {
        let mut checked = Checked {
            linearizable: true,
            operations: self.trees.values().map(|p| p.operations.len()).sum(),
            unknown: self.trees.values().map(Part::unknown).sum(),
            partitions: self.trees.len(),
            longest: self.trees.values().map(|p| p.operations.len()).max().unwrap_or(0),
            concurrent: self.trees.values().map(Part::concurrent).max().unwrap_or(0),
            configurations: 0,
            gave_up: Vec::new(),
            violations: Vec::new(),
        };
        for (id, part) in &self.trees {
            let (verdict, tree) = part.check(limit);
            checked.linearizable &= matches!(verdict, Verdict::Linearizable { .. });
            checked.configurations += match &verdict {
                Verdict::Linearizable { configurations, .. }
                | Verdict::GaveUp { configurations } => *configurations,
                Verdict::Not(stuck) => stuck.configurations,
            };
            match verdict {
                Verdict::Linearizable { .. } => {}
                Verdict::GaveUp { .. } => checked.gave_up.push(*id),
                Verdict::Not(stuck) => {
                    let told = explain::explain(part, &tree, &stuck);
                    checked.violations.push(format!("tree {id}: {told}"));
                }
            }
        }
        checked
    }
}

impl Part {
    /// Looks for an order.
    pub fn check(&self, limit: Limit) -> (Verdict<crate::tree::State>, Tree) {
        let answers = self.operations.iter().enumerate();
        let answers = answers.filter_map(|(n, o)| Some((n, &o.operation, &o.returned.as_ref()?.1)));
        let tree = Tree::new(&self.roots, answers);
        (search(&tree, &self.operations, limit), tree)
    }

    fn unknown(&self) -> usize {
        self.operations.iter().filter(|o| o.returned.is_none()).count()
    }

    fn concurrent(&self) -> usize {
        let mut moments = Vec::new();
        for o in &self.operations {
            if let Some((until, _)) = o.returned {
                moments.extend([(o.called, 0), (until, 1)]);
            }
        }
        moments.sort_unstable();
        let (mut now, mut most) = (0usize, 0);
        for (_, end) in moments {
            now = if end == 1 { now.saturating_sub(1) } else { now + 1 };
            most = most.max(now);
        }
        most
    }
}
