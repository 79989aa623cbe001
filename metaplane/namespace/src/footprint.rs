//! What a record of the store tells clients: for who watches commands being applied (docs/PROTOCOL.md, R52).

use crate::inode::Inode;
use crate::tables::{ENTRY, INODE, REPLY, u64_at};
use ebb_dataplane_protocol::{InodeId, codec};
use std::hash::{DefaultHasher, Hasher};

/// The inode that a record tells of: its own record, or the directory of an entry. A remembered reply tells of
/// what its command did, and stands for an inode of its own, which no inode's id is (they count up from 1).
pub fn inode_of(key: &[u8]) -> Option<InodeId> {
    match *key.first()? {
        INODE | ENTRY => u64_at(key, 1).ok().map(InodeId),
        REPLY => {
            let mut hasher = DefaultHasher::new();
            hasher.write(key);
            Some(InodeId(hasher.finish() | 1 << 63))
        }
        _ => None,
    }
}

/// Whether a record shows clients the same before and after: the attributes, and who may look at the names. What
/// else an inode's record holds (the stages of a flush, what S3 has) nobody remembers.
pub fn is_shown_alike(key: &[u8], before: &[u8], after: &[u8]) -> bool {
    if before == after {
        return true;
    }
    if key.first() != Some(&INODE) {
        return false;
    }
    let (Ok(before), Ok(after)) = (codec::decode::<Inode>(before), codec::decode::<Inode>(after))
    else {
        return false;
    };
    let holder = |n: &Inode| n.dir.as_ref().and_then(|d| d.delegation);
    before.attr() == after.attr() && holder(&before) == holder(&after)
}
