//! What the log holds, in memory: the id of every entry, where it is on disk, and the newest entries
//! themselves. No I/O.
//!
//! Bounded (I9): ids and places are some 60 bytes an entry and go with every purge; cached entries
//! are limited in bytes, except for those not on disk yet.

use super::super::{Entry, LogId};
use super::frame::Op;
use openraft::EntryPayload;
use std::collections::VecDeque;

/// Where an entry's operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) segment: u64,
    pub(super) offset: u64,
    pub(super) bytes: u32,
}

#[derive(Debug)]
struct Slot {
    log_id: LogId,
    location: Option<Location>,
    cached: Option<Entry>,
}

/// An entry, or where to read it.
#[derive(Debug)]
pub(super) enum Found {
    Cached(Entry),
    OnDisk(LogId, Location),
}

/// The index.
#[derive(Debug)]
pub(super) struct Index {
    slots: VecDeque<Slot>,
    purged: Option<LogId>,
    cache_bytes: usize,
    cache_bytes_max: usize,
    /// Slots before this position hold no cached entry.
    uncached: usize,
}

fn weight(entry: &Entry) -> usize {
    match &entry.payload {
        // The decoded form is about as large as the encoded one.
        EntryPayload::Normal(p) => 256 + p.encoded().len() * 2,
        _ => 256,
    }
}

impl Index {
    pub(super) fn new(cache_bytes_max: usize) -> Self {
        Self { slots: VecDeque::new(), purged: None, cache_bytes: 0, cache_bytes_max, uncached: 0 }
    }

    pub(super) fn purged(&self) -> Option<LogId> {
        self.purged
    }
    pub(super) fn set_purged(&mut self, purged: Option<LogId>) {
        self.purged = purged;
    }
    /// The last entry, or the last purged one.
    pub(super) fn last(&self) -> Option<LogId> {
        self.slots.back().map(|s| s.log_id).or(self.purged)
    }
    fn first_index(&self) -> u64 {
        self.slots.front().map_or(0, |s| s.log_id.index)
    }

    /// Appends an entry; fails on a hole.
    pub(super) fn append(
        &mut self,
        entry: Entry,
        location: Option<Location>,
    ) -> Result<(), String> {
        let index = entry.log_id.index;
        let next = self.last().map_or(0, |id| id.index + 1);
        // A log that begins after a snapshot may start anywhere.
        if !(self.slots.is_empty() && index >= next) && index != next {
            return Err(format!("entry {index} where {next} should be"));
        }
        let log_id = entry.log_id;
        // What is on disk already is read from there when it is wanted.
        let cached = location.is_none().then_some(entry);
        self.cache_bytes += cached.as_ref().map_or(0, weight);
        self.slots.push_back(Slot { log_id, location, cached });
        self.trim();
        Ok(())
    }

    /// Applies an operation found on disk.
    pub(super) fn replay(&mut self, op: Op, location: Location) -> Result<(), String> {
        match op {
            // Entries below a purge that a segment's header already knew of.
            Op::Append(e) if self.purged.is_some_and(|p| e.log_id.index <= p.index) => Ok(()),
            Op::Append(entry) => self.append(entry, Some(location)),
            Op::Truncate(after) => {
                self.truncate_after(after);
                Ok(())
            }
            Op::Purge(through) => {
                self.purge(through);
                Ok(())
            }
        }
    }

    /// Drops the entries after `keep` (`None`: all).
    pub(super) fn truncate_after(&mut self, keep: Option<LogId>) {
        while self.slots.back().is_some_and(|s| keep.is_none_or(|k| s.log_id.index > k.index)) {
            if let Some(slot) = self.slots.pop_back() {
                self.cache_bytes -= slot.cached.as_ref().map_or(0, weight);
            }
        }
        self.uncached = self.uncached.min(self.slots.len());
    }

    /// Drops the entries up to `through`.
    pub(super) fn purge(&mut self, through: LogId) {
        while self.slots.front().is_some_and(|s| s.log_id.index <= through.index) {
            if let Some(slot) = self.slots.pop_front() {
                self.cache_bytes -= slot.cached.as_ref().map_or(0, weight);
                self.uncached = self.uncached.saturating_sub(1);
            }
        }
        if self.purged.is_none_or(|p| p.index < through.index) {
            self.purged = Some(through);
        }
    }

    /// Notes that an entry is on disk.
    pub(super) fn written(&mut self, log_id: &LogId, location: Location) {
        let at = log_id.index.checked_sub(self.first_index());
        let slot = at.and_then(|at| self.slots.get_mut(at as usize));
        if let Some(slot) = slot.filter(|s| s.log_id == *log_id) {
            slot.location = Some(location);
        }
        self.trim();
    }

    fn trim(&mut self) {
        while self.cache_bytes > self.cache_bytes_max {
            let Some(slot) = self.slots.get_mut(self.uncached) else { return };
            if slot.cached.is_some() && slot.location.is_none() {
                return;
            }
            self.cache_bytes -= slot.cached.take().as_ref().map_or(0, weight);
            self.uncached += 1;
        }
    }

    /// The entries of `[start, end)` that are there.
    pub(super) fn range(&self, start: u64, end: u64) -> Vec<Found> {
        let first = self.first_index();
        let from = start.saturating_sub(first).min(self.slots.len() as u64) as usize;
        let to = end.saturating_sub(first).min(self.slots.len() as u64) as usize;
        if from >= to {
            return Vec::new();
        }
        self.slots
            .range(from..to)
            .filter_map(|s| match (&s.cached, s.location) {
                (Some(entry), _) => Some(Found::Cached(entry.clone())),
                (None, Some(location)) => Some(Found::OnDisk(s.log_id, location)),
                // Appends without a place keep their entry (`trim`).
                (None, None) => None,
            })
            .collect()
    }
}
