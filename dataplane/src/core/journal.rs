//! Drives the store's journal and checkpoint: one batch in flight, one checkpoint step in flight.
//!
//! A batch is everything appended since the last one was taken, so that under load the sync and the
//! journal write are shared by all writes that arrived meanwhile (group commit). Order within a batch:
//! one fdatasync if data went to the device, then the journal write with RWF_DSYNC, then the tickets in
//! order (I1).

use super::{Buffer, Command, Pending, Purpose, ShardCore};
use ebb_store::{AlignedBuf, BatchId, CheckpointStep, CheckpointToken, RelocationMove};
use std::sync::Arc;

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
    MoveRead(RelocationMove),
    /// And written.
    MoveWritten,
}

#[derive(Debug, Default)]
pub(crate) struct Driver {
    /// The batch that waits for its sync.
    syncing: Option<(BatchId, u64, AlignedBuf)>,
    in_flight: bool,
    step: Option<CheckpointToken>,
    /// Moves of the step that are not done.
    moves: usize,
    /// Moves without a buffer yet.
    unread: Vec<RelocationMove>,
}

impl<B: Buffer> ShardCore<B> {
    pub(crate) fn drive_journal(&mut self) {
        if self.store.failed() {
            return;
        }
        if !self.journal.in_flight
            && let Some(batch) = self.store.take_batch()
        {
            self.journal.in_flight = true;
            // Taking a batch makes room in the backlog.
            self.retry_waiting = true;
            if batch.sync_data_first {
                self.journal.syncing = Some((batch.id, batch.offset, batch.bytes));
                let token = self.expect(Pending::Journal(Step::Synced));
                self.out.push(Command::Sync { token });
            } else {
                self.write_batch(batch.id, batch.offset, batch.bytes);
            }
        }
        self.drive_checkpoint();
    }

    fn write_batch(&mut self, id: BatchId, offset: u64, bytes: AlignedBuf) {
        let token = self.expect(Pending::Journal(Step::Batch(id)));
        self.out.push(Command::WriteMeta { token, offset, bytes, durable: true });
    }

    fn drive_checkpoint(&mut self) {
        if self.store.checkpoint_due() {
            self.store.begin_checkpoint();
        }
        self.read_moves();
        if self.journal.step.is_some() {
            return;
        }
        match self.store.checkpoint_step() {
            CheckpointStep::Idle | CheckpointStep::Wait => {}
            CheckpointStep::Relocate { token, moves } => {
                self.journal.step = Some(token);
                self.journal.moves = moves.len();
                self.journal.unread = moves;
                if self.journal.moves == 0 {
                    self.checkpoint_step_done(token);
                } else {
                    self.read_moves();
                }
            }
            CheckpointStep::Write { token, offset, bytes } => {
                self.journal.step = Some(token);
                let token = self.expect(Pending::Journal(Step::Checkpoint(token)));
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
                self.out.push(Command::WriteMeta { token, offset, bytes, durable: true });
            }
        }
    }

    fn read_moves(&mut self) {
        while let Some(m) = self.journal.unread.pop() {
            let Some(buf) = self.buffers.take(m.bytes as usize, Purpose::Flush) else {
                self.journal.unread.push(m);
                return;
            };
            let token = self.expect(Pending::Journal(Step::MoveRead(m)));
            let range = 0..m.bytes as usize;
            self.out.push(Command::Read { token, offset: m.from, buf, range });
        }
    }

    /// A block of a move was read. Its checksum moves with it, so rot is the reader's business; a
    /// device that cannot even be read stops the shard.
    pub(crate) fn journal_read(&mut self, step: Step, buf: B, ok: bool) {
        let Step::MoveRead(m) = step else {
            debug_assert!(false, "only moves read");
            return;
        };
        if !ok {
            return self.fail_store("a device read failed during a checkpoint");
        }
        let token = self.expect(Pending::Journal(Step::MoveWritten));
        let range = 0..m.bytes as usize;
        self.out.push(Command::Write { token, offset: m.to, buf: Arc::new(buf), range });
    }

    pub(crate) fn journal_step_done(&mut self, step: Step, ok: bool) {
        if !ok || self.store.failed() {
            return;
        }
        match step {
            Step::Synced => {
                if let Some((id, offset, bytes)) = self.journal.syncing.take() {
                    self.write_batch(id, offset, bytes);
                }
            }
            Step::Batch(id) => {
                self.journal.in_flight = false;
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
            Step::MoveWritten => {
                self.journal.moves -= 1;
                if self.journal.moves == 0
                    && let Some(token) = self.journal.step
                {
                    self.checkpoint_step_done(token);
                }
            }
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
