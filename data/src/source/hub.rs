//! Files of a dataset repository on the Hugging Face Hub: `hf://datasets/OWNER/NAME[@REVISION]/PATH`.
//!
//! `HF_ENDPOINT` names another hub, `HF_TOKEN` is the key to gated and private repositories. A file is downloaded to a
//! temporary folder first: the Hub's client gives files, not streams.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, stream};
use hf_hub::{
    Repo, RepoType,
    api::tokio::{ApiBuilder, ApiError, ApiRepo},
};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;

use super::{
    opened::{CHUNK, Opened},
    pattern::{is_pattern, matcher, nothing_matches},
};
use crate::DataError;

/// Which hub, and as whom.
#[derive(Clone, Debug, Default)]
pub(crate) struct Hub {
    pub endpoint: Option<String>,
    pub token: Option<String>,
}

pub(super) struct HubFile {
    uri: String,
    path: String,
    repository: Arc<ApiRepo>,
    folder: Arc<TempDir>,
}

/// Parts of a URI.
#[derive(Debug, PartialEq, Eq)]
struct Address<'a> {
    /// Up to the path, with a slash at its end.
    prefix: &'a str,
    repository: &'a str,
    revision: String,
    path: &'a str,
}

impl Hub {
    pub fn from_environment() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
        Self { endpoint: variable("HF_ENDPOINT"), token: variable("HF_TOKEN") }
    }

    /// The files that a URI means, by name.
    pub(super) async fn files(&self, uri: &str) -> Result<Vec<HubFile>, DataError> {
        let address = address(uri)?;
        let other = |error: &dyn std::fmt::Display| DataError::Other(format!("{uri}: {error}"));
        let folder = Arc::new(tempfile::tempdir().map_err(|error| other(&error))?);
        let mut builder = ApiBuilder::from_env()
            .with_cache_dir(folder.path().to_owned())
            .with_progress(false)
            .with_token(self.token.clone());
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
        }
        let api = builder.build().map_err(|error| other(&error))?;
        let repository =
            Repo::with_revision(address.repository.to_owned(), RepoType::Dataset, address.revision.clone());
        let repository = Arc::new(api.repo(repository));
        let paths = if is_pattern(address.path) {
            let matcher = matcher(uri, address.path)?;
            let info = repository.info().await.map_err(|error| explain(uri, &error))?;
            let mut paths: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
            paths.retain(|path| matcher.is_match(path));
            paths.sort();
            paths
        } else {
            vec![address.path.to_owned()]
        };
        if paths.is_empty() {
            return Err(nothing_matches(uri));
        }
        let file = |path: String| HubFile {
            uri: format!("{}{path}", address.prefix),
            path,
            repository: repository.clone(),
            folder: folder.clone(),
        };
        Ok(paths.into_iter().map(file).collect())
    }
}

impl HubFile {
    pub fn uri(&self) -> &str {
        &self.uri
    }

    pub async fn open(&self) -> Result<Opened, DataError> {
        let path = self.repository.download(&self.path).await.map_err(|error| explain(&self.uri, &error))?;
        let uri = self.uri.clone();
        let failed = move |error: std::io::Error| DataError::Other(format!("{uri}: the copy on disk: {error}"));
        // The client lays files down by their digest, and a link to it where the name is.
        let path = tokio::fs::canonicalize(path).await.map_err(&failed)?;
        let file = tokio::fs::File::open(&path).await.map_err(&failed)?;
        let size = file.metadata().await.map_err(&failed)?.len();
        // Nobody else reads it: the room is free again when the file is closed.
        tokio::fs::remove_file(&path).await.map_err(&failed)?;
        let folder = self.folder.clone();
        let bytes = stream::try_unfold((file, folder), move |(mut file, folder)| {
            let failed = failed.clone();
            async move {
                let mut chunk = vec![0; CHUNK];
                let read = file.read(&mut chunk).await.map_err(failed)?;
                chunk.truncate(read);
                Ok((read > 0).then(|| (Bytes::from(chunk), (file, folder))))
            }
        });
        Ok(Opened { size: Some(size), bytes: bytes.boxed() })
    }
}

fn address(uri: &str) -> Result<Address<'_>, DataError> {
    let parse = || {
        let rest = uri.strip_prefix("hf://datasets/")?;
        let (owner, rest) = rest.split_once('/')?;
        let (name, path) = rest.split_once('/')?;
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let is_given = [owner, name, revision, path].iter().all(|part| !part.is_empty());
        let repository_start = "hf://datasets/".len();
        is_given.then(|| Address {
            prefix: &uri[..uri.len() - path.len()],
            repository: &uri[repository_start..repository_start + owner.len() + 1 + name.len()],
            // A revision with slashes, such as refs/convert/parquet, is written with %2F.
            revision: revision.replace("%2F", "/").replace("%2f", "/"),
            path,
        })
    };
    parse().ok_or_else(|| {
        DataError::User(format!(
            "{uri}: has to be of the form hf://datasets/OWNER/NAME/PATH or hf://datasets/OWNER/NAME@REVISION/PATH"
        ))
    })
}

fn explain(uri: &str, error: &ApiError) -> DataError {
    if let ApiError::TooManyRetries(last) = error {
        return explain(uri, last);
    }
    if let ApiError::IoError(error) = error {
        return DataError::Other(format!("{uri}: the copy on disk: {error}"));
    }
    match status(error) {
        Some(401 | 403) => DataError::User(format!(
            "{uri}: access refused: the dataset is gated, private or not there; set HF_TOKEN to a token that may read it"
        )),
        Some(404) => DataError::User(format!("{uri}: nothing there")),
        _ => DataError::Other(format!("{uri}: the hub does not answer: {error}")),
    }
}

fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => error.status().map(|status| status.as_u16()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_not_the_hubs_fault() {
        let full = || ApiError::IoError(std::io::Error::from(std::io::ErrorKind::StorageFull));
        for error in [full(), ApiError::TooManyRetries(Box::new(full()))] {
            let DataError::Other(message) = explain("hf://datasets/a/b/c.csv", &error) else { panic!("{error}") };
            assert_eq!(message, "hf://datasets/a/b/c.csv: the copy on disk: no storage space");
        }
    }

    #[test]
    fn an_address_has_its_parts() {
        let uri = "hf://datasets/stanford/imdb@refs%2Fconvert%2Fparquet/plain/**/*.parquet";
        let parts = address(uri).unwrap();
        assert_eq!((parts.repository, parts.revision.as_str()), ("stanford/imdb", "refs/convert/parquet"));
        assert_eq!((parts.prefix.len() + parts.path.len(), parts.path), (uri.len(), "plain/**/*.parquet"));
        assert_eq!(address("hf://datasets/a/b/c.csv").unwrap().revision, "main");
        for uri in
            ["hf://datasets/a/b", "hf://datasets/a/b/", "hf://models/a/b/c", "hf://datasets/a/b@/c", "hf://a/b/c.csv"]
        {
            let error = address(uri).unwrap_err().to_string();
            assert!(error.contains("has to be of the form hf://datasets/OWNER/NAME/PATH"), "{error}");
        }
    }
}
