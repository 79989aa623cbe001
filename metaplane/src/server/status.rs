//! How things are, for `ebb status` and the controller.

use crate::raft::propose::now;
use crate::service::{Service, fs_error};
use ebb_metaplane_protocol::admin::{CutOff, GroupStates, NodeStatus};
use ebb_metaplane_protocol::{ClusterStatus, FsResult};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A leader has taken the bucket by then, unless something is wrong.
const ATTACHED_WITHIN: Duration = Duration::from_secs(3);

/// What a person has to know of a node that is cut off.
fn cut_off_text(c: &CutOff, groups: usize) -> String {
    let since = c.since_ms / 1000;
    let node = c.node;
    match c.waiting.len() {
        0 if groups == 0 => format!("node {node} is cut off since {since} s; it holds nothing"),
        0 => format!(
            "node {node} is cut off since {since} s; S3 or other nodes have all that it held, its {groups} groups go to others"
        ),
        waiting => format!(
            "node {node} is cut off since {since} s, and {waiting} of its {groups} groups may have data that S3 \
             does not: they wait for it. Start it again on its directory; if that is lost, \
             `ebb node abandon {node}` says what would be given up"
        ),
    }
}

impl Service {
    pub(super) async fn status(&self) -> FsResult<ClusterStatus> {
        let (map, counts, sessions, (replicas, min_in_sync)) = self
            .voter
            .read(|_, r| -> FsResult<_> {
                Ok((r.map()?, r.counts()?, r.sessions()?, r.replication()?))
            })
            .await
            .map_err(fs_error)??;
        let oldest = counts.dirty_oldest.map_or(0, |t| now().0.saturating_sub(t.0).max(0) as u64);
        let mut moves = self.movers.wanted();
        moves.extend(
            map.pgs
                .iter()
                .enumerate()
                .filter(|(_, g)| g.moving)
                .map(|(i, _)| ebb_dataplane_protocol::PgId(i as u16)),
        );
        moves.sort_unstable();
        moves.dedup();
        let mut warnings: Vec<String> = self
            .conditions()
            .missing()
            .into_iter()
            .map(|name| {
                format!(
                    "the S3 server lacks the condition {name}: a change from outside at the same \
                     moment may be overwritten"
                )
            })
            .collect();
        // A new leader gets a moment to take it.
        if !self.owns_bucket()
            && (self.is_attached().await || self.liveness.leads_for() > ATTACHED_WITHIN)
        {
            warnings.push("the bucket is asleep or not owned: nothing is written to it".into());
        }
        let cut_off = self.cut_offs(&map).await?;
        for c in &cut_off {
            warnings.push(cut_off_text(c, map.groups_of(c.node).count()));
        }
        if counts.lost_files > 0 {
            warnings.push(format!(
                "{} files lost their data with a node that was abandoned: opening them is an error until \
                 they are removed or overwritten",
                counts.lost_files
            ));
        }
        let nodes: Vec<NodeStatus> = map.nodes.iter().map(|n| self.liveness.status(n.id)).collect();
        for n in &nodes {
            let damaged: u64 = n.cores.iter().map(|c| c.damaged_blocks).sum();
            if damaged > 0 {
                warnings.push(format!(
                    "node {}: {damaged} blocks of 4 KiB are damaged and not in S3; its log names the \
                     files. Reading them is an error; writing them again heals them",
                    n.node
                ));
            }
        }
        let mut counters = self.counts.named();
        let port = &self.port;
        for (name, value) in [
            ("connections", &port.accepted),
            ("refused_handshakes", &port.refused_handshakes),
            ("refused_frames", &port.refused_frames),
            ("connections_over_limit", &port.over_limit),
            ("requests", &port.requests),
        ] {
            counters.push((name.to_owned(), value.load(Ordering::Relaxed)));
        }
        counters.push(("notices_pending".into(), counts.notices));
        // Unlinked files that somebody may have open; no more than a page of them is counted.
        counters.push(("lingering_files".into(), self.lingering()?));
        counters.push(("moves_pending".into(), counts.moves));
        counters.push(("dirty_bytes".into(), self.liveness.dirty_bytes()));
        // Wanted until somebody holds the groups.
        let unheld = map.pgs.iter().any(|g| g.members.is_empty());
        let wake_wanted = self.wake_wanted.load(Ordering::Acquire) && unheld;
        if !unheld {
            self.wake_wanted.store(false, Ordering::Release);
        }
        let bucket = &self.config.bucket;
        let groups = GroupStates::of(&map, replicas);
        if groups.degraded > 0 {
            warnings.push(format!(
                "{} groups have fewer than {replicas} complete copies of what S3 does not have yet",
                groups.degraded
            ));
        }
        Ok(ClusterStatus {
            replicas,
            min_in_sync,
            groups,
            desired_nodes: counts.desired_nodes,
            wake_nodes: counts.wake_nodes,
            wake_wanted,
            moves,
            nodes,
            cut_off,
            lost_files: counts.lost_files,
            dirty_inodes: counts.dirty_inodes,
            dirty_oldest_ms: oldest / 1_000_000,
            pending_keys: counts.pending_keys,
            inodes: counts.inodes,
            sessions: sessions.into_iter().map(|s| format!("{} {}", s.0, s.1)).collect(),
            bucket: format!("s3://{}/{}", bucket.bucket, bucket.key_prefix()),
            warnings,
            s3_error: self.health.last_error(),
            shutting_down: counts.shutting_down,
            counters,
            map,
        })
    }
}
