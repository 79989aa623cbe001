//! The namespace's ordered key-value traits on the layers of the state.
//!
//! Those traits cannot fail. The first error of the table is kept, everything after it reads as
//! absent, and the owner asks ([`Reader::check`], [`Writer::finish`]) before it trusts or answers
//! anything.

use super::layers::{Layers, Pair};
use super::state::failed;
use crate::leases::{LeaseDesk, Waits};
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::{CommandReply, LogEntry};
use ebb_namespace::{Kv, KvRead, Machine, footprint};
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
    /// What was looked at, if somebody may have to wait for it.
    seen: Option<RefCell<Vec<InodeId>>>,
}

impl<'s> Reader<'s> {
    pub(super) fn new(layers: impl Deref<Target = Layers> + 's) -> Self {
        Self { layers: Box::new(layers), error: First::default(), seen: None }
    }

    /// Notes from now on what is looked at.
    pub(super) fn watched(mut self) -> Self {
        self.seen = Some(RefCell::default());
        self
    }

    /// What was looked at, if that was noted.
    pub(crate) fn seen(&self) -> Vec<InodeId> {
        self.seen.as_ref().map(|seen| seen.borrow().clone()).unwrap_or_default()
    }

    fn see(&self, key: &[u8]) {
        if let (Some(seen), Some(inode)) = (&self.seen, footprint::inode_of(key)) {
            seen.borrow_mut().push(inode);
        }
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
        self.see(key);
        self.error.ok(self.layers.get(key))
    }
    fn scan(&self, start: &[u8], end: &[u8], limit: usize, reverse: bool) -> Vec<Pair> {
        self.see(start);
        self.error.ok(self.layers.scan((start, end), limit, reverse))
    }
}

/// What a command looked at and changed.
#[derive(Default)]
struct Footprint {
    read: RefCell<Vec<InodeId>>,
    written: Vec<InodeId>,
}

impl Footprint {
    fn saw(&self, key: &[u8]) {
        self.read.borrow_mut().extend(footprint::inode_of(key));
    }
}

/// The state while a batch is applied.
pub(super) struct Writer<'s> {
    layers: &'s mut Layers,
    error: First,
    leases: &'s LeaseDesk,
    /// Noted only where somebody has a lease.
    footprint: Option<Footprint>,
    waits: Vec<Waits>,
}

impl<'s> Writer<'s> {
    pub(super) fn new(layers: &'s mut Layers, leases: &'s LeaseDesk) -> Self {
        let footprint = (!leases.is_idle()).then(Footprint::default);
        Self { layers, error: First::default(), leases, footprint, waits: Vec::new() }
    }

    /// Applies an entry: the replies, and what each of them has to wait for (none: nothing).
    pub(super) fn apply(&mut self, entry: &LogEntry) -> (Vec<CommandReply>, Vec<Waits>) {
        let replies = Machine::apply(self, entry);
        (replies, std::mem::take(&mut self.waits))
    }

    /// Fails if anything failed; then what was changed must not be used.
    pub(super) fn finish(self) -> io::Result<()> {
        self.error.take()
    }
}

impl KvRead for Writer<'_> {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        if let Some(footprint) = &self.footprint {
            footprint.saw(key);
        }
        self.error.ok(self.layers.get(key))
    }
    fn scan(&self, start: &[u8], end: &[u8], limit: usize, reverse: bool) -> Vec<Pair> {
        if let Some(footprint) = &self.footprint {
            footprint.saw(start);
        }
        self.error.ok(self.layers.scan((start, end), limit, reverse))
    }
}

impl Kv for Writer<'_> {
    fn put(&mut self, key: &[u8], value: &[u8]) {
        if let (Some(footprint), Some(inode)) = (&mut self.footprint, footprint::inode_of(key)) {
            // Only where it spares somebody a recall is it worth a look at what was there before.
            let before = match self.leases.is_held(inode) {
                true => self.error.ok(self.layers.get(key)),
                false => None,
            };
            if before.is_none_or(|before| !footprint::is_shown_alike(key, &before, value)) {
                footprint.written.push(inode);
            }
        }
        let done = self.layers.change(key, Some(value));
        self.error.ok(done);
    }
    fn delete(&mut self, key: &[u8]) {
        if let (Some(footprint), Some(inode)) = (&mut self.footprint, footprint::inode_of(key)) {
            footprint.written.push(inode);
        }
        let done = self.layers.change(key, None);
        self.error.ok(done);
    }
    fn command_done(&mut self) {
        if let Some(footprint) = self.footprint.take() {
            self.waits.push(self.leases.applied(&footprint.read.take(), &footprint.written));
            self.footprint = Some(Footprint::default());
        }
    }
}
