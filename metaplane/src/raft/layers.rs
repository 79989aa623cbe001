//! Recent changes in memory over an ordered table on disk.
//!
//! A change costs a map insert instead of a transaction; many of them go to the table together
//! (`state.rs`), while newer ones gather in a layer of their own. Reads look through the layers from
//! the newest to the table. A removed key is a change too, until the table has lost it.

use super::kv::Base;
use super::rows::Rows;
use super::skips::Skips;
use redb::StorageError;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

/// Key and value.
pub(super) type Pair = (Vec<u8>, Vec<u8>);
/// What became of keys; `None`: removed.
pub(super) type Changes = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

/// The layers, newest first.
#[derive(Default)]
pub(super) struct Layers {
    recent: Changes,
    /// Bytes of keys and values in `recent`.
    recent_bytes: usize,
    /// The same of every change since it began, those that others replaced included: what a replay of
    /// the log would do again.
    changed_bytes: usize,
    /// On its way into the table.
    frozen: Option<Arc<Changes>>,
    /// `None`: closed.
    table: Option<Table>,
    skips: Skips,
}

/// The table, and what is often asked of it.
struct Table {
    base: Base,
    rows: Rows,
}

impl Table {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        self.rows.get(key, || Ok(self.base.get(key)?.map(|v| v.value().to_vec())))
    }
}

/// The changes of a range, in the direction of a scan.
struct Walk<'a> {
    range: std::collections::btree_map::Range<'a, Vec<u8>, Option<Vec<u8>>>,
    reverse: bool,
    head: Option<(&'a Vec<u8>, &'a Option<Vec<u8>>)>,
}

impl<'a> Walk<'a> {
    fn new(changes: Option<&'a Changes>, (start, end): (&[u8], &[u8]), reverse: bool) -> Self {
        let range = match changes {
            Some(c) => c.range::<[u8], _>((Bound::Included(start), Bound::Excluded(end))),
            None => Default::default(),
        };
        let mut walk = Self { range, reverse, head: None };
        walk.step();
        walk
    }

    fn step(&mut self) {
        self.head = if self.reverse { self.range.next_back() } else { self.range.next() };
    }

    /// Steps past `key`; what became of it, if it is the next.
    fn take(&mut self, key: &[u8]) -> Option<&'a Option<Vec<u8>>> {
        let (_, change) = self.head.filter(|(k, _)| k.as_slice() == key)?;
        self.step();
        Some(change)
    }
}

fn weight(key: &[u8], value: Option<&[u8]>) -> usize {
    key.len() + value.map_or(0, <[u8]>::len)
}

impl Layers {
    pub(super) fn new(base: Base) -> Self {
        Self { table: Some(Table { base, rows: Rows::default() }), ..Self::default() }
    }

    /// Whether there is still a table below.
    pub(super) fn is_open(&self) -> bool {
        self.table.is_some()
    }

    /// Bytes of the recent changes: now, and with all that others replaced.
    pub(super) fn recent_bytes(&self) -> (usize, usize) {
        (self.recent_bytes, self.changed_bytes)
    }

    /// Sets or removes a key. What came and went between two transactions leaves nothing behind, so
    /// that a scan over a queue does not walk over all that was ever in it.
    pub(super) fn change(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), StorageError> {
        self.changed_bytes += weight(key, value);
        if value.is_some() {
            self.skips.set(key);
        }
        let old = match value {
            None if self.get_below(key)?.is_none() => self.recent.remove(key),
            _ => {
                self.recent_bytes += weight(key, value);
                self.recent.insert(key.to_vec(), value.map(<[u8]>::to_vec))
            }
        };
        self.recent_bytes -= old.map_or(0, |old| weight(key, old.as_deref()));
        Ok(())
    }

    /// Ends the recent layer and begins a new one. What was frozen before must have been replaced.
    pub(super) fn freeze(&mut self) -> Arc<Changes> {
        (self.recent_bytes, self.changed_bytes) = (0, 0);
        let frozen = Arc::new(std::mem::take(&mut self.recent));
        self.frozen = Some(Arc::clone(&frozen));
        frozen
    }

    /// The table has taken over the frozen changes.
    pub(super) fn replace(&mut self, base: Base) {
        self.table = Some(Table { base, rows: Rows::default() });
        self.frozen = None;
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        match self.recent.get(key) {
            Some(change) => Ok(change.clone()),
            None => self.get_below(key),
        }
    }

    /// What the layers under the recent one say.
    fn get_below(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        match (self.frozen.as_ref().and_then(|f| f.get(key)), &self.table) {
            (Some(change), _) => Ok(change.clone()),
            (None, Some(table)) => table.get(key),
            (None, None) => Ok(None),
        }
    }

    /// Up to `limit` pairs with `start <= key < end`, in key order, or from the end.
    pub(super) fn scan(
        &self,
        (start, end): (&[u8], &[u8]),
        limit: usize,
        reverse: bool,
    ) -> Result<Vec<Pair>, StorageError> {
        let mut out = Vec::new();
        let asked = start;
        let jumped = (!reverse).then(|| self.skips.jump(start)).flatten();
        let start = jumped.as_deref().unwrap_or(start);
        let Some(table) = self.table.as_ref().filter(|_| start < end) else { return Ok(out) };
        let mut newer = Walk::new(Some(&self.recent), (start, end), reverse);
        let mut older = Walk::new(self.frozen.as_deref(), (start, end), reverse);
        let mut range = table.base.range::<&[u8]>(start..end)?;
        let mut step = || if reverse { range.next_back() } else { range.next() }.transpose();
        let mut stored = step()?;
        let mut dead = 0;
        while out.len() < limit {
            let heads = [newer.head.map(|c| c.0.as_slice()), older.head.map(|c| c.0.as_slice())];
            let heads = heads.into_iter().chain([stored.as_ref().map(|(k, _)| k.value())]);
            let first = if reverse { heads.flatten().max() } else { heads.flatten().min() };
            let Some(first) = first else {
                if out.is_empty() && !reverse {
                    self.skips.walked(asked, jumped.as_deref(), dead, end);
                }
                break;
            };
            // Every layer steps past the key; the newest that has it decides.
            let (newest, second) = (newer.take(first), older.take(first));
            let in_table = stored.as_ref().is_some_and(|(k, _)| k.value() == first);
            let value = match newest.or(second) {
                Some(change) => change.as_deref(),
                None => stored.as_ref().map(|(_, v)| v.value()),
            };
            match value {
                Some(_) if out.is_empty() && !reverse => {
                    self.skips.walked(asked, jumped.as_deref(), dead, first);
                }
                Some(_) => {}
                None => dead += 1,
            }
            out.extend(value.map(|value| (first.to_vec(), value.to_vec())));
            if in_table {
                stored = step()?;
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::PAIRS;
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use redb::{Database, ReadableDatabase};

    fn table(database: &Database) -> Base {
        database.begin_read().expect("reads").open_table(PAIRS).expect("there")
    }

    fn write_out(database: &Database, changes: &Changes) {
        let txn = database.begin_write().expect("writes");
        {
            let mut pairs = txn.open_table(PAIRS).expect("table");
            for (key, value) in changes {
                match value {
                    Some(v) => drop(pairs.insert(key.as_slice(), v.as_slice()).expect("inserts")),
                    None => drop(pairs.remove(key.as_slice()).expect("removes")),
                }
            }
        }
        txn.commit().expect("commits");
    }

    #[test]
    fn a_queue_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("directory");
        let database = Database::create(dir.path().join("layers.redb")).expect("creates");
        write_out(&database, &Changes::from([(b"old".to_vec(), Some(vec![1]))]));
        let mut layers = Layers::new(table(&database));
        for i in 0..1000u32 {
            layers.change(&i.to_be_bytes(), Some(b"entry")).expect("sets");
            layers.change(&i.to_be_bytes(), None).expect("removes");
        }
        assert!(layers.recent.is_empty());
        layers.change(b"old", None).expect("removes");
        assert_eq!(layers.get(b"old").expect("reads"), None);
    }

    /// Whatever is in which layer, reads see the last change of every key.
    #[test]
    fn layers_read_like_one_map() {
        let seed = std::env::var("EBB_SEED").ok().and_then(|s| s.parse().ok());
        let seeds = seed.map_or(0..60u64, |s| s..s + 1);
        for seed in seeds {
            let mut random = StdRng::seed_from_u64(seed);
            let dir = tempfile::tempdir().expect("directory");
            let database = Database::create(dir.path().join("layers.redb")).expect("creates");
            write_out(&database, &Changes::new());
            let mut layers = Layers::new(table(&database));
            let mut model: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
            let mut under_way: Option<Arc<Changes>> = None;
            let mut key = {
                let mut random = StdRng::seed_from_u64(seed + 1_000_000);
                move || -> Vec<u8> { vec![b'k', random.random_range(0..40u8)] }
            };
            for step in 0..400u32 {
                match random.random_range(0..10) {
                    0..4 => {
                        let (k, v) = (key(), step.to_le_bytes());
                        layers.change(&k, Some(&v)).expect("sets");
                        model.insert(k, v.to_vec());
                    }
                    4 | 5 => {
                        let k = key();
                        layers.change(&k, None).expect("removes");
                        model.remove(&k);
                    }
                    6 => match under_way.take() {
                        None => under_way = Some(layers.freeze()),
                        Some(changes) => {
                            write_out(&database, &changes);
                            layers.replace(table(&database));
                        }
                    },
                    7 => {
                        let k = key();
                        let have = layers.get(&k).expect("reads");
                        assert_eq!(have.as_ref(), model.get(&k), "seed {seed}, step {step}");
                    }
                    _ => {
                        let (start, end) = (key(), key());
                        let (limit, reverse) = (random.random_range(0..12), random.random());
                        let have = layers.scan((&start, &end), limit, reverse).expect("scans");
                        let within = model.iter().filter(|(k, _)| **k >= start && **k < end);
                        let mut want: Vec<Pair> =
                            within.map(|(k, v)| (k.clone(), v.clone())).collect();
                        if reverse {
                            want.reverse();
                        }
                        want.truncate(limit);
                        assert_eq!(have, want, "seed {seed}, step {step}");
                    }
                }
            }
        }
    }
}
