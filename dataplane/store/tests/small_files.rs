//! A device full of small files: each takes a block and a place in the index, and the index must not be full long
//! before the blocks are; and whoever asks is told in time that dirty data is filling it.

mod support;

use ebb_dataplane_protocol::*;
use ebb_store::*;
use support::*;

/// Nothing is in S3.
const NONE: BaseView = BaseView { content: ContentId(0), valid_bytes: 0 };

/// Writes files of a block until the store refuses. How many it took, and the pressure before the last and at
/// half of them.
fn fill_with_small_files(r: &mut Rig, most: u64) -> (u64, u16) {
    let mut pressure = 0;
    for file in 0..most {
        let op =
            WriteOp { inode: InodeId(1000 + file), chunk: ChunkIndex(0), ..r.op(0, 4096, 1, NONE) };
        loop {
            match r.write_op(&op, b's') {
                Ok(_) => break,
                Err(WriteError::NoSpace { .. }) => return (file, pressure),
                Err(WriteError::Wait(_)) => r.settle(),
                Err(e) => panic!("{e}"),
            }
        }
        if file % 64 == 0 {
            r.settle();
            pressure = r.store.stats().dirty_permille();
        }
    }
    r.settle();
    (most, r.store.stats().dirty_permille())
}

#[test]
fn a_device_takes_a_small_file_per_six_kib() {
    const DEVICE: u64 = 256 << 20;
    let mut r = Rig::new(DEVICE);
    let (files, _) = fill_with_small_files(&mut r, u64::MAX);
    println!("{files} files of 4 KiB, {} bytes of the device for each", DEVICE / files);
    assert!(DEVICE / files <= 6 << 10, "{} bytes of the device for each", DEVICE / files);
    r.checkpoint();
    r.reopen();
    assert_eq!(r.store.stats().chunks, files, "all of them are there after a restart");
}

/// Whatever is scarcest: blocks, the index on the device, RAM.
#[test]
fn pressure_shows_before_a_write_is_refused() {
    let device = 64 << 20;
    let usual = Geometry::for_device(device).expect("large enough");
    let small_index = Geometry { checkpoint_bytes: 512 << 10, ..usual };
    for (what, geometry, ram) in
        [("blocks", usual, 1 << 30), ("index", small_index, 1 << 30), ("RAM", usual, 1 << 20)]
    {
        let mut r = Rig::with(geometry);
        r.store.set_memory_limit(ram);
        let (files, pressure) = fill_with_small_files(&mut r, u64::MAX);
        println!("{what}: {files} files, {pressure} thousandths just before the end");
        assert!(pressure >= 900, "{what}: {pressure} thousandths just before the end");
        let mut r = Rig::with(geometry);
        r.store.set_memory_limit(ram);
        let (_, half) = fill_with_small_files(&mut r, files / 2);
        assert!((300..=700).contains(&half), "{what}: {half} thousandths at half of it");
    }
}
