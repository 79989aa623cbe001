//! Files that are made here and told later (docs/PROTOCOL.md, R49 to R51).
//!
//! In a directory whose names are delegated to this client it answers a create by itself: it takes one
//! of the files without a name that the metadata plane made for it ahead, open and dirty (I2), and
//! tells the name with the file's first commit, in one log entry. Nobody is told otherwise meanwhile:
//! who else wants to know a name there waits until the delegation is given back, which happens when
//! it was not used for a turn, or as soon as an answer says that it is wanted.
//!
//! Whatever asks the metadata plane for names here tells it of the files first. What a file is called
//! is lost with the session, as is what was written and not committed: no fsync or close succeeded.

use crate::OpenFlags;
use crate::Result;
use crate::error::ClientError;
use crate::files::{FileHandle, OpenedFile};
use crate::fs::{FileSystem, Owner, Shared};
use crate::inode::{OpenInode, Remote};
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::attr::{Attr, SetAttr, Time, TimeChange};
use ebb_metaplane_protocol::op::{Delegation, Opened, RESERVED_MAX, RETURNS_MAX};
use ebb_metaplane_protocol::{FsError, Op, OpReply};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// With fewer files in reserve, more are asked for.
const RESERVE_LOW: usize = 24;
/// What nobody has taken for so long is given up: a reserve counts as dirt where it may be written.
const RESERVE_AGE_MAX: Duration = Duration::from_secs(2);
/// Directories whose names this client holds at most; further ones are given back at once.
const HELD_MAX: usize = 1_024;

/// Where a file without a name belongs.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) parent: InodeId,
    pub(crate) name: Vec<u8>,
}

/// Which of the files that only this client knows of.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Which<'a> {
    All,
    In(InodeId),
    Name(InodeId, &'a [u8]),
    /// In whatever directory.
    Called(&'a [u8]),
}

/// A directory whose names are this client's.
struct Held {
    stamp: u64,
    name_bytes_max: usize,
    /// Its attributes, as its user shall see them.
    attr: Option<Attr>,
    used: Instant,
    /// It is wanted back: nothing new is made here.
    recalled: bool,
}

#[derive(Default)]
struct State {
    /// Of which session all this is.
    epoch: u64,
    reserve: VecDeque<Opened>,
    reserving: bool,
    taken: Option<Instant>,
    held: HashMap<InodeId, Held>,
    /// The latest delegation that was given back: answers may come late.
    returned: u64,
    /// To be given back.
    due: Vec<(InodeId, u64)>,
    /// Made here, and not told: by directory and name.
    files: BTreeMap<(InodeId, Vec<u8>), Arc<OpenInode>>,
}

impl State {
    /// What there is of a session; nothing of an earlier one, which took it along.
    fn of(&mut self, epoch: u64) -> Option<&mut Self> {
        if self.epoch < epoch {
            *self = Self { epoch, ..Self::default() };
        }
        (self.epoch == epoch).then_some(self)
    }

    fn files(&self, which: Which<'_>) -> Vec<Arc<OpenInode>> {
        match which {
            Which::All => self.files.values().cloned().collect(),
            Which::In(dir) => self.files_in(dir).cloned().collect(),
            Which::Name(dir, name) => {
                self.files.get(&(dir, name.to_vec())).cloned().into_iter().collect()
            }
            Which::Called(name) => {
                let called = self.files.iter().filter(|((_, n), _)| n == name);
                called.map(|(_, file)| Arc::clone(file)).collect()
            }
        }
    }

    fn files_in(&self, dir: InodeId) -> impl Iterator<Item = &Arc<OpenInode>> {
        let from = self.files.range((dir, Vec::new())..);
        from.take_while(move |((d, _), _)| *d == dir).map(|(_, file)| file)
    }

    /// What is to be given back now: what is wanted, or was not used for `idle`, and has no untold files.
    fn due(&mut self, idle: Duration) -> Vec<(InodeId, u64)> {
        let over = |h: &Held| h.recalled || h.used.elapsed() >= idle;
        let ended: Vec<InodeId> =
            self.held.iter().filter(|(_, h)| over(h)).map(|(dir, _)| *dir).collect();
        for dir in ended {
            if self.files_in(dir).next().is_some() {
                continue;
            }
            if let Some(held) = self.held.remove(&dir) {
                self.returned = self.returned.max(held.stamp);
                self.due.push((dir, held.stamp));
            }
        }
        std::mem::take(&mut self.due)
    }
}

/// What is made here and not told, and what that takes.
#[derive(Default)]
pub(crate) struct Unnamed(Mutex<State>);

impl Unnamed {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file has its name, or never will.
    pub(crate) fn done(&self, place: &Place) {
        self.state().files.remove(&(place.parent, place.name.clone()));
    }

    /// How many files nobody else knows of.
    pub(crate) fn len(&self) -> usize {
        self.state().files.len()
    }

    /// What an answer says of a directory that this client names files in: its attributes, and whether
    /// its names are wanted back.
    pub(crate) fn told(&self, epoch: u64, dir: InodeId, attr: Option<&Attr>, wanted: bool) {
        let mut state = self.state();
        let Some(held) = state.of(epoch).and_then(|s| s.held.get_mut(&dir)) else { return };
        held.recalled |= wanted;
        held.see(attr);
    }

    /// The answer to a create, sent at `sent` in the session of `epoch`, delegates the directory's names.
    pub(crate) fn delegated(
        &self,
        epoch: u64,
        dir: InodeId,
        given: Delegation,
        attr: Option<&Attr>,
        wanted: bool,
    ) {
        let mut state = self.state();
        let Some(state) = state.of(epoch) else { return };
        if let Some(held) = state.held.get_mut(&dir).filter(|h| h.stamp == given.stamp) {
            held.recalled |= wanted;
            held.used = Instant::now();
            held.see(attr);
            return;
        }
        // An answer that was overtaken by the return, or one delegation too many.
        if given.stamp <= state.returned || wanted || state.held.len() >= HELD_MAX {
            state.due.push((dir, given.stamp));
            return;
        }
        let held = Held {
            stamp: given.stamp,
            name_bytes_max: given.name_bytes_max as usize,
            attr: attr.cloned(),
            used: Instant::now(),
            recalled: false,
        };
        state.held.insert(dir, held);
    }
}

impl Held {
    /// Later attributes, as the metadata plane has them: never older than what was shown.
    fn see(&mut self, attr: Option<&Attr>) {
        let Some(told) = attr else { return };
        let shown = self.attr.as_ref().map(|a| a.ctime);
        let mut next = told.clone();
        if let Some(shown) = shown.filter(|s| *s > next.ctime) {
            (next.ctime, next.mtime) = (shown, shown.max(next.mtime));
        }
        self.attr = Some(next);
    }

    /// A name was added.
    fn touch(&mut self, now: Time) -> Option<Attr> {
        self.used = Instant::now();
        let attr = self.attr.as_mut()?;
        attr.ctime = now.max(Time(attr.ctime.0 + 1));
        attr.mtime = attr.ctime;
        Some(attr.clone())
    }
}

impl FileSystem {
    /// The directory in which an open file gets its name with its next commit; `None`: it has its name.
    pub fn unnamed_in(&self, handle: FileHandle) -> Option<InodeId> {
        self.file(handle).ok()?.inode.state().place.as_ref().map(|p| p.parent)
    }

    /// Attributes of a directory in which this client alone makes names.
    pub fn own_directory(&self, dir: InodeId) -> Option<Attr> {
        self.shared.unnamed.state().held.get(&dir)?.attr.clone()
    }

    /// Makes a file that the metadata plane hears of with its first commit. `None`: it has to be asked.
    pub(crate) fn create_unnamed(
        &self,
        parent: InodeId,
        name: &[u8],
        mode: u32,
        owner: Owner,
        flags: OpenFlags,
    ) -> Option<Result<OpenedFile>> {
        let cluster = &self.shared.cluster;
        let (_, epoch) = cluster.session.current();
        let mut state = self.shared.unnamed.state();
        let unnamed = state.of(epoch)?;
        let held = unnamed.held.get_mut(&parent).filter(|h| !h.recalled)?;
        if name.len() > held.name_bytes_max || !is_name(name) || !flags.write {
            return None;
        }
        let spare = unnamed.reserve.pop_front()?;
        // Under the lock: of two that make one name, the other finds it taken and this file in `files`.
        if !cluster.names.claim(epoch, parent, name) {
            unnamed.reserve.push_front(spare);
            return None;
        }
        let now = crate::now();
        let directory = held.touch(now);
        unnamed.taken = Some(Instant::now());
        let low = unnamed.reserve.len() < RESERVE_LOW;
        let attr = Attr {
            mode: mode & 0o7777,
            uid: owner.uid,
            gid: owner.gid,
            nlink: 1,
            atime: now,
            mtime: now,
            ..spare.attr.clone()
        };
        let inode = attr.inode;
        let spare = Opened { attr, parent: directory, ..spare };
        let opened = self.opened((OpReply::Opened(Box::new(spare)), epoch), flags);
        let opened = opened.map(|mut file| {
            if let Some(open) = self.shared.inode(inode) {
                {
                    let mut s = open.state();
                    s.place = Some(Place { parent, name: name.to_vec() });
                    s.mtime = Some(now);
                    s.set = SetAttr { atime: Some(TimeChange::At(now)), ..SetAttr::default() };
                    s.note_uncommitted();
                    file.attr = s.effective();
                }
                unnamed.files.insert((parent, name.to_vec()), open);
            }
            file
        });
        drop(state);
        if low {
            self.shared.reserve_files();
        }
        Some(opened)
    }

    /// Tells the metadata plane of files made here that it doesn't know of.
    /// One that can't be told says so to its own user.
    pub(crate) async fn tell(&self, which: Which<'_>) -> Result<()> {
        self.shared.tell(which).await
    }

    /// Everything that was made in a directory is durable.
    pub async fn fsync_dir(&self, dir: InodeId) -> Result<()> {
        self.tell(Which::In(dir)).await
    }

    /// Files that nobody else knows of yet.
    pub fn unnamed_files(&self) -> usize {
        self.shared.unnamed.len()
    }
}

/// What may be a name anywhere but in the root (which is never delegated): S3 keys are UTF-8.
fn is_name(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && !name.contains(&b'/')
        && !name.contains(&0)
        && std::str::from_utf8(name).is_ok()
}

impl Shared {
    /// Asks for more files without a name, unless that is under way.
    pub(crate) fn reserve_files(self: &Arc<Self>) {
        let (_, epoch) = self.cluster.session.current();
        {
            let mut state = self.unnamed.state();
            let Some(state) = state.of(epoch) else { return };
            if std::mem::replace(&mut state.reserving, true) {
                return;
            }
            state.taken = Some(Instant::now());
        }
        let shared = Arc::clone(self);
        self.runtime.spawn(async move {
            let op = Op::Reserve { files: RESERVED_MAX };
            let made = shared.cluster.mutate(op, Some(epoch)).await;
            let mut state = shared.unnamed.state();
            let Some(state) = state.of(epoch) else { return };
            state.reserving = false;
            match made {
                Ok((OpReply::Reserved(files), _)) => state.reserve.extend(files),
                Ok(_) => {}
                // Creates go the ordinary way meanwhile.
                Err(e) => tracing::debug!(error = %e, "no files in reserve"),
            }
        });
    }

    /// The same if there are few.
    pub(crate) fn reserve_files_if_low(self: &Arc<Self>) {
        if self.unnamed.state().reserve.len() < RESERVE_LOW {
            self.reserve_files();
        }
    }

    pub(crate) async fn tell(&self, which: Which<'_>) -> Result<()> {
        let files = {
            let state = self.unnamed.state();
            if state.files.is_empty() {
                return Ok(());
            }
            state.files(which)
        };
        let told = futures::future::join_all(files.iter().map(|f| f.commit())).await;
        told.into_iter().find(Result::is_err).unwrap_or(Ok(()))
    }

    /// Once a turn: tells of what nobody closed, gives back what is wanted or not used.
    pub(crate) fn look_after_names(self: &Arc<Self>, turn: Duration) {
        let (_, epoch) = self.cluster.session.current();
        let (files, idle) = {
            let mut state = self.unnamed.state();
            let Some(state) = state.of(epoch) else { return };
            let old = |f: &Arc<OpenInode>| {
                let since = f.state().uncommitted_since;
                // Who is at it now will have told of it, or it is tried again next turn.
                since.is_some_and(|since| since.elapsed() >= turn)
                    && f.committing.try_lock().is_ok()
            };
            let mut files = state.files(Which::All);
            files.retain(old);
            let idle = state.taken.is_some_and(|at| at.elapsed() >= RESERVE_AGE_MAX);
            let given_up = if idle { std::mem::take(&mut state.reserve) } else { VecDeque::new() };
            (files, given_up)
        };
        for file in idle {
            self.linger(Remote { handle: file.handle, epoch });
        }
        for file in files {
            self.runtime.spawn(async move {
                if let Err(e) = file.commit().await {
                    tracing::debug!(inode = file.id.0, error = %e, "a file has no name yet");
                }
            });
        }
        self.give_back(turn);
    }

    /// Gives back the directories that are wanted, or were not used for `idle`, and have no untold files.
    fn give_back(self: &Arc<Self>, idle: Duration) {
        let (epoch, due) = self.due(idle);
        if !due.is_empty() {
            let shared = Arc::clone(self);
            self.runtime.spawn(async move { shared.return_names(epoch, due).await });
        }
    }

    fn due(&self, idle: Duration) -> (u64, Vec<(InodeId, u64)>) {
        let (_, epoch) = self.cluster.session.current();
        let mut state = self.unnamed.state();
        let due = state.of(epoch).map_or(Vec::new(), |state| state.due(idle));
        (epoch, due)
    }

    async fn return_names(&self, epoch: u64, due: Vec<(InodeId, u64)>) {
        for part in due.chunks(RETURNS_MAX) {
            let op = Op::ReturnNames { dirs: part.to_vec() };
            match self.cluster.mutate(op, Some(epoch)).await {
                // With the session they are back anyway.
                Ok(_) | Err(ClientError::Fs(FsError::SessionExpired)) => {}
                Err(e) => {
                    tracing::debug!(error = %e, "names are given back next time");
                    if let Some(state) = self.unnamed.state().of(epoch) {
                        state.due.extend_from_slice(part);
                    }
                }
            }
        }
    }

    /// Somebody else wants the names of a directory: tells them all, and gives it back.
    pub(crate) fn recalled(self: &Arc<Self>, dir: InodeId) {
        let shared = Arc::clone(self);
        self.runtime.spawn(async move {
            // A file that can't be told now is tried again next turn.
            let _ = shared.tell(Which::In(dir)).await;
            shared.give_back(Duration::MAX);
        });
    }

    /// Gives all names back: a directory is about to go, and nothing must be made in it from now on.
    pub(crate) async fn give_back_all(&self) {
        {
            let mut state = self.unnamed.state();
            if state.held.is_empty() {
                return;
            }
            state.held.values_mut().for_each(|h| h.recalled = true);
        }
        let _ = self.tell(Which::All).await;
        let (epoch, due) = self.due(Duration::MAX);
        self.return_names(epoch, due).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIR: InodeId = InodeId(7);

    fn given(stamp: u64) -> Delegation {
        Delegation { stamp, name_bytes_max: 255 }
    }

    fn due(unnamed: &Unnamed, epoch: u64, idle: Duration) -> Vec<(InodeId, u64)> {
        unnamed.state().of(epoch).map_or(Vec::new(), |s| s.due(idle))
    }

    #[test]
    fn a_delegation_that_nobody_here_believes_in_is_given_back() {
        let u = Unnamed::default();
        u.delegated(1, DIR, given(5), None, false);
        assert!(due(&u, 1, Duration::MAX).is_empty(), "it may be used");
        assert_eq!(due(&u, 1, Duration::ZERO), [(DIR, 5)], "it was not used");
        // An answer from before the return was on its way for long: the metadata plane may have
        // heard of the return, or not.
        u.delegated(1, DIR, given(5), None, false);
        assert_eq!(due(&u, 1, Duration::MAX), [(DIR, 5)]);
        // A later one counts; once it is wanted, it is not for use, and goes as well.
        u.delegated(1, DIR, given(6), None, false);
        u.told(1, DIR, None, true);
        assert_eq!(due(&u, 1, Duration::MAX), [(DIR, 6)]);
        u.delegated(1, DIR, given(8), None, true);
        assert_eq!(due(&u, 1, Duration::MAX), [(DIR, 8)]);
    }

    #[test]
    fn no_more_directories_are_held_than_allowed() {
        let u = Unnamed::default();
        for n in 0..=HELD_MAX as u64 {
            u.delegated(1, InodeId(n + 2), given(n + 1), None, false);
        }
        let last = HELD_MAX as u64;
        assert_eq!(due(&u, 1, Duration::MAX), [(InodeId(last + 2), last + 1)]);
    }

    #[test]
    fn what_was_an_earlier_sessions_is_nothing_to_the_next() {
        let u = Unnamed::default();
        u.delegated(1, DIR, given(5), None, false);
        assert!(due(&u, 2, Duration::ZERO).is_empty(), "it ended with its session");
        // A late answer to the earlier one changes nothing.
        u.delegated(1, DIR, given(9), None, false);
        assert!(due(&u, 1, Duration::ZERO).is_empty() && due(&u, 2, Duration::ZERO).is_empty());
    }

    #[test]
    fn a_directorys_times_never_go_back() {
        let at = |t| Attr { ctime: Time(t), mtime: Time(t), ..directory() };
        let u = Unnamed::default();
        u.delegated(1, DIR, given(5), Some(&at(100)), false);
        let touched = |now| {
            let mut state = u.state();
            let held = state.of(1).and_then(|s| s.held.get_mut(&DIR)).expect("held");
            held.touch(Time(now)).expect("known").mtime.0
        };
        assert_eq!(touched(150), 150);
        assert_eq!(touched(140), 151, "this clock went back");
        // The metadata plane's clock is behind this one, or its answer late.
        u.told(1, DIR, Some(&at(120)), false);
        assert_eq!(touched(145), 152);
        u.told(1, DIR, Some(&at(500)), false);
        assert_eq!(touched(200), 501);
    }

    fn directory() -> Attr {
        use ebb_dataplane_protocol::{ContentId, Generation, Lineage};
        Attr {
            inode: DIR,
            kind: ebb_metaplane_protocol::attr::FileKind::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
            nlink: 2,
            size: 0,
            atime: Time(0),
            mtime: Time(0),
            ctime: Time(0),
            generation: Generation(0),
            content: ContentId(0),
            lineage: Lineage(1),
            dirty: false,
            xattrs: false,
        }
    }

    #[test]
    fn what_is_no_name_is_left_to_the_metadata_plane_to_refuse() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b", b"\xff"] {
            assert!(!is_name(bad), "{bad:?}");
        }
        assert!(is_name("ä".as_bytes()) && is_name(b".ebb"));
    }
}
