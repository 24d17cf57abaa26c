//! Structured output and calls of functions over HTTP, with a model by a rule (`test_support::language_model`): it says
//! what stands between the last `[` and the `]` behind it, as far as a grammar lets it.

use std::sync::atomic::Ordering;

use athanor_contract::serve::ServeLimits;
use axum::{
    body::{Body, to_bytes},
    http::Method,
};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::*;
use crate::test_support::{LONGEST, language_model, language_model_with_template};

const LLAMA: &str = "{{ tools }}<|python_tag|>";

fn limits() -> ServeLimits {
    ServeLimits { max_inputs: 4, queue_inputs: 8, max_batch_inputs: 8, ..ServeLimits::default() }
}

fn application() -> Router {
    app(language_model(limits()).0, Router::new())
}

async fn send(app: &Router, body: &Value) -> (u16, String) {
    let request = Request::builder().method(Method::POST).uri("/v1/chat/completions");
    let request = request.header("content-type", "application/json").body(Body::from(body.to_string())).unwrap();
    let response = app.clone().oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    (status, String::from_utf8(to_bytes(response.into_body(), 1 << 20).await.unwrap().to_vec()).unwrap())
}

/// A chat whose answer, if it is free, is `answer`.
fn chat(answer: &str, more: Value) -> Value {
    let mut body = json!({"temperature": 0, "messages": [{"role": "user", "content": format!("[{answer}]")}]});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

async fn ask(app: &Router, body: &Value) -> Value {
    let (status, text) = send(app, body).await;
    assert_eq!(status, 200, "{body}: {text}");
    serde_json::from_str(&text).unwrap()
}

/// The deltas of the first choice of a stream, and its finish reason.
async fn stream(app: &Router, mut body: Value) -> (Vec<Value>, String) {
    body["stream"] = true.into();
    let (status, text) = send(app, &body).await;
    assert_eq!(status, 200, "{body}: {text}");
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let (mut deltas, mut reason) = (Vec::new(), Value::Null);
    for data in text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).filter(|data| *data != "[DONE]") {
        let choice = serde_json::from_str::<Value>(data).unwrap()["choices"][0].take();
        deltas.push(choice["delta"].clone());
        reason = choice["finish_reason"].clone();
    }
    (deltas, reason.as_str().unwrap().to_owned())
}

/// A stream's deltas as the message of a whole answer, without the ids of its calls.
fn joined(deltas: &[Value]) -> Value {
    let mut content = String::new();
    let mut calls: Vec<Value> = Vec::new();
    for delta in deltas {
        content.push_str(delta["content"].as_str().unwrap_or_default());
        for part in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = part["index"].as_u64().unwrap() as usize;
            let text = part["function"]["arguments"].as_str().unwrap();
            if index == calls.len() {
                assert!(part["id"].as_str().unwrap().starts_with("call_") && part["type"] == "function", "{part}");
                calls.push(json!([part["function"]["name"], text]));
            } else {
                assert!(part.get("id").is_none() && part["function"].get("name").is_none(), "{part}");
                calls[index][1] = (calls[index][1].as_str().unwrap().to_owned() + text).into();
            }
        }
    }
    json!([content, calls])
}

/// A whole answer in the same shape.
fn whole(answer: &Value) -> Value {
    let message = &answer["choices"][0]["message"];
    let calls = message["tool_calls"].as_array().into_iter().flatten();
    let call = |call: &Value| {
        assert!(call["id"].as_str().unwrap().starts_with("call_") && call["type"] == "function", "{call}");
        json!([call["function"]["name"], call["function"]["arguments"]])
    };
    json!([message["content"].as_str().unwrap_or_default(), calls.map(call).collect::<Vec<_>>()])
}

fn schema(schema: Value) -> Value {
    json!({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "strict": true, "schema": schema}}})
}

fn letters() -> Value {
    json!({"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"],
        "additionalProperties": false})
}

#[tokio::test]
async fn an_answer_is_json_of_its_schema_and_ends_with_it() {
    let app = application();
    // What the model wants to say is allowed, so it says so and no more.
    for (answer, more) in [
        (r#"{"a": "x"} and more"#, schema(letters())),
        (r#"{"a": "x"} and more"#, json!({"response_format": {"type": "json_object"}})),
    ] {
        let body = ask(&app, &chat(answer, more.clone())).await;
        assert_eq!(body["choices"][0]["message"]["content"], r#"{"a": "x"}"#);
        assert_eq!(body["choices"][0]["finish_reason"], "stop");
        assert_eq!(body["usage"]["completion_tokens"], 10, "no token is spent on the end");
        let (deltas, reason) = stream(&app, chat(answer, more)).await;
        assert_eq!((joined(&deltas), reason.as_str()), (json!([r#"{"a": "x"}"#, []]), "stop"));
    }
    // What it wants to say is not allowed.
    let body = ask(&app, &chat("hello", schema(letters()))).await;
    let content: Value = serde_json::from_str(body["choices"][0]["message"]["content"].as_str().unwrap()).unwrap();
    assert!(["x", "y"].contains(&content["a"].as_str().unwrap()), "{content}");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    // The limit of tokens and stop strings end it as well.
    for (more, content, reason) in
        [(json!({"max_tokens": 5}), r#"{"a":"#, "length"), (json!({"stop": ":"}), r#"{"a""#, "stop")]
    {
        let mut body = chat(r#"{"a": "x"}"#, schema(letters()));
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let body = ask(&app, &body).await;
        assert_eq!(
            (&body["choices"][0]["message"]["content"], &body["choices"][0]["finish_reason"]),
            (&json!(content), &json!(reason))
        );
    }
}

#[tokio::test]
async fn each_choice_follows_the_schema_and_a_seed_gives_the_same_text() {
    let app = application();
    let mut body = chat("hello", schema(letters()));
    body.as_object_mut().unwrap().extend(
        json!({"n": 4, "temperature": 2, "seed": 3, "logprobs": true, "top_logprobs": 1}).as_object().unwrap().clone(),
    );
    let contents = |body: &Value| -> Vec<String> {
        let choices = body["choices"].as_array().unwrap().iter();
        choices.map(|choice| choice["message"]["content"].as_str().unwrap().to_owned()).collect()
    };
    let first = ask(&app, &body).await;
    for (content, choice) in contents(&first).iter().zip(first["choices"].as_array().unwrap()) {
        let parsed: Value = serde_json::from_str(content).unwrap();
        assert!(["x", "y"].contains(&parsed["a"].as_str().unwrap()), "{content}");
        let logprobs = choice["logprobs"]["content"].as_array().unwrap();
        assert_eq!(logprobs.len(), content.len(), "a token is a byte");
    }
    assert_ne!(contents(&first)[0], contents(&first)[1]);
    assert_eq!(contents(&first), contents(&ask(&app, &body).await));
}

/// Functions `get`, with a schema, and `stop`, without parameters.
fn tools(more: Value) -> Value {
    let get = json!({"name": "get", "description": "Gets it.", "parameters": letters()});
    let mut tools = json!({"tools": [{"type": "function", "function": get},
        {"type": "function", "function": {"name": "stop"}}]});
    tools.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    tools
}

const GET: &str = "<tool_call>\n{\"name\": \"get\", \"arguments\": {\"a\": \"x\"}}\n</tool_call>";

#[tokio::test]
async fn calls_are_read_from_a_free_answer() {
    let app = application();
    let before = format!("Wait. {GET}");
    let two = format!("{GET}<tool_call>{{\"name\": \"stop\"}}</tool_call>");
    let get = json!(["get", "{\"a\": \"x\"}"]);
    for (answer, more, expected, reason) in [
        (GET, json!({}), json!(["", [get]]), "tool_calls"),
        (before.as_str(), json!({"tool_choice": "auto"}), json!(["Wait.", [get]]), "tool_calls"),
        (two.as_str(), json!({}), json!(["", [get, ["stop", "{}"]]]), "tool_calls"),
        (two.as_str(), json!({"parallel_tool_calls": false}), json!(["", [get]]), "tool_calls"),
        ("Hello", json!({}), json!(["Hello", []]), "stop"),
        ("<tool_call>{}", json!({}), json!(["<tool_call>{}", []]), "stop"),
        (GET, json!({"tool_choice": "none"}), json!([GET, []]), "stop"),
        (GET, json!({"max_tokens": 30}), json!([&GET[..30], []]), "length"),
    ] {
        let body = chat(answer, tools(more));
        let answer = ask(&app, &body).await;
        assert_eq!(
            (whole(&answer), &answer["choices"][0]["finish_reason"]),
            (expected.clone(), &json!(reason)),
            "{body}"
        );
        let (deltas, streamed) = stream(&app, body.clone()).await;
        assert_eq!((joined(&deltas), streamed.as_str()), (expected, reason), "{body}");
    }
    let answer = ask(&app, &chat(GET, tools(json!({})))).await;
    assert_eq!(answer["choices"][0]["message"]["content"], Value::Null);
    // Tokens of the prompt: the functions are shown to the model unless none may be called.
    let tokens = async |more| ask(&app, &chat("a", tools(more))).await["usage"]["prompt_tokens"].as_u64().unwrap();
    assert_eq!(tokens(json!({})).await, tokens(json!({"tool_choice": "none"})).await + "tools: 2\n".len() as u64);
}

#[tokio::test]
async fn a_call_that_is_required_is_made_whatever_the_model_wants() {
    for (template, text) in [("{{ tools }}<tool_call>", GET), (LLAMA, r#"{"name": "get", "parameters": {"a": "x"}}"#)] {
        let app = app(language_model_with_template(limits(), template).0, Router::new());
        let named = json!({"type": "function", "function": {"name": "get"}});
        for choice in [json!("required"), named] {
            let body = chat(text, tools(json!({"tool_choice": choice, "parallel_tool_calls": false})));
            let answer = ask(&app, &body).await;
            assert_eq!(whole(&answer), json!(["", [["get", "{\"a\": \"x\"}"]]]), "{body}");
            assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
            assert_eq!(answer["usage"]["completion_tokens"], text.len());
            let (deltas, reason) = stream(&app, body).await;
            assert_eq!((joined(&deltas), reason.as_str()), (whole(&answer), "tool_calls"));
            // The name comes first, the arguments as they grow.
            let calls: Vec<&Value> = deltas.iter().filter(|delta| delta.get("tool_calls").is_some()).collect();
            assert_eq!(calls.len(), 1 + r#"{"a": "x"}"#.len(), "{calls:?}");
            assert_eq!(calls[0]["tool_calls"][0]["function"], json!({"name": "get", "arguments": ""}));
        }
        // It wants to say something else.
        let named = json!({"type": "function", "function": {"name": "stop"}});
        for (choice, names) in [(json!("required"), &["get", "stop"][..]), (named, &["stop"])] {
            let body = chat("no", tools(json!({"tool_choice": choice, "parallel_tool_calls": false})));
            let answer = ask(&app, &body).await;
            let call = &whole(&answer)[1][0];
            assert!(names.contains(&call[0].as_str().unwrap()), "{answer}");
            assert!(serde_json::from_str::<Value>(call[1].as_str().unwrap()).unwrap().is_object(), "{answer}");
        }
    }
    // Cut off within the arguments.
    let body = chat(GET, tools(json!({"tool_choice": "required", "max_tokens": GET.find("x").unwrap()})));
    let app = application();
    let answer = ask(&app, &body).await;
    assert_eq!(whole(&answer), json!(["", [["get", "{\"a\": \""]]]));
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn an_answer_with_a_schema_and_functions_is_json_or_a_call() {
    let block = "```json\n{\"name\": \"get\", \"arguments\": {\"a\": \"x\"}}\n```";
    for (template, call) in [("{{ tools }}<tool_call>", GET), (LLAMA, block)] {
        let app = app(language_model_with_template(limits(), template).0, Router::new());
        let both = |text: &str, mut more: Value| {
            more["response_format"] = schema(letters())["response_format"].take();
            chat(text, tools(more))
        };
        let get = json!(["", [["get", "{\"a\": \"x\"}"]]]);
        let answer = json!([r#"{"a": "y"}"#, []]);
        for (text, more, expected, reason) in [
            (call, json!({}), &get, "tool_calls"),
            (r#"{"a": "y"} and more"#, json!({}), &answer, "stop"),
            (r#"{"a": "y"} and more"#, json!({"tool_choice": "none"}), &answer, "stop"),
        ] {
            let body = both(text, more);
            let answer = ask(&app, &body).await;
            assert_eq!((&whole(&answer), &answer["choices"][0]["finish_reason"]), (expected, &json!(reason)), "{body}");
            let (deltas, streamed) = stream(&app, body.clone()).await;
            assert_eq!((&joined(&deltas), streamed.as_str()), (expected, reason), "{body}");
        }
        // A call that is required is no JSON of the schema.
        let body = both(r#"{"a": "y"}"#, json!({"tool_choice": "required", "parallel_tool_calls": false}));
        assert_eq!(ask(&app, &body).await["choices"][0]["finish_reason"], "tool_calls");
        // The model wants to say something else.
        let answer = ask(&app, &both("no", json!({"parallel_tool_calls": false}))).await;
        let found = whole(&answer);
        let is_json = found[0].as_str().is_some_and(|text| serde_json::from_str::<Value>(text).is_ok());
        assert!(is_json || found[1].as_array().is_some_and(|calls| calls.len() == 1), "{answer}");
    }
}

#[tokio::test]
async fn functions_of_a_model_without_a_place_for_them_are_in_its_messages() {
    let app = app(language_model_with_template(limits(), "{{ messages }}").0, Router::new());
    let function = json!({"name": "f", "description": "x".repeat(100)});
    let tools = json!({"tools": [{"type": "function", "function": function}]});
    let (status, text) = send(&app, &chat("a", tools)).await;
    // The context of the test's model is too short for the text that explains the calls.
    assert_eq!(status, 400, "{text}");
    assert!(text.contains("context_length_exceeded"), "{text}");
    let answer = ask(&app, &chat("a", json!({}))).await;
    assert_eq!(answer["choices"][0]["message"]["content"], "a");
}

#[tokio::test]
async fn each_mistake_names_its_parameter() {
    let app = application();
    let tool = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
    let format = |format: Value| json!({"response_format": format});
    let large = json!({"enum": ["x".repeat(70_000)]});
    let mut bad = tools(json!({"tool_choice": "required"}));
    bad["tools"][1]["function"]["parameters"] = json!({"type": "object", "if": {}});
    let named = |name: &str| json!({"tool_choice": {"type": "function", "function": {"name": name}}});
    let mut answer = tools(json!({}));
    answer["response_format"] = schema(json!({"type": "object", "if": {}}))["response_format"].take();
    for (more, param, code) in [
        (format(json!({"type": "xml"})), "response_format.type", "unsupported_parameter"),
        (format(json!({"type": 1})), "response_format.type", "invalid_field"),
        (format(json!("json")), "response_format.type", "invalid_field"),
        (format(json!({"type": "json_schema"})), "response_format.json_schema", "invalid_field"),
        (format(json!({"type": "json_object", "schema": {}})), "response_format.schema", "invalid_field"),
        (
            format(json!({"type": "text", "json_schema": {"name": "s", "schema": {}}})),
            "response_format.json_schema",
            "invalid_field",
        ),
        (
            format(json!({"type": "json_schema", "json_schema": {"schema": {}}})),
            "response_format.json_schema",
            "invalid_field",
        ),
        (
            format(json!({"type": "json_schema", "json_schema": {"name": "s", "schema": 1}})),
            "response_format.json_schema.schema",
            "invalid_field",
        ),
        (schema(json!({"type": "object", "if": {}})), "response_format.json_schema.schema", "invalid_schema"),
        (schema(large), "response_format.json_schema.schema", "invalid_schema"),
        (bad, "tools[1].function.parameters", "invalid_schema"),
        (json!({"tools": 1}), "tools", "invalid_field"),
        (json!({"tools": [{"type": "function"}]}), "tools[0]", "invalid_field"),
        (json!({"tools": [{"type": "search", "function": {"name": "f"}}]}), "tools[0].type", "unsupported_parameter"),
        (tool(json!({"name": "f g"})), "tools[0].function.name", "invalid_field"),
        (
            tool(json!({"name": "f", "parameters": {"type": "string"}})),
            "tools[0].function.parameters.type",
            "invalid_field",
        ),
        (tool(json!({"name": "f", "return": {}})), "tools[0].function.return", "invalid_field"),
        (
            json!({"tools": [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "f"}}]}),
            "tools[1].function.name",
            "invalid_field",
        ),
        (json!({"tool_choice": "required"}), "tool_choice", "invalid_field"),
        (tools(json!({"tool_choice": "any"})), "tool_choice", "invalid_field"),
        (tools(json!({"tool_choice": 1})), "tool_choice", "invalid_field"),
        (tools(json!({"tool_choice": {"type": "custom"}})), "tool_choice.type", "unsupported_parameter"),
        (tools(json!({"tool_choice": {"type": "function"}})), "tool_choice.function.name", "invalid_field"),
        (tools(named("none")), "tool_choice.function.name", "invalid_field"),
        (named("get"), "tool_choice.function.name", "invalid_field"),
        (tools(json!({"parallel_tool_calls": 1})), "parallel_tool_calls", "invalid_field"),
        (answer, "response_format.json_schema.schema", "invalid_schema"),
        (json!({"functions": [{"name": "f"}]}), "functions", "unsupported_parameter"),
        (json!({"function_call": {"name": "f"}}), "function_call", "unsupported_parameter"),
    ] {
        let (status, text) = send(&app, &chat("a", more.clone())).await;
        let error: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(status, 400, "{more}: {text}");
        assert_eq!(
            (&error["error"]["param"], &error["error"]["code"]),
            (&json!(param), &json!(code)),
            "{more}: {text}"
        );
        assert!(error["error"]["message"].as_str().unwrap().starts_with(param), "{text}");
    }
    let (_, text) = send(&app, &chat("a", schema(json!({"type": "object", "if": {}})))).await;
    assert!(text.contains("Unimplemented keys"), "the compiler's message: {text}");
    let (_, text) = send(&app, &chat("a", json!({"functions": [{"name": "f"}]}))).await;
    assert!(text.contains("use tools"), "{text}");
}

#[tokio::test]
async fn a_full_queue_and_too_many_bytes_cost_neither_a_grammar_nor_a_tokenization() {
    let (service, gate) = language_model(ServeLimits { queue_inputs: 2, ..limits() });
    let app = app(service, Router::new());
    // The schema cannot be followed, which only its compiler finds out.
    let mut body = chat("a", schema(json!({"type": "object", "if": {}})));
    body["n"] = 3.into();
    let (status, text) = send(&app, &body).await;
    assert_eq!(status, 429, "{text}");
    assert!(text.contains("queue_full"), "{text}");
    body["n"] = 2.into();
    let (status, text) = send(&app, &body).await;
    assert_eq!(status, 400, "{text}");
    assert!(text.contains("invalid_schema"), "{text}");
    // Its places are free again.
    ask(&app, &chat("a", json!({"n": 2}))).await;
    let before = gate.tokenised.load(Ordering::SeqCst);
    let described = |letters: usize| {
        let function = json!({"name": "f", "description": "x".repeat(letters)});
        json!({"tools": [{"type": "function", "function": function}]})
    };
    // Tokens of the test's model have up to 256 bytes by the bound.
    let (status, text) = send(&app, &chat("a", described(256 * LONGEST))).await;
    assert_eq!(status, 400, "{text}");
    assert!(text.contains("context_length_exceeded"), "{text}");
    assert_eq!(gate.tokenised.load(Ordering::SeqCst), before);
    ask(&app, &chat("a", described(255 * LONGEST))).await;
    assert_eq!(gate.tokenised.load(Ordering::SeqCst), before + 1);
}
