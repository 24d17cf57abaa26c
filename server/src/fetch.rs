//! The files of a revision's model, from their store to a folder: for this process, or for a server of another project
//! (`athanor-server fetch`).

use std::{ffi::OsString, fs, io, path::Path, time::Instant};

use anyhow::Context;
use athanor_contract::{artifact::Manifest, serve::ServeConfig};

/// Name under which a model that is one GGUF file is also there, whatever its own name is.
const GGUF: &str = "model.gguf";

/// Fetches the model into an existing folder. An artifact is checked against its manifest, which is returned.
///
/// # Errors
/// The model is not there, is incomplete, or cannot be written.
pub async fn fetch(config: &ServeConfig, folder: &Path) -> anyhow::Result<Option<Manifest>> {
    let started = Instant::now();
    let location = athanor_store::open(&config.model_uri)?;
    let manifest = athanor_store::artifact::download_model(&location, folder)
        .await
        .with_context(|| format!("fetching {}", config.model_uri))?;
    tracing::info!(
        uri = config.model_uri,
        digest = manifest.as_ref().map(|manifest| &manifest.model_digest),
        seconds = started.elapsed().as_secs_f64(),
        "model fetched"
    );
    Ok(manifest)
}

/// Fetches the model for another process, which can then be started with the folder. A model that is one GGUF file is also
/// there as `model.gguf`, so that an argument can name it whatever revision it is.
///
/// # Errors
/// As those of [`fetch`].
pub async fn fetch_for_another(config: &ServeConfig, folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    fetch(config, folder).await?;
    link_gguf(folder).with_context(|| format!("linking {}", folder.join(GGUF).display()))
}

fn link_gguf(folder: &Path) -> io::Result<()> {
    let mut names: Vec<OsString> = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        // A link of an earlier run is not a file.
        if entry.file_type()?.is_file() && entry.path().extension().is_some_and(|extension| extension == "gguf") {
            names.push(entry.file_name());
        }
    }
    let [name] = names.as_slice() else { return Ok(()) };
    if name == GGUF {
        return Ok(());
    }
    let link = folder.join(GGUF);
    match fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::os::unix::fs::symlink(name, link)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(store: &Path) -> ServeConfig {
        let uri = format!("file://{}", store.display());
        serde_json::from_value(serde_json::json!({"modelName": "m", "revision": "m-1", "modelUri": uri})).unwrap()
    }

    #[tokio::test]
    async fn a_gguf_file_is_also_there_by_a_name_that_never_changes() {
        let (store, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let to = work.path().join("models");
        fs::write(store.path().join("Small.Q4_1.gguf"), b"weights").unwrap();
        // A container that is restarted fetches into the same folder.
        for _ in 0..2 {
            fetch_for_another(&config(store.path()), &to).await.unwrap();
            assert_eq!(fs::read(to.join(GGUF)).unwrap(), b"weights");
            assert_eq!(fs::read_link(to.join(GGUF)).unwrap(), Path::new("Small.Q4_1.gguf"), "it is valid in any mount");
        }
        assert_eq!(fs::read_dir(&to).unwrap().count(), 2);
    }

    #[tokio::test]
    async fn other_models_are_fetched_as_they_are_and_an_incomplete_one_is_refused() {
        let (store, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let error = fetch_for_another(&config(store.path()), to.path()).await.unwrap_err();
        assert!(format!("{error:#}").contains("fetching file://"), "{error:#}");
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            fs::write(store.path().join(name), name).unwrap();
        }
        fetch_for_another(&config(store.path()), to.path()).await.unwrap();
        assert_eq!(fs::read(to.path().join("config.json")).unwrap(), b"config.json");
        assert!(!to.path().join(GGUF).exists());
    }
}
