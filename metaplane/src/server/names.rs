//! Who alone adds names to a directory, and who waits until that has ended (docs/PROTOCOL.md, R40).

use crate::service::Service;
use ebb_dataplane_protocol::{InodeId, SessionId};
use ebb_metaplane_protocol::Op;
use ebb_metaplane_protocol::own::{Intent, Owners};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The leader's half of the rule.
#[derive(Default)]
pub(crate) struct Names(Mutex<Owners>);

impl Names {
    fn owners(&self) -> MutexGuard<'_, Owners> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A name is being added; its end is this one's.
pub(super) struct Adding<'a>(&'a Names, Option<Intent>);

impl Drop for Adding<'_> {
    fn drop(&mut self) {
        if let Some(intent) = self.1.take() {
            self.0.owners().done(intent, Instant::now());
        }
    }
}

fn ms(lease: Duration) -> u32 {
    u32::try_from(lease.as_millis()).unwrap_or(0)
}

impl Service {
    /// Returns when nobody else relies on there being no new names where `op` adds one.
    pub(super) async fn may_add_name(&self, session: SessionId, op: &Op) -> Option<Adding<'_>> {
        let (Op::Create { parent: dir, .. }
        | Op::Mkdir { parent: dir, .. }
        | Op::Symlink { parent: dir, .. }
        | Op::Rename { new_parent: dir, .. }) = op
        else {
            return None;
        };
        loop {
            // Who does not lead has it refused.
            let term = self.voter.leading_term()?;
            let now = Instant::now();
            let (opens, intent) = {
                let mut owners = self.names.owners();
                let opens = owners.lead(term, now);
                (opens, (opens <= now).then(|| owners.intend(*dir, session, now)))
            };
            let Some(intent) = intent else {
                tokio::time::sleep(opens.saturating_duration_since(now)).await;
                continue;
            };
            let wait = intent.not_before;
            let adding = Adding(&self.names, Some(intent));
            if let Some(until) = wait {
                tokio::time::sleep(until.saturating_duration_since(now)).await;
            }
            if self.voter.leading_term() == Some(term) {
                return Some(adding);
            }
        }
    }

    /// For how long the names of a directory are lent to who just added one; ms.
    pub(super) fn names_lent(&self, session: SessionId, dir: InodeId) -> u32 {
        self.lend(|owners, now| owners.renew(dir, session, now))
    }

    /// The same of a directory that was just made.
    pub(super) fn own_names_lent(&self, session: SessionId, op: &Op, dir: InodeId) -> u32 {
        let Op::Mkdir { .. } = op else { return 0 };
        self.lend(|owners, now| {
            // Under the lock: nobody's intent falls between the look and the adoption.
            let empty = self.voter.peek(|_, r| r.is_empty_for_sure(dir));
            owners.adopt(dir, session, now, matches!(empty, Ok(Ok(true))))
        })
    }

    fn lend(&self, lend: impl FnOnce(&mut Owners, Instant) -> Duration) -> u32 {
        let Some(term) = self.voter.leading_term() else { return 0 };
        let now = Instant::now();
        let mut owners = self.names.owners();
        owners.lead(term, now);
        let Ok(Ok(brought)) = self.voter.peek(|_, r| r.names_brought()) else { return 0 };
        owners.brought(brought);
        ms(lend(&mut owners, now))
    }
}
