//! Reads: the nodes' bytes, read ahead for sequential readers, with unacknowledged writes on top.
//!
//! A read takes its overlay of buffered writes and its read-ahead blocks under one lock. A block
//! fetched before a write was acknowledged is forgotten when the write leaves the buffer, under that
//! lock too; so a reader finds each of its own bytes in the buffer, in the block, or at the node.

use crate::Result;
use crate::error::ClientError;
use crate::inode::{Fetch, OpenInode, State};
use crate::readahead::{Detector, lay_over};
use crate::transfer;
use bytes::{Bytes, BytesMut};
use ebb_dataplane_protocol::{CHUNK_BYTES, ChunkIndex};
use futures::FutureExt;
use futures::future::try_join_all;
use std::sync::{Arc, PoisonError};
use std::time::Instant;
use tokio::task::JoinHandle;

/// A part of a read: a read-ahead block to slice, or a range to ask for.
enum Part {
    Block {
        fetch: Fetch,
        skip: usize,
        len: usize,
    },
    /// `hint`: flags of the request.
    Ask {
        start: u64,
        end: u64,
        hint: u16,
    },
}

/// Stops a fetch nobody waits for any more.
struct Abandon(JoinHandle<Result<Bytes>>);
impl Drop for Abandon {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl OpenInode {
    /// Reads up to `len` bytes at `offset`; fewer only at the end of the file.
    pub(crate) async fn read(
        self: &Arc<Self>,
        detector: &std::sync::Mutex<Detector>,
        offset: u64,
        len: u64,
    ) -> Result<Bytes> {
        let (overlay, parts, start, end) = {
            let mut state = self.state();
            if state.stale {
                return Err(ClientError::Stale);
            }
            let end = offset.saturating_add(len).min(state.size());
            if offset >= end {
                return Ok(Bytes::new());
            }
            let overlay = state.buffer.overlay(offset, end);
            if let [(s, bytes)] = &overlay[..]
                && *s == offset
                && bytes.len() as u64 == end - offset
            {
                return Ok(bytes.clone());
            }
            let config = &self.shared.cluster.config;
            let (block, window) = (config.read_block_bytes, config.read_window_bytes);
            let mut detector = detector.lock().unwrap_or_else(PoisonError::into_inner);
            let ahead = detector.observe(offset, end - offset, block, window);
            let hint = detector.hint();
            drop(detector);
            let parts = match ahead {
                0 => by_chunk(offset, end, hint),
                ahead => self.by_block(&mut state, offset, end, ahead, hint),
            };
            (overlay, parts, offset, end)
        };
        let mut pieces = try_join_all(parts.into_iter().map(|part| self.fetch(part))).await?;
        let base = match pieces.len() {
            1 => pieces.remove(0),
            _ => {
                let mut whole = BytesMut::with_capacity((end - start) as usize);
                for piece in &pieces {
                    whole.extend_from_slice(piece);
                }
                whole.freeze()
            }
        };
        Ok(lay_over(base, start, &overlay))
    }

    async fn fetch(&self, part: Part) -> Result<Bytes> {
        match part {
            Part::Ask { start, end, hint } => transfer::read(self, start, end, hint).await,
            Part::Block { fetch, skip, len } => Ok(fetch.await?.slice(skip..skip + len)),
        }
    }

    /// Parts from read-ahead blocks, which are begun here, those up to `ahead` past the end too.
    fn by_block(
        self: &Arc<Self>,
        state: &mut State,
        offset: u64,
        end: u64,
        ahead: u64,
        hint: u16,
    ) -> Vec<Part> {
        let config = &self.shared.cluster.config;
        let block = config.read_block_bytes;
        let size = state.size();
        let oldest = Instant::now().checked_sub(config.read_age_max);
        let mut parts = Vec::new();
        let mut at = offset;
        while at < end {
            let first = at / block * block;
            let upto = end.min(first + block);
            let (mut found, freed) = state.blocks.get(first, upto, upto - at, oldest);
            self.shared.read_budget.give(freed as usize);
            if found.is_none() && self.begin_block(state, first, size, true, hint) {
                let (begun, freed) = state.blocks.get(first, upto, upto - at, None);
                self.shared.read_budget.give(freed as usize);
                found = begun;
            }
            parts.push(match found {
                Some(fetch) => {
                    Part::Block { fetch, skip: (at - first) as usize, len: (upto - at) as usize }
                }
                None => Part::Ask { start: at, end: upto, hint },
            });
            at = upto;
        }
        let mut next = end.div_ceil(block) * block;
        while next < size && next < end + ahead {
            if !state.blocks.contains(next) && !self.begin_block(state, next, size, false, hint) {
                break;
            }
            next += block;
        }
        parts
    }

    /// Begins to fetch the block at `first`. `demanded`: older blocks of this file make room.
    fn begin_block(
        self: &Arc<Self>,
        state: &mut State,
        first: u64,
        size: u64,
        demanded: bool,
        hint: u16,
    ) -> bool {
        let end = size.min(first + self.shared.cluster.config.read_block_bytes);
        if end <= first {
            return false;
        }
        let len = (end - first) as usize;
        while !self.shared.read_budget.try_take(len) {
            let freed = if demanded { state.blocks.evict_one() } else { 0 };
            if freed == 0 {
                return false;
            }
            self.shared.read_budget.give(freed as usize);
        }
        // The task must not keep the inode alive: the inode keeps the task.
        let weak = Arc::downgrade(self);
        let task = self.shared.runtime.spawn(async move {
            let inode = weak.upgrade().ok_or(ClientError::BadHandle)?;
            transfer::read(&inode, first, end, hint).await
        });
        let mut task = Abandon(task);
        let fetch: Fetch = async move {
            match (&mut task.0).await {
                Ok(result) => result,
                Err(e) => Err(ClientError::Metadata(format!("a read was abandoned: {e}"))),
            }
        }
        .boxed()
        .shared();
        state.blocks.insert(first..end, fetch, Instant::now());
        true
    }
}

/// Parts of a range, one per chunk.
fn by_chunk(offset: u64, end: u64, hint: u16) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut start = offset;
    while start < end {
        let upto = end.min(ChunkIndex::of_offset(start).start() + u64::from(CHUNK_BYTES));
        parts.push(Part::Ask { start, end: upto, hint });
        start = upto;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_range_and_never_cross_a_chunk() {
        let chunk = u64::from(CHUNK_BYTES);
        for (a, b) in [(0, 1), (0, chunk), (chunk - 1, chunk + 1), (5, 3 * chunk + 7)] {
            let mut at = a;
            for part in by_chunk(a, b, 0) {
                let Part::Ask { start, end, .. } = part else { panic!("asked") };
                assert_eq!(start, at);
                assert_eq!(start / chunk, (end - 1) / chunk);
                at = end;
            }
            assert_eq!(at, b);
        }
    }
}
