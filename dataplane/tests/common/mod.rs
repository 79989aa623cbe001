//! A data node under test: real sockets, ring, store and embedded S3; a stand-in for the two calls that
//! a node makes to the metadata plane (Register, Heartbeat), and a small client.
#![allow(dead_code, unreachable_pub)]

pub mod client;
pub mod loopdev;

use ebb_dataplane::NodeConfig;
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::{NodeCall, NodeReply, Request, Response};
use ebb_rpc::server::{Counters, Handler, Peer, serve};
use ebb_rpc::{Connection, Frame, Identity};
use ebb_s3::server::{EmbeddedServer, ServerConfig};
use ebb_s3::{Bucket, BucketConfig};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

pub const CLUSTER: ClusterId = ClusterId(0xebb);
pub const PGS: u16 = 8;
pub const NODE: NodeId = NodeId(7);
/// Set in a child process: run a node with this configuration file.
const CHILD_ENV: &str = "EBB_TEST_NODE_CONFIG";

pub fn key() -> ClusterKey {
    ClusterKey::new([0x5a; 32])
}

/// What the stand-in answers.
pub struct MetaState {
    pub map: ClusterMap,
    pub lease_ms: u64,
    pub stop: bool,
    /// Answer nothing to heartbeats.
    pub silent: bool,
    pub bucket: String,
    pub ports: Vec<u16>,
    pub beats: u64,
    pub acked_map: MapVersion,
    pub dirty_groups: Vec<PgId>,
    /// What each node acked last.
    pub acks: std::collections::BTreeMap<NodeId, MapVersion>,
    /// And what it asked for.
    pub wishes: std::collections::BTreeMap<NodeId, ebb_dataplane_protocol::replica::Wishes>,
    /// Each store that registers is a node of its own, from [`NODE`] on; else the last is the only one.
    pub many: bool,
    /// These keep their lease and hear of no newer map.
    pub behind: std::collections::BTreeSet<NodeId>,
}

pub struct MetaStandIn {
    state: Arc<Mutex<MetaState>>,
}

impl Handler for MetaStandIn {
    async fn handle(&self, _peer: Peer, frame: Frame) -> Frame {
        if frame.header.opcode == Opcode::Ping {
            return Frame::new(
                frame.header.reply(Status::Ok),
                Default::default(),
                Default::default(),
            );
        }
        let request = codec::decode::<Request>(&frame.body).expect("a request");
        let (reply, silent) = {
            let mut s = self.state.lock().expect("lock");
            match request {
                Request::Node(NodeCall::Register {
                    ports, store, host, capacity_bytes, ..
                }) => {
                    s.ports = ports.clone();
                    if !s.many {
                        s.map.nodes.clear();
                    }
                    let known = s.map.nodes.iter().find(|n| n.store == store).map(|n| n.id);
                    let id = known.unwrap_or(NodeId(NODE.0 + s.map.nodes.len() as u32));
                    s.map.nodes.retain(|n| n.id != id);
                    s.map.nodes.push(NodeInfo {
                        id,
                        store,
                        state: NodeState::Active,
                        host,
                        ports,
                        capacity_bytes,
                    });
                    let reply = NodeReply::Registered {
                        node: id,
                        map: s.map.clone(),
                        bucket_config: s.bucket.clone(),
                    };
                    (reply, false)
                }
                Request::Node(NodeCall::Heartbeat {
                    node,
                    map_version,
                    dirty_groups,
                    wishes,
                    ..
                }) => {
                    s.beats += 1;
                    s.wishes.insert(node, wishes);
                    s.acked_map = map_version;
                    s.acks.insert(node, map_version);
                    s.dirty_groups = dirty_groups;
                    let late = map_version < s.map.version && !s.behind.contains(&node);
                    let map = late.then(|| s.map.clone());
                    (NodeReply::Lease { lease_ms: s.lease_ms, map, stop: s.stop }, s.silent)
                }
                other => panic!("the stand-in knows no {other:?}"),
            }
        };
        if silent {
            std::future::pending::<()>().await;
        }
        let body = codec::encode(&Response::Node(Ok(reply)));
        Frame::new(frame.header.reply(Status::Ok), body.into(), bytes::Bytes::new())
    }
}

/// Everything around a node.
pub struct World {
    pub dir: tempfile::TempDir,
    pub s3: EmbeddedServer,
    pub bucket: Bucket,
    pub meta: Arc<Mutex<MetaState>>,
    pub config: NodeConfig,
    stop: CancellationToken,
}

pub fn map(version: u64, cores: u16) -> ClusterMap {
    let pgs = (0..PGS)
        .map(|i| PgEntry {
            syncing: Vec::new(),
            epoch: PgEpoch(1),
            members: vec![ShardRef { node: NODE, core: CoreId(i % cores) }],
            since_map_version: MapVersion(1),
            moving: false,
            ..PgEntry::default()
        })
        .collect();
    ClusterMap {
        version: MapVersion(version),
        cluster: CLUSTER,
        incarnation: Incarnation(1),
        nodes: Vec::new(),
        pgs,
    }
}

impl World {
    pub async fn new(capacity_bytes: u64, cores: u16) -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_writer(std::io::stderr)
            .try_init();
        let dir = tempfile::tempdir().expect("temporary directory");
        let s3 = EmbeddedServer::start(ServerConfig {
            dir: dir.path().join("s3"),
            listen: "127.0.0.1:0".parse().expect("address"),
            access_key: "id".into(),
            secret_key: "secret".into(),
            buckets: vec!["bucket".into()],
            admin: None,
        })
        .await
        .expect("S3 starts");
        let mut bucket_config: BucketConfig = s3.bucket_config("bucket");
        bucket_config.timeouts.request_ms = 5_000;
        let bucket = Bucket::connect(bucket_config.clone()).await;
        let meta = Arc::new(Mutex::new(MetaState {
            map: map(1, cores),
            lease_ms: 3000,
            stop: false,
            silent: false,
            bucket: serde_json::to_string(&bucket_config).expect("serialises"),
            ports: Vec::new(),
            beats: 0,
            acked_map: MapVersion(0),
            dirty_groups: Vec::new(),
            acks: Default::default(),
            wishes: Default::default(),
            many: false,
            behind: Default::default(),
        }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let address = listener.local_addr().expect("address").to_string();
        let stop = CancellationToken::new();
        let handler = Arc::new(MetaStandIn { state: Arc::clone(&meta) });
        tokio::spawn(serve(
            listener,
            key(),
            CLUSTER,
            ebb_dataplane_protocol::header::BODY_BYTES_MAX_META,
            handler,
            Arc::new(Counters::default()),
            stop.clone(),
        ));
        let key_file = dir.path().join("key");
        std::fs::write(&key_file, key().to_hex()).expect("key file");
        let config = NodeConfig {
            dir: dir.path().join("node"),
            devices: Vec::new(),
            listen: "127.0.0.1".into(),
            advertise: None,
            ports: Vec::new(),
            cores,
            cpus: Vec::new(),
            capacity_bytes,
            arena_bytes: 64 << 20,
            dram_bytes: 8 << 20,
            spill: Vec::new(),
            spill_bytes: 0,
            send_zc: false,
            sqpoll_idle_ms: 0,
            spin_us: 0,
            index_bytes: 144 << 20,
            cluster: format!("{CLUSTER}"),
            key_file,
            meta: vec![address],
            // Only where a test is about it: it would find what others are about.
            scrub_bytes_per_s: 0,
            scrub_rest_s: 0,
            ready_file: Some(dir.path().join("ready.json")),
        };
        Self { dir, s3, bucket, meta, config, stop }
    }

    pub fn meta(&self) -> std::sync::MutexGuard<'_, MetaState> {
        self.meta.lock().expect("lock")
    }

    /// A node in this process.
    pub async fn start(&self) -> InProcess {
        self.start_with(self.config.clone()).await
    }

    /// The configuration of another node beside the first.
    pub fn another(&self, name: &str) -> NodeConfig {
        NodeConfig {
            dir: self.dir.path().join(name),
            ready_file: Some(self.dir.path().join(format!("{name}.json"))),
            ..self.config.clone()
        }
    }

    pub async fn start_with(&self, config: NodeConfig) -> InProcess {
        let ready = config.ready_file.clone().expect("a ready file");
        let _ = std::fs::remove_file(&ready);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task =
            tokio::spawn(
                async move { ebb_dataplane::run(config, stopped.cancelled_owned()).await },
            );
        let ports = wait_ready(&ready).await;
        InProcess { ports, stop, task }
    }

    /// A node in a process of its own, for `kill -9`.
    pub async fn spawn(&self) -> Child9 {
        self.spawn_with(&self.config).await
    }

    pub async fn spawn_with(&self, config: &NodeConfig) -> Child9 {
        let ready = config.ready_file.clone().expect("a ready file");
        let _ = std::fs::remove_file(&ready);
        let path = ready.with_extension("toml");
        std::fs::write(&path, toml::to_string(config).expect("serialises")).expect("config");
        let child = Command::new(std::env::current_exe().expect("test binary"))
            .args(["--exact", "child_node", "--nocapture"])
            .env(CHILD_ENV, &path)
            .stdout(Stdio::null())
            .spawn()
            .expect("child starts");
        let mut child = Child9 { child, ports: Vec::new() };
        child.ports = wait_ready(&ready).await;
        child
    }

    /// Waits until the node has beaten `n` more times.
    pub async fn beats(&self, n: u64) {
        let from = self.meta().beats;
        eventually("heartbeats", || self.meta().beats >= from + n).await;
    }

    /// Changes the map; waits until every node acks it that is not kept behind.
    pub async fn change_map(&self, change: impl FnOnce(&mut ClusterMap)) {
        let version = {
            let mut s = self.meta();
            s.map.version = MapVersion(s.map.version.0 + 1);
            change(&mut s.map);
            s.map.version
        };
        eventually("the map is acked", || {
            let s = self.meta();
            let mut acks = s.acks.iter().filter(|(node, _)| !s.behind.contains(node));
            (s.acked_map >= version || !s.behind.is_empty()) && acks.all(|(_, at)| *at >= version)
        })
        .await;
    }

    pub async fn connect(&self, port: u16, role: Role, session: u64) -> Connection {
        let identity = Identity {
            session: SessionId(session),
            cluster: CLUSTER,
            ..Identity::new(key(), role)
        };
        Connection::connect(&format!("127.0.0.1:{port}"), &identity, Duration::from_secs(5))
            .await
            .expect("connects")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Polls a condition with a deadline; the condition, not the sleep, decides.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn wait_ready(path: &Path) -> Vec<u16> {
    let mut ports = Vec::new();
    eventually("the node is ready", || {
        let Ok(text) = std::fs::read_to_string(path) else { return false };
        let ready: ebb_dataplane::Ready = serde_json::from_str(&text).expect("readable");
        ports = ready.ports;
        true
    })
    .await;
    ports
}

pub struct InProcess {
    pub ports: Vec<u16>,
    pub stop: CancellationToken,
    pub task: tokio::task::JoinHandle<Result<(), ebb_dataplane::NodeError>>,
}

impl InProcess {
    pub fn port(&self) -> u16 {
        self.ports[0]
    }
    pub async fn shutdown(self) {
        self.stop.cancel();
        self.task.await.expect("no panic").expect("a clean end");
    }
}

pub struct Child9 {
    child: Child,
    pub ports: Vec<u16>,
}

impl Child9 {
    pub fn port(&self) -> u16 {
        self.ports[0]
    }
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }
    pub fn kill9(mut self) {
        self.child.kill().expect("kill -9");
        self.child.wait().expect("reaped");
    }
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid()), signal).expect("signalled");
    }

    /// Stops the process, and returns when each of its threads stands still: the signal alone says
    /// nothing of a thread that runs on another core.
    pub async fn pause(&self) {
        self.signal(nix::sys::signal::Signal::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.pid());
        eventually("every thread is stopped", || {
            let mut threads = std::fs::read_dir(&tasks).expect("the process lives");
            threads.all(|thread| {
                let stat = thread.and_then(|t| std::fs::read_to_string(t.path().join("stat")));
                // The state follows the name, which may hold anything but ends with the last ')'.
                stat.is_ok_and(|s| s.rsplit(") ").next().is_some_and(|s| s.starts_with('T')))
            })
        })
        .await;
    }
}

impl Drop for Child9 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The body of the test `child_node` of each binary that spawns children.
pub fn child_node() {
    let Ok(path) = std::env::var(CHILD_ENV) else { return };
    let config = NodeConfig::load(&PathBuf::from(path)).expect("configuration");
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    runtime
        .block_on(ebb_dataplane::run(config, ebb_dataplane::shutdown_signal()))
        .expect("the node runs");
}
