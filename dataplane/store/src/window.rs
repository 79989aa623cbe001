//! Session windows: which writes were applied, under which tag and in which group (R19, R27, I7).
//!
//! A window answers a repeated write instead of applying it again, with the tag it was taken under. Its entries go when
//! the session says that they were answered, and move with their placement group. It does not bound itself: writes
//! are refused at `WINDOW_MAX` (`write.rs`), what moves here is taken over whatever the count, since the sum over all cores stays.

use crate::error::ControlError;
use crate::index::{ChunkKey, Index};
use crate::record::Record;
use crate::store::Store;
use crate::types::{Seen, Ticket, WINDOW_PAGE};
use ebb_dataplane_protocol::control::WindowEntry;
use ebb_dataplane_protocol::{ChunkIndex, Generation, InodeId, PgEpoch, PgId, Sequence, SessionId};

/// A write that was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Applied {
    pub(crate) sequence: u64,
    /// The tag it was taken under: whoever asks again credits its end to this one (R15).
    pub(crate) generation: Generation,
    /// Where it goes if the group does.
    pub(crate) pg: PgId,
    /// What it changed.
    pub(crate) inode: InodeId,
    pub(crate) chunk: ChunkIndex,
}

/// Applied writes of a session.
#[derive(Clone, Debug, Default)]
pub(crate) struct Window {
    pub(crate) below: Sequence,
    /// Ascending, all >= `below`.
    pub(crate) applied: Vec<Applied>,
    pub(crate) captured: u64,
    /// Journal sequence of the last use.
    pub(crate) used: u64,
}

impl Applied {
    fn of(e: &WindowEntry, pg: PgId) -> Self {
        let (sequence, generation) = (e.sequence.0, e.generation);
        Self { sequence, generation, pg, inode: e.inode, chunk: e.chunk }
    }
    pub(crate) fn entry(&self, session: SessionId, below: Sequence) -> WindowEntry {
        WindowEntry {
            session,
            below,
            sequence: Sequence(self.sequence),
            generation: self.generation,
            inode: self.inode,
            chunk: self.chunk,
        }
    }
}

impl Window {
    pub(crate) fn seen(&self, sequence: Sequence) -> Seen {
        if sequence < self.below {
            return Seen::Answered;
        }
        match self.applied.binary_search_by_key(&sequence.0, |a| a.sequence) {
            Ok(i) => Seen::Applied(self.applied[i].generation),
            Err(_) => Seen::New,
        }
    }
    /// The first word stays: a write is applied once.
    pub(crate) fn add(&mut self, a: Applied) {
        if a.sequence < self.below.0 {
            return;
        }
        if let Err(i) = self.applied.binary_search_by_key(&a.sequence, |a| a.sequence) {
            self.applied.insert(i, a);
        }
    }
    pub(crate) fn trim(&mut self, below: Sequence) {
        self.below = self.below.max(below);
        let answered = self.applied.partition_point(|a| a.sequence < self.below.0);
        self.applied.drain(..answered);
    }
}

impl Index {
    /// Entries that another core handed over.
    pub(crate) fn take_windows(
        &mut self,
        pg: PgId,
        epoch: PgEpoch,
        entries: &[WindowEntry],
        journal: u64,
    ) {
        if let Some(pg) = self.pgs.get_mut(usize::from(pg.0)) {
            pg.taken = pg.taken.max(epoch);
        }
        for e in entries {
            self.session_mut(e.session, |w| {
                w.trim(e.below);
                w.add(Applied::of(e, pg));
                w.used = journal;
            });
        }
    }

    /// The entries of a chunk become those that another core has of it.
    pub(crate) fn replace_windows_of(
        &mut self,
        key: ChunkKey,
        entries: &[WindowEntry],
        journal: u64,
    ) {
        let pg = self.pg_of(key);
        let of_chunk = |a: &Applied| (a.inode, a.chunk) == key;
        let with = |w: &Window| w.applied.iter().any(of_chunk);
        let sessions: Vec<SessionId> =
            self.sessions.iter().filter(|(_, w)| with(w)).map(|(id, _)| *id).collect();
        for id in sessions {
            self.session_mut(id, |w| w.applied.retain(|a| !of_chunk(a)));
        }
        for e in entries {
            self.session_mut(e.session, |w| {
                w.trim(e.below);
                w.add(Applied::of(e, pg));
                w.used = journal;
            });
        }
    }

    /// The group is others' as of `epoch`: they have its entries (R27). Those of a later epoch came after that.
    pub(crate) fn drop_windows(&mut self, pg: PgId, epoch: PgEpoch) {
        if self.pgs.get(usize::from(pg.0)).is_none_or(|pg| pg.taken >= epoch) {
            return;
        }
        let with = |w: &Window| w.applied.iter().any(|a| a.pg == pg);
        let sessions: Vec<SessionId> =
            self.sessions.iter().filter(|(_, w)| with(w)).map(|(id, _)| *id).collect();
        for id in sessions {
            self.session_mut(id, |w| w.applied.retain(|a| a.pg != pg));
        }
    }
}

impl Store {
    /// What is known (durable) of a write. Asked before floors and views: a write that was applied is answered, whatever
    /// came after it (R19).
    pub fn seen(&self, session: SessionId, sequence: Sequence) -> Seen {
        self.index.sessions.get(&session).map_or(Seen::New, |w| w.seen(sequence))
    }

    /// The session raised its mark without writing: forget applied sequences below. Lazy.
    pub fn trim_session(
        &mut self,
        session: SessionId,
        below: Sequence,
    ) -> Result<Option<Ticket>, ControlError> {
        if self.index.sessions.get(&session).is_none_or(|w| w.below >= below) {
            return Ok(None);
        }
        self.control(Record::SessionTrim { session, below }, false, |_| {}).map(Some)
    }

    /// The session ended (its inodes are fenced): forget its window. Lazy.
    pub fn drop_session(&mut self, session: SessionId) -> Result<Option<Ticket>, ControlError> {
        if !self.index.sessions.contains_key(&session) {
            return Ok(None);
        }
        self.control(Record::SessionDrop { session }, false, |_| {}).map(Some)
    }

    /// A page of the windows of a group that is frozen in this epoch, durably: what it says is final, since nothing of the
    /// group is applied any more. Sorted by (session, sequence), from past `after` on; fewer than [`WINDOW_PAGE`] end it.
    pub fn windows(
        &self,
        pg: PgId,
        epoch: PgEpoch,
        after: Option<(SessionId, Sequence)>,
    ) -> Result<Vec<WindowEntry>, ControlError> {
        if self.index.frozen(pg) != Some(epoch) || self.frozen(pg) != Some(epoch) {
            return Err(ControlError::NotFrozen { pg, epoch });
        }
        let from = after.map_or(SessionId(0), |a| a.0);
        let entries = self.index.sessions.range(from..).flat_map(|(id, w)| {
            w.applied.iter().filter(|a| a.pg == pg).map(|a| a.entry(*id, w.below))
        });
        let past = |e: &WindowEntry| after.is_none_or(|a| (e.session, e.sequence) > a);
        Ok(entries.filter(past).take(WINDOW_PAGE).collect())
    }

    /// Takes over entries of a group that comes here in `epoch`, before it does. At most [`WINDOW_PAGE`] of
    /// them. A release of an older epoch leaves them alone, however late it comes.
    pub fn take_windows(
        &mut self,
        pg: PgId,
        epoch: PgEpoch,
        entries: &[WindowEntry],
    ) -> Result<Option<Ticket>, ControlError> {
        let group = self.index.pgs.get(usize::from(pg.0)).filter(|_| entries.len() <= WINDOW_PAGE);
        let Some(group) = group else {
            return Err(ControlError::Malformed("no such group, or more entries than a page has"));
        };
        if group.taken >= epoch
            && entries.iter().all(|e| self.seen(e.session, e.sequence) != Seen::New)
        {
            return Ok(None);
        }
        let bytes = (entries.len()
            * (crate::capture::APPLIED_BYTES + crate::capture::SESSION_BYTES))
            as u64;
        if self.index.counters.encoded + self.reserved_index + bytes
            > self.index_bytes_max() / 4 * 3
        {
            return Err(ControlError::NoRoom);
        }
        let record = Record::Windows { pg, epoch, entries: entries.to_vec() };
        self.control(record, true, |_| {}).map(Some)
    }
}
