//! What is recorded of language models' answers.

use athanor_contract::event::{Generation, GenerationInput, TokenUsage};

use futures::StreamExt;

use super::{
    streams::{QUESTION, chat},
    *,
};

const STREAM: &str = "data: {\"choices\": [{\"index\": 0, \"delta\": {\"content\": \"call 0123\"}}]}\n\n\
                      data: {\"choices\": [{\"index\": 0, \"delta\": {\"content\": \"456 \"}, \"finish_reason\": \"stop\"}]}\n\n\
                      data: [DONE]\n\n";
const WHOLE: &str = r#"{"choices": [{"index": 0, "message": {"content": "one"}, "finish_reason": "stop"},
    {"index": 1, "message": {"content": "two"}, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}}"#;

/// A server that answers with a stream if it is asked for one.
async fn model() -> (SocketAddr, CancellationToken) {
    let answer = post(async |Json(request): Json<Value>| match (&request["stream"], &request["break"]) {
        (_, Value::String(_)) => {
            let pieces = futures::stream::iter([Ok::<_, std::io::Error>(STREAM)]).chain(futures::stream::pending());
            ([("content-type", "text/event-stream")], Body::from_stream(pieces)).into_response()
        }
        (_, Value::Bool(true)) => {
            let begun = futures::stream::iter([Ok(STREAM.split_at(40).0)]);
            let broken = futures::stream::once(async {
                tokio::time::sleep(Duration::from_millis(50)).await;
                Err(std::io::Error::other("killed"))
            });
            let body = Body::from_stream(begun.chain(broken));
            ([("content-type", "text/event-stream")], body).into_response()
        }
        (Value::Bool(true), _) => ([("content-type", "text/event-stream")], STREAM).into_response(),
        _ => ([("content-type", "application/json")], WHOLE).into_response(),
    });
    let app = Router::new().route("/v1/chat/completions", answer.clone()).route("/v1/embeddings", answer);
    serve(([127, 0, 0, 1], 0).into(), app).await
}

/// A gateway that records, and what it recorded.
async fn recording(change: impl FnOnce(&mut EventsConfig)) -> (Arc<Gateway>, Arc<Kept>, CancellationToken) {
    let (address, running) = model().await;
    let mut config = config(&[("a", 100)]);
    let mut events = EventsConfig::new("nowhere:9092", "t");
    change(&mut events);
    config.events = Some(events);
    let gateway = gateway(config, &[("a", &[address])]);
    let kept = Arc::new(Kept::default());
    gateway.events.set(Some(kept.clone()));
    gateway.labels.set("a".into(), Vec::new());
    (gateway, kept, running)
}

/// Sends a question, reads the whole answer and returns the request's id once nothing runs any more.
async fn question(gateway: &Arc<Gateway>, body: &str) -> String {
    let (parts, _) = send(gateway, chat(), body).await;
    assert_eq!(parts.status, StatusCode::OK);
    parts.headers["x-request-id"].to_str().unwrap().to_owned()
}

/// The recorded generations, once there are `count` of them.
pub async fn generations(kept: &Kept, count: usize) -> Vec<Generation> {
    let begin = Instant::now();
    loop {
        let events = kept.events.lock().unwrap().clone();
        let found = events.iter().filter_map(|event| match &event.data {
            EventData::Generation(generation) => {
                assert_eq!(event.id, format!("{}/{}", generation.request_id, generation.index));
                Some(generation.clone())
            }
            _ => None,
        });
        let found: Vec<_> = found.collect();
        if found.len() >= count {
            return found;
        }
        assert!(begin.elapsed() < Duration::from_secs(5), "{found:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn latencies_of_language_models_are_apart() {
    let metrics = athanor_telemetry::metrics();
    let (address, _model) = model().await;
    let gateway = gateway(config(&[("timed", 100)]), &[("timed", &[address])]);
    question(&gateway, QUESTION).await;
    for _ in 0..2 {
        let embed =
            Request::builder().method(Method::POST).uri("/v1/embeddings").header("content-type", "application/json");
        assert_eq!(send(&gateway, embed, r#"{"input": "a"}"#).await.0.status, StatusCode::OK);
    }
    let text = metrics.render();
    for (kind, count) in [("generation", 1), ("other", 2)] {
        let line = format!(r#"athanor_router_request_seconds_count{{revision="timed",kind="{kind}"}} {count}"#);
        assert!(text.contains(&line), "{line} is not in {text}");
    }
}

pub async fn judge(gateway: &Arc<Gateway>, id: &str, rest: &str) -> (u16, Value) {
    let request = Request::builder().method(Method::POST).uri("/v1/feedback");
    let (parts, body) = send(gateway, request, &format!(r#"{{"request_id": "{id}", {rest}}}"#)).await;
    (parts.status.as_u16(), body["error"]["code"].clone())
}

#[tokio::test]
async fn streams_and_whole_answers_are_recorded_and_take_feedback() {
    let (gateway, kept, _model) = recording(|_| ()).await;
    // Neither a broken answer nor an embedding is a generation.
    question(&gateway, &QUESTION.replace("}]", r#"}], "break": true"#)).await;
    let embed =
        Request::builder().method(Method::POST).uri("/v1/embeddings").header("content-type", "application/json");
    assert_eq!(send(&gateway, embed, r#"{"input": "a"}"#).await.0.status, StatusCode::OK);
    let streamed = question(&gateway, QUESTION).await;
    let first = generations(&kept, 1).await.remove(0);
    assert_eq!((&*first.request_id, &*first.revision), (&*streamed, "a"));
    assert_eq!((&*first.answer, &*first.finish_reason, first.usage), ("call 0123456 ", "stop", None));
    let GenerationInput::Messages(messages) = &first.input else { panic!("{first:?}") };
    assert_eq!(messages, &[json!({"role": "user", "content": "hi"})]);

    let whole = question(&gateway, r#"{"messages": [], "n": 2}"#).await;
    let all = generations(&kept, 3).await;
    let shown: Vec<_> = all[1..].iter().map(|g| (&*g.request_id, g.index, &*g.answer, &*g.finish_reason)).collect();
    assert_eq!(shown, [(&*whole, 0, "one", "stop"), (&*whole, 1, "two", "length")]);
    assert_eq!(all[1].usage, Some(TokenUsage { prompt_tokens: 5, completion_tokens: 2 }));

    for (rest, expected) in [
        (r#""expected_text": "three""#, (202, Value::Null)),
        (r#""rating": 1, "index": 1"#, (202, Value::Null)),
        (r#""preferred": 1"#, (202, Value::Null)),
        (r#""preferred": 2"#, (422, json!("no_such_choice"))),
        (r#""rating": 1, "index": 2"#, (422, json!("no_such_input"))),
        (r#""expected_label": "good""#, (422, json!("invalid_feedback"))),
    ] {
        assert_eq!(judge(&gateway, &whole, rest).await, expected, "{rest}");
    }
    assert_eq!(kept.events.lock().unwrap().len(), 3 + 3);
    let counts = gateway.analysis.read().revisions["a"].clone();
    assert_eq!((counts.feedback_total, counts.feedback_correct, counts.errors), (1, 1, 1));
}

#[tokio::test]
async fn a_client_that_leaves_at_the_last_event_had_its_answer() {
    let (gateway, kept, _model) = recording(|_| ()).await;
    let asked = QUESTION.replace("}]", r#"}], "break": "never""#);
    let request = chat().body(Body::from(asked)).unwrap();
    let mut body = app(gateway.clone()).oneshot(request).await.unwrap().into_body().into_data_stream();
    assert_eq!(body.next().await.unwrap().unwrap(), STREAM);
    drop(body);
    assert_eq!(generations(&kept, 1).await[0].answer, "call 0123456 ");
}

#[tokio::test]
async fn recorded_texts_are_redacted_and_nothing_else_is() {
    let (gateway, kept, _model) = recording(|events| events.redact = vec![r"\d+".into(), "(?i)alice".into()]).await;
    let asked =
        r#"{"stream": true, "messages": [{"role": "alice", "content": [{"type": "text", "text": "Alice, 7"}]}]}"#;
    let (parts, body) =
        app(gateway.clone()).oneshot(chat().body(Body::from(asked)).unwrap()).await.unwrap().into_parts();
    assert_eq!(to_bytes(body, 1 << 20).await.unwrap(), STREAM, "the client's own answer is as it was");
    let recorded = generations(&kept, 1).await.remove(0);
    assert_eq!(recorded.answer, "call [redacted] ", "a number in two pieces");
    let expected = json!({"role": "alice", "content": [{"type": "text", "text": "[redacted], [redacted]"}]});
    assert_eq!(recorded.input, GenerationInput::Messages(vec![expected]));
    let id = parts.headers["x-request-id"].to_str().unwrap();
    let feedback = r#""expected_text": "call alice", "comment": "not 12""#;
    assert_eq!(judge(&gateway, id, feedback).await.0, 202);
    let EventData::Feedback(feedback) = &kept.events.lock().unwrap().last().unwrap().data.clone() else { panic!() };
    let corrected = athanor_contract::event::Judgement::ExpectedText("call [redacted]".into());
    assert_eq!((&feedback.judgement, feedback.comment.as_deref()), (&corrected, Some("not [redacted]")));

    // A classifier's texts as well.
    let (address, _, _server) = healthy().await;
    gateway.registry.set_endpoints("a", vec![Address { http: address, grpc: None, draining: false }]);
    send(&gateway, classify(), r#"{"input": "for ALICE"}"#).await;
    let EventData::Prediction(prediction) = &kept.events.lock().unwrap().last().unwrap().data.clone() else { panic!() };
    assert_eq!((&*prediction.text, &*prediction.label), ("for [redacted]", "good"));
}

#[tokio::test]
async fn answers_and_feedback_outside_of_the_sample_are_not_written() {
    let (gateway, kept, _model) = recording(|events| events.sample_percent = 40).await;
    let mut sampled = Vec::new();
    for _ in 0..60 {
        let id = question(&gateway, QUESTION).await;
        let begin = Instant::now();
        let proven = gateway.ids.verify(&id).unwrap();
        while gateway.recent.get((proven.id.uuid, 0)).is_none() {
            assert!(begin.elapsed() < Duration::from_secs(5));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(judge(&gateway, &id, r#""rating": 1"#).await.0, 202);
        if proven.id.is_sampled(40) {
            sampled.push(id);
        }
    }
    let events = kept.events.lock().unwrap().clone();
    let written: Vec<&str> = events.iter().map(|event| event.data.request_id()).collect();
    let expected: Vec<&str> = sampled.iter().flat_map(|id| [&**id, &**id]).collect();
    assert!((5..55).contains(&sampled.len()), "{}", sampled.len());
    assert_eq!(written, expected, "an answer and its feedback for each request of the sample");
    assert_eq!(gateway.analysis.read().revisions["a"].feedback_total, 60, "all feedback counts in an analysis");
}
