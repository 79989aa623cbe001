//! Peer reads: what moved away with its group is asked for at its former holder before it is fetched
//! from S3.
//!
//! **The one who asks** remembers, for a while, who was a group's primary before itself in the maps that it
//! saw. A fill of such a group asks that core first, once; whatever comes but the very bytes (not there,
//! busy, no connection) sends the fill to S3 with the same buffer. A holder that cannot be reached, or
//! has nothing time after time, is forgotten.
//!
//! **The one who is asked** keeps what a released group left (`ebb_store::remnant`) as space that counts as
//! free; what a group has that it was not told to release yet counts, too, as the new holder does not wait
//! for that. It answers without lease or epoch: clean data is named by its content (R34), so it can't be
//! stale, and the asker's view names the content and how many bytes of it count. Only another node's core
//! may ask (I12): there is no grant in the request.
//!
//! Checksums travel with the blocks, from the index there to the comparison here (I10).

use super::assembly::{Assembled, For, Wanted};
use super::fill::FillNo;
use super::placement::Refusal;
use super::{
    Answer, Buffer, Call, Channel, Command, Owed, PeerError, Pending, Purpose, Reply, ShardCore,
    Want,
};
use ebb_dataplane_protocol::checksum::crc32c;
use ebb_dataplane_protocol::data::{PeerRead, decode_checksums, encode_checksums};
use ebb_dataplane_protocol::{
    Backing, CHUNK_BYTES, ClusterMap, FileView, Header, Opcode, PgId, ShardRef, Status,
};
use ebb_store::BLOCK;
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// How long a former holder is asked, and how long one keeps what is left.
const KEPT_MS: u64 = 600_000;
/// Questions under way at once; more fills go straight to S3.
const ASKED_MAX: usize = 64;
/// Without an answer by then the link is broken: far above what a device takes.
const ASK_MS: u32 = 5000;
/// A holder that had nothing that often in a row is forgotten.
const NOTHING_MAX: u32 = 32;

#[derive(Debug)]
struct Holder {
    shard: ShardRef,
    until_ms: u64,
    /// Answers without bytes, in a row.
    nothing: u32,
}

/// Former holders of this core's groups, and groups that this core held before.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    holders: HashMap<PgId, Holder>,
    asked: usize,
    /// Groups given away, and until when what is left of them is kept; the earliest first.
    released: VecDeque<(u64, PgId)>,
}

/// A former holder's read between its request and its answer.
#[derive(Debug)]
pub(crate) struct PeerServe {
    owed: Owed,
    blocks: Range<u32>,
}

impl<B: Buffer> ShardCore<B> {
    // --- the one who asks ---------------------------------------------------------------------------

    /// A newer map is here: groups that came have a former holder.
    pub(crate) fn note_moves(&mut self, before: Option<Arc<ClusterMap>>) {
        let Some(before) = before.filter(|b| b.version < self.placement.version()) else { return };
        for (n, old) in before.pgs.iter().enumerate() {
            let pg = PgId(n as u16);
            if self.placement.own_epoch(pg).is_none() {
                self.moved.holders.remove(&pg);
                continue;
            }
            if let Some(shard) = old.primary().filter(|s| !self.placement.is_me(*s)) {
                let until_ms = self.now_ms + KEPT_MS;
                self.moved.holders.insert(pg, Holder { shard, until_ms, nothing: 0 });
            }
        }
    }

    /// Asks the former holder of a fill's group, if there is one; else gives the buffer back.
    pub(crate) fn ask_holder(&mut self, no: FillNo, buf: B) -> Option<B> {
        let Some(fill) = self.fills.get_mut(&no) else { return Some(buf) };
        let (inode, chunk, content) = fill.key;
        let count = self.placement.pg_count();
        if fill.asked || self.moved.asked >= ASKED_MAX || count == 0 {
            return Some(buf);
        }
        let pg = PgId::of_chunk(inode, chunk, count);
        let Some(holder) = self.moved.holders.get(&pg) else { return Some(buf) };
        if self.now_ms >= holder.until_ms {
            self.moved.holders.remove(&pg);
            return Some(buf);
        }
        fill.asked = true;
        let peer = holder.shard;
        let bytes = fill.blocks.len() * BLOCK;
        let valid_bytes = fill.view.backing.as_ref().map_or(0, Backing::valid_bytes);
        let header = Header {
            pg,
            inode,
            chunk,
            offset: fill.blocks.start * BLOCK as u32,
            length: bytes as u32,
            ..Header::request(Opcode::PeerRead, 0)
        };
        let body = PeerRead { content, valid_bytes }.encode().to_vec();
        self.moved.asked += 1;
        let token = self.expect(Pending::Asked(no, pg));
        self.out.push(Command::Call(Call {
            token,
            peer,
            channel: Channel::Bulk,
            link: None,
            header,
            body,
            payload: Vec::new(),
            want: Some(Want { buf, range: 0..bytes }),
            timeout_ms: ASK_MS,
        }));
        None
    }

    /// The former holder answered, or did not.
    pub(crate) fn holder_answered(&mut self, no: FillNo, pg: PgId, answer: Answer<B>) {
        self.moved.asked -= 1;
        let Some(buf) = answer.buf else {
            debug_assert!(false, "a wanted buffer comes back");
            return;
        };
        let bytes = self.fills.get(&no).map_or(0, |f| f.blocks.len() * BLOCK);
        let good = match &answer.outcome {
            Ok((header, body)) if header.status == Status::Ok => {
                let good = header.payload_bytes as usize == bytes
                    && matches_checksums(&buf.bytes()[..bytes], body);
                self.stats.checksum_errors += u64::from(!good);
                good
            }
            _ => false,
        };
        let gone = match &answer.outcome {
            Err(PeerError::Full) => false,
            Err(_) => true,
            Ok(_) => false,
        };
        if let Some(holder) = self.moved.holders.get_mut(&pg) {
            holder.nothing = if good { 0 } else { holder.nothing + 1 };
            if gone || holder.nothing >= NOTHING_MAX {
                self.moved.holders.remove(&pg);
            }
        }
        if good {
            self.stats.peer_reads += 1;
            self.fetched(no, buf, Ok(()));
        } else {
            self.fetch(no, buf);
        }
    }

    // --- the one who is asked -----------------------------------------------------------------------

    /// A group was given away: what is left of it is kept until then.
    pub(crate) fn note_released(&mut self, pg: PgId) {
        self.moved.released.retain(|(_, other)| *other != pg);
        self.moved.released.push_back((self.now_ms + KEPT_MS, pg));
    }

    /// Forgets what was kept long enough.
    pub(crate) fn forget_remnants(&mut self) {
        while let Some(&(until_ms, pg)) = self.moved.released.front() {
            if self.now_ms < until_ms {
                return;
            }
            self.moved.released.pop_front();
            self.store.drop_remnants(pg);
        }
    }

    /// Another core asks for what is left of a group that was held here.
    pub(crate) fn peer_read(&mut self, owed: Owed, body: &[u8]) {
        let h = owed.header;
        let block = BLOCK as u32;
        let aligned =
            h.length > 0 && h.offset.is_multiple_of(block) && h.length.is_multiple_of(block);
        let inside = u64::from(h.offset) + u64::from(h.length) <= u64::from(CHUNK_BYTES);
        let Some(ask) = PeerRead::decode(body).filter(|_| aligned && inside) else {
            return self.refuse(owed, Refusal::of(Status::BadRequest));
        };
        let blocks = h.offset / block..(h.offset + h.length) / block;
        let backing = Backing {
            key: String::new(),
            etag: String::new(),
            length: ask.valid_bytes,
            limit: ask.valid_bytes,
        };
        let view = FileView { content: ask.content, backing: Some(backing), ..FileView::default() };
        let id = self.next_id();
        self.peer_serves.insert(id, PeerServe { owed, blocks: blocks.clone() });
        let wanted = Wanted {
            inode: h.inode,
            chunk: h.chunk,
            blocks,
            view: Arc::new(view),
            pinned: None,
            remnant: true,
            purpose: Purpose::Fill,
            sequential: false,
        };
        self.assemble(wanted, For::Peer(id));
    }

    pub(crate) fn peer_assembled(&mut self, id: u64, outcome: Result<Assembled<B>, Refusal>) {
        let Some(PeerServe { owed, blocks }) = self.peer_serves.remove(&id) else { return };
        let done = match outcome {
            Ok(done) => done,
            Err(refusal) if refusal.status == Status::Busy => return self.refuse(owed, refusal),
            Err(_) => return self.refuse(owed, Refusal::of(Status::NotHere)),
        };
        let bytes = blocks.len() * BLOCK;
        let body = encode_checksums(&done.crcs);
        let payload = done.into_pieces(bytes);
        let header = owed.header.reply(Status::Ok).with_body(&body).with_payload(bytes as u32);
        self.send(Reply { conn: owed.conn, header, body, payload });
    }
}

/// Whether every block is what its checksum says.
fn matches_checksums(bytes: &[u8], body: &[u8]) -> bool {
    let Some(crcs) = decode_checksums(body) else { return false };
    crcs.len() * BLOCK == bytes.len()
        && bytes.chunks(BLOCK).zip(&crcs).all(|(block, crc)| crc32c(block) == *crc)
}
