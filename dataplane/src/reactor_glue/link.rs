//! One outgoing connection to another core: the caller's side of the handshake (I12), replies framed, and
//! their payloads received straight into the slots that the calls brought.
//!
//! Nothing here decides anything about calls: it says what a step came to, and `peers` acts on it.

use crate::core::{Channel, LinkId, Want};
use ebb_dataplane_protocol::auth::{self, Challenge, ClusterKey, Hello, PeerHello, Proof, Role};
use ebb_dataplane_protocol::header::{BODY_BYTES_MAX_DATA, HEADER_BYTES};
use ebb_dataplane_protocol::{
    ClusterId, Header, NodeId, Opcode, SessionId, ShardRef, Status, codec, crc32c,
};
use ebb_ring::{Buf, ConnId};
use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes received at a time while frames are parsed.
pub(super) const RECEIVE_BYTES: usize = 16 << 10;

/// Request ids of the handshake; calls have higher ones.
const HELLO_ID: u64 = 1;
const PROVE_ID: u64 = 2;
pub(super) const CALLS_FROM: u64 = 3;

/// How far a link is.
#[derive(Debug)]
pub(super) enum Stage {
    /// The socket is being connected.
    Connecting,
    /// The hello is out.
    Hello { hello: Vec<u8> },
    /// The proof is out.
    Proof,
    /// Calls may go.
    Ready,
}

/// A call whose bytes were given to the ring.
#[derive(Debug)]
pub(super) struct Sent {
    pub(super) token: crate::core::Token,
    pub(super) opcode: Opcode,
    pub(super) deadline_ms: u64,
    pub(super) want: Option<Want<Buf>>,
}

/// A reply whose header is here.
#[derive(Debug)]
struct Partial {
    header: Header,
    body: Vec<u8>,
}

/// An open socket.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) name: LinkId,
    pub(super) conn: ConnId,
    pub(super) stage: Stage,
    pub(super) opened_ms: u64,
    /// Messages in the ring's queue.
    pub(super) unsent: usize,
    /// Calls without a reply, by request id, which is also their order.
    pub(super) sent: BTreeMap<u64, Sent>,
    /// Something was answered on it: the other side works.
    pub(super) proved_useful: bool,
    /// The receive buffer while no receive into it is out, and what of it is not parsed.
    buf: Option<Buf>,
    unparsed: Range<usize>,
    partial: Option<Partial>,
    /// The call whose slot the ring holds.
    receiving: Option<u64>,
}

/// What one step of parsing came to.
#[derive(Debug)]
pub(super) enum Step {
    /// Receive more into the buffer, from that byte on.
    More(Buf, Range<usize>),
    /// Receive the rest of a payload into its slot.
    IntoSlot(Buf, Range<usize>),
    /// A receive is out.
    Wait,
    /// A reply of the handshake.
    Greeting(Header, Vec<u8>),
    /// A call's reply, whole.
    Reply(Sent, Header, Vec<u8>),
    /// Not a frame that belongs here.
    Bad(&'static str),
}

impl Link {
    pub(super) fn new(name: LinkId, conn: ConnId, now_ms: u64) -> Self {
        Self {
            name,
            conn,
            stage: Stage::Connecting,
            opened_ms: now_ms,
            unsent: 0,
            sent: BTreeMap::new(),
            proved_useful: false,
            buf: Some(Buf::unpooled(RECEIVE_BYTES)),
            unparsed: 0..0,
            partial: None,
            receiving: None,
        }
    }

    /// The buffer of a receive that failed.
    pub(super) fn give_back(&mut self, buf: Buf) {
        match self.receiving.take().and_then(|id| self.sent.get_mut(&id)?.want.as_mut()) {
            Some(want) => want.buf = buf,
            None => self.buf = Some(buf),
        }
    }

    /// `n` bytes arrived in `buf[range]`.
    pub(super) fn arrived(&mut self, buf: Buf, range: &Range<usize>, n: usize) -> Option<Step> {
        let Some(id) = self.receiving.take() else {
            self.unparsed.end = range.start + n;
            self.buf = Some(buf);
            return None;
        };
        debug_assert_eq!(n, range.len());
        let mut sent = self.sent.remove(&id)?;
        if let Some(want) = sent.want.as_mut() {
            want.buf = buf;
        }
        let partial = self.partial.take()?;
        Some(Step::Reply(sent, partial.header, partial.body))
    }

    /// The next thing to do with what is here.
    pub(super) fn step(&mut self) -> Step {
        if self.receiving.is_some() {
            return Step::Wait;
        }
        let Some(buf) = self.buf.as_ref() else { return Step::Wait };
        if self.partial.is_none() {
            let Some(bytes) = buf[self.unparsed.clone()].first_chunk::<HEADER_BYTES>() else {
                return self.more();
            };
            let Ok(header) = Header::decode(bytes, BODY_BYTES_MAX_DATA) else {
                return Step::Bad("a header that is none");
            };
            if let Err(why) = self.expected(&header) {
                return Step::Bad(why);
            }
            self.unparsed.start += HEADER_BYTES;
            let body = Vec::with_capacity((header.body_bytes as usize).min(RECEIVE_BYTES));
            self.partial = Some(Partial { header, body });
        }
        let Some(frame) = self.partial.as_mut() else { return Step::Wait };
        let wanted = frame.header.body_bytes as usize - frame.body.len();
        let take = wanted.min(self.unparsed.len());
        frame.body.extend_from_slice(&buf[self.unparsed.start..self.unparsed.start + take]);
        self.unparsed.start += take;
        if take < wanted {
            return self.more();
        }
        if crc32c(&frame.body) != frame.header.body_crc {
            return Step::Bad("a body whose checksum does not match");
        }
        if !matches!(self.stage, Stage::Ready) {
            return match self.partial.take() {
                Some(p) => Step::Greeting(p.header, p.body),
                None => Step::Wait,
            };
        }
        self.payload()
    }

    /// The body of a call's reply is here.
    fn payload(&mut self) -> Step {
        let (Some(frame), Some(buf)) = (self.partial.as_ref(), self.buf.as_ref()) else {
            return Step::Wait;
        };
        let (id, len) = (frame.header.request_id, frame.header.payload_bytes as usize);
        let here = len.min(self.unparsed.len());
        if here > 0
            && let Some(want) = self.sent.get_mut(&id).and_then(|s| s.want.as_mut())
        {
            let at = want.range.start;
            want.buf[at..at + here]
                .copy_from_slice(&buf[self.unparsed.start..self.unparsed.start + here]);
            self.unparsed.start += here;
        }
        if here == len {
            return match (self.sent.remove(&id), self.partial.take()) {
                (Some(sent), Some(p)) => Step::Reply(sent, p.header, p.body),
                _ => Step::Bad("a reply to nothing"),
            };
        }
        let Some(want) = self.sent.get_mut(&id).and_then(|s| s.want.as_mut()) else {
            return Step::Bad("a payload that nobody wants");
        };
        self.receiving = Some(id);
        let rest = want.range.start + here..want.range.start + len;
        // The slot is the ring's until the receive ends; an empty one keeps its place.
        Step::IntoSlot(std::mem::replace(&mut want.buf, Buf::unpooled(0)), rest)
    }

    /// Moves what is left to the front of the buffer and lends it out.
    fn more(&mut self) -> Step {
        let Some(mut buf) = self.buf.take() else { return Step::Wait };
        let left = self.unparsed.len();
        buf.copy_within(self.unparsed.clone(), 0);
        self.unparsed = 0..left;
        Step::More(buf, left..RECEIVE_BYTES)
    }

    /// Whether a reply may come now, before anything is allocated for it.
    fn expected(&self, header: &Header) -> Result<(), &'static str> {
        if !header.is_reply() {
            return Err("a request where a reply belongs");
        }
        let greeting = match self.stage {
            Stage::Connecting => return Err("a reply before anything was asked"),
            Stage::Hello { .. } => Some((Opcode::Hello, HELLO_ID)),
            Stage::Proof => Some((Opcode::Prove, PROVE_ID)),
            Stage::Ready => None,
        };
        if let Some(due) = greeting {
            let right = (header.opcode, header.request_id) == due && header.payload_bytes == 0;
            return if right { Ok(()) } else { Err("not the handshake's reply") };
        }
        let Some(sent) = self.sent.get(&header.request_id) else {
            return Err("a reply to nothing that was asked");
        };
        let room = sent.want.as_ref().map_or(0, |w| w.range.len());
        if sent.opcode != header.opcode {
            return Err("a reply of another kind");
        }
        if header.payload_bytes as usize > room {
            return Err("a payload longer than its slot");
        }
        Ok(())
    }
}

/// Who calls.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) key: ClusterKey,
    pub(crate) cluster: ClusterId,
    pub(crate) me: ShardRef,
    pub(crate) store: u128,
    pub(crate) boot: u128,
}

impl Caller {
    /// The first frame, and the hello's bytes, which both proofs cover.
    pub(super) fn hello(
        &self,
        (to, channel): (ShardRef, Channel),
        to_store: u128,
    ) -> Option<(Vec<u8>, Vec<u8>)> {
        let mut nonce = [0u8; 16];
        getrandom::fill(&mut nonce).ok()?;
        let peer = PeerHello { from: self.me, store: self.store, boot: self.boot, to, to_store };
        let hello = auth::encode_hello(&Hello {
            nonce,
            cluster: self.cluster,
            role: Role::Node,
            session: SessionId(0),
            node: NodeId(self.me.node.0),
            lane: channel as u32,
            peer: Some(peer),
        });
        Some((frame(Header::request(Opcode::Hello, HELLO_ID), &hello), hello))
    }

    /// The second frame, if the challenge is from somebody who holds the key.
    pub(super) fn proof(
        &self,
        hello: &[u8],
        header: &Header,
        body: &[u8],
    ) -> Result<Vec<u8>, String> {
        if header.status != Status::Ok {
            return Err(String::from_utf8_lossy(body).into_owned());
        }
        let challenge: Challenge = codec::decode(body).map_err(|e| e.to_string())?;
        if !auth::check_server(&self.key, hello, &challenge) {
            return Err("it does not hold the cluster's key".into());
        }
        if challenge.cluster != self.cluster {
            return Err(format!("it belongs to cluster {}", challenge.cluster));
        }
        let proof = auth::client_proof(&self.key, hello, &challenge.nonce);
        let body = codec::encode(&Proof { proof });
        Ok(frame(Header::request(Opcode::Prove, PROVE_ID), &body))
    }
}

/// A frame without payload.
pub(super) fn frame(header: Header, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend_from_slice(&header.with_body(body).encode());
    bytes.extend_from_slice(body);
    bytes
}
