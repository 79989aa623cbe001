//! What primaries still have to be told, kept until they acked.

use crate::Reader;
use crate::counters::Counter;
use crate::kv::{Kv, KvRead};
use crate::tables::*;
use ebb_dataplane_protocol::codec;
use ebb_metaplane_protocol::FsResult;
use ebb_metaplane_protocol::flush::Notice;

impl<K: KvRead> Reader<'_, K> {
    /// Notices after id `after_id`, oldest first. The fence of an inode with unacked cuts is held
    /// back: its seal would report bytes that were cut.
    pub fn notices(&self, after_id: u64, limit: usize) -> FsResult<Vec<(u64, Notice)>> {
        let mut from = after(&key(NOTICE, &[&be(after_id)]));
        let mut found = Vec::new();
        while found.len() < limit {
            let page = self.scan_prefix(&[NOTICE], Some(&from), limit);
            let Some((last, _)) = page.last() else { break };
            from = after(last);
            for (k, v) in page {
                let notice: Notice = codec::decode(&v).map_err(|_| corrupt("notice"))?;
                if let Notice::Fence { inode, .. } = &notice
                    && self.find_inode(*inode)?.is_some_and(|n| !n.view.cuts.is_empty())
                {
                    continue;
                }
                if found.len() < limit {
                    found.push((u64_at(&k, 1)?, notice));
                }
            }
        }
        Ok(found)
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// Queues a notice. Nobody holds anything of an inode nobody wrote or read.
    pub(crate) fn notify(&mut self, notice: Notice) -> FsResult<()> {
        let reach = match &notice {
            Notice::FlushDone { alloc_limit, .. }
            | Notice::FlushAborted { alloc_limit, .. }
            | Notice::ApplyView { alloc_limit, .. }
            | Notice::Drop { alloc_limit, .. }
            | Notice::Fence { alloc_limit, .. } => *alloc_limit,
        };
        if reach == 0 {
            return Ok(());
        }
        let id = self.next(Counter::NextNotice)?;
        self.kv.put(&key(NOTICE, &[&be(id)]), &codec::encode(&notice));
        self.add(Counter::Notices, 1)?;
        Ok(())
    }

    /// Every primary acked these. Acked cuts leave the view: all who serve it have journaled them.
    pub(crate) fn notices_done(&mut self, ids: &[u64]) -> FsResult<()> {
        for &id in ids {
            let k = key(NOTICE, &[&be(id)]);
            let Some(v) = self.kv.get(&k) else { continue };
            self.kv.delete(&k);
            self.add(Counter::Notices, -1)?;
            let notice: Notice = codec::decode(&v).map_err(|_| corrupt("notice"))?;
            if let Notice::ApplyView { inode, generation, .. } = notice
                && let Some(mut n) = self.read().find_inode(inode)?
            {
                n.view.cuts.retain(|c| c.generation > generation);
                self.save(n)?;
            }
        }
        Ok(())
    }
}
