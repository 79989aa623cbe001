//! Reads. What the state machine does not know yet (a name in a directory that is not completely
//! listed, attributes that no HEAD has shown) is asked of S3 first and entered; then the read is
//! answered from the state alone.

use crate::service::{Service, fs_error};
use ebb_dataplane_protocol::{InodeId, SessionId};
use ebb_metaplane_protocol::lease::Lease;
use ebb_metaplane_protocol::query::PAGE_ENTRIES_MAX;
use ebb_metaplane_protocol::{Attr, FsError, FsResult, Query, QueryReply};
use ebb_namespace::{LookupState, Machine, Origin};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Rounds of asking S3 before a read is given up: each one makes progress unless somebody changes
/// the bucket all the time.
const ROUNDS_MAX: usize = 16;
/// Pages listed for one page of entries at most.
const PAGES_MAX: usize = 1_000;

/// A session that may remember nothing.
const NOBODY: SessionId = SessionId(0);

fn changing() -> FsError {
    FsError::Again { retry_after_ms: 50, why: "the bucket keeps changing".into() }
}

impl Service {
    pub(super) async fn query(
        self: &Arc<Self>,
        session: SessionId,
        query: Query,
    ) -> FsResult<QueryReply> {
        match &query {
            Query::Lookup { parent, name } => {
                match self.lookup_leased(session, *parent, name).await? {
                    (attr, Some(lease)) => Ok(QueryReply::Leased(attr, lease)),
                    (attr, None) => attr.map(QueryReply::Attr).ok_or(FsError::NotFound),
                }
            }
            Query::Resolve { path } => {
                if path.len() > ebb_namespace::limits::PATH_COMPONENTS_MAX {
                    return Err(FsError::NameTooLong);
                }
                let mut attr = self.attr(InodeId::ROOT).await?;
                for name in path {
                    attr = self.lookup(session, attr.inode, name).await?;
                }
                Ok(QueryReply::Attr(attr))
            }
            Query::GetAttr(inode) | Query::Freshen(inode) => {
                if let Query::Freshen(_) = query {
                    Box::pin(self.freshen(*inode)).await?;
                }
                Ok(match self.attr_leased(session, *inode).await? {
                    (attr, Some(lease)) => QueryReply::Leased(Some(attr), lease),
                    (attr, None) => QueryReply::Attr(attr),
                })
            }
            Query::Compare(inode) => {
                self.compare(*inode).await?;
                Ok(QueryReply::Attr(self.attr(*inode).await?))
            }
            Query::Locked(inode, lock) => {
                let look = Box::pin(self.voter.read(|_, r| r.locked(session, *inode, lock))).await;
                Ok(QueryReply::Locked(look.map_err(fs_error)??))
            }
            Query::Lend(inode) => Ok(QueryReply::Lent(self.lend_file(session, *inode).await?)),
            Query::ReadDir { inode, after, limit } => {
                self.read_dir(session, *inode, after, *limit).await
            }
            Query::ReadLink(inode) | Query::Xattrs(inode) => {
                self.attr(*inode).await?;
                self.plain(&query).await
            }
            Query::Parent(_) => match self.plain(&query).await? {
                QueryReply::Attr(parent) => Ok(QueryReply::Attr(self.attr(parent.inode).await?)),
                other => Ok(other),
            },
            Query::Map { wake, .. } => {
                let reply = self.plain(&query).await?;
                if *wake {
                    self.wake_wanted.store(true, Ordering::Release);
                }
                Ok(reply)
            }
            Query::StatFs => match self.plain(&query).await? {
                QueryReply::StatFs(mut s) => {
                    s.dirty_bytes = self.liveness.dirty_bytes();
                    Ok(QueryReply::StatFs(s))
                }
                other => Ok(other),
            },
        }
    }

    async fn plain(&self, query: &Query) -> FsResult<QueryReply> {
        self.voter.read(|kv, _| Machine::query(kv, query)).await.map_err(fs_error)?
    }

    /// Attributes of an inode, complete.
    pub(super) async fn attr(&self, inode: InodeId) -> FsResult<Attr> {
        Ok(self.attr_leased(NOBODY, inode).await?.0)
    }

    /// The same, and whether the session may remember them.
    async fn attr_leased(
        &self,
        session: SessionId,
        inode: InodeId,
    ) -> FsResult<(Attr, Option<Lease>)> {
        for _ in 0..ROUNDS_MAX {
            let look = self.voter.read(|_, r| -> FsResult<_> {
                let (attr, due) = r.attr(inode)?;
                Ok((attr, due, self.lease(session, &[inode])))
            });
            let (attr, due, lease) = look.await.map_err(fs_error)??;
            if !due {
                return Ok((attr, lease));
            }
            self.hydrate(vec![inode]).await?;
        }
        Err(changing())
    }

    /// A lease on what a view shows. To be asked for while the view is looked at.
    fn lease(&self, session: SessionId, inodes: &[InodeId]) -> Option<Lease> {
        if session == NOBODY { None } else { self.voter.leases().grant(session, inodes) }
    }

    /// The same of a page of a directory, where there is much room.
    fn lease_page(
        &self,
        session: SessionId,
        inodes: impl Iterator<Item = InodeId>,
    ) -> Option<Lease> {
        if session == NOBODY || !self.voter.leases().has_much_room(session) {
            return None;
        }
        self.lease(session, &inodes.collect::<Vec<_>>())
    }

    /// An entry of a directory, complete.
    async fn lookup(
        self: &Arc<Self>,
        session: SessionId,
        parent: InodeId,
        name: &[u8],
    ) -> FsResult<Attr> {
        self.lookup_leased(session, parent, name).await?.0.ok_or(FsError::NotFound)
    }

    /// An entry of a directory, complete, if it is there; and whether the session may remember that.
    async fn lookup_leased(
        self: &Arc<Self>,
        session: SessionId,
        parent: InodeId,
        name: &[u8],
    ) -> FsResult<(Option<Attr>, Option<Lease>)> {
        let mut asked = false;
        for _ in 0..ROUNDS_MAX {
            let (state, held, lease) = self
                .voter
                .read(|_, r| -> FsResult<_> {
                    let (state, held) = r.lookup_for(session, parent, name)?;
                    let lease = match &state {
                        _ if held.is_some() => None,
                        LookupState::Found { attr, .. } => {
                            self.lease(session, &[parent, attr.inode])
                        }
                        LookupState::Absent => self.lease(session, &[parent]),
                        LookupState::AskS3 { .. } => None,
                    };
                    Ok((state, held, lease))
                })
                .await
                .map_err(fs_error)??;
            if held.is_some() {
                self.may_look(session, parent).await?;
                continue;
            }
            match state {
                LookupState::Found { attr, needs_attrs: false } => return Ok((Some(attr), lease)),
                LookupState::Found { attr, needs_attrs: true } => {
                    self.hydrate(vec![attr.inode]).await?;
                }
                LookupState::Absent => {
                    if asked || !self.is_absence_old(parent) {
                        return Ok((None, lease));
                    }
                    asked = true;
                    let keys =
                        self.voter.peek(|_, r| r.s3_names(parent, name)).map_err(fs_error)?;
                    // A name that S3 can't have.
                    let Ok(keys) = keys else { return Ok((None, lease)) };
                    // What is known is served while S3 is away.
                    if !self.look_up(parent, name, &keys.0, &keys.1).await.unwrap_or(false) {
                        return Ok((None, lease));
                    }
                }
                LookupState::AskS3 { file_key, dir_key } => {
                    self.list_in_background(parent);
                    if !self.look_up(parent, name, &file_key, &dir_key).await? {
                        return Ok((None, None));
                    }
                }
            }
        }
        Err(changing())
    }

    /// Makes sure that the state machine knows whether a name is there, before a command that
    /// depends on it.
    pub(super) async fn know(
        self: &Arc<Self>,
        parent: InodeId,
        name: &[u8],
    ) -> FsResult<Option<InodeId>> {
        for _ in 0..ROUNDS_MAX {
            // The command checks again; only "ask S3" must not be missed, and a directory never
            // becomes less listed.
            let state = self.voter.peek(|_, r| r.lookup_state(parent, name)).map_err(fs_error)?;
            match state {
                Ok(LookupState::Found { attr, .. }) => return Ok(Some(attr.inode)),
                // Errors are the command's to report.
                Ok(LookupState::Absent) | Err(_) => return Ok(None),
                Ok(LookupState::AskS3 { file_key, dir_key }) => {
                    self.list_in_background(parent);
                    if !self.look_up(parent, name, &file_key, &dir_key).await? {
                        return Ok(None);
                    }
                }
            }
        }
        Err(changing())
    }

    async fn read_dir(
        self: &Arc<Self>,
        session: SessionId,
        dir: InodeId,
        after: &[u8],
        limit: u32,
    ) -> FsResult<QueryReply> {
        let limit = limit.clamp(1, PAGE_ENTRIES_MAX);
        if after.is_empty() {
            self.relist_for_reader(dir).await;
        }
        for _ in 0..PAGES_MAX {
            let query = Query::ReadDir { inode: dir, after: after.to_vec(), limit };
            // One look at both: between two, somebody could get the names and add some that the page lacks.
            let (page, due, origin, held, lease) = self
                .voter
                .read(|kv, r| {
                    let held = r.delegated_to_another(dir, session)?;
                    let page = Machine::query(kv, &query)?;
                    let mut due = Vec::new();
                    if let QueryReply::Page { entries, .. } = &page {
                        for e in entries {
                            if r.attr(e.attr.inode)?.1 {
                                due.push(e.attr.inode);
                            }
                        }
                    }
                    let mut lease = None;
                    if let QueryReply::Page { entries, .. } = &page
                        && due.is_empty()
                        && held.is_none()
                    {
                        let inodes = entries.iter().map(|e| e.attr.inode).chain([dir]);
                        lease = self.lease_page(session, inodes);
                    }
                    Ok((page, due, r.directory_origin(dir)?, held, lease))
                })
                .await
                .map_err(fs_error)??;
            if held.is_some() {
                self.may_look(session, dir).await?;
                continue;
            }
            let QueryReply::Page { mut entries, mut end } = page else {
                return Err(FsError::Io("a page was asked for".into()));
            };
            if let (prefix, Origin::Listing { continuation }) = &origin {
                let known = known_below(prefix, continuation);
                let sure = entries.iter().take_while(|e| e.name.as_slice() < known).count();
                let full = sure == entries.len() && !end;
                if !full && (sure == 0 || end) {
                    // Not even one entry is sure, or the listing may hold more behind the last:
                    // what is sure is answered only when it fills a page or S3 was asked on.
                    self.list_page(dir).await?;
                    continue;
                }
                entries.truncate(sure);
                end = false;
            }
            let shown: Vec<InodeId> =
                due.into_iter().filter(|id| entries.iter().any(|e| e.attr.inode == *id)).collect();
            if shown.is_empty() {
                return Ok(match lease {
                    Some(lease) => QueryReply::LeasedPage { entries, end, lease },
                    None => QueryReply::Page { entries, end },
                });
            }
            self.hydrate(shown).await?;
        }
        Err(changing())
    }
}

/// The names below this bound are all known, when a prefix is listed up to a key.
///
/// Keys come in byte order and a directory's name stands in them with a `/`, so a directory `a` is
/// listed after a file `a-b`: unlisted names below the last key's own are just its proper prefixes
/// that are followed by a byte before `/`.
fn known_below<'a>(prefix: &str, continuation: &'a str) -> &'a [u8] {
    let Some(last) = continuation.strip_prefix(prefix) else { return b"" };
    let last = last.trim_end_matches('/').as_bytes();
    let cut = (1..last.len()).find(|&i| last[i] < b'/');
    &last[..cut.unwrap_or(last.len())]
}

#[cfg(test)]
mod tests {
    use super::known_below;

    /// Every name that a set of keys stands for and that is below the bound was seen by then.
    #[test]
    fn names_below_the_bound_are_all_listed() {
        let keys = ["p/a", "p/a-b", "p/a.txt", "p/a/x", "p/a0", "p/ab/y", "p/b b/z", "p/b/q"];
        let mut sorted: Vec<&str> = keys.to_vec();
        sorted.sort_unstable();
        let name = |key: &str| key["p/".len()..].split('/').next().unwrap_or_default().to_owned();
        for i in 0..sorted.len() {
            let bound = known_below("p/", sorted[i]).to_vec();
            let seen: Vec<String> = sorted[..=i].iter().map(|k| name(k)).collect();
            for key in &sorted[i + 1..] {
                let n = name(key);
                assert!(
                    n.as_bytes() >= bound.as_slice() || seen.contains(&n),
                    "{n} is below {bound:?} after {}",
                    sorted[i]
                );
            }
        }
        assert_eq!(known_below("p/", ""), b"");
    }
}
