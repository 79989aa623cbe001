//! `ebb bench engines`: the same chunk reads by our chunk server and by minimal servers on other
//! I/O engines, in one run, with one load generator ([`load`]).
//!
//! Four servers answer the same frames with the same bytes of the same offsets: **ours**, a core of
//! the running cluster, as it is (session, grant, map, lease, index, checksums of the index); and
//! three that do nothing but the job, each one thread in a process of its own ([`child`]): on
//! `ebb-ring` (our reactor alone, so that engine and server can be told apart), on **tokio-uring**
//! and on **glommio**. The job ([`job`]): accept, parse a header of 64 bytes and its context, read a
//! block-aligned range of a file with O_DIRECT, compute a CRC-32C per 4 KiB block, send header,
//! checksums, bytes. Ours compares those checksums with its index, so the others compute them as well;
//! rows without are there to see what that costs.
//!
//! Server and generator have a core each. Of each turn: requests per second, latencies, CPU and peak
//! memory of the server's process. Engines take turns inside each run, in another order each time.
//!
//! Not here: durable writes. A write of ours is copy-on-write, a journal record and a window against
//! repetition; a server that overwrites a file in place and syncs it promises less, and one that
//! promises as much is a store. Neither would compare engines.
//!
//! The last two engines are behind the feature `engines` ([`MISSING`]); ADR 0001 says why.

mod child;
#[cfg(feature = "engines")]
mod glommio;
mod job;
mod load;
mod ours;
mod outcome;
mod ring;
#[cfg(test)]
mod tests;
#[cfg(feature = "engines")]
mod tokio_uring;

pub use child::{ServerArgs, serve};
pub use outcome::{Outcome, Ratio, Row, table};

use crate::BenchError;
use crate::chunk::{self, Slots};
use child::{Child, Usage};
use ebb_client::{FileSystem, OpenFlags, Owner};
use ebb_dataplane_protocol::auth::ClusterKey;
use ebb_dataplane_protocol::{CHUNK_BYTES, ShardRef};
use ebb_metaplane_protocol::AdminCall;
use job::READ_BYTES_MAX;
use load::{Load, Sample};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use ours::Ours;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

/// What to build when the other engines are not in this program.
pub const MISSING: &str = "this ebb was built without the engines to compare with (tokio-uring, glommio): \
     build one that has them with `cargo build --release -p ebb --features engines`";

/// Says what to build, if the engines to compare with are not in this program.
pub fn available() -> Result<(), BenchError> {
    match cfg!(feature = "engines") {
        true => Ok(()),
        false => Err(BenchError::Plan(MISSING.into())),
    }
}

/// An I/O engine under a minimal server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Our reactor.
    Ring,
    /// tokio-uring.
    TokioUring,
    /// glommio.
    Glommio,
}

impl Engine {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ring, Self::TokioUring, Self::Glommio];

    /// Its name, in tables and on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ring => "ebb-ring",
            Self::TokioUring => "tokio-uring",
            Self::Glommio => "glommio",
        }
    }
}

impl std::str::FromStr for Engine {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|e| e.name() == name);
        found.ok_or_else(|| format!("no engine is called {name:?}"))
    }
}

/// A data node's process on this machine.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its process.
    pub pid: i32,
    /// The ports it serves, one per core.
    pub ports: Vec<u16>,
}

/// One kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Bytes of a request: whole blocks, up to 1 MiB.
    pub size: u32,
    /// Requests in flight, over all connections.
    pub depth: u32,
}

/// Makes the command that calls [`serve`] in a process of its own.
pub type StartServer = fn(&ServerArgs) -> std::io::Result<Command>;

/// What to measure.
pub struct Plan {
    /// Kinds of requests.
    pub jobs: Vec<Job>,
    /// Connections that carry them.
    pub connections: u32,
    /// Seconds of each turn.
    pub seconds: u64,
    /// Runs; figures are their medians.
    pub runs: u32,
    /// Bytes of the file, rounded up to whole chunks.
    pub file_bytes: u64,
    /// Where the minimal servers' file is made: the file system of the cluster's nodes.
    pub dir: PathBuf,
    /// The cluster's nodes on this machine.
    pub nodes: Vec<Node>,
    /// The metadata servers.
    pub meta: Vec<String>,
    /// The cluster's key.
    pub key: ClusterKey,
    /// Also measure the minimal servers without checksums.
    pub without_checksums: bool,
    /// How to start a minimal server.
    pub server: StartServer,
}

/// Requests in flight on one connection, at most: what a minimal server takes.
pub(crate) const IN_FLIGHT_MAX: usize = 64;
const NAME: &[u8] = b".ebb-bench-engines";
/// A flush of the file before reads are measured may take this long.
const FLUSH_PATIENCE: Duration = Duration::from_secs(600);

/// Who takes a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Contender {
    Ours,
    Minimal { engine: Engine, checksums: bool },
}

impl Contender {
    fn all(without_checksums: bool) -> Vec<Self> {
        let mut all = vec![Self::Ours];
        for engine in Engine::ALL {
            all.push(Self::Minimal { engine, checksums: true });
            if without_checksums {
                all.push(Self::Minimal { engine, checksums: false });
            }
        }
        all
    }
    fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::Minimal { engine, .. } => engine.name(),
        }
    }
    fn checksums(self) -> bool {
        !matches!(self, Self::Minimal { checksums: false, .. })
    }
}

impl std::fmt::Display for Contender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())?;
        if self.checksums() { Ok(()) } else { f.write_str(" without checksums") }
    }
}

/// One measurement.
#[derive(Clone, Debug)]
struct Turn {
    sample: Sample,
    usage: Usage,
}

/// The first and the last CPU this process may use: the server's and the generator's.
fn cpus() -> Result<(usize, usize), BenchError> {
    let set = sched_getaffinity(Pid::from_raw(0))
        .map_err(|e| BenchError::Plan(format!("cannot ask which CPUs there are: {e}")))?;
    let mine: Vec<usize> =
        (0..CpuSet::count()).filter(|c| set.is_set(*c).unwrap_or(false)).collect();
    match mine[..] {
        [first, .., last] => Ok((first, last)),
        [only] => Ok((only, only)),
        [] => Err(BenchError::Plan("no CPU to run on".into())),
    }
}

/// Pins a thread (0: the calling one) to a CPU; what it was allowed before comes back.
fn pin(thread: Pid, cpu: usize) -> nix::Result<CpuSet> {
    let before = sched_getaffinity(thread)?;
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(thread, &set)?;
    Ok(before)
}

fn check(plan: &Plan) -> Result<(), BenchError> {
    let bad = |text: &str| Err(BenchError::Plan(text.to_owned()));
    let whole =
        |size: u32| size > 0 && size.is_multiple_of(4096) && size as usize <= READ_BYTES_MAX;
    if plan.jobs.is_empty() || plan.jobs.iter().any(|j| !whole(j.size) || j.depth == 0) {
        return bad(
            "a job is a size of whole blocks of 4 KiB, up to 1 MiB, and a depth above zero",
        );
    }
    if plan.seconds == 0 || plan.runs == 0 || plan.connections == 0 {
        return bad("connections, seconds and runs must be above zero");
    }
    let each = |j: &Job| j.depth.div_ceil(plan.connections.min(j.depth)) as usize;
    if plan.jobs.iter().any(|j| each(j) > IN_FLIGHT_MAX) {
        return bad("more than 64 requests in flight on a connection: use more --connections");
    }
    Ok(())
}

/// Runs the plan; `say` gets a line per step. The files are removed afterwards.
pub async fn run(fs: &FileSystem, plan: &Plan, say: impl Fn(&str)) -> Result<Outcome, BenchError> {
    available()?;
    check(plan)?;
    let file_bytes = plan.file_bytes.next_multiple_of(u64::from(CHUNK_BYTES));
    let root = fs.resolve(b"/").await?.inode;
    let flags = OpenFlags { write: true, truncate: true, exclusive: false };
    let file = fs.create(root, NAME, 0o600, Owner { uid: 0, gid: 0 }, flags).await?;
    let minimal = plan.dir.join(format!(".ebb-bench-engines-{}", std::process::id()));
    let result = measure(fs, file.handle, &minimal, file_bytes, plan, &say).await;
    let _ = std::fs::remove_file(&minimal);
    let released = fs.release(file.handle).await;
    let removed = fs.unlink(root, NAME).await;
    let outcome = result?;
    released?;
    removed?;
    Ok(outcome)
}

async fn measure(
    fs: &FileSystem,
    handle: ebb_client::FileHandle,
    minimal: &Path,
    file_bytes: u64,
    plan: &Plan,
    say: &impl Fn(&str),
) -> Result<Outcome, BenchError> {
    let (server_cpu, client_cpu) = cpus()?;
    let mut outcome = Outcome { runs: plan.runs, ..Outcome::default() };
    outcome.notes = outcome::notes(server_cpu, client_cpu);
    say(&format!("writing two files of {} MiB", file_bytes >> 20));
    let mut block = vec![0u8; READ_BYTES_MAX];
    for at in (0..file_bytes).step_by(READ_BYTES_MAX) {
        job::fill(at, &mut block);
        fs.write(handle, at, &block).await?;
    }
    fs.fsync(handle).await?;
    job::prepare(minimal, file_bytes)?;
    let inode = fs.inode_of(handle)?;
    say("flushing ours to S3, so that no upload disturbs");
    let flush = AdminCall::Flush { inode, wait: true };
    if let Err(e) = fs.cluster().admin(flush, FLUSH_PATIENCE).await {
        outcome
            .notes
            .push(format!("the file could not be flushed first ({e}): uploads may disturb"));
    }
    let map = fs.cluster().refresh_map().await?;
    let (shard, starts) = chunk::busiest(&map, inode, file_bytes).ok_or_else(|| {
        BenchError::Plan("no data node holds the file: `ebb scale 1` first".into())
    })?;
    let node = node_of(plan, map.address(shard))?;
    let core = ours::pin_core(node.pid, shard, server_cpu);
    if core.is_none() {
        outcome.notes.push("the cluster's core could not be pinned: it runs on any CPU".into());
    }
    let ours = Ours::open(&plan.meta, &plan.key, map, inode, shard).await?;
    let ours = Arc::new(ours);
    let renewing = tokio::spawn(Arc::clone(&ours).renew());
    let slots: Vec<Arc<Slots>> =
        plan.jobs.iter().map(|j| Arc::new(Slots::of(starts.clone(), u64::from(j.size)))).collect();

    let mut contenders = Contender::all(plan.without_checksums);
    let mut turns: Vec<Vec<(Contender, Turn)>> = vec![Vec::new(); plan.jobs.len()];
    for run in 1..=plan.runs {
        for (i, job) in plan.jobs.iter().enumerate() {
            for contender in contenders.clone() {
                say(&format!("run {run}: {contender}, {} bytes, depth {}", job.size, job.depth));
                let load = Load {
                    size: job.size,
                    depth: job.depth,
                    connections: plan.connections,
                    duration: Duration::from_secs(plan.seconds),
                    cpu: Some(client_cpu),
                    slots: Arc::clone(&slots[i]),
                };
                let turn = match contender {
                    Contender::Ours => our_turn(node.pid, Arc::clone(&ours), load).await?,
                    Contender::Minimal { engine, checksums } => {
                        let file = minimal.to_owned();
                        let args = ServerArgs { engine, file, cpu: server_cpu, checksums };
                        let command = (plan.server)(&args)
                            .map_err(BenchError::program(engine.name(), "start"))?;
                        match minimal_turn(engine, checksums, command, load).await {
                            Ok(turn) => turn,
                            // Another's engine that fails here is a finding, not the end.
                            Err(e) if engine != Engine::Ring => {
                                outcome.notes.push(format!("{contender} failed: {e}"));
                                contenders.retain(|c| *c != contender);
                                continue;
                            }
                            Err(e) => return Err(e),
                        }
                    }
                };
                turns[i].push((contender, turn));
            }
            contenders.rotate_left(1);
        }
    }
    renewing.abort();
    ours.close().await;
    drop(core);
    for (job, turns) in plan.jobs.iter().zip(&turns) {
        outcome.add(*job, &Contender::all(plan.without_checksums), turns);
    }
    Ok(outcome)
}

/// The process behind an address of the map.
fn node_of<'a>(plan: &'a Plan, address: Option<(&str, u16)>) -> Result<&'a Node, BenchError> {
    let port = address.map(|(_, port)| port);
    plan.nodes.iter().find(|n| n.ports.iter().any(|p| Some(*p) == port)).ok_or_else(|| {
        BenchError::Plan("the file's data node does not run on this machine under --dir".into())
    })
}

async fn our_turn(pid: i32, ours: Arc<Ours>, load: Load) -> Result<Turn, BenchError> {
    blocking(move || {
        child::reset_peak(pid);
        let before = Usage::of(pid);
        let sample = load::run(&*ours, &load)?;
        Ok(Turn { sample, usage: Usage::of(pid).since(&before) })
    })
    .await
}

async fn minimal_turn(
    engine: Engine,
    checksums: bool,
    command: Command,
    load: Load,
) -> Result<Turn, BenchError> {
    blocking(move || {
        let server = Child::start(engine, command)?;
        let target = child::Minimal { port: server.port, checksums };
        let before = Usage::of(server.pid());
        match load::run(&target, &load) {
            Ok(sample) => Ok(Turn { sample, usage: Usage::of(server.pid()).since(&before) }),
            Err(e) => Err(server.explain(engine, e)),
        }
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, BenchError> + Send + 'static,
) -> Result<T, BenchError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| BenchError::Worker(e.to_string()))?
}

/// Which core of a shard: its thread's name in a node.
fn core_thread(shard: ShardRef) -> String {
    format!("ebb-core-{}", shard.core.0)
}
