//! The directory of an embedded server: its lock, its format mark, its buckets.
//!
//! ```text
//! DIR/LOCK          held while a server runs here: two would not see each other's key locks
//! DIR/FORMAT        "ebb-s3 1"
//! DIR/<bucket>/…    bucket.rs
//! ```

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, Instant},
};

use s3s::{S3Result, s3_error};

use super::{
    ServerError,
    bucket::{self, BucketStore},
    durable::{blocking, sync_dir},
    internal,
};

const FORMAT: &str = "ebb-s3 1\n";
/// How long a start waits for a server that is just ending in the same directory.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

pub(super) struct Store {
    dir: PathBuf,
    buckets: RwLock<BTreeMap<String, Arc<BucketStore>>>,
    /// One bucket is created at a time.
    creating: Arc<tokio::sync::Mutex<()>>,
    _lock: File,
}

fn lock(dir: &Path) -> Result<File, ServerError> {
    let path = dir.join("LOCK");
    let failed = |source| ServerError::Directory { dir: dir.to_owned(), source };
    let file = File::options().create(true).write(true).truncate(false).open(&path);
    let file = file.map_err(failed)?;
    let begun = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(e)) => return Err(failed(e)),
            Err(TryLockError::WouldBlock) if begun.elapsed() > LOCK_PATIENCE => {
                return Err(ServerError::InUse { dir: dir.to_owned() });
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

impl Store {
    /// Opens or founds the directory and reads everything in it. Blocking.
    pub(super) fn open(dir: &Path, wanted: &[String]) -> Result<Self, ServerError> {
        let failed = |source| ServerError::Directory { dir: dir.to_owned(), source };
        // Object files carry no owner: who may read them is decided here.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed)?;
        let lock = lock(dir)?;
        let mark = dir.join("FORMAT");
        match fs::read_to_string(&mark) {
            Ok(text) if text == FORMAT => {}
            Ok(text) => {
                return Err(ServerError::Format { dir: dir.to_owned(), found: text });
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::write(dir.join("FORMAT.new"), FORMAT).map_err(failed)?;
                File::open(dir.join("FORMAT.new")).and_then(|f| f.sync_all()).map_err(failed)?;
                fs::rename(dir.join("FORMAT.new"), &mark).map_err(failed)?;
                sync_dir(dir).map_err(failed)?;
            }
            Err(e) => return Err(failed(e)),
        }
        let mut buckets = BTreeMap::new();
        for entry in fs::read_dir(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if !entry.file_type().map_err(failed)?.is_dir() || name.starts_with('.') {
                continue;
            }
            let bucket = BucketStore::open(&entry.path(), &name).map_err(failed)?;
            buckets.insert(name, Arc::new(bucket));
        }
        for name in wanted {
            if !s3s::path::check_bucket_name(name) {
                return Err(ServerError::BucketName { name: name.clone() });
            }
            if !buckets.contains_key(name) {
                bucket::create(dir, name).map_err(failed)?;
                let bucket = BucketStore::open(&dir.join(name), name).map_err(failed)?;
                buckets.insert(name.clone(), Arc::new(bucket));
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            buckets: RwLock::new(buckets),
            creating: Arc::default(),
            _lock: lock,
        })
    }

    pub(super) fn bucket(&self, name: &str) -> S3Result<Arc<BucketStore>> {
        let buckets = self.buckets.read().unwrap_or_else(PoisonError::into_inner);
        buckets.get(name).cloned().ok_or_else(|| s3_error!(NoSuchBucket))
    }

    pub(super) fn buckets(&self) -> Vec<Arc<BucketStore>> {
        let buckets = self.buckets.read().unwrap_or_else(PoisonError::into_inner);
        buckets.values().cloned().collect()
    }

    pub(super) async fn create_bucket(self: &Arc<Self>, name: String) -> S3Result<()> {
        let this = Arc::clone(self);
        bucket::to_the_end(async move {
            let _guard = this.creating.lock().await;
            if this.bucket(&name).is_ok() {
                return Err(s3_error!(BucketAlreadyOwnedByYou));
            }
            let (dir, wanted) = (this.dir.clone(), name.clone());
            let new = blocking(move || {
                bucket::create(&dir, &wanted)?;
                BucketStore::open(&dir.join(&wanted), &wanted)
            })
            .await
            .map_err(|e| internal("create a bucket", e))?;
            let mut buckets = this.buckets.write().unwrap_or_else(PoisonError::into_inner);
            buckets.insert(name, Arc::new(new));
            Ok(())
        })
        .await
    }
}
