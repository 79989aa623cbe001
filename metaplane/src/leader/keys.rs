//! Keys: deletes that are due, and attempts whose outcome is in doubt (PROTOCOL §8).
//!
//! A DELETE carries the etag it means, where the server has that. An attempt in doubt is looked for
//! by its nonce; it is given up only after a while, and then a late arrival is fenced by the
//! condition of the next attempt.

use super::Stop;
use super::store::Look;
use crate::bucket::attributes;
use crate::service::{Service, count, fs_error, random};
use ebb_dataplane_protocol::control::PutCondition;
use ebb_metaplane_protocol::flush::{AttemptResult, KeyWork, KeyWorkKind};
use ebb_metaplane_protocol::{Command, CommandReply, FsResult};
use ebb_namespace::FlushStage;
use ebb_s3::{ErrorKind, Etag};
use futures::StreamExt;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// Keys of one page.
const PAGE: usize = 1_000;
/// Calls in flight at most.
const CONCURRENCY: usize = 32;
/// A lost mutation is waited for so long where no condition fences it.
const UNFENCED_WAIT: Duration = Duration::from_secs(60);
/// Keys remembered as failing or in doubt.
const REMEMBERED_MAX: usize = 100_000;

/// What the worker remembers between rounds.
#[derive(Default)]
struct Memory {
    /// Deletes that failed: when to try again.
    later: HashMap<String, Instant>,
    /// Attempts in doubt: since when.
    doubts: HashMap<u128, Instant>,
}

impl Service {
    /// What a new leader does before anything else: attempts that its predecessor began are in
    /// doubt, seals that it began are given up.
    pub(crate) async fn recover(&self) -> FsResult<()> {
        let mut after: Option<String> = None;
        loop {
            let from = after.clone();
            let work = self
                .voter
                .peek(|_, r| r.key_work(from.as_deref(), PAGE, true))
                .map_err(fs_error)??;
            let Some(last) = work.last() else { break };
            after = Some(last.key.clone());
            for w in work {
                let KeyWorkKind::Resolve { nonces, .. } = w.kind else { continue };
                for nonce in nonces {
                    let (key, result) = (w.key.clone(), AttemptResult::Ambiguous);
                    self.submit(Command::KeyDone { key, nonce, result }).await?;
                }
            }
        }
        let mut after = None;
        loop {
            let flushes =
                self.voter.peek(|_, r| r.flushes_in_progress(PAGE, after)).map_err(fs_error)??;
            let Some(last) = flushes.last() else { return Ok(()) };
            after = Some((last.since, last.inode));
            let sealing = flushes.iter().filter(|d| matches!(d.stage, FlushStage::Sealing(_)));
            let inodes: Vec<_> = sealing.map(|d| d.inode).collect();
            if !inodes.is_empty() {
                self.submit(Command::FlushAbort(inodes)).await?;
            }
        }
    }

    /// The loop of a leader.
    pub(crate) async fn run_keys(&self, stop: Stop) {
        let tick = self.config.timings.tick();
        let mut memory = Memory::default();
        while !stop.wait(&self.wakes.keys, tick).await {
            if !self.owns_bucket() {
                continue;
            }
            if let Err(e) = self.work_keys(&stop, &mut memory).await {
                tracing::debug!(error = %e, "working on keys");
            }
        }
    }

    async fn work_keys(&self, stop: &Stop, memory: &mut Memory) -> FsResult<()> {
        let mut after: Option<String> = None;
        let now = Instant::now();
        memory.later.retain(|_, at| *at > now);
        if memory.doubts.len() > REMEMBERED_MAX {
            memory.doubts.clear();
        }
        while !stop.is_set() {
            let from = after.clone();
            let work = self
                .voter
                .peek(|_, r| r.key_work(from.as_deref(), PAGE, false))
                .map_err(fs_error)??;
            let Some(last) = work.last() else { return Ok(()) };
            after = Some(last.key.clone());
            let work: Vec<KeyWork> =
                work.into_iter().filter(|w| !memory.later.contains_key(&w.key)).collect();
            self.delete_keys(&work, memory).await?;
            self.resolve_keys(work, memory).await?;
        }
        Ok(())
    }

    async fn delete_keys(&self, work: &[KeyWork], memory: &mut Memory) -> FsResult<()> {
        let due: Vec<(String, u128)> = work
            .iter()
            .filter(|w| w.kind == KeyWorkKind::Delete)
            .map(|w| (w.key.clone(), random()))
            .collect();
        if due.is_empty() {
            return Ok(());
        }
        let nonces: HashMap<String, u128> = due.iter().cloned().collect();
        let reply = self.submit_internal(Command::KeyBegin(due)).await?;
        let CommandReply::Keys(begun) = reply else { return Ok(()) };
        let begun: HashSet<String> = begun.into_iter().collect();
        let begun: Vec<KeyWork> = work.iter().filter(|w| begun.contains(&w.key)).cloned().collect();
        let mut deletes = futures::stream::iter(begun)
            .map(|w| async move {
                let result = self.delete_key(&w).await;
                (w, result)
            })
            .buffer_unordered(CONCURRENCY);
        while let Some((w, result)) = deletes.next().await {
            let Some(&nonce) = nonces.get(&w.key) else { continue };
            match &result {
                AttemptResult::Deleted => count(&self.counts.keys_deleted),
                AttemptResult::Failed(why) => {
                    tracing::debug!(key = w.key, error = why, "a delete failed");
                    let pause = self.config.timings.tick() * 2;
                    memory.later.insert(w.key.clone(), Instant::now() + pause);
                }
                _ => {}
            }
            let key = w.key.clone();
            self.voter.submit(Command::KeyDone { key, nonce, result }).await.map_err(fs_error)?;
        }
        // What waited for these keys may go on.
        self.wakes.flush.notify_one();
        Ok(())
    }

    async fn delete_key(&self, w: &KeyWork) -> AttemptResult {
        let expected = match &w.condition {
            PutCondition::IfMatch(etag) => Some(Etag::new(etag)),
            _ => None,
        };
        let honoured = self.conditions().delete_if_match;
        if !honoured || expected.is_none() {
            // Without the condition: a look before, and a short window that a stranger may hit.
            match self.look_delete(&w.key, expected.as_ref()).await {
                Ok(AttemptResult::Failed(_)) => {}
                Ok(settled) => return settled,
                Err(e) => return AttemptResult::Failed(e.to_string()),
            }
        }
        let condition = expected.as_ref().filter(|_| honoured);
        match self.health.note(self.bucket.delete(&w.key, condition).await) {
            Ok(()) => AttemptResult::Deleted,
            Err(e) => match e.kind {
                ErrorKind::PreconditionFailed | ErrorKind::Conflict | ErrorKind::Ambiguous => {
                    let looked = self.look_delete(&w.key, expected.as_ref()).await;
                    looked.unwrap_or(AttemptResult::Ambiguous)
                }
                _ => AttemptResult::Failed(e.to_string()),
            },
        }
    }

    /// What became of a delete. `Failed`: the object is still there, as it was.
    async fn look_delete(&self, key: &str, expected: Option<&Etag>) -> FsResult<AttemptResult> {
        let found = self.head(key).await.map_err(|e| crate::bucket::fs_error(&e))?;
        let Some(info) = found else { return Ok(AttemptResult::Deleted) };
        if expected.is_none_or(|e| *e == info.etag) {
            return Ok(AttemptResult::Failed("the object is still there".into()));
        }
        if self.is_left_over(&info) {
            let condition = self.conditions().delete_if_match.then_some(&info.etag);
            let deleted = self.bucket.delete(key, condition).await;
            return Ok(match deleted {
                Ok(()) => AttemptResult::Deleted,
                Err(e) => AttemptResult::Failed(e.to_string()),
            });
        }
        Ok(AttemptResult::Foreign(attributes::foreign(&self.bucket, key, &info).await?))
    }

    async fn resolve_keys(&self, work: Vec<KeyWork>, memory: &mut Memory) -> FsResult<()> {
        let doubts: Vec<KeyWork> =
            work.into_iter().filter(|w| w.kind != KeyWorkKind::Delete).collect();
        let mut looks = futures::stream::iter(doubts)
            .map(|w| async move {
                let result = self.resolve(&w).await;
                (w, result)
            })
            .buffer_unordered(CONCURRENCY);
        while let Some((w, result)) = looks.next().await {
            let KeyWorkKind::Resolve { nonces, .. } = &w.kind else { continue };
            let Some(&nonce) = nonces.last() else { continue };
            let result = match result {
                Ok(result) => result,
                Err(e) => {
                    tracing::debug!(key = w.key, error = %e, "looking an attempt up");
                    continue;
                }
            };
            let result = if result == AttemptResult::Ambiguous {
                // Nothing of ours is there, but it may be on its way.
                let since = *memory.doubts.entry(nonce).or_insert_with(Instant::now);
                if since.elapsed() < self.doubt_wait(&w.condition) {
                    continue;
                }
                self.given_up.add(nonces);
                AttemptResult::Failed("it never arrived".into())
            } else {
                result
            };
            memory.doubts.remove(&nonce);
            let key = w.key.clone();
            self.voter.submit(Command::KeyDone { key, nonce, result }).await.map_err(fs_error)?;
            self.wakes.flush.notify_one();
        }
        Ok(())
    }

    /// How long an attempt that is not there is waited for.
    fn doubt_wait(&self, condition: &PutCondition) -> Duration {
        let c = self.conditions();
        let fenced = match condition {
            PutCondition::None => false,
            PutCondition::IfAbsent => c.put_if_absent && c.complete_if_absent && c.copy_if_absent,
            PutCondition::IfMatch(_) => c.put_if_match && c.complete_if_match && c.copy_if_match,
        };
        if fenced {
            Duration::from_millis(self.config.timings.resolve_after_ms)
        } else {
            UNFENCED_WAIT
        }
    }

    async fn resolve(&self, w: &KeyWork) -> FsResult<AttemptResult> {
        let KeyWorkKind::Resolve { nonces, inode, length, .. } = &w.kind else {
            return Ok(AttemptResult::Ambiguous);
        };
        if inode.is_none() {
            let expected = match &w.condition {
                PutCondition::IfMatch(etag) => Some(Etag::new(etag)),
                _ => None,
            };
            return self.look_delete(&w.key, expected.as_ref()).await;
        }
        let look =
            Look { key: &w.key, nonces, length: *length, condition: &w.condition, definite: false };
        self.look(&look).await
    }
}
