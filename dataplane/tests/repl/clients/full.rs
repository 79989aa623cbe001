//! A member whose device stays full (R56): what its primary's clients see, and what becomes of the member.

use super::*;
use crate::repl::shard;

/// The group it is about, its primary, and the member that is full.
const GROUP: usize = 0;
const PRIMARY: u32 = 1;
const FULL: u32 = 2;
/// No request may wait longer: until the member said no, and 5 s more.
const ANSWERED_MS: u64 = 8_000;
/// Sizes of what fills a device, down to its last blocks.
const SIZES: [u64; 3] = [PIECE_BYTES, 64 << 10, 4096];

impl World {
    /// The member's device is full to its last block, with what the group has no part in, and stays so.
    fn fill_to_the_end(&mut self) {
        self.fill_device(FULL);
        let (inode, ..) = self.files.ballast[&FULL];
        // None of those that `drive_ballast` writes.
        self.files.ballast.insert(FULL, (inode, PIECES, false));
        let (mut at, mut sequence) = (0, 0);
        for size in SIZES {
            let before = self.tally.full;
            while self.tally.full == before {
                if !self.asked.values().any(|a| matches!(a.1, Request::Ballast)) {
                    sequence += 1;
                    self.write_ballast(FULL, inode, at, size as usize, sequence);
                    at += size;
                }
                self.heartbeats();
                self.turn();
            }
        }
    }

    fn cells_of_group(&self) -> Vec<(usize, usize)> {
        let all = (0..FILES as usize).flat_map(|f| (0..CELLS.len()).map(move |c| (f, c)));
        all.filter(|(f, c)| usize::from(self.pg_of(*f, *c).0) == GROUP).collect()
    }

    fn unanswered_writes(&self) -> usize {
        let pending = |(f, c): &(usize, usize)| self.files.all[*f].cells[*c].pending.len();
        self.cells_of_group().iter().map(pending).sum()
    }

    /// A client writes to the group or reads what is there.
    fn use_group(&mut self, writes: bool) {
        let cells = self.cells_of_group();
        let (file, cell) = cells[self.rng.random_range(0..cells.len())];
        if self.rng.random_bool(0.3) {
            return self.read_cell(file, cell);
        }
        if writes && self.files.all[file].cells[cell].pending.is_empty() {
            self.new_write(file, cell);
        }
    }

    /// A while goes by, in which nobody waits for an answer of the primary for too long.
    fn while_asked(
        &mut self,
        ms: u64,
        since: &mut BTreeMap<u64, u64>,
        mut step: impl FnMut(&mut Self),
        over: impl Fn(&Self) -> bool,
    ) -> bool {
        let (until, mut beat) = (self.now + ms, self.now);
        while self.now < until {
            step(self);
            self.turn();
            // Nobody's lease ends here.
            if self.now >= beat {
                self.heartbeats();
                beat = self.now + 100;
            }
            self.meta_step();
            let open = self.asked.iter().filter(|a| a.1.0 == PRIMARY).map(|a| *a.0);
            let before = std::mem::take(since);
            let now = self.now;
            *since = open.map(|id| (id, before.get(&id).copied().unwrap_or(now))).collect();
            if let Some((id, asked)) = since.iter().find(|a| a.1 + ANSWERED_MS < now) {
                let what = &self.asked[id];
                panic!(
                    "no answer since {asked}, and it is {now}: {what:?} {:?}",
                    self.map.pgs[GROUP]
                );
            }
            if over(self) {
                return true;
            }
        }
        false
    }

    fn begin_full(&mut self, min_in_sync: u8) {
        for _ in 0..400 {
            self.client_step();
            self.turn();
        }
        self.calm = true;
        (self.steady, self.copies) = (true, 2);
        self.retry_until_quiet();
        self.files.still = false;
        assert_eq!(self.map.pgs[GROUP].members, [shard(PRIMARY), shard(FULL)]);
        self.map.pgs[GROUP].min_in_sync = min_in_sync;
        self.map.version = MapVersion(self.map.version.0 + 1);
        self.heartbeats();
        self.fill_to_the_end();
    }

    fn end_full(&mut self) {
        self.map.pgs[GROUP].min_in_sync = 0;
        self.map.version = MapVersion(self.map.version.0 + 1);
        self.heal_and_check();
    }

    /// It goes, its primary's clients go on, and it comes back when there is space.
    pub fn a_full_member_is_dropped(&mut self) {
        self.begin_full(1);
        let mut since = BTreeMap::new();
        let dropped = |w: &Self| !w.map.pgs[GROUP].members.contains(&shard(FULL));
        let gone = self.while_asked(12_000, &mut since, |w| w.use_group(true), dropped);
        assert!(gone, "the full member stays: {:?}", self.map.pgs[GROUP]);
        // What was asked meanwhile is done, though the device is as full as it was.
        let acked = self.tally.acked;
        self.while_asked(3_000, &mut since, |w| w.use_group(true), |_| false);
        let done = |w: &Self| w.unanswered_writes() == 0;
        let all = self.while_asked(10_000, &mut since, |w| w.use_group(false), done);
        assert!(all && self.tally.acked > acked, "writers wait for a member that is dropped");
        self.end_full();
    }

    /// Too few would remain without it: it stays, and its primary takes no new writes as long as it is full.
    pub fn a_full_member_that_is_needed_stays(&mut self) {
        self.begin_full(2);
        let mut since = BTreeMap::new();
        let here = |w: &Self| {
            let members = &w.map.pgs[GROUP].members;
            assert!(members.contains(&shard(FULL)), "it is needed, and dropped");
            false
        };
        // One write of each cell is asked for, again and again.
        let cells = self.cells_of_group().len();
        let asked = |w: &Self| here(w) || w.unanswered_writes() == cells;
        self.while_asked(20_000, &mut since, |w| w.use_group(true), asked);
        self.while_asked(5_000, &mut since, |w| w.use_group(true), here);
        let (acked, refused, records) = (self.tally.acked, self.tally.no_space, self.journaled());
        // And another one, which is new to the primary.
        self.cells_of_group().into_iter().for_each(|(file, cell)| self.new_write(file, cell));
        self.while_asked(15_000, &mut since, |w| w.use_group(true), here);
        if self.tally.acked == acked {
            assert!(self.tally.no_space > refused, "nobody is told why");
            assert_eq!(self.journaled(), records, "it takes what the member can't");
            self.tally.full_for_long += 1;
        }
        // Nor does the leader wait, who would flush.
        let leads = |w: &mut Self| {
            w.use_group(false);
            w.leader_step();
        };
        self.while_asked(15_000, &mut since, leads, here);
        self.end_full();
    }

    /// Records of the primary, which has nothing but the group.
    fn journaled(&self) -> u64 {
        let core = self.nodes[&PRIMARY].core.as_ref().expect("it is there");
        core.report().stats.journal_records
    }
}
