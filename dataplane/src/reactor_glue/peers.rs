//! The other cores that this one calls: a bounded table of links, made when they are needed.
//!
//! * A call is given to a link, waits while that one is being made, and leaves in the order of the calls.
//!   It ends exactly once: with its reply, or with the reason why there is none.
//! * A link ends when its socket does, when it says something that makes no sense, when a call is not
//!   answered in its time, or when the map names another address. Its calls are answered when the ring
//!   said `Closed`: by then every slot is home, and nothing of the link can come any more.
//! * The next link is made by the next call, and not before the back-off is over: a call in between is
//!   `Unreachable`. Whether to ask again is the core's to say.
//! * Bounded (I9): cores called, calls to each, and messages of each in the ring's queue.
//!
//! A host that is a name is looked up outside this thread (`resolve`).

use super::link::{CALLS_FROM, Caller, Link, Sent, Stage, Step, frame};
use crate::core::{Answer, Call, Channel, LinkId, PeerError};
use crate::resolve::ResolveSender;
use ebb_dataplane_protocol::header::PAYLOAD_BYTES_MAX;
use ebb_dataplane_protocol::{ClusterMap, Header, ShardRef, Status};
use ebb_ring::{Buf, ConnId, NetError, Reactor, Segment, Segments, Token};
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// Other cores with a link or calls at once.
const PEERS_MAX: usize = 512;
/// Calls to one core without an answer.
const CALLS_MAX: usize = 1024;
/// Messages of one link in the ring's queue, which holds 256.
const UNSENT_MAX: usize = 128;
/// A socket is connected by then, or not at all.
const CONNECT_MS: u64 = 2000;
/// From the look-up of the address to the end of the handshake.
const GREETING_MS: u64 = 5000;
/// Pause after the first failure; doubles up to the last.
const PAUSE_MS: u64 = 20;
const PAUSE_MAX_MS: u64 = 2000;

/// A core, and which connection to it.
type Key = (ShardRef, Channel);

#[derive(Debug)]
struct Peer {
    /// The name of the link that calls are given to now, which may not be open yet.
    link: LinkId,
    address: Address,
    state: State,
    /// Calls of `link` that did not leave.
    waiting: VecDeque<Waiting>,
    failures: u32,
    retry_at_ms: u64,
}

#[derive(Debug)]
struct Waiting {
    call: Call<Buf>,
    deadline_ms: u64,
}

/// Where the map says that a core is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Address {
    host: String,
    port: u16,
    store: u128,
}

#[derive(Debug)]
enum State {
    Down,
    Resolving {
        since_ms: u64,
    },
    /// Made or being made.
    Up(Box<Link>),
    /// Over; the ring still holds something of it.
    Closing {
        link: Box<Link>,
        late: Option<u64>,
    },
}

/// The table.
#[derive(Debug)]
pub(super) struct Peers {
    caller: Caller,
    map: Option<Arc<ClusterMap>>,
    peers: HashMap<Key, Peer>,
    conns: HashMap<ConnId, Key>,
    resolver: ResolveSender,
    answers: Vec<Answer<Buf>>,
    last_link: u64,
    last_request: u64,
    /// No deadline is earlier.
    look_at_ms: u64,
}

impl Peers {
    pub(super) fn new(caller: Caller, resolver: ResolveSender) -> Self {
        Self {
            caller,
            map: None,
            peers: HashMap::new(),
            conns: HashMap::new(),
            resolver,
            answers: Vec::new(),
            last_link: 0,
            last_request: CALLS_FROM,
            look_at_ms: u64::MAX,
        }
    }

    /// Whether a connection is one of these.
    pub(super) fn owns(&self, conn: ConnId) -> bool {
        self.conns.contains_key(&conn)
    }

    /// Answers for the core.
    pub(super) fn take_answers(&mut self) -> Vec<Answer<Buf>> {
        std::mem::take(&mut self.answers)
    }

    pub(super) fn has_answers(&self) -> bool {
        !self.answers.is_empty()
    }

    /// When to look at the clock again.
    pub(super) fn wake_at_ms(&self) -> u64 {
        self.look_at_ms
    }

    /// A newer map: links to addresses that it no longer names end.
    pub(super) fn set_map(&mut self, reactor: &mut Reactor, map: Arc<ClusterMap>, now_ms: u64) {
        if self.map.as_ref().is_some_and(|known| known.version >= map.version) {
            return;
        }
        self.map = Some(map);
        let moved: Vec<Key> = self
            .peers
            .iter()
            .filter(|(shard, peer)| self.address(shard.0).as_ref() != Some(&peer.address))
            .map(|(shard, _)| *shard)
            .collect();
        for shard in moved {
            self.end(reactor, shard, "the map names another address", None, now_ms);
            if let Some(peer) = self.peers.get_mut(&shard) {
                // A new address owes nothing for what the old one did.
                (peer.failures, peer.retry_at_ms) = (0, 0);
            }
        }
        self.forget_idle(now_ms);
    }

    fn address(&self, shard: ShardRef) -> Option<Address> {
        let map = self.map.as_ref()?;
        let (host, port) = map.address(shard)?;
        let store = map.node(shard.node)?.store;
        Some(Address { host: host.to_owned(), port, store })
    }

    fn new_link(&mut self) -> LinkId {
        self.last_link += 1;
        LinkId(self.last_link)
    }

    /// Peers without a link, calls or a pause are made anew when they are needed.
    fn forget_idle(&mut self, now_ms: u64) {
        self.peers.retain(|_, p| {
            !matches!(p.state, State::Down) || !p.waiting.is_empty() || now_ms < p.retry_at_ms
        });
    }

    // --- calls ------------------------------------------------------------------------------------

    /// Takes a call of the core.
    pub(super) fn call(&mut self, reactor: &mut Reactor, call: Call<Buf>, now_ms: u64) {
        let shard = (call.peer, call.channel);
        let unreachable = PeerError::Unreachable { retry_after_ms: PAUSE_MAX_MS as u32 };
        if !self.peers.contains_key(&shard) {
            if call.link.is_some() {
                return self.refuse(call, LinkId(0), PeerError::Broken);
            }
            if self.peers.len() >= PEERS_MAX {
                self.forget_idle(now_ms);
            }
            if self.peers.len() >= PEERS_MAX {
                return self.refuse(call, LinkId(0), PeerError::Full);
            }
            let Some(address) = self.address(shard.0) else {
                return self.refuse(call, LinkId(0), unreachable);
            };
            let link = self.new_link();
            let peer = Peer {
                link,
                address,
                state: State::Down,
                waiting: VecDeque::new(),
                failures: 0,
                retry_at_ms: 0,
            };
            self.peers.insert(shard, peer);
        }
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        let link = peer.link;
        if call.link.is_some_and(|l| l != link) {
            return self.refuse(call, link, PeerError::Broken);
        }
        let sent = match &peer.state {
            State::Up(l) => l.sent.len(),
            _ => 0,
        };
        if peer.waiting.len() + sent >= CALLS_MAX {
            return self.refuse(call, link, PeerError::Full);
        }
        let payload: usize = call.payload.iter().map(|(_, r)| r.len()).sum();
        let slot = call.want.as_ref().is_none_or(|w| w.buf.get(w.range.clone()).is_some());
        debug_assert!(slot && payload <= PAYLOAD_BYTES_MAX as usize, "the core's own mistake");
        if matches!(peer.state, State::Down | State::Closing { .. }) && now_ms < peer.retry_at_ms {
            let retry_after_ms = (peer.retry_at_ms - now_ms) as u32;
            return self.refuse(call, link, PeerError::Unreachable { retry_after_ms });
        }
        let deadline_ms = now_ms + u64::from(call.timeout_ms);
        peer.waiting.push_back(Waiting { call, deadline_ms });
        self.look_at_ms = self.look_at_ms.min(deadline_ms);
        match peer.state {
            State::Down => self.begin(reactor, shard, now_ms),
            State::Up(_) => self.flush(reactor, shard, now_ms),
            State::Resolving { .. } | State::Closing { .. } => {}
        }
    }

    fn refuse(&mut self, call: Call<Buf>, link: LinkId, why: PeerError) {
        let buf = call.want.map(|w| w.buf);
        self.answers.push(Answer { token: call.token, link, outcome: Err(why), buf });
    }

    /// Hands what waits to the ring, as much as it takes.
    fn flush(&mut self, reactor: &mut Reactor, shard: Key, now_ms: u64) {
        loop {
            let Some(peer) = self.peers.get_mut(&shard) else { return };
            let State::Up(link) = &mut peer.state else { return };
            if !matches!(link.stage, Stage::Ready) || link.unsent >= UNSENT_MAX {
                return;
            }
            let Some(Waiting { call, deadline_ms }) = peer.waiting.pop_front() else { return };
            self.last_request += 1;
            let id = self.last_request;
            let payload: usize = call.payload.iter().map(|(_, r)| r.len()).sum();
            let header = Header { request_id: id, ..call.header }.with_payload(payload as u32);
            let head = Segment::Bytes(frame(header, &call.body));
            let segments: Segments = if call.payload.is_empty() {
                head.into()
            } else {
                let parts = call.payload.into_iter().map(|(b, r)| Segment::Shared(b, r));
                std::iter::once(head).chain(parts).collect::<Vec<_>>().into()
            };
            let (token, opcode, want) = (call.token, header.opcode, call.want);
            link.sent.insert(id, Sent { token, opcode, deadline_ms, want });
            link.unsent += 1;
            if reactor.send(link.conn, Token(0), segments).is_err() {
                link.unsent -= 1;
                return self.end(reactor, shard, "the socket takes nothing more", None, now_ms);
            }
        }
    }

    // --- the making of a link ---------------------------------------------------------------------

    fn begin(&mut self, reactor: &mut Reactor, shard: Key, now_ms: u64) {
        let Some(address) = self.address(shard.0) else {
            return self.failed(shard, "the map does not name it", now_ms);
        };
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        peer.address = address;
        match peer.address.host.parse::<IpAddr>() {
            Ok(ip) => self.connect(reactor, shard, ip, now_ms),
            Err(_) if self.resolver.try_send(&peer.address.host) => {
                peer.state = State::Resolving { since_ms: now_ms };
                self.look_at_ms = self.look_at_ms.min(now_ms + GREETING_MS);
            }
            Err(_) => self.failed(shard, "too many names are being looked up", now_ms),
        }
    }

    /// A name was looked up.
    pub(super) fn resolved(
        &mut self,
        reactor: &mut Reactor,
        host: &str,
        ip: Option<IpAddr>,
        now_ms: u64,
    ) {
        let waiting: Vec<Key> = self
            .peers
            .iter()
            .filter(|(_, p)| matches!(p.state, State::Resolving { .. }) && p.address.host == host)
            .map(|(shard, _)| *shard)
            .collect();
        for shard in waiting {
            match ip {
                Some(ip) => self.connect(reactor, shard, ip, now_ms),
                None => self.failed(shard, "its name has no address", now_ms),
            }
        }
    }

    fn connect(&mut self, reactor: &mut Reactor, shard: Key, ip: IpAddr, now_ms: u64) {
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        let to = SocketAddr::new(ip, peer.address.port);
        match reactor.connect(to, Token(0), Duration::from_millis(CONNECT_MS)) {
            Ok(conn) => {
                peer.state = State::Up(Box::new(Link::new(peer.link, conn, now_ms)));
                self.conns.insert(conn, shard);
                self.look_at_ms = self.look_at_ms.min(now_ms + GREETING_MS);
            }
            Err(why) => {
                tracing::warn!(?shard, %why, "the ring refused a connection");
                self.failed(shard, "the ring has no room", now_ms);
            }
        }
    }

    pub(super) fn connected(
        &mut self,
        reactor: &mut Reactor,
        conn: ConnId,
        result: Result<(), NetError>,
        now_ms: u64,
    ) {
        let Some(&shard) = self.conns.get(&conn) else { return };
        if let Err(error) = result {
            tracing::debug!(?shard, %error, "no connection");
            return self.end(reactor, shard, "it cannot be connected", None, now_ms);
        }
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        let State::Up(link) = &mut peer.state else { return };
        let Some((bytes, hello)) = self.caller.hello(shard, peer.address.store) else {
            return self.end(reactor, shard, "no randomness for a hello", None, now_ms);
        };
        link.stage = Stage::Hello { hello };
        link.unsent += 1;
        if reactor.send(conn, Token(0), bytes).is_err() {
            link.unsent -= 1;
            return self.end(reactor, shard, "the socket takes nothing", None, now_ms);
        }
        self.read(reactor, shard, now_ms);
    }

    fn greeted(
        &mut self,
        reactor: &mut Reactor,
        shard: Key,
        header: &Header,
        body: &[u8],
        now_ms: u64,
    ) {
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        let State::Up(link) = &mut peer.state else { return };
        let done = match &link.stage {
            Stage::Hello { hello } => self.caller.proof(hello, header, body).map(Some),
            _ if header.status == Status::Ok => Ok(None),
            _ => Err(String::from_utf8_lossy(body).into_owned()),
        };
        match done {
            Ok(Some(proof)) => {
                link.stage = Stage::Proof;
                link.unsent += 1;
                if reactor.send(link.conn, Token(0), proof).is_err() {
                    link.unsent -= 1;
                    self.end(reactor, shard, "the socket takes nothing", None, now_ms);
                }
            }
            Ok(None) => {
                link.stage = Stage::Ready;
                self.flush(reactor, shard, now_ms);
            }
            Err(why) => {
                tracing::warn!(?shard, why, "another core refused the handshake");
                self.end(reactor, shard, "the handshake was refused", None, now_ms);
            }
        }
    }

    // --- what the ring says -----------------------------------------------------------------------

    pub(super) fn received(
        &mut self,
        reactor: &mut Reactor,
        conn: ConnId,
        buf: Buf,
        range: Range<usize>,
        result: Result<usize, NetError>,
        now_ms: u64,
    ) {
        let Some(&shard) = self.conns.get(&conn) else { return };
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        let n = match (&mut peer.state, result) {
            (State::Up(_), Ok(n)) => n,
            (State::Up(link), Err(_)) => {
                link.give_back(buf);
                return self.end(reactor, shard, "the other side ended it", None, now_ms);
            }
            // Nobody hears it any more.
            (State::Closing { link, .. }, _) => return link.give_back(buf),
            _ => return,
        };
        let State::Up(link) = &mut peer.state else { return };
        if let Some(Step::Reply(sent, header, body)) = link.arrived(buf, &range, n) {
            self.replied(shard, sent, header, body);
        }
        self.read(reactor, shard, now_ms);
    }

    /// Parses what is there; posts the next receive.
    fn read(&mut self, reactor: &mut Reactor, shard: Key, now_ms: u64) {
        loop {
            let Some(peer) = self.peers.get_mut(&shard) else { return };
            let State::Up(link) = &mut peer.state else { return };
            let conn = link.conn;
            let posted = match link.step() {
                Step::Wait => return,
                Step::Greeting(header, body) => {
                    self.greeted(reactor, shard, &header, &body, now_ms);
                    continue;
                }
                Step::Reply(sent, header, body) => {
                    self.replied(shard, sent, header, body);
                    continue;
                }
                Step::Bad(why) => return self.end(reactor, shard, why, None, now_ms),
                Step::More(buf, range) => reactor.recv_some(conn, Token(0), buf, range),
                Step::IntoSlot(buf, range) => reactor.recv_exact(conn, Token(0), buf, range),
            };
            if let Err(r) = posted {
                link.give_back(r.back);
                self.end(reactor, shard, "the socket gives nothing more", None, now_ms);
            }
            return;
        }
    }

    fn replied(&mut self, shard: Key, sent: Sent, header: Header, body: Vec<u8>) {
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        let State::Up(link) = &mut peer.state else { return };
        if !std::mem::replace(&mut link.proved_useful, true) {
            peer.failures = 0;
        }
        let (token, buf) = (sent.token, sent.want.map(|w| w.buf));
        self.answers.push(Answer { token, link: link.name, outcome: Ok((header, body)), buf });
    }

    pub(super) fn sent(
        &mut self,
        reactor: &mut Reactor,
        conn: ConnId,
        result: Result<(), NetError>,
        now_ms: u64,
    ) {
        let Some(&shard) = self.conns.get(&conn) else { return };
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        let State::Up(link) = &mut peer.state else { return };
        link.unsent -= 1;
        match result {
            Ok(()) => self.flush(reactor, shard, now_ms),
            Err(_) => self.end(reactor, shard, "nothing can be sent", None, now_ms),
        }
    }

    /// The last word about a connection: all its slots are home.
    pub(super) fn closed(&mut self, reactor: &mut Reactor, conn: ConnId, now_ms: u64) {
        let Some(shard) = self.conns.remove(&conn) else { return };
        // A socket that ended by itself was ended by `Connected` before.
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        match std::mem::replace(&mut peer.state, State::Down) {
            State::Closing { link, late } => {
                let name = link.name;
                for (id, sent) in link.sent {
                    let why =
                        if late == Some(id) { PeerError::TimedOut } else { PeerError::Broken };
                    let buf = sent.want.map(|w| w.buf);
                    let (token, link) = (sent.token, name);
                    self.answers.push(Answer { token, link, outcome: Err(why), buf });
                }
            }
            other => {
                debug_assert!(false, "closed without having been ended");
                peer.state = other;
            }
        }
        // Calls that came meanwhile belong to the next link.
        if peer.waiting.is_empty() {
            return;
        }
        if now_ms < peer.retry_at_ms {
            let retry_after_ms = (peer.retry_at_ms - now_ms) as u32;
            self.refuse_waiting(shard, None, PeerError::Unreachable { retry_after_ms });
        } else {
            self.begin(reactor, shard, now_ms);
        }
    }

    // --- the end of a link ------------------------------------------------------------------------

    /// Ends whatever there is of a link. Calls that left are answered when the ring is done with it,
    /// those that did not at once. `late`: the call whose time was over.
    fn end(
        &mut self,
        reactor: &mut Reactor,
        shard: Key,
        why: &'static str,
        late: Option<u64>,
        now_ms: u64,
    ) {
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        match std::mem::replace(&mut peer.state, State::Down) {
            State::Up(link) => {
                tracing::debug!(?shard, why, calls = link.sent.len(), "link ended");
                reactor.close(link.conn);
                peer.state = State::Closing { link, late };
            }
            State::Closing { link, late } => {
                peer.state = State::Closing { link, late };
                return;
            }
            State::Down | State::Resolving { .. } => {}
        }
        self.failed(shard, why, now_ms);
    }

    /// Counts a failure: the calls of the link that never left are told, the next one waits.
    fn failed(&mut self, shard: Key, why: &'static str, now_ms: u64) {
        let next = self.new_link();
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        if matches!(peer.state, State::Resolving { .. }) {
            peer.state = State::Down;
        }
        let pause = (PAUSE_MS << peer.failures.min(10)).min(PAUSE_MAX_MS);
        peer.failures = peer.failures.saturating_add(1);
        peer.retry_at_ms = now_ms + pause;
        let over = std::mem::replace(&mut peer.link, next);
        tracing::debug!(?shard, why, pause, "another core is not reached");
        let error = PeerError::Unreachable { retry_after_ms: pause as u32 };
        self.refuse_waiting(shard, Some(over), error);
    }

    fn refuse_waiting(&mut self, shard: Key, of: Option<LinkId>, why: PeerError) {
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        let link = of.unwrap_or(peer.link);
        for waiting in std::mem::take(&mut peer.waiting) {
            self.refuse(waiting.call, link, why);
        }
    }

    /// Ends links whose handshake or whose calls take too long.
    pub(super) fn expire(&mut self, reactor: &mut Reactor, now_ms: u64) {
        if now_ms < self.look_at_ms {
            return;
        }
        let mut next = u64::MAX;
        let mut late = Vec::new();
        for (shard, peer) in &self.peers {
            let (greeting, sent) = match &peer.state {
                State::Resolving { since_ms } => (since_ms + GREETING_MS, None),
                State::Up(link) => {
                    let greeting = match link.stage {
                        Stage::Ready => u64::MAX,
                        _ => link.opened_ms + GREETING_MS,
                    };
                    let first = link.sent.iter().min_by_key(|(_, s)| s.deadline_ms);
                    (greeting, first.map(|(id, s)| (*id, s.deadline_ms)))
                }
                State::Down | State::Closing { .. } => (u64::MAX, None),
            };
            let waiting = peer.waiting.iter().map(|w| w.deadline_ms).min().unwrap_or(u64::MAX);
            let at = greeting.min(sent.map_or(u64::MAX, |s| s.1)).min(waiting);
            if at > now_ms {
                next = next.min(at);
            } else {
                let call = sent.filter(|s| s.1 <= now_ms).map(|s| s.0);
                late.push((*shard, greeting <= now_ms || call.is_some(), call));
            }
        }
        self.look_at_ms = next;
        for (shard, link_is_late, call) in late {
            if link_is_late {
                self.end(reactor, shard, "it did not answer in time", call, now_ms);
            } else {
                self.expire_waiting(reactor, shard, now_ms);
            }
        }
    }

    /// Calls that never left are late. The attempt may go on, but their order is torn: all that wait go,
    /// and the link has another name from here on, so that none slips in behind a gap. On a link that
    /// stands, those that left keep it, so it ends.
    fn expire_waiting(&mut self, reactor: &mut Reactor, shard: Key, now_ms: u64) {
        let next = self.new_link();
        let Some(peer) = self.peers.get_mut(&shard) else { return };
        match &mut peer.state {
            State::Up(link) if matches!(link.stage, Stage::Ready) => {
                return self.end(reactor, shard, "it takes nothing in time", None, now_ms);
            }
            State::Up(link) => link.name = next,
            State::Down | State::Resolving { .. } | State::Closing { .. } => {}
        }
        let over = std::mem::replace(&mut peer.link, next);
        let retry_after_ms = PAUSE_MS as u32;
        self.refuse_waiting(shard, Some(over), PeerError::Unreachable { retry_after_ms });
    }
}
