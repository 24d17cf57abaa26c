//! What is left where an upload or a download is cut off, by a store in memory that fails on purpose.

use std::{
    fmt,
    path::Path as File,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use async_trait::async_trait;
use athanor_contract::artifact::{FileEntry, Kind, MANIFEST, Manifest, sha256_hex};
use athanor_store::{Location, StoreError, artifact};
use futures::{FutureExt, StreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart, memory::InMemory, path::Path,
};

/// No part fails.
const NEVER: usize = usize::MAX;

/// What happens to a part of an upload whose number is `at`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Fails,
    /// It never arrives, as when the process is killed meanwhile.
    Hangs,
}

#[derive(Debug)]
struct Faulty {
    inner: InMemory,
    fault: Fault,
    /// Number of the part, counted over all uploads from 0.
    at: usize,
    /// A download ends after its first so many bytes.
    truncate: Option<usize>,
    parts: Arc<AtomicUsize>,
    in_flight: Arc<AtomicUsize>,
    most_in_flight: Arc<AtomicUsize>,
    aborted: Arc<AtomicUsize>,
}

impl Faulty {
    fn new(fault: Fault, at: usize) -> Self {
        let (parts, in_flight) = Default::default();
        let (most_in_flight, aborted) = Default::default();
        Self { inner: InMemory::new(), fault, at, truncate: None, parts, in_flight, most_in_flight, aborted }
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Faulty")
    }
}

struct Upload {
    inner: Box<dyn MultipartUpload>,
    fault: Fault,
    at: usize,
    parts: Arc<AtomicUsize>,
    in_flight: Arc<AtomicUsize>,
    most_in_flight: Arc<AtomicUsize>,
    aborted: Arc<AtomicUsize>,
}

impl fmt::Debug for Upload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Upload")
    }
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        if self.parts.fetch_add(1, SeqCst) == self.at {
            return match self.fault {
                Fault::Fails => {
                    let source = std::io::Error::other("connection lost").into();
                    futures::future::ready(Err(Error::Generic { store: "Faulty", source })).boxed()
                }
                Fault::Hangs => futures::future::pending().boxed(),
            };
        }
        let now = self.in_flight.fetch_add(1, SeqCst) + 1;
        self.most_in_flight.fetch_max(now, SeqCst);
        let (part, in_flight) = (self.inner.put_part(data), self.in_flight.clone());
        async move {
            tokio::task::yield_now().await;
            let done = part.await;
            in_flight.fetch_sub(1, SeqCst);
            done
        }
        .boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.inner.complete().await
    }

    async fn abort(&mut self) -> Result<()> {
        self.aborted.fetch_add(1, SeqCst);
        self.inner.abort().await
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, to: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.inner.put_opts(to, payload, options).await
    }

    async fn put_multipart_opts(&self, to: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Ok(Box::new(Upload {
            inner: self.inner.put_multipart_opts(to, options).await?,
            fault: self.fault,
            at: self.at,
            parts: self.parts.clone(),
            in_flight: self.in_flight.clone(),
            most_in_flight: self.most_in_flight.clone(),
            aborted: self.aborted.clone(),
        }))
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> Result<GetResult> {
        let mut result = self.inner.get_opts(from, options).await?;
        if let Some(bytes) = self.truncate {
            let part = self.inner.get_opts(from, GetOptions::default()).await?.bytes().await?.slice(..bytes);
            result.payload = GetResultPayload::Stream(futures::stream::iter([Ok(part)]).boxed());
        }
        Ok(result)
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

fn manifest() -> Manifest {
    Manifest {
        kind: Kind::Model,
        job: "job".into(),
        model_digest: String::new(),
        data_digest: "d".into(),
        parent: "p".into(),
        code_version: "0".into(),
        step: 1,
        max_sequence_length: None,
        files: Default::default(),
        metrics: Default::default(),
    }
}

fn location(store: Arc<Faulty>) -> Location {
    Location { store, path: Path::from("artifact"), uri: "s3://bucket/artifact".into() }
}

/// A folder whose weights are five parts.
fn weights() -> (tempfile::TempDir, Vec<u8>) {
    let bytes: Vec<u8> = (0..(35_u32 << 20)).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let from = tempfile::tempdir().unwrap();
    std::fs::write(from.path().join("model.safetensors"), &bytes).unwrap();
    (from, bytes)
}

#[tokio::test]
async fn a_failed_upload_is_aborted_and_the_next_one_is_whole() {
    let (from, bytes) = weights();
    let store = Arc::new(Faulty::new(Fault::Fails, 2));
    let folder = location(store.clone());
    let error = artifact::upload(from.path(), &folder, manifest()).await.unwrap_err();
    assert!(
        error.to_string().contains("model.safetensors") && error.to_string().contains("connection lost"),
        "{error}"
    );
    assert!(!error.is_user_error());
    assert_eq!(store.aborted.load(SeqCst), 1);
    assert_eq!(folder.list().await.unwrap(), Vec::<String>::new(), "neither the file nor a manifest");

    let written = artifact::upload(from.path(), &folder, manifest()).await.unwrap();
    assert_eq!(store.most_in_flight.load(SeqCst), 1, "parts wait for each other");
    let to = tempfile::tempdir().unwrap();
    assert_eq!(artifact::download(&folder, to.path()).await.unwrap(), written);
    assert!(std::fs::read(to.path().join("model.safetensors")).unwrap() == bytes);
}

#[tokio::test]
async fn an_upload_killed_between_two_parts_shows_nothing_and_is_repeated() {
    let (from, _) = weights();
    let store = Arc::new(Faulty::new(Fault::Hangs, 3));
    let folder = location(store.clone());
    {
        let upload = std::pin::pin!(artifact::upload(from.path(), &folder, manifest()));
        let stuck = async {
            while store.parts.load(SeqCst) < 4 {
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        };
        assert!(matches!(
            futures::future::select(upload, std::pin::pin!(stuck)).await,
            futures::future::Either::Right(_)
        ));
    }
    assert_eq!(folder.list().await.unwrap(), Vec::<String>::new());
    let written = artifact::upload(from.path(), &folder, manifest()).await.unwrap();
    assert_eq!(artifact::download(&folder, tempfile::tempdir().unwrap().path()).await.unwrap(), written);
}

/// Names in a local folder.
fn names(folder: &File) -> Vec<String> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[tokio::test]
async fn a_download_that_is_not_what_was_sent_leaves_no_file() {
    let mut store = Faulty::new(Fault::Fails, NEVER);
    store.truncate = Some(5);
    let file = location(Arc::new(store)).child("model.safetensors");
    file.write("some weights".into()).await.unwrap();
    let to = tempfile::tempdir().unwrap();
    let path = to.path().join("model.safetensors");
    let error = file.fetch_file(&path, None).await.unwrap_err();
    assert!(error.to_string().contains("artifact/model.safetensors: 5 bytes of 12 arrived"), "{error}");
    assert_eq!(names(to.path()), Vec::<String>::new());

    let whole = location(Arc::new(Faulty::new(Fault::Fails, NEVER))).child("model.safetensors");
    whole.write("other weights".into()).await.unwrap();
    let expected = FileEntry { sha256: sha256_hex(b"some! weights"), bytes: 13 };
    // A file of an earlier download stays as it was.
    std::fs::write(&path, "earlier").unwrap();
    let error = whole.fetch_file(&path, Some(&expected)).await.unwrap_err();
    assert!(matches!(error, StoreError::Invalid { .. }));
    assert!(error.to_string().contains("model.safetensors") && error.to_string().contains("sha256"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"earlier");
    assert_eq!(names(to.path()), ["model.safetensors"]);
}

#[tokio::test]
async fn a_file_that_changes_during_its_upload_is_not_sent() {
    let (from, _) = weights();
    let folder = location(Arc::new(Faulty::new(Fault::Fails, NEVER)));
    for (bytes, part) in [(35 << 20, "the file changed"), (3, "the file changed")] {
        let entry = FileEntry { sha256: sha256_hex(b"what it was"), bytes };
        let sent = folder.child("model.safetensors").send_file(&from.path().join("model.safetensors"), &entry).await;
        let error = sent.unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(folder.list().await.unwrap(), Vec::<String>::new());
        std::fs::write(from.path().join("model.safetensors"), "now").unwrap();
    }
    assert!(!folder.child(MANIFEST).exists().await.unwrap());
}
