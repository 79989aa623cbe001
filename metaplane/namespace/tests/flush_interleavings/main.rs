//! Random interleavings of clients, flushes, S3 faults, leader crashes and strangers: at rest the
//! bucket holds exactly one object per name, with every acked byte, and nothing else (I1–I3, I6).

#[path = "../common/mod.rs"]
mod common;
mod run;

use common::*;
use ebb_metaplane_protocol::FileKind;
use ebb_metaplane_protocol::command::CommandReply;
use ebb_metaplane_protocol::dump::Object;
use ebb_metaplane_protocol::op::OpenMode;
use ebb_namespace::{Machine, MemKv};
use run::*;

/// Files with several names: each name has its object at rest, with every acked byte and nothing else.
#[test]
fn at_rest_the_bucket_holds_each_name_of_a_file() {
    let mut linked = 0;
    for seed in seeds(400) {
        println!("seed {seed}");
        let mut r = Run::new(seed, false);
        r.links = 0.05;
        r.steps(300);
        linked += r.linked;
        finish(&mut r);
        r.w.check_bucket();
        // From the bucket alone they are the same files.
        let mut anew = World::from_bucket(&r.w.bucket, seed as usize);
        assert_eq!(anew.names_by_file(), r.w.names_by_file(), "seed {seed}");
        for (id, key) in r.w.tree().into_iter().filter(|(_, k)| !k.ends_with('/')) {
            let there = anew.tree().into_iter().find(|(_, k)| *k == key).expect("found").0;
            let (was, is) = (r.w.attr(id), anew.attr(there));
            assert!(is.nlink == was.nlink || was.kind == FileKind::Symlink, "seed {seed}: {key}");
            assert_eq!((is.mode, is.size), (was.mode, was.size), "seed {seed}: {key}");
        }
        anew.settle_all();
        anew.check_bucket();
        let mut other = MemKv::default();
        for entry in &r.w.log {
            Machine::apply(&mut other, entry);
        }
        assert!(other == r.w.kv, "seed {seed}: two voters differ");
    }
    println!("{linked} names");
    assert!(linked > 1_000, "only {linked} other names");
}

/// The same with strangers who replace objects: their content and ours both survive, under some name.
#[test]
fn a_stranger_at_one_name_of_a_file_takes_nothing_from_the_others() {
    for seed in seeds(300) {
        println!("seed {seed}");
        let mut r = Run::new(seed, true);
        r.links = 0.05;
        r.steps(300);
        finish(&mut r);
        adopt_strangers(&mut r);
        r.w.check_bucket();
    }
}

/// The same with requests that arrive late (R32, R33).
#[test]
fn requests_that_arrive_late_do_no_harm_to_any_name_of_a_file() {
    for seed in seeds(400) {
        println!("seed {seed}");
        let mut r = Run::new(seed, false);
        (r.few, r.links) = (true, 0.05);
        r.steps(500);
        finish(&mut r);
        r.w.check_bucket();
    }
}

fn run(seed: u64, foreign: bool, steps: usize) -> Run {
    let mut r = Run::new(seed, foreign);
    r.steps(steps);
    r
}

fn finish(r: &mut Run) {
    let unnamed = std::mem::take(&mut r.unnamed);
    for f in std::mem::take(&mut r.open).into_iter().chain(unnamed) {
        r.w.close(f).expect("a release never fails");
    }
    r.forget_gone();
    r.w.settle_all();
}

/// Objects that appeared by conflicts are inodes now: their content is the stranger's.
fn adopt_strangers(r: &mut Run) {
    for (id, key) in r.w.tree() {
        if !key.ends_with('/') && !r.w.expected.contains_key(&id) {
            let body = r.w.bucket.objects[&key].body.clone();
            assert!(r.w.bucket.foreign.contains(&body), "whose is {key}?");
            r.w.expected.insert(id, body);
        }
    }
}

#[test]
fn at_rest_the_bucket_is_the_tree() {
    let (mut clean, mut published) = (0, 0);
    for seed in seeds(400) {
        println!("seed {seed}");
        let mut r = run(seed, false, 300);
        clean += r.clean;
        published += r.published;
        finish(&mut r);
        r.w.check_bucket();
    }
    assert!(published > 200, "only {published} files got their name late");
    assert!(clean > 1_000, "only {clean} looks at what a stand-in would serve");
}

/// Whatever is under way: the dump of a moment has every name with its attributes and its object, and what is made
/// of it is sound. Only what nodes alone had is not as it was, and it says so.
#[test]
fn a_dump_of_any_moment_loads_as_a_sound_namespace() {
    let (mut names, mut unstored, mut lost, mut dirty, mut linked) = (0, 0, 0, 0, 0);
    for seed in seeds(300) {
        println!("seed {seed}");
        let mut r = Run::new(seed, seed % 3 == 0);
        r.links = if seed % 2 == 0 { 0.1 } else { 0.0 };
        r.steps(20 + seed as usize % 280);
        linked += r.linked;
        let records = dump(&r.w.kv, 1 + seed as usize % 7);
        assert_eq!(records, dump(&r.w.kv, 1000), "seed {seed}: whatever the page size");
        let (kv, replies) = load(&records, 1 + seed as usize % 5);
        assert!(replies.iter().all(|r| *r == CommandReply::Done), "seed {seed}: {replies:?}");
        assert_eq!(check(&kv), [], "seed {seed}");
        let again = dump(&kv, 100);
        assert_eq!(records.len(), again.len(), "seed {seed}");
        let owned = |key: &str| {
            records.iter().filter(|r| r.object.as_ref().is_some_and(|o| o.key == key)).count()
        };
        for (was, is) in records.iter().zip(&again) {
            let mut want = was.clone();
            names += 1;
            if let Some(o) = was.object.as_ref().filter(|o| owned(&o.key) > 1) {
                // Two names of one object: one of them has lost it to a stranger.
                println!("seed {seed}: '{}' at {}", was.path, o.key);
                assert_eq!((&was.path, was.kind), (&is.path, is.kind));
                continue;
            }
            // Of a directory that was renamed a moment ago not all is marked yet.
            let moved = |o: &Object| o.key.trim_end_matches('/') != was.path;
            want.dirty |= was.object.as_ref().is_some_and(moved);
            if was.unstored {
                unstored += 1;
                want.unstored = false;
                want.dirty = is.dirty;
                match &mut want.object {
                    Some(o) => {
                        (want.size, o.valid, want.unseen) = (o.length, o.length, true);
                    }
                    None => {
                        lost += 1;
                        (want.lost, want.dirty) = (true, false);
                    }
                }
            }
            dirty += usize::from(is.dirty);
            assert_eq!(&want, is, "seed {seed}");
            assert!(is.dirty || !was.dirty || is.lost || was.unstored, "seed {seed}: {was:?}");
        }
        // A load that goes on from its start adds nothing.
        let twice: Vec<_> = records.iter().chain(&records).cloned().collect();
        let again = load(&twice, 3).0;
        assert_eq!(dump(&again, 100), dump(&kv, 100), "seed {seed}: loaded twice");
    }
    println!(
        "{names} names, {linked} of them others, {unstored} with bytes on nodes only, {lost} lost, {dirty} dirty"
    );
    assert!(unstored > 100 && lost > 50 && dirty > 100, "{unstored} {lost} {dirty}");
}

#[test]
fn strangers_objects_and_ours_both_survive() {
    for seed in seeds(300) {
        println!("seed {seed}");
        let mut r = run(seed, true, 300);
        finish(&mut r);
        adopt_strangers(&mut r);
        r.w.check_bucket();
    }
}

fn with_late_requests(seed: u64, doubts: bool) {
    let mut r = Run::new(seed, false);
    r.few = true;
    r.w.doubts = doubts;
    r.steps(500);
    finish(&mut r);
    r.w.check_bucket();
}

/// Nothing that was credited is changed by a request that arrives late, and no removed file comes
/// back (R32, R33).
#[test]
fn requests_that_arrive_late_do_no_harm() {
    for seed in seeds(600) {
        println!("seed {seed}");
        with_late_requests(seed, true);
    }
}

/// R33 is what keeps late requests harmless: without it some interleaving ends badly.
#[test]
fn without_the_rule_of_dangling_attempts_a_late_request_does_harm() {
    let hurt = seeds(100)
        .into_iter()
        .filter(|&seed| std::panic::catch_unwind(|| with_late_requests(seed, false)).is_err());
    assert!(hurt.count() > 0, "the test of the rule can't fail");
}

/// What S3 has of a file that was given up stays, byte for byte; what it never had is an error, never zeros (I4); and the rest
/// goes on as if nothing had been.
#[test]
fn an_abandoned_node_takes_along_what_only_it_had_and_nothing_else() {
    let (mut given_up, mut lost) = (0, 0);
    for seed in seeds(200) {
        println!("seed {seed}");
        let mut r = Run::new(seed, false);
        r.links = if seed % 2 == 0 { 0.05 } else { 0.0 };
        r.register(1);
        for round in 1..4 {
            r.steps(60);
            r.abandon(round);
        }
        (given_up, lost) = (given_up + r.given_up, lost + r.lost.len());
        r.steps(60);
        let unnamed = std::mem::take(&mut r.unnamed);
        for f in std::mem::take(&mut r.open).into_iter().chain(unnamed) {
            r.w.close(f).expect("a release never fails");
        }
        for (i, id) in std::mem::take(&mut r.lost).into_iter().enumerate() {
            let Ok((attr, _)) = r.w.read().attr(id) else { continue };
            if r.w.expected.contains_key(&id) || attr.nlink == 0 {
                continue;
            }
            // Written anew by who truncates it.
            let s = r.sessions[i % 2];
            if i % 2 == 0 {
                r.w.truncate(s, id, 0).expect("overwritten");
            } else {
                let mode = OpenMode { write: true, truncate: true };
                let f = r.w.open(s, id, mode).expect("overwritten");
                r.w.expected.insert(id, Vec::new());
                r.w.close(f).expect("a release never fails");
            }
        }
        r.w.settle_all();
        assert_eq!(r.w.read().counts().expect("readable").lost_files, 0);
        r.w.check_bucket();
    }
    assert!(given_up > 100 && lost > 20, "{given_up} given up, {lost} of them lost");
}

#[test]
fn the_same_log_gives_the_same_bytes() {
    for seed in seeds(20) {
        println!("seed {seed}");
        let mut r = run(seed, false, 300);
        finish(&mut r);
        let mut other = MemKv::default();
        for entry in &r.w.log {
            Machine::apply(&mut other, entry);
        }
        assert!(other == r.w.kv, "seed {seed}: two voters differ");
    }
}
