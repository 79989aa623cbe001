//! The directory of a local cluster.
//!
//! ```text
//! DIR/cluster.toml   what `ebb up` was asked for; made once, atomically
//!     key            the cluster key, mode 0600 (I12)
//!     s3/            the embedded S3 server's buckets: the people's data
//!     meta/          the metadata plane's log and state; meta-2/ and so on of further voters
//!     voters.json    the voters' numbers and ports, if there were ever several
//!     nodes/node-N/  a data node's shard files
//!     run/           pid, ready and lock files; endpoints.json for the commands
//!     log/           one log per process
//! ```
//! After `ebb down` only `cluster.toml`, `key` and `s3/` matter; with an outside bucket not even
//! those.

use crate::error::ControllerError as Error;
use crate::voters::{self, Voter, Voters};
use ebb_dataplane_protocol::ClusterId;
use ebb_dataplane_protocol::auth::ClusterKey;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What `ebb up` was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// The cluster's identity.
    pub cluster: ClusterIdHex,
    /// Bucket and prefix; `s3://ebb` of the embedded server when none was given.
    pub bucket: String,
    /// Endpoint of an outside S3 server; `None` with an outside bucket means AWS.
    pub endpoint: Option<String>,
    /// The embedded S3 server is used.
    pub embedded_s3: bool,
    /// Credentials of the embedded server.
    pub embedded_access_key: String,
    /// Its secret.
    pub embedded_secret_key: String,
    /// First wish for data nodes.
    pub nodes: u32,
    /// They run on other machines, started by others with `ebb serve data`: none is started here.
    #[serde(default)]
    pub nodes_elsewhere: bool,
    /// Cores of each data node.
    pub cores_per_node: u16,
    /// Bytes of each data node's device files.
    pub node_capacity_bytes: u64,
    /// Arena bytes of each core.
    pub arena_bytes: u64,
    /// RAM for the indexes of each data node.
    #[serde(default = "index_default")]
    pub index_bytes: u64,
    /// RAM for copies of what is read often, of each data node.
    #[serde(default = "dram_default")]
    pub dram_bytes: u64,
    /// Space for clean data that the device has no room for, of each data node; 0: none.
    #[serde(default)]
    pub spill_bytes: u64,
    /// Directories for it, in each of which every node has one of its own.
    #[serde(default)]
    pub spill_dirs: Vec<PathBuf>,
    /// Data nodes send large answers without copying them.
    #[serde(default)]
    pub send_zc: bool,
    /// A kernel thread takes each core's submissions, and sleeps after so many ms without one; 0: none.
    #[serde(default)]
    pub sqpoll_idle_ms: u32,
    /// Cores under load look for what comes next for so many µs before they sleep.
    #[serde(default)]
    pub spin_us: u32,
    /// Dirty data goes to S3 after this long, in ms.
    pub flush_after_ms: u64,
    /// Address the servers listen on.
    pub host: String,
    /// Port of the metadata plane, 0 until it is known.
    pub meta_port: u16,
    /// Port of the embedded S3 server, 0 until it is known.
    pub s3_port: u16,
    /// Copies of what S3 does not have.
    #[serde(default = "one_copy")]
    pub replicas: u8,
    /// In-sync copies that writes need.
    #[serde(default = "one_copy")]
    pub min_in_sync: u8,
    /// The next start may take the bucket from a cluster that was not taken down.
    #[serde(default)]
    pub steal_bucket: bool,
    /// The voters, from their own file; empty: one, at `meta_port`.
    #[serde(skip)]
    pub voters: Vec<Voter>,
}

impl ClusterConfig {
    /// The voters; a port of 0 is not known yet.
    pub fn voters(&self) -> Vec<Voter> {
        if self.voters.is_empty() {
            return vec![Voter { id: 1, port: self.meta_port, join: false }];
        }
        self.voters.clone()
    }

    /// Where a node's spill files are.
    pub fn spill_of(&self, node: &str) -> Vec<PathBuf> {
        self.spill_dirs.iter().map(|dir| dir.join(node)).collect()
    }

    /// host:port of each voter whose port is known.
    pub fn meta_addresses(&self) -> Vec<String> {
        let known = self.voters().into_iter().filter(|v| v.port != 0);
        known.map(|v| format!("{}:{}", self.host, v.port)).collect()
    }
}

/// What a node takes for its indexes unless `ebb up --index` says otherwise.
const fn index_default() -> u64 {
    144 << 20
}

/// What a node takes for copies unless `ebb up --dram` says otherwise.
const fn dram_default() -> u64 {
    32 << 20
}

fn one_copy() -> u8 {
    1
}

/// A cluster id in a TOML file (which knows no 128-bit integers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterIdHex(pub ClusterId);

impl Serialize for ClusterIdHex {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.0.to_string())
    }
}
impl<'de> Deserialize<'de> for ClusterIdHex {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let id = u128::from_str_radix(&text, 16).map_err(serde::de::Error::custom)?;
        Ok(Self(ClusterId(id)))
    }
}

/// How the commands find a running cluster (`run/endpoints.json`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    /// Metadata servers, host:port.
    pub meta: Vec<String>,
    /// The embedded S3 server's URL.
    pub s3: Option<String>,
    /// The controller's process.
    pub controller_pid: i32,
}

/// Paths inside the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// The layout of `dir`, which need not exist.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }
    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
    /// `cluster.toml`
    pub fn config(&self) -> PathBuf {
        self.dir.join("cluster.toml")
    }
    /// The key file.
    pub fn key(&self) -> PathBuf {
        self.dir.join("key")
    }
    /// The embedded server's data.
    pub fn s3(&self) -> PathBuf {
        self.dir.join("s3")
    }
    /// A voter's data.
    pub fn meta(&self, id: u64) -> PathBuf {
        self.dir.join(voters::process_name(id))
    }
    /// `voters.json`
    pub fn voters(&self) -> PathBuf {
        self.dir.join("voters.json")
    }
    /// All nodes' data.
    pub fn nodes(&self) -> PathBuf {
        self.dir.join("nodes")
    }
    /// One node's data.
    pub fn node(&self, name: &str) -> PathBuf {
        self.nodes().join(name)
    }
    /// Pid, ready and lock files.
    pub fn run(&self, file: &str) -> PathBuf {
        self.dir.join("run").join(file)
    }
    /// A process's log.
    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("log").join(format!("{name}.log"))
    }
    /// How commands find the cluster.
    pub fn endpoints(&self) -> PathBuf {
        self.run("endpoints.json")
    }

    /// Whether a cluster was made here.
    pub fn exists(&self) -> bool {
        self.config().exists()
    }

    /// Makes the directory tree, the key and the configuration. Refuses a directory that holds
    /// something else; `s3/` alone is taken over (everything but the bucket was wiped).
    pub fn create(&self, config: &ClusterConfig) -> Result<(), Error> {
        if let Ok(entries) = std::fs::read_dir(&self.dir) {
            let known = ["s3", "key", "meta", "nodes", "run", "log", "lost+found", "voters.json"];
            for entry in entries {
                let entry = entry.map_err(Error::file("read", &self.dir))?;
                let name = entry.file_name();
                let voter = name.to_str().is_some_and(|n| n.starts_with("meta-"));
                if !voter && !known.iter().any(|k| name == *k) {
                    return Err(Error::NotACluster(self.dir.clone()));
                }
            }
        }
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for dir in [
            self.dir.clone(),
            self.meta(1),
            self.nodes(),
            self.dir.join("run"),
            self.dir.join("log"),
        ] {
            builder.create(&dir).map_err(Error::file("create", &dir))?;
        }
        if !self.key().exists() {
            let mut key = [0u8; 32];
            getrandom::fill(&mut key).map_err(|e| {
                Error::file("make", self.key())(std::io::Error::other(e.to_string()))
            })?;
            write_atomically(
                &self.key(),
                format!("{}\n", ClusterKey::new(key).to_hex()).as_bytes(),
                0o600,
            )?;
        }
        self.save(config)
    }

    /// Replaces the configuration.
    pub fn save(&self, config: &ClusterConfig) -> Result<(), Error> {
        let text = toml::to_string_pretty(config)
            .map_err(|e| Error::BadConfig { path: self.config(), reason: e.to_string() })?;
        write_atomically(&self.config(), text.as_bytes(), 0o600)
    }

    /// Reads the configuration.
    pub fn load(&self) -> Result<ClusterConfig, Error> {
        let path = self.config();
        let text = std::fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        let config: ClusterConfig =
            toml::from_str(&text).map_err(|e| Error::BadConfig { path, reason: e.to_string() })?;
        let voters = Voters::load(self)?.map(|v| v.voters).unwrap_or_default();
        Ok(ClusterConfig { voters, ..config })
    }

    /// Reads the cluster key.
    pub fn load_key(&self) -> Result<ClusterKey, Error> {
        let path = self.key();
        let text = std::fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        ClusterKey::from_hex(&text).map_err(|e| Error::BadConfig { path, reason: e.to_string() })
    }

    /// Reads where the servers are.
    pub fn load_endpoints(&self) -> Result<Endpoints, Error> {
        let path = self.endpoints();
        let text = std::fs::read_to_string(&path).map_err(Error::file("read", &path))?;
        serde_json::from_str(&text).map_err(|e| Error::BadConfig { path, reason: e.to_string() })
    }
}

/// Writes a file so that a crash leaves the old or the new one.
pub fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
    let parent = path.parent().unwrap_or(Path::new("."));
    let tmp = path.with_extension(format!("tmp{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode)
            .open(&tmp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&tmp, path)?;
        std::fs::File::open(parent)?.sync_all()
    };
    write().map_err(Error::file("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ClusterConfig {
        ClusterConfig {
            cluster: ClusterIdHex(ClusterId(0xfeed)),
            bucket: "s3://ebb".into(),
            endpoint: None,
            embedded_s3: true,
            embedded_access_key: "a".into(),
            embedded_secret_key: "s".into(),
            nodes: 2,
            nodes_elsewhere: false,
            cores_per_node: 1,
            node_capacity_bytes: 1 << 31,
            arena_bytes: 1 << 27,
            index_bytes: index_default(),
            dram_bytes: dram_default(),
            spill_bytes: 0,
            spill_dirs: vec![],
            send_zc: false,
            sqpoll_idle_ms: 0,
            spin_us: 0,
            flush_after_ms: 5000,
            host: "127.0.0.1".into(),
            meta_port: 0,
            s3_port: 0,
            replicas: 1,
            min_in_sync: 1,
            steal_bucket: false,
            voters: vec![],
        }
    }

    #[test]
    fn a_directory_of_something_else_is_refused_and_untouched() {
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::write(dir.path().join("thesis.tex"), "precious").expect("write");
        let layout = Layout::new(dir.path());
        assert!(matches!(layout.create(&config()), Err(Error::NotACluster(_))));
        assert_eq!(std::fs::read_dir(dir.path()).expect("dir").count(), 1);
    }

    #[test]
    fn what_was_created_is_found_again() {
        let dir = tempfile::tempdir().expect("tempdir");
        let layout = Layout::new(dir.path().join("deep/er"));
        layout.create(&config()).expect("creates");
        assert_eq!(layout.load().expect("loads"), config());
        let key = layout.load_key().expect("key").to_hex();
        layout.create(&config()).expect_err("cluster.toml is not an unknown file of a new cluster");
        std::fs::remove_file(layout.config()).expect("wiped");
        layout.create(&config()).expect("takes the rest over");
        assert_eq!(layout.load_key().expect("key").to_hex(), key, "the key stays");
    }
}
