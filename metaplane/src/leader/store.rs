//! One plan of a flush carried out against S3, and what became of it for certain.
//!
//! I3: success is S3's own word, or our nonce found at the key; everything in doubt is looked up, and
//! what stays in doubt stays unsettled. Bodies come from the nodes that hold them; the leader writes
//! only markers, links and empty files, and lets S3 copy what did not change.

use super::cores;
use super::seal::Sealed;
use crate::bucket::attributes;
use crate::service::{Service, count, fs_error};
use ebb_dataplane_protocol::control::{
    Control, ControlReply, PutCondition, PutObject, StoreOutcome, UploadPart,
};
use ebb_dataplane_protocol::{
    ClusterMap, Grant, GrantMode, RUN_BYTES, RunIndex, SessionId, ShardRef, SignedGrant,
};
use ebb_metaplane_protocol::flush::{
    AttemptResult, BaseChange, BaseFound, KeyWork, KeyWorkKind, LeftOver, StorePlan,
};
use ebb_metaplane_protocol::{Command, FileKind, FsResult};
use ebb_s3::{
    Condition, Conditions, ErrorKind, Etag, Metadata, ObjectInfo, Part, S3Error, UploadId,
};
use futures::{StreamExt, TryStreamExt};
use std::time::Duration;

/// Parts of one file in flight at most.
const PARTS_IN_FLIGHT: usize = 8;
/// Tries of one part: a part is overwritten by its repetition.
const PART_ATTEMPTS: usize = 3;
/// Least limit of a call that uploads; grows with the bytes.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// The slowest upload that is waited for.
const UPLOAD_BYTES_PER_S: u64 = 1 << 20;
/// S3 copies objects up to this in one call.
const COPY_BYTES_MAX: u64 = 5 << 30;

/// Limit of a call that uploads so many bytes.
pub(crate) fn upload_timeout(bytes: u64) -> Duration {
    UPLOAD_TIMEOUT + Duration::from_secs(bytes / UPLOAD_BYTES_PER_S)
}

/// How a plan is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// By the leader: a marker, a link, an empty file.
    Own,
    /// A server-side copy with new metadata.
    Copy,
    /// One PUT by the node that holds the run.
    Put,
    /// Parts.
    Multipart,
}

/// Chooses.
pub(crate) fn way(plan: &StorePlan) -> Way {
    let size = plan.attr.size;
    if plan.attr.kind != FileKind::File || size == 0 {
        Way::Own
    } else if !plan.has_data && plan.view.backing.is_some() {
        if size <= COPY_BYTES_MAX { Way::Copy } else { Way::Multipart }
    } else if size <= RUN_BYTES {
        Way::Put
    } else {
        Way::Multipart
    }
}

/// What S3 does with conditions on the operation at hand.
#[derive(Clone, Copy, Debug)]
struct Honours {
    if_absent: bool,
    if_match: bool,
}

fn condition(c: &PutCondition) -> Condition {
    match c {
        PutCondition::None => Condition::None,
        PutCondition::IfAbsent => Condition::IfAbsent,
        PutCondition::IfMatch(etag) => Condition::IfMatch(Etag::new(etag)),
    }
}

/// A failure that certainly changed nothing, or doubt.
fn outcome_of(e: &S3Error) -> StoreOutcome {
    match e.kind {
        ErrorKind::Ambiguous => StoreOutcome::Ambiguous,
        ErrorKind::PreconditionFailed | ErrorKind::Conflict | ErrorKind::NotFound => {
            StoreOutcome::ConditionFailed
        }
        _ => StoreOutcome::Failed(e.to_string()),
    }
}

fn outcome(result: Result<Etag, S3Error>) -> StoreOutcome {
    match result {
        Ok(etag) => StoreOutcome::Stored { etag: etag.as_str().to_owned() },
        Err(e) => outcome_of(&e),
    }
}

/// Bytes of the object that a plan makes.
pub(crate) fn length_of(plan: &StorePlan) -> u64 {
    match plan.attr.kind {
        FileKind::File => plan.attr.size,
        FileKind::Symlink => plan.target.as_ref().map_or(0, |t| t.len() as u64),
        FileKind::Directory | FileKind::HardLink => 0,
    }
}

impl Service {
    /// A read-mode grant with the plan's view.
    pub(crate) fn plan_grant(&self, plan: &StorePlan, map: &ClusterMap) -> SignedGrant {
        let grant = Grant {
            cluster: self.cluster,
            inode: plan.inode,
            mode: GrantMode::Read,
            generation: plan.generation,
            session: SessionId(0),
            view: plan.view.clone(),
            least_map_version: map.version,
            alloc_limit: plan.attr.size,
        };
        SignedGrant::sign(&grant, &self.key)
    }

    /// The condition to send. Where the server lacks it: a look before, `Err` with what was found
    /// when the condition does not hold.
    async fn guard(
        &self,
        plan: &StorePlan,
        honours: Honours,
    ) -> Result<PutCondition, StoreOutcome> {
        let honoured = match &plan.condition {
            PutCondition::None => true,
            PutCondition::IfAbsent => honours.if_absent,
            PutCondition::IfMatch(_) => honours.if_match,
        };
        if honoured {
            return Ok(plan.condition.clone());
        }
        let found = match self.head(&plan.key).await {
            Ok(found) => found,
            Err(e) => return Err(StoreOutcome::Failed(e.to_string())),
        };
        let holds = match (&plan.condition, &found) {
            (PutCondition::IfAbsent, None) => true,
            (PutCondition::IfMatch(etag), Some(info)) => info.etag.as_str() == etag,
            _ => false,
        };
        if holds { Ok(PutCondition::None) } else { Err(StoreOutcome::ConditionFailed) }
    }

    fn put_honours(&self) -> Honours {
        let c = self.conditions();
        Honours { if_absent: c.put_if_absent, if_match: c.put_if_match }
    }

    /// A body that the leader has.
    pub(crate) async fn store_own(&self, plan: &StorePlan) -> StoreOutcome {
        let sent = match self.guard(plan, self.put_honours()).await {
            Ok(sent) => sent,
            Err(outcome) => return outcome,
        };
        let body = plan.target.clone().unwrap_or_default();
        let metadata = attributes::metadata_of(self.cluster, plan);
        let put = self.bucket.put(&plan.key, body, &metadata, &condition(&sent)).await;
        outcome(self.health.note(put))
    }

    /// A copy of the clean object with new metadata.
    pub(crate) async fn store_copy(&self, plan: &StorePlan) -> StoreOutcome {
        let Some(backing) = &plan.view.backing else {
            return StoreOutcome::Failed("there is no object to copy".into());
        };
        let c = self.conditions();
        let honours = Honours { if_absent: c.copy_if_absent, if_match: c.copy_if_match };
        let sent = match self.guard(plan, honours).await {
            Ok(sent) => sent,
            Err(outcome) => return outcome,
        };
        let metadata = attributes::metadata_of(self.cluster, plan);
        let etag = Etag::new(&backing.etag);
        if !c.copy_source_if_match {
            match self.head(&backing.key).await {
                Ok(Some(info)) if info.etag == etag => {}
                Ok(_) => return StoreOutcome::BaseGone,
                Err(e) => return StoreOutcome::Failed(e.to_string()),
            }
        }
        let copied = self
            .bucket
            .copy(&backing.key, Some(&etag), &plan.key, Some(&metadata), &condition(&sent))
            .await;
        match self.health.note(copied) {
            // S3 does not say which of the two conditions failed.
            Err(e) if matches!(outcome_of(&e), StoreOutcome::ConditionFailed) => {
                match self.head(&backing.key).await {
                    Ok(Some(info)) if info.etag == etag => StoreOutcome::ConditionFailed,
                    Ok(_) => StoreOutcome::BaseGone,
                    Err(e) => StoreOutcome::Failed(e.to_string()),
                }
            }
            result => outcome(result),
        }
    }

    /// The item of a batch for the node that holds the run.
    pub(crate) async fn put_item(
        &self,
        plan: &StorePlan,
        map: &ClusterMap,
    ) -> Result<(ShardRef, PutObject), StoreOutcome> {
        let Some(core) = cores::primary_of_run(map, plan.inode, RunIndex(0)) else {
            self.want_nodes();
            return Err(StoreOutcome::Failed("no data node holds the file's group".into()));
        };
        let condition = self.guard(plan, self.put_honours()).await?;
        Ok((
            core,
            PutObject {
                inode: plan.inode,
                generation: plan.generation,
                grant: self.plan_grant(plan, map),
                key: plan.key.clone(),
                size: plan.attr.size,
                metadata: attributes::metadata_of(self.cluster, plan).into_iter().collect(),
                condition,
            },
        ))
    }

    /// Uploads a batch of small files; one outcome per item.
    pub(crate) async fn put_batch(
        &self,
        map: &ClusterMap,
        core: ShardRef,
        items: Vec<PutObject>,
    ) -> Vec<StoreOutcome> {
        let bytes = items.iter().map(|i| i.size).sum();
        let n = items.len();
        let request = Control::PutObjects(items);
        match self.cores.call(map, core, &request, upload_timeout(bytes)).await {
            Ok(ControlReply::Stored(outcomes)) if outcomes.len() == n => outcomes,
            Ok(other) => {
                let why = cores::unexpected(core, &other).to_string();
                tracing::error!(error = why, "uploading a batch");
                vec![StoreOutcome::Ambiguous; n]
            }
            // It may have been carried out, wholly or in part.
            Err(cores::CoreError::Call { source, .. }) if source.may_have_happened() => {
                vec![StoreOutcome::Ambiguous; n]
            }
            Err(e) => vec![StoreOutcome::Failed(e.to_string()); n],
        }
    }

    /// A large file: parts from the nodes, or copied by S3 where nothing changed.
    pub(crate) async fn store_multipart(
        &self,
        plan: &StorePlan,
        sealed: &Sealed,
        map: &ClusterMap,
    ) -> StoreOutcome {
        let c = self.conditions();
        let honours = Honours { if_absent: c.complete_if_absent, if_match: c.complete_if_match };
        let metadata: Metadata = attributes::metadata_of(self.cluster, plan);
        let upload = match self.bucket.create_multipart(&plan.key, &metadata).await {
            Ok(upload) => upload,
            // An upload that nobody knows of is swept at the next start.
            Err(e) => return StoreOutcome::Failed(e.to_string()),
        };
        let parts = match self.upload_parts(plan, sealed, map, &upload).await {
            Ok(parts) => parts,
            Err(failed) => {
                self.abort(&plan.key, &upload).await;
                return failed;
            }
        };
        let sent = match self.guard(plan, honours).await {
            Ok(sent) => sent,
            Err(outcome) => {
                self.abort(&plan.key, &upload).await;
                return outcome;
            }
        };
        let completed =
            self.bucket.complete_multipart(&plan.key, &upload, &parts, &condition(&sent)).await;
        let outcome = outcome(self.health.note(completed));
        if matches!(outcome, StoreOutcome::Stored { .. }) {
            return outcome;
        }
        // Fences a Complete that may still be under way: after this it finds no upload. Whether it
        // came before is seen at the key.
        let fenced = self.abort(&plan.key, &upload).await;
        if fenced && outcome == StoreOutcome::Ambiguous {
            return StoreOutcome::ConditionFailed;
        }
        outcome
    }

    /// `true`: nothing can complete it any more.
    pub(crate) async fn abort(&self, key: &str, upload: &UploadId) -> bool {
        let aborted = self.bucket.abort_multipart(key, upload).await;
        if let Err(e) = &aborted {
            tracing::warn!(error = %e, "an upload was not aborted; it is swept at the next start");
        }
        aborted.is_ok()
    }

    async fn upload_parts(
        &self,
        plan: &StorePlan,
        sealed: &Sealed,
        map: &ClusterMap,
        upload: &UploadId,
    ) -> Result<Vec<Part>, StoreOutcome> {
        let runs = RunIndex::count_for(plan.attr.size);
        let mut parts: Vec<Part> = futures::stream::iter(0..runs)
            .map(|run| self.part(plan, sealed, map, upload, RunIndex(run)))
            .buffer_unordered(PARTS_IN_FLIGHT)
            .try_collect()
            .await?;
        parts.sort_by_key(|p| p.number);
        Ok(parts)
    }

    async fn part(
        &self,
        plan: &StorePlan,
        sealed: &Sealed,
        map: &ClusterMap,
        upload: &UploadId,
        run: RunIndex,
    ) -> Result<Part, StoreOutcome> {
        let (start, end) = (run.start(), (run.start() + RUN_BYTES).min(plan.attr.size));
        let dirty = sealed.extents.iter().any(|e| e.start < end && e.end > start);
        let clean = plan.view.backing.as_ref().filter(|b| !dirty && end <= b.valid_bytes());
        let number = run.0 + 1;
        let mut last = StoreOutcome::Failed("not tried".into());
        for _ in 0..PART_ATTEMPTS {
            let result = match clean {
                Some(b) => outcome(
                    self.bucket
                        .upload_part_copy(
                            &plan.key,
                            upload,
                            number,
                            &b.key,
                            Some(&Etag::new(&b.etag)),
                            start..end,
                        )
                        .await
                        .map(|part| part.etag),
                ),
                None => self.node_part(plan, map, upload, run, (end - start) as u32).await,
            };
            match result {
                StoreOutcome::Stored { etag } => return Ok(Part { number, etag: Etag::new(etag) }),
                // The source is not what it was; another try finds the same.
                StoreOutcome::ConditionFailed => return Err(StoreOutcome::BaseGone),
                fatal @ (StoreOutcome::BaseGone
                | StoreOutcome::NotSealed
                | StoreOutcome::Damaged(_)) => return Err(fatal),
                StoreOutcome::Ambiguous => {
                    last = StoreOutcome::Failed("the reply to a part was lost".into());
                }
                failed @ StoreOutcome::Failed(_) => last = failed,
            }
        }
        Err(last)
    }

    pub(crate) async fn node_part(
        &self,
        plan: &StorePlan,
        map: &ClusterMap,
        upload: &UploadId,
        run: RunIndex,
        length: u32,
    ) -> StoreOutcome {
        let Some(core) = cores::primary_of_run(map, plan.inode, run) else {
            self.want_nodes();
            return StoreOutcome::Failed("no data node holds the run's group".into());
        };
        let request = Control::UploadPart(UploadPart {
            inode: plan.inode,
            generation: plan.generation,
            grant: self.plan_grant(plan, map),
            key: plan.key.clone(),
            upload_id: upload.as_str().to_owned(),
            part_number: run.0 + 1,
            run,
            length,
        });
        match self.cores.call(map, core, &request, upload_timeout(u64::from(length))).await {
            Ok(ControlReply::Part(outcome)) => outcome,
            Ok(other) => StoreOutcome::Failed(cores::unexpected(core, &other).to_string()),
            Err(e) => StoreOutcome::Failed(e.to_string()),
        }
    }

    /// A result for certain, after looking where it was in doubt; and whether the request may still
    /// land after all.
    pub(crate) async fn certain(
        &self,
        plan: &StorePlan,
        outcome: &StoreOutcome,
    ) -> (AttemptResult, bool) {
        let length = length_of(plan);
        if let Some(result) = AttemptResult::from_outcome(outcome, length) {
            return (result, false);
        }
        let lost = *outcome == StoreOutcome::Ambiguous;
        count(&self.counts.doubts);
        let look = Look {
            key: &plan.key,
            nonces: &[plan.nonce],
            length,
            condition: &plan.condition,
            definite: !lost,
        };
        let result = match self.look(&look).await {
            Ok(result) => result,
            Err(e) => {
                tracing::debug!(key = plan.key, error = %e, "looking an attempt up");
                AttemptResult::Ambiguous
            }
        };
        let landed = matches!(result, AttemptResult::Stored { .. });
        if lost && !landed && !stores_fenced(&self.conditions(), &plan.condition) {
            return (AttemptResult::Ambiguous, true);
        }
        (result, lost && !landed)
    }

    /// A flush found that its file's clean bytes are not where they were.
    pub(crate) async fn look_at_base(&self, plan: &StorePlan) -> FsResult<()> {
        let Some(base) = &plan.view.backing else { return Ok(()) };
        let info = self.head(&base.key).await.map_err(|e| crate::bucket::fs_error(&e))?;
        let found = match info {
            None => BaseFound::Gone,
            Some(info) if info.etag.as_str() == base.etag => return Ok(()),
            Some(info) => match self.left_over(&base.key, &info)? {
                Some(found) => BaseFound::LeftOver(found),
                None => {
                    BaseFound::Foreign(attributes::foreign(&self.bucket, &base.key, &info).await?)
                }
            },
        };
        tracing::info!(key = base.key, "the object below a dirty file was changed from outside");
        let (inode, key, etag) = (plan.inode, base.key.clone(), base.etag.clone());
        let change = BaseChange { inode, key, etag, found };
        self.submit_internal(Command::BaseChanged(vec![change])).await.map(drop)
    }

    /// Looks at a key for what became of an attempt to store.
    pub(crate) async fn look(&self, look: &Look<'_>) -> FsResult<AttemptResult> {
        let found = self.head(look.key).await.map_err(|e| crate::bucket::fs_error(&e))?;
        let not_done = |why: &str| {
            // What was refused did not happen; what was lost may still be on its way.
            if look.definite {
                AttemptResult::Failed(why.to_owned())
            } else {
                AttemptResult::Ambiguous
            }
        };
        let Some(info) = found else {
            return Ok(match look.condition {
                PutCondition::IfMatch(_) => AttemptResult::Missing,
                _ => not_done("the key was taken, and is free again"),
            });
        };
        let etag = info.etag.as_str().to_owned();
        if attributes::is_ours(self.cluster, &info, look.nonces) && info.size == look.length {
            return Ok(AttemptResult::Stored { etag, length: info.size });
        }
        if matches!(look.condition, PutCondition::IfMatch(e) if *e == etag) {
            return Ok(not_done("the object is as it was"));
        }
        if let Some(found) = self.left_over(look.key, &info)? {
            return Ok(AttemptResult::LeftOver(found));
        }
        let object = attributes::foreign(&self.bucket, look.key, &info).await?;
        Ok(AttemptResult::Foreign(object))
    }

    /// Whether an object is a late arrival of a request that was given up. Others' copies of our
    /// objects carry our tag too: only a nonce that was given up for this key is proof.
    pub(crate) fn left_over(&self, key: &str, info: &ObjectInfo) -> FsResult<Option<LeftOver>> {
        let Some(tag) = ebb_s3::EbbTag::from_metadata(&info.metadata) else { return Ok(None) };
        if tag.cluster != self.cluster.0 {
            return Ok(None);
        }
        let ours = self.voter.peek(|_, r| r.is_given_up(key, tag.nonce)).map_err(fs_error)??;
        Ok(ours.then(|| LeftOver {
            nonce: tag.nonce,
            etag: info.etag.as_str().to_owned(),
            length: info.size,
        }))
    }

    /// Data is needed that no node holds: the controller brings nodes.
    pub(crate) fn want_nodes(&self) {
        self.wake_wanted.store(true, std::sync::atomic::Ordering::Release);
    }

    /// The cluster map as applied here.
    pub(crate) fn map(&self) -> FsResult<ClusterMap> {
        self.voter.peek(|_, r| r.map()).map_err(fs_error)?
    }
}

/// Whether every way to store honours a condition: a late arrival is refused.
fn stores_fenced(c: &Conditions, condition: &PutCondition) -> bool {
    match condition {
        PutCondition::None => false,
        PutCondition::IfAbsent => c.put_if_absent && c.complete_if_absent && c.copy_if_absent,
        PutCondition::IfMatch(_) => c.put_if_match && c.complete_if_match && c.copy_if_match,
    }
}

/// The same for an attempt in doubt.
pub(crate) fn is_fenced(c: &Conditions, w: &KeyWork) -> bool {
    match &w.kind {
        KeyWorkKind::Resolve { inode: None, .. } => c.delete_if_match,
        _ => stores_fenced(c, &w.condition),
    }
}

/// An attempt to look up.
pub(crate) struct Look<'a> {
    pub(crate) key: &'a str,
    pub(crate) nonces: &'a [u128],
    pub(crate) length: u64,
    pub(crate) condition: &'a PutCondition,
    /// The server refused it: it will not arrive late.
    pub(crate) definite: bool,
}
