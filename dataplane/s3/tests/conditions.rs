//! Every condition on every operation, against the real server over a real socket.

mod common;

use common::{ALWAYS, none, world};
use ebb_s3::{Condition, Conditions, ErrorKind, Etag, ListRequest, Part, S3Error};

fn wrong() -> Etag {
    Etag::new("deadbeefdeadbeefdeadbeefdeadbeef")
}

#[track_caller]
fn is<T: std::fmt::Debug>(result: Result<T, S3Error>, kind: ErrorKind) {
    let error = result.expect_err("has to be refused");
    assert_eq!(error.kind, kind, "{error}");
}

#[tokio::test]
async fn puts_honour_their_condition() {
    let w = world().await;
    let b = &w.bucket;
    is(b.put("k", b"x", &none(), &Condition::IfMatch(wrong())).await, ErrorKind::NotFound);
    let first = b.put("k", b"one", &none(), &Condition::IfAbsent).await.expect("absent");
    is(b.put("k", b"two", &none(), &Condition::IfAbsent).await, ErrorKind::PreconditionFailed);
    let stale = Condition::IfMatch(wrong());
    is(b.put("k", b"two", &none(), &stale).await, ErrorKind::PreconditionFailed);
    let same = Condition::IfMatch(first.clone());
    let second = b.put("k", b"two", &none(), &same).await.expect("matches");
    assert_ne!(first, second);
    is(b.put("k", b"three", &none(), &same).await, ErrorKind::PreconditionFailed);
    assert_eq!(&b.get_bytes("k", None, 0..99).await.expect("there")[..], b"two");
}

#[tokio::test]
async fn reads_honour_their_condition() {
    let w = world().await;
    let b = &w.bucket;
    let etag = b.put("k", b"hello", &none(), &ALWAYS).await.expect("put");
    is(b.get("k", Some(&wrong()), None).await, ErrorKind::PreconditionFailed);
    let body = b.get("k", Some(&etag), None).await.expect("matches").collect().await;
    assert_eq!(&body.expect("whole")[..], b"hello");
    is(b.get("absent", Some(&etag), None).await, ErrorKind::NotFound);
    is(b.head("absent").await, ErrorKind::NotFound);
}

#[tokio::test]
async fn deletes_honour_their_condition() {
    let w = world().await;
    let b = &w.bucket;
    b.delete("absent", None).await.expect("absent is deleted");
    b.delete("absent", Some(&wrong())).await.expect("absent is deleted under a condition too");
    let etag = b.put("k", b"hello", &none(), &ALWAYS).await.expect("put");
    is(b.delete("k", Some(&wrong())).await, ErrorKind::PreconditionFailed);
    b.head("k").await.expect("still there");
    b.delete("k", Some(&etag)).await.expect("matches");
    is(b.head("k").await, ErrorKind::NotFound);
}

#[tokio::test]
async fn completes_honour_their_condition_and_a_refusal_keeps_the_upload() {
    let w = world().await;
    let b = &w.bucket;
    let there = b.put("k", b"there", &none(), &ALWAYS).await.expect("put");
    let upload = b.create_multipart("k", &none()).await.expect("create");
    let parts = [b.upload_part("k", &upload, 1, b"part").await.expect("part")];
    let complete = |condition| {
        let (upload, parts) = (&upload, &parts);
        async move { b.complete_multipart("k", upload, parts, &condition).await }
    };
    is(complete(Condition::IfAbsent).await, ErrorKind::PreconditionFailed);
    is(complete(Condition::IfMatch(wrong())).await, ErrorKind::PreconditionFailed);
    assert_eq!(b.head("k").await.expect("head").etag, there);
    assert_eq!(b.list_multipart_uploads("").await.expect("list").len(), 1);
    let etag = complete(Condition::IfMatch(there)).await.expect("matches");
    assert!(etag.as_str().ends_with("-1"), "{etag}");
    assert_eq!(b.head("k").await.expect("head").etag, etag);
    is(complete(Condition::None).await, ErrorKind::NotFound);
    assert!(b.list_multipart_uploads("").await.expect("list").is_empty());

    let upload = b.create_multipart("new", &none()).await.expect("create");
    let part = b.upload_part("new", &upload, 1, b"part").await.expect("part");
    let missing = Condition::IfMatch(wrong());
    is(
        b.complete_multipart("new", &upload, std::slice::from_ref(&part), &missing).await,
        ErrorKind::NotFound,
    );
    b.complete_multipart("new", &upload, &[part], &Condition::IfAbsent).await.expect("absent");
}

#[tokio::test]
async fn copies_honour_the_conditions_of_both_sides() {
    let w = world().await;
    let b = &w.bucket;
    let source = b.put("s", b"source", &none(), &ALWAYS).await.expect("put");
    is(b.copy("s", Some(&wrong()), "d", None, &ALWAYS).await, ErrorKind::PreconditionFailed);
    is(b.head("d").await, ErrorKind::NotFound);
    is(b.copy("nothing", None, "d", None, &ALWAYS).await, ErrorKind::NotFound);
    let absent = Condition::IfAbsent;
    b.copy("s", Some(&source), "d", None, &absent).await.expect("absent");
    is(b.copy("s", Some(&source), "d", None, &absent).await, ErrorKind::PreconditionFailed);
    let other = b.put("d", b"other", &none(), &ALWAYS).await.expect("put");
    let stale = Condition::IfMatch(source.clone());
    is(b.copy("s", None, "d", None, &stale).await, ErrorKind::PreconditionFailed);
    b.copy("s", None, "d", None, &Condition::IfMatch(other)).await.expect("matches");
    assert_eq!(b.head("d").await.expect("head").etag, source);
}

#[tokio::test]
async fn part_copies_honour_the_sources_condition() {
    let w = world().await;
    let b = &w.bucket;
    let source = b.put("s", b"0123456789", &none(), &ALWAYS).await.expect("put");
    let upload = b.create_multipart("k", &none()).await.expect("create");
    is(
        b.upload_part_copy("k", &upload, 1, "s", Some(&wrong()), 0..5).await,
        ErrorKind::PreconditionFailed,
    );
    is(b.upload_part_copy("k", &upload, 1, "s", Some(&source), 5..11).await, ErrorKind::Invalid);
    let part: Part =
        b.upload_part_copy("k", &upload, 1, "s", Some(&source), 2..5).await.expect("copied");
    b.complete_multipart("k", &upload, &[part], &ALWAYS).await.expect("complete");
    assert_eq!(&b.get_bytes("k", None, 0..9).await.expect("there")[..], b"234");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_who_create_a_key_exactly_one_wins() {
    let w = world().await;
    for round in 0..10 {
        let key = format!("race-{round}");
        let tries = (0..16u8).map(|n| {
            let (b, key) = (w.bucket.clone(), key.clone());
            tokio::spawn(async move {
                b.put(&key, vec![n; 1000], &none(), &Condition::IfAbsent).await.map(|e| (n, e))
            })
        });
        let mut winners = Vec::new();
        for result in futures::future::join_all(tries).await {
            match result.expect("no panic") {
                Ok(winner) => winners.push(winner),
                Err(e) => assert_eq!(e.kind, ErrorKind::PreconditionFailed, "{e}"),
            }
        }
        assert_eq!(winners.len(), 1, "round {round}");
        let (n, etag) = &winners[0];
        let body = w.bucket.get_bytes(&key, Some(etag), 0..2000).await.expect("there");
        assert_eq!(body[..], vec![*n; 1000][..]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compare_and_swap_loses_no_increment() {
    let w = world().await;
    w.bucket.put("n", b"0", &none(), &ALWAYS).await.expect("put");
    let workers = (0..4).map(|_| {
        let b = w.bucket.clone();
        tokio::spawn(async move {
            let mut done = 0;
            while done < 10 {
                let body = b.get("n", None, None).await.expect("get");
                let etag = body.info().etag.clone();
                let text = body.collect().await.expect("body");
                let n: u32 = std::str::from_utf8(&text).expect("text").parse().expect("number");
                let next = (n + 1).to_string().into_bytes();
                match b.put("n", next, &none(), &Condition::IfMatch(etag)).await {
                    Ok(_) => done += 1,
                    Err(e) => assert_eq!(e.kind, ErrorKind::PreconditionFailed, "{e}"),
                }
            }
        })
    });
    for worker in futures::future::join_all(workers).await {
        worker.expect("no panic");
    }
    assert_eq!(&w.bucket.get_bytes("n", None, 0..9).await.expect("there")[..], b"40");
}

#[tokio::test]
async fn the_probe_finds_all_conditions_here_and_leaves_nothing_behind() {
    let w = world().await;
    let found = ebb_s3::probe::probe(&w.bucket).await.expect("probed");
    assert_eq!(found, Conditions::ALL, "missing: {:?}", found.missing());
    let page = w.bucket.list(&ListRequest::default()).await.expect("list");
    assert!(page.objects.is_empty(), "{page:?}");
    assert!(w.bucket.list_multipart_uploads("").await.expect("list").is_empty());
}
