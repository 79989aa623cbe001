//! A flush that finds another object in place of the one that holds its file's clean bytes.

use crate::kv::Kv;
use crate::tables::Ctx;
use ebb_metaplane_protocol::FsResult;
use ebb_metaplane_protocol::flush::{Adopt, BaseChange, BaseFound};

impl<K: Kv> Ctx<'_, K> {
    /// Changes nothing unless the file's base is still the one that the flush looked for.
    pub(crate) fn base_changed(&mut self, c: &BaseChange) -> FsResult<()> {
        let Some(n) = self.read().find_inode(c.inode)? else { return Ok(()) };
        let same = |b: &ebb_dataplane_protocol::Backing| b.key == c.key && b.etag == c.etag;
        if !n.view.backing.as_ref().is_some_and(same) {
            return Ok(());
        }
        let object = match &c.found {
            // It was made from the base.
            BaseFound::LeftOver(found) => return self.take_left_over(&c.key, found),
            BaseFound::Foreign(object) => Some(object.clone()),
            BaseFound::Gone => None,
        };
        let (lineage, old_etag) = (n.view.lineage, Some(c.etag.clone()));
        self.adopt(&Adopt { inode: c.inode, lineage, old_etag, object }).map(|_| ())
    }
}
