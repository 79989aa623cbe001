//! What a data node is started with: one TOML file, validated once.

use ebb_dataplane_protocol::ClusterId;
use ebb_dataplane_protocol::auth::ClusterKey;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Cores of a node at most.
pub const CORES_MAX: u16 = 256;
/// Least RAM for the indexes of a node.
pub const INDEX_BYTES_MIN: u64 = 16 << 20;
/// Least arena of a core: one buffer per class and pool, and room to work.
pub const ARENA_BYTES_MIN: u64 = 48 << 20;

/// RAM for copies of blocks if nothing else is said.
pub const DRAM_BYTES_DEFAULT: u64 = 32 << 20;

/// Bytes that a core scrubs per second if nothing else is said: 1 TiB in three days.
pub const SCRUB_BYTES_PER_S: u64 = 4 << 20;
/// Rest between two passes if nothing else is said: a day.
pub const SCRUB_REST_S: u64 = 24 * 3600;

/// Configuration of a data node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// Where the shard files are; created if missing.
    pub dir: PathBuf,
    /// Block devices (disks, partitions, volumes) to use whole instead of files in `dir`, one per core, in
    /// order. A new one has to be blank.
    #[serde(default)]
    pub devices: Vec<PathBuf>,
    /// Address to listen on.
    #[serde(default = "localhost")]
    pub listen: String,
    /// Host that clients connect to; the listen address if not given.
    #[serde(default)]
    pub advertise: Option<String>,
    /// One port per core; missing ones and 0 take a free one.
    #[serde(default)]
    pub ports: Vec<u16>,
    /// Cores: each has a ring, a port, a shard file.
    #[serde(default = "one")]
    pub cores: u16,
    /// CPUs to pin the cores to, in order; empty: not pinned.
    #[serde(default)]
    pub cpus: Vec<usize>,
    /// Bytes of all shard files together. Only used when they are made, and not with `devices`.
    #[serde(default = "capacity_default")]
    pub capacity_bytes: u64,
    /// Bytes of buffers of each core.
    #[serde(default = "arena_default")]
    pub arena_bytes: u64,
    /// RAM for copies of blocks that are read again and again (the `dram` tier), of all cores; 0: none. It fills as
    /// it is needed, and comes on top of buffers and indexes.
    #[serde(default = "dram_default")]
    pub dram_bytes: u64,
    /// Directories or block devices for the spill tier: copies of clean data that the shards have no room for any
    /// more. They are dealt out to the cores in turn; a block device serves one core, whole. Empty: none.
    #[serde(default)]
    pub spill: Vec<PathBuf>,
    /// Bytes of all spill files together, at least 16 MiB per core.
    #[serde(default)]
    pub spill_bytes: u64,
    /// RAM for the indexes of all cores: about 400 bytes for a small file, 1.1 KiB for each MiB of large ones.
    /// What it has no room for is evicted, or flushed first.
    #[serde(default = "index_default")]
    pub index_bytes: u64,
    /// The cluster, 32 hexadecimal digits.
    pub cluster: String,
    /// File of the cluster key.
    pub key_file: PathBuf,
    /// Metadata servers, host:port.
    pub meta: Vec<String>,
    /// Bytes that each core compares with their checksums per second, in the background; 0: none.
    #[serde(default = "scrub_default")]
    pub scrub_bytes_per_s: u64,
    /// Seconds between two passes over a device.
    #[serde(default = "scrub_rest_default")]
    pub scrub_rest_s: u64,
    /// Large answers are sent without copying them (SENDMSG_ZC). Off unless measured on the machine: ADR 0009.
    #[serde(default)]
    pub send_zc: bool,
    /// A kernel thread per core takes its submissions (SQPOLL): it spins, and sleeps after so many milliseconds without
    /// one; 0: none. It takes a processor of its own, and with `cpus` it shares its core's. ADR 0009.
    #[serde(default)]
    pub sqpoll_idle_ms: u32,
    /// Microseconds that a core under load looks for what comes next before it sleeps for it; 0: it sleeps at once. A
    /// core that spins uses all of its processor, one with nothing to do none. ADR 0009.
    #[serde(default)]
    pub spin_us: u32,
    /// Written when the node serves: JSON with node, host, ports, pid.
    #[serde(default)]
    pub ready_file: Option<PathBuf>,
}

fn localhost() -> String {
    "127.0.0.1".into()
}
fn one() -> u16 {
    1
}
fn capacity_default() -> u64 {
    10 << 30
}
fn scrub_default() -> u64 {
    SCRUB_BYTES_PER_S
}
fn scrub_rest_default() -> u64 {
    SCRUB_REST_S
}
fn index_default() -> u64 {
    ebb_store::MEMORY_BYTES_DEFAULT
}
fn dram_default() -> u64 {
    DRAM_BYTES_DEFAULT
}
fn arena_default() -> u64 {
    128 << 20
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not readable.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, or not these fields.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<toml::de::Error>,
    },
    /// A value out of range.
    #[error("{field} is {found}; it must be {rule}")]
    Value {
        /// Which.
        field: &'static str,
        /// Its value.
        found: String,
        /// What is allowed.
        rule: &'static str,
    },
    /// The key file holds no key.
    #[error("{path}: {source}")]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        source: ebb_dataplane_protocol::auth::BadKey,
    },
}

impl NodeConfig {
    /// Reads a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(read)?;
        let config: Self = toml::from_str(&text)
            .map_err(|e| ConfigError::Parse { path: path.to_owned(), source: Box::new(e) })?;
        config.check()?;
        Ok(config)
    }

    /// Checks ranges.
    pub fn check(&self) -> Result<(), ConfigError> {
        let bad = |field, found: String, rule| Err(ConfigError::Value { field, found, rule });
        if !(1..=CORES_MAX).contains(&self.cores) {
            return bad("cores", self.cores.to_string(), "from 1 to 256");
        }
        if self.ports.len() > usize::from(self.cores) {
            return bad("ports", format!("{:?}", self.ports), "at most one per core");
        }
        if !self.cpus.is_empty() && self.cpus.len() < usize::from(self.cores) {
            return bad("cpus", format!("{:?}", self.cpus), "empty, or one per core");
        }
        if !self.devices.is_empty() && self.devices.len() != usize::from(self.cores) {
            return bad("devices", format!("{:?}", self.devices), "empty, or one per core");
        }
        let times = |d| self.devices.iter().filter(|o| *o == d).count();
        if let Some(twice) = self.devices.iter().find(|d| times(*d) > 1) {
            return bad("devices", format!("{twice:?} twice"), "another device for each core");
        }
        if self.spill_bytes > 0 && self.spill.is_empty() {
            return bad("spill_bytes", self.spill_bytes.to_string(), "0 unless `spill` says where");
        }
        let times = |p| self.spill.iter().chain(&self.devices).filter(|o| *o == p).count();
        if let Some(twice) = self.spill.iter().find(|p| times(*p) > 1) {
            return bad("spill", format!("{twice:?} twice"), "named once, and not in `devices`");
        }
        if self.spill.len() > usize::from(self.cores) {
            return bad("spill", format!("{:?}", self.spill), "at most one per core");
        }
        if self.arena_bytes < ARENA_BYTES_MIN {
            return bad("arena_bytes", self.arena_bytes.to_string(), "at least 48 MiB");
        }
        if self.index_bytes < INDEX_BYTES_MIN {
            return bad("index_bytes", self.index_bytes.to_string(), "at least 16 MiB");
        }
        if self.spin_us > ebb_ring::SPIN_US_MAX {
            return bad("spin_us", self.spin_us.to_string(), "at most 10000");
        }
        if self.sqpoll_idle_ms > ebb_ring::SQPOLL_IDLE_MS_MAX {
            return bad("sqpoll_idle_ms", self.sqpoll_idle_ms.to_string(), "at most 60000");
        }
        if self.meta.is_empty() {
            return bad("meta", "empty".into(), "at least one host:port");
        }
        self.cluster_id()?;
        Ok(())
    }

    /// The cluster.
    pub fn cluster_id(&self) -> Result<ClusterId, ConfigError> {
        match u128::from_str_radix(&self.cluster, 16) {
            Ok(id) if id != 0 => Ok(ClusterId(id)),
            _ => Err(ConfigError::Value {
                field: "cluster",
                found: self.cluster.clone(),
                rule: "32 hexadecimal digits, not all zero",
            }),
        }
    }

    /// Reads the cluster key.
    pub fn key(&self) -> Result<ClusterKey, ConfigError> {
        let path = || self.key_file.clone();
        let text = std::fs::read_to_string(&self.key_file)
            .map_err(|source| ConfigError::Read { path: path(), source })?;
        ClusterKey::from_hex(&text).map_err(|source| ConfigError::Key { path: path(), source })
    }

    /// The host that clients connect to.
    pub fn host(&self) -> &str {
        self.advertise.as_deref().unwrap_or(&self.listen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: &str = r#"
        dir = "/tmp/x"
        cluster = "0000000000000000000000000000000f"
        key_file = "/tmp/key"
        meta = ["127.0.0.1:1"]
    "#;

    #[test]
    fn the_least_configuration_has_sensible_defaults_and_round_trips() {
        let c: NodeConfig = toml::from_str(LEAST).expect("valid");
        c.check().expect("sensible");
        assert_eq!((c.cores, c.arena_bytes, c.host()), (1, 128 << 20, "127.0.0.1"));
        assert_eq!(c.cluster_id().expect("valid"), ClusterId(15));
        let text = toml::to_string(&c).expect("serialises");
        assert_eq!(toml::from_str::<NodeConfig>(&text).expect("reads back"), c);
    }

    #[test]
    fn senseless_values_are_named() {
        let c: NodeConfig = toml::from_str(LEAST).expect("valid");
        let two = || vec!["/dev/a".into(), "/dev/a".into()];
        let shared = NodeConfig { spill: vec!["/dev/a".into()], ..c.clone() };
        let broken: [(&str, NodeConfig); 13] = [
            ("devices", NodeConfig { devices: two(), ..c.clone() }),
            ("devices", NodeConfig { devices: two(), cores: 2, ..c.clone() }),
            ("spill", NodeConfig { devices: vec!["/dev/a".into()], ..shared.clone() }),
            ("spill", NodeConfig { spill: two(), cores: 2, ..c.clone() }),
            ("spill", NodeConfig { spill: vec!["/a".into(), "/b".into()], ..c.clone() }),
            ("spill_bytes", NodeConfig { spill_bytes: 1 << 30, ..c.clone() }),
            ("cores", NodeConfig { cores: 0, ..c.clone() }),
            ("arena_bytes", NodeConfig { arena_bytes: 1, ..c.clone() }),
            ("index_bytes", NodeConfig { index_bytes: 1 << 20, ..c.clone() }),
            ("spin_us", NodeConfig { spin_us: 10_001, ..c.clone() }),
            ("sqpoll_idle_ms", NodeConfig { sqpoll_idle_ms: 60_001, ..c.clone() }),
            ("meta", NodeConfig { meta: vec![], ..c.clone() }),
            ("cluster", NodeConfig { cluster: "x".into(), ..c }),
        ];
        for (field, config) in broken {
            let error = config.check().expect_err(field).to_string();
            assert!(error.contains(field), "{error}");
        }
        assert!(toml::from_str::<NodeConfig>(&format!("{LEAST}\nwrong = 1")).is_err());
    }
}
