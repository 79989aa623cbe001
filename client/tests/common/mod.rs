//! A whole cluster in this process, real parts only: the embedded S3 server, one metadata server,
//! data nodes on files in a temporary directory.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses another part")]

use ebb_client::{Cluster, Config, FileSystem};
use ebb_dataplane_protocol::auth::ClusterKey;
use ebb_dataplane_protocol::{ClusterId, CoreId, NodeState, PgId, ShardRef};
use ebb_metaplane_protocol::AdminCall;
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
    key: ClusterKey,
    pub address: String,
    pub s3: EmbeddedServer,
    stop: watch::Sender<bool>,
    servers: Vec<JoinHandle<()>>,
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
        let stopping = move |mut stopped: watch::Receiver<bool>| async move {
            let _ = stopped.wait_for(|stop| *stop).await;
        };
        let ready = dir.path().join("meta.ready");
        let mut servers = Vec::new();
        let mut meta = ebb_metaplane::MetaConfig::new(
            dir.path().join("meta"),
            "127.0.0.1:0",
            cluster,
            &key_file,
            s3.bucket_config(BUCKET),
        );
        meta.ready_file = Some(ready.clone());
        let wait = stopping(stopped.clone());
        servers.push(tokio::spawn(async move {
            ebb_metaplane::run(meta, wait).await.expect("the metadata server runs");
        }));
        let address = until("the metadata server serves", || async {
            let text = std::fs::read_to_string(&ready).ok()?;
            let ready: serde_json::Value = serde_json::from_str(&text).ok()?;
            Some(ready["address"].as_str()?.to_owned())
        })
        .await;
        for n in 0..nodes {
            let node = ebb_dataplane::NodeConfig {
                dir: dir.path().join(format!("node{n}")),
                listen: "127.0.0.1".to_owned(),
                advertise: None,
                ports: Vec::new(),
                cores: 1,
                cpus: Vec::new(),
                capacity_bytes,
                arena_bytes: 64 << 20,
                cluster: cluster.to_string(),
                key_file: key_file.clone(),
                meta: vec![address.clone()],
                ready_file: None,
            };
            let wait = stopping(stopped.clone());
            servers.push(tokio::spawn(async move {
                ebb_dataplane::run(node, wait).await.expect("the data node runs");
            }));
        }
        let it = Self { dir, key, address, s3, stop, servers };
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

    pub async fn stop(self) {
        let _ = self.stop.send(true);
        for server in self.servers {
            let _ = tokio::time::timeout(PATIENCE, server).await;
        }
        self.s3.shutdown().await;
    }
}
