//! Clients and the leader of the replication simulator.

use super::{CLUSTER, PGS, World, key};
use ebb_dataplane::core::*;
use ebb_dataplane_protocol::auth::Role;
use ebb_dataplane_protocol::checksum::block_pieces;
use ebb_dataplane_protocol::control::*;
use ebb_dataplane_protocol::data::{DataContext, encode_checksums};
use ebb_dataplane_protocol::*;
use ebb_store::AlignedBuf;
use rand::Rng;
use std::ops::Range;

const FILES: u64 = 4;
const SESSIONS: usize = 3;
/// First byte and length: small ones that share blocks, and one too large for the journal.
const CELLS: [(u64, usize); 6] =
    [(13, 5000), (5013, 3000), (9000, 40), (12_000, 20_000), (40_000, 4096), (1 << 20, 150_000)];
const FILE_BYTES: u64 = (1 << 20) + 150_000;

/// What a request was for.
#[derive(Clone, Debug)]
pub enum Request {
    Present,
    Write { file: usize, cell: usize, value: u64 },
    Read { file: usize, cell: usize, least: u64 },
    Seal(usize, Generation),
    Put(usize, Generation),
    Notice(usize),
}

#[derive(Clone, Debug, Default)]
struct Cell {
    acked: u64,
    /// Asked for, not acked: value, session, sequence, and whether a request is under way.
    pending: Option<(u64, usize, u64, bool)>,
    /// The newest value a read has shown.
    seen: u64,
}

#[derive(Clone, Debug, PartialEq)]
enum Flush {
    None,
    Sealing(Generation),
    Sealed(Generation),
    Putting(Generation),
}

#[derive(Clone, Debug)]
struct File {
    inode: InodeId,
    generation: Generation,
    view: FileView,
    cells: Vec<Cell>,
    flush: Flush,
    /// A request of the leader is under way.
    asked: bool,
    /// To be told to the primary until it answers.
    notice: Option<Control>,
}

pub struct Files {
    all: Vec<File>,
    /// Next sequence of each session, and those not answered.
    sessions: Vec<(u64, Vec<u64>)>,
    etags: u64,
    /// No new work.
    still: bool,
}

impl Files {
    pub fn new() -> Self {
        let all = (1..=FILES).map(|n| File {
            inode: InodeId(n * 7),
            generation: Generation(1),
            view: FileView {
                version: ViewVersion(1),
                content: ContentId(1),
                ..FileView::default()
            },
            cells: vec![Cell::default(); CELLS.len()],
            flush: Flush::None,
            asked: false,
            notice: None,
        });
        let sessions = vec![(1, Vec::new()); SESSIONS];
        Self { all: all.collect(), sessions, etags: 0, still: false }
    }

    pub fn quiet(&self) -> bool {
        self.all.iter().all(|f| {
            f.flush == Flush::None
                && f.notice.is_none()
                && !f.asked
                && f.cells.iter().all(|c| c.pending.is_none())
        })
    }

    pub fn busy(&self) -> String {
        format!(
            "{:?}",
            self.all.iter().map(|f| (&f.flush, f.asked, &f.notice, &f.cells)).collect::<Vec<_>>()
        )
    }
}

fn bytes_of(value: u64, len: usize) -> Vec<u8> {
    value.to_le_bytes().iter().copied().cycle().take(len).collect()
}

impl World {
    fn pg(&self, file: usize) -> PgId {
        PgId::of_chunk(self.files.all[file].inode, ChunkIndex(0), PGS)
    }

    fn grant(&self, file: usize, mode: GrantMode, session: SessionId) -> SignedGrant {
        let f = &self.files.all[file];
        let grant = Grant {
            cluster: CLUSTER,
            inode: f.inode,
            mode,
            generation: f.generation,
            session,
            view: f.view.clone(),
            least_map_version: self.map.version,
            alloc_limit: RUN_BYTES,
        };
        SignedGrant::sign(&grant, &key())
    }

    fn context(&self, file: usize, session: SessionId, sequence: u64, below: u64) -> DataContext {
        let f = &self.files.all[file];
        DataContext {
            generation: f.generation,
            view_version: f.view.version,
            map_version: self.map.version,
            pg_epoch: self.map.pgs[usize::from(self.pg(file).0)].epoch,
            content: f.view.content,
            session,
            sequence: Sequence(sequence),
            answered_below: Sequence(below),
        }
    }

    fn header(&self, opcode: Opcode, file: usize, range: &Range<u64>) -> Header {
        Header {
            inode: self.files.all[file].inode,
            chunk: ChunkIndex(0),
            offset: range.start as u32,
            length: (range.end - range.start) as u32,
            pg: self.pg(file),
            ..Header::request(opcode, 0)
        }
    }

    pub fn client_step(&mut self) {
        let (file, cell) =
            (self.rng.random_range(0..FILES as usize), self.rng.random_range(0..CELLS.len()));
        if self.rng.random_bool(0.3) {
            return self.read_cell(file, cell);
        }
        if self.files.all[file].cells[cell].pending.is_none() {
            let s = self.rng.random_range(0..SESSIONS);
            let session = &mut self.files.sessions[s];
            let sequence = session.0;
            session.0 += 1;
            session.1.push(sequence);
            let value = self.files.all[file].cells[cell].acked + 1;
            self.files.all[file].cells[cell].pending = Some((value, s, sequence, false));
        }
        self.write_cell(file, cell);
    }

    /// Sends a pending write, with its grant before it.
    fn write_cell(&mut self, file: usize, cell: usize) {
        let f = &self.files.all[file];
        let Some((value, s, sequence, false)) = f.cells[cell].pending else { return };
        // No grant while a generation ends.
        if matches!(f.flush, Flush::Sealing(_)) {
            return;
        }
        let Some(n) = self.primary(self.pg(file)) else { return };
        let session = SessionId(s as u64 + 1);
        let below = self.files.sessions[s].1.iter().copied().min().unwrap_or(sequence);
        self.present(n, file, session);
        let (at, len) = CELLS[cell];
        let data = bytes_of(value, len);
        let header = self.header(Opcode::Write, file, &(at..at + len as u64));
        let mut body = self.context(file, session, sequence, below).encode().to_vec();
        let crcs: Vec<u32> = block_pieces(at, len).map(|p| crc32c(&data[p])).collect();
        body.extend(encode_checksums(&crcs));
        let head = at as usize % 4096;
        let mut buf = AlignedBuf::zeroed((head + len).next_multiple_of(4096));
        buf.fill(0xbb);
        buf[head..head + len].copy_from_slice(&data);
        if let Some(p) = &mut self.files.all[file].cells[cell].pending {
            p.3 = true;
        }
        self.trace(|| format!("write file {file} cell {cell} value {value} at node {n}"));
        let asked = Request::Write { file, cell, value };
        self.ask(
            n,
            Role::Client,
            session,
            (header.with_payload(len as u32), body, Some(buf)),
            asked,
        );
    }

    fn present(&mut self, n: u32, file: usize, session: SessionId) {
        let grant = self.grant(file, GrantMode::Write, session);
        let header = Header::request(Opcode::Present, 0);
        self.ask(n, Role::Client, session, (header, codec::encode(&grant), None), Request::Present);
    }

    pub fn read_cell(&mut self, file: usize, cell: usize) {
        let Some(n) = self.primary(self.pg(file)) else { return };
        let session = SessionId(9);
        self.present(n, file, session);
        let (at, len) = CELLS[cell];
        let header = self.header(Opcode::Read, file, &(at..at + len as u64));
        let body = self.context(file, session, 0, 0).encode().to_vec();
        let c = &self.files.all[file].cells[cell];
        let least = c.acked.max(c.seen);
        let asked = Request::Read { file, cell, least };
        self.ask(n, Role::Client, session, (header, body, None), asked);
    }

    // --- the leader ------------------------------------------------------------------------------------

    pub fn leader_step(&mut self) {
        let file = self.rng.random_range(0..FILES as usize);
        self.leader_file(file);
    }

    fn leader_file(&mut self, file: usize) {
        let f = &self.files.all[file];
        let Some(n) = self.primary(self.pg(file)) else { return };
        if f.asked {
            return;
        }
        let (inode, g) = (f.inode, f.generation);
        if let Some(notice) = f.notice.clone() {
            return self.control(n, file, &notice, Request::Notice(file));
        }
        match f.flush.clone() {
            Flush::None => {
                if !self.files.still {
                    self.files.all[file].flush = Flush::Sealing(g);
                }
            }
            Flush::Sealing(g) => {
                let item = SealItem { inode, generation: g, alloc_limit: RUN_BYTES };
                let seal = Control::Seal(self.map.version, vec![item]);
                self.control(n, file, &seal, Request::Seal(file, g));
            }
            Flush::Sealed(g) => {
                if self.rng.random_bool(0.2) {
                    return self.abort(file, g);
                }
                self.files.all[file].flush = Flush::Putting(g);
                let put = PutObject {
                    inode,
                    generation: g,
                    grant: self.grant(file, GrantMode::Read, SessionId(0)),
                    key: format!("file-{file}"),
                    size: FILE_BYTES,
                    metadata: Vec::new(),
                    condition: PutCondition::None,
                };
                self.control(n, file, &Control::PutObjects(vec![put]), Request::Put(file, g));
            }
            Flush::Putting(g) => self.abort(file, g),
        }
    }

    fn abort(&mut self, file: usize, g: Generation) {
        self.tally.aborted += 1;
        let f = &mut self.files.all[file];
        f.flush = Flush::None;
        f.notice = Some(Control::FlushAborted(vec![(f.inode, g)]));
    }

    fn control(&mut self, n: u32, file: usize, control: &Control, asked: Request) {
        self.files.all[file].asked = true;
        self.trace(|| format!("leader asks node {n}: {asked:?}"));
        let header = Header::request(Opcode::Control, 0);
        self.ask(n, Role::Meta, SessionId(0), (header, codec::encode(control), None), asked);
    }

    pub fn s3_call(&mut self, job: Job<AlignedBuf>) -> JobDone<AlignedBuf> {
        let token = job.token;
        match job.work {
            Work::Fetch { key, etag, range, mut buf, at } => {
                let object = self.s3.get(&key).filter(|o| o.0 == etag);
                let result = match object {
                    Some((_, body)) => {
                        let part = &body[range.start as usize..range.end as usize];
                        buf[at..at + part.len()].copy_from_slice(part);
                        Ok(())
                    }
                    None => Err(FetchError::Changed),
                };
                JobDone::Fetched { token, buf, result }
            }
            Work::Put { key, body, .. } => {
                let mut bytes = Vec::new();
                for piece in body {
                    match piece {
                        Piece::Buf(buf, range) => bytes.extend_from_slice(&buf[range]),
                        Piece::Zeros(n) => bytes.resize(bytes.len() + n, 0),
                    }
                }
                self.files.etags += 1;
                let etag = format!("e{}", self.files.etags);
                self.s3.insert(format!("{key}.{etag}"), (etag.clone(), bytes));
                JobDone::Stored { token, outcome: StoreOutcome::Stored { etag } }
            }
            other => panic!("not asked for here: {other:?}"),
        }
    }

    // --- answers -----------------------------------------------------------------------------------------

    pub fn answered(&mut self, asked: Request, reply: Reply<AlignedBuf>) {
        let status = reply.header.status;
        match asked {
            Request::Present => {}
            Request::Write { file, cell, value } => {
                let c = &mut self.files.all[file].cells[cell];
                let Some(p) = c.pending.as_mut().filter(|p| p.0 == value) else { return };
                p.3 = false;
                if status == Status::Ok || status == Status::Answered {
                    let (_, s, sequence, _) = *p;
                    c.acked = value;
                    c.pending = None;
                    self.files.sessions[s].1.retain(|q| *q != sequence);
                    self.tally.acked += 1;
                    self.trace(|| format!("acked file {file} cell {cell} value {value}"));
                }
            }
            Request::Read { file, cell, least } => {
                if status == Status::Ok {
                    self.check_read(file, cell, least, &reply);
                }
            }
            Request::Seal(file, g) => {
                let f = &mut self.files.all[file];
                f.asked = false;
                let sealed = matches!(
                    codec::decode::<ControlReply>(&reply.body),
                    Ok(ControlReply::Sealed(_))
                );
                if status == Status::Ok && sealed && f.flush == Flush::Sealing(g) {
                    f.generation = g.next();
                    f.flush = Flush::Sealed(g);
                }
            }
            Request::Put(file, g) => {
                self.files.all[file].asked = false;
                let stored = match codec::decode::<ControlReply>(&reply.body) {
                    Ok(ControlReply::Stored(v)) if status == Status::Ok => v.into_iter().next(),
                    _ => None,
                };
                match stored {
                    Some(StoreOutcome::Stored { etag }) => self.commit_flush(file, g, etag),
                    _ => self.abort(file, g),
                }
            }
            Request::Notice(file) => {
                let f = &mut self.files.all[file];
                f.asked = false;
                let done =
                    matches!(codec::decode::<ControlReply>(&reply.body), Ok(ControlReply::Done));
                if status == Status::Ok && done {
                    f.notice = None;
                }
            }
        }
    }

    fn commit_flush(&mut self, file: usize, g: Generation, etag: String) {
        self.tally.flushed += 1;
        self.trace(|| format!("flushed file {file} generation {g} as {etag}"));
        let f = &mut self.files.all[file];
        let old_valid_bytes = f.view.backing.as_ref().map_or(0, Backing::valid_bytes);
        let old_content = f.view.content;
        f.view.content = ContentId(old_content.0 + 1);
        f.view.version = ViewVersion(f.view.version.0 + 1);
        f.view.clean_generation = g;
        let key = format!("file-{file}.{etag}");
        f.view.backing = Some(Backing { key, etag, length: FILE_BYTES, limit: FILE_BYTES });
        f.flush = Flush::None;
        f.notice = Some(Control::FlushDone(vec![FlushDone {
            inode: f.inode,
            generation: g,
            content: f.view.content,
            old_content,
            valid_bytes: FILE_BYTES,
            old_valid_bytes,
        }]));
    }

    /// Nobody will answer.
    pub fn lost(&mut self, asked: Request) {
        match asked {
            Request::Present | Request::Read { .. } => {}
            Request::Write { file, cell, value } => {
                if let Some(p) = &mut self.files.all[file].cells[cell].pending
                    && p.0 == value
                {
                    p.3 = false;
                }
            }
            Request::Seal(file, _) | Request::Notice(file) | Request::Put(file, _) => {
                self.files.all[file].asked = false;
            }
        }
    }

    fn check_read(&mut self, file: usize, cell: usize, least: u64, reply: &Reply<AlignedBuf>) {
        let mut bytes = Vec::new();
        for piece in &reply.payload {
            match piece {
                Piece::Buf(buf, range) => bytes.extend_from_slice(&buf[range.clone()]),
                Piece::Zeros(n) => bytes.resize(bytes.len() + n, 0),
            }
        }
        let (at, len) = CELLS[cell];
        let from = at as usize - reply.header.offset as usize;
        let got = &bytes[from..from + len];
        let value = u64::from_le_bytes(got[..8].try_into().expect("eight bytes"));
        let c = &mut self.files.all[file].cells[cell];
        let most = c.pending.map_or(c.acked, |p| p.0);
        assert!(
            got == bytes_of(value, len) && (least..=most).contains(&value),
            "file {file} cell {cell} reads {value}; acked before it was asked {least}, asked for {most}"
        );
        c.seen = c.seen.max(value);
        self.tally.reads += 1;
    }

    // --- the end -------------------------------------------------------------------------------------------

    pub fn retry_all(&mut self) {
        self.files.still = true;
        for file in 0..FILES as usize {
            self.leader_file(file);
            for cell in 0..CELLS.len() {
                self.write_cell(file, cell);
            }
        }
    }

    pub fn check_all(&mut self, what: &str) {
        for file in 0..FILES as usize {
            for cell in 0..CELLS.len() {
                let before = self.tally.reads;
                for tries in 0..20_000 {
                    if self.tally.reads > before {
                        break;
                    }
                    if tries % 200 == 0 {
                        self.read_cell(file, cell);
                    }
                    self.turn();
                    if tries % 50 == 0 {
                        self.heartbeats();
                    }
                }
                assert!(self.tally.reads > before, "file {file} cell {cell} can't be read {what}");
            }
        }
    }
}
