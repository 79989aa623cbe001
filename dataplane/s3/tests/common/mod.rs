//! A real server on a real directory, and a client of it.
#![allow(dead_code, unreachable_pub)]

use std::{net::SocketAddr, path::Path};

use ebb_s3::{
    Bucket, BucketConfig, Condition, Metadata,
    server::{EmbeddedServer, ServerConfig},
};

pub const BUCKET: &str = "tide";

pub fn config(dir: &Path) -> ServerConfig {
    ServerConfig {
        dir: dir.to_owned(),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        access_key: "ebbkey".into(),
        secret_key: "ebbsecret".into(),
        buckets: vec![BUCKET.into()],
        admin: None,
    }
}

pub async fn start(dir: &Path) -> EmbeddedServer {
    EmbeddedServer::start(config(dir)).await.expect("the server starts")
}

pub async fn client(server: &EmbeddedServer) -> Bucket {
    Bucket::connect(server.bucket_config(BUCKET)).await
}

pub async fn client_with(
    server: &EmbeddedServer,
    change: impl FnOnce(&mut BucketConfig),
) -> Bucket {
    let mut config = server.bucket_config(BUCKET);
    change(&mut config);
    Bucket::connect(config).await
}

pub struct World {
    pub dir: tempfile::TempDir,
    pub server: EmbeddedServer,
    pub bucket: Bucket,
}

pub async fn world() -> World {
    let dir = tempfile::tempdir().expect("a directory");
    let server = start(dir.path()).await;
    let bucket = client(&server).await;
    World { dir, server, bucket }
}

pub fn none() -> Metadata {
    Metadata::new()
}

pub const ALWAYS: Condition = Condition::None;

/// A small xorshift; print the seed where a test can fail on it.
pub struct Random(pub u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| (self.next() >> 32) as u8).collect()
    }
}
