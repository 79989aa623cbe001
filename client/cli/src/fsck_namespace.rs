//! `ebb fsck` without a device: the namespace of a running cluster, and what its nodes have of it.

use crate::args::Cli;
use crate::exit::CliError;
use crate::meta_commands::call;
use crate::{find, output};
use ebb_metaplane_protocol::check::{
    BATCH_MAX, CheckProgress, Checked, Finding, Repair, Stray, Strays,
};
use ebb_metaplane_protocol::{AdminCall, AdminReply};
use ebb_rpc::MetaClient;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::Duration;

/// One call; the first also waits for another check to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// Findings that are named one by one, to people.
const NAMED_MAX: usize = 20;
/// One finding may hide behind another: a directory that lost its name, behind that name's directory.
const ROUNDS_MAX: usize = 20;
/// What is on its way out of a node is gone by then.
const STRAY_LOOKS: usize = 10;
const STRAY_PAUSE: Duration = Duration::from_millis(500);

/// What a whole check gave.
struct Outcome {
    checked: Checked,
    findings: Vec<Finding>,
    unnamed: u64,
}

/// Checks, and mends if it is asked to; fails if something is wrong in the end.
pub(crate) async fn fsck(cli: &Cli, repair: bool) -> Result<(), CliError> {
    let meta = find::meta(cli)?;
    let mut outcome = check(cli, &meta).await?;
    let first = summary(&outcome);
    if !cli.json {
        print(&outcome)?;
    }
    let mut repairs = 0;
    for _ in 0..ROUNDS_MAX {
        let mend: Vec<Repair> = outcome.findings.iter().filter_map(|f| f.repair.clone()).collect();
        if !repair || mend.is_empty() {
            break;
        }
        repairs += mend.len();
        for batch in mend.chunks(BATCH_MAX) {
            call(&meta, AdminCall::Repair(batch.to_vec()), PATIENCE).await?;
        }
        outcome = check(cli, &meta).await?;
    }
    let strays = strays(cli, &meta).await?;
    let left = outcome.findings.len() as u64 + outcome.unnamed;
    if cli.json {
        output::json(&json!({
            "checked": outcome.checked,
            "found": first,
            "repairs": repairs,
            "left": summary(&outcome),
            "findings": outcome.findings.iter().map(as_json).collect::<Vec<_>>(),
            "not_named": outcome.unnamed,
            "nodes": strays,
        }))?;
    } else {
        if repairs > 0 {
            output::line(&format!("{repairs} repairs were made"))?;
            print(&outcome)?;
        }
        print_strays(&strays)?;
        if left == 0 && strays.strays.is_empty() {
            output::line("sound")?;
        }
    }
    let known = strays.strays.iter().filter(|s| s.known).count();
    if known > 0 {
        return Err(CliError::new(format!(
            "data nodes have bytes of {known} files that the namespace takes for stored in S3: `ebb cp` them \
             elsewhere before anything writes to them, and please report this"
        )));
    }
    if left == 0 && !strays.strays.is_empty() {
        let gone = strays.strays.len();
        return Err(CliError::new(format!(
            "data nodes still have data of {gone} files that are gone"
        )));
    }
    match (left, repair) {
        (0, _) => Ok(()),
        (n, false) => {
            Err(CliError::new(format!("{n} findings: `ebb fsck --repair` mends what can be")))
        }
        (n, true) => Err(CliError::new(format!("{n} findings are left that nothing can mend"))),
    }
}

async fn progress(meta: &MetaClient, check: Option<u64>) -> Result<CheckProgress, CliError> {
    match call(meta, AdminCall::Check(check), PATIENCE).await? {
        AdminReply::Check(progress) => Ok(progress),
        other => Err(CliError::new(format!("unexpected reply {other:?}"))),
    }
}

async fn check(cli: &Cli, meta: &MetaClient) -> Result<Outcome, CliError> {
    let bar = output::counter("checking the namespace", cli.json);
    let mut findings = Vec::new();
    let mut next = None;
    loop {
        let p = progress(meta, next).await?;
        next = Some(p.check);
        bar.set_length(p.records.max(p.checked.records));
        bar.set_position(p.checked.records);
        findings.extend(p.findings);
        if p.done {
            bar.finish_and_clear();
            return Ok(Outcome { checked: p.checked, findings, unnamed: p.unnamed });
        }
    }
}

/// What nodes have that nobody knows of, look after look: what was on its way out is not there any more.
async fn strays(cli: &Cli, meta: &MetaClient) -> Result<Strays, CliError> {
    let spinner = output::spinner("comparing with the data nodes", cli.json);
    let mut last: Option<Strays> = None;
    for _ in 0..STRAY_LOOKS {
        let AdminReply::Strays(mut now) = call(meta, AdminCall::Strays, PATIENCE).await? else {
            return Err(CliError::new("an answer that does not fit"));
        };
        if let Some(before) = &last {
            now.strays.retain(|s| before.strays.contains(s));
        }
        let over = now.strays.is_empty();
        last = Some(now);
        if over {
            break;
        }
        tokio::time::sleep(STRAY_PAUSE).await;
    }
    spinner.finish_and_clear();
    Ok(last.unwrap_or_default())
}

fn summary(o: &Outcome) -> BTreeMap<String, u64> {
    let mut rules = BTreeMap::new();
    for f in &o.findings {
        *rules.entry(rule(f)).or_default() += 1;
    }
    rules
}

fn rule(f: &Finding) -> String {
    let name = serde_json::to_value(f.rule).ok().and_then(|v| v.as_str().map(str::to_owned));
    name.unwrap_or_default()
}

fn as_json(f: &Finding) -> serde_json::Value {
    json!({ "rule": f.rule, "what": f.what, "can_be_mended": f.repair.is_some() })
}

fn print(o: &Outcome) -> Result<(), CliError> {
    let c = &o.checked;
    output::line(&format!(
        "{} records: {} inodes, {} names, {} of files, {} not in S3 yet",
        c.records,
        c.inodes,
        c.names,
        output::bytes(c.bytes),
        c.dirty
    ))?;
    for f in o.findings.iter().take(NAMED_MAX) {
        let can = if f.repair.is_some() { "" } else { " (nobody can tell what would be right)" };
        output::line(&format!("  {}: {}{can}", rule(f), f.what))?;
    }
    let more = o.findings.len().saturating_sub(NAMED_MAX) as u64 + o.unnamed;
    if more > 0 {
        output::line(&format!("  and {more} more"))?;
    }
    Ok(())
}

fn print_strays(s: &Strays) -> Result<(), CliError> {
    output::line(&format!("{} dirty files on the data nodes compared", s.compared))?;
    for why in &s.silent {
        output::line(&format!("  NOT COMPARED: {why}"))?;
    }
    for stray in s.strays.iter().take(NAMED_MAX) {
        let Stray { core, pg, inode, known } = stray;
        let what = if *known { "which S3 is said to have" } else { "which is gone" };
        let (node, core) = (core.node, core.core);
        output::line(&format!("  core {node}.{core}, group {pg}: data of inode {inode}, {what}"))?;
    }
    Ok(())
}
