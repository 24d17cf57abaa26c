//! Which folders become which services, and what these answer.

use std::path::PathBuf;

use athanor_contract::serve::{EngineConfig, Weights};
use athanor_models::{Model, Options, Task};
use athanor_serving::{
    engine::{backend::EncodeBackend, generate::sampling::Sampling},
    service::{
        Inputs, ServiceError,
        generate::{Generation, Prompt},
    },
};
use serde_json::json;

use super::*;

fn models(name: &str) -> PathBuf {
    PathBuf::from(std::env::var_os("ATHANOR_MODELS").expect("ATHANOR_MODELS, by `. scripts/env`")).join(name)
}

fn tiny(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../trainer/tests/golden").join(name)
}

fn config() -> ServeConfig {
    serde_json::from_value(json!({"modelName": "m", "revision": "m-1", "modelUri": "file:///m"})).unwrap()
}

/// A copy of a tiny encoder with another architecture.
fn as_architecture(name: &str, architecture: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(tiny(name)).unwrap().map(|file| file.unwrap().path()) {
        std::fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    let path = folder.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["architectures"] = json!([architecture]);
    std::fs::write(&path, config.to_string()).unwrap();
    folder
}

#[tokio::test]
async fn the_folder_says_what_the_model_does() {
    let classifier = load(&config(), &tiny("tiny-bert"), Some(9)).unwrap();
    assert_eq!((classifier.labels(), classifier.max_length()), (&["a".to_owned(), "b".to_owned()][..], 9));
    assert!(matches!(classifier.generator().err(), Some(ServiceError::WrongKind { .. })));
    for (name, architecture) in [("tiny-bert", "BertModel"), ("tiny-mpnet", "MPNetModel")] {
        let folder = as_architecture(name, architecture);
        let service = load(&config(), folder.path(), None).unwrap();
        service.warm_up().await.unwrap();
        let embedder = service.embedder().unwrap();
        let found = embedder.embed(Inputs::Tokens(vec![vec![2, 9, 3]])).await.unwrap();
        let length: f32 = found.vectors[0].iter().map(|value| value * value).sum();
        assert!((length - 1.0).abs() < 1e-5, "{name}: {length}");
        // A head that is not served.
        let folder = as_architecture(name, &architecture.replace("Model", "ForMaskedLM"));
        let error = format!("{:#}", load(&config(), folder.path(), None).err().unwrap());
        assert!(error.contains("architectures"), "{error}");
    }
}

#[tokio::test]
async fn an_encoder_has_no_weights_of_four_bits() {
    let engine = EngineConfig { weights: Weights::Int4, ..EngineConfig::default() };
    let error = load(&ServeConfig { engine, ..config() }, &tiny("tiny-bert"), None).err().unwrap();
    assert!(error.to_string().starts_with("engine.weights: Int4"), "{error:#}");
}

#[test]
fn vectors_are_the_mean_of_training_scaled_to_length_one() {
    let folder = as_architecture("tiny-bert", "BertModel");
    let mut backend = TorchEmbedder::load(folder.path(), Device::Cpu).unwrap();
    let model = Model::load(folder.path(), Task::Embedding, &Options::default(), Device::Cpu).unwrap();
    let rows: [&[u32]; 3] = [&[2, 9, 8, 33, 3], &[2, 40, 3], &[2, 3]];
    let together = backend.forward(&rows).unwrap();
    for (row, found) in rows.iter().zip(&together) {
        let (ids, _) = athanor_models::tokenizer::pad(&[row], 0);
        let vector = tch::no_grad(|| model.embedding(&model.last_hidden_state(&ids, None, false), None));
        let vector = &vector / vector.norm();
        let expected: Vec<f32> = Vec::<Vec<f32>>::try_from(vector).unwrap().remove(0);
        let single = backend.forward(&[row]).unwrap().remove(0);
        for ((a, b), c) in found.iter().zip(&expected).zip(&single) {
            assert!((a - b).abs() < 1e-5 && (a - c).abs() < 1e-5, "{row:?}: {a}, {b}, {c}");
        }
    }
}

#[tokio::test]
async fn smollm2_answers_a_conversation() {
    let engine = EngineConfig {
        max_model_length: Some(256),
        kv_cache_memory: Some(64 << 20),
        weights: Weights::FP32,
        ..EngineConfig::default()
    };
    let service = load(&ServeConfig { engine, ..config() }, &models("smollm2-135m"), None).unwrap();
    let generator = service.generator().unwrap();
    assert_eq!(service.max_length(), 256);
    let chat = |messages: serde_json::Value| Generation {
        prompt: Prompt::Chat(messages.as_array().unwrap().clone()),
        choices: 1,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        stop: vec![" Paris".into()],
        max_tokens: Some(24),
        adapter: None,
        min_tokens: 0,
    };
    let question = json!([{"role": "user", "content": "What is the capital of France?"}]);
    let answers = generator.generate(chat(question)).await.unwrap().complete().await.unwrap();
    assert_eq!(answers[0].text, "The capital of France is");
}
