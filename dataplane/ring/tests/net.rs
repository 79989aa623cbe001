//! Connections on loopback: whole transfers, ordered queues, and slots that outlive their users.
mod common;

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;

use common::*;
use ebb_ring::{
    Buf, Class, CloseReason, Config, Event, NetError, Pool, Reactor, Refusal, Segment, Token,
};

#[test]
fn header_stream_then_the_rest_of_a_payload_into_its_slot() {
    let mut reactor = reactor();
    let (conn, mut client) = pair(&mut reactor);
    let mut message = vec![0u8; 64 + (4 << 20)];
    fill(&mut message, 5);
    let copy = message.clone();
    let writer = std::thread::spawn(move || client.write_all(&copy).map(|()| client));
    reactor.recv_some(conn, Token(1), Buf::unpooled(16 << 10), 0..16 << 10).unwrap();
    let Event::Received { buf, result, .. } = next(&mut reactor) else { panic!() };
    let got = result.unwrap();
    assert!((1..=16 << 10).contains(&got));
    assert_eq!(buf[..got], message[..got]);
    // What came with the header is copied, all the rest lands in place.
    let mut slot = reactor.arena().alloc(Class::Large4M, Pool::Clients).unwrap();
    slot[..got].copy_from_slice(&buf[..got]);
    reactor.recv_exact(conn, Token(2), slot, got..message.len()).unwrap();
    let Event::Received { token, buf, range, result, .. } = next(&mut reactor) else { panic!() };
    assert_eq!((token, range, result), (Token(2), got..message.len(), Ok(message.len() - got)));
    assert!(buf[..message.len()] == message[..]);
    drop(writer.join().unwrap().unwrap());
}

fn large_sends(cfg: Config) {
    let mut reactor = Reactor::new(cfg).unwrap();
    let (conn, mut client) = pair(&mut reactor);
    let rounds = 12usize;
    let mut want = Vec::new();
    let mut shared = reactor.arena().alloc(Class::Mid1M, Pool::Clients).unwrap();
    fill(&mut shared, 3);
    let shared = Arc::new(shared);
    for n in 0..rounds {
        let header = vec![n as u8; 64];
        let mut body = Buf::unpooled(3 << 20);
        fill(&mut body, 100 + n as u64);
        want.extend_from_slice(&header);
        want.extend_from_slice(&body[17..]);
        want.extend_from_slice(&shared[5..999_999]);
        want.extend_from_slice(&[0; 100]);
        let end = body.len();
        let segments = vec![
            Segment::Bytes(header),
            Segment::Buf(body, 17..end),
            Segment::Shared(shared.clone(), 5..999_999),
            Segment::Static(&[0; 100]),
        ];
        reactor.send(conn, Token(n as u64), segments).unwrap();
    }
    // A reader that starts late and reads in odd pieces makes partial sends certain: the data
    // exceeds all socket buffers many times.
    let total = want.len();
    let reader = std::thread::spawn(move || {
        let mut got = vec![0u8; total];
        let mut at = 0;
        while at < total {
            let end = (at + 70_001).min(total);
            let n = client.read(&mut got[at..end]).unwrap();
            assert!(n > 0);
            at += n;
        }
        (got, client)
    });
    let mut sent = 0;
    until(&mut reactor, |_, e| {
        let Event::Sent { token, result, segments, .. } = e else { panic!("{e:?}") };
        assert_eq!((token, result), (Token(sent), Ok(())));
        assert_eq!(segments.as_slice().len(), 4);
        sent += 1;
        sent == rounds as u64
    });
    let (got, _client) = reader.join().unwrap();
    assert!(got == want, "bytes differ");
    assert_eq!(Arc::strong_count(&shared), 1, "every segment came back");
    assert_eq!(reactor.stats().stale, 0);
}

#[test]
fn large_messages_arrive_whole_and_in_order() {
    large_sends(small());
}

#[test]
fn large_messages_arrive_whole_and_in_order_with_zero_copy() {
    large_sends(Config { send_zc: true, ..small() });
}

#[test]
fn messages_of_one_turn_leave_in_one_send() {
    let mut reactor = reactor();
    let (conn, mut client) = pair(&mut reactor);
    // Lets the listener's cancel leave first.
    reactor.turn(Some(std::time::Duration::ZERO), &mut Vec::new()).unwrap();
    let before = reactor.stats().submitted;
    for n in 0..50u8 {
        reactor.send(conn, Token(n.into()), vec![n; 10]).unwrap();
    }
    let mut sent = 0;
    until(&mut reactor, |_, e| {
        assert!(matches!(e, Event::Sent { result: Ok(()), .. }));
        sent += 1;
        sent == 50
    });
    assert_eq!(reactor.stats().submitted - before, 1);
    let mut got = vec![0; 500];
    client.read_exact(&mut got).unwrap();
    assert!(got.iter().enumerate().all(|(i, &b)| usize::from(b) == i / 10));
}

#[test]
fn a_full_send_queue_refuses_and_returns_the_message() {
    let mut reactor = Reactor::new(Config { send_queue_max: 3, ..small() }).unwrap();
    let (conn, _client) = pair(&mut reactor);
    for n in 0..3 {
        reactor.send(conn, Token(n), vec![1; 8]).unwrap();
    }
    let refused = reactor.send(conn, Token(3), vec![9; 8]).unwrap_err();
    assert_eq!((refused.why, refused.back.total()), (Refusal::QueueFull, 8));
    let refused = reactor.send(conn, Token(3), Vec::<u8>::new()).unwrap_err();
    assert_eq!(refused.why, Refusal::QueueFull);
}

#[test]
fn the_end_of_the_stream_says_how_much_came() {
    let mut reactor = reactor();
    let (conn, mut client) = pair(&mut reactor);
    reactor.recv_exact(conn, Token(1), Buf::unpooled(4096), 0..1000).unwrap();
    let second = reactor.recv_some(conn, Token(2), Buf::unpooled(4096), 0..10).unwrap_err();
    assert_eq!(second.why, Refusal::RecvBusy);
    client.write_all(&[5; 300]).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let Event::Received { result, .. } = next(&mut reactor) else { panic!() };
    assert_eq!(result, Err(NetError::Eof { got: 300 }));
    // Half closed: the other direction still works.
    reactor.send(conn, Token(3), vec![6; 10]).unwrap();
    reactor.close_when_sent(conn);
    assert_eq!(reactor.send(conn, Token(4), vec![7; 1]).unwrap_err().why, Refusal::ConnClosed);
    let mut seen = Vec::new();
    until(&mut reactor, |_, e| match e {
        Event::Closed { reason, .. } => {
            assert_eq!(reason, CloseReason::Finished);
            true
        }
        e => {
            seen.push(e);
            false
        }
    });
    assert!(matches!(seen[..], [Event::Sent { token: Token(3), result: Ok(()), .. }]));
    let mut got = Vec::new();
    client.read_to_end(&mut got).unwrap();
    assert_eq!(got, [6; 10]);
}

#[test]
fn a_reset_peer_breaks_sends_and_returns_every_message() {
    let mut reactor = reactor();
    let (conn, client) = pair(&mut reactor);
    // Together more than loopback's buffers hold, so the last cannot have left.
    for n in 0..4 {
        reactor.send(conn, Token(n), Segment::Buf(Buf::unpooled(4 << 20), 0..4 << 20)).unwrap();
    }
    let mut events = Vec::new();
    reactor.turn(Some(std::time::Duration::ZERO), &mut events).unwrap();
    assert!(events.is_empty());
    // Closing with unread data makes the peer answer with a reset.
    drop(client);
    let mut results = Vec::new();
    until(&mut reactor, |_, e| {
        let Event::Sent { token, segments, result, .. } = e else { panic!("{e:?}") };
        assert_eq!((token, segments.total()), (Token(results.len() as u64), 4 << 20));
        results.push(result);
        results.len() == 4
    });
    assert!(matches!(results[3], Err(NetError::Os(_))), "{results:?}");
    assert_eq!(reactor.send(conn, Token(9), vec![1]).unwrap_err().why, Refusal::ConnClosed);
    reactor.close(conn);
    assert!(matches!(next(&mut reactor), Event::Closed { .. }));
}

#[test]
fn a_connection_past_the_limit_is_closed_as_it_is_accepted() {
    let mut reactor = Reactor::new(Config { conns_max: 2, ..small() }).unwrap();
    let (_listener, addr) = reactor.listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let clients: Vec<_> = (0..3).map(|_| TcpStream::connect(addr).unwrap()).collect();
    let mut accepted = Vec::new();
    until(&mut reactor, |r, e| {
        if let Event::Accepted { conn, .. } = e {
            accepted.push(conn);
        }
        accepted.len() == 2 && r.stats().conns_refused == 1
    });
    let mut third = &clients[2];
    third.set_read_timeout(Some(DEADLINE)).unwrap();
    assert!(matches!(third.read(&mut [0; 1]), Ok(0) | Err(_)));
    // A place that becomes free is given out again, under a new generation.
    reactor.close(accepted[0]);
    until(&mut reactor, |_, e| matches!(e, Event::Closed { .. }));
    let _fourth = TcpStream::connect(addr).unwrap();
    until(&mut reactor, |_, e| match e {
        Event::Accepted { conn, .. } => {
            assert_eq!(conn.index(), accepted[0].index());
            assert_ne!(conn, accepted[0]);
            true
        }
        _ => false,
    });
}

/// Closing at any moment gives back every buffer exactly once, emits `Closed` last and once, and a
/// slot's next tenant never hears of the former one's operations.
#[test]
fn close_with_operations_in_flight_frees_nothing_early() {
    let seed = std::env::var("EBB_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0x5eed_u64);
    println!("EBB_SEED={seed}");
    let mut rng = Rng(seed);
    for zero_copy in [false, true] {
        let cfg = Config { conns_max: 4, send_zc: zero_copy, ..small() };
        let mut reactor = Reactor::new(cfg).unwrap();
        let (_listener, addr) = reactor.listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let free_before = reactor.arena().available(Class::Small64K, Pool::Clients);
        let mut ids = HashSet::new();
        for round in 0..60 {
            let mut client = TcpStream::connect(addr).unwrap();
            let mut conn = None;
            until(&mut reactor, |_, e| {
                if let Event::Accepted { conn: c, .. } = e {
                    conn = Some(c);
                }
                conn.is_some()
            });
            let conn = conn.unwrap();
            assert!(ids.insert(conn.to_bits()), "an id was given out twice");
            let mut owed_recv = 0;
            let mut owed_sent = 0;
            if rng.below(4) > 0 {
                let buf = reactor.arena().alloc(Class::Small64K, Pool::Clients).unwrap();
                reactor.recv_exact(conn, Token(round), buf, 0..65536).unwrap();
                owed_recv = 1;
            }
            for _ in 0..rng.below(4) {
                // More than loopback's buffers hold, so that it stays in flight.
                let buf = Buf::unpooled(3 << 20);
                reactor.send(conn, Token(round), Segment::Buf(buf, 0..3 << 20)).unwrap();
                owed_sent += 1;
            }
            let mut closed = 0;
            let mut count = |e: Event, owed_recv: &mut i32, owed_sent: &mut i32| match e {
                Event::Received { conn: c, token, buf, .. } => {
                    assert_eq!((c, token, closed), (conn, Token(round), 0));
                    assert_eq!(buf.len(), 65536);
                    *owed_recv -= 1;
                    false
                }
                Event::Sent { conn: c, token, .. } => {
                    assert_eq!((c, token, closed), (conn, Token(round), 0));
                    *owed_sent -= 1;
                    false
                }
                Event::Closed { conn: c, .. } => {
                    assert_eq!(c, conn);
                    closed += 1;
                    true
                }
                e => panic!("{e:?}"),
            };
            let mut events = Vec::new();
            for _ in 0..rng.below(4) {
                reactor.turn(Some(std::time::Duration::ZERO), &mut events).unwrap();
            }
            if rng.below(2) == 0 {
                let _ = client.write_all(&vec![1; rng.below(40_000) as usize]);
            }
            if rng.below(3) == 0 {
                drop(client);
            }
            for e in events {
                count(e, &mut owed_recv, &mut owed_sent);
            }
            reactor.close(conn);
            reactor.close(conn);
            assert!(
                reactor.recv_some(conn, Token(0), Buf::unpooled(1), 0..1).is_err(),
                "a closed connection takes nothing on"
            );
            until(&mut reactor, |_, e| count(e, &mut owed_recv, &mut owed_sent));
            assert_eq!((owed_recv, owed_sent, closed), (0, 0, 1));
            assert_eq!(reactor.conns(), 0);
            assert!(reactor.peer(conn).is_none());
        }
        assert_eq!(reactor.arena().available(Class::Small64K, Pool::Clients), free_before);
        assert_eq!(reactor.stats().stale, 0);
    }
}

#[test]
fn an_adopted_stream_is_a_connection_like_any_other() {
    let mut reactor = reactor();
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ours = TcpStream::connect(server.local_addr().unwrap()).unwrap();
    ours.set_nonblocking(true).unwrap();
    let (mut theirs, _) = server.accept().unwrap();
    let conn = reactor.adopt(ours).unwrap();
    reactor.recv_exact(conn, Token(1), Buf::unpooled(5), 0..5).unwrap();
    reactor.send(conn, Token(2), b"hello".to_vec()).unwrap();
    assert!(matches!(next(&mut reactor), Event::Sent { result: Ok(()), .. }));
    let mut got = [0; 5];
    theirs.read_exact(&mut got).unwrap();
    theirs.write_all(&got).unwrap();
    let Event::Received { buf, result: Ok(5), .. } = next(&mut reactor) else { panic!() };
    assert_eq!(&buf[..5], b"hello");
}
