//! `ebb fsck` of the namespace: every record of a consistent state against the rules that tie the tables
//! together ([`ebb_metaplane_protocol::check::Rule`]), and what mends those that don't hold.
//!
//! A check reads each table once, in order, and looks the other side of each tie up: memory is bounded
//! (I9), whatever the size of the state. It trusts nothing: a record that can't be read is a finding like
//! any other. Repairs go through the log ([`repair`]): the state may have moved on since.
//!
//! Does not look at S3 (that is revalidation's and listings' work), nor at nodes.

mod derived;
mod inodes;
mod repair;
mod ties;

use crate::Reader;
use crate::counters::Counter;
use crate::kv::KvRead;
use crate::tables::*;
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::FsResult;
use ebb_metaplane_protocol::check::{Checked, Finding, Repair, Rule};
use std::collections::{BTreeMap, BTreeSet};

/// Records read at once.
const PAGE: usize = 1_000;
/// Cuts with a notice that are remembered; with more of them that rule isn't looked at.
const CUTS_REMEMBERED_MAX: usize = 1 << 20;

/// Tables, in the order in which they are looked at.
const TABLES: [u8; 29] = [
    NOTICE,
    MAP,
    INODE,
    ENTRY,
    LINK,
    JOIN,
    DIRTY,
    SESSION,
    CLIENT,
    REPLY,
    HANDLE,
    SESSION_HANDLE,
    OPEN,
    BORROWER,
    LINGERING,
    SESSION_LOCK,
    LOCK,
    XATTR,
    OWNER,
    KEY,
    ATTEMPT,
    TOMBSTONE,
    TOMBSTONE_AGE,
    MOVE,
    NODE_BOOT,
    HELD,
    ABANDONED,
    WINDOW,
    META,
];

/// A check under way: [`Check::step`] until it says that it is over.
#[derive(Debug, Default)]
pub struct Check {
    table: usize,
    after: Option<Vec<u8>>,
    checked: Checked,
    /// What counters should say.
    counts: BTreeMap<u8, i64>,
    /// Numbers given out, by the counter that gives them.
    numbers: BTreeMap<u8, u64>,
    /// Inodes with a cut that a notice brings to the primaries; `None`: too many.
    cut: Option<BTreeSet<InodeId>>,
    moves: bool,
}

/// Where findings go.
type Found<'f> = &'f mut dyn FnMut(Finding);

fn finding(rule: Rule, what: impl Into<String>, repair: impl Into<Option<Repair>>) -> Finding {
    Finding { rule, what: what.into(), repair: repair.into() }
}

/// A name for people.
fn shown(name: &[u8]) -> String {
    format!("'{}'", name.escape_ascii())
}

impl Check {
    /// A check from the start.
    pub fn new() -> Self {
        Self { cut: Some(BTreeSet::new()), ..Self::default() }
    }

    /// What was looked at so far.
    pub fn checked(&self) -> Checked {
        self.checked
    }

    /// Goes on by up to a thousand records of the state with which it began; `false`: it is over.
    pub fn step<K: KvRead>(&mut self, r: Reader<'_, K>, found: Found<'_>) -> FsResult<bool> {
        let Some(&table) = TABLES.get(self.table) else { return Ok(false) };
        if self.table == 0 && self.after.is_none() {
            self.moves = r.pending_moves()? > 0;
            self.unknown_tables(r, found);
            if let Err(e) = self.map(r, found) {
                found(finding(Rule::Readable, e.to_string(), None));
            }
        }
        let from = self.after.take().map(|k| after(&k));
        let page = r.scan_prefix(&[table], from.as_deref(), PAGE);
        for (k, v) in &page {
            self.checked.records += 1;
            if let Err(e) = self.record(r, (k, v), found) {
                let what = format!("table {}, key {}: {e}", char::from(table), shown(&k[1..]));
                found(finding(Rule::Readable, what, None));
            }
        }
        match page.into_iter().last() {
            Some((k, _)) => self.after = Some(k),
            None => {
                self.table += 1;
                if self.table == TABLES.len() {
                    self.numbers_and_counts(r, found)?;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Between the known tables there is nothing.
    fn unknown_tables<K: KvRead>(&self, r: Reader<'_, K>, found: Found<'_>) {
        let mut from = Vec::new();
        loop {
            let Some((k, _)) = r.0.scan(&from, &[0xff; 9], 1, false).pop() else { return };
            let table = k.first().copied().unwrap_or_default();
            if k.is_empty() || !TABLES.contains(&table) {
                let what = format!("a record of no table: {}", shown(&k));
                found(finding(Rule::Readable, what, None));
            }
            if table == 0xff {
                return;
            }
            from = vec![table + 1];
        }
    }

    fn record<K: KvRead>(
        &mut self,
        r: Reader<'_, K>,
        (k, v): (&[u8], &[u8]),
        found: Found<'_>,
    ) -> FsResult<()> {
        match k[0] {
            INODE => self.inode(r, k, found),
            ENTRY => self.entry(r, (k, v), found),
            LINK | JOIN | DIRTY | HELD | OWNER | CLIENT | REPLY | SESSION_HANDLE | OPEN
            | ATTEMPT | WINDOW | TOMBSTONE_AGE | NODE_BOOT | SESSION_LOCK | LOCK | XATTR
            | BORROWER | LINGERING => {
                if let Some((rule, what)) = r.stale(k, v)? {
                    found(finding(rule, what, Repair::Record(k.to_vec())));
                }
                Ok(())
            }
            SESSION => self.session(r, (k, v), found),
            HANDLE => self.handle(r, (k, v), found),
            KEY => self.key(r, (k, v), found),
            TOMBSTONE => self.tombstone(r, (k, v), found),
            NOTICE => self.notice((k, v)),
            MOVE => self.walk((k, v)),
            _ => Ok(()),
        }
    }

    /// Counts a record, where a counter of its table does.
    fn counted(&mut self, k: &[u8]) {
        let counter = match k[0] {
            INODE => Counter::Inodes,
            SESSION => Counter::Sessions,
            NOTICE => Counter::Notices,
            MOVE => Counter::Moves,
            TOMBSTONE => Counter::Tombstones,
            _ => return,
        };
        self.count(counter, 1);
    }

    fn count(&mut self, counter: Counter, by: i64) {
        *self.counts.entry(counter as u8).or_default() += by;
    }

    /// A number was given out.
    fn given(&mut self, counter: Counter, number: u64) {
        let highest = self.numbers.entry(counter as u8).or_default();
        *highest = number.max(*highest);
    }

    fn numbers_and_counts<K: KvRead>(&self, r: Reader<'_, K>, found: Found<'_>) -> FsResult<()> {
        for (&number, &highest) in &self.numbers {
            let Some(counter) = Counter::of(number) else { continue };
            let is = r.counter(counter)?;
            if is < highest {
                let what = format!("{counter:?} is {is}, and {highest} was given out");
                found(finding(Rule::Numbers, what, Repair::AtLeast(number, highest)));
            }
        }
        let repairs = r.counter(Counter::Repairs)?;
        for counter in COUNTED {
            let is = r.counter(counter)?;
            let right = self.counts.get(&(counter as u8)).copied().unwrap_or_default();
            let by = right.wrapping_sub_unsigned(is);
            if by != 0 {
                let what = format!("{counter:?} is {is}, and there are {right}");
                let repair = Repair::Count { counter: counter as u8, by, repairs };
                found(finding(Rule::Count, what, repair));
            }
        }
        Ok(())
    }
}

/// Counters that say how many there are of something.
pub(crate) const COUNTED: [Counter; 9] = [
    Counter::Inodes,
    Counter::UsedBytes,
    Counter::DirtyInodes,
    Counter::PendingKeys,
    Counter::Sessions,
    Counter::Tombstones,
    Counter::Notices,
    Counter::Moves,
    Counter::LostFiles,
];

/// Counters that give numbers out.
pub(crate) const NUMBERS: [Counter; 6] = [
    Counter::NextInode,
    Counter::NextHandle,
    Counter::NextSession,
    Counter::NextNotice,
    Counter::NextNode,
    Counter::NextMove,
];
