//! An open directory: a stream over the pages of the metadata plane.
//!
//! Offsets count entries: 0 is `.`, 1 is `..`, then the entries in name order. A page goes on after
//! the last *name* of the one before, so that entries removed while the stream is read (`rm -r`)
//! shift nothing. Seeking back re-reads from the start of a page.

use ebb_client::{DirEntry, FileSystem, InodeId, Result};

/// Entries of a page.
const PAGE: u32 = 1000;
/// Offset of the first entry.
pub(crate) const FIRST: u64 = 2;

pub(crate) struct DirStream {
    pub(crate) inode: InodeId,
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
    pub(crate) fn rewind(&mut self) {
        *self = Self::new(self.inode);
    }

    /// Entries from a position on, as far as one page goes; empty at the end.
    pub(crate) async fn from(&mut self, fs: &FileSystem, position: u64) -> Result<&[DirEntry]> {
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
