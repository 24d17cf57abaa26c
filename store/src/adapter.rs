//! The two files of an adapter: of a folder in PEFT's format, or of an artifact whose job trained an adapter.

use std::path::Path;

use athanor_contract::artifact::{MANIFEST, Manifest, REFERENCE};

use crate::{Location, StoreError, download::read_manifest};

/// Settings, as PEFT names them.
const CONFIG: &str = "adapter_config.json";
/// Weights, as PEFT names them.
const WEIGHTS: &str = "adapter_model.safetensors";
/// Folder of the adapter in an artifact.
const FOLDER: &str = "adapter";

/// Fetches settings and weights of an adapter into the local folder `to`. Those of an artifact are checked against its
/// manifest. The weights are safetensors only.
pub async fn download_adapter(folder: &Location, to: &Path) -> Result<(), StoreError> {
    match read_manifest(folder).await {
        Ok(manifest) => return of_artifact(folder, &manifest, to).await,
        Err(StoreError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    if folder.child(REFERENCE).exists().await? {
        return Err(invalid(folder, format!("an artifact without {MANIFEST}: its upload was cut off")));
    }
    for place in [folder.clone(), folder.child(FOLDER)] {
        match place.child(CONFIG).fetch_file(&to.join(CONFIG), None).await {
            Ok(_) => return weights(&place, to).await,
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Err(StoreError::NotFound { uri: folder.child(CONFIG).uri })
}

async fn weights(folder: &Location, to: &Path) -> Result<(), StoreError> {
    match folder.child(WEIGHTS).fetch_file(&to.join(WEIGHTS), None).await {
        Ok(_) => Ok(()),
        Err(StoreError::NotFound { .. }) => {
            Err(invalid(folder, format!("the adapter has no {WEIGHTS}; pickled weights are refused")))
        }
        Err(error) => Err(error),
    }
}

async fn of_artifact(folder: &Location, manifest: &Manifest, to: &Path) -> Result<(), StoreError> {
    for file in [CONFIG, WEIGHTS] {
        let name = format!("{FOLDER}/{file}");
        let Some(entry) = manifest.files.get(&name) else {
            let message = format!("the artifact has no {name}: its job trained no adapter");
            return Err(invalid(folder, message));
        };
        folder.child(&name).fetch_file(&to.join(file), Some(entry)).await?;
    }
    Ok(())
}

fn invalid(location: &Location, message: String) -> StoreError {
    StoreError::Invalid { uri: location.uri.clone(), message }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use athanor_contract::artifact::{FileEntry, Kind, sha256_hex};

    use super::*;
    use crate::open;

    fn manifest(files: &[(&str, &str)]) -> String {
        let entry = |(name, content): &(&str, &str)| {
            let entry = FileEntry { sha256: sha256_hex(content.as_bytes()), bytes: content.len() as u64 };
            ((*name).to_owned(), entry)
        };
        let manifest = Manifest {
            kind: Kind::Model,
            job: "job".into(),
            model_digest: String::new(),
            data_digest: String::new(),
            parent: String::new(),
            code_version: String::new(),
            step: 1,
            max_sequence_length: None,
            files: files.iter().map(entry).collect(),
            metrics: BTreeMap::new(),
        };
        serde_json::to_string(&manifest).unwrap()
    }

    /// Fetches the adapter of a folder with these files, and returns what arrived.
    async fn fetched(files: &[(&str, &str)]) -> Result<Vec<(String, String)>, StoreError> {
        let (store, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, content) in files {
            let path = store.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let folder = open(&format!("file://{}", store.path().display())).unwrap();
        download_adapter(&folder, to.path()).await?;
        let read = |name: &str| (name.to_owned(), std::fs::read_to_string(to.path().join(name)).unwrap());
        Ok([CONFIG, WEIGHTS].map(read).to_vec())
    }

    #[tokio::test]
    async fn an_adapter_arrives_from_its_folder_or_from_an_artifact() {
        let expected = [(CONFIG.to_owned(), "c".to_owned()), (WEIGHTS.to_owned(), "w".to_owned())];
        let plain = [(CONFIG, "c"), (WEIGHTS, "w"), ("README.md", "")];
        assert_eq!(fetched(&plain).await.unwrap(), expected);
        let inside = [("adapter/adapter_config.json", "c"), ("adapter/adapter_model.safetensors", "w")];
        assert_eq!(fetched(&inside).await.unwrap(), expected);
        let manifest = manifest(&inside);
        let artifact = [inside[0], inside[1], (REFERENCE, "{}"), (MANIFEST, manifest.as_str())];
        assert_eq!(fetched(&artifact).await.unwrap(), expected);
    }

    #[tokio::test]
    async fn what_is_no_adapter_is_refused() {
        let inside = [("adapter/adapter_config.json", "c"), ("adapter/adapter_model.safetensors", "w")];
        let (own, none) = (manifest(&inside), manifest(&[("config.json", "{}")]));
        for (files, part) in [
            (vec![("config.json", "{}")], "adapter_config.json"),
            (vec![(CONFIG, "c"), ("adapter_model.bin", "w")], "pickled weights are refused"),
            (vec![inside[0], inside[1], (REFERENCE, "{}")], "its upload was cut off"),
            (vec![("config.json", "{}"), (MANIFEST, none.as_str())], "its job trained no adapter"),
            (
                vec![inside[0], ("adapter/adapter_model.safetensors", "x"), (MANIFEST, own.as_str())],
                "adapter_model.safetensors",
            ),
        ] {
            let error = fetched(&files).await.unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
