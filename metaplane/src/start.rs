//! From a configuration to a serving process, and back to rest.
//!
//! The order: directory locked, port bound, Raft started (voters may talk from here on), the group
//! founded if it is new, S3 reached and its conditions probed; the leader takes the bucket and formats
//! the state; then clients are served and the ready file is written. A voter of a group
//! that there is already is ready at once. Whatever fails on the way ends with a sentence that says what to do
//! ([`MetaError`]).

use crate::bucket::owner::down;
use crate::config::MetaConfig;
use crate::error::MetaError;
use crate::ground::Ground;
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
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
    let voter = Voter::start(&config, &address, Ground::machine(identity.clone())).await?;
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
        owned_in: AtomicU64::new(0),
        settled_in: AtomicU64::new(0),
        ownership: Default::default(),
        port: Arc::clone(&port),
        flushes: FlushDesk::new(),
        movers: Default::default(),
        hand_overs: Default::default(),
        names: Default::default(),
        checks: Default::default(),
        dumps: Default::default(),
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
        attached = begin(&service, stop.clone()) => attached.map(|()| true),
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
                // Its successor serves at once, instead of after an election.
                service.voter.hand_over().await;
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

/// Founds the group if that is to be done, reaches S3, waits for a leader; takes the bucket if it leads.
async fn begin(service: &Arc<Service>, stop: CancellationToken) -> Result<(), MetaError> {
    let config = &service.config;
    let is_new = service.voter.found(config).await?;
    if (config.join || config.members.len() > 1) && !is_new {
        // One of several of a group that there is: the others go on meanwhile, and need its vote, whether
        // or not S3 answers. Who leads takes the bucket when it does.
        let service = Arc::clone(service);
        tokio::spawn(async move { service.probe_some_time(stop).await });
        return Ok(());
    }
    note(service, probe(service).await?);
    let wait = service.voter.raft().wait(Some(ELECTION_PATIENCE));
    let led = wait.metrics(|m| m.current_leader.is_some(), "a leader").await;
    if let Err(e) = led {
        if config.members.len() <= 1 {
            return Err(MetaError::Raft(format!("no leader was elected: {e}")));
        }
        // Others may come back at any time; until then it votes, and says that nobody leads.
        tracing::warn!("no leader yet: too few of the other voters answer");
        return Ok(());
    }
    if !service.voter.raft().is_leader() {
        // Another voter leads and holds the bucket; this one takes over when it is elected.
        return Ok(());
    }
    match service.attach(true).await {
        // Elected and outvoted again in the meantime, which takes others.
        Err(MetaError::Raft(e)) if !service.voter.raft().is_leader() => {
            tracing::info!(error = e, "another voter leads");
            Ok(())
        }
        attached => attached,
    }
}

fn note(service: &Service, conditions: Conditions) {
    for name in conditions.missing() {
        tracing::warn!(condition = name, "the S3 server lacks a condition");
    }
    let _ = service.conditions.set(conditions);
}

impl Service {
    async fn probe_some_time(&self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            match probe(self).await {
                Ok(conditions) => return note(self, conditions),
                Err(error) => tracing::error!(%error, "S3 can't be used yet"),
            }
            let _ = stop.run_until_cancelled(tokio::time::sleep(Duration::from_secs(1))).await;
        }
    }
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
