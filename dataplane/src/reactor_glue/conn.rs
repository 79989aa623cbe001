//! One connection: how far its handshake is, what is half received, how much it has in progress.

use super::{ConnRef, Glue};
use crate::core::PeerInfo;
use ebb_dataplane_protocol::auth::Hello;
use ebb_dataplane_protocol::{Header, SessionId, ShardRef};
use ebb_ring::{Buf, ConnId, Token};
use std::net::SocketAddr;
use std::ops::Range;

/// Bytes received at a time while frames are parsed.
pub(super) const RECEIVE_BYTES: usize = 16 << 10;
/// Requests of one connection in progress, or answered but not sent.
pub(super) const IN_FLIGHT_MAX: usize = 256;
/// A peer that has not proved itself by then is dropped.
const HANDSHAKE_MS: u64 = 5000;
/// A frame that is not complete by then is given up with its connection: it holds a slot.
const FRAME_MS: u64 = 30_000;

/// How far a connection is.
#[derive(Debug)]
pub(super) enum Stage {
    /// Nothing received.
    Hello,
    /// Challenged.
    Proof { hello: Box<Hello>, hello_bytes: Vec<u8>, nonce: [u8; 16] },
    /// Proved.
    Ready(PeerInfo),
}

/// A frame whose header is here.
#[derive(Debug)]
pub(super) struct Partial {
    pub(super) header: Header,
    pub(super) body: Vec<u8>,
    pub(super) payload: Payload,
}

/// Where the payload of a partial frame is.
#[derive(Debug)]
pub(super) enum Payload {
    /// Not looked at yet (the body is not complete), or there is none.
    None,
    /// No slot is free since then.
    Waiting { since_ms: u64 },
    /// Being received into its slot by the ring, which holds the slot.
    Receiving,
    /// Nobody had a slot for too long: thrown away, then answered `Busy`.
    Discarding { left: usize },
}

/// Whose connection: a newer one of the same lane closes the older one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Lane {
    /// A slot of a client's session.
    Session(SessionId, u32),
    /// A channel of another node's core.
    Core(ShardRef, u32),
}

#[derive(Debug)]
pub(super) struct Conn {
    pub(super) id: ConnId,
    pub(super) peer: SocketAddr,
    pub(super) stage: Stage,
    /// The receive buffer while no receive is out, and what of it is not parsed.
    pub(super) buf: Option<Buf>,
    pub(super) unparsed: Range<usize>,
    pub(super) partial: Option<Partial>,
    /// Frames answered or being answered whose reply is not sent.
    pub(super) in_flight: usize,
    pub(super) opened_ms: u64,
    /// When the partial frame began.
    pub(super) partial_ms: u64,
    /// Key in the table of lanes.
    pub(super) lane: Option<Lane>,
    pub(super) closing: bool,
}

impl Conn {
    /// Replies owed or not sent.
    pub(super) fn unsent(&self) -> usize {
        self.in_flight
    }
}

impl Glue {
    pub(super) fn accepted(&mut self, id: ConnId, peer: SocketAddr) {
        let conn = Conn {
            id,
            peer,
            stage: Stage::Hello,
            buf: Some(Buf::unpooled(RECEIVE_BYTES)),
            unparsed: 0..0,
            partial: None,
            in_flight: 0,
            opened_ms: self.now_ms,
            partial_ms: self.now_ms,
            lane: None,
            closing: false,
        };
        let key = Self::conn_ref(id);
        self.conns.insert(key, conn);
        self.resume(key);
    }

    /// Posts the next receive, if one is due.
    pub(super) fn resume(&mut self, key: ConnRef) {
        let draining = self.draining_since_ms.is_some();
        let Some(conn) = self.conns.get_mut(&key) else { return };
        if conn.closing || draining || conn.in_flight >= IN_FLIGHT_MAX {
            return;
        }
        if matches!(
            conn.partial,
            Some(Partial { payload: Payload::Waiting { .. } | Payload::Receiving, .. })
        ) {
            return;
        }
        let Some(buf) = conn.buf.take() else { return };
        // Frames are parsed as far as possible before: what is left is moved to the front.
        debug_assert!(conn.unparsed.end <= RECEIVE_BYTES);
        let mut buf = buf;
        let left = conn.unparsed.len();
        buf.copy_within(conn.unparsed.clone(), 0);
        conn.unparsed = 0..left;
        let id = conn.id;
        if let Err(r) = self.reactor.recv_some(id, Token(0), buf, left..RECEIVE_BYTES) {
            if let Some(conn) = self.conns.get_mut(&key) {
                conn.buf = Some(r.back);
            }
            self.hang_up(key);
        }
    }

    /// A reply left (or never will): one frame less in progress.
    pub(super) fn sent(&mut self, id: ConnId) {
        let key = Self::conn_ref(id);
        let Some(conn) = self.conns.get_mut(&key) else { return };
        conn.in_flight = conn.in_flight.saturating_sub(1);
        if conn.in_flight + 1 == IN_FLIGHT_MAX {
            // It was paused with parsed bytes waiting, perhaps.
            self.parse(key);
        }
    }

    pub(super) fn hang_up(&mut self, key: ConnRef) {
        let Some(conn) = self.conns.get_mut(&key) else { return };
        if !std::mem::replace(&mut conn.closing, true) {
            let id = conn.id;
            if let Some(lane) = conn.lane.take()
                && self.lanes.get(&lane) == Some(&key)
            {
                self.lanes.remove(&lane);
            }
            self.reactor.close(id);
        }
    }

    pub(super) fn closed(&mut self, id: ConnId) {
        let key = Self::conn_ref(id);
        if let Some(conn) = self.conns.remove(&key) {
            if let Some(lane) = conn.lane
                && self.lanes.get(&lane) == Some(&key)
            {
                self.lanes.remove(&lane);
            }
            if !matches!(conn.stage, Stage::Ready(_)) && !conn.closing {
                self.core.stats.refused_handshakes += 1;
            }
        }
    }

    /// Drops connections that never proved themselves and frames that never complete.
    pub(super) fn close_idle_handshakes(&mut self) {
        let now = self.now_ms;
        let late: Vec<(ConnRef, bool)> = self
            .conns
            .iter()
            .filter(|(_, c)| !c.closing)
            .filter_map(|(key, c)| {
                let ready = matches!(c.stage, Stage::Ready(_));
                let silent = !ready && now >= c.opened_ms + HANDSHAKE_MS;
                let stuck = ready && c.partial.is_some() && now >= c.partial_ms + FRAME_MS;
                (silent || stuck).then_some((*key, ready))
            })
            .collect();
        for (key, ready) in late {
            if ready {
                self.core.stats.refused_frames += 1;
            } else {
                self.core.stats.refused_handshakes += 1;
            }
            self.hang_up(key);
        }
    }
}
