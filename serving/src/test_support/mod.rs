//! Services with a rule for a model, for the tests of HTTP, gRPC and the router.

mod gate;
mod language;

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

pub use gate::Gate;
pub use language::{BEGIN, END, LONGEST, language_model, language_model_with_template};

use athanor_contract::serve::{ServeConfig, ServeLimits};

use crate::{
    engine::{
        backend::{AdapterWeights, BackendError, EncodeBackend, LowRank},
        encode::Engine,
    },
    service::{Classifier, Embedder, Model, Service, Tokenize, Vocabulary},
};

/// One token a word: its length.
struct Words(Arc<Gate>);

impl Tokenize for Words {
    fn encode(&self, texts: &[String], max_length: usize) -> Result<Vec<Vec<u32>>, String> {
        self.0.tokenised.fetch_add(texts.len(), Ordering::SeqCst);
        Ok(texts.iter().map(|text| text.split(' ').map(|word| word.len() as u32).take(max_length).collect()).collect())
    }
}

impl Vocabulary for Words {
    fn tokens(&self, text: &str, with_special: bool) -> Result<Vec<u32>, String> {
        let begin = with_special.then_some(0);
        Ok(begin.into_iter().chain(text.split(' ').map(|word| word.len() as u32)).collect())
    }

    fn text(&self, tokens: &[u32]) -> Result<String, String> {
        Ok(tokens.iter().map(|&token| "x".repeat(token as usize)).collect::<Vec<_>>().join(" "))
    }

    fn name(&self, token: u32) -> Option<String> {
        (token < 20).then(|| token.to_string())
    }
}

/// Answers "positive", with three to one, to a first word of more than three letters; stands still while a test holds the gate.
struct Rule(Arc<Gate>);

impl EncodeBackend for Rule {
    fn forward(&mut self, rows: &[&[u32]]) -> Result<Vec<Vec<f32>>, BackendError> {
        self.0.batches.fetch_add(1, Ordering::SeqCst);
        let _gate = self.0.lock.lock().map_err(|error| BackendError(error.to_string()))?;
        Ok(rows.iter().map(|row| if row[0] > 3 { vec![0.0, 3f32.ln()] } else { vec![3f32.ln(), 0.0] }).collect())
    }
}

/// Model `reviews`, revision `reviews-1`, at most 3 inputs a request, 3 waiting and 300 bytes; and the gate that holds its model.
pub fn service() -> (Arc<Service>, Arc<Gate>) {
    let limits = ServeLimits { max_body_bytes: 300, max_inputs: 3, queue_inputs: 3, ..ServeLimits::default() };
    let config = ServeConfig {
        model_name: "reviews".into(),
        revision: "reviews-1".into(),
        model_uri: "file:///nowhere".into(),
        http_port: 0,
        grpc_port: 0,
        limits,
        engine: Default::default(),
        adapters: Vec::new(),
        accept_any_model: false,
    };
    let gate = Arc::<Gate>::default();
    let engine = Engine::start(Rule(gate.clone()), &limits).expect("a thread starts");
    let labels = vec!["negative".into(), "positive".into()];
    let classifier = Classifier::new(limits, labels, Arc::new(Words(gate.clone())), engine);
    (Arc::new(Service::new(&config, Model::Classifier(classifier))), gate)
}

/// Two numbers for each text: the length of its first word, and of the second one.
struct Lengths;

impl EncodeBackend for Lengths {
    fn forward(&mut self, rows: &[&[u32]]) -> Result<Vec<Vec<f32>>, BackendError> {
        Ok(rows.iter().map(|row| vec![row[0] as f32, row.get(1).copied().unwrap_or_default() as f32]).collect())
    }
}

/// Embedding model `vectors`, at most 3 inputs a request and 8 tokens an input, with a vocabulary of 20 tokens.
pub fn embedding_model() -> Arc<Service> {
    let limits = ServeLimits { max_inputs: 3, max_sequence_length: 8, ..ServeLimits::default() };
    let config = ServeConfig {
        model_name: "vectors".into(),
        revision: "vectors-1".into(),
        model_uri: "file:///nowhere".into(),
        http_port: 0,
        grpc_port: 0,
        limits,
        engine: Default::default(),
        adapters: Vec::new(),
        accept_any_model: false,
    };
    let engine = Engine::start(Lengths, &limits).expect("a thread starts");
    Arc::new(Service::new(
        &config,
        Model::Embedder(Embedder::new(limits, 20, 2, Arc::new(Words(Arc::default())), engine)),
    ))
}

/// Waits until a condition holds, for some ten seconds.
pub async fn until(what: &str, reached: impl Fn() -> bool) {
    for _ in 0..10_000 {
        if reached() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("still not: {what}");
}

/// The weights of an adapter with which the language model answers in capital letters.
pub fn shout() -> AdapterWeights {
    AdapterWeights { modules: vec![LowRank { module: "shout".into(), ..LowRank::default() }] }
}
