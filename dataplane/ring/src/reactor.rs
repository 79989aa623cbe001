//! The reactor: the turn, the dispatch of completions, and the drain at the end.
//!
//! One turn: start the sends that are due, push every runnable operation, enter the kernel once
//! (submit, and sleep if nothing is ready), take all completions, hand out events. When answers are
//! about to be sent, urgent device operations are submitted by an enter of their own before them.
//! Completions are handled in a flat loop: nothing here calls back into the caller.

use std::collections::VecDeque;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

use io_uring::{cqueue, opcode, squeue};
use nix::errno::Errno;

use crate::accept::Listener;
use crate::arena::Arena;
use crate::config::Config;
use crate::conn::{Conn, ConnId};
use crate::connect::{connect_entry, limit_entry};
use crate::disk::FileSlot;
use crate::error::{SetupError, SetupWarning, TurnError};
use crate::event::{CloseReason, Event};
use crate::op::{self, Cancel, FixedTable, Live, Op};
use crate::ring::{Cqe, Entered, Ring};
use crate::send::send_entry;
use crate::setup;
use crate::slab::{Key, Slab};
use crate::wake::Waker;

/// EAGAIN and EINTR are retried this often before they count as an answer.
const RETRIES_MAX: u16 = 1000;
/// How long shutdown waits for the last completion before it aborts the process.
const DRAIN_MAX: Duration = Duration::from_secs(5);

/// Counters since the reactor was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Turns taken.
    pub turns: u64,
    /// Operations submitted to the kernel, continuations included.
    pub submitted: u64,
    /// Completions taken.
    pub completed: u64,
    /// Short transfers continued.
    pub continued: u64,
    /// EAGAIN or EINTR retried.
    pub retried: u64,
    /// Times the kernel asked for completions to be taken first.
    pub busy: u64,
    /// Waits that began without a sleep.
    pub spins: u64,
    /// Waits that were over before a sleep.
    pub spun: u64,
    /// Connections closed as they were accepted.
    pub conns_refused: u64,
    /// Completions for an operation that is not alive; always 0 unless there is a bug.
    pub stale: u64,
}

/// One core's proactor. Lives and dies on the thread that made it; the compiler sees to that:
///
/// ```compile_fail
/// fn needs_send<T: Send>() {}
/// needs_send::<ebb_ring::Reactor>();
/// ```
pub struct Reactor {
    // The ring is dropped first: after it nothing can be in flight.
    pub(crate) ring: Ring,
    ops: Slab<Live>,
    /// Operations to push, oldest first.
    pub(crate) runnable: VecDeque<Key>,
    pub(crate) files: Slab<FileSlot>,
    pub(crate) conns: Slab<Conn>,
    pub(crate) listeners: Slab<Listener>,
    pub(crate) listeners_paused: bool,
    pub(crate) send_ready: Vec<Key>,
    /// A zero-copy send met the memlock limit; none is tried again.
    pub(crate) zc_refused: bool,
    /// Events not handed out yet.
    pub(crate) ready: Vec<Event>,
    cqes: Vec<Cqe>,
    pub(crate) table: FixedTable,
    pub(crate) disk_in_flight: u32,
    /// A device operation waits for submission that goes before sends.
    pub(crate) urgent: bool,
    pub(crate) stopping: bool,
    /// What the last wait was for came within `spin_us`.
    soon: bool,
    arena: Arena,
    waker: Waker,
    pub(crate) cfg: Config,
    pub(crate) stats: Stats,
    warnings: Vec<SetupWarning>,
    /// The ring is bound to its thread (SINGLE_ISSUER, registered ring descriptor).
    _thread_bound: PhantomData<*const ()>,
}

impl Reactor {
    /// Builds a reactor on the calling thread, which must be the one that drives it.
    pub fn new(cfg: Config) -> Result<Reactor, SetupError> {
        Reactor::from_rung(cfg, 0)
    }

    fn from_rung(cfg: Config, first: usize) -> Result<Reactor, SetupError> {
        let built = setup::build(&cfg, first)?;
        let waker = Waker::new().map_err(|errno| SetupError::Os {
            what: "making the wake-up eventfd",
            source: errno.into(),
        })?;
        let table =
            FixedTable { listeners_at: cfg.files_max, conns_at: cfg.files_max + cfg.listeners_max };
        let mut reactor = Reactor {
            ring: built.ring,
            ops: Slab::new(cfg.ops_max()),
            runnable: VecDeque::with_capacity(cfg.entries as usize),
            files: Slab::new(cfg.files_max),
            conns: Slab::new(cfg.conns_max),
            listeners: Slab::new(cfg.listeners_max),
            listeners_paused: false,
            send_ready: Vec::new(),
            zc_refused: false,
            ready: Vec::new(),
            cqes: Vec::with_capacity(cfg.entries as usize * 4),
            table,
            disk_in_flight: 0,
            urgent: false,
            stopping: false,
            soon: false,
            arena: built.arena,
            waker,
            cfg,
            stats: Stats::default(),
            warnings: built.warnings,
            _thread_bound: PhantomData,
        };
        let armed = reactor.start(Op::Wake { word: Box::new([0; 8]) });
        debug_assert!(armed.is_ok());
        Ok(reactor)
    }

    /// What works less well than it could on this machine.
    pub fn warnings(&self) -> &[SetupWarning] {
        &self.warnings
    }

    /// The buffers of this core.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Whether device I/O uses registered buffers.
    pub fn arena_is_registered(&self) -> bool {
        self.ring.fixed_buffers
    }

    /// A handle that wakes this reactor from any thread.
    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// Device operations in flight or waiting to be submitted.
    pub fn disk_ops(&self) -> u32 {
        self.disk_in_flight
    }

    /// Connections alive, closing ones included.
    pub fn conns(&self) -> usize {
        self.conns.len()
    }

    /// Puts an operation into the slab and in line for submission; `Err(op)` when full.
    pub(crate) fn start(&mut self, op: Op) -> Result<Key, Op> {
        match self.ops.insert(Live { op: Some(op), retries: 0 }) {
            Ok(key) => {
                self.runnable.push_back(key);
                Ok(key)
            }
            Err(Live { op: Some(op), .. }) => Err(op),
            Err(_) => unreachable!("the operation was put in above"),
        }
    }

    /// Puts an operation into the slab that goes to the kernel with another.
    pub(crate) fn hold(&mut self, op: Op) -> Option<Key> {
        self.ops.insert(Live { op: Some(op), retries: 0 }).ok()
    }

    /// Takes an operation out that never got to the kernel.
    pub(crate) fn retire(&mut self, key: Key) {
        self.ops.remove(key);
    }

    pub(crate) fn clear_fixed(&mut self, index: u32) {
        // It fails only for an index outside the table. An entry left behind keeps its file open
        // until the next tenant replaces it.
        let cleared = self.ring.set_file(index, -1);
        debug_assert!(cleared.is_ok());
    }

    /// One turn: submits what was asked for, waits for a completion at most for `timeout` (`None`:
    /// for ever; zero: not at all), and appends what happened to `events`. Does not wait when
    /// `events` is not empty or something is ready. May come back with nothing: the caller looks
    /// at its clock and takes the next turn.
    pub fn turn(
        &mut self,
        timeout: Option<Duration>,
        events: &mut Vec<Event>,
    ) -> Result<(), TurnError> {
        self.stats.turns += 1;
        let resume = self.resume_listeners();
        let timeout = match (timeout, resume) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        if std::mem::take(&mut self.urgent) && !self.send_ready.is_empty() {
            // Durable writes and long reads begin before answers go out: the kernel holds device operations back until all
            // that is submitted with them was started, and a send does its work right there.
            self.pump();
            if matches!(self.ring.enter(0, None).map_err(TurnError::Enter)?, Entered::Busy) {
                self.stats.busy += 1;
            }
        }
        self.flush_sends();
        self.submit_all()?;
        if self.waker.take() {
            self.ready.push(Event::Woken);
        }
        let idle = events.is_empty()
            && self.ready.is_empty()
            && self.cqes.is_empty()
            && self.runnable.is_empty()
            && timeout != Some(Duration::ZERO);
        let mut timeout = timeout;
        let idle = idle && !self.spin(&mut timeout).map_err(TurnError::Enter)?;
        // Order matters: announce the sleep, then look for a wake-up once more (see `wake`).
        let sleep = idle && self.waker.park();
        let asleep = (sleep && self.cfg.spin_us > 0).then(Instant::now);
        let entered = self.ring.enter(u32::from(sleep), timeout);
        if sleep {
            self.waker.unpark();
        }
        if let Some(asleep) = asleep {
            self.soon = asleep.elapsed() <= self.spin_limit() && self.ring.has_completions();
        }
        match entered.map_err(TurnError::Enter)? {
            Entered::Done => {}
            Entered::Busy => self.stats.busy += 1,
        }
        self.handle_completions();
        if self.waker.take() {
            self.ready.push(Event::Woken);
        }
        events.append(&mut self.ready);
        Ok(())
    }

    fn spin_limit(&self) -> Duration {
        Duration::from_micros(self.cfg.spin_us.into())
    }

    /// Submits what is queued and looks for what comes of it, for at most `spin_us`, if what the last wait was for
    /// came as soon as that: a sleep and its end can cost more than the wait. `true` if there is something to handle;
    /// else the time is taken off `timeout`. Who has nothing to do waits long, and so sleeps at once.
    fn spin(&mut self, timeout: &mut Option<Duration>) -> Result<bool, Errno> {
        if self.cfg.spin_us == 0 || !self.soon {
            return Ok(false);
        }
        self.stats.spins += 1;
        let begin = Instant::now();
        let limit = timeout.map_or(self.spin_limit(), |t| t.min(self.spin_limit()));
        if matches!(self.ring.enter(0, None)?, Entered::Busy) {
            self.stats.busy += 1;
            return Ok(true);
        }
        loop {
            if self.waker.take() {
                self.ready.push(Event::Woken);
                break;
            }
            if self.ring.has_completions() {
                break;
            }
            if begin.elapsed() >= limit {
                self.soon = false;
                *timeout = timeout.map(|t| t.saturating_sub(limit));
                return Ok(false);
            }
            std::hint::spin_loop();
        }
        self.stats.spun += 1;
        Ok(true)
    }

    /// Submits the device operations asked for so far, ahead of the turn: for those that somebody waits for while
    /// the caller has other work. What cannot be submitted now is in the next turn.
    pub fn kick(&mut self) {
        self.urgent = false;
        self.pump();
        if !matches!(self.ring.enter(0, None), Ok(Entered::Done)) {
            self.stats.busy += 1;
        }
    }

    /// Pushes everything runnable, entering in between when the submission queue is full.
    fn submit_all(&mut self) -> Result<(), TurnError> {
        loop {
            self.pump();
            if self.runnable.is_empty() {
                return Ok(());
            }
            match self.ring.enter(0, None).map_err(TurnError::Enter)? {
                Entered::Done => self.ring.reap(&mut self.cqes),
                Entered::Busy => {
                    // Completions must be taken first; the turn goes on to do so.
                    self.stats.busy += 1;
                    return Ok(());
                }
            }
        }
    }

    /// Moves runnable operations into the submission queue until it is full.
    fn pump(&mut self) {
        while let Some(&key) = self.runnable.front() {
            let limit = self.limit_of(key);
            if self.must_cancel(key) {
                self.runnable.pop_front();
                self.complete(key, -libc::ECANCELED, 0);
                if let Some(limit) = limit {
                    self.complete(limit, -libc::ECANCELED, 0);
                }
                continue;
            }
            let first = self.entry(key).user_data(key.to_bits());
            let pair;
            let entries = match limit {
                None => std::slice::from_ref(&first),
                Some(limit) => {
                    pair = [first, self.entry(limit).user_data(limit.to_bits())];
                    &pair[..]
                }
            };
            // SAFETY: everything the entries point at is owned by the operations in the slab (a
            // buffer, segments, iovecs, a word or a time) or by their connection (the sendmsg scratch), on the
            // heap or in the arena. Neither is touched, moved or freed before the operation's
            // completion: safe code has no handle to it, connections outlive their operations
            // (`in_flight`), and drop drains the ring before it frees anything.
            if !unsafe { self.ring.push(entries) } {
                return;
            }
            self.stats.submitted += entries.len() as u64;
            self.runnable.pop_front();
        }
    }

    /// The operation that follows `key` as its link.
    fn limit_of(&self, key: Key) -> Option<Key> {
        match self.ops.get(key).and_then(|live| live.op.as_ref()) {
            Some(Op::Connect(c)) => Some(c.limit),
            _ => None,
        }
    }

    /// Whether an operation that is not in the kernel must not get there any more.
    fn must_cancel(&self, key: Key) -> bool {
        let Some(op) = self.ops.get(key).and_then(|live| live.op.as_ref()) else { return true };
        match op {
            Op::Cancel(_) => false,
            _ if self.stopping => true,
            Op::Recv(r) => self.is_closing(r.conn),
            Op::Send(s) => self.is_closing(s.conn),
            Op::Connect(c) => self.is_closing(c.conn),
            Op::ConnectLimit(l) => self.is_closing(l.conn),
            Op::Accept { listener } => self.is_listener_closing(*listener),
            Op::Read(_) | Op::Write(_) | Op::Sync { .. } | Op::Wake { .. } => false,
        }
    }

    pub(crate) fn entry(&mut self, key: Key) -> squeue::Entry {
        let table = self.table;
        let op = self.ops.get_mut(key).and_then(|live| live.op.as_mut());
        match op {
            Some(Op::Read(r)) => op::read_entry(r, &self.ring, &self.arena, table),
            Some(Op::Write(w)) => op::write_entry(w, &self.ring, &self.arena, table),
            Some(Op::Sync { file, .. }) => op::sync_entry(*file, table),
            Some(Op::Recv(r)) => op::recv_entry(r, table),
            Some(Op::Send(s)) => match self.conns.get_mut(s.conn) {
                Some(conn) => send_entry(s.conn, conn, s.zero_copy, table),
                // `must_cancel` has ruled this out.
                None => opcode::Nop::new().build(),
            },
            Some(Op::Accept { listener }) => op::accept_entry(*listener, table),
            Some(Op::Connect(c)) => connect_entry(c, table),
            Some(Op::ConnectLimit(l)) => limit_entry(l),
            Some(Op::Wake { word }) => op::wake_entry(word, self.waker.fd()),
            Some(Op::Cancel(target)) => op::cancel_entry(*target, table),
            None => opcode::Nop::new().build(),
        }
    }

    fn handle_completions(&mut self) {
        self.ring.reap(&mut self.cqes);
        let mut cqes = std::mem::take(&mut self.cqes);
        for cqe in cqes.drain(..) {
            self.stats.completed += 1;
            self.complete(Key::from_bits(cqe.user_data), cqe.res, cqe.flags);
        }
        self.cqes = cqes;
    }

    /// Handles one completion of one operation; retires the operation at its last.
    pub(crate) fn complete(&mut self, key: Key, res: i32, flags: u32) {
        let more = cqueue::more(flags);
        let notif = cqueue::notif(flags);
        let stopping = self.stopping;
        let Some(live) = self.ops.get_mut(key) else {
            self.stats.stale += 1;
            debug_assert!(false, "completion of an operation that is not alive");
            return;
        };
        let retry = matches!(Errno::from_raw(-res), Errno::EAGAIN | Errno::EINTR)
            && !more
            && !notif
            && !stopping
            && live.retries < RETRIES_MAX;
        let simple = matches!(
            live.op,
            Some(Op::Read(_) | Op::Write(_) | Op::Sync { .. } | Op::Recv(_) | Op::Wake { .. })
        );
        if retry && simple {
            live.retries += 1;
            self.stats.retried += 1;
            self.runnable.push_back(key);
            return;
        }
        let Some(op) = live.op.take() else { return };
        let keep = match op {
            Op::Read(r) => self.read_done(key, r, res),
            Op::Write(w) => self.write_done(key, w, res),
            Op::Sync { file, token } => {
                self.sync_done(key, file, token, res);
                None
            }
            Op::Recv(r) => self.recv_done(key, r, res),
            Op::Send(s) => self.send_done(s, res, more, notif),
            Op::Accept { listener } => self.accept_done(key, listener, res, more),
            Op::Connect(c) => {
                self.connect_done(&c, res);
                None
            }
            Op::ConnectLimit(l) => {
                // ETIME when it struck: the attempt's own completion says so.
                self.end_conn_op(l.conn);
                None
            }
            Op::Wake { word } if !stopping => {
                self.runnable.push_back(key);
                Some(Op::Wake { word })
            }
            Op::Wake { .. } => None,
            Op::Cancel(target) => {
                match target {
                    Cancel::Conn(conn) => self.end_conn_op(conn),
                    Cancel::Listener(listener) => self.end_listener_op(listener),
                    Cancel::All => {}
                }
                None
            }
        };
        match keep {
            Some(op) => {
                if let Some(live) = self.ops.get_mut(key) {
                    live.op = Some(op);
                }
            }
            None => {
                debug_assert!(!more);
                self.ops.remove(key);
            }
        }
    }

    /// Cancels everything, waits for the last completion, and appends the final events, which give
    /// all buffers back. Aborts the process if the kernel does not finish within five seconds.
    pub fn shutdown(mut self, events: &mut Vec<Event>) {
        self.drain();
        events.append(&mut self.ready);
    }

    fn drain(&mut self) {
        self.stopping = true;
        for key in self.conns.keys() {
            self.begin_close(key, CloseReason::Asked);
        }
        for key in self.listeners.keys() {
            self.close_listener(crate::ListenerId(key));
        }
        let deadline = Instant::now() + DRAIN_MAX;
        let mut cancel_at = Instant::now();
        while self.ops.len() > 0 {
            let now = Instant::now();
            if now >= deadline {
                // Freeing memory that a device may still write to would corrupt it silently.
                eprintln!(
                    "ebb-ring: {} operations still in flight after {DRAIN_MAX:?}; aborting",
                    self.ops.len()
                );
                std::process::abort();
            }
            if now >= cancel_at {
                // Again from time to time: an operation may have been between two states.
                cancel_at = now + Duration::from_millis(100);
                let _ = self.start(Op::Cancel(Cancel::All));
            }
            // A failing enter leaves the deadline to decide.
            let _ = self.submit_all();
            if self.ops.len() == 0 {
                break;
            }
            let _ = self.ring.enter(1, Some(Duration::from_millis(20)));
            self.handle_completions();
        }
        debug_assert!(self.conns.len() == 0 && self.disk_in_flight == 0);
    }

    /// Ids of all connections alive.
    pub fn conn_ids(&self) -> Vec<ConnId> {
        self.conns.keys().into_iter().map(ConnId).collect()
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.drain();
    }
}

impl std::fmt::Debug for Reactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reactor")
            .field("ops", &self.ops.len())
            .field("conns", &self.conns.len())
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buf, Token};

    /// What an older kernel gets: the same work on fewer flags.
    #[test]
    fn every_rung_of_the_ladder_works() {
        for rung in 0..3 {
            let cfg = Config { arena_bytes: 40 << 20, conns_max: 8, ..Config::default() };
            let mut reactor = Reactor::from_rung(cfg, rung).unwrap();
            let lost = |w: &SetupWarning| matches!(w, SetupWarning::FewerFlags { .. });
            assert_eq!(reactor.warnings().iter().any(lost), rung > 0);
            let (_, addr) = reactor.listen("127.0.0.1:0".parse().unwrap()).unwrap();
            let waker = reactor.waker();
            let client = std::thread::spawn(move || {
                use std::io::{Read, Write};
                let mut stream = std::net::TcpStream::connect(addr).unwrap();
                stream.write_all(b"ping").unwrap();
                let mut got = [0; 4];
                stream.read_exact(&mut got).unwrap();
                waker.wake();
                got
            });
            let (mut sent, mut woken) = (false, false);
            let mut events = Vec::new();
            while !(sent && woken) {
                let started = Instant::now();
                reactor.turn(Some(Duration::from_secs(10)), &mut events).unwrap();
                assert!(started.elapsed() < Duration::from_secs(10), "rung {rung} hangs");
                for event in events.drain(..) {
                    match event {
                        Event::Accepted { conn, .. } => {
                            reactor.recv_exact(conn, Token(0), Buf::unpooled(4), 0..4).unwrap()
                        }
                        Event::Received { conn, buf, result, .. } => {
                            assert_eq!(result, Ok(4));
                            reactor.send(conn, Token(0), buf[..4].to_vec()).unwrap();
                        }
                        Event::Sent { result, .. } => {
                            assert_eq!(result, Ok(()));
                            sent = true;
                        }
                        Event::Woken => woken = true,
                        other => panic!("{other:?}"),
                    }
                }
            }
            assert_eq!(&client.join().unwrap(), b"ping");
            reactor.shutdown(&mut events);
        }
    }
}
