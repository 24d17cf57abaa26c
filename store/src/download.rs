//! Manifests and the files that they name, to local files.

use std::path::{Path, PathBuf};

use athanor_contract::artifact::{FileEntry, MANIFEST, Manifest};
use futures::{StreamExt, TryStreamExt};

use crate::{Location, StoreError};

/// Files fetched or sent at the same time.
pub(crate) const PARALLEL: usize = 4;

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

/// Fetches one file of a folder, checked against `expected` if there is a manifest.
pub(crate) async fn fetch(
    folder: &Location,
    name: &str,
    to: &Path,
    expected: Option<&FileEntry>,
) -> Result<(), StoreError> {
    let location = folder.child(name);
    let relative = PathBuf::from(name);
    if relative.is_absolute() || relative.components().any(|part| !matches!(part, std::path::Component::Normal(_))) {
        return Err(StoreError::Invalid {
            uri: location.uri,
            message: "the manifest names a file outside its folder".into(),
        });
    }
    location.fetch_file(&to.join(relative), expected).await.map(drop)
}
