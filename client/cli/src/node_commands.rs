//! `ebb node`: which data nodes there are, and the end of one that never comes back (PROTOCOL R24).

use crate::args::{Cli, Node, NodeAbandon, NodeWhat};
use crate::exit::CliError;
use crate::{find, output};
use ebb_controller::run::status;
use ebb_dataplane_protocol::NodeId;
use ebb_metaplane_protocol::admin::AbandonReport;
use ebb_metaplane_protocol::{AdminCall, AdminReply, ClusterStatus, FsError, Request, Response};
use serde::Serialize;
use std::time::Duration;

/// Files whose objects are on their way to S3 are waited for.
const PATIENCE: Duration = Duration::from_secs(120);

/// A node, for machines.
#[derive(Serialize)]
struct Listed {
    node: u32,
    state: ebb_dataplane_protocol::NodeState,
    address: String,
    groups: usize,
    dirty_bytes: u64,
    heartbeat_age_ms: Option<u64>,
    /// `None`: it has a lease, or may have one.
    cut_off_ms: Option<u64>,
    /// Groups of which it may have the only copy of something, if it is cut off.
    waiting_groups: usize,
}

/// `ebb node`
pub(crate) async fn node(cli: &Cli, args: &Node) -> Result<(), CliError> {
    match &args.what {
        NodeWhat::List => list(cli).await,
        NodeWhat::Abandon(args) => abandon(cli, args).await,
    }
}

fn listed(s: &ClusterStatus) -> Vec<Listed> {
    let mut nodes: Vec<Listed> = s
        .map
        .nodes
        .iter()
        .map(|n| {
            let report = s.nodes.iter().find(|r| r.node == n.id);
            let cut = s.cut_off.iter().find(|c| c.node == n.id);
            let ports = n.ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
            Listed {
                node: n.id.0,
                state: n.state,
                address: format!("{}:{ports}", n.host),
                groups: s.map.groups_of(n.id).count(),
                dirty_bytes: report.map_or(0, |r| r.cores.iter().map(|c| c.dirty_bytes).sum()),
                heartbeat_age_ms: report.and_then(|r| r.heartbeat_age_ms),
                cut_off_ms: cut.map(|c| c.since_ms),
                waiting_groups: cut.map_or(0, |c| c.waiting.len()),
            }
        })
        .collect();
    nodes.sort_by_key(|n| n.node);
    nodes
}

async fn list(cli: &Cli) -> Result<(), CliError> {
    let nodes = listed(&status(&find::meta(cli)?).await?);
    if cli.json {
        return output::json(&nodes);
    }
    for n in &nodes {
        let cut_off = match n.cut_off_ms {
            None => String::new(),
            Some(ms) => {
                format!(", CUT OFF for {}, {} groups wait", output::age(ms), n.waiting_groups)
            }
        };
        output::line(&format!(
            "node {:<3} {:<9} {} {} groups, {} dirty, heartbeat {}{cut_off}",
            n.node,
            format!("{:?}", n.state).to_lowercase(),
            n.address,
            n.groups,
            output::bytes(n.dirty_bytes),
            n.heartbeat_age_ms.map_or("never".into(), |ms| format!("{} ago", output::age(ms))),
        ))?;
    }
    Ok(())
}

async fn abandon(cli: &Cli, args: &NodeAbandon) -> Result<(), CliError> {
    let call = AdminCall::Abandon { node: NodeId(args.node), yes: args.yes };
    let report = match find::meta(cli)?.call(&Request::Admin(call), PATIENCE).await {
        Ok(Response::Admin(Ok(AdminReply::Abandoned(report)))) => report,
        Ok(Response::Admin(Err(FsError::Invalid(why)))) => return Err(CliError::new(why)),
        Ok(Response::Admin(Err(e))) => return Err(CliError::new(e.to_string())),
        Ok(other) => return Err(CliError::new(format!("unexpected reply {other:?}"))),
        Err(e) => return Err(CliError::new(e.to_string())),
    };
    if cli.json {
        return output::json(&report);
    }
    print_report(args.node, &report)
}

fn print_report(node: u32, r: &AbandonReport) -> Result<(), CliError> {
    for f in &r.files {
        let what = match f.stored_bytes {
            Some(stored) => format!(
                "goes back from {} to the {} in S3",
                output::bytes(f.bytes),
                output::bytes(stored)
            ),
            None => format!("LOST, {}", output::bytes(f.bytes)),
        };
        output::line(&format!("{}: {what}", f.path))?;
    }
    let named = r.files.len() as u64;
    if named < r.reverted + r.lost {
        output::line(&format!("… and {} more", r.reverted + r.lost - named))?;
    }
    let files = format!("{} files go back to what is in S3, {} are lost", r.reverted, r.lost);
    match r.done {
        true => output::line(&format!(
            "node {node} is gone: {files}. Its directory must be wiped before it may join again"
        )),
        false => output::line(&format!(
            "node {node} holds {} groups; if it never comes back, {files}. \
             Nothing was changed: `ebb node abandon {node} --yes` does it",
            r.groups
        )),
    }
}
