//! The persistent state machine: `ebb-namespace` over layers of changes over redb.
//!
//! Applying an entry changes the layers in memory; nothing of it needs to be durable, since the log
//! has it. From time to time all changes go to redb in one durable transaction, together with the
//! last applied log id and the membership ([`StateReader::persist`]), so that the file always is at
//! an entry's boundary; always so before a snapshot is built, because the log up to a snapshot may
//! go. After a crash redb is at its last transaction and openraft applies the log from there.
//!
//! Bounded (I9): past [`CHANGES_SOFT_BYTES`], [`REPLAY_SOFT_BYTES`] or [`ENTRIES_SOFT`] the changes are
//! written out in the background, past [`CHANGES_HARD_BYTES`] applying waits for it.

use super::disk::{self, Disk, Open};
use super::kv::{Base, Moment, Reader, Writer};
use super::layers::Layers;
use super::snapshot::{self, SnapshotFile, SnapshotWriter};
use super::{Applied, Entry, LogId, SnapshotMeta, StoredMembership, TypeConfig};
use crate::leases::LeaseDesk;
use futures::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftStateMachine, Snapshot};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};
use serde::{Deserialize, Serialize};
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::sync::Notify;

/// The namespace's pairs.
pub(super) const PAIRS: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("namespace");
/// Raft's own record.
const RAFT: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("raft");
const APPLIED: &str = "applied";
const FORMAT: &str = "format";
/// Encoding of the pairs and of the log's commands; counts up when a type of either changes.
const FORMAT_VERSION: u32 = 6;
/// The oldest that is read as it is: what came since are records that it has none of.
const FORMAT_READ_MIN: u32 = 5;

/// Entries of one transaction at most.
const BATCH_ENTRIES_MAX: usize = 512;
/// Bytes of changes that are written out in the background.
const CHANGES_SOFT_BYTES: usize = 8 << 20;
/// The same of all changes, also those that others replaced since: with the next one, bounds the replay
/// after a crash.
const REPLAY_SOFT_BYTES: usize = 64 << 20;
/// Entries that are.
const ENTRIES_SOFT: u64 = 10_000;
/// Bytes of changes with which applying waits until they are written out.
const CHANGES_HARD_BYTES: usize = 64 << 20;

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

/// What is applied.
struct State {
    layers: Layers,
    position: Position,
    /// Entries since the layers were last frozen.
    entries: u64,
    /// Writing out failed, or a read did: nothing is applied any more.
    broken: Option<String>,
}

impl State {
    fn usable(&self) -> io::Result<()> {
        match &self.broken {
            Some(why) => Err(io::Error::other(why.clone())),
            None if !self.layers.is_open() => Err(closed()),
            None => Ok(()),
        }
    }
}

struct Shared {
    disk: Arc<dyn Disk>,
    state: RwLock<State>,
    /// `None` once closed. Held while changes are written out, which only one may do.
    database: Mutex<Option<Database>>,
    /// Writing out is due and somebody is on it.
    writing_soon: AtomicBool,
    snapshots: PathBuf,
    /// Something was applied: leader tasks look for work.
    applied: Notify,
    leases: LeaseDesk,
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }
    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
    fn database(&self) -> MutexGuard<'_, Option<Database>> {
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes out what was applied, if anything was. Blocks on disk.
    fn persist(&self) -> io::Result<()> {
        self.persist_into(self.database().as_ref().ok_or_else(closed)?)
    }

    fn persist_into(&self, database: &Database) -> io::Result<()> {
        let (changes, position) = {
            let mut state = self.write();
            state.usable()?;
            if state.entries == 0 {
                return Ok(());
            }
            state.entries = 0;
            (state.layers.freeze(), state.position.clone())
        };
        let written = (|| {
            let txn = begin(database)?;
            {
                let mut pairs = txn.open_table(PAIRS).map_err(failed)?;
                for (key, value) in changes.iter() {
                    match value {
                        Some(value) => {
                            pairs.insert(key.as_slice(), value.as_slice()).map_err(failed)?;
                        }
                        None => {
                            pairs.remove(key.as_slice()).map_err(failed)?;
                        }
                    }
                }
            }
            set_position(&txn, &position)?;
            txn.commit().map_err(failed)?;
            base(database)
        })();
        let mut state = self.write();
        match written {
            Ok(base) => state.layers.replace(base),
            Err(e) => {
                // The frozen layer stays readable, but cannot be made durable.
                state.broken = Some(e.to_string());
                return Err(e);
            }
        }
        Ok(())
    }
}

/// A durable transaction. It leaves behind what opening the file after a crash needs: without that all of the file
/// would be read then, minutes for ten million inodes.
fn begin(database: &Database) -> io::Result<WriteTransaction> {
    let mut txn = database.begin_write().map_err(failed)?;
    txn.set_durability(Durability::Immediate).map_err(failed)?;
    txn.set_quick_repair(true);
    Ok(txn)
}

/// Makes an empty database. It gets its name when it is whole: a half-made one can't be opened.
fn make(disk: &dyn Disk, dir: &Path, path: &Path) -> io::Result<()> {
    let temporary = dir.join("state.tmp");
    match disk.remove(&temporary) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    drop(disk.database(&temporary, 1 << 20).map_err(failed)?);
    disk.rename(&temporary, path)?;
    disk.sync_dir(dir)
}

fn base(database: &Database) -> io::Result<Base> {
    database.begin_read().map_err(failed)?.open_table(PAIRS).map_err(failed)
}

fn set_position(txn: &WriteTransaction, position: &Position) -> io::Result<()> {
    let json = serde_json::to_vec(position).map_err(io::Error::other)?;
    let mut raft = txn.open_table(RAFT).map_err(failed)?;
    raft.insert(APPLIED, json.as_slice()).map_err(failed)?;
    Ok(())
}

fn another_format(dir: &Path) -> io::Error {
    let text = format!(
        "the metadata in {} is of another format than {FORMAT_VERSION}, the one this version of ebb \
         writes: flush and stop the cluster with the version that wrote it, then start it anew from \
         the bucket",
        dir.display()
    );
    io::Error::new(io::ErrorKind::InvalidData, text)
}

fn closed() -> io::Error {
    io::Error::other("the metadata store is closed")
}

/// The state machine. Clones share it.
#[derive(Clone)]
pub struct StateStore {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for StateStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let position = self.shared.read().position.clone();
        f.debug_struct("StateStore").field("position", &position).finish_non_exhaustive()
    }
}

/// Reading the applied state, from anywhere.
#[derive(Clone)]
pub struct StateReader {
    shared: Arc<Shared>,
}

/// The layers of a state that is held for reading.
struct Held<'s>(RwLockReadGuard<'s, State>);
impl Deref for Held<'_> {
    type Target = Layers;
    fn deref(&self) -> &Layers {
        &self.0.layers
    }
}

impl StateReader {
    /// A consistent view of the state as last applied. Nothing is applied while it is held, and a
    /// second one must not be asked for meanwhile.
    pub fn view(&self) -> io::Result<Reader<'_>> {
        let state = self.shared.read();
        state.usable()?;
        let reader = Reader::new(Held(state));
        Ok(if self.shared.leases.has_changes() { reader.watched() } else { reader })
    }

    /// What clients were told of the state.
    pub(crate) fn leases(&self) -> &LeaseDesk {
        &self.shared.leases
    }

    /// The state as last applied, kept while others go on. Blocks on disk.
    pub fn moment(&self) -> io::Result<Moment> {
        let database = self.shared.database();
        let database = database.as_ref().ok_or_else(closed)?;
        self.shared.persist_into(database)?;
        base(database).map(Moment::new)
    }

    /// The last entry that is applied.
    pub fn applied_index(&self) -> u64 {
        self.shared.read().position.last.map_or(0, |last| last.index)
    }

    /// Returns when that entry is applied.
    pub async fn reach(&self, index: u64) {
        loop {
            let applied = self.shared.applied.notified();
            tokio::pin!(applied);
            applied.as_mut().enable();
            if self.applied_index() >= index || self.is_closed() {
                return;
            }
            applied.await;
        }
    }

    /// Wakes when entries were applied.
    pub fn applied(&self) -> &Notify {
        &self.shared.applied
    }

    /// Makes what was applied durable, if anything is not. Blocks on disk.
    pub fn persist(&self) -> io::Result<()> {
        self.shared.persist()
    }

    /// Makes the state durable and lets go of the file. Raft must have stopped. Blocks on disk.
    pub fn close(&self) -> io::Result<()> {
        let mut database = self.shared.database();
        let persisted = match database.as_ref() {
            Some(database) => self.shared.persist_into(database),
            None => Ok(()),
        };
        // The table holds on to the file as the database does.
        self.shared.write().layers = Layers::default();
        drop(database.take());
        self.shared.applied.notify_waiters();
        persisted
    }

    /// Whether [`StateReader::close`] was called.
    pub fn is_closed(&self) -> bool {
        !self.shared.read().layers.is_open()
    }
}

impl StateStore {
    /// Opens or creates the store of a directory. Blocks on disk.
    pub fn open(disk: &Arc<dyn Disk>, dir: &Path, cache_bytes: usize) -> io::Result<Self> {
        let snapshots = dir.join("snapshots");
        disk.create_dirs(&snapshots)?;
        let path = dir.join("state.redb");
        if disk.open(&path, Open::Read).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
            make(&**disk, dir, &path)?;
        }
        let database = disk.database(&path, cache_bytes).map_err(failed)?;
        let txn = begin(&database)?;
        let position = {
            txn.open_table(PAIRS).map_err(failed)?;
            let mut raft = txn.open_table(RAFT).map_err(failed)?;
            let known = raft.get(APPLIED).map_err(failed)?.map(|json| json.value().to_vec());
            let format = raft.get(FORMAT).map_err(failed)?.map(|f| f.value().to_vec());
            let current = FORMAT_VERSION.to_le_bytes();
            let readable = |f: &[u8]| {
                let version = f.try_into().map(u32::from_le_bytes);
                version.is_ok_and(|v| (FORMAT_READ_MIN..=FORMAT_VERSION).contains(&v))
            };
            if format.as_deref().is_some_and(|f| !readable(f))
                || known.is_some() && format.is_none()
            {
                return Err(another_format(dir));
            }
            raft.insert(FORMAT, current.as_slice()).map_err(failed)?;
            match known {
                Some(json) => serde_json::from_slice(&json).map_err(io::Error::other)?,
                None => Position::default(),
            }
        };
        txn.commit().map_err(failed)?;
        let layers = Layers::new(base(&database)?);
        let state = State { layers, position, entries: 0, broken: None };
        let shared = Shared {
            disk: Arc::clone(disk),
            state: RwLock::new(state),
            database: Mutex::new(Some(database)),
            writing_soon: AtomicBool::new(false),
            snapshots,
            applied: Notify::new(),
            leases: LeaseDesk::new(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// A handle for reading.
    pub fn reader(&self) -> StateReader {
        StateReader { shared: Arc::clone(&self.shared) }
    }

    /// Has a snapshot of what the log lacks, and builds one if the state is ahead of both. Before Raft starts, which
    /// has the log begin behind the state then. (What a majority has is applied, and may be durable here as state,
    /// before this voter's own log is; and a snapshot that arrives is the state's first.) Blocks on disk.
    pub fn cover(&self, log: Option<LogId>) -> io::Result<()> {
        let applied = self.shared.read().position.last;
        if log >= applied {
            return Ok(());
        }
        let current = snapshot::current(&self.shared.disk, &self.shared.snapshots)?;
        let covered = current.map(|file| file.meta()).transpose()?.and_then(|m| m.last_log_id);
        if covered < applied {
            SnapshotBuilder { shared: Arc::clone(&self.shared) }.build()?;
        }
        Ok(())
    }

    /// Where snapshots live, arriving ones too.
    pub fn snapshot_dir(&self) -> PathBuf {
        self.shared.snapshots.clone()
    }

    /// Applies a batch, then answers.
    fn apply_batch(&self, batch: Vec<EntryResponder<TypeConfig>>) -> io::Result<()> {
        let mut answers = Vec::with_capacity(batch.len());
        let ((bytes, replay), entries) = {
            let mut guard = self.shared.write();
            let state = &mut *guard;
            state.usable()?;
            let mut writer = Writer::new(&mut state.layers, &self.shared.leases);
            for (entry, responder) in batch {
                let Entry { log_id, payload } = entry;
                let applied = match payload {
                    EntryPayload::Blank => Applied::default(),
                    EntryPayload::Membership(m) => {
                        state.position.membership = StoredMembership::new(Some(log_id), m);
                        Applied::default()
                    }
                    EntryPayload::Normal(p) => {
                        let (replies, waits) = writer.apply(p.entry());
                        Applied { replies, waits }
                    }
                };
                state.position.last = Some(log_id);
                state.entries += 1;
                answers.push((responder, applied));
            }
            if let Err(e) = writer.finish() {
                state.broken = Some(e.to_string());
                return Err(e);
            }
            (state.layers.recent_bytes(), state.entries)
        };
        for (responder, applied) in answers {
            if let Some(responder) = responder {
                responder.send(applied);
            }
        }
        self.shared.applied.notify_waiters();
        self.persist_when_due(bytes, replay, entries)
    }

    fn persist_when_due(&self, bytes: usize, replay: usize, entries: u64) -> io::Result<()> {
        if bytes >= CHANGES_HARD_BYTES {
            return self.shared.persist();
        }
        let due =
            bytes >= CHANGES_SOFT_BYTES || replay >= REPLAY_SOFT_BYTES || entries >= ENTRIES_SOFT;
        if due && !self.shared.writing_soon.swap(true, Ordering::AcqRel) {
            let shared = Arc::clone(&self.shared);
            tokio::task::spawn_blocking(move || {
                // A failure is kept in the state and stops the next batch.
                if let Err(e) = shared.persist() {
                    tracing::error!(error = %e, "the metadata store failed");
                }
                shared.writing_soon.store(false, Ordering::Release);
            });
        }
        Ok(())
    }

    fn install(&self, meta: &SnapshotMeta, file: &SnapshotFile) -> io::Result<()> {
        let position =
            Position { last: meta.last_log_id, membership: meta.last_membership.clone() };
        let guard = self.shared.database();
        let database = guard.as_ref().ok_or_else(closed)?;
        let txn = begin(database)?;
        txn.delete_table(PAIRS).map_err(failed)?;
        {
            let mut pairs = txn.open_table(PAIRS).map_err(failed)?;
            file.read_pairs(|key, value| pairs.insert(key, value).map(drop).map_err(failed))?;
        }
        set_position(&txn, &position)?;
        txn.commit().map_err(failed)?;
        let layers = Layers::new(base(database)?);
        *self.shared.write() = State { layers, position, entries: 0, broken: None };
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
    fn build(&self) -> io::Result<Snapshot<super::LeaderId, u64, super::VoterNode, SnapshotFile>> {
        let txn = {
            let database = self.shared.database();
            let database = database.as_ref().ok_or_else(closed)?;
            // The log below may go as soon as this is reported.
            self.shared.persist_into(database)?;
            database.begin_read().map_err(failed)?
        };
        let position: Position = {
            let raft = txn.open_table(RAFT).map_err(failed)?;
            match raft.get(APPLIED).map_err(failed)? {
                Some(json) => serde_json::from_slice(json.value()).map_err(io::Error::other)?,
                None => Position::default(),
            }
        };
        let meta =
            SnapshotMeta { last_log_id: position.last, last_membership: position.membership };
        let mut out = SnapshotWriter::create(&self.shared.disk, &self.shared.snapshots, &meta)?;
        let pairs = txn.open_table(PAIRS).map_err(failed)?;
        for pair in pairs.iter().map_err(failed)? {
            let (key, value) = pair.map_err(failed)?;
            out.pair(key.value(), value.value())?;
        }
        let file = out.finish()?;
        Ok(Snapshot { meta, snapshot: file })
    }
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotFile;

    async fn build_snapshot(
        &mut self,
    ) -> Result<Snapshot<super::LeaderId, u64, super::VoterNode, SnapshotFile>, io::Error> {
        let builder = Self { shared: Arc::clone(&self.shared) };
        disk::work(&*self.shared.disk, move || builder.build()).await?
    }
}

impl RaftStateMachine<TypeConfig> for StateStore {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let state = self.shared.read();
        Ok((state.position.last, state.position.membership.clone()))
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
        // Long for a large state, and heartbeats are answered meanwhile.
        let (store, meta) = (Self { shared: Arc::clone(&self.shared) }, meta.clone());
        disk::work(&*self.shared.disk, move || store.install(&meta, &snapshot)).await?
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<Snapshot<super::LeaderId, u64, super::VoterNode, SnapshotFile>>, io::Error>
    {
        let Some(file) = snapshot::current(&self.shared.disk, &self.shared.snapshots)? else {
            return Ok(None);
        };
        Ok(Some(Snapshot { meta: file.meta()?, snapshot: file }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_another_format_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().expect("directory");
        let disk: Arc<dyn Disk> = Arc::new(disk::Machine);
        let cache = 4 << 20;
        drop(StateStore::open(&disk, dir.path(), cache).expect("new"));
        drop(StateStore::open(&disk, dir.path(), cache).expect("its own"));
        let database = Database::create(dir.path().join("state.redb")).expect("opens");
        let txn = database.begin_write().expect("writes");
        {
            let mut raft = txn.open_table(RAFT).expect("table");
            raft.insert(FORMAT, 1u32.to_le_bytes().as_slice()).expect("sets");
        }
        txn.commit().expect("commits");
        drop(database);
        let refused = StateStore::open(&disk, dir.path(), cache).expect_err("another format");
        let expected = format!("another format than {FORMAT_VERSION}");
        assert!(refused.to_string().contains(&expected), "{refused}");
    }
}
