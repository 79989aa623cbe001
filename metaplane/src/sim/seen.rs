//! What was seen from outside, and what must never be seen: two states after the same commands,
//! an order of operations or a read that contradicts what was known before it began.

use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Default)]
pub(super) struct Seen {
    leaders: BTreeSet<(u64, u64)>,
    /// By the number of commands applied.
    states: BTreeMap<u64, (u64, u64)>,
    /// The latest time of all changes that were answered.
    time: i64,
    /// The most commands that anybody was seen to have applied.
    sequence: u64,
    /// Per client: entries it has begun to make, and made.
    entries: BTreeMap<u64, (u64, u64)>,
}

/// What was known when an operation began.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    time: i64,
    sequence: u64,
    entries: u64,
}

impl Seen {
    /// Whether that is news. (A term may have several leaders, one after another: openraft orders them by their ids.)
    pub(super) fn leads(&mut self, term: u64, id: u64) -> bool {
        self.leaders.insert((term, id))
    }

    pub(super) fn state(&mut self, sequence: u64, digest: u64, id: u64) -> Result<(), String> {
        let (first, by) = *self.states.entry(sequence).or_insert((digest, id));
        if first == digest {
            return Ok(());
        }
        Err(format!("voters {by} and {id} differ after {sequence} commands"))
    }

    /// Somebody has applied so many commands, so they are committed.
    pub(super) fn applied(&mut self, sequence: u64) {
        self.sequence = self.sequence.max(sequence);
    }

    /// At the begin of an operation; `of`: the client whose entries it is about.
    pub(super) fn begin(&self, of: u64) -> Known {
        let entries = self.entries.get(&of).map_or(0, |e| e.1);
        Known { time: self.time, sequence: self.sequence, entries }
    }

    pub(super) fn begins_entry(&mut self, client: u64, number: u64) {
        self.entries.entry(client).or_default().0 = number;
    }

    pub(super) fn made_entry(&mut self, client: u64, number: u64) {
        self.entries.entry(client).or_default().1 = number;
    }

    /// How many entries a client has made.
    pub(super) fn made_by(&self, client: u64) -> u64 {
        self.entries.get(&client).map_or(0, |e| e.1)
    }

    /// Something was made, at a time of the log: not before anything that was made when it began.
    pub(super) fn made(&mut self, known: Known, time: i64) -> Result<(), String> {
        if time < known.time {
            return Err(format!("made at {time} in the log, after {} was known", known.time));
        }
        self.time = self.time.max(time);
        Ok(())
    }

    /// A read saw the state after so many commands, and a client's last entry.
    pub(super) fn read(
        &mut self,
        known: Known,
        of: u64,
        (sequence, entries): (u64, u64),
    ) -> Result<(), String> {
        if sequence < known.sequence {
            let known = known.sequence;
            return Err(format!("a read saw {sequence} commands when {known} were known"));
        }
        self.applied(sequence);
        let begun = self.entries.get(&of).map_or(0, |e| e.0);
        if entries < known.entries || entries > begun {
            return Err(format!(
                "a read saw {entries} entries of client {of}: {} were made, {begun} begun",
                known.entries
            ));
        }
        Ok(())
    }
}
