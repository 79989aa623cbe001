//! The replicated log and state: openraft over our own segmented log ([`log`]), redb ([`state`]),
//! snapshot files ([`snapshot`]) and the cluster's own frames ([`network`]).
//!
//! Holds up I1 and I7 for metadata: an operation is answered only after its entry is on stable
//! storage of a quorum and applied; a restart replays it. Decides nothing about files: that is
//! `ebb-namespace`, which is applied here entry by entry.

pub mod dial;
pub mod disk;
pub mod follow;
pub mod identity;
pub mod kv;
mod layers;
pub mod log;
pub mod network;
pub mod propose;
mod rows;
mod skips;
pub mod snapshot;
pub mod state;
pub mod wire;

use bytes::Bytes;
use ebb_dataplane_protocol::codec::{self, Malformed};
use ebb_metaplane_protocol::{CommandReply, LogEntry};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use std::sync::Arc;

/// The data of one log entry: decoded once, encoded once, shared by log, cache and state machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Proposal {
    entry: Arc<LogEntry>,
    encoded: Bytes,
}

impl Proposal {
    /// Encodes an entry.
    pub fn new(entry: LogEntry) -> Self {
        let encoded = Bytes::from(codec::encode(&entry));
        Self { entry: Arc::new(entry), encoded }
    }
    /// Checks and decodes what a disk or a peer gave.
    pub fn decode(encoded: Bytes) -> Result<Self, Malformed> {
        let entry = Arc::new(codec::decode(&encoded)?);
        Ok(Self { entry, encoded })
    }
    /// The commands.
    pub fn entry(&self) -> &LogEntry {
        &self.entry
    }
    /// Their bytes, as the log holds them.
    pub fn encoded(&self) -> &Bytes {
        &self.encoded
    }
}

impl std::fmt::Display for Proposal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} commands", self.entry.commands.len())
    }
}

// openraft's messages carry serde bounds; ours travel in the log's own encoding (`wire`), and these
// exist so that the bounds hold with the same bytes.
impl Serialize for Proposal {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(&self.encoded)
    }
}
impl<'de> Deserialize<'de> for Proposal {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::deserialize(d)?;
        Self::decode(Bytes::from(bytes)).map_err(de::Error::custom)
    }
}

/// What applying an entry gave: one reply per command, in order. Empty for entries of openraft's own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Applied {
    /// The replies.
    pub replies: Vec<CommandReply>,
    /// What each has to wait for; empty: none for anything. Of this process, like the leases.
    pub waits: Vec<crate::leases::Waits>,
}

impl Serialize for Applied {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        if self.replies.len() > u32::MAX as usize {
            return Err(ser::Error::custom("too many replies"));
        }
        s.serialize_bytes(&codec::encode(&self.replies))
    }
}
impl<'de> Deserialize<'de> for Applied {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::deserialize(d)?;
        let replies = codec::decode(&bytes).map_err(de::Error::custom)?;
        Ok(Self { replies, waits: Vec::new() })
    }
}

/// Where a voter is, and which directory it votes with. The membership in the log holds one per voter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VoterNode {
    /// host:port
    pub addr: String,
    /// The directory's random name ([`identity`]): a voter that lost its directory has lost what it
    /// voted and acknowledged, so it is not the voter that this names. Empty: of an earlier version,
    /// not known yet.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub store: String,
}

impl std::fmt::Display for VoterNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.addr)
    }
}

/// The types of the metadata plane's Raft group.
#[derive(Debug, Clone, Copy, Default, Eq, PartialEq, Ord, PartialOrd)]
pub struct TypeConfig {}

// Written out, since the macro that fills in openraft's defaults takes no responder of our own.
impl openraft::RaftTypeConfig for TypeConfig {
    type D = Proposal;
    type R = Applied;
    type NodeId = u64;
    type Node = VoterNode;
    type Term = u64;
    type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>;
    type Vote = openraft::impls::Vote<Self::LeaderId>;
    type Payload = openraft::EntryPayload<Self::D, Self::NodeId, Self::Node>;
    type Entry =
        openraft::Entry<<Self::LeaderId as openraft::vote::RaftLeaderId>::Committed, Self::Payload>;
    type Responder<T>
        = propose::Callback<T>
    where
        T: openraft::OptionalSend + 'static;
    type Batch<T>
        = openraft::impls::InlineBatch<T>
    where
        T: openraft::OptionalSend + 'static;
    #[cfg(not(test))]
    type AsyncRuntime = openraft::impls::TokioRuntime;
    // The same, but for its chance: a simulated run can be replayed.
    #[cfg(test)]
    type AsyncRuntime = crate::sim::runtime::Seeded;
    type ErrorSource = openraft::impls::BoxedErrorSource;
}

/// A position in the log.
pub type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
/// An entry of the log.
pub type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
/// A vote.
pub type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
/// A leader as log ids name it.
pub type LeaderId = openraft::type_config::alias::CommittedLeaderIdOf<TypeConfig>;
/// The voters, and the log position that set them.
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
/// The voters.
pub type Membership = openraft::Membership<u64, VoterNode>;
/// What a snapshot covers.
pub type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;
/// The node.
pub type Raft = openraft::Raft<TypeConfig, state::StateStore>;
