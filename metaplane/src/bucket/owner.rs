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
    /// Which group of voters took it, by a directory of one of its founders: a group that is founded anew under the same
    /// cluster's name knows nothing of what the first one has.
    #[serde(default)]
    group: String,
}

/// Between two looks whether S3 was probed.
const PROBED_WITHIN: Duration = Duration::from_millis(50);

/// What a swap is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Swap {
    /// Renews; does not wake what was put to sleep.
    Keep,
    Sleep,
    Wake,
}

/// The owner object as a leader left it, or found it asleep.
#[derive(Debug)]
struct Held {
    /// The term in which it led: another leader has changed the object since, or will.
    term: u64,
    owner: Owner,
    etag: Etag,
}

/// What this process knows of the owner object.
#[derive(Debug, Default)]
pub(crate) struct Ownership {
    held: Mutex<Option<Held>>,
}

/// How a renewal ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Renewed {
    Kept,
    /// Another process of this cluster changed the object: a leader of before, late. It is taken again.
    ByOurs,
    /// Another cluster has it.
    Lost,
    /// This leader has not come to look at it yet.
    NotYet,
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
        term: u64,
        ours: Option<Incarnation>,
        writer: u128,
    ) -> Result<Incarnation, MetaError> {
        let patience = Duration::from_secs(self.config.s3_patience_s);
        let begun = Instant::now();
        let mut pause = Duration::from_millis(100);
        loop {
            let error = match self.try_take(term, ours, writer).await {
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
        term: u64,
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
            group: self.voter.group(),
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
                // Unless it began to take it a moment ago, and was gone before it wrote that down.
                let lost = same && ours.is_none() && owner.group != next.group;
                if lost && !owner.asleep && !self.config.steal_bucket {
                    let bucket = self.config.bucket.bucket.clone();
                    return Ok(Err(MetaError::LostGroup { bucket, dir: self.config.dir.clone() }));
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
            Some((owner, etag)) => {
                *self.ownership.held.lock().await = Some(Held { term, owner, etag });
                self.owned_in.store(term, Ordering::Release);
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

    /// Whether the object was looked at in the present lead.
    pub(crate) async fn is_attached(&self) -> bool {
        let term = self.voter.leading_term();
        self.ownership.held.lock().await.as_ref().is_some_and(|h| Some(h.term) == term)
    }

    /// Takes the bucket over from whoever led so far. `false`: it is time to end.
    async fn take_over_bucket(&self, stop: &Stop, every: Duration) -> bool {
        loop {
            // What S3 honours decides how the object is swapped.
            let pause = match self.conditions.get() {
                None => PROBED_WITHIN,
                Some(_) => match self.attach(false).await {
                    Ok(()) => return true,
                    Err(e) => {
                        tracing::error!(error = %e, "the leader can't take the bucket");
                        every.min(Duration::from_secs(1))
                    }
                },
            };
            if stop.sleep(pause).await {
                return false;
            }
        }
    }

    /// The loop of a leader: takes the bucket over if another voter led so far, then keeps it.
    pub(crate) async fn run_owner(&self, stop: Stop) {
        let every = Duration::from_millis(self.config.timings.owner_renew_ms.max(100));
        let mut attached = self.is_attached().await;
        loop {
            if !attached && !self.take_over_bucket(&stop, every).await {
                return;
            }
            attached = true;
            // What waits for the bucket need not wait for a tick.
            self.wakes.stirred.notify_one();
            self.wakes.flush.notify_one();
            if stop.wait(&self.wakes.owner, every).await {
                return;
            }
            match self.renew(Swap::Keep).await {
                Ok(Renewed::Kept) => {}
                Ok(Renewed::ByOurs | Renewed::NotYet) => attached = false,
                Ok(Renewed::Lost) => {
                    if self.owned_in.swap(0, Ordering::AcqRel) != 0 {
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

    /// Swaps the owner object.
    async fn renew(&self, what: Swap) -> Result<Renewed, S3Error> {
        let mut slot = self.ownership.held.lock().await;
        let lead = self.voter.leading_term();
        let Some(held) = slot.as_mut().filter(|h| Some(h.term) == lead) else {
            return Ok(Renewed::NotYet);
        };
        if held.owner.asleep && what == Swap::Keep {
            return Ok(Renewed::Kept);
        }
        let asleep = what == Swap::Sleep;
        let owner = &held.owner;
        let next = Owner { n: owner.n + 1, asleep, renewed_ms: millis(), ..owner.clone() };
        if let Some((owner, etag)) = self.swap_owner(Some(&held.etag), next).await? {
            (held.owner, held.etag) = (owner, etag);
            return Ok(Renewed::Kept);
        }
        // A swap of ours whose reply was lost looks like somebody else's.
        match self.read_owner().await? {
            Some((found, etag)) if found.writer == held.owner.writer => {
                (held.owner, held.etag) = (found, etag);
                Ok(Renewed::Kept)
            }
            Some((found, _))
                if found.cluster == held.owner.cluster
                    && found.incarnation == held.owner.incarnation =>
            {
                *slot = None;
                Ok(Renewed::ByOurs)
            }
            _ => Ok(Renewed::Lost),
        }
    }

    /// The same for a call that waits for it.
    async fn renew_now(&self, what: Swap) -> FsResult<()> {
        match self.renew(what).await {
            Ok(Renewed::Kept) => Ok(()),
            Ok(Renewed::NotYet | Renewed::ByOurs) => {
                self.wakes.owner.notify_one();
                Err(ebb_namespace::again("the new leader has yet to take the bucket"))
            }
            Ok(Renewed::Lost) => Err(ebb_metaplane_protocol::FsError::Io(
                "another cluster took the bucket".to_owned(),
            )),
            Err(e) => Err(super::fs_error(&e)),
        }
    }

    /// Everything is in S3: the bucket alone is enough to wake.
    pub(crate) async fn put_to_sleep(&self) -> FsResult<()> {
        self.renew_now(Swap::Sleep).await?;
        self.owned_in.store(0, Ordering::Release);
        Ok(())
    }

    /// The shutdown was taken back.
    pub(crate) async fn wake_bucket(&self) -> FsResult<()> {
        let term = self.voter.leading_term().unwrap_or(0);
        self.renew_now(Swap::Wake).await?;
        self.owned_in.store(term, Ordering::Release);
        Ok(())
    }

    /// A bucket of ours that is asleep is left so by who leads next.
    async fn is_asleep(&self, term: u64, ours: Incarnation) -> Result<bool, S3Error> {
        let found = self.read_owner().await?;
        let cluster = self.cluster.to_string();
        let asleep = |o: &Owner| o.asleep && o.cluster == cluster && o.incarnation == ours.0;
        let Some((owner, etag)) = found.filter(|(o, _)| asleep(o)) else { return Ok(false) };
        *self.ownership.held.lock().await = Some(Held { term, owner, etag });
        Ok(true)
    }

    /// Formats the state machine, or checks that it is this cluster's; takes the bucket first.
    /// `starting`: a cluster that was put to sleep wakes. Otherwise another voter led so far: what it
    /// has put to sleep stays so, and a shutdown that it was about goes on.
    pub(crate) async fn attach(&self, starting: bool) -> Result<(), MetaError> {
        let raft = |e: String| MetaError::Raft(e);
        let Some(term) = self.voter.leading_term() else {
            return Err(raft("another voter leads".into()));
        };
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
        let owned_since = SystemTime::now();
        let ours = state.as_ref().map(|s| s.1);
        if let (Some((_, ours, true)), false) = (&state, starting)
            && self.is_asleep(term, *ours).await.map_err(|e| down(&self.config, &e))?
        {
            return Ok(());
        }
        let incarnation = self.take_bucket(term, ours, crate::service::random()).await?;
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
            Some((.., true)) if starting => {
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
