//! `Clean → Dirty(g) → Sealing(g) → Flushing(g) → Clean | Dirty(g+1)` (PROTOCOL §2–3).
//!
//! An inode is Clean only when S3 confirmed the object that holds exactly its generation, at the
//! key its path names (I3). The generation in Dirty is [`Inode::generation`].

use crate::inode::Inode;
use ebb_dataplane_protocol::{Generation, InodeId};
use ebb_metaplane_protocol::{FsError, Time};
use rkyv::{Archive, Deserialize, Serialize};

/// Where an inode is between a write and S3.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) enum Phase {
    /// S3 holds it.
    Clean,
    /// S3 does not hold it.
    Dirty,
    /// The primaries are being asked to end the generation; nothing above is granted yet.
    Sealing(Flush),
    /// The sealed generation goes to S3.
    Flushing(Flush),
}

/// A flush under way.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) struct Flush {
    /// The generation that ends.
    pub(crate) generation: Generation,
    pub(crate) via_temporary: bool,
    /// Nodes were asked to seal: they hold pins until told otherwise.
    pub(crate) needs_seal: bool,
    /// A writer's session ended meanwhile: if the seal is given up, fence instead.
    pub(crate) fence: bool,
    /// The least truncate since: the object's limit (§3).
    pub(crate) limit: u64,
    /// The attempt (Flushing).
    pub(crate) nonce: u128,
    /// Its key.
    pub(crate) key: String,
    /// The inode's `meta_version` that the object carries.
    pub(crate) meta_version: u64,
    /// The plan is a copy of the whole base with other attributes: none of our bytes are in it.
    pub(crate) copies_base: bool,
    /// Valid bytes of the old backing when the plan was made.
    pub(crate) old_valid_bytes: u64,
}

impl Phase {
    /// As the dirty queue and the leader see it.
    pub(crate) fn stage(&self) -> u8 {
        match self {
            Self::Clean | Self::Dirty => 0,
            Self::Sealing(_) => 1,
            Self::Flushing(_) => 2,
        }
    }
}

impl Inode {
    /// S3 does not hold it any more. The root has no object.
    pub(crate) fn mark_dirty(&mut self, now: Time) {
        // There is nothing of a lost file that could be stored.
        if self.phase == Phase::Clean && self.id != InodeId::ROOT && !self.lost {
            self.phase = Phase::Dirty;
            self.dirty_since = now;
        }
    }

    /// Attributes changed: S3's copy of them is old.
    pub(crate) fn changed(&mut self, now: Time) {
        self.meta_version += 1;
        self.ctime = now;
        self.mark_dirty(now);
    }

    /// The highest generation that may not be granted any more.
    pub(crate) fn floor(&self) -> Generation {
        let flushing = match &self.phase {
            Phase::Sealing(f) | Phase::Flushing(f) => f.generation,
            _ => Generation(0),
        };
        self.sealed_floor.max(self.view.clean_generation).max(flushing)
    }

    /// Steps above the floor, so that a write or a truncate is seen by a running flush.
    pub(crate) fn step_above_floor(&mut self) {
        self.generation = self.generation.max(self.floor().next());
    }

    /// Nodes may hold data that S3 does not.
    pub(crate) fn may_hold_dirty_data(&self) -> bool {
        self.is_file() && self.alloc_limit > 0 && self.generation > self.view.clean_generation
    }

    /// A generation below was ended by a fence (or by a flush that was given up), and its seals may
    /// still be on their way to some primary.
    pub(crate) fn may_be_fenced(&self) -> bool {
        let sealed = match &self.phase {
            // Its seals are at every primary, or truncates wait for it.
            Phase::Sealing(f) | Phase::Flushing(f) => f.generation,
            Phase::Clean | Phase::Dirty => Generation(0),
        };
        self.sealed_floor > self.view.clean_generation.max(sealed)
    }

    /// Whether S3 holds exactly this inode at `key`.
    pub(crate) fn is_settled_at(&self, key: &str) -> bool {
        let Some(b) = &self.view.backing else { return false };
        b.key == key
            && self.meta_version == self.stored_meta
            && (!self.is_file() || (b.length == self.size && b.limit >= b.length))
    }

    pub(crate) fn refuse_while_sealing(&self) -> Result<(), FsError> {
        match self.phase {
            Phase::Sealing(_) => Err(crate::again(crate::why::SEALING)),
            _ => Ok(()),
        }
    }
}
