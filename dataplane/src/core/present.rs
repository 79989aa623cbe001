//! Presenting a grant: the one place where a signature is checked, a view learned, a cut journaled.
//!
//! A newer view's cuts are durable before the inode is served under it (PROTOCOL §4). A view without
//! cuts of an inode that the store knows no view of needs no journal: reads name the content, so
//! older clean data is never used.

use super::control::{Finish, Step};
use super::grants::{Freshness, base_of};
use super::placement::Refusal;
use super::{Buffer, Owed, PeerInfo, ShardCore};
use ebb_dataplane_protocol::control::FlushDone;
use ebb_dataplane_protocol::grant::CUTS_MAX;
use ebb_dataplane_protocol::{
    ContentId, FileView, Grant, GrantMode, InodeId, Lineage, MapVersion, SignedGrant, Status, codec,
};
use ebb_store::{Scope, ViewUpdate};
use std::sync::Arc;

impl<B: Buffer> ShardCore<B> {
    pub(crate) fn present(&mut self, owed: Owed, peer: PeerInfo, body: &[u8]) {
        let Ok(signed) = codec::decode::<SignedGrant>(body) else {
            return self.refuse(owed, Refusal::of(Status::BadRequest));
        };
        let grant = match self.open_grant(&signed) {
            Some(grant) if grant.session == peer.session => grant,
            _ => {
                self.stats.refused_grants += 1;
                return self.refuse(owed, Refusal::of(Status::Forbidden));
            }
        };
        if self.placement.version() < grant.least_map_version {
            return self.await_map(grant.least_map_version, owed, Some(peer), body);
        }
        match self.view_steps(&grant) {
            Err(refusal) => self.refuse(owed, refusal),
            Ok(steps) => self.run_control(owed, steps, Finish::Present(Box::new(grant))),
        }
    }

    /// A grant whose signature, cluster and shape hold.
    pub(crate) fn open_grant(&self, signed: &SignedGrant) -> Option<Grant> {
        let grant = signed.open(&self.key).ok()?;
        (grant.cluster == self.cluster && grant.view.cuts.len() <= CUTS_MAX).then_some(grant)
    }

    /// A grant in a request of the metadata plane: of mode `Read`, of this inode.
    pub(crate) fn open_meta_grant(
        &mut self,
        signed: &SignedGrant,
        inode: Option<InodeId>,
    ) -> Option<Grant> {
        let grant = self
            .open_grant(signed)
            .filter(|g| g.mode == GrantMode::Read && inode.is_none_or(|wanted| wanted == g.inode));
        if grant.is_none() {
            self.stats.refused_grants += 1;
        }
        grant
    }

    /// Whether no flush has made a newer content of the inode here. Under an older view, what was dirty
    /// and is clean now would be taken for a hole (I4): it must be asked again, in every step that
    /// uses a view kept from before.
    pub(crate) fn is_current(&self, inode: InodeId, view: &FileView) -> bool {
        self.store.content(inode) <= view.content
    }

    /// What must be journaled before a grant's view serves, in every group held here.
    pub(crate) fn view_steps(&self, grant: &Grant) -> Result<Vec<Step>, Refusal> {
        let (inode, view) = (grant.inode, &grant.view);
        if self.dropped.peek(&inode).is_some() {
            return Err(Refusal::of(Status::StaleView));
        }
        let known = self.own_scopes(inode);
        let stored = known.iter().map(|s| self.store.view_version(*s).0).max().unwrap_or_default();
        let lineage = match self.grants.freshness(inode, view.version) {
            Freshness::Stale => return Err(Refusal::of(Status::StaleView)),
            Freshness::Same => return Ok(Vec::new()),
            Freshness::Newer { lineage } => lineage,
        };
        if stored > view.version || !self.is_current(inode, view) {
            return Err(Refusal::of(Status::StaleView));
        }
        let mut steps = Vec::new();
        steps.extend(known.iter().filter_map(|s| self.superseded_dirt(*s, view, lineage)));
        // A cut fences also groups of which nothing is known yet: a write may be on its way there.
        let all =
            if view.cuts.is_empty() { known } else { self.scopes_below(inode, grant.alloc_limit) };
        for scope in all {
            let (stored, durable) = self.store.view_version(scope);
            if !view.cuts.is_empty() || stored.0 > 0 || !durable {
                steps.push(Step::View(ViewUpdate {
                    scope,
                    version: view.version,
                    base: base_of(view),
                    cuts: view.cuts.clone(),
                }));
            }
        }
        steps.push(Step::Install(inode, Arc::new(view.clone())));
        Ok(steps)
    }

    /// Steps that append nothing where a view, or a newer one, was appended before: who takes them is answered when
    /// that is durable, and where it has to be (R14, R42).
    pub(crate) fn applied_steps(&self, grant: &Grant) -> Vec<Step> {
        let (inode, view) = (grant.inode, &grant.view);
        let mut scopes = self.scopes_below(inode, grant.alloc_limit);
        scopes.retain(|scope| self.store.view_version(*scope).0 >= view.version);
        let again = |scope| {
            let (version, base, cuts) = (view.version, base_of(view), view.cuts.clone());
            Step::View(ViewUpdate { scope, version, base, cuts })
        };
        scopes.into_iter().map(again).collect()
    }

    /// Dirty data that a committed flush put into S3 and whose `FlushDone` never came here is still
    /// right as long as only flushes changed the object. After an outside change (another lineage), or
    /// when the lineage it was written under is not known (since a restart, or since this core leads its group),
    /// it must not cover the new object.
    fn superseded_dirt(
        &self,
        scope: Scope,
        view: &FileView,
        known: Option<(Lineage, MapVersion)>,
    ) -> Option<Step> {
        let g = view.clean_generation;
        let led_since = self.placement.led(scope.pg)?.since_map_version;
        let same = known.is_some_and(|(lineage, at)| lineage == view.lineage && at >= led_since);
        if same || self.store.sealed(scope, g).is_none() {
            return None;
        }
        let done = FlushDone {
            inode: scope.inode,
            generation: g,
            content: view.content,
            // No content has this id: nothing clean is carried over, and the dirt is clipped at 0.
            old_content: ContentId(u64::MAX),
            valid_bytes: 0,
            old_valid_bytes: 0,
        };
        Some(Step::FlushDone(scope.pg, done))
    }
}
