//! The engine's backend over libtorch: a classifier of the crate `models` on one device, in FP32.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use athanor_models::{Classifier, Tokenizer, tokenizer::pad};
use athanor_serving::{
    engine::backend::{BackendError, EncodeBackend},
    service::Tokenize,
};
use tch::Device;

/// A classifier and the id it pads with.
pub struct TorchBackend {
    classifier: Classifier,
    device: Device,
    pad_id: i64,
}

/// Loads the model and its tokenizer from a local folder: the backend, its labels and the tokenizer.
pub fn load(folder: &Path) -> anyhow::Result<(TorchBackend, Vec<String>, TextTokenizer)> {
    // libtorch's default counts the machine's cores, not those this container may use.
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    tch::set_num_threads(i32::try_from(threads).unwrap_or(1));
    let device = Device::cuda_if_available();
    let tokenizer = Tokenizer::load(folder)?;
    let classifier = Classifier::load(folder, device)?;
    let labels = classifier.labels().to_vec();
    let pad_id = classifier.config().pad_token_id;
    tracing::info!(?device, threads, labels = labels.len(), "model loaded");
    Ok((TorchBackend { classifier, device, pad_id }, labels, TextTokenizer(tokenizer)))
}

impl TorchBackend {
    /// Tokens of the longest text the model takes.
    pub fn positions(&self) -> usize {
        self.classifier.config().max_length()
    }
}

impl EncodeBackend for TorchBackend {
    fn forward(&mut self, rows: &[&[u32]]) -> Result<Vec<Vec<f32>>, BackendError> {
        // libtorch's errors (memory of a GPU above all) are panics here. Weights are only read, so nothing is left half changed, and
        // the next batch may well fit.
        let logits = catch_unwind(AssertUnwindSafe(|| {
            let (ids, mask) = pad(rows, self.pad_id);
            self.classifier.forward(&ids, &mask)
        }));
        let logits = logits.map_err(|panic| BackendError(describe(&*panic)))?;
        Vec::<Vec<f32>>::try_from(logits).map_err(|error| BackendError(error.to_string()))
    }

    fn call_cost(&self) -> usize {
        // On a GPU a call of a small encoder takes as long as some thousand tokens, on a CPU as long as a handful.
        if self.device.is_cuda() { 2048 } else { 12 }
    }
}

/// The first line of a panic's message: libtorch appends a stack.
fn describe(panic: &(dyn std::any::Any + Send)) -> String {
    let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    message.and_then(|message| message.lines().next()).unwrap_or("a panic").to_owned()
}

/// The model's tokenizer.
pub struct TextTokenizer(Tokenizer);

impl Tokenize for TextTokenizer {
    fn encode(&self, texts: &[String], max_length: usize) -> Result<Vec<Vec<u32>>, String> {
        self.0.encode_batch(texts, max_length).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use athanor_models::Model;
    use tch::{Kind, Tensor};

    use super::*;

    fn golden(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../trainer/tests/golden").join(name)
    }

    fn probabilities(logits: Vec<Vec<f32>>) -> Vec<f64> {
        let logits: Vec<Tensor> = logits.iter().map(|row| Tensor::from_slice(row)).collect();
        Vec::<f64>::try_from(Tensor::stack(&logits, 0).softmax(-1, Kind::Double).reshape([-1])).unwrap()
    }

    /// Sets two of each four neighbours of the encoder's matrices to zero.
    fn prune(model: &Model) {
        tch::no_grad(|| {
            for (_, weight) in model.matrices() {
                let mut groups = weight.view([-1, 4]);
                let (_, smallest) = groups.abs().topk(2, 1, false, false);
                let _ = groups.scatter_value_(1, &smallest, 0.0);
            }
        });
    }

    #[test]
    fn pruned_and_eight_bit_folders_answer_as_the_model_they_were_written_from() {
        for name in ["tiny-bert", "tiny-mpnet"] {
            let model = Model::load_trained(&golden(name), Device::Cpu).unwrap();
            let rows: [&[u32]; 2] = [&[2, 9, 8, 33, 3], &[2, 40, 3]];
            for (form, tolerance) in [("pruned", 1e-5), ("weights", 0.05), ("weights and inputs", 0.1)] {
                prune(&model);
                let to = tempfile::tempdir().unwrap();
                match form {
                    "pruned" => model.save(to.path()),
                    form => model.save_quantized(to.path(), form == "weights and inputs"),
                }
                .unwrap();
                std::fs::copy(golden(name).join("tokenizer.json"), to.path().join("tokenizer.json")).unwrap();
                let (mut backend, labels, _) = load(to.path()).unwrap();
                assert_eq!(labels, ["a", "b"], "{name}, {form}");
                let found = probabilities(backend.forward(&rows).unwrap());
                let (ids, mask) = pad(&rows, model.config().pad_token_id);
                let exact = tch::no_grad(|| model.forward(&ids, Some(&mask), false));
                let exact = probabilities(Vec::<Vec<f32>>::try_from(exact).unwrap());
                for (a, b) in found.iter().zip(&exact) {
                    assert!((a - b).abs() < tolerance, "{name}, {form}: {found:?} is not {exact:?}");
                }
            }
        }
    }
}
