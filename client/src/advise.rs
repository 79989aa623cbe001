//! What a reader says of its reads, as in `posix_fadvise(2)`.
//!
//! Nothing here changes what a read answers. A mount needs none of it: the kernel keeps the advice of the programs
//! above it, and reads accordingly.

use crate::Result;
use crate::files::FileHandle;
use crate::fs::FileSystem;
use crate::inode::OpenInode;
use crate::readahead::{Detector, Pattern};
use crate::transfer;
use ebb_dataplane_protocol::{CHUNK_BYTES, ChunkIndex};
use futures::{StreamExt, stream};
use std::ops::Range;
use std::sync::{Arc, PoisonError, Weak};

/// Ranges that are being brought into the nodes' caches, of one file system; of more ranges nothing comes.
pub(crate) const RANGES_MAX: usize = 64;
/// Requests under way for one of them; a node's core works at eight of all clients.
const AT_ONCE: usize = 8;

/// How a file will be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Nothing is known: the handle's reads show it.
    Normal,
    /// By this handle from lower to higher offsets: it reads ahead from the first read on, wherever that is.
    Sequential,
    /// By this handle here and there: neither it nor the nodes fetch more than is asked for (the nodes in pieces of
    /// 256 KiB).
    Random,
    /// The range will be read: the nodes fetch what they lack of it from S3. Nobody waits for it, and what fails is
    /// told by the read.
    WillNeed,
    /// The range was read: what this client has read ahead of it is let go. The nodes keep it.
    DontNeed,
}

impl FileSystem {
    /// Takes an advice for an open file. `range`, in bytes, is for [`Advice::WillNeed`] and [`Advice::DontNeed`]
    /// (what lies past the end of the file is not looked at); the others are for all of the file. Returns at once.
    ///
    /// # Errors
    /// [`crate::ClientError::BadHandle`].
    pub fn advise(&self, handle: FileHandle, range: Range<u64>, advice: Advice) -> Result<()> {
        let file = self.file(handle)?;
        let reads = |pattern| {
            let mut detector = file.detector.lock().unwrap_or_else(PoisonError::into_inner);
            *detector = Detector::of(pattern);
        };
        match advice {
            Advice::Normal => reads(Pattern::Unknown),
            Advice::Sequential => reads(Pattern::Sequential),
            Advice::Random => reads(Pattern::Random),
            Advice::WillNeed => will_need(&file.inode, range),
            Advice::DontNeed => {
                let freed = file.inode.state().blocks.invalidate(range.start, range.end);
                self.shared.read_budget.give(freed as usize);
            }
        }
        Ok(())
    }
}

fn will_need(inode: &Arc<OpenInode>, range: Range<u64>) {
    let end = range.end.min(inode.state().size());
    let Ok(one) = Arc::clone(&inode.shared.advices).try_acquire_owned() else { return };
    let weak = Arc::downgrade(inode);
    inode.shared.runtime.spawn(async move {
        let mut parts = stream::iter(by_chunk(range.start, end))
            .map(|part| prefetch(weak.clone(), part))
            .buffer_unordered(AT_ONCE);
        while let Some(done) = parts.next().await {
            if let Err(e) = done {
                tracing::debug!(error = %e, "what will be needed is not fetched");
                break;
            }
        }
        drop(one);
    });
}

/// A part, unless nobody has the file any more.
async fn prefetch(inode: Weak<OpenInode>, part: Range<u64>) -> Result<()> {
    match inode.upgrade() {
        Some(inode) => transfer::prefetch(&inode, part.start, part.end).await,
        None => Ok(()),
    }
}

fn by_chunk(start: u64, end: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = start;
    std::iter::from_fn(move || {
        let part = at..end.min(ChunkIndex::of_offset(at).start() + u64::from(CHUNK_BYTES));
        at = part.end;
        (part.start < part.end).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::by_chunk;

    const CHUNK: u64 = ebb_dataplane_protocol::CHUNK_BYTES as u64;

    #[test]
    fn parts_are_in_one_chunk_each_and_cover_the_range() {
        let parts: Vec<_> = by_chunk(7, 2 * CHUNK + 1).collect();
        assert_eq!(parts, [7..CHUNK, CHUNK..2 * CHUNK, 2 * CHUNK..2 * CHUNK + 1]);
        assert_eq!(by_chunk(CHUNK, 2 * CHUNK).count(), 1);
        assert_eq!(by_chunk(9, 9).count() + by_chunk(9, 3).count(), 0);
    }
}
