//! Waking a sleeping core from another thread, and bounded mailboxes on top.
//!
//! A busy core costs a sender no system call: the eventfd is written only if the core sleeps. The
//! protocol, and why no wake-up is lost, is in [`flags`]; the eventfd is its bell.

mod flags;

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use flags::Flags;

struct Shared {
    flags: Flags,
    eventfd: EventFd,
}

/// Wakes one reactor from any thread: its next (or current) turn ends with
/// [`crate::Event::Woken`].
#[derive(Clone)]
pub struct Waker {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Waker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Waker")
    }
}

impl Waker {
    pub(crate) fn new() -> Result<Waker, Errno> {
        // Blocking on purpose: io_uring answers EAGAIN for a non-blocking descriptor where it
        // would otherwise wait. A write blocks only past 2^64 unread wake-ups.
        let eventfd = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
        Ok(Waker { shared: Arc::new(Shared { flags: Flags::new(), eventfd }) })
    }

    /// Makes the reactor come back from its sleep, or not fall asleep, with `Woken`. Cheap while
    /// it is awake. Does nothing once the reactor is gone.
    pub fn wake(&self) {
        if self.shared.flags.wake() {
            // The only failures are EINTR (retried) and a counter at its limit, which means that
            // a wake-up is already due.
            while let Err(Errno::EINTR) =
                nix::unistd::write(self.shared.eventfd.as_fd(), &1u64.to_ne_bytes())
            {}
        }
    }

    /// The core is about to sleep; `false` if it must not, because a wake-up is pending.
    pub(crate) fn park(&self) -> bool {
        self.shared.flags.park()
    }

    /// The core is awake again.
    pub(crate) fn unpark(&self) {
        self.shared.flags.unpark();
    }

    /// Takes the pending mark.
    pub(crate) fn take(&self) -> bool {
        self.shared.flags.take()
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.shared.eventfd.as_fd().as_raw_fd()
    }
}

/// A message that was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SendRefused<T> {
    /// The mailbox is full; wait and try again.
    #[error("the core's mailbox is full")]
    Full(T),
    /// The core dropped its mailbox.
    #[error("the core is gone")]
    Gone(T),
}

/// Sends messages to a core from any thread.
#[derive(Debug)]
pub struct MailSender<T> {
    queue: Sender<T>,
    waker: Waker,
}

impl<T> Clone for MailSender<T> {
    fn clone(&self) -> Self {
        MailSender { queue: self.queue.clone(), waker: self.waker.clone() }
    }
}

impl<T> MailSender<T> {
    /// Puts `message` into the mailbox and wakes the core. Never blocks.
    pub fn try_send(&self, message: T) -> Result<(), SendRefused<T>> {
        match self.queue.try_send(message) {
            Ok(()) => {
                self.waker.wake();
                Ok(())
            }
            Err(TrySendError::Full(m)) => Err(SendRefused::Full(m)),
            Err(TrySendError::Disconnected(m)) => Err(SendRefused::Gone(m)),
        }
    }
}

/// The core's end: on `Woken`, take messages until `None`.
#[derive(Debug)]
pub struct Mailbox<T> {
    queue: Receiver<T>,
}

impl<T> Mailbox<T> {
    /// The next message, if there is one now.
    pub fn try_recv(&self) -> Option<T> {
        self.queue.try_recv().ok()
    }
}

/// A bounded mailbox of `capacity` messages whose senders wake `waker`'s reactor.
pub fn mailbox<T>(capacity: usize, waker: Waker) -> (MailSender<T>, Mailbox<T>) {
    let (tx, rx) = bounded(capacity.max(1));
    (MailSender { queue: tx, waker }, Mailbox { queue: rx })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Sleeps as a reactor does, on the eventfd alone.
    fn sleep(waker: &Waker) {
        if waker.park() {
            let mut word = [0u8; 8];
            nix::unistd::read(&waker.shared.eventfd, &mut word).unwrap();
            waker.unpark();
        }
    }

    #[test]
    fn messages_of_other_threads_come_through_a_small_mailbox() {
        const SENDERS: usize = 2;
        let each = if cfg!(miri) { 10 } else { 2_000 };
        let waker = Waker::new().unwrap();
        let (tx, rx) = mailbox::<Box<usize>>(2, waker.clone());
        std::thread::scope(|s| {
            for _ in 0..SENDERS {
                let tx = tx.clone();
                s.spawn(move || {
                    for n in 0..each {
                        let mut message = Box::new(n);
                        while let Err(SendRefused::Full(back)) = tx.try_send(message) {
                            message = back;
                            std::thread::yield_now();
                        }
                    }
                });
            }
            let (mut taken, mut sum) = (0, 0);
            while taken < SENDERS * each {
                sleep(&waker);
                if waker.take() {
                    while let Some(message) = rx.try_recv() {
                        (taken, sum) = (taken + 1, sum + *message);
                    }
                }
            }
            assert_eq!(sum, SENDERS * each * (each - 1) / 2);
        });
        drop(rx);
        assert!(matches!(tx.try_send(Box::new(0)), Err(SendRefused::Gone(_))));
    }
}
