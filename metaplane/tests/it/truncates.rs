//! R14 over real sockets: a truncate is answered when the cores have its cut, if somebody else may
//! write there; and at once if nobody may.

use crate::common::*;
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::control::{Control, ControlReply, SealedItem};
use ebb_dataplane_protocol::*;
use ebb_metaplane_protocol::attr::SetAttr;
use ebb_metaplane_protocol::op::OpenMode;
use ebb_metaplane_protocol::*;
use ebb_rpc::server::{Counters, Handler, Peer, serve};
use ebb_rpc::{Frame, Identity, MetaClient};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const KEY: [u8; 32] = [0x5e; 32];
const CLUSTER: ClusterId = ClusterId(7);
const ROOT: InodeId = InodeId::ROOT;

/// Holds nothing, and acks cuts only while its gate is open.
struct Core {
    gate: watch::Receiver<bool>,
    cuts_seen: watch::Sender<u64>,
}

impl Handler for Core {
    async fn handle(&self, _peer: Peer, frame: Frame) -> Frame {
        let reply = match codec::decode::<Control>(&frame.body).expect("a control request") {
            Control::Seal(_, items) => {
                let empty = |i: control::SealItem| SealedItem {
                    inode: i.inode,
                    generation: i.generation,
                    extents: Vec::new(),
                    high_water: 0,
                };
                ControlReply::Sealed(items.into_iter().map(empty).collect())
            }
            Control::ApplyViews(_) => {
                self.cuts_seen.send_modify(|n| *n += 1);
                self.gate.clone().wait_for(|open| *open).await.expect("the test lives");
                ControlReply::Done
            }
            _ => ControlReply::Done,
        };
        let body = codec::encode(&reply);
        Frame::new(frame.header.reply(Status::Ok), body.into(), bytes::Bytes::new())
    }
}

/// A core that holds every group.
async fn core(meta: &Meta) -> (watch::Sender<bool>, watch::Receiver<u64>, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let port = listener.local_addr().expect("an address").port();
    let (open, gate) = watch::channel(true);
    let (cuts_seen, seen) = watch::channel(0);
    let stop = CancellationToken::new();
    let (handler, stopped) = (Arc::new(Core { gate, cuts_seen }), stop.clone());
    tokio::spawn(async move {
        let counters = Arc::new(Counters::default());
        serve(listener, ClusterKey::new(KEY), CLUSTER, 1 << 20, handler, counters, stopped).await;
    });
    let identity = Identity::new(ClusterKey::new(KEY), Role::Data);
    let node = MetaClient::new(vec![meta.address.clone()], identity);
    let call = async |call| match node.call(&Request::Node(call), PATIENCE).await {
        Ok(Response::Node(Ok(reply))) => reply,
        other => panic!("not for a node: {other:?}"),
    };
    let register = NodeCall::Register {
        store: 1,
        host: "127.0.0.1".into(),
        ports: vec![port],
        capacity_bytes: 1 << 30,
        boot: 1,
    };
    let NodeReply::Registered { node: id, map, .. } = call(register).await else {
        panic!("not registered")
    };
    let operator = meta.session().await;
    let to = vec![ShardRef { node: id, core: CoreId(0) }];
    for pg in 0..map.pgs.len() {
        let pg = PgId(u16::try_from(pg).expect("few"));
        operator.admin(AdminCall::MovePg { pg, to: to.clone() }).await.expect("wanted");
    }
    for _ in 0..1_000 {
        let beat = NodeCall::Heartbeat {
            node: id,
            boot: 1,
            map_version: MapVersion(0),
            stats: Vec::new(),
            dirty_groups: Vec::new(),
            wishes: Default::default(),
        };
        let NodeReply::Lease { map: Some(map), .. } = call(beat).await else { panic!("no lease") };
        if map.pgs.iter().all(|g| g.members == to) {
            return (open, seen, stop);
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the groups do not arrive");
}

fn truncate(inode: InodeId) -> Op {
    Op::SetAttr { inode, set: SetAttr { size: Some(0), ..SetAttr::default() } }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_truncate_under_anothers_grant_is_answered_after_every_ack() {
    let world = World::new().await;
    let meta = world.start(CLUSTER.0, "meta").await;
    let (gate, mut seen, core) = core(&meta).await;
    let (a, b) = (meta.session().await, meta.session().await);
    let mine = a.create(ROOT, "f").await.expect("created");
    let inode = mine.attr.inode;
    gate.send_replace(false);

    // Nobody else writes: no core is waited for, and this one does not ack.
    a.op(truncate(inode)).await.expect("answered at once");
    seen.wait_for(|n| *n > 0).await.expect("the core lives");
    gate.send_replace(true);

    let open = OpenMode { write: true, truncate: false };
    let theirs = match b.op(Op::Open { inode, open }).await.expect("opened") {
        OpReply::Opened(opened) => opened.handle,
        other => panic!("not opened: {other:?}"),
    };
    let again = OpenMode { write: true, truncate: true };
    for op in [truncate(inode), Op::Open { inode, open: again }] {
        gate.send_replace(false);
        let before = *seen.borrow_and_update();
        let mut waiting = Box::pin(a.op(op));
        tokio::select! {
            reply = &mut waiting => panic!("answered before the ack: {reply:?}"),
            _ = seen.wait_for(|n| *n > before) => {}
        }
        // It hangs on the ack and on nothing else.
        let early = tokio::time::timeout(Duration::from_millis(200), &mut waiting).await;
        assert!(early.is_err(), "answered before the ack: {early:?}");
        gate.send_replace(true);
        waiting.await.expect("answered");
    }
    b.op(Op::Release { handle: theirs, commit: None }).await.expect("released");
    gate.send_replace(false);
    a.op(truncate(inode)).await.expect("answered at once again");
    gate.send_replace(true);
    core.cancel();
    meta.stop().await;
}
