//! A minimal server's process: started, found by its port, its CPU and memory read from /proc, ended.
//!
//! A process per engine and turn: their memory can be told apart, and none idles beside another. The
//! child ends when its standard input does, so it never outlives the measurement.

use super::job::Request;
use super::load::Target;
use super::{Engine, pin, ring};
use crate::BenchError;
use crate::memory::field;
use ebb_dataplane_protocol::data::DataContext;
use ebb_dataplane_protocol::{CHUNK_BYTES, ChunkIndex, Header, Opcode};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Read};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// As much of what a server said is shown: a panic with its reason.
const STDERR_BYTES_MAX: u64 = 4096;

/// What a minimal server is told.
#[derive(Clone, Debug)]
pub struct ServerArgs {
    /// On what it runs.
    pub engine: Engine,
    /// The file it serves.
    pub file: PathBuf,
    /// The CPU its one thread runs on.
    pub cpu: usize,
    /// Compute a checksum per block, as ours does.
    pub checksums: bool,
}

/// What every minimal server does.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) file: PathBuf,
    pub(crate) checksums: bool,
}

/// Runs a minimal server on the calling thread, until standard input ends. Its port is the one line
/// on standard output.
pub fn serve(args: &ServerArgs) -> Result<(), BenchError> {
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    pin(Pid::from_raw(0), args.cpu)
        .map_err(|e| BenchError::Plan(format!("cannot run on CPU {}: {e}", args.cpu)))?;
    let service = Service { file: args.file.clone(), checksums: args.checksums };
    serve_on(args.engine, &service, |port| println!("{port}"))
}

/// Serves forever; `ready` gets the port.
pub(crate) fn serve_on(
    engine: Engine,
    service: &Service,
    ready: impl FnOnce(u16),
) -> Result<(), BenchError> {
    match engine {
        Engine::Ring => ring::serve(service, ready),
        #[cfg(feature = "engines")]
        Engine::TokioUring => super::tokio_uring::serve(service, ready),
        #[cfg(feature = "engines")]
        Engine::Glommio => super::glommio::serve(service, ready),
        #[cfg(not(feature = "engines"))]
        _ => super::available(),
    }
}

/// A running minimal server; killed when dropped.
pub(crate) struct Child {
    process: std::process::Child,
    pub(crate) port: u16,
}

impl Child {
    /// Starts it and waits for its port.
    pub(crate) fn start(engine: Engine, mut command: Command) -> Result<Self, BenchError> {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(BenchError::program(engine.name(), "start"))?;
        let mut line = String::new();
        if let Some(out) = process.stdout.take() {
            let _ = BufReader::new(out).read_line(&mut line);
        }
        if let Ok(port) = line.trim().parse() {
            return Ok(Self { process, port });
        }
        let server = Self { process, port: 0 };
        Err(server.explain(engine, "it did not start"))
    }

    /// Ends it, and says what it said before about why `what` happened.
    pub(crate) fn explain(mut self, engine: Engine, what: impl std::fmt::Display) -> BenchError {
        // With its standard input it ends by itself, if it has not already.
        drop(self.process.stdin.take());
        let status = self.process.wait().map_or_else(|e| e.to_string(), |s| s.to_string());
        let mut said = String::new();
        if let Some(err) = self.process.stderr.take() {
            let _ = err.take(STDERR_BYTES_MAX).read_to_string(&mut said);
        }
        let why = format!("{what}; it ended with {status} and said {:?}", said.trim());
        BenchError::Program { program: engine.name(), why }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.process.id() as i32
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a process used.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// CPU seconds, all its threads and the kernel on their behalf.
    pub(crate) cpu_s: f64,
    /// Resident memory at most.
    pub(crate) peak_bytes: u64,
}

impl Usage {
    /// So far. Zeros if it is gone.
    pub(crate) fn of(pid: i32) -> Self {
        const TICKS_PER_SECOND: f64 = 100.0; // USER_HZ is 100 on every Linux architecture we build for.
        let read =
            |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let stat = read("stat");
        let ticks: u64 = stat.rfind(')').and_then(|i| stat.get(i + 2..)).map_or(0, |rest| {
            let fields: Vec<&str> = rest.split(' ').collect();
            [11, 12].iter().filter_map(|i| fields.get(*i)?.parse::<u64>().ok()).sum()
        });
        let peak_bytes = field(&read("status"), "VmHWM").unwrap_or(0);
        Self { cpu_s: ticks as f64 / TICKS_PER_SECOND, peak_bytes }
    }

    /// What was used since `before`; the peak stays what it is.
    pub(crate) fn since(self, before: &Self) -> Self {
        Self { cpu_s: self.cpu_s - before.cpu_s, ..self }
    }
}

/// Lets the peak of a process's memory count from now (proc(5), clear_refs). Not allowed to: it
/// counts from its start.
pub(crate) fn reset_peak(pid: i32) {
    let _ = std::fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

/// A minimal server as the load generator sees it.
pub(crate) struct Minimal {
    pub(crate) port: u16,
    pub(crate) checksums: bool,
}

impl Target for Minimal {
    fn connect(&self, _lane: u32) -> Result<TcpStream, BenchError> {
        TcpStream::connect(("127.0.0.1", self.port))
            .map_err(BenchError::program("the server", "connect to"))
    }
    fn ask(&self, at: u64, bytes: u32) -> (Header, DataContext) {
        let header = Header {
            chunk: ChunkIndex::of_offset(at),
            offset: (at % u64::from(CHUNK_BYTES)) as u32,
            length: bytes,
            ..Header::request(Opcode::Read, 0)
        };
        (header, DataContext::default())
    }
    fn checksums(&self) -> bool {
        self.checksums
    }
}

/// A reply's head and the range of a buffer whose bytes before `at` are free for it: one contiguous
/// piece to send, without copying the payload.
#[cfg_attr(not(feature = "engines"), allow(dead_code))]
pub(crate) fn put_head(
    buf: &mut [u8],
    at: usize,
    request: &Request,
    checksums: bool,
) -> std::ops::Range<usize> {
    let end = at + request.bytes;
    let head = request.head(&buf[at..end], checksums);
    let start = at - head.len();
    buf[start..at].copy_from_slice(&head);
    start..end
}
