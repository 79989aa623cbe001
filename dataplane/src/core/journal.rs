//! Drives the store's journal and checkpoint: one batch in flight, one checkpoint step in flight.
//!
//! A batch is everything appended since the last one was taken, so that under load the sync and the
//! journal write are shared by all writes that arrived meanwhile (group commit). Order within a batch:
//! one fdatasync if data went to the device, then the journal write with RWF_DSYNC, then the tickets in
//! order (I1).

use super::kept::Kept;
use super::{Buffer, Command, Pending, Purpose, ShardCore, Token};
use ebb_store::{
    AlignedBuf, BatchId, CheckpointStep, CheckpointToken, JournalBatch, RelocationMove,
};
use std::sync::Arc;

/// Moves read at a time. All of a step at once would have the device busy for milliseconds, and the
/// journal's next batch, which writers wait for, behind them.
const MOVES_READ_MAX: usize = 16;

/// What of the journal or checkpoint is done.
#[derive(Debug)]
pub(crate) enum Step {
    /// The data named by the batch is durable.
    Synced,
    /// The batch is.
    Batch(BatchId),
    /// A step of the checkpoint.
    Checkpoint(CheckpointToken),
    /// A move of it was read.
    MoveRead(MoveTo),
    /// A run of moves was written.
    RunWritten,
    /// All of them are durable.
    MovesSynced(CheckpointToken),
}

/// A move, and where its bytes go in the buffer of its run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MoveTo {
    from: u64,
    bytes: u32,
    run: usize,
    at: usize,
}

/// Moves whose targets lie side by side: they are read one by one, and written as one.
#[derive(Debug)]
struct Run {
    to: u64,
    bytes: AlignedBuf,
    /// Moves not read yet.
    unread: usize,
}

#[derive(Debug, Default)]
pub(crate) struct Driver {
    /// The batch that waits for its sync.
    syncing: Option<JournalBatch>,
    in_flight: bool,
    /// The batch that is durable, whose mutations did not take effect yet.
    written: Option<BatchId>,
    /// What is kept of the batch in flight, once it is durable.
    to_keep: Option<(u64, Arc<AlignedBuf>)>,
    kept: Kept,
    /// Inline data is being moved.
    relocating: bool,
    step: Option<CheckpointToken>,
    /// Runs of the step, until each is written.
    runs: Vec<Option<Run>>,
    unwritten: usize,
    /// Moves whose read was not asked for yet.
    unread: Vec<MoveTo>,
    reading: usize,
}

/// Sorts the moves of a step into runs.
fn in_runs(mut moves: Vec<RelocationMove>) -> (Vec<Option<Run>>, Vec<MoveTo>) {
    moves.sort_unstable_by_key(|m| m.to);
    let mut lengths: Vec<(u64, usize, usize)> = Vec::new();
    let mut parts = Vec::with_capacity(moves.len());
    for m in &moves {
        let new = lengths.last().is_none_or(|(to, len, _)| to + *len as u64 != m.to);
        if new {
            lengths.push((m.to, 0, 0));
        }
        let run = lengths.len() - 1;
        let (_, len, count) = &mut lengths[run];
        parts.push(MoveTo { from: m.from, bytes: m.bytes, run, at: *len });
        *len += m.bytes as usize;
        *count += 1;
    }
    let run = |(to, len, unread)| Some(Run { to, bytes: AlignedBuf::zeroed(len), unread });
    (lengths.into_iter().map(run).collect(), parts)
}

/// Puts a move's bytes into its run; gives the run when it is complete.
fn place(runs: &mut [Option<Run>], m: MoveTo, bytes: &[u8]) -> Option<Run> {
    let slot = runs.get_mut(m.run)?;
    let run = slot.as_mut()?;
    run.bytes[m.at..m.at + bytes.len()].copy_from_slice(bytes);
    run.unread -= 1;
    if run.unread == 0 { slot.take() } else { None }
}

impl<B: Buffer> ShardCore<B> {
    /// A device write ended well. If it was a journal batch, the next one may begin, and is among the commands:
    /// `true`. Carry it out at once, and then tell of the completion itself with [`ShardCore::handle`]: what
    /// the batch brings takes effect while the next one is on its way. Not calling this costs time only.
    pub fn batch_written(&mut self, token: Token) -> bool {
        let Some(Pending::Journal(Step::Batch(id))) = self.pending.get(&token) else {
            return false;
        };
        let id = *id;
        self.next_batch(id) && self.journal.in_flight
    }

    /// The batch is durable; takes the next one. `false`: the journal is of no more use.
    fn next_batch(&mut self, id: BatchId) -> bool {
        if self.store.failed() {
            return false;
        }
        if let Err(e) = self.store.batch_written(id) {
            tracing::error!(error = %e, "the journal lost count");
            self.fail_store("the journal lost count of its batches");
            return false;
        }
        self.journal.in_flight = false;
        self.journal.written = Some(id);
        if let Some((offset, bytes)) = self.journal.to_keep.take() {
            self.journal.kept.keep(offset, bytes);
        }
        self.begin_batch();
        true
    }

    pub(crate) fn drive_journal(&mut self) {
        if self.store.failed() {
            return;
        }
        self.begin_batch();
        self.drive_checkpoint();
    }

    fn begin_batch(&mut self) {
        if !self.journal.in_flight
            && let Some(batch) = self.store.take_batch()
        {
            self.journal.in_flight = true;
            // Taking a batch makes room in the backlog.
            self.retry_waiting = true;
            if batch.sync_data_first {
                self.journal.syncing = Some(batch);
                let token = self.expect(Pending::Journal(Step::Synced));
                self.out.push(Command::Sync { token });
            } else {
                self.write_batch(batch);
            }
        }
    }

    fn write_batch(&mut self, batch: JournalBatch) {
        let JournalBatch { id, offset, inline, .. } = batch;
        let bytes = Arc::new(batch.bytes);
        self.journal.to_keep = inline.then(|| (offset, Arc::clone(&bytes)));
        let token = self.expect(Pending::Journal(Step::Batch(id)));
        self.out.push(Command::WriteMeta { token, offset, bytes, durable: true });
    }

    fn drive_checkpoint(&mut self) {
        if self.store.checkpoint_due() {
            self.store.begin_checkpoint();
        } else if self.journal.kept.wants_moving() {
            self.store.begin_relocation();
        }
        if self.store.is_relocating() && !self.journal.relocating {
            self.journal.relocating = true;
            self.journal.kept.pass_began();
        }
        self.read_moves();
        if self.journal.step.is_some() {
            return;
        }
        let step = self.store.checkpoint_step();
        if self.journal.relocating && !self.store.is_relocating() {
            self.journal.relocating = false;
            self.journal.kept.pass_ended();
        }
        match step {
            CheckpointStep::Idle | CheckpointStep::Wait => {}
            CheckpointStep::Relocate { token, moves } => {
                self.journal.step = Some(token);
                (self.journal.runs, self.journal.unread) = in_runs(moves);
                self.journal.unwritten = self.journal.runs.len();
                if self.journal.unwritten == 0 {
                    self.checkpoint_step_done(token);
                } else {
                    self.read_moves();
                }
            }
            CheckpointStep::Write { token, offset, bytes } => {
                self.journal.step = Some(token);
                let token = self.expect(Pending::Journal(Step::Checkpoint(token)));
                let bytes = Arc::new(bytes);
                self.out.push(Command::WriteMeta { token, offset, bytes, durable: false });
            }
            CheckpointStep::Sync { token } => {
                self.journal.step = Some(token);
                let token = self.expect(Pending::Journal(Step::Checkpoint(token)));
                self.out.push(Command::Sync { token });
            }
            CheckpointStep::WriteDurable { token, offset, bytes } => {
                self.journal.step = Some(token);
                let token = self.expect(Pending::Journal(Step::Checkpoint(token)));
                let bytes = Arc::new(bytes);
                self.out.push(Command::WriteMeta { token, offset, bytes, durable: true });
            }
        }
    }

    fn read_moves(&mut self) {
        while self.journal.reading < MOVES_READ_MAX
            && let Some(m) = self.journal.unread.pop()
        {
            let Driver { kept, runs, .. } = &mut self.journal;
            if let Some(bytes) = kept.get(m.from, m.bytes as usize) {
                if let Some(run) = place(runs, m, bytes) {
                    self.write_run(run);
                }
                continue;
            }
            let Some(buf) = self.buffers.take(m.bytes as usize, Purpose::Flush) else {
                self.journal.unread.push(m);
                return;
            };
            self.journal.reading += 1;
            let token = self.expect(Pending::Journal(Step::MoveRead(m)));
            let range = 0..m.bytes as usize;
            self.out.push(Command::Read { token, offset: m.from, buf, range });
        }
    }

    fn write_run(&mut self, run: Run) {
        let token = self.expect(Pending::Journal(Step::RunWritten));
        let bytes = Arc::new(run.bytes);
        self.out.push(Command::WriteMeta { token, offset: run.to, bytes, durable: false });
    }

    /// A block of a move was read. Its checksum moves with it, so rot is the reader's business; a
    /// device that cannot even be read stops the shard.
    pub(crate) fn journal_read(&mut self, step: Step, buf: B, ok: bool) {
        let Step::MoveRead(m) = step else {
            debug_assert!(false, "only moves read");
            return;
        };
        self.journal.reading -= 1;
        if !ok {
            return self.fail_store("a device read failed during a checkpoint");
        }
        if let Some(run) = place(&mut self.journal.runs, m, &buf.bytes()[..m.bytes as usize]) {
            self.write_run(run);
        }
        drop(buf);
        self.read_moves();
    }

    pub(crate) fn journal_step_done(&mut self, step: Step, ok: bool) {
        if !ok || self.store.failed() {
            return;
        }
        match step {
            Step::Synced => {
                if let Some(batch) = self.journal.syncing.take() {
                    self.write_batch(batch);
                }
            }
            Step::Batch(id) => {
                if self.journal.written != Some(id) && !self.next_batch(id) {
                    return;
                }
                self.journal.written = None;
                match self.store.batch_durable(id) {
                    Ok(tickets) => {
                        debug_assert!(tickets.is_sorted());
                        self.retry_waiting = true;
                        for ticket in tickets {
                            self.ticket_durable(ticket);
                        }
                    }
                    Err(e) => {
                        tracing::error!(error = %e, "the journal lost count");
                        self.fail_store("the journal lost count of its batches");
                    }
                }
            }
            Step::Checkpoint(token) => self.checkpoint_step_done(token),
            Step::RunWritten => {
                self.journal.unwritten -= 1;
                if self.journal.unwritten == 0
                    && let Some(step) = self.journal.step
                {
                    // Here, and not with the batch that records the moves: everybody's writes would wait for it there.
                    let token = self.expect(Pending::Journal(Step::MovesSynced(step)));
                    self.out.push(Command::Sync { token });
                }
            }
            Step::MovesSynced(token) => self.checkpoint_step_done(token),
            Step::MoveRead(_) => debug_assert!(false, "a read is not a write"),
        }
    }

    fn checkpoint_step_done(&mut self, token: CheckpointToken) {
        self.journal.step = None;
        self.retry_waiting = true;
        if let Err(e) = self.store.checkpoint_done(token) {
            tracing::error!(error = %e, "the checkpoint lost count");
            self.fail_store("the checkpoint lost count of its steps");
        }
    }
}
