//! Requests that arrive late, and what a flush does without its base.

use super::*;

impl World {
    /// What is dirty of a file that lost its base, one object for each write that still counts.
    pub(super) fn rescue(&mut self, plan: &StorePlan) {
        let pins = self.node[&plan.inode].pins[&plan.generation.0].clone();
        let mut bytes: BTreeMap<u64, u8> = BTreeMap::new();
        for (_, start, body) in pins {
            bytes.extend(body.iter().enumerate().map(|(i, b)| (start + i as u64, *b)));
        }
        let mut ranges: Vec<(u64, Vec<u8>)> = Vec::new();
        for (at, b) in bytes.into_iter().filter(|(at, _)| *at < plan.attr.size) {
            match ranges.last_mut() {
                Some((start, body)) if *start + body.len() as u64 == at => body.push(b),
                _ => ranges.push((at, vec![b])),
            }
        }
        let mut rescued = Vec::new();
        for (offset, body) in ranges {
            let length = body.len() as u64;
            let key = format!("{}/{offset}-{length}", plan.key);
            let object = Object {
                etag: String::new(),
                body,
                nonce: Some(plan.nonce),
                mode: plan.attr.mode,
                kind: FileKind::File,
                mtime: plan.attr.mtime,
                xattrs: plan.xattrs.clone(),
                link: None,
            };
            self.bucket.put(&key, &PutCondition::None, object);
            let etag = self.bucket.objects[&key].etag.clone();
            rescued.push(RescuedRange { offset, length, etag });
        }
        let (inode, generation) = (plan.inode, plan.generation);
        self.done(Command::Rescued(Rescue { inode, generation, ranges: rescued }));
    }
    /// A late arrival of ours.
    pub(super) fn is_given_up(&self, key: &str, o: &Object) -> bool {
        o.nonce.is_some_and(|n| self.read().is_given_up(key, n).expect("readable"))
    }
    /// A request without an answer: it may come late.
    pub(super) fn lose(&mut self, mut flight: Flight) {
        if let Flight::Put { plan, object } = &mut flight
            && object.is_none()
        {
            match self.object(plan) {
                Ok(o) => *object = Some(o),
                Err(_) => return,
            }
        }
        self.zombies.push((flight, self.now + VALID_MS as i64 * 1_000_000));
    }
    pub(super) fn doubt(&mut self, nonce: u128) {
        if self.doubts {
            self.done(Command::KeyDoubt { nonce, valid_ms: VALID_MS });
        } else {
            self.done(Command::KeyDone {
                key: String::new(),
                nonce,
                result: AttemptResult::Ambiguous,
            });
        }
    }
    /// The base of a copy is not what it was: an outside change, unless there is dirt of ours.
    pub fn look_at_base(&mut self, plan: &StorePlan) {
        let inode = plan.inode;
        let Some(b) = plan.view.backing.clone() else { return };
        let found = match self.bucket.objects.get(&b.key) {
            Some(o) if o.etag == b.etag => return,
            Some(o) if self.is_given_up(&b.key, o) => BaseFound::LeftOver(left_over(o)),
            Some(o) => BaseFound::Foreign(ForeignObject {
                etag: o.etag.clone(),
                size: o.body.len() as u64,
                attrs: attrs_of(o),
            }),
            None => BaseFound::Gone,
        };
        self.done(Command::BaseChanged(vec![BaseChange {
            inode,
            key: b.key,
            etag: b.etag,
            found,
        }]));
    }
    pub fn zombie_acts(&mut self, i: usize, arrives: bool) {
        let (flight, until) = self.zombies.remove(i);
        if !arrives || self.now > until {
            return;
        }
        let key = flight.key().to_owned();
        let before = self.bucket.objects.get(&key).cloned();
        match flight {
            Flight::Put { plan, object } => {
                let object = object.expect("it was sent");
                let removed = self.removed.get(&(key.clone(), plan.inode));
                let removed = removed.is_some_and(|last| plan.nonce < *last);
                let lands = self.bucket.put(&key, &plan.condition, object);
                assert!(!lands || !removed, "the removed file {key} came back");
            }
            Flight::Delete { condition, .. } => {
                self.bucket.delete(&key, &condition);
            }
        }
        let after = self.bucket.objects.get(&key);
        let same = |a: &Object| after.is_some_and(|b| a.body == b.body && a.mode == b.mode);
        if before.is_none_or(|o| same(&o)) {
            return;
        }
        let r = self.read();
        if let Some(owner) = r.owner_of(&key).expect("readable") {
            // Without a name nothing is credited any more.
            let queued = r.dirty_walk(owner).is_ok_and(|(_, own)| own.is_some());
            let dirty = queued || r.attr(owner).is_ok_and(|(a, _)| a.nlink == 0);
            assert!(dirty, "what was credited at {key} was changed by a late request");
        }
    }
    /// Looks at keys whose lost requests have lapsed (R32).
    pub fn look_again(&mut self) {
        let work = self.read().key_work(None, 10_000, false, Time(self.now)).expect("readable");
        for w in work.into_iter().filter(|w| w.kind == KeyWorkKind::Look) {
            let nonce = self.nonce();
            let begin = Command::LookBegin(vec![(w.key.clone(), nonce)]);
            let CommandReply::Keys(go_on) = self.apply(begin) else { panic!("it answers keys") };
            if go_on.is_empty() {
                continue;
            }
            let result = match self.bucket.objects.get(&w.key) {
                Some(o) if self.is_given_up(&w.key, o) => AttemptResult::LeftOver(left_over(o)),
                _ => AttemptResult::Deleted,
            };
            self.done(Command::KeyDone { key: w.key, nonce, result });
        }
    }
}

pub(super) fn left_over(o: &Object) -> LeftOver {
    LeftOver { nonce: o.nonce.expect("ours"), etag: o.etag.clone(), length: o.body.len() as u64 }
}
