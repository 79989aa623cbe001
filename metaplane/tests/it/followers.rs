//! Voters that follow answer questions (docs/PROTOCOL.md, R60): as the leader does, never with less than was answered
//! before, and not where only the leader can.

use crate::common::*;
use crate::voters::{client_of_all, configs, leader, start_all};
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::{InodeId, SessionId, Status};
use ebb_metaplane::MetaConfig;
use ebb_metaplane_protocol::lease::Watch;
use ebb_metaplane_protocol::op::OpenMode;
use ebb_metaplane_protocol::*;
use ebb_rpc::{Connection, Identity, RpcError};
use std::time::{Duration, Instant};

const ROOT: InodeId = InodeId::ROOT;

/// A connection to one voter.
struct Near(Connection, SessionId);

/// What it says.
#[derive(Debug, PartialEq)]
enum Said {
    Answer(FsResult<QueryReply>),
    LeadersBusiness,
    CannotSay,
}

impl Near {
    async fn connect(config: &MetaConfig, session: SessionId) -> Self {
        let identity = Identity::new(ClusterKey::new(KEY), Role::Client);
        let connection = Connection::connect(&config.listen, &identity, PATIENCE).await;
        Self(connection.expect("connected"), session)
    }

    async fn ask_once(&self, query: &Query) -> Said {
        let request = Request::Query { session: self.1, query: query.clone() };
        match self.0.meta_near(&request, PATIENCE).await {
            Ok((Response::Query(reply), true)) => Said::Answer(reply),
            Err(RpcError::Status { status: Status::NotLeader, .. }) => Said::LeadersBusiness,
            Err(RpcError::Status { status: Status::Busy, .. }) => Said::CannotSay,
            other => panic!("{query:?}: {other:?}"),
        }
    }

    /// The same, again while it is behind: a machine may be slow.
    async fn ask(&self, query: &Query) -> Said {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.ask_once(query).await {
                Said::CannotSay if Instant::now() < end => {}
                said => return said,
            }
        }
    }
}

fn lookup(parent: InodeId, name: &str) -> Query {
    Query::Lookup { parent, name: name.as_bytes().to_vec() }
}

fn page(inode: InodeId) -> Query {
    Query::ReadDir { inode, after: Vec::new(), limit: 100 }
}

/// Connections to the voters that follow.
async fn others(configs: &[MetaConfig], c: &Client) -> Vec<Near> {
    let leads = leader(c).await;
    let mut near = Vec::new();
    for (_, config) in configs.iter().enumerate().filter(|(i, _)| *i != leads) {
        near.push(Near::connect(config, c.session).await);
    }
    near
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_answer_with_all_that_was_answered_before() {
    let world = World::new().await;
    let configs = configs(&world);
    let running = start_all(&world, &configs).await;
    let c = client_of_all(&configs).await;
    let dir = c.mkdir(ROOT, "d").await.expect("made").inode;
    let near = others(&configs, &c).await;
    for i in 0..150 {
        let made = c.mkdir(dir, &format!("n{i}")).await.expect("made");
        let moved = c.rename((dir, &format!("n{i}")), (dir, &format!("m{i}")), 0).await;
        moved.expect("renamed");
        for near in &near {
            match near.ask(&lookup(dir, &format!("m{i}"))).await {
                Said::Answer(Ok(QueryReply::Attr(attr))) => assert_eq!(attr.inode, made.inode),
                other => panic!("{i}: {other:?}"),
            }
            let gone = near.ask(&lookup(dir, &format!("n{i}"))).await;
            assert_eq!(gone, Said::Answer(Err(FsError::NotFound)), "{i}");
        }
    }
    // Whatever is asked, the answer is the leader's.
    c.symlink(dir, "link", "m3").await.expect("made");
    c.touch(dir, "file").await;
    let link = c.lookup(dir, "link").await.expect("there").inode;
    let file = c.lookup(dir, "file").await.expect("there").inode;
    let inner = c.mkdir(dir, "inner").await.expect("made").inode;
    let path = |p: &str| p.split('/').map(|n| n.as_bytes().to_vec()).collect();
    let queries = [
        Query::GetAttr(dir),
        Query::GetAttr(file),
        Query::GetAttr(InodeId(1 << 40)),
        Query::ReadLink(link),
        Query::ReadLink(file),
        Query::Xattrs(file),
        Query::Parent(inner),
        page(dir),
        Query::ReadDir { inode: dir, after: b"m5".to_vec(), limit: 7 },
        Query::ReadDir { inode: file, after: Vec::new(), limit: 7 },
        lookup(file, "x"),
        lookup(dir, &"x".repeat(256)),
        Query::Resolve { path: path("d/inner") },
        Query::Resolve { path: path("d/inner/none") },
        Query::Resolve { path: path("d/file/none") },
    ];
    for query in queries {
        let expected = c.query(query.clone()).await;
        for near in &near {
            assert_eq!(near.ask(&query).await, Said::Answer(expected.clone()), "{query:?}");
        }
    }
    for meta in running.into_iter().flatten() {
        meta.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_leave_to_the_leader_what_is_the_leaders() {
    let world = World::new().await;
    world.put("old/file", b"from before").await;
    let configs = configs(&world);
    let running = start_all(&world, &configs).await;
    let c = client_of_all(&configs).await;
    let near = others(&configs, &c).await;
    let leads = leader(&c).await;
    // What nobody has asked S3 for.
    for near in &near {
        assert_eq!(near.ask(&lookup(ROOT, "old")).await, Said::LeadersBusiness);
        assert_eq!(near.ask(&page(ROOT)).await, Said::LeadersBusiness);
    }
    let old = c.lookup(ROOT, "old").await.expect("there").inode;
    for near in &near {
        assert_eq!(near.ask(&lookup(old, "file")).await, Said::LeadersBusiness);
    }
    let file = c.lookup(old, "file").await.expect("there").inode;
    let of_leader = c.query(Query::GetAttr(file)).await;
    for near in &near {
        assert_eq!(near.ask(&Query::GetAttr(file)).await, Said::Answer(of_leader.clone()));
    }
    // What is no matter of the state alone.
    let map = Query::Map { have: ebb_dataplane_protocol::MapVersion(0), wake: false };
    for query in [Query::StatFs, map, Query::Freshen(file), Query::Compare(file)] {
        for near in &near {
            assert_eq!(near.ask(&query).await, Said::LeadersBusiness, "{query:?}");
        }
    }
    let dir = c.mkdir(ROOT, "d").await.expect("made").inode;
    // Names that a session has to itself.
    let other = client_of_all(&configs).await;
    let op = Op::Create {
        parent: dir,
        name: b"own".to_vec(),
        mode: 0o644,
        uid: 0,
        gid: 0,
        open: OpenMode { write: true, truncate: false },
        exclusive: true,
        delegate: true,
    };
    let OpReply::Opened(opened) = c.op(op).await.expect("made") else { panic!("not opened") };
    assert!(opened.delegation.is_some());
    for (_, config) in configs.iter().enumerate().filter(|(i, _)| *i != leads) {
        let stranger = Near::connect(config, other.session).await;
        assert_eq!(stranger.ask(&lookup(dir, "own")).await, Said::LeadersBusiness);
        assert_eq!(stranger.ask(&page(dir)).await, Said::LeadersBusiness);
        let path = vec![b"d".to_vec(), b"own".to_vec()];
        assert_eq!(stranger.ask(&Query::Resolve { path }).await, Said::LeadersBusiness);
        let holder = Near::connect(config, c.session).await;
        assert!(matches!(holder.ask(&lookup(dir, "own")).await, Said::Answer(Ok(_))));
    }
    for meta in running.into_iter().flatten() {
        meta.stop().await;
    }
}

/// Directories that are to be compared with the bucket again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_leave_directories_that_were_listed_long_ago() {
    let world = World::new().await;
    let mut configs = configs(&world);
    for config in &mut configs {
        config.timings.relist_ms = 0;
    }
    let running = start_all(&world, &configs).await;
    let c = client_of_all(&configs).await;
    let dir = c.mkdir(ROOT, "d").await.expect("made").inode;
    c.touch(dir, "there").await;
    for near in others(&configs, &c).await {
        assert_eq!(near.ask(&lookup(dir, "none")).await, Said::LeadersBusiness);
        assert_eq!(near.ask(&page(dir)).await, Said::LeadersBusiness);
        // What is there is there, and who goes on was listed for when it began.
        assert!(matches!(near.ask(&lookup(dir, "there")).await, Said::Answer(Ok(_))));
        let rest = Query::ReadDir { inode: dir, after: b"a".to_vec(), limit: 7 };
        assert!(matches!(near.ask(&rest).await, Said::Answer(Ok(_))));
    }
    for meta in running.into_iter().flatten() {
        meta.stop().await;
    }
}

/// What a client remembers under a lease may be older than what a follower has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_are_silent_while_somebody_has_a_lease() {
    let world = World::new().await;
    let configs = configs(&world);
    let running = start_all(&world, &configs).await;
    let c = client_of_all(&configs).await;
    let dir = c.mkdir(ROOT, "d").await.expect("made").inode;
    let near = others(&configs, &c).await;
    for near in &near {
        assert!(matches!(near.ask(&Query::GetAttr(dir)).await, Said::Answer(Ok(_))));
    }
    let watch = Watch { call: 1, ..Watch::default() };
    let call = Request::Session(SessionCall::Watch(c.session, watch));
    let reply = c.meta.call(&call, PATIENCE).await.expect("an answer");
    assert!(matches!(&reply, Response::Session(Ok(SessionReply::Watched(w))) if w.epoch != 0));
    for near in &near {
        assert_eq!(near.ask_once(&Query::GetAttr(dir)).await, Said::CannotSay);
    }
    for meta in running.into_iter().flatten() {
        meta.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_asks_a_follower_is_answered_whoever_is_gone() {
    let world = World::new().await;
    let configs = configs(&world);
    let mut running = start_all(&world, &configs).await;
    let c = client_of_all(&configs).await;
    let dir = c.mkdir(ROOT, "d").await.expect("made").inode;
    let ask = async |n: u32| {
        let name = format!("n{n}");
        let made = c.mkdir(dir, &name).await.expect("made").inode;
        let request = Request::Query { session: c.session, query: lookup(dir, &name) };
        match c.meta.ask(&request, PATIENCE).await.expect("an answer") {
            Response::Query(Ok(QueryReply::Attr(attr))) => assert_eq!(attr.inode, made),
            other => panic!("{other:?}"),
        }
        n + 1
    };
    let mut n = 0;
    // It learns where the others are as it goes.
    let end = Instant::now() + PATIENCE;
    while c.meta.followed() < 20 {
        assert!(Instant::now() < end, "{n} questions, {} of them followed", c.meta.followed());
        n = ask(n).await;
    }
    // One after the other goes, first one that follows, and comes back.
    for round in 0..4 {
        let leads = leader(&c).await;
        let gone = if round % 2 == 0 { (leads + 1 + round / 2) % 3 } else { leads };
        running[gone].take().expect("runs").stop().await;
        for _ in 0..20 {
            n = ask(n).await;
        }
        running[gone] = Some(world.start_with(configs[gone].clone()).await);
        let (before, end) = (c.meta.followed(), Instant::now() + PATIENCE);
        while c.meta.followed() < before + 20 {
            assert!(Instant::now() < end, "round {round}: nobody who follows answers any more");
            n = ask(n).await;
        }
    }
    // One that hears no leader says so soon, and not what it last knew.
    let leads = leader(&c).await;
    let left = (leads + 1) % 3;
    let alone = Near::connect(&configs[left], c.session).await;
    for (_, meta) in running.iter_mut().enumerate().filter(|(i, _)| *i != left) {
        meta.take().expect("runs").stop().await;
    }
    let begun = Instant::now();
    for _ in 0..3 {
        assert_eq!(alone.ask_once(&Query::GetAttr(dir)).await, Said::CannotSay);
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}
