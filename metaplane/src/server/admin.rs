//! Operators and the controller: scale, groups, flush, evict, warm, shutdown.

use crate::leader::cores;
use crate::leader::flusher::{Flushed, is_ready};
use crate::service::{Service, fs_error};
use ebb_dataplane_protocol::control::{BATCH_MAX, Control};
use ebb_dataplane_protocol::{
    ByteRange, InodeId, NodeId, NodeState, RUN_BYTES, RunIndex, ShardRef, SignedGrant,
};
use ebb_metaplane_protocol::admin::FlushReport;
use ebb_metaplane_protocol::check;
use ebb_metaplane_protocol::dump::RECORDS_MAX;
use ebb_metaplane_protocol::lease::LEASE;
use ebb_metaplane_protocol::{AdminCall, AdminReply, Command, FileKind, FsError, FsResult};
use ebb_namespace::FlushStage;
use futures::StreamExt;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Inodes visited by one step of a walk.
const WALK_STEP: usize = 1_000;
/// Failures named in a report.
const FAILED_NAMED: usize = 20;
/// Tries of one inode in one flush.
const FLUSH_ATTEMPTS: usize = 4;
/// Nor before it failed for so long: what a busy node or a late notice refuses now is done a moment later.
const FAILING_MIN: Duration = Duration::from_secs(3);
/// A busy key becomes free when the requests under way there have ended; those are bounded. So often and for so long it
/// has to be found busy: the time in which somebody else stores the file doesn't count.
const BLOCKED_ATTEMPTS: usize = 40;
const BLOCKED_MAX: Duration = Duration::from_secs(60);
/// A new leader may change the bucket by then, unless S3 or another cluster is in its way.
const TAKEN_OVER_MAX: Duration = Duration::from_secs(10);
/// Between two looks at files that somebody else is at, and the least between two attempts; it doubles.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_millis(800);
/// One shutdown call works for so long, then reports how far it is; the caller calls again.
const SHUTDOWN_SLICE: Duration = Duration::from_secs(20);
/// How often a shutdown that waits looks for who has unlinked files open.
const READERS_EVERY: Duration = Duration::from_millis(500);
/// Limit of a control call.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Warm calls in flight at most, and the limit of one (it reads from S3).
const WARM_CONCURRENCY: usize = 16;
const WARM_TIMEOUT: Duration = Duration::from_secs(120);

/// A file that a flush could not store so far.
struct Failing {
    since: Instant,
    /// How often it failed; finding its key busy is no failure.
    attempts: usize,
    blocked: usize,
    why: String,
}

impl Failing {
    fn new() -> Self {
        Self { since: Instant::now(), attempts: 0, blocked: 0, why: String::new() }
    }

    fn is_hopeless(&self) -> bool {
        let long = self.since.elapsed();
        let failed = self.attempts >= FLUSH_ATTEMPTS && long >= FAILING_MIN;
        failed || self.blocked >= BLOCKED_ATTEMPTS && long >= BLOCKED_MAX
    }
}

impl Service {
    pub(super) async fn admin(self: &Arc<Self>, call: AdminCall) -> FsResult<AdminReply> {
        let done = |_| AdminReply::Done;
        match call {
            AdminCall::Status => Ok(AdminReply::Status(Box::new(self.status().await?))),
            AdminCall::SetDesired { nodes } => {
                let min = u32::from(self.config.min_in_sync);
                if nodes > 0 && nodes < min {
                    return Err(FsError::Invalid(format!(
                        "{nodes} nodes can't hold the {min} copies that writes need (--min-in-sync)"
                    )));
                }
                self.submit_internal(Command::SetDesired(nodes)).await.map(done)
            }
            AdminCall::SetNodeState { node, state } => {
                self.set_node_state(node, state).await.map(|()| AdminReply::Done)
            }
            AdminCall::MovePg { pg, to } => {
                let map = self.voter.read(|_, r| r.map()).await.map_err(fs_error)??;
                if usize::from(pg.0) >= map.pgs.len() {
                    return Err(FsError::Invalid(format!("there is no placement group {pg}")));
                }
                if let Some(m) = to.iter().find(|m| map.address(**m).is_none()) {
                    return Err(FsError::Invalid(format!("no core {} on node {}", m.core, m.node)));
                }
                self.movers.want(pg, to);
                self.wakes.groups.notify_one();
                Ok(AdminReply::Done)
            }
            AdminCall::Flush { inode, wait } => {
                self.voter.read(|_, r| r.attr(inode)).await.map_err(fs_error)??;
                if wait {
                    return Ok(AdminReply::Flushed(self.flush_under(inode).await?));
                }
                let service = Arc::clone(self);
                tokio::spawn(async move { service.flush_under(inode).await });
                let remaining = self.counts_now()?.dirty_inodes;
                Ok(AdminReply::Flushed(FlushReport { remaining, ..FlushReport::default() }))
            }
            AdminCall::Evict { inode } => self.evict(inode).await.map(|()| AdminReply::Done),
            AdminCall::Warm { inode } => {
                self.voter.read(|_, r| r.attr(inode)).await.map_err(fs_error)??;
                let service = Arc::clone(self);
                tokio::spawn(async move {
                    if let Err(e) = service.warm(inode).await {
                        tracing::warn!(%inode, error = %e, "warming stopped");
                    }
                });
                Ok(AdminReply::Done)
            }
            AdminCall::Shutdown { abandon } => {
                Ok(AdminReply::Flushed(self.shut_down(abandon).await?))
            }
            AdminCall::Resume => {
                self.flushes.all.store(false, Ordering::Release);
                self.wake_bucket().await?;
                self.submit_internal(Command::SetShutdown(false)).await.map(done)
            }
            AdminCall::Abandon { node, yes } => {
                Ok(AdminReply::Abandoned(self.abandon(node, yes).await?))
            }
            AdminCall::Forget { node } => self.forget_node(node).await.map(|()| AdminReply::Done),
            AdminCall::Path(inode) => {
                let path = self.voter.read(|_, r| r.path_of(inode)).await.map_err(fs_error)??;
                Ok(AdminReply::Path(path))
            }
            AdminCall::Check(check) => Ok(AdminReply::Check(self.check(check).await?)),
            AdminCall::Repair(repairs) if repairs.len() > check::BATCH_MAX => {
                Err(FsError::Invalid(format!("more than {} repairs in one call", check::BATCH_MAX)))
            }
            AdminCall::Repair(repairs) => {
                self.submit_internal(Command::Repair(repairs)).await.map(done)
            }
            AdminCall::Dump(from) => Ok(AdminReply::Dump(self.dump(from).await?)),
            AdminCall::Load(_, records) if records.len() > RECORDS_MAX => {
                Err(FsError::Invalid(format!("more than {RECORDS_MAX} records in one call")))
            }
            AdminCall::Load(step, records) => {
                self.submit_internal(Command::Load(step, records)).await.map(done)
            }
            AdminCall::Strays => Ok(AdminReply::Strays(self.strays().await?)),
            AdminCall::Voters => {
                self.voter.read(|_, _| ()).await.map_err(fs_error)?;
                Ok(AdminReply::Voters(self.voter.voters()))
            }
            AdminCall::AddVoter { id, address } => {
                self.voter.add_voter(id, address).await.map(|()| AdminReply::Done)
            }
            AdminCall::RemoveVoter { id } => {
                self.voter.remove_voter(id).await.map(|()| AdminReply::Done)
            }
        }
    }

    /// Fails once this process does not lead as it did when a long call began: the caller asks the next.
    fn still_leads(&self, term: Option<u64>) -> FsResult<()> {
        match self.voter.serves() {
            Ok(_) if self.voter.leading_term() == term => Ok(()),
            other => Err(FsError::NotLeader(other.err().flatten())),
        }
    }

    fn counts_now(&self) -> FsResult<ebb_namespace::MachineCounts> {
        self.voter.peek(|_, r| r.counts()).map_err(fs_error)?
    }

    async fn set_node_state(&self, node: NodeId, state: NodeState) -> FsResult<()> {
        if state == NodeState::Gone {
            let map = self.voter.read(|_, r| r.map()).await.map_err(fs_error)??;
            if map.node(node).is_none() {
                return Ok(());
            }
            if map.groups_of(node).next().is_some() {
                return Err(FsError::Invalid(format!("node {node} still holds groups")));
            }
            // I8: it says so itself, under a map in which it holds nothing.
            if !self.liveness.is_clean(node, map.version) {
                return Err(FsError::Again {
                    retry_after_ms: 500,
                    why: format!("node {node} has not reported yet that it holds nothing"),
                });
            }
        }
        self.submit_internal(Command::SetNodeState(node, state)).await?;
        if state == NodeState::Draining {
            self.wakes.flush.notify_one();
        }
        Ok(())
    }

    /// Flushes everything of a subtree that is dirty at the call.
    async fn flush_under(self: &Arc<Self>, root: InodeId) -> FsResult<FlushReport> {
        let mut report = FlushReport::default();
        let term = self.voter.leading_term();
        let (mut walk, own) = self.voter.peek(|_, r| r.dirty_walk(root)).map_err(fs_error)??;
        let mut found: Vec<InodeId> = own.into_iter().map(|d| d.inode).collect();
        loop {
            if !walk.is_done() {
                let step = self.voter.peek(|_, r| {
                    let dirty = r.dirty_under(&mut walk, WALK_STEP);
                    dirty.map(|d| (d, walk.is_done()))
                });
                let (dirty, _) = step.map_err(fs_error)??;
                found.extend(dirty.into_iter().map(|d| d.inode));
            }
            if found.len() >= WALK_STEP || walk.is_done() {
                let these = std::mem::take(&mut found);
                self.flush_these(term, these.clone(), &mut report).await?;
                let links = self.voter.peek(|_, r| r.dirty_links(&these)).map_err(fs_error)??;
                self.flush_these(term, links, &mut report).await?;
            }
            if walk.is_done() && found.is_empty() {
                return Ok(report);
            }
        }
    }

    /// Flushes these until each was stored once, or failed often enough.
    async fn flush_these(
        self: &Arc<Self>,
        term: Option<u64>,
        inodes: Vec<InodeId>,
        report: &mut FlushReport,
    ) -> FsResult<()> {
        let mut waiting: BTreeSet<InodeId> = inodes.into_iter().collect();
        let mut failures: HashMap<InodeId, Failing> = HashMap::new();
        let mut pause = PAUSE_MIN;
        let begun = Instant::now();
        while !waiting.is_empty() {
            self.still_leads(term)?;
            if !self.may_store() && begun.elapsed() < TAKEN_OVER_MAX {
                // A new leader takes the bucket first.
                tokio::time::sleep(PAUSE_MIN).await;
                continue;
            }
            let ids: Vec<InodeId> = waiting.iter().copied().collect();
            let states = self
                .voter
                .peek(|_, r| -> FsResult<Vec<_>> {
                    ids.iter()
                        .map(|id| Ok((*id, r.dirty_walk(*id).ok().and_then(|w| w.1))))
                        .collect()
                })
                .map_err(fs_error)??;
            let mut ready = Vec::new();
            let mut attrs = Vec::new();
            for (id, state) in states {
                let Some(d) = state else {
                    // Somebody else flushed it, or it is gone.
                    waiting.remove(&id);
                    report.flushed += 1;
                    continue;
                };
                if d.needs_attrs {
                    attrs.push(id);
                } else if is_ready(&d) && !self.flushes.is_active(id) {
                    ready.push(id);
                } else if matches!(d.stage, FlushStage::Flushing(..)) && !self.flushes.is_active(id)
                {
                    self.wakes.keys.notify_one();
                }
            }
            if !attrs.is_empty() {
                self.hydrate(attrs).await?;
            }
            let mut paused = ready.is_empty();
            let mut failed = false;
            for batch in ready.chunks(WALK_STEP) {
                for (id, result) in self.flush_with_blockers(batch.to_vec()).await {
                    match result {
                        Flushed::Done(bytes) => {
                            waiting.remove(&id);
                            report.flushed += 1;
                            report.bytes += bytes;
                        }
                        Flushed::Failed(why) => {
                            failed = true;
                            let f = failures.entry(id).or_insert_with(Failing::new);
                            f.attempts += 1;
                            f.why = why;
                        }
                        Flushed::Blocked(_) => {
                            failed = true;
                            let f = failures.entry(id).or_insert_with(Failing::new);
                            f.blocked += 1;
                            f.why = "its key is busy".into();
                        }
                        Flushed::Skipped => paused = true,
                    }
                }
            }
            let given_up: Vec<InodeId> = failures
                .iter()
                // Not while somebody is at it: that may well end otherwise.
                .filter(|(id, f)| f.is_hopeless() && !self.flushes.is_active(**id))
                .filter(|(id, _)| waiting.contains(id))
                .map(|(id, _)| *id)
                .collect();
            for id in given_up {
                waiting.remove(&id);
                report.remaining += 1;
                if report.failed.len() < FAILED_NAMED {
                    let why = failures.remove(&id).map_or_else(String::new, |f| f.why);
                    report.failed.push((self.path_text(id), why));
                }
            }
            if (paused || failed) && !waiting.is_empty() {
                // Each attempt seals at the cores; what it left there goes by a notice.
                self.wakes.notices.notify_one();
                tokio::time::sleep(pause).await;
                pause = if failed { (pause * 2).min(PAUSE_MAX) } else { PAUSE_MIN };
            }
        }
        Ok(())
    }

    pub(crate) fn path_text(&self, inode: InodeId) -> String {
        let path = self.voter.peek(|_, r| r.path_of(inode));
        match path {
            Ok(Ok(parts)) => {
                parts.iter().map(|p| format!("/{}", String::from_utf8_lossy(p))).collect::<String>()
            }
            _ => format!("inode {inode}"),
        }
    }

    async fn evict(&self, root: InodeId) -> FsResult<()> {
        let map = self.voter.read(|_, r| r.map()).await.map_err(fs_error)??;
        let holders: HashSet<ShardRef> = map.pgs.iter().filter_map(|g| g.primary()).collect();
        let tell = |inodes: Vec<InodeId>| {
            let (map, holders) = (&map, &holders);
            async move {
                let request = Control::EvictClean(inodes);
                for core in holders {
                    self.cores
                        .order(map, *core, &request, TIMEOUT)
                        .await
                        .map_err(|e| FsError::Io(e.to_string()))?;
                }
                Ok::<_, FsError>(())
            }
        };
        if root == InodeId::ROOT {
            return tell(Vec::new()).await;
        }
        let (mut walk, _) = self.voter.peek(|_, r| r.dirty_walk(root)).map_err(fs_error)??;
        tell(vec![root]).await?;
        while !walk.is_done() {
            let step = self
                .voter
                .peek(|_, r| r.inodes_under(&mut walk, BATCH_MAX))
                .map_err(fs_error)??;
            if !step.is_empty() {
                tell(step).await?;
            }
        }
        Ok(())
    }

    async fn warm(self: &Arc<Self>, root: InodeId) -> FsResult<()> {
        self.list_below(root).await?;
        let (mut walk, _) = self.voter.peek(|_, r| r.dirty_walk(root)).map_err(fs_error)??;
        let mut inodes = vec![root];
        loop {
            futures::stream::iter(std::mem::take(&mut inodes))
                .for_each_concurrent(WARM_CONCURRENCY, |inode| async move {
                    if let Err(e) = self.warm_file(inode).await {
                        tracing::debug!(%inode, error = %e, "warming a file");
                    }
                })
                .await;
            if walk.is_done() {
                return Ok(());
            }
            inodes = self
                .voter
                .peek(|_, r| r.inodes_under(&mut walk, WALK_STEP))
                .map_err(fs_error)??;
        }
    }

    async fn warm_file(&self, inode: InodeId) -> FsResult<()> {
        let (attr, grant) = self
            .voter
            .peek(|_, r| -> FsResult<_> { Ok((r.attr(inode)?.0, r.grant_view(inode)?)) })
            .map_err(fs_error)??;
        if attr.kind != FileKind::File {
            return Ok(());
        }
        let map = self.map()?;
        let grant = SignedGrant::sign(&grant, &self.key);
        for run in 0..RunIndex::count_for(attr.size) {
            let run = RunIndex(run);
            let Some(core) = cores::primary_of_run(&map, inode, run) else { continue };
            let end = (run.start() + RUN_BYTES).min(attr.size);
            let request = Control::Warm(grant.clone(), ByteRange { start: run.start(), end });
            self.cores
                .order(&map, core, &request, WARM_TIMEOUT)
                .await
                .map_err(|e| FsError::Io(e.to_string()))?;
        }
        Ok(())
    }

    /// Takes the cluster down as far as one call reaches. Zero remaining: the bucket alone is enough.
    async fn shut_down(self: &Arc<Self>, abandon: bool) -> FsResult<FlushReport> {
        let term = self.voter.leading_term();
        if !self.is_attached().await {
            self.wakes.owner.notify_one();
            return Err(ebb_namespace::again("the new leader has yet to take the bucket"));
        }
        self.submit_internal(Command::SetShutdown(true)).await?;
        if abandon {
            self.put_to_sleep().await?;
            return Ok(FlushReport::default());
        }
        if !self.owns_bucket() && self.counts_now()?.dirty_inodes == 0 {
            // It was put to sleep by an earlier call.
            return Ok(FlushReport::default());
        }
        self.flushes.all.store(true, Ordering::Release);
        let before = self.counts.flushed.load(Ordering::Relaxed);
        let bytes = self.counts.flushed_bytes.load(Ordering::Relaxed);
        let begun = Instant::now();
        let mut stored = None;
        let mut looked: Option<Instant> = None;
        let mut report = loop {
            self.still_leads(term)?;
            let c = self.counts_now()?;
            let rest = c.dirty_inodes + c.pending_keys + c.notices + c.moves;
            let mut left = rest;
            if rest == 0 {
                let since = *stored.get_or_insert_with(Instant::now);
                left = self.lingering()?;
                // The bucket is all that stays, and an unlinked file would be in it: who has one open loses it.
                // Who has, takes a look at every open file.
                if left == 0 || looked.is_none_or(|at| at.elapsed() >= READERS_EVERY) {
                    let readers = self.readers_of_unlinked(since.elapsed() >= LEASE)?;
                    looked = Some(Instant::now());
                    left += readers.len() as u64;
                    if !readers.is_empty() {
                        tracing::info!(?readers, "unlinked files end with who has them open");
                        self.end_sessions(readers).await?;
                    }
                }
            }
            if left == 0 {
                self.put_to_sleep().await?;
                self.flushes.all.store(false, Ordering::Release);
                break FlushReport::default();
            }
            if begun.elapsed() >= SHUTDOWN_SLICE {
                break FlushReport {
                    remaining: left,
                    failed: self.failing()?,
                    ..FlushReport::default()
                };
            }
            self.wakes.flush.notify_one();
            self.wakes.notices.notify_one();
            self.wakes.keys.notify_one();
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        report.flushed = self.counts.flushed.load(Ordering::Relaxed) - before;
        report.bytes = self.counts.flushed_bytes.load(Ordering::Relaxed) - bytes;
        Ok(report)
    }

    /// Dirty inodes that failed, and why.
    fn failing(&self) -> FsResult<Vec<(String, String)>> {
        let everything = ebb_metaplane_protocol::Time(i64::MAX);
        let dirty = self
            .voter
            .peek(|_, r| r.dirty_batch(WALK_STEP, everything, None))
            .map_err(fs_error)??;
        let keys = self.voter.peek(|_, r| r.dangling_keys(FAILED_NAMED)).map_err(fs_error)??;
        let at = crate::raft::propose::now().0;
        let waiting = keys.into_iter().map(|(key, until)| {
            let left = until.0.saturating_sub(at).max(0) / 1_000_000_000;
            let why = format!(
                "a request to S3 whose reply was lost may still arrive; its signature ends in {left} s"
            );
            (key, why)
        });
        Ok(dirty
            .iter()
            .filter_map(|d| Some((self.path_text(d.inode), self.flushes.why(d.inode)?)))
            .take(FAILED_NAMED)
            .chain(waiting)
            .collect())
    }
}
