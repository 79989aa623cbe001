//! All tests of the ring once more, on a reactor that looks for what comes next before it sleeps.
#![allow(clippy::duplicate_mod)] // each of them has its own `common`

#[path = "connect.rs"]
mod connect;
#[path = "disk.rs"]
mod disk;
#[path = "lifecycle.rs"]
mod lifecycle;
#[path = "net.rs"]
mod net;

#[path = "common/mod.rs"]
mod common;

use common::{pair, reactor};
use ebb_ring::{Buf, Config, Event, Reactor, Token};
use std::io::{Read, Write};
use std::time::Duration;

/// Longer than any answer of the test's client takes, on a busy machine as well.
fn patient() -> Reactor {
    Reactor::new(Config { spin_us: 10_000, ..common::small() }).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn what_comes_soon_is_not_slept_for() {
    let mut reactor = patient();
    let (conn, mut client) = pair(&mut reactor);
    let echo = std::thread::spawn(move || {
        let mut word = [0; 8];
        while client.read_exact(&mut word).is_ok() {
            client.write_all(&word).unwrap();
        }
    });
    let before = reactor.stats();
    let rounds = 200;
    for round in 0..rounds {
        reactor.recv_exact(conn, Token(round), Buf::unpooled(8), 0..8).unwrap();
        reactor.send(conn, Token(round), round.to_le_bytes().to_vec()).unwrap();
        common::until(&mut reactor, |_, event| match event {
            Event::Received { buf, result, .. } => {
                assert_eq!(result, Ok(8));
                assert_eq!(buf[..8], round.to_le_bytes());
                true
            }
            Event::Sent { result, .. } => {
                assert_eq!(result, Ok(()));
                false
            }
            other => panic!("{other:?}"),
        });
    }
    let after = reactor.stats();
    let (spins, spun) = (after.spins - before.spins, after.spun - before.spun);
    println!("{rounds} rounds: {spins} spins, {spun} of them to an end");
    assert!(spun >= rounds / 2, "{spins} spins, {spun} of them to an end");
    drop(reactor);
    echo.join().unwrap();
}

#[test]
fn a_wake_up_ends_a_spin() {
    let mut reactor = patient();
    let waker = reactor.waker();
    let (ask, asked) = std::sync::mpsc::channel();
    let other = std::thread::spawn(move || {
        while asked.recv().is_ok() {
            // The reactor waits by then, but not for long.
            std::thread::sleep(Duration::from_millis(1));
            waker.wake();
        }
    });
    let before = reactor.stats();
    let rounds = 100;
    for _ in 0..rounds {
        ask.send(()).unwrap();
        common::until(&mut reactor, |_, event| matches!(event, Event::Woken));
    }
    let spun = reactor.stats().spun - before.spun;
    println!("{rounds} rounds: {spun} spins to an end");
    assert!(spun >= rounds / 4, "{spun} spins to an end");
    drop(ask);
    other.join().unwrap();
}

/// A core that only looks at its clock now and then does not spin in between, however often it does.
#[test]
fn who_has_nothing_to_do_does_not_spin() {
    let mut reactor = reactor();
    let (_conn, _client) = pair(&mut reactor);
    let mut events = Vec::new();
    let before = reactor.stats();
    for us in [50, 2000].repeat(50) {
        reactor.turn(Some(Duration::from_micros(us)), &mut events).unwrap();
        assert!(events.is_empty(), "{events:?}");
    }
    let after = reactor.stats();
    let (turns, spins) = (after.turns - before.turns, after.spins - before.spins);
    println!("{turns} idle turns, {spins} spins");
    assert!(spins <= 3, "{spins} spins in {turns} idle turns");
}

#[test]
fn what_comes_late_is_slept_for() {
    let mut reactor = reactor();
    let waker = reactor.waker();
    let (ask, asked) = std::sync::mpsc::channel();
    let other = std::thread::spawn(move || {
        while asked.recv().is_ok() {
            std::thread::sleep(Duration::from_millis(3));
            waker.wake();
        }
    });
    let before = reactor.stats();
    let rounds = 50;
    for _ in 0..rounds {
        ask.send(()).unwrap();
        common::until(&mut reactor, |_, event| matches!(event, Event::Woken));
    }
    let spins = reactor.stats().spins - before.spins;
    println!("{rounds} rounds: {spins} spins");
    assert!(spins <= 5, "{spins} spins in {rounds} rounds");
    drop(ask);
    other.join().unwrap();
}
