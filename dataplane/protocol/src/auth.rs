//! The handshake of every port (I12): a mutual HMAC-SHA256 challenge on the cluster key.
//!
//! ```text
//! client → server  Hello{nonce_c, role, session, node, peer}
//! server → client  Challenge{nonce_s, proof = HMAC(key, "ebb-server" ‖ hello ‖ nonce_s)}
//! client → server  Prove{proof = HMAC(key, "ebb-client" ‖ hello ‖ nonce_s)}
//! server → client  Ok
//! ```
//! Nothing else is served on a connection before the last step. Both nonces are 16 random bytes, so
//! that neither side's proof can be replayed; the hello is in the MAC, so that nobody alters it. The
//! channel itself is not encrypted (TLS comes later).

use crate::codec;
use crate::ids::{ClusterId, NodeId, SessionId};
use crate::map::ShardRef;
use hmac::{Hmac, KeyInit, Mac};
use rkyv::{Archive, Deserialize, Serialize};
use sha2::Sha256;

/// Bytes of a MAC.
pub const MAC_BYTES: usize = 32;

/// The secret that makes a process a member of the cluster. Made by `ebb up`, 32 random bytes.
#[derive(Clone)]
pub struct ClusterKey([u8; 32]);

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterKey(…)")
    }
}

/// A key file that is not 64 hexadecimal digits.
#[derive(Debug, thiserror::Error)]
#[error("a cluster key is 64 hexadecimal digits")]
pub struct BadKey;

impl ClusterKey {
    /// The key of 32 bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
    /// Parses the content of a key file (64 hexadecimal digits, surrounding white space ignored).
    pub fn from_hex(text: &str) -> Result<Self, BadKey> {
        let mut key = [0u8; 32];
        hex::decode_to_slice(text.trim(), &mut key).map_err(|_| BadKey)?;
        Ok(Self(key))
    }
    /// The content of a key file.
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }

    fn hmac(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes any key length");
        for part in parts {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }

    /// HMAC-SHA256 over length-prefixed parts.
    pub fn sign(&self, parts: &[&[u8]]) -> [u8; MAC_BYTES] {
        self.hmac(parts).finalize().into_bytes().into()
    }

    /// Whether `mac` signs the parts, in constant time.
    pub fn verify(&self, parts: &[&[u8]], mac: &[u8; MAC_BYTES]) -> bool {
        self.hmac(parts).verify_slice(mac).is_ok()
    }
}

/// What the caller is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub enum Role {
    /// A client (library, mount, command).
    Client,
    /// The metadata plane; may send `Control`.
    Meta,
    /// A data node.
    Data,
    /// The controller, and operators' tools; may ask a core for its counters.
    Controller,
    /// A core of a data node that calls a core of another one; says who in [`PeerHello`].
    Node,
}

/// What a core says of itself to another node's, and whom it means to reach. A port may have changed
/// hands since the caller's map was made: the wrong node's word must not count as the right one's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct PeerHello {
    /// The caller.
    pub from: ShardRef,
    /// Identity of its store.
    pub store: u128,
    /// Random identity of its process.
    pub boot: u128,
    /// Whom it calls.
    pub to: ShardRef,
    /// The store of that node, as the caller's map names it.
    pub to_store: u128,
}

/// First frame of every connection.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Hello {
    /// Caller's random nonce.
    pub nonce: [u8; 16],
    /// The cluster the caller means; a zero id means "any" (a first contact).
    pub cluster: ClusterId,
    /// What the caller is.
    pub role: Role,
    /// The caller's session (0 if none). One live connection per (session, core): a proved newer
    /// one closes the older before it takes a write (PROTOCOL §5).
    pub session: SessionId,
    /// The caller's node id when it is a data node.
    pub node: NodeId,
    /// Which of the session's connection slots this is; replacement is per (session, lane, core).
    pub lane: u32,
    /// Of [`Role::Node`], and of no other. One live connection per (calling core, lane, core): a proved
    /// newer one closes the older before its first request is taken.
    pub peer: Option<PeerHello>,
}

/// The server's answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Challenge {
    /// Server's random nonce.
    pub nonce: [u8; 16],
    /// Proof that the server holds the key.
    pub proof: [u8; MAC_BYTES],
    /// The cluster the server belongs to.
    pub cluster: ClusterId,
}

/// The client's proof.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Proof {
    /// Proof that the client holds the key.
    pub proof: [u8; MAC_BYTES],
}

/// The server's proof over the hello's encoded bytes.
pub fn server_proof(key: &ClusterKey, hello: &[u8], nonce_s: &[u8; 16]) -> [u8; MAC_BYTES] {
    key.sign(&[b"ebb-server", hello, nonce_s])
}
/// Whether the server proved itself.
pub fn check_server(key: &ClusterKey, hello: &[u8], c: &Challenge) -> bool {
    key.verify(&[b"ebb-server", hello, &c.nonce], &c.proof)
}
/// The client's proof over the hello's encoded bytes.
pub fn client_proof(key: &ClusterKey, hello: &[u8], nonce_s: &[u8; 16]) -> [u8; MAC_BYTES] {
    key.sign(&[b"ebb-client", hello, nonce_s])
}
/// Whether the client proved itself.
pub fn check_client(
    key: &ClusterKey,
    hello: &[u8],
    nonce_s: &[u8; 16],
    proof: &[u8; MAC_BYTES],
) -> bool {
    key.verify(&[b"ebb-client", hello, nonce_s], proof)
}

/// Encodes a hello; the bytes are what both proofs cover.
pub fn encode_hello(hello: &Hello) -> Vec<u8> {
    codec::encode(hello)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proofs_need_the_key_the_nonce_and_the_side() {
        let key = ClusterKey::new([7; 32]);
        let other = ClusterKey::new([8; 32]);
        let n = [1; 16];
        let p = client_proof(&key, b"hello", &n);
        assert!(check_client(&key, b"hello", &n, &p));
        assert!(!check_client(&other, b"hello", &n, &p));
        assert!(!check_client(&key, b"hellO", &n, &p));
        assert!(!check_client(&key, b"hello", &[2; 16], &p));
        let c = Challenge { nonce: n, proof: p, cluster: ClusterId(0) };
        assert!(!check_server(&key, b"hello", &c), "a client's proof reflected as a server's");
    }

    #[test]
    fn key_files_round_trip() {
        let key = ClusterKey::new([0xa5; 32]);
        let back = ClusterKey::from_hex(&format!(" {}\n", key.to_hex())).expect("valid");
        assert_eq!(back.to_hex(), key.to_hex());
        assert!(ClusterKey::from_hex("abc").is_err());
    }
}
