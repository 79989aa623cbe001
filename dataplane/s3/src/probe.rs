//! Which conditions a server really honours, found out by trying.
//!
//! S3 servers accept headers they do not know, so a condition that is not honoured looks like
//! success. Each one is tried in the way that matters: a request whose condition does not hold has
//! to be refused *and* leave the object as it was. Scratch keys live under `.ebb/probe/<random>/`
//! and are deleted afterwards. Decides nothing about what to do without a condition (PROTOCOL §8).

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    client::Bucket,
    error::{ErrorKind, S3Error},
    operation::Operation,
    types::{Condition, Etag, Metadata, UploadId},
};

/// Folder of the scratch keys, relative to the bucket's prefix.
pub const PROBE_PREFIX: &str = ".ebb/probe/";

/// What a server honours. `false` also where it refuses the request altogether.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Conditions {
    pub put_if_absent: bool,
    pub put_if_match: bool,
    pub get_if_match: bool,
    pub delete_if_match: bool,
    pub complete_if_absent: bool,
    pub complete_if_match: bool,
    pub copy_source_if_match: bool,
    pub copy_if_absent: bool,
    pub copy_if_match: bool,
    /// Not a condition, but found out the same way: UploadPartCopy works at all. Without it a
    /// clean range is fetched and uploaded.
    pub part_copy: bool,
}

impl Conditions {
    /// What the embedded server and AWS honour.
    pub const ALL: Self = Self {
        put_if_absent: true,
        put_if_match: true,
        get_if_match: true,
        delete_if_match: true,
        complete_if_absent: true,
        complete_if_match: true,
        copy_source_if_match: true,
        copy_if_absent: true,
        copy_if_match: true,
        part_copy: true,
    };

    /// Names of the conditions that are missing, for warnings.
    pub fn missing(&self) -> Vec<&'static str> {
        let all = [
            ("put_if_absent", self.put_if_absent),
            ("put_if_match", self.put_if_match),
            ("get_if_match", self.get_if_match),
            ("delete_if_match", self.delete_if_match),
            ("complete_if_absent", self.complete_if_absent),
            ("complete_if_match", self.complete_if_match),
            ("copy_source_if_match", self.copy_source_if_match),
            ("copy_if_absent", self.copy_if_absent),
            ("copy_if_match", self.copy_if_match),
            ("part_copy", self.part_copy),
        ];
        all.into_iter().filter(|(_, honoured)| !honoured).map(|(name, _)| name).collect()
    }
}

/// Tries every condition. Fails only where plain requests fail (bucket missing, no access, server
/// down); a condition the server does not know is an answer, not an error.
pub async fn probe(bucket: &Bucket) -> Result<Conditions, S3Error> {
    let mut random = [0u8; 8];
    getrandom::fill(&mut random).map_err(|e| {
        let text = format!("no randomness for a scratch key: {e}");
        S3Error::new(ErrorKind::Invalid, Operation::Put, PROBE_PREFIX, text)
    })?;
    let run = Run { bucket, folder: format!("{PROBE_PREFIX}{}/", hex::encode(random)) };
    let found = run.all().await;
    let swept = run.sweep().await;
    let found = found?;
    swept?;
    Ok(found)
}

struct Run<'a> {
    bucket: &'a Bucket,
    folder: String,
}

/// An etag that no object here has: the MD5 of nothing is only that of an empty object.
fn wrong() -> Etag {
    Etag::new("00000000000000000000000000000000")
}

/// Whether the server refused; a failure that says nothing about the condition is passed on.
fn refused<T>(reply: Result<T, S3Error>) -> Result<bool, S3Error> {
    match reply {
        Ok(_) => Ok(false),
        Err(e) => match e.kind {
            ErrorKind::PreconditionFailed | ErrorKind::Conflict | ErrorKind::NotFound => Ok(true),
            // It does not offer the request in this form: not honoured, though refused.
            ErrorKind::Invalid => Ok(false),
            _ => Err(e),
        },
    }
}

/// Whether the server carried it out; also `false` where it does not offer the request.
fn worked<T>(reply: Result<T, S3Error>) -> Result<bool, S3Error> {
    match reply {
        Ok(_) => Ok(true),
        Err(e) => match e.kind {
            ErrorKind::PreconditionFailed
            | ErrorKind::Conflict
            | ErrorKind::NotFound
            | ErrorKind::Invalid => Ok(false),
            _ => Err(e),
        },
    }
}

impl Run<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.folder)
    }

    /// Puts a known object and gives its etag.
    async fn fresh(&self, name: &str) -> Result<Etag, S3Error> {
        let body = Bytes::from(format!("probe of {name}"));
        self.bucket.put(&self.key(name), body, &Metadata::new(), &Condition::None).await
    }

    /// Whether the object is still the one with `etag`.
    async fn is_still(&self, name: &str, etag: &Etag) -> Result<bool, S3Error> {
        match self.bucket.head(&self.key(name)).await {
            Ok(info) => Ok(info.etag == *etag),
            Err(e) if e.is_not_found() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Tries a PUT under a condition that does not hold, then (for If-Match) one that does.
    async fn put(&self, name: &str, bad: Condition, good: bool) -> Result<bool, S3Error> {
        let etag = self.fresh(name).await?;
        let (key, none) = (self.key(name), Metadata::new());
        let other = Bytes::from_static(b"another body");
        let no = refused(self.bucket.put(&key, other.clone(), &none, &bad).await)?;
        if !no || !self.is_still(name, &etag).await? {
            return Ok(false);
        }
        if !good {
            return Ok(true);
        }
        worked(self.bucket.put(&key, other, &none, &Condition::IfMatch(etag)).await)
    }

    async fn upload(&self, name: &str) -> Result<(UploadId, Vec<crate::types::Part>), S3Error> {
        let key = self.key(name);
        let upload = self.bucket.create_multipart(&key, &Metadata::new()).await?;
        let body = Bytes::from_static(b"the only part");
        let part = self.bucket.upload_part(&key, &upload, 1, body).await?;
        Ok((upload, vec![part]))
    }

    async fn complete(&self, name: &str, bad: Condition, good: bool) -> Result<bool, S3Error> {
        let etag = self.fresh(name).await?;
        let key = self.key(name);
        let (upload, parts) = self.upload(name).await?;
        let reply = self.bucket.complete_multipart(&key, &upload, &parts, &bad).await;
        let no = refused(reply)?;
        let mut honoured = no && self.is_still(name, &etag).await?;
        if no {
            self.bucket.abort_multipart(&key, &upload).await?;
        }
        if honoured && good {
            let (upload, parts) = self.upload(name).await?;
            let condition = Condition::IfMatch(etag);
            let reply = self.bucket.complete_multipart(&key, &upload, &parts, &condition).await;
            honoured = worked(reply)?;
            if !honoured {
                self.bucket.abort_multipart(&key, &upload).await?;
            }
        }
        Ok(honoured)
    }

    async fn copy(&self, name: &str, bad: Condition) -> Result<bool, S3Error> {
        let source = self.fresh("copy-source").await?;
        let etag = self.fresh(name).await?;
        let (from, to) = (self.key("copy-source"), self.key(name));
        let reply = self.bucket.copy(&from, Some(&source), &to, None, &bad).await;
        Ok(refused(reply)? && self.is_still(name, &etag).await?)
    }

    async fn all(&self) -> Result<Conditions, S3Error> {
        let put_if_absent = self.put("put-absent", Condition::IfAbsent, false).await?;
        let put_if_match = self.put("put-match", Condition::IfMatch(wrong()), true).await?;
        let get_if_match = self.get().await?;
        let delete_if_match = self.delete().await?;
        let complete_if_absent =
            self.complete("complete-absent", Condition::IfAbsent, false).await?;
        let complete_if_match =
            self.complete("complete-match", Condition::IfMatch(wrong()), true).await?;

        self.fresh("copy-source").await?;
        let (from, to) = (self.key("copy-source"), self.key("copied"));
        let reply = self.bucket.copy(&from, Some(&wrong()), &to, None, &Condition::None).await;
        let copy_source_if_match = refused(reply)?;
        let copy_if_absent = self.copy("copy-absent", Condition::IfAbsent).await?;
        let copy_if_match = self.copy("copy-match", Condition::IfMatch(wrong())).await?;
        let part_copy = self.part_copy().await?;
        Ok(Conditions {
            put_if_absent,
            put_if_match,
            get_if_match,
            delete_if_match,
            complete_if_absent,
            complete_if_match,
            copy_source_if_match,
            copy_if_absent,
            copy_if_match,
            part_copy,
        })
    }

    async fn get(&self) -> Result<bool, S3Error> {
        let etag = self.fresh("get").await?;
        let key = self.key("get");
        let bad = self.bucket.get(&key, Some(&wrong()), None).await;
        if bad.as_ref().is_err_and(|e| e.kind == ErrorKind::Integrity) {
            // Our own comparison of the etags caught it: the server let it through.
            return Ok(false);
        }
        let good = self.bucket.get(&key, Some(&etag), None).await.map(drop);
        Ok(refused(bad.map(drop))? && worked(good)?)
    }

    async fn delete(&self) -> Result<bool, S3Error> {
        let etag = self.fresh("delete").await?;
        let key = self.key("delete");
        let no = refused(self.bucket.delete(&key, Some(&wrong())).await)?;
        if !no || !self.is_still("delete", &etag).await? {
            return Ok(false);
        }
        worked(self.bucket.delete(&key, Some(&etag)).await)
    }

    async fn part_copy(&self) -> Result<bool, S3Error> {
        let source = self.fresh("copy-source").await?;
        let (from, to) = (self.key("copy-source"), self.key("parts"));
        let upload = self.bucket.create_multipart(&to, &Metadata::new()).await?;
        let reply = self.bucket.upload_part_copy(&to, &upload, 1, &from, Some(&source), 0..4).await;
        self.bucket.abort_multipart(&to, &upload).await?;
        worked(reply)
    }

    async fn sweep(&self) -> Result<(), S3Error> {
        let names = [
            "put-absent",
            "put-match",
            "get",
            "delete",
            "complete-absent",
            "complete-match",
            "copy-source",
            "copied",
            "copy-absent",
            "copy-match",
        ];
        for name in names {
            self.bucket.delete(&self.key(name), None).await?;
        }
        Ok(())
    }
}
