//! [`Bucket`]: the S3 client of every plane, one bucket and prefix per value, cheap to clone.
//!
//! * Retries: the SDK's are off for everything. Reads (GET up to its first byte, HEAD, LIST) are
//!   tried `read_attempts` times with a doubling, jittered pause; mutations exactly once (I3, I7:
//!   whether to try again is decided by who holds the key's state, after a look).
//! * Bounded (I9): at most `concurrency` requests in flight; a GET counts until its body is read
//!   or dropped, so never hold more open bodies than that.
//! * Dropping the future of a mutation is the same as losing its reply.
//!
//! Does not interpret keys, nonces or attributes.

mod body;
mod classify;
mod connect;
mod foreign_xml;
mod multipart;
mod read;
mod write;

use std::{future::Future, sync::Arc, time::Duration};

use aws_sdk_s3::{Client, error::SdkError};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub use body::{GetBody, UploadBody};

use crate::{
    config::BucketConfig,
    error::{ErrorKind, S3Error},
    operation::Operation,
    types::KEY_BYTES_MAX,
};

/// First pause between two tries of a read; doubles up to `RETRY_PAUSE_MAX`.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(50);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(2);

/// A bucket, seen through its prefix.
#[derive(Clone)]
pub struct Bucket {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    config: BucketConfig,
    prefix: String,
    permits: Arc<Semaphore>,
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bucket").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

impl Bucket {
    /// Reads the environment and profile files as far as `config` leaves things open. Sends
    /// nothing: a wrong endpoint or key shows at the first call ([`Bucket::check`]).
    pub async fn connect(config: BucketConfig) -> Self {
        let client = connect::client(&config).await;
        let permits = Arc::new(Semaphore::new(config.concurrency.clamp(1, 4096)));
        let prefix = config.key_prefix();
        Self { inner: Arc::new(Inner { client, config, prefix, permits }) }
    }

    pub fn config(&self) -> &BucketConfig {
        &self.inner.config
    }

    /// HEAD of the bucket: that it is there and these credentials may see it.
    pub async fn check(&self) -> Result<(), S3Error> {
        let op = Operation::HeadBucket;
        self.read(op, "", || self.client().head_bucket().bucket(self.name()).send())
            .await
            .map(drop)
            .map_err(|mut e| {
                // A HEAD reply has no body, so the server cannot say which of the two is missing.
                if e.kind == ErrorKind::NotFound {
                    e.kind = ErrorKind::NoSuchBucket;
                    e.message = format!("bucket '{}' does not exist", self.name());
                }
                e
            })
    }

    /// Creates the bucket; one that is there already is success.
    pub async fn create_if_missing(&self) -> Result<(), S3Error> {
        match self.check().await {
            Err(e) if e.kind == ErrorKind::NoSuchBucket => {}
            other => return other,
        }
        let op = Operation::CreateBucket;
        let _permit = self.permit(op, "").await?;
        match self.client().create_bucket().bucket(self.name()).send().await {
            Ok(_) => Ok(()),
            Err(e) => match classify::classify(op, "", e) {
                // Somebody else made it between the two calls.
                e if e.kind == ErrorKind::Conflict => self.check().await,
                e => Err(e),
            },
        }
    }

    fn client(&self) -> &Client {
        &self.inner.client
    }

    fn name(&self) -> &str {
        &self.inner.config.bucket
    }

    /// The key as the server knows it.
    fn full_key(&self, op: Operation, key: &str) -> Result<String, S3Error> {
        let full = format!("{}{key}", self.inner.prefix);
        if full.is_empty() || full.len() > KEY_BYTES_MAX {
            let message = format!("a key has 1 to {KEY_BYTES_MAX} bytes, this one {}", full.len());
            return Err(S3Error::new(ErrorKind::Invalid, op, key, message));
        }
        Ok(full)
    }

    /// The key as callers know it; a key outside the prefix is a server's mistake.
    fn relative(&self, op: Operation, full: String) -> Result<String, S3Error> {
        match full.strip_prefix(self.inner.prefix.as_str()) {
            Some(key) if self.inner.prefix.is_empty() => {
                debug_assert_eq!(key.len(), full.len());
                Ok(full)
            }
            Some(key) => Ok(key.to_owned()),
            None => {
                let message = format!("listed outside of prefix '{}'", self.inner.prefix);
                Err(S3Error::new(ErrorKind::Integrity, op, full, message))
            }
        }
    }

    /// `bucket/key`, percent-encoded, as copies name their source.
    fn copy_source(&self, op: Operation, key: &str) -> Result<String, S3Error> {
        let full = self.full_key(op, key)?;
        let mut source = format!("{}/", self.name());
        for byte in full.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => {
                    source.push(char::from(byte));
                }
                _ => source.push_str(&format!("%{byte:02X}")),
            }
        }
        Ok(source)
    }

    async fn permit(&self, op: Operation, key: &str) -> Result<OwnedSemaphorePermit, S3Error> {
        Arc::clone(&self.inner.permits).acquire_owned().await.map_err(|_| {
            S3Error::new(ErrorKind::Connect, op, key, "the bucket's client is shutting down")
        })
    }

    /// A read under the retry policy. The permit comes back with the value: a GET keeps it.
    async fn read<T, E, F>(
        &self,
        op: Operation,
        key: &str,
        mut call: impl FnMut() -> F,
    ) -> Result<(T, OwnedSemaphorePermit), S3Error>
    where
        F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        debug_assert!(!op.is_mutation(), "mutations are sent once");
        let permit = self.permit(op, key).await?;
        let attempts = self.inner.config.read_attempts.clamp(1, 16);
        let mut attempt = 1;
        loop {
            let error = match call().await {
                Ok(value) => return Ok((value, permit)),
                Err(e) => classify::classify(op, key, e),
            };
            if !error.is_transient() || attempt == attempts {
                return Err(error);
            }
            tracing::debug!(%error, attempt, "S3 read failed, trying again");
            tokio::time::sleep(retry_pause(attempt)).await;
            attempt += 1;
        }
    }
}

/// Doubling with half of it random, so that many clients do not come back at once.
fn retry_pause(attempt: u32) -> Duration {
    let full = RETRY_PAUSE_MIN.saturating_mul(1 << attempt.min(10)).min(RETRY_PAUSE_MAX);
    let mut random = [0u8; 1];
    // Without randomness the pause is merely in step with others'.
    let _ = getrandom::fill(&mut random);
    full / 2 + full.mul_f64(f64::from(random[0]) / 510.0)
}
