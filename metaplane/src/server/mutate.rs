//! Mutations: what they depend on is looked up first, then one command decides; the grant it made
//! is signed here, with the key that the state machine does not hold.

use super::names::Adding;
use crate::service::{Service, fs_error};
use ebb_dataplane_protocol::{Grant, HandleId, InodeId, Sequence, SessionId, SignedGrant};
use ebb_metaplane_protocol::command::OpOutcome;
use ebb_metaplane_protocol::lock::{Lock, LockMode};
use ebb_metaplane_protocol::op::{Name, Published};
use ebb_metaplane_protocol::{
    Attr, Command, CommandReply, FsError, FsResult, Made, Op, OpReply, Opened,
};
use ebb_namespace::why;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a mutation waits here for a seal or an ack before the client is asked to come again.
const WAIT_MAX: Duration = Duration::from_secs(2);
/// How long a truncate waits for the acks of its cut. It has happened, so this is not the place to
/// give up soon; but shorter than a client waits for one answer.
const CUT_WAIT_MAX: Duration = Duration::from_secs(20);
/// How long a lock that waits is waited for here before the client is asked to come again, and how often it
/// is looked for.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(1);
const LOCK_LOOK: Duration = Duration::from_millis(250);
/// Longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// Keys below a directory that a rename lists; more is EXDEV.
const RENAME_INODES_MAX: u64 = 100_000;

impl Service {
    pub(super) async fn mutate(
        self: &Arc<Self>,
        session: SessionId,
        sequence: Sequence,
        answered_below: Sequence,
        mut op: Op,
    ) -> FsResult<OpReply> {
        self.prepare(&op).await?;
        let adding = self.may_add_name(session, &op).await;
        if let Op::Create { delegate, .. } = &mut op {
            *delegate &= adding.as_ref().is_some_and(Adding::is_owners);
        }
        let begun = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            if let Op::Lock { inode, lock, wait: true } = &op {
                // In a box, like all that is rare: what every call needs stays small.
                Box::pin(self.until_unlocked(session, *inode, lock)).await?;
            }
            let command = Command::Client { session, sequence, answered_below, op: op.clone() };
            let outcome = match self.submit(command).await? {
                CommandReply::Op(outcome) => outcome,
                other => return Err(super::unexpected(&other)),
            };
            let why = match outcome {
                Ok(outcome) => {
                    if let Op::Lock { lock, .. } = &op
                        && lock.mode != LockMode::Exclusive
                    {
                        self.wakes.unlocked.notify_waiters();
                    }
                    self.cut_everywhere(session, &op, &outcome).await?;
                    return Ok(self.sign(session, &op, outcome));
                }
                Err(FsError::Again { why, .. }) if begun.elapsed() < WAIT_MAX => why,
                Err(e) => return Err(e),
            };
            if why == why::LISTING || why == why::ATTRIBUTES {
                self.complete(&op, &why).await?;
                continue;
            }
            if why == why::DELEGATED {
                self.recall_for(session, &op);
            }
            // A seal takes a moment: cheaper to wait here than to send the client away.
            self.wakes.notices.notify_one();
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Before a lock that waits is proposed: nobody else's is in its way. A try in vain is no entry in the log.
    async fn until_unlocked(
        &self,
        session: SessionId,
        inode: InodeId,
        lock: &Lock,
    ) -> FsResult<()> {
        let end = tokio::time::Instant::now() + LOCK_WAIT_MAX;
        loop {
            let unlocked = self.wakes.unlocked.notified();
            tokio::pin!(unlocked);
            unlocked.as_mut().enable();
            let look = self.voter.peek(|_, r| r.locked(session, inode, lock)).map_err(fs_error)?;
            if look?.is_none() {
                return Ok(());
            }
            if tokio::time::Instant::now() >= end {
                return Err(FsError::Again { retry_after_ms: 1, why: why::LOCKED.to_owned() });
            }
            // Locks also end with handles and sessions, of which nobody tells here.
            let look_again = (tokio::time::Instant::now() + LOCK_LOOK).min(end);
            let _ = tokio::time::timeout_at(look_again, unlocked).await;
        }
    }

    /// R14: a truncate is answered when every primary has its cut, lest somebody who is told of it
    /// writes under an older grant, is acked, and then cut away. Where nobody else may write there is
    /// nothing to wait for: who truncated carries the new view itself.
    async fn cut_everywhere(
        &self,
        session: SessionId,
        op: &Op,
        outcome: &OpOutcome,
    ) -> FsResult<()> {
        let truncates = match op {
            Op::SetAttr { set, .. } => set.size.is_some(),
            Op::Open { open, .. } | Op::Create { open, .. } => open.truncate,
            _ => false,
        };
        let inode = match outcome {
            OpOutcome::Attr(attr) | OpOutcome::Opened { attr, .. } if truncates => attr.inode,
            _ => return Ok(()),
        };
        let begun = Instant::now();
        loop {
            // Before the look, so that no ack falls between.
            let acked = self.wakes.acked.notified();
            let waits = self
                .voter
                .peek(|_, r| -> FsResult<bool> {
                    Ok(r.cuts_pending(inode)? && r.another_session_writes(inode, session)?)
                })
                .map_err(fs_error)??;
            if !waits {
                return Ok(());
            }
            if begun.elapsed() >= CUT_WAIT_MAX {
                // A retry finds the remembered reply and waits on.
                let why = why::CUTS.to_owned();
                return Err(FsError::Again { retry_after_ms: 100, why });
            }
            // The acks may also come by way of another leader.
            let _ = tokio::time::timeout(PAUSE_MAX, acked).await;
        }
    }

    fn sign(&self, session: SessionId, op: &Op, outcome: OpOutcome) -> OpReply {
        match outcome {
            OpOutcome::Done => OpReply::Done,
            OpOutcome::Attr(attr) => match op {
                Op::Mkdir { parent, .. } | Op::Symlink { parent, .. } => {
                    let names_ms = self.names_lent(session, *parent);
                    let own_names_ms = self.own_names_lent(session, op, attr.inode);
                    OpReply::Made(Box::new(Made { attr, names_ms, own_names_ms }))
                }
                Op::Publish(p) => {
                    let names_ms = self.names_lent(session, p.parent);
                    let parent = self.known_attr(p.parent);
                    OpReply::Published(Box::new(Published { attr, parent, names_ms }))
                }
                _ => OpReply::Attr(attr),
            },
            OpOutcome::Reserved(files) => {
                let sign = |(attr, handle, grant): (Attr, HandleId, Grant)| Opened {
                    attr,
                    handle,
                    lineage: grant.view.lineage,
                    grant: SignedGrant::sign(&grant, &self.key),
                    created: true,
                    parent: None,
                    names_ms: 0,
                    delegation: None,
                };
                OpReply::Reserved(files.into_iter().map(sign).collect())
            }
            OpOutcome::Opened { attr, handle, grant, created, delegation } => {
                let lineage = grant.view.lineage;
                let grant = SignedGrant::sign(&grant, &self.key);
                let (parent, names_ms) = match op {
                    Op::Create { parent, .. } => {
                        (self.known_attr(*parent), self.names_lent(session, *parent))
                    }
                    _ => (None, 0),
                };
                let opened =
                    Opened { attr, handle, grant, created, lineage, parent, names_ms, delegation };
                OpReply::Opened(Box::new(opened))
            }
        }
    }

    /// Attributes of an inode, if they are complete and anybody may hear of them. The caller has just had a
    /// command applied here.
    fn known_attr(&self, inode: InodeId) -> Option<Attr> {
        let look = self.voter.peek(|_, r| (r.attr(inode), self.voter.leases().is_settled(inode)));
        let (attr, settled) = look.ok()?;
        let (attr, due) = attr.ok()?;
        (!due && settled).then_some(attr)
    }

    /// What must be known before the command is proposed.
    async fn prepare(self: &Arc<Self>, op: &Op) -> FsResult<()> {
        match op {
            Op::Create { parent, name, exclusive, .. } => {
                if let Some(inode) = self.know(*parent, name).await?
                    && !exclusive
                {
                    self.freshen(inode).await?;
                }
            }
            Op::Open { inode, .. } => self.freshen(*inode).await?,
            Op::Mkdir { parent, name, .. }
            | Op::Symlink { parent, name, .. }
            | Op::Unlink { parent, name }
            | Op::Rmdir { parent, name } => {
                self.know(*parent, name).await?;
            }
            // What has names besides this one is known by its number.
            Op::Link { inode, parent, name } => {
                self.know(*parent, name).await?;
                self.freshen(*inode).await?;
            }
            Op::Rename { parent, name, new_parent, new_name, .. } => {
                tokio::try_join!(self.know(*parent, name), self.know(*new_parent, new_name))?;
            }
            Op::Regrant { .. }
            | Op::Release { .. }
            | Op::ReleaseMany { .. }
            | Op::Commit(_)
            | Op::SetAttr { .. }
            | Op::Reserve { .. }
            | Op::Publish(_)
            | Op::ReturnNames { .. }
            | Op::Lock { .. }
            | Op::SetXattr { .. } => {}
        }
        Ok(())
    }

    /// Attributes and freshness of a file that is about to be opened.
    pub(crate) async fn freshen(&self, inode: InodeId) -> FsResult<()> {
        let due = self.voter.peek(|_, r| r.attr(inode)).map_err(fs_error)?;
        match due {
            Ok((_, true)) => self.hydrate(vec![inode]).await,
            Ok((_, false)) => self.revalidate(inode).await,
            // The command says what is wrong.
            Err(_) => Ok(()),
        }
    }

    /// What the state machine asked for with `Again`.
    async fn complete(self: &Arc<Self>, op: &Op, reason: &str) -> FsResult<()> {
        let find = |parent: InodeId, name: &Name| {
            let name = name.clone();
            async move { self.know(parent, &name).await }
        };
        let inodes: Vec<InodeId> = match op {
            Op::Open { inode, .. } | Op::SetAttr { inode, .. } | Op::SetXattr { inode, .. } => {
                vec![*inode]
            }
            Op::Create { parent, name, .. } | Op::Rmdir { parent, name } => {
                find(*parent, name).await?.into_iter().collect()
            }
            Op::Rename { parent, name, new_parent, new_name, .. } => {
                let (from, to) =
                    tokio::try_join!(find(*parent, name), find(*new_parent, new_name))?;
                from.into_iter().chain(to).collect()
            }
            _ => Vec::new(),
        };
        if reason == why::ATTRIBUTES {
            return self.hydrate(inodes).await;
        }
        let is_rename = matches!(op, Op::Rename { .. });
        let before = self.inodes_known()?;
        for dir in inodes {
            if !is_rename {
                self.list_page(dir).await?;
                continue;
            }
            let listing = self.list_below(dir);
            tokio::pin!(listing);
            loop {
                tokio::select! {
                    listed = &mut listing => break listed?,
                    () = tokio::time::sleep(Duration::from_millis(200)) => {
                        if self.inodes_known()?.saturating_sub(before) > RENAME_INODES_MAX {
                            return Err(FsError::CrossDevice);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn inodes_known(&self) -> FsResult<u64> {
        Ok(self.voter.peek(|_, r| r.counts()).map_err(fs_error)??.inodes)
    }
}
