//! Tables that say nothing but what other records say already: what is missing in them, and what is
//! too much.

use crate::Reader;
use crate::dirtiness::Phase;
use crate::inode::Inode;
use crate::kv::KvRead;
use crate::tables::*;
use ebb_dataplane_protocol::{HandleId, InodeId, NodeId, PgId, Sequence, SessionId};
use ebb_metaplane_protocol::FsResult;
use ebb_metaplane_protocol::check::Rule;

impl<K: KvRead> Reader<'_, K> {
    /// What should follow from an inode's record and isn't there.
    pub(crate) fn missing(&self, n: &Inode) -> FsResult<Vec<(Rule, String)>> {
        let mut missing = Vec::new();
        if let Some((since, stage)) = n.queued() {
            let place = key(DIRTY, &[&be_time(since), &be(n.id.0)]);
            if self.0.get(&place).as_deref() != Some(&[stage]) {
                missing.push((Rule::Queue, "not in the dirty queue as it should be".to_owned()));
            }
        }
        for pg in self.groups_of_held(n)? {
            if !self.is_held(pg, n.id, u64::MAX)? {
                missing.push((Rule::Held, format!("group {pg} may have it, and does not know")));
            }
        }
        if let Some(b) = n.view.backing.as_ref()
            && self.should_own(n)?
            && self.owner_of(&b.key)? != Some(n.id)
        {
            missing.push((Rule::Owner, format!("it does not own its object at '{}'", b.key)));
        }
        if let Some(file) = n.link_of()
            && self.0.get(&key(LINK, &[&be(file.0), &be(n.id.0)])).is_none()
        {
            missing.push((Rule::Links, format!("file {file} does not know this name of it")));
        }
        if n.has_xattrs() && !matches!(self.xattr_record(n.id), Ok(Some(_))) {
            missing.push((Rule::Xattrs, "its extended attributes are missing".to_owned()));
        }
        Ok(missing)
    }

    /// Whether the object that an inode's backing names is its own for sure. One that is not clean and has another name
    /// by now may have lost it to a stranger's: its next store finds out.
    pub(crate) fn should_own(&self, n: &Inode) -> FsResult<bool> {
        let Some(b) = n.view.backing.as_ref().filter(|_| !n.base_lost) else { return Ok(false) };
        Ok(n.phase == Phase::Clean || self.target_key(n)?.as_ref() == Some(&b.key))
    }

    /// Why a derived record should not be there, or not so.
    pub(crate) fn stale(&self, k: &[u8], v: &[u8]) -> FsResult<Option<(Rule, String)>> {
        let wrong = |rule, what: String| Ok(Some((rule, what)));
        match k[0] {
            LINK => {
                let (file, id) = (InodeId(u64_at(k, 1)?), InodeId(u64_at(k, 9)?));
                let of = self.find_inode(id)?.and_then(|n| n.link_of());
                if of != Some(file) {
                    return wrong(Rule::Links, format!("inode {id} is no other name of {file}"));
                }
            }
            JOIN => {
                let id = InodeId(u64_at(v, 0)?);
                u64_at(v, 8)?;
                let says = self.find_inode(id)?.filter(|n| n.is_file()).map(|n| n.target.clone());
                if says.as_deref() != Some(&k[1..]) {
                    let what = format!("inode {id} was not found with these other names");
                    return wrong(Rule::Links, what);
                }
            }
            DIRTY => {
                let (since, id) = (time_at(k, 1)?, InodeId(u64_at(k, 9)?));
                let queued = self.find_inode(id)?.and_then(|n| n.queued());
                let says = v.first().map(|&stage| (since, stage));
                if queued.is_none() || queued != says {
                    return wrong(Rule::Queue, format!("inode {id} is queued as it should not be"));
                }
            }
            HELD => {
                let id = InodeId(u64_at(k, 3)?);
                let pg = PgId(u16_at(k, 1)?);
                let n = self.find_inode(id)?;
                let held = n.map(|n| self.groups_of_held(&n)).transpose()?;
                if !held.is_some_and(|groups| groups.contains(&pg)) {
                    return wrong(Rule::Held, format!("group {pg} does not hold inode {id}"));
                }
            }
            OWNER => {
                let id = InodeId(u64_at(v, 0)?);
                let n = self.find_inode(id)?;
                let backing = n.as_ref().and_then(|n| n.view.backing.as_ref());
                if backing.is_none_or(|b| b.key.as_bytes() != &k[1..]) {
                    let what = format!("inode {id} has no object at {}", super::shown(&k[1..]));
                    return wrong(Rule::Owner, what);
                }
            }
            CLIENT => {
                let id = SessionId(u64_at(v, 0)?);
                let client = self.session(id)?.map(|s| s.client.to_be_bytes());
                if client.as_ref().map(<[u8; 16]>::as_slice) != Some(&k[1..]) {
                    return wrong(
                        Rule::Session,
                        format!("a client of session {id}, which isn't its own"),
                    );
                }
            }
            REPLY => {
                let (id, sequence) = (SessionId(u64_at(k, 1)?), Sequence(u64_at(k, 9)?));
                let live = self.session(id)?.is_some_and(|s| s.answered_below <= sequence);
                if !live {
                    return wrong(
                        Rule::Reply,
                        format!("reply {sequence} of session {id} is not needed"),
                    );
                }
                self.remembered(id, sequence)?;
            }
            SESSION_HANDLE => {
                let (session, inode) = (SessionId(u64_at(k, 1)?), InodeId(u64_at(k, 9)?));
                let id = HandleId(u64_at(k, 17)?);
                let h = self.handle(session, id)?;
                if h.is_none_or(|h| h.inode != inode || v != [u8::from(h.write)]) {
                    return wrong(
                        Rule::Handle,
                        format!("session {session} has no such handle {id}"),
                    );
                }
            }
            OPEN => {
                let (inode, id) = (InodeId(u64_at(k, 1)?), HandleId(u64_at(k, 9)?));
                let h = self.handle(SessionId(u64_at(v, 0)?), id)?;
                if h.is_none_or(|h| h.inode != inode) {
                    return wrong(Rule::Handle, format!("inode {inode} has no such handle {id}"));
                }
            }
            BORROWER => {
                let session = SessionId(u64_at(k, 1)?);
                if self.session(session)?.is_none() {
                    let what = format!("files are lent to session {session}, which isn't there");
                    return wrong(Rule::Session, what);
                }
            }
            LINGERING => {
                let inode = InodeId(u64_at(k, 1)?);
                if self.find_inode(inode)?.is_none_or(|n| !n.is_file() || n.nlink > 0) {
                    let what = format!("inode {inode} waits in vain for who has it open");
                    return wrong(Rule::Handle, what);
                }
            }
            SESSION_LOCK => {
                let (session, inode) = (SessionId(u64_at(k, 1)?), InodeId(u64_at(k, 9)?));
                let held = self.locks(inode)?.iter().any(|h| h.session == session);
                if !held || !self.session_has_open(session, inode) {
                    let what = format!("session {session} has no lock on inode {inode}");
                    return wrong(Rule::Handle, what);
                }
            }
            LOCK => {
                let inode = InodeId(u64_at(k, 1)?);
                for h in self.locks(inode)? {
                    if !self.has_locks(h.session, inode) {
                        let what = format!("a lock of session {} on inode {inode}", h.session);
                        return wrong(Rule::Handle, what);
                    }
                }
            }
            XATTR => {
                let id = InodeId(u64_at(k, 1)?);
                let says = self.find_inode(id)?.is_some_and(|n| n.has_xattrs());
                if !says || self.xattr_record(id).is_err() {
                    let what = format!("extended attributes of inode {id}, which has none");
                    return wrong(Rule::Xattrs, what);
                }
            }
            ATTEMPT => {
                let nonce = k.get(1..).and_then(|n| n.try_into().ok()).map(u128::from_be_bytes);
                let s3_key = std::str::from_utf8(v).map_err(|_| corrupt("attempt"))?;
                let attempt = self.key_state(s3_key)?.and_then(|s| s.attempt);
                if nonce.is_none() || attempt.map(|a| a.nonce) != nonce {
                    return wrong(
                        Rule::Attempt,
                        format!("no such attempt is under way at '{s3_key}'"),
                    );
                }
            }
            TOMBSTONE_AGE => {
                let s3_key = std::str::from_utf8(&k[9..]).map_err(|_| corrupt("tombstone"))?;
                time_at(v, 0)?;
                if self.tombstone(s3_key)? != Some(u64_at(k, 1)?) {
                    return wrong(Rule::Tombstone, format!("an old delete of '{s3_key}'"));
                }
            }
            WINDOW => {
                let (pg, session) = (PgId(u16_at(k, 1)?), SessionId(u64_at(k, 3)?));
                if usize::from(pg.0) >= self.map()?.pgs.len() {
                    let what =
                        format!("writes of session {session} in group {pg}, which isn't there");
                    return wrong(Rule::Map, what);
                }
            }
            NODE_BOOT => {
                let node = NodeId(u64_at(k, 1)? as u32);
                self.node_boot(node)?;
                if self.map()?.node(node).is_none() {
                    return wrong(
                        Rule::Map,
                        format!("a process of node {node}, which isn't in the map"),
                    );
                }
            }
            _ => {}
        }
        Ok(None)
    }
}
