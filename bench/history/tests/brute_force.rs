//! The search says what looking at every order says, on thousands of small histories; and what really ran as the
//! specification says has an order.

use ebb_history::history::{Answer, Failure, Kind, Name, Operation, Part, Seen};
use ebb_history::search::{Limit, Specification, Step, Timed, Verdict, search};
use ebb_history::tree::{EXCHANGE, NOREPLACE, State, Tree};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const ROOTS: [u64; 2] = [1, 2];

/// Whether any order of `left`, after `state`, is one: without memory, without shortcuts.
fn any_order(
    tree: &Tree,
    operations: &[Timed<Operation, Answer>],
    state: &State,
    left: &mut Vec<usize>,
) -> bool {
    let until = |i: &usize| operations[*i].returned.as_ref().map(|r| r.0);
    let Some(bound) = left.iter().filter_map(until).min() else { return true };
    for at in 0..left.len() {
        let i = left[at];
        let o = &operations[i];
        if o.called > bound {
            continue;
        }
        let next = match tree.step(state, i, &o.operation, o.returned.as_ref().map(|r| &r.1)) {
            Step::Impossible => continue,
            Step::Same => state.clone(),
            Step::To(next) => next,
        };
        left.remove(at);
        let found = any_order(tree, operations, &next, left);
        left.insert(at, i);
        if found {
            return true;
        }
    }
    false
}

/// Inodes that somebody may have heard of.
#[derive(Default)]
struct Heard(Vec<(u64, Kind)>);

impl Heard {
    fn hear(&mut self, answer: &Answer) {
        let seen: Vec<Seen> = match answer {
            Answer::Seen(s) | Answer::Opened { seen: s, .. } => vec![*s],
            Answer::Names(all) => all.iter().map(|(_, s)| *s).collect(),
            _ => Vec::new(),
        };
        for s in seen {
            if !self.0.contains(&(s.inode, s.kind)) {
                self.0.push((s.inode, s.kind));
            }
        }
    }

    fn any(&self, rng: &mut StdRng, kind: Kind) -> Option<u64> {
        let all: Vec<_> = self.0.iter().filter(|h| h.1 == kind).collect();
        (!all.is_empty()).then(|| all[rng.random_range(0..all.len())].0)
    }
}

fn any_operation(rng: &mut StdRng, heard: &Heard) -> Operation {
    let name = |rng: &mut StdRng| Name(rng.random_range(0..2));
    let dir = |rng: &mut StdRng| {
        let made = heard.any(rng, Kind::Directory).filter(|_| rng.random_bool(0.3));
        made.unwrap_or(ROOTS[rng.random_range(0..2)])
    };
    let (parent, name_) = (dir(rng), name(rng));
    let file = heard.any(rng, Kind::File);
    match (rng.random_range(0..11), file) {
        (0..=1, _) => Operation::Create { parent, name: name_, exclusive: rng.random_bool(0.5) },
        (2, _) => Operation::Mkdir { parent, name: name_ },
        (3, _) => Operation::Unlink { parent, name: name_ },
        (4, _) => Operation::Rmdir { parent, name: name_ },
        (5..=6, _) => {
            let flags = [0, 0, NOREPLACE, EXCHANGE][rng.random_range(0..4)];
            let (new_parent, new_name) = (dir(rng), name(rng));
            Operation::Rename { parent, name: name_, new_parent, new_name, flags }
        }
        (7, Some(inode)) => Operation::Truncate { inode, size: rng.random_range(0..3) },
        (8, Some(inode)) => Operation::Stat { inode },
        (9, Some(inode)) => Operation::Write { inode, end: rng.random_range(1..4) },
        (8..=9, _) => Operation::List { inode: parent },
        _ => Operation::Lookup { parent, name: name_ },
    }
}

/// Runs operations of concurrent clients: each has its effect at some moment of its time. Some lose their answers;
/// of these some have their effect later, or never.
fn real_history(rng: &mut StdRng, operations: usize, clients: usize, lost: f64) -> Part {
    let mut part = Part { roots: ROOTS.to_vec(), ..Part::default() };
    let mut state = Tree::new(&ROOTS, []).initial();
    let mut heard = Heard::default();
    let mut fresh = 100;
    let mut now = 0;
    // Asked and not answered: the operation's place, and whether its effect is there.
    let mut under_way: Vec<(usize, Option<Answer>)> = Vec::new();
    let mut late: Vec<usize> = Vec::new();
    while part.operations.len() < operations || !under_way.is_empty() {
        now += 1;
        let more = part.operations.len() < operations && under_way.len() < clients;
        if more && (under_way.is_empty() || rng.random_bool(0.4)) {
            let operation = any_operation(rng, &heard);
            under_way.push((part.operations.len(), None));
            part.clients.push(String::new());
            part.operations.push(Timed { called: now, operation, returned: None });
            continue;
        }
        let mut run = |part: &Part, i: usize| {
            fresh += 1;
            let (answer, after) = Tree::carry_out(&state, &part.operations[i].operation, fresh);
            state = after;
            answer
        };
        if !late.is_empty() && rng.random_bool(0.2) {
            let i = late.swap_remove(rng.random_range(0..late.len()));
            run(&part, i);
            continue;
        }
        let at = rng.random_range(0..under_way.len());
        match under_way[at].clone() {
            (i, None) if rng.random_bool(lost / 2.0) => {
                under_way.swap_remove(at);
                if rng.random_bool(0.7) {
                    late.push(i);
                }
            }
            (i, None) => under_way[at].1 = Some(run(&part, i)),
            (_, Some(_)) if rng.random_bool(lost / 2.0) => {
                under_way.swap_remove(at);
            }
            (i, Some(answer)) => {
                heard.hear(&answer);
                part.operations[i].returned = Some((now, answer));
                under_way.swap_remove(at);
            }
        }
    }
    part
}

/// Makes something of it wrong, maybe.
fn mutate(rng: &mut StdRng, part: &mut Part) {
    let n = part.operations.len();
    let (i, j) = (rng.random_range(0..n), rng.random_range(0..n));
    match rng.random_range(0..7) {
        // Another one's answer.
        0 => {
            let other = part.operations[j].returned.as_ref().map(|r| r.1.clone());
            if let (Some(r), Some(other)) = (&mut part.operations[i].returned, other) {
                r.1 = other;
            }
        }
        // Another moment.
        1 | 2 => {
            let o = &mut part.operations[i];
            let long = o.returned.as_ref().map_or(1, |r| r.0 - o.called);
            o.called = rng.random_range(0..n as u64 * 3);
            if let Some(r) = &mut o.returned {
                r.0 = o.called + rng.random_range(0..=long);
            }
        }
        // Less time.
        3 => {
            let o = &mut part.operations[i];
            if let Some(r) = &mut o.returned {
                r.0 = rng.random_range(o.called..=r.0);
            }
        }
        // A little wrong.
        4 => {
            let why = [Failure::NotFound, Failure::Exists, Failure::NotEmpty, Failure::Stale];
            let why = why[rng.random_range(0..4)];
            match &mut part.operations[i].returned {
                Some((_, Answer::Seen(s) | Answer::Opened { seen: s, .. })) => {
                    match rng.random_bool(0.5) {
                        true => s.size ^= 1,
                        false => s.inode += 1,
                    }
                }
                Some((_, Answer::Names(all))) if !all.is_empty() => {
                    all.pop();
                }
                Some((_, a @ Answer::Done)) => *a = Answer::Failed(why),
                Some((_, a @ Answer::Failed(_))) => *a = Answer::Done,
                _ => {}
            }
        }
        // It never was.
        5 if n > 1 => {
            part.operations.remove(i);
            part.clients.pop();
        }
        // Twice.
        _ => {
            let again = part.operations[i].clone();
            part.operations.push(again);
            part.clients.push(String::new());
        }
    }
}

fn tree_of(part: &Part) -> Tree {
    let answered = part.operations.iter().enumerate();
    let answered = answered.filter_map(|(n, o)| Some((n, &o.operation, &o.returned.as_ref()?.1)));
    Tree::new(&part.roots, answered)
}

/// What each says.
fn both(part: &Part) -> (bool, bool) {
    let tree = tree_of(part);
    let found = match search(&tree, &part.operations, Limit::default()) {
        Verdict::Linearizable { order, .. } => {
            is_an_order(&tree, part, &order);
            true
        }
        Verdict::Not(_) => false,
        Verdict::GaveUp { .. } => panic!("a small history is given up"),
    };
    let mut all = (0..part.operations.len()).collect();
    (found, any_order(&tree, &part.operations, &tree.initial(), &mut all))
}

/// The order that was found is one: each answer is right, and nothing comes before what had returned before its call.
fn is_an_order(tree: &Tree, part: &Part, order: &[usize]) {
    let mut state = tree.initial();
    let mut latest_call = 0;
    for &i in order {
        let o = &part.operations[i];
        latest_call = latest_call.max(o.called);
        assert!(o.returned.as_ref().is_none_or(|r| r.0 >= latest_call), "an order against time");
        match tree.step(&state, i, &o.operation, o.returned.as_ref().map(|r| &r.1)) {
            Step::Impossible => panic!("an order with a wrong answer"),
            Step::Same => {}
            Step::To(next) => state = next,
        }
    }
    let mut inside = vec![false; part.operations.len()];
    for &i in order {
        assert!(!std::mem::replace(&mut inside[i], true), "an operation twice");
    }
    for (o, inside) in part.operations.iter().zip(inside) {
        assert!(inside || o.returned.is_none(), "an answered operation is not in the order");
    }
}

fn seeds(n: u64) -> Vec<u64> {
    match std::env::var("EBB_SEED").ok().and_then(|s| s.parse().ok()) {
        Some(seed) => vec![seed],
        None => (0..n).collect(),
    }
}

#[test]
fn the_search_says_what_all_orders_say() {
    let (mut good, mut bad) = (0, 0);
    for seed in seeds(20_000) {
        let mut rng = StdRng::seed_from_u64(seed);
        let size = rng.random_range(2..=7);
        let clients = rng.random_range(1..=4);
        let lost = [0.0, 0.2, 0.6][rng.random_range(0..3)];
        let mut part = real_history(&mut rng, size, clients, lost);
        for _ in 0..rng.random_range(0..4) {
            mutate(&mut rng, &mut part);
        }
        let (found, exists) = both(&part);
        assert_eq!(found, exists, "EBB_SEED={seed}: {:#?}", part.operations);
        *(if exists { &mut good } else { &mut bad }) += 1;
    }
    println!("{good} with an order, {bad} without");
    assert!(std::env::var("EBB_SEED").is_ok() || (good > 4_000 && bad > 4_000), "{good} {bad}");
}

#[test]
fn what_really_ran_has_an_order() {
    for seed in seeds(300) {
        let mut rng = StdRng::seed_from_u64(seed);
        let clients = rng.random_range(1..=8);
        let lost = [0.0, 0.01, 0.05][rng.random_range(0..3)];
        let part = real_history(&mut rng, 400, clients, lost);
        let tree = tree_of(&part);
        match search(&tree, &part.operations, Limit::default()) {
            Verdict::Linearizable { order, .. } => is_an_order(&tree, &part, &order),
            Verdict::Not(stuck) => {
                let why = ebb_history::explain::explain(&part, &tree, &stuck);
                panic!("EBB_SEED={seed}: {why}")
            }
            Verdict::GaveUp { configurations } => {
                panic!("EBB_SEED={seed}: gave up after {configurations}")
            }
        }
    }
}

#[test]
fn a_wrong_answer_in_a_long_history_is_found() {
    for seed in seeds(100) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut part = real_history(&mut rng, 400, 6, 0.0);
        // The inode that a read shows late in the history is one that nobody ever made.
        let shows = |o: &Timed<Operation, Answer>| {
            matches!(
                (&o.operation, &o.returned),
                (Operation::Lookup { .. }, Some((_, Answer::Seen(_))))
            )
        };
        let Some(at) = part.operations.iter().rposition(shows) else { continue };
        if let Some((_, Answer::Seen(seen))) = &mut part.operations[at].returned {
            seen.inode = 99_999;
        }
        let tree = tree_of(&part);
        let verdict = search(&tree, &part.operations, Limit::default());
        assert!(matches!(verdict, Verdict::Not(_)), "EBB_SEED={seed}: {verdict:?}");
    }
}
