//! Folders with a manifest. Files are written first, the manifest last: a folder without one holds no artifact.

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use athanor_contract::artifact::{FileEntry, MANIFEST, Manifest, REFERENCE, model_digest, sha256_hex};
use futures::{StreamExt, TryStreamExt};

use crate::{Location, StoreError, download::PARALLEL, stream::measure_file};
pub use crate::{
    download::{download, read_manifest},
    model_folder::{download_model, model_version},
};

/// How often a folder is written if others write into it at the same time.
const ATTEMPTS: u32 = 5;

/// The model digest that an upload of the local folder will have.
pub async fn folder_digest(folder: &Path) -> Result<String, StoreError> {
    let mut names = Vec::new();
    walk(folder, folder, &mut names)?;
    Ok(model_digest(&digests(folder, &names).await?))
}

/// Sends every file below the local folder `from`, then the manifest with their digests. `files` and `model_digest` of
/// `manifest` are filled in here. A folder that holds this very model and metrics already is left untouched; another
/// manifest is deleted before the first file changes. If another process writes into the folder at the same time, the
/// last one writes it again, so that files and manifest come from one process.
///
/// # Errors
/// [`StoreError::Conflict`] if another process keeps writing.
pub async fn upload(from: &Path, to: &Location, mut manifest: Manifest) -> Result<Manifest, StoreError> {
    let mut names = Vec::new();
    walk(from, from, &mut names)?;
    // The file that distinguishes an artifact from a plain folder is sent first, so that an upload that was cut off is
    // recognised.
    names.sort_by_key(|name| name != REFERENCE);
    manifest.files = digests(from, &names).await?;
    manifest.model_digest = model_digest(&manifest.files);
    match read_manifest(to).await {
        Ok(there) if there.model_digest == manifest.model_digest && same_metrics(&there, &manifest) => {
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

/// Whether two manifests show the same metrics. Compared as text: manifests of older versions have four decimals.
fn same_metrics(one: &Manifest, other: &Manifest) -> bool {
    let shown = |manifest: &Manifest| -> Vec<(String, String)> {
        manifest.metrics.iter().map(|(name, value)| (name.clone(), value.to_string())).collect()
    };
    shown(one) == shown(other)
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
    // The upload waits for all of them, also if one fails: none may arrive in a folder that was given up.
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

/// Whether a file is still what was written. It is read again only if its ETag differs: some stores change it by
/// themselves.
async fn is_there(file: &Sent, to: &Location) -> Result<bool, StoreError> {
    let Some(etag) = &file.etag else { return Ok(true) };
    let location = to.child(&file.name);
    let found = async { Ok(location.version().await? == *etag || location.measure().await?.sha256 == file.sha256) };
    match found.await {
        Err(StoreError::NotFound { .. }) => Ok(false),
        found => found,
    }
}

async fn digests(folder: &Path, names: &[String]) -> Result<BTreeMap<String, FileEntry>, StoreError> {
    let mut files = BTreeMap::new();
    for name in names {
        files.insert(name.clone(), measure_file(folder.join(name)).await?);
    }
    Ok(files)
}

async fn send(from: &Path, name: &str, manifest: &Manifest, to: &Location) -> Result<Sent, StoreError> {
    let entry = &manifest.files[name];
    let etag = to.child(name).send_file(&from.join(name), entry).await?;
    Ok(Sent { name: name.to_owned(), sha256: entry.sha256.clone(), etag })
}

/// The pause before a folder is written again: of two processes, the one that waits longer writes alone. The last
/// digits of the clock are random enough for that.
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
    async fn a_model_that_is_there_with_its_metrics_is_left_untouched() {
        let (from, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(from.path().join("model.safetensors"), b"weights").unwrap();
        let folder = open(&format!("file://{}", store.path().display())).unwrap().child("artifact");
        let measured = |accuracy: f64| {
            let accuracy = athanor_contract::Decimal::new(accuracy).unwrap();
            Manifest { metrics: [("accuracy".to_owned(), accuracy)].into(), ..manifest() }
        };
        let written = upload(from.path(), &folder, measured(0.863_931_447)).await.unwrap();
        assert_eq!(read_manifest(&folder).await.unwrap(), written, "a manifest reads back as itself");
        let times = || {
            let file = |name: &str| store.path().join("artifact").join(name).metadata().unwrap().modified().unwrap();
            [file(MANIFEST), file("model.safetensors")]
        };
        let before = times();
        upload(from.path(), &folder, measured(0.863_931_447)).await.unwrap();
        assert_eq!(times(), before);
        upload(from.path(), &folder, measured(0.9)).await.unwrap();
        assert_eq!(
            read_manifest(&folder).await.unwrap(),
            Manifest { files: written.files, model_digest: written.model_digest, ..measured(0.9) }
        );
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
}
