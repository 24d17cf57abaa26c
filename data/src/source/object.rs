//! Files in object stores, by HTTP and in folders: everything that `athanor_store` opens.

use std::time::Duration;

use athanor_store::Location;
use backon::{ExponentialBuilder, Retryable};
use futures::{StreamExt, TryStreamExt};
use reqwest::{Client, StatusCode};

use super::{
    opened::Opened,
    pattern::{divide, matcher, nothing_matches},
};
use crate::DataError;

/// The error of the store's client for an answer without a length.
const NO_LENGTH: &str = "Content-Length Header missing";
/// Pauses after failures to open a web address that the store's client does not open: a second, then two, and so on.
const RETRIES: usize = 3;

pub(super) struct Object {
    location: Location,
    /// Size in bytes as listed.
    size: Option<u64>,
    /// A web address with a query, which the store's client would leave out. The query may be a secret: no message has
    /// it.
    url: Option<String>,
}

impl Object {
    pub fn at(uri: &str) -> Result<Self, DataError> {
        let shown = without_query(uri);
        let url = (shown != uri).then(|| uri.to_owned());
        Ok(Self { location: athanor_store::open(shown)?, size: None, url })
    }

    pub fn uri(&self) -> &str {
        &self.location.uri
    }

    pub fn size(&self) -> Option<u64> {
        self.size
    }

    pub async fn open(&self) -> Result<Opened, DataError> {
        let location = &self.location;
        if let Some(url) = &self.url {
            return open_url(url, &location.uri).await;
        }
        let found = match location.store.get_opts(&location.path, Default::default()).await {
            Ok(found) => found,
            Err(error) if location.uri.starts_with("http") && error.to_string().contains(NO_LENGTH) => {
                return open_url(&location.uri, &location.uri).await;
            }
            Err(error) => return Err(explain(location, &error.to_string()).await),
        };
        let uri = location.uri.clone();
        Ok(Opened {
            size: Some(found.meta.size),
            bytes: found.into_stream().map_err(move |error| broken(&uri, &error)).boxed(),
        })
    }
}

/// The objects that match a pattern, by name.
pub(super) async fn matching(uri: &str) -> Result<Vec<Object>, DataError> {
    let (folder, pattern) = divide(uri);
    let matcher = matcher(uri, pattern)?;
    // A folder of another's root keeps its slash: `file://` alone is no URI.
    let folder = if folder.trim_end_matches('/').ends_with(':') { folder } else { folder.trim_end_matches('/') };
    let folder = if folder == "file://" { "file:///" } else { folder };
    let base = athanor_store::open(folder)?;
    let listed = if pattern.contains('/') || pattern.contains("**") {
        base.store.list(Some(&base.path)).try_collect::<Vec<_>>().await
    } else {
        base.store.list_with_delimiter(Some(&base.path)).await.map(|found| found.objects)
    };
    let listed = match listed {
        Ok(listed) => listed,
        Err(error) => {
            return Err(match base.list().await {
                Err(error) => error.into(),
                Ok(_) => broken(&base.uri, &error),
            });
        }
    };
    let prefix = format!("{}/", base.path);
    let mut objects: Vec<Object> = listed
        .into_iter()
        .filter_map(|object| {
            let path = object.location.to_string();
            let name = if base.path.as_ref().is_empty() { &path } else { path.strip_prefix(&prefix)? };
            let uri = format!("{}/{name}", folder.trim_end_matches('/'));
            let location = Location { store: base.store.clone(), path: object.location.clone(), uri };
            matcher.is_match(name).then_some(Object { location, size: Some(object.size), url: None })
        })
        .collect();
    if objects.is_empty() {
        return Err(nothing_matches(uri));
    }
    objects.sort_by(|a, b| a.uri().cmp(b.uri()));
    Ok(objects)
}

/// A web address without its query.
pub(super) fn without_query(uri: &str) -> &str {
    uri.split_once('?').filter(|_| uri.starts_with("http")).map_or(uri, |(place, _)| place)
}

/// A body that may come in chunks, as servers send generated content: its end shows that it is complete.
/// `uri` is for messages.
async fn open_url(url: &str, uri: &str) -> Result<Opened, DataError> {
    let failed = |error: reqwest::Error| broken(uri, &error.without_url());
    let client = Client::builder()
        .connect_timeout(Duration::from_secs(10))
        .read_timeout(Duration::from_secs(60))
        .build()
        .map_err(failed)?;
    // A request that fails before its first byte is tried again, as the store's client does.
    let passes = |status: StatusCode| {
        status.is_server_error() || [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS].contains(&status)
    };
    let ask = async || match client.get(url).send().await {
        Ok(answer) if passes(answer.status()) => answer.error_for_status(),
        answer => answer,
    };
    let answer = ask.retry(ExponentialBuilder::default().with_max_times(RETRIES)).await.map_err(failed)?;
    if answer.status().is_client_error() {
        return Err(DataError::User(format!("{uri}: the server answers {}", answer.status())));
    }
    let answer = answer.error_for_status().map_err(failed)?;
    let uri = uri.to_owned();
    Ok(Opened {
        size: answer.content_length(),
        bytes: answer.bytes_stream().map_err(move |error| broken(&uri, &error.without_url())).boxed(),
    })
}

/// The store's own word for why an object is not to be had: whether the user or time can mend it. It is asked once
/// more, unless the client has tried again and again already, which is an outage.
async fn explain(location: &Location, error: &str) -> DataError {
    if !error.contains(" retries")
        && let Err(error) = location.version().await
    {
        return error.into();
    }
    broken(&location.uri, &error)
}

fn broken(uri: &str, error: &impl std::fmt::Display) -> DataError {
    let error: Vec<String> = error.to_string().split_whitespace().map(str::to_owned).collect();
    let error: String = error.join(" ").chars().take(500).collect();
    DataError::Other(format!("{uri}: the store does not answer: {error}"))
}
