//! One bucket on disk: its objects, the ordered index over them, the per-key locks.
//!
//! ```text
//! <bucket>/objects/<0..f>/<sha-256 of the key>   one object each (format.rs)
//! <bucket>/tmp/<n>                               bodies on their way in
//! <bucket>/uploads/<id>/…                        multipart uploads (uploads.rs)
//! ```
//!
//! Hashed names let 'a', 'a/' and 'a/b' be three objects. A mutation takes its key's lock, checks
//! its condition against the index, renames or unlinks, syncs the folder, and only then changes
//! the index and answers: conditions are atomic, and what was acknowledged survives a power cut.
//! Each mutation runs in a task of its own, so that a client that hangs up cannot stop it halfway.
//! The index holds each key, etag, size and time in memory (about 200 bytes a key).

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use s3s::{S3Error, S3Result, dto::ETagCondition, s3_error};
use sha2::{Digest, Sha256};
use tokio::sync::OwnedMutexGuard;

use super::{
    conditions::check_write,
    durable::{SharedSync, blocking, sync_dir},
    format::{self, FormatError, Head},
    internal,
    listing::{Page, Query, page},
    stage::{Staged, Staging},
    uploads::Uploads,
};

/// Object folders: few, so that parallel small PUTs share their syncs.
const FOLDERS: usize = 16;
const LOCKS: usize = 1024;
/// Threads that read headers at the start.
const SCAN_THREADS: usize = 4;

/// What the index knows of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) etag: Arc<str>,
    pub(super) size: u64,
    pub(super) modified_ns: i64,
}

impl From<&Head> for Entry {
    fn from(head: &Head) -> Self {
        let etag = Arc::from(head.etag.as_str());
        Self { etag, size: head.size, modified_ns: head.modified_ns }
    }
}

/// An object held open: stays readable as it is, whatever happens to its key.
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) head: Head,
    /// Where its body starts in the file.
    pub(super) offset: u64,
}

type Index = BTreeMap<Vec<u8>, Entry>;

pub(super) struct BucketStore {
    pub(super) name: String,
    pub(super) created_ns: i64,
    objects: PathBuf,
    index: RwLock<Index>,
    /// File names whose header did not verify: their keys are not known to be absent.
    damaged: Mutex<HashSet<String>>,
    locks: Vec<Arc<tokio::sync::Mutex<()>>>,
    folders: Vec<SharedSync>,
    pub(super) staging: Staging,
    pub(super) uploads: Uploads,
}

struct Place {
    name: String,
    folder: usize,
    lock: usize,
}

fn place(key: &str) -> Place {
    let digest = Sha256::digest(key.as_bytes());
    Place {
        name: hex::encode(digest),
        folder: usize::from(digest[0] >> 4),
        lock: (usize::from(digest[1]) << 8 | usize::from(digest[2])) % LOCKS,
    }
}

fn folder_name(folder: usize) -> String {
    format!("{folder:x}")
}

/// The folders of a new bucket, complete before it gets its name.
pub(super) fn create(root: &Path, name: &str) -> io::Result<()> {
    let new = root.join(format!(".new-{name}"));
    if new.exists() {
        fs::remove_dir_all(&new)?;
    }
    let objects = new.join("objects");
    for folder in 0..FOLDERS {
        fs::create_dir_all(objects.join(folder_name(folder)))?;
    }
    fs::create_dir(new.join("tmp"))?;
    fs::create_dir(new.join("uploads"))?;
    sync_dir(&objects)?;
    sync_dir(&new)?;
    fs::rename(&new, root.join(name))?;
    sync_dir(root)
}

#[derive(Default)]
struct Scan {
    index: Index,
    damaged: HashSet<String>,
    /// (key, upload) of completed objects.
    completed: HashSet<(String, String)>,
}

fn scan_folder(objects: &Path, folder: usize) -> io::Result<Scan> {
    let mut found = Scan::default();
    for entry in fs::read_dir(objects.join(folder_name(folder)))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let read = File::open(&path).map_err(FormatError::from).and_then(|f| format::read(&f));
        match read {
            Ok((head, _)) if place(&head.key).name == name => {
                if let Some(upload) = &head.upload {
                    found.completed.insert((head.key.clone(), upload.clone()));
                }
                found.index.insert(head.key.clone().into_bytes(), Entry::from(&head));
            }
            Ok((head, _)) => {
                tracing::error!(path = %path.display(), key = head.key, "object under a wrong name");
                found.damaged.insert(name);
            }
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "object not served");
                found.damaged.insert(name);
            }
        }
    }
    Ok(found)
}

impl BucketStore {
    /// Reads every header and sweeps what a crash left. Blocking.
    pub(super) fn open(dir: &Path, name: &str) -> io::Result<Self> {
        let objects = dir.join("objects");
        let scans: Vec<io::Result<Vec<Scan>>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..SCAN_THREADS)
                .map(|thread| {
                    let objects = &objects;
                    scope.spawn(move || {
                        (thread..FOLDERS)
                            .step_by(SCAN_THREADS)
                            .map(|folder| scan_folder(objects, folder))
                            .collect()
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|_| Err(io::Error::other("a scan panicked"))))
                .collect()
        });
        let mut all = Scan::default();
        for scans in scans {
            for mut scan in scans? {
                all.index.append(&mut scan.index);
                all.damaged.extend(scan.damaged);
                all.completed.extend(scan.completed);
            }
        }
        let created = fs::metadata(dir)?.modified()?;
        Ok(Self {
            name: name.to_owned(),
            created_ns: crate::attributes::Timestamp::from(created).0,
            index: RwLock::new(all.index),
            damaged: Mutex::new(all.damaged),
            locks: (0..LOCKS).map(|_| Arc::default()).collect(),
            folders: (0..FOLDERS)
                .map(|folder| SharedSync::new(objects.join(folder_name(folder))))
                .collect(),
            objects,
            staging: Staging::open(dir.join("tmp"))?,
            uploads: Uploads::open(dir.join("uploads"), &all.completed)?,
        })
    }

    fn path(&self, place: &Place) -> PathBuf {
        self.objects.join(folder_name(place.folder)).join(&place.name)
    }

    async fn lock(&self, place: &Place) -> OwnedMutexGuard<()> {
        Arc::clone(&self.locks[place.lock]).lock_owned().await
    }

    fn damaged(&self) -> MutexGuard<'_, HashSet<String>> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn damaged_count(&self) -> usize {
        self.damaged().len()
    }

    /// The entry there is. A key whose file is damaged is neither there nor absent.
    fn current(&self, key: &str, place: &Place) -> S3Result<Option<Entry>> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        match index.get(key.as_bytes()) {
            Some(entry) => Ok(Some(entry.clone())),
            None if self.damaged().contains(&place.name) => Err(damaged(key)),
            None => Ok(None),
        }
    }

    fn check(
        &self,
        key: &str,
        place: &Place,
        if_match: Option<&ETagCondition>,
        if_none_match: Option<&ETagCondition>,
    ) -> S3Result<()> {
        if if_match.is_none() && if_none_match.is_none() {
            // Overwriting or deleting a damaged object is how one gets rid of it.
            return Ok(());
        }
        let current = self.current(key, place)?;
        check_write(current.as_ref().map(|e| &*e.etag), if_match, if_none_match)
    }

    /// Whether the condition holds just now; spares an upload that would be refused anyway. The
    /// answer that counts is given by `commit`.
    pub(super) async fn precheck(
        &self,
        key: &str,
        if_match: Option<&ETagCondition>,
        if_none_match: Option<&ETagCondition>,
    ) -> S3Result<()> {
        let place = place(key);
        let _guard = self.lock(&place).await;
        self.check(key, &place, if_match, if_none_match)
    }

    /// Makes a staged file the object of its key, if the condition holds.
    pub(super) async fn commit(
        self: &Arc<Self>,
        staged: Staged,
        if_match: Option<ETagCondition>,
        if_none_match: Option<ETagCondition>,
    ) -> S3Result<Entry> {
        let this = Arc::clone(self);
        to_the_end(async move {
            let key = staged.head.key.clone();
            let place = place(&key);
            let _guard = this.lock(&place).await;
            this.check(&key, &place, if_match.as_ref(), if_none_match.as_ref())?;
            let path = this.path(&place);
            let head = blocking(move || staged.rename(&path))
                .await
                .map_err(|e| internal("name an object", e))?;
            this.folders[place.folder].sync().await.map_err(|e| internal("sync a folder", e))?;
            let entry = Entry::from(&head);
            let mut index = this.index.write().unwrap_or_else(PoisonError::into_inner);
            index.insert(key.into_bytes(), entry.clone());
            this.damaged().remove(&place.name);
            Ok(entry)
        })
        .await
    }

    /// Deletes a key, if the condition holds. False when there was nothing.
    pub(super) async fn remove(
        self: &Arc<Self>,
        key: String,
        if_match: Option<ETagCondition>,
    ) -> S3Result<bool> {
        let this = Arc::clone(self);
        to_the_end(async move {
            let place = place(&key);
            let _guard = this.lock(&place).await;
            this.check(&key, &place, if_match.as_ref(), None)?;
            let path = this.path(&place);
            let existed = blocking(move || match fs::remove_file(&path) {
                Ok(()) => Ok(true),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
                Err(e) => Err(e),
            })
            .await
            .map_err(|e| internal("delete an object", e))?;
            // Also when there was nothing: an unlink whose sync failed may have been before us.
            this.folders[place.folder].sync().await.map_err(|e| internal("sync a folder", e))?;
            let mut index = this.index.write().unwrap_or_else(PoisonError::into_inner);
            index.remove(key.as_bytes());
            this.damaged().remove(&place.name);
            Ok(existed)
        })
        .await
    }

    /// Opens the object of a key, header verified against the index.
    pub(super) async fn open_object(&self, key: &str) -> S3Result<Opened> {
        let place = place(key);
        let guard = self.lock(&place).await;
        let Some(entry) = self.current(key, &place)? else {
            return Err(s3_error!(NoSuchKey, "The specified key does not exist."));
        };
        let path = self.path(&place);
        let wanted = key.to_owned();
        let opened = blocking(move || {
            let _guard = guard;
            let file = File::open(&path)?;
            match format::read(&file) {
                Ok((head, offset)) if head.key == wanted && *head.etag == *entry.etag => {
                    Ok(Opened { file, head, offset })
                }
                Ok(_) => Err(io::Error::other("the file is not the one the index knows")),
                Err(e) => Err(io::Error::other(e)),
            }
        })
        .await;
        opened.map_err(|e| {
            tracing::error!(bucket = self.name, key, error = %e, "object not served");
            damaged(key)
        })
    }

    pub(super) fn list(&self, query: &Query<'_>) -> Page<Entry> {
        page(&self.index.read().unwrap_or_else(PoisonError::into_inner), query)
    }
}

fn damaged(key: &str) -> S3Error {
    s3_error!(InternalError, "the object of '{key}' is damaged on disk; see the server's log")
}

/// Runs a mutation to its end even if the request that asked for it is dropped.
pub(super) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = S3Result<T>> + Send + 'static,
) -> S3Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(e) => Err(internal("finish a request", io::Error::other(e))),
    }
}
