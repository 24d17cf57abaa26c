//! Predictions and feedback as events, through a sink that a configuration may add, change or take away while requests run.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use async_trait::async_trait;
use athanor_contract::{
    event::{Event, EventData, Generation, Prediction},
    serve::{EventsConfig, RouterConfig},
};
use athanor_feedback::{producer::Producer, signing::SharedKeys};
use tokio_util::sync::CancellationToken;

use crate::balance::endpoints::Registry;

/// How long a change of configuration or a shutdown waits for events to be sent or spilled.
const FLUSH: Duration = Duration::from_secs(9);
/// Between attempts to start a producer.
const RETRY: Duration = Duration::from_secs(2);

/// Where events go.
#[async_trait]
pub trait EventSink: Send + Sync + 'static {
    /// Takes an event without waiting; it may be dropped (and counted) when too many wait.
    fn publish(&self, event: Event);

    /// Returns once every event will survive this process; an error says why not.
    async fn publish_durable(&self, events: Vec<Event>) -> Result<(), String>;
}

#[async_trait]
impl EventSink for Producer {
    fn publish(&self, event: Event) {
        Producer::publish(self, event);
    }

    async fn publish_durable(&self, events: Vec<Event>) -> Result<(), String> {
        Producer::publish_durable(self, events).await.map_err(|error| error.to_string())
    }
}

/// The sink of the moment.
#[derive(Default)]
pub struct Events {
    sink: RwLock<Option<Arc<dyn EventSink>>>,
}

impl Events {
    pub fn set(&self, sink: Option<Arc<dyn EventSink>>) {
        *self.sink.write().unwrap_or_else(PoisonError::into_inner) = sink;
    }

    pub fn get(&self) -> Option<Arc<dyn EventSink>> {
        self.sink.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The CloudEvents source of a deployment.
pub fn source(config: &RouterConfig) -> String {
    format!("/athanor/{}/{}", config.namespace, config.deployment)
}

/// The event of one answer.
pub fn prediction(config: &RouterConfig, trace_parent: Option<String>, prediction: Prediction) -> Event {
    Event {
        id: format!("{}/{}", prediction.request_id, prediction.index),
        source: source(config),
        time: jiff::Timestamp::now().to_string(),
        trace_parent,
        data: EventData::Prediction(prediction),
    }
}

/// The event of one choice of a language model's answer.
pub fn generation(config: &RouterConfig, trace_parent: Option<String>, generation: Generation) -> Event {
    Event {
        id: format!("{}/{}", generation.request_id, generation.index),
        source: source(config),
        time: jiff::Timestamp::now().to_string(),
        trace_parent,
        data: EventData::Generation(generation),
    }
}

/// Keeps a producer running for the configured events until `shutdown`, then flushes it. `keys` sign the events.
pub async fn keep_producer(
    registry: Arc<Registry>,
    events: Arc<Events>,
    keys: Option<SharedKeys>,
    spill: PathBuf,
    shutdown: CancellationToken,
) {
    let mut snapshots = registry.subscribe();
    let mut running: Option<(EventsConfig, Producer, CancellationToken)> = None;
    loop {
        let wanted = snapshots.borrow_and_update().config.as_ref().and_then(|config| config.events.clone());
        // What is recorded may change without a new producer.
        let wanted = wanted.map(|events| EventsConfig::new(events.bootstrap_servers, events.topic));
        let mut retry = false;
        if running.as_ref().map(|(config, ..)| config) != wanted.as_ref() {
            events.set(None);
            if let Some((_, producer, token)) = running.take() {
                stop(producer, token).await;
            }
            if let Some(config) = wanted {
                let token = CancellationToken::new();
                match Producer::start(config.clone(), keys.clone(), spill.clone(), token.clone()) {
                    Ok(producer) => {
                        tracing::info!(topic = config.topic, "publishing events");
                        events.set(Some(Arc::new(producer.clone())));
                        running = Some((config, producer, token));
                    }
                    Err(error) => {
                        tracing::error!(%error, topic = config.topic, "events cannot be published");
                        retry = true;
                    }
                }
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => break,
            changed = snapshots.changed() => if changed.is_err() { break },
            () = tokio::time::sleep(RETRY), if retry => {}
        }
    }
    events.set(None);
    if let Some((_, producer, token)) = running {
        stop(producer, token).await;
    }
}

async fn stop(producer: Producer, token: CancellationToken) {
    token.cancel();
    if !producer.flush(FLUSH).await {
        tracing::warn!(
            seconds = FLUSH.as_secs(),
            "events were still being sent when the flush ended; the spill keeps them"
        );
    }
}
