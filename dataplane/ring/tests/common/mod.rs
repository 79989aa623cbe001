//! Drives a real reactor in a test, with a deadline instead of sleeps.
#![allow(dead_code, unreachable_pub)]

use std::time::{Duration, Instant};

use ebb_ring::{Buf, Config, ConnId, DeviceFile, Event, FileId, OpenMode, Reactor};

pub const DEADLINE: Duration = Duration::from_secs(20);

/// In the binary `polled` with a kernel thread that submits, in `spinning` with waits that begin without a sleep.
pub fn small() -> Config {
    let sqpoll_idle_ms = if is_polled() { 20 } else { 0 };
    Config {
        arena_bytes: 40 << 20,
        conns_max: 64,
        entries: 128,
        sqpoll_idle_ms,
        spin_us: if module_path!().starts_with("spinning::") { 300 } else { 0 },
        ..Config::default()
    }
}

pub fn is_polled() -> bool {
    module_path!().starts_with("polled::")
}

pub fn reactor() -> Reactor {
    Reactor::new(small()).unwrap_or_else(|e| panic!("{e}"))
}

/// Turns until `take` says that it has seen enough; panics at the deadline.
pub fn until(reactor: &mut Reactor, mut take: impl FnMut(&mut Reactor, Event) -> bool) {
    let end = Instant::now() + DEADLINE;
    let mut events = Vec::new();
    loop {
        reactor.turn(Some(Duration::from_millis(100)), &mut events).unwrap();
        let mut done = false;
        for event in events.drain(..) {
            done |= take(reactor, event);
        }
        if done {
            return;
        }
        assert!(Instant::now() < end, "nothing conclusive in {DEADLINE:?}: {reactor:?}");
    }
}

/// The next event of any kind.
pub fn next(reactor: &mut Reactor) -> Event {
    let mut got = None;
    until(reactor, |_, e| {
        assert!(got.is_none(), "two events where one was expected: {got:?}, {e:?}");
        got = Some(e);
        true
    });
    got.unwrap()
}

/// A fresh file in a directory on the build's disk, open in `reactor`.
pub fn device(reactor: &mut Reactor, bytes: u64) -> (tempfile::TempDir, FileId) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = DeviceFile::open(&dir.path().join("shard"), OpenMode::CreateNew)
        .unwrap_or_else(|e| panic!("{e}"));
    if bytes > 0 {
        file.zero_fill(bytes, &mut |_| {}).unwrap();
    }
    let id = reactor.add_file(file).unwrap_or_else(|e| panic!("{e}"));
    (dir, id)
}

/// A listener's next connection, made by a blocking client.
pub fn pair(reactor: &mut Reactor) -> (ConnId, std::net::TcpStream) {
    let (listener, addr) = reactor.listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let client = std::net::TcpStream::connect(addr).unwrap();
    client.set_nodelay(true).unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    client.set_write_timeout(Some(DEADLINE)).unwrap();
    let mut conn = None;
    until(reactor, |_, e| match e {
        Event::Accepted { conn: c, peer, .. } => {
            assert_eq!(peer, client.local_addr().unwrap());
            conn = Some(c);
            true
        }
        other => panic!("{other:?}"),
    });
    reactor.close_listener(listener);
    (conn.unwrap(), client)
}

/// A small generator, so that a failing seed can be replayed.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

pub fn fill(buf: &mut [u8], seed: u64) {
    let mut rng = Rng(seed | 1);
    for chunk in buf.chunks_mut(8) {
        let word = rng.next().to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

pub fn heap(bytes: &[u8]) -> Buf {
    let mut buf = Buf::unpooled(bytes.len());
    buf[..bytes.len()].copy_from_slice(bytes);
    buf
}
