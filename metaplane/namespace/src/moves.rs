//! Directory renames (PROTOCOL §9): O(1) in the tree, then a resumable walk that finds whose object
//! is no longer where its path says.

use crate::Reader;
use crate::counters::Counter;
use crate::kv::{Kv, KvRead};
use crate::tables::*;
use ebb_dataplane_protocol::{InodeId, codec};
use ebb_metaplane_protocol::FsResult;
use rkyv::{Archive, Deserialize, Serialize};

/// Where a walk over a subtree is: directories from the root of the walk down, each with the last
/// name visited.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Walk(pub(crate) Vec<(InodeId, Vec<u8>)>);

impl Walk {
    /// A walk over everything below a directory.
    pub fn below(dir: InodeId) -> Self {
        Self(vec![(dir, Vec::new())])
    }
    /// Nothing is left.
    pub fn is_done(&self) -> bool {
        self.0.is_empty()
    }
}

/// A renamed directory whose subtree is still to be looked at.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) struct Move {
    pub(crate) dir: InodeId,
    /// The keys' prefix before the rename.
    pub(crate) old_prefix: String,
    /// The last key looked at; `None` once all are.
    pub(crate) keys_after: Option<String>,
    pub(crate) walk: Walk,
}

impl<K: KvRead> Reader<'_, K> {
    /// Goes up to `limit` entries further; the inodes whose own names were visited.
    pub(crate) fn walk_on(&self, walk: &mut Walk, limit: usize) -> FsResult<Vec<InodeId>> {
        let mut seen = Vec::new();
        while seen.len() < limit {
            let Some((dir, last)) = walk.0.last_mut() else { break };
            let page = self.entries_held(*dir, last, limit - seen.len())?;
            if page.is_empty() {
                walk.0.pop();
                continue;
            }
            for (name, id) in page {
                *last = name;
                seen.push(id);
                if self.find_inode(id)?.is_some_and(|n| n.is_dir()) {
                    walk.0.push((id, Vec::new()));
                    break;
                }
            }
        }
        Ok(seen)
    }

    /// Directory renames whose walk is not done.
    pub fn pending_moves(&self) -> FsResult<u64> {
        self.counter(Counter::Moves)
    }
}

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn begin_move(&mut self, dir: InodeId, old_prefix: String) -> FsResult<()> {
        let id = self.next(Counter::NextMove)?;
        let m = Move { dir, old_prefix, keys_after: Some(String::new()), walk: Walk::below(dir) };
        self.kv.put(&key(MOVE, &[&be(id)]), &codec::encode(&m));
        self.add(Counter::Moves, 1)?;
        Ok(())
    }

    /// One bounded step of the oldest move.
    pub(crate) fn move_step(&mut self, limit: u32) -> FsResult<()> {
        let Some((k, v)) = self.read().scan_prefix(&[MOVE], None, 1).pop() else { return Ok(()) };
        let mut m: Move = codec::decode(&v).map_err(|_| corrupt("move"))?;
        let limit = limit.clamp(1, 10_000) as usize;
        if let Some(after_key) = m.keys_after.take() {
            // Keys under the old prefix that no inode owns: their names moved away.
            let prefix = key(KEY, &[m.old_prefix.as_bytes()]);
            let from = key(KEY, &[m.old_prefix.as_bytes(), after_key.as_bytes()]);
            let from = if after_key.is_empty() { from } else { after(&from) };
            let page = self.read().scan_prefix(&prefix, Some(&from), limit);
            for (k, _) in &page {
                let s3_key = String::from_utf8(k[1..].to_vec()).map_err(|_| corrupt("key"))?;
                self.reconsider(&s3_key)?;
                m.keys_after = Some(s3_key[m.old_prefix.len()..].to_owned());
            }
            if page.len() < limit {
                m.keys_after = None;
            }
        } else {
            for id in self.read().walk_on(&mut m.walk, limit)? {
                let Some(mut n) = self.read().find_inode(id)? else { continue };
                let Some(b) = &n.view.backing else { continue };
                if self.read().target_key(&n)?.as_ref() != Some(&b.key) {
                    let now = self.now;
                    n.mark_dirty(now);
                    self.save(n)?;
                }
            }
            if m.walk.is_done() {
                self.kv.delete(&k);
                self.add(Counter::Moves, -1)?;
                return Ok(());
            }
        }
        self.kv.put(&k, &codec::encode(&m));
        Ok(())
    }
}
