//! Which files of a folder are a model: an artifact by its manifest, a plain Hugging Face folder, or a GGUF file.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use athanor_contract::artifact::{MANIFEST, Manifest, REFERENCE, sha256_hex};
use futures::{StreamExt, TryStreamExt};
use serde::Deserialize;

use crate::{
    Location, StoreError,
    download::{PARALLEL, download, fetch, read_manifest},
};

/// Endings of pickled weights, which run code when they are loaded.
const PICKLED: [&str; 5] = [".bin", ".pt", ".pth", ".pkl", ".ckpt"];
/// Weights in one file.
const WEIGHTS: &str = "model.safetensors";
/// Names the files of weights in several, by tensor.
const INDEX: &str = "model.safetensors.index.json";
/// A file with weights, configuration and tokenizer.
const GGUF: &str = ".gguf";
/// What a model folder has next to its weights.
const REQUIRED_FILES: [&str; 2] = ["config.json", "tokenizer.json"];
/// What is fetched in addition, if it is there.
const OPTIONAL_FILES: [&str; 12] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
];

/// The part of [`INDEX`] that says which files there are.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Fetches a model: an artifact, checked against its manifest (returned), or a plain model (`None`): a Hugging Face
/// folder, whose weights are in one safetensors file or in several with their index, a folder with one GGUF file, or a
/// GGUF file by its own name. Pickled weights are refused by name.
pub async fn download_model(folder: &Location, to: &Path) -> Result<Option<Manifest>, StoreError> {
    if folder.uri.ends_with(GGUF) {
        let name = folder.uri.rsplit('/').next().unwrap_or("model.gguf");
        folder.fetch_file(&to.join(name), None).await?;
        return Ok(None);
    }
    match download(folder, to).await {
        Ok(manifest) => return Ok(Some(manifest)),
        Err(StoreError::NotFound { uri }) if uri.ends_with(MANIFEST) => {}
        Err(error) => return Err(error),
    }
    let names: BTreeSet<String> = folder.list().await?.into_iter().collect();
    if names.is_empty() {
        return Err(StoreError::NotFound { uri: folder.uri.clone() });
    }
    if names.contains(REFERENCE) {
        return Err(invalid(folder, format!("an artifact without {MANIFEST}: its upload was cut off")));
    }
    let wanted = wanted(folder, &names).await?;
    futures::stream::iter(wanted.iter().map(|name| fetch(folder, name, to, None)))
        .buffer_unordered(PARALLEL)
        .try_collect::<Vec<()>>()
        .await?;
    Ok(None)
}

/// What distinguishes one content of a model from another without reading its weights: an artifact's digest, else the
/// names and versions ([`Location::version`]) of the files that [`download_model`] fetches.
pub async fn model_version(folder: &Location) -> Result<String, StoreError> {
    if folder.uri.ends_with(GGUF) {
        return folder.version().await;
    }
    match read_manifest(folder).await {
        Ok(manifest) => return Ok(manifest.model_digest),
        Err(StoreError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    let names: BTreeSet<String> = folder.list().await?.into_iter().collect();
    if names.is_empty() {
        return Err(StoreError::NotFound { uri: folder.uri.clone() });
    }
    let mut versions = String::new();
    for name in wanted(folder, &names).await? {
        let version = folder.child(&name).version().await?;
        versions.push_str(&format!("{name}\n{version}\n"));
    }
    Ok(sha256_hex(versions.as_bytes()))
}

/// The files of a plain model that are fetched.
async fn wanted(folder: &Location, names: &BTreeSet<String>) -> Result<Vec<String>, StoreError> {
    let mut wanted = match weights(folder, names).await? {
        Weights::Whole(files) => files,
        Weights::NeedFolder(files) => {
            if let Some(missing) = REQUIRED_FILES.into_iter().find(|name| !names.contains(*name)) {
                return Err(invalid(folder, format!("the model folder has no {missing}")));
            }
            files.into_iter().chain(REQUIRED_FILES.map(str::to_owned)).collect()
        }
    };
    wanted.extend(OPTIONAL_FILES.into_iter().filter(|name| names.contains(*name)).map(str::to_owned));
    Ok(wanted)
}

enum Weights {
    /// The file has configuration and tokenizer inside.
    Whole(Vec<String>),
    /// Configuration and tokenizer are files next to it.
    NeedFolder(Vec<String>),
}

async fn weights(folder: &Location, names: &BTreeSet<String>) -> Result<Weights, StoreError> {
    if names.contains(WEIGHTS) {
        return Ok(Weights::NeedFolder(vec![WEIGHTS.to_owned()]));
    }
    if names.contains(INDEX) {
        return Ok(Weights::NeedFolder(shards(folder, names).await?));
    }
    let gguf: Vec<&String> = names.iter().filter(|name| name.ends_with(GGUF) && !name.contains('/')).collect();
    match gguf.as_slice() {
        [one] => return Ok(Weights::Whole(vec![(*one).clone()])),
        [] => {}
        [first, second, ..] => {
            let message = format!(
                "the model folder has {} GGUF files ({first}, {second}, ...): name one of them instead of the folder",
                gguf.len()
            );
            return Err(invalid(folder, message));
        }
    }
    if let Some(name) = names.iter().find(|name| PICKLED.iter().any(|ending| name.ends_with(ending))) {
        let message = format!(
            "{name} holds pickled weights, which are refused because loading them runs code: convert to {WEIGHTS}"
        );
        return Err(invalid(folder, message));
    }
    if names.contains("adapter_config.json") {
        return Err(invalid(
            folder,
            format!("the folder has an adapter, but no {WEIGHTS} of the model that it adapts"),
        ));
    }
    Err(invalid(folder, format!("the model folder has no {WEIGHTS}, no {INDEX} and no GGUF file")))
}

/// The index and the files that it names.
async fn shards(folder: &Location, names: &BTreeSet<String>) -> Result<Vec<String>, StoreError> {
    let location = folder.child(INDEX);
    let index: Index = serde_json::from_slice(&location.read().await?)
        .map_err(|error| invalid(&location, format!("not an index of weights: {error}")))?;
    let files: BTreeSet<String> = index.weight_map.into_values().collect();
    for file in &files {
        if !file.ends_with(".safetensors") {
            return Err(invalid(&location, format!("the index names {file}, which is not a safetensors file")));
        }
        if !names.contains(file) {
            return Err(invalid(&location, format!("the index names {file}, which is not in the folder")));
        }
    }
    Ok(files.into_iter().chain([INDEX.to_owned()]).collect())
}

fn invalid(location: &Location, message: String) -> StoreError {
    StoreError::Invalid { uri: location.uri.clone(), message }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::open;

    /// Fetches a folder with these files, and returns the names that arrived.
    async fn fetched(files: &[(&str, &str)]) -> Result<Vec<String>, StoreError> {
        let (store, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (name, content) in files {
            let path = store.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let folder = open(&format!("file://{}", store.path().display())).unwrap();
        assert_eq!(download_model(&folder, to.path()).await?, None);
        open(&format!("file://{}", to.path().display())).unwrap().list().await
    }

    #[tokio::test]
    async fn a_decoders_folder_arrives_with_everything_that_it_needs() {
        let index =
            r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#;
        let mut files = vec![(INDEX, index), ("README.md", ""), ("onnx/model.onnx", ""), ("pytorch_model.bin", "")];
        let mut expected = vec![INDEX, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
        expected.extend(OPTIONAL_FILES.into_iter().chain(REQUIRED_FILES));
        files.extend(expected[1..].iter().map(|name| (*name, "{}")));
        expected.sort_unstable();
        assert_eq!(fetched(&files).await.unwrap(), expected);

        let whole = [(WEIGHTS, ""), ("config.json", "{}"), ("tokenizer.json", "{}"), ("other.gguf", "")];
        assert_eq!(fetched(&whole).await.unwrap(), ["config.json", WEIGHTS, "tokenizer.json"]);
        assert_eq!(fetched(&[("model.Q4_1.gguf", "x"), ("README.md", "")]).await.unwrap(), ["model.Q4_1.gguf"]);
    }

    #[tokio::test]
    async fn another_content_is_another_version() {
        let store = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &str| std::fs::write(store.path().join(name), content).unwrap();
        let folder = open(&format!("file://{}", store.path().display())).unwrap();
        assert!(matches!(model_version(&folder).await, Err(StoreError::NotFound { .. })));
        for name in [WEIGHTS, "config.json", "tokenizer.json"] {
            write(name, "{}");
        }
        let first = model_version(&folder).await.unwrap();
        write("README.md", "not fetched");
        assert_eq!(model_version(&folder).await.unwrap(), first);
        write("config.json", "{\"a\": 1}");
        assert_ne!(model_version(&folder).await.unwrap(), first);
        write("a.gguf", "1");
        let file = open(&format!("file://{}/a.gguf", store.path().display())).unwrap();
        let one = model_version(&file).await.unwrap();
        write("a.gguf", "12");
        assert_ne!(model_version(&file).await.unwrap(), one);
    }

    #[tokio::test]
    async fn a_gguf_file_has_a_uri_of_its_own() {
        let (store, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file: PathBuf = store.path().join("a.gguf");
        std::fs::write(&file, "a").unwrap();
        std::fs::write(store.path().join("b.gguf"), "b").unwrap();
        let location = open(&format!("file://{}", file.display())).unwrap();
        assert_eq!(download_model(&location, to.path()).await.unwrap(), None);
        assert_eq!(std::fs::read(to.path().join("a.gguf")).unwrap(), b"a");
        assert!(!to.path().join("b.gguf").exists());
    }

    #[tokio::test]
    async fn an_incomplete_folder_is_refused_by_what_it_lacks() {
        let index = r#"{"weight_map": {"a": "model-1.safetensors"}}"#;
        let away = r#"{"weight_map": {"a": "../../model.bin"}}"#;
        for (files, part) in [
            (vec![("config.json", "{}")], "has no model.safetensors, no model.safetensors.index.json and no GGUF file"),
            (vec![(WEIGHTS, ""), ("config.json", "{}")], "has no tokenizer.json"),
            (vec![(INDEX, index), ("config.json", "{}")], "names model-1.safetensors, which is not in the folder"),
            (vec![(INDEX, away), ("config.json", "{}")], "names ../../model.bin, which is not a safetensors file"),
            (vec![(INDEX, "[]"), ("config.json", "{}")], "not an index of weights"),
            (vec![("a.gguf", ""), ("b.gguf", "")], "has 2 GGUF files (a.gguf, b.gguf, ...)"),
            (vec![("adapter_config.json", "{}")], "has an adapter, but no model.safetensors"),
            (
                vec![("config.json", "{}"), ("pytorch_model-00001-of-00002.bin", "")],
                "pytorch_model-00001-of-00002.bin holds pickled weights",
            ),
        ] {
            let error = fetched(&files).await.unwrap_err();
            assert!(error.is_user_error() && error.to_string().contains(part), "{error}");
        }
    }
}
