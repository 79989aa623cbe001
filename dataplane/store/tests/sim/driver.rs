//! The driver: a random workload against a store, with random completion points, crashes and reopenings.

use super::disk::{Disk, Faults};
use super::model::{Block, Op, State};
use super::oracle::{Check, Object, compare, ensure};
use ebb_dataplane_protocol::control::FlushDone;
use ebb_dataplane_protocol::*;
use ebb_store::*;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

pub const CLUSTER: ClusterId = ClusterId(0xebb);
pub const PGS: u16 = 4;
pub const FILES: usize = 4;

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
    /// Records moves that are not durable.
    SkipRelocationSync,
    /// Superblocks all at once, not durable one after another.
    SuperblocksUnordered,
    /// Credits a repeated write to the tag of the repetition (R19).
    CreditRetry,
    /// Believes that only seals, cuts and fences raise the floor (R7).
    TagsGoBack,
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
    pub duplicates: u64,
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
        self.duplicates += o.duplicates;
        self.no_space += o.no_space;
        self.reopened += o.reopened;
        self.in_flight_kept += o.in_flight_kept;
        self.in_flight_lost += o.in_flight_lost;
        self.faults += o.faults;
    }
}

pub enum Phase {
    Sealing,
    Sealed { object: Object, content: ContentId, old_valid: u64, limit: u64 },
    Committed { done: FlushDone, sent: Option<Ticket> },
    Aborting { sent: Option<Ticket> },
}

/// A file as the metadata plane knows it: survives every crash.
pub struct File {
    pub inode: InodeId,
    pub generation: Generation,
    pub content: ContentId,
    pub contents: u64,
    pub valid: u64,
    pub version: ViewVersion,
    pub cuts: Vec<Cut>,
    pub flush: Option<(Generation, Phase)>,
}

pub struct Plan {
    pub plan: WritePlan,
    pub op: WriteOp,
    pub payload: Vec<u8>,
    pub buffer: Option<Vec<u8>>,
    pub expected: Vec<Block>,
    pub left: Vec<PlannedWrite>,
}

pub struct FillPlanned {
    pub plan: FillPlan,
    pub bytes: Vec<u8>,
    pub left: Vec<PlannedWrite>,
}

pub struct OpenRead {
    pub plan: ReadPlan,
    pub expected: Vec<Expected>,
    pub released: bool,
}

pub enum Expected {
    Dirty(Block),
    Hole,
    Base(Vec<u8>),
}

#[derive(Default)]
pub struct Client {
    pub next: u64,
    /// Begun and not acked.
    pub open: BTreeSet<u64>,
    /// Lost by a crash: to be sent again.
    pub retry: Vec<u64>,
}

/// A write in flight.
pub type DeviceBytes = (u64, Vec<u8>);

pub enum BatchState {
    Taken,
    Synced,
}

pub struct World {
    pub rng: StdRng,
    pub disk: Disk,
    pub store: Store,
    pub rule: Break,
    pub durable: State,
    pub head: State,
    pub log: VecDeque<(Ticket, Op)>,
    pub durable_ticket: Ticket,
    pub batch: Option<(JournalBatch, Ticket, BatchState)>,
    pub plans: Vec<Plan>,
    pub fills: Vec<FillPlanned>,
    pub reads: Vec<OpenRead>,
    pub files: Vec<File>,
    pub gone: Vec<InodeId>,
    pub all: Vec<InodeId>,
    pub objects: BTreeMap<(InodeId, ContentId), Object>,
    pub clients: Vec<Client>,
    pub step: Option<(CheckpointToken, Option<DeviceBytes>)>,
    pub counter: u64,
    /// Mostly large writes: the device fills up.
    pub heavy: bool,
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
        let mut store = store;
        store.set_checkpoint_write_bytes(4096);
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

    pub fn create(&mut self) {
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

    pub fn random_bytes(&mut self, len: usize) -> Vec<u8> {
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
    pub fn random_block(&mut self) -> Block {
        self.random_bytes(4096).into()
    }

    /// Runs `steps` random steps of one temper: some lives are all writes, in some the checkpoint crawls.
    pub fn run(&mut self, steps: u32) -> Check {
        let calm = self.rng.random_bool(0.4);
        let crawl = self.rng.random_bool(0.3);
        for _ in 0..steps {
            match self.rng.random_range(0..if calm { 72 } else { 100 }) {
                0..20 => self.begin_write()?,
                20..36 => self.progress()?,
                36..46 => self.take_batch()?,
                46..60 => self.complete_batch()?,
                60..63 => self.read()?,
                63..66 => self.fill()?,
                66..72 if crawl && self.rng.random_bool(0.9) => {}
                66..72 => self.checkpoint()?,
                72..84 => self.flush()?,
                84..86 => self.truncate(),
                86..90 => self.read()?,
                90..92 => self.evict()?,
                92..94 => self.odds_and_ends()?,
                _ => {}
            }
            // The reactor does more than one thing per turn.
            for _ in 0..self.rng.random_range(0..4) {
                self.progress()?;
            }
            if self.rng.random_bool(0.4) {
                self.complete_batch()?;
                self.take_batch()?;
            }
        }
        Ok(())
    }

    /// Leaves writes in the cache and a batch in flight.
    pub fn rush(&mut self, steps: u32) -> Check {
        for i in 0..steps {
            self.begin_write()?;
            self.progress()?;
            self.progress()?;
            if i % 8 == 5 {
                self.checkpoint()?;
            }
        }
        self.take_batch()?;
        if self.rng.random_bool(0.7)
            && self.batch.as_ref().is_some_and(|b| matches!(b.2, BatchState::Taken))
        {
            self.complete_batch()?;
        }
        for _ in 0..self.rng.random_range(0..4) {
            self.begin_write()?;
            self.progress()?;
            self.progress()?;
        }
        Ok(())
    }

    // --- the journal ----------------------------------------------------------------------------------

    pub fn take_batch(&mut self) -> Check {
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

    pub fn complete_batch(&mut self) -> Check {
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

    pub fn finish_batch(&mut self, id: BatchId, last: Ticket) -> Check {
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

    // --- checkpoint -----------------------------------------------------------------------------------------

    pub fn checkpoint(&mut self) -> Check {
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
        } else if self.rng.random_bool(0.005) {
            self.store.begin_relocation();
        }
        match self.store.checkpoint_step() {
            CheckpointStep::Idle | CheckpointStep::Wait => {}
            CheckpointStep::Relocate { token, moves } => {
                for m in moves {
                    let bytes = self.disk.read(m.from, m.bytes as usize);
                    self.disk.write(m.to, &bytes);
                }
                if self.rule != Break::SkipRelocationSync {
                    self.disk.sync_all();
                }
                self.step = Some((token, None));
            }
            CheckpointStep::Write { token, offset, bytes } => {
                self.disk.write(offset, &bytes);
                // A crowd of inodes without data: their table is larger than one write.
                for _ in 0..3 {
                    let inode = InodeId::new(9, Incarnation(1), self.rng.random_range(0..300));
                    let floor = Generation(self.rng.random_range(1..1000));
                    let scope = Scope::of(inode, ChunkIndex(0), PGS);
                    let known = self.head.inodes.get(&scope).map_or(Generation(0), |i| i.floor);
                    let r = self.store.set_floor(scope, floor);
                    if known < floor {
                        self.control(r, Op::Floor(scope, floor))?;
                    }
                }
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

    pub fn forget_process(&mut self) {
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
            if let Some((_, Phase::Committed { sent, .. } | Phase::Aborting { sent })) =
                &mut f.flush
            {
                *sent = None;
            }
        }
    }

    /// Crashes, reopens, and compares: exactly the durable state, or that plus the batch in flight.
    pub fn crash(&mut self, power: bool) -> Check {
        let mut with_batch = None;
        let mut in_flight: Vec<(u64, Vec<u8>)> = Vec::new();
        if let Some((batch, last, BatchState::Synced)) = self.batch.take() {
            {
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

    pub fn reopen(&mut self, with_batch: Option<State>) -> Check {
        let report = verify(&mut self.disk).map_err(|e| format!("verify: {e}"))?;
        ensure(report.bad.is_empty(), || format!("bad blocks: {:?}", report.bad))?;
        ensure(report.used_blocks == report.reachable_blocks, || {
            format!("{} blocks used, {} reachable", report.used_blocks, report.reachable_blocks)
        })?;
        self.store = Store::open(&mut self.disk, CLUSTER).map_err(|e| format!("open: {e}"))?;
        // Small steps: the index changes while it is being saved.
        self.store.set_checkpoint_write_bytes(4096);
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
                    Err(_) if store.batch_sequence() + 1 == self.store.batch_sequence() => {
                        "last batch"
                    }
                    Err(e) => return Err(format!("a fault is believed: {e}")),
                }
            }
        };
        self.disk.restore(&image);
        self.reopen(None)?;
        Ok(outcome)
    }
}
