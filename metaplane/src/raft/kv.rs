//! The namespace's ordered key-value traits on the layers of the state.
//!
//! Those traits cannot fail. The first error of the table is kept, everything after it reads as
//! absent, and the owner asks ([`Reader::check`], [`Writer::finish`]) before it trusts or answers
//! anything.

use super::layers::{Layers, Pair};
use super::state::failed;
use ebb_metaplane_protocol::{CommandReply, LogEntry};
use ebb_namespace::{Kv, KvRead, Machine};
use redb::{ReadOnlyTable, StorageError};
use std::cell::RefCell;
use std::io;
use std::ops::Deref;

/// The table under the layers, as of some transaction.
pub(super) type Base = ReadOnlyTable<&'static [u8], &'static [u8]>;

/// The first error, kept.
#[derive(Default)]
struct First(RefCell<Option<io::Error>>);

impl First {
    fn ok<T: Default>(&self, result: Result<T, StorageError>) -> T {
        result.unwrap_or_else(|e| {
            self.0.borrow_mut().get_or_insert(failed(e));
            T::default()
        })
    }
    fn take(&self) -> io::Result<()> {
        self.0.borrow_mut().take().map_or(Ok(()), Err)
    }
}

/// A consistent view of the state: nothing is applied while it lives, so it should not live long.
pub struct Reader<'s> {
    layers: Box<dyn Deref<Target = Layers> + 's>,
    error: First,
}

impl<'s> Reader<'s> {
    pub(super) fn new(layers: impl Deref<Target = Layers> + 's) -> Self {
        Self { layers: Box::new(layers), error: First::default() }
    }

    /// The first error of the store, if there was one: what was read since is worth nothing.
    pub fn check(&self) -> io::Result<()> {
        self.error.take()
    }
}

/// The state of one moment, which goes on meanwhile: for looks at all of it. While it lives the pages of
/// that moment are kept, so the file grows with what changes.
pub struct Moment(Layers);

impl Moment {
    pub(super) fn new(base: Base) -> Self {
        Self(Layers::new(base))
    }

    /// A view of it.
    pub fn view(&self) -> Reader<'_> {
        Reader::new(&self.0)
    }
}

impl KvRead for Reader<'_> {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.error.ok(self.layers.get(key))
    }
    fn scan(&self, start: &[u8], end: &[u8], limit: usize, reverse: bool) -> Vec<Pair> {
        self.error.ok(self.layers.scan((start, end), limit, reverse))
    }
}

/// The state while a batch is applied.
pub(super) struct Writer<'s> {
    layers: &'s mut Layers,
    error: First,
}

impl<'s> Writer<'s> {
    pub(super) fn new(layers: &'s mut Layers) -> Self {
        Self { layers, error: First::default() }
    }

    /// Applies an entry.
    pub(super) fn apply(&mut self, entry: &LogEntry) -> Vec<CommandReply> {
        Machine::apply(self, entry)
    }

    /// Fails if anything failed; then what was changed must not be used.
    pub(super) fn finish(self) -> io::Result<()> {
        self.error.take()
    }
}

impl KvRead for Writer<'_> {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.error.ok(self.layers.get(key))
    }
    fn scan(&self, start: &[u8], end: &[u8], limit: usize, reverse: bool) -> Vec<Pair> {
        self.error.ok(self.layers.scan((start, end), limit, reverse))
    }
}

impl Kv for Writer<'_> {
    fn put(&mut self, key: &[u8], value: &[u8]) {
        let done = self.layers.change(key, Some(value));
        self.error.ok(done);
    }
    fn delete(&mut self, key: &[u8]) {
        let done = self.layers.change(key, None);
        self.error.ok(done);
    }
}
