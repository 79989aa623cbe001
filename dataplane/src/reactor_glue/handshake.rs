//! The server's side of the handshake (I12), and the replacement of older connections (PROTOCOL §5).
//!
//! A proved connection closes the older one of the same (session, lane) on this core before it can
//! send a write, so that frames still on their way in the old one never land after newer ones. The same holds
//! for another node's core, which has one connection per channel to this one.

use super::conn::{Lane, Stage};
use super::link::Caller;
use super::{ConnRef, Glue};
use crate::core::{PeerInfo, Reply};
use ebb_dataplane_protocol::auth::{self, Challenge, Hello, PeerHello, Proof, Role};
use ebb_dataplane_protocol::{ClusterId, Header, Opcode, SessionId, ShardRef, Status, codec};
use ebb_ring::Buf;

impl Glue {
    pub(super) fn handshake(&mut self, key: ConnRef, header: Header, body: Vec<u8>) {
        let Some(conn) = self.conns.get_mut(&key) else { return };
        let stage = std::mem::replace(&mut conn.stage, Stage::Hello);
        match (stage, header.opcode) {
            (Stage::Hello, Opcode::Hello) => self.challenge(key, header, body),
            (Stage::Proof { hello, hello_bytes, nonce }, Opcode::Prove) => {
                self.prove(key, header, &body, &hello, &hello_bytes, &nonce);
            }
            _ => self.bad_frame(key, "a handshake out of order"),
        }
    }

    fn challenge(&mut self, key: ConnRef, header: Header, body: Vec<u8>) {
        let Ok(hello) = codec::decode::<Hello>(&body) else {
            return self.bad_frame(key, "an unreadable hello");
        };
        if hello.cluster != ClusterId::default() && hello.cluster != self.caller.cluster {
            let text = format!("this is cluster {}, not {}", self.caller.cluster, hello.cluster);
            return self.refuse_handshake(key, header, &text);
        }
        let mut nonce = [0u8; 16];
        if getrandom::fill(&mut nonce).is_err() {
            return self.bad_frame(key, "no randomness for a challenge");
        }
        let challenge = Challenge {
            nonce,
            proof: auth::server_proof(&self.caller.key, &body, &nonce),
            cluster: self.caller.cluster,
        };
        let Some(conn) = self.conns.get_mut(&key) else { return };
        conn.stage = Stage::Proof { hello: Box::new(hello), hello_bytes: body, nonce };
        self.handshake_reply(key, header, Status::Ok, codec::encode(&challenge));
    }

    fn prove(
        &mut self,
        key: ConnRef,
        header: Header,
        body: &[u8],
        hello: &Hello,
        hello_bytes: &[u8],
        nonce: &[u8; 16],
    ) {
        let proved = codec::decode::<Proof>(body)
            .is_ok_and(|p| auth::check_client(&self.caller.key, hello_bytes, nonce, &p.proof));
        if !proved {
            // The caller learns that it is the key, and nothing else.
            return self.refuse_handshake(key, header, "wrong cluster key");
        }
        let node = match self.other_core(hello) {
            Ok(node) => node,
            Err(why) => return self.refuse_handshake(key, header, &why),
        };
        let Some(conn) = self.conns.get_mut(&key) else { return };
        conn.stage = Stage::Ready(PeerInfo { role: hello.role, session: hello.session, node });
        let lane = match node {
            Some(peer) => Some(Lane::Core(peer.from, hello.lane)),
            None if hello.session != SessionId(0) => Some(Lane::Session(hello.session, hello.lane)),
            None => None,
        };
        if let Some(lane) = lane {
            conn.lane = Some(lane);
            if let Some(older) = self.lanes.insert(lane, key) {
                self.hang_up(older);
            }
        }
        self.handshake_reply(key, header, Status::Ok, Vec::new());
    }

    /// Another node's core says who it is, and has to mean this one: its map may be older than the port's
    /// last change of hands.
    fn other_core(&self, hello: &Hello) -> Result<Option<PeerHello>, String> {
        match (hello.role, hello.peer) {
            (Role::Node, Some(peer)) => {
                let Caller { me, store, .. } = self.caller;
                if (peer.to, peer.to_store) == (me, store) {
                    Ok(Some(peer))
                } else {
                    let ShardRef { node, core } = me;
                    Err(format!("this is core {core} of {node}, or another store than is meant"))
                }
            }
            (Role::Node, None) => Err("a node says which core calls".into()),
            (_, Some(_)) => Err("only a node's core says which".into()),
            (_, None) => Ok(None),
        }
    }

    fn refuse_handshake(&mut self, key: ConnRef, header: Header, why: &str) {
        self.core.stats.refused_handshakes += 1;
        let Some(conn) = self.conns.get_mut(&key) else { return };
        tracing::warn!(core = self.index, peer = %conn.peer, why, "handshake refused");
        let id = conn.id;
        self.handshake_reply(key, header, Status::Forbidden, why.as_bytes().to_vec());
        if let Some(conn) = self.conns.get_mut(&key) {
            conn.closing = true;
        }
        self.reactor.close_when_sent(id);
    }

    fn handshake_reply(&mut self, key: ConnRef, header: Header, status: Status, body: Vec<u8>) {
        let header = header.reply(status).with_body(&body);
        self.reply(Reply::<Buf> { conn: key, header, body, payload: Vec::new() });
    }
}
