//! Drives one core: ring events into the shard core, its commands back into the ring.
//!
//! One turn: take completions, feed them to the core, let it close its batch, carry out its commands;
//! then one system call submits it all. Replies of a turn leave in one `sendmsg` per connection (the
//! ring gathers them). Only moves bytes and checks frames: every decision about data is the core's.

mod commands;
mod conn;
mod frames;
mod handshake;
mod link;
#[cfg(test)]
mod peer_tests;
mod peers;
mod slots;

use crate::clock;
use crate::core::{ConnRef, CoreLimits, Event as CoreEvent, JobDone, Report, ShardCore};
use crate::mover::JobSender;
use crate::resolve::ResolveSender;
use conn::{Conn, Lane};
use ebb_dataplane_protocol::{ClusterMap, ShardRef};
use ebb_ring::{
    Arena, Buf, ConnId, DeviceFile, Event, FileId, ListenerId, MailSender, Mailbox, Reactor,
    SetupError, TurnError, mailbox,
};
use ebb_store::Store;
pub(crate) use link::Caller;
use peers::Peers;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Messages that can wait for a core: one per job and the placements.
const MAILBOX_MAX: usize = 8192;
/// Longest sleep: housekeeping and the report happen this often.
const TICK_MS: u64 = 250;
/// Sleep while something waits that no completion will wake.
const RETRY_MS: u64 = 10;
/// How long a draining core waits for what is in progress.
const DRAIN_MS: u64 = 5000;

/// A message to a core.
#[derive(Debug)]
pub(crate) enum Mail {
    /// An S3 job ended.
    Job(JobDone<Buf>),
    /// Map and lease.
    Placement {
        /// This core.
        me: ShardRef,
        /// The map.
        map: Arc<ClusterMap>,
        /// On the clock of [`clock::now_ms`].
        lease_until_ms: u64,
    },
    /// A name was looked up.
    Resolved {
        /// The name.
        host: String,
        /// Its address, if it has one.
        ip: Option<IpAddr>,
    },
    /// Take nothing new, finish what there is, end.
    Drain,
    /// End now.
    Stop,
}

/// What a core is started with.
pub(crate) struct CoreSetup {
    pub(crate) index: u16,
    pub(crate) ring: ebb_ring::Config,
    pub(crate) listener: TcpListener,
    pub(crate) device: DeviceFile,
    /// For clean data that the device has no room for.
    pub(crate) spill: Option<DeviceFile>,
    pub(crate) store: Store,
    pub(crate) limits: CoreLimits,
    pub(crate) jobs: JobSender,
    pub(crate) report: Arc<Mutex<Report>>,
    /// Asks the heartbeat to beat now.
    pub(crate) refresh: Arc<tokio::sync::Notify>,
    /// This core, its store and its process, as other cores know them.
    pub(crate) caller: Caller,
    pub(crate) resolver: ResolveSender,
}

/// Why a core ended badly.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// The ring could not be set up.
    #[error("core {core}: {source}")]
    Setup {
        /// Which.
        core: u16,
        /// Why, and what to do.
        source: SetupError,
    },
    /// The ring refused the listener or the device.
    #[error("core {core}: the ring refused its {what}: {why}")]
    Refused {
        /// Which.
        core: u16,
        /// What.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// The ring stopped working.
    #[error("core {core}: {source}")]
    Turn {
        /// Which.
        core: u16,
        /// Why.
        source: TurnError,
    },
    /// A bug.
    #[error("core {core}: its thread panicked; the log says where")]
    Panicked {
        /// Which.
        core: u16,
    },
    /// The device failed: nothing it says is to be trusted.
    #[error(
        "core {core}: {why}: the node stops, its acked data is on the device up to the failure"
    )]
    Device {
        /// Which.
        core: u16,
        /// What failed.
        why: &'static str,
    },
}

/// One core's server.
pub(crate) struct Glue {
    index: u16,
    reactor: Reactor,
    core: ShardCore<Buf>,
    file: FileId,
    spill: Option<FileId>,
    listener: Option<ListenerId>,
    conns: HashMap<ConnRef, Conn>,
    /// The live connection of each lane.
    lanes: HashMap<Lane, ConnRef>,
    /// Connections that wait for a payload slot, oldest first.
    slotless: VecDeque<ConnRef>,
    /// Commands the ring or the mover had no room for.
    deferred: VecDeque<crate::core::Command<Buf>>,
    mail: Mailbox<Mail>,
    caller: Caller,
    peers: Peers,
    jobs: JobSender,
    report: Arc<Mutex<Report>>,
    refresh: Arc<tokio::sync::Notify>,
    now_ms: u64,
    tick_at_ms: u64,
    draining_since_ms: Option<u64>,
    stop: bool,
    failure: Option<&'static str>,
    zero_slab: &'static [u8],
}

/// Zeros that replies share.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

impl Glue {
    /// Builds a core on the calling thread, which must be the one that runs it.
    pub(crate) fn new(setup: CoreSetup) -> Result<(Self, MailSender<Mail>), CoreError> {
        let core = setup.index;
        let mut reactor =
            Reactor::new(setup.ring).map_err(|source| CoreError::Setup { core, source })?;
        let (sender, mail) = mailbox(MAILBOX_MAX, reactor.waker());
        let file = reactor.add_file(setup.device).map_err(|r| CoreError::Refused {
            core,
            what: "device file",
            why: r.why.to_string(),
        })?;
        let spill = setup.spill.map(|file| reactor.add_file(file)).transpose().map_err(|r| {
            CoreError::Refused { core, what: "spill device", why: r.why.to_string() }
        })?;
        let listener = reactor.add_listener(setup.listener).map_err(|r| CoreError::Refused {
            core,
            what: "listening socket",
            why: r.why.to_string(),
        })?;
        let mut limits = setup.limits;
        let dram = match limits.dram_bytes {
            0 => None,
            bytes => Arena::of_blocks(bytes as usize)
                .inspect_err(|errno| {
                    tracing::warn!(core, bytes, %errno, "no memory for copies of blocks; going on without");
                    limits.dram_bytes = 0;
                })
                .ok(),
        };
        let buffers = Box::new(slots::Slots::new(reactor.arena().clone(), dram));
        let Caller { key, cluster, .. } = &setup.caller;
        let (key, cluster) = (key, *cluster);
        let shard = ShardCore::new(setup.store, key.clone(), cluster, limits, buffers);
        let glue = Self {
            index: setup.index,
            reactor,
            core: shard,
            file,
            spill,
            listener: Some(listener),
            conns: HashMap::new(),
            lanes: HashMap::new(),
            slotless: VecDeque::new(),
            deferred: VecDeque::new(),
            mail,
            peers: Peers::new(setup.caller.clone(), setup.resolver),
            caller: setup.caller,
            jobs: setup.jobs,
            report: setup.report,
            refresh: setup.refresh,
            now_ms: clock::now_ms(),
            tick_at_ms: 0,
            draining_since_ms: None,
            stop: false,
            failure: None,
            zero_slab: &ZEROS,
        };
        Ok((glue, sender))
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) -> Result<(), CoreError> {
        let core = self.index;
        let mut events = Vec::with_capacity(1024);
        loop {
            let timeout = self.timeout();
            self.reactor
                .turn(Some(timeout), &mut events)
                .map_err(|source| CoreError::Turn { core, source })?;
            self.now_ms = clock::now_ms();
            for event in events.drain(..) {
                self.event(event);
            }
            self.feed_slotless();
            self.peers.expire(&mut self.reactor, self.now_ms);
            self.deliver_answers();
            self.core.end_turn(self.now_ms);
            self.carry_out();
            if self.now_ms >= self.tick_at_ms {
                self.tick();
            }
            if let Some(why) = self.failure {
                self.publish();
                return Err(CoreError::Device { core, why });
            }
            if self.done() {
                self.publish();
                return Ok(());
            }
        }
    }

    fn timeout(&self) -> Duration {
        let peers = self.peers.wake_at_ms().saturating_sub(self.now_ms).max(1);
        let ms = if self.core.has_ready_work() || self.peers.has_answers() {
            0
        } else if !self.deferred.is_empty() {
            1
        } else if self.core.wants_turn() || !self.slotless.is_empty() {
            RETRY_MS
        } else {
            self.tick_at_ms.saturating_sub(self.now_ms).clamp(1, TICK_MS)
        };
        Duration::from_millis(ms.min(peers))
    }

    /// What came of the core's calls. One that is refused at once is told in the next turn.
    fn deliver_answers(&mut self) {
        for answer in self.peers.take_answers() {
            self.core.handle(self.now_ms, CoreEvent::Answer(answer));
        }
    }

    /// An event of a connection to another core.
    fn peer_event(&mut self, event: Event) {
        let (peers, reactor, now) = (&mut self.peers, &mut self.reactor, self.now_ms);
        match event {
            Event::Connected { conn, result, .. } => peers.connected(reactor, conn, result, now),
            Event::Received { conn, buf, range, result, .. } => {
                peers.received(reactor, conn, buf, range, result, now);
            }
            Event::Sent { conn, segments, result, .. } => {
                drop(segments);
                peers.sent(reactor, conn, result, now);
            }
            Event::Closed { conn, .. } => peers.closed(reactor, conn, now),
            other => debug_assert!(false, "not of a connection: {other:?}"),
        }
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Connected { conn, .. }
            | Event::Received { conn, .. }
            | Event::Sent { conn, .. }
            | Event::Closed { conn, .. }
                if self.peers.owns(conn) =>
            {
                self.peer_event(event);
            }
            Event::Connected { .. } => debug_assert!(false, "only calls connect"),
            Event::Read { token, buf, range, result, .. } => {
                let ok = match result {
                    Ok(n) => n == range.len(),
                    Err(e) => {
                        tracing::warn!(core = self.index, error = %e, "device read failed");
                        false
                    }
                };
                let token = crate::core::Token(token.0);
                self.core.handle(self.now_ms, CoreEvent::Read { token, buf, ok });
            }
            Event::Written { file, token, result, segments, .. } if Some(file) == self.spill => {
                if let Err(error) = &result {
                    tracing::warn!(core = self.index, %error, "spill device write failed");
                }
                // The core takes the buffer again.
                drop(segments);
                let (token, ok) = (crate::core::Token(token.0), result.is_ok());
                self.core.handle(self.now_ms, CoreEvent::Written { token, ok });
            }
            Event::Written { token, result, .. } => {
                self.device_done(token.0, result.map_err(|e| e.to_string()));
            }
            Event::Synced { token, result, .. } => {
                self.device_done(token.0, result.map_err(|e| e.to_string()));
            }
            Event::Accepted { conn, peer, .. } => self.accepted(conn, peer),
            Event::AcceptFailed { errno, .. } => {
                tracing::warn!(core = self.index, %errno, "accept failed");
            }
            Event::Received { conn, buf, range, result, .. } => {
                self.received(conn, buf, range, result);
            }
            Event::Sent { conn, segments, .. } => {
                // The buffers go back to their pools here.
                drop(segments);
                self.sent(conn);
            }
            Event::Closed { conn, .. } => self.closed(conn),
            Event::Woken => self.take_mail(),
        }
    }

    fn device_done(&mut self, token: u64, result: Result<(), String>) {
        if let Err(error) = &result {
            tracing::error!(core = self.index, error, "device write failed");
        }
        let token = crate::core::Token(token);
        let ok = result.is_ok();
        if ok && self.core.batch_written(token) {
            self.carry_out();
            self.reactor.kick();
        }
        self.core.handle(self.now_ms, CoreEvent::Written { token, ok });
    }

    fn take_mail(&mut self) {
        while let Some(mail) = self.mail.try_recv() {
            match mail {
                Mail::Job(done) => self.core.handle(self.now_ms, CoreEvent::Job(done)),
                Mail::Resolved { host, ip } => {
                    self.peers.resolved(&mut self.reactor, &host, ip, self.now_ms);
                }
                Mail::Placement { me, map, lease_until_ms } => {
                    self.peers.set_map(&mut self.reactor, Arc::clone(&map), self.now_ms);
                    let event = CoreEvent::Placement { me, map, lease_until_ms };
                    self.core.handle(self.now_ms, event);
                    // The heartbeat acks this map from the report.
                    self.tick_at_ms = 0;
                }
                Mail::Drain => self.drain(),
                Mail::Stop => self.stop = true,
            }
        }
    }

    fn drain(&mut self) {
        if self.draining_since_ms.is_none() {
            self.draining_since_ms = Some(self.now_ms);
            if let Some(listener) = self.listener.take() {
                self.reactor.close_listener(listener);
            }
        }
    }

    fn done(&self) -> bool {
        let drained = self.draining_since_ms.is_some_and(|since| {
            let quiet = self.core.is_idle() && self.conns.values().all(|c| c.unsent() == 0);
            quiet || self.now_ms >= since + DRAIN_MS
        });
        self.stop || drained
    }

    fn tick(&mut self) {
        self.tick_at_ms = self.now_ms + TICK_MS;
        self.close_idle_handshakes();
        self.publish();
    }

    fn publish(&mut self) {
        self.core.stats.connections = self.conns.len() as u64;
        let report = self.core.report();
        // A poisoned lock only means that the reader died; the value is replaced whole.
        *self.report.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = report;
    }

    /// The ring's name of a connection as the core's.
    fn conn_ref(conn: ConnId) -> ConnRef {
        ConnRef(conn.to_bits())
    }
}
