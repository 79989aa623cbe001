//! Device operations on a real O_DIRECT file.
mod common;

use std::sync::Arc;

use common::*;
use ebb_ring::{
    Buf, Class, Config, DeviceFile, Durability, Event, FileError, OpenMode, Pool, Reactor, Refusal,
    Segment, SetupWarning, Token,
};

fn round_trip(mut reactor: Reactor) {
    let (_dir, file) = device(&mut reactor, 32 << 20);
    for (n, class) in Class::ALL.into_iter().enumerate() {
        let offset = (n as u64) * (8 << 20);
        let len = class.bytes();
        let mut buf = reactor.arena().alloc(class, Pool::Clients).unwrap();
        fill(&mut buf, 77 + n as u64);
        let token = Token(n as u64);
        let segment = Segment::Buf(buf, 0..len);
        reactor.write(file, token, segment, offset, Durability::Buffered).unwrap();
        let Event::Written { token: t, segments, result, .. } = next(&mut reactor) else {
            panic!()
        };
        assert_eq!((t, result), (token, Ok(())));
        let written = segments.into_bufs().remove(0);
        reactor.sync(file, token).unwrap();
        assert!(matches!(next(&mut reactor), Event::Synced { result: Ok(()), .. }));
        let back = reactor.arena().alloc(class, Pool::Background).unwrap();
        reactor.read(file, token, back, 0..len, offset).unwrap();
        let Event::Read { buf, result, .. } = next(&mut reactor) else { panic!() };
        assert_eq!(result, Ok(len));
        assert!(buf[..] == written[..], "class {class:?}");
    }
    assert_eq!(reactor.disk_ops(), 0);
}

#[test]
fn what_is_written_is_read_with_registered_buffers() {
    let reactor = reactor();
    if !reactor.arena_is_registered() {
        // Unprivileged under a small memlock limit: then there must be a warning that says so.
        let said = |w: &SetupWarning| matches!(w, SetupWarning::ArenaUnregistered { .. });
        assert!(!nix::unistd::geteuid().is_root() && reactor.warnings().iter().any(said));
        println!("not registered on this machine: {:?}", reactor.warnings());
    }
    round_trip(reactor);
}

#[test]
fn what_is_written_is_read_without_registration() {
    let reactor = Reactor::new(Config { register_arena: false, ..small() }).unwrap();
    assert!(!reactor.arena_is_registered());
    round_trip(reactor);
}

#[test]
fn journal_writes_gather_their_pieces_durably() {
    let mut reactor = reactor();
    let (_dir, file) = device(&mut reactor, 1 << 20);
    // Within the arena, and with a heap buffer between (which forbids one registered entry).
    for foreign in [false, true] {
        let mut want = Vec::new();
        let mut segments = Vec::new();
        for n in 0..5u64 {
            let mut buf = if foreign && n == 2 {
                Buf::unpooled(4096)
            } else {
                reactor.arena().alloc(Class::Block4K, Pool::Clients).unwrap()
            };
            fill(&mut buf, 1000 + n);
            want.extend_from_slice(&buf);
            segments.push(if n == 3 {
                Segment::Shared(Arc::new(buf), 0..4096)
            } else {
                Segment::Buf(buf, 0..4096)
            });
        }
        reactor.write(file, Token(9), segments, 8192, Durability::Dsync).unwrap();
        let Event::Written { result, segments, .. } = next(&mut reactor) else { panic!() };
        assert_eq!(result, Ok(()));
        assert_eq!(segments.total(), want.len());
        drop(segments);
        let buf = reactor.arena().alloc_len(want.len(), Pool::Clients).unwrap();
        reactor.read(file, Token(1), buf, 0..want.len(), 8192).unwrap();
        let Event::Read { buf, result, .. } = next(&mut reactor) else { panic!() };
        assert_eq!(result, Ok(want.len()));
        assert_eq!(buf[..want.len()], want[..]);
    }
}

#[test]
fn a_read_past_the_end_is_short_and_not_an_error() {
    let mut reactor = reactor();
    let (_dir, file) = device(&mut reactor, 12288);
    for (offset, want) in [(0, 12288), (8192, 4096), (12288, 0), (1 << 20, 0)] {
        let buf = reactor.arena().alloc(Class::Small64K, Pool::Clients).unwrap();
        reactor.read(file, Token(0), buf, 0..65536, offset).unwrap();
        let Event::Read { result, .. } = next(&mut reactor) else { panic!() };
        assert_eq!(result, Ok(want), "at {offset}");
    }
}

#[test]
fn a_refused_operation_gives_its_buffer_back() {
    let mut reactor = Reactor::new(Config { disk_ops_max: 2, ..small() }).unwrap();
    let (_dir, file) = device(&mut reactor, 65536);
    let buf = Buf::unpooled(8192);
    let buf = reactor.read(file, Token(0), buf, 0..4096, 100).unwrap_err();
    assert_eq!(buf.why, Refusal::Misaligned);
    let buf = reactor.read(file, Token(0), buf.back, 1..4097, 0).unwrap_err();
    assert_eq!(buf.why, Refusal::Misaligned);
    let buf = reactor.read(file, Token(0), buf.back, 4096..12288, 0).unwrap_err();
    assert_eq!(buf.why, Refusal::BadRange);
    let buf = reactor.read(file, Token(0), buf.back, 0..0, 0).unwrap_err();
    assert_eq!(buf.why, Refusal::BadRange);
    assert_eq!(buf.back.len(), 8192);
    for _ in 0..2 {
        reactor.read(file, Token(0), Buf::unpooled(4096), 0..4096, 0).unwrap();
    }
    let refused = reactor.read(file, Token(0), buf.back, 0..4096, 0).unwrap_err();
    assert_eq!(refused.why, Refusal::TooManyOps);
    assert_eq!(reactor.remove_file(file).unwrap_err(), Refusal::FileBusy);
    let mut left = 2;
    until(&mut reactor, |_, e| {
        assert!(matches!(e, Event::Read { result: Ok(4096), .. }));
        left -= 1;
        left == 0
    });
    let device = reactor.remove_file(file).unwrap();
    assert_eq!(reactor.sync(file, Token(0)).unwrap_err(), Refusal::NoFile);
    let again = reactor.add_file(device).unwrap();
    assert_ne!(again, file, "the slot is reused under a new generation");
}

#[test]
fn more_operations_than_the_queue_holds_all_complete() {
    let mut reactor = Reactor::new(Config { entries: 8, ..small() }).unwrap();
    let (_dir, file) = device(&mut reactor, 4 << 20);
    let total = 600u64;
    for n in 0..total {
        let mut buf = Buf::unpooled(4096);
        fill(&mut buf, n + 1);
        let segment = Segment::Buf(buf, 0..4096);
        reactor.write(file, Token(n), segment, n * 4096, Durability::Buffered).unwrap();
    }
    let mut seen = vec![false; total as usize];
    until(&mut reactor, |_, e| {
        let Event::Written { token, result, .. } = e else { panic!("{e:?}") };
        assert_eq!(result, Ok(()));
        assert!(!std::mem::replace(&mut seen[token.0 as usize], true));
        seen.iter().all(|&s| s)
    });
    let stats = reactor.stats();
    assert_eq!(stats.stale, 0);
    let device = reactor.remove_file(file).unwrap();
    let mut got = Buf::unpooled(4096);
    let mut want = vec![0u8; 4096];
    for n in 0..total {
        device.read_at(&mut got, n * 4096).unwrap();
        fill(&mut want, n + 1);
        assert_eq!(got[..], want[..]);
    }
}

#[test]
fn a_device_file_is_locked_sized_and_zeroed() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("shard");
    assert!(matches!(DeviceFile::open(&path, OpenMode::Existing), Err(FileError::Os { .. })));
    let file = DeviceFile::open(&path, OpenMode::CreateNew).unwrap();
    let err = DeviceFile::open(&path, OpenMode::Existing).unwrap_err();
    assert!(matches!(err, FileError::Locked { .. }), "{err}");
    let mut seen = 0;
    file.zero_fill(5 << 20, &mut |n| seen = n).unwrap();
    assert_eq!((seen, file.size().unwrap()), (5 << 20, 5 << 20));
    assert!(file.align().mem <= 4096 && file.align().offset.is_power_of_two());
    let block = heap(&[7; 4096]);
    file.write_at(&block, 4096).unwrap();
    file.sync_data().unwrap();
    let mut back = Buf::unpooled(12288);
    assert_eq!(file.read_at(&mut back, 0).unwrap(), 12288);
    assert!(back[..4096].iter().chain(&back[8192..]).all(|&b| b == 0));
    assert!(back[4096..8192].iter().all(|&b| b == 7));
    drop(file);
    DeviceFile::open(&path, OpenMode::Existing).unwrap();
}
