//! From a configuration to a serving process, and back to rest.
//!
//! The order: directory locked, port bound, Raft started (voters may talk from here on), S3 reached
//! and its conditions probed, bucket taken, state formatted, then clients are served and the ready
//! file is written. Whatever fails on the way ends with a sentence that says what to do
//! ([`MetaError`]).

use crate::bucket::owner::down;
use crate::config::MetaConfig;
use crate::error::MetaError;
use crate::leader::cores::Cores;
use crate::leader::flusher::FlushDesk;
use crate::server::Port;
use crate::service::{HEADS_MAX, Service};
use crate::voter::Voter;
use ebb_dataplane_protocol::auth::Role;
use ebb_dataplane_protocol::header::BODY_BYTES_MAX_META;
use ebb_rpc::Identity;
use ebb_s3::{Bucket, Conditions};
use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Requests in progress get so long to end at a stop.
const DRAIN: Duration = Duration::from_millis(500);
/// A lone voter elects itself well within this.
const ELECTION_PATIENCE: Duration = Duration::from_secs(30);

/// Ends when the process is asked to (SIGTERM, SIGINT).
pub async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    let (term, int) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    match (term, int) {
        (Ok(mut term), Ok(mut int)) => {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        }
        // Without handlers the signals end the process, which is safe too.
        _ => std::future::pending().await,
    }
}

/// A future on the heap. The server's is made in this crate, so that its code is compiled here once
/// and not again in every program and test that runs a server.
type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Runs a metadata server until `shutdown` completes.
pub fn run(
    config: MetaConfig,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Pin<Box<dyn Future<Output = Result<(), MetaError>> + Send>> {
    boxed(config, Box::pin(shutdown))
}

fn boxed(config: MetaConfig, shutdown: Boxed<()>) -> Boxed<Result<(), MetaError>> {
    Box::pin(serve(config, shutdown))
}

async fn serve(config: MetaConfig, shutdown: Boxed<()>) -> Result<(), MetaError> {
    config.validate()?;
    let key = config.key()?;
    let cluster = config.cluster_id()?;
    std::fs::create_dir_all(&config.dir).map_err(|e| MetaError::io(&config.dir, e))?;
    let _lock = lock(&config.dir)?;
    let listener = TcpListener::bind(&config.listen)
        .await
        .map_err(|source| MetaError::Listen { address: config.listen.clone(), source })?;
    let local = listener.local_addr().map_err(|e| MetaError::io(&config.dir, e))?;
    let address = config.advertise.clone().unwrap_or_else(|| local.to_string());

    let identity = Identity { cluster, ..Identity::new(key.clone(), Role::Meta) };
    let bucket = Bucket::connect(config.bucket.clone()).await;
    let bucket_json =
        serde_json::to_string(&config.bucket).map_err(|e| MetaError::Config(e.to_string()))?;
    let voter = Voter::start(&config, &address, identity.clone()).await?;
    let port = Arc::new(ebb_rpc::server::Counters::default());
    let service = Arc::new(Service {
        cluster,
        key: key.clone(),
        voter,
        bucket,
        conditions: OnceLock::new(),
        bucket_json,
        cores: Cores::new(identity),
        liveness: Default::default(),
        sessions: Default::default(),
        health: Default::default(),
        wakes: Default::default(),
        counts: Default::default(),
        heads: Semaphore::new(HEADS_MAX),
        listings: Default::default(),
        relistings: Default::default(),
        comparisons: Default::default(),
        wake_wanted: AtomicBool::new(false),
        owns_bucket: AtomicBool::new(false),
        ownership: Default::default(),
        port: Arc::clone(&port),
        flushes: FlushDesk::new(),
        movers: Default::default(),
        hand_overs: Default::default(),
        names: Default::default(),
        config,
    });

    let stop = CancellationToken::new();
    // Voters elect a leader through the port, so it opens at once; it serves nothing else yet.
    let ready = Arc::new(AtomicBool::new(false));
    let handler = Arc::new(Port::new(Arc::clone(&service), Arc::clone(&ready)));
    let serving = tokio::spawn(ebb_rpc::server::serve(
        listener,
        key,
        cluster,
        BODY_BYTES_MAX_META,
        handler,
        port,
        stop.clone(),
    ));
    tokio::pin!(shutdown);
    let began = tokio::select! {
        () = &mut shutdown => Ok(false),
        attached = begin(&service) => attached.map(|()| true),
    };
    let result = match began {
        Ok(true) => {
            let leading = tokio::spawn(crate::leader::run(Arc::clone(&service), stop.clone()));
            ready.store(true, Ordering::Release);
            let written = write_ready(&service.config, &address);
            if written.is_ok() {
                tracing::info!(address, cluster = %cluster, "the metadata server serves");
                shutdown.await;
                tracing::info!("stopping");
            }
            stop.cancel();
            // Loops end at their next await; what they leave half done is resumed by the next.
            let _ = tokio::time::timeout(DRAIN, leading).await;
            written
        }
        Ok(false) => Ok(()),
        Err(e) => Err(e),
    };
    stop.cancel();
    let _ = tokio::time::timeout(DRAIN, serving).await;
    service.voter.stop().await;
    if let Some(file) = &service.config.ready_file {
        let _ = std::fs::remove_file(file);
    }
    result
}

/// Reaches S3, waits for the lead, takes the bucket.
async fn begin(service: &Arc<Service>) -> Result<(), MetaError> {
    let conditions = probe(service).await?;
    for name in conditions.missing() {
        tracing::warn!(condition = name, "the S3 server lacks a condition");
    }
    let _ = service.conditions.set(conditions);
    let wait = service.voter.raft().wait(Some(ELECTION_PATIENCE));
    wait.metrics(|m| m.current_leader.is_some(), "a leader")
        .await
        .map_err(|e| MetaError::Raft(format!("no leader was elected: {e}")))?;
    if !service.voter.raft().is_leader() {
        // Another voter leads and holds the bucket; this one takes over when it is elected.
        return Ok(());
    }
    service.attach(true).await
}

async fn probe(service: &Service) -> Result<Conditions, MetaError> {
    let patience = Duration::from_secs(service.config.s3_patience_s);
    let begun = Instant::now();
    let mut pause = Duration::from_millis(100);
    loop {
        let found = async {
            service.bucket.check().await?;
            ebb_s3::probe::probe(&service.bucket).await
        };
        let error = match found.await {
            Ok(conditions) => return Ok(conditions),
            Err(e) => e,
        };
        if let Some(fatal) = MetaError::of_s3(&error, &service.config.bucket) {
            return Err(fatal);
        }
        if begun.elapsed() + pause > patience {
            return Err(down(&service.config, &error));
        }
        tracing::warn!(%error, "S3 does not answer yet; trying again");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(5));
    }
}

fn lock(dir: &Path) -> Result<Flock<File>, MetaError> {
    let path = dir.join("lock");
    let file = File::create(&path).map_err(|e| MetaError::io(&path, e))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| MetaError::Locked(dir.to_owned()))
}

/// Says where the server is, in one rename: who reads it sees all or nothing.
fn write_ready(config: &MetaConfig, address: &str) -> Result<(), MetaError> {
    let Some(path) = &config.ready_file else { return Ok(()) };
    let text = serde_json::json!({ "address": address, "pid": std::process::id() }).to_string();
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, text).map_err(|e| MetaError::io(&temporary, e))?;
    std::fs::rename(&temporary, path).map_err(|e| MetaError::io(path, e))
}
