//! Traffic of data nodes.

use ebb_dataplane_protocol::control::CoreStats;
use ebb_dataplane_protocol::replica::Wishes;
use ebb_dataplane_protocol::{ClusterMap, MapVersion, NodeId, PgId};
use rkyv::{Archive, Deserialize, Serialize};

/// From a data node to the leader.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub enum NodeCall {
    /// At start: says where it listens. A known store keeps its node id. Reply `Registered`.
    Register {
        /// Identity of its store, made when it was formatted.
        store: u128,
        /// Host clients connect to.
        host: String,
        /// One port per core.
        ports: Vec<u16>,
        /// Bytes for chunks.
        capacity_bytes: u64,
        /// Random per process start: an older process of the same store is superseded.
        boot: u128,
    },
    /// Renews the leases of all its groups. Reply `Lease`.
    Heartbeat {
        /// The node.
        node: NodeId,
        /// This process.
        boot: u128,
        /// Version of the map it works by, on all cores (an ack of that map).
        map_version: MapVersion,
        /// Per core.
        stats: Vec<CoreStats>,
        /// Groups with dirty data or pins.
        dirty_groups: Vec<PgId>,
        /// What its cores ask for the groups they are primary of.
        wishes: Wishes,
    },
}

/// Answers to data nodes.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub enum NodeReply {
    /// The node's id, the placement group count and the map.
    Registered {
        /// Its id.
        node: NodeId,
        /// The map.
        map: ClusterMap,
        /// Where the bucket is (JSON of the S3 configuration), so that only the metadata plane is
        /// configured with it.
        bucket_config: String,
    },
    /// The lease: valid for `lease_ms` from the moment the heartbeat was *sent*.
    Lease {
        /// Duration in ms.
        lease_ms: u64,
        /// The map, if newer than the node's.
        map: Option<ClusterMap>,
        /// This process was superseded or the node is gone: stop.
        stop: bool,
    },
}
