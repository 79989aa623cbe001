//! How a client of the metadata plane keeps in sight who votes, over real sockets.

use bytes::Bytes;
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::header::FLAG_ANY_VOTER;
use ebb_dataplane_protocol::{ClusterId, InodeId, Opcode, SessionId, Status, codec};
use ebb_metaplane_protocol::{FsError, Query, Request, Response, SessionCall, SessionReply};
use ebb_rpc::server::{Counters, Handler, Peer, serve};
use ebb_rpc::{Frame, Identity, MetaClient};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const KEY: [u8; 32] = [3; 32];
const PATIENCE: Duration = Duration::from_secs(20);

/// Who votes, as of which change.
type Voters = Arc<Mutex<(u64, Vec<String>)>>;
type Mortal = Arc<Mutex<Option<Opcode>>>;

/// A server that leads, and counts how often it was asked where voters are.
struct Server {
    voters: Voters,
    asked: watch::Sender<u64>,
    /// Dies when it is asked so: of a question without, of a call with an answer.
    mortal: Mortal,
    behind: Arc<AtomicBool>,
    stop: CancellationToken,
}

impl Handler for Server {
    async fn handle(&self, _peer: Peer, frame: Frame) -> Frame {
        let (membership, addresses) = self.voters.lock().expect("whole").clone();
        let dies = *self.mortal.lock().expect("whole") == Some(frame.header.opcode);
        if dies {
            self.stop.cancel();
        }
        let body = match frame.header.opcode {
            Opcode::Ping if dies => return std::future::pending().await,
            Opcode::Ping => {
                self.asked.send_modify(|n| *n += 1);
                Bytes::from(addresses.join(","))
            }
            _ if frame.header.has(FLAG_ANY_VOTER) => {
                if self.behind.load(Ordering::SeqCst) {
                    return Frame::refusal(&frame.header, Status::Busy, "behind");
                }
                let mut header = frame.header.reply(Status::Ok).with_membership(membership);
                header.flags |= FLAG_ANY_VOTER;
                let body = codec::encode(&Response::Query(Err(FsError::NotFound)));
                return Frame::new(header, body.into(), Bytes::new());
            }
            _ => codec::encode(&Response::Session(Ok(SessionReply::Done))).into(),
        };
        let header = frame.header.reply(Status::Ok).with_membership(membership);
        Frame::new(header, body, Bytes::new())
    }
}

struct Running {
    address: String,
    asked: watch::Receiver<u64>,
    mortal: Mortal,
    behind: Arc<AtomicBool>,
    stop: CancellationToken,
}

async fn server(voters: &Voters) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    let (tx, asked) = watch::channel(0);
    let (stop, mortal) = (CancellationToken::new(), Mortal::default());
    let behind = Arc::<AtomicBool>::default();
    let handler = Server {
        voters: Arc::clone(voters),
        asked: tx,
        mortal: Arc::clone(&mortal),
        behind: Arc::clone(&behind),
        stop: stop.clone(),
    };
    let (handler, s, key) = (Arc::new(handler), stop.clone(), ClusterKey::new(KEY));
    let counters = Arc::new(Counters::default());
    tokio::spawn(serve(listener, key, ClusterId(7), 1 << 20, handler, counters, s));
    Running { address, asked, mortal, behind, stop }
}

async fn call(client: &MetaClient) {
    let request = Request::Session(SessionCall::Renew(SessionId(1)));
    client.call(&request, PATIENCE).await.expect("somebody leads");
}

/// Waits until a client that nobody calls has heard of this address.
async fn knows(client: &MetaClient, address: &String) {
    let heard = async {
        while !client.known_addresses().contains(address) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    // Less than an idle client takes to look again of itself.
    tokio::time::timeout(Duration::from_secs(4), heard).await.expect("asks at once");
}

/// As fast as it may go: an answer of after a change makes the client ask at once, so that it finds a group
/// in which nobody is left of those that it was told of.
#[tokio::test(flavor = "multi_thread")]
async fn voters_that_are_replaced_in_no_time_are_followed() {
    let voters: Voters = Arc::default();
    let set = |v| *voters.lock().expect("whole") = v;
    let mut old = server(&voters).await;
    set((0, vec![old.address.clone()]));
    let identity = Identity::new(ClusterKey::new(KEY), Role::Client);
    let client = MetaClient::new(vec![old.address.clone()], identity);
    call(&client).await;
    for change in 1..20u64 {
        let new = server(&voters).await;
        set((change, vec![old.address.clone(), new.address.clone()]));
        call(&client).await;
        knows(&client, &new.address).await;
        old.stop.cancel();
        call(&client).await;
        old = new;
    }
}

/// News that their bearer took along are asked of another one, at once: the next call may find nobody left.
#[tokio::test(flavor = "multi_thread")]
async fn news_are_learned_though_who_told_of_them_is_gone() {
    for dies_of in [Opcode::Ping, Opcode::Meta].into_iter().cycle().take(12) {
        let voters: Voters = Arc::default();
        let (a, b) = (server(&voters).await, server(&voters).await);
        let of = |all: &[&Running]| all.iter().map(|s| s.address.clone()).collect::<Vec<_>>();
        *voters.lock().expect("whole") = (1, of(&[&a, &b]));
        let identity = Identity::new(ClusterKey::new(KEY), Role::Client);
        let client = MetaClient::new(of(&[&a]), identity);
        call(&client).await;
        knows(&client, &b.address).await;
        *a.mortal.lock().expect("whole") = Some(dies_of);
        let c = server(&voters).await;
        *voters.lock().expect("whole") = (2, of(&[&a, &b, &c]));
        call(&client).await;
        a.stop.cancelled().await;
        knows(&client, &c.address).await;
        b.stop.cancel();
        call(&client).await;
    }
}

/// What a voter says that was cut off is no news to whom others told more.
#[tokio::test(flavor = "multi_thread")]
async fn old_news_of_voters_are_not_believed() {
    let (newer, older): (Voters, Voters) = Default::default();
    let (a, b) = (server(&newer).await, server(&older).await);
    *newer.lock().expect("whole") = (9, vec![a.address.clone(), b.address.clone()]);
    *older.lock().expect("whole") = (4, vec![b.address.clone()]);
    let identity = Identity::new(ClusterKey::new(KEY), Role::Client);
    let client = MetaClient::new(vec![a.address.clone()], identity);
    call(&client).await;
    let both = [a.address.clone(), b.address.clone()];
    while client.known_addresses() != both {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    a.stop.cancel();
    // With the older one now, which is asked at once, and again and again.
    let mut asked = b.asked.clone();
    for _ in 0..3 {
        call(&client).await;
    }
    asked.wait_for(|n| *n >= 1).await.expect("asked");
    call(&client).await;
    assert_eq!(client.known_addresses(), both);
}

/// Of the voters that follow another one is asked, when the one that was cannot say.
#[tokio::test(flavor = "multi_thread")]
async fn who_follows_and_is_behind_is_left_for_another() {
    let voters: Voters = Arc::default();
    let all = [server(&voters).await, server(&voters).await, server(&voters).await];
    *voters.lock().expect("whole") = (1, all.iter().map(|s| s.address.clone()).collect());
    let identity = Identity::new(ClusterKey::new(KEY), Role::Client);
    let client = MetaClient::new(vec![all[0].address.clone()], identity);
    call(&client).await;
    knows(&client, &all[2].address).await;
    let query = Query::GetAttr(InodeId::ROOT);
    let question = Request::Query { session: SessionId(1), query };
    let follows = async || {
        let before = client.followed();
        while client.followed() == before {
            // Somebody answers, always.
            client.ask(&question, PATIENCE).await.expect("an answer");
        }
    };
    for round in 0..4 {
        for (i, server) in all.iter().enumerate() {
            server.behind.store(i == 1 + round % 2, Ordering::SeqCst);
        }
        tokio::time::timeout(PATIENCE, follows()).await.expect("another one is asked");
    }
}
