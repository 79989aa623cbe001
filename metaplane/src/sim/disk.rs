//! A disk that loses power. What was written and not synced survives in part: of every file some of the 512-byte
//! sectors of each write, of every directory the first few changes of its names. Power goes between two operations or
//! in the middle of one, which then has happened in part and fails; everything after it fails too.
//!
//! A [`Lie`] takes one of the promises back, to see whether anybody notices.

use super::dice::Dice;
use crate::raft::disk::{Disk, DiskFile, Open};
use redb::{Database, DatabaseError, StorageBackend};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const SECTOR: u64 = 512;

/// A promise that the disk breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lie {
    /// Synced parts of the log are lost all the same.
    Log,
    /// So is a synced vote.
    Vote,
    /// So is the state.
    State,
    /// So is a snapshot that was received, or built.
    Snapshot,
    /// So are both of these, of which one is enough to go on from where the log begins.
    StateAndSnapshot,
}

impl Lie {
    fn is_about(self, path: &Path) -> bool {
        let ends = |with: &str| path.to_string_lossy().ends_with(with);
        match self {
            Self::Log => ends(".log"),
            Self::Vote => ends("/vote"),
            Self::State => ends(".redb"),
            Self::Snapshot => ends(".snapshot"),
            Self::StateAndSnapshot => ends(".redb") || ends(".snapshot"),
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Content {
    /// As it is read.
    now: Vec<u8>,
    /// As it was at the last sync.
    synced: Vec<u8>,
    /// What was done since: writes, and lengths that were set.
    since: Vec<(u64, Change)>,
}

#[derive(Clone, Debug)]
enum Change {
    Write(Vec<u8>),
    Length,
}

fn write(into: &mut Vec<u8>, at: u64, bytes: &[u8]) {
    let end = at as usize + bytes.len();
    if into.len() < end {
        into.resize(end, 0);
    }
    into[at as usize..end].copy_from_slice(bytes);
}

impl Content {
    fn write(&mut self, at: u64, bytes: &[u8]) {
        write(&mut self.now, at, bytes);
        self.since.push((at, Change::Write(bytes.to_vec())));
    }

    fn sync(&mut self) {
        for (at, change) in std::mem::take(&mut self.since) {
            match change {
                Change::Write(bytes) => write(&mut self.synced, at, &bytes),
                Change::Length => self.synced.resize(at as usize, 0),
            }
        }
    }

    /// Keeps what was synced and a part of the rest. `true`: a write was torn.
    fn lose_power(&mut self, dice: &Dice) -> bool {
        let mut torn = false;
        // A database writes its pages in an order that differs from run to run, between two syncs.
        self.since.sort_by_key(|(at, change)| (matches!(change, Change::Write(_)), *at));
        for (at, change) in std::mem::take(&mut self.since) {
            let Change::Write(bytes) = change else {
                if dice.chance(0.5) {
                    self.synced.resize(at as usize, 0);
                }
                continue;
            };
            // Mostly all or nothing; else each sector for itself.
            let odds = [0.0, 0.0, 1.0, 0.5, 0.9][dice.below(5) as usize];
            let (mut from, end) = (at, at + bytes.len() as u64);
            let mut kept = 0;
            while from < end {
                let to = ((from / SECTOR + 1) * SECTOR).min(end);
                if odds == 1.0 || odds > 0.0 && dice.chance(odds) {
                    write(&mut self.synced, from, &bytes[(from - at) as usize..(to - at) as usize]);
                    kept += to - from;
                }
                from = to;
            }
            torn |= kept > 0 && kept < bytes.len() as u64;
        }
        self.now.clone_from(&self.synced);
        torn
    }
}

/// A change of a directory.
#[derive(Clone, Debug)]
enum Entry {
    Set(PathBuf, u64),
    Gone(PathBuf),
}

impl Entry {
    fn apply(&self, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            Self::Set(path, file) => drop(names.insert(path.clone(), *file)),
            Self::Gone(path) => drop(names.remove(path)),
        }
    }
}

/// What is on the device.
#[derive(Debug, Default)]
struct Platter {
    files: BTreeMap<u64, Content>,
    next: u64,
    dirs: BTreeSet<PathBuf>,
    names: BTreeMap<PathBuf, u64>,
    synced_names: BTreeMap<PathBuf, u64>,
    /// Changes since, each a group that happens as one (a rename).
    since: Vec<(PathBuf, Vec<Entry>)>,
}

impl Platter {
    fn change(&mut self, dir: &Path, entries: Vec<Entry>) {
        entries.iter().for_each(|e| e.apply(&mut self.names));
        self.since.push((dir.to_owned(), entries));
    }

    fn path_of(&self, file: u64) -> Option<&PathBuf> {
        self.names.iter().find(|(_, f)| **f == file).map(|(path, _)| path)
    }
}

/// A device, whoever uses it.
#[derive(Clone, Debug, Default)]
pub(super) struct Device(Arc<Mutex<Platter>>);

impl Device {
    fn lock(&self) -> MutexGuard<'_, Platter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is left when the power is back. Says how many writes were torn.
    pub(super) fn lose_power(&self, dice: &Dice, lie: Option<Lie>) -> u64 {
        let platter = &mut *self.lock();
        let mut stopped = BTreeSet::new();
        for (dir, entries) in std::mem::take(&mut platter.since) {
            // A journal of names keeps their order.
            let lied = |e: &Entry| match e {
                Entry::Set(path, _) => lie.is_some_and(|l| l != Lie::Log && l.is_about(path)),
                Entry::Gone(_) => false,
            };
            if stopped.contains(&dir) || dice.chance(0.5) || entries.iter().any(lied) {
                stopped.insert(dir);
            } else {
                entries.iter().for_each(|e| e.apply(&mut platter.synced_names));
            }
        }
        platter.names = platter.synced_names.clone();
        let kept: BTreeSet<u64> = platter.names.values().copied().collect();
        platter.files.retain(|file, _| kept.contains(file));
        platter.files.values_mut().map(|f| u64::from(f.lose_power(dice))).sum()
    }

    /// Everything is lost. Whether there was anything.
    pub(super) fn wipe(&self) {
        *self.lock() = Platter::default();
    }

    /// Removes a directory's files.
    pub(super) fn wipe_dir(&self, dir: &Path) {
        let platter = &mut *self.lock();
        platter.names.retain(|path, _| !path.starts_with(dir));
        platter.synced_names.retain(|path, _| !path.starts_with(dir));
    }
}

/// The power of one life of a node.
#[derive(Debug)]
pub(super) struct Power {
    on: AtomicBool,
    /// Operations until it goes; 0: no end is known.
    left: AtomicU64,
}

impl Power {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { on: AtomicBool::new(true), left: AtomicU64::new(0) })
    }
    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }
    pub(super) fn cut(&self) {
        self.on.store(false, Ordering::SeqCst);
    }
    /// It goes in the middle of that operation, counted from 1.
    pub(super) fn cut_after(&self, operations: u64) {
        self.left.store(operations, Ordering::SeqCst);
    }
    /// Whether the next operation is carried out; the last one fails after it has begun.
    fn spend(&self) -> io::Result<bool> {
        if !self.is_on() {
            return Err(gone());
        }
        let left = self.left.load(Ordering::SeqCst);
        if left > 0 {
            self.left.store(left - 1, Ordering::SeqCst);
            if left == 1 {
                self.cut();
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn gone() -> io::Error {
    io::Error::other("no power")
}

fn absent(path: &Path) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("no {}", path.display()))
}

/// A device as one life of a node uses it.
#[derive(Clone, Debug)]
pub(super) struct SimDisk {
    pub(super) device: Device,
    pub(super) power: Arc<Power>,
    pub(super) dice: Dice,
    pub(super) lie: Option<Lie>,
    /// Whether writes can go past the cache.
    pub(super) direct: bool,
    /// The longest that work takes.
    pub(super) slow_ms: Arc<AtomicU64>,
}

impl SimDisk {
    /// Does an operation, if there is power; without power in its middle it still happens, unsynced.
    fn operation<T>(&self, does: impl FnOnce(&mut Platter) -> io::Result<T>) -> io::Result<T> {
        let survives = self.power.spend()?;
        let done = does(&mut self.device.lock());
        if survives { done } else { Err(gone()) }
    }

    /// The same for what makes stable: without power in its middle it did not happen.
    fn barrier(&self, does: impl FnOnce(&mut Platter)) -> io::Result<()> {
        if !self.power.spend()? {
            return Err(gone());
        }
        does(&mut self.device.lock());
        Ok(())
    }
}

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    file: u64,
    stable: bool,
    /// Of a database: power is lost between its syncs, not in the middle of a write, so that a run can be replayed.
    paged: bool,
}

impl SimFile {
    fn make_stable(&self) -> io::Result<()> {
        self.disk.barrier(|p| {
            let lied =
                self.disk.lie.zip(p.path_of(self.file)).is_some_and(|(l, at)| l.is_about(at));
            if !lied {
                p.files.entry(self.file).or_default().sync();
            }
        })
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, into: &mut [u8], at: u64) -> io::Result<()> {
        self.disk.power.is_on().then_some(()).ok_or_else(gone)?;
        let platter = self.disk.device.lock();
        let now = &platter.files.get(&self.file).ok_or_else(gone)?.now;
        let end = at as usize + into.len();
        let found = now.get(at as usize..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(found);
        Ok(())
    }
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let write = |p: &mut Platter| {
            p.files.entry(self.file).or_default().write(at, bytes);
            Ok(())
        };
        if self.paged {
            self.disk.power.is_on().then_some(()).ok_or_else(gone)?;
            return write(&mut self.disk.device.lock());
        }
        self.disk.operation(write)?;
        if self.stable { self.make_stable() } else { Ok(()) }
    }
    fn sync(&self) -> io::Result<()> {
        self.make_stable()
    }
    fn sync_data(&self) -> io::Result<()> {
        self.make_stable()
    }
    fn bytes(&self) -> io::Result<u64> {
        self.disk.power.is_on().then_some(()).ok_or_else(gone)?;
        Ok(self.disk.device.lock().files.get(&self.file).map_or(0, |f| f.now.len() as u64))
    }
}

impl StorageBackend for SimFile {
    fn len(&self) -> io::Result<u64> {
        self.bytes()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.read_at(out, offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.power.is_on().then_some(()).ok_or_else(gone)?;
        let mut platter = self.disk.device.lock();
        let file = platter.files.entry(self.file).or_default();
        file.now.resize(len as usize, 0);
        file.since.push((len, Change::Length));
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        self.make_stable()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_at(data, offset)
    }
}

fn dir_of(path: &Path) -> PathBuf {
    path.parent().map(Path::to_owned).unwrap_or_default()
}

impl SimDisk {
    fn file(&self, path: &Path, how: Open) -> io::Result<SimFile> {
        let stable = how == Open::Stable;
        if stable && !self.direct {
            return Err(io::Error::from_raw_os_error(nix::errno::Errno::EINVAL as i32));
        }
        let found = self.device.lock().names.get(path).copied();
        let file = match (how, found) {
            (Open::Create, Some(file)) => self.operation(|p| {
                let content = p.files.entry(file).or_default();
                content.now.clear();
                content.since.push((0, Change::Length));
                Ok(file)
            })?,
            (Open::Create, None) => self.operation(|p| {
                p.next += 1;
                let file = p.next;
                p.files.insert(file, Content::default());
                p.change(&dir_of(path), vec![Entry::Set(path.to_owned(), file)]);
                Ok(file)
            })?,
            (_, Some(file)) => file,
            (_, None) => return Err(absent(path)),
        };
        Ok(SimFile { disk: self.clone(), file, stable, paged: false })
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn DiskFile>> {
        self.power.is_on().then_some(()).ok_or_else(gone)?;
        Ok(Arc::new(self.file(path, how)?))
    }
    fn create_dirs(&self, dir: &Path) -> io::Result<()> {
        self.operation(|p| {
            p.dirs.extend(dir.ancestors().map(Path::to_owned));
            Ok(())
        })
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.power.is_on().then_some(()).ok_or_else(gone)?;
        let platter = self.device.lock();
        if !platter.dirs.contains(dir) {
            return Err(absent(dir));
        }
        let within = platter.names.keys().chain(&platter.dirs).filter(|p| p.parent() == Some(dir));
        let sorted: BTreeSet<PathBuf> = within.cloned().collect();
        Ok(sorted.into_iter().collect())
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.operation(|p| {
            let file = p.names.get(from).copied().ok_or_else(|| absent(from))?;
            let entries = vec![Entry::Gone(from.to_owned()), Entry::Set(to.to_owned(), file)];
            p.change(&dir_of(to), entries);
            Ok(())
        })
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.operation(|p| {
            if !p.names.contains_key(path) {
                return Err(absent(path));
            }
            p.change(&dir_of(path), vec![Entry::Gone(path.to_owned())]);
            Ok(())
        })
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.barrier(|p| {
            let lie = self.lie.filter(|l| *l != Lie::Log);
            let (done, left) =
                std::mem::take(&mut p.since).into_iter().partition(|(of, entries)| {
                    let lied = |e: &Entry| match e {
                        Entry::Set(path, _) => lie.is_some_and(|l| l.is_about(path)),
                        Entry::Gone(_) => false,
                    };
                    of == dir && !entries.iter().any(lied)
                });
            let done: Vec<(PathBuf, Vec<Entry>)> = done;
            done.iter().flat_map(|d| &d.1).for_each(|e| e.apply(&mut p.synced_names));
            p.since = left;
        })
    }
    fn database(&self, path: &Path, cache_bytes: usize) -> Result<Database, DatabaseError> {
        let file = self.file(path, Open::Write);
        let file = SimFile { paged: true, ..file.or_else(|_| self.file(path, Open::Create))? };
        Database::builder().set_cache_size(cache_bytes).create_with_backend(file)
    }
    fn takes(&self) -> Option<Duration> {
        let most = self.slow_ms.load(Ordering::SeqCst).max(1);
        // Mostly quick, so that what takes long is overtaken.
        let ms = if self.dice.chance(0.7) { self.dice.below(2) } else { self.dice.below(most) };
        Some(Duration::from_millis(ms))
    }
}
