//! The Raft log: append-only segments with checksummed frames, one sync for all that is queued.
//!
//! Appending returns at once and the entries are readable; a thread of its own writes and syncs them
//! and then completes openraft's callback, so that the sync is off the core's path. Votes and log
//! writes go through that same thread, in order. I1: nothing is acknowledged before it is stable;
//! recovery stops at a torn tail and refuses damage before it.

mod appender;
mod frame;
pub mod hostile;
mod index;
mod recovery;
mod segment;
mod vote;
mod writer;

use super::disk::Disk;
use super::{Entry, LogId, TypeConfig, Vote};
use index::{Found, Index};
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use writer::{Job, Writer};

/// Appends an entry's bytes, in the log's own form.
pub(super) fn encode_entry(entry: &Entry, into: &mut Vec<u8>) {
    frame::encode_op(&frame::Op::Append(entry.clone()), into);
}

/// Reads an entry at the start of `bytes`; says how many it took.
pub(super) fn decode_entry(bytes: &[u8]) -> Result<(Entry, usize), String> {
    match frame::decode_op(bytes) {
        Ok((frame::Op::Append(entry), taken)) => Ok((entry, taken)),
        Ok(_) => Err("not an entry".to_owned()),
        Err(e) => Err(e.to_string()),
    }
}

/// Sizes of the log.
#[derive(Clone, Debug)]
pub struct LogOptions {
    /// Bytes of a segment file; a frame larger than that gets one of its own.
    pub segment_bytes: u64,
    /// Bytes of entries kept in memory (those not yet on disk come on top).
    pub cache_bytes_max: usize,
    /// Requests in progress in this process. While there is at most one, an append is written by its
    /// caller: handing it to the thread and back costs as much as the device. `None`: never.
    pub load: Option<Arc<AtomicUsize>>,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { segment_bytes: 16 << 20, cache_bytes_max: 32 << 20, load: None }
    }
}

fn ended() -> io::Error {
    io::Error::other("the Raft log's thread has ended")
}

/// Entries one replication read returns at most, in bytes of their cached form.
const READ_ENTRIES_MAX: u64 = 512;

/// The way to whoever writes.
#[derive(Clone)]
enum Jobs {
    Thread(Sender<Job>),
    Task(UnboundedSender<Job>),
}

impl Jobs {
    /// `false`: it has ended.
    fn send(&self, job: Job) -> bool {
        match self {
            Self::Thread(jobs) => jobs.send(job).is_ok(),
            Self::Task(jobs) => jobs.send(job).is_ok(),
        }
    }
}

/// The log. Clones share it.
#[derive(Clone)]
pub struct LogStore {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    index: Arc<Mutex<Index>>,
    vote: Arc<Mutex<Option<Vote>>>,
    jobs: Jobs,
    writer: Arc<Mutex<Writer>>,
    /// Jobs sent to the thread and not finished.
    outstanding: Arc<AtomicUsize>,
    load: Option<Arc<AtomicUsize>>,
}

impl LogStore {
    /// Opens the log of a directory, or starts one. Blocks on disk.
    pub fn open(disk: &Arc<dyn Disk>, dir: &Path, options: LogOptions) -> io::Result<Self> {
        disk.create_dirs(dir)?;
        let mut index = Index::new(options.cache_bytes_max);
        let tail = match recovery::recover(&**disk, dir, &mut index)? {
            Some(tail) => tail,
            None => {
                let header = frame::SegmentHeader { number: 1, first_sequence: 1, purged: None };
                recovery::Tail {
                    file: segment::create(&**disk, dir, &header, options.segment_bytes)?,
                    number: header.number,
                    sequence: header.first_sequence,
                    older: Vec::new(),
                    last_index: 0,
                }
            }
        };
        let vote = vote::load(&**disk, dir)?;
        let index = Arc::new(Mutex::new(index));
        let writer = Writer {
            disk: Arc::clone(disk),
            dir: dir.to_owned(),
            segment_bytes: options.segment_bytes,
            tail,
            index: Arc::clone(&index),
            spare: None,
            broken: None,
        };
        let writer = Arc::new(Mutex::new(writer));
        let outstanding = Arc::new(AtomicUsize::new(0));
        let (own, count) = (Arc::clone(&writer), Arc::clone(&outstanding));
        let jobs = if disk.takes().is_some() {
            let (jobs, queue) = unbounded_channel();
            tokio::spawn(writer::run_timed(own, count, queue));
            Jobs::Task(jobs)
        } else {
            let (jobs, queue) = channel();
            std::thread::Builder::new()
                .name("raft-log".into())
                .spawn(move || writer::run(&own, &count, &queue))?;
            Jobs::Thread(jobs)
        };
        let vote = Arc::new(Mutex::new(vote));
        let dir = dir.to_owned();
        let (disk, load) = (Arc::clone(disk), options.load);
        Ok(Self { disk, dir, index, vote, jobs, writer, outstanding, load })
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, job: Job) -> io::Result<()> {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
        if self.jobs.send(job) { Ok(()) } else { Err(ended()) }
    }

    async fn wait(
        &self,
        job: impl FnOnce(oneshot::Sender<io::Result<()>>) -> Job,
    ) -> io::Result<()> {
        let (done, stable) = oneshot::channel();
        self.send(job(done))?;
        stable.await.map_err(|_| ended())?
    }

    /// Waits until everything appended so far is stable.
    pub async fn flush(&self) -> io::Result<()> {
        self.wait(|done| Job::Barrier { done }).await
    }

    /// Its last entry, or the last that was purged.
    pub fn last(&self) -> Option<LogId> {
        self.index().last()
    }

    /// Whether a vote is stable: for whom it voted, or by whom it was led.
    pub fn has_voted(&self) -> bool {
        self.vote.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Ends the log's threads; nothing touches its files after this returns.
    pub async fn close(&self) -> io::Result<()> {
        self.wait(|done| Job::Close { done }).await
    }

    fn read(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let found = self.index().range(start, end);
        found
            .into_iter()
            .map(|f| match f {
                Found::Cached(entry) => Ok(entry),
                Found::OnDisk(id, location) => {
                    recovery::read_entry(&*self.disk, &self.dir, &location, &id)
                }
            })
            .collect()
    }
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let start = match range.start_bound() {
            Bound::Included(&i) => i,
            Bound::Excluded(&i) => i.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&i) => i.saturating_add(1),
            Bound::Excluded(&i) => i,
            Bound::Unbounded => u64::MAX,
        };
        self.read(start, end)
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(*self.vote.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry>, io::Error> {
        self.read(start, end.min(start.saturating_add(READ_ENTRIES_MAX)))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let index = self.index();
        Ok(LogState { last_purged_log_id: index.purged(), last_log_id: index.last() })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let vote = *vote;
        self.wait(|done| Job::Vote { vote, done }).await?;
        *self.vote.lock().unwrap_or_else(PoisonError::into_inner) = Some(vote);
        Ok(())
    }

    async fn append<I>(
        &mut self,
        entries: I,
        flushed: IOFlushed<TypeConfig>,
    ) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut payload = Vec::new();
        let mut spans = Vec::new();
        {
            let mut index = self.index();
            for entry in entries {
                let op = frame::Op::Append(entry);
                let span = frame::encode_op(&op, &mut payload);
                if let frame::Op::Append(entry) = op {
                    spans.push((entry.log_id, span));
                    index
                        .append(entry, None)
                        .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
                }
            }
        }
        let job = Job::Append { payload, entries: spans, flushed };
        let alone = self.load.as_ref().is_some_and(|l| l.load(Ordering::Relaxed) <= 1);
        // Only openraft's core calls this, so nothing is queued between the look and the write.
        if alone && self.outstanding.load(Ordering::Acquire) == 0 {
            self.writer.lock().unwrap_or_else(PoisonError::into_inner).now(job);
            return Ok(());
        }
        self.send(job)
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        self.index().truncate_after(last_log_id);
        self.wait(|done| Job::Truncate { after: last_log_id, done }).await
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        // Need not be stable before it returns: a purge that is lost only leaves more log.
        self.index().purge(log_id);
        self.send(Job::Purge { through: log_id })
    }
}

#[cfg(test)]
mod tests;
