//! The router against real local servers that die, stall and refuse.

mod access;
mod adapters;
mod counts;
mod foreign;
mod full;
mod generations;
mod grpc;
mod hand_over;
mod headers;
mod paths;
mod playground;
mod streams;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use athanor_contract::{
    event::{Event, EventData},
    serve::{EventsConfig, RouterConfig, RouterLimits, RouterRevision},
};
use athanor_serving::{
    api::inference::{
        Inference,
        protocol::{
            InferTensorContents, ModelInferRequest, ModelMetadataRequest, ServerReadyRequest,
            grpc_inference_service_client::GrpcInferenceServiceClient,
            grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer},
            model_infer_request::InferInputTensor,
        },
        tensors,
    },
    test_support,
};
use axum::{
    Json, Router,
    body::{Body, to_bytes},
    http::{Method, Request, StatusCode, request::Builder},
    response::IntoResponse,
    routing::{get, post},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::{
    balance::endpoints::Address,
    gateway::Gateway,
    proxy::{grpc::Passing, http::app},
    record::{events::EventSink, request_id::RequestIds},
};

/// A server that answers every input with "good" and counts its requests, until its token is cancelled.
async fn server(address: SocketAddr, status: StatusCode) -> (SocketAddr, Arc<AtomicUsize>, CancellationToken) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let classify = post(async move |Json(request): Json<Value>| {
        counted.fetch_add(1, Ordering::Relaxed);
        if status != StatusCode::OK {
            return status.into_response();
        }
        let count = request["input"].as_array().map_or(1, Vec::len);
        let data: Vec<Value> = (0..count)
            .map(|index| json!({"index": index, "label": "good", "score": 0.9, "probabilities": []}))
            .collect();
        Json(json!({"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 1, "total_tokens": 1}}))
            .into_response()
    });
    let models = get(Json(
        json!({"object": "list", "data": [{"id": "m", "object": "model", "created": 0, "owned_by": "athanor",
        "labels": ["good", "bad"]}]}),
    ));
    let (address, stop) =
        serve(address, Router::new().route("/v1/classify", classify).route("/v1/models", models)).await;
    (address, count, stop)
}

/// Serves an application until its token is cancelled.
async fn serve(address: SocketAddr, app: Router) -> (SocketAddr, CancellationToken) {
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    tokio::spawn(async move {
        // Dropped at once, connections included: the server is killed, not asked to go.
        let mut connections = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                () = stopped.cancelled() => return,
                accepted = listener.accept() => {
                    let stream = hyper_util::rt::TokioIo::new(accepted.unwrap().0);
                    let service = hyper_util::service::TowerToHyperService::new(app.clone());
                    connections.spawn(async move {
                        let server = hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
                        let _ = server.serve_connection(stream, service).await;
                    });
                }
            }
        }
    });
    (address, stop)
}

async fn healthy() -> (SocketAddr, Arc<AtomicUsize>, CancellationToken) {
    server(([127, 0, 0, 1], 0).into(), StatusCode::OK).await
}

/// An address where nothing listens.
async fn nobody() -> SocketAddr {
    tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

fn config(weights: &[(&str, u32)]) -> RouterConfig {
    let revisions = weights
        .iter()
        .map(|(name, weight)| RouterRevision {
            name: (*name).into(),
            service: (*name).into(),
            weight: *weight,
            adapter: None,
        })
        .collect();
    let limits = RouterLimits { request_timeout_seconds: 8, ..RouterLimits::default() };
    RouterConfig {
        namespace: "n".into(),
        deployment: "d".into(),
        revisions,
        adapters: Vec::new(),
        events: None,
        limits,
        playground: false,
    }
}

fn gateway(config: RouterConfig, endpoints: &[(&str, &[SocketAddr])]) -> Arc<Gateway> {
    Arc::new(unshared(config, endpoints))
}

fn unshared(config: RouterConfig, endpoints: &[(&str, &[SocketAddr])]) -> Gateway {
    let gateway = Gateway::new(RequestIds::random());
    gateway.registry.set_config(crate::config::check(config).unwrap());
    for (service, addresses) in endpoints {
        let addresses = addresses.iter().map(|&http| Address { http, grpc: None, draining: false });
        gateway.registry.set_endpoints(service, addresses.collect());
    }
    gateway
}

async fn send(gateway: &Arc<Gateway>, request: Builder, body: &str) -> (axum::http::response::Parts, Value) {
    let request: Request<Body> = request.body(body.to_owned().into()).unwrap();
    let (parts, body) = app(gateway.clone()).oneshot(request).await.unwrap().into_parts();
    let bytes = to_bytes(body, 1 << 20).await.unwrap();
    (parts, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

fn classify() -> Builder {
    Request::builder().method(Method::POST).uri("/v1/classify").header("content-type", "application/json")
}

#[tokio::test]
async fn a_killed_server_fails_no_request() {
    let (one, first, kill) = healthy().await;
    let (two, second, _two) = healthy().await;
    let gateway = gateway(config(&[("a", 100)]), &[("a", &[one, two])]);
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let gateway = gateway.clone();
            tokio::spawn(async move {
                let mut statuses = Vec::new();
                for _ in 0..50 {
                    statuses.push(send(&gateway, classify(), r#"{"input": "x"}"#).await.0.status);
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                statuses
            })
        })
        .collect();
    while first.load(Ordering::Relaxed) < 50 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    kill.cancel();
    for client in clients {
        let statuses = client.await.unwrap();
        assert!(statuses.iter().all(|status| *status == StatusCode::OK), "{statuses:?}");
    }
    assert!(second.load(Ordering::Relaxed) > 200);
    let analysis = gateway.analysis.read();
    let counted = &analysis.revisions["a"];
    assert_eq!((counted.requests, counted.errors), (400, 0), "the revision has answered each of them");
}

#[tokio::test]
async fn what_another_endpoint_can_answer_is_retried() {
    let (good, _, _good) = healthy().await;
    for status in [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS, StatusCode::BAD_GATEWAY] {
        let (bad, asked, _bad) = server(([127, 0, 0, 1], 0).into(), status).await;
        let gateway = gateway(config(&[("a", 100)]), &[("a", &[bad, good])]);
        for _ in 0..10 {
            assert_eq!(send(&gateway, classify(), r#"{"input": "x"}"#).await.0.status, StatusCode::OK, "{status}");
        }
        assert!(asked.load(Ordering::Relaxed) > 0, "{status}: the bad server was never asked, so nothing was shown");
    }
    // A server that is merely busy is not asked again when it is alone, and its own answer comes back.
    let (busy, asked, _busy) = server(([127, 0, 0, 1], 0).into(), StatusCode::TOO_MANY_REQUESTS).await;
    let alone = gateway(config(&[("a", 100)]), &[("a", &[busy])]);
    assert_eq!(send(&alone, classify(), r#"{"input": "x"}"#).await.0.status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    // While both are busy a request asks one of them, and after a while the other one as well.
    let (other, others, _other) = server(([127, 0, 0, 1], 0).into(), StatusCode::TOO_MANY_REQUESTS).await;
    let full = gateway(config(&[("a", 50), ("b", 50)]), &[("a", &[busy]), ("b", &[other])]);
    let counts = || asked.load(Ordering::Relaxed) + others.load(Ordering::Relaxed);
    let refuse = async || send(&full, classify(), r#"{"input": "x"}"#).await.0.status;
    let before = counts();
    assert_eq!(refuse().await, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(counts() - before, 2);
    let (before, begin) = (counts(), Instant::now());
    for _ in 0..10 {
        assert_eq!(refuse().await, StatusCode::TOO_MANY_REQUESTS);
    }
    assert!(counts() - before == 10 || begin.elapsed() > Duration::from_millis(50), "{}", counts() - before);
    tokio::time::sleep(Duration::from_millis(150)).await;
    let before = counts();
    assert_eq!(refuse().await, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(counts() - before, 2);
    // A 500 is the answer: another server would say the same.
    let (broken, asked, _broken) = server(([127, 0, 0, 1], 0).into(), StatusCode::INTERNAL_SERVER_ERROR).await;
    let broken = gateway(config(&[("a", 100)]), &[("a", &[broken, good])]);
    while asked.load(Ordering::Relaxed) == 0 {
        let status = send(&broken, classify(), r#"{"input": "x"}"#).await.0.status;
        assert!(status == StatusCode::OK || asked.load(Ordering::Relaxed) == 1, "{status}");
    }
    assert_eq!(broken.analysis.read().revisions["a"].errors, 1);
}

#[tokio::test]
async fn a_request_waits_for_an_endpoint_and_gives_up_after_five_seconds() {
    let (address, _, _server) = healthy().await;
    let gateway = gateway(config(&[("a", 100)]), &[("a", &[])]);
    let mut waiting = Box::pin(send(&gateway, classify(), r#"{"input": "x"}"#));
    // Nothing of the request is still to come, so it waits for an endpoint.
    assert!(futures::poll!(&mut waiting).is_pending());
    gateway.registry.set_endpoints("a", vec![Address { http: address, grpc: None, draining: false }]);
    assert_eq!(waiting.await.0.status, StatusCode::OK);

    // The only server starts again: it refuses for longer than the retries would last, then answers.
    let (starting, refused, _starting) = server(([127, 0, 0, 1], 0).into(), StatusCode::SERVICE_UNAVAILABLE).await;
    gateway.registry.set_endpoints("a", vec![Address { http: starting, grpc: None, draining: false }]);
    let waiting = tokio::spawn({
        let gateway = gateway.clone();
        async move { send(&gateway, classify(), r#"{"input": "x"}"#).await.0.status }
    });
    while refused.load(Ordering::Relaxed) <= RouterLimits::default().retries as usize {
        assert!(!waiting.is_finished(), "given up after {refused:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    gateway.registry.set_endpoints("a", vec![Address { http: address, grpc: None, draining: false }]);
    assert_eq!(waiting.await.unwrap(), StatusCode::OK);

    gateway.registry.set_endpoints("a", vec![Address { http: nobody().await, grpc: None, draining: false }]);
    let begin = Instant::now();
    let (parts, body) = send(&gateway, classify(), r#"{"input": "x"}"#).await;
    assert_eq!(parts.status, StatusCode::SERVICE_UNAVAILABLE, "{body}");
    assert!((4.0..7.0).contains(&begin.elapsed().as_secs_f64()), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn weights_pins_and_fall_over() {
    let (old, old_count, kill_old) = healthy().await;
    let (new, new_count, _new) = healthy().await;
    let gateway = gateway(
        config(&[("old", 50), ("new", 50), ("idle", 0)]),
        &[("old", &[old]), ("new", &[new]), ("idle", &[new])],
    );
    for _ in 0..200 {
        send(&gateway, classify(), r#"{"input": "x"}"#).await;
    }
    let counts = (old_count.load(Ordering::Relaxed), new_count.load(Ordering::Relaxed));
    assert!(counts.0 > 50 && counts.1 > 50 && counts.0 + counts.1 == 200, "{counts:?}");
    for pinned in ["old", "new", "idle"] {
        let (parts, _) = send(&gateway, classify().header("x-athanor-revision", pinned), r#"{"input": "x"}"#).await;
        assert_eq!(parts.headers["x-athanor-revision"], pinned);
    }
    let counted = gateway.analysis.read().revisions;
    assert_eq!(counted.values().map(|counts| counts.requests).sum::<u64>(), 200, "pinned requests do not count");
    let (parts, body) = send(&gateway, classify().header("x-athanor-revision", "none"), r#"{"input": "x"}"#).await;
    assert_eq!((parts.status, &body["error"]["code"]), (StatusCode::NOT_FOUND, &json!("revision_not_found")));
    kill_old.cancel();
    gateway.registry.set_endpoints("old", Vec::new());
    for _ in 0..20 {
        let (parts, _) = send(&gateway, classify(), r#"{"input": "x"}"#).await;
        assert_eq!((parts.status, &parts.headers["x-athanor-revision"]), (StatusCode::OK, &"new".parse().unwrap()));
    }
}

#[derive(Default)]
struct Kept {
    events: Mutex<Vec<Event>>,
    broken: std::sync::atomic::AtomicBool,
}

#[async_trait]
impl EventSink for Kept {
    fn publish(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }

    async fn publish_durable(&self, events: Vec<Event>) -> Result<(), String> {
        if self.broken.load(Ordering::Relaxed) {
            return Err("the disk is full".into());
        }
        self.events.lock().unwrap().extend(events);
        Ok(())
    }
}

#[tokio::test]
async fn an_answer_that_has_to_be_durable_and_is_not_takes_no_feedback() {
    let (address, _, _server) = healthy().await;
    let mut with_events = config(&[("a", 100)]);
    with_events.events = Some(EventsConfig { durable_predictions: true, ..EventsConfig::new("nowhere:9092", "t") });
    let gateway = gateway(with_events, &[("a", &[address])]);
    let kept = Arc::new(Kept::default());
    gateway.events.set(Some(kept.clone()));
    gateway.labels.set("a".into(), vec!["good".into(), "bad".into()]);
    for (broken, events, status) in [(true, 0, StatusCode::NOT_FOUND), (false, 1, StatusCode::ACCEPTED)] {
        kept.broken.store(broken, Ordering::Relaxed);
        let (parts, _) = send(&gateway, classify(), r#"{"input": "x"}"#).await;
        assert_eq!((parts.status, kept.events.lock().unwrap().len()), (StatusCode::OK, events));
        kept.broken.store(false, Ordering::Relaxed);
        let id = parts.headers["x-request-id"].to_str().unwrap();
        let body = format!(r#"{{"request_id": "{id}", "expected_label": "bad"}}"#);
        let request = Request::builder().method(Method::POST).uri("/v1/feedback");
        assert_eq!(send(&gateway, request, &body).await.0.status, status, "broken: {broken}");
    }
}

#[tokio::test]
async fn predictions_and_feedback_become_events() {
    let (address, _, _server) = healthy().await;
    let mut with_events = config(&[("a", 100)]);
    with_events.events = Some(EventsConfig::new("nowhere:9092", "t"));
    let gateway = gateway(with_events, &[("a", &[address])]);
    let kept = Arc::new(Kept::default());
    gateway.events.set(Some(kept.clone()));
    gateway.labels.set("a".into(), vec!["good".into(), "bad".into()]);

    let (parts, _) = send(&gateway, classify(), r#"{"input": ["x", "y"]}"#).await;
    let id = parts.headers["x-request-id"].to_str().unwrap().to_owned();
    {
        let events = kept.events.lock().unwrap();
        assert_eq!(
            events.iter().map(|event| event.id.clone()).collect::<Vec<_>>(),
            [format!("{id}/0"), format!("{id}/1")]
        );
        let EventData::Prediction(prediction) = &events[1].data else { panic!("{events:?}") };
        assert_eq!((&*prediction.text, &*prediction.label, &*prediction.revision), ("y", "good", "a"));
        assert_eq!(events[0].source, "/athanor/n/d");
    }

    let post = |body: String| {
        let gateway = gateway.clone();
        async move {
            let request = Request::builder().method(Method::POST).uri("/v1/feedback");
            let (parts, body) = send(&gateway, request, &body).await;
            (parts.status.as_u16(), body)
        }
    };
    let forged = id.replace(&id[id.len() - 1..], if id.ends_with('0') { "1" } else { "0" });
    let item = |id: &str, rest: &str| format!(r#"{{"request_id": "{id}", {rest}}}"#);
    for (body, status, param, code) in [
        (item(&forged, r#""expected_label": "bad""#), 404, json!("request_id"), "request_not_found"),
        (item("abc", r#""expected_label": "bad""#), 404, json!("request_id"), "request_not_found"),
        (item(&id, r#""index": 1"#), 400, json!("expected_label"), "invalid_field"),
        (item(&id, r#""expected_label": "bad", "note": "x""#), 400, json!("note"), "invalid_field"),
        (item(&id, r#""expected_label": "bad", "rating": 1"#), 400, json!("expected_label"), "invalid_field"),
        (item(&id, r#""rating": 2"#), 400, json!("rating"), "invalid_field"),
        (item(&id, r#""expected_text": "a better answer""#), 422, json!("expected_text"), "invalid_feedback"),
        (item(&id, r#""preferred": 1"#), 422, json!("preferred"), "invalid_feedback"),
        (item(&id, r#""expected_label": "awful""#), 422, json!("expected_label"), "unknown_label"),
        (item(&id, r#""expected_label": "bad", "index": 2"#), 422, json!("index"), "no_such_input"),
        ("[]".into(), 422, Value::Null, "feedback_empty"),
        (
            format!("[{}, {}]", item(&id, r#""expected_label": "bad""#), item(&id, r#""expected_label": "x""#)),
            422,
            json!("[1].expected_label"),
            "unknown_label",
        ),
        (format!("[{}]", item(&id, r#""index": 0"#)), 400, json!("[0].expected_label"), "invalid_field"),
        ("3".into(), 400, Value::Null, "invalid_field"),
    ] {
        let (got, answer) = post(body.clone()).await;
        assert_eq!(
            (got, &answer["error"]["param"], &answer["error"]["code"]),
            (status, &param, &json!(code)),
            "{body}: {answer}"
        );
    }
    assert_eq!(kept.events.lock().unwrap().len(), 2, "nothing of a refused request is published");

    let both = format!(
        "[{}, {}]",
        item(&id, r#""expected_label": "good""#),
        item(&id, r#""expected_label": "bad", "index": 1, "comment": "no""#)
    );
    assert_eq!(post(both.clone()).await, (202, json!({"accepted": 2})));
    let counted = gateway.analysis.read().revisions["a"].clone();
    assert_eq!((counted.feedback_total, counted.feedback_correct), (2, 1));
    let last = kept.events.lock().unwrap().last().unwrap().clone();
    let EventData::Feedback(feedback) = last.data else { panic!("{last:?}") };
    assert_eq!((feedback.index, feedback.comment.as_deref()), (1, Some("no")));

    // A rating of an answer that was judged already is kept for the dataset, and not counted again.
    assert_eq!(post(item(&id, r#""rating": -1"#)).await, (202, json!({"accepted": 1})));
    assert_eq!(gateway.analysis.read().revisions["a"].feedback_total, 2);

    kept.broken.store(true, Ordering::Relaxed);
    assert_eq!(post(both.clone()).await.0, 503, "not accepted unless it is kept");
    gateway.registry.set_config(crate::config::check(config(&[("a", 100)])).unwrap());
    assert_eq!(post(both).await.0, 404, "events are off");
}

#[tokio::test]
async fn labels_are_learned_from_the_servers() {
    let (address, _, _server) = healthy().await;
    let gateway = gateway(config(&[("a", 100)]), &[("a", &[address])]);
    tokio::spawn(crate::record::labels::learn(
        gateway.registry.clone(),
        gateway.client.clone(),
        gateway.labels.clone(),
    ));
    let begin = Instant::now();
    while gateway.labels.get("a").is_none() {
        assert!(begin.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(&*gateway.labels.get("a").unwrap(), ["good".to_owned(), "bad".to_owned()]);
}

/// Serves the protocol on a free port.
async fn serve_grpc(service: impl GrpcInferenceService) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder().add_service(GrpcInferenceServiceServer::new(service));
    tokio::spawn(server.serve_with_incoming(tonic::transport::server::TcpIncoming::from(listener)));
    address
}

fn infer(model: &str, texts: &[&str]) -> ModelInferRequest {
    let bytes_contents = texts.iter().map(|text| bytes::Bytes::copy_from_slice(text.as_bytes())).collect();
    let input = InferInputTensor {
        name: "text".into(),
        datatype: "BYTES".into(),
        shape: vec![texts.len() as i64],
        contents: Some(InferTensorContents { bytes_contents, ..Default::default() }),
        ..Default::default()
    };
    ModelInferRequest { model_name: model.into(), id: "7".into(), inputs: vec![input], ..Default::default() }
}

#[tokio::test]
async fn grpc_passes_through_the_router_and_is_recorded() {
    let (service, _) = test_support::service();
    let ready = athanor_telemetry::Readiness::new();
    ready.set(true);
    let server = serve_grpc(Inference::new(service, ready.clone())).await;
    let mut with_events = config(&[("reviews-1", 100)]);
    with_events.events = Some(EventsConfig::new("nowhere:9092", "t"));
    let gateway = gateway(with_events, &[]);
    let address = |grpc| Address { http: server, grpc: Some(grpc), draining: false };
    // One of the two is dead.
    let dead = Address { http: nobody().await, grpc: Some(nobody().await), draining: false };
    gateway.registry.set_endpoints("reviews-1", vec![dead, address(server)]);
    let kept = Arc::new(Kept::default());
    gateway.events.set(Some(kept.clone()));
    let router = serve_grpc(Passing::new(gateway.clone(), ready)).await;
    let mut client = GrpcInferenceServiceClient::connect(format!("http://{router}")).await.unwrap();

    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    let asked = ModelMetadataRequest { name: "reviews".into(), version: None };
    let metadata = client.model_metadata(asked).await.unwrap().into_inner();
    assert_eq!(metadata.outputs[2].shape, [-1, 2]);
    for _ in 0..6 {
        let response = client.model_infer(infer("reviews", &["great", "bad"])).await.unwrap();
        let id = response.metadata().get("x-request-id").unwrap().to_str().unwrap().to_owned();
        assert!(gateway.ids.verify(&id).is_ok(), "{id}");
        assert_eq!(response.metadata().get("x-athanor-revision").unwrap(), "reviews-1");
        let response = response.into_inner();
        assert_eq!(response.id, "7");
        let labels: Vec<String> =
            tensors::decode_results(&response).unwrap().into_iter().map(|(label, _)| label).collect();
        assert_eq!(labels, ["positive", "negative"]);
    }
    assert_eq!(kept.events.lock().unwrap().len(), 12);
    for (request, code) in [
        (infer("other", &["a"]), tonic::Code::NotFound),
        (infer("reviews", &[]), tonic::Code::InvalidArgument),
        (infer("reviews", &["a", "b", "c", "d"]), tonic::Code::InvalidArgument),
    ] {
        let status = client.model_infer(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.metadata().contains_key("x-request-id"));
    }
}
