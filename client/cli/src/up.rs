//! `ebb up` and `ebb down`: a whole cluster on this machine.

use crate::args::{Cli, Down, Up};
use crate::exit::CliError;
use crate::{find, output};
use ebb_controller::layout::{ClusterConfig, ClusterIdHex, Layout};
use ebb_controller::process;
use ebb_controller::run::{DOWN_FILE, admin, status};
use ebb_controller::voters::{Voters, process_name};
use ebb_dataplane_protocol::ClusterId;
use ebb_dataplane_protocol::auth::Role;
use ebb_metaplane_protocol::admin::FlushReport;
use ebb_metaplane_protocol::{AdminCall, AdminReply, ClusterStatus};
use ebb_rpc::{Identity, MetaClient};
use nix::sys::signal::{Signal, kill};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Time a cluster gets to start: formatting the devices takes most of it.
const START_PATIENCE: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(100);
/// Smallest device of a node: journal, checkpoints and some room.
const NODE_CAPACITY_MIN: u64 = 256 << 20;

/// Starts a cluster, or takes a running one over.
pub(crate) async fn up(cli: &Cli, args: &Up) -> Result<(), CliError> {
    if args.nodes == Some(0) {
        return Err(CliError::usage(
            "a cluster starts with at least one data node: use --nodes 1 or more; `ebb scale 0` lets them go later",
        ));
    }
    if args.node_capacity < NODE_CAPACITY_MIN {
        return Err(CliError::usage(format!(
            "--node-capacity must be at least {}",
            output::bytes(NODE_CAPACITY_MIN)
        )));
    }
    if let Some(dir) = &args.mount {
        crate::mount_commands::check_mount_point(dir)?;
    }
    let layout = find::layout(cli)?;
    let (config, fresh) = configure(args, &layout)?;
    let spinner = output::spinner("starting", cli.json);
    let started = start_controller(&layout)?;
    let progress = |what: &str| spinner.set_message(what.to_owned());
    let status = wait_until_serving(&layout, config.nodes_elsewhere, progress).await;
    spinner.finish_and_clear();
    let status = match status {
        Ok(status) => status,
        Err(e) => {
            if started {
                give_up(&layout, fresh).await;
            }
            return Err(e);
        }
    };
    debug_assert_eq!(config.cluster, layout.load()?.cluster);
    if let Some(dir) = &args.mount {
        crate::mount_commands::mount_detached(cli, dir).await?;
    }
    announce(cli, &layout, &config, &status, started, args)?;
    if args.detach {
        return Ok(());
    }
    if !cli.json {
        output::line(
            "running in the foreground: Ctrl-C flushes everything to S3 and stops (--detach leaves it running)",
        )?;
    }
    tokio::signal::ctrl_c()
        .await
        .map_err(|e| CliError::new(format!("cannot wait for Ctrl-C: {e}")))?;
    if let Some(dir) = &args.mount {
        crate::mount_commands::unmount(dir, false)?;
    }
    down(cli, &Down { keep: false, abandon: false, patience: 60 }).await
}

/// The stored configuration, or a new one of the arguments.
fn configure(args: &Up, layout: &Layout) -> Result<(ClusterConfig, bool), CliError> {
    if layout.exists() {
        let config = layout.load()?;
        let other_bucket = args.bucket.as_ref().is_some_and(|b| *b != config.bucket);
        let other_endpoint = args.s3_endpoint.is_some() && args.s3_endpoint != config.endpoint;
        if other_bucket || other_endpoint {
            return Err(CliError::usage(format!(
                "{} belongs to the bucket {}{}: use another --dir for another bucket",
                layout.dir().display(),
                config.bucket,
                config.endpoint.as_ref().map(|e| format!(" at {e}")).unwrap_or_default()
            )));
        }
        let voters = config.voters().len();
        if args.meta.is_some_and(|n| usize::from(n) != voters) {
            return Err(CliError::usage(format!(
                "this cluster has {voters} voters: `ebb meta add` and `ebb meta remove` change that while it runs"
            )));
        }
        let (replicas, min_in_sync) = copies(args, config.replicas, config.min_in_sync)?;
        let config = ClusterConfig { replicas, min_in_sync, ..config };
        if args.steal_bucket || args.replicas.is_some() || args.min_in_sync.is_some() {
            let steal_bucket = config.steal_bucket || args.steal_bucket;
            layout.save(&ClusterConfig { steal_bucket, ..config.clone() })?;
        }
        return Ok((config, false));
    }
    let (replicas, min_in_sync) = copies(args, 1, 1)?;
    let nodes = args.nodes.unwrap_or(2.max(u32::from(replicas)));
    if nodes < u32::from(min_in_sync) {
        return Err(CliError::usage(format!(
            "--min-in-sync {min_in_sync} needs as many nodes, and there are {nodes}"
        )));
    }
    let embedded = args.bucket.is_none();
    if embedded && args.s3_endpoint.is_some() {
        return Err(CliError::usage("--s3-endpoint needs --bucket s3://NAME"));
    }
    let bucket = args.bucket.clone().unwrap_or_else(|| "s3://ebb".into());
    if ebb_s3::BucketConfig::from_url(&bucket).is_none() {
        return Err(CliError::usage(format!("{bucket:?} is not s3://BUCKET[/PREFIX]")));
    }
    let random = |n: usize| -> Result<Vec<u8>, CliError> {
        let mut bytes = vec![0u8; n];
        getrandom::fill(&mut bytes).map_err(|e| CliError::new(format!("no randomness: {e}")))?;
        Ok(bytes)
    };
    // The embedded server's keys live and die with its data, so that a wiped directory around a
    // kept s3/ folder opens again: they guard nothing that the directory's mode does not.
    let id: [u8; 16] = random(16)?.try_into().unwrap_or_default();
    let config = ClusterConfig {
        cluster: ClusterIdHex(ClusterId(u128::from_le_bytes(id))),
        bucket,
        endpoint: args.s3_endpoint.clone(),
        embedded_s3: embedded,
        embedded_access_key: format!("EBB{}", hex::encode_upper(random(8)?)),
        embedded_secret_key: hex::encode(random(20)?),
        nodes,
        nodes_elsewhere: args.nodes_elsewhere,
        cores_per_node: args.cores,
        node_capacity_bytes: args.node_capacity,
        arena_bytes: args.arena,
        index_bytes: args.index,
        dram_bytes: args.dram,
        spill_bytes: args.spill.unwrap_or(0),
        spill_dirs: spill_dirs(args)?,
        send_zc: args.send_zc,
        sqpoll_idle_ms: args.sqpoll,
        spin_us: args.spin,
        flush_after_ms: args.flush_after,
        host: args.host.clone(),
        meta_port: args.meta_port,
        s3_port: args.s3_port,
        replicas,
        min_in_sync,
        steal_bucket: args.steal_bucket,
        voters: vec![],
    };
    for (port, what) in [(args.meta_port, "--meta-port"), (args.s3_port, "--s3-port")] {
        if port != 0
            && let Err(e) = std::net::TcpListener::bind((args.host.as_str(), port))
        {
            return Err(CliError::usage(format!(
                "{what} {port}: {e}: choose another port, or leave it out for any free one"
            )));
        }
    }
    layout.create(&config)?;
    let voters = usize::from(args.meta.unwrap_or(1));
    if voters > 1 {
        let mut ports = free_ports(&args.host, voters)?;
        if args.meta_port != 0 {
            ports[0] = args.meta_port;
        }
        Voters::found(&ports).save(layout)?;
    } else {
        // Of an earlier cluster of this directory, of which only its bucket was kept.
        let _ = std::fs::remove_file(layout.voters());
    }
    Ok((config, true))
}

/// The directories of the spill tier, by their whole names: the nodes start elsewhere.
fn spill_dirs(args: &Up) -> Result<Vec<PathBuf>, CliError> {
    let least = ebb_dataplane::core::SPILL_BYTES_MIN;
    if let Some(bytes) = args.spill
        && bytes / u64::from(args.cores) < least
    {
        return Err(CliError::usage(format!(
            "--spill {bytes}: at least {} for each core, or leave it out",
            output::bytes(least)
        )));
    }
    if args.spill_dir.len() > usize::from(args.cores) {
        return Err(CliError::usage(format!(
            "--spill-dir is given {} times: at most once per core, and there are {} (--cores)",
            args.spill_dir.len(),
            args.cores
        )));
    }
    let mut dirs = Vec::new();
    for dir in &args.spill_dir {
        let whole = dir.canonicalize();
        let whole =
            whole.map_err(|e| CliError::usage(format!("--spill-dir {}: {e}", dir.display())))?;
        if !whole.is_dir() {
            let what = format!("--spill-dir {}: it is not a directory", dir.display());
            return Err(CliError::usage(what));
        }
        if dirs.contains(&whole) {
            let what = format!("--spill-dir {}: named twice", dir.display());
            return Err(CliError::usage(what));
        }
        dirs.push(whole);
    }
    Ok(dirs)
}

/// Ports that nobody listens on: voters have to know each other's before they start.
pub(crate) fn free_ports(host: &str, n: usize) -> Result<Vec<u16>, CliError> {
    let failed = |e: std::io::Error| CliError::usage(format!("--host {host}: {e}"));
    // All at once, so that they differ.
    let listeners: Vec<_> = (0..n)
        .map(|_| std::net::TcpListener::bind((host, 0)).map_err(failed))
        .collect::<Result<_, _>>()?;
    listeners.iter().map(|l| Ok(l.local_addr().map_err(failed)?.port())).collect()
}

/// The copies asked for, else those there are.
fn copies(args: &Up, replicas: u8, min_in_sync: u8) -> Result<(u8, u8), CliError> {
    let replicas = args.replicas.unwrap_or(replicas);
    let min_in_sync = args.min_in_sync.unwrap_or(min_in_sync.min(replicas));
    if min_in_sync > replicas {
        return Err(CliError::usage(format!(
            "--min-in-sync {min_in_sync} is more than the {replicas} copies there are to be (--replicas)"
        )));
    }
    Ok((replicas, min_in_sync))
}

/// Stops what a failed start left running. A directory made by that start is forgotten, so that the
/// next try may name another bucket; data that was there before stays.
async fn give_up(layout: &Layout, fresh: bool) {
    if let Some(pid) = process::living(layout, "controller") {
        let _ = kill(pid, Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(30);
        while process::living(layout, "controller").is_some() && Instant::now() < deadline {
            tokio::time::sleep(POLL).await;
        }
    }
    if fresh {
        let _ = std::fs::remove_file(layout.config());
    }
}

/// Starts the controller unless one runs. True if it was started now.
fn start_controller(layout: &Layout) -> Result<bool, CliError> {
    if process::living(layout, "controller").is_some() {
        return Ok(false);
    }
    let program =
        std::env::current_exe().map_err(|e| CliError::new(format!("cannot find myself: {e}")))?;
    let open =
        || std::fs::OpenOptions::new().create(true).append(true).open(layout.log("controller"));
    let (out, err) = open()
        .and_then(|f| Ok((f.try_clone()?, f)))
        .map_err(|e| CliError::new(format!("{}: {e}", layout.log("controller").display())))?;
    let _ = std::fs::remove_file(layout.endpoints());
    clear_failures(layout);
    Command::new(program)
        .args(["serve", "controller"])
        .arg(layout.dir())
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .process_group(0)
        .spawn()
        .map_err(|e| CliError::new(format!("cannot start the controller: {e}")))?;
    Ok(true)
}

/// Waits until every group has a holder, or (scaled to zero, nodes elsewhere) the metadata plane answers.
async fn wait_until_serving(
    layout: &Layout,
    nodes_elsewhere: bool,
    progress: impl Fn(&str),
) -> Result<ClusterStatus, CliError> {
    let key = layout.load_key()?;
    let voters: Vec<String> = layout.load()?.voters().iter().map(|v| process_name(v.id)).collect();
    let deadline = Instant::now() + START_PATIENCE;
    let mut last = String::from("the controller did not start");
    let mut silent_since = Instant::now();
    loop {
        if let Ok(endpoints) = layout.load_endpoints() {
            let meta =
                MetaClient::new(endpoints.meta, Identity::new(key.clone(), Role::Controller));
            match status(&meta).await {
                Ok(s) => {
                    let held = s.map.pgs.iter().filter(|pg| !pg.members.is_empty()).count();
                    let wish = s.desired_nodes;
                    let all = !s.map.pgs.is_empty() && held == s.map.pgs.len();
                    let asleep = wish == 0 && s.wake_nodes > 0;
                    if (wish > 0 && (all || nodes_elsewhere)) || asleep {
                        return Ok(s);
                    }
                    last = format!("{held} of {} placement groups are held", s.map.pgs.len());
                    progress(&last);
                }
                Err(e) => last = e.to_string(),
            }
        } else {
            progress("starting the servers");
        }
        let alive = process::living(layout, "controller").is_some();
        if alive {
            silent_since = Instant::now();
        } else if silent_since.elapsed() > Duration::from_secs(5) {
            let words = last_words(layout, "controller");
            return Err(CliError::new(format!("the controller does not start: {words}")));
        }
        if let Some((name, words)) = ailing(layout, &voters) {
            return Err(trouble(layout, &name, &words));
        }
        if Instant::now() > deadline {
            return Err(CliError::new(format!(
                "the cluster does not come up: {last} (logs: {})",
                layout.dir().join("log").display()
            )));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Forgets what earlier starts complained about.
fn clear_failures(layout: &Layout) {
    for entry in std::fs::read_dir(layout.dir().join("run")).into_iter().flatten().flatten() {
        if entry.path().extension().is_some_and(|e| e == "failed") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// A server that gave up says so in a `.failed` file beside its ready file. One of several voters is no
/// trouble as long as the others are a majority, unless it speaks for all of them (S3, the bucket).
fn ailing(layout: &Layout, voters: &[String]) -> Option<(String, String)> {
    let dir = std::fs::read_dir(layout.dir().join("run")).ok()?;
    let mut failed_voters = Vec::new();
    for entry in dir.flatten() {
        let name = entry.file_name().into_string().ok()?;
        let Some(server) = name.strip_suffix(".failed") else { continue };
        let words = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let failure = (server.to_owned(), words);
        let own_trouble = failure.1.starts_with("1\n");
        if own_trouble && voters.contains(&failure.0) {
            failed_voters.push(failure);
        } else {
            return Some(failure);
        }
    }
    let majority = voters.len() / 2 + 1;
    let enough = voters.len() - failed_voters.len() >= majority;
    if enough { None } else { failed_voters.pop() }
}

/// The error of a server that does not start, with its own exit code (first line of its words).
fn trouble(layout: &Layout, name: &str, words: &str) -> CliError {
    let (code, words) = words.split_once('\n').unwrap_or(("1", words));
    CliError::with_code(
        format!("{name} does not start: {} (log: {})", words.trim(), layout.log(name).display()),
        code.parse().unwrap_or(1),
    )
}

fn last_words(layout: &Layout, name: &str) -> String {
    let text = std::fs::read_to_string(layout.log(name)).unwrap_or_default();
    text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("its log is empty").to_owned()
}

fn announce(
    cli: &Cli,
    layout: &Layout,
    config: &ClusterConfig,
    status: &ClusterStatus,
    started: bool,
    args: &Up,
) -> Result<(), CliError> {
    if cli.json {
        return output::json(&serde_json::json!({
            "dir": layout.dir(), "started": started, "meta": layout.load_endpoints()?.meta,
            "bucket": status.bucket, "nodes": status.map.nodes.len(),
        }));
    }
    let verb = if started { "up" } else { "was up already" };
    output::line(&format!(
        "{verb}: {} data node{} on {}, metadata at {}",
        status.map.nodes.len(),
        if status.map.nodes.len() == 1 { "" } else { "s" },
        status.bucket,
        layout.load_endpoints()?.meta.join(","),
    ))?;
    for warning in &status.warnings {
        output::line(&format!("warning: {warning}"))?;
    }
    if config.nodes_elsewhere {
        output::line(&format!(
            "data nodes are started elsewhere: `ebb serve data --config FILE`, which says dir, listen, key_file, cluster = \"{}\", meta = {:?}",
            config.cluster.0,
            layout.load_endpoints()?.meta,
        ))?;
    }
    if args.mount.is_none() && args.detach {
        let dir = if cli.dir.is_some() {
            format!(" --dir {}", layout.dir().display())
        } else {
            String::new()
        };
        output::line(&format!(
            "next: `ebb{dir} mount DIR`, `ebb{dir} cp -r SRC ebb:/`, `ebb{dir} status`"
        ))?;
    }
    Ok(())
}

/// Flushes everything, then stops.
pub(crate) async fn down(cli: &Cli, args: &Down) -> Result<(), CliError> {
    let layout = find::layout(cli)?;
    if !layout.exists() {
        return Err(CliError::no_cluster(format!(
            "there is no cluster in {}",
            layout.dir().display()
        )));
    }
    let Some(pid) = process::living(&layout, "controller") else {
        let voters = layout.load()?.voters();
        let servers = voters.iter().map(|v| process_name(v.id)).chain(["s3".to_owned()]);
        if servers.into_iter().any(|n| process::living(&layout, &n).is_some()) {
            return Err(CliError::new(
                "the controller is dead but servers still run: `ebb up` takes them over, then `ebb down`",
            ));
        }
        return Err(CliError::no_cluster(format!(
            "the cluster in {} is not running",
            layout.dir().display()
        )));
    };
    let mut said = "keep";
    if !args.keep {
        let spinner = output::spinner("flushing to S3", cli.json);
        let flushed = flush_all(&find::meta(cli)?, args, |m| spinner.set_message(m)).await;
        spinner.finish_and_clear();
        flushed?;
        said = "clean";
    }
    ebb_controller::layout::write_atomically(&layout.run(DOWN_FILE), said.as_bytes(), 0o644)?;
    kill(pid, Signal::SIGTERM)
        .map_err(|e| CliError::new(format!("cannot signal the controller: {e}")))?;
    let spinner = output::spinner("stopping the servers", cli.json);
    let deadline = Instant::now() + Duration::from_secs(60);
    while process::living(&layout, "controller").is_some() {
        if Instant::now() > deadline {
            return Err(CliError::new(format!("the controller (pid {pid}) does not stop")));
        }
        tokio::time::sleep(POLL).await;
    }
    spinner.finish_and_clear();
    if cli.json {
        return output::json(&serde_json::json!({ "down": true, "kept": args.keep }));
    }
    output::line(if args.keep {
        "down; dirty data stays in the directory: `ebb up` goes on with it"
    } else {
        "down; everything is in the bucket"
    })
}

/// Asks for a shutdown until nothing is left, as long as it gets less.
async fn flush_all(
    meta: &MetaClient,
    args: &Down,
    progress: impl Fn(String),
) -> Result<(), CliError> {
    let mut best = u64::MAX;
    let mut since = Instant::now();
    loop {
        let report = match admin(meta, AdminCall::Shutdown { abandon: args.abandon }).await {
            Ok(AdminReply::Flushed(report)) => report,
            Ok(other) => return Err(CliError::new(format!("unexpected reply {other:?}"))),
            // A long flush outlasts one call's patience; ask again.
            Err(e) if since.elapsed() < Duration::from_secs(args.patience) => {
                tracing::debug!(error = %e, "asking again");
                FlushReport { remaining: best, ..FlushReport::default() }
            }
            Err(e) => return Err(e.into()),
        };
        if report.remaining == 0 {
            return Ok(());
        }
        progress(format!("flushing to S3: {} left", report.remaining));
        if report.remaining < best {
            best = report.remaining;
            since = Instant::now();
        }
        if since.elapsed() >= Duration::from_secs(args.patience) {
            let _ = admin(meta, AdminCall::Resume).await;
            let failed: Vec<String> =
                report.failed.iter().map(|(p, why)| format!("  {p}: {why}")).collect();
            return Err(CliError::unsafe_to_go_on(format!(
                "{} files are not in S3 and none got there for {} s; nothing was stopped.\n{}\n\
                 `ebb down --keep` stops and keeps them here for the next `ebb up`; \
                 `ebb down --abandon` drops them.",
                report.remaining,
                args.patience,
                failed.join("\n")
            )));
        }
        tokio::time::sleep(POLL).await;
    }
}
