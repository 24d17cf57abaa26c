//! Adapters of the engine's model: handles that keep them loaded, and which of them are in use.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::engine::backend::AdapterId;

/// An adapter that the engine's model has loaded. The model drops it when the last copy of this handle is gone; each
/// answer in progress has one.
#[derive(Clone)]
pub struct Adapter(Arc<Loaded>);

struct Loaded {
    id: AdapterId,
    name: Arc<str>,
    /// Seconds since the epoch.
    created: i64,
    unload: Box<dyn Fn(AdapterId) + Send + Sync>,
}

impl Adapter {
    /// `unload` is called once, when the last copy is dropped.
    pub(super) fn new(id: AdapterId, name: &str, unload: impl Fn(AdapterId) + Send + Sync + 'static) -> Self {
        let created = jiff::Timestamp::now().as_second();
        Self(Arc::new(Loaded { id, name: name.into(), created, unload: Box::new(unload) }))
    }

    pub fn id(&self) -> AdapterId {
        self.0.id
    }

    pub fn name(&self) -> &Arc<str> {
        &self.0.name
    }

    /// Seconds since the epoch at which it was loaded.
    pub fn created(&self) -> i64 {
        self.0.created
    }
}

impl PartialEq for Adapter {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}

impl std::fmt::Debug for Adapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Adapter").field(&self.0.id).field(&self.0.name).finish()
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        (self.unload)(self.id);
    }
}

/// Publishes vLLM's metric of the adapters in use, by which a Gateway API InferencePool chooses an endpoint.
pub(super) struct Usage {
    model: String,
    /// Largest number of adapters in one step.
    most: usize,
    /// Absent until an adapter is loaded.
    published: Option<Names>,
}

/// Names of the adapters of running and of waiting sequences.
type Names = (BTreeSet<Arc<str>>, BTreeSet<Arc<str>>);

impl Usage {
    /// `most`: largest number of sequences, and so of adapters, in one step.
    pub(super) fn new(model: &str, most: usize) -> Self {
        Self { model: model.to_owned(), most, published: None }
    }

    /// Publishes the metric from now on.
    pub(super) fn begin(&mut self) {
        if self.published.is_none() {
            self.publish(Names::default());
        }
    }

    /// Publishes the adapters of all sequences if they have changed. Each sequence has whether it runs, and its adapter.
    pub(super) fn record<'a>(&mut self, sequences: impl Iterator<Item = (bool, &'a Adapter)>) {
        let Some(published) = &self.published else { return };
        let mut names = Names::default();
        for (runs, adapter) in sequences {
            let names = if runs { &mut names.0 } else { &mut names.1 };
            if !names.contains(adapter.name()) {
                names.insert(adapter.name().clone());
            }
        }
        if names != *published {
            self.publish(names);
        }
    }

    fn publish(&mut self, names: Names) {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let (most, running, waiting) = (self.most.to_string(), joined(&names.0), joined(&names.1));
        let labels = [
            ("max_lora", most.as_str()),
            ("running_lora_adapters", running.as_str()),
            ("waiting_lora_adapters", waiting.as_str()),
        ];
        athanor_telemetry::publish_info(&self.model, "vllm:lora_requests_info", &labels, seconds);
        self.published = Some(names);
    }
}

fn joined(names: &BTreeSet<Arc<str>>) -> String {
    names.iter().map(|name| &**name).collect::<Vec<_>>().join(",")
}
