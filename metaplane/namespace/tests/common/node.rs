//! A node that journals nothing and forgets nothing: floors, cuts, pins.

use ebb_dataplane_protocol::*;
use std::collections::BTreeMap;

/// Dirty bytes of a file: (generation, start, bytes), in the order they were acked.
pub type Extents = Vec<(u64, u64, Vec<u8>)>;

/// What the node holds of a file.
#[derive(Clone, Debug, Default)]
pub struct Held {
    pub floor: u64,
    pub view: FileView,
    pub extents: Extents,
    pub pins: BTreeMap<u64, Extents>,
}

impl Held {
    pub fn install(&mut self, view: &FileView) {
        if view.version < self.view.version {
            return;
        }
        for c in &view.cuts {
            for (g, start, bytes) in &mut self.extents {
                if *g <= c.generation.0 {
                    bytes.truncate(c.at.saturating_sub(*start) as usize);
                }
            }
        }
        // The object holds these.
        self.extents.retain(|e| e.0 > view.clean_generation.0 && !e.2.is_empty());
        self.view = view.clone();
    }
    pub fn write(&mut self, grant: &Grant, start: u64, bytes: &[u8]) -> Result<(), ()> {
        if grant.view.version < self.view.version || grant.generation.0 < self.floor {
            return Err(());
        }
        assert!(start + bytes.len() as u64 <= grant.alloc_limit);
        self.install(&grant.view);
        self.extents.push((grant.generation.0, start, bytes.to_vec()));
        Ok(())
    }
    pub fn seal(&mut self, g: u64) -> (bool, u64) {
        self.floor = self.floor.max(g + 1);
        let pinned: Extents = self.extents.iter().filter(|e| e.0 <= g).cloned().collect();
        let high = pinned.iter().map(|e| e.1 + e.2.len() as u64).max().unwrap_or(0);
        let has = !pinned.is_empty();
        self.pins.insert(g, pinned);
        (has, high)
    }
}
