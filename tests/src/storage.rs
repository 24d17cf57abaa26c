//! The local cluster's S3 server, as the tests use it.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload, aws::AmazonS3Builder};

/// Address of the S3 server from the host and from pods.
pub const ENDPOINT: &str = "http://198.51.100.1:7070";
pub const ACCESS_KEY: &str = "athanor";
pub const SECRET_KEY: &str = "athanor-secret";
pub const REGION: &str = "us-east-1";
pub const BUCKET: &str = "athanor";

/// The keys of the Secret that trainer and server get as environment.
pub fn environment() -> [(&'static str, &'static str); 4] {
    [
        ("AWS_ENDPOINT_URL", ENDPOINT),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY),
        ("AWS_REGION", REGION),
    ]
}

/// Makes the bucket; one that is there already is fine. (object_store has no call for this.)
pub fn create_bucket() -> Result<()> {
    let output = std::process::Command::new("curl")
        .args(["--silent", "--show-error", "--noproxy", "*", "--output", "/dev/null", "--write-out", "%{http_code}"])
        .args([
            "--request",
            "PUT",
            "--aws-sigv4",
            &format!("aws:amz:{REGION}:s3"),
            "--user",
            &format!("{ACCESS_KEY}:{SECRET_KEY}"),
        ])
        // The sha256 of no body, which curl leaves out.
        .args(["--header", "x-amz-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"])
        .arg(format!("{ENDPOINT}/{BUCKET}"))
        .output()
        .context("curl")?;
    let status = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        ["200", "409"].contains(&status.as_str()),
        "bucket {BUCKET}: {status} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// A client of the bucket.
pub fn bucket() -> Result<impl ObjectStore> {
    crate::settle_tls();
    AmazonS3Builder::new()
        .with_endpoint(ENDPOINT)
        .with_access_key_id(ACCESS_KEY)
        .with_secret_access_key(SECRET_KEY)
        .with_region(REGION)
        .with_bucket_name(BUCKET)
        .with_allow_http(true)
        .build()
        .context("the S3 client")
}

pub async fn put(store: &impl ObjectStore, key: &str, bytes: Vec<u8>) -> Result<()> {
    store.put(&key.into(), PutPayload::from(bytes)).await.with_context(|| format!("PUT s3://{BUCKET}/{key}"))?;
    Ok(())
}

pub async fn get(store: &impl ObjectStore, key: &str) -> Result<Vec<u8>> {
    let object = store.get(&key.into()).await.with_context(|| format!("GET s3://{BUCKET}/{key}"))?;
    Ok(object.bytes().await?.to_vec())
}

/// Keys below a folder.
pub async fn names(store: &impl ObjectStore, folder: &str) -> Result<Vec<String>> {
    let objects: Vec<_> =
        store.list(Some(&folder.into())).try_collect().await.with_context(|| format!("LIST {folder}"))?;
    Ok(objects.into_iter().map(|object| object.location.to_string()).collect())
}

/// Sends every file of a folder, not its subfolders.
pub async fn put_folder(store: &impl ObjectStore, from: &Path, to: &str) -> Result<()> {
    for entry in std::fs::read_dir(from).with_context(|| from.display().to_string())? {
        let path = entry?.path();
        if path.is_file() {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            put(store, &format!("{to}/{name}"), std::fs::read(&path)?).await?;
        }
    }
    Ok(())
}
