//! A tool that is not ours speaks to the server: s5cmd, where it is installed.

mod common;

use std::process::{Command, Output};

use common::{ALWAYS, BUCKET, Random, none, world};

fn s5cmd(endpoint: &str, arguments: &[&str]) -> Option<Output> {
    let output = Command::new("s5cmd")
        .args(["--endpoint-url", endpoint])
        .args(arguments)
        .env("AWS_ACCESS_KEY_ID", "ebbkey")
        .env("AWS_SECRET_ACCESS_KEY", "ebbsecret")
        .env("AWS_REGION", "us-east-1")
        .output();
    match output {
        Ok(output) => Some(output),
        Err(e) => {
            println!("skipped: s5cmd cannot be run ({e})");
            None
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn s5cmd_lists_and_copies_both_ways() {
    let w = world().await;
    let endpoint = w.server.endpoint();
    let ok = |arguments: &[&str]| -> Option<String> {
        let output = s5cmd(&endpoint, arguments)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {text} {errors}");
        Some(text)
    };
    if ok(&["version"]).is_none() {
        return;
    }
    let data = Random::new(6).bytes(1 << 20);
    w.bucket.put("dir/from ebb+1.bin", data.clone(), &none(), &ALWAYS).await.expect("put");
    let listing = ok(&["ls", &format!("s3://{BUCKET}/dir/")]).expect("s5cmd is there");
    assert!(listing.contains("1048576") && listing.contains("from ebb+1.bin"), "{listing}");

    let files = tempfile::tempdir().expect("a directory");
    let down = files.path().join("down");
    ok(&["cp", &format!("s3://{BUCKET}/dir/from ebb+1.bin"), &down.to_string_lossy()]);
    assert!(std::fs::read(&down).expect("downloaded") == data);

    // 60 MiB makes s5cmd upload in parts of 50 MiB.
    let big = Random::new(7).bytes(60 << 20);
    let up = files.path().join("up");
    std::fs::write(&up, &big).expect("written");
    ok(&["cp", &up.to_string_lossy(), &format!("s3://{BUCKET}/dir/up.bin")]);
    let info = w.bucket.head("dir/up.bin").await.expect("head");
    assert_eq!(info.size, big.len() as u64);
    let got = w.bucket.get_bytes("dir/up.bin", Some(&info.etag), 0..info.size).await.expect("get");
    assert!(got[..] == big[..]);

    ok(&["mv", &format!("s3://{BUCKET}/dir/up.bin"), &format!("s3://{BUCKET}/moved.bin")]);
    assert!(w.bucket.head("dir/up.bin").await.expect_err("moved").is_not_found());
    ok(&["rm", &format!("s3://{BUCKET}/*")]);
    let page = w.bucket.list(&Default::default()).await.expect("list");
    assert!(page.objects.is_empty(), "{page:?}");
}
