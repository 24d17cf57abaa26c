use std::sync::atomic::Ordering;

use axum::{
    body::{Body, to_bytes},
    http::{Method, header::RETRY_AFTER},
};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;
use crate::test_support;

fn application() -> (Router, Arc<Service>, Arc<test_support::Gate>) {
    let (service, gate) = test_support::service();
    (app(service.clone(), Router::new()), service, gate)
}

async fn send(app: &Router, method: Method, path: &str, body: impl Into<Body>) -> (axum::http::response::Parts, Value) {
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json");
    let response = app.clone().oneshot(request.body(body.into()).unwrap()).await.unwrap();
    let (parts, body) = response.into_parts();
    let bytes = to_bytes(body, 1 << 20).await.unwrap();
    (parts, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

#[tokio::test]
async fn answers_one_text_and_a_list() {
    let (app, _, _) = application();
    let (parts, body) = send(&app, Method::POST, "/v1/classify", r#"{"input": "lovely thing"}"#).await;
    assert_eq!(parts.status, 200, "{body}");
    assert_eq!(parts.headers["x-athanor-revision"], "reviews-1");
    assert!(!parts.headers["x-request-id"].is_empty());
    assert_eq!(body["object"], "list");
    assert_eq!(body["model"], "reviews");
    assert_eq!(body["usage"], json!({"prompt_tokens": 2, "total_tokens": 2}));
    let data = &body["data"][0];
    assert_eq!((&data["index"], &data["label"]), (&json!(0), &json!("positive")));
    assert!((data["score"].as_f64().unwrap() - 0.75).abs() < 1e-6);
    assert_eq!(data["probabilities"][0]["label"], "negative");

    let (_, body) =
        send(&app, Method::POST, "/v1/classify", r#"{"model":"reviews","input":["bad","great","meh"]}"#).await;
    let labels: Vec<_> = body["data"].as_array().unwrap().iter().map(|data| data["label"].as_str().unwrap()).collect();
    assert_eq!(labels, ["negative", "positive", "negative"]);

    let (_, body) = send(&app, Method::GET, "/v1/models", "").await;
    assert_eq!(body["data"][0]["id"], "reviews");
    assert_eq!(body["data"][0]["labels"], json!(["negative", "positive"]));
}

#[tokio::test]
async fn each_mistake_has_its_status_field_and_code() {
    let (app, _, _) = application();
    let large = format!(r#"{{"input": "{}"}}"#, "x".repeat(400));
    let cases: Vec<(Vec<u8>, u16, Value, &str)> = vec![
        (b"{".into(), 400, Value::Null, "invalid_json"),
        (b"".into(), 400, Value::Null, "invalid_json"),
        (br#"{"input": "a"} x"#.into(), 400, Value::Null, "invalid_json"),
        (b"{\"input\": \"\xff\"}".into(), 400, Value::Null, "not_utf8"),
        (b"{}".into(), 400, json!("input"), "invalid_field"),
        (br#"{"input": 3}"#.into(), 400, json!("input"), "invalid_field"),
        (br#"{"input": ["a", null]}"#.into(), 400, json!("input[1]"), "invalid_field"),
        (br#"{"input": "a", "inptu": "b"}"#.into(), 400, json!("inptu"), "invalid_field"),
        (br#"{"model": "other", "input": "a"}"#.into(), 404, json!("model"), "model_not_found"),
        (br#"{"input": []}"#.into(), 422, json!("input"), "input_empty"),
        (br#"{"input": ["a", ""]}"#.into(), 422, json!("input[1]"), "input_empty"),
        (br#"{"input": ["a", "b", "c", "d"]}"#.into(), 422, json!("input"), "too_many_inputs"),
        (large.into_bytes(), 413, Value::Null, "body_too_large"),
    ];
    for (request, status, param, code) in cases {
        let shown = String::from_utf8_lossy(&request).chars().take(60).collect::<String>();
        let (parts, body) = send(&app, Method::POST, "/v1/classify", request).await;
        assert_eq!(parts.status.as_u16(), status, "{shown}: {body}");
        assert_eq!(body["error"]["param"], param, "{shown}: {body}");
        assert_eq!(body["error"]["code"], code, "{shown}: {body}");
        assert!(body["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{shown}: {body}");
        assert!(
            parts.headers.contains_key("x-request-id") && parts.headers.contains_key("x-athanor-revision"),
            "{shown}"
        );
    }
    for (method, path, status) in [
        (Method::GET, "/v1/classify", 405),
        (Method::GET, "/v1/none", 404),
        (Method::GET, "/v1/models/other", 404),
        (Method::GET, "/v1/models/%FF", 400),
    ] {
        let (parts, body) = send(&app, method, path, "").await;
        assert_eq!(parts.status.as_u16(), status, "{path}: {body}");
        assert_eq!(parts.headers["x-athanor-revision"], "reviews-1", "{path}");
        assert!(body["error"]["message"].is_string(), "{path}: {body}");
    }
}

#[tokio::test]
async fn the_callers_id_comes_back_unless_it_is_unfit() {
    let (app, _, _) = application();
    for (sent, kept) in [("r-1.2:3_4", true), ("has space", false), (&*"x".repeat(129), false)] {
        let request = Request::builder().uri("/v1/models").header("x-request-id", sent).body(Body::empty()).unwrap();
        let response = app.clone().oneshot(request).await.unwrap();
        assert_eq!(response.headers()["x-request-id"] == sent, kept, "{sent}");
    }
}

#[tokio::test]
async fn a_full_queue_answers_429_with_retry_after() {
    let (app, service, gate) = application();
    // The lock must not be held over an await, so a thread holds it.
    let (release, held) = std::sync::mpsc::channel::<()>();
    let (locked, is_locked) = tokio::sync::oneshot::channel();
    let batches = gate.clone();
    let holder = std::thread::spawn(move || {
        let _guard = gate.lock.lock().unwrap();
        locked.send(()).unwrap();
        held.recv().unwrap();
    });
    is_locked.await.unwrap();
    let post = |body: &'static str| {
        let app = app.clone();
        async move { send(&app, Method::POST, "/v1/classify", body).await }
    };
    // The engine takes the first input; the next three fill the queue.
    let running = tokio::spawn(post(r#"{"input": "a"}"#));
    while batches.batches.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let waiting = tokio::spawn(post(r#"{"input": ["a", "b", "c"]}"#));
    while service.waiting() < 3 {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let (parts, body) = post(r#"{"input": ["a", "b", "c"]}"#).await;
    assert_eq!(parts.status, 429, "{body}");
    assert_eq!(parts.headers[RETRY_AFTER], "1");
    assert_eq!(body["error"]["code"], "queue_full");
    release.send(()).unwrap();
    holder.join().unwrap();
    for answered in [running, waiting] {
        assert_eq!(answered.await.unwrap().0.status, 200);
    }
}
