//! The minimal servers serve the right bytes, and nothing but reads; the load generator notices wrong
//! ones; a program without the engines says what to build.

use super::child::{Minimal, Service, serve_on};
use super::job::{self, BadRequest, REQUEST_BYTES, Request};
use super::load::{self, Target};
use super::*;
use ebb_dataplane_protocol::data::DataContext;
use ebb_dataplane_protocol::{ChunkIndex, Header, Opcode};
use std::io::{Read, Write};
use std::net::TcpStream;

const FILE_BYTES: u64 = 2 * CHUNK_BYTES as u64;

/// A file with the bytes that the load generator expects, on a file system with O_DIRECT.
fn file() -> tempfile::NamedTempFile {
    // Beside the test's binary: a real disk, where /tmp may be memory without O_DIRECT.
    let exe = std::env::current_exe().expect("a program");
    let dir = exe.parent().expect("in a folder");
    let file = tempfile::NamedTempFile::new_in(dir).expect("a file");
    job::prepare(file.path(), FILE_BYTES).expect("written");
    file
}

/// Serves `file` on a thread of its own, for as long as the test runs.
fn server(engine: Engine, file: &Path, checksums: bool) -> Minimal {
    let service = Service { file: file.to_owned(), checksums };
    let (tell, port) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        serve_on(engine, &service, move |port| tell.send(port).expect("asked"))
    });
    Minimal { port: port.recv().expect("it serves"), checksums }
}

fn load(size: u32, depth: u32) -> Load {
    let starts = (0..FILE_BYTES).step_by(CHUNK_BYTES as usize).collect();
    Load {
        size,
        depth,
        connections: 3,
        duration: Duration::from_millis(100),
        cpu: None,
        slots: Arc::new(Slots::of(starts, u64::from(size))),
    }
}

fn serves_the_right_bytes(engine: Engine) {
    for checksums in [true, false] {
        let file = file();
        let target = server(engine, file.path(), checksums);
        for (size, depth) in [(4096, 32), (64 << 10, 7), (1 << 20, 16)] {
            let sample = load::run(&target, &load(size, depth)).expect("right answers");
            assert!(sample.iops > 0.0, "{engine:?} {size} {depth}");
        }
    }
}

/// The connection closes at anything that is no read of whole blocks inside the file, and only it.
fn refuses_what_it_does_not_serve(engine: Engine) {
    let file = file();
    let target = server(engine, file.path(), true);
    let frame = |header: Header| {
        let context = DataContext::default().encode();
        let mut frame = header.with_body(&context).encode().to_vec();
        frame.extend_from_slice(&context);
        frame
    };
    let past = Header { chunk: ChunkIndex(2), ..target.ask(0, 4096).0 };
    let write = Header { opcode: Opcode::Write, ..target.ask(0, 4096).0 };
    for bad in [vec![0x5a; REQUEST_BYTES], frame(past), frame(write)] {
        let mut stream = TcpStream::connect(("127.0.0.1", target.port)).expect("accepted");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set");
        stream.write_all(&bad).expect("sent");
        // The end of the stream, or a reset: never an answer.
        assert_eq!(stream.read(&mut [0; 64]).unwrap_or(0), 0, "{engine:?}");
    }
    load::run(&target, &load(4096, 4)).expect("others are served on");
}

#[test]
fn ebb_ring_serves_the_right_bytes() {
    serves_the_right_bytes(Engine::Ring);
}

#[test]
fn ebb_ring_refuses_what_it_does_not_serve() {
    refuses_what_it_does_not_serve(Engine::Ring);
}

#[cfg(feature = "engines")]
#[test]
fn tokio_uring_serves_the_right_bytes() {
    serves_the_right_bytes(Engine::TokioUring);
}

#[cfg(feature = "engines")]
#[test]
fn tokio_uring_refuses_what_it_does_not_serve() {
    refuses_what_it_does_not_serve(Engine::TokioUring);
}

#[cfg(feature = "engines")]
#[test]
fn glommio_serves_the_right_bytes() {
    serves_the_right_bytes(Engine::Glommio);
}

#[cfg(feature = "engines")]
#[test]
fn glommio_refuses_what_it_does_not_serve() {
    refuses_what_it_does_not_serve(Engine::Glommio);
}

/// Asks for other bytes than it says.
struct Shifted(Minimal);
impl Target for Shifted {
    fn connect(&self, lane: u32) -> Result<TcpStream, BenchError> {
        self.0.connect(lane)
    }
    fn ask(&self, at: u64, bytes: u32) -> (Header, DataContext) {
        self.0.ask(at ^ 4096, bytes)
    }
    fn checksums(&self) -> bool {
        self.0.checksums()
    }
}

#[test]
fn wrong_bytes_and_missing_checksums_end_the_measurement() {
    let file = file();
    let shifted = Shifted(server(Engine::Ring, file.path(), true));
    let error = load::run(&shifted, &load(4096, 4)).expect_err("other bytes");
    assert!(error.to_string().contains("wrong bytes"), "{error}");
    // Ours locks what it serves.
    let file = self::file();
    let unchecked = server(Engine::Ring, file.path(), false);
    let checked = Minimal { checksums: true, ..unchecked };
    let error = load::run(&checked, &load(4096, 4)).expect_err("zeros for checksums");
    assert!(error.to_string().contains("wrong checksums"), "{error}");
}

#[test]
fn a_program_without_the_engines_says_what_to_build() {
    assert_eq!(available().is_ok(), cfg!(feature = "engines"));
    let Err(e) = available() else { return };
    assert!(e.to_string().contains("cargo build --release -p ebb --features engines"), "{e}");
    let service = Service { file: PathBuf::new(), checksums: true };
    for engine in [Engine::TokioUring, Engine::Glommio] {
        let e = serve_on(engine, &service, |_| ()).expect_err("not in it");
        assert_eq!(e.to_string(), MISSING);
    }
}

#[test]
fn only_reads_of_whole_blocks_inside_the_file_are_requests() {
    let target = Minimal { port: 0, checksums: true };
    let parse = |header: Header| {
        let body = DataContext::default().encode();
        let mut frame = [0; REQUEST_BYTES];
        frame[..64].copy_from_slice(&header.with_body(&body).encode());
        frame[64..].copy_from_slice(&body);
        Request::parse(&frame, FILE_BYTES)
    };
    let good = target.ask(FILE_BYTES - 8192, 8192).0;
    let request = parse(good).expect("the last blocks");
    assert_eq!((request.offset, request.bytes), (FILE_BYTES - 8192, 8192));
    for bad in [
        Header { length: 0, ..good },
        Header { length: 100, ..good },
        Header { offset: 100, ..good },
        Header { chunk: ChunkIndex(2), ..good },
        Header { offset: 0, length: 2 << 20, ..good },
        Header { payload_bytes: 1, ..good },
    ] {
        assert_eq!(parse(bad).expect_err("refused"), BadRequest::NotServed, "{bad:?}");
    }
}

#[test]
fn ratios_are_of_the_same_run_and_medians_of_those() {
    let job = Job { size: 4096, depth: 1 };
    let minimal = Contender::Minimal { engine: Engine::Ring, checksums: true };
    let turn = |iops: f64, cpu_s: f64| Turn {
        sample: Sample { iops, bytes: 1e9, seconds: 1.0, ..Sample::default() },
        usage: Usage { cpu_s, peak_bytes: 1 << 20 },
    };
    let turns: Vec<_> = [(100.0, 200.0), (300.0, 100.0), (50.0, 100.0)]
        .into_iter()
        .flat_map(|(a, b)| [(Contender::Ours, turn(a, 1.0)), (minimal, turn(b, 4.0))])
        .collect();
    let mut outcome = Outcome::default();
    outcome.add(job, &Contender::all(true), &turns);
    assert_eq!(outcome.rows.len(), 2, "who took no turn has no row");
    assert_eq!(outcome.ratios[0].throughput, 0.5);
    assert_eq!(outcome.ratios[0].cpu, 0.25);
    assert!(table(&outcome).lines().nth(2).is_some_and(|l| l.contains("0.50")));
}
