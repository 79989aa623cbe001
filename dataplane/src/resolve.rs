//! Looks up the addresses of nodes that are known by a name, outside the rings' threads.
//!
//! A look-up blocks in the system's resolver for as long as that likes; at most a few threads do so at
//! once, and a core that asks while the queue is full is told so (I9). No answer is kept: a link that is
//! made again asks again, so that a name may move.

use crate::mover::Mailboxes;
use crate::reactor_glue::Mail;
use ebb_ring::SendRefused;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};

/// Names that wait.
const QUEUE_MAX: usize = 64;
/// Look-ups at once.
const LOOKUPS_MAX: usize = 4;
/// Pause while a core's mailbox is full.
const FULL_PAUSE: Duration = Duration::from_millis(2);

/// A core's way to the resolver.
#[derive(Debug)]
pub(crate) struct ResolveSender {
    core: usize,
    queue: mpsc::Sender<(usize, String)>,
}

impl ResolveSender {
    /// Asks for the address of a name; `false` when too many are asked for.
    pub(crate) fn try_send(&self, host: &str) -> bool {
        self.queue.try_send((self.core, host.to_owned())).is_ok()
    }
}

/// Names on their way to the resolver.
pub(crate) type ResolveQueue = mpsc::Receiver<(usize, String)>;

/// The queue, with one sender per core.
pub(crate) fn queue(cores: usize) -> (Vec<ResolveSender>, ResolveQueue) {
    let (tx, rx) = mpsc::channel(QUEUE_MAX);
    let senders = (0..cores).map(|core| ResolveSender { core, queue: tx.clone() }).collect();
    (senders, rx)
}

/// Looks names up until every core is gone.
pub(crate) async fn run(mut names: ResolveQueue, mailboxes: Mailboxes) {
    let slots = Arc::new(Semaphore::new(LOOKUPS_MAX));
    while let Some((core, host)) = names.recv().await {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let mailboxes = Arc::clone(&mailboxes);
        tokio::spawn(async move {
            let name = host.clone();
            let found = tokio::task::spawn_blocking(move || {
                let ip = look_up(&name);
                // Held for as long as the thread is: those who gave up on it do not free it.
                drop(slot);
                ip
            });
            let ip = found.await.unwrap_or_default();
            deliver(&mailboxes, core, host, ip).await;
        });
    }
}

fn look_up(host: &str) -> Option<IpAddr> {
    match (host, 0).to_socket_addrs() {
        Ok(mut found) => found.next().map(|a| a.ip()),
        Err(error) => {
            tracing::warn!(host, %error, "a node's name has no address");
            None
        }
    }
}

async fn deliver(mailboxes: &Mailboxes, core: usize, host: String, ip: Option<IpAddr>) {
    let Some(mailbox) = mailboxes.get().and_then(|m| m.get(core)) else { return };
    let mut mail = Mail::Resolved { host, ip };
    loop {
        match mailbox.try_send(mail) {
            Ok(()) | Err(SendRefused::Gone(_)) => return,
            Err(SendRefused::Full(back)) => mail = back,
        }
        tokio::time::sleep(FULL_PAUSE).await;
    }
}
