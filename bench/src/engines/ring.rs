//! The minimal server on `ebb-ring`: what our reactor does without the chunk server above it.
//!
//! A state machine over events, as the chunk server is: buffers of the arena are the admission
//! control, and requests wait in order for one (I9: as many as the connections' windows).

use super::IN_FLIGHT_MAX;
use super::child::Service;
use super::job::{BLOCK, READ_BYTES_MAX, REQUEST_BYTES, Request, requests};
use crate::BenchError;
use ebb_ring::{
    Buf, Class, Config, ConnId, DeviceFile, Event, FileError, FileId, OpenMode, Pool, Reactor,
    Segment, Token,
};
use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::time::Duration;

/// Room for as many requests as a connection may have in flight.
const RECEIVE_BYTES: usize = IN_FLIGHT_MAX * REQUEST_BYTES;
/// For 1 MiB reads: enough for several dozen at once.
const ARENA_BYTES: usize = 64 << 20;
const _: () = assert!(READ_BYTES_MAX <= Class::Mid1M.bytes());
/// How often, and how far apart, a locked file is tried again: the ring of the server before may hold it
/// for a moment after its process has ended.
const LOCK_TRIES: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

fn failed(why: impl std::fmt::Display) -> BenchError {
    BenchError::Program { program: "ebb-ring", why: why.to_string() }
}

/// Serves forever; `ready` gets the port.
pub(super) fn serve(service: &Service, ready: impl FnOnce(u16)) -> Result<(), BenchError> {
    let device = open(&service.file)?;
    let file_bytes = device.size().map_err(failed)?;
    let config = Config {
        arena_bytes: ARENA_BYTES,
        class_percent: [10, 0, 90, 0],
        pool_percent: [100, 0, 0],
        ..Config::default()
    };
    let mut reactor = Reactor::new(config).map_err(failed)?;
    let file = reactor.add_file(device).map_err(|r| failed(r.why))?;
    let here = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let (_, address) = reactor.listen(here).map_err(failed)?;
    ready(address.port());
    let mut server = Server {
        file,
        file_bytes,
        checksums: service.checksums,
        next: 0,
        waiting: VecDeque::new(),
        reading: HashMap::new(),
    };
    let mut events = Vec::new();
    loop {
        reactor.turn(None, &mut events).map_err(failed)?;
        for event in events.drain(..) {
            server.handle(&mut reactor, event)?;
        }
    }
}

fn open(path: &Path) -> Result<DeviceFile, BenchError> {
    let mut tries = 0;
    loop {
        match DeviceFile::open(path, OpenMode::Existing) {
            Err(FileError::Locked { .. }) if tries < LOCK_TRIES => {
                tries += 1;
                std::thread::sleep(LOCK_PAUSE);
            }
            other => return other.map_err(failed),
        }
    }
}

struct Server {
    file: FileId,
    file_bytes: u64,
    checksums: bool,
    next: u64,
    /// Requests that wait for a buffer.
    waiting: VecDeque<(ConnId, Request)>,
    /// Reads in flight.
    reading: HashMap<u64, (ConnId, Request)>,
}

impl Server {
    fn handle(&mut self, reactor: &mut Reactor, event: Event) -> Result<(), BenchError> {
        match event {
            Event::Accepted { conn, .. } => {
                receive(reactor, conn, Buf::unpooled(RECEIVE_BYTES), 0);
            }
            // The token carries the bytes already in the buffer.
            Event::Received { conn, token, buf, result, .. } => match result {
                Ok(n) => self.received(reactor, conn, buf, token.0 as usize + n),
                Err(_) => reactor.close(conn),
            },
            Event::Read { token, buf, range, result, .. } => {
                let Some((conn, request)) = self.reading.remove(&token.0) else { return Ok(()) };
                if result.map_err(failed)? != request.bytes {
                    return Err(failed("a short read"));
                }
                let head = request.head(&buf[range.clone()], self.checksums);
                let message = vec![Segment::Bytes(head), Segment::Buf(buf, range)];
                // Refused if the connection is gone: nobody waits for it then.
                let _ = reactor.send(conn, Token(0), message);
            }
            Event::Sent { segments, .. } => {
                drop(segments);
                self.admit(reactor)?;
            }
            Event::Closed { conn, .. } => self.waiting.retain(|(c, _)| *c != conn),
            _ => {}
        }
        Ok(())
    }

    fn received(&mut self, reactor: &mut Reactor, conn: ConnId, mut buf: Buf, have: usize) {
        let took = requests(&buf[..have], self.file_bytes, |request| {
            self.waiting.push_back((conn, request));
        });
        let Ok(took) = took else { return reactor.close(conn) };
        buf.copy_within(took..have, 0);
        receive(reactor, conn, buf, have - took);
        if self.admit(reactor).is_err() {
            reactor.close(conn);
        }
    }

    fn admit(&mut self, reactor: &mut Reactor) -> Result<(), BenchError> {
        while let Some(&(conn, request)) = self.waiting.front() {
            let class = if request.bytes <= BLOCK { Class::Block4K } else { Class::Mid1M };
            let Some(buf) = reactor.arena().alloc(class, Pool::Clients) else { return Ok(()) };
            self.next += 1;
            let token = Token(self.next);
            reactor
                .read(self.file, token, buf, 0..request.bytes, request.offset)
                .map_err(|r| failed(r.why))?;
            self.reading.insert(self.next, (conn, request));
            self.waiting.pop_front();
        }
        Ok(())
    }
}

fn receive(reactor: &mut Reactor, conn: ConnId, buf: Buf, have: usize) {
    let len = buf.len();
    // Refused if the connection is gone.
    let _ = reactor.recv_some(conn, Token(have as u64), buf, have..len);
}
