//! Revisions that are adapters of one model and share its servers, and adapters that clients select.

use athanor_serving::api::inference::generation;
use athanor_telemetry::Readiness;
use axum::http::HeaderMap;

use super::{
    grpc::{Client, ask, generations, parameter, text},
    streams::{chat, until},
    *,
};

/// A server that has loaded some adapters. Its answer has the header and the `model` of the request, and as revision the
/// adapter of the header or `base`, as those of athanor-server have.
async fn base(loaded: &'static [&'static str]) -> (SocketAddr, CancellationToken) {
    let answer = post(async move |headers: HeaderMap, Json(request): Json<Value>| {
        let header = headers.get("x-athanor-adapter").map(|value| value.to_str().unwrap().to_owned());
        let model = request["model"].as_str().unwrap_or("d");
        let is_loaded = |name: &str| loaded.contains(&name);
        if !header.as_deref().map_or(model == "d" || is_loaded(model), is_loaded) {
            let body = Json(json!({"error": {"code": "model_not_found"}}));
            return (StatusCode::NOT_FOUND, [("x-athanor-revision", "base")], body).into_response();
        }
        let by = [("x-athanor-revision", header.clone().unwrap_or("base".into()))];
        if request["messages"][0]["content"] == "refuse" {
            return (StatusCode::NOT_FOUND, by, Json(json!({"error": {"code": "wrong_model_kind"}}))).into_response();
        }
        if request["messages"][0]["content"] == "busy" {
            return (StatusCode::TOO_MANY_REQUESTS, by).into_response();
        }
        let message = json!({"role": "assistant", "content": "yes"});
        let choice = json!({"index": 0, "message": message, "finish_reason": "stop"});
        (by, Json(json!({"choices": [choice], "header": header, "model": model}))).into_response()
    });
    let data: Vec<Value> = std::iter::once(&"d")
        .chain(loaded)
        .map(|id| json!({"id": id, "object": "model", "created": 0, "owned_by": "athanor"}))
        .collect();
    let models = get(Json(json!({"object": "list", "data": data})));
    serve(([127, 0, 0, 1], 0).into(), Router::new().route("/v1/chat/completions", answer).route("/v1/models", models))
        .await
}

/// Revisions that are adapters of the model behind the Service `base`, and one adapter that clients select.
fn shared(weights: &[(&str, u32)]) -> RouterConfig {
    let mut config = config(weights);
    for revision in &mut config.revisions {
        revision.service = "base".into();
        revision.adapter = Some(revision.name.clone());
    }
    config.adapters = vec!["legal".into()];
    config
}

const ASK: &str = r#"{"model": "d", "messages": [{"role": "user", "content": "hi"}]}"#;
const ASK_LEGAL: &str = r#"{"model": "legal", "messages": [{"role": "user", "content": "hi"}]}"#;

#[tokio::test]
async fn the_router_says_which_adapter_a_revision_is_and_no_client_does() {
    let (address, _base) = base(&["a", "b", "legal"]).await;
    let gateway = gateway(shared(&[("a", 50), ("b", 50)]), &[("base", &[address])]);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..60 {
        let (parts, body) = send(&gateway, chat().header("x-athanor-adapter", "legal"), ASK).await;
        assert_eq!(parts.status, StatusCode::OK, "{body}");
        let revision = parts.headers["x-athanor-revision"].to_str().unwrap();
        assert_eq!((&body["header"], &body["model"]), (&json!(revision), &json!("d")));
        seen.insert(revision.to_owned());
    }
    assert_eq!(seen.len(), 2, "both revisions of the same servers have traffic: {seen:?}");
    let counted = gateway.analysis.read().revisions;
    assert_eq!(counted["a"].requests + counted["b"].requests, 60, "they are counted apart: {counted:?}");
    for pinned in ["a", "b"] {
        let (_, body) = send(&gateway, chat().header("x-athanor-revision", pinned), ASK).await;
        assert_eq!(body["header"], pinned);
    }

    // `model` selects an adapter unless the header is there.
    let (parts, body) = send(&gateway, chat(), ASK_LEGAL).await;
    assert_eq!((parts.status, &body["header"], &body["model"]), (StatusCode::OK, &Value::Null, &json!("legal")));
    let counted = gateway.analysis.read().revisions;
    assert_eq!(counted["a"].requests + counted["b"].requests, 60, "its answer is not the revision's: {counted:?}");
    let models = Request::builder().uri("/v1/models");
    let (_, body) = send(&gateway, models, "").await;
    let ids: Vec<&str> = body["data"].as_array().unwrap().iter().filter_map(|model| model["id"].as_str()).collect();
    assert_eq!(ids, ["d", "a", "b", "legal"]);

    // A revision with servers of its own is no adapter.
    gateway.registry.set_config(crate::config::check(config(&[("c", 100)])).unwrap());
    gateway.registry.set_endpoints("c", vec![Address { http: address, grpc: None, draining: false }]);
    let (parts, body) = send(&gateway, chat().header("x-athanor-adapter", "b"), ASK).await;
    assert_eq!((parts.status, &body["header"]), (StatusCode::OK, &Value::Null));
}

#[tokio::test]
async fn a_server_that_lacks_an_adapter_is_left_for_one_that_has_it() {
    let (poor, _poor) = base(&["a"]).await;
    let (rich, _rich) = base(&["a", "b"]).await;
    let gateway = gateway(shared(&[("a", 100), ("b", 0)]), &[("base", &[poor, rich])]);
    for _ in 0..20 {
        let (parts, body) = send(&gateway, chat().header("x-athanor-revision", "b"), ASK).await;
        assert_eq!((parts.status, &body["header"]), (StatusCode::OK, &json!("b")), "{body}");
    }

    // No server has it: the same server answers as the other revision, and the refusal counts against the first one.
    gateway.registry.set_config(crate::config::check(shared(&[("a", 0), ("b", 100)])).unwrap());
    gateway.registry.set_endpoints("base", vec![Address { http: poor, grpc: None, draining: false }]);
    let (parts, body) = send(&gateway, chat(), ASK).await;
    assert_eq!((parts.status, &body["header"]), (StatusCode::OK, &json!("a")), "{body}");
    assert_eq!(parts.headers["x-athanor-revision"], "a");
    let counted = gateway.analysis.read().revisions;
    assert_eq!((counted["b"].refused, counted["b"].requests, counted["a"].requests), (1, 0, 1));
    // What the servers refuse for another reason, or at the moment, they refuse as any revision.
    gateway.registry.set_endpoints("base", vec![Address { http: rich, grpc: None, draining: false }]);
    for (content, status) in [("refuse", StatusCode::NOT_FOUND), ("busy", StatusCode::TOO_MANY_REQUESTS)] {
        let (parts, _) = send(&gateway, chat(), &ASK.replace("hi", content)).await;
        assert_eq!((parts.status, &parts.headers["x-athanor-revision"]), (status, &"b".parse().unwrap()));
    }
    let counted = gateway.analysis.read().revisions;
    assert_eq!((counted["b"].refused, counted["a"].refused), (3, 0), "nothing is held against the other revision");

    // A request for that revision alone gets the server's answer.
    gateway.registry.set_endpoints("base", vec![Address { http: poor, grpc: None, draining: false }]);
    let (parts, body) = send(&gateway, chat().header("x-athanor-revision", "b"), ASK).await;
    assert_eq!((parts.status, &body["error"]["code"]), (StatusCode::NOT_FOUND, &json!("model_not_found")));

    // The same for an adapter that a client selects.
    let (legal, _legal) = base(&["a", "b", "legal"]).await;
    let addresses = [poor, legal].map(|http| Address { http, grpc: None, draining: false });
    gateway.registry.set_endpoints("base", addresses.into());
    for _ in 0..20 {
        let (parts, body) = send(&gateway, chat(), ASK_LEGAL).await;
        assert_eq!((parts.status, &body["model"]), (StatusCode::OK, &json!("legal")), "{body}");
    }
}

#[tokio::test]
async fn an_event_has_the_adapter_that_a_client_selected() {
    let (address, _base) = base(&["a", "legal"]).await;
    let mut config = shared(&[("a", 100)]);
    config.events = Some(EventsConfig::new("nowhere:9092", "t"));
    let gateway = gateway(config, &[("base", &[address])]);
    let kept = Arc::new(Kept::default());
    gateway.events.set(Some(kept.clone()));
    gateway.labels.set("a".into(), Vec::new());
    for (number, (body, adapter)) in [(ASK, None), (ASK_LEGAL, Some("legal"))].into_iter().enumerate() {
        send(&gateway, chat(), body).await;
        let begin = Instant::now();
        let event = loop {
            // Each answer is followed by the feedback to it.
            if let Some(event) = kept.events.lock().unwrap().get(2 * number) {
                break event.clone();
            }
            assert!(begin.elapsed() < Duration::from_secs(5), "event {number} was not recorded");
            tokio::time::sleep(Duration::from_millis(2)).await;
        };
        let EventData::Generation(generation) = &event.data else { panic!("{event:?}") };
        assert_eq!((&*generation.revision, generation.adapter.as_deref()), ("a", adapter), "{body}");
        let id = generation.request_id.clone();
        let feedback = Request::builder().method(Method::POST).uri("/v1/feedback");
        let (parts, answer) = send(&gateway, feedback, &format!(r#"{{"request_id": "{id}", "rating": -1}}"#)).await;
        assert_eq!(parts.status, StatusCode::ACCEPTED, "{answer}");
    }
    assert_eq!(gateway.analysis.read().revisions["a"].feedback_total, 1, "the other feedback is about the adapter");
}

/// A language model over gRPC that has loaded these adapters, which answer in capital letters.
async fn grpc_base(loaded: &[&str]) -> SocketAddr {
    let (service, _) = test_support::language_model(Default::default());
    for name in loaded {
        service.load_adapter(name, test_support::shout()).await.unwrap();
    }
    serve_grpc(Inference::new(service, Readiness::new())).await
}

/// A router over gRPC before such servers.
async fn grpc_router(config: RouterConfig, servers: &[SocketAddr]) -> (Arc<Gateway>, SocketAddr) {
    let gateway = gateway(config, &[]);
    let address = |&server: &SocketAddr| Address { http: server, grpc: Some(server), draining: false };
    gateway.registry.set_endpoints("base", servers.iter().map(address).collect());
    let router = serve_grpc(Passing::new(gateway.clone(), Readiness::new())).await;
    (gateway, router)
}

/// Revision and text of an answer to "hi", over one call and over a stream.
async fn ask_twice(router: SocketAddr, model: &str, metadata: &[(&'static str, &str)]) -> [(String, String); 2] {
    let mut asked = ask("1", "hi", false);
    asked.model_name = model.into();
    let mut client = GrpcInferenceServiceClient::connect(format!("http://{router}")).await.unwrap();
    let mut request = tonic::Request::new(asked.clone());
    for (name, value) in metadata {
        request.metadata_mut().insert(*name, value.parse().unwrap());
    }
    let response = client.model_infer(request).await.unwrap();
    let revision = response.metadata().get("x-athanor-revision").unwrap().to_str().unwrap().to_owned();
    let one = (revision, generation::decode(response.get_ref()).unwrap().0);
    let mut stream = Client::connect(router, metadata).await.unwrap();
    stream.send(asked);
    let responses = stream.answer().await;
    [one, (parameter(&responses[0], "x-athanor-revision"), text(&responses))]
}

#[tokio::test]
async fn calls_over_grpc_choose_adapters_as_those_over_http() {
    let mut config = shared(&[("a", 50), ("b", 50)]);
    config.events = Some(EventsConfig::new("nowhere:9092", "t"));
    let (gateway, router) = grpc_router(config, &[grpc_base(&["a", "b", "legal"]).await]).await;
    let kept = Arc::new(Kept::default());
    gateway.events.set(Some(kept.clone()));
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..30 {
        for (revision, answer) in ask_twice(router, "writer", &[("x-athanor-adapter", "nobody")]).await {
            assert_eq!(answer, "HI", "the router says which adapter answers, and no client does");
            seen.insert(revision);
        }
    }
    assert_eq!(Vec::from_iter(seen), ["a", "b"]);
    let total = || gateway.analysis.read().revisions.values().map(|counts| counts.requests).sum::<u64>();
    assert_eq!(total(), 60);
    for answer in ask_twice(router, "writer", &[("x-athanor-revision", "b")]).await {
        assert_eq!(answer, ("b".into(), "HI".into()));
    }

    kept.events.lock().unwrap().clear();
    for (_, answer) in ask_twice(router, "legal", &[]).await {
        assert_eq!(answer, "HI");
    }
    assert_eq!(total(), 60, "an answer of an adapter that the client selected is not the revision's");
    until("the events", || generations(&kept).len() == 2).await;
    assert!(generations(&kept).iter().all(|generation| generation.adapter.as_deref() == Some("legal")));
}

#[tokio::test]
async fn a_call_over_grpc_leaves_a_server_that_lacks_its_adapter() {
    let (poor, rich) = (grpc_base(&["a"]).await, grpc_base(&["a", "b", "legal"]).await);
    let (_, router) = grpc_router(shared(&[("a", 100), ("b", 0)]), &[poor, rich]).await;
    for _ in 0..10 {
        for answer in ask_twice(router, "writer", &[("x-athanor-revision", "b")]).await {
            assert_eq!(answer, ("b".into(), "HI".into()));
        }
        for (_, answer) in ask_twice(router, "legal", &[]).await {
            assert_eq!(answer, "HI");
        }
    }

    // No server has it: the same server answers as the other revision, and the refusal counts against the first one.
    let (gateway, router) = grpc_router(shared(&[("a", 0), ("b", 100)]), &[poor]).await;
    for answer in ask_twice(router, "writer", &[]).await {
        assert_eq!(answer, ("a".into(), "HI".into()));
    }
    let counted = gateway.analysis.read().revisions;
    assert_eq!((counted["b"].refused, counted["b"].requests, counted["a"].requests), (2, 0, 2));
}
