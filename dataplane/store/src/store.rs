//! The store (signatures first; bodies follow).
#![allow(clippy::unimplemented, unused_variables, missing_docs)]

use crate::device::{DeviceWrite, OpenDevice};
use crate::error::*;
use crate::geometry::{Geometry, Identity};
use crate::types::*;
use ebb_dataplane_protocol::control::{FlushDone, PgHolding};
use ebb_dataplane_protocol::*;
use std::ops::Range;

/// One core's store. See the crate's documentation for the life of a mutation.
#[derive(Debug)]
pub struct Store {}

/// The writes that make an empty store, in order; sync before the last four (the superblocks) and
/// after them. The device should be preallocated (zero-filled) by the caller; old contents do no harm.
pub fn format(geometry: Geometry, identity: Identity) -> Result<Vec<DeviceWrite>, GeometryError> {
    unimplemented!()
}

/// [`format`], carried out with its syncs.
pub fn format_device(
    device: &mut dyn OpenDevice,
    geometry: Geometry,
    identity: Identity,
) -> Result<(), FormatError> {
    unimplemented!()
}

/// Reads the identity of a formatted device without opening it.
pub fn identify(device: &mut dyn OpenDevice) -> Result<Identity, OpenError> {
    unimplemented!()
}

impl Store {
    // --- life ---------------------------------------------------------------------------------
    /// Recovers the store: superblock, checkpoint, journal; rebuilds the bitmap. Refuses with a reason.
    pub fn open(device: &mut dyn OpenDevice, cluster: ClusterId) -> Result<Self, OpenError> {
        unimplemented!()
    }
    /// Whose store it is.
    pub fn identity(&self) -> Identity {
        unimplemented!()
    }
    /// Its layout.
    pub fn geometry(&self) -> Geometry {
        unimplemented!()
    }
    /// Persists the node id the metadata plane gave.
    pub fn set_node(&mut self, node: NodeId) -> Result<Ticket, ControlError> {
        unimplemented!()
    }
    /// A device write or sync failed: from now on every mutation is refused and no batch is given.
    pub fn fail(&mut self) {
        unimplemented!()
    }
    pub fn failed(&self) -> bool {
        unimplemented!()
    }
    pub fn stats(&self) -> StoreStats {
        unimplemented!()
    }

    // --- writes and fills -----------------------------------------------------------------------
    /// Plans a write. Checks floor, freeze, window, overlap and space against everything appended so
    /// far (durable or not); edges come from durable state, which the overlap rule makes the same.
    /// The blocks stay locked for overlapping writes until the ticket is durable or the plan aborted.
    pub fn begin_write(&mut self, op: &WriteOp) -> Result<WritePlan, WriteError> {
        unimplemented!()
    }
    /// Appends the record. `crcs`: one CRC-32C per whole block of the buffer; `inline`: the buffer if the
    /// plan is inline, else empty. All device writes of the plan have completed. On an error the plan
    /// is aborted.
    pub fn commit_write(
        &mut self,
        id: WriteId,
        crcs: &[u32],
        inline: &[u8],
    ) -> Result<Ticket, WriteError> {
        unimplemented!()
    }
    /// Gives a plan up; none of its device I/O may be in flight.
    pub fn abort_write(&mut self, id: WriteId) {
        unimplemented!()
    }
    /// Plans a clean fill (not inline). `NoSpace`: serve without caching, and evict.
    pub fn begin_fill(&mut self, op: &FillOp) -> Result<FillPlan, WriteError> {
        unimplemented!()
    }
    /// Appends the fill; nobody needs to wait for the ticket. Blocks that became dirty or clean
    /// meanwhile keep what they have.
    pub fn commit_fill(&mut self, id: FillId, crcs: &[u32]) -> Result<Ticket, WriteError> {
        unimplemented!()
    }
    pub fn abort_fill(&mut self, id: FillId) {
        unimplemented!()
    }
    /// Whether (session, sequence) has been applied (durable), or is below `answered_below`.
    pub fn applied(&self, session: SessionId, sequence: Sequence) -> bool {
        unimplemented!()
    }
    /// The session raised its mark without writing: forget applied sequences below. Lazy.
    pub fn trim_session(
        &mut self,
        session: SessionId,
        below: Sequence,
    ) -> Result<Ticket, ControlError> {
        unimplemented!()
    }
    /// The session ended (its inodes are fenced): forget its window. Lazy.
    pub fn drop_session(&mut self, session: SessionId) -> Result<Ticket, ControlError> {
        unimplemented!()
    }

    // --- reads ----------------------------------------------------------------------------------
    /// Plans a read of blocks of a chunk; sees durable mutations only.
    pub fn plan_read(
        &mut self,
        inode: InodeId,
        chunk: ChunkIndex,
        blocks: Range<u32>,
        base: BaseView,
    ) -> ReadPlan {
        unimplemented!()
    }
    /// Plans a read of a sealed generation: its pins over the clean base. `None`: generation `g` is
    /// not sealed here (answer `NotSealed`).
    pub fn plan_read_pinned(
        &mut self,
        inode: InodeId,
        generation: Generation,
        chunk: ChunkIndex,
        blocks: Range<u32>,
        base: BaseView,
    ) -> Option<ReadPlan> {
        unimplemented!()
    }
    /// Ends a read: its device I/O is done.
    pub fn release(&mut self, guard: ReadGuard) {
        unimplemented!()
    }

    // --- control --------------------------------------------------------------------------------
    // `Ok(None)`: durable already, nothing to wait for.
    /// Seals generation `g`: floor g+1, pins of Dirty(<= g). When durable, [`Store::sealed`] answers.
    pub fn seal(&mut self, inode: InodeId, g: Generation) -> Result<Option<Ticket>, ControlError> {
        unimplemented!()
    }
    /// What the (durable) seal of `g` found; `None` if `g` is not sealed here.
    pub fn sealed(&self, inode: InodeId, g: Generation) -> Option<Sealed> {
        unimplemented!()
    }
    /// The flush of `g` committed.
    pub fn flush_done(&mut self, done: &FlushDone) -> Result<Option<Ticket>, ControlError> {
        unimplemented!()
    }
    /// The flush of `g` was given up: pins of <= g go.
    pub fn flush_aborted(
        &mut self,
        inode: InodeId,
        g: Generation,
    ) -> Result<Option<Ticket>, ControlError> {
        unimplemented!()
    }
    /// Installs a newer view: its cuts (each raises the floor past its generation), then clean data
    /// of older contents and past `valid_bytes` goes. `Ok(None)` if the view is not newer and durable.
    pub fn apply_view(&mut self, view: &ViewUpdate) -> Result<Option<Ticket>, ControlError> {
        unimplemented!()
    }
    /// Raises the floor of an inode (fences).
    pub fn set_floor(
        &mut self,
        inode: InodeId,
        floor: Generation,
    ) -> Result<Option<Ticket>, ControlError> {
        unimplemented!()
    }
    /// The inode is gone: everything of it goes; writes in flight are refused at commit.
    pub fn drop_inode(&mut self, inode: InodeId) -> Result<Option<Ticket>, ControlError> {
        unimplemented!()
    }
    /// Floor of an inode, of everything appended (durable or not).
    pub fn floor(&self, inode: InodeId) -> Generation {
        unimplemented!()
    }
    /// Version of the newest view appended (durable or not), and whether it is durable.
    pub fn view_version(&self, inode: InodeId) -> (ViewVersion, bool) {
        unimplemented!()
    }

    // --- placement groups -------------------------------------------------------------------------
    /// Freezes a group: writes of it are refused from now on (also those begun).
    pub fn freeze(&mut self, pg: PgId, epoch: PgEpoch) -> Result<Option<Ticket>, ControlError> {
        unimplemented!()
    }
    /// Lifts a freeze of this epoch; another epoch's freeze stays.
    pub fn thaw(&mut self, pg: PgId, epoch: PgEpoch) -> Result<Option<Ticket>, ControlError> {
        unimplemented!()
    }
    /// The group is others' as of `epoch`: refused while it has dirty data, pins or writes in flight;
    /// else its clean data and its freeze go.
    pub fn release_pg(&mut self, pg: PgId, epoch: PgEpoch) -> Result<Option<Ticket>, ControlError> {
        unimplemented!()
    }
    /// Epoch of the freeze, if the group is frozen (durable or not).
    pub fn frozen(&self, pg: PgId) -> Option<PgEpoch> {
        unimplemented!()
    }
    pub fn pg_status(&self, pg: PgId) -> PgHolding {
        unimplemented!()
    }

    // --- space ------------------------------------------------------------------------------------
    /// Appends evictions of the oldest clean chunks, about `bytes` of them. The space is free once the
    /// ticket is durable and readers are gone. `None`: nothing clean is left.
    pub fn evict(&mut self, bytes: u64) -> Result<Option<(u64, Ticket)>, ControlError> {
        unimplemented!()
    }
    /// Drops clean data of inodes, or (empty) of all.
    pub fn evict_clean(&mut self, inodes: &[InodeId]) -> Result<Option<Ticket>, ControlError> {
        unimplemented!()
    }

    // --- the journal --------------------------------------------------------------------------------
    /// Whether records wait for a batch, and whether somebody waits for one of them (false: only lazy
    /// records such as fills and evictions, which may wait for company).
    pub fn pending(&self) -> Pending {
        unimplemented!()
    }
    /// Closes the open batch. `None`: nothing waits, a batch is in flight, or the journal is full.
    pub fn take_batch(&mut self) -> Option<JournalBatch> {
        unimplemented!()
    }
    /// The batch is durable: its mutations take effect now. Returns their tickets in order: send the
    /// acks in this order.
    pub fn batch_durable(&mut self, id: BatchId) -> Result<Vec<Ticket>, CompletionError> {
        unimplemented!()
    }

    // --- checkpoint -----------------------------------------------------------------------------------
    /// Whether a checkpoint should be started (the journal is half full).
    pub fn checkpoint_due(&self) -> bool {
        unimplemented!()
    }
    /// Starts one, unless one runs.
    pub fn begin_checkpoint(&mut self) {
        unimplemented!()
    }
    /// The next step. Call again after each `checkpoint_done` and, on `Wait`, after `batch_durable` or
    /// `release`.
    pub fn checkpoint_step(&mut self) -> CheckpointStep {
        unimplemented!()
    }
    /// The step's I/O completed.
    pub fn checkpoint_done(&mut self, token: CheckpointToken) -> Result<(), CompletionError> {
        unimplemented!()
    }
}
