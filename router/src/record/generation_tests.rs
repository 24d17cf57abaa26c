//! What is read out of the answers of language models.

use super::*;

#[test]
fn a_requests_choices_are_those_of_all_its_prompts() {
    for (request, expected) in [
        (r#"{"messages": []}"#, Some(1)),
        (r#"{"messages": [], "n": 3}"#, Some(3)),
        (r#"{"prompt": ["a", "b"], "n": 2}"#, Some(4)),
        (r#"{"prompt": "a", "n": 0}"#, Some(1)),
        (r#"{"prompt": [1, 2]}"#, None),
        (r#"{"prompt": "a", "echo": true}"#, None),
        (r#"{"prompt": "a", "echo": false}"#, Some(1)),
        (r#"{"input": "a"}"#, Some(1)),
        ("{}", None),
        ("[", None),
    ] {
        assert_eq!(choices(request.as_bytes()), expected, "{request}");
    }
}

fn read(request: &str, answers: Answers) -> Result<Vec<Generation>, Unrecorded> {
    generations("r-1", "a", request.as_bytes(), answers, Duration::from_millis(5))
}

fn stream(events: &[&str]) -> Answers {
    let mut answers = Answers::default();
    events.iter().for_each(|event| answers.event(event.as_bytes()));
    answers
}

const CHAT: &str = r#"{"messages": [{"role": "user", "content": "hi"}]}"#;

#[test]
fn a_stream_is_put_together_by_choice() {
    let answers = stream(&[
        r#"{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}, {"index": 1, "delta": {}}]}"#,
        r#"{"choices": [{"index": 1, "delta": {"content": "No"}}, {"index": 0, "delta": {"content": "Ye"}}]}"#,
        r#"{"choices": [{"index": 0, "delta": {"content": "s"}, "finish_reason": "stop"}]}"#,
        r#"{"choices": [{"index": 1, "delta": {}, "finish_reason": "length"}], "usage": null}"#,
        r#"{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}"#,
        "[DONE]",
    ]);
    let read = read(CHAT, answers).unwrap();
    let shown: Vec<_> = read.iter().map(|g| (g.index, &*g.answer, &*g.finish_reason)).collect();
    assert_eq!(shown, [(0, "Yes", "stop"), (1, "No", "length")]);
    assert_eq!(read[0].usage, Some(TokenUsage { prompt_tokens: 3, completion_tokens: 4 }));
    let GenerationInput::Messages(messages) = &read[0].input else { panic!("{read:?}") };
    assert_eq!(messages[0]["content"], "hi");
}

#[test]
fn text_is_recorded_once_it_has_ended() {
    let usage = TokenUsage { prompt_tokens: 3, completion_tokens: 2 };
    let pieces = |end: Option<(String, TokenUsage)>| {
        let mut answers = Answers::default();
        answers.text("Ye", None);
        answers.text("s", end);
        read(r#"{"prompt": "Is it?"}"#, answers)
    };
    let whole = pieces(Some(("length".into(), usage))).unwrap();
    assert_eq!((&*whole[0].answer, &*whole[0].finish_reason, whole[0].usage), ("Yes", "length", Some(usage)));
    assert_eq!(whole[0].input, GenerationInput::Prompt("Is it?".into()));
    assert_eq!(pieces(None), Err(Unrecorded::Unfinished));
    let mut long = Answers::default();
    long.text(&"x".repeat(MOST_TEXT), None);
    long.text("x", Some(("stop".into(), usage)));
    assert_eq!(read(CHAT, long), Err(Unrecorded::TooLong));
}

#[test]
fn calls_are_recorded_whole_or_from_a_stream() {
    let answers = stream(&[
        r#"{"choices": [{"delta": {"role": "assistant", "content": "Wait."}}]}"#,
        r#"{"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "c0", "function": {"name": "f", "arguments": ""}}]}}]}"#,
        r#"{"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{\"a\":"}}]}}]}"#,
        r#"{"choices": [{"delta": {"tool_calls": [{"index": 1, "id": "c1", "function": {"name": "g", "arguments": "{}"}}]}}]}"#,
        r#"{"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]}}]}"#,
        r#"{"choices": [{"delta": {}, "finish_reason": "tool_calls"}]}"#,
        "[DONE]",
    ]);
    let call = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    let calls = vec![call("c0", "f", r#"{"a":1}"#), call("c1", "g", "{}")];
    let read_stream = read(CHAT, answers).unwrap().remove(0);
    assert_eq!((&*read_stream.answer, &*read_stream.finish_reason), ("Wait.", "tool_calls"));
    assert_eq!(read_stream.tool_calls, calls);
    let mut answers = Answers::default();
    let message = json!({"role": "assistant", "content": null, "tool_calls": calls});
    let whole = json!({"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]});
    answers.piece(whole.to_string().as_bytes());
    let read_whole = read(CHAT, answers).unwrap().remove(0);
    assert_eq!((&*read_whole.answer, read_whole.tool_calls), ("", calls));
}

#[test]
fn each_choice_of_a_completion_has_its_prompt() {
    let mut answers = Answers::default();
    let choice = |index| format!(r#"{{"index": {index}, "text": "t{index}", "finish_reason": "stop"}}"#);
    let choices = (0..4).map(choice).collect::<Vec<_>>().join(",");
    for piece in format!(r#"{{"choices": [{choices}]}}"#).as_bytes().chunks(7) {
        answers.piece(piece);
    }
    let read = read(r#"{"prompt": ["a", "b"], "n": 2}"#, answers).unwrap();
    let inputs: Vec<_> = read.into_iter().map(|generation| generation.input).collect();
    assert_eq!(inputs, ["a", "a", "b", "b"].map(|prompt| GenerationInput::Prompt(prompt.into())));
}

#[test]
fn calls_of_a_response_are_recorded() {
    let request = r#"{"input": [{"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "c0", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c0", "output": "7"}]}"#;
    let response = r#"{"status": "completed", "output": [{"type": "message", "content": [{"text": "Wait."}]},
        {"type": "function_call", "id": "fc", "call_id": "c1", "name": "g", "arguments": "{\"a\": 1}"}]}"#;
    let mut whole = Answers::default();
    whole.piece(response.as_bytes());
    let read = read(request, whole).unwrap();
    assert_eq!((&*read[0].answer, &*read[0].finish_reason), ("Wait.", "tool_calls"));
    let called = json!({"id": "c1", "type": "function", "function": {"name": "g", "arguments": "{\"a\": 1}"}});
    assert_eq!(read[0].tool_calls, [called]);
    let GenerationInput::Messages(messages) = &read[0].input else { panic!("{read:?}") };
    assert_eq!((messages.len(), &messages[2]["role"], &messages[2]["content"]), (3, &json!("tool"), &json!("7")));
}

#[test]
fn a_response_is_recorded_as_a_conversation() {
    let request = r#"{"instructions": "Be brief.", "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]}"#;
    let response = |status: &str| {
        format!(
            r#"{{"id": "resp_1", "status": "{status}", "output": [{{"type": "message", "content":
                [{{"type": "output_text", "text": "Yes", "annotations": []}}]}}],
                "usage": {{"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}}}}"#
        )
    };
    let mut whole = Answers::default();
    whole.piece(response("incomplete").as_bytes());
    let streamed = stream(&[
        r#"{"type":"response.created","response":{"status":"in_progress","output":[],"usage":null}}"#,
        r#"{"type":"response.output_text.delta","delta":"Yes","logprobs":[]}"#,
        r#"{"type":"response.output_item.done","item":{"type":"message","status":"completed","content":[]}}"#,
        &format!(r#"{{"type":"response.completed","response":{}}}"#, response("completed")),
    ]);
    for (answers, reason) in [(whole, "length"), (streamed, "stop")] {
        let read = read(request, answers).unwrap();
        assert_eq!((read.len(), &*read[0].answer, &*read[0].finish_reason), (1, "Yes", reason));
        assert_eq!(read[0].usage, Some(TokenUsage { prompt_tokens: 3, completion_tokens: 4 }));
        let GenerationInput::Messages(messages) = &read[0].input else { panic!("{read:?}") };
        let expected = [("system", "Be brief."), ("user", "hi")];
        let expected = expected.map(|(role, content)| serde_json::json!({"role": role, "content": content}));
        assert_eq!(messages, &expected);
    }
    let begun = stream(&[r#"{"type":"response.created","response":{"status":"in_progress","output":[]}}"#]);
    assert_eq!(read(request, begun), Err(Unrecorded::Unfinished));
}

#[test]
fn what_is_not_recorded_has_a_reason() {
    let end = r#"{"choices": [{"delta": {}, "finish_reason": "stop"}]}"#;
    let long = format!(r#"{{"choices": [{{"delta": {{"content": "{}"}}}}]}}"#, "x".repeat(MOST_TEXT / 2 + 1));
    let calls = r#"{"choices": [{"delta": {"tool_calls": [{"index": 1024}]}}]}"#;
    for (request, events, expected) in [
        (CHAT, &[end][..], Unrecorded::Unfinished),
        (CHAT, &["[DONE]"], Unrecorded::Unfinished),
        (CHAT, &[r#"{"choices": [{"delta": {"content": "a"}}]}"#, "[DONE]"], Unrecorded::Unfinished),
        (CHAT, &["{", end, "[DONE]"], Unrecorded::Unreadable),
        (CHAT, &[&long, &long, end, "[DONE]"], Unrecorded::TooLong),
        (CHAT, &[calls, end, "[DONE]"], Unrecorded::TooLong),
        (r#"{"prompt": [1, 2]}"#, &[end, "[DONE]"], Unrecorded::NoText),
        ("{}", &[end, "[DONE]"], Unrecorded::Unreadable),
    ] {
        assert_eq!(read(request, stream(events)), Err(expected), "{request}");
    }
    assert!(read(CHAT, stream(&[&long, end, "[DONE]"])).is_ok());
    let mut answers = Answers::default();
    (0..=MOST_COPY >> 20).for_each(|_| answers.piece(&[b' '; 1 << 20]));
    assert_eq!(read(CHAT, answers), Err(Unrecorded::TooLong));
}
