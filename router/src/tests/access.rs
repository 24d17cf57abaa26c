//! API keys through the router's servers.

use athanor_contract::{artifact::sha256_hex, serve::AccessConfig};

use super::{
    grpc::{Client, ask, text},
    streams::chat,
    *,
};
use crate::access::Access;

/// A gateway that records, and lets `app` ask twice a minute, `reviewer` give feedback and `chatter` use ten tokens a minute. The key
/// of each is its name.
async fn guarded(address: SocketAddr) -> (Arc<Gateway>, Arc<Kept>, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    for name in ["app", "reviewer", "chatter"] {
        std::fs::write(folder.path().join(name), format!("sha256:{}", sha256_hex(name.as_bytes()))).unwrap();
    }
    let callers = json!({"callers": [
        {"name": "app", "scopes": ["infer"], "requestsPerMinute": 2},
        {"name": "reviewer", "scopes": ["feedback"]},
        {"name": "chatter", "tokensPerMinute": 10},
    ]});
    let callers: AccessConfig = serde_json::from_value(callers).unwrap();
    let mut with_events = config(&[("a", 100)]);
    with_events.events = Some(EventsConfig::new("nowhere:9092", "t"));
    let mut gateway = unshared(with_events, &[("a", &[address])]);
    gateway.access = Some(Arc::new(Access::new(&callers, folder.path().into())));
    let kept = Arc::new(Kept::default());
    gateway.events.set(Some(kept.clone()));
    gateway.labels.set("a".into(), vec!["good".into(), "bad".into()]);
    (Arc::new(gateway), kept, folder)
}

fn with_key(request: Builder, key: &str) -> Builder {
    request.header("authorization", format!("Bearer {key}"))
}

#[tokio::test]
async fn a_request_needs_a_key_with_the_scope_and_within_its_limit() {
    let (address, asked, _server) = healthy().await;
    let (gateway, kept, _keys) = guarded(address).await;
    let input = r#"{"input": "x"}"#;
    for (request, status, code) in [
        (classify(), 401, "invalid_api_key"),
        (with_key(classify(), "guess"), 401, "invalid_api_key"),
        (with_key(classify(), "reviewer"), 403, "insufficient_scope"),
    ] {
        let (parts, body) = send(&gateway, request, input).await;
        assert_eq!((parts.status.as_u16(), &body["error"]["code"]), (status, &json!(code)), "{body}");
        assert_eq!(parts.headers.contains_key("www-authenticate"), status == 401);
        assert!(parts.headers.contains_key("x-request-id"), "also a refusal can be found in the logs");
    }
    assert_eq!(asked.load(Ordering::Relaxed), 0, "no server was asked");

    let (parts, _) = send(&gateway, with_key(classify(), "app"), input).await;
    assert_eq!(parts.status, StatusCode::OK);
    let id = parts.headers["x-request-id"].to_str().unwrap().to_owned();
    let feedback = || Request::builder().method(Method::POST).uri("/v1/feedback");
    let item = format!(r#"{{"request_id": "{id}", "expected_label": "bad"}}"#);
    assert_eq!(send(&gateway, with_key(feedback(), "app"), &item).await.0.status, StatusCode::FORBIDDEN);
    assert_eq!(send(&gateway, feedback(), &item).await.0.status, StatusCode::UNAUTHORIZED);
    assert_eq!(send(&gateway, with_key(feedback(), "reviewer"), &item).await.0.status, StatusCode::ACCEPTED);
    let events = kept.events.lock().unwrap().clone();
    let EventData::Feedback(feedback) = &events.last().unwrap().data else { panic!("{events:?}") };
    assert_eq!((events.len(), feedback.caller.as_deref()), (2, Some("reviewer")));

    assert_eq!(send(&gateway, with_key(classify(), "app"), input).await.0.status, StatusCode::OK);
    let (parts, body) = send(&gateway, with_key(classify(), "app"), input).await;
    assert_eq!((parts.status.as_u16(), &body["error"]["code"]), (429, &json!("rate_limit_exceeded")));
    let wait: u64 = parts.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
    assert_eq!(gateway.analysis.read().revisions["a"].refused, 0, "a caller's limit is not the revision's refusal");
}

#[tokio::test]
async fn tokens_of_an_answer_count_and_the_key_is_not_passed_on() {
    let (sender, mut seen) = tokio::sync::mpsc::unbounded_channel();
    let answer = post(async move |headers: axum::http::HeaderMap| {
        sender.send(headers).unwrap();
        Json(json!({"choices": [{"index": 0, "message": {"content": "one"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 8, "completion_tokens": 7, "total_tokens": 15}}))
    });
    let server = Router::new().route("/v1/chat/completions", answer);
    let (address, _server) = serve(([127, 0, 0, 1], 0).into(), server).await;
    let (gateway, ..) = guarded(address).await;
    let question = r#"{"messages": []}"#;
    assert_eq!(send(&gateway, with_key(chat(), "chatter"), question).await.0.status, StatusCode::OK);
    assert!(!seen.recv().await.unwrap().contains_key("authorization"));
    let begin = Instant::now();
    // The answer is counted by the task that passes it on.
    while send(&gateway, with_key(chat(), "chatter"), question).await.0.status != StatusCode::TOO_MANY_REQUESTS {
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}

#[tokio::test]
async fn grpc_needs_a_key_as_well() {
    let (service, _) = test_support::service();
    let ready = athanor_telemetry::Readiness::new();
    let server = serve_grpc(Inference::new(service, ready.clone())).await;
    let (gateway, ..) = guarded(server).await;
    gateway.registry.set_endpoints("a", vec![Address { http: server, grpc: Some(server), draining: false }]);
    let router = serve_grpc(Passing::new(gateway, ready)).await;
    let mut client = GrpcInferenceServiceClient::connect(format!("http://{router}")).await.unwrap();
    for (key, expected) in [
        (None, Some(tonic::Code::Unauthenticated)),
        (Some("Bearer guess"), Some(tonic::Code::Unauthenticated)),
        (Some("Bearer reviewer"), Some(tonic::Code::PermissionDenied)),
        (Some("Bearer app"), None),
        (Some("Bearer app"), None),
        (Some("Bearer app"), Some(tonic::Code::ResourceExhausted)),
    ] {
        let mut request = tonic::Request::new(infer("reviews", &["great"]));
        if let Some(key) = key {
            request.metadata_mut().insert("authorization", key.parse().unwrap());
        }
        assert_eq!(client.model_infer(request).await.err().map(|status| status.code()), expected, "{key:?}");
    }
}

#[tokio::test]
async fn requests_of_a_stream_are_counted_one_by_one() {
    let (service, _) = test_support::language_model(Default::default());
    let ready = athanor_telemetry::Readiness::new();
    let server = serve_grpc(Inference::new(service, ready.clone())).await;
    let (gateway, ..) = guarded(server).await;
    gateway.registry.set_endpoints("a", vec![Address { http: server, grpc: Some(server), draining: false }]);
    let router = serve_grpc(Passing::new(gateway, ready)).await;
    for (key, expected) in
        [("Bearer guess", tonic::Code::Unauthenticated), ("Bearer reviewer", tonic::Code::PermissionDenied)]
    {
        assert_eq!(
            Client::connect(router, &[("authorization", key)]).await.err().map(|status| status.code()),
            Some(expected)
        );
    }
    // Twice a minute, and one answer of more than ten tokens.
    for (key, answers, refusal) in [("Bearer app", 2, "used its requests"), ("Bearer chatter", 1, "used its tokens")] {
        let mut client = Client::connect(router, &[("authorization", key)]).await.unwrap();
        for _ in 0..answers {
            client.send(ask("1", "hello", true));
            assert_eq!(text(&client.answer().await), "hello");
        }
        // The tokens are counted when the answer has ended, after its last response.
        let begin = Instant::now();
        loop {
            client.send(ask("2", "hello", true));
            let last = client.answer().await.pop().unwrap();
            if last.error_message.contains(refusal) {
                break;
            }
            assert!(key.ends_with("chatter") && begin.elapsed() < Duration::from_secs(5), "{key}: {last:?}");
        }
    }
}
