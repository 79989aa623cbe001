//! How a client of the metadata plane keeps in sight who votes, over real sockets.

use bytes::Bytes;
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::{ClusterId, Opcode, SessionId, Status, codec};
use ebb_metaplane_protocol::{Request, Response, SessionCall, SessionReply};
use ebb_rpc::server::{Counters, Handler, Peer, serve};
use ebb_rpc::{Frame, Identity, MetaClient};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const KEY: [u8; 32] = [3; 32];
const PATIENCE: Duration = Duration::from_secs(20);

/// Who votes, as of which change.
type Voters = Arc<Mutex<(u64, Vec<String>)>>;

/// A server that leads, and counts how often it was asked where voters are.
struct Server {
    voters: Voters,
    asked: watch::Sender<u64>,
}

impl Handler for Server {
    async fn handle(&self, _peer: Peer, frame: Frame) -> Frame {
        let (membership, addresses) = self.voters.lock().expect("whole").clone();
        let body = match frame.header.opcode {
            Opcode::Ping => {
                self.asked.send_modify(|n| *n += 1);
                Bytes::from(addresses.join(","))
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
    stop: CancellationToken,
}

async fn server(voters: &Voters) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    let (tx, asked) = watch::channel(0);
    let stop = CancellationToken::new();
    let handler = Arc::new(Server { voters: Arc::clone(voters), asked: tx });
    let (s, key) = (stop.clone(), ClusterKey::new(KEY));
    let counters = Arc::new(Counters::default());
    tokio::spawn(serve(listener, key, ClusterId(7), 1 << 20, handler, counters, s));
    Running { address, asked, stop }
}

async fn call(client: &MetaClient) {
    let request = Request::Session(SessionCall::Renew(SessionId(1)));
    client.call(&request, PATIENCE).await.expect("somebody leads");
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
        let knows = async {
            while !client.known_addresses().contains(&new.address) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        // Less than an idle client takes to look again of itself.
        tokio::time::timeout(Duration::from_secs(4), knows).await.expect("asks at once");
        old.stop.cancel();
        call(&client).await;
        old = new;
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
