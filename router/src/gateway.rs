//! What HTTP and gRPC of the router share: the state of the process and what is recorded of an answer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use athanor_contract::{
    event::{GenerationInput, Prediction},
    redaction::Redaction,
    serve::RouterLimits,
};
use athanor_serving::capacity::Capacity;

use crate::{
    access::Access,
    adapter,
    analysis::Analysis,
    balance::{client::Client, endpoints::Registry},
    config::Configuration,
    record::{
        events::{self, EventSink, Events},
        generation::{Recorder, generations},
        labels::Labels,
        recent::{self, Answer, Recent},
        request_id::{RequestId, RequestIds},
    },
};

/// The state of a router process.
pub struct Gateway {
    pub registry: Arc<Registry>,
    pub client: Client,
    /// Memory for bodies.
    pub capacity: Capacity,
    pub ids: RequestIds,
    /// Absent: everyone may use the router.
    pub access: Option<Arc<Access>>,
    pub analysis: Arc<Analysis>,
    pub recent: Recent,
    pub events: Arc<Events>,
    pub labels: Arc<Labels>,
    /// Requests to language models, from their head to the end of their answer.
    pub running: RunningRequests,
}

/// Number of requests in progress.
#[derive(Clone, Default)]
pub struct RunningRequests(Arc<AtomicUsize>);

/// Counts a request while it lives.
pub struct Running(RunningRequests);

impl RunningRequests {
    pub fn begin(&self) -> Running {
        self.0.fetch_add(1, Ordering::Relaxed);
        Running(self.clone())
    }

    /// Resolves once no request is in progress.
    pub async fn ended(&self) {
        while self.count() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One answered request, to be recorded.
pub struct Answered {
    pub id: RequestId,
    pub revision: Arc<str>,
    pub texts: Vec<String>,
    /// Label and its probability, one for each text.
    pub results: Vec<(String, f32)>,
    pub latency: Duration,
}

impl Gateway {
    pub fn new(ids: RequestIds) -> Self {
        // A counter that has never counted is zero, not absent.
        let counters = [
            "athanor_router_events_lost_total",
            "athanor_router_events_taken_over_total",
            "athanor_router_retries_total",
        ];
        for name in counters {
            metrics::counter!(name).increment(0);
        }
        Self {
            registry: Arc::default(),
            client: Client::default(),
            capacity: Capacity::default(),
            ids,
            access: None,
            analysis: Arc::default(),
            recent: Recent::new(recent::CAPACITY),
            events: Arc::default(),
            labels: Arc::default(),
            running: RunningRequests::default(),
        }
    }

    pub fn limits(&self) -> RouterLimits {
        self.registry.snapshot().config.as_ref().map(|config| config.limits).unwrap_or_default()
    }

    /// How long a shutdown waits for requests in progress: longer while a language model is answering.
    pub fn drain(&self) -> Duration {
        let limits = self.limits();
        let longest = if self.running.count() > 0 { limits.max_request_seconds } else { 0 };
        Duration::from_secs(limits.drain_seconds.max(longest))
    }

    /// Whether answers are recorded at all.
    pub fn records(&self) -> Option<Arc<Configuration>> {
        self.registry.snapshot().config.clone().filter(|config| config.events.is_some())
    }

    /// Remembers an answer and publishes one event for each input; returns the id by which feedback to it is accepted. Waits
    /// for the events only if they have to be durable; if they cannot be kept then, no feedback to the answer is accepted.
    pub async fn record(&self, config: &Configuration, answered: Answered) -> Option<String> {
        let uuid = answered.id.uuid;
        if answered.texts.len() != answered.results.len() {
            tracing::warn!(
                revision = &*answered.revision,
                "an answer has not one result for each input and is not recorded"
            );
            return None;
        }
        let request_id = self.ids.prove(answered.id, answered.texts.len() as u32);
        let sink = self.sink(config, &answered.id);
        let trace_parent = athanor_telemetry::propagation::current_traceparent();
        let mut recorded = Vec::new();
        for ((index, mut text), (label, confidence)) in (0..).zip(answered.texts).zip(answered.results) {
            let answer = Answer { revision: answered.revision.clone(), label: label.as_str().into() };
            self.recent.insert((uuid, index), answer);
            if sink.is_none() {
                continue;
            }
            config.redaction.apply(&mut text);
            let prediction = Prediction {
                request_id: request_id.clone(),
                index,
                revision: answered.revision.to_string(),
                text,
                label,
                confidence,
                latency_ms: answered.latency.as_secs_f32() * 1e3,
            };
            recorded.push(events::prediction(config, trace_parent.clone(), prediction));
        }
        match sink {
            Some(sink) if config.events.as_ref().is_some_and(|events| events.durable_predictions) => {
                if let Err(error) = sink.publish_durable(recorded).await {
                    tracing::error!(error, "an answer could not be recorded and takes no feedback");
                    return None;
                }
            }
            Some(sink) => recorded.into_iter().for_each(|event| sink.publish(event)),
            None => {}
        }
        Some(request_id)
    }

    /// Remembers a language model's answer that is whole, and publishes one event for each choice. Never waits.
    pub fn record_generations(&self, recorder: Recorder, revision: &Arc<str>, latency: Duration) {
        let Recorder { config, id, request_id, request, answers, trace_parent } = recorder;
        let adapter = adapter::selected(&config.adapters, &request);
        let recorded = match generations(&request_id, revision, &request, answers, latency) {
            Ok(recorded) => recorded,
            Err(why) => {
                tracing::debug!(revision = &**revision, ?why, "an answer is not recorded");
                metrics::counter!("athanor_router_unrecorded_generations_total", "reason" => why.label()).increment(1);
                return;
            }
        };
        let sink = self.sink(&config, &id);
        for mut generation in recorded {
            // Feedback to what another adapter answered is not about the revision.
            if adapter.is_none() {
                let answer = Answer { revision: revision.clone(), label: "".into() };
                self.recent.insert((id.uuid, generation.index), answer);
            }
            let Some(sink) = &sink else { continue };
            generation.adapter = adapter.map(Into::into);
            config.redaction.apply(&mut generation.answer);
            for call in &mut generation.tool_calls {
                redact_value(&config.redaction, &mut call["function"]["arguments"]);
            }
            match &mut generation.input {
                GenerationInput::Messages(messages) => {
                    messages.iter_mut().for_each(|message| redact_value(&config.redaction, message));
                }
                GenerationInput::Prompt(prompt) => config.redaction.apply(prompt),
            }
            sink.publish(events::generation(&config, trace_parent.clone(), generation));
        }
    }

    /// Where the events of a request go; `None` if it is not in the sample, or if events are lost at the moment.
    fn sink(&self, config: &Configuration, id: &RequestId) -> Option<Arc<dyn EventSink>> {
        let percent = config.events.as_ref().map_or(0, |events| events.sample_percent);
        if !id.is_sampled(percent) {
            return None;
        }
        let sink = self.events.get();
        if sink.is_none() {
            metrics::counter!("athanor_router_events_lost_total").increment(1);
        }
        sink
    }
}

/// Redacts every text in a message, except for names of the protocol.
fn redact_value(redaction: &Redaction, value: &mut serde_json::Value) {
    match value {
        serde_json::Value::String(text) => redaction.apply(text),
        serde_json::Value::Array(values) => values.iter_mut().for_each(|value| redact_value(redaction, value)),
        serde_json::Value::Object(fields) => {
            for (name, value) in fields {
                if name != "role" && name != "type" {
                    redact_value(redaction, value);
                }
            }
        }
        _ => {}
    }
}
