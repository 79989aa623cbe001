//! Flushes up to the first S3 call (PROTOCOL §3, §9): begin, seal, plan, give up.

use crate::dangling::{Intent, base_at};
use crate::directory::temporary_key;
use crate::dirtiness::{Flush, Phase};
use crate::inode::{Inode, Loaded};
use crate::key_state::{Attempt, Mutation};
use crate::kv::Kv;
use crate::link::Source;
use crate::lost_base::needs_lost_base;
use crate::tables::Ctx;
use ebb_dataplane_protocol::control::PutCondition;
use ebb_dataplane_protocol::{FileView, InodeId};
use ebb_metaplane_protocol::flush::*;
use ebb_metaplane_protocol::xattr::Xattrs;
use ebb_metaplane_protocol::{Attr, FileKind, FsResult};

/// What a store makes its object of.
pub(crate) struct Body {
    pub(crate) attr: Attr,
    pub(crate) xattrs: Xattrs,
    /// Where the clean bytes are.
    pub(crate) view: FileView,
    /// Of a symbolic link.
    pub(crate) target: Option<Vec<u8>>,
    pub(crate) length: u64,
    /// Nodes send it.
    pub(crate) from_nodes: bool,
    /// S3 copies the clean object.
    pub(crate) copied: bool,
    /// Of a file with several names: what all their objects say.
    pub(crate) link: Option<LinkTag>,
}

impl Body {
    pub(crate) fn of(n: &Inode, has_data: bool, xattrs: Xattrs) -> Self {
        let length = match n.kind {
            FileKind::File => n.size,
            FileKind::Symlink => n.target.len() as u64,
            FileKind::Directory | FileKind::HardLink => 0,
        };
        // The leader writes empty bodies, links and markers itself; a body of a file comes from the
        // nodes when there is dirt in it or when the base is not exactly the file.
        let whole_base =
            n.view.backing.as_ref().is_some_and(|b| b.length == n.size && b.limit >= b.length);
        let is_long = n.is_file() && n.size > 0;
        let from_nodes = is_long && (has_data || !whole_base);
        Self {
            attr: n.attr(),
            xattrs,
            link: (n.is_file() && n.has_links())
                .then(|| n.link_tag(n.next_content(), n.meta_version)),
            view: n.view.clone(),
            target: (n.kind == FileKind::Symlink).then(|| n.target.clone()),
            length,
            from_nodes,
            copied: is_long && !from_nodes,
        }
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// Dirty(g) → Sealing(g). Skipped: what is not dirty, has unacked cuts (its seal would report
    /// bytes that were cut), or has attributes that nobody looked up yet.
    pub(crate) fn flush_begin(
        &mut self,
        inodes: &[InodeId],
        via_temporary: bool,
    ) -> FsResult<Vec<FlushTicket>> {
        let mut tickets = Vec::new();
        for &id in inodes {
            let Some(mut n) = self.read().find_inode(id)? else { continue };
            // An unlinked-open inode has no dirtiness; it moves out of the way when asked to.
            let wanted = match n.phase {
                Phase::Dirty => n.nlink > 0 || via_temporary,
                Phase::Clean => n.nlink == 0 && via_temporary && n.view.backing.is_some(),
                _ => false,
            };
            if !wanted || id == InodeId::ROOT || !n.attrs_complete || !n.view.cuts.is_empty() {
                continue;
            }
            let needs_seal = n.may_hold_dirty_data();
            let generation = n.generation;
            if needs_seal {
                n.sealed_floor = n.sealed_floor.max(generation);
            }
            n.phase = Phase::Sealing(Flush {
                generation,
                via_temporary,
                needs_seal,
                fence: false,
                limit: u64::MAX,
                nonce: 0,
                key: String::new(),
                meta_version: 0,
                old_valid_bytes: 0,
                copies_base: false,
            });
            tickets.push(FlushTicket {
                inode: id,
                kind: n.kind,
                generation,
                needs_seal,
                alloc_limit: n.alloc_limit,
            });
            self.save(n)?;
        }
        Ok(tickets)
    }

    /// All primaries sealed: what is to be done, with the nonce logged before it is done.
    pub(crate) fn flush_sealed(&mut self, seals: &[SealedInode]) -> FsResult<Vec<FlushPlan>> {
        seals.iter().map(|s| self.plan(s)).collect()
    }

    fn plan(&mut self, s: &SealedInode) -> FsResult<FlushPlan> {
        let Some(mut n) = self.read().find_inode(s.inode)? else { return Ok(FlushPlan::Gone) };
        let mut f = match &n.phase {
            Phase::Sealing(f) if f.generation == s.generation => f.clone(),
            _ => return Ok(FlushPlan::Gone),
        };
        if f.needs_seal {
            // Acked bytes that no commit reported yet are part of the object: nodes drop clean data
            // past its end.
            n.merge_end(s.generation, s.high_water);
        }
        f.fence = false;
        let target =
            if f.via_temporary { Some(temporary_key(n.id)) } else { self.read().target_key(&n)? };
        let Some(target) = target else {
            self.give_up(n, f)?;
            return Ok(FlushPlan::Gone);
        };
        let has_data = f.needs_seal && s.has_data;
        if !has_data && !f.via_temporary && n.is_settled_at(&target) {
            self.release_pins(&n, &f)?;
            n.view.clean_generation = f.generation;
            n.phase = Phase::Clean;
            self.save(n)?;
            return Ok(FlushPlan::Clean);
        }
        if needs_lost_base(&n) {
            // It stays in Sealing, where a dead leader's work is simply given up.
            let plan = StorePlan {
                inode: n.id,
                generation: f.generation,
                attr: n.attr(),
                key: target,
                condition: PutCondition::None,
                nonce: s.nonce,
                view: n.view.clone(),
                has_data,
                target: None,
                xattrs: self.read().xattrs(&n)?,
                link: None,
            };
            n.phase = Phase::Sealing(f);
            self.save(n)?;
            return Ok(FlushPlan::Rescue(Box::new(plan)));
        }
        let body = match n.link_of() {
            None => Body::of(&n, has_data, self.read().xattrs(&n)?),
            Some(file) => match self.read().link_source(file)? {
                Source::Stored(body) => *body,
                Source::Unstored(file) => {
                    self.give_up(n, f)?;
                    return Ok(FlushPlan::Blocked { blocker: Some(file) });
                }
                Source::Lost => {
                    n.lost = true;
                    n.phase = Phase::Clean;
                    self.save(n)?;
                    return Ok(FlushPlan::Clean);
                }
            },
        };
        let mut state = self.read().key_state_or_owner(&target)?;
        let blocker = self.read().owner_of(&target)?.filter(|&o| o != n.id);
        let store = Mutation::Store {
            inode: n.id,
            generation: f.generation,
            length: body.length,
            meta_version: n.meta_version,
        };
        let copied = body.view.backing.as_ref().filter(|_| body.copied);
        let intent = Intent {
            what: &store,
            length: body.length,
            same_as: copied.map(|b| b.etag.as_str()),
            base: if body.from_nodes { base_at(&n, &target) } else { None },
        };
        let waits = state.attempt.is_some() || state.store_waits(&intent);
        if waits || blocker.is_some() || self.nonce_key(s.nonce)?.is_some() {
            self.give_up(n, f)?;
            if let Some(b) = blocker {
                self.unsettle(b)?;
            }
            return Ok(FlushPlan::Blocked { blocker });
        }
        state.delete = false;
        state.attempt = Some(Attempt::begin(s.nonce, store));
        self.put_key(&target, &state)?;
        self.log_nonce(s.nonce, &target);
        f.nonce = s.nonce;
        f.key.clone_from(&target);
        f.meta_version = n.meta_version;
        f.copies_base = body.copied;
        f.old_valid_bytes = n.view.backing.as_ref().map_or(0, |b| b.valid_bytes());
        let plan = StorePlan {
            inode: n.id,
            generation: f.generation,
            attr: body.attr,
            key: target,
            condition: state.expected.condition(),
            nonce: s.nonce,
            view: body.view,
            has_data: body.from_nodes,
            target: body.target,
            xattrs: body.xattrs,
            link: body.link,
        };
        n.phase = Phase::Flushing(f);
        self.save(n)?;
        Ok(FlushPlan::Store(Box::new(plan)))
    }

    /// An inode that stands in the way goes where its path says, even before a directory walk has
    /// reached it.
    fn unsettle(&mut self, id: InodeId) -> FsResult<()> {
        let now = self.now;
        let Some(mut n) = self.read().find_inode(id)? else { return Ok(()) };
        if n.nlink > 0 {
            n.mark_dirty(now);
            self.save(n)?;
        }
        Ok(())
    }

    /// Seals failed or took too long: Sealing(g) → Dirty(g+1).
    pub(crate) fn flush_abort(&mut self, inodes: &[InodeId]) -> FsResult<()> {
        for &id in inodes {
            let Some(n) = self.read().find_inode(id)? else { continue };
            if let Phase::Sealing(f) = &n.phase {
                let f = f.clone();
                self.give_up(n, f)?;
            }
        }
        Ok(())
    }

    /// Ends a flush without a store: dirty again, above what the nodes sealed.
    pub(crate) fn give_up(&mut self, mut n: Loaded, f: Flush) -> FsResult<()> {
        n.phase = Phase::Dirty;
        if f.needs_seal {
            n.generation = n.generation.max(f.generation.next());
            if f.fence {
                let notice = Notice::Fence {
                    inode: n.id,
                    generation: f.generation,
                    alloc_limit: n.alloc_limit,
                };
                self.notify(notice)?;
            } else {
                self.release_pins(&n, &f)?;
            }
        }
        self.save(n)
    }

    pub(crate) fn release_pins(&mut self, n: &Loaded, f: &Flush) -> FsResult<()> {
        if !f.needs_seal {
            return Ok(());
        }
        self.notify(Notice::FlushAborted {
            inode: n.id,
            generation: f.generation,
            alloc_limit: n.alloc_limit,
        })
    }
}
