//! What the kernel was last told of an inode, to keep its caches honest (close-to-open).
//!
//! At an open, the kernel may keep the pages it has only if the file is what it was when they were
//! read; and it must not go on with attributes that an open of another client's work made old.

use ebb_client::{Attr, InodeId, Time};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

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
        self.with(a.inode, |e| e.told = Some(key(a)));
    }

    /// The kernel's pages are this client's own writes, or will be.
    pub(crate) fn written(&self, inode: InodeId) {
        self.with(inode, |e| e.pages = None);
    }

    /// The file is opened and is now what `a` says.
    pub(crate) fn opened(&self, a: &Attr, write: bool) -> AtOpen {
        self.with(a.inode, |e| {
            let now = key(a);
            let keep_cache = e.pages == Some(now);
            let attributes_old = e.told.is_some_and(|told| told != now);
            e.pages = (!write).then_some(now);
            AtOpen { keep_cache, attributes_old }
        })
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
    fn old_attributes_are_noticed() {
        let k = Known::default();
        assert!(!k.opened(&file(10, 1), false).attributes_old, "the kernel has none");
        k.told(&file(10, 1));
        assert!(!k.opened(&file(10, 1), false).attributes_old);
        assert!(k.opened(&file(20, 2), false).attributes_old);
    }
}
