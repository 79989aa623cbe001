//! The client's note of files that are open without a handle in the log (docs/PROTOCOL.md, R59), and of what the leader
//! is to be told.

use super::{RETURNED_MAX, Watch};
use ebb_dataplane_protocol::InodeId;
use std::collections::HashMap;

/// What a client has from leaders, and what the leader is to be told.
#[derive(Debug, Default)]
pub struct Loans {
    /// How often, and by which number at most.
    files: HashMap<InodeId, (usize, u64)>,
    /// No more than the leader has noted, which lends no more while they are many.
    returned: Vec<(InodeId, u64)>,
    settled: u64,
}

impl Loans {
    /// A file is about to be asked for: until [`Self::end`], that is a use of it. An answer that is overtaken by a later
    /// one must not come after that one's file was given back.
    pub fn asks(&mut self, inode: InodeId) {
        self.files.entry(inode).or_default().0 += 1;
    }

    /// It was lent under that number. Comes before it is looked whether it may be used.
    pub fn lent(&mut self, inode: InodeId, number: u64) {
        let (_, latest) = self.files.entry(inode).or_default();
        *latest = number.max(*latest);
    }

    /// A use ends: it was not lent, or is closed, or has a handle in the log by now, or may not be used.
    pub fn end(&mut self, inode: InodeId) {
        let Some((count, number)) = self.files.get_mut(&inode) else { return };
        *count -= 1;
        if *count == 0 {
            let number = *number;
            self.files.remove(&inode);
            self.returned.push((inode, number));
        }
    }

    /// The leader wants files back that it lent up to these numbers: those that are not in use are.
    pub fn wanted(&mut self, files: &[(InodeId, u64)]) {
        for &(inode, number) in files {
            match self.files.get_mut(&inode) {
                Some((_, latest)) => *latest = number.max(*latest),
                None => self.returned.push((inode, number)),
            }
        }
    }

    /// Of what was lent in other epochs than this one nothing is in use.
    pub fn settled(&mut self, epoch: u64) {
        self.settled = epoch;
    }

    /// Whether that was so before.
    pub fn is_settled(&self, epoch: u64) -> bool {
        self.settled == epoch
    }

    /// A call is about to be sent.
    pub fn tell(&mut self, watch: &mut Watch) {
        let from = self.returned.len().saturating_sub(RETURNED_MAX);
        watch.returned = self.returned.split_off(from);
        watch.settled = self.settled;
    }

    /// It was not answered.
    pub fn not_told(&mut self, watch: &Watch) {
        self.returned.extend_from_slice(&watch.returned);
    }
}
