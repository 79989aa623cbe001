//! `ebb fsck` of the namespace, on the leader: a check runs beside everything else over the state of one moment,
//! and whoever asked is told of findings as they come.
//!
//! Bounded (I9): one check at a time, findings that are not fetched are only counted past a limit, and a check
//! that nobody asks for any more ends. Repairs are ordinary commands.

use crate::raft::kv::Moment;
use crate::service::{Service, fs_error};
use ebb_dataplane_protocol::control::{Control, ControlReply};
use ebb_dataplane_protocol::{PgId, ShardRef};
use ebb_metaplane_protocol::check::{BATCH_MAX, CheckProgress, Finding, Stray, Strays};
use ebb_metaplane_protocol::{FsError, FsResult};
use ebb_namespace::{Check, Reader};
use futures::StreamExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Findings that wait to be fetched.
const WAITING_MAX: usize = 10 * BATCH_MAX;
/// A check that was not asked for so long ends.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30);
/// An answer waits so long for news.
const NEWS_WAIT: Duration = Duration::from_secs(1);
/// Cores asked at once, and the limit of one answer.
const CORES_AT_ONCE: usize = 64;
const CORE_TIMEOUT: Duration = Duration::from_secs(5);

/// The check under way, or the last one.
#[derive(Default)]
pub(crate) struct Checks(Mutex<Option<Arc<Running>>>);

impl Checks {
    fn current(&self) -> MutexGuard<'_, Option<Arc<Running>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Running {
    number: u64,
    state: Mutex<State>,
    news: Notify,
}

struct State {
    progress: CheckProgress,
    asked: Instant,
    failed: Option<String>,
}

impl Running {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_over(&self) -> bool {
        let state = self.state();
        state.progress.done || state.asked.elapsed() > FORGOTTEN_AFTER
    }

    /// Looks at everything. Blocks on disk.
    fn work(&self, moment: &Moment) {
        let view = moment.view();
        let (mut check, mut found) = (Check::new(), Vec::new());
        loop {
            let step = check.step(Reader(&view), &mut |f: Finding| found.push(f));
            let step = match (step, view.check()) {
                (Ok(more), Ok(())) => Ok(more),
                (Err(e), _) => Err(e.to_string()),
                (_, Err(e)) => Err(e.to_string()),
            };
            let mut state = self.state();
            let room = WAITING_MAX.saturating_sub(state.progress.findings.len()).min(found.len());
            state.progress.unnamed += (found.len() - room) as u64;
            state.progress.findings.extend(found.drain(..).take(room));
            state.progress.checked = check.checked();
            let over = match step {
                Ok(more) => !more,
                Err(why) => {
                    state.failed = Some(why);
                    true
                }
            };
            state.progress.done |= over;
            drop(state);
            if over || self.is_over() {
                self.news.notify_waiters();
                return;
            }
        }
    }
}

impl Service {
    /// Begins a check, or says how far it is.
    pub(super) async fn check(&self, check: Option<u64>) -> FsResult<CheckProgress> {
        let running = match check {
            None => self.begin_check().await?,
            Some(number) => {
                let running = self.checks.current().clone().filter(|r| r.number == number);
                running.ok_or_else(|| {
                    FsError::Invalid(
                        "that check ended, with its leader or unasked: check again".into(),
                    )
                })?
            }
        };
        let news = running.news.notified();
        tokio::pin!(news);
        news.as_mut().enable();
        if !running.state().progress.done {
            // The end is news; the rest can wait for its second.
            drop(tokio::time::timeout(NEWS_WAIT, news).await);
        }
        let mut state = running.state();
        state.asked = Instant::now();
        if let Some(why) = &state.failed {
            return Err(FsError::Io(format!("the check failed: {why}")));
        }
        let rest = state.progress.findings.len().min(BATCH_MAX);
        let rest = state.progress.findings.split_off(rest);
        let findings = std::mem::replace(&mut state.progress.findings, rest);
        let done = state.progress.done && state.progress.findings.is_empty();
        Ok(CheckProgress { findings, done, ..state.progress.clone_without_findings() })
    }

    async fn begin_check(&self) -> FsResult<Arc<Running>> {
        // What was answered before this call is in what is checked.
        let inodes =
            self.voter.read(|_, r| r.counts().map(|c| c.inodes)).await.map_err(fs_error)??;
        let moment = self.voter.moment().await.map_err(fs_error)?;
        let mut current = self.checks.current();
        if current.as_ref().is_some_and(|r| !r.is_over()) {
            return Err(FsError::Again {
                retry_after_ms: 1_000,
                why: "another check is under way".into(),
            });
        }
        let number = current.as_ref().map_or(1, |r| r.number + 1);
        // An inode, its name, and its object's owner.
        let progress = CheckProgress { check: number, records: inodes * 3, ..Default::default() };
        let state = Mutex::new(State { progress, asked: Instant::now(), failed: None });
        let running = Arc::new(Running { number, state, news: Notify::new() });
        *current = Some(Arc::clone(&running));
        let works = Arc::clone(&running);
        tokio::task::spawn_blocking(move || works.work(&moment));
        Ok(running)
    }

    /// Compares what is dirty on the nodes with what the namespace says (I2).
    pub(super) async fn strays(&self) -> FsResult<Strays> {
        let map = self.voter.read(|_, r| r.map()).await.map_err(fs_error)??;
        let mut held: Vec<(ShardRef, PgId)> = Vec::new();
        for (pg, entry) in map.pgs.iter().enumerate() {
            held.extend(entry.members.iter().map(|m| (*m, PgId(pg as u16))));
        }
        let map = &map;
        let ask = |(core, pg): (ShardRef, PgId)| async move {
            (core, pg, self.cores.call(map, core, &Control::PgStatus(pg), CORE_TIMEOUT).await)
        };
        let answers = futures::stream::iter(held.into_iter().map(ask));
        let mut answers = answers.buffer_unordered(CORES_AT_ONCE);
        let mut found = Strays::default();
        while let Some((core, pg, answer)) = answers.next().await {
            let holding = match answer {
                Ok(ControlReply::Pg(holding)) => holding,
                Ok(other) => {
                    found.silent.push(format!("core {}.{}: {other:?}", core.node, core.core));
                    continue;
                }
                Err(e) => {
                    found.silent.push(e.to_string());
                    continue;
                }
            };
            found.compared += holding.dirty_inodes.len() as u64;
            // After the core said so: a grant was committed before any write under it (I2).
            let strays = self.voter.peek(|_, r| -> FsResult<Vec<Stray>> {
                let mut strays = Vec::new();
                for inode in holding.dirty_inodes {
                    if !r.may_hold(pg, inode)? {
                        let known = r.attr(inode).is_ok();
                        strays.push(Stray { core, pg, inode, known });
                    }
                }
                Ok(strays)
            });
            found.strays.extend(strays.map_err(fs_error)??);
        }
        found.strays.sort();
        found.strays.truncate(BATCH_MAX);
        found.silent.sort();
        found.silent.dedup();
        Ok(found)
    }
}
