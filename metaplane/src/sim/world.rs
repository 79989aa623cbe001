//! A group of voters, each with a device, a life that may end at any moment, and what was seen of them.

use super::dice::Dice;
use super::disk::{Device, Lie, Power};
use super::net::Net;
use super::seen::Seen;
use crate::config::MetaConfig;
use crate::ground::Pace;
use crate::raft::Raft;
use crate::raft::kv::Reader as View;
use crate::voter::Voter;
use ebb_dataplane_protocol::ClusterId;
use ebb_namespace::{KvRead, Reader};
use ebb_s3::BucketConfig;
use openraft::ServerState;
use openraft::async_runtime::WatchReceiver;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// A rule that is taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Break {
    /// The disk does not keep what it says is stable.
    Disk(Lie),
    /// A client asks again under a new sequence, so that no reply is remembered for it.
    Replies,
    /// A leader answers reads without asking a majority.
    Reads,
    /// A voter that follows answers reads without asking the leader.
    Behind,
    /// A voter that lost its directory keeps its name.
    Lost,
}

/// A voter that runs.
pub(super) struct Life {
    pub(super) id: u64,
    pub(super) voter: Voter,
    pub(super) power: Arc<Power>,
    pub(super) slow_ms: Arc<AtomicU64>,
}

impl Life {
    fn raft(&self) -> &Raft {
        self.voter.raft()
    }
    /// Whether it believes to lead, and in which term.
    pub(super) fn leads(&self) -> Option<u64> {
        let metrics = self.raft().server_metrics();
        let m = metrics.borrow_watched();
        (m.state == ServerState::Leader).then_some(m.vote.leader_id.term)
    }
    /// The voters, if no change of them is under way.
    pub(super) fn settled_voters(&self) -> Option<Vec<u64>> {
        let metrics = self.raft().server_metrics();
        let m = metrics.borrow_watched();
        let members = m.membership_config.membership();
        let settled = m.membership_config == m.committed_membership_config
            && members.get_joint_config().len() == 1;
        settled.then(|| members.voter_ids().collect())
    }
    /// How many commands it has applied.
    pub(super) fn sequence(&self) -> u64 {
        self.voter.peek(|_, r| r.sequence().unwrap_or(0)).unwrap_or(0)
    }
    /// The same, and a digest of all of its state.
    fn digest(&self) -> Option<(u64, u64)> {
        let all = |view: &View<'_>, r: Reader<'_, View<'_>>| {
            let mut hash = 0xcbf2_9ce4_8422_2325u64;
            for (key, value) in view.scan(&[], &[0xff; 32], usize::MAX, false) {
                for byte in key.iter().chain(&[0xfe, 0xff]).chain(&value) {
                    hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
                }
            }
            (r.sequence().unwrap_or(0), hash)
        };
        self.voter.peek(all).ok()
    }
}

/// Where a voter may run.
pub(super) struct Node {
    pub(super) id: u64,
    pub(super) config: MetaConfig,
    pub(super) device: Device,
    pub(super) direct: bool,
    pub(super) pace: Pace,
    /// Added to the time that it stamps.
    pub(super) skew_ns: i64,
    pub(super) life: Option<Arc<Life>>,
    pub(super) starting: bool,
    /// It was removed from the group, or lost its directory: it does not run any more.
    pub(super) out: bool,
    /// It lost its directory.
    pub(super) lost: bool,
    /// The group knows it no more.
    pub(super) removed: bool,
}

impl Node {
    pub(super) fn is_down(&self) -> bool {
        self.life.is_none() && !self.starting && !self.out
    }
}

pub(super) struct World {
    pub(super) dice: Dice,
    pub(super) net: Net,
    pub(super) broken: Option<Break>,
    /// Clients ask voters that follow, too.
    pub(super) follows: bool,
    pub(super) seen: Mutex<Seen>,
    nodes: Mutex<BTreeMap<u64, Node>>,
    tally: Mutex<BTreeMap<&'static str, u64>>,
    failure: Mutex<Option<String>>,
    pub(super) calm: AtomicBool,
    /// Voters are being added or removed.
    pub(super) changing: AtomicBool,
    pub(super) started: Instant,
    traced: bool,
    snapshot_entries: u64,
    behind: u64,
    segment_bytes: u64,
    /// Clocks differ so much at most.
    skew_ns: u64,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn address(id: u64) -> String {
    format!("voter{id}:1")
}

impl World {
    pub(super) fn new(seed: u64, broken: Option<Break>) -> Arc<Self> {
        let dice = Dice::new(seed);
        let world = Self {
            net: Net::new(dice.clone()),
            broken,
            follows: !super::MENDED.contains(&seed),
            seen: Mutex::default(),
            nodes: Mutex::default(),
            tally: Mutex::default(),
            failure: Mutex::default(),
            calm: AtomicBool::new(false),
            changing: AtomicBool::new(false),
            started: Instant::now(),
            traced: std::env::var_os("EBB_SIM_TRACE").is_some(),
            snapshot_entries: dice.between(5, 60),
            behind: dice.below(20),
            segment_bytes: [4096, 8192, 32768][dice.below(3) as usize],
            skew_ns: [0, 1_000_000, 2_000_000_000][dice.below(3) as usize],
            dice,
        };
        let world = Arc::new(world);
        let founders = [1, 3, 3, 3, 3, 3, 5][world.dice.below(7) as usize];
        let members: BTreeMap<String, String> =
            (1..=founders).map(|id| (id.to_string(), address(id))).collect();
        for id in 1..=founders {
            world.make(id, members.clone(), false);
        }
        world
    }

    /// A node with an empty directory.
    pub(super) fn make(&self, id: u64, members: BTreeMap<String, String>, join: bool) {
        let (cluster, key) = (ClusterId(7), PathBuf::from("/key"));
        let bucket = BucketConfig::new("none");
        let mut config = MetaConfig::new("/meta", address(id), cluster, key, bucket);
        (config.node_id, config.members, config.join) = (id, members, join);
        config.snapshot_entries = self.snapshot_entries;
        config.cache_bytes = 1 << 20;
        let d = &self.dice;
        // Clocks run at different speeds: seen from outside, every timeout of a node is longer or shorter.
        let speed = d.between(70, 140);
        let pace = Pace {
            heartbeat_ms: speed,
            election_ms: (4 * speed, 8 * speed),
            entries_behind_snapshot: self.behind,
            segment_bytes: self.segment_bytes,
        };
        let node = Node {
            id,
            config,
            device: Device::default(),
            direct: d.chance(0.5),
            pace,
            skew_ns: d.between(0, 2 * self.skew_ns) as i64 - self.skew_ns as i64,
            life: None,
            starting: false,
            out: false,
            lost: false,
            removed: false,
        };
        self.nodes().insert(id, node);
    }

    pub(super) fn nodes(&self) -> MutexGuard<'_, BTreeMap<u64, Node>> {
        lock(&self.nodes)
    }
    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        lock(&self.seen)
    }
    pub(super) fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }
    pub(super) fn count(&self, what: &'static str) {
        *lock(&self.tally).entry(what).or_default() += 1;
        let first = what.bytes().fold(0u64, |h, b| h.wrapping_mul(31) + u64::from(b));
        self.dice.note(first ^ (self.now_ms() << 20));
    }
    pub(super) fn tally(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.tally).clone()
    }
    pub(super) fn trace(&self, text: impl FnOnce() -> String) {
        if self.traced {
            println!("  {:6} {}", self.now_ms(), text());
        }
    }
    /// Something that must never be was seen.
    pub(super) fn fail(&self, why: String) {
        self.trace(|| format!("FAILED: {why}"));
        lock(&self.failure).get_or_insert(why);
    }
    pub(super) fn failure(&self) -> Option<String> {
        lock(&self.failure).clone()
    }

    pub(super) fn lives(&self) -> Vec<Arc<Life>> {
        let nodes = self.nodes();
        nodes.values().filter_map(|n| n.life.clone()).filter(|l| l.power.is_on()).collect()
    }
    pub(super) fn life_at(&self, address: &str) -> Option<Arc<Life>> {
        let nodes = self.nodes();
        nodes.values().find(|n| n.config.listen == address).and_then(|n| n.life.clone())
    }
    pub(super) fn life(&self, id: u64) -> Option<Arc<Life>> {
        self.nodes().get(&id).and_then(|n| n.life.clone()).filter(|l| l.power.is_on())
    }
    /// Who believes to lead; of several, the one of the latest term.
    pub(super) fn leader(&self) -> Option<Arc<Life>> {
        self.lives().into_iter().filter(|l| l.leads().is_some()).max_by_key(|l| l.leads())
    }

    // --- what must always be ------------------------------------------------------------------------------

    /// A look at everybody.
    pub(super) fn look(self: &Arc<Self>, whole: bool) {
        let lives: Vec<Arc<Life>> = self.nodes().values().filter_map(|n| n.life.clone()).collect();
        for life in lives {
            if !life.power.is_on() {
                // Its disk lost power by itself.
                self.count("crashes in the middle of an operation");
                self.crash(life.id);
                continue;
            }
            let metrics = life.raft().metrics();
            let running = metrics.borrow_watched().running_state.clone();
            if let Err(e) = running {
                self.fail(format!("Raft of voter {} stopped: {e}", life.id));
            }
            if let Some(term) = life.leads() {
                life.voter.serve_term(term);
                if self.seen().leads(term, life.id) {
                    self.count("leads");
                }
            }
            if whole && let Some((sequence, digest)) = life.digest() {
                self.dice.note(digest);
                self.count("states compared");
                if let Err(e) = self.seen().state(sequence, digest, life.id) {
                    self.fail(e);
                }
            }
        }
    }

    /// Whether every voter runs and has applied the same.
    pub(super) fn agree(&self) -> bool {
        let Some(leader) = self.leader() else { return false };
        let wanted = leader.sequence();
        let voters = leader.voter.voters();
        let lost = |id| self.nodes().get(&id).is_none_or(|n| n.out || n.lost);
        let has = |id| self.life(id).is_some_and(|l| l.sequence() == wanted);
        voters.iter().all(|v| has(v.id) || lost(v.id))
    }

    /// In words.
    pub(super) fn state(&self) -> String {
        let all = self.lives().into_iter().map(|l| {
            let m = l.raft().metrics();
            let m = m.borrow_watched();
            format!("{}: {} commands, {}", l.id, l.sequence(), &*m)
        });
        all.collect::<Vec<_>>().join("; ")
    }

    /// Looks every few milliseconds for as long as the world is.
    pub(super) async fn watch(self: Arc<Self>) {
        for round in 0u64.. {
            self.look(round.is_multiple_of(60));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
