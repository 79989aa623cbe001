//! Arena slots as the core's buffers: which pool and class each purpose draws from.
//!
//! Fills and edges have the background pool, so a burst of client requests never starves them, nor the
//! other way round. Upload bodies, checkpoint moves and what goes to the spill device are heap memory that the core counts. Copies of blocks have
//! an arena of their own.

use crate::core::{Buffers, Purpose};
use ebb_ring::{Arena, Buf, Class, Pool};

/// Arenas, seen by purpose.
#[derive(Debug)]
pub(crate) struct Slots {
    arena: Arena,
    /// Copies of blocks.
    dram: Option<Arena>,
}

impl Slots {
    pub(crate) fn new(arena: Arena, dram: Option<Arena>) -> Self {
        Self { arena, dram }
    }
}

/// The smallest free slot that fits, at most one class up: a small request must not take the slots
/// that large ones wait for.
pub(crate) fn take(arena: &Arena, bytes: usize, pool: Pool) -> Option<Buf> {
    let fit = Class::for_len(bytes)?;
    arena.alloc(fit, pool).or_else(|| {
        let up = Class::ALL.into_iter().find(|c| *c > fit && *c < Class::Large4M)?;
        arena.alloc(up, pool)
    })
}

impl Buffers<Buf> for Slots {
    fn take(&mut self, bytes: usize, purpose: Purpose) -> Option<Buf> {
        match purpose {
            Purpose::Reply => take(&self.arena, bytes, Pool::Clients),
            Purpose::Edge | Purpose::Fill => take(&self.arena, bytes, Pool::Background),
            Purpose::Copy => take(&self.arena, bytes, Pool::Replication),
            Purpose::Flush | Purpose::Spill => Some(Buf::unpooled(bytes)),
            Purpose::Dram => self.dram.as_ref()?.alloc_len(bytes, Pool::Clients),
        }
    }
}
