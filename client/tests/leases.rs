//! Clients that remember what they were told (docs/PROTOCOL.md, R52 to R55): they ask nobody, are never wrong, and
//! hold up nobody for long.

mod common;

use common::{TestCluster, until};
use ebb_client::{ClientError, FileSystem, InodeId, OpenFlags, Owner, SetAttr};
use ebb_dataplane_protocol::SessionId;
use ebb_metaplane_protocol::lease::{LEASE, Watch, Watched};
use ebb_metaplane_protocol::{
    FsError, Query, QueryReply, Request, Response, SessionCall, SessionReply,
};
use ebb_rpc::MetaClient;
use std::time::{Duration, Instant};

const OWNER: Owner = Owner { uid: 5, gid: 6 };
const NEW: OpenFlags = OpenFlags { write: true, truncate: false, exclusive: true };
const PATIENCE: Duration = Duration::from_secs(20);

async fn file(fs: &FileSystem, dir: InodeId, name: &str) -> InodeId {
    let file = fs.create(dir, name.as_bytes(), 0o640, OWNER, NEW).await.expect("a create");
    fs.release(file.handle).await.expect("a close");
    file.attr.inode
}

fn mode(mode: u32) -> SetAttr {
    SetAttr { mode: Some(mode), ..SetAttr::default() }
}

fn is_absent<T>(found: Result<T, ClientError>) -> bool {
    matches!(found, Err(ClientError::Fs(FsError::NotFound)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_is_remembered_asks_nobody() {
    let cluster = TestCluster::start(0).await;
    let other = cluster.fs("other").await;
    let dir = other.mkdir(InodeId::ROOT, b"d", 0o755, OWNER).await.expect("a mkdir").inode;
    let inode = file(&other, dir, "f").await;
    let fs = cluster.leased_fs("remembers").await;
    let look = async || {
        assert_eq!(fs.lookup(dir, b"f").await.expect("there").inode, inode);
        assert_eq!(fs.getattr(inode).await.expect("there").mode, 0o640);
        assert_eq!(fs.resolve(b"/d/f").await.expect("there").inode, inode);
    };
    look().await;
    let before = fs.cluster().lease_counts();
    // Longer than a lease: it is kept up.
    let begun = Instant::now();
    let mut looks = 0;
    while begun.elapsed() < LEASE * 2 {
        look().await;
        looks += 1;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let after = fs.cluster().lease_counts();
    assert!(looks > 100, "{looks} looks");
    assert_eq!(after.misses, before.misses, "{looks} looks asked: {before:?}, {after:?}");
    assert_eq!(after.hits - before.hits, looks * 4);
    // What was listed is remembered, too.
    for n in 0..30 {
        file(&other, dir, &format!("l{n}")).await;
    }
    let listed = fs.list(dir).await.expect("a listing");
    assert_eq!(listed.len(), 31);
    let before = fs.cluster().lease_counts();
    for e in &listed {
        assert_eq!(fs.lookup(dir, &e.name).await.expect("there"), e.attr);
    }
    assert_eq!(fs.cluster().lease_counts().misses, before.misses, "{} looks", listed.len());
    // A name that is not there is remembered for a while, since the bucket may bring it.
    assert!(is_absent(fs.lookup(dir, b"g").await));
    let before = fs.cluster().lease_counts();
    assert!(is_absent(fs.lookup(dir, b"g").await));
    assert_eq!(fs.cluster().lease_counts().hits, before.hits + 1);
    cluster.stop().await;
}

/// Whatever another client is told that it has done, who remembers sees.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_change_is_seen_at_once() {
    let cluster = TestCluster::start(0).await;
    let other = cluster.fs("other").await;
    let (fs, third) = (cluster.leased_fs("one").await, cluster.leased_fs("two").await);
    let dir = other.mkdir(InodeId::ROOT, b"d", 0o755, OWNER).await.expect("a mkdir").inode;
    let inode = file(&other, dir, "f").await;
    for round in 0..100u32 {
        let wanted = 0o400 + round;
        other.setattr(inode, mode(wanted)).await.expect("a chmod");
        for (who, fs) in [("one", &fs), ("two", &third)] {
            assert_eq!(fs.getattr(inode).await.expect("there").mode, wanted, "{who}, {round}");
            assert_eq!(fs.lookup(dir, b"f").await.expect("there").mode, wanted, "{who}, {round}");
            assert_eq!(fs.getattr(inode).await.expect("there").mode, wanted, "{who}, {round}");
        }
        // Who remembers changes things, too.
        let wanted = 0o200 + round;
        third.setattr(inode, mode(wanted)).await.expect("a chmod");
        assert_eq!(third.getattr(inode).await.expect("there").mode, wanted, "{round}");
        assert_eq!(fs.getattr(inode).await.expect("there").mode, wanted, "{round}");
        // Names come and go.
        let (a, b) = (format!("a{round}"), format!("b{round}"));
        assert!(is_absent(fs.lookup(dir, a.as_bytes()).await));
        assert!(is_absent(third.lookup(dir, b.as_bytes()).await));
        let made = file(&other, dir, &a).await;
        assert_eq!(fs.lookup(dir, a.as_bytes()).await.expect("made").inode, made, "{round}");
        other.rename(dir, a.as_bytes(), dir, b.as_bytes(), 0).await.expect("a rename");
        assert!(is_absent(fs.lookup(dir, a.as_bytes()).await), "{round}");
        assert_eq!(third.lookup(dir, b.as_bytes()).await.expect("there").inode, made, "{round}");
        other.unlink(dir, b.as_bytes()).await.expect("an unlink");
        assert!(is_absent(third.lookup(dir, b.as_bytes()).await), "{round}");
        // Its last handle may not have been told.
        assert!(
            fs.getattr(made).await.is_ok_and(|a| a.nlink == 0) || fs.getattr(made).await.is_err()
        );
    }
    let counts = fs.cluster().lease_counts();
    assert!(counts.hits >= 100 && counts.recalls >= 100, "{counts:?}");
    cluster.stop().await;
}

/// A client by hand, that does with its leases what it likes.
struct Odd {
    meta: MetaClient,
    session: SessionId,
}

impl Odd {
    async fn new(cluster: &TestCluster) -> Self {
        let meta = cluster.meta_client();
        let open = SessionCall::Open { client: 9, label: "odd".into() };
        match meta.call(&Request::Session(open), PATIENCE).await.expect("an answer") {
            Response::Session(Ok(SessionReply::Opened { session, .. })) => Self { meta, session },
            other => panic!("{other:?}"),
        }
    }

    async fn watch(&self, watch: Watch) -> Watched {
        let call = Request::Session(SessionCall::Watch(self.session, watch));
        match self.meta.call(&call, PATIENCE).await.expect("an answer") {
            Response::Session(Ok(SessionReply::Watched(answer))) => answer,
            other => panic!("{other:?}"),
        }
    }

    async fn look(&self, inode: InodeId) -> QueryReply {
        let query = Request::Query { session: self.session, query: Query::GetAttr(inode) };
        match self.meta.call(&query, PATIENCE).await.expect("an answer") {
            Response::Query(Ok(reply)) => reply,
            other => panic!("{other:?}"),
        }
    }
}

/// Who does not forget what it is told to holds up those who look at it until its lease has ended, and nobody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_does_not_forget_holds_up_others_once() {
    let cluster = TestCluster::start(0).await;
    let (fs, third) = (cluster.fs("changes").await, cluster.fs("looks").await);
    let dir = fs.mkdir(InodeId::ROOT, b"d", 0o755, OWNER).await.expect("a mkdir").inode;
    let (inode, free) = (file(&fs, dir, "f").await, file(&fs, dir, "g").await);
    fs.lookup(InodeId::ROOT, b"d").await.expect("there");
    let odd = Odd::new(&cluster).await;
    let answer = odd.watch(Watch { epoch: 0, call: 1, forgotten: 0, ..Watch::default() }).await;
    assert_eq!((answer.lease_ms, answer.recalled.len()), (LEASE.as_millis() as u32, 0));
    let told = odd.look(inode).await;
    assert!(matches!(told, QueryReply::Leased(Some(_), l) if l.epoch == answer.epoch), "{told:?}");
    // Its lease begins anew, and is all that it gets.
    odd.watch(Watch { epoch: answer.epoch, call: 2, forgotten: 0, ..Watch::default() }).await;
    let begun = Instant::now();
    let changing = tokio::spawn({
        let fs = fs.clone();
        async move {
            fs.setattr(inode, mode(0o600)).await.expect("a chmod");
            begun.elapsed()
        }
    });
    // It watches, and does not forget: it is told again, and gets no more time.
    let mut call = 2;
    let stubborn = until("the recall", || {
        call += 1;
        let watch =
            odd.watch(Watch { epoch: answer.epoch, call, forgotten: 0, ..Watch::default() });
        async {
            let answer = watch.await;
            (answer.recalled == [inode]).then_some(answer)
        }
    })
    .await;
    let again = Watch { epoch: answer.epoch, call: call + 1, forgotten: 0, ..Watch::default() };
    let again = odd.watch(again).await;
    assert_eq!((again.lease_ms, &again.recalled), (0, &stubborn.recalled));
    assert!(!changing.is_finished(), "answered before it was forgotten");
    // Who looks at something else is answered; who looks at this sees the change when it is over.
    third.getattr(free).await.expect("there");
    assert!(begun.elapsed() < LEASE / 2, "held up by something else: {:?}", begun.elapsed());
    assert_eq!(third.getattr(inode).await.expect("there").mode, 0o600);
    let waited = begun.elapsed();
    let took = changing.await.expect("no panic");
    println!("a chmod waited {took:?}, a look {waited:?}");
    for took in [took, waited] {
        assert!(took > LEASE / 2 && took < LEASE * 3, "{took:?}");
    }
    let begun = Instant::now();
    fs.setattr(inode, mode(0o640)).await.expect("a chmod");
    assert!(begun.elapsed() < LEASE / 2, "held up twice: {:?}", begun.elapsed());
    let late = odd
        .watch(Watch { epoch: answer.epoch, call: call + 2, forgotten: 0, ..Watch::default() })
        .await;
    assert_ne!(late.epoch, answer.epoch, "it remembers nothing that counts");
    cluster.stop().await;
}

/// The same of one that forgets: as soon as it says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_forgets_holds_up_nobody() {
    let cluster = TestCluster::start(0).await;
    let fs = cluster.fs("changes").await;
    let dir = fs.mkdir(InodeId::ROOT, b"d", 0o755, OWNER).await.expect("a mkdir").inode;
    let inode = file(&fs, dir, "f").await;
    fs.lookup(InodeId::ROOT, b"d").await.expect("there");
    let odd = Odd::new(&cluster).await;
    let mut watch = Watch { epoch: 0, call: 1, forgotten: 0, ..Watch::default() };
    let mut slowest = Duration::ZERO;
    for round in 0..20u32 {
        let answer = odd.watch(watch.clone()).await;
        let (epoch, call, forgotten) = (answer.epoch, watch.call + 1, answer.through);
        watch = Watch { epoch, call, forgotten, ..Watch::default() };
        odd.look(inode).await;
        let begun = Instant::now();
        let changing = async {
            fs.setattr(inode, mode(0o600 + round)).await.expect("a chmod");
            begun.elapsed()
        };
        let forgetting = async {
            let answer = odd.watch(watch.clone()).await;
            assert_eq!(answer.recalled, [inode], "{round}");
            watch.call += 1;
            watch.forgotten = answer.through;
            odd.watch(watch.clone()).await;
            watch.call += 1;
        };
        let (took, ()) = tokio::join!(changing, forgetting);
        slowest = slowest.max(took);
    }
    println!("the slowest of 20 changes took {slowest:?}");
    assert!(slowest < LEASE / 2, "{slowest:?}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_session_that_is_none_gets_no_lease() {
    let cluster = TestCluster::start(0).await;
    let odd = Odd { session: SessionId(77), ..Odd::new(&cluster).await };
    let call = SessionCall::Watch(
        odd.session,
        Watch { epoch: 0, call: 1, forgotten: 0, ..Watch::default() },
    );
    let answer = odd.meta.call(&Request::Session(call), PATIENCE).await.expect("an answer");
    assert!(matches!(answer, Response::Session(Err(FsError::SessionExpired))), "{answer:?}");
    assert!(matches!(odd.look(InodeId::ROOT).await, QueryReply::Attr(_)));
    cluster.stop().await;
}
