//! A bounded map that forgets what was used longest ago (I9).
//!
//! Touches are stamps in a queue; a stale stamp is skipped when it comes to the front, so every
//! operation is O(1) amortised and the queue never exceeds twice the map.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

pub(crate) struct Lru<K, V> {
    map: HashMap<K, (V, u64)>,
    order: VecDeque<(K, u64)>,
    stamp: u64,
    max: usize,
}

impl<K: Copy + Eq + Hash, V> Lru<K, V> {
    /// A map of at most `max` entries (at least one).
    pub(crate) fn new(max: usize) -> Self {
        Self { map: HashMap::new(), order: VecDeque::new(), stamp: 0, max: max.max(1) }
    }

    pub(crate) fn len(&self) -> usize {
        self.map.len()
    }

    /// The value, which becomes the youngest.
    pub(crate) fn get(&mut self, key: &K) -> Option<&V> {
        let entry = self.map.get_mut(key)?;
        self.stamp += 1;
        entry.1 = self.stamp;
        self.order.push_back((*key, self.stamp));
        self.compact();
        self.map.get(key).map(|(v, _)| v)
    }

    /// The value, without a touch.
    pub(crate) fn peek(&self, key: &K) -> Option<&V> {
        self.map.get(key).map(|(v, _)| v)
    }

    /// Puts a value; the oldest entry goes if there is one too many, and its key is returned.
    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<K> {
        let mut gone = None;
        self.stamp += 1;
        self.map.insert(key, (value, self.stamp));
        self.order.push_back((key, self.stamp));
        while self.map.len() > self.max {
            let Some((old, stamp)) = self.order.pop_front() else { break };
            if self.map.get(&old).is_some_and(|(_, s)| *s == stamp) {
                self.map.remove(&old);
                gone = Some(old);
            }
        }
        self.compact();
        gone
    }

    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        self.map.remove(key).map(|(v, _)| v)
    }

    /// Drops stale stamps once they are the majority.
    fn compact(&mut self) {
        if self.order.len() > 2 * self.map.len() + 16 {
            let map = &self.map;
            self.order.retain(|(k, s)| map.get(k).is_some_and(|(_, now)| now == s));
        }
        debug_assert!(self.map.len() <= self.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_unused_entry_goes_first_and_the_bound_holds() {
        let mut lru = Lru::new(3);
        for k in 0..3 {
            lru.insert(k, k);
        }
        assert_eq!(lru.get(&0), Some(&0));
        lru.insert(3, 3);
        assert_eq!(lru.peek(&1), None, "1 was the longest unused");
        assert!(lru.peek(&0).is_some() && lru.peek(&2).is_some() && lru.peek(&3).is_some());
        for k in 0..10_000 {
            lru.insert(k % 7, k);
            lru.get(&(k % 5));
            assert!(lru.len() <= 3 && lru.order.len() <= 2 * lru.len() + 17);
        }
        assert_eq!(lru.remove(&99_999), None);
        let gone = lru.insert(8, 8).expect("it was full");
        assert!(lru.peek(&gone).is_none() && lru.len() == 3, "the key that went is told");
    }
}
