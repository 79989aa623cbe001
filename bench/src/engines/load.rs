//! The load generator: a fixed number of reads in flight over a few connections, for a fixed time.
//!
//! One blocking thread per connection, all on one CPU: what is compared is the server, so the client
//! is the same for all and does as little as it can. A reply's bytes are received and thrown away, but for the
//! first few of each connection, before the clock runs: those are compared with what the file holds, and
//! with the checksums beside them.

use super::child::Usage;
use super::job::{BLOCK, READ_BYTES_MAX, REQUEST_BYTES, is_content};
use crate::BenchError;
use crate::chunk::{Slots, histogram};
use ebb_dataplane_protocol::data::{DataContext, decode_checksums};
use ebb_dataplane_protocol::header::{BODY_BYTES_MAX_DATA, HEADER_BYTES};
use ebb_dataplane_protocol::{Header, Status, crc32c};
use hdrhistogram::Histogram;
use nix::unistd::Pid;
use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

/// Replies of each connection that are looked at before the clock runs.
const LOOKED_AT: usize = 4;
/// A server that says nothing for this long is given up.
const PATIENCE: Duration = Duration::from_secs(20);
/// Bytes asked of a socket at once; larger payloads go straight to their place.
const READ_AHEAD_BYTES: usize = 64 << 10;

/// Who answers.
pub(crate) trait Target: Sync {
    /// A connection, ready for reads. `lane` tells those of one turn apart.
    fn connect(&self, lane: u32) -> Result<TcpStream, BenchError>;
    /// How to ask for a range of the file: without id, lengths and checksums.
    fn ask(&self, at: u64, bytes: u32) -> (Header, DataContext);
    /// Whether replies carry a checksum per block.
    fn checksums(&self) -> bool;
}

/// What is asked.
#[derive(Clone)]
pub(crate) struct Load {
    /// Bytes of a request.
    pub(crate) size: u32,
    /// Requests in flight, over all connections.
    pub(crate) depth: u32,
    /// Connections at most.
    pub(crate) connections: u32,
    /// For how long.
    pub(crate) duration: Duration,
    /// Where the generator's threads run.
    pub(crate) cpu: Option<usize>,
    /// The offsets to choose from.
    pub(crate) slots: Arc<Slots>,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sample {
    /// Requests per second.
    pub(crate) iops: f64,
    /// 10^6 bytes per second.
    pub(crate) mb_per_s: f64,
    /// Bytes in all.
    pub(crate) bytes: f64,
    /// Latencies, µs.
    pub(crate) p50_us: f64,
    /// 99th percentile, µs.
    pub(crate) p99_us: f64,
    /// CPU seconds of the generator: near one per second, and it is what was measured.
    pub(crate) client_cpu_s: f64,
    /// Seconds.
    pub(crate) seconds: f64,
}

fn failed(why: impl std::fmt::Display) -> BenchError {
    BenchError::Program { program: "the server", why: why.to_string() }
}

/// One connection.
struct Lane<'a> {
    target: &'a dyn Target,
    load: &'a Load,
    write: TcpStream,
    read: BufReader<TcpStream>,
    random: u64,
    /// When each request in flight was sent, and for what; its index is its id.
    sent: Vec<(Instant, u64)>,
    payload: Vec<u8>,
}

impl<'a> Lane<'a> {
    fn open(
        target: &'a dyn Target,
        load: &'a Load,
        lane: u32,
        window: u32,
    ) -> Result<Self, BenchError> {
        let write = target.connect(lane)?;
        write.set_nodelay(true).map_err(failed)?;
        write.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        write.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        let read = BufReader::with_capacity(READ_AHEAD_BYTES, write.try_clone().map_err(failed)?);
        let mut this = Self {
            target,
            load,
            write,
            read,
            random: u64::from(lane) + 1,
            sent: vec![(Instant::now(), 0); window as usize],
            payload: vec![0; READ_BYTES_MAX],
        };
        for _ in 0..LOOKED_AT {
            this.ask(0)?;
            let (_, crcs) = this.answer()?;
            this.look_at(&crcs)?;
        }
        Ok(this)
    }

    /// Sends request `id` for a range of its own choice.
    fn ask(&mut self, id: usize) -> Result<(), BenchError> {
        // xorshift64*: Vigna, "An experimental exploration of Marsaglia's xorshift generators".
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let at = self.load.slots.offset(self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16);
        let (header, context) = self.target.ask(at, self.load.size);
        let body = context.encode();
        let header = Header { request_id: id as u64, ..header }.with_body(&body);
        let mut frame = [0u8; REQUEST_BYTES];
        frame[..HEADER_BYTES].copy_from_slice(&header.encode());
        frame[HEADER_BYTES..].copy_from_slice(&body);
        self.sent[id] = (Instant::now(), at);
        self.write.write_all(&frame).map_err(failed)
    }

    /// Receives a reply; its bytes are in `payload`. Returns its id and its body.
    fn answer(&mut self) -> Result<(usize, Vec<u8>), BenchError> {
        let mut head = [0u8; HEADER_BYTES];
        self.read.read_exact(&mut head).map_err(failed)?;
        let header = Header::decode(&head, BODY_BYTES_MAX_DATA).map_err(failed)?;
        let mut body = vec![0; header.body_bytes as usize];
        self.read.read_exact(&mut body).map_err(failed)?;
        if header.status != Status::Ok {
            let text = String::from_utf8_lossy(&body);
            return Err(failed(format!("it answered {:?} {text}", header.status)));
        }
        let id = header.request_id as usize;
        if id >= self.sent.len() || header.payload_bytes != self.load.size {
            return Err(failed("an answer to another question"));
        }
        let payload = &mut self.payload[..header.payload_bytes as usize];
        self.read.read_exact(payload).map_err(failed)?;
        Ok((id, body))
    }

    /// Whether the last reply to request 0 is right.
    fn look_at(&self, body: &[u8]) -> Result<(), BenchError> {
        let payload = &self.payload[..self.load.size as usize];
        let at = self.sent[0].1;
        if !is_content(at, payload) {
            return Err(failed(format!("wrong bytes at {at}")));
        }
        let crcs = decode_checksums(body).unwrap_or_default();
        let blocks = payload.chunks(BLOCK);
        if crcs.len() != blocks.len() || (self.target.checksums() && !blocks.map(crc32c).eq(crcs)) {
            return Err(failed(format!("wrong checksums at {at}")));
        }
        Ok(())
    }

    /// Keeps its window full until the time is over, then takes what is still owed. Only what came
    /// in time counts.
    fn run(mut self, start: &Barrier) -> Result<Histogram<u64>, BenchError> {
        let mut times = histogram();
        start.wait();
        let end = Instant::now() + self.load.duration;
        for id in 0..self.sent.len() {
            self.ask(id)?;
        }
        let mut owed = self.sent.len();
        while owed > 0 {
            let (id, _) = self.answer()?;
            let now = Instant::now();
            if now < end {
                times.saturating_record((now - self.sent[id].0).as_nanos() as u64);
                self.ask(id)?;
            } else {
                owed -= 1;
            }
        }
        Ok(times)
    }
}

/// Puts the load on a server.
pub(crate) fn run(target: &dyn Target, load: &Load) -> Result<Sample, BenchError> {
    let connections = load.connections.min(load.depth).max(1);
    let mut lanes = Vec::new();
    for lane in 0..connections {
        // The first ones carry what does not divide.
        let window = load.depth / connections + u32::from(lane < load.depth % connections);
        lanes.push(Lane::open(target, load, lane, window)?);
    }
    let start = Barrier::new(lanes.len());
    let client = Usage::of(std::process::id() as i32);
    let times = std::thread::scope(|scope| {
        let threads: Vec<_> = lanes
            .into_iter()
            .map(|lane| {
                let start = &start;
                scope.spawn(move || {
                    if let Some(cpu) = load.cpu {
                        // Not allowed to: the figures say so by being worse, and for all alike.
                        let _ = super::pin(Pid::from_raw(0), cpu);
                    }
                    lane.run(start)
                })
            })
            .collect();
        let mut all = histogram();
        for thread in threads {
            let part = thread.join().map_err(|_| BenchError::Worker("a client".into()))??;
            all.add(&part).map_err(|e| BenchError::Worker(e.to_string()))?;
        }
        Ok::<_, BenchError>(all)
    })?;
    let seconds = load.duration.as_secs_f64();
    let bytes = times.len() as f64 * f64::from(load.size);
    let us = |q: f64| times.value_at_quantile(q) as f64 / 1000.0;
    Ok(Sample {
        iops: times.len() as f64 / seconds,
        mb_per_s: bytes / seconds / 1e6,
        bytes,
        p50_us: us(0.5),
        p99_us: us(0.99),
        client_cpu_s: Usage::of(std::process::id() as i32).since(&client).cpu_s,
        seconds,
    })
}
