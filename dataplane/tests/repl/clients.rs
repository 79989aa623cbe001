//! Clients and the leader of the replication simulator.

use super::troubles::Stage;
use super::{CLUSTER, PGS, World, key};
use ebb_dataplane::core::*;
use ebb_dataplane_protocol::auth::Role;
use ebb_dataplane_protocol::checksum::block_pieces;
use ebb_dataplane_protocol::control::*;
use ebb_dataplane_protocol::data::{DataContext, encode_checksums};
use ebb_dataplane_protocol::*;
use ebb_store::AlignedBuf;
use rand::Rng;
use std::collections::BTreeMap;

const FILES: u64 = 4;
const SESSIONS: usize = 3;
/// Chunk, first byte and length: small ones that share blocks, and one too large for the journal; in two runs,
/// which are in two groups as often as not.
const CELLS: [(u32, u64, usize); 8] = [
    (0, 13, 5000),
    (0, 5013, 3000),
    (0, 9000, 40),
    (0, 12_000, 20_000),
    (4, 40_000, 4096),
    (0, 1 << 20, 150_000),
    (4, 44_096, 3000),
    (5, 77, 70_000),
];
const RUNS: usize = 2;
/// Of each run.
const LENGTHS: [u64; RUNS] = [RUN_BYTES, CHUNK_BYTES as u64 + 70_077];
const FILE_BYTES: u64 = LENGTHS[0] + LENGTHS[1];

/// What a request was for.
#[derive(Clone, Debug)]
pub enum Request {
    Present,
    Write {
        file: usize,
        cell: usize,
        value: u64,
    },
    /// What it must show at least, and what was cut away when it was asked.
    Read {
        file: usize,
        cell: usize,
        least: u64,
        cut: u64,
    },
    Seal(usize, Generation, usize),
    Part(usize, Generation, usize),
    Notice(usize, usize),
    /// A cut, and the version of the view that brought it.
    Cut(usize, usize, ViewVersion),
    /// An inode is gone.
    Drop(InodeId, usize),
    /// A group's primary hands over.
    Hand(usize, PgEpoch, Stage),
    /// What a primary says it holds.
    Holding(PgId),
}

/// Bytes at their places; the rest is zeros.
type Sparse = Vec<(u64, Vec<u8>)>;

/// Objects by key and etag, and parts by key and number.
#[derive(Default)]
pub struct S3 {
    objects: BTreeMap<String, (String, Sparse)>,
    parts: BTreeMap<String, Sparse>,
}

#[derive(Clone, Debug, Default)]
struct Cell {
    acked: u64,
    /// Asked for, not acked: value, session, sequence, and whether a request is under way.
    pending: Option<(u64, usize, u64, bool)>,
    /// The newest value a read has shown.
    seen: u64,
    /// Values up to this one were cut away: zeros, until a newer one comes.
    cut: u64,
}

#[derive(Clone, Debug, PartialEq)]
enum Flush {
    None,
    /// And which runs' primaries have.
    Sealing(Generation, [bool; RUNS]),
    Sealed(Generation),
    /// And the parts that are there.
    Putting(Generation, [Option<String>; RUNS]),
}

/// What primaries are told.
#[derive(Clone, Debug)]
enum Told {
    Done(FlushDone),
    Aborted(Generation),
}

#[derive(Clone, Debug)]
struct File {
    inode: InodeId,
    generation: Generation,
    view: FileView,
    cells: Vec<Cell>,
    flush: Flush,
    /// Requests of the leader under way, by run.
    asked: [bool; RUNS],
    /// To be told to the primaries until they answer.
    notice: Option<(Told, [bool; RUNS])>,
    /// Which runs' primaries have the newest view's cuts.
    heard_cuts: [bool; RUNS],
}

pub struct Files {
    all: Vec<File>,
    /// Next sequence of each session, and those not answered.
    sessions: Vec<(u64, Vec<u64>)>,
    etags: u64,
    /// Inodes that are gone, and which runs' primaries were told, and are being asked.
    gone: BTreeMap<InodeId, ([bool; RUNS], [bool; RUNS])>,
    last_inode: u64,
    /// No new work.
    still: bool,
}

impl Files {
    pub fn new() -> Self {
        let all = (1..=FILES).map(|n| File {
            inode: InodeId(n * 7),
            generation: Generation(1),
            view: first_view(),
            cells: vec![Cell::default(); CELLS.len()],
            flush: Flush::None,
            asked: [false; RUNS],
            notice: None,
            heard_cuts: [false; RUNS],
        });
        let sessions = vec![(1, Vec::new()); SESSIONS];
        let (gone, last_inode) = (BTreeMap::new(), FILES * 7);
        Self { all: all.collect(), sessions, etags: 0, gone, last_inode, still: false }
    }

    pub fn quiet(&self) -> bool {
        self.gone.values().all(|g| g.0 == [true; RUNS])
            && self.all.iter().all(|f| {
                f.flush == Flush::None
                    && f.notice.is_none()
                    && f.view.cuts.is_empty()
                    && f.asked == [false; RUNS]
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

fn is_done(reply: &Reply<AlignedBuf>) -> bool {
    matches!(codec::decode(&reply.body), Ok(ControlReply::Done))
}

fn first_view() -> FileView {
    FileView { version: ViewVersion(1), content: ContentId(1), ..FileView::default() }
}

/// Where a cell is in its file.
fn start_of(cell: usize) -> u64 {
    u64::from(CELLS[cell].0) * u64::from(CHUNK_BYTES) + CELLS[cell].1
}

fn bytes_of(value: u64, len: usize) -> Vec<u8> {
    value.to_le_bytes().iter().copied().cycle().take(len).collect()
}

impl World {
    fn pg(&self, file: usize, run: usize) -> PgId {
        PgId::of(self.files.all[file].inode, RunIndex(run as u32), PGS)
    }

    fn pg_of(&self, file: usize, cell: usize) -> PgId {
        self.pg(file, CELLS[cell].0 as usize / RUN_CHUNKS as usize)
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
            alloc_limit: 2 * RUN_BYTES,
        };
        SignedGrant::sign(&grant, &key())
    }

    fn context(
        &self,
        (file, cell): (usize, usize),
        session: SessionId,
        sequence: u64,
        below: u64,
    ) -> DataContext {
        let f = &self.files.all[file];
        DataContext {
            generation: f.generation,
            view_version: f.view.version,
            map_version: self.map.version,
            pg_epoch: self.map.pgs[usize::from(self.pg_of(file, cell).0)].epoch,
            content: f.view.content,
            session,
            sequence: Sequence(sequence),
            answered_below: Sequence(below),
        }
    }

    fn header(&self, opcode: Opcode, file: usize, cell: usize) -> Header {
        let (chunk, at, len) = CELLS[cell];
        Header {
            inode: self.files.all[file].inode,
            chunk: ChunkIndex(chunk),
            offset: at as u32,
            length: len as u32,
            pg: self.pg_of(file, cell),
            ..Header::request(opcode, 0)
        }
    }

    pub fn client_step(&mut self) {
        let (file, cell) =
            (self.rng.random_range(0..FILES as usize), self.rng.random_range(0..CELLS.len()));
        if self.rng.random_bool(0.3) {
            return self.read_cell(file, cell);
        }
        if self.rng.random_bool(0.04) {
            return self.truncate(file);
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
        if matches!(f.flush, Flush::Sealing(..)) {
            return;
        }
        let Some(n) = self.primary(self.pg_of(file, cell)) else { return };
        let session = SessionId(s as u64 + 1);
        let below = self.files.sessions[s].1.iter().copied().min().unwrap_or(sequence);
        self.present(n, file, session);
        let (_, at, len) = CELLS[cell];
        let data = bytes_of(value, len);
        let header = self.header(Opcode::Write, file, cell);
        let mut body = self.context((file, cell), session, sequence, below).encode().to_vec();
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
        let Some(n) = self.primary(self.pg_of(file, cell)) else { return };
        let session = SessionId(9);
        self.present(n, file, session);
        let header = self.header(Opcode::Read, file, cell);
        let body = self.context((file, cell), session, 0, 0).encode().to_vec();
        let c = &self.files.all[file].cells[cell];
        let (least, cut) = (c.acked.max(c.seen), c.cut);
        let asked = Request::Read { file, cell, least, cut };
        self.ask(n, Role::Client, session, (header, body, None), asked);
    }

    // --- the leader ------------------------------------------------------------------------------------

    pub fn leader_step(&mut self) {
        let file = self.rng.random_range(0..FILES as usize);
        let run = self.rng.random_range(0..RUNS);
        match self.rng.random_range(0..10) {
            0 | 1 => self.truncate(file),
            2 if self.rng.random_bool(0.5) => self.remove(file),
            3 => self.tell_of_gone(),
            _ => self.leader_file(file, run),
        }
    }

    /// The command commits; clients and the leader tell the primaries. Only what nobody is writing goes, so that it
    /// is known what is left.
    fn truncate(&mut self, file: usize) {
        let at = start_of(self.rng.random_range(0..CELLS.len()));
        let f = &mut self.files.all[file];
        let after = |cell: &usize| start_of(*cell) >= at;
        let busy = (0..CELLS.len()).filter(after).any(|c| f.cells[c].pending.is_some());
        if busy || f.flush != Flush::None || f.notice.is_some() || f.view.cuts.len() >= 8 {
            return;
        }
        for cell in (0..CELLS.len()).filter(after) {
            f.cells[cell].cut = f.cells[cell].acked;
        }
        f.view.cuts.push(Cut { generation: f.generation, at });
        f.view.version = ViewVersion(f.view.version.0 + 1);
        f.generation = f.generation.next();
        f.heard_cuts = [false; RUNS];
        if let Some(b) = f.view.backing.as_mut() {
            b.limit = b.limit.min(at);
        }
        self.tally.cuts += 1;
        self.trace(|| format!("file {file} is cut at {at}"));
        // Several clients may learn of it at once.
        for session in 1..=self.rng.random_range(0..=SESSIONS as u64) {
            for run in 0..RUNS {
                if let Some(n) = self.primary(self.pg(file, run)) {
                    self.present(n, file, SessionId(session));
                }
            }
        }
    }

    /// A file goes, and another one takes its name.
    fn remove(&mut self, file: usize) {
        let f = &mut self.files.all[file];
        let busy = f.asked != [false; RUNS] || f.cells.iter().any(|c| c.pending.is_some());
        if busy || f.flush != Flush::None || f.notice.is_some() {
            return;
        }
        self.files.last_inode += 1;
        self.files.gone.insert(f.inode, ([false; RUNS], [false; RUNS]));
        (f.inode, f.generation) = (InodeId(self.files.last_inode), Generation(1));
        (f.view, f.heard_cuts) = (first_view(), [false; RUNS]);
        f.cells.iter_mut().for_each(|c| c.cut = c.acked);
        self.tally.removed += 1;
        self.trace(|| format!("file {file} is gone"));
    }

    fn tell_of_gone(&mut self) {
        let owed = |g: &([bool; RUNS], [bool; RUNS])| (0..RUNS).find(|r| !g.0[*r] && !g.1[*r]);
        let next = self.files.gone.iter().find_map(|(i, g)| Some((*i, owed(g)?)));
        let Some((inode, run)) = next else { return };
        let pg = PgId::of(inode, RunIndex(run as u32), PGS);
        let Some(n) = self.primary(pg) else { return };
        self.files.gone.get_mut(&inode).expect("known").1[run] = true;
        let drop = Control::DropInodes(self.map.version, vec![inode]);
        self.meta_ask(n, &drop, Request::Drop(inode, run));
    }

    fn leader_file(&mut self, file: usize, run: usize) {
        let f = &self.files.all[file];
        let Some(n) = self.primary(self.pg(file, run)) else { return };
        if f.asked[run] {
            return;
        }
        let (inode, g) = (f.inode, f.generation);
        let version = self.map.version;
        if let Some((told, heard)) = f.notice.clone() {
            if !heard[run] {
                let notice = match told {
                    Told::Done(done) => Control::FlushDone(version, vec![done]),
                    Told::Aborted(g) => Control::FlushAborted(version, vec![(inode, g)]),
                };
                self.control(n, file, run, &notice, Request::Notice(file, run));
            }
            return;
        }
        if !f.view.cuts.is_empty() {
            if !f.heard_cuts[run] {
                let asked = Request::Cut(file, run, f.view.version);
                let views =
                    Control::ApplyViews(vec![self.grant(file, GrantMode::Read, SessionId(0))]);
                self.control(n, file, run, &views, asked);
            }
            return;
        }
        match f.flush.clone() {
            Flush::None => {
                if !self.files.still {
                    self.files.all[file].flush = Flush::Sealing(g, [false; RUNS]);
                }
            }
            Flush::Sealing(g, sealed) => {
                if !sealed[run] {
                    let item = SealItem { inode, generation: g, alloc_limit: 2 * RUN_BYTES };
                    let seal = Control::Seal(version, vec![item]);
                    self.control(n, file, run, &seal, Request::Seal(file, g, run));
                }
            }
            Flush::Sealed(g) => {
                if self.rng.random_bool(0.2) {
                    return self.abort(file, g);
                }
                self.files.all[file].flush = Flush::Putting(g, [const { None }; RUNS]);
            }
            Flush::Putting(g, parts) => {
                if self.rng.random_bool(0.03) {
                    return self.abort(file, g);
                }
                if parts[run].is_none() {
                    let part = UploadPart {
                        inode,
                        generation: g,
                        grant: self.grant(file, GrantMode::Read, SessionId(0)),
                        key: format!("file-{file}"),
                        upload_id: format!("{g}"),
                        part_number: run as u32 + 1,
                        run: RunIndex(run as u32),
                        length: LENGTHS[run] as u32,
                    };
                    let part = Control::UploadPart(part);
                    self.control(n, file, run, &part, Request::Part(file, g, run));
                }
            }
        }
    }

    fn abort(&mut self, file: usize, g: Generation) {
        self.tally.aborted += 1;
        let f = &mut self.files.all[file];
        f.flush = Flush::None;
        f.notice = Some((Told::Aborted(g), [false; RUNS]));
    }

    fn control(&mut self, n: u32, file: usize, run: usize, control: &Control, asked: Request) {
        self.files.all[file].asked[run] = true;
        self.meta_ask(n, control, asked);
    }

    pub fn meta_ask(&mut self, n: u32, control: &Control, asked: Request) {
        self.trace(|| format!("leader asks node {n}: {asked:?}"));
        let header = Header::request(Opcode::Control, 0);
        self.ask(n, Role::Meta, SessionId(0), (header, codec::encode(control), None), asked);
    }

    pub fn s3_call(&mut self, job: Job<AlignedBuf>) -> JobDone<AlignedBuf> {
        let token = job.token;
        match job.work {
            Work::Fetch { key, etag, range, mut buf, at } => {
                let object = self.s3.objects.get(&key).filter(|o| o.0 == etag);
                let result = match object {
                    Some((_, body)) => {
                        let len = (range.end - range.start) as usize;
                        let target = &mut buf[at..at + len];
                        target.fill(0);
                        for (start, bytes) in body {
                            let (from, to) = (*start.max(&range.start), start + bytes.len() as u64);
                            let to = to.min(range.end);
                            if from < to {
                                let part = &bytes[(from - start) as usize..(to - start) as usize];
                                let place = (from - range.start) as usize;
                                target[place..place + part.len()].copy_from_slice(part);
                            }
                        }
                        Ok(())
                    }
                    None => Err(FetchError::Changed),
                };
                JobDone::Fetched { token, buf, result }
            }
            Work::UploadPart { key, part_number, body, .. } => {
                let mut start = LENGTHS[..part_number as usize - 1].iter().sum::<u64>();
                let mut bytes = Sparse::new();
                for piece in body {
                    match piece {
                        Piece::Buf(buf, range) => {
                            let len = range.len() as u64;
                            bytes.push((start, buf[range].to_vec()));
                            start += len;
                        }
                        Piece::Zeros(n) => start += n as u64,
                    }
                }
                self.files.etags += 1;
                let etag = format!("p{}", self.files.etags);
                self.s3.parts.insert(format!("{key}.{etag}"), bytes);
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
            Request::Read { file, cell, least, cut } => {
                // Cut while it was under way: either is right.
                if status == Status::Ok && self.files.all[file].cells[cell].cut == cut {
                    self.check_read(file, cell, least, &reply);
                }
            }
            Request::Seal(file, g, run) => {
                let f = &mut self.files.all[file];
                f.asked[run] = false;
                let done = matches!(
                    codec::decode::<ControlReply>(&reply.body),
                    Ok(ControlReply::Sealed(_))
                );
                if let Flush::Sealing(now, sealed) = &mut f.flush
                    && *now == g
                    && done
                    && status == Status::Ok
                {
                    sealed[run] = true;
                    if *sealed == [true; RUNS] {
                        f.generation = g.next();
                        f.flush = Flush::Sealed(g);
                    }
                }
            }
            Request::Part(file, g, run) => {
                let f = &mut self.files.all[file];
                f.asked[run] = false;
                let Flush::Putting(now, parts) = &mut f.flush else { return };
                if *now != g {
                    return;
                }
                match codec::decode::<ControlReply>(&reply.body) {
                    Ok(ControlReply::Part(StoreOutcome::Stored { etag }))
                        if status == Status::Ok =>
                    {
                        parts[run] = Some(etag);
                        if let [Some(a), Some(b)] = parts {
                            let parts = [a.clone(), b.clone()];
                            self.commit_flush(file, g, &parts);
                        }
                    }
                    _ => self.abort(file, g),
                }
            }
            Request::Notice(file, run) => {
                let f = &mut self.files.all[file];
                f.asked[run] = false;
                let done =
                    matches!(codec::decode::<ControlReply>(&reply.body), Ok(ControlReply::Done));
                if let Some((_, heard)) = &mut f.notice
                    && status == Status::Ok
                    && done
                {
                    heard[run] = true;
                    if *heard == [true; RUNS] {
                        f.notice = None;
                    }
                }
            }
            Request::Cut(file, run, version) => {
                let f = &mut self.files.all[file];
                f.asked[run] = false;
                let done = is_done(&reply);
                if f.view.version == version && status == Status::Ok && done {
                    f.heard_cuts[run] = true;
                    // Every primary has them: they leave the view.
                    if f.heard_cuts == [true; RUNS] {
                        f.view.cuts.clear();
                    }
                }
            }
            Request::Drop(inode, run) => {
                let (told, asked) = self.files.gone.get_mut(&inode).expect("known");
                asked[run] = false;
                let done = is_done(&reply);
                told[run] |= status == Status::Ok && done;
            }
            Request::Hand(at, epoch, stage) => {
                let done = is_done(&reply);
                self.handed(at, epoch, stage, status == Status::Ok && done);
            }
            Request::Holding(pg) => {
                let Ok(ControlReply::Pg(holding)) = codec::decode(&reply.body) else {
                    panic!("group {pg}: {status:?}");
                };
                assert!(!holding.frozen, "group {pg} is frozen and nobody will thaw it");
                let gone = |i: &&InodeId| self.files.gone.contains_key(i);
                let left = holding.dirty_inodes.iter().find(gone);
                assert!(left.is_none(), "group {pg} still holds {left:?}, which is gone");
            }
        }
    }

    fn commit_flush(&mut self, file: usize, g: Generation, parts: &[String]) {
        self.tally.flushed += 1;
        self.files.etags += 1;
        let etag = format!("e{}", self.files.etags);
        let mut body = Sparse::new();
        for part in parts {
            body.extend(self.s3.parts[&format!("file-{file}.{part}")].iter().cloned());
        }
        let key = format!("file-{file}.{etag}");
        self.s3.objects.insert(key.clone(), (etag.clone(), body));
        self.trace(|| format!("flushed file {file} generation {g} as {etag}"));
        let f = &mut self.files.all[file];
        let old_valid_bytes = f.view.backing.as_ref().map_or(0, Backing::valid_bytes);
        let old_content = f.view.content;
        f.view.content = ContentId(old_content.0 + 1);
        f.view.version = ViewVersion(f.view.version.0 + 1);
        f.view.clean_generation = g;
        f.view.backing = Some(Backing { key, etag, length: FILE_BYTES, limit: FILE_BYTES });
        f.flush = Flush::None;
        let done = FlushDone {
            inode: f.inode,
            generation: g,
            content: f.view.content,
            old_content,
            valid_bytes: FILE_BYTES,
            old_valid_bytes,
        };
        f.notice = Some((Told::Done(done), [false; RUNS]));
    }

    /// Nobody will answer.
    pub fn lost(&mut self, asked: Request) {
        match asked {
            Request::Present | Request::Read { .. } | Request::Holding(_) => {}
            Request::Drop(inode, run) => {
                self.files.gone.get_mut(&inode).expect("known").1[run] = false;
            }
            Request::Hand(at, epoch, stage) => self.handed(at, epoch, stage, false),
            Request::Write { file, cell, value } => {
                if let Some(p) = &mut self.files.all[file].cells[cell].pending
                    && p.0 == value
                {
                    p.3 = false;
                }
            }
            Request::Seal(file, _, run)
            | Request::Notice(file, run)
            | Request::Cut(file, run, _)
            | Request::Part(file, _, run) => self.files.all[file].asked[run] = false,
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
        let (_, at, len) = CELLS[cell];
        let from = at as usize - reply.header.offset as usize;
        let got = &bytes[from..from + len];
        let value = u64::from_le_bytes(got[..8].try_into().expect("eight bytes"));
        let c = &mut self.files.all[file].cells[cell];
        let (cut, most) = (c.cut, c.pending.map_or(c.acked, |p| p.0));
        // Zeros are what a cut left.
        let state = if value == 0 { cut } else { value };
        assert!(
            got == bytes_of(value, len)
                && (least..=most).contains(&state)
                && (value == 0 || value > cut),
            "file {file} cell {cell} reads {value}; acked before it was asked {least}, asked for {most}, \
             cut away {cut}"
        );
        c.seen = c.seen.max(state);
        self.tally.reads += 1;
    }

    // --- the end -------------------------------------------------------------------------------------------

    pub fn retry_all(&mut self) {
        self.files.still = true;
        (0..RUNS * self.files.gone.len().min(4)).for_each(|_| self.tell_of_gone());
        for file in 0..FILES as usize {
            (0..RUNS).for_each(|run| self.leader_file(file, run));
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

impl World {
    /// Nothing is held by a primary that is gone, and no group is frozen.
    pub fn check_holdings(&mut self) {
        for pg in (0..PGS).map(PgId) {
            if let Some(n) = self.primary(pg) {
                self.meta_ask(n, &Control::PgStatus(pg), Request::Holding(pg));
            }
        }
    }
}
