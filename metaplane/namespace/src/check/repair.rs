//! Mends what a check found. Each repair looks again: between the check and this command the state went
//! on. None takes a name from an inode that has no other, nor a byte from S3.

use super::inodes::Place;
use crate::counters::Counter;
use crate::dirtiness::Phase;
use crate::handle::Handle;
use crate::inode::Loaded;
use crate::kv::Kv;
use crate::tables::*;
use ebb_dataplane_protocol::{HandleId, InodeId, SessionId, codec};
use ebb_metaplane_protocol::FsResult;
use ebb_metaplane_protocol::check::Repair;
use ebb_metaplane_protocol::flush::Notice;

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn repair_all(&mut self, repairs: &[Repair]) -> FsResult<()> {
        for repair in repairs {
            self.repair(repair)?;
        }
        // Counts that were found to be wrong in this state, or before, are not changed once more.
        if repairs.iter().any(|r| matches!(r, Repair::Count { .. })) {
            self.next(Counter::Repairs)?;
        }
        Ok(())
    }

    fn repair(&mut self, repair: &Repair) -> FsResult<()> {
        match repair {
            Repair::Derive(id) => self.derive(*id),
            Repair::Name(dir, name) => self.mend_name(*dir, name),
            Repair::Orphan(id) => self.mend_orphan(*id),
            Repair::Handle(id) => self.mend_handle(*id),
            Repair::Session(id) => self.mend_session(*id),
            Repair::Dirty(id) => self.mend_clean(*id),
            Repair::Flush(id) => self.mend_flush(*id),
            Repair::Key(s3_key) => self.mend_key(s3_key),
            Repair::Record(k) => self.mend_record(k),
            Repair::Tombstone(s3_key) => self.mend_tombstone(s3_key),
            Repair::AtLeast(number, least) => self.mend_number(*number, *least),
            Repair::Count { counter, by, repairs } => self.mend_count(*counter, *by, *repairs),
        }
    }

    fn derive(&mut self, id: InodeId) -> FsResult<()> {
        let Some(mut n) = self.read().find_inode(id)? else { return Ok(()) };
        if let Some((since, stage)) = n.queued() {
            self.put_if_other(&key(DIRTY, &[&be_time(since), &be(id.0)]), &[stage]);
        }
        for pg in self.read().groups_of_held(&n)? {
            if !self.read().is_held(pg, id, u64::MAX)? {
                // As old as can be: nobody takes the group's holder for dispensable.
                let place = key(HELD, &[&pg.0.to_be_bytes(), &be(id.0)]);
                self.kv.put(&place, &be(0));
            }
        }
        if !matches!(self.read().xattr_record(id), Ok(Some(_))) && n.has_xattrs() {
            self.miss_xattrs(n)?;
            return self.derive(id);
        }
        let own = self.read().should_own(&n)?;
        if let Some(b) = n.view.backing.as_ref().filter(|_| own) {
            let other = self.read().owner_of(&b.key)?.filter(|o| *o != id);
            let theirs = other.map(|o| self.read().find_inode(o)).transpose()?.flatten();
            let theirs = theirs.and_then(|o| o.view.backing.clone());
            if theirs.is_none_or(|t| t.key != b.key) {
                self.set_owner(&b.key, id);
            }
        }
        if !n.view.cuts.is_empty() {
            let alloc_limit = n.reach();
            let generation = n.view.cuts.iter().map(|c| c.generation).max().unwrap_or_default();
            self.notify(Notice::ApplyView { inode: id, generation, alloc_limit })?;
        }
        if let Some(file) = n.link_of() {
            self.put_if_other(&key(LINK, &[&be(file.0), &be(id.0)]), &[]);
            return self.mend_links(file);
        }
        self.mend_links(id)?;
        let mut at = id;
        while n.is_dir() {
            let below = self.read().below(at)?;
            let links = 2 + below.directories;
            let Some(d) = &mut n.dir else { return Ok(()) };
            let incomplete = below.incomplete + u64::from(!d.is_complete());
            let right = d.incomplete == incomplete && d.deepest >= below.deepest;
            let above = (d.incomplete, d.deepest);
            (d.incomplete, d.deepest) = (incomplete, d.deepest.max(below.deepest));
            let changed = above != (d.incomplete, d.deepest);
            let links_right = n.nlink == links || n.nlink == 0;
            if right && links_right {
                return Ok(());
            }
            if !links_right {
                n.nlink = links;
            }
            let parent = n.parent;
            self.save(n)?;
            if !changed || at == InodeId::ROOT {
                return Ok(());
            }
            at = parent;
            match self.read().find_inode(at)? {
                Some(up) => n = up,
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// A file's links are its names.
    fn mend_links(&mut self, file: InodeId) -> FsResult<()> {
        let Some(mut n) = self.read().find_inode(file)? else { return Ok(()) };
        if !n.is_dir() && n.link_of().is_none() && n.nlink > 0 {
            let links = self.read().names_of(&n)?;
            if n.nlink != links {
                n.nlink = links;
                self.save(n)?;
            }
        }
        Ok(())
    }

    fn put_if_other(&mut self, k: &[u8], v: &[u8]) {
        if self.kv.get(k).as_deref() != Some(v) {
            self.kv.put(k, v);
        }
    }

    fn mend_name(&mut self, dir: InodeId, name: &[u8]) -> FsResult<()> {
        let Some(id) = self.read().holder(dir, name)? else { return Ok(()) };
        if self.read().wrong_name(dir, name, id)?.is_none() {
            return Ok(());
        }
        let d = self.read().find_inode(dir)?.filter(|d| d.is_dir() && d.nlink > 0);
        if let (Some(_), Some(n)) = (&d, self.read().find_inode(id)?)
            && n.nlink > 0
            && id != InodeId::ROOT
            && n.parent == dir
            && n.name == name
        {
            // Only what it shows is wrong.
            self.put_entry_of(dir, name, &n);
            return Ok(());
        }
        if let (Some(_), Some(mut n)) = (&d, self.read().find_inode(id)?)
            && n.nlink > 0
            && id != InodeId::ROOT
            && self.read().place(&n)? == Place::Lost
        {
            // Its only name: whatever it says itself.
            (n.parent, n.name) = (dir, name.to_vec());
            let now = self.now;
            n.mark_dirty(now);
            self.put_entry_of(dir, name, &n);
            self.save(n)?;
            return self.derive(dir);
        }
        self.delete_entry(dir, name);
        self.derive(dir)
    }

    fn mend_orphan(&mut self, id: InodeId) -> FsResult<()> {
        let Some(n) = self.read().find_inode(id)? else { return Ok(()) };
        if n.nlink == 0 {
            let stays = self.read().may_stay_unnamed(&n);
            return if stays { Ok(()) } else { self.remove_inode(n) };
        }
        if let Some(file) = n.link_of()
            && self.read().find_inode(file)?.is_none_or(|f| f.nlink == 0)
        {
            // A name of nothing.
            if self.read().holder(n.parent, &n.name)? == Some(id) {
                self.delete_entry(n.parent, &n.name);
            }
            let parent = n.parent;
            self.remove_inode(n)?;
            return self.derive(parent);
        }
        if self.read().place(&n)? == Place::Named {
            return Ok(());
        }
        let (parent, name) = (n.parent, n.name.clone());
        let dir = self.read().find_inode(parent)?.filter(|d| d.is_dir() && d.nlink > 0);
        let free = self.read().entry(parent, &name)?.is_none();
        if let (Some(dir), true) = (&dir, free)
            && self.read().place(dir)? == Place::Named
            && self.read().path_of(parent)?.len() < crate::limits::PATH_COMPONENTS_MAX
        {
            self.put_entry_of(parent, &name, &n);
            return self.derive(parent);
        }
        if self.read().holder(parent, &name)? == Some(id) {
            self.delete_entry(parent, &name);
        }
        self.put_in_root(n)
    }

    /// What can be reached no other way is found in the root.
    fn put_in_root(&mut self, mut n: Loaded) -> FsResult<()> {
        let (id, old) = (n.id, n.parent);
        let name = format!("lost+found-{:x}", id.0).into_bytes();
        if self.read().holder(InodeId::ROOT, &name)?.is_some_and(|other| other != id) {
            return Ok(());
        }
        (n.parent, n.name) = (InodeId::ROOT, name.clone());
        let now = self.now;
        n.mark_dirty(now);
        let is_dir = n.is_dir();
        self.put_entry_of(InodeId::ROOT, &name, &n);
        self.save(n)?;
        if is_dir {
            // Whose objects lie under its former path looks for them.
            self.begin_move(id, String::new())?;
            self.derive(id)?;
        }
        self.derive(InodeId::ROOT)?;
        self.derive(old)
    }

    fn mend_handle(&mut self, id: HandleId) -> FsResult<()> {
        let Some(bytes) = self.kv.get(&key(HANDLE, &[&be(id.0)])) else { return Ok(()) };
        let h: Handle = codec::decode(&bytes).map_err(|_| corrupt("handle"))?;
        let lives = self.read().session_exists(h.session)?;
        if !lives || self.read().find_inode(h.inode)?.is_none() {
            self.close_handle(id, &h)?;
            return self.mend_session(h.session);
        }
        self.put_if_other(&key(OPEN, &[&be(h.inode.0), &be(id.0)]), &be(h.session.0));
        let of_session = key(SESSION_HANDLE, &[&be(h.session.0), &be(h.inode.0), &be(id.0)]);
        self.put_if_other(&of_session, &[u8::from(h.write)]);
        self.mend_session(h.session)
    }

    fn mend_session(&mut self, id: SessionId) -> FsResult<()> {
        let (replies, handles) = self.read().session_counts(id);
        let Some(s) = self.read().session(id)? else { return Ok(()) };
        let place = key(CLIENT, &[&s.client.to_be_bytes()]);
        if let Some(v) = self.kv.get(&place) {
            let other = SessionId(u64_at(&v, 0)?);
            if other != id && self.read().session(other)?.is_some_and(|o| o.client == s.client) {
                // Its client has another one; what this one has open is fenced.
                return self.end_copy(id, &place, other);
            }
        }
        self.put_if_other(&place, &be(id.0));
        self.update_session(id, |s| (s.replies, s.handles) = (replies, handles))
    }

    fn end_copy(&mut self, id: SessionId, place: &[u8], keeps: SessionId) -> FsResult<()> {
        self.end_sessions(&[id])?;
        self.kv.put(place, &be(keeps.0));
        Ok(())
    }

    fn mend_clean(&mut self, id: InodeId) -> FsResult<()> {
        let Some(mut n) = self.read().find_inode(id)? else { return Ok(()) };
        let moving = self.read().pending_moves()? > 0;
        if self.read().is_clean_rightly(&n, moving)? {
            return Ok(());
        }
        let now = self.now;
        n.mark_dirty(now);
        self.save(n)
    }

    fn mend_flush(&mut self, id: InodeId) -> FsResult<()> {
        let Some(n) = self.read().find_inode(id)? else { return Ok(()) };
        let Phase::Flushing(f) = n.phase.clone() else { return Ok(()) };
        if self.read().has_attempt(&n)? { Ok(()) } else { self.give_up(n, f) }
    }

    fn mend_key(&mut self, s3_key: &str) -> FsResult<()> {
        let Some(mut state) = self.read().key_state(s3_key)? else { return Ok(()) };
        let Some(nonce) = state.attempt.as_ref().map(|a| a.nonce) else {
            return self.reconsider(s3_key);
        };
        let there = self.nonce_key(nonce)?;
        if let Some(other) = there.filter(|other| other != s3_key) {
            let theirs = self.read().key_state(&other)?.and_then(|k| k.attempt);
            if theirs.is_some_and(|a| a.nonce == nonce) {
                // A nonce is of one attempt, at the key that it says itself.
                state.attempt = None;
                self.put_key(s3_key, &state)?;
                return self.reconsider(s3_key);
            }
        }
        self.log_nonce(nonce, s3_key);
        Ok(())
    }

    fn mend_record(&mut self, k: &[u8]) -> FsResult<()> {
        let Some(v) = self.kv.get(k).filter(|_| k.len() > 1) else { return Ok(()) };
        if self.read().stale(k, &v)?.is_none() {
            return Ok(());
        }
        match k[0] {
            // Others' locks on the file stay.
            SESSION_LOCK => {
                return self.drop_locks(SessionId(u64_at(k, 1)?), InodeId(u64_at(k, 9)?));
            }
            LOCK => return self.mend_locks(InodeId(u64_at(k, 1)?)),
            XATTR => return self.mend_xattrs(InodeId(u64_at(k, 1)?)),
            _ => {}
        }
        self.kv.delete(k);
        match k[0] {
            LINK => self.mend_links(InodeId(u64_at(k, 1)?)),
            // Its place may only be another one, or another inode's.
            DIRTY => self.derive(InodeId(u64_at(k, 9)?)),
            SESSION_HANDLE | REPLY => self.mend_session(SessionId(u64_at(k, 1)?)),
            OWNER => {
                match self.read().inode_at_key(std::str::from_utf8(&k[1..]).unwrap_or_default())? {
                    Some(id) => self.derive(id),
                    None => Ok(()),
                }
            }
            // An unlinked inode that only this kept goes.
            OPEN | LINGERING => match self.read().find_inode(InodeId(u64_at(k, 1)?))? {
                Some(n) if !self.read().may_stay_unnamed(&n) => self.remove_inode(n),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn mend_tombstone(&mut self, s3_key: &str) -> FsResult<()> {
        let Some(sequence) = self.read().tombstone(s3_key)? else { return Ok(()) };
        let age = key(TOMBSTONE_AGE, &[&be(sequence), s3_key.as_bytes()]);
        if self.kv.get(&age).is_none() {
            self.kv.put(&age, &be_time(self.now));
        }
        Ok(())
    }

    fn mend_number(&mut self, number: u8, least: u64) -> FsResult<()> {
        let Some(counter) = Counter::of(number).filter(|c| super::NUMBERS.contains(c)) else {
            return Ok(());
        };
        if self.read().counter(counter)? < least {
            self.set_counter(counter, least);
        }
        Ok(())
    }

    /// Whatever was counted since the check counts on the right one and the wrong one alike.
    fn mend_count(&mut self, number: u8, by: i64, repairs: u64) -> FsResult<()> {
        let Some(counter) = Counter::of(number).filter(|c| super::COUNTED.contains(c)) else {
            return Ok(());
        };
        if self.read().counter(Counter::Repairs)? != repairs {
            return Ok(());
        }
        self.add(counter, by)?;
        Ok(())
    }
}
