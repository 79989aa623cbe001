//! What the reads of a cell may show: each write takes effect once, between its first request and its end.
//!
//! A value is *known* from when it was acked, or a read showed it: it had taken effect by then. It is *gone* from when
//! something is known that took effect after it, and never shows again: a second time would be a repetition that was
//! applied again (I7).

use std::collections::BTreeMap;

#[derive(Clone, Debug)]
struct Value {
    asked: u64,
    known: Option<u64>,
    gone: Option<u64>,
}

/// Times are numbers of events, each of another one.
#[derive(Clone, Debug)]
pub struct History {
    /// 0 are the zeros before the first write and after a cut.
    values: BTreeMap<u64, Value>,
    cuts: u64,
}

impl Default for History {
    fn default() -> Self {
        let zeros = Value { asked: 0, known: Some(0), gone: None };
        Self { values: BTreeMap::from([(0, zeros)]), cuts: 0 }
    }
}

impl History {
    /// A new value.
    pub fn asked(&mut self, now: u64) -> u64 {
        let value = self.values.keys().next_back().map_or(1, |last| last + 1);
        self.values.insert(value, Value { asked: now, known: None, gone: None });
        value
    }

    pub fn cuts(&self) -> u64 {
        self.cuts
    }

    /// Nothing is asked for that is not known: zeros from here on.
    pub fn cut(&mut self, now: u64) {
        self.cuts += 1;
        self.values.values_mut().for_each(|v| v.gone = v.gone.or(Some(now)));
        self.values.insert(0, Value { asked: now, known: Some(now), gone: None });
    }

    /// It was acked, or shown.
    pub fn known(&mut self, value: u64, now: u64) {
        let Some(v) = self.values.get_mut(&value) else { return };
        v.known.get_or_insert(now);
        let asked = v.asked;
        self.later_than(asked, value, now);
    }

    /// A read that was asked at some time shows it now.
    pub fn shown(&mut self, value: u64, asked: u64, now: u64) -> Result<(), &'static str> {
        match self.values.get(&value) {
            None => return Err("nobody wrote that"),
            Some(v) if v.gone.is_some_and(|gone| gone < asked) => return Err("it was overwritten"),
            Some(_) => {}
        }
        self.known(value, now);
        // What was there before the read was asked, and isn't any more.
        self.later_than(asked, value, now);
        Ok(())
    }

    /// Something else than what was known by then is there.
    fn later_than(&mut self, then: u64, value: u64, now: u64) {
        for (_, v) in self.values.iter_mut().filter(|(other, _)| **other != value) {
            if v.known.is_some_and(|known| known < then) {
                v.gone.get_or_insert(now);
            }
        }
    }
}
