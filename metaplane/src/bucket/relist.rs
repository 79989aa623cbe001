//! Directories that were listed to their end are listed again when that is a while ago, so that names
//! which others made or removed in the bucket are seen (docs/SEMANTICS.md, close-to-open).
//!
//! Lazily: when somebody reads the directory, or looks for a name that isn't known. What a listing
//! shows is only compared: new names enter as any found name does (names that we removed since stay
//! removed), and a known file that is missing or differs is looked at by a HEAD of its own before
//! anything is believed, so dirty files, and those stored meanwhile, stay as they are. Nothing changed
//! costs no log entry.
//!
//! One at a time per directory, and never more than a twentieth of the time: a directory that takes
//! long to list is listed less often. Who looks for a name meanwhile is answered from what is known, or,
//! when that is old, by a HEAD.

use super::attributes;
use crate::raft::propose::now;
use crate::service::{Service, count, fs_error};
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::flush::{IngestEntry, IngestObject};
use ebb_metaplane_protocol::{Command, FileKind, FsError, FsResult, Time};
use ebb_namespace::LookupState;
use ebb_s3::{ListPage, ListRequest};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Pages of one listing at most; what comes after them is found by name only.
const PAGES_MAX: usize = 1_000;
/// Entries compared in one look at the state.
const STEP: usize = 1_000;
/// Directories remembered; past it the memory starts anew, which costs listings only.
const REMEMBERED_MAX: usize = 100_000;
/// A listing is repeated only after so many times its own duration.
const REST: u32 = 20;

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// When the last listing that ended had begun, and how long it took.
    last: Option<(Instant, Duration)>,
    running: bool,
}

/// When directories were listed last.
#[derive(Debug, Default)]
pub(crate) struct Relistings(Mutex<HashMap<InodeId, Seen>>);

impl Relistings {
    fn update<T>(&self, dir: InodeId, change: impl FnOnce(&mut Seen) -> T) -> T {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= REMEMBERED_MAX && !all.contains_key(&dir) {
            all.retain(|_, seen| seen.running);
        }
        change(all.entry(dir).or_default())
    }
}

/// What to do about the age of a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Age {
    /// It may be answered from.
    Fresh,
    /// Somebody has begun to list again just now, or it is only a little too old.
    Refreshing,
    /// Too old to be answered from.
    Old,
}

impl Service {
    /// How old a completely listed directory's listing is. `true`: the caller lists it again, and must.
    fn age(&self, dir: InodeId) -> (Age, bool) {
        let limit = Duration::from_millis(self.config.timings.relist_ms);
        // Made by mkdir, or listed to its end by whoever led then.
        let listed = match self.voter.peek(|_, r| r.listed(dir)) {
            Ok(Ok(Some(at))) => at,
            _ => return (Age::Fresh, false),
        };
        let since = now().0.saturating_sub(listed.0).max(0).unsigned_abs();
        let known = Duration::from_nanos(since);
        self.relistings.update(dir, |seen| {
            let (age, took) = match seen.last {
                Some((begun, took)) => (begun.elapsed().min(known), took),
                None => (known, Duration::ZERO),
            };
            let pause = limit.max(took * REST);
            if age < pause || !self.health.is_worth_trying() {
                return (Age::Fresh, false);
            }
            let begins = !seen.running;
            seen.running = true;
            let old = begins || age > pause * 2 + took;
            (if old { Age::Old } else { Age::Refreshing }, begins)
        })
    }

    /// Before a directory is read from its start: a listing that is too old is repeated. S3 that takes
    /// long is not waited for; what is known is served.
    pub(crate) async fn relist_for_reader(self: &Arc<Self>, dir: InodeId) {
        if let (_, true) = self.age(dir) {
            let relisting = self.begin_relisting(dir);
            let limit = Duration::from_millis(self.config.timings.revalidate_timeout_ms);
            let _ = tokio::time::timeout(limit, relisting).await;
        }
    }

    /// A name is not in a completely listed directory. `true`: ask S3 for it.
    pub(crate) fn is_absence_old(self: &Arc<Self>, dir: InodeId) -> bool {
        let (age, begins) = self.age(dir);
        if begins {
            drop(self.begin_relisting(dir));
        }
        age == Age::Old
    }

    fn begin_relisting(self: &Arc<Self>, dir: InodeId) -> tokio::task::JoinHandle<()> {
        let service = Arc::clone(self);
        tokio::spawn(async move {
            let begun = Instant::now();
            let result = service.relist(dir).await;
            let took = begun.elapsed();
            service.relistings.update(dir, |seen| {
                seen.running = false;
                if result.is_ok() {
                    seen.last = Some((begun, took));
                }
            });
            if let Err(e) = result {
                tracing::debug!(%dir, error = %e, "listing a directory again");
            }
        })
    }

    /// Lists a directory again and enters what changed.
    async fn relist(&self, dir: InodeId) -> FsResult<()> {
        let begun = now();
        let mut names: HashSet<Vec<u8>> = HashSet::new();
        let mut after: Option<String> = None;
        let mut whole = false;
        for _ in 0..PAGES_MAX {
            let (prefix, listed_at) = self
                .voter
                .peek(|_, r| -> FsResult<_> { Ok((r.directory_origin(dir)?.0, r.sequence()?)) })
                .map_err(fs_error)??;
            count(&self.counts.lists);
            let request = ListRequest {
                prefix: prefix.clone(),
                delimiter: Some("/".into()),
                start_after: after.clone(),
                continuation: None,
                max_keys: Some(super::list::PAGE_KEYS),
            };
            let page = self.health.note(self.bucket.list(&request).await);
            let page = page.map_err(|e| super::fs_error(&e))?;
            let (entries, last) = entries_of(&page, &prefix);
            names.extend(entries.iter().map(|e| e.name.clone()));
            self.enter_changes(dir, listed_at, begun, entries).await?;
            if page.next.is_none() {
                whole = true;
                break;
            }
            after = Some(last);
        }
        if whole { self.look_for_missing(dir, begun, &names).await } else { Ok(()) }
    }

    /// New names of a page, and files whose etag is another.
    async fn enter_changes(
        &self,
        dir: InodeId,
        listed_at: u64,
        begun: Time,
        entries: Vec<IngestEntry>,
    ) -> FsResult<()> {
        let (new, changed) = self
            .voter
            .peek(|_, r| -> FsResult<_> {
                let (mut new, mut changed) = (Vec::new(), Vec::new());
                for e in entries {
                    match r.lookup_state(dir, &e.name) {
                        Ok(LookupState::Found { .. }) => {
                            let Some(inode) = r.holder(dir, &e.name)? else { continue };
                            let known = r.revalidation(inode)?;
                            let differs = e.object.as_ref().zip(known).is_some_and(|(o, k)| {
                                o.key == k.key && o.etag != k.etag && k.validated < begun
                            });
                            if differs {
                                changed.push(inode);
                            }
                        }
                        Ok(_) => new.push(e),
                        // No name for a file system.
                        Err(_) => {}
                    }
                }
                Ok((new, changed))
            })
            .map_err(fs_error)??;
        for inode in changed {
            self.revalidate(inode).await?;
        }
        if new.is_empty() {
            return Ok(());
        }
        let ingest = Command::Ingest { dir, listed_at, entries: new, page: None };
        match self.submit_internal(ingest).await {
            // Overtaken by deletes that are forgotten already: the next listing sees more.
            Err(FsError::Invalid(_)) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Clean files that the listing doesn't show are asked for by name; what is gone goes.
    async fn look_for_missing(
        &self,
        dir: InodeId,
        begun: Time,
        names: &HashSet<Vec<u8>>,
    ) -> FsResult<()> {
        let mut after = Vec::new();
        loop {
            let (missing, last) = self
                .voter
                .peek(|_, r| -> FsResult<_> {
                    let page = r.entries_held(dir, &after, STEP)?;
                    let last = page.last().map(|(name, _)| name.clone());
                    let mut missing = Vec::new();
                    for (name, inode) in page {
                        if names.contains(&name) || r.attr(inode)?.0.kind == FileKind::Directory {
                            continue;
                        }
                        if r.revalidation(inode)?.is_some_and(|k| k.validated < begun) {
                            missing.push(inode);
                        }
                    }
                    Ok((missing, last))
                })
                .map_err(fs_error)??;
            for inode in missing {
                self.revalidate(inode).await?;
            }
            match last {
                Some(last) => after = last,
                None => return Ok(()),
            }
        }
    }
}

/// What a page shows, and its last key.
pub(super) fn entries_of(page: &ListPage, prefix: &str) -> (Vec<IngestEntry>, String) {
    let mut entries = Vec::with_capacity(page.objects.len() + page.prefixes.len());
    let mut last = String::new();
    for object in &page.objects {
        last = last.max(object.key.clone());
        let Some(name) = object.key.strip_prefix(prefix).filter(|n| !n.is_empty()) else {
            continue;
        };
        entries.push(IngestEntry {
            name: name.as_bytes().to_vec(),
            object: Some(IngestObject {
                key: object.key.clone(),
                etag: object.etag.as_str().to_owned(),
                size: object.size,
            }),
            attrs: attributes::of_listed(object),
        });
    }
    for key in &page.prefixes {
        last = last.max(key.clone());
        let Some(name) = key.strip_prefix(prefix).and_then(|n| n.strip_suffix('/')) else {
            continue;
        };
        entries.push(IngestEntry {
            name: name.as_bytes().to_vec(),
            object: None,
            attrs: attributes::of_prefix(false),
        });
    }
    (entries, last)
}
