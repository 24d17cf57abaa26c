//! Against local servers that answer well, badly, late, or not at all.

use std::{
    future::Future,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{
    Json, Router,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use super::*;

/// What a server was asked.
#[derive(Default)]
struct Log {
    /// Prompts, in the order of arrival.
    prompts: Mutex<Vec<String>>,
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Log {
    fn prompts(&self) -> Vec<String> {
        self.prompts.lock().unwrap().clone()
    }
}

/// One request: its prompt, how often that prompt was asked before, and its headers.
struct Asked {
    prompt: String,
    before: usize,
    headers: HeaderMap,
}

/// Serves chat completions and gives the base URL.
async fn serve<F, Fut>(answer: F) -> (String, Arc<Log>)
where
    F: Fn(Asked) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Response> + Send + 'static,
{
    let log = Arc::new(Log::default());
    let shared = Arc::clone(&log);
    let handler = move |headers: HeaderMap, Json(body): Json<Value>| {
        let (log, answer) = (Arc::clone(&shared), answer.clone());
        async move {
            assert_eq!((&body["model"], &body["messages"][0]["role"]), (&json!("m"), &json!("user")));
            let prompt = body["messages"][0]["content"].as_str().unwrap().to_owned();
            let before = {
                let mut prompts = log.prompts.lock().unwrap();
                prompts.push(prompt.clone());
                prompts.iter().filter(|asked| **asked == prompt).count() - 1
            };
            log.most.fetch_max(log.now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            let response = answer(Asked { prompt, before, headers }).await;
            log.now.fetch_sub(1, Ordering::SeqCst);
            response
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = Router::new().route("/v1/chat/completions", post(handler));
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    (format!("http://{address}/v1"), log)
}

/// Serves bytes as they are, by the number of the request, and closes each connection.
async fn serve_bytes(response: impl Fn(usize) -> Vec<u8> + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for number in 0.. {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            // The request is whole once its JSON is.
            while !request.ends_with(b"}") {
                assert!(stream.read_buf(&mut request).await.unwrap() > 0);
            }
            // The client may close first.
            let _ = stream.write_all(&response(number)).await;
            let _ = stream.shutdown().await;
        }
    });
    format!("http://{address}/v1")
}

fn completion(content: &str) -> Value {
    json!({
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    })
}

fn well(content: &str) -> Response {
    Json(completion(content)).into_response()
}

fn http(content: &str) -> Vec<u8> {
    let body = completion(content).to_string();
    format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        .into_bytes()
}

fn labels() -> Vec<String> {
    vec!["pos".into(), "neg".into()]
}

/// A specification whose prompt is the text, with other fields changed.
fn spec(endpoint: &str, fields: Value) -> EndpointAnnotator {
    let mut spec = json!({"url": endpoint, "model": "m", "prompt": "{{ text }}", "timeoutSeconds": 5, "maxRetries": 3});
    spec.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    serde_json::from_value(spec).unwrap()
}

/// A folder with a journal of its own.
struct Scratch {
    _folder: TempDir,
    journal: PathBuf,
}

fn scratch() -> Scratch {
    let folder = tempfile::tempdir().unwrap();
    Scratch { journal: folder.path().join("journal.jsonl"), _folder: folder }
}

fn place(row: usize) -> String {
    format!("rows.csv row {row}")
}

async fn run(spec: &EndpointAnnotator, texts: &[&str], scratch: &Scratch) -> Result<Annotations, DataError> {
    let builder = reqwest::Client::builder().no_proxy();
    let endpoint = Endpoint::new(spec, api_key(spec)?, builder, Duration::from_millis(1))?;
    let texts: Vec<(usize, &str)> = texts.iter().enumerate().map(|(row, &text)| (row + 100, text)).collect();
    annotate_at(endpoint, &texts, spec, &labels(), &scratch.journal, &place, &|_| ()).await
}

fn found(annotations: &Annotations) -> Vec<Option<usize>> {
    annotations.rows.iter().map(|row| row.label).collect()
}

/// Reasons and their rows.
fn reasons(annotations: &Annotations) -> Vec<(&str, u64)> {
    annotations.report.failures.iter().map(|failure| (failure.reason.as_str(), failure.rows)).collect()
}

#[test]
fn what_would_be_asked_is_known_beforehand() {
    let spec = spec("http://e/v1", json!({"samples": 3, "prompt": "12345{{ text }}"}));
    let found = estimate(&["one", "two", "one"], &spec, &labels()).unwrap();
    assert_eq!(found, Estimate { questions: 6, input_tokens: 18 }, "16 bytes are 6 tokens, three times");
    let wrong = EndpointAnnotator { prompt: "{{ labels }}".into(), ..spec };
    assert!(estimate(&["one"], &wrong, &labels()).unwrap_err().to_string().contains("has to contain {{ text }}"));
}

#[tokio::test]
async fn answers_become_labels_and_the_same_text_is_asked_once() {
    let (url, log) = serve(|asked| async move {
        well(match asked.prompt.as_str() {
            "good" => " Pos\n",
            "bad" => "{\"label\": \"neg\"}",
            other => panic!("{other}"),
        })
    })
    .await;
    let scratch = scratch();
    let prices = json!({"inputTokenPrice": "2", "outputTokenPrice": "10"});
    let annotations = run(&spec(&url, prices), &["good", "bad", "good"], &scratch).await.unwrap();
    assert_eq!(found(&annotations), [Some(0), Some(1), Some(0)]);
    assert_eq!((annotations.rows[2].row, annotations.rows[2].agreement), (102, 1.0));
    assert_eq!(log.prompts().len(), 2);
    let report = &annotations.report;
    assert_eq!((report.rows, report.labelled, report.resumed, report.answers), (3, 3, 0, 2));
    assert_eq!((report.input_tokens, report.output_tokens, report.tokens_estimated), (200, 20, false));
    assert!((report.cost.unwrap() - 0.0006).abs() < 1e-12);
    assert_eq!((report.disagreement, report.failures.len()), (None, 0));
    let json = serde_json::to_value(report).unwrap();
    assert_eq!((&json["model"], &json["inputTokens"]), (&json!("m"), &json!(200)));
}

#[tokio::test]
async fn a_pause_that_the_endpoint_asks_for_is_kept() {
    let (url, log) = serve(|asked| async move {
        if asked.before == 0 {
            return (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "1")], "slow down").into_response();
        }
        well("pos")
    })
    .await;
    let began = Instant::now();
    let annotations = run(&spec(&url, json!({})), &["a"], &scratch()).await.unwrap();
    assert_eq!((found(&annotations), annotations.report.retries), (vec![Some(0)], 1));
    assert!(began.elapsed() >= Duration::from_secs(1));
    assert_eq!(log.prompts().len(), 2);
}

#[tokio::test]
async fn server_errors_are_tried_again_so_many_times() {
    let (url, log) = serve(|_| async { (StatusCode::SERVICE_UNAVAILABLE, "loading").into_response() }).await;
    let annotations = run(&spec(&url, json!({})), &["a"], &scratch()).await.unwrap();
    assert_eq!((found(&annotations), reasons(&annotations)), (vec![None], vec![("status 503", 1)]));
    let example = &annotations.report.failures[0].examples[0];
    let shown = (example.place.as_str(), example.text.as_str(), example.detail.as_str());
    assert_eq!(shown, ("rows.csv row 100", "a", "loading"));
    assert_eq!(log.prompts().len(), 4);
}

#[tokio::test]
async fn a_request_that_takes_too_long_is_tried_again() {
    let (url, _) = serve(|asked| async move {
        if asked.before == 0 || asked.prompt == "never" {
            tokio::time::sleep(Duration::from_secs(30)).await;
        }
        well("neg")
    })
    .await;
    let spec = spec(&url, json!({"timeoutSeconds": 1, "maxRetries": 1}));
    let annotations = run(&spec, &["late", "never"], &scratch()).await.unwrap();
    assert_eq!((found(&annotations), reasons(&annotations)), (vec![Some(1), None], vec![("timed out", 1)]));
}

#[tokio::test]
async fn connections_that_break_and_lengths_that_lie_are_tried_again() {
    let whole = http("pos");
    let half = whole[..whole.len() / 2].to_vec();
    let text = String::from_utf8(whole.clone()).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let length = format!("content-length: {}", body.len());
    let shorter = format!("{}\r\n\r\n{body}", head.replace(&length, "content-length: 20")).into_bytes();
    let longer = format!("{}\r\n\r\n{body}", head.replace(&length, "content-length: 5000")).into_bytes();
    for (name, bad) in [
        ("closed half-way", half),
        ("closed at once", Vec::new()),
        ("shorter", shorter),
        ("longer", longer),
        ("no HTTP", b"hello\r\n\r\n".to_vec()),
        ("broken JSON", b"HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n{\"choices\":[".to_vec()),
        ("no choices", b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{\"choices\":[]}".to_vec()),
    ] {
        let good = whole.clone();
        let url = serve_bytes(move |number| if number == 0 { bad.clone() } else { good.clone() }).await;
        let annotations = run(&spec(&url, json!({})), &["a"], &scratch()).await.unwrap();
        assert_eq!((found(&annotations), annotations.report.retries), (vec![Some(0)], 1), "{name}");
    }
}

#[tokio::test]
async fn large_responses_are_not_read() {
    let claimed = b"HTTP/1.1 200 OK\r\ncontent-length: 10000000000\r\n\r\n{".to_vec();
    let mut endless = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
    endless.resize(3 << 20, b' ');
    for bytes in [claimed, endless] {
        let url = serve_bytes(move |_| bytes.clone()).await;
        let annotations = run(&spec(&url, json!({})), &["a"], &scratch()).await.unwrap();
        assert_eq!(reasons(&annotations), [("the response is larger than 1 MiB", 1)]);
        assert_eq!(annotations.report.retries, 0);
    }
}

#[tokio::test]
async fn an_answer_that_is_no_label_is_asked_for_once_more_and_never_again() {
    let (url, log) = serve(|asked| async move {
        well(if asked.prompt == "second thoughts" && asked.before == 1 { "pos" } else { "I think it is pos" })
    })
    .await;
    let (scratch, spec) = (scratch(), spec(&url, json!({})));
    let texts = ["second thoughts", "stubborn"];
    let annotations = run(&spec, &texts, &scratch).await.unwrap();
    assert_eq!(found(&annotations), [Some(0), None]);
    assert_eq!(reasons(&annotations), [("the answer is none of the labels", 1)]);
    assert_eq!(annotations.report.failures[0].examples[0].detail, "I think it is pos");
    assert_eq!((annotations.report.answers, annotations.report.input_tokens), (4, 400));
    let again = run(&spec, &texts, &scratch).await.unwrap();
    assert_eq!((again.rows, log.prompts().len()), (annotations.rows, 4));
    assert_eq!((again.report.answers, again.report.resumed, again.report.input_tokens), (0, 2, 400));
    assert_eq!(again.report.failures, annotations.report.failures);
}

#[tokio::test]
async fn the_key_goes_to_the_endpoint_and_nowhere_else() {
    // The one variable that every test has; its value plays the key.
    let key = std::env::var("PATH").unwrap();
    let expected = format!("Bearer {key}");
    let (url, _) = serve(move |asked| {
        let given = asked.headers.get("authorization").is_some_and(|value| value.as_bytes() == expected.as_bytes());
        let echo = format!("key {:?} is not known", asked.headers.get("authorization"));
        async move {
            match (given, asked.prompt.as_str()) {
                (true, "echo") => (StatusCode::FORBIDDEN, echo).into_response(),
                (true, _) => well("pos"),
                (false, _) => (StatusCode::UNAUTHORIZED, "no key").into_response(),
            }
        }
    })
    .await;
    let scratch = scratch();
    let with_key = spec(&url, json!({"apiKeyVariable": "PATH"}));
    assert_eq!(found(&run(&with_key, &["a"], &scratch).await.unwrap()), [Some(0)]);
    for (spec, text, part) in [
        (spec(&url, json!({})), "b", "answered 401 Unauthorized: no key"),
        (spec(&url, json!({"apiKeyVariable": "ATHANOR_UNSET"})), "b", "the environment has no ATHANOR_UNSET"),
        (with_key, "echo", "[API KEY]"),
    ] {
        let error = run(&spec, &[text], &scratch).await.unwrap_err();
        assert!(matches!(error, DataError::User(_)) && error.to_string().contains(part), "{error}");
        assert!(!error.to_string().contains(&key));
    }
    assert!(!std::fs::read_to_string(&scratch.journal).unwrap().contains(&key));
}

#[tokio::test]
async fn no_more_requests_at_once_than_allowed() {
    let (url, log) = serve(|_| async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        well("pos")
    })
    .await;
    let texts: Vec<String> = (0..40).map(|row| format!("text {row}")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let annotations = run(&spec(&url, json!({"concurrency": 4})), &texts, &scratch()).await.unwrap();
    assert_eq!(annotations.report.labelled, 40);
    assert_eq!(log.most.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn a_killed_run_pays_for_no_row_twice() {
    let (url, log) = serve(|asked| async move {
        tokio::time::sleep(Duration::from_millis(5)).await;
        well(if asked.prompt.ends_with('1') { "pos" } else { "neg" })
    })
    .await;
    let scratch = Arc::new(scratch());
    let spec = Arc::new(spec(&url, json!({"concurrency": 4, "samples": 2})));
    let texts: Vec<String> = (0..60).map(|row| format!("text {row}")).collect();
    let first = tokio::spawn({
        let (scratch, spec, texts) = (Arc::clone(&scratch), Arc::clone(&spec), texts.clone());
        async move {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            run(&spec, &texts, &scratch).await.map(|_| ())
        }
    });
    while log.prompts().len() < 50 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    // Until requests that were under way have reached the server.
    tokio::time::sleep(Duration::from_millis(100)).await;
    // As if killed in the middle of a line.
    let written = std::fs::read_to_string(&scratch.journal).unwrap();
    std::fs::write(&scratch.journal, &written[..written.len() - 20]).unwrap();
    let recorded = written.lines().count() - 1;
    let asked = log.prompts().len();
    assert!(recorded > 40 && asked - recorded <= 5, "{recorded} of {asked}");

    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let annotations = run(&spec, &texts, &scratch).await.unwrap();
    assert_eq!((annotations.report.labelled, annotations.report.answers), (60, 120 - recorded as u64));
    assert_eq!(log.prompts().len() - asked, 120 - recorded);
    assert_eq!(annotations.report.input_tokens, 12_000);
    assert!(found(&annotations).iter().enumerate().all(|(row, label)| *label == Some(usize::from(row % 10 != 1))));
    assert_eq!(annotations.report.disagreement, Some(0.0));

    let again = run(&spec, &texts, &scratch).await.unwrap();
    assert_eq!((again.rows, again.report.answers, again.report.resumed), (annotations.rows, 0, 60));
}

#[tokio::test]
async fn samples_vote_and_their_disagreement_is_told() {
    let (url, _) = serve(|asked| async move {
        well(match (asked.prompt.as_str(), asked.before) {
            ("sure", _) => "pos",
            ("split", 0) => "pos",
            ("split", _) => "neg",
            (_, 0) => "neg",
            (_, 1) => "neither",
            (_, 2) => "nor",
            _ => "pos",
        })
    })
    .await;
    let spec = spec(&url, json!({"samples": 3, "concurrency": 1}));
    let annotations = run(&spec, &["sure", "split", "tied"], &scratch()).await.unwrap();
    assert_eq!(found(&annotations), [Some(0), Some(1), None]);
    let agreement: Vec<f64> = annotations.rows.iter().map(|row| row.agreement).collect();
    assert_eq!(agreement, [1.0, 2.0 / 3.0, 0.0]);
    assert_eq!(annotations.report.disagreement, Some(2.0 / 3.0));
    assert_eq!(reasons(&annotations), [("the samples are tied", 1)]);
}

#[tokio::test]
async fn a_bound_on_cost_holds_over_restarts() {
    let (url, log) = serve(|_| async { well("pos") }).await;
    let texts: Vec<String> = (0..20).map(|row| format!("text {row}")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let scratch = scratch();
    let limit = |cost: &str| {
        let prices = json!({"inputTokenPrice": "100", "outputTokenPrice": "0", "maximumCost": cost, "concurrency": 1});
        spec(&url, prices)
    };
    let annotations = run(&limit("0.05"), &texts, &scratch).await.unwrap();
    assert_eq!((log.prompts().len(), annotations.report.labelled), (5, 5));
    assert!(annotations.report.maximum_cost_reached);
    assert_eq!(reasons(&annotations), [("not asked: maximumCost is spent", 15)]);
    run(&limit("0.05"), &texts, &scratch).await.unwrap();
    assert_eq!(log.prompts().len(), 5, "what was spent counts");
    let annotations = run(&limit("1"), &texts, &scratch).await.unwrap();
    assert_eq!((log.prompts().len(), annotations.report.labelled, annotations.report.resumed), (20, 20, 5));
}

#[tokio::test]
async fn tokens_that_are_not_told_are_reckoned() {
    let (url, _) =
        serve(|_| async { Json(json!({"choices": [{"message": {"content": "pos"}}]})).into_response() }).await;
    let annotations = run(&spec(&url, json!({})), &["a text of 21 letters."], &scratch()).await.unwrap();
    let report = annotations.report;
    assert_eq!((report.input_tokens, report.output_tokens, report.tokens_estimated), (7, 1, true));
}

#[tokio::test]
async fn an_endpoint_that_is_gone_is_not_asked_about_every_row() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    drop(listener);
    let texts: Vec<String> = (0..500).map(|row| format!("text {row}")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let error = run(&spec(&url, json!({})), &texts, &scratch()).await.unwrap_err();
    assert!(matches!(error, DataError::Other(_)) && error.to_string().contains("no connection"), "{error}");
}

#[tokio::test]
async fn what_the_endpoint_refuses_ends_the_run_and_keeps_the_answers() {
    let (url, log) = serve(|asked| async move {
        if asked.prompt == "text 30" && asked.before == 0 {
            return (StatusCode::BAD_REQUEST, "the model has no such name").into_response();
        }
        well("pos")
    })
    .await;
    let texts: Vec<String> = (0..200).map(|row| format!("text {row}")).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let (scratch, spec) = (scratch(), spec(&url, json!({"concurrency": 2})));
    let error = run(&spec, &texts, &scratch).await.unwrap_err();
    assert!(matches!(error, DataError::User(_)), "{error}");
    assert!(error.to_string().contains("answered 400 Bad Request: the model has no such name"), "{error}");
    assert!(log.prompts().len() < 40);
    let annotations = run(&spec, &texts, &scratch).await.unwrap();
    assert_eq!((annotations.report.labelled, log.prompts().len()), (200, 201));
}

#[tokio::test]
async fn progress_counts_to_the_end() {
    let (url, _) = serve(|_| async { well("pos") }).await;
    let spec = spec(&url, json!({}));
    let scratch = scratch();
    let seen = Mutex::new(Vec::new());
    let texts: Vec<(usize, &str)> = vec![(0, "a"), (1, "b"), (2, "a")];
    let builder = reqwest::Client::builder().no_proxy();
    let endpoint = Endpoint::new(&spec, None, builder, Duration::from_millis(1)).unwrap();
    annotate_at(endpoint, &texts, &spec, &labels(), &scratch.journal, &place, &|progress| {
        seen.lock().unwrap().push((progress.done, progress.total));
    })
    .await
    .unwrap();
    let seen = seen.into_inner().unwrap();
    assert_eq!((seen[0], seen[seen.len() - 1], seen.len()), ((0, 3), (3, 3), 3));
}
