//! Links to other cores over real sockets: a ring on this side, a scripted server on the other.

use super::link::Caller;
use super::peers::Peers;
use crate::clock::now_ms;
use crate::core::{Answer, Call, Channel, LinkId, PeerError, Token, Want};
use crate::resolve;
use ebb_dataplane_protocol::auth::{self, Challenge, ClusterKey, Hello, Proof, Role};
use ebb_dataplane_protocol::header::HEADER_BYTES;
use ebb_dataplane_protocol::*;
use ebb_ring::{Buf, Class, Event, Pool, Reactor};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(20);
const LONG: u32 = 60_000;
const CLUSTER: ClusterId = ClusterId(0xebb);
const ME: ShardRef = ShardRef { node: NodeId(1), core: CoreId(0) };
const OTHER: ShardRef = ShardRef { node: NodeId(2), core: CoreId(1) };

fn key() -> ClusterKey {
    ClusterKey::new([7; 32])
}

fn map(version: u64, host: &str, port: u16) -> Arc<ClusterMap> {
    let other = NodeInfo {
        id: OTHER.node,
        store: 0xbeef,
        state: NodeState::Active,
        host: host.into(),
        ports: vec![1, port],
        capacity_bytes: 0,
    };
    let nodes = vec![other];
    Arc::new(ClusterMap {
        version: MapVersion(version),
        cluster: CLUSTER,
        nodes,
        ..Default::default()
    })
}

/// A core's glue, reduced to its links.
struct Core {
    reactor: Reactor,
    peers: Peers,
    names: resolve::ResolveQueue,
    answers: Vec<Answer<Buf>>,
    last: u64,
}

impl Core {
    fn new(host: &str, port: u16) -> Self {
        let cfg = ebb_ring::Config { arena_bytes: 128 << 20, conns_max: 8, ..Default::default() };
        let mut reactor = Reactor::new(cfg).expect("a ring");
        let caller = Caller { key: key(), cluster: CLUSTER, me: ME, store: 1, boot: 2 };
        let (mut senders, names) = resolve::queue(1);
        let mut peers = Peers::new(caller, senders.pop().expect("one"));
        peers.set_map(&mut reactor, map(1, host, port), now_ms());
        Self { reactor, peers, names, answers: Vec::new(), last: 0 }
    }

    fn call(&mut self, body: &[u8], edit: impl FnOnce(&mut Call<Buf>)) -> Token {
        self.last += 1;
        let token = Token(self.last);
        let mut call = Call {
            token,
            peer: OTHER,
            channel: Channel::Stream,
            link: None,
            header: Header::request(Opcode::Ping, 0),
            body: body.to_vec(),
            payload: Vec::new(),
            want: None,
            timeout_ms: LONG,
        };
        edit(&mut call);
        self.peers.call(&mut self.reactor, call, now_ms());
        token
    }

    fn turn(&mut self) {
        let mut events = Vec::new();
        self.reactor.turn(Some(Duration::from_millis(5)), &mut events).expect("turns");
        let (reactor, peers, now) = (&mut self.reactor, &mut self.peers, now_ms());
        for event in events {
            match event {
                Event::Connected { conn, result, .. } => {
                    peers.connected(reactor, conn, result, now);
                }
                Event::Received { conn, buf, range, result, .. } => {
                    peers.received(reactor, conn, buf, range, result, now);
                }
                Event::Sent { conn, result, .. } => peers.sent(reactor, conn, result, now),
                Event::Closed { conn, .. } => {
                    peers.closed(reactor, conn, now);
                    assert!(!peers.owns(conn));
                }
                Event::Woken => {}
                other => panic!("{other:?}"),
            }
        }
        peers.expire(reactor, now);
        self.answers.extend(peers.take_answers());
    }

    /// The next `n` answers.
    fn answers(&mut self, n: usize) -> Vec<Answer<Buf>> {
        let end = Instant::now() + DEADLINE;
        while self.answers.len() < n {
            assert!(Instant::now() < end, "{} of {n} answers", self.answers.len());
            self.turn();
        }
        assert_eq!(self.answers.len(), n, "one answer per call");
        std::mem::take(&mut self.answers)
    }

    /// Waits the pause after a failure out.
    fn wait_out(&mut self, why: Result<(Header, Vec<u8>), PeerError>) -> u32 {
        let Err(PeerError::Unreachable { retry_after_ms }) = why else { panic!("{why:?}") };
        let end = now_ms() + u64::from(retry_after_ms);
        while now_ms() <= end {
            self.turn();
        }
        retry_after_ms
    }

    fn slot(&self) -> Buf {
        self.reactor.arena().alloc(Class::Mid1M, Pool::Clients).expect("a slot")
    }
}

// --- the other side -----------------------------------------------------------------------------

fn read_frame(s: &mut TcpStream) -> Option<(Header, Vec<u8>, Vec<u8>)> {
    let mut head = [0; HEADER_BYTES];
    s.read_exact(&mut head).ok()?;
    let h = Header::decode(&head, 1 << 20).expect("a header");
    let (mut body, mut payload) =
        (vec![0; h.body_bytes as usize], vec![0; h.payload_bytes as usize]);
    s.read_exact(&mut body).ok()?;
    s.read_exact(&mut payload).ok()?;
    assert_eq!(crc32c(&body), h.body_crc);
    Some((h, body, payload))
}

fn reply_bytes(h: &Header, body: &[u8], payload: &[u8]) -> Vec<u8> {
    let header = h.reply(Status::Ok).with_body(body).with_payload(payload.len() as u32);
    [&header.encode()[..], body, payload].concat()
}

fn greet(s: &mut TcpStream, key: &ClusterKey) -> Option<Hello> {
    let (h, hello, _) = read_frame(s)?;
    assert_eq!(h.opcode, Opcode::Hello);
    let nonce = [9; 16];
    let proof = auth::server_proof(key, &hello, &nonce);
    let challenge = codec::encode(&Challenge { nonce, proof, cluster: CLUSTER });
    s.write_all(&reply_bytes(&h, &challenge, &[])).ok()?;
    let (h, proof, _) = read_frame(s)?;
    let proof: Proof = codec::decode(&proof).expect("a proof");
    assert!(auth::check_client(key, &hello, &nonce, &proof.proof));
    s.write_all(&reply_bytes(&h, &[], &[])).ok()?;
    Some(codec::decode(&hello).expect("a hello"))
}

/// A server that greets connection after connection and gives each to the script, with its number.
fn server(
    connections: usize,
    script: impl Fn(usize, TcpStream) + Send + 'static,
) -> (u16, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = listener.local_addr().expect("an address").port();
    let thread = std::thread::spawn(move || {
        for n in 0..connections {
            let (mut s, _) = listener.accept().expect("accepted");
            s.set_read_timeout(Some(DEADLINE)).expect("set");
            let hello = greet(&mut s, &key()).expect("greeted");
            let peer = hello.peer.expect("a core");
            assert_eq!((hello.role, peer.from, peer.to), (Role::Node, ME, OTHER));
            assert_eq!((peer.store, peer.boot, peer.to_store), (1, 2, 0xbeef));
            script(n, s);
        }
    });
    (port, thread)
}

fn number(body: &[u8]) -> u64 {
    u64::from_le_bytes(body.try_into().expect("eight bytes"))
}

#[test]
fn calls_leave_in_order_and_each_reply_finds_its_call_and_slot() {
    const CALLS: u64 = 400;
    let (port, thread) = server(1, |_, mut s| {
        let mut held = Vec::new();
        for n in 0..CALLS {
            let (h, body, payload) = read_frame(&mut s).expect("a call");
            assert_eq!(number(&body), n, "in the order in which they were given");
            assert!(payload.len() == 5000 && payload.iter().all(|b| *b == n as u8), "call {n}");
            held.push((h, n));
            // Answered out of order, every tenth with a payload of its own.
            if held.len() == 40 {
                for (h, n) in held.drain(..).rev() {
                    let long = if n % 10 == 3 { 300_000 + n as usize } else { 0 };
                    let reply = reply_bytes(&h, &n.to_le_bytes(), &vec![!(n as u8); long]);
                    s.write_all(&reply).expect("replied");
                }
            }
        }
        assert!(read_frame(&mut s).is_none());
    });
    let mut core = Core::new("127.0.0.1", port);
    let mut slots: Vec<Buf> = (0..4).map(|_| core.slot()).collect();
    let mut given = 0;
    let mut link = None;
    let mut seen = vec![false; CALLS as usize];
    let end = Instant::now() + DEADLINE;
    while seen.contains(&false) {
        assert!(Instant::now() < end, "not all answered");
        while given < CALLS && (given % 10 != 3 || !slots.is_empty()) {
            let mut bytes = Buf::unpooled(8192);
            bytes.fill(given as u8);
            let want = if given % 10 == 3 { slots.pop() } else { None };
            core.call(&given.to_le_bytes(), |c| {
                c.payload = vec![(Arc::new(bytes), 100..5100)];
                c.want = want.map(|buf| Want { buf, range: 4096..600_000 });
                c.link = link;
            });
            given += 1;
        }
        core.turn();
        for answer in std::mem::take(&mut core.answers) {
            let (header, body) = answer.outcome.expect("answered");
            let n = number(&body);
            assert_eq!(answer.token, Token(n + 1));
            assert!(!std::mem::replace(&mut seen[n as usize], true), "answered twice");
            assert_eq!(*link.get_or_insert(answer.link), answer.link);
            if n % 10 == 3 {
                let buf = answer.buf.expect("the slot is back");
                let payload = &buf[4096..4096 + header.payload_bytes as usize];
                assert_eq!(payload.len(), 300_000 + n as usize);
                assert!(payload.iter().all(|b| *b == !(n as u8)), "call {n}");
                slots.push(buf);
            } else {
                assert!(answer.buf.is_none() && header.payload_bytes == 0);
            }
        }
    }
    drop(core);
    thread.join().expect("no panic");
}

#[test]
fn a_break_ends_every_call_once_and_nothing_of_the_link_comes_later() {
    let (port, thread) = server(2, |n, mut s| {
        if n == 1 {
            let (h, body, _) = read_frame(&mut s).expect("a call");
            assert_eq!(body, b"after", "what belonged to the old link stays there");
            s.write_all(&reply_bytes(&h, b"again", &[])).expect("replied");
            assert!(read_frame(&mut s).is_none());
            return;
        }
        let calls: Vec<_> = (0..6).map(|_| read_frame(&mut s).expect("a call").0).collect();
        s.write_all(&reply_bytes(&calls[1], b"one", &[])).expect("replied");
        // Breaks in the middle of a payload.
        let half = reply_bytes(&calls[3], b"three", &[3; 500_000]);
        s.write_all(&half[..200_000]).expect("sent");
    });
    let mut core = Core::new("127.0.0.1", port);
    for _ in 0..6 {
        let buf = core.slot();
        core.call(b"before", |c| c.want = Some(Want { buf, range: 0..600_000 }));
    }
    let answers = core.answers(6);
    let link = answers[0].link;
    for a in answers {
        assert_eq!(a.link, link);
        assert!(a.buf.expect("the slot is back").len() >= 600_000);
        match (a.token.0, a.outcome) {
            (2, Ok((_, body))) => assert_eq!(body, b"one"),
            (_, outcome) => assert_eq!(outcome, Err(PeerError::Broken)),
        }
    }
    // Given to the old link: broken at once, never sent.
    core.call(b"late", |c| c.link = Some(link));
    let late = core.answers(1).remove(0);
    assert_eq!(late.outcome, Err(PeerError::Broken));
    // The next link waits a little, then works under another name.
    core.call(b"too soon", |_| {});
    let soon = core.answers(1).remove(0);
    core.wait_out(soon.outcome);
    core.call(b"after", |_| {});
    let after = core.answers(1).remove(0);
    assert_eq!(after.outcome.expect("answered").1, b"again");
    assert_ne!(after.link, link);
    drop(core);
    thread.join().expect("no panic");
}

#[test]
fn a_call_without_an_answer_in_its_time_ends_the_link() {
    let (port, thread) = server(1, |_, mut s| {
        let (h, ..) = read_frame(&mut s).expect("a call");
        s.write_all(&reply_bytes(&h, b"", &[])).expect("replied");
        while read_frame(&mut s).is_some() {}
    });
    let mut core = Core::new("127.0.0.1", port);
    core.call(b"0", |_| {});
    let link = core.answers(1)[0].link;
    let started = Instant::now();
    let slow = core.call(b"1", |_| {});
    let late = core.call(b"2", |c| c.timeout_ms = 150);
    let answers = core.answers(2);
    assert!((150..5000).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
    for a in answers {
        assert_eq!(a.link, link);
        let why = if a.token == late { PeerError::TimedOut } else { PeerError::Broken };
        assert_eq!(a.outcome, Err(why), "{:?} of {slow:?} {late:?}", a.token);
    }
    drop(core);
    thread.join().expect("no panic");
}

#[test]
fn a_break_of_one_channel_leaves_the_other_alone() {
    let (port, thread) = server(1, move |_, mut stream| {
        while let Some((h, ..)) = read_frame(&mut stream) {
            stream.write_all(&reply_bytes(&h, b"", &[])).expect("replied");
        }
    });
    let mut core = Core::new("127.0.0.1", port);
    core.call(b"x", |_| {});
    let link = core.answers(1)[0].link;
    // Nobody accepts a second one: it never gets past its greeting.
    core.call(b"y", |c| (c.channel, c.timeout_ms) = (Channel::Bulk, 100));
    let bulk = core.answers(1).remove(0);
    assert!(bulk.outcome.is_err() && bulk.link != link, "{bulk:?}");
    core.call(b"z", |c| c.link = Some(link));
    assert!(core.answers(1)[0].outcome.is_ok(), "the stream goes on");
    drop(core);
    thread.join().expect("no panic");
}

#[test]
fn who_cannot_be_reached_is_tried_less_and_less_often() {
    let port = TcpListener::bind("127.0.0.1:0").expect("bound").local_addr().expect("addr").port();
    let mut core = Core::new("127.0.0.1", port);
    let mut pauses = Vec::new();
    for _ in 0..5 {
        let buf = core.slot();
        core.call(b"x", |c| c.want = Some(Want { buf, range: 0..1 }));
        let a = core.answers(1).remove(0);
        assert!(a.buf.is_some());
        // In between nobody is bothered.
        core.call(b"x", |_| {});
        let soon = core.answers(1).remove(0).outcome;
        assert!(matches!(soon, Err(PeerError::Unreachable { .. })), "{soon:?}");
        pauses.push(core.wait_out(a.outcome));
    }
    assert!(pauses.windows(2).all(|p| p[1] == 2 * p[0]), "{pauses:?}");
    // A core that no map names.
    let nobody = ShardRef { node: NodeId(77), core: CoreId(0) };
    core.call(b"x", |c| c.peer = nobody);
    let a = core.answers(1).remove(0);
    assert!(matches!(a.outcome, Err(PeerError::Unreachable { .. })), "{a:?}");
}

#[test]
fn nothing_is_said_to_who_does_not_hold_the_key() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = listener.local_addr().expect("addr").port();
    let thread = std::thread::spawn(move || {
        let (mut s, _) = listener.accept().expect("accepted");
        let (h, hello, _) = read_frame(&mut s).expect("a hello");
        let proof = auth::server_proof(&ClusterKey::new([8; 32]), &hello, &[9; 16]);
        let challenge = Challenge { nonce: [9; 16], proof, cluster: CLUSTER };
        s.write_all(&reply_bytes(&h, &codec::encode(&challenge), &[])).expect("sent");
        assert!(read_frame(&mut s).is_none(), "neither a proof nor a call");
    });
    let mut core = Core::new("127.0.0.1", port);
    core.call(b"secret", |_| {});
    let a = core.answers(1).remove(0);
    assert!(matches!(a.outcome, Err(PeerError::Unreachable { .. })), "{a:?}");
    thread.join().expect("no panic");
}

#[test]
fn a_reply_that_makes_no_sense_ends_the_link() {
    type Script = fn(&Header) -> Vec<u8>;
    let scripts: [Script; 6] = [
        |_| vec![0xff; 64],
        |h| h.with_body(b"").encode().to_vec(),
        |h| reply_bytes(&Header { request_id: h.request_id + 1, ..*h }, b"", &[]),
        |h| reply_bytes(&Header { opcode: Opcode::Read, ..*h }, b"", &[]),
        |h| reply_bytes(h, b"", &[0; 101]),
        |h| {
            let mut bytes = reply_bytes(h, b"body", &[]);
            bytes[HEADER_BYTES] ^= 1;
            bytes
        },
    ];
    for (n, script) in scripts.into_iter().enumerate() {
        let (port, thread) = server(1, move |_, mut s| {
            let (h, ..) = read_frame(&mut s).expect("a call");
            s.write_all(&script(&h)).expect("sent");
            while read_frame(&mut s).is_some() {}
        });
        let mut core = Core::new("127.0.0.1", port);
        let buf = core.slot();
        core.call(b"x", |c| c.want = Some(Want { buf, range: 0..100 }));
        let a = core.answers(1).remove(0);
        assert_eq!(a.outcome, Err(PeerError::Broken), "script {n}");
        assert!(a.buf.is_some());
        drop(core);
        thread.join().expect("no panic");
    }
}

#[test]
fn calls_are_bounded_and_a_stale_link_takes_none() {
    // It never greets: all that is given waits.
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let mut core = Core::new("127.0.0.1", listener.local_addr().expect("addr").port());
    core.call(b"x", |c| c.link = Some(LinkId(5)));
    assert_eq!(core.answers(1)[0].outcome, Err(PeerError::Broken), "it never was");
    for _ in 0..1024 {
        core.call(b"x", |_| {});
    }
    core.call(b"x", |_| {});
    let full = core.answers(1).remove(0);
    assert_eq!((full.token, full.outcome), (Token(1026), Err(PeerError::Full)));
}

#[test]
fn a_name_is_looked_up_elsewhere_and_a_new_address_ends_the_link() {
    let answer = |_: usize, mut s: TcpStream| {
        while let Some((h, ..)) = read_frame(&mut s) {
            if s.write_all(&reply_bytes(&h, b"", &[])).is_err() {
                return;
            }
        }
    };
    let (port, first) = server(1, answer);
    let mut core = Core::new("node-two.example", port);
    core.call(b"x", |_| {});
    let (asker, name) = core.names.try_recv().expect("asked");
    assert_eq!((asker, name.as_str()), (0, "node-two.example"));
    core.turn();
    assert!(core.answers.is_empty(), "it waits for the address");
    let here = Some("127.0.0.1".parse().expect("an address"));
    core.peers.resolved(&mut core.reactor, &name, here, now_ms());
    let link = core.answers(1).remove(0).link;
    core.call(b"y", |c| c.link = Some(link));
    assert!(core.answers(1)[0].outcome.is_ok());
    // It moves: the old link ends, the next call goes to the new address at once.
    let (moved, second) = server(1, answer);
    core.peers.set_map(&mut core.reactor, map(2, "127.0.0.1", moved), now_ms());
    core.call(b"z", |c| c.link = Some(link));
    assert_eq!(core.answers(1)[0].outcome, Err(PeerError::Broken));
    core.call(b"z", |_| {});
    let a = core.answers(1).remove(0);
    assert!(a.outcome.is_ok() && a.link != link, "{a:?}");
    first.join().expect("no panic");
    // A name without an address.
    core.peers.set_map(&mut core.reactor, map(3, "nowhere.example", moved), now_ms());
    second.join().expect("no panic");
    core.call(b"z", |_| {});
    while core.names.try_recv().is_err() {
        core.turn();
    }
    core.peers.resolved(&mut core.reactor, "nowhere.example", None, now_ms());
    let a = core.answers(1).remove(0);
    assert!(matches!(a.outcome, Err(PeerError::Unreachable { .. })), "{a:?}");
}
