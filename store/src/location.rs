//! One place in a store: a file, or a folder of files.

use std::{path::PathBuf, sync::Arc};

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::{
    ObjectStore, ObjectStoreExt, PutMode, PutPayload, WriteMultipart, local::LocalFileSystem, path::Path,
};

use crate::StoreError;

/// Bytes of one part of a large object.
const PART: usize = 32 << 20;

/// A place in a store.
#[derive(Clone)]
pub struct Location {
    pub store: Arc<dyn ObjectStore>,
    pub path: Path,
    /// The URI as the user wrote it, for messages.
    pub uri: String,
}

impl std::fmt::Debug for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Location").field("uri", &self.uri).finish_non_exhaustive()
    }
}

/// Opens a URI; nothing is read yet, so only the URI's form and the environment can be wrong here.
pub fn open(uri: &str) -> Result<Location, StoreError> {
    let invalid = |message: String| StoreError::Invalid { uri: uri.to_owned(), message };
    let url = url::Url::parse(uri).map_err(|error| invalid(format!("not a URI: {error}")))?;
    let schemes = ["s3", "gs", "az", "http", "https", "file"];
    if !schemes.contains(&url.scheme()) {
        return Err(invalid(format!("unknown scheme {:?}, known: {}", url.scheme(), schemes.join(", "))));
    }
    if url.scheme() == "file" && url.host_str().is_some_and(|host| !host.is_empty()) {
        return Err(invalid("a file URI has three slashes: file:///folder/file".into()));
    }
    // Every option by its usual environment variable; what a provider does not know is left out.
    let options = std::env::vars()
        .map(|(name, value)| (name.to_ascii_lowercase(), value))
        .filter(|(name, _)| ["aws_", "google_", "azure_"].iter().any(|prefix| name.starts_with(prefix)))
        .map(|(name, value)| (if name == "aws_endpoint_url" { "aws_endpoint".to_owned() } else { name }, value))
        // A plain-text endpoint is one the user wrote down as such.
        .chain([("allow_http".to_owned(), "true".to_owned())])
        // The timeout of one request, body included: the default of 30 s is too short for a model on a slow line.
        .chain([("timeout".to_owned(), "15m".to_owned()), ("read_timeout".to_owned(), "60s".to_owned())]);
    settle_tls();
    let (store, path) = object_store::parse_url_opts(&url, options).map_err(|error| invalid(error.to_string()))?;
    Ok(Location { store: Arc::from(store), path, uri: uri.to_owned() })
}

/// Tells rustls which cryptography to use: an HTTP client brings none and cannot be made without. Once is enough, again does no harm.
pub fn settle_tls() {
    // An error means that it was settled before.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

impl Location {
    /// A place below this one; `name` may hold slashes.
    pub fn child(&self, name: &str) -> Location {
        let mut path = self.path.clone();
        for part in name.split('/').filter(|part| !part.is_empty()) {
            path = path.join(part);
        }
        Location { store: self.store.clone(), path, uri: format!("{}/{name}", self.uri.trim_end_matches('/')) }
    }

    /// The path on this machine's disk, of a file:// URI.
    pub fn local_path(&self) -> Option<PathBuf> {
        if !self.uri.starts_with("file:") {
            return None;
        }
        LocalFileSystem::new().path_to_filesystem(&self.path).ok()
    }

    /// The whole object.
    pub async fn read(&self) -> Result<Bytes, StoreError> {
        let result = self.store.get(&self.path).await.map_err(|error| self.error(error))?;
        result.bytes().await.map_err(|error| self.error(error))
    }

    /// Writes the whole object; it appears complete or not at all. Gives its ETag, where the store tells it.
    pub async fn write(&self, bytes: Bytes) -> Result<Option<String>, StoreError> {
        if bytes.len() > PART && !self.uri.starts_with("http") {
            // Parts, so that a lost connection costs one of them; the object is complete when the last is there.
            let upload = self.store.put_multipart(&self.path).await.map_err(|error| self.error(error))?;
            let mut parts = WriteMultipart::new_with_chunk_size(upload, PART);
            parts.put(bytes);
            return Ok(parts.finish().await.map_err(|error| self.error(error))?.e_tag);
        }
        let put = self.store.put(&self.path, PutPayload::from_bytes(bytes)).await;
        Ok(put.map_err(|error| self.error(error))?.e_tag)
    }

    /// Writes the whole object unless there is one already, and returns whether it did. Of several writers one wins,
    /// except in a store without conditional writes (HTTP), where the last of those that write at the same time does.
    pub async fn write_new(&self, bytes: Bytes) -> Result<bool, StoreError> {
        use object_store::Error::{AlreadyExists, NotImplemented, Precondition};
        match self.store.put_opts(&self.path, PutPayload::from_bytes(bytes.clone()), PutMode::Create.into()).await {
            Ok(_) => Ok(true),
            Err(AlreadyExists { .. } | Precondition { .. }) => Ok(false),
            Err(NotImplemented { .. }) if self.exists().await? => Ok(false),
            Err(NotImplemented { .. }) => self.write(bytes).await.map(|_| true),
            Err(error) => Err(self.error(error)),
        }
    }

    /// Deletes one object; none there is fine.
    pub async fn delete(&self) -> Result<(), StoreError> {
        match self.store.delete(&self.path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.error(error)),
        }
    }

    /// Names of the objects below this folder, relative to it, sorted.
    pub async fn list(&self) -> Result<Vec<String>, StoreError> {
        let found: Vec<_> = self.store.list(Some(&self.path)).try_collect().await.map_err(|error| self.error(error))?;
        let prefix = format!("{}/", self.path);
        let mut names: Vec<String> = found
            .iter()
            .map(|object| object.location.as_ref())
            .map(|name| name.strip_prefix(&prefix).unwrap_or(name).to_owned())
            .collect();
        names.sort();
        Ok(names)
    }

    pub async fn exists(&self) -> Result<bool, StoreError> {
        match self.store.head(&self.path).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(self.error(error)),
        }
    }

    /// What tells one content of this object from another without reading it: its ETag, else size and time.
    pub async fn version(&self) -> Result<String, StoreError> {
        let meta = self.store.head(&self.path).await.map_err(|error| self.error(error))?;
        Ok(meta.e_tag.unwrap_or_else(|| format!("{}-{}", meta.size, meta.last_modified.timestamp_micros())))
    }

    pub(crate) fn error(&self, error: object_store::Error) -> StoreError {
        StoreError::of(&self.uri, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_are_written_listed_and_read() {
        let folder = tempfile::tempdir().unwrap();
        let root = open(&format!("file://{}", folder.path().display())).unwrap();
        let file = root.child("a/b.txt");
        assert!(!file.exists().await.unwrap());
        assert!(matches!(file.read().await, Err(StoreError::NotFound { .. })));
        file.write(Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(root.list().await.unwrap(), ["a/b.txt"]);
        assert_eq!(file.local_path(), Some(folder.path().join("a/b.txt")));
        assert_eq!(open("https://host/a/b.txt").unwrap().local_path(), None);
        assert_eq!(file.read().await.unwrap(), "x");
        let large: Bytes = (0..PART + 1000).map(|i| i as u8).collect::<Vec<_>>().into();
        file.write(large.clone()).await.unwrap();
        assert!(file.read().await.unwrap() == large, "a file in parts comes back");
        assert!(!file.write_new(Bytes::from_static(b"y")).await.unwrap());
        assert!(file.read().await.unwrap() == large, "what is there stays");
        file.delete().await.unwrap();
        file.delete().await.unwrap();
        assert!(file.write_new(Bytes::from_static(b"y")).await.unwrap());
        assert_eq!(file.read().await.unwrap(), "y");
        file.delete().await.unwrap();
        assert!(!file.exists().await.unwrap());
    }

    #[test]
    fn a_wrong_uri_is_the_users_error() {
        for (uri, part) in
            [("nonsense", "not a URI"), ("ftp://x/y", "unknown scheme"), ("file://relative/x", "three slashes")]
        {
            let error = open(uri).unwrap_err();
            assert!(error.is_user_error(), "{uri}");
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
