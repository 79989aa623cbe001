//! Who alone adds names to a directory, and who waits until that has ended (docs/PROTOCOL.md, R40).

use crate::service::{Service, fs_error};
use ebb_dataplane_protocol::{InodeId, SessionId};
use ebb_metaplane_protocol::own::{Intent, Owners};
use ebb_metaplane_protocol::{FsResult, Op};
use ebb_namespace::LookupState;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a look at delegated names waits here before the client is asked to come again.
const LOOK_WAIT_MAX: Duration = Duration::from_secs(2);
/// Longest pause between two looks whether they were given back.
const LOOK_PAUSE_MAX: Duration = Duration::from_millis(20);

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

impl Adding<'_> {
    /// By who alone adds names there.
    pub(super) fn is_owners(&self) -> bool {
        self.1.as_ref().is_some_and(Intent::is_owners)
    }
}

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
        | Op::Link { parent: dir, .. }
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

    /// Returns when `session` may look at the names of `dir`: no other one knows better (R49). Who holds
    /// them hears of it in the answer to its next operation there, and gives back unasked what it doesn't use.
    pub(super) async fn may_look(&self, session: SessionId, dir: InodeId) -> FsResult<()> {
        let begun = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            let held = self.voter.read(|_, r| r.delegated_to_another(dir, session)).await;
            let Some(holder) = held.map_err(fs_error)?? else { return Ok(()) };
            self.recall(dir, holder);
            if begun.elapsed() >= LOOK_WAIT_MAX {
                return Err(ebb_namespace::again(ebb_namespace::why::DELEGATED));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LOOK_PAUSE_MAX);
        }
    }

    /// An operation of `session` waits for names that another session holds.
    pub(super) fn recall_for(&self, session: SessionId, op: &Op) {
        let recall = |dir: InodeId, besides: SessionId| {
            let held = self.voter.peek(|_, r| r.delegated_to_another(dir, besides));
            if let Ok(Ok(Some(holder))) = held {
                self.recall(dir, holder);
            }
        };
        match op {
            Op::Create { parent, .. }
            | Op::Mkdir { parent, .. }
            | Op::Symlink { parent, .. }
            | Op::Link { parent, .. }
            | Op::Unlink { parent, .. } => recall(*parent, session),
            Op::Rmdir { parent, name } | Op::Rename { new_parent: parent, new_name: name, .. } => {
                if let Op::Rename { parent, .. } = op {
                    recall(*parent, session);
                }
                recall(*parent, session);
                // A directory that goes is nobody's.
                let known = self.voter.peek(|_, r| r.lookup_state(*parent, name));
                if let Ok(Ok(LookupState::Found { attr, .. })) = known {
                    recall(attr.inode, SessionId(0));
                }
            }
            _ => {}
        }
    }

    fn recall(&self, dir: InodeId, holder: SessionId) {
        self.names.owners().recall(dir, holder);
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
