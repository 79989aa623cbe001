//! The ordered store under the state machine.
//!
//! The traits cannot fail: an implementation over a disk keeps its first error, answers as if the
//! key were absent, and its owner checks for that error before it commits. Nothing applied after a
//! failed read is ever made durable.

use std::collections::BTreeMap;
use std::ops::Bound;

/// Reads.
pub trait KvRead {
    /// The value of a key.
    fn get(&self, key: &[u8]) -> Option<Vec<u8>>;
    /// Up to `limit` pairs with `start <= key < end`, in key order, or from the end when `reverse`.
    fn scan(
        &self,
        start: &[u8],
        end: &[u8],
        limit: usize,
        reverse: bool,
    ) -> Vec<(Vec<u8>, Vec<u8>)>;
}

/// Writes. Reads see the writes before them.
pub trait Kv: KvRead {
    /// Sets a key.
    fn put(&mut self, key: &[u8], value: &[u8]);
    /// Removes a key, if it is there.
    fn delete(&mut self, key: &[u8]);
    /// A command was applied, and the next one may come: for stores that tell commands apart.
    fn command_done(&mut self) {}
}

/// A store in memory, for tests and the simulator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemKv(pub BTreeMap<Vec<u8>, Vec<u8>>);

impl KvRead for MemKv {
    fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.0.get(key).cloned()
    }
    fn scan(
        &self,
        start: &[u8],
        end: &[u8],
        limit: usize,
        reverse: bool,
    ) -> Vec<(Vec<u8>, Vec<u8>)> {
        if start >= end {
            return Vec::new();
        }
        let range = self.0.range::<[u8], _>((Bound::Included(start), Bound::Excluded(end)));
        let own = |(k, v): (&Vec<u8>, &Vec<u8>)| (k.clone(), v.clone());
        if reverse {
            range.rev().take(limit).map(own).collect()
        } else {
            range.take(limit).map(own).collect()
        }
    }
}

impl Kv for MemKv {
    fn put(&mut self, key: &[u8], value: &[u8]) {
        self.0.insert(key.to_vec(), value.to_vec());
    }
    fn delete(&mut self, key: &[u8]) {
        self.0.remove(key);
    }
}
