//! `ebb node abandon`: what would be lost with a node that never comes back, and, when a person says so, its end (PROTOCOL R24).
//!
//! Everything is decided by the state machine; this collects what the person is told, and goes on until nothing of the node
//! is left. A run that stops in between has given up some files and no group: the node may still come back with the rest.

use super::mover::again;
use crate::service::{Service, fs_error};
use ebb_dataplane_protocol::{InodeId, NodeId};
use ebb_metaplane_protocol::admin::{AbandonReport, StrandedFile};
use ebb_metaplane_protocol::{Command, FsError, FsResult};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Files named in a report.
const NAMED_MAX: usize = 1_000;
/// Inodes of one command: each may have handles to end.
const BATCH: usize = 100;
/// Files whose objects are on their way to S3 are waited for.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);

impl Service {
    /// Says what would be lost; with `yes`, gives it up and takes the node out of the map.
    pub(crate) async fn abandon(&self, node: NodeId, yes: bool) -> FsResult<AbandonReport> {
        let map = self.voter.read(|_, r| r.map()).await.map_err(fs_error)??;
        if map.node(node).is_none() {
            return Err(FsError::Invalid(format!("there is no node {node}")));
        }
        let alive = || {
            FsError::Invalid(format!(
                "node {node} has a lease, or had one a moment ago: it is not lost. `ebb scale` takes \
                 nodes away without losing anything"
            ))
        };
        let wait = self.lease_wait();
        // All the while: what it would take in now would be lost with the rest.
        let bar = match yes {
            true => Some(self.liveness.bar(node, wait).ok_or_else(alive)?),
            false => None,
        };
        let (_, cut_off) = self.cut_off(node).await?.ok_or_else(alive)?;
        let mut held = self.held_by(node, cut_off)?;
        let mut report = self.report(&held)?;
        report.groups = map.groups_of(node).count() as u32;
        let Some(bar) = bar else { return Ok(report) };
        let begun = Instant::now();
        while !held.is_empty() {
            let inodes: Vec<InodeId> = held.into_iter().collect();
            for batch in inodes.chunks(BATCH) {
                let inodes = batch.to_vec();
                self.submit_internal(Command::AbandonInodes { node, cut_off, inodes }).await?;
            }
            held = self.held_by(node, cut_off)?;
            if !held.is_empty() {
                if begun.elapsed() > PATIENCE {
                    return Err(again("files are still on their way to S3; try again"));
                }
                self.wakes.keys.notify_one();
                tokio::time::sleep(PAUSE).await;
            }
        }
        if !bar.holds() {
            return Err(again("the leader changes"));
        }
        if let Err(e) = self.submit_internal(Command::RemoveNode { node, cut_off }).await {
            if !matches!(e, FsError::Invalid(_)) {
                bar.keep();
            }
            return Err(e);
        }
        tracing::warn!(%node, lost = report.lost, reverted = report.reverted, "the node was abandoned");
        self.wakes.notices.notify_one();
        self.wakes.groups.notify_one();
        report.done = true;
        Ok(report)
    }

    /// A node that is cut off and holds nothing leaves the map.
    pub(crate) async fn forget_node(&self, node: NodeId) -> FsResult<()> {
        let map = self.voter.read(|_, r| r.map()).await.map_err(fs_error)??;
        if map.groups_of(node).next().is_some() {
            return Err(FsError::Invalid(format!("node {node} still holds groups")));
        }
        self.abandon(node, true).await.map(drop)
    }

    /// Inodes of which a node may have the only copy.
    fn held_by(&self, node: NodeId, cut_off: u64) -> FsResult<BTreeSet<InodeId>> {
        let found = self.voter.peek(|_, r| -> FsResult<_> {
            let mut found = BTreeSet::new();
            for (pg, _) in r.map()?.only_on(node) {
                found.extend(r.held_in(pg, cut_off, None, usize::MAX)?);
            }
            Ok(found)
        });
        found.map_err(fs_error)?
    }

    fn report(&self, held: &BTreeSet<InodeId>) -> FsResult<AbandonReport> {
        let mut report = AbandonReport::default();
        for inode in held {
            let found = self.voter.peek(|_, r| r.given_up(*inode)).map_err(fs_error)??;
            let Some(file) = found else { continue };
            match file.stored.filter(|_| file.named) {
                Some(_) => report.reverted += 1,
                None => report.lost += 1,
            }
            if report.files.len() < NAMED_MAX {
                let path = match file.named {
                    true => self.path_text(*inode),
                    false => format!("an open file without a name (inode {inode})"),
                };
                let stored_bytes = file.stored.filter(|_| file.named);
                report.files.push(StrandedFile { path, bytes: file.size, stored_bytes });
            }
        }
        Ok(report)
    }
}
