//! A store opens only what is its own and whole, and says why not.

mod support;

use ebb_dataplane_protocol::*;
use ebb_store::*;
use support::*;

const NONE: BaseView = BaseView { content: ContentId(0), valid_bytes: 0 };

fn open(disk: &Memory) -> Result<Store, OpenError> {
    Store::open(&mut disk.clone(), CLUSTER)
}

#[test]
fn an_unformatted_device_is_refused() {
    let disk = Memory { bytes: 32 << 20, ..Memory::default() };
    assert!(matches!(open(&disk), Err(OpenError::NotFormatted)));
}

#[test]
fn another_clusters_store_is_refused() {
    let mut disk = Rig::new(32 << 20).disk;
    let e = Store::open(&mut disk, ClusterId(8)).expect_err("not ours");
    assert!(matches!(e, OpenError::OtherCluster { found: CLUSTER, .. }), "{e}");
    assert_eq!(identify(&mut disk).expect("readable").cluster, CLUSTER);
}

#[test]
fn another_version_is_named() {
    let mut disk = Rig::new(32 << 20).disk;
    let g = Geometry::for_device(32 << 20).expect("large enough");
    for offset in g.superblock_offsets() {
        let page = disk.pages.get_mut(&(offset / 4096)).expect("written");
        page[8] = 9;
        let crc = crc32c(&page[..4092]);
        page[4092..].copy_from_slice(&crc.to_le_bytes());
    }
    assert!(matches!(open(&disk), Err(OpenError::OtherVersion { found: 9, .. })));
}

#[test]
fn a_device_that_was_cut_short_is_refused() {
    let mut disk = Rig::new(32 << 20).disk;
    disk.bytes -= 1 << 20;
    assert!(matches!(open(&disk), Err(OpenError::Shorter { .. })));
}

#[test]
fn any_single_superblock_may_be_lost_and_is_repaired() {
    let g = Geometry::for_device(32 << 20).expect("large enough");
    for offset in g.superblock_offsets() {
        let mut r = Rig::new(32 << 20);
        r.disk.pages.remove(&(offset / 4096));
        r.reopen();
        assert_eq!(verify(&mut r.disk).expect("sound").superblocks, 4);
    }
    let mut disk = Rig::new(32 << 20).disk;
    for offset in &g.superblock_offsets()[..3] {
        disk.pages.get_mut(&(offset / 4096)).expect("written")[50] ^= 1;
    }
    assert!(matches!(open(&disk), Err(OpenError::Superblocks { valid: 1 })));
}

#[test]
fn a_damaged_checkpoint_is_refused() {
    let mut r = Rig::new(32 << 20);
    r.write(0, 4096, 1, b'a', NONE);
    r.checkpoint();
    let g = r.store.geometry();
    r.disk.pages.get_mut(&(g.checkpoint_start(0) / 4096)).expect("written")[100] ^= 1;
    assert!(matches!(open(&r.disk), Err(OpenError::Checkpoint { number: 2, .. })));
}

#[test]
fn journal_damage_before_a_later_batch_is_refused_and_a_torn_tail_is_not() {
    let mut r = Rig::new(32 << 20);
    for i in 0..3 {
        r.write(i * 4096, 4096, 1, b'a', NONE);
    }
    let start = r.store.geometry().journal_start() / 4096;
    let mut torn = r.disk.clone();
    torn.pages.get_mut(&(start + 5)).expect("third batch's data")[0] ^= 1;
    assert!(open(&torn).is_ok(), "the newest batch may be a torn one");
    let mut hurt = r.disk.clone();
    hurt.pages.get_mut(&(start + 3)).expect("second batch's data")[0] ^= 1;
    assert!(matches!(open(&hurt), Err(OpenError::Journal { missing: 2, later: 3, .. })));
}

#[test]
fn a_new_format_forgets_the_old_journal() {
    let mut r = Rig::new(32 << 20);
    r.write(0, 4096, 1, b'a', NONE);
    let again = Identity { store: 100, ..identity() };
    format_device(&mut r.disk, r.store.geometry(), again).expect("formats");
    r.reopen();
    assert_eq!(r.read(0..1, NONE), vec![0; 4096]);
}

#[test]
fn the_node_id_is_kept() {
    let mut r = Rig::new(32 << 20);
    let t = r.store.set_node(NodeId(5));
    r.done(t);
    r.reopen();
    assert_eq!(r.store.identity().node, NodeId(5));
    r.checkpoint();
    assert_eq!(identify(&mut r.disk).expect("readable").node, NodeId(5));
}

#[test]
fn rot_in_data_is_found_offline() {
    let mut r = Rig::new(32 << 20);
    r.write(0, 100_000, 1, b'a', NONE);
    let data = r.store.geometry().data_start() / 4096;
    r.disk.pages.get_mut(&(data + 3)).expect("written")[9] ^= 1;
    let report = verify(&mut r.disk).expect("walks");
    assert_eq!(report.bad.iter().map(|b| (b.block, b.dirty)).collect::<Vec<_>>(), vec![(3, true)]);
}

#[test]
fn counters_say_how_many_mutations_shared_a_batch() {
    let mut r = Rig::new(32 << 20);
    let before = r.store.stats();
    for group in [1, 5, 2] {
        for n in 0..group {
            let op = r.op(n * 4096, 4096, 1, BaseView::default());
            r.write_op(&op, b'a').expect("accepted");
        }
        r.settle();
    }
    let after = r.store.stats();
    assert_eq!((after.batches - before.batches, after.records - before.records), (3, 8));
}
