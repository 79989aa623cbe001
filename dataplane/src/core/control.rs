//! Requests of the metadata plane, and everything else that is journaled step by step.
//!
//! A control request becomes a list of [`Step`]s. Steps run in order; one that the store makes wait
//! parks the task until the next batch. When the last ticket is durable (tickets are durable in order,
//! so the last one covers all), the task is answered. All steps are idempotent, so a repeated request
//! simply runs again.

use super::placement::Refusal;
use super::upload::PutTask;
use super::write::waits_for_batch;
use super::{Buffer, Owed, RETRY_BUSY_MS, ShardCore, Waiter};
use ebb_dataplane_protocol::control::{
    BATCH_MAX, Control, ControlReply, FlushDone, SealItem, SealedItem, WindowEntry,
};
use ebb_dataplane_protocol::{
    FileView, Generation, Grant, InodeId, PgEpoch, PgId, SignedGrant, Status, codec,
};
use ebb_store::{ControlError, Ticket, ViewUpdate};
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ControlId(u64);

/// One thing to journal, or to do between two of them.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Seal(SealItem),
    FlushDone(FlushDone),
    FlushAborted(InodeId, Generation),
    View(ViewUpdate),
    /// The view serves from here on; runs when everything before it is durable.
    Install(InodeId, Arc<FileView>),
    Drop(InodeId),
    EvictClean(Vec<InodeId>),
    TakeWindows(PgId, PgEpoch, Vec<WindowEntry>),
    Freeze(PgId, PgEpoch),
    Thaw(PgId, PgEpoch),
    ReleasePg(PgId, PgEpoch),
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
    /// The newest ticket of the steps so far.
    ticket: Option<Ticket>,
    finish: Finish,
    /// Every ticket is durable.
    durable: bool,
}

impl<B: Buffer> ShardCore<B> {
    pub(crate) fn control(&mut self, owed: Owed, body: &[u8]) {
        let Ok(control) = codec::decode::<Control>(body) else {
            return self.refuse(owed, Refusal::of(Status::BadRequest));
        };
        let count = match &control {
            Control::Seal(v) => v.len(),
            Control::PutObjects(v) => v.len(),
            Control::FlushDone(v) => v.len(),
            Control::FlushAborted(v) => v.len(),
            Control::ApplyViews(v) => v.len(),
            Control::DropInodes(v) | Control::EvictClean(v) => v.len(),
            _ => 1,
        };
        if count > BATCH_MAX {
            return self.refuse(owed, Refusal::of(Status::BadRequest));
        }
        match control {
            Control::Seal(items) => {
                let steps = items.iter().copied().map(Step::Seal).collect();
                self.run_control(owed, steps, Finish::Sealed(items));
            }
            Control::PutObjects(items) => self.put_objects(PutTask::new(owed, items)),
            Control::UploadPart(part) => self.upload_part(owed, part),
            Control::CopyPart(part) => self.copy_part(owed, part),
            Control::FlushDone(items) => {
                let steps = items.into_iter().map(Step::FlushDone).collect();
                self.run_control(owed, steps, Finish::Done);
            }
            Control::FlushAborted(items) => {
                let steps = items.into_iter().map(|(i, g)| Step::FlushAborted(i, g)).collect();
                self.run_control(owed, steps, Finish::Done);
            }
            Control::ApplyViews(grants) => self.apply_views(owed, &grants),
            Control::DropInodes(inodes) => {
                let steps = inodes.into_iter().map(Step::Drop).collect();
                self.run_control(owed, steps, Finish::Done);
            }
            Control::EvictClean(inodes) => {
                self.run_control(owed, vec![Step::EvictClean(inodes)], Finish::Done);
            }
            Control::Freeze(pg, epoch) => {
                self.run_control(owed, vec![Step::Freeze(pg, epoch)], Finish::Done);
            }
            Control::Thaw(pg, epoch) => {
                self.run_control(owed, vec![Step::Thaw(pg, epoch)], Finish::Done);
            }
            Control::ReleasePg(pg, epoch) => {
                self.run_control(owed, vec![Step::ReleasePg(pg, epoch)], Finish::Done);
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
                match self.view_steps(grant.inode, Arc::new(grant.view.clone())) {
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

    fn apply_views(&mut self, owed: Owed, grants: &[SignedGrant]) {
        let mut steps = Vec::with_capacity(grants.len());
        for signed in grants {
            let Some(grant) = self.open_meta_grant(signed, None) else {
                return self.refuse(owed, Refusal::of(Status::Forbidden));
            };
            // A view that is not newer, or of an inode that is gone, has nothing left to apply.
            if let Ok(more) = self.view_steps(grant.inode, Arc::new(grant.view)) {
                steps.extend(more);
            }
        }
        self.run_control(owed, steps, Finish::Done);
    }

    pub(crate) fn control_reply(&mut self, owed: Owed, reply: &ControlReply) {
        self.reply(owed, Status::Ok, codec::encode(reply));
    }

    pub(crate) fn run_control(&mut self, owed: Owed, steps: Vec<Step>, finish: Finish) {
        let id = ControlId(self.next_id());
        let task = ControlTask { owed, steps, next: 0, ticket: None, finish, durable: true };
        self.controls.insert(id, task);
        self.run_steps(id);
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
                self.grants.install_view(inode, view);
                self.step_taken(id, None);
                continue;
            }
            match self.take_step(&step) {
                Ok(ticket) => self.step_taken(id, ticket),
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
            Step::Seal(item) => self.store.seal(item.inode, item.generation),
            Step::FlushDone(done) => self.store.flush_done(done),
            Step::FlushAborted(inode, g) => self.store.flush_aborted(*inode, *g),
            Step::View(update) => self.store.apply_view(update),
            Step::Install(..) => Ok(None),
            Step::Drop(inode) => {
                let ticket = self.store.drop_inode(*inode)?;
                self.dropped.insert(*inode, ());
                self.grants.forget(*inode);
                Ok(ticket)
            }
            Step::EvictClean(inodes) => self.store.evict_clean(inodes),
            Step::TakeWindows(pg, epoch, entries) => self.store.take_windows(*pg, *epoch, entries),
            Step::Freeze(pg, epoch) => self.store.freeze(*pg, *epoch),
            Step::Thaw(pg, epoch) => self.store.thaw(*pg, *epoch),
            Step::ReleasePg(pg, epoch) => {
                let ticket = self.store.release_pg(*pg, *epoch)?;
                self.placement.release(*pg, *epoch);
                Ok(ticket)
            }
        }
    }

    fn finish_control(&mut self, id: ControlId) {
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

    fn sealed_item(&self, item: &SealItem) -> SealedItem {
        // The seal may be gone again: the leader repeated it after FlushDone. Then nothing is dirty.
        let found = self.store.sealed(item.inode, item.generation);
        let (extents, high_water) = found.map_or((Vec::new(), 0), |s| (s.extents, s.high_water));
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
