//! A real metadata server on real sockets, over the embedded S3 server, in a temporary directory.

#![allow(unreachable_pub, reason = "shared by test binaries")]

use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::{ClusterId, InodeId, Sequence, SessionId};
use ebb_metaplane::{MetaConfig, MetaError};
use ebb_metaplane_protocol::admin::FlushReport;
use ebb_metaplane_protocol::op::OpenMode;
use ebb_metaplane_protocol::query::DirEntry;
use ebb_metaplane_protocol::*;
use ebb_rpc::{Identity, MetaClient};
use ebb_s3::server::{EmbeddedServer, ServerConfig};
use ebb_s3::{Bucket, Condition, ListRequest, Metadata, ObjectInfo};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub const BUCKET: &str = "shore";
pub const PATIENCE: Duration = Duration::from_secs(20);
pub const KEY: [u8; 32] = [0x5e; 32];

/// Directories and the S3 server; outlives metadata servers.
pub struct World {
    pub dir: TempDir,
    pub s3: EmbeddedServer,
    pub bucket: Bucket,
}

impl World {
    pub async fn new() -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let dir = tempfile::tempdir().expect("a temporary directory");
        let config = ServerConfig {
            dir: dir.path().join("s3"),
            listen: "127.0.0.1:0".parse().expect("an address"),
            access_key: "tide".into(),
            secret_key: "pool".into(),
            buckets: vec![BUCKET.into()],
            admin: None,
        };
        let s3 = EmbeddedServer::start(config).await.expect("an S3 server");
        let bucket = Bucket::connect(s3.bucket_config(BUCKET)).await;
        std::fs::write(dir.path().join("key"), ClusterKey::new(KEY).to_hex()).expect("written");
        Self { dir, s3, bucket }
    }

    pub fn config(&self, cluster: u128, dir: &str) -> MetaConfig {
        let mut config = MetaConfig::new(
            self.dir.path().join(dir),
            "127.0.0.1:0",
            ClusterId(cluster),
            self.dir.path().join("key"),
            self.s3.bucket_config(BUCKET),
        );
        config.ready_file = Some(self.dir.path().join(format!("{dir}.ready")));
        config.s3_patience_s = 3;
        config.timings.flush_after_ms = 3_600_000;
        config.timings.tick_ms = 50;
        config.timings.revalidate_ms = 0;
        config.timings.request_valid_ms = 1_500;
        config.timings.relist_ms = 3_600_000;
        config
    }

    pub async fn put(&self, key: &str, body: &[u8]) {
        let body = body.to_vec();
        self.bucket.put(key, body, &Metadata::new(), &Condition::None).await.expect("a put");
    }

    pub async fn head(&self, key: &str) -> Option<ObjectInfo> {
        match self.bucket.head(key).await {
            Ok(info) => Some(info),
            Err(e) if e.is_not_found() => None,
            Err(e) => panic!("HEAD {key}: {e}"),
        }
    }

    /// Keys of the bucket that are not the cluster's own.
    pub async fn keys(&self) -> Vec<String> {
        let mut keys = Vec::new();
        let mut request = ListRequest::default();
        loop {
            let page = self.bucket.list(&request).await.expect("a listing");
            keys.extend(page.objects.into_iter().map(|o| o.key).filter(|k| !k.starts_with(".ebb")));
            match page.next {
                Some(next) => request.continuation = Some(next),
                None => return keys,
            }
        }
    }

    pub async fn start(&self, cluster: u128, dir: &str) -> Meta {
        self.start_with(self.config(cluster, dir)).await
    }

    pub async fn start_with(&self, config: MetaConfig) -> Meta {
        let ready = config.ready_file.clone().expect("tests have one");
        let _ = std::fs::remove_file(&ready);
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(ebb_metaplane::run(config, async move {
            let _ = stopped.await;
        }));
        let address = wait_ready(&ready, || task.is_finished()).await;
        match address {
            Some(address) => Meta { client: client(&address), address, stop, task },
            None => panic!("the server did not start: {:?}", task.await),
        }
    }

    /// Why a server does not start.
    pub async fn refusal(&self, config: MetaConfig) -> MetaError {
        let run = ebb_metaplane::run(config, std::future::pending());
        let ended = tokio::time::timeout(Duration::from_secs(30), run).await;
        ended.expect("it ends by itself").expect_err("it refuses")
    }
}

pub async fn wait_ready(path: &Path, ended: impl Fn() -> bool) -> Option<String> {
    for _ in 0..3_000 {
        if let Ok(text) = std::fs::read_to_string(path) {
            let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
            return Some(json["address"].as_str().expect("an address").to_owned());
        }
        if ended() {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    None
}

pub fn client(address: &str) -> MetaClient {
    client_of(vec![address.to_owned()])
}

pub fn client_of(addresses: Vec<String>) -> MetaClient {
    MetaClient::new(addresses, Identity::new(ClusterKey::new(KEY), Role::Client))
}

/// A running metadata server.
pub struct Meta {
    pub client: MetaClient,
    pub address: String,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), MetaError>>,
}

impl Meta {
    pub async fn stop(self) {
        let _ = self.stop.send(());
        self.task.await.expect("no panic").expect("a clean stop");
    }

    pub async fn session(&self) -> Client {
        Client::open(self.client.clone(), 0xc11e).await
    }
}

static CLIENTS: AtomicU64 = AtomicU64::new(1);

/// A client with a session.
pub struct Client {
    pub meta: MetaClient,
    pub session: SessionId,
    sequence: AtomicU64,
}

impl Client {
    pub async fn open(meta: MetaClient, salt: u128) -> Self {
        let n = CLIENTS.fetch_add(1, Ordering::Relaxed);
        let client = salt << 64 | u128::from(n) << 32 | u128::from(std::process::id());
        let call = SessionCall::Open { client, label: "a test".into() };
        let reply = meta.call(&Request::Session(call), PATIENCE).await.expect("an answer");
        let Response::Session(Ok(SessionReply::Opened { session, .. })) = reply else {
            panic!("no session: {reply:?}")
        };
        Self { meta, session, sequence: AtomicU64::new(1) }
    }

    pub fn request(&self, op: Op) -> Request {
        let n = self.sequence.fetch_add(1, Ordering::Relaxed);
        let (session, sequence) = (self.session, Sequence(n));
        Request::Mutate { session, sequence, answered_below: Sequence(0), op, dropped: Vec::new() }
    }

    pub async fn op(&self, op: Op) -> FsResult<OpReply> {
        let reply = self.meta.call(&self.request(op), PATIENCE).await.expect("an answer");
        let Response::Op(reply) = reply else { panic!("not of an operation: {reply:?}") };
        reply
    }

    pub async fn query(&self, query: Query) -> FsResult<QueryReply> {
        query_of(&self.meta, query).await
    }

    pub async fn lookup(&self, parent: InodeId, name: &str) -> FsResult<Attr> {
        let query = Query::Lookup { parent, name: name.as_bytes().to_vec() };
        match self.query(query).await? {
            QueryReply::Attr(attr) => Ok(attr),
            other => panic!("not attributes: {other:?}"),
        }
    }

    pub async fn resolve(&self, path: &str) -> FsResult<Attr> {
        let path = path.split('/').filter(|p| !p.is_empty()).map(|p| p.as_bytes().to_vec());
        match self.query(Query::Resolve { path: path.collect() }).await? {
            QueryReply::Attr(attr) => Ok(attr),
            other => panic!("not attributes: {other:?}"),
        }
    }

    /// All entries of a directory, read in pages.
    pub async fn entries(&self, inode: InodeId, limit: u32) -> Vec<DirEntry> {
        let mut all: Vec<DirEntry> = Vec::new();
        loop {
            let after = all.last().map_or_else(Vec::new, |e| e.name.clone());
            match self.query(Query::ReadDir { inode, after, limit }).await.expect("a page") {
                QueryReply::Page { entries, end } => {
                    assert!(end || !entries.is_empty(), "a page without progress");
                    all.extend(entries);
                    if end {
                        return all;
                    }
                }
                other => panic!("not a page: {other:?}"),
            }
        }
    }

    pub async fn names(&self, inode: InodeId, limit: u32) -> Vec<String> {
        let all = self.entries(inode, limit).await;
        all.into_iter().map(|e| String::from_utf8(e.name).expect("UTF-8")).collect()
    }

    pub async fn mkdir(&self, parent: InodeId, name: &str) -> FsResult<Attr> {
        let name = name.as_bytes().to_vec();
        match self.op(Op::Mkdir { parent, name, mode: 0o750, uid: 10, gid: 20 }).await? {
            OpReply::Made(made) => Ok(made.attr),
            other => panic!("not attributes: {other:?}"),
        }
    }

    pub async fn create(&self, parent: InodeId, name: &str) -> FsResult<Opened> {
        let op = Op::Create {
            parent,
            name: name.as_bytes().to_vec(),
            mode: 0o640,
            uid: 1000,
            gid: 1001,
            exclusive: true,
            open: OpenMode { write: true, truncate: false },
            delegate: false,
        };
        match self.op(op).await? {
            OpReply::Opened(opened) => Ok(*opened),
            other => panic!("not opened: {other:?}"),
        }
    }

    /// An empty file.
    pub async fn touch(&self, parent: InodeId, name: &str) -> InodeId {
        let opened = self.create(parent, name).await.expect("created");
        self.op(Op::Release { handle: opened.handle, commit: None }).await.expect("released");
        opened.attr.inode
    }

    pub async fn symlink(&self, parent: InodeId, name: &str, target: &str) -> FsResult<OpReply> {
        let (name, target) = (name.as_bytes().to_vec(), target.as_bytes().to_vec());
        self.op(Op::Symlink { parent, name, target, uid: 1, gid: 2 }).await
    }

    pub async fn rename(
        &self,
        (parent, name): (InodeId, &str),
        (new_parent, new_name): (InodeId, &str),
        flags: u32,
    ) -> FsResult<OpReply> {
        let (name, new_name) = (name.as_bytes().to_vec(), new_name.as_bytes().to_vec());
        self.op(Op::Rename { parent, name, new_parent, new_name, flags }).await
    }

    pub async fn unlink(&self, parent: InodeId, name: &str) -> FsResult<OpReply> {
        self.op(Op::Unlink { parent, name: name.as_bytes().to_vec() }).await
    }

    pub async fn admin(&self, call: AdminCall) -> FsResult<AdminReply> {
        let reply = self.meta.call(&Request::Admin(call), PATIENCE * 3).await.expect("an answer");
        let Response::Admin(reply) = reply else { panic!("not of an operator: {reply:?}") };
        reply
    }

    pub async fn flush(&self) -> FlushReport {
        let call = AdminCall::Flush { inode: InodeId::ROOT, wait: true };
        match self.admin(call).await.expect("flushed") {
            AdminReply::Flushed(report) => report,
            other => panic!("not a report: {other:?}"),
        }
    }

    /// Flushes, then waits until deletes and notices are done too.
    pub async fn settle(&self) -> FlushReport {
        let report = self.flush().await;
        for _ in 0..1_000 {
            let s = self.status().await;
            let notices = s.counters.iter().find(|c| c.0 == "notices_pending").map_or(0, |c| c.1);
            let moves = s.counters.iter().find(|c| c.0 == "moves_pending").map_or(0, |c| c.1);
            if s.dirty_inodes == 0 && s.pending_keys == 0 && notices == 0 && moves == 0 {
                return report;
            }
            if s.dirty_inodes > 0 {
                self.flush().await;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it does not settle: {:?}", self.status().await)
    }

    pub async fn status(&self) -> ClusterStatus {
        match self.admin(AdminCall::Status).await.expect("a status") {
            AdminReply::Status(status) => *status,
            other => panic!("not a status: {other:?}"),
        }
    }

    pub async fn shutdown(&self) -> FlushReport {
        loop {
            match self.admin(AdminCall::Shutdown { abandon: false }).await.expect("shut down") {
                AdminReply::Flushed(report) if report.remaining == 0 => return report,
                AdminReply::Flushed(report) => assert!(report.failed.is_empty(), "{report:?}"),
                other => panic!("not a report: {other:?}"),
            }
        }
    }
}

pub async fn query_of(meta: &MetaClient, query: Query) -> FsResult<QueryReply> {
    let reply = meta
        .call(&Request::Query { session: SessionId(0), query }, PATIENCE)
        .await
        .expect("an answer");
    let Response::Query(reply) = reply else { panic!("not of a query: {reply:?}") };
    reply
}

/// A metadata server as a process of its own, for kill -9.
pub struct Process {
    child: std::process::Child,
    pub address: String,
}

impl Process {
    /// Runs `server_process` of this test binary.
    pub async fn start(config: &MetaConfig, config_file: &PathBuf) -> Self {
        let ready = config.ready_file.clone().expect("tests have one");
        let _ = std::fs::remove_file(&ready);
        std::fs::write(config_file, config.to_toml().expect("TOML")).expect("written");
        let child = std::process::Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", "server_process", "--nocapture"])
            .env("EBB_TEST_META_CONFIG", config_file)
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("a process");
        let address = wait_ready(&ready, || false).await.expect("the process serves");
        Self { child, address }
    }

    fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        let kill = std::process::Command::new("kill").args([name, &pid]).status();
        assert!(kill.expect("runs").success());
    }

    /// SIGSTOP.
    pub fn pause(&self) {
        self.signal("-STOP");
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        self.signal("-CONT");
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
    }
}

/// The body of `server_process`.
pub fn serve_if_asked() {
    let Ok(file) = std::env::var("EBB_TEST_META_CONFIG") else { return };
    let text = std::fs::read_to_string(file).expect("a configuration");
    let config = MetaConfig::from_toml(&text).expect("TOML");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(ebb_metaplane::run(config, std::future::pending())).expect("it runs");
}
