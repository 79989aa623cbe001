//! `ebb bench engines`: finds the cluster's nodes on this machine and starts the minimal servers, which
//! are this program again. The measuring is in `ebb_bench::engines`.

use crate::args::{BenchEngineServer, BenchEngines, Cli};
use crate::exit::CliError;
use crate::find;
use ebb_bench::engines::{self, Node, Outcome, Plan, ServerArgs};
use ebb_client::{Cluster, Config, FileSystem};
use ebb_controller::Layout;
use std::io;
use std::process::Command;
use std::time::Duration;

/// Measures.
pub(crate) async fn run(
    cli: &Cli,
    args: &BenchEngines,
    say: impl Fn(&str),
) -> Result<Outcome, CliError> {
    engines::available()?;
    let layout = find::layout(cli)?;
    if !layout.exists() {
        return Err(CliError::usage(
            "the servers are compared on one disk and one CPU: it needs a cluster of this machine (--dir)",
        ));
    }
    let (addresses, key) = find::cluster(cli)?;
    let plan = Plan {
        jobs: args.job.clone(),
        connections: args.connections,
        seconds: args.seconds,
        runs: args.runs,
        file_bytes: args.file,
        dir: layout.dir().to_owned(),
        nodes: nodes(&layout)?,
        meta: addresses.clone(),
        key: key.clone(),
        without_checksums: !args.checksums_only,
        server: command,
    };
    let label = format!("ebb bench engines, pid {}", std::process::id());
    let patience = Duration::from_secs(30);
    let config = Config { patience, read_cache_bytes: 0, ..Config::default() };
    let cluster = Cluster::connect(addresses, key, &label, config).await?;
    let fs = FileSystem::new(&cluster);
    let result = engines::run(&fs, &plan, say).await;
    let closed = fs.close().await;
    let outcome = result?;
    closed?;
    Ok(outcome)
}

/// The cluster's data nodes that run, with the ports they said when they got ready.
fn nodes(layout: &Layout) -> Result<Vec<Node>, CliError> {
    let run = layout.run("");
    let entries =
        std::fs::read_dir(&run).map_err(|e| CliError::new(format!("{}: {e}", run.display())))?;
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let file = entry.file_name();
        let Some(name) = file.to_str().and_then(|f| f.strip_suffix(".pid")) else { continue };
        let Some(pid) = ebb_controller::process::living(layout, name) else { continue };
        let ready = std::fs::read_to_string(layout.run(&format!("{name}.ready")));
        let ready: Option<serde_json::Value> =
            ready.ok().and_then(|t| serde_json::from_str(&t).ok());
        // Other servers have no ports.
        let Some(ports) = ready.as_ref().and_then(|r| r.get("ports")?.as_array()) else { continue };
        let ports = ports.iter().filter_map(|p| u16::try_from(p.as_u64()?).ok()).collect();
        found.push(Node { pid: pid.as_raw(), ports });
    }
    Ok(found)
}

/// This program as a minimal server.
fn command(args: &ServerArgs) -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["bench", "engine-server", "--engine", args.engine.name(), "--file"]);
    command.arg(&args.file).arg("--cpu").arg(args.cpu.to_string());
    if !args.checksums {
        command.arg("--no-checksums");
    }
    Ok(command)
}

/// `ebb bench engine-server`, on a thread that knows of no other runtime.
pub(crate) async fn serve(args: &BenchEngineServer) -> Result<(), CliError> {
    let args = ServerArgs {
        engine: args.engine,
        file: args.file.clone(),
        cpu: args.cpu,
        checksums: !args.no_checksums,
    };
    let server = std::thread::Builder::new().name("engine".into());
    let server = server
        .spawn(move || engines::serve(&args))
        .map_err(|e| CliError::new(format!("cannot start a thread: {e}")))?;
    let ended = tokio::task::spawn_blocking(move || server.join())
        .await
        .map_err(|e| CliError::new(e.to_string()))?;
    ended.map_err(|_| CliError::new("the engine panicked"))??;
    Ok(())
}
