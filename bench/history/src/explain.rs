//! What to show of a history that has no order: the end of the longest one, the state there, and what can't go on.

use crate::history::{Answer, Failure, Kind, Operation, Part, Seen};
use crate::search::{Specification, Step, Stuck};
use crate::tree::{Inode, State, Tree};
use std::fmt::Write;

/// Operations of the order's end that are shown.
const BEFORE: usize = 12;
/// Operations that can't go on that are shown.
const AFTER: usize = 24;

/// Why there is no order, in lines.
pub fn explain(part: &Part, tree: &Tree, stuck: &Stuck<State>) -> String {
    let mut text = format!(
        "no order of its {} operations: after {} of them, at the latest, none that may come next can give its answer.\n",
        part.operations.len(),
        stuck.order.len()
    );
    let from = stuck.order.len().saturating_sub(BEFORE);
    let _ = writeln!(text, "  the end of the longest order:");
    for n in &stuck.order[from..] {
        let _ = writeln!(text, "    {}", line(part, *n));
    }
    let _ = writeln!(text, "  the tree then: {}", shown(&stuck.state));
    let _ = writeln!(text, "  next would be one of these, the first at the latest:");
    for n in stuck.next.iter().take(AFTER) {
        let o = &part.operations[*n];
        let answer = o.returned.as_ref().map(|r| &r.1);
        let fits = tree.step(&stuck.state, *n, &o.operation, answer) != Step::Impossible;
        // Those that fit were followed further, to no avail.
        let mark = if fits { "  " } else { "✗ " };
        let _ = writeln!(text, "    {mark}{}", line(part, *n));
    }
    if stuck.next.len() > AFTER {
        let _ = writeln!(text, "    and {} more", stuck.next.len() - AFTER);
    }
    text
}

fn line(part: &Part, n: usize) -> String {
    let o = &part.operations[n];
    let ms = |ns: u64| ns as f64 / 1e6;
    let (until, answer) = match &o.returned {
        Some((until, answer)) => (format!("{:.3}", ms(*until)), said(answer)),
        None => ("?".to_owned(), "?".to_owned()),
    };
    let client = &part.clients[n];
    format!("[{:.3} to {until} ms] {client}: {} → {answer}", ms(o.called), asked(&o.operation))
}

fn asked(operation: &Operation) -> String {
    match operation {
        Operation::Create { parent, name, exclusive: true } => {
            format!("create exclusively {parent}/{name}")
        }
        Operation::Create { parent, name, exclusive: false } => format!("create {parent}/{name}"),
        Operation::Mkdir { parent, name } => format!("mkdir {parent}/{name}"),
        Operation::Unlink { parent, name } => format!("unlink {parent}/{name}"),
        Operation::Rmdir { parent, name } => format!("rmdir {parent}/{name}"),
        Operation::Rename { parent, name, new_parent, new_name, flags } => {
            let how = match *flags {
                0 => "",
                crate::tree::NOREPLACE => " (replacing nothing)",
                crate::tree::EXCHANGE => " (exchanging)",
                _ => " (odd flags)",
            };
            format!("rename {parent}/{name} to {new_parent}/{new_name}{how}")
        }
        Operation::Truncate { inode, size } => format!("truncate {inode} to {size}"),
        Operation::Write { inode, end } => format!("write {inode} up to {end}"),
        Operation::Lookup { parent, name } => format!("look up {parent}/{name}"),
        Operation::Stat { inode } => format!("stat {inode}"),
        Operation::List { inode } => format!("list {inode}"),
    }
}

fn said(answer: &Answer) -> String {
    match answer {
        Answer::Done => "done".to_owned(),
        Answer::Seen(seen) => described(seen),
        Answer::Opened { seen, created: true } => format!("made {}", described(seen)),
        Answer::Opened { seen, created: false } => format!("opened {}", described(seen)),
        Answer::Names(names) => {
            let names: Vec<_> =
                names.iter().map(|(n, s)| format!("{n} {}", described(s))).collect();
            format!("[{}]", names.join(", "))
        }
        Answer::Failed(why) => match why {
            Failure::NotFound => "ENOENT",
            Failure::Exists => "EEXIST",
            Failure::NotDirectory => "ENOTDIR",
            Failure::IsDirectory => "EISDIR",
            Failure::NotEmpty => "ENOTEMPTY",
            Failure::Invalid => "EINVAL",
            Failure::Stale => "ESTALE",
        }
        .to_owned(),
        Answer::Odd(what) => format!("odd: {what}"),
    }
}

fn described(seen: &Seen) -> String {
    match (seen.kind, seen.links) {
        (Kind::Directory, 0) => format!("{} (a directory without a name)", seen.inode),
        (Kind::Directory, _) => format!("{}/", seen.inode),
        (Kind::File, 1) => format!("{} ({} bytes)", seen.inode, seen.size),
        (Kind::File, links) => format!("{} ({} bytes, {links} links)", seen.inode, seen.size),
    }
}

fn shown(state: &State) -> String {
    let called = |i: &Inode| match i {
        Inode::Known(number) => number.to_string(),
        Inode::MadeBy(n) => format!("(made by operation {n})"),
    };
    let entries = state.entries.iter().map(|((dir, name), i)| {
        let what = match state.nodes.get(i) {
            Some(n) if n.kind == Kind::File => format!("{} ({} bytes)", called(i), n.size),
            _ => format!("{}/", called(i)),
        };
        format!("{}/{name} = {what}", called(dir))
    });
    let entries: Vec<_> = entries.collect();
    if entries.is_empty() { "empty".to_owned() } else { entries.join(", ") }
}
