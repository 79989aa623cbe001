//! The reference model: what a store must hold, block by block, with none of its machinery.

use ebb_dataplane_protocol::control::FlushDone;
use ebb_dataplane_protocol::*;
use ebb_store::{Scope, Seen, ViewUpdate};
use std::collections::BTreeMap;
use std::rc::Rc;

pub type Block = Rc<[u8]>;
pub type BlockKey = (u32, u32);

#[derive(Clone, Debug)]
pub enum Op {
    Write {
        inode: InodeId,
        chunk: u32,
        first: u32,
        blocks: Vec<Block>,
        end: u64,
        generation: Generation,
        session: SessionId,
        sequence: u64,
        below: u64,
    },
    Seal(Scope, Generation),
    FlushDone(PgId, FlushDone),
    Aborted(Scope, Generation),
    View(ViewUpdate),
    Floor(Scope, Generation),
    Drop(Scope),
    Frozen(u16, PgEpoch),
    Released(u16),
    Thaw(u16, PgEpoch),
    Trim(SessionId, u64),
    SessionGone(SessionId),
    Node(NodeId),
}

#[derive(Clone, Debug, Default)]
pub struct Inode {
    pub floor: Generation,
    pub view: ViewVersion,
    pub dirty: BTreeMap<BlockKey, (Generation, Block)>,
    pub seals: BTreeMap<Generation, (BTreeMap<BlockKey, Block>, u64)>,
    pub marks: BTreeMap<Generation, u64>,
}

impl Inode {
    /// Least tag that may write: past what was fenced, and not below one that was taken (R7).
    pub fn least(&self) -> Generation {
        self.floor.max(self.marks.keys().next_back().copied().unwrap_or_default())
    }
}

/// Where and under which tag a write was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    pub generation: Generation,
    pub pg: u16,
}

#[derive(Clone, Debug, Default)]
pub struct State {
    pub inodes: BTreeMap<Scope, Inode>,
    pub windows: BTreeMap<SessionId, (u64, BTreeMap<u64, Applied>)>,
    pub frozen: BTreeMap<u16, PgEpoch>,
    pub node: NodeId,
}

impl State {
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Write {
                inode,
                chunk,
                first,
                blocks,
                end,
                generation,
                session,
                sequence,
                below,
            } => {
                let scope = Scope::of(*inode, ChunkIndex(*chunk), super::driver::PGS);
                let i = self.inodes.entry(scope).or_default();
                for (k, b) in blocks.iter().enumerate() {
                    i.dirty.insert((*chunk, first + k as u32), (*generation, b.clone()));
                }
                let m = i.marks.entry(*generation).or_default();
                *m = (*m).max(*end);
                while i.marks.len() > 16 {
                    let low = i.marks.pop_first().map_or(0, |m| m.1);
                    if let Some(mut e) = i.marks.first_entry() {
                        let v = (*e.get()).max(low);
                        e.insert(v);
                    }
                }
                let pg = scope.pg.0;
                let w = self.windows.entry(*session).or_default();
                w.1.entry(*sequence).or_insert(Applied { generation: *generation, pg });
                w.0 = w.0.max(*below);
                let below = w.0;
                w.1.retain(|s, _| *s >= below);
            }
            Op::Seal(scope, g) => {
                let i = self.inodes.entry(*scope).or_default();
                i.floor = i.floor.max(g.next());
                if !i.seals.contains_key(g) {
                    let snapshot = i
                        .dirty
                        .iter()
                        .filter(|(_, (d, _))| d <= g)
                        .map(|(k, (_, b))| (*k, b.clone()))
                        .collect();
                    let high = i.marks.range(..=g).map(|m| *m.1).max().unwrap_or(0);
                    i.seals.insert(*g, (snapshot, high));
                }
            }
            Op::FlushDone(pg, d) => {
                let scope = Scope { inode: d.inode, pg: *pg };
                if let Some(i) = self.inodes.get_mut(&scope) {
                    let floor = i.floor;
                    i.dirty.retain(|_, (g, _)| !(*g <= d.generation && *g < floor));
                    i.marks.retain(|g, _| !(*g <= d.generation && *g < floor));
                    i.seals.retain(|g, _| *g > d.generation);
                }
            }
            Op::Aborted(scope, g) => {
                if let Some(i) = self.inodes.get_mut(scope) {
                    i.seals.retain(|s, _| s > g);
                }
            }
            Op::View(v) => {
                let i = self.inodes.entry(v.scope).or_default();
                if v.version > i.view {
                    i.view = v.version;
                    for c in &v.cuts {
                        i.floor = i.floor.max(c.generation.next());
                        cut(i, c);
                    }
                }
            }
            Op::Floor(scope, floor) => {
                let i = self.inodes.entry(*scope).or_default();
                i.floor = i.floor.max(*floor);
            }
            Op::Drop(scope) => {
                self.inodes.remove(scope);
            }
            Op::Frozen(pg, e) => {
                self.frozen.insert(*pg, *e);
            }
            Op::Released(pg) => {
                self.frozen.remove(pg);
                self.windows.values_mut().for_each(|w| w.1.retain(|_, a| a.pg != *pg));
            }
            Op::Thaw(pg, e) => {
                if self.frozen.get(pg) == Some(e) {
                    self.frozen.remove(pg);
                }
            }
            Op::Trim(session, below) => {
                if let Some(w) = self.windows.get_mut(session) {
                    w.0 = w.0.max(*below);
                    let below = w.0;
                    w.1.retain(|s, _| *s >= below);
                }
            }
            Op::SessionGone(session) => {
                self.windows.remove(session);
            }
            Op::Node(n) => self.node = *n,
        }
    }

    pub fn seen(&self, session: SessionId, sequence: u64) -> Seen {
        match self.windows.get(&session) {
            Some(w) if sequence < w.0 => Seen::Answered,
            Some(w) => w.1.get(&sequence).map_or(Seen::New, |a| Seen::Applied(a.generation)),
            None => Seen::New,
        }
    }
}

fn cut(i: &mut Inode, c: &Cut) {
    let keys: Vec<BlockKey> = i.dirty.keys().copied().collect();
    for k in keys {
        let start = block_start(k);
        let (g, b) = &i.dirty[&k];
        if *g > c.generation || start + 4096 <= c.at {
            continue;
        }
        if start >= c.at {
            i.dirty.remove(&k);
        } else {
            let mut bytes = b.to_vec();
            bytes[(c.at - start) as usize..].fill(0);
            let g = *g;
            i.dirty.insert(k, (g, bytes.into()));
        }
    }
    for (_, m) in i.marks.range_mut(..=c.generation) {
        *m = (*m).min(c.at);
    }
}

pub fn block_start(k: BlockKey) -> u64 {
    u64::from(k.0) * u64::from(CHUNK_BYTES) + u64::from(k.1) * 4096
}
