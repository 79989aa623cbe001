//! What was acknowledged survives restarts and SIGKILL; what was torn is not served.

mod common;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use common::{ALWAYS, BUCKET, Random, client, none, start};
use ebb_s3::{
    Bucket, BucketConfig, Condition, ErrorKind, ListRequest, Metadata,
    server::{EmbeddedServer, ServerError},
};

fn object_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for folder in fs::read_dir(dir.join(BUCKET).join("objects")).expect("objects") {
        for file in fs::read_dir(folder.expect("folder").path()).expect("folder") {
            files.push(file.expect("file").path());
        }
    }
    files
}

#[tokio::test]
async fn everything_is_there_after_a_restart() {
    let dir = tempfile::tempdir().expect("a directory");
    let metadata: Metadata = [("who".to_owned(), "me".to_owned())].into();
    let server = start(dir.path()).await;
    let bucket = client(&server).await;
    let etag = bucket.put("a/b", b"hello", &metadata, &ALWAYS).await.expect("put");
    bucket.put("gone", b"x", &none(), &ALWAYS).await.expect("put");
    bucket.delete("gone", None).await.expect("delete");
    let upload = bucket.create_multipart("big", &metadata).await.expect("create");
    let first = vec![7u8; 5 << 20];
    let parts = vec![
        bucket.upload_part("big", &upload, 1, first.clone()).await.expect("part"),
        bucket.upload_part("big", &upload, 2, b"tail").await.expect("part"),
    ];
    server.shutdown().await;

    let server = start(dir.path()).await;
    let bucket = client(&server).await;
    let info = bucket.head("a/b").await.expect("head");
    assert_eq!((info.etag, info.size, info.metadata), (etag, 5, metadata.clone()));
    assert!(bucket.head("gone").await.expect_err("gone").is_not_found());
    let uploads = bucket.list_multipart_uploads("").await.expect("list");
    assert_eq!(uploads.len(), 1);
    assert_eq!((&uploads[0].key[..], &uploads[0].upload), ("big", &upload));
    let listed = bucket.list_parts("big", &upload).await.expect("list");
    assert_eq!(listed.iter().map(|p| p.size).collect::<Vec<_>>(), [5 << 20, 4]);
    let etag = bucket.complete_multipart("big", &upload, &parts, &Condition::IfAbsent).await;
    let etag = etag.expect("completed after the restart");
    server.shutdown().await;

    let server = start(dir.path()).await;
    let bucket = client(&server).await;
    let info = bucket.head("big").await.expect("head");
    assert_eq!((info.etag, info.size, info.metadata), (etag, (5 << 20) + 4, metadata));
    assert!(bucket.list_multipart_uploads("").await.expect("list").is_empty());
}

#[tokio::test]
async fn torn_temporaries_and_unfinished_uploads_are_swept() {
    let dir = tempfile::tempdir().expect("a directory");
    start(dir.path()).await.shutdown().await;
    let bucket_dir = dir.path().join(BUCKET);
    fs::write(bucket_dir.join("tmp/17"), b"half an obj").expect("written");
    fs::create_dir(bucket_dir.join("uploads/feed")).expect("made");
    fs::write(bucket_dir.join("uploads/feed/00001"), b"torn").expect("written");
    fs::create_dir_all(dir.path().join(".new-half/objects")).expect("made");
    let server = start(dir.path()).await;
    let bucket = client(&server).await;
    assert!(bucket.list(&ListRequest::default()).await.expect("list").objects.is_empty());
    assert!(bucket.list_multipart_uploads("").await.expect("list").is_empty());
    assert_eq!(fs::read_dir(bucket_dir.join("tmp")).expect("tmp").count(), 0);
    assert_eq!(fs::read_dir(bucket_dir.join("uploads")).expect("uploads").count(), 0);
    assert_eq!(server.damaged(), 0);
}

#[tokio::test]
async fn a_damaged_object_is_an_error_and_never_absent() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = start(dir.path()).await;
    let bucket = client(&server).await;
    bucket.put("k", b"precious", &none(), &ALWAYS).await.expect("put");
    let file = object_files(dir.path()).pop().expect("one file");
    let handle = fs::File::options().read(true).write(true).open(&file).expect("open");
    let mut byte = [0];
    handle.read_exact_at(&mut byte, 40).expect("read");
    handle.write_all_at(&[byte[0] ^ 1], 40).expect("flip");
    let hasty = |server: &EmbeddedServer| {
        let config = BucketConfig { read_attempts: 1, ..server.bucket_config(BUCKET) };
        Bucket::connect(config)
    };
    // While it runs ...
    let error = hasty(&server).await.get("k", None, None).await.expect_err("refused");
    assert_eq!(error.kind, ErrorKind::Server, "{error}");
    server.shutdown().await;
    // ... and after a restart, when its key is known by its hash alone.
    let server = start(dir.path()).await;
    let bucket = hasty(&server).await;
    assert_eq!(server.damaged(), 1);
    let error = bucket.get("k", None, None).await.expect_err("refused");
    assert_eq!(error.kind, ErrorKind::Server, "{error}");
    let error = bucket.put("k", b"x", &none(), &Condition::IfAbsent).await.expect_err("refused");
    assert_eq!(error.kind, ErrorKind::Ambiguous, "not known to be absent: {error}");
    assert!(bucket.head("other").await.expect_err("absent").is_not_found());
    bucket.put("k", b"anew", &none(), &ALWAYS).await.expect("overwriting repairs");
    assert_eq!(&bucket.get_bytes("k", None, 0..9).await.expect("there")[..], b"anew");
    assert_eq!(server.damaged(), 0);
}

#[tokio::test]
async fn an_object_cut_short_on_disk_is_not_served() {
    let dir = tempfile::tempdir().expect("a directory");
    let server = start(dir.path()).await;
    let bucket = client(&server).await;
    bucket.put("k", vec![1; 100_000], &none(), &ALWAYS).await.expect("put");
    server.shutdown().await;
    let file = object_files(dir.path()).pop().expect("one file");
    let handle = fs::File::options().write(true).open(&file).expect("open");
    handle.set_len(50_000).expect("cut");
    let server = start(dir.path()).await;
    assert_eq!(server.damaged(), 1);
}

#[tokio::test]
async fn a_directory_belongs_to_one_server() {
    let dir = tempfile::tempdir().expect("a directory");
    let _first = start(dir.path()).await;
    let second = EmbeddedServer::start(common::config(dir.path())).await;
    assert!(matches!(second, Err(ServerError::InUse { .. })), "{second:?}");
    let foreign = tempfile::tempdir().expect("a directory");
    fs::write(foreign.path().join("FORMAT"), "something else").expect("written");
    let refused = EmbeddedServer::start(common::config(foreign.path())).await;
    assert!(matches!(refused, Err(ServerError::Format { .. })), "{refused:?}");
}

const CHILD_DIR: &str = "EBB_S3_TEST_CHILD_DIR";

/// Not a test of its own: the server process that the next test kills.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child_server() {
    let Some(dir) = std::env::var_os(CHILD_DIR) else { return };
    let server = start(Path::new(&dir)).await;
    println!("\nLISTENING {}", server.endpoint());
    std::future::pending::<()>().await;
}

struct Process {
    child: Child,
    endpoint: String,
}

impl Process {
    fn spawn(dir: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().expect("this binary"))
            .args(["child_server", "--exact", "--nocapture"])
            .env(CHILD_DIR, dir)
            .stdout(Stdio::piped())
            .spawn()
            .expect("spawned");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let endpoint = lines
            .map_while(Result::ok)
            .find_map(|line| line.strip_prefix("LISTENING ").map(str::to_owned))
            .expect("the child says where it listens");
        Self { child, endpoint }
    }

    async fn bucket(&self) -> Bucket {
        let mut config = BucketConfig::new(BUCKET)
            .with_endpoint(self.endpoint.clone())
            .with_credentials("ebbkey", "ebbsecret");
        config.read_attempts = 1;
        Bucket::connect(config).await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What may be under a key: the last acknowledged value, or those of attempts whose outcome is
/// unknown since. None is absence.
type Allowed = Vec<Option<Vec<u8>>>;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_objects_survive_sigkill() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut model: BTreeMap<String, Allowed> = BTreeMap::new();
    let mut acknowledged = 0;
    for round in 0..6u64 {
        println!("seed {round}");
        let mut random = Random::new(round + 1);
        let mut process = Process::spawn(dir.path());
        let bucket = process.bucket().await;
        for (key, allowed) in &mut model {
            let there = match bucket.get(key, None, None).await {
                Ok(body) => Some(body.collect().await.expect("whole").to_vec()),
                Err(e) if e.is_not_found() => None,
                Err(e) => panic!("round {round}: {e}"),
            };
            let known = allowed.contains(&there);
            assert!(known, "round {round}: '{key}' holds neither an old nor a new value");
            *allowed = vec![there];
        }
        // Four writers with keys of their own; the kill comes in the midst of them.
        let writers: Vec<_> = (0..4u64)
            .map(|writer| {
                let (bucket, mut random) = (bucket.clone(), Random::new(random.next()));
                tokio::spawn(async move {
                    let mut log: Vec<(String, Option<Vec<u8>>, bool)> = Vec::new();
                    loop {
                        let key = format!("w{writer}/{}", random.below(20));
                        let size = [10, 5_000, 300_000, 2_000_000][random.below(4) as usize];
                        let value = (random.below(5) > 0).then(|| random.bytes(size));
                        let result = match value.clone() {
                            Some(body) => bucket.put(&key, body, &none(), &ALWAYS).await.map(drop),
                            None => bucket.delete(&key, None).await,
                        };
                        log.push((key, value, result.is_ok()));
                        if let Err(e) = result {
                            let expected = [ErrorKind::Ambiguous, ErrorKind::Connect];
                            assert!(expected.contains(&e.kind), "{e}");
                            return log;
                        }
                    }
                })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(150 + random.below(400))).await;
        process.child.kill().expect("killed");
        for writer in writers {
            for (key, value, acked) in writer.await.expect("no panic") {
                let allowed = model.entry(key).or_insert_with(|| vec![None]);
                if acked {
                    acknowledged += 1;
                    *allowed = vec![value];
                } else {
                    allowed.push(value);
                }
            }
        }
    }
    println!("{acknowledged} acknowledged mutations over 6 kills");
    assert!(acknowledged > 50, "the writers wrote {acknowledged} times only");
}
