//! Recent changes in memory over an ordered table on disk.
//!
//! A change costs a map insert instead of a transaction; many of them go to the table together
//! (`state.rs`), while newer ones gather in a layer of their own. Reads look through the layers from
//! the newest to the table. A removed key is a change too, until the table has lost it.

use super::kv::Base;
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
    /// Bytes of keys and values in `recent`, counting every change.
    recent_bytes: usize,
    /// On its way into the table.
    frozen: Option<Arc<Changes>>,
    /// `None`: closed.
    base: Option<Base>,
}

/// Changes of a range, in the direction of a scan.
type Range<'a> = Box<dyn Iterator<Item = (&'a Vec<u8>, &'a Option<Vec<u8>>)> + 'a>;

fn range<'a>(changes: &'a Changes, (start, end): (&[u8], &[u8]), reverse: bool) -> Range<'a> {
    let range = changes.range::<[u8], _>((Bound::Included(start), Bound::Excluded(end)));
    if reverse { Box::new(range.rev()) } else { Box::new(range) }
}

impl Layers {
    pub(super) fn new(base: Base) -> Self {
        Self { base: Some(base), ..Self::default() }
    }

    /// Whether there is still a table below.
    pub(super) fn is_open(&self) -> bool {
        self.base.is_some()
    }

    pub(super) fn recent_bytes(&self) -> usize {
        self.recent_bytes
    }

    /// Sets or removes a key. What came and went between two transactions leaves nothing behind, so
    /// that a scan over a queue does not walk over all that was ever in it.
    pub(super) fn change(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), StorageError> {
        if value.is_none() && self.get_below(key)?.is_none() {
            self.recent.remove(key);
            return Ok(());
        }
        self.recent_bytes += key.len() + value.map_or(0, <[u8]>::len);
        self.recent.insert(key.to_vec(), value.map(<[u8]>::to_vec));
        Ok(())
    }

    /// Ends the recent layer and begins a new one. What was frozen before must have been replaced.
    pub(super) fn freeze(&mut self) -> Arc<Changes> {
        self.recent_bytes = 0;
        let frozen = Arc::new(std::mem::take(&mut self.recent));
        self.frozen = Some(Arc::clone(&frozen));
        frozen
    }

    /// The table has taken over the frozen changes.
    pub(super) fn replace(&mut self, base: Base) {
        self.base = Some(base);
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
        match (self.frozen.as_ref().and_then(|f| f.get(key)), &self.base) {
            (Some(change), _) => Ok(change.clone()),
            (None, Some(base)) => Ok(base.get(key)?.map(|v| v.value().to_vec())),
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
        let Some(base) = self.base.as_ref().filter(|_| start < end) else { return Ok(out) };
        let none = Changes::new();
        let frozen = self.frozen.as_deref().unwrap_or(&none);
        let mut newer = range(&self.recent, (start, end), reverse).peekable();
        let mut older = range(frozen, (start, end), reverse).peekable();
        let table = base.range::<&[u8]>(start..end)?;
        let table: Box<dyn Iterator<Item = _>> =
            if reverse { Box::new(table.rev()) } else { Box::new(table) };
        let own = |(k, v): (redb::AccessGuard<'_, _>, redb::AccessGuard<'_, _>)| {
            let (k, v): (&[u8], &[u8]) = (k.value(), v.value());
            (k.to_vec(), v.to_vec())
        };
        let mut table = table.map(|pair| pair.map(own)).peekable();
        while out.len() < limit {
            let stored = match table.peek() {
                Some(Ok((key, _))) => Some(key),
                Some(Err(_)) => match table.next() {
                    Some(Err(e)) => return Err(e),
                    _ => break,
                },
                None => None,
            };
            let heads = [newer.peek().map(|c| c.0), older.peek().map(|c| c.0), stored];
            let heads = heads.into_iter().flatten();
            let first = if reverse { heads.max() } else { heads.min() };
            let Some(first) = first.cloned() else { break };
            // Every layer steps past the key; the newest that has it decides.
            let newest = newer.next_if(|c| *c.0 == first);
            let second = older.next_if(|c| *c.0 == first);
            let stored = table.next_if(|pair| pair.as_ref().is_ok_and(|(k, _)| *k == first));
            let value = match (newest.or(second), stored) {
                (Some((_, change)), _) => change.clone(),
                (None, Some(Ok((_, value)))) => Some(value),
                (None, _) => None,
            };
            out.extend(value.map(|value| (first, value)));
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
