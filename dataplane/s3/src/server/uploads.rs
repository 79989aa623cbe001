//! Multipart uploads on disk: a folder each, a file per part, durable before they are answered.
//!
//! ```text
//! uploads/<id>/upload    key, metadata, start time (a header without body, format.rs)
//! uploads/<id>/<n>       part n
//! ```
//!
//! An upload's lock is held by whatever changes it, so that a part, a Complete and an Abort never
//! overlap. A folder without its `upload` file was never acknowledged and is swept at the start, as
//! is one whose completed object is already in place.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use md5::{Digest, Md5};
use s3s::{
    S3Result,
    dto::{ETagCondition, MultipartUploadId},
    s3_error,
};

use super::{
    bucket::{BucketStore, Entry, to_the_end},
    durable::{SharedSync, blocking, sync_dir},
    format::{self, Head},
    internal,
    stage::{Source, Staged},
};
use crate::types::{PART_BYTES_MIN, PART_NUMBER_MAX};

const UPLOAD_FILE: &str = "upload";

/// Open uploads by key, then id: the order of their listing.
type Open = BTreeMap<(String, String), Arc<Upload>>;

pub(super) struct Uploads {
    dir: PathBuf,
    sync: SharedSync,
    open: Mutex<Open>,
}

pub(super) struct Upload {
    pub(super) id: String,
    /// What the object will have: key, metadata, headers; `modified_ns` is the upload's start.
    pub(super) head: Head,
    dir: PathBuf,
    sync: SharedSync,
    state: tokio::sync::Mutex<State>,
}

struct State {
    /// False once completed or aborted.
    open: bool,
    parts: BTreeMap<u32, Entry>,
}

fn part_name(number: u32) -> String {
    format!("{number:05}")
}

impl Uploads {
    /// Blocking. `completed` are the (key, upload) pairs of objects that are in place.
    pub(super) fn open(dir: PathBuf, completed: &HashSet<(String, String)>) -> io::Result<Self> {
        let mut open = Open::new();
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let id = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match Upload::load(&path, &id) {
                Ok(upload) if !completed.contains(&(upload.head.key.clone(), id.clone())) => {
                    open.insert((upload.head.key.clone(), id), Arc::new(upload));
                }
                Ok(_) => fs::remove_dir_all(&path)?,
                Err(_) if !path.join(UPLOAD_FILE).exists() => fs::remove_dir_all(&path)?,
                // It was acknowledged: left for a person to look at.
                Err(error) => tracing::error!(path = %path.display(), %error, "upload not usable"),
            }
        }
        sync_dir(&dir)?;
        Ok(Self { sync: SharedSync::new(dir.clone()), dir, open: Mutex::new(open) })
    }

    fn table(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn find(&self, key: &str, id: &MultipartUploadId) -> S3Result<Arc<Upload>> {
        let found = self.table().get(&(key.to_owned(), id.clone())).cloned();
        found.ok_or_else(|| s3_error!(NoSuchUpload))
    }

    /// Up to `max` uploads after the marker, and whether there are more.
    pub(super) fn list(
        &self,
        prefix: &str,
        after: Option<(String, Option<String>)>,
        max: usize,
    ) -> (Vec<Arc<Upload>>, bool) {
        let table = self.table();
        let is_after = |(key, id): &(String, String)| match &after {
            None => true,
            Some((marker, None)) => key > marker,
            Some((marker, Some(last))) => key > marker || (key == marker && id > last),
        };
        let mut matching =
            table.iter().filter(|(at, _)| at.0.starts_with(prefix) && is_after(at)).map(|(_, u)| u);
        let page: Vec<_> = matching.by_ref().take(max).cloned().collect();
        let more = max > 0 && matching.next().is_some();
        (page, more)
    }
}

impl Upload {
    fn load(dir: &Path, id: &str) -> Result<Self, format::FormatError> {
        let (head, _) = format::read(&File::open(dir.join(UPLOAD_FILE))?)?;
        let mut parts = BTreeMap::new();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let Ok(number) = name.parse() else { continue };
            match File::open(&path).map_err(Into::into).and_then(|file| format::read(&file)) {
                Ok((part, _)) => {
                    parts.insert(number, Entry::from(&part));
                }
                // Then Complete names a part that is not there, and is refused.
                Err(error) => tracing::error!(path = %path.display(), %error, "part not usable"),
            }
        }
        Ok(Self::new(dir.to_owned(), id.to_owned(), head, parts))
    }

    fn new(dir: PathBuf, id: String, head: Head, parts: BTreeMap<u32, Entry>) -> Self {
        let sync = SharedSync::new(dir.clone());
        Self { id, head, dir, sync, state: tokio::sync::Mutex::new(State { open: true, parts }) }
    }

    /// The parts so far, ascending.
    pub(super) async fn parts(&self) -> S3Result<Vec<(u32, Entry)>> {
        let state = self.state.lock().await;
        if !state.open {
            return Err(s3_error!(NoSuchUpload));
        }
        Ok(state.parts.iter().map(|(n, e)| (*n, e.clone())).collect())
    }

    /// Takes a staged body as part `number`, over an earlier one.
    pub(super) async fn put_part(self: Arc<Self>, number: u32, staged: Staged) -> S3Result<Entry> {
        to_the_end(async move {
            let mut state = self.state.lock().await;
            if !state.open {
                return Err(s3_error!(NoSuchUpload));
            }
            let path = self.dir.join(part_name(number));
            let head = blocking(move || staged.rename(&path))
                .await
                .map_err(|e| internal("name a part", e))?;
            self.sync.sync().await.map_err(|e| internal("sync an upload", e))?;
            let entry = Entry::from(&head);
            state.parts.insert(number, entry.clone());
            Ok(entry)
        })
        .await
    }

    /// The parts a Complete names, checked: order, presence, etags, least sizes.
    fn chosen(state: &State, named: &[(u32, Option<String>)]) -> S3Result<Vec<(u32, Entry)>> {
        if named.is_empty() {
            return Err(s3_error!(MalformedXML, "a Complete names at least one part"));
        }
        let mut chosen: Vec<(u32, Entry)> = Vec::with_capacity(named.len());
        for (at, (number, etag)) in named.iter().enumerate() {
            if chosen.last().is_some_and(|(before, _)| before >= number) {
                return Err(s3_error!(InvalidPartOrder));
            }
            let part = state.parts.get(number);
            let same = |p: &&Entry| etag.as_ref().is_some_and(|etag| **etag == *p.etag);
            let Some(part) = part.filter(same) else {
                return Err(s3_error!(InvalidPart, "part {number} is missing or has another etag"));
            };
            if at + 1 < named.len() && part.size < PART_BYTES_MIN {
                let size = part.size;
                return Err(s3_error!(EntityTooSmall, "part {number} has {size} bytes only"));
            }
            chosen.push((*number, part.clone()));
        }
        Ok(chosen)
    }
}

/// MD5 of the parts' MD5s, and their number.
fn multipart_etag(parts: &[(u32, Entry)]) -> S3Result<String> {
    let mut md5 = Md5::new();
    for (_, part) in parts {
        let digest = hex::decode(&*part.etag)
            .map_err(|e| internal("read a part's etag", io::Error::other(e)))?;
        md5.update(digest);
    }
    Ok(format!("{}-{}", hex::encode(md5.finalize()), parts.len()))
}

impl BucketStore {
    /// `head` gives key, metadata and headers of the object to be.
    pub(super) async fn create_upload(self: &Arc<Self>, head: Head) -> S3Result<String> {
        let mut random = [0u8; 16];
        getrandom::fill(&mut random)
            .map_err(|e| internal("name an upload", io::Error::other(e)))?;
        let id = hex::encode(random);
        let this = Arc::clone(self);
        to_the_end(async move {
            let dir = this.uploads.dir.join(&id);
            let staged = this.staging.empty(head).await?;
            let new = dir.clone();
            let head = blocking(move || {
                fs::create_dir(&new)?;
                let head = staged.rename(&new.join(UPLOAD_FILE))?;
                sync_dir(&new)?;
                Ok(head)
            })
            .await
            .map_err(|e| internal("create an upload", e))?;
            this.uploads.sync.sync().await.map_err(|e| internal("sync the uploads", e))?;
            let at = (head.key.clone(), id.clone());
            let upload = Arc::new(Upload::new(dir, id.clone(), head, BTreeMap::new()));
            this.uploads.table().insert(at, upload);
            Ok(id)
        })
        .await
    }

    /// Puts the named parts together as the object, if the condition holds. A refusal leaves the
    /// upload open.
    pub(super) async fn complete_upload(
        self: &Arc<Self>,
        upload: Arc<Upload>,
        named: Vec<(u32, Option<String>)>,
        modified_ns: i64,
        if_match: Option<ETagCondition>,
        if_none_match: Option<ETagCondition>,
    ) -> S3Result<Entry> {
        debug_assert!(named.len() <= PART_NUMBER_MAX as usize);
        let this = Arc::clone(self);
        to_the_end(async move {
            let mut state = upload.state.lock().await;
            if !state.open {
                return Err(s3_error!(NoSuchUpload));
            }
            let chosen = Upload::chosen(&state, &named)?;
            let key = &upload.head.key;
            this.precheck(key, if_match.as_ref(), if_none_match.as_ref()).await?;
            let head = Head {
                etag: multipart_etag(&chosen)?,
                modified_ns,
                upload: Some(upload.id.clone()),
                ..upload.head.clone()
            };
            let sources = chosen
                .into_iter()
                .map(|(number, part)| Source::Part {
                    path: upload.dir.join(part_name(number)),
                    etag: part.etag,
                    size: part.size,
                })
                .collect();
            let staged = this.staging.assemble(head, sources, false).await?;
            let entry = this.commit(staged, if_match, if_none_match).await?;
            state.open = false;
            this.forget(&upload).await;
            Ok(entry)
        })
        .await
    }

    pub(super) async fn abort_upload(self: &Arc<Self>, upload: Arc<Upload>) -> S3Result<()> {
        let this = Arc::clone(self);
        to_the_end(async move {
            let mut state = upload.state.lock().await;
            if !state.open {
                return Err(s3_error!(NoSuchUpload));
            }
            // First the file without which a restart takes the upload for unfinished.
            let dir = upload.dir.clone();
            blocking(move || {
                fs::remove_file(dir.join(UPLOAD_FILE))?;
                sync_dir(&dir)
            })
            .await
            .map_err(|e| internal("abort an upload", e))?;
            state.open = false;
            this.forget(&upload).await;
            Ok(())
        })
        .await
    }

    /// Drops an ended upload's files. A failure only leaves them to the next start.
    async fn forget(&self, upload: &Upload) {
        self.uploads.table().remove(&(upload.head.key.clone(), upload.id.clone()));
        let dir = upload.dir.clone();
        if let Err(error) = blocking(move || fs::remove_dir_all(dir)).await {
            tracing::warn!(upload = upload.id, %error, "parts of an ended upload stay behind");
        }
    }
}
