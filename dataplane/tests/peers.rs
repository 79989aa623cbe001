//! Two data nodes in one process: who may call whom, and reads of what moved away with its group.

mod common;

use common::client::*;
use common::*;
use ebb_dataplane_protocol::auth::{PeerHello, Role};
use ebb_dataplane_protocol::control::{Control, ControlReply};
use ebb_dataplane_protocol::data::PeerRead;
use ebb_dataplane_protocol::*;
use ebb_rpc::{Connection, Identity};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const SECOND: NodeId = NodeId(NODE.0 + 1);

fn core(node: NodeId) -> ShardRef {
    ShardRef { node, core: CoreId(0) }
}

/// A world with two nodes; the first holds every group.
async fn two_nodes() -> (World, InProcess, InProcess) {
    let world = World::new(128 * MIB, 1).await;
    world.meta().many = true;
    let first = world.start().await;
    let second = world.start_with(world.another("second")).await;
    // The map that a node got as it registered may not name the other yet.
    world.change_map(|_| {}).await;
    world.beats(4).await;
    (world, first, second)
}

/// Gives every group to the second node, as the metadata plane does with clean ones.
async fn move_all(world: &World, donor: &MetaPeer) -> (PgEpoch, MapVersion) {
    let epoch = PgEpoch(2);
    world
        .change_map(|map| {
            let since = map.version;
            for pg in &mut map.pgs {
                pg.members = vec![core(SECOND)];
                (pg.epoch, pg.since_map_version) = (epoch, since);
            }
        })
        .await;
    for pg in 0..PGS {
        let done = donor.control(Control::ReleasePg(PgId(pg), epoch)).await;
        assert_eq!(done, ControlReply::Done);
    }
    let version = world.meta().map.version;
    (epoch, version)
}

async fn put(world: &World, key: &str, body: &[u8]) -> String {
    let none = ebb_s3::Condition::None;
    let tag = world.bucket.put(key, body.to_vec(), &Default::default(), &none).await.expect("PUT");
    tag.as_str().to_owned()
}

async fn read_all(client: &Client, file: &File, len: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < len {
        let chunk = (all.len() / CHUNK_BYTES as usize) as u32;
        let offset = (all.len() % CHUNK_BYTES as usize) as u32;
        let take = (len - all.len()).min(1 << 20) as u32;
        all.extend(client.read(file, chunk, offset, take).await);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn what_moved_with_its_group_is_read_from_its_former_holder_before_s3() {
    let (world, first, second) = two_nodes().await;
    let body = pattern(1, 6 * MIB as usize + 12_345);
    let etag = put(&world, "k", &body).await;
    let mut file = File::backed(100, "k", &etag, body.len() as u64);
    file.mode = GrantMode::Read;

    let client = Client::new(&world, first.port(), 11).await;
    let donor = MetaPeer::new(&world, first.port()).await;
    client_at(&client, &file).await;
    assert!(read_all(&client, &file, body.len()).await == body);
    donor.eventually_clean(body.len() as u64).await;

    let (epoch, version) = move_all(&world, &donor).await;
    assert_eq!(donor.stats().await.clean_bytes, 0, "it is the other's now");
    // Whatever is read from here on was not asked of S3.
    world.bucket.delete("k", None).await.expect("deleted");
    let mut client = Client::new(&world, second.port(), 12).await;
    (client.epoch, client.map_version, file.least_map) = (epoch, version, version);
    client_at(&client, &file).await;
    assert!(read_all(&client, &file, body.len()).await == body, "the same bytes");
    let receiver = MetaPeer::new(&world, second.port()).await;
    let stats = receiver.stats().await;
    assert!(stats.peer_reads >= 7, "{stats:?}");
    // And they are its own then.
    receiver.eventually_clean(body.len() as u64).await;

    // Another content of the file is nothing the donor can have: S3 is asked, and says that it is gone.
    let mut newer = file.clone();
    newer.view.version = ViewVersion(2);
    newer.view.content = ContentId(2);
    client_at(&client, &newer).await;
    assert_eq!(client.read_status(&newer, 0, 0, 4096).await, Status::BackingChanged);
    assert_eq!(receiver.stats().await.peer_reads, stats.peer_reads);
    // It is back, with other bytes: those are read.
    let other = pattern(2, body.len());
    let etag = put(&world, "k", &other).await;
    let mut newest = File::backed(100, "k", &etag, other.len() as u64);
    newest.mode = GrantMode::Read;
    newest.least_map = version;
    newest.view.version = ViewVersion(3);
    newest.view.content = ContentId(3);
    client_at(&client, &newest).await;
    assert!(read_all(&client, &newest, other.len()).await == other);
    first.shutdown().await;
    second.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_former_holder_that_dropped_it_or_is_gone_costs_nothing_but_a_fetch() {
    let (world, first, second) = two_nodes().await;
    let body = pattern(3, 3 * MIB as usize);
    let etag = put(&world, "k", &body).await;
    let mut file = File::backed(100, "k", &etag, body.len() as u64);
    file.mode = GrantMode::Read;
    let client = Client::new(&world, first.port(), 11).await;
    let donor = MetaPeer::new(&world, first.port()).await;
    client_at(&client, &file).await;
    assert!(read_all(&client, &file, body.len()).await == body);
    donor.eventually_clean(body.len() as u64).await;
    let (epoch, version) = move_all(&world, &donor).await;
    assert_eq!(donor.control(Control::EvictClean(Vec::new())).await, ControlReply::Done);

    let mut client = Client::new(&world, second.port(), 12).await;
    let receiver = MetaPeer::new(&world, second.port()).await;
    (client.epoch, client.map_version, file.least_map) = (epoch, version, version);
    client_at(&client, &file).await;
    assert!(read_all(&client, &file, body.len()).await == body);
    assert_eq!(receiver.stats().await.peer_reads, 0, "it had dropped them");

    // Gone for good: its port refuses.
    first.shutdown().await;
    receiver.eventually_clean(body.len() as u64).await;
    assert_eq!(receiver.control(Control::EvictClean(Vec::new())).await, ControlReply::Done);
    let started = Instant::now();
    assert!(read_all(&client, &file, body.len()).await == body);
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    second.shutdown().await;
}

/// Presents, however often it takes.
async fn client_at(client: &Client, file: &File) {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        match client.present(file).await {
            Status::Ok => return,
            Status::Busy | Status::NoLease if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            status => panic!("{status:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_core_that_means_this_one_is_heard_and_only_once() {
    let world = World::new(64 * MIB, 1).await;
    let node = world.start().await;
    world.beats(2).await;
    let store = world.meta().map.nodes[0].store;
    let hello =
        PeerHello { from: core(NodeId(9)), store: 1, boot: 2, to: core(NODE), to_store: store };
    let address = format!("127.0.0.1:{}", node.port());
    let connect = |role: Role, peer: Option<PeerHello>| {
        let identity = Identity { cluster: CLUSTER, peer, ..Identity::new(key(), role) };
        let address = address.clone();
        async move { Connection::connect(&address, &identity, TIMEOUT).await }
    };
    // Another node, another core, another store; nobody in particular; a client in disguise.
    let core_1 = ShardRef { node: NODE, core: CoreId(1) };
    for wrong in [
        PeerHello { to: core(NodeId(99)), ..hello },
        PeerHello { to: core_1, ..hello },
        PeerHello { to_store: store ^ 1, ..hello },
    ] {
        connect(Role::Node, Some(wrong)).await.expect_err("it is not meant");
    }
    connect(Role::Node, None).await.expect_err("who calls?");
    connect(Role::Client, Some(hello)).await.expect_err("a client is no core");
    let meta = MetaPeer::new(&world, node.port()).await;
    assert_eq!(meta.stats().await.refused_handshakes, 5);

    let ask = |content: u64| {
        let header = Header { length: 4096, ..Header::request(Opcode::PeerRead, 0) };
        let body = PeerRead { content: ContentId(content), valid_bytes: 1 << 30 }.encode();
        (header, bytes::Bytes::copy_from_slice(&body))
    };
    let none = bytes::Bytes::new;
    let (header, body) = ask(1);
    let older = connect(Role::Node, Some(hello)).await.expect("a core");
    let reply = older.call(header, body.clone(), none(), TIMEOUT).await.expect("answered");
    assert_eq!(reply.header.status, Status::NotHere);
    // A client may not ask, whatever its grants; nor may a core ask as a client does.
    let client = connect(Role::Client, None).await.expect("a client");
    let reply = client.call(header, body.clone(), none(), TIMEOUT).await.expect("answered");
    assert_eq!(reply.header.status, Status::Forbidden);
    let read = Header::request(Opcode::Read, 0);
    let reply = older.call(read, none(), none(), TIMEOUT).await.expect("answered");
    assert_eq!(reply.header.status, Status::Forbidden);
    // Two cores of one caller have a connection each; a newer one of the same core ends the older.
    let elsewhere = PeerHello { from: ShardRef { core: CoreId(1), ..hello.from }, ..hello };
    let other = connect(Role::Node, Some(elsewhere)).await.expect("another core");
    let identity = Identity {
        cluster: CLUSTER,
        peer: Some(hello),
        lane: 1,
        ..Identity::new(key(), Role::Node)
    };
    let bulk = Connection::connect(&address, &identity, TIMEOUT).await.expect("another channel");
    let newer = connect(Role::Node, Some(hello)).await.expect("the same core");
    older.call(header, body.clone(), none(), TIMEOUT).await.expect_err("it is over");
    for alive in [&other, &bulk, &newer] {
        let reply = alive.call(header, body.clone(), none(), TIMEOUT).await.expect("answered");
        assert_eq!(reply.header.status, Status::NotHere);
    }
    node.shutdown().await;
}

/// A core that holds the key and answers every question with the right checksums over wrong bytes.
fn liar(bytes: Vec<u8>) -> (u16, std::thread::JoinHandle<u64>) {
    use ebb_dataplane_protocol::auth::{Challenge, Proof, check_client, server_proof};
    use ebb_dataplane_protocol::data::encode_checksums;
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = listener.local_addr().expect("an address").port();
    let thread = std::thread::spawn(move || {
        let (mut s, _) = listener.accept().expect("called");
        s.set_read_timeout(Some(TIMEOUT)).expect("set");
        let (mut hello, mut asked) = (Vec::new(), 0);
        let nonce = [3; 16];
        loop {
            let mut head = [0; 64];
            if s.read_exact(&mut head).is_err() {
                return asked;
            }
            let h = Header::decode(&head, 1 << 20).expect("a frame");
            let mut body = vec![0; h.body_bytes as usize];
            s.read_exact(&mut body).expect("its body");
            let (reply, payload) = match h.opcode {
                Opcode::Hello => {
                    let proof = server_proof(&key(), &body, &nonce);
                    hello = body;
                    let cluster = CLUSTER;
                    (codec::encode(&Challenge { nonce, proof, cluster }), Vec::new())
                }
                Opcode::Prove => {
                    let proof: Proof = codec::decode(&body).expect("a proof");
                    assert!(check_client(&key(), &hello, &nonce, &proof.proof));
                    (Vec::new(), Vec::new())
                }
                _ => {
                    asked += 1;
                    let at = h.chunk.start() as usize + h.offset as usize;
                    let mut blocks = bytes[at..at + h.length as usize].to_vec();
                    let crcs: Vec<u32> = blocks.chunks(4096).map(crc32c).collect();
                    blocks[5000] ^= 1;
                    (encode_checksums(&crcs), blocks)
                }
            };
            let header = h.reply(Status::Ok).with_body(&reply).with_payload(payload.len() as u32);
            s.write_all(&[&header.encode()[..], &reply, &payload].concat()).expect("sent");
        }
    });
    (port, thread)
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_another_core_sends_wrong_are_fetched_from_s3() {
    let world = World::new(128 * MIB, 1).await;
    let body = pattern(5, 2 * MIB as usize);
    let etag = put(&world, "k", &body).await;
    let (port, thread) = liar(body.clone());
    const LIAR: NodeId = NodeId(50);
    for pg in &mut world.meta().map.pgs {
        pg.members = vec![core(LIAR)];
    }
    let node = world.start().await;
    world.beats(2).await;
    world
        .change_map(|map| {
            let since = map.version;
            map.nodes.push(NodeInfo {
                id: LIAR,
                store: 5,
                state: NodeState::Active,
                host: "127.0.0.1".into(),
                ports: vec![port],
                capacity_bytes: 0,
            });
            for pg in &mut map.pgs {
                pg.members = vec![core(NODE)];
                (pg.epoch, pg.since_map_version) = (PgEpoch(2), since);
            }
        })
        .await;
    let version = world.meta().map.version;
    let mut file = File::backed(100, "k", &etag, body.len() as u64);
    (file.mode, file.least_map) = (GrantMode::Read, version);
    let mut client = Client::new(&world, node.port(), 12).await;
    (client.epoch, client.map_version) = (PgEpoch(2), version);
    client_at(&client, &file).await;
    assert!(read_all(&client, &file, body.len()).await == body);
    let stats = MetaPeer::new(&world, node.port()).await.stats().await;
    assert!(stats.peer_reads == 0 && stats.checksum_errors > 0, "{stats:?}");
    node.shutdown().await;
    assert!(thread.join().expect("no panic") > 0, "it was asked");
}
