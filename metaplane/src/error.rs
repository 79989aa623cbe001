//! Why the metadata server does not start, or stopped: in words for the person who started it.

use ebb_s3::{ErrorKind, S3Error};
use std::io;
use std::path::PathBuf;

/// Why the server ended.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// The configuration makes no sense.
    #[error("configuration: {0}")]
    Config(String),
    /// The key file is missing or not a key.
    #[error("cluster key file {}: {why}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A directory or file of ours.
    #[error("{}: {source}", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process uses the directory.
    #[error("{} is used by another metadata server; stop that one, or choose another directory", .0.display())]
    Locked(PathBuf),
    /// The port can't be had.
    #[error("cannot listen on {address}: {source}; is another server running there?")]
    Listen {
        /// host:port
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The bucket is missing.
    #[error(
        "the bucket '{bucket}' does not exist at {endpoint}: create it, or give another with --bucket"
    )]
    NoBucket {
        /// The bucket.
        bucket: String,
        /// Where.
        endpoint: String,
    },
    /// S3 refuses our keys.
    #[error(
        "S3 at {endpoint} refuses access to the bucket '{bucket}': {why}; check AWS_ACCESS_KEY_ID, \
         AWS_SECRET_ACCESS_KEY, AWS_PROFILE and the bucket's policy"
    )]
    Denied {
        /// The bucket.
        bucket: String,
        /// Where.
        endpoint: String,
        /// What S3 said.
        why: String,
    },
    /// S3 did not answer for long.
    #[error("S3 at {endpoint} does not answer ({why}); tried for {seconds} s")]
    S3Down {
        /// Where.
        endpoint: String,
        /// The last failure.
        why: String,
        /// How long.
        seconds: u64,
    },
    /// Another cluster owns the bucket.
    #[error(
        "the bucket '{bucket}' belongs to cluster {owner}, which was not taken down (last seen {age}); \
         run `ebb down` there first, or, if that cluster is gone for good, start this one with \
         --steal-bucket (what it had not flushed is lost)"
    )]
    Owned {
        /// The bucket.
        bucket: String,
        /// Its cluster.
        owner: String,
        /// When it renewed last.
        age: String,
    },
    /// This cluster has the bucket, with another group of voters.
    #[error(
        "the bucket '{bucket}' belongs to this cluster, but what its metadata servers had is not in {}: was the \
         directory emptied? If other metadata servers still run, replace this one (`ebb meta replace`). If all are lost, \
         start with --steal-bucket (what was not flushed is lost), and `ebb meta load` a dump if there is one",
        dir.display()
    )]
    LostGroup {
        /// The bucket.
        bucket: String,
        /// The empty directory.
        dir: PathBuf,
    },
    /// The directory belongs to another cluster than the configuration.
    #[error("{} holds the state of cluster {found}, not of {wanted}", dir.display())]
    OtherCluster {
        /// The directory.
        dir: PathBuf,
        /// What it holds.
        found: String,
        /// What was configured.
        wanted: String,
    },
    /// The directory belongs to another voter.
    #[error("{} is the directory of voter {found}, not of voter {wanted}", dir.display())]
    OtherVoter {
        /// The directory.
        dir: PathBuf,
        /// Whose it is.
        found: u64,
        /// Who was to use it.
        wanted: u64,
    },
    /// The voter took part with a directory that is gone.
    #[error(
        "voter {id} has taken part with another directory than {}: what it voted and acknowledged is \
         lost with that one, so it must not come back under its number. Bring the old directory back, \
         or replace the voter with `ebb meta replace {id}`", dir.display()
    )]
    LostDirectory {
        /// The voter.
        id: u64,
        /// The directory it has now.
        dir: PathBuf,
    },
    /// Raft failed.
    #[error("Raft: {0}")]
    Raft(String),
}

impl MetaError {
    /// An I/O error on a path.
    pub fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Io { path: path.into(), source }
    }

    /// The exit code of the process (sysexits.h numbers).
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Config(_)
            | Self::Key { .. }
            | Self::OtherCluster { .. }
            | Self::OtherVoter { .. }
            | Self::LostDirectory { .. }
            | Self::LostGroup { .. } => 78,
            Self::Io { .. } | Self::Raft(_) => 74,
            Self::Locked(_) | Self::Listen { .. } => 75,
            Self::NoBucket { .. } | Self::Denied { .. } | Self::Owned { .. } => 77,
            Self::S3Down { .. } => 69,
        }
    }

    /// What a failed call at the start means; `None`: it may work later.
    pub(crate) fn of_s3(e: &S3Error, bucket: &ebb_s3::BucketConfig) -> Option<Self> {
        let endpoint = endpoint(bucket);
        let bucket = bucket.bucket.clone();
        match e.kind {
            ErrorKind::NoSuchBucket => Some(Self::NoBucket { bucket, endpoint }),
            ErrorKind::Denied => Some(Self::Denied { bucket, endpoint, why: e.message.clone() }),
            _ => None,
        }
    }
}

/// The S3 endpoint, for people.
pub(crate) fn endpoint(bucket: &ebb_s3::BucketConfig) -> String {
    bucket.endpoint.clone().unwrap_or_else(|| "the default AWS endpoint".to_owned())
}
