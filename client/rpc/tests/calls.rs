//! Properties of connections and ports, over real sockets.

use bytes::Bytes;
use ebb_dataplane_protocol::auth::{ClusterKey, Role};
use ebb_dataplane_protocol::{ClusterId, Header, Opcode, Status};
use ebb_rpc::server::{Counters, Handler, Peer, serve};
use ebb_rpc::{Connection, Frame, Identity, RpcError};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

const SECOND: Duration = Duration::from_secs(10);

/// Echoes body and payload; a body of "hang" is never answered.
struct Echo;
impl Handler for Echo {
    async fn handle(&self, _peer: Peer, frame: Frame) -> Frame {
        if frame.body == "hang" {
            std::future::pending::<()>().await;
        }
        Frame::new(frame.header.reply(Status::Ok), frame.body, frame.payload)
    }
}

struct Port {
    address: String,
    counters: Arc<Counters>,
    stop: CancellationToken,
}

async fn port(key: [u8; 32], cluster: u128) -> Port {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("bound").to_string();
    let counters = Arc::new(Counters::default());
    let stop = CancellationToken::new();
    let (c, s) = (Arc::clone(&counters), stop.clone());
    tokio::spawn(async move {
        let key = ClusterKey::new(key);
        serve(listener, key, ClusterId(cluster), 1 << 20, Arc::new(Echo), c, s).await;
    });
    Port { address, counters, stop }
}

fn me(key: [u8; 32]) -> Identity {
    Identity::new(ClusterKey::new(key), Role::Client)
}

async fn echo(c: &Connection, body: &'static [u8], payload: Bytes) -> Result<Frame, RpcError> {
    let header = Header::request(Opcode::Ping, 0);
    c.call(header, Bytes::from_static(body), payload, SECOND).await
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_calls_get_their_own_answers() {
    let port = port([1; 32], 7).await;
    let c = Connection::connect(&port.address, &me([1; 32]), SECOND).await.expect("connects");
    assert_eq!(c.cluster(), ClusterId(7));
    let calls = (0..500u32).map(|i| {
        let c = c.clone();
        tokio::spawn(async move {
            let payload = Bytes::from(vec![i as u8; (i as usize * 997) % 300_000]);
            let reply = echo(&c, b"x", payload.clone()).await.expect("answered");
            assert_eq!(reply.payload, payload);
        })
    });
    for call in calls {
        call.await.expect("no panic");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_call_leaves_the_connection_whole() {
    let port = port([1; 32], 7).await;
    let c = Connection::connect(&port.address, &me([1; 32]), SECOND).await.expect("connects");
    for i in 0..50u64 {
        let big = Bytes::from(vec![i as u8; 4 << 20]);
        // Dropped somewhere in the middle of its 4 MiB.
        let _ = tokio::time::timeout(Duration::from_micros(50 * i), echo(&c, b"big", big)).await;
    }
    let reply = echo(&c, b"after", Bytes::new()).await.expect("still whole");
    assert_eq!(reply.body, "after");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_is_refused_on_both_sides_and_counted() {
    let port = port([1; 32], 7).await;
    let refused = Connection::connect(&port.address, &me([2; 32]), SECOND).await;
    assert!(matches!(refused, Err(RpcError::WrongKey { .. })), "{refused:?}");
    let mut other = me([1; 32]);
    other.cluster = ClusterId(8);
    let refused = Connection::connect(&port.address, &other, SECOND).await;
    assert!(matches!(refused, Err(RpcError::Handshake { .. })), "{refused:?}");
    // The server's task counts after it closed: wait for the count, bounded.
    for _ in 0..1000 {
        if port.counters.refused_handshakes.load(Ordering::Relaxed) == 2 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("refusals were not counted");
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_closes_only_its_own_connection() {
    let port = port([1; 32], 7).await;
    let good = Connection::connect(&port.address, &me([1; 32]), SECOND).await.expect("connects");
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], &[0; 64]] {
        let mut bad = TcpStream::connect(&port.address).await.expect("connects");
        bad.write_all(garbage).await.expect("sends");
        bad.shutdown().await.expect("half-closes");
        let mut rest = Vec::new();
        // A reset is as good as an orderly close.
        let _ = bad.read_to_end(&mut rest).await;
        assert!(rest.is_empty(), "nothing is said to a stranger");
    }
    assert_eq!(echo(&good, b"hi", Bytes::new()).await.expect("unharmed").body, "hi");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_in_flight_fail_when_the_server_goes() {
    let port = port([1; 32], 7).await;
    let c = Connection::connect(&port.address, &me([1; 32]), SECOND).await.expect("connects");
    let hanging = {
        let c = c.clone();
        tokio::spawn(async move { echo(&c, b"hang", Bytes::new()).await })
    };
    echo(&c, b"x", Bytes::new()).await.expect("answered");
    port.stop.cancel();
    let result = hanging.await.expect("no panic");
    assert!(matches!(result, Err(RpcError::Closed { .. })), "{result:?}");
    assert!(result.expect_err("closed").may_have_happened());
    assert!(c.is_closed());
}

/// The first of a crowd writes what the others put in line: whoever of them gives up, all others are answered.
#[tokio::test]
async fn of_a_crowd_whoever_gives_up_the_others_are_answered() {
    let port = port([1; 32], 7).await;
    let c = Connection::connect(&port.address, &me([1; 32]), SECOND).await.expect("connects");
    for round in 0..200u32 {
        let calls: Vec<_> = (0..40u32)
            .map(|i| {
                let c = c.clone();
                tokio::spawn(async move {
                    let payload =
                        Bytes::from((round * 1000 + i).to_le_bytes().repeat(1 + i as usize * 99));
                    let reply = echo(&c, b"crowd", payload.clone()).await.expect("answered");
                    assert_eq!(reply.payload, payload);
                })
            })
            .collect();
        // As far as the line, and no further: everybody has been polled once.
        tokio::task::yield_now().await;
        let gives_up = |i: usize| (i as u32 + round).is_multiple_of(3);
        calls.iter().enumerate().filter(|(i, _)| gives_up(*i)).for_each(|(_, call)| call.abort());
        for (_, call) in calls.into_iter().enumerate().filter(|(i, _)| !gives_up(*i)) {
            tokio::time::timeout(SECOND, call).await.expect("in time").expect("no panic");
        }
    }
}
