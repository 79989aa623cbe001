//! Extended attributes: a record of an inode beside its own, which says whether there is one.
//!
//! They are attributes like any other: changed, they make the inode dirty, and go into its object's metadata with the
//! rest; found in an object, they come with the rest. So there are never more of them than fit there
//! ([`xattr::XATTRS_TEXT_BYTES_MAX`]).

use crate::Reader;
use crate::inode::Inode;
use crate::kv::{Kv, KvRead};
use crate::tables::*;
use ebb_dataplane_protocol::{InodeId, codec};
use ebb_metaplane_protocol::xattr::{self, XattrMode, Xattrs};
use ebb_metaplane_protocol::{Attr, FsResult};

impl<K: KvRead> Reader<'_, K> {
    /// The extended attributes of an inode.
    pub(crate) fn xattrs(&self, n: &Inode) -> FsResult<Xattrs> {
        if !n.has_xattrs() {
            return Ok(Xattrs::new());
        }
        let record = self.xattr_record(n.id)?;
        record.ok_or_else(|| corrupt("inode: its extended attributes are missing"))
    }

    /// What the table has of an inode.
    pub(crate) fn xattr_record(&self, inode: InodeId) -> FsResult<Option<Xattrs>> {
        let Some(bytes) = self.0.get(&key(XATTR, &[&be(inode.0)])) else { return Ok(None) };
        let xattrs: Xattrs = codec::decode(&bytes).map_err(|_| corrupt("extended attributes"))?;
        // None of ours is empty, out of order, or more than fits an object.
        let text = xattr::text(&xattrs);
        match !xattrs.is_empty() && xattr::of_text(&text).as_ref() == Some(&xattrs) {
            true => Ok(Some(xattrs)),
            false => Err(corrupt("extended attributes")),
        }
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// Sets an extended attribute, or removes it.
    pub(crate) fn set_xattr(
        &mut self,
        inode: InodeId,
        name: &[u8],
        value: Option<&[u8]>,
        how: XattrMode,
    ) -> FsResult<Attr> {
        let mut n = self.read().inode(inode)?;
        self.read().refuse_in_shutdown()?;
        if !n.attrs_complete {
            return Err(crate::again(crate::why::ATTRIBUTES));
        }
        let mut xattrs = self.read().xattrs(&n)?;
        xattr::change(&mut xattrs, name, value, how)?;
        self.put_xattrs(&mut n, &xattrs);
        n.changed(self.now);
        let attr = n.attr();
        self.save(n)?;
        Ok(attr)
    }

    /// An inode that is about to be saved has these, and no others.
    pub(crate) fn put_xattrs(&mut self, n: &mut Inode, xattrs: &[(Vec<u8>, Vec<u8>)]) {
        let place = key(XATTR, &[&be(n.id.0)]);
        if !xattrs.is_empty() {
            self.kv.put(&place, &codec::encode(&xattrs.to_vec()));
        } else if n.has_xattrs() {
            self.kv.delete(&place);
        }
        n.set_has_xattrs(!xattrs.is_empty());
    }

    /// A record of an inode that does not say that it has one (a repair): what somebody set is kept, and stored.
    pub(crate) fn mend_xattrs(&mut self, inode: InodeId) -> FsResult<()> {
        let n = self.read().find_inode(inode)?;
        match (n, self.read().xattr_record(inode)) {
            (Some(mut n), Ok(Some(_))) if !n.has_xattrs() => {
                n.set_has_xattrs(true);
                n.changed(self.now);
                self.save(n)
            }
            (Some(n), Ok(_)) if n.has_xattrs() => Ok(()),
            (n, _) => {
                self.kv.delete(&key(XATTR, &[&be(inode.0)]));
                n.map_or(Ok(()), |n| self.miss_xattrs(n))
            }
        }
    }

    /// The record is gone (a repair). If S3 has all that the inode was, its object is asked what it says.
    pub(crate) fn miss_xattrs(&mut self, mut n: crate::inode::Loaded) -> FsResult<()> {
        if !n.has_xattrs() {
            return Ok(());
        }
        n.set_has_xattrs(false);
        if n.phase == crate::dirtiness::Phase::Clean && n.view.backing.is_some() {
            n.attrs_complete = false;
        }
        self.save(n)
    }
}
