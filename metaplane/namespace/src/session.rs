//! Sessions: leases of clients, exactly-once replies (I7), and their end as a fence (PROTOCOL §5).

use crate::Reader;
use crate::counters::Counter;
use crate::dirtiness::Phase;
use crate::handle::Handle;
use crate::kv::{Kv, KvRead};
use crate::limits::*;
use crate::tables::*;
use ebb_dataplane_protocol::{Generation, HandleId, InodeId, Sequence, SessionId, codec};
use ebb_metaplane_protocol::command::OpOutcome;
use ebb_metaplane_protocol::flush::{Notice, SealedInode};
use ebb_metaplane_protocol::op::Op;
use ebb_metaplane_protocol::{FsError, FsResult, Time};
use rkyv::{Archive, Deserialize, Serialize};
use std::collections::BTreeSet;

/// So many sequences are looked at one by one.
const FORGET_SINGLY_MAX: u64 = 8;

/// A client's lease.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) struct Session {
    pub(crate) client: u128,
    pub(crate) label: String,
    pub(crate) expires: Time,
    /// Replies below were answered and forgotten.
    pub(crate) answered_below: Sequence,
    /// Remembered replies.
    pub(crate) replies: u64,
    /// Open handles.
    pub(crate) handles: u32,
}

impl<K: KvRead> Reader<'_, K> {
    pub(crate) fn session(&self, id: SessionId) -> FsResult<Option<Session>> {
        match self.0.get(&key(SESSION, &[&be(id.0)])) {
            None => Ok(None),
            Some(b) => Ok(Some(codec::decode(&b).map_err(|_| corrupt("session"))?)),
        }
    }

    /// Whether a session lives (as of the log, not of a clock).
    pub fn session_exists(&self, id: SessionId) -> FsResult<bool> {
        Ok(self.session(id)?.is_some())
    }

    /// All sessions with label and expiry.
    pub fn sessions(&self) -> FsResult<Vec<(SessionId, String, Time)>> {
        self.scan_prefix(&[SESSION], None, SESSIONS_MAX as usize)
            .into_iter()
            .map(|(k, v)| {
                let s: Session = codec::decode(&v).map_err(|_| corrupt("session"))?;
                Ok((SessionId(u64_at(&k, 1)?), s.label, s.expires))
            })
            .collect()
    }

    /// Sessions whose lease ran out before `now`. A new leader must give them a full lease first.
    pub fn expired_sessions(&self, now: Time) -> FsResult<Vec<SessionId>> {
        Ok(self.sessions()?.into_iter().filter(|s| s.2 < now).map(|s| s.0).collect())
    }

    /// The remembered reply of a request.
    pub fn remembered(
        &self,
        session: SessionId,
        sequence: Sequence,
    ) -> FsResult<Option<FsResult<OpOutcome>>> {
        match self.0.get(&key(REPLY, &[&be(session.0), &be(sequence.0)])) {
            None => Ok(None),
            Some(b) => Ok(Some(codec::decode(&b).map_err(|_| corrupt("reply"))?)),
        }
    }
}

impl<K: Kv> Ctx<'_, K> {
    fn put_session(&mut self, id: SessionId, s: &Session) {
        self.kv.put(&key(SESSION, &[&be(id.0)]), &codec::encode(s));
    }

    pub(crate) fn update_session(
        &mut self,
        id: SessionId,
        change: impl FnOnce(&mut Session),
    ) -> FsResult<()> {
        if let Some(mut s) = self.read().session(id)? {
            change(&mut s);
            self.put_session(id, &s);
        }
        Ok(())
    }

    fn lease_end(&self) -> Time {
        Time(self.now.0.saturating_add(SESSION_TTL_NS))
    }

    /// A session for a client; a retry finds the one it made.
    pub(crate) fn open_session(&mut self, client: u128, label: &str) -> FsResult<SessionId> {
        let expires = self.lease_end();
        let client_key = key(CLIENT, &[&client.to_be_bytes()]);
        if let Some(v) = self.kv.get(&client_key) {
            let id = SessionId(u64_at(&v, 0)?);
            self.update_session(id, |s| s.expires = expires)?;
            return Ok(id);
        }
        if self.read().counter(Counter::ShuttingDown)? != 0 {
            return Err(FsError::ShuttingDown);
        }
        self.read().refuse_while_loading()?;
        if self.read().counter(Counter::Sessions)? >= SESSIONS_MAX {
            return Err(FsError::NotPermitted("too many sessions".into()));
        }
        let id = SessionId(self.next(Counter::NextSession)?);
        let mut end = label.len().min(LABEL_BYTES_MAX);
        while !label.is_char_boundary(end) {
            end -= 1;
        }
        let session = Session {
            client,
            label: label[..end].to_owned(),
            expires,
            answered_below: Sequence(0),
            replies: 0,
            handles: 0,
        };
        self.put_session(id, &session);
        self.kv.put(&client_key, &be(id.0));
        self.add(Counter::Sessions, 1)?;
        Ok(id)
    }

    pub(crate) fn renew_sessions(&mut self, ids: &[SessionId]) -> FsResult<()> {
        let expires = self.lease_end();
        for &id in ids {
            self.update_session(id, |s| s.expires = expires)?;
        }
        Ok(())
    }

    /// A client's mutation, exactly once. A refusal that asks to come again is not remembered: it
    /// changed nothing, and the retry carries the same sequence.
    pub(crate) fn client_op(
        &mut self,
        session: SessionId,
        sequence: Sequence,
        answered_below: Sequence,
        op: &Op,
    ) -> FsResult<OpOutcome> {
        let Some(mut s) = self.read().session(session)? else {
            return Err(FsError::SessionExpired);
        };
        if answered_below > s.answered_below {
            s.replies -= self.forget_replies(session, &s, answered_below);
            s.answered_below = answered_below;
            self.put_session(session, &s);
        }
        if sequence < s.answered_below {
            return Err(FsError::TooOld);
        }
        if s.replies > 0
            && let Some(reply) = self.read().remembered(session, sequence)?
        {
            return reply;
        }
        if s.replies >= REPLIES_PER_SESSION_MAX {
            return Err(crate::again(crate::why::REPLIES));
        }
        let reply = self.op(session, op);
        if !matches!(reply, Err(FsError::Again { .. } | FsError::ShuttingDown)) {
            self.kv.put(&key(REPLY, &[&be(session.0), &be(sequence.0)]), &codec::encode(&reply));
            self.update_session(session, |s| s.replies += 1)?;
        }
        reply
    }

    /// Forgets remembered replies below `answered_below`; how many there were.
    fn forget_replies(&mut self, id: SessionId, s: &Session, answered_below: Sequence) -> u64 {
        if s.replies == 0 {
            return 0;
        }
        let place = |sequence: Sequence| key(REPLY, &[&be(id.0), &be(sequence.0)]);
        // Mostly it is the last one, or a few: no range has to be walked for them.
        let forgotten: Vec<Vec<u8>> = if answered_below.0 - s.answered_below.0 <= FORGET_SINGLY_MAX
        {
            let few = (s.answered_below.0..answered_below.0).map(|n| place(Sequence(n)));
            few.filter(|k| self.kv.get(k).is_some()).collect()
        } else {
            let (start, end) = (place(s.answered_below), place(answered_below));
            let page = self.kv.scan(&start, &end, REPLIES_PER_SESSION_MAX as usize, false);
            page.into_iter().map(|(k, _)| k).collect()
        };
        for k in &forgotten {
            self.kv.delete(k);
        }
        (forgotten.len() as u64).min(s.replies)
    }

    pub(crate) fn end_sessions(&mut self, ids: &[SessionId]) -> FsResult<()> {
        for &id in ids {
            let Some(s) = self.read().session(id)? else { continue };
            let prefix = key(SESSION_HANDLE, &[&be(id.0)]);
            let mut written = BTreeSet::new();
            loop {
                let page = self.read().scan_prefix(&prefix, None, 1024);
                if page.is_empty() {
                    break;
                }
                for (k, write) in page {
                    let handle = HandleId(u64_at(&k, 17)?);
                    let inode = InodeId(u64_at(&k, 9)?);
                    let write = write.first() == Some(&1);
                    if write {
                        written.insert(inode);
                    }
                    let h = Handle { session: id, inode, lineage: Default::default(), write };
                    self.close_handle(handle, &h)?;
                }
            }
            for inode in written {
                self.fence(inode)?;
            }
            let replies = key(REPLY, &[&be(id.0)]);
            loop {
                let page = self.read().scan_prefix(&replies, None, 1024);
                if page.is_empty() {
                    break;
                }
                for (k, _) in page {
                    self.kv.delete(&k);
                }
            }
            self.kv.delete(&key(CLIENT, &[&s.client.to_be_bytes()]));
            self.kv.delete(&key(BORROWER, &[&be(id.0)]));
            self.kv.delete(&key(SESSION, &[&be(id.0)]));
            self.add(Counter::Sessions, -1)?;
        }
        Ok(())
    }

    /// Ends the generation a dead writer may still write under; its size comes from the seal.
    fn fence(&mut self, inode: InodeId) -> FsResult<()> {
        let Some(mut n) = self.read().find_inode(inode)? else { return Ok(()) };
        if let Phase::Sealing(f) = &mut n.phase {
            // The seal under way is the fence.
            f.fence = true;
            return self.save(n);
        }
        if n.generation <= n.floor() {
            return Ok(());
        }
        let generation = n.generation;
        n.sealed_floor = generation;
        n.generation = generation.next();
        let alloc_limit = n.alloc_limit;
        self.save(n)?;
        self.notify(Notice::Fence { inode, generation, alloc_limit })
    }

    /// The seals of fences came back: the size of what the dead writers wrote.
    pub(crate) fn fenced(&mut self, seals: &[SealedInode]) -> FsResult<()> {
        for s in seals {
            let Some(mut n) = self.read().find_inode(s.inode)? else { continue };
            let before = n.size;
            n.merge_end(s.generation, s.high_water);
            if n.size != before {
                n.mtime = self.now;
                n.changed(self.now);
            }
            let pins_go = match &n.phase {
                Phase::Sealing(f) | Phase::Flushing(f) => f.generation > s.generation,
                _ => true,
            };
            let alloc_limit = n.alloc_limit;
            self.save(n)?;
            if pins_go && s.generation > Generation(0) {
                self.notify(Notice::FlushAborted {
                    inode: s.inode,
                    generation: s.generation,
                    alloc_limit,
                })?;
            }
        }
        Ok(())
    }
}
