//! Where a bucket is and how to speak to it. Plain data with serde; no I/O.
//!
//! What is left out comes from the usual AWS_* environment and profile files: credentials,
//! `AWS_REGION` (default us-east-1), `AWS_PROFILE`, `AWS_ENDPOINT_URL`.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// A bucket (and a prefix in it), and how to reach it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BucketConfig {
    pub bucket: String,
    /// Prepended to every key. A non-empty prefix is taken as a folder: it gets one `/` at its
    /// end, none at its start.
    #[serde(default)]
    pub prefix: String,
    #[serde(default)]
    pub endpoint: Option<String>,
    #[serde(default)]
    pub region: Option<String>,
    /// `http://host/bucket/key` rather than `http://bucket.host/key`. Default: true when an
    /// endpoint is given (here or in the environment).
    #[serde(default)]
    pub path_style: Option<bool>,
    /// Instead of the environment's credentials.
    #[serde(default)]
    pub credentials: Option<StaticCredentials>,
    #[serde(default)]
    pub timeouts: Timeouts,
    /// Requests in flight at once through one `Bucket` and its clones; further ones wait.
    #[serde(default = "concurrency_default")]
    pub concurrency: usize,
    /// How often a read is tried in all. Mutations are tried once, whatever this says.
    #[serde(default = "read_attempts_default")]
    pub read_attempts: u32,
    /// Send `Content-MD5` with every upload, so that the server refuses bytes that changed on the
    /// way. Costs one MD5 pass over the data.
    #[serde(default = "yes")]
    pub content_md5: bool,
}

/// How long a call may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// TCP and TLS.
    pub connect_ms: u64,
    /// From the first byte of a request to the head of its reply, uploads included.
    pub request_ms: u64,
    /// Between two pieces of a GET's body.
    pub idle_ms: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { connect_ms: 5_000, request_ms: 60_000, idle_ms: 20_000 }
    }
}

impl Timeouts {
    pub fn connect(&self) -> Duration {
        Duration::from_millis(self.connect_ms)
    }
    pub fn request(&self) -> Duration {
        Duration::from_millis(self.request_ms)
    }
    pub fn idle(&self) -> Duration {
        Duration::from_millis(self.idle_ms)
    }
}

/// An access key given in the configuration.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticCredentials {
    pub access_key: String,
    pub secret_key: String,
    #[serde(default)]
    pub session_token: Option<String>,
}

impl fmt::Debug for StaticCredentials {
    /// Secrets stay out of logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StaticCredentials").field("access_key", &self.access_key).finish()
    }
}

fn concurrency_default() -> usize {
    64
}
fn read_attempts_default() -> u32 {
    4
}
fn yes() -> bool {
    true
}

impl BucketConfig {
    /// A whole bucket, everything else by default.
    pub fn new(bucket: impl Into<String>) -> Self {
        Self {
            bucket: bucket.into(),
            prefix: String::new(),
            endpoint: None,
            region: None,
            path_style: None,
            credentials: None,
            timeouts: Timeouts::default(),
            concurrency: concurrency_default(),
            read_attempts: read_attempts_default(),
            content_md5: true,
        }
    }

    /// From `s3://BUCKET` or `s3://BUCKET/PREFIX`; None if it is neither.
    pub fn from_url(url: &str) -> Option<Self> {
        let rest = url.strip_prefix("s3://")?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return None;
        }
        Some(Self { prefix: prefix.to_owned(), ..Self::new(bucket) })
    }

    pub fn with_endpoint(mut self, endpoint: impl Into<String>) -> Self {
        self.endpoint = Some(endpoint.into());
        self
    }

    pub fn with_credentials(
        mut self,
        access_key: impl Into<String>,
        secret_key: impl Into<String>,
    ) -> Self {
        self.credentials = Some(StaticCredentials {
            access_key: access_key.into(),
            secret_key: secret_key.into(),
            session_token: None,
        });
        self
    }

    /// The prefix as it stands before keys: empty, or ending in one `/`.
    pub fn key_prefix(&self) -> String {
        let bare = self.prefix.trim_matches('/');
        if bare.is_empty() { String::new() } else { format!("{bare}/") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_bucket_and_prefix() {
        let plain = BucketConfig::from_url("s3://b").expect("a bucket");
        assert_eq!((plain.bucket.as_str(), plain.key_prefix().as_str()), ("b", ""));
        let deep = BucketConfig::from_url("s3://b/x/y/").expect("a bucket and prefix");
        assert_eq!((deep.bucket.as_str(), deep.key_prefix().as_str()), ("b", "x/y/"));
        assert!(BucketConfig::from_url("s3://").is_none());
        assert!(BucketConfig::from_url("http://b").is_none());
    }

    #[test]
    fn secrets_stay_out_of_debug_output() {
        let config = BucketConfig::new("b").with_credentials("id", "hush");
        assert!(!format!("{config:?}").contains("hush"));
    }
}
