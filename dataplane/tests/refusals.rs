//! What a node refuses: strangers, forgeries, stale grants and maps, garbage; each counted, none felt by
//! others (I5, I12).

mod common;

use common::client::*;
use common::*;
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::checksum::piece_checksums;
use ebb_dataplane_protocol::control::{Control, ControlReply};
use ebb_dataplane_protocol::data::encode_checksums;
use ebb_dataplane_protocol::*;
use ebb_rpc::{Connection, Identity, RpcError};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const MIB: u64 = 1 << 20;

#[test]
fn child_node() {
    common::child_node();
}

#[tokio::test(flavor = "multi_thread")]
async fn forged_and_stale_grants_are_refused_and_counted() {
    let world = World::new(64 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let file = File::new(1);
    // Signed with another key, altered, another cluster's, another session's.
    let forged = SignedGrant::sign(&file.grant(client.session), &ClusterKey::new([9; 32]));
    assert_eq!(client.present_signed(&forged).await, Status::Forbidden);
    let mut altered = file.signed(client.session);
    altered.bytes[3] ^= 1;
    assert_eq!(client.present_signed(&altered).await, Status::Forbidden);
    let other = Grant { cluster: ClusterId(1), ..file.grant(client.session) };
    let other = SignedGrant::sign(&other, &key());
    assert_eq!(client.present_signed(&other).await, Status::Forbidden);
    assert_eq!(client.present_signed(&file.signed(SessionId(6))).await, Status::Forbidden);
    assert_eq!(meta.stats().await.refused_grants, 4);

    // A read grant does not write, and no grant reaches past its limit.
    let reader = File { mode: GrantMode::Read, ..file.clone() };
    assert_eq!(client.present(&reader).await, Status::Ok);
    assert_eq!(client.write_status(&reader, 0, 0, b"x").await, Status::NeedGrant);
    assert_eq!(client.read_status(&reader, 0, 0, 10).await, Status::Ok);
    let small = File { inode: InodeId(2), alloc_limit: 4096, ..file.clone() };
    assert_eq!(client.present(&small).await, Status::Ok);
    assert_eq!(client.write_status(&small, 0, 0, &[1; 4096]).await, Status::Ok);
    assert_eq!(client.write_status(&small, 0, 1, &[1; 4096]).await, Status::NeedGrant);

    // Another's session in the context.
    let stranger = Client { session: SessionId(99), ..client.clone() };
    assert_eq!(stranger.write_status(&small, 0, 0, b"x").await, Status::Forbidden);

    // Stale: an older view, an older generation; and one that is not presented yet.
    let mut newer = File { inode: InodeId(3), ..file.clone() };
    newer.view.version = ViewVersion(5);
    newer.generation = Generation(4);
    assert_eq!(client.present(&newer).await, Status::Ok);
    let mut older = newer.clone();
    older.view.version = ViewVersion(4);
    assert_eq!(client.present(&older).await, Status::StaleView);
    assert_eq!(client.read_status(&older, 0, 0, 10).await, Status::StaleView);
    let behind = File { generation: Generation(3), ..newer.clone() };
    assert_eq!(client.write_status(&behind, 0, 0, b"x").await, Status::StaleGeneration);
    let ahead = File { generation: Generation(5), ..newer.clone() };
    assert_eq!(client.write_status(&ahead, 0, 0, b"x").await, Status::NeedGrant);
    let mut content = newer.clone();
    content.view.content = ContentId(77);
    assert_eq!(client.read_status(&content, 0, 0, 10).await, Status::StaleView);
    // Sealed.
    let seal = |generation| {
        let item = control::SealItem { inode: InodeId(3), generation, alloc_limit: 1 };
        Control::Seal(MapVersion(1), vec![item])
    };
    assert!(matches!(meta.control(seal(Generation(4))).await, ControlReply::Sealed(_)));
    assert_eq!(client.write_status(&newer, 0, 0, b"x").await, Status::StaleGeneration);
    // Control is for the metadata plane only; counters are for operators' tools as well.
    let error = client.connection.control(&Control::Stats, TIMEOUT).await.expect_err("refused");
    assert_eq!(error.status(), Some(Status::Forbidden));
    let operator = world.connect(node.port(), Role::Controller, 0).await;
    let stats = operator.control(&Control::Stats, TIMEOUT).await.expect("answered");
    let ControlReply::Stats(stats) = stats else { panic!("{stats:?}") };
    assert!((1..=stats.journal_records).contains(&stats.journal_batches), "{stats:?}");
    for control in [Control::EvictClean(Vec::new()), Control::PgStatus(PgId(0))] {
        let error = operator.control(&control, TIMEOUT).await.expect_err("refused");
        assert_eq!(error.status(), Some(Status::Forbidden));
    }
    // A write whose bytes are not what its checksums say.
    assert_eq!(client.present(&file).await, Status::Ok);
    let header = Header {
        inode: file.inode,
        length: 8,
        pg: PgId::of_chunk(file.inode, ChunkIndex(0), PGS),
        ..Header::request(Opcode::Write, 0)
    };
    let mut body = client.context(&file, client.next_sequence()).encode().to_vec();
    body.extend(encode_checksums(&piece_checksums(0, b"12345678")));
    let reply = client
        .connection
        .call(header, body.into(), bytes::Bytes::from_static(b"12345679"), TIMEOUT)
        .await
        .expect("answered");
    assert_eq!(reply.header.status, Status::Corrupt);
    assert!(client.read(&file, 0, 0, 8).await.iter().all(|b| *b == 0), "nothing was written");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_closes_only_its_own_connection() {
    let world = World::new(64 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let file = File::new(1);
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 0, b"before").await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let address = format!("127.0.0.1:{}", node.port());

    let good = Header::request(Opcode::Read, 1).encode();
    let mut long_body = Header::request(Opcode::Hello, 1);
    long_body.body_bytes = 5000;
    let mut payload = Header::request(Opcode::Hello, 1);
    payload.payload_bytes = 4 << 20;
    let garbage: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\nHost: somewhere\r\nAccept: everything and more of it, please\r\n\r\n"
            .to_vec(),
        vec![0xff; 64],
        good.to_vec(),
        long_body.encode().to_vec(),
        payload.encode().to_vec(),
        pattern(1, 100_000),
    ];
    let before = meta.stats().await.refused_handshakes;
    for bytes in &garbage {
        let mut socket = TcpStream::connect(&address).await.expect("connects");
        let _ = socket.write_all(bytes).await;
        let mut rest = Vec::new();
        let read = tokio::time::timeout(TIMEOUT, socket.read_to_end(&mut rest)).await;
        // A reset is as good as an end.
        let _ = read.expect("closed by the node");
        assert!(rest.is_empty(), "nothing is said to a stranger");
    }
    let refused = || async { meta.stats().await.refused_handshakes - before };
    assert_eq!(refused().await, garbage.len() as u64);

    // Proved peers that turn to nonsense: a write without its length, a wrong checksum of the body, an
    // opcode of another port.
    let before = meta.stats().await.refused_frames;
    for bad in [
        {
            let mut h = Header::request(Opcode::Write, 1);
            h.length = 10;
            h.payload_bytes = 11;
            h
        },
        {
            let mut h = Header::request(Opcode::Control, 1).with_body(b"abcd");
            h.body_crc ^= 1;
            h
        },
        Header::request(Opcode::Meta, 1),
        Header::request(Opcode::Read, 1).with_body(b"short"),
        Header::request(Opcode::Read, 1).reply(Status::Ok),
    ] {
        let peer = raw_proved(&address, SessionId(0)).await;
        let mut socket = peer;
        let mut frame = bad.encode().to_vec();
        frame.extend(match bad.opcode {
            Opcode::Control => &b"abcd"[..],
            Opcode::Read if bad.body_bytes > 0 => &b"short"[..],
            _ => &b""[..],
        });
        socket.write_all(&frame).await.expect("sent");
        let mut rest = Vec::new();
        tokio::time::timeout(TIMEOUT, socket.read_to_end(&mut rest)).await.expect("closed").ok();
    }
    assert_eq!(meta.stats().await.refused_frames - before, 5);
    // Everybody else goes on.
    assert_eq!(client.read(&file, 0, 0, 6).await, b"before");
    node.shutdown().await;
}

/// A proved connection in plain bytes, to misuse.
async fn raw_proved(address: &str, session: SessionId) -> TcpStream {
    use ebb_dataplane_protocol::auth::*;
    let mut socket = TcpStream::connect(address).await.expect("connects");
    let hello = Hello {
        nonce: [1; 16],
        cluster: CLUSTER,
        role: Role::Client,
        session,
        node: NodeId(0),
        lane: 0,
        peer: None,
    };
    let bytes = encode_hello(&hello);
    let mut frame = Header::request(Opcode::Hello, 1).with_body(&bytes).encode().to_vec();
    frame.extend(&bytes);
    // Byte by byte at first: framing must not depend on how bytes arrive.
    for b in &frame {
        socket.write_all(&[*b]).await.expect("sent");
    }
    let reply = read_frame(&mut socket).await;
    let challenge: Challenge = codec::decode(&reply.1).expect("a challenge");
    assert!(check_server(&key(), &bytes, &challenge));
    let proof = Proof { proof: client_proof(&key(), &bytes, &challenge.nonce) };
    let body = codec::encode(&proof);
    let mut frame = Header::request(Opcode::Prove, 2).with_body(&body).encode().to_vec();
    frame.extend(&body);
    socket.write_all(&frame).await.expect("sent");
    assert_eq!(read_frame(&mut socket).await.0.status, Status::Ok);
    socket
}

async fn read_frame(socket: &mut TcpStream) -> (Header, Vec<u8>) {
    let mut head = [0u8; 64];
    socket.read_exact(&mut head).await.expect("a header");
    let header = Header::decode(&head, 1 << 20).expect("valid");
    let mut body = vec![0u8; header.body_bytes as usize];
    socket.read_exact(&mut body).await.expect("a body");
    (header, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_or_cluster_gets_no_further_than_the_handshake() {
    let world = World::new(64 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let address = format!("127.0.0.1:{}", node.port());
    let wrong = Identity::new(ClusterKey::new([1; 32]), Role::Meta);
    let e = Connection::connect(&address, &wrong, TIMEOUT).await.expect_err("refused");
    assert!(matches!(e, RpcError::WrongKey { .. }), "{e}");
    let other = Identity { cluster: ClusterId(99), ..Identity::new(key(), Role::Meta) };
    let e = Connection::connect(&address, &other, TIMEOUT).await.expect_err("refused");
    assert!(e.to_string().contains("cluster"), "{e}");
    // A thief who parrots the server's proof back, and one who proves with the wrong key.
    use ebb_dataplane_protocol::auth::*;
    let mut socket = TcpStream::connect(&address).await.expect("connects");
    let hello = Hello {
        nonce: [1; 16],
        cluster: CLUSTER,
        role: Role::Meta,
        session: SessionId(0),
        node: NodeId(0),
        lane: 0,
        peer: None,
    };
    let bytes = encode_hello(&hello);
    let mut frame = Header::request(Opcode::Hello, 1).with_body(&bytes).encode().to_vec();
    frame.extend(&bytes);
    socket.write_all(&frame).await.expect("sent");
    let challenge: Challenge = codec::decode(&read_frame(&mut socket).await.1).expect("challenge");
    let body = codec::encode(&Proof { proof: challenge.proof });
    let mut frame = Header::request(Opcode::Prove, 2).with_body(&body).encode().to_vec();
    frame.extend(&body);
    socket.write_all(&frame).await.expect("sent");
    assert_eq!(read_frame(&mut socket).await.0.status, Status::Forbidden);
    let mut rest = Vec::new();
    tokio::time::timeout(TIMEOUT, socket.read_to_end(&mut rest)).await.expect("closed").ok();
    let meta = MetaPeer::new(&world, node.port()).await;
    // The client with the wrong key hung up by itself: that counts as a failed handshake too.
    assert_eq!(meta.stats().await.refused_handshakes, 3);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_connection_of_a_lane_closes_the_older_one() {
    let world = World::new(64 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let older = Client::new(&world, node.port(), 5).await;
    let file = File::new(1);
    assert_eq!(older.present(&file).await, Status::Ok);
    let newer = Client::new(&world, node.port(), 5).await;
    eventually("the older is closed", || older.connection.is_closed()).await;
    // Grants are the session's, not the connection's.
    newer.write(&file, 0, 0, b"new").await;
    // Another lane and another session live beside it.
    let identity =
        Identity { session: SessionId(5), lane: 1, ..Identity::new(key(), Role::Client) };
    let address = format!("127.0.0.1:{}", node.port());
    let lane = Connection::connect(&address, &identity, TIMEOUT).await.expect("connects");
    let _other = Client::new(&world, node.port(), 6).await;
    newer.write(&file, 0, 0, b"still").await;
    assert!(!newer.connection.is_closed() && !lane.is_closed());
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn maps_and_epochs_have_to_agree() {
    let world = World::new(64 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let mut client = Client::new(&world, node.port(), 5).await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let mut file = File::new(1);
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 0, b"one").await;
    let pg = PgId::of_chunk(file.inode, ChunkIndex(0), PGS);

    // The client is ahead: the node asks for the map at once and says busy meanwhile.
    client.map_version = MapVersion(2);
    assert_eq!(client.read_status(&file, 0, 0, 3).await, Status::Busy);
    world.change_map(|m| m.pgs[usize::from(pg.0)].moving = true).await;
    assert_eq!(client.read(&file, 0, 0, 3).await, b"one");
    assert_eq!(client.write_status(&file, 0, 0, b"two").await, Status::Frozen);
    // A new epoch, in which the grants of before count for nothing here.
    world
        .change_map(|m| {
            let version = m.version;
            let entry = &mut m.pgs[usize::from(pg.0)];
            entry.moving = false;
            entry.epoch = PgEpoch(2);
            entry.since_map_version = version;
        })
        .await;
    assert_eq!(client.read_status(&file, 0, 0, 3).await, Status::StaleEpoch);
    client.map_version = MapVersion(3);
    client.epoch = PgEpoch(2);
    assert_eq!(client.read_status(&file, 0, 0, 3).await, Status::StaleEpoch, "an old grant");
    file.least_map = MapVersion(3);
    file.alloc_limit *= 2;
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 0, b"two").await;
    assert_eq!(client.read(&file, 0, 0, 3).await, b"two");

    // Freeze and thaw by request; then the group goes to another node.
    assert_eq!(meta.control(Control::Freeze(pg, PgEpoch(2))).await, ControlReply::Done);
    assert_eq!(client.write_status(&file, 0, 0, b"x").await, Status::Frozen);
    assert_eq!(client.read(&file, 0, 0, 3).await, b"two");
    assert_eq!(meta.control(Control::Thaw(pg, PgEpoch(2))).await, ControlReply::Done);
    client.write(&file, 0, 0, b"six").await;
    let ControlReply::Pg(held) = meta.control(Control::PgStatus(pg)).await else { panic!() };
    assert_eq!((held.dirty_inodes, held.frozen), (vec![file.inode], false));
    assert!(held.dirty_bytes > 0);
    eventually("the heartbeat names the dirty group", || world.meta().dirty_groups.contains(&pg))
        .await;
    let release = Control::ReleasePg(pg, PgEpoch(3));
    assert!(matches!(meta.control(release.clone()).await, ControlReply::Refused(_)), "dirty");
    assert_eq!(
        meta.control(Control::DropInodes(client.map_version, vec![file.inode])).await,
        ControlReply::Done
    );
    assert_eq!(meta.control(release).await, ControlReply::Done);
    let other = File {
        inode: (2..)
            .map(InodeId)
            .find(|i| PgId::of_chunk(*i, ChunkIndex(0), PGS) == pg)
            .expect("one"),
        ..file.clone()
    };
    assert_eq!(client.present(&other).await, Status::Ok);
    assert_eq!(client.write_status(&other, 0, 0, b"x").await, Status::StaleEpoch, "released");
    // A dropped inode stays dropped, whatever grant is about.
    assert_eq!(client.present(&file).await, Status::StaleView);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_comes_back_before_its_release_takes_writes() {
    let world = World::new(64 * MIB, 1).await;
    let node = world.start().await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let mut client = Client::new(&world, node.port(), 5).await;
    let mut file = File::new(1);
    let pg = PgId::of_chunk(file.inode, ChunkIndex(0), PGS);
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 0, b"one").await;
    // It is given away in epoch 2, and nobody says so here: the release is on its way.
    assert_eq!(meta.control(Control::Freeze(pg, PgEpoch(1))).await, ControlReply::Done);
    assert_eq!(client.write_status(&file, 0, 0, b"two").await, Status::Frozen);
    // In epoch 3 it is back.
    world
        .change_map(|m| {
            let version = m.version;
            let entry = &mut m.pgs[usize::from(pg.0)];
            entry.epoch = PgEpoch(3);
            entry.since_map_version = version;
            client.map_version = version;
        })
        .await;
    client.epoch = PgEpoch(3);
    file.least_map = client.map_version;
    file.alloc_limit *= 2;
    assert_eq!(client.present(&file).await, Status::Ok);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while client.write_status(&file, 0, 0, b"two").await != Status::Ok {
        assert!(std::time::Instant::now() < deadline, "frozen for ever");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The release of epoch 2 comes late, and takes nothing.
    let late = meta.control(Control::ReleasePg(pg, PgEpoch(2))).await;
    assert!(matches!(late, ControlReply::Refused(_)), "{late:?}");
    assert_eq!(client.read(&file, 0, 0, 3).await, b"two");
    // A freeze of the epoch it has now holds.
    assert_eq!(meta.control(Control::Freeze(pg, PgEpoch(3))).await, ControlReply::Done);
    world.beats(2).await;
    assert_eq!(client.write_status(&file, 0, 0, b"six").await, Status::Frozen);
    node.shutdown().await;
}

/// R24: what a node that was away has of a group that others hold by now is in S3, or was given up.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_got_a_stand_in_is_dropped_dirty_or_not_but_never_where_it_is_held() {
    let world = World::new(64 * MIB, 1).await;
    let node = world.start().await;
    let meta = MetaPeer::new(&world, node.port()).await;
    let client = Client::new(&world, node.port(), 5).await;
    let file = File::new(1);
    let pg = PgId::of_chunk(file.inode, ChunkIndex(0), PGS);
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 0, b"one").await;
    for late in [0, 1] {
        let refused = meta.control(Control::DiscardPg(pg, PgEpoch(late))).await;
        assert!(matches!(refused, ControlReply::Refused(_)), "{late}: {refused:?}");
    }
    assert_eq!(client.read(&file, 0, 0, 3).await, b"one");
    eventually("the heartbeat names the dirty group", || world.meta().dirty_groups.contains(&pg))
        .await;
    world
        .change_map(|m| {
            let entry = &mut m.pgs[usize::from(pg.0)];
            entry.epoch = PgEpoch(2);
            entry.members = vec![ShardRef { node: NodeId(99), core: CoreId(0) }];
        })
        .await;
    assert_eq!(client.read_status(&file, 0, 0, 3).await, Status::StaleEpoch);
    assert_eq!(meta.control(Control::DiscardPg(pg, PgEpoch(2))).await, ControlReply::Done);
    let ControlReply::Pg(held) = meta.control(Control::PgStatus(pg)).await else { panic!() };
    assert_eq!((held.dirty_bytes, held.pins), (0, 0));
    eventually("the heartbeat says so", || !world.meta().dirty_groups.contains(&pg)).await;
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_back_from_a_pause_serves_nothing_until_its_lease_is_new() {
    let world = World::new(64 * MIB, 1).await;
    world.meta().lease_ms = 1500;
    let node = world.spawn().await;
    world.beats(2).await;
    let client = Client::new(&world, node.port(), 5).await;
    let file = File::new(1);
    assert_eq!(client.present(&file).await, Status::Ok);
    client.write(&file, 0, 0, b"old").await;
    node.pause().await;
    // Requests wait in the socket while the node is stopped, past its lease.
    let read = tokio::spawn({
        let (client, file) = (client.clone(), file.clone());
        async move { client.read_status(&file, 0, 0, 3).await }
    });
    let write = tokio::spawn({
        let (client, file) = (client.clone(), file.clone());
        async move { client.write_status(&file, 0, 0, b"new").await }
    });
    world.meta().silent = true;
    tokio::time::sleep(Duration::from_millis(1800)).await;
    node.signal(nix::sys::signal::Signal::SIGCONT);
    assert_eq!(read.await.expect("no panic"), Status::NoLease);
    assert_eq!(write.await.expect("no panic"), Status::NoLease);
    // The metadata plane's requests work without a lease.
    let meta = MetaPeer::new(&world, node.port()).await;
    assert_eq!(meta.stats().await.reads, 0);
    world.meta().silent = false;
    assert_eq!(client.read(&file, 0, 0, 3).await, b"old");
    node.kill9();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_told_to_stop_stops() {
    let world = World::new(64 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    world.meta().stop = true;
    let ended = tokio::time::timeout(TIMEOUT, node.task).await.expect("in time").expect("no panic");
    let e = ended.expect_err("it says why");
    assert!(e.to_string().contains("superseded"), "{e}");
}
