//! Which conditions an S3 server honours, and whether the plain operations work on it.
//!
//! `s3_conditions s3://BUCKET[/PREFIX] [ENDPOINT]`, with the usual AWS_* environment. Everything
//! it writes is under `.ebb/` in the prefix and deleted again.

use std::process::ExitCode;

use ebb_s3::{Bucket, BucketConfig, Condition, ListRequest, Metadata, S3Error, probe};

async fn plain(bucket: &Bucket) -> Result<(), S3Error> {
    let key = ".ebb/plain/a b+c%é/1";
    let metadata: Metadata = [("color".to_owned(), "blue".to_owned())].into();
    let etag = bucket.put(key, b"0123456789", &metadata, &Condition::None).await?;
    let info = bucket.head(key).await?;
    println!("head            {info:?}");
    println!("same etag       {}", info.etag == etag);
    let part = bucket.get_bytes(key, Some(&etag), 2..5).await?;
    println!("range           {}", part[..] == b"234"[..]);
    let upload = bucket.create_multipart(".ebb/plain/big", &metadata).await?;
    let first = vec![7u8; 5 << 20];
    let parts = vec![
        bucket.upload_part(".ebb/plain/big", &upload, 1, first).await?,
        bucket.upload_part_copy(".ebb/plain/big", &upload, 2, key, Some(&etag), 0..4).await?,
    ];
    // Not every server's listings are what the SDK reads; nothing of ours depends on these two.
    let listed = bucket.list_parts(".ebb/plain/big", &upload).await;
    println!("parts           {:?}", listed.map(|parts| parts.len()));
    let listed = bucket.list_multipart_uploads(".ebb/").await;
    println!("uploads         {:?}", listed.map(|uploads| uploads.len()));
    let big =
        bucket.complete_multipart(".ebb/plain/big", &upload, &parts, &Condition::None).await?;
    println!("complete        {big}");
    let tail = bucket.get_bytes(".ebb/plain/big", Some(&big), 5 << 20..6 << 20).await?;
    println!("tail            {}", tail[..] == b"0123"[..]);
    bucket
        .copy(key, Some(&etag), ".ebb/plain/copy", Some(&Metadata::new()), &Condition::None)
        .await?;
    println!("copy metadata   {:?}", bucket.head(".ebb/plain/copy").await?.metadata);
    let request =
        ListRequest { prefix: ".ebb/plain/".into(), max_keys: Some(2), ..Default::default() };
    let page = bucket.list(&request).await?;
    let keys: Vec<_> = page.objects.iter().map(|o| o.key.as_str()).collect();
    println!("list            {keys:?} next {}", page.next.is_some());
    for key in [key, ".ebb/plain/big", ".ebb/plain/copy", ".ebb/plain/absent"] {
        bucket.delete(key, None).await?;
    }
    let request = ListRequest { prefix: ".ebb/".into(), ..Default::default() };
    println!("left behind     {}", bucket.list(&request).await?.objects.len());
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(mut config) = arguments.next().as_deref().and_then(BucketConfig::from_url) else {
        eprintln!("usage: s3_conditions s3://BUCKET[/PREFIX] [ENDPOINT]");
        return ExitCode::from(2);
    };
    config.endpoint = arguments.next();
    let bucket = Bucket::connect(config).await;
    let all = async {
        bucket.create_if_missing().await?;
        if let Err(error) = plain(&bucket).await {
            println!("plain operations stop at: {error}");
        }
        probe::probe(&bucket).await
    };
    match all.await {
        Ok(found) => {
            println!("{found:#?}\nmissing: {:?}", found.missing());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
