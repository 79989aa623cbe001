//! Keys: deletes that are due, and attempts whose outcome is in doubt (PROTOCOL §8).
//!
//! A DELETE carries the etag it means, where the server has that. An attempt in doubt is looked for
//! by its nonce, and given up if it isn't there; from then until its signature has lapsed the state
//! machine sees to it that a late arrival does no harm (R33), and asks for one more look after that
//! (R32). Where no condition fences it, it isn't given up before.

use super::Stop;
use super::store::{Look, is_fenced};
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
                .peek(|_, r| r.key_work(from.as_deref(), PAGE, true, crate::raft::propose::now()))
                .map_err(fs_error)??;
            let Some(last) = work.last() else { break };
            after = Some(last.key.clone());
            for w in work {
                let KeyWorkKind::Resolve { nonces, .. } = w.kind else { continue };
                for nonce in nonces {
                    self.doubt(nonce).await?;
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

    /// The reply to a mutation was lost: until it is found to have landed, it may do so later.
    pub(crate) async fn doubt(&self, nonce: u128) -> FsResult<()> {
        let valid_ms = self.config.timings.request_valid_ms;
        self.submit(Command::KeyDoubt { nonce, valid_ms }).await.map(drop)
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
                .peek(|_, r| r.key_work(from.as_deref(), PAGE, false, crate::raft::propose::now()))
                .map_err(fs_error)??;
            let Some(last) = work.last() else { return Ok(()) };
            after = Some(last.key.clone());
            let work: Vec<KeyWork> =
                work.into_iter().filter(|w| !memory.later.contains_key(&w.key)).collect();
            self.delete_keys(&work, memory).await?;
            self.look_again(&work).await?;
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
            let (result, lost) = result;
            if lost {
                self.doubt(nonce).await?;
            }
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

    /// Last looks (R32) at keys whose lost requests can't land any more.
    async fn look_again(&self, work: &[KeyWork]) -> FsResult<()> {
        let due: Vec<(String, u128)> = work
            .iter()
            .filter(|w| w.kind == KeyWorkKind::Look)
            .map(|w| (w.key.clone(), random()))
            .collect();
        if due.is_empty() {
            return Ok(());
        }
        let nonces: HashMap<String, u128> = due.iter().cloned().collect();
        let reply = self.submit_internal(Command::LookBegin(due)).await?;
        let CommandReply::Keys(begun) = reply else { return Ok(()) };
        let mut looks = futures::stream::iter(begun)
            .map(|key| async move {
                let result = match self.head(&key).await {
                    Ok(Some(info)) => match self.left_over(&key, &info) {
                        Ok(found) => found.map_or(AttemptResult::Deleted, AttemptResult::LeftOver),
                        Err(e) => AttemptResult::Failed(e.to_string()),
                    },
                    Ok(None) => AttemptResult::Deleted,
                    Err(e) => AttemptResult::Failed(e.to_string()),
                };
                (key, result)
            })
            .buffer_unordered(CONCURRENCY);
        while let Some((key, result)) = looks.next().await {
            let Some(&nonce) = nonces.get(&key) else { continue };
            self.submit(Command::KeyDone { key, nonce, result }).await?;
            self.wakes.flush.notify_one();
        }
        Ok(())
    }

    /// What became of a delete, and whether its reply was lost.
    async fn delete_key(&self, w: &KeyWork) -> (AttemptResult, bool) {
        let expected = match &w.condition {
            PutCondition::IfMatch(etag) => Some(Etag::new(etag)),
            _ => None,
        };
        let honoured = self.conditions().delete_if_match;
        if !honoured || expected.is_none() {
            // Without the condition: a look before, and a short window that a stranger may hit.
            match self.look_delete(&w.key, expected.as_ref()).await {
                Ok(AttemptResult::Failed(_)) => {}
                Ok(settled) => return (settled, false),
                Err(e) => return (AttemptResult::Failed(e.to_string()), false),
            }
        }
        let condition = expected.as_ref().filter(|_| honoured);
        match self.health.note(self.bucket.delete(&w.key, condition).await) {
            Ok(()) => (AttemptResult::Deleted, false),
            Err(e) => match e.kind {
                ErrorKind::Ambiguous if !honoured => (AttemptResult::Ambiguous, true),
                ErrorKind::PreconditionFailed | ErrorKind::Conflict | ErrorKind::Ambiguous => {
                    let looked = self.look_delete(&w.key, expected.as_ref()).await;
                    let lost = e.kind == ErrorKind::Ambiguous;
                    (looked.unwrap_or(AttemptResult::Ambiguous), lost)
                }
                _ => (AttemptResult::Failed(e.to_string()), false),
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
        if let Some(found) = self.left_over(key, &info)? {
            return Ok(AttemptResult::LeftOver(found));
        }
        Ok(AttemptResult::Foreign(attributes::foreign(&self.bucket, key, &info).await?))
    }

    async fn resolve_keys(&self, work: Vec<KeyWork>, memory: &mut Memory) -> FsResult<()> {
        let doubts: Vec<KeyWork> =
            work.into_iter().filter(|w| matches!(w.kind, KeyWorkKind::Resolve { .. })).collect();
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
            let since = *memory.doubts.entry(nonce).or_insert_with(Instant::now);
            let fenced = is_fenced(&self.conditions(), &w);
            let landed = matches!(result, AttemptResult::Stored { .. });
            if !fenced && !landed && since.elapsed() < self.request_valid() {
                // Whenever it arrives, it will take effect.
                continue;
            }
            let result = if result == AttemptResult::Ambiguous {
                // Nothing of ours is there, but it may be on its way.
                let wait = Duration::from_millis(self.config.timings.resolve_after_ms);
                if since.elapsed() < wait {
                    continue;
                }
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

    fn request_valid(&self) -> Duration {
        Duration::from_millis(self.config.timings.request_valid_ms)
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
