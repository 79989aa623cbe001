//! One state per S3 key, one mutation in flight (PROTOCOL §8), and who owns the object there (§8).
//!
//! *Owner*: the inode whose backing names the key; nothing is stored over another inode's object.
//! *Expected*: what we know to be at the key; it is the condition of the next mutation, so that a
//! stranger's object is never overwritten. A key has a record only while it says more than its
//! owner does.
//!
//! **A delete is due exactly when our object is at the key, no inode owns it and no path names it**
//! (I6). That is decided anew whenever one of the three changes, and once more when the delete
//! begins, so a re-created name inherits the key instead of losing its content to its predecessor's
//! delete; a delete that has begun makes the new store wait.

use crate::Reader;
use crate::counters::Counter;
use crate::dangling::Dangling;
use crate::inode::Loaded;
use crate::kv::{Kv, KvRead};
use crate::limits::{TOMBSTONE_TTL_NS, TOMBSTONES_MAX};
use crate::tables::*;
use ebb_dataplane_protocol::control::PutCondition;
use ebb_dataplane_protocol::{Generation, InodeId, codec};
use ebb_metaplane_protocol::flush::{AttemptResult, KeyWork, KeyWorkKind, Notice};
use ebb_metaplane_protocol::{FsResult, Time};
use rkyv::{Archive, Deserialize, Serialize};

/// What we know to be at a key.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) enum Expected {
    Absent,
    Etag(String),
}

impl Expected {
    pub(crate) fn condition(&self) -> PutCondition {
        match self {
            Self::Absent => PutCondition::IfAbsent,
            Self::Etag(e) => PutCondition::IfMatch(e.clone()),
        }
    }
}

/// A mutation in flight.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) struct Attempt {
    pub(crate) nonce: u128,
    pub(crate) what: Mutation,
    /// In doubt even after looking: look again.
    pub(crate) ambiguous: bool,
    /// Its reply was lost: for how long from the moment it is given up it may still land.
    pub(crate) valid_ns: i64,
}

impl Attempt {
    pub(crate) fn begin(nonce: u128, what: Mutation) -> Self {
        Self { nonce, what, ambiguous: false, valid_ns: 0 }
    }
}

/// What a mutation does.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) enum Mutation {
    Store {
        inode: InodeId,
        generation: Generation,
        length: u64,
        meta_version: u64,
    },
    Delete,
    /// None: the key is looked at after requests that were given up have lapsed (R32).
    Look,
}

/// The state of a key.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) struct KeyState {
    pub(crate) expected: Expected,
    pub(crate) attempt: Option<Attempt>,
    /// A delete waits to begin.
    pub(crate) delete: bool,
    /// What was given up and may still land (R33).
    pub(crate) dangling: Vec<Dangling>,
}

impl KeyState {
    /// Work the key still needs beside a flush in flight.
    pub(crate) fn is_pending(&self) -> bool {
        self.delete
            || !self.dangling.is_empty()
            || self
                .attempt
                .as_ref()
                .is_some_and(|a| a.ambiguous || !matches!(a.what, Mutation::Store { .. }))
    }
}

impl<K: KvRead> Reader<'_, K> {
    pub(crate) fn key_state(&self, s3_key: &str) -> FsResult<Option<KeyState>> {
        match self.0.get(&key(KEY, &[s3_key.as_bytes()])) {
            None => Ok(None),
            Some(b) => Ok(Some(codec::decode(&b).map_err(|_| corrupt("key state"))?)),
        }
    }

    /// The inode whose backing is at the key.
    pub fn owner_of(&self, s3_key: &str) -> FsResult<Option<InodeId>> {
        match self.0.get(&key(OWNER, &[s3_key.as_bytes()])) {
            None => Ok(None),
            Some(v) => Ok(Some(InodeId(u64_at(&v, 0)?))),
        }
    }

    /// The state of a key, from its record or from its owner.
    pub(crate) fn key_state_or_owner(&self, s3_key: &str) -> FsResult<KeyState> {
        if let Some(k) = self.key_state(s3_key)? {
            return Ok(k);
        }
        Ok(KeyState {
            expected: self.owner_etag(s3_key)?,
            attempt: None,
            delete: false,
            dangling: Vec::new(),
        })
    }

    fn owner_etag(&self, s3_key: &str) -> FsResult<Expected> {
        let Some(owner) = self.owner_of(s3_key)? else { return Ok(Expected::Absent) };
        let backing = self.find_inode(owner)?.and_then(|n| n.view.backing.clone());
        Ok(backing.map_or(Expected::Absent, |b| Expected::Etag(b.etag)))
    }

    /// Keys that need work, after `after_key` in key order: deletes to begin and outcomes to look
    /// up. With `in_flight` also attempts whose leader may still be at work: ask for those once,
    /// when a leader takes over.
    ///
    /// A delete goes through `KeyBegin` with a fresh nonce. A look-up needs no `KeyBegin`: it
    /// reports with `KeyDone` under the one nonce it was given. A look-up without an inode is of a
    /// delete: nothing there is `Deleted`, the etag of the condition is `Failed`, else `Foreign`. A
    /// last look (R32) goes through `LookBegin`.
    pub fn key_work(
        &self,
        after_key: Option<&str>,
        limit: usize,
        in_flight: bool,
        now: Time,
    ) -> FsResult<Vec<KeyWork>> {
        let mut work = Vec::new();
        let mut from = after_key.map_or(vec![KEY], |k| after(&key(KEY, &[k.as_bytes()])));
        while work.len() < limit {
            let page = self.scan_prefix(&[KEY], Some(&from), 1000);
            let Some((last, _)) = page.last() else { break };
            from = after(last);
            for (k, v) in page {
                let state: KeyState = codec::decode(&v).map_err(|_| corrupt("key state"))?;
                let kind = match &state.attempt {
                    Some(a) if a.ambiguous || in_flight => {
                        let (inode, generation, length) = match a.what {
                            Mutation::Store { inode, generation, length, .. } => {
                                (Some(inode), generation, length)
                            }
                            Mutation::Delete | Mutation::Look => (None, Generation(0), 0),
                        };
                        let nonces = vec![a.nonce];
                        KeyWorkKind::Resolve { nonces, inode, generation, length }
                    }
                    None if state.has_lapsed(now) => KeyWorkKind::Look,
                    None if state.delete && !state.delete_waits() => KeyWorkKind::Delete,
                    _ => continue,
                };
                let key = String::from_utf8(k[1..].to_vec()).map_err(|_| corrupt("key"))?;
                work.push(KeyWork { key, kind, condition: state.expected.condition() });
                if work.len() == limit {
                    break;
                }
            }
        }
        Ok(work)
    }

    /// Sequence of the last delete of a key, while remembered.
    pub(crate) fn tombstone(&self, s3_key: &str) -> FsResult<Option<u64>> {
        match self.0.get(&key(TOMBSTONE, &[s3_key.as_bytes()])) {
            None => Ok(None),
            Some(v) => Ok(Some(u64_at(&v, 0)?)),
        }
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// Saves a key's state, or drops it when the owner says it all.
    pub(crate) fn put_key(&mut self, s3_key: &str, state: &KeyState) -> FsResult<()> {
        let was = self.read().key_state(s3_key)?.is_some_and(|k| k.is_pending());
        let k = key(KEY, &[s3_key.as_bytes()]);
        let idle = state.attempt.is_none() && !state.delete && state.dangling.is_empty();
        if idle && self.read().owner_etag(s3_key)? == state.expected {
            self.kv.delete(&k);
        } else {
            self.kv.put(&k, &codec::encode(state));
        }
        self.add(Counter::PendingKeys, i64::from(state.is_pending()) - i64::from(was))?;
        Ok(())
    }

    pub(crate) fn set_owner(&mut self, s3_key: &str, inode: InodeId) {
        self.kv.put(&key(OWNER, &[s3_key.as_bytes()]), &be(inode.0));
    }

    /// An inode's bytes are no longer looked for at a key: delete the object, unless the name lives
    /// on under another inode, which inherits the etag as its condition.
    pub(crate) fn retire(&mut self, s3_key: &str, owner: InodeId) -> FsResult<()> {
        if self.read().owner_of(s3_key)? != Some(owner) {
            return Ok(());
        }
        let state = self.read().key_state_or_owner(s3_key)?;
        self.kv.delete(&key(OWNER, &[s3_key.as_bytes()]));
        self.put_key(s3_key, &state)?;
        self.reconsider(s3_key)
    }

    /// Gives up an object that is not there any more: nothing to delete.
    pub(crate) fn disown(&mut self, s3_key: &str, owner: InodeId) -> FsResult<()> {
        if self.read().owner_of(s3_key)? == Some(owner) {
            self.kv.delete(&key(OWNER, &[s3_key.as_bytes()]));
        }
        Ok(())
    }

    /// Decides whether the object at a key is to be deleted.
    pub(crate) fn reconsider(&mut self, s3_key: &str) -> FsResult<()> {
        let Some(mut state) = self.read().key_state(s3_key)? else { return Ok(()) };
        if state.attempt.is_some() {
            // Decided when it settles.
            return Ok(());
        }
        state.delete = matches!(state.expected, Expected::Etag(_))
            && self.read().owner_of(s3_key)?.is_none()
            && self.read().inode_at_key(s3_key)?.is_none();
        self.put_key(s3_key, &state)
    }

    /// Deletes begin: those whose key is still nobody's.
    pub(crate) fn key_begin(&mut self, keys: &[(String, u128)]) -> FsResult<Vec<String>> {
        let mut go_on = Vec::new();
        for (s3_key, nonce) in keys {
            let Some(state) = self.read().key_state(s3_key)? else { continue };
            if let Some(a) = &state.attempt {
                // A look-up that names the attempt it looks for may go on.
                if a.nonce == *nonce {
                    go_on.push(s3_key.clone());
                }
                continue;
            }
            self.reconsider(s3_key)?;
            let Some(mut state) = self.read().key_state(s3_key)? else { continue };
            let waits = state.delete_waits();
            if !state.delete || waits || self.nonce_key(*nonce)?.is_some() {
                continue;
            }
            state.attempt = Some(Attempt::begin(*nonce, Mutation::Delete));
            self.put_key(s3_key, &state)?;
            self.log_nonce(*nonce, s3_key);
            go_on.push(s3_key.clone());
        }
        Ok(go_on)
    }

    /// Last looks begin (R32): nothing else is done at the key meanwhile.
    pub(crate) fn look_begin(&mut self, keys: &[(String, u128)]) -> FsResult<Vec<String>> {
        let mut go_on = Vec::new();
        for (s3_key, nonce) in keys {
            let Some(mut state) = self.read().key_state(s3_key)? else { continue };
            let due = state.attempt.is_none() && state.has_lapsed(self.now);
            if !due || self.nonce_key(*nonce)?.is_some() {
                continue;
            }
            state.attempt = Some(Attempt::begin(*nonce, Mutation::Look));
            self.put_key(s3_key, &state)?;
            self.log_nonce(*nonce, s3_key);
            go_on.push(s3_key.clone());
        }
        Ok(go_on)
    }

    pub(crate) fn log_nonce(&mut self, nonce: u128, s3_key: &str) {
        self.kv.put(&key(ATTEMPT, &[&nonce.to_be_bytes()]), s3_key.as_bytes());
    }

    /// The key of an unsettled attempt.
    pub(crate) fn nonce_key(&self, nonce: u128) -> FsResult<Option<String>> {
        match self.kv.get(&key(ATTEMPT, &[&nonce.to_be_bytes()])) {
            None => Ok(None),
            Some(v) => Ok(Some(String::from_utf8(v).map_err(|_| corrupt("attempt"))?)),
        }
    }

    /// The reply to a mutation was lost: until a look-up says that it landed, it may do so, for
    /// `valid_ms` even after it was given up (R33).
    pub(crate) fn doubt(&mut self, nonce: u128, valid_ms: u64) -> FsResult<()> {
        let Some(s3_key) = self.nonce_key(nonce)? else { return Ok(()) };
        let Some(mut state) = self.read().key_state(&s3_key)? else { return Ok(()) };
        let Some(a) = state.attempt.as_mut().filter(|a| a.nonce == nonce) else { return Ok(()) };
        if a.what == Mutation::Look {
            // Its leader died: somebody else looks.
            state.attempt = None;
            self.kv.delete(&key(ATTEMPT, &[&nonce.to_be_bytes()]));
            self.put_key(&s3_key, &state)?;
            return self.reconsider(&s3_key);
        }
        a.ambiguous = true;
        a.valid_ns = i64::try_from(valid_ms.saturating_mul(1_000_000)).unwrap_or(i64::MAX);
        self.put_key(&s3_key, &state)
    }

    /// The result of a mutation. A repeated or unknown nonce changes nothing.
    pub(crate) fn settle(&mut self, nonce: u128, result: &AttemptResult) -> FsResult<()> {
        let Some(s3_key) = self.nonce_key(nonce)? else { return Ok(()) };
        let Some(mut state) = self.read().key_state(&s3_key)? else { return Ok(()) };
        let Some(attempt) = state.attempt.take() else { return Ok(()) };
        if *result == AttemptResult::Ambiguous {
            state.attempt = Some(Attempt { ambiguous: true, ..attempt });
            return self.put_key(&s3_key, &state);
        }
        self.kv.delete(&key(ATTEMPT, &[&nonce.to_be_bytes()]));
        let landed = matches!(attempt.what, Mutation::Store { .. })
            && matches!(result, AttemptResult::Stored { .. });
        if attempt.valid_ns > 0 && !landed {
            let until = Time(self.now.0.saturating_add(attempt.valid_ns));
            let length = self.expected_length(&s3_key, &state)?;
            state.leave_dangling((nonce, attempt.what.clone()), length, until);
        }
        match &attempt.what {
            Mutation::Delete => {
                state.delete = false;
                match result {
                    AttemptResult::Deleted | AttemptResult::Missing => {
                        state.expected = Expected::Absent;
                        self.put_key(&s3_key, &state)?;
                        self.bury(&s3_key)?;
                    }
                    AttemptResult::Foreign(object) => {
                        state.expected = Expected::Absent;
                        self.put_key(&s3_key, &state)?;
                        self.adopt_at_key(&s3_key, object)?;
                    }
                    AttemptResult::LeftOver(found) => {
                        self.put_key(&s3_key, &state)?;
                        self.take_left_over(&s3_key, found)?;
                    }
                    _ => self.put_key(&s3_key, &state)?,
                }
            }
            Mutation::Store { inode, .. } => {
                let hit = match result {
                    AttemptResult::Stored { etag, .. } => state.may_be_hit(&attempt.what, etag),
                    _ => false,
                };
                self.settle_store(*inode, nonce, &s3_key, state, (result, hit))?;
            }
            Mutation::Look => {
                self.put_key(&s3_key, &state)?;
                if let AttemptResult::LeftOver(found) = result {
                    self.take_left_over(&s3_key, found)?;
                }
                // One that could not look is repeated.
                if !matches!(result, AttemptResult::Failed(_)) {
                    let mut state = self.read().key_state_or_owner(&s3_key)?;
                    state.forget_lapsed(self.now);
                    self.put_key(&s3_key, &state)?;
                }
            }
        }
        self.reconsider(&s3_key)
    }

    /// Length of the object that is expected at a key, if its owner tells.
    fn expected_length(&self, s3_key: &str, state: &KeyState) -> FsResult<Option<u64>> {
        let Expected::Etag(etag) = &state.expected else { return Ok(None) };
        let Some(owner) = self.read().owner_of(s3_key)? else { return Ok(None) };
        let backing = self.read().find_inode(owner)?.and_then(|n| n.view.backing.clone());
        Ok(backing.filter(|b| b.etag == *etag).map(|b| b.length))
    }

    /// Remembers a delete, so that a listing that began before it does not bring the name back.
    fn bury(&mut self, s3_key: &str) -> FsResult<()> {
        let k = key(TOMBSTONE, &[s3_key.as_bytes()]);
        let mut count = self.read().counter(Counter::Tombstones)?;
        if let Some(old) = self.read().tombstone(s3_key)? {
            self.kv.delete(&key(TOMBSTONE_AGE, &[&be(old), s3_key.as_bytes()]));
            count -= 1;
        }
        self.kv.put(&k, &be(self.sequence));
        self.kv
            .put(&key(TOMBSTONE_AGE, &[&be(self.sequence), s3_key.as_bytes()]), &be_time(self.now));
        count += 1;
        // Amortised: each delete forgets up to two old ones.
        for (age_key, stamp) in self.read().scan_prefix(&[TOMBSTONE_AGE], None, 2) {
            let old = time_at(&stamp, 0)?.0 < self.now.0.saturating_sub(TOMBSTONE_TTL_NS);
            if !old && count <= TOMBSTONES_MAX {
                break;
            }
            let sequence = u64_at(&age_key, 1)?;
            self.kv.delete(&key(TOMBSTONE, &[&age_key[9..]]));
            self.kv.delete(&age_key);
            // Listings older than what was forgotten are refused from now on.
            self.set_counter(Counter::TombstoneFloor, sequence);
            count -= 1;
        }
        self.set_counter(Counter::Tombstones, count);
        Ok(())
    }

    /// An inode lost its name: it goes, unless it has another one or someone has it open. Its entry is gone already (or
    /// names another inode by now). `old_key`: the key of the name.
    pub(crate) fn drop_name(&mut self, id: InodeId, old_key: Option<&str>) -> FsResult<()> {
        let mut n = self.read().inode(id)?;
        if let Some(file) = n.link_of() {
            self.drop_link(n, file)?;
        } else if !n.has_links() || !self.take_other_name(n.clone())? {
            n.nlink = 0;
            n.ctime = self.now;
            if n.is_file() && self.lingers(id) {
                self.save(n)?;
            } else {
                self.remove_inode(n)?;
            }
        }
        match old_key {
            Some(k) => self.reconsider(k),
            None => Ok(()),
        }
    }

    /// Removes an inode that has neither name nor handle, with its object and the nodes' data.
    pub(crate) fn remove_inode(&mut self, n: Loaded) -> FsResult<()> {
        let (inode, alloc_limit, file) = (n.id, n.reach(), n.is_file());
        if let Some(b) = &n.view.backing {
            // While the record still tells the etag.
            let s3_key = b.key.clone();
            self.retire(&s3_key, inode)?;
        }
        self.erase(n)?;
        if file {
            self.notify(Notice::Drop { inode, alloc_limit })?;
        }
        Ok(())
    }
}
