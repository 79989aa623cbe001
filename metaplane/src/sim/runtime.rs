//! The runtime of openraft in a simulated run: tokio's, but for two kinds of chance that no seed decides. Its dice are
//! derived from the run's seed, and those who wait for a watched value wake in the order in which they came (tokio
//! shuffles them).

#![allow(unreachable_pub)]

use openraft::async_runtime::watch;
use openraft::async_runtime::{AsyncRuntime, Watch, WatchReceiver, WatchSender};
use openraft::impls::TokioRuntime;
use openraft::{OptionalSend, OptionalSync};
use openraft_rt::deterministic_rng::DeterministicRng;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, watch as tokio_watch};

/// With dice.
pub type Seeded = DeterministicRng<Orderly>;

/// Without.
#[derive(Debug)]
pub struct Orderly(TokioRuntime);

impl AsyncRuntime for Orderly {
    type JoinError = <TokioRuntime as AsyncRuntime>::JoinError;
    type JoinHandle<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::JoinHandle<T>;
    type Sleep = <TokioRuntime as AsyncRuntime>::Sleep;
    type Instant = <TokioRuntime as AsyncRuntime>::Instant;
    type TimeoutError = <TokioRuntime as AsyncRuntime>::TimeoutError;
    type Timeout<R, T: Future<Output = R> + OptionalSend> =
        <TokioRuntime as AsyncRuntime>::Timeout<R, T>;
    type ThreadLocalRng = <TokioRuntime as AsyncRuntime>::ThreadLocalRng;
    type Mpsc = <TokioRuntime as AsyncRuntime>::Mpsc;
    type Watch = InOrder;
    type Oneshot = <TokioRuntime as AsyncRuntime>::Oneshot;
    type Mutex<T: OptionalSend + 'static> = <TokioRuntime as AsyncRuntime>::Mutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        TokioRuntime::spawn(future)
    }
    fn sleep(duration: Duration) -> Self::Sleep {
        TokioRuntime::sleep(duration)
    }
    fn sleep_until(deadline: Self::Instant) -> Self::Sleep {
        TokioRuntime::sleep_until(deadline)
    }
    fn timeout<R, F: Future<Output = R> + OptionalSend>(
        duration: Duration,
        future: F,
    ) -> Self::Timeout<R, F> {
        TokioRuntime::timeout(duration, future)
    }
    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(
        deadline: Self::Instant,
        future: F,
    ) -> Self::Timeout<R, F> {
        TokioRuntime::timeout_at(deadline, future)
    }
    fn is_panic(join_error: &Self::JoinError) -> bool {
        TokioRuntime::is_panic(join_error)
    }
    fn thread_rng() -> Self::ThreadLocalRng {
        TokioRuntime::thread_rng()
    }
    fn new(threads: usize) -> Self {
        Self(TokioRuntime::new(threads))
    }
    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.0.block_on(future)
    }
}

/// A watched value.
pub struct InOrder;

#[derive(Default)]
struct Shared {
    version: AtomicU64,
    closed: AtomicBool,
    changed: Notify,
}

/// While one of these is there, there is a sender.
struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::SeqCst);
        self.0.changed.notify_waiters();
    }
}

pub struct Sender<T> {
    value: tokio_watch::Sender<T>,
    open: Arc<Open>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self { value: self.value.clone(), open: Arc::clone(&self.open) }
    }
}

impl<T> Sender<T> {
    fn changed(&self) {
        let shared = &self.open.0;
        shared.version.fetch_add(1, Ordering::SeqCst);
        shared.changed.notify_waiters();
    }
}

pub struct Receiver<T> {
    value: tokio_watch::Receiver<T>,
    shared: Arc<Shared>,
    seen: u64,
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        let (value, shared) = (self.value.clone(), Arc::clone(&self.shared));
        Self { value, shared, seen: self.seen }
    }
}

impl Watch for InOrder {
    type Sender<T: OptionalSend + OptionalSync> = Sender<T>;
    type Receiver<T: OptionalSend + OptionalSync> = Receiver<T>;
    type Ref<'a, T: OptionalSend + 'a> = tokio_watch::Ref<'a, T>;

    fn channel<T: OptionalSend + OptionalSync>(init: T) -> (Sender<T>, Receiver<T>) {
        let shared = Arc::new(Shared::default());
        let (sender, value) = tokio_watch::channel(init);
        let receiver = Receiver { value, shared: Arc::clone(&shared), seen: 0 };
        (Sender { value: sender, open: Arc::new(Open(shared)) }, receiver)
    }
}

impl<T: OptionalSend + OptionalSync> WatchSender<InOrder, T> for Sender<T> {
    fn send(&self, value: T) -> Result<(), watch::SendError<T>> {
        self.value.send(value).map_err(|e| watch::SendError(e.0))?;
        self.changed();
        Ok(())
    }
    fn send_if_modified<F>(&self, modify: F) -> bool
    where
        F: FnOnce(&mut T) -> bool,
    {
        let modified = self.value.send_if_modified(modify);
        if modified {
            self.changed();
        }
        modified
    }
    fn borrow_watched(&self) -> tokio_watch::Ref<'_, T> {
        self.value.borrow()
    }
    fn subscribe(&self) -> Receiver<T> {
        let shared = Arc::clone(&self.open.0);
        let seen = shared.version.load(Ordering::SeqCst);
        Receiver { value: self.value.subscribe(), shared, seen }
    }
}

impl<T: OptionalSend + OptionalSync> WatchReceiver<InOrder, T> for Receiver<T> {
    async fn changed(&mut self) -> Result<(), watch::RecvError> {
        loop {
            let mut changed = std::pin::pin!(self.shared.changed.notified());
            changed.as_mut().enable();
            let version = self.shared.version.load(Ordering::SeqCst);
            if version != self.seen {
                self.seen = version;
                return Ok(());
            }
            if self.shared.closed.load(Ordering::SeqCst) {
                return Err(watch::RecvError(()));
            }
            changed.await;
        }
    }
    fn borrow_watched(&self) -> tokio_watch::Ref<'_, T> {
        self.value.borrow()
    }
    fn borrow_and_update(&mut self) -> tokio_watch::Ref<'_, T> {
        self.seen = self.shared.version.load(Ordering::SeqCst);
        self.value.borrow_and_update()
    }
}
