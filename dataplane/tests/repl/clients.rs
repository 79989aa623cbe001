//! Clients of the replication simulator, and what is answered to them and to the leader.

mod anew;
mod full;
mod leader;

use super::history::History;
use super::troubles::Stage;
use super::{CLUSTER, PGS, SHARED, World, key};
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
/// Those that write.
const SESSIONS: usize = 3;
/// Who only reads.
const READER: usize = SESSIONS;
/// Writes of a cell that are not answered yet, at most.
const WRITERS: usize = 2;
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
/// What fills a device comes in such pieces, so many.
const PIECE_BYTES: u64 = 1 << 19;
const PIECES: u32 = 24;
const FILE_BYTES: u64 = LENGTHS[0] + LENGTHS[1];

/// What a request was for.
#[derive(Clone, Debug)]
pub enum Request {
    Present,
    Write {
        file: usize,
        cell: usize,
        value: u64,
        session: usize,
    },
    /// When it was asked, and how often the cell had been cut away by then.
    Read {
        file: usize,
        cell: usize,
        asked: u64,
        cuts: u64,
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
    /// A node is no member any more.
    Discard,
    /// What fills a node's device, and its end.
    Ballast,
    Unload(u32, InodeId),
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
    history: History,
    /// Asked for, not acked.
    pending: Vec<Pending>,
}

#[derive(Clone, Debug)]
struct Pending {
    value: u64,
    session: usize,
    sequence: u64,
    /// Who was asked last, while the answer is out.
    at: Option<u32>,
}

/// A client: it goes by the map that it has, until somebody refuses it.
#[derive(Debug)]
struct Session {
    next: u64,
    /// Sequences that are not answered.
    open: Vec<u64>,
    map: ClusterMap,
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
    /// The map in which generation and view became what they are: no grant of them is older.
    since: MapVersion,
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
    sessions: Vec<Session>,
    /// Cells that are asked for more often than others.
    hot: Vec<(usize, usize)>,
    /// Writes without an answer, and when they are sent again.
    again: Vec<(u64, usize, usize, u64)>,
    etags: u64,
    /// Inodes that are gone, and which runs' primaries were told, and are being asked.
    gone: BTreeMap<InodeId, ([bool; RUNS], [bool; RUNS])>,
    last_inode: InodeId,
    /// What fills nodes' devices: of which node, the next piece, and whether it is to go.
    ballast: BTreeMap<u32, (InodeId, u32, bool)>,
    /// No new work.
    still: bool,
}

impl Files {
    pub fn new(map: &ClusterMap, rng: &mut impl Rng) -> Self {
        let mut last_inode = InodeId(0);
        let all = (1..=FILES).map(|_| File {
            inode: next_inode(&mut last_inode, 0..SHARED),
            generation: Generation(1),
            view: first_view(),
            since: MapVersion(1),
            cells: vec![Cell::default(); CELLS.len()],
            flush: Flush::None,
            asked: [false; RUNS],
            notice: None,
            heard_cuts: [false; RUNS],
        });
        let all = all.collect();
        let session = |_| Session { next: 1, open: Vec::new(), map: map.clone() };
        let mut any = || (rng.random_range(0..FILES as usize), rng.random_range(0..CELLS.len()));
        Self {
            all,
            sessions: (0..=SESSIONS).map(session).collect(),
            hot: (0..3).map(|_| any()).collect(),
            again: Vec::new(),
            etags: 0,
            gone: BTreeMap::new(),
            last_inode,
            ballast: BTreeMap::new(),
            still: false,
        }
    }

    pub fn quiet(&self) -> bool {
        self.gone.values().all(|g| g.0 == [true; RUNS])
            && self.ballast.is_empty()
            && self.all.iter().all(|f| {
                f.flush == Flush::None
                    && f.notice.is_none()
                    && f.view.cuts.is_empty()
                    && f.asked == [false; RUNS]
                    && f.cells.iter().all(|c| c.pending.is_empty())
            })
    }

    pub fn busy(&self) -> String {
        format!(
            "{:?}",
            self.all
                .iter()
                .map(|f| {
                    let pending: Vec<_> = f.cells.iter().map(|c| &c.pending).collect();
                    (&f.flush, f.asked, &f.notice, pending)
                })
                .collect::<Vec<_>>()
        )
    }
}

fn is_done(reply: &Reply<AlignedBuf>) -> bool {
    matches!(codec::decode(&reply.body), Ok(ControlReply::Done))
}

/// The next one of which both runs are in these groups.
fn next_inode(last: &mut InodeId, groups: std::ops::Range<u16>) -> InodeId {
    loop {
        last.0 += 1;
        let of = |run| PgId::of(*last, RunIndex(run), PGS).0;
        if (0..RUNS as u32).all(|run| groups.contains(&of(run))) {
            return *last;
        }
    }
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

    fn grant(
        &self,
        file: usize,
        mode: GrantMode,
        session: SessionId,
        least: MapVersion,
    ) -> SignedGrant {
        let f = &self.files.all[file];
        let grant = Grant {
            cluster: CLUSTER,
            inode: f.inode,
            mode,
            generation: f.generation,
            session,
            view: f.view.clone(),
            least_map_version: least,
            alloc_limit: 2 * RUN_BYTES,
        };
        SignedGrant::sign(&grant, &key())
    }

    fn context(&self, (file, cell): (usize, usize), s: usize, sequence: u64) -> DataContext {
        let f = &self.files.all[file];
        let session = &self.files.sessions[s];
        let below = session.open.iter().copied().min().unwrap_or(sequence);
        DataContext {
            generation: f.generation,
            view_version: f.view.version,
            map_version: session.map.version,
            pg_epoch: session.map.pgs[usize::from(self.pg_of(file, cell).0)].epoch,
            content: f.view.content,
            session: SessionId(s as u64 + 1),
            sequence: Sequence(sequence),
            answered_below: Sequence(below),
        }
    }

    /// Whom a client asks: by its map, which may be old as long as its grant is not younger.
    fn asks(&mut self, s: usize, file: usize, cell: usize) -> Option<u32> {
        let pg = usize::from(self.pg_of(file, cell).0);
        let session = &mut self.files.sessions[s];
        let old = session.map.version < self.map.version;
        let must = session.map.version < self.files.all[file].since;
        if old && (must || self.calm || self.rng.random_bool(0.1)) {
            session.map = self.map.clone();
        }
        self.tally.old_maps += u64::from(session.map.pgs[pg].epoch < self.map.pgs[pg].epoch);
        Some(session.map.pgs[pg].primary()?.node.0)
    }

    /// Who was refused looks for a newer map, soon or at once.
    fn refused(&mut self, s: usize) {
        if self.rng.random_bool(0.3) {
            self.files.sessions[s].map = self.map.clone();
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
        let (file, cell) = match self.rng.random_bool(0.5) {
            true => self.files.hot[self.rng.random_range(0..self.files.hot.len())],
            false => {
                (self.rng.random_range(0..FILES as usize), self.rng.random_range(0..CELLS.len()))
            }
        };
        if self.rng.random_bool(0.3) {
            return self.read_cell(file, cell);
        }
        if self.rng.random_bool(0.04) {
            return self.truncate(file);
        }
        let pending = self.files.all[file].cells[cell].pending.len();
        if pending == 0 || (pending < WRITERS && self.rng.random_bool(0.3)) {
            return self.new_write(file, cell);
        }
        let which = self.rng.random_range(0..pending);
        self.write_cell(file, cell, which);
    }

    fn new_write(&mut self, file: usize, cell: usize) {
        let pending = self.files.all[file].cells[cell].pending.len();
        let s = self.rng.random_range(0..SESSIONS);
        let session = &mut self.files.sessions[s];
        let sequence = session.next;
        session.next += 1;
        session.open.push(sequence);
        let asked = self.tick();
        let c = &mut self.files.all[file].cells[cell];
        let value = c.history.asked(asked);
        c.pending.push(Pending { value, session: s, sequence, at: None });
        self.write_cell(file, cell, pending);
    }

    /// Writes that got no answer are sent again.
    pub fn ask_again(&mut self) {
        let now = self.now;
        let due: Vec<_> = self.files.again.extract_if(.., |a| a.0 <= now).collect();
        for (_, file, cell, value) in due {
            let pending = &self.files.all[file].cells[cell].pending;
            if let Some(which) = pending.iter().position(|p| p.value == value) {
                self.write_cell(file, cell, which);
            }
        }
    }

    /// Sends a pending write, with its grant before it; also where an earlier request for it is still out, if that
    /// was to another node.
    fn write_cell(&mut self, file: usize, cell: usize, which: usize) {
        let f = &self.files.all[file];
        let Some(p) = f.cells[cell].pending.get(which).cloned() else { return };
        // No grant while a generation ends.
        if matches!(f.flush, Flush::Sealing(..)) {
            return;
        }
        let Some(n) = self.asks(p.session, file, cell) else { return };
        if p.at == Some(n) {
            return;
        }
        let session = SessionId(p.session as u64 + 1);
        self.present(n, file, session, self.files.sessions[p.session].map.version);
        let (value, (_, at, len)) = (p.value, CELLS[cell]);
        let data = bytes_of(value, len);
        let header = self.header(Opcode::Write, file, cell);
        let mut body = self.context((file, cell), p.session, p.sequence).encode().to_vec();
        let crcs: Vec<u32> = block_pieces(at, len).map(|p| crc32c(&data[p])).collect();
        body.extend(encode_checksums(&crcs));
        let head = at as usize % 4096;
        let mut buf = AlignedBuf::zeroed((head + len).next_multiple_of(4096));
        buf.fill(0xbb);
        buf[head..head + len].copy_from_slice(&data);
        if let Some(p) = self.files.all[file].cells[cell].pending.get_mut(which) {
            p.at = Some(n);
        }
        self.trace(|| format!("write file {file} cell {cell} value {value} at node {n}"));
        let asked = Request::Write { file, cell, value, session: p.session };
        self.ask(
            n,
            Role::Client,
            session,
            (header.with_payload(len as u32), body, Some(buf)),
            asked,
        );
    }

    fn present(&mut self, n: u32, file: usize, session: SessionId, least: MapVersion) {
        let grant = self.grant(file, GrantMode::Write, session, least);
        let header = Header::request(Opcode::Present, 0);
        self.ask(n, Role::Client, session, (header, codec::encode(&grant), None), Request::Present);
    }

    pub fn read_cell(&mut self, file: usize, cell: usize) {
        let Some(n) = self.asks(READER, file, cell) else { return };
        let session = SessionId(READER as u64 + 1);
        self.present(n, file, session, self.files.sessions[READER].map.version);
        let header = self.header(Opcode::Read, file, cell);
        let body = self.context((file, cell), READER, 0).encode().to_vec();
        let asked = self.tick();
        let cuts = self.files.all[file].cells[cell].history.cuts();
        let asked = Request::Read { file, cell, asked, cuts };
        self.ask(n, Role::Client, session, (header, body, None), asked);
    }

    // --- what fills a device ---------------------------------------------------------------------------------

    /// A file of a group that only this node has grows until there is no space, or goes.
    pub fn fill_device(&mut self, n: u32) {
        let group = SHARED + n as u16 - 1;
        match self.files.ballast.get_mut(&n) {
            Some(ballast) => ballast.2 = true,
            None => {
                self.tally.fills += 1;
                self.trace(|| format!("the device of node {n} fills up"));
                let inode = next_inode(&mut self.files.last_inode, SHARED..PGS);
                let inode = (inode.0..).map(InodeId);
                let inode = inode.into_iter().find(|i| PgId::of(*i, RunIndex(0), PGS).0 == group);
                let inode = inode.expect("some inode is");
                self.files.last_inode = inode;
                self.files.ballast.insert(n, (inode, 0, false));
            }
        }
    }

    pub fn drive_ballast(&mut self) {
        let all: Vec<_> = self.files.ballast.iter().map(|(n, b)| (*n, *b)).collect();
        for (n, (inode, piece, goes)) in all {
            if goes || self.files.still {
                let drop = Control::DropInodes(self.map.version, vec![inode]);
                self.meta_ask(n, &drop, Request::Unload(n, inode));
            } else if piece < PIECES {
                self.files.ballast.insert(n, (inode, piece + 1, false));
                let at = u64::from(piece) * PIECE_BYTES;
                self.write_ballast(
                    n,
                    inode,
                    at,
                    PIECE_BYTES as usize,
                    inode.0 * 100 + u64::from(piece),
                );
            }
        }
    }

    fn write_ballast(&mut self, n: u32, inode: InodeId, at: u64, len: usize, sequence: u64) {
        let session = SessionId(99);
        let grant = Grant {
            cluster: CLUSTER,
            inode,
            mode: GrantMode::Write,
            generation: Generation(1),
            session,
            view: first_view(),
            least_map_version: self.map.version,
            alloc_limit: RUN_BYTES,
        };
        let grant = codec::encode(&SignedGrant::sign(&grant, &key()));
        let header = Header::request(Opcode::Present, 0);
        self.ask(n, Role::Client, session, (header, grant, None), Request::Ballast);
        let pg = PgId::of(inode, RunIndex(0), PGS);
        let header = Header {
            inode,
            chunk: ChunkIndex((at / u64::from(CHUNK_BYTES)) as u32),
            offset: (at % u64::from(CHUNK_BYTES)) as u32,
            length: len as u32,
            pg,
            ..Header::request(Opcode::Write, 0)
        };
        let context = DataContext {
            generation: Generation(1),
            view_version: ViewVersion(1),
            map_version: self.map.version,
            pg_epoch: self.map.pgs[usize::from(pg.0)].epoch,
            content: ContentId(1),
            session,
            sequence: Sequence(sequence),
            answered_below: Sequence(0),
        };
        let buf = AlignedBuf::zeroed(len);
        let mut body = context.encode().to_vec();
        let pieces = block_pieces(0, len);
        let crcs: Vec<u32> = pieces.map(|p| crc32c(&buf[p])).collect();
        body.extend(encode_checksums(&crcs));
        let header = header.with_payload(len as u32);
        self.ask(n, Role::Client, session, (header, body, Some(buf)), Request::Ballast);
    }

    // --- answers -----------------------------------------------------------------------------------------

    pub fn answered(&mut self, asked: Request, reply: Reply<AlignedBuf>) {
        let status = reply.header.status;
        match asked {
            Request::Present => {}
            Request::Write { file, cell, value, session } => {
                self.tally.no_space += u64::from(status == Status::NoSpace);
                let done = status == Status::Ok || status == Status::Answered;
                if !done {
                    self.refused(session);
                    return self.lost(Request::Write { file, cell, value, session });
                }
                let now = self.tick();
                let c = &mut self.files.all[file].cells[cell];
                let Some(at) = c.pending.iter().position(|p| p.value == value) else { return };
                let p = c.pending.remove(at);
                c.history.known(value, now);
                self.files.sessions[p.session].open.retain(|q| *q != p.sequence);
                self.tally.acked += 1;
                self.trace(|| format!("acked file {file} cell {cell} value {value}"));
            }
            Request::Read { file, cell, asked, cuts } => {
                if status != Status::Ok {
                    self.refused(READER);
                } else if self.files.all[file].cells[cell].history.cuts() == cuts {
                    // Cut while it was under way: either is right.
                    self.check_read(file, cell, asked, &reply);
                }
            }
            Request::Ballast => self.tally.full += u64::from(status == Status::NoSpace),
            Request::Discard => {}
            Request::Unload(n, inode) => {
                if is_done(&reply) && self.files.ballast.get(&n).is_some_and(|b| b.0 == inode) {
                    self.files.ballast.remove(&n);
                }
            }
            Request::Seal(file, g, run) => {
                let version = self.map.version;
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
                        (f.generation, f.since) = (g.next(), version);
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
        let version = self.map.version;
        let f = &mut self.files.all[file];
        f.since = version;
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
            Request::Ballast | Request::Unload(..) | Request::Discard => {}
            Request::Drop(inode, run) => {
                self.files.gone.get_mut(&inode).expect("known").1[run] = false;
            }
            Request::Hand(at, epoch, stage) => self.handed(at, epoch, stage, false),
            Request::Write { file, cell, value, .. } => {
                let pending = &mut self.files.all[file].cells[cell].pending;
                let Some(p) = pending.iter_mut().find(|p| p.value == value) else { return };
                p.at = None;
                let after = if self.rng.random_bool(0.6) { 20 } else { 800 };
                let due = self.now + self.rng.random_range(0..after);
                // Once for each, however often it is refused.
                self.files.again.retain(|a| (a.1, a.2, a.3) != (file, cell, value));
                self.files.again.push((due, file, cell, value));
            }
            Request::Seal(file, _, run)
            | Request::Notice(file, run)
            | Request::Cut(file, run, _)
            | Request::Part(file, _, run) => self.files.all[file].asked[run] = false,
        }
    }

    fn check_read(&mut self, file: usize, cell: usize, asked: u64, reply: &Reply<AlignedBuf>) {
        let mut bytes = Vec::new();
        for piece in &reply.payload {
            match piece {
                Piece::Buf(buf, range) => bytes.extend_from_slice(&buf[range.clone()]),
                Piece::Shared(buf, range) => bytes.extend_from_slice(&buf[range.clone()]),
                Piece::Zeros(n) => bytes.resize(bytes.len() + n, 0),
            }
        }
        let (_, at, len) = CELLS[cell];
        let from = at as usize - reply.header.offset as usize;
        let got = &bytes[from..from + len];
        let value = u64::from_le_bytes(got[..8].try_into().expect("eight bytes"));
        assert!(got == bytes_of(value, len), "file {file} cell {cell} is torn around {value}");
        let now = self.tick();
        let history = &mut self.files.all[file].cells[cell].history;
        if let Err(why) = history.shown(value, asked, now) {
            panic!("file {file} cell {cell} reads {value}, asked at {asked}: {why}: {history:?}");
        }
        self.tally.reads += 1;
    }

    // --- the end -------------------------------------------------------------------------------------------

    pub fn retry_all(&mut self) {
        self.files.still = true;
        (0..RUNS * self.files.gone.len().min(4)).for_each(|_| self.tell_of_gone());
        for file in 0..FILES as usize {
            (0..RUNS).for_each(|run| self.leader_file(file, run));
            for cell in 0..CELLS.len() {
                for which in 0..self.files.all[file].cells[cell].pending.len() {
                    self.write_cell(file, cell, which);
                }
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
        for pg in (0..SHARED).map(PgId) {
            if let Some(n) = self.primary(pg) {
                self.meta_ask(n, &Control::PgStatus(pg), Request::Holding(pg));
            }
        }
    }
}
