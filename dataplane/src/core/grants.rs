//! The grants and views a core knows (PROTOCOL §2, §4, §9).
//!
//! A grant's MAC is checked once, when it is presented; afterwards a request names it by (inode,
//! session). Only the newest view of an inode is kept: a request under an older one is told so, a
//! request under a newer one has to present it. Both tables are bounded and forget the longest
//! unused (I9): forgetting costs a `NeedGrant`, never correctness, since floors and cuts are in the
//! store. Does not decide whether a request may pass: `admit` does.

use super::lru::Lru;
use ebb_dataplane_protocol::{
    FileView, Generation, Grant, GrantMode, InodeId, Lineage, MapVersion, SessionId, ViewVersion,
};
use ebb_store::BaseView;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Grants kept by a core.
pub(crate) const GRANTS_MAX: usize = 65_536;
/// Views kept by a core. A view holds a key of up to 1 KiB.
pub(crate) const VIEWS_MAX: usize = 32_768;

/// The part of a grant that requests are checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) mode: GrantMode,
    pub(crate) generation: Generation,
    pub(crate) least_map_version: MapVersion,
    pub(crate) alloc_limit: u64,
    pub(crate) view: ViewVersion,
}

impl Held {
    /// Which of two grants of a session is the later one.
    fn rank(&self) -> (ViewVersion, Generation, u64, MapVersion) {
        (self.view, self.generation, self.alloc_limit, self.least_map_version)
    }
}

/// How a presented view relates to the known one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// The core knows a newer one.
    Stale,
    /// The same.
    Same,
    /// To be installed; `lineage` is that of the view it replaces, if one is known, and the map by which that
    /// was installed: it says nothing of groups that this core leads since a later one.
    Newer { lineage: Option<(Lineage, MapVersion)> },
}

/// What of a view the store needs.
pub(crate) fn base_of(view: &FileView) -> BaseView {
    BaseView {
        content: view.content,
        valid_bytes: view.backing.as_ref().map_or(0, |b| b.valid_bytes()),
    }
}

/// A view, and the map by which it was installed.
struct Known {
    view: Arc<FileView>,
    at: MapVersion,
}

pub(crate) struct Grants {
    held: Lru<(InodeId, SessionId), Held>,
    /// The keys of `held` in order: a Drop notice names inodes.
    by_inode: BTreeSet<(InodeId, SessionId)>,
    views: Lru<InodeId, Known>,
    /// Views installed by an earlier map are not served by: they have to be presented again.
    served_from: MapVersion,
}

impl Grants {
    pub(crate) fn new(grants_max: usize, views_max: usize) -> Self {
        let (held, views) = (Lru::new(grants_max), Lru::new(views_max));
        Self { held, by_inode: BTreeSet::new(), views, served_from: MapVersion(0) }
    }

    pub(crate) fn view(&mut self, inode: InodeId) -> Option<Arc<FileView>> {
        let served_from = self.served_from;
        self.views.get(&inode).filter(|v| v.at >= served_from).map(|v| Arc::clone(&v.view))
    }

    pub(crate) fn freshness(&self, inode: InodeId, version: ViewVersion) -> Freshness {
        match self.views.peek(&inode) {
            Some(known) if known.view.version > version => Freshness::Stale,
            Some(known) if known.view.version == version && known.at >= self.served_from => {
                Freshness::Same
            }
            Some(known) => Freshness::Newer { lineage: Some((known.view.lineage, known.at)) },
            None => Freshness::Newer { lineage: None },
        }
    }

    /// Makes a view the inode's, by the map `at`, unless a newer one came in the meantime.
    pub(crate) fn install_view(&mut self, inode: InodeId, view: Arc<FileView>, at: MapVersion) {
        if self.views.peek(&inode).is_none_or(|known| known.view.version <= view.version) {
            self.views.insert(inode, Known { view, at });
        }
    }

    /// Remembers a grant. An older generation or limit never replaces a newer one.
    pub(crate) fn install(&mut self, grant: &Grant) {
        let new = Held {
            mode: grant.mode,
            generation: grant.generation,
            least_map_version: grant.least_map_version,
            alloc_limit: grant.alloc_limit,
            view: grant.view.version,
        };
        let key = (grant.inode, grant.session);
        if let Some(old) = self.held.peek(&key)
            && old.rank() > new.rank()
        {
            return;
        }
        self.by_inode.insert(key);
        if let Some(gone) = self.held.insert(key, new) {
            self.by_inode.remove(&gone);
        }
    }

    pub(crate) fn grant(&mut self, inode: InodeId, session: SessionId) -> Option<Held> {
        self.held.get(&(inode, session)).copied()
    }

    /// The inode is gone. As many steps as it has grants.
    pub(crate) fn forget(&mut self, inode: InodeId) {
        let all = (inode, SessionId(0))..=(inode, SessionId(u64::MAX));
        let keys: Vec<_> = self.by_inode.range(all).copied().collect();
        for key in keys {
            self.by_inode.remove(&key);
            self.held.remove(&key);
        }
        self.views.remove(&inode);
    }

    /// Every view that was installed by an earlier map than `at` has to be presented again. What lineage it was
    /// of is remembered.
    pub(crate) fn present_again(&mut self, at: MapVersion) {
        self.served_from = at;
    }

    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.held.len(), self.views.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_dataplane_protocol::{ClusterId, ContentId};

    fn grant(inode: u64, session: u64, view: u64, generation: u64) -> Grant {
        Grant {
            cluster: ClusterId(1),
            inode: InodeId(inode),
            mode: GrantMode::Write,
            generation: Generation(generation),
            session: SessionId(session),
            view: FileView { version: ViewVersion(view), ..FileView::default() },
            least_map_version: MapVersion(1),
            alloc_limit: 100,
        }
    }

    #[test]
    fn a_delayed_older_grant_never_replaces_a_newer_one() {
        let mut g = Grants::new(8, 8);
        g.install(&grant(1, 1, 5, 7));
        g.install(&grant(1, 1, 4, 9));
        g.install(&grant(1, 1, 5, 6));
        let held = g.grant(InodeId(1), SessionId(1)).expect("held");
        assert_eq!((held.view, held.generation), (ViewVersion(5), Generation(7)));
        assert!(g.grant(InodeId(1), SessionId(2)).is_none(), "grants are per session");
    }

    #[test]
    fn a_gone_inode_leaves_no_grant_and_no_others_go() {
        let mut g = Grants::new(16, 8);
        for step in 0..500u64 {
            g.install(&grant(step * 7 % 11, step * 5 % 3, 1, 1));
            assert!(g.by_inode.iter().all(|key| g.held.peek(key).is_some()));
            assert_eq!(g.by_inode.len(), g.held.len(), "step {step}");
            if step % 13 == 0 {
                let (before, gone) = (g.by_inode.clone(), InodeId(step % 11));
                g.forget(gone);
                assert!(g.by_inode.iter().all(|(inode, _)| *inode != gone));
                assert_eq!(g.held.len(), before.iter().filter(|(i, _)| *i != gone).count());
            }
        }
    }

    #[test]
    fn only_the_newest_view_stays() {
        let mut g = Grants::new(8, 8);
        let view = |v, c| {
            Arc::new(FileView {
                version: ViewVersion(v),
                content: ContentId(c),
                ..FileView::default()
            })
        };
        assert_eq!(g.freshness(InodeId(1), ViewVersion(3)), Freshness::Newer { lineage: None });
        g.install_view(InodeId(1), view(3, 30), MapVersion(1));
        g.install_view(InodeId(1), view(2, 20), MapVersion(1));
        assert_eq!(g.view(InodeId(1)).map(|v| v.content), Some(ContentId(30)));
        assert_eq!(g.freshness(InodeId(1), ViewVersion(2)), Freshness::Stale);
        assert_eq!(g.freshness(InodeId(1), ViewVersion(3)), Freshness::Same);
        assert!(matches!(g.freshness(InodeId(1), ViewVersion(4)), Freshness::Newer { .. }));
    }

    #[test]
    fn a_view_to_be_presented_again_is_not_served_and_its_lineage_is_known() {
        let mut g = Grants::new(8, 8);
        let view = |v, l| {
            Arc::new(FileView {
                version: ViewVersion(v),
                lineage: Lineage(l),
                ..FileView::default()
            })
        };
        g.install_view(InodeId(1), view(3, 9), MapVersion(4));
        g.present_again(MapVersion(5));
        assert!(g.view(InodeId(1)).is_none());
        let newer = Freshness::Newer { lineage: Some((Lineage(9), MapVersion(4))) };
        assert_eq!(g.freshness(InodeId(1), ViewVersion(3)), newer, "also the same one");
        assert_eq!(g.freshness(InodeId(1), ViewVersion(4)), newer);
        assert_eq!(g.freshness(InodeId(1), ViewVersion(2)), Freshness::Stale);
        g.install_view(InodeId(1), view(3, 9), MapVersion(5));
        assert!(g.view(InodeId(1)).is_some());
        assert_eq!(g.freshness(InodeId(1), ViewVersion(3)), Freshness::Same);
    }
}
