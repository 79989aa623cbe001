//! An open directory: a stream over the pages of the metadata plane.
//!
//! Offsets count entries: 0 is `.`, 1 is `..`, then the entries in name order. A page goes on after
//! the last *name* of the one before, so that entries removed while the stream is read (`rm -r`)
//! shift nothing. Seeking back re-reads from the start of a page.

use crate::filesystem::Shared;
use ebb_client::{Attr, DirEntry, FileSystem, InodeId, Result};

/// Entries of a page.
const PAGE: u32 = 1000;
/// Offset of the first entry.
const FIRST: u64 = 2;

pub(crate) struct DirStream {
    inode: InodeId,
    /// Of each page seen: the position of its first entry, and the name before it.
    starts: Vec<(u64, Vec<u8>)>,
    /// Position of the first entry of `page`.
    first: u64,
    page: Vec<DirEntry>,
    end: bool,
    loaded: bool,
}

impl DirStream {
    pub(crate) fn new(inode: InodeId) -> Self {
        Self {
            inode,
            starts: Vec::new(),
            first: FIRST,
            page: Vec::new(),
            end: false,
            loaded: false,
        }
    }

    /// The stream begins anew (rewinddir): a fresh look at the directory.
    fn rewind(&mut self) {
        *self = Self::new(self.inode);
    }

    /// Entries from a position on, as far as one page goes; empty at the end.
    async fn from(&mut self, fs: &FileSystem, position: u64) -> Result<&[DirEntry]> {
        let position = position.max(FIRST);
        if !self.loaded || position < self.first {
            let at = self.starts.iter().rposition(|(first, _)| *first <= position);
            let (first, after) = at.map_or((FIRST, Vec::new()), |i| self.starts[i].clone());
            self.load(fs, first, after).await?;
        }
        while position >= self.first + self.page.len() as u64 {
            let Some(last) = self.page.last().filter(|_| !self.end) else { return Ok(&[]) };
            let (first, after) = (self.first + self.page.len() as u64, last.name.clone());
            self.load(fs, first, after).await?;
        }
        Ok(&self.page[(position - self.first) as usize..])
    }

    async fn load(&mut self, fs: &FileSystem, first: u64, after: Vec<u8>) -> Result<()> {
        let (page, end) = fs.readdir(self.inode, &after, PAGE).await?;
        if self.starts.last().is_none_or(|(known, _)| *known < first) {
            self.starts.push((first, after));
        }
        (self.first, self.end, self.page, self.loaded) = (first, end, page, true);
        Ok(())
    }
}

/// Adds entries from `offset` on until `add` says that the reply is full. `add` gets the offset that
/// follows the entry.
pub(crate) async fn fill(
    shared: &Shared,
    stream: &tokio::sync::Mutex<DirStream>,
    offset: u64,
    mut add: impl FnMut(u64, &[u8], &Attr) -> bool,
) -> Result<()> {
    let mut stream = stream.lock().await;
    let mut position = offset;
    if offset == 0 {
        stream.rewind();
        let own = shared.fs.getattr(stream.inode).await?;
        if add(1, b".", &own) {
            return Ok(());
        }
        position = 1;
    }
    if position == 1 {
        let parent = match stream.inode {
            InodeId::ROOT => shared.fs.getattr(InodeId::ROOT).await?,
            inode => shared.fs.parent(inode).await?,
        };
        if add(FIRST, b"..", &parent) {
            return Ok(());
        }
        position = FIRST;
    }
    loop {
        let entries = stream.from(&shared.fs, position).await?;
        if entries.is_empty() {
            return Ok(());
        }
        for entry in entries {
            position += 1;
            if add(position, &entry.name, &entry.attr) {
                return Ok(());
            }
        }
    }
}
