//! The checkpoint, step by step (docs/FORMAT.md §6): relocate live inline data, save the index to the
//! inactive area, sync, rewrite the four superblocks one after another, and only then give the journal
//! space back. The store works on between the steps.

use crate::error::CompletionError;
use crate::extent::{Run, normalise, subtract};
use crate::index::ChunkKey;
use crate::journal::{Position, Share};
use crate::record::{MOVES_MAX, Move, Record};
use crate::store::{Deferred, Store};
use crate::superblock::Superblock;
use crate::types::*;
use std::collections::{BTreeMap, BTreeSet};

/// Blocks copied per relocation step (1 MiB).
const RELOCATE_BLOCKS: u32 = 256;

/// How far a checkpoint is.
#[derive(Debug)]
pub(crate) enum Checkpoint {
    Idle,
    /// Live inline data below `until` is being moved to slots.
    Relocating {
        until: u64,
        step: Relocation,
        /// The index is saved afterwards; else that was all.
        then_save: bool,
    },
    /// The index is being written.
    Saving(Saving),
    /// Everything is written, the sync is next or in flight.
    Syncing {
        saving: Saving,
        in_flight: Option<CheckpointToken>,
    },
    /// Copy `copy` of the superblock is next or in flight.
    Superblocks {
        saving: Saving,
        copy: usize,
        in_flight: Option<CheckpointToken>,
    },
}

#[derive(Debug)]
pub(crate) enum Relocation {
    Next,
    Copying {
        token: CheckpointToken,
        moves: BTreeMap<ChunkKey, Vec<Move>>,
    },
    /// Until the record of the moves is durable.
    Recorded(Ticket),
}

#[derive(Clone, Debug)]
pub(crate) struct Saving {
    until: u64,
    replay: Position,
    number: u64,
    written: u64,
    in_flight: Option<CheckpointToken>,
}

impl Store {
    /// Whether a checkpoint should be started (the journal is half full).
    pub fn checkpoint_due(&self) -> bool {
        matches!(self.checkpoint, Checkpoint::Idle)
            && !self.failed
            && self.journal.used_pages() > self.journal.pages / 2
    }

    /// Starts one, unless one runs.
    pub fn begin_checkpoint(&mut self) {
        if matches!(self.checkpoint, Checkpoint::Idle) && !self.failed {
            let until = self.journal.applied.at;
            self.checkpoint =
                Checkpoint::Relocating { until, step: Relocation::Next, then_save: true };
        }
    }

    /// Moves the live inline data of the journal to slots, as a checkpoint does first, and saves nothing.
    /// The steps are the checkpoint's. Nothing happens while a checkpoint or another such pass runs.
    pub fn begin_relocation(&mut self) {
        if matches!(self.checkpoint, Checkpoint::Idle) && !self.failed {
            let until = self.journal.applied.at;
            self.checkpoint =
                Checkpoint::Relocating { until, step: Relocation::Next, then_save: false };
        }
    }

    /// Whether inline data is being moved.
    pub fn is_relocating(&self) -> bool {
        matches!(self.checkpoint, Checkpoint::Relocating { .. })
    }

    /// Bytes of one checkpoint write, 4 KiB to 1 MiB (the default): what a checkpoint adds to a turn.
    pub fn set_checkpoint_write_bytes(&mut self, bytes: usize) {
        self.index.pages_per_write = (bytes / BLOCK).clamp(1, crate::capture::PAGES_PER_WRITE);
    }

    fn token(&mut self) -> CheckpointToken {
        self.next_id += 1;
        CheckpointToken(self.next_id - 1)
    }

    /// The next step. Call again after each `checkpoint_done` and, on `Wait`, after `batch_durable` or
    /// `release`.
    pub fn checkpoint_step(&mut self) -> CheckpointStep {
        if self.failed {
            return CheckpointStep::Wait;
        }
        match std::mem::replace(&mut self.checkpoint, Checkpoint::Idle) {
            Checkpoint::Idle => CheckpointStep::Idle,
            Checkpoint::Relocating { until, step, then_save } => {
                self.relocate(until, step, then_save)
            }
            Checkpoint::Saving(saving) => self.save(saving),
            Checkpoint::Syncing { saving, in_flight: None } => {
                let token = self.token();
                self.checkpoint = Checkpoint::Syncing { saving, in_flight: Some(token) };
                CheckpointStep::Sync { token }
            }
            Checkpoint::Superblocks { saving, copy, in_flight: None } => {
                let token = self.token();
                let bytes = self.next_superblock(&saving).encode();
                let offset = self.geometry.superblock_offsets()[copy];
                self.checkpoint = Checkpoint::Superblocks { saving, copy, in_flight: Some(token) };
                CheckpointStep::WriteDurable { token, offset, bytes }
            }
            busy => {
                self.checkpoint = busy;
                CheckpointStep::Wait
            }
        }
    }

    fn relocate(&mut self, until: u64, step: Relocation, then_save: bool) -> CheckpointStep {
        let wait = |s: &mut Self, step| {
            s.checkpoint = Checkpoint::Relocating { until, step, then_save };
            CheckpointStep::Wait
        };
        match step {
            Relocation::Recorded(t) if t > self.durable => {
                return wait(self, Relocation::Recorded(t));
            }
            Relocation::Copying { .. } => return wait(self, step),
            Relocation::Next | Relocation::Recorded(_) => {}
        }
        if !self.journal.has_room(Share::Internal, 2) {
            return wait(self, Relocation::Next);
        }
        let Some(moves) = self.plan_moves(until) else {
            // Idle already.
            return if then_save { self.begin_saving(until) } else { CheckpointStep::Idle };
        };
        if moves.is_empty() {
            return wait(self, Relocation::Next);
        }
        let token = self.token();
        let list = moves
            .values()
            .flatten()
            .map(|m| RelocationMove {
                from: u64::from(m.from) * BLOCK as u64,
                to: u64::from(m.to) * BLOCK as u64,
                bytes: m.blocks * BLOCK as u32,
            })
            .collect();
        let step = Relocation::Copying { token, moves };
        self.checkpoint = Checkpoint::Relocating { until, step, then_save };
        CheckpointStep::Relocate { token, moves: list }
    }

    /// Moves for the next step; `None`: nothing below `until` is live any more.
    fn plan_moves(&mut self, until: u64) -> Option<BTreeMap<ChunkKey, Vec<Move>>> {
        let ranges = self.journal.blocks_between(self.journal.tail, until);
        let live = ranges.iter().flat_map(|r| self.index.inline.range(r.clone()));
        let keys: BTreeSet<ChunkKey> =
            live.take(RELOCATE_BLOCKS as usize).map(|(_, key)| *key).collect();
        if keys.is_empty() {
            return None;
        }
        let window: Vec<Run> = {
            let mut w: Vec<Run> =
                ranges.iter().map(|r| Run { start: r.start, blocks: r.end - r.start }).collect();
            normalise(&mut w);
            w
        };
        let mut out = BTreeMap::new();
        let mut left = RELOCATE_BLOCKS;
        for key in keys {
            if left == 0 {
                break;
            }
            // In the chunk's order, so that neighbours become one extent at their new place.
            let mut sources: Vec<Run> = Vec::new();
            let mut known: Vec<Run> = Vec::new();
            let chunk = self.index.chunks.get(&key)?;
            let current = chunk.extents.0.len();
            for (i, e) in chunk.all_extents().enumerate() {
                if crate::extent::total(&sources) >= left {
                    break;
                }
                if i >= current {
                    // Pins share blocks with the current list and with each other.
                    known.clone_from(&sources);
                    normalise(&mut known);
                }
                let outside = subtract(&[e.run()], &window);
                for r in subtract(&[e.run()], &outside) {
                    sources.extend(subtract(&[r], &known));
                }
            }
            let n = crate::extent::total(&sources).min(left);
            if n == 0 {
                continue;
            }
            let Some(targets) = self.alloc.alloc(n) else {
                // Each live inline block has its claim (`available`): this is a bug, not a full disk.
                debug_assert!(false, "relocation found no space");
                break;
            };
            left -= n;
            out.insert(key, pair_up(&sources, &targets));
        }
        Some(out)
    }

    fn begin_saving(&mut self, until: u64) -> CheckpointStep {
        if self.index.counters.encoded > self.index_bytes_max() {
            // Too many pins at once: flushes must finish first. Writers wait for the journal meanwhile.
            let step = Relocation::Next;
            self.checkpoint = Checkpoint::Relocating { until, step, then_save: true };
            return CheckpointStep::Wait;
        }
        let number = self.number + 1;
        self.index.begin_capture(number, self.identity.store);
        let replay = self.journal.applied;
        self.save(Saving { until, replay, number, written: 0, in_flight: None })
    }

    fn save(&mut self, mut saving: Saving) -> CheckpointStep {
        if saving.in_flight.is_some() {
            self.checkpoint = Checkpoint::Saving(saving);
            return CheckpointStep::Wait;
        }
        let Some(bytes) = self.index.capture_next() else {
            self.index.capture = None;
            self.checkpoint = Checkpoint::Syncing { saving, in_flight: None };
            return self.checkpoint_step();
        };
        let token = self.token();
        let start = self.geometry.checkpoint_start((saving.number % 2) as usize);
        let offset = start + saving.written;
        saving.written += bytes.len() as u64;
        assert!(
            saving.written <= self.geometry.checkpoint_bytes,
            "the index is bounded by its area"
        );
        saving.in_flight = Some(token);
        self.checkpoint = Checkpoint::Saving(saving);
        CheckpointStep::Write { token, offset, bytes }
    }

    fn next_superblock(&self, saving: &Saving) -> Superblock {
        Superblock {
            geometry: self.geometry,
            identity: self.identity(),
            number: saving.number,
            checkpoint_bytes: saving.written,
            replay_page: (saving.replay.at % u64::from(self.journal.pages)) as u32,
            live_pages: (saving.replay.at - saving.until) as u32,
            replay_sequence: saving.replay.sequence,
            replay_previous: saving.replay.previous,
        }
    }

    /// The step's I/O completed.
    pub fn checkpoint_done(&mut self, token: CheckpointToken) -> Result<(), CompletionError> {
        let unknown = Err(CompletionError::Checkpoint(token));
        match std::mem::replace(&mut self.checkpoint, Checkpoint::Idle) {
            Checkpoint::Relocating {
                until,
                step: Relocation::Copying { token: t, moves },
                then_save,
            } if t == token => {
                let mut last = self.durable;
                for ((inode, chunk), moves) in moves {
                    for moves in moves.chunks(MOVES_MAX) {
                        let record = Record::Relocate { inode, chunk, moves: moves.to_vec() };
                        last = self.journal.append(record, Vec::new(), true, false);
                    }
                }
                let step = Relocation::Recorded(last);
                self.checkpoint = Checkpoint::Relocating { until, step, then_save };
            }
            Checkpoint::Saving(mut saving) if saving.in_flight == Some(token) => {
                saving.in_flight = None;
                self.checkpoint = Checkpoint::Saving(saving);
            }
            Checkpoint::Syncing { saving, in_flight } if in_flight == Some(token) => {
                self.checkpoint = Checkpoint::Superblocks { saving, copy: 0, in_flight: None };
            }
            Checkpoint::Superblocks { saving, copy, in_flight } if in_flight == Some(token) => {
                if copy + 1 < self.geometry.superblock_offsets().len() {
                    self.checkpoint =
                        Checkpoint::Superblocks { saving, copy: copy + 1, in_flight: None };
                } else {
                    self.number = saving.number;
                    self.checkpoints += 1;
                    // Readers may still be in the old part of the ring.
                    self.deferred.push_back((self.next_id, Deferred::JournalTo(saving.until)));
                    self.drain_deferred();
                }
            }
            other => {
                self.checkpoint = other;
                return unknown;
            }
        }
        Ok(())
    }
}

/// Splits sources and targets into moves of equal runs, in order.
fn pair_up(sources: &[Run], targets: &[Run]) -> Vec<Move> {
    let mut out = Vec::new();
    let mut sources = sources.iter().copied();
    let mut source = sources.next();
    for target in targets {
        let (mut to, mut need) = (target.start, target.blocks);
        while need > 0 {
            let Some(s) = source.as_mut() else { return out };
            let n = need.min(s.blocks);
            out.push(Move { from: s.start, to, blocks: n });
            (to, need) = (to + n, need - n);
            (s.start, s.blocks) = (s.start + n, s.blocks - n);
            if s.blocks == 0 {
                source = sources.next();
            }
        }
    }
    out
}
