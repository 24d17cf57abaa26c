//! What HTTP and gRPC of the router share: the state of the process and what is recorded of an answer.

use std::{sync::Arc, time::Duration};

use athanor_contract::{
    event::Prediction,
    serve::{RouterConfig, RouterLimits},
};

use crate::{
    analysis::Analysis,
    balance::{client::Client, endpoints::Registry},
    record::{
        events::{self, Events},
        labels::Labels,
        recent::{self, Answer, Recent},
        request_id::{RequestId, RequestIds},
    },
};

/// The state of a router process.
pub struct Gateway {
    pub registry: Arc<Registry>,
    pub client: Client,
    pub ids: RequestIds,
    pub analysis: Arc<Analysis>,
    pub recent: Recent,
    pub events: Arc<Events>,
    pub labels: Arc<Labels>,
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
        for name in ["athanor_router_events_lost_total", "athanor_router_retries_total"] {
            metrics::counter!(name).increment(0);
        }
        Self {
            registry: Arc::default(),
            client: Client::default(),
            ids,
            analysis: Arc::default(),
            recent: Recent::new(recent::CAPACITY),
            events: Arc::default(),
            labels: Arc::default(),
        }
    }

    pub fn limits(&self) -> RouterLimits {
        self.registry.snapshot().config.as_ref().map(|config| config.limits).unwrap_or_default()
    }

    /// Whether answers are recorded at all.
    pub fn records(&self) -> Option<Arc<RouterConfig>> {
        self.registry.snapshot().config.clone().filter(|config| config.events.is_some())
    }

    /// Remembers an answer and publishes one event for each input. Never waits.
    pub fn record(&self, config: &RouterConfig, answered: Answered) {
        let Ok(uuid) = self.ids.verify(&answered.id.text) else { return };
        if answered.texts.len() != answered.results.len() {
            tracing::warn!(
                revision = &*answered.revision,
                "an answer has not one result for each input and is not recorded"
            );
            return;
        }
        let sink = self.events.get();
        let trace_parent = athanor_telemetry::propagation::current_traceparent();
        for ((index, text), (label, confidence)) in (0..).zip(answered.texts).zip(answered.results) {
            let answer = Answer { revision: answered.revision.clone(), label: label.as_str().into() };
            self.recent.insert((uuid, index), answer);
            let Some(sink) = &sink else {
                metrics::counter!("athanor_router_events_lost_total").increment(1);
                continue;
            };
            let prediction = Prediction {
                request_id: answered.id.text.clone(),
                index,
                revision: answered.revision.to_string(),
                text,
                label,
                confidence,
                latency_ms: answered.latency.as_secs_f32() * 1e3,
            };
            sink.publish(events::prediction(config, trace_parent.clone(), prediction));
        }
    }
}
