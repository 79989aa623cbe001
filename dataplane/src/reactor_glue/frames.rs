//! Framing: receive up to 16 KiB, parse every frame in it, the rest of a payload straight into its slot.
//!
//! A write's payload is laid at byte `offset % 4096` of its slot, so that its whole blocks go to the
//! device from where they were received. A frame that is not one (magic, length, checksum, a payload
//! where none belongs) closes its connection and raises a counter; nothing else happens (I12).

use super::conn::{Conn, IN_FLIGHT_MAX, Partial, Payload, RECEIVE_BYTES, Stage};
use super::{ConnRef, Glue};
use crate::core::{Event as CoreEvent, Reply, Request};
use ebb_dataplane_protocol::header::{BODY_BYTES_MAX_DATA, HEADER_BYTES};
use ebb_dataplane_protocol::{Header, Opcode, Status, crc32c};
use ebb_ring::{Buf, ConnId, NetError, Pool, Token};
use ebb_store::BLOCK;
use std::ops::Range;

/// Largest body of a handshake frame.
const HANDSHAKE_BODY_MAX: u32 = 4096;
/// How long a payload waits for a slot before it is answered `Busy`.
const SLOT_PATIENCE_MS: u64 = 1000;
/// Hint with that `Busy`.
const RETRY_SLOT_MS: u32 = 50;
/// Token of a receive straight into a slot.
const INTO_SLOT: Token = Token(1);

/// What one step of parsing came to.
enum Parsed {
    /// A whole frame without payload, or with one that was in the buffer whole.
    Frame(Header, Vec<u8>, Option<Buf>),
    /// The rest of a payload is being received, or waits for a slot.
    Later,
    /// More bytes are needed.
    More,
    /// Not a frame.
    Bad(String),
}

impl Glue {
    pub(super) fn received(
        &mut self,
        id: ConnId,
        buf: Buf,
        range: Range<usize>,
        result: Result<usize, NetError>,
    ) {
        let key = Self::conn_ref(id);
        let Some(conn) = self.conns.get_mut(&key) else { return };
        let into_slot = matches!(conn.partial, Some(Partial { payload: Payload::Receiving, .. }))
            && conn.buf.is_some();
        let n = match result {
            Ok(n) => n,
            Err(_) => {
                // The end of the stream, or of the network: what is half received is nobody's.
                if !into_slot {
                    conn.buf = Some(buf);
                }
                if !matches!(conn.stage, Stage::Ready(_)) && !conn.closing {
                    self.core.stats.refused_handshakes += 1;
                }
                return self.hang_up(key);
            }
        };
        if into_slot {
            debug_assert_eq!(n, range.len());
            let Some(partial) = conn.partial.take() else { return };
            self.dispatch(key, partial.header, partial.body, Some(buf));
        } else {
            conn.unparsed.end = range.start + n;
            conn.buf = Some(buf);
        }
        self.parse(key);
    }

    /// Parses what is there; posts the next receive.
    pub(super) fn parse(&mut self, key: ConnRef) {
        loop {
            let Some(conn) = self.conns.get_mut(&key) else { return };
            if conn.closing || conn.buf.is_none() || conn.in_flight >= IN_FLIGHT_MAX {
                return;
            }
            match self.parse_one(key) {
                Parsed::Frame(header, body, payload) => self.dispatch(key, header, body, payload),
                Parsed::Later => return,
                Parsed::More => return self.resume(key),
                Parsed::Bad(why) => return self.bad_frame(key, &why),
            }
        }
    }

    pub(super) fn bad_frame(&mut self, key: ConnRef, why: &str) {
        let Some(conn) = self.conns.get(&key) else { return };
        let peer = conn.peer;
        if matches!(conn.stage, Stage::Ready(_)) {
            self.core.stats.refused_frames += 1;
        } else {
            self.core.stats.refused_handshakes += 1;
        }
        tracing::warn!(core = self.index, %peer, why, "connection closed over a bad frame");
        self.hang_up(key);
    }

    fn parse_one(&mut self, key: ConnRef) -> Parsed {
        let now_ms = self.now_ms;
        let Some(conn) = self.conns.get_mut(&key) else { return Parsed::Later };
        let Conn { buf: Some(buf), unparsed, partial, stage, .. } = conn else {
            return Parsed::Later;
        };
        if partial.is_none() {
            let Some(bytes) = buf[unparsed.clone()].first_chunk::<HEADER_BYTES>() else {
                return Parsed::More;
            };
            let ready = matches!(stage, Stage::Ready(_));
            let body_max = if ready { BODY_BYTES_MAX_DATA } else { HANDSHAKE_BODY_MAX };
            let header = match Header::decode(bytes, body_max) {
                Ok(header) => header,
                Err(e) => return Parsed::Bad(e.to_string()),
            };
            if let Err(why) = expected(&header, ready) {
                return Parsed::Bad(why.into());
            }
            unparsed.start += HEADER_BYTES;
            let body = Vec::with_capacity(header.body_bytes.min(RECEIVE_BYTES as u32) as usize);
            *partial = Some(Partial { header, body, payload: Payload::None });
            conn.partial_ms = now_ms;
        }
        let Conn { buf: Some(buf), unparsed, partial: Some(frame), .. } = conn else {
            return Parsed::Later;
        };
        let wanted = frame.header.body_bytes as usize - frame.body.len();
        let take = wanted.min(unparsed.len());
        frame.body.extend_from_slice(&buf[unparsed.start..unparsed.start + take]);
        unparsed.start += take;
        if take < wanted {
            return Parsed::More;
        }
        match frame.payload {
            Payload::None if crc32c(&frame.body) != frame.header.body_crc => {
                Parsed::Bad("body checksum mismatch".into())
            }
            Payload::None if frame.header.payload_bytes == 0 => match conn.partial.take() {
                Some(p) => Parsed::Frame(p.header, p.body, None),
                None => Parsed::Later,
            },
            Payload::None | Payload::Waiting { .. } => self.parse_payload(key),
            Payload::Receiving => Parsed::Later,
            Payload::Discarding { left } => {
                let gone = left.min(unparsed.len());
                unparsed.start += gone;
                frame.payload = Payload::Discarding { left: left - gone };
                if left > gone {
                    return Parsed::More;
                }
                if let Some(p) = conn.partial.take() {
                    conn.in_flight += 1;
                    self.busy(key, p.header);
                }
                self.parse_one(key)
            }
        }
    }

    /// The body is here: gets a slot for the payload and what is here of it into it.
    fn parse_payload(&mut self, key: ConnRef) -> Parsed {
        let now_ms = self.now_ms;
        let Some(conn) = self.conns.get_mut(&key) else { return Parsed::Later };
        let Conn { buf: Some(buf), unparsed, partial: Some(frame), id, .. } = conn else {
            return Parsed::Later;
        };
        let len = frame.header.payload_bytes as usize;
        let head = frame.header.offset as usize % BLOCK;
        let need = (head + len).next_multiple_of(BLOCK);
        let pool = pool_of(&frame.header);
        let Some(mut slot) = super::slots::take(self.reactor.arena(), need, pool) else {
            if matches!(frame.payload, Payload::None) {
                frame.payload = Payload::Waiting { since_ms: now_ms };
                self.slotless.push_back(key);
            }
            return Parsed::Later;
        };
        let here = len.min(unparsed.len());
        slot[head..head + here].copy_from_slice(&buf[unparsed.start..unparsed.start + here]);
        unparsed.start += here;
        if here == len {
            return match conn.partial.take() {
                Some(p) => Parsed::Frame(p.header, p.body, Some(slot)),
                None => Parsed::Later,
            };
        }
        frame.payload = Payload::Receiving;
        let id = *id;
        let rest = head + here..head + len;
        if self.reactor.recv_exact(id, INTO_SLOT, slot, rest).is_err() {
            self.hang_up(key);
        }
        Parsed::Later
    }

    /// Connections that wait for a slot try again, oldest first; clients that wait too long are told `Busy`.
    /// Another core's stream would end by that: it waits, and what it sends next with it.
    pub(super) fn feed_slotless(&mut self) {
        // None left: those behind wait their turn, but not behind those of another pool.
        let mut empty: Vec<Pool> = Vec::new();
        for _ in 0..self.slotless.len() {
            let Some(key) = self.slotless.pop_front() else { break };
            let Some(conn) = self.conns.get_mut(&key).filter(|c| !c.closing) else { continue };
            let Some(Partial { payload, header, .. }) = conn.partial.as_mut() else { continue };
            let Payload::Waiting { since_ms } = *payload else { continue };
            let pool = pool_of(header);
            if empty.contains(&pool) {
                self.slotless.push_back(key);
                continue;
            }
            if pool == Pool::Clients && self.now_ms >= since_ms + SLOT_PATIENCE_MS {
                *payload = Payload::Discarding { left: header.payload_bytes as usize };
                self.parse(key);
                continue;
            }
            self.parse(key);
            let waits = self.conns.get(&key).and_then(|c| c.partial.as_ref());
            if waits.is_some_and(|p| matches!(p.payload, Payload::Waiting { .. })) {
                self.slotless.push_back(key);
                empty.push(pool);
            }
        }
    }

    fn busy(&mut self, key: ConnRef, header: Header) {
        let mut header = header.reply(Status::Busy).with_body(&[]);
        header.retry_after_ms = RETRY_SLOT_MS;
        self.reply(Reply { conn: key, header, body: Vec::new(), payload: Vec::new() });
    }

    /// A whole frame.
    fn dispatch(&mut self, key: ConnRef, header: Header, body: Vec<u8>, payload: Option<Buf>) {
        let Some(conn) = self.conns.get_mut(&key) else { return };
        if conn.closing {
            return;
        }
        conn.in_flight += 1;
        match &conn.stage {
            Stage::Ready(peer) => {
                let request = Request { conn: key, peer: *peer, header, body, payload };
                self.core.handle(self.now_ms, CoreEvent::Request(request));
            }
            Stage::Hello | Stage::Proof { .. } => self.handshake(key, header, body),
        }
    }
}

/// Whose slots a payload goes into.
fn pool_of(header: &Header) -> Pool {
    if header.opcode == Opcode::Replicate { Pool::Replication } else { Pool::Clients }
}

/// Whether a frame may come at this point, before anything is allocated for it.
fn expected(header: &Header, ready: bool) -> Result<(), &'static str> {
    if header.is_reply() {
        return Err("a reply where a request belongs");
    }
    if !ready {
        let opening = matches!(header.opcode, Opcode::Hello | Opcode::Prove);
        return if opening && header.payload_bytes == 0 { Ok(()) } else { Err("not a handshake") };
    }
    match header.opcode {
        Opcode::Write if header.payload_bytes == header.length && header.length > 0 => Ok(()),
        Opcode::Write => Err("a write whose payload is not its length"),
        Opcode::Replicate => Ok(()),
        Opcode::Hello | Opcode::Prove | Opcode::Meta | Opcode::Raft => {
            Err("an opcode of another port or stage")
        }
        _ if header.payload_bytes > 0 => Err("a payload where none belongs"),
        _ => Ok(()),
    }
}
