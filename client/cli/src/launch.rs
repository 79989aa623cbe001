//! How the servers of a local cluster are started: their configuration files and command lines.

use crate::exit::CliError;
use ebb_client::{Cluster, Config, FileSystem};
use ebb_controller::layout::{ClusterConfig, Layout, write_atomically};
use ebb_controller::local::Record;
use ebb_controller::process::CommandSpec;
use ebb_controller::{ControllerError, Launch, Role};
use ebb_dataplane_protocol::auth::ClusterKey;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// S3 may be away this long when the metadata plane starts; then `ebb up` says so.
const S3_PATIENCE_S: u64 = 15;

/// Configuration of `ebb serve s3`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct S3Config {
    /// Written when it serves: `{"address": "host:port"}`.
    #[serde(default)]
    pub ready_file: Option<PathBuf>,
    /// The server's own.
    pub server: ebb_s3::server::ServerConfig,
}

/// Starts roles as processes of this binary.
pub(crate) struct LocalLaunch {
    program: PathBuf,
}

impl LocalLaunch {
    /// Of the running binary.
    pub(crate) fn new() -> Result<Self, CliError> {
        let program = std::env::current_exe()
            .map_err(|e| CliError::new(format!("cannot find myself: {e}")))?;
        Ok(Self { program })
    }
}

/// The bucket as the servers are told.
fn bucket(config: &ClusterConfig) -> Result<ebb_s3::BucketConfig, String> {
    let bucket = ebb_s3::BucketConfig::from_url(&config.bucket)
        .ok_or_else(|| format!("{:?} is not s3://BUCKET[/PREFIX]", config.bucket))?;
    Ok(match (&config.endpoint, config.embedded_s3) {
        (_, true) => bucket
            .with_endpoint(format!("http://{}:{}", config.host, config.s3_port))
            .with_credentials(&config.embedded_access_key, &config.embedded_secret_key),
        (Some(endpoint), false) => bucket.with_endpoint(endpoint),
        (None, false) => bucket,
    })
}

impl Launch for LocalLaunch {
    fn command(
        &self,
        role: &Role,
        layout: &Layout,
        config: &ClusterConfig,
    ) -> Result<CommandSpec, ControllerError> {
        let file = layout.run(&format!("{}.toml", role.name()));
        let bad = |reason: String| ControllerError::BadConfig { path: file.clone(), reason };
        let ready = layout.run(&format!("{}.ready", role.name()));
        let (what, text) = match role {
            Role::S3 => ("s3", s3_config(layout, config, ready).map_err(bad)?),
            Role::Meta(id) => ("meta", meta_config(*id, layout, config, ready).map_err(bad)?),
            Role::Data(name) => ("data", data_config(name, layout, config, ready).map_err(bad)?),
        };
        write_atomically(&file, text.as_bytes(), 0o600)?;
        Ok(CommandSpec {
            program: self.program.clone(),
            args: vec!["serve".into(), what.into(), "--config".into(), file.into()],
            env: vec![],
        })
    }
}

fn s3_config(layout: &Layout, config: &ClusterConfig, ready: PathBuf) -> Result<String, String> {
    let listen = format!("{}:{}", config.host, config.s3_port);
    let name = ebb_s3::BucketConfig::from_url(&config.bucket).map(|b| b.bucket);
    let server = ebb_s3::server::ServerConfig {
        dir: layout.s3(),
        listen: listen.parse().map_err(|e| format!("--host {}: {e}", config.host))?,
        access_key: config.embedded_access_key.clone(),
        secret_key: config.embedded_secret_key.clone(),
        buckets: name.into_iter().collect(),
        admin: None,
    };
    toml::to_string(&S3Config { ready_file: Some(ready), server }).map_err(|e| e.to_string())
}

/// For how long the embedded S3 server may still carry out a request whose reply was lost, unless it is
/// stopped (SIGSTOP, a stalled disk) for longer than that.
const EMBEDDED_REQUEST_VALID_MS: u64 = 15_000;

fn meta_config(
    id: u64,
    layout: &Layout,
    config: &ClusterConfig,
    ready: PathBuf,
) -> Result<String, String> {
    let voters = config.voters();
    let own =
        voters.iter().find(|v| v.id == id).ok_or_else(|| format!("there is no voter {id}"))?;
    let mut meta = ebb_metaplane::MetaConfig::new(
        layout.meta(id),
        format!("{}:{}", config.host, own.port),
        config.cluster.0,
        layout.key(),
        bucket(config)?,
    );
    meta.node_id = id;
    meta.join = own.join;
    if voters.len() > 1 {
        let address = |port| format!("{}:{port}", config.host);
        meta.members = voters.iter().map(|v| (v.id.to_string(), address(v.port))).collect();
    }
    meta.ready_file = Some(ready);
    meta.s3_patience_s = S3_PATIENCE_S;
    meta.steal_bucket = config.steal_bucket;
    meta.replicas = config.replicas;
    meta.min_in_sync = config.min_in_sync;
    meta.timings.flush_after_ms = config.flush_after_ms;
    if config.embedded_s3 {
        // Nothing on the way to our own server holds a request back: what is not carried out soon
        // after its connection broke never is.
        meta.timings.request_valid_ms = EMBEDDED_REQUEST_VALID_MS;
    }
    meta.to_toml().map_err(|e| e.to_string())
}

fn data_config(
    name: &str,
    layout: &Layout,
    config: &ClusterConfig,
    ready: PathBuf,
) -> Result<String, String> {
    let node = ebb_dataplane::NodeConfig {
        dir: layout.node(name),
        devices: Vec::new(),
        listen: config.host.clone(),
        advertise: None,
        // The ports it had before, so that its clients find it where it was.
        ports: Record::load(layout, name).map(|r| r.ports).unwrap_or_default(),
        cores: config.cores_per_node,
        cpus: vec![],
        capacity_bytes: config.node_capacity_bytes,
        arena_bytes: config.arena_bytes,
        index_bytes: config.index_bytes,
        dram_bytes: config.dram_bytes,
        spill: config.spill_of(name),
        spill_bytes: config.spill_bytes,
        send_zc: config.send_zc,
        sqpoll_idle_ms: config.sqpoll_idle_ms,
        spin_us: config.spin_us,
        cluster: config.cluster.0.to_string(),
        key_file: layout.key(),
        meta: config.meta_addresses(),
        scrub_bytes_per_s: ebb_dataplane::config::SCRUB_BYTES_PER_S,
        scrub_rest_s: ebb_dataplane::config::SCRUB_REST_S,
        ready_file: Some(ready),
    };
    toml::to_string(&node).map_err(|e| e.to_string())
}

/// Runs a mount in this process until it is unmounted or told to stop.
pub(crate) async fn run_mount(
    addresses: Vec<String>,
    key: ClusterKey,
    dir: &Path,
    options: &[String],
) -> Result<(), CliError> {
    let stop = ebb_fuse::stop_signal();
    let source = addresses.join(",");
    let label = format!("mount on {}, pid {}", dir.display(), std::process::id());
    let strict = options.iter().any(|o| o == "strict");
    let follower_reads = options.iter().any(|o| o == "follower_reads");
    if strict && follower_reads {
        return Err(CliError::usage(
            "a mount has either strict or follower_reads: servers that do not lead answer nothing while there are strict mounts",
        ));
    }
    let config = Config { lease_metadata: strict, follower_reads, ..Config::default() };
    let cluster = Cluster::connect(addresses, key, &label, config).await?;
    let mut config = ebb_fuse::MountConfig::new(FileSystem::new(&cluster), dir);
    config.source = source;
    for option in options {
        match option.as_str() {
            "ro" => config.read_only = true,
            "rw" | "defaults" | "_netdev" | "nofail" | "auto" | "noauto" | "nosuid" | "nodev" => {}
            "allow_other" => config.allow_other = true,
            "local_locks" => config.local_locks = true,
            "follower_reads" => {}
            "strict" => {
                config.attr_ttl = std::time::Duration::ZERO;
                config.entry_ttl = std::time::Duration::ZERO;
            }
            other => {
                return Err(CliError::usage(format!(
                    "unknown mount option {other:?}: known are ro, rw, allow_other, strict, follower_reads, local_locks, nosuid, nodev, _netdev, nofail"
                )));
            }
        }
    }
    let fs = config.fs.clone();
    let result = ebb_fuse::mount(config, stop).await;
    let closed = fs.close().await;
    result.map_err(|e| CliError::new(e.to_string()))?;
    Ok(closed?)
}
