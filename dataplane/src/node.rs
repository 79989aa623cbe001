//! A data node's process: shards, listeners, registration, cores, mover, heartbeat; and its end.
//!
//! Order at the start: shards are opened or zero-filled, spill devices opened, ports bound, then the node registers (which
//! names it and says how many placement groups there are), then new shards are formatted and the cores
//! start. Nothing is served before the first lease. At the end: no new frames, what is in progress is
//! finished, the rings drain.

use crate::clock;
use crate::config::{ConfigError, NodeConfig};
use crate::core::{CoreLimits, Report};
use crate::heartbeat::{self, Heartbeat, HeartbeatError, Registration};
use crate::mover;
use crate::reactor_glue::{Caller, CoreError, CoreSetup, Glue, Mail};
use crate::resolve;
use crate::shards::{DirectoryLock, Shard, ShardError};
use crate::spill_file::{self, SpillError};
use ebb_dataplane_protocol::auth::Role;
use ebb_dataplane_protocol::{CoreId, NodeId, ShardRef};
use ebb_ring::{DeviceFile, MailSender};
use ebb_rpc::{Identity, MetaClient};
use ebb_s3::{Bucket, BucketConfig};
use serde::Serialize;
use std::future::Future;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use tokio::sync::{Notify, mpsc, watch};

/// Upload bodies in memory, for all cores of a node.
const FLUSH_BYTES: u64 = 48 << 20;
/// Least share of a core of either.
const SHARE_MIN: u64 = 16 << 20;
/// How often, and how far apart, a port in use is tried again.
const BIND_TRIES: u32 = 100;
const BIND_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);
/// Connections of a core.
const CONNS_MAX: u32 = 1024;

/// Why a node does not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A shard file.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// A spill device.
    #[error(transparent)]
    Spill(#[from] SpillError),
    /// A port.
    #[error("cannot listen on {address}: {source}; choose another port, or 0 for any")]
    Listen {
        /// host:port
        address: String,
        /// Why.
        source: std::io::Error,
    },
    /// The metadata plane.
    #[error(transparent)]
    Heartbeat(#[from] HeartbeatError),
    /// The bucket's configuration as the metadata plane gave it.
    #[error("the bucket's configuration cannot be read: {0}")]
    Bucket(serde_json::Error),
    /// A core.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// A core's thread.
    #[error("core {core}: {reason}")]
    Thread {
        /// Which.
        core: u16,
        /// Why.
        reason: String,
    },
    /// The ready file.
    #[error("cannot write {path}: {source}")]
    ReadyFile {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel gave no randomness.
    #[error("no randomness: {0}")]
    Random(String),
}

/// What the ready file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Ready {
    /// The node's id.
    pub node: u32,
    /// Where it listens.
    pub host: String,
    /// One per core.
    pub ports: Vec<u16>,
    /// The process.
    pub pid: u32,
}

/// Ends when the process is told to stop: SIGTERM or SIGINT.
pub async fn shutdown_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without handlers the signals' default ends the process.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

fn random() -> Result<u128, NodeError> {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).map_err(|e| NodeError::Random(e.to_string()))?;
    Ok(u128::from_le_bytes(bytes))
}

/// A future on the heap. The node's is made in this crate, so that its code is compiled here once and
/// not again in every program and test that runs a node.
type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Runs a node until `shutdown` ends, it is superseded, or a core fails.
pub fn run(
    config: NodeConfig,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Pin<Box<dyn Future<Output = Result<(), NodeError>> + Send>> {
    boxed(config, Box::pin(shutdown))
}

fn boxed(config: NodeConfig, shutdown: Boxed<()>) -> Boxed<Result<(), NodeError>> {
    Box::pin(serve(config, shutdown))
}

async fn serve(config: NodeConfig, shutdown: Boxed<()>) -> Result<(), NodeError> {
    config.check()?;
    let key = config.key()?;
    let cluster = config.cluster_id()?;

    let prepare = config.clone();
    // The lock is held as long as the node runs.
    let (_lock, shards, spills) = blocking(0, move || prepare_devices(&prepare)).await??;
    let store = match shards.iter().find_map(Shard::store_id) {
        Some(store) => store,
        None => random()?,
    };
    let binding = config.clone();
    let (listeners, ports) = blocking(0, move || listen(&binding)).await??;
    let who = Registration {
        store,
        host: config.host().to_owned(),
        ports: ports.clone(),
        capacity_bytes: shards.iter().map(Shard::capacity_bytes).sum(),
        boot: random()?,
    };
    let identity = Identity { cluster, ..Identity::new(key.clone(), Role::Data) };
    let meta = MetaClient::new(config.meta.clone(), identity);
    let mut shutdown = std::pin::pin!(shutdown);
    let registered = tokio::select! {
        registered = heartbeat::register(&meta, &who) => registered?,
        () = &mut shutdown => return Ok(()),
    };
    let node = registered.node;
    let pg_count = registered.map.pg_count();
    let bucket_config: BucketConfig =
        serde_json::from_str(&registered.bucket_config).map_err(NodeError::Bucket)?;
    tracing::info!(%node, ?ports, pg_count, "registered");

    let (job_senders, job_queue) = mover::queue(shards.len());
    let (resolvers, resolve_queue) = resolve::queue(shards.len());
    let (bucket_tx, bucket_rx) = watch::channel(None);
    let mailboxes: mover::Mailboxes = Arc::new(OnceLock::new());
    let refresh = Arc::new(Notify::new());
    let reports: Vec<Arc<Mutex<Report>>> = shards.iter().map(|_| Arc::default()).collect();
    let (ended_tx, mut ended) = mpsc::unbounded_channel();

    // All shards before the first core: one that is refused finds none of the others at work.
    let mut opened = Vec::with_capacity(shards.len());
    for (i, shard) in shards.into_iter().enumerate() {
        let core = i as u16;
        let whose = ebb_store::Identity { cluster, store, node, core: CoreId(core), pg_count };
        opened.push(blocking(core, move || shard.open(whose)).await??);
    }
    let mut cores = Vec::with_capacity(opened.len());
    let devices = opened.into_iter().zip(spills);
    let parts = devices.zip(listeners).zip(job_senders).zip(resolvers).zip(&reports);
    for (i, ((((((device, mut shard), spill), listener), jobs), resolver), report)) in
        parts.enumerate()
    {
        let core = i as u16;
        let start = Start {
            core,
            cpu: config.cpus.get(i).copied(),
            index_bytes: config.index_bytes,
            dram_bytes: config.dram_bytes,
            spill_bytes: spill.as_ref().map_or(0, |(_, bytes)| *bytes),
            scrub_bytes_per_s: config.scrub_bytes_per_s,
            scrub_rest_ms: config.scrub_rest_s.saturating_mul(1000),
            cores: u64::from(config.cores),
            node,
        };
        let ring = ring_config(&config);
        let (report, refresh) = (Arc::clone(report), Arc::clone(&refresh));
        let me = ShardRef { node, core: CoreId(core) };
        let caller = Caller { key: key.clone(), cluster, me, store, boot: who.boot };
        let ended_tx = ended_tx.clone();
        let started = blocking(core, move || -> Result<_, NodeError> {
            shard.set_memory_limit((start.index_bytes / start.cores).max(SHARE_MIN));
            let setup = CoreSetup {
                index: core,
                ring,
                listener,
                device,
                spill: spill.map(|(file, _)| file),
                store: shard,
                limits: CoreLimits {
                    flush_bytes: (FLUSH_BYTES / start.cores).max(SHARE_MIN),
                    dram_bytes: start.dram_bytes / start.cores,
                    spill_bytes: start.spill_bytes,
                    scrub_bytes_per_s: start.scrub_bytes_per_s,
                    scrub_rest_ms: start.scrub_rest_ms,
                    ..CoreLimits::default()
                },
                jobs,
                report,
                refresh,
                caller,
                resolver,
            };
            start_core(start, setup, ended_tx)
        })
        .await??;
        cores.push(started);
    }
    let senders = cores.iter().map(|c| c.mail.clone()).collect();
    let _ = mailboxes.set(senders);
    let mover = tokio::spawn(mover::run(job_queue, bucket_rx, Arc::clone(&mailboxes)));
    let resolver = tokio::spawn(resolve::run(resolve_queue, Arc::clone(&mailboxes)));
    let _ = bucket_tx.send(Some(Bucket::connect(bucket_config).await));
    let beat = Heartbeat {
        meta,
        who,
        node,
        map: Arc::new(registered.map),
        reports,
        mailboxes: Arc::clone(&mailboxes),
        refresh,
    };
    let beat = tokio::spawn(beat.run());
    if let Some(path) = &config.ready_file {
        let ready =
            Ready { node: node.0, host: config.host().to_owned(), ports, pid: std::process::id() };
        write_ready(path, &ready)?;
    }
    tracing::info!(%node, now_ms = clock::now_ms(), "serving");

    let outcome = serve_until(shutdown, beat, &mut ended).await;
    if let Some(path) = &config.ready_file {
        let _ = std::fs::remove_file(path);
    }

    for core in &cores {
        let _ = core.mail.try_send(if outcome.is_ok() { Mail::Drain } else { Mail::Stop });
    }
    for core in cores {
        let joined = blocking(core.core, move || core.thread.join()).await?;
        if joined.is_err() {
            tracing::error!(core = core.core, "the core's thread panicked");
        }
    }
    mover.abort();
    resolver.abort();
    outcome
}

async fn serve_until(
    shutdown: std::pin::Pin<&mut (impl Future<Output = ()> + Send)>,
    mut beat: tokio::task::JoinHandle<HeartbeatError>,
    ended: &mut mpsc::UnboundedReceiver<(u16, Result<(), CoreError>)>,
) -> Result<(), NodeError> {
    let outcome = tokio::select! {
        () = shutdown => Ok(()),
        why = &mut beat => match why {
            Ok(why) => return Err(why.into()),
            Err(e) => Err(NodeError::Thread { core: 0, reason: format!("heartbeat: {e}") }),
        },
        core = ended.recv() => match core {
            Some((_, Err(e))) => Err(e.into()),
            Some((core, Ok(()))) => {
                Err(NodeError::Thread { core, reason: "it ended by itself".into() })
            }
            None => Ok(()),
        },
    };
    beat.abort();
    outcome
}

struct Start {
    core: u16,
    cpu: Option<usize>,
    index_bytes: u64,
    dram_bytes: u64,
    spill_bytes: u64,
    scrub_bytes_per_s: u64,
    scrub_rest_ms: u64,
    cores: u64,
    node: NodeId,
}

struct Core {
    core: u16,
    mail: MailSender<Mail>,
    thread: JoinHandle<()>,
}

/// Starts a core's thread and waits until its ring is up.
fn start_core(
    start: Start,
    mut setup: CoreSetup,
    ended: mpsc::UnboundedSender<(u16, Result<(), CoreError>)>,
) -> Result<Core, NodeError> {
    let core = start.core;
    let failed = |reason: String| NodeError::Thread { core, reason };
    if setup.store.identity().node != start.node {
        // Its ticket becomes durable with the core's first batch; asked again otherwise.
        setup.store.set_node(start.node).map_err(|e| failed(e.to_string()))?;
    }
    let (up_tx, up) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new()
        .name(format!("ebb-core-{core}"))
        .spawn(move || {
            pin(core, start.cpu);
            let glue = match Glue::new(setup) {
                Ok((glue, mail)) => {
                    let _ = up_tx.send(Ok(mail));
                    glue
                }
                Err(e) => {
                    let _ = up_tx.send(Err(e));
                    return;
                }
            };
            let mut end = End { core, ended, outcome: Err(CoreError::Panicked { core }) };
            end.outcome = glue.run();
        })
        .map_err(|e| failed(e.to_string()))?;
    match up.recv() {
        Ok(Ok(mail)) => Ok(Core { core, mail, thread }),
        Ok(Err(e)) => Err(e.into()),
        Err(_) => Err(failed("its thread ended while starting".into())),
    }
}

/// Says how a core ended, a panic included: a node with a dead core must not go on.
struct End {
    core: u16,
    ended: mpsc::UnboundedSender<(u16, Result<(), CoreError>)>,
    outcome: Result<(), CoreError>,
}

impl Drop for End {
    fn drop(&mut self) {
        let outcome = std::mem::replace(&mut self.outcome, Ok(()));
        let _ = self.ended.send((self.core, outcome));
    }
}

fn pin(core: u16, cpu: Option<usize>) {
    use nix::sched::{CpuSet, sched_setaffinity};
    use nix::unistd::Pid;
    let Some(cpu) = cpu else { return };
    let mut set = CpuSet::new();
    let pinned = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(error) = pinned {
        tracing::warn!(core, cpu, %error, "cannot pin the core; it runs anywhere");
    }
}

/// What other members' primaries send, and what is copied to others, has slots of its own: the writes of
/// clients that wait for another core's ack hold theirs meanwhile, and two cores would wait for each other.
/// An eighth is enough to keep a device busy with a primary's writes; one slot of each class there is always.
fn ring_config(config: &NodeConfig) -> ebb_ring::Config {
    ebb_ring::Config {
        arena_bytes: usize::try_from(config.arena_bytes).unwrap_or(usize::MAX),
        class_percent: [3, 15, 46, 36],
        pool_percent: [52, 12, 36],
        conns_max: CONNS_MAX,
        send_zc: config.send_zc,
        sqpoll_idle_ms: config.sqpoll_idle_ms,
        spin_us: config.spin_us,
        ..ebb_ring::Config::default()
    }
}

/// The spill device of each core, and the bytes of it that are used.
type Spills = Vec<Option<(DeviceFile, u64)>>;

fn prepare_devices(config: &NodeConfig) -> Result<(DirectoryLock, Vec<Shard>, Spills), NodeError> {
    let cluster = config.cluster_id()?;
    let lock = DirectoryLock::take(&config.dir)?;
    let each = config.capacity_bytes / u64::from(config.cores);
    let shard = |core: u16| match config.devices.get(usize::from(core)) {
        Some(device) => Shard::prepare_device(device, core, cluster),
        None => Shard::prepare(&config.dir, core, each, cluster),
    };
    let shards = (0..config.cores).map(shard).collect::<Result<_, _>>()?;
    let shared = config.spill.len() < usize::from(config.cores);
    let each = config.spill_bytes / u64::from(config.cores);
    let spill = |core: u16| {
        let place = config.spill.get(usize::from(core) % config.spill.len().max(1));
        place.map(|p| spill_file::open(p, core, each, cluster, shared)).transpose()
    };
    let spills = (0..config.cores).map(spill).collect::<Result<_, _>>()?;
    Ok((lock, shards, spills))
}

fn listen(config: &NodeConfig) -> Result<(Vec<TcpListener>, Vec<u16>), NodeError> {
    let mut listeners = Vec::new();
    let mut ports = Vec::new();
    for core in 0..usize::from(config.cores) {
        let port = config.ports.get(core).copied().unwrap_or(0);
        let address = format!("{}:{port}", config.listen);
        let fail = |source| NodeError::Listen { address: address.clone(), source };
        let listener = bind(&address).map_err(fail)?;
        ports.push(listener.local_addr().map_err(fail)?.port());
        listeners.push(listener);
    }
    Ok((listeners, ports))
}

/// Binds; a fixed port may be held for a moment by the ring of the process that had it before.
fn bind(address: &str) -> std::io::Result<TcpListener> {
    let mut tries = 0;
    loop {
        match TcpListener::bind(address) {
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse && tries < BIND_TRIES => {
                tries += 1;
                std::thread::sleep(BIND_PAUSE);
            }
            other => return other,
        }
    }
}

/// Whole or not at all: written beside and renamed.
fn write_ready(path: &Path, ready: &Ready) -> Result<(), NodeError> {
    let fail = |source| NodeError::ReadyFile { path: path.to_owned(), source };
    let text = serde_json::to_string(ready).map_err(NodeError::Bucket)?;
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, text).map_err(fail)?;
    std::fs::rename(&temporary, path).map_err(fail)
}

async fn blocking<T: Send + 'static>(
    core: u16,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, NodeError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| NodeError::Thread { core, reason: e.to_string() })
}
