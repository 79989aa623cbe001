//! Data nodes: registration and heartbeats. A heartbeat renews the lease of all groups of a node and
//! brings it the newer map.

use crate::service::{Service, fs_error};
use ebb_dataplane_protocol::replica::Wishes;
use ebb_metaplane_protocol::{Command, CommandReply, FsError, FsResult, NodeCall, NodeReply};

impl Service {
    pub(super) async fn node(&self, call: NodeCall) -> FsResult<NodeReply> {
        match call {
            NodeCall::Register { boot, .. } => {
                let reply = self.submit(Command::RegisterNode(call)).await?;
                let CommandReply::Node(node) = reply else {
                    return Err(super::unexpected(&reply));
                };
                let node = node?;
                self.liveness.registered(node, boot);
                self.wakes.groups.notify_one();
                let map = self.voter.read(|_, r| r.map()).await.map_err(fs_error)??;
                tracing::info!(%node, "a data node registered");
                let bucket_config = self.bucket_json.clone();
                Ok(NodeReply::Registered { node, map, bucket_config })
            }
            NodeCall::Heartbeat { node, boot, map_version, stats, dirty_groups, wishes } => {
                // Before the map is read: a stand-in that is decided later comes after this lease, one that is
                // under way is not in the map yet (R23).
                let leased = self.liveness.begin_lease(node);
                // Confirms that this process still leads: who does not must not give leases.
                let (map, known) = self
                    .voter
                    .read(|_, r| Ok::<_, FsError>((r.map()?, r.node_boot(node)?)))
                    .await
                    .map_err(fs_error)??;
                let stop = known != Some(boot);
                if !stop {
                    let asks = wishes != Wishes::default();
                    self.liveness.heard(node, boot, map_version, stats, dirty_groups, wishes);
                    if asks {
                        self.wakes.members.notify_one();
                    }
                    if self.liveness.pressed() {
                        self.wakes.flush.notify_one();
                    }
                }
                let map = (map.version > map_version).then_some(map);
                let lease_ms = if leased && !stop { self.config.timings.lease_ms } else { 0 };
                Ok(NodeReply::Lease { lease_ms, map, stop })
            }
        }
    }
}
