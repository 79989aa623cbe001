//! Requests of the metadata plane, and everything else that is journaled step by step.
//!
//! A control request becomes a list of [`Step`]s. Steps run in order; one that the store makes wait
//! parks the task until the next batch. When the last ticket is durable (tickets are durable in order,
//! so the last one covers all), the task is answered. All steps are idempotent, so a repeated request
//! simply runs again.

use super::placement::Refusal;
use super::replica::lead::Barrier;
use super::upload::PutTask;
use super::write::waits_for_batch;
use super::{Buffer, Command, Owed, PATIENCE_MS, PeerInfo, RETRY_BUSY_MS, ShardCore, Waiter};
use ebb_dataplane_protocol::control::{
    BATCH_MAX, Control, ControlReply, FlushDone, SealItem, SealedItem, WindowEntry,
};
use ebb_dataplane_protocol::replica::Ship;
use ebb_dataplane_protocol::{
    FileView, Generation, Grant, InodeId, MapVersion, PgEpoch, PgId, SignedGrant, Status, codec,
};
use ebb_store::{ControlError, Scope, Ticket, ViewUpdate};
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ControlId(u64);

/// One thing to journal, or to do between two of them.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Seal(Scope, Generation),
    FlushDone(PgId, FlushDone),
    FlushAborted(Scope, Generation),
    View(ViewUpdate),
    /// The view serves from here on; runs when everything before it is durable.
    Install(InodeId, Arc<FileView>),
    /// The inode is gone: no grant and no view of it serves any more.
    Forget(InodeId),
    Drop(Scope),
    EvictClean(Vec<InodeId>),
    TakeWindows(PgId, PgEpoch, Vec<WindowEntry>),
    Freeze(PgId, PgEpoch),
    Thaw(PgId, PgEpoch),
    ReleasePg(PgId, PgEpoch),
    DiscardPg(PgId, PgEpoch),
}

impl Step {
    /// Whose it is.
    fn scope(&self) -> Option<Scope> {
        match self {
            Step::Seal(scope, _) | Step::FlushAborted(scope, _) | Step::Drop(scope) => Some(*scope),
            Step::FlushDone(pg, done) => Some(Scope { inode: done.inode, pg: *pg }),
            Step::View(update) => Some(update.scope),
            _ => None,
        }
    }

    /// What the other members of its group are told.
    fn ship(&self) -> Option<(PgId, Ship)> {
        Some(match self {
            Step::Seal(scope, g) => (scope.pg, Ship::Seal(scope.inode, *g)),
            Step::FlushDone(pg, done) => (*pg, Ship::FlushDone(*done)),
            Step::FlushAborted(scope, g) => (scope.pg, Ship::FlushAborted(scope.inode, *g)),
            Step::View(u) => {
                let view = Ship::View {
                    inode: u.scope.inode,
                    version: u.version,
                    content: u.base.content,
                    valid_bytes: u.base.valid_bytes,
                    cuts: u.cuts.clone(),
                };
                (u.scope.pg, view)
            }
            Step::Drop(scope) => (scope.pg, Ship::Drop(scope.inode)),
            Step::TakeWindows(pg, _, entries) => (*pg, Ship::Windows(entries.clone())),
            Step::Freeze(pg, epoch) => (*pg, Ship::Freeze(*epoch)),
            Step::Thaw(pg, epoch) => (*pg, Ship::Thaw(*epoch)),
            Step::Install(..)
            | Step::Forget(_)
            | Step::EvictClean(_)
            // Who gives a group away has no others to tell: they are told by the map.
            | Step::ReleasePg(..)
            | Step::DiscardPg(..) => return None,
        })
    }
}

/// What the answer is made of.
#[derive(Debug)]
pub(crate) enum Finish {
    Done,
    Sealed(Vec<SealItem>),
    Present(Box<Grant>),
    Warm(Box<Grant>, ebb_dataplane_protocol::ByteRange),
}

#[derive(Debug)]
pub(crate) struct ControlTask {
    owed: Owed,
    steps: Vec<Step>,
    next: usize,
    /// `ShardCore::leads` when it began.
    leads: u64,
    /// The newest ticket of the steps so far.
    ticket: Option<Ticket>,
    finish: Finish,
    /// Every ticket is durable.
    durable: bool,
    /// Mutations that have to be everywhere before the answer (R42).
    barriers: Vec<Awaited>,
}

/// Of a group, in one time of leading it.
#[derive(Clone, Copy, Debug)]
struct Awaited {
    pg: PgId,
    lead: u64,
    barrier: Barrier,
}

/// A request that waits for a newer map.
#[derive(Debug)]
pub(crate) struct AwaitsMap {
    version: MapVersion,
    owed: Owed,
    /// Of a grant that is presented; `None`: a control request.
    peer: Option<PeerInfo>,
    body: Vec<u8>,
    since_ms: u64,
}

/// Whether a request only asks for counters: who is not the metadata plane may send that.
pub(crate) fn is_harmless(body: &[u8]) -> bool {
    matches!(codec::decode(body), Ok(Control::Stats))
}

impl<B: Buffer> ShardCore<B> {
    pub(crate) fn control(&mut self, owed: Owed, body: &[u8]) {
        let Ok(control) = codec::decode::<Control>(body) else {
            return self.refuse(owed, Refusal::of(Status::BadRequest));
        };
        let count = match &control {
            Control::Seal(_, v) => v.len(),
            Control::PutObjects(v) => v.len(),
            Control::FlushDone(_, v) => v.len(),
            Control::FlushAborted(_, v) => v.len(),
            Control::ApplyViews(v) => v.len(),
            Control::DropInodes(_, v) | Control::EvictClean(v) => v.len(),
            _ => 1,
        };
        if count > BATCH_MAX {
            return self.refuse(owed, Refusal::of(Status::BadRequest));
        }
        let by_map = match &control {
            Control::Seal(v, _)
            | Control::FlushDone(v, _)
            | Control::FlushAborted(v, _)
            | Control::DropInodes(v, _) => Some(*v),
            _ => None,
        };
        if let Some(v) = by_map.filter(|v| self.placement.version() < *v) {
            return self.await_map(v, owed, None, body);
        }
        // After a restart nothing is dropped before a map says whose the group is by now: the order may be from before
        // this core got it back, as an in-sync member even (R45).
        if let Control::ReleasePg(pg, epoch) | Control::DiscardPg(pg, epoch) = &control {
            let known = self.placement.followed(*pg).map(|(known, ..)| known);
            if self.placement.map().is_none() {
                return self.await_map(MapVersion(1), owed, None, body);
            }
            // Nor while it follows the group by an older map: what its primary's stream builds upon would be gone.
            if known.is_some_and(|known| known < *epoch) {
                let next = MapVersion(self.placement.version().0 + 1);
                return self.await_map(next, owed, None, body);
            }
        }
        if by_map.is_some_and(|v| self.placement.led_anew_since(v)) {
            // It may mean a group that another core leads by now, which it would hold for told.
            let text = "a group has changed its primary since that map".to_owned();
            return self.control_reply(owed, &ControlReply::Refused(text));
        }
        match control {
            Control::Seal(_, items) => {
                let mut steps = Vec::with_capacity(items.len());
                for item in &items {
                    let scopes = self.scopes_below(item.inode, item.alloc_limit);
                    steps.extend(scopes.into_iter().map(|s| Step::Seal(s, item.generation)));
                }
                self.run_control(owed, steps, Finish::Sealed(items));
            }
            Control::PutObjects(items) => self.put_objects(PutTask::new(owed, items)),
            Control::UploadPart(part) => self.upload_part(owed, part),
            Control::CopyPart(part) => self.copy_part(owed, part),
            Control::FlushDone(_, items) => {
                let steps = items.into_iter().flat_map(|done| {
                    let scopes = self.own_scopes(done.inode);
                    scopes.into_iter().map(move |s| Step::FlushDone(s.pg, done))
                });
                let steps = steps.collect();
                self.run_control(owed, steps, Finish::Done);
            }
            Control::FlushAborted(_, items) => {
                let steps = items.into_iter().flat_map(|(inode, g)| {
                    let scopes = self.own_scopes(inode);
                    scopes.into_iter().map(move |s| Step::FlushAborted(s, g))
                });
                let steps = steps.collect();
                self.run_control(owed, steps, Finish::Done);
            }
            Control::ApplyViews(grants) => self.apply_views(owed, &grants, body),
            Control::DropInodes(_, inodes) => {
                let again = inodes.iter().any(|inode| self.dropped.peek(inode).is_some());
                let steps = inodes.into_iter().flat_map(|inode| {
                    let scopes = self.store.scopes(inode).into_iter();
                    let scopes = scopes.filter(|s| self.placement.followed(s.pg).is_none());
                    let scopes = scopes.map(Step::Drop);
                    std::iter::once(Step::Forget(inode)).chain(scopes)
                });
                let steps = steps.collect();
                let id = self.begin_control(owed, steps, Finish::Done);
                // Gone here, and maybe not everywhere: nothing says any more in which groups it was.
                self.await_what_leads_began_with(id);
                if again {
                    self.await_all_since(id);
                }
                self.run_steps(id);
            }
            Control::EvictClean(inodes) => {
                self.run_control(owed, vec![Step::EvictClean(inodes)], Finish::Done);
            }
            Control::Freeze(pg, epoch) => {
                self.run_control(owed, vec![Step::Freeze(pg, epoch)], Finish::Done);
            }
            Control::Yield(pg, epoch) => {
                self.placement.release(pg, PgEpoch(epoch.0.saturating_add(1)));
                self.control_reply(owed, &ControlReply::Done);
            }
            Control::Thaw(pg, epoch) => {
                self.placement.take_back(pg, PgEpoch(epoch.0.saturating_add(1)));
                self.run_control(owed, vec![Step::Thaw(pg, epoch)], Finish::Done);
            }
            Control::ReleasePg(pg, epoch) => {
                self.run_control(owed, vec![Step::ReleasePg(pg, epoch)], Finish::Done);
            }
            Control::DiscardPg(pg, epoch) if self.placement.holds_since(pg, epoch) => {
                let text = format!("this core holds group {pg} as of its map");
                self.control_reply(owed, &ControlReply::Refused(text));
            }
            Control::DiscardPg(pg, epoch) => {
                self.run_control(owed, vec![Step::DiscardPg(pg, epoch)], Finish::Done);
            }
            Control::Windows(pg, epoch, after) => {
                let reply = match self.store.windows(pg, epoch, after) {
                    Ok(entries) => ControlReply::Windows(entries),
                    Err(e) => ControlReply::Refused(e.to_string()),
                };
                self.control_reply(owed, &reply);
            }
            Control::TakeWindows(pg, epoch, entries) => {
                let step = Step::TakeWindows(pg, epoch, entries);
                self.run_control(owed, vec![step], Finish::Done);
            }
            Control::PgStatus(pg) => {
                let held = self.store.pg_status(pg);
                self.control_reply(owed, &ControlReply::Pg(held));
            }
            Control::Warm(grant, range) => {
                let Some(grant) = self.open_meta_grant(&grant, None) else {
                    return self.refuse(owed, Refusal::of(Status::Forbidden));
                };
                if self.placement.version() < grant.least_map_version {
                    return self.await_map(grant.least_map_version, owed, None, body);
                }
                match self.view_steps(&grant) {
                    Err(refusal) => self.refuse(owed, refusal),
                    Ok(steps) => {
                        self.run_control(owed, steps, Finish::Warm(Box::new(grant), range));
                    }
                }
            }
            Control::Stats => {
                let stats = self.counters();
                self.control_reply(owed, &ControlReply::Stats(stats));
            }
        }
    }

    fn apply_views(&mut self, owed: Owed, grants: &[SignedGrant], body: &[u8]) {
        let mut steps = Vec::with_capacity(grants.len());
        for signed in grants {
            let Some(grant) = self.open_meta_grant(signed, None) else {
                return self.refuse(owed, Refusal::of(Status::Forbidden));
            };
            if self.placement.version() < grant.least_map_version {
                return self.await_map(grant.least_map_version, owed, None, body);
            }
            // A view that is not newer, or of an inode that is gone, has nothing left to apply. What it brought
            // may not be durable, or not everywhere, all the same: somebody else presented it a moment ago.
            match self.view_steps(&grant) {
                Ok(more) if !more.is_empty() => steps.extend(more),
                Ok(_) | Err(_) => steps.extend(self.applied_steps(&grant)),
            }
        }
        self.run_control(owed, steps, Finish::Done);
    }

    pub(crate) fn control_reply(&mut self, owed: Owed, reply: &ControlReply) {
        self.reply(owed, Status::Ok, codec::encode(reply));
    }

    pub(crate) fn run_control(&mut self, owed: Owed, steps: Vec<Step>, finish: Finish) {
        let id = self.begin_control(owed, steps, finish);
        self.run_steps(id);
    }

    fn begin_control(&mut self, owed: Owed, steps: Vec<Step>, finish: Finish) -> ControlId {
        let id = ControlId(self.next_id());
        let task = ControlTask {
            owed,
            steps,
            next: 0,
            leads: self.leads,
            ticket: None,
            finish,
            durable: true,
            barriers: Vec::new(),
        };
        self.controls.insert(id, task);
        id
    }

    /// What this core led its groups with has to be everywhere before the answer: it may have done by then what
    /// it is asked again, and have forgotten that.
    fn await_what_leads_began_with(&mut self, id: ControlId) {
        let all = self.led_groups().into_iter().filter_map(|pg| {
            let barrier = Barrier::All(0);
            self.open_op_within(pg, barrier)?;
            let (lead, _) = self.op_newest(pg)?;
            Some(Awaited { pg, lead, barrier })
        });
        let all: Vec<Awaited> = all.collect();
        if let Some(task) = self.controls.get_mut(&id) {
            task.barriers.extend(all);
        }
    }

    /// Everything so far of every group that this core leads with others has to be everywhere before the answer.
    fn await_all_since(&mut self, id: ControlId) {
        let all = self.led_groups().into_iter().filter_map(|pg| {
            let (lead, newest) = self.op_newest(pg)?;
            Some(Awaited { pg, lead, barrier: Barrier::Since(newest) })
        });
        let all: Vec<Awaited> = all.collect();
        if let Some(task) = self.controls.get_mut(&id) {
            task.barriers.extend(all);
        }
    }

    fn run_steps(&mut self, id: ControlId) {
        loop {
            let Some(task) = self.controls.get(&id) else { return };
            let Some(step) = task.steps.get(task.next).cloned() else { break };
            if let Step::Install(inode, view) = step {
                if !task.durable {
                    // Comes back when the ticket is durable.
                    return self.await_ticket(id);
                }
                if task.leads != self.leads {
                    // What was journaled was of the groups that it led when this began.
                    let Some(task) = self.controls.remove(&id) else { return };
                    return self.refuse(task.owed, Refusal::after(Status::Busy, RETRY_BUSY_MS));
                }
                self.grants.install_view(inode, view, self.placement.version());
                self.step_taken(id, None);
                continue;
            }
            if step.scope().is_some_and(|scope| self.is_held(scope)) {
                self.parked_controls.push_back(id);
                return;
            }
            if let Step::FlushDone(pg, done) = &step
                && self.awaits_copies(Scope { inode: done.inode, pg: *pg })
            {
                self.parked_controls.push_back(id);
                return;
            }
            match self.take_step(&step) {
                Ok(ticket) => {
                    self.ship_step(id, &step, ticket);
                    self.step_taken(id, ticket);
                }
                Err(ControlError::Wait(wait)) => {
                    debug_assert!(waits_for_batch(wait));
                    self.parked_controls.push_back(id);
                    return;
                }
                Err(e) => {
                    let Some(task) = self.controls.remove(&id) else { return };
                    return match e {
                        ControlError::Failed => {
                            self.refuse(task.owed, Refusal::of(Status::Io));
                        }
                        e => match task.finish {
                            Finish::Present(_) => {
                                tracing::warn!(error = %e, "a view was refused");
                                self.refuse(task.owed, Refusal::of(Status::Internal));
                            }
                            _ => {
                                let text = e.to_string();
                                self.control_reply(task.owed, &ControlReply::Refused(text));
                            }
                        },
                    };
                }
            }
        }
        self.await_ticket(id);
    }

    fn step_taken(&mut self, id: ControlId, ticket: Option<Ticket>) {
        let Some(task) = self.controls.get_mut(&id) else { return };
        task.next += 1;
        if ticket.is_some() {
            task.ticket = task.ticket.max(ticket);
            task.durable = false;
        }
    }

    /// Waits for the newest ticket, or goes on if all are durable.
    fn await_ticket(&mut self, id: ControlId) {
        let Some(task) = self.controls.get_mut(&id) else { return };
        match task.ticket {
            // It may have become so while a later step was parked.
            Some(ticket) if !task.durable && self.store.is_durable(ticket) => {
                self.control_durable(id);
            }
            Some(ticket) if !task.durable => self.wait_ticket(ticket, Waiter::Control(id)),
            _ => self.finish_control(id),
        }
    }

    pub(crate) fn control_durable(&mut self, id: ControlId) {
        let Some(task) = self.controls.get_mut(&id) else { return };
        task.durable = true;
        if task.next < task.steps.len() {
            self.run_steps(id);
        } else {
            self.finish_control(id);
        }
    }

    fn take_step(&mut self, step: &Step) -> Result<Option<Ticket>, ControlError> {
        match step {
            Step::Seal(scope, g) => self.store.seal(*scope, *g),
            Step::FlushDone(pg, done) => self.store.flush_done(*pg, done),
            Step::FlushAborted(scope, g) => self.store.flush_aborted(*scope, *g),
            Step::View(update) => self.store.apply_view(update),
            Step::Install(..) => Ok(None),
            Step::Forget(inode) => {
                self.dropped.insert(*inode, ());
                self.grants.forget(*inode);
                self.forget_spilled(&[*inode]);
                Ok(None)
            }
            Step::Drop(scope) => self.store.drop_inode(*scope),
            Step::EvictClean(inodes) => {
                self.forget_spilled(inodes);
                self.store.evict_clean(inodes)
            }
            Step::TakeWindows(pg, epoch, entries) => self.store.take_windows(*pg, *epoch, entries),
            Step::Freeze(pg, epoch) => self.store.freeze(*pg, *epoch),
            Step::Thaw(pg, epoch) => self.store.thaw(*pg, *epoch),
            Step::ReleasePg(pg, epoch) => {
                let ticket = self.store.release_pg(*pg, *epoch)?;
                self.placement.release(*pg, *epoch);
                self.note_released(*pg);
                Ok(ticket)
            }
            // The map may have changed while the step waited for its turn.
            Step::DiscardPg(pg, epoch) if self.placement.holds_since(*pg, *epoch) => {
                Err(ControlError::Malformed("the group came back"))
            }
            Step::DiscardPg(pg, epoch) => {
                let ticket = self.store.discard_pg(*pg, *epoch)?;
                self.placement.release(*pg, *epoch);
                Ok(ticket)
            }
        }
    }

    /// The other members of its group get a step that was taken.
    fn ship_step(&mut self, id: ControlId, step: &Step, ticket: Option<Ticket>) {
        let Some((pg, ship)) = step.ship() else { return };
        if let Some(ticket) = ticket.filter(|_| self.leads(pg)) {
            self.ship(pg, ticket, ship, Vec::new());
        }
        // Also where nothing was to do any more: the first time may not be everywhere yet.
        let Some((lead, newest)) = self.op_newest(pg) else { return };
        let barrier = match step {
            // Of a view only itself is waited for, and of what this core led the group with only that inode: whoever
            // opens a file doesn't wait until the whole group was copied.
            Step::View(update) => Barrier::Inode(newest, update.scope.inode),
            _ => Barrier::All(newest),
        };
        if let Some(task) = self.controls.get_mut(&id) {
            task.barriers.retain(|b| b.pg != pg || !b.barrier.is_within(barrier));
            task.barriers.push(Awaited { pg, lead, barrier });
        }
    }

    /// Gives a task up.
    pub(crate) fn refuse_control(&mut self, id: ControlId, refusal: Refusal) {
        if let Some(task) = self.controls.remove(&id) {
            self.refuse(task.owed, refusal);
        }
    }

    fn finish_control(&mut self, id: ControlId) {
        if let Some(task) = self.controls.get(&id) {
            let mut barriers = task.barriers.clone();
            while let Some(Awaited { pg, lead, barrier }) = barriers.last().copied() {
                if self.op_newest(pg).is_none_or(|(now, _)| now != lead) {
                    // Another leads it, or did: whether all have what was taken here isn't known.
                    let stale = Refusal { refresh: true, ..Refusal::of(Status::StaleEpoch) };
                    return self.refuse_control(id, stale);
                }
                if let Some(number) = self.open_op_within(pg, barrier) {
                    if let Some(task) = self.controls.get_mut(&id) {
                        task.barriers = barriers;
                    }
                    return self.wait_op(pg, number, vec![Waiter::Control(id)]);
                }
                // What was everywhere once stays so.
                barriers.pop();
            }
        }
        let Some(task) = self.controls.remove(&id) else { return };
        debug_assert!(task.next == task.steps.len());
        match task.finish {
            Finish::Done => self.control_reply(task.owed, &ControlReply::Done),
            Finish::Sealed(items) => {
                let sealed = items.iter().map(|item| self.sealed_item(item)).collect();
                self.control_reply(task.owed, &ControlReply::Sealed(sealed));
            }
            Finish::Present(grant) => {
                self.grants.install(&grant);
                self.reply(task.owed, Status::Ok, Vec::new());
            }
            Finish::Warm(grant, range) => self.warm(task.owed, *grant, range),
        }
    }

    /// What is known here of an inode in the groups that this core leads. What happens in a group that it only
    /// follows comes in its primary's stream, in its order (R41); what is left of a group that it is out
    /// of says nothing: a flush's result would make clean what others have overwritten.
    pub(crate) fn own_scopes(&self, inode: InodeId) -> Vec<Scope> {
        let mut scopes = self.store.scopes(inode);
        scopes.retain(|s| self.placement.own_epoch(s.pg).is_some());
        scopes
    }

    /// Where a fence of an inode has to be journaled: every group held here in which something below
    /// `limit` may come, and those of which something is known.
    pub(crate) fn scopes_below(&self, inode: InodeId, limit: u64) -> Vec<Scope> {
        let mut scopes = self.own_scopes(inode);
        let held = self.placement.groups_below(inode, limit);
        scopes.extend(held.into_iter().map(|pg| Scope { inode, pg }));
        scopes.sort_unstable();
        scopes.dedup();
        scopes
    }

    /// The metadata plane speaks of a map that this core doesn't have: which groups it means is known
    /// once that is here.
    pub(crate) fn await_map(
        &mut self,
        version: MapVersion,
        owed: Owed,
        peer: Option<PeerInfo>,
        body: &[u8],
    ) {
        self.out.push(Command::RefreshMap);
        let (since_ms, body) = (self.now_ms, body.to_vec());
        self.await_map.push_back(AwaitsMap { version, owed, peer, body, since_ms });
    }

    /// A map came: those that waited for it go on.
    pub(crate) fn map_came(&mut self) {
        for waiting in std::mem::take(&mut self.await_map) {
            if self.placement.version() < waiting.version {
                self.await_map.push_back(waiting);
                continue;
            }
            match waiting.peer {
                Some(peer) => self.present(waiting.owed, peer, &waiting.body),
                None => self.control(waiting.owed, &waiting.body),
            }
        }
    }

    pub(crate) fn expire_map_waiters(&mut self) {
        while let Some(first) = self.await_map.front()
            && self.now_ms >= first.since_ms.saturating_add(PATIENCE_MS)
        {
            let owed = first.owed;
            self.await_map.pop_front();
            self.refuse(owed, Refusal::after(Status::Busy, RETRY_BUSY_MS));
        }
    }

    fn sealed_item(&self, item: &SealItem) -> SealedItem {
        // The seal may be gone again: the leader repeated it after FlushDone. Then nothing is dirty.
        let scopes = self.own_scopes(item.inode).into_iter();
        let (mut extents, mut high_water) = (Vec::new(), 0);
        for sealed in scopes.filter_map(|scope| self.store.sealed(scope, item.generation)) {
            extents.extend(sealed.extents);
            high_water = high_water.max(sealed.high_water);
        }
        extents.sort_unstable_by_key(|e| e.start);
        SealedItem { inode: item.inode, generation: item.generation, extents, high_water }
    }

    /// Tries parked tasks again, each once.
    pub(crate) fn retry_controls(&mut self) {
        for _ in 0..self.parked_controls.len() {
            let Some(id) = self.parked_controls.pop_front() else { break };
            self.run_steps(id);
        }
    }

    /// The store failed: nothing will be durable any more.
    pub(crate) fn fail_controls(&mut self) {
        self.parked_controls.clear();
        let ids: Vec<ControlId> = self.controls.keys().copied().collect();
        for id in ids {
            if let Some(task) = self.controls.remove(&id) {
                self.refuse(task.owed, Refusal::after(Status::Io, RETRY_BUSY_MS));
            }
        }
    }
}
