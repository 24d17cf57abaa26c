//! Asks a pod by HTTP for a JSON document.

use std::time::Duration;

use serde::de::DeserializeOwned;

const TIMEOUT: Duration = Duration::from_secs(2);
/// Most bytes of an answer. A router's counts have a few hundred for each revision, a server's list of models for each
/// adapter.
const MOST_BYTES: usize = 1 << 20;

/// Why a pod's answer could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    #[error("the answer has more than {MOST_BYTES} bytes")]
    TooLong,
    #[error(transparent)]
    Format(#[from] serde_json::Error),
}

/// Returns the client for pods. It follows no redirect, which could send the operator anywhere, and uses no proxy.
///
/// # Errors
/// The process has no cryptography, which the Kubernetes client chooses.
pub fn client() -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build()
}

/// Reads the document at a path of a pod's port.
///
/// # Errors
/// The pod does not answer in time, or with something else.
pub async fn ask<T: DeserializeOwned>(
    http: &reqwest::Client,
    address: &str,
    port: u16,
    path: &str,
) -> Result<T, Unreadable> {
    let host = if address.contains(':') { format!("[{address}]") } else { address.into() };
    let url = format!("http://{host}:{port}{path}");
    let mut response = http.get(url).timeout(TIMEOUT).send().await?.error_for_status()?;
    let mut bytes = Vec::new();
    // Checked as it arrives: an answer without an end must not fill the memory.
    while let Some(chunk) = response.chunk().await? {
        if bytes.len() + chunk.len() > MOST_BYTES {
            return Err(Unreadable::TooLong);
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
#[path = "ask_tests.rs"]
mod tests;
