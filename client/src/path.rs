//! Whole-file conveniences by path, for the command line. Paths are relative to the root of the
//! name space; a leading slash makes no difference.

use crate::error::ClientError;
use crate::files::not_a_file;
use crate::fs::{FileSystem, Owner};
use crate::unnamed::Which;
use crate::{OpenFlags, Result};
use bytes::{Bytes, BytesMut};
use ebb_dataplane_protocol::InodeId;
use ebb_metaplane_protocol::attr::{Attr, FileKind};
use ebb_metaplane_protocol::query::DirEntry;
use ebb_metaplane_protocol::{FsError, Query, QueryReply};

/// Symbolic links followed at most.
const LINKS_MAX: usize = 40;
/// Entries asked for at once.
const PAGE: u32 = 1000;

/// What [`FileSystem::walk`] found.
#[derive(Clone, Debug)]
pub struct WalkEntry {
    /// Path from the root of the walk, components joined by `/`; empty for the root itself.
    pub path: Vec<u8>,
    /// Its attributes.
    pub attr: Attr,
}

/// Components of a path. `.` is dropped, `..` goes up (never above the root).
pub fn components(path: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut out: Vec<Vec<u8>> = Vec::new();
    for part in path.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                out.pop();
            }
            name if name.contains(&0) => {
                return Err(ClientError::Path("a name contains a NUL byte".into()));
            }
            name if name.len() > ebb_dataplane_protocol::ids::NAME_BYTES_MAX => {
                return Err(FsError::NameTooLong.into());
            }
            name => out.push(name.to_vec()),
        }
    }
    Ok(out)
}

impl FileSystem {
    /// The inode at a path; symbolic links are not followed.
    pub async fn resolve(&self, path: &[u8]) -> Result<Attr> {
        self.resolve_components(components(path)?).await
    }

    async fn resolve_components(&self, path: Vec<Vec<u8>>) -> Result<Attr> {
        if path.is_empty() {
            return self.getattr(InodeId::ROOT).await;
        }
        if let Some(name) = path.last() {
            let _ = self.tell(Which::Called(name)).await;
        }
        if self.shared.cluster.leased.is_on() {
            // Name by name, so that each is remembered.
            let mut at = InodeId::ROOT;
            let mut attr = None;
            for name in &path {
                let found = self.lookup(at, name).await?;
                at = found.inode;
                attr = Some(found);
            }
            return attr.ok_or_else(|| FsError::NotFound.into());
        }
        match self.shared.cluster.query(Query::Resolve { path }).await? {
            QueryReply::Attr(attr) => match self.shared.inode(attr.inode) {
                Some(_) => self.getattr(attr.inode).await,
                None => Ok(attr),
            },
            _ => Err(ClientError::Metadata("no attributes in the answer".into())),
        }
    }

    /// The inode at a path, symbolic links followed.
    pub async fn resolve_following(&self, path: &[u8]) -> Result<Attr> {
        let mut todo = components(path)?;
        let mut links = 0;
        // Most paths have no links: ask for the whole first.
        match self.resolve_components(todo.clone()).await {
            Ok(attr) if attr.kind != FileKind::Symlink => return Ok(attr),
            Err(ClientError::Fs(FsError::NotDirectory)) | Ok(_) => {}
            Err(e) => return Err(e),
        }
        'again: loop {
            let mut at = self.getattr(InodeId::ROOT).await?;
            for i in 0..todo.len() {
                at = self.lookup(at.inode, &todo[i]).await?;
                if at.kind == FileKind::Symlink {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(ClientError::Loop);
                    }
                    let target = self.readlink(at.inode).await?;
                    let mut text = Vec::new();
                    if !target.starts_with(b"/") {
                        for c in &todo[..i] {
                            text.extend_from_slice(c);
                            text.push(b'/');
                        }
                    }
                    text.extend_from_slice(&target);
                    let mut next = components(&text)?;
                    next.extend_from_slice(&todo[i + 1..]);
                    todo = next;
                    continue 'again;
                }
            }
            return Ok(at);
        }
    }

    /// The directory a path's last component is in, and that component.
    pub async fn resolve_parent(&self, path: &[u8]) -> Result<(Attr, Vec<u8>)> {
        let mut parts = components(path)?;
        let Some(name) = parts.pop() else {
            return Err(ClientError::Path("the root has no parent".into()));
        };
        let parent = self.resolve_following(&parts.join(&b'/')).await?;
        if parent.kind != FileKind::Directory {
            return Err(FsError::NotDirectory.into());
        }
        Ok((parent, name))
    }

    /// A whole file. Meant for small ones: it is held in memory.
    pub async fn read_file(&self, path: &[u8]) -> Result<Bytes> {
        let attr = self.resolve_following(path).await?;
        if let Some(e) = not_a_file(attr.kind) {
            return Err(e.into());
        }
        let file = self.open(attr.inode, OpenFlags::default()).await?;
        let result: Result<Bytes> = async {
            let mut out = BytesMut::with_capacity(file.attr.size as usize);
            loop {
                let piece = self.read(file.handle, out.len() as u64, 4 << 20).await?;
                if piece.is_empty() {
                    return Ok(out.freeze());
                }
                out.extend_from_slice(&piece);
            }
        }
        .await;
        let released = self.release(file.handle).await;
        let bytes = result?;
        released.map(|()| bytes)
    }

    /// Creates or replaces a file's content; durable and committed when it returns.
    pub async fn write_file(
        &self,
        path: &[u8],
        data: &[u8],
        mode: u32,
        owner: Owner,
    ) -> Result<Attr> {
        let (parent, name) = self.resolve_parent(path).await?;
        let flags = OpenFlags { write: true, truncate: true, exclusive: false };
        let file = self.create(parent.inode, &name, mode, owner, flags).await?;
        let written = self.write(file.handle, 0, data).await;
        let flushed = self.flush(file.handle).await;
        let attr = self.getattr(file.attr.inode).await;
        let released = self.release(file.handle).await;
        written.and(flushed).and(released).and(attr)
    }

    /// All entries of a directory.
    pub async fn list(&self, dir: InodeId) -> Result<Vec<DirEntry>> {
        let mut all: Vec<DirEntry> = Vec::new();
        loop {
            let after = all.last().map_or(Vec::new(), |e| e.name.clone());
            let (page, end) = self.readdir(dir, &after, PAGE).await?;
            let empty = page.is_empty();
            all.extend(page);
            if end || empty {
                return Ok(all);
            }
        }
    }

    /// Visits a subtree, each directory before its entries, names in order. Page by page: memory is
    /// bounded by the depth times a page. Stops at the first error of `visit`.
    pub async fn walk(
        &self,
        root: &[u8],
        mut visit: impl FnMut(WalkEntry) -> Result<()>,
    ) -> Result<()> {
        let attr = self.resolve(root).await?;
        let is_dir = attr.kind == FileKind::Directory;
        let inode = attr.inode;
        visit(WalkEntry { path: Vec::new(), attr })?;
        if !is_dir {
            return Ok(());
        }
        struct Level {
            inode: InodeId,
            path: Vec<u8>,
            page: std::vec::IntoIter<DirEntry>,
            last: Vec<u8>,
            end: bool,
        }
        let level = |inode, path| Level {
            inode,
            path,
            page: Vec::new().into_iter(),
            last: Vec::new(),
            end: false,
        };
        let mut stack = vec![level(inode, Vec::new())];
        while let Some(top) = stack.last_mut() {
            let Some(entry) = top.page.next() else {
                if top.end {
                    stack.pop();
                    continue;
                }
                let (page, end) = self.readdir(top.inode, &top.last, PAGE).await?;
                top.end = end || page.is_empty();
                if let Some(last) = page.last() {
                    top.last.clone_from(&last.name);
                }
                top.page = page.into_iter();
                continue;
            };
            let mut path = top.path.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(&entry.name);
            let below = (entry.attr.kind == FileKind::Directory).then_some(entry.attr.inode);
            visit(WalkEntry { path: path.clone(), attr: entry.attr })?;
            if let Some(inode) = below {
                stack.push(level(inode, path));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cut_into_names() {
        let cut = |p: &str| {
            components(p.as_bytes())
                .expect("valid")
                .into_iter()
                .map(|c| String::from_utf8(c).expect("text"))
                .collect::<Vec<_>>()
        };
        assert_eq!(cut("/a//b/./c/"), ["a", "b", "c"]);
        assert_eq!(cut("a/../../b"), ["b"]);
        assert!(cut("/").is_empty());
        assert!(components(b"a\0b").is_err());
        assert!(components(&[b'x'; 256]).is_err());
    }
}
