//! Folders with a manifest. Files first, the manifest last: what has no manifest is not there.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use athanor_contract::artifact::{FileEntry, MANIFEST, Manifest, REFERENCE, model_digest, sha256_hex};
use futures::{StreamExt, TryStreamExt};

use crate::{Location, StoreError};

/// How often a folder is written into which others write at the same time.
const ATTEMPTS: u32 = 5;
/// Files fetched or sent at the same time.
const PARALLEL: usize = 4;
/// Endings of pickled weights, which run code when loaded.
const PICKLED: [&str; 5] = [".bin", ".pt", ".pth", ".pkl", ".ckpt"];
/// What a plain model folder has to have.
const MODEL_FILES: [&str; 3] = ["config.json", "model.safetensors", "tokenizer.json"];
/// What is taken from it besides, where it is there.
const OPTIONAL_FILES: [&str; 3] = ["tokenizer_config.json", "special_tokens_map.json", "vocab.txt"];

/// The manifest of a folder; [`StoreError::NotFound`] when the folder has none.
pub async fn read_manifest(folder: &Location) -> Result<Manifest, StoreError> {
    let location = folder.child(MANIFEST);
    let bytes = location.read().await?;
    serde_json::from_slice(&bytes)
        .map_err(|error| StoreError::Invalid { uri: location.uri, message: format!("not a manifest: {error}") })
}

/// Fetches every file of the manifest into the local folder `to` and checks its sha256.
pub async fn download(folder: &Location, to: &Path) -> Result<Manifest, StoreError> {
    let manifest = read_manifest(folder).await?;
    futures::stream::iter(manifest.files.iter().map(|(name, entry)| fetch(folder, name, to, Some(entry))))
        .buffer_unordered(PARALLEL)
        .try_collect::<Vec<()>>()
        .await?;
    Ok(manifest)
}

/// Fetches a model: an artifact, checked against its manifest (returned), or a plain Hugging Face folder (`None`).
/// A folder that has only pickled weights is refused by name.
pub async fn download_model(folder: &Location, to: &Path) -> Result<Option<Manifest>, StoreError> {
    match download(folder, to).await {
        Ok(manifest) => return Ok(Some(manifest)),
        Err(StoreError::NotFound { uri }) if uri.ends_with(MANIFEST) => {}
        Err(error) => return Err(error),
    }
    let names = folder.list().await?;
    if names.is_empty() {
        return Err(StoreError::NotFound { uri: folder.uri.clone() });
    }
    if names.iter().any(|name| name == REFERENCE) {
        let message = format!("an artifact without {MANIFEST}: its upload was cut off");
        return Err(StoreError::Invalid { uri: folder.uri.clone(), message });
    }
    for required in MODEL_FILES {
        if names.iter().any(|name| name == required) {
            continue;
        }
        let pickled = names.iter().find(|name| PICKLED.iter().any(|ending| name.ends_with(ending)));
        let message = match pickled {
            Some(name) if required == "model.safetensors" => {
                format!(
                    "{name} holds pickled weights, which are refused because loading them runs code: convert to model.safetensors"
                )
            }
            _ => format!("the model folder has no {required}"),
        };
        return Err(StoreError::Invalid { uri: folder.uri.clone(), message });
    }
    let wanted = MODEL_FILES.into_iter().chain(OPTIONAL_FILES).filter(|wanted| names.iter().any(|name| name == wanted));
    futures::stream::iter(wanted.map(|name| fetch(folder, name, to, None)))
        .buffer_unordered(PARALLEL)
        .try_collect::<Vec<()>>()
        .await?;
    Ok(None)
}

/// The model digest that an upload of the local folder will have.
pub async fn folder_digest(folder: &Path) -> Result<String, StoreError> {
    let mut names = Vec::new();
    walk(folder, folder, &mut names)?;
    Ok(model_digest(&digests(folder, &names).await?))
}

/// Sends every file below the local folder `from`, then the manifest with their digests. `manifest` brings everything but
/// `files` and `model_digest`, which are filled in here. A folder that holds this very model already is left as it is; another
/// manifest there is deleted before the first file changes. Where another process writes into the folder at the same time, whoever
/// is last writes it anew, so that files and manifest are of one process.
///
/// # Errors
/// [`StoreError::Conflict`] if another process keeps writing.
pub async fn upload(from: &Path, to: &Location, mut manifest: Manifest) -> Result<Manifest, StoreError> {
    let mut names = Vec::new();
    walk(from, from, &mut names)?;
    // First what tells an artifact from a plain folder: one that was cut off is then known as such.
    names.sort_by_key(|name| name != REFERENCE);
    manifest.files = digests(from, &names).await?;
    manifest.model_digest = model_digest(&manifest.files);
    match read_manifest(to).await {
        Ok(there) if there.model_digest == manifest.model_digest && there.metrics == manifest.metrics => {
            return Ok(there);
        }
        Ok(_) | Err(StoreError::Invalid { .. }) => to.child(MANIFEST).delete().await?,
        Err(StoreError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    for attempt in 1..=ATTEMPTS {
        if attempt > 1 {
            tracing::warn!(uri = to.uri, "another process writes into this folder at the same time");
            tokio::time::sleep(pause(attempt)).await;
            to.child(MANIFEST).delete().await?;
        }
        let sent = send_all(from, &names, &manifest, to).await?;
        let checks = sent.iter().map(|file| is_there(file, to));
        let found: Vec<bool> = futures::stream::iter(checks).buffer_unordered(PARALLEL).try_collect().await?;
        if found.into_iter().all(|is_there| is_there) {
            return Ok(manifest);
        }
    }
    Err(StoreError::Conflict { uri: to.uri.clone() })
}

/// A file as it was written.
struct Sent {
    name: String,
    sha256: String,
    etag: Option<String>,
}

/// Sends the files, then the manifest.
async fn send_all(from: &Path, names: &[String], manifest: &Manifest, to: &Location) -> Result<Vec<Sent>, StoreError> {
    let mut sent = Vec::with_capacity(names.len() + 1);
    if let Some(first) = names.first().filter(|name| *name == REFERENCE) {
        sent.push(send(from, first, manifest, to).await?);
    }
    let others = names.iter().filter(|name| *name != REFERENCE).map(|name| send(from, name, manifest, to));
    // All are waited for, also when one fails: none arrives in a folder that has been given up.
    let others: Vec<Result<Sent, StoreError>> =
        futures::stream::iter(others).buffer_unordered(PARALLEL).collect().await;
    sent.extend(others.into_iter().collect::<Result<Vec<Sent>, _>>()?);
    let bytes = serde_json::to_vec_pretty(manifest)
        .map_err(|error| StoreError::Invalid { uri: to.uri.clone(), message: error.to_string() })?;
    let sha256 = sha256_hex(&bytes);
    let etag = to.child(MANIFEST).write(bytes.into()).await?;
    sent.push(Sent { name: MANIFEST.into(), sha256, etag });
    Ok(sent)
}

/// Whether a file is still what was written. Read again only if its ETag is another: some stores change it by themselves.
async fn is_there(file: &Sent, to: &Location) -> Result<bool, StoreError> {
    let Some(etag) = &file.etag else { return Ok(true) };
    let location = to.child(&file.name);
    let found = async { Ok(location.version().await? == *etag || sha256_hex(&location.read().await?) == file.sha256) };
    match found.await {
        Err(StoreError::NotFound { .. }) => Ok(false),
        found => found,
    }
}

async fn fetch(folder: &Location, name: &str, to: &Path, expected: Option<&FileEntry>) -> Result<(), StoreError> {
    let location = folder.child(name);
    let relative = PathBuf::from(name);
    if relative.is_absolute() || relative.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
        return Err(StoreError::Invalid {
            uri: location.uri,
            message: "the manifest names a file outside its folder".into(),
        });
    }
    let bytes = location.read().await?;
    let path = to.join(relative);
    let expected = expected.cloned();
    let uri = location.uri;
    blocking(move || {
        if let Some(expected) = expected {
            let found = sha256_hex(&bytes);
            if found != expected.sha256 {
                let message = format!(
                    "{} bytes with sha256 {found}, the manifest says {} bytes with {}",
                    bytes.len(),
                    expected.bytes,
                    expected.sha256
                );
                return Err(StoreError::Invalid { uri, message });
            }
        }
        let parent = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).map_err(|error| StoreError::io(parent, error))?;
        std::fs::write(&path, &bytes).map_err(|error| StoreError::io(&path, error))
    })
    .await
}

async fn digests(folder: &Path, names: &[String]) -> Result<BTreeMap<String, FileEntry>, StoreError> {
    let mut files = BTreeMap::new();
    for name in names {
        files.insert(name.clone(), digest(folder.join(name)).await?);
    }
    Ok(files)
}

async fn digest(path: PathBuf) -> Result<FileEntry, StoreError> {
    blocking(move || {
        let bytes = std::fs::read(&path).map_err(|error| StoreError::io(&path, error))?;
        Ok(FileEntry { sha256: sha256_hex(&bytes), bytes: bytes.len() as u64 })
    })
    .await
}

async fn send(from: &Path, name: &str, manifest: &Manifest, to: &Location) -> Result<Sent, StoreError> {
    let path = from.join(name);
    let bytes = blocking(move || std::fs::read(&path).map_err(|error| StoreError::io(&path, error))).await?;
    let etag = to.child(name).write(bytes.into()).await?;
    Ok(Sent { name: name.to_owned(), sha256: manifest.files[name].sha256.clone(), etag })
}

/// Before writing anew: of two, whoever waits longer writes alone. The clock's last digits are random enough for that.
fn pause(attempt: u32) -> Duration {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Duration::from_micros(u64::from(clock.subsec_nanos() % 1000) * 200) * attempt
}

fn walk(root: &Path, folder: &Path, names: &mut Vec<String>) -> Result<(), StoreError> {
    for entry in std::fs::read_dir(folder).map_err(|error| StoreError::io(folder, error))? {
        let path = entry.map_err(|error| StoreError::io(folder, error))?.path();
        if path.is_dir() {
            walk(root, &path, names)?;
        } else if let Ok(relative) = path.strip_prefix(root) {
            let name = relative.to_string_lossy().into_owned();
            if name != MANIFEST {
                names.push(name);
            }
        }
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use athanor_contract::artifact::Kind;

    use super::*;
    use crate::open;

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
            files: BTreeMap::new(),
            metrics: BTreeMap::new(),
        }
    }

    #[tokio::test]
    async fn an_artifact_is_whole_or_refused() {
        let (from, store, to) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(from.path().join("model.safetensors"), b"weights").unwrap();
        let folder = open(&format!("file://{}", store.path().display())).unwrap().child("artifact");
        let missing = download(&folder, to.path()).await.unwrap_err();
        assert!(matches!(missing, StoreError::NotFound { .. }), "{missing}");

        let written = upload(from.path(), &folder, manifest()).await.unwrap();
        assert_eq!(download(&folder, to.path()).await.unwrap(), written);
        assert_eq!(std::fs::read(to.path().join("model.safetensors")).unwrap(), b"weights");

        folder.child("model.safetensors").write("weight".into()).await.unwrap();
        let truncated = download(&folder, to.path()).await.unwrap_err();
        assert!(truncated.is_user_error() && truncated.to_string().contains("sha256"), "{truncated}");
    }

    #[tokio::test]
    async fn an_upload_that_was_cut_off_is_no_model_and_the_same_model_is_not_written_twice() {
        let (from, store, to) =
            (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["model.safetensors", "config.json", "tokenizer.json", REFERENCE, "report.json"] {
            std::fs::write(from.path().join(name), name).unwrap();
        }
        let folder = open(&format!("file://{}", store.path().display())).unwrap().child("artifact");
        let first = upload(from.path(), &folder, manifest()).await.unwrap();
        assert_eq!(folder_digest(from.path()).await.unwrap(), first.model_digest);
        // Another report of the same model changes nothing.
        std::fs::write(from.path().join("report.json"), "later").unwrap();
        assert_eq!(upload(from.path(), &folder, manifest()).await.unwrap(), first);
        assert_eq!(folder.child("report.json").read().await.unwrap(), "report.json");
        // Another model takes its place, whole.
        std::fs::write(from.path().join("model.safetensors"), "other").unwrap();
        let second = upload(from.path(), &folder, manifest()).await.unwrap();
        assert_ne!(second.model_digest, first.model_digest);
        assert_eq!(download_model(&folder, to.path()).await.unwrap(), Some(second));

        folder.child(MANIFEST).delete().await.unwrap();
        let error = download_model(&folder, to.path()).await.unwrap_err();
        assert!(error.is_user_error() && error.to_string().contains("cut off"), "{error}");
    }

    #[tokio::test]
    async fn two_that_write_at_once_leave_one_whole_artifact() {
        let store = tempfile::tempdir().unwrap();
        let folder = open(&format!("file://{}", store.path().display())).unwrap().child("artifact");
        for round in 0..15 {
            let folders = ["one", "two"].map(|writer| {
                let from = tempfile::tempdir().unwrap();
                for name in ["model.safetensors", "config.json", "tokenizer.json", REFERENCE] {
                    std::fs::write(from.path().join(name), format!("{writer} in round {round}")).unwrap();
                }
                from
            });
            let [one, two] = folders.each_ref().map(|from| upload(from.path(), &folder, manifest()));
            let (one, two) = tokio::join!(one, two);
            // Who loses says so, and no more.
            for error in [one, two].into_iter().filter_map(Result::err) {
                assert!(matches!(error, StoreError::Conflict { .. }), "{error}");
            }
            let to = tempfile::tempdir().unwrap();
            download(&folder, to.path()).await.unwrap_or_else(|error| panic!("round {round}: {error}"));
        }
    }

    #[tokio::test]
    async fn pickled_weights_are_refused_by_name() {
        let (store, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["config.json", "tokenizer.json", "pytorch_model.bin"] {
            std::fs::write(store.path().join(name), b"{}").unwrap();
        }
        let folder = open(&format!("file://{}", store.path().display())).unwrap();
        let error = download_model(&folder, to.path()).await.unwrap_err();
        assert!(error.to_string().contains("pytorch_model.bin holds pickled weights"), "{error}");
    }
}
