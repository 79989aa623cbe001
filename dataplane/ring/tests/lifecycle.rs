//! Waking, idling, shutting down, and what happens at the limits of the machine.
#![allow(unsafe_code)] // the seccomp filter
mod common;

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;
use ebb_ring::{
    Buf, Class, Config, Durability, Event, MemlockLimit, Pool, Reactor, Segment, SendRefused,
    SetupError, SetupWarning, Token, mailbox,
};
use nix::sys::resource::{Resource, UsageWho, getrusage, setrlimit};

#[test]
fn no_wake_up_is_lost() {
    const SENDERS: u64 = 3;
    const EACH: u64 = 20_000;
    let mut reactor = reactor();
    // A tiny mailbox makes the core drain and go back to sleep all the time.
    let (tx, rx) = mailbox::<(u64, u64)>(4, reactor.waker());
    let threads: Vec<_> = (0..SENDERS)
        .map(|id| {
            let tx = tx.clone();
            std::thread::spawn(move || {
                for n in 0..EACH {
                    let mut message = (id, n);
                    loop {
                        match tx.try_send(message) {
                            Ok(()) => break,
                            Err(SendRefused::Full(m)) => {
                                message = m;
                                std::thread::yield_now();
                            }
                            Err(SendRefused::Gone(_)) => panic!("the mailbox is gone"),
                        }
                    }
                }
            })
        })
        .collect();
    let mut next = [0u64; SENDERS as usize];
    let mut left = SENDERS * EACH;
    let mut events = Vec::new();
    while left > 0 {
        // The timeout is a tripwire: a turn that runs into it slept over a message.
        let started = Instant::now();
        reactor.turn(Some(DEADLINE), &mut events).unwrap();
        assert!(started.elapsed() < DEADLINE, "a wake-up was lost with {left} messages to go");
        for event in events.drain(..) {
            assert!(matches!(event, Event::Woken));
            while let Some((id, n)) = rx.try_recv() {
                assert_eq!(next[id as usize], n, "messages of one sender keep their order");
                next[id as usize] += 1;
                left -= 1;
            }
        }
    }
    for t in threads {
        t.join().unwrap();
    }
    drop(rx);
    assert!(matches!(tx.try_send((0, 0)), Err(SendRefused::Gone(_))));
}

#[test]
fn an_idle_core_uses_no_cpu() {
    let mut reactor = reactor();
    let (_conn, _client) = pair(&mut reactor);
    let (_listener, _) = reactor.listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let (conn, _client) = pair(&mut reactor);
    reactor.recv_some(conn, Token(0), Buf::unpooled(4096), 0..4096).unwrap();
    let cpu = || {
        let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
        let us =
            |t: nix::sys::time::TimeVal| t.tv_sec() * 1_000_000 + i64::from(t.tv_usec() as i32);
        us(usage.user_time()) + us(usage.system_time())
    };
    let mut events = Vec::new();
    reactor.turn(Some(Duration::ZERO), &mut events).unwrap();
    events.clear();
    let (cpu_before, turns_before, end) =
        (cpu(), reactor.stats().turns, Instant::now() + Duration::from_secs(1));
    while Instant::now() < end {
        reactor.turn(Some(end - Instant::now()), &mut events).unwrap();
        assert!(events.is_empty(), "{events:?}");
    }
    let (used, turns) = (cpu() - cpu_before, reactor.stats().turns - turns_before);
    println!("one idle second: {used} us of CPU, {turns} turns");
    assert!(turns <= 5 && used < 10_000, "{used} us of CPU, {turns} turns");
}

/// Of all threads: where a kernel thread submits, it must fall asleep too.
#[test]
fn an_idle_process_uses_no_cpu() {
    if std::env::var_os("EBB_RING_CHILD").is_none() {
        println!("{}", child("an_idle_process_uses_no_cpu", "idle"));
        return;
    }
    let mut reactor = reactor();
    let (conn, mut client) = pair(&mut reactor);
    let cpu = || {
        let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
        let us =
            |t: nix::sys::time::TimeVal| t.tv_sec() * 1_000_000 + i64::from(t.tv_usec() as i32);
        us(usage.user_time()) + us(usage.system_time())
    };
    // More than once: it must also wake up again, and have its thread woken.
    for round in 0..3u64 {
        reactor.recv_exact(conn, Token(round), Buf::unpooled(100), 0..100).unwrap();
        client.write_all(&[1; 100]).unwrap();
        assert!(matches!(next(&mut reactor), Event::Received { result: Ok(100), .. }));
        let mut events = Vec::new();
        let quiet = |reactor: &mut Reactor, events: &mut Vec<Event>, ms: u64| {
            let end = Instant::now() + Duration::from_millis(ms);
            while Instant::now() < end {
                reactor.turn(Some(end - Instant::now()), events).unwrap();
                assert!(events.is_empty(), "{events:?}");
            }
        };
        quiet(&mut reactor, &mut events, 100);
        let before = cpu();
        quiet(&mut reactor, &mut events, 500);
        let used = cpu() - before;
        println!("half an idle second, all threads: {used} us of CPU");
        assert!(used < 10_000, "{used} us of CPU");
    }
}

#[test]
fn a_timeout_is_kept() {
    let mut reactor = reactor();
    let mut events = Vec::new();
    reactor.turn(Some(Duration::ZERO), &mut events).unwrap();
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(50) {
        reactor.turn(Some(Duration::from_millis(50)), &mut events).unwrap();
    }
    assert!(events.is_empty());
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn shutdown_gives_everything_back() {
    let mut reactor = reactor();
    let arena = reactor.arena().clone();
    let (_dir, file) = device(&mut reactor, 16 << 20);
    let (_listener, _) = reactor.listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let (conn, _client) = pair(&mut reactor);
    let buf = arena.alloc(Class::Small64K, Pool::Clients).unwrap();
    reactor.recv_exact(conn, Token(1), buf, 0..65536).unwrap();
    let big = arena.alloc(Class::Large4M, Pool::Clients).unwrap();
    let len = big.len();
    reactor.send(conn, Token(2), Segment::Buf(big, 0..len)).unwrap();
    let mut events = Vec::new();
    reactor.turn(Some(Duration::ZERO), &mut events).unwrap();
    for n in 0..8 {
        let buf = arena.alloc(Class::Small64K, Pool::Background).unwrap();
        reactor
            .write(file, Token(n), Segment::Buf(buf, 0..65536), n * 65536, Durability::Dsync)
            .unwrap();
    }
    reactor.sync(file, Token(0)).unwrap();
    reactor.turn(Some(Duration::ZERO), &mut events).unwrap();
    let buf = arena.alloc(Class::Small64K, Pool::Background).unwrap();
    reactor.read(file, Token(99), buf, 0..65536, 0).unwrap();
    let started = Instant::now();
    reactor.shutdown(&mut events);
    assert!(started.elapsed() < Duration::from_secs(4));
    let count = |f: fn(&Event) -> bool| events.iter().filter(|e| f(e)).count();
    assert_eq!(count(|e| matches!(e, Event::Received { .. })), 1);
    assert_eq!(count(|e| matches!(e, Event::Sent { .. })), 1);
    assert_eq!(count(|e| matches!(e, Event::Closed { .. })), 1);
    assert_eq!(count(|e| matches!(e, Event::Written { .. })), 8);
    assert_eq!(count(|e| matches!(e, Event::Read { .. })), 1);
    assert_eq!(count(|e| matches!(e, Event::Synced { .. })), 1);
    drop(events);
    for class in Class::ALL {
        for pool in Pool::ALL {
            assert_eq!(arena.available(class, pool), arena.capacity(class, pool));
        }
    }
}

#[test]
fn dropping_a_busy_reactor_drains_it() {
    for round in 0..20u64 {
        let mut reactor = reactor();
        let arena = reactor.arena().clone();
        let (_dir, file) = device(&mut reactor, 1 << 20);
        let (conn, mut client) = pair(&mut reactor);
        let buf = arena.alloc(Class::Small64K, Pool::Clients).unwrap();
        reactor.recv_exact(conn, Token(1), buf, 0..65536).unwrap();
        for n in 0..8 {
            let buf = arena.alloc(Class::Small64K, Pool::Clients).unwrap();
            reactor.read(file, Token(n), buf, 0..65536, n * 65536).unwrap();
        }
        if round % 2 == 0 {
            reactor.turn(Some(Duration::ZERO), &mut Vec::new()).unwrap();
        }
        client.write_all(&[1; 100]).unwrap();
        drop(reactor);
        assert_eq!(
            arena.available(Class::Small64K, Pool::Clients),
            arena.capacity(Class::Small64K, Pool::Clients)
        );
    }
}

#[test]
fn many_wakers_survive_their_reactor() {
    let reactor = reactor();
    let waker = reactor.waker();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        let handle = s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                waker.wake();
            }
        });
        drop(reactor);
        stop.store(true, Ordering::Relaxed);
        handle.join().unwrap();
    });
}

/// Runs this test binary again for one test, as a child whose limits may be changed.
fn child(test: &str, mode: &str) -> String {
    // Within the binary `polled` this is a module.
    let module = module_path!().split_once("::").map(|(_, m)| format!("{m}::")).unwrap_or_default();
    let out = std::process::Command::new(std::env::current_exe().unwrap())
        .args([&format!("{module}{test}"), "--exact", "--nocapture", "--test-threads=1"])
        .env("EBB_RING_CHILD", mode)
        .output()
        .unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "child {mode}:\n{text}");
    text
}

fn lower_memlock(bytes: u64) {
    setrlimit(Resource::RLIMIT_MEMLOCK, bytes, bytes).unwrap();
    if nix::unistd::geteuid().is_root() {
        // Root is exempt from the limit; "nobody" is not.
        nix::unistd::setuid(nix::unistd::Uid::from_raw(65534)).unwrap();
    }
}

#[test]
fn under_a_memlock_limit_it_runs_unregistered_or_explains() {
    match std::env::var("EBB_RING_CHILD").as_deref() {
        Ok("runs") => {
            lower_memlock(2 << 20);
            let mut reactor = reactor();
            let warned = reactor.warnings().iter().any(|w| {
                matches!(w, SetupWarning::ArenaUnregistered { limit, .. }
                    if *limit == MemlockLimit::Bytes(2 << 20))
            });
            assert!(warned, "{:?}", reactor.warnings());
            println!("warning: {}", reactor.warnings()[0]);
            assert!(!reactor.arena_is_registered());
            reactor.turn(Some(Duration::ZERO), &mut Vec::new()).unwrap();
        }
        Ok("explains") => {
            lower_memlock(4096);
            let Err(err) = Reactor::new(Config { entries: 4096, ..small() }) else {
                // Newer kernels may charge the ring elsewhere; then there is nothing to explain.
                println!("explained: not limited on this kernel");
                return;
            };
            assert!(matches!(err, SetupError::Memlock { .. }), "{err}");
            println!("explained: {err}");
        }
        _ => {
            let name = "under_a_memlock_limit_it_runs_unregistered_or_explains";
            let text = child(name, "runs");
            assert!(text.contains("LimitMEMLOCK=infinity"), "{text}");
            let text = child(name, "explains");
            assert!(text.contains("explained"), "{text}");
            println!("{text}");
        }
    }
}

#[test]
fn zero_copy_sends_past_the_memlock_limit_are_copied() {
    if std::env::var_os("EBB_RING_CHILD").is_none() {
        child("zero_copy_sends_past_the_memlock_limit_are_copied", "zero-copy");
        return;
    }
    lower_memlock(1 << 20);
    let mut reactor =
        Reactor::new(Config { send_zc: true, register_arena: false, ..small() }).unwrap();
    let (conn, mut client) = pair(&mut reactor);
    let messages = 4u64;
    let len = 4usize << 20;
    for n in 0..messages {
        let mut buf = Buf::unpooled(len);
        fill(&mut buf, n + 1);
        reactor.send(conn, Token(n), Segment::Buf(buf, 0..len)).unwrap();
    }
    let reader = std::thread::spawn(move || {
        let (mut got, mut want) = (vec![0; len], vec![0; len]);
        for n in 0..messages {
            std::io::Read::read_exact(&mut client, &mut got).unwrap();
            fill(&mut want, n + 1);
            assert!(got == want, "message {n}");
        }
        client
    });
    let mut sent = 0;
    until(&mut reactor, |_, e| {
        let Event::Sent { result, .. } = e else { panic!("{e:?}") };
        assert_eq!(result, Ok(()));
        sent += 1;
        sent == messages
    });
    drop(reader.join().unwrap());
}

/// Makes one system call (optionally: with this second argument) fail with `errno` on this thread.
fn deny(nr: libc::c_long, second: Option<u32>, errno: i32) {
    let op = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let ret = libc::BPF_RET | libc::BPF_K;
    // seccomp_data: nr at 0, the second argument's low half at 24 (little endian).
    let mut program = vec![
        op(load, 0, 0, 0),
        op(equal, nr as u32, 0, 3),
        op(load, 24, 0, 0),
        op(equal, second.unwrap_or(0), 0, 1),
        op(ret, libc::SECCOMP_RET_ERRNO | errno as u32, 0, 0),
        op(ret, libc::SECCOMP_RET_ALLOW, 0, 0),
    ];
    if second.is_none() {
        program[1] = op(equal, nr as u32, 0, 1);
        program.drain(2..4);
    }
    let fprog = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: prctl with no_new_privs takes plain numbers; the filter program is alive for the
    // call, and the kernel copies it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const fprog), 0);
    }
}

/// Real refusals by the kernel, made with a seccomp filter, each on a thread of its own.
#[test]
fn a_jailed_or_old_kernel_is_explained_or_survived() {
    let with = |nr, second, errno| {
        std::thread::spawn(move || {
            deny(nr, second, errno);
            let register_arena = second == Some(0);
            Reactor::new(Config { register_arena, ..small() }).map(|mut r| {
                r.turn(Some(Duration::ZERO), &mut Vec::new()).unwrap();
                let mut warnings = r.warnings().to_vec();
                warnings.retain(|w| *w != SetupWarning::NoHugePages);
                warnings
            })
        })
        .join()
        .unwrap()
    };
    let setup = libc::SYS_io_uring_setup;
    let register = libc::SYS_io_uring_register;
    assert!(matches!(with(setup, None, libc::EPERM), Err(SetupError::Forbidden { .. })));
    assert!(matches!(with(setup, None, libc::ENOSYS), Err(SetupError::KernelTooOld { .. })));
    assert!(matches!(with(setup, None, libc::EINVAL), Err(SetupError::KernelTooOld { .. })));
    assert!(matches!(with(setup, None, libc::ENOMEM), Err(SetupError::Memlock { .. })));
    // The file table is needed (IORING_REGISTER_FILES2); its size is bounded by open files.
    assert!(matches!(with(register, Some(13), libc::EMFILE), Err(SetupError::OpenFiles { .. })));
    assert!(matches!(with(register, Some(13), libc::EINVAL), Err(SetupError::KernelTooOld { .. })));
    // Registered buffers (0), bounded workers (19), the ring's own descriptor (20), the probe (8):
    // the reactor works without.
    for (op, errno) in [(0, libc::ENOMEM), (19, libc::EINVAL), (20, libc::EINVAL)] {
        let warnings = with(register, Some(op), errno).unwrap();
        assert_eq!(warnings.len(), 1, "register opcode {op}: {warnings:?}");
    }
    assert_eq!(with(register, Some(8), libc::EINVAL).unwrap(), []);
}

#[test]
fn a_configuration_that_cannot_work_is_refused_in_words() {
    let refuse = |cfg: Config| match Reactor::new(cfg) {
        Ok(_) => panic!("accepted"),
        Err(e) => e.to_string(),
    };
    assert!(refuse(Config { entries: 1, ..small() }).contains("entries"));
    assert!(refuse(Config { arena_bytes: 1 << 20, ..small() }).contains("too small"));
    assert!(refuse(Config { pool_percent: [90, 20, 20], ..small() }).contains("percent"));
}
