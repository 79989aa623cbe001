//! The values of S3's protocol as newtypes: etags, upload ids, conditions, listings.
//!
//! Keys here are always relative to the bucket's prefix. Etags are kept without their quotes.

use std::{collections::BTreeMap, fmt, time::SystemTime};

use serde::{Deserialize, Serialize};

/// User metadata: names in lower case without `x-amz-meta-`, values printable ASCII.
pub type Metadata = BTreeMap<String, String>;

/// An entity tag, without quotes. Opaque: equal tags mean the same object content, no more.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Etag(String);

impl Etag {
    /// Accepts the header form (`"abc"`, `W/"abc"`) and the bare form (`abc`).
    pub fn new(text: impl AsRef<str>) -> Self {
        let text = text.as_ref().trim();
        let text = text.strip_prefix("W/").unwrap_or(text);
        let bare = text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(text);
        Self(bare.to_owned())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The quoted form that headers and Complete's XML carry.
    pub fn quoted(&self) -> String {
        format!("\"{}\"", self.0)
    }
}

impl fmt::Display for Etag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The server's name for a multipart upload.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UploadId(String);

impl UploadId {
    pub fn new(id: impl Into<String>) -> Self {
        Self(id.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for UploadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Least size in bytes of every part but the last.
pub const PART_BYTES_MIN: u64 = 5 * 1024 * 1024;
/// Highest part number, S3's own limit.
pub const PART_NUMBER_MAX: u32 = 10_000;
/// Longest full key in bytes, S3's own limit.
pub const KEY_BYTES_MAX: usize = 1024;

/// A part as Complete names it. Numbers are 1..=10000, ascending.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub number: u32,
    pub etag: Etag,
}

/// A part as the server lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedPart {
    pub number: u32,
    pub etag: Etag,
    pub size: u64,
}

/// What must hold of the destination key for a mutation to happen.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Condition {
    #[default]
    None,
    /// `If-None-Match: *`
    IfAbsent,
    /// `If-Match: "etag"`
    IfMatch(Etag),
}

/// What HEAD says of an object (GET too, with `size` being the whole object's).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    pub etag: Etag,
    pub size: u64,
    pub last_modified: SystemTime,
    pub metadata: Metadata,
}

/// One page of a listing to ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListRequest {
    pub prefix: String,
    pub delimiter: Option<String>,
    /// Only keys after this one. Ignored by servers when `continuation` is given.
    pub start_after: Option<String>,
    /// `next` of the page before.
    pub continuation: Option<String>,
    /// At most this many keys and prefixes together; the server's limit (1000) also holds.
    pub max_keys: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedObject {
    pub key: String,
    pub size: u64,
    pub etag: Etag,
    pub last_modified: SystemTime,
}

/// One page: keys and common prefixes, each in byte order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListPage {
    pub objects: Vec<ListedObject>,
    pub prefixes: Vec<String>,
    /// Token of the next page, if there is one.
    pub next: Option<String>,
}

/// A multipart upload that was neither completed nor aborted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedUpload {
    pub key: String,
    pub upload: UploadId,
    pub initiated: Option<SystemTime>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn etag_forms_are_one_value() {
        for form in ["abc-2", "\"abc-2\"", " \"abc-2\" ", "W/\"abc-2\""] {
            assert_eq!(Etag::new(form).as_str(), "abc-2", "{form}");
        }
        assert_eq!(Etag::new("x").quoted(), "\"x\"");
    }
}
