//! The engine's backend for encoders on a CPU without libtorch: packed weights of eight bits.

use std::path::Path;

use athanor_contract::serve::Weights;
use athanor_cpu::{Encoder, InstructionSet};
use athanor_models::{EncoderConfig, LoadError, Model, Options, Packing, Task, packed, quantize};
use athanor_serving::engine::backend::{BackendError, EncodeBackend};
use tch::Device;

/// A packed encoder with its head.
pub struct PackedEncoder(Encoder);

impl PackedEncoder {
    /// The kernels with which a model is packed: the configuration asks for Int8, or it does not say and the artifact was
    /// compressed to eight bits with rounded inputs. None: libtorch computes.
    pub fn applies(config: &EncoderConfig, weights: Weights, device: Device) -> Option<InstructionSet> {
        let is_eight_bits = match weights {
            Weights::Int8 => true,
            Weights::Auto => quantize::packing(config) == Packing::Int8,
            Weights::FP32 | Weights::BF16 | Weights::Int4 => false,
        };
        InstructionSet::best().filter(|_| is_eight_bits && device == Device::Cpu)
    }

    /// Reads a folder: a classifier with these labels, or an embedding model.
    ///
    /// # Errors
    /// A file of the folder cannot be used, or there is no memory.
    pub fn load(
        folder: &Path,
        labels: Option<Vec<String>>,
        set: InstructionSet,
        threads: usize,
    ) -> Result<Self, LoadError> {
        let task = labels.map_or(Task::Embedding, Task::Classification);
        let model = Model::load(folder, task, &Options::default(), Device::Cpu)?;
        packed::encoder::pack(&model, set, threads).map(Self)
    }
}

impl EncodeBackend for PackedEncoder {
    fn forward(&mut self, rows: &[&[u32]]) -> Result<Vec<Vec<f32>>, BackendError> {
        self.0.encode(rows).map_err(|error| BackendError(error.to_string()))
    }

    /// Texts are not padded, and a call costs little more than its tokens.
    fn call_cost(&self) -> usize {
        2
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use athanor_models::Classifier;

    use super::*;
    use crate::torch::{TorchClassifier, TorchEmbedder};

    const ROWS: [&[u32]; 4] =
        [&[2, 9, 8, 33, 3], &[2, 40, 3], &[2, 3], &[2, 7, 7, 7, 12, 19, 5, 33, 21, 9, 40, 11, 8, 15, 16, 31, 3]];

    fn golden(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../trainer/tests/golden").join(name)
    }

    fn instruction_sets() -> Vec<InstructionSet> {
        let best = InstructionSet::best().expect("the tests need AVX2");
        let all = [InstructionSet::Avx2, InstructionSet::Avx512, InstructionSet::Avx512Bf16];
        all.into_iter().filter(|set| *set <= best).collect()
    }

    /// Largest difference over the largest number.
    fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
        let largest = b.iter().flatten().fold(0.0_f32, |most, value| most.max(value.abs()));
        std::iter::zip(a.iter().flatten(), b.iter().flatten()).fold(0.0_f32, |most, (a, b)| most.max((a - b).abs()))
            / largest
    }

    #[test]
    fn packed_classifiers_are_near_libtorch_and_do_not_depend_on_their_batch() {
        for name in ["tiny-bert", "tiny-mpnet"] {
            let folder = golden(name);
            let model = Model::load_trained(&folder, Device::Cpu).unwrap();
            let to = tempfile::tempdir().unwrap();
            model.save(to.path()).unwrap();
            let classifier = Classifier::load(to.path(), Device::Cpu).unwrap();
            let labels = classifier.labels().to_vec();
            let exact = TorchClassifier::new(classifier, Device::Cpu).forward(&ROWS).unwrap();
            for set in instruction_sets() {
                let mut packed = PackedEncoder::load(to.path(), Some(labels.clone()), set, 2).unwrap();
                let found = packed.forward(&ROWS).unwrap();
                let far = distance(&found, &exact);
                assert!(far < 0.05, "{name} {set:?}: {far}, {found:?} is not {exact:?}");
                for (row, together) in ROWS.iter().zip(&found) {
                    assert_eq!(packed.forward(&[row]).unwrap()[0], *together, "{name} {set:?}");
                }
            }
        }
    }

    #[test]
    fn packed_vectors_are_near_libtorchs() {
        let Some(models) = std::env::var_os("ATHANOR_MODELS") else {
            panic!("ATHANOR_MODELS is not set: run `make setup` and `. scripts/env`");
        };
        let folder = PathBuf::from(models).join("minilm-l6");
        let rows: Vec<Vec<u32>> = (1..40_u32)
            .map(|text| (0..=text % 23).map(|place| 1000 + (text * 37 + place * 101) % 20_000).collect())
            .collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let exact = TorchEmbedder::load(&folder, Device::Cpu).unwrap().forward(&rows).unwrap();
        for set in instruction_sets() {
            let found = PackedEncoder::load(&folder, None, set, 2).unwrap().forward(&rows).unwrap();
            let cosine = |a: &[f32], b: &[f32]| std::iter::zip(a, b).map(|(a, b)| a * b).sum::<f32>();
            let least = std::iter::zip(&found, &exact).map(|(a, b)| cosine(a, b)).fold(f32::INFINITY, f32::min);
            assert!(least > 0.99, "{set:?}: {least}");
        }
    }

    #[test]
    fn texts_that_cannot_be_read_are_errors() {
        let mut packed = PackedEncoder::load(&golden("tiny-bert"), None, InstructionSet::Avx2, 1).unwrap();
        for (row, part) in [(vec![], "0 tokens"), (vec![1; 10_000], "10000 tokens"), (vec![1 << 30], "vocabulary")] {
            let error = packed.forward(&[&row]).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
