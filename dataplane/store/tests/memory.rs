//! The index stays small: 100 GiB of cached large extents in at most 200 MiB of RAM, measured.

mod support;

use ebb_dataplane_protocol::*;
use ebb_store::*;
use support::*;

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: u64 = text.split(' ').nth(1).and_then(|p| p.parse().ok()).expect("a number");
    pages * 4096
}

#[test]
fn a_hundred_gib_of_cache_fit_two_hundred_mib_of_ram() {
    const GIB: u64 = 100;
    let mut r = Rig::new((GIB + 4) << 30);
    r.store.set_memory_limit(200 << 20);
    let before = resident_bytes();
    let crcs = vec![7u32; 256];
    for chunk in 0..(GIB << 30) / u64::from(CHUNK_BYTES) {
        for part in 0..4 {
            let op = FillOp {
                inode: InodeId(2 + chunk / 256),
                chunk: ChunkIndex((chunk % 256) as u32),
                first_block: part * 256,
                blocks: 256,
                content: ContentId(1),
                tail_valid: 4096,
            };
            let plan = r.store.begin_fill(&op).expect("within the limit");
            r.store.commit_fill(plan.id, &crcs).expect("commits");
        }
        if chunk % 16 == 0 {
            while let Some(b) = r.store.take_batch() {
                r.store.batch_durable(b.id).expect("in flight");
            }
            // The journal's contents do not matter here, its space does.
            if r.store.checkpoint_due() {
                r.store.begin_checkpoint();
            }
            loop {
                match r.store.checkpoint_step() {
                    CheckpointStep::Idle | CheckpointStep::Wait => break,
                    CheckpointStep::Write { token, bytes, .. } => {
                        assert!(bytes.len() <= 1 << 20);
                        r.store.checkpoint_done(token).expect("in flight");
                    }
                    CheckpointStep::Relocate { token, .. }
                    | CheckpointStep::Sync { token }
                    | CheckpointStep::WriteDurable { token, .. } => {
                        r.store.checkpoint_done(token).expect("in flight");
                    }
                }
            }
        }
    }
    while let Some(b) = r.store.take_batch() {
        r.store.batch_durable(b.id).expect("in flight");
    }
    let stats = r.store.stats();
    let grown = resident_bytes() - before;
    println!(
        "{} GiB in {} extents: estimated {} KiB/GiB, resident {} KiB/GiB, checkpoint {} KiB/GiB",
        stats.clean_bytes >> 30,
        stats.extents,
        (stats.memory_bytes >> 10) / GIB,
        (grown >> 10) / GIB,
        (stats.index_bytes >> 10) / GIB,
    );
    assert_eq!(stats.clean_bytes, GIB << 30);
    assert!(stats.memory_bytes < 200 << 20 && grown < 200 << 20, "{stats:?}, grown {grown}");
}
