//! Linearizable reads of clients. The server asks S3 first where [`crate::LookupState`] says so.

use crate::counters::Counter;
use crate::kv::KvRead;
use crate::limits::{PATH_COMPONENTS_MAX, RETRY_MS};
use crate::{Machine, Reader};
use ebb_dataplane_protocol::{InodeId, NodeState};
use ebb_metaplane_protocol::query::{DirEntry, PAGE_ENTRIES_MAX, StatFs};
use ebb_metaplane_protocol::{FileKind, FsError, FsResult, Query, QueryReply};

/// `FsError::Again` for a reason of [`crate::why`].
pub fn again(why: &str) -> FsError {
    FsError::Again { retry_after_ms: RETRY_MS, why: why.into() }
}

impl Machine {
    /// Answers a read.
    pub fn query<K: KvRead>(kv: &K, query: &Query) -> FsResult<QueryReply> {
        let r = Reader(kv);
        match query {
            Query::Lookup { parent, name } => {
                Ok(QueryReply::Attr(r.existing(*parent, name)?.attr()))
            }
            Query::Resolve { path } => {
                if path.len() > PATH_COMPONENTS_MAX {
                    return Err(FsError::NameTooLong);
                }
                let mut n = r.inode(InodeId::ROOT)?;
                for name in path {
                    n = r.existing(n.id, name)?;
                }
                Ok(QueryReply::Attr(n.attr()))
            }
            Query::GetAttr(inode) | Query::Compare(inode) | Query::Freshen(inode) => {
                Ok(QueryReply::Attr(r.inode(*inode)?.attr()))
            }
            Query::ReadDir { inode, after, limit } => {
                r.dir_inode(*inode)?;
                let limit = (*limit).clamp(1, PAGE_ENTRIES_MAX) as usize;
                let mut page = r.entries(*inode, after, limit + 1)?;
                let end = page.len() <= limit;
                page.truncate(limit);
                let mut entries = Vec::with_capacity(page.len());
                for (name, id) in page {
                    entries.push(DirEntry { name, attr: r.inode(id)?.attr() });
                }
                Ok(QueryReply::Page { entries, end })
            }
            Query::Lend(_) => Ok(QueryReply::Lent(None)),
            Query::Locked(..) => Err(FsError::Invalid("who asks for a lock matters".into())),
            Query::Xattrs(inode) => Ok(QueryReply::Xattrs(r.xattrs(&*r.inode(*inode)?)?)),
            Query::ReadLink(inode) => {
                let n = r.inode(*inode)?;
                match n.kind {
                    FileKind::Symlink => Ok(QueryReply::Link(n.target.clone())),
                    _ => Err(FsError::Invalid("not a symbolic link".into())),
                }
            }
            Query::Parent(inode) => {
                let parent = r.dir_inode(*inode)?.parent;
                Ok(QueryReply::Attr(r.inode(parent)?.attr()))
            }
            Query::Map { have, .. } => {
                let map = r.map()?;
                Ok(QueryReply::Map((map.version > *have).then_some(map)))
            }
            Query::StatFs => {
                let alive = |s| s != NodeState::Gone;
                let nodes = r.map()?.nodes;
                Ok(QueryReply::StatFs(StatFs {
                    inodes: r.counter(Counter::Inodes)?,
                    used_bytes: r.counter(Counter::UsedBytes)?,
                    capacity_bytes: nodes
                        .iter()
                        .filter(|n| alive(n.state))
                        .map(|n| n.capacity_bytes)
                        .sum(),
                    // Only the nodes know; the server adds it from their heartbeats.
                    dirty_bytes: 0,
                }))
            }
        }
    }
}
