//! Which cluster a command means: `--cluster`/`EBB_CLUSTER` with a key file, or the local one in
//! `--dir`/`EBB_DIR` (default `~/.ebb`).

use crate::args::Cli;
use crate::exit::CliError;
use ebb_controller::Layout;
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_rpc::{Identity, MetaClient};
use std::path::{Path, PathBuf};

/// Directory of the local cluster.
pub(crate) fn layout(cli: &Cli) -> Result<Layout, CliError> {
    let dir =
        match &cli.dir {
            Some(dir) => dir.clone(),
            None => PathBuf::from(std::env::var_os("HOME").ok_or_else(|| {
                CliError::usage("say where the cluster is: --dir DIR, or set HOME")
            })?)
            .join(".ebb"),
        };
    let dir = std::path::absolute(&dir)
        .map_err(|e| CliError::usage(format!("{}: {e}", dir.display())))?;
    Ok(Layout::new(dir))
}

/// Addresses of the metadata servers and the key.
pub(crate) fn cluster(cli: &Cli) -> Result<(Vec<String>, ClusterKey), CliError> {
    let layout = layout(cli)?;
    let addresses = match &cli.cluster {
        Some(list) => {
            list.split(',').map(|a| a.trim().to_owned()).filter(|a| !a.is_empty()).collect()
        }
        None => {
            if !layout.exists() {
                return Err(CliError::no_cluster(format!(
                    "there is no cluster in {}: start one with `ebb up`, or name one with --dir or --cluster",
                    layout.dir().display()
                )));
            }
            running(&layout)?
        }
    };
    if addresses.is_empty() {
        return Err(CliError::usage("--cluster names no address"));
    }
    let key = match &cli.key_file {
        Some(path) => std::fs::read_to_string(path)
            .map_err(|e| e.to_string())
            .and_then(|t| ClusterKey::from_hex(&t).map_err(|e| e.to_string()))
            .map_err(|e| CliError::no_cluster(format!("key file {}: {e}", path.display())))?,
        None => layout.load_key().map_err(|e| {
            CliError::no_cluster(format!("{e}; name the cluster's key with --key-file"))
        })?,
    };
    Ok((addresses, key))
}

/// The same of another cluster of this machine.
pub(crate) fn cluster_in(dir: &Path) -> Result<(Vec<String>, ClusterKey), CliError> {
    let dir =
        std::path::absolute(dir).map_err(|e| CliError::usage(format!("{}: {e}", dir.display())))?;
    let layout = Layout::new(dir);
    if !layout.exists() {
        let dir = layout.dir().display();
        return Err(CliError::no_cluster(format!("there is no cluster in {dir}")));
    }
    let key = layout.load_key().map_err(|e| CliError::no_cluster(e.to_string()))?;
    Ok((running(&layout)?, key))
}

fn running(layout: &Layout) -> Result<Vec<String>, CliError> {
    let endpoints = layout.load_endpoints().map_err(|_| {
        CliError::no_cluster(format!(
            "the cluster in {} is not running: `ebb up --dir {0}` brings it back",
            layout.dir().display()
        ))
    })?;
    Ok(endpoints.meta)
}

/// A client for operators' calls.
pub(crate) fn meta(cli: &Cli) -> Result<MetaClient, CliError> {
    let (addresses, key) = cluster(cli)?;
    Ok(MetaClient::new(addresses, Identity::new(key, Role::Controller)))
}
