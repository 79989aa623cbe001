//! Clients: each changes names in a directory of its own, asks again until it is answered, wherever it thinks that
//! the leader is, and knows what every answer must be, because each of its changes happens once. They also read each
//! other's directories.

use super::seen::Known;
use super::world::{Break, Life, World};
use crate::raft::kv::Reader as View;
use crate::raft::propose::ProposeError;
use ebb_dataplane_protocol::{ClusterId, Incarnation, InodeId, Sequence, SessionId};
use ebb_metaplane_protocol::command::OpOutcome;
use ebb_metaplane_protocol::op::Op;
use ebb_metaplane_protocol::{Command, CommandReply};
use ebb_namespace::Reader;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Of a client as an end of the network.
const END: u64 = 1000;

pub(super) struct Client {
    world: Arc<World>,
    id: u64,
    session: SessionId,
    /// Of its last change.
    sequence: u64,
    /// Its directory.
    dir: InodeId,
    /// Entries that it made and leaves there.
    entries: u64,
    /// Whom it asks next.
    target: u64,
}

/// Entries that a read looks at, at most: a client does not make so many in a run.
const PAGE: usize = 500;

fn entry(number: u64) -> Vec<u8> {
    format!("a{number:06}").into_bytes()
}

/// How many commands were applied, and up to which number a directory has every entry from `from` on.
fn seen_of(r: &Reader<'_, View<'_>>, dir: InodeId, from: u64) -> (u64, u64) {
    let page = r.entries(dir, &entry(from.saturating_sub(1)), PAGE).unwrap_or_default();
    let there = (from.max(1)..).zip(&page).take_while(|(n, (name, _))| *name == entry(*n));
    (r.sequence().unwrap_or(0), there.last().map_or(0, |(n, _)| n))
}

/// What [`seen_of`] says of a client's directory where a voter leads.
async fn entries(
    life: Arc<Life>,
    dir: InodeId,
    from: u64,
    unconfirmed: bool,
) -> Result<(u64, u64), ProposeError> {
    let look = move |_: &View<'_>, r: Reader<'_, View<'_>>| seen_of(&r, dir, from);
    if unconfirmed { life.voter.peek(look) } else { life.voter.read(look).await }
}

/// The same by a voter that follows.
async fn entries_behind(
    life: Arc<Life>,
    dir: InodeId,
    from: u64,
    unconfirmed: bool,
) -> Result<(u64, u64), ProposeError> {
    if unconfirmed {
        return entries(life, dir, from, true).await;
    }
    life.voter.read_behind(move |_, r| seen_of(&r, dir, from)).await
}

impl Client {
    pub(super) fn new(world: &Arc<World>, id: u64) -> Self {
        Self {
            world: Arc::clone(world),
            id,
            session: SessionId(0),
            sequence: 0,
            dir: InodeId(0),
            entries: 0,
            target: 1,
        }
    }

    fn dice(&self) -> &super::dice::Dice {
        &self.world.dice
    }

    /// Somebody to ask.
    fn somebody(&mut self) -> Option<Arc<Life>> {
        if let Some(life) = self.world.life(self.target) {
            return Some(life);
        }
        let lives = self.world.lives();
        let life = self.dice().pick(&lives)?;
        self.target = life.id;
        Some(life)
    }

    fn somebody_who_follows(&self) -> Option<u64> {
        let mut lives = self.world.lives();
        lives.retain(|life| life.leads().is_none());
        self.dice().pick(&lives).map(|life| life.id)
    }

    fn look_elsewhere(&mut self, hint: Option<&str>) {
        let hinted = hint.and_then(|h| h.strip_prefix("voter")?.strip_suffix(":1")?.parse().ok());
        match hinted.filter(|_| self.dice().chance(0.8)) {
            Some(id) => self.target = id,
            None => {
                let lives = self.world.lives();
                self.target = self.dice().pick(&lives).map_or(self.target, |l| l.id);
            }
        }
    }

    /// One attempt. `None`: there was no answer that says anything.
    async fn attempt<T, F>(&mut self, does: impl Fn(&Arc<Life>) -> F) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, ProposeError>> + Send + 'static,
    {
        let Some(life) = self.somebody() else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            return None;
        };
        let patience = Duration::from_millis(self.dice().between(50, 900));
        let world = Arc::clone(&self.world);
        let exchange = world.net.exchange(&world, (END + self.id, life.id), &life, || does(&life));
        match tokio::time::timeout(patience, exchange).await {
            Ok(Some(Ok(answer))) => Some(answer),
            Ok(Some(Err(ProposeError::NotLeader(hint)))) => {
                self.look_elsewhere(hint.as_deref());
                tokio::time::sleep(Duration::from_millis(self.dice().below(30))).await;
                None
            }
            // Gone, stopped, or no answer: perhaps it was carried out.
            _ => {
                self.world.count("unanswered requests");
                self.look_elsewhere(None);
                tokio::time::sleep(Duration::from_millis(self.dice().below(30))).await;
                None
            }
        }
    }

    async fn submit(&mut self, command: impl Fn(u64) -> Command) -> CommandReply {
        loop {
            let next = command(self.sequence);
            let answer = self.attempt(|life| {
                let (life, command) = (Arc::clone(life), next.clone());
                async move { life.voter.submit(command).await }
            });
            if let Some(reply) = answer.await {
                return reply;
            }
            if self.world.broken == Some(Break::Replies) {
                self.sequence += 1;
            }
        }
    }

    /// A change; what it returns, or why the world is wrong.
    async fn change(&mut self, op: Op) -> Option<OpOutcome> {
        self.sequence += 1;
        let session = self.session;
        let reply = self
            .submit(|sequence| Command::Client {
                session,
                sequence: Sequence(sequence),
                answered_below: Sequence(sequence),
                op: op.clone(),
            })
            .await;
        match reply {
            CommandReply::Op(Ok(outcome)) => {
                self.world.count("acked changes");
                Some(outcome)
            }
            other => {
                self.world.fail(format!("client {}: {op:?} was answered {other:?}", self.id));
                None
            }
        }
    }

    async fn make(&mut self, name: Vec<u8>) -> Option<InodeId> {
        let known = self.known();
        let (parent, mode, uid, gid) = (self.dir, 0o755, 0, 0);
        match self.change(Op::Mkdir { parent, name, mode, uid, gid }).await? {
            OpOutcome::Attr(attr) => {
                let made = self.world.seen().made(known, attr.ctime.0);
                self.wrong(made);
                Some(attr.inode)
            }
            other => {
                self.world.fail(format!("a directory was made: {other:?}"));
                None
            }
        }
    }

    fn known(&self) -> Known {
        self.world.seen().begin(self.id)
    }

    fn wrong(&self, found: Result<(), String>) {
        if let Err(why) = found {
            self.world.fail(format!("client {}: {why}", self.id));
        }
    }

    /// A session and a directory.
    async fn begin(&mut self) -> Option<()> {
        let (cluster, incarnation) = (ClusterId(7), Incarnation(1));
        let format = Command::Format { cluster, pg_count: 1, incarnation, backed: false };
        self.submit(|_| format.clone()).await;
        let open = Command::OpenSession { client: self.id.into(), label: "sim".into() };
        match self.submit(|_| open.clone()).await {
            CommandReply::Session(Ok(session)) => self.session = session,
            other => self.world.fail(format!("no session: {other:?}")),
        }
        self.dir = InodeId::ROOT;
        self.dir = self.make(format!("c{}", self.id).into_bytes()).await?;
        Some(())
    }

    /// Reads a client's directory: what is there now of the entries from `from` on.
    async fn read(&mut self, of: u64, dir: InodeId, from: u64) {
        let applied = self.world.lives().iter().map(|l| l.sequence()).max().unwrap_or(0);
        let known = {
            let mut seen = self.world.seen();
            seen.applied(applied);
            seen.begin(of)
        };
        let unconfirmed = self.world.broken == Some(Break::Reads);
        let behind = self.world.broken == Some(Break::Behind);
        loop {
            // Not for ever: who is cut off from the leader answers nothing.
            if self.world.follows
                && self.dice().chance(0.5)
                && let Some(id) = self.somebody_who_follows()
            {
                let leader = std::mem::replace(&mut self.target, id);
                let read = self.attempt(|life| entries_behind(Arc::clone(life), dir, from, behind));
                if let Some((sequence, last)) = read.await {
                    self.world.count("reads of a voter that follows");
                    let found = self.world.seen().read(known, of, (sequence, last));
                    self.wrong(found);
                    self.target = leader;
                    return;
                }
                self.target = leader;
                continue;
            }
            if unconfirmed && self.somebody().is_none_or(|l| l.leads().is_none()) {
                self.look_elsewhere(None);
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            }
            let read = self.attempt(|life| entries(Arc::clone(life), dir, from, unconfirmed));
            if let Some((sequence, last)) = read.await {
                self.world.count("reads");
                let found = self.world.seen().read(known, of, (sequence, last));
                self.wrong(found);
                return;
            }
        }
    }

    /// Works until the world is calm, then looks at all that it has done. `dirs`: of all clients, as they begin.
    pub(super) async fn run(mut self, dirs: Arc<std::sync::Mutex<Vec<(u64, InodeId)>>>) {
        if self.begin().await.is_none() {
            return;
        }
        let all = || dirs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all().push((self.id, self.dir));
        let (name, other): (Vec<u8>, Vec<u8>) = (b"m".to_vec(), b"n".to_vec());
        let mut step = 0;
        while !self.world.calm.load(Ordering::SeqCst) && self.world.failure().is_none() {
            let dir = self.dir;
            step += 1;
            match step % 9 {
                2 => drop(self.make(name.clone()).await),
                4 => {
                    let (from, to) = (name.clone(), other.clone());
                    let op = Op::Rename {
                        parent: dir,
                        name: from,
                        new_parent: dir,
                        new_name: to,
                        flags: 0,
                    };
                    self.change(op).await;
                }
                6 => drop(self.change(Op::Rmdir { parent: dir, name: other.clone() }).await),
                0 | 3 | 5 | 7 => {
                    let whose = all().clone();
                    if let Some((of, dir)) = self.dice().pick(&whose) {
                        let from = self.world.seen().made_by(of);
                        self.read(of, dir, from).await;
                    }
                }
                _ => {
                    let number = self.entries + 1;
                    self.world.seen().begins_entry(self.id, number);
                    if self.make(entry(number)).await.is_some() {
                        self.entries = number;
                        self.world.seen().made_entry(self.id, number);
                    }
                }
            }
            let think = if self.dice().chance(0.2) { 200 } else { 20 };
            tokio::time::sleep(Duration::from_millis(self.dice().below(think))).await;
        }
        let (id, dir) = (self.id, self.dir);
        self.read(id, dir, 1).await;
    }
}
