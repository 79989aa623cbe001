//! Our side: sessions and their requests.

use super::{Large, Operation, Plan, Sample, micros, us};
use crate::BenchError;
use crate::report::Limit;
use ebb_client::{Cluster, Config, FileSystem, InodeId, OpenFlags, Owner};
use ebb_dataplane_protocol::{HandleId, Sequence, SessionId};
use ebb_metaplane_protocol::op::{OpenMode, RELEASES_MAX};
use ebb_metaplane_protocol::query::PAGE_ENTRIES_MAX;
use ebb_metaplane_protocol::{
    AdminCall, AdminReply, FsError, FsResult, Op, OpReply, Query, QueryReply, Request, Response,
    SessionCall, SessionReply,
};
use ebb_rpc::MetaClient;
use futures::future::try_join_all;
use hdrhistogram::Histogram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// For one answer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Entries that a removal of what was left over has under way.
const SWEEP: usize = 64;

fn failed(e: impl std::fmt::Display) -> BenchError {
    BenchError::Program { program: "the metadata plane", why: e.to_string() }
}

fn refused<T>(result: FsResult<T>) -> Result<T, BenchError> {
    result.map_err(failed)
}

fn odd() -> BenchError {
    failed("an answer to another question")
}

/// A session with a connection of its own.
struct Client {
    meta: MetaClient,
    session: SessionId,
    sequence: AtomicU64,
    /// It asks voters that follow first.
    followers: AtomicBool,
    renewing: JoinHandle<()>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.renewing.abort();
    }
}

impl Client {
    async fn open(plan: &Plan) -> Result<Self, BenchError> {
        let meta = MetaClient::new(plan.addresses.clone(), plan.identity.clone());
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(failed)?;
        let label = format!("ebb bench meta, pid {}", std::process::id());
        let call = SessionCall::Open { client: u128::from_le_bytes(random), label };
        let reply = meta.call(&Request::Session(call), PATIENCE).await.map_err(failed)?;
        let Response::Session(Ok(SessionReply::Opened { session, ttl_ms })) = reply else {
            return Err(odd());
        };
        let (every, renewer) = (Duration::from_millis(ttl_ms.max(30) / 3), meta.clone());
        let renewing = tokio::spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                let _ = renewer.call(&Request::Session(SessionCall::Renew(session)), every).await;
            }
        });
        let (sequence, followers) = (AtomicU64::new(0), AtomicBool::new(false));
        Ok(Self { meta, session, sequence, followers, renewing })
    }

    /// One mutation at a time: every earlier one was answered.
    async fn mutate(&self, op: Op) -> Result<FsResult<OpReply>, BenchError> {
        let sequence = Sequence(self.sequence.fetch_add(1, Ordering::Relaxed) + 1);
        let request = Request::Mutate {
            session: self.session,
            sequence,
            answered_below: sequence,
            op,
            dropped: Vec::new(),
        };
        let begun = Instant::now();
        loop {
            match self.meta.call(&request, PATIENCE).await.map_err(failed)? {
                Response::Op(Err(FsError::Again { retry_after_ms, .. }))
                    if begun.elapsed() < PATIENCE =>
                {
                    tokio::time::sleep(Duration::from_millis(retry_after_ms.into())).await;
                }
                Response::Op(result) => return Ok(result),
                _ => return Err(odd()),
            }
        }
    }

    async fn query(&self, query: Query) -> Result<QueryReply, BenchError> {
        let request = Request::Query { session: self.session, query };
        let answer = match self.followers.load(Ordering::Relaxed) {
            true => self.meta.ask(&request, PATIENCE).await,
            false => self.meta.call(&request, PATIENCE).await,
        };
        match answer.map_err(failed)? {
            Response::Query(result) => refused(result),
            _ => Err(odd()),
        }
    }

    async fn mkdir(&self, parent: InodeId, name: &str) -> Result<InodeId, BenchError> {
        let name = name.as_bytes().to_vec();
        let op = Op::Mkdir { parent, name, mode: 0o700, uid: 0, gid: 0 };
        match refused(self.mutate(op).await?)? {
            OpReply::Made(made) => Ok(made.attr.inode),
            _ => Err(odd()),
        }
    }

    async fn create(&self, parent: InodeId, name: String) -> Result<HandleId, BenchError> {
        let op = Op::Create {
            parent,
            name: name.into_bytes(),
            mode: 0o600,
            uid: 0,
            gid: 0,
            exclusive: true,
            open: OpenMode { write: true, truncate: false },
            delegate: false,
        };
        match refused(self.mutate(op).await?)? {
            OpReply::Opened(opened) => Ok(opened.handle),
            _ => Err(odd()),
        }
    }

    /// Ends handles when there are enough, or all of them.
    async fn release(&self, handles: &mut Vec<HandleId>, all: bool) -> Result<(), BenchError> {
        if handles.len() < if all { 1 } else { RELEASES_MAX } {
            return Ok(());
        }
        let op = Op::ReleaseMany { handles: std::mem::take(handles) };
        refused(self.mutate(op).await?).map(drop)
    }

    /// All entries, page by page: their number, and each page's latency.
    async fn list(&self, dir: InodeId, took: &mut Histogram<u64>) -> Result<u64, BenchError> {
        let (mut after, mut entries_seen) = (Vec::new(), 0);
        loop {
            let begun = Instant::now();
            let query = Query::ReadDir { inode: dir, after, limit: PAGE_ENTRIES_MAX };
            let QueryReply::Page { entries, end } = self.query(query).await? else {
                return Err(odd());
            };
            let _ = took.record(us(begun));
            entries_seen += entries.len() as u64;
            match entries.into_iter().next_back() {
                Some(last) if !end => after = last.name,
                _ => return Ok(entries_seen),
            }
        }
    }

    /// Removes a directory of files.
    async fn remove(&self, parent: InodeId, name: &str, dir: InodeId) -> Result<(), BenchError> {
        loop {
            let query = Query::ReadDir { inode: dir, after: Vec::new(), limit: PAGE_ENTRIES_MAX };
            let QueryReply::Page { entries, .. } = self.query(query).await? else {
                return Err(odd());
            };
            if entries.is_empty() {
                break;
            }
            for entry in entries {
                refused(self.mutate(Op::Unlink { parent: dir, name: entry.name }).await?)?;
            }
        }
        let op = Op::Rmdir { parent, name: name.as_bytes().to_vec() };
        refused(self.mutate(op).await?).map(drop)
    }

    /// What one client does in a phase: operations, and the latency of each.
    async fn work(
        &self,
        operation: Operation,
        dir: InodeId,
        files: u32,
    ) -> Result<(u64, Histogram<u64>), BenchError> {
        let mut took = micros();
        let mut handles = Vec::new();
        if operation == Operation::Readdir {
            let entries = self.list(dir, &mut took).await?;
            return Ok((entries, took));
        }
        for n in 0..files {
            let begun = Instant::now();
            match operation {
                Operation::Create => handles.push(self.create(dir, file(n)).await?),
                Operation::Stat => {
                    let query = Query::Lookup { parent: dir, name: file(n).into_bytes() };
                    self.query(query).await?;
                }
                Operation::Rename => {
                    let (name, new_name) = (file(n).into_bytes(), moved(n).into_bytes());
                    let op = Op::Rename { parent: dir, name, new_parent: dir, new_name, flags: 0 };
                    refused(self.mutate(op).await?)?;
                }
                Operation::Unlink => {
                    let op = Op::Unlink { parent: dir, name: moved(n).into_bytes() };
                    refused(self.mutate(op).await?)?;
                }
                Operation::Readdir => {}
            }
            let _ = took.record(us(begun));
            self.release(&mut handles, false).await?;
        }
        self.release(&mut handles, true).await?;
        Ok((files.into(), took))
    }
}

fn file(n: u32) -> String {
    format!("file.{n:08}")
}

fn moved(n: u32) -> String {
    format!("moved.{n:08}")
}

/// All sessions, and a directory of each below one of the whole measurement.
pub(super) struct Clients {
    all: Vec<(Arc<Client>, InodeId)>,
    name: String,
    top: InodeId,
}

impl Clients {
    pub(super) async fn open(plan: &Plan, clients: u32) -> Result<Self, BenchError> {
        let sessions = try_join_all((0..clients).map(|_| Client::open(plan))).await?;
        let name = format!(".ebb-bench-meta-{}", std::process::id());
        let mut top = None;
        let mut all = Vec::new();
        for (n, client) in sessions.into_iter().enumerate() {
            let below = match top {
                Some(top) => top,
                None => *top.insert(client.mkdir(InodeId::ROOT, &name).await?),
            };
            let dir = client.mkdir(below, &directory(n)).await?;
            all.push((Arc::new(client), dir));
        }
        Ok(Self { all, name, top: top.unwrap_or(InodeId::ROOT) })
    }

    /// From now on voters that follow are asked first, or not.
    pub(super) fn ask_followers(&self, so: bool) {
        self.all.iter().for_each(|(client, _)| client.followers.store(so, Ordering::Relaxed));
    }

    /// Answers of voters that follow.
    pub(super) fn followed(&self) -> u64 {
        self.all.iter().map(|(client, _)| client.meta.followed()).sum()
    }

    pub(super) async fn voters(&self) -> Result<u32, BenchError> {
        let Some((client, _)) = self.all.first() else { return Err(odd()) };
        let call = Request::Admin(AdminCall::Voters);
        match client.meta.call(&call, PATIENCE).await.map_err(failed)? {
            Response::Admin(Ok(AdminReply::Voters(all))) => Ok(all.len() as u32),
            _ => Err(odd()),
        }
    }

    /// All of the first so many clients do `operation` with their files at once.
    pub(super) async fn phase(
        &self,
        operation: Operation,
        files: u32,
        clients: u32,
    ) -> Result<Sample, BenchError> {
        let begun = Instant::now();
        let work = self.all.iter().take(clients as usize).map(|(client, dir)| {
            let (client, dir) = (Arc::clone(client), *dir);
            tokio::spawn(async move { client.work(operation, dir, files).await })
        });
        let tasks: Vec<_> = work.collect();
        let (mut count, mut took) = (0, micros());
        for task in tasks {
            let (done, of) = task.await.map_err(|e| BenchError::Worker(e.to_string()))??;
            count += done;
            took.add(of).map_err(failed)?;
        }
        Ok(Sample::new(count, begun.elapsed(), &took))
    }

    /// Fills one directory by all clients, and lists it.
    pub(super) async fn large(
        &self,
        entries: u32,
        say: &impl Fn(&str),
    ) -> Result<Large, BenchError> {
        let Some((first, _)) = self.all.first() else { return Err(odd()) };
        let dir = first.mkdir(self.top, LARGE).await?;
        let next = Arc::new(AtomicU64::new(0));
        let mut rates = Vec::new();
        let tenth = u64::from(entries).div_ceil(10);
        for end in (1..=10).map(|n| (n * tenth).min(entries.into())) {
            say(&format!("a directory of {entries} entries: up to {end}"));
            let (begun, from) = (Instant::now(), next.load(Ordering::Relaxed));
            let tasks: Vec<_> = self
                .all
                .iter()
                .map(|(client, _)| {
                    let (client, next) = (Arc::clone(client), Arc::clone(&next));
                    tokio::spawn(async move {
                        let mut handles = Vec::new();
                        loop {
                            let n = next.fetch_add(1, Ordering::Relaxed);
                            if n >= end {
                                break;
                            }
                            handles.push(client.create(dir, format!("entry.{n:012}")).await?);
                            client.release(&mut handles, false).await?;
                        }
                        client.release(&mut handles, true).await
                    })
                })
                .collect();
            for task in tasks {
                task.await.map_err(|e| BenchError::Worker(e.to_string()))??;
            }
            // Everybody took one number too many.
            next.store(end, Ordering::Relaxed);
            let made = end.saturating_sub(from);
            rates.push(made as f64 / begun.elapsed().as_secs_f64().max(1e-9));
        }
        say("listing it");
        let begun = Instant::now();
        let seen = first.list(dir, &mut micros()).await?;
        let list_s = begun.elapsed().as_secs_f64();
        if seen != u64::from(entries) {
            return Err(failed(format!("{seen} entries listed of {entries}")));
        }
        let bar = (entries >= 1_000_000).then(|| Limit::at_most(10.0).judge(list_s));
        let (first_per_s, last_per_s) = (rates[0], rates[rates.len() - 1]);
        Ok(Large { entries: seen, first_per_s, last_per_s, list_s, bar })
    }

    /// Removes everything and ends the sessions.
    pub(super) async fn close(self) -> Result<(), BenchError> {
        let Some((first, _)) = self.all.first() else { return Ok(()) };
        self.empty_large().await?;
        for (n, (client, dir)) in self.all.iter().enumerate() {
            client.remove(self.top, &directory(n), *dir).await?;
        }
        first.remove(InodeId::ROOT, &self.name, self.top).await?;
        for (client, _) in &self.all {
            let call = Request::Session(SessionCall::Close(client.session));
            client.meta.call(&call, PATIENCE).await.map_err(failed)?;
        }
        Ok(())
    }

    /// The large directory is emptied by all clients at once.
    async fn empty_large(&self) -> Result<(), BenchError> {
        let Some((first, _)) = self.all.first() else { return Ok(()) };
        let query = Query::Lookup { parent: self.top, name: LARGE.as_bytes().to_vec() };
        let Ok(QueryReply::Attr(found)) = first.query(query).await else { return Ok(()) };
        let dir = found.inode;
        loop {
            let query = Query::ReadDir { inode: dir, after: Vec::new(), limit: PAGE_ENTRIES_MAX };
            let QueryReply::Page { entries, .. } = first.query(query).await? else {
                return Err(odd());
            };
            if entries.is_empty() {
                break;
            }
            let names: Vec<_> = entries.into_iter().map(|e| e.name).collect();
            let workers = self.all.len().min(SWEEP);
            let share = names.len().div_ceil(workers);
            try_join_all(names.chunks(share).zip(&self.all).map(
                |(names, (client, _))| async move {
                    for name in names {
                        refused(
                            client.mutate(Op::Unlink { parent: dir, name: name.clone() }).await?,
                        )?;
                    }
                    Ok::<_, BenchError>(())
                },
            ))
            .await?;
        }
        first.remove(self.top, LARGE, dir).await
    }
}

const NEW: OpenFlags = OpenFlags { write: true, truncate: false, exclusive: true };
/// Looks at each file through the library.
const LOOKS: u32 = 50;
const LARGE: &str = "large";

fn directory(n: usize) -> String {
    format!("client.{n:04}")
}

/// Creates, looks again at what was looked at, and unlinks through the client library, by clients with a session
/// each that remember what they were told.
pub(super) async fn library(
    plan: &Plan,
    clients: u32,
) -> Result<Vec<(Operation, Sample)>, BenchError> {
    let owner = Owner { uid: 0, gid: 0 };
    let mut all = Vec::new();
    for n in 0..clients {
        let label = format!("ebb bench meta, pid {}, client {n}", std::process::id());
        let config = Config { patience: PATIENCE, lease_metadata: true, ..Config::default() };
        let key = plan.identity.key.clone();
        let cluster = Cluster::connect(plan.addresses.clone(), key, &label, config).await?;
        let fs = FileSystem::new(&cluster);
        let name = format!(".ebb-bench-library-{}-{n}", std::process::id());
        let dir = fs.mkdir(InodeId::ROOT, name.as_bytes(), 0o700, owner).await?.inode;
        all.push((Arc::new(fs), name, dir));
    }
    let mut done = Vec::new();
    for operation in [Operation::Create, Operation::Stat, Operation::Unlink] {
        if operation == Operation::Stat {
            for (fs, _, dir) in &all {
                for n in 0..plan.files {
                    fs.lookup(*dir, file(n).as_bytes()).await?;
                }
            }
        }
        let rounds = if operation == Operation::Stat { LOOKS } else { 1 };
        let begun = Instant::now();
        let tasks: Vec<_> = all
            .iter()
            .map(|(fs, _, dir)| {
                let (fs, dir, files) = (Arc::clone(fs), *dir, plan.files);
                tokio::spawn(async move {
                    let mut took = micros();
                    for n in (0..rounds).flat_map(|_| 0..files) {
                        let begun = Instant::now();
                        let name = file(n);
                        match operation {
                            Operation::Create => {
                                let made =
                                    fs.create(dir, name.as_bytes(), 0o600, owner, NEW).await?;
                                fs.release(made.handle).await?;
                            }
                            Operation::Stat => {
                                fs.lookup(dir, name.as_bytes()).await?;
                            }
                            _ => fs.unlink(dir, name.as_bytes()).await?,
                        }
                        let _ = took.record(us(begun));
                    }
                    if operation != Operation::Stat {
                        fs.fsync_dir(dir).await?;
                    }
                    Ok::<_, BenchError>(took)
                })
            })
            .collect();
        let mut took = micros();
        for task in tasks {
            let of = task.await.map_err(|e| BenchError::Worker(e.to_string()))??;
            took.add(of).map_err(failed)?;
        }
        let count = u64::from(clients) * u64::from(plan.files) * u64::from(rounds);
        done.push((operation, Sample::new(count, begun.elapsed(), &took)));
    }
    for (fs, name, _) in all {
        fs.rmdir(InodeId::ROOT, name.as_bytes()).await?;
        fs.close().await?;
    }
    Ok(done)
}
