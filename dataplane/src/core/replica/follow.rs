//! A member's side: takes the primary's mutations in its order (R41, R45, R46).
//!
//! Data of several writes may be on its way to the device at once; records are appended strictly in
//! order, and a reply leaves when its record is durable.

use super::Told;
use crate::core::placement::Refusal;
use crate::core::{
    Buffer, Command, ConnRef, Owed, PATIENCE_MS, PeerInfo, Pending, ShardCore, Waiter,
};
use ebb_dataplane_protocol::control::WindowEntry;
use ebb_dataplane_protocol::replica::{
    CopiedExtent, STAGE_BLOCKS_MAX, Ship, Shipped, ShippedWrite,
};
use ebb_dataplane_protocol::{
    ChunkIndex, Generation, InodeId, MapVersion, PgEpoch, PgId, ShardRef, Status, codec, crc32c,
};
use ebb_store::{
    BLOCK, BaseView, ControlError, Scope, Staged, Ticket, ViewUpdate, WINDOW_PAGE, WriteError,
    WriteOp, WritePlan,
};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// Mutations of one group that wait to be appended; the primary keeps fewer in flight.
const QUEUE_MAX: usize = 256;

/// Chunks with entries that a copy may hold in memory.
const ENTRIES_MAX: usize = 1 << 20;

/// A group this core is a member of, and its primary's stream.
pub(crate) struct Follow<B> {
    epoch: PgEpoch,
    leader: ShardRef,
    conn: ConnRef,
    stream: u64,
    next: u64,
    queue: VecDeque<Item<B>>,
    /// The newest record appended for it.
    last: Option<Ticket>,
    /// Since when its oldest mutation without data finds no space.
    no_space_since_ms: Option<u64>,
    copy: Option<Copied>,
}

/// What a copy has not come to yet, and the blocks of the chunk it is at.
#[derive(Default)]
struct Copied {
    /// Known here when it began: what it never names goes at its end.
    stale: BTreeSet<Scope>,
    /// Of those, what the stream's own mutations have changed.
    touched: BTreeSet<Scope>,
    /// Chunks that the inode it is at was said to have.
    named: BTreeSet<ChunkIndex>,
    /// Applied writes by chunk, for the record that they belong into.
    entries: BTreeMap<(InodeId, ChunkIndex), Vec<WindowEntry>>,
    staged: Vec<Staged>,
    crcs: Vec<u32>,
    pins: Vec<Generation>,
    /// Numbers of the staged blocks that a list was appended over.
    used: BTreeSet<u16>,
    /// The newest record of a chunk.
    last_chunk: Option<Ticket>,
}

impl<B> Follow<B> {
    /// Whether something of it waits for the store.
    pub(crate) fn waits(&self) -> bool {
        self.queue.iter().any(|i| matches!(i.state, State::New))
            || self.queue.front().is_some_and(|i| i.outstanding == 0)
    }

    /// Its oldest mutation, if that has found no space for `kept_ms`.
    pub(super) fn take_out_of_space(&mut self, now_ms: u64, kept_ms: u64) -> Option<Owed> {
        let since_ms = self.no_space_since_ms?;
        let first = |i: &Item<B>| matches!(i.state, State::New);
        if now_ms < since_ms.saturating_add(kept_ms) || !self.queue.front().is_some_and(first) {
            return None;
        }
        self.queue.pop_front().map(|item| item.owed)
    }
}

/// A request that waits for a map.
pub(crate) struct Early<B> {
    owed: Owed,
    peer: PeerInfo,
    body: Vec<u8>,
    payload: Option<B>,
    version: MapVersion,
    since_ms: u64,
}

/// One mutation on its way.
#[derive(Debug)]
pub(crate) struct Item<B> {
    place: u64,
    owed: Owed,
    ship: Ship,
    buf: Option<Arc<B>>,
    state: State,
    /// Device writes that are not done.
    outstanding: usize,
}

#[derive(Debug)]
enum State {
    /// The store made it wait.
    New,
    /// Its data is on its way or there.
    Write(WritePlan),
    Staged(Staged),
    Plain,
}

impl<B: Buffer> ShardCore<B> {
    /// A request of a primary.
    pub(crate) fn replicate(
        &mut self,
        owed: Owed,
        peer: PeerInfo,
        body: &[u8],
        payload: Option<B>,
    ) {
        let Ok(shipped) = codec::decode::<Shipped>(body) else {
            return self.refuse(owed, Refusal::of(Status::BadRequest));
        };
        let pg = shipped.pg;
        let from = peer.node.map(|n| n.from);
        let stale = Refusal { refresh: true, ..Refusal::of(Status::StaleEpoch) };
        // Which epochs there are is known once the sender's map came here too. What comes after waits as
        // well: order is everything.
        let waits = !self.replication.early.is_empty();
        if waits || self.placement.version() < shipped.map_version {
            self.out.push(Command::RefreshMap);
            let (body, since_ms) = (body.to_vec(), self.now_ms);
            let version = shipped.map_version;
            let early = Early { owed, peer, body, payload, version, since_ms };
            self.replication.early.push_back(early);
            return;
        }
        let follows = self.placement.followed(pg);
        // A primary that the map has not replaced since may be a map behind: the members it doesn't
        // know yet don't change what its mutations are.
        let serves = |(_, leader, since): &(PgEpoch, ShardRef, MapVersion)| {
            Some(*leader) == from && shipped.map_version >= *since
        };
        let Some((epoch, leader, _)) = follows.filter(serves) else {
            return self.refuse(owed, Refusal::of(Status::StaleEpoch));
        };
        if shipped.ship == Ship::Begin {
            self.end_follow(pg);
            let follow = Follow {
                epoch,
                leader,
                conn: owed.conn,
                stream: shipped.stream,
                next: 0,
                queue: VecDeque::new(),
                last: None,
                no_space_since_ms: None,
                copy: Some(Copied::default()),
            };
            self.replication.follows.insert(pg, follow);
        }
        let sound = payload_is_sound(&shipped.ship, payload.as_ref());
        let Some(follow) = self.replication.follows.get_mut(&pg) else {
            return self.refuse(owed, stale);
        };
        if follow.conn != owed.conn
            || follow.stream != shipped.stream
            || follow.next != shipped.place
            || follow.leader != leader
            || follow.queue.len() >= QUEUE_MAX
        {
            return self.refuse(owed, stale);
        }
        if !sound {
            self.stats.checksum_errors += 1;
            self.end_follow(pg);
            return self.refuse(owed, Refusal::of(Status::Corrupt));
        }
        follow.epoch = epoch;
        follow.next += 1;
        follow.queue.push_back(Item {
            place: shipped.place,
            owed,
            ship: shipped.ship,
            buf: payload.map(Arc::new),
            state: State::New,
            outstanding: 0,
        });
        self.pump(pg);
    }

    /// A map came: what waited for it goes on, in order.
    pub(crate) fn early_go_on(&mut self) {
        for early in std::mem::take(&mut self.replication.early) {
            let known = self.placement.version() >= early.version;
            if !known || !self.replication.early.is_empty() {
                self.replication.early.push_back(early);
            } else {
                self.replicate(early.owed, early.peer, &early.body, early.payload);
            }
        }
    }

    /// No map came in time: their streams begin again.
    pub(crate) fn expire_early(&mut self) {
        let late = |e: &Early<B>| self.now_ms >= e.since_ms.saturating_add(PATIENCE_MS);
        if self.replication.early.front().is_some_and(late) {
            for early in std::mem::take(&mut self.replication.early) {
                self.refuse(early.owed, Refusal::of(Status::StaleEpoch));
            }
        }
    }

    /// The map changed: streams of groups whose epoch or primary is another one end.
    pub(crate) fn regroup_follows(&mut self) {
        let groups: Vec<PgId> = self.replication.follows.keys().copied().collect();
        for pg in groups {
            let now = self.placement.followed(pg);
            let Some(follow) = self.replication.follows.get_mut(&pg) else { continue };
            match now {
                // The same primary goes on with its stream, in its new epoch.
                Some((epoch, leader, _)) if leader == follow.leader => follow.epoch = epoch,
                _ => self.end_follow(pg),
            }
        }
    }

    /// Ends a stream here: what was not appended never will be.
    pub(super) fn end_follow(&mut self, pg: PgId) {
        let Some(follow) = self.replication.follows.remove(&pg) else { return };
        if let Some(last) = follow.last {
            self.replication.last.insert(pg, last);
        }
        if let Some(copy) = follow.copy {
            self.store.unstage(copy.staged, &copy.used);
        }
        for item in follow.queue {
            self.refuse(item.owed, Refusal::of(Status::StaleEpoch));
            if item.outstanding > 0 {
                self.replication.orphans.push(item);
            } else {
                self.give_back(item);
            }
        }
    }

    fn give_back(&mut self, item: Item<B>) {
        match item.state {
            State::Write(plan) => self.store.abort_write(plan.id),
            State::Staged(staged) => self.store.unstage(vec![staged], &BTreeSet::new()),
            State::New | State::Plain => {}
        }
    }

    /// A device write of a mutation ended.
    pub(crate) fn shipped_written(&mut self, owed: Owed) {
        let same = |i: &Item<B>| {
            i.owed.conn == owed.conn && i.owed.header.request_id == owed.header.request_id
        };
        if let Some(at) = self.replication.orphans.iter().position(same) {
            self.replication.orphans[at].outstanding -= 1;
            if self.replication.orphans[at].outstanding == 0 {
                let item = self.replication.orphans.swap_remove(at);
                self.give_back(item);
            }
            return;
        }
        let pg = owed.header.pg;
        if let Some(follow) = self.replication.follows.get_mut(&pg)
            && let Some(item) = follow.queue.iter_mut().find(|i| same(i))
        {
            item.outstanding -= 1;
            self.pump(pg);
        }
    }

    /// Tries everything that waits.
    pub(crate) fn pump_all(&mut self) {
        let groups: Vec<PgId> = self
            .replication
            .follows
            .iter()
            .filter(|(_, f)| !f.queue.is_empty())
            .map(|(pg, _)| *pg)
            .collect();
        groups.into_iter().for_each(|pg| self.pump(pg));
    }

    fn pump(&mut self, pg: PgId) {
        self.start_items(pg);
        if self.refuse_for_space(pg) {
            return;
        }
        loop {
            let Some(follow) = self.replication.follows.get_mut(&pg) else { return };
            let ready = |i: &Item<B>| i.outstanding == 0 && !matches!(i.state, State::New);
            if !follow.queue.front().is_some_and(ready) {
                return;
            }
            let Some(mut item) = follow.queue.pop_front() else { return };
            match self.append(pg, &mut item) {
                Ok(ticket) => {
                    self.stats.followed += 1;
                    self.told(pg, item.owed, ticket);
                }
                Err(Some(())) => {
                    // Not now: the next turn tries again.
                    if let Some(follow) = self.replication.follows.get_mut(&pg) {
                        follow.queue.push_front(item);
                    }
                    return;
                }
                Err(None) => {
                    // What is here isn't what is there: the primary has to copy.
                    let (place, owed) = (item.place, item.owed);
                    tracing::warn!(%pg, place, ship = ?item.ship, "a shipped mutation was refused");
                    self.give_back(item);
                    self.end_follow(pg);
                    return self.refuse(owed, Refusal::of(Status::Internal));
                }
            }
        }
    }

    /// Begins the data writes of everything that can.
    fn start_items(&mut self, pg: PgId) {
        let Some(mut follow) = self.replication.follows.remove(&pg) else { return };
        let mut no_space = false;
        for item in follow.queue.iter_mut().filter(|i| matches!(i.state, State::New)) {
            let begun = match &item.ship {
                Ship::Write(w) => self.store.begin_shipped(&write_op(w)).map(State::Write),
                Ship::Stage { crcs, .. } => self.store.stage(crcs.len() as u32).map(State::Staged),
                _ => Ok(State::Plain),
            };
            match begun {
                Ok(state) => item.state = state,
                Err(WriteError::NoSpace { needed, .. }) => {
                    no_space = true;
                    self.evict_for(needed);
                    break;
                }
                Err(_) => break,
            }
            let writes = match &item.state {
                State::Write(plan) => &plan.writes[..],
                State::Staged(staged) => &staged.writes[..],
                _ => &[],
            };
            let Some(buf) = &item.buf else { continue };
            item.outstanding = writes.len();
            for w in writes {
                let token = self.next_id();
                let token = crate::core::Token(token);
                self.pending.insert(token, Pending::ShippedData(item.owed));
                let (buf, range) = (Arc::clone(buf), w.range.clone());
                self.out.push(Command::Write { token, offset: w.offset, buf, range });
            }
        }
        let since_ms = follow.no_space_since_ms.unwrap_or(self.now_ms);
        follow.no_space_since_ms = no_space.then_some(since_ms);
        self.replication.follows.insert(pg, follow);
    }

    /// Appends a mutation. `Err(Some)`: not now; `Err(None)`: it cannot be.
    fn append(&mut self, pg: PgId, item: &mut Item<B>) -> Result<Option<Ticket>, Option<()>> {
        let wait = |e: ControlError| match e {
            ControlError::Wait(_) => Some(()),
            _ => None,
        };
        let scope = |inode: InodeId| Scope { inode, pg };
        let epoch = self.replication.follows.get(&pg).map(|f| f.epoch).ok_or(None)?;
        if let Some(inode) = touched(&item.ship)
            && let Some(copy) = self.copied(pg)
        {
            copy.touched.insert(scope(inode));
        }
        if looks_at_what_is_known(&item.ship)
            && let Some(chunk) = self.copied(pg).and_then(|copy| copy.last_chunk)
            && !self.store.is_durable(chunk)
        {
            return Err(Some(()));
        }
        match &item.ship {
            Ship::Write(w) => {
                let State::Write(plan) = &item.state else { return Err(None) };
                let inline = match (&item.buf, plan.inline) {
                    (Some(buf), true) => &buf.bytes()[..plan.blocks as usize * BLOCK],
                    _ => &[][..],
                };
                let ticket = self.store.commit_write(plan.id, &w.crcs, inline).map_err(|_| None)?;
                Ok(Some(ticket))
            }
            Ship::Begin => {
                // What an earlier stream appended is known once it is durable.
                if self.replication.last.get(&pg).is_some_and(|t| !self.store.is_durable(*t)) {
                    return Err(Some(()));
                }
                let (here, _) = self.store.scopes_of_group(pg, None, usize::MAX);
                self.copied(pg).ok_or(None)?.stale = here.into_iter().collect();
                Ok(None)
            }
            Ship::Inode(inode, chunks, more) => {
                let copy = self.copied(pg).ok_or(None)?;
                copy.named.extend(chunks);
                if *more {
                    return Ok(None);
                }
                let named = copy.named.clone();
                let last = self.drop_unnamed(scope(*inode), &named)?;
                let copy = self.copied(pg).ok_or(None)?;
                copy.named.clear();
                copy.stale.remove(&scope(*inode));
                Ok(last)
            }
            Ship::Windows(entries) if self.copied(pg).is_some() => {
                let copy = self.copied(pg).ok_or(None)?;
                if copy.entries.len() + entries.len() > ENTRIES_MAX {
                    return Err(None);
                }
                for e in entries {
                    copy.entries.entry((e.inode, e.chunk)).or_default().push(*e);
                }
                Ok(None)
            }
            Ship::Windows(entries) => self.store.take_windows(pg, epoch, entries).map_err(wait),
            Ship::Stage { crcs, .. } => {
                let State::Staged(staged) = std::mem::replace(&mut item.state, State::Plain) else {
                    return Err(None);
                };
                let copy = self.copied(pg).ok_or(None)?;
                copy.staged.push(staged);
                copy.crcs.extend(crcs);
                Ok(None)
            }
            Ship::Chunk(list) => {
                let Some(mut copy) =
                    self.replication.follows.get_mut(&pg).and_then(|f| f.copy.take())
                else {
                    return Err(None);
                };
                let mut pins = copy.pins.clone();
                pins.extend(list.pin);
                let left = list.last.then(|| pins.clone());
                let key = (list.inode, list.chunk);
                let entries = copy.entries.get(&key).cloned().unwrap_or_default();
                let done = self.store.copy_list(list, &copy.staged, &copy.crcs, left, entries);
                if let Ok(ticket) = &done {
                    copy.last_chunk = Some(*ticket);
                    copy.pins = pins;
                    let numbers = |e: &CopiedExtent| e.staged..e.staged + e.blocks;
                    copy.used.extend(list.extents.iter().flat_map(numbers));
                }
                if done.is_ok() && list.last {
                    copy.entries.remove(&key);
                    self.store.staged_done(std::mem::take(&mut copy.staged));
                    copy.crcs.clear();
                    copy.pins.clear();
                    copy.used.clear();
                }
                if let Some(follow) = self.replication.follows.get_mut(&pg) {
                    follow.copy = Some(copy);
                }
                done.map(Some).map_err(wait)
            }
            Ship::Scope(state) => self.store.copy_scope(pg, state).map(Some).map_err(wait),
            Ship::End => self.end_copy(pg),
            Ship::Seal(inode, g) => self.store.seal(scope(*inode), *g).map_err(wait),
            Ship::FlushDone(done) => self.store.flush_done(pg, done).map_err(wait),
            Ship::FlushAborted(inode, g) => {
                self.store.flush_aborted(scope(*inode), *g).map_err(wait)
            }
            Ship::View { inode, version, content, valid_bytes, cuts } => {
                let base = BaseView { content: *content, valid_bytes: *valid_bytes };
                let (version, cuts) = (*version, cuts.clone());
                let view = ViewUpdate { scope: scope(*inode), version, base, cuts };
                self.store.apply_view(&view).map_err(wait)
            }
            Ship::Drop(inode) => self.store.drop_inode(scope(*inode)).map_err(wait),
            Ship::Freeze(epoch) => self.store.freeze(pg, *epoch).map_err(wait),
            Ship::Thaw(epoch) => self.store.thaw(pg, *epoch).map_err(wait),
        }
    }

    fn copied(&mut self, pg: PgId) -> Option<&mut Copied> {
        self.replication.follows.get_mut(&pg)?.copy.as_mut()
    }

    /// The copy is complete: what it did not name goes.
    fn end_copy(&mut self, pg: PgId) -> Result<Option<Ticket>, Option<()>> {
        let wait = |e: ControlError| match e {
            ControlError::Wait(_) => Some(()),
            _ => None,
        };
        let copy = self.copied(pg).ok_or(None)?;
        // Forgotten there, stale here, and changed since: only another copy can tell.
        if copy.stale.iter().any(|scope| copy.touched.contains(scope)) {
            return Err(None);
        }
        // Whatever has to wait is begun again: nothing is done twice that was.
        let mut last = None;
        for scope in copy.stale.clone() {
            last = last.max(self.drop_unnamed(scope, &BTreeSet::new())?);
            last = last.max(self.store.drop_inode(scope).map_err(wait)?);
        }
        let epoch = self.replication.follows.get(&pg).map(|f| f.epoch).ok_or(None)?;
        let copy = self.copied(pg).ok_or(None)?;
        let rest: Vec<WindowEntry> = copy.entries.values().flatten().copied().collect();
        for page in rest.chunks(WINDOW_PAGE) {
            last = last.max(self.store.take_windows(pg, epoch, page).map_err(wait)?);
        }
        if let Some(follow) = self.replication.follows.get_mut(&pg) {
            follow.copy = None;
        }
        Ok(last)
    }

    /// What is unflushed of other chunks of an inode than these goes: each chunk in one record with the
    /// entries that say what was applied to it.
    fn drop_unnamed(
        &mut self,
        scope: Scope,
        named: &BTreeSet<ChunkIndex>,
    ) -> Result<Option<Ticket>, Option<()>> {
        let mut last = None;
        for chunk in self.store.unflushed_chunks(scope) {
            if named.contains(&chunk) {
                continue;
            }
            let key = (scope.inode, chunk);
            let copy = self.copied(scope.pg).ok_or(None)?;
            let entries = copy.entries.get(&key).cloned().unwrap_or_default();
            let done = self.store.copy_nothing(scope.inode, chunk, entries);
            let ticket = done.map_err(|e| match e {
                ControlError::Wait(_) => Some(()),
                _ => None,
            })?;
            self.copied(scope.pg).ok_or(None)?.entries.remove(&key);
            last = last.max(Some(ticket));
        }
        Ok(last)
    }

    /// Appended: its primary hears of it when it, and all before it, are durable.
    fn told(&mut self, pg: PgId, owed: Owed, ticket: Option<Ticket>) {
        let Some(follow) = self.replication.follows.get_mut(&pg) else {
            return self.refuse(owed, Refusal::of(Status::StaleEpoch));
        };
        follow.last = follow.last.max(ticket);
        match follow.last {
            Some(last) if !self.store.is_durable(last) => {
                self.wait_ticket(last, Waiter::Told(Told { owed }));
            }
            _ => self.reply(owed, Status::Ok, Vec::new()),
        }
    }
}

/// Whether the store appends nothing where nothing is known of the inode. Of what was copied it knows once that is
/// durable: a removal that came right behind the first chunk of an inode found nothing there, and the chunk stayed.
fn looks_at_what_is_known(ship: &Ship) -> bool {
    let of_flush = matches!(ship, Ship::Seal(..) | Ship::FlushDone(_) | Ship::FlushAborted(..));
    of_flush || matches!(ship, Ship::View { .. } | Ship::Drop(_))
}

/// The inode that a mutation of the stream itself changes.
fn touched(ship: &Ship) -> Option<InodeId> {
    match ship {
        Ship::Write(w) => Some(w.inode),
        Ship::Seal(inode, _) | Ship::FlushAborted(inode, _) | Ship::View { inode, .. } => {
            Some(*inode)
        }
        Ship::FlushDone(done) => Some(done.inode),
        _ => None,
    }
}

fn write_op(w: &ShippedWrite) -> WriteOp {
    WriteOp {
        inode: w.inode,
        chunk: w.chunk,
        offset: w.offset,
        len: w.len,
        generation: w.generation,
        session: w.session,
        sequence: w.sequence,
        answered_below: w.answered_below,
        base: BaseView::default(),
    }
}

/// Whether the blocks are those that the body names.
fn payload_is_sound<B: Buffer>(ship: &Ship, payload: Option<&B>) -> bool {
    let crcs = match ship {
        Ship::Write(w) => {
            let end = u64::from(w.offset) + u64::from(w.len);
            let first = u64::from(w.offset) / BLOCK as u64;
            let blocks = end.div_ceil(BLOCK as u64) - first;
            if w.len == 0 || blocks != w.crcs.len() as u64 {
                return false;
            }
            &w.crcs
        }
        Ship::Stage { crcs, .. } if crcs.len() <= STAGE_BLOCKS_MAX => crcs,
        Ship::Stage { .. } => return false,
        _ => return payload.is_none(),
    };
    let Some(bytes) = payload.map(Buffer::bytes) else { return false };
    bytes.len() >= crcs.len() * BLOCK
        && bytes.chunks(BLOCK).zip(crcs).all(|(block, crc)| crc32c(block) == *crc)
}
