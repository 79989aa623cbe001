//! Questions that a voter which follows answers, of its own state (docs/PROTOCOL.md, R60). What S3 has to be asked for,
//! and what another session has to be asked for, is the leader's: then there is no answer here.

use crate::raft::propose::now;
use crate::service::{Service, count, fs_error};
use ebb_dataplane_protocol::{InodeId, SessionId};
use ebb_metaplane_protocol::{Attr, FsError, FsResult, Query, QueryReply, Time};
use ebb_namespace::{KvRead, LookupState, Machine, Origin, Reader};

/// Whether a directory that was listed to its end then need not be listed again.
type IsFresh<'a> = &'a dyn Fn(Time) -> bool;

impl Service {
    /// The answer of a voter that follows, or `None`: the leader is to be asked. An error: this voter does not hear
    /// the leader, or is behind.
    pub(super) async fn follow(
        &self,
        session: SessionId,
        query: &Query,
    ) -> FsResult<Option<FsResult<QueryReply>>> {
        let limit = i64::try_from(self.config.timings.relist_ms).unwrap_or(i64::MAX);
        let time = now().0;
        let is_fresh =
            |listed: Time| time.saturating_sub(listed.0) < limit.saturating_mul(1_000_000);
        let read = self.voter.read_behind(|kv, _| answer(kv, session, query, &is_fresh));
        let found = read.await.map_err(fs_error)?;
        if found.is_some() {
            count(&self.counts.queries);
        }
        Ok(found)
    }
}

/// What the state alone says.
fn answer<K: KvRead>(
    kv: &K,
    session: SessionId,
    query: &Query,
    is_fresh: IsFresh<'_>,
) -> Option<FsResult<QueryReply>> {
    if !query.may_be_followed() {
        return None;
    }
    said(kv, session, query, is_fresh).transpose()
}

fn said<K: KvRead>(
    kv: &K,
    session: SessionId,
    query: &Query,
    is_fresh: IsFresh<'_>,
) -> FsResult<Option<QueryReply>> {
    let r = Reader(kv);
    let attr_reply = |attr: Option<Attr>| Ok(attr.map(QueryReply::Attr));
    match query {
        Query::Lookup { parent, name } => attr_reply(lookup(&r, session, *parent, name, is_fresh)?),
        Query::Resolve { path } => {
            if path.len() > ebb_namespace::limits::PATH_COMPONENTS_MAX {
                return Err(FsError::NameTooLong);
            }
            let mut found = complete(&r, InodeId::ROOT)?;
            for name in path {
                let Some(dir) = found else { return Ok(None) };
                found = lookup(&r, session, dir.inode, name, is_fresh)?;
            }
            attr_reply(found)
        }
        Query::GetAttr(inode) => attr_reply(complete(&r, *inode)?),
        Query::ReadLink(inode) | Query::Xattrs(inode) => match complete(&r, *inode)? {
            Some(_) => Machine::query(kv, query).map(Some),
            None => Ok(None),
        },
        Query::Parent(_) => match Machine::query(kv, query)? {
            QueryReply::Attr(parent) => attr_reply(complete(&r, parent.inode)?),
            _ => Ok(None),
        },
        Query::ReadDir { inode, after, .. } => {
            // A reader from the start sees what others made in the bucket, if that is a while ago.
            let is_due = |listed: Option<_>| after.is_empty() && !listed.is_none_or(is_fresh);
            if is_due(r.listed(*inode)?)
                || r.delegated_to_another(*inode, session)?.is_some()
                || matches!(r.directory_origin(*inode)?.1, Origin::Listing { .. })
            {
                return Ok(None);
            }
            let page = Machine::query(kv, query)?;
            let QueryReply::Page { entries, .. } = &page else { return Ok(None) };
            for entry in entries {
                if r.attr(entry.attr.inode)?.1 {
                    return Ok(None);
                }
            }
            Ok(Some(page))
        }
        _ => Ok(None),
    }
}

/// Attributes, unless S3 has to be asked for them first.
fn complete<K: KvRead>(r: &Reader<'_, K>, inode: InodeId) -> FsResult<Option<Attr>> {
    let (attr, due) = r.attr(inode)?;
    Ok((!due).then_some(attr))
}

/// An entry of a directory.
fn lookup<K: KvRead>(
    r: &Reader<'_, K>,
    session: SessionId,
    parent: InodeId,
    name: &[u8],
    is_fresh: IsFresh<'_>,
) -> FsResult<Option<Attr>> {
    let (state, held) = r.lookup_for(session, parent, name)?;
    match state {
        _ if held.is_some() => Ok(None),
        LookupState::Found { attr, needs_attrs: false } => Ok(Some(attr)),
        LookupState::Absent if r.listed(parent)?.is_none_or(is_fresh) => Err(FsError::NotFound),
        LookupState::Found { .. } | LookupState::Absent | LookupState::AskS3 { .. } => Ok(None),
    }
}
