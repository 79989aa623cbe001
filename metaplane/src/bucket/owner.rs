//! One owner per bucket (PROTOCOL §10): the object `.ebb/owner`, changed by compare-and-swap.
//!
//! Who loses the swap makes no S3 mutation. A bucket that is asleep is woken with the next
//! incarnation; one that another cluster holds awake is refused, unless told to steal it.

use crate::config::MetaConfig;
use crate::error::{MetaError, endpoint};
use crate::leader::Stop;
use crate::raft::propose::now;
use crate::service::Service;
use ebb_dataplane_protocol::Incarnation;
use ebb_metaplane_protocol::{Command, FsResult};
use ebb_s3::{Condition, Conditions, ErrorKind, Etag, Metadata, S3Error};
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Mutex;

/// The key of the owner object.
const KEY: &str = ".ebb/owner";
/// Largest owner object that is read.
const BYTES_MAX: u64 = 64 << 10;

/// The owner object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Owner {
    cluster: String,
    incarnation: u16,
    /// Grows with every swap.
    n: u64,
    asleep: bool,
    /// Random per process: tells a lost reply of ours from another's swap.
    writer: String,
    /// For people.
    renewed_ms: i64,
}

/// What a swap is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Swap {
    /// Renews; does not wake what was put to sleep.
    Keep,
    Sleep,
    Wake,
}

/// What this process knows of the owner object.
#[derive(Debug, Default)]
pub(crate) struct Ownership {
    held: Mutex<Option<(Owner, Etag)>>,
}

fn millis() -> i64 {
    now().0 / 1_000_000
}

impl Service {
    async fn read_owner(&self) -> Result<Option<(Owner, Etag)>, S3Error> {
        let info = match self.bucket.head(KEY).await {
            Ok(info) => info,
            Err(e) if e.is_not_found() => return Ok(None),
            Err(e) => return Err(e),
        };
        let bytes =
            self.bucket.get_bytes(KEY, Some(&info.etag), 0..info.size.clamp(1, BYTES_MAX)).await?;
        let owner = serde_json::from_slice(&bytes).map_err(|e| {
            let text = format!("the owner object is unreadable: {e}");
            S3Error::new(ErrorKind::Invalid, ebb_s3::Operation::Get, KEY, text)
        })?;
        Ok(Some((owner, info.etag)))
    }

    /// Swaps the owner object. `Ok(None)`: somebody else changed it.
    async fn swap_owner(
        &self,
        from: Option<&Etag>,
        owner: Owner,
    ) -> Result<Option<(Owner, Etag)>, S3Error> {
        let c: Conditions = self.conditions();
        let condition = match from {
            None if c.put_if_absent => Condition::IfAbsent,
            Some(etag) if c.put_if_match => Condition::IfMatch(etag.clone()),
            // Where the server lacks the condition: a look before, named in the warnings.
            _ => {
                let found = match self.bucket.head(KEY).await {
                    Ok(info) => Some(info.etag),
                    Err(e) if e.is_not_found() => None,
                    Err(e) => return Err(e),
                };
                if found.as_ref() != from {
                    return Ok(None);
                }
                Condition::None
            }
        };
        let body = serde_json::to_vec(&owner).unwrap_or_default();
        match self.bucket.put(KEY, body, &Metadata::new(), &condition).await {
            Ok(etag) => Ok(Some((owner, etag))),
            Err(e) if matches!(e.kind, ErrorKind::PreconditionFailed | ErrorKind::Conflict) => {
                self.found_ours(&owner).await
            }
            Err(e) if e.is_ambiguous() => match self.found_ours(&owner).await? {
                Some(held) => Ok(Some(held)),
                None => Err(e),
            },
            Err(e) => Err(e),
        }
    }

    async fn found_ours(&self, owner: &Owner) -> Result<Option<(Owner, Etag)>, S3Error> {
        Ok(self.read_owner().await?.filter(|(found, _)| found == owner))
    }

    /// Takes the bucket; gives the incarnation. `ours`: the incarnation of our own state, if it was
    /// formatted. Tries for as long as the configuration allows.
    pub(crate) async fn take_bucket(
        &self,
        ours: Option<Incarnation>,
        writer: u128,
    ) -> Result<Incarnation, MetaError> {
        let patience = Duration::from_secs(self.config.s3_patience_s);
        let begun = Instant::now();
        let mut pause = Duration::from_millis(100);
        loop {
            let error = match self.try_take(ours, writer).await {
                Ok(Ok(incarnation)) => return Ok(incarnation),
                Ok(Err(fatal)) => return Err(fatal),
                Err(e) => e,
            };
            if let Some(fatal) = MetaError::of_s3(&error, &self.config.bucket) {
                return Err(fatal);
            }
            if begun.elapsed() + pause > patience {
                return Err(down(&self.config, &error));
            }
            tracing::warn!(error = %error, "S3 does not answer yet; trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    async fn try_take(
        &self,
        ours: Option<Incarnation>,
        writer: u128,
    ) -> Result<Result<Incarnation, MetaError>, S3Error> {
        let cluster = self.cluster.to_string();
        let found = self.read_owner().await?;
        let mut next = Owner {
            cluster: cluster.clone(),
            incarnation: ours.map_or(1, |i| i.0),
            n: 1,
            asleep: false,
            writer: format!("{writer:032x}"),
            renewed_ms: millis(),
        };
        let etag = match &found {
            None => None,
            Some((owner, etag)) => {
                let same = owner.cluster == cluster;
                if !same && !owner.asleep && !self.config.steal_bucket {
                    let age = (millis() - owner.renewed_ms).max(0) / 1000;
                    return Ok(Err(MetaError::Owned {
                        bucket: self.config.bucket.bucket.clone(),
                        owner: owner.cluster.clone(),
                        age: format!("{age} s ago"),
                    }));
                }
                next.n = owner.n + 1;
                match ours {
                    // Our state and the bucket are of the same life.
                    Some(i) if same && owner.incarnation == i.0 => next.incarnation = i.0,
                    Some(i) => {
                        return Ok(Err(MetaError::OtherCluster {
                            dir: self.config.dir.clone(),
                            found: format!("{cluster} (incarnation {i})"),
                            wanted: format!(
                                "{} (incarnation {}), which owned the bucket last; remove the \
                                 directory to start from the bucket",
                                owner.cluster, owner.incarnation
                            ),
                        }));
                    }
                    None => {
                        if !owner.asleep {
                            tracing::warn!(
                                owner = owner.cluster,
                                "taking a bucket over that was not put to sleep: what its last \
                                 owner had not flushed is lost"
                            );
                        }
                        next.incarnation = owner.incarnation.saturating_add(1);
                    }
                }
                Some(etag)
            }
        };
        let incarnation = Incarnation(next.incarnation);
        match self.swap_owner(etag, next).await? {
            Some(held) => {
                *self.ownership.held.lock().await = Some(held);
                self.owns_bucket.store(true, Ordering::Release);
                Ok(Ok(incarnation))
            }
            // Lost the swap: look again who has it.
            None => Err(S3Error::new(
                ErrorKind::Conflict,
                ebb_s3::Operation::Put,
                KEY,
                "another process takes the bucket at the same time",
            )),
        }
    }

    /// The loop of a leader: takes the bucket over if another voter led so far, then keeps it.
    pub(crate) async fn run_owner(&self, stop: Stop) {
        let every = Duration::from_millis(self.config.timings.owner_renew_ms.max(100));
        while self.ownership.held.lock().await.is_none() {
            match self.attach(false).await {
                Ok(()) => break,
                Err(e) => tracing::error!(error = %e, "the new leader can't take the bucket"),
            }
            if stop.sleep(every.min(Duration::from_secs(1))).await {
                return;
            }
        }
        while !stop.wait(&self.wakes.owner, every).await {
            match self.renew(Swap::Keep).await {
                Ok(true) => {}
                Ok(false) => {
                    if self.owns_bucket.swap(false, Ordering::AcqRel) {
                        tracing::error!(
                            "another cluster took the bucket: nothing is written to it any more"
                        );
                    }
                }
                Err(e) => {
                    let _ = self.health.note::<()>(Err(e));
                }
            }
        }
    }

    /// Swaps the owner object. `false`: the bucket is not ours any more.
    async fn renew(&self, what: Swap) -> Result<bool, S3Error> {
        let mut held = self.ownership.held.lock().await;
        let Some((owner, etag)) = held.as_ref() else { return Ok(false) };
        if owner.asleep && what == Swap::Keep {
            return Ok(true);
        }
        let asleep = what == Swap::Sleep;
        let next = Owner { n: owner.n + 1, asleep, renewed_ms: millis(), ..owner.clone() };
        if let Some(swapped) = self.swap_owner(Some(etag), next).await? {
            *held = Some(swapped);
            return Ok(true);
        }
        // A swap of ours whose reply was lost looks like somebody else's.
        match self.read_owner().await? {
            Some((found, etag)) if found.writer == owner.writer => {
                *held = Some((found, etag));
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Everything is in S3: the bucket alone is enough to wake.
    pub(crate) async fn put_to_sleep(&self) -> FsResult<()> {
        match self.renew(Swap::Sleep).await {
            Ok(true) => {
                self.owns_bucket.store(false, Ordering::Release);
                Ok(())
            }
            Ok(false) => Err(ebb_metaplane_protocol::FsError::Io(
                "another cluster took the bucket".to_owned(),
            )),
            Err(e) => Err(super::fs_error(&e)),
        }
    }

    /// The shutdown was taken back.
    pub(crate) async fn wake_bucket(&self) -> FsResult<()> {
        match self.renew(Swap::Wake).await {
            Ok(true) => {
                self.owns_bucket.store(true, Ordering::Release);
                Ok(())
            }
            Ok(false) => Err(ebb_metaplane_protocol::FsError::Io(
                "another cluster took the bucket".to_owned(),
            )),
            Err(e) => Err(super::fs_error(&e)),
        }
    }

    /// Formats the state machine, or checks that it is this cluster's; takes the bucket first.
    /// `starting`: a cluster that was put to sleep wakes. Otherwise another voter led so far, and
    /// what it was putting to sleep stays so.
    pub(crate) async fn attach(&self, starting: bool) -> Result<(), MetaError> {
        let raft = |e: String| MetaError::Raft(e);
        let state = self
            .voter
            .read(|_, r| -> FsResult<_> {
                if !r.is_formatted()? {
                    return Ok(None);
                }
                Ok(Some((r.cluster()?, r.map()?.incarnation, r.counts()?.shutting_down)))
            })
            .await
            .map_err(|e| raft(e.to_string()))?
            .map_err(|e| raft(e.to_string()))?;
        if let Some((cluster, ..)) = &state
            && *cluster != self.cluster
        {
            return Err(MetaError::OtherCluster {
                dir: self.config.dir.clone(),
                found: cluster.to_string(),
                wanted: self.cluster.to_string(),
            });
        }
        if state.as_ref().is_some_and(|s| s.2) && !starting {
            return Ok(());
        }
        let owned_since = SystemTime::now();
        let ours = state.as_ref().map(|s| s.1);
        let incarnation = self.take_bucket(ours, crate::service::random()).await?;
        match state {
            None => {
                let format = Command::Format {
                    cluster: self.cluster,
                    pg_count: self.config.pg_count,
                    incarnation,
                    backed: true,
                };
                self.submit_internal(format).await.map_err(|e| raft(e.to_string()))?;
            }
            Some((.., true)) => {
                let up = Command::SetShutdown(false);
                self.submit_internal(up).await.map_err(|e| raft(e.to_string()))?;
            }
            Some(_) => {}
        }
        self.sweep_uploads(owned_since).await;
        Ok(())
    }
}

/// S3 did not answer for long.
pub(crate) fn down(config: &MetaConfig, e: &S3Error) -> MetaError {
    MetaError::S3Down {
        endpoint: endpoint(&config.bucket),
        why: e.to_string(),
        seconds: config.s3_patience_s,
    }
}
