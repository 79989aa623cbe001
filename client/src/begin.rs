//! Work that begins on the thread that asks for it, and goes on as a task of the runtime.
//!
//! A FUSE thread is not a worker of the runtime. Handing work that has to wait for an answer to the
//! runtime at once would wake a worker only to find that there is nothing to do yet. So it stays aside
//! until it is woken, which happens on the worker that read the answer, and goes on there.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use tokio::runtime::Handle;

type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

enum State {
    /// Being polled by the thread that began it.
    Beginning,
    /// Woken during that poll.
    Woken,
    /// Has to wait for a wake.
    Aside(Work),
    /// Done, or a task of the runtime: that has wakers of its own.
    Gone,
}

struct Begun {
    runtime: Handle,
    state: Mutex<State>,
}

impl Begun {
    /// Sets the state to what it becomes, and says what it was.
    fn change(&self, to: impl FnOnce(&State) -> State) -> State {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let next = to(&state);
        std::mem::replace(&mut state, next)
    }
}

impl Wake for Begun {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let was = self.change(|state| match state {
            State::Beginning | State::Woken => State::Woken,
            State::Aside(_) | State::Gone => State::Gone,
        });
        if let State::Aside(work) = was {
            // Its first poll there replaces every waker that it left behind.
            self.runtime.spawn(work);
        }
    }
}

/// Polls `work` here and now; if it has to wait, it goes on as a task of the runtime once it is woken.
pub fn begin(runtime: &Handle, work: impl Future<Output = ()> + Send + 'static) {
    let _entered = runtime.enter();
    let mut work: Work = Box::pin(work);
    let begun = Arc::new(Begun { runtime: runtime.clone(), state: Mutex::new(State::Beginning) });
    let waker = Waker::from(Arc::clone(&begun));
    if let Poll::Ready(()) = work.as_mut().poll(&mut Context::from_waker(&waker)) {
        begun.change(|_| State::Gone);
        return;
    }
    let mut work = Some(work);
    begun.change(|state| match state {
        State::Beginning => work.take().map_or(State::Gone, State::Aside),
        _ => State::Gone,
    });
    if let Some(work) = work {
        runtime.spawn(work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;
    use tokio::sync::{mpsc, oneshot};

    #[test]
    fn what_need_not_wait_is_done_at_once() {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let done = Arc::new(AtomicUsize::new(0));
        let told = Arc::clone(&done);
        begin(runtime.handle(), async move {
            told.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 1);
    }

    /// Wakes at every moment: during the first poll, between it and its end, later; once and twice.
    #[test]
    fn no_wake_is_lost_whenever_it_comes() {
        const REQUESTS: usize = 20_000;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let (done, mut all) = mpsc::unbounded_channel();
        let (give, answers) = std::sync::mpsc::channel::<oneshot::Sender<u32>>();
        let answering = std::thread::spawn(move || {
            let mut rng = StdRng::seed_from_u64(7);
            for tx in answers {
                for _ in 0..rng.random_range(0..300) {
                    std::hint::spin_loop();
                }
                let _ = tx.send(1);
            }
        });
        for n in 0..REQUESTS {
            let (first, answer) = oneshot::channel();
            let (second, other) = oneshot::channel();
            let (give, done) = (give.clone(), done.clone());
            begin(runtime.handle(), async move {
                let _ = give.send(first);
                if n % 3 == 0 {
                    let _ = give.send(second);
                    let both = tokio::join!(answer, other);
                    assert_eq!(both, (Ok(1), Ok(1)));
                } else {
                    assert_eq!(answer.await, Ok(1));
                    let _ = give.send(second);
                    assert_eq!(other.await, Ok(1));
                }
                let _ = done.send(n);
            });
        }
        drop((give, done));
        let ended = runtime.block_on(async {
            let mut ended = 0;
            let limit = Duration::from_secs(60);
            while let Ok(Some(_)) = tokio::time::timeout(limit, all.recv()).await {
                ended += 1;
            }
            ended
        });
        assert_eq!(ended, REQUESTS);
        answering.join().expect("no panic");
    }
}
