//! The simulated world: one core, a device, an S3, clients and a metadata side.
#![allow(unreachable_pub)]

mod device;
mod files;

use device::Device;
use ebb_dataplane::core::*;
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::control::{Control, ControlReply, StoreOutcome};
use ebb_dataplane_protocol::data::{PeerRead, encode_checksums};
use ebb_dataplane_protocol::*;
use ebb_store::{AlignedBuf, Geometry, Identity, Store, format_device};
use files::{Files, Outstanding, What};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicIsize, Ordering};

pub const CLUSTER: ClusterId = ClusterId(3);
pub const PGS: u16 = 4;
const ME: ShardRef = ShardRef { node: NodeId(1), core: CoreId(0) };
/// Held every group before.
const FORMER: ShardRef = ShardRef { node: NodeId(2), core: CoreId(0) };

pub fn key() -> ClusterKey {
    ClusterKey::new([3; 32])
}

/// Memory in pools, each counted: at most `max` bytes of a pool out at once, like the arena's.
#[derive(Clone, Default)]
pub struct Memory {
    clients: Arc<AtomicIsize>,
    background: Arc<AtomicIsize>,
    /// Counted by the core itself.
    flush: Arc<AtomicIsize>,
    dram: Arc<AtomicIsize>,
    spill: Arc<AtomicIsize>,
    max: isize,
}

/// A buffer that gives its bytes back when dropped.
#[derive(Debug)]
pub struct Slot {
    bytes: AlignedBuf,
    pool: Arc<AtomicIsize>,
}

impl Buffer for Slot {
    fn bytes(&self) -> &[u8] {
        &self.bytes
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.pool.fetch_sub(self.bytes.len() as isize, Ordering::Relaxed);
    }
}

impl Memory {
    fn of(pool: &Arc<AtomicIsize>, bytes: usize) -> Slot {
        let mut bytes = AlignedBuf::zeroed(bytes.next_multiple_of(4096));
        // What the last user left.
        bytes.fill(0xaa);
        pool.fetch_add(bytes.len() as isize, Ordering::Relaxed);
        Slot { bytes, pool: Arc::clone(pool) }
    }
    /// A client's payload.
    pub fn payload(&self, bytes: usize) -> Slot {
        Self::of(&self.clients, bytes)
    }
    fn out(&self) -> isize {
        [&self.clients, &self.background, &self.flush]
            .iter()
            .map(|p| p.load(Ordering::Relaxed))
            .sum()
    }
}

impl Buffers<Slot> for Memory {
    fn take(&mut self, bytes: usize, purpose: Purpose) -> Option<Slot> {
        let (pool, max) = match purpose {
            Purpose::Reply => (&self.clients, self.max),
            Purpose::Edge | Purpose::Fill => (&self.background, self.max),
            Purpose::Flush | Purpose::Copy => (&self.flush, isize::MAX),
            // Held for as long as the core lives.
            Purpose::Dram => (&self.dram, isize::MAX),
            // Batches that wait for more; the core counts them.
            Purpose::Spill => (&self.spill, 24 << 20),
        };
        let out = pool.load(Ordering::Relaxed);
        let fits = out == 0 || out.saturating_add(bytes as isize) <= max;
        fits.then(|| Self::of(pool, bytes))
    }
}

/// One object.
#[derive(Clone)]
pub struct Object {
    pub etag: String,
    pub body: Vec<u8>,
}

#[derive(Debug, Default)]
pub struct Tally {
    pub acked: u64,
    pub refused: u64,
    pub late: u64,
    pub duplicates: u64,
    pub reads: u64,
    pub old_reads: u64,
    pub flushed: u64,
    pub aborted: u64,
    pub cuts: u64,
    pub crashes: u64,
    pub peer_reads: u64,
    pub dram_hits: u64,
    pub spill_hits: u64,
    pub spill_errors: u64,
    pub spill_off: u64,
}

pub struct Sim {
    rng: SmallRng,
    device: Device,
    /// The spill device; of no bytes: there is none.
    spill: Vec<u8>,
    core: ShardCore<Slot>,
    memory: Memory,
    now: u64,
    /// Commands whose completion has not come.
    in_flight: Vec<Command<Slot>>,
    s3: BTreeMap<String, Object>,
    etags: u64,
    map: Arc<ClusterMap>,
    files: Files,
    requests: HashMap<u64, Outstanding>,
    next_request: u64,
    /// Refused writes, to be sent again.
    retries: Vec<files::Write>,
    traced: bool,
    /// Wrong answers of the former holder since the core was opened.
    lies: u64,
    pub tally: Tally,
}

impl Sim {
    pub fn new(seed: u64, device_bytes: u64) -> Self {
        Self::with_spill(seed, device_bytes, 0)
    }

    /// With a spill device that fails and lies now and then.
    pub fn with_spill(seed: u64, device_bytes: u64, spill_bytes: u64) -> Self {
        let mut device = Device::new(device_bytes);
        let geometry = Geometry::for_device(device_bytes).expect("large enough");
        let identity = Identity {
            cluster: CLUSTER,
            store: 1,
            node: NodeId(1),
            core: CoreId(0),
            pg_count: PGS,
        };
        format_device(&mut device, geometry, identity).expect("formats");
        let pgs = (0..PGS)
            .map(|_| PgEntry {
                syncing: Vec::new(),
                epoch: PgEpoch(1),
                members: vec![ME],
                since_map_version: MapVersion(1),
                moving: false,
                ..PgEntry::default()
            })
            .collect();
        let map =
            ClusterMap { version: MapVersion(1), cluster: CLUSTER, pgs, ..Default::default() };
        let memory = Memory { max: 32 << 20, ..Memory::default() };
        let core = open(&mut device, &memory, spill_bytes);
        let mut sim = Self {
            rng: SmallRng::seed_from_u64(seed),
            device,
            spill: vec![0; spill_bytes as usize],
            core,
            memory,
            now: 1,
            in_flight: Vec::new(),
            s3: BTreeMap::new(),
            etags: 0,
            map: Arc::new(map),
            files: Files::default(),
            requests: HashMap::new(),
            next_request: 1,
            retries: Vec::new(),
            lies: 0,
            traced: std::env::var_os("EBB_SIM_TRACE").is_some(),
            tally: Tally::default(),
        };
        sim.files = Files::new(&mut sim.rng);
        for f in &sim.files.all {
            if let Some(b) = &f.view.backing {
                let body = f.model[..b.length as usize].to_vec();
                sim.s3.insert(b.key.clone(), Object { etag: b.etag.clone(), body });
            }
        }
        sim.lease(1_000_000_000);
        sim
    }

    /// From now on hardly any memory.
    pub fn starve(&mut self) {
        self.memory.max = 1_200_000;
        self.crash();
    }

    fn lease(&mut self, until: u64) {
        // A core that knows no map sees first that another one holds the groups.
        let mut before = (*self.map).clone();
        before.version = MapVersion(0);
        for pg in &mut before.pgs {
            (pg.members, pg.epoch) = (vec![FORMER], PgEpoch(0));
        }
        let before = Event::Placement { me: ME, map: Arc::new(before), lease_until_ms: 0 };
        self.core.handle(self.now, before);
        let map = Arc::clone(&self.map);
        self.core.handle(self.now, Event::Placement { me: ME, map, lease_until_ms: until });
    }

    /// One thing after another, chosen by the seed.
    pub fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            match self.rng.random_range(0..100) {
                0..45 => self.client_step(),
                45..52 => self.flush_step(),
                52..54 => self.cut_step(),
                54..56 => self.evict_step(),
                56 if self.rng.random_bool(0.4) => self.crash(),
                _ => self.turn(),
            }
        }
    }

    /// Ends everything in progress, then compares every byte.
    pub fn settle_and_check(&mut self) {
        self.settle();
        self.crash();
        self.settle();
        for i in 0..self.files.all.len() {
            self.check_file(i);
        }
        self.settle();
        assert_eq!(self.memory.out(), 0, "every buffer came back");
    }

    fn settle(&mut self) {
        for _ in 0..100_000 {
            let quiet = self.requests.is_empty() && self.retries.is_empty();
            if quiet && self.in_flight.is_empty() && self.core.is_idle() {
                return;
            }
            self.turn();
        }
        let waiting: Vec<_> = self.requests.values().map(|o| o.what.name()).take(5).collect();
        panic!("stuck: {waiting:?} {} {}", self.retries.len(), self.core.in_progress());
    }

    /// A few completions in random order, then the end of a turn.
    pub fn turn(&mut self) {
        self.now += self.rng.random_range(0..30);
        for _ in 0..self.rng.random_range(1..6) {
            if self.in_flight.is_empty() {
                break;
            }
            let i = self.rng.random_range(0..self.in_flight.len());
            let command = self.in_flight.swap_remove(i);
            self.complete(command);
        }
        self.core.end_turn(self.now);
        self.collect();
        self.retry();
    }

    fn collect(&mut self) {
        let commands: Vec<Command<Slot>> = self.core.drain().collect();
        for command in commands {
            match command {
                Command::Reply(reply) => self.replied(reply),
                Command::RefreshMap => {}
                Command::Failed(why) => panic!("the device never fails here: {why}"),
                // A sync covers what was complete when it was asked for.
                Command::Sync { token } => {
                    self.device.sync_all();
                    self.in_flight.push(Command::Sync { token });
                }
                other => self.in_flight.push(other),
            }
        }
    }

    fn complete(&mut self, command: Command<Slot>) {
        let now = self.now;
        match command {
            Command::Read { token, offset, mut buf, range } => {
                self.device.read(offset, &mut buf.bytes_mut()[range]);
                self.core.handle(now, Event::Read { token, buf, ok: true });
            }
            Command::Write { token, offset, buf, range } => {
                self.device.write(offset, &buf.bytes()[range], false);
                drop(buf);
                self.core.handle(now, Event::Written { token, ok: true });
            }
            Command::WriteMeta { token, offset, bytes, durable } => {
                self.device.write(offset, &bytes, durable);
                // As the reactor's side does, and as one does that knows nothing of it.
                if token.0.is_multiple_of(2) {
                    self.core.batch_written(token);
                }
                self.core.handle(now, Event::Written { token, ok: true });
            }
            Command::Sync { token } => self.core.handle(now, Event::Written { token, ok: true }),
            Command::SpillRead { token, offset, mut buf, range } => {
                let at = offset as usize;
                let target = &mut buf.bytes_mut()[range.clone()];
                target.copy_from_slice(&self.spill[at..at + range.len()]);
                let ok = !self.rng.random_bool(0.03);
                if self.rng.random_bool(0.03) {
                    let byte = self.rng.random_range(range);
                    buf.bytes_mut()[byte] ^= 4;
                }
                self.core.handle(now, Event::Read { token, buf, ok });
            }
            Command::SpillWrite { token, offset, buf, range } => {
                // Failed, or torn and not even said.
                let ok = !self.rng.random_bool(0.05);
                let torn = !ok || self.rng.random_bool(0.05);
                self.spill_write(offset, &buf.bytes()[range], torn);
                drop(buf);
                self.core.handle(now, Event::Written { token, ok });
            }
            Command::Job(Job { token, work }) => {
                let done = self.s3_call(token, work);
                self.core.handle(now, Event::Job(done));
            }
            Command::Call(call) => {
                let answer = self.former_holder(call);
                self.core.handle(now, Event::Answer(answer));
            }
            Command::Reply(_) | Command::RefreshMap | Command::Failed(_) => unreachable!(),
        }
    }

    fn spill_write(&mut self, offset: u64, data: &[u8], torn: bool) {
        for (i, block) in data.chunks(4096).enumerate() {
            if !torn || self.rng.random_bool(0.5) {
                let at = offset as usize + i * 4096;
                self.spill[at..at + 4096].copy_from_slice(block);
            }
        }
    }

    fn count_what_the_core_did(&mut self) {
        let stats = self.core.stats;
        // The device is sound: what is read of it is what was written, also on its way out.
        assert!(stats.checksum_errors <= self.lies, "{} of {}", stats.checksum_errors, self.lies);
        self.lies = 0;
        self.tally.dram_hits += stats.dram_hits;
        self.tally.spill_hits += stats.spill_hits;
        self.tally.spill_errors += stats.spill_errors;
        self.tally.spill_off += stats.spill_off;
    }

    fn s3_call(&mut self, token: Token, work: Work<Slot>) -> JobDone<Slot> {
        match work {
            Work::Fetch { key, etag, range, mut buf, at } => {
                let object = self.s3.get(&key).filter(|o| o.etag == etag);
                let result = match object {
                    Some(o) => {
                        let part = &o.body[range.start as usize..range.end as usize];
                        buf.bytes_mut()[at..at + part.len()].copy_from_slice(part);
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
                        Piece::Buf(buf, range) => bytes.extend_from_slice(&buf.bytes()[range]),
                        Piece::Shared(buf, range) => bytes.extend_from_slice(&buf.bytes()[range]),
                        Piece::Zeros(n) => bytes.resize(bytes.len() + n, 0),
                    }
                }
                self.etags += 1;
                let etag = format!("e{}", self.etags);
                self.s3.insert(key, Object { etag: etag.clone(), body: bytes });
                JobDone::Stored { token, outcome: StoreOutcome::Stored { etag } }
            }
            other => panic!("not asked for here: {other:?}"),
        }
    }

    /// The core that held all groups before: has some of what it is asked for, and of that some is rotten.
    fn former_holder(&mut self, mut call: Call<Slot>) -> Answer<Slot> {
        assert_eq!((call.peer, call.header.opcode), (FORMER, Opcode::PeerRead));
        let ask = PeerRead::decode(&call.body).expect("a question");
        let h = call.header;
        let body = self.files.all.iter().find(|f| f.inode == h.inode).and_then(|f| {
            let backing = f.view.backing.as_ref().filter(|_| f.view.content == ask.content)?;
            self.s3.get(&backing.key).filter(|o| o.etag == backing.etag)
        });
        let mut want = call.want.take().expect("room for the answer");
        let at = (h.chunk.start() + u64::from(h.offset)) as usize;
        let outcome = match (self.rng.random_range(0..20), body) {
            (0, _) => Err(PeerError::Unreachable { retry_after_ms: 100 }),
            (1, _) => Err(PeerError::Broken),
            (2..12, Some(object)) => {
                let end = ask.valid_bytes.min(object.body.len() as u64) as usize;
                let slot = &mut want.buf.bytes_mut()[want.range.clone()];
                let blocks = &mut slot[..h.length as usize];
                blocks.fill(0);
                let have = end.saturating_sub(at).min(blocks.len());
                blocks[..have].copy_from_slice(&object.body[at..at + have]);
                let crcs: Vec<u32> = blocks.chunks(4096).map(crc32c).collect();
                if self.rng.random_bool(0.2) {
                    let byte = self.rng.random_range(0..blocks.len());
                    blocks[byte] ^= 0x10;
                    self.lies += 1;
                } else {
                    self.tally.peer_reads += 1;
                }
                let body = encode_checksums(&crcs);
                Ok((h.reply(Status::Ok).with_body(&body).with_payload(h.length), body))
            }
            _ => Ok((h.reply(Status::NotHere), Vec::new())),
        };
        Answer { token: call.token, link: LinkId(1), outcome, buf: Some(want.buf) }
    }

    /// Everything in memory is gone; the device keeps what is durable and some of the rest.
    fn crash(&mut self) {
        self.tally.crashes += 1;
        self.count_what_the_core_did();
        self.trace(|| "CRASH".into());
        for command in std::mem::take(&mut self.in_flight) {
            match command {
                Command::Write { offset, buf, range, .. } => {
                    self.device.tear(offset, &buf.bytes()[range], &mut self.rng);
                }
                // A durable journal write that was under way: any prefix or mix of its blocks.
                Command::WriteMeta { offset, bytes, .. } => {
                    self.device.tear(offset, &bytes, &mut self.rng);
                }
                Command::SpillWrite { offset, buf, range, .. } => {
                    self.spill_write(offset, &buf.bytes()[range], true);
                }
                // A PUT may have arrived; the leader finds out by its nonce. Here it has not.
                _ => {}
            }
        }
        self.device.crash(&mut self.rng);
        let core = open(&mut self.device, &self.memory, self.spill.len() as u64);
        let old = std::mem::replace(&mut self.core, core);
        drop(old);
        assert_eq!(self.memory.out(), 0, "a core drops its buffers");
        self.lease(1_000_000_000);
        let lost = std::mem::take(&mut self.requests);
        self.files.node_restarted();
        let mut again: Vec<(u64, Outstanding)> = lost.into_iter().collect();
        again.sort_by_key(|(id, _)| *id);
        for (_, o) in again {
            self.ask_again(o);
        }
    }

    fn send(
        &mut self,
        role: Role,
        header: Header,
        body: Vec<u8>,
        payload: Option<Slot>,
        o: Outstanding,
    ) {
        let id = self.next_request;
        self.next_request += 1;
        let mut header = header.with_body(&body);
        header.request_id = id;
        let session = match role {
            Role::Client => o.session,
            _ => SessionId(0),
        };
        self.trace(|| format!("-> {} {header:?}", o.what.line()));
        self.requests.insert(id, o);
        let peer = PeerInfo { role, session, node: None };
        let request = Request { conn: ConnRef(1), peer, header, body, payload };
        self.core.handle(self.now, Event::Request(request));
        self.collect();
    }

    /// Says what happens, with `EBB_SIM_TRACE` set.
    fn trace(&self, text: impl FnOnce() -> String) {
        if self.traced {
            println!("    {:6} {}", self.now, text());
        }
    }

    fn control(&mut self, control: &Control, what: What) {
        let header = Header::request(Opcode::Control, 0);
        let o = Outstanding { session: SessionId(0), what };
        self.send(Role::Meta, header, codec::encode(control), None, o);
    }

    fn replied(&mut self, reply: Reply<Slot>) {
        let h = reply.header;
        let o = self.requests.remove(&h.request_id).expect("one reply per request");
        self.answer(o, h.status, reply);
    }
}

fn open(device: &mut Device, memory: &Memory, spill_bytes: u64) -> ShardCore<Slot> {
    let store = Store::open(device, CLUSTER).expect("recovers");
    let buffers = Box::new(memory.clone());
    // Small tables, so that forgetting is exercised.
    let limits = CoreLimits {
        flush_bytes: 8 << 20,
        uploads: 4,
        grants: 6,
        views: 3,
        dram_bytes: 1 << 20,
        spill_bytes,
        scrub_bytes_per_s: 64 << 20,
        scrub_rest_ms: 10,
    };
    ShardCore::new(store, key(), CLUSTER, limits, buffers)
}
