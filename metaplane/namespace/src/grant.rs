//! Grants (PROTOCOL §2): committing one for writing *is* what makes the inode dirty (I2).

use crate::Reader;
use crate::counters::Counter;
use crate::inode::Inode;
use crate::kv::KvRead;
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::{FsError, FsResult, Time};

impl Inode {
    /// Checks that a write grant may be made, changing nothing.
    pub(crate) fn check_grant_write(&self, write_end: u64) -> FsResult<()> {
        self.refuse_while_sealing()?;
        if !self.attrs_complete {
            return Err(crate::again(crate::why::ATTRIBUTES));
        }
        if self.size.max(write_end) > FILE_BYTES_MAX {
            return Err(FsError::TooLarge);
        }
        Ok(())
    }

    /// Makes the inode ready for a write grant: dirty, at a generation that no seal ends.
    pub(crate) fn grant_write(&mut self, write_end: u64, now: Time) -> FsResult<()> {
        self.check_grant_write(write_end)?;
        self.reserve(self.size.max(write_end))?;
        self.step_above_floor();
        self.mark_dirty(now);
        Ok(())
    }
}

impl<K: KvRead> Reader<'_, K> {
    pub(crate) fn make_grant(
        &self,
        n: &Inode,
        session: SessionId,
        mode: GrantMode,
    ) -> FsResult<Grant> {
        Ok(Grant {
            cluster: self.cluster()?,
            inode: n.id,
            mode,
            generation: n.generation,
            session,
            view: n.view.clone(),
            least_map_version: self.map()?.version,
            alloc_limit: n.alloc_limit,
        })
    }

    /// The cluster's identity.
    pub fn cluster(&self) -> FsResult<ClusterId> {
        let high = u128::from(self.counter(Counter::ClusterHigh)?);
        let low = u128::from(self.counter(Counter::ClusterLow)?);
        Ok(ClusterId(high << 64 | low))
    }

    /// Truncates of the inode that not every primary has journaled yet. A truncate is answered to
    /// its client only when there are none left: a write under an older grant that a node acks
    /// before it journals the cut is ordered before the truncate.
    pub fn cuts_pending(&self, inode: InodeId) -> FsResult<bool> {
        Ok(self.find_inode(inode)?.is_some_and(|n| !n.view.cuts.is_empty()))
    }

    /// An unsigned grant of mode `Read` with the current view, for the leader's control calls.
    pub fn grant_view(&self, inode: InodeId) -> FsResult<Grant> {
        let n = self.inode(inode)?;
        self.make_grant(&n, SessionId(0), GrantMode::Read)
    }
}
