//! The files of the simulation: what each should hold, and what its clients and its leader do next.

use super::*;
use ebb_dataplane_protocol::checksum::{crc32c, piece_checksums};
use ebb_dataplane_protocol::control::{FlushDone, PutCondition, PutObject, SealItem, SealedItem};
use ebb_dataplane_protocol::data::{DataContext, WriteReply, decode_checksums, encode_checksums};
use ebb_dataplane_protocol::header::{FLAG_RANDOM, FLAG_SEQUENTIAL};

const CHUNK: u64 = CHUNK_BYTES as u64;
/// Bytes of a file at most: two chunks and a bit, in one run.
const FILE_MAX: u64 = 2 * CHUNK + 100_000;
const SESSIONS: u64 = 3;

/// One write as its client remembers it until it is answered.
#[derive(Clone, Debug)]
pub struct Write {
    pub file: usize,
    pub at: u64,
    pub data: Vec<u8>,
    pub sequence: Sequence,
    pub session: SessionId,
    /// The tag it was taken under, as the first answer said.
    pub generation: Generation,
    /// Sent under this tag, older than the newest, instead of the newest.
    pub late: Option<Generation>,
    /// Its first answer was lost.
    pub asked_again: bool,
    /// The highest tag that was acked when it was sent: nothing lower may be taken (R7).
    pub least: Generation,
}

/// What a request was for.
#[derive(Clone, Debug)]
pub enum What {
    Present,
    Write(Write),
    /// A write that was acked, sent once more: must change nothing.
    Duplicate(Write),
    /// A read and what it must answer.
    Read {
        file: usize,
        at: u64,
        expected: Vec<u8>,
    },
    /// A read under the view before: right, or refused.
    OldRead {
        file: usize,
        at: u64,
        expected: Vec<u8>,
    },
    Seal(usize),
    Put {
        file: usize,
    },
    FlushDone(usize),
    Abort(usize),
    /// And the version of the view that brought it.
    Cut(usize, ViewVersion),
    Evict,
}

impl What {
    /// In one line, without its bytes.
    pub fn line(&self) -> String {
        match self {
            What::Write(w) | What::Duplicate(w) => format!(
                "{} file {} at {} len {} {}#{}",
                self.name(),
                w.file,
                w.at,
                w.data.len(),
                w.session,
                w.sequence
            ),
            What::Read { file, at, expected } => {
                format!("Read file {file} at {at} len {}", expected.len())
            }
            other => format!("{other:?}"),
        }
    }
    /// Its kind.
    pub fn name(&self) -> String {
        let text = format!("{self:?}");
        text.split(['(', '{']).next().unwrap_or_default().to_owned()
    }
}

#[derive(Clone, Debug)]
pub struct Outstanding {
    pub session: SessionId,
    pub what: What,
}

/// Where a file's flush is.
#[derive(Clone, Debug, PartialEq)]
pub enum Flush {
    None,
    Sealing,
    /// Sealed: the bytes as they were.
    Sealed(Vec<u8>),
    Stored(Vec<u8>, String),
    Ending,
}

#[derive(Clone, Debug)]
pub struct File {
    pub inode: InodeId,
    /// All bytes; past `size` zeros.
    pub model: Vec<u8>,
    pub size: u64,
    pub generation: Generation,
    pub view: FileView,
    /// The generation being flushed.
    pub sealed: Generation,
    pub flush: Flush,
    /// Bytes being written or read: nothing else may touch them, so that the model is exact.
    busy: Vec<std::ops::Range<u64>>,
    /// The generation before, whose flush was given up before the seal came here.
    unsealed: Option<Generation>,
    /// The highest tag of an acked write.
    highest: Generation,
    /// A cut or a seal waits for the writes under way; no new ones.
    quiet: bool,
    acked: Vec<Write>,
    /// Writes of the sealed generation that were not answered when it was sealed: the answer may have
    /// been lost in a crash, so each may or may not be in it.
    maybe: Vec<Write>,
    /// The view and generation of before the last commit, which some client still holds.
    previous: Option<(FileView, Generation)>,
}

#[derive(Default)]
pub struct Files {
    pub all: Vec<File>,
    sequence: u64,
}

impl Files {
    pub fn new(rng: &mut SmallRng) -> Self {
        let all = (0..4u64)
            .map(|i| {
                let mut model = vec![0u8; FILE_MAX as usize];
                let mut view = FileView {
                    version: ViewVersion(1),
                    content: ContentId(10 * i + 1),
                    ..FileView::default()
                };
                let mut size = 0;
                if i % 2 == 0 {
                    // Backed by an object.
                    size = rng.random_range(1..FILE_MAX);
                    rng.fill(&mut model[..size as usize]);
                    view.backing = Some(Backing {
                        key: format!("f{i}"),
                        etag: "e0".into(),
                        length: size,
                        limit: size,
                    });
                }
                File {
                    inode: InodeId(100 + i),
                    model,
                    size,
                    generation: Generation(1),
                    view,
                    sealed: Generation(0),
                    flush: Flush::None,
                    busy: Vec::new(),
                    unsealed: None,
                    highest: Generation(0),
                    quiet: false,
                    acked: Vec::new(),
                    maybe: Vec::new(),
                    previous: None,
                }
            })
            .collect();
        Self { all, sequence: 0 }
    }

    /// Locks were the lost requests'; those are asked again and lock anew.
    pub fn node_restarted(&mut self) {
        for f in &mut self.all {
            f.busy.clear();
        }
    }
}

impl File {
    fn free(&self, range: &std::ops::Range<u64>) -> bool {
        !self.busy.iter().any(|b| b.start < range.end && range.start < b.end)
    }
    /// Whether `stored` is the sealed bytes, give or take unanswered writes.
    fn is_sealed(&self, sealed: &[u8], stored: &[u8]) -> bool {
        let excused = |i: usize| {
            let at = i as u64;
            self.maybe
                .iter()
                .any(|w| write_range(w).contains(&at) && w.data[(at - w.at) as usize] == stored[i])
        };
        stored.len() == sealed.len()
            && (0..sealed.len()).all(|i| stored[i] == sealed[i] || excused(i))
    }
    fn unlock(&mut self, range: std::ops::Range<u64>) {
        let i = self.busy.iter().position(|b| *b == range).expect("was locked");
        self.busy.swap_remove(i);
    }
    fn grant(&self, session: SessionId) -> SignedGrant {
        let grant = Grant {
            cluster: CLUSTER,
            inode: self.inode,
            mode: GrantMode::Write,
            generation: self.generation,
            session,
            view: self.view.clone(),
            least_map_version: MapVersion(1),
            alloc_limit: FILE_MAX,
        };
        SignedGrant::sign(&grant, &key())
    }
    fn meta_grant(&self) -> SignedGrant {
        let grant = Grant {
            cluster: CLUSTER,
            inode: self.inode,
            mode: GrantMode::Read,
            generation: self.generation,
            session: SessionId(0),
            view: self.view.clone(),
            least_map_version: MapVersion(1),
            alloc_limit: FILE_MAX,
        };
        SignedGrant::sign(&grant, &key())
    }
}

fn seal_item(inode: InodeId, generation: Generation) -> SealItem {
    SealItem { inode, generation, alloc_limit: FILE_MAX }
}

/// The tag that a write's answer names.
fn tag_of(reply: &Reply<Slot>) -> Generation {
    WriteReply::decode(&reply.body).expect("a write's answer").generation
}

fn write_range(w: &Write) -> std::ops::Range<u64> {
    w.at..w.at + w.data.len() as u64
}

impl Sim {
    fn header(&self, opcode: Opcode, file: usize, at: u64, len: usize) -> Header {
        let inode = self.files.all[file].inode;
        let chunk = ChunkIndex::of_offset(at);
        Header {
            inode,
            chunk,
            offset: (at - chunk.start()) as u32,
            length: len as u32,
            pg: PgId::of_chunk(inode, chunk, PGS),
            ..Header::request(opcode, 0)
        }
    }

    fn context(&self, file: usize, session: SessionId, sequence: Sequence) -> DataContext {
        let f = &self.files.all[file];
        DataContext {
            generation: f.generation,
            view_version: f.view.version,
            map_version: MapVersion(1),
            pg_epoch: PgEpoch(1),
            content: f.view.content,
            session,
            sequence,
            answered_below: Sequence(0),
        }
    }

    fn range(&mut self) -> (u64, usize) {
        let len = match self.rng.random_range(0..10) {
            0..4 => self.rng.random_range(1..600),
            4..6 => 4096 * self.rng.random_range(1..5),
            6..8 => self.rng.random_range(1..50_000),
            _ => self.rng.random_range(1..700_000),
        };
        let mut at = self.rng.random_range(0..FILE_MAX);
        if self.rng.random_bool(0.5) {
            at %= 60_000;
        }
        if self.rng.random_bool(0.3) {
            at = at / 4096 * 4096;
        }
        let end = (at + len as u64).min(FILE_MAX).min((at / CHUNK + 1) * CHUNK);
        (at, (end - at) as usize)
    }

    pub fn client_step(&mut self) {
        let file = self.rng.random_range(0..self.files.all.len());
        let session = SessionId(self.rng.random_range(1..=SESSIONS));
        let (at, len) = self.range();
        let range = at..at + len as u64;
        let f = &self.files.all[file];
        if !f.free(&range) {
            return;
        }
        match self.rng.random_range(0..10) {
            0..5 => {
                if f.quiet {
                    return;
                }
                let mut data = vec![0u8; len];
                self.rng.fill(&mut data[..]);
                self.files.sequence += 1;
                let sequence = Sequence(self.files.sequence);
                let late = self.files.all[file].unsealed.filter(|_| self.rng.random_bool(0.3));
                // A client that has not asked for a grant since.
                let session = late.map_or(session, |_| SessionId(100 + sequence.0));
                let (generation, least) = (Generation(0), Generation(0));
                let w = Write {
                    file,
                    at,
                    data,
                    sequence,
                    session,
                    generation,
                    late,
                    asked_again: false,
                    least,
                };
                if let Some(generation) = late {
                    let old = File { generation, ..self.files.all[file].clone() };
                    let o = Outstanding { session, what: What::Present };
                    let body = codec::encode(&old.grant(session));
                    self.send(Role::Client, Header::request(Opcode::Present, 0), body, None, o);
                    self.tally.late += 1;
                }
                self.send_write(w, false);
            }
            5 => {
                let acked = &self.files.all[file].acked;
                if acked.is_empty() {
                    return;
                }
                let w = acked[self.rng.random_range(0..acked.len())].clone();
                if self.files.all[file].free(&write_range(&w)) && !self.files.all[file].quiet {
                    self.send_write(w, true);
                }
            }
            6 if self.rng.random_bool(0.5) => self.send_old_read(file, at, len),
            6 => self.present(file, session),
            _ => {
                let expected = f.model[at as usize..at as usize + len].to_vec();
                self.send_read(file, at, expected, session);
            }
        }
    }

    /// Somebody reads files from end to end.
    pub fn scan(&mut self) {
        const STEP: usize = 256 << 10;
        for file in 0..self.files.all.len() {
            for at in (0..self.files.all[file].size).step_by(STEP) {
                let f = &self.files.all[file];
                let end = (at + STEP as u64).min(f.size);
                if !f.free(&(at..end)) {
                    continue;
                }
                let expected = f.model[at as usize..end as usize].to_vec();
                self.send_read(file, at, expected, SessionId(1));
                self.turn();
                self.turn();
            }
        }
    }

    fn present(&mut self, file: usize, session: SessionId) {
        let body = codec::encode(&self.files.all[file].grant(session));
        let o = Outstanding { session, what: What::Present };
        self.send(Role::Client, Header::request(Opcode::Present, 0), body, None, o);
    }

    fn send_write(&mut self, mut w: Write, duplicate: bool) {
        let header = self.header(Opcode::Write, w.file, w.at, w.data.len());
        let mut context = self.context(w.file, w.session, w.sequence);
        // Only the first time: refused or asked again, it goes under the newest.
        context.generation = w.late.take().unwrap_or(context.generation);
        w.least = self.files.all[w.file].highest;
        let mut body = context.encode().to_vec();
        body.extend(encode_checksums(&piece_checksums(u64::from(header.offset), &w.data)));
        let head = header.offset as usize % 4096;
        let mut slot = self.memory.payload(head + w.data.len());
        slot.bytes_mut().fill(0x55);
        slot.bytes_mut()[head..head + w.data.len()].copy_from_slice(&w.data);
        self.files.all[w.file].busy.push(write_range(&w));
        let header = header.with_payload(w.data.len() as u32);
        let session = w.session;
        let what = if duplicate { What::Duplicate(w) } else { What::Write(w) };
        self.send(Role::Client, header, body, Some(slot), Outstanding { session, what });
    }

    fn send_read(&mut self, file: usize, at: u64, expected: Vec<u8>, session: SessionId) {
        let mut header = self.header(Opcode::Read, file, at, expected.len());
        header.flags = [0, FLAG_SEQUENTIAL, FLAG_RANDOM][(at % 3) as usize];
        let body = self.context(file, session, Sequence(0)).encode().to_vec();
        self.files.all[file].busy.push(at..at + expected.len() as u64);
        let o = Outstanding { session, what: What::Read { file, at, expected } };
        self.send(Role::Client, header, body, None, o);
    }

    /// A client that has not heard of the last commit. Cuts not acked yet may go unseen: not then.
    fn send_old_read(&mut self, file: usize, at: u64, len: usize) {
        let f = &self.files.all[file];
        let Some((view, generation)) = f.previous.clone() else { return };
        if !f.view.cuts.is_empty() {
            return;
        }
        let session = SessionId(9);
        let old = File { view, generation, ..f.clone() };
        let expected = f.model[at as usize..at as usize + len].to_vec();
        let body = codec::encode(&old.grant(session));
        let o = Outstanding { session, what: What::Present };
        self.send(Role::Client, Header::request(Opcode::Present, 0), body, None, o);
        let header = self.header(Opcode::Read, file, at, len);
        let mut context = self.context(file, session, Sequence(0));
        context.view_version = old.view.version;
        context.content = old.view.content;
        self.files.all[file].busy.push(at..at + len as u64);
        let what = What::OldRead { file, at, expected };
        let body = context.encode().to_vec();
        self.send(Role::Client, header, body, None, Outstanding { session, what });
    }

    /// Sends refused writes again, where nothing else is at those bytes now.
    pub fn retry(&mut self) {
        for w in std::mem::take(&mut self.retries) {
            let f = &self.files.all[w.file];
            // A cut in between: the client's write may come after it all the same, but not under it.
            if f.free(&write_range(&w)) && !f.quiet {
                // Right before: the core's tables are small here, and forget.
                self.present(w.file, w.session);
                self.send_write(w, false);
            } else if f.quiet {
                self.retries.push(w);
            }
        }
    }

    /// The leader's next step for some file.
    pub fn flush_step(&mut self) {
        let file = self.rng.random_range(0..self.files.all.len());
        // Sealed elsewhere, and given up before the seal came here.
        let given_up = self.rng.random_bool(0.3);
        let f = &mut self.files.all[file];
        match f.flush.clone() {
            Flush::None if f.size > 0 && f.view.cuts.is_empty() && given_up => {
                f.unsealed = Some(f.generation);
                f.generation = f.generation.next();
            }
            Flush::None if f.size > 0 && f.view.cuts.is_empty() => {
                f.unsealed = None;
                // No write of g may be acked once the seal is answered; the model is frozen then.
                f.flush = Flush::Sealing;
                f.sealed = f.generation;
                let items = vec![seal_item(f.inode, f.generation)];
                self.control(&Control::Seal(MapVersion(1), items), What::Seal(file));
            }
            Flush::Sealed(bytes) if !f.quiet => {
                if self.rng.random_bool(0.2) {
                    self.files.all[file].flush = Flush::Ending;
                    let f = &self.files.all[file];
                    let items = vec![(f.inode, f.sealed)];
                    self.control(&Control::FlushAborted(MapVersion(1), items), What::Abort(file));
                    return;
                }
                let item = PutObject {
                    inode: f.inode,
                    generation: f.sealed,
                    grant: f.meta_grant(),
                    key: format!("f{file}-{}", f.sealed),
                    size: bytes.len() as u64,
                    metadata: Vec::new(),
                    condition: PutCondition::None,
                };
                f.quiet = true;
                self.control(&Control::PutObjects(vec![item]), What::Put { file });
            }
            Flush::Stored(bytes, etag) => {
                // FlushCommit: a new view, then FlushDone to the core.
                let old = f.view.clone();
                f.previous = Some((old.clone(), f.generation));
                let length = bytes.len() as u64;
                f.view.version = ViewVersion(old.version.0 + 1);
                f.view.content = ContentId(old.content.0 + 1000);
                f.view.clean_generation = f.sealed;
                f.view.cuts.clear();
                f.view.backing = Some(Backing {
                    key: format!("f{file}-{}", f.sealed),
                    etag,
                    length,
                    limit: length,
                });
                f.flush = Flush::Ending;
                let done = FlushDone {
                    inode: f.inode,
                    generation: f.sealed,
                    content: f.view.content,
                    old_content: old.content,
                    valid_bytes: length,
                    old_valid_bytes: old.backing.map_or(0, |b| b.valid_bytes()),
                };
                self.control(&Control::FlushDone(MapVersion(1), vec![done]), What::FlushDone(file));
            }
            _ => {}
        }
    }

    /// Truncates some file: the command commits, then the core learns the view from a client or by
    /// ApplyViews, whichever is first.
    pub fn cut_step(&mut self) {
        let file = self.rng.random_range(0..self.files.all.len());
        let f = &self.files.all[file];
        // Requests under way would see the model change under them.
        if !f.busy.is_empty() || f.quiet || f.flush != Flush::None || f.view.cuts.len() >= 8 {
            return;
        }
        let at = self.rng.random_range(0..=f.size);
        let f = &mut self.files.all[file];
        f.view.cuts.push(Cut { generation: f.generation, at });
        f.view.version = ViewVersion(f.view.version.0 + 1);
        f.generation = f.generation.next();
        f.unsealed = None;
        f.size = at;
        f.model[at as usize..].fill(0);
        f.acked.clear();
        if let Some(b) = f.view.backing.as_mut() {
            b.limit = b.limit.min(at);
        }
        self.tally.cuts += 1;
        let grant = self.files.all[file].meta_grant();
        let version = self.files.all[file].view.version;
        self.control(&Control::ApplyViews(vec![grant]), What::Cut(file, version));
    }

    pub fn evict_step(&mut self) {
        self.control(&Control::EvictClean(vec![]), What::Evict);
    }

    /// The node crashed before it answered.
    pub fn ask_again(&mut self, o: Outstanding) {
        match o.what {
            What::Write(w) => self.send_write(Write { asked_again: true, ..w }, false),
            What::Duplicate(w) => {
                let _ = w;
            }
            What::Read { file, at, expected } => self.send_read(file, at, expected, o.session),
            What::Present | What::Evict | What::OldRead { .. } => {}
            What::Seal(file) => {
                let f = &self.files.all[file];
                let items = vec![seal_item(f.inode, f.sealed)];
                self.control(&Control::Seal(MapVersion(1), items), What::Seal(file));
            }
            What::Put { file } => self.files.all[file].quiet = false,
            What::FlushDone(file) => {
                // Without its old content the bytes are fetched again: allowed, so do that.
                let f = &self.files.all[file];
                let length = f.view.backing.as_ref().map_or(0, |b| b.length);
                let done = FlushDone {
                    inode: f.inode,
                    generation: f.sealed,
                    content: f.view.content,
                    old_content: ContentId(u64::MAX),
                    valid_bytes: length,
                    old_valid_bytes: 0,
                };
                self.control(&Control::FlushDone(MapVersion(1), vec![done]), What::FlushDone(file));
            }
            What::Abort(file) => {
                let f = &self.files.all[file];
                let items = vec![(f.inode, f.sealed)];
                self.control(&Control::FlushAborted(MapVersion(1), items), What::Abort(file));
            }
            What::Cut(file, _) => {
                let grant = self.files.all[file].meta_grant();
                let version = self.files.all[file].view.version;
                self.control(&Control::ApplyViews(vec![grant]), What::Cut(file, version));
            }
        }
    }

    pub fn answer(&mut self, o: Outstanding, status: Status, reply: Reply<Slot>) {
        self.trace(|| format!("{status:?} <- {}", o.what.line()));
        match o.what {
            What::Present => {
                assert!(
                    matches!(status, Status::Ok | Status::StaleView | Status::Busy),
                    "{status:?}"
                );
            }
            What::Write(w) => self.write_answered(w, status, &reply),
            What::Duplicate(w) => {
                self.files.all[w.file].unlock(write_range(&w));
                match status {
                    Status::Ok => {
                        assert_eq!(tag_of(&reply), w.generation, "another tag than the first time");
                        self.tally.duplicates += 1;
                    }
                    Status::NeedGrant => self.present(w.file, w.session),
                    Status::StaleView
                    | Status::StaleGeneration
                    | Status::Busy
                    | Status::NoSpace => {}
                    other => panic!("a duplicate: {other:?}"),
                }
            }
            What::OldRead { file, at, expected } => {
                self.files.all[file].unlock(at..at + expected.len() as u64);
                if status == Status::Ok {
                    self.tally.old_reads += 1;
                    self.check_read(file, at, &expected, &reply);
                }
            }
            What::Read { file, at, expected } => {
                self.files.all[file].unlock(at..at + expected.len() as u64);
                match status {
                    Status::Ok => self.check_read(file, at, &expected, &reply),
                    Status::NeedGrant => self.present(file, o.session),
                    Status::Busy | Status::StaleView | Status::BackingChanged => {}
                    other => panic!("a read: {other:?}"),
                }
            }
            _ => {
                assert_eq!(status, Status::Ok, "{:?}", o.what);
                let answer = codec::decode::<ControlReply>(&reply.body).expect("a reply");
                self.control_answered(o.what, answer);
            }
        }
    }

    fn write_answered(&mut self, mut w: Write, status: Status, reply: &Reply<Slot>) {
        let range = write_range(&w);
        self.files.all[w.file].unlock(range.clone());
        match status {
            Status::Ok => {
                self.tally.acked += 1;
                let f = &mut self.files.all[w.file];
                f.model[range.start as usize..range.end as usize].copy_from_slice(&w.data);
                f.size = f.size.max(range.end);
                w.generation = tag_of(reply);
                // Asked again after a crash it may have been taken long ago, under an older tag.
                if !w.asked_again {
                    assert!(w.generation >= w.least, "{} after {}", w.generation, w.least);
                }
                f.highest = f.highest.max(w.generation);
                f.acked.push(w);
                let excess = f.acked.len().saturating_sub(20);
                f.acked.drain(..excess);
            }
            // The client presents and sends again, sooner or later; giving up is right too, since
            // nothing was acked. A write that may have been applied is sent until it is answered.
            Status::NeedGrant => {
                self.tally.refused += 1;
                self.retries.push(w);
            }
            Status::Busy | Status::StaleGeneration | Status::StaleView | Status::NoSpace => {
                self.tally.refused += 1;
                if status != Status::NoSpace {
                    self.retries.push(w);
                }
            }
            other => panic!("a write: {other:?}"),
        }
    }

    fn check_read(&mut self, file: usize, at: u64, expected: &[u8], reply: &Reply<Slot>) {
        self.tally.reads += 1;
        let mut bytes = Vec::new();
        for piece in &reply.payload {
            match piece {
                Piece::Buf(buf, range) => bytes.extend_from_slice(&buf.bytes()[range.clone()]),
                Piece::Shared(buf, range) => bytes.extend_from_slice(&buf.bytes()[range.clone()]),
                Piece::Zeros(n) => bytes.resize(bytes.len() + n, 0),
            }
        }
        let crcs = decode_checksums(&reply.body).expect("checksums");
        for (block, crc) in bytes.chunks(4096).zip(&crcs) {
            assert_eq!(crc32c(block), *crc, "a reply's checksums are its own");
        }
        let from = reply.header.chunk.start() + u64::from(reply.header.offset);
        let got = &bytes[(at - from) as usize..][..expected.len()];
        if got != expected {
            let i = got.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(0);
            let f = &self.files.all[file];
            panic!(
                "file {file} at {at}+{i} (of {}): {} instead of {}; size {} view {:?}",
                expected.len(),
                got[i],
                expected[i],
                f.size,
                f.view
            );
        }
        // What is read again comes from memory.
        let range = at..at + expected.len() as u64;
        if self.files.all[file].free(&range) && self.rng.random_bool(0.6) {
            let session = SessionId(self.rng.random_range(1..=SESSIONS));
            let expected = self.files.all[file].model[at as usize..range.end as usize].to_vec();
            self.send_read(file, at, expected, session);
        }
    }

    fn control_answered(&mut self, what: What, answer: ControlReply) {
        match (what, answer) {
            (What::Seal(file), ControlReply::Sealed(items)) => self.sealed(file, &items[0]),
            (What::Put { file }, ControlReply::Stored(outcomes)) => {
                let f = &mut self.files.all[file];
                f.quiet = false;
                let Flush::Sealed(bytes) = f.flush.clone() else { panic!("not sealed") };
                match &outcomes[0] {
                    StoreOutcome::Stored { etag } => {
                        let stored = &self.s3[&format!("f{file}-{}", f.sealed)].body;
                        assert!(
                            f.is_sealed(&bytes, stored),
                            "file {file}: the object is not generation {}",
                            f.sealed
                        );
                        f.flush = Flush::Stored(bytes, etag.clone());
                        self.tally.flushed += 1;
                    }
                    other => panic!("{other:?}"),
                }
            }
            (What::FlushDone(file), ControlReply::Done) => {
                self.files.all[file].flush = Flush::None;
            }
            (What::Abort(file), ControlReply::Done) => {
                self.files.all[file].flush = Flush::None;
                self.tally.aborted += 1;
            }
            // Acked by every primary: it leaves the view. A seal waits for that.
            (What::Cut(file, version), ControlReply::Done) => {
                let f = &mut self.files.all[file];
                if f.view.version == version {
                    f.view.cuts.clear();
                }
            }
            (What::Evict, ControlReply::Done) => {}
            (what, answer) => panic!("{what:?}: {answer:?}"),
        }
    }

    fn sealed(&mut self, file: usize, item: &SealedItem) {
        let unanswered = self.requests.values().filter_map(|o| match &o.what {
            What::Write(w) => Some(w),
            _ => None,
        });
        let maybe: Vec<Write> =
            unanswered.chain(&self.retries).filter(|w| w.file == file).cloned().collect();
        let end = maybe.iter().map(|w| write_range(w).end).max().unwrap_or(0);
        let f = &mut self.files.all[file];
        assert_eq!(f.flush, Flush::Sealing);
        let end = end.max(f.size);
        f.maybe = maybe;
        // Every write of g is acked or refused by now: acks leave in order, before this answer.
        assert!(item.high_water <= end, "{item:?} of {end}");
        for e in &item.extents {
            assert!(
                e.start < e.end && e.end <= end.next_multiple_of(4096),
                "{item:?} of {}",
                f.size
            );
        }
        f.flush = Flush::Sealed(f.model[..f.size as usize].to_vec());
        f.generation = f.generation.next();
        f.acked.clear();
        f.view.version = ViewVersion(f.view.version.0);
    }

    /// Reads a whole file, presenting first, until it is answered.
    pub fn check_file(&mut self, file: usize) {
        let session = SessionId(1);
        self.present(file, session);
        let mut at = 0;
        while at < FILE_MAX {
            let end = (at + 500_000).min(FILE_MAX).min((at / CHUNK + 1) * CHUNK);
            let before = self.tally.reads;
            for _ in 0..200 {
                let expected = self.files.all[file].model[at as usize..end as usize].to_vec();
                self.send_read(file, at, expected, session);
                self.settle();
                if self.tally.reads > before {
                    break;
                }
            }
            assert!(self.tally.reads > before, "file {file} at {at} is never answered");
            at = end;
        }
    }
}
