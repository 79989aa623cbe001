//! The namespace's ordered key-value traits on redb: a read transaction, and the table of a write
//! transaction.
//!
//! Those traits cannot fail. The first error of redb is kept, everything after it reads as absent,
//! and the owner asks ([`Reader::check`], [`Writer::finish`]) before it trusts or commits anything.

use super::state::{PAIRS, failed};
use ebb_metaplane_protocol::{CommandReply, LogEntry};
use ebb_namespace::{Kv, KvRead, Machine};
use redb::{AccessGuard, ReadOnlyTable, ReadTransaction, ReadableTable, Table, WriteTransaction};
use std::cell::RefCell;
use std::io;
use std::sync::{Mutex, PoisonError};

type Pair = (Vec<u8>, Vec<u8>);
type Entry<'a> =
    Result<(AccessGuard<'a, &'static [u8]>, AccessGuard<'a, &'static [u8]>), redb::StorageError>;

fn take<'a>(
    range: impl DoubleEndedIterator<Item = Entry<'a>>,
    limit: usize,
    reverse: bool,
) -> Result<Vec<Pair>, redb::StorageError> {
    let own = |pair: Entry<'a>| pair.map(|(k, v)| (k.value().to_vec(), v.value().to_vec()));
    if reverse {
        range.rev().take(limit).map(own).collect()
    } else {
        range.take(limit).map(own).collect()
    }
}

fn scan<T: ReadableTable<&'static [u8], &'static [u8]>>(
    table: &T,
    (start, end): (&[u8], &[u8]),
    limit: usize,
    reverse: bool,
) -> Result<Vec<Pair>, redb::StorageError> {
    if start >= end || limit == 0 {
        return Ok(Vec::new());
    }
    take(table.range::<&[u8]>(start..end)?, limit, reverse)
}

fn get<T: ReadableTable<&'static [u8], &'static [u8]>>(
    table: &T,
    key: &[u8],
) -> Result<Option<Vec<u8>>, redb::StorageError> {
    Ok(table.get(key)?.map(|v| v.value().to_vec()))
}

/// A consistent view of the state.
pub struct Reader {
    table: ReadOnlyTable<&'static [u8], &'static [u8]>,
    error: Mutex<Option<io::Error>>,
}

impl Reader {
    pub(super) fn new(txn: &ReadTransaction) -> io::Result<Self> {
        Ok(Self { table: txn.open_table(PAIRS).map_err(failed)?, error: Mutex::new(None) })
    }

    /// The first error of the store, if there was one: what was read since is worth nothing.
    pub fn check(&self) -> io::Result<()> {
        let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        error.take().map_or(Ok(()), Err)
    }

    fn ok<T: Default>(&self, result: Result<T, redb::StorageError>) -> T {
        result.unwrap_or_else(|e| {
            let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
            error.get_or_insert(failed(e));
            T::default()
        })
    }
}

impl KvRead for Reader {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.ok(get(&self.table, key))
    }
    fn scan(&self, start: &[u8], end: &[u8], limit: usize, reverse: bool) -> Vec<Pair> {
        self.ok(scan(&self.table, (start, end), limit, reverse))
    }
}

/// The state inside of the transaction that applies a batch.
pub(super) struct Writer<'t> {
    table: Table<'t, &'static [u8], &'static [u8]>,
    error: RefCell<Option<io::Error>>,
}

impl<'t> Writer<'t> {
    pub(super) fn new(txn: &'t WriteTransaction) -> io::Result<Self> {
        Ok(Self { table: txn.open_table(PAIRS).map_err(failed)?, error: RefCell::new(None) })
    }

    /// Applies an entry.
    pub(super) fn apply(&mut self, entry: &LogEntry) -> Vec<CommandReply> {
        Machine::apply(self, entry)
    }

    /// Ends the use of the table; fails if anything in it failed.
    pub(super) fn finish(self) -> io::Result<()> {
        self.error.into_inner().map_or(Ok(()), Err)
    }

    fn ok<T: Default>(&self, result: Result<T, redb::StorageError>) -> T {
        result.unwrap_or_else(|e| {
            self.error.borrow_mut().get_or_insert(failed(e));
            T::default()
        })
    }
}

impl KvRead for Writer<'_> {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.ok(get(&self.table, key))
    }
    fn scan(&self, start: &[u8], end: &[u8], limit: usize, reverse: bool) -> Vec<Pair> {
        self.ok(scan(&self.table, (start, end), limit, reverse))
    }
}

impl Kv for Writer<'_> {
    fn put(&mut self, key: &[u8], value: &[u8]) {
        let done = self.table.insert(key, value).map(drop);
        self.ok(done);
    }
    fn delete(&mut self, key: &[u8]) {
        let done = self.table.remove(key).map(drop);
        self.ok(done);
    }
}
