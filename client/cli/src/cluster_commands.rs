//! Commands about the cluster: status, scale, flush, evict, warm, env.

use crate::args::{Cli, FlushArgs, OnePath, Scale};
use crate::exit::CliError;
use crate::{file_commands, find, meta_commands, output};
use ebb_controller::run::{admin, status as ask_status};
use ebb_dataplane_protocol::control::CoreStats;
use ebb_metaplane_protocol::admin::{FlushReport, VoterStatus};
use ebb_metaplane_protocol::{AdminCall, AdminReply, ClusterStatus, Request, Response};
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(100);
/// A flush may take long; the server answers when it is done.
const FLUSH_PATIENCE: Duration = Duration::from_secs(3600);

#[derive(serde::Serialize)]
struct Said<'a> {
    #[serde(flatten)]
    status: &'a ClusterStatus,
    misplaced: usize,
    voters: &'a [VoterStatus],
}

/// `ebb status`
pub(crate) async fn status(cli: &Cli) -> Result<(), CliError> {
    let meta = find::meta(cli)?;
    let status = ask_status(&meta).await?;
    let voters = meta_commands::voters(&meta).await?;
    if cli.json {
        let (misplaced, status, voters) = (status.misplaced(), &status, &voters[..]);
        return output::json(&Said { status, misplaced, voters });
    }
    print_status(&status, &voters)
}

fn print_status(s: &ClusterStatus, voters: &[VoterStatus]) -> Result<(), CliError> {
    let held = s.map.pgs.iter().filter(|pg| !pg.members.is_empty()).count();
    output::line(&format!("bucket   {}", s.bucket))?;
    output::line(&format!(
        "metadata {} voter{}",
        voters.len(),
        if voters.len() == 1 { "" } else { "s" }
    ))?;
    for voter in voters {
        output::line(&format!("  {}", meta_commands::describe(voter)))?;
    }
    output::line(&format!(
        "groups   {held} of {} held{}{}{}",
        s.map.pgs.len(),
        match s.misplaced() {
            0 => String::new(),
            n => format!(", {n} not yet where they belong"),
        },
        if s.moves.is_empty() { String::new() } else { format!(", {} moving", s.moves.len()) },
        if s.shutting_down { ", SHUTTING DOWN" } else { "" },
    ))?;
    if s.replicas > 1 {
        let g = &s.groups;
        output::line(&format!(
            "copies   {} wanted, {} needed: {} groups in-sync, {} syncing, {} degraded",
            s.replicas, s.min_in_sync, g.in_sync, g.syncing, g.degraded
        ))?;
        let of = |what: fn(&CoreStats) -> u64| -> u64 {
            s.nodes.iter().flat_map(|n| &n.cores).map(what).sum()
        };
        output::line(&format!(
            "         {} members being copied to, {} copied; {} mutations sent, {} taken, {} answers waited for them",
            of(|c| c.members_syncing),
            output::bytes(of(|c| c.copied_bytes)),
            of(|c| c.replicated),
            of(|c| c.followed),
            of(|c| c.replication_waits)
        ))?;
    }
    output::line(&format!(
        "files    {} inodes known, {} not in S3 yet{}, {} keys pending",
        s.inodes,
        s.dirty_inodes,
        if s.dirty_inodes > 0 {
            format!(" (oldest {})", output::age(s.dirty_oldest_ms))
        } else {
            String::new()
        },
        s.pending_keys
    ))?;
    output::line(&format!("nodes    {} wanted", s.desired_nodes))?;
    for node in &s.map.nodes {
        let report = s.nodes.iter().find(|n| n.node == node.id);
        let sum = |f: fn(&ebb_dataplane_protocol::control::CoreStats) -> u64| {
            report.map_or(0, |r| r.cores.iter().map(f).sum::<u64>())
        };
        let (hits, misses) = (sum(|c| c.hits), sum(|c| c.misses));
        output::line(&format!(
            "  node {:<3} {:<9} {}:{} {} groups, {} dirty, {} clean of {}, hit rate {}{}{}, heartbeat {}",
            node.id,
            format!("{:?}", node.state).to_lowercase(),
            node.host,
            node.ports.iter().map(u16::to_string).collect::<Vec<_>>().join(","),
            s.map.groups_of(node.id).count(),
            output::bytes(sum(|c| c.dirty_bytes)),
            output::bytes(sum(|c| c.clean_bytes)),
            output::bytes(node.capacity_bytes),
            if hits + misses == 0 {
                "-".into()
            } else {
                format!("{:.0} %", 100.0 * hits as f64 / (hits + misses) as f64)
            },
            match sum(|c| c.peer_reads) {
                0 => String::new(),
                n => format!(", {n} fills from other nodes"),
            },
            spill_line(&sum),
            report
                .and_then(|r| r.heartbeat_age_ms)
                .map_or("never".into(), |ms| format!("{} ago", output::age(ms))),
        ))?;
    }
    output::line(&format!("sessions {}", s.sessions.len()))?;
    for session in &s.sessions {
        output::line(&format!("  {session}"))?;
    }
    if let Some((error, age)) = &s.s3_error {
        output::line(&format!("S3 error {} ago: {error}", output::age(*age)))?;
    }
    for warning in &s.warnings {
        output::line(&format!("warning: {warning}"))?;
    }
    Ok(())
}

/// What a node's spill tier holds and did; nothing if there is none.
fn spill_line(sum: &impl Fn(fn(&CoreStats) -> u64) -> u64) -> String {
    let (capacity, errors, off) =
        (sum(|c| c.spill_capacity_bytes), sum(|c| c.spill_errors), sum(|c| c.spill_off));
    let late = sum(|c| c.spill_late);
    if capacity + errors + off == 0 {
        return String::new();
    }
    let mut line = format!(
        ", spill tier {} of {}, {} fills from it, {} written, {} on the way, {} dropped",
        output::bytes(sum(|c| c.spill_bytes)),
        output::bytes(capacity),
        sum(|c| c.spill_hits),
        output::bytes(sum(|c| c.spill_written_bytes)),
        output::bytes(sum(|c| c.spill_waiting_bytes)),
        output::bytes(sum(|c| c.spill_dropped_bytes)),
    );
    if errors > 0 {
        line += &format!(", {errors} errors");
    }
    if late > 0 {
        line += &format!(", {late} reads too late");
    }
    if off > 0 {
        line += &format!(", off on {off} cores");
    }
    line
}

/// `ebb scale`
pub(crate) async fn scale(cli: &Cli, args: &Scale) -> Result<(), CliError> {
    let meta = find::meta(cli)?;
    let before = ask_status(&meta).await?;
    admin(&meta, AdminCall::SetDesired { nodes: args.nodes }).await?;
    if !args.wait {
        if !cli.json {
            output::line(&format!("scaling to {}: see `ebb status`", args.nodes))?;
        }
        return Ok(());
    }
    let started = Instant::now();
    let spinner = output::spinner("scaling", cli.json);
    loop {
        let s = match ask_status(&meta).await {
            Ok(s) => s,
            Err(e) if started.elapsed() < Duration::from_secs(args.deadline) => {
                tracing::debug!(error = %e, "asking again");
                tokio::time::sleep(POLL).await;
                continue;
            }
            Err(e) => return Err(e.into()),
        };
        let held = s.map.pgs.iter().filter(|pg| !pg.members.is_empty()).count();
        let groups = if args.nodes == 0 { 0 } else { s.map.pgs.len() };
        let settled =
            s.map.nodes.iter().all(|n| n.state == ebb_dataplane_protocol::NodeState::Active);
        if s.map.nodes.len() == args.nodes as usize
            && settled
            && held == groups
            && s.moves.is_empty()
        {
            spinner.finish_and_clear();
            let ms = started.elapsed().as_millis() as u64;
            if cli.json {
                return output::json(&serde_json::json!({ "nodes": args.nodes, "ms": ms }));
            }
            return output::line(&format!("{} data nodes, after {}", args.nodes, output::age(ms)));
        }
        spinner.set_message(format!(
            "{} nodes, {held} of {} groups held, {} moving, {} files not in S3",
            s.map.nodes.len(),
            s.map.pgs.len(),
            s.moves.len(),
            s.dirty_inodes
        ));
        if started.elapsed() > Duration::from_secs(args.deadline) {
            admin(&meta, AdminCall::SetDesired { nodes: before.desired_nodes }).await?;
            let why = s.s3_error.map(|(e, _)| format!("; S3 says: {e}")).unwrap_or_default();
            return Err(CliError::unsafe_to_go_on(format!(
                "not done after {} s with {} files not in S3{why}; the wish is {} nodes again, nothing was dropped",
                args.deadline, s.dirty_inodes, before.desired_nodes
            )));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// `ebb flush`
pub(crate) async fn flush(cli: &Cli, args: &FlushArgs) -> Result<(), CliError> {
    let inode = file_commands::resolve(cli, &args.path).await?.inode;
    let meta = find::meta(cli)?;
    let spinner = output::spinner("flushing to S3", cli.json || !args.wait);
    let call = Request::Admin(AdminCall::Flush { inode, wait: args.wait });
    let reply = meta.call(&call, FLUSH_PATIENCE).await?;
    spinner.finish_and_clear();
    let report = match reply {
        Response::Admin(Ok(AdminReply::Flushed(report))) => report,
        Response::Admin(Err(e)) => return Err(e.into()),
        other => return Err(CliError::new(format!("unexpected reply {other:?}"))),
    };
    print_flush(cli, args, &report)
}

fn print_flush(cli: &Cli, args: &FlushArgs, report: &FlushReport) -> Result<(), CliError> {
    if cli.json {
        output::json(&serde_json::json!({
            "flushed": report.flushed, "bytes": report.bytes,
            "remaining": report.remaining, "failed": report.failed,
        }))?;
    } else {
        output::line(&format!(
            "{} files, {} to S3{}",
            report.flushed,
            output::bytes(report.bytes),
            if report.remaining > 0 {
                format!(", {} still dirty", report.remaining)
            } else {
                String::new()
            }
        ))?;
        for (path, why) in &report.failed {
            output::line(&format!("  {path}: {why}"))?;
        }
    }
    if args.wait && !report.failed.is_empty() {
        return Err(CliError::s3(format!(
            "{} files did not reach S3; they stay safe and dirty",
            report.failed.len()
        )));
    }
    Ok(())
}

/// `ebb evict`
pub(crate) async fn evict(cli: &Cli, args: &OnePath) -> Result<(), CliError> {
    let inode = file_commands::resolve(cli, &args.path).await?.inode;
    subtree(cli, AdminCall::Evict { inode }).await
}

/// `ebb warm`
pub(crate) async fn warm(cli: &Cli, args: &OnePath) -> Result<(), CliError> {
    let inode = file_commands::resolve(cli, &args.path).await?.inode;
    subtree(cli, AdminCall::Warm { inode }).await
}

async fn subtree(cli: &Cli, call: AdminCall) -> Result<(), CliError> {
    match find::meta(cli)?.call(&Request::Admin(call), FLUSH_PATIENCE).await? {
        Response::Admin(Ok(_)) => Ok(()),
        Response::Admin(Err(e)) => Err(e.into()),
        other => Err(CliError::new(format!("unexpected reply {other:?}"))),
    }
}

/// `ebb env`
pub(crate) fn env(cli: &Cli) -> Result<(), CliError> {
    let layout = find::layout(cli)?;
    let config = layout.load()?;
    let mut vars: Vec<(&str, String)> = Vec::new();
    if config.embedded_s3 {
        let url = layout.load_endpoints().ok().and_then(|e| e.s3).ok_or_else(|| {
            CliError::no_cluster("the embedded S3 server is not running: `ebb up`")
        })?;
        vars.push(("AWS_ENDPOINT_URL", url.clone()));
        vars.push(("S3_ENDPOINT_URL", url));
        vars.push(("AWS_ACCESS_KEY_ID", config.embedded_access_key));
        vars.push(("AWS_SECRET_ACCESS_KEY", config.embedded_secret_key));
        vars.push(("AWS_REGION", "us-east-1".into()));
    } else if let Some(endpoint) = config.endpoint {
        vars.push(("AWS_ENDPOINT_URL", endpoint.clone()));
        vars.push(("S3_ENDPOINT_URL", endpoint));
    }
    if cli.json {
        let map: serde_json::Map<String, serde_json::Value> =
            vars.into_iter().map(|(k, v)| (k.to_owned(), v.into())).collect();
        return output::json(&map);
    }
    for (name, value) in vars {
        output::line(&format!("export {name}={value}"))?;
    }
    Ok(())
}
