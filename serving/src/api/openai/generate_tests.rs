//! Language and embedding models over HTTP, with a model by a rule (`test_support::language_model`).

use std::{sync::atomic::Ordering, time::Duration};

use athanor_contract::serve::ServeLimits;
use axum::{
    body::{Body, to_bytes},
    http::{Method, header::RETRY_AFTER, response::Parts},
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use futures::StreamExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;
use crate::test_support::{self, Gate, LONGEST};

pub(super) fn limits() -> ServeLimits {
    ServeLimits { max_inputs: 4, queue_inputs: 8, max_batch_inputs: 8, ..ServeLimits::default() }
}

pub(super) fn application(limits: ServeLimits) -> (Router, Arc<Service>, Arc<Gate>) {
    let (service, gate) = test_support::language_model(limits);
    (app(service.clone(), Router::new()), service, gate)
}

fn request(path: &str, body: impl Into<Body>) -> Request {
    let request = Request::builder().method(Method::POST).uri(path).header("content-type", "application/json");
    request.body(body.into()).unwrap()
}

pub(super) async fn send(app: &Router, path: &str, body: impl ToString) -> (Parts, String) {
    let response = app.clone().oneshot(request(path, body.to_string())).await.unwrap();
    let (parts, body) = response.into_parts();
    (parts, String::from_utf8(to_bytes(body, 1 << 20).await.unwrap().to_vec()).unwrap())
}

pub(super) async fn ask(app: &Router, path: &str, body: Value) -> Value {
    let (parts, text) = send(app, path, body).await;
    assert_eq!(parts.status, 200, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// A chat request whose answer is `answer`, with further parameters.
fn chat(answer: &str, more: Value) -> Value {
    let mut body =
        json!({"model": "writer", "temperature": 0, "messages": [{"role": "user", "content": format!("[{answer}]")}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

/// The events of a stream: JSON, or `[DONE]` as a string.
pub(super) fn events(text: &str) -> Vec<Value> {
    text.split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).unwrap_or_else(|_| data.into()))
        .collect()
}

#[tokio::test]
async fn a_chat_is_answered_with_its_usage() {
    let (app, _, _) = application(limits());
    let messages = json!([
        {"role": "developer", "content": "Say it."},
        {"role": "user", "content": [{"type": "text", "text": "this:"}, {"type": "text", "text": "[héllo]"}]},
    ]);
    let (parts, text) = send(
        &app,
        CHAT,
        json!({"messages": messages, "user": "u", "metadata": {"a": "b"}, "temperature": 0,
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "stop": null}),
    )
    .await;
    assert_eq!(parts.status, 200, "{text}");
    assert_eq!(parts.headers["x-athanor-revision"], "writer-1");
    let body: Value = serde_json::from_str(&text).unwrap();
    let prompt = "system: Say it.\nuser: this:\n[héllo]\n".len() + 1;
    assert_eq!(body["object"], "chat.completion");
    assert_eq!((&body["model"], &body["system_fingerprint"]), (&json!("writer"), &json!("writer-1")));
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-") && body["created"].as_i64().unwrap() > 0, "{body}");
    let message = json!({"role": "assistant", "content": "héllo", "refusal": null});
    assert_eq!(body["choices"], json!([{"index": 0, "message": message, "logprobs": null, "finish_reason": "stop"}]));
    assert_eq!(
        body["usage"],
        json!({"prompt_tokens": prompt, "completion_tokens": 7, "total_tokens": prompt + 7,
            "prompt_tokens_details": {"cached_tokens": 0}})
    );
    // The blocks of the same prompt are in the cache.
    let again = ask(&app, CHAT, json!({"messages": messages, "temperature": 0})).await;
    assert_eq!(again["usage"]["prompt_tokens_details"]["cached_tokens"], prompt / 8 * 8);
}

#[tokio::test]
async fn an_answer_ends_at_its_limit_at_the_context_or_at_a_stop_string() {
    let (app, _, _) = application(limits());
    let long = "x".repeat(200);
    for (answer, more, content, reason) in [
        ("abcdef", json!({"max_tokens": 3}), "abc", "length"),
        ("abcdef", json!({"max_completion_tokens": 2, "max_tokens": 5}), "ab", "length"),
        ("abcdef", json!({"stop": "cd"}), "ab", "stop"),
        ("abcdef", json!({"stop": ["zz", "ef", "d"]}), "abc", "stop"),
        ("abcde", json!({"stop": ["ef"]}), "abcde", "stop"),
        ("abcde", json!({"stop": ["ef"], "max_tokens": 5}), "abcde", "length"),
        ("aéb", json!({"stop": ["é"]}), "a", "stop"),
        ("aéb", json!({"max_tokens": 2}), "a\u{fffd}", "length"),
        (&long, json!({}), &long[..LONGEST - "user: []\n".len() - 1 - 200], "length"),
    ] {
        let body = ask(&app, CHAT, chat(answer, more.clone())).await;
        assert_eq!(body["choices"][0]["message"]["content"], content, "{answer} {more}");
        assert_eq!(body["choices"][0]["finish_reason"], reason, "{answer} {more}");
    }
}

#[tokio::test]
async fn an_answer_does_not_end_by_itself_before_its_least_number_of_tokens() {
    let (app, _, _) = application(limits());
    for (more, tokens, reason) in [
        (json!({"max_tokens": 5}), 3, "stop"),
        (json!({"max_tokens": 5, "min_tokens": 2}), 3, "stop"),
        (json!({"max_tokens": 9, "min_tokens": 4}), 5, "stop"),
        (json!({"max_tokens": 5, "min_tokens": 5}), 5, "length"),
        (json!({"max_tokens": 5, "ignore_eos": true}), 5, "length"),
        (json!({"max_tokens": 5, "ignore_eos": false}), 3, "stop"),
        (json!({"max_tokens": 5, "ignore_eos": true, "stop": "b"}), 2, "stop"),
    ] {
        let body = ask(&app, CHAT, chat("ab", more.clone())).await;
        assert_eq!(body["usage"]["completion_tokens"], tokens, "{more}");
        assert_eq!(body["choices"][0]["finish_reason"], reason, "{more}");
    }
    let schema = json!({"type": "json_object"});
    let (parts, text) = send(&app, CHAT, chat("{}", json!({"ignore_eos": true, "response_format": schema}))).await;
    assert_eq!(parts.status, 400, "{text}");
    assert!(text.contains("min_tokens"), "{text}");
}

#[tokio::test]
async fn a_stream_has_roles_pieces_reasons_usage_and_done() {
    let (app, _, _) = application(limits());
    let more = json!({"stream": true, "n": 2, "stop": "d!", "stream_options": {"include_usage": true}});
    let (parts, text) = send(&app, CHAT, chat("abdc", more)).await;
    assert_eq!(parts.status, 200, "{text}");
    assert_eq!(parts.headers["content-type"], "text/event-stream");
    let events = events(&text);
    assert_eq!(events.last(), Some(&json!("[DONE]")));
    let usage = &events[events.len() - 2];
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(10)));
    let chunks = &events[..events.len() - 2];
    for index in 0..2 {
        let own: Vec<&Value> = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == index).collect();
        let deltas: Vec<&Value> = own.iter().map(|chunk| &chunk["choices"][0]["delta"]).collect();
        // "d" is held back until it is clear that no "!" follows.
        let expected = [
            json!({"role": "assistant", "content": ""}),
            json!({"content": "a"}),
            json!({"content": "b"}),
            json!({"content": "dc"}),
            json!({}),
        ];
        assert_eq!(deltas, expected.iter().collect::<Vec<_>>());
        let reasons: Vec<&Value> = own.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).collect();
        assert!(reasons[..4].iter().all(|reason| reason.is_null()) && *reasons[4] == "stop", "{reasons:?}");
        for chunk in own {
            assert_eq!((&chunk["object"], &chunk["usage"]), (&json!("chat.completion.chunk"), &Value::Null));
            assert_eq!((&chunk["id"], &chunk["model"]), (&usage["id"], &json!("writer")));
        }
    }
    let (_, text) = send(&app, CHAT, chat("a", json!({"stream": true}))).await;
    assert!(!text.contains("usage") && text.ends_with("data: [DONE]\n\n"), "{text}");
}

#[tokio::test]
async fn an_error_of_the_engine_is_a_500_or_the_last_event_of_a_stream() {
    let (app, _, _) = application(limits());
    for (answer, part, failure) in [("ab!", "out of memory", None), ("ab?", "not finite", Some("not_finite"))] {
        let (parts, text) = send(&app, CHAT, chat(answer, json!({}))).await;
        assert_eq!(parts.status, 500, "{text}");
        assert_eq!(parts.headers.get("x-athanor-failure").map(|why| why.to_str().unwrap()), failure);
        let error: Value = serde_json::from_str(&text).unwrap();
        assert!(error["error"]["message"].as_str().unwrap().contains(part), "{text}");
        assert_eq!(error["error"]["type"], "server_error");
        let (parts, text) = send(&app, CHAT, chat(answer, json!({"stream": true}))).await;
        assert_eq!(parts.status, 200);
        let events = events(&text);
        assert_eq!(events[events.len() - 2]["choices"][0]["delta"]["content"], "b");
        let error = &events.last().unwrap()["error"];
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
        assert_eq!((&error["code"], &error["param"]), (&json!("model_failed"), &Value::Null));
    }
    // The engine goes on with others.
    ask(&app, CHAT, chat("fine", json!({}))).await;
    let (late, _, gate) = application(ServeLimits { max_request_seconds: 0, ..limits() });
    let _release = hold(gate).await;
    let (parts, text) = send(&late, CHAT, chat("ab", json!({}))).await;
    assert_eq!(parts.status, 504, "{text}");
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
async fn each_mistake_names_its_parameter() {
    let (app, _, _) = application(limits());
    let user = json!([{"role": "user", "content": "x"}]);
    let chats = [
        (json!({}), 400, json!("messages"), "invalid_field"),
        (json!({"messages": []}), 400, json!("messages"), "messages_empty"),
        (json!({"messages": "x"}), 400, json!("messages"), "invalid_field"),
        (json!({"messages": [1]}), 400, json!("messages[0]"), "invalid_field"),
        (json!({"messages": [{"content": "x"}]}), 400, json!("messages[0].role"), "invalid_field"),
        (json!({"messages": [{"role": "robot", "content": "x"}]}), 400, json!("messages[0].role"), "invalid_field"),
        (json!({"messages": [{"role": "user"}]}), 400, json!("messages[0].content"), "invalid_field"),
        (json!({"messages": [{"role": "user", "content": 1}]}), 400, json!("messages[0].content"), "invalid_field"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            400,
            json!("messages[0].content[0].type"),
            "unsupported_parameter",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
            400,
            json!("messages[0].content[0].text"),
            "invalid_field",
        ),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), 400, json!("messages"), "invalid_conversation"),
    ];
    let own = [
        (json!({"top_logprobs": 2}), 400, json!("top_logprobs"), "invalid_field"),
        (json!({"logprobs": true, "top_logprobs": 21}), 400, json!("top_logprobs"), "invalid_field"),
        (json!({"logprobs": 1}), 400, json!("logprobs"), "invalid_field"),
    ];
    let shared = [
        (json!({"model": "other"}), 404, json!("model"), "model_not_found"),
        (json!({"model": 1}), 400, json!("model"), "invalid_field"),
        (json!({"temperature": 2.1}), 400, json!("temperature"), "invalid_field"),
        (json!({"temperature": -0.1}), 400, json!("temperature"), "invalid_field"),
        (json!({"temperature": "hot"}), 400, json!("temperature"), "invalid_field"),
        (json!({"temperature": 1e300}), 400, json!("temperature"), "invalid_field"),
        (json!({"top_p": 0}), 400, json!("top_p"), "invalid_field"),
        (json!({"top_p": 1.5}), 400, json!("top_p"), "invalid_field"),
        (json!({"top_k": -2}), 400, json!("top_k"), "invalid_field"),
        (json!({"top_k": 1.5}), 400, json!("top_k"), "invalid_field"),
        (json!({"min_p": 2}), 400, json!("min_p"), "invalid_field"),
        (json!({"frequency_penalty": 3}), 400, json!("frequency_penalty"), "invalid_field"),
        (json!({"presence_penalty": -3}), 400, json!("presence_penalty"), "invalid_field"),
        (json!({"repetition_penalty": 0}), 400, json!("repetition_penalty"), "invalid_field"),
        (json!({"seed": "x"}), 400, json!("seed"), "invalid_field"),
        (json!({"logit_bias": {"x": 1}}), 400, json!("logit_bias.x"), "invalid_field"),
        (json!({"logit_bias": {"9999": 1}}), 400, json!("logit_bias"), "invalid_field"),
        (json!({"stop": 1}), 400, json!("stop"), "invalid_field"),
        (json!({"stop": ["a", 1]}), 400, json!("stop[1]"), "invalid_field"),
        (json!({"stop": ["a", ""]}), 400, json!("stop[1]"), "invalid_field"),
        (json!({"stop": ["a", "b", "c", "d", "e"]}), 400, json!("stop"), "invalid_field"),
        (json!({"max_tokens": 0}), 400, json!("max_tokens"), "invalid_field"),
        (json!({"max_tokens": -1}), 400, json!("max_tokens"), "invalid_field"),
        (json!({"max_tokens": 1000}), 400, json!("max_tokens"), "context_length_exceeded"),
        (json!({"max_tokens": 4, "min_tokens": 5}), 400, json!("min_tokens"), "invalid_field"),
        (json!({"ignore_eos": 1}), 400, json!("ignore_eos"), "invalid_field"),
        (json!({"n": 0}), 400, json!("n"), "invalid_field"),
        (json!({"n": 5}), 400, json!("n"), "too_many_answers"),
        (json!({"stream": "yes"}), 400, json!("stream"), "invalid_field"),
        (json!({"stream_options": {"include_usage": true}}), 400, json!("stream_options"), "invalid_field"),
        (
            json!({"stream": true, "stream_options": {"include_usage": 1}}),
            400,
            json!("stream_options.include_usage"),
            "invalid_field",
        ),
        (json!({"response_format": {}}), 400, json!("response_format.type"), "invalid_field"),
        (json!({"temprature": 1}), 400, json!("temprature"), "unknown_field"),
    ];
    let texts = [
        (json!({"response_format": {"type": "json_object"}}), 400, json!("response_format"), "unsupported_parameter"),
        (json!({"tools": [{"type": "function"}]}), 400, json!("tools"), "unsupported_parameter"),
        (json!({"tool_choice": "required"}), 400, json!("tool_choice"), "unsupported_parameter"),
        (json!({}), 400, json!("prompt"), "invalid_field"),
        (json!({"prompt": {}}), 400, json!("prompt"), "invalid_field"),
        (json!({"prompt": []}), 400, json!("prompt"), "input_empty"),
        (json!({"prompt": ""}), 400, json!("prompt[0]"), "input_empty"),
        (json!({"prompt": [true]}), 400, json!("prompt[0]"), "invalid_field"),
        (json!({"prompt": ["a", 1]}), 400, json!("prompt[1]"), "invalid_field"),
        (json!({"prompt": [1, -1]}), 400, json!("prompt[1]"), "invalid_field"),
        (json!({"prompt": [1, 9999]}), 400, json!("prompt"), "invalid_field"),
        (json!({"prompt": ["a", "b", "c", "d", "e"]}), 400, json!("prompt"), "too_many_inputs"),
        (json!({"prompt": ["a", "b", "c"], "n": 2}), 400, json!("n"), "too_many_answers"),
        (json!({"prompt": "x".repeat(300)}), 400, json!("max_tokens"), "context_length_exceeded"),
        (json!({"prompt": "x", "echo": 1}), 400, json!("echo"), "invalid_field"),
        (json!({"prompt": "x", "suffix": "y"}), 400, json!("suffix"), "unsupported_parameter"),
        (json!({"prompt": "x", "n": 2, "best_of": 1}), 400, json!("best_of"), "invalid_field"),
    ];
    let with = |base: &Value, more: &Value| {
        let mut body = base.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let chat = json!({"messages": user});
    let mut cases: Vec<_> = chats.iter().map(|case| (CHAT, json!({}), case)).collect();
    cases.extend(own.iter().chain(&shared).map(|case| (CHAT, chat.clone(), case)));
    cases.extend(shared.iter().map(|case| (TEXT, json!({"prompt": "x"}), case)));
    cases.extend(texts.iter().map(|case| (TEXT, json!({}), case)));
    for (path, base, (more, status, param, code)) in cases {
        let (parts, text) = send(&app, path, with(&base, more)).await;
        assert_eq!(parts.status.as_u16(), *status, "{path} {more}: {text}");
        let error: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&error["error"]["param"], &error["error"]["code"]), (param, &json!(code)), "{path} {more}: {text}");
        assert!(!error["error"]["message"].as_str().unwrap().is_empty());
    }
    for (body, param) in [
        (r#"{"temperature": NaN, "messages": []}"#, json!("temperature")),
        (r#"{"messages": [], "top_p": -Infinity}"#, json!("top_p")),
        (r#"{"messages": ["#, Value::Null),
        ("[]", Value::Null),
    ] {
        let (parts, text) = send(&app, CHAT, body).await;
        let error: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((parts.status.as_u16(), &error["error"]["param"]), (400, &param), "{body}: {text}");
    }
}

#[tokio::test]
async fn log_probabilities_have_tokens_bytes_and_alternatives() {
    let (app, _, _) = application(limits());
    let body = ask(&app, CHAT, chat("aéX", json!({"logprobs": true, "top_logprobs": 2, "stop": "X"}))).await;
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let bytes: Vec<&Value> = content.iter().map(|entry| &entry["bytes"]).collect();
    assert_eq!(bytes, [&json!([97]), &json!([195]), &json!([169])], "no entry for the stop string");
    assert_eq!(content[0]["token"], "a");
    let top = content[0]["top_logprobs"].as_array().unwrap();
    assert_eq!((&top[0]["token"], &top[1]["token"]), (&json!("a"), &json!("b")));
    let chosen = content[0]["logprob"].as_f64().unwrap();
    assert_eq!(top[0]["logprob"], content[0]["logprob"]);
    assert!((top[1]["logprob"].as_f64().unwrap() - (chosen - 5.0)).abs() < 1e-4 && chosen < 0.0, "{content:?}");

    let (_, text) = send(&app, CHAT, chat("ab", json!({"logprobs": true, "stream": true}))).await;
    let tokens: Vec<Value> = events(&text)
        .iter()
        .filter_map(|event| event["choices"][0]["logprobs"]["content"][0].as_object().cloned())
        .map(|entry| {
            assert_eq!(entry["top_logprobs"], json!([]));
            entry["token"].clone()
        })
        .collect();
    assert_eq!(tokens, ["a", "b"]);

    let body = ask(&app, TEXT, json!({"prompt": "[ab]", "temperature": 0, "logprobs": 1})).await;
    let logprobs = &body["choices"][0]["logprobs"];
    assert_eq!((&logprobs["tokens"], &logprobs["text_offset"]), (&json!(["a", "b"]), &json!([0, 1])));
    assert!(logprobs["top_logprobs"][1]["b"].is_f64() && logprobs["token_logprobs"][1].is_f64(), "{logprobs}");
}

#[tokio::test]
async fn prompts_are_texts_or_tokens_and_each_has_its_answers() {
    let (app, _, _) = application(limits());
    let tokens: Vec<u32> = "[ab]".bytes().map(u32::from).chain([test_support::BEGIN]).collect();
    for (prompt, n, expected) in [
        (json!("[ab]"), 1, vec!["ab"]),
        (json!(["[ab]", "[c]"]), 2, vec!["ab", "ab", "c", "c"]),
        (json!(tokens), 1, vec!["ab"]),
        (json!([tokens, tokens]), 1, vec!["ab", "ab"]),
    ] {
        let body =
            ask(&app, TEXT, json!({"prompt": prompt, "n": n, "temperature": 0, "best_of": n, "echo": false})).await;
        let choices = body["choices"].as_array().unwrap();
        let texts: Vec<&str> = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
        assert_eq!(texts, expected, "{prompt}");
        assert!(choices.iter().zip(0..).all(|(choice, index)| choice["index"] == index), "{body}");
        assert_eq!(body["object"], "text_completion");
    }
    let (_, text) = send(&app, TEXT, json!({"prompt": "[ab]", "temperature": 0, "stream": true})).await;
    let events = events(&text);
    let texts: Vec<&Value> = events.iter().filter_map(|event| event["choices"][0].get("text")).collect();
    assert_eq!(texts, ["a", "b", ""]);
    assert_eq!((&events[2]["choices"][0]["finish_reason"], &events[3]), (&json!("stop"), &json!("[DONE]")));
}

#[tokio::test]
async fn a_seed_gives_the_same_text_and_none_another_one() {
    let (app, _, _) = application(limits());
    let sample = async |more: Value| {
        let mut body = chat("aaaaaaaaaaaaaaaaaaaaaaaa", json!({"temperature": 2, "max_tokens": 40}));
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ask(&app, CHAT, body).await["choices"][0]["message"]["content"].clone()
    };
    assert_eq!(sample(json!({"seed": -5})).await, sample(json!({"seed": -5})).await);
    assert_ne!(sample(json!({"seed": 5})).await, sample(json!({"seed": u64::MAX})).await);
    assert_ne!(sample(json!({})).await, sample(json!({})).await);
    assert_eq!(sample(json!({"top_k": 1})).await, sample(json!({"temperature": 0})).await);
}

/// Holds the gate until the sender is dropped.
pub(super) async fn hold(gate: Arc<Gate>) -> std::sync::mpsc::Sender<()> {
    let (release, held) = std::sync::mpsc::channel::<()>();
    let (locked, is_locked) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _guard = gate.lock.lock().unwrap();
        locked.send(()).unwrap();
        let _ = held.recv();
    });
    is_locked.await.unwrap();
    release
}

async fn until(what: impl Fn() -> bool) {
    for _ in 0..5000 {
        if what() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("nothing in 5 s");
}

#[tokio::test]
async fn a_client_that_goes_away_ends_its_answers() {
    let (app, service, gate) = application(limits());
    let load = || service.generator().unwrap().load();
    for stream in [false, true] {
        let release = hold(gate.clone()).await;
        let before = gate.batches.load(Ordering::SeqCst);
        let body = chat(&"x".repeat(100), json!({"stream": stream, "n": 3}));
        let sending = tokio::spawn(app.clone().oneshot(request(CHAT, body.to_string())));
        until(|| gate.batches.load(Ordering::SeqCst) > before).await;
        if stream {
            // The head and the first event are there before the first token.
            let mut body = sending.await.unwrap().unwrap().into_body().into_data_stream();
            assert!(body.next().await.unwrap().unwrap().starts_with(b"data: "));
        } else {
            sending.abort();
            assert!(sending.await.unwrap_err().is_cancelled());
        }
        drop(release);
        until(|| load().running == 0 && load().waiting == 0 && load().used_blocks == 0).await;
        assert!(gate.batches.load(Ordering::SeqCst) < before + 10, "100 tokens were not generated");
    }
}

#[tokio::test]
async fn a_full_queue_is_a_429_and_a_drain_a_503() {
    let limits = ServeLimits { queue_inputs: 3, max_batch_inputs: 1, ..limits() };
    let (app, service, gate) = application(limits);
    let release = hold(gate.clone()).await;
    let running = tokio::spawn({
        let app = app.clone();
        async move { send(&app, CHAT, chat("ab", json!({}))).await }
    });
    until(|| gate.batches.load(Ordering::SeqCst) > 0).await;
    let (parts, text) = send(&app, CHAT, chat("ab", json!({"n": 4}))).await;
    assert_eq!(parts.status, 429, "{text}");
    assert_eq!(parts.headers[RETRY_AFTER], "1");
    assert!(text.contains("queue_full") && text.contains("rate_limit_error"), "{text}");
    service.drain();
    let (parts, text) = send(&app, CHAT, chat("ab", json!({"stream": true}))).await;
    assert_eq!(parts.status, 503, "{text}");
    assert!(parts.headers.contains_key(RETRY_AFTER));
    drop(release);
    // What was in progress is completed.
    let (parts, text) = running.await.unwrap();
    assert_eq!(parts.status, 200, "{text}");
}

#[tokio::test]
async fn routes_of_other_models_say_which_ones_there_are() {
    let (writer, _, _) = application(limits());
    let classifier = app(test_support::service().0, Router::new());
    let vectors = app(test_support::embedding_model(), Router::new());
    for (app, path, part) in [
        (
            &writer,
            "/v1/classify",
            "this model is a language model; use /v1/chat/completions, /v1/completions or /v1/responses",
        ),
        (&writer, "/v1/embeddings", "a language model"),
        (&classifier, CHAT, "this model is a classifier; use /v1/classify"),
        (&classifier, TEXT, "a classifier"),
        (&vectors, CHAT, "this model is an embedding model; use /v1/embeddings"),
        (&vectors, "/v1/classify", "an embedding model"),
    ] {
        let (parts, text) = send(app, path, json!({"input": "x"})).await;
        assert_eq!(parts.status, 404, "{path}: {text}");
        assert!(text.contains(part) && text.contains("wrong_model_kind"), "{path}: {text}");
    }
    let response = writer.oneshot(Request::builder().uri("/v1/models").body(Body::empty()).unwrap()).await.unwrap();
    let body: Value = serde_json::from_slice(&to_bytes(response.into_body(), 1 << 20).await.unwrap()).unwrap();
    assert_eq!((&body["data"][0]["id"], &body["data"][0]["max_model_len"]), (&json!("writer"), &json!(LONGEST)));
}

#[tokio::test]
async fn embeddings_are_numbers_or_base64() {
    let app = app(test_support::embedding_model(), Router::new());
    let path = "/v1/embeddings";
    let body = ask(&app, path, json!({"model": "vectors", "input": ["ab cde", "x"], "user": "u"})).await;
    assert_eq!(
        body["data"],
        json!([
            {"object": "embedding", "index": 0, "embedding": [2.0, 3.0]},
            {"object": "embedding", "index": 1, "embedding": [1.0, 0.0]},
        ])
    );
    assert_eq!(body["usage"], json!({"prompt_tokens": 3, "total_tokens": 3}));
    for input in [json!("ab cde"), json!([2, 3]), json!([[2, 3]])] {
        let body = ask(&app, path, json!({"input": input, "encoding_format": "base64"})).await;
        let bytes = BASE64_STANDARD.decode(body["data"][0]["embedding"].as_str().unwrap()).unwrap();
        assert_eq!(bytes, [2_f32.to_le_bytes(), 3_f32.to_le_bytes()].concat(), "{input}");
    }
    for (body, param, code) in [
        (json!({}), "input", "invalid_field"),
        (json!({"input": []}), "input", "input_empty"),
        (json!({"input": ["a", ""]}), "input[1]", "input_empty"),
        (json!({"input": ["a", "b", "c", "d"]}), "input", "too_many_inputs"),
        (json!({"input": [[1], [20]]}), "input[1]", "invalid_field"),
        (json!({"input": [[1, 1, 1, 1, 1, 1, 1, 1, 1]]}), "input[0]", "context_length_exceeded"),
        (json!({"input": {"a": 1}}), "input", "invalid_field"),
        (json!({"input": "a", "dimensions": 3}), "dimensions", "invalid_field"),
        (json!({"input": "a", "encoding_format": "int8"}), "encoding_format", "invalid_field"),
        (json!({"input": "a", "inputs": "b"}), "inputs", "unknown_field"),
    ] {
        let (parts, text) = send(&app, path, &body).await;
        let error: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(parts.status, 400, "{body}: {text}");
        assert_eq!(
            (&error["error"]["param"], &error["error"]["code"]),
            (&json!(param), &json!(code)),
            "{body}: {text}"
        );
    }
    let (parts, text) = send(&app, path, json!({"input": "a", "model": "other"})).await;
    assert_eq!(parts.status, 404, "{text}");
}
