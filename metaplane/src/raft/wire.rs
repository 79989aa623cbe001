//! What voters send each other, as the body of a frame of opcode `Raft`.
//!
//! Fields are JSON (small, seldom, readable in a capture), entries are the log's own operations:
//! the follower stores the bytes that the leader stored.

use super::log::{decode_entry, encode_entry};
use super::{Entry, LogId, SnapshotMeta, TypeConfig, Vote};
use openraft::raft::{AppendEntriesRequest, VoteRequest};
use serde::{Deserialize, Serialize};

/// Bytes of entries in one request at most; the rest follows in the next.
const ENTRIES_BYTES_MAX: usize = 2 << 20;

/// A message, without its entries.
#[derive(Debug, Serialize, Deserialize)]
pub enum Message {
    /// Entries follow as bytes.
    Append {
        /// The leader's vote.
        vote: Vote,
        /// The entry before the first one.
        previous: Option<LogId>,
        /// How far the leader committed.
        commit: Option<LogId>,
        /// Entries that follow.
        entries: u32,
    },
    /// Asks for a vote.
    Vote(VoteRequest<TypeConfig>),
    /// Asks whether a vote would be given.
    PreVote(VoteRequest<TypeConfig>),
    /// The leader hands its lead over.
    Transfer {
        /// The leader's vote.
        vote: Vote,
        /// To whom.
        to: u64,
        /// What that one must have to lead.
        last: Option<LogId>,
    },
    /// The first word on a connection: who calls, and with which directory. Answered by [`Greeting`].
    Greet {
        /// The caller's id.
        id: u64,
        /// Its directory's name.
        store: String,
    },
    /// A voter that follows asks up to where it must have applied to answer what it was asked before it sent this.
    /// Answered by an index of the log.
    ReadIndex,
    /// A piece of a snapshot; the bytes are the frame's payload.
    Snapshot {
        /// The leader's vote.
        vote: Vote,
        /// What it covers.
        meta: SnapshotMeta,
        /// First byte of this piece in the file.
        offset: u64,
        /// Bytes of the file.
        total: u64,
    },
}

/// The answer to [`Message::Greet`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Greeting {
    /// Who answers.
    pub id: u64,
    /// Its directory's name.
    pub store: String,
    /// It has a log or has voted.
    pub initialized: bool,
    /// The caller's directory according to the membership that the answering voter knows; `None`: it is
    /// no member, or its directory is not known.
    pub yours: Option<String>,
}

/// A body that is no message.
#[derive(Debug, thiserror::Error)]
#[error("malformed Raft message: {0}")]
pub struct BadMessage(String);

/// A message and the bytes of its entries.
pub fn encode(message: &Message, entries: &[u8]) -> Vec<u8> {
    let json = serde_json::to_vec(message).expect("serialising to memory cannot fail");
    let mut body = Vec::with_capacity(4 + json.len() + entries.len());
    body.extend_from_slice(&(json.len() as u32).to_le_bytes());
    body.extend_from_slice(&json);
    body.extend_from_slice(entries);
    body
}

/// Splits and checks a body.
pub fn decode(body: &[u8]) -> Result<(Message, Vec<Entry>), BadMessage> {
    let bad = |what: &str| BadMessage(what.to_owned());
    let (length, rest) = body.split_first_chunk::<4>().ok_or_else(|| bad("too short"))?;
    let length = u32::from_le_bytes(*length) as usize;
    let (json, mut bytes) = rest.split_at_checked(length).ok_or_else(|| bad("too short"))?;
    let message: Message = serde_json::from_slice(json).map_err(|e| bad(&e.to_string()))?;
    let mut entries = Vec::new();
    if let Message::Append { entries: count, .. } = &message {
        for _ in 0..*count {
            let (entry, taken) = decode_entry(bytes).map_err(|e| bad(&e))?;
            entries.push(entry);
            bytes = &bytes[taken..];
        }
    }
    Ok((message, entries))
}

/// An append as a body; says after which entry it stopped if they do not all fit.
pub fn encode_append(request: &AppendEntriesRequest<TypeConfig>) -> (Vec<u8>, Option<LogId>) {
    let mut bytes = Vec::new();
    let mut sent = 0;
    for entry in &request.entries {
        if sent > 0 && bytes.len() >= ENTRIES_BYTES_MAX {
            break;
        }
        encode_entry(entry, &mut bytes);
        sent += 1;
    }
    let message = Message::Append {
        vote: request.vote,
        previous: request.prev_log_id,
        commit: request.leader_commit,
        entries: sent as u32,
    };
    let partial = (sent < request.entries.len()).then(|| request.entries[sent - 1].log_id);
    (encode(&message, &bytes), partial)
}
