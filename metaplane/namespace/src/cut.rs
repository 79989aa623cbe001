//! Truncates as fences, and the ends that writers report (PROTOCOL §4).
//!
//! A cut steps the generation, so that a running flush can't make the file clean; it lowers the
//! backing's limit, so that no read and no copy passes it; and it clips ends that were written
//! before it, however late they are reported: a close never regrows a file.

use crate::dirtiness::Phase;
use crate::inode::Inode;
use crate::limits::CLIPS_MAX;
use ebb_dataplane_protocol::grant::CUTS_MAX;
use ebb_dataplane_protocol::{Cut, FILE_BYTES_MAX, Generation, RUN_BYTES, ViewVersion};
use ebb_metaplane_protocol::flush::Notice;
use ebb_metaplane_protocol::{FsError, FsResult, Time};

impl Inode {
    /// Checks that [`Self::resize`] may be done now, changing nothing.
    pub(crate) fn check_resize(&self, size: u64) -> FsResult<()> {
        self.refuse_while_sealing()?;
        if size > FILE_BYTES_MAX {
            return Err(FsError::TooLarge);
        }
        if self.may_hold_dirty_data() && self.view.cuts.len() >= CUTS_MAX {
            return Err(crate::again(crate::why::CUTS));
        }
        Ok(())
    }

    /// Sets the size. Returns what the primaries must be told.
    ///
    /// Uncommitted writes may reach past `self.size`, so an extension cuts as well whenever a node
    /// may hold dirty data: to those it may be a truncate.
    pub(crate) fn resize(&mut self, size: u64, now: Time) -> FsResult<Option<Notice>> {
        self.check_resize(size)?;
        let dirty_data = self.may_hold_dirty_data();
        if size == self.size && !dirty_data {
            return Ok(None);
        }
        let cut = Cut { generation: self.generation, at: size };
        // Above the floor for a flush, above the cut for the writers.
        self.step_above_floor();
        self.generation = self.generation.max(cut.generation.next());
        if size < self.size || dirty_data {
            if let Some(b) = &mut self.view.backing {
                b.limit = b.limit.min(size);
            }
            if let Phase::Flushing(f) = &mut self.phase {
                f.limit = f.limit.min(size);
            }
            self.view.version = ViewVersion(self.view.version.0 + 1);
        }
        let notice = dirty_data || (size < self.size && self.alloc_limit > 0);
        self.size = size;
        self.mark_dirty(now);
        self.reserve(size)?;
        if !notice {
            return Ok(None);
        }
        self.remember_clip(cut);
        self.view.cuts.push(cut);
        Ok(Some(Notice::ApplyView {
            inode: self.id,
            generation: cut.generation,
            alloc_limit: self.alloc_limit,
        }))
    }

    /// Raises the allocation limit to cover `end`, whole runs, by doubling.
    pub(crate) fn reserve(&mut self, end: u64) -> FsResult<()> {
        if end > FILE_BYTES_MAX {
            return Err(FsError::TooLarge);
        }
        let need = end.max(1).div_ceil(RUN_BYTES) * RUN_BYTES;
        if self.alloc_limit < need {
            self.alloc_limit = need.max(self.alloc_limit.saturating_mul(2)).min(FILE_BYTES_MAX);
        }
        Ok(())
    }

    /// Keeps the cuts that still say something, in order of generation; `at` rises with it.
    fn remember_clip(&mut self, cut: Cut) {
        self.clips.retain(|c| c.at < cut.at);
        self.clips.push(cut);
        if self.clips.len() > CLIPS_MAX {
            // Too lenient for a very late commit (a hole may reappear at the end), never too strict
            // (acked bytes are not lost).
            self.clips.remove(0);
        }
    }

    /// Nothing written so far reaches past `at`, whoever reports it.
    pub(crate) fn clip_all_at(&mut self, at: u64) {
        self.remember_clip(Cut { generation: self.generation, at });
    }

    /// An end written at `generation`, clipped by the cuts that came after.
    pub(crate) fn clip(&self, generation: Generation, end: u64) -> u64 {
        self.clips.iter().filter(|c| c.generation >= generation).fold(end, |e, c| e.min(c.at))
    }

    /// Merges an end that a writer or a seal reports.
    pub(crate) fn merge_end(&mut self, generation: Generation, end: u64) {
        self.size = self.size.max(self.clip(generation, end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_dataplane_protocol::InodeId;
    use ebb_metaplane_protocol::FileKind;

    fn file() -> Inode {
        let place = (InodeId::ROOT, b"f".as_slice());
        Inode::new(InodeId(2), FileKind::File, place, (0o644, 0, 0), Time(0))
    }

    #[test]
    fn a_late_end_is_clipped_by_every_later_cut_and_by_none_before() {
        let mut n = file();
        let cut = |generation, at| Cut { generation: Generation(generation), at };
        for c in [cut(1, 50), cut(3, 20), cut(5, 30)] {
            n.remember_clip(c);
        }
        // The cut at 50 says nothing that the one at 20 does not.
        assert_eq!(n.clips, [cut(3, 20), cut(5, 30)]);
        assert_eq!(n.clip(Generation(1), 100), 20);
        assert_eq!(n.clip(Generation(3), 100), 20);
        assert_eq!(n.clip(Generation(4), 100), 30);
        assert_eq!(n.clip(Generation(5), 25), 25);
        assert_eq!(n.clip(Generation(6), 100), 100);
    }

    #[test]
    fn remembered_cuts_are_bounded_and_forgetting_loses_no_bytes() {
        let mut n = file();
        for i in 0..1000 {
            n.remember_clip(Cut { generation: Generation(i), at: i });
        }
        assert_eq!(n.clips.len(), CLIPS_MAX);
        assert!(n.clip(Generation(0), 5000) >= n.clips[0].at);
    }

    #[test]
    fn a_truncate_steps_the_generation_and_the_view() {
        let mut n = file();
        n.grant_write(100, Time(1)).expect("a grant");
        let (g, v) = (n.generation, n.view.version);
        n.merge_end(g, 100);
        let notice = n.resize(10, Time(2)).expect("a truncate").expect("nodes must know");
        assert!(matches!(notice, Notice::ApplyView { generation, .. } if generation == g));
        assert!(n.generation > g && n.view.version > v);
        n.merge_end(g, 100);
        assert_eq!(n.size, 10, "the close came late");
        n.merge_end(n.generation, 100);
        assert_eq!(n.size, 100, "written after the truncate");
    }
}
