//! Files that clients have open without a handle in the log (docs/PROTOCOL.md, R59): lent by an answer, and wanted
//! back when they have no name any more.

use super::Stop;
use crate::service::{Service, fs_error};
use ebb_dataplane_protocol::{Grant, InodeId, SessionId, SignedGrant};
use ebb_metaplane_protocol::lease::Lease;
use ebb_metaplane_protocol::query::LentFile;
use ebb_metaplane_protocol::{Attr, Command, FsError, FsResult};
use std::collections::HashSet;
use std::time::Duration;

/// Files of one command.
const FILES: usize = 1_000;
/// Sessions that ended are looked for this often.
const SESSIONS_EVERY: Duration = Duration::from_secs(1);

/// A look at a file that is to be lent.
enum Look {
    Lent(Box<(Attr, Grant, Lease)>),
    /// The log is to say first that files are lent to the session.
    NotYet,
    /// It takes a handle.
    No,
}

impl Service {
    /// Opens a file for reading without an entry in the log. `None`: it takes one.
    pub(crate) async fn lend_file(
        &self,
        session: SessionId,
        inode: InodeId,
    ) -> FsResult<Option<Box<LentFile>>> {
        Box::pin(self.freshen(inode)).await?;
        for _ in 0..2 {
            let look = self.voter.read(|_, r| -> FsResult<Look> {
                let desk = self.voter.leases();
                if !r.is_borrower(session) {
                    if !r.session_exists(session)? {
                        return Err(FsError::SessionExpired);
                    }
                    return Ok(if desk.grant(session, &[]).is_some() {
                        Look::NotYet
                    } else {
                        Look::No
                    });
                }
                let Some((attr, grant)) = r.lend(session, inode)? else { return Ok(Look::No) };
                Ok(match desk.lend(session, inode) {
                    Some(lease) => Look::Lent(Box::new((attr, grant, lease))),
                    None => Look::No,
                })
            });
            match look.await.map_err(fs_error)?? {
                Look::Lent(lent) => {
                    let (attr, grant, lease) = *lent;
                    let grant = SignedGrant::sign(&grant, &self.key);
                    return Ok(Some(Box::new(LentFile { attr, grant, lease })));
                }
                Look::NotYet => drop(self.submit(Command::Borrow(session)).await?),
                Look::No => break,
            }
        }
        Ok(None)
    }

    /// Files without a name that somebody may have open without a handle.
    pub(crate) fn lingering(&self) -> FsResult<u64> {
        Ok(self.voter.peek(|_, r| r.lingering(None, FILES)).map_err(fs_error)??.len() as u64)
    }

    /// Sessions that keep files which have no name any more, and an object; `lent`: also those to which they were lent.
    pub(crate) fn readers_of_unlinked(&self, lent: bool) -> FsResult<Vec<SessionId>> {
        let look =
            self.voter.peek(|_, r| Ok((r.holders_of_unlinked()?, r.lingering(None, FILES)?)));
        let look: FsResult<_> = look.map_err(fs_error)?;
        let (holders, lingering) = look?;
        let mut readers: HashSet<SessionId> = holders.into_iter().collect();
        if lent && !lingering.is_empty() {
            readers.extend(self.voter.leases().borrowers_of(&lingering));
        }
        Ok(readers.into_iter().collect())
    }

    /// The loop of a leader.
    pub(crate) async fn run_lent(&self, stop: Stop) {
        let mut looked = None;
        while !stop.wait(&self.wakes.lent, self.config.timings.tick()).await {
            if looked.is_none_or(|at: tokio::time::Instant| at.elapsed() >= SESSIONS_EVERY) {
                if let Err(e) = self.note_borrowers().await {
                    tracing::debug!(error = %e, "looking for who has files");
                    continue;
                }
                looked = Some(tokio::time::Instant::now());
            }
            if let Err(e) = self.reap(&stop).await {
                tracing::debug!(error = %e, "files without a name");
            }
        }
    }

    /// Whom earlier leaders may have lent files, once; and who of those that are waited for has ended.
    async fn note_borrowers(&self) -> FsResult<()> {
        let desk = self.voter.leases();
        if desk.is_lender_new() {
            // Everything that was committed before this lead is applied when this answers.
            let Some(term) = self.voter.leading_term() else { return Ok(()) };
            let sessions = self.voter.read(|_, r| r.borrowers()).await.map_err(fs_error)??;
            desk.lent_earlier(term, sessions);
        }
        let waited_for = desk.borrowers();
        if waited_for.is_empty() {
            return Ok(());
        }
        let live = self.voter.peek(|_, r| r.borrowers()).map_err(fs_error)??;
        let live: HashSet<SessionId> = live.into_iter().collect();
        // Nothing is lent to those of which the log says nothing.
        waited_for.difference(&live).for_each(|s| desk.forget(*s));
        Ok(())
    }

    async fn reap(&self, stop: &Stop) -> FsResult<()> {
        let mut after = None;
        while !stop.is_set() {
            let page = self.voter.peek(|_, r| r.lingering(after, FILES)).map_err(fs_error)??;
            let Some(last) = page.last() else { break };
            after = Some(*last);
            let go = self.voter.leases().may_go(&page);
            if !go.is_empty() {
                self.submit(Command::Reap(go)).await?;
            }
        }
        Ok(())
    }
}
