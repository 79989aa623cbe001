//! Arena slots as the core's buffers: which pool and class each purpose draws from.
//!
//! Fills and edges have the background pool, so a burst of client requests never starves them, nor the
//! other way round. Upload bodies and checkpoint moves are heap memory that the core counts.

use crate::core::{Buffers, Purpose};
use ebb_ring::{Arena, Buf, Class, Pool};

/// An arena, seen by purpose.
#[derive(Debug)]
pub(crate) struct Slots {
    arena: Arena,
}

impl Slots {
    pub(crate) fn new(arena: Arena) -> Self {
        Self { arena }
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
            Purpose::Flush => Some(Buf::unpooled(bytes)),
        }
    }
}
