//! A data node that never comes back (PROTOCOL R23, R24, R27; I1, I4, I5, I7): what S3 has is served by a stand-in, what only the
//! node had waits until a person gives it up. Real servers; a lost node is one that is stopped.

mod common;

use common::{TestCluster, until};
use ebb_client::{ClientError, Config, FileSystem, InodeId, OpenFlags, OpenedFile, Owner};
use ebb_dataplane_protocol::{ChunkIndex, ClusterMap, CoreId, NodeId, PgId, ShardRef};
use ebb_metaplane_protocol::admin::AbandonReport;
use ebb_metaplane_protocol::{AdminCall, AdminReply, FsError};
use std::time::Duration;

const OWNER: Owner = Owner { uid: 0, gid: 0 };
const WRITE: OpenFlags = OpenFlags { write: true, truncate: false, exclusive: false };
const LEN: usize = 50_000;
const LONG: Duration = Duration::from_secs(60);

fn node_of(map: &ClusterMap, inode: InodeId) -> NodeId {
    let (_, entry) = map.pg_of(inode, ChunkIndex(0)).expect("formatted");
    entry.primary().expect("held").node
}

fn group(inode: InodeId, map: &ClusterMap) -> PgId {
    PgId::of_chunk(inode, ChunkIndex(0), map.pg_count())
}

/// Makes files until one is on this node; the open one that is.
async fn create_on(fs: &FileSystem, map: &ClusterMap, node: NodeId, name: &str) -> OpenedFile {
    loop {
        let f = fs.create(InodeId::ROOT, name.as_bytes(), 0o644, OWNER, WRITE).await;
        let f = f.expect("a create");
        if node_of(map, f.attr.inode) == node {
            return f;
        }
        fs.release(f.handle).await.expect("a release");
        fs.unlink(InodeId::ROOT, name.as_bytes()).await.expect("an unlink");
    }
}

async fn flush(cluster: &TestCluster) {
    let admin = cluster.connect("flusher").await;
    let call = AdminCall::Flush { inode: InodeId::ROOT, wait: true };
    match admin.admin(call, LONG).await.expect("a flush") {
        AdminReply::Flushed(r) => assert_eq!(r.remaining, 0, "{r:?}"),
        other => panic!("{other:?}"),
    }
    admin.close().await.expect("the session ends");
}

async fn abandon(
    cluster: &TestCluster,
    node: NodeId,
    yes: bool,
) -> Result<AbandonReport, ClientError> {
    let admin = cluster.connect("operator").await;
    match admin.admin(AdminCall::Abandon { node, yes }, LONG).await? {
        AdminReply::Abandoned(report) => Ok(report),
        other => panic!("{other:?}"),
    }
}

/// Two nodes; the one to be lost, and the other.
async fn two(cluster: &TestCluster) -> (ClusterMap, NodeId, NodeId) {
    let map = cluster.status().await.map;
    let (lost, other) = (map.nodes[0].id, map.nodes[1].id);
    (map, lost, other)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn clean_files_are_served_by_a_stand_in_and_dirty_ones_wait_until_they_are_given_up() {
    let mut cluster = TestCluster::start(2).await;
    let (map, lost, other) = two(&cluster).await;
    let fs = cluster.fs("client").await;
    let mut clean = Vec::new();
    for i in 0..12u8 {
        let name = format!("clean{i}");
        let f = create_on(&fs, &map, lost, &name).await;
        fs.write(f.handle, 0, &[i; LEN]).await.expect("a write");
        fs.release(f.handle).await.expect("a release");
        clean.push((name, i, group(f.attr.inode, &map)));
    }
    let old = create_on(&fs, &map, lost, "old").await;
    fs.write(old.handle, 0, &[b'a'; LEN]).await.expect("a write");
    fs.fsync(old.handle).await.expect("an fsync");
    flush(&cluster).await;
    let refused = abandon(&cluster, lost, true).await;
    assert!(matches!(refused, Err(ClientError::Fs(FsError::Invalid(_)))), "alive: {refused:?}");

    // Acknowledged, and in S3 not yet.
    let new = create_on(&fs, &map, lost, "new").await;
    for (f, byte) in [(&old, b'b'), (&new, b'n')] {
        fs.write(f.handle, 0, &[byte; 100]).await.expect("a write");
        fs.fsync(f.handle).await.expect("an fsync");
    }
    let config = cluster.lose_node(lost).await;
    let dirty = [group(old.attr.inode, &map), group(new.attr.inode, &map)];
    clean.retain(|c| !dirty.contains(&c.2));
    assert!(clean.len() > 6);

    let status = cluster.stand_in(lost, other).await;
    let mut waiting: Vec<PgId> = status.map.groups_of(lost).map(|g| g.0).collect();
    waiting.sort_unstable();
    assert!(dirty.iter().all(|pg| waiting.contains(pg)), "{waiting:?}");
    assert!(waiting.len() <= 2, "only those wait: {waiting:?}");
    let text = format!("ebb node abandon {lost}");
    assert!(status.warnings.iter().any(|w| w.contains(&text)), "{:?}", status.warnings);
    for (name, byte, _) in &clean {
        let seen = fs.read_file(name.as_bytes()).await.expect("a read through the stand-in");
        assert!(seen == vec![*byte; LEN], "{name}");
    }
    let config_short = Config { patience: Duration::from_secs(2), ..Config::default() };
    let hasty = FileSystem::new(&cluster.connect_with("hasty", config_short).await);
    for name in ["old", "new"] {
        let read = hasty.read_file(name.as_bytes()).await;
        assert!(matches!(read, Err(ClientError::Data { .. })), "{name} waits: {read:?}");
    }

    let dry = abandon(&cluster, lost, false).await.expect("a report");
    assert_eq!((dry.done, dry.reverted, dry.lost), (false, 1, 1), "{dry:?}");
    let told = |path: &str| dry.files.iter().find(|f| f.path == path).expect(path).stored_bytes;
    assert_eq!((told("/old"), told("/new")), (Some(LEN as u64), None));
    let still = cluster.status().await.map;
    assert_eq!(still.groups_of(lost).count(), waiting.len(), "a dry run changes nothing");
    let done = abandon(&cluster, lost, true).await.expect("given up");
    assert_eq!((done.done, done.reverted, done.lost), (true, 1, 1));
    let map = cluster.status().await.map;
    assert!(map.node(lost).is_none());
    for (i, entry) in map.pgs.iter().enumerate() {
        let pg = PgId(i as u16);
        assert_eq!(
            entry.members.is_empty(),
            waiting.contains(&pg),
            "nobody's, until somebody says"
        );
        if entry.members.is_empty() {
            cluster.move_group(pg, Some(ShardRef { node: other, core: CoreId(0) })).await;
        }
    }

    // What S3 had is back; what it never had is an error, and no zeros (I4); who had them open is told.
    let read = fs.read(old.handle, 0, 10).await;
    assert!(matches!(read, Err(ClientError::Stale)), "{read:?}");
    assert!(fs.read_file(b"old").await.expect("a read") == vec![b'a'; LEN]);
    let read = fs.read_file(b"new").await;
    assert!(matches!(&read, Err(ClientError::Fs(FsError::Io(_)))), "{read:?}");
    assert_eq!(cluster.status().await.lost_files, 1);
    fs.unlink(InodeId::ROOT, b"new").await.expect("an unlink");
    let f = fs.create(InodeId::ROOT, b"new", 0o644, OWNER, WRITE).await.expect("a create");
    fs.write(f.handle, 0, b"again").await.expect("a write");
    fs.release(f.handle).await.expect("a release");
    flush(&cluster).await;
    assert_eq!(fs.read_file(b"new").await.expect("a read"), b"again".to_vec());
    assert_eq!(cluster.status().await.lost_files, 0);

    // The store may not come back as it is; a wiped one joins.
    let never = std::future::pending::<()>();
    let refused = ebb_dataplane::run(config.clone(), never).await.expect_err("it is refused");
    assert!(refused.to_string().contains("wipe its directory"), "{refused}");
    std::fs::remove_dir_all(&config.dir).expect("wiped");
    cluster.start_node(config);
    until("the wiped store joins", || async {
        let nodes = cluster.status().await.map.nodes;
        (nodes.len() == 2 && nodes.iter().all(|n| n.id != lost)).then_some(())
    })
    .await;
    cluster.stop().await;
}

/// R27: the lost node had applied a write whose answer nobody heard, and somebody else wrote since.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_unanswered_write_of_a_lost_node_is_an_error_and_not_applied_again() {
    let mut cluster = TestCluster::start_behind_proxies(2).await;
    let (map, lost, other_node) = two(&cluster).await;
    let (writer, other) = (cluster.fs("writer").await, cluster.fs("other").await);
    let file = create_on(&writer, &map, lost, "f").await;
    let session = writer.cluster().session();
    writer.write(file.handle, 0, &[b'a'; LEN]).await.expect("buffered");
    cluster.rules.lose_next_write_of(session);
    let asking = tokio::spawn({
        let (fs, handle) = (writer.clone(), file.handle);
        async move { fs.flush(handle).await }
    });
    cluster.rules.lost(session).await;
    // In S3, and clean, with its writer's handle still open.
    flush(&cluster).await;
    assert!(!other.lookup(InodeId::ROOT, b"f").await.expect("a look-up").dirty);

    cluster.lose_node(lost).await;
    cluster.stand_in(lost, other_node).await;
    let theirs = other.open(file.attr.inode, WRITE).await.expect("an open");
    other.write(theirs.handle, 0, &[b'b'; LEN]).await.expect("buffered");
    other.fsync(theirs.handle).await.expect("an fsync");
    cluster.rules.release(session);
    let told = asking.await.expect("no panic");
    assert!(matches!(told, Err(ClientError::WriteLost { .. })), "{told:?}");
    // That was a close, maybe a child process's: an fsync has to say it, too.
    let told = writer.fsync(file.handle).await;
    assert!(matches!(told, Err(ClientError::WriteLost { .. })), "{told:?}");
    writer.fsync(file.handle).await.expect("told once");
    writer.flush(file.handle).await.expect("a close after it");
    let reader = cluster.fs("reader").await;
    assert!(
        reader.read_file(b"f").await.expect("a read") == vec![b'b'; LEN],
        "a write that was applied before the node was lost was applied again over a later one"
    );
    cluster.stop().await;
}

/// I5, R26: a node that was away comes back, with its groups elsewhere; and takes them over again.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_that_comes_back_serves_nothing_of_groups_that_got_a_stand_in() {
    let mut cluster = TestCluster::start(2).await;
    let (map, lost, other) = two(&cluster).await;
    let fs = cluster.fs("client").await;
    let mut files = Vec::new();
    for i in 0..6u8 {
        let f = create_on(&fs, &map, lost, &format!("f{i}")).await;
        fs.write(f.handle, 0, &[i; LEN]).await.expect("a write");
        fs.fsync(f.handle).await.expect("an fsync");
        files.push(f);
    }
    flush(&cluster).await;
    let config = cluster.lose_node(lost).await;
    cluster.stand_in(lost, other).await;
    // Grants and handles of before go on at the stand-in.
    for (i, f) in files.iter().enumerate() {
        fs.write(f.handle, 100, &[b'x'; 100]).await.expect("a write");
        fs.fsync(f.handle).await.expect("an fsync");
        let seen = fs.read(f.handle, 0, 300).await.expect("a read");
        let want = [&[i as u8; 100][..], &[b'x'; 100], &[i as u8; 100]].concat();
        assert!(seen == want, "file {i}");
    }
    cluster.start_node(config);
    until("it has a lease", || async {
        let s = cluster.status().await;
        let back = s.nodes.iter().any(|n| n.node == lost && n.heartbeat_age_ms.is_some());
        (back && s.cut_off.is_empty()).then_some(())
    })
    .await;
    // Home again: what it had of before is not served.
    for f in &files {
        let to = ShardRef { node: lost, core: CoreId(0) };
        cluster.move_group(group(f.attr.inode, &map), Some(to)).await;
    }
    for (i, f) in files.iter().enumerate() {
        let seen = fs.read(f.handle, 0, 300).await.expect("a read");
        let want = [&[i as u8; 100][..], &[b'x'; 100], &[i as u8; 100]].concat();
        assert!(seen == want, "file {i}");
    }
    cluster.stop().await;
}
