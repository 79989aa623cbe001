//! `ebb meta`: the voters of the metadata plane.
//!
//! Who votes is in the group's log; the file of voters says which processes the controller runs. A voter is
//! started first, then added (it catches up, then votes); it is taken out first, then stopped.

use crate::args::{Cli, Meta, MetaAdd, MetaId, MetaWhat};
use crate::exit::CliError;
use crate::{dump, find, output};
use ebb_controller::Layout;
use ebb_controller::voters::{Voters, process_name};
use ebb_metaplane_protocol::admin::{VoterRole, VoterStatus};
use ebb_metaplane_protocol::{AdminCall, AdminReply, FsError, Request, Response};
use ebb_rpc::MetaClient;
use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(100);
/// One call: a new voter catches up meanwhile.
const PATIENCE: Duration = Duration::from_secs(60);
/// A new server answers by then.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// A new voter has caught up by then, however large the state is.
const CATCH_UP_PATIENCE: Duration = Duration::from_secs(3600);

/// `ebb meta`
pub(crate) async fn meta(cli: &Cli, args: &Meta) -> Result<(), CliError> {
    match &args.what {
        MetaWhat::List => list(cli).await,
        MetaWhat::Dump(to) => dump::dump(cli, to).await,
        MetaWhat::Load(from) => dump::load(cli, from).await,
        MetaWhat::Add(MetaAdd { address: Some(address), id: Some(id) }) => {
            add(&find::meta(cli)?, *id, address).await?;
            said(cli, "added", *id)
        }
        MetaWhat::Add(_) => {
            let id = add_here(cli).await?;
            said(cli, "added", id)
        }
        MetaWhat::Remove(MetaId { voter }) => {
            remove(cli, *voter).await?;
            said(cli, "removed", *voter)
        }
        MetaWhat::Replace(MetaId { voter }) => {
            let known = voters(&find::meta(cli)?).await?;
            if !known.iter().any(|v| v.id == *voter) {
                return Err(CliError::usage(format!("there is no voter {voter}: `ebb meta list`")));
            }
            let id = add_here(cli).await?;
            remove(cli, *voter).await?;
            said(cli, "added", id)
        }
    }
}

fn said(cli: &Cli, what: &str, id: u64) -> Result<(), CliError> {
    if cli.json {
        return output::json(&serde_json::json!({ "voter": id, "done": what }));
    }
    output::line(&format!("{what}: voter {id}"))
}

/// One call of an operator, repeated while the answer is `Again`.
pub(crate) async fn call(
    meta: &MetaClient,
    call: AdminCall,
    patience: Duration,
) -> Result<AdminReply, CliError> {
    let end = Instant::now() + patience;
    loop {
        match meta.call(&Request::Admin(call.clone()), PATIENCE).await? {
            Response::Admin(Err(FsError::Again { .. })) if Instant::now() < end => {
                tokio::time::sleep(POLL).await;
            }
            Response::Admin(Err(FsError::Invalid(why))) => return Err(CliError::new(why)),
            Response::Admin(reply) => return Ok(reply?),
            other => return Err(CliError::new(format!("unexpected reply {other:?}"))),
        }
    }
}

/// The voters, as the leader sees them.
pub(crate) async fn voters(meta: &MetaClient) -> Result<Vec<VoterStatus>, CliError> {
    match call(meta, AdminCall::Voters, PATIENCE).await? {
        AdminReply::Voters(voters) => Ok(voters),
        other => Err(CliError::new(format!("unexpected reply {other:?}"))),
    }
}

/// A voter, for people.
pub(crate) fn describe(v: &VoterStatus) -> String {
    let role = match v.role {
        VoterRole::Leader => "leader",
        VoterRole::Follower => "follower",
        VoterRole::Learner => "learner",
    };
    let state = match (v.role, v.lag, v.heard_ms) {
        (VoterRole::Leader, ..) => String::new(),
        (_, Some(0), Some(ms)) if ms < 1_000 => ", has everything".into(),
        (_, Some(lag), Some(ms)) if ms < 1_000 => format!(", {lag} entries behind"),
        (_, _, Some(ms)) => format!(", NOT HEARD for {}", output::age(ms)),
        (_, _, None) => ", NOT HEARD".into(),
    };
    format!("voter {:<3} {role:<8} {}{state}", v.id, v.address)
}

async fn list(cli: &Cli) -> Result<(), CliError> {
    let voters = voters(&find::meta(cli)?).await?;
    if cli.json {
        return output::json(&voters);
    }
    voters.iter().try_for_each(|v| output::line(&describe(v)))
}

async fn add(meta: &MetaClient, id: u64, address: &str) -> Result<(), CliError> {
    let add = AdminCall::AddVoter { id, address: address.to_owned() };
    call(meta, add, CATCH_UP_PATIENCE).await.map(drop)
}

/// The file of a local cluster's voters, made if there was one voter so far.
fn load(layout: &Layout) -> Result<Voters, CliError> {
    if let Some(voters) = Voters::load(layout)? {
        return Ok(voters);
    }
    match layout.load()?.meta_port {
        0 => Err(CliError::no_cluster("the metadata server has not started yet: `ebb up`")),
        port => Ok(Voters::found(&[port])),
    }
}

/// Starts a server and makes it a voter.
async fn add_here(cli: &Cli) -> Result<u64, CliError> {
    if cli.cluster.is_some() {
        return Err(CliError::usage(
            "servers are only started for the cluster in --dir: start one with `ebb serve meta` and \
             `join = true`, then `ebb meta add --id N --address HOST:PORT`",
        ));
    }
    let layout = find::layout(cli)?;
    let meta = find::meta(cli)?;
    let known = voters(&meta).await?;
    let used = known.iter().map(|v| v.id).max().unwrap_or(0);
    let host = layout.load()?.host;
    let port = crate::up::free_ports(&host, 1)?[0];
    let mut all = load(&layout)?;
    let new = all.add(port, used);
    all.save(&layout)?;
    let spinner = output::spinner("starting a metadata server", cli.json);
    let added = async {
        wait_until_ready(&layout, new.id).await?;
        spinner.set_message("it catches up");
        add(&meta, new.id, &format!("{host}:{port}")).await
    };
    let added = added.await;
    spinner.finish_and_clear();
    if let Err(e) = added {
        // Unless it was taken in all the same: then `ebb meta remove` is what ends it.
        let is_in = voters(&meta).await.is_ok_and(|all| all.iter().any(|v| v.id == new.id));
        if !is_in {
            forget(&layout, new.id)?;
        }
        return Err(e);
    }
    Ok(new.id)
}

async fn wait_until_ready(layout: &Layout, id: u64) -> Result<(), CliError> {
    let name = process_name(id);
    let end = Instant::now() + START_PATIENCE;
    while !layout.run(&format!("{name}.ready")).exists() {
        if let Ok(words) = std::fs::read_to_string(layout.run(&format!("{name}.failed"))) {
            let words = words.split_once('\n').map_or(words.as_str(), |w| w.1).to_owned();
            return Err(CliError::new(format!("{name} does not start: {words}")));
        }
        if Instant::now() > end {
            return Err(CliError::new(format!(
                "{name} does not start (log: {}); is the controller running?",
                layout.log(&name).display()
            )));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// The controller runs it no more.
fn forget(layout: &Layout, id: u64) -> Result<(), CliError> {
    let Some(mut all) = Voters::load(layout)? else { return Ok(()) };
    all.voters.retain(|v| v.id != id);
    Ok(all.save(layout)?)
}

async fn remove(cli: &Cli, id: u64) -> Result<(), CliError> {
    let meta = find::meta(cli)?;
    call(&meta, AdminCall::RemoveVoter { id }, PATIENCE).await?;
    if cli.cluster.is_none() {
        let layout = find::layout(cli)?;
        let all = load(&layout)?;
        all.save(&layout)?;
        forget(&layout, id)?;
    }
    Ok(())
}
