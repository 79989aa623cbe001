//! What one core serves: 1 MiB reads from an O_DIRECT file, sent over loopback.
//!
//! `echo_read FILE [SECONDS] [CONNECTIONS] [DEPTH] [REGISTERED]`: a reactor on the main thread serves
//! random aligned 1 MiB reads of FILE (made and filled with 1 GiB if missing) to blocking clients on
//! other threads; prints MB/s, p50 and p99 of the request latency, and the core's CPU time per GB.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ebb_ring::{
    Buf, Class, Config, ConnId, DeviceFile, Event, OpenMode, Pool, Reactor, Segment, Token,
};
use nix::sys::resource::{UsageWho, getrusage};

const READ: usize = 1 << 20;
const SPAN: u64 = 1 << 30;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: echo_read FILE [SECONDS] [CONNECTIONS] [DEPTH]")?;
    let mut number = |default: u64| args.next().map_or(Ok(default), |s| s.parse::<u64>());
    let (seconds, connections, depth) = (number(5)?, number(2)?, number(4)?);
    let registered = number(1)? == 1;

    let device = DeviceFile::open(path.as_ref(), OpenMode::CreateIfMissing)?;
    if device.size()? < SPAN {
        device.zero_fill(SPAN, &mut |_| {})?;
    }
    let cfg = Config { arena_bytes: 192 << 20, register_arena: registered, ..Config::default() };
    let mut reactor = Reactor::new(cfg)?;
    let file = reactor.add_file(device).map_err(|r| r.why)?;
    let (_, addr) = reactor.listen("127.0.0.1:0".parse()?)?;

    let stop = Arc::new(AtomicBool::new(false));
    let bytes = Arc::new(AtomicU64::new(0));
    let clients: Vec<_> = (0..connections)
        .map(|id| {
            let (stop, bytes) = (stop.clone(), bytes.clone());
            std::thread::spawn(move || client(addr, id, depth, &stop, &bytes))
        })
        .collect();

    let started = Instant::now();
    let end = started + Duration::from_secs(seconds);
    let cpu_before = cpu_seconds();
    let mut server = Server { file, waiting: Vec::new(), streams: HashMap::new() };
    let mut events = Vec::new();
    while Instant::now() < end {
        reactor.turn(Some(Duration::from_millis(100)), &mut events)?;
        for event in events.drain(..) {
            server.handle(&mut reactor, event)?;
        }
    }
    let cpu = cpu_seconds() - cpu_before;
    let elapsed = started.elapsed().as_secs_f64();
    let total = bytes.load(Ordering::Relaxed) as f64;
    stop.store(true, Ordering::Relaxed);
    let stats = reactor.stats();
    reactor.shutdown(&mut events);
    drop(events);
    let mut latencies: Vec<u64> =
        clients.into_iter().flat_map(|c| c.join().unwrap_or_default()).collect();
    latencies.sort_unstable();
    let at = |q: f64| latencies.get((latencies.len() as f64 * q) as usize).copied().unwrap_or(0);
    println!(
        "{:.0} MB/s, p50 {} us, p99 {} us, core CPU {:.2} s/GB, {:.1} ops per turn",
        total / elapsed / 1e6,
        at(0.50),
        at(0.99),
        cpu / (total / 1e9),
        stats.submitted as f64 / stats.turns as f64,
    );
    Ok(())
}

struct Server {
    file: ebb_ring::FileId,
    /// Requests that wait for a buffer: admission control.
    waiting: Vec<(ConnId, u64)>,
    streams: HashMap<u64, ConnId>,
}

impl Server {
    fn handle(
        &mut self,
        reactor: &mut Reactor,
        event: Event,
    ) -> Result<(), Box<dyn std::error::Error>> {
        match event {
            Event::Accepted { conn, .. } => {
                self.streams.insert(conn.to_bits(), conn);
                receive(reactor, conn, Buf::unpooled(4096), 0);
            }
            // The token carries the bytes already in the buffer.
            Event::Received { conn, token, buf, result, .. } => match result {
                Ok(n) => self.requests(reactor, conn, buf, token.0 as usize + n),
                Err(_) => reactor.close(conn),
            },
            Event::Read { token, buf, range, result, .. } => {
                result?;
                if let Some(&conn) = self.streams.get(&token.0) {
                    let _ = reactor.send(conn, Token(0), Segment::Buf(buf, range));
                }
            }
            Event::Sent { segments, .. } => {
                drop(segments);
                self.admit(reactor);
            }
            Event::Closed { conn, .. } => {
                self.streams.remove(&conn.to_bits());
            }
            _ => {}
        }
        Ok(())
    }

    /// Parses every whole request in the buffer, keeps the tail.
    fn requests(&mut self, reactor: &mut Reactor, conn: ConnId, mut buf: Buf, have: usize) {
        let whole = have / 8 * 8;
        for request in buf[..whole].chunks_exact(8) {
            let offset = u64::from_le_bytes([
                request[0], request[1], request[2], request[3], request[4], request[5], request[6],
                request[7],
            ]);
            self.waiting.push((conn, offset % (SPAN / READ as u64) * READ as u64));
        }
        buf.copy_within(whole..have, 0);
        receive(reactor, conn, buf, have - whole);
        self.admit(reactor);
    }

    fn admit(&mut self, reactor: &mut Reactor) {
        while let Some(&(conn, offset)) = self.waiting.last() {
            let Some(buf) = reactor.arena().alloc(Class::Mid1M, Pool::Clients) else { return };
            if reactor.read(self.file, Token(conn.to_bits()), buf, 0..READ, offset).is_err() {
                return;
            }
            self.waiting.pop();
        }
    }
}

fn receive(reactor: &mut Reactor, conn: ConnId, buf: Buf, have: usize) {
    let len = buf.len();
    let _ = reactor.recv_some(conn, Token(have as u64), buf, have..len);
}

/// Keeps `depth` requests outstanding; answers the latencies in microseconds.
fn client(
    addr: std::net::SocketAddr,
    id: u64,
    depth: u64,
    stop: &AtomicBool,
    bytes: &AtomicU64,
) -> Vec<u64> {
    let mut latencies = Vec::new();
    let Ok(mut stream) = TcpStream::connect(addr) else { return latencies };
    let _ = stream.set_nodelay(true);
    let mut state = id.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut ask = |stream: &mut TcpStream| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        stream.write_all(&(state >> 1).to_le_bytes())
    };
    let mut sent = std::collections::VecDeque::new();
    for _ in 0..depth {
        if ask(&mut stream).is_err() {
            return latencies;
        }
        sent.push_back(Instant::now());
    }
    let mut buf = vec![0u8; READ];
    while !stop.load(Ordering::Relaxed) {
        if stream.read_exact(&mut buf).is_err() || ask(&mut stream).is_err() {
            break;
        }
        bytes.fetch_add(READ as u64, Ordering::Relaxed);
        if let Some(at) = sent.pop_front() {
            latencies.push(at.elapsed().as_micros() as u64);
        }
        sent.push_back(Instant::now());
    }
    latencies
}

fn cpu_seconds() -> f64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_THREAD) else { return 0.0 };
    let s = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    s(usage.user_time()) + s(usage.system_time())
}
