//! File attributes and the ebb tag, as object metadata.
//!
//! The attribute names and forms are those of AWS's own file services (FSx for Lustre, File
//! Gateway, DataSync), so that a bucket written here reads right there and the other way round:
//! `file-permissions` "0100644" (octal, type bits included), `file-owner` and `file-group`
//! (decimal), `file-mtime` and `file-atime` ("1595002920000000000ns"). A symbolic link is mode
//! S_IFLNK with the target as body, a directory is a key that ends in `/`.
//!
//! Reading is tolerant: what is missing or broken gets a default and never fails a listing.
//! Does no I/O and has no clock.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::types::Metadata;

const PERMISSIONS: &str = "file-permissions";
const OWNER: &str = "file-owner";
const GROUP: &str = "file-group";
const MTIME: &str = "file-mtime";
const ATIME: &str = "file-atime";
const AGENT: &str = "user-agent";
const AGENT_EBB: &str = "ebbtide";
/// Metadata name of the [`EbbTag`].
pub const EBB: &str = "ebb";
/// Metadata name of the [`LinkMark`].
pub const EBB_LINK: &str = "ebb-link";
/// Metadata name of extended attributes, all in one text that is not this module's (docs/SEMANTICS.md).
pub const XATTRS: &str = "ebb-xattrs";

const S_IFMT: u32 = 0o170000;
const S_IFREG: u32 = 0o100000;
const S_IFDIR: u32 = 0o040000;
const S_IFLNK: u32 = 0o120000;
const PERMISSION_BITS: u32 = 0o7777;

const NANOS_PER_SECOND: i128 = 1_000_000_000;

/// What an object stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FileKind {
    File,
    /// A `dir/` marker: an empty object whose key ends in `/`.
    Directory,
    /// The body is the target path.
    Symlink,
}

impl FileKind {
    fn type_bits(self) -> u32 {
        match self {
            FileKind::File => S_IFREG,
            FileKind::Directory => S_IFDIR,
            FileKind::Symlink => S_IFLNK,
        }
    }
}

/// Nanoseconds since 1970, before it negative.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Timestamp(pub i64);

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ns", self.0)
    }
}

impl From<std::time::SystemTime> for Timestamp {
    fn from(time: std::time::SystemTime) -> Self {
        let nanos = match time.duration_since(std::time::UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(e) => i64::try_from(e.duration().as_nanos()).map_or(i64::MIN, |n| -n),
        };
        Self(nanos)
    }
}

/// The attributes of one file, directory or link.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    pub kind: FileKind,
    /// Permission bits with setuid, setgid and sticky; no type bits.
    pub permissions: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    pub atime: Timestamp,
}

impl Attributes {
    /// What an object without any attributes is taken for. `key` decides between file and
    /// directory, `modified` is the object's own time.
    pub fn default_for(key: &str, modified: Timestamp) -> Self {
        let (kind, permissions) =
            if key.ends_with('/') { (FileKind::Directory, 0o755) } else { (FileKind::File, 0o644) };
        Self { kind, permissions, uid: 0, gid: 0, mtime: modified, atime: modified }
    }

    /// st_mode: type and permission bits.
    pub fn mode(&self) -> u32 {
        self.kind.type_bits() | (self.permissions & PERMISSION_BITS)
    }

    /// Reads what is there, with the owner of `fallback` and its other values for the rest.
    pub fn from_metadata(key: &str, metadata: &Metadata, fallback: &Attributes) -> Self {
        let mut found = Self {
            // A key that ends in `/` is a directory whatever its metadata says, and no other is.
            kind: if key.ends_with('/') { FileKind::Directory } else { FileKind::File },
            ..fallback.clone()
        };
        let default = Self::default_for(key, fallback.mtime);
        found.permissions =
            if fallback.kind == found.kind { fallback.permissions } else { default.permissions };
        if let Some(mode) = metadata.get(PERMISSIONS).and_then(|text| parse_mode(text)) {
            match mode & S_IFMT {
                S_IFLNK if found.kind == FileKind::File => found.kind = FileKind::Symlink,
                _ => {}
            }
            found.permissions = mode & PERMISSION_BITS;
        }
        if let Some(uid) = metadata.get(OWNER).and_then(|text| text.trim().parse().ok()) {
            found.uid = uid;
        }
        if let Some(gid) = metadata.get(GROUP).and_then(|text| text.trim().parse().ok()) {
            found.gid = gid;
        }
        if let Some(time) = metadata.get(MTIME).and_then(|text| parse_time(text)) {
            found.mtime = time;
            found.atime = time;
        }
        if let Some(time) = metadata.get(ATIME).and_then(|text| parse_time(text)) {
            found.atime = time;
        }
        found
    }

    /// Adds the attributes to an object's metadata.
    pub fn write_to(&self, metadata: &mut Metadata) {
        let mode = self.mode();
        metadata.insert(PERMISSIONS.into(), format!("{mode:07o}"));
        metadata.insert(OWNER.into(), self.uid.to_string());
        metadata.insert(GROUP.into(), self.gid.to_string());
        metadata.insert(MTIME.into(), self.mtime.to_string());
        metadata.insert(ATIME.into(), self.atime.to_string());
        metadata.insert(AGENT.into(), AGENT_EBB.into());
    }

    pub fn to_metadata(&self) -> Metadata {
        let mut metadata = Metadata::new();
        self.write_to(&mut metadata);
        metadata
    }
}

/// Octal, with or without type bits ("0100644", "0644", "100644", "0o644").
fn parse_mode(text: &str) -> Option<u32> {
    let text = text.trim();
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let mode = u32::from_str_radix(digits, 8).ok()?;
    (mode <= S_IFMT | PERMISSION_BITS).then_some(mode)
}

/// "…ns", or the forms other tools write: "…ms", and bare seconds with an optional fraction.
fn parse_time(text: &str) -> Option<Timestamp> {
    let text = text.trim();
    let nanos = if let Some(nanos) = text.strip_suffix("ns") {
        nanos.trim().parse::<i128>().ok()?
    } else if let Some(millis) = text.strip_suffix("ms") {
        millis.trim().parse::<i128>().ok()?.checked_mul(1_000_000)?
    } else {
        let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
        let seconds: i128 = whole.parse().ok()?;
        if !fraction.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let nine: String = fraction.chars().chain("000000000".chars()).take(9).collect();
        let sign = if whole.starts_with('-') { -1 } else { 1 };
        seconds.checked_mul(NANOS_PER_SECOND)?.checked_add(sign * nine.parse::<i128>().ok()?)?
    };
    i64::try_from(nanos).ok().map(Timestamp)
}

/// What marks an object as one of ours, and as which attempt (docs/PROTOCOL.md, section 8):
/// after a lost reply a HEAD whose nonce was logged says that the attempt took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EbbTag {
    pub cluster: u128,
    pub inode: u64,
    pub generation: u64,
    pub nonce: u128,
}

impl EbbTag {
    /// Version of the text form.
    const VERSION: &'static str = "1";

    /// The tag of an object, if it has a readable one. A foreign or damaged one is None: then the
    /// object is a stranger's.
    pub fn from_metadata(metadata: &Metadata) -> Option<Self> {
        Self::parse(metadata.get(EBB)?)
    }

    pub fn write_to(&self, metadata: &mut Metadata) {
        metadata.insert(EBB.into(), self.to_string());
    }

    pub fn parse(text: &str) -> Option<Self> {
        let mut fields = text.trim().split('.');
        if fields.next()? != Self::VERSION {
            return None;
        }
        let mut hex = || fields.next().filter(|t| t.bytes().all(|b| b.is_ascii_hexdigit()));
        let (cluster, inode, generation, nonce) = (hex()?, hex()?, hex()?, hex()?);
        if fields.next().is_some() {
            return None;
        }
        Some(Self {
            cluster: u128::from_str_radix(cluster, 16).ok()?,
            inode: u64::from_str_radix(inode, 16).ok()?,
            generation: u64::from_str_radix(generation, 16).ok()?,
            nonce: u128::from_str_radix(nonce, 16).ok()?,
        })
    }
}

impl fmt::Display for EbbTag {
    /// `1.CLUSTER.INODE.GENERATION.NONCE`, all in hexadecimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}.{:x}.{:x}.{:x}.{:x}",
            Self::VERSION,
            self.cluster,
            self.inode,
            self.generation,
            self.nonce
        )
    }
}

/// Says of an object that it is one of several names of a file: those that say the same hold the same. Whoever copies
/// such an object to another key copies this with the rest; it counts only at the key that it was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LinkMark {
    pub cluster: u128,
    pub file: u64,
    pub content: u64,
    pub meta_version: u64,
}

impl LinkMark {
    /// Version of the text form.
    const VERSION: &'static str = "1";

    /// The mark of an object at `key`, relative to the prefix. One that is damaged, or of another key, is none.
    pub fn from_metadata(key: &str, metadata: &Metadata) -> Option<Self> {
        let mut fields = metadata.get(EBB_LINK)?.trim().split('.');
        if fields.next()? != Self::VERSION {
            return None;
        }
        let mut hex = || fields.next().filter(|t| t.bytes().all(|b| b.is_ascii_hexdigit()));
        let (cluster, numbers) = (hex()?, [hex()?, hex()?, hex()?, hex()?]);
        if fields.next().is_some() {
            return None;
        }
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        let [file, content, meta_version, at] = numbers.map(number);
        (at? == Self::hash(key)).then_some(())?;
        Some(Self {
            cluster: u128::from_str_radix(cluster, 16).ok()?,
            file: file?,
            content: content?,
            meta_version: meta_version?,
        })
    }

    /// `1.CLUSTER.FILE.CONTENT.META.KEY`, all in hexadecimal; KEY: the first eight bytes of the SHA-256 of the key.
    pub fn write_to(&self, key: &str, metadata: &mut Metadata) {
        let Self { cluster, file, content, meta_version } = self;
        let (version, at) = (Self::VERSION, Self::hash(key));
        let text = format!("{version}.{cluster:x}.{file:x}.{content:x}.{meta_version:x}.{at:x}");
        metadata.insert(EBB_LINK.into(), text);
    }

    fn hash(key: &str) -> u64 {
        let digest = Sha256::digest(key.as_bytes());
        digest.iter().take(8).fold(0, |hash, byte| hash << 8 | u64::from(*byte))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_mark_counts_only_at_its_own_key() {
        let mark = LinkMark { cluster: u128::MAX, file: 7, content: 0, meta_version: u64::MAX };
        let mut metadata = Metadata::default();
        assert_eq!(LinkMark::from_metadata("a/b", &metadata), None);
        mark.write_to("a/b", &mut metadata);
        assert_eq!(LinkMark::from_metadata("a/b", &metadata), Some(mark));
        for other in ["a/c", "b", "backup/a/b", ""] {
            assert_eq!(LinkMark::from_metadata(other, &metadata), None, "{other}");
        }
        let text = metadata[EBB_LINK].clone();
        assert!(text.len() <= 102, "{text}");
        for bad in ["", "1", "2.1.1.1.1.1", "1.1.1.1.1", "1.1.1.1.1.+1", &format!("{text}.1")] {
            metadata.insert(EBB_LINK.into(), bad.to_owned());
            assert_eq!(LinkMark::from_metadata("a/b", &metadata), None, "{bad}");
        }
    }

    /// A small xorshift: the seed is in the failure's text.
    struct Random(u64);
    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }
        fn wide(&mut self) -> u128 {
            u128::from(self.next()) << 64 | u128::from(self.next())
        }
    }

    fn fallback() -> Attributes {
        Attributes { uid: 7, gid: 8, ..Attributes::default_for("f", Timestamp(5)) }
    }

    #[test]
    fn attributes_survive_the_metadata() {
        for seed in 1..=5000u64 {
            let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let (kind, key) = match random.next() % 3 {
                0 => (FileKind::File, "a/f"),
                1 => (FileKind::Directory, "a/d/"),
                _ => (FileKind::Symlink, "a/l"),
            };
            let wanted = Attributes {
                kind,
                permissions: (random.next() % 0o10000) as u32,
                uid: random.next() as u32,
                gid: random.next() as u32,
                mtime: Timestamp(random.next() as i64),
                atime: Timestamp(random.next() as i64),
            };
            let found = Attributes::from_metadata(key, &wanted.to_metadata(), &fallback());
            assert_eq!(found, wanted, "seed {seed}");
        }
    }

    #[test]
    fn the_form_is_that_of_awss_file_services() {
        let wanted = Attributes {
            kind: FileKind::File,
            permissions: 0o644,
            uid: 500,
            gid: 501,
            mtime: Timestamp(1_595_002_920_000_000_000),
            atime: Timestamp(1_595_002_921_000_000_000),
        };
        let metadata = wanted.to_metadata();
        assert_eq!(metadata["file-permissions"], "0100644");
        assert_eq!(metadata["file-owner"], "500");
        assert_eq!(metadata["file-group"], "501");
        assert_eq!(metadata["file-mtime"], "1595002920000000000ns");
        let link = Attributes { kind: FileKind::Symlink, permissions: 0o777, ..wanted };
        assert_eq!(link.to_metadata()["file-permissions"], "0120777");
        assert_eq!(link.mode(), 0o120777);
    }

    #[test]
    fn broken_and_foreign_values_fall_back() {
        let with = |name: &str, value: &str| -> Attributes {
            let metadata = [(name.to_owned(), value.to_owned())].into();
            Attributes::from_metadata("f", &metadata, &fallback())
        };
        for (name, value) in [
            ("file-permissions", "rwxr-xr-x"),
            ("file-permissions", "7777777"),
            ("file-permissions", ""),
            ("file-owner", "-1"),
            ("file-owner", "root"),
            ("file-mtime", "yesterday"),
            ("file-mtime", "99999999999999999999999999999999999999999ns"),
            ("file-mtime", "1.2.3"),
            ("something-else", "x"),
        ] {
            assert_eq!(with(name, value), fallback(), "{name}: {value}");
        }
        assert_eq!(with("file-permissions", "0640").permissions, 0o640);
        assert_eq!(with("file-mtime", "1595002920").mtime.0, 1_595_002_920_000_000_000);
        assert_eq!(with("file-mtime", "1595002920.25").mtime.0, 1_595_002_920_250_000_000);
        assert_eq!(with("file-mtime", "1595002920000ms").mtime.0, 1_595_002_920_000_000_000);
        let directory = Attributes::from_metadata("d/", &Metadata::new(), &fallback());
        assert_eq!((directory.kind, directory.permissions), (FileKind::Directory, 0o755));
    }

    #[test]
    fn tags_survive_their_text() {
        for seed in 1..=2000u64 {
            let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            let tag = EbbTag {
                cluster: random.wide(),
                inode: random.next(),
                generation: random.next() >> (random.next() % 64),
                nonce: random.wide(),
            };
            let mut metadata = Metadata::new();
            tag.write_to(&mut metadata);
            assert_eq!(EbbTag::from_metadata(&metadata), Some(tag), "seed {seed}");
        }
    }

    #[test]
    fn damaged_tags_are_a_strangers() {
        for bad in [
            "",
            "1",
            "1.a.b.c",
            "1.a.b.c.d.e",
            "2.a.b.c.d",
            "1.a.b.c.g",
            "1.a.b.c.-1",
            "1.a.b.c.+1",
            "1.a..c.d",
            "1.a.10000000000000000.c.d",
        ] {
            assert_eq!(EbbTag::parse(bad), None, "{bad}");
        }
    }
}
