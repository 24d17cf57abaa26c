//! Servers of other projects behind the router: their answers have no header of ours, and bodies of their own.

use athanor_contract::event::TokenUsage;

use super::{
    generations::{generations, judge},
    streams::chat,
    *,
};

/// An answer of llama.cpp's server.
const WHOLE: &str = r#"{"choices":[{"finish_reason":"stop","index":0,"message":{"role":"assistant","content":"Paris."}}],
    "created":1764419000,"model":"m","system_fingerprint":"b11549","object":"chat.completion",
    "usage":{"completion_tokens":3,"prompt_tokens":31,"total_tokens":34,"prompt_tokens_details":{"cached_tokens":0}},
    "id":"chatcmpl-1","timings":{"prompt_n":31,"predicted_n":3}}"#;
/// Its list of models.
const MODELS: &str = r#"{"models":[{"name":"m","model":"m","capabilities":["completion"]}],"object":"list",
    "data":[{"id":"m","object":"model","created":1764419000,"owned_by":"llamacpp","max_model_len":null,"meta":{"n_vocab":49152}}]}"#;
/// The events of a stream of vLLM's, up to its usage.
const EVENTS: [&str; 4] = [
    r#"{"id":"chatcmpl-2","object":"chat.completion.chunk","created":1764419000,"model":"m","choices":[{"index":0,
        "delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null}"#,
    r#"{"id":"chatcmpl-2","object":"chat.completion.chunk","created":1764419000,"model":"m","choices":[{"index":0,
        "delta":{"content":"Par"},"logprobs":null,"finish_reason":null,"token_ids":null}],"usage":null}"#,
    r#"{"id":"chatcmpl-2","object":"chat.completion.chunk","created":1764419000,"model":"m","choices":[{"index":0,
        "delta":{"content":"is."},"logprobs":null,"finish_reason":null,"token_ids":null}]}"#,
    r#"{"id":"chatcmpl-2","object":"chat.completion.chunk","created":1764419000,"model":"m","choices":[{"index":0,
        "delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":null}]}"#,
];
const USAGE: &str = r#"{"id":"chatcmpl-2","object":"chat.completion.chunk","created":1764419000,"model":"m","choices":[],
    "usage":{"prompt_tokens":31,"total_tokens":34,"completion_tokens":3}}"#;
const FAILED: &str =
    r#"{"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError", "code": 500}}"#;

fn json_of(status: StatusCode, body: &'static str) -> axum::response::Response {
    (status, [("content-type", "application/json; charset=utf-8"), ("server", "uvicorn")], body).into_response()
}

/// The body of a stream with these events and its end.
fn stream(events: &[&str]) -> String {
    let events = events.iter().chain(&["[DONE]"]);
    // A line of an event has no line break.
    events.map(|event| format!("data: {}\n\n", event.replace('\n', ""))).collect()
}

/// A server whose answer the first message chooses.
async fn foreign() -> (SocketAddr, CancellationToken) {
    let answer = post(async |Json(request): Json<Value>| {
        let events = |body: String| ([("content-type", "text/event-stream; charset=utf-8")], body).into_response();
        match request["messages"][0]["content"].as_str() {
            Some("stream") => events(stream(&EVENTS)),
            Some("stream with usage") => events(stream(&[&EVENTS[..], &[USAGE]].concat())),
            // vLLM ends a stream that failed as any other.
            Some("fail") => events(stream(&[EVENTS[0], EVENTS[1], FAILED])),
            Some("too long") => json_of(
                StatusCode::BAD_REQUEST,
                r#"{"error":{"code":400,"message":"the request exceeds the available context size","type":"exceed_context_size_error"}}"#,
            ),
            _ => json_of(StatusCode::OK, WHOLE),
        }
    });
    let unsupported = post(async || {
        let body = r#"{"error":{"code":501,"message":"This server does not support embeddings.","type":"not_supported_error"}}"#;
        json_of(StatusCode::NOT_IMPLEMENTED, body)
    });
    let app = Router::new()
        .route("/v1/chat/completions", answer)
        .route("/v1/embeddings", unsupported)
        .route("/v1/models", get(async || json_of(StatusCode::OK, MODELS)));
    serve(([127, 0, 0, 1], 0).into(), app).await
}

/// A gateway that records the answers of such a server.
async fn recording() -> (Arc<Gateway>, Arc<Kept>, CancellationToken) {
    let (address, running) = foreign().await;
    let mut config = config(&[("m-1", 100)]);
    config.events = Some(EventsConfig::new("nowhere:9092", "t"));
    let gateway = gateway(config, &[("m-1", &[address])]);
    let kept = Arc::new(Kept::default());
    gateway.events.set(Some(kept.clone()));
    (gateway, kept, running)
}

/// Asks and reads the whole answer.
async fn ask(gateway: &Arc<Gateway>, content: &str) -> (axum::http::response::Parts, String) {
    let body = json!({"model": "m", "messages": [{"role": "user", "content": content}]}).to_string();
    let answer = app(gateway.clone()).oneshot(chat().body(Body::from(body)).unwrap()).await.unwrap();
    let (parts, body) = answer.into_parts();
    (parts, String::from_utf8(to_bytes(body, 1 << 20).await.unwrap().to_vec()).unwrap())
}

#[tokio::test]
async fn answers_of_another_server_are_recorded_and_take_feedback() {
    let (gateway, kept, _running) = recording().await;
    tokio::spawn(crate::record::labels::learn(
        gateway.registry.clone(),
        gateway.client.clone(),
        gateway.labels.clone(),
    ));
    let usage = Some(TokenUsage { prompt_tokens: 31, completion_tokens: 3 });
    for (number, (content, expected)) in
        [("whole", usage), ("stream", None), ("stream with usage", usage)].into_iter().enumerate()
    {
        let (parts, body) = ask(&gateway, content).await;
        assert_eq!((parts.status, &parts.headers["x-athanor-revision"]), (StatusCode::OK, &"m-1".parse().unwrap()));
        assert_eq!(body.ends_with("data: [DONE]\n\n"), content != "whole", "{body}");
        let recorded = generations(&kept, number + 1).await.remove(number);
        assert_eq!(
            (&*recorded.answer, &*recorded.finish_reason, recorded.usage),
            ("Paris.", "stop", expected),
            "{content}"
        );
        assert_eq!(
            (&*recorded.revision, &*recorded.request_id),
            ("m-1", parts.headers["x-request-id"].to_str().unwrap())
        );
    }
    let begin = Instant::now();
    while !gateway.labels.are_known() {
        assert!(begin.elapsed() < Duration::from_secs(5), "a list of models without labels was not read");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let ids: Vec<String> = generations(&kept, 3).await.into_iter().map(|generation| generation.request_id).collect();
    assert_eq!(judge(&gateway, &ids[0], r#""expected_text": "Paris, France.""#).await, (202, Value::Null));
    assert_eq!(judge(&gateway, &ids[1], r#""rating": 1"#).await, (202, Value::Null));
    assert_eq!(judge(&gateway, &ids[2], r#""expected_label": "good""#).await, (422, json!("invalid_feedback")));
    let models = Request::builder().uri("/v1/models");
    assert_eq!(send(&gateway, models, "").await.1["data"][0]["owned_by"], "llamacpp");
    let counts = gateway.analysis.read().revisions["m-1"].clone();
    assert_eq!((counts.requests, counts.errors, counts.refused, counts.feedback_correct), (3, 0, 0, 1));
}

#[tokio::test]
async fn failures_of_another_server_count_and_what_it_does_not_offer_does_not() {
    let (gateway, kept, _running) = recording().await;
    let (parts, body) = ask(&gateway, "fail").await;
    assert_eq!(
        (parts.status, body),
        (StatusCode::OK, stream(&[EVENTS[0], EVENTS[1], FAILED])),
        "it is passed on as it is"
    );
    let counts = || {
        let counts = gateway.analysis.read().revisions["m-1"].clone();
        (counts.requests, counts.errors, counts.refused)
    };
    let begin = Instant::now();
    // The end of an answer is counted by the task that carries it.
    while counts() != (1, 1, 0) {
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", counts());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let (parts, body) = ask(&gateway, "too long").await;
    assert_eq!(parts.status, StatusCode::BAD_REQUEST);
    assert!(body.contains("exceed_context_size_error"), "{body}");
    let embed =
        Request::builder().method(Method::POST).uri("/v1/embeddings").header("content-type", "application/json");
    let (parts, body) = send(&gateway, embed, r#"{"input": "a"}"#).await;
    assert_eq!((parts.status, &body["error"]["type"]), (StatusCode::NOT_IMPLEMENTED, &json!("not_supported_error")));
    assert_eq!(counts(), (1, 1, 2));
    assert_eq!(kept.events.lock().unwrap().len(), 0, "none of them is an answer");
}

#[tokio::test]
async fn a_server_without_grpc_is_named_at_once() {
    let (gateway, _, _running) = recording().await;
    let ready = athanor_telemetry::Readiness::new();
    let router = serve_grpc(Passing::new(gateway.clone(), ready)).await;
    let mut client = GrpcInferenceServiceClient::connect(format!("http://{router}")).await.unwrap();
    let begin = Instant::now();
    let status = client.model_infer(infer("m", &["a"])).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unimplemented, "{status}");
    assert!(status.message().contains("gRPC"), "{status}");
    let asked = ModelMetadataRequest { name: "m".into(), version: None };
    assert_eq!(client.model_metadata(asked).await.unwrap_err().code(), tonic::Code::Unimplemented);
    assert!(begin.elapsed() < Duration::from_secs(3), "a request waits five seconds for an endpoint");
    assert!(gateway.analysis.read().revisions.is_empty(), "it is no failure of the revision");
}
