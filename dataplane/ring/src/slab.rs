//! A fixed slab whose keys carry a generation, so that a stale key never names a new tenant.

/// Index and generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) index: u32,
    pub(crate) generation: u32,
}

impl Key {
    /// As the 64 bits of an operation's `user_data`.
    pub(crate) fn to_bits(self) -> u64 {
        u64::from(self.index) | u64::from(self.generation) << 32
    }

    pub(crate) fn from_bits(bits: u64) -> Key {
        Key { index: bits as u32, generation: (bits >> 32) as u32 }
    }
}

struct Entry<T> {
    generation: u32,
    value: Option<T>,
}

/// At most `capacity` values, allocated once.
pub(crate) struct Slab<T> {
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub(crate) fn new(capacity: u32) -> Self {
        let entries =
            (0..capacity).map(|_| Entry { generation: 1, value: None }).collect::<Vec<_>>();
        Slab { entries, free: (0..capacity).rev().collect() }
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// `Err(value)` when full.
    pub(crate) fn insert(&mut self, value: T) -> Result<Key, T> {
        let Some(index) = self.free.pop() else { return Err(value) };
        let entry = &mut self.entries[index as usize];
        debug_assert!(entry.value.is_none());
        entry.value = Some(value);
        Ok(Key { index, generation: entry.generation })
    }

    pub(crate) fn get(&self, key: Key) -> Option<&T> {
        let entry = self.entries.get(key.index as usize)?;
        if entry.generation == key.generation { entry.value.as_ref() } else { None }
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let entry = self.entries.get_mut(key.index as usize)?;
        if entry.generation == key.generation { entry.value.as_mut() } else { None }
    }

    /// Takes the value out and retires its key.
    pub(crate) fn remove(&mut self, key: Key) -> Option<T> {
        let entry = self.entries.get_mut(key.index as usize)?;
        if entry.generation != key.generation {
            return None;
        }
        let value = entry.value.take()?;
        // Generation 0 is never given out, so an all-zero id is never valid.
        entry.generation = entry.generation.checked_add(1).unwrap_or(1);
        self.free.push(key.index);
        Some(value)
    }

    pub(crate) fn keys(&self) -> Vec<Key> {
        self.entries
            .iter()
            .enumerate()
            .filter(|(_, e)| e.value.is_some())
            .map(|(i, e)| Key { index: i as u32, generation: e.generation })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_key_names_nobody() {
        let mut slab = Slab::new(1);
        let first = slab.insert("a").unwrap();
        assert_eq!(slab.insert("b"), Err("b"));
        assert_eq!(slab.remove(first), Some("a"));
        let second = slab.insert("c").unwrap();
        assert_eq!(first.index, second.index);
        assert_eq!(slab.get(first), None);
        assert_eq!(slab.remove(first), None);
        assert_eq!(slab.get(second), Some(&"c"));
        assert_eq!(Key::from_bits(second.to_bits()), second);
    }
    #[test]
    fn every_tenant_of_an_index_has_a_key_of_its_own() {
        let mut slab = Slab::new(3);
        let mut live: Vec<(Key, String)> = Vec::new();
        let mut keys = std::collections::HashSet::new();
        for n in 0..60usize {
            if live.len() == 3 || n % 5 == 4 {
                let (key, value) = live.swap_remove(n % live.len());
                assert_eq!(slab.remove(key), Some(value));
                assert_eq!(slab.remove(key), None);
                assert_eq!(slab.get_mut(key), None);
            }
            let value = n.to_string();
            let key = slab.insert(value.clone()).unwrap();
            assert!(keys.insert(key.to_bits()), "a key was given out twice");
            assert!(key.to_bits() != 0);
            live.push((key, value));
            assert_eq!(slab.len(), live.len());
            assert!(live.iter().all(|(k, v)| slab.get(*k) == Some(v)));
        }
    }

    #[test]
    fn generations_go_round_without_zero() {
        let mut slab = Slab::new(1);
        slab.entries[0].generation = u32::MAX;
        let last = slab.insert(1).unwrap();
        assert_eq!((last.generation, slab.remove(last)), (u32::MAX, Some(1)));
        let next = slab.insert(2).unwrap();
        assert_eq!((next.generation, slab.get(last), slab.get(next)), (1, None, Some(&2)));
    }

    #[test]
    fn each_value_is_dropped_once() {
        let value = std::rc::Rc::new(());
        let mut slab = Slab::new(4);
        let keys: Vec<Key> = (0..4).map(|_| slab.insert(value.clone()).unwrap()).collect();
        drop(slab.insert(value.clone()));
        slab.remove(keys[1]);
        assert_eq!(std::rc::Rc::strong_count(&value), 4);
        drop(slab);
        assert_eq!(std::rc::Rc::strong_count(&value), 1);
    }
}
