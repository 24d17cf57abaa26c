//! Events on the disk of a router whose pod ends while Kafka is away. The disk goes with the pod, so another router of
//! the deployment takes them before the process ends.
//!
//! A router of a new pod is ready before one of an old pod ends, so that an update of the Deployment, an eviction or a
//! drain of a node finds a router that takes the events. Pods keep their surge that way, which those of a StatefulSet
//! with a volume each do not have: there an update would leave a deployment of one router without any.

use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use athanor_contract::{
    event::Event,
    hexadecimal,
    process::{HAND_OVER_SECONDS, path},
    serve::EventsConfig,
};
use athanor_feedback::{
    producer::Producer,
    signing::{LENGTH, Purpose, SharedKeys},
    spill,
};
use athanor_serving::capacity::Capacity;
use axum::{
    Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, State},
    http::{HeaderMap, Method, Request, StatusCode},
    routing::post,
};
use tokio_util::sync::CancellationToken;

use crate::{balance::client::Client, gateway::Gateway};

/// Header with the signature of the body, in hexadecimal digits.
const SIGNATURE: &str = "x-athanor-signature";
/// Most bytes of a request: a segment of 8 MiB and the events of one more fsync.
pub const LARGEST: usize = 128 << 20;
/// Most bytes of the answer to it.
const ANSWER: usize = 1 << 20;
/// Time limit of a request.
const REQUEST: Duration = Duration::from_secs(15);
/// Time in which Kafka is tried between two attempts at the other routers.
const KAFKA: Duration = Duration::from_secs(6);

struct Receiver {
    gateway: Arc<Gateway>,
    keys: SharedKeys,
}

/// The route by which a router takes the events of another one, for the ops port.
pub fn routes(gateway: Arc<Gateway>, keys: SharedKeys) -> Router {
    Router::new()
        .route(path::HAND_OVER, post(take))
        .layer(DefaultBodyLimit::max(LARGEST))
        .with_state(Arc::new(Receiver { gateway, keys }))
}

/// Answers 204 once every event is in Kafka or on this router's disk.
async fn take(
    State(receiver): State<Arc<Receiver>>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<StatusCode, (StatusCode, String)> {
    let signature = headers.get(SIGNATURE).and_then(|value| hexadecimal::decode(value.to_str().ok()?));
    let is_ours =
        signature.is_some_and(|it: [u8; LENGTH]| receiver.keys.get().verify(Purpose::HandOver, &[&body], &it));
    if !is_ours {
        return Err((StatusCode::FORBIDDEN, "not signed by a router of this deployment".into()));
    }
    let events: Vec<Event> =
        serde_json::from_slice(&body).map_err(|error| (StatusCode::BAD_REQUEST, error.to_string()))?;
    let away = |message: String| (StatusCode::SERVICE_UNAVAILABLE, message);
    let sink = receiver.gateway.events.get().ok_or_else(|| away("this router publishes no events".into()))?;
    let count = events.len();
    sink.publish_durable(events).await.map_err(away)?;
    metrics::counter!("athanor_router_events_taken_over_total").increment(count as u64);
    tracing::info!(count, "took the events of a router that ends");
    Ok(StatusCode::NO_CONTENT)
}

/// What handing over requires.
pub struct Sender {
    pub client: Client,
    pub keys: SharedKeys,
    pub events: EventsConfig,
}

impl Sender {
    /// Gives the events in the folder `dir`, which no producer uses any more, to one of `peers` or to Kafka, whichever is
    /// there first, for at most [`HAND_OVER_SECONDS`].
    pub async fn run(&self, dir: &Path, peers: impl AsyncFn() -> Vec<SocketAddr>) {
        let deadline = Instant::now() + Duration::from_secs(HAND_OVER_SECONDS);
        loop {
            let result = spill::hand_over(dir, async |events| self.give(&peers().await, &events).await).await;
            match result {
                Ok(0) => return,
                Ok(count) => return tracing::info!(count, "another router has the events that waited for Kafka"),
                Err(reason) if Instant::now() >= deadline => {
                    return tracing::error!(
                        reason,
                        "events on this router's disk were not taken and are lost with its pod"
                    );
                }
                Err(reason) => tracing::warn!(reason, "events wait for Kafka or another router"),
            }
            self.try_kafka(dir).await;
        }
    }

    /// Sends the events to the first of the routers that takes them.
    pub(crate) async fn give(&self, peers: &[SocketAddr], events: &[Event]) -> Result<(), String> {
        let body: Bytes = serde_json::to_vec(events).map_err(|error| error.to_string())?.into();
        let signature = hexadecimal::encode(&self.keys.get().sign(Purpose::HandOver, &[&body]));
        let capacity = Capacity::new(ANSWER);
        let mut reason = "no other router is ready".to_owned();
        for peer in peers {
            let request = Request::builder()
                .method(Method::POST)
                .uri(format!("http://{peer}{}", path::HAND_OVER))
                .header(SIGNATURE, &signature)
                .body(Body::from(body.clone()))
                .map_err(|error| error.to_string())?;
            reason = match tokio::time::timeout(REQUEST, self.client.send(request, ANSWER, &capacity)).await {
                Ok(Ok(response)) if response.status() == StatusCode::NO_CONTENT => return Ok(()),
                Ok(Ok(response)) => format!("{peer}: status {}", response.status()),
                Ok(Err(error)) => format!("{peer}: {error:?}"),
                Err(_) => format!("{peer}: no answer within {} s", REQUEST.as_secs()),
            };
        }
        Err(reason)
    }

    /// Starts a producer for a moment: it sends what is on disk if Kafka is back.
    async fn try_kafka(&self, dir: &Path) {
        let shutdown = CancellationToken::new();
        match Producer::start(self.events.clone(), Some(self.keys.clone()), dir.to_owned(), shutdown.clone()) {
            Ok(producer) => {
                shutdown.cancel();
                producer.flush(KAFKA).await;
            }
            Err(error) => {
                tracing::warn!(%error, "Kafka cannot be tried again");
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}
