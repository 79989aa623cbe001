//! The network: delays, losses, duplicates, cut links in one direction or both, nodes that stand still. A message
//! overtakes another; a request whose answer is lost was carried out all the same.

use super::dice::Dice;
use super::world::{Life, World};
use crate::raft::dial::{Dial, Line};
use bytes::Bytes;
use ebb_dataplane_protocol::{Header, Status};
use ebb_rpc::{Frame, RpcError};
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How the network is at the moment. Ends are voters' ids; clients have larger ones.
#[derive(Debug)]
pub(super) struct Weather {
    /// From, to.
    pub(super) cut: BTreeSet<(u64, u64)>,
    pub(super) loss: f64,
    pub(super) duplicates: f64,
    /// The longest way.
    pub(super) delay_ms: u64,
    /// Who stands still, until then.
    pub(super) still: BTreeMap<u64, Instant>,
}

impl Default for Weather {
    fn default() -> Self {
        let (cut, still) = (BTreeSet::new(), BTreeMap::new());
        Self { cut, loss: 0.0, duplicates: 0.0, delay_ms: 3, still }
    }
}

pub(super) struct Net {
    dice: Dice,
    weather: Mutex<Weather>,
}

impl Net {
    pub(super) fn new(dice: Dice) -> Self {
        Self { dice, weather: Mutex::default() }
    }
    pub(super) fn weather(&self) -> MutexGuard<'_, Weather> {
        self.weather.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn wake(&self, end: u64) {
        loop {
            let until = self.weather().still.get(&end).copied().filter(|at| *at > Instant::now());
            let Some(until) = until else { return };
            tokio::time::sleep_until(until).await;
        }
    }

    /// One way. Does not return if the message is lost.
    async fn hop(&self, world: &World, from: u64, to: u64) {
        self.wake(from).await;
        let (lost, ms) = {
            let w = self.weather();
            // Some take much longer than others.
            let most = if self.dice.chance(0.05) { w.delay_ms * 8 } else { w.delay_ms };
            (w.cut.contains(&(from, to)) || self.dice.chance(w.loss), self.dice.below(most + 1))
        };
        tokio::time::sleep(Duration::from_millis(ms)).await;
        if lost || self.weather().cut.contains(&(from, to)) {
            world.count("lost messages");
            std::future::pending::<()>().await;
        }
        self.wake(to).await;
    }

    /// A request and its answer. The request is carried out on a task of its own, perhaps twice. `None`: the
    /// other end is gone.
    pub(super) async fn exchange<T, F>(
        &self,
        world: &Arc<World>,
        (from, to): (u64, u64),
        there: &Arc<Life>,
        does: impl Fn() -> F,
    ) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        self.hop(world, from, to).await;
        let odds = self.weather().duplicates;
        if self.dice.chance(odds) {
            world.count("duplicates");
            let (late, ms) = (does(), self.dice.below(400));
            let life = Arc::clone(there);
            self.dice.spawn(async move {
                tokio::time::sleep(Duration::from_millis(ms)).await;
                if life.power.is_on() {
                    late.await;
                }
            });
        }
        if !there.power.is_on() {
            return None;
        }
        let (answer, answered) = oneshot::channel();
        let (work, life) = (does(), Arc::clone(there));
        self.dice.spawn(async move {
            let done = work.await;
            // What a node that lost its power would have said, nobody hears.
            if life.power.is_on() {
                drop(answer.send(done));
            }
        });
        let done = answered.await.ok()?;
        self.hop(world, to, from).await;
        Some(done)
    }
}

/// How one life of a voter calls others.
pub(super) struct SimDial {
    pub(super) world: Weak<World>,
    pub(super) id: u64,
    pub(super) power: Arc<super::disk::Power>,
}

struct SimLine {
    world: Weak<World>,
    from: u64,
    power: Arc<super::disk::Power>,
    address: String,
    there: Arc<Life>,
}

fn no_way(address: &str) -> RpcError {
    let source = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
    RpcError::Connect { address: address.to_owned(), source }
}

impl Dial for SimDial {
    fn connect<'a>(
        &'a self,
        address: &'a str,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<Arc<dyn Line>, RpcError>> {
        async move {
            let world = self.world.upgrade().ok_or_else(|| no_way(address))?;
            let there = world.life_at(address);
            let to = there.as_ref().map_or(0, |l| l.id);
            let way = world.net.hop(&world, self.id, to);
            let ms = timeout.as_millis() as u64;
            let late = |_| RpcError::Timeout { address: address.to_owned(), ms };
            tokio::time::timeout(timeout, way).await.map_err(late)?;
            let there = there.filter(|l| l.power.is_on()).ok_or_else(|| no_way(address))?;
            let (world, power) = (self.world.clone(), Arc::clone(&self.power));
            let address = address.to_owned();
            Ok(Arc::new(SimLine { world, from: self.id, power, address, there }) as Arc<dyn Line>)
        }
        .boxed()
    }
}

impl Line for SimLine {
    fn call(
        &self,
        header: Header,
        body: Bytes,
        payload: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<Frame, RpcError>> {
        async move {
            let closed = || RpcError::Closed { address: self.address.clone() };
            if self.is_closed() {
                return Err(closed());
            }
            let world = self.world.upgrade().ok_or_else(closed)?;
            // A frame with a payload is a piece of a snapshot, and small ones come in one.
            let last_piece = !payload.is_empty();
            let frame = Arc::new(Frame::new(header, body, payload));
            if last_piece && !world.calm.load(Ordering::SeqCst) && world.dice.chance(0.2) {
                self.there.power.cut_after(world.dice.between(1, 12));
            }
            let answer = || {
                let (life, frame) = (Arc::clone(&self.there), Arc::clone(&frame));
                async move { life.voter.answer(&frame).await }
            };
            let ends = (self.from, self.there.id);
            let exchange = world.net.exchange(&world, ends, &self.there, answer);
            let ms = timeout.as_millis() as u64;
            let late = |_| RpcError::Timeout { address: self.address.clone(), ms };
            let reply = tokio::time::timeout(timeout, exchange).await.map_err(late)?;
            let reply = reply.filter(|_| self.power.is_on()).ok_or_else(closed)?;
            world.count("messages");
            if last_piece && reply.header.status == Status::Ok {
                world.count("snapshots received");
            }
            match reply.header.status {
                Status::Ok => Ok(reply),
                status => Err(RpcError::Status {
                    status,
                    retry_after_ms: reply.header.retry_after_ms,
                    message: String::from_utf8_lossy(&reply.body).into_owned(),
                }),
            }
        }
        .boxed()
    }
    fn is_closed(&self) -> bool {
        !self.there.power.is_on() || !self.power.is_on()
    }
}
