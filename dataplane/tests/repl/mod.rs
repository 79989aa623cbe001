//! The world of the replication simulator: cores, devices, links, a metadata plane of one map.
#![allow(unreachable_pub)]

mod clients;
mod history;
mod troubles;

use super::device::Device;
use clients::{Files, Request as Asked, S3};
use ebb_dataplane::core::*;
use ebb_dataplane_protocol::auth::{ClusterKey, PeerHello, Role};
use ebb_dataplane_protocol::replica::{Shipped, Wish};
use ebb_dataplane_protocol::*;
use ebb_store::{AlignedBuf, Geometry, Identity, Store, format_device};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

pub const CLUSTER: ClusterId = ClusterId(3);
/// Groups with several members, the first ones; and one that is each node's alone.
pub const SHARED: u16 = 2;
const NODES: u32 = 3;
pub const PGS: u16 = SHARED + NODES as u16;
/// Seven MiB of it for data, so that there is an end of it.
const DEVICE_BYTES: u64 = 12 << 20;
/// Without an answer by then a call has failed.
const CALL_MS: u64 = 3_000;
const LEASE_MS: u64 = 400;
const DRIFT_MS: u64 = 50;

pub fn key() -> ClusterKey {
    ClusterKey::new([3; 32])
}

pub fn shard(node: u32) -> ShardRef {
    ShardRef { node: NodeId(node), core: CoreId(0) }
}

/// Memory without bounds: what buffers do when there are none is the other simulator's business.
struct Heap;

impl Buffers<AlignedBuf> for Heap {
    fn take(&mut self, bytes: usize, _: Purpose) -> Option<AlignedBuf> {
        let mut buf = AlignedBuf::zeroed(bytes.next_multiple_of(4096));
        buf.fill(0xaa);
        Some(buf)
    }
}

/// What happened in a run.
#[derive(Debug, Default)]
pub struct Tally {
    pub acked: u64,
    pub reads: u64,
    pub flushed: u64,
    pub aborted: u64,
    pub crashes: u64,
    pub torn: u64,
    pub losses: u64,
    pub partitions: u64,
    pub link_drops: u64,
    pub late_frames: u64,
    pub takeovers: u64,
    pub demoted_in_sync: u64,
    pub drops: u64,
    pub planned_drops: u64,
    pub adds: u64,
    pub joins: u64,
    pub void_wishes: u64,
    pub cuts: u64,
    pub removed: u64,
    pub hand_overs: u64,
    pub thaws: u64,
    pub lost_replies: u64,
    pub old_maps: u64,
    pub slow_links: u64,
    pub fills: u64,
    pub full: u64,
    pub no_space: u64,
    /// Only of the scenarios with a member that stays full.
    pub full_for_long: u64,
    pub discards: u64,
    pub relapses: u64,
}

impl Tally {
    /// Whether every kind of trouble was met.
    pub fn everything_happened(&self) -> bool {
        [
            self.acked,
            self.reads,
            self.flushed,
            self.aborted,
            self.crashes,
            self.torn,
            self.losses,
            self.partitions,
            self.link_drops,
            self.late_frames,
            self.takeovers,
            self.demoted_in_sync,
            self.drops,
            self.planned_drops,
            self.adds,
            self.joins,
            self.void_wishes,
            self.cuts,
            self.removed,
            self.hand_overs,
            self.thaws,
            self.lost_replies,
            self.old_maps,
            self.slow_links,
            self.fills,
            self.full,
            self.no_space,
            self.discards,
            self.relapses,
        ]
        .iter()
        .all(|n| *n > 0)
    }

    pub fn add(&mut self, o: &Tally) {
        self.acked += o.acked;
        self.reads += o.reads;
        self.flushed += o.flushed;
        self.aborted += o.aborted;
        self.crashes += o.crashes;
        self.torn += o.torn;
        self.losses += o.losses;
        self.partitions += o.partitions;
        self.link_drops += o.link_drops;
        self.late_frames += o.late_frames;
        self.takeovers += o.takeovers;
        self.demoted_in_sync += o.demoted_in_sync;
        self.drops += o.drops;
        self.planned_drops += o.planned_drops;
        self.adds += o.adds;
        self.joins += o.joins;
        self.void_wishes += o.void_wishes;
        self.cuts += o.cuts;
        self.removed += o.removed;
        self.hand_overs += o.hand_overs;
        self.thaws += o.thaws;
        self.lost_replies += o.lost_replies;
        self.old_maps += o.old_maps;
        self.slow_links += o.slow_links;
        self.fills += o.fills;
        self.full += o.full;
        self.no_space += o.no_space;
        self.discards += o.discards;
        self.relapses += o.relapses;
    }
}

struct Node {
    device: Device,
    core: Option<ShardCore<AlignedBuf>>,
    in_flight: Vec<Command<AlignedBuf>>,
    /// The latest end of a lease it was given.
    lease_until: u64,
    /// Of the metadata plane.
    cut_off: bool,
    /// Comes back then, if it is down.
    back_at: u64,
    /// It asked for the map.
    refresh: bool,
}

/// One connection from one core to another.
struct Link {
    id: LinkId,
    calls: VecDeque<Call<AlignedBuf>>,
    /// Delivered, not answered: request id and the caller's token.
    served: BTreeMap<u64, Token>,
    answers: VecDeque<(Token, Header, Vec<u8>)>,
    /// When each of those without an answer was sent.
    sent: BTreeMap<Token, u64>,
}

/// What was sent on a link that is over.
type Late = (LinkId, VecDeque<Call<AlignedBuf>>);

pub struct World {
    pub rng: SmallRng,
    pub now: u64,
    nodes: BTreeMap<u32, Node>,
    links: BTreeMap<(u32, u32), Link>,
    /// What was sent on links that their caller gave up, and may arrive until the next link's first frame does.
    late: BTreeMap<(u32, u32), Late>,
    cut_links: BTreeSet<(u32, u32)>,
    /// These deliver little.
    slow_links: BTreeSet<(u32, u32)>,
    /// These end often.
    flaky_links: BTreeSet<(u32, u32)>,
    next_link: u64,
    next_request: u64,
    /// Number of the last event that a client saw.
    event: u64,
    pub map: ClusterMap,
    /// Members that a group is to have.
    copies: usize,
    /// How often a node has a heartbeat, in each turn.
    beat: f64,
    /// Completions and messages of a turn, at most.
    pace: usize,
    /// What was asked of the metadata plane, and when it gets to it; `true`: to make in-sync.
    wishes: Vec<(u64, bool, Wish)>,
    /// Groups that are being handed over.
    hand_overs: BTreeMap<usize, troubles::HandOver>,
    /// Troubles that follow others, and when.
    soon: Vec<(u64, troubles::Soon)>,
    /// Nodes that are to drop a group, as of an epoch, and when they hear of it.
    discards: Vec<(u64, u32, PgId, PgEpoch)>,
    /// What clients and the leader asked.
    asked: BTreeMap<u64, (u32, Asked)>,
    pub s3: S3,
    pub files: Files,
    traced: bool,
    calm: bool,
    /// No members but those that are missing.
    steady: bool,
    pub tally: Tally,
}

fn copy_of(call: &Call<AlignedBuf>) -> Call<AlignedBuf> {
    Call {
        token: call.token,
        peer: call.peer,
        channel: call.channel,
        link: call.link,
        header: call.header,
        body: call.body.clone(),
        payload: call.payload.clone(),
        want: None,
        timeout_ms: call.timeout_ms,
    }
}

fn open(device: &mut Device) -> ShardCore<AlignedBuf> {
    let store = Store::open(device, CLUSTER).expect("recovers");
    let limits = CoreLimits { dram_bytes: 256 << 10, ..CoreLimits::default() };
    ShardCore::new(store, key(), CLUSTER, limits, Box::new(Heap))
}

fn fresh(node: u32, store: u128) -> Device {
    let mut device = Device::new(DEVICE_BYTES);
    let geometry = Geometry::for_device(DEVICE_BYTES).expect("large enough");
    let identity =
        Identity { cluster: CLUSTER, store, node: NodeId(node), core: CoreId(0), pg_count: PGS };
    format_device(&mut device, geometry, identity).expect("formats");
    device
}

impl World {
    pub fn new(seed: u64) -> Self {
        let pg = |members: &[u32]| PgEntry {
            epoch: PgEpoch(1),
            members: members.iter().map(|n| shard(*n)).collect(),
            syncing: Vec::new(),
            since_map_version: MapVersion(1),
            windows_since: PgEpoch(0),
            min_in_sync: 0,
            moving: false,
        };
        let map = ClusterMap {
            version: MapVersion(1),
            cluster: CLUSTER,
            pgs: vec![pg(&[1, 2]), pg(&[2, 3]), pg(&[1]), pg(&[2]), pg(&[3])],
            ..ClusterMap::default()
        };
        let nodes = (1..=NODES).map(|n| {
            let mut device = fresh(n, u128::from(n));
            let core = Some(open(&mut device));
            let node = Node {
                device,
                core,
                in_flight: Vec::new(),
                lease_until: 0,
                cut_off: false,
                back_at: 0,
                refresh: false,
            };
            (n, node)
        });
        let mut rng = SmallRng::seed_from_u64(seed);
        let files = Files::new(&map, &mut rng);
        let mut world = Self {
            copies: if rng.random_bool(0.5) { 3 } else { 2 },
            beat: [0.03, 0.03, 0.01][rng.random_range(0..3)],
            pace: [8, 20, 50][rng.random_range(0..3)],
            rng,
            now: 1,
            nodes: nodes.collect(),
            links: BTreeMap::new(),
            late: BTreeMap::new(),
            wishes: Vec::new(),
            hand_overs: BTreeMap::new(),
            soon: Vec::new(),
            discards: Vec::new(),
            slow_links: BTreeSet::new(),
            flaky_links: BTreeSet::new(),
            event: 0,
            cut_links: BTreeSet::new(),
            next_link: 1,
            next_request: 1,
            map,
            asked: BTreeMap::new(),
            s3: S3::default(),
            files,
            traced: std::env::var_os("EBB_SIM_TRACE").is_some(),
            calm: false,
            steady: false,
            tally: Tally::default(),
        };
        world.heartbeats();
        world
    }

    /// Writes of shared groups need two in-sync members.
    pub fn require_two(&mut self) {
        self.map.pgs[..usize::from(SHARED)].iter_mut().for_each(|e| e.min_in_sync = 2);
        self.heartbeats();
    }

    /// Of what clients see, one after the other.
    fn tick(&mut self) -> u64 {
        self.event += 1;
        self.event
    }

    pub fn trace(&self, text: impl FnOnce() -> String) {
        if self.traced {
            println!("    {:6} {}", self.now, text());
        }
    }

    pub fn run(&mut self, steps: usize) {
        for _ in 0..steps {
            match self.rng.random_range(0..1000) {
                0..200 => self.client_step(),
                200..240 => self.leader_step(),
                240..246 => self.trouble(),
                246..270 => self.meta_step(),
                270..285 => self.hand_over_step(),
                _ => self.turn(),
            }
        }
    }

    // --- time, devices, network ---------------------------------------------------------------------

    fn turn(&mut self) {
        self.now += self.rng.random_range(0..6);
        for n in 1..=NODES {
            let soon = self.nodes[&n].refresh && self.rng.random_bool(0.1);
            if soon || self.rng.random_bool(self.beat) {
                self.heartbeat(n);
            }
        }
        self.what_follows();
        self.ask_again();
        if self.rng.random_bool(0.1) {
            self.drive_ballast();
        }
        for _ in 0..self.rng.random_range(1..self.pace) {
            self.one_thing();
        }
        self.time_out();
        let alive: Vec<u32> =
            self.nodes.iter().filter(|n| n.1.core.is_some()).map(|n| *n.0).collect();
        for n in alive {
            if self.calm || self.rng.random_bool(0.7) {
                self.end_turn(n);
            }
        }
        let back: Vec<u32> = self
            .nodes
            .iter()
            .filter(|(_, n)| n.core.is_none() && n.back_at <= self.now)
            .map(|n| *n.0)
            .collect();
        for n in back {
            self.trace(|| format!("node {n} is back"));
            let node = self.nodes.get_mut(&n).expect("known");
            node.core = Some(open(&mut node.device));
            self.registered(n);
            self.relapse(n);
        }
    }

    /// Calls without an answer fail, and with them what else is on their link.
    fn time_out(&mut self) {
        let now = self.now;
        let late = |l: &Link| l.sent.values().any(|sent| sent + CALL_MS < now);
        let late: Vec<_> = self.links.iter().filter(|l| late(l.1)).map(|l| *l.0).collect();
        late.into_iter().for_each(|pair| self.break_link(pair));
    }

    /// A new process registers: what the old one asked for is void where it leads others (R45).
    fn registered(&mut self, n: u32) {
        for at in 0..usize::from(SHARED) {
            let e = &self.map.pgs[at];
            if e.primary() == Some(shard(n)) && e.members.len() + e.syncing.len() > 1 {
                let version = MapVersion(self.map.version.0 + 1);
                self.change(at, |e| e.since_map_version = version);
            }
        }
    }

    fn end_turn(&mut self, n: u32) {
        let now = self.now;
        if let Some(core) = self.nodes.get_mut(&n).and_then(|node| node.core.as_mut()) {
            core.end_turn(now);
            self.collect(n);
        }
    }

    fn handle(&mut self, n: u32, event: Event<AlignedBuf>) {
        let now = self.now;
        if let Some(core) = self.nodes.get_mut(&n).and_then(|node| node.core.as_mut()) {
            core.handle(now, event);
            self.collect(n);
        }
    }

    fn collect(&mut self, n: u32) {
        let Some(node) = self.nodes.get_mut(&n) else { return };
        let Some(core) = node.core.as_mut() else { return };
        let commands: Vec<Command<AlignedBuf>> = core.drain().collect();
        for command in commands {
            match command {
                Command::Reply(reply) => self.replied(n, reply),
                Command::RefreshMap => self.nodes.get_mut(&n).expect("known").refresh = true,
                Command::Failed(why) => panic!("no device fails here: {why}"),
                Command::Call(call) => self.call(n, call),
                Command::Sync { token } => {
                    let node = self.nodes.get_mut(&n).expect("known");
                    node.device.sync_all();
                    node.in_flight.push(Command::Sync { token });
                }
                other => self.nodes.get_mut(&n).expect("known").in_flight.push(other),
            }
        }
    }

    /// A device completion, a delivery, or an answer: whatever the seed picks.
    fn one_thing(&mut self) {
        let n = self.rng.random_range(1..=NODES);
        if self.rng.random_bool(0.5) {
            let node = self.nodes.get_mut(&n).expect("known");
            if !node.in_flight.is_empty() {
                let i = self.rng.random_range(0..node.in_flight.len());
                let command = node.in_flight.swap_remove(i);
                self.complete(n, command);
            }
            return;
        }
        let pairs: Vec<(u32, u32)> = self.links.keys().copied().collect();
        if pairs.is_empty() {
            return;
        }
        let pair = pairs[self.rng.random_range(0..pairs.len())];
        if self.cut_links.contains(&pair) || self.cut_links.contains(&(pair.1, pair.0)) {
            // Nothing gets through; after a while somebody's patience ends.
            if self.rng.random_bool(0.02) || self.calm {
                self.break_link(pair);
            }
            return;
        }
        if !self.calm && self.flaky_links.contains(&pair) && self.rng.random_bool(0.04) {
            return self.link_failed(pair);
        }
        if !self.calm && self.slow_links.contains(&pair) && self.rng.random_bool(0.93) {
            return;
        }
        if self.rng.random_bool(0.05) {
            self.deliver_late(pair);
        }
        if self.rng.random_bool(0.5) {
            self.deliver(pair);
        } else {
            let link = self.links.get_mut(&pair).expect("known");
            if let Some((token, header, body)) = link.answers.pop_front() {
                link.sent.remove(&token);
                let id = link.id;
                let outcome = Ok((header, body));
                self.handle(pair.0, Event::Answer(Answer { token, link: id, outcome, buf: None }));
            }
        }
    }

    fn call(&mut self, from: u32, call: Call<AlignedBuf>) {
        let pair = (from, call.peer.node.0);
        let known = self.links.get(&pair).map(|l| l.id);
        let elsewhere = call.header.opcode != Opcode::Replicate;
        if elsewhere || (call.link.is_some() && call.link != known) {
            // Its answer comes later, never before the call itself returned.
            self.nodes.get_mut(&from).expect("known").in_flight.push(Command::Call(call));
            return;
        }
        let next = &mut self.next_link;
        let link = self.links.entry(pair).or_insert_with(|| {
            *next += 1;
            Link {
                id: LinkId(*next),
                calls: VecDeque::new(),
                served: BTreeMap::new(),
                answers: VecDeque::new(),
                sent: BTreeMap::new(),
            }
        });
        link.sent.insert(call.token, self.now);
        link.calls.push_back(call);
    }

    fn deliver(&mut self, pair: (u32, u32)) {
        if self.nodes[&pair.1].core.is_none() {
            return self.break_link(pair);
        }
        let Some(link) = self.links.get_mut(&pair) else { return };
        let Some(call) = link.calls.pop_front() else { return };
        // A newer connection ends the older before anything of it is taken (R41).
        self.late.remove(&pair);
        self.next_request += 1;
        let id = self.next_request;
        link.served.insert(id, call.token);
        let conn = ConnRef(link.id.0);
        self.hand_over(pair, conn, id, call);
    }

    /// A frame of a link that the caller has given up.
    fn deliver_late(&mut self, pair: (u32, u32)) {
        let Some((link, calls)) = self.late.get_mut(&pair) else { return };
        let (conn, Some(call)) = (ConnRef(link.0), calls.pop_front()) else { return };
        if self.nodes[&pair.1].core.is_some() {
            self.tally.late_frames += 1;
            self.next_request += 1;
            self.hand_over(pair, conn, self.next_request, call);
            self.relapse(pair.0);
        }
    }

    fn hand_over(&mut self, pair: (u32, u32), conn: ConnRef, id: u64, call: Call<AlignedBuf>) {
        self.trace(|| match codec::decode::<Shipped>(&call.body) {
            Ok(s) => format!(
                "{} to {}: group {} stream {}.{} {:?}",
                pair.0, pair.1, s.pg.0, s.stream, s.place, s.ship
            ),
            Err(e) => format!("{e}"),
        });
        let mut bytes: Vec<u8> = Vec::new();
        for (buf, range) in &call.payload {
            bytes.extend_from_slice(&buf[range.clone()]);
        }
        assert_eq!(bytes.len(), call.header.payload_bytes as usize);
        let payload = (!bytes.is_empty()).then(|| {
            let mut buf = AlignedBuf::zeroed(bytes.len().next_multiple_of(4096));
            buf[..bytes.len()].copy_from_slice(&bytes);
            buf
        });
        let mut header = call.header.with_body(&call.body);
        header.request_id = id;
        let hello =
            PeerHello { from: shard(pair.0), store: 0, boot: 0, to: shard(pair.1), to_store: 0 };
        let peer = PeerInfo { role: Role::Node, session: SessionId(0), node: Some(hello) };
        let request = Request { conn, peer, header, body: call.body, payload };
        self.handle(pair.1, Event::Request(request));
    }

    fn break_link(&mut self, pair: (u32, u32)) {
        let Some(mut link) = self.links.remove(&pair) else { return };
        if self.nodes[&pair.1].core.is_some() && self.rng.random_bool(0.5) {
            let calls = link.calls.iter().map(copy_of).collect();
            self.late.insert(pair, (link.id, calls));
        }
        let waiting = link.calls.iter().map(|c| c.token).chain(link.served.into_values());
        let answered = link.answers.iter().map(|a| a.0);
        let tokens: Vec<Token> = waiting.chain(answered).collect();
        link.calls.clear();
        for token in tokens {
            let outcome = Err(PeerError::Broken);
            self.handle(pair.0, Event::Answer(Answer { token, link: link.id, outcome, buf: None }));
        }
    }

    fn replied(&mut self, n: u32, reply: Reply<AlignedBuf>) {
        let id = reply.header.request_id;
        if let Some((_, asked)) = self.asked.remove(&id) {
            // The client's connection ended before it got there.
            if !self.calm && self.rng.random_bool(0.08) {
                self.tally.lost_replies += 1;
                return self.lost(asked);
            }
            return self.answered(asked, reply);
        }
        let link = self.links.values_mut().find(|l| ConnRef(l.id.0) == reply.conn);
        if let Some(link) = link
            && let Some(token) = link.served.remove(&id)
        {
            link.answers.push_back((token, reply.header, reply.body));
        }
        let _ = n;
    }

    fn complete(&mut self, n: u32, command: Command<AlignedBuf>) {
        let node = self.nodes.get_mut(&n).expect("known");
        match command {
            Command::Read { token, offset, mut buf, range } => {
                node.device.read(offset, &mut buf[range]);
                self.handle(n, Event::Read { token, buf, ok: true });
            }
            Command::Write { token, offset, buf, range } => {
                node.device.write(offset, &buf[range], false);
                drop(buf);
                self.handle(n, Event::Written { token, ok: true });
            }
            Command::WriteMeta { token, offset, bytes, durable } => {
                node.device.write(offset, &bytes, durable);
                // As the reactor's side does, and as one does that knows nothing of it.
                if token.0.is_multiple_of(2)
                    && let Some(core) = self.nodes.get_mut(&n).and_then(|node| node.core.as_mut())
                {
                    core.batch_written(token);
                }
                self.handle(n, Event::Written { token, ok: true });
            }
            Command::Sync { token } => self.handle(n, Event::Written { token, ok: true }),
            Command::Job(job) => {
                let done = self.s3_call(job);
                self.handle(n, Event::Job(done));
            }
            // Its link was gone when it was made, or it asks a former holder: nobody is there.
            Command::Call(call) => {
                let (link, outcome) = match call.link {
                    Some(link) => (link, Err(PeerError::Broken)),
                    None => (LinkId(0), Err(PeerError::Unreachable { retry_after_ms: 100 })),
                };
                let buf = call.want.map(|w| w.buf);
                let answer = Answer { token: call.token, link, outcome, buf };
                self.handle(n, Event::Answer(answer));
            }
            Command::SpillRead { .. } | Command::SpillWrite { .. } => {
                unreachable!("no spill device")
            }
            Command::Reply(_) | Command::RefreshMap | Command::Failed(_) => unreachable!(),
        }
    }

    // --- requests -------------------------------------------------------------------------------------

    pub fn ask(
        &mut self,
        n: u32,
        role: Role,
        session: SessionId,
        frame: (Header, Vec<u8>, Option<AlignedBuf>),
        asked: Asked,
    ) {
        if self.nodes[&n].core.is_none() {
            return self.lost(asked);
        }
        self.next_request += 1;
        let id = self.next_request;
        let mut header = frame.0.with_body(&frame.1);
        header.request_id = id;
        self.asked.insert(id, (n, asked));
        let peer = PeerInfo { role, session, node: None };
        let request = Request { conn: ConnRef(0), peer, header, body: frame.1, payload: frame.2 };
        self.handle(n, Event::Request(request));
    }

    pub fn primary(&self, pg: PgId) -> Option<u32> {
        Some(self.map.pgs[usize::from(pg.0)].primary()?.node.0)
    }

    // --- the end ---------------------------------------------------------------------------------------

    /// Everything heals; all is settled; every cell is read at every member in turn.
    pub fn heal_and_check(&mut self) {
        self.calm = true;
        self.cut_links.clear();
        for n in self.nodes.values_mut() {
            n.cut_off = false;
            if n.back_at != u64::MAX {
                n.back_at = 0;
            }
        }
        self.late.clear();
        self.soon.clear();
        self.slow_links.clear();
        self.flaky_links.clear();
        self.settle("after healing");
        self.check_all("after healing");
        // The other members have to be able to go on alone.
        for round in 0..3 {
            // A primary that is there gives its place away, whatever it went through. A member that comes
            // meanwhile makes the attempt void.
            for at in 0..usize::from(SHARED) {
                let what = format!("round {round}, group {at} is handed over");
                let before = self.tally.hand_overs;
                for _ in 0..20 {
                    self.begin_hand_over(at);
                    self.settle(&what);
                    if self.tally.hand_overs > before {
                        break;
                    }
                }
                assert!(self.tally.hand_overs > before, "{what}, in vain");
            }
            self.check_all(&format!("round {round}, handed over"));
            for at in 0..usize::from(SHARED) {
                if self.map.pgs[at].members.len() < 2 {
                    continue;
                }
                let version = MapVersion(self.map.version.0 + 1);
                self.change(at, |e| {
                    let first = e.members.remove(0);
                    e.syncing.push(first);
                    e.since_map_version = version;
                });
            }
            // The old primaries are fenced first, as a leader would see to.
            self.now += LEASE_MS + DRIFT_MS;
            let what = format!("round {round} of other primaries");
            self.settle(&what);
            self.check_all(&what);
            self.check_holdings();
        }
    }

    /// Everything that was asked for is done; nobody is added or replaced meanwhile.
    fn retry_until_quiet(&mut self) {
        for i in 0..200_000 {
            if self.asked.is_empty() && self.files.quiet() {
                return;
            }
            if i % 50 == 0 {
                self.heartbeats();
                self.retry_all();
            }
            self.turn();
        }
        panic!("asked {:?} files {}", self.asked, self.files.busy());
    }

    fn settle(&mut self, what: &str) {
        for i in 0..200_000 {
            if i % 10 == 0 {
                self.heartbeats();
                self.meta_step();
                (0..usize::from(SHARED)).for_each(|at| self.drive_hand_over(at));
            }
            if i % 50 == 0 {
                self.retry_all();
            }
            self.turn();
            let shared = &self.map.pgs[..usize::from(SHARED)];
            let whole = shared.iter().all(|e| e.members.len() >= 2 && e.syncing.is_empty());
            let idle = self
                .nodes
                .values()
                .all(|n| n.in_flight.is_empty() && n.core.as_ref().is_some_and(|c| c.is_idle()));
            let quiet = self.links.values().all(|l| l.calls.is_empty() && l.answers.is_empty());
            let settled = self.hand_overs.is_empty();
            if whole && idle && quiet && settled && self.asked.is_empty() && self.files.quiet() {
                return;
            }
        }
        for (n, node) in &self.nodes {
            if let Some(core) = &node.core {
                println!("node {n}: {} {:?}", core.in_progress(), core.report().wishes);
            }
        }
        panic!(
            "stuck {what}: {:?} asked {:?} files {}",
            self.map.pgs,
            self.asked,
            self.files.busy()
        );
    }
}
