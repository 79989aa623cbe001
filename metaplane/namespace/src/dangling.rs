//! Requests that were given up but may still land (PROTOCOL R32, R33).
//!
//! A request whose reply was lost, and that a look-up did not find, may be on its way for as long as
//! its signature is valid. Its condition protects whatever came after, but conditions recur: a key is
//! absent again after a delete, and equal content has an equal etag. So while it may land:
//!
//! - no delete begins past a lost If-None-Match (the deleted file would be back);
//! - no store begins that would bring back the etag of a lost If-Match (the lost delete, or the lost
//!   older content, would land on it). Where nobody can tell before, and no clean byte is at stake, it
//!   does begin; if its etag turns out to be that one, it isn't credited before the time is over.
//!
//! Everything else goes on. When the time is over the key is looked at once more ([`Mutation::Look`]):
//! what landed unnoticed is overwritten or deleted like any object of ours. Bounded: with
//! [`DANGLING_PER_KEY_MAX`] of them a key starts nothing more.

use crate::Reader;
use crate::inode::Inode;
use crate::key_state::{Expected, KeyState, Mutation};
use crate::kv::{Kv, KvRead};
use crate::limits::DANGLING_PER_KEY_MAX;
use crate::tables::{Ctx, KEY, after, corrupt};
use ebb_dataplane_protocol::{Backing, InodeId, ViewVersion, codec};
use ebb_metaplane_protocol::flush::LeftOver;
use ebb_metaplane_protocol::{FsResult, Time};
use rkyv::{Archive, Deserialize, Serialize};

/// Requests that land only while `condition` holds.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub(crate) struct Dangling {
    condition: Expected,
    /// Length of the object that the condition names, where known.
    length: Option<u64>,
    /// Nonce and effect of each.
    requests: Vec<(u128, Mutation)>,
    /// The last of their signatures ends.
    until: Time,
}

/// What is known of a store before it begins.
pub(crate) struct Intent<'a> {
    pub(crate) what: &'a Mutation,
    pub(crate) length: u64,
    /// Its object will have the etag of this one: a copy.
    pub(crate) same_as: Option<&'a str>,
    /// Clean bytes of the object at this very key go into it.
    pub(crate) base: Option<(InodeId, &'a str)>,
}

impl KeyState {
    /// An attempt is given up that was sent while `expected` held.
    pub(crate) fn leave_dangling(
        &mut self,
        (nonce, what): (u128, Mutation),
        length: Option<u64>,
        until: Time,
    ) {
        let known = self.dangling.iter_mut().find(|d| d.condition == self.expected);
        match known {
            Some(d) => {
                d.length = d.length.or(length);
                d.until = d.until.max(until);
                d.requests.push((nonce, what));
            }
            None => self.dangling.push(Dangling {
                condition: self.expected.clone(),
                length,
                requests: vec![(nonce, what)],
                until,
            }),
        }
    }

    /// Forgets those whose time is over.
    pub(crate) fn forget_lapsed(&mut self, now: Time) {
        self.dangling.retain(|d| d.until > now);
    }

    /// A request that was found at the key can't land again. What it was.
    fn landed(&mut self, nonce: u128) -> Option<Mutation> {
        let mut found = None;
        for d in &mut self.dangling {
            if let Some(i) = d.requests.iter().position(|(n, _)| *n == nonce) {
                found = Some(d.requests.swap_remove(i).1);
            }
        }
        self.dangling.retain(|d| !d.requests.is_empty());
        found
    }

    /// A last look is due.
    pub(crate) fn has_lapsed(&self, now: Time) -> bool {
        self.dangling.iter().any(|d| d.until <= now)
    }

    /// When the last of them ends.
    pub(crate) fn dangles_until(&self) -> Option<Time> {
        self.dangling.iter().map(|d| d.until).max()
    }

    /// What has lapsed counts until it was looked for: it may have landed.
    fn is_full(&self) -> bool {
        self.dangling.iter().map(|d| d.requests.len()).sum::<usize>() >= DANGLING_PER_KEY_MAX
    }

    /// Whether a store must wait.
    pub(crate) fn store_waits(&self, store: &Intent<'_>) -> bool {
        let hits = |d: &Dangling| {
            let Expected::Etag(etag) = &d.condition else { return false };
            // The same bytes and attributes once more do no harm.
            if d.requests.iter().all(|(_, what)| what == store.what) {
                return false;
            }
            if let Some(known) = store.same_as {
                return known == etag;
            }
            if d.length.is_some_and(|l| l != store.length) {
                return false;
            }
            if store.length == 0 {
                return true;
            }
            let Some((inode, base)) = store.base else { return false };
            // Over that very object: older content of this file, made from the same base, has
            // every clean byte of it.
            let own =
                |what: &Mutation| matches!(what, Mutation::Store { inode: i, .. } if *i == inode);
            !(base == etag && d.requests.iter().all(|(_, what)| own(what)))
        };
        self.is_full() || self.dangling.iter().any(hits)
    }

    /// Whether a delete must wait.
    pub(crate) fn delete_waits(&self) -> bool {
        self.is_full() || self.dangling.iter().any(|d| d.condition == Expected::Absent)
    }

    /// Whether what `store` left at the key may still be hit by a lost request that means an older
    /// object with the same etag.
    pub(crate) fn may_be_hit(&self, store: &Mutation, etag: &str) -> bool {
        self.dangling.iter().any(|d| {
            matches!(&d.condition, Expected::Etag(e) if e == etag)
                && d.requests.iter().any(|(_, what)| what != store)
        })
    }
}

impl<K: KvRead> Reader<'_, K> {
    /// Keys with requests that may still land, and until when, at most `limit`: for people.
    pub fn dangling_keys(&self, limit: usize) -> FsResult<Vec<(String, Time)>> {
        let mut found = Vec::new();
        let mut from = vec![KEY];
        while found.len() < limit {
            let page = self.scan_prefix(&[KEY], Some(&from), 1000);
            let Some((last, _)) = page.last() else { break };
            from = after(last);
            for (k, v) in page {
                let state: KeyState = codec::decode(&v).map_err(|_| corrupt("key state"))?;
                let Some(until) = state.dangles_until() else { continue };
                let key = String::from_utf8(k[1..].to_vec()).map_err(|_| corrupt("key"))?;
                found.push((key, until));
            }
        }
        found.truncate(limit);
        Ok(found)
    }

    /// Whether an object at a key is a late arrival: its nonce is of a request that was given up.
    pub fn is_given_up(&self, s3_key: &str, nonce: u128) -> FsResult<bool> {
        let state = self.key_state(s3_key)?;
        Ok(state.is_some_and(|k| {
            k.dangling.iter().any(|d| d.requests.iter().any(|(n, _)| *n == nonce))
        }))
    }
}

impl<K: Kv> Ctx<'_, K> {
    /// A late arrival was found at a key: it is what the next mutation there expects. If it took the
    /// place of its own file's base, it is the base now: it was made from that very object, and what
    /// was dirty then is still dirty on the nodes. It isn't credited.
    pub(crate) fn take_left_over(&mut self, s3_key: &str, found: &LeftOver) -> FsResult<()> {
        let mut state = self.read().key_state_or_owner(s3_key)?;
        let what = state.landed(found.nonce);
        state.expected = Expected::Etag(found.etag.clone());
        self.put_key(s3_key, &state)?;
        let Some(Mutation::Store { inode, .. }) = what else { return Ok(()) };
        if self.read().owner_of(s3_key)? != Some(inode) {
            return Ok(());
        }
        let Some(mut n) = self.read().find_inode(inode)? else { return Ok(()) };
        let Some(b) = n.view.backing.clone().filter(|b| b.key == s3_key) else { return Ok(()) };
        n.view.version = ViewVersion(n.view.version.0 + 1);
        n.view.backing = Some(Backing {
            key: b.key.clone(),
            etag: found.etag.clone(),
            length: found.length,
            limit: b.valid_bytes().min(found.length),
        });
        // Its other names' objects stay: the base that they hold makes the same of what is dirty.
        self.save(n)?;
        self.put_key(s3_key, &state)
    }
}

/// Whether clean bytes of the object at `target` go into a store there.
pub(crate) fn base_at<'a>(n: &'a Inode, target: &str) -> Option<(InodeId, &'a str)> {
    let b = n.view.backing.as_ref().filter(|b| b.key == target && b.valid_bytes() > 0)?;
    Some((n.id, b.etag.as_str()))
}
