//! What the metadata server is told at its start. Plain data (TOML); no I/O but reading the key.

use crate::error::MetaError;
use ebb_dataplane_protocol::ClusterId;
use ebb_dataplane_protocol::auth::ClusterKey;
use ebb_s3::BucketConfig;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// The configuration of one metadata server.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetaConfig {
    /// Where the log, the state and the snapshots live.
    pub dir: PathBuf,
    /// host:port to listen on; port 0 takes a free one.
    pub listen: String,
    /// host:port that others reach this server at; default: where it listens.
    #[serde(default)]
    pub advertise: Option<String>,
    /// This voter's id.
    #[serde(default = "one")]
    pub node_id: u64,
    /// The founders, id to host:port; empty: this one alone. Only a new group looks at them: once it is
    /// founded, its membership is in its log.
    #[serde(default)]
    pub members: BTreeMap<String, String>,
    /// This voter is added to a group that there is (`ebb meta add`): it founds none.
    #[serde(default)]
    pub join: bool,
    /// The cluster's id, 32 hexadecimal digits.
    pub cluster: String,
    /// The file with the cluster key.
    pub key_file: PathBuf,
    /// Placement groups; fixed when the cluster is formatted.
    #[serde(default = "pg_count_default")]
    pub pg_count: u16,
    /// Members of each placement group: copies of what S3 does not have, each on a node of its own.
    #[serde(default = "one_copy")]
    pub replicas: u8,
    /// With fewer in-sync members than this a group takes no writes.
    #[serde(default = "one_copy")]
    pub min_in_sync: u8,
    /// Take a bucket over whose cluster was not taken down.
    #[serde(default)]
    pub steal_bucket: bool,
    /// Written when the server serves: its address and process id, as JSON.
    #[serde(default)]
    pub ready_file: Option<PathBuf>,
    /// How long S3 may be down at the start.
    #[serde(default = "s3_patience_default")]
    pub s3_patience_s: u64,
    /// Bytes of the state store's cache.
    #[serde(default = "cache_default")]
    pub cache_bytes: usize,
    /// Entries between two snapshots.
    #[serde(default = "snapshot_default")]
    pub snapshot_entries: u64,
    /// Durations.
    #[serde(default)]
    pub timings: Timings,
    /// The bucket.
    pub bucket: BucketConfig,
}

/// Durations, all in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timings {
    /// A dirty inode goes to S3 after this.
    pub flush_after_ms: u64,
    /// A clean file is compared with S3 at open when its last comparison is older.
    pub revalidate_ms: u64,
    /// Limit of that comparison; S3 slower than that is treated as away.
    pub revalidate_timeout_ms: u64,
    /// A completely listed directory is listed again when somebody reads it, or looks for a name that
    /// isn't known, and its last listing is older.
    pub relist_ms: u64,
    /// A data node's lease from the moment it sent a heartbeat.
    pub lease_ms: u64,
    /// Added to a lease that is waited out.
    pub drift_ms: u64,
    /// All primaries must have sealed by then.
    pub seal_timeout_ms: u64,
    /// Pause of the leader's loops when nothing wakes them.
    pub tick_ms: u64,
    /// The owner object is renewed this often.
    pub owner_renew_ms: u64,
    /// A key whose last attempt is in doubt is looked at again after this.
    pub resolve_after_ms: u64,
    /// S3 takes a signed request for so long (Signature Version 4: 15 minutes): a request whose reply
    /// was lost may land until then.
    pub request_valid_ms: u64,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            flush_after_ms: 5_000,
            revalidate_ms: 1_000,
            revalidate_timeout_ms: 1_000,
            relist_ms: 5_000,
            lease_ms: 3_000,
            drift_ms: 500,
            seal_timeout_ms: 1_000,
            tick_ms: 500,
            owner_renew_ms: 10_000,
            resolve_after_ms: 1_000,
            request_valid_ms: 15 * 60 * 1_000,
        }
    }
}

impl Timings {
    /// The leader's pause.
    pub fn tick(&self) -> Duration {
        Duration::from_millis(self.tick_ms.max(10))
    }
}

fn one() -> u64 {
    1
}
fn one_copy() -> u8 {
    1
}
fn pg_count_default() -> u16 {
    64
}
fn s3_patience_default() -> u64 {
    60
}
fn cache_default() -> usize {
    256 << 20
}
fn snapshot_default() -> u64 {
    50_000
}

impl MetaConfig {
    /// A configuration with defaults for everything else.
    pub fn new(
        dir: impl Into<PathBuf>,
        listen: impl Into<String>,
        cluster: ClusterId,
        key_file: impl Into<PathBuf>,
        bucket: BucketConfig,
    ) -> Self {
        Self {
            dir: dir.into(),
            listen: listen.into(),
            advertise: None,
            node_id: one(),
            members: BTreeMap::new(),
            join: false,
            cluster: cluster.to_string(),
            key_file: key_file.into(),
            pg_count: pg_count_default(),
            replicas: one_copy(),
            min_in_sync: one_copy(),
            steal_bucket: false,
            ready_file: None,
            s3_patience_s: s3_patience_default(),
            cache_bytes: cache_default(),
            snapshot_entries: snapshot_default(),
            timings: Timings::default(),
            bucket,
        }
    }

    /// From TOML text.
    pub fn from_toml(text: &str) -> Result<Self, MetaError> {
        toml::from_str(text).map_err(|e| MetaError::Config(e.to_string()))
    }

    /// As TOML text.
    pub fn to_toml(&self) -> Result<String, MetaError> {
        toml::to_string(self).map_err(|e| MetaError::Config(e.to_string()))
    }

    /// The cluster's id.
    pub fn cluster_id(&self) -> Result<ClusterId, MetaError> {
        u128::from_str_radix(&self.cluster, 16)
            .ok()
            .filter(|id| *id != 0)
            .map(ClusterId)
            .ok_or_else(|| MetaError::Config("cluster: 32 hexadecimal digits, not zero".into()))
    }

    /// The cluster key from its file.
    pub fn key(&self) -> Result<ClusterKey, MetaError> {
        let failed = |why: String| MetaError::Key { path: self.key_file.clone(), why };
        let text = std::fs::read_to_string(&self.key_file).map_err(|e| failed(e.to_string()))?;
        ClusterKey::from_hex(&text).map_err(|e| failed(e.to_string()))
    }

    /// Checks what serde can't.
    pub fn validate(&self) -> Result<(), MetaError> {
        self.cluster_id()?;
        if self.pg_count == 0 || self.pg_count > 4096 {
            return Err(MetaError::Config("pg_count must be 1 to 4096".into()));
        }
        if self.replicas == 0 || self.min_in_sync == 0 || self.min_in_sync > self.replicas {
            return Err(MetaError::Config(format!(
                "min_in_sync ({}) must be 1 to replicas ({})",
                self.min_in_sync, self.replicas
            )));
        }
        if !self.join
            && !self.members.is_empty()
            && !self.members.contains_key(&self.node_id.to_string())
        {
            return Err(MetaError::Config(format!(
                "members does not name this server, node_id {}",
                self.node_id
            )));
        }
        if let Some(id) = self.members.keys().find(|id| id.parse::<u64>().is_err()) {
            return Err(MetaError::Config(format!("members: '{id}' is not a number")));
        }
        Ok(())
    }
}
