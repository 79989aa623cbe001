//! Keys of the store: one byte names the table, ids follow big-endian so that scans are in order.
//!
//! | table | key | value |
//! |---|---|---|
//! | `M` | counter | u64 little-endian, see [`crate::counters`] |
//! | `P` | – | the cluster map |
//! | `I` | inode | [`crate::inode::Inode`] |
//! | `E` | directory, name | the file's inode; of another name of a file also that name's own inode |
//! | `N` | file, inode of another name of it | – : see [`crate::link`] |
//! | `J` | what objects of several names of a file say | the file, the content it was found with: see [`crate::link`] |
//! | `D` | dirty since, inode | stage byte |
//! | `S` | session | [`crate::session::Session`] |
//! | `C` | client | session |
//! | `R` | session, sequence | the remembered reply |
//! | `H` | handle | [`crate::handle::Handle`] |
//! | `h` | session, inode, handle | write byte |
//! | `O` | inode, handle | session |
//! | `L` | inode | its locks: see [`crate::lock`] |
//! | `l` | session, inode | – : it has locks there |
//! | `x` | inode | its extended attributes, if it has any: see [`crate::xattr`] |
//! | `Y` | session | – : it may have files open without a handle: see [`crate::lent`] |
//! | `U` | inode | – : it lost its last name, and may be open without a handle |
//! | `B` | S3 key | the inode whose bytes are there |
//! | `K` | S3 key | [`crate::key_state::KeyState`], only while it says more than `B` |
//! | `A` | nonce | S3 key of the attempt |
//! | `T` | S3 key | sequence of its last delete |
//! | `t` | sequence | stamp, S3 key |
//! | `Z` | notice | the notice |
//! | `V` | move | [`crate::moves::Move`] |
//! | `n` | node | boot id |
//! | `G` | group (u16), inode | sequence since when: see [`crate::held`] |
//! | `X` | store (u128) | the node it was, abandoned |
//! | `W` | group (u16), session, sequence | answered below, generation: see [`crate::windows`] |

use crate::Reader;
use crate::kv::{Kv, KvRead};
use ebb_metaplane_protocol::{FsError, FsResult, Time};

pub(crate) const META: u8 = b'M';
pub(crate) const MAP: u8 = b'P';
pub(crate) const INODE: u8 = b'I';
pub(crate) const ENTRY: u8 = b'E';
pub(crate) const LINK: u8 = b'N';
pub(crate) const JOIN: u8 = b'J';
pub(crate) const DIRTY: u8 = b'D';
pub(crate) const SESSION: u8 = b'S';
pub(crate) const CLIENT: u8 = b'C';
pub(crate) const REPLY: u8 = b'R';
pub(crate) const HANDLE: u8 = b'H';
pub(crate) const SESSION_HANDLE: u8 = b'h';
pub(crate) const OPEN: u8 = b'O';
pub(crate) const LOCK: u8 = b'L';
pub(crate) const SESSION_LOCK: u8 = b'l';
pub(crate) const XATTR: u8 = b'x';
pub(crate) const BORROWER: u8 = b'Y';
pub(crate) const LINGERING: u8 = b'U';
pub(crate) const OWNER: u8 = b'B';
pub(crate) const KEY: u8 = b'K';
pub(crate) const ATTEMPT: u8 = b'A';
pub(crate) const TOMBSTONE: u8 = b'T';
pub(crate) const TOMBSTONE_AGE: u8 = b't';
pub(crate) const NOTICE: u8 = b'Z';
pub(crate) const MOVE: u8 = b'V';
pub(crate) const NODE_BOOT: u8 = b'n';
pub(crate) const WINDOW: u8 = b'W';
pub(crate) const HELD: u8 = b'G';
pub(crate) const ABANDONED: u8 = b'X';

/// A key of `table` from its parts.
pub(crate) fn key(table: u8, parts: &[&[u8]]) -> Vec<u8> {
    let mut k = Vec::with_capacity(1 + parts.iter().map(|p| p.len()).sum::<usize>());
    k.push(table);
    for p in parts {
        k.extend_from_slice(p);
    }
    k
}

pub(crate) fn be(v: u64) -> [u8; 8] {
    v.to_be_bytes()
}

/// The u16 at byte `at` of a key.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> FsResult<u16> {
    let two = bytes.get(at..at + 2).and_then(|s| s.try_into().ok());
    two.map(u16::from_be_bytes).ok_or_else(|| corrupt("group"))
}

/// A time as ordered bytes (the sign bit flipped).
pub(crate) fn be_time(t: Time) -> [u8; 8] {
    ((t.0 as u64) ^ (1 << 63)).to_be_bytes()
}

/// The u64 at byte `at` of a key or value.
pub(crate) fn u64_at(bytes: &[u8], at: usize) -> FsResult<u64> {
    bytes
        .get(at..at + 8)
        .and_then(|s| s.try_into().ok())
        .map(u64::from_be_bytes)
        .ok_or_else(|| corrupt("id"))
}

pub(crate) fn time_at(bytes: &[u8], at: usize) -> FsResult<Time> {
    Ok(Time((u64_at(bytes, at)? ^ (1 << 63)) as i64))
}

/// The first key after all keys that start with `prefix`.
pub(crate) fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0xff; 9]
}

/// The first key after `key`.
pub(crate) fn after(key: &[u8]) -> Vec<u8> {
    let mut k = key.to_vec();
    k.push(0);
    k
}

/// A record of the store that cannot be read.
pub(crate) fn corrupt(what: &str) -> FsError {
    FsError::Io(format!("the metadata store holds an unreadable {what}"))
}

impl<K: KvRead> Reader<'_, K> {
    /// All pairs whose key starts with `prefix`, from `from` on, at most `limit`.
    pub(crate) fn scan_prefix(
        &self,
        prefix: &[u8],
        from: Option<&[u8]>,
        limit: usize,
    ) -> Vec<(Vec<u8>, Vec<u8>)> {
        self.0.scan(from.unwrap_or(prefix), &prefix_end(prefix), limit, false)
    }
    /// Whether any key starts with `prefix`.
    pub(crate) fn any_with_prefix(&self, prefix: &[u8]) -> bool {
        !self.scan_prefix(prefix, None, 1).is_empty()
    }
}

/// A command being applied: the store, the stamped time and the machine's sequence.
pub(crate) struct Ctx<'a, K> {
    pub(crate) kv: &'a mut K,
    pub(crate) now: Time,
    pub(crate) sequence: u64,
}

impl<K: Kv> Ctx<'_, K> {
    pub(crate) fn read(&self) -> Reader<'_, K> {
        Reader(&*self.kv)
    }
}
