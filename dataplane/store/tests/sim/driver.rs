//! The driver: a random workload against a store, with random completion points, crashes and reopenings.

use super::disk::{Disk, Faults};
use super::model::{Block, Op, State, block_start};
use super::oracle::{CHUNKS, Check, Object, compare, ensure, read_piece};
use ebb_dataplane_protocol::control::FlushDone;
use ebb_dataplane_protocol::*;
use ebb_store::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const CLUSTER: ClusterId = ClusterId(0xebb);
const PGS: u16 = 4;
const FILES: usize = 4;

/// A rule of the caller that is broken on purpose: each must be caught.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    Nothing,
    /// Acks before the journal write is durable.
    AckEarly,
    /// Journal without the fdatasync that a batch asks for.
    SkipDataSync,
    /// Commits a write before its data is written.
    CommitBeforeData,
    /// Reads after giving the guard back.
    ReleaseEarly,
    /// Superblocks without the sync before them.
    SkipCheckpointSync,
    /// Superblocks all at once, not durable one after another.
    SuperblocksUnordered,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub writes: u64,
    pub batches: u64,
    pub reads: u64,
    pub seals: u64,
    pub flushes: u64,
    pub aborts: u64,
    pub cuts: u64,
    pub fills: u64,
    pub evictions: u64,
    pub drops: u64,
    pub freezes: u64,
    pub checkpoints: u64,
    pub refused: u64,
    pub no_space: u64,
    pub reopened: u64,
    pub in_flight_kept: u64,
    pub in_flight_lost: u64,
    pub faults: Faults,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, o: Self) {
        self.writes += o.writes;
        self.batches += o.batches;
        self.reads += o.reads;
        self.seals += o.seals;
        self.flushes += o.flushes;
        self.aborts += o.aborts;
        self.cuts += o.cuts;
        self.fills += o.fills;
        self.evictions += o.evictions;
        self.drops += o.drops;
        self.freezes += o.freezes;
        self.checkpoints += o.checkpoints;
        self.refused += o.refused;
        self.no_space += o.no_space;
        self.reopened += o.reopened;
        self.in_flight_kept += o.in_flight_kept;
        self.in_flight_lost += o.in_flight_lost;
        self.faults += o.faults;
    }
}

enum Phase {
    Sealing,
    Sealed { object: Object, content: ContentId, old_valid: u64, limit: u64 },
    Committed { done: FlushDone, sent: Option<Ticket> },
    Aborting { sent: Option<Ticket> },
}

/// A file as the metadata plane knows it: survives every crash.
struct File {
    inode: InodeId,
    generation: Generation,
    content: ContentId,
    contents: u64,
    valid: u64,
    version: ViewVersion,
    cuts: Vec<Cut>,
    flush: Option<(Generation, Phase)>,
}

struct Plan {
    plan: WritePlan,
    op: WriteOp,
    payload: Vec<u8>,
    buffer: Option<Vec<u8>>,
    expected: Vec<Block>,
    left: Vec<PlannedWrite>,
}

struct FillPlanned {
    plan: FillPlan,
    bytes: Vec<u8>,
    left: Vec<PlannedWrite>,
}

struct OpenRead {
    plan: ReadPlan,
    expected: Vec<Expected>,
    released: bool,
}

enum Expected {
    Dirty(Block),
    Hole,
    Base(Vec<u8>),
}

#[derive(Default)]
struct Client {
    next: u64,
    /// Begun and not acked.
    open: BTreeSet<u64>,
    /// Lost by a crash: to be sent again.
    retry: Vec<u64>,
}

enum BatchState {
    Taken,
    Synced,
}

pub struct World {
    rng: StdRng,
    pub disk: Disk,
    pub store: Store,
    rule: Break,
    durable: State,
    head: State,
    log: VecDeque<(Ticket, Op)>,
    durable_ticket: Ticket,
    batch: Option<(JournalBatch, Ticket, BatchState)>,
    plans: Vec<Plan>,
    fills: Vec<FillPlanned>,
    reads: Vec<OpenRead>,
    files: Vec<File>,
    gone: Vec<InodeId>,
    all: Vec<InodeId>,
    objects: BTreeMap<(InodeId, ContentId), Object>,
    clients: Vec<Client>,
    step: Option<(CheckpointToken, Option<(u64, Vec<u8>)>)>,
    counter: u64,
    /// Mostly large writes: the device fills up.
    heavy: bool,
    pub counts: Counts,
}

fn geometry(rng: &mut StdRng) -> Geometry {
    Geometry {
        device_bytes: (5 << 20) + if rng.random_bool(0.5) { 4 << 20 } else { 8 << 20 },
        journal_bytes: 1 << 20,
        checkpoint_bytes: 256 << 10,
    }
}

impl World {
    pub fn new(seed: u64, rule: Break) -> Result<Self, String> {
        let mut rng = StdRng::seed_from_u64(seed);
        let geometry = geometry(&mut rng);
        let mut disk = Disk::new(geometry.device_bytes, &mut rng);
        let identity = Identity {
            cluster: CLUSTER,
            store: rng.random(),
            node: NodeId(0),
            core: CoreId(0),
            pg_count: PGS,
        };
        format_device(&mut disk, geometry, identity).map_err(|e| e.to_string())?;
        let store = Store::open(&mut disk, CLUSTER).map_err(|e| e.to_string())?;
        let heavy = rng.random_bool(0.3);
        let mut world = Self {
            heavy,
            rng,
            disk,
            store,
            rule,
            durable: State::default(),
            head: State::default(),
            log: VecDeque::new(),
            durable_ticket: Ticket(0),
            batch: None,
            plans: Vec::new(),
            fills: Vec::new(),
            reads: Vec::new(),
            files: Vec::new(),
            gone: Vec::new(),
            all: Vec::new(),
            objects: BTreeMap::new(),
            clients: (0..3).map(|_| Client { next: 1, ..Client::default() }).collect(),
            step: None,
            counter: seed << 20,
            counts: Counts::default(),
        };
        (0..FILES).for_each(|_| world.create());
        Ok(world)
    }

    fn create(&mut self) {
        let inode = InodeId::new(7, Incarnation(1), self.all.len() as u64 + 2);
        self.all.push(inode);
        // Half of the files begin with an object in the bucket.
        let mut object = Object::default();
        if self.rng.random_bool(0.5) {
            object.len = self.rng.random_range(1..300_000);
            for b in 0..object.len.div_ceil(4096) as u32 {
                object.blocks.insert((0, b), self.random_block());
            }
        }
        let content = ContentId(1);
        let valid = object.len;
        self.objects.insert((inode, content), object);
        self.files.push(File {
            inode,
            generation: Generation(1),
            content,
            contents: 1,
            valid,
            version: ViewVersion(1),
            cuts: Vec::new(),
            flush: None,
        });
    }

    fn random_bytes(&mut self, len: usize) -> Vec<u8> {
        self.counter += 1;
        let mut x = self.counter.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            out.extend_from_slice(&x.to_le_bytes());
        }
        out.truncate(len);
        out
    }
    fn random_block(&mut self) -> Block {
        self.random_bytes(4096).into()
    }

    /// Runs `steps` random steps.
    pub fn run(&mut self, steps: u32) -> Check {
        for _ in 0..steps {
            match self.rng.random_range(0..100) {
                0..20 => self.begin_write()?,
                20..42 => self.progress()?,
                42..54 => self.take_batch()?,
                54..74 => self.complete_batch()?,
                74..81 => self.flush()?,
                81..82 => self.truncate(),
                82..86 => self.read()?,
                86..89 => self.fill()?,
                89..90 => self.evict()?,
                90..92 => self.odds_and_ends()?,
                _ => self.checkpoint()?,
            }
        }
        Ok(())
    }

    // --- views --------------------------------------------------------------------------------------

    /// Presents the file's view; true: it is durable (or nothing is known of the inode).
    fn present(&mut self, f: usize) -> Result<bool, String> {
        let file = &self.files[f];
        let (inode, version) = (file.inode, file.version);
        let (known, durable) = self.store.view_version(inode);
        if known >= version {
            return Ok(durable);
        }
        let view = ViewUpdate {
            inode,
            version,
            base: BaseView { content: file.content, valid_bytes: file.valid },
            cuts: file.cuts.clone(),
        };
        match self.store.apply_view(&view) {
            Ok(Some(t)) => {
                self.logged(t, Op::View(view));
                Ok(false)
            }
            Ok(None) => Ok(true),
            Err(ControlError::Wait(_)) => Ok(false),
            Err(e) => Err(format!("apply_view: {e}")),
        }
    }

    fn logged(&mut self, ticket: Ticket, op: Op) {
        self.head.apply(&op);
        self.log.push_back((ticket, op));
    }

    fn control(
        &mut self,
        r: Result<Option<Ticket>, ControlError>,
        op: Op,
    ) -> Result<Option<Ticket>, String> {
        match r {
            Ok(Some(t)) => {
                self.logged(t, op);
                Ok(Some(t))
            }
            Ok(None) | Err(ControlError::Wait(_)) => Ok(None),
            Err(e) => Err(format!("{op:?}: {e}")),
        }
    }

    // --- writes -------------------------------------------------------------------------------------

    fn begin_write(&mut self) -> Check {
        let f = self.rng.random_range(0..self.files.len());
        self.present(f)?;
        let (version, _) = self.store.view_version(self.files[f].inode);
        if version < self.files[f].version && !self.files[f].cuts.is_empty() {
            return Ok(());
        }
        let file = &self.files[f];
        let base = BaseView { content: file.content, valid_bytes: file.valid };
        let (inode, current) = (file.inode, file.generation);
        let stale = self.rng.random_bool(0.08) && current.0 > 0;
        let generation = if stale { Generation(current.0 - 1) } else { current };
        let chunk = CHUNKS[self.rng.random_range(0..CHUNKS.len())];
        let kinds = if self.heavy { 3..13 } else { 0..10 };
        let len = match self.rng.random_range(kinds) {
            0..4 => self.rng.random_range(1..5000),
            4..6 => 4096 * self.rng.random_range(1..9),
            6..8 => self.rng.random_range(1..=INLINE_BYTES_MAX),
            8 => self.rng.random_range(INLINE_BYTES_MAX..200_000),
            _ => 4096 * self.rng.random_range(9..200),
        };
        let reach = [40_000, 400_000, CHUNK_BYTES][self.rng.random_range(0..3)];
        let mut offset = self.rng.random_range(0..reach.max(len + 1) - len);
        if self.rng.random_bool(0.4) {
            offset = offset / 4096 * 4096;
        }
        let c = self.rng.random_range(0..self.clients.len());
        let session = SessionId(c as u64 + 1);
        let client = &mut self.clients[c];
        let sequence = match self.rng.random_range(0..10) {
            0..4 if !client.retry.is_empty() => client.retry[0],
            0 => self.rng.random_range(1..=client.next),
            _ => client.next,
        };
        let below = client.open.first().copied().unwrap_or(client.next).min(client.next);
        let op = WriteOp {
            inode,
            chunk: ChunkIndex(chunk),
            offset,
            len,
            generation,
            session,
            sequence: Sequence(sequence),
            answered_below: Sequence(below.min(sequence)),
            base,
        };
        let floor = self.head.inodes.get(&inode).map_or(Generation(0), |i| i.floor);
        let pg = PgId::of_chunk(inode, op.chunk, PGS).0;
        let plan = match self.store.begin_write(&op) {
            Ok(plan) => plan,
            Err(e) => {
                self.counts.refused += 1;
                match e {
                    WriteError::Duplicate => {
                        ensure(self.durable.applied(session, sequence), || {
                            "an unapplied write is answered as done".into()
                        })?;
                        self.clients[c].retry.retain(|s| *s != sequence);
                        self.clients[c].open.remove(&sequence);
                    }
                    WriteError::StaleGeneration { floor: said } => {
                        ensure(said == floor && generation < floor, || "wrong floor".into())?;
                    }
                    WriteError::Frozen { .. } => {
                        ensure(self.head.frozen.contains_key(&pg), || "not frozen".into())?;
                    }
                    WriteError::NoSpace { evictable, .. } => {
                        self.counts.no_space += 1;
                        if evictable > 0 {
                            self.evict()?;
                        }
                    }
                    WriteError::Wait(_) => {}
                    other => return Err(format!("begin_write: {other}")),
                }
                return Ok(());
            }
        };
        ensure(generation >= floor, || "a write below the floor was accepted".into())?;
        ensure(!self.head.frozen.contains_key(&pg), || "a write to a frozen group".into())?;
        ensure(!self.durable.applied(session, sequence), || "a duplicate was accepted".into())?;
        let client = &mut self.clients[c];
        client.next = client.next.max(sequence + 1);
        client.open.insert(sequence);
        client.retry.retain(|s| *s != sequence);
        let payload = self.random_bytes(len as usize);
        // What the blocks must become, by the model alone.
        let object = &self.objects[&(inode, base.content)];
        let dirty = self.head.inodes.get(&inode).map(|i| &i.dirty);
        let mut bytes = Vec::new();
        for b in plan.first_block..plan.first_block + plan.blocks {
            match dirty.and_then(|d| d.get(&(chunk, b))) {
                Some((_, d)) => bytes.extend_from_slice(d),
                None => bytes.extend(object.block((chunk, b), base.valid_bytes)),
            }
        }
        bytes[offset as usize % 4096..][..payload.len()].copy_from_slice(&payload);
        let expected = bytes.chunks(4096).map(Block::from).collect();
        let left = plan.writes.clone();
        self.plans.push(Plan { plan, op, payload, buffer: None, expected, left });
        Ok(())
    }

    /// One step of one plan: resolve its edges, write one piece, or commit.
    fn progress(&mut self) -> Check {
        if !self.fills.is_empty() && self.rng.random_bool(0.2) {
            return self.progress_fill();
        }
        if self.plans.is_empty() {
            return Ok(());
        }
        let i = self.rng.random_range(0..self.plans.len());
        if self.plans[i].buffer.is_none() {
            let p = &self.plans[i];
            let buffer = self.resolve(&p.plan, &p.op, &p.payload)?;
            for (k, b) in buffer.chunks(4096).enumerate() {
                ensure(*b == *self.plans[i].expected[k], || {
                    format!("block {} is merged wrongly", self.plans[i].plan.first_block + k as u32)
                })?;
            }
            self.plans[i].buffer = Some(buffer);
            return Ok(());
        }
        let early = self.rule == Break::CommitBeforeData && self.rng.random_bool(0.2);
        if !self.plans[i].left.is_empty() && !early {
            let k = self.rng.random_range(0..self.plans[i].left.len());
            let w = self.plans[i].left.swap_remove(k);
            let p = &self.plans[i];
            let bytes = &p.buffer.as_ref().expect("resolved above")[w.range];
            self.disk.write(w.offset, bytes);
            return Ok(());
        }
        let p = self.plans.swap_remove(i);
        let id = p.plan.id;
        if self.rng.random_bool(0.05) {
            self.store.abort_write(id);
            self.clients[p.op.session.0 as usize - 1].open.remove(&p.op.sequence.0);
            return Ok(());
        }
        let buffer = p.buffer.expect("resolved above");
        let crcs: Vec<u32> = buffer.chunks(4096).map(crc32c).collect();
        let inline = if p.plan.inline { &buffer[..] } else { &[] };
        match self.store.commit_write(id, &crcs, inline) {
            Ok(ticket) => {
                self.counts.writes += 1;
                let floor = self.head.inodes.get(&p.op.inode).map_or(Generation(0), |i| i.floor);
                ensure(p.op.generation >= floor, || "a commit below the floor".into())?;
                let end = p.op.chunk.start() + u64::from(p.op.offset) + u64::from(p.op.len);
                let op = Op::Write {
                    inode: p.op.inode,
                    chunk: p.op.chunk.0,
                    first: p.plan.first_block,
                    blocks: p.expected,
                    end,
                    generation: p.op.generation,
                    session: p.op.session,
                    sequence: p.op.sequence.0,
                    below: p.op.answered_below.0,
                };
                self.logged(ticket, op);
            }
            Err(
                WriteError::StaleGeneration { .. }
                | WriteError::Frozen { .. }
                | WriteError::Dropped,
            ) => {
                self.counts.refused += 1;
                self.clients[p.op.session.0 as usize - 1].open.remove(&p.op.sequence.0);
            }
            Err(e) => return Err(format!("commit_write: {e}")),
        }
        Ok(())
    }

    fn resolve(&self, plan: &WritePlan, op: &WriteOp, payload: &[u8]) -> Result<Vec<u8>, String> {
        let mut buffer = vec![0xeeu8; plan.blocks as usize * 4096];
        buffer[plan.head..plan.head + payload.len()].copy_from_slice(payload);
        for e in &plan.edges {
            let old = match e.source {
                EdgeSource::Zero => vec![0u8; 4096],
                EdgeSource::Device { offset, crc, valid } => {
                    let mut b = self.disk.read(offset, 4096).to_vec();
                    ensure(crc32c(&b) == crc, || "an edge does not match its checksum".into())?;
                    b[valid as usize..].fill(0);
                    b
                }
                EdgeSource::Miss { valid } => {
                    let object = &self.objects[&(op.inode, op.base.content)];
                    let start = block_start((op.chunk.0, e.block));
                    object.block((op.chunk.0, e.block), start + u64::from(valid))
                }
            };
            for r in &e.fill {
                buffer[e.at + r.start..e.at + r.end].copy_from_slice(&old[r.clone()]);
            }
        }
        Ok(buffer)
    }

    // --- the journal ----------------------------------------------------------------------------------

    fn take_batch(&mut self) -> Check {
        if self.batch.is_some() {
            return Ok(());
        }
        let before = self.store.pending().records;
        let Some(batch) = self.store.take_batch() else { return Ok(()) };
        let taken = before - self.store.pending().records;
        let last = Ticket(self.durable_ticket.0 + taken as u64);
        self.batch = Some((batch, last, BatchState::Taken));
        if self.rule == Break::AckEarly {
            let (batch, last, _) = self.batch.take().expect("just made");
            self.disk.write(batch.offset, &batch.bytes);
            return self.finish_batch(batch.id, last);
        }
        Ok(())
    }

    fn complete_batch(&mut self) -> Check {
        let Some((batch, last, state)) = self.batch.take() else { return Ok(()) };
        match state {
            BatchState::Taken => {
                if batch.sync_data_first && self.rule != Break::SkipDataSync {
                    self.disk.sync_all();
                }
                self.batch = Some((batch, last, BatchState::Synced));
                Ok(())
            }
            BatchState::Synced => {
                self.disk.write_durable(batch.offset, &batch.bytes);
                self.finish_batch(batch.id, last)
            }
        }
    }

    fn finish_batch(&mut self, id: BatchId, last: Ticket) -> Check {
        let tickets = self.store.batch_durable(id).map_err(|e| e.to_string())?;
        ensure(tickets.last() == Some(&last), || "a batch of other tickets".into())?;
        ensure(tickets.windows(2).all(|w| w[1].0 == w[0].0 + 1), || "acks out of order".into())?;
        self.counts.batches += 1;
        self.durable_ticket = last;
        while self.log.front().is_some_and(|(t, _)| *t <= last) {
            let Some((_, op)) = self.log.pop_front() else { break };
            if let Op::Write { session, sequence, .. } = &op {
                self.clients[session.0 as usize - 1].open.remove(sequence);
            }
            self.durable.apply(&op);
        }
        Ok(())
    }

    // --- flush, cut -------------------------------------------------------------------------------------

    fn flush(&mut self) -> Check {
        // Mostly those that are waited for.
        let f = match self.files.iter().position(|f| matches!(f.flush, Some((_, Phase::Sealing)))) {
            Some(f) if self.rng.random_bool(0.6) => f,
            _ => self.rng.random_range(0..self.files.len()),
        };
        let inode = self.files[f].inode;
        let Some((g, phase)) = self.files[f].flush.take() else {
            let dirty = self.head.inodes.get(&inode).is_some_and(|i| !i.dirty.is_empty());
            if dirty || self.rng.random_bool(0.1) {
                self.files[f].flush = Some((self.files[f].generation, Phase::Sealing));
            }
            return Ok(());
        };
        let next = match phase {
            Phase::Sealing => {
                let r = self.store.seal(inode, g);
                let sealed = matches!(r, Ok(None));
                self.control(r, Op::Seal(inode, g))?;
                if sealed { Some(self.sealed(f, g)?) } else { Some(Phase::Sealing) }
            }
            Phase::Sealed { object, content, old_valid, limit } => {
                if self.rng.random_bool(0.3) {
                    // Linger: writers and truncates go on.
                    Some(Phase::Sealed { object, content, old_valid, limit })
                } else if self.rng.random_bool(0.25) {
                    self.counts.aborts += 1;
                    Some(Phase::Aborting { sent: None })
                } else {
                    let file = &mut self.files[f];
                    let valid_bytes = object.len.min(limit);
                    let done = FlushDone {
                        inode,
                        generation: g,
                        content,
                        old_content: file.content,
                        valid_bytes,
                        old_valid_bytes: old_valid,
                    };
                    self.objects.insert((inode, content), object);
                    file.content = content;
                    file.valid = valid_bytes;
                    file.version.0 += 1;
                    Some(Phase::Committed { done, sent: None })
                }
            }
            Phase::Committed { done, sent: Some(t) } if t > self.durable_ticket => {
                Some(Phase::Committed { done, sent: Some(t) })
            }
            Phase::Committed { sent: Some(_), .. } => {
                self.counts.flushes += 1;
                None
            }
            Phase::Committed { done, sent: None } => {
                let r = self.store.flush_done(&done);
                let nothing = matches!(r, Ok(None));
                let sent = self.control(r, Op::FlushDone(done))?;
                (!nothing).then_some(Phase::Committed { done, sent })
            }
            Phase::Aborting { sent: Some(t) } if t > self.durable_ticket => {
                Some(Phase::Aborting { sent: Some(t) })
            }
            Phase::Aborting { sent: Some(_) } => None,
            Phase::Aborting { sent: None } => {
                // Sometimes the abort is lost and the next seal finds the old pins.
                if self.rng.random_bool(0.2) {
                    None
                } else {
                    let r = self.store.flush_aborted(inode, g);
                    let nothing = matches!(r, Ok(None));
                    let sent = self.control(r, Op::Aborted(inode, g))?;
                    (!nothing).then_some(Phase::Aborting { sent })
                }
            }
        };
        self.files[f].flush = next.map(|p| (g, p));
        Ok(())
    }

    /// The seal is durable: build the object from the pins, and check them against the model.
    fn sealed(&mut self, f: usize, g: Generation) -> Result<Phase, String> {
        self.counts.seals += 1;
        let inode = self.files[f].inode;
        let (base, old_valid) = (self.files[f].content, self.files[f].valid);
        let model = self.durable.inodes.get(&inode).and_then(|i| i.seals.get(&g)).cloned();
        let Some((snapshot, high)) = model else {
            return Err("sealed, says the store only".into());
        };
        let sealed = self.store.sealed(inode, g).ok_or("a durable seal has no answer")?;
        ensure(sealed.high_water == high, || "high water".into())?;
        let old = &self.objects[&(inode, base)];
        let mut object = Object { len: old_valid.max(high), blocks: BTreeMap::new() };
        let view = BaseView { content: base, valid_bytes: old_valid };
        for chunk in CHUNKS {
            let plan = self
                .store
                .plan_read_pinned(inode, g, ChunkIndex(chunk), 0..CHUNK_BLOCKS, view)
                .ok_or("sealed and not readable")?;
            for p in &plan.pieces {
                let bytes = match p.source {
                    PieceSource::Device { .. } => Some(read_piece(&self.disk, &p.source)?),
                    _ => None,
                };
                for (i, b) in p.blocks.clone().enumerate() {
                    let want = snapshot
                        .get(&(chunk, b))
                        .map_or_else(|| old.block((chunk, b), old_valid), |b| b.to_vec());
                    let got = match (&bytes, &p.source) {
                        (Some(v), _) => v[i].clone(),
                        (_, PieceSource::Miss) => old.block((chunk, b), old_valid),
                        _ => vec![0; 4096],
                    };
                    ensure(got == want, || format!("pinned block {b} of chunk {chunk} is wrong"))?;
                    if want.iter().any(|b| *b != 0) {
                        object.blocks.insert((chunk, b), want.into());
                    }
                }
            }
            if let Some(guard) = plan.guard {
                self.store.release(guard);
            }
        }
        let file = &mut self.files[f];
        file.generation = file.generation.max(g.next());
        file.contents += 1;
        Ok(Phase::Sealed { object, content: ContentId(file.contents), old_valid, limit: u64::MAX })
    }

    fn truncate(&mut self) {
        let f = self.rng.random_range(0..self.files.len());
        let at = match self.rng.random_range(0..3) {
            0 => 0,
            1 => self.rng.random_range(0..100_000),
            _ => {
                block_start((CHUNKS[self.rng.random_range(0..3)], 0))
                    + self.rng.random_range(0..500_000)
            }
        };
        let inode = self.files[f].inode;
        let acked = self.durable.inodes.get(&inode).map_or(ViewVersion(0), |i| i.view);
        let file = &mut self.files[f];
        if matches!(file.flush, Some((_, Phase::Sealing))) {
            return;
        }
        // Cuts go once the primary acked them; sometimes they linger.
        if acked >= file.version && self.rng.random_bool(0.5) {
            file.cuts.clear();
        }
        if file.cuts.len() == 8 {
            return;
        }
        file.cuts.push(Cut { generation: file.generation, at });
        file.generation.0 += 1;
        file.valid = file.valid.min(at);
        file.version.0 += 1;
        if let Some((_, Phase::Sealed { limit, .. })) = &mut file.flush {
            *limit = (*limit).min(at);
        }
        self.counts.cuts += 1;
    }

    // --- reads, fills, space -------------------------------------------------------------------------------

    fn read(&mut self) -> Check {
        if !self.reads.is_empty() && self.rng.random_bool(0.5) {
            let i = self.rng.random_range(0..self.reads.len());
            let r = self.reads.swap_remove(i);
            return self.finish_read(r);
        }
        let f = self.rng.random_range(0..self.files.len());
        if !self.present(f)? {
            return Ok(());
        }
        let file = &self.files[f];
        let (inode, base) =
            (file.inode, BaseView { content: file.content, valid_bytes: file.valid });
        let chunk = CHUNKS[self.rng.random_range(0..CHUNKS.len())];
        let first = self.rng.random_range(0..100);
        let end = first + self.rng.random_range(1..100);
        let plan = self.store.plan_read(inode, ChunkIndex(chunk), first..end, base);
        let object = &self.objects[&(inode, base.content)];
        let dirty = self.durable.inodes.get(&inode).map(|i| &i.dirty);
        let expected = (first..end)
            .map(|b| match dirty.and_then(|d| d.get(&(chunk, b))) {
                Some((_, d)) => Expected::Dirty(d.clone()),
                None if block_start((chunk, b)) >= base.valid_bytes => Expected::Hole,
                None => Expected::Base(object.block((chunk, b), base.valid_bytes)),
            })
            .collect();
        let mut read = OpenRead { plan, expected, released: false };
        if self.rule == Break::ReleaseEarly
            && let Some(g) = read.plan.guard.take()
        {
            self.store.release(g);
            read.released = true;
        }
        if self.reads.len() < 4 {
            self.reads.push(read)
        } else {
            self.finish_read(read)?
        }
        Ok(())
    }

    fn finish_read(&mut self, r: OpenRead) -> Check {
        self.counts.reads += 1;
        let mut expected = r.expected.iter();
        for p in &r.plan.pieces {
            let bytes = match &p.source {
                PieceSource::Device { .. } => Some(read_piece(&self.disk, &p.source)?),
                _ => None,
            };
            for (i, b) in p.blocks.clone().enumerate() {
                let ok = match (&p.source, expected.next()) {
                    (PieceSource::Device { dirty: true, .. }, Some(Expected::Dirty(d))) => {
                        bytes.as_ref().is_some_and(|v| v[i][..] == d[..])
                    }
                    (PieceSource::Device { dirty: false, .. }, Some(Expected::Base(d))) => {
                        bytes.as_ref().is_some_and(|v| v[i] == *d)
                    }
                    (PieceSource::Zero, Some(Expected::Hole))
                    | (PieceSource::Miss, Some(Expected::Base(_))) => true,
                    _ => false,
                };
                ensure(ok, || format!("read of block {b} is wrong ({:?})", p.blocks))?;
            }
        }
        ensure(expected.next().is_none(), || "a read left blocks out".into())?;
        assert!(r.plan.guard.is_none() || !r.released);
        if let Some(g) = r.plan.guard {
            self.store.release(g);
        }
        Ok(())
    }

    fn fill(&mut self) -> Check {
        let f = self.rng.random_range(0..self.files.len());
        if !self.present(f)? {
            return Ok(());
        }
        let file = &self.files[f];
        let (inode, content, valid) = (file.inode, file.content, file.valid);
        let chunk = CHUNKS[self.rng.random_range(0..CHUNKS.len())];
        let base = BaseView { content, valid_bytes: valid };
        let plan = self.store.plan_read(inode, ChunkIndex(chunk), 0..CHUNK_BLOCKS, base);
        if let Some(g) = plan.guard {
            self.store.release(g);
        }
        let Some(miss) = plan.pieces.iter().find(|p| p.source == PieceSource::Miss) else {
            return Ok(());
        };
        let first = miss.blocks.start;
        let blocks = (miss.blocks.end - first).min(self.rng.random_range(1..64));
        let last = block_start((chunk, first + blocks - 1));
        let op = FillOp {
            inode,
            chunk: ChunkIndex(chunk),
            first_block: first,
            blocks,
            content,
            tail_valid: (valid - last).min(4096) as u32,
        };
        let plan = match self.store.begin_fill(&op) {
            Ok(plan) => plan,
            Err(WriteError::NoSpace { .. }) => return self.evict(),
            Err(WriteError::Wait(_) | WriteError::Frozen { .. }) => return Ok(()),
            Err(e) => return Err(format!("begin_fill: {e}")),
        };
        let object = &self.objects[&(inode, content)];
        let bytes: Vec<u8> =
            (first..first + blocks).flat_map(|b| object.block((chunk, b), valid)).collect();
        let left = plan.writes.clone();
        self.fills.push(FillPlanned { plan, bytes, left });
        Ok(())
    }

    fn progress_fill(&mut self) -> Check {
        let i = self.rng.random_range(0..self.fills.len());
        if let Some(w) = self.fills[i].left.pop() {
            self.disk.write(w.offset, &self.fills[i].bytes[w.range]);
            return Ok(());
        }
        let f = self.fills.swap_remove(i);
        if self.rng.random_bool(0.1) {
            self.store.abort_fill(f.plan.id);
            return Ok(());
        }
        let crcs: Vec<u32> = f.bytes.chunks(4096).map(crc32c).collect();
        match self.store.commit_fill(f.plan.id, &crcs) {
            Ok(_) => self.counts.fills += 1,
            Err(WriteError::Dropped) => {}
            Err(e) => return Err(format!("commit_fill: {e}")),
        }
        Ok(())
    }

    fn evict(&mut self) -> Check {
        let r = if self.rng.random_bool(0.1) {
            self.store.evict_clean(&[self.files[0].inode]).map(|_| None)
        } else {
            self.store.evict(self.rng.random_range(1..500_000))
        };
        match r {
            Ok(Some(_)) => self.counts.evictions += 1,
            Ok(None) | Err(ControlError::Wait(_)) => {}
            Err(e) => return Err(format!("evict: {e}")),
        }
        Ok(())
    }

    fn odds_and_ends(&mut self) -> Check {
        let pg = self.rng.random_range(0..PGS);
        let epoch = PgEpoch(self.rng.random_range(1..4));
        match self.rng.random_range(0..12) {
            0..2 => {
                self.counts.freezes += 1;
                let r = self.store.freeze(PgId(pg), epoch);
                self.control(r, Op::Frozen(pg, Some(epoch)))?;
            }
            2..7 => {
                let frozen = self.head.frozen.iter().next().map(|(p, e)| (*p, *e));
                let (pg, epoch) = frozen.unwrap_or((pg, epoch));
                let r = self.store.thaw(PgId(pg), epoch);
                self.control(r, Op::Thaw(pg, epoch))?;
            }
            7 => match self.store.release_pg(PgId(pg), epoch) {
                Err(ControlError::StillDirty { .. }) => {}
                r => {
                    self.control(r, Op::Frozen(pg, None))?;
                    // Until it is durable the group counts as frozen: the model does not know; wait.
                    while self.store.frozen(PgId(pg)).is_some() && self.store.pending().records > 0
                        || self.batch.is_some()
                    {
                        self.complete_batch()?;
                        self.take_batch()?;
                        if self.batch.is_none() {
                            self.checkpoint()?;
                        }
                    }
                }
            },
            8 => {
                let f = self.rng.random_range(0..self.files.len());
                let file = &self.files[f];
                if file.flush.is_none() {
                    // A fence: the session that wrote it expired.
                    let (inode, floor) = (file.inode, file.generation.next());
                    let fresh = self.head.inodes.get(&inode).is_none_or(|i| i.floor < floor);
                    let r = self.store.set_floor(inode, floor);
                    if fresh && self.control(r, Op::Floor(inode, floor))?.is_some() {
                        self.files[f].generation = floor;
                    }
                }
            }
            9 if self.rng.random_bool(0.05) => {
                let c = self.rng.random_range(0..self.clients.len());
                let session = SessionId(c as u64 + 1);
                if self.clients[c].open.is_empty() && self.clients[c].retry.is_empty() {
                    let r = self.store.drop_session(session);
                    self.control(r, Op::SessionGone(session))?;
                }
            }
            9 => {
                let c = self.rng.random_range(0..self.clients.len());
                let below = self.clients[c].open.first().copied().unwrap_or(self.clients[c].next);
                let session = SessionId(c as u64 + 1);
                let below = self.clients[c].retry.iter().copied().min().unwrap_or(below).min(below);
                let r = self.store.trim_session(session, Sequence(below));
                self.control(r, Op::Trim(session, below))?;
            }
            10 => {
                let node = NodeId(self.rng.random_range(1..5));
                let r = self.store.set_node(node);
                self.control(r, Op::Node(node))?;
            }
            _ => {
                if self.all.len() < 12 {
                    let f = self.rng.random_range(0..self.files.len());
                    self.gone.push(self.files[f].inode);
                    self.files.swap_remove(f);
                    self.create();
                    self.counts.drops += 1;
                }
            }
        }
        // The metadata plane repeats a drop until it is answered.
        for inode in self.gone.clone() {
            if self.rng.random_bool(0.5) {
                let r = self.store.drop_inode(inode);
                self.control(r, Op::Drop(inode))?;
            }
        }
        Ok(())
    }

    // --- checkpoint -----------------------------------------------------------------------------------------

    fn checkpoint(&mut self) -> Check {
        if let Some((token, write)) = self.step.take() {
            if let Some((offset, bytes)) = write {
                if self.rule == Break::SuperblocksUnordered {
                    self.disk.write(offset, &bytes);
                } else {
                    self.disk.write_durable(offset, &bytes);
                }
            }
            return self.store.checkpoint_done(token).map_err(|e| e.to_string());
        }
        if self.store.checkpoint_due() || self.rng.random_bool(0.005) {
            self.store.begin_checkpoint();
        }
        match self.store.checkpoint_step() {
            CheckpointStep::Idle | CheckpointStep::Wait => {}
            CheckpointStep::Relocate { token, moves } => {
                for m in moves {
                    let bytes = self.disk.read(m.from, m.bytes as usize);
                    self.disk.write(m.to, &bytes);
                }
                self.step = Some((token, None));
            }
            CheckpointStep::Write { token, offset, bytes } => {
                self.disk.write(offset, &bytes);
                self.step = Some((token, None));
            }
            CheckpointStep::Sync { token } => {
                if self.rule != Break::SkipCheckpointSync {
                    self.disk.sync_all();
                }
                self.step = Some((token, None));
            }
            CheckpointStep::WriteDurable { token, offset, bytes } => {
                self.step = Some((token, Some((offset, bytes.to_vec()))));
            }
        }
        Ok(())
    }

    // --- the end of a life ------------------------------------------------------------------------------------

    fn forget_process(&mut self) {
        self.counts.checkpoints += self.store.stats().checkpoints;
        self.plans.clear();
        self.fills.clear();
        self.reads.clear();
        self.log.clear();
        self.step = None;
        self.durable_ticket = Ticket(0);
        for c in &mut self.clients {
            c.retry.extend(c.open.iter().copied());
            c.retry.sort_unstable();
            c.retry.dedup();
        }
        for f in &mut self.files {
            match &mut f.flush {
                Some((_, Phase::Committed { sent, .. } | Phase::Aborting { sent })) => *sent = None,
                _ => {}
            }
        }
    }

    /// Crashes, reopens, and compares: exactly the durable state, or that plus the batch in flight.
    pub fn crash(&mut self, power: bool) -> Check {
        let mut with_batch = None;
        let mut in_flight: Vec<(u64, Vec<u8>)> = Vec::new();
        if let Some((batch, last, state)) = self.batch.take() {
            if matches!(state, BatchState::Synced) {
                in_flight.push((batch.offset, batch.bytes.to_vec()));
                let mut s = self.durable.clone();
                self.log.iter().filter(|(t, _)| *t <= last).for_each(|(_, op)| s.apply(op));
                with_batch = Some(s);
            }
        }
        if let Some((_, Some(write))) = self.step.take() {
            in_flight.push(write);
        }
        // Plans whose data was being written: some of it may have reached the disk.
        for p in &self.plans {
            if let Some(buffer) = &p.buffer
                && let Some(w) = p.left.first()
            {
                self.disk.write(w.offset, &buffer[w.range.clone()]);
            }
        }
        let first = in_flight.pop();
        if let Some((offset, bytes)) = in_flight.pop() {
            // Both a batch and a superblock were in flight.
            if power || self.rng.random_bool(0.5) {
                self.disk.write(offset, &bytes);
            }
        }
        if power {
            self.disk.power_cut(first, &mut self.rng);
        } else {
            self.disk.kill(first, &mut self.rng);
        }
        self.forget_process();
        self.reopen(with_batch)
    }

    fn reopen(&mut self, with_batch: Option<State>) -> Check {
        let report = verify(&mut self.disk).map_err(|e| format!("verify: {e}"))?;
        ensure(report.bad.is_empty(), || format!("bad blocks: {:?}", report.bad))?;
        ensure(report.used_blocks == report.reachable_blocks, || {
            format!("{} blocks used, {} reachable", report.used_blocks, report.reachable_blocks)
        })?;
        self.store = Store::open(&mut self.disk, CLUSTER).map_err(|e| format!("open: {e}"))?;
        self.counts.reopened += 1;
        let exact = compare(&mut self.store, &self.disk, &self.durable, &self.all, PGS);
        match (exact, with_batch) {
            (Ok(()), None) => {}
            (Ok(()), Some(_)) => self.counts.in_flight_lost += 1,
            (Err(e), None) => return Err(e),
            (Err(e), Some(state)) => {
                compare(&mut self.store, &self.disk, &state, &self.all, PGS)
                    .map_err(|f| format!("without the batch in flight: {e}; with it: {f}"))?;
                self.counts.in_flight_kept += 1;
                self.durable = state;
            }
        }
        self.head = self.durable.clone();
        Ok(())
    }

    /// Lets everything finish: no plan, read, batch or checkpoint is left.
    pub fn settle(&mut self) -> Check {
        for p in std::mem::take(&mut self.plans) {
            self.store.abort_write(p.plan.id);
            self.clients[p.op.session.0 as usize - 1].open.remove(&p.op.sequence.0);
        }
        for f in std::mem::take(&mut self.fills) {
            self.store.abort_fill(f.plan.id);
        }
        for r in std::mem::take(&mut self.reads) {
            self.finish_read(r)?;
        }
        for _ in 0..10_000 {
            self.take_batch()?;
            self.complete_batch()?;
            self.checkpoint()?;
            if self.batch.is_none() && self.store.pending().records == 0 && self.step.is_none() {
                return ensure(self.log.is_empty(), || "tickets that never came back".into());
            }
        }
        Err("the store does not settle: a queue does not drain".into())
    }

    /// A clean restart: the same state and the same free space.
    pub fn restart(&mut self) -> Check {
        self.settle()?;
        let stats = self.store.stats();
        ensure(stats.waiting_bytes == 0, || "space waits for nobody".into())?;
        self.forget_process();
        self.disk.sync_all();
        self.reopen(None)?;
        let now = self.store.stats();
        for (what, a, b) in [
            ("free", stats.free_bytes, now.free_bytes),
            ("dirty", stats.dirty_bytes, now.dirty_bytes),
            ("clean", stats.clean_bytes, now.clean_bytes),
            ("index", stats.index_bytes, now.index_bytes),
            ("extents", stats.extents, now.extents),
            ("inline", stats.inline_bytes, now.inline_bytes),
        ] {
            ensure(a == b, || format!("{what}: {a} before the restart, {b} after it"))?;
        }
        Ok(())
    }

    /// Flips bits or misdirects blocks of a settled device, and looks whether anything wrong is believed.
    /// Returns whether the fault was seen (refused, or a checksum mismatch), or did not matter.
    pub fn rot(&mut self) -> Result<&'static str, String> {
        self.settle()?;
        self.forget_process();
        self.disk.sync_all();
        let image = self.disk.durable_image();
        let blocks = image.len() as u64 / 4096;
        let pick = |rng: &mut StdRng| loop {
            // Anywhere with bytes that differ from the factory's garbage is likelier to matter.
            let at = rng.random_range(0..blocks) * 4096;
            if rng.random_bool(0.05) || at < (5 << 20) || rng.random_bool(0.5) {
                return at;
            }
        };
        let to = pick(&mut self.rng);
        if self.rng.random_bool(0.6) {
            let bit: u8 = 1 << self.rng.random_range(0..8);
            let at = to + self.rng.random_range(0..4096);
            self.disk.flip(at, bit);
        } else {
            let from = pick(&mut self.rng);
            self.disk.misdirect(from, to);
        }
        let outcome = match Store::open(&mut self.disk, CLUSTER) {
            Err(_) => "refused",
            Ok(mut store) => {
                match compare(&mut store, &self.disk, &self.durable, &self.all, PGS) {
                    Ok(()) => "harmless",
                    Err(e) if e.contains("checksum mismatch") => "checksum",
                    // The newest batch cannot be told from a torn one: it is lost as a whole, and
                    // nothing wrong is believed (docs/FORMAT.md §7.3).
                    Err(e) if e.contains("wrong bytes") && !self.stale_is_older(&mut store) => {
                        return Err(format!("wrong bytes are believed: {e}"));
                    }
                    Err(_) => "last batch",
                }
            }
        };
        self.disk.restore(&image);
        self.reopen(None)?;
        Ok(outcome)
    }

    /// Whether the recovered store is one batch behind (its next batch would have the sequence that the
    /// settled store's newest had).
    fn stale_is_older(&self, store: &mut Store) -> bool {
        store.batch_sequence() < self.store.batch_sequence()
    }
}
