//! The shard core: what one core of a data node does with a frame, sans-IO.
//!
//! Events in ([`Event`]), commands out ([`Command`]); no clock (`now_ms` is told), randomness, socket
//! or file. On-disk order and recovery are `ebb-store`'s; what is here is the protocol's side:
//! * nothing is served without a live lease, equal epochs, a presented grant and the newest view (I5,
//!   I12, PROTOCOL §2, §4, §6), checked on the way in *and* before the answer leaves;
//! * a write is answered when the store says its record is durable, in journal order (I1), and once
//!   per (session, sequence) (I7);
//! * a read answers with blocks whose checksum was verified (I10), known zeros (I4), or bytes fetched
//!   under If-Match from the object that the signed view names (PROTOCOL §9);
//! * every table is bounded (I9): requests, grants, views, fills, uploads; buffers come from outside
//!   and waiting for one ends in `Busy`.
//!
//! It does not: own sockets, choose placement, decide when to flush, or speak S3.

mod admit;
mod assembly;
mod buffer;
mod call;
mod control;
mod dram;
mod event;
mod fill;
mod grants;
mod journal;
mod kept;
mod lru;
mod peer_read;
mod placement;
mod present;
mod read;
mod replica;
mod scrub;
mod space;
mod spill;
mod upload;
mod warm;
mod write;

pub use buffer::Buffer;
pub use call::*;
pub use event::*;
pub use spill::{SPILL_BYTES_MIN, SPILL_LOG_AT};

use assembly::{AsmId, Assembly};
use control::{ControlId, ControlTask};
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::control::CoreStats;
use ebb_dataplane_protocol::{
    ChunkIndex, ClusterId, Header, InodeId, MapVersion, Opcode, PgId, Status,
};
use ebb_store::{Store, Ticket};
use fill::{FillKey, FillTask, GRANULES};
use grants::Grants;
use lru::Lru;
use placement::{Placement, Refusal};
use std::collections::{BTreeMap, HashMap, VecDeque};
use upload::{PutTask, Upload, UploadId};
use warm::{WarmId, WarmTask};
use write::{WriteKey, WriteTask};

/// Requests in progress in a core at most; more are answered `Busy`.
const REQUESTS_MAX: usize = 8192;
/// How long a request waits for a buffer or for another request before it is answered `Busy`.
const PATIENCE_MS: u64 = 1000;
/// Dropped inodes remembered, so that a delayed write brings none of them back.
const DROPPED_MAX: usize = 65_536;
/// Retry hint with a plain `Busy`.
const RETRY_BUSY_MS: u32 = 20;

/// Limits of a core.
#[derive(Clone, Copy, Debug)]
pub struct CoreLimits {
    /// Bytes of upload bodies in memory at once; one upload is always admitted.
    pub flush_bytes: u64,
    /// S3 mutations in progress at once.
    pub uploads: usize,
    /// Grants remembered.
    pub grants: usize,
    /// Views remembered.
    pub views: usize,
    /// Copies of blocks in memory; 0: none.
    pub dram_bytes: u64,
    /// Size of the spill device, in bytes; less than [`SPILL_BYTES_MIN`]: there is none.
    pub spill_bytes: u64,
    /// Bytes compared with their checksums per second, in the background; 0: none.
    pub scrub_bytes_per_s: u64,
    /// Rest between two passes over the device.
    pub scrub_rest_ms: u64,
}

impl Default for CoreLimits {
    fn default() -> Self {
        Self {
            flush_bytes: 64 << 20,
            uploads: 16,
            grants: grants::GRANTS_MAX,
            views: grants::VIEWS_MAX,
            dram_bytes: 0,
            spill_bytes: 0,
            scrub_bytes_per_s: crate::config::SCRUB_BYTES_PER_S,
            scrub_rest_ms: crate::config::SCRUB_REST_S * 1000,
        }
    }
}

/// What a core tells the heartbeat.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Counters.
    pub stats: CoreStats,
    /// The map it works by.
    pub map_version: MapVersion,
    /// Groups with dirty data or pins.
    pub dirty_groups: Vec<PgId>,
    /// What it asks for its groups.
    pub wishes: ebb_dataplane_protocol::replica::Wishes,
}

/// A reply that is owed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owed {
    conn: ConnRef,
    header: Header,
}

/// Whose completion a token is.
#[derive(Debug)]
enum Pending {
    /// A device read into an assembly's target.
    Target(AsmId, assembly::DevicePiece),
    /// A device read into a temporary buffer of an assembly.
    Temporary(AsmId, assembly::DevicePiece),
    /// The old block of a write's edge.
    Edge(WriteKey, usize),
    /// One device write of a write.
    WriteData(WriteKey),
    /// One device write of a fill.
    FillData(fill::FillNo),
    /// A fill's fetch.
    Fetch(fill::FillNo),
    /// A fill's question to its group's former holder.
    Asked(fill::FillNo, PgId),
    /// An S3 mutation.
    Upload(UploadId),
    /// The journal, its sync, a checkpoint step.
    Journal(journal::Step),
    /// A request of a member's stream.
    Ship(PgId, ebb_dataplane_protocol::ShardRef, u64, replica::lead::What),
    /// Data of a mutation that another core sent.
    ShippedData(Owed),
    /// Blocks that go to another core.
    CopyRead(u64, usize),
    /// Blocks that are compared with their checksums.
    Scrub(ebb_store::ScrubPiece),
    /// Evicted blocks that are copied to the spill device.
    Capture(Box<spill::Capture>),
    /// A write of the spill device.
    SpillWrite,
    /// A fill's read of the spill device.
    SpillRead(Box<spill::SpillRead>),
}

/// Who waits for a ticket.
#[derive(Debug)]
pub(crate) enum Waiter {
    Write(WriteKey),
    Control(ControlId),
    Fill(fill::FillNo),
    /// An eviction: writers without space try again.
    Space,
    /// A read that found rot in clean data, now dropped.
    Repair(AsmId),
    /// The same for the edge of a write.
    RepairWrite(WriteKey),
    /// Another core, whose mutation it is.
    Told(replica::Told),
    /// A read that saw what is not everywhere yet.
    Read(u64),
}

/// Who waits for a buffer.
#[derive(Clone, Copy, Debug)]
enum Starved {
    Assembly(AsmId),
    Edge(WriteKey, usize),
    Fill(fill::FillNo),
}

/// One core of a data node.
pub struct ShardCore<B> {
    store: Store,
    dram: dram::Dram<B>,
    spill: spill::Spill<B>,
    key: ClusterKey,
    cluster: ClusterId,
    limits: CoreLimits,
    buffers: Box<dyn Buffers<B>>,
    grants: Grants,
    dropped: Lru<InodeId, ()>,
    placement: Placement,
    /// How often this core came to lead groups anew.
    leads: u64,
    /// Counters; the glue adds those of connections and frames.
    pub stats: CoreStats,
    now_ms: u64,
    out: Vec<Command<B>>,
    last_id: u64,
    requests: usize,
    pending: HashMap<Token, Pending>,
    tickets: BTreeMap<Ticket, Vec<Waiter>>,
    starved: VecDeque<(Starved, u64)>,
    assemblies: HashMap<AsmId, Assembly<B>>,
    reads: HashMap<u64, read::ReadTask>,
    /// Reads of what other members have not acked yet.
    parked_reads: HashMap<u64, (read::ReadTask, assembly::Assembled<B>)>,
    writes: HashMap<WriteKey, WriteTask<B>>,
    /// Writes that the store made wait, oldest first, by chunk.
    waiting: BTreeMap<(InodeId, ChunkIndex), VecDeque<WriteKey>>,
    retry_waiting: bool,
    space: space::Space,
    fills: HashMap<fill::FillNo, FillTask<B>>,
    granules: HashMap<FillKey, [Option<fill::FillNo>; GRANULES]>,
    read_ahead: fill::ReadAhead,
    controls: HashMap<ControlId, ControlTask>,
    parked_controls: VecDeque<ControlId>,
    await_map: VecDeque<control::AwaitsMap>,
    puts: HashMap<u64, PutTask>,
    uploads: HashMap<UploadId, Upload<B>>,
    upload_queue: VecDeque<UploadId>,
    uploads_active: usize,
    flush_bytes: u64,
    warms: HashMap<WarmId, WarmTask>,
    journal: journal::Driver,
    scrub: scrub::Scrub,
    moved: peer_read::Moved,
    peer_serves: HashMap<u64, peer_read::PeerServe>,
    replication: replica::Replication<B>,
}

impl<B: Buffer> ShardCore<B> {
    /// A core over an open store.
    pub fn new(
        store: Store,
        key: ClusterKey,
        cluster: ClusterId,
        limits: CoreLimits,
        buffers: Box<dyn Buffers<B>>,
    ) -> Self {
        let stats =
            CoreStats { capacity_bytes: store.stats().capacity_bytes, ..CoreStats::default() };
        Self {
            store,
            key,
            cluster,
            buffers,
            dram: dram::Dram::new(limits.dram_bytes),
            spill: spill::Spill::new(limits.spill_bytes),
            grants: Grants::new(limits.grants, limits.views),
            limits,
            dropped: Lru::new(DROPPED_MAX),
            placement: Placement::default(),
            leads: 0,
            stats,
            now_ms: 0,
            out: Vec::new(),
            last_id: 0,
            requests: 0,
            pending: HashMap::new(),
            tickets: BTreeMap::new(),
            starved: VecDeque::new(),
            assemblies: HashMap::new(),
            reads: HashMap::new(),
            parked_reads: HashMap::new(),
            writes: HashMap::new(),
            waiting: BTreeMap::new(),
            retry_waiting: false,
            space: space::Space::default(),
            fills: HashMap::new(),
            granules: HashMap::new(),
            read_ahead: fill::ReadAhead::default(),
            controls: HashMap::new(),
            parked_controls: VecDeque::new(),
            await_map: VecDeque::new(),
            puts: HashMap::new(),
            uploads: HashMap::new(),
            upload_queue: VecDeque::new(),
            uploads_active: 0,
            flush_bytes: 0,
            warms: HashMap::new(),
            journal: journal::Driver::default(),
            scrub: scrub::Scrub::default(),
            moved: peer_read::Moved::default(),
            peer_serves: HashMap::new(),
            replication: replica::Replication::default(),
        }
    }

    /// Takes in what happened. Commands collect until [`ShardCore::drain`].
    pub fn handle(&mut self, now_ms: u64, event: Event<B>) {
        self.now_ms = self.now_ms.max(now_ms);
        match event {
            Event::Request(request) => self.request(request),
            Event::Read { token, buf, ok } => self.read_done(token, buf, ok),
            Event::Written { token, ok } => self.written(token, ok),
            Event::Job(done) => self.job_done(done),
            Event::Answer(answer) => self.answered(answer),
            Event::Placement { me, map, lease_until_ms } => {
                let before = self.placement.map();
                self.placement.update(me, map, lease_until_ms);
                if self.placement.leads_anew(before.as_deref()) {
                    // Views in memory are of this core's other groups: in those that it leads now, what they say
                    // need not be journaled. Everything has to be presented again, also what is being presented.
                    self.grants.present_again(self.placement.version());
                    self.leads += 1;
                }
                self.note_moves(before);
                self.thaw_returned();
                self.regroup_follows();
                self.regroup_leads();
                self.early_go_on();
                self.map_came();
            }
        }
    }

    /// A group that was given away and came back before the old primary, this core, was told to
    /// release it: its freeze belongs to an epoch that is over. What cannot be lifted now is at the
    /// next heartbeat.
    fn thaw_returned(&mut self) {
        for pg in (0..self.placement.pg_count()).map(PgId) {
            let Some(frozen) = self.store.frozen(pg) else { continue };
            if self.placement.own_epoch(pg).is_some_and(|own| own > frozen) {
                // Nobody waits for it but writes, which ask again.
                drop(self.store.thaw(pg, frozen));
            }
        }
    }

    /// Ends a turn: retries what waits, closes the journal batch, drives the checkpoint.
    pub fn end_turn(&mut self, now_ms: u64) {
        self.now_ms = self.now_ms.max(now_ms);
        self.retry_starved();
        self.serve_found();
        self.retry_writes();
        self.retry_controls();
        self.pump_all();
        self.drive_copies();
        self.start_uploads();
        self.keep_space();
        self.keep_spilling();
        self.keep_scrubbing();
        self.forget_remnants();
        self.drive_journal();
        self.expire();
    }

    /// Takes the commands collected so far.
    pub fn drain(&mut self) -> std::vec::Drain<'_, Command<B>> {
        for command in &self.out {
            match command {
                Command::Write { offset, range, .. } => self.dram.forget(*offset, range.len()),
                Command::WriteMeta { offset, bytes, .. } => self.dram.forget(*offset, bytes.len()),
                _ => {}
            }
        }
        self.out.drain(..)
    }

    /// Whether something waits that no completion will wake: take a turn soon.
    pub fn wants_turn(&self) -> bool {
        !self.starved.is_empty()
            || !self.waiting.is_empty()
            || !self.parked_controls.is_empty()
            || !self.await_map.is_empty()
            || self.replication.has_work()
    }

    /// Whether a write that waited may go on now: take a turn without sleeping.
    pub fn has_ready_work(&self) -> bool {
        self.retry_waiting && !self.waiting.is_empty()
    }

    /// Whether nothing is in progress: requests answered, journal quiet.
    pub fn is_idle(&self) -> bool {
        self.requests == 0
            && self.pending.is_empty()
            && self.tickets.is_empty()
            && self.fills.is_empty()
    }

    /// What is in progress, in one line, for logs.
    pub fn in_progress(&self) -> String {
        format!(
            "requests {} pending {} tickets {} starved {} assemblies {} writes {} waiting {} fills {} \
             controls {} parked {} uploads {} warms {} journal {:?} store {:?}",
            self.requests,
            self.pending.len(),
            self.tickets.len(),
            self.starved.len(),
            self.assemblies.len(),
            self.writes.len(),
            self.waiting.len(),
            self.fills.len(),
            self.controls.len(),
            self.parked_controls.len(),
            self.uploads.len(),
            self.warms.len(),
            self.journal,
            self.store.stats(),
        )
    }

    /// Whether the lease lives.
    pub fn lease_lives(&self, now_ms: u64) -> bool {
        self.placement.lease_lives(now_ms)
    }

    /// Whether the device failed.
    pub fn failed(&self) -> bool {
        self.store.failed()
    }

    /// Counters and holdings, for the heartbeat.
    pub fn report(&self) -> Report {
        let groups = 0..self.placement.pg_count();
        let dirty_groups = groups
            .map(PgId)
            .filter(|pg| {
                let held = self.store.pg_status(*pg);
                held.dirty_bytes > 0 || held.pins > 0
            })
            .collect();
        Report {
            stats: self.counters(),
            map_version: self.placement.version(),
            dirty_groups,
            wishes: self.wishes(),
        }
    }

    /// Grants and views in memory (for tests and logs).
    pub fn table_sizes(&self) -> (usize, usize) {
        self.grants.counts()
    }

    fn counters(&self) -> CoreStats {
        let s = self.store.stats();
        CoreStats {
            capacity_bytes: s.capacity_bytes,
            dirty_bytes: s.dirty_bytes,
            clean_bytes: s.clean_bytes,
            pins: s.pinned_inodes,
            journal_batches: s.batches,
            journal_records: s.records,
            pressure_permille: self.pressure(&s),
            members_syncing: self.members_syncing(),
            dram_bytes: self.dram.bytes(),
            spill_capacity_bytes: self.spill.capacity(),
            spill_bytes: self.spill.bytes(),
            spill_waiting_bytes: self.spill.waiting_bytes(),
            ..self.stats
        }
    }

    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    fn expect(&mut self, what: Pending) -> Token {
        let token = Token(self.next_id());
        let before = self.pending.insert(token, what);
        assert!(before.is_none(), "tokens are never reused");
        token
    }

    fn wait_ticket(&mut self, ticket: Ticket, who: Waiter) {
        self.tickets.entry(ticket).or_default().push(who);
    }

    // --- requests -------------------------------------------------------------------------------

    fn request(&mut self, r: Request<B>) {
        let owed = Owed { conn: r.conn, header: r.header };
        self.requests += 1;
        if r.header.is_reply() {
            return self.refuse(owed, Refusal::of(Status::BadRequest));
        }
        if self.requests > REQUESTS_MAX {
            return self.refuse(owed, Refusal::after(Status::Busy, RETRY_BUSY_MS));
        }
        let allowed = match r.header.opcode {
            Opcode::Ping => true,
            Opcode::Present | Opcode::Read | Opcode::Write => r.peer.role == Role::Client,
            // An operator's tool may ask for counters.
            Opcode::Control => match r.peer.role {
                Role::Meta => true,
                Role::Controller => control::is_harmless(&r.body),
                _ => false,
            },
            Opcode::PeerRead => r.peer.role == Role::Node,
            Opcode::Replicate => r.peer.role == Role::Node,
            Opcode::Hello | Opcode::Prove | Opcode::Meta | Opcode::Raft => {
                return self.refuse(owed, Refusal::of(Status::BadRequest));
            }
        };
        if !allowed {
            self.stats.refused_frames += 1;
            return self.refuse(owed, Refusal::of(Status::Forbidden));
        }
        match r.header.opcode {
            Opcode::Present => self.present(owed, r.peer, &r.body),
            Opcode::Read => self.read(owed, r.peer, &r.body),
            Opcode::Write => self.write(owed, r.peer, &r.body, r.payload),
            Opcode::Control => self.control(owed, &r.body),
            Opcode::PeerRead => self.peer_read(owed, &r.body),
            Opcode::Replicate => self.replicate(owed, r.peer, &r.body, r.payload),
            _ => self.reply(owed, Status::Ok, Vec::new()),
        }
    }

    /// Answers with a status and a body.
    fn reply(&mut self, owed: Owed, status: Status, body: Vec<u8>) {
        let header = owed.header.reply(status).with_body(&body);
        self.send(Reply { conn: owed.conn, header, body, payload: Vec::new() });
    }

    fn refuse(&mut self, owed: Owed, refusal: Refusal) {
        if refusal.refresh {
            self.out.push(Command::RefreshMap);
        }
        match refusal.status {
            Status::BadRequest => self.stats.refused_frames += 1,
            Status::Ok => debug_assert!(false, "a refusal has a reason"),
            _ => {}
        }
        let mut header = owed.header.reply(refusal.status).with_body(&[]);
        header.retry_after_ms = refusal.retry_after_ms;
        self.send(Reply { conn: owed.conn, header, body: Vec::new(), payload: Vec::new() });
    }

    fn send(&mut self, reply: Reply<B>) {
        assert!(self.requests > 0, "one reply per request");
        self.requests -= 1;
        debug_assert_eq!(
            reply.payload.iter().map(Piece::len).sum::<usize>(),
            reply.header.payload_bytes as usize
        );
        self.out.push(Command::Reply(reply));
    }

    // --- completions ------------------------------------------------------------------------------

    fn read_done(&mut self, token: Token, buf: B, ok: bool) {
        match self.pending.remove(&token) {
            Some(Pending::Target(id, piece)) => self.target_read(id, piece, buf, ok),
            Some(Pending::Temporary(id, piece)) => self.temporary_read(id, piece, buf, ok),
            Some(Pending::Edge(key, edge)) => self.edge_read(key, edge, buf, ok),
            Some(Pending::Journal(step)) => self.journal_read(step, buf, ok),
            Some(Pending::Scrub(piece)) => self.scrub_read(piece, &buf, ok),
            Some(Pending::CopyRead(stream, piece)) => self.copy_read(stream, piece, buf, ok),
            Some(Pending::Capture(capture)) => self.capture_read(*capture, buf, ok),
            Some(Pending::SpillRead(read)) => self.spill_read(*read, buf, ok),
            other => debug_assert!(false, "a read completion for {other:?}"),
        }
    }

    fn written(&mut self, token: Token, ok: bool) {
        let what = self.pending.remove(&token);
        if matches!(what, Some(Pending::SpillWrite)) {
            return self.spill_written(ok);
        }
        if !ok {
            self.fail_store("a device write or sync failed");
        }
        match what {
            Some(Pending::WriteData(key)) => self.data_written(key),
            Some(Pending::FillData(no)) => self.fill_written(no),
            Some(Pending::ShippedData(owed)) => self.shipped_written(owed),
            Some(Pending::Journal(step)) => self.journal_step_done(step, ok),
            other => debug_assert!(false, "a write completion for {other:?}"),
        }
    }

    fn job_done(&mut self, done: JobDone<B>) {
        match done {
            JobDone::Fetched { token, buf, result } => match self.pending.remove(&token) {
                Some(Pending::Fetch(no)) => self.fetched(no, buf, result),
                other => debug_assert!(false, "a fetch completion for {other:?}"),
            },
            JobDone::Stored { token, outcome } => match self.pending.remove(&token) {
                Some(Pending::Upload(id)) => self.uploaded(id, outcome),
                other => debug_assert!(false, "a store completion for {other:?}"),
            },
        }
    }

    fn answered(&mut self, answer: Answer<B>) {
        match self.pending.remove(&answer.token) {
            Some(Pending::Asked(no, pg)) => self.holder_answered(no, pg, answer),
            Some(Pending::Ship(pg, shard, stream, what)) => {
                self.ship_answered(pg, shard, stream, what, &answer);
            }
            other => debug_assert!(false, "an answer for {other:?}"),
        }
    }

    /// A ticket is durable: its mutation took effect.
    fn ticket_durable(&mut self, ticket: Ticket) {
        let waiters = self.tickets.remove(&ticket).unwrap_or_default();
        self.durable_here(ticket, waiters);
    }

    fn run_waiter(&mut self, waiter: Waiter) {
        match waiter {
            Waiter::Write(key) => self.write_durable(key),
            Waiter::Control(id) => self.control_durable(id),
            Waiter::Fill(no) => self.fill_durable(no),
            Waiter::Space => self.space_freed(),
            Waiter::Repair(id) => self.replan(id),
            Waiter::RepairWrite(key) => self.restart_write(key),
            Waiter::Read(id) => self.read_again(id),
            Waiter::Told(told) => self.reply(told.owed, Status::Ok, Vec::new()),
        }
    }

    /// The device is not to be trusted any more: writes end in `Io`, nothing is journaled.
    fn fail_store(&mut self, why: &'static str) {
        if !self.store.failed() {
            self.store.fail();
            self.out.push(Command::Failed(why));
        }
        self.fail_waiting();
    }

    // --- waiting --------------------------------------------------------------------------------------

    fn starve(&mut self, who: Starved) {
        self.starved.push_back((who, self.now_ms));
    }

    fn retry_starved(&mut self) {
        // Each gets one try per turn, oldest first; those still without a buffer line up again.
        for _ in 0..self.starved.len() {
            let Some((who, since)) = self.starved.pop_front() else { break };
            let settled = match who {
                Starved::Assembly(id) => self.start_assembly(id),
                Starved::Edge(key, edge) => self.start_edge(key, edge),
                Starved::Fill(no) => self.start_fill(no),
            };
            if !settled {
                self.starved.push_back((who, since));
            }
        }
    }

    /// Answers `Busy` to what has waited too long for a buffer. Fills wait on: they own no request.
    fn expire(&mut self) {
        let now = self.now_ms;
        let late = |since: u64| now >= since.saturating_add(PATIENCE_MS);
        let mut i = 0;
        while i < self.starved.len() {
            let (who, since) = self.starved[i];
            if late(since) && self.give_up(who) {
                self.starved.remove(i);
            } else {
                i += 1;
            }
        }
        self.expire_writes();
        self.expire_map_waiters();
        self.expire_early();
    }

    fn give_up(&mut self, who: Starved) -> bool {
        let busy = Refusal::after(Status::Busy, RETRY_BUSY_MS);
        match who {
            Starved::Assembly(id) => self.give_up_assembly(id),
            Starved::Edge(key, _) => {
                self.fail_write(key, busy);
                true
            }
            Starved::Fill(_) => false,
        }
    }
}
