//! Extended attributes as the kernel has them. It checks who may do what: `user.` by the file's permissions, `trusted.`
//! and `security.` by capabilities. That others than root don't see names in `trusted.` is left to us.

use crate::convert::errno;
use crate::filesystem::{Shared, Shim};
use ebb_client::{Attr, ClientError, FileKind, InodeId, Result, XattrMode};
use fuser::{Errno, ReplyEmpty, ReplyXattr};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// As setxattr(2) has it.
fn mode(flags: i32) -> Option<XattrMode> {
    match flags {
        0 => Some(XattrMode::Any),
        libc::XATTR_CREATE => Some(XattrMode::Create),
        libc::XATTR_REPLACE => Some(XattrMode::Replace),
        _ => None,
    }
}

/// The error's number. That a file's attributes don't fit is its user's affair, and no trouble of ours.
fn refused(what: &str, e: &ClientError) -> Errno {
    if e.errno() != libc::ENOSPC {
        return errno(what, e);
    }
    tracing::debug!(
        what,
        "all extended attributes of a file have the room of an object's metadata"
    );
    Errno::ENOSPC
}

/// Bytes, or how many there are if `size` is 0.
fn answer(what: &str, bytes: Result<Vec<u8>>, size: u32, reply: ReplyXattr) {
    match bytes {
        Ok(bytes) if size == 0 => reply.size(bytes.len() as u32),
        Ok(bytes) if bytes.len() > size as usize => reply.error(Errno::ERANGE),
        Ok(bytes) => reply.data(&bytes),
        Err(e) => reply.error(refused(what, &e)),
    }
}

impl Shared {
    /// An extended attribute was set or removed, or may have been.
    fn changed(&self, what: &str, inode: InodeId, changed: Result<Attr>, reply: ReplyEmpty) {
        if changed.as_ref().map_or(true, |a| a.kind == FileKind::Directory) {
            self.known.directory_changed(inode);
        }
        match changed {
            Ok(_) => reply.ok(),
            Err(e) => reply.error(refused(what, &e)),
        }
    }
}

impl Shim {
    pub(crate) fn set_xattr(
        &self,
        inode: InodeId,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        reply: ReplyEmpty,
    ) {
        let Some(how) = mode(flags) else { return reply.error(Errno::EINVAL) };
        let (name, value) = (name.as_bytes().to_vec(), value.to_vec());
        self.shared.known.xattrs_change(inode);
        self.start(async move |s| {
            let changed = s.fs.set_xattr(inode, &name, &value, how).await;
            s.changed("setxattr", inode, changed, reply);
        });
    }

    pub(crate) fn remove_xattr(&self, inode: InodeId, name: &OsStr, reply: ReplyEmpty) {
        let name = name.as_bytes().to_vec();
        self.shared.known.xattrs_change(inode);
        self.start(async move |s| {
            let changed = s.fs.remove_xattr(inode, &name).await;
            s.changed("removexattr", inode, changed, reply);
        });
    }

    pub(crate) fn get_xattr(&self, inode: InodeId, name: &OsStr, size: u32, reply: ReplyXattr) {
        // What is no name of ours is the library's to refuse.
        let is_acl = name.as_bytes().starts_with(b"system.");
        if !is_acl && self.shared.known.has_no_xattrs(inode, self.shared.attr_ttl) {
            return reply.error(Errno::ENODATA);
        }
        let name = name.as_bytes().to_vec();
        self.start(async move |s| {
            answer("getxattr", s.fs.xattr(inode, &name).await, size, reply);
        });
    }

    pub(crate) fn list_xattrs(&self, inode: InodeId, is_root: bool, size: u32, reply: ReplyXattr) {
        if self.shared.known.has_no_xattrs(inode, self.shared.attr_ttl) {
            return answer("listxattr", Ok(Vec::new()), size, reply);
        }
        self.start(async move |s| {
            let names = s.fs.xattrs(inode).await.map(|xattrs| {
                let shown = |name: &[u8]| is_root || !name.starts_with(b"trusted.");
                let names = xattrs.into_iter().map(|(name, _)| name).filter(|name| shown(name));
                names.flat_map(|name| [name, vec![0]].concat()).collect()
            });
            answer("listxattr", names, size, reply);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wish_at_a_time() {
        assert_eq!(mode(0), Some(XattrMode::Any));
        assert_eq!(mode(libc::XATTR_CREATE), Some(XattrMode::Create));
        assert_eq!(mode(libc::XATTR_CREATE | libc::XATTR_REPLACE), None);
    }
}
