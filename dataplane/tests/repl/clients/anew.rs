//! A view that is being presented while its core begins to lead another group of the same file.

use super::*;
use crate::repl::{DRIFT_MS, LEASE_MS, shard};

const FILE: usize = 0;
/// The groups of its runs, and who is to lead both.
const GROUPS: [u16; RUNS] = [0, 1];
const NODE: u32 = 2;

impl World {
    /// All of the file is cut away: the command committed, nobody was told.
    fn cut_all_of(&mut self, file: usize) {
        let (now, version) = (self.tick(), self.map.version);
        let f = &mut self.files.all[file];
        f.cells.iter_mut().for_each(|c| c.history.cut(now));
        f.since = version;
        f.view.cuts.push(Cut { generation: f.generation, at: 0 });
        f.view.version = ViewVersion(f.view.version.0 + 1);
        f.generation = f.generation.next();
        f.heard_cuts = [false; RUNS];
    }

    /// What is journaled of the cut is of the group that the core led when it came. Presented again, it has to be
    /// journaled in the one that it leads since, or what was cut away is back there.
    pub fn a_group_is_taken_over_while_a_cut_is_journaled(&mut self) {
        self.calm = true;
        let last = &mut self.files.last_inode;
        self.files.all[FILE].inode = loop {
            let inode = next_inode(last, 0..SHARED);
            let of = |run| PgId::of(inode, RunIndex(run), PGS).0;
            if (0..RUNS as u32).map(of).eq(GROUPS) {
                break inode;
            }
        };
        assert_eq!(self.map.pgs[0].members, [shard(1), shard(NODE)]);
        assert_eq!(self.primary(PgId(1)), Some(NODE));
        (0..CELLS.len()).for_each(|cell| self.new_write(FILE, cell));
        self.retry_until_quiet();
        self.crash(1, 0);
        self.nodes.get_mut(&1).expect("known").back_at = u64::MAX;
        self.now += LEASE_MS + DRIFT_MS;
        self.heartbeats();

        self.cut_all_of(FILE);
        self.present(NODE, FILE, SessionId(1), self.map.version);
        // Its record is on its way to the device.
        self.end_turn(NODE);
        assert!(!self.nodes[&NODE].in_flight.is_empty());
        self.take_over(0);
        assert_eq!(self.primary(PgId(0)), Some(NODE));
        self.heartbeat(NODE);
        while !self.asked.is_empty() {
            self.turn();
        }
        self.check_all("after a cut");
    }
}
