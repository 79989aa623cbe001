//! Extended attributes of files, directories and symbolic links.
//!
//! Most have none, and are asked for some all the same: by the kernel before a write, by `ls` for every file. That there
//! are none is answered from attributes that this client may use anyway. Nothing else is remembered.

use crate::Result;
use crate::error::ClientError;
use crate::fs::FileSystem;
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::attr::Attr;
use ebb_metaplane_protocol::xattr::{XattrMode, Xattrs, check_name};
use ebb_metaplane_protocol::{FsError, Op, OpReply, Query, QueryReply};

impl FileSystem {
    /// All extended attributes, in the order of their names.
    pub async fn xattrs(&self, inode: InodeId) -> Result<Xattrs> {
        if self.is_known_without_xattrs(inode) {
            return Ok(Xattrs::new());
        }
        match self.shared.cluster.query(Query::Xattrs(inode)).await? {
            QueryReply::Xattrs(xattrs) => Ok(xattrs),
            _ => Err(ClientError::Metadata("no extended attributes in the answer".into())),
        }
    }

    /// The value of one; ENODATA if there is none of that name.
    pub async fn xattr(&self, inode: InodeId, name: &[u8]) -> Result<Vec<u8>> {
        check_name(name)?;
        let xattrs = self.xattrs(inode).await?;
        let found = xattrs.into_iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value).ok_or_else(|| FsError::NoAttribute.into())
    }

    /// Sets one. EEXIST or ENODATA where it is not as `how` wants it, ENOSPC if all of the inode's would not fit into an
    /// object's metadata ([`ebb_metaplane_protocol::xattr`]); EOPNOTSUPP for names that are not kept.
    pub async fn set_xattr(
        &self,
        inode: InodeId,
        name: &[u8],
        value: &[u8],
        how: XattrMode,
    ) -> Result<Attr> {
        self.change_xattr(inode, name, Some(value.to_vec()), how).await
    }

    /// Removes one; ENODATA if there is none of that name.
    pub async fn remove_xattr(&self, inode: InodeId, name: &[u8]) -> Result<Attr> {
        self.change_xattr(inode, name, None, XattrMode::Any).await
    }

    async fn change_xattr(
        &self,
        inode: InodeId,
        name: &[u8],
        value: Option<Vec<u8>>,
        how: XattrMode,
    ) -> Result<Attr> {
        check_name(name)?;
        if let Some(unnamed) = self.shared.inode(inode).filter(|i| i.is_unnamed()) {
            unnamed.commit().await?;
        }
        let op = Op::SetXattr { inode, name: name.to_vec(), value, how };
        match self.shared.cluster.mutate(op, None).await? {
            (OpReply::Attr(attr), _) => Ok(self.shared.noticed(attr)),
            _ => Err(ClientError::Metadata("no attributes in the answer".into())),
        }
    }

    /// Whether attributes that need not be asked for say that there are none.
    fn is_known_without_xattrs(&self, inode: InodeId) -> bool {
        let cluster = &self.shared.cluster;
        if let Some(open) = self.shared.inode(inode) {
            let state = open.state();
            // Only this client knows of it, or writes it and shows its own view for a while.
            let own = state.may_ride() && state.attr_at.elapsed() < cluster.config.attr_age_max;
            if state.place.is_some() || (own && !state.told().xattrs) {
                return true;
            }
        }
        let known = cluster.leased.known(&Query::GetAttr(inode));
        matches!(known, Some(Ok(QueryReply::Attr(attr))) if !attr.xattrs)
    }
}
