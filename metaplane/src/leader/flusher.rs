//! Flushes: dirty inodes to S3 (PROTOCOL §3, §9).
//!
//! Begin → seal → plan → store → commit, for batches of up to a thousand inodes, several batches at
//! once. What triggers them: age, an explicit flush, a group that moves, a shutdown. An inode is in
//! one batch at a time; one that failed waits before it is tried again.

use super::Stop;
use super::seal::{Sealed, ToSeal};
use super::store::{Way, length_of, way};
use crate::raft::propose::now;
use crate::service::{Service, count, fs_error, random};
use ebb_dataplane_protocol::InodeId;
use ebb_dataplane_protocol::control::{PutObject, StoreOutcome};
use ebb_metaplane_protocol::flush::*;
use ebb_metaplane_protocol::{Command, CommandReply, FsError, FsResult, Time};
use ebb_namespace::{DirtyInode, FlushStage};
use futures::StreamExt;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// Inodes of one batch.
const BATCH_INODES: usize = 1_000;
/// Batches under way at once.
const BATCHES_MAX: usize = 4;
/// Files of one PutObjects call, and their bytes.
const PUT_ITEMS_MAX: usize = 32;
const PUT_BYTES_MAX: u64 = 32 << 20;
/// Stores of one batch in flight at most (a PutObjects call counts as one).
const STORES_MAX: usize = 16;
/// Age in ms of what is flushed while a node fills up, if it isn't due before: what is written right now would
/// only be written again.
const PRESSED_AGE_MS: i64 = 1_000;
/// First pause of an inode that failed; doubles.
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(30);
/// Failures remembered; past it the memory starts anew.
const FAILURES_MAX: usize = 10_000;
/// How far a chain of names that wait for each other is followed.
const CHAIN_MAX: usize = 16;

#[derive(Clone, Debug)]
struct Failure {
    why: String,
    attempts: u32,
    next: Instant,
}

/// What this process is flushing, and what failed.
#[derive(Debug)]
pub(crate) struct FlushDesk {
    active: Mutex<HashSet<InodeId>>,
    failures: Mutex<HashMap<InodeId, Failure>>,
    batches: Arc<Semaphore>,
    /// Everything dirty goes, whatever its age.
    pub(crate) all: AtomicBool,
}

impl FlushDesk {
    pub(crate) fn new() -> Self {
        Self {
            active: Mutex::default(),
            failures: Mutex::default(),
            batches: Arc::new(Semaphore::new(BATCHES_MAX)),
            all: AtomicBool::new(false),
        }
    }

    /// What an earlier lead of this process wanted counts no more; what it has under way ends by itself.
    pub(crate) fn begin_lead(&self) {
        self.failures().clear();
        self.all.store(false, Ordering::Release);
    }

    fn active(&self) -> MutexGuard<'_, HashSet<InodeId>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn failures(&self) -> MutexGuard<'_, HashMap<InodeId, Failure>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes those that nobody flushes at the moment.
    fn claim(&self, inodes: impl IntoIterator<Item = InodeId>) -> Vec<InodeId> {
        let mut active = self.active();
        inodes.into_iter().filter(|id| active.insert(*id)).collect()
    }
    fn release(&self, inodes: &[InodeId]) {
        let mut active = self.active();
        for id in inodes {
            active.remove(id);
        }
    }
    pub(crate) fn is_active(&self, inode: InodeId) -> bool {
        self.active().contains(&inode)
    }
    fn is_waiting(&self, inode: InodeId) -> bool {
        self.failures().get(&inode).is_some_and(|f| f.next > Instant::now())
    }
    fn failed(&self, inode: InodeId, why: &str) {
        let mut all = self.failures();
        if all.len() >= FAILURES_MAX {
            all.clear();
        }
        let f = all.entry(inode).or_insert(Failure {
            why: String::new(),
            attempts: 0,
            next: Instant::now(),
        });
        why.clone_into(&mut f.why);
        let pause = BACKOFF_MIN.saturating_mul(1 << f.attempts.min(16)).min(BACKOFF_MAX);
        f.attempts += 1;
        f.next = Instant::now() + pause;
    }
    fn succeeded(&self, inode: InodeId) {
        self.failures().remove(&inode);
    }
    /// Why an inode failed last.
    pub(crate) fn why(&self, inode: InodeId) -> Option<String> {
        self.failures().get(&inode).map(|f| f.why.clone())
    }
}

/// Releases a claim however the flush ends.
struct Claim<'a>(&'a FlushDesk, Vec<InodeId>);
impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.0.release(&self.1);
    }
}

/// What became of an inode of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// S3 holds what was dirty when the flush began; bytes uploaded.
    Done(u64),
    /// Not yet; why.
    Failed(String),
    /// Another inode's object is in the way.
    Blocked(Option<InodeId>),
    /// It was not dirty, or is being flushed by somebody else.
    Skipped,
}

impl Service {
    /// The loop of a leader.
    pub(crate) async fn run_flusher(self: &Arc<Self>, stop: Stop) {
        let tick = self.config.timings.tick();
        while !stop.wait(&self.wakes.flush, tick).await {
            if !self.may_store() {
                continue;
            }
            if let Err(e) = self.flush_due(&stop).await {
                tracing::debug!(error = %e, "looking for what is to be flushed");
            }
        }
    }

    async fn flush_due(self: &Arc<Self>, stop: &Stop) -> FsResult<()> {
        let age = i64::try_from(self.config.timings.flush_after_ms).unwrap_or(i64::MAX);
        let mut after: Option<(Time, InodeId)> = None;
        loop {
            let older_than = if self.flushes.all.load(Ordering::Acquire) {
                Time(i64::MAX)
            } else {
                let age = if self.liveness.pressed() { age.min(PRESSED_AGE_MS) } else { age };
                Time(now().0.saturating_sub(age.saturating_mul(1_000_000)))
            };
            let Ok(slot) = Arc::clone(&self.flushes.batches).acquire_owned().await else {
                return Ok(());
            };
            if stop.is_set() {
                return Ok(());
            }
            let batch = self
                .voter
                .peek(|_, r| r.dirty_batch(BATCH_INODES, older_than, after))
                .map_err(fs_error)??;
            let Some(last) = batch.last() else { return Ok(()) };
            after = Some((last.since, last.inode));
            let ready: Vec<InodeId> =
                batch.iter().filter(|d| is_ready(d)).map(|d| d.inode).collect();
            let attrs: Vec<InodeId> =
                batch.iter().filter(|d| d.needs_attrs).map(|d| d.inode).collect();
            let service = Arc::clone(self);
            tokio::spawn(async move {
                let _slot = slot;
                if !attrs.is_empty()
                    && let Err(e) = service.hydrate(attrs).await
                {
                    tracing::debug!(error = %e, "attributes before a flush");
                }
                let ready = ready.into_iter().filter(|id| !service.flushes.is_waiting(*id));
                service.flush_with_blockers(ready.collect()).await;
            });
        }
    }

    /// Flushes inodes; who is in their way goes first.
    pub(crate) async fn flush_with_blockers(
        &self,
        inodes: Vec<InodeId>,
    ) -> Vec<(InodeId, Flushed)> {
        let mut results = self.flush_batch(inodes, false).await;
        for (inode, result) in &mut results {
            let Flushed::Blocked(blocker) = result else { continue };
            *result = self.unblock(*inode, *blocker).await;
        }
        for (inode, result) in &results {
            match result {
                Flushed::Done(_) => self.flushes.succeeded(*inode),
                Flushed::Failed(why) => self.flushes.failed(*inode, why),
                Flushed::Blocked(_) => self
                    .flushes
                    .failed(*inode, "its key is busy, or waits for a request whose reply was lost"),
                Flushed::Skipped => {}
            }
        }
        results
    }

    /// Flushes the chain of inodes that stand in each other's way, last first. A cycle, or somebody
    /// without a name of its own, goes by way of its temporary key.
    async fn unblock(&self, inode: InodeId, blocker: Option<InodeId>) -> Flushed {
        let mut chain = vec![inode];
        let mut next = blocker;
        // Others may keep renaming into the way: what is not free after so many steps waits.
        for _ in 0..CHAIN_MAX * 4 {
            let Some(at) = next else { break };
            let through_temporary = chain.contains(&at) || chain.len() >= CHAIN_MAX;
            let result = self.flush_one(at, through_temporary).await;
            match result {
                Flushed::Blocked(Some(other)) if !through_temporary => {
                    chain.push(at);
                    next = Some(other);
                    continue;
                }
                // It has no name to go to: an unlinked file that is still open.
                Flushed::Skipped if !through_temporary => {
                    self.flush_one(at, true).await;
                }
                _ => {}
            }
            // The way is free for the one before, or it will be found blocked again.
            match chain.pop() {
                Some(first) if chain.is_empty() => return self.flush_one(first, false).await,
                Some(waiting) => next = Some(waiting),
                None => break,
            }
        }
        Flushed::Blocked(None)
    }

    async fn flush_one(&self, inode: InodeId, via_temporary: bool) -> Flushed {
        let mut result = self.flush_batch(vec![inode], via_temporary).await;
        result.pop().map_or(Flushed::Skipped, |(_, r)| r)
    }

    /// One batch, from begin to commit. Results in no order; every inode asked for has one.
    async fn flush_batch(
        &self,
        inodes: Vec<InodeId>,
        via_temporary: bool,
    ) -> Vec<(InodeId, Flushed)> {
        if inodes.is_empty() {
            return Vec::new();
        }
        if !self.may_store() {
            let not_yet = || Flushed::Failed("this leader may not change the bucket (yet)".into());
            return inodes.into_iter().map(|id| (id, not_yet())).collect();
        }
        let mut results: HashMap<InodeId, Flushed> =
            inodes.iter().map(|id| (*id, Flushed::Skipped)).collect();
        let claim = Claim(&self.flushes, self.flushes.claim(inodes));
        if let Err(e) = self.flush_claimed(&claim.1, via_temporary, &mut results).await {
            for id in &claim.1 {
                if results.get(id) == Some(&Flushed::Skipped) {
                    results.insert(*id, Flushed::Failed(e.to_string()));
                }
            }
        }
        drop(claim);
        for result in results.values() {
            match result {
                Flushed::Done(bytes) => {
                    count(&self.counts.flushed);
                    self.counts.flushed_bytes.fetch_add(*bytes, Ordering::Relaxed);
                }
                Flushed::Failed(_) => count(&self.counts.flush_failures),
                _ => {}
            }
        }
        results.into_iter().collect()
    }

    async fn flush_claimed(
        &self,
        inodes: &[InodeId],
        via_temporary: bool,
        results: &mut HashMap<InodeId, Flushed>,
    ) -> FsResult<()> {
        let begin = Command::FlushBegin { inodes: inodes.to_vec(), via_temporary };
        let reply = self.submit_internal(begin).await?;
        let CommandReply::Tickets(tickets) = reply else { return Err(misfit(&reply)) };
        let to_seal: Vec<ToSeal> = tickets
            .iter()
            .filter(|t| t.needs_seal)
            .map(|t| ToSeal {
                inode: t.inode,
                generation: t.generation,
                alloc_limit: t.alloc_limit,
            })
            .collect();
        let mut sealed =
            if to_seal.is_empty() { HashMap::new() } else { self.seal(&to_seal).await? };
        let mut seals = Vec::with_capacity(tickets.len());
        let mut extents: HashMap<InodeId, Sealed> = HashMap::new();
        let mut aborted = Vec::new();
        for t in &tickets {
            let found = match sealed.remove(&t.inode) {
                Some(Err(why)) => {
                    results.insert(t.inode, Flushed::Failed(why));
                    aborted.push(t.inode);
                    continue;
                }
                Some(Ok(found)) => found,
                None => Sealed::default(),
            };
            seals.push(SealedInode {
                inode: t.inode,
                generation: t.generation,
                has_data: !found.extents.is_empty(),
                high_water: found.high_water,
                nonce: random(),
            });
            extents.insert(t.inode, found);
        }
        if !aborted.is_empty() {
            self.counts.flush_aborts.fetch_add(aborted.len() as u64, Ordering::Relaxed);
            self.submit_internal(Command::FlushAbort(aborted)).await?;
        }
        if seals.is_empty() {
            return Ok(());
        }
        let order: Vec<InodeId> = seals.iter().map(|s| s.inode).collect();
        let reply = self.submit_internal(Command::FlushSealed(seals)).await?;
        let CommandReply::Plans(plans) = reply else { return Err(misfit(&reply)) };
        let mut stores = Vec::new();
        for (inode, plan) in order.into_iter().zip(plans) {
            match plan {
                FlushPlan::Clean => drop(results.insert(inode, Flushed::Done(0))),
                FlushPlan::Gone => drop(results.insert(inode, Flushed::Done(0))),
                FlushPlan::Blocked { blocker } => {
                    results.insert(inode, Flushed::Blocked(blocker));
                }
                FlushPlan::Rescue(plan) => {
                    let sealed = extents.remove(&inode).unwrap_or_default();
                    let outcome = self.flush_ranges(&plan, &sealed).await?;
                    results.insert(inode, outcome);
                }
                FlushPlan::Store(plan) => {
                    stores.push((*plan, extents.remove(&inode).unwrap_or_default()));
                }
            }
        }
        self.store_all(stores, results).await
    }

    /// A file whose clean bytes are lost: what is dirty of it (R36).
    async fn flush_ranges(&self, plan: &StorePlan, sealed: &Sealed) -> FsResult<Flushed> {
        let map = self.map()?;
        let rescue: futures::future::BoxFuture<'_, _> = Box::pin(self.rescue(plan, sealed, &map));
        match rescue.await {
            Ok(ranges) => {
                let bytes = ranges.iter().map(|r| r.length).sum();
                let (inode, generation) = (plan.inode, plan.generation);
                let rescue = Rescue { inode, generation, ranges };
                self.submit_internal(Command::Rescued(rescue)).await?;
                Ok(Flushed::Done(bytes))
            }
            Err(why) => {
                self.submit_internal(Command::FlushAbort(vec![plan.inode])).await?;
                Ok(Flushed::Failed(why))
            }
        }
    }

    /// Carries the plans out and commits what became of them, as they end.
    async fn store_all(
        &self,
        plans: Vec<(StorePlan, Sealed)>,
        results: &mut HashMap<InodeId, Flushed>,
    ) -> FsResult<()> {
        if plans.is_empty() {
            return Ok(());
        }
        let map = self.map()?;
        let map = &map;
        let mut work: Vec<futures::future::BoxFuture<'_, Vec<(StorePlan, StoreOutcome)>>> =
            Vec::new();
        let mut puts = Vec::new();
        for (plan, sealed) in plans {
            match way(&plan) {
                Way::Own => work.push(Box::pin(async move {
                    let outcome = self.store_own(&plan).await;
                    vec![(plan, outcome)]
                })),
                Way::Copy => work.push(Box::pin(async move {
                    let outcome = self.store_copy(&plan).await;
                    vec![(plan, outcome)]
                })),
                Way::Multipart => work.push(Box::pin(async move {
                    let outcome = self.store_multipart(&plan, &sealed, map).await;
                    vec![(plan, outcome)]
                })),
                Way::Put => puts.push(plan),
            }
        }
        let mut by_core: BTreeMap<_, Vec<(StorePlan, PutObject)>> = BTreeMap::new();
        let mut settled = Vec::new();
        for plan in puts {
            match self.put_item(&plan, map).await {
                Ok((core, item)) => by_core.entry(core).or_default().push((plan, item)),
                Err(outcome) => settled.push((plan, outcome)),
            }
        }
        if !settled.is_empty() {
            work.push(Box::pin(async move { settled }));
        }
        for (core, items) in by_core {
            for batch in batches(items) {
                work.push(Box::pin(async move {
                    let (plans, items): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
                    let outcomes = self.put_batch(map, core, items).await;
                    plans.into_iter().zip(outcomes).collect()
                }));
            }
        }
        let mut running = futures::stream::iter(work).buffer_unordered(STORES_MAX).ready_chunks(64);
        let mut failed = Ok(());
        while let Some(ended) = running.next().await {
            if let Err(e) = self.commit(ended.into_iter().flatten().collect(), results).await {
                // Not this leader's to commit any more; its successor looks the attempts up.
                failed = Err(e);
            }
        }
        failed
    }

    async fn commit(
        &self,
        ended: Vec<(StorePlan, StoreOutcome)>,
        results: &mut HashMap<InodeId, Flushed>,
    ) -> FsResult<()> {
        let mut looked = futures::stream::iter(ended)
            .map(|(plan, outcome)| async move {
                let (result, may_land) = self.certain(&plan, &outcome).await;
                (plan, outcome, result, may_land)
            })
            .buffer_unordered(STORES_MAX);
        let mut outcomes = Vec::new();
        let mut without_base = Vec::new();
        while let Some((plan, outcome, result, may_land)) = looked.next().await {
            if may_land {
                // Before the result: from then on the key takes care of it (R33).
                self.doubt(plan.nonce).await?;
            }
            results.insert(plan.inode, flushed(&result, length_of(&plan)));
            outcomes.push(FlushOutcome {
                inode: plan.inode,
                generation: plan.generation,
                nonce: plan.nonce,
                result,
            });
            if outcome == StoreOutcome::BaseGone {
                without_base.push(plan);
            }
        }
        drop(looked);
        self.submit_internal(Command::FlushCommit(outcomes)).await?;
        for plan in &without_base {
            if let Err(e) = self.look_at_base(plan).await {
                tracing::debug!(inode = %plan.inode, error = %e, "looking at a base");
            }
        }
        Ok(())
    }
}

fn flushed(result: &AttemptResult, bytes: u64) -> Flushed {
    match result {
        AttemptResult::Stored { .. } => Flushed::Done(bytes),
        AttemptResult::Failed(why) => Flushed::Failed(why.clone()),
        AttemptResult::Foreign(_) => {
            Flushed::Failed("somebody else's object has its name; it gets another".into())
        }
        AttemptResult::Missing | AttemptResult::Deleted => {
            Flushed::Failed("its object was deleted from outside; stored anew next".into())
        }
        AttemptResult::LeftOver(_) => Flushed::Failed(
            "a request that had been lost arrived before it; stored anew next".into(),
        ),
        AttemptResult::Ambiguous => Flushed::Failed("the reply of S3 was lost; looking".into()),
    }
}

fn misfit(reply: &CommandReply) -> FsError {
    FsError::Io(format!("the state machine answered {reply:?}"))
}

/// Splits by count and bytes.
fn batches(items: Vec<(StorePlan, PutObject)>) -> Vec<Vec<(StorePlan, PutObject)>> {
    let mut all = Vec::new();
    let mut batch = Vec::new();
    let mut bytes = 0;
    for item in items {
        let size = item.1.size;
        if !batch.is_empty() && (batch.len() >= PUT_ITEMS_MAX || bytes + size > PUT_BYTES_MAX) {
            all.push(std::mem::take(&mut batch));
            bytes = 0;
        }
        bytes += size;
        batch.push(item);
    }
    if !batch.is_empty() {
        all.push(batch);
    }
    all
}

/// Whether a flush may begin.
pub(crate) fn is_ready(d: &DirtyInode) -> bool {
    d.stage == FlushStage::Dirty && !d.cuts_pending
}
