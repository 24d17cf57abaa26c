//! What is refused costs no tokenization; names of models.

use std::{
    sync::{Arc, atomic::Ordering, mpsc},
    thread,
};

use athanor_contract::serve::{ServeConfig, ServeLimits};
use serde_json::json;

use super::{
    Service, ServiceError,
    generate::{Generation, Prompt},
    inputs::Inputs,
};
use crate::{
    engine::{
        encode::EngineError,
        generate::{GenerateError, sampling::Sampling},
    },
    test_support::{self, Gate, LONGEST, until},
};

/// Holds the model until the sender is dropped. A thread has the lock, which must not be held over an await.
fn hold(gate: &Arc<Gate>) -> mpsc::Sender<()> {
    let (release, held) = mpsc::channel::<()>();
    let (locked, is_locked) = mpsc::channel();
    let gate = gate.clone();
    thread::spawn(move || {
        let _guard = gate.lock.lock().unwrap();
        locked.send(()).unwrap();
        let _ = held.recv();
    });
    is_locked.recv().unwrap();
    release
}

#[tokio::test]
async fn a_full_queue_of_a_classifier_refuses_before_it_tokenises() {
    let (service, gate) = test_support::service();
    let held = hold(&gate);
    let classify = |texts: usize| {
        let service = service.clone();
        tokio::spawn(async move { service.classifier()?.classify(vec!["fine".into(); texts]).await })
    };
    let tokenised = || gate.tokenised.load(Ordering::SeqCst);
    let running = classify(1);
    until("the model runs", || gate.batches.load(Ordering::SeqCst) == 1).await;
    let waiting = classify(3);
    until("the queue is full", || service.waiting() == 3 && tokenised() == 4).await;
    let refused = classify(1).await.unwrap().unwrap_err();
    assert!(matches!(refused, ServiceError::Engine(EngineError::QueueFull { capacity: 3 })), "{refused}");
    assert_eq!(tokenised(), 4, "the refused text was tokenised");
    drop(held);
    for (answered, texts) in [(running, 1), (waiting, 3)] {
        assert_eq!(answered.await.unwrap().unwrap().results.len(), texts);
    }
    assert_eq!(service.waiting(), 0);
}

fn generation(prompt: Prompt) -> Generation {
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    Generation { prompt, choices: 1, sampling, stop: Vec::new(), max_tokens: Some(8), min_tokens: 0, adapter: None }
}

#[tokio::test]
async fn a_full_queue_of_a_language_model_refuses_before_it_tokenises() {
    let limits = ServeLimits { max_inputs: 3, queue_inputs: 2, max_batch_inputs: 1, ..ServeLimits::default() };
    let (service, gate) = test_support::language_model(limits);
    let held = hold(&gate);
    let generate = |texts: usize| {
        let service = service.clone();
        let prompt = Prompt::Inputs(Inputs::Texts(vec!["[yes]".into(); texts]));
        tokio::spawn(async move {
            let answers = service.generator()?.generate(generation(prompt)).await?;
            Ok::<_, ServiceError>(answers.complete().await?)
        })
    };
    let tokenised = || gate.tokenised.load(Ordering::SeqCst);
    let running = generate(1);
    // Admitted, it leaves the queue.
    until("the model runs", || gate.batches.load(Ordering::SeqCst) == 1 && service.waiting() == 0).await;
    let waiting = generate(2);
    until("the queue is full", || service.waiting() == 2 && tokenised() == 3).await;
    let refused = generate(1).await.unwrap().unwrap_err();
    let expected = GenerateError::QueueFull { capacity: 2, retry_after: 1 };
    assert!(matches!(&refused, ServiceError::Generate(error) if *error == expected), "{refused}");
    assert_eq!(tokenised(), 3, "the refused prompt was tokenised");
    drop(held);
    for (answered, texts) in [(running, 1), (waiting, 2)] {
        let answers: Vec<String> =
            answered.await.unwrap().unwrap().into_iter().map(|completed| completed.text).collect();
        assert_eq!(answers, vec!["yes"; texts]);
    }
    assert_eq!(service.waiting(), 0, "a place was kept");
}

#[tokio::test]
async fn a_text_that_cannot_fit_is_refused_before_it_is_tokenised() {
    let (service, gate) = test_support::language_model(ServeLimits::default());
    let most = LONGEST * 256;
    let chat = |length: usize| Prompt::Chat(vec![json!({"role": "user", "content": "x".repeat(length)})]);
    let texts = |length: usize| Prompt::Inputs(Inputs::Texts(vec!["x".into(), "x".repeat(length)]));
    for (prompt, expected) in [(chat(most + 1), None), (texts(most + 1), Some(1))] {
        let error = service.generator().unwrap().generate(generation(prompt)).await.err().unwrap();
        let is_expected = matches!(
            error,
            ServiceError::LongText { input, bytes, limit: LONGEST } if input == expected && bytes == most + 1
        );
        assert!(is_expected, "{error}");
    }
    assert_eq!(gate.tokenised.load(Ordering::SeqCst), 0);
    // One byte less may fit by its bytes; the tokens decide.
    let error = service.generator().unwrap().generate(generation(chat(most))).await.err().unwrap();
    assert!(matches!(error, ServiceError::Generate(GenerateError::TooLong { .. })), "{error}");
    assert_eq!((gate.tokenised.load(Ordering::SeqCst), service.waiting()), (1, 0));
}

#[tokio::test]
async fn a_request_may_name_another_model_only_if_the_configuration_says_so() {
    let service = test_support::embedding_model();
    assert!(service.check_model(None).is_ok() && service.check_model(Some("vectors")).is_ok());
    let error = service.check_model(Some("gpt-4o")).unwrap_err();
    assert!(matches!(error, ServiceError::UnknownModel { .. }), "{error}");
    let config: ServeConfig = serde_json::from_value(json!({
        "modelName": "vectors", "revision": "vectors-1", "modelUri": "file:///nowhere", "acceptAnyModel": true
    }))
    .unwrap();
    let service = Service::new(&config, Arc::into_inner(service).unwrap().model);
    assert!(service.check_model(Some("gpt-4o")).is_ok());
}
