//! What a check finds in a state that was damaged, one record at a time, and what its repairs make of it.
//! That a sound state has no findings is asserted by every other test, after every command
//! (`common::World::apply`).

mod common;
use common::{World, check, dump, seeds};
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::FileKind;
use ebb_metaplane_protocol::check::{Finding, Repair, Rule};
use ebb_metaplane_protocol::command::{Command, CommandReply, LogEntry};
use ebb_metaplane_protocol::dump::{LoadStep, Record};
use ebb_metaplane_protocol::lock::{Lock, LockMode};
use ebb_metaplane_protocol::op::Op;
use ebb_metaplane_protocol::xattr::XattrMode;
use ebb_metaplane_protocol::{FsError, Query, QueryReply, Time};
use ebb_namespace::{Machine, MemKv, Reader};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};

/// A state with something in every table that a bucket, clients and a flusher fill.
fn world() -> World {
    let mut w = World::new();
    let s = w.session();
    let root = InodeId::ROOT;
    let a = w.mkdir(s, root, "a").expect("made");
    let b = w.mkdir(s, a, "b").expect("made");
    w.mkdir(s, b, "empty").expect("made");
    for (dir, name) in [(root, "one"), (root, "stays"), (a, "two"), (b, "three")] {
        w.put_file(s, dir, name, name.as_bytes());
    }
    w.settle_all();
    // A delete that is remembered, and one that is due.
    w.unlink(s, a, "two").expect("unlinked");
    w.settle_all();
    w.unlink(s, root, "one").expect("unlinked");
    // Open with a name, and without one.
    let mut f = w.create(s, b, "dirty").expect("made");
    w.write(&mut f, 0, b"not in S3").expect("written");
    for (owner, start) in [(1, 0), (2, 50)] {
        let lock = Lock { owner, start, end: start + 9, mode: LockMode::Exclusive, pid: 3 };
        let inode = f.grant.inode;
        w.op(s, Op::Lock { inode, lock, wait: false }).expect("locked");
    }
    for (inode, value) in [(f.inode, "one"), (a, "two")] {
        let (name, value) = (b"user.a".to_vec(), Some(value.into()));
        w.op(s, Op::SetXattr { inode, name, value, how: XattrMode::Any }).expect("set");
    }
    let mut f = w.create(s, a, "gone").expect("made");
    w.write(&mut f, 0, b"bytes").expect("written");
    w.unlink(s, a, "gone").expect("unlinked");
    w.rename(s, (a, "b"), (root, "c")).expect("renamed");
    // Other names: one that is stored, and two of a file that isn't.
    w.link(s, w.lookup(root, "stays").expect("there").inode, a, "too").expect("linked");
    w.settle_all();
    let twice = w.put_file(s, root, "twice", b"written");
    w.link(s, twice, a, "again").expect("linked");
    w.link(s, twice, root, "more").expect("linked");
    // A store under way.
    let new = w.put_file(s, a, "new", b"being stored");
    w.begin_flush(vec![new], false);
    let ticket = w.begun.pop().expect("begun");
    let plan = w.seal(&ticket);
    w.take_plan(new, plan);
    w
}

fn repair(kv: &mut MemKv, findings: &[Finding]) {
    let repairs: Vec<Repair> = findings.iter().filter_map(|f| f.repair.clone()).collect();
    let entry = LogEntry { now: Time(1 << 40), commands: vec![Command::Repair(repairs)] };
    assert_eq!(Machine::apply(kv, &entry), [CommandReply::Done], "{findings:#?}");
}

/// Paths of all that can be reached, with the kind.
fn tree(kv: &MemKv) -> BTreeMap<String, (InodeId, FileKind)> {
    let (mut found, mut todo) = (BTreeMap::new(), vec![(String::new(), InodeId::ROOT)]);
    while let Some((path, dir)) = todo.pop() {
        let q = Query::ReadDir { inode: dir, after: Vec::new(), limit: 1000 };
        let Ok(QueryReply::Page { entries, .. }) = Machine::query(kv, &q) else { continue };
        for e in entries {
            let path = format!("{path}/{}", String::from_utf8_lossy(&e.name));
            if e.attr.kind == FileKind::Directory && found.len() < 100 {
                todo.push((path.clone(), e.attr.inode));
            }
            found.insert(path, (e.attr.inode, e.attr.kind));
        }
    }
    found
}

/// Repairs until nothing is found that can be mended; what is left.
fn mend(kv: &mut MemKv) -> Vec<Finding> {
    for _ in 0..20 {
        let findings = check(kv);
        if findings.iter().all(|f| f.repair.is_none()) {
            return findings;
        }
        repair(kv, &findings);
    }
    panic!("repairs don't end: {:#?}", check(kv));
}

/// Each record of each table is lost in turn. Whatever follows from others is made again, no byte that a name
/// led to is given up, and where only a record itself says something its loss is noticed or harmless.
#[test]
fn each_lost_record_is_found_and_what_follows_from_others_is_made_again() {
    let w = world();
    assert_eq!(check(&w.kv), []);
    let before = tree(&w.kv);
    let (mut rules, mut tables) = (BTreeSet::new(), BTreeSet::new());
    // What only these tables say: an inode, a session, a handle's records, the replies, the map.
    for k in w.kv.0.keys() {
        let mut kv = w.kv.clone();
        kv.0.remove(k);
        let findings = check(&kv);
        rules.extend(findings.iter().map(|f| f.rule));
        let silent = match k[0] {
            // Deletes that nobody knows of any more; a session's process; numbers that are not lower than what was
            // given out, and settings.
            b'n' | b'X' | b'W' | b'V' | b'Z' | b'K' => true,
            b'M' => findings.is_empty(),
            // Of the renamed directory: while it is to be stored anew, its former object may be anybody's.
            b'B' => &k[1..] == b"a/b/",
            _ => false,
        };
        assert!(silent || !findings.is_empty(), "nobody misses {}", k.escape_ascii());
        if !findings.is_empty() {
            tables.insert(char::from(k[0]));
        }
        if k[0] == b'P' || (k[0] == b'I' && k[1..] == InodeId::ROOT.0.to_be_bytes()) {
            continue;
        }
        let mut left = mend(&mut kv);
        // How many groups there are is said twice, and nobody can tell which is right.
        left.retain(|f| f.rule != Rule::Map);
        assert!(left.is_empty(), "without {}: {left:#?}", k.escape_ascii());
        let lost = (k[0] == b'I').then(|| u64::from_be_bytes(k[1..9].try_into().expect("an id")));
        let reached: BTreeSet<InodeId> = tree(&kv).values().map(|(id, _)| *id).collect();
        for (path, (id, _)) in &before {
            assert!(
                reached.contains(id) || lost == Some(id.0),
                "{path} is lost without {}",
                k.escape_ascii()
            );
        }
    }
    println!("rules that noticed: {rules:?}; tables: {tables:?}");
    assert!(tables.is_superset(&"BCDEGHIMOPRShtTx".chars().collect()), "{tables:?}");
}

/// Values are exchanged, names lead elsewhere, numbers go back: it ends as a sound tree that keeps every inode, or
/// as findings that say so.
#[test]
fn damage_ends_as_a_sound_state() {
    for seed in seeds(300) {
        let mut rng = StdRng::seed_from_u64(seed);
        let w = world();
        let mut kv = w.kv.clone();
        let inodes = |kv: &MemKv| -> BTreeSet<Vec<u8>> {
            kv.0.keys().filter(|k| k[0] == b'I').cloned().collect()
        };
        let before = inodes(&kv);
        for _ in 0..rng.random_range(1..4) {
            let keys: Vec<Vec<u8>> = kv.0.keys().cloned().collect();
            let k = keys.choose(&mut rng).expect("not empty").clone();
            let of_table: Vec<&Vec<u8>> = keys.iter().filter(|o| o[0] == k[0]).collect();
            let other = (*of_table.choose(&mut rng).expect("itself")).clone();
            match rng.random_range(0..4) {
                0 if k[0] != b'I' && k[0] != b'P' => {
                    kv.0.remove(&k);
                }
                // Inodes know their number; the map is alone.
                1 if k[0] != b'I' => {
                    let v = kv.0[&other].clone();
                    kv.0.insert(k, v);
                }
                2 if k[0] == b'M' => {
                    kv.0.insert(k, rng.random_range(0..9u64).to_le_bytes().to_vec());
                }
                3 if !b"MPI".contains(&k[0]) => {
                    let mut new = k.clone();
                    let at = rng.random_range(1..new.len());
                    new[at] ^= 1;
                    let v = kv.0[&k].clone();
                    kv.0.insert(new, v);
                }
                _ => {}
            }
        }
        println!("seed {seed}");
        let left = mend(&mut kv);
        let unreadable = |f: &Finding| f.rule == Rule::Readable || f.rule == Rule::Map;
        assert!(left.iter().all(unreadable), "seed {seed}: {left:#?}");
        let after = inodes(&kv);
        let reached = tree(&kv).len();
        for gone in before.difference(&after) {
            let id = InodeId(u64::from_be_bytes(gone[1..9].try_into().expect("an id")));
            let had_name = w.read().attr(id).expect("it was there").0.nlink > 0;
            assert!(!had_name, "seed {seed}: inode {id} was given up");
        }
        assert!(reached <= after.len(), "seed {seed}: one inode, one name");
    }
}

/// A repair that comes late, or twice, changes nothing that is right.
#[test]
fn repairs_of_what_is_right_change_nothing() {
    let w = world();
    let mut all = Vec::new();
    for (k, v) in &w.kv.0 {
        let id = || u64::from_be_bytes(k[1..9].try_into().expect("an id"));
        all.extend(match k[0] {
            b'I' => {
                let id = InodeId(id());
                vec![Repair::Derive(id), Repair::Orphan(id), Repair::Dirty(id), Repair::Flush(id)]
            }
            b'E' => vec![Repair::Name(InodeId(id()), k[9..].to_vec())],
            b'H' => vec![Repair::Handle(HandleId(id()))],
            b'S' => vec![Repair::Session(SessionId(id()))],
            b'T' => vec![Repair::Tombstone(String::from_utf8_lossy(&k[1..]).into_owned())],
            b'K' => vec![Repair::Key(String::from_utf8_lossy(&k[1..]).into_owned())],
            b'M' if v.len() == 8 => vec![Repair::AtLeast(k[1], 0)],
            _ => vec![Repair::Record(k.clone())],
        });
    }
    // Of another state: it was done already.
    all.push(Repair::Count { counter: 8, by: 5, repairs: 7 });
    assert!(all.len() > 60, "{}", all.len());
    let mut kv = w.kv.clone();
    let findings: Vec<Finding> = all
        .into_iter()
        .map(|r| Finding { rule: Rule::Readable, what: String::new(), repair: Some(r) })
        .collect();
    repair(&mut kv, &findings);
    for (k, v) in &w.kv.0 {
        // Sequence, clock, and the count of repairs.
        let steps = k[0] == b'M' && [0, 1, 29].contains(&k[1]);
        assert!(steps || kv.0.get(k) == Some(v), "{} changed", k.escape_ascii());
    }
    assert!(kv.0.len() <= w.kv.0.len() + 1, "something was added");
    assert_eq!(check(&kv), []);
    assert!(Reader(&kv).is_formatted().expect("readable"));
}

/// While a dump comes back nobody else gets in, and what makes no sense in it changes nothing.
#[test]
fn a_load_is_for_an_empty_namespace_and_refuses_nonsense() {
    let w = world();
    let records = dump(&w.kv, 100);
    let apply = |kv: &mut MemKv, command| {
        Machine::apply(kv, &LogEntry { now: Time(9), commands: vec![command] }).remove(0)
    };
    let refused = |reply: CommandReply, words: &str| match reply {
        CommandReply::Refused(why) => assert!(why.contains(words), "{why}"),
        other => panic!("{other:?}"),
    };
    let mut kv = w.kv.clone();
    let begin = || Command::Load(LoadStep::Begin, Vec::new());
    refused(apply(&mut kv, begin()), "names already");
    refused(apply(&mut kv, Command::Load(LoadStep::Records, records.clone())), "no load has begun");
    let mut kv = World::new().kv;
    assert_eq!(apply(&mut kv, begin()), CommandReply::Done);
    let open = Command::OpenSession { client: 1, label: String::new() };
    let reply = apply(&mut kv, open.clone());
    assert!(matches!(&reply, CommandReply::Session(Err(FsError::NotPermitted(_)))), "{reply:?}");
    let file = records.iter().find(|r| r.kind == FileKind::File).expect("a file").clone();
    for (path, words) in [
        ("no/such/dir", "not before it"),
        ("..", "not a name"),
        ("a\0b", "NUL"),
        (".ebb", "reserved"),
        (&"x".repeat(256), "too long"),
        ("stays/below a file", "not in a directory"),
    ] {
        let mut stays = file.clone();
        (stays.path, stays.object) = ("stays".into(), None);
        let bad = Record { path: path.to_owned(), ..file.clone() };
        let before = kv.clone();
        assert_eq!(
            apply(&mut kv, Command::Load(LoadStep::Records, vec![stays])),
            CommandReply::Done
        );
        refused(apply(&mut kv, Command::Load(LoadStep::Records, vec![bad])), words);
        assert_eq!(check(&kv), [], "{path}");
        assert!(kv.0.len() >= before.0.len());
    }
    assert_eq!(apply(&mut kv, Command::Load(LoadStep::End, Vec::new())), CommandReply::Done);
    assert!(matches!(apply(&mut kv, open), CommandReply::Session(Ok(_))));
    refused(apply(&mut kv, begin()), "names already");
}
