//! Rows of the table that are asked for again and again: counters, the map, sessions, directories, and names that
//! are not there.
//!
//! A look into the table costs a walk down its pages; a create needs a dozen of the same ones. A row is kept from
//! the second time on that it is asked for, so that one look at each of many files does not push out what is
//! needed with each. All of it is of one state of the table and goes with it.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};

/// Bytes of keys and values at most; then it begins anew.
const BYTES_MAX: usize = 4 << 20;
/// Rows that were asked for once are remembered by so many marks.
const MARKS: usize = 1 << 13;
/// What a row takes besides its bytes, about.
const ROW_BYTES: usize = 96;

struct Inner {
    /// `None`: the table has no such row.
    rows: HashMap<Box<[u8]>, Option<Box<[u8]>>>,
    bytes: usize,
    hasher: RandomState,
    /// Of the last row that fell on each place and was not kept.
    marks: Vec<u32>,
}

/// See the module.
pub(super) struct Rows(Mutex<Inner>);

impl Default for Rows {
    fn default() -> Self {
        let marks = vec![0; MARKS];
        let (rows, hasher) = (HashMap::new(), RandomState::new());
        Self(Mutex::new(Inner { rows, bytes: 0, hasher, marks }))
    }
}

impl Inner {
    /// Whether it was asked for before, as far as is known.
    fn is_second(&mut self, key: &[u8]) -> bool {
        let hash = self.hasher.hash_one(key);
        let (place, mark) = ((hash as usize) % MARKS, (hash >> 32) as u32 | 1);
        std::mem::replace(&mut self.marks[place], mark) == mark
    }

    fn keep(&mut self, key: &[u8], value: Option<&[u8]>) {
        let bytes = ROW_BYTES + key.len() + value.map_or(0, <[u8]>::len);
        if self.bytes + bytes > BYTES_MAX {
            self.rows.clear();
            self.bytes = 0;
        }
        if bytes <= BYTES_MAX && self.rows.insert(key.into(), value.map(Into::into)).is_none() {
            self.bytes += bytes;
        }
    }
}

impl Rows {
    /// A row: as it is kept here, or else as `look` finds it in the table.
    pub(super) fn get<E>(
        &self,
        key: &[u8],
        look: impl FnOnce() -> Result<Option<Vec<u8>>, E>,
    ) -> Result<Option<Vec<u8>>, E> {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let second = {
            let mut inner = lock();
            if let Some(row) = inner.rows.get(key) {
                return Ok(row.as_deref().map(<[u8]>::to_vec));
            }
            inner.is_second(key)
        };
        let found = look()?;
        if second {
            lock().keep(key, found.as_deref());
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_row_is_looked_up_twice_and_a_scan_of_many_pushes_nothing_out() {
        let rows = Rows::default();
        let looks = Cell::new(0);
        let get = |key: &[u8], value: Option<&[u8]>| {
            let look = || {
                looks.set(looks.get() + 1);
                Ok::<_, ()>(value.map(<[u8]>::to_vec))
            };
            assert_eq!(rows.get(key, look).expect("found").as_deref(), value);
        };
        for _ in 0..5 {
            get(b"hot", Some(b"value"));
            get(b"absent", None);
        }
        assert_eq!(looks.get(), 4);
        for n in 0..100_000u32 {
            get(&n.to_be_bytes(), Some(&[7; 400]));
        }
        let before = looks.get();
        get(b"hot", Some(b"value"));
        get(b"absent", None);
        assert_eq!(looks.get(), before);
    }

    #[test]
    fn it_is_bounded_and_a_failed_look_is_not_kept() {
        let rows = Rows::default();
        for n in 0..40_000u32 {
            for _ in 0..2 {
                let found: Result<_, ()> = rows.get(&n.to_be_bytes(), || Ok(Some(vec![1; 1000])));
                assert_eq!(found, Ok(Some(vec![1; 1000])));
            }
        }
        let inner = rows.0.lock().expect("whole");
        assert!(inner.bytes <= BYTES_MAX && inner.rows.len() * 1000 <= BYTES_MAX);
        assert!(inner.rows.len() > 1000);
        drop(inner);
        for _ in 0..3 {
            assert_eq!(rows.get(b"broken", || Err("disk")), Err("disk"));
        }
        assert_eq!(rows.get(b"broken", || Ok::<_, ()>(None)), Ok(None));
    }
}
