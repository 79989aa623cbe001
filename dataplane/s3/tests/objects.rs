//! Objects, listings, multipart uploads: what S3 promises, through the client and the server.

mod common;

use std::{collections::BTreeMap, time::Instant};

use bytes::Bytes;
use common::{ALWAYS, Random, client_with, none, world};
use ebb_s3::{ErrorKind, ListRequest, Metadata, Part, S3Error};

#[track_caller]
fn is<T: std::fmt::Debug>(result: Result<T, S3Error>, kind: ErrorKind) {
    let error = result.expect_err("has to be refused");
    assert_eq!(error.kind, kind, "{error}");
}

#[tokio::test]
async fn a_file_and_a_folder_of_one_name_coexist_and_odd_keys_are_plain_keys() {
    let w = world().await;
    let long = "x".repeat(1024);
    let mut keys = vec![
        "a",
        "a/",
        "a/b",
        "a//b",
        "/a",
        "..",
        "../x",
        "a/./b",
        "x y+z",
        "100%",
        "%41",
        "ä/é",
        "\u{10FFFF}",
        "q?a=b&c#d",
        "<&>\"'",
        "tab\there",
        "ctl\u{1}",
        "*",
        &long,
    ];
    for key in &keys {
        let body = Bytes::from(format!("body of {key}"));
        let put = w.bucket.put(key, body, &none(), &ALWAYS).await;
        put.unwrap_or_else(|e| panic!("{key:?}: {e}"));
    }
    for key in &keys {
        let body = w.bucket.get_bytes(key, None, 0..4096).await.expect(key);
        assert_eq!(body, format!("body of {key}"));
    }
    keys.sort_by_key(|k| k.as_bytes().to_vec());
    let page = w.bucket.list(&ListRequest::default()).await.expect("list");
    let listed: Vec<_> = page.objects.iter().map(|o| o.key.as_str()).collect();
    assert_eq!(listed, keys);
    for key in keys.iter().filter(|k| k.len() < 1000) {
        let copy = format!("copy-of-{key}");
        w.bucket.copy(key, None, &copy, None, &ALWAYS).await.expect(&copy);
        let body = w.bucket.get_bytes(&copy, None, 0..4096).await.expect(&copy);
        assert_eq!(body, format!("body of {key}"));
        w.bucket.delete(key, None).await.expect(key);
        is(w.bucket.head(key).await, ErrorKind::NotFound);
    }
    is(w.bucket.put(&"x".repeat(1025), b"", &none(), &ALWAYS).await, ErrorKind::Invalid);
    is(w.bucket.put("", b"", &none(), &ALWAYS).await, ErrorKind::Invalid);
}

#[tokio::test]
async fn ranges_are_clipped_or_refused() {
    let w = world().await;
    let data = Random::new(1).bytes(1_500_000);
    let etag = w.bucket.put("k", data.clone(), &none(), &ALWAYS).await.expect("put");
    for (start, end) in
        [(0, 1), (0, 1_500_000), (5, 6), (999_999, 1_400_001), (1_499_999, 9_999_999)]
    {
        let body = w.bucket.get_range("k", Some(&etag), start..end).await.expect("get");
        assert_eq!(body.info().size, 1_500_000);
        let clipped = end.min(1_500_000);
        assert_eq!(body.range(), start..clipped);
        let bytes = body.collect().await.expect("whole");
        assert!(bytes[..] == data[start as usize..clipped as usize]);
    }
    is(w.bucket.get_bytes("k", None, 1_500_000..1_500_001).await, ErrorKind::Invalid);
    is(w.bucket.get_bytes("k", None, 7..7).await, ErrorKind::Invalid);
    w.bucket.put("empty", b"", &none(), &ALWAYS).await.expect("put");
    let empty = w.bucket.get("empty", None, None).await.expect("get").collect().await;
    assert!(empty.expect("whole").is_empty());
    is(w.bucket.get_bytes("empty", None, 0..1).await, ErrorKind::Invalid);
}

#[tokio::test]
async fn a_body_in_many_pieces_arrives_as_one() {
    let w = world().await;
    let mut random = Random::new(2);
    let pieces: Vec<Bytes> = [0, 1, 4096, 0, 70_000, 2_000_000, 3]
        .into_iter()
        .map(|n| Bytes::from(random.bytes(n)))
        .collect();
    let whole = pieces.concat();
    w.bucket.put("k", pieces.clone(), &none(), &ALWAYS).await.expect("put");
    let got = w.bucket.get_bytes("k", None, 0..9_999_999).await.expect("get");
    assert!(got[..] == whole[..]);
    let upload = w.bucket.create_multipart("m", &none()).await.expect("create");
    let part = w.bucket.upload_part("m", &upload, 3, pieces).await.expect("part");
    w.bucket.complete_multipart("m", &upload, &[part], &ALWAYS).await.expect("complete");
    let got = w.bucket.get_bytes("m", None, 0..9_999_999).await.expect("get");
    assert!(got[..] == whole[..]);
}

#[tokio::test]
async fn multipart_uploads_join_parts_in_order_and_refuse_bad_ones() {
    let w = world().await;
    let b = &w.bucket;
    let mut random = Random::new(4);
    let (one, two, three) = (random.bytes(5 << 20), random.bytes(6 << 20), random.bytes(10));
    let metadata: Metadata = [("color".to_owned(), "blue".to_owned())].into();
    let upload = b.create_multipart("k", &metadata).await.expect("create");
    is(b.head("k").await, ErrorKind::NotFound);
    let p2 = b.upload_part("k", &upload, 2, two.clone()).await.expect("part");
    b.upload_part("k", &upload, 1, b"overwritten").await.expect("part");
    let p1 = b.upload_part("k", &upload, 1, one.clone()).await.expect("part");
    let p9 = b.upload_part("k", &upload, 9, three.clone()).await.expect("part");
    let small = b.upload_part("k", &upload, 3, b"small").await.expect("part");
    let complete = |parts: Vec<Part>| {
        let upload = &upload;
        async move { b.complete_multipart("k", upload, &parts, &ALWAYS).await }
    };
    is(complete(vec![]).await, ErrorKind::Invalid);
    is(complete(vec![p2.clone(), p1.clone()]).await, ErrorKind::Invalid);
    is(complete(vec![p1.clone(), small, p9.clone()]).await, ErrorKind::Invalid);
    let forged = Part { number: 2, etag: p1.etag.clone() };
    is(complete(vec![p1.clone(), forged]).await, ErrorKind::Invalid);
    let missing = Part { number: 4, etag: p1.etag.clone() };
    is(complete(vec![p1.clone(), missing]).await, ErrorKind::Invalid);
    is(b.upload_part("k", &upload, 0, b"x").await, ErrorKind::Invalid);
    is(b.upload_part("k", &upload, 10_001, b"x").await, ErrorKind::Invalid);
    let etag = complete(vec![p1, p2, p9]).await.expect("complete");
    assert!(etag.as_str().ends_with("-3"), "{etag}");
    let whole = [one, two, three].concat();
    let info = b.head("k").await.expect("head");
    assert_eq!((info.size, &info.etag, &info.metadata), (whole.len() as u64, &etag, &metadata));
    let got = b.get_bytes("k", Some(&etag), 0..u64::MAX).await.expect("get");
    assert!(got[..] == whole[..]);

    // A copy of it, metadata kept or replaced, is the same bytes under a plain etag.
    b.copy("k", Some(&etag), "kept", None, &ALWAYS).await.expect("copy");
    b.copy("k", Some(&etag), "replaced", Some(&none()), &ALWAYS).await.expect("copy");
    let (kept, replaced) = (b.head("kept").await, b.head("replaced").await);
    let (kept, replaced) = (kept.expect("head"), replaced.expect("head"));
    assert_eq!((kept.metadata, replaced.metadata), (metadata, none()));
    assert_eq!(kept.etag, replaced.etag);
    assert!(!kept.etag.as_str().contains('-'));

    let upload = b.create_multipart("gone", &none()).await.expect("create");
    b.upload_part("gone", &upload, 1, b"x").await.expect("part");
    b.abort_multipart("gone", &upload).await.expect("abort");
    b.abort_multipart("gone", &upload).await.expect("abort of nothing");
    is(b.upload_part("gone", &upload, 1, b"x").await, ErrorKind::NotFound);
    is(b.list_parts("gone", &upload).await, ErrorKind::NotFound);
}

#[tokio::test]
async fn uploads_are_listed_in_order_under_their_prefix() {
    let w = world().await;
    let mut wanted = Vec::new();
    for key in ["p/b", "p/a", "q", "p/a"] {
        let upload = w.bucket.create_multipart(key, &none()).await.expect("create");
        wanted.push((key.to_owned(), upload));
    }
    wanted.sort();
    let listed = |prefix: &'static str| {
        let b = w.bucket.clone();
        async move {
            let all = b.list_multipart_uploads(prefix).await.expect("list");
            all.into_iter().map(|u| (u.key, u.upload)).collect::<Vec<_>>()
        }
    };
    assert_eq!(listed("").await, wanted);
    wanted.retain(|(key, _)| key.starts_with("p/"));
    assert_eq!(listed("p/").await, wanted);
}

/// The definition of a listing over a BTreeMap.
fn reference(model: &BTreeMap<String, u64>, prefix: &str, delimiter: &str) -> Vec<String> {
    let mut wanted: Vec<String> = Vec::new();
    for key in model.keys().filter(|k| k.starts_with(prefix)) {
        let entry = match key[prefix.len()..].find(delimiter) {
            Some(at) if !delimiter.is_empty() => {
                key[..prefix.len() + at + delimiter.len()].to_owned()
            }
            _ => key.clone(),
        };
        if wanted.last() != Some(&entry) {
            wanted.push(entry);
        }
    }
    wanted
}

#[tokio::test]
async fn listings_agree_with_a_btreemap_page_by_page() {
    let w = world().await;
    // Through a prefix of its own, so that the client's mapping of keys is listed too.
    let bucket = client_with(&w.server, |c| c.prefix = "in/here".into()).await;
    w.bucket.put("in/herf", b"not ours", &none(), &ALWAYS).await.expect("put");
    w.bucket.put("in/here", b"not ours", &none(), &ALWAYS).await.expect("put");
    let seed = 11;
    println!("seed {seed}");
    let mut random = Random::new(seed);
    let mut model = BTreeMap::new();
    for _ in 0..150 {
        let mut key = String::new();
        for _ in 0..1 + random.below(4) {
            key.push_str(["a", "b", "/", "ü+ %", "a/"][random.below(5) as usize]);
        }
        let size = random.below(50);
        bucket.put(&key, vec![0; size as usize], &none(), &ALWAYS).await.expect("put");
        model.insert(key, size);
    }
    for _ in 0..40 {
        let prefix = ["", "a", "a/", "b/a", "ü"][random.below(5) as usize];
        let delimiter = ["", "/", "a/"][random.below(3) as usize];
        let max = 1 + random.below(9) as u32;
        let start_after = (random.below(3) == 0).then(|| "a/b".to_owned());
        let mut request = ListRequest {
            prefix: prefix.into(),
            delimiter: (!delimiter.is_empty()).then(|| delimiter.to_owned()),
            start_after: start_after.clone(),
            max_keys: Some(max),
            ..ListRequest::default()
        };
        let mut got = Vec::new();
        loop {
            let page = bucket.list(&request).await.expect("list");
            assert!(page.objects.len() + page.prefixes.len() <= max as usize);
            for object in &page.objects {
                assert_eq!(model.get(&object.key), Some(&object.size), "{}", object.key);
            }
            let mut both: Vec<String> = page.objects.into_iter().map(|o| o.key).collect();
            both.extend(page.prefixes);
            both.sort();
            got.extend(both);
            match page.next {
                Some(next) => request.continuation = Some(next),
                None => break,
            }
        }
        let mut rest = model.clone();
        if let Some(after) = &start_after {
            rest.retain(|key, _| key > after);
        }
        let wanted = reference(&rest, prefix, delimiter);
        assert_eq!(got, wanted, "seed {seed}: {prefix:?} {delimiter:?} {max} {start_after:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_small_objects_in_parallel_are_all_there() {
    let w = world().await;
    let begun = Instant::now();
    let puts = (0..400u32).map(|n| {
        let b = w.bucket.clone();
        tokio::spawn(async move {
            b.put(&format!("n/{n:04}"), vec![n as u8; 4096], &none(), &ALWAYS).await
        })
    });
    for put in futures::future::join_all(puts).await {
        put.expect("no panic").expect("put");
    }
    println!("400 durable puts of 4 KiB: {:?}", begun.elapsed());
    let page = w.bucket.list(&ListRequest::default()).await.expect("list");
    assert_eq!(page.objects.len(), 400);
    assert!(page.objects.iter().all(|o| o.size == 4096));
}

#[tokio::test]
async fn at_most_so_many_requests_are_in_flight() {
    let w = world().await;
    let narrow = client_with(&w.server, |c| c.concurrency = 1).await;
    narrow.put("k", vec![1; 1_000_000], &none(), &ALWAYS).await.expect("put");
    let held = narrow.get("k", None, None).await.expect("an open body");
    let second = tokio::time::timeout(std::time::Duration::from_millis(200), narrow.head("k"));
    assert!(second.await.is_err(), "an open body counts as a request in flight");
    assert_eq!(held.collect().await.expect("whole").len(), 1_000_000);
    narrow.head("k").await.expect("the permit is back");
}
