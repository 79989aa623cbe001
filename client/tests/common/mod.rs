//! A whole cluster in this process, real parts only: the embedded S3 server, one metadata server,
//! data nodes on files in a temporary directory.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses another part")]

mod proxy;

pub use proxy::Rules;

use ebb_client::{Cluster, Config, FileSystem};
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::{ClusterId, CoreId, NodeId, NodeState, PgId, SessionId, ShardRef};
use ebb_metaplane_protocol::{
    AdminCall, AdminReply, ClusterStatus, Request, Response, SessionCall,
};
use ebb_s3::server::{EmbeddedServer, ServerConfig};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How long anything may take to come about.
const PATIENCE: Duration = Duration::from_secs(60);
const BUCKET: &str = "tide";

/// See the module.
pub struct TestCluster {
    dir: tempfile::TempDir,
    pub key: ClusterKey,
    pub address: String,
    pub s3: EmbeddedServer,
    stop: watch::Sender<bool>,
    meta: JoinHandle<()>,
    nodes: Vec<Node>,
    /// What the proxies before the nodes do, where there are any.
    pub rules: Rules,
}

struct Node {
    config: ebb_dataplane::NodeConfig,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

async fn told(mut stop: watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

impl Node {
    fn start(config: ebb_dataplane::NodeConfig) -> Self {
        let (stop, stopped) = watch::channel(false);
        let own = config.clone();
        let task = tokio::spawn(async move {
            ebb_dataplane::run(own, told(stopped)).await.expect("the data node runs");
        });
        Self { config, stop, task }
    }

    async fn stop(self) -> ebb_dataplane::NodeConfig {
        let _ = self.stop.send(true);
        let _ = tokio::time::timeout(PATIENCE, self.task).await;
        self.config
    }
}

/// Asks again and again until there is an answer.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(began.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl TestCluster {
    /// Starts a cluster of `nodes` data nodes that hold all placement groups evenly.
    pub async fn start(nodes: usize) -> Self {
        Self::start_with(nodes, 512 << 20).await
    }

    /// The same with nodes of another size.
    pub async fn start_with(nodes: usize, capacity_bytes: u64) -> Self {
        Self::start_as(nodes, capacity_bytes, None).await
    }

    /// The same with a proxy before each node, that loses what it is told to.
    pub async fn start_behind_proxies(nodes: usize) -> Self {
        // Addresses of this process alone: nodes on the first, proxies under the same ports on the
        // second.
        let [a, b, ..] = std::process::id().to_le_bytes();
        let address = |last: u8| format!("127.{}.{b}.{last}", a | 1);
        Self::start_as(nodes, 512 << 20, Some((address(1), address(2)))).await
    }

    async fn start_as(
        nodes: usize,
        capacity_bytes: u64,
        proxied: Option<(String, String)>,
    ) -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let dir = tempfile::tempdir().expect("a temporary directory");
        let key = ClusterKey::new([0x5a; 32]);
        let key_file = dir.path().join("key");
        std::fs::write(&key_file, key.to_hex()).expect("the key file");
        let s3 = EmbeddedServer::start(ServerConfig {
            dir: dir.path().join("s3"),
            listen: "127.0.0.1:0".parse().expect("an address"),
            access_key: "test".to_owned(),
            secret_key: "test-secret".to_owned(),
            buckets: vec![BUCKET.to_owned()],
            admin: None,
        })
        .await
        .expect("the S3 server starts");
        let cluster = ClusterId(0xebb);
        let (stop, stopped) = watch::channel(false);
        let ready = dir.path().join("meta.ready");
        let mut meta = ebb_metaplane::MetaConfig::new(
            dir.path().join("meta"),
            "127.0.0.1:0",
            cluster,
            &key_file,
            s3.bucket_config(BUCKET),
        );
        meta.ready_file = Some(ready.clone());
        let meta = tokio::spawn(async move {
            ebb_metaplane::run(meta, told(stopped)).await.expect("the metadata server runs");
        });
        let address = until("the metadata server serves", || async {
            let text = std::fs::read_to_string(&ready).ok()?;
            let ready: serde_json::Value = serde_json::from_str(&text).ok()?;
            Some(ready["address"].as_str()?.to_owned())
        })
        .await;
        let mut running = Vec::new();
        let rules = Rules::default();
        for n in 0..nodes {
            let mut ports = Vec::new();
            if let Some((inside, outside)) = &proxied {
                let listener = tokio::net::TcpListener::bind(format!("{outside}:0")).await;
                let listener = listener.expect("a port");
                let port = listener.local_addr().expect("bound").port();
                rules.serve(listener, format!("{inside}:{port}"));
                ports.push(port);
            }
            running.push(Node::start(ebb_dataplane::NodeConfig {
                dir: dir.path().join(format!("node{n}")),
                listen: proxied.as_ref().map_or("127.0.0.1", |p| p.0.as_str()).to_owned(),
                advertise: proxied.as_ref().map(|p| p.1.clone()),
                ports,
                cores: 1,
                cpus: Vec::new(),
                devices: Vec::new(),
                capacity_bytes,
                arena_bytes: 64 << 20,
                dram_bytes: 8 << 20,
                spill: Vec::new(),
                spill_bytes: 0,
                send_zc: false,
                sqpoll_idle_ms: 0,
                spin_us: 0,
                index_bytes: 144 << 20,
                cluster: cluster.to_string(),
                key_file: key_file.clone(),
                meta: vec![address.clone()],
                scrub_bytes_per_s: ebb_dataplane::config::SCRUB_BYTES_PER_S,
                scrub_rest_s: ebb_dataplane::config::SCRUB_REST_S,
                ready_file: Some(dir.path().join(format!("node{n}.ready"))),
            }));
        }
        let it = Self { dir, key, address, s3, stop, meta, nodes: running, rules };
        it.place(nodes).await;
        it
    }

    /// What the controller does: nodes become active and get their groups.
    async fn place(&self, nodes: usize) {
        let admin = self.connect("harness").await;
        let map = until("the nodes register", || async {
            let map = admin.refresh_map().await.ok()?;
            (map.nodes.len() == nodes).then_some(map)
        })
        .await;
        for node in &map.nodes {
            let call = AdminCall::SetNodeState { node: node.id, state: NodeState::Active };
            admin.admin(call, PATIENCE).await.expect("a node becomes active");
        }
        if nodes > 0 {
            for pg in 0..map.pg_count() {
                let node = map.nodes[usize::from(pg) % nodes].id;
                let to = vec![ShardRef { node, core: CoreId(0) }];
                let call = AdminCall::MovePg { pg: PgId(pg), to };
                admin.admin(call, PATIENCE).await.expect("a group gets its holder");
            }
            until("the groups are placed", || async {
                let map = admin.refresh_map().await.ok()?;
                map.pgs.iter().all(|pg| pg.primary().is_some() && !pg.moving).then_some(())
            })
            .await;
        }
        admin.close().await.expect("the harness's session ends");
    }

    /// Moves a group, and waits until it is there. `None`: to nobody.
    pub async fn move_group(&self, pg: PgId, to: Option<ShardRef>) {
        let admin = self.connect("mover").await;
        let to: Vec<ShardRef> = to.into_iter().collect();
        let call = AdminCall::MovePg { pg, to: to.clone() };
        admin.admin(call, PATIENCE).await.expect("a group moves");
        until("the group is there", || async {
            let map = admin.refresh_map().await.ok()?;
            let entry = &map.pgs[usize::from(pg.0)];
            (entry.members == to && !entry.moving).then_some(())
        })
        .await;
        admin.close().await.expect("the mover's session ends");
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub async fn connect(&self, label: &str) -> Cluster {
        self.connect_with(label, Config::default()).await
    }

    pub async fn connect_with(&self, label: &str, config: Config) -> Cluster {
        Cluster::connect(vec![self.address.clone()], self.key.clone(), label, config)
            .await
            .expect("a session")
    }

    /// A file system with a session of its own.
    pub async fn fs(&self, label: &str) -> FileSystem {
        FileSystem::new(&self.connect(label).await)
    }

    /// The same with leases on metadata, which it has when this is back.
    pub async fn leased_fs(&self, label: &str) -> FileSystem {
        let config = Config { lease_metadata: true, ..Config::default() };
        let fs = FileSystem::new(&self.connect_with(label, config).await);
        until("the root is remembered", || async {
            let before = fs.cluster().lease_counts().hits;
            fs.getattr(ebb_client::InodeId::ROOT).await.expect("the root");
            (fs.cluster().lease_counts().hits > before).then_some(())
        })
        .await;
        fs
    }

    /// A counter of the metadata plane.
    pub async fn count(&self, name: &str) -> u64 {
        let status = self.status().await;
        status.counters.iter().find(|(n, _)| n == name).expect("it is counted").1
    }

    /// Stops a data node and starts it again on its store, on another port.
    pub async fn restart_node(&mut self, i: usize, pause: Duration) {
        let config = self.nodes.remove(i).stop().await;
        tokio::time::sleep(pause).await;
        self.nodes.insert(i, Node::start(config));
    }

    /// Stops a data node for good; its directory is as it left it.
    pub async fn lose_node(&mut self, node: NodeId) -> ebb_dataplane::NodeConfig {
        let is = |n: &Node| -> Option<bool> {
            let text = std::fs::read_to_string(n.config.ready_file.as_ref()?).ok()?;
            let ready: ebb_dataplane::Ready = serde_json::from_str(&text).ok()?;
            Some(ready.node == node.0)
        };
        let i = self.nodes.iter().position(|n| is(n) == Some(true)).expect("it runs");
        self.nodes.remove(i).stop().await
    }

    /// Starts a data node.
    pub fn start_node(&mut self, config: ebb_dataplane::NodeConfig) {
        self.nodes.push(Node::start(config));
    }

    /// How things are.
    pub async fn status(&self) -> ClusterStatus {
        let admin = Request::Admin(AdminCall::Status);
        match self.meta_client().call(&admin, PATIENCE).await.expect("an answer") {
            Response::Admin(Ok(AdminReply::Status(status))) => *status,
            other => panic!("{other:?}"),
        }
    }

    /// A session ends, and its client is not told.
    pub async fn end_session(&self, session: SessionId) {
        let close = Request::Session(SessionCall::Close(session));
        let ended = self.meta_client().call(&close, PATIENCE).await.expect("an answer");
        assert!(matches!(ended, Response::Session(Ok(_))), "{ended:?}");
    }

    /// What a controller does about a node that is cut off: groups that don't wait for it go to `to`.
    pub async fn stand_in(&self, lost: NodeId, to: NodeId) -> ClusterStatus {
        let admin = self.connect("controller").await;
        let status = until("the groups have a stand-in", || async {
            let s = self.status().await;
            let cut = s.cut_off.iter().find(|c| c.node == lost)?;
            let free = |pg: &PgId| !cut.waiting.contains(pg);
            let left: Vec<PgId> = s.map.groups_of(lost).map(|g| g.0).filter(free).collect();
            if left.is_empty() {
                return Some(s);
            }
            for pg in left {
                let call =
                    AdminCall::MovePg { pg, to: vec![ShardRef { node: to, core: CoreId(0) }] };
                admin.admin(call, PATIENCE).await.expect("begun");
            }
            None
        })
        .await;
        admin.close().await.expect("the controller's session ends");
        status
    }

    /// A client of the metadata plane without a session.
    pub fn meta_client(&self) -> ebb_rpc::MetaClient {
        let identity = ebb_rpc::Identity::new(self.key.clone(), Role::Client);
        ebb_rpc::MetaClient::new(vec![self.address.clone()], identity)
    }

    pub async fn stop(self) {
        for node in self.nodes {
            node.stop().await;
        }
        let _ = self.stop.send(true);
        let _ = tokio::time::timeout(PATIENCE, self.meta).await;
        self.s3.shutdown().await;
    }
}
