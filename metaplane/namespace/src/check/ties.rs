//! Sessions, handles, keys, notices and the map: what ties them to the rest.

use super::{Check, Found, finding};
use crate::Reader;
use crate::counters::Counter;
use crate::key_state::{Expected, KeyState};
use crate::kv::KvRead;
use crate::moves::Move;
use crate::session::Session;
use crate::tables::*;
use ebb_dataplane_protocol::{HandleId, InodeId, NodeState, SessionId, codec};
use ebb_metaplane_protocol::FsResult;
use ebb_metaplane_protocol::check::{Repair, Rule};
use ebb_metaplane_protocol::flush::Notice;

impl<K: KvRead> Reader<'_, K> {
    fn number_of(&self, prefix: &[u8]) -> u64 {
        let (mut count, mut from) = (0, prefix.to_vec());
        loop {
            let page = self.scan_prefix(prefix, Some(&from), super::PAGE);
            let Some((last, _)) = page.last() else { return count };
            from = after(last);
            count += page.len() as u64;
        }
    }

    /// Replies and handles that a session has.
    pub(crate) fn session_counts(&self, id: SessionId) -> (u64, u32) {
        let replies = self.number_of(&key(REPLY, &[&be(id.0)]));
        (replies, self.number_of(&key(SESSION_HANDLE, &[&be(id.0)])) as u32)
    }

    /// Whether an object of ours is at a key and nobody will ever delete it. `moving`: a renamed directory's keys
    /// aren't all looked at yet.
    pub(crate) fn is_garbage(&self, s3_key: &str, k: &KeyState, moving: bool) -> FsResult<bool> {
        let idle = k.attempt.is_none() && !k.delete && k.dangling.is_empty();
        Ok(idle
            && !moving
            && matches!(k.expected, Expected::Etag(_))
            && self.owner_of(s3_key)?.is_none()
            && self.inode_at_key(s3_key)?.is_none())
    }
}

impl Check {
    pub(super) fn session<K: KvRead>(
        &mut self,
        r: Reader<'_, K>,
        (k, v): (&[u8], &[u8]),
        found: Found<'_>,
    ) -> FsResult<()> {
        self.counted(k);
        let id = SessionId(u64_at(k, 1)?);
        self.given(Counter::NextSession, id.0);
        let s: Session = codec::decode(v).map_err(|_| corrupt("session"))?;
        let (replies, handles) = r.session_counts(id);
        let known = r.0.get(&key(CLIENT, &[&s.client.to_be_bytes()]));
        if (s.replies, s.handles) != (replies, handles) || known.as_deref() != Some(&be(id.0)) {
            let what = format!(
                "session {id}: {} replies and {} handles, and there are {replies} and {handles}",
                s.replies, s.handles
            );
            found(finding(Rule::Session, what, Repair::Session(id)));
        }
        Ok(())
    }

    pub(super) fn handle<K: KvRead>(
        &mut self,
        r: Reader<'_, K>,
        (k, v): (&[u8], &[u8]),
        found: Found<'_>,
    ) -> FsResult<()> {
        let id = HandleId(u64_at(k, 1)?);
        self.given(Counter::NextHandle, id.0);
        let h: crate::handle::Handle = codec::decode(v).map_err(|_| corrupt("handle"))?;
        let of_session = key(SESSION_HANDLE, &[&be(h.session.0), &be(h.inode.0), &be(id.0)]);
        let open = key(OPEN, &[&be(h.inode.0), &be(id.0)]);
        let told = r.0.get(&of_session).as_deref() == Some(&[u8::from(h.write)])
            && r.0.get(&open).as_deref() == Some(&be(h.session.0));
        if !told || !r.session_exists(h.session)? || r.find_inode(h.inode)?.is_none() {
            let what = format!("handle {id} of session {} and inode {}", h.session, h.inode);
            found(finding(Rule::Handle, what, Repair::Handle(id)));
        }
        Ok(())
    }

    pub(super) fn key<K: KvRead>(
        &mut self,
        r: Reader<'_, K>,
        (k, _): (&[u8], &[u8]),
        found: Found<'_>,
    ) -> FsResult<()> {
        let s3_key = std::str::from_utf8(&k[1..]).map_err(|_| corrupt("key"))?;
        let Some(state) = r.key_state(s3_key)? else { return Err(corrupt("key state")) };
        self.count(Counter::PendingKeys, i64::from(state.is_pending()));
        let repair = Repair::Key(s3_key.to_owned());
        if let Some(a) = &state.attempt
            && r.0.get(&key(ATTEMPT, &[&a.nonce.to_be_bytes()])).as_deref() != Some(&k[1..])
        {
            let what = format!("the attempt under way at '{s3_key}' can't be found by its nonce");
            found(finding(Rule::Attempt, what, repair.clone()));
        }
        if r.is_garbage(s3_key, &state, self.moves)? {
            let what = format!("our object at '{s3_key}' is nobody's, and stays");
            found(finding(Rule::Garbage, what, repair));
        }
        Ok(())
    }

    pub(super) fn tombstone<K: KvRead>(
        &mut self,
        r: Reader<'_, K>,
        (k, v): (&[u8], &[u8]),
        found: Found<'_>,
    ) -> FsResult<()> {
        self.counted(k);
        let s3_key = std::str::from_utf8(&k[1..]).map_err(|_| corrupt("key"))?;
        let sequence = u64_at(v, 0)?;
        if r.0.get(&key(TOMBSTONE_AGE, &[&be(sequence), &k[1..]])).is_none() {
            let what = format!("the delete of '{s3_key}' has no age");
            found(finding(Rule::Tombstone, what, Repair::Tombstone(s3_key.to_owned())));
        }
        Ok(())
    }

    pub(super) fn notice(&mut self, (k, v): (&[u8], &[u8])) -> FsResult<()> {
        self.counted(k);
        self.given(Counter::NextNotice, u64_at(k, 1)?);
        let notice: Notice = codec::decode(v).map_err(|_| corrupt("notice"))?;
        if let (Notice::ApplyView { inode, .. }, Some(told)) = (&notice, &mut self.cut) {
            told.insert(*inode);
            if told.len() > super::CUTS_REMEMBERED_MAX {
                self.cut = None;
            }
        }
        Ok(())
    }

    pub(super) fn walk(&mut self, (k, v): (&[u8], &[u8])) -> FsResult<()> {
        self.counted(k);
        self.given(Counter::NextMove, u64_at(k, 1)?);
        let _: Move = codec::decode(v).map_err(|_| corrupt("move"))?;
        Ok(())
    }

    pub(super) fn map<K: KvRead>(&mut self, r: Reader<'_, K>, found: Found<'_>) -> FsResult<()> {
        let map = r.map()?;
        for n in &map.nodes {
            self.given(Counter::NextNode, u64::from(n.id.0));
            if n.state == NodeState::Gone {
                found(finding(Rule::Map, format!("node {} is gone and in the map", n.id), None));
            }
        }
        let groups = r.counter(Counter::PgCount)?;
        if map.pgs.len() as u64 != groups {
            let what = format!("the map has {} groups, and the cluster {groups}", map.pgs.len());
            found(finding(Rule::Map, what, None));
        }
        for (pg, entry) in map.pgs.iter().enumerate() {
            for m in entry.members.iter().chain(&entry.syncing) {
                if map.node(m.node).is_none() {
                    let what = format!("group {pg} is on node {}, which isn't there", m.node);
                    found(finding(Rule::Map, what, None));
                }
            }
        }
        if r.find_inode(InodeId::ROOT)?.is_none_or(|root| !root.is_dir()) {
            found(finding(Rule::Readable, "there is no root directory", None));
        }
        Ok(())
    }
}
