//! Results of stores (PROTOCOL §3, §8–9): clean only on a confirmed object that holds exactly the
//! inode's generation, under the key its path names (I3).

use crate::dirtiness::{Flush, Phase};
use crate::inode::Loaded;
use crate::key_state::{Expected, KeyState};
use crate::kv::Kv;
use crate::tables::Ctx;
use ebb_dataplane_protocol::{Backing, InodeId, ViewVersion};
use ebb_metaplane_protocol::FsResult;
use ebb_metaplane_protocol::flush::{Adopt, AttemptResult, FlushOutcome, Notice};

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn flush_commit(&mut self, outcomes: &[FlushOutcome]) -> FsResult<()> {
        for o in outcomes {
            self.settle(o.nonce, &o.result)?;
        }
        Ok(())
    }

    /// Settles an attempt to store; the nonce is taken back already. The inode may be gone or have
    /// moved on: then only the key's state learns.
    pub(crate) fn settle_store(
        &mut self,
        inode: InodeId,
        nonce: u128,
        s3_key: &str,
        mut state: KeyState,
        (result, may_be_hit): (&AttemptResult, bool),
    ) -> FsResult<()> {
        let flush = match self.read().find_inode(inode)? {
            Some(n) => match &n.phase {
                Phase::Flushing(f) if f.nonce == nonce => Some((f.clone(), n)),
                _ => None,
            },
            None => None,
        };
        match result {
            AttemptResult::Stored { etag, length } => {
                state.expected = Expected::Etag(etag.clone());
                self.put_key(s3_key, &state)?;
                match flush {
                    // It is there, and may be gone in a moment: the data is kept until then (R33).
                    flush if may_be_hit => self.try_again(flush),
                    Some((f, n)) => self.commit(n, f, etag, *length),
                    None => Ok(()),
                }
            }
            AttemptResult::Missing | AttemptResult::Deleted => {
                state.expected = Expected::Absent;
                self.put_key(s3_key, &state)?;
                self.try_again(flush)
            }
            AttemptResult::Foreign(object) => {
                // Markers carry no data and temporary keys are ours alone: overwrite, knowingly.
                let overwrite = s3_key.ends_with('/') || s3_key.starts_with(".ebb/");
                state.expected =
                    if overwrite { Expected::Etag(object.etag.clone()) } else { Expected::Absent };
                self.put_key(s3_key, &state)?;
                let named = flush.is_some();
                // Only attributes were to be changed, over a base at this very key: there are no
                // bytes of ours to save, so this is an outside change and not a conflict.
                let outside = flush.as_ref().and_then(|(f, n)| {
                    let base = n.view.backing.as_ref().filter(|b| b.key == s3_key)?;
                    (f.copies_base && n.generation == f.generation).then(|| Adopt {
                        inode,
                        lineage: n.view.lineage,
                        old_etag: Some(base.etag.clone()),
                        object: Some(object.clone()),
                    })
                });
                self.try_again(flush)?;
                if overwrite {
                    return Ok(());
                }
                if let Some(change) = outside
                    && self.adopt(&change)?
                {
                    return Ok(());
                }
                if named {
                    self.conflict(inode, s3_key, object)
                } else {
                    self.adopt_at_key(s3_key, object)
                }
            }
            AttemptResult::LeftOver(found) => {
                self.put_key(s3_key, &state)?;
                self.try_again(flush)?;
                self.take_left_over(s3_key, found)
            }
            AttemptResult::Failed(_) | AttemptResult::Ambiguous => {
                self.put_key(s3_key, &state)?;
                self.try_again(flush)
            }
        }
    }

    fn try_again(&mut self, flush: Option<(Flush, Loaded)>) -> FsResult<()> {
        match flush {
            Some((f, n)) => self.give_up(n, f),
            None => Ok(()),
        }
    }

    /// The object is there: it is the inode's backing now, the old one goes (I6).
    fn commit(&mut self, mut n: Loaded, f: Flush, etag: &str, length: u64) -> FsResult<()> {
        let old = n.view.backing.take();
        let old_content = n.view.content;
        n.view.content = n.next_content();
        n.view.version = ViewVersion(n.view.version.0 + 1);
        n.view.clean_generation = n.view.clean_generation.max(f.generation);
        let limit = length.min(f.limit);
        n.view.backing = Some(Backing { key: f.key.clone(), etag: etag.to_owned(), length, limit });
        n.base_lost = false;
        let links_since = n.has_links().then_some(n.dirty_since);
        n.stored_meta = f.meta_version;
        n.validated = self.now;
        let settled = n.generation == f.generation
            && self.read().target_key(&n)?.is_none_or(|k| n.is_settled_at(&k));
        n.phase = if settled { Phase::Clean } else { Phase::Dirty };
        n.dirty_since = self.now;
        let (id, file) = (n.id, n.is_file());
        let notice = Notice::FlushDone {
            inode: id,
            generation: f.generation,
            content: n.view.content,
            old_content,
            valid_bytes: limit,
            old_valid_bytes: f.old_valid_bytes,
            alloc_limit: n.reach(),
        };
        // The old key's state is read from the inode's record: make it explicit before it changes.
        let moved_from = old.filter(|b| b.key != f.key);
        if let Some(b) = &moved_from {
            self.retire(&b.key, id)?;
        }
        self.save(n)?;
        self.set_owner(&f.key, id);
        if let Some(since) = links_since {
            self.links_are_old(id, since)?;
        }
        if file {
            self.notify(notice)?;
        }
        Ok(())
    }
}
