//! `/v1/responses` over a model by a rule.

use serde_json::{Value, json};

use super::generate_tests::{application, ask, limits, send};

const PATH: &str = "/v1/responses";

/// Names and data of the events of a stream.
fn named_events(text: &str) -> Vec<(String, Value)> {
    let event = |event: &str| {
        let (name, data) = event.split_once('\n').unwrap();
        let data = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        (name.strip_prefix("event: ").unwrap().to_owned(), data)
    };
    text.split("\n\n").filter(|text| !text.is_empty()).map(event).collect()
}

#[tokio::test]
async fn a_text_or_a_list_of_messages_is_answered() {
    let (app, _, _) = application(limits());
    let body = ask(
        &app,
        PATH,
        json!({"model": "writer", "instructions": "Be brief.", "input": "[abc]", "temperature": 0, "store": true,
            "metadata": {"a": "b"}, "max_output_tokens": 40, "text": {"format": {"type": "text"}}, "tools": [],
            "truncation": "disabled", "reasoning": {"effort": null}, "include": [], "background": false}),
    )
    .await;
    assert_eq!(
        (&body["object"], &body["status"], &body["model"]),
        (&json!("response"), &json!("completed"), &json!("writer"))
    );
    assert!(body["id"].as_str().unwrap().starts_with("resp_") && body["created_at"].as_i64().unwrap() > 0, "{body}");
    let message = &body["output"][0];
    assert!(message["id"].as_str().unwrap().starts_with("msg_"), "{message}");
    assert_eq!(
        (&message["type"], &message["role"], &message["status"]),
        (&json!("message"), &json!("assistant"), &json!("completed"))
    );
    assert_eq!(message["content"], json!([{"type": "output_text", "text": "abc", "annotations": [], "logprobs": []}]));
    let prompt = "system: Be brief.\nuser: [abc]\n".len() + 1;
    assert_eq!(
        body["usage"],
        json!({"input_tokens": prompt, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": prompt + 4})
    );
    // What is stored nowhere is said to be.
    assert_eq!((&body["store"], &body["previous_response_id"]), (&json!(false), &Value::Null));
    assert_eq!((&body["instructions"], &body["metadata"]), (&json!("Be brief."), &json!({"a": "b"})));
    assert_eq!((&body["max_output_tokens"], &body["temperature"]), (&json!(40), &json!(0.0)));

    // The output of a response is an input, with the ids that it has.
    let input = json!([
        {"role": "developer", "content": "Say it."},
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "first"}, {"type": "input_text", "text": "second"}]},
        message,
        {"role": "user", "content": "[de]"},
    ]);
    let body = ask(&app, PATH, json!({"input": input, "temperature": 0})).await;
    assert_eq!(body["output"][0]["content"][0]["text"], "de");
    let prompt = "system: Say it.\nuser: first\nsecond\nassistant: abc\nuser: [de]\n".len() + 1;
    assert_eq!(body["usage"]["input_tokens"], prompt);
}

#[tokio::test]
async fn a_limit_makes_a_response_incomplete_and_log_probabilities_are_included() {
    let (app, _, _) = application(limits());
    let request = json!({"input": "[abcdef]", "temperature": 0, "max_output_tokens": 3, "top_logprobs": 1,
        "include": ["message.output_text.logprobs", "reasoning.encrypted_content"]});
    let body = ask(&app, PATH, request).await;
    assert_eq!(
        (&body["status"], &body["incomplete_details"]),
        (&json!("incomplete"), &json!({"reason": "max_output_tokens"}))
    );
    let logprobs = body["output"][0]["content"][0]["logprobs"].as_array().unwrap();
    let tokens: Vec<&Value> = logprobs.iter().map(|entry| &entry["token"]).collect();
    assert_eq!(tokens, ["a", "b", "c"]);
    assert_eq!(logprobs[0]["top_logprobs"][0]["token"], "a");
}

#[tokio::test]
async fn a_stream_has_the_typed_events_in_order() {
    let (app, _, _) = application(limits());
    let request = json!({"input": "[abX]", "temperature": 0, "stream": true, "stop": "X"});
    let (parts, text) = send(&app, PATH, request).await;
    assert_eq!(parts.headers["content-type"], "text/event-stream");
    let events = named_events(&text);
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    for (index, (name, data)) in events.iter().enumerate() {
        assert_eq!((&data["type"], &data["sequence_number"]), (&json!(name), &json!(index)));
    }
    let of = |index: usize| &events[index].1;
    assert_eq!((&of(0)["response"]["status"], &of(0)["response"]["usage"]), (&json!("in_progress"), &Value::Null));
    assert_eq!((&of(4)["delta"], &of(5)["delta"], &of(6)["text"]), (&json!("a"), &json!("b"), &json!("ab")));
    let last = &of(9)["response"];
    assert_eq!(last["id"], of(0)["response"]["id"]);
    assert_eq!(&last["output"][0], &of(8)["item"]);
    assert_eq!(last["output"][0]["content"][0], of(7)["part"]);
    for index in [3, 4, 6, 7] {
        assert_eq!((&of(index)["item_id"], &of(index)["content_index"]), (&of(8)["item"]["id"], &json!(0)));
    }
    assert_eq!((&last["status"], &last["usage"]["output_tokens"]), (&json!("completed"), &json!(3)));

    let request = json!({"input": "[abc]", "temperature": 0, "stream": true, "max_output_tokens": 1});
    let (_, text) = send(&app, PATH, request).await;
    let (name, data) = named_events(&text).pop().unwrap();
    assert_eq!((name.as_str(), &data["response"]["status"]), ("response.incomplete", &json!("incomplete")));

    let (_, text) = send(&app, PATH, json!({"input": "[a!]", "temperature": 0, "stream": true})).await;
    let (name, data) = named_events(&text).pop().unwrap();
    assert_eq!((name.as_str(), &data["response"]["status"]), ("response.failed", &json!("failed")));
    assert!(data["response"]["error"]["message"].as_str().unwrap().contains("out of memory"), "{data}");
}

fn letters() -> Value {
    json!({"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"],
        "additionalProperties": false})
}

/// Functions `get`, with a schema, and `stop`, without parameters.
fn tools() -> Value {
    json!([{"type": "function", "name": "get", "description": "Gets it.", "parameters": letters(), "strict": true},
        {"type": "function", "name": "stop", "parameters": null}])
}

const GET: &str = "<tool_call>\n{\"name\": \"get\", \"arguments\": {\"a\": \"x\"}}\n</tool_call>";

/// A request with these functions, whose answer is `answer` if it is free.
fn calling(answer: &str, more: Value) -> Value {
    let mut request = json!({"input": format!("[{answer}]"), "temperature": 0, "tools": tools()});
    request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request
}

/// Types and contents of the items of an output: the text of a message, name and arguments of a call.
fn items(response: &Value) -> Value {
    let item = |item: &Value| match item["type"].as_str().unwrap() {
        "message" => json!(item["content"][0]["text"]),
        "function_call" => {
            let (id, call_id) = (item["id"].as_str().unwrap(), item["call_id"].as_str().unwrap());
            assert!(id.starts_with("fc_") && call_id.starts_with("call_"), "{item}");
            json!([item["name"], item["arguments"]])
        }
        other => panic!("{other}"),
    };
    response["output"].as_array().unwrap().iter().map(item).collect()
}

#[tokio::test]
async fn calls_are_items_of_the_output() {
    let (app, _, _) = application(limits());
    let two = format!("Wait. {GET}<tool_call>{{\"name\": \"stop\"}}</tool_call>");
    let get = json!(["get", "{\"a\": \"x\"}"]);
    let named = json!({"type": "function", "name": "get"});
    for (answer, more, expected) in [
        (two.as_str(), json!({}), json!(["Wait.", get, ["stop", "{}"]])),
        (two.as_str(), json!({"parallel_tool_calls": false}), json!(["Wait.", get])),
        (GET, json!({"tool_choice": "none"}), json!([GET])),
        ("Hello", json!({"tool_choice": "auto"}), json!(["Hello"])),
        (GET, json!({"tool_choice": "required", "parallel_tool_calls": false}), json!([get])),
        (GET, json!({"tool_choice": named}), json!([get])),
    ] {
        let body = ask(&app, PATH, calling(answer, more.clone())).await;
        assert_eq!((items(&body), &body["status"]), (expected.clone(), &json!("completed")), "{more}");
        let mut streamed = calling(answer, more.clone());
        streamed["stream"] = true.into();
        let (_, text) = send(&app, PATH, streamed).await;
        let (name, data) = named_events(&text).pop().unwrap();
        assert_eq!((name.as_str(), items(&data["response"])), ("response.completed", expected), "{more}");
    }
    let body = ask(&app, PATH, calling("a", json!({"tool_choice": named}))).await;
    assert_eq!((&body["tools"], &body["tool_choice"]), (&tools(), &named));
    assert_eq!(body["output"][0]["type"], "function_call", "whatever the model wants");
    // Cut off within the arguments.
    let limit = json!({"tool_choice": "required", "max_output_tokens": GET.find("x").unwrap()});
    let body = ask(&app, PATH, calling(GET, limit)).await;
    assert_eq!(items(&body), json!([["get", "{\"a\": \""]]));
    assert_eq!((&body["status"], &body["output"][0]["status"]), (&json!("incomplete"), &json!("incomplete")));
}

#[tokio::test]
async fn a_stream_has_the_events_of_calls() {
    let (app, _, _) = application(limits());
    let answer = format!("Wait. {GET}");
    let (_, text) = send(&app, PATH, calling(&answer, json!({"stream": true}))).await;
    let events = named_events(&text);
    let mut names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    names.dedup();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    for (index, (_, data)) in events.iter().enumerate() {
        assert_eq!(data["sequence_number"], index);
    }
    let mut added = events.iter().filter(|(name, _)| name == "response.output_item.added").map(|(_, data)| data);
    let call = added.next_back().unwrap();
    assert_eq!((&call["output_index"], &call["item"]["name"]), (&json!(1), &json!("get")));
    assert_eq!((&call["item"]["arguments"], &call["item"]["status"]), (&json!(""), &json!("in_progress")));
    let done = events.iter().filter(|(name, _)| name == "response.output_item.done").map(|(_, data)| &data["item"]);
    let done: Value = done.cloned().collect();
    assert_eq!(events.last().unwrap().1["response"]["output"], done);
    assert_eq!(done[1]["id"], call["item"]["id"]);

    // A call that is required shows its arguments as they grow.
    let more = json!({"stream": true, "tool_choice": "required", "parallel_tool_calls": false});
    let (_, text) = send(&app, PATH, calling(GET, more)).await;
    let events = named_events(&text);
    assert_eq!(events[2].1["item"]["type"], "function_call");
    let deltas = events.iter().filter(|(name, _)| name == "response.function_call_arguments.delta");
    let deltas: Vec<&str> = deltas.map(|(_, data)| data["delta"].as_str().unwrap()).collect();
    assert_eq!((deltas.len(), deltas.concat()), (10, "{\"a\": \"x\"}".into()));
    let (_, whole) = events.iter().find(|(name, _)| name == "response.function_call_arguments.done").unwrap();
    assert_eq!((&whole["arguments"], &whole["item_id"]), (&json!(deltas.concat()), &events[2].1["item"]["id"]));
}

#[tokio::test]
async fn calls_and_their_results_are_part_of_the_input() {
    let (app, _, _) = application(limits());
    let call = json!({"id": "c1", "type": "function", "function": {"name": "get", "arguments": {"a": "x"}}});
    let rendered = format!("user: Ask.\nassistant: Wait.{}\ntool: [yes]\n", json!([call]));
    for output in [json!("[yes]"), json!([{"type": "input_text", "text": "[yes]"}])] {
        let input = json!([
            {"role": "user", "content": "Ask."},
            {"role": "assistant", "content": "Wait."},
            {"type": "function_call", "id": "fc_1", "status": "completed", "call_id": "c1", "name": "get",
                "arguments": "{\"a\": \"x\"}"},
            {"type": "function_call_output", "call_id": "c1", "output": output},
        ]);
        let body = ask(&app, PATH, json!({"input": input, "temperature": 0})).await;
        assert_eq!(body["output"][0]["content"][0]["text"], "yes");
        assert_eq!(body["usage"]["input_tokens"], rendered.len() + 1);
    }
}

#[tokio::test]
async fn a_response_follows_a_format() {
    let (app, _, _) = application(limits());
    let schema = json!({"type": "json_schema", "name": "s", "strict": true, "schema": letters()});
    for format in [schema, json!({"type": "json_object"})] {
        let request = json!({"input": "[{\"a\": \"x\"} and more]", "temperature": 0, "text": {"format": format}});
        let body = ask(&app, PATH, request).await;
        assert_eq!(body["output"][0]["content"][0]["text"], "{\"a\": \"x\"}");
        assert_eq!((&body["status"], &body["text"]["format"]), (&json!("completed"), &format));
    }
}

#[tokio::test]
#[expect(clippy::too_many_lines, reason = "a table of cases")]
async fn what_a_response_cannot_do_is_refused_by_name() {
    let (app, _, _) = application(limits());
    let user = |content: Value| json!({"input": [{"role": "user", "content": content}]});
    for (more, param, code, part) in [
        (json!({"previous_response_id": "resp_1"}), "previous_response_id", "unsupported_parameter", "not stored"),
        (json!({"background": true}), "background", "unsupported_parameter", "not stored"),
        (json!({"conversation": "conv_1"}), "conversation", "unsupported_parameter", "not stored"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type", "unsupported_parameter", "no built-in tools"),
        (json!({"tools": [{"type": "function", "name": "f g"}]}), "tools[0].name", "invalid_field", "tools[0].name: "),
        (json!({"max_tool_calls": 3}), "max_tool_calls", "unsupported_parameter", "no built-in tools"),
        (json!({"tool_choice": "required"}), "tool_choice", "invalid_field", "requires tools"),
        (
            json!({"tools": tools(), "tool_choice": {"type": "function", "name": "none"}}),
            "tool_choice.name",
            "invalid_field",
            "not in tools",
        ),
        (
            json!({"tools": [{"type": "function", "name": "f", "parameters": {"type": "object", "if": {}}}],
                "tool_choice": "required"}),
            "tools[0].parameters",
            "invalid_schema",
            "Unimplemented keys",
        ),
        (json!({"truncation": "auto"}), "truncation", "unsupported_parameter", "disabled"),
        (json!({"reasoning": {"effort": "high"}}), "reasoning", "unsupported_parameter", "reasoning"),
        (json!({"text": {"format": {"type": "xml"}}}), "text.format.type", "unsupported_parameter", "json_schema"),
        (json!({"text": {"format": {"type": "json_schema", "schema": {}}}}), "text.format", "invalid_field", "name"),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "object", "if": {}}}}}),
            "text.format.schema",
            "invalid_schema",
            "Unimplemented keys",
        ),
        (json!({"text": {"verbosity": "high"}}), "text.verbosity", "unsupported_parameter", "medium"),
        (json!({"text": {"colour": "red"}}), "text.colour", "invalid_field", "no such"),
        (json!({"include": ["file_search_call.results"]}), "include[0]", "unsupported_parameter", "logprobs"),
        (json!({"n": 2}), "n", "unsupported_parameter", "one answer"),
        (json!({"top_logprobs": 2}), "top_logprobs", "invalid_field", "include"),
        (json!({"max_output_tokens": 0}), "max_output_tokens", "invalid_field", "less than 1"),
        (json!({"max_output_tokens": 999}), "max_output_tokens", "context_length_exceeded", "context"),
        (json!({"max_tokens": 5}), "max_tokens", "unknown_field", "no such"),
        (json!({"metadata": {"a": 1}}), "metadata.a", "invalid_field", "string"),
        (json!({"input": null}), "input", "invalid_field", "missing"),
        (json!({"input": []}), "input", "invalid_field", "empty"),
        (json!({"input": 1}), "input", "invalid_field", "list of items"),
        (json!({"input": [{"type": "reasoning"}]}), "input[0].type", "unsupported_parameter", "function_call"),
        (json!({"input": [{"type": "function_call", "name": "f"}]}), "input[0].call_id", "invalid_field", "missing"),
        (
            json!({"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}),
            "input[0].call_id",
            "invalid_field",
            "no function_call before it",
        ),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), "input[0].type", "unsupported_parameter", "stored"),
        (json!({"input": [{"role": "tool", "content": "x"}]}), "input[0].role", "invalid_field", "tool"),
        (json!({"input": [{"role": "user"}]}), "input[0].content", "invalid_field", "missing"),
        (
            user(json!([{"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": "data:"}])),
            "input[0].content[1].type",
            "unsupported_parameter",
            "images cannot be read",
        ),
        (user(json!([{"type": "input_file"}])), "input[0].content[0].type", "unsupported_parameter", "files cannot"),
    ] {
        let mut request = json!({"input": "x"});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let (parts, text) = send(&app, PATH, request).await;
        let error: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(parts.status, 400, "{more}: {text}");
        assert_eq!(
            (&error["error"]["param"], &error["error"]["code"]),
            (&json!(param), &json!(code)),
            "{more}: {text}"
        );
        assert!(error["error"]["message"].as_str().unwrap().contains(part), "{more}: {text}");
    }
    let image = json!([{"type": "image_url", "image_url": {"url": "data:"}}]);
    let request = json!({"messages": [{"role": "user", "content": image}]});
    let (parts, text) = send(&app, "/v1/chat/completions", request).await;
    assert_eq!(parts.status, 400);
    assert!(text.contains("images cannot be read") && text.contains("messages[0].content[0].type"), "{text}");
}
