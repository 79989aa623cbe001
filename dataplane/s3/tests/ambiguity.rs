//! Lost replies, server errors, cut bodies: what the client says of them, and how a look resolves
//! them (I3). Faults are the server's own switches.

mod common;

use std::time::{Duration, Instant};

use common::{ALWAYS, World, client_with, none, world};
use ebb_s3::{
    Bucket, Condition, EbbTag, ErrorKind, Metadata, Operation, S3Error,
    fault::{Fault, FaultKind},
};

fn tag(nonce: u128) -> (EbbTag, Metadata) {
    let tag = EbbTag { cluster: 1, inode: 2, generation: 3, nonce };
    let mut metadata = Metadata::new();
    tag.write_to(&mut metadata);
    (tag, metadata)
}

#[track_caller]
fn is<T: std::fmt::Debug>(result: Result<T, S3Error>, kind: ErrorKind) {
    let error = result.expect_err("has to fail");
    assert_eq!(error.kind, kind, "{error}");
}

fn strike(w: &World, op: Operation, kind: FaultKind) {
    assert!(w.server.faults().add(Fault::next(op, 1, kind)));
}

async fn nonce_there(b: &Bucket, key: &str) -> Option<u128> {
    match b.head(key).await {
        Ok(info) => EbbTag::from_metadata(&info.metadata).map(|t| t.nonce),
        Err(e) if e.is_not_found() => None,
        Err(e) => panic!("{e}"),
    }
}

#[tokio::test]
async fn lost_reply_of_put_is_ambiguous_and_the_nonce_resolves_it() {
    let w = world().await;
    for (nonce, fault, happened) in [
        (1, FaultKind::LostReply, true),
        (2, FaultKind::InternalErrorAfter, true),
        (3, FaultKind::LostRequest, false),
        (4, FaultKind::InternalError, false),
    ] {
        let key = format!("k{nonce}");
        let (_, metadata) = tag(nonce);
        strike(&w, Operation::Put, fault);
        is(w.bucket.put(&key, b"data", &metadata, &ALWAYS).await, ErrorKind::Ambiguous);
        let there = nonce_there(&w.bucket, &key).await;
        assert_eq!(there, happened.then_some(nonce), "{key}");
    }
    assert_eq!(w.server.faults().struck(), 4, "a mutation is sent once, never retried");
}

#[tokio::test]
async fn lost_reply_on_a_used_connection_is_not_retried_either() {
    let w = world().await;
    for n in 0..3 {
        w.bucket.put("warm", vec![n], &none(), &ALWAYS).await.expect("put");
    }
    strike(&w, Operation::Put, FaultKind::LostRequest);
    is(w.bucket.put("k", b"x", &none(), &ALWAYS).await, ErrorKind::Ambiguous);
    is(w.bucket.head("k").await, ErrorKind::NotFound);
}

#[tokio::test]
async fn lost_reply_of_complete_is_ambiguous_and_the_nonce_resolves_it() {
    let w = world().await;
    let (b, (_, metadata)) = (&w.bucket, tag(7));
    let upload = b.create_multipart("k", &metadata).await.expect("create");
    let parts = [b.upload_part("k", &upload, 1, b"part").await.expect("part")];
    strike(&w, Operation::CompleteMultipart, FaultKind::LostReply);
    let reply = b.complete_multipart("k", &upload, &parts, &Condition::IfAbsent).await;
    is(reply, ErrorKind::Ambiguous);
    assert_eq!(nonce_there(b, "k").await, Some(7));
    // Sent again it is refused: the upload is gone, and nothing is overwritten.
    let again = b.complete_multipart("k", &upload, &parts, &Condition::IfAbsent).await;
    is(again, ErrorKind::NotFound);

    let upload = b.create_multipart("never", &metadata).await.expect("create");
    let parts = [b.upload_part("never", &upload, 1, b"part").await.expect("part")];
    strike(&w, Operation::CompleteMultipart, FaultKind::LostRequest);
    is(b.complete_multipart("never", &upload, &parts, &ALWAYS).await, ErrorKind::Ambiguous);
    assert_eq!(nonce_there(b, "never").await, None);
    // An abort is the fence: after it the lost Complete can never land.
    b.abort_multipart("never", &upload).await.expect("aborted");
    is(b.complete_multipart("never", &upload, &parts, &ALWAYS).await, ErrorKind::NotFound);
}

#[tokio::test]
async fn lost_reply_of_delete_is_ambiguous_and_a_look_resolves_it() {
    let w = world().await;
    for (key, fault, gone) in [
        ("a", FaultKind::LostReply, true),
        ("b", FaultKind::LostRequest, false),
        ("c", FaultKind::InternalErrorAfter, true),
    ] {
        let (_, metadata) = tag(9);
        let etag = w.bucket.put(key, b"data", &metadata, &ALWAYS).await.expect("put");
        strike(&w, Operation::Delete, fault);
        is(w.bucket.delete(key, Some(&etag)).await, ErrorKind::Ambiguous);
        assert_eq!(nonce_there(&w.bucket, key).await, (!gone).then_some(9), "{key}");
        w.bucket.delete(key, Some(&etag)).await.expect("deleting again is fine");
    }
}

#[tokio::test]
async fn a_late_reply_to_a_mutation_is_ambiguous() {
    let w = world().await;
    let hasty = client_with(&w.server, |c| c.timeouts.request_ms = 300).await;
    let (_, metadata) = tag(5);
    strike(&w, Operation::Put, FaultKind::DelayReply { ms: 3_000 });
    is(hasty.put("k", b"data", &metadata, &ALWAYS).await, ErrorKind::Ambiguous);
    assert_eq!(nonce_there(&w.bucket, "k").await, Some(5));
    let slow = Fault::next(Operation::Head, 1, FaultKind::DelayReply { ms: 3_000 });
    assert!(w.server.faults().add(slow));
    hasty.head("k").await.expect("a late reply to a read is asked for again");
}

#[tokio::test]
async fn slow_down_is_throttled_and_certain() {
    let w = world().await;
    strike(&w, Operation::Put, FaultKind::SlowDown);
    is(w.bucket.put("k", vec![1; 3 << 20], &none(), &ALWAYS).await, ErrorKind::Throttled);
    is(w.bucket.head("k").await, ErrorKind::NotFound);
}

#[tokio::test]
async fn reads_are_tried_again_and_not_for_ever() {
    let w = world().await;
    w.bucket.put("k", b"data", &none(), &ALWAYS).await.expect("put");
    for fault in [
        FaultKind::InternalError,
        FaultKind::SlowDown,
        FaultKind::LostReply,
        FaultKind::LostRequest,
    ] {
        for op in [Operation::Head, Operation::Get, Operation::List] {
            assert!(w.server.faults().add(Fault::next(op, 2, fault.clone())));
        }
        w.bucket.head("k").await.expect("third try");
        w.bucket.get_bytes("k", None, 0..4).await.expect("third try");
        w.bucket.list(&Default::default()).await.expect("third try");
        assert!(w.server.faults().pending().is_empty());
    }
    assert!(w.server.faults().add(Fault::every(Operation::Head, FaultKind::InternalError)));
    let before = w.server.faults().struck();
    is(w.bucket.head("k").await, ErrorKind::Server);
    assert_eq!(w.server.faults().struck() - before, 4, "read_attempts");
}

#[tokio::test]
async fn a_truncated_body_is_an_integrity_error_never_short_data() {
    let w = world().await;
    let data = common::Random::new(3).bytes(2_000_000);
    w.bucket.put("k", data.clone(), &none(), &ALWAYS).await.expect("put");
    let once = client_with(&w.server, |c| c.read_attempts = 1).await;
    for bytes in [0, 1, 1000, 1_999_999] {
        let cut = Fault::next(Operation::Get, 1, FaultKind::Truncate { bytes });
        assert!(w.server.faults().add(cut));
        let body = once.get("k", None, None).await.expect("the head of the reply comes");
        is(body.collect().await.map(|b| b.len()), ErrorKind::Integrity);
    }
    // Into memory it is read again, as often as reads are.
    let cut = Fault::next(Operation::Get, 3, FaultKind::Truncate { bytes: 700_000 });
    assert!(w.server.faults().add(cut));
    let whole = w.bucket.get_bytes("k", None, 0..2_000_000).await.expect("fourth try");
    assert!(whole[..] == data[..]);
    let cut = Fault::every(Operation::Get, FaultKind::Truncate { bytes: 1_000_000 });
    assert!(w.server.faults().add(cut));
    let body = w.bucket.get_bytes("k", None, 0..2_000_000).await;
    is(body.map(|b| b.len()), ErrorKind::Integrity);
}

#[tokio::test]
async fn nobody_listening_is_certain_for_mutations_too() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("bound");
    drop(free);
    let config = ebb_s3::BucketConfig::new("tide")
        .with_endpoint(format!("http://{address}"))
        .with_credentials("a", "b");
    let bucket = Bucket::connect(config).await;
    let begun = Instant::now();
    is(bucket.put("k", b"x", &none(), &ALWAYS).await, ErrorKind::Connect);
    is(bucket.head("k").await, ErrorKind::Connect);
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn wrong_keys_and_wrong_buckets_have_their_own_words() {
    let w = world().await;
    let stranger = client_with(&w.server, |c| *c = c.clone().with_credentials("no", "no")).await;
    is(stranger.check().await, ErrorKind::Denied);
    is(stranger.put("k", b"x", &none(), &ALWAYS).await, ErrorKind::Denied);
    let forger = client_with(&w.server, |c| *c = c.clone().with_credentials("ebbkey", "no")).await;
    is(forger.put("k", b"x", &none(), &ALWAYS).await, ErrorKind::Denied);
    is(forger.list(&Default::default()).await, ErrorKind::Denied);
    let lost = client_with(&w.server, |c| c.bucket = "nowhere".into()).await;
    is(lost.check().await, ErrorKind::NoSuchBucket);
    is(lost.put("k", b"x", &none(), &ALWAYS).await, ErrorKind::NoSuchBucket);
    is(lost.list(&Default::default()).await, ErrorKind::NoSuchBucket);
    lost.create_if_missing().await.expect("created");
    lost.create_if_missing().await.expect("there already");
    lost.put("k", b"x", &none(), &ALWAYS).await.expect("now there");
}

#[tokio::test]
async fn faults_are_flipped_from_another_process_over_the_admin_port() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let dir = tempfile::tempdir().expect("a directory");
    let mut config = common::config(dir.path());
    config.admin = Some(([127, 0, 0, 1], 0).into());
    let server = ebb_s3::server::EmbeddedServer::start(config.clone()).await.expect("starts");
    let admin = server.admin_addr().expect("an admin port");
    let ask = |method: &'static str, body: &'static str| async move {
        let mut stream = tokio::net::TcpStream::connect(admin).await.expect("connected");
        let text = format!(
            "{method} /_ebb/faults HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(text.as_bytes()).await.expect("sent");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.expect("a reply");
        reply
    };
    let bucket = common::client(&server).await;
    let reply = ask("PUT", r#"[{"kind":"lost_reply","op":"put","count":1}]"#).await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    is(bucket.put("k", b"x", &none(), &ALWAYS).await, ErrorKind::Ambiguous);
    bucket.put("k", b"x", &none(), &ALWAYS).await.expect("used up");
    assert!(ask("GET", "").await.contains("\"struck\":1"));
    assert!(ask("POST", "{nonsense").await.starts_with("HTTP/1.1 400"));
    server.shutdown().await;

    config.admin = Some(([0, 0, 0, 0], 0).into());
    let refused = ebb_s3::server::EmbeddedServer::start(config).await;
    assert!(refused.is_err(), "an admin port is on loopback or not at all");
}
