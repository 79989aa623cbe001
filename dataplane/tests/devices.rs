//! What a node does with the files and block devices it is given: it opens its own, whole ones, refuses
//! everything else with the reason and leaves it as it is, and stops for good at the first failed write
//! (I1, I5).

mod common;

use common::client::*;
use common::loopdev::*;
use common::*;
use ebb_dataplane::NodeConfig;
use ebb_dataplane_protocol::*;
use ebb_store::Geometry;
use ebb_store::geometry::FORMAT_VERSION;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const SHARD: u64 = 16 * MIB;

/// Why a node with that configuration does not start.
async fn refused(config: &NodeConfig) -> String {
    let ended = ebb_dataplane::run(config.clone(), std::future::pending());
    let ended = tokio::time::timeout(Duration::from_secs(40), ended).await.expect("in time");
    ended.expect_err("refused").to_string()
}

fn later_version() -> String {
    format!("format version {}, this program reads version {FORMAT_VERSION}", FORMAT_VERSION + 1)
}

/// Overwrites bytes of each superblock copy, and makes its checksum right again.
fn forge(shard: &mut [u8], at: usize, with: &[u8]) {
    let geometry = Geometry::for_device(shard.len() as u64).expect("large enough");
    for offset in geometry.superblock_offsets() {
        let block = &mut shard[offset as usize..][..4096];
        block[at..at + with.len()].copy_from_slice(with);
        let crc = checksum::crc32c(&block[..4092]);
        block[4092..].copy_from_slice(&crc.to_le_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_is_refused_with_the_reason_and_left_as_it_is() {
    let world = World::new(SHARD, 1).await;
    let path = world.config.dir.join("shard-0.ebb");
    let file = File::new(1);
    {
        let node = world.start().await;
        world.beats(2).await;
        let client = Client::new(&world, node.port(), 5).await;
        assert_eq!(client.present(&file).await, Status::Ok);
        client.write(&file, 0, 0, b"kept").await;
        node.shutdown().await;
    }
    let sound = std::fs::read(&path).expect("readable");
    let geometry = Geometry::for_device(SHARD).expect("large enough");
    let later = later_version();
    type Change = Box<dyn Fn(&mut Vec<u8>)>;
    let with = |f: fn(&mut Vec<u8>)| -> Change { Box::new(f) };
    // What is done to the shard; what is said; whether the shard alone tells (then fsck says it too).
    let cases: Vec<(&str, Change, [&str; 2], bool)> = vec![
        (
            "a later version",
            with(|b| forge(b, 8, &(FORMAT_VERSION + 1).to_le_bytes())),
            [&later, "start the version of ebb that wrote"],
            true,
        ),
        (
            "an unknown feature",
            with(|b| forge(b, 120, &4u64.to_le_bytes())),
            ["features that this program does not know (bits 0x4)", "start the version of ebb"],
            true,
        ),
        (
            "another cluster",
            with(|b| forge(b, 16, &99u128.to_le_bytes())),
            ["belongs to cluster", "its own cluster's configuration"],
            false,
        ),
        (
            "another node",
            with(|b| forge(b, 48, &9u32.to_le_bytes())),
            ["it is node 9's, the metadata plane calls this node 7", "copied or renamed?"],
            false,
        ),
        (
            "another core",
            with(|b| forge(b, 52, &3u16.to_le_bytes())),
            ["it is core 3's shard, not core 0's", "copied or renamed?"],
            false,
        ),
        (
            "another number of groups",
            with(|b| forge(b, 54, &4u16.to_le_bytes())),
            ["made for 4 placement groups, the cluster has 8", "left as it is"],
            false,
        ),
        (
            "cut short",
            with(|b| b.truncate(b.len() - 4096)),
            ["16773120 bytes, the store was made on 16777216: it was cut short", "its length"],
            true,
        ),
        (
            "not a shard",
            with(|b| *b = pattern(3, 4 << 20)),
            ["not a shard", "correct the path"],
            true,
        ),
        ("an empty file", with(Vec::clear), ["not a shard", "correct the path"], true),
        (
            "one superblock of four",
            Box::new(move |b| {
                for offset in &geometry.superblock_offsets()[..3] {
                    b[*offset as usize + 77] ^= 1;
                }
            }),
            ["the superblocks are damaged: 1 of 4 readable", "restore it"],
            true,
        ),
        (
            "a damaged checkpoint",
            Box::new(move |b| b[geometry.checkpoint_start(1) as usize + 70] ^= 1),
            ["checkpoint 1 is damaged at byte", "restore it"],
            true,
        ),
    ];
    for (what, change, says, alone) in cases {
        let mut bytes = sound.clone();
        change(&mut bytes);
        std::fs::write(&path, &bytes).expect("written");
        let e = refused(&world.config).await;
        assert!(e.contains("shard-0.ebb") && e.contains("left as it is"), "{what}: {e}");
        assert!(says.iter().all(|s| e.contains(s)), "{what}: {e}");
        let fsck = ebb_dataplane::check(&path).map_err(|e| e.to_string());
        if alone {
            assert_eq!(fsck.expect_err(what), e, "fsck says the same");
        }
        assert!(std::fs::read(&path).expect("there") == bytes, "{what}: changed by the refusal");
    }
    // What is no file at all.
    std::fs::remove_file(&path).expect("removed");
    std::fs::create_dir(&path).expect("made");
    let e = refused(&world.config).await;
    assert!(e.contains("this is a directory; a shard is a regular file"), "{e}");
    std::fs::remove_dir(&path).expect("removed");
    let e = ebb_dataplane::check(Path::new("/dev/null")).expect_err("refused").to_string();
    assert!(e.contains("this is a character device"), "{e}");
    // A shard of another store beside ours.
    let two = NodeConfig { cores: 2, capacity_bytes: 2 * SHARD, ..world.config.clone() };
    let mut other = sound.clone();
    forge(&mut other, 52, &1u16.to_le_bytes());
    forge(&mut other, 32, &12345u128.to_le_bytes());
    std::fs::write(&path, &sound).expect("written");
    std::fs::write(world.config.dir.join("shard-1.ebb"), &other).expect("written");
    let e = refused(&two).await;
    assert!(e.contains("shard-1.ebb: it belongs to another store than the other shards"), "{e}");
    // And the sound one serves what it has.
    std::fs::write(&path, &sound).expect("written");
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    assert_eq!(client.present(&file).await, Status::Ok);
    assert_eq!(client.read(&file, 0, 0, 4).await, b"kept");
    // A second process on it, the node's directory and the file alone.
    let e = refused(&world.config).await;
    assert!(e.contains("already in use by another process"), "{e}");
    let e = ebb_dataplane::check(&path).expect_err("refused").to_string();
    assert!(e.contains("shard-0.ebb: already in use by another process"), "{e}");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_any_superblock_is_served_by_the_others_and_mended() {
    let world = World::new(SHARD, 1).await;
    let path = world.config.dir.join("shard-0.ebb");
    world.start().await.shutdown().await;
    for (i, offset) in
        Geometry::for_device(SHARD).expect("sound").superblock_offsets().into_iter().enumerate()
    {
        let shard = std::fs::File::options().read(true).write(true).open(&path).expect("opens");
        let at = offset + 8 + 40 * i as u64;
        let mut byte = [0];
        shard.read_exact_at(&mut byte, at).expect("read");
        shard.write_all_at(&[byte[0] ^ 1], at).expect("written");
        assert_eq!(ebb_dataplane::check(&path).expect("opens").superblocks, 3, "copy {i}");
        let node = world.start().await;
        world.beats(2).await;
        let client = Client::new(&world, node.port(), 5).await;
        let file = File::new(10 + i as u64);
        assert_eq!(client.present(&file).await, Status::Ok);
        client.write(&file, 0, 0, b"served").await;
        node.shutdown().await;
        assert_eq!(ebb_dataplane::check(&path).expect("opens").superblocks, 4, "copy {i}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_nodes_started_at_once_in_a_new_directory_one_serves_and_one_is_refused() {
    let world = World::new(SHARD, 1).await;
    let ready = world.dir.path().join("other.json");
    let other = NodeConfig { ready_file: Some(ready), ..world.config.clone() };
    let (one, two) = {
        let run = |c: NodeConfig| tokio::spawn(ebb_dataplane::run(c, std::future::pending()));
        (run(world.config.clone()), run(other))
    };
    let first = tokio::time::timeout(Duration::from_secs(40), async {
        tokio::select! { e = one => e, e = two => e }
    });
    let e = first.await.expect("one is refused").expect("no panic").expect_err("refused");
    assert!(e.to_string().contains("already in use by another process"), "{e}");
    world.beats(2).await;
    let names: Vec<_> = std::fs::read_dir(&world.config.dir)
        .expect("there")
        .map(|e| e.expect("an entry").file_name())
        .collect();
    assert_eq!(names, ["shard-0.ebb"], "one whole shard and nothing half made");
    let port = world.meta().ports[0];
    let client = Client::new(&world, port, 5).await;
    let file = File::new(1);
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 0, b"served").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blank_block_device_is_formatted_served_opened_again_and_checked() {
    for sector in [512, 4096] {
        let mut world = World::new(SHARD, 1).await;
        // Not a multiple of a block: the rest is not used.
        let bytes = 24 * MIB + if sector == 512 { 512 } else { 0 };
        let Some(device) = loop_device(&world.dir.path().join("disk"), bytes, sector) else {
            return;
        };
        world.config.devices = vec![device.path.clone()];
        let file = File::new(1);
        let data = pattern(u64::from(sector), 300_000);
        let node = world.start().await;
        world.beats(2).await;
        let client = Client::new(&world, node.port(), 5).await;
        assert_eq!(client.present(&file).await, Status::Ok);
        client.write(&file, 0, 0, &data).await;
        client.write(&file, 1, 4000, b"small").await;
        if sector == 512 {
            let dir = world.dir.path().join("second");
            let e = refused(&NodeConfig { dir, ..world.config.clone() }).await;
            assert!(e.contains("in use"), "a second process: {e}");
        }
        node.shutdown().await;
        assert!(!world.config.dir.join("shard-0.ebb").exists(), "no file beside the device");
        let report = ebb_dataplane::check(&device.path).expect("whole");
        assert_eq!((report.geometry.device_bytes, report.bad.len()), (24 * MIB, 0));
        assert!(report.blocks >= 300_000 / 4096, "{report:?}");
        // Opened again, by a new process as far as the device can tell.
        let node = world.start().await;
        world.beats(2).await;
        let client = Client::new(&world, node.port(), 6).await;
        assert_eq!(client.present(&file).await, Status::Ok);
        assert!(client.read(&file, 0, 0, 300_000).await == data);
        assert_eq!(client.read(&file, 1, 4000, 5).await, b"small");
        node.shutdown().await;
        // Its own device, but of another cluster now.
        let other = NodeConfig { cluster: format!("{:032x}", 99), ..world.config.clone() };
        assert!(refused(&other).await.contains("belongs to cluster"));
        println!("sectors of {sector} bytes: served, opened again, checked");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_holds_anything_is_refused_and_left_as_it_is() {
    let mut world = World::new(SHARD, 1).await;
    let disk = world.dir.path().join("disk");
    let Some(device) = loop_device(&disk, 24 * MIB, 512) else { return };
    world.config.devices = vec![device.path.clone()];
    let write = |at: u64, bytes: &[u8]| {
        let file = std::fs::File::options().write(true).open(&device.path).expect("opens");
        file.write_all_at(bytes, at).and_then(|()| file.sync_all()).expect("written");
    };
    let contents = || {
        let mut f = std::fs::File::open(&device.path).expect("opens");
        let mut all = Vec::new();
        std::io::Read::read_to_end(&mut f, &mut all).expect("read");
        all
    };
    for (at, bytes, says) in [
        (1080, &b"\x53\xef"[..], "it looks like an ext2, ext3 or ext4 file system"),
        (510, b"\x55\xaa", "it looks like a partition table"),
        (0, b"XFSB", "it looks like an XFS file system"),
        (3 * MIB + 17, b"x", "there is something at byte 3145745"),
        (24 * MIB - 512, b"EFI PART", "there is something at byte 25165312"),
    ] {
        write(at, bytes);
        let before = contents();
        let e = refused(&world.config).await;
        assert!(
            e.contains(says) && e.contains("left as it is") && e.contains("blkdiscard -z"),
            "{e}"
        );
        let fsck = ebb_dataplane::check(&device.path).expect_err("no shard").to_string();
        assert!(fsck.contains("not a shard"), "{fsck}");
        assert!(contents() == before, "changed by the refusal");
        write(at, &vec![0; bytes.len()]);
    }
    // Somebody has it: a mount, an array and a volume take it exclusively, as here.
    let holder = std::fs::File::options()
        .read(true)
        .custom_flags(nix::fcntl::OFlag::O_EXCL.bits())
        .open(&device.path)
        .expect("taken");
    let e = refused(&world.config).await;
    assert!(e.contains("in use: mounted, part of an array"), "{e}");
    drop(holder);
    // A regular file is no device, and a device of a later format is somebody's.
    let file = NodeConfig { devices: vec![disk.clone()], ..world.config.clone() };
    let e = refused(&file).await;
    assert!(e.contains("not a block device"), "{e}");
    world.start().await.shutdown().await;
    let mut later = contents();
    forge(&mut later, 8, &(FORMAT_VERSION + 1).to_le_bytes());
    write(0, &later);
    let e = refused(&world.config).await;
    assert!(e.contains(&later_version()), "{e}");
}

/// A block device that really fails: its blocks are in a file system that is full, so writes to new
/// blocks end in an I/O error, and stop doing so later. Neither may be believed.
#[tokio::test(flavor = "multi_thread")]
async fn a_failing_device_stops_its_node_for_good_and_nothing_acked_is_lost() {
    let mut world = World::new(SHARD, 1).await;
    let Some(memory) = tmpfs(&world.dir.path().join("memory"), 32 * MIB) else { return };
    let Some(device) = loop_device(&memory.dir.join("disk"), 64 * MIB, 4096) else { return };
    world.config.devices = vec![device.path.clone()];
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let file = File::new(1);
    assert_eq!(client.present(&file).await, Status::Ok);
    let data = pattern(1, 200_000);
    client.write(&file, 0, 0, &data).await;
    client.write(&file, 1, 0, b"small").await;
    // No space left below the device.
    let full = memory.dir.join("full");
    let filler = std::fs::File::create(&full).expect("made");
    while std::io::Write::write_all(&mut &filler, &[1; 65536]).is_ok() {}
    let (a, b, c) = tokio::join!(
        client.try_write(&file, 2, 0, &data),
        client.try_write(&file, 3, 0, b"small"),
        client.try_write(&file, 0, 0, &data[1000..]),
    );
    for status in [a, b, c] {
        assert!(matches!(status, None | Some(Status::Io)), "acked by a failing device: {status:?}");
    }
    // The device is as good as new, and the node does not trust it.
    drop(filler);
    std::fs::remove_file(&full).expect("removed");
    let after = client.try_write(&file, 4, 0, b"later").await;
    assert!(matches!(after, None | Some(Status::Io)), "taken after a failed write: {after:?}");
    let ended = tokio::time::timeout(TIMEOUT, node.task).await.expect("in time").expect("no panic");
    let e = ended.expect_err("it says why").to_string();
    assert!(e.contains("the node stops, its acked data is on the device"), "{e}");
    // Opened anew, it has what was acked, byte for byte.
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 6).await;
    assert_eq!(client.present(&file).await, Status::Ok);
    assert!(client.read(&file, 0, 0, 200_000).await == data);
    assert_eq!(client.read(&file, 1, 0, 5).await, b"small");
    client.write(&file, 2, 0, &data).await;
    assert!(client.read(&file, 2, 0, 200_000).await == data);
    node.shutdown().await;
    assert!(ebb_dataplane::check(&device.path).expect("whole").bad.is_empty());
}
