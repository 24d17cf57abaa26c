//! SmolLM2 with four bits answers the same with and without proposed tokens: text, log-probabilities, ends.

use std::{path::PathBuf, sync::Arc};

use athanor_contract::serve::ServeConfig;
use athanor_serving::{
    engine::generate::sampling::Sampling,
    service::{
        Service,
        generate::{Completed, Generation, Prompt, Structure},
        grammar::Grammar,
    },
};
use serde_json::{Value, json};

use crate::load::load;

const SPEECH: &str =
    "The bank lends the money to the borrower. The borrower pays the money back to the bank with interest.";

/// Room for a little more than two answers of the longest kind, so that batches are preempted.
fn service(name: &str, speculation: &str) -> Service {
    let models = PathBuf::from(std::env::var_os("ATHANOR_MODELS").expect("ATHANOR_MODELS, by `. scripts/env`"));
    let engine =
        json!({"weights": "Int4", "maxModelLength": 320, "kvCacheMemory": 16 << 20, "speculation": speculation});
    let config = json!({"modelName": name, "revision": "m-1", "modelUri": "file:///m", "engine": engine});
    let config: ServeConfig = serde_json::from_value(config).unwrap();
    load(&config, &models.join("smollm2-135m"), None).unwrap()
}

/// Conversations whose answers repeat the prompt, and some that do not, under every kind of sampling.
fn requests() -> Vec<(Generation, Structure)> {
    let repeat = format!("Repeat this text word by word, three times:\n{SPEECH}");
    let samplings = [
        Sampling { temperature: 0.0, ..Sampling::default() },
        Sampling { temperature: 0.0, logprobs: Some(3), ..Sampling::default() },
        Sampling { temperature: 0.3, seed: 5, logprobs: Some(0), ..Sampling::default() },
        Sampling { temperature: 0.8, top_p: 0.9, top_k: 40, seed: 6, ..Sampling::default() },
        Sampling { temperature: 0.0, repetition_penalty: 1.05, frequency_penalty: 0.1, ..Sampling::default() },
        Sampling { temperature: 0.5, seed: 7, logit_bias: vec![(260, 1.5), (28, -1.0)], ..Sampling::default() },
    ];
    let generation = |text: &str, sampling: &Sampling| Generation {
        prompt: Prompt::Chat(vec![json!({"role": "user", "content": text})]),
        choices: 1,
        sampling: sampling.clone(),
        stop: Vec::new(),
        max_tokens: Some(120),
        adapter: None,
        min_tokens: 0,
    };
    let mut requests = Vec::new();
    for sampling in &samplings {
        requests.push((generation(&repeat, sampling), Structure::default()));
        requests.push((generation("What is the capital of France?", sampling), Structure::default()));
    }
    let stopped = Generation { stop: vec!["with interest".into()], ..generation(&repeat, &samplings[0]) };
    requests.push((stopped, Structure::default()));
    let least = Generation { min_tokens: 100, choices: 2, ..generation(&repeat, &samplings[2]) };
    requests.push((least, Structure::default()));
    let person = json!({"type": "object", "properties": {"borrower_name": {"type": "string", "maxLength": 12},
        "lender_name": {"type": "string", "maxLength": 12}, "amount": {"type": "integer"}},
        "required": ["borrower_name", "lender_name", "amount"], "additionalProperties": false});
    let list = json!({"type": "array", "items": person, "minItems": 3, "maxItems": 3});
    let structure = Structure { functions: None, grammar: Some(Grammar::Json(list)) };
    requests.push((generation(&repeat, &samplings[0]), structure.clone()));
    requests.push((generation("Three loans as JSON.", &samplings[2]), structure));
    requests
}

async fn answer(service: &Service, request: (Generation, Structure)) -> Vec<Completed> {
    let answers = service.generator().unwrap().generate_structured(request.0, request.1).await.unwrap();
    let mut completed = answers.complete().await.unwrap();
    // Depends on what else has run.
    completed.iter_mut().for_each(|one| one.cached_tokens = 0);
    completed
}

fn counted(kind: &str, model: &str) -> u64 {
    let text = athanor_telemetry::metrics().render();
    let line = format!("vllm:spec_decode_num_{kind}_tokens_total{{model_name=\"{model}\"}} ");
    text.lines().find_map(|found| found.strip_prefix(&line)).map_or(0, |count| count.parse().unwrap())
}

#[tokio::test]
async fn smollm2_answers_the_same_with_proposed_tokens_alone_and_in_batches() {
    let _metrics = athanor_telemetry::metrics();
    let plain = service("plain", "Disabled");
    let mut expected = Vec::new();
    for request in requests() {
        expected.push(answer(&plain, request).await);
    }
    drop(plain);
    assert_eq!(counted("draft", "plain"), 0);
    let structured: Value = serde_json::from_str(&expected.last().unwrap()[0].text).unwrap_or(Value::Null);
    assert!(structured.is_array() || expected.last().unwrap()[0].completion_tokens == 120);
    for (name, at_once) in [("alone", 1), ("together", 2), ("preempted", 8)] {
        let service = Arc::new(service(name, "Auto"));
        let mut found = Vec::new();
        for part in requests().chunks(at_once) {
            let answers = part.iter().cloned().map(|one| {
                let service = service.clone();
                tokio::spawn(async move { answer(&service, one).await })
            });
            for answer in answers.collect::<Vec<_>>() {
                found.push(answer.await.unwrap());
            }
        }
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found, expected, "{name}: request {index}");
        }
        let (proposed, right) = (counted("draft", name), counted("accepted", name));
        println!("{name}: {right} of {proposed} proposed tokens were right");
        assert!(at_once > 2 || right > 50, "{name}: nothing was gained: {right} of {proposed}");
    }
}
