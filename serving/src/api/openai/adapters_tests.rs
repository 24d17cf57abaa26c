//! Adapters over HTTP, with a model by a rule whose adapters answer in capital letters.

use axum::{
    body::{Body, to_bytes},
    http::response::Parts,
};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::{
    generate_tests::{application, limits},
    *,
};
use crate::{
    service::AdapterError,
    test_support::{self, Gate, shout, until},
};

/// A service with the adapters `loud` and `spare`.
async fn adapted() -> (Router, Arc<Service>, Arc<Gate>) {
    let (app, service, gate) = application(limits());
    for name in ["loud", "spare"] {
        service.load_adapter(name, shout()).await.unwrap();
    }
    (app, service, gate)
}

/// Sends a request with an adapter in its header, if there is one. `GET` without a body.
async fn send(app: &Router, path: &str, adapter: Option<&str>, body: Option<Value>) -> (Parts, Value) {
    let mut request = Request::builder().uri(path).header("content-type", "application/json");
    if let Some(adapter) = adapter {
        request = request.header("x-athanor-adapter", adapter);
    }
    let request = match body {
        Some(body) => request.method("POST").body(Body::from(body.to_string())),
        None => request.body(Body::empty()),
    };
    let (parts, body) = app.clone().oneshot(request.unwrap()).await.unwrap().into_parts();
    let bytes = to_bytes(body, 1 << 20).await.unwrap();
    (parts, serde_json::from_slice(&bytes).unwrap())
}

/// Requests of each route for the answer `abc`, and where their text is.
fn requests(model: Option<&str>) -> [(&'static str, Value, &'static str); 3] {
    let chat = json!({"model": model, "temperature": 0, "messages": [{"role": "user", "content": "[abc]"}]});
    let text = json!({"model": model, "temperature": 0, "prompt": "[abc]"});
    let response = json!({"model": model, "temperature": 0, "input": "[abc]"});
    [
        (paths::CHAT, chat, "/choices/0/message/content"),
        (paths::COMPLETIONS, text, "/choices/0/text"),
        (paths::RESPONSES, response, "/output/0/content/0/text"),
    ]
}

#[tokio::test]
async fn model_and_header_choose_the_adapter() {
    let (app, _, _) = adapted().await;
    for (model, header, text, name, revision) in [
        (None, None, "abc", "writer", "writer-1"),
        (Some("writer"), None, "abc", "writer", "writer-1"),
        (Some("loud"), None, "ABC", "loud", "writer-1"),
        (Some("writer"), Some("loud"), "ABC", "writer", "loud"),
        (None, Some("loud"), "ABC", "writer", "loud"),
        (Some("spare"), Some("loud"), "ABC", "writer", "loud"),
    ] {
        for (path, body, place) in requests(model) {
            let what = format!("{path} {model:?} {header:?}");
            let (parts, found) = send(&app, path, header, Some(body)).await;
            assert_eq!(parts.status, 200, "{what}: {found}");
            assert_eq!((&found["model"], found.pointer(place)), (&json!(name), Some(&json!(text))), "{what}");
            assert_eq!(parts.headers["x-athanor-revision"], revision, "{what}");
            if path != paths::RESPONSES {
                assert_eq!(found["system_fingerprint"], revision, "{what}");
            }
        }
    }
}

#[tokio::test]
async fn a_stream_has_the_adapters_name() {
    let (app, _, _) = adapted().await;
    let body = json!({"model": "loud", "prompt": "[abc]", "temperature": 0, "stream": true});
    let (parts, text) = generate_tests::send(&app, paths::COMPLETIONS, body).await;
    assert_eq!(parts.status, 200, "{text}");
    let events = generate_tests::events(&text);
    let said: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!((said.as_str(), &events[0]["model"]), ("ABC", &json!("loud")));
}

#[tokio::test]
async fn what_is_not_loaded_is_not_found() {
    let (app, _, _) = adapted().await;
    for (path, body, _) in requests(Some("quiet")) {
        let (parts, found) = send(&app, path, None, Some(body)).await;
        assert_eq!((parts.status.as_u16(), &found["error"]["param"]), (404, &json!("model")), "{path}: {found}");
    }
    for (path, body, _) in requests(Some("writer")) {
        let (parts, found) = send(&app, path, Some("quiet"), Some(body)).await;
        assert_eq!((parts.status.as_u16(), &found["error"]["code"]), (404, &json!("model_not_found")), "{path}");
        assert_eq!(parts.headers["x-athanor-revision"], "writer-1", "{path}");
        assert!(parts.headers.contains_key("x-request-id"), "{path}");
    }
    let classifier = app_of_classifier();
    let (parts, found) = send(&classifier, paths::CLASSIFY, Some("loud"), Some(json!({"input": "fine"}))).await;
    assert_eq!(parts.status, 404, "{found}");
    let (parts, _) = send(&classifier, paths::CLASSIFY, None, Some(json!({"input": "fine"}))).await;
    assert_eq!(parts.status, 200);
}

fn app_of_classifier() -> Router {
    app(test_support::service().0, Router::new())
}

#[tokio::test]
async fn models_lists_adapters_with_their_parent() {
    let (app, service, _) = adapted().await;
    let (_, found) = send(&app, paths::MODELS, None, None).await;
    let listed: Vec<(&Value, &Value)> =
        found["data"].as_array().unwrap().iter().map(|model| (&model["id"], &model["parent"])).collect();
    let (writer, null) = (json!("writer"), Value::Null);
    assert_eq!(listed, [(&writer, &null), (&json!("loud"), &writer), (&json!("spare"), &writer)]);
    let (parts, found) = send(&app, "/v1/models/loud", None, None).await;
    assert_eq!((parts.status.as_u16(), &found["parent"]), (200, &writer), "{found}");
    // The tokenizer is the model's.
    let (parts, found) = send(&app, paths::TOKENIZE, None, Some(json!({"model": "loud", "prompt": "ab"}))).await;
    assert_eq!((parts.status.as_u16(), &found["count"]), (200, &json!(3)), "{found}");
    service.unload_adapter("loud");
    let (parts, _) = send(&app, "/v1/models/loud", None, None).await;
    assert_eq!(parts.status, 404);
}

/// The model fails if a row reads a block that another adapter wrote.
#[tokio::test]
async fn adapters_share_no_prefix() {
    let (app, _, _) = adapted().await;
    let ask = async |model: &str| {
        let body = json!({"model": model, "temperature": 0, "prompt": "a prompt of many blocks [abc]"});
        let (parts, found) = send(&app, paths::COMPLETIONS, None, Some(body)).await;
        assert_eq!(parts.status, 200, "{model}: {found}");
        found["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    for model in ["writer", "loud", "spare"] {
        assert_eq!(ask(model).await, 0, "{model}");
        assert_eq!(ask(model).await, 24, "{model}");
    }
}

#[tokio::test]
async fn an_answer_in_progress_keeps_its_adapter() {
    let (app, service, gate) = adapted().await;
    assert_eq!(gate.adapters.lock().unwrap().len(), 2);
    let release = generate_tests::hold(gate.clone()).await;
    let [_, (path, body, place), _] = requests(Some("loud"));
    let running = tokio::spawn({
        let (app, body) = (app.clone(), body.clone());
        async move { send(&app, path, None, Some(body)).await }
    });
    until("the model runs", || gate.batches.load(std::sync::atomic::Ordering::SeqCst) == 1).await;
    service.unload_adapter("loud");
    let (parts, _) = send(&app, path, None, Some(body.clone())).await;
    assert_eq!(parts.status, 404);
    drop(release);
    let (parts, found) = running.await.unwrap();
    assert_eq!((parts.status.as_u16(), found.pointer(place)), (200, Some(&json!("ABC"))), "{found}");
    until("the model dropped it", || gate.adapters.lock().unwrap().len() == 1).await;
    // Another one of the same name.
    service.load_adapter("loud", shout()).await.unwrap();
    assert_eq!(send(&app, path, None, Some(body)).await.0.status, 200);
}

#[tokio::test]
async fn what_cannot_be_an_adapter_is_refused() {
    let (_, service, gate) = adapted().await;
    for name in ["", "a b", "a,b", "a/b", "ä", &*"x".repeat(254)] {
        let error = service.load_adapter(name, shout()).await.unwrap_err();
        assert!(matches!(error, AdapterError::Name(_)), "{name}: {error}");
    }
    let error = service.load_adapter("writer", shout()).await.unwrap_err();
    assert!(matches!(error, AdapterError::ModelName(_)), "{error}");
    let error = service.load_adapter("other", crate::engine::backend::AdapterWeights::default()).await.unwrap_err();
    assert!(error.to_string().contains("0 modules"), "{error}");
    assert!(service.adapter("other").is_none());
    let error = test_support::service().0.load_adapter("loud", shout()).await.unwrap_err();
    assert!(matches!(error, AdapterError::WrongKind), "{error}");
    // A replaced adapter that nobody uses is dropped.
    service.load_adapter("loud", shout()).await.unwrap();
    until("the first one is dropped", || gate.adapters.lock().unwrap().len() == 2).await;
}
