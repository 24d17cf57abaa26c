//! Folders with a manifest. Files first, the manifest last: what has no manifest is not there.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use athanor_contract::artifact::{FileEntry, MANIFEST, Manifest, model_digest, sha256_hex};
use futures::{StreamExt, TryStreamExt};

use crate::{Location, StoreError};

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

/// Sends every file below the local folder `from`, then the manifest with their digests. `manifest` brings everything but
/// `files` and `model_digest`, which are filled in here.
pub async fn upload(from: &Path, to: &Location, mut manifest: Manifest) -> Result<Manifest, StoreError> {
    let mut names = Vec::new();
    walk(from, from, &mut names)?;
    let entries: Vec<(String, FileEntry)> = futures::stream::iter(names.iter().map(|name| send(from, name, to)))
        .buffer_unordered(PARALLEL)
        .try_collect()
        .await?;
    manifest.files = entries.into_iter().collect::<BTreeMap<_, _>>();
    manifest.model_digest = model_digest(&manifest.files);
    let bytes = serde_json::to_vec_pretty(&manifest)
        .map_err(|error| StoreError::Invalid { uri: to.uri.clone(), message: error.to_string() })?;
    to.child(MANIFEST).write(bytes.into()).await?;
    Ok(manifest)
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

async fn send(from: &Path, name: &str, to: &Location) -> Result<(String, FileEntry), StoreError> {
    let path = from.join(name);
    let (bytes, entry) = blocking(move || {
        let bytes = std::fs::read(&path).map_err(|error| StoreError::io(&path, error))?;
        let entry = FileEntry { sha256: sha256_hex(&bytes), bytes: bytes.len() as u64 };
        Ok((bytes, entry))
    })
    .await?;
    to.child(name).write(bytes.into()).await?;
    Ok((name.to_owned(), entry))
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
