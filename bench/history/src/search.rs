//! Is there an order of the operations, each at a moment between its call and its return, in which a sequential
//! object gives the answers that were given?
//!
//! Depth first over *configurations*: which operations are in the order so far, and the object's state after
//! them. Next in the order may be any operation that was called before every other one left returned. What makes
//! it fast enough:
//!
//! - A configuration that failed once is not entered again (Lowe). Remembered are 128 bits of each: two that
//!   agree by chance would make a false alarm, once in 10^26 searches of a million.
//! - A right answer that tells of no change, wherever it stands (reads, refusals), is taken at once, without looking
//!   back: it fits here, and whatever comes after does not see it. An operation that just happens to change nothing
//!   here is not such a one: it may be wanted later, where it does.
//! - Operations that returned first are tried first, those without an answer last.
//!
//! An operation without an answer may have its effect at any time after its call, or never.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

/// A sequential object.
pub trait Specification {
    /// What it is like between two operations.
    type State: Clone + Eq + Hash;
    /// What it is asked.
    type Operation;
    /// What it answers.
    type Answer;

    /// Before all operations.
    fn initial(&self) -> Self::State;

    /// What becomes of `state` by the operation of that number, if it gives that answer there. Without an
    /// answer: by whatever effect it has there.
    fn step(
        &self,
        state: &Self::State,
        number: usize,
        operation: &Self::Operation,
        answer: Option<&Self::Answer>,
    ) -> Step<Self::State>;

    /// Whether an operation that gives this answer changes nothing in any state.
    fn is_read(&self, operation: &Self::Operation, answer: &Self::Answer) -> bool;
}

/// What an operation does to a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<S> {
    /// It can't give that answer there.
    Impossible,
    /// It changes nothing.
    Same,
    /// It leads here.
    To(S),
}

/// An operation with its times, in any one unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timed<O, A> {
    /// Not before this it had an effect.
    pub called: u64,
    /// What was asked.
    pub operation: O,
    /// By when it had its effect, and the answer; `None`: nobody knows.
    pub returned: Option<(u64, A)>,
}

/// What a search may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// Configurations entered; each is remembered in 16 bytes.
    pub configurations_max: usize,
}

impl Default for Limit {
    fn default() -> Self {
        Self { configurations_max: 4_000_000 }
    }
}

/// How a search ended.
#[derive(Clone, Debug)]
pub enum Verdict<S> {
    /// There is an order: these operations, by their numbers. Those without an answer that are not in it had no
    /// effect.
    Linearizable {
        /// The order.
        order: Vec<usize>,
        /// Configurations entered.
        configurations: usize,
    },
    /// There is none.
    Not(Stuck<S>),
    /// The limit was reached first. Nothing is known.
    GaveUp {
        /// Configurations entered.
        configurations: usize,
    },
}

/// The longest order that was found.
#[derive(Clone, Debug)]
pub struct Stuck<S> {
    /// Operations in it, by their numbers.
    pub order: Vec<usize>,
    /// The state after it.
    pub state: S,
    /// Those that might come next; none of them can. The first had to.
    pub next: Vec<usize>,
    /// Configurations entered.
    pub configurations: usize,
}

/// Operations that are not in the order, by their calls: a list from which any can be taken, and put back in the
/// opposite order.
struct Left {
    after: Vec<usize>,
    before: Vec<usize>,
}

impl Left {
    /// All of `n`; `n` is the anchor.
    fn new(n: usize) -> Self {
        let after = (0..=n).map(|i| if i == n { 0 } else { i + 1 }).collect();
        let before = (0..=n).map(|i| if i == 0 { n } else { i - 1 }).collect();
        Self { after, before }
    }
    fn anchor(&self) -> usize {
        self.after.len() - 1
    }
    fn take(&mut self, i: usize) {
        let (before, after) = (self.before[i], self.after[i]);
        self.after[before] = after;
        self.before[after] = before;
    }
    fn put_back(&mut self, i: usize) {
        let (before, after) = (self.before[i], self.after[i]);
        self.after[before] = i;
        self.before[after] = i;
    }
}

/// A point of the search where something is to be chosen.
struct Choice<S> {
    state: S,
    /// Length of the order when it was reached.
    depth: usize,
    /// What may be next and changes something, the best last.
    candidates: Vec<usize>,
}

/// An operation of a specification, with its times.
type Of<P> = Timed<<P as Specification>::Operation, <P as Specification>::Answer>;

struct Search<'a, P: Specification> {
    spec: &'a P,
    /// By their calls, with their numbers.
    operations: Vec<(usize, &'a Of<P>)>,
    left: Left,
    /// Positions in `operations`.
    order: Vec<usize>,
    /// Answered operations that are not in the order.
    answered_left: usize,
    /// A sum of what is in the order.
    sum: u128,
    seen: HashSet<u128>,
    stuck: Option<(usize, Stuck<P::State>)>,
}

/// Looks for an order of `operations`.
pub fn search<P: Specification>(spec: &P, operations: &[Of<P>], limit: Limit) -> Verdict<P::State> {
    let mut by_call: Vec<_> = operations.iter().enumerate().collect();
    by_call.sort_by_key(|(_, o)| o.called);
    let mut search = Search {
        spec,
        left: Left::new(by_call.len()),
        answered_left: by_call.iter().filter(|(_, o)| o.returned.is_some()).count(),
        order: Vec::with_capacity(by_call.len()),
        operations: by_call,
        sum: 0,
        seen: HashSet::new(),
        stuck: None,
    };
    search.run(limit)
}

impl<P: Specification> Search<'_, P> {
    fn run(&mut self, limit: Limit) -> Verdict<P::State> {
        let mut configurations = 0;
        let mut choices: Vec<Choice<P::State>> = Vec::new();
        let mut entered = Some(self.spec.initial());
        loop {
            if let Some(state) = entered.take() {
                let depth = self.order.len();
                let candidates = self.settle(&state);
                if self.answered_left == 0 {
                    let order = self.order.iter().map(|i| self.operations[*i].0).collect();
                    return Verdict::Linearizable { order, configurations };
                }
                if candidates.is_empty() {
                    self.note_stuck(&state);
                }
                choices.push(Choice { state, depth, candidates });
            }
            let Some(choice) = choices.last_mut() else { break };
            let Some(next) = choice.candidates.pop() else {
                // Back to before this point, the step that led here included.
                let depth = choice.depth.saturating_sub(1);
                choices.pop();
                while self.order.len() > depth {
                    self.untake();
                }
                continue;
            };
            let state = match self.step(&choice.state, next) {
                Step::Impossible => continue,
                Step::Same => choice.state.clone(),
                Step::To(state) => state,
            };
            if !self.seen.insert((self.sum ^ mark(next)).wrapping_add(fingerprint(&state))) {
                continue;
            }
            if configurations == limit.configurations_max {
                return Verdict::GaveUp { configurations };
            }
            configurations += 1;
            self.take(next);
            entered = Some(state);
        }
        match self.stuck.take() {
            Some((_, stuck)) => Verdict::Not(Stuck { configurations, ..stuck }),
            // Every failed search was stuck somewhere.
            None => Verdict::GaveUp { configurations },
        }
    }

    fn step(&self, state: &P::State, i: usize) -> Step<P::State> {
        let (number, o) = self.operations[i];
        self.spec.step(state, number, &o.operation, o.returned.as_ref().map(|r| &r.1))
    }

    fn take(&mut self, i: usize) {
        self.left.take(i);
        self.order.push(i);
        self.sum ^= mark(i);
        self.answered_left -= usize::from(self.operations[i].1.returned.is_some());
    }

    fn untake(&mut self) {
        let Some(i) = self.order.pop() else { return };
        self.left.put_back(i);
        self.sum ^= mark(i);
        self.answered_left += usize::from(self.operations[i].1.returned.is_some());
    }

    /// Takes all that fits and changes nothing; gives what might be next, the best last.
    fn settle(&mut self, state: &P::State) -> Vec<usize> {
        loop {
            let (mut candidates, mut took) = (Vec::new(), false);
            let mut bound = u64::MAX;
            let mut i = self.left.after[self.left.anchor()];
            while i != self.left.anchor() {
                let o = self.operations[i].1;
                if o.called > bound {
                    break;
                }
                let step = self.step(state, i);
                match &o.returned {
                    Some((_, answer))
                        if step == Step::Same && self.spec.is_read(&o.operation, answer) =>
                    {
                        self.take(i);
                        took = true;
                    }
                    Some((until, _)) => {
                        bound = bound.min(*until);
                        if step != Step::Impossible {
                            candidates.push(i);
                        }
                    }
                    // Without an effect it needs no place.
                    None if matches!(step, Step::To(_)) => candidates.push(i),
                    None => {}
                }
                // What was taken still knows what comes after it.
                i = self.left.after[i];
            }
            if !took {
                let until = |i: &usize| self.operations[*i].1.returned.as_ref().map(|r| r.0);
                // Without an answer: before all others in this list, the latest call last.
                candidates.sort_by_key(|i| (until(i).is_some(), std::cmp::Reverse(until(i)), *i));
                return candidates;
            }
        }
    }

    /// Remembers the longest order: the one with the most answers in it.
    fn note_stuck(&mut self, state: &P::State) {
        if self.stuck.as_ref().is_some_and(|(left, _)| *left <= self.answered_left) {
            return;
        }
        let mut next = Vec::new();
        let mut bound = u64::MAX;
        let mut i = self.left.after[self.left.anchor()];
        while i != self.left.anchor() && self.operations[i].1.called <= bound {
            let until = self.operations[i].1.returned.as_ref().map_or(u64::MAX, |r| r.0);
            bound = bound.min(until);
            next.push((until, i));
            i = self.left.after[i];
        }
        next.sort_unstable();
        let number = |i: usize| self.operations[i].0;
        let stuck = Stuck {
            order: self.order.iter().map(|i| number(*i)).collect(),
            state: state.clone(),
            next: next.into_iter().map(|(_, i)| number(i)).collect(),
            configurations: 0,
        };
        self.stuck = Some((self.answered_left, stuck));
    }
}

/// 64 bits that look random (splitmix64's last step).
fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn wide(high: u64, low: u64) -> u128 {
    u128::from(high) << 64 | u128::from(low)
}

/// What an operation's being in the order adds to the sum.
fn mark(i: usize) -> u128 {
    const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;
    let i = i as u64 * 2 + 1;
    wide(mix(i.wrapping_mul(GAMMA)), mix((i + 1).wrapping_mul(GAMMA)))
}

fn fingerprint(state: &impl Hash) -> u128 {
    let half = |seed: u64| {
        let mut h = DefaultHasher::new();
        (seed, state).hash(&mut h);
        h.finish()
    };
    wide(half(1), half(2))
}
