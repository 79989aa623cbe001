//! Fault switches of the embedded server: what to do wrong, on which requests, how often.
//!
//! For tests: they lose replies *after* the effect, fail before it, delay, or cut bodies short, so
//! that the paths behind I3 can be walked on purpose. Switches are flipped in-process through
//! [`Faults`] or from another process over the admin port (`server::admin`). Off by default, and
//! nothing here runs unless a switch is set. Decides only; `server::http` carries it out.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::operation::Operation;

/// Switches that may be set at once.
pub const FAULTS_MAX: usize = 64;

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// Carry the request out, then drop the connection without a word.
    LostReply,
    /// Drop the connection without carrying the request out.
    LostRequest,
    /// Drop the connection now, carry the request out later: it was under way all the time.
    Late { ms: u64 },
    /// 500 without carrying it out.
    InternalError,
    /// Carry it out, then say 500.
    InternalErrorAfter,
    /// 503 SlowDown without carrying it out.
    SlowDown,
    /// Wait, then carry it out.
    Delay { ms: u64 },
    /// Carry it out, then wait before the reply.
    DelayReply { ms: u64 },
    /// Send the head of the reply and this many bytes of its body, then drop the connection.
    Truncate { bytes: u64 },
}

/// One switch: which requests, what, how often.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    pub kind: FaultKind,
    /// None is every operation.
    #[serde(default)]
    pub op: Option<Operation>,
    /// Only requests whose key contains this.
    #[serde(default)]
    pub key_contains: Option<String>,
    /// Let this many matching requests pass first.
    #[serde(default)]
    pub skip: u64,
    /// Strike this many times; None is until cleared.
    #[serde(default)]
    pub count: Option<u64>,
}

impl Fault {
    /// Strikes the next `count` requests of `op`.
    pub fn next(op: Operation, count: u64, kind: FaultKind) -> Self {
        Self { kind, op: Some(op), key_contains: None, skip: 0, count: Some(count) }
    }

    /// Strikes every request of `op` until cleared.
    pub fn every(op: Operation, kind: FaultKind) -> Self {
        Self { kind, op: Some(op), key_contains: None, skip: 0, count: None }
    }

    pub fn on_key(mut self, part: impl Into<String>) -> Self {
        self.key_contains = Some(part.into());
        self
    }

    fn matches(&self, op: Operation, key: &str) -> bool {
        self.op.is_none_or(|wanted| wanted == op)
            && self.key_contains.as_ref().is_none_or(|part| key.contains(part.as_str()))
    }
}

/// The switchboard of one server; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    faults: Vec<Fault>,
    struck: u64,
}

impl Faults {
    /// A poisoned lock only means that a test panicked; the state is whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False when too many are set already.
    pub fn add(&self, fault: Fault) -> bool {
        let mut state = self.state();
        let room = state.faults.len() < FAULTS_MAX;
        if room {
            state.faults.push(fault);
        }
        room
    }

    pub fn clear(&self) {
        self.state().faults.clear();
    }

    /// What is still set.
    pub fn pending(&self) -> Vec<Fault> {
        self.state().faults.clone()
    }

    /// How many requests were struck since the start.
    pub fn struck(&self) -> u64 {
        self.state().struck
    }

    /// The fault for this request, if any: the first switch that matches is used up by one.
    pub(crate) fn take(&self, op: Operation, key: &str) -> Option<FaultKind> {
        let mut state = self.state();
        let at = state.faults.iter().position(|f| f.matches(op, key))?;
        let fault = state.faults.get_mut(at)?;
        if fault.skip > 0 {
            fault.skip -= 1;
            return None;
        }
        let kind = fault.kind.clone();
        match &mut fault.count {
            Some(0) => {
                state.faults.remove(at);
                return None;
            }
            Some(left) => {
                *left -= 1;
                if *left == 0 {
                    state.faults.remove(at);
                }
            }
            None => {}
        }
        state.struck += 1;
        Some(kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switch_skips_strikes_and_is_used_up() {
        let faults = Faults::default();
        let mut fault = Fault::next(Operation::Put, 2, FaultKind::SlowDown).on_key("x");
        fault.skip = 1;
        assert!(faults.add(fault));
        assert_eq!(faults.take(Operation::Get, "x"), None, "another operation");
        assert_eq!(faults.take(Operation::Put, "y"), None, "another key");
        assert_eq!(faults.take(Operation::Put, "ax"), None, "skipped");
        assert_eq!(faults.take(Operation::Put, "ax"), Some(FaultKind::SlowDown));
        assert_eq!(faults.take(Operation::Put, "xb"), Some(FaultKind::SlowDown));
        assert_eq!(faults.take(Operation::Put, "x"), None, "used up");
        assert_eq!((faults.struck(), faults.pending().len()), (2, 0));
    }

    #[test]
    fn switches_read_from_json() {
        let text = r#"{"kind":{"truncate":{"bytes":10}},"op":"get","count":3}"#;
        let fault: Fault = serde_json::from_str(text).expect("a fault");
        assert_eq!(fault, Fault::next(Operation::Get, 3, FaultKind::Truncate { bytes: 10 }));
        let text = r#"{"kind":"lost_reply","op":"complete_multipart"}"#;
        let fault: Fault = serde_json::from_str(text).expect("a fault");
        assert_eq!(fault, Fault::every(Operation::CompleteMultipart, FaultKind::LostReply));
    }
}
