//! Both sides of the handshake of `ebb_dataplane_protocol::auth` (I12).

use crate::error::RpcError;
use crate::frame::{Frame, ReadError};
use bytes::Bytes;
use ebb_dataplane_protocol::auth::{self, Challenge, ClusterKey, Hello, Proof, Role};
use ebb_dataplane_protocol::{ClusterId, Header, NodeId, Opcode, SessionId, Status, codec};
use tokio::io::{AsyncRead, AsyncWrite};

/// Bytes of a handshake body at most.
const HANDSHAKE_BODY_MAX: u32 = 4096;

/// Who is calling.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The cluster key.
    pub key: ClusterKey,
    /// The cluster that is meant; zero: any that holds the key.
    pub cluster: ClusterId,
    /// What the caller is.
    pub role: Role,
    /// Its session, 0 if none.
    pub session: SessionId,
    /// Its node id, when it is a data node.
    pub node: NodeId,
    /// Which of the session's connections to this peer; a newer one of the same lane closes it.
    pub lane: u32,
    /// What a core of a data node says to another node's.
    pub peer: Option<auth::PeerHello>,
}

impl Identity {
    /// An identity without session, node or lane, for any cluster that holds the key.
    pub fn new(key: ClusterKey, role: Role) -> Self {
        Self {
            key,
            cluster: ClusterId::default(),
            role,
            session: SessionId(0),
            node: NodeId(0),
            lane: 0,
            peer: None,
        }
    }
}

/// 16 random bytes from the kernel.
pub(crate) fn nonce() -> std::io::Result<[u8; 16]> {
    let mut n = [0u8; 16];
    getrandom::fill(&mut n).map_err(|e| std::io::Error::other(format!("getrandom: {e}")))?;
    Ok(n)
}

/// The caller's side. Returns the cluster the server belongs to.
pub(crate) async fn connect(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    address: &str,
    identity: &Identity,
) -> Result<ClusterId, RpcError> {
    let failed = |reason: String| RpcError::Handshake { address: address.to_owned(), reason };
    let hello = Hello {
        nonce: nonce().map_err(|e| failed(e.to_string()))?,
        cluster: identity.cluster,
        role: identity.role,
        session: identity.session,
        node: identity.node,
        lane: identity.lane,
        peer: identity.peer,
    };
    let hello_bytes = auth::encode_hello(&hello);
    let ask =
        |opcode, body: Vec<u8>| Frame::new(Header::request(opcode, 0), body.into(), Bytes::new());
    ask(Opcode::Hello, hello_bytes.clone())
        .write(stream)
        .await
        .map_err(|e| failed(e.to_string()))?;
    let reply = next(stream).await.map_err(|e| failed(e.to_string()))?;
    if reply.header.status != Status::Ok {
        return Err(failed(String::from_utf8_lossy(&reply.body).into_owned()));
    }
    let challenge: Challenge = codec::decode(&reply.body)?;
    if !auth::check_server(&identity.key, &hello_bytes, &challenge) {
        return Err(RpcError::WrongKey { address: address.to_owned() });
    }
    if identity.cluster != ClusterId::default() && challenge.cluster != identity.cluster {
        return Err(failed(format!(
            "it belongs to cluster {}, not to {}",
            challenge.cluster, identity.cluster
        )));
    }
    let proof = auth::client_proof(&identity.key, &hello_bytes, &challenge.nonce);
    ask(Opcode::Prove, codec::encode(&Proof { proof }))
        .write(stream)
        .await
        .map_err(|e| failed(e.to_string()))?;
    let done = next(stream).await.map_err(|e| failed(e.to_string()))?;
    match done.header.status {
        Status::Ok => Ok(challenge.cluster),
        Status::Forbidden => Err(RpcError::WrongKey { address: address.to_owned() }),
        status => Err(failed(format!("{status:?}: {}", String::from_utf8_lossy(&done.body)))),
    }
}

/// The server's side: nothing but a proved hello gets past it.
pub(crate) async fn accept(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    key: &ClusterKey,
    cluster: ClusterId,
) -> Result<Hello, String> {
    let first = next(stream).await.map_err(|e| e.to_string())?;
    if first.header.opcode != Opcode::Hello || first.header.is_reply() {
        return Err("the first frame is not a hello".into());
    }
    let hello: Hello = codec::decode(&first.body).map_err(|e| e.to_string())?;
    let nonce_s = nonce().map_err(|e| e.to_string())?;
    if hello.cluster != ClusterId::default() && hello.cluster != cluster {
        let text = format!("this is cluster {cluster}, not {}", hello.cluster);
        let refusal = Frame::refusal(&first.header, Status::Forbidden, &text);
        refusal.write(stream).await.map_err(|e| e.to_string())?;
        return Err(text);
    }
    let challenge = Challenge {
        nonce: nonce_s,
        proof: auth::server_proof(key, &first.body, &nonce_s),
        cluster,
    };
    Frame::new(first.header.reply(Status::Ok), codec::encode(&challenge).into(), Bytes::new())
        .write(stream)
        .await
        .map_err(|e| e.to_string())?;
    let second = next(stream).await.map_err(|e| e.to_string())?;
    if second.header.opcode != Opcode::Prove || second.header.is_reply() {
        return Err("the second frame is not a proof".into());
    }
    let proof: Proof = codec::decode(&second.body).map_err(|e| e.to_string())?;
    if !auth::check_client(key, &first.body, &nonce_s, &proof.proof) {
        // The caller learns that it is the key, and nothing else.
        let _ = Frame::refusal(&second.header, Status::Forbidden, "wrong cluster key")
            .write(stream)
            .await;
        return Err("wrong cluster key".into());
    }
    Frame::new(second.header.reply(Status::Ok), Bytes::new(), Bytes::new())
        .write(stream)
        .await
        .map_err(|e| e.to_string())?;
    Ok(hello)
}

async fn next(stream: &mut (impl AsyncRead + Unpin)) -> Result<Frame, ReadError> {
    match Frame::read(stream, HANDSHAKE_BODY_MAX).await? {
        Some(frame) => Ok(frame),
        None => Err(ReadError::Io(std::io::ErrorKind::UnexpectedEof.into())),
    }
}
