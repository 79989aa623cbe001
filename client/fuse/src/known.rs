//! What the kernel was last told of an inode, to keep its caches honest (close-to-open).
//!
//! At an open, the kernel may keep the pages it has only if the file is what it was when they were
//! read; and it must not go on with attributes that an open of another client's work made old.
//!
//! After every change of a directory the kernel asks for its attributes again, before it does anything
//! else in it. A create's answer brings them along, and they are kept here for that question, for as
//! long as the kernel itself might have kept them.

use ebb_client::{Attr, InodeId, Time};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Inodes remembered; past it everything is forgotten, which costs a few cache misses.
const KNOWN_MAX: usize = 100_000;

/// Equal keys: the same bytes. Every commit, truncate and outside change moves the ctime or the
/// lineage; a flush to S3 moves neither.
type Key = (u64, u64, Time, Time);

fn key(a: &Attr) -> Key {
    (a.lineage.0, a.size, a.mtime, a.ctime)
}

#[derive(Default)]
struct Entry {
    told: Option<Key>,
    /// The file whose pages the kernel may hold; `None`: unknown, it was written here.
    pages: Option<Key>,
    /// A directory's attributes from the answer to a create, and when that came.
    directory: Option<(Attr, Instant)>,
    /// When it was last heard that it has no extended attributes, if that is the last that was heard of them.
    without_xattrs: Option<Instant>,
    /// This client changed some: an answer may be from before.
    xattrs_changed: bool,
}

impl Entry {
    fn note_xattrs(&mut self, a: &Attr) {
        self.without_xattrs = (!a.xattrs).then(Instant::now);
    }
}

/// What to do at an open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AtOpen {
    /// The pages are still those of the file.
    pub(crate) keep_cache: bool,
    /// The kernel's attributes are old.
    pub(crate) attributes_old: bool,
}

#[derive(Default)]
pub(crate) struct Known {
    entries: Mutex<HashMap<InodeId, Entry>>,
    /// Changes of directories, other than creates, whose answers have come.
    changes: AtomicU64,
    /// Directories' attributes from before are no longer good.
    directories_since: Mutex<Option<Instant>>,
}

impl Known {
    fn entries(&self) -> MutexGuard<'_, HashMap<InodeId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, inode: InodeId, f: impl FnOnce(&mut Entry) -> T) -> T {
        let mut entries = self.entries();
        if entries.len() >= KNOWN_MAX && !entries.contains_key(&inode) {
            entries.clear();
        }
        f(entries.entry(inode).or_default())
    }

    /// The kernel gets these attributes.
    pub(crate) fn told(&self, a: &Attr) {
        self.with(a.inode, |e| {
            e.told = Some(key(a));
            // A file that got its name with its close changed its directory once more since the create.
            if e.directory.as_ref().is_some_and(|(kept, _)| kept.ctime < a.ctime) {
                e.directory = None;
            }
            e.note_xattrs(a);
        });
    }

    /// The kernel's pages are this client's own writes, or will be.
    pub(crate) fn written(&self, inode: InodeId) {
        self.with(inode, |e| e.pages = None);
    }

    /// The file is opened and is now what `a` says.
    pub(crate) fn opened(&self, a: &Attr, write: bool) -> AtOpen {
        self.with(a.inode, |e| {
            let now = key(a);
            e.note_xattrs(a);
            let keep_cache = e.pages == Some(now);
            let attributes_old = e.told.is_some_and(|told| told != now);
            e.pages = (!write).then_some(now);
            AtOpen { keep_cache, attributes_old }
        })
    }

    /// To be taken before a create is sent, and given back with its answer.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// A create's answer says so of its directory. Of two such answers the later state counts, and
    /// none counts if something else changed meanwhile: its answer may be the older one.
    pub(crate) fn directory_told(&self, changes: u64, parent: InodeId, a: Option<&Attr>) {
        self.with(parent, |e| match a {
            // Under the lock, so that a change that comes now clears it.
            Some(a) if self.changes() == changes => {
                if e.directory.as_ref().is_none_or(|(old, _)| old.ctime <= a.ctime) {
                    e.directory = Some((a.clone(), Instant::now()));
                }
            }
            _ => e.directory = None,
        });
    }

    /// This client changed a directory otherwise. To be called before the kernel is answered.
    pub(crate) fn directory_changed(&self, inode: InodeId) {
        self.with(inode, |e| {
            self.changes.fetch_add(1, Ordering::AcqRel);
            e.directory = None;
        });
    }

    /// This client changed a directory, and which one is not known: a rename.
    pub(crate) fn some_directory_changed(&self) {
        let mut since = self.directories_since.lock().unwrap_or_else(PoisonError::into_inner);
        *since = Some(Instant::now());
        self.changes.fetch_add(1, Ordering::AcqRel);
    }

    /// A directory's attributes and for how long they are still good, if a create brought them.
    pub(crate) fn directory(&self, inode: InodeId, ttl: Duration) -> Option<(Attr, Duration)> {
        let entries = self.entries();
        let (a, since) = entries.get(&inode)?.directory.as_ref()?;
        let good = *self.directories_since.lock().unwrap_or_else(PoisonError::into_inner);
        if good.is_some_and(|good| *since <= good) {
            return None;
        }
        let left = ttl.checked_sub(since.elapsed()).filter(|left| !left.is_zero())?;
        Some((a.clone(), left))
    }

    /// This client is about to change extended attributes.
    pub(crate) fn xattrs_change(&self, inode: InodeId) {
        self.with(inode, |e| e.xattrs_changed = true);
    }

    /// Whether attributes that the kernel may still use say that there are no extended ones.
    pub(crate) fn has_no_xattrs(&self, inode: InodeId, ttl: Duration) -> bool {
        let entries = self.entries();
        let heard = entries.get(&inode).filter(|e| !e.xattrs_changed);
        heard.and_then(|e| e.without_xattrs).is_some_and(|since| since.elapsed() < ttl)
    }

    /// The kernel forgot the inode.
    pub(crate) fn forget(&self, inode: InodeId) {
        self.entries().remove(&inode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ebb_client::FileKind;
    use ebb_dataplane_protocol::{ContentId, Generation, Lineage};

    fn file(size: u64, ctime: i64) -> Attr {
        Attr {
            inode: InodeId(5),
            kind: FileKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            nlink: 1,
            size,
            atime: Time(0),
            mtime: Time(1),
            ctime: Time(ctime),
            generation: Generation(1),
            content: ContentId(1),
            lineage: Lineage(1),
            dirty: false,
            xattrs: false,
        }
    }

    #[test]
    fn pages_are_kept_only_while_the_file_is_the_same() {
        let k = Known::default();
        assert!(!k.opened(&file(10, 1), false).keep_cache, "never seen");
        assert!(k.opened(&file(10, 1), false).keep_cache);
        assert!(!k.opened(&file(10, 2), false).keep_cache, "changed elsewhere");
        assert!(k.opened(&file(10, 2), true).keep_cache);
        assert!(!k.opened(&file(10, 2), false).keep_cache, "was open for writing here");
        k.written(InodeId(5));
        assert!(!k.opened(&file(10, 2), false).keep_cache, "written here");
    }

    #[test]
    fn a_directory_is_what_the_last_change_left() {
        let (k, dir, ttl) = (Known::default(), InodeId(5), Duration::from_secs(60));
        assert!(k.directory(dir, ttl).is_none());
        let before = k.changes();
        k.directory_told(before, dir, Some(&file(0, 7)));
        k.directory_told(before, dir, Some(&file(0, 6)));
        let (a, left) = k.directory(dir, ttl).expect("told");
        assert_eq!(a.ctime, Time(7), "an answer that was overtaken counts no more");
        assert!(left <= ttl);
        assert!(k.directory(dir, Duration::ZERO).is_none(), "nothing is kept without a lifetime");
        k.directory_changed(dir);
        assert!(k.directory(dir, ttl).is_none());
        k.directory_told(before, dir, Some(&file(0, 8)));
        assert!(k.directory(dir, ttl).is_none(), "the create may have come before the change");
        k.directory_told(k.changes(), dir, Some(&file(0, 9)));
        k.some_directory_changed();
        assert!(k.directory(dir, ttl).is_none(), "it may have been this one");
        k.directory_told(k.changes(), dir, Some(&file(0, 9)));
        assert!(k.directory(dir, ttl).is_some());
        k.told(&file(0, 9));
        assert!(k.directory(dir, ttl).is_some(), "nothing new");
        k.told(&file(0, 10));
        assert!(k.directory(dir, ttl).is_none(), "times never go back");
        k.directory_told(k.changes(), dir, Some(&file(0, 11)));
        k.directory_told(k.changes(), dir, None);
        assert!(k.directory(dir, ttl).is_none(), "changed, nobody knows how");
    }

    #[test]
    fn that_there_are_no_extended_attributes_is_known_for_a_while() {
        let (k, ttl) = (Known::default(), Duration::from_secs(60));
        let inode = InodeId(5);
        assert!(!k.has_no_xattrs(inode, ttl), "never seen");
        k.told(&file(0, 1));
        assert!(k.has_no_xattrs(inode, ttl) && !k.has_no_xattrs(inode, Duration::ZERO));
        k.told(&Attr { xattrs: true, ..file(0, 2) });
        assert!(!k.has_no_xattrs(inode, ttl));
        k.opened(&file(0, 3), true);
        assert!(k.has_no_xattrs(inode, ttl));
        k.xattrs_change(inode);
        k.told(&file(0, 1));
        assert!(!k.has_no_xattrs(inode, ttl), "that may be from before the change");
    }

    #[test]
    fn old_attributes_are_noticed() {
        let k = Known::default();
        assert!(!k.opened(&file(10, 1), false).attributes_old, "the kernel has none");
        k.told(&file(10, 1));
        assert!(!k.opened(&file(10, 1), false).attributes_old);
        assert!(k.opened(&file(20, 2), false).attributes_old);
    }
}
