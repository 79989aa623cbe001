//! The primary's side: order, ship, count (R41–R43, R47).

use super::ops::{Look, Ops, Touches};
use crate::core::call::{Answer, Call, Channel, LinkId, PeerError};
use crate::core::placement::Refusal;
use crate::core::{Buffer, Command, Pending, ShardCore, Waiter};
use ebb_dataplane_protocol::replica::{Ship, Shipped, Wish, Wishes};
use ebb_dataplane_protocol::{
    ChunkIndex, Header, InodeId, MapVersion, Opcode, PgEpoch, PgId, ShardRef, Status, codec,
};
use ebb_store::{Scope, Ticket};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

/// Requests of one stream without an answer; more wait here.
const IN_FLIGHT_MAX: usize = 64;
/// Requests to one core without an answer, of all streams: below what a connection takes.
const PEER_IN_FLIGHT_MAX: usize = 192;
/// Requests that wait for a member that doesn't count yet. One that falls behind further begins anew: what
/// waits holds the buffers of clients.
const QUEUE_MAX: usize = 256;
/// Without an answer by then the stream ends.
const TIMEOUT_MS: u32 = 3_000;
/// Skipped mutations in memory before those that are answered are forgotten.
const SKIPPED_LOOK: usize = 1024;
/// Between two attempts to open a stream.
const AGAIN_MS: u64 = 100;
/// Before one that was too slow is copied to again.
const SLOW_AGAIN_MS: u64 = 1_000;
/// An in-sync member without a stream for so long is asked to be dropped.
const UNREACHABLE_MS: u64 = 1_500;

/// A payload: parts of buffers that others may read too.
pub(crate) type Payload<B> = Vec<(Arc<B>, Range<usize>)>;

/// A group this core is primary of, with other members.
pub(crate) struct Lead<B> {
    /// This time of leading the group: mutations are numbered anew in each.
    id: u64,
    /// The map in which it began.
    since: MapVersion,
    pub(crate) epoch: PgEpoch,
    /// Mutations that are not answered yet.
    pub(super) ops: Ops,
    pub(crate) members: BTreeMap<ShardRef, Member<B>>,
    /// Of the newest mutation appended.
    pub(crate) last: Option<Ticket>,
}

pub(crate) struct Member<B> {
    /// Counts: in-sync by the map, or asked to be.
    pub(super) required: bool,
    /// The map says so.
    pub(crate) in_sync: bool,
    /// The end mark of its copy was sent.
    asked: bool,
    /// And acked: the metadata plane may have been asked to make it in-sync.
    wished: bool,
    pub(crate) stream: Option<Stream<B>>,
    again_ms: u64,
    /// Since when there is no stream that is whole.
    broken_since_ms: u64,
    /// Mutations below this number came with a copy that ended.
    copied_to: u64,
    /// When it first said that it has no space; no stream has been whole since (R56).
    pub(super) full_since_ms: Option<u64>,
}

pub(crate) struct Stream<B> {
    pub(crate) id: u64,
    link: Option<LinkId>,
    place: u64,
    /// The member took its beginning: from here on mutations are in it.
    pub(crate) begun: bool,
    /// Mutations below this number are not in it: the copy brings them.
    from: u64,
    /// Neither are these: their chunks, or all of their inodes, had not been copied yet.
    skipped: BTreeSet<u64>,
    /// Chunks, and inodes with all their chunks, of which the member has a copy: mutations of them below these numbers.
    chunks: BTreeMap<(InodeId, ChunkIndex), u64>,
    scopes: BTreeMap<InodeId, u64>,
    /// The newest mutation that the member has, of those in the stream.
    acked: Option<u64>,
    /// Its copy was sent to the end.
    pub(crate) copied: bool,
    /// And the member has all of it.
    pub(crate) whole: bool,
    queue: VecDeque<(What, Ship, Payload<B>)>,
    pub(crate) in_flight: usize,
}

/// A core to which a link ended, and that has not taken the beginning of any stream since.
pub(crate) struct Silent {
    /// The newest of its links that ended; older ones did before.
    link: LinkId,
    since_ms: u64,
    /// A stream could not be begun since.
    failed: bool,
}

/// Mutations that somebody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Barrier {
    /// All up to this one.
    All(u64),
    /// All up to this one, and of what the lead began with this inode.
    Inode(u64, InodeId),
    /// All up to this one of this lead.
    Since(u64),
}

impl Barrier {
    /// Whether who waits for `other` waits for this.
    pub(crate) fn is_within(self, other: Self) -> bool {
        match (self, other) {
            (Self::All(a) | Self::Inode(a, _) | Self::Since(a), Self::All(b))
            | (Self::Since(a), Self::Inode(b, _) | Self::Since(b)) => a <= b,
            (Self::Inode(a, i), Self::Inode(b, j)) => i == j && a <= b,
            (Self::All(_), Self::Inode(..) | Self::Since(_))
            | (Self::Inode(..), Self::Since(_)) => false,
        }
    }
}

/// What a request of a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Begin,
    Op(u64),
    Copy,
    /// The last of a chunk's copy, and the number of the next mutation then.
    Chunk(InodeId, ChunkIndex, u64),
    /// The last of an inode's copy, likewise.
    Scope(InodeId, u64),
    /// The end of the copy, and the number of the next mutation then.
    End(u64),
}

impl<B> Member<B> {
    fn new(in_sync: bool, now_ms: u64) -> Self {
        Self {
            required: in_sync,
            in_sync,
            asked: false,
            wished: false,
            stream: None,
            again_ms: 0,
            broken_since_ms: now_ms,
            copied_to: 0,
            full_since_ms: None,
        }
    }

    /// Whether a mutation is durable there: taken from the stream, or with a copy that was made after it.
    fn has(&self, number: u64, touches: Touches) -> bool {
        number < self.copied_to || self.stream.as_ref().is_some_and(|s| s.has(number, touches))
    }
}

impl<B> Stream<B> {
    fn has(&self, number: u64, touches: Touches) -> bool {
        let taken = number >= self.from
            && self.acked.is_some_and(|acked| number <= acked)
            && !self.skipped.contains(&number);
        let copied = match touches {
            Touches::Chunk(inode, chunk) => {
                self.chunks.get(&(inode, chunk)).is_some_and(|next| number < *next)
                    || self.scopes.get(&inode).is_some_and(|next| number < *next)
            }
            Touches::Scope(inode) => self.scopes.get(&inode).is_some_and(|next| number < *next),
            Touches::Nothing | Touches::Everything => false,
        };
        taken || copied
    }
}

impl<B: Buffer> ShardCore<B> {
    // --- the map ----------------------------------------------------------------------------------

    /// The map or the lease changed: which groups this core leads, and with whom.
    pub(crate) fn regroup_leads(&mut self) {
        let mut over = Vec::new();
        for pg in (0..self.placement.pg_count()).map(PgId) {
            let entry = self.placement.led(pg);
            let since = entry.map(|e| e.since_map_version);
            let now_ms = self.now_ms;
            // Also where this core is primary again, and another one was in between.
            if self.replication.leads.get(&pg).is_some_and(|lead| Some(lead.since) != since)
                && let Some(lead) = self.replication.leads.remove(&pg)
            {
                if let Some(last) = lead.last {
                    self.replication.last.insert(pg, last);
                }
                over.extend(lead.ops.into_waiters());
                self.abandon_copy(pg, None);
            }
            let (Some(entry), Some(since)) = (self.placement.led(pg), since) else { continue };
            let (epoch, in_sync, syncing) =
                (entry.epoch, entry.members[1..].to_vec(), entry.syncing.clone());
            if in_sync.is_empty() && syncing.is_empty() && !self.replication.leads.contains_key(&pg)
            {
                continue;
            }
            let before = self.replication.last.get(&pg).copied();
            let id = self.next_id();
            let lead = self.replication.leads.entry(pg).or_insert_with(|| Lead {
                id,
                since,
                epoch,
                ops: Ops::new(),
                members: BTreeMap::new(),
                last: before,
            });
            let (news, unseen) = (epoch > lead.epoch, epoch.0 > lead.epoch.0 + 1);
            lead.epoch = epoch;
            let stays = |s: &ShardRef| in_sync.contains(s) || syncing.contains(s);
            // Also who left and was added again in epochs that this core did not see: it may have let go of
            // what it had, and nothing that was asked for it before holds any more (R47).
            let anew = |s: &ShardRef, m: &Member<B>| syncing.contains(s) && (m.in_sync || unseen);
            let left = lead.members.iter().filter(|(s, m)| !stays(s) || anew(s, m));
            let gone: Vec<ShardRef> = left.map(|(s, _)| *s).collect();
            gone.iter().for_each(|s| drop(lead.members.remove(s)));
            for (shard, counts) in
                in_sync.iter().map(|s| (*s, true)).chain(syncing.iter().map(|s| (*s, false)))
            {
                let m = lead.members.entry(shard).or_insert_with(|| Member::new(counts, now_ms));
                m.in_sync = counts;
                // Who was asked for counts until an epoch says that it is gone, or that the asking is void (R47).
                // What was copied to the end is asked for again, in this one.
                if news && !counts && m.stream.as_ref().is_none_or(|s| !s.copied) {
                    (m.asked, m.wished) = (false, false);
                }
                m.required = counts || m.asked;
            }
            for shard in gone {
                self.abandon_copy(pg, Some(shard));
            }
            self.settle_ops(pg, &Look::All);
        }
        let leads = &self.replication.leads;
        self.replication.silent.retain(|s, _| leads.values().any(|l| l.members.contains_key(s)));
        // Not this core's any more: nobody is told "done" for what the others may not have.
        for waiter in over {
            self.refuse_waiter(waiter);
        }
    }

    fn refuse_waiter(&mut self, waiter: Waiter) {
        let stale = Refusal { refresh: true, ..Refusal::of(Status::StaleEpoch) };
        match waiter {
            Waiter::Write(key) => self.end_write(key, Err(stale)),
            Waiter::Control(id) => self.refuse_control(id, stale),
            other => self.run_waiter(other),
        }
    }

    /// Members without a complete copy.
    pub(crate) fn members_syncing(&self) -> u64 {
        let members = self.replication.leads.values().flat_map(|l| l.members.values());
        members.filter(|m| m.stream.as_ref().is_none_or(|s| !s.whole)).count() as u64
    }

    /// What this core asks for its groups.
    pub(crate) fn wishes(&self) -> Wishes {
        let mut wishes = Wishes::default();
        for (pg, lead) in &self.replication.leads {
            for (shard, m) in &lead.members {
                let wish = Wish { pg: *pg, epoch: lead.epoch, member: *shard };
                let whole = m.stream.as_ref().is_some_and(|s| s.whole);
                if m.asked && !m.in_sync && whole {
                    wishes.in_sync.push(wish);
                }
                let long = |since_ms: u64| self.now_ms >= since_ms.saturating_add(UNREACHABLE_MS);
                let silent = self.replication.silent.get(shard);
                let silent = silent.filter(|s| s.failed && long(s.since_ms));
                let lost = match &m.stream {
                    // It is there, and says no: whether it goes is a question of how many remain.
                    _ if m.full_since_ms.is_some() => self.is_full_for_long(*pg, m),
                    None => long(m.broken_since_ms),
                    // To begin one may take longer than the pauses between two attempts. And one that had nothing to
                    // send hasn't noticed that its link is no more: not each group has to wait for that anew.
                    Some(s) => silent.is_some_and(|ended| !s.begun || s.link <= Some(ended.link)),
                };
                if m.required && lost {
                    wishes.unreachable.push(wish);
                }
            }
        }
        wishes.in_sync.sort_unstable();
        wishes.unreachable.sort_unstable();
        wishes
    }

    // --- shipping ---------------------------------------------------------------------------------

    /// Whether others have to get what is appended of a group.
    pub(crate) fn leads(&self, pg: PgId) -> bool {
        self.replication.leads.contains_key(&pg)
    }

    /// A mutation of a group was appended: the others get it, and its ticket waits for them.
    pub(crate) fn ship(&mut self, pg: PgId, ticket: Ticket, ship: Ship, payload: Payload<B>) {
        let Some(lead) = self.replication.leads.get_mut(&pg) else { return };
        // A repetition of what is on its way got the ticket of that one: nothing was appended for it. Counted
        // again it would take the ticket away from the first, which then is never held.
        if lead.last.is_some_and(|last| ticket <= last) {
            return;
        }
        lead.last = Some(ticket);
        let touches = match &ship {
            Ship::Write(w) => Touches::Chunk(w.inode, w.chunk),
            Ship::FlushDone(done) => Touches::Scope(done.inode),
            _ => Touches::Nothing,
        };
        let number = lead.ops.push(touches);
        let id = lead.id;
        let before = self.replication.shipped.insert(ticket, (pg, id, number));
        debug_assert!(before.is_none(), "a ticket is one mutation's");
        let shards: Vec<ShardRef> = lead.members.keys().copied().collect();
        if let Ship::Write(w) = &ship {
            for c in self.replication.copies.iter_mut().filter(|c| c.pg == pg) {
                c.applied(w.entry());
            }
        }
        for shard in shards {
            if self.is_aligned(pg, touches, shard) {
                self.stats.replicated += 1;
                self.stream_send(pg, shard, What::Op(number), ship.clone(), payload.clone());
            } else {
                self.skip(pg, shard, number, touches);
            }
        }
    }

    /// Whether a member has what a mutation builds upon. The blocks of a write were merged with what was there
    /// before, acked or not; a flush's result says what of the *primary's* data is in S3. Where the chunk, or
    /// all of the inode, was not copied yet, the member gets either with the copy.
    fn is_aligned(&self, pg: PgId, touches: Touches, shard: ShardRef) -> bool {
        let (inode, chunk) = match touches {
            Touches::Nothing | Touches::Everything => return true,
            Touches::Chunk(inode, chunk) => (inode, Some(chunk)),
            Touches::Scope(inode) => (inode, None),
        };
        let lead = self.replication.leads.get(&pg);
        let Some(m) = lead.and_then(|l| l.members.get(&shard)) else { return true };
        let Some(stream) = &m.stream else { return false };
        let scope = Scope { inode, pg };
        stream.copied || self.replication.copies.iter().any(|c| c.is_past(stream.id, scope, chunk))
    }

    fn skip(&mut self, pg: PgId, shard: ShardRef, number: u64, touches: Touches) {
        let Some(lead) = self.replication.leads.get_mut(&pg) else { return };
        let Some(m) = lead.members.get_mut(&shard) else { return };
        let Some(stream) = m.stream.as_mut().filter(|s| s.begun) else { return };
        if stream.skipped.len() >= SKIPPED_LOOK {
            stream.skipped.retain(|n| lead.ops.is_open(*n));
        }
        stream.skipped.insert(number);
        let id = stream.id;
        let (inode, chunk) = match touches {
            Touches::Chunk(inode, chunk) => (inode, Some(chunk)),
            Touches::Scope(inode) => (inode, None),
            Touches::Nothing | Touches::Everything => return,
        };
        for c in self.replication.copies.iter_mut().filter(|c| c.is_of(id)) {
            c.want(inode, chunk);
        }
    }

    /// Whether a flush's result has to wait for copies of its inode to members that count; they come next.
    pub(crate) fn awaits_copies(&mut self, scope: Scope) -> bool {
        let Some(lead) = self.replication.leads.get(&scope.pg) else { return false };
        let whole = Touches::Scope(scope.inode);
        let late: Vec<ShardRef> = lead
            .members
            .iter()
            .filter(|(shard, m)| m.required && !self.is_aligned(scope.pg, whole, **shard))
            .map(|(shard, _)| *shard)
            .collect();
        for c in self.replication.copies.iter_mut().filter(|c| c.pg == scope.pg) {
            if late.contains(&c.member) {
                c.want(scope.inode, None);
            }
        }
        !late.is_empty()
    }

    /// Puts a request into a member's stream, if it has one.
    pub(crate) fn stream_send(
        &mut self,
        pg: PgId,
        shard: ShardRef,
        what: What,
        ship: Ship,
        payload: Payload<B>,
    ) {
        let stream = self
            .replication
            .leads
            .get_mut(&pg)
            .and_then(|lead| lead.members.get_mut(&shard))
            .and_then(|m| m.stream.as_mut());
        let Some(stream) = stream.filter(|s| s.begun || what == What::Begin) else { return };
        stream.queue.push_back((what, ship, payload));
        self.stream_push(pg, shard);
    }

    /// Sends what other streams to the same core kept back; gives those up that are too far behind.
    fn push_streams(&mut self) {
        let waits = |m: &Member<B>| m.stream.as_ref().is_some_and(|s| !s.queue.is_empty());
        let mut waiting: Vec<(PgId, ShardRef)> = Vec::new();
        for (pg, lead) in &self.replication.leads {
            waiting.extend(lead.members.iter().filter(|(_, m)| waits(m)).map(|(s, _)| (*pg, *s)));
        }
        waiting.sort_unstable();
        for (pg, shard) in waiting {
            self.stream_push(pg, shard);
            let m = self.replication.leads.get(&pg).and_then(|l| l.members.get(&shard));
            let long = |m: &Member<B>| m.stream.as_ref().is_some_and(|s| s.queue.len() > QUEUE_MAX);
            if m.is_some_and(|m| !m.required && long(m)) {
                tracing::debug!(%pg, ?shard, "a member that is being copied to is too slow");
                self.stream_broke(pg, shard, SLOW_AGAIN_MS);
            }
        }
    }

    /// Sends what may go.
    fn stream_push(&mut self, pg: PgId, shard: ShardRef) {
        loop {
            let map_version = self.placement.version();
            let token = self.next_id();
            let to_peer = self.replication.in_flight.get(&shard).copied().unwrap_or(0);
            let Some(lead) = self.replication.leads.get_mut(&pg) else { return };
            let epoch = lead.epoch;
            let Some(stream) = lead.members.get_mut(&shard).and_then(|m| m.stream.as_mut()) else {
                return;
            };
            // Until the first answer has named the link, only that first request is out.
            let room = stream.in_flight < IN_FLIGHT_MAX
                && to_peer < PEER_IN_FLIGHT_MAX
                && (stream.link.is_some() || stream.place == 0);
            if !room {
                return;
            }
            let Some((what, ship, payload)) = stream.queue.pop_front() else { return };
            let shipped =
                Shipped { pg, epoch, map_version, stream: stream.id, place: stream.place, ship };
            stream.place += 1;
            stream.in_flight += 1;
            *self.replication.in_flight.entry(shard).or_default() += 1;
            let (id, link) = (stream.id, stream.link);
            let bytes: usize = payload.iter().map(|(_, r)| r.len()).sum();
            let header = Header { pg, ..Header::request(Opcode::Replicate, 0) };
            let header = header.with_payload(bytes as u32);
            let body = codec::encode(&shipped);
            let token = crate::core::Token(token);
            self.pending.insert(token, Pending::Ship(pg, shard, id, what));
            self.out.push(Command::Call(Call {
                token,
                peer: shard,
                link,
                header,
                body,
                payload,
                channel: Channel::Stream,
                want: None,
                timeout_ms: TIMEOUT_MS,
            }));
        }
    }

    /// An answer of a member.
    pub(crate) fn ship_answered(
        &mut self,
        pg: PgId,
        shard: ShardRef,
        id: u64,
        what: What,
        answer: &Answer<B>,
    ) {
        if let Some(n) = self.replication.in_flight.get_mut(&shard) {
            *n -= 1;
            if *n == 0 {
                self.replication.in_flight.remove(&shard);
            }
        }
        let Some(lead) = self.replication.leads.get_mut(&pg) else { return };
        let next = lead.ops.next();
        let Some(m) = lead.members.get_mut(&shard) else { return };
        let Some(stream) = m.stream.as_mut().filter(|s| s.id == id) else { return };
        stream.in_flight -= 1;
        let status = match &answer.outcome {
            Ok((header, _)) => header.status,
            Err(e) => {
                let soon = matches!(e, PeerError::Full);
                if !soon {
                    let since_ms = self.now_ms;
                    let new = Silent { link: LinkId(0), since_ms, failed: false };
                    let silent = self.replication.silent.entry(shard).or_insert(new);
                    silent.link = silent.link.max(stream.link.unwrap_or(LinkId(0)));
                    silent.failed |= !stream.begun;
                    if m.full_since_ms.take().is_some() {
                        m.broken_since_ms = since_ms;
                    }
                }
                tracing::debug!(%pg, ?shard, error = %e, "a member's stream ended");
                return self.stream_broke(pg, shard, if soon { 1 } else { AGAIN_MS });
            }
        };
        if status == Status::NoSpace {
            return self.member_is_full(pg, shard);
        }
        if status != Status::Ok {
            tracing::debug!(%pg, ?shard, ?status, "a member refused its stream");
            return self.stream_broke(pg, shard, AGAIN_MS);
        }
        stream.link.get_or_insert(answer.link);
        match what {
            What::Begin => {
                (stream.begun, stream.from) = (true, next);
                self.replication.silent.remove(&shard);
            }
            What::Copy => {}
            What::Chunk(inode, chunk, next) => {
                stream.chunks.insert((inode, chunk), next);
                self.settle_ops(pg, &Look::Chunk(inode, chunk));
                self.wake_early(pg);
            }
            What::Scope(inode, next) => {
                stream.scopes.insert(inode, next);
                self.settle_ops(pg, &Look::Scope(inode));
                self.wake_early(pg);
            }
            What::Op(number) => {
                let first = stream.acked.map_or(stream.from, |acked| acked + 1);
                stream.acked = stream.acked.max(Some(number));
                self.settle_ops(pg, &Look::Numbers(first..=number));
            }
            What::End(next) => {
                stream.whole = true;
                stream.skipped.clear();
                stream.chunks.clear();
                stream.scopes.clear();
                m.wished = true;
                m.full_since_ms = None;
                m.copied_to = m.copied_to.max(next);
                self.settle_ops(pg, &Look::All);
            }
        }
        self.stream_push(pg, shard);
    }

    /// The stream is over: the next one begins with a copy.
    pub(crate) fn stream_broke(&mut self, pg: PgId, shard: ShardRef, again_ms: u64) {
        let now_ms = self.now_ms;
        let Some(lead) = self.replication.leads.get_mut(&pg) else { return };
        let Some(m) = lead.members.get_mut(&shard) else { return };
        if m.stream.take().is_some_and(|s| s.whole) {
            m.broken_since_ms = now_ms;
        } else {
            // The end mark was not acked, so nobody was asked.
            m.asked &= m.wished;
            m.required = m.in_sync || m.asked;
        }
        m.again_ms = now_ms + again_ms;
        self.abandon_copy(pg, Some(shard));
        self.settle_ops(pg, &Look::All);
    }

    /// Opens the streams that are due.
    pub(crate) fn open_streams(&mut self) {
        self.push_streams();
        let mut due = Vec::new();
        for (pg, lead) in &self.replication.leads {
            for (shard, m) in &lead.members {
                if m.stream.is_none() && self.now_ms >= m.again_ms {
                    due.push((*pg, *shard));
                }
            }
        }
        due.sort_unstable();
        for (pg, shard) in due {
            let id = self.next_id();
            let Some(lead) = self.replication.leads.get_mut(&pg) else { continue };
            let Some(m) = lead.members.get_mut(&shard) else { continue };
            m.stream = Some(Stream {
                id,
                link: None,
                place: 0,
                begun: false,
                from: u64::MAX,
                skipped: BTreeSet::new(),
                chunks: BTreeMap::new(),
                scopes: BTreeMap::new(),
                acked: None,
                copied: false,
                whole: false,
                queue: VecDeque::new(),
                in_flight: 0,
            });
            self.stream_send(pg, shard, What::Begin, Ship::Begin, Vec::new());
        }
    }

    /// Requests of a copy's stream that are not answered or not sent yet.
    pub(crate) fn stream_backlog(&self, pg: PgId, shard: ShardRef) -> usize {
        let lead = self.replication.leads.get(&pg);
        let stream = lead.and_then(|l| l.members.get(&shard)).and_then(|m| m.stream.as_ref());
        stream.map_or(0, |s| s.in_flight + s.queue.len())
    }

    /// The end mark goes out: from here on the member counts, whatever the map says yet. Its in-sync may
    /// be asked for as soon as the mark is acked, and what is answered in between has to be there (R47).
    pub(crate) fn stream_copied(&mut self, pg: PgId, shard: ShardRef) {
        let lead = self.replication.leads.get_mut(&pg);
        if let Some(m) = lead.and_then(|l| l.members.get_mut(&shard))
            && let Some(stream) = &mut m.stream
        {
            stream.copied = true;
            m.asked = true;
            m.required = true;
        }
    }

    /// Number of the group's next mutation.
    pub(crate) fn next_op(&self, pg: PgId) -> u64 {
        self.replication.leads.get(&pg).map_or(0, |l| l.ops.next())
    }

    // --- counting ---------------------------------------------------------------------------------

    /// A ticket is durable here: its waiters go on, or wait for others too.
    pub(crate) fn durable_here(&mut self, ticket: Ticket, waiters: Vec<Waiter>) {
        let Some((pg, id, number)) = self.replication.shipped.remove(&ticket) else {
            return waiters.into_iter().for_each(|waiter| self.run_waiter(waiter));
        };
        let lead = self.replication.leads.get_mut(&pg).filter(|lead| lead.id == id);
        let Some(lead) = lead.filter(|lead| lead.ops.is_open(number)) else {
            // The group is another's by now, or was in between: whether they have it isn't known.
            return waiters.into_iter().for_each(|waiter| self.refuse_waiter(waiter));
        };
        lead.ops.durable(number);
        drop(lead.ops.wait(number, waiters));
        self.settle_ops(pg, &Look::Numbers(number..=number));
        let lead = self.replication.leads.get(&pg);
        let waits = lead.is_some_and(|l| l.ops.is_waited_for(number));
        self.stats.replication_waits += u64::from(waits);
    }

    pub(crate) fn wait_op(&mut self, pg: PgId, number: u64, waiters: Vec<Waiter>) {
        let waits = match self.replication.leads.get_mut(&pg) {
            Some(lead) => lead.ops.wait(number, waiters),
            None => Err(waiters),
        };
        if let Err(waiters) = waits {
            waiters.into_iter().for_each(|w| self.run_waiter(w));
        }
    }

    /// The newest write of a chunk that is durable here and not yet where it has to be. If that is what the lead
    /// began with, the chunk is copied next.
    pub(crate) fn open_op_of(&mut self, pg: PgId, key: (InodeId, ChunkIndex)) -> Option<u64> {
        let lead = self.replication.leads.get(&pg)?;
        if let Some(number) = lead.ops.newest_of(key.0, key.1) {
            return Some(number);
        }
        let touches = Touches::Chunk(key.0, key.1);
        if !lead.ops.is_open(0) || lead.members.values().all(|m| !m.required || m.has(0, touches)) {
            return None;
        }
        for c in self.replication.copies.iter_mut().filter(|c| c.pg == pg) {
            c.want(key.0, Some(key.1));
        }
        Some(0)
    }

    /// More was copied of what the lead began with: who waits for a part of it looks again.
    fn wake_early(&mut self, pg: PgId) {
        let Some(lead) = self.replication.leads.get_mut(&pg) else { return };
        let parts =
            |w: &Waiter| matches!(w, Waiter::Read(_) | Waiter::Write(_) | Waiter::Control(_));
        let early = lead.ops.take_early(parts);
        early.into_iter().for_each(|w| self.run_waiter(w));
    }

    /// The newest mutation of a group so far, and of which time of leading it: who repeats one that is not everywhere
    /// waits for all up to it.
    pub(crate) fn op_newest(&self, pg: PgId) -> Option<(u64, u64)> {
        let lead = self.replication.leads.get(&pg)?;
        Some((lead.id, lead.ops.next().checked_sub(1)?))
    }

    /// The groups that this core leads.
    pub(crate) fn led_groups(&self) -> Vec<PgId> {
        let mut groups: Vec<PgId> = self.replication.leads.keys().copied().collect();
        groups.sort_unstable();
        groups
    }

    /// A mutation that is not where it has to be. If that is what the lead began with, its inode is copied next.
    pub(crate) fn open_op_within(&mut self, pg: PgId, barrier: Barrier) -> Option<u64> {
        let lead = self.replication.leads.get(&pg)?;
        let (newest, inode) = match barrier {
            Barrier::All(newest) => return lead.ops.open_below(newest),
            Barrier::Since(newest) => return lead.ops.open_below(newest).filter(|n| *n > 0),
            Barrier::Inode(newest, inode) => (newest, inode),
        };
        let touches = Touches::Scope(inode);
        let begun_with = || lead.members.values().any(|m| m.required && !m.has(0, touches));
        match lead.ops.open_below(newest)? {
            0 if begun_with() => {
                for c in self.replication.copies.iter_mut().filter(|c| c.pg == pg) {
                    c.want(inode, None);
                }
                Some(0)
            }
            0 => None,
            number => Some(number),
        }
    }

    /// Answers what is where it has to be.
    fn settle_ops(&mut self, pg: PgId, look: &Look) {
        let Some(lead) = self.replication.leads.get_mut(&pg) else { return };
        let members = &lead.members;
        let everywhere = |number: u64, touches: Touches| {
            members.values().filter(|m| m.required).all(|m| m.has(number, touches))
        };
        for waiter in lead.ops.settle(look, everywhere) {
            self.run_waiter(waiter);
        }
    }
}
