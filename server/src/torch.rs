//! The engine's backends over libtorch for encoders of the crate `models`, in FP32 on one device.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use athanor_models::{Classifier, EncoderConfig, LoadError, Model, Options, Task, quantize, tokenizer::pad};
use athanor_serving::engine::backend::{BackendError, EncodeBackend};
use tch::{Device, Kind, Tensor};

/// A classifier and the id it pads with.
pub struct TorchClassifier {
    classifier: Classifier,
    device: Device,
    pad_id: i64,
}

impl TorchClassifier {
    pub fn new(classifier: Classifier, device: Device) -> Self {
        let pad_id = classifier.config().pad_token_id;
        Self { classifier, device, pad_id }
    }
}

impl EncodeBackend for TorchClassifier {
    fn forward(&mut self, rows: &[&[u32]]) -> Result<Vec<Vec<f32>>, BackendError> {
        caught(|| {
            let (ids, mask) = pad(rows, self.pad_id);
            self.classifier.forward(&ids, &mask)
        })
    }

    fn call_cost(&self) -> Option<usize> {
        Some(call_cost(self.device))
    }
}

/// An encoder whose vectors are those of training: the mean of the tokens' hidden states, which training compares by
/// cosine. They are scaled to length 1, so that a product of two is their cosine.
pub struct TorchEmbedder {
    model: Model,
    device: Device,
}

impl TorchEmbedder {
    pub fn load(folder: &Path, device: Device) -> Result<Self, LoadError> {
        let how = quantize::packing(&EncoderConfig::load(folder)?);
        let mut model = Model::load(folder, Task::Embedding, &Options::default(), device)?;
        if device == Device::Cpu {
            model.pack_for_good(how)?;
        }
        Ok(Self { model, device })
    }
}

impl EncodeBackend for TorchEmbedder {
    fn forward(&mut self, rows: &[&[u32]]) -> Result<Vec<Vec<f32>>, BackendError> {
        caught(|| {
            tch::no_grad(|| {
                let (ids, mask) = pad(rows, self.model.config().pad_token_id);
                let padded = rows.iter().any(|row| row.len() != rows[0].len());
                let mask = padded.then(|| mask.to_device(self.device));
                let last = self.model.last_hidden_state(&ids.to_device(self.device), mask.as_ref(), false);
                let vectors = self.model.embedding(&last, mask.as_ref());
                unit(&vectors).to_device(Device::Cpu)
            })
        })
    }

    fn call_cost(&self) -> Option<usize> {
        Some(call_cost(self.device))
    }
}

/// Vectors [B, C] scaled to length 1.
fn unit(vectors: &Tensor) -> Tensor {
    let lengths = vectors.square().sum_dim_intlist([-1_i64].as_slice(), true, Kind::Float).sqrt();
    vectors / lengths.clamp_min(1e-12)
}

/// Runs the model. libtorch's errors (memory of a GPU above all) are panics here. Weights are only read, so nothing is
/// left half changed, and the next batch may well fit.
fn caught(run: impl FnOnce() -> Tensor) -> Result<Vec<Vec<f32>>, BackendError> {
    let outputs = catch_unwind(AssertUnwindSafe(run)).map_err(|panic| BackendError(describe(&*panic)))?;
    Vec::<Vec<f32>>::try_from(outputs).map_err(|error| BackendError(error.to_string()))
}

/// On a GPU a call of a small encoder takes as long as some thousand tokens, on a CPU as long as a handful.
fn call_cost(device: Device) -> usize {
    if device.is_cuda() { 2048 } else { 12 }
}

/// The first line of a panic's message: libtorch appends a stack.
pub fn describe(panic: &(dyn std::any::Any + Send)) -> String {
    let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    message.and_then(|message| message.lines().next()).unwrap_or("a panic").to_owned()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

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
                let classifier = Classifier::load(to.path(), Device::Cpu).unwrap();
                assert_eq!(classifier.labels(), ["a", "b"], "{name}, {form}");
                let mut backend = TorchClassifier::new(classifier, Device::Cpu);
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
