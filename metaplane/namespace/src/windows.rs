//! The session windows of groups that nobody holds (PROTOCOL R27, I7): which writes the last holder had applied, kept from
//! the move to nobody until the next holder has them. Does not hand them over: the leader does, before `SetPg`.

use crate::Reader;
use crate::kv::{Kv, KvRead};
use crate::limits::WINDOWS_KEPT_MAX;
use crate::tables::*;
use ebb_dataplane_protocol::control::WindowEntry;
use ebb_dataplane_protocol::{ChunkIndex, Generation, InodeId, PgEpoch, PgId, Sequence, SessionId};
use ebb_metaplane_protocol::{FsError, FsResult};
use std::collections::BTreeMap;

fn place(pg: PgId, session: SessionId, sequence: Sequence) -> Vec<u8> {
    key(WINDOW, &[&pg.0.to_be_bytes(), &be(session.0), &be(sequence.0)])
}

impl<K: KvRead> Reader<'_, K> {
    /// Kept entries of a group, from past `after` on.
    pub fn kept_windows(
        &self,
        pg: PgId,
        after_entry: Option<(SessionId, Sequence)>,
        limit: usize,
    ) -> FsResult<Vec<WindowEntry>> {
        let prefix = key(WINDOW, &[&pg.0.to_be_bytes()]);
        let from = after_entry.map(|(session, sequence)| after(&place(pg, session, sequence)));
        let found = self.scan_prefix(&prefix, from.as_deref(), limit);
        found
            .iter()
            .map(|(k, v)| {
                Ok(WindowEntry {
                    session: SessionId(u64_at(k, 3)?),
                    sequence: Sequence(u64_at(k, 11)?),
                    below: Sequence(u64_at(v, 0)?),
                    generation: Generation(u64_at(v, 8)?),
                    inode: InodeId(u64_at(v, 16)?),
                    chunk: ChunkIndex(u64_at(v, 24)? as u32),
                })
            })
            .collect()
    }
}

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn keep_windows(
        &mut self,
        pg: PgId,
        from: PgEpoch,
        entries: &[WindowEntry],
    ) -> FsResult<()> {
        let map = self.read().map()?;
        if map.pgs.get(usize::from(pg.0)).is_none_or(|entry| entry.epoch != from) {
            return Err(FsError::Invalid(format!("group {pg} is not at epoch {from}")));
        }
        let known = self.read().kept_windows(pg, None, WINDOWS_KEPT_MAX)?.len();
        if known + entries.len() > WINDOWS_KEPT_MAX {
            return Err(FsError::Invalid(format!("group {pg} has too many unanswered writes")));
        }
        let mut live = BTreeMap::new();
        for e in entries {
            let live = match live.get(&e.session) {
                Some(live) => *live,
                None => {
                    let found = self.read().session_exists(e.session)?;
                    *live.entry(e.session).or_insert(found)
                }
            };
            // Of a session that is over nothing is asked again: its generations are fenced (R20).
            if live {
                let chunk = be(u64::from(e.chunk.0));
                let value = [be(e.below.0), be(e.generation.0), be(e.inode.0), chunk].concat();
                self.kv.put(&place(pg, e.session, e.sequence), &value);
            }
        }
        Ok(())
    }

    /// The group has a holder, who has them.
    pub(crate) fn forget_windows(&mut self, pg: PgId) {
        let prefix = key(WINDOW, &[&pg.0.to_be_bytes()]);
        for (k, _) in self.read().scan_prefix(&prefix, None, usize::MAX) {
            self.kv.delete(&k);
        }
    }
}
