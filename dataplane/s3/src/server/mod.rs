//! The embedded S3 server: a directory served as S3, for a machine that has no S3 and for tests.
//!
//! It can hold people's data: one file per object, durable before it is acknowledged, conditions
//! atomic, kill -9 at any byte leaves the old object or the new one, a damaged header is reported
//! and never served (I3, I4, I10). It is one process on one disk: no replication, no versions, no
//! users but the one access key. Why it is our own: docs/adr/0006-embedded-s3-server.md.
//!
//! Layout of a request: `http` (connections, faults) → s3s (signatures, XML) → `service` →
//! `objects`, `multipart` → `bucket`, `uploads` (locks, index, files).

mod admin;
mod body;
mod bucket;
mod conditions;
mod durable;
mod format;
mod http;
mod listing;
mod multipart;
mod objects;
mod service;
mod stage;
mod store;
mod uploads;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc};

use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use service::internal;

use crate::{attributes::Timestamp, config::BucketConfig, fault::Faults};

/// What to serve, where, to whom.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    /// Created if missing. Belongs to one server at a time.
    pub dir: PathBuf,
    /// Port 0 takes a free one.
    pub listen: SocketAddr,
    pub access_key: String,
    pub secret_key: String,
    /// Created at the start if missing.
    #[serde(default)]
    pub buckets: Vec<String>,
    /// Where fault switches can be flipped from outside; loopback only. None, the default, in
    /// anything but a test.
    #[serde(default)]
    pub admin: Option<SocketAddr>,
}

impl std::fmt::Debug for ServerConfig {
    /// Secrets stay out of logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerConfig")
            .field("dir", &self.dir)
            .field("listen", &self.listen)
            .field("buckets", &self.buckets)
            .field("admin", &self.admin)
            .finish_non_exhaustive()
    }
}

/// Why a server does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot use directory {dir}: {source}")]
    Directory { dir: PathBuf, source: io::Error },
    #[error("another S3 server is running in {dir}; stop it or choose another directory")]
    InUse { dir: PathBuf },
    #[error(
        "{dir} was written by something else (FORMAT says '{found}'); choose another directory"
    )]
    Format { dir: PathBuf, found: String },
    #[error("cannot listen on {address}: {source}; choose another port, or 0 for any")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("the admin port {address} has to be on loopback: it lets anyone break requests")]
    AdminNotLoopback { address: SocketAddr },
    #[error("'{name}' is not a bucket name (3 to 63 lower-case letters, digits, '-', '.')")]
    BucketName { name: String },
    #[error("cannot wait for signals: {0}")]
    Signals(io::Error),
}

/// A running server. Dropping the handle stops it as a kill would: connections are cut, and what
/// was acknowledged stays.
pub struct EmbeddedServer {
    config: ServerConfig,
    local: SocketAddr,
    admin: Option<SocketAddr>,
    faults: Faults,
    store: Arc<store::Store>,
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for EmbeddedServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedServer")
            .field("local", &self.local)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

async fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ServerError> {
    let failed = |source| ServerError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let local = listener.local_addr().map_err(failed)?;
    Ok((listener, local))
}

impl EmbeddedServer {
    /// Reads the directory (a header per object) and serves it, on the current tokio runtime.
    pub async fn start(config: ServerConfig) -> Result<Self, ServerError> {
        if let Some(address) = config.admin.filter(|address| !address.ip().is_loopback()) {
            return Err(ServerError::AdminNotLoopback { address });
        }
        let (dir, buckets) = (config.dir.clone(), config.buckets.clone());
        let opened = tokio::task::spawn_blocking(move || store::Store::open(&dir, &buckets)).await;
        let store = Arc::new(opened.unwrap_or_else(|e| {
            Err(ServerError::Directory { dir: config.dir.clone(), source: io::Error::other(e) })
        })?);
        let (listener, local) = listen(config.listen).await?;
        let faults = Faults::default();
        let (stop, stopped) = watch::channel(false);

        let mut builder = S3ServiceBuilder::new(service::Service { store: Arc::clone(&store) });
        builder.set_auth(SimpleAuth::from_single(
            config.access_key.clone(),
            config.secret_key.clone(),
        ));
        let s3 = builder.build();
        let mut tasks =
            vec![tokio::spawn(http::serve(listener, s3, faults.clone(), stopped.clone()))];
        let mut admin = None;
        if let Some(address) = config.admin {
            let (listener, local) = listen(address).await?;
            admin = Some(local);
            tasks.push(tokio::spawn(admin::serve(listener, faults.clone(), stopped)));
        }
        let server = Self { config, local, admin, faults, store, stop, tasks };
        if server.damaged() > 0 {
            tracing::error!(damaged = server.damaged(), "objects are damaged and not served");
        }
        Ok(server)
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    pub fn admin_addr(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// `http://address:port`
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.local)
    }

    /// How a client reaches a bucket here.
    pub fn bucket_config(&self, bucket: &str) -> BucketConfig {
        BucketConfig::new(bucket)
            .with_endpoint(self.endpoint())
            .with_credentials(self.config.access_key.clone(), self.config.secret_key.clone())
    }

    pub fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Object files found damaged at the start and not replaced since. Their names are in the log.
    pub fn damaged(&self) -> usize {
        self.store.buckets().iter().map(|bucket| bucket.damaged_count()).sum()
    }

    /// Takes no new connections, lets requests under way finish, then returns.
    pub async fn shutdown(mut self) {
        let _ = self.stop.send(true);
        for task in std::mem::take(&mut self.tasks) {
            if let Err(error) = task.await {
                tracing::error!(%error, "a server task failed");
            }
        }
    }
}

impl Drop for EmbeddedServer {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Serves until SIGINT or SIGTERM: `ebb serve s3`.
pub async fn run(config: ServerConfig) -> Result<(), ServerError> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(ServerError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServerError::Signals)?;
    let server = EmbeddedServer::start(config).await?;
    tracing::info!(address = %server.local_addr(), dir = %server.config.dir.display(), "serving S3");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping");
    server.shutdown().await;
    Ok(())
}

/// Returns once the server is to stop (or its handle is gone).
async fn stopped(stop: &mut watch::Receiver<bool>) {
    // The guard of the value is not kept: it could not cross an await.
    drop(stop.wait_for(|stop| *stop).await);
}

/// The clock of object times.
fn now_ns() -> i64 {
    Timestamp::from(std::time::SystemTime::now()).0
}
