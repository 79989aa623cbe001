//! What a data node's index takes of RAM with a full cache, without the disk to hold it.
//!
//! A real store of `ebb-store` (index, allocator, journal, checkpoints) is opened on a device that
//! keeps only what formatting wrote, since the store itself does no I/O, and is filled with clean
//! chunks as a cache would be. No chunk data exists and no server runs: the figure is the growth of
//! this process's resident memory, so the allocator's overhead is in it.

use crate::BenchError;
use crate::fill::{Media, refused};
use crate::memory;
use crate::report::{Bar, Limit, columns};
use ebb_dataplane_protocol::{ClusterId, CoreId, NodeId};
use ebb_store::{
    CHUNK_BLOCKS, FillPlan, Geometry, Identity, MEMORY_BYTES_DEFAULT, OpenDevice, RelocationMove,
    Store, format_device,
};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io;

pub use crate::fill::Shape;

const BLOCK: u64 = 4096;
const GIB: u64 = 1 << 30;
/// What a node may take beside its arena.
const BESIDE_ARENA: Limit = Limit::at_most((256 << 20) as f64);

/// One shape's figures.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// How the data lies.
    pub shape: Shape,
    /// Bytes the index refers to in the end.
    pub cached_bytes: u64,
    /// The store took no more: its own limit of index memory was reached (a node evicts then).
    pub limited: bool,
    /// Growth of this process's resident memory.
    pub resident_bytes: u64,
    /// The store's own estimate, by which it limits itself.
    pub estimate_bytes: u64,
    /// Resident bytes per GiB cached.
    pub bytes_per_gib: u64,
    /// Entries.
    pub extents: u64,
    /// At most 256 MiB.
    pub bar: Bar,
}

/// A device that remembers what was written and is zeros elsewhere.
struct Sparse {
    bytes: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
}

impl OpenDevice for Sparse {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }
    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (at, block) in (offset..).step_by(BLOCK as usize).zip(buf.chunks_mut(BLOCK as usize)) {
            match self.blocks.get(&at) {
                Some(known) => block.copy_from_slice(&known[..block.len()]),
                None => block.fill(0),
            }
        }
        Ok(())
    }
    fn write_at(&mut self, offset: u64, buf: &[u8]) -> io::Result<()> {
        for (at, block) in (offset..).step_by(BLOCK as usize).zip(buf.chunks(BLOCK as usize)) {
            self.blocks.insert(at, block.to_vec());
        }
        Ok(())
    }
    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A device that takes everything and keeps nothing: nobody reads it again.
struct Nowhere;

impl Media for Nowhere {
    fn write(&mut self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }
    fn relocate(&mut self, _: &RelocationMove) -> io::Result<()> {
        Ok(())
    }
    fn fill(&mut self, plan: &FillPlan, number: u32) -> io::Result<Vec<u32>> {
        Ok((0..plan.blocks).map(|b| b.wrapping_mul(2_654_435_761) ^ number).collect())
    }
}

/// A filled store.
struct Filled {
    store: Store,
    limited: bool,
}

/// Fills a store per shape with up to `gib` GiB. The stores live until all are measured, so that
/// none grows into memory another gave back.
pub fn run(gib: u64, say: impl Fn(&str)) -> Result<Vec<Row>, BenchError> {
    let mut kept = Vec::new();
    let mut rows = Vec::new();
    for shape in [Shape::WholeChunks, Shape::Fragmented, Shape::SmallFiles] {
        say(&format!("an index of {gib} GiB in {shape}"));
        let before = memory::own_resident_bytes();
        let filled = fill(shape, gib)?;
        let resident_bytes = memory::own_resident_bytes().saturating_sub(before);
        let stats = filled.store.stats();
        let per_gib = resident_bytes as f64 / (stats.clean_bytes.max(1) as f64 / GIB as f64);
        rows.push(Row {
            shape,
            cached_bytes: stats.clean_bytes,
            limited: filled.limited,
            resident_bytes,
            estimate_bytes: stats.memory_bytes,
            bytes_per_gib: per_gib as u64,
            extents: stats.extents,
            bar: BESIDE_ARENA.judge(resident_bytes as f64),
        });
        kept.push(filled);
    }
    Ok(rows)
}

fn fill(shape: Shape, gib: u64) -> Result<Filled, BenchError> {
    // Room for the parts that are kept from the cache: journal, checkpoints, reserve.
    let device_bytes = gib.saturating_mul(GIB).saturating_mul(5) / 4 + (2 << 30);
    let mut device = Sparse { bytes: device_bytes, blocks: BTreeMap::new() };
    let geometry = Geometry::for_device(device_bytes).map_err(refused)?;
    let cluster = ClusterId(1);
    let identity = Identity { cluster, store: 1, node: NodeId(1), core: CoreId(0), pg_count: 64 };
    format_device(&mut device, geometry, identity).map_err(refused)?;
    let mut store = Store::open(&mut device, cluster).map_err(refused)?;
    // What a node runs with.
    store.set_memory_limit(MEMORY_BYTES_DEFAULT);
    drop(device);

    let chunks = u32::try_from(gib * GIB / (u64::from(CHUNK_BLOCKS) * BLOCK))
        .map_err(|_| BenchError::Plan("that many GiB are past any device".into()))?;
    let limited = crate::fill::fill(&mut store, &mut Nowhere, shape, chunks)?;
    Ok(Filled { store, limited })
}

/// The rows for people.
pub fn table(rows: &[Row]) -> String {
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|r| {
            vec![
                format!("index of {}", r.shape),
                format!("{:.1}", r.cached_bytes as f64 / GIB as f64),
                mib(r.resident_bytes),
                mib(r.estimate_bytes),
                r.bytes_per_gib.to_string(),
                r.extents.to_string(),
                format!(
                    "≤ 256 MiB: {}{}",
                    if r.bar.met { "met" } else { "MISSED" },
                    if r.limited { "; the store's limit: a node evicts here" } else { "" }
                ),
            ]
        })
        .collect();
    columns(
        &["in memory only", "GiB cached", "RSS MiB", "estimate MiB", "bytes/GiB", "extents", "bar"],
        &cells,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_holds_what_was_asked_for_in_its_number_of_extents() {
        for (shape, extents) in
            [(Shape::WholeChunks, 256), (Shape::Fragmented, 16384), (Shape::SmallFiles, 16384)]
        {
            let filled = fill(shape, 1).expect("fills");
            let stats = filled.store.stats();
            assert!(!filled.limited, "{shape}");
            assert_eq!(stats.clean_bytes, GIB, "{shape}");
            assert_eq!(stats.extents, extents, "{shape}");
        }
    }
}
