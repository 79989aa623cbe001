//! Outgoing connections: real sockets that answer, refuse, stay silent, and break in the middle.
mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use common::*;
use ebb_ring::{
    Buf, Class, CloseReason, Config, ConnId, Errno, Event, NetError, Pool, Reactor, Refusal,
    Segment, Token,
};

const LONG: Duration = Duration::from_secs(60);

fn connected(reactor: &mut Reactor, conn: ConnId) {
    let Event::Connected { conn: c, token, result } = next(reactor) else { panic!() };
    assert_eq!((c, token, result), (conn, Token(7), Ok(())));
}

/// A listener whose queue is full: the kernel drops further attempts, as a dead host would.
struct Silent {
    addr: SocketAddr,
    _listener: TcpListener,
    _queued: Vec<TcpStream>,
}

fn silent() -> Silent {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let mut queued = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&addr, Duration::from_millis(200)) {
        queued.push(stream);
        assert!(queued.len() < 100, "the queue never fills");
    }
    Silent { addr, _listener: listener, _queued: queued }
}

#[test]
fn a_connection_made_here_carries_bytes_both_ways() {
    let mut reactor = reactor();
    for listen in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(listen) else { continue };
        let addr = listener.local_addr().unwrap();
        let conn = reactor.connect(addr, Token(7), LONG).unwrap();
        // Nothing may be sent or received before it stands.
        let early = reactor.send(conn, Token(0), b"early".to_vec()).unwrap_err();
        assert_eq!(early.why, Refusal::NotConnected);
        let early = reactor.recv_some(conn, Token(0), Buf::unpooled(8), 0..8).unwrap_err();
        assert_eq!(early.why, Refusal::NotConnected);
        connected(&mut reactor, conn);
        assert_eq!(reactor.peer(conn), Some(addr));
        let (mut peer, _) = listener.accept().unwrap();
        let mut slot = reactor.arena().alloc(Class::Mid1M, Pool::Replication).unwrap();
        fill(&mut slot, 9);
        let want = slot.to_vec();
        let len = slot.len();
        let echo = std::thread::spawn(move || {
            let mut got = vec![0; len];
            peer.read_exact(&mut got).unwrap();
            peer.write_all(&got).unwrap();
            peer
        });
        reactor.send(conn, Token(1), Segment::Buf(slot, 0..len)).unwrap();
        let into = reactor.arena().alloc(Class::Mid1M, Pool::Clients).unwrap();
        reactor.recv_exact(conn, Token(2), into, 0..len).unwrap();
        let mut seen = 0;
        until(&mut reactor, |_, e| {
            match e {
                Event::Sent { result, .. } => assert_eq!(result, Ok(())),
                Event::Received { buf, result, .. } => {
                    assert_eq!(result, Ok(len));
                    assert!(buf[..len] == want[..]);
                }
                other => panic!("{other:?}"),
            }
            seen += 1;
            seen == 2
        });
        drop(echo.join().unwrap());
        reactor.close(conn);
        let Event::Closed { reason, .. } = next(&mut reactor) else { panic!() };
        assert_eq!(reason, CloseReason::Asked);
    }
    assert_eq!((reactor.conns(), reactor.stats().stale), (0, 0));
}

#[test]
fn a_refused_attempt_says_so_and_leaves_nothing() {
    let mut reactor = Reactor::new(Config { conns_max: 1, ..small() }).unwrap();
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for _ in 0..20 {
        let conn = reactor.connect(addr, Token(7), LONG).unwrap();
        assert_eq!(reactor.connect(addr, Token(7), LONG), Err(Refusal::NoRoom));
        let mut events = Vec::new();
        until(&mut reactor, |_, e| {
            events.push(e);
            events.len() == 2
        });
        let [Event::Connected { result, .. }, Event::Closed { conn: closed, reason }] = &events[..]
        else {
            panic!("{events:?}")
        };
        assert_eq!(*result, Err(NetError::Os(Errno::ECONNREFUSED)));
        assert_eq!((*closed, *reason), (conn, CloseReason::Broken(Errno::ECONNREFUSED)));
        // The id is over: it names nobody, also not the next tenant of its slot.
        assert_eq!(reactor.send(conn, Token(0), vec![1]).unwrap_err().why, Refusal::ConnClosed);
    }
    assert_eq!((reactor.conns(), reactor.stats().stale), (0, 0));
}

#[test]
fn an_attempt_that_nobody_answers_ends_at_its_limit() {
    let silent = silent();
    let mut reactor = reactor();
    let started = Instant::now();
    let limit = Duration::from_millis(300);
    let conn = reactor.connect(silent.addr, Token(7), limit).unwrap();
    let mut events = Vec::new();
    until(&mut reactor, |_, e| {
        events.push(e);
        events.len() == 2
    });
    let took = started.elapsed();
    assert!(took >= limit && took < Duration::from_secs(10), "{took:?}");
    let [Event::Connected { result, .. }, Event::Closed { conn: closed, .. }] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!((*result, *closed), (Err(NetError::Os(Errno::ETIMEDOUT)), conn));
    assert_eq!((reactor.conns(), reactor.stats().stale), (0, 0));
}

#[test]
fn an_attempt_can_be_given_up() {
    // A known gap of SQPOLL (ADR 0009): on a busy machine the kernel's thread may begin an attempt that is being
    // given up, which then ends only with its limit.
    let silent = silent();
    let mut reactor = reactor();
    // Before it got to the kernel, and after.
    for turned in [false, true] {
        let conn = reactor.connect(silent.addr, Token(7), LONG).unwrap();
        let mut events = Vec::new();
        if turned {
            reactor.turn(Some(Duration::ZERO), &mut events).unwrap();
            assert!(events.is_empty(), "{events:?}");
        }
        reactor.close(conn);
        let mut events = Vec::new();
        until(&mut reactor, |_, e| {
            events.push(e);
            events.len() == 2
        });
        let [Event::Connected { result, .. }, Event::Closed { reason, .. }] = &events[..] else {
            panic!("{events:?}")
        };
        assert_eq!((*result, *reason), (Err(NetError::Closed), CloseReason::Asked));
    }
    assert_eq!((reactor.conns(), reactor.stats().stale), (0, 0));
}

/// The limit is an entry of its own, behind the attempt's. Were they shown to the kernel one by one, a polling thread
/// could take the first alone: an attempt without a limit, on a worker, where nothing finds it to cancel it.
#[test]
fn attempts_keep_their_limit_while_other_threads_want_the_processors() {
    let silent = silent();
    let mut reactor = reactor();
    let over = AtomicBool::new(false);
    std::thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| {
                while !over.load(Relaxed) {
                    std::hint::spin_loop()
                }
            });
        }
        let _stop = Stop(&over);
        for _ in 0..if is_polled() { 8000 } else { 200 } {
            let conn = reactor.connect(silent.addr, Token(7), LONG).unwrap();
            let mut events = Vec::new();
            reactor.turn(Some(Duration::ZERO), &mut events).unwrap();
            reactor.close(conn);
            until(&mut reactor, |_, e| matches!(e, Event::Closed { .. }));
        }
    });
    assert_eq!((reactor.conns(), reactor.stats().stale), (0, 0));
}

/// Ends the threads also where the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[test]
fn a_peer_that_goes_in_the_middle_gives_every_buffer_back() {
    let mut reactor = reactor();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let conn = reactor.connect(listener.local_addr().unwrap(), Token(7), LONG).unwrap();
    connected(&mut reactor, conn);
    let (mut peer, _) = listener.accept().unwrap();
    let slot = reactor.arena().alloc(Class::Mid1M, Pool::Clients).unwrap();
    reactor.recv_exact(conn, Token(1), slot, 0..1 << 20).unwrap();
    // More than the sockets hold: the send cannot end while the peer does not read.
    for n in 0..8 {
        reactor.send(conn, Token(n), vec![0; 4 << 20]).unwrap();
    }
    let mut events = Vec::new();
    reactor.turn(Some(Duration::ZERO), &mut events).unwrap();
    peer.write_all(&[1; 1000]).unwrap();
    drop(peer);
    drop(listener);
    let (mut received, mut sent) = (0, 0);
    until(&mut reactor, |reactor, e| {
        match e {
            Event::Received { buf, result, .. } => {
                assert!(result.is_err(), "{result:?}");
                assert!(buf.len() >= 1 << 20);
                received += 1;
                reactor.close(conn);
            }
            Event::Sent { .. } => sent += 1,
            Event::Closed { .. } => return true,
            other => panic!("{other:?}"),
        }
        false
    });
    assert_eq!((received, sent), (1, 8));
}

#[test]
fn shutdown_ends_an_attempt_under_way() {
    let silent = silent();
    for turned in [false, true] {
        let mut reactor = reactor();
        let ids: Vec<_> =
            (0..5).map(|_| reactor.connect(silent.addr, Token(7), LONG).unwrap()).collect();
        let mut events = Vec::new();
        if turned {
            reactor.turn(Some(Duration::ZERO), &mut events).unwrap();
        }
        let started = Instant::now();
        reactor.shutdown(&mut events);
        assert!(started.elapsed() < Duration::from_secs(4));
        let count = |f: fn(&Event) -> bool| events.iter().filter(|e| f(e)).count();
        assert_eq!(count(|e| matches!(e, Event::Connected { result: Err(_), .. })), ids.len());
        assert_eq!(count(|e| matches!(e, Event::Closed { .. })), ids.len());
    }
}

#[test]
fn more_attempts_than_the_queue_holds_all_end() {
    // A link needs two entries at once: with eight in the queue it often has to wait for room.
    let mut reactor = Reactor::new(Config { entries: 8, ..small() }).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let mut waiting: Vec<_> =
        (0..50).map(|_| reactor.connect(addr, Token(7), LONG).unwrap()).collect();
    until(&mut reactor, |_, e| {
        let Event::Connected { conn, result, .. } = e else { panic!("{e:?}") };
        assert_eq!(result, Ok(()));
        waiting.retain(|w| *w != conn);
        waiting.is_empty()
    });
    assert_eq!(reactor.conns(), 50);
}
