//! Who writes the segment files: a thread that takes whatever is queued, writes it as one frame, syncs
//! once, then tells everybody whose bytes were in it (group commit). Where nothing is queued and
//! nobody else would be kept waiting, the caller does the same itself (`mod.rs`).
//!
//! The first I/O error poisons the log: nothing after it is acknowledged, since what the device
//! holds is no longer known.

use super::super::disk::Disk;
use super::super::{LogId, TypeConfig, Vote};
use super::frame::{self, FRAME_HEADER_BYTES, Op, OpSpan, SEGMENT_HEADER_BYTES, SegmentHeader};
use super::index::{Index, Location};
use super::recovery::Tail;
use super::{segment, vote};
use openraft::storage::IOFlushed;
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::oneshot;

/// A frame takes no more jobs once it holds this many bytes.
const FRAME_BYTES_SOFT: usize = 4 << 20;

/// Work for the thread, in order.
pub(super) enum Job {
    /// Entries, encoded.
    Append { payload: Vec<u8>, entries: Vec<(LogId, OpSpan)>, flushed: IOFlushed<TypeConfig> },
    /// Drop the entries after.
    Truncate { after: Option<LogId>, done: oneshot::Sender<io::Result<()>> },
    /// Drop the entries up to, then the files that hold nothing else.
    Purge { through: LogId },
    /// Save the vote.
    Vote { vote: Vote, done: oneshot::Sender<io::Result<()>> },
    /// Answer when everything before is stable.
    Barrier { done: oneshot::Sender<io::Result<()>> },
    /// End, and answer when no thread of the log touches its files any more.
    Close { done: oneshot::Sender<io::Result<()>> },
}

/// What to tell when a frame is stable.
enum Waiter {
    Flushed(IOFlushed<TypeConfig>),
    Done(oneshot::Sender<io::Result<()>>),
}

pub(super) struct Writer {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) dir: PathBuf,
    pub(super) segment_bytes: u64,
    pub(super) tail: Tail,
    pub(super) index: Arc<Mutex<Index>>,
    pub(super) spare: Option<JoinHandle<io::Result<()>>>,
    pub(super) broken: Option<String>,
}

#[derive(Default)]
struct Batch {
    payload: Vec<u8>,
    ops: u32,
    entries: Vec<(LogId, OpSpan)>,
    waiters: Vec<Waiter>,
    purge: Option<LogId>,
    vote: Option<(Vote, oneshot::Sender<io::Result<()>>)>,
    close: Option<oneshot::Sender<io::Result<()>>>,
}

impl Batch {
    /// Takes a job; a vote ends the batch, because it lies outside of the frame.
    fn take(&mut self, job: Job) {
        match job {
            Job::Append { payload, entries, flushed } => {
                let base = self.payload.len();
                self.ops += entries.len() as u32;
                self.payload.extend_from_slice(&payload);
                self.entries.extend(
                    entries
                        .into_iter()
                        .map(|(id, s)| (id, OpSpan { offset: base + s.offset, ..s })),
                );
                self.waiters.push(Waiter::Flushed(flushed));
            }
            Job::Truncate { after, done } => {
                frame::encode_op(&Op::Truncate(after), &mut self.payload);
                self.ops += 1;
                self.waiters.push(Waiter::Done(done));
            }
            Job::Purge { through } => {
                frame::encode_op(&Op::Purge(through), &mut self.payload);
                self.ops += 1;
                self.purge = self.purge.max(Some(through));
            }
            Job::Vote { vote, done } => self.vote = Some((vote, done)),
            Job::Barrier { done } => self.waiters.push(Waiter::Done(done)),
            Job::Close { done } => self.close = Some(done),
        }
    }

    fn is_full(&self) -> bool {
        self.vote.is_some() || self.close.is_some() || self.payload.len() >= FRAME_BYTES_SOFT
    }
}

/// Runs until every sender is gone. `outstanding` counts the jobs that were sent and not finished.
pub(super) fn run(writer: &Mutex<Writer>, outstanding: &AtomicUsize, jobs: &Receiver<Job>) {
    while let Ok(job) = jobs.recv() {
        if turn(writer, outstanding, job, || jobs.try_recv().ok()).is_break() {
            return;
        }
    }
    writer.lock().unwrap_or_else(PoisonError::into_inner).join_spare();
}

/// The same as a task, for a disk that never blocks.
pub(super) async fn run_timed(
    writer: Arc<Mutex<Writer>>,
    outstanding: Arc<AtomicUsize>,
    mut jobs: UnboundedReceiver<Job>,
) {
    let disk = Arc::clone(&writer.lock().unwrap_or_else(PoisonError::into_inner).disk);
    while let Some(job) = jobs.recv().await {
        tokio::time::sleep(disk.takes().unwrap_or_default()).await;
        if turn(&writer, &outstanding, job, || jobs.try_recv().ok()).is_break() {
            return;
        }
    }
}

/// Does a job and what else is queued. Breaks when the log is closed.
fn turn(
    writer: &Mutex<Writer>,
    outstanding: &AtomicUsize,
    first: Job,
    mut next: impl FnMut() -> Option<Job>,
) -> ControlFlow<()> {
    let mut taken = 1;
    let mut batch = Batch::default();
    batch.take(first);
    while !batch.is_full() {
        let Some(job) = next() else { break };
        batch.take(job);
        taken += 1;
    }
    let close = batch.close.take();
    let mut held = writer.lock().unwrap_or_else(PoisonError::into_inner);
    held.finish(batch);
    if let Some(done) = close {
        held.join_spare();
        held.broken.get_or_insert_with(|| "the Raft log is closed".to_owned());
        drop(done.send(Ok(())));
        return ControlFlow::Break(());
    }
    drop(held);
    outstanding.fetch_sub(taken, Ordering::AcqRel);
    ControlFlow::Continue(())
}

impl Writer {
    /// Does a job at once. Nothing may be queued.
    pub(super) fn now(&mut self, job: Job) {
        let mut batch = Batch::default();
        batch.take(job);
        self.finish(batch);
    }

    fn join_spare(&mut self) {
        if let Some(spare) = self.spare.take() {
            // One that could not be made ahead is made when it is needed.
            let _ = spare.join();
        }
    }

    fn finish(&mut self, batch: Batch) {
        let result = match &self.broken {
            Some(why) => Err(why.clone()),
            None => self.write(&batch).map_err(|e| format!("writing the Raft log: {e}")),
        };
        if let Err(why) = &result
            && self.broken.is_none()
        {
            tracing::error!(error = %why, "the Raft log failed; this node stops taking entries");
            self.broken = Some(why.clone());
        }
        let answer = || result.clone().map_err(io::Error::other);
        for waiter in batch.waiters {
            match waiter {
                Waiter::Flushed(flushed) => flushed.io_completed(answer()),
                // A caller that went away needs no answer.
                Waiter::Done(done) => drop(done.send(answer())),
            }
        }
        if let Some((vote, done)) = batch.vote {
            let saved = answer().and_then(|()| vote::save(&*self.disk, &self.dir, &vote));
            if let Err(e) = &saved {
                self.broken.get_or_insert_with(|| format!("saving the vote: {e}"));
            }
            drop(done.send(saved));
        }
    }

    fn write(&mut self, batch: &Batch) -> io::Result<()> {
        if batch.ops == 0 {
            return Ok(());
        }
        let bytes = frame::frame_bytes(batch.payload.len()) as u64;
        let empty = self.tail.file.at() == SEGMENT_HEADER_BYTES as u64;
        if self.tail.file.at() + bytes > self.segment_bytes && !empty {
            self.rotate()?;
        }
        let encoded =
            frame::encode_frame(self.tail.number, self.tail.sequence, batch.ops, &batch.payload);
        let base = self.tail.file.at() + FRAME_HEADER_BYTES as u64;
        self.tail.file.append(&encoded)?;
        self.tail.sequence += 1;
        {
            let mut index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
            for (log_id, span) in &batch.entries {
                let location = Location {
                    segment: self.tail.number,
                    offset: base + span.offset as u64,
                    bytes: span.bytes as u32,
                };
                index.written(log_id, location);
                self.tail.last_index = self.tail.last_index.max(log_id.index);
            }
        }
        if let Some(through) = batch.purge {
            self.drop_older(through.index)?;
        }
        self.keep_spare();
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.join_spare();
        let purged = self.index.lock().unwrap_or_else(PoisonError::into_inner).purged();
        let header = SegmentHeader {
            number: self.tail.number + 1,
            first_sequence: self.tail.sequence,
            purged,
        };
        let file = segment::create(&*self.disk, &self.dir, &header, self.segment_bytes)?;
        self.tail.older.push((self.tail.number, self.tail.last_index));
        self.tail.file = file;
        self.tail.number = header.number;
        self.tail.last_index = 0;
        Ok(())
    }

    /// Removes older segments, oldest first, that hold no entry past `purged`.
    fn drop_older(&mut self, purged: u64) -> io::Result<()> {
        let count = self.tail.older.iter().take_while(|(_, last)| *last <= purged).count();
        for (number, _) in self.tail.older.drain(..count) {
            segment::remove(&*self.disk, &self.dir, number)?;
        }
        if count > 0 { self.disk.sync_dir(&self.dir) } else { Ok(()) }
    }

    /// Has the next segment filled by another thread once this one is half full.
    fn keep_spare(&mut self) {
        let may_block = self.disk.takes().is_none();
        if may_block && self.spare.is_none() && self.tail.file.at() * 2 > self.segment_bytes {
            let (disk, dir, bytes) = (self.disk.clone(), self.dir.clone(), self.segment_bytes);
            let prepare = move || segment::prepare_spare(&*disk, &dir, bytes);
            self.spare = Some(std::thread::spawn(prepare));
        }
    }
}
