//! Replicated groups between real nodes: real rings, sockets and devices; the metadata plane is scripted
//! (PROTOCOL R41, R42, R44, R46, R47; I1).

mod common;

use common::client::*;
use common::*;
use ebb_dataplane::NodeConfig;
use ebb_dataplane_protocol::control::{Control, ControlReply};
use ebb_dataplane_protocol::*;

const MIB: u64 = 1 << 20;

#[test]
fn child_node() {
    common::child_node();
}

fn core(node: NodeId) -> ShardRef {
    ShardRef { node, core: CoreId(0) }
}

/// All groups get these members; `anew`: another primary.
async fn members(world: &World, in_sync: &[NodeId], syncing: &[NodeId], anew: bool) {
    world
        .change_map(|m| {
            let version = m.version;
            for entry in &mut m.pgs {
                entry.epoch = PgEpoch(entry.epoch.0 + 1);
                entry.members = in_sync.iter().map(|n| core(*n)).collect();
                entry.syncing = syncing.iter().map(|n| core(*n)).collect();
                if anew {
                    entry.since_map_version = version;
                }
            }
        })
        .await;
}

async fn client(world: &World, port: u16, session: u64) -> Client {
    let mut client = Client::new(world, port, session).await;
    client.map_version = world.meta().map.version;
    client.epoch = world.meta().map.pgs[0].epoch;
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acked_write_is_on_the_backups_device_after_both_are_killed() {
    let world = World::new(256 * MIB, 1).await;
    world.meta().many = true;
    let first = world.spawn().await;
    let beside = world.another("beside");
    let second = world.spawn_with(&beside).await;
    let (one, two) = (NODE, NodeId(NODE.0 + 1));
    world.beats(4).await;

    // Written before there was another member: comes with the copy.
    let mut file = File::new(100);
    let alone = client(&world, first.port(), 11).await;
    assert_eq!(alone.present(&file).await, Status::Ok);
    let before = pattern(1, 3 << 20);
    alone.write(&file, 0, 4096, &before).await;
    alone.write(&file, 1, 100, b"inside the journal").await;
    members(&world, &[one], &[two], false).await;
    let groups = usize::from(PGS);
    eventually("the primary asks for it to be in-sync", || {
        let wishes = world.meta().wishes.get(&one).cloned().unwrap_or_default();
        wishes.in_sync.iter().filter(|w| w.member == core(two)).count() == groups
    })
    .await;
    members(&world, &[one, two], &[], false).await;

    // Written since: every answer says that both have it. Many at once, some as large as there are.
    let both = client(&world, first.port(), 12).await;
    file.generation = Generation(1);
    assert_eq!(both.present(&file).await, Status::Ok);
    let large = pattern(2, CHUNK_BYTES as usize);
    let whole = (4..12).map(|chunk| both.write(&file, chunk, 0, &large));
    let small: Vec<Vec<u8>> = (0..200).map(|n| pattern(n + 10, 5000)).collect();
    let many =
        small.iter().enumerate().map(|(n, data)| both.write(&file, 2, n as u32 * 5000, data));
    futures::future::join(futures::future::join_all(whole), futures::future::join_all(many)).await;
    let stats = MetaPeer::new(&world, first.port()).await.stats().await;
    assert!(stats.replicated >= 208 && stats.copied_bytes >= 3 << 20, "{stats:?}");
    assert_eq!(stats.members_syncing, 0);
    let stats = MetaPeer::new(&world, second.port()).await.stats().await;
    assert!(stats.followed >= 208, "{stats:?}");

    first.kill9();
    second.kill9();
    world.meta().acks.clear();
    world.meta().map.nodes.retain(|n| n.id == two);
    let second = world.spawn_with(&beside).await;
    members(&world, &[two], &[], true).await;
    let other = client(&world, second.port(), 13).await;
    file.least_map = other.map_version;
    assert_eq!(other.present(&file).await, Status::Ok);
    assert!(other.read(&file, 0, 4096, before.len() as u32).await == before);
    assert_eq!(other.read(&file, 1, 100, 18).await, b"inside the journal");
    for chunk in 4..12 {
        assert!(other.read(&file, chunk, 0, CHUNK_BYTES).await == large, "chunk {chunk}");
    }
    for (n, data) in small.iter().enumerate() {
        assert!(other.read(&file, 2, n as u32 * 5000, 5000).await == *data, "write {n}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_backup_a_primary_acks_nothing_until_the_backup_is_dropped() {
    let world = World::new(64 * MIB, 1).await;
    world.meta().many = true;
    let first = world.start().await;
    let beside = world.another("beside");
    let second = world.spawn_with(&beside).await;
    let (one, two) = (NODE, NodeId(NODE.0 + 1));
    world.beats(4).await;
    members(&world, &[one, two], &[], false).await;
    let file = File::new(100);
    let before = client(&world, first.port(), 11).await;
    assert_eq!(before.present(&file).await, Status::Ok);
    before.write(&file, 0, 0, b"on both").await;
    second.kill9();
    world.meta().acks.remove(&two);

    let late = {
        let (before, file) = (before.clone(), file.clone());
        tokio::spawn(async move { before.write_status(&file, 0, 8192, b"on one").await })
    };
    eventually("the primary asks for it to be dropped", || {
        let wishes = world.meta().wishes.get(&one).cloned().unwrap_or_default();
        wishes.unreachable.iter().any(|w| w.member == core(two))
    })
    .await;
    assert!(!late.is_finished(), "nothing was answered meanwhile");
    members(&world, &[one], &[], false).await;
    // Its epoch is over, so it is sent again, and answered from the window.
    assert_ne!(late.await.expect("no panic"), Status::Ok);
    let after = client(&world, first.port(), 11).await;
    assert_eq!(after.present(&file).await, Status::Ok);
    after.write(&file, 0, 8192, b"on one").await;
    assert_eq!(after.read(&file, 0, 8192, 6).await, b"on one");
    first.shutdown().await;
}

/// A core that is there and says nothing: to connect to it takes as long as the other side's patience, every time.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_backup_is_given_up_and_not_waited_for_when_it_is_added_again() {
    let world = World::new(64 * MIB, 1).await;
    world.meta().many = true;
    let first = world.start().await;
    let beside = world.another("beside");
    let second = world.spawn_with(&beside).await;
    let (one, two) = (NODE, NodeId(NODE.0 + 1));
    world.beats(4).await;
    members(&world, &[one, two], &[], false).await;
    let file = File::new(100);
    let before = client(&world, first.port(), 11).await;
    assert_eq!(before.present(&file).await, Status::Ok);
    before.write(&file, 0, 0, b"on both").await;
    second.signal(nix::sys::signal::Signal::SIGSTOP);
    world.meta().acks.remove(&two);

    let late = {
        let (before, file) = (before.clone(), file.clone());
        tokio::spawn(async move { before.write_status(&file, 0, 8192, b"on one").await })
    };
    let given_up = || {
        let wishes = world.meta().wishes.get(&one).cloned().unwrap_or_default();
        wishes.unreachable.iter().any(|w| w.member == core(two))
    };
    eventually("the primary asks for it to be dropped", given_up).await;
    // Also while it tries to reach it: whichever heartbeat the metadata plane looks at says so.
    for _ in 0..14 {
        world.beats(1).await;
        assert!(given_up());
    }
    assert!(!late.is_finished(), "nothing was answered meanwhile");
    // Dropped and added again, before the primary hears of either.
    world
        .change_map(|m| {
            for entry in &mut m.pgs {
                entry.epoch = PgEpoch(entry.epoch.0 + 2);
                entry.members = vec![core(one)];
                entry.syncing = vec![core(two)];
            }
        })
        .await;
    assert_ne!(late.await.expect("no panic"), Status::Ok, "its epoch is over");
    let after = client(&world, first.port(), 11).await;
    assert_eq!(after.present(&file).await, Status::Ok);
    let written = after.write_status(&file, 0, 8192, b"on one");
    let written = tokio::time::timeout(std::time::Duration::from_secs(10), written).await;
    assert_eq!(written.expect("it is not waited for"), Status::Ok);
    assert_eq!(after.read(&file, 0, 8192, 6).await, b"on one");
    world.beats(2).await;
    assert!(!given_up(), "it doesn't count, so nobody asks for it to be dropped");
    second.signal(nix::sys::signal::Signal::SIGCONT);
    eventually("it is copied to, and asked to be in-sync", || {
        let wishes = world.meta().wishes.get(&one).cloned().unwrap_or_default();
        wishes.in_sync.iter().filter(|w| w.member == core(two)).count() == usize::from(PGS)
    })
    .await;
    first.shutdown().await;
}

/// The epoch of its successor comes late to a primary that hands over, which has a lease all the while. The freeze keeps
/// writes from it; that it yields keeps readers from what its successor has overwritten.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_yielded_shows_nothing_that_its_successor_may_have_overwritten() {
    let world = World::new(64 * MIB, 1).await;
    world.meta().many = true;
    let first = world.start().await;
    let second = world.spawn_with(&world.another("beside")).await;
    let (one, two) = (NODE, NodeId(NODE.0 + 1));
    world.beats(4).await;
    members(&world, &[one, two], &[], false).await;
    let mut file = File::new(100);
    let group = PgId::of_chunk(file.inode, ChunkIndex(0), PGS);
    let reader = client(&world, first.port(), 11).await;
    assert_eq!(reader.present(&file).await, Status::Ok);
    reader.write(&file, 0, 0, b"before").await;

    // It yields, and is taken back: the epoch did not come.
    let meta = MetaPeer::new(&world, first.port()).await;
    let epoch = reader.epoch;
    for order in [Control::Freeze(group, epoch), Control::Yield(group, epoch)] {
        assert_eq!(meta.control(order).await, ControlReply::Done);
    }
    assert_eq!(reader.read_status(&file, 0, 0, 6).await, Status::StaleEpoch);
    assert_eq!(meta.control(Control::Thaw(group, epoch)).await, ControlReply::Done);
    assert_eq!(reader.read(&file, 0, 0, 6).await, b"before");
    reader.write(&file, 0, 0, b"thawed").await;

    // It yields, the epoch comes, and then the one in which it is a member no more; it hears of neither.
    for order in [Control::Freeze(group, epoch), Control::Yield(group, epoch)] {
        assert_eq!(meta.control(order).await, ControlReply::Done);
    }
    world.meta().behind.insert(one);
    members(&world, &[two, one], &[], true).await;
    members(&world, &[two], &[], false).await;
    let writer = client(&world, second.port(), 12).await;
    file.least_map = writer.map_version;
    assert_eq!(writer.present(&file).await, Status::Ok);
    assert_eq!(writer.read(&file, 0, 0, 6).await, b"thawed");
    writer.write(&file, 0, 0, b"behind").await;
    // By the old map it is the primary, and in another group it serves.
    let other = (1..1000).map(File::new);
    let other = other.into_iter().find(|f| PgId::of_chunk(f.inode, ChunkIndex(0), PGS) != group);
    let other = other.expect("some file is in another group");
    assert_eq!(reader.present(&other).await, Status::Ok);
    assert_eq!(reader.read(&other, 0, 0, 6).await, [0; 6], "its lease lives");
    assert_eq!(reader.read_status(&file, 0, 0, 6).await, Status::StaleEpoch);
    first.shutdown().await;
}

/// A cut is journaled in the groups that a core leads when it hears of it. In one that it takes over afterwards it
/// has to be journaled before anything is served, or what was cut away is back. Found by the simulation (seed 11,
/// with an earlier version of the journal's driver).
#[tokio::test(flavor = "multi_thread")]
async fn a_cut_reaches_the_groups_that_are_taken_over_after_it_was_presented() {
    let world = World::new(64 * MIB, 1).await;
    world.meta().many = true;
    let first = world.spawn().await;
    let beside = world.another("beside");
    let second = world.spawn_with(&beside).await;
    let (one, two) = (NODE, NodeId(NODE.0 + 1));
    world.beats(4).await;
    members(&world, &[one, two], &[], false).await;
    let mut file = File::new(100);
    let group = PgId::of_chunk(file.inode, ChunkIndex(0), PGS);
    let before = client(&world, first.port(), 11).await;
    assert_eq!(before.present(&file).await, Status::Ok);
    before.write(&file, 0, 0, &pattern(1, 8192)).await;

    // The other groups are taken over first, and no stream of this one is left.
    first.kill9();
    second.kill9();
    world.meta().acks.clear();
    let second = world.spawn_with(&beside).await;
    world.beats(2).await;
    world
        .change_map(|m| {
            let version = m.version;
            for (n, entry) in m.pgs.iter_mut().enumerate() {
                entry.epoch = PgEpoch(entry.epoch.0 + 1);
                if n != usize::from(group.0) {
                    entry.members = vec![core(two)];
                    entry.since_map_version = version;
                }
            }
        })
        .await;
    file.view.version = ViewVersion(2);
    file.view.cuts = vec![Cut { generation: Generation(1), at: 0 }];
    file.generation = Generation(2);
    file.least_map = world.meta().map.version;
    let after = client(&world, second.port(), 12).await;
    assert_eq!(after.present(&file).await, Status::Ok);

    members(&world, &[two], &[], true).await;
    let after = client(&world, second.port(), 12).await;
    file.least_map = after.map_version;
    assert_eq!(after.present(&file).await, Status::Ok);
    assert!(after.read(&file, 0, 0, 8192).await == [0; 8192], "it was cut away");
}

/// An order to drop a group comes to a member that hasn't heard that it is none any more, and still takes its primary's
/// stream: what the stream builds upon would be gone, and its blocks another's. Found by the simulation (seed 2603).
#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_is_behind_drops_nothing_before_it_knows_why() {
    let world = World::new(64 * MIB, 1).await;
    world.meta().many = true;
    let first = world.start().await;
    let second = world.spawn_with(&world.another("beside")).await;
    let (one, two) = (NODE, NodeId(NODE.0 + 1));
    world.beats(4).await;
    members(&world, &[one, two], &[], false).await;
    let file = File::new(100);
    let group = PgId::of_chunk(file.inode, ChunkIndex(0), PGS);
    let writer = client(&world, first.port(), 11).await;
    assert_eq!(writer.present(&file).await, Status::Ok);
    writer.write(&file, 0, 0, b"on both").await;

    world.meta().behind.insert(two);
    members(&world, &[one], &[], false).await;
    let epoch = world.meta().map.pgs[usize::from(group.0)].epoch;
    let order = Control::DiscardPg(group, epoch);
    let meta = MetaPeer::new(&world, second.port()).await;
    let early = meta.connection.control(&order, TIMEOUT).await.expect_err("it follows the group");
    assert_eq!(early.status(), Some(Status::Busy));
    world.meta().behind.remove(&two);
    world.beats(4).await;
    assert_eq!(meta.control(order).await, ControlReply::Done);
    first.shutdown().await;
}

/// It answers, but takes nothing more: its device is smaller than its primary's. Where it is needed, writers hear
/// `NoSpace`, as of a full primary; where it isn't, its primary asks for it to be dropped (R56).
#[tokio::test(flavor = "multi_thread")]
async fn a_full_backup_is_asked_to_be_dropped_unless_it_is_needed() {
    let world = World::new(256 * MIB, 1).await;
    world.meta().many = true;
    let first = world.start().await;
    let small = NodeConfig { capacity_bytes: 64 * MIB, ..world.another("beside") };
    let _second = world.spawn_with(&small).await;
    let (one, two) = (NODE, NodeId(NODE.0 + 1));
    world.beats(4).await;
    world.meta().map.pgs.iter_mut().for_each(|e| e.min_in_sync = 2);
    members(&world, &[one, two], &[], false).await;
    let file = File::new(100);
    let before = client(&world, first.port(), 11).await;
    assert_eq!(before.present(&file).await, Status::Ok);
    let piece = |n: u32| pattern(u64::from(n), MIB as usize);
    let mut written = 0;
    let refused = loop {
        let data = piece(written);
        match before.write_status(&file, written / 4, (written % 4) << 20, &data).await {
            Status::Ok => written += 1,
            status => break status,
        }
        assert!(written < 64, "its device is smaller");
    };
    assert_eq!(refused, Status::NoSpace, "after {written} MiB");
    let given_up = || {
        let wishes = world.meta().wishes.get(&one).cloned().unwrap_or_default();
        wishes.unreachable.iter().any(|w| w.member == core(two))
    };
    // In the same group: none is taken, and the answer comes at once.
    let next = |n: u32| before.write_status(&file, written / 4, (n % 4) << 20, b"next");
    let until = std::time::Instant::now() + std::time::Duration::from_secs(8);
    while std::time::Instant::now() < until {
        let status = tokio::time::timeout(std::time::Duration::from_secs(5), next(written)).await;
        assert_eq!(status.expect("nobody waits for ever"), Status::NoSpace);
        world.beats(1).await;
        assert!(!given_up(), "too few would remain");
    }
    let back = before.read(&file, 0, 0, MIB as u32).await;
    assert!(back == piece(0), "what both have is served");

    // Not needed any more, by the same epoch.
    world.change_map(|m| m.pgs.iter_mut().for_each(|e| e.min_in_sync = 1)).await;
    eventually("the primary asks for it to be dropped", given_up).await;
    members(&world, &[one], &[], false).await;
    let after = client(&world, first.port(), 12).await;
    assert_eq!(after.present(&file).await, Status::Ok);
    for n in written..written + 8 {
        after.write(&file, n / 4, (n % 4) << 20, &piece(n)).await;
    }
    for n in 0..written + 8 {
        assert!(after.read(&file, n / 4, (n % 4) << 20, MIB as u32).await == piece(n), "piece {n}");
    }
    first.shutdown().await;
}
