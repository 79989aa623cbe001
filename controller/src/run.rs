//! The controller's loop: tend the processes, ask how things are, do what the plan says.

use crate::error::ControllerError as Error;
use crate::layout::{Endpoints, Layout, write_atomically};
use crate::local::{Launch, LocalCluster};
use crate::plan::{Action, plan, registered};
use crate::process;
use ebb_dataplane_protocol::auth::Role as PeerRole;
use ebb_metaplane_protocol::{AdminCall, AdminReply, ClusterStatus, Request, Response};
use ebb_rpc::{Identity, MetaClient};
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::future::Future;
use std::time::Duration;

/// Pause between turns: bounds how long a dead server stays dead.
const TURN: Duration = Duration::from_millis(200);
/// Patience with one call to the metadata plane.
const PATIENCE: Duration = Duration::from_secs(2);

/// What to leave behind when the cluster stops; written by `ebb down` before it signals.
pub const DOWN_FILE: &str = "down";

/// Takes the directory's lock for as long as the returned value lives.
pub fn lock(layout: &Layout) -> Result<Flock<File>, Error> {
    let path = layout.run("controller.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(Error::file("open", &path))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        if errno == nix::errno::Errno::EWOULDBLOCK {
            let pid = process::living(layout, "controller").map_or(0, nix::unistd::Pid::as_raw);
            Error::AlreadyRunning { dir: layout.dir().to_owned(), pid }
        } else {
            Error::file("lock", path)(errno.into())
        }
    })
}

/// Runs the cluster of `layout` until `stop` resolves; then stops its servers, and removes nodes'
/// and metadata's directories if `ebb down` said that the bucket holds everything.
pub async fn run(
    layout: Layout,
    launch: impl Launch,
    stop: impl Future<Output = ()>,
) -> Result<(), Error> {
    let _lock = lock(&layout)?;
    process::write_pid(&layout, "controller", nix::unistd::getpid())?;
    let _ = std::fs::remove_file(layout.run(DOWN_FILE));
    let config = layout.load()?;
    let key = layout.load_key()?;
    let mut cluster = LocalCluster::adopt(layout.clone(), config, launch)?;
    let mut meta: Option<MetaClient> = None;
    let mut published: Option<Endpoints> = None;
    let mut resumed = false;
    let mut ticks = tokio::time::interval(TURN);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tokio::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            _ = ticks.tick() => {}
        }
        if let Err(error) = cluster.tend() {
            tracing::error!(%error, "cannot tend the servers");
            continue;
        }
        if let Err(error) = cluster.retire_voters().await {
            tracing::error!(%error, "cannot remove what a voter left");
        }
        let Some(addresses) = cluster.meta_addresses() else { continue };
        let endpoints = Endpoints {
            meta: addresses,
            s3: cluster.s3_url(),
            controller_pid: std::process::id() as i32,
        };
        if published.as_ref() != Some(&endpoints) {
            let text = serde_json::to_vec_pretty(&endpoints).unwrap_or_default();
            write_atomically(&layout.endpoints(), &text, 0o644)?;
            let identity = Identity::new(key.clone(), PeerRole::Controller);
            meta = Some(MetaClient::new(endpoints.meta.clone(), identity));
            published = Some(endpoints);
        }
        let Some(meta) = &meta else { continue };
        match turn(&mut cluster, meta, !resumed).await {
            Ok(()) => resumed = true,
            Err(error) => tracing::warn!(%error, "will try again"),
        }
    }
    tracing::info!("stopping");
    if let Err(error) = cluster.retire_voters().await {
        tracing::error!(%error, "cannot remove what a voter left");
    }
    cluster.stop_all().await;
    let said = std::fs::read_to_string(layout.run(DOWN_FILE)).unwrap_or_default();
    if said.trim() == "clean" {
        cluster.wipe()?;
    }
    for file in [DOWN_FILE, "controller.pid", "endpoints.json"] {
        let _ = std::fs::remove_file(layout.run(file));
    }
    Ok(())
}

/// One look and what follows from it. `first`: the controller was just started, so the cluster is to be up.
async fn turn<L: Launch>(
    cluster: &mut LocalCluster<L>,
    meta: &MetaClient,
    first: bool,
) -> Result<(), Error> {
    let mut status = status(meta).await?;
    if first && status.shutting_down {
        admin(meta, AdminCall::Resume).await?;
        status.shutting_down = false;
    }
    if status.desired_nodes == 0 && status.wake_nodes == 0 && !status.shutting_down {
        // A new cluster, or one that woke from its bucket: nobody wished for anything yet.
        admin(meta, AdminCall::SetDesired { nodes: cluster.config.nodes }).await?;
        return Ok(());
    }
    let elsewhere = cluster.config.nodes_elsewhere;
    let processes = if elsewhere { registered(&status) } else { cluster.node_processes() };
    for action in plan(&status, &processes) {
        if elsewhere && matches!(action, Action::StartNode | Action::StopNode(_)) {
            // Whoever runs the machines starts one more; one that is gone is told to stop with its next heartbeat.
            continue;
        }
        tracing::info!(?action, "acting");
        match action {
            Action::Admin(call) => {
                admin(meta, call).await?;
            }
            Action::StartNode => cluster.start_node()?,
            Action::StopNode(name) => cluster.retire_node(&name).await?,
        }
    }
    Ok(())
}

/// How things are.
pub async fn status(meta: &MetaClient) -> Result<ClusterStatus, Error> {
    match admin(meta, AdminCall::Status).await? {
        AdminReply::Status(status) => Ok(*status),
        other => Err(unexpected(&other)),
    }
}

/// One call of the controller's.
pub async fn admin(meta: &MetaClient, call: AdminCall) -> Result<AdminReply, Error> {
    match meta.call(&Request::Admin(call), PATIENCE).await? {
        Response::Admin(result) => Ok(result?),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(reply: &dyn std::fmt::Debug) -> Error {
    Error::Refused(ebb_metaplane_protocol::FsError::Io(format!("unexpected reply {reply:?}")))
}
