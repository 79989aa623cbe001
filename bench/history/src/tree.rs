//! A small directory tree, as the metadata plane promises it: what each operation does and answers.
//!
//! Checked is what docs/SEMANTICS.md, docs/PROTOCOL.md and `Query` promise, no more:
//!
//! - Every operation on names has its effect at one moment, whole, and once however often it was asked again.
//!   A file is there for everybody when its create has returned, also if it is closed later (R49).
//! - Look-ups, attributes and one page of a directory are linearizable reads.
//! - Inode numbers are not used again. An unlinked file may live on (somebody has it open): its size is not followed.
//! - Which of several reasons a refusal names is left open, as are size and links of directories, and all times.
//!
//! An operation whose answer nobody saw may have made a file of a number that nobody knows yet: it is called by the
//! operation's number until somebody sees it.

use crate::history::{Answer, Failure, Kind, Name, Operation, Seen};
use crate::search::{Specification, Step};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// An inode, by the number that the system gave it or by the operation that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Inode {
    /// As seen.
    Known(u64),
    /// Made by the operation of this number, and not seen yet.
    MadeBy(usize),
}

/// What is known of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// Its kind.
    pub kind: Kind,
    /// Bytes of a file.
    pub size: u64,
}

/// All names and inodes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct State {
    /// Those that have a name, and the roots.
    pub nodes: BTreeMap<Inode, Node>,
    /// By directory and name.
    pub entries: BTreeMap<(Inode, Name), Inode>,
    /// Numbers of inodes that were made without an answer, and seen.
    pub told: BTreeSet<u64>,
}

/// One tree: its roots, which nobody removes, and who made which inode.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    roots: Vec<u64>,
    makers: HashMap<u64, usize>,
}

/// What an operation comes to.
enum Effect {
    /// Refused, for one of these reasons.
    Refused(Vec<Failure>),
    /// Nothing is changed by it, and this inode is what it is about; none: it has no name any more.
    Shows(Option<Inode>),
    /// This is listed.
    Lists(Inode),
    /// A new inode of this kind is put there.
    Makes(Kind, (Inode, Name)),
    /// The tree is this afterwards, and what was asked about is this.
    Becomes(State, Option<Inode>),
}

impl State {
    fn node(&self, i: Inode) -> Option<Node> {
        self.nodes.get(&i).copied()
    }

    fn is_dir(&self, i: Inode) -> bool {
        self.node(i).is_some_and(|n| n.kind == Kind::Directory)
    }

    fn entry(&self, dir: Inode, name: Name) -> Option<Inode> {
        self.entries.get(&(dir, name)).copied()
    }

    fn listed(&self, dir: Inode) -> impl Iterator<Item = (Name, Inode)> {
        let all = self.entries.range((dir, Name(0))..=(dir, Name(u16::MAX)));
        all.map(|((_, name), inode)| (*name, *inode))
    }

    fn is_empty(&self, dir: Inode) -> bool {
        self.listed(dir).next().is_none()
    }

    fn parent(&self, of: Inode) -> Option<Inode> {
        self.entries.iter().find(|(_, i)| **i == of).map(|((dir, _), _)| *dir)
    }

    /// Whether `dir` is `of` or below it.
    fn is_within(&self, dir: Inode, of: Inode) -> bool {
        let mut at = Some(dir);
        while let Some(here) = at {
            if here == of {
                return true;
            }
            at = self.parent(here);
        }
        false
    }

    /// Why `dir` is none.
    fn not_a_directory(&self, dir: Inode) -> Vec<Failure> {
        match self.node(dir) {
            None => vec![Failure::Stale, Failure::NotFound],
            Some(Node { kind: Kind::Directory, .. }) => Vec::new(),
            Some(_) => vec![Failure::NotDirectory],
        }
    }

    fn remove(&mut self, place: (Inode, Name)) {
        if let Some(gone) = self.entries.remove(&place) {
            self.nodes.remove(&gone);
        }
    }

    /// The same with an inode's number known.
    fn with_number(&self, made_by: Inode, number: u64) -> Self {
        let known = |i: Inode| if i == made_by { Inode::Known(number) } else { i };
        let mut told = self.told.clone();
        told.insert(number);
        Self {
            nodes: self.nodes.iter().map(|(i, n)| (known(*i), *n)).collect(),
            entries: self.entries.iter().map(|((d, n), i)| ((known(*d), *n), known(*i))).collect(),
            told,
        }
    }

    fn effect(&self, operation: &Operation) -> Effect {
        let known = Inode::Known;
        match *operation {
            Operation::Create { parent, name, exclusive } => {
                let dir = known(parent);
                let mut why = self.not_a_directory(dir);
                let there = self.entry(dir, name);
                match there {
                    Some(_) if exclusive => why.push(Failure::Exists),
                    Some(i) if self.is_dir(i) => why.push(Failure::IsDirectory),
                    _ => {}
                }
                match there {
                    _ if !why.is_empty() => Effect::Refused(why),
                    Some(i) => Effect::Shows(Some(i)),
                    None => Effect::Makes(Kind::File, (dir, name)),
                }
            }
            Operation::Mkdir { parent, name } => {
                let dir = known(parent);
                let mut why = self.not_a_directory(dir);
                if self.entry(dir, name).is_some() {
                    why.push(Failure::Exists);
                }
                match why.is_empty() {
                    true => Effect::Makes(Kind::Directory, (dir, name)),
                    false => Effect::Refused(why),
                }
            }
            Operation::Unlink { parent, name } => self.removal(known(parent), name, Kind::File),
            Operation::Rmdir { parent, name } => self.removal(known(parent), name, Kind::Directory),
            Operation::Rename { parent, name, new_parent, new_name, flags } => {
                self.rename((known(parent), name), (known(new_parent), new_name), flags)
            }
            Operation::Truncate { inode, size } => self.resize(known(inode), |_| size),
            Operation::Write { inode, end } => self.resize(known(inode), |size| size.max(end)),
            Operation::Lookup { parent, name } => {
                let dir = known(parent);
                let mut why = self.not_a_directory(dir);
                let there = self.entry(dir, name);
                if there.is_none() {
                    why.push(Failure::NotFound);
                }
                match why.is_empty() {
                    true => Effect::Shows(there),
                    false => Effect::Refused(why),
                }
            }
            Operation::Stat { inode } => {
                Effect::Shows(self.node(known(inode)).map(|_| known(inode)))
            }
            Operation::List { inode } => match self.not_a_directory(known(inode)) {
                why if why.is_empty() => Effect::Lists(known(inode)),
                why => Effect::Refused(why),
            },
        }
    }

    fn resize(&self, inode: Inode, size: impl Fn(u64) -> u64) -> Effect {
        match self.node(inode) {
            None => Effect::Shows(None),
            Some(n) if n.kind == Kind::Directory => Effect::Refused(vec![Failure::IsDirectory]),
            Some(n) => {
                let node = Node { size: size(n.size), ..n };
                if node == n {
                    return Effect::Shows(Some(inode));
                }
                let mut after = self.clone();
                after.nodes.insert(inode, node);
                Effect::Becomes(after, Some(inode))
            }
        }
    }

    fn removal(&self, dir: Inode, name: Name, kind: Kind) -> Effect {
        let mut why = self.not_a_directory(dir);
        match self.entry(dir, name) {
            None => why.push(Failure::NotFound),
            Some(i) if self.is_dir(i) && kind == Kind::File => why.push(Failure::IsDirectory),
            Some(i) if !self.is_dir(i) && kind == Kind::Directory => {
                why.push(Failure::NotDirectory)
            }
            Some(i) if !self.is_empty(i) => why.push(Failure::NotEmpty),
            Some(_) => {}
        }
        if !why.is_empty() {
            return Effect::Refused(why);
        }
        let mut after = self.clone();
        after.remove((dir, name));
        Effect::Becomes(after, None)
    }

    fn rename(&self, from: (Inode, Name), to: (Inode, Name), flags: u32) -> Effect {
        let (no_replace, exchange) = (flags & NOREPLACE != 0, flags & EXCHANGE != 0);
        let mut why = self.not_a_directory(from.0);
        why.extend(self.not_a_directory(to.0));
        let source = self.entry(from.0, from.1);
        let target = self.entry(to.0, to.1);
        if source.is_none() || (target.is_none() && exchange) {
            why.push(Failure::NotFound);
        }
        if target.is_some() && no_replace {
            why.push(Failure::Exists);
        }
        if let Some(s) = source {
            if self.is_dir(s) && self.is_within(to.0, s) {
                why.push(Failure::Invalid);
            }
            if let Some(t) = target.filter(|t| *t != s) {
                let within = self.is_dir(t) && self.is_within(from.0, t);
                match (exchange, self.is_dir(s), self.is_dir(t)) {
                    (true, ..) if within => why.push(Failure::Invalid),
                    (true, ..) => {}
                    (false, true, false) => why.push(Failure::NotDirectory),
                    (false, false, true) => {
                        why.push(Failure::IsDirectory);
                        if within {
                            why.push(Failure::NotEmpty);
                        }
                    }
                    (false, ..) if !self.is_empty(t) => why.push(Failure::NotEmpty),
                    (false, ..) => {}
                }
            }
        }
        let Some(source) = source.filter(|_| why.is_empty()) else { return Effect::Refused(why) };
        let mut after = self.clone();
        match target {
            Some(t) if t == source => {}
            Some(t) if exchange => {
                after.entries.insert(from, t);
                after.entries.insert(to, source);
            }
            _ => {
                after.remove(to);
                after.entries.remove(&from);
                after.entries.insert(to, source);
            }
        }
        Effect::Becomes(after, None)
    }
}

/// A rename must not replace anything.
pub const NOREPLACE: u32 = 1;
/// A rename exchanges two names.
pub const EXCHANGE: u32 = 2;

/// Whether the system's description of an inode is true, its number aside.
fn is_described(node: Node, seen: &Seen) -> bool {
    let of_file = node.kind == Kind::Directory || (seen.size == node.size && seen.links == 1);
    node.kind == seen.kind && of_file
}

impl Tree {
    /// The tree below `roots`, for a history in which the operation of each number gave that answer.
    pub fn new<'a>(
        roots: &[u64],
        answers: impl IntoIterator<Item = (usize, &'a Operation, &'a Answer)>,
    ) -> Self {
        let mut makers = HashMap::new();
        for (number, operation, answer) in answers {
            let made = match (operation, answer) {
                (_, Answer::Opened { seen, created: true }) => Some(seen.inode),
                (Operation::Mkdir { .. }, Answer::Seen(seen)) => Some(seen.inode),
                _ => None,
            };
            if let Some(made) = made {
                // A second one of that number finds that it was not the first.
                makers.entry(made).or_insert(number);
            }
        }
        Self { roots: roots.to_vec(), makers }
    }

    /// The state in which `inode` is what was seen, if that can be: its number may become known by it.
    fn shown(&self, state: &State, inode: Inode, seen: &Seen) -> Step<State> {
        if !state.node(inode).is_some_and(|n| is_described(n, seen)) {
            return Step::Impossible;
        }
        match inode {
            Inode::Known(number) if number == seen.inode => Step::Same,
            Inode::Known(_) => Step::Impossible,
            Inode::MadeBy(_) if !self.is_free(state, seen.inode) => Step::Impossible,
            Inode::MadeBy(_) => Step::To(state.with_number(inode, seen.inode)),
        }
    }

    /// Whether it can be the number of an inode that was made without an answer.
    fn is_free(&self, state: &State, number: u64) -> bool {
        let known = self.makers.contains_key(&number) || self.roots.contains(&number);
        !known && !state.told.contains(&number)
    }

    fn listed(&self, state: &State, dir: Inode, names: &[(Name, Seen)]) -> Step<State> {
        if !state.listed(dir).map(|(name, _)| name).eq(names.iter().map(|(name, _)| *name)) {
            return Step::Impossible;
        }
        let mut after: Option<State> = None;
        for (name, seen) in names {
            let now = after.as_ref().unwrap_or(state);
            // A directory that is listed is known, and stays what it is called.
            let Some(inode) = now.entry(dir, *name) else { return Step::Impossible };
            match self.shown(now, inode, seen) {
                Step::Impossible => return Step::Impossible,
                Step::Same => {}
                Step::To(next) => after = Some(next),
            }
        }
        after.map_or(Step::Same, Step::To)
    }
}

/// An unlinked file may live on, or not.
fn is_of_unlinked(operation: &Operation, answer: &Answer) -> bool {
    match answer {
        Answer::Failed(why) => matches!(why, Failure::Stale | Failure::NotFound),
        Answer::Seen(seen) => seen.links == 0,
        Answer::Done => matches!(operation, Operation::Write { .. }),
        _ => false,
    }
}

impl Specification for Tree {
    type State = State;
    type Operation = Operation;
    type Answer = Answer;

    fn initial(&self) -> State {
        let root = |r: &u64| (Inode::Known(*r), Node { kind: Kind::Directory, size: 0 });
        State { nodes: self.roots.iter().map(root).collect(), ..State::default() }
    }

    fn is_read(&self, operation: &Operation, answer: &Answer) -> bool {
        let reads = matches!(
            operation,
            Operation::Lookup { .. } | Operation::Stat { .. } | Operation::List { .. }
        );
        reads || matches!(answer, Answer::Failed(_) | Answer::Opened { created: false, .. })
    }

    fn step(
        &self,
        state: &State,
        number: usize,
        operation: &Operation,
        answer: Option<&Answer>,
    ) -> Step<State> {
        let put = |kind: Kind, place: (Inode, Name), inode: Inode| {
            let mut after = state.clone();
            after.nodes.insert(inode, Node { kind, size: 0 });
            after.entries.insert(place, inode);
            Step::To(after)
        };
        let made = |seen: &Seen, kind: Kind, place| {
            let fresh = self.makers.get(&seen.inode) == Some(&number);
            let fresh = fresh && !state.nodes.contains_key(&Inode::Known(seen.inode));
            match fresh && is_described(Node { kind, size: 0 }, seen) {
                true => put(kind, place, Inode::Known(seen.inode)),
                false => Step::Impossible,
            }
        };
        match (state.effect(operation), answer) {
            // Nobody saw an answer: whatever it did.
            (Effect::Makes(kind, place), None) => put(kind, place, Inode::MadeBy(number)),
            (Effect::Becomes(after, _), None) if after != *state => Step::To(after),
            (_, None) => Step::Same,
            (Effect::Refused(why), Some(Answer::Failed(told))) if why.contains(told) => Step::Same,
            (Effect::Shows(None), Some(a)) if is_of_unlinked(operation, a) => Step::Same,
            (Effect::Shows(Some(i)), Some(Answer::Seen(seen))) => self.shown(state, i, seen),
            (Effect::Shows(Some(i)), Some(Answer::Opened { seen, created: false })) => {
                self.shown(state, i, seen)
            }
            (Effect::Shows(Some(_)), Some(Answer::Done)) => match operation {
                Operation::Write { .. } => Step::Same,
                _ => Step::Impossible,
            },
            (Effect::Lists(dir), Some(Answer::Names(names))) => self.listed(state, dir, names),
            (Effect::Makes(kind, place), Some(Answer::Opened { seen, created: true })) => {
                made(seen, kind, place)
            }
            (Effect::Makes(kind @ Kind::Directory, place), Some(Answer::Seen(seen))) => {
                made(seen, kind, place)
            }
            (Effect::Becomes(after, Some(i)), Some(Answer::Seen(seen))) => {
                match self.shown(&after, i, seen) {
                    Step::Same => Step::To(after),
                    other => other,
                }
            }
            (Effect::Becomes(after, _), Some(Answer::Done)) => match operation {
                Operation::Truncate { .. } => Step::Impossible,
                // A rename of a name to itself.
                _ if after == *state => Step::Same,
                _ => Step::To(after),
            },
            _ => Step::Impossible,
        }
    }
}

impl Tree {
    /// Carries an operation out: its answer, and the state afterwards. `fresh`: the number of an inode that it makes.
    pub fn carry_out(state: &State, operation: &Operation, fresh: u64) -> (Answer, State) {
        let seen = |state: &State, inode: Inode| {
            let (Inode::Known(number), Some(node)) = (inode, state.node(inode)) else {
                return Seen { inode: 0, kind: Kind::File, size: 0, links: 0 };
            };
            Seen { inode: number, kind: node.kind, size: node.size, links: 1 }
        };
        let opens = matches!(operation, Operation::Create { .. });
        let is_write = matches!(operation, Operation::Write { .. });
        match state.effect(operation) {
            Effect::Refused(why) => {
                let first = why.first().copied().unwrap_or(Failure::Invalid);
                (Answer::Failed(first), state.clone())
            }
            Effect::Shows(None) => (Answer::Failed(Failure::Stale), state.clone()),
            Effect::Shows(Some(_)) if is_write => (Answer::Done, state.clone()),
            Effect::Shows(Some(i)) if opens => {
                (Answer::Opened { seen: seen(state, i), created: false }, state.clone())
            }
            Effect::Shows(Some(i)) => (Answer::Seen(seen(state, i)), state.clone()),
            Effect::Lists(dir) => {
                let names = state.listed(dir).map(|(name, i)| (name, seen(state, i))).collect();
                (Answer::Names(names), state.clone())
            }
            Effect::Makes(kind, place) => {
                let mut after = state.clone();
                let inode = Inode::Known(fresh);
                after.nodes.insert(inode, Node { kind, size: 0 });
                after.entries.insert(place, inode);
                let seen = seen(&after, inode);
                match opens {
                    true => (Answer::Opened { seen, created: true }, after),
                    false => (Answer::Seen(seen), after),
                }
            }
            Effect::Becomes(after, Some(i)) if !is_write => (Answer::Seen(seen(&after, i)), after),
            Effect::Becomes(after, _) => (Answer::Done, after),
        }
    }
}
