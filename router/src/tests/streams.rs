//! Answers of language models on their way through the router.

use std::{io, sync::Weak};

use axum::body::BodyDataStream;
use bytes::Bytes;
use futures::StreamExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};

use super::*;

pub const PATIENCE: Duration = Duration::from_secs(5);

/// What a model's server writes, piece by piece.
type Pieces = mpsc::Sender<io::Result<Bytes>>;

/// A server of a language model. Each request to it hands out where its answer is written.
struct Model {
    address: SocketAddr,
    answers: mpsc::Receiver<Pieces>,
    asked: Arc<AtomicUsize>,
    _running: CancellationToken,
}

async fn model(content_type: &'static str) -> Model {
    let (sender, answers) = mpsc::channel(64);
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = asked.clone();
    let answer = post(async move |_: Json<Value>| {
        counted.fetch_add(1, Ordering::Relaxed);
        let (pieces, mut receiver) = mpsc::channel(8);
        sender.send(pieces).await.unwrap();
        let body = Body::from_stream(futures::stream::poll_fn(move |context| receiver.poll_recv(context)));
        ([("content-type", content_type)], body).into_response()
    });
    let app = Router::new().route("/v1/chat/completions", answer.clone()).route("/v1/embeddings", answer);
    let (address, running) = serve(([127, 0, 0, 1], 0).into(), app).await;
    Model { address, answers, asked, _running: running }
}

async fn write(pieces: &Pieces, text: &str) {
    pieces.send(Ok(Bytes::copy_from_slice(text.as_bytes()))).await.unwrap();
}

pub fn chat() -> Builder {
    Request::builder().method(Method::POST).uri("/v1/chat/completions").header("content-type", "application/json")
}

pub const QUESTION: &str = r#"{"messages": [{"role": "user", "content": "hi"}], "stream": true}"#;

/// Asks and returns as soon as the head of the answer is there.
async fn ask(gateway: &Arc<Gateway>) -> (axum::http::response::Parts, BodyDataStream) {
    let request = chat().body(Body::from(QUESTION)).unwrap();
    let (parts, body) = app(gateway.clone()).oneshot(request).await.unwrap().into_parts();
    (parts, body.into_data_stream())
}

async fn next(body: &mut BodyDataStream) -> Option<Result<String, axum::Error>> {
    let piece = tokio::time::timeout(PATIENCE, body.next()).await.expect("a piece of the answer");
    piece.map(|piece| piece.map(|bytes| String::from_utf8(bytes.to_vec()).unwrap()))
}

pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < PATIENCE, "{what} did not come about");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub fn load(gateway: &Gateway) -> usize {
    gateway.registry.snapshot().revisions.iter().flat_map(|r| &r.endpoints).map(|e| e.outstanding()).sum()
}

/// Requests and errors of revision a.
pub fn counted(gateway: &Gateway) -> (u64, u64) {
    gateway.analysis.read().revisions.get("a").map_or((0, 0), |counts| (counts.requests, counts.errors))
}

pub fn with_limit(seconds: u64) -> RouterConfig {
    let mut config = config(&[("a", 100)]);
    config.limits.max_request_seconds = seconds;
    config
}

#[tokio::test]
async fn every_piece_arrives_before_the_next_is_written() {
    let mut model = model("text/event-stream").await;
    let gateway = gateway(config(&[("a", 100)]), &[("a", &[model.address])]);
    let (parts, mut body) = ask(&gateway).await;
    assert_eq!((parts.status, &parts.headers["x-athanor-revision"]), (StatusCode::OK, &"a".parse().unwrap()));
    let id = parts.headers["x-request-id"].to_str().unwrap();
    assert!(gateway.ids.verify(id).is_err(), "nothing is recorded, so {id} takes no feedback");
    let pieces = model.answers.recv().await.unwrap();
    for text in ["data: {\"a\": 1}\n\n", ": still here\n", "data: {\"a\": 2}\n\ndata: [DONE]\n\n"] {
        write(&pieces, text).await;
        assert_eq!(next(&mut body).await.unwrap().unwrap(), text);
        assert_eq!((load(&gateway), gateway.running.count()), (1, 1), "a stream is load until its end");
        assert_eq!(gateway.drain(), Duration::from_secs(300));
    }
    drop(pieces);
    assert!(next(&mut body).await.is_none());
    until("the end of the load", || (load(&gateway), gateway.running.count()) == (0, 0)).await;
    assert_eq!((gateway.drain(), counted(&gateway)), (Duration::from_secs(20), (1, 0)));
}

#[tokio::test]
async fn a_broken_stream_is_not_asked_for_again_and_ends_with_an_error_event() {
    let (mut one, mut two) = (model("text/event-stream").await, model("text/event-stream").await);
    let refusing = Router::new().route("/v1/chat/completions", post(async || StatusCode::SERVICE_UNAVAILABLE));
    let (unavailable, _unavailable) = serve(([127, 0, 0, 1], 0).into(), refusing).await;
    // Before the head, the next endpoint is asked.
    let gateway = gateway(config(&[("a", 100)]), &[("a", &[unavailable, nobody().await, one.address, two.address])]);
    let (parts, mut body) = ask(&gateway).await;
    assert_eq!(parts.status, StatusCode::OK);
    let pieces =
        tokio::select! { Some(pieces) = one.answers.recv() => pieces, Some(pieces) = two.answers.recv() => pieces };
    let before = counted(&gateway);
    write(&pieces, "data: {\"a\": 1}\n\ndata: {\"hal").await;
    assert_eq!(next(&mut body).await.unwrap().unwrap(), "data: {\"a\": 1}\n\n");
    pieces.send(Err(io::Error::other("killed"))).await.unwrap();
    let last = next(&mut body).await.unwrap().unwrap();
    let data: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap()).unwrap();
    assert_eq!(
        (&data["error"]["type"], &data["error"]["code"]),
        (&json!("server_error"), &json!("stream_interrupted"))
    );
    assert!(data["error"]["message"].as_str().unwrap().starts_with("the answer broke off: "), "{data}");
    assert!(next(&mut body).await.is_none());
    assert_eq!(one.asked.load(Ordering::Relaxed) + two.asked.load(Ordering::Relaxed), 1);
    assert_eq!(counted(&gateway), (before.0, before.1 + 1));
}

#[tokio::test]
async fn another_broken_body_aborts_the_connection() {
    let mut model = model("application/json").await;
    let gateway = gateway(config(&[("a", 100)]), &[("a", &[model.address])]);
    let (_, mut body) = ask(&gateway).await;
    let pieces = model.answers.recv().await.unwrap();
    write(&pieces, "{\"choi").await;
    assert_eq!(next(&mut body).await.unwrap().unwrap(), "{\"choi");
    pieces.send(Err(io::Error::other("killed"))).await.unwrap();
    assert!(next(&mut body).await.unwrap().is_err());
    assert_eq!((model.asked.load(Ordering::Relaxed), counted(&gateway)), (1, (1, 1)));
}

#[tokio::test]
async fn an_error_that_the_server_streams_is_counted_and_passed_on_alone() {
    let mut model = model("text/event-stream; charset=utf-8").await;
    let gateway = gateway(config(&[("a", 100)]), &[("a", &[model.address])]);
    let (_, mut body) = ask(&gateway).await;
    let pieces = model.answers.recv().await.unwrap();
    let event = "data: {\"error\": {\"message\": \"out of memory\"}}\n\n";
    write(&pieces, event).await;
    drop(pieces);
    assert_eq!(next(&mut body).await.unwrap().unwrap(), event);
    assert!(next(&mut body).await.is_none());
    until("the error", || counted(&gateway) == (1, 1)).await;
}

#[tokio::test]
async fn a_request_has_one_time_limit_for_head_and_body() {
    let mut model = model("text/event-stream").await;
    let gateway = gateway(with_limit(1), &[("a", &[model.address])]);
    let (_, mut body) = ask(&gateway).await;
    let pieces = model.answers.recv().await.unwrap();
    write(&pieces, "data: {}\n").await;
    assert_eq!(next(&mut body).await.unwrap().unwrap(), "data: {}\n");
    let last = next(&mut body).await.unwrap().unwrap();
    // It first ends the event that has begun.
    assert!(last.starts_with("\ndata: {\"error\"") && last.contains("\"code\":\"timeout\""), "{last}");
    assert!(next(&mut body).await.is_none());
    tokio::time::timeout(PATIENCE, pieces.closed()).await.expect("the server is no longer waited for");
    assert_eq!(counted(&gateway), (1, 1));

    let silent = Router::new().route("/v1/chat/completions", post(std::future::pending::<StatusCode>));
    let (address, _silent) = serve(([127, 0, 0, 1], 0).into(), silent).await;
    gateway.registry.set_endpoints("a", vec![Address { http: address, grpc: None, draining: false }]);
    let (parts, answer) = send(&gateway, chat(), QUESTION).await;
    assert_eq!((parts.status, &answer["error"]["code"]), (StatusCode::GATEWAY_TIMEOUT, &json!("timeout")));
}

#[tokio::test]
async fn a_client_that_does_not_read_keeps_no_server() {
    let mut model = model("text/event-stream").await;
    let gateway = gateway(with_limit(1), &[("a", &[model.address])]);
    let (_, _unread) = ask(&gateway).await;
    let pieces = model.answers.recv().await.unwrap();
    let writing = async { while pieces.send(Ok(Bytes::from_static(b"data: {}\n\n"))).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, writing).await.expect("the server is let go");
    until("the end of the load", || load(&gateway) == 0).await;
    assert_eq!(counted(&gateway), (1, 0), "a slow client is no error of the revision");
}

/// Sends a question over a connection of its own.
async fn connect(router: SocketAddr) -> tokio::net::TcpStream {
    let mut client = tokio::net::TcpStream::connect(router).await.unwrap();
    let length = QUESTION.len();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    client.write_all(format!("{head}{QUESTION}").as_bytes()).await.unwrap();
    client
}

#[tokio::test]
async fn a_client_that_goes_away_takes_its_request_along() {
    let mut model = model("text/event-stream").await;
    let gateway = gateway(config(&[("a", 100)]), &[("a", &[model.address])]);
    let (router, _router) = serve(([127, 0, 0, 1], 0).into(), app(gateway.clone())).await;
    let mut client = connect(router).await;
    let pieces = model.answers.recv().await.unwrap();
    write(&pieces, "data: {}\n\n").await;
    let mut received = Vec::new();
    while !received.ends_with(b"data: {}\n\n\r\n") {
        assert_ne!(client.read_buf(&mut received).await.unwrap(), 0, "{}", String::from_utf8_lossy(&received));
    }
    assert_eq!(load(&gateway), 1);
    drop(client);
    // Nothing is written any more: the server sees its connection close.
    tokio::time::timeout(PATIENCE, pieces.closed()).await.expect("the request to the server is dropped");
    until("the end of the load", || (load(&gateway), gateway.running.count()) == (0, 0)).await;
    assert_eq!(counted(&gateway), (1, 0));

    // Before the head as well.
    let alive = Arc::new(());
    let held: Arc<Mutex<Option<Weak<()>>>> = Arc::default();
    let holding = held.clone();
    let silent = post(async move || {
        *holding.lock().unwrap() = Some(Arc::downgrade(&alive));
        let _kept = alive;
        std::future::pending::<StatusCode>().await
    });
    let (address, _silent) =
        serve(([127, 0, 0, 1], 0).into(), Router::new().route("/v1/chat/completions", silent)).await;
    gateway.registry.set_endpoints("a", vec![Address { http: address, grpc: None, draining: false }]);
    let client = connect(router).await;
    until("the request", || held.lock().unwrap().is_some() && load(&gateway) == 1).await;
    drop(client);
    until("the end of the request", || load(&gateway) == 0 && gateway.running.count() == 0).await;
}

#[tokio::test]
async fn streams_follow_weights_and_pins() {
    let (mut old, mut new) = (model("text/event-stream").await, model("text/event-stream").await);
    let endpoints = [("old", &[old.address][..]), ("new", &[new.address])];
    let gateway = gateway(config(&[("old", 75), ("new", 25)]), &endpoints);
    // Answers end at once.
    let ended = |answers: &mut mpsc::Receiver<Pieces>| while answers.try_recv().is_ok() {};
    for _ in 0..100 {
        let (_, body) = ask(&gateway).await;
        ended(&mut old.answers);
        ended(&mut new.answers);
        assert_eq!(body.count().await, 0);
    }
    let counts = (old.asked.load(Ordering::Relaxed), new.asked.load(Ordering::Relaxed));
    assert!(counts.0 > 50 && counts.1 > 5 && counts.0 + counts.1 == 100, "{counts:?}");
    for pinned in ["old", "new"] {
        let request = chat().header("x-athanor-revision", pinned).body(Body::from(QUESTION)).unwrap();
        let response: axum::response::Response = app(gateway.clone()).oneshot(request).await.unwrap();
        assert_eq!(response.headers()["x-athanor-revision"], pinned);
    }
}

#[tokio::test]
async fn refusals_are_passed_on_and_counted_apart() {
    let refusing = Router::new()
        .route(
            "/v1/chat/completions",
            post(async || (StatusCode::NOT_FOUND, r#"{"error": {"code": "model_not_found"}}"#)),
        )
        .route("/v1/embeddings", post(async || StatusCode::TOO_MANY_REQUESTS))
        .route("/v1/models", get(async || "{}"));
    let (address, _refusing) = serve(([127, 0, 0, 1], 0).into(), refusing).await;
    let gateway = gateway(config(&[("a", 100)]), &[("a", &[address])]);
    let (parts, answer) = send(&gateway, chat(), QUESTION).await;
    assert_eq!((parts.status, &answer["error"]["code"]), (StatusCode::NOT_FOUND, &json!("model_not_found")));
    let embed = Request::builder().method(Method::POST).uri("/v1/embeddings");
    assert_eq!(send(&gateway, embed, "{}").await.0.status, StatusCode::TOO_MANY_REQUESTS);
    let id = parts.headers["x-request-id"].to_str().unwrap();
    assert!(id.starts_with("r-") && gateway.ids.verify(id).is_err(), "there can be no feedback to {id}");
    let models = Request::builder().uri("/v1/models");
    assert_eq!(send(&gateway, models, "").await.0.status, StatusCode::OK);
    let counts = gateway.analysis.read().revisions["a"].clone();
    assert_eq!((counts.requests, counts.errors, counts.refused), (0, 0, 2));
}
