//! The two flags by which a sender and a core that falls asleep find each other.
//!
//! A sender publishes its message, sets `pending`, and rings the bell only if it finds `sleeping`
//! set. The core sets `sleeping`, *then* looks at `pending`, and sleeps only if it is clear.
//!
//! Why no wake-up is lost: [`Flags::wake`] and [`Flags::park`] touch `pending` with a
//! read-modify-write each, and those of one atomic have one order. Either the core's comes second
//! and finds the flag set, or the sender's comes second, synchronises with the core's, and so finds
//! `sleeping` set, or cleared by a sender that rings. There is a second reason why a sender does not
//! just store: the core's [`Flags::take`] must synchronise with every sender whose message it is
//! about to look for, and only a chain of read-modify-writes reaches back past the last one.
//!
//! loom runs the protocol through every interleaving and every value that the memory model lets a
//! load see (`scripts/prove`). It takes sequentially consistent accesses for acquire and release,
//! and does not know where a plain store stands among the read-modify-writes of others; so there are
//! neither, and what it proves is what runs. Each ordering is needed: with any of them weaker, with
//! the two steps of either side exchanged, or with a store or load in the place of a
//! read-modify-write of `pending`, it finds a core that sleeps for ever.

#[cfg(all(loom, test))]
use loom::sync::atomic::AtomicBool;
#[cfg(not(all(loom, test)))]
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

/// `pending` and `sleeping` of one core.
#[derive(Debug)]
pub(super) struct Flags {
    pending: AtomicBool,
    sleeping: AtomicBool,
}

impl Flags {
    pub(super) fn new() -> Flags {
        Flags { pending: AtomicBool::new(false), sleeping: AtomicBool::new(false) }
    }

    /// After a message was published: `true` if the core sleeps and the caller must ring.
    #[must_use]
    pub(super) fn wake(&self) -> bool {
        self.pending.swap(true, AcqRel);
        // A plain load first: the core is mostly awake. It can't be older than what was seen above.
        self.sleeping.load(Relaxed) && self.sleeping.swap(false, Relaxed)
    }

    /// The core is about to sleep; `false` if it must not, because a wake-up is pending.
    #[must_use]
    pub(super) fn park(&self) -> bool {
        self.sleeping.swap(true, Relaxed);
        // Changes nothing, but takes a place in the order of `pending`, which a load does not.
        if self.pending.fetch_or(false, Release) {
            self.unpark();
            return false;
        }
        true
    }

    /// The core is awake again.
    pub(super) fn unpark(&self) {
        // Seen late, it costs a sender one bell too many.
        self.sleeping.swap(false, Relaxed);
    }

    /// Takes the pending mark; what was published before it was set can then be seen.
    #[must_use]
    pub(super) fn take(&self) -> bool {
        // A plain load first: the common case is "nothing", and it needs no exclusive cache line.
        self.pending.load(Relaxed) && self.pending.swap(false, Acquire)
    }
}

#[cfg(all(loom, test))]
mod tests {
    use std::sync::atomic::{AtomicUsize as Count, Ordering::SeqCst};

    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;
    use loom::thread::{self, Thread};

    use super::*;

    struct Shared {
        flags: Flags,
        /// Messages published by each sender. Relaxed: that they are seen is up to the flags.
        published: Vec<AtomicUsize>,
    }

    impl Shared {
        /// In the eventfd's place: a thread's token, which is kept until the thread parks.
        fn send(&self, sender: usize, messages: usize, core: &Thread) {
            for n in 1..=messages {
                self.published[sender].store(n, Relaxed);
                if self.flags.wake() {
                    core.unpark();
                }
            }
        }

        /// As `Reactor::turn` does it, until `want` messages were taken: the mailboxes are looked
        /// at only after `take` said so. Parked for ever is what loom calls a deadlock.
        fn run_core(&self, want: usize) {
            let mut taken = 0;
            while taken < want {
                if self.flags.park() {
                    thread::park();
                    self.flags.unpark();
                }
                if self.flags.take() {
                    taken = self.published.iter().map(|p| p.load(Relaxed)).sum();
                }
            }
        }
    }

    /// Runs a core with `senders` of `messages` each, the first of them loom's main thread, in every
    /// interleaving with up to so many preemptions (of any number with EBB_PROVE=all).
    fn explore(senders: usize, messages: usize, preemptions: Option<usize>) {
        let all = std::env::var("EBB_PROVE").is_ok_and(|v| v == "all");
        let preemptions = preemptions.filter(|_| !all);
        static RUNS: Count = Count::new(0);
        RUNS.store(0, SeqCst);
        let mut model = loom::model::Builder::new();
        model.preemption_bound = preemptions;
        model.check(move || {
            RUNS.fetch_add(1, SeqCst);
            let published = (0..senders).map(|_| AtomicUsize::new(0)).collect();
            let shared = Arc::new(Shared { flags: Flags::new(), published });
            let core = {
                let shared = shared.clone();
                thread::spawn(move || shared.run_core(senders * messages))
            };
            let core = core.thread().clone();
            for id in 1..senders {
                let (shared, core) = (shared.clone(), core.clone());
                thread::spawn(move || shared.send(id, messages, &core));
            }
            shared.send(0, messages, &core);
        });
        let (runs, bound) =
            (RUNS.load(SeqCst), preemptions.map_or("all".into(), |n| n.to_string()));
        println!("senders {senders}, messages {messages}, preemptions {bound}: {runs} executions");
        assert!(runs > senders, "nothing was explored");
    }

    #[test]
    fn a_message_published_as_the_core_falls_asleep_is_taken() {
        explore(1, 1, None);
        explore(1, 2, Some(4));
    }

    #[test]
    fn two_senders_wake_a_core_in_every_interleaving() {
        explore(2, 1, Some(3));
    }

    #[test]
    fn a_core_falls_asleep_again_and_again_and_misses_nothing() {
        explore(2, 2, Some(2));
    }
}
