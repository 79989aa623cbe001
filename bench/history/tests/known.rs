//! Histories of which a person can see whether they have an order.

use ebb_history::history::{Answer, Did, Failure, History, Kind, Line, Name, Operation, Seen};
use ebb_history::search::Limit;
use ebb_history::tree::EXCHANGE;

const ROOT: u64 = 1;
const OTHER: u64 = 2;
const N: Name = Name(0);
const M: Name = Name(1);

/// A history of one tree. Times are given by the tests.
#[derive(Default)]
struct Told(Vec<Line>);

impl Told {
    fn new() -> Self {
        Self(vec![Line::Tree { tree: 0, roots: vec![ROOT, OTHER] }])
    }
    fn did(self, called: u64, until: u64, operation: Operation, answer: Answer) -> Self {
        self.line(called, operation, Some((until, answer)))
    }
    fn asked(self, called: u64, operation: Operation) -> Self {
        self.line(called, operation, None)
    }
    fn line(mut self, called: u64, operation: Operation, returned: Option<(u64, Answer)>) -> Self {
        let client = format!("c{}", self.0.len());
        self.0.push(Line::Did(Did { tree: 0, client, called, operation, returned }));
        self
    }
    fn has_an_order(self) {
        let checked = History::new(self.0).check(Limit::default());
        assert!(checked.linearizable, "{}", checked.violations.join("\n"));
    }
    fn has_no_order(self) -> String {
        let checked = History::new(self.0).check(Limit::default());
        assert!(!checked.linearizable);
        assert!(checked.gave_up.is_empty());
        checked.violations.join("\n")
    }
}

fn file(inode: u64, size: u64) -> Seen {
    Seen { inode, kind: Kind::File, size, links: 1 }
}
fn directory(inode: u64) -> Seen {
    Seen { inode, kind: Kind::Directory, size: 0, links: 2 }
}
fn create(name: Name) -> Operation {
    Operation::Create { parent: ROOT, name, exclusive: true }
}
fn open_or_create(name: Name) -> Operation {
    Operation::Create { parent: ROOT, name, exclusive: false }
}
fn made(inode: u64) -> Answer {
    Answer::Opened { seen: file(inode, 0), created: true }
}
fn opened(inode: u64, size: u64) -> Answer {
    Answer::Opened { seen: file(inode, size), created: false }
}
fn look_up(name: Name) -> Operation {
    Operation::Lookup { parent: ROOT, name }
}
fn unlink(name: Name) -> Operation {
    Operation::Unlink { parent: ROOT, name }
}
fn mkdir(name: Name) -> Operation {
    Operation::Mkdir { parent: ROOT, name }
}
fn rename(name: Name, new_parent: u64, new_name: Name) -> Operation {
    Operation::Rename { parent: ROOT, name, new_parent, new_name, flags: 0 }
}
fn truncate(inode: u64, size: u64) -> Operation {
    Operation::Truncate { inode, size }
}
fn list(inode: u64) -> Operation {
    Operation::List { inode }
}
fn names(all: &[(Name, Seen)]) -> Answer {
    Answer::Names(all.to_vec())
}
fn seen(seen: Seen) -> Answer {
    Answer::Seen(seen)
}
fn refused(why: Failure) -> Answer {
    Answer::Failed(why)
}
const NOT_THERE: Answer = Answer::Failed(Failure::NotFound);

// -- good ones ---------------------------------------------------------------------

#[test]
fn one_after_the_other() {
    Told::new()
        .did(0, 1, look_up(N), NOT_THERE)
        .did(2, 3, create(N), made(10))
        .did(4, 5, look_up(N), seen(file(10, 0)))
        .did(6, 7, create(N), refused(Failure::Exists))
        .did(8, 9, truncate(10, 5), seen(file(10, 5)))
        .did(10, 11, open_or_create(N), opened(10, 5))
        .did(12, 13, rename(N, OTHER, M), Answer::Done)
        .did(14, 15, list(OTHER), names(&[(M, file(10, 5))]))
        .did(16, 17, list(ROOT), names(&[]))
        .did(18, 19, create(N), made(11))
        .did(20, 21, unlink(N), Answer::Done)
        .did(22, 23, Operation::Stat { inode: 11 }, refused(Failure::Stale))
        .did(24, 25, Operation::Write { inode: 10, end: 9 }, Answer::Done)
        .did(26, 27, Operation::Stat { inode: 10 }, seen(file(10, 9)))
        .has_an_order();
}

#[test]
fn what_overlaps_may_be_seen_or_not() {
    for answer in [NOT_THERE, seen(file(10, 0))] {
        Told::new().did(0, 10, create(N), made(10)).did(1, 9, look_up(N), answer).has_an_order();
    }
}

#[test]
fn of_two_exclusive_creates_one_is_refused() {
    Told::new()
        .did(0, 10, create(N), made(10))
        .did(1, 9, create(N), refused(Failure::Exists))
        .has_an_order();
}

#[test]
fn an_operation_without_an_answer_may_have_happened_or_not_or_later() {
    let told = || Told::new().asked(0, create(N)).did(5, 6, look_up(N), NOT_THERE);
    told().has_an_order();
    told().did(7, 8, look_up(N), NOT_THERE).has_an_order();
    // Nobody knew its number.
    told().did(7, 8, look_up(N), seen(file(77, 0))).has_an_order();
    told()
        .did(7, 8, look_up(N), seen(file(77, 0)))
        .did(9, 10, truncate(77, 3), seen(file(77, 3)))
        .did(11, 12, list(ROOT), names(&[(N, file(77, 3))]))
        .did(13, 14, unlink(N), Answer::Done)
        .did(15, 16, look_up(N), NOT_THERE)
        .has_an_order();
}

#[test]
fn directories_hold_names_and_move_with_them() {
    Told::new()
        .did(0, 1, mkdir(N), seen(directory(20)))
        .did(2, 3, Operation::Create { parent: 20, name: M, exclusive: true }, made(21))
        .did(4, 5, Operation::Rmdir { parent: ROOT, name: N }, refused(Failure::NotEmpty))
        .did(6, 7, rename(N, OTHER, N), Answer::Done)
        .did(8, 9, list(20), names(&[(M, file(21, 0))]))
        .did(10, 11, Operation::Unlink { parent: 20, name: M }, Answer::Done)
        .did(12, 13, Operation::Rmdir { parent: OTHER, name: N }, Answer::Done)
        .did(14, 15, list(20), refused(Failure::Stale))
        .has_an_order();
}

#[test]
fn an_exchange_is_one_step() {
    let exchange = Operation::Rename {
        parent: ROOT,
        name: N,
        new_parent: OTHER,
        new_name: M,
        flags: EXCHANGE,
    };
    let told = || {
        Told::new()
            .did(0, 1, create(N), made(10))
            .did(2, 3, Operation::Create { parent: OTHER, name: M, exclusive: true }, made(11))
            .did(4, 10, exchange, Answer::Done)
    };
    told()
        .did(5, 6, look_up(N), seen(file(11, 0)))
        .did(7, 8, list(OTHER), names(&[(M, file(10, 0))]))
        .has_an_order();
    told()
        .did(5, 6, look_up(N), seen(file(11, 0)))
        .did(7, 8, list(OTHER), names(&[(M, file(11, 0))]))
        .has_no_order();
}

#[test]
fn an_unlinked_file_may_live_on() {
    let told = || Told::new().did(0, 1, create(N), made(10)).did(2, 3, unlink(N), Answer::Done);
    let gone = Seen { links: 0, ..file(10, 7) };
    told().did(4, 5, Operation::Stat { inode: 10 }, seen(gone)).has_an_order();
    told().did(4, 5, Operation::Stat { inode: 10 }, seen(file(10, 0))).has_no_order();
}

// -- bad ones ------------------------------------------------------------------------

#[test]
fn a_stale_read_after_an_acked_write() {
    let told = Told::new()
        .did(0, 1, create(N), made(10))
        .did(2, 3, truncate(10, 5), seen(file(10, 5)))
        .did(4, 5, Operation::Stat { inode: 10 }, seen(file(10, 0)))
        .has_no_order();
    assert!(told.contains("✗ [0.000 to 0.000 ms] c3: stat 10 → 10 (0 bytes)"), "{told}");
    Told::new().did(0, 1, create(N), made(10)).did(2, 3, look_up(N), NOT_THERE).has_no_order();
    // What one reader saw, the next one sees: also while the write is under way.
    Told::new()
        .did(0, 10, create(N), made(10))
        .did(1, 2, look_up(N), seen(file(10, 0)))
        .did(3, 4, look_up(N), NOT_THERE)
        .has_no_order();
}

#[test]
fn a_lost_acked_create() {
    Told::new().did(0, 1, create(N), made(10)).did(2, 3, list(ROOT), names(&[])).has_no_order();
    Told::new().did(0, 1, create(N), made(10)).did(2, 3, create(N), made(11)).has_no_order();
}

#[test]
fn two_successful_exclusive_creates_at_once() {
    Told::new().did(0, 10, create(N), made(10)).did(1, 9, create(N), made(11)).has_no_order();
}

#[test]
fn an_unlink_that_succeeds_twice() {
    Told::new()
        .did(0, 1, create(N), made(10))
        .did(2, 10, unlink(N), Answer::Done)
        .did(3, 9, unlink(N), Answer::Done)
        .has_no_order();
}

#[test]
fn a_rename_seen_in_both_places_or_in_none() {
    let told =
        || Told::new().did(0, 1, create(N), made(10)).did(2, 10, rename(N, ROOT, M), Answer::Done);
    told().did(3, 4, list(ROOT), names(&[(N, file(10, 0)), (M, file(10, 0))])).has_no_order();
    told().did(3, 4, list(ROOT), names(&[])).has_no_order();
    // By two readers: first at the new place, then at the old one.
    told()
        .did(3, 4, look_up(M), seen(file(10, 0)))
        .did(5, 6, look_up(N), seen(file(10, 0)))
        .has_no_order();
    // First it is gone from the old place, then it is not yet at the new one.
    told().did(3, 4, look_up(N), NOT_THERE).did(5, 6, look_up(M), NOT_THERE).has_no_order();
}

#[test]
fn a_value_from_the_future() {
    Told::new()
        .did(0, 1, create(N), made(10))
        .did(2, 3, Operation::Stat { inode: 10 }, seen(file(10, 5)))
        .did(4, 5, truncate(10, 5), seen(file(10, 5)))
        .has_no_order();
    // Also of an operation that nobody saw an answer of.
    Told::new().did(0, 1, look_up(N), seen(file(10, 0))).asked(2, create(N)).has_no_order();
    Told::new()
        .did(0, 1, look_up(N), seen(file(10, 0)))
        .did(2, 3, create(N), made(10))
        .has_no_order();
}

#[test]
fn an_operation_without_an_answer_that_takes_effect_twice() {
    Told::new()
        .asked(0, create(N))
        .did(1, 2, look_up(N), seen(file(77, 0)))
        .did(3, 4, unlink(N), Answer::Done)
        .did(5, 6, look_up(N), seen(file(78, 0)))
        .has_no_order();
    let told = Told::new()
        .did(0, 1, create(N), made(10))
        .asked(2, truncate(10, 5))
        .did(3, 4, Operation::Stat { inode: 10 }, seen(file(10, 5)))
        .did(5, 6, truncate(10, 0), seen(file(10, 0)));
    told.did(7, 8, Operation::Stat { inode: 10 }, seen(file(10, 5))).has_no_order();
    let told = Told::new()
        .did(0, 1, create(N), made(10))
        .did(2, 3, create(M), made(11))
        .asked(4, unlink(N))
        .did(5, 6, look_up(N), NOT_THERE)
        .did(7, 8, rename(M, ROOT, N), Answer::Done)
        .did(9, 10, look_up(N), NOT_THERE);
    told.has_no_order();
}

#[test]
fn an_answered_operation_that_takes_effect_twice() {
    Told::new()
        .did(0, 1, create(N), made(10))
        .did(2, 3, truncate(10, 5), seen(file(10, 5)))
        .did(4, 5, truncate(10, 0), seen(file(10, 0)))
        .did(6, 7, Operation::Stat { inode: 10 }, seen(file(10, 5)))
        .has_no_order();
}

#[test]
fn a_number_that_is_used_again() {
    Told::new()
        .did(0, 1, create(N), made(10))
        .did(2, 3, unlink(N), Answer::Done)
        .did(4, 5, create(N), made(10))
        .has_no_order();
}

#[test]
fn an_answer_that_is_never_right() {
    Told::new().did(0, 1, list(ROOT), Answer::Odd("a name that nobody made".into())).has_no_order();
    Told::new().did(0, 1, unlink(N), Answer::Done).has_no_order();
    Told::new().did(0, 1, create(N), NOT_THERE).has_no_order();
}

// -- limits, files ---------------------------------------------------------------------

#[test]
fn a_search_that_is_given_up_is_no_pass() {
    let mut told = Told::new().did(0, 1, create(N), made(10));
    // All orders of these have to be looked at.
    for i in 0..12 {
        told = told.asked(2, truncate(10, i + 1));
    }
    let told = told.did(3, 4, Operation::Stat { inode: 10 }, seen(file(10, 99)));
    let history = History::new(told.0);
    let checked = history.check(Limit { configurations_max: 50 });
    assert!(!checked.linearizable);
    assert_eq!((checked.gave_up.as_slice(), checked.violations.len()), (&[0][..], 0));
    assert!(!history.check(Limit::default()).violations.is_empty());
}

#[test]
fn trees_are_checked_each_for_itself_and_written_as_lines() {
    let mut lines = Told::new().did(0, 1, create(N), made(10)).0;
    lines.push(Line::Tree { tree: 1, roots: vec![3] });
    let bad = Operation::Lookup { parent: 3, name: N };
    let returned = Some((3, seen(file(10, 0))));
    lines.push(Line::Did(Did { tree: 1, client: "c".into(), called: 2, operation: bad, returned }));
    let text: Vec<_> = lines.iter().map(|l| serde_json::to_string(l).expect("JSON")).collect();
    let checked = History::parse(&text.join("\n")).expect("lines").check(Limit::default());
    assert_eq!((checked.partitions, checked.operations, checked.longest), (2, 2, 1));
    assert_eq!(checked.violations.len(), 1);
    assert!(checked.violations[0].starts_with("tree 1:"));
    assert_eq!(History::parse("{}").expect_err("no line").line, 1);
}
