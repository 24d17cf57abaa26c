//! The adapters that a server has: those of its configuration, and those of a file next to it, which is read again every
//! two seconds. In Kubernetes the file is mounted from a ConfigMap. There is no route that loads an adapter: what a server
//! answers with is decided by who configures it, and never by who asks it.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use athanor_contract::serve::{AdapterConfig, AdaptersFile};
use athanor_serving::service::Service;

use crate::adapter;

/// Pause between two looks at the file.
const PAUSE: Duration = Duration::from_secs(2);
/// Pauses before an adapter that could not be loaded is tried again: the first one doubles up to the longest.
const FIRST_RETRY: Duration = Duration::from_secs(4);
const LONGEST_RETRY: Duration = Duration::from_secs(120);

/// Keeps the adapters of a service as its configuration and the file have them.
pub struct Adapters {
    service: Arc<Service>,
    file: PathBuf,
    /// Those of the configuration, which stay.
    configured: Vec<AdapterConfig>,
    /// URI of each loaded adapter.
    loaded: BTreeMap<String, String>,
    failed: BTreeMap<AdapterConfig, Retry>,
    /// Why the file could not be read the last time, so that it is reported once.
    unreadable: Option<String>,
}

struct Retry {
    at: Instant,
    pause: Duration,
}

impl Adapters {
    /// Loads the adapters of the configuration, and those of the file that can be used.
    ///
    /// # Errors
    /// An adapter of the configuration cannot be used.
    pub async fn start(service: Arc<Service>, configured: Vec<AdapterConfig>, file: PathBuf) -> anyhow::Result<Self> {
        failures().increment(0);
        let mut loaded = BTreeMap::new();
        for config in &configured {
            if loaded.insert(config.name.clone(), config.uri.clone()).is_some() {
                bail!("adapters: two have the name {:?}", config.name);
            }
            let done = load(&service, config).await;
            done.inspect_err(|_| failures().increment(1)).with_context(|| format!("adapter {}", config.name))?;
        }
        let (failed, unreadable) = (BTreeMap::new(), None);
        let mut adapters = Self { service, file, configured, loaded, failed, unreadable };
        adapters.sync(Instant::now()).await;
        Ok(adapters)
    }

    /// Follows the file until `shutdown`.
    pub async fn run(mut self, shutdown: impl Future<Output = ()>) {
        tokio::select! {
            () = shutdown => {}
            () = self.follow() => {}
        }
    }

    async fn follow(&mut self) {
        loop {
            tokio::time::sleep(PAUSE).await;
            self.sync(Instant::now()).await;
        }
    }

    /// Unloads what is gone from the file, and loads what is new.
    async fn sync(&mut self, now: Instant) {
        let wanted = match read(&self.file).await {
            Ok(wanted) => wanted,
            Err(error) => {
                let error = format!("{error:#}");
                if self.unreadable.as_ref() != Some(&error) {
                    tracing::error!(error, "the adapters stay as they are");
                    failures().increment(1);
                    self.unreadable = Some(error);
                }
                return;
            }
        };
        self.unreadable = None;
        self.failed.retain(|config, _| wanted.contains(config));
        let is_kept = |name: &str| wanted.iter().chain(&self.configured).any(|config| config.name == name);
        let gone: Vec<String> = self.loaded.keys().filter(|name| !is_kept(name)).cloned().collect();
        for name in gone {
            self.service.unload_adapter(&name);
            self.loaded.remove(&name);
            tracing::info!(adapter = name, "adapter unloaded");
        }
        let mut is_new = false;
        for (index, config) in wanted.iter().enumerate() {
            let is_loaded = self.loaded.get(&config.name) == Some(&config.uri);
            if is_loaded || self.failed.get(config).is_some_and(|retry| retry.at > now) {
                continue;
            }
            let is_taken = self.configured.iter().chain(&wanted[..index]).any(|other| other.name == config.name);
            let done = match is_taken {
                true => Err(anyhow::anyhow!("another adapter has this name")),
                false => load(&self.service, config).await,
            };
            match done {
                Ok(()) => {
                    self.failed.remove(config);
                    self.loaded.insert(config.name.clone(), config.uri.clone());
                    is_new = true;
                }
                Err(error) => self.report(config, &error, now),
            }
        }
        if is_new {
            // Beside the model's thread: it may take longer than a step.
            let _ = tokio::task::spawn_blocking(athanor_cpu::release_free_memory).await;
        }
    }

    fn report(&mut self, config: &AdapterConfig, error: &anyhow::Error, now: Instant) {
        failures().increment(1);
        let pause = self.failed.get(config).map_or(FIRST_RETRY, |retry| (retry.pause * 2).min(LONGEST_RETRY));
        tracing::error!(
            adapter = config.name,
            uri = config.uri,
            error = format!("{error:#}"),
            retry_seconds = pause.as_secs(),
            "an adapter cannot be loaded; the others stay"
        );
        self.failed.insert(config.clone(), Retry { at: now + pause, pause });
    }
}

fn failures() -> metrics::Counter {
    metrics::counter!("athanor_server_adapter_load_failures_total")
}

/// The adapters of the file; none without it.
async fn read(file: &Path) -> anyhow::Result<Vec<AdapterConfig>> {
    let text = match tokio::fs::read_to_string(file).await {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| file.display().to_string()),
    };
    let parsed: AdaptersFile = serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(&text))
        .map_err(|error| anyhow::anyhow!("{}, {}: {}", file.display(), error.path(), error.inner()))?;
    Ok(parsed.adapters)
}

/// Fetches an adapter and gives it to the model. The files are removed when it is in memory.
async fn load(service: &Service, config: &AdapterConfig) -> anyhow::Result<()> {
    let started = Instant::now();
    let folder = tempfile::tempdir().context("making a temporary folder")?;
    let location = athanor_store::open(&config.uri)?;
    athanor_store::download_adapter(&location, folder.path()).await?;
    let path = folder.path().to_owned();
    let weights = tokio::task::spawn_blocking(move || adapter::read(&path)).await?;
    let weights = weights.with_context(|| config.uri.clone())?;
    let modules = weights.modules.len();
    service.load_adapter(&config.name, weights).await.with_context(|| config.uri.clone())?;
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(adapter = config.name, uri = config.uri, modules, seconds, "adapter loaded");
    Ok(())
}

#[cfg(test)]
#[path = "adapters_tests.rs"]
mod tests;
