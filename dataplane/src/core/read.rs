//! Reads of clients: admitted, put together, checked again, answered as a block-aligned superset.

use super::assembly::{Assembled, For, Wanted};
use super::placement::{Claim, Refusal};
use super::{Buffer, Owed, PeerInfo, Purpose, Reply, ShardCore, Waiter};
use ebb_dataplane_protocol::data::{DataContext, encode_checksums};
use ebb_dataplane_protocol::header::{FLAG_PREFETCH, FLAG_RANDOM, FLAG_SEQUENTIAL};
use ebb_dataplane_protocol::{ByteRange, Status};
use ebb_store::BLOCK;
use std::ops::Range;

/// A read between its admission and its answer.
#[derive(Debug)]
pub(crate) struct ReadTask {
    owed: Owed,
    claim: Claim,
    blocks: Range<u32>,
}

impl<B: Buffer> ShardCore<B> {
    pub(crate) fn read(&mut self, owed: Owed, peer: PeerInfo, body: &[u8]) {
        let header = owed.header;
        let context = match DataContext::decode(body) {
            Some((context, [])) if header.payload_bytes == 0 => context,
            _ => return self.refuse(owed, Refusal::of(Status::BadRequest)),
        };
        let admitted = match self.admit(&header, peer, context, false) {
            Ok(admitted) => admitted,
            Err(refusal) => return self.refuse(owed, refusal),
        };
        let start = header.offset / BLOCK as u32;
        let end = (header.offset + header.length).div_ceil(BLOCK as u32);
        let at = header.chunk.start() + u64::from(header.offset);
        let to = at + u64::from(header.length);
        if header.has(FLAG_PREFETCH) {
            let range = ByteRange { start: at, end: to };
            return self.prefetch(owed, header.inode, admitted.view, range);
        }
        let sequential = if header.has(FLAG_SEQUENTIAL | FLAG_RANDOM) {
            header.has(FLAG_SEQUENTIAL)
        } else {
            self.read_ahead.is_sequential(header.inode, admitted.context.session, at, to)
        };
        let id = self.next_id();
        let task = ReadTask { owed, claim: admitted.claim, blocks: start..end };
        self.reads.insert(id, task);
        let wanted = Wanted {
            inode: header.inode,
            chunk: header.chunk,
            blocks: start..end,
            view: admitted.view,
            pinned: None,
            remnant: false,
            purpose: Purpose::Reply,
            sequential,
        };
        self.assemble(wanted, For::Read(id));
    }

    /// What a read had to wait for is everywhere.
    pub(crate) fn read_again(&mut self, id: u64) {
        let Some((task, done)) = self.parked_reads.remove(&id) else { return };
        self.reads.insert(id, task);
        self.read_assembled(id, Ok(done));
    }

    /// Gives up a read that waits.
    pub(crate) fn refuse_read(&mut self, id: u64, refusal: Refusal) {
        if let Some((task, _)) = self.parked_reads.remove(&id) {
            self.refuse(task.owed, refusal);
        }
    }

    pub(crate) fn read_assembled(&mut self, id: u64, outcome: Result<Assembled<B>, Refusal>) {
        let Some(task) = self.reads.remove(&id) else { return };
        // What was put together is served only inside the lease and epoch (I5).
        let held = self.placement.still_holds(&task.claim, self.now_ms);
        let done = match held.and(outcome) {
            Ok(done) => done,
            Err(refusal) => return self.refuse(task.owed, refusal),
        };
        // Nobody sees what a fail-over could take back (R42).
        let (pg, key) = (task.claim.pg, (task.claim.inode, task.claim.chunk));
        if let Some(number) = self.open_op_of(pg, key) {
            self.parked_reads.insert(id, (task, done));
            return self.wait_op(pg, number, vec![Waiter::Read(id)]);
        }
        let bytes = task.blocks.len() * BLOCK;
        debug_assert_eq!(done.crcs.len(), task.blocks.len());
        self.stats.reads += 1;
        self.stats.read_bytes += bytes as u64;
        if done.missed {
            self.stats.misses += 1;
        } else {
            self.stats.hits += 1;
        }
        let body = encode_checksums(&done.crcs);
        let payload = done.into_pieces(bytes);
        let mut header =
            task.owed.header.reply(Status::Ok).with_body(&body).with_payload(bytes as u32);
        header.offset = task.blocks.start * BLOCK as u32;
        header.length = bytes as u32;
        self.send(Reply { conn: task.owed.conn, header, body, payload });
    }
}
