//! What the sending and the replaying task share: the Kafka client, whether Kafka is up, and the spill.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use athanor_contract::{event::Event, serve::EventsConfig};
use rdkafka::{
    error::{KafkaError, RDKafkaErrorCode},
    producer::{DeliveryFuture, FutureProducer, FutureRecord, Producer as _},
};
use tokio::sync::{Notify, watch};

use crate::{
    cloudevents,
    kafka::{LogContext, client_config},
    signing::SharedKeys,
    spill::{Spill, SpillError},
};

/// Milliseconds after which librdkafka gives an event up. Longer than the sending task waits, so that a replay on a slow broker
/// does not produce everything twice.
const MESSAGE_TIMEOUT_MS: &str = "5000";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KafkaState {
    /// Not heard of yet.
    Unknown,
    Up,
    /// Events go to disk without asking Kafka.
    Down,
}

/// Why Kafka did not take an event.
#[derive(Debug)]
pub(super) enum SendError {
    /// It never will: the event itself is the reason.
    Refused(String),
    /// It may later.
    Unavailable(String),
}

#[derive(Debug)]
pub(super) struct Shared {
    pub config: EventsConfig,
    keys: Option<SharedKeys>,
    kafka: RwLock<Client>,
    state: watch::Sender<KafkaState>,
    spill: Arc<Mutex<Spill>>,
    /// Wakes the replaying task.
    pub spilled: Notify,
}

#[derive(Clone)]
struct Client(FutureProducer<LogContext>);

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Client")
    }
}

impl Shared {
    pub fn new(config: EventsConfig, keys: Option<SharedKeys>, spill: Spill) -> Result<Self, KafkaError> {
        let kafka = RwLock::new(connect(&config)?);
        metrics::gauge!("athanor_events_spill_bytes").set(spill.bytes() as f64);
        Ok(Self {
            config,
            keys,
            kafka,
            state: watch::Sender::new(KafkaState::Unknown),
            spill: Arc::new(Mutex::new(spill)),
            spilled: Notify::new(),
        })
    }

    pub fn state(&self) -> watch::Receiver<KafkaState> {
        self.state.subscribe()
    }

    pub fn is_up(&self) -> bool {
        *self.state.borrow() == KafkaState::Up
    }

    pub fn set_up(&self) {
        if self.state.send_replace(KafkaState::Up) != KafkaState::Up {
            tracing::info!(topic = self.config.topic, "Kafka takes events");
        }
    }

    pub fn set_down(&self, reason: &str) {
        if self.state.send_replace(KafkaState::Down) != KafkaState::Down {
            tracing::warn!(topic = self.config.topic, reason, "Kafka is away, events are kept on disk");
        }
        self.spilled.notify_one();
    }

    pub fn client(&self) -> FutureProducer<LogContext> {
        self.kafka.read().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Replaces an idempotent producer that lost its sequence for good: the protocol allows it no further event.
    pub fn replace_failed_client(&self) -> Result<(), KafkaError> {
        let fatal = self.client().client().fatal_error();
        if let Some((_, reason)) = fatal {
            tracing::warn!(reason, "the Kafka producer failed for good and is replaced");
            let client = connect(&self.config)?;
            *self.kafka.write().unwrap_or_else(PoisonError::into_inner) = client;
        }
        Ok(())
    }

    /// Hands an event to librdkafka; the future ends when Kafka answered or the message timeout passed.
    pub fn send(&self, event: &Event) -> Result<DeliveryFuture, SendError> {
        let keys = self.keys.as_ref().map(SharedKeys::get);
        let record =
            cloudevents::encode(event, keys.as_ref()).map_err(|error| SendError::Refused(error.to_string()))?;
        let future_record =
            FutureRecord::to(&self.config.topic).key(&record.key).payload(&record.payload).headers(record.headers);
        self.client().send_result(future_record).map_err(|(error, _)| classify(&error))
    }

    /// Appends events to the spill, off the async threads.
    pub async fn append(&self, events: Vec<Event>) -> (Vec<Event>, Result<(), SpillError>) {
        self.with_spill(move |spill| {
            let result = spill.append(&events);
            (events, result)
        })
        .await
    }

    /// Runs `work` on the spill, off the async threads.
    pub async fn with_spill<T: Send + 'static>(&self, work: impl FnOnce(&mut Spill) -> T + Send + 'static) -> T {
        let spill = self.spill.clone();
        let task = tokio::task::spawn_blocking(move || {
            let mut spill: MutexGuard<'_, Spill> = spill.lock().unwrap_or_else(PoisonError::into_inner);
            let result = work(&mut spill);
            metrics::gauge!("athanor_events_spill_bytes").set(spill.bytes() as f64);
            result
        });
        match task.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Blocking work is cancelled only when the runtime goes away, and this task with it.
            Err(_) => std::future::pending().await,
        }
    }
}

/// What the answer to one event means.
pub(super) fn classify(error: &KafkaError) -> SendError {
    match error.rdkafka_error_code() {
        Some(
            RDKafkaErrorCode::MessageSizeTooLarge | RDKafkaErrorCode::InvalidMessage | RDKafkaErrorCode::InvalidRecord,
        ) => SendError::Refused(error.to_string()),
        _ => SendError::Unavailable(error.to_string()),
    }
}

fn connect(config: &EventsConfig) -> Result<Client, KafkaError> {
    client_config(&config.bootstrap_servers)
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("message.timeout.ms", MESSAGE_TIMEOUT_MS)
        .set("linger.ms", "5")
        .set("compression.type", "lz4")
        // The Java clients' partitioner, so that any producer puts a request's events into one partition.
        .set("partitioner", "murmur2_random")
        .create_with_context(LogContext)
        .map(Client)
}
