//! Sequences with adapters: their blocks, their life, and vLLM's metric.

use super::*;

fn weights() -> AdapterWeights {
    AdapterWeights { modules: vec![LowRank::default()] }
}

fn adapted(adapter: Option<&Adapter>, request: GenerateRequest) -> GenerateRequest {
    GenerateRequest { adapter: adapter.cloned(), ..request }
}

/// Prompts that are the same with and without adapters, more of them than the cache has room for.
#[tokio::test]
async fn an_answer_depends_on_its_adapter_and_on_no_other_request() {
    let mut random = StdRng::seed_from_u64(5);
    let (engine, seen) = engine(13, limits(9, 6));
    let one = engine.load_adapter("one", weights()).await.unwrap();
    let two = engine.load_adapter("two", weights()).await.unwrap();
    let requests: Vec<GenerateRequest> = (0..150)
        .map(|_| {
            let adapter = [None, Some(&one), Some(&two)][random.random_range(0..3)];
            adapted(adapter, random_request(&mut random))
        })
        .collect();
    let mut readers = Vec::new();
    for (index, request) in requests.iter().enumerate() {
        for (choice, receiver) in (0..).zip(submit(&engine, request.clone()).unwrap()) {
            readers.push((index, choice, tokio::spawn(read(receiver))));
        }
    }
    let mut cached = 0;
    for (index, choice, reader) in readers {
        let (tokens, finished) = reader.await.unwrap().unwrap();
        assert_eq!(tokens, alone(&requests[index], choice), "request {index}, choice {choice}");
        cached += finished.cached_tokens;
    }
    assert!(cached > 0, "no prefix was reused: the test shows nothing");
    assert_eq!(seen.adapters.lock().unwrap().len(), 2);
}

#[tokio::test]
async fn a_prefix_belongs_to_its_adapter() {
    let (engine, _) = engine(40, limits(100, 4));
    let one = engine.load_adapter("one", weights()).await.unwrap();
    let two = engine.load_adapter("two", weights()).await.unwrap();
    for (adapter, cached) in [(None, 0), (Some(&one), 0), (Some(&two), 0), (Some(&one), 12), (None, 12)] {
        let request = adapted(adapter, request(&[6; 13], 2));
        let (tokens, finished) = run(&engine, request.clone()).await.unwrap();
        assert_eq!(tokens, alone(&request, 0), "{adapter:?}");
        assert_eq!(finished.cached_tokens, cached, "{adapter:?}");
    }
}

#[tokio::test]
async fn an_adapter_is_dropped_with_the_last_answer_that_uses_it() {
    let (engine, seen) = engine(40, limits(100, 1));
    let adapter = engine.load_adapter("one", weights()).await.unwrap();
    let gate = seen.gate.lock().unwrap();
    let running = submit(&engine, adapted(Some(&adapter), request(&[1, 2], 5))).unwrap();
    let waiting = submit(&engine, adapted(Some(&adapter), request(&[1, 2], 5))).unwrap();
    let expected = alone(&adapted(Some(&adapter), request(&[1, 2], 5)), 0);
    drop(adapter);
    drop(gate);
    for choice in running.into_iter().chain(waiting) {
        assert_eq!(read(choice).await.unwrap().0, expected);
    }
    let count = || seen.adapters.lock().unwrap().len();
    until(&engine, "the adapter is dropped", |_| count() == 0).await;
    // One that a request never used, and one whose answers nobody reads.
    let unused = engine.load_adapter("two", weights()).await.unwrap();
    assert_eq!(count(), 1);
    drop(unused);
    until(&engine, "the unused one is dropped", |_| count() == 0).await;
    let adapter = engine.load_adapter("three", weights()).await.unwrap();
    drop(submit(&engine, adapted(Some(&adapter), request(&[1, 2], 50))).unwrap());
    drop(adapter);
    until(&engine, "its reader is gone", |load| load == IDLE && count() == 0).await;
}

#[tokio::test]
async fn an_adapter_that_does_not_fit_is_an_error() {
    let (engine, seen) = engine(40, limits(100, 1));
    let error = engine.load_adapter("none", AdapterWeights::default()).await.unwrap_err();
    assert_eq!(error, GenerateError::Adapter("it has no module".into()));
    assert!(seen.adapters.lock().unwrap().is_empty());
    assert!(run(&engine, request(&[1], 2)).await.is_ok());
}

#[test]
fn vllms_metric_names_the_adapters_in_use() {
    let metrics = athanor_telemetry::metrics();
    let [a, b, c] =
        [(0, "metric-a"), (1, "metric-b"), (2, "metric-c")].map(|(id, name)| Adapter::new(AdapterId(id), name, |_| ()));
    let mut usage = Usage::new("usage", 78);
    let has = |running: &str, waiting: &str| {
        let labels = format!(r#"max_lora="78",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}""#);
        metrics.render().contains(&format!("vllm:lora_requests_info{{{labels}}} "))
    };
    usage.record([(true, &a)].into_iter());
    assert!(!has("metric-a", ""), "nothing is published before an adapter is loaded");
    usage.begin();
    assert!(has("", ""));
    usage.record([(true, &b), (true, &a), (false, &c), (true, &b), (false, &a)].into_iter());
    assert!(has("metric-a,metric-b", "metric-a,metric-c"));
    assert!(!has("", ""), "the series before is gone");
    usage.record(std::iter::empty());
    assert!(has("", ""));
}

#[tokio::test]
async fn the_metric_begins_with_the_first_adapter() {
    let metrics = athanor_telemetry::metrics();
    let engine = Engine::start(Fake::new(20, Arc::default()), limits(9, 77), "with adapters").unwrap();
    assert!(!metrics.render().contains(r#"max_lora="77""#));
    let _adapter = engine.load_adapter("one", weights()).await.unwrap();
    let line = r#"vllm:lora_requests_info{max_lora="77",running_lora_adapters="",waiting_lora_adapters=""} "#;
    assert!(metrics.render().contains(line));
}
