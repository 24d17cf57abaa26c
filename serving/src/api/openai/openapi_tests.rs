//! The OpenAPI document against the routes, their parameters and their answers.

use std::{collections::BTreeSet, sync::Arc};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::Request,
};
use serde_json::{Map, Value, json};
use tower::ServiceExt;

use super::{
    app,
    generate_tests::{ask, limits, send},
    openapi::document,
    paths, routes,
};
use crate::{service::Service, test_support};

fn services() -> [Arc<Service>; 3] {
    [test_support::service().0, test_support::embedding_model(), test_support::language_model(limits()).0]
}

fn documented(document: &Value) -> &Map<String, Value> {
    document["paths"].as_object().unwrap()
}

#[tokio::test]
async fn the_document_has_each_route_of_the_model_and_no_other() {
    let every: BTreeSet<String> = routes().iter().map(|(path, _)| (*path).to_owned()).collect();
    let mut seen = BTreeSet::new();
    for service in services() {
        let document = document(&service);
        assert_eq!(document["openapi"], "3.1.0");
        let paths = documented(&document);
        seen.extend(paths.keys().cloned());
        let app = app(service, Router::new());
        for path in &every {
            let method =
                paths.get(path).map_or("post", |item| item.as_object().unwrap().keys().next().unwrap().as_str());
            let request = Request::builder().method(method.to_uppercase().as_str()).uri(path.replace("{model}", "x"));
            let request = request.header("content-type", "application/json").body(Body::from("{}")).unwrap();
            let response = app.clone().oneshot(request).await.unwrap();
            let (status, bytes) = (response.status(), to_bytes(response.into_body(), 1 << 20).await.unwrap());
            let text = String::from_utf8_lossy(&bytes);
            let is_missing = text.contains("wrong_model_kind") || text.contains("path_not_found") || status == 405;
            assert_eq!(is_missing, !paths.contains_key(path), "{path}: {status} {text}");
        }
        let (parts, served) = {
            let request = Request::builder().uri(paths::OPENAPI).body(Body::empty()).unwrap();
            app.clone().oneshot(request).await.unwrap().into_parts()
        };
        assert_eq!(parts.status, 200);
        let served: Value = serde_json::from_slice(&to_bytes(served, 1 << 20).await.unwrap()).unwrap();
        assert_eq!(served, document);
    }
    assert_eq!(seen, every);
    let (_, text) = send(&app(services()[2].clone(), Router::new()), paths::CHAT, {
        let mut request = minimal(paths::CHAT, "");
        request["nonsense"] = json!(1);
        request
    })
    .await;
    assert!(text.contains("unknown_field"), "what is not a parameter is refused: {text}");
}

/// The schema that a reference leads to.
fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema["$ref"].as_str() {
        Some(reference) => {
            let found = document.pointer(reference.strip_prefix('#').unwrap());
            resolved(document, found.unwrap_or_else(|| panic!("{reference} is not in the document")))
        }
        None => schema,
    }
}

/// A request without further parameters.
fn minimal(path: &str, further: &str) -> Value {
    match path {
        paths::CHAT => json!({"messages": [{"role": "user", "content": "[a]"}]}),
        paths::COMPLETIONS => json!({"prompt": "[a]"}),
        paths::TOKENIZE if further == "add_generation_prompt" => {
            json!({"messages": [{"role": "user", "content": "a"}]})
        }
        paths::TOKENIZE => json!({"prompt": "a"}),
        paths::DETOKENIZE => json!({"tokens": [1]}),
        paths::RERANK => json!({"query": "a", "documents": ["a"]}),
        _ => json!({"input": "[a]"}),
    }
}

#[tokio::test]
async fn each_documented_parameter_is_one_of_its_route() {
    for service in services() {
        let document = document(&service);
        let app = app(service, Router::new());
        for (path, item) in documented(&document) {
            let schema = &item["post"]["requestBody"]["content"]["application/json"]["schema"];
            let Some(properties) = resolved(&document, schema)["properties"].as_object() else {
                assert!(item.get("get").is_some(), "{path}: a request without properties");
                continue;
            };
            for name in properties.keys() {
                // With a value that is right for nothing: a field of the route has no effect or an error of its own.
                let mut request = minimal(path, name);
                request[name] = json!({"wrong": [true]});
                let (_, text) = send(&app, path, request).await;
                assert!(!text.contains("unknown_field") && !text.contains("unknown field"), "{path} {name}: {text}");
            }
        }
    }
}

/// Checks a value against a schema of the document: types, required properties, and no others than those that are
/// described.
fn check(document: &Value, schema: &Value, value: &Value, place: &str) -> Result<(), String> {
    let schema = resolved(document, schema);
    for word in ["anyOf", "oneOf"] {
        if let Some(options) = schema[word].as_array() {
            let errors: Vec<String> =
                options.iter().filter_map(|option| check(document, option, value, place).err()).collect();
            return if errors.len() < options.len() { Ok(()) } else { Err(errors.join("; ")) };
        }
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let allows = |wanted: &str| wanted == kind || (wanted == "number" && kind == "integer");
    let is_allowed = match &schema["type"] {
        Value::String(wanted) => allows(wanted),
        Value::Array(wanted) => wanted.iter().filter_map(Value::as_str).any(allows),
        // A value of any type.
        _ => return Ok(()),
    };
    if !is_allowed {
        return Err(format!("{place} is {kind}, not {}", schema["type"]));
    }
    if let Some(list) = value.as_array() {
        for (index, element) in list.iter().enumerate() {
            check(document, &schema["items"], element, &format!("{place}[{index}]"))?;
        }
    }
    let Some(fields) = value.as_object() else { return Ok(()) };
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    if let Some(missing) = required.into_iter().find(|name| !fields.contains_key(*name)) {
        return Err(format!("{place}.{missing} is missing"));
    }
    for (name, value) in fields {
        let property = match (schema["properties"].get(name), &schema["additionalProperties"]) {
            (Some(property), _) => property,
            (None, more) if more.is_object() => more,
            (None, Value::Bool(true)) => continue,
            (None, _) => return Err(format!("{place}.{name} is not described")),
        };
        check(document, property, value, &format!("{place}.{name}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn answers_and_errors_have_the_documented_shape() {
    let [classifier, vectors, writer] = services();
    let user = json!([{"role": "user", "content": "[ab]"}]);
    let include = json!(["message.output_text.logprobs"]);
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
    let calling = json!([{"role": "user", "content": format!("[{call}]")}]);
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]);
    let named = json!({"type": "function", "function": {"name": "f"}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": {"enum": ["ab"]}}});
    let flat_tools = json!([{"type": "function", "name": "f", "strict": true,
        "parameters": {"type": "object", "additionalProperties": false}}]);
    let flat_named = json!({"type": "function", "name": "f"});
    let flat_format = json!({"type": "json_schema", "name": "s", "schema": {"enum": ["ab"]}});
    let calls = json!([
        {"role": "user", "content": "[ab]"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "7"},
    ]);
    for (service, cases) in [
        (classifier, vec![(paths::CLASSIFY, json!({"input": "a"}))]),
        (
            vectors,
            vec![
                (paths::EMBEDDINGS, json!({"input": "a"})),
                (paths::EMBEDDINGS, json!({"input": "a", "encoding_format": "base64"})),
                (paths::RERANK, json!({"query": "a", "documents": ["a"], "return_documents": true})),
                (paths::RERANK, json!({"query": "a", "documents": ["a"]})),
            ],
        ),
        (
            writer,
            vec![
                (paths::CHAT, json!({"messages": user, "logprobs": true, "top_logprobs": 2})),
                (paths::CHAT, json!({"messages": user})),
                (paths::CHAT, json!({"messages": user, "response_format": format})),
                (paths::CHAT, json!({"messages": calling, "tools": tools, "tool_choice": "auto", "temperature": 0})),
                (paths::CHAT, json!({"messages": calling, "tools": tools, "tool_choice": named, "temperature": 0})),
                (paths::COMPLETIONS, json!({"prompt": "[ab]", "echo": true, "logprobs": 2})),
                (paths::RESPONSES, json!({"input": user, "include": include, "top_logprobs": 1})),
                (paths::RESPONSES, json!({"input": "[ab]", "max_output_tokens": 1, "metadata": {"a": "b"}})),
                (paths::RESPONSES, json!({"input": "[ab]", "text": {"format": flat_format}})),
                (paths::RESPONSES, json!({"input": calls, "tools": flat_tools, "tool_choice": flat_named})),
                (paths::TOKENIZE, json!({"prompt": "a", "return_token_strs": true})),
                (paths::TOKENIZE, json!({"messages": user})),
                (paths::DETOKENIZE, json!({"tokens": [97]})),
            ],
        ),
    ] {
        let document = document(&service);
        let app = app(service, Router::new());
        for (path, request) in cases {
            let post = &document["paths"][path]["post"];
            let answer = ask(&app, path, request.clone()).await;
            let schema = &post["responses"]["200"]["content"]["application/json"]["schema"];
            assert_eq!(check(&document, schema, &answer, path), Ok(()), "{answer}");
            let schema = &post["requestBody"]["content"]["application/json"]["schema"];
            assert_eq!(check(&document, schema, &request, path), Ok(()), "{request}");
            let (_, text) = send(&app, path, "[]").await;
            let schema = &post["responses"]["default"]["content"]["application/json"]["schema"];
            let error: Value = serde_json::from_str(&text).unwrap();
            assert_eq!(check(&document, schema, &error, path), Ok(()), "{text}");
        }
        let request = Request::builder().uri(paths::MODELS).body(Body::empty()).unwrap();
        let body = app.oneshot(request).await.unwrap().into_body();
        let models: Value = serde_json::from_slice(&to_bytes(body, 1 << 20).await.unwrap()).unwrap();
        let schema =
            &document["paths"][paths::MODELS]["get"]["responses"]["200"]["content"]["application/json"]["schema"];
        assert_eq!(check(&document, schema, &models, paths::MODELS), Ok(()));
    }
}

#[test]
fn the_check_of_shapes_finds_what_is_wrong() {
    let document = json!({"components": {"schemas": {"T": {"type": "object", "required": ["a"],
        "properties": {"a": {"type": "string"}, "b": {"type": ["integer", "null"]}}}}}});
    let schema = json!({"$ref": "#/components/schemas/T"});
    let wrong = |value: Value| check(&document, &schema, &value, "v").err();
    assert_eq!(wrong(json!({"a": "x", "b": null})), None);
    assert_eq!(wrong(json!({"b": 1})).as_deref(), Some("v.a is missing"));
    assert_eq!(wrong(json!({"a": 1})).as_deref(), Some("v.a is integer, not \"string\""));
    assert_eq!(wrong(json!({"a": "x", "c": 1})).as_deref(), Some("v.c is not described"));
}
