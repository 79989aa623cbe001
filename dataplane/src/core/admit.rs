//! Which reads and writes may pass (PROTOCOL §2–6, §9), in one place.
//!
//! Order matters: placement before grants (another node knows better), grants before views (a view
//! without a grant says nothing). The store adds floor, freeze and window for writes.

use super::grants::Held;
use super::placement::{Claim, Refusal};
use super::{Buffer, PeerInfo, ShardCore};
use ebb_dataplane_protocol::data::DataContext;
use ebb_dataplane_protocol::{CHUNK_BYTES, FILE_BYTES_MAX, FileView, GrantMode, Header, Status};
use std::sync::Arc;

/// A request that passed.
pub(crate) struct Admitted {
    pub(crate) context: DataContext,
    pub(crate) claim: Claim,
    pub(crate) view: Arc<FileView>,
}

impl<B: Buffer> ShardCore<B> {
    /// Checks a read or write up to what the store knows.
    pub(crate) fn admit(
        &mut self,
        header: &Header,
        peer: PeerInfo,
        context: DataContext,
        write: bool,
    ) -> Result<Admitted, Refusal> {
        let end = header.chunk.start() + u64::from(header.offset) + u64::from(header.length);
        if header.length == 0
            || end > FILE_BYTES_MAX
            || u64::from(header.offset) + u64::from(header.length) > u64::from(CHUNK_BYTES)
        {
            return Err(Refusal::of(Status::BadRequest));
        }
        if context.session != peer.session {
            self.stats.refused_grants += 1;
            return Err(Refusal::of(Status::Forbidden));
        }
        let claim = Claim {
            inode: header.inode,
            chunk: header.chunk,
            pg: header.pg,
            epoch: context.pg_epoch,
            map_version: context.map_version,
        };
        let since = self.placement.admit(&claim, write, self.now_ms)?;
        if self.dropped.peek(&header.inode).is_some() {
            return Err(Refusal::of(Status::StaleView));
        }
        let Some(held) = self.grants.grant(header.inode, context.session) else {
            return Err(Refusal::of(Status::NeedGrant));
        };
        // Below the horizon the store has forgotten floors and contents.
        if held.least_map_version < since.max(self.store.grant_horizon()) {
            self.stats.refused_grants += 1;
            return Err(Refusal::of(Status::StaleEpoch));
        }
        let Some(view) = self.grants.view(header.inode) else {
            return Err(Refusal::of(Status::NeedGrant));
        };
        if context.view_version < view.version || !self.is_current(header.inode, &view) {
            return Err(Refusal::of(Status::StaleView));
        }
        if context.view_version > view.version {
            return Err(Refusal::of(Status::NeedGrant));
        }
        if write {
            self.admit_write(&held, &context, end)?;
        } else if context.content != view.content {
            return Err(Refusal::of(Status::StaleView));
        }
        Ok(Admitted { context, claim, view })
    }

    fn admit_write(&mut self, held: &Held, context: &DataContext, end: u64) -> Result<(), Refusal> {
        // A generation below the grant's was fenced; one above it needs its own grant. A write past
        // the limit needs a grant with a larger one: seals and cuts would not reach it (I2).
        if context.generation < held.generation {
            self.stats.refused_grants += 1;
            return Err(Refusal::of(Status::StaleGeneration));
        }
        if held.mode != GrantMode::Write
            || context.generation > held.generation
            || end > held.alloc_limit
        {
            self.stats.refused_grants += 1;
            return Err(Refusal::of(Status::NeedGrant));
        }
        Ok(())
    }
}
