//! The persistent state machine: `ebb-namespace` over redb.
//!
//! Each batch of entries is one redb transaction of durability `None` that also holds the last
//! applied log id and the membership, so that the file always is at an entry's boundary. It is made
//! durable ([`StateStore::persist`]) from time to time, and always before a snapshot is reported,
//! because the log up to a snapshot may go. After a crash redb is back at its last durable commit and
//! openraft applies the log from there.

use super::kv::{Reader, Writer};
use super::snapshot::{self, SnapshotFile, SnapshotWriter};
use super::{Applied, Entry, LogId, SnapshotMeta, StoredMembership, TypeConfig};
use futures::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine, Snapshot};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use redb::{
    Database, Durability, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition,
    WriteTransaction,
};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::Notify;

/// The namespace's pairs.
pub(super) const PAIRS: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("namespace");
/// Raft's own record.
const RAFT: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("raft");
const APPLIED: &str = "applied";

/// Entries of one transaction at most.
const BATCH_ENTRIES_MAX: usize = 512;
/// Entries applied since the last durable commit at most; bounds the replay after a crash.
const UNDURABLE_ENTRIES_MAX: u64 = 20_000;

/// Where the state is in the log.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Position {
    last: Option<LogId>,
    membership: StoredMembership,
}

/// Turns a store's error into what openraft takes (it stops the node).
pub(super) fn failed(e: impl Into<redb::Error>) -> io::Error {
    io::Error::other(format!("metadata store: {}", e.into()))
}

struct Shared {
    /// `None` once closed: whoever still holds a handle reads nothing more.
    database: RwLock<Option<Database>>,
    snapshots: PathBuf,
    /// Entries applied but not durable.
    undurable: AtomicU64,
    /// Something was applied: leader tasks look for work.
    applied: Notify,
}

impl Shared {
    fn begin_read(&self) -> io::Result<ReadTransaction> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        database.as_ref().ok_or_else(closed)?.begin_read().map_err(failed)
    }
    fn begin_write(&self) -> io::Result<WriteTransaction> {
        // A writer waits for the one before it, which must not keep the lock from being taken.
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        database.as_ref().ok_or_else(closed)?.begin_write().map_err(failed)
    }
}

fn closed() -> io::Error {
    io::Error::other("the metadata store is closed")
}

/// The state machine. Clones share it.
#[derive(Clone)]
pub struct StateStore {
    shared: Arc<Shared>,
    position: Position,
}

impl std::fmt::Debug for StateStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StateStore").field("position", &self.position).finish_non_exhaustive()
    }
}

/// Reading the applied state, from anywhere.
#[derive(Clone)]
pub struct StateReader {
    shared: Arc<Shared>,
}

impl StateReader {
    /// A consistent view of the state as last applied.
    pub fn view(&self) -> io::Result<Reader> {
        Reader::new(&self.shared.begin_read()?)
    }

    /// Wakes when entries were applied.
    pub fn applied(&self) -> &Notify {
        &self.shared.applied
    }

    /// Makes what was applied durable, if anything is not. Blocks on disk.
    pub fn persist(&self) -> io::Result<()> {
        persist(&self.shared)
    }

    /// Makes the state durable and lets go of the file. Raft must have stopped. Blocks on disk.
    pub fn close(&self) -> io::Result<()> {
        let persisted = persist(&self.shared);
        let mut database = self.shared.database.write().unwrap_or_else(PoisonError::into_inner);
        drop(database.take());
        self.shared.applied.notify_waiters();
        persisted
    }

    /// Whether [`StateReader::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.shared.database.read().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}

fn persist(shared: &Shared) -> io::Result<()> {
    let undurable = shared.undurable.load(Ordering::Acquire);
    let mut txn = shared.begin_write()?;
    txn.set_durability(Durability::Immediate).map_err(failed)?;
    txn.commit().map_err(failed)?;
    shared.undurable.fetch_sub(undurable, Ordering::AcqRel);
    Ok(())
}

impl StateStore {
    /// Opens or creates the store of a directory. Blocks on disk.
    pub fn open(dir: &Path, cache_bytes: usize) -> io::Result<Self> {
        let snapshots = dir.join("snapshots");
        std::fs::create_dir_all(&snapshots)?;
        let database = Database::builder()
            .set_cache_size(cache_bytes)
            .create(dir.join("state.redb"))
            .map_err(failed)?;
        let txn = database.begin_write().map_err(failed)?;
        let position = {
            txn.open_table(PAIRS).map_err(failed)?;
            let raft = txn.open_table(RAFT).map_err(failed)?;
            let stored = raft.get(APPLIED).map_err(failed)?;
            match stored {
                Some(json) => serde_json::from_slice(json.value()).map_err(io::Error::other)?,
                None => Position::default(),
            }
        };
        txn.commit().map_err(failed)?;
        let shared = Shared {
            database: RwLock::new(Some(database)),
            snapshots,
            undurable: AtomicU64::new(0),
            applied: Notify::new(),
        };
        Ok(Self { shared: Arc::new(shared), position })
    }

    /// A handle for reading.
    pub fn reader(&self) -> StateReader {
        StateReader { shared: Arc::clone(&self.shared) }
    }

    /// Where snapshots live, arriving ones too.
    pub fn snapshot_dir(&self) -> PathBuf {
        self.shared.snapshots.clone()
    }

    /// Applies a batch in one transaction, then answers.
    fn apply_batch(&mut self, batch: Vec<EntryResponder<TypeConfig>>) -> io::Result<()> {
        let count = batch.len() as u64;
        let undurable = self.shared.undurable.load(Ordering::Acquire) + count;
        let durable = undurable > UNDURABLE_ENTRIES_MAX;
        let mut txn = self.shared.begin_write()?;
        let durability = if durable { Durability::Immediate } else { Durability::None };
        txn.set_durability(durability).map_err(failed)?;
        let mut position = self.position.clone();
        let mut answers = Vec::with_capacity(batch.len());
        {
            let mut writer = Writer::new(&txn)?;
            for (entry, responder) in batch {
                let Entry { log_id, payload } = entry;
                let applied = match payload {
                    EntryPayload::Blank => Applied::default(),
                    EntryPayload::Membership(m) => {
                        position.membership = StoredMembership::new(Some(log_id), m);
                        Applied::default()
                    }
                    EntryPayload::Normal(p) => Applied(writer.apply(p.entry())),
                };
                position.last = Some(log_id);
                answers.push((responder, applied));
            }
            writer.finish()?;
            let json = serde_json::to_vec(&position).map_err(io::Error::other)?;
            let mut raft = txn.open_table(RAFT).map_err(failed)?;
            raft.insert(APPLIED, json.as_slice()).map_err(failed)?;
        }
        txn.commit().map_err(failed)?;
        self.position = position;
        if durable {
            self.shared.undurable.store(0, Ordering::Release);
        } else {
            self.shared.undurable.fetch_add(count, Ordering::AcqRel);
        }
        for (responder, applied) in answers {
            if let Some(responder) = responder {
                responder.send(applied);
            }
        }
        self.shared.applied.notify_waiters();
        Ok(())
    }

    fn install(&mut self, meta: &SnapshotMeta, file: &SnapshotFile) -> io::Result<()> {
        let position =
            Position { last: meta.last_log_id, membership: meta.last_membership.clone() };
        let mut txn = self.shared.begin_write()?;
        txn.set_durability(Durability::Immediate).map_err(failed)?;
        txn.delete_table(PAIRS).map_err(failed)?;
        {
            let mut pairs = txn.open_table(PAIRS).map_err(failed)?;
            file.read_pairs(|key, value| pairs.insert(key, value).map(drop).map_err(failed))?;
            let json = serde_json::to_vec(&position).map_err(io::Error::other)?;
            let mut raft = txn.open_table(RAFT).map_err(failed)?;
            raft.insert(APPLIED, json.as_slice()).map_err(failed)?;
        }
        txn.commit().map_err(failed)?;
        self.shared.undurable.store(0, Ordering::Release);
        self.position = position;
        snapshot::adopt(&self.shared.snapshots, file, meta)?;
        self.shared.applied.notify_waiters();
        Ok(())
    }
}

/// Builds a snapshot from a read transaction, off the apply task.
pub struct SnapshotBuilder {
    shared: Arc<Shared>,
}

impl SnapshotBuilder {
    fn build(
        &self,
    ) -> io::Result<Snapshot<super::LeaderId, u64, openraft::impls::BasicNode, SnapshotFile>> {
        let txn = self.shared.begin_read()?;
        let position: Position = {
            let raft = txn.open_table(RAFT).map_err(failed)?;
            match raft.get(APPLIED).map_err(failed)? {
                Some(json) => serde_json::from_slice(json.value()).map_err(io::Error::other)?,
                None => Position::default(),
            }
        };
        let meta =
            SnapshotMeta { last_log_id: position.last, last_membership: position.membership };
        let mut out = SnapshotWriter::create(&self.shared.snapshots, &meta)?;
        let pairs = txn.open_table(PAIRS).map_err(failed)?;
        for pair in pairs.iter().map_err(failed)? {
            let (key, value) = pair.map_err(failed)?;
            out.pair(key.value(), value.value())?;
        }
        let file = out.finish()?;
        // The log below may go as soon as this is reported.
        persist(&self.shared)?;
        Ok(Snapshot { meta, snapshot: file })
    }
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotFile;

    async fn build_snapshot(
        &mut self,
    ) -> Result<Snapshot<super::LeaderId, u64, openraft::impls::BasicNode, SnapshotFile>, io::Error>
    {
        let builder = Self { shared: Arc::clone(&self.shared) };
        tokio::task::spawn_blocking(move || builder.build()).await.map_err(io::Error::other)?
    }
}

impl RaftStateMachine<TypeConfig> for StateStore {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.position.last, self.position.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut batch = Vec::new();
        while let Some(entry) = entries.next().await {
            batch.push(entry?);
            if batch.len() >= BATCH_ENTRIES_MAX {
                self.apply_batch(std::mem::take(&mut batch))?;
            }
        }
        if batch.is_empty() { Ok(()) } else { self.apply_batch(batch) }
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder { shared: Arc::clone(&self.shared) }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotFile,
    ) -> Result<(), io::Error> {
        self.install(meta, &snapshot)
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<
        Option<Snapshot<super::LeaderId, u64, openraft::impls::BasicNode, SnapshotFile>>,
        io::Error,
    > {
        let Some(file) = snapshot::current(&self.shared.snapshots)? else { return Ok(None) };
        Ok(Some(Snapshot { meta: file.meta()?, snapshot: file }))
    }
}
