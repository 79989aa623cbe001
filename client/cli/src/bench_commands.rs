//! `ebb bench`: finds what to measure, prints what came out. The measuring is in `ebb-bench`.

use crate::args::{
    Bench, BenchChunk, BenchMemory, BenchMeta, BenchMount, BenchRecovery, BenchWhat, Cli,
};
use crate::exit::CliError;
use crate::{bench_engines, bench_history, find, output};
use ebb_bench::memory::{Kind, Subject};
use ebb_bench::{BenchError, chunk, engines, index, memory, meta, mount, recovery};
use ebb_client::{Cluster, Config, FileSystem, InodeId};
use ebb_controller::Layout;
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_metaplane_protocol::{AdminCall, AdminReply, Request, Response};
use ebb_rpc::{Identity, MetaClient};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A flush between jobs may take this long.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1800);
const STATUS_PATIENCE: Duration = Duration::from_secs(30);

impl From<BenchError> for CliError {
    fn from(e: BenchError) -> Self {
        match e {
            BenchError::Client(e) => e.into(),
            BenchError::Plan(text) => Self::usage(text),
            e => Self::new(e.to_string()),
        }
    }
}

/// `ebb bench`
pub(crate) async fn bench(cli: &Cli, args: &Bench) -> Result<(), CliError> {
    match &args.what {
        BenchWhat::Chunk(a) if a.beside.is_some() => {
            let machine = machine();
            let outcome = run_beside(cli, a).await?;
            let document = serde_json::json!({ "machine": machine, "beside": outcome });
            print(cli, &document, || format!("{machine}\n\n{}", chunk::beside_table(&outcome)))
        }
        BenchWhat::Chunk(a) => {
            let outcome = run_chunk(cli, plan(cli, a)?).await?;
            print(cli, &outcome, || chunk::table(&outcome))
        }
        BenchWhat::Mount(a) => {
            let outcome = run_mount(cli, a).await?;
            print(cli, &outcome, || mount::table(&outcome))
        }
        BenchWhat::Meta(a) => {
            let machine = machine();
            let outcome = run_meta(cli, a).await?;
            let document = serde_json::json!({ "machine": machine, "meta": outcome });
            print(cli, &document, || format!("{machine}\n\n{}", meta::table(&outcome)))
        }
        BenchWhat::Memory(a) => {
            let (processes, index) = run_memory(cli, a).await?;
            let document = memory_document(&processes, &index);
            print(cli, &document, || memory_tables(&processes, &index))
        }
        BenchWhat::Recovery(a) => {
            let machine = machine();
            let rows = run_recovery(cli, a).await?;
            let document = serde_json::json!({ "machine": machine, "recovery": rows });
            print(cli, &document, || format!("{machine}\n\n{}", recovery::table(&rows)))
        }
        BenchWhat::Engines(a) => {
            let machine = machine();
            let outcome = bench_engines::run(cli, a, say(cli)).await?;
            let document = serde_json::json!({ "machine": machine, "engines": outcome });
            print(cli, &document, || format!("{machine}\n\n{}", engines::table(&outcome)))
        }
        BenchWhat::EngineServer(a) => bench_engines::serve(a).await,
        BenchWhat::History(a) => bench_history::run(cli, a).await,
        BenchWhat::All(a) => all(cli, a).await,
    }
}

fn print(
    cli: &Cli,
    value: &impl serde::Serialize,
    table: impl FnOnce() -> String,
) -> Result<(), CliError> {
    if cli.json { output::json(value) } else { output::line(&table()) }
}

/// Steps go to stderr, so that stdout has the figures alone.
fn say(cli: &Cli) -> impl Fn(&str) + Send + 'static {
    let quiet = cli.json;
    move |what: &str| {
        if !quiet {
            eprintln!("{what}");
        }
    }
}

fn plan(cli: &Cli, args: &BenchChunk) -> Result<chunk::Plan, CliError> {
    let baseline = match args.baseline {
        false => None,
        true => Some(own_directory(cli, "--baseline runs fio beside the cluster's own files")?),
    };
    Ok(chunk::Plan {
        sizes: args.size.clone(),
        depths: args.depth.clone(),
        seconds: args.seconds,
        file_bytes: args.file,
        operations: match args.only.as_slice() {
            [] => chunk::Operation::USUAL.to_vec(),
            some => some.to_vec(),
        },
        runs: args.runs,
        all_cores: args.all_cores,
        baseline,
        key: find::cluster(cli)?.1,
    })
}

async fn run_chunk(cli: &Cli, plan: chunk::Plan) -> Result<chunk::Outcome, CliError> {
    let fs = connect(find::cluster(cli)?, &plan).await?;
    let result = chunk::run(&fs, &plan, say(cli)).await;
    let closed = fs.close().await;
    let outcome = result?;
    closed?;
    Ok(outcome)
}

/// `ebb bench chunk --beside DIR`
async fn run_beside(cli: &Cli, args: &BenchChunk) -> Result<chunk::Beside, CliError> {
    let plan = plan(cli, args)?;
    let side = async |found: (Vec<String>, ClusterKey)| {
        let key = found.1.clone();
        let fs = connect(found, &plan).await?;
        let replicas = match fs.cluster().admin(AdminCall::Status, STATUS_PATIENCE).await? {
            AdminReply::Status(status) => status.replicas,
            other => return Err(CliError::new(format!("unexpected reply {other:?}"))),
        };
        Ok(chunk::Side { fs, key, replicas: replicas.into() })
    };
    let dir = args.beside.as_deref().unwrap_or(Path::new("."));
    let (this, other) = (find::cluster(cli)?, find::cluster_in(dir)?);
    if this.0 == other.0 {
        return Err(CliError::usage("--beside names the same cluster"));
    }
    let (this, other) = (side(this).await?, side(other).await?);
    let result = chunk::beside(&this, &other, &plan, say(cli)).await;
    let closed = (this.fs.close().await, other.fs.close().await);
    let outcome = result?;
    closed.0?;
    closed.1?;
    Ok(outcome)
}

async fn connect(
    (addresses, key): (Vec<String>, ClusterKey),
    plan: &chunk::Plan,
) -> Result<FileSystem, CliError> {
    let label = format!("ebb bench, pid {}", std::process::id());
    // No readahead: every read is to be a request to a chunk server.
    let patience = Duration::from_secs(30);
    // Nor is the client to hold back what the depth asks for.
    let deepest = plan.depths.iter().copied().max().unwrap_or(0) as usize;
    let write_window = Config::default().write_window.max(deepest);
    let config = Config { patience, read_cache_bytes: 0, write_window, ..Config::default() };
    let cluster = Cluster::connect(addresses, key, &label, config).await?;
    Ok(FileSystem::new(&cluster))
}

/// Puts everything into S3.
async fn flush(meta: &MetaClient) -> Result<(), String> {
    let call = Request::Admin(AdminCall::Flush { inode: InodeId::ROOT, wait: true });
    match meta.call(&call, FLUSH_PATIENCE).await.map_err(|e| e.to_string())? {
        Response::Admin(Ok(AdminReply::Flushed(report))) => match report.failed.first() {
            None => Ok(()),
            Some((path, why)) => Err(format!("{path}: {why}")),
        },
        Response::Admin(Err(e)) => Err(e.to_string()),
        other => Err(format!("unexpected reply {other:?}")),
    }
}

async fn run_mount(cli: &Cli, args: &BenchMount) -> Result<mount::Outcome, CliError> {
    check_mounted(&args.target)?;
    if let Some(plain) = &args.plain
        && !plain.is_dir()
    {
        return Err(CliError::usage(format!("--plain {} is not a directory", plain.display())));
    }
    let meta = find::meta(cli)?;
    let plan = mount::Plan {
        dir: args.target.clone(),
        plain: args.plain.clone(),
        runs: args.runs,
        file_bytes: args.file,
        files: args.files,
        seconds: args.seconds,
        machine_caches: true,
    };
    let say = say(cli);
    let runtime = tokio::runtime::Handle::current();
    let settle = move || runtime.block_on(flush(&meta));
    let work = tokio::task::spawn_blocking(move || mount::run(&plan, settle, say));
    Ok(work.await.map_err(|e| CliError::new(format!("the measurement ended abruptly: {e}")))??)
}

async fn run_meta(cli: &Cli, args: &BenchMeta) -> Result<meta::Outcome, CliError> {
    let (addresses, key) = find::cluster(cli)?;
    let plain = match args.baseline {
        false => None,
        true => Some(own_directory(cli, "--baseline works beside the cluster's own files")?),
    };
    let plan = meta::Plan {
        clients: args.clients,
        files: args.files,
        runs: args.runs,
        entries: args.entries,
        followers: args.followers,
        plain,
        addresses,
        identity: Identity::new(key, Role::Client),
    };
    Ok(meta::run(&plan, say(cli)).await?)
}

/// Where the cluster's files are, if it is one of this machine.
fn own_directory(cli: &Cli, why: &str) -> Result<PathBuf, CliError> {
    let layout = find::layout(cli)?;
    match layout.exists() {
        true => Ok(layout.dir().to_owned()),
        false => Err(CliError::usage(format!("{why}: it needs a cluster of this machine (--dir)"))),
    }
}

/// Whether a directory is on one of our mounts: else the figures would be those of something else.
fn check_mounted(dir: &Path) -> Result<(), CliError> {
    let absolute = std::fs::canonicalize(dir)
        .map_err(|e| CliError::usage(format!("{}: {e}", dir.display())))?;
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let found = table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let point = fields.next()?.replace("\\040", " ");
            let kind = fields.next()?;
            absolute.starts_with(&point).then(|| (point.len(), kind.to_owned()))
        })
        .max_by_key(|(len, _)| *len);
    match found {
        Some((_, kind)) if kind.starts_with("fuse") => Ok(()),
        _ => Err(CliError::usage(format!(
            "{0} is not on a mount of ours: `ebb mount {0}` first",
            dir.display()
        ))),
    }
}

async fn run_memory(
    cli: &Cli,
    args: &BenchMemory,
) -> Result<(Vec<memory::Row>, Vec<index::Row>), CliError> {
    let layout = find::layout(cli)?;
    let processes = memory::run(&subjects(&layout)?);
    let (gib, say) = (args.index, say(cli));
    let index = match gib {
        0 => Vec::new(),
        gib => tokio::task::spawn_blocking(move || index::run(gib, say))
            .await
            .map_err(|e| CliError::new(format!("the measurement ended abruptly: {e}")))??,
    };
    Ok((processes, index))
}

async fn run_recovery(cli: &Cli, args: &BenchRecovery) -> Result<Vec<recovery::Row>, CliError> {
    if !args.target.is_dir() {
        return Err(CliError::usage(format!("{} is not a directory", args.target.display())));
    }
    let plan = recovery::Plan {
        dir: args.target.clone(),
        capacity_bytes: args.capacity,
        shapes: match args.shape.as_slice() {
            [] => recovery::Shape::ALL.to_vec(),
            some => some.to_vec(),
        },
        runs: args.runs,
        data: args.data,
    };
    let say = say(cli);
    let work = tokio::task::spawn_blocking(move || recovery::run(&plan, say));
    Ok(work.await.map_err(|e| CliError::new(format!("the measurement ended abruptly: {e}")))??)
}

/// The cluster's servers by their pid files, and its mounts by /proc.
fn subjects(layout: &Layout) -> Result<Vec<Subject>, CliError> {
    let mut found = Vec::new();
    if layout.exists() {
        let config = layout.load()?;
        let arena_bytes = config.arena_bytes * u64::from(config.cores_per_node);
        let run = layout.run("");
        let entries = std::fs::read_dir(&run)
            .map_err(|e| CliError::new(format!("{}: {e}", run.display())))?;
        for entry in entries.flatten() {
            let file = entry.file_name();
            let Some(name) = file.to_str().and_then(|f| f.strip_suffix(".pid")) else { continue };
            let Some(pid) = ebb_controller::process::living(layout, name) else { continue };
            let kind = match name.starts_with("node-") {
                true => Kind::Data { arena_bytes },
                false => Kind::Other,
            };
            found.push(Subject { name: name.to_owned(), pid: pid.as_raw(), kind });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found.extend(mounts(layout.dir()));
    Ok(found)
}

/// Processes of this program that are mounts of the cluster in `dir`.
fn mounts(dir: &Path) -> Vec<Subject> {
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir("/proc") else { return found };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let words: Vec<String> = line
            .split(|b| *b == 0)
            .filter(|w| !w.is_empty())
            .map(|w| String::from_utf8_lossy(w).into_owned())
            .collect();
        let ours =
            words.first().is_some_and(|w| Path::new(w).file_name().is_some_and(|f| f == "ebb"))
                && words.iter().any(|w| w == "mount");
        let of_this = words
            .windows(2)
            .find(|w| w[0] == "--dir")
            .is_none_or(|w| std::path::absolute(&w[1]).is_ok_and(|d| d == dir));
        if ours && of_this {
            let point = words.last().cloned().unwrap_or_default();
            found.push(Subject { name: format!("mount on {point}"), pid, kind: Kind::Mount });
        }
    }
    found
}

fn memory_document(processes: &[memory::Row], index: &[index::Row]) -> serde_json::Value {
    let sums = memory::with_index(processes, index);
    serde_json::json!({ "processes": processes, "index": index, "node_with_index": sums })
}

fn memory_tables(processes: &[memory::Row], index: &[index::Row]) -> String {
    let mut text = match processes {
        [] => "no server and no mount of this cluster runs on this machine".to_owned(),
        rows => memory::table(rows),
    };
    if !index.is_empty() {
        text += &format!("\n\n{}", index::table(index));
    }
    for sum in memory::with_index(processes, index) {
        text += &format!("\n{sum}");
    }
    text
}

/// `ebb bench all`: what is promised, both sides in one run; memory after the jobs, since it is the peak.
async fn all(cli: &Cli, args: &BenchMount) -> Result<(), CliError> {
    let chunk_args = BenchChunk {
        size: vec![4 << 10, 1 << 20],
        depth: vec![1, 16],
        seconds: args.seconds,
        file: 256 << 20,
        only: Vec::new(),
        runs: args.runs,
        baseline: true,
        all_cores: false,
        beside: None,
    };
    check_mounted(&args.target)?;
    let machine = machine();
    let chunks = run_chunk(cli, plan(cli, &chunk_args)?).await?;
    let jobs = run_mount(cli, args).await?;
    let (processes, index) = run_memory(cli, &BenchMemory { index: 100 }).await?;
    let recovery_args = BenchRecovery {
        target: find::layout(cli)?.dir().to_owned(),
        capacity: 20 << 30,
        shape: Vec::new(),
        runs: args.runs,
        data: false,
    };
    let recovery = run_recovery(cli, &recovery_args).await?;
    let document = serde_json::json!({
        "machine": machine, "chunk": chunks, "mount": jobs,
        "memory": memory_document(&processes, &index),
        "recovery": recovery,
    });
    print(cli, &document, || {
        format!(
            "{machine}; medians of {} runs\n\n{}\n\n{}\n\n{}\n\n{}",
            args.runs,
            chunk::table(&chunks),
            mount::table(&jobs),
            memory_tables(&processes, &index),
            recovery::table(&recovery)
        )
    })
}

/// "2 cores, 23.4 GiB of memory, Linux 6.18.44, load average 0.31 at the start": on a busy machine
/// only the ratios mean something.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let kib: u64 = read("/proc/meminfo")
        .lines()
        .find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok())
        .unwrap_or(0);
    let kernel = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or("unknown");
    format!(
        "{cores} cores, {} of memory, Linux {}, load average {load} at the start",
        output::bytes(kib * 1024),
        kernel.trim()
    )
}
