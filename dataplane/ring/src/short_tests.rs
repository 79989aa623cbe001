//! Short transfers, made on purpose: the kernel's first answer is forged before the operation is
//! submitted, and the rest is then done by a real ring. What the forged part covers must stay
//! untouched, and the rest must land exactly behind it.

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::slab::Key;
use crate::{
    Buf, Config, ConnId, DeviceFile, DiskError, DiskOp, Durability, Event, FileId, OpenMode,
    Reactor, Segment, Token,
};

const LIMIT: Duration = Duration::from_secs(20);

fn reactor() -> Reactor {
    Reactor::new(Config { arena_bytes: 40 << 20, conns_max: 8, ..Config::default() }).unwrap()
}

fn device(reactor: &mut Reactor) -> (tempfile::TempDir, FileId, Vec<u8>) {
    // Beside the test binary: a real disk, where /tmp may be memory without O_DIRECT.
    let exe = std::env::current_exe().unwrap();
    let dir = tempfile::tempdir_in(exe.parent().unwrap()).or_else(|_| tempfile::tempdir()).unwrap();
    let file = DeviceFile::open(&dir.path().join("shard"), OpenMode::CreateNew).unwrap();
    let mut content = Buf::unpooled(64 << 10);
    for (i, byte) in content.iter_mut().enumerate() {
        *byte = (i / 4096 * 7 + i % 251) as u8;
    }
    file.write_at(&content, 0).unwrap();
    let copy = content.to_vec();
    (dir, reactor.add_file(file).unwrap(), copy)
}

/// Lets everything already asked for get into the kernel, so that the next operation is alone.
fn settle(reactor: &mut Reactor) {
    let mut events = Vec::new();
    reactor.turn(Some(Duration::ZERO), &mut events).unwrap();
    assert!(events.is_empty());
}

/// Answers the one runnable operation in the kernel's place.
fn forge(reactor: &mut Reactor, res: i32) -> Key {
    let key = reactor.runnable.pop_front().unwrap();
    assert!(reactor.runnable.is_empty());
    reactor.complete(key, res, 0);
    key
}

fn next(reactor: &mut Reactor) -> Event {
    let end = Instant::now() + LIMIT;
    let mut events = Vec::new();
    while events.is_empty() {
        assert!(Instant::now() < end);
        reactor.turn(Some(Duration::from_millis(100)), &mut events).unwrap();
    }
    assert_eq!(events.len(), 1, "{events:?}");
    events.remove(0)
}

#[test]
fn a_short_read_is_continued_behind_what_came() {
    let mut reactor = reactor();
    let (_dir, file, content) = device(&mut reactor);
    settle(&mut reactor);
    let buf = Buf::unpooled(32 << 10);
    reactor.read(file, Token(1), buf, 4096..28672, 8192).unwrap();
    forge(&mut reactor, 8192);
    let Event::Read { buf, result, .. } = next(&mut reactor) else { panic!() };
    assert_eq!(result, Ok(24576));
    assert!(buf[..12288].iter().all(|&b| b == 0), "the forged part was not read");
    assert_eq!(buf[12288..28672], content[16384..32768]);
    assert!(buf[28672..].iter().all(|&b| b == 0));
    assert_eq!(reactor.stats().continued, 1);
}

#[test]
fn a_read_that_ends_off_the_grid_is_the_end_of_the_file() {
    let mut reactor = reactor();
    let (_dir, file, _) = device(&mut reactor);
    settle(&mut reactor);
    reactor.read(file, Token(1), Buf::unpooled(8192), 0..8192, 0).unwrap();
    forge(&mut reactor, 5000);
    assert!(matches!(next(&mut reactor), Event::Read { result: Ok(5000), .. }));
}

#[test]
fn a_short_write_is_continued_across_its_segments() {
    for cut in [4096usize, 8192, 12288] {
        let mut reactor = reactor();
        let (_dir, file, content) = device(&mut reactor);
        settle(&mut reactor);
        let piece = |len: usize, byte: u8| {
            let mut buf = Buf::unpooled(len);
            buf.fill(byte);
            Segment::Buf(buf, 0..len)
        };
        let segments = vec![piece(8192, 1), piece(4096, 2), piece(8192, 3)];
        reactor.write(file, Token(1), segments, 4096, Durability::Dsync).unwrap();
        forge(&mut reactor, cut as i32);
        assert!(matches!(next(&mut reactor), Event::Written { result: Ok(()), .. }));
        let mut want = content;
        let new: Vec<u8> = [(8192, 1u8), (4096, 2), (8192, 3)]
            .iter()
            .flat_map(|&(len, byte)| std::iter::repeat_n(byte, len))
            .collect();
        want[4096 + cut..4096 + new.len()].copy_from_slice(&new[cut..]);
        let device = reactor.remove_file(file).unwrap();
        let mut got = Buf::unpooled(64 << 10);
        device.read_at(&mut got, 0).unwrap();
        assert!(got[..] == want[..], "cut at {cut}");
    }
}

#[test]
fn a_write_that_cannot_go_on_is_an_error() {
    for (res, want) in [
        (0, DiskError::Stuck { offset: 0, len: 8192, got: 0 }),
        (100, DiskError::Stuck { offset: 0, len: 8192, got: 100 }),
        (-libc::EIO, DiskError::Os { op: DiskOp::Write, offset: 0, len: 8192, errno: Errno::EIO }),
    ] {
        let mut reactor = reactor();
        let (_dir, file, _) = device(&mut reactor);
        settle(&mut reactor);
        let segment = Segment::Buf(Buf::unpooled(8192), 0..8192);
        reactor.write(file, Token(1), segment, 0, Durability::Buffered).unwrap();
        forge(&mut reactor, res);
        let Event::Written { result, segments, .. } = next(&mut reactor) else { panic!() };
        assert_eq!(result, Err(want));
        assert_eq!(segments.into_bufs().len(), 1);
    }
}

#[test]
fn eagain_and_eintr_are_retried_here_but_not_for_ever() {
    let mut reactor = reactor();
    let (_dir, file, content) = device(&mut reactor);
    settle(&mut reactor);
    reactor.read(file, Token(1), Buf::unpooled(4096), 0..4096, 4096).unwrap();
    for errno in [libc::EAGAIN, libc::EINTR, libc::EAGAIN] {
        forge(&mut reactor, -errno);
    }
    let Event::Read { buf, result, .. } = next(&mut reactor) else { panic!() };
    assert_eq!((result, &buf[..]), (Ok(4096), &content[4096..8192]));
    assert_eq!(reactor.stats().retried, 3);

    settle(&mut reactor);
    reactor.read(file, Token(2), buf, 0..4096, 0).unwrap();
    while !reactor.runnable.is_empty() {
        forge(&mut reactor, -libc::EAGAIN);
    }
    let Event::Read { result, .. } = next(&mut reactor) else { panic!() };
    assert!(matches!(result, Err(DiskError::Os { errno: Errno::EAGAIN, .. })));
}

fn pair(reactor: &mut Reactor) -> (ConnId, std::net::TcpStream) {
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let theirs = std::net::TcpStream::connect(server.local_addr().unwrap()).unwrap();
    let conn = reactor.adopt(server.accept().unwrap().0).unwrap();
    theirs.set_read_timeout(Some(LIMIT)).unwrap();
    settle(reactor);
    (conn, theirs)
}

#[test]
fn a_short_receive_is_continued_until_exact() {
    let mut reactor = reactor();
    let (conn, mut theirs) = pair(&mut reactor);
    reactor.recv_exact(conn, Token(1), Buf::unpooled(4096), 10..30).unwrap();
    forge(&mut reactor, 5);
    theirs.write_all(&[9; 16]).unwrap();
    let Event::Received { buf, result, .. } = next(&mut reactor) else { panic!() };
    assert_eq!(result, Ok(20));
    assert!(buf[..15].iter().chain(&buf[30..]).all(|&b| b == 0));
    assert!(buf[15..30].iter().all(|&b| b == 9));
    // The byte too many is still in the socket.
    reactor.recv_some(conn, Token(2), buf, 0..100).unwrap();
    assert!(matches!(next(&mut reactor), Event::Received { result: Ok(1), .. }));
}

#[test]
fn a_partial_send_is_continued_at_every_byte() {
    let messages = [&b"abcd"[..], b"e", b"fghij"];
    let whole: Vec<u8> = messages.concat();
    for cut in 0..whole.len() {
        let mut reactor = reactor();
        let (conn, mut theirs) = pair(&mut reactor);
        for (n, m) in messages.iter().enumerate() {
            // Two segments each where there is room for two.
            let (a, b) = m.split_at(m.len() / 2);
            let segments = vec![Segment::Bytes(a.to_vec()), Segment::Bytes(b.to_vec())];
            reactor.send(conn, Token(n as u64), segments).unwrap();
        }
        // Build the real entry, so that the covered length is booked, then answer in its place.
        reactor.flush_sends();
        let key = *reactor.runnable.front().unwrap();
        let _ = reactor.entry(key);
        forge(&mut reactor, if cut == 0 { -libc::EAGAIN } else { cut as i32 });
        let mut got = Vec::new();
        let mut tokens = Vec::new();
        let end = Instant::now() + LIMIT;
        let mut events = Vec::new();
        while tokens.len() < messages.len() {
            assert!(Instant::now() < end);
            reactor.turn(Some(Duration::from_millis(100)), &mut events).unwrap();
            for event in events.drain(..) {
                let Event::Sent { token, result: Ok(()), .. } = event else { panic!("{event:?}") };
                tokens.push(token.0);
            }
        }
        assert_eq!(tokens, [0, 1, 2], "cut at {cut}");
        reactor.close(conn);
        drop(reactor);
        theirs.read_to_end(&mut got).unwrap();
        assert_eq!(got, whole[cut..], "cut at {cut}");
    }
}
