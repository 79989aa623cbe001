//! What the store says it takes of RAM is what the process grows by, for large extents and for small files, clean and
//! dirty, in any order; and the index stays small by that measure. Each workload has a process of its own: the heap of one
//! serves the next, and nothing seems to grow.

mod support;

use ebb_dataplane_protocol::*;
use ebb_store::*;
use rand::seq::SliceRandom;
use rand::{SeedableRng, rngs::StdRng};
use support::*;

/// What the heap may keep of what came and went, in every one of these workloads.
const HOLES: u64 = 10 << 20;
/// Set in the process that does a test's work.
const ALONE: &str = "EBB_MEMORY_TEST_ALONE";

/// Runs this test in a process of its own. `false`: this is it.
fn elsewhere(test: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return false;
    }
    let mut again = std::process::Command::new(std::env::current_exe().expect("this program"));
    let done = again.args(["--exact", test, "--nocapture"]).env(ALONE, "1").output().expect("runs");
    println!("{}", String::from_utf8_lossy(&done.stdout));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    true
}

fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: u64 = text.split(' ').nth(1).and_then(|p| p.parse().ok()).expect("a number");
    pages * 4096
}

/// The journal's contents do not matter here, its space does.
fn settle(store: &mut Store) {
    loop {
        let mut moved = false;
        while let Some(b) = store.take_batch() {
            store.batch_durable(b.id).expect("in flight");
            moved = true;
        }
        if store.checkpoint_due() {
            store.begin_checkpoint();
        }
        match store.checkpoint_step() {
            CheckpointStep::Idle | CheckpointStep::Wait => {}
            CheckpointStep::Write { token, .. }
            | CheckpointStep::Relocate { token, .. }
            | CheckpointStep::Sync { token }
            | CheckpointStep::WriteDurable { token, .. } => {
                store.checkpoint_done(token).expect("in flight");
                moved = true;
            }
        }
        if !moved {
            return;
        }
    }
}

fn fill(store: &mut Store, inode: u64, chunk: u32, first_block: u32, blocks: u32) {
    let op = FillOp {
        inode: InodeId(inode),
        chunk: ChunkIndex(chunk),
        first_block,
        blocks,
        content: ContentId(1),
        tail_valid: 4096,
    };
    let plan = store.begin_fill(&op).expect("within the limit");
    store.commit_fill(plan.id, &vec![7; blocks as usize]).expect("commits");
}

/// What a workload adds, by the store's word and by the kernel's.
fn compare(what: &str, device: u64, work: impl FnOnce(&mut Rig)) -> (u64, u64) {
    let mut r = Rig::new(device);
    r.store.set_memory_limit(1 << 30);
    // Buffers of the journal and of checkpoints are taken once.
    for i in 0..64 {
        fill(&mut r.store, 1 << 35, i, 0, 1024);
    }
    r.store.begin_checkpoint();
    settle(&mut r.store);
    let (estimated, real) = (r.store.stats().memory_bytes, resident_bytes());
    work(&mut r);
    settle(&mut r.store);
    let estimated = r.store.stats().memory_bytes - estimated;
    let real = resident_bytes() - real;
    let percent = estimated as f64 * 100.0 / real as f64;
    println!("{what}: estimated {estimated}, real {real}: {percent:.1} % of it");
    // Besides, a heap keeps holes where buffers and shorter lists were.
    let holes = real.saturating_sub(estimated) < HOLES;
    let close = percent >= 87.0 || holes;
    assert!(close && percent <= 115.0, "{what}: estimated {percent:.1} % of {real}");
    (estimated, real)
}

#[test]
fn a_hundred_gib_of_cache_fit_two_hundred_mib_of_ram() {
    if elsewhere("a_hundred_gib_of_cache_fit_two_hundred_mib_of_ram") {
        return;
    }
    const GIB: u64 = 100;
    let (estimated, real) = compare("100 GiB of large extents", (GIB + 4) << 30, |r| {
        for chunk in 0..(GIB << 30) / u64::from(CHUNK_BYTES) {
            for part in 0..4 {
                fill(&mut r.store, 2 + chunk / 256, (chunk % 256) as u32, part * 256, 256);
            }
            if chunk % 16 == 0 {
                settle(&mut r.store);
            }
        }
        settle(&mut r.store);
        assert!(r.store.stats().clean_bytes >= GIB << 30);
    });
    assert!(estimated < 200 << 20 && real < 200 << 20);
}

#[test]
fn small_files_take_what_is_estimated() {
    if elsewhere("small_files_take_what_is_estimated") {
        return;
    }
    const FILES: u64 = 150_000;
    let (_, real) = compare("files of 64 KiB, read", 40 << 30, |r| {
        for file in 0..FILES {
            fill(&mut r.store, 2 + file, 0, 0, 16);
            if file % 64 == 0 {
                settle(&mut r.store);
            }
        }
    });
    assert!(real / FILES < 480, "{} bytes for a file of 64 KiB", real / FILES);
}

#[test]
fn a_million_files_of_a_block_fit_six_gib_and_four_hundred_mib_of_ram() {
    if elsewhere("a_million_files_of_a_block_fit_six_gib_and_four_hundred_mib_of_ram") {
        return;
    }
    const FILES: u64 = 1_000_000;
    let (_, real) = compare("a million files of 4 KiB", 6 << 30, |r| {
        for file in 0..FILES {
            fill(&mut r.store, 2 + file, 0, 0, 1);
            if file % 64 == 0 {
                settle(&mut r.store);
            }
        }
        settle(&mut r.store);
        assert!(r.store.stats().chunks >= FILES);
        let (index, most) = (r.store.stats().index_bytes, r.store.stats().index_bytes_max);
        println!("index on the device: {index} of {most} bytes");
        assert!(index <= most / 2, "they would be accepted dirty, too");
    });
    println!("{} bytes of RAM for each", real / FILES);
    assert!(real < 400 << 20, "{real} bytes of RAM");
}

#[test]
fn small_files_in_any_order_take_what_is_estimated() {
    if elsewhere("small_files_in_any_order_take_what_is_estimated") {
        return;
    }
    const FILES: u64 = 150_000;
    compare("files of 64 KiB, read in any order", 40 << 30, |r| {
        let mut files: Vec<u64> = (0..FILES).collect();
        files.shuffle(&mut StdRng::seed_from_u64(1));
        for (i, file) in files.into_iter().enumerate() {
            fill(&mut r.store, 2 + file, 0, 0, 16);
            if i % 64 == 0 {
                settle(&mut r.store);
            }
        }
    });
}

fn write(store: &mut Store, op: &WriteOp) {
    let plan = store.begin_write(op).expect("within the limit");
    let buffer = vec![0u8; if plan.inline { plan.blocks as usize * BLOCK } else { 0 }];
    let zero = zero_block_crc();
    store.commit_write(plan.id, &vec![zero; plan.blocks as usize], &buffer).expect("commits");
}

#[test]
fn written_files_take_what_is_estimated() {
    if elsewhere("written_files_take_what_is_estimated") {
        return;
    }
    compare("files of 64 KiB, written", 40 << 30, |r| {
        for file in 0..100_000 {
            let op =
                WriteOp { inode: InodeId(2 + file), ..r.op(0, 64 << 10, 1, BaseView::default()) };
            write(&mut r.store, &op);
            if file % 64 == 0 {
                settle(&mut r.store);
            }
        }
    });
}

#[test]
fn blocks_at_random_places_take_what_is_estimated() {
    if elsewhere("blocks_at_random_places_take_what_is_estimated") {
        return;
    }
    // Lists of many extents, split and joined.
    compare("4 KiB at random places", 40 << 30, |r| {
        let mut rng = StdRng::seed_from_u64(2);
        let mut places: Vec<u32> = (0..250_000).collect();
        places.shuffle(&mut rng);
        for (i, p) in places.into_iter().enumerate() {
            let op = WriteOp {
                chunk: ChunkIndex(p / 1024),
                ..r.op(p % 1024 * 4096, 4096, 1, BaseView::default())
            };
            write(&mut r.store, &op);
            if i % 64 == 0 {
                settle(&mut r.store);
            }
        }
    });
}
